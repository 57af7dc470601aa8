"""The base config: every leaf with its default and unit."""

import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from cv_jax.config.errors import UserError

# Leaves that may differ between runs of one experiment.
SEED_KEYS = {"seed", "num_seeds", "data.label_seed"}


def base_config() -> ml_collections.ConfigDict:
    """Returns the config that every experiment starts from, with all leaves.

    Durations are texts such as "2 epochs", "500 steps", "1e6 examples" or "never". Settings that
    name a function and its arguments are texts such as "crop(4)|flip"; see `cv_jax.config.calls`.
    """
    data = ml_collections.ConfigDict()
    data.name = "digits"  # digits, folder, or an image-classification data set of TFDS
    # folder: the directory of the class folders, or a CSV file; else of the TFDS data, "":
    # TFDS_DATA_DIR or ~/tensorflow_datasets
    data.dir = ""
    data.size = 0  # pixels a side to which images are decoded; 0: as they are, all of one size
    data.decode = "auto"  # once, at the start; always, when a batch needs them; auto: by size
    data.crop = ""  # random crop in the decoder, such as "random_resized(0.08)"; needs "always"
    data.eval_crop = 1.0  # share of the shorter side in the centre crop of evaluation
    data.workers = 0  # threads that decode; 0: one for each processor core
    data.on_error = "replace"  # an image that breaks during the run: replace it, or stop
    data.num_val = 0  # examples held out of train, the same for every seed; -1: the official val
    data.val_fraction = 0.0  # if num_val is 0: the official val, or else so much of train
    data.limit = 0  # most examples of each split; 0: all
    data.label_fraction = 0.0  # fraction of the training examples that keep their label; 0: all
    data.labels_per_class = 0  # labelled examples per class, when above 0; else label_fraction
    data.label_seed = 0  # seed that chooses the labelled examples
    data.keep_unlabelled = False  # also train on the unlabelled examples: for tasks without labels
    data.normalize = True  # scale to mean 0 and std 1 per channel of train; False: [0, 1]
    # The mean and std of data.normalize: those of train; imagenet, which networks of torchvision
    # expect; half, 0.5 and 0.5, which ViTs of timm expect.
    data.normalize_by = "train"
    # Order of the training examples in an epoch; "uniform": each at most once. "balanced": as many
    # examples of each class, so that those of rare classes come again and again.
    data.sampling = "uniform"
    data.stream = False  # feed batches from the host instead of keeping train on the device

    optim = ml_collections.ConfigDict()
    optim.name = "sgd(nesterov=True)"  # one of cv_jax.optim.optimizers.OPTIMIZERS
    optim.lr = 0.1  # peak learning rate for lr_batch_size examples a step
    optim.lr_batch_size = 256  # the rate is lr * batch_size / lr_batch_size; 0: the rate is lr
    optim.momentum = 0.9  # b1 of the Adam family
    optim.weight_decay = 0.0
    optim.schedule = "cosine"  # one of cv_jax.optim.schedules.SCHEDULES
    optim.warmup = "never"  # duration of the linear warm-up from 0
    optim.clip_norm = 0.0  # largest norm of the whole gradient; 0: off
    optim.skip_nonfinite = False  # skip a step whose loss or new state is not finite
    optim.ema = 0.0  # decay of the averaged parameters that evaluation uses; 0: off
    optim.ema_of = ".*"  # regex of the paths of parameters to average; others are used as they are
    # (regex of a parameter's path, group): the first match counts; "group?" may match none
    optim.rules = ((".*", "base"),)
    optim.groups = ml_collections.ConfigDict()  # group -> settings that differ from optim's

    seeds = ml_collections.ConfigDict()
    seeds.mode = "auto"  # how one device executes its runs: batched, in_turn; auto: in_turn on CPU

    mesh = ml_collections.ConfigDict()  # devices along each axis; their product is all devices
    mesh.seed = 0  # each trains different runs; 0: the largest number that divides the runs
    mesh.data = 0  # these share every batch; 0: all devices that the other axes leave
    mesh.fsdp = 1  # these share every batch, the parameters and the optimizer's state

    parts = {"data": data, "optim": optim, "seeds": seeds, "mesh": mesh}
    config = ml_collections.ConfigDict(parts)
    config.task = "classification"  # a file in cv_jax/tasks
    config.method = ""  # how a task learns: "simclr", "huber(1.0)", ...; see the task
    # RUN or RUN:SUBTREE with the initial parameters. RUN is a work directory or a .safetensors file
    # of cv_jax.tools.export, torchvision or timm.
    config.init_from = ""
    config.init_allow = ""  # regex of parameters that RUN may lack or have in another shape
    config.init_anew = ""  # regex of parameters that are always initialised, not taken from RUN
    config.seed = 0  # seed of the first run
    config.num_seeds = 1  # runs in one program, with the seeds seed, seed + 1, ...
    config.sweep = ()  # (key, values) pairs, written --config.sweep.KEY="(value, value, ...)"
    config.epochs = 10.0  # length of the training; an epoch is num_train // batch_size steps
    config.steps = 0  # length in steps, when above 0; else epochs
    config.batch_size = 128  # examples a step, over all devices
    # Microbatches that a step's batch is cut into, to save memory. Their gradients are added up to
    # that of the batch. Batch normalisation sees one microbatch at a time.
    config.accumulate = 1
    config.eval_batch_size = 1000  # examples
    config.augment = ""  # a chain of cv_jax.augment.chain.AUGMENTATIONS
    # Which examples of a batch to train on; "": all. "hardest(10, of=16)" keeps the 10 of every
    # 16 whose last loss was highest.
    config.select = ""
    config.progressive_resizing = ""  # smaller images at first, e.g. "size(24, until=0.5)"
    config.model = "lenet"  # one of cv_jax.models.MODELS
    config.dtype = "auto"  # compute dtype: float32, bfloat16; auto: bfloat16 on TPU and GPU
    config.label_smoothing = 0.0  # in [0, 1)
    # Weights of the classes in the training loss; "": all 1. "balanced": class i of n has weight
    # m / (n m_i), where m_i of the m training examples (pixels) are of this class. "sqrt": the
    # square root of that.
    config.class_weights = ""
    config.tta = "none"  # views in the final evaluation: none, mirror, mirror_translate, square
    config.log_every = "1 epoch"
    config.eval_every = "1 epoch"  # evaluations on val
    # The training ends early once no run has improved its headline on val for this long. Schedules
    # stay those of the whole length.
    config.patience = "never"
    config.checkpoint_every = "1 epoch"
    config.histograms_every = "never"  # histograms of the parameters in TensorBoard
    config.keep_checkpoints = 2  # newest checkpoints kept, beside the best on val
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shortens an experiment to seconds: the same code on a few examples, for a first try."""
    config.steps = 4
    config.batch_size = 16
    config.accumulate = min(config.accumulate, 2)
    config.eval_batch_size = 64
    config.data.limit = 128
    config.data.num_val = min(config.data.num_val, 32)
    config.data.labels_per_class = min(config.data.labels_per_class, 2)
    config.data.label_fraction = 0.25 if config.data.label_fraction else 0.0
    config.log_every = config.eval_every = config.checkpoint_every = "2 steps"
    return config


def choose(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """Returns the variant that a config file's argument names: "" unchanged, "smoke" shortened."""
    if arg == "smoke":
        return smoke(config)
    if arg:
        raise UserError(f"A config file takes the argument 'smoke' or none, not {arg!r}.")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves {"optim.lr": 0.1, ...} of a config; an empty sub-config has none."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the config as JSON text, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {leaf: (old value, new value)} where two configs differ; an absent leaf is None."""
    # Through JSON, so that a tuple equals the list that it becomes on disk.
    old, new = (flatten(json.loads(json.dumps(dict(config)))) for config in (old, new))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
