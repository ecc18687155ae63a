"""Results as they stand in the JSON file and in the README."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from benchmarks import table, verify
from benchmarks.__main__ import main
from benchmarks.result import Result


def run_of(result: Result) -> dict[str, Any]:
    return {
        "machine": {"cpu": "A|B", "cores": 2, "ram_gib": 8.0, "gpu": None, "threads": 2},
        "versions": {"python": "3.11", "torch": "2.14", "pyhessian": None},
        "settings": {"k": 30, "rtol": 1e-3, "epochs": 6, "rounds": 5, "examples": 60_000},
        "networks": {"learnt": {"l2": 0.01, "theta_norm": 7.8}},
        "rows": result.rows,
        "files": [{"file": "eigenvectors, csv", "bytes": 47_800_000, "ours": {"median": 0.3},
                   "disk": {"median": 0.1}}],
        "growth": [{"of": "images N", "work": "product",
                    "points": [{"at": 1000, "ours": {"median": 0.5}, "plain": {"median": 1.0}}]}],
        "skipped": result.skipped,
    }  # fmt: skip


@pytest.fixture
def result() -> Result:
    made = Result(say=lambda _: None)
    made.add("product", "learnt", {"plain": [0.6, 0.4, 9.0], "ours": [0.2]})
    right = verify.Certificate(30, 30, 30, 1e-4, 1e-7, 1e-6, "right").as_dict()
    facts = {
        "ours": right,
        "plain": right | {"verdict": "incomplete: a leading pair was missed"},
        "recipe": right,
        "eigenthings": right | {"verdict": "wrong: 21 of 30 repeat another"},
        "pyhessian": right | {"verdict": "stopped: 4 of 30 pairs; more"},
    }
    seconds = {"recipe": 700.0, "plain": 60.0, "eigenthings": 5.0, "pyhessian": 25.0, "ours": 20.0}
    made.add(
        "top pairs", "learnt", {name: [value] for name, value in seconds.items()},
        how={"recipe": "composed"},
        certificates={name: fact | {"products": 105} for name, fact in facts.items()},
    )  # fmt: skip
    made.skip("PyHessian: not today")
    return made


def test_rows_keep_median_extremes_and_ratio(result: Result):
    row = result.rows[0]

    assert (row["median"], row["min"], row["max"], row["runs"]) == (0.6, 0.4, 9.0, 3)
    assert math.isclose(row["ratio"], 3.0)
    assert result.median("product", "learnt", "plain") == 0.6
    assert result.median("product", "trivial", "plain") is None
    assert json.loads(json.dumps(result.rows)) == result.rows


def test_tables_say_what_was_measured_composed_and_wrong(result: Result):
    text = table.render(run_of(result))

    (pairs,) = [line for line in text.splitlines() if line.startswith("| top 30 pairs")]
    cells = [cell.strip() for cell in pairs.strip("|").split("|")][1:]
    assert cells == [
        "≈ 700 s (35.0×)",
        "60.0 s (3.00×), incomplete",
        "wrong (5.00 s)",
        "stopped: 4 of 30 pairs in 25.0 s",
        "**20.0 s**",
    ]
    assert "| Hessian product, learnt | – | 600 ms (3.00×) | – | – | **200 ms** |" in text
    assert "| eigenvectors, csv | 47.8 MB | 300 ms | 100 ms | – |" in text
    assert "| 1,000 | 500 ms | 1.00 s | 2.00× |" in text
    assert "PyHessian: not today" in text
    assert "pyhessian" not in text.splitlines()[0]


def test_every_line_of_a_table_has_as_many_cells_as_its_head(result: Result):
    for block in table.render(run_of(result)).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(0.0123, "s", "12.3 ms"), (1.5, "s", "1.50 s"), (98.0, "s", "98.0 s"), (714.2, "s", "714 s"),
     (2048.0, "MB", "2.00 GB"), (572.1, "MB", "572 MB")],
)  # fmt: skip
def test_quantities_have_three_digits(value: float, unit: str, shown: str):
    assert table.quantity(value, unit) == shown


def test_tables_replace_what_stood_between_their_markers():
    text = (
        "a\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nb <!-- bench:cuda --><!-- /bench:cuda -->"
    )

    once = table.splice(text, "cpu", "new\n")

    assert once == table.splice(once, "cpu", "new")
    assert once.startswith("a\n<!-- bench:cpu -->\nnew\n<!-- /bench:cpu -->\nb <!-- bench:cuda -->")
    with pytest.raises(ValueError, match="bench:cpu"):
        table.splice("no markers", "cpu", "new")


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])

    assert "'nonsense' is none of product, gauss-newton, eigen" in capsys.readouterr().err
