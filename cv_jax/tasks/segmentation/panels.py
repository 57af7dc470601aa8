"""The panels of a report about a segmenter: IoU by class, and its worst images."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cv_jax.data.fields import IGNORED, Examples, take
from cv_jax.tasks import Panel
from cv_jax.tasks.segmentation import scores
from cv_jax.tasks.segmentation.pictures import draw, palette

WORST = 6  # images, each with its mask and the prediction
SWATCH = 24  # pixels a side of a class's colour


def make_panels(
    names: Sequence[str],
) -> Callable[[Examples, Mapping[str, np.ndarray]], list[Panel]]:
    """Returns (examples, predictions) -> panels: numbers, colours, worst images, mistakes."""

    def panels(examples, predictions):
        counts = scores.count(predictions["mask"], examples["mask"], len(names))
        return [
            Panel("Intersection over union of each class", _numbers(names, counts)),
            _colours(names),
            _worst(names, counts, examples, predictions),
            Panel("Classes taken for others", _confused(names, counts)),
        ]

    return panels


def _numbers(names, counts):
    iou = scores.class_iou(counts.confusion.sum(0))
    share = counts.confusion.sum((0, 2)) / max(1, counts.confusion.sum())
    rows = [
        f"{name} {100 * x:.1f} % ({100 * part:.1f} % of the pixels)"
        for name, x, part in zip(names, iou, share, strict=True)
        if not np.isnan(x)
    ]
    low, high = scores.interval(counts)
    found = scores.numbers(names, counts)
    return (
        f"{', '.join(rows)}. The mean is {100 * found['mIoU']:.1f} %. Its 95 % interval, by a "
        f"bootstrap over these {len(counts.confusion):,} images, is {100 * low:.1f} to "
        f"{100 * high:.1f} %. F1 of the boundaries: {_percent(found['boundary_f1'])}."
    )


def _percent(share):
    return "unknown" if np.isnan(share) else f"{100 * share:.1f} %"


def _colours(names):
    colours = palette(len(names) + 1)[1:]
    pictures = tuple(np.broadcast_to(x, (SWATCH, SWATCH, 3)).copy() for x in colours)
    return Panel("Colours of the classes", "", pictures, tuple(names))


def _worst(names, counts, examples, predictions):
    right = np.trace(counts.confusion, axis1=1, axis2=2) / np.maximum(
        counts.confusion.sum((1, 2)), 1
    )
    pictures, captions = [], []
    for i in np.argsort(right, kind="stable")[:WORST]:
        example, prediction = take(examples, i), take(predictions, i)
        wrong = (example["mask"] != prediction["mask"]) & (example["mask"] != IGNORED)
        pictures += [
            draw(names, example),
            draw(names, example, prediction),
            draw(["wrong"], example, {"mask": np.where(wrong, 0, IGNORED)}),
        ]
        captions += ["data", f"predicted, {100 * right[i]:.1f} % right", "wrong pixels in red"]
    text = (
        "Images with the fewest right pixels: the classes of the data, those predicted, mistakes."
    )
    return Panel("The worst images", text, tuple(pictures), tuple(captions))


def _confused(names, counts):
    confusion = counts.confusion.sum(0).astype(float)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    order = np.argsort(-share, axis=None, kind="stable")[:10]
    pairs = [np.unravel_index(i, share.shape) for i in order]
    shown = [
        f"{100 * share[i, j]:.0f} % of {names[i]} as {names[j]}"
        for i, j in pairs
        if share[i, j] >= 0.005
    ]
    return f"{', '.join(shown)}." if shown else "None."
