"""Histograms and hyperparameters in TensorBoard, read back from the event files."""

import math
import re

import jax
import numpy as np
import pytest
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from cv_jax.config.base import base_config
from cv_jax.config.plan import Chunk, Intervals
from cv_jax.runtime.mesh import make_mesh, parameter_sharding, put
from cv_jax.trained.load import load_trained
from cv_jax.workdir.log import Log
from cv_jax.workdir.log.tensorboard import NUM_BINS, count_values
from cv_jax.workdir.metric import Metric
from tests.conftest import on_devices, random_dataset
from tests.test_log import read_events


def _params():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 3, 40, 8)).astype(np.float32)
    bias = np.float32([[0, 0, 0], [1, 2, 4]])
    return {"conv": {"kernel": kernel, "bias": bias}}


def _check_histogram(histogram, values):
    """That a HistogramProto is the one of these values."""
    edges = np.float32([histogram.min, *histogram.bucket_limit])
    assert len(histogram.bucket) == len(histogram.bucket_limit) == NUM_BINS
    assert (histogram.min, histogram.max) == (values.min(), values.max())
    assert histogram.num == values.size
    counts, _ = np.histogram(values, edges)
    np.testing.assert_array_equal(histogram.bucket, counts)
    assert histogram.sum == pytest.approx(values.sum(dtype=np.float64), rel=1e-4, abs=1e-4)
    squares = np.square(values, dtype=np.float64).sum()
    assert histogram.sum_squares == pytest.approx(squares, rel=1e-4)


def _hparams(folder):
    """What a folder has for the hparams plugin: {"session_start_info": ..., ...}."""
    found = {}
    for (tag, _), value in read_events(folder).items():
        if tag.startswith("_hparams_/"):
            kind = tag.removeprefix("_hparams_/")
            data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            found[kind] = getattr(data, kind)
    return found


def test_counts_are_those_of_numpy():
    params = _params()
    counted = count_values(params, make_mesh())
    assert counted.keys() == {"conv/kernel", "conv/bias"}
    for run, kernel in enumerate(params["conv"]["kernel"]):
        edges, counts, total, squares = (x[run] for x in counted["conv/kernel"])
        np.testing.assert_allclose(edges, np.linspace(kernel.min(), kernel.max(), 65), atol=1e-6)
        np.testing.assert_array_equal(counts, np.histogram(kernel, edges)[0])
        np.testing.assert_allclose([total, squares], [kernel.sum(), (kernel**2).sum()], rtol=1e-4)
    of_zeros, of_three = counted["conv/bias"].counts
    assert of_zeros.tolist() == [0] * 63 + [3]  # all values are the maximum
    assert {i: int(n) for i, n in enumerate(of_three) if n} == {0: 1, 21: 1, 63: 1}


@pytest.mark.slow
def test_divided_parameters_are_counted_where_they_lie():
    assert on_devices(4, "tests.test_board", "print_counts").strip() == "30720"


def print_counts():
    sizes = base_config().mesh
    sizes.seed, sizes.fsdp = 2, 2
    mesh = make_mesh(2, sizes)
    kernel = np.concatenate([_params()["conv"]["kernel"]] * 64, axis=2)  # 61,440 a run
    params = {"kernel": put(kernel, parameter_sharding(mesh, kernel.shape))}
    assert params["kernel"].addressable_shards[0].data.size == kernel.size // 4
    counted = count_values(params, mesh)["kernel"]
    for counts, edges, values in zip(counted.counts, counted.edges, kernel, strict=True):
        np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
    assert counted.counts.is_fully_replicated
    # No device gets to see more than its part and the counts.
    program = count_values.lower(params, mesh).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", program.as_text())
    print(max(math.prod(map(int, shape.split(","))) for shape in shapes))


