"""Average precision of detections, by the protocols of PASCAL VOC and of COCO. NumPy, on the host.

Both go through the detections of a class from the highest score down, over all images, and match
each with an object of its image. They differ in three ways:

    VOC     the object with the largest overlap is the only candidate: a second detection of an
            object is wrong. Precision is averaged over all recalls ("area", from 2010 on) or at the
            recalls 0, 0.1, ..., 1 ("eleven", until 2009). The overlap is at least 0.5.
    COCO    the candidates are the objects that no detection has taken yet. Precision is averaged at
            101 recalls, over overlaps of 0.5, 0.55, ..., 0.95, for at most 100 detections an image.

Objects that are difficult, and detections of them, count neither for nor against a detector. In a
crowd any number of detections is ignored; their overlap with it is the share of the detection that
lies in it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cv_jax.augment.warp import area_of

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of an image and class that COCO counts


class Image(NamedTuple):
    """Objects and detections of one class in one image.

    Attributes:
        boxes, ignored, crowd: of the g objects, (g, 4), (g,) bool and (g,) bool; `ignored` holds
            of difficult objects and of crowds.
        found, scores: of the d detections, (d, 4) and (d,), highest score first.
    """

    boxes: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray
    found: np.ndarray
    scores: np.ndarray


class Matches(NamedTuple):
    """Detections of a class in all images, highest score first.

    Attributes:
        scores: (d,).
        right, wrong: (..., d) bool; neither where a detection is ignored. COCO has an axis of
            overlaps in front.
        num_objects: how many should be found.
    """

    scores: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    num_objects: int


def of_class(
    number: int,
    examples: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
) -> list[Image]:
    """Picks the objects and detections of a class out of the fields of images.

    Args:
        number: of the class.
        examples: boxes (m, o, 4), box_label (m, o), difficult (m, o), crowd (m, o).
        predictions: boxes (m, d, 4), scores (m, d), classes (m, d).
    """
    images = []
    for i in range(len(examples["boxes"])):
        mine = examples["box_label"][i] == number
        found = np.flatnonzero(predictions["classes"][i] == number)
        order = found[np.argsort(-predictions["scores"][i, found], kind="stable")]
        crowd = examples["crowd"][i][mine]
        images.append(
            Image(
                examples["boxes"][i][mine].astype(np.float64),
                examples["difficult"][i][mine] | crowd,
                crowd,
                predictions["boxes"][i, order].astype(np.float64),
                predictions["scores"][i, order].astype(np.float64),
            )
        )
    return images


def overlaps(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Returns the intersection over union (d, g) of half-open boxes a (d, 4) and b (g, 4).

    For a crowd b, (g,) bool, it is the intersection over the area of a.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = map(area_of, (a, b))
    either = area_a[:, None] + area_b[None] - both
    if crowd is not None:
        either = np.where(crowd[None], area_a[:, None], either)
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def match_voc(images: Sequence[Image], overlap: float = 0.5) -> Matches:
    """Matches detections with objects as PASCAL VOC's development kit does."""
    return joined([_match_voc(image, overlap) for image in images])


def _match_voc(image, overlap):
    shared = overlaps(image.found, image.boxes, image.crowd)
    taken = np.zeros(len(image.boxes), bool)
    right, wrong = np.zeros((2, len(shared)), bool)
    for i, row in enumerate(shared):
        best = int(row.argmax()) if len(row) else -1
        if best < 0 or row[best] < overlap:
            wrong[i] = True
        elif not image.ignored[best]:
            right[i], wrong[i] = not taken[best], taken[best]
            taken[best] = True
    return Matches(image.scores, right, wrong, int((~image.ignored).sum()))


def match_coco(images: Sequence[Image]) -> Matches:
    """Matches detections with objects at each of OVERLAPS, as COCO's evaluation does.

    The first MOST detections of an image count.
    """
    return joined([_match_coco(image) for image in images])


def _match_coco(image):
    order = np.argsort(image.ignored, kind="stable")  # objects that count come first
    boxes, ignored, crowd = (x[order] for x in (image.boxes, image.ignored, image.crowd))
    shared = overlaps(image.found[:MOST], boxes, crowd)
    outcome = [_match_coco_at(shared, ignored, crowd, overlap) for overlap in OVERLAPS]
    right, wrong = (np.stack(x) for x in zip(*outcome, strict=True))
    return Matches(image.scores[:MOST], right, wrong, int((~ignored).sum()))


def _match_coco_at(shared, ignored, crowd, overlap):
    """Returns which detections of an image are right, and which wrong, at one overlap."""
    taken = np.zeros(len(ignored), bool)
    right, wrong = np.zeros((2, len(shared)), bool)
    for i, row in enumerate(shared):
        best, most = -1, min(overlap, 1 - 1e-10)
        for j, share in enumerate(row):
            if taken[j] and not crowd[j]:
                continue
            if best >= 0 and not ignored[best] and ignored[j]:
                break  # an object that counts goes before those that do not
            if share >= most:
                best, most = j, share
        if best < 0:
            wrong[i] = True
        else:
            taken[best] = True
            right[i] = not ignored[best]
    return right, wrong


def joined(parts: Sequence[Matches]) -> Matches:
    """Returns the matches of all images from those of each."""
    scores, right, wrong = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
    order = np.argsort(-scores, kind="stable")
    num_objects = sum(part.num_objects for part in parts)
    return Matches(scores[order], right[..., order], wrong[..., order], num_objects)


def curve(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Returns recall and precision (..., d) after each detection."""
    right, wrong = (np.cumsum(x, axis=-1, dtype=np.float64) for x in matches[1:3])
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    return right / max(matches.num_objects, 1), precision


def average_precision(matches: Matches, how: str) -> np.ndarray:
    """Averages precision over recall; NaN for a class without an object to find.

    At a recall, precision is the highest at this recall or above.

    Args:
        matches: of one class.
        how: "area", "eleven" or "coco"; see above.

    Returns:
        (...,): an axis of overlaps for COCO.
    """
    recall, precision = curve(matches)
    if not matches.num_objects:
        return np.full(recall.shape[:-1], np.nan)
    best = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    if how == "area":
        before = np.concatenate([np.zeros((*recall.shape[:-1], 1)), recall[..., :-1]], axis=-1)
        return ((recall - before) * best).sum(-1)
    points = RECALLS if how == "coco" else np.linspace(0, 1, 11)
    # 1e-9: recalls such as 0.30000000000000004, of 3 of 10 objects, reach 0.3.
    tolerance = 0 if how == "coco" else 1e-9
    best = np.concatenate([best, np.zeros((*best.shape[:-1], 1))], axis=-1)
    found = np.empty((*recall.shape[:-1], len(points)))
    for place in np.ndindex(recall.shape[:-1]):
        at = np.searchsorted(recall[place], points - tolerance, side="left")
        found[place] = best[place][at]
    return found.mean(-1)
