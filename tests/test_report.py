"""The report: findings against planted truths, bytes that repeat, and links that hold."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectra.artifacts import COLUMNS, Record, Store
from spectra.errors import UsageError
from spectra.report import Drawn, draw
from spectra.report.branch import Branch, branches, outliers, relative_residual, saddle, unconverged
from spectra.report.findings import metrics, sentences, trivial
from spectra.report.steps import jumps
from spectra.report.summary import ROWS, convention, rows

NINE = (3.653, 3.422, 3.35, 3.276, 3.267, 3.258, 3.233, 3.218, 3.018)
FILES = (
    "eigenvalues.svg", "eigenvalues.png", "losses.svg", "losses.png", "norms.svg", "norms.png",
    "summary.md", "summary.json", "sweep.csv",
)  # fmt: skip


def a_record(
    l2: float,
    *,
    replicate: int = 1,
    accuracy: float = 90.0,
    theta: float = 10.0,
    eigenvalues: Sequence[float] = (*NINE, 0.3, 0.2, 0.1),
    residuals: Sequence[float] | None = None,
    lambda_min: float | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Record:
    """A finished result whose pairs have converged and whose λ_min is −0.001."""
    least = min([*eigenvalues, -0.001]) if lambda_min is None else lambda_min
    special = {
        "L2_strength": l2, "Train_Loss": 0.1 + l2, "Train_Reg_Loss": 0.2 + l2, "Test_Loss": 1 / 3,
        "Test_Accuracy": accuracy, "theta_norm": theta, "gradient_norm": 0.1,
        "lambda_max": max(eigenvalues, default=0.0), "lambda_min": least,
    }  # fmt: skip
    return Record(
        digest="d",
        replicate=replicate,
        l2=l2,
        label=f"{l2:.5f}",
        row={name: special.get(name, 1) for name in COLUMNS},
        eigenvalues=tuple(eigenvalues),
        residuals=tuple(residuals or [1e-5 * abs(value) for value in eigenvalues]),
        parameters={"objective.penalty": "full", "spectrum.rtol": 1e-3} | dict(parameters or {}),
        files={},
    )


def report(tmp_path: Path, records: Sequence[Record], name: str = "report") -> Drawn:
    store = Store(tmp_path / "results")
    store.root.mkdir(exist_ok=True)
    for record in records:
        store.commit(record)
    return draw(store.root, tmp_path / name)


def sentence(records: Sequence[Record], words: str) -> str:
    """The one finding with these words in it."""
    (found,) = [finding for finding in sentences(branches(records)) if words in finding]
    return found


def numbers(records: Sequence[Record]) -> dict[str, float]:
    return metrics(branches(records))


def test_a_planted_drop_is_found_in_whatever_order_the_records_come(tmp_path: Path):
    accuracies = {0.01: 97.0, 0.02: 96.0, 0.03: 75.5, 0.04: 74.0, 0.05: 76.0}
    downward = [a_record(l2, accuracy=a) for l2, a in reversed(accuracies.items())]

    drawn = report(tmp_path, downward)

    assert "λ = 0.02 and 0.03: 96.00 % → 75.50 %" in sentence(downward, "falls most")
    assert drawn.findings == sentences(branches(downward))
    found = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert found["largest_accuracy_drop"] == pytest.approx(20.5)
    assert found["largest_accuracy_drop_from_l2"] == 0.02
    assert found["largest_accuracy_drop_to_l2"] == 0.03
    assert (found["best_test_accuracy"], found["best_test_accuracy_l2"]) == (97.0, 0.01)
    assert (found["strengths"], found["replicates"], found["solutions"]) == (5, 1, 5)


def test_records_are_sorted_by_strength_within_a_replicate():
    """As text, 10 sorts before 9; the order of the files is not that of the strengths."""
    mixed = [a_record(l2, replicate=r) for r in (10, 9) for l2 in (0.3, 0.1, 0.2)]

    found = branches(mixed)

    assert [branch.replicate for branch in found] == [9, 10]
    assert all(branch.strengths.tolist() == [0.1, 0.2, 0.3] for branch in found)


def test_a_difference_between_replicates_is_not_a_drop():
    records = [a_record(l2, replicate=1, accuracy=90 - 100 * l2) for l2 in (0.01, 0.02)]
    records += [a_record(l2, replicate=2, accuracy=50 - 200 * l2) for l2 in (0.01, 0.02)]

    assert numbers(records)["largest_accuracy_drop"] == pytest.approx(2.0)
    assert "(replicate 2)" in sentence(records, "falls most")


def test_an_accuracy_that_only_rises_has_no_drop():
    records = [a_record(l2, accuracy=50 + l2) for l2 in (0.1, 0.2)]

    assert sentence(records, "falls between no two")
    assert numbers(records)["largest_accuracy_drop"] == 0.0
    assert "largest_accuracy_drop_to_l2" not in numbers(records)


@pytest.mark.parametrize("count", [1, 4, 9, 11])
def test_planted_outliers_are_counted(count: int):
    values = np.concatenate([np.linspace(9, 5, count), np.linspace(0.5, 0.4, 20 - count)])
    values[1:-1:2] *= -1  # the sign does not matter

    assert outliers(a_record(0.01, eigenvalues=values.tolist())) == count


def test_round_off_below_a_cluster_makes_no_gap():
    """1e-6 against exactly 0 is an infinite ratio, and means nothing."""
    assert outliers(a_record(0.01, eigenvalues=[*NINE, 0.002, 0.002, 1e-6, 1e-12, 0.0])) == 9
    assert outliers(a_record(0.01, eigenvalues=[0.0, 0.0, 0.0])) == 0
    assert outliers(a_record(0.01, eigenvalues=[1.0])) == 0


def test_the_strengths_with_nine_outliers_are_named():
    four = (9, 8, 7, 6, 0.5, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    records = [a_record(l2, eigenvalues=four if l2 == 0.02 else (*NINE, 0.3, 0.2, 0.1))
               for l2 in (0.01, 0.02, 0.03, 0.04)]  # fmt: skip

    text = sentence(records, "largest ratio")

    assert "k = 9 = C − 1 in 3 of 4 spectra (λ = 0.01, 0.03 to 0.04)" in text
    assert "after k = 4 (1)" in text


def test_the_convention_decides_what_is_a_minimum():
    """λ_min = −0.015 at λ = 0.01: above −2λ, below −λ."""
    values = (*NINE, 0.3, 0.2, -0.015)
    full = [a_record(0.01, eigenvalues=values)]
    half = [a_record(0.01, eigenvalues=values, parameters={"objective.penalty": "half"})]

    assert sentence(full, "below −2λ").startswith("No solution")
    assert numbers(full)["saddles"] == 0
    assert "1 of 1 solutions, whose λ_min lies below −λ" in sentence(half, "Not minima")
    assert numbers(half)["saddles"] == 1


def test_the_page_says_which_convention():
    full, half = a_record(0.01), a_record(0.02, parameters={"objective.penalty": "half"})
    about = {"objective.reference": "5e1f"}

    assert "L_eff = L_CE + λ‖θ‖² (H_eff = H + 2λ I)" in convention(branches([full]))
    assert "L_eff = L_CE + (λ/2)‖θ‖² (H_eff = H + λ I)" in convention(branches([half]))
    assert "λ‖θ − ref‖²" in convention(branches([a_record(0.01, parameters=about)]))
    assert "different objectives" in convention(branches([full, half]))
    assert "different objectives" not in convention(branches([full, a_record(0.02)]))


@pytest.mark.parametrize(
    ("least", "residual", "expected"), [(-0.03, 0.001, True), (-0.021, 0.002, False)]
)
def test_a_saddle_is_one_beyond_the_error_of_its_eigenvalue(
    least: float, residual: float, expected: bool
):
    """The bound is −0.02; an exact eigenvalue is only known to lie within the residual."""
    values, residuals = (3.0, 2.0, least), (1e-5, 1e-5, residual)

    assert saddle(a_record(0.01, eigenvalues=values, residuals=residuals)) is expected


@pytest.mark.parametrize(("column", "expected"), [(-0.05, True), (-0.0201, False), (0.1, False)])
def test_a_smallest_eigenvalue_outside_the_leading_pairs_counts(column: float, expected: bool):
    """Known to rtol·|λ_K| = 0.0002 here."""
    assert saddle(a_record(0.01, eigenvalues=(3, 0.2), lambda_min=column)) is expected


def test_the_trivial_phase_is_told_by_its_norm():
    """Which class such a network always names varies with the optimiser's noise."""
    records = [
        a_record(l2, accuracy=rate, theta=0.04)
        for l2, rate in ((0.05, 10.28), (0.06, 11.35), (0.07, 9.82))
    ]
    others = [
        a_record(0.01, accuracy=97.0, theta=50.0),
        a_record(0.02, accuracy=11.35, theta=2.0),  # as bad, by another way
    ]

    assert trivial([*others, *records]) == records
    text = sentence([*others, *records], "In the trivial phase")
    assert "3 of 5 solutions (λ = 0.05 to 0.07;" in text
    assert "9.82 to 11.35 %" in text


