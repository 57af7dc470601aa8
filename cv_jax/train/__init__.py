"""One step made many: chunks of steps, runs side by side, compiled programs, evaluation, FLOPs.

Imports every room but trained and tools. It knows no task, model or data set by name, and a new
one changes nothing here.
"""
