"""The IDX format of MNIST, and a data set as four such files with their SHA-256.

A file is a header that declares a shape, then that many bytes. The header is two zero bytes,
0x08 for unsigned bytes, the number of dimensions, and each dimension as a big-endian 32-bit
number, so that the first four bytes read 2049 for labels and 2051 for images. A file is believed
only if its bytes are exactly as many as its header declares, and this is settled before memory
is taken: a truncated file, trailing bytes and a gzip bomb all end in one line. Whether a file is
gzipped is read from its first bytes, because some download tools unpack files and leave the name
as it was.

A data set is written all or nothing as far as a file system allows: every file goes to a
temporary name first and arrives by rename, `SHA256SUMS` last. A kill between two renames leaves
files that disagree with `SHA256SUMS`, which the next reader notices.

Source:
    LeCun, Cortes and Burges, "The MNIST database of handwritten digits", file formats.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import secrets
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from spectra.errors import DataError

Bytes = npt.NDArray[np.uint8]
Files = dict[str, bytes]

LABELS_MAGIC = 2049
IMAGES_MAGIC = 2051
_NDIM = {LABELS_MAGIC: 1, IMAGES_MAGIC: 3}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20

# File of a set -> its kind, in the order of SHA256SUMS.
FILES = {
    "train-images-idx3-ubyte": IMAGES_MAGIC,
    "train-labels-idx1-ubyte": LABELS_MAGIC,
    "t10k-images-idx3-ubyte": IMAGES_MAGIC,
    "t10k-labels-idx1-ubyte": LABELS_MAGIC,
}
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SUMS = "SHA256SUMS"
SIDE, CLASSES = 28, 10
_LEFTOVER_S = 3600.0  # a temporary file as old as this belongs to no living process


def encode(array: Bytes) -> bytes:
    """The IDX bytes of labels `(N,)` or images `(N, rows, columns)`.

    Raises:
        ValueError: The array is not of unsigned bytes, or has neither one nor three dimensions.
    """
    magic = next((m for m, ndim in _NDIM.items() if ndim == array.ndim), None)
    if magic is None or array.dtype != np.uint8:
        raise ValueError(
            f"IDX holds uint8 arrays of 1 or 3 dimensions here, got {array.dtype} of {array.ndim}"
        )
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def parse(data: bytes, *, magic: int, what: str) -> Bytes:
    """The array in IDX bytes, as a read-only view of them.

    Args:
        data: A whole file, not gzipped.
        magic: `LABELS_MAGIC` or `IMAGES_MAGIC`, whichever must stand there.
        what: The file's name, for messages.

    Returns:
        Labels `(N,)` or images `(N, rows, columns)`.

    Raises:
        DataError: The magic number is another, or the bytes are not as many as declared.
    """
    shape = _shape(data[: _header_size(magic)], magic=magic, what=what)
    header = _header_size(magic)
    _check_size(len(data), header + math.prod(shape), what=what)
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def read(path: Path, *, magic: int, limit: int, gzipped: bool = True) -> bytes:
    """The raw IDX bytes of a file.

    No more is unpacked than the header declares, and a header that declares more than `limit`
    is refused.

    Args:
        path: The file.
        magic: `LABELS_MAGIC` or `IMAGES_MAGIC`, whichever must stand there.
        limit: The most bytes a file may have once unpacked.
        gzipped: Whether the file may be gzipped.

    Raises:
        DataError: The file is unreadable, too large, truncated or not of this kind.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is a pipe or a device, not a file; put the data set's file there")
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            if not (zipped and gzipped):
                return _read(file, magic=magic, limit=limit, what=str(path))
            with gzip.GzipFile(fileobj=file) as unzipped:
                return _read(unzipped, magic=magic, limit=limit, what=str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def arrays(files: Mapping[str, bytes]) -> dict[str, Bytes]:
    """The arrays of a data set, once their shapes, counts and labels make sense together.

    Raises:
        DataError: A file is no IDX file, images are not 28×28, there are none, their number is
            not that of the labels, or a label is above 9.
    """
    parsed = {name: parse(files[name], magic=magic, what=name) for name, magic in FILES.items()}
    for images, labels in (TRAIN, TEST):
        count, *sides = parsed[images].shape
        if sides != [SIDE, SIDE] or count == 0:
            raise DataError(
                f"{images} holds {count} images of {'×'.join(map(str, sides))}; "
                f"at least one and {SIDE}×{SIDE} are needed"
            )
        if parsed[labels].size != count:
            raise DataError(
                f"{labels} holds {parsed[labels].size} labels for {count} images; "
                "take both files from the same data set"
            )
        largest = int(parsed[labels].max())
        if largest >= CLASSES:
            raise DataError(f"{labels} holds the label {largest}; 0 to {CLASSES - 1} are possible")
    return parsed


def compare(files: Mapping[str, bytes], expected: Mapping[str, str], *, whose: str) -> None:
    """Raise a `DataError` unless every file has the SHA-256 expected of it."""
    for name, data in files.items():
        found, wanted = hashlib.sha256(data).hexdigest(), expected.get(name, "none")
        if found != wanted:
            raise DataError(
                f"{name} has the SHA-256 {found[:16]}…, {whose} is {wanted[:16]}…; fetch it again"
            )


def sums(files: Mapping[str, bytes]) -> bytes:
    """The contents of `SHA256SUMS`, as `sha256sum` writes and checks it."""
    return "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in FILES
    ).encode()


def digest(files: Mapping[str, bytes]) -> str:
    """What results are bound to: the SHA-256 of `SHA256SUMS`, as hexadecimal digits."""
    return hashlib.sha256(sums(files)).hexdigest()


