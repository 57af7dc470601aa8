"""Compiles a config's steps for TPUs without having one, and estimates their cost.

    pip install -r requirements-tpu.txt
    python -m cv_jax.tools.aot --config=configs/cifar10.py --topology=v5e
    python -m cv_jax.tools.aot --config=configs/cifar10.py --topology=v5e:2x4 --scaling
    python -m cv_jax.tools.aot --config=configs/cifar10.py --topology=v6e --config.batch_size=4096
    python -m cv_jax.tools.aot --config=configs/cifar10_resnet18.py --topology=v5e:8x8 \\
        --images=1281167x224x224x3 --num_classes=1000 --config.data.stream=True \\
        --config.model="resnet50(stem='imagenet')" --config.augment=flip --config.batch_size=8192

XLA:TPU compiles the training step and the evaluation of one batch; nothing is executed. A topology
is a chip (v4, v5e, v5p, v6e) and the numbers of chips side by side; the default is one chip. The
config's dtype "auto" means bfloat16, as on a TPU. --images replaces the config's data set by one of
this many images of this size, which need not exist.

Facts of the compiled program, for each chip: bytes, memory, and FLOPs as the compiler counts them.
Every number called "estimated" follows from a model, not from a measurement:

    compute      the sum of the compiler's "estimated_cycles" over its schedule / clock
    unestimated  bytes that instructions without such an estimate read and write / HBM bandwidth
    collectives  bytes * 2 (n - 1) / n / ICI bandwidth for all-reduce, bytes * (n - 1) / n / ICI
                 bandwidth for others: one ring, without latency, without overlap
    step         the sum of the three; copies that run beside other work are not counted
    utilisation  matrix products and convolutions (cv_jax/train/flops.py) / step / peak

Compute and unestimated are too low where the compiler's guess is too low; the error is unknown
without a TPU. --scaling also compiles one chip's share of the batch for one chip. The efficiency of
n chips is the estimated step time of one chip divided by that of n chips.

Exit codes: 0 done; 1 a program does not fit into the chip's memory; 2 user error (see the message).
"""

import argparse
import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding
from ml_collections import config_flags

from cv_jax.config.command_line import check_command_line
from cv_jax.config.errors import UserError, nearest
from cv_jax.config.paths import path_argument
from cv_jax.config.rules import check
from cv_jax.data import Dataset, DataSpec, boxes_fields, image_field, label_field, load_dataset
from cv_jax.data.batches import padded_batches, steps_of_feed, stream_batches
from cv_jax.data.dataset import counts
from cv_jax.data.fields import take
from cv_jax.learn.evaluations import Collected, Probe
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    replicated,
)
from cv_jax.tasks import build_task, step_of_stage
from cv_jax.tools import hlo
from cv_jax.tools.command import command, make_parser
from cv_jax.train.flops import count_flops, learned_from, step_flops
from cv_jax.workdir.files import write_json


class Chip(NamedTuple):
    """The performance of a chip, all its cores together.

    Attributes:
        flops: peak of bfloat16 matrix products, FLOP/s.
        hbm: size of the memory, bytes.
        bandwidth: bandwidth of the memory, bytes/s.
        ici: bandwidth between neighbours, both directions together, bytes/s.
        clock: cycles/s.
        config_name: the compiler's name for "one device is one whole chip".
    """

    flops: float
    hbm: int
    bandwidth: float
    ici: float
    clock: float
    config_name: str = "default"


# Peak, memory and its bandwidth: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. ICI: "How to Think
# About TPUs", jax-ml.github.io/scaling-book/tpus, which also gives 1.5 GHz for v5e. A clock is the
# peak over the FLOPs that the compiler expects in a cycle: 2 * 128 * 128 for each MXU, of which v5e
# has 4, v4 and v5p 8, v6e the equivalent of 16. A perfect product then has utilisation 1; a
# 16384 x 4096 x 4096 product is estimated at 90 to 98 %.
CHIPS = {
    "v4": Chip(275e12, 32 << 30, 1.2e12, 9e10, 1.05e9, "megacore"),
    "v5e": Chip(197e12, 16 << 30, 8.19e11, 9e10, 1.5e9),
    "v5p": Chip(459e12, 95 << 30, 2.765e12, 1.8e11, 1.75e9, "megacore"),
    "v6e": Chip(918e12, 32 << 30, 1.64e12, 1.8e11, 1.75e9),
}


