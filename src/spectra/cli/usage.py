"""What was typed wrongly, in one line: `spectra: no such option: --pionts; did you mean ...`.

Typer draws its usage errors as a box of several lines, in colour where a terminal or a CI asks
for it. Here they read like every other complaint of the program. Typer carries its own copy of
Click from 0.26 on and asks for Click before, so the errors are known by their attributes
(`exit_code`, `format_message`, `param`, `possibilities`), never by their classes.
"""

from __future__ import annotations

import difflib
import io
import sys
from typing import Any

from typer.core import TyperGroup

from spectra.cli.console import complain


class Commands(TyperGroup):
    """The group of all commands; its complaints are one line each."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (Typer's own signature)
        """Run the command line and end the process with its exit code."""
        kwargs["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a path may hold bytes that are no text
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **kwargs)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":  # the help, not a complaint
                error.show()  # type: ignore[attr-defined]
            else:
                complain(f"{_words(error)}see `spectra {_command(error)}--help`")
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def _command(error: Any) -> str:  # noqa: ANN401
    """The command that was understood before the error, with a space after it."""
    context = getattr(error, "ctx", None)
    return f"{context.info_name} " if context is not None and context.parent is not None else ""


def _words(error: Any) -> str:  # noqa: ANN401
    """What is wrong, the value and the limit, up to the remedy."""
    text = str(error.message)
    text = (text[:1].lower() + text[1:]).rstrip(".")
    param = getattr(error, "param", None)
    if param is not None:
        option = param.param_type_name == "option"
        name = max(param.opts, key=len) if option else param.name.upper()
        told = getattr(error.__cause__, "errors", None)  # of pydantic, which newer Typers ask
        got = f", got {told()[0]['input']!r}" if told else ""
        return f"{name}: {text or 'is missing'}{got}; "
    near = list(getattr(error, "possibilities", None) or ())
    best = difflib.get_close_matches(getattr(error, "option_name", ""), near, n=1)
    if best:
        text += f"; did you mean '{best[0]}'?"
    return f"{text} " if text.endswith("?") else f"{text}; "
