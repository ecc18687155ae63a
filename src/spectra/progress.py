"""What the pipeline tells while it works; how it is shown is the terminal's business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from spectra.artifacts import Record
    from spectra.failures import Failure
    from spectra.train import Epoch


class Progress(Protocol):
    """Receives what happens, from the outermost level to the innermost."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def sweep(self, *, total: int, done: int) -> None:
        """A sweep of `total` strengths starts, `done` of which are there already."""

    def begin(self, key: str, *, epochs: int) -> None:
        """Work on `{ID}-{L2}` starts, with at most `epochs` epochs of training.

        The spectra of strengths before it may still be under way.
        """

    def epoch(self, epoch: Epoch) -> None:
        """An epoch of training has ended."""

    def product(self, key: str, number: int) -> None:
        """A Hessian product of `{ID}-{L2}` starts, its `number`-th; from any thread."""

    def done(self, outcome: Record | Failure, seconds: float) -> None:
        """A strength is on the disk, or has failed."""


class Silent:
    """Tells nobody."""

    def say(self, text: str) -> None:
        """See `Progress`."""

    def sweep(self, *, total: int, done: int) -> None:
        """See `Progress`."""

    def begin(self, key: str, *, epochs: int) -> None:
        """See `Progress`."""

    def epoch(self, epoch: Epoch) -> None:
        """See `Progress`."""

    def product(self, key: str, number: int) -> None:
        """See `Progress`."""

    def done(self, outcome: Record | Failure, seconds: float) -> None:
        """See `Progress`."""
