"""Augmentations: functions of a batch inside the jitted step, which move all fields of an example.

Imports config and data. A new one is a function in geometry.py, colour.py or mixing.py and its name
in chain.py.
"""
