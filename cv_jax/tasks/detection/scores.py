"""The numbers of a detector on a split, and those of a trivial one."""

from collections.abc import Mapping, Sequence

import numpy as np

from cv_jax.data.fields import Examples
from cv_jax.tasks.detection.average_precision import (
    average_precision,
    joined,
    match_coco,
    match_voc,
    of_class,
)
from cv_jax.workdir.metric import Metric

_OBJECTS = ("boxes", "box_label", "difficult", "crowd")
_75 = 5  # the position of 0.75 in average_precision.OVERLAPS


def metrics(names: Sequence[str], tta: str) -> dict[str, Metric]:
    """Returns the metrics of a data set with these classes."""
    difficult = f"difficult objects and crowds ignored, views {tta}"
    area = f"VOC from 2010 on: overlap 0.5, all recalls, {difficult}"
    own = {
        "AP50": Metric("%", protocol=f"mean over the classes; {area}"),
        "AP50_eleven": Metric("%", protocol=f"VOC 2007: overlap 0.5, eleven recalls, {difficult}"),
        "AP75": Metric("%", protocol=f"COCO: overlap 0.75, 101 recalls, {difficult}"),
        "AP": Metric("%", protocol=f"COCO: overlaps 0.5 to 0.95, 101 recalls, {difficult}"),
    }
    return own | {f"AP50/{name}": Metric("%", protocol=area) for name in names}


def add(fold: list, predictions: Examples, examples: Examples) -> list:
    """Adds the predictions of a batch, and the objects that are there."""
    return [*fold, (predictions, {name: examples[name] for name in _OBJECTS})]


def finish(names: Sequence[str], fold: list) -> dict[str, float]:
    """Returns the metrics; NaN where a prediction is not finite.

    A class without an object to find has no AP, and does not count in the means.
    """
    found, objects = (_joined([pair[i] for pair in fold]) for i in (0, 1))
    return numbers(names, objects, found)


def numbers(
    names: Sequence[str], examples: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns the metrics of predictions beside the objects, see `average_precision.of_class`."""
    keys = ("AP50", "AP50_eleven", "AP75", "AP", *(f"AP50/{name}" for name in names))
    if not all(np.isfinite(found[name]).all() for name in ("boxes", "scores")):
        return dict.fromkeys(keys, float("nan"))
    rows = []
    for number in range(len(names)):
        images = of_class(number, examples, found)
        voc = match_voc(images)
        coco = average_precision(match_coco(images), "coco")
        rows.append(
            (
                average_precision(voc, "area"),
                average_precision(voc, "eleven"),
                coco[_75],
                coco.mean(),
            )
        )
    of_classes = np.array(rows)
    known = ~np.isnan(of_classes[:, 0])
    means = of_classes[known].mean(0) if known.any() else np.full(4, np.nan)
    return {key: float(x) for key, x in zip(keys, [*means, *of_classes[:, 0]], strict=True)}


def interval(
    num_classes: int,
    examples: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    resamples: int = 1000,
) -> tuple[float, float]:
    """Returns the 95 % interval of AP50 over images, by the percentiles of a bootstrap.

    It says how much AP50 would vary with other images of the same kind, for this one network.
    """
    rng = np.random.default_rng(0)
    each = [
        [match_voc([image]) for image in of_class(number, examples, found)]
        for number in range(num_classes)
    ]
    values = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(examples["boxes"]), len(examples["boxes"]))
        of_classes = [
            average_precision(joined([parts[i] for i in chosen]), "area") for parts in each
        ]
        if not np.isnan(of_classes).all():
            values.append(np.nanmean(of_classes))
    low, high = np.quantile(values, (0.025, 0.975)) if values else (np.nan, np.nan)
    return float(low), float(high)


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def frequent_places(
    names: Sequence[str], count: int, train: Examples, examples: Examples
) -> dict[str, float]:
    """Returns the metrics of predicting for every image the same boxes.

    They are the mean box of each class, at the places where train has most of the class's centres,
    on a grid of half a box; the score is how often a training image has a centre in that cell.
    """
    places = []
    for number in range(len(names)):
        boxes = train["boxes"][train["box_label"] == number]
        if len(boxes):
            places += [(number, *place) for place in _places(boxes, len(train["boxes"]))]
    places.sort(key=lambda place: -place[1])
    classes, scores, boxes = zip(*places[:count], strict=True)
    rows = len(examples["boxes"])
    found = {"classes": np.array(classes), "scores": np.array(scores), "boxes": np.array(boxes)}
    repeated = {name: np.broadcast_to(x, (rows, *x.shape)) for name, x in found.items()}
    return numbers(names, examples, repeated)


def _places(boxes: np.ndarray, num_images: int) -> list[tuple[float, np.ndarray]]:
    """Returns (score, box) of the mean box at every cell with a centre."""
    half = (boxes[:, 2:] - boxes[:, :2]).mean(0) / 2
    cells, counts = np.unique(
        np.floor((boxes[:, :2] + boxes[:, 2:]) / 2 / half), axis=0, return_counts=True
    )
    middles = (cells + 0.5) * half
    whole = np.concatenate([middles - half, middles + half], axis=1)
    return [(count / num_images, box) for count, box in zip(counts, whole, strict=True)]
