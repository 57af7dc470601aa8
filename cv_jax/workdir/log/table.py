"""Formats the rows that a training prints on the console."""

from typing import NamedTuple

from tqdm import tqdm

from cv_jax.workdir.metric import Metric


class Table(NamedTuple):
    """The columns: the loss and the headline of training steps and of val, and the speed.

    Attributes:
        headline: name of the metric that ranks runs.
        metric: its meaning.
        examples: the plural of one example, "images" or "examples".
    """

    headline: str
    metric: Metric
    examples: str

    def head(self) -> str:
        """Returns the line above the rows."""
        cells = [f"{name:>{width}}" for _, name, width, _ in self._columns()]
        return " ".join([f"{'epoch':>7} {'step':>8}", *cells, f"{'elapsed':>8}"])

    def row(self, values: dict[str, float | None], epoch: float, elapsed: float) -> str:
        """Returns a row.

        Args:
            values: "step", and the value of each column. A missing value leaves its cell empty;
                None is shown as "-", for a metric that training steps do not measure.
            epoch: of the step.
            elapsed: seconds since the start.
        """

        def cell(key, width, form):
            if key not in values:
                return " " * width
            value = values[key]
            return f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"

        cells = [cell(key, width, form) for key, _, width, form in self._columns()]
        ends = f"{epoch:>7.2f} {values['step']:>8}", f"{tqdm.format_interval(elapsed):>8}"
        return " ".join([ends[0], *cells, ends[1]])

    def _columns(self) -> list[tuple[str, str, int, str]]:
        """Returns (key in `values`, header, width, number format) of each column."""
        form = ".2%" if self.metric.unit == "%" else ".4f"
        name, on_val = self.headline, f"val {self.headline}"
        short = on_val if len(on_val) <= 8 else f"val {name[:3]}"
        train = [("loss", "loss", 8, ".4f"), (name, name, max(8, len(name)), form)]
        val = [("val loss", "val loss", 9, ".4f"), (on_val, short, 8, form)]
        if name == "loss":
            train, val = train[:1], val[:1]
        speed = f"{self.examples}/s"
        return [
            ("lr", "lr", 9, ".3g"),
            *train,
            *val,
            (f"{self.examples}_per_second", speed, max(9, len(speed)), ",.0f"),
        ]
