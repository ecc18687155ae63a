"""The files of `test_data/`: names, formats, atomic writing and reading.

| File                                | Contents                                              |
| ----------------------------------- | ----------------------------------------------------- |
| Model-{ID}.csv                      | one line a strength; derived from the manifests       |
| gradients-{ID}-{L2}.csv             | `dL/dfc1.weight: v, v, ...`, a line per tensor        |
| Hessian-eigenvalues-{ID}-{L2}.csv   | one eigenvalue a line, largest magnitude first        |
| Hessian-eigenvectors-{ID}-{L2}.csv  | one eigenvector a line (or .npy, K × P)               |
| model_weights-{ID}-{L2}.pth         | the `state_dict`                                      |
| history-{ID}-{L2}.csv               | one line an epoch                                     |
| certificate-{ID}-{L2}.json          | what vouches for the spectrum                         |
| trained_weights-{ID}-{L2}.pth       | with polishing: the `state_dict` before it            |
| polish-{ID}-{L2}.json               | with polishing: how far the training was from its end |
| manifest-{ID}-{L2}.json             | what the result is bound to, and the digest of every file |

A result is its manifest: it is written last, after the files it names are on the disk, so a
result is there whole or not at all. Everything is written to a temporary name, flushed to the
disk and renamed, never in place: a file may be a hard link into a cache. Nothing carries a
time, a duration or a run's identity: the same parameters give the same bytes.

Text is the shortest that reads back as the same number; orjson writes it thirty times faster
than `numpy.savetxt`.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from spectra.errors import StorageError, writing

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.floating]

COLUMNS = (
    "L2_strength", "Train_Loss", "Train_Reg_Loss", "Test_Loss", "Test_Accuracy",
    "Train_Accuracy", "theta_norm", "gradient_norm", "gradient_norm_ce", "lambda_max",
    "lambda_min", "worst_residual", "converged", "products", "epochs", "best_epoch",
    "distinct_units", "certified", "negative_directions",
)  # fmt: skip
"""Of Model-{ID}.csv. The first five are the layout that existing notebooks read."""

TEXT_BYTES = {"float32": 13.5, "float64": 22.5}
"""Bytes that a number takes as text, its separator included (measured on eigenvectors)."""

_TEMPORARY = ".partial"


@dataclass(frozen=True)
class Record:
    """A finished result as its manifest tells it.

    Attributes:
        digest: What the result is bound to (see `plan`).
        replicate: ID.
        l2: λ.
        label: λ as in file names.
        row: The line of Model-{ID}.csv, by column.
        eigenvalues: By magnitude, sign kept.
        residuals: |Hv − λv| of every pair.
        parameters: Those that decide the numbers, flat.
        files: Name -> {"sha256", "bytes"}.
    """

    digest: str
    replicate: int
    l2: float
    label: str
    row: Mapping[str, float | int]
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    parameters: Mapping[str, Any]
    files: Mapping[str, Mapping[str, str | int]]

    @property
    def key(self) -> str:
        """`{ID}-{L2}`, as in file names."""
        return f"{self.replicate}-{self.label}"


def weights_name(key: str) -> str:
    """The name of the weights file of `{ID}-{L2}`."""
    return f"model_weights-{key}.pth"


def eigenvalues_name(key: str) -> str:
    """The name of the eigenvalue file of `{ID}-{L2}`."""
    return f"Hessian-eigenvalues-{key}.csv"


def eigenvectors_name(key: str, form: str) -> str:
    """The name of the eigenvector file of `{ID}-{L2}` in format "csv" or "npy"."""
    return f"Hessian-eigenvectors-{key}.{form}"


def gradients_name(key: str, of: str = "") -> str:
    """The name of the gradient file of `{ID}-{L2}`; `of` is "" (L_CE) or "_eff" (L_eff)."""
    return f"gradients{of}-{key}.csv"


def history_name(key: str) -> str:
    """The name of the per-epoch file of `{ID}-{L2}`."""
    return f"history-{key}.csv"


def certificate_name(key: str) -> str:
    """The name of the certificate of `{ID}-{L2}`."""
    return f"certificate-{key}.json"


def manifest_name(key: str) -> str:
    """The name of the manifest of `{ID}-{L2}`."""
    return f"manifest-{key}.json"


# ---------------------------------------------------------------------------------- contents


def lines_of_numbers(rows: Iterable[Floats], separator: bytes = b",") -> Iterator[bytes]:
    """Each row of finite numbers as one line of text that reads back exactly.

    Raises:
        StorageError: A number is NaN or infinite.
    """
    for row in rows:
        if not np.isfinite(row).all():
            raise StorageError("refusing to write NaN or infinity into a result file")
        text = orjson.dumps(np.ascontiguousarray(row), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        yield (text if separator == b"," else text.replace(b",", separator)) + b"\n"


def gradient_lines(gradients: Mapping[str, Floats], of: str = "L") -> Iterator[bytes]:
    """`dL/dfc1.weight: v, v, ...`, a line per tensor, row-major."""
    for name, values in gradients.items():
        yield f"d{of}/d{name}: ".encode()
        yield from lines_of_numbers([values.reshape(-1)], separator=b", ")


def table_lines(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> Iterator[bytes]:
    """A CSV with a header; numbers read back exactly."""
    yield ",".join(columns).encode() + b"\n"
    for row in rows:
        yield ",".join(orjson.dumps(row[c]).decode() for c in columns).encode() + b"\n"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file; numbers that are not finite are null."""
    return orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """A manifest, sealed with the SHA-256 of what it says."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps({**content, "seal": _seal(content)}, option=options)


def state_dict_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A `state_dict` as `torch.save` writes it, without the file's name in it."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def array_bytes(array: Floats) -> bytes:
    """An array as `numpy.save` writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# -------------------------------------------------------------------------------- the folder


