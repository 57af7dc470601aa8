"""A convolutional autoencoder around any backbone: image -> latent vector -> image."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.config.errors import UserError, describe
from cv_jax.models.layers import batch_norm, conv, dense

SMALLEST = 4  # the decoder starts from images of at most this many pixels a side


class Autoencoder(nn.Module):
    """Encodes an image as a vector and decodes it. Comments: shapes of 32x32x3 images and n94.

    The latent vector is computed from the backbone's last feature map, with its positions. Pooled
    features have lost the positions, and no decoder could restore them.
    """

    backbone: nn.Module  # without a head
    latent: int  # width of the latent vector
    widths: tuple[int, ...]  # channels of the decoder, smallest images first; the last repeats

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps normalised images (b, h, w, c) to reconstructions and {"latent", "pooled"}."""
        _, h, w, c = x.shape
        _, features = self.backbone(x, train)
        spatial = [f for f in features.values() if f.ndim == 4]
        if not spatial:
            raise UserError(
                f"An autoencoder needs a feature map (b, h, w, c) of its model, but "
                f"{type(self.backbone).__name__}.__call__ returned the features "
                f"{describe(features)}. Add a feature map, or choose another config.model."
            )
        spatial = spatial[-1]  # b 3 3 256
        latent = dense(spatial.reshape(len(x), -1), self.latent, name="latent")  # b 128
        *sides, smallest = _sides(h, w)
        width = self.widths[0]
        y = nn.relu(dense(latent, math.prod(smallest) * width, name="start"))
        y = y.reshape(-1, *smallest, width)  # b 4 4 128
        for i, side in enumerate(reversed(sides)):  # b 8 8 64, b 16 16 32, b 32 32 32
            y = jax.image.resize(y, (len(y), *side, y.shape[-1]), "nearest")
            width = self.widths[min(i + 1, len(self.widths) - 1)]
            y = conv(y, width, 3, padding=1, name=f"conv{i + 1}")
            y = nn.relu(batch_norm(y, train, name=f"norm{i + 1}"))
        y = conv(y, c, 3, padding=1, use_bias=True, name="image").astype(jnp.float32)
        pooled = features["pooled"].astype(jnp.float32)
        return y, {"latent": latent.astype(jnp.float32), "pooled": pooled}


def _sides(h: int, w: int) -> list[tuple[int, int]]:
    """Returns the image sizes (h, w), each half the one before, down to at most 4 pixels a side."""
    sides = [(h, w)]
    while max(sides[-1]) > SMALLEST:
        h, w = sides[-1]
        sides.append((-(-h // 2), -(-w // 2)))
    return sides
