"""Loads batches of photographs on request; benchmarks.photos starts this process.

    python -m benchmarks.photo_loaders LOADER SOURCE

SOURCE is a directory of JPEG files, or a file of the format array_record. The process prints {}
when it is ready. Each line on stdin is a number of batches. The process starts to load, does not
count the first batch, and prints a line of JSON: images a second of the other batches, and
processor seconds per image of all batches, child processes included. No loader imports another.
"""

import gc
import itertools
import json
import mmap
import multiprocessing
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy as np

BATCH_SIZE = 128
SHAPE = 224, 224, 3
AHEAD = 2  # batches under way while one is waited for, as in DataLoader
PART = 8  # images a task


class Photos:
    """Encoded photographs by position, one after another and then again."""

    def __init__(self, source: str, count: int) -> None:
        self._source, self._count = source, count

    def __reduce__(self) -> tuple:
        return Photos, (self._source, self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> bytes:
        if os.path.isdir(self._source):
            return self._files[position % len(self._files)].read_bytes()
        return self._records[position % len(self._records)]

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(Path(self._source).iterdir())

    @cached_property
    def _records(self) -> Sequence[bytes]:  # opened in each process: its threads do not fork
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([self._source])


def crop(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """Decodes a random crop by cv_jax."""
    from cv_jax.data.decode import random_crop

    return random_crop(data, SHAPE, rng)


_ring = np.frombuffer(mmap.mmap(-1, (AHEAD + 1) * BATCH_SIZE * 224 * 224 * 3), np.uint8)
_ring = _ring.reshape(AHEAD + 1, BATCH_SIZE, *SHAPE)  # shared by forked processes


def _fill(photos: Photos, positions: range) -> None:
    for position in positions:
        rng = np.random.Generator(np.random.Philox(key=0, counter=[0, position, 0, 0]))
        batch, row = divmod(position, BATCH_SIZE)
        _ring[batch % (AHEAD + 1), row] = crop(photos[position], rng)


def load_ours(photos: Photos, executor: Callable[[int], Executor]) -> Iterator[np.ndarray]:
    """Yields batches that as many threads or processes as there are cores fill in place."""
    num_batches = len(photos) // BATCH_SIZE
    with executor(num_cores()) as pool:

        def submit(batch):
            start = batch * BATCH_SIZE
            parts = [range(at, at + PART) for at in range(start, start + BATCH_SIZE, PART)]
            return [pool.submit(_fill, photos, part) for part in parts]

        under_way = deque(submit(batch) for batch in range(min(AHEAD, num_batches)))
        for batch in range(num_batches):
            for part in under_way.popleft():
                part.result()
            yield _ring[batch % (AHEAD + 1)]
            if batch + AHEAD < num_batches:
                under_way.append(submit(batch + AHEAD))


def load_torch(photos: Photos) -> Iterator[object]:
    """Yields batches of torch's DataLoader and torchvision, as PyTorch's ImageNet example does."""
    import torch
    from PIL import Image
    from torchvision import transforms

    steps = transforms.Compose([transforms.RandomResizedCrop(224), transforms.PILToTensor()])

    class DataSet(torch.utils.data.Dataset):
        def __len__(self):
            return len(photos)

        def __getitem__(self, position):
            return steps(Image.open(BytesIO(photos[position])).convert("RGB"))

    return iter(torch.utils.data.DataLoader(DataSet(), BATCH_SIZE, num_workers=num_cores()))


def load_grain(photos: Photos, processes: bool) -> Iterator[np.ndarray]:
    """Yields batches of grain, whose threads or processes call `crop`."""
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain's processes read flags

    images = grain.MapDataset.source(photos).seed(0).random_map(crop)
    threads = grain.ReadOptions(num_threads=1 if processes else num_cores())
    batches = images.to_iter_dataset(threads).batch(BATCH_SIZE)
    if processes:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_cores()))
    return iter(batches)


fork = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("fork"))
LOADERS = {
    "ours": partial(load_ours, executor=ThreadPoolExecutor),
    "ours, processes": partial(load_ours, executor=fork),
    "DataLoader": load_torch,
    "grain": partial(load_grain, processes=False),
    "grain, processes": partial(load_grain, processes=True),
}


def num_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_seconds() -> float:
    """Returns the processor seconds of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(load: Callable[[Photos], Iterator], source: str, num_batches: int) -> dict[str, float]:
    """Loads the batches once."""
    cpu = cpu_seconds()
    batches = load(Photos(source, num_batches * BATCH_SIZE))
    next(batches)
    start = time.perf_counter()
    counted = sum(1 for _ in itertools.islice(batches, num_batches - 1))
    seconds = time.perf_counter() - start
    del batches
    gc.collect()  # ends the loader's processes
    cpu = (cpu_seconds() - cpu) / (num_batches * BATCH_SIZE)
    return {"images_per_second": counted * BATCH_SIZE / seconds, "cpu_seconds": cpu}


def main(loader: str, source: str) -> None:
    """Answers requests until stdin ends."""
    load = LOADERS[loader]
    measure(load, source, 2)  # imports, and reads the files into memory
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(load, source, int(line))), flush=True)


if __name__ == "__main__":
    from benchmarks import photo_loaders  # grain's processes find its functions by their names

    photo_loaders.main(*sys.argv[1:])
