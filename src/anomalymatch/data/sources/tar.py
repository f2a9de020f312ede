"""Tar shards in the layout of WebDataset as a source; nothing is unpacked, and any order of reading works."""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np
from jaxtyping import Int64

from anomalymatch.data.remote import local_path
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.data.sources.encoded import MAX_BYTES, SUFFIXES, EncodedSource, find_archives, is_hidden, read_labels
from anomalymatch.data.sources.handles import Handles
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.files import atomic_file
from anomalymatch.progress import progress

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the cached tables; another one and they are made anew."""
MAX_TEXT = 2**16
"""Labels are short; a longer member is none."""
_PACKED = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz", b"\x28\xb5": ".zst"}
_BLOCK = 512


@dataclass
class TarTable:
    """The images in one archive, in its order.

    Attributes:
        names: their paths in the archive, without a leading "./".
        offsets: where their bytes begin, in bytes from the start of the file.
        sizes: their sizes in bytes.
        texts: contents of the short members that were asked for, by name.
        damage: why the headers could not be followed to the end; empty if they could.
    """

    names: list[str] = field(default_factory=list)
    offsets: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    texts: dict[str, str] = field(default_factory=dict)
    damage: str = ""


def tar_table(file: Path, text_suffix: str | None, cache_dir: Path | None, advance: Callable[[int], None]) -> TarTable:
    """Follow the headers of `file`, or take what an earlier call found, if the file is still the same.

    Args:
        file: the archive, not compressed.
        text_suffix: members that end so are read, ".cls" for example; None reads none.
        cache_dir: where tables are kept; None keeps none.
        advance: told how many bytes of the archive have been passed.

    Raises:
        DataError: if it is missing, compressed, or no tar archive.
        StorageError: if the cache cannot be written.
    """
    stat = file.stat()
    key = f"{VERSION}\n{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}\n{text_suffix}"
    cached = None if cache_dir is None else cache_dir / "tar" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    table = None if cached is None else _load(cached)
    if table is None:
        table = _follow(file, stat.st_size, text_suffix, advance)
        if cached is not None:
            _save(cached, table)
    else:
        advance(stat.st_size)
    return table


def _load(cached: Path) -> TarTable | None:
    try:
        with cached.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            words = json.loads(arrays["words"].tobytes())
            return TarTable(words["names"], arrays["offsets"], arrays["sizes"], words["texts"], words["damage"])
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be made anew
        logger.warning("%s: cannot be read (%s), made anew", cached, error)
        return None


def _save(cached: Path, table: TarTable) -> None:
    words = json.dumps({"names": table.names, "texts": table.texts, "damage": table.damage}).encode()
    with atomic_file(cached) as temporary, temporary.open("wb") as opened:
        np.savez(opened, words=np.frombuffer(words, np.uint8), offsets=table.offsets, sizes=table.sizes)


def _follow(file: Path, size: int, text_suffix: str | None, advance: Callable[[int], None]) -> TarTable:
    table, skipped = TarTable(), Counter[str]()
    places: list[tuple[int, int]] = []
    with file.open("rb") as opened:
        _refuse_packed(file, opened)
        for member in _members(file, opened, size, table, advance):
            name = member.name.removeprefix("./")
            is_text = text_suffix is not None and name.endswith(text_suffix)
            if is_hidden(name) or not (is_text or PurePosixPath(name).suffix.lower() in SUFFIXES):
                continue
            if why := _unfit(member):
                skipped[why] += 1
            elif not is_text:
                table.names.append(name)
                places.append((member.offset_data, member.size))
            elif member.size <= MAX_TEXT:
                opened.seek(member.offset_data)
                text = opened.read(member.size)
                if len(text) == member.size:
                    table.texts[name] = text.decode(errors="replace")
    if skipped:
        logger.warning("%s: skipped %s", file, ", ".join(f"{n:,} {why}" for why, n in skipped.items()))
    table.offsets, table.sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()
    return table


def _refuse_packed(file: Path, opened: BinaryIO) -> None:
    suffix = _PACKED.get(opened.read(2))
    if suffix:
        raise DataError(
            f"{file}: expected a plain tar archive, found a compressed one ({suffix}), in which no image can be looked "
            "up: unpack it, or pack it again without compression"
        )
    opened.seek(0)


def _members(
    file: Path, opened: BinaryIO, size: int, table: TarTable, advance: Callable[[int], None]
) -> Iterator[tarfile.TarInfo]:
    """Yield all members up to the end or the first damaged header, which is then told in `table.damage`."""
    try:
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 (the file is the caller's to close)
    except Exception as error:  # a damaged header can make the reader raise anything
        raise DataError(f"{file}: expected a tar archive, but it cannot be read ({error}); get it again") from None
    at = -1
    while True:
        try:
            member = tar.next()
        except Exception as error:
            table.damage = f"the archive breaks off at byte {min(tar.offset, size):,} ({error})"
            return
        if member is None:
            break
        if tar.offset <= max(at, member.offset) or member.size < 0:  # a negative size would lead round in circles
            table.damage = f"the header at byte {member.offset:,} is damaged"
            return
        advance(min(tar.offset, size) - max(at, 0))
        at = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # or all of them would be kept in memory
        yield member
    advance(size - max(at, 0))
    table.damage = _end(opened, tar.offset, size)


def _end(opened: BinaryIO, at: int, size: int) -> str:
    """What is wrong with the end: tarfile takes a damaged header for it."""
    opened.seek(at)
    block = opened.read(_BLOCK)
    if at >= size:
        return "the archive breaks off without an end mark" if at else ""
    return f"the header at byte {at:,} is damaged" if any(block) else ""


def _unfit(member: tarfile.TarInfo) -> str:
    """Why a member that has the name of an image cannot be read as one; empty if it can."""
    if not member.isreg() or member.issparse():
        return "folders, links and sparse files with names of images"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "names that are not UTF-8"
    return ""


DEFAULT_LABELS = "cls"
LABEL_KEYS = ("cls", "txt", "json")
KeyEnd = Literal["first_dot", "last_dot"]
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MEGABYTE = 10**6


class WebDatasetSource(EncodedSource):
    """Images in tar shards: a sample is all members with the same key, `key.jpg` and `key.cls` for example.

    An id is the key, the path in the shard up to the first dot of the file name. Setting up reads the headers of the
    shards and the labels, and keeps what it found in `cache_dir`; an image is then one read at a known place. From a
    shard that breaks off all that is whole can be read.

    Args:
        root: one shard, or a folder in which all files `*.tar`, at any depth, are read in the order of their paths.
        cache_dir: where the places of the images are kept; None finds them anew each time.
        image_key: which member of a sample is the image, "jpg" or "left.png"; None takes the only one.
        label_key: which member holds the class: "cls", "txt", "json" (its field "label") or "json.FIELD"; None reads
            no classes, and so does a set without a single `cls`.
        key_end: "first_dot", or "last_dot" for ordinary files with dots in their names, each a sample of its own.
        labels_file: a CSV `filename,label` that names keys, with the meaning it has for `FolderSource`; None takes
            `labels.csv` beside the shards, where there is one.
        channels: channels of the decoded images.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if a shard is missing, compressed or no tar archive, if there are no images in them, a sample has
            several and none is named, or a key occurs twice, or if a label is missing.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: Path,
        *,
        cache_dir: Path | None = None,
        image_key: str | None = None,
        label_key: str | None = DEFAULT_LABELS,
        key_end: KeyEnd = "first_dot",
        labels_file: Path | None = None,
        channels: int = 3,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        self._files = list(_find(root).values())
        tables = _tables(self._files, None if label_key is None else f".{label_key.split('.')[0]}", cache_dir)
        samples = _samples(root, self._files, tables, _Keys(image_key, label_key, key_end))
        ids = list(samples)
        self._shards = np.array([sample.shard for sample in samples.values()], dtype=np.int32)
        self._offsets = np.array([sample.offset for sample in samples.values()], dtype=np.int64)
        self._sizes = np.array([sample.size for sample in samples.values()], dtype=np.int64)
        self._stats = [_state(os.stat(file)) for file in self._files]
        self._handles: Handles[Path, int] = Handles(_open, os.close)
        labels, truth = read_labels(root if root.is_dir() else root.parent, labels_file, ids)
        super().__init__(
            name=root.resolve().stem,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            labels=labels,
            fingerprint=self._fingerprint(channels),
            truth=truth if truth is not None else _truth(root, samples, label_key),
        )

    def _encoded(self, position: int) -> bytes:
        shard, size = int(self._shards[position]), int(self._sizes[position])
        if size > MAX_BYTES:
            raise UnreadableImageError(f"it claims {size:,} bytes, which is more than {MAX_BYTES:,}")
        name = self._files[shard].name
        try:
            with self._handles.use(self._files[shard]) as opened:
                own = os.dup(opened)  # so that other threads can read meanwhile
            try:
                changed = _state(os.fstat(own)) != self._stats[shard]
                data = os.pread(own, size, int(self._offsets[position]))
            finally:
                os.close(own)
        except OSError as error:
            raise UnreadableImageError(f"{name} cannot be read: {error.strerror}") from None
        if changed:  # its places are no longer those of its images
            raise UnreadableImageError(f"{name} has changed since the set was opened")
        if len(data) < size:
            raise UnreadableImageError(f"{name} breaks off within this image")
        return data

    def _fingerprint(self, channels: int) -> str:
        digest = hashlib.sha256(f"webdataset {channels}".encode())
        for file, (size, mtime_ns) in zip(self._files, self._stats, strict=True):
            digest.update(f"\n{file.name}\0{size}\0{mtime_ns}".encode())
        digest.update(self._offsets.tobytes())
        return digest.hexdigest()


