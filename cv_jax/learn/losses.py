"""Computes the losses of examples, and the loss of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class Loss(NamedTuple):
    """The loss of a batch as a sum and a count: equal for any division over devices.

    Attributes:
        total: () float32, the sum over the counted units: examples, objects or pixels.
        count: () float32, the number of units in the whole batch, or the sum of their weights; may
            be 0.
        each: (b,) float32, the loss of each example, for `config.select`; None: not known.
    """

    total: jax.Array
    count: jax.Array
    each: jax.Array | None = None

    def mean(self) -> jax.Array:
        """Returns total / count, or total where the count is 0: a step follows its gradient."""
        return self.total / jnp.where(self.count > 0, self.count, 1)


def of_examples(each: jax.Array, weight: jax.Array | None = None) -> Loss:
    """Returns the loss of a batch from the losses (b,) of its examples.

    With weights w the loss is sum w l / sum w, as torch's CrossEntropyLoss(weight=w) computes it.

    Args:
        each: (b,) float32.
        weight: (b,) float32; None: all of weight 1.
    """
    if weight is None:
        return Loss(each.sum(), jnp.float32(len(each)), each)
    each = weight * each
    return Loss(each.sum(), weight.sum(), each)


def cross_entropy(
    logits: jax.Array, label: jax.Array, label_smoothing: ArrayLike = 0.0
) -> jax.Array:
    """Computes the cross-entropy between softmax(logits) and the smoothed label, in nats.

        y' = (1 - label_smoothing) * label + label_smoothing / n
        loss = -sum_n y'_n log softmax(logits)_n

    The arithmetic is float32 for logits of any type. The smoothing is that of Szegedy et al. 2016,
    "Rethinking the Inception Architecture", section 7.

    Args:
        logits: (b, n), of any float type.
        label: (b, n) float32 probabilities: one-hot, or mixed, for example by mixup.
        label_smoothing: 0 to 1; may be traced.

    Returns:
        (b,) float32.
    """
    smooth = optax.smooth_labels(label, label_smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), smooth)


def binary_cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: ArrayLike = 0.0
) -> jax.Array:
    """Computes the sum over classes of the binary cross-entropies, in nats.

        y' = (1 - label_smoothing) * y + label_smoothing / 2
        loss = -sum_n [ y'_n log sigmoid(l_n) + (1 - y'_n) log sigmoid(-l_n) ]

    The arithmetic is float32. Each class has its own yes or no, with even odds as the target of
    the smoothing. Source: L. Beyer et al., "Are we done with ImageNet?",
    https://arxiv.org/abs/2006.07159, section 5, summed over classes as in big_vision's
    `sigmoid_xent`; libraries that average over classes have a loss n times as small.

    Args:
        logits: (b, n), of any float type.
        labels: (b, n) float32 in [0, 1], for example mixed by mixup.
        label_smoothing: 0 to 1; may be traced.

    Returns:
        (b,) float32.
    """
    smooth = (1 - label_smoothing) * labels + label_smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), smooth).sum(-1)


def huber(error: jax.Array, delta: ArrayLike = 1.0) -> jax.Array:
    """Computes the Huber loss of errors (b, k), the mean over k.

        error^2                     where |error| <= delta
        delta (2 |error| - delta)   elsewhere

    It is twice that of P. J. Huber, "Robust Estimation of a Location Parameter", 1964, so that it
    is the squared error for small errors.

    Returns:
        (b,) float32.
    """
    return 2 * optax.huber_loss(error.astype(jnp.float32), delta=delta).mean(-1)


def squared_error(drawn: jax.Array, image: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes the mean of weight * (drawn - image)^2 over each image's pixels and channels.

    Args:
        drawn, image: (b, h, w, c).
        weight: (b, h, w, 1), of mean 1.

    Returns:
        (b,) float32.
    """
    return (weight * (drawn.astype(jnp.float32) - image) ** 2).mean((1, 2, 3))


# --- Without labels: z (b, v, d) are the outputs for v views of each of b images ---


