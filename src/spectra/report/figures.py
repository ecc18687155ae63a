"""The figures of a sweep: eigenvalues, losses with accuracy, norms, each against λ.

Panels that share an axis are stacked rather than overlaid: two scales in one frame suggest
crossings that mean nothing. Grey lines mark the jumps of test accuracy in all three figures, so
that the eye can carry a transition from one to the next. All is drawn on `Figure` objects with
the library's own defaults and fonts: no display, no pyplot, no user settings, no dates; glyphs
are drawn as outlines, since a reader may lack the font.

Colours are those of Okabe and Ito, which readers of every colour vision can tell apart
(https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from spectra.report.branch import Branch, Floats
from spectra.report.steps import jumps

BLUE, ORANGE, GREEN, VERMILION, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#222222"

STYLE = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.2,
    "lines.solid_joinstyle": "round",
    "figure.dpi": 100,
    "savefig.dpi": 220,
    "svg.fonttype": "path",
    "svg.hashsalt": "spectra",
}

WIDTH = 6.3  # inches: the text width of an A4 page with ordinary margins
FEW = 60
"""Up to so many strengths each is shown by a marker; beyond, markers hide the line."""

_UNIT = "nats / parameter$^2$"


def eigenvalues(branches: Sequence[Branch]) -> Figure:
    """|λ| by rank above; below, the smallest eigenvalue and the bound of a minimum.

    Lines join positive eigenvalues of equal rank among the positive ones, and the negative ones
    stand as marks: joined by rank of magnitude, a line would jump wherever one passes another.
    """
    figure, (top, bottom) = _panels((2.4, 1.0), 5.2)
    width = max(branch.eigenvalues.shape[1] for branch in branches)
    # The pale end of the map would vanish on paper.
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, max(width, 1)))
    marker, line = _marks(branches), 0.9 if len(branches) == 1 else 0.5
    for branch in branches:
        ranked = -np.sort(-branch.eigenvalues, axis=1)  # NaN stays last
        for k, values_S in enumerate(ranked.T):
            up = values_S > 0
            top.plot(
                branch.strengths[up], values_S[up], color=shades[k], lw=line, marker=marker, ms=2.6
            )
    _negative(top, branches)
    _log(top, np.concatenate([np.abs(b.eigenvalues).ravel() for b in branches]), span=1e7)
    top.set_ylabel(rf"$|\lambda_k|$  ({_UNIT})")
    if width > 1:
        _ranks(figure, top, shades)
    _smallest(bottom, branches)
    _finish(figure, branches, [top, bottom])
    return figure


def losses(branches: Sequence[Branch]) -> Figure:
    """Cross-entropies and L_eff above, test accuracy below."""
    figure, (top, bottom) = _panels((1.5, 1.0), 4.6)
    _curves(top, branches, "Train_Reg_Loss", ORANGE, r"$L_{\mathrm{eff}}$, training")
    _curves(top, branches, "Train_Loss", BLUE, "cross-entropy, training")
    # Dashed and last: the two cross-entropies all but coincide once the penalty acts.
    _curves(top, branches, "Test_Loss", GREEN, "cross-entropy, test", style=(0, (3, 1.5)))
    top.set_ylabel("loss  (nats)")
    top.set_ylim(bottom=0)
    top.legend(loc="best")
    _curves(bottom, branches, "Test_Accuracy", BLACK, "")
    bottom.set_ylabel("test accuracy")
    bottom.set_ylim(0, 103)
    bottom.set_yticks([0, 25, 50, 75, 100])
    bottom.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    _finish(figure, branches, [top, bottom])
    return figure


def norms(branches: Sequence[Branch]) -> Figure:
    """‖θ‖ above and ‖∇L_eff‖ below, both on logarithmic axes."""
    figure, (top, bottom) = _panels((1.0, 1.0), 4.2)
    for axes, column, colour, label in (
        (top, "theta_norm", BLUE, r"$\|\theta\|$"),
        (bottom, "gradient_norm", VERMILION, r"$\|\nabla L_{\mathrm{eff}}\|$  (nats / parameter)"),
    ):
        _curves(axes, branches, column, colour, "")
        _log(axes, np.concatenate([branch.column(column) for branch in branches]), span=1e12)
        axes.set_ylabel(label)
    _finish(figure, branches, [top, bottom])
    return figure


_FIGURES: tuple[Callable[[Sequence[Branch]], Figure], ...] = (eigenvalues, losses, norms)
NAMES = tuple(figure.__name__ for figure in _FIGURES)


def drawings(branches: Sequence[Branch]) -> Iterator[tuple[str, bytes]]:
    """Every figure as SVG and as PNG, each with its file name."""
    with matplotlib.style.context(STYLE, after_reset=True):
        for name, figure in zip(NAMES, _FIGURES, strict=True):
            drawn = figure(branches)
            # Neither dates nor versions: the same results give the same bytes.
            for form, metadata in (
                ("svg", {"Date": None, "Creator": "spectra", "Title": f"{name} against λ"}),
                ("png", {"Software": None}),
            ):
                buffer = io.BytesIO()
                drawn.savefig(buffer, format=form, metadata=metadata)
                yield f"{name}.{form}", buffer.getvalue()


def _panels(ratios: tuple[float, float], height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    return figure, (top, bottom)


def _marks(branches: Sequence[Branch]) -> str:
    """Markers where points are few, and always where there is nothing to join by a line."""
    longest = max(len(branch.records) for branch in branches)
    return "o" if longest == 1 or (longest <= FEW and len(branches) == 1) else ""


def _curves(
    axes: Axes,
    branches: Sequence[Branch],
    column: str,
    colour: str,
    label: str,
    *,
    style: tuple[float, tuple[float, ...]] | str = "-",
) -> None:
    """One line a replicate, all in the colour of the quantity."""
    several = len(branches) > 1
    for branch in branches:
        (line,) = axes.plot(branch.strengths, branch.column(column), color=colour, ls=style)
        line.set(lw=0.7 if several else 1.2, alpha=0.75 if several else 1.0)
        line.set(marker=_marks(branches), ms=3)
        if branch is branches[0] and label:  # one entry in the legend for all replicates
            line.set_label(label)


def _ranks(figure: Figure, axes: Axes, shades: Floats) -> None:
    """The key from colour to rank."""
    width = len(shades)
    mappable = ScalarMappable(
        BoundaryNorm(np.arange(0.5, width + 1), width), ListedColormap(shades)
    )
    step = max(1, width // 6)
    ticks = sorted({1, *range(step, width + 1, step)})
    bar = figure.colorbar(mappable, ax=axes, pad=0.015, aspect=28, ticks=ticks)
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_linewidth(0.4)
    bar.set_label(r"rank $k$ among positive eigenvalues")


def _negative(axes: Axes, branches: Sequence[Branch]) -> None:
    """Mark the negative eigenvalues, which an axis of magnitudes would hide."""
    few = _marks(branches) == "o"
    label = "negative eigenvalues"
    for branch in branches:
        at_S, at_K = np.nonzero(branch.eigenvalues < 0)
        if not len(at_S):
            continue
        (marks,) = axes.plot(branch.strengths[at_S], -branch.eigenvalues[at_S, at_K], ls="")
        marks.set(marker="v", mec="none", ms=4.5 if few else 2.2, color=VERMILION, label=label)
        marks.set_zorder(3)
        label = "_"
    if label == "_":  # above the panel, where no spectrum can run into it
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 0.99),
            borderaxespad=0.0,
            markerscale=1 if few else 2,
            handletextpad=0.2,
        )


def _smallest(axes: Axes, branches: Sequence[Branch]) -> None:
    """λ_min, and −2c below which a solution is no minimum of L_eff."""
    conventions = {_bound(branch) for branch in branches}
    bound = conventions.pop() if len(conventions) == 1 else "-2c"
    for branch in branches:
        (line,) = axes.plot(branch.strengths, branch.smallest, color=BLACK)
        line.set(lw=1.0 if len(branches) == 1 else 0.6, marker=_marks(branches), ms=3)
        line.set_label(r"$\lambda_{\min}$" if branch is branches[0] else "_")
    longest = max(branches, key=lambda branch: len(branch.records))
    strengths, bounds = longest.strengths, -longest.shifts
    known = [value for branch in branches for value in branch.smallest if np.isfinite(value)]
    low, high = min([*known, *bounds]), max([*known, *bounds])
    margin = 0.08 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    if len(strengths) == 1:  # a point makes no line: let the bound cross the panel
        strengths, bounds = np.array(_limits(strengths)), np.repeat(bounds, 2)
    dashed = (0, (4, 2))
    axes.plot(strengths, bounds, color=VERMILION, lw=1, ls=dashed, label=f"${bound}$")
    axes.fill_between(
        strengths,
        bounds,
        low - margin,
        color=VERMILION,
        alpha=0.1,
        lw=0,
        label=r"not a minimum of $L_{\mathrm{eff}}$",
    )
    axes.set_ylabel(rf"$\lambda_{{\min}}$  ({_UNIT})", fontsize=8.5)
    axes.legend(loc="best", ncols=3, columnspacing=1.2)


def _bound(branch: Branch) -> str:
    halved = {r.parameters.get("objective.penalty", "full") == "half" for r in branch.records}
    return "-2c" if len(halved) > 1 else r"-\lambda" if True in halved else r"-2\lambda"


def _penalty(branches: Sequence[Branch]) -> str:
    """The penalty in brackets; nothing where results of several stand together."""
    used = {
        (_bound(branch), record.parameters.get("objective.reference") is not None)
        for branch in branches
        for record in branch.records
    }
    if len(used) > 1 or "-2c" in {bound for bound, _ in used}:
        return ""
    ((bound, about),) = used
    factor = r"\frac{\lambda}{2}" if bound == r"-\lambda" else r"\lambda"
    point = r"\theta - \theta_{\mathrm{ref}}" if about else r"\theta"
    return rf"(penalty ${factor}\|{point}\|^2$)"


def _log(axes: Axes, values: Floats, *, span: float) -> None:
    """A logarithmic axis that round-off around zero cannot stretch beyond `span`."""
    shown = values[np.isfinite(values) & (values > 0)]
    if not len(shown):
        return
    axes.set_yscale("log", nonpositive="mask")
    top = float(shown.max())
    low = max(float(shown.min()), top / span)
    # Within a decade, room for a power of ten: an axis needs a tick that can be read.
    margin = 1.6 if top > 10 * low else 4.0
    axes.set_ylim(low / margin, top * margin)


def _finish(figure: Figure, branches: Sequence[Branch], panels: Sequence[Axes]) -> None:
    """The shared axis of strengths, and the jumps."""
    for axes in panels:
        for jump in (jump for branch in branches for jump in jumps(branch)):
            axes.axvline((jump.low + jump.high) / 2, color="0.8", lw=0.6, zorder=0)
    _strengths(panels[-1], np.unique(np.concatenate([branch.strengths for branch in branches])))
    panels[-1].set_xlabel(rf"L2 strength $\lambda$   {_penalty(branches)}".rstrip())
    figure.align_ylabels(panels)


def _strengths(axes: Axes, grid_S: Floats) -> None:
    """Linear for an even grid; logarithmic where most strengths crowd near zero."""
    axes.set_xlim(*_limits(grid_S))
    low, high = float(grid_S[0]), float(grid_S[-1])
    if np.median(grid_S) >= high / 8:
        return
    if low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.2, high * 1.2)
    else:
        smallest = float(grid_S[grid_S > 0][0])
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        axes.set_xlim(-smallest / 4, high * 1.2)


def _limits(grid_S: Floats) -> tuple[float, float]:
    """The ends of a linear axis of strengths, none far below zero."""
    low, high = float(grid_S[0]), float(grid_S[-1])
    pad = (high - low) / 50 or low / 2 or 0.01
    return low - pad, high + pad
