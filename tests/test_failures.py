"""Strengths that fail: what stands in their place, and that a sweep outlives them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from mlflow.tracking import MlflowClient

from snapshots import contents
from spectra import artifacts, failures, pipeline, report
from spectra.artifacts import Store
from spectra.errors import DivergedError, NotConvergedError, NumericalError, UsageError
from spectra.failures import Failure
from spectra.params import Params
from spectra.tracking import FAILURE, KIND, MlflowTracker
from sweeps import sweep

Tiny = Callable[..., Params]


@pytest.fixture
def diverges(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Have training diverge at some strengths; returns where each training started, as norms."""
    usual = pipeline.solve.optimise

    def plant(*strengths: float) -> list[float]:
        starts: list[float] = []

        def optimise(bench: object, given: list, **named: object) -> list:
            outcomes = usual(bench, given, **named)
            starts.extend(float(start_P.norm()) for _, _, start_P in given)
            return [
                DivergedError("planted") if l2 in strengths else outcome
                for (_, l2, _), outcome in zip(given, outcomes, strict=True)
            ]

        monkeypatch.setattr(pipeline.solve, "optimise", optimise)
        return starts

    return plant


@pytest.fixture
def spectrum_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have the spectrum at a strength fail."""
    usual = pipeline.analysis.analyse

    def plant(l2: float) -> None:
        def analyse(bench: object, *given: object, **named: object) -> object:
            if named["penalty"].l2 == l2:
                raise NotConvergedError("planted")
            return usual(bench, *given, **named)

        monkeypatch.setattr(pipeline.analysis, "analyse", analyse)

    return plant


def test_a_failure_is_read_as_it_was_written(tmp_path: Path):
    store = Store(tmp_path)
    failure = Failure("d", 3, 0.25, "0.25000", "because\tof λ")

    failures.put(store, failure)

    assert failures.found(store) == [failure]
    assert not failure.trained
    failures.forget(store, failure.key)
    failures.forget(store, failure.key)
    assert failures.found(store) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"digest": 1}', b"\xff", b"null",
     b'{"digest":"d","replicate":"1","l2":0.0,"label":"0.00000","reason":"","files":{}}',
     b'{"digest":"d","replicate":1,"l2":null,"label":"0.00000","reason":"","files":{}}',
     b'{"digest":"d","replicate":1,"l2":0.0,"label":"0.00000","reason":"","files":[]}',
     b'{"digest":"d","replicate":1,"l2":0.0,"label":"0.00000","reason":"","files":{"a":0}}'],
)  # fmt: skip
def test_a_damaged_failure_is_none(tmp_path: Path, content: bytes):
    (tmp_path / "failed-1-0.00000.json").write_bytes(content)

    assert failures.found(Store(tmp_path)) == []


def test_a_failure_whose_weights_are_not_those_is_none(tmp_path: Path):
    """A chain would go on from them."""
    store = Store(tmp_path)
    name = artifacts.weights_name("1-0.00000")
    files = {name: store.write(name, [b"weights"])}
    failures.put(store, Failure("d", 1, 0.0, "0.00000", "", files))
    assert [failure.trained for failure in failures.found(store)] == [True]

    (tmp_path / name).write_bytes(b"weighed")

    assert failures.found(store) == []


def test_a_rate_that_diverges_everywhere_says_so_and_leaves_no_results(tiny: Tiny, tmp_path: Path):
    swept = sweep(tiny(artifacts__out=str(tmp_path), train__lr=1e38), draw=True)

    assert swept.records == ()
    assert swept.drawn is None
    assert [failure.l2 for failure in swept.failed] == [0.0, 0.002, 0.01]
    assert all("lower train.lr, now 1e+38" in failure.reason for failure in swept.failed)
    assert {path.name for path in tmp_path.iterdir()} == {
        "Model-1.csv", *(f"failed-1-{l2}.json" for l2 in ("0.00000", "0.00200", "0.01000"))
    }  # fmt: skip
    with pytest.raises(NumericalError, match=r"3 of 3 strengths failed \(1-0\.00000, ") as caught:
        pipeline.complain(swept)
    assert caught.value.exit_code == 4


def test_the_chain_goes_on_from_the_last_solution(
    tiny: Tiny, tmp_path: Path, diverges: Callable[..., list[float]]
):
    starts = diverges(0.002)
    swept = sweep(tiny(artifacts__out=str(tmp_path)))

    assert [record.l2 for record in swept.records] == [0.0, 0.01]
    state = torch.load(tmp_path / "model_weights-1-0.00000.pth", weights_only=True)
    solution = float(torch.cat([t.reshape(-1) for t in state.values()]).norm())
    assert starts[1:] == [solution, solution]
    assert not list(tmp_path.glob("*1-0.00200.[cpn]*"))
    assert len((tmp_path / "Model-1.csv").read_text().splitlines()) == 3


def test_what_diverges_first_starts_from_the_initial_weights(
    tiny: Tiny, tmp_path: Path, diverges: Callable[..., list[float]]
):
    starts = diverges(0.0)
    sweep(tiny(artifacts__out=str(tmp_path)))

    assert starts[0] == starts[1] != starts[2]


@pytest.mark.parametrize("stack", [1, 2])
def test_a_resumed_sweep_ends_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, diverges: Callable[..., list[float]], stack: int
):
    """The strength after the failure is lost; it is trained again from the one before it."""
    diverges(0.002)
    params = tiny(artifacts__out=str(tmp_path), sweep__ids=[1, 2], train__stack=stack)
    sweep(params)
    before = contents(tmp_path)
    (tmp_path / "manifest-1-0.01000.json").unlink()

    swept = sweep(params)

    assert swept.reused == 5
    assert contents(tmp_path) == before


def test_a_failure_is_not_tried_again_until_it_is_forgotten(
    tiny: Tiny, tmp_path: Path, diverges: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    params = tiny(artifacts__out=str(tmp_path))
    diverges(0.01)
    sweep(params)
    monkeypatch.undo()

    again = sweep(params)
    assert (again.reused, len(again.failed)) == (3, 1)

    failures.forget(Store(tmp_path), "1-0.01000")
    assert len(sweep(params).records) == 3


def test_failures_of_other_parameters_are_forgotten(
    tiny: Tiny, tmp_path: Path, diverges: Callable[..., list[float]]
):
    diverges(0.0, 0.002, 0.01)
    sweep(tiny(artifacts__out=str(tmp_path)))
    diverges()
    swept = sweep(tiny(artifacts__out=str(tmp_path), train__lr=0.002))

    assert (swept.reused, len(swept.records)) == (0, 3)
    assert not list(tmp_path.glob("failed-*"))


def test_pairs_that_do_not_converge_are_a_failure_with_weights(tiny: Tiny, tmp_path: Path):
    swept = sweep(tiny(artifacts__out=str(tmp_path), spectrum__max_products=4))

    assert len(swept.failed) == 3
    assert all(failure.trained for failure in swept.failed)
    assert "of 3 eigenpairs of 1-0.00000 missed rtol=0.001 after" in swept.failed[0].reason
    assert "raise spectrum.max_products (now 4)" in swept.failed[0].reason
    assert (tmp_path / "Hessian-eigenvalues-1-0.00000.csv").exists()
    assert Store(tmp_path).records() == []


def test_a_spectrum_that_fails_does_not_break_the_chain(
    tiny: Tiny, tmp_path: Path, spectrum_fails: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Its weights are those that the next strength starts from, now and when it is resumed."""
    whole, params = tmp_path / "whole", tiny(artifacts__out=str(tmp_path / "r"))
    sweep(tiny(artifacts__out=str(whole)))
    spectrum_fails(0.002)
    sweep(params)
    rest = {n: b for n, b in contents(whole).items() if "0.00200" not in n and "Model" not in n}
    assert rest.items() <= contents(tmp_path / "r").items()

    (tmp_path / "r" / "manifest-1-0.01000.json").unlink()
    sweep(params)
    assert rest.items() <= contents(tmp_path / "r").items()

    monkeypatch.undo()
    failures.forget(Store(tmp_path / "r"), "1-0.00200")
    sweep(params)
    assert contents(tmp_path / "r") == contents(whole)


