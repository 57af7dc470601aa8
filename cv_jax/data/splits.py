"""Chooses the examples of val, the examples to keep, and those that keep their labels, by seed."""

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.dataset import (
    SPLITS,
    Dataset,
    DataSpec,
    Stored,
    count_labels,
    count_pixels,
    counts,
    sample_of,
)
from cv_jax.data.encoded import Encoded
from cv_jax.data.fields import Examples, Field, num_examples, take
from cv_jax.data.statistics import histogram, mean_and_std

OFFICIAL = -1  # config.data.num_val that takes the source's own val split


def hold_out(name: str, stored: Stored, num_val: int) -> Dataset:
    """Moves `num_val` examples from train to val, see `choose_val`; -1 takes the official val.

    Train and val keep the order of the source.

    Raises:
        UserError: `num_val` leaves nothing to train on, or the source has no official val.
    """
    train = stored.train
    count = num_examples(train)
    if num_val == OFFICIAL and stored.val is None:
        raise UserError(
            f"config.data.num_val={OFFICIAL} asks for the official val split, but {name} has "
            "none besides test: set it to the number of training examples to hold out."
        )
    if num_val != OFFICIAL and not 0 <= num_val < count:
        raise UserError(
            f"config.data.num_val={num_val} must be between 0 and {count - 1}: "
            f"{name} has {count} training examples, and some must remain."
        )
    held = choose_val(train, stored.fields, num_val) if num_val != OFFICIAL else np.arange(0)
    val = take(train, held)
    if len(held):
        train = take(train, np.delete(np.arange(count), held))
    fields = {name: _with_statistics(name, f, stored, val) for name, f in stored.fields.items()}
    val = stored.val if num_val == OFFICIAL else val
    spec = DataSpec(
        name=name,
        fields=fields,
        **counts(train, val, stored.test),
        sample=sample_of(train),
        label_counts=count_labels(train, fields),
        pixel_counts=count_pixels(train, fields),
    )
    return Dataset(spec, train, val, stored.test, stored.notes)


def _with_statistics(name: str, field: Field, stored: Stored, held: Examples) -> Field:
    """Adds mean and std of the images that remain in train."""
    if field.kind != "image":
        return field
    counted, image = stored.histograms[name], stored.train[name]
    if counted[:, 0].sum() == np.prod(image.shape[:3]):  # else it counts only a sample of train
        counted = counted - histogram(held[name])
    mean, std = mean_and_std(counted)
    return field._replace(mean=mean, std=std)


def choose_val(train: Examples, fields: dict[str, Field], count: int) -> np.ndarray:
    """Chooses `count` examples for val; returns their positions, ascending.

    With a field `group`, whole groups are chosen at random until at least `count` examples are
    held out. Else the choice is stratified by `label`, or by the rarest class in each example's
    `box_label`; without either field, it is random.
    """
    if "group" in fields:
        return _choose_groups(train["group"], count)
    return stratified(_strata(train, fields), count)


def _strata(examples: Examples, fields: dict[str, Field]) -> np.ndarray:
    """Returns an integer for each example, by which choices are stratified."""
    if "label" in fields:
        return examples["label"]
    if "box_label" not in fields:
        return np.zeros(num_examples(examples), np.int64)
    label = examples["box_label"]
    known = label >= 0
    sizes = np.bincount(label[known], minlength=1)
    frequency = np.where(known, sizes[np.where(known, label, 0)], np.iinfo(np.int64).max)
    rarest = np.take_along_axis(label, frequency.argmin(1)[:, None], 1)[:, 0]
    return np.where(known.any(1), rarest + 1, 0)


def _choose_groups(group: np.ndarray, count: int) -> np.ndarray:
    names, sizes = np.unique(group, return_counts=True)
    order = np.random.default_rng(0).permutation(len(names))
    needed = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1 if count else 0
    if needed >= len(names) and count:
        raise UserError(
            f"config.data.num_val={count} would hold out all {len(names)} groups of the training "
            "examples: choose a smaller number, or a smaller config.data.val_fraction."
        )
    return np.flatnonzero(np.isin(group, names[order[:needed]]))


def limit_examples(data: Dataset, count: int) -> Dataset:
    """Cuts every split down to `count` examples; mean and std stay those of all examples.

    The choice is stratified like val's, and keeps the order. A split that is sorted by class or
    by scene therefore keeps all its classes or scenes.
    """

    def cut(split):
        if num_examples(split) <= count:
            return split
        return take(split, stratified(_strata(split, data.spec.fields), count))

    train, val, test = (cut(split) for split in (data.train, data.val, data.test))
    sample = sample_of(train)
    spec = data.spec._replace(
        **counts(train, val, test),
        sample=sample,
        label_counts=count_labels(train, data.spec.fields),
        pixel_counts=count_pixels(train, data.spec.fields),
    )
    return data._replace(spec=spec, train=train, val=val, test=test)


