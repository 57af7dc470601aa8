"""Object detection: which objects are in an image, and where?

`config.model` without its head is the backbone of `models.detector`; it may start from any network
of one's own, by `config.init_from=RUN:backbone` or `=RUN`. `config.method`, "centres(...)", sets
the head. The loss is that of `centres`, divided by the number of objects in the whole batch; the
headline is AP50, see `average_precision`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from cv_jax.config.calls import build_one, require
from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec
from cv_jax.learn.evaluations import Collected
from cv_jax.learn.images import make_read
from cv_jax.learn.initial import make_initial
from cv_jax.learn.inputs import make_augmented, make_normalize, to_unit
from cv_jax.learn.losses import Loss
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.models.detector import STRIDE, Detector
from cv_jax.models.layers import checked_widths
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.state import TrainState, init_state
from cv_jax.tasks import Task, find_field
from cv_jax.tasks.detection import centres, scores
from cv_jax.tasks.detection.panels import make_panels
from cv_jax.tasks.detection.pictures import describe, draw


class Method(NamedTuple):
    """The head of a detector, see `centres`."""

    width: int
    box_weight: float
    count: int
    threshold: float


def centres_method(
    width: int = 64, box_weight: float = 5.0, count: int = 100, threshold: float = 0.3
) -> Method:
    """Finds objects by their centres.

    Args:
        width: channels of the pyramid and the head.
        box_weight: weight of the loss of boxes beside that of the heat map.
        count: detections of each image.
        threshold: the least score of a detection that is shown; evaluation counts all.
    """
    require(lambda: box_weight > 0, f"box_weight={box_weight} must be above 0")
    require(
        lambda: isinstance(count, int) and 1 <= count <= 1000,
        f"count={count} must be a whole number, 1 to 1000",
    )
    require(lambda: 0 <= threshold <= 1, f"threshold={threshold} must lie in [0, 1]")
    (width,) = checked_widths((width,))
    return Method(width, box_weight, count, threshold)


METHODS = {"centres": centres_method}
VIEWS = ("none", "mirror")


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task."""
    find_field(config, spec, "boxes", "boxes")
    names = find_field(config, spec, "box_label", "box_label").names
    method = build_one(config.method or "centres", METHODS, "config.method")
    _check(config, spec)
    dtype = compute_dtype(config.dtype)
    model = Detector(build_model(config.model, 0, dtype), len(names), method.width, dtype)
    augmented = make_augmented(config.augment, spec.fields)
    normalize = make_normalize(spec, config.data.normalize, config.data.normalize_by)
    initial = make_initial(config, model, normalize, spec)

    def prepare(batch, key):
        return augmented(batch, jax.random.split(key)[0])

    def loss(params, model_state, batch, key, size):
        del size  # always None: config.progressive_resizing is not read
        (heat, sides, _), model_state = model.apply(
            {"params": params, **model_state},
            normalize(batch["image"]),
            train=True,
            mutable=list(model_state),
            rngs={"dropout": jax.random.split(key)[1]},
        )
        targets = centres.make_targets(
            batch["boxes"], batch["box_label"], batch["crowd"], heat.shape[1:3], len(names)
        )
        of_heat, of_boxes = centres.losses(heat, sides, targets)
        each = of_heat + method.box_weight * of_boxes
        count = targets.num_objects.sum().astype(jnp.float32)
        parts = {"loss": each, "loss/heat": of_heat, "loss/boxes": of_boxes}
        metrics = {name: (x.sum(), count) for name, x in parts.items()}
        return Loss(each.sum(), count), (model_state, metrics)

    training = make_training(config, spec, initial.shapes["params"], loss, prepare=prepare)

    def init(key: jax.Array) -> TrainState:
        variables = initial.draw(key)
        return init_state(variables.pop("params"), variables, training.tx)

    def apply(state, image):
        variables = {"params": evaluated_params(config.optim, state), **state.model_state}
        return model.apply(variables, normalize(to_unit(image)), train=False)

    def predict(state, batch, views):
        heat, sides, _ = apply(state, batch["image"])
        if views == "mirror":
            heat, sides = _with_mirror(heat, sides, *apply(state, batch["image"][:, :, ::-1])[:2])
        return centres.decode(heat, sides, method.count)

    def evaluation(views):
        return Collected(
            partial(predict, views=views), list, scores.add, partial(scores.finish, names)
        )

    def at_threshold(threshold):
        return {
            "describe": partial(describe, names, threshold),
            "draw": partial(draw, names, threshold),
            "panels": make_panels(names, threshold),
        }

    return Task(
        init=init,
        train_step=training.train_step,
        evals={"watch": evaluation("none"), "final": evaluation(config.tta)},
        metrics=scores.metrics(names, config.tta),
        headline="AP50",
        preview=augmented,
        notes=[*training.notes, *initial.notes],
        needs=("image", "boxes", "box_label", "difficult", "crowd"),
        reads=("accumulate", "data.normalize_by", "method", "tta"),
        stages=training.stages,
        features=lambda state, batch: apply(state, batch["image"])[2],
        predict=partial(predict, views=config.tta),
        outputs={
            "boxes": "corners x0 y0 x1 y1, half-open, in pixels of the input",
            "scores": "0 to 1, highest first",
            "classes": "numbers in the order of the class names",
        },
        read=make_read(spec),
        **at_threshold(method.threshold),
        at_threshold=at_threshold,
        baseline=partial(scores.frequent_places, names, method.count),
    )


def _check(config: ml_collections.ConfigDict, spec: DataSpec) -> None:
    if config.tta not in VIEWS:
        raise UserError(
            f"config.tta={config.tta!r} is not for config.task='detection': choose one of "
            f"{', '.join(VIEWS)}."
        )
    h, w, _ = spec.image_shape
    if h % STRIDE or w % STRIDE:
        raise UserError(
            f"config.task='detection' needs images whose sides are multiples of {STRIDE} pixels, "
            f"and those of {spec.name!r} have {h}x{w}."
        )


def _with_mirror(heat, sides, mirrored_heat, mirrored_sides):
    """Averages predictions with those of the mirrored image, turned back."""
    turned = mirrored_sides[:, :, ::-1, jnp.array([2, 1, 0, 3])]
    heat = (heat + mirrored_heat[:, :, ::-1]) / 2
    return heat, (sides + turned) / 2
