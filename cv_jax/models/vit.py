"""Vision transformers (Dosovitskiy et al., https://arxiv.org/abs/2010.11929).

The defaults are those of ViT-S/16 in Beyer et al. (https://arxiv.org/abs/2205.01580), as big_vision
has it with a linear head: fixed sine and cosine positions, normalisation before each part of a
block, the mean over the patches after a last normalisation, a head that starts as 0. Kernels of the
blocks start Xavier-uniform and biases as 0. GELU is exact, as in timm; big_vision's is approximate.

`pool="token", positions="learned"` is timm's network. There the class token has a position of its
own; here that position is a part of the token, so the network has `width` parameters less.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.config.calls import require
from cv_jax.config.errors import UserError
from cv_jax.models.layers import dense, gelu, head, layer_norm, patch_conv, zeros

POOLS = ("mean", "token")
POSITIONS = ("sincos", "learned")
# U(-sqrt(3 / c), sqrt(3 / c)): Xavier-uniform for each of the square kernels that "qkv" joins.
_square_xavier = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class ViT(nn.Module):
    """A vision transformer. Comments give the shapes of ViT-S/16 on 224x224 images."""

    width: int
    depth: int
    heads: int
    patch: int
    pool: str
    positions: str
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        del train  # the network has no dropout and no batch statistics
        _check_sides(x, self.patch)
        x = patch_conv(
            x.astype(self.dtype),
            self.width,
            self.patch,
            kernel_init=nn.initializers.lecun_normal(),
            name="stem",
        )
        features, grid = {"stem": x}, x.shape  # b 14 14 384
        x = x + self._positions(*grid[1:])[None].astype(x.dtype)
        x = x.reshape(len(x), -1, self.width)  # b 196 384
        first = 0  # the first patch's position in the sequence
        if self.pool == "token":
            token = self.param("token", zeros, (self.width,)).astype(x.dtype)
            token = jnp.broadcast_to(token[None, None], (len(x), 1, self.width))
            x, first = jnp.concatenate([token, x], axis=1), 1  # b 197 384
        every = max(1, self.depth // 4)
        for i in range(1, self.depth + 1):
            x = Block(self.heads, name=f"block{i}")(x)
            if i % every == 0:  # b 14 14 384 each
                features[f"group{i // every}"] = x[:, first:].reshape(grid)
        x = layer_norm(x, name="norm")
        pooled = x[:, 0] if first else x.mean(axis=1, dtype=jnp.float32)
        features["pooled"] = pooled = pooled.astype(jnp.float32)  # b 384
        return head(pooled, self.num_classes, kernel_init=zeros, bias_init=zeros), features  # b n

    def _positions(self, h: int, w: int, width: int) -> jax.Array:
        if self.positions == "sincos":
            return sincos_positions(h, w, width)
        start = nn.initializers.normal(1 / math.sqrt(width))
        return self.param("positions", start, (h, w, width))


class Block(nn.Module):
    """Self-attention and two dense layers, each beside a shortcut; (b, l, c) -> (b, l, c)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, length, c = x.shape
        y = layer_norm(x, name="norm1")
        qkv = dense(y, 3 * c, kernel_init=_square_xavier, bias_init=zeros, name="qkv")
        q, k, v = jnp.split(qkv.reshape(b, length, 3 * self.heads, c // self.heads), 3, axis=2)
        x = x + _dense(attention(q, k, v).reshape(b, length, c), c, name="out")
        y = layer_norm(x, name="norm2")
        y = gelu(_dense(y, 4 * c, name="dense1"))
        return x + _dense(y, c, name="dense2")


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q k' / sqrt(d)) v of each head, (b, l, heads, d); float32 in the softmax."""
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = nn.softmax(scores * (1 / math.sqrt(q.shape[-1]))).astype(v.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v)


def _dense(x: jax.Array, features: int, name: str) -> jax.Array:
    start = nn.initializers.xavier_uniform()
    return dense(x, features, kernel_init=start, bias_init=zeros, name=name)


def sincos_positions(h: int, w: int, width: int) -> np.ndarray:
    """Returns positions (h, w, width): sin(x f), cos(x f), sin(y f), cos(y f), side by side.

    f[i] = 10000 ** (-i / (width / 4 - 1)) for i from 0 to width / 4 - 1; x counts columns, y rows.
    """
    frequency = 10_000.0 ** -np.linspace(0, 1, width // 4)
    y, x = (axis[..., None] * frequency for axis in np.mgrid[:h, :w])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1, dtype=np.float32)


def resample_positions(positions: np.ndarray, h: int, w: int) -> np.ndarray:
    """Returns learned positions (h', w', c) for another grid, (h, w, c), by cubic interpolation."""
    shape = (h, w, positions.shape[-1])
    return np.asarray(jax.image.resize(positions, shape, "cubic"))


def _check_sides(x: jax.Array, patch: int) -> None:
    _, h, w, _ = x.shape
    if h % patch or w % patch or not h * w:
        raise UserError(
            f"A ViT with patches of {patch}x{patch} pixels needs images whose sides are multiples "
            f"of {patch}, but got {h}x{w}: resize the images, or choose a patch that divides both "
            "sides, such as config.model='vit(patch=4)'."
        )


def vit(
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    patch: int = 16,
    pool: str = "mean",
    positions: str = "sincos",
    *,
    num_classes: int,
    dtype: jnp.dtype,
) -> nn.Module:
    """Builds a vision transformer.

    Args:
        width: channels of the blocks, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
        patch: side of a patch in pixels.
        pool: "mean" over the patches, or "token", a class token.
        positions: "sincos", fixed, or "learned".
        num_classes: width of the logits.
        dtype: compute dtype.
    """
    sizes = {"width": width, "depth": depth, "heads": heads, "patch": patch}
    for name, size in sizes.items():
        require(lambda size=size: 0 < size <= 65_536, f"{name}={size} must be from 1 to 65536")
    require(
        lambda: width >= 8 and width % 4 == width % heads == 0,
        f"width={width} must be a multiple of 4 and of heads={heads}, and at least 8",
    )
    for name, value, known in (("pool", pool, POOLS), ("positions", positions, POSITIONS)):
        require(lambda v=value, k=known: v in k, f"{name}={value!r} must be {' or '.join(known)}")
    return ViT(width, depth, heads, patch, pool, positions, num_classes, dtype)


def vit_s16(
    pool: str = "mean", positions: str = "sincos", *, num_classes: int, dtype: jnp.dtype
) -> nn.Module:
    """Builds ViT-S/16; 224x224 images and 1,000 classes give these numbers of parameters.

    21,974,632, or 22,050,280 with pool="token" and positions="learned"; timm's
    vit_small_patch16_224 has 22,050,664, 384 more.
    """
    return vit(pool=pool, positions=positions, num_classes=num_classes, dtype=dtype)