def _write_log(tmp_path, config, num_runs, start_step=0):
    names = [f"run {i}" for i in range(num_runs)]
    intervals = Intervals(total=2, log=2, eval=0, save=0, histograms=2)
    params = jax.tree.map(lambda x: np.resize(x, (num_runs, *x.shape[1:])), _params())
    params["diverged"] = np.full((num_runs, 2), np.nan, np.float32)
    params["diverged"][:1] = 1.0
    accuracy = np.arange(num_runs) / 10
    sums = {
        "accuracy": (accuracy, np.ones(num_runs)),
        "confusion": (np.ones((num_runs, 2, 2)), np.ones(num_runs)),
    }
    spec, metrics = random_dataset().spec, {"accuracy": Metric("%")}
    with Log(
        tmp_path, config, spec, names, start_step, intervals, metrics, headline="accuracy"
    ) as log:
        log.begin([], [])
        log.histograms(Chunk(0, 1, False, False, False), params, make_mesh())
        log.histograms(Chunk(1, 2, True, False, False, histograms=True), params, make_mesh())
        log.finals(2, {"test": sums, "val": {}}, ["a", "b"])
    return params


def test_one_run_has_all_in_one_folder(tmp_path):
    config = base_config()
    config.batch_size, config.seed = 10, 7
    _write_log(tmp_path, config, 1)
    params = _write_log(tmp_path, config, 1, start_step=1)  # as after a stop between the two steps
    events = read_events(tmp_path)
    histograms = {key for key in events if key[0].startswith("params/")}
    assert histograms == {
        *[("params/conv/bias", 2), ("params/conv/kernel", 2), ("params/diverged", 2)]
    }
    _check_histogram(events["params/conv/kernel", 2].histo, params["conv"]["kernel"][0])

    hparams = _hparams(tmp_path)
    assert hparams.keys() == {"session_start_info", "session_end_info"}
    assert dict(hparams["session_start_info"].hparams).keys() == {"seed"}
    assert hparams["session_start_info"].hparams["seed"].number_value == 7
    assert hparams["session_end_info"].status == 1  # success
    assert not (tmp_path / "runs").exists()


def test_a_sweep_of_two_by_two_has_them_run_by_run(tmp_path):
    config = base_config()
    config.batch_size, config.num_seeds = 10, 2
    config.sweep = (("augment", ("rotate(5)", "rotate(10)")),)
    params = _write_log(tmp_path, config, 4)
    assert not _hparams(tmp_path)
    assert not any(tag.startswith("params/") for tag, _ in read_events(tmp_path))

    settings = []
    for run in range(4):
        own = tmp_path / "runs" / f"run {run}"
        events, hparams = read_events(own), _hparams(own)
        assert hparams.keys() == {"session_start_info", "session_end_info"}
        values = hparams["session_start_info"].hparams
        settings.append((values["augment"].string_value, values["seed"].number_value))
        _check_histogram(events["params/conv/kernel", 2].histo, params["conv"]["kernel"][run])
        _check_histogram(events["params/conv/bias", 2].histo, params["conv"]["bias"][run])
        assert (("params/diverged", 2) in events) == (run == 0)
        assert events["final_test/accuracy", 2].simple_value == pytest.approx(run / 10)
    assert settings == [("rotate(5)", 0), ("rotate(5)", 1), ("rotate(10)", 0), ("rotate(10)", 1)]


@pytest.mark.slow
def test_training_counts_the_parameters_that_it_saves(digits_run):
    for name in ("seed=0", "seed=1"):
        events = read_events(digits_run / "runs" / name)
        trained = load_trained(digits_run, name)
        tags = {tag for tag, _ in events if tag.startswith("params/")}
        assert len(tags) == len(jax.tree.leaves(trained.state.params))
        last = int(trained.state.step)
        assert {step for tag, step in events if tag in tags} == {last // 2, last}
        head = np.asarray(trained.state.params["head"]["kernel"])
        _check_histogram(events["params/head/kernel", last].histo, head)
        before = events["params/head/kernel", last // 2].histo
        assert before.sum_squares != pytest.approx(np.square(head).sum(), rel=1e-3)
