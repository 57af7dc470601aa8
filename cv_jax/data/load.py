"""A data set by its name."""

import ml_collections

from cv_jax.config.errors import UserError
from cv_jax.data.cache import cached
from cv_jax.data.dataset import (
    Dataset,
    Stored,
    check_stored,
    first_examples,
    hold_out,
    limit_labels,
)
from cv_jax.data.digits import load_digits
from cv_jax.data.location import find_prepared, tfds_data_dir

# Data sets that do not come from TFDS: a new one is a function here, () -> Stored.
OWN = {"digits": load_digits}


def load_dataset(config_data: ml_collections.ConfigDict) -> Dataset:
    """Loads what `config_data` names; TFDS downloads and prepares it first where it must.

    Args:
        config_data: `name` is one of OWN or the TFDS name of an image-classification data set;
            `dir` is where TFDS keeps its data ("": TFDS_DATA_DIR or ~/tensorflow_datasets);
            `num_val` examples of train become val, stratified, the same for every seed; above 0,
            `limit` keeps only so many examples of each split, the first ones; of those of train
            `labels_per_class` or `label_fraction` keep their labels, see `limit_labels`.

    Raises:
        UserError: the name is unknown, the data cannot be fetched or read, it is not a sound
            image-classification data set, or `num_val` or the number of labels does not fit.
    """
    name = config_data.name
    stored = OWN[name]() if name in OWN else _load_tfds(name, config_data.dir)
    data = hold_out(name, check_stored(name, stored), config_data.num_val)
    data = first_examples(data, config_data.limit) if config_data.limit else data
    return limit_labels(
        data,
        config_data.labels_per_class,
        config_data.label_fraction,
        config_data.label_seed,
        config_data.keep_unlabelled,
    )


def _load_tfds(name: str, config_dir: str) -> Stored:
    data_dir = tfds_data_dir(config_dir)
    directory = find_prepared(name, data_dir)
    if directory is None:
        from cv_jax.data.prepare import prepare  # here, since importing TFDS takes a while

        prepare(name, data_dir)
        directory = find_prepared(name, data_dir)
    if directory is None:
        raise UserError(
            f"{data_dir} has a directory of {name} without dataset_info.json in it: "
            "remove that directory, so that it can be prepared again."
        )
    return cached(directory, _read_prepared)


def _read_prepared(directory):
    from cv_jax.data.tfds_reader import read_prepared  # here, since importing TFDS takes a while

    return read_prepared(directory)
