"""What every command does around its one call: read parameters, explain failures, print JSON."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from spectra.params import Params
    from spectra.tracking import Tracker


@contextmanager
def explained() -> Iterator[None]:
    """One line and an exit code for what goes wrong; SIGTERM ends as cleanly as Ctrl-C."""
    from spectra.errors import SpectraError

    def terminate(_signal: int, _frame: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except SpectraError as error:
        print(f"spectra: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("spectra: interrupted; finished work is kept, the same command goes on",
              file=sys.stderr)  # fmt: skip
        raise typer.Exit(130) from None
    except SystemExit as stopped:
        if stopped.code == 143:
            print("spectra: terminated; finished work is kept, the same command goes on",
                  file=sys.stderr)  # fmt: skip
        raise


def load(file: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> Params:
    """The parameters, flags first; `--set` stands for the flags that do not exist."""
    from spectra import params
    from spectra.errors import ParameterError

    overrides: dict[str, Any] = {}
    for text in sets or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ParameterError(f"--set {text}: write SECTION.KEY=VALUE, as train.lr=0.001")
        overrides[key.strip()] = value
    overrides |= {key: value for key, value in flags.items() if value is not None}
    return params.load(file, overrides=overrides)


def tracker_of(params: Params) -> Tracker:
    """Where the parameters want runs to be logged."""
    from spectra.tracking import MlflowTracker, NoTracker

    if not params.tracking.enabled:
        return NoTracker()
    return MlflowTracker(params.tracking.uri, params.tracking.experiment)


def numbers(text: str | None) -> str | None:
    """`1,2,3` as the YAML list `[1,2,3]`."""
    return None if text is None else f"[{text.strip('[] ')}]"


def finite(flag: str, value: float) -> None:
    """Refuse a strength that is NaN or infinite.

    Raises:
        ParameterError: It is.
    """
    from spectra.errors import ParameterError

    if not math.isfinite(value):
        raise ParameterError(f"{flag}: a strength must be a finite number, got {value}")


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object; NaN and infinity are no JSON."""
    print(json.dumps(content, allow_nan=False))
