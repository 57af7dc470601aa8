"""Images of your own, in class folders, on a laptop.

    python train.py --config=configs/folder.py --config.data.dir=DIR

DIR holds DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or DIR/CLASS/*.jpg, of which a fifth
becomes test; or DIR is a CSV file with the columns path and label. docs/data.md has all ways.

Without DIR/val, a tenth of the training images becomes val. The images are decoded once to 64x64
pixels; --config.data.size=128 shows more and takes longer. With few images, start from a network
that others trained:

    --config.model="resnet18(stem='imagenet')" --config.data.size=224 \
    --config.data.normalize_by=imagenet --config.init_from=resnet18.safetensors \
    --config.init_anew="head/.*" --config.optim.lr=0.001 --config.epochs=10
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.epochs = 30.0
    config.batch_size = 64
    config.eval_batch_size = 200
    config.model = "n94"
    config.augment = "scale(0.8, 1.2)|translate(6)|flip"
    config.label_smoothing = 0.1
    config.tta = "mirror"

    config.data.name = "folder"
    config.data.size = 64
    config.data.val_fraction = 0.1

    config.optim.name = "adamw"
    config.optim.lr = 0.005
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 1e-2
    config.optim.warmup = "1 epoch"
    config.optim.rules = (
        ("whiten/.*", "frozen?"),
        (".*", "base"),
    )
    return choose(config, arg)
