"""Tar shards in the layout of WebDataset as a source; nothing is unpacked, and any order of reading works."""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from anomalymatch.cache import Cache, Contents, cache_key
from anomalymatch.checks import check_choice
from anomalymatch.data.find import damaged_file, find_files, hash_sample, is_hidden, is_utf8, stamp
from anomalymatch.data.labels import LABELS_FILE
from anomalymatch.data.source import hash_rows
from anomalymatch.data.sources.encoded import SUFFIXES, TRIED, EncodedSource, Listing, check_bytes, check_complete
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.lru import LRU
from anomalymatch.progress import progress
from anomalymatch.text import listed

logger = logging.getLogger(__name__)

DEFAULT_LABELS = "cls"
LABEL_KEYS = ("cls", "txt", "json")
KEY_ENDS = ("first_dot", "last_dot")
OPEN_FILES = 64
_MEGABYTE = 10**6
MAX_TEXT = 2**16
"""Longest member that is read as a label."""
_PACKED = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz", b"\x28\xb5": ".zst"}
_BLOCK = 512


class WebDatasetSource(EncodedSource):
    """Images in tar shards; a sample is all members with the same key, `key.jpg` and `key.cls` for example.

    An id is the key: the path in the shard up to the first dot of the file name. Opening reads the headers of the
    shards and the labels, and caches them in `cache_dir`; an image is then one read at a known offset. From a shard
    that breaks off, all complete images can be read. See `EncodedSource` for the other arguments.

    Args:
        root: a shard, a folder that is searched for *.tar at any depth, or a URL of either.
        image_key: member of a sample that is the image, "jpg" or "left.png"; None takes the only one.
        label_key: member that holds the class: "cls", "txt", "json" (its field "label") or "json.FIELD"; None reads
            no classes, and neither does a set without a single `cls`.
        key_end: "first_dot", or "last_dot" for ordinary file names with dots, each a sample of its own.
        **options: arguments of `EncodedSource`; the labels file names keys.

    Raises:
        DataError: also if a shard is compressed, a sample has several images and none is named, a key occurs twice,
            or a label is missing.
    """

    dataset = "webdataset"
    expected = "a tar shard or the folder that holds such files"
    suffixes = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

    def __init__(
        self,
        root: str | Path | None,
        *,
        image_key: str | None = None,
        label_key: str | None = DEFAULT_LABELS,
        key_end: str = "first_dot",
        **options: Any,
    ) -> None:
        check_choice("dataset.source.key_end", key_end, KEY_ENDS)
        if label_key is not None and label_key not in LABEL_KEYS and not label_key.startswith("json."):
            raise ConfigError(
                f"dataset.source.label_key must be null, one of {', '.join(LABEL_KEYS)}, or json.FIELD, got {label_key}"
            )
        self._keys = _Keys(image_key, label_key, key_end)
        super().__init__(root, **options)

    def list_images(self, place: Path, cache_dir: Path | None) -> Listing:
        """See `EncodedSource.list_images`."""
        label_key = self._keys.label
        endings = self.suffixes
        self._files = [f.path for f in find_files(place, lambda p: p.name.lower().endswith(endings), "a tar shard")]
        indices = _index_all(self._files, None if label_key is None else f".{label_key.split('.')[0]}", cache_dir)
        samples = _samples(place, self._files, indices, self._keys)
        self._shards = np.array([sample.shard for sample in samples.values()], dtype=np.int32)
        self._offsets = np.array([sample.offset for sample in samples.values()], dtype=np.int64)
        self._sizes = np.array([sample.size for sample in samples.values()], dtype=np.int64)
        self._first_members = [sample.member for sample in islice(samples.values(), TRIED)]
        self._stats = [stamp(file) for file in self._files]
        self._opened: LRU[Path, int] = LRU(OPEN_FILES, close=os.close)
        shards = [(file.name, *stat, hash_sample(file)) for file, stat in zip(self._files, self._stats, strict=True)]
        fingerprint = hash_rows("webdataset", [*shards, (hashlib.sha256(self._offsets.tobytes()).hexdigest(),)])
        return Listing(list(samples), fingerprint, _truth(place, samples, label_key))

    def is_tiff(self, id_: str, position: int) -> bool:
        """See `EncodedSource.is_tiff`; keys have no suffix, but members have."""
        return super().is_tiff(self._first_members[position], position)

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        shard, size = int(self._shards[position]), int(self._sizes[position])
        check_bytes(size)
        file = self._files[shard]
        try:
            with self._opened.use(file, partial(os.open, file, os.O_RDONLY)) as opened:
                own = os.dup(opened)  # other threads can read meanwhile
            try:
                stat = os.fstat(own)
                data = os.pread(own, size, int(self._offsets[position]))
            finally:
                os.close(own)
        except OSError as error:
            raise UnreadableImageError(f"{file.name} cannot be read: {error.strerror}") from None
        if (stat.st_size, stat.st_mtime_ns) != self._stats[shard]:
            raise UnreadableImageError(f"{file.name} has changed since the set was opened")
        if len(data) < size:
            raise UnreadableImageError(f"{file.name} breaks off within this image")
        return data


