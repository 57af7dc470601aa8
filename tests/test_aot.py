"""The estimates of compiled programs: the text is read right, and libtpu writes what is read."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.batches import make_batches
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh
from cv_jax.tasks import build_task
from cv_jax.tools import aot, hlo
from cv_jax.train.flops import count_flops
from tests.conftest import ROOT

# A loop of three rounds by its condition, one of two by what the compiler knows, a branch; 30
# cycles inside of a fusion, which its own estimate holds.
TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/cv_jax/models/n94.py"
2 "/somewhere/flax/linen/pooling.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=49 end_line=49 column=9 end_column=40}
2 {file_name_id=2 function_name_id=1 line=73 end_line=73 column=9 end_column=40}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %c = f32[8,4]{1,0} copy(%p), backend_config={"window_config":{"estimated_cycles":"30"}}
}

%body (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %f1 = f32[8,4]{1,0} fusion(%q), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
}

%cond (r: f32[8,4]) -> pred[] {
  %three = u32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%r, %three), direction=LT
}

ENTRY %main (x: f32[8,4]) -> (f32[8,4], /*index=1*/f32[2]) {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %w1 = f32[8,4]{1,0} while(%x), condition=%cond, body=%body
  %w2 = f32[8,4]{1,0} while(%w1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %choice = f32[8,4]{1,0} conditional(%i, %w2, %w2), branch_computations={%fused, %body}
  %f2 = (bf16[8,4]{1,0:T(8,128)(2,1)}, f32[2]{0}) fusion(%x, %w2), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp(N94)/whiten/conv" stack_frame_id=1}, backend_config={"estimated_cycles":"1000"}
  %pool = bf16[8,4]{1,0:T(8,128)(2,1)} select-and-scatter(%x, %w2, %zero), metadata={stack_frame_id=2}
  %early = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) copy-start(%x)
  %sum = (f32[8,4]{1,0}, bf16[16]{0}) all-reduce(%w2, %g), replica_groups={{0,1,2,3}}, to_apply=%add
  %all = f32[32,4]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (f32[8,4]{1,0}, /*index=1*/f32[2]{0}) tuple(%w2, %f2)
}
"""  # noqa: E501
CHIP = aot.Chip(flops=1e6, hbm=1 << 20, bandwidth=1e6, ici=1e6, clock=1e3)
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # ml_collections
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def test_loops_and_branches_count_and_the_inside_of_a_fusion_does_not():
    executed = [(i.name, n) for i, n in hlo.executed(hlo.parse(TEXT)) if i.cycles]
    assert executed == [("f1", 3), ("f1", 2), ("f1", 1), ("f2", 1)]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]{:T(128)}", 4),
        ("pred[3]{0}", 3),
        ("bf16[2048,31,31,24]{0,3,2,1:T(8,128)(2,1)S(1)}", 2048 * 31 * 31 * 24 * 2),
        ("(f32[64]{0:T(128)}, /*index=1*/u8[2,3]{1,0}, s4[4])", 256 + 6 + 2),
        ("(f8e4m3fn[7]{0}, token[])", 7),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.array_bytes(shape) == size


def test_the_estimate_of_a_small_program():
    """1600 cycles; a pool of 128 + 128 + 64 bytes; 4 chips: 3/4 of 2 * 160 + 512 bytes."""
    report = aot.estimate(TEXT, CHIP, n=4, flops=1000.0)
    assert report["unestimated_bytes"] == {"select-and-scatter": 320}
    assert report["collectives"] == {
        "all-reduce": {"count": 1, "bytes": 160, "largest_bytes": 160},
        "all-gather": {"count": 1, "bytes": 512, "largest_bytes": 512},
    }
    estimated = report["estimated"]
    assert estimated["cycles"] == 1600
    assert estimated["compute_seconds"] == pytest.approx(1.6)
    assert estimated["unestimated_seconds"] == pytest.approx(320e-6)
    assert estimated["collective_seconds"] == pytest.approx(624e-6)
    assert estimated["step_seconds"] == pytest.approx(1.600944)
    assert estimated["utilisation"] == pytest.approx(1000 / 1.600944 / 1e6)
    assert [item["estimated_cycles"] for item in report["costliest"][:4]] == [1000, 300, 200, 100]
    assert report["costliest"][0]["origin"] == "models/n94.py:49 jvp(N94)/whiten/conv"


