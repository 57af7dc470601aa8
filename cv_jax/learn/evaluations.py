"""What an evaluation can be, beside sums of a batch."""

from collections.abc import Callable
from typing import NamedTuple


class Probe(NamedTuple):
    """An evaluation of features, by what can be learned from those of labelled training images.

    Attributes:
        embed: (state, batch) -> features (b, d).
        fit: (features (m, d), label (m,)), of m training images -> what was learned of them.
        score: (state, what was learned, batch) -> {metric: (sum, count)}.
        limit: so many labelled training images at most, the first ones; None: all.
    """

    embed: Callable
    fit: Callable
    score: Callable
    limit: int | None = None
