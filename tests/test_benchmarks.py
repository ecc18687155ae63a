"""The benchmark's own arithmetic: turns, medians, tables and, above all, the judge."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from benchmarks import ours, plain, recipe, table, verify
from benchmarks.__main__ import main
from benchmarks.contender import Contender, Pairs
from benchmarks.contenders import CONTENDERS, by_name
from benchmarks.result import Result
from benchmarks.rows import gauss_newton, top_pairs
from benchmarks.threads import _TRIALS
from benchmarks.timing import Spread, interleave, paced_ratios, ratios, rotated
from benchmarks.workload import CHAINS, Digits, Problem, Size, problems
from spectra import plan
from spectra.mlp import Mlp

SPECTRUM = np.array([4.0, 3.0, 3.0, -2.5, 1.0, 0.9, *np.linspace(0.1, -0.1, 34)])
WANTED = SPECTRUM[:5]


def refuse(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


@pytest.fixture
def planted() -> tuple[Tensor, Tensor]:
    """A symmetric matrix of known spectrum, λ = 3 twice, and its eigenvectors as rows."""
    generator = torch.Generator().manual_seed(3)
    random_PP = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    q_PP = torch.linalg.qr(random_PP)[0]
    return q_PP @ torch.diag(torch.from_numpy(SPECTRUM)) @ q_PP.t(), q_PP.t()


def judged(
    planted: tuple[Tensor, Tensor],
    vectors_KP: Tensor,
    values_K: verify.Floats = WANTED,
    *,
    stopped: bool = False,
) -> verify.Certificate:
    H_PP, _ = planted
    images_KP = verify.images(lambda v: H_PP @ v, vectors_KP)
    return verify.certify(
        values_K, vectors_KP, images_KP, wanted_K=WANTED, rtol=1e-3, stopped=stopped
    )


# ----------------------------------------------------------------------------------- timing


def test_who_begins_changes_from_round_to_round():
    names = ["a", "b", "c"]

    assert [rotated(names, turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(names, turn)) == names for turn in range(4))


def test_a_round_runs_everyone_and_the_next_begins_one_further():
    order: list[str] = []

    def action(name: str) -> dict[str, float]:
        order.append(name)
        return {"total": float(len(order))}

    times = interleave(
        {name: (lambda n=name: action(n)) for name in "abc"},
        rounds=2, budget_s=60, failed=refuse,
    )  # fmt: skip

    assert "".join(order) == "abcbca"
    assert times["a"] == {"total": [1.0, 6.0]}


def test_who_has_used_up_the_budget_sits_out(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.accumulate(itertools.chain([0.0], itertools.cycle([10.0, 0.0, 1.0, 0.0])))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    actions = {"slow": lambda: {"total": 10.0}, "fast": lambda: {"total": 1.0}}

    times = interleave(actions, rounds=2, budget_s=15.0, failed=refuse)

    assert len(times["slow"]["total"]) == 1
    assert len(times["fast"]["total"]) == 2


def test_one_that_fails_is_told_of_and_does_not_stop_the_others():
    told: list[str] = []

    def fails() -> dict[str, float]:
        raise RuntimeError("no")

    times = interleave(
        {"broken": fails, "well": lambda: {"total": 1.0}},
        rounds=3, budget_s=60, failed=lambda name, error: told.append(f"{name}: {error}"),
    )  # fmt: skip

    assert told == ["broken: no"]
    assert times == {"well": {"total": [1.0, 1.0, 1.0]}}


def test_one_sets_the_pace():
    """It runs between all others, and they are compared with what it took beside them."""
    order: list[str] = []
    speed = iter(range(1, 100))

    def action(name: str) -> dict[str, float]:
        order.append(name)
        return {"total": (10.0 if name == "b" else 1.0) * next(speed)}

    times = interleave(
        {name: (lambda n=name: action(n)) for name in "abp"},
        rounds=2, budget_s=60, failed=refuse, pace="p",
    )  # fmt: skip

    assert "".join(order) == "papbpbpap"
    assert times["p"]["total"] == [1, 3, 5, 7, 9]
    assert paced_ratios(times, "total") == {"a": 1.0, "b": 10.0}


def test_whoever_fails_the_others_have_their_times():
    def fails() -> dict[str, float]:
        raise RuntimeError("no")

    def well() -> dict[str, float]:
        return {"total": 1.0}

    how = {"rounds": 2, "budget_s": 60, "failed": lambda *_: None, "pace": "p"}

    assert interleave({"a": well, "p": fails}, **how) == {"a": {"total": [1.0, 1.0]}}
    assert "total" in interleave({"a": fails, "p": well}, **how)["p"]
    assert interleave({"p": well}, **how)["p"] == {"total": [1.0]}


def test_median_extremes_and_ratios():
    assert Spread.of([3.0, 1.0, 100.0]) == Spread(3.0, 1.0, 100.0, 3)
    assert ratios({"ours": 2.0, "plain": 5.0}, "ours") == {"ours": 1.0, "plain": 2.5}
    assert ratios({"plain": 5.0}, "ours") == {}


# ---------------------------------------------------------------------------------- the judge


def test_right_pairs_are_right(planted: tuple[Tensor, Tensor]):
    certificate = judged(planted, planted[1][:5])

    assert certificate.right
    assert (certificate.within, certificate.distinct) == (5, 5)
    assert certificate.worst_residual < 1e-12


def test_length_and_sign_of_a_vector_do_not_matter(planted: tuple[Tensor, Tensor]):
    assert judged(planted, -7 * planted[1][:5]).right


def test_a_repeated_pair_is_found_although_its_residual_is_perfect(
    planted: tuple[Tensor, Tensor],
):
    certificate = judged(planted, planted[1][[0, 1, 1, 3, 4]])

    assert certificate.within == 5
    assert certificate.distinct == 4
    assert certificate.verdict == "wrong: 1 of 5 repeat another"


def test_a_wrong_vector_is_found_although_its_value_is_right(planted: tuple[Tensor, Tensor]):
    vectors_KP = planted[1][:5].clone()
    vectors_KP[3] += 0.01 * planted[1][20]

    certificate = judged(planted, vectors_KP)

    assert certificate.verdict == "wrong: 1 residuals above 0.001"
    assert certificate.worst_residual == pytest.approx(0.01, rel=0.1)


def test_a_wrong_value_is_found_although_its_vector_is_right(planted: tuple[Tensor, Tensor]):
    values_K = WANTED * np.array([1, 1, 1, 1.01, 1])

    certificate = judged(planted, planted[1][:5], values_K)

    assert not certificate.right
    assert certificate.value_error == pytest.approx(0.01)


def test_a_missed_copy_of_a_repeated_eigenvalue_is_found(planted: tuple[Tensor, Tensor]):
    """Five perfect, different pairs that are not the five leading ones."""
    chosen = [0, 1, 3, 4, 5]

    certificate = judged(planted, planted[1][chosen], SPECTRUM[chosen])

    assert (certificate.within, certificate.distinct) == (5, 5)
    assert certificate.verdict.startswith("incomplete: a leading pair was missed, 3 ")


def test_one_that_was_stopped_says_how_far_it_came(planted: tuple[Tensor, Tensor]):
    some = judged(planted, planted[1][:2], WANTED[:2], stopped=True)
    none = judged(planted, planted[1][:0], WANTED[:0], stopped=True)

    assert some.verdict == "stopped: 2 of 5 pairs"
    assert none.verdict.startswith("stopped")
    assert judged(planted, planted[1][:2], WANTED[:2]).verdict == "wrong: 3 missing"


def test_the_reference_is_what_all_found_together(planted: tuple[Tensor, Tensor]):
    """One missed λ = 4, another a copy of λ = 3, a third brought rough copies and noise."""
    H_PP, vectors_PP = planted
    noise_KP = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [
        vectors_PP[[1, 2, 3]],
        vectors_PP[[0, 1, 3, 4]],
        vectors_PP[[0, 4]] + 0.01 * vectors_PP[[7, 8]],
        noise_KP,
    ]

    found = verify.reference([(part, part @ H_PP) for part in parts], 5)

    np.testing.assert_allclose(found, WANTED, rtol=1e-10)


# ----------------------------------------------------------------------- contenders and rows


@pytest.fixture
def problem() -> Problem:
    """A small network on 150 real digits."""
    inputs_ND, labels_N = oracles.sample_digits()
    pixels_ND = inputs_ND.float().mul(0.3081).add(0.1307).mul(255).round().to(torch.uint8)
    digits = Digits.of(pixels_ND[:150], labels_N[:150], torch.device("cpu"))
    mlp = Mlp((784, 6, 5, 10))
    theta_P = 3 * mlp.initial(torch.Generator().manual_seed(1), torch.float32)
    size = Size(k=3, rounds=1, epochs=1)
    return Problem("tiny", mlp, theta_P, 0.01, digits, digits.first(50), 1, size)


def here() -> list[Contender]:
    return [contender for contender in CONTENDERS if contender.missing is None]


@pytest.mark.parametrize("name", ["recipe", "plain", "ours"])
def test_products_agree_with_the_judge(name: str, problem: Problem):
    v_P = torch.randn(problem.mlp.dim, generator=torch.Generator().manual_seed(2))

    actual = by_name(name).operator(problem)(v_P)

    expected = ours.judge(problem, dtype=torch.float64)(v_P.double()).float()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_gauss_newton_products_are_those_of_the_jacobian(problem: Problem):
    """By all that have them; and one of another matrix is told of."""
    able = [c for c in here() if c.gauss_newton]
    widths, x = problem.mlp.widths, problem.train.inputs_ND.double()
    theta_P = problem.theta_P.double()
    v_P = torch.randn(problem.mlp.dim, generator=torch.Generator().manual_seed(1))
    J_NCP = torch.func.jacrev(lambda theta: oracles.logits(widths, "sigmoid", theta, x))(theta_P)
    p_NC = torch.softmax(oracles.logits(widths, "sigmoid", theta_P, x), dim=1)
    change_NC = J_NCP @ v_P.double()
    curved_NC = p_NC * (change_NC - (p_NC * change_NC).sum(1, keepdim=True)) / len(x)
    expected_P = torch.einsum("ncp,nc->p", J_NCP, curved_NC).float()
    said: list[str] = []
    result = Result(said.append)

    for contender in able:
        assert contender.gauss_newton is not None
        actual_P = contender.gauss_newton(problem)(v_P)
        torch.testing.assert_close(actual_P, expected_P, rtol=1e-3, atol=1e-5)
    wrong = replace(by_name("recipe"), gauss_newton=ours.operator)  # the Hessian's
    gauss_newton(result, [*able, wrong], problem)

    assert {c.name for c in able} >= {"plain", "ours"}
    assert {row["contender"] for row in result.rows} == {c.name for c in able} | {"recipe"}
    assert len([line for line in said if "is not plain PyTorch's" in line]) == 1
    assert result.skipped[0].startswith("recipe: its Gauss-Newton product is not plain PyTorch's")


def test_the_module_is_the_network(problem: Problem):
    scores_NC = problem.module()(problem.train.inputs_ND)

    expected_NC = problem.mlp.logits(problem.theta_P, problem.train.inputs_ND)
    torch.testing.assert_close(scores_NC, expected_NC)


@pytest.mark.parametrize("contender", [recipe, plain, ours])
def test_an_epoch_is_its_steps_and_more(contender: ModuleType, problem: Problem):
    before_P = problem.theta_P.clone()

    seconds = contender.epoch(problem)

    assert seconds["steps"] < seconds["epoch"]
    assert torch.equal(problem.theta_P, before_P)


def test_a_stack_s_epoch_is_one_epoch_of_all_its_members(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
):
    """From the last member's report of the first epoch to its report of the second."""
    clock = itertools.count(1)
    monkeypatch.setattr(ours, "now", lambda _: float(next(clock)) * 10 / 3)

    assert ours.stack_epoch(problem, 3) == pytest.approx(10)