@command("aot")
def main() -> None:
    """Reads the command line, compiles, and prints and writes the report."""
    parser = make_parser(__doc__, allow_abbrev=False)
    parser.add_argument("--topology", required=True, help="v5e, v5e:2x4, v5p:2x2x1, ...")
    parser.add_argument("--scaling", action="store_true", help="compare with one chip")
    add_data_arguments(parser)
    parser.add_argument("--out", type=path_argument, help="a JSON file to write")
    arguments, rest = parser.parse_known_args()
    prepare_compiler()
    config = read_config([sys.argv[0], *rest])
    data = find_data(config, arguments)
    report = examine(config, data, arguments.topology, arguments.scaling)
    if arguments.out:
        write_json(arguments.out, report)
    print(describe(report))


class DoesNotFit(UserError):
    """A program needs more memory than the chip has."""

    exit_code = 1


def prepare_compiler() -> None:
    """Restricts JAX to the CPU and keeps libtpu from looking for a TPU.

    Raises:
        UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install -r requirements-tpu.txt")
    jax.config.update("jax_platforms", "cpu")
    # A program for a chip that is not there can be kept, and not be read again.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",  # else libtpu warns
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no device to share
    }


def read_config(argv: list[str]) -> ml_collections.ConfigDict:
    """Reads --config=FILE and --config.KEY=VALUE as train.py does; dtype "auto" becomes bfloat16.

    Raises:
        UserError: the flags or the config are invalid.
    """
    check_command_line(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    try:
        values(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    config = values["config"].value
    check(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16"  # "auto" would mean the machine that compiles
    return config


def find_devices(topology: str) -> tuple[str, list[jax.Device]]:
    """Returns the chip's name and one device for each chip of a topology such as "v5e:2x4".

    Raises:
        UserError: the chip or the topology does not exist.
    """
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS:
        raise UserError(
            f"--topology={topology}: there is no chip {chip!r}.{nearest(chip, CHIPS)} "
            f"There are: {', '.join(CHIPS)}."
        )
    sides = [int(side) if side.isdigit() else 0 for side in (shape or "1x1").split("x")]
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise UserError(f"--topology={topology}: write the sides as numbers, such as {chip}:2x4.")
    # A host has 2x2 chips where that divides the topology; else the compiler takes any number.
    host = [2 if side % 2 == 0 else 1 for side in sides[:2]] + [1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{shape or '1x1'}",
            chips_per_host_bounds=host,
            chip_config_name=CHIPS[chip].config_name,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
    return chip, list(found.devices)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `find_data` reads."""
    parser.add_argument("--images", help="shape of the data set, such as 1281167x224x224x3")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of --images")
    parser.add_argument(
        "--objects", type=int, default=0, help="boxes of each of --images, instead of its class"
    )


def find_data(config: ml_collections.ConfigDict, arguments: argparse.Namespace) -> Dataset:
    """Returns the data set that --images describes, or else the config's."""
    if arguments.images:
        return blank_dataset(arguments.images, arguments.num_classes, arguments.objects)
    return load_dataset(config.data)


def blank_dataset(images: str, num_classes: int, objects: int = 0) -> Dataset:
    """Builds a data set of shapes alone: "1281167x224x224x3" black images that take no memory.

    Each has a label, or else room for so many `objects`.

    Raises:
        UserError: `images` is not a number of images, their height, width and channels.
    """
    shape = tuple(int(side) if side.isdigit() else 0 for side in images.split("x"))
    if len(shape) != 4 or min(shape) < 1 or num_classes < 1:
        raise UserError(
            f"--images={images} --num_classes={num_classes}: write the number of images, their "
            "height, width and channels, such as 1281167x224x224x3, and at least one class."
        )
    statistics = {"mean": np.zeros(shape[3], np.float32), "std": np.ones(shape[3], np.float32)}
    names = tuple(map(str, range(num_classes)))
    fields = {
        "image": image_field(shape[1:])._replace(**statistics),
        **(boxes_fields(names, objects) if objects else {"label": label_field(names)}),
    }
    split = {
        name: np.broadcast_to(np.zeros((), field.dtype), (shape[0], *field.shape))
        for name, field in fields.items()
    }
    nothing, first = take(split, slice(0)), take(split, slice(1))
    spec = DataSpec(images, fields, **counts(split, nothing, split), sample=first)
    return Dataset(spec, split, nothing, split)


