"""The page of a sweep as Markdown: conventions, findings, figures and a table.

Its links are relative, so that the folder can be moved, committed or logged as it is. A long
sweep shows evenly chosen strengths in its table, and both sides of every jump, where the reader
will look; all rows are in sweep.csv.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectra.report.branch import Branch, outliers, saddle
from spectra.report.findings import strength
from spectra.report.steps import jumps

ROWS = 40
"""Strengths that a table shows in full; a longer sweep is thinned to about as many."""

_PENALTIES = {"full": "L_eff = L_CE + λ‖θ{ref}‖²", "half": "L_eff = L_CE + (λ/2)‖θ{ref}‖²"}
_SHIFTS = {"full": "2λ", "half": "λ"}

_HEADER = (
    "λ",
    "train CE",
    "L_eff",
    "test CE",
    "test accuracy, %",
    "‖θ‖",
    "‖∇L_eff‖",
    "λ_max",
    "λ_min",
    "outliers",
    "minimum?",
)


def page(branches: Sequence[Branch], findings: Sequence[str], figures: Sequence[str]) -> str:
    """The text of summary.md.

    Args:
        branches: The solutions, by replicate.
        findings: Sentences.
        figures: Names without suffix; each is there as .svg and .png beside the page.
    """
    lines = ["# Sweep of the L2 strength", "", convention(branches), "", "## Findings", ""]
    lines += [f"- {_escaped(finding)}" for finding in findings]
    lines += ["", "## Figures", ""]
    for name in figures:
        lines += [
            f"![{name.capitalize()} against λ]({name}.svg)",
            "",
            f"[{name}.svg]({name}.svg) · [{name}.png]({name}.png)",
            "",
        ]
    lines += ["## Solutions", "", _key(branches), ""]
    for branch in branches:
        if len(branches) > 1:
            lines += [f"### Replicate {branch.replicate}", ""]
        chosen = rows(branch)
        if len(chosen) < len(branch.records):
            lines += [f"{len(chosen)} of {len(branch.records)} strengths.", ""]
        lines += [*_table(branch, chosen), ""]
    lines += ["All numbers: [sweep.csv](sweep.csv), [summary.json](summary.json)."]
    return "\n".join(lines) + "\n"


def convention(branches: Sequence[Branch]) -> str:
    """One line: which penalty, and which Hessian."""
    used = {
        (
            str(record.parameters.get("objective.penalty", "full")),
            record.parameters.get("objective.reference") is not None,
        )
        for branch in branches
        for record in branch.records
    }
    stated = "; ".join(
        f"`{name}`, {_PENALTIES[name].format(ref=' − ref' if ref else '')} "
        f"(H_eff = H + {_SHIFTS[name]} I)"
        for name, ref in sorted(used)
    )
    mixed = "**Results of different objectives stand side by side here.** " if len(used) > 1 else ""
    return (
        f"{mixed}Penalty: {stated}. The Hessian H is that of the mean cross-entropy over the "
        "training set; H_eff, that of L_eff, adds 2c to every eigenvalue, c being the factor of "
        "the penalty."
    )


def rows(branch: Branch) -> list[int]:
    """Which solutions of a replicate its table shows: all, or some and both sides of jumps."""
    count = len(branch.records)
    if count <= ROWS:
        return list(range(count))
    at = {record.l2: index for index, record in enumerate(branch.records)}
    sides = {at[end] for jump in jumps(branch) for end in (jump.low, jump.high)}
    even = np.linspace(0, count - 1, ROWS - len(sides)).round().astype(int).tolist()
    return sorted({*even, *sides})


def _table(branch: Branch, chosen: Sequence[int]) -> list[str]:
    columns = [
        branch.column(name)
        for name in (
            "Train_Loss",
            "Train_Reg_Loss",
            "Test_Loss",
            "Test_Accuracy",
            "theta_norm",
            "gradient_norm",
            "lambda_max",
        )
    ]
    columns.append(branch.smallest)
    formats = (".4f", ".4f", ".4f", ".2f", ".4g", ".2e", ".4g", ".4g")
    lines = [_row(_HEADER), _row(["---:"] * len(_HEADER))]
    for i in chosen:
        record = branch.records[i]
        numbers = [_number(column[i], form) for column, form in zip(columns, formats, strict=True)]
        lines.append(
            _row(
                [
                    strength(record.l2),
                    *numbers,
                    str(outliers(record)),
                    "no" if saddle(record) else "maybe",
                ]
            )
        )
    return lines


def _key(branches: Sequence[Branch]) -> str:
    several = " The table of a replicate stands under its number." if len(branches) > 1 else ""
    return (
        "Losses are in nats, eigenvalues in nats per squared parameter. *Outliers*: the k with "
        "the largest ratio between the magnitudes of eigenvalues k and k + 1. *Minimum?*: no, "
        "where an eigenvalue lies below −2c by more than its error; maybe, where none known "
        f"does.{several}"
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", "−") if np.isfinite(value) else "–"


def _escaped(text: str) -> str:
    """Keep `_` and `|` of formulas from being read as Markdown."""
    return text.replace("_", r"\_").replace("|", r"\|")
