"""Eight kinds of tissue in patches of colorectal cancer: n94 from scratch.

    python train.py --config=configs/colorectal_histology.py

TensorFlow Datasets prepares colorectal_histology: 5,000 images of 150x150 pixels, all in train. A
fifth of them becomes test, stratified by class. The patches are from ten slides, and which one a
patch is from is not known: patches of one slide are in train and test, so that the accuracy is too
high for a new patient. Images are fitted into 75x75 pixels.

Not measured here: the data were not at hand.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.model = "n94"
    config.epochs = 60.0
    config.batch_size = 128
    config.augment = "rot90|flip|stain_jitter(0.05)|translate(4)"
    config.tta = "square"
    config.label_smoothing = 0.1

    config.data.name = "colorectal_histology"
    config.data.size = 75
    config.data.val_fraction = 0.1

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.05
    config.optim.warmup = "2 epochs"
    config.optim.ema = 0.99
    config.optim.rules = (("whiten/.*", "frozen?"), (".*", "base"))
    config.log_every = config.eval_every = config.checkpoint_every = "5 epochs"
    return choose(config, arg)
