"""Finds a data set by its name, loads it, and cuts it into splits."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import ml_collections

from cv_jax.config.errors import UserError
from cv_jax.config.names import find, names_code
from cv_jax.config.paths import expand
from cv_jax.data.cache import cached
from cv_jax.data.checks import check_stored
from cv_jax.data.dataset import Dataset, Stored
from cv_jax.data.fields import num_examples
from cv_jax.data.sources.coco import list_coco
from cv_jax.data.sources.digits import load_digits
from cv_jax.data.sources.folder import list_folder
from cv_jax.data.sources.location import find_prepared, tfds_data_dir
from cv_jax.data.sources.masks import CAMVID, list_masks, list_voc_masks
from cv_jax.data.sources.photos import PHOTO_KEYS, load_photos
from cv_jax.data.sources.shapes import load_shapes
from cv_jax.data.sources.table import list_table
from cv_jax.data.sources.voc import list_voc
from cv_jax.data.splits import OFFICIAL, count_equal, hold_out, limit_examples, limit_labels

# Data sets that do not come from TFDS. Add a new one here, as a function () -> Stored.
OWN = {"digits": load_digits, "shapes": load_shapes}
# Directories of images with masks, as functions (directory, join_val) -> Listing.
MASKS = {
    "camvid": partial(list_masks, names=CAMVID),
    "masks": list_masks,
    "voc_masks": list_voc_masks,
}
# Masks of TFDS, by name: the data set, its feature, the classes, and the value of the first class.
TFDS_MASKS = {
    "pet_masks": ("oxford_iiit_pet", "segmentation_mask", ("pet", "background", "border"), 1)
}


def load_dataset(config_data: ml_collections.ConfigDict) -> Dataset:
    """Loads the data set that `config_data` names. TFDS first downloads one that is missing.

    Args:
        config_data: the config's `data`, with these keys:
            name: one of OWN, MASKS or TFDS_MASKS; "folder"; "voc"; "coco"; "module:function" of
                your own (() -> Stored); or the TFDS name of a data set of image classification or
                of objects with boxes.
            dir: of "folder", the directory of the class folders, or a CSV file; of "voc",
                "coco" and MASKS, see `sources.voc`, `sources.coco` and `sources.masks`. Else
                TFDS's data directory; "": TFDS_DATA_DIR or ~/tensorflow_datasets.
            size, decode, crop, eval_crop, workers, on_error: see `photos.load_photos`.
            num_val: the number of training examples that become val, see `splits.hold_out`.
            val_fraction: if num_val is 0 and the source has no val split, the share of them.
            limit: the most examples to keep of each split; 0: all.
            labels_per_class, label_fraction: the training examples that keep their labels, see
                `limit_labels`.

    Raises:
        UserError: the name is unknown, the data cannot be fetched or read, the data set does not
            match `Stored`, or `num_val` or the number of labels does not fit.
    """
    name = config_data.name
    stored = check_stored(name, _load(config_data))
    data = hold_out(name, stored, _num_val(config_data, stored))
    spec = data.spec._replace(eval_crop=config_data.eval_crop)
    data = data._replace(spec=spec, notes=(*data.notes, *count_equal(data)))
    data = limit_examples(data, config_data.limit) if config_data.limit else data
    return limit_labels(
        data,
        config_data.labels_per_class,
        config_data.label_fraction,
        config_data.label_seed,
        config_data.keep_unlabelled,
    )


def _num_val(data: ml_collections.ConfigDict, stored: Stored) -> int:
    if data.num_val or not data.val_fraction:
        return data.num_val
    if stored.val is not None:
        return OFFICIAL
    count = num_examples(stored.train)
    share = max(1, round(data.val_fraction * count))
    if share >= count:
        raise UserError(
            f"config.data.val_fraction={data.val_fraction} leaves none of the {count} training "
            "examples to train on: lower it, or add images."
        )
    return share


def _load(data: ml_collections.ConfigDict) -> Stored:
    name = data.name
    if name == "folder":
        where = _require_dir(data, "the directory of the class folders, or a CSV file")
        return load_photos(list_folder(where) if where.is_dir() else list_table(where), data)
    join_val = not data.val_fraction and data.num_val != OFFICIAL
    if name in MASKS:
        where = _require_dir(data, "a directory of images and masks, see docs/segmentation.md")
        return load_photos(MASKS[name](where, join_val), data)
    if name == "voc":
        where = _require_dir(data, "a directory in the layout of PASCAL VOC")
        return load_photos(list_voc(where, join_val), data)
    if name == "coco":
        where = _require_dir(data, "a JSON file of COCO's format, or the directory above it")
        return load_photos(list_coco(where), data)
    if name in OWN or names_code(name):
        _require_no_photo_keys(data)
        return find(name, OWN, "config.data.name")()
    if name in TFDS_MASKS:
        from cv_jax.data.sources.tfds_photos import list_prepared_masks  # here: as below

        name, *of_masks = TFDS_MASKS[name]
        return load_photos(list_prepared_masks(_find_tfds(name, data.dir), *of_masks), data)
    directory = _find_tfds(name, data.dir)
    if _has_objects(directory):
        from cv_jax.data.sources.tfds_photos import list_prepared_objects  # here: as below

        return load_photos(list_prepared_objects(directory), data)
    if any(data[key] != default for key, default in PHOTO_KEYS.items()):
        from cv_jax.data.sources.tfds_photos import list_prepared  # here: TFDS takes a while

        return load_photos(list_prepared(directory), data)
    return cached(directory, _read_prepared)


def _require_dir(data: ml_collections.ConfigDict, use: str) -> Path:
    if not data.dir:
        raise UserError(f"config.data.name={data.name!r} needs config.data.dir: {use}.")
    where = Path(expand(data.dir))
    if not where.exists():
        raise UserError(f"config.data.dir={str(where)!r} does not exist: name {use}.")
    return where


def _require_no_photo_keys(data: ml_collections.ConfigDict) -> None:
    for key, default in PHOTO_KEYS.items():
        if data[key] != default:
            raise UserError(
                f"config.data.{key}={data[key]!r} has no effect: the images of {data.name} are "
                f"decoded already. Set it to {default!r}."
            )


def _find_tfds(name: str, config_dir: str) -> Path:
    data_dir = tfds_data_dir(config_dir)
    directory = find_prepared(name, data_dir)
    if directory is None:
        from cv_jax.data.sources.prepare import prepare  # here, since importing TFDS takes a while

        prepare(name, data_dir)
        directory = find_prepared(name, data_dir)
    if directory is None:
        raise UserError(
            f"The directory of {name} in {data_dir} has no dataset_info.json: "
            "remove that directory, so that it can be prepared again."
        )
    return directory


def _has_objects(directory: Path) -> bool:
    """Returns whether a prepared TFDS data set has objects with boxes and classes."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        features = json.loads((directory / "features.json").read_text())["featuresDict"]["features"]
        of_one = features["objects"]["sequence"]["feature"]["featuresDict"]["features"]
        return "image" in features and {"bbox", "label"} <= of_one.keys()
    return False


def _read_prepared(directory):
    from cv_jax.data.sources.tfds_reader import (
        read_prepared,
    )  # here, since importing TFDS takes a while

    return read_prepared(directory)