class Store:
    """A folder of results.

    Args:
        root: The folder; created when something is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: os.stat_result | None = None
        self._mark = ""

    @contextmanager
    def held(self, *, alone: bool = True) -> Iterator[None]:
        """Hold the folder against other sweeps, and clear what a killed one left half-written.

        The lock is on the folder itself: nothing is left behind, and a kill releases it. Not
        `alone`, it is shared with others that do not want it alone, and nothing is cleared.

        Raises:
            StorageError: Another process holds it, or it cannot be created.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"{self.root} is in use by another sweep; wait for it or choose another "
                    "folder with --out"
                ) from None
            with writing(self.root):
                for leftover in self.root.glob(f".*{_TEMPORARY}") if alone else ():
                    leftover.unlink(missing_ok=True)
            self._held, self._mark = os.fstat(handle), "" if alone else f".{os.getpid()}"
            yield
        finally:
            self._held, self._mark = None, ""
            os.close(handle)

    def write(self, name: str, chunks: Iterable[bytes]) -> dict[str, str | int]:
        """Write a file whole or not at all; returns its SHA-256 and size.

        Raises:
            StorageError: The disk is full, or the folder cannot be written.
        """
        path, partial = self.root / name, self.root / f".{name}{self._mark}{_TEMPORARY}"
        summed, size = hashlib.sha256(), 0
        with writing(path):
            self._there()
            try:
                with partial.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                        summed.update(chunk)
                        size += len(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        self._sync()
        return {"sha256": summed.hexdigest(), "bytes": size}

    def commit(self, record: Record) -> None:
        """Make a result complete: write its manifest, its files being on the disk."""
        self.write(manifest_name(record.key), [manifest_bytes(asdict(record))])

    def records(self) -> list[Record]:
        """All results whose manifest can be read, in no order that matters."""
        read = map(_read_manifest, sorted(self.root.glob(manifest_name("*"))))
        return [record for record in read if record is not None]

    def record(self, key: str) -> Record | None:
        """The result `{ID}-{L2}`, or None where its manifest is missing or damaged."""
        path = self.root / manifest_name(key)
        return _read_manifest(path) if path.is_file() else None

    def intact(self, record: Record) -> bool:
        """Whether every file of a result is there as it was written."""
        return all(self.holds(name, facts) for name, facts in record.files.items())

    def holds(self, name: str, facts: Mapping[str, str | int]) -> bool:
        """Whether a file is there with its size and digest.

        Of eigenvectors the size must do: hashing gigabytes of them at every start would cost more
        than it protects. `inspection` hashes them too.
        """
        path = self.root / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return False
        if name.startswith("Hessian-eigenvectors"):
            return True
        return hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]

    def remove(self, record: Record) -> None:
        """Delete a result: its manifest first, so that it is never half there."""
        self.discard([manifest_name(record.key), *record.files])

    def discard(self, names: Iterable[str]) -> None:
        """Delete files, in this order, where they are there."""
        with writing(self.root):
            for name in names:
                (self.root / name).unlink(missing_ok=True)

    def write_table(self, replicate: int, records: Sequence[Record]) -> None:
        """Write Model-{ID}.csv from the results of a replicate, in the order given."""
        rows = [record.row for record in records]
        self.write(f"Model-{replicate}.csv", table_lines(rows, COLUMNS))

    def has_table(self, replicate: int) -> bool:
        """Whether Model-{ID}.csv is there."""
        return (self.root / f"Model-{replicate}.csv").exists()

    def read(self, name: str) -> bytes:
        """The content of a file of a result.

        Raises:
            StorageError: It is not there, or cannot be read.
        """
        path = self.root / name
        try:
            return path.read_bytes()
        except OSError as error:
            self._there()
            raise StorageError(f"cannot read {path}: {error.strerror}; run again") from None

    def history(self, record: Record) -> list[dict[str, float]]:
        """The epochs of a result, as history-{ID}-{L2}.csv has them."""
        name = history_name(record.key)
        text = self.read(name).decode(errors="replace")
        header, *lines = text.splitlines() or [""]
        names = header.split(",")
        try:
            return [dict(zip(names, map(float, line.split(",")), strict=True)) for line in lines]
        except ValueError:
            raise StorageError(
                f"{self.root / name} is damaged; see `spectra verify --repair`"
            ) from None

    def _there(self) -> None:
        """Make the folder, or make sure that it is still the one that is held."""
        if self._held is None:
            self.root.mkdir(parents=True, exist_ok=True)
        elif not self.root.exists() or not os.path.samestat(self.root.stat(), self._held):
            raise StorageError(
                f"{self.root} was removed or replaced while it was in use; put it back, or run "
                "the same command again to begin anew"
            )

    def _sync(self) -> None:
        with writing(self.root):
            handle = os.open(self.root, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _read_manifest(path: Path) -> Record | None:
    """What a manifest tells; None if it is damaged: the strength then counts as not done."""
    try:
        content = orjson.loads(path.read_bytes())
        seal = content.pop("seal", None)
        if seal not in (None, _seal(content)) or not _well_formed(content):
            return None
        content["eigenvalues"] = tuple(content["eigenvalues"])
        content["residuals"] = tuple(content["residuals"])
        return Record(**content)
    except (IsADirectoryError, orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
        return None


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says: nothing else vouches for the manifest itself."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _well_formed(content: Mapping[str, Any]) -> bool:
    """Whether a manifest has the types of a `Record`, and names files of its folder alone.

    Those written before there were seals have nothing else to tell them from damaged ones.
    """
    return (
        isinstance(content["digest"], str)
        and isinstance(content["label"], str)
        and isinstance(content["replicate"], int)
        and isinstance(content["l2"], float | int)
        and all(isinstance(content[name], dict) for name in ("row", "parameters"))
        and "L2_strength" in content["row"]
        and len(content["residuals"]) == len(content["eigenvalues"])
        and all(isinstance(v, float) for v in (*content["eigenvalues"], *content["residuals"]))
        and all(
            Path(name).name == name and {"sha256", "bytes"} <= facts.keys()
            for name, facts in content["files"].items()
        )
    )
