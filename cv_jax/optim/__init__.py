"""From a gradient to the next parameters: the state, optimizers, schedules, groups of parameters.

Imports config. A new optimizer is a function in optimizers.py, a new schedule one in schedules.py.
"""
