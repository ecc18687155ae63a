"""Figures, a page and tables of a sweep, from its files alone.

    draw(results, out)  ->  eigenvalues, losses, norms (.svg, .png), summary.md,
                            summary.json (for `dvc metrics`), sweep.csv (for `dvc plots`)

Reading is all that happens to the results: nothing is trained or differentiated, and torch is
not imported. The same results give the same bytes, whatever the user's matplotlib settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from spectra import failures
from spectra.artifacts import COLUMNS, Store, table_lines
from spectra.errors import UsageError
from spectra.failures import Failure
from spectra.report import findings, summary
from spectra.report.branch import branches

__all__ = ["Drawn", "draw"]


@dataclass(frozen=True)
class Drawn:
    """What was written, and what the records say in short sentences."""

    files: tuple[Path, ...]
    findings: tuple[str, ...]


def draw(results: Path, out: Path) -> Drawn:
    """Draw the figures of a sweep and write its page and tables.

    Args:
        results: A folder of finished results, such as `test_data/`.
        out: The folder to write into; files of an earlier report are replaced, each whole.

    Raises:
        UsageError: There are no results.
        StorageError: The files cannot be written.
    """
    records = Store(results).records()
    if not records:
        raise UsageError(
            f"{results} holds no finished results to draw; run `spectra sweep` first, or name "
            "the folder a sweep wrote to"
        )
    # matplotlib takes half a second to import.
    from spectra.report import figures

    found = branches(records)
    said = (*findings.sentences(found), *_failed(failures.found(Store(results))))
    store, files = Store(out), []

    def write(name: str, content: bytes) -> None:
        store.write(name, [content])
        files.append(out / name)

    for name, drawing in figures.drawings(found):
        write(name, drawing)
    write("summary.md", summary.page(found, said, figures.NAMES).encode())
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    write("summary.json", orjson.dumps(findings.metrics(found), option=options))
    rows = [
        {"replicate": record.replicate, **{name: record.row.get(name) for name in COLUMNS}}
        for branch in found
        for record in branch.records
    ]
    write("sweep.csv", b"".join(table_lines(rows, ("replicate", *COLUMNS))))
    return Drawn(tuple(files), said)


def _failed(failed: Sequence[Failure]) -> list[str]:
    """What there is to say of strengths without a result."""
    if not failed:
        return []
    which = ", ".join(failure.key for failure in failed[:5])
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    return [f"Without a result: {len(failed)} strengths ({which}{more}). {failed[0].reason}"]
