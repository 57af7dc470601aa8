"""Reads what a run, or an exported file, holds of a network, without building its task."""

from typing import Any

import ml_collections
from etils import epath

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError, first_line
from cv_jax.config.rules import check
from cv_jax.data import DataSpec
from cv_jax.data.dataset import spec_from_json
from cv_jax.workdir.files import AGAIN, read_json


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