def test_what_is_under_way_is_finished_when_a_strength_fails(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usual, second = pipeline.analysis.analyse, threading.Event()

    def first_fails(bench: object, *given: object, **named: object) -> object:
        if named["penalty"].l2 == 0.0:
            assert second.wait(60)
            raise NotConvergedError("planted")
        second.set()
        return usual(bench, *given, **named)

    monkeypatch.setattr(pipeline.analysis, "analyse", first_fails)
    swept = sweep(tiny(artifacts__out=str(tmp_path), runtime__threads=2))

    assert [record.l2 for record in swept.records] == [0.002, 0.01]


def test_a_failure_is_a_failed_run_with_its_reason_once(
    tiny: Tiny, tmp_path: Path, database: Path, diverges: Callable[..., list[float]]
):
    uri = f"sqlite:///{database}"
    params = tiny(artifacts__out=str(tmp_path / "r"))
    diverges(0.002)
    for _ in range(2):
        sweep(params, tracker=MlflowTracker(uri, "e"))

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e").experiment_id
    children = client.search_runs([experiment], f"tags.`{KIND}` = 'strength'")
    told = {run.data.metrics["l2"]: run for run in children}
    assert len(children) == 3
    assert {l2: run.info.status for l2, run in told.items()} == {
        0.0: "FINISHED", 0.002: "FAILED", 0.01: "FINISHED"
    }  # fmt: skip
    assert told[0.002].data.tags[FAILURE] == "planted"
    (parent,) = client.search_runs([experiment], f"tags.`{KIND}` = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["failed"] == 1


def test_the_report_names_what_has_no_result(
    tiny: Tiny, tmp_path: Path, diverges: Callable[..., list[float]]
):
    diverges(0.002)
    sweep(tiny(artifacts__out=str(tmp_path)))
    drawn = report.draw(tmp_path, tmp_path / "report")

    assert "Without a result: 1 strengths (1-0.00200). planted" in drawn.findings
    assert "1-0.00200" in (tmp_path / "report" / "summary.md").read_text()


def test_a_report_of_failures_alone_is_refused(tmp_path: Path):
    failures.put(Store(tmp_path), Failure("d", 1, 0.0, "0.00000", "planted"))

    with pytest.raises(UsageError, match="no finished results"):
        report.draw(tmp_path, tmp_path / "report")


def test_the_failure_file_is_plain_json(tmp_path: Path):
    failures.put(Store(tmp_path), Failure("d", 1, 0.5, "0.50000", "why"))

    assert orjson.loads((tmp_path / "failed-1-0.50000.json").read_bytes()) == {
        "digest": "d", "replicate": 1, "l2": 0.5, "label": "0.50000", "reason": "why", "files": {},
    }  # fmt: skip