def test_networks_are_kept_until_the_numerics_change(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trained = []

    def train(asked: Problem, *chain: Sequence[float]) -> Tensor:
        trained.append((asked.name, len(*chain) if chain else 1))
        return torch.full_like(asked.theta_P, len(trained))

    def made() -> list[float]:
        found = problems((problem.train, problem.test), threads=1, size=problem.size,
                         kept=tmp_path, names=["learnt", "trivial"])  # fmt: skip
        return [float(found[name].theta_P[0]) for name in ("learnt", "trivial")]

    monkeypatch.setattr(ours, "trained", train)
    monkeypatch.setattr(ours, "led", train)
    assert made() == made() == [1, 2]

    monkeypatch.setattr(plan, "code_digest", lambda: "another")
    assert made() == made() == [3, 4]
    assert trained == [("learnt", 1), ("trivial", len(CHAINS["trivial"]))] * 2


def test_a_network_is_led_from_strength_to_strength(problem: Problem):
    """Each training begins where the one before has ended."""
    single_P = ours.led(problem, [0.01])

    led_P = ours.led(problem, [0.01, 0.02])

    again = replace(problem, theta_P=single_P)
    assert torch.equal(led_P, ours.led(again, [0.02]))
    assert not torch.equal(led_P, ours.led(problem, [0.02]))


def test_an_epoch_takes_the_faster_number_of_threads(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
):
    """By the median of trials in turns: one that something else slowed down decides nothing."""
    asked: list[int] = []

    def timed(_: Problem, threads: int) -> dict[str, float]:
        asked.append(threads)
        epoch = 9.0 if len(asked) == 2 else {1: 3.0, 2: 2.0}[threads]
        return {"steps": epoch - 0.5, "epoch": epoch}

    monkeypatch.setattr(ours._threads, "_best", {})
    monkeypatch.setattr(ours, "_timed_epoch", timed)

    assert ours.epoch(replace(problem, threads=2)) == {"steps": 1.5, "epoch": 2.0}
    assert asked == [1, 2] * _TRIALS + [2]


def test_rows_of_pairs_carry_their_certificates(problem: Problem):
    """Ours and `eigsh` are right, one that returns a pair three times is not."""

    def repeating(problem: Problem, k: int, rtol: float) -> Pairs:
        found = ours.leading(problem, k, rtol)
        return Pairs(found.values_K[[0] * k], found.vectors_KP[[0] * k], found.products)

    liar = Contender("liar", "liar", operator=ours.operator, leading=repeating)
    result = Result(say=lambda _: None)

    top_pairs(result, [plain.CONTENDER, liar, ours.CONTENDER], problem)

    verdicts = {
        row["contender"]: row["certificate"]["verdict"] for row in result.rows if row["certificate"]
    }
    assert verdicts["ours"] == verdicts["plain"] == "right"
    assert verdicts["liar"].startswith("wrong: 2 of 3 repeat another")


def test_one_that_is_not_installed_says_so_in_a_line():
    absent = Contender("x", "X", operator=ours.operator, leading=None, package="no_such_package")

    assert absent.missing == "X: the package 'no_such_package' is not installed"
    assert by_name("ours").missing is None
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
    assert {contender.name for contender in here()} >= {"plain", "ours"}


# ------------------------------------------------------------------------------------- tables


def run_of(result: Result) -> dict[str, Any]:
    return {
        "machine": {"cpu": "A|B", "cores": 2, "ram_gib": 8.0, "gpu": None, "threads": 2},
        "versions": {"python": "3.11", "torch": "2.14", "pyhessian": None},
        "settings": {"k": 30, "rtol": 1e-3, "epochs": 6, "rounds": 5, "examples": 60_000},
        "networks": {"learnt": {"l2": 0.01, "theta_norm": 7.8}},
        "rows": result.rows,
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
