"""Every config trains, and every leaf of it is read by somebody."""

import importlib.util
from pathlib import Path

import ml_collections

from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _load(path: Path, arg: str = "") -> ml_collections.ConfigDict:
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location(path.stem, path)
    )
    spec.loader.exec_module(module)
    return module.get_config(arg)


class _Watched(ml_collections.ConfigDict):
    """A config that notes which of its leaves are read."""

    def __getitem__(self, key):
        self.__dict__.setdefault("seen", set()).add(key)
        return super().__getitem__(key)


def _watch(config):
    watched = _Watched()
    for key, value in config.items():
        watched[key] = _watch(value) if isinstance(value, ml_collections.ConfigDict) else value
    watched.__dict__["seen"] = set()
    return watched
