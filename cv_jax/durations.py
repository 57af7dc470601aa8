"""Durations and intervals, written as text: "2 epochs", "500 steps", "1e6 examples", or "never"."""

import re

import ml_collections

from cv_jax.errors import UserError

_DURATION = re.compile(r"(?P<count>\d+(\.\d*)?(e\d+)?)\s*(?P<unit>step|epoch|example)s?", re.I)


def steps(duration: str, batch_size: int, num_train: int) -> int:
    """Converts a duration to whole optimizer steps.

    An epoch is `num_train // batch_size` steps: the last incomplete batch is dropped. Anything
    above zero lasts at least one step.

    Args:
        duration: "2 epochs", "0.5 epoch", "500 steps", "1e6 examples"; "never" or "" is 0 steps.
        batch_size: examples in a step.
        num_train: examples in the training split.

    Raises:
        UserError: the text is none of these.
    """
    text = duration.strip()
    if text.lower() in ("", "never"):
        return 0
    match = _DURATION.fullmatch(text)
    if not match:
        raise UserError(
            f"{duration!r} is not a duration: write '2 epochs', '500 steps', '1e6 examples' "
            "or 'never'."
        )
    count = float(match["count"])
    per_unit = {"step": 1.0, "epoch": num_train // batch_size, "example": 1 / batch_size}
    return max(1, round(count * per_unit[match["unit"].lower()])) if count else 0


def total_steps(config: ml_collections.ConfigDict, num_train: int) -> int:
    """Length of the training in steps: `config.steps` where set, else `config.epochs`."""
    if config.steps:
        return config.steps
    return steps(f"{config.epochs} epochs", config.batch_size, num_train)


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0