def examine(
    config: ml_collections.ConfigDict, data: Dataset, topology: str, scaling: bool
) -> dict[str, Any]:
    """Compiles the steps of a config for a topology; returns the content of the JSON file.

    Raises:
        UserError: the config or the topology is invalid.
        DoesNotFit: a program with its data is too large for the chip.
    """
    chip, devices = find_devices(topology)
    check_batch_size(config.batch_size, make_mesh(devices=devices), config.accumulate)
    report = {
        "config": config.to_dict(),
        "topology": topology,
        "chip": chip,
        "num_chips": len(devices),
        **compile_steps(config, data, chip, devices),
    }
    if scaling:
        share = copy.deepcopy(config)
        share.batch_size //= len(devices)
        share.eval_batch_size = -(-share.eval_batch_size // len(devices))
        alone = compile_steps(share, data, chip, devices[:1])
        report["one_chip"] = alone
        report["estimated_scaling_efficiency"] = {
            name: alone[name]["estimated"]["step_seconds"]
            / report[name]["estimated"]["step_seconds"]
            for name in ("train", "eval")
        }
    return report


def compile_steps(
    config: ml_collections.ConfigDict, data: Dataset, chip: str, devices: list[jax.Device]
) -> dict[str, Any]:
    """Compiles the training step and the evaluation of one batch; {"train": ..., "eval": ...}."""
    return {
        "train": training_cost(config, data, chip, devices),
        "eval": evaluation_cost(config, data, chip, devices),
    }


def training_cost(
    config: ml_collections.ConfigDict, data: Dataset, chip: str, devices: list[jax.Device]
) -> dict[str, Any]:
    """Computes the `cost` of a training step.

    The step is the training loop's, in its costliest stage. The loop gathers each batch from
    resident or streamed examples, which count in the memory.
    """
    mesh = make_mesh(devices=devices)
    everywhere = replicated(mesh)
    task = build_task(config, data.spec)
    keys = derive_keys(config.seed)
    # A stream reads nothing before its first feed. Resident batches have the same shapes.
    stream = stream_batches(data.train, config.batch_size, keys.order, make_mesh())
    resident = sum(array.nbytes for array in data.train.values())
    if config.data.stream:
        fed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stream.shapes))
        resident = 2 * steps_of_feed(stream.shapes) * fed // mesh.size  # one is read ahead
    stages = range(len(task.stages))
    dearest = max(stages, key=lambda stage: step_flops(task, stream.shapes, stage))
    train_step = step_of_stage(task, dearest)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=everywhere)
    state, key = _placed((jax.eval_shape(task.init, keys.init), keys.step), everywhere)
    batch = _placed(stream.shapes, batch_sharding(mesh))
    return cost(step, (state, batch, key), resident, chip, mesh.size)


