"""The config: every leaf with default and unit, its checks, and what a resumed run may change."""

import ast
import json
import os
import runpy
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from etils import epath

from cv_jax.durations import is_duration
from cv_jax.errors import UserError, nearest

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

# The leaves in which runs of one experiment differ.
SEED_KEYS = {"seed", "num_seeds", "data.label_seed"}


def base_config() -> ml_collections.ConfigDict:
    """Returns the config that every experiment starts from: all leaves there are.

    Durations are texts such as "2 epochs", "500 steps", "1e6 examples" or "never"; settings that
    choose a thing and its arguments are texts such as "crop(4)|flip" (see `cv_jax.spec`).
    """
    data = ml_collections.ConfigDict()
    data.name = "digits"  # digits, or an image-classification data set of TFDS
    data.dir = ""  # where TFDS keeps its data; "": TFDS_DATA_DIR or ~/tensorflow_datasets
    data.num_val = 0  # examples held out of train, the same for every seed
    data.limit = 0  # only so many examples of each split; 0: all
    data.label_fraction = 0.0  # of the training examples have labels; 0: all
    data.labels_per_class = 0  # so many of each class have labels instead, when above zero
    data.label_seed = 0  # which examples they are
    data.keep_unlabelled = False  # train on the others, too: for tasks without labels
    data.normalize = True  # to mean 0 and std 1 per channel of train; else [0, 1]
    data.stream = False  # feed batches from the host instead of keeping train on the device

    optim = ml_collections.ConfigDict()
    optim.name = "sgd(nesterov=True)"  # one of cv_jax.optim.OPTIMIZERS
    optim.lr = 0.1  # peak learning rate for lr_batch_size examples a step
    optim.lr_batch_size = 256  # the rate is lr * batch_size / lr_batch_size; 0: lr as it is
    optim.momentum = 0.9  # b1 of the Adam family
    optim.weight_decay = 0.0
    optim.schedule = "cosine"  # one of cv_jax.schedules.SCHEDULES
    optim.warmup = "never"  # a duration; linear from 0
    optim.clip_norm = 0.0  # of the whole gradient; 0: off
    optim.skip_nonfinite = False  # go on without a step whose loss or new state is not finite
    optim.ema = 0.0  # decay of the averaged parameters that evaluation uses; 0: off
    # (regex of the parameter's path, group): the first match; a rule may match none for "group?"
    optim.rules = ((".*", "base"),)
    optim.groups = ml_collections.ConfigDict()  # group -> the settings in which it differs

    seeds = ml_collections.ConfigDict()
    seeds.mode = "auto"  # how a device treats its runs: batched, in_turn; auto: in_turn on a CPU

    mesh = ml_collections.ConfigDict()  # devices along each axis; a product of all there are
    mesh.seed = 0  # which take runs of their own; 0: as many as divide the runs
    mesh.data = 0  # which share every batch; 0: all that the others leave
    mesh.fsdp = 1  # which share every batch, the parameters and the optimizer's state

    parts = {"data": data, "optim": optim, "seeds": seeds, "mesh": mesh}
    config = ml_collections.ConfigDict(parts)
    config.task = "classification"  # a file in cv_jax/tasks
    config.method = ""  # how a task without labels learns: "simclr", ..., see the task
    config.init_from = ""  # RUN or RUN:SUBTREE: the work directory whose parameters to start from
    config.init_allow = ""  # regex of parameters that may be missing or of other shape there
    config.init_anew = ""  # regex of parameters to draw anew in any case
    config.seed = 0  # of the first run
    config.num_seeds = 1  # runs in one program, with the seeds seed, seed + 1, ...
    config.sweep = ()  # (key, values) pairs, written --config.sweep.KEY="(value, value, ...)"
    config.epochs = 10.0  # length of the training; an epoch is num_train // batch_size steps
    config.steps = 0  # length in steps instead, when above zero
    config.batch_size = 128  # examples a step, over all devices
    config.eval_batch_size = 1000  # examples
    config.augment = ""  # a chain of cv_jax.augment.AUGMENTATIONS
    config.select = ""  # examples of a batch to train on, e.g. "hardest(10, of=16)"; "": all
    config.progressive_resizing = ""  # smaller images at first, e.g. "size(24, until=0.5)"
    config.model = "lenet"  # one of cv_jax.models.MODELS
    config.dtype = "auto"  # of the computation: auto (bfloat16 on TPU and GPU), float32, bfloat16
    config.label_smoothing = 0.0  # in [0, 1)
    config.tta = "none"  # views in the final evaluation: none, mirror, mirror_translate
    config.log_every = "1 epoch"
    config.eval_every = "1 epoch"  # on val
    config.checkpoint_every = "1 epoch"
    config.histograms_every = "never"  # of the parameters, in TensorBoard
    config.keep_checkpoints = 2  # the newest so many are kept, and the best on val
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Cuts an experiment down to seconds: the same code on a few examples, for a first try."""
    config.steps = 4
    config.batch_size = 16
    config.eval_batch_size = 64
    config.data.limit = 128
    config.data.num_val = min(config.data.num_val, 32)
    config.data.labels_per_class = min(config.data.labels_per_class, 2)
    config.data.label_fraction = 0.25 if config.data.label_fraction else 0.0
    config.log_every = config.eval_every = config.checkpoint_every = "2 steps"
    return config


def choose(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """The variants that every config file offers: "" as it is, "smoke" cut down to seconds."""
    if arg == "smoke":
        return smoke(config)
    if arg:
        raise UserError(f"A config file takes the argument 'smoke' or none, not {arg!r}.")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"optim.lr": 0.1, ...} of a nested config; an empty sub-config has no leaves."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the config as JSON text, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {leaf: (old value, new value)} where two configs differ; an absent leaf is None."""
    # Through JSON, so that a tuple equals the list that it becomes on disk.
    old, new = (flatten(json.loads(json.dumps(dict(config)))) for config in (old, new))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_command_line(argv: list[str]) -> None:
    """Checks --config and every --config.KEY of a command line, before it is parsed.

    Raises:
        UserError: no config, a file that is not there or does not make one, a key that the config
            lacks, or a value that is not of the key's type.
    """
    arguments = [f"--{a.lstrip('-')}" if a.startswith("-") else a for a in argv[1:]]
    if any(a.startswith("--help") for a in arguments):
        return
    chosen = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if "--config" in arguments[:-1]:
        chosen.append(arguments[arguments.index("--config") + 1])
    files = sorted(str(path) for path in Path("configs").glob("*.py"))
    if not chosen:
        raise UserError(f"Say which experiment, --config=FILE. There are: {', '.join(files)}.")
    path, *arg = chosen[-1].split(":", 1)
    if not os.path.isfile(path):
        raise UserError(
            f"There is no config file {path!r}.{nearest(path, files)} "
            f"There are: {', '.join(files)}."
        )
    leaves = flatten(_load(path, *arg))
    for argument in arguments:
        if argument.startswith("--config."):
            key, equals, text = argument.removeprefix("--config.").partition("=")
            _check_key(key, leaves)
            if not equals:
                raise UserError(f"--config.{key} lacks its value: write --config.{key}=VALUE.")
            _check_text(key, text, leaves[key])


