"""Discs, squares and triangles on noise: segmentation in a minute, without a download.

    python train.py --config=configs/shapes_masks.py

The images are those of configs/shapes.py: 512 for training, of which 64 are val, and 128 for test.

Measured, one seed: a mean IoU of 92.95 % on test after 69 s of training on 2 cores.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "segmentation"
    config.method = "pixels(dice=1.0)"
    config.model = "unet(width=8, levels=4)"
    config.epochs = 30.0
    config.batch_size = 32
    config.eval_batch_size = 128
    config.augment = "flip|affine(scale=(0.8, 1.2), translate=8)"

    config.data.name = "shapes"
    config.data.num_val = 64

    config.optim.name = "adamw"
    config.optim.lr = 5e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.01
    config.optim.schedule = "cosine"
    config.optim.warmup = "1 epoch"
    config.log_every = config.eval_every = config.checkpoint_every = "5 epochs"
    return choose(config, arg)
