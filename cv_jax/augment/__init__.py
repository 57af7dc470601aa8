"""Augmentations: functions of a batch inside the jitted step.

Imports config. A new one is a function in geometry.py, colour.py or mixing.py and its name in
chain.py.
"""
