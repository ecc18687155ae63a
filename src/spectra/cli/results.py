"""The commands on results that are there: `report` and `verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from spectra.cli.console import explained, load, print_json
from spectra.cli.options import Json, ParamsFile, Quiet, Sets, place


def report(
    results: Annotated[
        Path | None, place("--results", "Folder of a sweep; artifacts.out if absent.")
    ] = None,
    out: Annotated[Path | None, place("--out", "Folder for the report.")] = None,
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


def verify(
    results: Annotated[
        Path | None, place("--results", "Folder of a sweep; artifacts.out if absent.")
    ] = None,
    sample: Annotated[
        str, typer.Option("--sample", metavar="N|all", help="Results to recompute pairs of.")
    ] = "3",
    repair: Annotated[
        bool, typer.Option("--repair", help="Take away bad results; the next sweep redoes them.")
    ] = False,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recheck a sweep's files, and on a sample their numbers; say which results are bad."""
    with explained():
        from spectra import display
        from spectra.artifacts import Store
        from spectra.errors import ParameterError, StorageError
        from spectra.verify import verify as verified

        if sample != "all" and not sample.isdecimal():
            raise ParameterError(f"--sample: a number of results, 0 or more, or all; got {sample}")
        flags = {"artifacts.out": None if results is None else str(results)}
        loaded = load(params, sets, flags)
        store = Store(Path(loaded.artifacts.out))
        with display.shown(quiet=quiet) as progress:
            found = verified(
                loaded, store, sample=None if sample == "all" else int(sample), repair=repair,
                progress=progress,
            )  # fmt: skip
        if as_json:
            print_json({
                "results": found.results, "sampled": list(found.sampled), "bad": found.bad,
                "faults": [vars(fault) for fault in found.faults],
                "repaired": list(found.repaired),
            })  # fmt: skip
        else:
            for fault in found.faults:
                print(fault)
            print(
                f"{found.results} results, {len(found.bad)} bad; pairs recomputed of "
                f"{len(found.sampled)}" + (f": {', '.join(found.sampled)}" if found.sampled else "")
            )
        if found.repaired:
            print(f"spectra: {len(found.repaired)} results taken away; the same `spectra sweep` "
                  "does them again", file=sys.stderr)  # fmt: skip
        elif found.faults:
            raise StorageError(
                f"{len(found.faults)} faults in {store.root}; --repair takes bad results away for "
                "the next sweep to do again"
            )
