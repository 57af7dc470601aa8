"""Image classification: one label an image, cross-entropy, accuracy."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cv_jax.augment.resizing import resize_images
from cv_jax.data import DataSpec
from cv_jax.learn.class_weights import example_weights, make_class_weights
from cv_jax.learn.images import draw_image, make_read
from cv_jax.learn.initial import check_sizes, make_initial
from cv_jax.learn.inputs import make_augmented, make_normalize, to_unit
from cv_jax.learn.losses import cross_entropy, of_examples
from cv_jax.learn.metrics import classification_metrics
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.selection import make_select
from cv_jax.optim.state import TrainState, init_state
from cv_jax.tasks import Task
from cv_jax.tasks.classification.panels import make_panels
from cv_jax.tasks.classification.saliency import explain
from cv_jax.tasks.classification.views import find_tta
from cv_jax.workdir.metric import Metric


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task."""
    model = build_model(config.model, spec.num_classes, compute_dtype(config.dtype))
    augmented = make_augmented(config.augment, spec.fields)
    normalize = make_normalize(spec, config.data.normalize, config.data.normalize_by)
    initial = make_initial(config, model, normalize, spec)
    check_sizes(config, model, spec, initial.shapes["params"])
    views = find_tta(config.tta)
    select = make_select(config.select)
    class_weights = make_class_weights(config.class_weights, spec)
    weight_of = partial(example_weights, class_weights)

    def augment(batch, key):
        augment_key, _ = jax.random.split(key)
        return augmented(batch, augment_key)

    def loss(params, model_state, mixed, key, size):
        _, dropout_key = jax.random.split(key)
        (logits, _), model_state = model.apply(
            {"params": params, **model_state},
            normalize(resize_images(mixed["image"], size)),
            train=True,
            mutable=list(model_state),
            rngs={"dropout": dropout_key},
        )
        each = cross_entropy(logits, mixed["label"], config.label_smoothing)
        found = of_examples(each, weight_of(mixed["label"]))
        correct = logits.argmax(-1) == mixed["label"].argmax(-1)
        return found, (
            model_state,
            {
                "loss": (found.total, found.count),
                "accuracy": (correct.sum(dtype=jnp.float32), jnp.float32(len(each))),
            },
        )

    training = make_training(config, spec, initial.shapes["params"], loss, select, prepare=augment)

    def init(key: jax.Array) -> TrainState:
        variables = initial.draw(key)
        params = variables.pop("params")
        last_loss_of = spec.num_train if select else 0
        return init_state(params, variables, training.tx, last_loss_of)

    def network(state):
        """Returns the map from normalised images to logits and features."""
        variables = {"params": evaluated_params(config.optim, state), **state.model_state}
        return lambda image: model.apply(variables, image, train=False)

    def apply(state, image):
        """Maps images, uint8 or float32 in [0, 1], to logits and features."""
        return network(state)(normalize(to_unit(image)))

    def logits_of(state, image, views):
        one_view = jax.jit(lambda image: network(state)(image)[0])  # traced once for all views
        return views(one_view, normalize(to_unit(image)))

    def evaluate(state, batch, views):
        logits = logits_of(state, batch["image"], views)
        return classification_metrics(logits, batch["label"], batch["rows"]["weight"])

    watch = partial(evaluate, views=find_tta("none"))
    notes = [*training.notes, *initial.notes]
    if select:
        notes.append(f"select  {config.select}; training metrics are of the selected examples")
    if class_weights is not None:
        low, high = class_weights.min(), class_weights.max()
        notes.append(f"weights {low:.3g} to {high:.3g} of the classes in the training loss")
    return Task(
        init=init,
        train_step=training.train_step,
        evals={
            "watch": watch,
            "final": watch if config.tta == "none" else partial(evaluate, views=views),
        },
        metrics={
            "loss": Metric(better="lower"),
            "accuracy": Metric("%", protocol=f"top-1, views {config.tta}"),
            "top5": Metric("%", protocol=f"top-5, views {config.tta}"),
        },
        headline="accuracy",
        preview=augmented,
        notes=notes,
        needs=("image", "label"),
        reads=(
            "accumulate",
            "class_weights",
            "data.normalize_by",
            "label_smoothing",
            "progressive_resizing",
            "select",
            "tta",
        ),
        stages=training.stages,
        features=lambda state, batch: apply(state, batch["image"])[1],
        predict=lambda state, batch: {"logits": logits_of(state, batch["image"], views)},
        outputs={"logits": "in the order of the class names; their softmax is the probabilities"},
        read=make_read(spec),
        describe=partial(describe, spec.class_names),
        draw=draw_image,
        explain=partial(explain, apply, partial(logits_of, views=views)),
        panels=make_panels(spec.class_names),
        baseline=majority,
    )


def describe(names, example, prediction, back) -> dict:
    """Returns {"class": predicted class, "probabilities": {class: probability}}, highest first."""
    del example, back
    logits = np.asarray(prediction["logits"], np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    probabilities = {names[i]: float(shares[i]) for i in order}
    return {"class": names[order[0]], "probabilities": probabilities}


def majority(train, examples) -> dict[str, float]:
    """Returns the accuracy of predicting the most frequent class of train."""
    answer = np.bincount(train["label"]).argmax()
    return {"accuracy": float((examples["label"] == answer).mean())}
