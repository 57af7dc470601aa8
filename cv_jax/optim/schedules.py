"""Learning-rate schedules: the fraction of the peak rate at each point of the training.

A schedule maps x, the finished part of the training (0 <= x <= 1), to a multiplier of the peak
rate. Step t of T (t = 0 .. T-1) uses x = t / T: the first step has x = 0, the last step
x = (T-1) / T. The schedule would reach its value at x = 1 one step later.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cv_jax.config.calls import build_one, require

Schedule = Callable[[jax.Array], jax.Array]


def constant() -> Schedule:
    """Returns f(x) = 1."""
    return jnp.ones_like


def step_down(at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """Returns f(x) = factor^k, where k counts the points of `at` that x has reached."""
    _check_fractions(*at, factor)

    def schedule(x):
        multiplier = jnp.ones_like(x)
        for point in at:
            # Without the tolerance, a rounded t / T reaches its point one step late (T = 50).
            multiplier *= jnp.where(x >= point - 1e-6, factor, 1.0)
        return multiplier

    return schedule


def cosine(final: float = 0.0) -> Schedule:
    """Returns f(x) = final + (1 - final) (1 + cos(pi x)) / 2.

    Loshchilov & Hutter 2017, without restarts.
    """
    _check_fractions(final)
    return lambda x: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * x))


def linear(final: float = 0.0, until: float = 1.0) -> Schedule:
    """Returns f(x) = 1 + (final - 1) min(x / until, 1): `final` from x = until on."""
    _check_fractions(final, until)
    require(lambda: until > 0, "until must be above 0")
    return lambda x: 1 + (final - 1) * jnp.minimum(x / until, 1.0)


def triangular(start: float = 0.2, peak: float = 0.23, end: float = 0.0) -> Schedule:
    """Returns straight lines from `start` at x = 0 up to 1 at x = peak, down to `end` at x = 1."""
    _check_fractions(start, peak, end)
    corners, values = jnp.array([0.0, peak, 1.0]), jnp.array([start, 1.0, end])
    return lambda x: jnp.interp(x, corners, values)


def _check_fractions(*values: float) -> None:
    for value in values:
        require(lambda value=value: 0 <= value <= 1, f"{value} is not between 0 and 1")


SCHEDULES = {
    "constant": constant,
    "step": step_down,
    "cosine": cosine,
    "linear": linear,
    "triangular": triangular,
}


def make_schedule(
    spec: str, peak: ArrayLike, total_steps: int, warmup: int, key: str = "schedule"
) -> Callable[[ArrayLike], jax.Array]:
    """Builds the function from a step to its learning rate: warm-up, then the schedule of `spec`.

    With W warm-up steps and T steps in all, step t uses

        rate(t) = peak * f(0) * t / W              for t < W
        rate(t) = peak * f((t - W) / (T - W))      after that: the peak is at t = W

    With W = 0 and "linear", the rate of step t is peak * (1 - t / T). A warm-up as long as the
    training leaves no step for the schedule.

    Args:
        spec: one of SCHEDULES with its arguments, such as "cosine(final=0.1)".
        peak: the highest rate; may be traced.
        total_steps: T, at least 1.
        warmup: W in steps.
        key: config key of `spec`, for messages.

    Returns:
        rate(step) -> float32; `step` is an integer or an array of integers, traced or not.

    Raises:
        UserError: an unknown schedule or bad arguments.
    """
    schedule = build_one(spec, SCHEDULES, key)

    def rate(step: ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        done = jnp.clip((t - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        ramp = jnp.where(t < warmup, t / max(1, warmup), 1.0)
        return jnp.asarray(peak, jnp.float32) * ramp * schedule(done)

    return rate
