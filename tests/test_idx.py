"""The IDX format: round trips, and every way in which a file can lie about itself."""

from __future__ import annotations

import gzip
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from spectra import idx
from spectra.errors import DataError

LIMIT = 1 << 20


def digits(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return images, generator.integers(0, 10, count, dtype=np.uint8)


def small_set(*, train: int = 7, test: int = 3, seed: int = 0) -> dict[str, bytes]:
    arrays = (*digits(train, seed=seed), *digits(test, seed=seed + 1))
    return {name: idx.encode(a) for name, a in zip(idx.FILES, arrays, strict=True)}


@settings(max_examples=50, deadline=None)
@given(
    st_numpy.arrays(
        np.uint8,
        st.one_of(
            st_numpy.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=50),
            st_numpy.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=6),
        ),
    )
)
def test_what_is_written_is_parsed_again(array: np.ndarray):
    magic = idx.IMAGES_MAGIC if array.ndim == 3 else idx.LABELS_MAGIC

    again = idx.parse(idx.encode(array), magic=magic, what="x")

    assert again.shape == array.shape
    np.testing.assert_array_equal(again, array)


def test_bytes_are_those_of_the_format():
    """Spelt out by hand: zero, zero, 8 for unsigned bytes, dimensions, big-endian sizes."""
    assert idx.encode(np.array([3, 1], dtype=np.uint8)) == b"\0\0\x08\x01\0\0\0\x02\x03\x01"
    images = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    header = b"\0\0\x08\x03\0\0\0\x01\0\0\0\x02\0\0\0\x03"
    assert idx.encode(images) == header + bytes(range(6))


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint8), np.zeros(2, np.int64)])
def test_arrays_that_the_format_cannot_hold_are_refused(array: np.ndarray):
    with pytest.raises(ValueError, match="IDX holds uint8 arrays"):
        idx.encode(array)


GOOD = idx.encode(digits(4)[0])
DEFECTS = {
    "empty": (b"", "ends within its header of 16 bytes, at 0"),
    "header cut": (GOOD[:15], "ends within its header of 16 bytes, at 15"),
    "truncated": (GOOD[:-1], "truncated: its header declares 3,152 bytes, 3,151 are there"),
    "trailing": (GOOD + b"\0", "bytes beyond the 3,152"),
    "labels": (idx.encode(digits(4)[1]), "begins with the number 2049, not 2051"),
    "magic": (b"\0\0\x08\x04" + GOOD[4:], "begins with the number 2052, not 2051"),
    "count too large": (GOOD[:4] + b"\0\0\0\x05" + GOOD[8:], "truncated"),
    "count too small": (GOOD[:4] + b"\0\0\0\x03" + GOOD[8:], "bytes beyond"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("data", "complaint"), DEFECTS.values(), ids=DEFECTS.keys())
def test_defects_are_refused_in_one_line(tmp_path: Path, data: bytes, complaint: str, zipped: bool):
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(data) if zipped else data)

    with pytest.raises(DataError, match=re.escape(complaint)) as raised:
        idx.read(path, magic=idx.IMAGES_MAGIC, limit=LIMIT)
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=re.escape(complaint)):
        idx.parse(data, magic=idx.IMAGES_MAGIC, what="images")


def test_gzip_is_recognised_by_its_bytes(tmp_path: Path):
    (tmp_path / "a").write_bytes(gzip.compress(GOOD))
    (tmp_path / "b.gz").write_bytes(GOOD)

    for name in ("a", "b.gz"):
        assert idx.read(tmp_path / name, magic=idx.IMAGES_MAGIC, limit=LIMIT) == GOOD
    with pytest.raises(DataError, match="begins with the number"):
        idx.read(tmp_path / "a", magic=idx.IMAGES_MAGIC, limit=LIMIT, gzipped=False)


@pytest.mark.parametrize("where", [-1, -5, -20])
def test_damaged_gzip_is_refused(tmp_path: Path, where: int):
    """The length, the checksum and the data itself, each by one byte."""
    packed = bytearray(gzip.compress(GOOD))
    packed[where] ^= 0xFF
    path = tmp_path / "images.gz"
    path.write_bytes(packed)

    with pytest.raises(DataError, match=r"damaged gzip file|bytes beyond|truncated"):
        idx.read(path, magic=idx.IMAGES_MAGIC, limit=LIMIT)

    path.write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(DataError, match="damaged gzip file"):
        idx.read(path, magic=idx.IMAGES_MAGIC, limit=LIMIT)


def test_header_beyond_the_limit_is_refused_unread(tmp_path: Path):
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">4I", idx.IMAGES_MAGIC, 2**32 - 1, 2**32 - 1, 2**32 - 1))

    with pytest.raises(DataError, match="more than the 1,048,576 allowed"):
        idx.read(path, magic=idx.IMAGES_MAGIC, limit=LIMIT)


def test_gzip_bomb_takes_no_memory(tmp_path: Path):
    """200 MB of zeros behind a header of 4 images: unpacking stops where the header does."""
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD)
        for _ in range(200):
            file.write(bytes(1 << 20))

    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="bytes beyond the 3,152"):
            idx.read(path, magic=idx.IMAGES_MAGIC, limit=1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_header_alone_takes_no_memory(tmp_path: Path):
    """A header may declare 1 GB; nothing is allocated on its word."""
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">4I", idx.IMAGES_MAGIC, 1_300_000, 28, 28))

    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="truncated"):
            idx.read(path, magic=idx.IMAGES_MAGIC, limit=1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


SET_DEFECTS = {
    "counts differ": ("train-labels-idx1-ubyte", np.zeros(6, np.uint8), "6 labels for 7 images"),
    "label 10": ("t10k-labels-idx1-ubyte", np.array([0, 10, 1], np.uint8), "the label 10;"),
    "29 rows": ("t10k-images-idx3-ubyte", np.zeros((3, 29, 28), np.uint8), "3 images of 29×28"),
    "none": ("train-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8), "holds 0 images"),
}


@pytest.mark.parametrize(("name", "array", "complaint"), SET_DEFECTS.values(), ids=SET_DEFECTS)
def test_sets_that_make_no_sense_are_refused(
    tmp_path: Path, name: str, array: np.ndarray, complaint: str
):
    files = small_set()
    idx.arrays(files)  # right before the defect is planted
    files[name] = idx.encode(array)

    with pytest.raises(DataError, match=complaint):
        idx.arrays(files)
    for each, data in files.items():
        (tmp_path / each).write_bytes(data)
    with pytest.raises(DataError, match=complaint):
        idx.read_set(tmp_path, limit=LIMIT)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-idx", ".idx"])
def test_a_set_is_read_under_any_of_its_names(tmp_path: Path, separator: str, end: str):
    files = small_set()
    for name, data in files.items():
        path = tmp_path / f"{name.replace('-idx', separator)}{end}"
        path.write_bytes(gzip.compress(data) if end else data)

    assert idx.read_set(tmp_path, limit=LIMIT) == files
    path.unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is missing"):
        idx.read_set(tmp_path, limit=LIMIT)


def test_the_right_one_of_two_copies_is_taken(tmp_path: Path):
    files = small_set()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data[:-1])
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))

    assert idx.read_set(tmp_path, limit=LIMIT) == files


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path):
    old, new = tmp_path / ".a.0.part", tmp_path / ".b.0.part"
    for path in (old, new):
        path.write_bytes(b"half")
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))

    idx.write_set(small_set(), tmp_path)

    assert not old.exists()
    assert new.exists()
