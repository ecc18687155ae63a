"""What a sweep will do: its tasks in order, their file labels, and what each is bound to.

A task is one strength of one replicate. Its digest binds the result to everything that
determines it: parameters, data, source code and, in a chain, the digest of the task it starts
from. So a result is recognised as one's own exactly when it would come out the same again, a
grid that goes on from another reuses their common beginning, and what is left to do never
changes what comes out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from spectra.params import Params, digest

T = TypeVar("T")

# Files whose text decides numbers. A change to any makes earlier results another code's.
_NUMERICS = (
    "activations.py", "analysis.py", "backprop.py", "chunks.py", "data.py", "descent.py",
    "inputs.py", "minibatches.py", "mlp.py", "narrow.py", "objective.py", "polishing.py",
    "runtime.py", "solve.py", "streams.py", "train.py", "workbench.py", "curvature/arpack.py",
    "curvature/certificate.py", "curvature/claim.py", "curvature/differences.py",
    "curvature/eigen.py", "curvature/equal_units.py", "curvature/examination.py",
    "curvature/intervals.py", "curvature/lanczos.py", "curvature/mlp_operator.py",
    "curvature/noise.py", "curvature/operator.py", "curvature/probe.py",
    "curvature/recomputation.py", "curvature/reduction.py", "curvature/spectrum.py",
    "polish/landscape.py", "polish/lowest.py", "polish/model.py", "polish/network.py",
    "polish/newton.py", "polish/symmetric.py", "polish/valley.py",
)  # fmt: skip

_DECISIVE = ("model", "objective", "train", "polish", "spectrum", "certificate", "runtime")
"""Sections all of whose parameters decide numbers."""


@dataclass(frozen=True)
class Task:
    """One strength of one replicate; `previous` is the task whose weights it starts from."""

    replicate: int
    l2: float
    label: str
    digest: str
    previous: Task | None = None

    @property
    def key(self) -> str:
        """`{ID}-{L2}`, as in file names."""
        return f"{self.replicate}-{self.label}"


@dataclass(frozen=True)
class Plan:
    """A sweep's tasks and the parameters that decide their numbers.

    Attributes:
        groups: Tasks that are trained together as a stack, in the order in which they are done.
        parameters: Those that decide numbers.
        digest: Of all of it.
    """

    groups: tuple[tuple[Task, ...], ...]
    parameters: Mapping[str, Any]
    digest: str

    @property
    def tasks(self) -> list[Task]:
        """All tasks in the order in which they are done."""
        return [task for group in self.groups for task in group]

    @property
    def chains(self) -> dict[int, tuple[Task, ...]]:
        """The tasks of each replicate."""
        chains: dict[int, tuple[Task, ...]] = {}
        for task in self.tasks:
            chains[task.replicate] = (*chains.get(task.replicate, ()), task)
        return chains


def plan(params: Params, *, data_digest: str, reference_digest: str | None, stack: int = 1) -> Plan:
    """Lay out a sweep.

    Which tasks are trained together follows from the grid alone, never from what is left to do:
    a stack's composition can change the last bits of its members, so it is part of what they
    are bound to.

    Args:
        params: Of the sweep.
        data_digest: Of the training and test data.
        reference_digest: SHA-256 of the reference point's weights file, if there is one.
        stack: How many networks are trained together at most.
    """
    strengths, ids = params.sweep.grid(), params.sweep.ids
    labels = strength_labels(strengths)
    bound = decisive(params, data_digest=data_digest, reference_digest=reference_digest)
    linked = params.sweep.protocol == "continuation"
    if linked:  # a chain's strengths follow one another; replicates go side by side
        layout = [[(i, l2) for i in some] for some in _cut(ids, stack) for l2 in strengths]
    else:
        layout = _cut([(i, l2) for i in ids for l2 in strengths], stack)
    groups: list[tuple[Task, ...]] = []
    latest: dict[int, Task] = {}
    for members in layout:
        together = {"with": members} if len(members) > 1 else {}
        group: list[Task] = []
        for replicate, l2 in members:
            previous = latest.get(replicate) if linked else None
            origin = previous.digest if previous else None
            own = digest(bound, {"replicate": replicate, "l2": l2, "from": origin, **together})
            group.append(Task(replicate, l2, labels[l2], own, previous))
        latest |= {task.replicate: task for task in group}
        groups.append(tuple(group))
    whole = digest({"tasks": [task.digest for group in groups for task in group]})
    return Plan(tuple(groups), bound, whole)


def _cut(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def decisive(params: Params, *, data_digest: str, reference_digest: str | None) -> dict[str, Any]:
    """The parameters that decide the numbers of a result, flat, with the data and the code."""
    sections = params.model_dump(mode="json")
    flat = {
        f"{section}.{key}": value
        for section in _DECISIVE
        for key, value in sections[section].items()
    }
    flat["objective.reference"] = reference_digest  # what it holds, not what it is called
    return flat | {
        "sweep.protocol": params.sweep.protocol,
        "data.mean": params.data.mean,
        "data.std": params.data.std,
        "data.digest": data_digest,
        "artifacts.eigenvectors": params.artifacts.eigenvectors,
        "code": code_digest(),
    }


def strength_labels(strengths: Sequence[float]) -> dict[float, str]:
    """Strengths as they stand in file names: five decimals, more only to stay distinct."""
    for decimals in range(5, 18):
        labels = {l2: f"{l2:.{decimals}f}" for l2 in strengths}
        if len(set(labels.values())) == len(labels):
            return labels
    return {l2: f"{l2:.17e}" for l2 in strengths}


@cache
def code_digest() -> str:
    """SHA-256 of the source that decides numbers, as 16 hexadecimal digits.

    Of what it computes, not of the words around it: comments, docstrings and layout are left
    out, so that mending a sentence does not make a week of results another code's.
    """
    root = Path(__file__).parent
    joined = hashlib.sha256()
    for name in _NUMERICS:
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        joined.update(name.encode() + b"\0" + ast.unparse(tree).encode() + b"\0")
    return joined.hexdigest()[:16]
