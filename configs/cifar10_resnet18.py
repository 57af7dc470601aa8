"""CIFAR-10 with the ResNet-18 that most papers compare with: 200 epochs of SGD.

    python train.py --config=configs/cifar10_resnet18.py

Use a GPU or TPU. Not run at full length yet.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 200.0
    config.batch_size = 128
    config.model = "resnet18"
    config.augment = "crop(4, mode='zero')|flip"
    config.checkpoint_every = "5 epochs"

    config.data.name = "cifar10"
    config.data.num_val = 5000

    config.optim.name = "sgd(nesterov=True)"
    config.optim.lr = 0.1
    config.optim.lr_batch_size = 128
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = "2 epochs"
    return choose(config, arg)
