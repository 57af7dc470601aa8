"""CIFAR-10 from scratch with few labels: the baseline of configs/cifar10_finetune.py.

    python train.py --config=configs/cifar10_few_labels.py
    python train.py --config=configs/cifar10_few_labels.py --config.data.label_fraction=0.01
    python train.py --config=configs/cifar10_few_labels.py --config.data.labels_per_class=10

Measured on test: 36.38 % with ten labels a class (n = 5), 58.26 % with 1 % of the labels (n = 5),
78.02 % with 10 % (n = 4), and 83.19 % with --config.steps=600 (n = 4, results/README.md).
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.steps = 300
    config.batch_size = 100
    config.model = "n94"
    config.augment = "flip|crop(4)|cutout(12)"
    config.label_smoothing = 0.2
    config.tta = "mirror"
    config.log_every = config.eval_every = config.checkpoint_every = "100 steps"

    config.data.name = "cifar10"
    config.data.label_fraction = 0.1

    config.optim.name = "adamw"
    config.optim.lr = 0.01
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.01
    config.optim.warmup = "20 steps"
    config.optim.rules = (
        ("whiten/.*", "frozen?"),
        ("head/kernel", "head"),
        (r".*/conv\d/kernel", "filters?"),
        (".*", "base"),
    )
    config.optim.groups = {
        "head": {"lr": 0.02},
        "filters": {
            "name": "muon(ns_steps=3, normalize_weights=True)",
            "lr": 0.1,
            "momentum": 0.6,
            "weight_decay": 0.0,
        },
    }
    return choose(config, arg)