@dataclass(frozen=True, slots=True)
class _Keys:
    """Options that name the members of a sample."""

    image: str | None
    label: str | None
    end: str

    def split(self, name: str) -> tuple[str, str]:
        """Split a path into the key of its sample and the rest."""
        folder, slash, file = name.rpartition("/")
        key, _, rest = file.partition(".") if self.end == "first_dot" else file.rpartition(".")
        return folder + slash + key, rest

    def is_image(self, rest: str) -> bool:
        return self.image is None or self.image.lower() == rest.lower()


@dataclass(slots=True)
class _Sample:
    """Place of an image and its label."""

    shard: int
    offset: int
    size: int
    member: str
    label: str | None = None


@dataclass
class _Index:
    """Images of one shard, in its order, and the contents of its labels by name.

    `damage` is the reason why the headers could not be followed to the end; empty if they could.
    """

    names: list[str] = field(default_factory=list)
    offsets: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    texts: dict[str, str] = field(default_factory=dict)
    damage: str = ""


def _index_all(files: Sequence[Path], text_suffix: str | None, cache_dir: Path | None) -> list[_Index]:
    done = 0
    total = sum(file.stat().st_size for file in files)
    with progress("Looking up images", max(1, total // _MEGABYTE), "MB") as advance:

        def passed(n: int) -> None:
            nonlocal done
            advance((done + n) // _MEGABYTE - done // _MEGABYTE)
            done += n

        return [_index(file, text_suffix, cache_dir, passed) for file in files]


def _index(file: Path, text_suffix: str | None, cache_dir: Path | None, advance: Callable[[int], None]) -> _Index:
    """Index a shard, or read the index from the cache if the file has not changed.

    `text_suffix` is the ending of the members whose text is read, ".cls" for example; `advance` is called with numbers
    of bytes.
    """
    stat = file.stat()
    if cache_dir is None:
        return _follow(file, stat.st_size, text_suffix, advance)

    def compute() -> Contents:
        index = _follow(file, stat.st_size, text_suffix, advance)
        info = {"names": index.names, "texts": index.texts, "damage": index.damage}
        return {"offsets": index.offsets, "sizes": index.sizes}, info

    place = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, hash_sample(file)]
    arrays, info = Cache(cache_dir / "tar").get(cache_key({"file": place, "text_suffix": text_suffix}), compute)
    # Copied, because a process has a limited number of memory maps.
    offsets, sizes = np.array(arrays["offsets"]), np.array(arrays["sizes"])
    return _Index(info["names"], offsets, sizes, info["texts"], info["damage"])


def _follow(file: Path, size: int, text_suffix: str | None, advance: Callable[[int], None]) -> _Index:
    index, skipped = _Index(), Counter[str]()
    places: list[tuple[int, int]] = []
    with file.open("rb") as opened:
        _refuse_packed(file, opened)
        for member in _members(file, opened, size, index, advance):
            name = member.name.removeprefix("./")
            is_text = text_suffix is not None and name.lower().endswith(text_suffix)
            if PurePosixPath(name).name == LABELS_FILE:
                logger.warning("%s: %s in it is not used: put it beside the archive", file, name)
            if is_hidden(name) or not (is_text or PurePosixPath(name).suffix.lower() in SUFFIXES):
                continue
            if why := _unfit(member):
                skipped[why] += 1
            elif not is_text:
                index.names.append(name)
                places.append((member.offset_data, member.size))
            elif member.size <= MAX_TEXT:
                opened.seek(member.offset_data)
                text = opened.read(member.size)
                if len(text) == member.size:
                    index.texts[name] = text.decode(errors="replace")
    if skipped:
        logger.warning("%s: skipped %s", file, ", ".join(f"{n:,} {why}" for why, n in skipped.items()))
    index.offsets, index.sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()
    return index


def _refuse_packed(file: Path, opened: BinaryIO) -> None:
    suffix = _PACKED.get(opened.read(2))
    if suffix:
        raise DataError(
            f"{file}: expected a plain tar archive, found a compressed one ({suffix}), in which no image can be looked "
            "up: unpack it, or pack it again without compression"
        )
    opened.seek(0)


def _members(
    file: Path, opened: BinaryIO, size: int, index: _Index, advance: Callable[[int], None]
) -> Iterator[tarfile.TarInfo]:
    """Yield all members up to the end or the first damaged header, which is noted in `index.damage`."""
    try:
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except Exception as error:  # a damaged header can make the reader raise anything
        raise damaged_file(file, "a tar archive", error) from None
    at = -1
    while True:
        try:
            member = tar.next()
        except Exception as error:
            index.damage = f"the archive breaks off at byte {min(tar.offset, size):,} ({error})"
            return
        if member is None:
            break
        if tar.offset <= max(at, member.offset) or member.size < 0:  # a negative size would never end
            index.damage = f"the header at byte {member.offset:,} is damaged"
            return
        advance(min(tar.offset, size) - max(at, 0))
        at = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
        yield member
    advance(size - max(at, 0))
    index.damage = _check_end(opened, tar.offset, size)


def _check_end(opened: BinaryIO, at: int, size: int) -> str:
    """Return what is wrong where tarfile stopped: it takes a damaged header for the end."""
    opened.seek(at)
    block = opened.read(_BLOCK)
    if at >= size:
        return "the archive breaks off without an end mark" if at else ""
    return f"the header at byte {at:,} is damaged" if any(block) else ""


def _unfit(member: tarfile.TarInfo) -> str:
    """Return the reason why a member with the name of an image is none; empty if it may be one."""
    if not member.isreg() or member.issparse():
        return "folders, links and sparse files with names of images"
    return "" if is_utf8(member.name) else "names that are not UTF-8"


def _samples(root: Path, files: Sequence[Path], indices: Sequence[_Index], keys: _Keys) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    rests: set[str] = set()
    last: dict[str, str] = {}
    for shard, (file, index) in enumerate(zip(files, indices, strict=True)):
        own: dict[str, _Sample] = {}
        for name, offset, size in zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True):
            key, rest = keys.split(name)
            rests.add(rest)
            if keys.is_image(rest):
                _check_unique_key(file, key, name, own)
                own[key] = _Sample(shard, offset, size, name)
        for name, text in index.texts.items():
            key = keys.split(name)[0]
            if key in own:
                own[key].label = _label(file, name, text, keys.label or "")
        if both := samples.keys() & own.keys():
            key = min(both)
            other = files[samples[key].shard]
            raise DataError(f"the key {key!r} is in {other} and in {file}: every image needs a key of its own")
        samples |= own
        if index.damage:
            logger.warning("%s: %s; %d images before that can be read, get it again", file, index.damage, len(own))
            last |= dict.fromkeys(list(own)[-1:], str(file))
    if not samples:
        found = f", found {listed(f'.{rest}' for rest in sorted(rests))}" if rests else ""
        wanted = f".{keys.image}" if keys.image else ", ".join(sorted(SUFFIXES))
        raise DataError(f"{root}: there are no images in it, expected members that end in {wanted}{found}")
    return _without_truncated_samples(samples, last)


def _check_unique_key(file: Path, key: str, name: str, own: Mapping[str, _Sample]) -> None:
    if key in own and own[key].member == name:
        raise DataError(f"{file}: {name} is in it twice, every image needs a key of its own")
    if key in own:
        raise DataError(
            f"{file}: the sample {key!r} has the images {own[key].member} and {name}: choose one by "
            "dataset.source.image_key, or set dataset.source.key_end=last_dot if each is a sample of its own"
        )


def _without_truncated_samples(samples: dict[str, _Sample], last: Mapping[str, str]) -> dict[str, _Sample]:
    """Leave out the last sample of a truncated shard if only this one has no label."""
    if not any(sample.label is not None for sample in samples.values()):
        return samples
    cut = {key for key in last if samples[key].label is None}
    for key in cut:
        logger.warning("%s: left out %r, because the shard breaks off before its label", last[key], key)
    return {key: sample for key, sample in samples.items() if key not in cut}


def _label(file: Path, name: str, text: str, label_key: str) -> str | None:
    member, _, name_of_field = label_key.partition(".")
    if member != "json":
        return text.strip() or None
    try:
        value = json.loads(text)[name_of_field or "label"]
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{file}: expected an object with the field {name_of_field or 'label'!r} in {name}, found {text[:60]!r}; "
            "correct dataset.source.label_key"
        ) from None
    return None if value is None else str(value)


def _truth(root: Path, samples: Mapping[str, _Sample], label_key: str | None) -> dict[str, str] | None:
    truth = {key: sample.label for key, sample in samples.items() if sample.label is not None}
    if not truth and label_key in (None, DEFAULT_LABELS):
        return None
    check_complete(root, truth, list(samples), "label_key")
    return truth
