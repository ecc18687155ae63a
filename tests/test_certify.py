"""Certificates of real spectra: the file beside them, its bytes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectra import pipeline
from spectra.artifacts import Store
from spectra.curvature.certificate import Certificate
from spectra.curvature.claim import Claim
from spectra.errors import ParameterError
from spectra.mlp import Mlp
from spectra.params import Params
from spectra.progress import Silent
from spectra.tracking import NoTracker
from spectra.workbench import Workbench

Tiny = Callable[..., Params]


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep a line."""
        self.lines.append(text)


def swept(params: Params, heard: Heard | None = None):
    return pipeline.sweep(
        params, replace=False, draw=False, progress=heard or Silent(), tracker=NoTracker()
    )


def test_a_sweep_writes_a_certificate_of_every_strength(tiny: Tiny, tmp_path: Path):
    first, second = (
        swept(tiny(artifacts__out=str(tmp_path / name), sweep__strengths=[0.0, 0.01])).records
        for name in ("a", "b")
    )

    for record, again in zip(first, second, strict=True):
        name = f"certificate-{record.key}.json"
        assert name in record.files
        text = (tmp_path / "a" / name).read_bytes()
        assert text == (tmp_path / "b" / name).read_bytes()
        content = json.loads(text)
        assert content["sound"]
        assert record.row["certified"] == 1
        assert record.files == again.files
        stored = Store(tmp_path / "a").record(record.key)
        assert stored is not None
        assert [p["value"] for p in content["pairs"]] == list(stored.eigenvalues)
        assert content["objective"]["shift"] == 2 * record.l2
        assert content["environment"]["torch"] == str(torch.__version__)
        assert content["environment"]["recomputed_with"] == "autodiff"


def test_null_writes_none(tiny: Tiny, tmp_path: Path):
    params = tiny(artifacts__out=str(tmp_path), sweep__strengths=[0.0], certificate__pairs="null")

    (record,) = swept(params).records

    assert not list(tmp_path.glob("certificate-*"))
    assert record.row["certified"] == 0


def test_the_spectrum_of_changed_weights_is_not_certified(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A wrong weight between solving and certifying: said, written down, and the sweep goes on."""
    usual = pipeline.analysis.certify

    def meddled(
        bench: Workbench,
        network: Mlp,
        theta_P: Tensor,
        claim: Claim,
        **how: Any,  # noqa: ANN401
    ) -> Certificate:
        changed_P = theta_P.clone()
        changed_P[-3] += 1e-2
        return usual(bench, network, changed_P, claim, **how)

    monkeypatch.setattr(pipeline.analysis, "certify", meddled)
    heard = Heard()

    records = swept(tiny(artifacts__out=str(tmp_path)), heard).records

    assert len(records) == 3
    for record in records:
        assert record.row["certified"] == 0
        content = json.loads((tmp_path / f"certificate-{record.key}.json").read_text())
        assert not content["sound"]
        for complaint in content["complaints"]:
            assert f"{record.key}: {complaint}" in heard.lines
        assert any("weights" in complaint for complaint in content["complaints"])
        assert any("∇L_CE" in complaint for complaint in content["complaints"])


@pytest.mark.parametrize(
    ("dtype", "refused", "taken"), [("float32", 1e-6, 1e-4), ("float64", 1e-15, 1e-10)]
)
def test_a_tolerance_below_the_round_off_is_refused(
    tiny: Tiny, tmp_path: Path, dtype: str, refused: float, taken: float
):
    how = {"runtime__dtype": dtype, "sweep__strengths": [0.0]}
    with pytest.raises(ParameterError, match=r"spectrum\.rtol: 1e-.. is below .*round-off") as told:
        swept(tiny(artifacts__out=str(tmp_path / "r"), spectrum__rtol=refused, **how))

    assert "\n" not in str(told.value)
    assert ("runtime.dtype=float64" in str(told.value)) == (dtype == "float32")
    (record,) = swept(tiny(artifacts__out=str(tmp_path), spectrum__rtol=taken, **how)).records
    assert record.row["certified"] == 1


def test_autodiff_is_checked_by_the_formulas(tiny: Tiny, tmp_path: Path):
    params = tiny(
        artifacts__out=str(tmp_path), sweep__strengths=[0.0], spectrum__product="autodiff"
    )

    (record,) = swept(params).records

    content = json.loads((tmp_path / f"certificate-{record.key}.json").read_text())
    assert content["sound"]
    assert content["environment"]["recomputed_with"] == "fused"
    assert np.isfinite(content["noise"]["relative"])


@pytest.mark.parametrize("value", [-1, 1.5, "some", True, [3]])
def test_the_number_of_pairs_is_a_number_all_or_null(tiny: Tiny, value: object):
    with pytest.raises(ParameterError, match=r"^certificate\.pairs: must be a number") as told:
        tiny(certificate__pairs=value)

    assert "\n" not in str(told.value)
