"""Prepares a work directory for a run, and refuses one that belongs to another experiment."""

import json

import ml_collections
from etils import epath

from cv_jax.config.base import base_config, differences, flatten, to_json
from cv_jax.config.errors import UserError
from cv_jax.workdir.files import write_atomically

# Leaves that may change when a run is resumed; any other change makes it another experiment.
MAY_CHANGE = {
    "epochs",
    "steps",
    "log_every",
    "eval_every",
    "patience",
    "checkpoint_every",
    "histograms_every",
    "keep_checkpoints",
    "eval_batch_size",
    "data.dir",
    "data.workers",
    "data.on_error",
    "optim.skip_nonfinite",
    "mesh.seed",
    "mesh.data",
    "mesh.fsdp",
}


def adopt_workdir(workdir: epath.Path, config: ml_collections.ConfigDict) -> list[str]:
    """Writes the config into a new work directory, or checks it against the stored config.

    Returns:
        A line for each leaf that changed since the run started.

    Raises:
        UserError: the directory belongs to another config, or its config.json is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(config))
        return []
    try:
        # A leaf that older code did not have had its default.
        stored = {**flatten(base_config()), **flatten(dict(json.loads(path.read_text())))}
        changed = differences(stored, flatten(config.to_dict()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Delete it if the run there has this config, or choose "
            "another --workdir."
        ) from error
    refused = {key: values for key, values in changed.items() if key not in MAY_CHANGE}
    if refused:
        lines = "".join(f"\n  {key}: stored {a!r}, now {b!r}" for key, (a, b) in refused.items())
        raise UserError(
            f"{workdir} holds a run of another config. Choose another --workdir, or restore the "
            f"values of these keys:{lines}"
        )
    write_atomically(path, to_json(config))
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
