"""The files of a result: exact, whole or not there, and readable by other programs."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from snapshots import contents
from spectra import artifacts, checkpoint
from spectra.artifacts import COLUMNS, Record, Store
from spectra.errors import StorageError


def record(store: Store, *, label: str = "0.10000", digest: str = "d", **row: float) -> Record:
    """A committed result of one weights file and one other file."""
    key = f"1-{label}"
    files = {
        artifacts.weights_name(key): store.write(artifacts.weights_name(key), [b"weights" * 9]),
        artifacts.history_name(key): store.write(
            artifacts.history_name(key), [b"epoch,objective\n1,0.5\n2,0.25\n"]
        ),
    }
    made = Record(
        digest=digest, replicate=1, l2=float(label), label=label,
        row={name: row.get(name, 1.5) for name in COLUMNS}, eigenvalues=(2.0, -1.0),
        residuals=(1e-5, 1e-6), parameters={"spectrum.k": 2}, files=files,
    )  # fmt: skip
    store.commit(made)
    return made


# ---------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_text_reads_back_bit_for_bit(dtype: type, data: st.DataObject):
    width = 8 * np.dtype(dtype).itemsize
    number = st.floats(allow_nan=False, allow_infinity=False, width=width)
    rows = data.draw(hnp.arrays(dtype, st.tuples(st.integers(1, 4), st.integers(1, 5)),
                                elements=number))  # fmt: skip

    text = b"".join(artifacts.lines_of_numbers(rows))

    read = np.loadtxt(io.BytesIO(text), delimiter=",", ndmin=2, dtype=dtype)
    assert read.tobytes() == rows.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_the_range_read_back(dtype: type):
    facts = np.finfo(dtype)
    ends = [facts.max, facts.tiny, facts.smallest_subnormal, 1 / 3, np.pi, 0.0, facts.eps]
    row = np.array([*ends, *(-value for value in ends)], dtype)

    text = b"".join(artifacts.lines_of_numbers([row]))

    assert np.loadtxt(io.BytesIO(text), delimiter=",", dtype=dtype).tobytes() == row.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_written(tmp_path: Path, bad: float):
    rows = np.array([[1.0, 2.0], [3.0, bad]], np.float32)

    with pytest.raises(StorageError, match="NaN or infinity"):
        Store(tmp_path).write("a.csv", artifacts.lines_of_numbers(rows))

    assert contents(tmp_path) == {}


def test_transposed_rows_are_written_in_their_order():
    assert b"".join(artifacts.lines_of_numbers(np.array([[1.0, 2.0], [3.0, 4.0]]).T)) == (
        b"1.0,3.0\n2.0,4.0\n"
    )


def test_names_are_those_that_notebooks_read():
    assert artifacts.weights_name("1-0.09000") == "model_weights-1-0.09000.pth"
    assert artifacts.eigenvalues_name("1-0.09000") == "Hessian-eigenvalues-1-0.09000.csv"
    assert artifacts.eigenvectors_name("1-0.09000", "csv") == "Hessian-eigenvectors-1-0.09000.csv"
    assert artifacts.eigenvectors_name("1-0.09000", "npy") == "Hessian-eigenvectors-1-0.09000.npy"
    assert artifacts.gradients_name("1-0.09000") == "gradients-1-0.09000.csv"
    assert artifacts.gradients_name("1-0.09000", of="_eff") == "gradients_eff-1-0.09000.csv"
    assert artifacts.history_name("1-0.09000") == "history-1-0.09000.csv"
    assert artifacts.manifest_name("1-0.09000") == "manifest-1-0.09000.json"


def test_gradients_are_a_line_a_tensor_and_read_back():
    rng = np.random.default_rng(0)
    gradients = {
        "fc1.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "fc1.bias": rng.normal(size=3).astype(np.float32),
    }

    lines = b"".join(artifacts.gradient_lines(gradients)).decode().splitlines()

    assert [line.partition(": ")[0] for line in lines] == ["dL/dfc1.weight", "dL/dfc1.bias"]
    for line, expected in zip(lines, gradients.values(), strict=True):
        read = np.array(line.partition(": ")[2].split(", "), np.float32)
        assert read.tobytes() == expected.tobytes()
    assert next(artifacts.gradient_lines(gradients, of="L_eff")) == b"dL_eff/dfc1.weight: "


def test_arrays_load_without_pickle():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    read = np.load(io.BytesIO(artifacts.array_bytes(array)), allow_pickle=False)

    np.testing.assert_array_equal(read, array, strict=True)


def test_the_table_is_what_pandas_and_numpy_read(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    store = Store(tmp_path)
    rows = [record(store, label="0.10000", Train_Loss=1 / 3, epochs=7, Test_Accuracy=97.5),
            record(store, label="0.20000", Train_Loss=1e-17, epochs=9)]  # fmt: skip

    store.write_table(1, rows)

    path = tmp_path / "Model-1.csv"
    table = pandas.read_csv(path)
    assert path.read_text().startswith(
        "L2_strength,Train_Loss,Train_Reg_Loss,Test_Loss,Test_Accuracy,"
    )
    assert list(table.columns) == list(COLUMNS)
    assert table["Train_Loss"].tolist() == [1 / 3, 1e-17]
    assert table["epochs"].tolist() == [7, 9]
    first = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(5))
    assert first.shape == (2, 5)
    assert first[0, 1] == 1 / 3
    assert store.has_table(1)
    assert not store.has_table(2)


# -------------------------------------------------------------------------------------- weights


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).state_dict())


def test_weights_are_the_same_bytes_each_time_and_load_safely(tmp_path: Path):
    path = tmp_path / "a name of its own.pth"
    path.write_bytes(artifacts.state_dict_bytes(state()))

    assert artifacts.state_dict_bytes(state()) == path.read_bytes()
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(state())
    for name, tensor in state().items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(checkpoint.load_state_dict(path)[name], tensor)


# -------------------------------------------------------------------------------------- writing


def test_write_tells_the_digest_and_the_size(tmp_path: Path):
    facts = Store(tmp_path / "new" / "folder").write("a.csv", [b"one\n", b"two\n"])

    path = tmp_path / "new" / "folder" / "a.csv"
    assert path.read_bytes() == b"one\ntwo\n"
    assert facts == {"sha256": hashlib.sha256(b"one\ntwo\n").hexdigest(), "bytes": 8}


def test_a_write_that_fails_midway_leaves_what_was_there(tmp_path: Path):
    store = Store(tmp_path)
    store.write("a.csv", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"new"
        assert (tmp_path / "a.csv").read_bytes() == b"old"
        raise ZeroDivisionError

    for name in ("a.csv", "b.csv"):
        with pytest.raises(ZeroDivisionError):
            store.write(name, chunks())

    assert contents(tmp_path) == {"a.csv": b"old"}


def test_a_hard_link_is_replaced_and_not_written_through(tmp_path: Path):
    """A cache may share its copy with the folder."""
    store = Store(tmp_path / "results")
    store.write("a.csv", [b"old"])
    (tmp_path / "cache").hardlink_to(tmp_path / "results" / "a.csv")
    (tmp_path / "cache").chmod(0o444)

    store.write("a.csv", [b"new"])

    assert (tmp_path / "cache").read_bytes() == b"old"
    assert (tmp_path / "results" / "a.csv").read_bytes() == b"new"


def unwritable(store: Store, act: str) -> str:
    with pytest.raises(StorageError) as caught:
        if act == "write":
            store.write("a.csv", [b"x"])
        else:
            with store.held():
                pass
    text = str(caught.value)
    assert "\n" not in text
    assert str(store.root) in text
    return text


@pytest.mark.parametrize("act", ["write", "held"])
def test_places_that_cannot_be_written_are_named_with_a_remedy(tmp_path: Path, act: str):
    (tmp_path / "file").write_text("")

    assert "not a folder; choose another with --out" in unwritable(Store(tmp_path / "file"), act)
    assert "a part of the path is a file" in unwritable(Store(tmp_path / "file" / "deep"), act)
    assert "cannot write" in unwritable(Store(tmp_path / ("x" * 300)), act)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc")
def test_a_place_that_takes_no_folders_is_named():
    assert "cannot write /proc/spectra" in unwritable(Store(Path("/proc/spectra")), "write")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_named(tmp_path: Path):
    tmp_path.chmod(0o555)
    try:
        assert "permission denied; choose another folder" in unwritable(Store(tmp_path), "write")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_what_to_do(tmp_path: Path):
    """The temporary file is one that is always full; the write to it really fails."""
    (tmp_path / "a.csv").write_bytes(b"old")
    (tmp_path / ".a.csv.partial").symlink_to("/dev/full")

    with pytest.raises(StorageError, match=r"No space left on device; free some space, or use "):
        Store(tmp_path).write("a.csv", [b"x" * 100_000])

    assert contents(tmp_path) == {"a.csv": b"old"}


def test_a_limit_on_file_sizes_leaves_nothing_half_written(tmp_path: Path):
    """In a process of its own, where a file may take 1,000 bytes."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from spectra.artifacts import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: Store(Path(sys.argv[1])).write('a.csv', [b'x' * 600] * 9)\n"
        "except StorageError as error: print(error)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )

    assert os.strerror(errno.EFBIG) in done.stdout
    assert "run again: finished strengths are kept" in done.stdout
    assert contents(tmp_path) == {}


