"""Loads a trained network from the work directory of a run, and predicts with it.

Loading needs neither the data set nor the optimizer. It only reads, so the run may still be
training. A safetensors file of `cv_jax.tools.export` can take the place of the work directory.
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
    variables_of,
)
from cv_jax.optim.state import TrainState
from cv_jax.tasks import Task, build_task

# Examples in a group: what n94 needs for a group fits into a CPU's cache.
GROUP_SIZE = 250
_GROUP_VALUES = GROUP_SIZE * 32 * 32 * 3  # of larger images fewer, but at least _LEAST
_LEAST = 8


class Trained(NamedTuple):
    """A trained network with its task, config and data description.

    Attributes:
        config: the run's config, with the swept values of its setting. `init_from` is "", since
            that network may no longer exist.
        spec: describes the data set of the training, without a sample.
        name: the run's name, such as "seed=0".
        tta: the test-time views of the predictions, such as "mirror".
        state: step, parameters and model state for evaluation, without optimizer state. With
            optim.ema > 0 the parameters are the averaged ones.
        task: the task; its functions take `state`.
        result: the content of result.json; None if the run is not complete.
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
    """Loads the network of one run.

    Args:
        workdir: the work directory of the program; or a file NAME.safetensors with one run.
        run: the run's name, such as "seed=3"; "": the first seed, in a sweep of the best setting.
        tta: the test-time views; None: those of the run's config.
        predicts: whether to raise an error if the task predicts nothing.
        own: whether a file NAME.safetensors is trusted to name Python modules to import.

    Raises:
        UserError: the run or its checkpoint does not exist, one of its files is damaged, its task
            predicts nothing, or a value of the network is not finite.
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
            f"starts from this run: --config.init_from={workdir}:backbone."
        )
    state = _state_of(variables_of(workdir, chosen), task, workdir)
    return Trained(config, spec, chosen.name, tta, state, task, chosen.result)


def _build(config: ml_collections.ConfigDict, spec: DataSpec, **changes: str) -> Task:
    """Builds the task for averaged parameters (optim.ema = 0), with `changes` of the config."""
    return build_task(with_values(config, {"optim.ema": 0.0, **changes}), spec)


def _state_of(found: Variables, task: Task, source: epath.Path) -> TrainState:
    """Returns the state with the variables `found`.

    Raises:
        UserError: the variables do not fit the task's network.
    """
    wanted = variables(jax.eval_shape(task.init, jax.random.key(0)))
    if _shapes(found.arrays) != _shapes(wanted):
        paths = sorted(wanted.keys() ^ found.arrays.keys()) or [
            path for path, x in wanted.items() if x.shape != found.arrays[path].shape
        ]
        raise UserError(
            f"{source}: its arrays do not fit the network of its config ({paths[0]} is the first "
            "that differs): check out the commit in env.json."
        )
    model_state = unflatten_dict({k: jnp.asarray(x) for k, x in found.arrays.items()}, sep="/")
    params = model_state.pop("params")
    return TrainState(jnp.int32(found.steps), params, model_state, opt_state=())


def check_finite_predictions(predictions: dict[str, Any]) -> None:
    """Raises UserError if predictions are not finite: their argmax has no meaning."""
    for name, x in predictions.items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise UserError(
                f"The network predicts {name} that are not finite: train again with a lower "
                "config.optim.lr."
            )


def check_same_fields(here: DataSpec, there: DataSpec) -> None:
    """Raises UserError if the fields `here`, of a data set, are not those of a network `there`."""
    for name, field in there.fields.items():
        other = here.fields.get(name)
        if other is None or (other.shape, other.names) != (field.shape, field.names):
            raise UserError(f"its field {name!r} is not that of the network's training data.")


def in_float32(trained: Trained) -> Trained:
    """Returns the same network, computed in float32."""
    task = _build(trained.config, trained.spec, tta=trained.tta, dtype="float32")
    return trained._replace(task=task)


def _load_safetensors(path: epath.Path, run: str, tta: str | None, own: bool) -> Trained:
    """Loads a network from a file of cv_jax.tools.export, to compute in float32.

    Raises:
        UserError: the file cannot be read, its network does not fit this code, or the file names
            code to import.
    """
    arrays, card = read_safetensors(path)
    check_finite(arrays, card["run"], path)
    if run not in ("", card["run"]):
        raise UserError(f"{path} holds the run {card['run']!r} and not {run!r}. Remove --run.")
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


_MOST_VALUES = 2**28  # of one field of an example


def _refuse_code(config: ml_collections.ConfigDict, own: bool) -> None:
    """Raises UserError if the config of an untrusted file names a module to import."""
    for key in ("task", "model", "augment", "method"):
        if names_code(config[key]) and not own:
            raise UserError(
                f"its config.{key}={config[key]!r} names code, and a file may not import code: "
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
    """Returns a function: up to `most` examples, {field: (m, ...)} -> predictions by name.

    The examples have the fields of the task's `read`. Predictions equal those of evaluation up to
    rounding. One program is compiled, for `most` examples in groups of at most GROUP_SIZE, of
    large images fewer.

    Args:
        trained: the network.
        most: the largest number of examples in a call.
        function: (state, batch) -> {name: (b, ...)}; None: the task's `predict`.
    """
    values = sum(math.prod(x.shape) for x in input_shapes(trained).values())
    size = min(most, GROUP_SIZE, max(_LEAST, _GROUP_VALUES // values))
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
        # Returns device arrays without waiting: the device may still be computing.
        return jax.tree.map(lambda x: x[:count], program(trained.state, batches))

    return predict


def input_shapes(trained: Trained, *leading: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the network's inputs, with the axes `leading` in front."""
    fields = {name: trained.spec.fields[name] for name in trained.task.inputs}
    return example_shapes(fields, *leading)


def in_words(trained: Trained) -> str:
    """Returns a line about the network: its model, data set, run and step."""
    spec = trained.spec
    names = ", ".join(spec.class_names[:10]) + (", ..." if spec.num_classes > 10 else "")
    return (
        f"{trained.config.model} trained on {spec.name}, {spec.summary}"
        f"{names and f': {names}'}; {trained.name}, step {int(trained.state.step)}"
    )
