"""What the network does: its mistakes, its filters, what it was shown, a map of its features."""

from collections.abc import Sequence
from html import escape

import numpy as np
from etils import epath

from cv_jax.config.errors import UserError
from cv_jax.data import Dataset, load_dataset
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
from cv_jax.trained.load import Trained, load_trained
from cv_jax.workdir.figures import draw_map

MISTAKES, AUGMENTED, DRAWN, FILTERS, ON_MAP = 24, 24, 12, 64, 1000  # images


def examples(workdir: epath.Path, num_images: int, show: Show) -> str:
    """The section about the network of the first run, or a sentence on why it cannot be shown.

    Args:
        workdir: of the run.
        num_images: of test that the network is asked about.
        show: see `Show`.
    """
    parts = [h2("The network")]
    try:
        trained = load_trained(workdir, classifies=False)
    except UserError as error:
        return "".join([*parts, paragraph(f"The network cannot be shown: {error}")])
    parts.append(soft(escape(f"Of {trained.name}, after step {int(trained.state.step):,}.")))
    try:
        data = load_dataset(trained.config.data)
        for fact in ("class_names", "image_shape"):
            if getattr(data.spec, fact) != getattr(trained.spec, fact):
                raise UserError(f"its {fact} are not those that the network was trained for.")
    except UserError as error:
        sentence = f"Its data set cannot be loaded, so that no images are here: {error}"
        return "".join([*parts, paragraph(sentence), _filters(trained)])
    image, label = data.test.image[:num_images], data.test.label[:num_images]
    if trained.predict:
        try:
            answers = network.ask(trained, image)
        except UserError as error:
            return "".join([*parts, paragraph(str(error)), _filters(trained)])
        seen = answers.seen
        parts.append(_mistakes(answers, image, label, data.spec.class_names))
    else:
        seen = network.look(trained, image[:ON_MAP])
        parts.append(paragraph("It learned without labels, and names no classes."))
    return "".join(
        [
            *parts,
            _reconstructions(seen, image),
            _filters(trained),
            _augmented(trained, data),
            _map(seen, label, data.spec.class_names, show),
        ]
    )


def _mistakes(
    answers: network.Answers, image: np.ndarray, label: np.ndarray, names: Sequence[str]
) -> str:
    right = (answers.answer == label).sum()
    summary = (
        f"Of the first {len(label):,} test images it answers {right:,} right "
        f"({100 * right / len(label):.2f} %), without test-time augmentation."
    )
    worst = network.worst_mistakes(answers, label, MISTAKES)
    if not len(worst):
        return paragraph(summary)
    percent = [f"{100 * x:.0f}\N{NO-BREAK SPACE}%" for x in answers.confidence]
    captions = [f"{names[label[i]]} → {names[answers.answer[i]]}, {percent[i]}" for i in worst]
    return "".join(
        [
            paragraph(summary),
            h3("Its most confident mistakes"),
            soft("Label → answer, and how sure it is."),
            tiles("mistakes", image[worst], captions, visible=True),
        ]
    )


def _augmented(trained: Trained, data: Dataset) -> str:
    images = network.augmented(trained.config, data.spec, data.train, AUGMENTED)
    captions = [f"augmented, {data.spec.class_names[i]}" for i in data.train.label[:AUGMENTED]]
    about = code(trained.config.augment) if trained.config.augment else "As they are."
    grid = tiles("augmented", images, captions)
    return f"{h3('What it sees in training')}{soft(about)}{grid}"


def _reconstructions(seen: dict[str, np.ndarray], image: np.ndarray) -> str:
    if "reconstruction" not in seen:
        return ""
    original = image[:DRAWN].astype(np.float32) / 255
    pairs = np.stack([original, seen["reconstruction"][:DRAWN]], axis=1)
    captions = [text for i in range(len(pairs)) for text in (f"image {i}", f"image {i}, drawn")]
    about = soft("Images of test, each before what is drawn from its latent vector.")
    grid = tiles("reconstructions", pairs.reshape(-1, *image.shape[1:]), captions)
    return f"{h3('What it draws again')}{about}{grid}"


def _map(seen: dict[str, np.ndarray], label: np.ndarray, names: Sequence[str], show: Show) -> str:
    features = seen.get("latent", seen.get("pooled"))
    if features is None or not np.isfinite(features).all() or len(label) < 10:
        return ""
    label = label[:ON_MAP]
    figure = draw_map(network.embed(features[:ON_MAP]), label, names)
    what = "Its latent vectors" if "latent" in seen else "What its last layer sees"
    about = (
        f"{what} of the first {len(label):,} test images, by t-SNE: a point is an image, in the "
        "colour of its label. Neighbours are alike; distances further off say little."
    )
    drawn = show(figure, "map", "map of the features of test images by class")
    return f"{h3('A map of its features')}{beside(drawn, soft(about))}"


def _filters(trained: Trained) -> str:
    found = network.first_filters(trained.state.params, trained.spec.image_shape[-1])
    if found is None:
        return ""
    path, filters = found
    k, h, w, _ = filters.shape
    about = f"{code(path)}: {k} filters of {h} x {w} pixels, each scaled by itself"
    about += f"; the first {FILTERS}." if k > FILTERS else "."
    captions = [f"filter {i}" for i in range(min(k, FILTERS))]
    images = tiles("filters", filters[:FILTERS], captions)
    return f"{h3('Its first filters')}{soft(about)}{images}"
