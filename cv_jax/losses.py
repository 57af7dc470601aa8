"""Losses: one number an example, not reduced, so that masks and weights stay the caller's."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def cross_entropy(
    logits: jax.Array, label: jax.Array, label_smoothing: ArrayLike = 0.0
) -> jax.Array:
    """Cross-entropy between softmax(logits) and the smoothed label, in nats.

        y' = (1 - label_smoothing) * label + label_smoothing / n
        loss = -sum_n y'_n log softmax(logits)_n

    It is computed in float32 whatever the type of the logits. The smoothing is that of
    Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.

    Args:
        logits: (b, n), of any float type.
        label: (b, n) float32 probabilities: one-hot, or mixed by mixup and the like.
        label_smoothing: 0 to 1; may be traced.

    Returns:
        (b,) float32.
    """
    smooth = optax.smooth_labels(label, label_smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), smooth)