# -------------------------------------------------------------------------------------- the lock


_HOLD = (
    "import sys, time; from pathlib import Path; from spectra.artifacts import *\n"
    "with Store(Path(sys.argv[1])).held():\n"
    "    print('held', flush=True); time.sleep(60)\n"
)


def test_a_folder_has_one_holder_and_a_kill_releases_it(tmp_path: Path):
    other = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert "is in use by another sweep" in unwritable(Store(tmp_path), "held")
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()

    with Store(tmp_path).held():
        pass
    with Store(tmp_path).held():
        assert contents(tmp_path) == {}


def test_an_error_inside_releases_the_folder(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), Store(tmp_path).held():
        raise ZeroDivisionError

    with Store(tmp_path).held():
        pass


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path):
    (tmp_path / ".Model-1.csv.partial").write_text("half")
    (tmp_path / ".other").write_text("not ours")
    (tmp_path / "Model-1.csv").write_text("whole")

    with Store(tmp_path).held():
        pass

    assert contents(tmp_path) == {".other": b"not ours", "Model-1.csv": b"whole"}


# ------------------------------------------------------------------------------------- manifests


def test_a_committed_result_reads_back_equal(tmp_path: Path):
    made = record(Store(tmp_path), Train_Loss=1 / 3)

    (found,) = Store(tmp_path).records()

    assert found == made
    assert Store(tmp_path).intact(found)
    assert Store(tmp_path).history(found) == [
        {"epoch": 1.0, "objective": 0.5}, {"epoch": 2.0, "objective": 0.25},
    ]  # fmt: skip


