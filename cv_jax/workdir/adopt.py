"""Takes a work directory for a run, and refuses one that belongs to another experiment."""

import json

import ml_collections
from etils import epath

from cv_jax.config.base import differences, to_json
from cv_jax.config.errors import UserError
from cv_jax.workdir.files import write_atomically

# What a run may change when it is taken up again; anything else would make it another experiment.
MAY_CHANGE = {
    "epochs",
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "histograms_every",
    "keep_checkpoints",
    "eval_batch_size",
    "data.dir",
    "optim.skip_nonfinite",
    "mesh.seed",
    "mesh.data",
    "mesh.fsdp",
}


def adopt_workdir(workdir: epath.Path, config: ml_collections.ConfigDict) -> list[str]:
    """Writes the config into a new work directory, or checks it against the one that is there.

    Returns:
        A line for each leaf that changed since the run was begun.

    Raises:
        UserError: the directory belongs to another config, or holds something else.
    """
    path = workdir / "config.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(config))
        return []
    try:
        changed = differences(json.loads(path.read_text()), config.to_dict())
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it if the run there is of this config, or "
            "choose another --workdir."
        ) from error
    refused = {key: values for key, values in changed.items() if key not in MAY_CHANGE}
    if refused:
        lines = "".join(f"\n  {key}: there {a!r}, here {b!r}" for key, (a, b) in refused.items())
        raise UserError(
            f"{workdir} holds a run of another config; choose another --workdir, or give these "
            f"keys their values back:{lines}"
        )
    write_atomically(path, to_json(config))
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
