"""The commands on results that are there: `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectra.cli.console import explained, load, print_json
from spectra.cli.options import (
    Json,
    ParamsFile,
    Sets,
)


def report(
    results: Annotated[
        Path | None, typer.Option("--results", help="Folder of a sweep; artifacts.out if absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report.")] = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Draw the figures and write the tables of a sweep's results."""
    with explained():
        from spectra import pipeline

        flags = {
            "artifacts.out": None if results is None else str(results),
            "artifacts.report": None if out is None else str(out),
        }
        drawn = pipeline.draw(load(params, sets, flags))
        if as_json:
            print_json({"files": [str(path) for path in drawn.files],
                         "findings": list(drawn.findings)})  # fmt: skip
            return
        for finding in drawn.findings:
            print(f"• {finding}")
        print("written  " + ", ".join(str(path) for path in drawn.files))
