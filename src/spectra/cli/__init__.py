"""The command line: parse, call one function of the pipeline, print, exit code.

Nothing heavy is imported before a command runs, so that `spectra --help` answers at once.
"""

from __future__ import annotations

import typer

from spectra.cli import branching, results, running
from spectra.cli.usage import Commands

app = typer.Typer(
    name="spectra",
    cls=Commands,
    help="Spectral geometry of neural loss landscapes under L2 regularisation.",
    epilog="Exit codes: 0 done, 2 usage, 3 data, 4 a strength failed, 5 storage, 6 memory, "
    "129 hangup, 130 interrupted, 141 reader gone, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS = (
    running.data, running.train, running.spectrum, running.sweep, branching.branch, results.verify,
    results.report,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)


def main() -> None:
    """Entry point of the `spectra` command."""
    app()