def variants(folder: Path, name: str) -> list[Path]:
    """The files of a folder that may be `name`: either separator, raw or gzipped."""
    stems = (name, name.replace("-idx", ".idx"))
    paths = [folder / f"{stem}{end}" for end in ("", ".gz") for stem in stems]
    return [path for path in paths if path.is_file()]


def find_set(folder: Path, name: str) -> Path:
    """Where a folder holds the set `name`: there, in `raw` or as torchvision lays it out.

    torchvision keeps fashion-mnist in `FashionMNIST/raw`; a folder of another name holds
    another set and is not looked into.

    Raises:
        DataError: There is no such folder, or no file of a set in it.
    """
    if not folder.is_dir():
        raise DataError(f"data.folder {folder} is not a folder; correct it")
    below = [path / "raw" for path in sorted(folder.iterdir()) if _bare(path.name) == _bare(name)]
    for candidate in (folder, folder / "raw", *below):
        if any(variants(candidate, file) for file in FILES):
            return candidate
    raise DataError(f"no IDX file such as {TRAIN[0]} is in {folder}; correct data.folder")


def read_set(folder: Path, *, limit: int, official: Mapping[str, str] | None = None) -> Files:
    """The raw bytes of the data set in a folder, verified.

    Where a file is there more than once, say raw and gzipped, the first right one is taken.

    Args:
        folder: Holds the four files, under any of their names.
        limit: The most bytes a file may have once unpacked.
        official: The SHA-256 that each file must have, if that is known.

    Raises:
        DataError: A file is missing or not what it should be.
    """
    files = {}
    for name, magic in FILES.items():
        complaint = DataError(f"{name} is missing in {folder}")
        for path in variants(folder, name):
            try:
                data = read(path, magic=magic, limit=limit)
                if official is not None:
                    compare({name: data}, official, whose="the official one")
            except DataError as error:
                complaint = error
                continue
            files[name] = data
            break
        else:
            raise complaint
    arrays(files)
    return files


def write_set(files: Mapping[str, bytes], target: Path) -> None:
    """Store a data set and its `SHA256SUMS`, all to temporary names first, then renamed.

    Raises:
        OSError: The folder cannot be written; no temporary file is left behind.
    """
    contents = {**files, SUMS: sums(files)}
    temporary = {name: target / f".{name}.{secrets.token_hex(8)}.part" for name in contents}
    target.mkdir(parents=True, exist_ok=True)
    for leftover in target.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_S:
                leftover.unlink()
    try:
        for name, data in contents.items():
            with temporary[name].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            temporary[name].replace(target / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    folder = os.open(target, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the renames, too, outlast a power cut
    finally:
        os.close(folder)


def read_sums(folder: Path) -> dict[str, str]:
    """File -> SHA-256, as the `SHA256SUMS` of a folder records them.

    Raises:
        DataError: It cannot be read.
    """
    try:
        text = (folder / SUMS).read_text(encoding="ascii")
    except OSError as error:
        raise DataError(f"cannot read {folder / SUMS}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{folder / SUMS} is not what sha256sum writes") from None
    lines = (line.partition(" ") for line in text.splitlines())
    return {name.lstrip(" *"): digest for digest, _, name in lines}


def set_aside(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Rename files of a set that do not have the SHA-256 expected of them to `NAME.damaged`.

    They are not deleted: a set of one's own may have been edited in place.

    Returns:
        The names of the files renamed.
    """
    damaged = []
    for name in FILES:
        path = folder / name
        if not path.is_file() or name not in expected:
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected[name]:
            path.replace(folder / f"{name}.damaged")
            damaged.append(name)
    return damaged


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _read(stream: IO[bytes] | gzip.GzipFile, *, magic: int, limit: int, what: str) -> bytes:
    header = stream.read(_header_size(magic))
    declared = len(header) + math.prod(_shape(header, magic=magic, what=what))
    if declared > limit:
        raise DataError(
            f"{what} declares {declared:,} bytes, more than the {limit:,} allowed; "
            "it is not the data set asked for"
        )
    # In chunks: `read(declared)` would take the memory on the word of a header. Reading up to
    # the end, not up to the size, is what makes gzip check its own checksum.
    chunks, size = [header], len(header)
    while size <= declared and (chunk := stream.read(_CHUNK)):
        chunks.append(chunk)
        size += len(chunk)
    _check_size(size, declared, what=what)
    return b"".join(chunks)


def _header_size(magic: int) -> int:
    return 4 * (1 + _NDIM[magic])


def _shape(header: bytes, *, magic: int, what: str) -> tuple[int, ...]:
    size = _header_size(magic)
    found = int.from_bytes(header[:4], "big")
    if len(header) >= 4 and found != magic:
        raise DataError(
            f"{what} begins with the number {found}, not {magic}; "
            f"it is not an IDX file of {'images' if magic == IMAGES_MAGIC else 'labels'}"
        )
    if len(header) < size:
        raise DataError(
            f"{what} ends within its header of {size} bytes, at {len(header)}; fetch it again"
        )
    return struct.unpack(f">{_NDIM[magic]}I", header[4:size])


def _check_size(size: int, declared: int, *, what: str) -> None:
    if size < declared:
        raise DataError(
            f"{what} is truncated: its header declares {declared:,} bytes, "
            f"{size:,} are there; fetch it again"
        )
    if size > declared:
        raise DataError(
            f"{what} has bytes beyond the {declared:,} that its header declares; fetch it again"
        )
