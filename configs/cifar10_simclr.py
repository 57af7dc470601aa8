"""CIFAR-10 without labels: SimCLR on 50,000 images, in an hour on two CPU cores.

    python train.py --config=configs/cifar10_simclr.py --workdir=runs/simclr
    python train.py --config=configs/cifar10_finetune.py --config.init_from=runs/simclr:backbone

The network is n94. Muon trains its filters, as in configs/cifar10.py. Views have 16 pixels a side,
and 24 in the last 30 % of the steps. A step with the small views costs two fifths of a later one.

Measured, one seed: the 200 nearest neighbours classify 72.48 % of test correctly, ridge regression
72.36 %. Training took 0.473 PFLOP and 52 minutes (results/cifar10_simclr.json).
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "ssl"
    config.method = "simclr(temperature=0.2, projector=(512, 128))"
    config.epochs = 26.0
    config.batch_size = 512
    config.model = "n94"
    config.augment = (
        "random_resized_crop(size=24, scale=(0.2, 1.0))|flip"
        "|color_jitter(0.4, 0.4, 0.4, hue=0.1, p=0.8)|grayscale(0.2)"
    )
    config.progressive_resizing = "size(16, until=0.7)"
    config.log_every = "1 epoch"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "1 epoch"

    config.data.name = "cifar10"

    config.optim.name = "adamw"
    config.optim.lr = 0.002
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 1e-4
    config.optim.warmup = "50 steps"
    config.optim.rules = (
        ("backbone/whiten/.*", "frozen?"),
        (r"backbone/.*/conv\d/kernel", "filters?"),
        (r".*/bias|.*/scale", "vectors"),
        (".*", "base"),
    )
    config.optim.groups = {
        "vectors": {"lr": 0.01},
        "filters": {
            "name": "muon(ns_steps=3, normalize_weights=True)",
            "lr": 0.1,
            "momentum": 0.6,
            "weight_decay": 0.0,
        },
    }
    return choose(config, arg)
