"""Streets seen from a car (CamVid): 11 classes, by a narrow ResNet-18 from scratch.

    python train.py --config=configs/camvid.py --config.data.dir=CAMVID

CAMVID holds {train,val,test}/{images,labels}: 367, 101 and 233 images of 480x360 pixels, with masks
of the values 0 to 10, and 11 for void.

Measured, one seed, 25 minutes on 2 cores: a mean IoU of 53.27 % on test and 61.21 % on val, and
17.03 % for the class most frequent at each place (results/camvid.json). ENet reaches 51.3 %
(A. Paszke et al., https://arxiv.org/abs/1606.02147). For a GPU, add
--config.model="resnet18(stem='imagenet')" --config.method="pixels(width=128, stride=2, dice=1.0)"
and --config.epochs=300, which nobody has measured.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "segmentation"
    config.method = "pixels(width=64, dice=1.0)"
    config.model = "resnet18(stem='imagenet', width=32)"
    config.epochs = 100.0
    config.batch_size = 8
    config.eval_batch_size = 16
    config.augment = (
        "flip|affine(scale=(0.6, 1.6), translate=40)|random_crop((192, 256))"
        "|color_jitter(0.5, 0.5, 0.5, 0.1)"
    )
    config.class_weights = "sqrt"
    config.tta = "mirror"

    config.data.name = "camvid"
    config.data.num_val = -1

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup = "2 epochs"
    config.optim.clip_norm = 10.0
    config.optim.ema = 0.99
    config.log_every = config.eval_every = config.checkpoint_every = "10 epochs"
    return choose(config, arg)
