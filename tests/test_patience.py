"""Early stopping: when it decides, and that a killed and resumed run decides the same."""

import json
import math
from unittest import mock

import jax
import numpy as np
import pytest

import train
from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.config.plan import Intervals, make_intervals, plan_chunks
from cv_jax.runtime.signals import Stopped
from cv_jax.train.evaluator import Evaluator
from cv_jax.train.flops import training_flops
from cv_jax.workdir.metric import Metric
from cv_jax.workdir.patience import Patience
from tests.test_resume import assert_same_run, run_until, stop_in_evaluation


def _fed(patience, evaluations):
    """Returns the step at which a Patience ends the training; None where it does not."""
    for step, headline in evaluations:
        patience.add(step, np.array(headline, float))
        if patience.is_over():
            return step
    return None


@pytest.mark.parametrize(
    ("better", "headlines", "end"),
    [
        ("higher", [0.5, 0.6, 0.6, 0.4], 40),  # an equal value is no improvement
        ("higher", [0.5, 0.6, 0.4, 0.7], None),
        ("lower", [0.5, 0.6, 0.7], 30),
        ("higher", [math.nan, math.nan], 20),
        ("higher", [0.5, math.nan, math.nan], 30),
    ],
)
def test_a_training_ends_after_20_steps_without_improvement(better, headlines, end):
    patience = Patience(20, Metric(better=better))
    assert _fed(patience, [(10 * (i + 1), [x]) for i, x in enumerate(headlines)]) == end


def test_several_runs_end_when_the_last_has_ceased_to_improve():
    patience = Patience(20, Metric())
    evaluations = [(10, [0.5, 0.1]), (20, [0.4, 0.2]), (30, [0.4, 0.3]), (40, [0.4, 0.3])]
    assert _fed(patience, evaluations) is None
    assert patience.improved == 30
    assert _fed(patience, [(50, [0.4, math.nan])]) == 50


def test_without_patience_no_training_ends_early():
    assert _fed(Patience(0, Metric()), [(10, [0.5]), (1000, [0.1])]) is None


def test_what_is_restored_decides_the_same():
    evaluations = [(10, [0.5]), (20, [0.4])]
    patience = Patience(20, Metric())
    assert _fed(patience, evaluations) is None
    resumed = Patience(20, Metric())
    resumed.restore(json.loads(json.dumps(patience.to_json())))
    assert not resumed.is_over()
    assert _fed(resumed, [(30, [0.4])]) == 30
    shorter = Patience(10, Metric())
    shorter.restore(patience.to_json())
    assert shorter.is_over()


def test_no_chunk_follows_the_end():
    ends = []
    intervals = Intervals(total=40, log=0, eval=10, save=0, patience=7)
    for chunk in plan_chunks(0, intervals, lambda _: 99, lambda: 99, lambda: len(ends) == 2):
        ends.append(chunk.end)
    assert ends == [10, 20]


@pytest.mark.parametrize(
    ("num_val", "eval_every", "message"),
    [
        (0, "1 epoch", r"config\.patience='2 epochs' watches val.*set config\.data\.num_val"),
        (5, "never", r"config\.patience='2 epochs' watches val.*set config\.eval_every"),
    ],
)
def test_patience_without_evaluations_is_refused(num_val, eval_every, message):
    config = base_config()
    config.batch_size, config.patience, config.eval_every = 16, "2 epochs", eval_every
    with pytest.raises(UserError, match=message):
        make_intervals(config, num_train=70, num_val=num_val)
    config.eval_every = "1 epoch"
    assert make_intervals(config, num_train=70, num_val=5).patience == 8


def test_steps_that_were_not_made_cost_nothing():
    flops_of = {0: 100, 1: 110, 2: 120}.get
    assert training_flops((0, 10, 20), flops_of, 25) == 10 * 100 + 10 * 110 + 5 * 120
    assert training_flops((0, 10, 20), flops_of, 12) == 10 * 100 + 2 * 110


@pytest.fixture
def worse_and_worse(tiny_config):
    """Evaluations on val whose accuracy falls, of a run whose patience ends at step 6 of 15."""
    for name in ("augment", "progressive_resizing", "select"):
        tiny_config[name] = ""  # which take most of the compiling
    tiny_config.eval_every, tiny_config.patience = "2 steps", "3 steps"
    tiny_config.eval_batch_size = 16
    watch = Evaluator.watch

    def falling(self, state):
        values = watch(self, state)
        return values and {**values, "accuracy": np.array([1 / int(state.step)])}

    with mock.patch.object(Evaluator, "watch", falling):
        yield tiny_config


def _result(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(worse_and_worse, tmp_path, capsys):
    whole, stopping = tmp_path / "whole", tmp_path / "stopping"
    result = train.run(worse_and_worse, whole)
    line = "stopped early at step 6: no improvement on val since step 2; the result is of step 6"
    assert line in capsys.readouterr().out
    assert result["steps"] == 6
    assert result["stopped_early"] == {"planned_steps": 15, "last_improved": 2}
    assert result["examples"] == 6 * 50
    run_until(3, worse_and_worse, stopping)  # between two evaluations
    # Val has 4 batches: the evaluation that ends the training is cut short, then the final one.
    assert stop_in_evaluation(4 + 2, worse_and_worse, stopping) == 6
    assert stop_in_evaluation(4 + 2, worse_and_worse, stopping) == 6
    train.run(worse_and_worse, stopping)
    assert_same_run(whole, stopping)
    # The complete run is not evaluated again, and more patience takes it on.
    with mock.patch.object(Evaluator, "final", side_effect=AssertionError):
        assert train.run(worse_and_worse, whole)["steps"] == 6
    worse_and_worse.patience = "5 steps"
    assert train.run(worse_and_worse, whole)["steps"] == 8


@pytest.mark.slow
def test_a_run_that_is_killed_after_its_early_end_is_only_evaluated(worse_and_worse, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.run(worse_and_worse, whole)
    with (
        mock.patch.object(train.Workdir, "write_result", side_effect=Stopped(15)),
        pytest.raises(Stopped),
    ):
        train.run(worse_and_worse, killed)
    with mock.patch.object(train.Trainer, "__call__", side_effect=AssertionError):
        train.run(worse_and_worse, killed)
    assert_same_run(whole, killed)
    assert jax.tree.leaves(_result(killed)["flops"]) == jax.tree.leaves(_result(whole)["flops"])
