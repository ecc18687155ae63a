"""What the terminal shows: the closing table fits into 80 columns, whatever is in it."""

from __future__ import annotations

import pytest
from rich.console import Console

from spectra import display
from spectra.artifacts import Record
from spectra.pipeline import Swept

LEARNT = {
    "Train_Loss": 0.05123, "Test_Accuracy": 97.54, "theta_norm": 17.31, "gradient_norm": 0.0123,
    "lambda_min": -0.0123, "worst_residual": 9e-4, "epochs": 23,
}  # fmt: skip
VANISHED = {
    "Train_Loss": 2.30258, "Test_Accuracy": 100.0, "theta_norm": 1.234e-5, "gradient_norm": 1.2e-7,
    "lambda_min": -1.234e-5, "worst_residual": 1e-4, "epochs": 1000,
}  # fmt: skip
HEADINGS = ["L2", "train", "acc. %", "‖θ‖", "‖∇L_eff‖", "λ1", "λ10", "λmin", "resid.", "epochs"]


def shown(*records: Record) -> list[str]:
    """The lines of the table on a terminal of 80 columns."""
    console = Console(width=80)
    with console.capture() as captured:
        console.print(display.sweep_table(Swept(records, (), 0, None, 1.0)))
    return captured.get().splitlines()


def record(row: dict[str, float], replicate: int = 1) -> Record:
    return Record("d", replicate, 0.04, "0.04000", row, (0.0123,) * 9 + (2.3e-5,), (), {}, {})


@pytest.mark.parametrize("row", [LEARNT, VANISHED])
@pytest.mark.parametrize("replicates", [(1,), (1, 12)])
def test_a_sweep_s_table_fits_into_80_columns(row: dict[str, float], replicates: tuple[int, ...]):
    """No heading and no number is cut, and there is no column less."""
    lines = shown(*(record(row, replicate) for replicate in replicates))

    assert "…" not in "".join(lines)
    headings = " ".join(["ID"] * (len(replicates) > 1) + HEADINGS)
    assert " ".join(lines[0].split()) == headings
    assert len(lines) == 1 + len(replicates)
    for line in lines[1:]:
        cells = line.split()
        assert cells[-1] == str(row["epochs"])
        assert len(cells) == len(HEADINGS) + (len(replicates) > 1)


def test_columns_stand_two_apart_where_there_is_room():
    assert "‖∇L_eff‖  " in shown(record(LEARNT | {"lambda_min": -0.1}))[0]


def test_the_time_left_leaves_out_the_first_strength(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Which takes longer: a chain begins with a network trained from scratch."""
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    lines = display.Lines()
    lines.sweep(total=13, done=2)
    told = []
    for took in (60.0, 8.0, 12.0):
        now += took
        lines.done(record(LEARNT | {"products": 111}), took)
        told.append(capsys.readouterr().err.rstrip().rpartition("; ")[2])

    assert told == ["about 10 min left", "about 72 s left", "about 80 s left"]
