"""U-Net (O. Ronneberger et al., https://arxiv.org/abs/1505.04597), with batch normalisation.

Each level has two 3x3 convolutions. On the way down, a max-pool halves the map and the width
doubles. On the way up, the map doubles, and the map of the same size from the way down is put
beside it. Convolutions are padded, so that every pixel has a feature of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models import layers
from cv_jax.models.layers import check_image_size, global_avg_pool, head, max_pool
from cv_jax.models.pyramid import block, double


class UNet(nn.Module):
    """A U-Net. Comments give the shapes for 4 levels of width 32 on images of 64x96 pixels."""

    width: int
    levels: int
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits of the image, and features; "pixels" (b, h, w, width) for each pixel."""
        check_image_size(x, "unet", least=2 ** (self.levels - 1))
        x, features = x.astype(self.dtype), {}
        for i in range(self.levels):  # b 64 96 32, b 32 48 64, b 16 24 128, b 8 12 256
            x = _two(max_pool(x, 2) if i else x, self.width * 2**i, f"group{i + 1}", train)
            features[f"group{i + 1}"] = x
        features["pooled"] = global_avg_pool(x)  # b 256
        for i in reversed(range(self.levels - 1)):  # b 16 24 128, b 32 48 64, b 64 96 32
            same = features[f"group{i + 1}"]
            x = jnp.concatenate([double(x, same.shape[1:3]), same], axis=-1)
            x = _two(x, self.width * 2**i, f"up{i + 1}", train)
        features["pixels"] = x
        return head(features["pooled"], self.num_classes), features


def _two(x: jax.Array, width: int, name: str, train: bool) -> jax.Array:
    return block(block(x, width, 3, f"{name}_conv1", train), width, 3, f"{name}_conv2", train)


def unet(width: int = 32, levels: int = 4, *, num_classes: int, dtype: jnp.dtype) -> nn.Module:
    """Builds a U-Net, with `width` channels in the first of `levels` levels.

    1,948,256 parameters without a head, of 4 levels and width 32.
    """
    (width,) = layers.checked_widths((width,))
    if not isinstance(levels, int) or not 1 <= levels <= 8:
        raise ValueError(f"levels={levels} must be a whole number, 1 to 8")
    return UNet(width, levels, num_classes, dtype)
