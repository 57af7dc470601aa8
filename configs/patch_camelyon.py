"""Tumour or not in patches of lymph nodes (PatchCamelyon), for one GPU: ResNet-18 from scratch.

    python train.py --config=configs/patch_camelyon.py --workdir=runs/pcam
    python -m cv_jax.tools.assess --workdir=runs/pcam --positive=1

TensorFlow Datasets prepares patch_camelyon: 262,144 images of 96x96 pixels to train, 32,768 each
for val and test. A patch is positive if there is tumour in its central 32x32 pixels.

B. Veeling et al. (https://arxiv.org/abs/1806.03962) train DenseNets with and without equivariance
to turns and mirrorings. Here, turned training images and eight views in the final evaluation stand
in for it. Not measured here: it takes a GPU.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.model = "resnet18(stem='imagenet')"
    config.epochs = 10.0
    config.batch_size = 256
    config.augment = "rot90|flip|stain_jitter(0.05)|color_jitter(0.2, 0.2, 0.2, 0.04)"
    config.tta = "square"

    config.data.name = "patch_camelyon"
    config.data.size = 96
    config.data.num_val = -1

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.05
    config.optim.warmup = "500 steps"
    config.optim.ema = 0.999
    return choose(config, arg)
