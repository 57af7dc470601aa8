"""The operating point of a classifier: from which probability on is an image called positive?"""

from typing import Any, NamedTuple

from etils import epath

from cv_jax.config.errors import UserError
from cv_jax.trained.load import Trained
from cv_jax.workdir.files import read_json

FILE = "assessment.json"  # in the work directory; cv_jax.tools.assess writes it


class Point(NamedTuple):
    """The operating point of one network.

    Attributes:
        run, step, tta: the network and its test-time views, to which the other values belong.
        positive: the class that is looked for.
        temperature: what logits are divided by, so that probabilities are calibrated.
        threshold: the least calibrated probability that is called positive.
    """

    run: str
    step: int
    tta: str
    positive: str
    temperature: float
    threshold: float


def read_point(workdir: epath.Path, trained: Trained) -> Point | None:
    """Reads the operating point of a network; None if there is none for it and its views.

    Raises:
        UserError: the file is damaged.
    """
    if not (workdir / FILE).exists():
        return None
    try:
        point = Point(**read_json(workdir / FILE)["point"])
        _ = float(point.temperature), float(point.threshold)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{workdir / FILE} has no operating point: run cv_jax.tools.assess again, or remove it."
        ) from error
    network = trained.name, int(trained.state.step), trained.tta
    return point if (point.run, point.step, point.tta) == network else None


def with_point(values: dict[str, Any], point: Point) -> dict[str, Any]:
    """Returns the description of a prediction with calibrated probabilities and "positive"."""
    shares = {name: x ** (1 / point.temperature) for name, x in values["probabilities"].items()}
    total = sum(shares.values())
    shares = {name: x / total for name, x in shares.items()}
    is_positive = shares[point.positive] >= point.threshold
    return {**values, "probabilities": shares, "positive": is_positive}
