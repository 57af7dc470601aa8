"""A trace of some training steps, and how near they come to what the device can do."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from etils.epath import Path

from cv_jax.config.errors import UserError
from cv_jax.config.plan import Chunk
from cv_jax.models import compute_dtype
from cv_jax.runtime.clock import Clock
from cv_jax.runtime.mesh import batch_sharding, make_mesh, replicated
from cv_jax.train.trainer import Trainer
from cv_jax.workdir.log import Log

# Rows of the square matrices that `peak_flops` multiplies, until a call takes LONG_ENOUGH seconds.
SIZES = (512, 1024, 2048, 4096, 8192)
LONG_ENOUGH = 0.2
PRODUCTS = 4  # in one call, so that the dispatch weighs little


class Profiler:
    """Traces steps of a run and prints its roofline line; with 0 steps it does nothing.

    The first step warms up. As many steps as are traced, or as the run has left before them, are
    then timed without a trace, by the clock's "train"; the trace follows. It shows the loop as it
    is, with an evaluation or a checkpoint that is due between the traced steps.

    Args:
        steps: how many to trace.
        remaining: steps that the run has left.
        workdir: the trace goes to `<workdir>/profile`.
        trainer: knows the dtype of the computation and the FLOPs of a step.
        log, clock: of the run; what the profiler itself takes counts as "compile".

    Raises:
        UserError: the run has not so many steps left.
    """

    def __init__(
        self,
        steps: int,
        remaining: int,
        workdir: Path,
        trainer: Trainer,
        log: Log,
        clock: Clock,
    ):
        most = max(0, remaining - 2)
        if not 0 <= steps <= most:
            raise UserError(
                f"--profile_steps={steps} must be between 0 and {most}: this run has {remaining} "
                "steps left, of which the first warms up and at least one is timed."
            )
        self._steps = steps
        self._num_timed = min(steps, remaining - 1 - steps)
        # Steps made at the end of the warm-up, of the timing and of the trace.
        self._marks = (1, 1 + self._num_timed, 1 + self._num_timed + steps) if steps else ()
        self._train_seconds: list[float] = []  # at each mark
        self._done = 0
        self._tracing = False
        self._directory = workdir / "profile"
        self._trainer, self._log, self._clock = trainer, log, clock

    def pace(self) -> int:
        """The log's pace, but no dispatch goes past a mark."""
        ahead = [mark - self._done for mark in self._marks if mark > self._done]
        return min([self._log.pace(), *ahead])

    @contextlib.contextmanager
    def __call__(self, chunk: Chunk) -> Iterator[None]:
        """Watches the chunk that the body dispatches and logs."""
        if self._marks[1:2] == (self._done,):
            self._start()
        yield
        self._done += chunk.num_steps
        if self._done in self._marks:
            self._log.settle()
            self._train_seconds.append(self._clock.now("train"))
            if self._done == self._marks[-1]:
                self._finish()

    def _start(self) -> None:
        with self._clock("compile"):
            jax.profiler.start_trace(self._directory)
        self._tracing = True

    def _finish(self) -> None:
        start, end, _ = self._train_seconds
        with self._clock("compile"):
            self._stop()
            seconds = (end - start) / self._num_timed
            line = roofline(self._trainer.step_flops(), seconds, compute_dtype(self._trainer.dtype))
        self._log.line(f"profile {self._steps} steps, {line}")
        self._log.line(f"trace   {self._directory}; to open it: xprof --logdir={self._directory}")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes the trace of a run that is stopped in the middle of it."""
        if self._tracing:
            self._stop()
            self._log.line(f"trace   {self._directory}; cut short, as the run was stopped")


def roofline(flops: int, seconds: float, dtype: jnp.dtype) -> str:
    """Says how far a step of so many FLOPs and seconds is from the devices' matrix products."""
    peak = peak_flops(dtype)
    return (
        f"{flops:.2e} FLOP a step in {seconds:.3g} s = {format_rate(flops / seconds)}, "
        f"{flops / seconds / peak:.0%} of the {format_rate(peak)} that a matrix product reaches "
        f"here ({dtype.name})"
    )


def peak_flops(dtype: jnp.dtype) -> float:
    """Measures the FLOP/s of matrix products on all devices: the best size, the best of 3 calls.

    The matrices are square on each device, of random values; the sizes are SIZES.
    """
    mesh = make_mesh()
    best = 0.0

    @jax.jit
    def multiply(x, y):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ y, x)

    for n in SIZES:
        key = jax.random.key(n)
        x = jax.random.normal(key, (n * mesh.size, n), dtype)
        y = jax.random.normal(key, (n, n), dtype) / n**0.5  # the product is as large as x
        x, y = jax.device_put((x, y), (batch_sharding(mesh), replicated(mesh)))
        multiply(x, y).block_until_ready()
        seconds = min(_seconds(multiply, x, y) for _ in range(3))
        best = max(best, PRODUCTS * 2 * n**3 * mesh.size / seconds)
        if seconds > LONG_ENOUGH:
            break
    return best


def _seconds(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    start = time.perf_counter()
    function(*args).block_until_ready()
    return time.perf_counter() - start


def format_rate(flops: float) -> str:
    """FLOP/s for a person, in G or T: "122 GFLOP/s"."""
    # From 999.5 on, three digits of a number of G would be rounded to 1000.
    value, unit = (flops / 1e9, "G") if flops < 999.5e9 else (flops / 1e12, "T")
    return f"{value:.3g} {unit}FLOP/s"
