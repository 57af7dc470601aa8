"""ImageNet with ViT-S/16: the plain recipe of 90 epochs.

    python train.py --config=configs/imagenet_vit_s16.py --config.data.dir=DIR

Data: see configs/imagenet_resnet50.py.

Settings: Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k"
(https://arxiv.org/abs/2205.01580). AdamW with rate 1e-3 and weight decay 1e-4 times the rate, 1,024
images a step, 10,000 steps of warm-up and a cosine, gradients clipped to norm 1. Crops have 5 to
100 % of the area, then come RandAugment(2, 10) and mixup 0.2. Pixels are scaled to [-1, 1].

Published top-1: 76.5 % after 90 epochs, in 6 to 7 hours on a TPU v3-8. Not run at full length:
docs/scaling.md has the TPU compiler's estimate of its speed.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 90.0
    config.batch_size = 1024
    config.model = "vit_s16"
    config.augment = "flip|randaugment(2, 10)|mixup(0.2)"
    config.log_every = "100 steps"

    config.data.name = "imagenet2012"
    config.data.size = 224
    config.data.crop = "random_resized(0.05)"
    config.data.eval_crop = 0.875
    config.data.normalize_by = "half"
    config.data.num_val = 10_000

    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 1e-4
    config.optim.clip_norm = 1.0
    config.optim.schedule = "cosine"
    config.optim.warmup = "10000 steps"
    return choose(config, arg)
