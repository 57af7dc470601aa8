"""Self-supervised learning: two views of an image get similar features, two images do not.

A backbone (`config.model` without its head), a projector and, for some methods, a predictor and a
teacher. Views are the augmentation `config.augment`, run twice with different keys.
`config.method`, one of METHODS, chooses the loss. Labels are used only in evaluation, see `probes`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.typing import ArrayLike

from cv_jax.augment.resizing import resize_images
from cv_jax.config import durations
from cv_jax.config.calls import build_one, require
from cv_jax.data import DataSpec
from cv_jax.learn import losses
from cv_jax.learn.images import draw_image, make_read
from cv_jax.learn.initial import check_sizes, make_initial
from cv_jax.learn.inputs import make_normalize, make_view, to_unit
from cv_jax.learn.losses import of_examples
from cv_jax.learn.probes import make_probes, step_metrics, warn_of_collapse
from cv_jax.learn.train_step import make_training
from cv_jax.models import build_model, compute_dtype
from cv_jax.models.layers import batch_norm, checked_widths, dense
from cv_jax.optim.optimizers import evaluated_params
from cv_jax.optim.state import TrainState, init_state
from cv_jax.tasks import Task


class Method(NamedTuple):
    """A way to learn without labels.

    Attributes:
        projector: the widths of the projector's layers; its input is the pooled features.
        loss: (outputs (b, 2, d), targets (b, 2, d)) -> (b,). Outputs are the predictor's, or the
            projector's without a predictor. Targets are the teacher's projections, or the outputs
            without a teacher.
        predictor: the widths of the predictor's layers; its input is the projections. (): no
            predictor.
        momentum: the teacher's momentum at step 0, see `teacher_momentum`; None: no teacher.
    """

    projector: tuple[int, ...]
    loss: Callable
    predictor: tuple[int, ...] = ()
    momentum: ArrayLike | None = None


def simclr(temperature: float = 0.5, projector: tuple[int, ...] = (512, 128)) -> Method:
    """Contrasts an image's views with all other images of the batch; see `losses.nt_xent`."""
    require(lambda: temperature > 0, f"temperature={temperature} must be above 0")
    return Method(checked_widths(projector), lambda z, _: losses.nt_xent(z, temperature))


def byol(
    momentum: float = 0.99,
    projector: tuple[int, ...] = (512, 128),
    predictor: tuple[int, ...] = (512,),
) -> Method:
    """Predicts a teacher's projection of the other view; see `losses.byol`.

    The teacher is an average of the network. The predictor gets one more layer than `predictor`
    names, as wide as the projector's last.
    """
    require(lambda: 0 <= momentum <= 1, f"momentum={momentum} must lie in [0, 1]")
    projector = checked_widths(projector)
    return Method(projector, losses.byol, (*checked_widths(predictor), projector[-1]), momentum)


def vicreg(
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    projector: tuple[int, ...] = (1024, 1024, 1024),
) -> Method:
    """Keeps views close, and dimensions varied and uncorrelated; see `losses.vicreg`."""
    return Method(
        checked_widths(projector), lambda z, _: losses.vicreg(z, invariance, variance, covariance)
    )


def barlow_twins(
    redundancy: float = 5e-3, projector: tuple[int, ...] = (1024, 1024, 1024)
) -> Method:
    """Makes the correlation of the views' dimensions the identity; see `losses.barlow_twins`."""
    return Method(checked_widths(projector), lambda z, _: losses.barlow_twins(z, redundancy))


METHODS = {f.__name__: f for f in (simclr, byol, vicreg, barlow_twins)}


