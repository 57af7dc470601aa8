"""Reads what a run, or an exported file, holds of a network, without building its task."""

import json
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError, first_line, nearest
from cv_jax.config.rules import check
from cv_jax.config.sweep import make_sweep, run_names, with_values
from cv_jax.data import DataSpec
from cv_jax.data.dataset import spec_from_json
from cv_jax.workdir.checkpoints import read_newest
from cv_jax.workdir.files import AGAIN, read_json
from cv_jax.workdir.result import best_runs


class ChosenRun(NamedTuple):
    """One run of a program.

    Attributes:
        name: such as "seed=0".
        position: among all `num_runs` runs of the program.
        config: with the values of the run's setting, and without `init_from`, which may be gone.
        result: the content of result.json; None where the program has not finished.
    """

    name: str
    position: int
    num_runs: int
    config: ml_collections.ConfigDict
    result: dict[str, Any] | None


def choose_run(workdir: epath.Path, run: str = "") -> ChosenRun:
    """Finds a run of a program by its name; "" is the first seed of the best setting.

    Raises:
        UserError: there is no run of this name, or a file of the work directory is damaged.
    """
    config = read_config(workdir)
    result = read_json(workdir / "result.json") if (workdir / "result.json").exists() else None
    sweep = make_sweep(config)
    names = run_names(config, sweep)
    name = run or names[best_runs(result, config.num_seeds).start]
    if name not in names:
        raise UserError(
            f"{workdir} has no run {name!r}.{nearest(name, names)} "
            f"There are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
        )
    position = names.index(name)
    setting = sweep.settings[position // config.num_seeds]
    config = with_values(config, {**setting, "init_from": ""})
    return ChosenRun(name, position, len(names), config, result)


class Variables(NamedTuple):
    """The variables with which a network is evaluated.

    Attributes:
        name: of the run.
        steps: that it has made.
        arrays: by path, such as "params/head/kernel". The parameters are the averaged ones where
            the run averages.
    """

    name: str
    steps: int
    arrays: dict[str, np.ndarray]


def read_variables(source: epath.Path, run: str = "") -> Variables:
    """Reads the variables of a network, without building its task.

    Args:
        source: the work directory of a run, of which the newest checkpoint counts; or a file
            NAME.safetensors of cv_jax.tools.export.
        run: the name of the run, see `choose_run`.

    Raises:
        UserError: there is no such network, a file of it is damaged, or a number of it is not
            finite.
    """
    if source.suffix == ".safetensors":
        arrays, card = read_safetensors(source)
        check_finite(arrays, card["run"], source)
        return Variables(card["run"], card["steps"], arrays)
    chosen = choose_run(source, run)
    state = read_newest(source)
    params = state["params"]
    if chosen.config.optim.ema > 0:
        params = optax.tree.get(state["opt_state"], "ema_params")
    of_runs = flatten_dict({"params": params, **state["model_state"]}, sep="/")
    arrays = {path: array[chosen.position] for path, array in of_runs.items()}
    check_finite(arrays, chosen.name, source)
    return Variables(chosen.name, int(state["step"]), arrays)


def check_finite(arrays: dict[str, Any], run: str, source: epath.Path) -> None:
    """Raises UserError where an array of a network, {path: array}, is not finite."""
    for path, array in arrays.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(
                f"{source}: the network of {run} has diverged, {path} is not finite; choose "
                "another run, or train it again with a lower config.optim.lr."
            )


def read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays by their paths, and the card, of a file of cv_jax.tools.export.

    The file is read as arrays and JSON: nothing in it is run.

    Raises:
        UserError: safetensors is not installed, or the file is not there, damaged, or another
            program's.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        raise UserError(f"{path} needs a package more: pip install safetensors") from error
    try:
        data = path.read_bytes()
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # `load` leaves it
        card = json.loads(header["__metadata__"]["card"])
        return arrays, {**card, "run": str(card["run"]), "steps": int(card["steps"])}
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: epath.Path, error: Exception) -> UserError:
    """Returns the error of an exported file that cannot be used."""
    return UserError(f"{path} is damaged, or no file of cv_jax.tools.export ({first_line(error)}).")


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The config of a run, checked; a leaf that it did not have yet has its default.

    Raises:
        UserError: there is no run, its config.json is damaged, or of other code.
    """
    return config_from_json(read_json(workdir / "config.json"))


def config_from_json(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config with these values, checked; a leaf that they lack has its default.

    Raises:
        UserError: they are not those of a config.
    """
    config = base_config()
    with config.ignore_type():
        config.update(values)
    check(config)
    return config.lock()


def read_spec(workdir: epath.Path) -> DataSpec:
    """The facts about the data that a run was trained on.

    Raises:
        UserError: data.json is not there or damaged.
    """
    path = workdir / "data.json"
    try:
        return spec_from_json(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}). {AGAIN}") from error
