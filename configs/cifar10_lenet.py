"""The program of a classic tutorial: a LeNet on CIFAR-10, four images a step, two epochs.

    python train.py --config=configs/cifar10_lenet.py

Batch size 4, SGD with learning rate 0.001 and momentum 0.9, inputs in [0, 1], no augmentation, all
50,000 images. The loss is printed every 2,000 steps.

Measured: test accuracy 50.10 % ± 0.80 (n = 8). Training takes 6.3 s a seed if the eight seeds share
two CPU cores (results/cifar10_lenet.json), and 25 s for one seed alone. The same program in PyTorch
reached 49.5 % in one run.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 2.0
    config.batch_size = 4
    config.model = "lenet"
    config.log_every = "2000 steps"

    config.data.name = "cifar10"
    config.data.normalize = False

    config.optim.name = "sgd"
    config.optim.lr = 0.001
    config.optim.lr_batch_size = 0
    config.optim.schedule = "constant"
    return choose(config, arg)
