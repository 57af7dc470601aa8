"""From a gradient to the next parameters: the state, optimizers, schedules, parameter groups.

Imports config. Add an optimizer as a function in optimizers.py, a schedule as one in schedules.py.
"""
