"""Durations and intervals, written as text: "2 epochs", "500 steps", "1e6 examples", or "never"."""

import re

import ml_collections

from cv_jax.config.errors import UserError

_DURATION = re.compile(
    r"(?P<count>[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,2})?)\s*(?P<unit>step|epoch|example)s?", re.I
)
# `TrainState.step` counts in 32 bits.
_MAX_STEPS = 2**31 - 1


def is_duration(text: str) -> bool:
    """Returns whether a text is a duration that `steps` can convert."""
    text = text.strip()
    return text.lower() in ("", "never") or bool(_DURATION.fullmatch(text))


def steps(duration: str, batch_size: int, num_train: int) -> int:
    """Converts a duration to whole optimizer steps.

    An epoch is `num_train // batch_size` steps: the last incomplete batch is dropped. A duration
    above zero is at least one step.

    Args:
        duration: "2 epochs", "0.5 epoch", "500 steps", "1e6 examples"; "never" or "" is 0 steps.
        batch_size: examples in a step.
        num_train: examples in the training split.

    Raises:
        UserError: the text is not a duration, or is more than 2^31 - 1 steps.
    """
    if not is_duration(duration):
        raise UserError(
            f"{duration!r} is not a duration: write '2 epochs', '500 steps', '1e6 examples' "
            "or 'never'."
        )
    match = _DURATION.fullmatch(duration.strip())
    count = float(match["count"]) if match else 0.0
    if not count:
        return 0
    per_unit = {"step": 1.0, "epoch": num_train // batch_size, "example": 1 / batch_size}
    total = count * per_unit[match["unit"].lower()]
    if total > _MAX_STEPS:
        raise UserError(f"{duration!r} is more than {_MAX_STEPS} steps: choose a shorter duration.")
    return max(1, round(total))


def total_steps(config: ml_collections.ConfigDict, num_train: int) -> int:
    """Returns the length of the training in steps, from `config.steps` or else `config.epochs`."""
    return config.steps or steps(f"{config.epochs} epochs", config.batch_size, num_train)


def due(step: int, every: int) -> bool:
    """Returns whether an event that recurs every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0