def test_where_an_instruction_comes_from():
    lines = hlo.source_lines(TEXT)
    assert lines == {"1": "models/n94.py:49", "2": "linen/pooling.py:73"}
    by_name = {i.name: hlo.origin(i, lines) for i in hlo.parse(TEXT)[""]}
    assert (by_name["pool"], by_name["x"], by_name["w1"]) == ("linen/pooling.py:73", "x", "?")


def test_the_clocks_follow_from_the_peaks():
    for chip, products in (("v4", 8), ("v5e", 4), ("v5p", 8), ("v6e", 16)):
        peak = products * 2 * 128 * 128 * aot.CHIPS[chip].clock
        assert peak == pytest.approx(aot.CHIPS[chip].flops, rel=0.005)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5", r"no chip 'v5'\. Did you mean 'v5\w'\? There are: v4, v5e, v5p, v6e\."),
        ("v5e:2y4", r"write the sides as numbers, such as v5e:2x4"),
        ("v5e:0x4", r"write the sides as numbers, such as v5e:2x4"),
    ],
)
def test_a_wrong_topology_is_named(topology, message):
    with pytest.raises(UserError, match=rf"--topology={topology}: .*{message}"):
        aot.find_devices(topology)


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as stop:
        aot.main()
    return stop.value.code