def limit_labels(
    data: Dataset, per_class: int, fraction: float, seed: int, keep_unlabelled: bool
) -> Dataset:
    """Keeps the labels of a few training examples, chosen stratified as in `limit_examples`.

    Val, test, mean and std are unchanged. Data without a field `label`, such as masks, have no way
    to say that an example has no label: there, the other examples leave train.

    Args:
        data: the data set.
        per_class: number of examples of each class that keep their labels; 0: use `fraction`.
        fraction: share of all examples that keep their labels; 0: all.
        seed: the seed of the choice.
        keep_unlabelled: whether the other examples stay in train. If so, every split gets a field
            `labelled`, and the label of these examples is -1, the value of padding.

    Raises:
        UserError: a class has too few examples, no example keeps its label, or the data set has
            no labels.
    """
    if not per_class and not fraction:
        return data
    if "label" not in data.spec.fields and (per_class or keep_unlabelled):
        key = "labels_per_class" if per_class else "keep_unlabelled"
        wanted = 0 if per_class else False
        raise UserError(
            f"config.data.{key} must be {wanted}: {data.spec.name} has no field 'label'."
        )
    chosen = _choose_labelled(data, per_class, fraction, seed)
    if keep_unlabelled:
        return _with_labelled(data, chosen)
    train = take(data.train, chosen)
    spec = data.spec._replace(
        num_train=len(chosen),
        sample=sample_of(train),
        label_counts=count_labels(train, data.spec.fields),
        pixel_counts=count_pixels(train, data.spec.fields),
    )
    return data._replace(spec=spec, train=train)


def _choose_labelled(data: Dataset, per_class: int, fraction: float, seed: int) -> np.ndarray:
    label = _strata(data.train, data.spec.fields)
    if per_class:
        sizes = np.bincount(label, minlength=data.spec.num_classes)
        if sizes.min() < per_class:
            raise UserError(
                f"config.data.labels_per_class={per_class}: the class "
                f"{data.spec.class_names[sizes.argmin()]!r} has only {sizes.min()} training "
                "examples. Choose a smaller number."
            )
        return _choose(label, np.full(len(sizes), per_class), seed)
    chosen = stratified(label, round(fraction * len(label)), seed)
    if not len(chosen):
        raise UserError(
            f"config.data.label_fraction={fraction} leaves none of {len(label)} labels. "
            "Choose a larger fraction."
        )
    return chosen


def _with_labelled(data: Dataset, chosen: np.ndarray) -> Dataset:
    field = data.spec.fields["label"]
    labelled = np.isin(np.arange(data.spec.num_train), chosen)
    label = np.where(labelled, data.train["label"], field.fill).astype(field.dtype)
    train = {**data.train, "label": label, "labelled": labelled}
    val, test = (
        {**split, "labelled": np.ones(num_examples(split), bool)} for split in (data.val, data.test)
    )
    spec = data.spec._replace(
        fields={**data.spec.fields, "labelled": Field((), "bool", "flag")},
        sample=sample_of(train),
        num_unlabelled=len(label) - len(chosen),
        label_counts=count_labels(train, data.spec.fields),
        pixel_counts=count_pixels(train, data.spec.fields),
    )
    return data._replace(spec=spec, train=train, val=val, test=test)


def stratified(label: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Chooses `count` examples at random, each class in proportion; equal seeds choose equally.

    Class i with m_i of the m examples gets floor(m_i count / m). The classes with the largest
    remainders get one more each, up to `count` in total.

    Args:
        label: (m,) int, 0 or more.
        count: number of examples to choose, between 0 and m.
        seed: the seed of the choice.

    Returns:
        (count,) int64, the positions of the chosen examples, ascending.
    """
    sizes = np.bincount(label)
    quota, remainder = np.divmod(sizes * count, len(label))
    quota[np.argsort(-remainder, kind="stable")[: count - quota.sum()]] += 1
    return _choose(label, quota, seed)


def _choose(label: np.ndarray, quota: np.ndarray, seed: int) -> np.ndarray:
    """Chooses quota[i] examples of each class i at random; returns their positions, ascending."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(label == i))[:size] for i, size in enumerate(quota)]
    return np.sort(np.concatenate(chosen))


def count_equal(data: Dataset) -> list[str]:
    """Returns a note for each pair of splits that share equal images."""
    names = [name for name, field in data.spec.fields.items() if field.kind == "image"]
    if not names:
        return []
    images = {split: getattr(data, split)[names[0]] for split in SPLITS}
    notes = []
    for first, second in (("val", "train"), ("test", "train"), ("test", "val")):
        if equal := _num_equal(images[first], images[second]):
            notes.append(f"data    {equal:,} images of {first} are also in {second}")
    return notes


def _num_equal(images: np.ndarray | Encoded, others: np.ndarray | Encoded) -> int:
    """Counts the images (m, h, w, c) that are among the others."""
    if isinstance(images, Encoded):
        return int(np.isin(images.digests, others.digests).sum())
    # By their middle rows first: to read all pixels would take a tenth of a start.
    middle = images.shape[1] // 2
    rows, other_rows = ([x.tobytes() for x in part[:, middle]] for part in (images, others))
    known, here = set(other_rows), set(rows)
    found = {x.tobytes() for x, row in zip(others, other_rows, strict=True) if row in here}
    alike = (x for x, row in zip(images, rows, strict=True) if row in known)
    return sum(x.tobytes() in found for x in alike)
