"""Floating-point operations of a function, counted from its jaxpr."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from cv_jax.data import DataSpec
from cv_jax.data.dataset import example_shapes
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.models.ops import plain_lax
from cv_jax.tasks import Task


def count_flops(function: Callable, *args: Any) -> int:
    """FLOPs of the matrix products and convolutions of `function(*args)`: 2 per multiply-add.

    As the field counts: elementwise work is left out, taps that fall on padding are counted. The
    zeros that the gradient of a strided convolution puts between values are not, so that such a
    gradient costs what its forward pass does. Of what has a lowering for each platform, the default
    one counts, on every platform. Other branches cost as much as the dearest one; a scan its body
    times its length; a while loop, whose length nobody knows, its body once; a shard_map one
    device's share. Work that rematerialisation repeats counts again.

    Args:
        function: anything that jax.make_jaxpr traces; nothing is computed.
        args: arrays or jax.ShapeDtypeStructs, or pytrees of them.
    """
    return traced_flops(jax.make_jaxpr(function)(*args))


def traced_flops(trace: ClosedJaxpr) -> int:
    """`count_flops` of what has been traced."""
    used, _ = partial_eval.dce_jaxpr(trace.jaxpr, [True] * len(trace.jaxpr.outvars))
    return _jaxpr_flops(used)


def step_flops(task: Task, batch: dict, stage: int) -> int:
    """`count_flops` of a training step in a stage of the task; the batch may be of shapes."""
    key = jax.random.key(0)
    chosen = {"stage": stage} if len(task.stages) > 1 else {}
    train_step = partial(task.train_step, **chosen)
    with plain_lax():  # is traced in a third of the time
        return count_flops(train_step, jax.eval_shape(task.init, key), batch, key)


def training_flops(stages: Sequence[int], flops_of: Callable[[int], int], steps: int) -> int:
    """FLOPs of a training of so many steps: those of each stage's step, times its length.

    Args:
        stages: first steps, see `tasks.Task`.
        flops_of: number of a stage -> FLOPs of its step.
        steps: of the whole training.
    """
    starts = [start for start in stages if start < steps]
    ends = [*starts[1:], steps]
    return sum(
        (end - start) * flops_of(stage)
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def evaluation_flops(task: Task, spec: DataSpec, count: int) -> int:
    """FLOPs of the final evaluation of `count` examples, with what a probe takes to learn."""
    with plain_lax():
        return _evaluation_flops(task, spec, count)


def _evaluation_flops(task, spec, count):
    weight = jax.ShapeDtypeStruct((1,), jnp.float32)
    batch = {**example_shapes(spec.fields, 1), "rows": {"weight": weight}}
    state = jax.eval_shape(task.init, jax.random.key(0))
    final = task.evals["final"]
    if isinstance(final, Collected):
        return count * count_flops(final.predict, state, batch)
    if not isinstance(final, Probe):
        return count * count_flops(final, state, batch)
    features, label = learned_from(final, spec, state, batch)
    fitted = jax.eval_shape(final.fit, features, label)
    return (
        len(label) * count_flops(final.embed, state, batch)
        + count_flops(final.fit, features, label)
        + count * count_flops(final.score, state, fitted, batch)
    )


def learned_from(
    probe: Probe, spec: DataSpec, state: Any, batch: dict
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The shapes that `probe.fit` is given: features (m, d) and labels (m,) of training images."""
    m = min(spec.num_labelled, probe.limit or spec.num_labelled)
    feature = jax.eval_shape(probe.embed, state, batch)
    return (
        jax.ShapeDtypeStruct((m, *feature.shape[1:]), feature.dtype),
        jax.ShapeDtypeStruct((m,), jnp.int32),
    )


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn) -> int:
    match equation.primitive.name:
        case "dot_general":
            return _dot_flops(equation)
        case "conv_general_dilated":
            return _conv_flops(equation)
    inner = [_jaxpr_flops(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
    match equation.primitive.name:
        case "cond":
            platforms = equation.params.get("branches_platforms") or ()
            return inner[platforms.index(None)] if None in platforms else max(inner)
        case "scan":
            return sum(inner) * equation.params["length"]
    return sum(inner)


def _dot_flops(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval
    return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[i] for i in contracted)


def _conv_flops(equation: JaxprEqn) -> int:
    lhs, rhs = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    numbers = equation.params["dimension_numbers"]
    channels_in, *taps = (rhs[i] for i in numbers.rhs_spec[1:])  # channels of one feature group
    batch, channels_out, *positions = (out[i] for i in numbers.out_spec)
    # Along a spread-out axis each value meets every tap, and the zeros between values none.
    for i, dilation in enumerate(equation.params["lhs_dilation"]):
        if dilation > 1:
            positions[i] = lhs[numbers.lhs_spec[2 + i]]
    return 2 * batch * channels_out * channels_in * math.prod(taps) * math.prod(positions)
