"""Builds the section about the network: mistakes, filters, training images, a map of features."""

from collections.abc import Sequence
from functools import partial
from html import escape

import numpy as np
from etils import epath

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import Dataset, Examples, load_dataset
from cv_jax.data.fields import decoded, num_examples, take
from cv_jax.tasks import Panel, draw_all
from cv_jax.tools.report import network
from cv_jax.tools.report.markup import (
    Show,
    beside,
    code,
    h2,
    h3,
    paragraph,
    soft,
    tiles,
)
from cv_jax.trained.load import Trained, check_same_fields, load_trained
from cv_jax.trained.words import in_text
from cv_jax.workdir.figures import draw_map

PREDICTED, AUGMENTED, DRAWN, FILTERS, ON_MAP = 24, 24, 12, 64, 1000  # examples
NO_VIEWS = base_config().tta
SCENE = 250  # pixels; pictures of this width or more are shown large


def examples(workdir: epath.Path, num_images: int, show: Show) -> str:
    """Returns the section about the network of the first run, or a sentence why there is none.

    Args:
        workdir: the run's work directory.
        num_images: number of test images to predict.
        show: see `Show`.
    """
    parts = [h2("The network")]
    try:
        trained = load_trained(workdir, tta=NO_VIEWS, predicts=False)
    except UserError as error:
        return "".join([*parts, paragraph(f"The network cannot be shown: {error}")])
    parts.append(soft(escape(f"Of {trained.name}, after step {int(trained.state.step):,}.")))
    try:
        data = load_dataset(trained.config.data)
        check_same_fields(data.spec, trained.spec)
    except UserError as error:
        sentence = f"The data set cannot be loaded, so there are no examples: {error}"
        return "".join([*parts, paragraph(sentence), _filters(trained)])
    test = decoded(take(data.test, slice(num_images)))
    if trained.task.predict:
        try:
            predictions = network.predictions(trained, test)
        except UserError as error:
            return "".join([*parts, paragraph(str(error)), _filters(trained)])
        make_panels = trained.task.panels or partial(_plain_panels, trained)
        parts += [_panel(panel) for panel in make_panels(test, predictions)]
    else:
        parts.append(paragraph("The network learned without labels and predicts no classes."))
    seen = network.features(trained, take(test, slice(ON_MAP)))
    return "".join(
        [
            *parts,
            _reconstructions(seen, test),
            _filters(trained),
            _augmented(trained, data),
            _map(seen, test, data.spec.class_names, show),
        ]
    )


def _panel(panel: Panel) -> str:
    html = [h3(panel.title)] if panel.title else []
    html.append((soft if panel.title else paragraph)(escape(panel.text)) if panel.text else "")
    if panel.pictures:
        wide = max(picture.shape[1] for picture in panel.pictures) >= SCENE
        kind = "scenes" if wide else "predictions"
        html.append(tiles(kind, panel.pictures, panel.captions, visible=True))
    return "".join(html)


def _plain_panels(trained: Trained, examples: Examples, predictions: dict) -> list[Panel]:
    """Returns a panel of the first examples, each with its prediction drawn and described."""
    task, pictures, captions = trained.task, [], []
    for i in range(min(PREDICTED, num_examples(examples))):
        example, prediction = take(examples, i), take(predictions, i)
        pictures.append(task.draw(example, prediction, None))
        captions.append(in_text(task.describe(example, prediction, None)))
    text = "The first test examples, with the network's predictions."
    return [Panel("Predictions", text, tuple(pictures), tuple(captions))]


def _augmented(trained: Trained, data: Dataset) -> str:
    if trained.task.draw is None:
        return ""
    pictures = draw_all(trained.task, network.augmented(trained, data.train, AUGMENTED))
    captions = [f"augmented example {i}" for i in range(len(pictures))]
    if names := data.spec.class_names:
        labels = data.train["label"][:AUGMENTED]
        captions = [f"augmented, {names[i] if i >= 0 else 'no label'}" for i in labels]
    about = code(trained.config.augment) if trained.config.augment else "Without augmentation."
    grid = tiles("augmented", pictures, captions)
    return f"{h3('Augmented training images')}{soft(about)}{grid}"


def _reconstructions(seen: dict[str, np.ndarray], test: Examples) -> str:
    if "reconstruction" not in seen:
        return ""
    image = test["image"][:DRAWN]
    original = image.astype(np.float32) / 255
    pairs = np.stack([original, seen["reconstruction"][:DRAWN]], axis=1)
    captions = [text for i in range(len(pairs)) for text in (f"image {i}", f"reconstruction {i}")]
    about = soft("Test images, each followed by its reconstruction from the latent vector.")
    grid = tiles("reconstructions", pairs.reshape(-1, *image.shape[1:]), captions)
    return f"{h3('Reconstructions')}{about}{grid}"


def _map(seen: dict[str, np.ndarray], test: Examples, names: Sequence[str], show: Show) -> str:
    features = seen.get("latent", seen.get("pooled"))
    if features is None or not names or not np.isfinite(features).all() or len(features) < 10:
        return ""
    label = test["label"][:ON_MAP]
    figure = draw_map(network.embed(features), label, names)
    what = "Latent vectors" if "latent" in seen else "Pooled features"
    about = (
        f"{what} of the first {len(label):,} test images, by t-SNE. Each point is an image, in the "
        "colour of its label. Near points have similar features; large distances mean little."
    )
    drawn = show(figure, "map", "map of the features of test images by class")
    return f"{h3('A map of the features')}{beside(drawn, soft(about))}"


def _filters(trained: Trained) -> str:
    image = trained.spec.fields.get("image")
    found = network.first_filters(trained.state.params, image.shape[-1]) if image else None
    if found is None:
        return ""
    path, filters = found
    k, h, w, _ = filters.shape
    about = f"{code(path)}: {k} filters of {h} x {w} pixels, each scaled to its own range"
    about += f"; the first {FILTERS}." if k > FILTERS else "."
    captions = [f"filter {i}" for i in range(min(k, FILTERS))]
    images = tiles("filters", filters[:FILTERS], captions)
    return f"{h3('Filters of the first layer')}{soft(about)}{images}"
