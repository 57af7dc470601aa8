"""How well a score tells positive examples from negative ones, with intervals over groups.

Patches of one patient are alike. An interval that takes them as independent is too narrow; so whole
groups are resampled: patients or slides.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import t as student

RESAMPLES = 1000
BINS = 15


class Levels(NamedTuple):
    """The weight of the examples with at least each score, from the highest score on.

    Attributes:
        scores: (k,) distinct scores, descending.
        positive, negative: (k,) the weight of positive and negative examples of this score or more.
    """

    scores: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


class Estimate(NamedTuple):
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


def levels(score: np.ndarray, positive: np.ndarray) -> Levels:
    """Returns the levels of examples with scores (m,), of which `positive` (m,) are."""
    return _Levels(score, positive)(np.ones(len(score)))


def auc(found: Levels) -> float:
    """Returns the area under the ROC curve: how often a positive example has the higher score.

    Equal scores count half, so that constant scores have 0.5. Without a positive or a negative
    example there are no pairs, and the result is NaN.
    """
    pairs = found.positive[-1] * found.negative[-1]
    if not pairs:
        return float("nan")
    above = np.diff(found.negative, prepend=0)
    return float(((found.positive - np.diff(found.positive, prepend=0) / 2) * above).sum() / pairs)


def sensitivity_at(found: Levels, specificity: float) -> float:
    """Returns the highest sensitivity of a threshold with at least this specificity; see `auc`."""
    if not found.positive[-1] or not found.negative[-1]:
        return float("nan")
    allowed = found.negative <= (1 - specificity) * found.negative[-1] * (1 + 1e-12)
    return float(found.positive[allowed].max(initial=0) / found.positive[-1])


def threshold_at(found: Levels, specificity: float) -> float:
    """Returns the lowest score from which on the specificity is at least this; inf for none."""
    allowed = found.negative <= (1 - specificity) * found.negative[-1] * (1 + 1e-12)
    return float(found.scores[allowed].min(initial=np.inf))


def precision_area(found: Levels) -> float:
    """Returns the average precision of `ranking.average_precision`, of weighted examples."""
    if not found.positive[-1]:
        return float("nan")
    share = found.positive / np.maximum(found.positive + found.negative, 1e-300)
    return float((np.diff(found.positive, prepend=0) * share).sum() / found.positive[-1])


def estimates(
    statistics: Mapping[str, Callable[[Levels], float]],
    score: np.ndarray,
    positive: np.ndarray,
    group: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Returns each statistic of the levels with its interval, by a bootstrap over the groups.

    A resample has as many groups, drawn with replacement. The interval is symmetric on the scale of
    log(x / (1 - x)): the value plus and minus the standard deviation over the resamples, times the
    quantile of Student's t with g - 1 degrees of freedom for g groups. The percentiles of the
    resamples would be too narrow for few groups; they are used where a value is 0 or 1.

    Args:
        statistics: {name: a function of Levels with values from 0 to 1}.
        score: (m,), higher for more likely positive.
        positive: (m,) bool.
        group: (m,) int, the group of each example; None: every example is its own.
        resamples: number of resamples.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    of_weights = _Levels(score, positive)
    _, member = np.unique(np.arange(len(score)) if group is None else group, return_inverse=True)
    count = member.max() + 1
    whole = {name: f(of_weights(np.ones(len(score)))) for name, f in statistics.items()}
    drawn: dict[str, list[float]] = {name: [] for name in statistics}
    for times in rng.multinomial(count, np.full(count, 1 / count), resamples):
        found = of_weights(times[member].astype(np.float64))
        for name, statistic in statistics.items():
            drawn[name].append(statistic(found))
    return {name: Estimate(x, *_interval(x, drawn[name], count)) for name, x in whole.items()}


def _interval(value: float, drawn: list[float], count: int) -> tuple[float, float]:
    known = np.array([x for x in drawn if np.isfinite(x)])
    if not np.isfinite(value) or len(known) < 2 or count < 2:
        return float("nan"), float("nan")
    if not 0 < value < 1 or not ((known > 0) & (known < 1)).all():
        low, high = np.quantile(known, (0.025, 0.975))
        return float(low), float(high)
    reach = student.ppf(0.975, count - 1) * np.std(np.log(known / (1 - known)), ddof=1)
    middle = np.log(value / (1 - value))
    return tuple(float(1 / (1 + np.exp(-(middle + sign * reach)))) for sign in (-1, 1))


class _Levels:
    """Computes levels for many weights of the same examples, which are sorted once."""

    def __init__(self, score: np.ndarray, positive: np.ndarray):
        ascending, level = np.unique(score, return_inverse=True)
        self._scores = ascending[::-1]
        self._level = len(ascending) - 1 - level
        self._positive = np.asarray(positive, bool)

    def __call__(self, weight: np.ndarray) -> Levels:
        k = len(self._scores)
        parts = (
            np.bincount(self._level[chosen], weight[chosen], k)
            for chosen in (self._positive, ~self._positive)
        )
        return Levels(self._scores, *map(np.cumsum, parts))


# --- Calibration ---


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """Returns T > 0 that minimises the cross-entropy of softmax(logits / T), from 1/20 to 20.

    C. Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599.

    Args:
        logits: (m, n).
        label: (m,) int.
    """

    def loss(log_t):
        return -log_softmax(np.float64(logits) / np.exp(log_t), axis=1)[rows, label].mean()

    rows, reach = np.arange(len(label)), np.log(20)
    return float(np.exp(minimize_scalar(loss, bounds=(-reach, reach), method="bounded").x))


def calibration_error(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Returns the expected calibration error of the predicted class, by 15 bins of equal width.

        ECE = sum_b m_b / m |accuracy_b - confidence_b|

    Args:
        probabilities: (m, n).
        label: (m,) int.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == label
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(number, confidence - right, BINS)
    return float(np.abs(gaps).sum() / len(label))
