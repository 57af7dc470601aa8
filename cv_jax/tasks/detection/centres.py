"""Objects as centres on a map: targets, loss and decoding.

Each object is a bump on the heat map of its class, as wide and high as a part of its box, and its
box is learned at every place of the bump (Z. Liu et al., "Training-Time-Friendly Network for
Real-Time Object Detection", https://arxiv.org/abs/1909.00700): one object teaches many places, and
training takes a fraction of the epochs that a single centre takes. A place that lies in several
bumps belongs to the smallest box.

Shapes: b images, o objects, a map of h x w places with n classes. Boxes are corners x0 y0 x1 y1 in
pixels; places are STRIDE pixels apart, and place (i, j) is at pixel STRIDE * (j + 0.5, i + 0.5).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cv_jax.augment.warp import area_of
from cv_jax.models.detector import STRIDE

# Half sides of a bump, and its standard deviations, as shares of the box's sides.
BUMP = 0.54
# Pixels of a distance whose logarithm is 0, as at the start. A box much smaller than its object has
# hardly a gradient: with 4 pixels, large objects were learned last.
UNIT = 16
MOST_DISTANCE = 12.0  # the largest logarithm of a distance that is not cut


class Targets(NamedTuple):
    """What the network should predict.

    Attributes:
        heat: (b, h, w, n) in [0, 1], 1 at the place of a centre.
        counts: (b, h, w) bool, the places where the heat map is compared with `heat`.
        boxes: (b, h, w, 4), the box that a place belongs to.
        weight: (b, h, w), how much its box counts; the sum over an object's places is at most 1.
        num_objects: (b,).
    """

    heat: jax.Array
    counts: jax.Array
    boxes: jax.Array
    weight: jax.Array
    num_objects: jax.Array


def make_targets(
    boxes: jax.Array, label: jax.Array, crowd: jax.Array, size: tuple[int, int], num_classes: int
) -> Targets:
    """Draws the targets of images on maps of `size` (h, w).

    Args:
        boxes: (b, o, 4).
        label: (b, o) int32; -1 is padding.
        crowd: (b, o) bool; inside such a box the heat map has no target.
        size: of the map.
        num_classes: n.
    """
    return jax.vmap(lambda *one: _targets(*one, size, num_classes))(boxes, label, crowd)


def _targets(boxes, label, crowd, size, num_classes):
    real = (label >= 0) & ~crowd
    y, x = (jnp.arange(side, dtype=jnp.float32) for side in size)
    (left, across), (top, down) = (_bump(boxes[:, i], boxes[:, i + 2], size[1 - i]) for i in (0, 1))
    # (o, h, w), 1 at the centre and 0 outside the bump
    bump = _gauss(y, top, down)[:, :, None] * _gauss(x, left, across)[:, None]
    bump = jnp.where(real[:, None, None], bump, 0)
    heat = jnp.zeros((num_classes, *size)).at[jnp.maximum(label, 0)].max(bump)
    inside = jnp.where(bump > 0, area_of(boxes)[:, None, None], jnp.inf)
    owner = inside.argmin(0)  # (h, w)
    total = jnp.maximum(bump.sum((1, 2)), 1e-6)
    share = bump / total[:, None, None]
    weight = jnp.take_along_axis(share, owner[None], 0)[0]
    return Targets(
        heat=heat.transpose(1, 2, 0),
        counts=~_covered(boxes, crowd, y, x),
        boxes=boxes[owner],
        weight=weight,
        num_objects=real.sum(),
    )


def _bump(low, high, most):
    """Returns the place of the centre (o,) along an axis, and the bump's half side in places."""
    place = jnp.floor((low + high) / 2 / STRIDE)
    return jnp.clip(place, 0, most - 1), jnp.floor(BUMP / 2 * (high - low) / STRIDE)


def _gauss(places, centre, radius):
    """Returns exp(-d^2 / 2 s^2), (o, places), and 0 further from the centre than the radius."""
    d = places[None] - centre[:, None]
    std = (2 * radius[:, None] + 1) / 6
    return jnp.where(jnp.abs(d) <= radius[:, None], jnp.exp(-0.5 * (d / std) ** 2), 0)


