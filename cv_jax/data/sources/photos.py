"""Turns listed images into a data set: reads them once, and decodes them now or when needed."""

import csv
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from tqdm import tqdm

from cv_jax.config.errors import UserError
from cv_jax.data.cache import cached, replaced
from cv_jax.data.dataset import SPLITS, Stored
from cv_jax.data.decode import find_crop
from cv_jax.data.encoded import Decoding, Encoded, num_cores
from cv_jax.data.fields import (
    IGNORED,
    Examples,
    Field,
    enlarges,
    has_kind,
    image_field,
    is_whole,
    num_examples,
    take,
)
from cv_jax.data.read_image import (
    STRIDE,
    Facts,
    letterbox_image,
    letterbox_size,
    read_facts,
    read_image,
)
from cv_jax.data.read_mask import letterbox_mask, read_mask_size
from cv_jax.data.sources.listing import Listing, some
from cv_jax.data.splits import choose_val
from cv_jax.data.statistics import histogram

# Decoded images of more bytes are decoded when they are needed, if config.data.decode="auto".
MOST_DECODED = 2**30
# Training images whose pixels give mean and std, where not all images are decoded at the start.
MEASURED = 5000
# Share of the images that become test, where the source has no splits.
TEST_SHARE = 0.2
# Keys of config.data that only images of any size have, and their defaults.
PHOTO_KEYS = {"size": 0, "decode": "auto", "crop": "", "eval_crop": 1.0}
_PART = 256  # images that are read at a time
_INDEX = {  # what the cache keeps of an image that is decoded when it is needed
    "position": Field((), "int64", "values"),
    "digest": Field((), "uint64", "values"),
}


def load_photos(listing: Listing, data: ml_collections.ConfigDict) -> Stored:
    """Reads the images of a listing; a later call takes from the cache what the first one found.

    An image that cannot be decoded is left out, counted and named. `config.data.decode` says when
    images are decoded: "once", at the start; "always", whenever a batch needs them; "auto", once
    if there is no random crop and all images together have at most 1 GB.

    Args:
        listing: the images.
        data: `config.data`, of which `size`, `decode`, `crop`, `eval_crop`, `workers` and
            `on_error` are read.

    Raises:
        UserError: no image can be decoded, or the images differ in size and `size` is 0.
    """
    crop = find_crop(data.crop)
    if crop and data.decode == "once":
        raise UserError(
            f"config.data.crop={data.crop!r} draws another crop in every epoch, so "
            "config.data.decode='once' cannot keep the images: set it to 'auto'."
        )
    if is_whole(listing.fields) and (crop or data.eval_crop != 1):
        key = "crop" if crop else "eval_crop"
        what = "boxes" if has_kind(listing.fields, "boxes") else "masks"
        raise UserError(
            f"config.data.{key}={data[key]!r} would cut {what} off: images with {what} are read "
            f"whole. Set it to {PHOTO_KEYS[key]!r}; config.augment can crop images with {what}."
        )
    decode = "always" if crop else data.decode
    settings = f"{data.size} {data.eval_crop} {decode}"
    read = partial(_read, listing, data.size, data.eval_crop, decode)
    identity = partial(_identity, listing)
    stored = cached(listing.root, lambda _: read(), settings, identity if identity() else None)
    shape = stored.fields["image"].shape
    shown = "x".join(map(str, shape))
    if "position" not in stored.fields:
        how = f"data    decoded once to {shown}, and kept in the cache"
        return stored._replace(notes=(*listing.notes, *stored.notes, how))
    decoding = Decoding(
        shape=shape,
        fit=_fit(listing, shape, data.eval_crop),
        crop=crop(shape) if crop else None,
        stops=data.on_error == "stop",
        num_workers=data.workers or num_cores(),
    )
    threads = f"{decoding.num_workers} thread{'s' if decoding.num_workers > 1 else ''}"
    how = f"data    decoded to {shown} whenever a batch needs them, by {threads}"
    stored = _with_encoded(stored, listing, decoding)
    return stored._replace(notes=(*listing.notes, *stored.notes, how))


def _fit(
    listing: Listing, shape: tuple[int, int, int], share: float
) -> Callable[[bytes], np.ndarray]:
    """Returns how an image becomes (h, w, c): cropped at the centre, or whole, see `is_whole`."""
    if is_whole(listing.fields):
        return lambda data: letterbox_image(data, shape, enlarges(listing.fields))[0]
    return partial(read_image, image_shape=shape, share=share)


def _fit_mask(listing: Listing, size: tuple[int, int]) -> Callable[[bytes], np.ndarray] | None:
    """Returns how a mask becomes (h, w); None without masks."""
    if listing.masks is None:
        return None
    return partial(letterbox_mask, numbers=listing.masks.numbers, size=size)


