"""RandAugment: random changes of shape and colour, all of one strength."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.augment.colour import _grey
from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    Augment,
    Fields,
    _blend,
    _happens,
    _integers,
    _is_known_as,
    image_size,
    num_rows,
    select,
)
from cv_jax.augment.warp import MIN_AREA, compose, rotation, skewing, translation, warp
from cv_jax.config.calls import require

OPS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "posterize",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
GREY = 0.5  # outside the image


class Draws(NamedTuple):
    """The operations of each example, arrays (b, num_ops).

    Attributes:
        op: int32, the position in OPS.
        level: float32, the share of the largest magnitude.
        sign: float32, -1 or 1.
    """

    op: jax.Array
    level: jax.Array
    sign: jax.Array


def randaugment(
    num_ops: int = 2,
    magnitude: float = 9.0,
    std: float = 0.0,
    p: float = 1.0,
    increasing: bool = True,
    *,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> Augment:
    """Applies `num_ops` random operations of one magnitude m, 0 to 10, to each example.

    Every operation is one of OPS, all equally likely; one may come twice. With s = m / 10:

        rotate                          30 s degrees about the centre, either way
        shear_x, shear_y                0.3 s, either way, about the upper left corner
        translate_x, translate_y        0.45 s of the width or height, either way
        colour, contrast, brightness,   the factor 1 + 0.9 s or 1 - 0.9 s, at least 0.1;
        sharpness                       with increasing=False 0.1 + 1.8 s
        posterize                       keeps 4 - int(4 s) bits; with increasing=False int(4 s)
        solarize                        inverts from 256 - int(256 s); else from int(256 s)
        autocontrast, equalize          without magnitude

    The operations are those of E. Cubuk et al., https://arxiv.org/abs/1909.13719, section 3. The
    magnitudes are those of timm's "rand-m9-inc1", with increasing=False those of its "rand-m9" and
    of big_vision's randaug, where a greater m solarizes and posterizes less. Their lists of
    operations differ: both have inversion and solarize_add, big_vision also has cutout, and
    neither has the identity. Values are those of Pillow, in steps of 1 / 255.

    The order is fixed, so that an example is resampled once and looked up once. First come all
    movements, as one matrix with grey outside the image. Then come the operations that map a value
    to a value, in the order drawn, as one table. Then come colour and sharpness, whose factors
    multiply where they are drawn twice.

    Args:
        num_ops: operations an example.
        magnitude: m, 0 to 10.
        std: standard deviation of a normal number that is added to m for each operation; timm's
            "mstd0.5" is 0.5. The sum is clipped to [0, 10].
        p: the probability that a drawn operation is applied; timm uses 0.5.
        increasing: whether every operation is stronger for a greater m.
    """
    whole = isinstance(num_ops, int) and 1 <= num_ops <= len(OPS)
    require(lambda: whole, f"num_ops={num_ops} must be a whole number, 1 to {len(OPS)}")
    require(lambda: 0 <= magnitude <= 10, f"magnitude={magnitude} must lie in [0, 10]")
    require(lambda: 0 <= std <= 10, f"std={std} must lie in [0, 10]")
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")

    def op(key, batch):
        draws = draw(key, num_rows(batch, fields), num_ops, magnitude, std, p)
        return apply(batch, draws, increasing, fields, min_area)

    return op


def draw(key: jax.Array, b: int, num_ops: int, magnitude: float, std: float, p: float) -> Draws:
    """Draws the operations of b examples; see `randaugment`."""
    op_key, sign_key, level_key, p_key = jax.random.split(key, 4)
    shape = (b, num_ops)
    op = _integers(op_key, shape, len(OPS))
    if not _is_known_as(1, p):
        op = jnp.where(_happens(p_key, p, shape), op, 0)
    level = jnp.full(shape, magnitude, jnp.float32)
    if not _is_known_as(0, std):
        level = jnp.clip(level + std * jax.random.normal(level_key, shape), 0, 10)
    return Draws(op, level / 10, jax.random.rademacher(sign_key, shape, jnp.float32))


def apply(
    batch: dict,
    draws: Draws,
    increasing: bool = True,
    fields: Fields = IMAGE_AND_LABEL,
    min_area: float = MIN_AREA,
) -> dict:
    """Returns the batch changed by the operations; see `randaugment`."""
    size = image_size(batch, fields)
    batch = warp(batch, _matrix(draws, size), size, fields, "zero", min_area, fill=GREY)
    for name, image in select(batch, fields, "image").items():
        batch[name] = _recolour(image[:, None], draws, increasing)[:, 0]
    for name, clip in select(batch, fields, "clip").items():
        batch[name] = _recolour(clip, draws, increasing)
    return batch


def _matrix(draws, size):
    """Returns the matrices (b, 3, 3) of all movements together."""

    def amounts(name, most):
        return jnp.where(draws.op == OPS.index(name), most * draws.level * draws.sign, 0).T

    steps = zip(
        amounts("rotate", 30),
        amounts("shear_x", 0.3),
        amounts("shear_y", 0.3),
        amounts("translate_x", 0.45 * size[1]),
        amounts("translate_y", 0.45 * size[0]),
        strict=True,
    )
    return compose(
        *(
            matrix
            for degrees, right, down, x, y in steps
            for matrix in (rotation(degrees, size), skewing(right, down), translation(x, y))
        )
    )


def _recolour(clip, draws, increasing):
    """Returns clips (b, t, h, w, c) with the operations of colour applied."""
    # The barriers keep the compiler from resampling or looking up anew for each reader of a pixel.
    clip = jax.lax.optimization_barrier(clip)
    levels = (clip * 255 + 0.5).astype(jnp.int32)
    table = _table(histograms(levels), draws, increasing)
    looked_up = jax.vmap(_look_up)(table.astype(jnp.float32) / 255, levels)
    mapped = (table != jnp.arange(256)[None, None]).any((1, 2))
    clip = jnp.where(_columns(mapped, 5), looked_up, clip)
    factors = _factors(draws, increasing)

    def factor(name):
        return _columns(jnp.where(draws.op == OPS.index(name), factors, 1).prod(1), 5)

    coloured = jnp.clip(_blend(_grey(clip), clip, factor("colour")), 0, 1)
    clip = jax.lax.optimization_barrier(jnp.where(factor("colour") == 1, clip, coloured))
    sharp = jnp.clip(_blend(_smooth(clip), clip, factor("sharpness")), 0, 1)
    return jnp.where(factor("sharpness") == 1, clip, sharp)


def _factors(draws, increasing):
    """Returns the factors (b, num_ops) of colour, contrast, brightness and sharpness."""
    if increasing:
        return jnp.maximum(1 + 0.9 * draws.level * draws.sign, 0.1)
    return 0.1 + 1.8 * draws.level


def _columns(array, rank):
    """Returns an array (b,) with further axes of length 1."""
    return array.reshape(-1, *[1] * (rank - 1))


def _smooth(clip):
    """Returns clips (b, t, h, w, c) as Pillow's filter SMOOTH, which keeps the border."""
    window, strides = (1, 1, 3, 3, 1), (1, 1, 1, 1, 1)
    around = jax.lax.reduce_window(clip, np.float32(0), jax.lax.add, window, strides, "same")
    inner = np.zeros((1, 1, *clip.shape[2:4], 1), bool)
    inner[:, :, 1:-1, 1:-1] = True
    return jnp.where(inner, (around + 4 * clip) / 13, clip)