def evaluation_cost(
    config: ml_collections.ConfigDict, data: Dataset, chip: str, devices: list[jax.Device]
) -> dict[str, Any]:
    """Computes the `cost` of the final evaluation of one batch, with a probe already fitted."""
    mesh = make_mesh(devices=devices)
    task = build_task(config, data.spec)
    state = _placed(jax.eval_shape(task.init, jax.random.key(0)), replicated(mesh))
    size = min(config.eval_batch_size, data.spec.num_test)
    size = -(-size // mesh.size) * mesh.size
    (one,) = padded_batches(take(data.test, slice(1)), data.spec.fields, size)
    batch = _placed(one, batch_sharding(mesh))
    final = task.evals["final"]
    if isinstance(final, Collected):
        final = final.predict
    if not isinstance(final, Probe):
        return cost(jax.jit(final), (state, batch), 0, chip, mesh.size)
    fitted = jax.eval_shape(final.fit, *learned_from(final, data.spec, state, batch))
    fitted = _placed(fitted, replicated(mesh))
    return cost(jax.jit(final.score), (state, fitted, batch), 0, chip, mesh.size)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """Returns the shapes of a tree's arrays with this layout."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def cost(program: Callable, args: tuple, resident: int, chip: str, n: int) -> dict[str, Any]:
    """Compiles a jitted program; returns the cost of one execution for each of `n` chips.

    Args:
        program: the jitted function.
        args: its arguments, as ShapeDtypeStructs with shardings.
        resident: bytes in a chip's memory beside the program's own.
        chip: a name of CHIPS.
        n: number of chips.

    Raises:
        DoesNotFit: the chip's memory is too small.
    """
    try:
        compiled = program.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(f"{chip}: {str(error).splitlines()[0]}") from error
        raise
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.generated_code_size_in_bytes - memory.alias_size_in_bytes + resident
    if peak > CHIPS[chip].hbm:
        sizes = [f"{size / 1e6:,.2f} MB" for size in (peak, CHIPS[chip].hbm)]
        raise DoesNotFit(
            f"{chip}: the program needs {sizes[0]} of memory, and the chip has {sizes[1]}. Lower "
            "config.batch_size or use more chips."
        )
    flops, counted = count_flops(program, *args) / n, compiled.cost_analysis()
    return {
        "flops": flops,
        "compiler_flops": counted["flops"],
        "bytes_accessed": counted["bytes accessed"],
        "peak_memory_bytes": peak,
        "hbm_bytes": CHIPS[chip].hbm,
        **estimate(compiled.as_text(), CHIPS[chip], n, flops),
    }


def estimate(text: str, chip: Chip, n: int, flops: float) -> dict[str, Any]:
    """Estimates a compiled program's time from its text, as the module's docstring defines.

    Args:
        text: the scheduled HLO of one chip's share.
        chip: the chip's performance.
        n: number of chips in a collective.
        flops: FLOPs of the matrix products and convolutions on one chip.

    Returns:
        collectives: {kind: {"count", "bytes", "largest_bytes"}}; estimated: cycles, the seconds and
        utilisation; costliest: the ten instructions with the most cycles; unestimated: bytes by
        opcode.
    """
    executed = list(hlo.executed(hlo.parse(text)))
    collectives: dict[str, dict[str, int]] = {}
    unestimated: dict[str, int] = {}
    ici_bytes = 0.0
    for instruction, times in executed:
        if kind := instruction.collective:
            total = collectives.setdefault(kind, {"count": 0, "bytes": 0, "largest_bytes": 0})
            total["count"] += times
            total["bytes"] += times * instruction.result_bytes
            total["largest_bytes"] = max(total["largest_bytes"], instruction.result_bytes)
            rounds = 2 if kind == "all-reduce" else 1
            ici_bytes += times * instruction.result_bytes * rounds * (n - 1) / n
        elif instruction.unestimated:
            size = times * (instruction.result_bytes + instruction.operand_bytes)
            unestimated[instruction.opcode] = unestimated.get(instruction.opcode, 0) + size
    cycles = sum(times * (instruction.cycles or 0) for instruction, times in executed)
    seconds = {
        "compute_seconds": cycles / chip.clock,
        "unestimated_seconds": sum(unestimated.values()) / chip.bandwidth,
        "collective_seconds": ici_bytes / chip.ici,
    }
    step = sum(seconds.values())
    lines = hlo.source_lines(text)
    by_cycles = sorted(executed, key=lambda item: item[1] * (item[0].cycles or 0), reverse=True)
    return {
        "collectives": collectives,
        "unestimated_bytes": unestimated,
        "estimated": {
            "cycles": cycles,
            **seconds,
            "step_seconds": step,
            "utilisation": flops / step / chip.flops,
        },
        "costliest": [
            {
                "estimated_cycles": times * (instruction.cycles or 0),
                "name": instruction.name,
                "origin": hlo.origin(instruction, lines),
            }
            for instruction, times in by_cycles[:10]
        ],
    }


def describe(report: dict[str, Any]) -> str:
    """Formats the report as text; all numbers are those of one chip."""
    count, config = report["num_chips"], report["config"]
    lines = [
        f"{count} x {report['chip']}, batch {config['batch_size']}, {config['dtype']}; "
        "all numbers are those of one chip",
        *_describe_program("training step", report["train"]),
        *_describe_program(f"evaluation of a batch, tta {config['tta']}", report["eval"]),
    ]
    if "one_chip" in report:
        for name, efficiency in report["estimated_scaling_efficiency"].items():
            alone = report["one_chip"][name]["estimated"]["step_seconds"]
            lines.append(
                f"{name}: estimated scaling efficiency {efficiency:.1%} on {count} chips "
                f"({1e3 * alone:.3f} ms on one chip at 1/{count} of the batch)"
            )
    return "\n".join(lines)


def _describe_program(title: str, program: dict[str, Any]) -> list[str]:
    seconds = program["estimated"]
    lines = [
        "",
        title,
        f"  FLOPs of products and convolutions  {program['flops']:.3e} "
        f"(the compiler counts {program['compiler_flops']:.3e} in all)",
        f"  bytes accessed                      {program['bytes_accessed']:.3e}",
        f"  peak memory                         {program['peak_memory_bytes'] / 1e9:.2f} GB "
        f"of {program['hbm_bytes'] / 1e9:.2f} GB",
    ]
    for kind, total in program["collectives"].items():
        lines.append(f"  {kind:<34}  {total['bytes']:,} bytes in {total['count']}")
    for opcode, size in program["unestimated_bytes"].items():
        if size > 0.001 * program["bytes_accessed"]:
            lines.append(f"  no estimate of {opcode:<19}  {size:.3e} bytes")
    lines += [
        f"  estimated cycles                    {seconds['cycles'] / 1e6:.2f} M",
        f"  estimated step                      {1e3 * seconds['step_seconds']:.3f} ms = "
        f"compute {1e3 * seconds['compute_seconds']:.3f} "
        f"+ unestimated {1e3 * seconds['unestimated_seconds']:.3f} "
        f"+ collectives {1e3 * seconds['collective_seconds']:.3f}",
        f"  estimated utilisation               {seconds['utilisation']:.1%}",
        "  costliest, in M estimated cycles:",
    ]
    for item in program["costliest"]:
        lines.append(f"    {item['estimated_cycles'] / 1e6:6.3f}  {item['name']}  {item['origin']}")
    return lines


if __name__ == "__main__":
    main()
