"""How progress and results look: bars on a terminal, plain lines elsewhere; always on stderr.

Results go to stdout as a table, or as JSON and nothing else.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table

from spectra.estimate import duration
from spectra.failures import Failure
from spectra.progress import Progress, Silent

if TYPE_CHECKING:
    from spectra.artifacts import Record
    from spectra.branches import Followed
    from spectra.continuation.branch import Point
    from spectra.curvature.certificate import Certificate
    from spectra.pipeline import Examined, Swept
    from spectra.train import Epoch


_WIDTH = 80
"""Columns of a terminal that nobody has widened, and what Rich takes a pipe for."""


@contextmanager
def shown(*, quiet: bool) -> Iterator[Progress]:
    """The display that suits where stderr goes."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        live = Live()
        try:
            yield live
        finally:
            live.close()
    else:
        yield Lines()


class _Pace:
    """Time left, from the strengths that this process has finished.

    The first is left out as soon as there are others: a chain begins with a network trained from
    scratch, and with nothing to do beside it.
    """

    def __init__(self) -> None:
        self.total = self.done = 0
        self._ends: list[float] = [time.monotonic()]

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._ends = [time.monotonic()]

    def add(self) -> None:
        self.done += 1
        self._ends.append(time.monotonic())

    def left(self) -> str:
        remaining = self.total - self.done
        if len(self._ends) < 2 or not remaining:
            return ""
        ends = self._ends[1:] if len(self._ends) > 2 else self._ends
        each = (ends[-1] - ends[0]) / (len(ends) - 1)
        return f"about {duration(remaining * each)} left"


class Lines:
    """One plain line a strength, for logs and pipes."""

    def __init__(self) -> None:
        self._pace = _Pace()

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)

    def sweep(self, *, total: int, done: int) -> None:
        """Remember how much there is to do."""
        self._pace.start(total, done)

    def begin(self, key: str, *, epochs: int) -> None:
        """Nothing until it is done."""

    def epoch(self, epoch: Epoch) -> None:
        """Nothing: a line an epoch would bury the rest."""

    def product(self, key: str, number: int) -> None:
        """Nothing."""

    def done(self, outcome: Record | Failure, seconds: float) -> None:
        """Print what was found at a strength."""
        self._pace.add()
        left = self._pace.left()
        self.say(
            f"[{self._pace.done}/{self._pace.total}] {outcome_line(outcome)} in {duration(seconds)}"
            + (f"; {left}" if left else "")
        )


class Live:
    """Bars: strengths, epochs, and Hessian products for each spectrum under way."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._pace = _Pace()
        self._bars = Bars(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._sweep = self._bars.add_task("strengths", total=0, note="", visible=False)
        self._epochs = self._bars.add_task("epochs", total=0, note="", visible=False)
        self._products: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False, markup=False)

    def sweep(self, *, total: int, done: int) -> None:
        """Show the outermost bar."""
        self._pace.start(total, done)
        self._bars.start()
        self._bars.update(self._sweep, total=total, completed=done, visible=True)

    def begin(self, key: str, *, epochs: int) -> None:
        """Start the inner bars anew."""
        self._bars.start()
        self._bars.reset(
            self._epochs, description=f"  train {key}", total=epochs, visible=epochs > 0, note=""
        )

    def epoch(self, epoch: Epoch) -> None:
        """Advance the bar of epochs."""
        note = f"L_eff {epoch.objective:.4f}, test {epoch.test_accuracy:.2f} %"
        self._bars.update(self._epochs, completed=epoch.epoch, note=note)

    def product(self, key: str, number: int) -> None:
        """Advance a strength's bar of products, whose end is not known beforehand."""
        if key not in self._products:
            self._products[key] = self._bars.add_task(f"  products {key}", total=None, note="")
        self._bars.update(self._products[key], completed=number)

    def done(self, outcome: Record | Failure, seconds: float) -> None:
        """Print what was found at a strength and advance the outermost bar."""
        bar = self._products.pop(outcome.key, None)
        if bar is not None:
            self._bars.remove_task(bar)
        self._pace.add()
        self.say(f"{outcome_line(outcome)} in {duration(seconds)}")
        self._bars.update(self._sweep, completed=self._pace.done, note=self._pace.left())

    def close(self) -> None:
        """Take the bars down."""
        self._bars.stop()


