"""Replicates, protocols and objectives: what each changes in a sweep, and what it leaves alone."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from snapshots import contents, touched
from spectra import pipeline
from spectra.artifacts import Store
from spectra.progress import Silent
from spectra.tracking import NoTracker
from sweeps import Result, Tiny, results_of, sweep


def test_replicates_do_not_know_of_each_other(tiny: Tiny, tmp_path: Path, done: Path):
    both, second = tmp_path / "both", tmp_path / "second"

    swept = sweep(tiny(artifacts__out=str(both), sweep__ids=[1, 2], sweep__strengths=[0.0, 0.002]))
    sweep(tiny(artifacts__out=str(second), sweep__ids=[2], sweep__strengths=[0.0, 0.002]))

    assert [(r.replicate, r.l2) for r in swept.records] == [
        (1, 0.0), (1, 0.002), (2, 0.0), (2, 0.002),
    ]  # fmt: skip
    of_second = {n: c for n, c in contents(both).items() if re.search(r"-2[-.]", n)}
    assert of_second == contents(second)
    same = "Hessian-eigenvalues-{}-0.00000.csv"
    assert (both / same.format(1)).read_bytes() == (done / same.format(1)).read_bytes()
    assert (both / same.format(2)).read_bytes() != (both / same.format(1)).read_bytes()


def test_another_replicate_joins_the_folder(tiny: Tiny, tmp_path: Path):
    one = {"artifacts__out": str(tmp_path), "sweep__strengths": [0.0]}
    sweep(tiny(**one))
    before = touched(tmp_path)

    sweep(tiny(**one, sweep__ids=[2]))

    assert {n: t for n, t in touched(tmp_path).items() if n in before} == before
    assert {record.replicate for record in Store(tmp_path).records()} == {1, 2}


def test_an_independent_strength_is_what_train_makes(tiny: Tiny, tmp_path: Path):
    params = tiny(artifacts__out=str(tmp_path / "s"), sweep__protocol="independent",
                  sweep__strengths=[0.002, 0.01])  # fmt: skip
    sweep(params)

    made = pipeline.train(params, l2=0.01, replicate=1, out=tmp_path / "t", progress=Silent(),
                          tracker=NoTracker())  # fmt: skip

    name = "model_weights-1-0.01000.pth"
    assert made.path == tmp_path / "t" / name
    assert made.path.read_bytes() == (tmp_path / "s" / name).read_bytes()


def test_a_chain_starts_where_the_last_strength_ended(tiny: Tiny, tmp_path: Path, done: Path):
    alone = tmp_path / "alone"
    sweep(tiny(artifacts__out=str(alone), sweep__strengths=[0.002]))

    chained, fresh = Result(done, "1-0.00200"), Result(alone, "1-0.00200")

    assert chained.row["Train_Loss"] < fresh.row["Train_Loss"]


def test_downward_starts_at_the_top(tiny: Tiny, tmp_path: Path):
    alone, down = tmp_path / "alone", tmp_path / "down"
    sweep(tiny(artifacts__out=str(alone), sweep__strengths=[0.01]))

    swept = sweep(tiny(artifacts__out=str(down), sweep__direction="down"))

    assert [record.l2 for record in swept.records] == [0.01, 0.002, 0.0]
    for name in results_of("1-0.01000"):
        assert (down / name).read_bytes() == (alone / name).read_bytes()
    table = np.genfromtxt(down / "Model-1.csv", delimiter=",", names=True)
    assert table["L2_strength"].tolist() == [0.01, 0.002, 0.0]


def test_half_is_full_at_half_the_strength(tiny: Tiny, tmp_path: Path):
    """(λ/2)‖θ‖² at 0.02 is λ‖θ‖² at 0.01: the same loss, and other weights than full at 0.02."""
    protocol = {"sweep__protocol": "independent", "spectrum__k": 2}
    for name, penalty, l2 in (("half", "half", 0.02), ("full", "full", 0.02)):
        sweep(tiny(artifacts__out=str(tmp_path / name), objective__penalty=penalty,
                   sweep__strengths=[l2], **protocol))  # fmt: skip
    half, full = (Result(tmp_path / name, "1-0.02000") for name in ("half", "full"))

    assert not torch.equal(half.theta_P, full.theta_P)
    assert half.theta_P.norm() > full.theta_P.norm()
    for result, c in ((half, 0.01), (full, 0.02)):
        penalty = c * float(result.theta_P.square().sum())
        assert result.row["Train_Reg_Loss"] - result.row["Train_Loss"] == pytest.approx(penalty)

    weights = tmp_path / "half" / "model_weights-1-0.02000.pth"
    for penalty, shift in (("half", 0.02), ("full", 0.04)):
        found = pipeline.spectrum(tiny(objective__penalty=penalty), weights=weights, l2=None,
                                  out=tmp_path / "s", progress=Silent())  # fmt: skip
        assert found.l2 == 0.02
        assert found.found.shift == pytest.approx(shift)


def test_a_reference_point_draws_the_weights_to_itself(tiny: Tiny, tmp_path: Path, done: Path):
    point = done / "model_weights-1-0.00200.pth"
    sweep(tiny(artifacts__out=str(tmp_path), objective__reference=str(point),
               sweep__strengths=[0.0, 5.0], train__max_epochs=3))  # fmt: skip
    reference_P = Result(done, "1-0.00200").theta_P
    free, held = Result(tmp_path, "1-0.00000"), Result(tmp_path, "1-5.00000")

    def distance(result: Result) -> float:
        return float((result.theta_P - reference_P).norm())

    assert distance(held) < 0.1 * distance(free)
    assert held.row["Train_Reg_Loss"] - held.row["Train_Loss"] == pytest.approx(
        5.0 * distance(held) ** 2, rel=1e-4
    )
    (record, _) = Store(tmp_path).records()
    assert record.parameters["objective.reference"] == (
        hashlib.sha256(point.read_bytes()).hexdigest()
    )