def _identity(listing: Listing) -> str:
    """Returns a text that changes when an image or the file of splits changes; "": not known."""
    if not listing.identity or listing.split_file is None:
        return listing.identity
    with suppress(OSError):
        return f"{listing.identity} {zlib.crc32(listing.split_file.read_bytes())}"
    return listing.identity


def _with_encoded(stored: Stored, listing: Listing, decoding: Decoding) -> Stored:
    """Puts the images in the place of what the cache keeps of them."""
    digests = np.zeros(len(listing.source), np.uint64)
    size = decoding.shape[:2]
    of_mask = replace(decoding, shape=size, fit=_fit_mask(listing, size), crop=None, fill=IGNORED)

    def encoded(split):
        digests[split["position"]] = split["digest"]
        others = {name: x for name, x in split.items() if name not in _INDEX}
        image = Encoded(listing.source, decoding, split["position"], digests)
        if listing.masks is None:
            return {"image": image, **others}
        mask = Encoded(listing.masks.source, of_mask, split["position"], digests)
        return {"image": image, "mask": mask, **others}

    train, test = encoded(stored.train), encoded(stored.test)
    return stored._replace(
        fields={name: f for name, f in stored.fields.items() if name not in _INDEX},
        train=train,
        test=test,
        val=stored.val and encoded(stored.val),
    )


class _Seen(NamedTuple):
    """What the first reading finds: facts and digests by position, and problems by position."""

    facts: dict[int, Facts]
    digest: np.ndarray
    columns: Examples
    problems: dict[int, str]


