"""What benchmarks/gpu.sh does with a GPU, tried on the CPU: its sections, limits and exit codes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

import train
from benchmarks import gpu, step, timed_runs
from benchmarks.worker import random_images
from cv_jax.config.errors import UserError
from cv_jax.runtime.signals import Stopped
from cv_jax.tools.aot import read_config
from tests.conftest import ROOT
from tests.test_data import examples_of, features_of, prepare_tiny

SECTIONS = ("data", "digits", "record", "record_batched", "step", "simclr")


@pytest.fixture(scope="module")
def tiny_cifar10(tmp_path_factory):
    """A directory for TFDS_DATA_DIR with a cifar10 of 160 and 100 images that can be learned."""
    directory = tmp_path_factory.mktemp("tfds")
    images, labels = random_images(260)
    splits = {
        name: examples_of(images[part], labels[part])
        for name, part in (("train", slice(160)), ("test", slice(160, 260)))
    }
    features = features_of((32, 32, 3), names=tuple("0123456789"))
    prepared = prepare_tiny(directory / "tiny", features, splits)
    shutil.copytree(prepared, directory / "cifar10" / "3.0.2")
    return directory


@pytest.fixture
def run_section(tmp_path):
    """Runs a section here, with --small unless told otherwise; returns what it wrote each time."""

    def run(section, *arguments, small=True):
        args = gpu.parse([section, f"--out={tmp_path}", *["--small"] * small, *arguments])
        written = []
        gpu.SECTIONS[section](args, written.append)
        return written

    return run


# The record


@pytest.fixture
def watched(monkeypatch):
    """Watches timed_runs.Program; returns what each call has compiled on the clock, building first.

    Checks of each program that its runs start from the whitening filters of the clock.
    """
    compiled = []

    class Watched(timed_runs.Program):
        def __init__(self, config, data):
            super().__init__(config, data)
            images = self._normalize(data.spec.sample["image"] / np.float32(255))
            kernel = self._model.params_from_images(images)["whiten"]["kernel"]
            started = self._init(super()._prepare(7)[0].own).params["whiten"]["kernel"]
            np.testing.assert_array_equal(started, np.stack([kernel] * len(started)))

        def _prepare(self, seed):
            prepared = super()._prepare(seed)
            compiled.append([])
            return prepared

        def __call__(self, seed):
            done = super().__call__(seed)
            compiled.append([])  # for what is compiled before the next clock
            return done

    def note(event, seconds, **_):
        if "compile" in event and compiled:
            compiled[-1].append(event)

    monkeypatch.setattr(timed_runs, "Program", Watched)
    jax.monitoring.register_event_duration_secs_listener(note)
    yield lambda: compiled[:1] + compiled[1::2]
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
@pytest.mark.usefixtures("on_plain_lax")
def test_timed_runs_are_as_accurate_as_train_py(
    tiny_cifar10, run_section, watched, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_cifar10))
    monkeypatch.setattr(gpu, "prepare_jax", lambda: None)  # the tests have a cache of their own
    monkeypatch.setitem(gpu.SECTIONS, "record_batched", lambda *a: gpu.time_record(*a, num_seeds=2))
    one, two = run_section("record")
    building, warm_up, *timed = map(bool, watched())
    assert building
    assert warm_up  # the evaluation
    assert timed == [False, False]
    (both,) = run_section("record_batched", "--rounds=1")
    assert capsys.readouterr().out.count("seeds from") == 3

    config = gpu.record_config(small=True)
    config.num_seeds = 2
    result = train.run(config, epath.Path(tmp_path / "run"))
    expected = result["test"]["accuracy"]["values"]
    assert expected[0] != expected[1]
    assert one["accuracy"]["values"] == expected[:1]
    assert two["accuracy"]["values"] == both["accuracy"]["values"] == expected
    assert [r["seeds"] for r in two["rounds"]] == [[0], [1]]
    assert [r["seeds"] for r in both["rounds"]] == [[0, 1]]
    assert two["steps"] == result["steps"] == 32
    assert two["dtype"] == "float32"
    for of_round in two["rounds"] + both["rounds"]:
        assert of_round["seconds"].keys() == {"init", "train", "eval"}
        assert min(of_round["seconds"].values()) > 0


def _round(seed, seconds, *accuracies):
    parts = {"init": 0.1 * seconds, "train": 0.8 * seconds, "eval": 0.1 * seconds}
    seeds = list(range(seed, seed + len(accuracies)))
    return {"seeds": seeds, "accuracies": list(accuracies), "seconds": parts}


def test_the_figures_of_timed_runs():
    rounds = [_round(0, 4.0, 0.94, 0.93), _round(2, 8.0, 0.96, 0.95), _round(4, 6.0, 0.9, 0.94)]
    results = timed_runs.results_of(rounds, examples=240)
    assert results["accuracy"]["n"] == 6
    assert results["accuracy"]["mean"] == pytest.approx(5.62 / 6)
    assert results["reached"] == 4
    assert results["seconds"]["values"] == pytest.approx([2.0, 4.0, 3.0])
    assert results["seconds"]["std"] == pytest.approx(1.0)
    assert results["images_per_second"] == pytest.approx(2 * 240 / 4.8)
    found = gpu.figures("record", results)
    assert found["runs at 94%"] == 4
    assert found["seconds of a run"] == pytest.approx(3.0)
    json.dumps(timed_runs.results_of(rounds[:1], examples=240))  # one round has no spread


# Trainings


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("small", [False, True])
def test_the_arguments_of_the_trainings_fit(small, monkeypatch):
    monkeypatch.chdir(ROOT)
    digits, simclr = (read_config(["train.py", *a[small]]) for a in (gpu.DIGITS, gpu.SIMCLR))
    assert digits.num_seeds == (2 if small else 32)
    assert simclr.data.num_val == (32 if small else 5000)  # else nothing is watched
    assert simclr.model.startswith("n94" if small else "resnet18")


# A program in the place of train.py: a row of metrics.jsonl every 0.2 s, and a regular end.
TRAIN = """
import json, pathlib, signal, sys, time
(workdir,) = (pathlib.Path(a.split("=", 1)[1]) for a in sys.argv if a.startswith("--workdir="))
workdir.mkdir(parents=True)
def stop(signum, frame):
    (workdir / "stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with (workdir / "metrics.jsonl").open("w") as file:
    for i in range(ROWS):
        found = {"train": {"images_per_second": 10.0 * i}, "val": {"accuracy": i / 10}}
        for split, values in found.items():
            row = {"step": i, "epoch": i / 2, "split": split, "values": values, "runs": {}}
            file.write(json.dumps(row) + "\\n")
        file.flush()
        time.sleep(0.2)
if CODE == 0:
    result = {"test": {"accuracy": {"mean": 0.5, "std": None, "n": 1}}, "seconds": {"train": 3.0}}
    result |= {"epochs": 1.0, "examples": 8, "flops": {}, "device": "cpu"}
    (workdir / "result.json").write_text(json.dumps(result))
sys.exit(CODE)
"""


@pytest.fixture
def stub_training(monkeypatch, tmp_path):
    """Replaces train.py by TRAIN with so many rows and this exit code."""

    def replace(rows, code=0):
        root = tmp_path / "stub"
        root.mkdir()
        (root / "train.py").write_text(f"ROWS, CODE = {rows}, {code}\n{TRAIN}")
        monkeypatch.setattr(gpu, "ROOT", root)
        monkeypatch.setattr(gpu, "POLL", 0.05)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    yield replace
    for signum, handler in before.items():
        signal.signal(signum, handler)
    sys.unraisablehook = hook


def test_a_training_is_followed_while_it_runs(stub_training, run_section):
    stub_training(rows=4)
    written = run_section("digits")
    assert len(written) > 2
    assert written[0]["result"] is None
    last = written[-1]
    assert len(last["rows"]) == 8
    assert last["images_per_second"] == 15.0  # the median of 0, 10, 20 and 30
    assert last["val_accuracy"] == 0.3
    assert 0 < last["rows"][0]["seconds"] < last["val_seconds"] <= last["wall_seconds"]
    assert last["result"]["test_accuracy"]["mean"] == 0.5
    found = gpu.figures("digits", last)
    assert found["training seconds of a run"] == 3.0
    assert "std" not in found


def test_sigterm_is_a_regular_end_of_simclr_alone(stub_training, run_section, tmp_path):
    stub_training(rows=1000)

    def end(section, times):
        pid = os.getpid()
        script = f"sleep 1; kill -TERM {pid}"
        with subprocess.Popen(["bash", "-c", script]) as killer:
            try:
                times.extend(run_section(section))
            finally:
                killer.wait()

    written = []
    end("simclr", written)
    assert written[-1]["val_accuracy"] > 0
    assert written[-1]["result"] is None
    with pytest.raises(Stopped):
        end("digits", written)
    assert len(list(tmp_path.glob("*/stopped"))) == 2  # both had time to save


def test_a_training_that_fails_is_a_failure(stub_training, run_section):
    stub_training(rows=1, code=3)
    with pytest.raises(UserError, match="exit code 3"):
        run_section("digits")


# Steps


def test_the_variants_of_a_gpu():
    args = step.parse(["--device=gpu", "--variants=torch-bfloat16-channels_last-compile"])
    assert args.device == "gpu"
    variants = step.parse(["--device=gpu"]).variants
    assert "torch-bfloat16-channels_last-compile" in variants
    assert set(variants) <= set(step.KNOWN)
    assert step.parse([]).variants == list(step.VARIANTS["cpu"])


@pytest.fixture
def stub_steps(monkeypatch):
    """Measures nothing: a case takes as long as its variant's name; returns the measured cases."""
    measured = []

    def measure(cases, args):
        for case in cases:
            if "compile" in case.variant and args.model == "resnet18":
                raise step.WorkerEnded(case)
        measured.append((args.model, [str(case) for case in cases]))
        rows = [{"seconds": 1.0, "peak_bytes": 1, "loss": 0.0}] * args.rounds
        return {case: step.summarize(rows, args.steps, case) for case in cases}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(gpu, "raise_when_signalled", lambda: None)
    return measured


def test_steps_are_written_model_by_model_without_what_ends(stub_steps, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    written = []
    args = gpu.parse(["step", "--out=nowhere", "--rounds=3"])
    with pytest.raises(UserError, match="resnet18 torch-bfloat16-channels_last-compile/512"):
        gpu.time_steps(args, lambda results: written.append(json.loads(json.dumps(results))))
    assert [list(w["models"]) for w in written] == [
        ["n94/500"],
        ["n94/500", "resnet18/512"],
        ["n94/500", "resnet18/512", "n94/2000"],
    ]
    assert [model for model, _ in stub_steps] == ["n94", "resnet18", "n94"]
    assert [len(cases) for _, cases in stub_steps] == [4, 3, 4]
    best = written[-1]["models"]["n94/500"]["best_speed"]
    assert list(best) == ["cv_jax-float32/500"]
    found = gpu.figures("step", written[-1])
    assert found["n94/500 cv_jax-bfloat16 images/s"] == 500 * 20
    assert len(found) == 11


def test_without_pytorch_only_cv_jax_is_timed(stub_steps, run_section, monkeypatch, capsys):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    run_section("step")
    assert stub_steps == [("n94", ["cv_jax-float32/4"])]
    assert "PyTorch is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_step_of_pytorch_trains_the_same(monkeypatch):
    torch = pytest.importorskip("torch")
    from functools import partial

    from benchmarks import torch_models

    # Without generated code, whose compilation takes a minute; the graph is the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    image, label = random_images(8)
    image, label = torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(label).long()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = torch_models.N94(widths=(4, 4, 4)).to(memory_format=torch.channels_last)
        one = torch_models.make_step(network, "bfloat16", torch.channels_last, "cpu", compiled)
        losses.append([float(one(image, label)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][1]


# The checks and the summary


def test_without_a_gpu_one_sentence_says_so(run_section, capsys):
    with pytest.raises(SystemExit) as left:
        run_section("check", small=False)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("JAX sees no GPU: install NVIDIA's driver")
    (written,) = run_section("check")
    assert written["device"].startswith(("cpu", "2 x cpu"))


def test_nvidia_smi_is_read(monkeypatch, tmp_path):
    assert gpu.nvidia_smi() == [] or shutil.which("nvidia-smi")
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.95.05, 143771 MiB'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    expected = {"name": "NVIDIA H200", "driver": "580.95.05", "memory": "143771 MiB"}
    assert gpu.nvidia_smi() == [expected]


def test_the_summary_shows_every_section(tmp_path, capsys, monkeypatch):
    results = timed_runs.results_of([_round(0, 4.0, 0.94), _round(1, 4.0, 0.93)], examples=10_000)
    for section, found in {
        "check": {"gpus": [{"name": "NVIDIA H200", "driver": "580", "memory": "1 MiB"}]},
        "data": {"train": 50_000, "test": 10_000, "seconds": 12.34},
        "record": results,
    }.items():
        (tmp_path / f"{section}.json").write_text(json.dumps({"results": found}))
    ended = ["data=done", "record=cut", "step=failed"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "summary", f"--out={tmp_path}", "--ended", *ended])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "machine  NVIDIA H200, 580, 1 MiB"
    assert lines[1].startswith("versions python 3.")
    assert [line.split() for line in lines if not line.startswith(" ")][2:] == [
        ["data", "done", "train", "50,000"],
        ["record", "cut", "accuracy", "0.935"],
        ["step", "failed", "nothing"],
    ]
    assert f"{'':<24}runs at 94% 1" in lines
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"commit", "versions", "command"} <= set(summary)
    assert summary["results"]["sections"]["record"]["figures"]["images/s"] == pytest.approx(3125)


# The script


def _gpu_sh(*arguments, **environment):
    return subprocess.Popen(
        ["bash", ROOT / "benchmarks/gpu.sh", *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# A program in the place of Python. It notes its arguments, and behaves as BEHAVIOUR says.
PYTHON = """#!/bin/bash
echo "$*" >> {notes}
[ "$1 $2" != "-m venv" ] || {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python3"; }}
[ "$1 $2" != "-m pip" ] || [[ "$BEHAVIOUR" != *no-$3-of-${{6##*/}}* ]] || exit 1
[ "$1 $2" = "-m benchmarks.gpu" ] || exit 0
echo '{{}}' > "${{4#--out=}}/$3.json"
case $BEHAVIOUR in
  *"$3=sleep"*) exec sleep 60 ;;
  *"$3=save"*) trap 'kill $!; sleep 0.1; exit 0' TERM; sleep 60 & wait ;;
  *"$3=fail"*) exit 1 ;;
  *"$3=none"*) exit 2 ;;
esac
"""


@pytest.fixture
def stub_python(tmp_path):
    """A virtual environment with PYTHON; returns its directory and the notes so far."""
    notes = tmp_path / "notes"
    python = tmp_path / "venv" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(notes=shlex.quote(str(notes))))
    python.chmod(0o755)
    return python.parent.parent, lambda: notes.read_text().splitlines()


def _sections(notes):
    return [line.split()[2] for line in notes if line.startswith("-m benchmarks.gpu")]


def test_the_script_goes_on_after_what_is_cut_or_fails(stub_python, tmp_path):
    venv, notes = stub_python
    out = tmp_path / "out"
    behaviour = "digits=sleep record=fail simclr=save"
    with _gpu_sh(out, VENV=venv, BEHAVIOUR=behaviour, LIMIT=1) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert _sections(notes()) == ["check", *SECTIONS, "summary"]
    ended = "data=done digits=cut record=failed record_batched=done step=done simclr=done"
    assert notes()[-1] == f"-m benchmarks.gpu summary --out={out} --ended {ended}"
    assert "gpu.sh: digits was cut after 1 s" in output
    assert "gpu.sh: record failed" in errors
    assert (out / "digits.json").read_text() == "{}\n"  # what it had
    install = [line for line in notes() if line.startswith("-m pip")]
    assert install == ["-m pip install --quiet -r requirements-bench.txt jax[cuda13]"]


def test_a_section_that_is_cut_is_no_failure(stub_python, tmp_path):
    venv, notes = stub_python
    out = tmp_path / "out"
    out.mkdir()
    (out / "record.json").write_text("old")
    (out / "digits.json").write_text("old")
    environment = {"VENV": venv, "BEHAVIOUR": "record=sleep", "SECTIONS": "record", "LIMIT": 1}
    with _gpu_sh("--small", out, **environment) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert notes() == [
        f"-m benchmarks.gpu check --out={out} --small",
        f"-m benchmarks.gpu record --out={out} --small",
        f"-m benchmarks.gpu summary --out={out} --small --ended record=cut",
    ]
    assert (out / "record.json").read_text() == "{}\n"
    assert (out / "digits.json").read_text() == "old"  # was not asked for


def test_sigterm_stops_the_script_and_its_section(stub_python, tmp_path):
    venv, notes = stub_python
    with _gpu_sh("--small", tmp_path / "out", VENV=venv, BEHAVIOUR="record=save") as process:
        deadline = time.monotonic() + 30
        while "record" not in _sections(notes() if (tmp_path / "notes").exists() else []):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 143
    assert _sections(notes())[-1] == "record"


def test_it_makes_a_virtual_environment_where_none_is_given(stub_python, tmp_path):
    venv, notes = stub_python
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "VENV": "", "VIRTUAL_ENV": "", "SECTIONS": "digits"}
    behaviour = "no-install-of-requirements-bench.txt"
    with _gpu_sh(tmp_path / "out", **environment, BEHAVIOUR=behaviour) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"-m venv {tmp_path / 'out' / 'venv'}" in notes()
    assert "-m pip install --quiet -r requirements.txt jax[cuda13]" in notes()  # without PyTorch
    assert _sections(notes()) == ["check", "digits", "summary"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--smal"], {}, "gpu.sh: the arguments are [--small] [OUT], not --smal"),
        (["--small", "a", "b"], {}, "gpu.sh: the arguments are [--small] [OUT], not a b"),
        (["--small"], {"SECTIONS": "recrod"}, "gpu.sh: SECTIONS: there is no section recrod"),
        ([], {"BEHAVIOUR": "check=none"}, ""),
        (
            [],
            {"BEHAVIOUR": "no-install-of-requirements-bench.txt no-install-of-requirements.txt"},
            "gpu.sh: the installation failed",
        ),
    ],
)
def test_what_is_wrong_at_the_start_ends_it_with_2(
    stub_python, tmp_path, arguments, environment, message
):
    venv, _ = stub_python
    out = [tmp_path / "out"] if not arguments else []
    with _gpu_sh(*arguments, *out, VENV=venv, **environment) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(message)


def test_the_limits_fit_into_the_minutes():
    text = (ROOT / "benchmarks/gpu.sh").read_text().partition("limits=(")[2].partition(")")[0]
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    assert tuple(limits) == SECTIONS
    assert sum(map(int, limits.values())) <= 11 * 60  # and installing
    assert set(SECTIONS) < set(gpu.SECTIONS)


@pytest.mark.slow
def test_the_script_runs_as_a_person_starts_it(tiny_cifar10, tmp_path):
    environment = {"VENV": sys.prefix, "TFDS_DATA_DIR": tiny_cifar10, "SECTIONS": "data digits"}
    with _gpu_sh("--small", tmp_path, **environment) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    data, digits, summary = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("data", "digits", "summary")
    )
    assert data["results"]["train"] == 128
    assert data["benchmark"] == "data"
    assert digits["results"]["result"]["test_accuracy"]["n"] == 2
    assert digits["results"]["val_accuracy"] >= 0
    sections = summary["results"]["sections"]
    assert {name: section["state"] for name, section in sections.items()} == {
        "data": "done",
        "digits": "done",
    }
    assert f"written {tmp_path / 'summary.json'} after" in output
