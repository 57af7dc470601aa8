"""Initialises a network: random, from training images, or from another network."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cv_jax.augment.resizing import make_stages
from cv_jax.config import durations
from cv_jax.config.errors import UserError, nearest
from cv_jax.config.tables import align
from cv_jax.data import DataSpec
from cv_jax.learn.foreign import FAMILIES
from cv_jax.learn.inputs import MEAN_AND_STD, to_unit
from cv_jax.learn.stored import read_variables
from cv_jax.models import checked_outputs
from cv_jax.models.vit import resample_positions
from cv_jax.workdir.bucket import work_directory


class Initial(NamedTuple):
    """The initial variables of a network.

    Attributes:
        draw: key -> the model's variables by collection.
        shapes: the variables as ShapeDtypeStructs.
        notes: lines that the log shows at the start.
    """

    draw: Callable
    shapes: dict[str, Any]
    notes: list[str]


def make_initial(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    normalize: Callable,
    spec: DataSpec,
    num_outputs: int | None = None,
) -> Initial:
    """Returns the initial variables: random, from training images, or from `config.init_from`.

    Args:
        config: the run's config.
        model: takes images that `normalize` returned. A method `params_from_images` of the model
            or of its `backbone` returns parameters that replace random ones.
        normalize: see `inputs.make_normalize`.
        spec: describes the data set.
        num_outputs: the width of the model's head; None: the number of classes.

    Raises:
        UserError: `config.init_from` does not fit, see `take_over`.
    """
    from_images = _params_from_images(model, lambda: normalize(to_unit(spec.sample["image"])))

    def draw(key):
        image = jnp.zeros((1, *spec.image_shape), jnp.float32)
        drawn = dict(model.init(key, image, train=False))
        params = {**flatten_dict(drawn["params"]), **flatten_dict(from_images)}
        return {**drawn, "params": unflatten_dict(params)}

    whole = not hasattr(model, "backbone")  # the model itself, with its head
    num_outputs = spec.num_classes if num_outputs is None else num_outputs
    path, num_classes = ((), num_outputs) if whole else (("backbone",), 0)
    with checked_outputs(config.model, path, num_classes):
        shapes = jax.eval_shape(draw, jax.random.key(0))
    allow, anew = (_matcher(config, key) for key in ("init_allow", "init_anew"))
    notes = _input_notes(config)
    if not config.init_from:
        return Initial(draw, shapes, notes)
    taken, table = take_over(config.init_from, shapes, allow, anew)

    def draw_the_rest(key):
        flat = flatten_dict(draw(key), sep="/")
        return unflatten_dict({**flat, **jax.tree.map(jnp.asarray, taken)}, sep="/")

    return Initial(draw_the_rest, shapes, [*notes, *table])


def check_sizes(
    config: ml_collections.ConfigDict, model: nn.Module, spec: DataSpec, params: Any
) -> None:
    """Raises UserError where `config.progressive_resizing` changes the shape of a parameter.

    For a task that reads this key. `params` may be ShapeDtypeStructs.
    """
    if not config.progressive_resizing:
        return
    total_steps = durations.total_steps(config, spec.num_train)
    *smaller, _ = make_stages(config.progressive_resizing, total_steps)
    for stage in smaller:
        shape = (1, stage.size, stage.size, spec.image_shape[-1])
        init = functools.partial(model.init, train=False)
        found = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
        if jax.tree.map(jnp.shape, found["params"]) != jax.tree.map(jnp.shape, params):
            raise UserError(
                f"config.model={config.model!r} takes images of one size only: write "
                "--config.progressive_resizing='', or choose another config.model."
            )


def _input_notes(config: ml_collections.ConfigDict) -> list[str]:
    """Returns notes on the normalisation, where it is not by train or should perhaps not be."""
    by, notes = config.data.normalize_by, []
    if by in MEAN_AND_STD:
        mean, std = MEAN_AND_STD[by]
        notes.append(f"inputs  normalised by {by}: mean {mean}, std {std}")
    family = FAMILIES.get(_read(config.init_from)[0]) if config.init_from else None
    if family and by not in MEAN_AND_STD:
        notes.append(
            "inputs  normalised by train, or not at all; most such networks expect "
            f"config.data.normalize_by={family.inputs}"
        )
    return notes


def _params_from_images(model: nn.Module, images: Callable) -> dict[str, Any]:
    if hasattr(model, "params_from_images"):
        return model.params_from_images(images())
    if hasattr(model, "backbone"):
        return {"backbone": _params_from_images(model.backbone, images)}
    return {}


def take_over(
    init_from: str,
    shapes: dict[str, Any],
    allow: Callable[[str], bool],
    anew: Callable[[str], bool],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Loads the parameters and batch statistics of another network that match by name.

    With RUN:SUBTREE the names are those below SUBTREE. If the new network has a backbone and RUN
    has none, RUN becomes the backbone: its head is ignored, and the parts beside the backbone are
    initialised. Otherwise every array must be in both networks and have one shape; only positions
    are resampled to another grid. Where `allow` permits a difference:
    - missing in RUN: initialised as without RUN;
    - another number of values in RUN: initialised as without RUN;
    - as many values in another shape: reshaped;
    - only in RUN: ignored.

    Args:
        init_from: RUN or RUN:SUBTREE, the value of `config.init_from`.
        shapes: the new network's variables as ShapeDtypeStructs.
        allow: name -> whether the array may differ.
        anew: name -> whether the array is initialised even if RUN has it.

    Returns:
        {path: array} of the loaded arrays, and lines for the log: RUN's name and a table.

    Raises:
        UserError: RUN has no network, or an array differs where `allow` does not permit it.
    """
    name, found = _read(init_from)
    here = flatten_dict(shapes, sep="/")
    there = {path: x for path, x in found.items() if path.partition("/")[0] in shapes}
    family = FAMILIES.get(name)
    becomes_backbone = "backbone" in shapes["params"] and not any(map(_of_backbone, there))
    if becomes_backbone:
        there = {path.replace("/", "/backbone/", 1): x for path, x in there.items()}
    taken: dict[str, np.ndarray] = {}
    rows: dict[str, list[str]] = {}
    problems: list[str] = []

    def note(what, path, allowed, problem):
        rows.setdefault(what, []).append(path)
        if not allowed:
            problems.append(f"{_name(path)} {problem}")

    for path, wanted in here.items():
        allowed = allow(_name(path))
        if anew(_name(path)):
            note("initialised", path, True, "")
        elif path not in there:
            beside = becomes_backbone and not _of_backbone(path)
            note("missing", path, allowed or beside, "is missing in RUN")
        elif there[path].shape == wanted.shape:
            taken[path] = there[path]
            note("loaded", path, True, "")
        elif _are_positions(path, there[path], wanted):
            taken[path] = resample_positions(there[path], *wanted.shape[:2])
            note("resampled", path, True, "")
        else:
            fits = there[path].size == wanted.size
            problem = f"is {there[path].shape} in RUN and {wanted.shape} here"
            note("reshaped" if fits else "other shape", path, allowed, problem)
            if fits:
                taken[path] = there[path].reshape(wanted.shape)
    for path in there:
        if path not in here:
            head = becomes_backbone and _name(path).startswith("backbone/head/")
            skipped = head or allow(_name(path)) or anew(_name(path))
            note("skipped", path, skipped, "is only in RUN")
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        do = "parameter does" if len(problems) == 1 else "parameters do"
        instead = "a subtree, for example RUN:backbone"
        if family:
            instead = f"the config.model of {name}, {family.model}"
        raise UserError(
            f"config.init_from={init_from!r}: {len(problems)} {do} not fit: "
            f"{shown}. Choose {instead}, or allow the differences by a "
            "regular expression, such as config.init_allow='head/.*'."
        )
    return taken, [f"init    {init_from}, {name}", _table(rows, {**there, **here})]


