"""Strengths that have no result, and why: `failed-{ID}-{L2}.json`.

A failure is bound to the same digest as the result would be: the same parameters, data and code
fail in the same way, so it is not tried again until one of them changes or the file is deleted.

Where training diverged there are no weights, and a chain goes on from the last strength that has
some. Where only the spectrum failed the trained weights are kept, and the chain goes on from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import orjson

from spectra import artifacts
from spectra.artifacts import Store

_PATTERN = "failed-*.json"


@dataclass(frozen=True)
class Failure:
    """A strength that failed.

    Attributes:
        digest: What it is bound to (see `plan`).
        replicate: ID.
        l2: λ.
        label: λ as in file names.
        reason: In one line.
        files: What was written of it and is kept: name -> {"sha256", "bytes"}.
    """

    digest: str
    replicate: int
    l2: float
    label: str
    reason: str
    files: Mapping[str, Mapping[str, str | int]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """`{ID}-{L2}`, as in file names."""
        return f"{self.replicate}-{self.label}"

    @property
    def trained(self) -> bool:
        """Whether its weights are there, and only what was to follow from them is not."""
        return artifacts.weights_name(self.key) in self.files


def put(store: Store, failure: Failure) -> None:
    """Write a failure down.

    Raises:
        StorageError: The folder cannot be written.
    """
    text = orjson.dumps(asdict(failure), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    store.write(f"failed-{failure.key}.json", [text + b"\n"])


def found(store: Store) -> list[Failure]:
    """All failures of a folder that can be read and whose files are there, by replicate and λ."""
    failures: list[Failure] = []
    for path in store.root.glob(_PATTERN):
        try:
            failure = Failure(**orjson.loads(path.read_bytes()))
            whole = math.isfinite(failure.replicate + failure.l2) and all(
                store.holds(name, facts) for name, facts in failure.files.items()
            )
        except (orjson.JSONDecodeError, TypeError, AttributeError, KeyError, OSError):
            continue
        if whole:
            failures.append(failure)
    return sorted(failures, key=lambda failure: (failure.replicate, failure.l2))


def forget(store: Store, key: str) -> None:
    """Take back what was written down for `{ID}-{L2}`, if anything was.

    Raises:
        StorageError: The folder cannot be written.
    """
    store.discard([f"failed-{key}.json"])
