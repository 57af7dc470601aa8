"""What a data set is: uint8 images with labels in three splits, and the facts about them."""

from typing import Any, NamedTuple

import numpy as np

from cv_jax.config.errors import UserError
from cv_jax.data.typical import Typical, typical_from_json, typical_to_json

# Train images that a model may look at for its data-dependent initialisation.
SAMPLE_SIZE = 5000


class Split(NamedTuple):
    """Examples in a fixed order: image (m, h, w, c) uint8, label (m,) int32, -1: not known."""

    image: np.ndarray
    label: np.ndarray


class DataSpec(NamedTuple):
    """What models, augmentation and log need to know of a data set.

    Attributes:
        name: as config.data.name has it.
        image_shape: (h, w, c).
        class_names: one for each label.
        mean, std: (c,) float32, per channel over all pixels of train, in [0, 1].
        num_train, num_val, num_test: examples in each split.
        sample: (min(5000, num_train), h, w, c) uint8, the first images of train.
        num_unlabelled: examples of train whose label is -1.
        typical: what its images are like; None of a run that has not measured it.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    num_train: int
    num_val: int
    num_test: int
    sample: np.ndarray
    num_unlabelled: int = 0
    typical: Typical | None = None

    @property
    def num_labelled(self) -> int:
        """Examples of train whose label is known."""
        return self.num_train - self.num_unlabelled

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def spec_to_json(spec: DataSpec) -> dict[str, Any]:
    """The facts as JSON values, without the sample of images."""
    values = {"mean": spec.mean.tolist(), "std": spec.std.tolist(), "sample": None}
    if spec.typical is not None:
        values["typical"] = typical_to_json(spec.typical)
    return {**spec._asdict(), **values}


def spec_from_json(values: dict[str, Any]) -> DataSpec:
    """What `spec_to_json` was given; the sample is one black image."""
    shape = tuple(values["image_shape"])
    arrays = {name: np.float32(values[name]) for name in ("mean", "std")}
    sample = np.zeros((1, *shape), np.uint8)
    texts = {"image_shape": shape, "class_names": tuple(values["class_names"])}
    typical = values.get("typical")  # older runs have none
    if typical is not None:
        typical = typical_from_json(typical, shape[-1])
    return DataSpec(**{**values, **arrays, **texts, "sample": sample, "typical": typical})


class Dataset(NamedTuple):
    """Three splits in host memory, memory-mapped where they come from the cache, and their spec."""

    spec: DataSpec
    train: Split
    val: Split
    test: Split


class Stored(NamedTuple):
    """A data set as its source has it: before val is held out of train.

    Attributes:
        class_names: one for each label.
        train, test: the two splits.
        histogram: (256, c) int64, how often each channel of train has each value. Mean and std
            of what remains of train follow from it without another look at every pixel. Where a
            source has none, `check_stored` counts it.
    """

    class_names: tuple[str, ...]
    train: Split
    test: Split
    histogram: np.ndarray | None = None


def check_stored(name: str, stored: Stored) -> Stored:
    """Returns a data set that is sound, its labels as int32, and with its histogram.

    Raises:
        UserError: it is not what `Stored` says; the message names the split and what to do.
    """
    if problem := _problem(stored):
        raise UserError(f"The data set {name!r}: {problem}.")
    train, test = (Split(s.image, s.label.astype(np.int32, copy=False)) for s in stored[1:3])
    counts = histogram(train.image) if stored.histogram is None else stored.histogram
    return Stored(tuple(stored.class_names), train, test, counts)


def _problem(stored: Any) -> str | None:
    if not isinstance(stored, Stored):
        return f"its function returns {type(stored).__name__} and not cv_jax.data.dataset.Stored"
    class_names, train, test, counts = stored
    if not isinstance(class_names, tuple | list) or not class_names:
        return f"class_names={class_names!r} must be a tuple of names, such as ('cat', 'dog')"
    first: dict[str, int] = {}
    for i, class_name in enumerate(class_names):
        is_name = isinstance(class_name, str) and class_name
        if not is_name or first.setdefault(class_name, i) < i:
            return f"class_names[{i}]={class_name!r} must be a text that no other class has"
    for split in ("train", "test"):
        if problem := _split_problem(split, getattr(stored, split), len(class_names)):
            return problem
    if train.image.shape[1:] != test.image.shape[1:]:
        return (
            f"the images of train are {train.image.shape[1:]} and those of test "
            f"{test.image.shape[1:]}; bring them to one shape (h, w, c)"
        )
    if counts is not None:
        shape = 256, train.image.shape[-1]
        if np.shape(counts) != shape or (np.sum(counts, axis=0) != train.image[..., 0].size).any():
            return (
                f"its histogram, of shape {np.shape(counts)}, does not count the pixels of train, "
                f"which makes {shape}; leave it out of Stored, and it is counted"
            )
    return None


def _split_problem(name: str, split: Any, num_classes: int) -> str | None:
    if not isinstance(split, Split) or not all(isinstance(x, np.ndarray) for x in split):
        return f"{name} must be a Split(image, label) of NumPy arrays"
    image, label = split
    if image.dtype != np.uint8:
        return f"{name}.image is {image.dtype} and not uint8: scale it to 0..255, whole numbers"
    if image.ndim != 4 or 0 in image.shape[1:] or image.shape[-1] > 4:
        return (
            f"{name}.image has the shape {image.shape} and not (m, h, w, c) with 1 to 4 channels; "
            "grey images take [..., None]"
        )
    if not np.issubdtype(label.dtype, np.integer) or label.ndim != 1:
        return (
            f"{name}.label is {label.dtype} of shape {label.shape} and not whole numbers (m,), "
            "one for each image"
        )
    if len(image) != len(label):
        return f"{name} has {len(image)} images and {len(label)} labels; each image takes one"
    if not len(image):
        return f"{name} has no examples; train and test need some, val is held out of train"
    if label.min() < 0 or label.max() >= num_classes:
        i = int(np.argmax((label < 0) | (label >= num_classes)))
        return (
            f"{name}.label[{i}] is {label[i]}, and its {num_classes} class_names are counted from "
            f"0 to {num_classes - 1}"
        )
    return None


def hold_out(name: str, stored: Stored, num_val: int) -> Dataset:
    """Moves `num_val` examples from train to val: stratified, and the same for every seed.

    Both keep the order that train had.

    Raises:
        UserError: `num_val` is negative or leaves nothing to train on.
    """
    image, label = stored.train
    if not 0 <= num_val < len(label):
        raise UserError(
            f"config.data.num_val={num_val} must be between 0 and {len(label) - 1}: "
            f"{name} has {len(label)} training examples, and some must remain."
        )
    held = stratified(label, num_val)
    val = Split(image[held], label[held])
    train = stored.train
    if num_val:
        kept = np.delete(np.arange(len(label)), held)
        train = Split(image[kept], label[kept])

    mean, std = mean_and_std(stored.histogram - histogram(val.image))
    spec = DataSpec(
        name=name,
        image_shape=image.shape[1:],
        class_names=stored.class_names,
        mean=mean,
        std=std,
        num_train=len(train.label),
        num_val=num_val,
        num_test=len(stored.test.label),
        sample=train.image[:SAMPLE_SIZE],
    )
    return Dataset(spec, train, val, stored.test)


def first_examples(data: Dataset, count: int) -> Dataset:
    """Cuts every split down to its first `count` examples; mean and std remain those of all."""
    train, val, test = (Split(*(a[:count] for a in split)) for split in data[1:])
    spec = data.spec._replace(
        num_train=len(train.label),
        num_val=len(val.label),
        num_test=len(test.label),
        sample=data.spec.sample[:count],
    )
    return Dataset(spec, train, val, test)


def limit_labels(
    data: Dataset, per_class: int, fraction: float, seed: int, keep_unlabelled: bool
) -> Dataset:
    """Forgets the labels of all training examples but a few, which are stratified.

    Args:
        data: val and test stay as they are; so do mean and std.
        per_class: so many examples of each class keep their labels, when above zero.
        fraction: else this share of all keeps them; 0: all.
        seed: another one chooses other examples.
        keep_unlabelled: whether the others stay in train, with the label -1.

    Raises:
        UserError: a class has too few examples, or none keeps its label.
    """
    if not per_class and not fraction:
        return data
    image, label = data.train
    if per_class:
        sizes = np.bincount(label, minlength=data.spec.num_classes)
        if sizes.min() < per_class:
            raise UserError(
                f"config.data.labels_per_class={per_class}: the class "
                f"{data.spec.class_names[sizes.argmin()]!r} has only {sizes.min()} training "
                "examples."
            )
        chosen = _choose(label, np.full(len(sizes), per_class), seed)
    else:
        chosen = stratified(label, round(fraction * len(label)), seed)
    if not len(chosen):
        raise UserError(
            f"config.data.label_fraction={fraction} leaves none of {len(label)} labels."
        )
    if keep_unlabelled:
        known = np.full_like(label, -1)
        known[chosen] = label[chosen]
        spec = data.spec._replace(num_unlabelled=len(label) - len(chosen))
        return data._replace(spec=spec, train=Split(image, known))
    train = Split(image[chosen], label[chosen])
    spec = data.spec._replace(num_train=len(chosen), sample=train.image[:SAMPLE_SIZE])
    return data._replace(spec=spec, train=train)


def stratified(label: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Picks `count` examples at random, every class in proportion; the same ones for a seed.

    Class i with m_i of the m examples gets floor(m_i count / m) of them, and the classes with the
    largest remainders one more each, until there are `count`.

    Args:
        label: (m,) int, 0 or more.
        count: between 0 and m.
        seed: of the choice.

    Returns:
        (count,) int64, the indices, ascending.
    """
    sizes = np.bincount(label)
    quota, remainder = np.divmod(sizes * count, len(label))
    quota[np.argsort(-remainder, kind="stable")[: count - quota.sum()]] += 1
    return _choose(label, quota, seed)


def _choose(label: np.ndarray, quota: np.ndarray, seed: int) -> np.ndarray:
    """Picks quota[i] examples of each class i at random; their indices, ascending."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(label == i))[:size] for i, size in enumerate(quota)]
    return np.sort(np.concatenate(chosen))


def histogram(image: np.ndarray) -> np.ndarray:
    """Counts the values 0..255 of each channel: (m, h, w, c) uint8 -> (256, c) int64."""
    counts = np.zeros((256, image.shape[-1]), np.int64)
    for start in range(0, len(image), 1000):  # bincount copies its input to 64 bits
        for channel in range(image.shape[-1]):
            values = image[start : start + 1000, ..., channel].ravel()
            counts[:, channel] += np.bincount(values, minlength=256)
    return counts


def mean_and_std(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (c,) float32 in [0, 1], of what `histogram` has counted."""
    value = np.arange(256)[:, None] / 255
    share = counts / counts.sum(0)
    mean = (share * value).sum(0)
    variance = (share * (value - mean) ** 2).sum(0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
