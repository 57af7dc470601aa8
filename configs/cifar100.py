"""CIFAR-100 with Wide ResNet 28-10 and the settings of its paper (arXiv 1605.07146).

    python train.py --config=configs/cifar100.py

SGD with Nesterov momentum for 200 epochs. The learning rate is multiplied by 0.2 after epochs 60,
120 and 160. Use a GPU or TPU. Not run at full length yet.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 200.0
    config.batch_size = 128
    config.model = "wrn28_10"
    config.augment = "crop(4)|flip"
    config.checkpoint_every = "5 epochs"

    config.data.name = "cifar100"
    config.data.num_val = 5000

    config.optim.name = "sgd(nesterov=True)"
    config.optim.lr = 0.1
    config.optim.lr_batch_size = 128
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "step(at=(0.3, 0.6, 0.8), factor=0.2)"
    return choose(config, arg)
