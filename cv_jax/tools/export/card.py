"""Writes the model card of an exported network: its recipe, its data and its results."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from etils import epath

from cv_jax.config.sweep import make_sweep, run_names
from cv_jax.data.dataset import spec_to_json
from cv_jax.train.flops import count_flops
from cv_jax.trained.load import Trained, input_shapes
from cv_jax.workdir.files import read_json
from cv_jax.workdir.metric import Metric, headline_of, metric_of
from cv_jax.workdir.result import best_runs, environment, statistics_of

_LICENCE = "Apache-2.0, like cv_jax; the data set has its own terms"


def make_card(workdir: epath.Path, trained: Trained) -> dict[str, Any]:
    """Returns the card as JSON values.

    Args:
        workdir: the run's work directory.
        trained: the network, see `load_trained`.

    Returns:
        run: the run's name.
        tta: the test-time views.
        data: the description of the data set.
        config: the whole config.
        test: the headline on test, see `_on_test`; None if result.json is not of this network.
        result: the content of result.json; None if `test` is None.
        steps: the number of training steps.
        flops: FLOPs of "training" (None if `test` is None) and of an "example".
        trained_with, exported_with: commit and package versions.
        input, output, licence: texts.
        photograph: text: how to turn a photograph into an input.
    """
    data, state = spec_to_json(trained.spec), trained.state
    test = _on_test(trained)
    result = trained.result if test else None
    return {
        "run": trained.name,
        "tta": trained.tta,
        "data": data,
        "config": trained.config.to_dict(),
        "test": test,
        "result": result,
        "steps": int(state.step),
        "flops": {
            "training": result["flops"]["training"] if result else None,
            "example": count_flops(partial(trained.task.predict, state), input_shapes(trained, 1)),
        },
        "trained_with": _code(read_json(workdir / "env.json")),
        "exported_with": _code(environment()),
        "input": "; ".join(
            f"{name}: {_shape(x)} {_RANGE.get(x.dtype.name, x.dtype.name)}"
            for name, x in input_shapes(trained, 1).items()
        )
        + ", b >= 1",
        "photograph": _photograph(data)[0] if "image" in trained.task.inputs else "",
        "output": "; ".join(
            f"{name}: {_shape(x)} {x.dtype}, {trained.task.outputs.get(name, '')}"
            for name, x in _outputs(trained).items()
        ),
        "licence": _LICENCE,
    }


_RANGE = {"uint8": "uint8, 0 to 255"}


def _shape(x: jax.ShapeDtypeStruct) -> str:
    return f"(b{''.join(f', {side}' for side in x.shape[1:])})"


def _outputs(trained: Trained) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(trained.task.predict, trained.state, input_shapes(trained, 1))


def _code(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: environment.get(key) for key in ("commit", "dirty", "python", "packages")}


def _on_test(trained: Trained) -> dict[str, Any] | None:
    """Returns the headline of this network, and the statistics over the seeds of its program.

    The key of the network's value is the name of the headline. None if result.json is not of this
    network, or has no headline on test.
    """
    result = trained.result
    # A lengthened run keeps the result of the shorter run until its end.
    if not result or not result["test"] or result["steps"] != int(trained.state.step):
        return None
    config = trained.config
    names = run_names(config, make_sweep(config))[best_runs(result, config.num_seeds)]
    if trained.name not in names:  # result.json has test numbers only of the best setting
        return None
    headline = headline_of(result)
    numbers = statistics_of(result["test"]).get(headline)
    if numbers is None:
        return None
    return {
        "headline": headline,
        **metric_of(result, headline)._asdict(),
        headline: numbers["values"][names.index(trained.name)],
        **{key: numbers[key] for key in ("mean", "std", "ci95", "n")},
        "images": result["test"]["count"],
        "tta": trained.config.tta,
    }


def _photograph(data: dict[str, Any]) -> tuple[str, str]:
    """Returns `photograph` for a data set as JSON values; two empty texts without images."""
    image = data["fields"].get("image")
    whole = any(field["kind"] in ("boxes", "mask") for field in data["fields"].values())
    return photograph(image["shape"], data["eval_crop"], whole) if image else ("", "")


def photograph(
    image_shape: Sequence[int], share: float = 1.0, whole: bool = False
) -> tuple[str, str]:
    """Returns how to turn a photograph into an input, in words and as Python code.

    For 8-bit images the code gives the pixels of `read_image.fit_image`, or of `letterbox_image`.

    Args:
        image_shape: (h, w, c) of the input.
        share: of the sides that the crop keeps, see `read_image.fit_image`.
        whole: whether nothing is cropped, see `read_image.letterbox_image`.
    """
    h, w, c = image_shape
    if c not in (1, 3):
        return f"not possible: a photograph does not have {c} channels", ""
    mode = "L" if c == 1 else "RGB"
    colours = "grey (0.299 R + 0.587 G + 0.114 B)" if c == 1 else "red, green, blue, in this order"
    if whole:
        words = (
            f"rotated by its EXIF data, transparency on white, {colours}; resized with Pillow's "
            f"BICUBIC to the largest size of its proportions inside {w}x{h} pixels, and put at the "
            "top left, with black at the right or below"
        )
        fit = _FIT_WHOLE.format(w=w, h=h, mode=mode)
        return words, _READ_PHOTO.format(mode=mode, fit=fit, h=h, w=w, c=c)
    if share == 1:
        crop = f"unless it has {w}x{h} pixels, cropped at the centre to the proportions {w}:{h}"
        fit = _FIT.format(w=w, h=h)
    else:
        crop = (
            f"cropped at the centre to {100 * share:g} % of the largest part of the proportions "
            f"{w}:{h}"
        )
        fit = _FIT_SHARE.format(w=w, h=h, border=(1 - share) / 2)
    words = (
        f"rotated by its EXIF data, transparency on white, {colours}; {crop}, and resized to "
        f"{w}x{h} pixels with Pillow's BICUBIC (antialiased where it shrinks), in one step "
        "(ImageOps.fit)"
    )
    return words, _READ_PHOTO.format(mode=mode, fit=fit, h=h, w=w, c=c)


_FIT = """if image.size != ({w}, {h}):  # an image of this size keeps every pixel
        image = ImageOps.fit(image, ({w}, {h}), Image.Resampling.BICUBIC)"""
_FIT_WHOLE = """scale = min({w} / image.width, {h} / image.height)
    inside = min({w}, round(image.width * scale)), min({h}, round(image.height * scale))
    small = image.resize(inside, Image.Resampling.BICUBIC)
    image = Image.new("{mode}", ({w}, {h}))
    image.paste(small)"""
_FIT_SHARE = "image = ImageOps.fit(image, ({w}, {h}), Image.Resampling.BICUBIC, bleed={border!r})"


_READ_PHOTO = """
import numpy as np
from PIL import Image, ImageOps

