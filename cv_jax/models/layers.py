"""The layers of all models.

Models call these layers and not `nn` or `lax`, so that a faster lowering for one platform is
written once, here. Parameters are float32; a layer computes in the dtype of its input.
"""

import contextlib
import math
from collections.abc import Sequence, Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cv_jax.config.calls import require
from cv_jax.config.errors import UserError
from cv_jax.models import ops

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for convolutions and linear layers.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# N(0, 2 / fan_out), for ReLU networks (He et al., https://arxiv.org/abs/1502.01852).
normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
zeros, ones = nn.initializers.zeros, nn.initializers.ones


def conv(
    x: jax.Array,
    features: int,
    size: int,
    *,
    name: str,
    strides: int = 1,
    padding: int | Sequence[tuple[int, int]] = 0,
    use_bias: bool = False,
    frozen: bool = False,
    kernel_init: nn.initializers.Initializer = uniform_fan_in,
    bias_init: nn.initializers.Initializer | None = None,
) -> jax.Array:
    """Convolves with `features` square filters; (b, h, w, c) -> (b, h', w', features).

    h' = (h + 2 * padding - size) // strides + 1; padding may also be ((above, below), (left,
    right)). Without `bias_init`, a bias starts as U(-1, 1) / sqrt(fan_in). `frozen` keeps the
    kernel (not the bias) from receiving a gradient.
    """
    fan_in = size * size * x.shape[-1]
    return nn.Conv(
        features,
        (size, size),
        strides,
        padding,
        use_bias=use_bias,
        dtype=x.dtype,
        kernel_init=kernel_init,
        bias_init=bias_init or _uniform(1 / math.sqrt(fan_in)),
        conv_general_dilated=_frozen_convolution if frozen else _convolution,
        name=name,
    )(x)


def _convolution(x, kernel, strides, padding, **defaults):
    del defaults  # dilations, groups and precision, which no layer here changes
    return ops.conv(x, kernel, tuple(strides), tuple(map(tuple, padding)))


def _frozen_convolution(x, kernel, *args, **kwargs):
    return _convolution(x, lax.stop_gradient(kernel), *args, **kwargs)


def patch_conv(
    x: jax.Array, features: int, size: int, *, name: str, kernel_init: nn.initializers.Initializer
) -> jax.Array:
    """Convolves patches that do not overlap; (b, h, w, c) -> (b, h // size, w // size, features).

    A matrix product of whole patches, which is fast on every platform. A bias starts as 0.
    """
    return nn.Conv(
        features,
        (size, size),
        size,
        "VALID",
        dtype=x.dtype,
        kernel_init=kernel_init,
        conv_general_dilated=_product_of_patches,
        name=name,
    )(x)


def _product_of_patches(x, kernel, strides, padding, **defaults):
    del strides, padding, defaults
    (b, h, w, c), p = x.shape, len(kernel)
    h, w = h // p, w // p
    x = x[:, : h * p, : w * p].reshape(b, h, p, w, p, c).swapaxes(2, 3)
    return x.reshape(b, h, w, p * p * c) @ kernel.reshape(p * p * c, -1)


def depthwise_conv(
    x: jax.Array, size: int, *, name: str, kernel_init: nn.initializers.Initializer
) -> jax.Array:
    """Convolves each channel with a square filter of its own and keeps h and w, for odd sizes.

    A bias starts as 0.
    """
    channels = x.shape[-1]
    return nn.Conv(
        channels,
        (size, size),
        padding=size // 2,
        feature_group_count=channels,
        dtype=x.dtype,
        kernel_init=kernel_init,
        conv_general_dilated=lambda x, kernel, *_, **__: ops.depthwise_conv(x, kernel[:, :, 0]),
        name=name,
    )(x)


