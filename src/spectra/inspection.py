"""A folder of results held against its manifests: what is there, whole and consistent.

A manifest says which files a result has, how long they are and what their bytes hash to. That the
bytes are those that were written is one question, that they mean what they should another; both
are asked here, of files alone: nothing is trained or multiplied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from spectra import artifacts, checkpoint, failures
from spectra.artifacts import COLUMNS, Record, Store
from spectra.errors import WeightsError

Floats = NDArray[np.floating]

_BLOCK = 1 << 20
_OURS = (
    "gradients-*",
    "Hessian-*",
    "model_weights-*",
    "history-*",
    "certificate-*",
    "manifest-*",
    "polish-[0-9]*",
    "trained_weights-*",
)


@dataclass(frozen=True)
class Fault:
    """Something wrong: of which result (None: of the folder), in which file, and what."""

    key: str | None
    file: str
    what: str

    def __str__(self) -> str:
        """As one line."""
        return f"{self.file}: {self.what}"


def inspect(store: Store) -> tuple[list[Record], list[Fault]]:
    """All results of a folder and everything that is wrong with its files.

    Returns:
        The results whose manifests can be read, and the faults: of manifests, of the files they
        name, of the tables, and files that no manifest names.
    """
    records = store.records()
    read = {artifacts.manifest_name(record.key) for record in records}
    faults = [
        Fault(
            path.stem.removeprefix("manifest-"),
            path.name,
            "is no manifest, or is not as it was written",
        )
        for path in sorted(store.root.glob(artifacts.manifest_name("*")))
        if path.name not in read
    ]
    for record in records:
        faults += faults_of(store, record)
    for replicate in sorted({record.replicate for record in records}):
        own = [record for record in records if record.replicate == replicate]
        faults += _table(store, replicate, own)
    damaged = {fault.key for fault in faults} | {f.key for f in failures.found(store)}
    named = set(chain(read, *(record.files for record in records)))
    for pattern in _OURS:
        for path in sorted(store.root.glob(pattern)):
            if path.name not in named and not any(f"-{key}." in path.name for key in damaged):
                faults.append(Fault(None, path.name, "is named by no manifest"))
    faults += [
        Fault(None, path.name, "is a leftover of an interrupted write")
        for path in sorted(store.root.glob(".*.partial"))
    ]
    return records, faults


def faults_of(store: Store, record: Record) -> list[Fault]:
    """What is wrong with the files of a result."""
    faults: list[Fault] = []
    for name, facts in record.files.items():
        path = store.root / name
        if not path.is_file():
            faults.append(Fault(record.key, name, "is missing"))
            continue
        size = path.stat().st_size
        if size != facts["bytes"]:
            what = f"has {size:,} bytes, {facts['bytes']:,} were written"
            faults.append(Fault(record.key, name, what))
        elif _sha256(path) != facts["sha256"]:
            faults.append(Fault(record.key, name, "does not have the SHA-256 that was written"))
        else:
            faults += [Fault(record.key, name, what) for what in _meaning(path, record)]
    return faults


def _meaning(path: Path, record: Record) -> Iterator[str]:
    """What a file whose bytes are right says that the manifest does not."""
    if path.name == artifacts.eigenvalues_name(record.key):
        values_K = np.loadtxt(path, ndmin=1)
        if values_K.tolist() != list(record.eigenvalues):
            yield "does not hold the eigenvalues of the manifest"
    elif path.name == artifacts.weights_name(record.key):
        try:
            state = checkpoint.load_state_dict(path)
        except WeightsError as error:
            yield f"cannot be loaded: {error}"
            return
        widths = record.parameters.get("model.hidden", [])
        if len(state) != 2 * (len(widths) + 1):
            yield f"holds {len(state)} tensors, {2 * (len(widths) + 1)} belong to the network"
        elif [len(tensor) for tensor in list(state.values())[1:-1:2]] != list(widths):
            yield f"is not a network of hidden widths {widths}"
    elif path.name == artifacts.gradients_name(record.key):
        lines = path.read_bytes().splitlines()
        if len(lines) != 2 * (len(record.parameters.get("model.hidden", [])) + 1):
            yield f"holds {len(lines)} tensors"
    elif path.name == artifacts.history_name(record.key):
        epochs = len(path.read_bytes().splitlines()) - 1
        if epochs != (told := record.row.get("epochs", epochs)):
            yield f"tells of {epochs} epochs, the manifest of {told}"


def _table(store: Store, replicate: int, records: list[Record]) -> Iterator[Fault]:
    """What is wrong with Model-{ID}.csv."""
    name = f"Model-{replicate}.csv"
    path = store.root / name
    if not path.is_file():
        yield Fault(None, name, "is missing; the next sweep writes it")
        return
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if header.split(",") != list(COLUMNS):
        yield Fault(None, name, "does not have the columns that are written now")
        return
    expected = {
        line.decode() for line in artifacts.table_lines([r.row for r in records], COLUMNS)
    } - {header + "\n"}
    there = {line + "\n" for line in lines}
    for missing in sorted(expected - there):
        yield Fault(None, name, f"lacks or differs at L2 {missing.split(',')[0]}")
    for extra in sorted(there - expected):
        if extra.split(",")[0] not in {line.split(",")[0] for line in expected}:
            yield Fault(None, name, f"has L2 {extra.split(',')[0]}, of which there is no manifest")


def read_vectors(store: Store, record: Record) -> Floats | None:
    """The eigenvectors (K, P) of a result in the precision they were written in.

    Returns:
        None where the result has none.

    Raises:
        ValueError: The file holds no matrix of finite numbers with a row for every eigenvalue.
    """
    dtype = np.dtype(record.parameters.get("runtime.dtype", "float64"))
    for form in ("csv", "npy"):
        name = artifacts.eigenvectors_name(record.key, form)
        if name not in record.files:
            continue
        if form == "npy":
            vectors_KP: Floats = np.load(store.root / name, allow_pickle=False)
        else:
            lines = (store.root / name).read_bytes().splitlines()
            vectors_KP = np.array([orjson.loads(b"[" + line + b"]") for line in lines], dtype)
        if vectors_KP.ndim != 2 or len(vectors_KP) != len(record.eigenvalues):
            raise ValueError(
                f"{name} holds {vectors_KP.shape}, {len(record.eigenvalues)} rows belong there"
            )
        if not np.isfinite(vectors_KP).all():
            raise ValueError(f"{name} holds NaN or infinity")
        return vectors_KP
    return None


def _sha256(path: Path) -> str:
    summed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            summed.update(block)
    return summed.hexdigest()
