"""Assesses a classifier as a diagnostic test: AUC, sensitivity, calibration, with intervals.

    python -m cv_jax.tools.assess --workdir=runs/a --positive=tumour --specificity=0.95

Predicts val and test with the network of a run. One class is `positive`; its score is its
probability. The program prints, for val and test:

- AUC, average precision, and the sensitivity at the given specificity, each with its 95 % interval
  over groups: patients, slides, or whatever the field `group` of the data set is. Without that
  field, the interval is over examples;
- the calibration error and the loss before and after the logits are divided by one temperature,
  which is fitted on val;
- sensitivity and specificity at the operating point: the lowest threshold that has the given
  specificity on val;
- how many images look like one of train: their brightness rises and falls at the same places.

WORKDIR/assessment.json has the same. From then on, cv_jax.tools.predict divides the logits of this
run by the temperature, and says whether an image is positive at the operating point.

Exit codes: 0 done; 2 user error (see the message).
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from scipy.special import log_softmax

from cv_jax.config.errors import UserError, first_line, nearest
from cv_jax.data import Dataset, load_dataset
from cv_jax.data.fields import Examples, num_examples, take
from cv_jax.learn import diagnostics
from cv_jax.learn.diagnostics import Estimate
from cv_jax.runtime.startup import check_platform, prepare_jax
from cv_jax.tools.command import add_run_arguments, command, make_parser
from cv_jax.trained.load import (
    Trained,
    check_finite_predictions,
    check_same_fields,
    load_trained,
    make_predict,
)
from cv_jax.trained.point import FILE, Point
from cv_jax.workdir.bucket import work_directory
from cv_jax.workdir.files import write_json

PART = 500  # images that are predicted, or compared, at a time


def assess(trained: Trained, data: Dataset, positive: str, specificity: float) -> dict[str, Any]:
    """Returns the assessment of a network as JSON values: the operating point, val and test.

    Raises:
        UserError: the network is no classifier of `positive`, or the data have no val.
    """
    names = trained.spec.class_names
    number = _find_class(trained, names, positive)
    if not num_examples(data.val):
        raise UserError(
            "The run has no val, on which temperature and operating point are chosen: train with "
            "config.data.num_val or config.data.val_fraction."
        )
    logits = {split: _logits(trained, getattr(data, split)) for split in ("val", "test")}
    temperature = diagnostics.fit_temperature(logits["val"], data.val["label"])
    score = {split: _probabilities(x, temperature)[:, number] for split, x in logits.items()}
    found = diagnostics.levels(score["val"], data.val["label"] == number)
    threshold = diagnostics.threshold_at(found, specificity)
    if not np.isfinite(threshold):
        raise UserError(
            f"No threshold has a specificity of {specificity:g} on val: its most confident image "
            "is a negative one, and there are too few. Lower --specificity, or enlarge val."
        )
    network = trained.name, int(trained.state.step), trained.tta
    point = Point(*network, positive, temperature, threshold)
    known = _hashes(data.train["image"])
    values: dict[str, Any] = {"point": point._asdict(), "specificity": specificity}
    for split in ("val", "test"):
        examples = getattr(data, split)
        values[split] = {
            "images": num_examples(examples),
            "groups": len(np.unique(examples["group"])) if "group" in examples else None,
            **_estimates(score[split], examples, number, specificity),
            **_at_point(score[split], examples["label"] == number, threshold),
            **_calibration(logits[split], examples["label"], temperature),
            "like_train": _num_like(_hashes(examples["image"]), known),
        }
    return values


def _find_class(trained: Trained, names: Sequence[str], positive: str) -> int:
    if trained.config.task != "classification":
        raise UserError(
            f"config.task={trained.config.task!r} of this run predicts no class: choose the work "
            "directory of a classification."
        )
    if positive not in names:
        raise UserError(
            f"--positive={positive!r} is not a class.{nearest(positive, names)} There are: "
            f"{', '.join(names)}."
        )
    return names.index(positive)


def _logits(trained: Trained, examples: Examples) -> np.ndarray:
    predict, parts = make_predict(trained, PART), []
    for start in range(0, num_examples(examples), PART):
        part = take({name: examples[name] for name in trained.task.inputs}, _part(start))
        parts.append(np.asarray(predict({k: np.asarray(x) for k, x in part.items()})["logits"]))
    logits = np.concatenate(parts).astype(np.float64)
    check_finite_predictions({"logits": logits})
    return logits


def _part(start: int) -> slice:
    return slice(start, start + PART)


def _probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    return np.exp(log_softmax(logits / temperature, axis=1))


def _estimates(
    score: np.ndarray, examples: Examples, number: int, specificity: float
) -> dict[str, Any]:
    statistics = {
        "auc": diagnostics.auc,
        "average_precision": diagnostics.precision_area,
        "sensitivity": lambda found: diagnostics.sensitivity_at(found, specificity),
    }
    found = diagnostics.estimates(
        statistics, score, examples["label"] == number, examples.get("group")
    )
    return {name: _to_json(estimate) for name, estimate in found.items()}


def _to_json(estimate: Estimate) -> dict[str, float | None]:
    return {k: x if np.isfinite(x) else None for k, x in estimate._asdict().items()}


def _at_point(score: np.ndarray, positive: np.ndarray, threshold: float) -> dict[str, Any]:
    called = score >= threshold
    shares = {
        "point_sensitivity": called[positive],
        "point_specificity": ~called[~positive],
    }
    return {name: float(x.mean()) if len(x) else None for name, x in shares.items()}


def _calibration(logits: np.ndarray, label: np.ndarray, temperature: float) -> dict[str, float]:
    found = {}
    for when, t in (("before", 1.0), ("after", temperature)):
        shares = _probabilities(logits, t)
        found[f"calibration_error_{when}"] = diagnostics.calibration_error(shares, label)
        loss = -log_softmax(logits / t, axis=1)[np.arange(len(label)), label].mean()
        found[f"loss_{when}"] = float(loss)
    return found


def _hashes(images: Any) -> np.ndarray:
    """Returns a number (m,) uint64 for each image: where its brightness rises to the right.

    Images are shrunk to 8 rows of 9 grey pixels (difference hash). A plain image has 0.
    """
    bits = np.zeros((len(images), 64), bool)
    for start in range(0, len(images), PART):
        part = np.asarray(images[_part(start)]).mean(-1, dtype=np.float32)
        for row, image in zip(bits[_part(start)], part, strict=True):
            small = cv2.resize(image, (9, 8), interpolation=cv2.INTER_AREA)
            row[:] = (small[:, 1:] > small[:, :-1]).ravel()
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _num_like(hashes: np.ndarray, known: np.ndarray) -> int:
    """Returns how many images have a hash among the known ones; plain images do not count."""
    return int((np.isin(hashes, known) & (hashes != 0)).sum())


def in_lines(values: dict[str, Any]) -> list[str]:
    """Returns an assessment as lines of text."""
    point, lines = values["point"], []
    for split in ("val", "test"):
        of = values[split]
        groups = f" of {of['groups']:,} groups" if of["groups"] else ""
        lines.append(f"{split}: {of['images']:,} images{groups}, 95 % intervals in brackets")
        for name, shown in (
            ("auc", "AUC"),
            ("average_precision", "average precision"),
            ("sensitivity", f"sensitivity at a specificity of {values['specificity']:g}"),
        ):
            lines.append(f"  {shown} {_shown(of[name])}")
        lines.append(
            f"  at the operating point: sensitivity {_number(of['point_sensitivity'])}, "
            f"specificity {_number(of['point_specificity'])}"
        )
        lines.append(
            f"  calibration error {of['calibration_error_before']:.4f}, with the temperature "
            f"{of['calibration_error_after']:.4f}; loss {of['loss_before']:.4f}, "
            f"{of['loss_after']:.4f}"
        )
        lines.append(f"  {of['like_train']:,} images look like one of train")
    lines.append(
        f"operating point: {point['positive']} from a probability of {point['threshold']:.4g} on, "
        f"temperature {point['temperature']:.4g}"
    )
    return lines


def _shown(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return "unknown: it needs positive and negative images"
    if estimate["low"] is None:
        return f"{estimate['value']:.4f}"
    return f"{estimate['value']:.4f} ({estimate['low']:.4f} to {estimate['high']:.4f})"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


@command("assess")
def main() -> None:
    """Reads the command line, prints the assessment and writes it to the work directory."""
    parser = make_parser(__doc__)
    add_run_arguments(parser)
    parser.add_argument("--positive", required=True, help="the class that is looked for")
    parser.add_argument("--specificity", type=float, default=0.95, help="between 0 and 1")
    arguments = parser.parse_args()
    if not 0 < arguments.specificity < 1:
        parser.error(f"--specificity={arguments.specificity} must lie between 0 and 1")
    prepare_jax()
    check_platform()
    workdir = work_directory(arguments.workdir)
    if workdir.suffix == ".safetensors":
        raise UserError(f"--workdir={workdir} is a file: name a work directory, to write to it.")
    trained = load_trained(workdir, arguments.run, arguments.tta)
    data = load_dataset(trained.config.data)
    check_same_fields(data.spec, trained.spec)
    values = assess(trained, data, arguments.positive, arguments.specificity)
    print("\n".join(in_lines(values)))
    try:
        write_json(workdir / FILE, values)
    except OSError as error:
        raise UserError(f"{workdir / FILE} cannot be written ({first_line(error)}).") from error


if __name__ == "__main__":
    main()
