"""The losses of a segmenter, over all valid pixels of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cv_jax.data.fields import IGNORED
from cv_jax.learn.losses import Loss


class Pixels(NamedTuple):
    """The classes of the pixels of a batch.

    Attributes:
        label: (b, h, w, n) float32, one-hot; 0 where a pixel is ignored.
        weight: (b, h, w) float32, the weight of a pixel's class; 0 where a pixel is ignored.
    """

    label: jax.Array
    weight: jax.Array


def make_pixels(mask: jax.Array, n: int, class_weights: jax.Array | None = None) -> Pixels:
    """Returns the pixels of masks (b, h, w) uint8, with weights (n,) of the classes or 1."""
    label = jax.nn.one_hot(mask, n)  # 0 for 255
    if class_weights is None:
        return Pixels(label, (mask != IGNORED).astype(jnp.float32))
    return Pixels(label, (label * class_weights[None, None, None]).sum(-1))


def cross_entropy(logits: jax.Array, pixels: Pixels, focus: float = 0.0) -> Loss:
    """Returns sum_i w_i (1 - p_i)^focus (-log p_i) over the pixels, and the count sum_i w_i.

    p_i is the probability of a pixel's class, w_i the weight of the class. With focus 0 it is the
    cross-entropy; above, the focal loss of T.-Y. Lin et al., https://arxiv.org/abs/1708.02002.

    Args:
        logits: (b, h, w, n) float32.
        pixels: see `Pixels`.
        focus: 0 or more.
    """
    log_p = (jax.nn.log_softmax(logits) * pixels.label).sum(-1)
    each = -pixels.weight * log_p
    if focus:
        # The gradient of (1 - p)^focus is infinite at p = 1 for focus < 1.
        each *= jnp.maximum(1 - jnp.exp(log_p), 1e-6) ** focus
    return Loss(each.sum(), pixels.weight.sum())


def dice(logits: jax.Array, pixels: Pixels) -> jax.Array:
    """Returns 1 - Dice, averaged over the classes that occur in the batch; 0 if none does.

        Dice_c = 2 sum_i p_ic y_ic / (sum_i p_ic + sum_i y_ic)

    The sums are over the valid pixels of the whole batch (F. Milletari et al., "V-Net",
    https://arxiv.org/abs/1606.04797, without the squares).
    """
    valid = pixels.label.sum(-1, keepdims=True)
    axes = (0, 1, 2)
    p = jax.nn.softmax(logits) * valid
    true = pixels.label.sum(axes)
    shared = (p * pixels.label).sum(axes)
    each = 1 - 2 * shared / jnp.maximum(p.sum(axes) + true, 1)
    occurs = (true > 0).astype(jnp.float32)
    return (each * occurs).sum() / jnp.maximum(occurs.sum(), 1)
