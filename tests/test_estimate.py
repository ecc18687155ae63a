"""The estimate: the disk that a sweep takes, and how sizes and times are said."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spectra import artifacts, estimate, pipeline, train
from spectra.errors import StorageError
from spectra.estimate import duration, measure, size, strength_bytes
from spectra.mlp import Mlp
from spectra.params import Params
from spectra.progress import Silent
from spectra.tracking import NoTracker
from spectra.workbench import open_bench

Tiny = Callable[..., Params]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["csv", "npy", "none"])
def test_the_bytes_of_a_strength_are_those_really_written(
    tiny: Tiny, tmp_path: Path, form: str, dtype: str
):
    """Of a network large enough for what is constant not to matter."""
    params = tiny(artifacts__out=str(tmp_path), artifacts__eigenvectors=form, spectrum__k=4,
                  runtime__dtype=dtype, model__hidden=[96], sweep__strengths=[0.0],
                  spectrum__rtol=0.05)  # fmt: skip
    pipeline.sweep(params, replace=False, draw=False, progress=Silent(), tracker=NoTracker())

    written = sum(path.stat().st_size for path in tmp_path.iterdir())

    told = strength_bytes(Mlp((784, 96, 10)).dim, 4, form, dtype, tracked=False)
    assert told == pytest.approx(written, rel=0.15)


def test_the_tracker_keeps_copies():
    def told(**copies: bool) -> int:
        return strength_bytes(1000, 5, "npy", "float32", **copies)

    assert told(tracked=True) - told(tracked=False) == 4000
    assert told(tracked=True, vectors_tracked=True) - told(tracked=True) == 5 * 4000
    assert told(tracked=False, vectors_tracked=True) == told(tracked=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_takes_as_much_text_as_is_said(dtype: str):
    """Entries of a unit vector in 100,000 dimensions."""
    vector_P = np.random.default_rng(0).normal(size=100_000)
    vector_P /= np.linalg.norm(vector_P)

    (line,) = artifacts.lines_of_numbers([vector_P.astype(dtype)])

    assert len(line) / 100_000 == pytest.approx(artifacts.TEXT_BYTES[dtype], rel=0.1)


def test_costs_are_measured_and_follow_the_parameters(tiny: Tiny):
    few = measure(open_bench(tiny(train__max_epochs=1), print))
    many = measure(open_bench(tiny(train__max_epochs=1000), print))

    assert 0 < few.training_s < 10
    assert 0 < few.spectrum_s < 60
    assert many.training_s > 20 * few.training_s
    assert few.bytes == strength_bytes(6370, 3, "csv", "float32", tracked=False)


def test_an_epoch_s_cost_leaves_out_what_happens_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    """A second of dividing the inputs, before the first epoch, is not multiplied by epochs."""
    bench = open_bench(tiny(train__max_epochs=100), print)
    divide = train.inputs_of

    def slow(*arguments: object) -> object:
        time.sleep(0.25)
        return divide(*arguments)

    monkeypatch.setattr(train, "inputs_of", slow)

    began = time.monotonic()
    told = measure(bench)

    assert time.monotonic() - began > 0.5
    assert told.training_s < 20


def test_what_the_disk_holds_is_announced(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bench, said, asked = open_bench(tiny(), print), [], []
    one = strength_bytes(6370, 3, "csv", "float32", tracked=False)

    def usage(path: Path) -> object:
        asked.append(path)
        return type("Usage", (), {"free": 2 * one})

    monkeypatch.setattr(estimate.shutil, "disk_usage", usage)

    estimate.announce(bench, tmp_path / "not" / "yet", 2, 5, said.append)
    with pytest.raises(StorageError) as caught:
        estimate.announce(bench, tmp_path / "not" / "yet", 3, 5, said.append)

    assert asked == [tmp_path, tmp_path]
    assert said[0].startswith("2 strengths to do (3 of 5 are done): at most about ")
    text = str(caught.value)
    assert "3 strengths need" in text
    assert f"{size(2 * one)} are free" in text
    assert "--eigenvectors npy" in text
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"),
     (360_000, "100.0 h")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds: float, said: str):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (48_000_000, "48 MB"), (21.6e9, "21.6 GB"),
     (5e12, "5 TB")],
)  # fmt: skip
def test_sizes_are_said_in_powers_of_a_thousand(count: float, said: str):
    assert size(count) == said
