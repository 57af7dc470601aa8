"""Muon: orthogonalizes the momentum of each matrix before applying it (Jordan et al. 2024).

The optimizer of https://kellerjordan.github.io/posts/muon. optax.contrib.scale_by_muon corrects
the bias of its Nesterov momentum, which turns the direction of the first steps. The published
CIFAR-10 recipe does not correct it, so the rule is written out here.
"""

import jax
import jax.numpy as jnp
import optax

from cv_jax.config.errors import UserError


def orthogonalize(matrix: jax.Array, ns_steps: int) -> jax.Array:
    """Moves the singular values of a matrix towards 1 by the quintic Newton-Schulz iteration.

        X <- M / (||M||_F + 1e-7), then `ns_steps` times
        X <- a X + (b A + c A A) X   with A = X X^T and (a, b, c) = (3.4445, -4.7750, 2.0315)

    The coefficients are chosen for speed: after five steps the singular values lie between about
    0.7 and 1.2 instead of at 1.

    Args:
        matrix: (rows, columns).
        ns_steps: number of iterations.
    """
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix  # the smaller side makes the smaller A
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(ns_steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if rows > columns else x


def scale_by_orthogonalization(ns_steps: int) -> optax.GradientTransformation:
    """Orthogonalizes every update as a matrix (all other axes, last axis = output channels).

    The transformation's `init` raises UserError for parameters of fewer than two axes.
    """

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.ndim < 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"Muon needs parameters of two or more axes, but {name} has {leaf.ndim}: "
                    "give it to a group with another optimizer in config.optim.rules."
                )
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params

        def flat(u):
            return orthogonalize(u.reshape(-1, u.shape[-1]), ns_steps).reshape(u.shape)

        return jax.tree.map(flat, updates), state

    return optax.GradientTransformation(init, update)


def from_normalized_weights(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Scales every parameter to norm sqrt(output channels), then lets `inner` update it.

        q = p * sqrt(c) / ||p||,   p <- q + inner's update of q

    with c the length of the last axis. A parameter that is all zero stays zero before the update.
    """

    def normalize(p):
        return p * (p.shape[-1] ** 0.5 / jnp.maximum(jnp.linalg.norm(p.ravel()), 1e-12))

    def update(updates, state, params, **extra_args):
        normalized = jax.tree.map(normalize, params)
        updates, state = inner.update(updates, state, normalized, **extra_args)
        return jax.tree.map(lambda u, q, p: u + (q - p), updates, normalized, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
