"""N94 and N96: the networks of the fastest CIFAR-10 trainings to 94 % and 96 % accuracy.

K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498
(without the scaling of biases): a frozen whitening layer and three groups of convolutions. N94's
groups have two convolutions. N96's have three wider ones, the last two with a residual connection.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cv_jax.models.layers import (
    batch_norm,
    check_image_size,
    checked_widths,
    conv,
    gelu,
    global_max_pool,
    head,
    max_pool,
    uniform_fan_in,
)

PATCH = 2  # side of the whitened patches
WHITEN_IMAGES = 5_000
WHITEN_EPSILON = 5e-4


class N94(nn.Module):
    """N94 or N96. Comments give the shapes of 32x32x3 images and n94's default widths.

    Images have at least 2x2 pixels: a pool is skipped where no 2x2 window is left (8x8 images:
    7 -> 3 -> 1). Larger images are pooled globally at the end.
    """

    widths: tuple[int, ...]
    residual: bool
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        check_image_size(x, "n94", least=PATCH)
        x = x.astype(self.dtype)
        whitened = 2 * x.shape[-1] * PATCH**2  # each component and its negative
        x = gelu(conv(x, whitened, PATCH, use_bias=True, frozen=True, name="whiten"))  # b 31 31 24
        features = {"stem": x}
        for i, width in enumerate(self.widths, start=1):
            x = Group(width, self.residual, name=f"group{i}")(
                x, train
            )  # b 15 15 64, b 7 7 256, b 3 3 256
            features[f"group{i}"] = x
        features["pooled"] = pooled = global_max_pool(x)  # b 256
        logits = head(pooled, self.num_classes, use_bias=False, kernel_init=unit_std_init)
        return logits / self.widths[-1], features  # b n

    def params_from_images(self, images: np.ndarray) -> dict[str, Any]:
        """Returns the initial parameters that depend on the data: {"whiten": {"kernel"}}.

        Args:
            images: (m, h, w, c) float32, normalised training images; the first 5,000 are used.
        """
        return {"whiten": {"kernel": jnp.asarray(whitening_kernel(images[:WHITEN_IMAGES]))}}


class Group(nn.Module):
    """Two or three 3x3 convolutions; halves h and w (rounded down) where a 2x2 window fits.

    With `residual` there are three, and the second's input is added to the third's output.
    """

    width: int
    residual: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        pools = min(x.shape[1:3]) >= 2
        # An odd last row and column, which the pool would drop, is not computed: 11 % of all work.
        padding = [(1, 1 - side % 2 if pools else 1) for side in x.shape[1:3]]
        x = conv(x, self.width, 3, padding=padding, kernel_init=identity_init, name="conv1")
        x = max_pool(x, 2) if pools else x
        x = gelu(_norm(x, train, "norm1"))
        y = conv(x, self.width, 3, padding=1, kernel_init=identity_init, name="conv2")
        y = _norm(y, train, "norm2")
        if not self.residual:
            return gelu(y)
        y = conv(gelu(y), self.width, 3, padding=1, kernel_init=identity_init, name="conv3")
        return gelu(x + _norm(y, train, "norm3"))


def _norm(x: jax.Array, train: bool, name: str) -> jax.Array:
    return batch_norm(x, train, momentum=0.6, epsilon=1e-12, use_scale=False, name=name)


def whitening_kernel(images: np.ndarray) -> np.ndarray:
    """Computes the filters that decorrelate the 2x2 patches of `images`, and their negatives.

    With the second moments C = E[p p^T] = sum_i l_i v_i v_i^T of all patches p, filter i is
    v_i / sqrt(l_i + 5e-4), by decreasing l_i. The responses of the first 4c filters then have the
    identity as their second moments (section 3.2 of the paper). v_i and -v_i are both
    eigenvectors; v_i is the one whose largest entry is positive.

    Computed in float64: in float32, eigenvectors of close eigenvalues would depend on the order of
    the sum, and a run on the number of threads and devices.

    Args:
        images: (m, h, w, c) float32.

    Returns:
        (2, 2, c, 8c) float32.
    """
    _, h, w, c = images.shape
    total = np.zeros((PATCH * PATCH * c,) * 2)
    for start in range(0, len(images), 500):  # few enough to fit into memory as float64
        part = images[start : start + 500].astype(np.float64)
        shifted = [
            part[:, dy : h - PATCH + 1 + dy, dx : w - PATCH + 1 + dx]
            for dy in range(PATCH)
            for dx in range(PATCH)
        ]
        patches = np.concatenate(shifted, axis=-1).reshape(-1, PATCH * PATCH * c)
        total += patches.T @ patches
    moments = total / (len(images) * (h - PATCH + 1) * (w - PATCH + 1))
    values, vectors = np.linalg.eigh(moments)  # ascending; one eigenvector a column
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.sign(vectors[largest, np.arange(len(values))])
    filters = (vectors / np.sqrt(values + WHITEN_EPSILON))[:, ::-1]
    kernel = np.concatenate([filters, -filters], axis=1).reshape(PATCH, PATCH, c, -1)
    return kernel.astype(np.float32)


def identity_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Draws PyTorch's default, but the first min(c, features) filters copy their channel."""
    h, w, c, features = shape
    kernel = uniform_fan_in(key, shape, dtype)
    kernel = jnp.where(np.arange(features) < c, jnp.zeros((), dtype), kernel)
    around = [(n // 2, (n - 1) // 2, 0) for n in (h, w)]
    identity = np.eye(c, features, dtype=dtype)[None, None]
    return kernel + lax.pad(identity, np.zeros((), dtype), [*around, (0, 0, 0), (0, 0, 0)])


def unit_std_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Draws uniformly around 0 and divides by the standard deviation of the values drawn."""
    kernel = jax.random.uniform(key, shape, dtype, -1, 1)
    return kernel / kernel.std()


def n94(
    widths: tuple[int, ...] = (64, 256, 256), *, num_classes: int, dtype: jnp.dtype
) -> nn.Module:
    """Builds N94: 1,971,640 parameters for RGB images and 10 classes.

    `widths`: channels of each group.
    """
    return _build(widths, False, num_classes, dtype)


def n96(
    widths: tuple[int, ...] = (128, 384, 512), *, num_classes: int, dtype: jnp.dtype
) -> nn.Module:
    """Builds N96: 9,915,704 parameters for RGB images and 10 classes.

    `widths`: channels of each group.
    """
    return _build(widths, True, num_classes, dtype)


def _build(widths, residual, num_classes, dtype):
    return N94(checked_widths(widths), residual, num_classes, dtype)
