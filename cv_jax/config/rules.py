"""Checks every leaf of a config: its type and its range."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from cv_jax.config.base import base_config, flatten
from cv_jax.config.durations import is_duration
from cv_jax.config.errors import UserError, nearest


def _check_key(key: str, leaves: Mapping[str, Any]) -> None:
    if key in leaves:
        return
    parent, _, last = key.rpartition(".")
    # The last part alone finds a leaf under another parent.
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    close = f" Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(key, leaves)
    siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == parent]
    raise UserError(
        f"config has no key {key!r}.{close} There are: {', '.join(siblings or leaves)}."
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for an unknown key, or for a value that no run could use.

    A leaf must have the type of its default in `base_config` and obey its rule in RULES. A text
    that names a function is checked where the function is called.
    """
    known, leaves = flatten(base_config()), flatten(config)
    for key in known:
        if key not in leaves:
            raise UserError(
                f"config lacks the key {key!r}: start from cv_jax.config.base.base_config()."
            )
    for key, value in leaves.items():
        like = _in_base(key)
        if key.startswith("optim.groups") and like not in known:
            if key.count(".") == 3:
                continue  # the optimizer checks the settings of a group
            raise UserError(
                f"config.{key}={value!r} must be a group's settings by name, such as "
                '{"head": {"lr": 0.1}} for config.optim.groups.'
            )
        _check_key(like, known)
        _check_type(key, value, known[like])
        holds, sentence = RULES.get(like, _ANY)
        if not holds(value):
            raise UserError(f"config.{key}={_shown(value)} {sentence}.")
    last = config.seed + config.num_seeds - 1
    if last > _MAX_INT:
        raise UserError(
            f"config.num_seeds={config.num_seeds}: the last seed, {last}, is above {_MAX_INT}. "
            "Lower config.seed."
        )


def _in_base(key: str) -> str:
    """Returns the leaf of `base_config` whose type and rule apply to a leaf, also in a group."""
    parts = key.split(".")
    in_group = parts[:2] == ["optim", "groups"] and len(parts) == 4
    return f"optim.{parts[3]}" if in_group else key


# Type of a leaf's default -> (types of a valid value, the words for them in a message).
_TYPES = {
    bool: (bool, "true or false"),
    int: (int, "a whole number of at most 32 bits"),
    float: (int | float, "a finite number of at most 32 bits"),
    str: (str, "a text"),
    tuple: (tuple | list, 'a tuple, with texts in quotes, such as (("head/.*", "head"),)'),
}
_MAX_INT = 2**31 - 1
_MAX_FLOAT = float(np.finfo(np.float32).max)


def _check_type(key: str, value: Any, default: Any) -> None:
    types, sentence = _TYPES[type(default)]
    right = isinstance(value, types) and isinstance(value, bool) == (types is bool)
    if right and types in (int, int | float):
        right = abs(value) <= (_MAX_INT if types is int else _MAX_FLOAT)
    if not right:
        raise UserError(f"config.{key}={_shown(value)} must be {sentence}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _are_pairs(values: Any, second: Any) -> bool:
    return all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], second)
        for pair in values
    )


_Rule = tuple[Callable[[Any], bool], str]
_ANY: _Rule = (lambda v: True, "")
_ABOVE_0: _Rule = (lambda v: v > 0, "must be above 0")
_NOT_NEGATIVE: _Rule = (lambda v: v >= 0, "must be 0 or more")
_BELOW_1: _Rule = (lambda v: 0 <= v < 1, "must be in [0, 1)")
_DURATION: _Rule = (
    is_duration,
    "is not a duration: write '2 epochs', '500 steps', '1e6 examples' or 'never'",
)

# Leaf -> (whether a value of the right type is valid, the words of the message if not).
RULES: dict[str, _Rule] = {
    "seed": _NOT_NEGATIVE,
    "num_seeds": (lambda v: 0 < v <= 10_000, "must be from 1 to 10000"),
    "seeds.mode": (
        lambda v: v in ("auto", "batched", "in_turn"),
        "must be auto, batched or in_turn",
    ),
    "sweep": (
        lambda v: _are_pairs(v, tuple | list) and len({key for key, _ in v}) == len(v),
        'must be pairs of a key and its values, each key once, such as (("optim.lr", (0.1, 0.2)),)',
    ),
    "epochs": _ABOVE_0,
    "steps": _NOT_NEGATIVE,
    "batch_size": _ABOVE_0,
    "accumulate": _ABOVE_0,
    "eval_batch_size": _ABOVE_0,
    "log_every": _DURATION,
    "eval_every": _DURATION,
    "patience": _DURATION,
    "checkpoint_every": _DURATION,
    "histograms_every": _DURATION,
    "keep_checkpoints": _ABOVE_0,
    "label_smoothing": _BELOW_1,
    "class_weights": (
        lambda v: v in ("", "balanced", "sqrt"),
        "must be '', 'balanced' or 'sqrt'",
    ),
    "data.num_val": (lambda v: v >= -1, "must be 0 or more, or -1 for the official val"),
    "data.val_fraction": _BELOW_1,
    "data.limit": _NOT_NEGATIVE,
    "data.size": (lambda v: 0 <= v <= 4096, "must be from 0 to 4096"),
    "data.decode": (lambda v: v in ("auto", "once", "always"), "must be auto, once or always"),
    "data.eval_crop": (lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "data.workers": (lambda v: 0 <= v <= 1024, "must be from 0 to 1024"),
    "data.on_error": (lambda v: v in ("replace", "stop"), "must be replace or stop"),
    "data.labels_per_class": _NOT_NEGATIVE,
    "data.label_fraction": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "data.label_seed": _NOT_NEGATIVE,
    "data.normalize_by": (
        lambda v: v in ("train", "imagenet", "half"),
        "must be train, imagenet or half",
    ),
    "data.sampling": (lambda v: v in ("uniform", "balanced"), "must be 'uniform' or 'balanced'"),
    "mesh.seed": _NOT_NEGATIVE,
    "mesh.data": _NOT_NEGATIVE,
    "mesh.fsdp": _ABOVE_0,
    "optim.lr": _ABOVE_0,
    "optim.lr_batch_size": _NOT_NEGATIVE,
    "optim.momentum": _BELOW_1,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.warmup": _DURATION,
    "optim.clip_norm": _NOT_NEGATIVE,
    "optim.ema": _BELOW_1,
    "optim.rules": (
        lambda v: _are_pairs(v, str),
        'must be pairs (regex, group), such as (("head/.*", "head"), (".*", "base"))',
    ),
}
