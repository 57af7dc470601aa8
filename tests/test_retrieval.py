"""Finding images by a corner: against hand values, and through a task on data without labels."""

import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.learn.probes import make_probes
from cv_jax.learn.retrieval import corner, found_again
from tests.conftest import random_dataset


def test_an_image_is_found_if_no_other_is_as_like():
    first = np.float32([[1, 0], [0, 1], [-1, 0]])
    assert found_again(first, 5 * first) == 1
    assert found_again(first, first[[1, 0, 2]]) == pytest.approx(1 / 3)
    # Two that are equal are not told apart, and none is where all are.
    assert found_again(np.float32([[1, 0], [1, 0], [0, 1]]), first[[0, 0, 1]]) == pytest.approx(
        1 / 3
    )
    assert found_again(np.ones((4, 2), np.float32), np.ones((4, 2), np.float32)) == 0
    assert found_again(np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)) == 0


def test_many_images_are_compared_in_parts():
    first = np.random.default_rng(0).normal(size=(2300, 8)).astype(np.float32)
    order = np.arange(2300)
    order[[5, 2299]] = [2299, 5]
    assert found_again(first, first[order]) == pytest.approx(2298 / 2300)


def test_corners_are_three_quarters_of_both_sides():
    image = np.zeros((1, 8, 12, 3), np.uint8)
    image[:, 6:, :, 0] = 255  # below the upper corner
    image[:, :, :3, 1] = 255  # left of the lower one
    upper, lower = (np.asarray(corner(jnp.asarray(image), last)) for last in (False, True))
    assert upper.shape == lower.shape == image.shape
    assert upper.dtype == np.float32
    assert not upper[..., 0].any()
    assert upper[..., 1].max() == 1
    assert not lower[..., 1].any()
    assert lower[..., 0].max() == 1


def test_data_without_labels_are_measured_by_retrieval_and_those_with_by_neighbours():
    spec = random_dataset().spec
    assert make_probes(_mean_colours, spec).headline == "accuracy"
    fields = {name: x for name, x in spec.fields.items() if name != "label"}
    probes = make_probes(_mean_colours, spec._replace(fields=fields))
    assert probes.headline == "retrieval"

    # A constant colour each: a corner has the features of the whole image.
    image = np.zeros((6, 8, 8, 3), np.uint8)
    image[:] = np.random.default_rng(0).integers(0, 256, (6, 1, 1, 3))
    evaluation = probes.evals["final"]
    fold = evaluation.start()
    for part in (image[:4], image[4:]):
        predictions = evaluation.predict(None, {"image": jnp.asarray(part)})
        fold = evaluation.add(fold, {k: np.asarray(x) for k, x in predictions.items()}, {})
    found = evaluation.finish(fold)
    assert found["retrieval"] == 1
    np.testing.assert_allclose(found["loss"], image.mean() / 255, rtol=1e-5)
    assert probes.baseline({}, {"image": image}) == {"retrieval": 1 / 6}

    fold[0]["first"] = fold[0]["first"] * np.nan
    broken = evaluation.finish(fold)
    assert broken.keys() == found.keys()  # as those of other seeds
    assert all(np.isnan(x) for x in broken.values())


def _mean_colours(state, batch):
    image = jnp.asarray(batch["image"])
    image = image / 255 if image.dtype == jnp.uint8 else image
    features = image.mean((1, 2))
    return features, {"loss": features.mean(1)}
