"""Durations and intervals written as text."""

import ml_collections
import pytest

from cv_jax.config.durations import due, steps, total_steps
from cv_jax.config.errors import UserError


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("never", 0),
        ("Never", 0),
        ("", 0),
        ("0 steps", 0),
        ("0 epochs", 0),
        ("500 steps", 500),
        ("1 step", 1),
        ("500steps", 500),
        (" 2 EPOCHS ", 18),  # 103 // 11 = 9 steps an epoch: four examples are dropped
        ("0.5 epoch", 4),  # 4.5 rounds to the even neighbour
        ("0.6 epoch", 5),
        ("1e3 examples", 91),  # 1000 / 11 = 90.9
        ("22 examples", 2),
        ("1 example", 1),
        ("0.001 epochs", 1),
    ],
)
def test_steps_of_11_examples_out_of_103(duration, expected):
    assert steps(duration, batch_size=11, num_train=103) == expected


@pytest.mark.parametrize(
    "duration", ["5", "steps", "-1 steps", "2 hours", "1 epoch 3 steps", "1,5"]
)
def test_other_text_is_refused(duration):
    with pytest.raises(UserError) as error:
        steps(duration, batch_size=11, num_train=103)
    assert f"{duration!r} is not a duration: write '2 epochs'" in str(error.value)


def test_more_steps_than_can_be_counted_are_refused():
    for duration in ("1e10 steps", "1e99 epochs"):
        with pytest.raises(UserError, match="is more than 2147483647 steps"):
            steps(duration, batch_size=11, num_train=103)


def test_total_steps_prefers_steps_to_epochs():
    config = ml_collections.ConfigDict({"steps": 0, "epochs": 2.5, "batch_size": 10})
    assert total_steps(config, num_train=49) == 10
    config.epochs = 1e-05
    assert total_steps(config, num_train=49) == 1
    config.steps = 7
    assert total_steps(config, num_train=49) == 7


def test_due_after_every_third_step_or_never():
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))