def dense(
    x: jax.Array,
    features: int,
    *,
    name: str,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = uniform_fan_in,
    bias_init: nn.initializers.Initializer | None = None,
) -> jax.Array:
    """Applies a linear layer, (..., c) -> (..., features).

    Without `bias_init`, a bias starts as U(-1, 1) / sqrt(c).
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=x.dtype,
        kernel_init=kernel_init,
        bias_init=bias_init or _uniform(1 / math.sqrt(x.shape[-1])),
        name=name,
    )(x)


def head(x: jax.Array, num_classes: int, **kwargs: Any) -> jax.Array:
    """Applies the linear layer "head", (b, c) -> (b, n); for 0 classes there is no layer, (b, 0).

    `kwargs`: arguments of `dense`.
    """
    return dense(x, num_classes, name="head", **kwargs) if num_classes else x[:, :0]


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def batch_norm(
    x: jax.Array,
    train: bool,
    *,
    name: str,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    scale_init: nn.initializers.Initializer = ones,
) -> jax.Array:
    """Normalises over all axes but the last, by the batch or by the running averages.

    `train` normalises with the batch's own mean and (biased) variance and moves the averages in
    "batch_stats": average = momentum * average + (1 - momentum) * batch. Statistics are float32.

    The variance is E[x^2] - E[x]^2, which loses digits where |mean| is far above the standard
    deviation: over 4,096 values the result's standard deviation is right to 0.1 % for a ratio of
    100 and to 5 % for 1,000, and meaningless for 10,000. Inputs such as float images around 1,000
    must be normalised before; `config.data.normalize` does this.
    """
    norm = nn.BatchNorm(
        momentum=momentum, epsilon=epsilon, use_scale=use_scale, scale_init=scale_init, name=name
    )
    return norm(x.astype(jnp.float32), use_running_average=not train).astype(x.dtype)


def layer_norm(x: jax.Array, *, name: str, epsilon: float = 1e-6) -> jax.Array:
    """Normalises over the last axis, each position on its own; the statistics are float32."""
    return nn.LayerNorm(epsilon=epsilon, name=name)(x.astype(jnp.float32)).astype(x.dtype)


def frozen_statistics(frozen: Set[str]) -> contextlib.AbstractContextManager:
    """Freezes the averages of normalisations with frozen parameters, inside the returned context.

    These layers also normalise with their averages, as in evaluation, so that a frozen layer
    stays the same function.

    Args:
        frozen: paths of the parameters that are not trained, such as "group1/norm1/bias".
    """

    def intercept(method, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            path = "/".join(context.module.path)
            if {f"{path}/bias", f"{path}/scale"} & frozen:
                kwargs = {**kwargs, "use_running_average": True}
        return method(*args, **kwargs)

    return nn.intercept_methods(intercept) if frozen else contextlib.nullcontext()


def max_pool(x: jax.Array, size: int, strides: int | None = None, padding: int = 0) -> jax.Array:
    """Takes the maximum of size x size windows, `strides` (default: `size`) apart.

    Padding is never the maximum.
    """
    strides = strides or size
    if strides == size and not padding:
        return ops.max_pool(x, size)
    return nn.max_pool(x, (size, size), (strides, strides), ((padding, padding),) * 2)


def global_max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum over h and w: (b, h, w, c) -> (b, c) float32."""
    return x.max(axis=(1, 2)).astype(jnp.float32)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Takes the mean over h and w: (b, h, w, c) -> (b, c) float32."""
    return x.mean(axis=(1, 2), dtype=jnp.float32)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Computes x * Phi(x), Phi the normal distribution function: exact, no tanh approximation."""
    return x * _normal_cdf(x)


def _gelu_backward(x, g):
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return ((_normal_cdf(x) + x * density) * g,)


def _normal_cdf(x: jax.Array) -> jax.Array:
    # By erf: jax.nn.gelu uses erfc, which takes 2.5 times as long in XLA's CPU code.
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def check_image_size(x: jax.Array, model: str, least: int) -> None:
    """Raises UserError unless images (b, h, w, c) are at least `least` pixels high and wide."""
    _, h, w, _ = x.shape
    if min(h, w) < least:
        raise UserError(
            f"Model {model!r} needs images of at least {least}x{least} pixels, but got {h}x{w}: "
            "choose another config.model."
        )


MAX_WIDTH = 65_536


def checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Returns the widths of layers; raises ValueError if one is out of range or there is none."""
    require(
        lambda: widths and all(0 < width <= MAX_WIDTH for width in widths),
        f"widths={widths!r} must be one or more numbers, each from 1 to {MAX_WIDTH}",
    )
    return tuple(widths)
