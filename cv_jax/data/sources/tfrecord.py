"""Reads TFRecord files, one of TFDS's two formats, without TensorFlow.

A record is its length (8 bytes), the length's checksum (4), the data, the data's checksum (4),
all little-endian. A checksum is a masked CRC-32C (Castagnoli).
Source: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# Bytes of records whose checksums are computed at a time.
_BLOCK = 1 << 24


def read_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a file in order, each after its checksum has been verified.

    Raises:
        ValueError: the next record is damaged; the message names the file.
    """
    data = path.read_bytes()
    spans, problem = _spans(data)
    longest = max((end - start for start, end in spans), default=0)
    group_size = max(1, _BLOCK // max(1, longest))
    for i in range(0, len(spans), group_size):
        group = spans[i : i + group_size]
        records = [data[start:end] for start, end in group]
        expected = [data[end : end + 4] for _, end in group]
        for record, good in zip(records, _matches(records, expected), strict=True):
            if not good:
                raise ValueError(f"{path} has a record whose checksum does not match")
            yield record
    if problem:
        raise ValueError(f"{path} {problem}")


def record_spans(path: Path) -> list[tuple[int, int]]:
    """Returns where each record begins and ends, without reading the records.

    No checksum is verified.

    Raises:
        ValueError: the file is cut off; the message names it.
    """
    spans, position, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            end = position + 12 + int.from_bytes(file.read(8), "little")
            if end + 4 > size:
                raise ValueError(f"{path} is cut off, or has a wrong length, at byte {position}")
            spans.append((position + 12, end))
            position = end + 4
    return spans


def _spans(data: bytes) -> tuple[list[tuple[int, int]], str]:
    """Returns each record's (start, end), and the problem after the last of them ("": none)."""
    spans, headers, problem = [], [], ""
    position = 0
    while position < len(data):
        header = data[position : position + 12]
        end = position + 12 + int.from_bytes(header[:8], "little")
        if end + 4 > len(data):
            problem = f"is cut off, or has a wrong length, at byte {position}"
            break
        spans.append((position + 12, end))
        headers.append(header)
        position = end + 4
    lengths_match = _matches([h[:8] for h in headers], [h[8:] for h in headers])
    if not lengths_match.all():
        wrong = int(np.argmin(lengths_match))
        return spans[:wrong], f"has a wrong length at byte {spans[wrong][0] - 12}"
    return spans, problem


def _matches(rows: Sequence[bytes], checksums: Sequence[bytes]) -> np.ndarray:
    """Returns (n,) bool: whether each row's masked CRC-32C equals its 4 bytes of `checksums`."""
    expected = np.array([struct.unpack("<I", c)[0] for c in checksums], np.uint32)
    crc = crc32c(rows)
    return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8) == expected


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _table()


def crc32c(rows: Sequence[bytes]) -> np.ndarray:
    """Computes the CRC-32C (Castagnoli, RFC 3720 section 12.1) of each row: (n,) uint32.

    All rows advance together, one byte a step: fast for many rows of about equal length.
    """
    length = np.array([len(row) for row in rows], int)
    width = max(length, default=0)
    padded = np.frombuffer(b"".join(row.ljust(width, b"\0") for row in rows), np.uint8)
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for i, byte in enumerate(np.ascontiguousarray(padded.reshape(len(rows), width).T)):
        crc = np.where(i < length, _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8), crc)
    return ~crc
