"""Configs: every leaf with its default and unit, checks, the command line, durations, sweeps.

Imports no other room. Start reading in base.py (all leaves) and rules.py (their checks).
"""
