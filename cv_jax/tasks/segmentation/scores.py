"""The numbers of a segmenter on a split, and those of a trivial one.

Pixels are counted in whole numbers, in the confusion matrix of the whole split, and only then
divided. The mean over batches or images of an IoU would be another number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from cv_jax.data.dataset import some_masks
from cv_jax.data.fields import IGNORED, Examples
from cv_jax.workdir.metric import Metric

RESAMPLES = 1000
TOLERANCE = 0.0075  # of the diagonal: how far a boundary may be off


class Counts(NamedTuple):
    """Pixel counts of each image, in whole numbers.

    Attributes:
        confusion: (k, n, n) int64, pixels of each image by true class and predicted class.
        boundary: (k, n, 4) int64, for each class of an image: predicted boundary pixels, those of
            them near a true boundary, true boundary pixels, those of them near a predicted one.
    """

    confusion: np.ndarray
    boundary: np.ndarray


def metrics(names: Sequence[str], size: Sequence[int], tta: str) -> dict[str, Metric]:
    """Returns the metrics of masks of `size` with these classes."""
    shown = "x".join(map(str, size))
    counted = f"pixels of {shown} masks summed over all images, 255 ignored, views {tta}"
    of_class = Metric("%", protocol=f"intersection over union; {counted}")
    near = boundary_tolerance(size)
    boundary = f"boundaries at most {near} pixels apart, counted over all images"
    return {
        "mIoU": Metric("%", protocol=f"mean IoU of the classes that occur; {counted}"),
        "pixel_accuracy": Metric("%", protocol=counted),
        "boundary_f1": Metric("%", protocol=f"mean over the classes that occur; {boundary}"),
        **{f"iou/{name}": of_class for name in names},
    }


def boundary_tolerance(size: Sequence[int]) -> int:
    """Returns 0.75 % of the diagonal of (h, w), in whole pixels, rounded up.

    G. Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013.
    """
    return max(1, math.ceil(TOLERANCE * math.hypot(*size)))


def count(predicted: np.ndarray, masks: np.ndarray, n: int, boundaries: bool = True) -> Counts:
    """Counts the pixels of predicted classes (k, h, w) beside masks (k, h, w), both uint8."""
    masks = np.asarray(masks)  # decoded once
    confusion = np.stack([_confusion(*pair, n) for pair in zip(masks, predicted, strict=True)])
    boundary = np.zeros((len(masks), n, 4), np.int64)
    if boundaries:
        near = boundary_tolerance(masks.shape[1:])
        for one, pair in zip(boundary, zip(masks, predicted, strict=True), strict=True):
            one[:] = _boundaries(*pair, n, near)
    return Counts(confusion, boundary)


def joined(parts: Sequence[Counts]) -> Counts:
    """Returns the counts of all images of the parts."""
    return Counts(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def numbers(names: Sequence[str], counts: Counts, boundaries: bool = True) -> dict[str, float]:
    """Returns the metrics of counts; the IoU of a class that is nowhere is NaN.

    `boundaries`: whether they were counted, and boundary_f1 is a metric.
    """
    confusion, boundary = counts.confusion.sum(0), counts.boundary.sum(0)
    iou = class_iou(confusion)
    values = {
        "mIoU": _mean(iou),
        "pixel_accuracy": _ratio(np.trace(confusion), confusion.sum()),
        **{f"iou/{name}": float(x) for name, x in zip(names, iou, strict=True)},
    }
    if boundaries:
        values["boundary_f1"] = _mean(np.array([_f1(*one) for one in boundary]))
    return values


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Returns the IoU (..., n) of confusion matrices (..., n, n): hits / (true + predicted - hits).

    A class that is neither there nor predicted has NaN. One that is only predicted, or only there,
    has 0.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def interval(counts: Counts) -> tuple[float, float]:
    """Returns the 95 % interval of the mean IoU over images, by the percentiles of a bootstrap.

    It says how much the mean IoU would vary with other images of the same kind, for this network.
    """
    rng = np.random.default_rng(0)
    k = len(counts.confusion)
    weights = rng.multinomial(k, np.full(k, 1 / k), RESAMPLES)  # how often an image is drawn
    flat = counts.confusion.reshape(k, -1).astype(np.float64)
    drawn = (weights @ flat).reshape(RESAMPLES, *counts.confusion.shape[1:])
    iou = class_iou(drawn)
    known = ~np.isnan(iou)
    values = np.where(known, iou, 0).sum(1) / np.maximum(known.sum(1), 1)
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def frequent_classes(names: Sequence[str], train: Examples, examples: Examples) -> dict[str, float]:
    """Returns the metrics of predicting at every place the class most frequent there in train."""
    n = len(names)
    masks = some_masks(train["mask"])
    votes = np.stack([(masks == number).sum(0) for number in range(n)])
    overall = np.bincount(masks[masks != IGNORED], minlength=n)
    place = np.where(votes.max(0) > 0, votes.argmax(0), overall.argmax()).astype(np.uint8)
    truth = np.asarray(examples["mask"])
    return numbers(names, count(np.broadcast_to(place, truth.shape), truth, n))


def fold_of(names: Sequence[str], boundaries: bool):
    """Returns the functions `add` and `finish` of a `Collected` evaluation of masks."""

    def add(fold: list, predictions: Mapping[str, np.ndarray], examples: Examples) -> list:
        finite = bool(np.isfinite(predictions["shares"]).all())
        counts = count(predictions["mask"], examples["mask"], len(names), boundaries)
        return [*fold, (finite, counts)]

    def finish(fold: list) -> dict[str, float]:
        found = numbers(names, joined([counts for _, counts in fold]), boundaries)
        finite = all(one for one, _ in fold)
        return found if finite else dict.fromkeys(found, float("nan"))

    return add, finish


def _confusion(mask: np.ndarray, predicted: np.ndarray, n: int) -> np.ndarray:
    counts = mask != IGNORED
    pairs = n * mask[counts].astype(np.int64) + predicted[counts]
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def _boundaries(mask: np.ndarray, predicted: np.ndarray, n: int, near: int) -> np.ndarray:
    """Returns (n, 4), see `Counts.boundary`."""
    predicted = np.where(mask == IGNORED, IGNORED, predicted)
    edges = [np.where(_edges(classes), classes, IGNORED) for classes in (predicted, mask)]
    found = np.zeros((n, 4), np.int64)
    for number in range(n):
        both = [edge == number for edge in edges]
        for i, (here, other) in enumerate((both, both[::-1])):
            total = int(here.sum())
            close = int((_distance(other)[here] <= near).sum()) if total and other.any() else 0
            found[number, 2 * i : 2 * i + 2] = total, close
    return found


def _edges(classes: np.ndarray) -> np.ndarray:
    """Returns which pixels (h, w) have a neighbour of another class beside, above or below."""
    edges = np.zeros(classes.shape, bool)
    for axis in (0, 1):
        first, second = np.delete(classes, -1, axis), np.delete(classes, 0, axis)
        differ = (first != second) & (first != IGNORED) & (second != IGNORED)
        pad = [[0, 0], [0, 0]]
        for pad[axis] in ([0, 1], [1, 0]):
            edges |= np.pad(differ, pad)
    return edges


def _distance(pixels: np.ndarray) -> np.ndarray:
    """Returns the distance of every pixel to the nearest of `pixels`, (h, w) bool."""
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _f1(predicted: int, right: int, true: int, found: int) -> float:
    """Returns the F1 of precision right / predicted and recall found / true; NaN for nothing."""
    if not predicted and not true:
        return float("nan")
    precision, recall = _ratio(right, predicted), _ratio(found, true)
    if not precision > 0 or not recall > 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
