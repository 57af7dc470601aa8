"""Reads the network of a run or of a file, without building its task."""

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
from cv_jax.learn.foreign import translate
from cv_jax.workdir.checkpoints import read_newest
from cv_jax.workdir.files import AGAIN, read_json
from cv_jax.workdir.result import best_runs

# Suffixes of files that PyTorch writes by pickling.
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar")


class ChosenRun(NamedTuple):
    """One run of a program.

    Attributes:
        name: the run's name, such as "seed=0".
        position: the run's index among all runs of the program.
        num_runs: the number of runs of the program.
        config: the run's config, with the swept values of its setting. `init_from` is "", since
            that network may no longer exist.
        result: the content of result.json; None before the program has finished.
    """

    name: str
    position: int
    num_runs: int
    config: ml_collections.ConfigDict
    result: dict[str, Any] | None


def choose_run(workdir: epath.Path, run: str = "") -> ChosenRun:
    """Finds a run of a program by its name; "" chooses the first seed of the best setting.

    Raises:
        UserError: the program has no run of this name, or a file in the work directory is damaged.
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
        name: the run's name; of a network from elsewhere, its family in `foreign.FAMILIES`.
        steps: the number of steps that the run has trained; None: a network from elsewhere.
        arrays: the arrays by path, such as "params/head/kernel". With optim.ema > 0 the parameters
            are the averaged ones.
    """

    name: str
    steps: int | None
    arrays: dict[str, np.ndarray]


def read_variables(source: epath.Path) -> Variables:
    """Reads the variables of a network, without building its task.

    Args:
        source: a work directory, of whose runs `choose_run` chooses; or a file NAME.safetensors
            of cv_jax.tools.export, or of a network that `foreign` knows.

    Raises:
        UserError: the network does not exist, is of an unknown kind or not finite, or one of its
            files is damaged.
    """
    if source.suffix in PICKLED:
        raise UserError(
            f"{source.name} is a pickle file, which may execute code; such files are not read. "
            "Convert it once: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            "'NAME.safetensors')."
        )
    if source.suffix != ".safetensors":
        return variables_of(source, choose_run(source))
    arrays, metadata = _read_arrays(source)
    if "card" in metadata:
        card = _card(source, metadata)
        variables = Variables(card["run"], card["steps"], arrays)
    else:
        name, arrays = translate(arrays)
        variables = Variables(name, None, arrays)
    check_finite(arrays, variables.name, source)
    return variables


def variables_of(workdir: epath.Path, chosen: ChosenRun) -> Variables:
    """Reads the variables of a run from the newest checkpoint.

    Raises:
        UserError: there is no whole checkpoint, or a value is not finite.
    """
    state = read_newest(workdir)
    params = state["params"]
    if chosen.config.optim.ema > 0:
        params = optax.tree.get(state["opt_state"], "ema_params")
    of_runs = flatten_dict({"params": params, **state["model_state"]}, sep="/")
    arrays = {path: array[chosen.position] for path, array in of_runs.items()}
    check_finite(arrays, chosen.name, workdir)
    return Variables(chosen.name, int(state["step"]), arrays)


def check_finite(arrays: dict[str, Any], run: str, source: epath.Path) -> None:
    """Raises UserError if an array of a network, {path: array}, is not finite."""
    for path, array in arrays.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(
                f"{source}: the network of {run} has diverged, {path} is not finite. Choose "
                "another run, or train again with a lower config.optim.lr."
            )


def read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads {path: array} and the card from a file NAME.safetensors of cv_jax.tools.export.

    The file is read as arrays and JSON: nothing in it is executed.

    Raises:
        UserError: safetensors is not installed; the file does not exist, is damaged, or was not
            written by cv_jax.tools.export.
    """
    arrays, metadata = _read_arrays(path)
    return arrays, _card(path, metadata)


def _read_arrays(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata of a safetensors file."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from error
    try:
        data = path.read_bytes()
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # `load` leaves it
        return arrays, header.get("__metadata__", {})
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: choose an exported file.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


def _card(path: epath.Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        card = json.loads(metadata["card"])
        return {**card, "run": str(card["run"]), "steps": int(card["steps"])}
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: epath.Path, error: Exception) -> UserError:
    """Returns the error that says that an exported file cannot be used."""
    return UserError(
        f"{path} is damaged, or not a file of cv_jax.tools.export ({first_line(error)}). "
        "Export the network again."
    )


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """Reads the config of a run and checks it; a key missing in config.json gets its default.

    Raises:
        UserError: config.json does not exist, is damaged, or was written by other code.
    """
    return config_from_json(read_json(workdir / "config.json"))


def config_from_json(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config with these values, checked; a missing key gets its default.

    Raises:
        UserError: the values are not those of a config.
    """
    config = base_config()
    with config.ignore_type():
        config.update(values)
    check(config)
    return config.lock()


def read_spec(workdir: epath.Path) -> DataSpec:
    """Reads the description of the data that a run was trained on.

    Raises:
        UserError: data.json does not exist or is damaged.
    """
    path = workdir / "data.json"
    try:
        return spec_from_json(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}). {AGAIN}") from error
