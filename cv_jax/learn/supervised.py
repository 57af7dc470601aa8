"""Trains a network with a head on augmented images, for tasks with one row of outputs an image."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from cv_jax.augment.resizing import resize_images
from cv_jax.data import DataSpec
from cv_jax.learn.initial import check_sizes, make_initial
from cv_jax.learn.inputs import make_augmented, make_normalize, to_unit
from cv_jax.learn.losses import Loss, of_examples
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.selection import make_select
from cv_jax.optim.state import TrainState, init_state

# The keys of tasks.OPTIONAL that the training reads.
READS = ("accumulate", "data.normalize_by", "progressive_resizing", "select")

# The collection of model_state that holds the constants of a task.
CONSTANTS = "constants"


class Supervised(NamedTuple):
    """A network with a head, and its training.

    Attributes:
        init, train_step, preview, notes, stages: see `tasks.Task`.
        apply: (state, images uint8 or float32 in [0, 1]) -> (outputs (b, n), features by name).
        viewed: (state, images, views) -> outputs (b, n), averaged over test-time views.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Callable
    preview: Callable
    notes: list[str]
    stages: tuple[int, ...]
    apply: Callable
    viewed: Callable


def make_supervised(
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    num_outputs: int,
    losses: Callable[[jax.Array, dict, Mapping[str, jax.Array]], jax.Array],
    constants: Mapping[str, Any] | None = None,
) -> Supervised:
    """Builds `config.model` with `num_outputs` outputs, and its training step.

    Args:
        config: the run's config.
        spec: describes the data set.
        num_outputs: the width of the head.
        losses: (outputs (b, n), augmented batch, constants) -> the losses (b,) of the examples.
        constants: arrays by name that belong to the network, such as the scale of its outputs.
            They are stored with its variables, in `state.model_state[CONSTANTS]`.
    """
    model = build_model(config.model, num_outputs, compute_dtype(config.dtype))
    augmented = make_augmented(config.augment, spec.fields)
    normalize = make_normalize(spec, config.data.normalize, config.data.normalize_by)
    initial = make_initial(config, model, normalize, spec, num_outputs)
    check_sizes(config, model, spec, initial.shapes["params"])
    select = make_select(config.select)

    def augment(batch, key):
        augment_key, _ = jax.random.split(key)
        return augmented(batch, augment_key)

    def loss(params, model_state, mixed, key, size):
        _, dropout_key = jax.random.split(key)
        fixed = {name: x for name, x in model_state.items() if name == CONSTANTS}
        changing = {name: x for name, x in model_state.items() if name != CONSTANTS}
        (outputs, _), changed = model.apply(
            {"params": params, **changing},
            normalize(resize_images(mixed["image"], size)),
            train=True,
            mutable=list(changing),
            rngs={"dropout": dropout_key},
        )
        found: Loss = of_examples(losses(outputs, mixed, fixed.get(CONSTANTS, {})))
        return found, ({**changed, **fixed}, {"loss": (found.total, found.count)})

    training = make_training(config, spec, initial.shapes["params"], loss, select, prepare=augment)

    def init(key):
        variables = initial.draw(key)
        params = variables.pop("params")
        if constants:
            variables[CONSTANTS] = dict(constants)
        return init_state(params, variables, training.tx, spec.num_train if select else 0)

    def network(state):
        changing = {name: x for name, x in state.model_state.items() if name != CONSTANTS}
        variables = {"params": evaluated_params(config.optim, state), **changing}
        return lambda image: model.apply(variables, image, train=False)

    def viewed(state, image, views):
        one_view = jax.jit(lambda image: network(state)(image)[0])  # traced once for all views
        return views(one_view, normalize(to_unit(image)))

    notes = [*training.notes, *initial.notes]
    if select:
        notes.append(f"select  {config.select}; training metrics are of the selected examples")
    return Supervised(
        init=init,
        train_step=training.train_step,
        preview=augmented,
        notes=notes,
        stages=training.stages,
        apply=lambda state, image: network(state)(normalize(to_unit(image))),
        viewed=viewed,
    )
