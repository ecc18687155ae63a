"""Evaluation is the direct mean over the examples, however they are divided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from clouds import DATA, MLP, START, TEST, WIDTHS, draw, examples, run
from spectra import train as module
from spectra.descent import Optimisation
from spectra.mlp import Mlp
from spectra.train import Examples, evaluate


def digits_like(count: int, seed: int, background: float = -0.4242) -> Examples:
    """Inputs of which two columns are off the background at every example, one never."""
    draw_ = draw(seed)
    x = torch.randn(count, 6, generator=draw_, dtype=torch.float64).abs() + background
    x[torch.rand(count, 6, generator=draw_) < 0.8] = background
    x[:, 2] = background
    x[:, [1, 4]] = torch.randn(count, 2, generator=draw_, dtype=torch.float64).abs() + background
    return Examples(x, torch.randint(0, 3, (count,), generator=draw_))


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 10_000])
@pytest.mark.parametrize("seldom", [False, True])
@pytest.mark.parametrize("widths", [(6, 3), WIDTHS], ids=str)
def test_evaluate_is_the_direct_mean(
    widths: tuple[int, ...], seldom: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of 4, 4 and 3 count by their examples; accuracy is in percent."""
    monkeypatch.setattr("spectra.inputs.CHUNK", chunk)
    data = digits_like(11, 5) if seldom else examples(11, 5)
    theta_P = 2 * torch.randn(Mlp(widths).dim, generator=draw(9), dtype=torch.float64)
    scores_NC = oracles.logits(widths, "sigmoid", theta_P, data.inputs_ND)

    loss, accuracy = evaluate(Mlp(widths), theta_P, data)

    assert data.inputs.columns.listed == seldom
    assert len(data.inputs.chunks) == -(-11 // chunk)
    expected = oracles.mean_loss(widths, "sigmoid", data.inputs_ND, data.labels_N)(theta_P)
    assert loss == pytest.approx(float(expected), rel=1e-13)
    pairs = zip(scores_NC, data.labels_N, strict=True)
    hits = sum(int(scores_C.argmax()) == int(label) for scores_C, label in pairs)
    assert 0 < hits < 11
    assert accuracy == pytest.approx(100 * hits / 11, rel=1e-14)


def test_evaluation_of_float32_adds_up_in_float64():
    """Ten thousand losses of log 3, as float32 rounds it: exact, which a float32 sum is not."""
    count = 10_000
    data = Examples(torch.zeros(count, 6), torch.zeros(count, dtype=torch.int64))

    loss, accuracy = evaluate(MLP, torch.zeros(MLP.dim), data)

    log_3 = torch.log(torch.tensor(3.0))
    assert loss == pytest.approx(float(log_3), rel=1e-13)
    assert float(log_3.repeat(count).sum()) / count != pytest.approx(float(log_3), rel=1e-13)
    assert accuracy == 100


def test_test_data_that_were_divided_otherwise_are_evaluated_exactly():
    """Training on sparse columns with a dense test set, and the other way round."""
    for data, test in [(digits_like(50, 5), TEST), (DATA, digits_like(30, 6))]:
        trained = run(Optimisation(max_epochs=2), data=data, test=test)

        loss = oracles.mean_loss(WIDTHS, "sigmoid", test.inputs_ND, test.labels_N)
        expected = float(loss(trained.theta_P))
        assert trained.best.test_cross_entropy == pytest.approx(expected, rel=1e-12)


def test_evaluate_leaves_no_graph(monkeypatch: pytest.MonkeyPatch):
    seen = []
    loss_sum = module.cross_entropy_sum

    def spying(scores_NC: Tensor, labels_N: Tensor, *, exact: bool) -> Tensor:
        seen.append(scores_NC)
        return loss_sum(scores_NC, labels_N, exact=exact)

    monkeypatch.setattr(module, "cross_entropy_sum", spying)

    evaluate(MLP, START.clone().requires_grad_(), DATA)

    assert [scores_NC.requires_grad for scores_NC in seen] == [False]
