"""Pictures show what they were given, whatever is in a name."""

import numpy as np
from matplotlib import rc_context

from cv_jax.workdir.figures import (
    STYLE,
    draw_bars,
    draw_confusion,
    draw_map,
    draw_reliability,
    draw_sweep,
)
from cv_jax.workdir.metric import Metric


def rasterize(figure):
    """Returns a figure on white as (h, w, 3) uint8."""
    figure.set_facecolor("white")
    with rc_context(STYLE):
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def test_a_confusion_matrix_is_dark_on_a_perfect_diagonal():
    image = rasterize(draw_confusion(np.diag([3, 5]), ["a <b>", "c"]))
    assert image.ndim == 3
    assert image.dtype == np.uint8
    perfect = rasterize(draw_confusion(np.diag([5.0, 5]), ["a", "b"])).mean()
    assert perfect < rasterize(draw_confusion(np.full((2, 2), 0.0), ["a", "b"])).mean()


def test_a_dollar_in_the_name_of_a_class_is_no_formula():
    names = ["c $x$", "$\\nonsense$"]  # the second would be an error
    rasterize(draw_confusion(np.eye(2), names))
    rasterize(draw_bars(dict.fromkeys(names, 0.5)))
    rasterize(draw_map(np.eye(2), np.arange(2), names))


def test_a_setting_that_has_diverged_is_left_out_of_the_picture_of_a_sweep():
    points = [
        {"setting": {"lr": lr}, "val": {"accuracy": {"mean": mean, "std": None, "n": 1}}}
        for lr, mean in ((0.1, 0.9), (0.2, 0.8), (9.0, None))
    ]
    line, *_, best = draw_sweep(points, {"lr": 0.1}, "accuracy", Metric("%")).axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [90.0, 80.0, np.nan])
    np.testing.assert_array_equal(best.get_ydata(), [90.0])


def test_the_legend_of_a_reliability_diagram_covers_no_bar():
    figure = draw_reliability([[1] * 15, [1] * 15, [1.0] * 15])  # a bar everywhere, to the top
    rasterize(figure)
    (axes,) = figure.axes
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_a_sweep_of_which_all_have_diverged_is_drawn_without_points():
    accuracy = {"mean": None, "std": None, "n": 1}
    points = [{"setting": {"lr": lr}, "val": {"accuracy": accuracy}} for lr in (1, 2)]
    line, *_, best = draw_sweep(points, {"lr": 1}, "accuracy", Metric("%")).axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, np.nan])
    np.testing.assert_array_equal(best.get_ydata(), [np.nan])


def test_the_axis_of_a_sweep_says_what_is_better():
    points = [
        {"setting": {"lr": lr}, "val": {"distance": {"mean": mean, "std": 1.0, "n": 3}}}
        for lr, mean in ((0.1, 9.0), (0.2, 8.0))
    ]
    points.append({"setting": {"lr": 0.3}, "val": {}})  # no distance was measured
    (axes,) = draw_sweep(points, {"lr": 0.2}, "distance", Metric("px", "lower")).axes
    assert axes.get_ylabel() == "distance on val, px (lower is better)"
    line, *_, best = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), [9.0, 8.0, np.nan])
    np.testing.assert_array_equal(best.get_ydata(), [8.0])
