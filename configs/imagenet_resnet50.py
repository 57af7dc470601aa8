"""ImageNet with ResNet-50 v1.5: 90 epochs of SGD, the reference of most papers.

    python train.py --config=configs/imagenet_resnet50.py --config.data.dir=DIR

DIR is TFDS's data directory with imagenet2012 as array_record; docs/data.md says how to prepare it,
and how to read DIR/{train,val}/CLASS/*.JPEG instead.

Settings: Goyal et al. 2017 (https://arxiv.org/abs/1706.02677). The rate is 0.1 for 256 images a
step, linear in the batch, after 5 epochs of warm-up. The last scale of each block starts as 0, and
only kernels decay, by 1e-4. Newer references add a cosine, Nesterov's momentum and label smoothing
0.1. Crops have 8 to 100 % of the area; evaluation resizes to 256 and crops 224.

Published top-1: 76.1 % (torchvision's first weights, 90 epochs), 76.5 % (scenic, on TPU). Not run
at full length: docs/scaling.md has the TPU compiler's estimate of its speed.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 90.0
    config.batch_size = 1024
    config.model = "resnet50(stem='imagenet', zero_scale=True)"
    config.augment = "flip"
    config.label_smoothing = 0.1
    config.log_every = "100 steps"

    config.data.name = "imagenet2012"
    config.data.size = 224
    config.data.crop = "random_resized"
    config.data.eval_crop = 0.875
    config.data.normalize_by = "imagenet"
    config.data.num_val = 10_000

    config.optim.name = "sgd(nesterov=True)"
    config.optim.lr = 0.1
    config.optim.lr_batch_size = 256
    config.optim.weight_decay = 1e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = "5 epochs"
    config.optim.rules = (
        (".*/(scale|bias)", "not_decayed"),
        (".*", "base"),
    )
    config.optim.groups = {"not_decayed": {"weight_decay": 0.0}}
    return choose(config, arg)
