"""Several processes as one program: how they connect, and how they agree.

Every process runs the same train.py and passes its devices' part of the data; they compute one
program over all devices. Only process 0 writes files. Decisions that affect the next step (stop,
chunk length) are agreed across processes. With one process these functions cost nothing.
"""

import contextlib
import faulthandler
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cv_jax.config.errors import UserError, first_line
from cv_jax.runtime.startup import check_platform

# Seconds without a heartbeat after which a process counts as dead, and seconds that a finished
# process waits for the others. Together, every process knows within a minute.
HEARTBEAT_SECONDS = 20
SHUTDOWN_SECONDS = 20
# Exit code of a process that has lost another process.
LOST = 3


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the other processes of its program. Call before any computation.

    With None for all three arguments, Cloud TPU, GKE, Slurm or Open MPI provide them; elsewhere
    the process stays alone. If some process is missing after five minutes, the runtime aborts
    this one and prints the reason.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0 on.

    Raises:
        UserError: only some arguments are given, one is invalid, the processes cannot connect, or
            JAX cannot use the requested platform.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) in (1, 2):
        raise UserError(
            f"{' and '.join(missing)} missing: give all of --coordinator, --num_processes and "
            "--process_id, or none."
        )
    if not missing and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator!r} must be HOST:PORT of process 0.")
    if not missing and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be between 0 and {num_processes - 1}, "
            "--num_processes - 1."
        )
    # StopRequest handles signals, so that the processes agree on the step at which they stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError:
        if not missing:
            raise
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"The processes cannot connect at --coordinator={coordinator} ({first_line(error)}). "
            "Choose a free port on the host of process 0."
        ) from error
    check_platform()
    if jax.process_count() > 1:
        # When another process hangs, the runtime aborts this one and prints the reason itself.
        faulthandler.disable()


def on_all_processes(function: Callable[[], Any]) -> Any:
    """Calls `function` in every process; returns this process's result.

    Raises:
        UserError: `function` raised UserError in some process. All processes then raise the error
            of the lowest such process.
    """
    result, message = None, ""
    try:
        result = function()
    except UserError as error:
        message = str(error)
    for i, said in enumerate(_texts(message)):
        if said:
            raise UserError(f"In process {i}: {said}" if i else said)
    return result


def on_process_0(function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0 while the others wait; the others return None.

    Raises:
        UserError: `function` raised UserError on process 0. All processes then raise it.
    """
    return on_all_processes(function if jax.process_index() == 0 else lambda: None)


def broadcast(text: str) -> str:
    """Returns the text of process 0, on all processes."""
    return _texts(text)[0]


def assert_equal_on_processes(facts: Callable[[], dict[str, Any]]) -> None:
    """Raises UserError on all processes where some process's facts differ from process 0's.

    Args:
        facts: () -> {name: JSON value}; not called where there is only one process.
    """
    if jax.process_count() == 1:
        return
    first, *others = map(json.loads, _texts(json.dumps(facts(), default=repr)))
    for i, other in enumerate(others, start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            there, here = other.get(name), first.get(name)
            if there != here:
                raise UserError(
                    f"Process {i} of {jax.process_count()} has another {name} than process 0: "
                    f"{there!r}, not {here!r}. Start all processes with the same code, config and "
                    "data."
                )


def _texts(text: str) -> list[str]:
    """Gathers the text of every process, in order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, sizes.max() + 1 - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class Largest:
    """Computes the largest of a number over all processes, one call late.

    The first call waits for the other processes. A later call returns the maximum of the previous
    call's numbers, which the devices have computed between two chunks: so it never waits.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None

    def __call__(self, value: float) -> float:
        if jax.process_count() == 1:
            return value
        asked = self._asked if self._asked is not None else _largest(value)
        self._asked = _largest(value)
        return float(asked)


def _largest(value: float) -> jax.Array:
    sharding, maximum = _maximum()
    values = np.full(jax.local_device_count(), value, np.float32)
    return maximum(jax.make_array_from_process_local_data(sharding, values))


@functools.cache
def _maximum() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Returns the layout of `_largest`'s argument, and its program, built once for all chunks."""
    # Over all devices, as the training's programs: on the CPU, programs over fewer devices would
    # run at the same time and receive each other's messages.
    mesh = Mesh(np.array(jax.devices()), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("device")), jax.jit(jnp.max, out_shardings=everywhere)


def leave(code: int, at_once: bool = False) -> NoReturn:
    """Ends this process with an exit code, without waiting for other processes.

    Args:
        code: the exit code.
        at_once: whether to end without Python's own end, which waits for XLA.
    """
    try:
        alone = jax.process_count() == 1
    except (RuntimeError, AssertionError):  # JAX_PLATFORMS has no devices
        alone = True
    if alone and not at_once:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if not alone and jax.process_index() == 0:
        time.sleep(1)  # when all leave: the runtime aborts the others once process 0 is gone
    os._exit(code)


@contextlib.contextmanager
def lost_process_ends_this() -> Iterator[None]:
    """Ends this process at once, with a message, where the body fails because another is lost.

    Waiting is useless then: no checkpoint that is being saved can be completed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _is_of_connection(error):
            raise
        print(
            f"train.py: process {jax.process_index()} of {jax.process_count()} has lost another "
            f"process ({first_line(error)}). Repeat the command to resume from the last "
            "checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)


def _is_of_connection(error: Exception) -> bool:
    words = ("gloo", "connection", "unavailable", "deadline", "heartbeat", "socket", "peer")
    return any(word in str(error).lower() for word in words)
