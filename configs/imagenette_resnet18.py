"""Imagenette, ten easy classes of ImageNet, with ResNet-18 at 128 pixels.

    python train.py --config=configs/imagenette_resnet18.py

9,469 training and 3,925 test images of 160 pixels and more. TFDS prepares them once, with
TensorFlow; or unpack the archive of https://github.com/fastai/imagenette and name its folder with
--config.data.name=folder --config.data.dir=DIR.

Meant for one GPU. Not run at full length.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 40.0
    config.batch_size = 64
    config.model = "resnet18(stem='imagenet', zero_scale=True)"
    config.augment = "flip"
    config.label_smoothing = 0.1
    config.tta = "mirror"

    config.data.name = "imagenette/160px-v2"
    config.data.size = 128
    config.data.crop = "random_resized(0.35)"
    config.data.num_val = 1000

    config.optim.name = "sgd(nesterov=True)"
    config.optim.lr = 0.05
    config.optim.lr_batch_size = 64
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = "2 epochs"
    return choose(config, arg)