def _are_positions(path: str, there: np.ndarray, here: jax.ShapeDtypeStruct) -> bool:
    """Returns whether both arrays are a ViT's learned positions (h, w, c) of one width."""
    is_grid = path.rpartition("/")[2] == "positions" and there.ndim == len(here.shape) == 3
    return is_grid and there.shape[-1] == here.shape[-1]


def _table(rows: dict[str, list[str]], arrays: dict[str, Any]) -> str:
    cells = [("", "arrays", "values", "parameters")]
    for what, paths in rows.items():
        values = sum(arrays[path].size for path in paths)
        shown = ", ".join(map(_name, paths[:4])) + (", ..." if len(paths) > 4 else "")
        cells.append((what, f"{len(paths):,}", f"{values:,}", shown))
    return align(cells, right=(1, 2))


def _name(path: str) -> str:
    """Returns the name of a variable, without its collection."""
    return path.partition("/")[2]


def _of_backbone(path: str) -> bool:
    return _name(path).startswith("backbone/")


def _matcher(config: ml_collections.ConfigDict, key: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(config[key])
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"config.{key}={config[key]!r} is not a regular expression: {error}. Correct it."
        ) from error
    return lambda name: pattern.fullmatch(name) is not None


@functools.lru_cache(maxsize=1)  # a task is built several times, and RUN may still be training
def _read(init_from: str) -> tuple[str, dict[str, np.ndarray]]:
    """Reads the name of the network, and {path: array} of its variables below the subtree."""
    run, subtree = _split(init_from)
    try:
        name, steps, arrays = read_variables(work_directory(run))
    except UserError as error:
        raise UserError(f"config.init_from={init_from!r}: {error}") from error
    found, parts = {}, set()
    for path, array in arrays.items():
        collection, _, inner = path.partition("/")
        if collection not in ("params", "batch_stats"):
            continue  # a teacher's parameters, which are in a collection of its own
        parts.add(inner.partition("/")[0])
        if inner.startswith(f"{subtree}/" if subtree else ""):
            found[f"{collection}/{inner.removeprefix(f'{subtree}/')}"] = np.asarray(array)
    if not found:
        raise UserError(
            f"config.init_from={init_from!r}: the network in {run} has no part {subtree!r}."
            f"{nearest(subtree, parts)} There are: {', '.join(sorted(parts))}."
        )
    return name if steps is None else f"{name} after step {steps:,}", found


def _split(init_from: str) -> tuple[str, str]:
    """Returns (RUN, SUBTREE) of RUN:SUBTREE; the colon of gs:// does not separate them."""
    run, colon, subtree = init_from.rpartition(":")
    return (run, subtree.strip("/")) if colon and not subtree.startswith("//") else (init_from, "")
