"""What to do: every leaf with default and unit, its check, the command line, durations, sweeps.

Imports no other room. Visitors start in base.py (all leaves) and rules.py (their checks).
"""