class Mlp(nn.Module):
    """Linear layers, (b, c) -> (b, widths[-1]); normalisation and ReLU between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        *hidden, last = self.widths
        for i, width in enumerate(hidden, start=1):
            x = dense(x, width, use_bias=False, name=f"dense{i}")
            x = nn.relu(batch_norm(x, train, name=f"norm{i}"))
        return dense(x, last, name=f"dense{len(self.widths)}")


class Siamese(nn.Module):
    """A backbone with the projector and predictor, which only the training needs."""

    backbone: nn.Module
    projector: Mlp
    predictor: Mlp | None

    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (b, h, w, c) to outputs (b, d) and pooled features, both float32."""
        z, pooled = self.project(x, train)
        return self.predictor(z, train) if self.predictor else z, pooled

    def project(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (b, h, w, c) to projections (b, d) and pooled features, both float32."""
        pooled = self.backbone(x, train)[1]["pooled"].astype(jnp.float32)
        return self.projector(pooled, train), pooled


def build(config: ml_collections.ConfigDict, spec: DataSpec) -> Task:
    """Builds the task. With a teacher, the state's `model_state` has the collection "teacher"."""
    method = build_one(config.method, METHODS, "config.method")
    model = Siamese(
        build_model(config.model, 0, compute_dtype(config.dtype)),
        Mlp(method.projector),
        Mlp(method.predictor) if method.predictor else None,
    )
    view = make_view(config.augment)
    normalize = make_normalize(spec, config.data.normalize, config.data.normalize_by)
    initial = make_initial(config, model, normalize, spec)
    check_sizes(config, model, spec, initial.shapes["params"])
    total_steps = durations.total_steps(config, spec.num_train)

    def loss(params, model_state, batch, key, size):
        view_key, dropout_key = jax.random.split(key)
        views = [view(batch, k) for k in jax.random.split(view_key)]
        # The two views of an image are adjacent: no view moves between devices.
        images = jnp.stack([normalize(resize_images(x, size)) for x in views], axis=1)
        images = images.reshape(-1, *images.shape[2:])  # 2b h w c

        def outputs(variables, apply):
            (z, pooled), updated = model.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
                method=apply,
            )
            return z.reshape(len(views[0]), 2, -1), pooled, updated

        student = {name: x for name, x in model_state.items() if name != "teacher"}
        z, pooled, updated = outputs({"params": params, **student}, Siamese.__call__)
        model_state, target = {**model_state, **updated}, z
        if "teacher" in model_state:
            target, _, updated = outputs(model_state["teacher"], Siamese.project)
            model_state["teacher"] = {**model_state["teacher"], **updated}
        values = method.loss(z, target)
        return of_examples(values), (model_state, step_metrics(values, pooled))

    def move_teacher(state):
        if method.momentum is None:
            return state
        momentum = teacher_momentum(method.momentum, state.step - 1, total_steps)
        teacher = follow(state.model_state["teacher"], state.params, momentum)
        return state.replace(model_state={**state.model_state, "teacher": teacher})

    training = make_training(config, spec, initial.shapes["params"], loss, finish=move_teacher)

    def init(key: jax.Array) -> TrainState:
        variables = initial.draw(key)
        params = variables.pop("params")
        if method.momentum is not None:
            teacher = without_predictor({"params": params, **variables})
            variables["teacher"] = jax.tree.map(jnp.copy, teacher)
        return init_state(params, variables, training.tx)

    def features(state, batch):
        params = evaluated_params(config.optim, state)
        variables = {"params": params, "batch_stats": state.model_state.get("batch_stats", {})}
        image = normalize(to_unit(batch["image"]))
        z, pooled = model.apply(variables, image, train=False, method=Siamese.project)
        return {"pooled": pooled, "projection": z}

    def measure(state, batch):
        return features(state, batch)["pooled"], {}

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
        reads=("method", "progressive_resizing", "data.keep_unlabelled", "data.normalize_by"),
        features=features,
        read=make_read(spec),
        draw=draw_image,
        stages=training.stages,
        baseline=probes.baseline,
        warn=warn_of_collapse,
    )


def teacher_momentum(start: ArrayLike, step: jax.Array, total_steps: int) -> jax.Array:
    """Returns BYOL's momentum at a step, which rises from `start` to 1.

    1 - (1 - start) (cos(pi step / total_steps) + 1) / 2
    """
    share = jnp.float32(step) / total_steps
    return 1 - (1 - start) * (jnp.cos(jnp.pi * share) + 1) / 2


def follow(teacher: dict, params: Any, momentum: jax.Array) -> dict:
    """Moves the teacher's parameters: momentum * teacher + (1 - momentum) * params."""
    averaged = jax.tree.map(
        lambda t, p: p + momentum * (t - p),
        teacher["params"],
        without_predictor({"params": params})["params"],
    )
    return {**teacher, "params": averaged}


def without_predictor(variables: dict[str, dict]) -> dict[str, dict]:
    """Returns all collections without the predictor's variables."""
    return {
        collection: {name: part for name, part in parts.items() if name != "predictor"}
        for collection, parts in variables.items()
    }
