"""Networks of torchvision and timm: their names and layouts, translated into those of cv_jax.

The names in a file tell its family. An array that no row of the family's table fits keeps its name,
so that `initial.take_over` reports it as left over.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from cv_jax.config.errors import UserError

Arrays = dict[str, np.ndarray]
Row = tuple[str, str, Mapping[str, tuple]]


class Family(NamedTuple):
    """Networks whose arrays have the same names.

    Attributes:
        known_by: names of arrays that every network of the family has.
        rows: (regex of a layer there, the layer here, kind of the layer). The layer here may refer
            to groups of the regex: "\\2+1" is the number in group 2, plus 1.
        model: the values of config.model that such networks fit, in words.
        inputs: the value of config.data.normalize_by that most such networks were trained with.
        prepare: arrays there -> arrays there, where single arrays have no counterpart here.
    """

    known_by: tuple[str, ...]
    rows: tuple[Row, ...]
    model: str
    inputs: str
    prepare: Callable[[Arrays], Arrays] = dict


def _same(x: np.ndarray) -> np.ndarray:
    return x


# Kinds of layers: {name of an array there: (collection here, name here, change of the layout)}.
CONV = {
    "weight": ("params", "kernel", lambda x: x.transpose(2, 3, 1, 0)),  # o i h w -> h w i o
    "bias": ("params", "bias", _same),
}
DENSE = {
    "weight": ("params", "kernel", np.transpose),  # o i -> i o
    "bias": ("params", "bias", _same),
}
NORM = {
    "weight": ("params", "scale", _same),
    "bias": ("params", "bias", _same),
    "running_mean": ("batch_stats", "mean", _same),
    "running_var": ("batch_stats", "var", _same),
    "num_batches_tracked": (),  # has no counterpart: averages here move by a fixed momentum
}
TOKENS = {"token": ("params", "token", _same), "positions": ("params", "positions", _same)}
SCALE = {"gamma": ("params", "scale", _same)}


def _arrange_positions(arrays: Arrays) -> Arrays:
    """Arranges timm's positions (1, l, c) as a square grid (h, w, c).

    The position of the class token, the first of an odd number, is added to the token.
    """
    positions, token = arrays.get("pos_embed"), arrays.get("cls_token")
    if positions is None or positions.ndim != 3 or len(positions) != 1:
        return arrays
    side = math.isqrt(positions.shape[1])
    first = positions.shape[1] - side**2  # positions that precede the grid
    if first > (token is not None):
        return arrays  # those of register tokens, or of a grid that is not square
    rest = {name: x for name, x in arrays.items() if name not in ("pos_embed", "cls_token")}
    if token is not None:
        rest["token"] = (token + positions[:, :first].sum(1)).reshape(-1)
    return {**rest, "positions": positions[0, first:].reshape(side, side, -1)}


_BLOCK = r"layer(\d)\.(\d+)"
FAMILIES = {
    "a ResNet of torchvision or timm": Family(
        known_by=("bn1.weight", "layer1.0.conv1.weight"),
        rows=(
            (r"conv1", r"stem", CONV),
            (r"bn1", r"stem_norm", NORM),
            (rf"{_BLOCK}\.conv(\d)", r"group\1_block\2+1/conv\3", CONV),
            (rf"{_BLOCK}\.bn(\d)", r"group\1_block\2+1/norm\3", NORM),
            (rf"{_BLOCK}\.downsample\.0", r"group\1_block\2+1/shortcut", CONV),
            (rf"{_BLOCK}\.downsample\.1", r"group\1_block\2+1/shortcut_norm", NORM),
            (r"fc", r"head", DENSE),
        ),
        model="resnet18(stem='imagenet') or resnet50(stem='imagenet')",
        inputs="imagenet",
    ),
    "a ViT of timm": Family(
        known_by=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        rows=(
            (r"", r"", TOKENS),
            (r"patch_embed\.proj", r"stem", CONV),
            (r"blocks\.(\d+)\.norm(\d)", r"block\1+1/norm\2", NORM),
            (r"blocks\.(\d+)\.attn\.qkv", r"block\1+1/qkv", DENSE),
            (r"blocks\.(\d+)\.attn\.proj", r"block\1+1/out", DENSE),
            (r"blocks\.(\d+)\.mlp\.fc(\d)", r"block\1+1/dense\2", DENSE),
            (r"norm", r"norm", NORM),
            (r"head", r"head", DENSE),
        ),
        model="vit_s16(pool='token', positions='learned')",
        inputs="half",
        prepare=_arrange_positions,
    ),
    "a ConvNeXt of timm": Family(
        known_by=("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
        rows=(
            (r"stem\.0", r"stem", CONV),
            (r"stem\.1", r"stem_norm", NORM),
            (r"stages\.(\d)\.downsample\.0", r"group\1+1_norm", NORM),
            (r"stages\.(\d)\.downsample\.1", r"group\1+1_shrink", CONV),
            (r"stages\.(\d)\.blocks\.(\d+)", r"group\1+1_block\2+1", SCALE),
            (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw", r"group\1+1_block\2+1/conv", CONV),
            (r"stages\.(\d)\.blocks\.(\d+)\.norm", r"group\1+1_block\2+1/norm", NORM),
            (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)", r"group\1+1_block\2+1/dense\3", DENSE),
            (r"head\.norm", r"norm", NORM),
            (r"head\.fc", r"head", DENSE),
        ),
        model="convnext_t",
        inputs="imagenet",
    ),
}


def translate(arrays: Arrays) -> tuple[str, Arrays]:
    """Returns the name of the arrays' family, and the arrays as float32 by their path here.

    Raises:
        UserError: the names are not those of a family of FAMILIES.
    """
    names = [n for n, f in FAMILIES.items() if all(known in arrays for known in f.known_by)]
    if not names:
        first = ", ".join(sorted(arrays)[:4])
        raise UserError(
            f"the file's arrays, such as {first}, are not those of cv_jax.tools.export, "
            f"{' or '.join(FAMILIES)}. Rename the arrays as cv_jax/learn/foreign.py lists them."
        )
    family = FAMILIES[names[0]]
    found = {}
    for there, array in sorted(family.prepare(arrays).items()):  # a file has no order
        path, change = _translate_one(there, family.rows)
        if path:
            found[path] = np.asarray(change(array), np.float32)
    return names[0], found


def _translate_one(there: str, rows: tuple[Row, ...]) -> tuple[str, Callable]:
    """Returns the path here and the change of the layout; "" if there is no counterpart."""
    layer, _, last = there.rpartition(".")
    for regex, template, kind in rows:
        match = re.fullmatch(regex, layer)
        if match is None or last not in kind:
            continue
        if not kind[last]:
            return "", _same
        collection, name, change = kind[last]
        here = re.sub(r"(\d+)\+1", lambda m: str(int(m[1]) + 1), match.expand(template))
        return "/".join(filter(None, (collection, here, name))), change
    return f"params/{there}", _same
