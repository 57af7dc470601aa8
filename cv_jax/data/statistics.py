"""Computes statistics of the pixels of a split."""

import numpy as np


def histogram(image: np.ndarray) -> np.ndarray:
    """Counts the values 0..255 of each channel: (m, h, w, c) uint8 -> (256, c) int64."""
    counts = np.zeros((256, image.shape[-1]), np.int64)
    for start in range(0, len(image), 1000):  # bincount copies its input to 64 bits
        part = np.asarray(image[start : start + 1000])
        for channel in range(image.shape[-1]):
            values = part[..., channel].ravel()
            counts[:, channel] += np.bincount(values, minlength=256)
    return counts


def mean_and_std(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and std, each (c,) float32 in [0, 1], from the counts of `histogram`."""
    value = np.arange(256)[:, None] / 255
    share = counts / counts.sum(0)
    mean = (share * value).sum(0)
    variance = (share * (value - mean) ** 2).sum(0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
