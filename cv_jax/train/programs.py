"""The programs of a training: a task's functions, mapped over the runs."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import ml_collections
from flax.errors import ScopeParamShapeError
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from cv_jax.config.errors import UserError, first_line
from cv_jax.data import DataSpec
from cv_jax.data.batches import Batches
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.optim.state import RUN_AXES
from cv_jax.runtime.mesh import divide, replicated
from cv_jax.runtime.startup import jit_once
from cv_jax.tasks import Task, build_task, step_of_stage
from cv_jax.train.chunks import make_train_chunk
from cv_jax.train.runs import Runs, take_run


class Programs(NamedTuple):
    """Functions of all runs; what is not said otherwise has their axis.

    Attributes:
        init: own -> state; see `runs.Own`.
        train_chunks: for each stage (own, state, feed, num_steps) -> (state, metrics); the state
            is replaced. See `chunks.make_train_chunk`.
        evals: name -> ((own, state, batch) -> {metric: (sum, count)}), the batch without the axis;
            or name -> a Probe or Collected of functions whose first argument is own.
        preview: (own, feed, step) -> some augmented examples of the first run, by field.
    """

    init: Callable
    train_chunks: list[Callable]
    evals: dict[str, Callable | Probe | Collected]
    preview: Callable


def try_step(task: Task, batch: dict, mesh: Mesh) -> ClosedJaxpr:
    """Traces the start and a step of a run: what is wrong with them shows before there is a run.

    The first stage's program takes this trace, so everything is of the mesh here too.

    Args:
        task: what is trained.
        batch: of training, as ShapeDtypeStructs.
        mesh: the devices of the run.

    Returns:
        The step, for its FLOPs.

    Raises:
        UserError: something that the task refuses there.
    """

    def on_mesh(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    key = jax.random.key(0)
    try:
        arguments = jax.tree.map(on_mesh, (jax.eval_shape(task.init, key), batch, key))
        return jax.make_jaxpr(step_of_stage(task, 0))(*arguments)
    except ScopeParamShapeError as error:
        raise UserError(
            f"config.model takes images of one size only ({first_line(error)[:160]}): write "
            "no augmentation that changes the size, or choose another config.model."
        ) from error


def make_programs(
    config: ml_collections.ConfigDict,
    spec: DataSpec,
    task: Task,
    batches: Batches,
    runs: Runs,
) -> Programs:
    """Maps the functions of `task`, or where values are swept, of the task that they make."""

    def task_of(values):
        return build_task(runs.sweep.apply(config, values), spec) if values else task

    def init(own):
        return task_of(own.values).init(own.keys.init)

    def train_chunk(stage):
        def program(own, state, feed, num_steps):
            train_step = step_of_stage(task_of(own.values), stage)
            return make_train_chunk(train_step, batches)(state, feed, own.keys.step, num_steps)

        return runs(program, (0, RUN_AXES, batches.axes, None), (RUN_AXES, 0), 1)

    def of_batch(part):
        """Maps (state, batch) -> ..., the part of an evaluation that `part` takes from its task."""

        def program(own, state, batch):
            return part(task_of(own.values))(state, divide(batch, runs.mesh))

        return runs(program, (0, RUN_AXES, None), 0)

    def evaluation(name):
        same = next(other for other in task.evals if task.evals[other] is task.evals[name])
        if same != name:  # one program serves both
            return evals[same]
        whole = task.evals[name]
        if isinstance(whole, Collected):
            return whole._replace(predict=of_batch(lambda task: task.evals[name].predict))
        if not isinstance(whole, Probe):
            return of_batch(lambda task: task.evals[name])

        def fit(own, features, label):
            return task_of(own.values).evals[name].fit(features, label)

        def score(own, state, fitted, batch):
            batch = divide(batch, runs.mesh)
            return task_of(own.values).evals[name].score(state, fitted, batch)

        return Probe(
            of_batch(lambda task: task.evals[name].embed),
            runs(fit, (0, 0, None), 0),
            runs(score, (0, RUN_AXES, 0, None), 0),
            whole.limit,
        )

    evals = {}
    for name in task.evals:
        evals[name] = evaluation(name)

    @partial(jit_once, out_shardings=replicated(runs.mesh))
    def preview(own, feed, step):
        own, feed = take_run((own, feed), (0, batches.axes), 0)
        batch = task.preview(batches.pick(feed, step), own.keys.step)
        return {name: x[:64] for name, x in batch.items() if name != "rows"}

    return Programs(
        init=runs(init, (0,), RUN_AXES),
        train_chunks=[train_chunk(stage) for stage in range(len(task.stages))],
        evals=evals,
        preview=preview,
    )
