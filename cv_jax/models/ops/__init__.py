"""Numeric kernels with a lowering for each platform; they compute the same as plain lax."""

from cv_jax.models.ops.convolution import conv
from cv_jax.models.ops.depthwise import depthwise_conv
from cv_jax.models.ops.platforms import plain_lax
from cv_jax.models.ops.pooling import max_pool

__all__ = ["conv", "depthwise_conv", "max_pool", "plain_lax"]