def _covered(boxes, crowd, y, x):
    """Returns which places (h, w) lie in a box of a crowd."""
    y, x = STRIDE * (y[None] + 0.5), STRIDE * (x[None] + 0.5)
    rows = (boxes[:, 1, None] <= y) & (y < boxes[:, 3, None]) & crowd[:, None]
    columns = (boxes[:, 0, None] <= x) & (x < boxes[:, 2, None])
    return (rows[:, :, None] & columns[:, None]).any(0)


def to_boxes(sides: jax.Array) -> jax.Array:
    """Returns the box (..., h, w, 4) of every place from the logarithms of its distances."""
    h, w = sides.shape[-3:-1]
    distance = UNIT * jnp.exp(jnp.minimum(sides, MOST_DISTANCE))
    axes = (STRIDE * (jnp.arange(side, dtype=jnp.float32) + 0.5) for side in (h, w))
    y, x = jnp.meshgrid(*axes, indexing="ij")
    place = jnp.stack([x, y], axis=-1).reshape(*(1,) * (sides.ndim - 3), h, w, 2)
    before, after = (jax.lax.slice_in_dim(distance, i, i + 2, axis=-1) for i in (0, 2))
    return jnp.concatenate([place - before, place + after], axis=-1)


def focal_loss(logits: jax.Array, heat: jax.Array) -> jax.Array:
    """Computes the focal loss of heat maps, in nats.

        -(1 - p)^2 log p                  where y = 1
        -(1 - y)^4 p^2 log(1 - p)         elsewhere          (p = sigmoid(logits), y = heat)

    X. Zhou et al., "Objects as Points", https://arxiv.org/abs/1904.07850, equation 1.

    Returns:
        The shape of `logits`, float32.
    """
    p = jax.nn.sigmoid(logits)
    centre = -((1 - p) ** 2) * jax.nn.log_sigmoid(logits)
    elsewhere = -((1 - heat) ** 4) * p**2 * jax.nn.log_sigmoid(-logits)
    return jnp.where(heat == 1, centre, elsewhere)


def giou_loss(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes 1 - GIoU of boxes (..., 4): 0 for equal ones, 2 at most.

    H. Rezatofighi et al., "Generalized Intersection over Union", https://arxiv.org/abs/1902.09630.
    """
    both = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    around = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    either = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - both
    tiny = 1e-6  # square pixels
    return 1 - both / (either + tiny) + (around - either) / (around + tiny)


def _area(low, high):
    return jnp.maximum(high - low, 0).prod(-1)


def losses(logits: jax.Array, sides: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array]:
    """Returns the losses (b,) of the heat maps and of the boxes, sums over objects."""
    heat = jnp.where(targets.counts[..., None], focal_loss(logits, targets.heat), 0)
    box = giou_loss(to_boxes(sides), targets.boxes) * targets.weight
    return heat.sum((1, 2, 3)), box.sum((1, 2))


def decode(logits: jax.Array, sides: jax.Array, count: int) -> dict[str, jax.Array]:
    """Finds the `count` highest peaks of the heat maps of each image.

    A peak is a place whose value no neighbour of the same class exceeds: so one object gives one
    detection, without a search for duplicates. Values that are equal to a neighbour's all count.

    Returns:
        boxes (b, count, 4) in pixels, cut at the image's border; scores (b, count) in [0, 1],
        descending; classes (b, count) int32.
    """
    b, h, w, n = logits.shape
    around = jax.lax.reduce_window(
        logits, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    )
    peaks = jnp.where(logits == around, logits, -jnp.inf).reshape(b, -1)
    count = min(count, peaks.shape[1])
    best, index = jax.lax.top_k(peaks, count)
    place = jax.lax.div(index, jnp.int32(n))  # `//` also minds negative numbers
    boxes = jax.vmap(_take)(to_boxes(sides).reshape(b, h * w, 4), place)
    most = jnp.array([[[w, h, w, h]]], jnp.float32) * STRIDE
    boxes = jnp.minimum(jnp.maximum(boxes, 0), most)
    classes = jax.lax.rem(index, jnp.int32(n))
    return {"boxes": boxes, "scores": jax.nn.sigmoid(best), "classes": classes}


def _take(rows, positions):
    return rows.at[positions].get(mode="promise_in_bounds", wrap_negative_indices=False)
