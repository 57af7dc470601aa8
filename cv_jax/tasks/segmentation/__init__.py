"""Semantic segmentation: which class does every pixel of an image belong to?

`config.model` without its head is the backbone of `models.segmenter`; it may start from any network
of one's own, by `config.init_from=RUN:backbone` or `=RUN`. `config.method`, "pixels(...)", sets the
loss. The headline is the mean intersection over union, see `scores`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cv_jax.config.calls import build_one, require
from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec
from cv_jax.learn.class_weights import make_class_weights
from cv_jax.learn.evaluations import Collected
from cv_jax.learn.images import make_read
from cv_jax.learn.initial import make_initial
from cv_jax.learn.inputs import make_augmented, make_normalize, to_unit
from cv_jax.learn.losses import Loss
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.models.layers import checked_widths
from cv_jax.models.segmenter import Segmenter
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.state import TrainState, init_state
from cv_jax.tasks import Task, find_field
from cv_jax.tasks.segmentation import losses, scores
from cv_jax.tasks.segmentation.panels import make_panels
from cv_jax.tasks.segmentation.pictures import describe, draw, mask_in_file, to_image
from cv_jax.tasks.segmentation.windows import join, make_read_windows


class Method(NamedTuple):
    """How a segmenter learns, see `pixels_method`."""

    width: int
    stride: int
    dice: float
    focus: float


def pixels_method(
    width: int = 64, stride: int = 4, dice: float = 0.0, focus: float = 0.0
) -> Method:
    """Learns the class of every pixel by cross-entropy.

    Args:
        width: channels of the pyramid; without effect on a backbone such as unet.
        stride: pixels between two places of the pyramid's finest map, 1, 2, 4 or 8; as `width`.
        dice: weight of the Dice loss beside the cross-entropy, see `losses.dice`.
        focus: the exponent of the focal loss, see `losses.cross_entropy`; 0: cross-entropy.
    """
    require(lambda: dice >= 0, f"dice={dice} must be 0 or more")
    require(lambda: 0 <= focus <= 10, f"focus={focus} must lie in [0, 10]")
    require(lambda: stride in (1, 2, 4, 8), f"stride={stride} must be 1, 2, 4 or 8")
    (width,) = checked_widths((width,))
    return Method(width, stride, dice, focus)


METHODS = {"pixels": pixels_method}
VIEWS = ("none", "mirror")


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task."""
    field = find_field(config, spec, "mask", "mask")
    names, n = field.names, len(field.names)
    method = build_one(config.method or "pixels", METHODS, "config.method")
    _check(config, spec, method)
    backbone = build_model(config.model, 0, compute_dtype(config.dtype))
    model = Segmenter(backbone, n, method.width, method.stride)
    augmented = make_augmented(config.augment, spec.fields)
    normalize = make_normalize(spec, config.data.normalize, config.data.normalize_by)
    initial = make_initial(config, model, normalize, spec)
    class_weights = make_class_weights(config.class_weights, spec, spec.pixel_counts)

    def prepare(batch, key):
        return augmented(batch, jax.random.split(key)[0])

    def loss(params, model_state, batch, key, size):
        del size  # always None: config.progressive_resizing is not read
        (logits, _), model_state = model.apply(
            {"params": params, **model_state},
            normalize(batch["image"]),
            train=True,
            mutable=list(model_state),
            rngs={"dropout": jax.random.split(key)[1]},
        )
        pixels = losses.make_pixels(batch["mask"], n, class_weights)
        total, count, _ = losses.cross_entropy(logits, pixels, method.focus)
        metrics = {"loss": (total, count)}
        if method.dice:
            of_batch = method.dice * losses.dice(logits, pixels) * count
            total += of_batch
            metrics = {"loss": (total, count), "loss/dice": (of_batch, count)}
        return Loss(total, count), (model_state, metrics)

    training = make_training(config, spec, initial.shapes["params"], loss, prepare=prepare)

    def init(key: jax.Array) -> TrainState:
        variables = initial.draw(key)
        return init_state(variables.pop("params"), variables, training.tx)

    def apply(state, image):
        variables = {"params": evaluated_params(config.optim, state), **state.model_state}
        return model.apply(variables, normalize(to_unit(image)), train=False)

    def predict(state, batch, views):
        logits, _ = apply(state, batch["image"])
        if views == "mirror":
            logits = (logits + apply(state, batch["image"][:, :, ::-1])[0][:, :, ::-1]) / 2
        probabilities = jax.nn.softmax(logits)
        return {
            "mask": logits.argmax(-1).astype(jnp.uint8),
            "shares": probabilities.mean((1, 2)),
        }

    def evaluation(views, boundaries):
        return Collected(partial(predict, views=views), list, *scores.fold_of(names, boundaries))

    return Task(
        init=init,
        train_step=training.train_step,
        evals={"watch": evaluation("none", False), "final": evaluation(config.tta, True)},
        metrics=scores.metrics(names, field.shape, config.tta),
        headline="mIoU",
        preview=augmented,
        notes=[*training.notes, *initial.notes],
        needs=("image", "mask"),
        reads=("accumulate", "class_weights", "data.normalize_by", "method", "tta"),
        stages=training.stages,
        features=lambda state, batch: apply(state, batch["image"])[1],
        predict=partial(predict, views=config.tta),
        outputs={
            "mask": "the most probable class of every pixel of the input",
            "shares": "the mean probability of each class over the pixels of the input",
        },
        # Images at a size of their own are seen at their own size, however large they are.
        read=make_read(spec) if config.data.size else make_read_windows(spec.image_shape),
        join=join,
        describe=partial(describe, names),
        draw=partial(draw, names),
        mask=lambda prediction, back: to_image(mask_in_file(prediction, back)),
        panels=make_panels(names),
        baseline=partial(scores.frequent_classes, names),
    )


def _check(config: ml_collections.ConfigDict, spec: DataSpec, method: Method) -> None:
    if config.tta not in VIEWS:
        raise UserError(
            f"config.tta={config.tta!r} is not for config.task='segmentation': choose one of "
            f"{', '.join(VIEWS)}."
        )
    if method.dice and config.accumulate > 1:
        raise UserError(
            f"config.method={config.method!r}: the Dice loss is one of the whole batch. Set "
            "config.accumulate=1, or dice=0."
        )
    names, pixels = spec.fields["mask"].names, np.array(spec.pixel_counts)
    if np.count_nonzero(pixels) == 1:
        raise UserError(
            f"The masks of {spec.name!r} have only pixels of the class "
            f"{names[int(pixels.argmax())]!r}: a network needs two to tell apart. The value 255 "
            "means that a pixel is ignored; write the number of its class instead."
        )
