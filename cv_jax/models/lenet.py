"""LeNet as in PyTorch's CIFAR-10 tutorial: two convolutions, three linear layers.

https://pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html, after LeCun et al., 1998. All
weights and biases start as PyTorch's do, which is part of the accuracy that the tutorial reports.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.models.layers import (
    check_image_size,
    conv,
    dense,
    head,
    max_pool,
)


class LeNet(nn.Module):
    """LeNet. Images have at least 16x16 pixels; comments give the shapes of 32x32 images."""

    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        check_image_size(x, "lenet", least=16)
        x = x.astype(self.dtype)
        # ReLU after the pool is the same as before it, on a quarter of the values.
        group1 = nn.relu(max_pool(conv(x, 6, 5, use_bias=True, name="conv1"), 2))  # b 14 14 6
        group2 = nn.relu(max_pool(conv(group1, 16, 5, use_bias=True, name="conv2"), 2))  # b 5 5 16
        x = group2.reshape(group2.shape[0], -1)  # b 400
        x = nn.relu(dense(x, 120, name="dense1"))
        pooled = nn.relu(dense(x, 84, name="dense2")).astype(jnp.float32)
        logits = head(pooled, self.num_classes)  # b n
        return logits, {"group1": group1, "group2": group2, "pooled": pooled}


def lenet(*, num_classes: int, dtype: jnp.dtype) -> nn.Module:
    """Builds LeNet: 62,006 parameters for 32x32x3 images and 10 classes."""
    return LeNet(num_classes, dtype)
