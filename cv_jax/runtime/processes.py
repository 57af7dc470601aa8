"""Several processes as one program: how they meet, and what they have to agree on.

Every process runs the same train.py and hands its devices' part of the data over; what is computed
is one program over all devices. Of what is done on the host, the first process alone writes; what
decides on the next step is agreed on. A single process pays nothing for any of it.
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

# After how long without a sign of life a process counts as dead, and how long one that has ended
# waits for the others to end: together less than a minute until all know.
HEARTBEAT_SECONDS = 20
SHUTDOWN_SECONDS = 20
# The exit code of a process that has lost another one.
LOST = 3


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, if it is: before anything is computed.

    Args:
        coordinator, num_processes, process_id: "HOST:PORT" of the first process, how many there
            are, and which this is, from 0 on; or None of all, and what Cloud TPU, GKE, Slurm or
            Open MPI says counts. Where they say nothing, the process stays alone.

    Raises:
        UserError: only some of the three are given, they make no sense here, or JAX cannot use
            the platform that it is asked for. Where not all
            processes have come after five minutes, the runtime aborts this one, and says why.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) in (1, 2):
        raise UserError(
            f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id "
            "come together, or none of them."
        )
    if not missing and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator!r} must be HOST:PORT of the first process.")
    if not missing and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be between 0 and {num_processes - 1}, one less than "
            "--num_processes."
        )
    # A signal is the business of StopRequest, on which the processes agree.
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
            f"The processes cannot meet at --coordinator={coordinator} ({first_line(error)}); "
            "is its port free on the first process's host?"
        ) from error
    check_platform()
    if jax.process_count() > 1:
        # Where another one hangs, the runtime aborts this one and says why; a stack says nothing.
        faulthandler.disable()


def all_do(function: Callable[[], Any]) -> Any:
    """Calls `function` in every process, and returns what it returns here.

    Raises:
        UserError: it raised one in some process; that of the first such process, in all of them.
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


def first_does(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process while the others wait; they return None.

    Raises:
        UserError: it raised one; in all processes.
    """
    return all_do(function if jax.process_index() == 0 else lambda: None)


def first_says(text: str) -> str:
    """The text of the first process, in all of them."""
    return _texts(text)[0]


def check_same(facts: Callable[[], dict[str, Any]]) -> None:
    """Raises UserError, in all processes, where one has not the facts of the first.

    They have names and can be written as JSON; a process alone does not ask for them.
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
                    f"{there!r}, not {here!r}. Start all with the same code, config and data."
                )


def _texts(text: str) -> list[str]:
    """The texts that all processes have."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, sizes.max() + 1 - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class Largest:
    """The largest of a number that every process has, one call late.

    The first call waits for the others; each later one returns what the one before it has asked
    for, which was computed between the training's chunks meanwhile, and so never waits.
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
    """The program of `_largest`, and the layout of what it takes; made once for all chunks."""
    # Over all devices, as the training's programs are: on the CPU, programs of other devices would
    # run at the same time, and their messages be taken for each other's.
    mesh = Mesh(np.array(jax.devices()), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("device")), jax.jit(jnp.max, out_shardings=everywhere)


def leave(code: int) -> NoReturn:
    """Ends this process; one of several without the others, which may not be about to end."""
    try:
        alone = jax.process_count() == 1
    except (RuntimeError, AssertionError):  # it needs devices: there are none of JAX_PLATFORMS
        alone = True
    if alone:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)  # where all leave: the runtime aborts the others when this one is gone
    os._exit(code)


@contextlib.contextmanager
def lost_process_ends_this() -> Iterator[None]:
    """Ends this process with a sentence, and at once, where the body failed for want of another.

    There is nothing to wait for then: what is being saved cannot be completed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _is_of_connection(error):
            raise
        print(
            f"train.py: process {jax.process_index()} of {jax.process_count()} has lost another "
            f"one ({first_line(error)}). The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)


def _is_of_connection(error: Exception) -> bool:
    words = ("gloo", "connection", "unavailable", "deadline", "heartbeat", "socket", "peer")
    return any(word in str(error).lower() for word in words)
