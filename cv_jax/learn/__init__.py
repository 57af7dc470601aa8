"""Building blocks of tasks: the training step, first parameters, losses, metrics, evaluations.

Imports every room above it: config, runtime, data, workdir, augment, models, optim. A piece that
only one task uses lives with that task.
"""
