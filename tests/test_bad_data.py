"""Data sets that are not: files that lie about themselves, and places that hold none."""
# ruff: noqa: E501  (a row is a line)

from __future__ import annotations

import gzip
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pytest import MonkeyPatch

from bad_input import Row, Stage, results, rows
from spectra import idx

Prepare = Callable[[Path], object]
IMAGES, LABELS = idx.TRAIN
LAST_IMAGES, LAST_LABELS = idx.TEST


def good() -> dict[str, bytes]:
    """Twenty images and ten, each class there."""
    generator = np.random.default_rng(0)
    parts = {}
    for (images, labels), count in ((idx.TRAIN, 20), (idx.TEST, 10)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        parts[images] = idx.encode(pixels)
        parts[labels] = idx.encode((np.arange(count) % 10).astype(np.uint8))
    return parts


def folder(here: Path, *, without: str = "", **changes: bytes) -> Path:
    """`idx/` with the good files but for some; `train_images_idx3_ubyte=` names the first."""
    (here / "idx").mkdir()
    changed = {name.replace("_", "-"): data for name, data in changes.items()}
    for name, data in {**good(), **changed}.items():
        if name != without:
            (here / "idx" / name).write_bytes(data)
    return here / "idx"


def files(**how: object) -> Prepare:
    return lambda here: folder(here, **how)


def images(data: bytes) -> Prepare:
    return files(train_images_idx3_ubyte=data)


def labels(data: bytes) -> Prepare:
    return files(train_labels_idx1_ubyte=data)


def header(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def in_place(act: Callable[[Path], object]) -> Prepare:
    """The good files, then something done to the first of them."""
    return lambda here: act(folder(here) / IMAGES)


def replaced(by: Callable[[Path], object]) -> Prepare:
    return in_place(lambda path: (path.unlink(), by(path)))


def stored(act: Callable[[Path], object]) -> Prepare:
    """A stored set in `d/other`, then something done to it."""

    def prepare(here: Path) -> None:
        idx.write_set(good(), here / "d" / "other")
        act(here / "d" / "other")

    return prepare


GOOD = good()
PIXELS, CLASSES = GOOD[IMAGES], GOOD[LABELS]
ZIPPED = gzip.compress(PIXELS, mtime=0)
BOMB = gzip.compress(header(2051, 20, 28, 28) + bytes(60_000_000), 1)
"""A few images by its header, a thousand times as much behind it."""

D = "data --folder idx --set data.root=d"
NONE = "; put its four IDX files into a folder and name it in data.folder"


def refused(name: str, complaint: str, prepare: Prepare | None, words: str = D) -> Row:
    """A set that no source gives, for the reason told."""
    return Row(
        name, words, f"no source gave the data set 'sample' (folder: {complaint}){NONE}", 3, prepare
    )


def lost(name: str, complaint: str, prepare: Prepare) -> Row:
    """A stored set that is not intact and has no folder to come from again."""
    where = "the data set d/other is not intact: "
    words = "train --set data.root=d --set data.name=other --set data.folder=null"
    told = (
        f"no source gave the data set 'other' (folder: no folder is given; set data.folder){NONE}"
    )
    assert complaint.startswith(where)
    return Row(name, words, told, 3, prepare)


TABLE = (
    refused("no folder", "data.folder idx is not a folder; correct it", None),
    refused(
        "a file for a folder",
        "data.folder params.yaml is not a folder; correct it",
        None,
        D.replace("idx", "params.yaml"),
    ),
    refused(
        "an empty folder",
        "no IDX file such as train-images-idx3-ubyte is in idx; correct data.folder",
        lambda here: (here / "idx").mkdir(),
    ),
    refused(
        "a folder of other things",
        "no IDX file such as train-images-idx3-ubyte is in test_data; correct data.folder",
        None,
        D.replace("idx", "test_data"),
    ),
    refused(
        "images without labels", "train-labels-idx1-ubyte is missing in idx", files(without=LABELS)
    ),
    refused(
        "labels without images",
        "t10k-images-idx3-ubyte is missing in idx",
        files(without=LAST_IMAGES),
    ),
    refused(
        "an empty file",
        "idx/train-images-idx3-ubyte ends within its header of 16 bytes, at 0; fetch it again",
        images(b""),
    ),
    refused(
        "a header cut short",
        "idx/train-images-idx3-ubyte ends within its header of 16 bytes, at 15; fetch it again",
        images(PIXELS[:15]),
    ),
    refused(
        "truncated",
        "idx/train-images-idx3-ubyte is truncated: its header declares 15,696 bytes, 15,695 are there; fetch it again",
        images(PIXELS[:-1]),
    ),
    refused(
        "bytes too many",
        "idx/train-images-idx3-ubyte has bytes beyond the 15,696 that its header declares; fetch it again",
        images(PIXELS + b"\0"),
    ),
    refused(
        "text",
        "idx/train-images-idx3-ubyte begins with the number 1952999795, not 2051; it is not an IDX file of images",
        images(b"this is no IDX file"),
    ),
    refused(
        "a wrong magic number",
        "idx/train-images-idx3-ubyte begins with the number 2052, not 2051; it is not an IDX file of images",
        images(header(2052) + PIXELS[4:]),
    ),
    refused(
        "another byte order",
        "idx/train-images-idx3-ubyte begins with the number 50855936, not 2051; it is not an IDX file of images",
        images(PIXELS[3::-1] + PIXELS[4:]),
    ),
    refused(
        "labels for images",
        "idx/train-images-idx3-ubyte begins with the number 2049, not 2051; it is not an IDX file of images",
        images(CLASSES),
    ),
    refused(
        "images for labels",
        "idx/train-labels-idx1-ubyte begins with the number 2051, not 2049; it is not an IDX file of labels",
        labels(PIXELS),
    ),
    refused(
        "fewer labels than images",
        "train-labels-idx1-ubyte holds 19 labels for 20 images; take both files from the same data set",
        labels(idx.encode(np.zeros(19, np.uint8))),
    ),
    refused(
        "more labels than images",
        "train-labels-idx1-ubyte holds 21 labels for 20 images; take both files from the same data set",
        labels(idx.encode(np.zeros(21, np.uint8))),
    ),
    refused(
        "a label out of range",
        "train-labels-idx1-ubyte holds the label 10; 0 to 9 are possible",
        labels(idx.encode(np.full(20, 10, np.uint8))),
    ),
    refused(
        "no image",
        "train-images-idx3-ubyte holds 0 images of 28×28; at least one and 28×28 are needed",
        files(
            train_images_idx3_ubyte=header(2051, 0, 28, 28), train_labels_idx1_ubyte=header(2049, 0)
        ),
    ),
    refused(
        "images of another size",
        "train-images-idx3-ubyte holds 20 images of 32×32; at least one and 28×28 are needed",
        images(idx.encode(np.zeros((20, 32, 32), np.uint8))),
    ),
    refused(
        "images without a pixel",
        "train-images-idx3-ubyte holds 20 images of 0×28; at least one and 28×28 are needed",
        images(header(2051, 20, 0, 28)),
    ),
    refused(
        "a shape beyond the memory",
        "idx/train-images-idx3-ubyte declares 4,611,686,018,427,387,904,016 bytes, more than the 1,073,741,824 allowed; it is not the data set asked for".replace(
            "4,611,686,018,427,387,904,016", "9,903,520,314,283,042,199,192,993,808"
        ),
        images(header(2051, 2**31, 2**31, 2**31)),
    ),
    refused(
        "a gzip bomb",
        "idx/train-images-idx3-ubyte has bytes beyond the 15,696 that its header declares; fetch it again",
        images(BOMB),
    ),
    refused(
        "a gzip cut short",
        "idx/train-images-idx3-ubyte is a damaged gzip file (Compressed file ended before the end-of-stream marker was reached); fetch it again",
        images(ZIPPED[:-20]),
    ),
    refused(
        "a gzip with a wrong sum",
        "idx/train-images-idx3-ubyte is a damaged gzip file (CRC check failed …); fetch it again",
        images(ZIPPED[:-8] + bytes(4) + ZIPPED[-4:]),
    ),
    refused(
        "the head of a gzip and no more",
        "idx/train-images-idx3-ubyte is a damaged gzip file (…); fetch it again",
        images(b"\x1f\x8b\x08\x00"),
    ),
    refused(
        "no gzip in its name's sense",
        "idx/train-images-idx3-ubyte.gz begins with the number 1736075632, not 2051; it is not an IDX file of images",
        lambda here: (folder(here, without=IMAGES) / f"{IMAGES}.gz").write_bytes(b"gzip"),
    ),
    refused(
        "a folder for a file", "train-images-idx3-ubyte is missing in idx", replaced(Path.mkdir)
    ),
    refused("a pipe for a file", "train-images-idx3-ubyte is missing in idx", replaced(os.mkfifo)),
    refused(
        "a link out of the folder to what is no data",
        "idx/train-images-idx3-ubyte begins with the number 1684108385, not 2051; it is not an IDX file of images",
        replaced(lambda path: path.symlink_to("../params.yaml")),
    ),
    refused(
        "a link to a device",
        "train-images-idx3-ubyte is missing in idx",
        replaced(lambda path: path.symlink_to("/dev/zero")),
    ),
    refused(
        "a link to nothing",
        "train-images-idx3-ubyte is missing in idx",
        replaced(lambda path: path.symlink_to("nothing")),
    ),
    refused(
        "a loop of links",
        "train-images-idx3-ubyte is missing in idx",
        replaced(lambda path: path.symlink_to(path.name)),
    ),
    Row(
        "a source that serves another set",
        D + " --source pypi",
        f"no source gave the data set 'sample' (pypi: it serves mnist only, not 'sample'; set data.source to folder){NONE}",
        3,
    ),
    Row(
        "another set under the name of MNIST",
        D + " --name mnist",
        f"no source gave the data set 'mnist' (folder: idx/train-images-idx3-ubyte has the SHA-256 …, the official one is ba891046e6505d7a…; fetch it again){NONE}".replace(
            "idx/train", "train"
        ),
        3,
        files(),
    ),
    Row(
        "a root that is a file",
        "data --folder idx --set data.root=params.yaml",
        "cannot store the data set in params.yaml/sample: Not a directory; set data.root to a folder that can be written",
        3,
        files(),
    ),
    Row(
        "a root on a file system that takes none",
        "data --folder idx --set data.root=/proc",
        "cannot store the data set in /proc/sample: No such file or directory; set data.root to a folder that can be written",
        3,
        files(),
    ),
    lost(
        "a stored file that was changed",
        "the data set d/other is not intact: ",
        stored(lambda path: (path / IMAGES).write_bytes(PIXELS[:-1] + b"\7")),
    ),
    lost(
        "a stored file that is a pipe",
        "the data set d/other is not intact: ",
        stored(lambda path: ((path / LABELS).unlink(), os.mkfifo(path / LABELS))),
    ),
    lost(
        "sums that are gone",
        "the data set d/other is not intact: ",
        stored(lambda path: (path / idx.SUMS).unlink()),
    ),
    lost(
        "sums that are bytes",
        "the data set d/other is not intact: ",
        stored(lambda path: (path / idx.SUMS).write_bytes(bytes(range(256)))),
    ),
    lost(
        "a set that is a file",
        "the data set d/other is not intact: ",
        stored(lambda path: (shutil.rmtree(path), path.write_text("data"))),
    ),
)


@rows(*TABLE)
def test_bad_data_are_told_in_one_line(row: Row, stage: Stage, monkeypatch: MonkeyPatch):
    tracemalloc.start()
    stage.play(row, monkeypatch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 40_000_000  # whatever a header declares or a gzip unpacks to


@pytest.mark.parametrize("name", ["two words", "line\nfeed", "λ→∞ 🙂", "\udcff", "-x", "ä" * 100])
def test_places_of_any_name_are_fine(stage: Stage, monkeypatch: MonkeyPatch, name: str):
    folder(stage.folder).rename(stage.folder / name)
    monkeypatch.chdir(stage.folder)

    words = ("data", "--quiet", f"--folder={name}", "--set", "data.root=d")
    code, out, err = stage.run(*words)

    assert (code, err) == (0, "")
    assert out == "d/sample verified, from folder\n"


def test_linked_data_are_read_and_never_written(stage: Stage, monkeypatch: MonkeyPatch):
    """Data sets are often links to a common place; what is right there is right here."""
    away = folder(stage.folder)
    there = {path.name: path.read_bytes() for path in away.iterdir()}
    (stage.folder / "links").mkdir()
    for path in away.iterdir():
        (stage.folder / "links" / path.name).symlink_to(path)
    (stage.folder / "d" / "sample").mkdir(parents=True)
    (stage.folder / "d" / "sample" / IMAGES).symlink_to(stage.folder / "params.yaml")
    monkeypatch.chdir(stage.folder)
    before = (stage.folder / "params.yaml").read_bytes()

    code, _, err = stage.run("data", "-q", "--folder", "links", "--set", "data.root=d")

    assert (code, err) == (0, "")
    assert not (stage.folder / "d" / "sample" / IMAGES).is_symlink()
    assert {path.name: path.read_bytes() for path in away.iterdir()} == there
    assert (stage.folder / "params.yaml").read_bytes() == before
    assert results(stage.folder) == stage.before
