"""Sets from folders: verified, stored whole or not at all, and read as tensors."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from small_sets import Lines, flip, put, small_set, stored_as
from snapshots import contents, snapshot
from spectra import data, idx
from spectra.errors import DataError
from spectra.params import DataParams


@pytest.fixture
def other(tmp_path: Path) -> tuple[DataParams, dict[str, bytes]]:
    """A set that is not MNIST, in a folder."""
    files = small_set()
    folder = put(files, tmp_path / "given")
    return DataParams(name="fashion", root=str(tmp_path / "data"), folder=str(folder)), files


# ------------------------------------------------------------------- other data sets, from a folder


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_is_imported_verified_and_then_left_alone(tmp_path: Path, zipped: bool):
    files = small_set()
    folder = put(files, tmp_path / "given", zipped=zipped)
    params = DataParams(name="fashion", root=str(tmp_path / "data"), folder=str(folder))

    first = data.ensure(params, say=Lines())

    target = tmp_path / "data" / "fashion"
    assert contents(target) == stored_as(files)
    digest = hashlib.sha256(stored_as(files)["SHA256SUMS"]).hexdigest()
    assert first == data.Stored(target, digest, "folder")
    before, said = snapshot(target), Lines()
    assert data.ensure(params, say=said) == data.Stored(target, digest, "stored")
    assert snapshot(target) == before
    assert said == []


def test_load_gives_the_tensors_of_the_files(other: tuple[DataParams, dict[str, bytes]]):
    params, files = other
    stored = data.ensure(params, say=Lines())

    loaded = data.load(params)

    assert (loaded.name, loaded.digest) == ("fashion", stored.digest)
    for split, (images, labels) in ((loaded.train, idx.TRAIN), (loaded.test, idx.TEST)):
        assert split.pixels_ND.dtype == torch.uint8
        assert split.labels_N.dtype == torch.int64
        assert split.pixels_ND.shape == (len(split.labels_N), 784)
        assert split.pixels_ND.numpy().tobytes() == files[images][16:]
        assert bytes(split.labels_N.tolist()) == files[labels][8:]


def test_a_changed_folder_replaces_what_is_stored(other: tuple[DataParams, dict[str, bytes]]):
    params, _ = other
    before = data.ensure(params, say=Lines())
    changed = small_set(seed=1)
    put(changed, Path(params.folder or ""))

    after = data.ensure(params, say=Lines())

    assert after.source == "folder"
    assert after.digest != before.digest
    assert contents(after.folder) == stored_as(changed)


def test_a_folder_that_went_away_is_not_needed(other: tuple[DataParams, dict[str, bytes]]):
    params, files = other
    data.ensure(params, say=Lines())
    gone = params.model_copy(update={"folder": f"{params.folder}-gone"})
    said = Lines()

    stored = data.ensure(gone, say=said)

    assert stored.source == "stored"
    assert contents(stored.folder) == stored_as(files)
    assert len(said) == 1
    assert "does not exist" in said[0]


def test_a_damaged_folder_changes_nothing(other: tuple[DataParams, dict[str, bytes]]):
    params, files = other
    target = data.ensure(params, say=Lines()).folder
    given = Path(params.folder or "") / idx.TRAIN[0]
    given.write_bytes(given.read_bytes()[:-1])

    with pytest.raises(DataError, match="truncated"):
        data.ensure(params, say=Lines())
    assert contents(target) == stored_as(files)


def test_a_damaged_stored_set_is_refused_and_then_replaced(
    other: tuple[DataParams, dict[str, bytes]],
):
    params, files = other
    target = data.ensure(params, say=Lines()).folder
    flip(target / idx.TRAIN[0])
    said = Lines()

    with pytest.raises(DataError, match=r"train-images-idx3-ubyte has the SHA-256 .*spectra data"):
        data.load(params)
    assert data.ensure(params, say=said).source == "folder"
    assert contents(target) == stored_as(files)
    assert "is not intact" in said[0]


def test_torchvision_layout_is_found_and_never_under_another_name(tmp_path: Path):
    files = small_set()
    put(small_set(seed=1), tmp_path / "given" / "MNIST" / "raw")
    put(files, tmp_path / "given" / "FashionMNIST" / "raw", zipped=True)
    given, root = str(tmp_path / "given"), str(tmp_path / "data")

    fashion = DataParams(name="fashion-mnist", root=root, folder=given)
    assert contents(data.ensure(fashion, say=Lines()).folder) == stored_as(files)
    with pytest.raises(DataError, match=r"correct data\.folder"):
        data.ensure(DataParams(name="fashion", root=root, folder=given), say=Lines())
    assert not (tmp_path / "data" / "fashion").exists()


def test_a_record_that_does_not_match_is_not_believed(
    other: tuple[DataParams, dict[str, bytes]],
):
    params, _ = other
    target = data.ensure(params, say=Lines()).folder
    (target / idx.SUMS).write_bytes(b"\xff")
    with pytest.raises(DataError, match="not what sha256sum writes"):
        data.load(params)
    (target / idx.SUMS).write_bytes(b"")
    with pytest.raises(DataError, match="the one in SHA256SUMS is none"):
        data.load(params)


def test_a_gzipped_file_under_a_raw_name_is_not_intact(
    other: tuple[DataParams, dict[str, bytes]],
):
    """`sha256sum -c` would fail on it, so we do."""
    params, files = other
    target = data.ensure(params, say=Lines()).folder
    (target / idx.TRAIN[0]).write_bytes(gzip.compress(files[idx.TRAIN[0]]))

    with pytest.raises(DataError, match="is not intact"):
        data.load(params)


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_interrupted_write_leaves_no_file_of_its_own(
    other: tuple[DataParams, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    call: int,
):
    params, files = other
    target = data.ensure(params, say=Lines()).folder
    put(small_set(seed=1), Path(params.folder or ""))
    calls: Iterator[int] = iter(range(1, 100))

    def fails(_descriptor: int) -> None:
        if next(calls) == call:
            raise error

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((DataError, KeyboardInterrupt)) as raised:
        data.ensure(params, say=Lines())

    assert contents(target) == stored_as(files)
    if isinstance(error, OSError):
        assert "No space left on device; set data.root" in str(raised.value)


def test_a_kill_between_two_renames_is_noticed_and_mended(
    other: tuple[DataParams, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
):
    params, _ = other
    target = data.ensure(params, say=Lines()).folder
    changed = small_set(seed=1)
    put(changed, Path(params.folder or ""))
    rename, calls = Path.replace, iter(range(100))

    def dies(self: Path, to: Path) -> Path:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        data.ensure(params, say=Lines())
    monkeypatch.undo()

    with pytest.raises(DataError, match="is not intact"):
        data.load(params)
    data.ensure(params, say=Lines())
    assert contents(target) == stored_as(changed)


def test_a_root_that_cannot_be_written_is_named(other: tuple[DataParams, dict[str, bytes]]):
    params, _ = other
    Path(params.root).write_text("in the way")

    with pytest.raises(DataError, match=r"cannot store .*set data\.root"):
        data.ensure(params, say=Lines())


# ------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_normalised(dtype: torch.dtype):
    """Every possible byte against the formula in float64."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(49).reshape(16, 784)
    split = data.Split(pixels, torch.zeros(16, dtype=torch.int64))

    actual = split.inputs(mean=0.1307, std=0.3081, dtype=dtype, device=torch.device("cpu"))

    expected = (pixels.numpy().astype(float) / 255 - 0.1307) / 0.3081
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert torch.equal(pixels.flatten()[:256], torch.arange(256, dtype=torch.uint8))


def test_importing_needs_no_torchvision():
    code = "import sys, spectra.data; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