# --- Look-up tables of the 256 values, (b, c, 256) int32 for each channel of each example ---


def histograms(levels: jax.Array) -> jax.Array:
    """Counts the values 0..255 of each channel: (b, t, h, w, c) int32 -> (b, c, 256) int32."""
    # A scatter on a TPU goes value by value; on the CPU products take 10 times as long.
    return jax.lax.platform_dependent(levels, tpu=_by_products, default=_by_scatter)


def _by_scatter(levels):
    c = levels.shape[-1]
    places = levels + 256 * jnp.arange(c)[None, None, None, None]

    def count(places):
        zeros = jnp.zeros(256 * c, jnp.int32)
        return zeros.at[places.reshape(-1)].add(1, mode="promise_in_bounds")

    return jax.vmap(count)(places).reshape(-1, c, 256)


def _by_products(levels):
    """Counts pairs of the upper and the lower four bits: a matrix product of one-hot rows.

    Exact up to 2^24 pixels: zeros and ones are exact in bfloat16, and the sums in float32.
    """
    b, c = levels.shape[0], levels.shape[-1]
    levels = jnp.moveaxis(levels, -1, 1).reshape(b, c, -1)
    upper, lower = (jax.nn.one_hot(x, 16, dtype=jnp.bfloat16) for x in (levels >> 4, levels & 15))
    pairs = jnp.einsum("bcni,bcnj->bcij", upper, lower, preferred_element_type=jnp.float32)
    return pairs.reshape(b, c, 256).astype(jnp.int32)


