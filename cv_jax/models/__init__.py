"""Image classifiers, by name.

A model is a Flax module, `module(x, train) -> (logits, intermediates)`:
    x: (b, h, w, c) float32, normalised images.
    train: normalise by the batch and update the "batch_stats" collection, if there is one.
    logits: (b, n) float32; (b, 0) for 0 classes, where the network has no head.
    intermediates: features by name, in the model's compute dtype; "pooled" is the head's input.

A model may have `params_from_images(images) -> params`: the part of its initial parameters that
depends on the (normalised, float32) training images.

Imports config; its sub-room `ops` holds the kernels of the layers. A new model is a new file and
a line in MODELS.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from cv_jax.config.calls import build_one
from cv_jax.config.errors import UserError, describe
from cv_jax.models.convnext import convnext_t
from cv_jax.models.lenet import lenet
from cv_jax.models.n94 import n94, n96
from cv_jax.models.resnet import resnet18, resnet50
from cv_jax.models.unet import unet
from cv_jax.models.vit import vit, vit_s16
from cv_jax.models.wide_resnet import wrn28_10

MODELS = {
    "convnext_t": convnext_t,
    "lenet": lenet,
    "n94": n94,
    "n96": n96,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "unet": unet,
    "vit": vit,
    "vit_s16": vit_s16,
    "wrn28_10": wrn28_10,
}


def build_model(text: str, num_classes: int, dtype: jnp.dtype) -> nn.Module:
    """Builds the model that a spec names, such as "n94" or "resnet18(stem='imagenet')".

    Args:
        text: a name of MODELS, with or without arguments.
        num_classes: width of the logits.
        dtype: compute dtype of the model; its parameters, statistics and logits are float32.

    Raises:
        UserError: an unknown name or bad arguments.
    """
    model = build_one(text, MODELS, "config.model", num_classes=num_classes, dtype=dtype)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"config.model={text!r}: its function returned {describe(model)}; return a Flax module."
        )
    return model


def checked_outputs(
    text: str, path: tuple[str, ...], num_classes: int
) -> contextlib.AbstractContextManager:
    """Checks what a model returns, inside the returned context; raises UserError.

    Args:
        text: `config.model`.
        path: path of the model in the traced module; (): the model is that module.
        num_classes: width of the model's logits.
    """

    def intercept(method, args, kwargs, context):
        out = method(*args, **kwargs)
        if context.module.path != path or context.method_name != "__call__":
            return out
        b = len(args[0])
        match out:
            case (logits, {"pooled": pooled}) if getattr(logits, "shape", ()) == (b, num_classes):
                if getattr(pooled, "shape", ())[:1] == (b,) and pooled.ndim == 2:
                    return out
        raise UserError(
            f"config.model={text!r}: {type(context.module).__name__}.__call__ returned "
            f"{describe(out)} for {describe(args[0])}; return logits ({b}, {num_classes}) and a "
            f"dict of features with 'pooled' ({b}, d)."
        )

    return nn.intercept_methods(intercept)


def compute_dtype(text: str) -> jnp.dtype:
    """Returns the dtype that "float32", "bfloat16" or "auto" names.

    "auto" is bfloat16 on TPU and GPU, and float32 on the CPU (slow at bfloat16 elementwise work).
    """
    if text == "auto":
        text = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if text not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype={text!r} must be 'auto', 'float32' or 'bfloat16'.")
    return jnp.dtype(text)
