"""Image classification: one label an image, cross-entropy, accuracy."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_collections

from cv_jax.augment.chain import make_augment
from cv_jax.augment.resizing import resize_images
from cv_jax.config.errors import UserError
from cv_jax.data import DataSpec
from cv_jax.learn.initial import make_initial
from cv_jax.learn.inputs import make_normalize, to_unit
from cv_jax.learn.losses import cross_entropy
from cv_jax.learn.metrics import classification_metrics
from cv_jax.learn.steps import make_steps
from cv_jax.models import build_model, compute_dtype
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.selection import make_select
from cv_jax.optim.state import TrainState, init_state
from cv_jax.tasks import Task
from cv_jax.tasks.classification.views import find_tta


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task: the model, its augmentation and its optimizer, closed over by functions."""
    if spec.num_unlabelled:
        raise UserError(
            "config.data.keep_unlabelled=True is for tasks without labels: "
            "config.task='classification' trains on what has one."
        )
    if config.method:
        raise UserError(
            f"config.method={config.method!r} is for tasks without labels, such as "
            "config.task='ssl': set it to ''."
        )
    model = build_model(config.model, spec.num_classes, compute_dtype(config.dtype))
    augment = make_augment(config.augment)
    normalize = make_normalize(spec, config.data.normalize)
    initial = make_initial(config, model, normalize, spec)
    find_tta(config.tta)  # a mistake in it shows here
    select = make_select(config.select)
    label_smoothing = config.label_smoothing

    def augmented(batch: dict, key: jax.Array) -> dict:
        image = to_unit(batch["image"])
        label = jax.nn.one_hot(batch["label"], spec.num_classes)
        # The barrier keeps the compiler from augmenting again for each reader of a pixel.
        return jax.lax.optimization_barrier(augment(key, {**batch, "image": image, "label": label}))

    def forward(params, model_state, batch, key, size):
        augment_key, dropout_key = jax.random.split(key)
        mixed = augmented(batch, augment_key)
        (logits, _), model_state = model.apply(
            {"params": params, **model_state},
            normalize(resize_images(mixed["image"], size)),
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

    steps = make_steps(config, spec, initial.shapes["params"], forward, select)

    def init(key: jax.Array) -> TrainState:
        variables = initial.draw(key)
        params = variables.pop("params")
        return init_state(params, variables, steps.tx, last_loss_of=spec.num_train if select else 0)

    def predict(state, image, tta):
        params = evaluated_params(config.optim, state)

        @jax.jit  # traced once for all views
        def apply(image):
            return model.apply({"params": params, **state.model_state}, image, train=False)

        image = normalize(to_unit(image))
        logits = find_tta(tta)(lambda view: apply(view)[0], image)
        return logits, apply(image)[1]

    def evaluate(state, batch, tta):
        logits, _ = predict(state, batch["image"], tta)
        return classification_metrics(logits, batch["label"], batch["mask"])

    notes = [*steps.notes, *initial.notes]
    if select:
        notes.append(f"select  {config.select}; loss and accuracy in training are of these")
    return Task(
        init=init,
        train_step=steps.train_step,
        evals={
            "watch": partial(evaluate, tta="none"),
            "final": partial(evaluate, tta=config.tta),
        },
        preview=lambda batch, key: augmented(batch, key)["image"],
        notes=notes,
        predict=predict,
        features=lambda state, image: predict(state, image, "none")[1],
        stages=steps.stages,
    )