def _load(path: str, *arg: str) -> ml_collections.ConfigDict:
    try:
        config = runpy.run_path(path)["get_config"](*arg)
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        raise UserError(
            f"{path} makes no config ({type(error).__name__}: {error}). It needs a function "
            "get_config(arg='') that returns one, as the files in configs/ do."
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config returns {config!r} and not a ConfigDict.")
    return config


def _check_text(key: str, text: str, default: Any) -> None:
    """Checks that a text of the command line can be read as the type of the key's default."""
    read = {
        bool: flags.BooleanParser().parse,
        int: flags.IntegerParser().parse,
        float: flags.FloatParser().parse,
        tuple: ast.literal_eval,
    }.get(type(default), str)
    try:
        value = read(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text
    _check_type(key, value, default)


def gather_sweeps(argv: list[str]) -> list[str]:
    """Puts every --config.sweep.KEY=(VALUE, VALUE, ...) together into one --config.sweep.

    Raises:
        UserError: values that Python does not read as a tuple of numbers or texts.
    """
    others, sweeps = [], []
    for argument in argv:
        name, _, text = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.sweep.")
        if key == name:
            others.append(argument)
            continue
        try:
            values = ast.literal_eval(text)
            if not isinstance(values, tuple | list):
                raise TypeError(values)
            sweeps.append((key, tuple(values)))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(
                f'{argument}: write the values as "(0.1, 0.2)", and texts in quotes of their own.'
            ) from error
    return [*others, f"--config.sweep={tuple(sweeps)}"] if sweeps else others


def _check_key(key: str, leaves: Mapping[str, Any]) -> None:
    if key in leaves:
        return
    parent, _, last = key.rpartition(".")
    # The last part alone finds a leaf that stands under another parent.
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    close = f" Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(key, leaves)
    siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == parent]
    raise UserError(
        f"config has no key {key!r}.{close} There are: {', '.join(siblings or leaves)}."
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a key that there is not, or a value that no run could use, naming it.

    A leaf has the type of its default in `base_config`, and keeps to its rule in RULES. What a text
    names is looked at where it is built.
    """
    known, leaves = flatten(base_config()), flatten(config)
    for key in known:
        if key not in leaves:
            raise UserError(
                f"config lacks the key {key!r}; begin with cv_jax.config.base_config()."
            )
    for key, value in leaves.items():
        like = _in_base(key)
        if key.startswith("optim.groups") and like not in known:
            if key.count(".") == 3:
                continue  # the optimizer says what a group may set
            raise UserError(
                f"config.{key}={value!r} must be the settings of a group by their names, such as "
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
            f"config.num_seeds={config.num_seeds}: the last seed, {last}, is too large."
        )


def _in_base(key: str) -> str:
    """The leaf of `base_config` that gives a leaf its type and rule, also in a group."""
    parts = key.split(".")
    in_group = parts[:2] == ["optim", "groups"] and len(parts) == 4
    return f"optim.{parts[3]}" if in_group else key


# For the type of a leaf's default: the types of a value, and what it must be, in words.
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

# Leaf -> (whether a value of the right type can be used, what is said of one that cannot).
RULES: dict[str, _Rule] = {
    "seed": _NOT_NEGATIVE,
    "num_seeds": (lambda v: 0 < v <= 10_000, "must be above 0, and 10000 at most"),
    "seeds.mode": (
        lambda v: v in ("auto", "batched", "in_turn"),
        "must be auto, batched or in_turn",
    ),
    "sweep": (
        lambda v: _are_pairs(v, tuple | list) and len({key for key, _ in v}) == len(v),
        'must be pairs of a key, each once, and its values, such as (("optim.lr", (0.1, 0.2)),)',
    ),
    "epochs": _ABOVE_0,
    "steps": _NOT_NEGATIVE,
    "batch_size": _ABOVE_0,
    "eval_batch_size": _ABOVE_0,
    "log_every": _DURATION,
    "eval_every": _DURATION,
    "checkpoint_every": _DURATION,
    "histograms_every": _DURATION,
    "keep_checkpoints": _ABOVE_0,
    "label_smoothing": _BELOW_1,
    "data.num_val": _NOT_NEGATIVE,
    "data.limit": _NOT_NEGATIVE,
    "data.labels_per_class": _NOT_NEGATIVE,
    "data.label_fraction": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "data.label_seed": _NOT_NEGATIVE,
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


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a whole file or nothing: a reader, or a kill, never meets half of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def default_workdir(config_file: str) -> Path:
    """runs/<config>/<time> for a config file such as "configs/digits.py:smoke"."""
    path, _, arg = config_file.partition(":")
    name = Path(path).stem + (f"-{arg}" if arg else "")
    return Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")


def resume_command(argv: list[str], workdir: epath.Path) -> str:
    """The command line that takes up the run again, to be pasted into a shell."""
    given = any(argument.lstrip("-").partition("=")[0] == "workdir" for argument in argv)
    return "python " + shlex.join(argv if given else [*argv, f"--workdir={workdir}"])
