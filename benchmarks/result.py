"""What a run found and what was left out, as they stand in the JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.timing import Spread, ratios

OURS = "ours"


@dataclass
class Result:
    """The rows of a run.

    Attributes:
        say: Told one line about everything that happens.
        rows: One a contender and piece of work.
        files: What writing takes, one entry a kind of file.
        growth: How cost grows, one entry a quantity.
        skipped: Why a row is not there.
    """

    say: Callable[[str], None] = print
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        """Note why a row is missing, once."""
        if reason not in self.skipped:
            self.skipped.append(reason)
            self.say(f"  skipped: {reason}")

    def failed(self, name: str, error: Exception) -> None:
        """Note that a contender raised."""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.skip(f"{name}: {type(error).__name__}: {first}")

    def add(
        self,
        work: str,
        network: str,
        values: Mapping[str, Sequence[float]],
        *,
        unit: str = "s",
        how: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
        certificates: Mapping[str, Mapping[str, Any]] | None = None,
        paced: Mapping[str, float] | None = None,
    ) -> None:
        """Add the rows of one piece of work, with their ratios to ours.

        Args:
            work: What was done.
            network: On which network.
            values: Contender -> what every run gave.
            unit: Seconds or MB.
            how: Contender -> "measured" (the default) or "composed" of other rows.
            notes: Contender -> what a reader must know.
            certificates: Contender -> what its result is worth.
            paced: Contender -> its ratio to ours where that is not the one of the medians.
        """
        spreads = {name: Spread.of(runs) for name, runs in values.items() if runs}
        factors = ratios({name: spread.median for name, spread in spreads.items()}, OURS)
        factors |= paced or {}
        for name, spread in spreads.items():
            row = {
                "work": work,
                "network": network,
                "contender": name,
                "unit": unit,
                **spread.as_dict(),
                "ratio": factors.get(name),
                "how": (how or {}).get(name, "measured"),
                "note": (notes or {}).get(name, ""),
                "certificate": (certificates or {}).get(name),
            }
            self.rows.append(row)
            verdict = f"  {row['certificate']['verdict']}" if row["certificate"] else ""
            factor = f"  {row['ratio']:.2g}x ours" if row["ratio"] else ""
            self.say(f"  {work:12} {network:8} {name:22} {spread.median:10.4g} {unit}"
                     f"{factor}{verdict}")  # fmt: skip

    def median(self, work: str, network: str | None, contender: str) -> float | None:
        """A row's median, where the row is there; None stands for any network."""
        for row in self.rows:
            wanted = (work, network or row["network"], contender)
            if (row["work"], row["network"], row["contender"]) == wanted:
                return float(row["median"])
        return None