def outcome_line(outcome: Record | Failure) -> str:
    """A strength in one line."""
    where = f"L2 {outcome.label} (ID {outcome.replicate})"
    if isinstance(outcome, Failure):
        return f"{where}: failed: {outcome.reason}"
    row = outcome.row
    return (
        f"{where}: train {row['Train_Loss']:.4f}, "
        f"test {row['Test_Accuracy']:.2f} %, ‖θ‖ {row['theta_norm']:.3g}, "
        f"λ1 {outcome.eigenvalues[0]:.4g}, λmin {row['lambda_min']:.2g}, "
        f"{row['epochs']} epochs, {row['products']} products"
    )


def sweep_table(swept: Swept, *, rows: int = 16) -> Table:
    """The closing table of a sweep, within 80 columns; of a long one, evenly chosen strengths."""
    records = swept.records
    several = len({record.replicate for record in records}) > 1
    headings = ["L2", "train", "acc. %", "‖θ‖", "‖∇L_eff‖", "λ1", "λ10", "λmin",
                "resid.", "epochs"]  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ["ID", *headings] if several else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    step = max(1, -(-len(records) // rows))
    chosen = [r for i, r in enumerate(records) if i % step == 0 or i == len(records) - 1]
    for r in chosen:
        row, values = r.row, r.eigenvalues
        cells = [
            r.label, f"{row['Train_Loss']:.4f}", f"{row['Test_Accuracy']:.2f}",
            f"{row['theta_norm']:.3g}",
            f"{row['gradient_norm']:.2g}", f"{values[0]:.3g}",
            f"{values[9]:.2g}" if len(values) > 9 else "-", f"{row['lambda_min']:.2g}",
            f"{row['worst_residual']:.0e}", str(row["epochs"]),
        ]  # fmt: skip
        table.add_row(*([str(r.replicate), *cells] if several else cells))
    if Console(width=2 * _WIDTH).measure(table).maximum > _WIDTH:
        table.padding = (0, 1, 0, 0)  # one space for two, before Rich cuts headings and numbers
    return table


def print_sweep(swept: Swept, *, folder: str, where: str) -> None:
    """The end of a sweep: what was found and where to look."""
    console = Console(highlight=False)
    console.print()
    console.print(sweep_table(swept))
    for failure in swept.failed:
        console.print(outcome_line(failure), markup=False, soft_wrap=True)
    if swept.drawn:
        console.print()
        console.print("[bold]Findings[/bold]")
        for finding in swept.drawn.findings:
            console.print(f"  • {finding}", markup=False)
    console.print()
    count = len(swept.records)
    again = f", {swept.reused} of them from before" if swept.reused else ""
    console.print(f"{count} strengths in {duration(swept.seconds)}{again}", markup=False)
    console.print(f"  results  {folder}/ (start with Model-1.csv)", markup=False, soft_wrap=True)
    if swept.drawn:
        pictures = [str(p) for p in swept.drawn.files if p.suffix in (".png", ".md")]
        console.print(f"  report   {', '.join(pictures)}", markup=False, soft_wrap=True)
    console.print(f"  runs     {where}", markup=False, soft_wrap=True)


def certificate_lines(vouched: Certificate) -> list[str]:
    """What a certificate says, in a few lines."""
    content = vouched.content
    still, beside = content["stationarity"], content["completeness"]
    exact = "" if still["negative_directions_exact"] else "at least "
    mixed = sum(len(cluster["members"]) for cluster in content["clusters"])
    checked = sum(pair["checked"] for pair in content["pairs"])
    lines = [
        f"certificate: {'sound' if vouched.sound else 'NOT SOUND'}, {vouched.verdict}; "
        f"‖∇L_eff‖ {still['gradient_norm']:.3g}, λmin(H_eff) in [{still['lambda_min_low']:.4g}, "
        f"{still['lambda_min_high']:.4g}], {exact}{still['negative_directions']} negative",
        f"  {checked} pairs one by one and all together in float64, {beside['products']} products "
        f"beside them; {mixed} vectors not identifiable in {len(content['clusters'])} clusters",
    ]
    return lines + [f"  ! {complaint}" for complaint in vouched.complaints]


def print_spectrum(examined: Examined, *, rows: int = 12) -> None:
    """The spectrum of one network."""
    console = Console(highlight=False)
    found, network = examined.found, examined.network
    widths = "-".join(map(str, network.widths))
    console.print(
        f"{widths} {network.activation}, P = {network.dim:,}, L2 = {examined.l2:g} "
        f"(H_eff = H_CE + {found.shift:g} I)",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("k", "eigenvalue of H_CE", "residual", "relative"):
        table.add_column(heading, justify="right")
    pairs = found.pairs
    for i, (value, residual) in enumerate(zip(pairs.values_K, pairs.residuals_K, strict=True)):
        if i < rows or i == len(pairs.values_K) - 1:
            table.add_row(str(i + 1), f"{value:.6g}", f"{residual:.1e}",
                          f"{residual / abs(value):.1e}")  # fmt: skip
    console.print(table)
    lowest = found.pairs.smallest.value
    verdict = "at or above" if lowest >= -found.shift else "below"
    console.print(
        f"smallest eigenvalue {lowest:.4g}, {verdict} −2c = {-found.shift:.4g}\n"
        f"L_CE {found.loss:.6f}, L_eff {found.objective:.6f}, "
        f"‖∇L_CE‖ {float(found.gradient_ce_P.norm()):.3g}, "
        f"‖∇L_eff‖ {float(found.gradient_P.norm()):.3g}, ‖θ‖ {examined.theta_norm:.4g}\n"
        f"{found.pairs.products} Hessian products"
        + (f", {'-'.join(map(str, found.units))} different hidden units" if found.units else ""),
        markup=False,
    )
    if examined.vouched is not None:
        for line in certificate_lines(examined.vouched):
            console.print(line, markup=False, soft_wrap=True)
    console.print("files    " + ", ".join(map(str, examined.files)), markup=False, soft_wrap=True)


_EVENTS = {
    "fold": "fold (spinodal)",
    "crossing": "another direction turns",
    "breaking": "equal units part",
    "target": "arrived",
    "start": "start",
}
_ENDINGS = {
    "fold": "The branch folds",
    "crossing": "The branch changes its stability",
    "breaking": "The branch loses its symmetry",
    "target": "The branch reaches its target",
    "back": "The branch is back where it began",
    "budget": "The products are used up",
    "lost": "The corrector finds no further point",
}


def branch_line(point: Point) -> str:
    """A point of a branch as one line."""
    what = _EVENTS.get(point.kind, "")
    return (
        f"λ {point.l2:.9f}  ‖θ‖ {math.sqrt(point.r):.5f}  L_CE {point.loss:.6f}  lowest "
        f"{point.lowest: .2e}  negative {point.negative}  {what}".rstrip()
    )


def print_branch(followed: Followed) -> None:
    """How a branch went."""
    console = Console(highlight=False)
    point = followed.points[-1]
    widths, merged = ("-".join(map(str, m.widths)) for m in (followed.network, followed.merged))
    polished = followed.polished
    console.print(
        f"{widths}, followed as {merged}; polished in {polished.products:.0f} products to ‖∇L_eff‖ "
        f"{polished.gradient_norm:.0e}, {followed.distance:.3g} from the weights given",
        markup=False,
    )
    for event in followed.events:
        console.print(branch_line(event), markup=False, soft_wrap=True)
    console.print(
        f"{_ENDINGS[followed.ended]} at λ = {point.l2:.8f}, after {len(followed.points)} points "
        f"and {point.products:.0f} products; ‖∇L_eff‖ {point.gradient_norm:.0e}",
        markup=False,
    )
    console.print("files    " + ", ".join(map(str, followed.files)), markup=False, soft_wrap=True)
