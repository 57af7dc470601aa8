"""One training on any number of devices: the same losses, the same counts, the same checkpoints."""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import train
from configs.digits import get_config
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.runtime import mesh
from cv_jax.runtime.mesh import (
    check_batch_size,
    make_mesh,
    parameter_sharding,
    put,
)
from cv_jax.runtime.startup import prepare_jax
from tests.conftest import on_devices
from tests.test_resume import final_arrays

# Of what a loss may differ by, relative to it, where its sum has another order.
TOLERANCE = 1e-5


@pytest.mark.slow
def test_the_default_mesh_gives_runs_their_own_devices_first():
    assert on_devices(4, "tests.test_mesh", "print_meshes").split() == ["1,4", "2,2", "4,1", "2,2"]


def print_meshes():
    for count in (1, 2, 8, 6):
        shape = make_mesh(count).shape
        print(f"{shape['seed']},{shape['data']}")


def _sizes(**sizes):
    config = base_config().mesh
    config.update(sizes)
    return config


def _devices(count):
    """Of a mesh that nothing is computed on."""
    return [mock.Mock(spec=jax.Device, id=i, process_index=0) for i in range(count)]


def test_sizes_of_the_mesh_are_those_of_the_config():
    made = make_mesh(6, _sizes(seed=2, fsdp=2), _devices(8))
    assert dict(made.shape) == {"seed": 2, "data": 2, "fsdp": 2}
    assert dict(make_mesh(1, _sizes(), _devices(8)).shape) == {"seed": 1, "data": 8, "fsdp": 1}
    with pytest.raises(UserError, match=r"config.mesh.seed=4 does not divide the number of runs"):
        make_mesh(6, _sizes(seed=4), _devices(8))
    with pytest.raises(
        UserError, match=r"1 \(seed\) x 3 \(data\) x 2 \(fsdp\) devices, but there are 8"
    ):
        make_mesh(1, _sizes(data=3, fsdp=2), _devices(8))


@pytest.mark.parametrize(
    ("size", "nearest"), [(33, "32, 40"), (7, "8"), (8, None), (0, None), (20, "16, 24")]
)
def test_a_batch_divides_over_the_devices_that_share_it(size, nearest):
    eight = make_mesh(1, _sizes(fsdp=2), _devices(8))
    if nearest is None:
        check_batch_size(size, eight)
        return
    with pytest.raises(UserError, match=f"over 8 devices; set a size that does: {nearest}.$"):
        check_batch_size(size, eight)


def test_the_largest_divisible_axis_of_large_parameters_is_divided():
    four = make_mesh(1, _sizes(fsdp=4), _devices(4))
    spec = jax.sharding.PartitionSpec
    for shape, expected in {
        (1, 3, 3, 64, 128): spec("seed", None, None, None, "fsdp"),
        (1, 3, 3, 128, 64): spec("seed", None, None, "fsdp", None),
        (1, 128, 128): spec("seed", None, "fsdp"),  # of equal ones the last
        (1, 1024, 63): spec("seed", "fsdp", None),  # the first of a parameter counts too
        (1, 128, 127): spec("seed"),  # smaller than what is divided
        (1, 1023, 1001): spec("seed"),  # not divisible
        (8, 1000): spec("seed"),  # the runs' axis does not count
    }.items():
        assert parameter_sharding(four, shape).spec == expected, shape


@pytest.mark.slow
def test_layouts():
    print(on_devices(8, "tests.test_mesh", "check_layouts"))


def check_layouts():
    """Ten steps in each layout, and five that go on for five more in another."""
    prepare_jax()  # with its cache of compiled programs
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(mesh, "SMALLEST_DIVIDED", 64):
        scratch = Path(folder)
        one = _losses(_train(scratch / "1", 1))
        _same_evaluation(scratch / "1", 8)
        whole = _train(scratch / "8", 8)
        _compare(_losses(whole), one)
        _train(scratch / "half", 8, steps=5)
        for devices in (1, 8):
            workdir = scratch / f"8-{devices}"
            shutil.copytree(scratch / "half", workdir)
            _compare(_losses(_train(workdir, devices)), one)
        for path, array in final_arrays(whole).items():
            np.testing.assert_array_equal(final_arrays(workdir)[path], array, err_msg=path)

        workdir = _train(scratch / "fsdp", 8, steps=5, mesh={"fsdp": 4})
        _compare(_losses(_train(workdir, 8)), one)


def _train(workdir, devices, steps=10, **changes):
    config = get_config()
    config.model = "n94(widths=(8,))"
    config.augment = "translate(1)"
    config.steps = steps
    config.log_every = "1 steps"
    config.eval_every = "never"
    config.optim.name = "sgd"  # Adam divides by gradients that rounding alone decides on
    config.optim.lr = 0.005
    config.optim.schedule = "constant"
    config.optim.warmup = "0 steps"
    config.update(changes)
    few = partial(make_mesh, devices=jax.devices()[:devices])
    with mock.patch("cv_jax.train.runs.make_mesh", few):
        result = train.run(config.lock(), workdir)
    assert {split: result[split]["count"] for split in ("val", "test")} == {"val": 200, "test": 360}
    return workdir


def _same_evaluation(workdir, devices):
    """Evaluates a finished training again on other devices."""
    results = [json.loads((workdir / "result.json").read_text())]
    (workdir / "result.json").unlink()
    results.append(json.loads((_train(workdir, devices) / "result.json").read_text()))
    for split in ("val", "test"):
        first, second = (result[split] for result in results)
        for name in ("count", "accuracy", "per_class_accuracy", "top5"):
            assert first[name] == second[name], (split, name)
        assert first["loss"]["mean"] == pytest.approx(second["loss"]["mean"])


def _losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    values = [r["values"]["loss"] for r in records if r["split"] == "train"]
    assert len(values) == 10
    return values


def _compare(losses, others):
    np.testing.assert_allclose(losses, others, rtol=TOLERANCE)


@pytest.mark.slow
def test_divided_parameters_take_their_part_of_the_memory():
    print(on_devices(4, "tests.test_mesh", "check_memory"))


def check_memory():
    four = make_mesh(1, _sizes(fsdp=4))
    x = np.arange(2.0**16, dtype=np.float32).reshape(1, 2**8, 2**8)
    divided = put(x, parameter_sharding(four, x.shape))
    assert [shard.data.nbytes for shard in divided.addressable_shards] == [x.nbytes // 4] * 4
    np.testing.assert_array_equal(divided, x)
