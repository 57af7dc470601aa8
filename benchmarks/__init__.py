"""Measurements beside PyTorch and beside plain lax; nothing here is needed to train."""
