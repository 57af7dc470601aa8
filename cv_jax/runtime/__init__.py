"""Devices, processes, signals, start-up, the clock and PRNG streams of a program.

Imports config. A new experiment changes nothing here; mesh.py defines how arrays are laid out.
"""
