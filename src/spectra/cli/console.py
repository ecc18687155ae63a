"""What every command does around its one call: read parameters, explain failures, print JSON."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from spectra.params import Params
    from spectra.tracking import Tracker


@contextmanager
def explained(kept: str = "finished work is kept, the same command goes on") -> Iterator[None]:
    """One line and an exit code for what goes wrong; SIGTERM ends as cleanly as Ctrl-C.

    Args:
        kept: What an interruption leaves behind.
    """
    from spectra.errors import MemoryShortError, SpectraError

    for number, handler in (
        (signal.SIGTERM, _stop), (signal.SIGHUP, _stop), (signal.SIGINT, _Interrupt(kept)),
    ):  # fmt: skip
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, handler)
    try:
        yield
        sys.stdout.flush()
    except SpectraError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail(f"interrupted; {kept}", 130)
    except SystemExit as stopped:
        if stopped.code in (129, 143):
            print(f"spectra: terminated; {kept}", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that closing stdout does not fail again
        raise typer.Exit(141) from None
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        _fail(f"{what}{error.strerror or error}; {kept}", 5)
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", said):
            raise
        short = MemoryShortError(
            "there is not enough memory: " + (said.splitlines() or ["allocation failed"])[0][:160]
            + "; use a smaller network, fewer runtime.threads or spectrum.k, or close other "
            f"programs; {kept}"
        )  # fmt: skip
        _fail(str(short), short.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    """One line, and the exit code."""
    complain(message)
    raise typer.Exit(code) from None


def complain(text: str) -> None:
    """Print a complaint as one line, whatever a file name or a value in it is made of.

    Control characters and bytes that are no text are escaped: a name may hold a line feed or
    what a terminal takes for a command.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    print(f"spectra: {shown}", file=sys.stderr)


def _stop(number: int, _frame: object) -> NoReturn:
    # Whoever ends a process and then its group, as `timeout` does, says it twice.
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


class _Interrupt:
    """Ctrl-C: the first ends in order, the second at once, for files are whole at any time."""

    def __init__(self, kept: str) -> None:
        self._kept, self._again = kept, False

    def __call__(self, _number: int, _frame: object) -> None:
        if self._again:
            os.write(2, f"\nspectra: stopped at once; {self._kept}\n".encode())
            os._exit(130)
        self._again = True
        raise KeyboardInterrupt


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


def sweep_tracker(params: Params, say: Callable[[str], None]) -> Tracker:
    """The same, for a sweep: logged beside its training, and later what is refused now."""
    from spectra.background import BackgroundTracker
    from spectra.patience import PatientTracker
    from spectra.tracking import NoTracker

    if not params.tracking.enabled:
        return NoTracker()
    return BackgroundTracker(PatientTracker(lambda: tracker_of(params), say))


def numbers(text: str | None) -> str | None:
    """`1,2,3` as the YAML list `[1,2,3]`."""
    return None if text is None else f"[{text.strip('[] ')}]"


def finite(flag: str, value: float) -> None:
    """Refuse a strength that is NaN, infinite or beyond what file names spell out.

    Raises:
        ParameterError: It is.
    """
    from spectra.errors import ParameterError

    if not math.isfinite(value):
        raise ParameterError(f"{flag}: a strength must be a finite number, got {value}")
    if value > 1e9:
        raise ParameterError(f"{flag}: a strength may be 1e+09 at most, got {value:g}")


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object; NaN and infinity are no JSON."""
    print(json.dumps(content, allow_nan=False))
