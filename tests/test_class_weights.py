"""Class weights: their numbers, the weighted mean, and the counts of labels that they come from."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cv_jax.config.errors import UserError
from cv_jax.data import Stored, image_field, label_field
from cv_jax.data.dataset import spec_from_json, spec_to_json
from cv_jax.data.splits import hold_out, limit_examples, limit_labels
from cv_jax.data.statistics import histogram
from cv_jax.learn.class_weights import balanced_weights, example_weights, make_class_weights
from cv_jax.learn.losses import cross_entropy, of_examples
from tests.conftest import random_dataset


def _imbalanced():
    """Returns 8 examples of "a", 4 of "b" and none of "c"; a quarter of them is for val."""
    label = np.int32([0] * 8 + [1] * 4)
    split = {"image": np.zeros((12, 4, 4, 1), np.uint8), "label": label}
    fields = {"image": image_field((4, 4, 1)), "label": label_field(("a", "b", "c"))}
    counted = {"image": histogram(split["image"])}
    return hold_out("imbalanced", Stored(fields, split, split, histograms=counted), num_val=3)


def test_the_labels_of_train_are_counted_after_every_cut():
    data = _imbalanced()
    assert data.spec.label_counts == (6, 3, 0)
    assert limit_examples(data, 3).spec.label_counts == (2, 1, 0)
    assert limit_labels(data, 0, 1 / 3, 0, False).spec.label_counts == (2, 1, 0)
    kept = limit_labels(data, 0, 1 / 3, 0, True)
    assert kept.spec.num_train == 9
    assert kept.spec.label_counts == (2, 1, 0)


def test_the_counts_are_kept_and_those_of_older_runs_are_not_known():
    spec = _imbalanced().spec
    values = json.loads(json.dumps(spec_to_json(spec)))
    assert spec_from_json(values).label_counts == (6, 3, 0)
    del values["label_counts"]
    assert spec_from_json(values).label_counts == ()


def test_balanced_classes_have_the_same_total_weight():
    weights = balanced_weights((6, 3, 0))
    np.testing.assert_allclose(weights, [9 / (3 * 6), 9 / (3 * 3), 0])
    assert weights.dtype == np.float32
    assert make_class_weights("", random_dataset().spec) is None
    with pytest.raises(UserError, match=r"config\.class_weights='balanced' needs the number of .*"):
        make_class_weights("balanced", random_dataset().spec)


def test_the_loss_is_the_weighted_mean():
    weights = np.float32([0.5, 2.0, 1.0])
    label = jnp.float32([[1, 0, 0], [0, 1, 0], [0.25, 0.75, 0]])  # the last one is mixed
    logits = jnp.float32([[1, 0, 2], [0, 3, 1], [2, 1, 0]])
    weight = example_weights(weights, label)
    np.testing.assert_allclose(weight, [0.5, 2, 0.125 + 1.5])
    each = cross_entropy(logits, label, 0.1)
    found = of_examples(each, weight)
    np.testing.assert_allclose(found.mean(), np.average(each, weights=weight), rtol=1e-6)
    np.testing.assert_allclose(found.count, 4.125)
    assert example_weights(None, label) is None


def test_light_examples_alone_have_a_mean_too():
    found = of_examples(jnp.float32([2, 4]), jnp.float32([0.1, 0.3]))
    np.testing.assert_allclose(found.mean(), 3.5, rtol=1e-6)


def test_the_weights_called_sqrt_are_the_roots_of_the_balanced_ones():
    spec = random_dataset().spec._replace(label_counts=(1, 4, 0, 15))
    expected = np.sqrt(np.array([20 / 4, 20 / 16, 0, 20 / 60]))
    np.testing.assert_allclose(make_class_weights("sqrt", spec), expected, rtol=1e-6)
