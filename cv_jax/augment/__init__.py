"""Augmentations: functions of a batch inside the jitted step, which move all fields of an example.

Imports config and data. To add an augmentation, write a function in a file of this room,
such as geometry.py, colour.py or mixing.py, and list it in chain.py.
"""
