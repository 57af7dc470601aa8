"""The classic tutorial's program: a LeNet on CIFAR-10, four images a step, two epochs.

    python train.py --config=configs/cifar10_lenet.py

Batch 4, SGD with rate 0.001 and momentum 0.9, inputs in [0, 1], no augmentation, all 50,000
images, a line of loss every 2,000 steps.

Measured: test accuracy 50.10 % ± 0.80 (n = 8), 6.3 s of training a seed where the eight share two
CPU cores (results/cifar10_lenet.json), 25 s alone. The same program in PyTorch gave 49.5 % in one
run.
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
