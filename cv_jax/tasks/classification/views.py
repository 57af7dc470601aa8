"""Test-time views of an image: the logits averaged over mirrored and shifted copies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.config.errors import UserError, nearest

_Logits = Callable[[jax.Array], jax.Array]


def _mirror(apply: _Logits, image: jax.Array) -> jax.Array:
    return (apply(image) + apply(jnp.flip(image, 2))) / 2


def _mirror_translate(apply: _Logits, image: jax.Array) -> jax.Array:
    h, w = image.shape[1:3]
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")

    def shift(i):  # slices: in an exported program with a symbolic b, indexing would be a gather
        return lax.slice_in_dim(lax.slice_in_dim(padded, i, i + h, axis=1), i, i + w, axis=2)

    shifted = [_mirror(apply, shift(i)) for i in (0, 2)]
    return _mirror(apply, image) / 2 + (shifted[0] + shifted[1]) / 4


def _square(apply: _Logits, image: jax.Array) -> jax.Array:
    if image.shape[1] != image.shape[2]:
        raise UserError(
            f"config.tta='square' needs square images; these have {image.shape[1]}x"
            f"{image.shape[2]} pixels: choose 'mirror'."
        )
    both = [image, jnp.swapaxes(image, 1, 2)]  # a quarter turn transposes and mirrors
    mirrored = [jnp.flip(x, axes) for x in both for axes in ((), 1, 2, (1, 2))]
    return sum(map(apply, mirrored)) / 8


TTA = {
    "none": lambda apply, image: apply(image),
    "mirror": _mirror,
    "mirror_translate": _mirror_translate,
    "square": _square,
}


def find_tta(name: str) -> Callable[[_Logits, jax.Array], jax.Array]:
    """Returns a test-time augmentation: (apply, image) -> logits, averaged over views of the image.

    `image` is (b, h, w, c) float32, and `apply` maps it to logits (b, n).

    Args:
        name: "none"; "mirror", the image and its mirror image; "mirror_translate", in addition
            both shifted by one pixel (reflected at the border) up-left and down-right, where the
            unshifted pair weighs one half (arXiv 2404.00498); "square", the eight rotations and
            mirror images of a square, for images without up and down.

    Raises:
        UserError: the name is unknown.
    """
    if name not in TTA:
        raise UserError(
            f"config.tta={name!r} is unknown.{nearest(name, TTA)} There are: {', '.join(TTA)}."
        )
    return TTA[name]