def test_what_has_not_converged_is_counted():
    """Two pairs miss 1e-3·|λ|, and three of the five asked for in another were not found."""
    missed = a_record(0.01, eigenvalues=(4.0, 2.0, 1.0), residuals=(0.003, 0.004, 0.002))
    short = a_record(0.02, eigenvalues=(4.0, 2.0), parameters={"spectrum.k": 5})

    text = sentence([missed, short], "relative residual")

    assert (unconverged(missed), unconverged(short)) == (2, 3)
    assert relative_residual(missed) == pytest.approx(0.002)
    assert numbers([missed, short])["unconverged_pairs"] == 5
    assert numbers([missed, short])["worst_relative_residual"] == pytest.approx(0.002)
    assert "5 eigenpairs did not converge" in text
    assert "2.0e-03, at λ = 0.01" in text


def test_round_off_is_not_held_against_a_pair():
    """As the solver has it: 32 units of round-off of |λ_1| are as good as it gets."""
    tiny = {"eigenvalues": (4.0, 1e-9), "residuals": (1e-6, 1e-6)}

    assert unconverged(a_record(0.01, **tiny)) == 0
    assert unconverged(a_record(0.01, **tiny, parameters={"runtime.dtype": "float64"})) == 1


def test_all_converged_is_said_only_when_it_is_so():
    assert sentence([a_record(0.01)], "All 12 eigenpairs converged")


