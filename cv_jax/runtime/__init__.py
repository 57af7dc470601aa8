"""What a program runs on: devices, processes, signals, start-up, the clock, random streams.

Imports config. A new experiment changes nothing here; mesh.py says how arrays are laid out.
"""
