"""Cats and dogs, pixel by pixel: Oxford-IIIT Pet with a U-Net, for one GPU.

    python train.py --config=configs/pets.py

TensorFlow Datasets prepares oxford_iiit_pet: 3,680 images to train, of which 368 are val, and 3,669
for test. The masks have three classes: pet, background, and the border between them. Images are
fitted into 256x256 pixels.

Not measured at full length: it takes a GPU.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "segmentation"
    config.method = "pixels(dice=0.5)"
    config.model = "unet(width=64, levels=5)"
    config.epochs = 60.0
    config.batch_size = 32
    config.eval_batch_size = 64
    config.augment = "flip|affine(degrees=15, scale=(0.7, 1.4))|color_jitter(0.3, 0.3, 0.3, 0.05)"
    config.tta = "mirror"

    config.data.name = "pet_masks"
    config.data.size = 256
    config.data.val_fraction = 0.1

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.lr_batch_size = 0
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup = "2 epochs"
    config.optim.clip_norm = 10.0
    config.optim.ema = 0.99
    config.log_every = config.eval_every = config.checkpoint_every = "5 epochs"
    return choose(config, arg)
