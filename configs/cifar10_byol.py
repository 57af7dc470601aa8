"""CIFAR-10 without labels: BYOL, as configs/cifar10_simclr.py but for how it learns.

    python train.py --config=configs/cifar10_byol.py --workdir=runs/byol

The teacher sees every view, too, so that a step is dearer and there are fewer of them, half as
large. VICReg and Barlow Twins are one word away: --config.method=vicreg,
--config.method=barlow_twins.

Measured on an H100, one seed, 0.213 PFLOP: 51.42 % of test by the 200 nearest neighbours
(results/cifar10_byol.json). 27 epochs, 0.431 PFLOP, gave 64.48 % of val, and with 10 % of the
labels then 81.57 %, where SimCLR with as large steps gave 81.17 % (results/README.md).
"""

import ml_collections

from configs import cifar10_simclr
from cv_jax.config.base import choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = cifar10_simclr.get_config()
    config.method = "byol(momentum=0.99, projector=(512, 128), predictor=(512,))"
    config.epochs = 12.0
    config.batch_size = 256
    config.progressive_resizing = "size(16, until=0.95)"
    return choose(config, arg)
