"""Image classification: one label an image, cross-entropy, accuracy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cv_jax import durations, update
from cv_jax.augment import make_augment
from cv_jax.data import DataSpec
from cv_jax.evaluate import find_tta
from cv_jax.losses import cross_entropy
from cv_jax.models import build_model, compute_dtype
from cv_jax.optim import ema_params, make_optimizer
from cv_jax.resizing import make_stages, resize, size_at
from cv_jax.selection import make_select
from cv_jax.tasks import Task

# Bins of the reliability diagram, as in C. Guo et al., arXiv 1706.04599.
CONFIDENCE_BINS = 15


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task: the model, its augmentation and its optimizer, closed over by functions."""
    model = build_model(config.model, spec.num_classes, compute_dtype(config.dtype))
    augment = make_augment(config.augment)
    normalize = make_normalize(spec, config.data.normalize)
    init_variables = _make_init_variables(model, normalize, spec)

    shapes = jax.eval_shape(init_variables, jax.random.key(0))
    total_steps = durations.total_steps(config, spec.num_train)
    sizes = make_stages(config.progressive_resizing, total_steps)
    to_steps = partial(durations.steps, batch_size=config.batch_size, num_train=spec.num_train)
    optimizer = make_optimizer(
        config.optim, shapes["params"], total_steps, config.batch_size, to_steps
    )
    use_ema = config.optim.ema > 0
    find_tta(config.tta)  # a mistake in it shows here
    select = make_select(config.select)
    label_smoothing = config.label_smoothing

    def init(key: jax.Array) -> update.TrainState:
        variables = init_variables(key)
        params = variables.pop("params")
        return update.init_state(
            params, variables, optimizer.tx, last_loss_of=spec.num_train if select else 0
        )

    def augmented(batch: dict, key: jax.Array) -> dict:
        image = _to_unit(batch["image"])
        label = jax.nn.one_hot(batch["label"], spec.num_classes)
        # The barrier keeps the compiler from augmenting again for each reader of a pixel.
        return jax.lax.optimization_barrier(augment(key, {**batch, "image": image, "label": label}))

    def forward(params, model_state, batch, key, size):
        augment_key, dropout_key = jax.random.split(key)
        mixed = augmented(batch, augment_key)
        (logits, _), model_state = model.apply(
            {"params": params, **model_state},
            normalize(resize(mixed["image"], size)),
            train=True,
            mutable=list(model_state),
            rngs={"dropout": dropout_key},
        )
        losses = cross_entropy(logits, mixed["label"], label_smoothing)
        correct = logits.argmax(-1) == mixed["label"].argmax(-1)
        count = jnp.float32(len(losses))
        return losses, (
            model_state,
            {"loss": (losses.sum(), count), "accuracy": (correct.sum(dtype=jnp.float32), count)},
        )

    def predict(state, image, tta):
        params = ema_params(state.opt_state) if use_ema else state.params

        @jax.jit  # traced once for all views
        def apply(image):
            return model.apply({"params": params, **state.model_state}, image, train=False)

        image = normalize(image if image.dtype == jnp.float32 else _to_unit(image))
        logits = find_tta(tta)(lambda view: apply(view)[0], image)
        return logits, apply(image)[1]

    def evaluate(state, batch, tta):
        logits, _ = predict(state, batch["image"], tta)
        return classification_metrics(logits, batch["label"], batch["mask"])

    def step_from(start):
        size = size_at(sizes, start)

        def forward_from(params, model_state, batch, key):
            params = optimizer.stop_gradients(params, start)
            return forward(params, model_state, batch, key, size)

        return update.make_train_step(forward_from, optimizer.tx, select)

    starts = tuple(sorted({*(stage.start for stage in sizes), *optimizer.ends}))
    step = update.in_stages(starts, [step_from(start) for start in starts])
    if config.optim.skip_nonfinite:
        step = update.skip_nonfinite(step)

    def train_step(state, batch, key):
        rates = {name: (rate, jnp.float32(1)) for name, rate in optimizer.lr(state.step).items()}
        state, metrics = step(state, batch, key)
        return state, {**metrics, **rates}

    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    notes = [f"model   {config.model}: {num_params:,} parameters", optimizer.report]
    if len(sizes) > 1:
        shown = [f"{s.size or 'all'} from step {s.start}" for s in sizes]
        notes.append(f"pixels  a side: {', '.join(shown)}")
    if select:
        notes.append(f"select  {config.select}; loss and accuracy in training are of these")
    return Task(
        init=init,
        train_step=train_step,
        evals={
            "watch": partial(evaluate, tta="none"),
            "final": partial(evaluate, tta=config.tta),
        },
        preview=lambda batch, key: augmented(batch, key)["image"],
        notes=notes,
        predict=predict,
        stages=starts,
    )