def webdataset_source(
    root: str | Path | None,
    *,
    cache_dir: str | Path | None = None,
    image_key: str | None = None,
    label_key: str | None = DEFAULT_LABELS,
    key_end: str = "first_dot",
    labels_file: str | Path | None = None,
    channels: int = 3,
    storage_options: Mapping[str, Any] | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> WebDatasetSource:
    """Build a `WebDatasetSource` from configuration values; see there. Shards at a URL are copied to `cache_dir` first.

    Raises:
        DataError: if `root` is None, too.
        ConfigError: if `label_key` or `key_end` have no meaning.
    """
    if root is None:
        raise DataError("dataset=webdataset needs data.root=PATH, a tar shard or the folder that holds such files")
    if key_end not in get_args(KeyEnd):
        raise ConfigError(f"dataset.source.key_end must be one of {', '.join(get_args(KeyEnd))}, got {key_end}")
    if label_key is not None and label_key not in LABEL_KEYS and not label_key.startswith("json."):
        raise ConfigError(
            f"dataset.source.label_key must be null, one of {', '.join(LABEL_KEYS)}, or json.FIELD, got {label_key}"
        )
    return WebDatasetSource(
        local_path(root, cache_dir, (".tar", *_COMPRESSED), storage_options),
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        image_key=image_key,
        label_key=label_key,
        key_end=cast(KeyEnd, key_end),
        labels_file=None if labels_file is None else Path(labels_file).expanduser(),
        channels=channels,
        rendering=rendering,
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    image: str | None
    label: str | None
    end: KeyEnd

    def split(self, name: str) -> tuple[str, str]:
        """Divide a path into the key of its sample and the rest."""
        folder, slash, file = name.rpartition("/")
        key, _, rest = file.partition(".") if self.end == "first_dot" else file.rpartition(".")
        return folder + slash + key, rest

    def is_image(self, rest: str) -> bool:
        return self.image in (None, rest)


@dataclass(slots=True)
class _Sample:
    shard: int
    offset: int
    size: int
    member: str
    label: str | None = None


def _state(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _open(file: Path) -> int:
    return os.open(file, os.O_RDONLY)


def _find(root: Path) -> dict[str, Path]:
    packed = [root] if root.is_file() else sorted(root.rglob("*.t*")) if root.is_dir() else []
    packed = [file for file in packed if file.name.lower().endswith(_COMPRESSED)]
    if packed:
        raise DataError(
            f"{packed[0]}: no image can be looked up in a compressed tar archive: unpack it, or pack it again as .tar "
            "without compression"
        )
    return find_archives(root, ".tar", "tar shard")


def _tables(files: Sequence[Path], text_suffix: str | None, cache_dir: Path | None) -> list[TarTable]:
    done = 0
    total = sum(file.stat().st_size for file in files)
    with progress("Looking up images", max(1, total // _MEGABYTE), "MB") as advance:

        def passed(n: int) -> None:
            nonlocal done
            advance((done + n) // _MEGABYTE - done // _MEGABYTE)
            done += n

        return [tar_table(file, text_suffix, cache_dir, passed) for file in files]


def _samples(root: Path, files: Sequence[Path], tables: Sequence[TarTable], keys: _Keys) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    rests: set[str] = set()
    last: dict[str, str] = {}
    for shard, (file, table) in enumerate(zip(files, tables, strict=True)):
        own: dict[str, _Sample] = {}
        for name, offset, size in zip(table.names, table.offsets.tolist(), table.sizes.tolist(), strict=True):
            key, rest = keys.split(name)
            rests.add(rest)
            if keys.is_image(rest):
                _check_new(key, name, own, samples, files, shard)
                own[key] = _Sample(shard, offset, size, name)
        for name, text in table.texts.items():
            key = keys.split(name)[0]
            if key in own:
                own[key].label = _label(file, name, text, keys.label or "")
        samples |= own
        if table.damage:
            logger.warning("%s: %s; %d images before that can be read, get it again", file, table.damage, len(own))
            last |= dict.fromkeys(list(own)[-1:], str(file))
    if not samples:
        found = f", found .{', .'.join(sorted(rests)[:9])}" if rests else ""
        wanted = f".{keys.image}" if keys.image else ", ".join(sorted(SUFFIXES))
        raise DataError(f"{root}: there are no images in it, expected members that end in {wanted}{found}")
    return _without_cut_samples(samples, last)


def _check_new(
    key: str,
    name: str,
    own: Mapping[str, _Sample],
    samples: Mapping[str, _Sample],
    files: Sequence[Path],
    shard: int,
) -> None:
    if key in samples:
        other = files[samples[key].shard]
        raise DataError(f"the key {key!r} is in {other} and in {files[shard]}: every image needs a key of its own")
    if key in own and own[key].member == name:
        raise DataError(f"{files[shard]}: {name} is in it twice, every image needs a key of its own")
    if key in own:
        raise DataError(
            f"{files[shard]}: the sample {key!r} has the images {own[key].member} and {name}: choose one by "
            "dataset.source.image_key, or set dataset.source.key_end=last_dot if each is a sample of its own"
        )


def _without_cut_samples(samples: dict[str, _Sample], last: Mapping[str, str]) -> dict[str, _Sample]:
    """Where a shard breaks off, so may its last sample: without the label that others have, it is left out."""
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
    if len(truth) < len(samples):
        missing = next(key for key in samples if key not in truth)
        raise DataError(
            f"{root}: {len(samples) - len(truth):,} of {len(samples):,} images have no label {label_key}, the first is "
            f"{missing}; set dataset.source.label_key=null to read the images without classes"
        )
    return truth
