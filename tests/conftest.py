"""What every test stands on: strict JAX, a private cache, small data, real CIFAR-10 if there is."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

import train
from configs import digits
from cv_jax.config.base import base_config
from cv_jax.config.paths import expand
from cv_jax.data import Dataset, DataSpec, Examples, image_field, label_field
from cv_jax.data.batches import resident_batches
from cv_jax.data.sources.digits import load_digits
from cv_jax.models.ops import plain_lax
from cv_jax.runtime.mesh import make_mesh
from cv_jax.runtime.startup import cache_dir

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, so that the workers of pytest-xdist end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps decoded data and compiled programs of the tests away from the user's.

    All workers of pytest-xdist share them. Decoded data and trained networks are made anew in every
    run of the tests. Compiled programs are kept between runs in CV_JAX_TEST_CACHE, by default
    `cache_dir()`/tests: XLA's key holds the program, the flags and the versions, so a changed
    program is compiled again. An empty CV_JAX_TEST_CACHE keeps nothing.
    """
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    directory.mkdir(exist_ok=True)
    kept = os.environ.get("CV_JAX_TEST_CACHE")
    kept = str(cache_dir() / "tests") if kept is None else expand(kept)
    os.environ["CV_JAX_CACHE"] = str(directory)
    compiled = str(Path(kept or directory) / "xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled  # for the programs that tests start
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test finds in the cache of decoded data only what it has put there."""
    monkeypatch.setenv("CV_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def on_plain_lax() -> Iterator[None]:
    """Traces and compiles sooner; tests/test_ops.py holds the kernels against plain lax."""
    with plain_lax():
        yield


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The directory of a prepared CIFAR-10; skips where TFDS_DATA_DIR has none."""
    directory = Path(expand(os.environ.get("TFDS_DATA_DIR", "")))
    if not (directory / "cifar10").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared cifar10")
    return directory


def random_split(count: int, image_shape: tuple[int, int, int], num_classes: int) -> Examples:
    """Random images and labels, the same for the same arguments."""
    rng = np.random.default_rng(count)
    image = rng.integers(0, 256, (count, *image_shape), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, num_classes, count).astype(np.int32)}


def random_dataset(image_shape: tuple[int, int, int] = (8, 8, 1), num_classes: int = 10) -> Dataset:
    """70 training, 23 validation and 37 test images, none a multiple of a usual batch size."""
    train, val, test = (random_split(m, image_shape, num_classes) for m in (70, 23, 37))
    mean, std = (np.full(image_shape[-1], x, np.float32) for x in (0.5, 0.3))
    image = image_field(image_shape)._replace(mean=mean, std=std)
    spec = DataSpec(
        name="random",
        fields={"image": image, "label": label_field([f"class {i}" for i in range(num_classes)])},
        num_train=70,
        num_val=23,
        num_test=37,
        sample=train,
    )
    return Dataset(spec, train, val, test)


def write_class_folders(splits: dict[str, Examples], directory: Path) -> Path:
    """Writes images as DIR/SPLIT/LABEL/NUMBER.png, whose order is theirs. Returns DIR."""
    for split, examples in splits.items():
        for i, (image, label) in enumerate(zip(examples["image"], examples["label"], strict=True)):
            folder = directory / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = image if image.shape[-1] == 3 else image[..., 0]
            Image.fromarray(pixels).save(folder / f"{i:05d}.png")
    return directory


def digits_folder(directory: Path) -> Path:
    """Writes the digits as class folders."""
    digits = load_digits()
    return write_class_folders({"train": digits.train, "test": digits.test}, directory)


def batch_shapes(batch_size: int) -> dict:
    """The shapes of a training batch of `random_dataset`."""
    key = jax.random.key(0)
    return resident_batches(random_dataset().train, batch_size, key, make_mesh()).shapes


def on_devices(count: int, module: str, function: str) -> str:
    """What a function without arguments prints in a process that has so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {function}; {function}()"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tiny_config(on_plain_lax: None) -> ml_collections.ConfigDict:
    """Seconds on digits, with all that is random or changes in it: 3 epochs of 5 steps."""
    config = base_config()
    config.epochs = 3.0
    config.batch_size = 50
    config.model = "n94(widths=(4,))"
    config.augment = "alternating_flip|translate(1)|mixup(0.2)"
    config.progressive_resizing = "size(6, until=0.5)"
    config.select = "hardest(4, of=5)"
    config.log_every = "2 steps"
    config.checkpoint_every = "4 steps"
    config.data.limit = 250
    config.data.num_val = 50
    config.optim.name = "adamw"
    config.optim.lr = 0.01
    config.optim.lr_batch_size = 0
    config.optim.ema = 0.9
    config.optim.rules = (("whiten/kernel", "frozen"), (".*", "base"))
    return config.lock()


@pytest.fixture(scope="session")
def digits_run(private_cache: Path) -> Path:
    """The work directory of two seeds that know digits: complete, and not to be changed."""
    config = digits.get_config()
    config.epochs = 8.0
    config.num_seeds = 2
    config.model = "n94(widths=(16, 32))"
    config.optim.warmup = "10 steps"
    config.histograms_every = "4 epochs"
    workdir = private_cache / "digits_run"
    with (private_cache / "digits_run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it for all
        if not (workdir / "result.json").exists():
            with plain_lax():  # which compiles sooner
                train.run(config.lock(), workdir)
    return workdir


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """A headless Chromium, driven by Playwright; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *quiet]
        )


@pytest.fixture(scope="session")
def train_py() -> Callable[..., subprocess.CompletedProcess]:
    """Runs train.py with these arguments as a user does, from the project's directory."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "train.py", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