def read_photo(file):  # -> (1, {h}, {w}, {c}) uint8
    image = ImageOps.exif_transpose(Image.open(file))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("{mode}")
    {fit}
    return np.asarray(image).reshape(1, {h}, {w}, {c})

def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
"""


def to_markdown(card: dict[str, Any], snippet: str) -> str:
    """Returns the card as Markdown, with Python code that loads the file.

    Texts of the config and of the data set are marked as code, so that Markdown and HTML in them
    have no effect.
    """
    data, flops, by = card["data"], card["flops"], card["trained_with"]
    changed = " with uncommitted changes" if by["dirty"] else ""
    counts = ", ".join(f"{data[f'num_{split}']:,} {split}" for split in ("train", "val", "test"))
    training = f"{flops['training']:.3e} of training, " if flops["training"] is not None else ""
    rows = [
        ("network", _span(card["config"]["model"])),
        ("data set", f"{_span(data['name'])}: {counts}"),
        (_on_test_of(card["test"]), _measured(card["test"])),
        ("input", card["input"]),
        ("photograph", card["photograph"]),
        ("output", card["output"]),
        ("predictions", f"averaged over the views `{card['tta']}` (test-time augmentation)"),
        ("run", f"{_span(card['run'])}, {card['steps']:,} steps"),
        ("FLOPs", f"{training}{flops['example']:.3e} an example"),
        ("code", f"cv_jax, commit {by['commit'] or 'unknown'}{changed}"),
        ("licence", card["licence"]),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    blocks = {
        "Names of classes, in order": {
            name: field["names"] for name, field in data["fields"].items() if field["names"]
        },
        "Recipe: the whole config": card["config"],
        "Versions": {key: card[key] for key in ("trained_with", "exported_with")},
    }
    sections = "\n".join(
        f"## {title}\n\n```json\n{json.dumps(values, indent=2)}\n```\n"
        for title, values in blocks.items()
    )
    code = _photograph(data)[1]
    block = (
        '## From a photograph to an input\n\nReplace the zeros above by `read_photo("photo.jpg")`. '
        "For a classifier with one class an image, `softmax(logits)` gives the probabilities. "
        f"Convert grey of 16 bits to 8 bits first.\n\n```python\n{code.strip()}\n```\n\n"
    )
    photo = block if code else ""
    return (
        f"# Model card\n\n| | |\n| --- | --- |\n{table}\n\n"
        "The network normalises its images. It was not measured on images unlike those of its data "
        f"set.\n\n## Use\n\n```python\n{snippet.strip()}\n```\n\n{photo}{sections}"
    )


def _on_test_of(test: dict[str, Any] | None) -> str:
    return "test" if test is None else f"test {headline_of(test).replace('_', ' ')}"


def _measured(test: dict[str, Any] | None) -> str:
    if test is None:
        return "not measured: the run is not complete, or not of the best setting"
    name = headline_of(test)
    metric = Metric(test["unit"], test["better"], test["protocol"])
    own = f"{metric.text(test[name], None)} of {test['images']:,} images (views `{test['tta']}`)"
    if test["n"] == 1:
        return own
    if test["ci95"] is None:
        return f"{own}; other seeds have diverged"
    low, high = test["ci95"]
    return (
        f"{own}; {metric.text(test['mean'], test['std'])} over n = {test['n']} seeds, 95 % "
        f"interval of the mean {metric.digits(low)} to {metric.number(high)}"
    )


def _span(text: str) -> str:
    """Returns a user's text as Markdown code for a table cell."""
    return "`" + text.replace("`", "'").replace("|", "¦").replace("\n", " ") + "`"
