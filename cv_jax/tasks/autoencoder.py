"""Autoencoders: reconstruct whole images from a few numbers, encoded from damaged images.

`config.method`, one of METHODS, chooses the damage. `config.model` without its head is the
backbone. Labels are used only in evaluation, see `probes`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from cv_jax.config.calls import build_one, require
from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec
from cv_jax.learn.images import draw_image, make_read
from cv_jax.learn.initial import make_initial
from cv_jax.learn.inputs import (
    make_denormalize,
    make_normalize,
    make_view,
    to_unit,
)
from cv_jax.learn.losses import of_examples, squared_error
from cv_jax.learn.probes import make_probes, step_metrics, warn_of_collapse
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.models.autoencoder import Autoencoder
from cv_jax.models.layers import checked_widths
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.state import TrainState, init_state
from cv_jax.tasks import Task


class Method(NamedTuple):
    """The damage that an autoencoder learns to undo, and the size of its decoder.

    Attributes:
        latent: the length of the vector that an image is decoded from.
        widths: the decoder's widths, see `models.autoencoder`.
        damage: (key, normalised images (b, h, w, c)) -> (damaged images, weights (b, h, w, 1) of
            the pixels in the loss, of mean 1).
    """

    latent: int
    widths: tuple[int, ...]
    damage: Callable


def denoise(std: float = 0.0, latent: int = 128, widths: tuple[int, ...] = (128, 64, 32)) -> Method:
    """Removes noise: normal noise with `std` is added to every pixel after normalisation.

    P. Vincent et al., "Extracting and Composing Robust Features with Denoising Autoencoders", 2008.
    With std=0 it is a plain autoencoder, which reduces dimensions.
    """
    require(lambda: std >= 0, f"std={std} must be 0 or more")

    def damage(key, image):
        noise = std * jax.random.normal(key, image.shape)
        return image + noise, jnp.ones_like(image[..., :1])

    return _method(latent, widths, damage)


def masked(
    patch: int = 4,
    share: float = 0.5,
    latent: int = 128,
    widths: tuple[int, ...] = (128, 64, 32),
) -> Method:
    """Fills in hidden squares of `patch` pixels; each square is hidden with probability `share`.

    Hidden squares have the mean colour, and only they count in the loss, as in K. He et al.,
    "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377.
    """
    require(lambda: patch >= 1, f"patch={patch} must be 1 or more pixels")
    require(lambda: 0 < share < 1, f"share={share} must lie between 0 and 1")

    def damage(key, image):
        b, h, w, _ = image.shape
        drawn = jax.random.bernoulli(key, share, (b, -(-h // patch), -(-w // patch)))
        hidden = drawn.repeat(patch, 1).repeat(patch, 2)[:, :h, :w, None]
        weight = hidden.astype(jnp.float32)
        weight = weight / jnp.maximum(weight.mean((1, 2, 3), keepdims=True), 1e-6)
        return jnp.where(hidden, 0, image), weight

    return _method(latent, widths, damage)


METHODS = {f.__name__: f for f in (denoise, masked)}


def _method(latent, widths, damage):
    (latent,) = checked_widths((latent,))
    return Method(latent, checked_widths(widths), damage)


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task."""
    method = build_one(config.method, METHODS, "config.method")
    backbone = build_model(config.model, 0, compute_dtype(config.dtype))
    model = Autoencoder(backbone, method.latent, method.widths)
    view = make_view(config.augment)
    normalize = make_normalize(spec, config.data.normalize, config.data.normalize_by)
    denormalize = make_denormalize(spec, config.data.normalize, config.data.normalize_by)
    initial = make_initial(config, model, normalize, spec)

    def loss(params, model_state, batch, key, size):
        del size  # always None: the latent vector depends on every place
        augment_key, damage_key, dropout_key = jax.random.split(key, 3)
        image = normalize(view(batch, augment_key))
        if image.shape[1:] != spec.image_shape:
            raise UserError(
                f"config.augment={config.augment!r} changes the images from {spec.image_shape} to "
                f"{image.shape[1:]}: an autoencoder needs an augmentation that keeps the shape."
            )
        damaged, weight = method.damage(damage_key, image)
        (drawn, features), model_state = model.apply(
            {"params": params, **model_state},
            damaged,
            train=True,
            mutable=list(model_state),
            rngs={"dropout": dropout_key},
        )
        values = squared_error(drawn, image, weight)
        return of_examples(values), (model_state, step_metrics(values, features["pooled"]))

    training = make_training(config, spec, initial.shapes["params"], loss)

    def init(key: jax.Array) -> TrainState:
        variables = initial.draw(key)
        return init_state(variables.pop("params"), variables, training.tx)

    def apply(state, image):
        params = evaluated_params(config.optim, state)
        image = normalize(to_unit(image))
        return image, *model.apply({"params": params, **state.model_state}, image, train=False)

    def features(state, batch):
        _, drawn, features = apply(state, batch["image"])
        return {**features, "reconstruction": denormalize(drawn)}

    def measure(state, batch):
        image, drawn, features = apply(state, batch["image"])
        values = squared_error(drawn, image, jnp.ones_like(image[..., :1]))
        return features["pooled"], {"loss": values}

    probes = make_probes(measure, spec)
    return Task(
        init=init,
        train_step=training.train_step,
        evals=probes.evals,
        metrics=probes.metrics,
        headline=probes.headline,
        preview=lambda batch, key: {"image": view(batch, key)},
        notes=[f"method  {config.method}", probes.note, *training.notes, *initial.notes],
        needs=("image",),
        reads=("method", "data.keep_unlabelled", "data.normalize_by"),
        features=features,
        read=make_read(spec),
        draw=draw_image,
        stages=training.stages,
        baseline=probes.baseline,
        warn=warn_of_collapse,
    )