def _read(listing: Listing, size: int, share: float, decode: str) -> Stored:
    """Returns the splits with decoded images, or with what `_INDEX` names instead of images."""
    seen = _look(listing)
    shape = _shape(listing, size, seen)
    _scale_boxes(listing, seen, shape[:2])
    few = len(seen.facts) * np.prod(shape) <= MOST_DECODED
    once = decode == "once" or (decode == "auto" and few)
    split = assign_splits(listing, seen.columns, np.array(sorted(seen.facts)))
    positions = {name: np.flatnonzero(split == name) for name in SPLITS}
    decoded, counts = {}, np.zeros((256, shape[-1]), np.int64)
    for name, chosen in positions.items():
        if name == "train" and not (few or once):
            chosen = chosen[:: -(-len(chosen) // MEASURED)]
        decoded[name], found = _decode(listing, chosen, shape, share, once, seen.problems)
        positions[name] = np.setdiff1d(positions[name], list(seen.problems))
        counts += found if name == "train" else 0
    splits = {}
    for name, chosen in positions.items():
        index = {"position": chosen, "digest": seen.digest[chosen]}
        splits[name] = {**(decoded[name] if once else index), **take(seen.columns, chosen)}
    fields = {"image": image_field(shape), **({} if once else _INDEX), **listing.fields}
    if listing.masks:
        fields["mask"] = fields["mask"]._replace(shape=shape[:2])
    _require_examples(listing, splits, seen.problems)
    return Stored(
        fields=fields,
        train=splits["train"],
        test=splits["test"],
        val=splits["val"] if len(positions["val"]) else None,
        histograms={"image": counts},
        notes=tuple(_notes(listing, splits, seen, positions)),
    )


def _look(listing: Listing) -> _Seen:
    """Reads every image without decoding its pixels."""

    def look(position):
        data, values = listing.source.example(position)
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        facts = read_facts(data)
        if listing.masks:
            _check_mask(listing.masks.source.read(position), facts.size)
        return facts, digest, values

    count = len(listing.source)
    facts, problems, digest = {}, {}, np.zeros(count, np.uint64)
    columns = {name: x.copy() for name, x in listing.columns.items()}
    for position, found in _in_threads(look, range(count), f"Reading {listing.name}"):
        if isinstance(found, UserError):
            problems[position] = str(found)
            continue
        facts[position], digest[position], values = found
        for name, value in values.items():
            columns[name][position] = value
    return _Seen(facts, digest, columns, problems)


def _check_mask(data: bytes, size: tuple[int, int]) -> None:
    found = read_mask_size(data)
    if found != size:
        shown = ["{}x{}".format(*reversed(one)) for one in (found, size)]
        raise UserError(f"its mask is of {shown[0]} pixels, and it has {shown[1]}")


def _shape(listing: Listing, size: int, seen: _Seen) -> tuple[int, int, int]:
    """Returns (h, w, c) of the decoded images; grey if all images are."""
    facts = seen.facts
    if not facts:
        position, why = min(seen.problems.items())
        raise UserError(
            f"None of the {len(listing.source):,} images of {listing.root} can be decoded, such as "
            f"{listing.source.name(position)} ({why}): is it the right config.data.dir?"
        )
    channels = 1 if all(found.grey for found in facts.values()) else 3
    if is_whole(listing.fields):
        sizes = np.array([found.size for found in facts.values()])
        if size:
            sizes = np.array(
                [letterbox_size(one, (size, size), enlarges(listing.fields)) for one in sizes]
            )
        return *(int(-(-side // STRIDE) * STRIDE) for side in sizes.max(0)), channels
    if size:
        return size, size, channels
    (first, one), *others = facts.items()
    for position, other in others:
        if other.size != one.size:
            names = listing.source.name(first), listing.source.name(position)
            raise UserError(
                f"The images differ in size: {names[0]} has {one.size[0]}x{one.size[1]} pixels, "
                f"{names[1]} {other.size[0]}x{other.size[1]}. Set config.data.size, such as 224."
            )
    return *one.size, channels


def _scale_boxes(listing: Listing, seen: _Seen, size: tuple[int, int]) -> None:
    """Moves the boxes in `seen.columns` from the pixels of the files to those of (h, w) images."""
    for name in (name for name, field in listing.fields.items() if field.kind == "boxes"):
        for position, facts in seen.facts.items():
            (h, w), (new_h, new_w) = facts.size, letterbox_size(facts.size, size)
            seen.columns[name][position] *= np.float32([new_w / w, new_h / h] * 2)


def _decode(
    listing: Listing,
    chosen: np.ndarray,
    shape: tuple[int, int, int],
    share: float,
    keep: bool,
    problems: dict[int, str],
) -> tuple[Examples, np.ndarray]:
    """Decodes images, with their masks, and adds the broken ones to `problems`.

    Returns:
        the images and masks without the broken ones, empty unless `keep`; and the histogram of the
        images.
    """
    fit, fit_mask = _fit(listing, shape, share), _fit_mask(listing, shape[:2])

    def decode(position):
        found = {"image": fit(listing.source.read(position))}
        if fit_mask:
            found["mask"] = fit_mask(listing.masks.source.read(position))
        return found

    shapes = {"image": shape, **({"mask": shape[:2]} if fit_mask else {})}
    kept = {name: np.empty((len(chosen), *x), np.uint8) for name, x in shapes.items() if keep}
    counts, part, good = 0, [], 0
    for position, found in _in_threads(decode, chosen, f"Decoding {listing.name}"):
        if isinstance(found, UserError):
            problems[int(position)] = str(found)
            continue
        for name, array in kept.items():
            array[good] = found[name]
        part.append(found["image"])
        good += 1
        if len(part) == _PART:
            counts, part = counts + histogram(np.stack(part)), []
    if part:
        counts = counts + histogram(np.stack(part))
    return take(kept, slice(good)), counts


def _in_threads(
    function: Callable[[int], Any], positions: Sequence[int], what: str
) -> Iterator[tuple[int, Any]]:
    """Yields each position and function(position), or the UserError that it raised, in order."""

    def guarded(position):
        try:
            return position, function(position)
        except UserError as error:
            return position, error

    def of_part(part):
        return [guarded(position) for position in part]

    parts = [positions[i : i + _PART] for i in range(0, len(positions), _PART)]
    shown = tqdm(total=len(positions), desc=what, disable=not sys.stderr.isatty())
    with shown, ThreadPoolExecutor(num_cores()) as pool:
        for start in range(0, len(parts), 2 * num_cores()):  # not all images are held at once
            for found in pool.map(of_part, parts[start : start + 2 * num_cores()]):
                shown.update(len(found))
                yield from found


def assign_splits(listing: Listing, columns: Examples, good: np.ndarray) -> np.ndarray:
    """Returns the split (m,) of each image; "" for an image that cannot be read.

    Where the source does not say, a fifth becomes test: stratified by class, or whole groups. The
    choice is kept in `listing.split_file`, and only images that are new there are assigned: to the
    split of their group, if some of its images have one. Without a file, the images never change.
    """
    split = np.full(len(listing.split), "", "<U5")
    split[good] = listing.split[good]
    name = listing.source.name
    kept = _read_splits(listing.split_file) if listing.split_file else {}
    for position in good:
        split[position] = split[position] or kept.get(name(position), "")
    if any(split[good] == ""):
        if "group" in columns:
            _join_groups(split, columns["group"], good)
        new = good[split[good] == ""]
        is_test = _choose_test(listing, columns, new, others=len(new) < len(good))
        split[new] = np.where(is_test, "test", "train")
        if listing.split_file:
            _write_splits(listing.split_file, {name(i): split[i] for i in good})
    return split


def _join_groups(split: np.ndarray, group: np.ndarray, good: np.ndarray) -> None:
    """Gives images without a split that of another image of their group."""
    known = {int(group[i]): split[i] for i in good if split[i]}
    for i in good:
        split[i] = split[i] or known.get(int(group[i]), "")


def _choose_test(listing: Listing, columns: Examples, new: np.ndarray, others: bool) -> np.ndarray:
    """Returns which images at `new` become test, (k,) bool; `others`: whether there are more."""
    examples = {"position": new, **take(columns, new)}
    try:
        test = choose_val(examples, listing.fields, round(TEST_SHARE * len(new)))
    except UserError as error:  # a fifth would be all groups
        if others:
            return np.zeros(len(new), bool)
        raise UserError(
            f"{listing.root} has too few groups for a part that becomes test: write train and test "
            "into the column 'split'."
        ) from error
    return np.isin(np.arange(len(new)), test)


def _read_splits(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            found = {row["path"]: row["split"] for row in csv.DictReader(lines)}
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({error}): correct it, or remove it.") from error
    if odd := set(found.values()) - set(SPLITS):
        raise UserError(f"{file} has the unknown split {sorted(odd)[0]!r}: write train or test.")
    return found


def _write_splits(file: Path, split: dict[str, str]) -> None:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(("path", "split"))
    writer.writerows(split.items())
    try:
        with replaced(file) as whole:  # several processes may write and read it at once
            whole.write(lines.getvalue().encode(errors="surrogateescape"))
    except OSError as error:
        reason = error.strerror or error
        print(
            f"cv_jax: {file} cannot be written ({reason}). The same images become test again only "
            "while no image is added or removed.",
            file=sys.stderr,
        )


def _require_examples(
    listing: Listing, splits: dict[str, Examples], problems: dict[int, str]
) -> None:
    for name in ("train", "test"):
        if not num_examples(splits[name]):
            broken = f", and {len(problems):,} images cannot be decoded" if problems else ""
            raise UserError(
                f"{listing.root} has no images in the split {name!r}{broken}: add images, or let "
                "cv_jax choose the splits, see docs/data.md."
            )


def _notes(
    listing: Listing, splits: dict[str, Examples], seen: _Seen, positions: dict[str, np.ndarray]
) -> Iterator[str]:
    """Yields lines about the classes, and about what is wrong with the images."""
    if "label" in listing.fields:
        yield from _class_notes(listing.fields["label"].names, splits)
    if seen.problems:
        named = [f"{listing.source.name(i)} ({why})" for i, why in sorted(seen.problems.items())]
        are = "images" if len(named) > 1 else "image"
        yield f"data    {len(named):,} {are} left out, not to be decoded: {some(named)}"
    for name, chosen in positions.items():
        first: dict[int, int] = {}
        pairs = []
        for position, digest in zip(chosen.tolist(), seen.digest[chosen].tolist(), strict=True):
            if first.setdefault(digest, position) != position:
                pairs.append((first[digest], position))
        if pairs:
            named = [" = ".join(map(listing.source.name, pair)) for pair in pairs]
            are = "files of {} are copies of others" if len(pairs) > 1 else "file of {} is a copy"
            are = are.format(name) + ("" if len(pairs) > 1 else " of another")
            yield f"data    {len(pairs):,} {are}: {some(named)}"
    if "group" in listing.fields and (count := _num_divided(splits)):
        groups = "groups have" if count > 1 else "group has"
        yield f"data    {count:,} {groups} images in two splits"
    if not all(listing.split):
        by = [f"by {by}" for by in ("group", "label") if by in listing.fields]
        how = (*by, "at random")[0].replace("label", "class")
        file = listing.split_file
        see = f": see {file}" if file and file.exists() else ""
        yield f"data    test is chosen {how}, a fifth of the images{see}"


def _num_divided(splits: dict[str, Examples]) -> int:
    """Returns the number of groups that have images in more than one split."""
    groups = [np.unique(split["group"]) for split in splits.values()]
    return int((np.unique(np.concatenate(groups), return_counts=True)[1] > 1).sum())


def _class_notes(names: tuple[str, ...], splits: dict[str, Examples]) -> Iterator[str]:
    counts = {
        name: np.bincount(split["label"], minlength=len(names)) for name, split in splits.items()
    }
    total = sum(counts.values())
    shown = [f"{name} {count:,}" for name, count in zip(names, total, strict=True)]
    few, many = names[total.argmin()], names[total.argmax()]
    ends = f"; fewest in {few}, {total.min():,}; most in {many}, {total.max():,}"
    yield f"data    images by class: {some(shown, 10)}{ends if len(names) > 10 else ''}"
    if missing := [name for name, count in zip(names, counts["train"], strict=True) if not count]:
        yield f"data    {len(missing):,} classes without training images: {some(missing)}"
