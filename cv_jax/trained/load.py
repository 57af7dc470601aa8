"""A trained network, out of the work directory that a run has left, for whatever one does with it.

It needs neither the data set nor the training, and only reads: the run may still be going on. A
file that `cv_jax.tools.export` has written as safetensors does as well as a work directory.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from cv_jax.config.errors import UserError
from cv_jax.config.names import names_code
from cv_jax.config.sweep import with_values
from cv_jax.data import DataSpec, Examples
from cv_jax.data.dataset import example_shapes, padding, spec_from_json
from cv_jax.data.fields import num_examples
from cv_jax.learn.stored import (
    Variables,
    check_finite,
    choose_run,
    config_from_json,
    damaged,
    read_safetensors,
    read_spec,
    read_variables,
)
from cv_jax.optim.state import TrainState
from cv_jax.tasks import Task, build_task

# Examples that a network sees at once: what n94 needs for so many stays in a CPU's cache.
GROUP_SIZE = 250


class Trained(NamedTuple):
    """A network and what it was trained for.

    Attributes:
        config: of the run, with the values of its setting where it swept some, and without
            `init_from`, which may be gone.
        spec: of the data it was trained on, without a sample.
        name: of the run, such as "seed=0".
        tta: the test-time views of its predictions, such as "mirror".
        state: step, parameters and model state as evaluation uses them. Parameters are the
            averaged ones where the run averages. There is no state of an optimizer.
        task: its functions take `state`.
        result: the content of result.json; None where the run is not complete.
    """

    config: ml_collections.ConfigDict
    spec: DataSpec
    name: str
    tta: str
    state: TrainState
    task: Task
    result: dict[str, Any] | None


def load_trained(
    workdir: epath.Path,
    run: str = "",
    tta: str | None = None,
    predicts: bool = True,
    own: bool = False,
) -> Trained:
    """Loads one of the runs of a program.

    Args:
        workdir: of the program; or a file NAME.safetensors, which holds one run.
        run: its name, such as "seed=3"; "": the first seed, of the best setting where it swept.
        tta: test-time views instead of those of the run's config; None: those.
        predicts: whether its task has to predict something.
        own: whether a file NAME.safetensors is trusted to name modules of Python to import.

    Raises:
        UserError: there is no run of this name or no checkpoint, a file of it is damaged, its task
            predicts nothing, or a number of its network is not finite.
    """
    if workdir.suffix == ".safetensors":
        return _load_safetensors(workdir, run, tta, own)
    chosen, spec = choose_run(workdir, run), read_spec(workdir)
    config = chosen.config
    tta = config.tta if tta is None else tta
    task = _build(config, spec, tta=tta)
    if predicts and task.predict is None:
        raise UserError(
            f"{workdir}: the task {config.task!r} does not predict anything. Train a network that "
            f"starts from it: --config.init_from={workdir}:backbone."
        )
    found = read_variables(workdir, run)
    state = _state_of(found, task, workdir)
    return Trained(config, spec, chosen.name, tta, state, task, chosen.result)


def _build(config: ml_collections.ConfigDict, spec: DataSpec, **changes: str) -> Task:
    """Builds the task for parameters that are averaged already, with some values changed."""
    return build_task(with_values(config, {"optim.ema": 0.0, **changes}), spec)


def _state_of(found: Variables, task: Task, source: epath.Path) -> TrainState:
    """Returns the state that has these variables.

    Raises:
        UserError: they are not those of the task's network.
    """
    wanted = variables(jax.eval_shape(task.init, jax.random.key(0)))
    if _shapes(found.arrays) != _shapes(wanted):
        paths = sorted(wanted.keys() ^ found.arrays.keys()) or [
            path for path, x in wanted.items() if x.shape != found.arrays[path].shape
        ]
        raise UserError(
            f"{source}: its arrays are not those of the network of its config ({paths[0]} is the "
            "first that differs): go back to the code that env.json names."
        )
    model_state = unflatten_dict({k: jnp.asarray(x) for k, x in found.arrays.items()}, sep="/")
    params = model_state.pop("params")
    return TrainState(jnp.int32(found.steps), params, model_state, opt_state=())


def check_finite_predictions(predictions: dict[str, Any]) -> None:
    """Raises UserError where predictions are not finite: their argmax says nothing."""
    for name, x in predictions.items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise UserError(
                f"The network predicts {name} that are not finite: train it again with a lower "
                "config.optim.lr."
            )


def in_float32(trained: Trained) -> Trained:
    """Returns the same network, computed in float32."""
    task = _build(trained.config, trained.spec, tta=trained.tta, dtype="float32")
    return trained._replace(task=task)


def _load_safetensors(path: epath.Path, run: str, tta: str | None, own: bool) -> Trained:
    """Loads a network out of a file of cv_jax.tools.export; it is computed in float32.

    Raises:
        UserError: the file cannot be read, its network is not one of this code, or it names code.
    """
    arrays, card = read_safetensors(path)
    check_finite(arrays, card["run"], path)
    if run not in ("", card["run"]):
        raise UserError(f"{path} holds the run {card['run']!r} and not {run!r}.")
    try:
        config = config_from_json(card["config"])
        _refuse_code(config, own)
        spec = spec_from_json(card["data"])
        if any(math.prod(field.shape) > _MOST_VALUES for field in spec.fields.values()):
            raise ValueError(f"fields of the shapes {[f.shape for f in spec.fields.values()]}")
        tta = tta or card["tta"]
        task = _build(config, spec, tta=tta, dtype="float32")
        state = _state_of(Variables(card["run"], card["steps"], arrays), task, path)
        return Trained(config, spec, card["run"], tta, state, task, card["result"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error


_MOST_VALUES = 2**28  # of an example


def _refuse_code(config: ml_collections.ConfigDict, own: bool) -> None:
    """Raises UserError where a config from a file of others names a module to import."""
    for key in ("task", "model", "augment", "method"):
        if names_code(config[key]) and not own:
            raise UserError(
                f"its config.{key}={config[key]!r} names code, which is not imported for a file: "
                "use the work directory of its run."
            )


def _shapes(arrays: dict[str, Any]) -> dict[str, tuple]:
    return {name: (x.shape, x.dtype) for name, x in arrays.items()}


def variables(state: TrainState) -> dict[str, jax.Array]:
    """Returns all arrays of a network by their paths, such as "params/head/kernel"."""
    return flatten_dict({"params": state.params, **state.model_state}, sep="/")


def make_predict(
    trained: Trained, most: int, function: Callable | None = None
) -> Callable[[Examples], dict[str, np.ndarray]]:
    """Returns examples -> predictions by name: up to `most` examples, each field (m, ...).

    The examples have the fields that the task's `read` gives them. Predictions are as evaluation
    has them, to rounding. One program is compiled, for `most` examples in groups of at most
    GROUP_SIZE.

    Args:
        trained: the network.
        most: examples in a call.
        function: (state, batch) -> {name: (b, ...)}; None: the task's `predict`.
    """
    size = min(most, GROUP_SIZE)
    groups = -(-most // size)
    function = function or trained.task.predict

    @jax.jit
    def program(state, batches):
        out = jax.lax.map(lambda batch: function(state, batch), batches)
        return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:]), out)

    def predict(examples):
        count = num_examples(examples)
        fields = {name: trained.spec.fields[name] for name in examples}
        filled = padding(fields, groups * size)
        for name, x in examples.items():
            filled[name][:count] = x
        batches = {name: x.reshape(groups, size, *x.shape[1:]) for name, x in filled.items()}
        # Not fetched here: the device may still be at it.
        return jax.tree.map(lambda x: x[:count], program(trained.state, batches))

    return predict


def input_shapes(trained: Trained, *leading: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what the network predicts from, as shapes with these leading axes."""
    fields = {name: trained.spec.fields[name] for name in trained.task.inputs}
    return example_shapes(fields, *leading)


def in_words(trained: Trained) -> str:
    """Returns what network it is and what it was trained on, in a line."""
    spec = trained.spec
    names = ", ".join(spec.class_names[:10]) + (", ..." if spec.num_classes > 10 else "")
    return (
        f"{trained.config.model} trained on {spec.name}, {spec.summary}"
        f"{names and f': {names}'}; {trained.name}, step {int(trained.state.step)}"
    )