def test_without_the_compiler_it_says_where_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _main(monkeypatch, "--config=configs/digits.py", "--topology=v5e") == 2
    error = capsys.readouterr().err
    assert error == "aot: the TPU compiler is missing: pip install -r requirements-tpu.txt\n"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.rl=1", r"config has no key 'optim.rl'"),
        ("--config.batch_size=many", r"batch_size"),
        ("--config.epochs=-1", r"config.epochs=-1.0 must be above 0"),
        ("--topologie=v5e", r"topologie"),
    ],
)
def test_a_wrong_config_is_refused_as_by_training(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.chdir(ROOT)
    assert _main(monkeypatch, "--config=configs/digits.py", "--topology=v5e", argument) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("aot: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("images", ["10x8x8", "10x8x8x0", "10x8x8xc", "10,8,8,1"])
def test_images_of_a_wrong_shape_are_named(images):
    with pytest.raises(UserError, match=f"--images={images} --num_classes=3: write the number of"):
        aot.blank_dataset(images, 3)


def test_a_data_set_of_shapes_takes_no_memory():
    """192 GB of images, which a stream's shapes and the task are made of."""
    data = aot.blank_dataset("1281167x224x224x3", 1000)
    assert data.train["image"].nbytes == 1281167 * 224 * 224 * 3
    assert data.train["image"].base.nbytes == 1
    assert data.spec.num_classes == 1000
    assert data.spec.image_shape == (224, 224, 3)


def test_auto_is_what_it_is_on_a_tpu(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert aot.read_config(["aot", "--config=configs/digits.py"]).dtype == "bfloat16"
    argv = ["aot", "--config=configs/digits.py", "--config.dtype=float32"]
    assert aot.read_config(argv).dtype == "float32"


def test_a_program_too_large_for_the_chip_ends_with_1(monkeypatch, capsys):
    program = jax.jit(lambda x: x + 1)
    monkeypatch.setitem(aot.CHIPS, "small", CHIP)
    x = jax.ShapeDtypeStruct((1 << 18,), "float32")
    monkeypatch.setattr(aot, "prepare_compiler", lambda: None)
    monkeypatch.setattr(aot, "examine", lambda *_: aot.cost(program, (x,), 0, "small", 1))
    monkeypatch.chdir(ROOT)
    assert _main(monkeypatch, "--config=configs/digits.py", "--topology=v5e") == 1
    assert capsys.readouterr().err == (
        "aot: small: the program needs 2.10 MB of memory, and the chip has 1.05 MB. Lower "
        "config.batch_size or use more chips.\n"
    )


def _aot(*arguments):
    """Runs the tool as a user does; libtpu is loaded in a process of its own."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_digits_on_one_and_on_eight_chips(tmp_path, monkeypatch):
    file = tmp_path / "aot.json"
    command = ("-m", "cv_jax.tools.aot", "--config=configs/digits.py", "--topology=v5e:2x4")
    done = _aot(*command, "--scaling", f"--out={file}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(file.read_text())
    assert report["config"]["dtype"] == "bfloat16"
    assert report["num_chips"] == 8

    monkeypatch.chdir(ROOT)
    config = aot.read_config(["aot", "--config=configs/digits.py"])
    data = load_dataset(config.data)
    task, keys = build_task(config, data.spec), derive_keys(config.seed)
    state = jax.eval_shape(task.init, keys.init)
    shapes = make_batches(config, data.train, keys.order, make_mesh()).shapes
    flops = count_flops(task.train_step, state, shapes, keys.step)
    trained = sum(p.size for p in jax.tree.leaves(state.params)) - 4 * 8  # whiten/kernel is frozen

    for name, program in {**report["one_chip"], "8": report["train"]}.items():
        assert 0.3 < program["compiler_flops"] / program["flops"] < 1.1, name
        assert 0 < program["estimated"]["utilisation"] < 1, name
        assert program["estimated"]["cycles"] > 1e4, name
        assert len(program["costliest"]) == 10, name
        assert "ops/convolution.py:" in str(program["costliest"]), name
    for train in (report["train"], report["one_chip"]["train"]):
        assert train["flops"] == flops / 8
    assert report["one_chip"]["train"]["collectives"] == {}
    # Gradients of what computes in bfloat16 are summed in bfloat16.
    assert report["train"]["collectives"]["all-reduce"]["bytes"] >= 2 * trained
    assert 0 < report["estimated_scaling_efficiency"]["train"] < 1
    assert f"{report['train']['estimated']['cycles'] / 1e6:.2f} M" in done.stdout
    assert "estimated scaling efficiency" in done.stdout

    # 20 GB of images are more than a chip holds; a stream holds 8 batches of them.
    blank = (*command, "--topology=v5e", "--images=300000000x8x8x1", "--num_classes=10")
    # So long a cosine is rounded to 0 before its end, and there nothing is differentiated.
    long = ("--config.steps=50000", "--config.optim.warmup=never")
    resident = _aot(*blank, *long)
    streamed = _aot(*blank, *long, "--config.data.stream=True", f"--out={file}")
    assert resident.returncode == 1
    assert resident.stderr.startswith("aot: v5e: the program needs 20,4")
    assert streamed.returncode == 0, streamed.stderr
    assert json.loads(file.read_text())["train"]["flops"] == flops

    for arguments, message in (
        (("--config.batch_size=60",), "set a size that does: 56, 64"),
        (("--topology=v5e:2x2x2x2",), "--topology=v5e:2x2x2x2: "),
    ):
        wrong = _aot(*command, *arguments)
        assert wrong.returncode == 2
        assert message in wrong.stderr
        assert wrong.stderr.count("\n") == 1


BRANCHES = """
import jax, jax.numpy as jnp
from cv_jax.models import ops
from cv_jax.tools import aot, hlo
aot.prepare_compiler()
device = aot.find_devices("v5e")[1][0]
sharding = jax.sharding.SingleDeviceSharding(device)
x, k = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    for shape in ((256, 32, 32, 8), (3, 3, 8, 16))
)
def loss(x, k):
    return jnp.sin(ops.conv(x, k, (1, 1), ((1, 1), (1, 1)))).sum()
text = jax.jit(jax.grad(loss, (0, 1))).lower(x, k).compile().as_text()
opcodes = {i.opcode for body in hlo.parse(text).values() for i in body}
print("convolution" in opcodes, "while" in opcodes, "conditional" in opcodes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_kernels_take_their_branch_for_the_tpu():
    """The filter gradient for the CPU is a loop of matrix products."""
    done = _aot("-c", BRANCHES)
    assert done.stdout == "True False False\n", done.stderr
