"""Blood cells without their boxes: SimCLR on the photographs of configs/bccd.py.

    python train.py --config=configs/bccd_simclr.py --config.data.dir=BCCD --workdir=runs/simclr
    python train.py --config=configs/bccd.py --config.data.dir=BCCD \\
        --config.init_from=runs/simclr:backbone

The backbone is that of configs/bccd.py. Views have 96 pixels a side.

Measured, one seed, 567 s: a corner finds 11.5 % of the val images (results/bccd_simclr.json). The
detector that starts from it is as good as one from scratch: after 20 of its 60 epochs, AP50 differs
by 0.56 points (95 % interval -1.42 to 2.54, n = 3 each).
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "ssl"
    config.method = "simclr(temperature=0.2, projector=(256, 128))"
    config.model = "resnet18(stem='imagenet', width=32)"
    config.epochs = 300.0
    config.batch_size = 102
    config.eval_batch_size = 32
    config.augment = (
        "random_resized_crop(size=96, scale=(0.1, 0.6))|flip|flip(vertical=True)"
        "|color_jitter(0.4, 0.4, 0.4, hue=0.1, p=0.8)|grayscale(0.2)"
    )

    config.data.name = "voc"
    config.data.size = 256
    config.data.num_val = -1

    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.05
    config.optim.warmup = "10 epochs"
    config.log_every = config.eval_every = config.checkpoint_every = "50 epochs"
    return choose(config, arg)
