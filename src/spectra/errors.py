"""Everything that `spectra` raises on purpose, and the exit code that goes with it.

SpectraError                  1
├── UsageError                2  what was asked for cannot be done as asked
│   ├── ParameterError        2  a parameter is unknown, of the wrong type or out of range
│   └── WeightsError          2  a weights file is not a network of the family
├── DataError                 3  no source gave the data set, or its files are damaged
├── NumericalError            4  a run failed
│   ├── DivergedError         4  training left the finite numbers
│   ├── NonFiniteError        4  an operator or a gradient is not finite
│   └── NotConvergedError     4  eigenpairs missed their tolerance within the budget
├── StorageError              5  results could not be written, or are held by another sweep
│   └── UnreachableError      5  a store of runs is locked, or its server does not answer
└── MemoryShortError          6  there is not enough memory

Ctrl-C ends with 130 and SIGTERM with 143, as shells expect. A message says what is wrong,
the limit, the value met and the remedy, in one line; the terminal shows no traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SpectraError(Exception):
    """Root of the tree; `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(SpectraError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class ParameterError(UsageError):
    """A parameter is unknown, of the wrong type or out of range."""


class WeightsError(UsageError):
    """A weights file is unreadable or holds no network of the family."""


class DataError(SpectraError):
    """No source gave the data set, or its files are damaged."""

    exit_code = 3


class NumericalError(SpectraError):
    """A run failed; what was computed before it is kept."""

    exit_code = 4


class DivergedError(NumericalError):
    """Training left the finite numbers."""


class NonFiniteError(NumericalError):
    """An operator or a gradient returned NaN or infinity."""


class NotConvergedError(NumericalError):
    """Eigenpairs missed their tolerance within the budget of products."""


class StorageError(SpectraError):
    """Results could not be written, or the folder is held by another sweep."""

    exit_code = 5


class UnreachableError(StorageError):
    """A store of runs is locked, or its server does not answer; it may do so later."""


class MemoryShortError(SpectraError):
    """There is not enough memory for what was asked."""

    exit_code = 6


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write there into one line with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space, or use --eigenvectors npy or none, and run again: "
            "finished strengths are kept",
            errno.EDQUOT: "the quota is used up; free some space and run again",
            errno.EROFS: "the file system is read-only; choose another folder with --out",
            errno.EACCES: "permission denied; choose another folder with --out",
            errno.EPERM: "permission denied; choose another folder with --out",
            errno.ENOTDIR: "a part of the path is a file; choose another folder with --out",
            errno.EEXIST: "the path is a file, not a folder; choose another with --out",
        }.get(error.errno or 0, "check the folder and run again: finished strengths are kept")
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None
