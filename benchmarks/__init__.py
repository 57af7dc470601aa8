"""Measurements against PyTorch and plain lax; training needs nothing from here."""