def test_lambda_max_at_the_ends_is_averaged_over_replicates():
    records = [
        a_record(l2, replicate=r, eigenvalues=(r / l2, 1.0)) for r in (1, 2) for l2 in (0.1, 0.5)
    ]

    assert numbers(records)["lambda_max_at_smallest_l2"] == pytest.approx(15.0)
    assert numbers(records)["lambda_max_at_largest_l2"] == pytest.approx(3.0)


def long_branch(count: int = 200, *, at: Sequence[int] = (77, 131)) -> Branch:
    """Falls by 0.01 points a step, and by 5 after the steps named."""
    accuracy = [90 - 0.01 * i - 5 * sum(i > j for j in at) for i in range(count)]
    (branch,) = branches([a_record(i / 1000, accuracy=a) for i, a in enumerate(accuracy)])
    return branch


def test_jumps_stand_out_from_the_typical_step():
    found = jumps(long_branch())

    assert [(jump.low, jump.high) for jump in found] == [(0.077, 0.078), (0.131, 0.132)]
    assert jumps(long_branch(19, at=(7,))) == []  # too coarse a grid to tell


def test_a_long_table_keeps_its_ends_and_both_sides_of_every_jump():
    chosen = rows(long_branch())

    assert {0, 77, 78, 131, 132, 199} <= set(chosen)
    assert ROWS - 5 <= len(chosen) <= ROWS
    assert rows(long_branch(ROWS)) == list(range(ROWS))


