"""Augmentations of colour."""

import jax
import jax.numpy as jnp
import numpy as np

from cv_jax.augment.common import (
    IMAGE_AND_LABEL,
    Augment,
    Fields,
    _blend,
    _happens,
    _is_known_as,
    num_rows,
    select,
)
from cv_jax.config.calls import require
from cv_jax.config.errors import UserError


def color_jitter(
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    p: float = 1.0,
    *,
    fields: Fields = IMAGE_AND_LABEL,
) -> Augment:
    """Changes brightness, then contrast, then saturation, then hue by random amounts.

    Brightness, contrast and saturation replace the image by base + factor (image - base), clipped
    to [0, 1]. The base is black for brightness, the mean of the grey image for contrast, and the
    grey image for saturation. Grey is 0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601) with
    three channels, else the mean of the channels; so saturation does not change images of one
    channel. Hue turns the plane of the colour differences I and Q of YIQ (NTSC) by an angle, keeps
    grey, then clips; it changes only images of three channels. All frames of a clip change alike;
    the mean of a clip is that of all its frames.

    Args:
        brightness, contrast, saturation: x in [0, 1]; the factor is uniform in [1 - x, 1 + x].
        hue: x in [0, 0.5]; the angle is uniform in [-x, x] of a full turn.
        p: the probability that an image is changed.
    """
    reaches = (brightness, contrast, saturation)
    bases = (jnp.zeros_like, _mean_grey, _grey)
    require(lambda: all(0 <= x <= 1 for x in reaches), f"{reaches} must all lie in [0, 1]")
    require(lambda: 0 <= hue <= 0.5, f"hue={hue} must lie in [0, 0.5]")
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")

    def op(key, batch):
        b = num_rows(batch, fields)
        draws = jax.random.uniform(key, (3, b, 1, 1, 1), minval=-1, maxval=1)
        hue_key, p_key = jax.random.split(key)
        turn = jax.random.uniform(hue_key, (b, 1, 1, 1), minval=-1, maxval=1)
        chosen = _happens(p_key, p, (b, 1, 1, 1))

        def change(original):
            image = original
            for reach, draw, base in zip(reaches, draws, bases, strict=True):
                if not _is_known_as(0, reach):
                    image = jnp.clip(_blend(base(image), image, 1 + reach * draw), 0, 1)
            if image.shape[-1] == 3 and not _is_known_as(0, hue):
                image = jnp.clip(_turn_hue(image, 2 * jnp.pi * hue * turn), 0, 1)
            return image if _is_known_as(1, p) else jnp.where(chosen, image, original)

        return {**batch, **_map_colours(change, batch, fields)}

    return op


def stain_jitter(strength: float = 0.05, *, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Changes the amounts of the stains haematoxylin, eosin and residual of a tissue image.

        s = -log(image) M^-1,   s'_k = a_k s_k + b_k,   image' = exp(-s' M)

    The rows of M are the colours of the stains in optical density (A. Ruifrok and D. Johnston,
    "Quantification of histochemical staining by color deconvolution", 2001, with DAB as the third).
    For each image and stain, a_k is uniform in [1 - strength, 1 + strength] and b_k in [-strength,
    strength], as in D. Tellez et al., https://arxiv.org/abs/1902.06543, section 3.1; there, 0.05 is
    called light and 0.2 strong. The result is clipped to [0, 1]. Only images of three channels can
    be changed.

    Args:
        strength: 0 to 1.
    """
    require(lambda: 0 <= strength <= 1, f"strength={strength} must lie in [0, 1]")

    def op(key, batch):
        draws = jax.random.uniform(key, (2, num_rows(batch, fields), 1, 1, 3), minval=-1, maxval=1)
        scale, shift = 1 + strength * draws[0], strength * draws[1]

        def change(image):
            if image.shape[-1] != 3:
                raise UserError(
                    f"config.augment: 'stain_jitter' needs images of 3 channels; these have "
                    f"{image.shape[-1]}: remove it."
                )
            density = -jnp.log(jnp.maximum(image, 1 / 255))  # a black pixel has a finite density
            stains = _mix(density, np.linalg.inv(_STAINS))
            return jnp.clip(jnp.exp(-_mix(scale * stains + shift, _STAINS)), 0, 1)

        return {**batch, **_map_colours(change, batch, fields)}

    return op


# Optical density in red, green and blue of haematoxylin, eosin and DAB; rows of length 1.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)


def _mix(image, matrix):
    """Returns image @ matrix of three channels, by slices: see `_grey`."""
    columns = matrix.astype(np.float32)[:, None, None, None]
    return sum(image[..., i : i + 1] * columns[i] for i in range(3))


def grayscale(p: float = 0.2, *, fields: Fields = IMAGE_AND_LABEL) -> Augment:
    """Makes an image grey with probability p; `color_jitter` defines grey."""
    require(lambda: 0 <= p <= 1, f"p={p} must lie in [0, 1]")

    def op(key, batch):
        chosen = _happens(key, p, (num_rows(batch, fields), 1, 1, 1))

        def change(image):
            return jnp.where(chosen, _grey(image), image)

        return {**batch, **_map_colours(change, batch, fields)}

    return op


def _map_colours(change, batch, fields):
    """Returns change(image) for each image (b, h, w, c), and for each clip as one tall image."""
    changed = {name: change(image) for name, image in select(batch, fields, "image").items()}
    for name, clip in select(batch, fields, "clip").items():
        b, t, h, w, c = clip.shape
        changed[name] = change(clip.reshape(b, t * h, w, c)).reshape(clip.shape)
    return changed


# The derivative of turning YIQ's colour plane, in RGB: a turn by t is
# grey + cos(t) (image - grey) + sin(t) QUARTER_TURN image.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


_QUARTER_TURN = np.linalg.solve(_YIQ, np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _YIQ)


def _turn_hue(image, angle):
    grey = _grey(image)
    turned = _mix(image, _QUARTER_TURN.T)
    return grey + jnp.cos(angle) * (image - grey) + jnp.sin(angle) * turned


def _grey(image):
    if image.shape[-1] != 3:
        return jnp.mean(image, axis=-1, keepdims=True)
    # Slices, since a sum over the channel axis takes 20 times as long on the CPU.
    return 0.299 * image[..., :1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:]


def _mean_grey(image):
    return _grey(jnp.mean(image, axis=(1, 2), keepdims=True))
