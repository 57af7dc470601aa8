"""The panels of a report about a detector: its curves, and its mistakes as pictures."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from cv_jax.augment.warp import area_of
from cv_jax.data.fields import Examples, take
from cv_jax.tasks import Panel
from cv_jax.tasks.detection.average_precision import (
    average_precision,
    curve,
    match_voc,
    of_class,
    overlaps,
)
from cv_jax.tasks.detection.pictures import draw
from cv_jax.tasks.detection.scores import interval

PICTURES = 12
MISTAKES = 24
AROUND = 1.6  # sides of the cut around a mistake, in sides of its box
CUT = 96  # pixels a side of the picture of a mistake


def make_panels(
    names: Sequence[str], threshold: float
) -> Callable[[Examples, Mapping[str, np.ndarray]], list[Panel]]:
    """Returns (examples, predictions) -> panels: detections, curves, sizes and mistakes."""

    def panels(examples, predictions):
        count = min(PICTURES, len(examples["boxes"]))
        drawn = tuple(
            draw(names, threshold, take(examples, i), take(predictions, i)) for i in range(count)
        )
        text = f"The first {count} test images. Detections have a score of {threshold} or more."
        missed, wrong = mistakes(examples, predictions, threshold)
        return [
            Panel("Detections", text, drawn, ("",) * count),
            _curves(names, examples, predictions),
            Panel("Objects by size", _sizes(examples, missed)),
            _cuts(
                "The largest missed objects",
                [(i, box, names[number]) for _, i, box, number in missed],
                examples,
            ),
            _cuts(
                "The most confident false alarms",
                [(i, box, f"{names[number]} {100 * score:.0f}") for score, i, box, number in wrong],
                examples,
            ),
        ]

    return panels


def mistakes(
    examples: Examples, predictions: Mapping[str, np.ndarray], threshold: float
) -> tuple[list[tuple], list[tuple]]:
    """Returns the missed objects and the false alarms at a score of `threshold`.

    Both are (rank, image, box, class), highest rank first. The rank of an object is its area, and
    that of a false alarm its score. An object is found by a detection of its class that overlaps by
    half; difficult objects and crowds are neither missed, nor are detections of them false.
    """
    missed, wrong = [], []
    for number in np.unique(np.append(examples["box_label"], predictions["classes"])):
        if number < 0:
            continue
        for i, image in enumerate(of_class(number, examples, predictions)):
            found = image.found[image.scores >= threshold]
            shared = overlaps(found, image.boxes, image.crowd) >= 0.5
            for box, hit, ignored in zip(image.boxes, shared.any(0), image.ignored, strict=True):
                if not hit and not ignored:
                    missed.append((float(area_of(box)), i, box, number))
            for box, score, hit in zip(found, image.scores, shared.any(1), strict=False):
                if not hit:
                    wrong.append((float(score), i, box, number))
    return tuple(sorted(rows, key=lambda row: -row[0]) for rows in (missed, wrong))


def _curves(names, examples, predictions):
    from cv_jax.workdir.figures import draw_precision, to_pixels  # here: Matplotlib is slow

    curves, shown = {}, []
    for number, name in enumerate(names):
        matches = match_voc(of_class(number, examples, predictions))
        if matches.num_objects:
            curves[name] = curve(matches)
            share = float(average_precision(matches, "area"))
            shown.append(f"{name} {100 * share:.1f} % of {matches.num_objects:,}")
    picture = to_pixels(draw_precision(curves))
    low, high = interval(len(names), examples, predictions)
    text = (
        f"Average precision at an overlap of 0.5: {', '.join(shown)} objects. The 95 % interval of "
        f"the mean over the classes, by a bootstrap over these {len(examples['boxes']):,} images, "
        f"is {100 * low:.1f} to {100 * high:.1f} %."
    )
    return Panel("Precision and recall of each class", text, (picture,), ("",))


def _sizes(examples, missed):
    """Returns the recall of the objects by the side of a square of the same area, in words."""
    counts = (examples["box_label"] >= 0) & ~examples["difficult"] & ~examples["crowd"]
    boxes = examples["boxes"][counts]
    side = np.sqrt(area_of(boxes))
    if not len(side):
        return "There are no objects."
    of_missed = np.sqrt([area for area, *_ in missed])
    edges = np.unique(np.quantile(side, [0, 0.25, 0.5, 0.75, 1]))
    parts = []
    for low, high in zip(edges, [*edges[1:-1], np.inf], strict=False):
        total, lost = (((x >= low) & (x < high)).sum() for x in (side, of_missed))
        end = f"to {high:.0f}" if np.isfinite(high) else f"to {edges[-1]:.0f}"
        parts.append(f"{100 * (1 - lost / total):.1f} % of {low:.0f} {end}")
    return (
        "Share of the objects found, by the side in pixels of a square of the same area: "
        f"{', '.join(parts)}."
    )


def _cuts(title, rows, examples):
    """Returns a panel of the first rows (image, box, caption), cut out with their surroundings."""
    pictures, captions = [], []
    for i, box, caption in rows[:MISTAKES]:
        marked = {"boxes": box[None], "box_label": np.zeros(1, int)}
        whole = Image.fromarray(draw([""], 0, {"image": examples["image"][i], **marked}))
        box = box * (whole.width / examples["image"].shape[2])
        centre, half = (box[:2] + box[2:]) / 2, AROUND * (box[2:] - box[:2]).max() / 2
        around = (*(centre - half), *(centre + half))
        pictures.append(np.asarray(whole.crop([int(x) for x in around]).resize((CUT, CUT))))
        captions.append(caption)
    total = f"{len(rows):,} in the test images shown to this report." if rows else "None."
    return Panel(title, total, tuple(pictures), tuple(captions))