@pytest.mark.parametrize(
    "records",
    [
        [a_record(0.0)],
        [a_record(0.02, eigenvalues=(2.0,))],
        [a_record(0.02, eigenvalues=(-2.0, -1.0))],
        [a_record(0.02, eigenvalues=())],
        [a_record(0.0), a_record(0.06, accuracy=11.35, theta=0.04)],
        [a_record(l2) for l2 in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)],
        [a_record(l2, replicate=r) for r in (1, 2, 3) for l2 in (1e-4, 1e-3, 1e-2, 0.1)],
        [a_record(0.01), a_record(0.02, parameters={"objective.penalty": "half"})],
        [a_record(0.01, parameters={"objective.reference": "5e1f"})],
    ],
    ids=[
        "zero",
        "one pair",
        "all negative",
        "no pairs",
        "two",
        "crowded",
        "replicates",
        "mixed",
        "reference",
    ],
)
def test_every_shape_of_a_sweep_gives_every_file(tmp_path: Path, records: list[Record]):
    drawn = report(tmp_path, records)

    assert tuple(path.name for path in drawn.files) == FILES
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(FILES)
    found = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert all(np.isfinite(value) for value in found.values())
    assert all("nan" not in finding for finding in drawn.findings)
    for name in ("eigenvalues", "losses", "norms"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (tmp_path / "report" / f"{name}.svg").read_bytes()


def test_the_figures_show_the_numbers(tmp_path: Path):
    """A figure that ignored its input would repeat its bytes."""
    report(tmp_path, [a_record(0.01), a_record(0.02)], "one")
    report(tmp_path, [a_record(0.01), a_record(0.02, theta=7, eigenvalues=(9, 1), accuracy=40)],
           "two")  # fmt: skip

    for name in FILES:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one != two, name


def test_the_same_results_give_the_same_bytes(tmp_path: Path):
    """In another folder, in another process, under other settings of matplotlib."""
    first = report(tmp_path, [a_record(l2, accuracy=90 - l2) for l2 in (0.01, 0.02, 0.03)], "one")
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "matplotlibrc").write_text("lines.linewidth: 9\nsavefig.dpi: 30\nfont.size: 30\n")
    script = "import sys, pathlib as p, spectra.report as r; r.draw(*map(p.Path, sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "results"), str(tmp_path / "two")],
        env=os.environ | {"MPLCONFIGDIR": str(settings), "PYTHONHASHSEED": "7"},
        check=True,
    )

    report(tmp_path, [], "three")  # once more in this process, which has drawn before

    for path in first.files:
        content = path.read_bytes()
        assert content == (tmp_path / "three" / path.name).read_bytes(), path.name
        assert content == (tmp_path / "two" / path.name).read_bytes(), path.name
        assert not re.search(rb"20\d\d-\d\d-\d\d|[Mm]atplotlib version", content), path.name


def test_neither_torch_nor_pyplot_is_imported(tmp_path: Path):
    """Nor matplotlib, before something is drawn."""
    report(tmp_path, [a_record(0.01)])
    script = (
        "import sys, pathlib as p, spectra.report as r\n"
        "assert 'matplotlib' not in sys.modules\n"
        "r.draw(*map(p.Path, sys.argv[1:]))\n"
        "assert 'matplotlib' in sys.modules\n"
        "print([m for m in ('torch', 'matplotlib.pyplot', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "results"), str(tmp_path / "again")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("content", [None, {}, {"manifest-1-0.01000.json": "{broken"}])
def test_no_results_are_refused_with_a_remedy(tmp_path: Path, content: dict[str, str] | None):
    results = tmp_path / "results"
    if content is not None:
        results.mkdir()
        for name, text in content.items():
            (results / name).write_text(text)

    with pytest.raises(UsageError, match="run `spectra sweep` first") as caught:
        draw(results, tmp_path / "report")

    assert str(results) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_the_table_of_numbers_reads_back_exactly(tmp_path: Path):
    generator = np.random.default_rng(3)
    records = [a_record(float(l2), accuracy=float(a), theta=float(t), replicate=r)
               for r in (2, 1) for l2, a, t in generator.random((5, 3))]  # fmt: skip
    report(tmp_path, records)

    with (tmp_path / "report" / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))

    assert list(table[0]) == ["replicate", *COLUMNS]
    expected = sorted(records, key=lambda record: (record.replicate, record.l2))
    assert [int(row["replicate"]) for row in table] == [1] * 5 + [2] * 5
    for row, record in zip(table, expected, strict=True):
        assert {name: float(row[name]) for name in COLUMNS} == dict(record.row)


def test_links_of_the_page_point_at_files(tmp_path: Path):
    report(tmp_path, [a_record(0.01), a_record(0.02)])
    page = (tmp_path / "report" / "summary.md").read_text()

    links = re.findall(r"\]\(([^)]+)\)", page)

    assert {f"{name}.{form}" for name in ("eigenvalues", "losses", "norms")
            for form in ("svg", "png")} <= set(links)  # fmt: skip
    assert all((tmp_path / "report" / link).is_file() for link in links)


def test_the_page_holds_a_row_a_strength_and_every_finding(tmp_path: Path):
    drawn = report(tmp_path, [a_record(l2, accuracy=80 + l2) for l2 in (0.01, 0.02, 0.03)])
    page = (tmp_path / "report" / "summary.md").read_text()

    lines = [line for line in page.splitlines() if line.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0.01", "| 0.02", "| 0.03"]
    assert len(widths) == 1
    plain = page.replace("\\", "")
    assert all(finding in plain for finding in drawn.findings)