def test_a_file_that_is_gone_is_told_from_a_folder_that_is(tmp_path: Path):
    store = Store(tmp_path / "results")
    with store.held():
        with pytest.raises(StorageError, match=r"cannot read .*x\.json: No such .*; run again"):
            store.read("x.json")
        store.write("x.json", [b"{}"])
        assert store.read("x.json") == b"{}"
        (tmp_path / "results").rename(tmp_path / "elsewhere")

        with pytest.raises(StorageError, match="was removed or replaced while it was in use"):
            store.read("x.json")


def test_there_are_no_results_in_no_folder(tmp_path: Path):
    assert Store(tmp_path / "absent").records() == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", "null", "{}", '{"eigenvalues": 3}'])
def test_a_damaged_manifest_is_no_result(tmp_path: Path, damage: str):
    store = Store(tmp_path)
    record(store, label="0.10000")
    kept = record(store, label="0.20000")

    (tmp_path / "manifest-1-0.10000.json").write_text(damage)

    assert store.records() == [kept]


def test_a_manifest_of_a_newer_version_is_no_result(tmp_path: Path):
    store = Store(tmp_path)
    record(store)
    path = tmp_path / "manifest-1-0.10000.json"

    path.write_text(json.dumps(json.loads(path.read_text()) | {"unknown": 1}))

    assert store.records() == []


def test_missing_short_or_changed_files_are_noticed(tmp_path: Path):
    store = Store(tmp_path)
    made = record(store)
    weights, history = tmp_path / "model_weights-1-0.10000.pth", tmp_path / "history-1-0.10000.csv"

    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"?")
    assert not store.intact(made)
    weights.write_bytes(good)
    assert store.intact(made)
    history.write_bytes(history.read_bytes() + b"\n")
    assert not store.intact(made)
    history.unlink()
    assert not store.intact(made)


def test_remove_takes_the_result_and_nothing_else(tmp_path: Path):
    store = Store(tmp_path)
    made, kept = record(store, label="0.10000"), record(store, label="0.20000")
    (tmp_path / "notes.txt").write_text("mine")

    store.remove(made)
    store.remove(made)

    assert store.records() == [kept]
    assert set(contents(tmp_path)) == {"notes.txt", *kept.files, "manifest-1-0.20000.json"}


def test_every_file_is_on_the_disk_before_the_next_and_the_manifest_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Content, then name, then the folder that holds the name: also after a loss of power."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append("folder" if folder else "content")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        seen.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    made = record(Store(tmp_path))

    names = [*made.files, "manifest-1-0.10000.json"]
    assert seen == [step for name in names for step in ("content", name, "folder")]
