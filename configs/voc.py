"""Objects in photographs: PASCAL VOC with ResNet-18 at 512 pixels.

    python train.py --config=configs/voc.py --config.data.dir=VOCdevkit

VOCdevkit is a directory with VOC2007 and VOC2012 as they are unpacked; 2007 has two archives,
trainval and test. Trainval of both years, 16,551 images, is train, and the test images of 2007,
4,952, are test. AP50 of published detectors: 75.7 % by CenterNet with ResNet-18 from ImageNet,
60.2 % by Faster R-CNN with ResNet-50 from scratch.

Meant for one GPU. --config.init_from=RUN starts the backbone from a network that was trained on
ImageNet. Not run at full length.
"""

import ml_collections

from cv_jax.config.base import base_config, choose


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "detection"
    config.method = "centres(width=64)"
    config.model = "resnet18(stem='imagenet')"
    config.epochs = 140.0
    config.batch_size = 32
    config.eval_batch_size = 32
    config.augment = "flip|affine(scale=(0.6, 1.4), translate=96)|color_jitter(0.4, 0.4, 0.4, 0.02)"
    config.tta = "mirror"

    config.data.name = "voc"
    config.data.size = 512

    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.lr_batch_size = 32
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup = "3 epochs"
    config.optim.clip_norm = 10.0
    config.optim.ema = 0.999
    config.log_every = config.checkpoint_every = "5 epochs"
    return choose(config, arg)
