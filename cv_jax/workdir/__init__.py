"""What a run leaves on disk and on the console: lock, checkpoints, log, TensorBoard, results.

Imports config, runtime and data. It stores names and numbers and knows no task. New files of a
work directory are written through files.py, so that they work in a bucket, too.
"""