def _make_init_variables(model: nn.Module, normalize: Callable, spec: DataSpec) -> Callable:
    """Returns key -> the model's variables, with what it takes from the training images."""
    from_images = {}
    if hasattr(model, "params_from_images"):
        from_images = flatten_dict(model.params_from_images(normalize(_to_unit(spec.sample))))

    def init_variables(key):
        image = jnp.zeros((1, *spec.image_shape), jnp.float32)
        variables = dict(model.init(key, image, train=False))
        params = {**flatten_dict(variables["params"]), **from_images}
        return {**variables, "params": unflatten_dict(params)}

    return init_variables


def _to_unit(image: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """uint8 0..255 to float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def make_normalize(spec: DataSpec, normalize: bool) -> Callable[[Any], Any]:
    """Returns x -> (x - mean) / std per channel of the training split, or x -> x.

    The images may be NumPy's or JAX's, and are that after it.
    """
    if not normalize:
        return lambda image: image
    mean = np.float32(spec.mean)[None, None, None]
    std = np.float32(spec.std)[None, None, None]
    std = np.maximum(std, np.float32(1 / 255))  # of a constant channel: 0
    return lambda image: (image - mean) / std


def classification_metrics(logits: jax.Array, label: jax.Array, mask: jax.Array) -> dict:
    """Metrics of a batch as (sum, count) pairs over the examples that count.

    Args:
        logits: (b, n) float32.
        label: (b,) int32 in [0, n).
        mask: (b,) float32, 1 for an example that counts and 0 for padding.

    Returns:
        loss (cross-entropy, nats), accuracy, top5 where n > 5, per_class_accuracy ((n,) pairs);
        confusion, whose sum is the (n, n) matrix of counts, rows the labels, columns the answers;
        calibration, whose sum is (3, 15): of the examples whose confidence (the probability of the
        answer) lies in each of 15 bins of equal width, the number, how many are right, and the
        sum of the confidences.
    """
    n = logits.shape[-1]
    answer = logits.argmax(-1)
    label_one_hot = jax.nn.one_hot(label, n) * mask[:, None]
    confusion = label_one_hot.T @ jax.nn.one_hot(answer, n)
    count = mask.sum()
    losses = cross_entropy(logits, jax.nn.one_hot(label, n))
    correct = (answer == label).astype(mask.dtype)
    confidence = jax.nn.softmax(logits).max(-1)
    bins = jnp.minimum((confidence * CONFIDENCE_BINS).astype(jnp.int32), CONFIDENCE_BINS - 1)
    binned = jnp.stack([jnp.ones_like(mask), correct, confidence]) * mask[None]
    metrics = {
        "loss": ((losses * mask).sum(), count),
        "accuracy": ((correct * mask).sum(), count),
        "per_class_accuracy": (jnp.diagonal(confusion), confusion.sum(1)),
        "confusion": (confusion, count),
        "calibration": (binned @ jax.nn.one_hot(bins, CONFIDENCE_BINS), count),
    }
    if n > 5:
        hit = (jax.lax.top_k(logits, 5)[1] == label[:, None]).any(-1)
        metrics["top5"] = ((hit.astype(mask.dtype) * mask).sum(), count)
    return metrics
