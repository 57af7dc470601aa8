"""Where TFDS keeps a prepared data set; found without the time that importing TFDS takes."""

import json
import os
import re
from pathlib import Path

from cv_jax.config.errors import UserError
from cv_jax.config.paths import expand


def tfds_data_dir(config_dir: str) -> Path:
    """Returns `config_dir` where it is set, else TFDS_DATA_DIR, else TFDS's ~/tensorflow_datasets.

    Raises:
        UserError: the directory is below a home directory that is not known.
    """
    chosen = config_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return Path(expand(chosen)).absolute()
    except UserError as error:
        raise UserError(
            f"The data sets of TFDS have no place: {error} Or let TFDS_DATA_DIR or "
            "--config.data.dir name a directory."
        ) from error


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """Finds the directory of the highest prepared version of a data set.

    Args:
        name: a TFDS name: "NAME", "NAME/CONFIG", "NAME:VERSION" or "NAME/CONFIG:VERSION".
        data_dir: TFDS's directory, where it lies in NAME[/CONFIG]/VERSION.

    Returns:
        None if there is none.
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
    """The prepared versions in `directory`, ascending: {"3.0.2": its path}."""
    paths = [path.parent for path in directory.glob("*/dataset_info.json")]
    paths = [path for path in paths if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return {path.name: path for path in sorted(paths, key=_version_key)}


def _version_key(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.name.split(".")))
