"""What the records of a sweep say, as numbers and as sentences.

Every sentence states its criterion, so that a reader can disagree with it.

The trivial phase, in which strong regularisation has removed every dependence on the image, is
recognised by ‖θ‖ < 0.2: that bounds the product of the three weight matrices by
(0.2/√3)³ = 0.0015, so two images a distance of 50 apart change a logit by at most 0.08 (sixteen
times less for the sigmoid). Such a network names the same class for every image. Which class is
up to its biases, and the noise of a stochastic optimiser moves those, so the accuracies of such
solutions are the frequencies of classes but need not agree; at the exact minimum it is the most
frequent one's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from spectra.artifacts import Record
from spectra.report.branch import Branch, outliers, relative_residual, saddle, unconverged
from spectra.report.steps import jumps, steepest, steps

CLASSES = 10
"""C, of the data sets this project reads. C − 1 outliers are what a C-class problem shows."""

TRIVIAL_NORM = 0.2
"""‖θ‖ below which logits hardly depend on the image; see above."""


def metrics(branches: Sequence[Branch]) -> dict[str, float | int]:
    """A flat table of the finite numbers that one compares between two versions of a sweep.

    λ_max is averaged over the replicates. What does not exist (the interval of a drop, with a
    single strength) is left out.
    """
    records = _records(branches)
    strengths = sorted({record.l2 for record in records})
    found: dict[str, float | int] = {
        "strengths": len(strengths),
        "replicates": len(branches),
        "solutions": len(records),
    }
    scored = [record for record in records if record.row.get("Test_Accuracy") is not None]
    if scored:
        best = max(scored, key=lambda record: record.row["Test_Accuracy"])
        found |= {
            "best_test_accuracy": best.row["Test_Accuracy"],
            "best_test_accuracy_l2": best.l2,
        }
    for name, l2 in (("smallest", strengths[0]), ("largest", strengths[-1])):
        values = [
            r.row["lambda_max"]
            for r in records
            if r.l2 == l2 and r.row.get("lambda_max") is not None
        ]
        if values:
            found[f"lambda_max_at_{name}_l2"] = float(np.mean(values))
    sharpest = steepest(branches)
    found["largest_accuracy_drop"] = sharpest.drop if sharpest else 0.0
    if sharpest:
        found |= {
            "largest_accuracy_drop_from_l2": sharpest.low,
            "largest_accuracy_drop_to_l2": sharpest.high,
        }
    found |= {
        "worst_relative_residual": max(map(relative_residual, records)),
        "unconverged_pairs": sum(map(unconverged, records)),
        "saddles": sum(map(saddle, records)),
    }
    return {key: value for key, value in found.items() if np.isfinite(value)}


def sentences(branches: Sequence[Branch]) -> tuple[str, ...]:
    """The findings, one sentence or two each."""
    return (
        _drop(branches),
        _outliers(branches),
        _minima(branches),
        _trivial(branches),
        _convergence(branches),
        *_unsound(branches),
    )


def trivial(records: Sequence[Record]) -> list[Record]:
    """The solutions in the trivial phase: ‖θ‖ < 0.2."""
    return [r for r in records if (r.row.get("theta_norm") or np.inf) < TRIVIAL_NORM]


def strength(l2: float) -> str:
    """λ as prose and tables show it."""
    return f"{l2:.6g}"


def _records(branches: Sequence[Branch]) -> list[Record]:
    return [record for branch in branches for record in branch.records]


def _drop(branches: Sequence[Branch]) -> str:
    if not any(steps(branch) for branch in branches):
        return "There is one strength only, so no change along the sweep can be told."
    sharpest = steepest(branches)
    if sharpest is None:
        return "Test accuracy falls between no two neighbouring strengths."
    of = f" (replicate {sharpest.replicate})" if len(branches) > 1 else ""
    text = (
        f"Test accuracy falls most between λ = {strength(sharpest.low)} and "
        f"{strength(sharpest.high)}: {sharpest.before:.2f} % → {sharpest.after:.2f} %{of}."
    )
    standing = [step for branch in branches for step in jumps(branch) if step != sharpest]
    if standing and len(branches) == 1:
        text += (
            " Other steps that stand out: "
            + ", ".join(
                f"{strength(step.low)} to {strength(step.high)} ({-step.drop:+.2f})"
                for step in standing
            ).replace("-", "−")
            + "."
        )
    if len(branches) > 1:
        each = [fall for fall in (steepest([branch]) for branch in branches) if fall]
        low, high = min(s.low for s in each), max(s.high for s in each)
        text += (
            f" The steepest intervals of the {len(each)} replicates in which it falls lie "
            f"between λ = {strength(low)} and {strength(high)}."
        )
    return text


def _outliers(branches: Sequence[Branch]) -> str:
    wide = [record for record in _records(branches) if len(record.eigenvalues) >= CLASSES]
    if not wide:
        return (
            f"Fewer than {CLASSES} eigenpairs were computed, so the gap expected after the first "
            f"C − 1 = {CLASSES - 1} cannot be seen."
        )
    counts = Counter(map(outliers, wide))
    expected = counts[CLASSES - 1]
    text = (
        f"The largest ratio |λ_k|/|λ_k+1| stands after k = {CLASSES - 1} = C − 1 in {expected} "
        f"of {len(wide)} spectra"
    )
    if expected:
        text += f" ({_stretches(wide, lambda record: outliers(record) == CLASSES - 1)})"
    others = [(k, n) for k, n in counts.most_common() if k != CLASSES - 1]
    if others:
        text += f"; elsewhere most often after k = {others[0][0]} ({others[0][1]})"
    return text + "."


def _minima(branches: Sequence[Branch]) -> str:
    records = _records(branches)
    halved = {record.parameters.get("objective.penalty") == "half" for record in records}
    bound = "−2c" if len(halved) > 1 else "−λ" if True in halved else "−2λ"
    found = sum(map(saddle, records))
    if not found:
        return (
            f"No solution has a known eigenvalue below {bound}: as far as the curvature computed "
            "here can tell, all may be minima of L_eff."
        )
    return (
        f"Not minima of L_eff: {found} of {len(records)} solutions, whose λ_min lies below "
        f"{bound} by more than its error ({_stretches(records, saddle)})."
    )


def _trivial(branches: Sequence[Branch]) -> str:
    records = _records(branches)
    found = trivial(records)
    if not found:
        return f"No solution is in the trivial phase (criterion: ‖θ‖ < {TRIVIAL_NORM:g})."
    members = {id(record) for record in found}
    where = _stretches(records, lambda record: id(record) in members)
    rates = [r.row["Test_Accuracy"] for r in found if r.row.get("Test_Accuracy") is not None]
    accuracy = ""
    if rates:
        low, high = f"{min(rates):.2f}", f"{max(rates):.2f}"
        accuracy = f"; test accuracy {low}" + (f" to {high} %" if high != low else " %")
    return (
        f"In the trivial phase: {len(found)} of {len(records)} solutions ({where}; criterion: "
        f"‖θ‖ < {TRIVIAL_NORM:g}{accuracy})."
    )


def _convergence(branches: Sequence[Branch]) -> str:
    records = _records(branches)
    missed, total = sum(map(unconverged, records)), sum(len(r.eigenvalues) for r in records)
    if total == 0 and missed == 0:
        return "No eigenpairs were computed."
    worst = max(records, key=relative_residual)
    text = (
        f"All {total} eigenpairs converged"
        if not missed
        else (
            f"{missed} eigenpairs did not converge or were not found, of those at "
            f"{sum(unconverged(r) > 0 for r in records)} of {len(records)} solutions"
        )
    )
    return (
        f"{text}; the worst relative residual ‖Hv − λv‖/|λ| is {relative_residual(worst):.1e}, "
        f"at λ = {strength(worst.l2)}."
    )


def _unsound(branches: Sequence[Branch]) -> list[str]:
    """Solutions whose certificate complains; where none was asked for, nothing is said."""
    vouched = [
        r for r in _records(branches) if any(name.startswith("certificate-") for name in r.files)
    ]
    unsound = [strength(r.l2) for r in vouched if not r.row.get("certified")]
    if not unsound:
        return []
    return [
        f"{len(unsound)} of {len(vouched)} certificates are not sound: λ = "
        f"{', '.join(unsound[:5])}{' …' if len(unsound) > 5 else ''}; their files say why."
    ]


def _stretches(records: Sequence[Record], holds: Callable[[Record], bool]) -> str:
    """The strengths at which something holds in every replicate, as stretches of the grid."""
    grid = sorted({record.l2 for record in records})
    failing = {record.l2 for record in records if not holds(record)}
    runs: list[list[float]] = [[]]
    for l2 in grid:
        if l2 not in failing:
            runs[-1].append(l2)
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    if not runs:
        return "at no strength in every replicate"
    spans = [
        f"{strength(r[0])} to {strength(r[-1])}" if len(r) > 1 else strength(r[0]) for r in runs
    ]
    if len(runs) <= 4:
        return "λ = " + ", ".join(spans)
    longest = max(range(len(runs)), key=lambda i: len(runs[i]))
    return f"in {len(runs)} stretches of the grid, the longest λ = {spans[longest]}"