def _look_up(table, levels):
    """Returns table[channel, level] for the levels (t, h, w, c) of one example."""
    places = levels + 256 * jnp.arange(levels.shape[-1])[None, None, None]
    return table.reshape(-1).at[places].get(mode="promise_in_bounds")


def _table(counts, draws, increasing):
    """Returns the table of all operations that map a value to a value, in their order."""
    table = jnp.broadcast_to(jnp.arange(256)[None, None], counts.shape)
    factors = _factors(draws, increasing)
    for i in range(draws.op.shape[1]):
        here = Draws(*(x[:, i, None, None] for x in draws))
        step = _step(counts, here, factors[:, i, None, None], increasing)
        table = jnp.take_along_axis(step, table, axis=-1, mode="promise_in_bounds")
        counts = jax.vmap(jax.vmap(_count_again))(counts, step)
    return table


def _count_again(counts, table):
    """Returns the histogram (256,) of an image after a table."""
    return jnp.zeros_like(counts).at[table].add(counts, mode="promise_in_bounds")


def _step(counts, draws, factor, increasing):
    """Returns the table of one operation an example; the draws are (b, 1, 1)."""
    bits, threshold = ((most * draws.level).astype(jnp.int32) for most in (4, 256))
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
    value = jnp.arange(256)[None, None]
    tables = {
        "autocontrast": _autocontrast(counts),
        "equalize": _equalize(counts),
        "solarize": jnp.where(value < threshold, value, 255 - value),
        "posterize": value >> (8 - bits) << (8 - bits),
        "contrast": _enhanced(_mean(counts), factor),
        "brightness": _enhanced(0, factor),
    }
    chosen = jnp.broadcast_to(value, counts.shape)
    for name, table in tables.items():
        chosen = jnp.where(draws.op == OPS.index(name), table, chosen)
    return chosen


def _last(counts):
    """Returns the greatest value (b, c, 1) that occurs."""
    return 255 - (counts[..., ::-1] > 0).argmax(-1, keepdims=True)


def _autocontrast(counts):
    first, last = (counts > 0).argmax(-1, keepdims=True), _last(counts)
    value = jnp.arange(256)[None, None]
    stretched = (value - first) * 255 // jnp.maximum(last - first, 1)
    return jnp.where(last > first, jnp.clip(stretched, 0, 255), value)


def _equalize(counts):
    greatest = jnp.take_along_axis(counts, _last(counts), axis=-1)
    step = (counts.sum(-1, keepdims=True) - greatest) // 255
    below = counts.cumsum(-1) - counts
    spread = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread, jnp.arange(256)[None, None])


def _enhanced(base, factor):
    value = _blend(base, jnp.arange(256, dtype=jnp.float32)[None, None], factor)
    return jnp.clip(value, 0, 255).astype(jnp.int32)


def _mean(counts):
    """Returns the mean (b, 1, 1) of the grey image, a whole number."""
    counts = counts.astype(jnp.float32)
    share = counts / counts.sum(-1, keepdims=True)
    means = (share * jnp.arange(256, dtype=jnp.float32)[None, None]).sum(-1)  # (b, c)
    return jnp.floor(_grey(means) + 0.5)[..., None]