def nt_xent(z: jax.Array, temperature: ArrayLike = 0.5) -> jax.Array:
    """Computes SimCLR's loss, the normalised temperature-scaled cross-entropy, in nats.

    Each of the 2b views is classified: which of the others shows the same image?

        l(i) = -log( exp(s_ij / temperature) / sum_{k != i} exp(s_ik / temperature) )

    where s is the cosine similarity and j the other view. T. Chen et al., "A Simple Framework for
    Contrastive Learning of Visual Representations", https://arxiv.org/abs/2002.05709, equation 1.

    Args:
        z: (b, 2, d), of any float type. The b images are the whole batch, over all devices.
        temperature: above 0; may be traced.

    Returns:
        (b,) float32, the mean over both views of an image.
    """
    z = unit(z)
    b = len(z)
    s = jnp.einsum("bvd,cwd->bvcw", z, z) / temperature
    itself = jnp.eye(2 * b, dtype=bool).reshape(s.shape)
    log_sum = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, s), axis=(2, 3))  # (b, 2)
    positive = (z[:, 0] * z[:, 1]).sum(-1) / temperature  # (b,)
    return log_sum.mean(1) - positive


def byol(q: jax.Array, z: jax.Array) -> jax.Array:
    """Computes BYOL's loss: predictions of one view against the teacher's projection of the other.

        |q1' - z2'|^2 + |q2' - z1'|^2 = 4 - 2 q1'.z2' - 2 q2'.z1'      (x' = x / |x|)

    J.-B. Grill et al., "Bootstrap Your Own Latent", https://arxiv.org/abs/2006.07733, equation 2
    and the sum after it.

    Args:
        q: (b, 2, d) predictions.
        z: (b, 2, d) projections of the teacher; they get no gradient.

    Returns:
        (b,) float32 in [0, 8].
    """
    z = jax.lax.stop_gradient(z)
    return 4 - 2 * (unit(q) * unit(z[:, ::-1])).sum((1, 2))


def vicreg(
    z: jax.Array,
    invariance: ArrayLike = 25.0,
    variance: ArrayLike = 25.0,
    covariance: ArrayLike = 1.0,
) -> jax.Array:
    """Computes VICReg's loss: views agree, each dimension varies, no two dimensions correlate.

        invariance * mean_d (z1 - z2)^2
        + variance * mean_d [ h(z1) + h(z2) ] / 2        with h = max(0, 1 - sqrt(Var(z) + 1e-4))
        + covariance * sum_{i != j} (C(z1)^2 + C(z2)^2)_ij / d

    Var and C are the variances and covariances of the batch, both over b - 1. A. Bardes et al.,
    https://arxiv.org/abs/2105.04906; means and halves as in the authors' code.

    Args:
        z: (b, 2, d), the whole batch.
        invariance, variance, covariance: weights of the three terms; may be traced.

    Returns:
        (b,) float32; only the first term differs between images.
    """
    z = z.astype(jnp.float32)
    b, _, d = z.shape
    centered = z - z.mean(0, keepdims=True)
    cov = jnp.einsum("bvi,bvj->vij", centered, centered) / (b - 1)  # (2, d, d)
    var = jnp.diagonal(cov, axis1=1, axis2=2)  # (2, d)
    hinge = jax.nn.relu(1 - jnp.sqrt(var + 1e-4)).mean()
    together = ((cov**2).sum() - (var**2).sum()) / d
    distance = ((z[:, 0] - z[:, 1]) ** 2).mean(-1)
    return invariance * distance + variance * hinge + covariance * together


def barlow_twins(z: jax.Array, redundancy: ArrayLike = 5e-3) -> jax.Array:
    """Computes the loss of Barlow Twins: it pulls the views' cross-correlation to the identity.

        sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2
        C_ij = mean_b (z1_bi - mean z1_i) (z2_bj - mean z2_j) / (std z1_i std z2_j)

    J. Zbontar et al., https://arxiv.org/abs/2103.03230, equations 1 and 2; 1e-5 is added to the
    variances, as their code's batch normalisation does.

    Args:
        z: (b, 2, d), the whole batch.
        redundancy: weight of the second term; may be traced.

    Returns:
        (b,) float32, the same for all images.
    """
    z = z.astype(jnp.float32)
    z = z - z.mean(0, keepdims=True)
    z = z / jnp.sqrt((z**2).mean(0, keepdims=True) + 1e-5)
    c = z[:, 0].T @ z[:, 1] / len(z)
    on = jnp.diagonal(c)
    loss = ((1 - on) ** 2).sum() + redundancy * ((c**2).sum() - (on**2).sum())
    return jnp.full(len(z), loss)


def unit(z: jax.Array) -> jax.Array:
    """Scales vectors (..., d) to length 1, in float32."""
    z = z.astype(jnp.float32)
    return z / jnp.sqrt(jnp.maximum((z**2).sum(-1, keepdims=True), 1e-12))
