"""The report in a real browser and in numbers: of complete, unfinished, odd and several runs."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.tasks.classification import panels
from cv_jax.tools.report import command as report
from cv_jax.tools.report import examples, page
from cv_jax.tools.report.run import (
    Run,
    calibration_error,
    curve,
    read_run,
)

NAMES = ("<script>alert(1)</script>", "a$b$c", "$\\frac$", '"><img src=x>', *"456789")


def test_the_calibration_error_by_hand():
    # 20 answers are 0.5 sure, 15 of them right (0.75); 30 are 0.9 sure, 24 right (0.8): the first
    # too little, the second too much.
    calibration = [[0, 20, 30], [0, 15, 24], [0, 10.0, 27.0]]
    assert calibration_error(calibration) == pytest.approx(0.4 * 0.25 + 0.6 * 0.1)


def _run(records, result=None, num_seeds=2):
    return Run(Path("r"), {"num_seeds": num_seeds}, {}, records, result)


def test_a_curve_is_mean_and_std_over_the_seeds_that_have_a_number():
    records = [
        {"epoch": 1.0, "split": "val", "values": {"loss": 2.0}, "runs": {"loss": [1.0, 3.0]}},
        {"epoch": 1.0, "split": "train", "values": {"loss": 9.0}},
        {"epoch": 2.0, "split": "val", "values": {"loss": 1.5}, "runs": {"loss": [1.5, None]}},
        {"epoch": 2.0, "split": "final_test", "values": {"loss": 7.0}},
        {"epoch": 4.0, "split": "final_test", "values": {"loss": 8.0}},
    ]
    epoch, mean, std = curve(_run(records), "val", "loss")
    assert epoch.tolist() == [1.0, 2.0]
    assert mean.tolist() == [2.0, 1.5]
    assert std.tolist() == [pytest.approx(2**0.5), 0.0]
    assert curve(_run(records), "final_test", "loss").mean.tolist() == [8.0]
    assert curve(_run(records), "val", "accuracy") is None


def test_the_curve_of_a_sweep_is_that_of_its_best_setting():
    values = {"loss": [1.0, 3.0, 10.0, 20.0]}
    records = [{"epoch": 1.0, "split": "val", "values": {"loss": 8.5}, "runs": values}]
    result = {"best": {"lr": 2}, "sweep": [{"setting": {"lr": 1}}, {"setting": {"lr": 2}}]}
    assert curve(_run(records, result), "val", "loss").mean.tolist() == [15.0]


CONFIG = {
    **{"model": "lenet", "data": {"name": "digits"}, "num_seeds": 2, "optim": {"lr": 0.1}},
    **{"sweep": [["optim.lr", [0.1, 0.3]]]},
}


def _swept(accuracy):
    """A run that swept optim.lr, of which 0.3 is the best, with these accuracies on test."""
    values = [None, None] if accuracy is None else [accuracy, accuracy]
    statistics = {"mean": accuracy, "std": None, "ci95": None, "n": 2, "values": values}
    per_class = {"a": accuracy, "b": None}  # of b there are no images
    test = {"accuracy": statistics, "per_class_accuracy": per_class, "count": 5}
    sweep = [{"setting": {"optim.lr": lr}} for lr in (0.1, 0.3)]
    result = {"test": test, "val": None, "seeds": [0, 1], "best": {"optim.lr": 0.3}, "sweep": sweep}
    return Run(Path("r"), CONFIG, {}, [], result)


def test_the_page_names_the_best_setting_and_compares_its_values():
    assert "Best on val of 2 settings: optim.lr=0.3." in page._heading(_swept(0.5))
    other = Run(Path("q"), {**CONFIG, "optim": {"lr": 0.2}, "sweep": []}, {}, [], None)
    html = page._comparison([_swept(0.5), other], None)
    assert '<th scope="row">optim.lr</th><td>0.3</td><td>0.2</td>' in html


def test_what_has_no_number_has_no_bar():
    drawn = []
    html = page._classes(_swept(0.5), lambda figure, *_: drawn.append(figure) or "")
    (bars,) = drawn
    assert [text.get_text() for text in bars.axes[0].get_yticklabels()] == ["a"]
    assert "Classes without test images have no accuracy: b." in html
    assert page._classes(_swept(None), None) == ""
    assert "2 of 2 seeds diverged: no mean." in page._heading(_swept(None))
    assert "diverged" not in page._heading(_swept(0.5))


METRICS = {
    "distance": {"unit": "px", "better": "lower", "protocol": "nearest of <three>"},
    "hits": {"unit": "%", "better": "higher", "protocol": "within 2 px"},
}


def _distances(mean, **more):
    """A run of a task without classes, whose headline is a distance in pixels."""
    statistics = {"mean": mean, "std": 0.25, "ci95": [1.0, 2.0], "n": 2, "values": [mean, mean]}
    hits = {**statistics, "mean": 0.5, "ci95": [0.4, 0.6]}
    test = {"distance": statistics, "hits": hits, "count": 7, **more}
    result = {
        **{"test": test, "val": None, "seeds": [0, 1], "seconds": {"train": 3.0}},
        **{"headline": "distance", "metrics": METRICS, "examples_are": "examples"},
    }
    values = {"distance": 3.0, "hits": 0.5}
    records = [
        {"epoch": 1.0, "split": "train", "values": {"loss/a": 2.0, "loss/b": 4.0, "lr": 0.1}},
        {"epoch": 1.0, "split": "val", "values": values},
        {"epoch": 2.0, "split": "val", "values": values},
    ]
    return Run(Path("r"), CONFIG, {}, records, result)


def test_the_headline_stands_with_its_unit_and_protocol():
    html = page._numbers(_distances(1.5))
    assert "<strong>1.5000 px <small>± 0.2500</small></strong>" in html
    about = "test distance, 7 examples, mean ± standard deviation of 2 seeds"
    assert f"{about}; nearest of &lt;three&gt;" in html
    assert "hits: within 2 px." in html
    assert "<td>1.0000 px to 2.0000 px</td>" in html
    assert "<td>50.00 %</td><td>25.00 %</td><td>40.00 % to 60.00 %</td>" in html
    none = _distances(1.5)
    del none.result["test"]["distance"]
    assert "test: no distance" in page._numbers(none)


def test_runs_are_compared_by_the_headline_of_the_first():
    def show(figure, name, label):
        drawn[name] = figure.axes[0]
        return ""

    drawn = {}
    other = _distances(2.5)._replace(path=Path("q"))
    html = page._comparison([_distances(1.5), other, _swept(0.5)], show)
    assert "test distance" in html
    assert "<td>1.5000 px</td><td>1.0000 px to 2.0000 px</td>" in html
    assert "<td>2.5000 px</td>" in html
    assert "<td>no distance</td>" in html
    assert drawn["runs_distance"].get_ylabel() == "distance on val, px"


def test_every_metric_of_an_evaluation_has_its_curve():
    def show(figure, name, label):
        drawn[name] = figure.axes[0]
        return ""

    drawn = {}
    page._training(_distances(1.5), show)
    assert list(drawn) == ["loss_a", "loss_b", "distance", "hits", "learning_rate"]
    assert drawn["hits"].get_ylabel() == "hits, %"
    assert drawn["hits"].lines[0].get_ydata().tolist() == [50.0, 50.0]
    assert drawn["distance"].lines[0].get_ydata().tolist() == [3.0, 3.0]


def test_a_run_without_a_result_knows_its_headline(tmp_path):
    config = {"model": "lenet", "data": {"name": "digits"}, "num_seeds": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_run(tmp_path).headline == "accuracy"  # of older code
    assert read_run(tmp_path).metric("accuracy").unit == "%"
    (tmp_path / "task.json").write_text(json.dumps({"headline": "distance", "metrics": METRICS}))
    run = read_run(tmp_path)
    assert run.headline == "distance"
    assert run.metric("distance").better == "lower"


def test_half_a_line_of_the_log_is_left_out(tmp_path):
    config = {"model": "lenet", "data": {"name": "digits"}, "num_seeds": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    good = {"step": 1, "epoch": 0.5, "split": "train", "values": {"loss": 1.0}}
    lines = [json.dumps(good), "7", '{"step": 2}', "\\xff", '{"step": 3, "ep']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(tmp_path).records == [good]


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "is not there"), ("{", "cannot be read"), ('{"a": 1}', "is not a config")],
)
def test_a_directory_without_a_run_is_named(tmp_path, monkeypatch, capsys, config, message):
    if config:
        (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    monkeypatch.setattr(report, "prepare_jax", lambda: None)
    with pytest.raises(SystemExit) as exit_:
        report.main()
    assert exit_.value.code == 2
    assert re.match(rf"report: .*/config\.json {message}.*\n$", capsys.readouterr().err)


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "build_page", lambda *_: "")
    with pytest.raises(UserError, match="cannot be written: IsADirectoryError"):
        report.report([], tmp_path)


@pytest.fixture(scope="module")
def odd(digits_run, tmp_path_factory):
    """A report of a run whose classes have odd names, and the directory of its plots."""
    folder = tmp_path_factory.mktemp("report")
    workdir = shutil.copytree(digits_run, folder / "run <b>")
    spec = json.loads((workdir / "data.json").read_text())
    spec["fields"]["label"]["names"] = NAMES
    (workdir / "data.json").write_text(json.dumps(spec))
    result = json.loads((workdir / "result.json").read_text())
    per_class = result["test"]["per_class_accuracy"].values()
    result["test"]["per_class_accuracy"] = dict(zip(NAMES, per_class, strict=True))
    (workdir / "result.json").write_text(json.dumps(result))

    def load(config):
        data = load_dataset(config)
        wrong = (data.test["label"] + 1) % 10
        label = data.spec.fields["label"]._replace(names=tuple(NAMES))
        spec = data.spec._replace(fields={**data.spec.fields, "label": label})
        return data._replace(spec=spec, test={**data.test, "label": wrong})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "load_dataset", load)
        patch.setattr(examples, "ON_MAP", 60)
        patch.setattr(panels, "MISTAKES", 360)  # of every class
        report.report([str(workdir)], folder / "report.html", png=folder / "png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_browser_shows_all_of_it_and_asks_for_nothing(odd, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    url = f"file://{odd}/report.html"
    tab.goto(url)
    assert said == []
    assert [u for u in asked if not u.startswith("data:")] == [url]

    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.eval_on_selector_all(
        "svg, img",
        "all => all.map(x => Math.min(x.getBoundingClientRect().width,"
        " x.getBoundingClientRect().height, x.naturalWidth ?? 1, +(x.complete ?? 1)))",
    )
    assert len(sizes) > 60
    assert min(sizes) > 0
    text = tab.inner_text("body") + " ".join(tab.locator("svg text").all_text_contents())
    for name in NAMES[:4]:
        assert text.count(name) >= 3  # bars, matrix, map
        assert f"{name} → " in text
    assert tab.locator("h1, h2").all_text_contents()[-5:] == [
        *("Training", "Classes", "Calibration", "The network", "Facts")
    ]
    colors = tab.evaluate(
        "[document.body, document.querySelector('svg text')]"
        ".map(x => getComputedStyle(x)[x === document.body ? 'backgroundColor' : 'fill'])"
    )
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in colors]
    assert (brightness[0] > 0.9, brightness[1] < 0.2) == (scheme == "light",) * 2
    context.close()


@pytest.mark.slow
def test_figures_of_a_page_share_no_ids(odd):
    html = (odd / "report.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


@pytest.mark.slow
def test_plots_are_also_files_on_white(odd):
    images = {path.stem: Image.open(path) for path in (odd / "png").glob("*.png")}
    assert set(images) == {
        *("loss", "accuracy", "top5", "learning_rate", "per_class", "confusion", "calibration"),
        "map",
    }
    for image in images.values():
        assert image.width == 920  # 4.6 inches
        assert np.asarray(image)[0, 0].tolist() == [255, 255, 255, 255]


@pytest.mark.slow
def test_an_unfinished_run_whose_data_are_gone(digits_run, tmp_path):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    (workdir / "result.json").unlink()
    (workdir / "env.json").unlink()
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["num_val"] = 5000  # more than there are
    (workdir / "config.json").write_text(json.dumps(config))
    report.report([str(workdir)], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "This run is not complete" in html
    assert "Its log ends after step 152, epoch 8.00." in html
    assert "data set cannot be loaded, so there are no examples: config.data.num_val" in html
    assert "whiten/kernel</code>: 8 filters of 2 x 2 pixels" in html
    assert "Calibration" not in html


@pytest.mark.slow
def test_several_runs_stand_side_by_side(digits_run, tmp_path, monkeypatch):
    def load(path, **_):
        raise UserError(f"{path} & others have no network.")

    monkeypatch.setattr(examples, "load_trained", load)
    other = shutil.copytree(digits_run, tmp_path / "b & c")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "batch_size": 77, "seed": 5}))
    report.report([str(digits_run), str(other)], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    row = r'<th scope="row">batch_size</th><td>64</td><td>77</td></tr></tbody>'
    assert re.search(rf"<tbody><tr>{row}", html)  # and no other leaf
    assert html.count(f"{tmp_path}/b &amp; c</th>") == 2
    assert html.count("<svg ") == 9  # two of them of both runs
    assert f"cannot be shown: {digits_run} &amp; others have no network." in html


def test_a_legend_has_the_ends_of_long_names():
    assert page._short_names(["runs/a", "x" * 50 + "/b"]) == ["runs/a", f"…{'x' * 38}/b"]
    assert page._short_names(["a" + "x" * 50, "b" + "x" * 50]) == [
        f"{i}: …{'x' * 40}" for i in (1, 2)
    ]


@pytest.mark.parametrize("seen", [{}, {"pooled": np.full((20, 3), np.nan)}])
def test_a_network_without_features_has_no_map(seen):
    assert examples._map(seen, {"label": np.zeros(20, int)}, ["a"], None) == ""
