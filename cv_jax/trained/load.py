"""A trained network, out of the work directory that a run has left, for whatever one does with it.

It needs neither the data set nor the training, and only reads: the run may still be going on. A
file that `cv_jax.tools.export` has written as safetensors does as well as a work directory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from cv_jax.config.errors import UserError
from cv_jax.config.sweep import with_values
from cv_jax.data import DataSpec
from cv_jax.data.dataset import spec_from_json
from cv_jax.learn.stored import (
    check_finite,
    choose_run,
    config_from_json,
    damaged,
    read_safetensors,
    read_spec,
)
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.state import RUN_AXES, TrainState
from cv_jax.tasks import build_task
from cv_jax.train.runs import take_run
from cv_jax.workdir.checkpoints import read_newest

# Images that a network sees at once: what n94 needs for so many stays in a CPU's cache.
GROUP_SIZE = 250


class Trained(NamedTuple):
    """A network and what it was trained for.

    Attributes:
        config: of the run, with the values of its setting where it swept some, and without
            `init_from`, which may be gone.
        spec: of the data it was trained on, without a sample.
        name: of the run, such as "seed=0".
        state: of its newest checkpoint.
        features, predict: see `tasks.Task`.
        result: the content of result.json; None where the run is not complete.
    """

    config: ml_collections.ConfigDict
    spec: DataSpec
    name: str
    state: TrainState
    features: Callable
    predict: Callable | None
    result: dict[str, Any] | None


def load_trained(workdir: epath.Path, run: str = "", classifies: bool = True) -> Trained:
    """Loads one of the runs of a program.

    Args:
        workdir: of the program; or a file NAME.safetensors, which holds one run.
        run: its name, such as "seed=3"; "": the first seed, of the best setting where it swept.
        classifies: whether it has to; else its `predict` may be None.

    Raises:
        UserError: there is no run of this name or no checkpoint, a file of it is damaged, its task
            does not predict classes, or a number of its network is not finite.
    """
    if workdir.suffix == ".safetensors":
        trained = _only_run(load_safetensors(workdir), run, workdir)
        check_finite(variables(trained.state), trained.name, workdir)
        return trained
    chosen, spec = choose_run(workdir, run), read_spec(workdir)
    config = chosen.config
    task = build_task(config, spec)
    if classifies and task.predict is None:
        raise UserError(
            f"{workdir}: the task {config.task!r} does not predict classes. Train a classifier "
            f"that starts from it: --config.init_from={workdir}:backbone."
        )
    state = read_newest(workdir, _state_of_runs(task.init, chosen.num_runs))
    state = take_run(state, RUN_AXES, chosen.position)
    evaluated = state.replace(params=evaluated_params(config.optim, state))
    check_finite(variables(evaluated), chosen.name, workdir)
    return Trained(config, spec, chosen.name, state, task.features, task.predict, chosen.result)


def check_answers(answers: Any) -> None:
    """Raises UserError where logits or probabilities are not finite: their argmax says nothing."""
    if not np.isfinite(answers).all():
        raise UserError(
            "The network answers with numbers that are not finite: train it again with a lower "
            "config.optim.lr."
        )


def _only_run(trained: Trained, run: str, path: epath.Path) -> Trained:
    if run not in ("", trained.name):
        raise UserError(f"{path} holds the run {trained.name!r} and not {run!r}.")
    return trained


def as_evaluated(trained: Trained) -> Trained:
    """The same network with nothing but what evaluation uses, computed in float32.

    Its parameters are the averaged ones where there are such, and its config no longer asks for
    an average, so that no state of an optimizer is needed.
    """
    config, spec, state = trained.config, trained.spec, trained.state
    params = evaluated_params(config.optim, state)
    config = with_values(config, _AS_EVALUATED)
    task = build_task(config, spec)
    return trained._replace(
        config=config,
        state=TrainState(state.step, params, state.model_state, opt_state=()),
        features=task.features,
        predict=task.predict,
    )


_AS_EVALUATED = {"optim.ema": 0.0, "dtype": "float32"}


def load_safetensors(path: epath.Path) -> Trained:
    """Loads a network, as `as_evaluated` made it, out of a file of cv_jax.tools.export.

    Raises:
        UserError: the file cannot be read, or its network is not one of this code.
    """
    arrays, card = read_safetensors(path)
    try:
        shape = card["data"]["image_shape"]
        if math.prod(shape) > _MOST_VALUES:
            raise ValueError(f"images of the shape {shape}")
        spec = spec_from_json(card["data"])
        evaluated = {**_AS_EVALUATED, "tta": card["tta"]}
        config = with_values(config_from_json(card["config"]), evaluated)
        task = build_task(config, spec)
        state = jax.eval_shape(task.init, jax.random.key(0))
        wanted = variables(state)
        if _shapes(arrays) != _shapes(wanted):
            raise ValueError(f"its arrays are not those of {config.model!r}")
        model_state = unflatten_dict({name: jnp.asarray(x) for name, x in arrays.items()}, sep="/")
        params = model_state.pop("params")
        state = TrainState(jnp.int32(card["steps"]), params, model_state, opt_state=())
        return Trained(
            config, spec, card["run"], state, task.features, task.predict, card["result"]
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error


_MOST_VALUES = 2**28  # of an image


def _shapes(arrays: dict[str, Any]) -> dict[str, tuple]:
    return {name: (x.shape, x.dtype) for name, x in arrays.items()}


def variables(state: TrainState) -> dict[str, jax.Array]:
    """All arrays of a network by their paths, such as "params/head/kernel"."""
    return flatten_dict({"params": state.params, **state.model_state}, sep="/")


def make_classify(
    trained: Trained, tta: str, most: int
) -> Callable[[Sequence[np.ndarray]], jax.Array]:
    """Returns images -> probabilities: up to `most` images, each (h, w, c) uint8, give (m, n).

    They are as evaluation has them, to rounding; `tta` is a name of `views.TTA`. One program is
    compiled, for `most` images in groups of at most GROUP_SIZE.
    """
    size = min(most, GROUP_SIZE)
    shape = (-(-most // size), size, *trained.spec.image_shape)

    @jax.jit
    def program(state, groups):
        def classify(image):
            return jax.nn.softmax(trained.predict(state, image, tta)[0])

        return jax.lax.map(classify, groups).reshape(shape[0] * size, -1)

    def classify(images):
        groups = np.zeros((shape[0] * size, *shape[2:]), np.uint8)
        groups[: len(images)] = images
        return program(trained.state, groups.reshape(shape))[: len(images)]

    return classify


def in_words(trained: Trained) -> str:
    """Returns what network it is and what it was trained on, in a line."""
    spec = trained.spec
    names = ", ".join(spec.class_names[:10]) + (", ..." if spec.num_classes > 10 else "")
    return (
        f"{trained.config.model} trained on {spec.name}, {' x '.join(map(str, spec.image_shape))}, "
        f"{spec.num_classes} classes: {names}; {trained.name}, step {int(trained.state.step)}"
    )


def _state_of_runs(init: Callable, num_runs: int) -> TrainState:
    """The shapes of a state of all runs, on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def add_axis(axis, tree):
        lead = () if axis is None else (num_runs,)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=here), tree
        )

    one = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(add_axis, RUN_AXES, one, is_leaf=lambda axis: axis is None)
