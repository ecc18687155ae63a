"""The contenders do the same work, and rows say what came of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import oracles
from benchmarks import ours, plain, recipe
from benchmarks.contender import Contender, MatVec, Pairs
from benchmarks.contenders import CONTENDERS, by_name
from benchmarks.files import files
from benchmarks.result import Result
from benchmarks.rows import gauss_newton, product, top_pairs
from benchmarks.threads import _TRIALS
from benchmarks.workload import CHAINS, Digits, Problem, Size, problems
from spectra import plan
from spectra.mlp import Mlp


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
    expected_P = oracles.gauss_newton(widths, "sigmoid", theta_P, x)(v_P.double()).float()
    said: list[str] = []
    result = Result(said.append)

    for contender in able:
        assert contender.gauss_newton is not None
        actual_P = contender.gauss_newton(problem)(v_P)
        torch.testing.assert_close(actual_P, expected_P, rtol=1e-3, atol=1e-5)
    wrong = replace(by_name("ours"), name="wrong", gauss_newton=ours.operator)  # the Hessian's
    gauss_newton(result, [*able, wrong], problem)

    assert {c.name for c in able} >= {"plain", "ours"}
    assert {row["contender"] for row in result.rows} == {c.name for c in able} | {"wrong"}
    assert len([line for line in said if "is not plain PyTorch's" in line]) == 1
    assert result.skipped[0].startswith("wrong: its Gauss-Newton product is not plain PyTorch's")


def test_a_product_that_cannot_be_made_is_told_of_and_a_wrong_one_too(problem: Problem):
    """By name, and the others are timed."""

    def unable(_: Problem) -> MatVec:
        raise RuntimeError("no such device\nand more")

    broken = replace(by_name("plain"), name="broken", operator=unable)
    wrong = replace(
        by_name("plain"), name="wrong", operator=partial(ours.operator, gauss_newton=True)
    )
    result = Result(say=lambda _: None)

    product(result, [plain.CONTENDER, broken, wrong, ours.CONTENDER], problem)

    assert {row["contender"] for row in result.rows} == {"plain", "wrong", "ours"}
    assert {row["work"] for row in result.rows} == {"set-up", "product"}
    assert result.skipped[0] == "broken, product: RuntimeError: no such device"
    assert result.skipped[1].startswith("wrong: its product is wrong, relative error")
    assert len(result.skipped) == 2


def test_files_are_timed_beside_their_bytes(problem: Problem, tmp_path: Path):
    """Every kind that a sweep writes, and nothing is left behind."""
    result = Result(say=lambda _: None)

    files(result, problem, tmp_path / "scratch")

    sizes = {kind["file"]: kind["bytes"] for kind in result.files}
    numbers = problem.size.k * problem.mlp.dim
    assert list(sizes) == [
        "eigenvectors, csv",
        "eigenvectors, npy",
        "gradient, csv",
        "weights, pth",
    ]
    assert 8 * numbers < sizes["eigenvectors, csv"] < 16 * numbers
    assert sizes["eigenvectors, npy"] == 4 * numbers + 128
    assert all(kind["ours"]["median"] > 0 < kind["disk"]["median"] for kind in result.files)
    assert [kind["file"] for kind in result.files if "savetxt" in kind] == ["eigenvectors, csv"]
    assert not list((tmp_path / "scratch").iterdir())


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
