"""Finds a prepared data set of TFDS, without importing TFDS, which takes seconds."""

import json
import os
import re
from pathlib import Path

from cv_jax.config.errors import UserError
from cv_jax.config.paths import expand


def tfds_data_dir(config_dir: str) -> Path:
    """Returns `config_dir` if set, else TFDS_DATA_DIR, else TFDS's ~/tensorflow_datasets.

    Raises:
        UserError: the directory is below an unknown home directory.
    """
    chosen = config_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return Path(expand(chosen)).absolute()
    except UserError as error:
        raise UserError(
            f"TFDS has no data directory: {error} Or set --config.data.dir or TFDS_DATA_DIR."
        ) from error


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """Finds the directory of the highest prepared version of a data set.

    Args:
        name: a TFDS name: "NAME", "NAME/CONFIG", "NAME:VERSION" or "NAME/CONFIG:VERSION".
        data_dir: TFDS's data directory.

    Returns:
        `data_dir`/NAME[/CONFIG]/VERSION; None if no version is prepared.
    """
    if not re.fullmatch(r"\w{1,99}(/[\w.-]{1,99})?(:\d+\.\d+\.\d+)?", name):
        return None
    name, _, wanted = name.partition(":")
    versions = _versions(data_dir / name)
    default_config = data_dir / name / ".config" / "metadata.json"
    if not versions and default_config.is_file():
        config = json.loads(default_config.read_text())["default_config_name"]
        versions = _versions(data_dir / name / config)
    return versions.get(wanted) if wanted else next(reversed(versions.values()), None)


def _versions(directory: Path) -> dict[str, Path]:
    """Returns the prepared versions in `directory`, ascending: {"3.0.2": its path}."""
    paths = [path.parent for path in directory.glob("*/dataset_info.json")]
    paths = [path for path in paths if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return {path.name: path for path in sorted(paths, key=_version_key)}


def _version_key(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.name.split(".")))
