"""Blood cells in photographs of smears (BCCD), found by a small ResNet-18 from scratch.

    python train.py --config=configs/bccd.py --config.data.dir=DIR

DIR is a directory in the layout of PASCAL VOC: https://github.com/Shenggan/BCCD_Dataset.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "detection"
    config.method = "centres(width=48)"
    config.model = "resnet18(stem='imagenet', width=32)"
    config.epochs = 80.0
    config.batch_size = 16
    config.eval_batch_size = 32
    config.augment = "flip|flip(vertical=True)|affine(scale=(0.8, 1.25), translate=24)|color_jitter(0.2, 0.2, 0.2, 0.02)"

    config.data.name = "voc"
    config.data.size = 320
    config.data.num_val = -1

    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup = "3 epochs"
    config.optim.clip_norm = 10.0
    config.optim.ema = 0.99
    config.eval_every = config.log_every = config.checkpoint_every = "10 epochs"
    return choose(config, arg)
