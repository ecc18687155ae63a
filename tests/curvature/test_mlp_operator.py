"""The fused product against dense Hessians, and against differentiating twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from spectra import inputs
from spectra.activations import ACTIVATIONS
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import AutodiffHessian
from spectra.errors import NonFiniteError
from spectra.inputs import inputs_of
from spectra.mlp import Mlp
from spectra.objective import cross_entropy_sum

BACKGROUND = -0.4242


def problem(
    widths: tuple[int, ...], examples: int, *, sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Random weights and data in float64; sparse data are mostly background, one input wholly."""
    draw = torch.Generator().manual_seed(21)
    theta_P = 0.8 * torch.randn(Mlp(widths).dim, generator=draw, dtype=torch.float64)
    x = torch.randn(examples, widths[0], generator=draw, dtype=torch.float64).abs()
    if sparse:
        x[torch.rand(x.shape, generator=draw) < 0.8] = BACKGROUND
        x[:, 2] = BACKGROUND
    return theta_P, x, torch.randint(0, widths[-1], (examples,), generator=draw)


@pytest.fixture(params=[1, 2 * 5], ids=["chunk by chunk", "some chunks at once"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """How many chunks a network of at most five units a layer takes together."""
    monkeypatch.setattr(inputs, "_TOGETHER", request.param)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(6, 3), (6, 4, 3), (6, 4, 5, 3), (6, 3, 2, 4, 3)], ids=str)
@pytest.mark.usefixtures("narrow")
def test_products_equal_the_dense_hessian(widths: tuple[int, ...], activation: str, sparse: bool):
    """Every column, to round-off, for no to three hidden layers and ragged chunks."""
    theta_P, x, y = problem(widths, 11, sparse=sparse)
    loss = oracles.mean_loss(widths, activation, x, y)
    H_PP = oracles.dense_hessian(loss, theta_P)

    hessian = MlpHessian(Mlp(widths, activation), theta_P, x, y, chunk=4, threads=2)
    actual_PP = hessian.block(torch.eye(len(theta_P), dtype=torch.float64))

    assert H_PP.abs().max() > 0.1
    torch.testing.assert_close(actual_PP, H_PP, rtol=1e-11, atol=1e-13)
    assert hessian.loss == pytest.approx(float(loss(theta_P)), rel=1e-13)
    expected_P = oracles.gradient(loss, theta_P)
    torch.testing.assert_close(hessian.gradient_P, expected_P, rtol=1e-11, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_replayed_on_a_gpu_equal_those_on_a_cpu():
    """One after the other: none holds anything of the last, and results are not overwritten."""
    theta_P, x, y = problem((6, 4, 5, 3), 11, sparse=True)
    mlp = Mlp((6, 4, 5, 3))
    v_BP = torch.randn(4, mlp.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    replayed = MlpHessian(mlp, theta_P.cuda(), x.cuda(), y.cuda(), chunk=4)
    actual_BP = torch.stack([replayed(v_P.cuda()) for v_P in v_BP]).cpu()

    assert replayed.products == 4
    expected_BP = MlpHessian(mlp, theta_P, x, y).block(v_BP)
    torch.testing.assert_close(actual_BP, expected_BP, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gauss_newton_equals_its_definition(activation: str):
    """And is positive semi-definite, which the Hessian here is not."""
    widths = (6, 4, 5, 3)
    theta_P, x, y = problem(widths, 11, sparse=True)
    identity_PP = torch.eye(len(theta_P), dtype=torch.float64)
    G_PP = oracles.gauss_newton(widths, activation, theta_P, x)(identity_PP)
    mlp = Mlp(widths, activation)

    actual_PP = MlpHessian(mlp, theta_P, x, y, chunk=4, gauss_newton=True).block(identity_PP)
    H_PP = MlpHessian(mlp, theta_P, x, y, chunk=4).block(identity_PP)

    torch.testing.assert_close(actual_PP, G_PP, rtol=1e-11, atol=1e-13)
    assert torch.linalg.eigvalsh(actual_PP)[0] > -1e-13
    assert torch.linalg.eigvalsh(H_PP)[0] < -1e-3


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 500])
@pytest.mark.usefixtures("narrow")
def test_chunks_and_threads_only_reorder_sums(chunk: int, threads: int):
    """More threads than chunks included."""
    widths = (6, 4, 3)
    theta_P, x, y = problem(widths, 11, sparse=True)
    v_P = torch.linspace(-1, 1, len(theta_P), dtype=torch.float64)
    H_PP = oracles.dense_hessian(oracles.mean_loss(widths, "sigmoid", x, y), theta_P)

    hessian = MlpHessian(Mlp(widths), theta_P, x, y, chunk=chunk, threads=threads)

    torch.testing.assert_close(hessian(v_P), H_PP @ v_P, rtol=1e-11, atol=1e-13)
    assert hessian.products == 1
    assert torch.equal(hessian(v_P), hessian(v_P))


def exact_products(
    widths: tuple[int, ...],
    activation: str,
    point: tuple[Tensor, Tensor, Tensor],
    v_BP: Tensor,
    *,
    gauss_newton: bool,
) -> Tensor:
    """Forward over reverse, or Jᵀ (∇²_z L) J v, of the oracle's own scores and loss."""
    theta_P, x, y = point

    def scores(theta_P: Tensor) -> Tensor:
        return oracles.logits(widths, activation, theta_P, x)

    def product(v_P: Tensor) -> Tensor:
        if not gauss_newton:
            loss = oracles.mean_loss(widths, activation, x, y)
            return oracles.forward_over_reverse(loss, theta_P)(v_P)
        z_NC, back = torch.func.vjp(scores, theta_P)
        moved_NC = torch.func.jvp(scores, (theta_P,), (v_P,))[1]
        p_NC = torch.softmax(z_NC, dim=1)
        signal_NC = p_NC * (moved_NC - (p_NC * moved_NC).sum(1, keepdim=True))
        return back(signal_NC / len(x))[0]

    return torch.stack([product(v_P) for v_P in v_BP])


@pytest.mark.parametrize("gauss_newton", [False, True], ids=["Hessian", "Gauss-Newton"])
@pytest.mark.parametrize("widths", [(30, 5), (30, 20, 5), (30, 20, 16, 5)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_of_any_chunking_equal_automatic_differentiation(
    activation: str, widths: tuple[int, ...], gauss_newton: bool
):
    """In float64 to round-off, in float32 as nearly as differentiating; one input is constant."""
    theta_P, x, y = problem(widths, 67, sparse=True)
    theta_P, x[:, 5] = theta_P / 2, 1.5
    mlp = Mlp(widths, activation)
    draw = torch.Generator().manual_seed(5)
    v_BP = torch.randn(9, mlp.dim, generator=draw, dtype=torch.float64)
    how = {"gauss_newton": gauss_newton}
    expected_BP = exact_products(widths, activation, (theta_P, x, y), v_BP, **how)
    single = theta_P.float(), x.float(), y
    again_BP = exact_products(widths, activation, single, v_BP.float(), **how)

    granted = float((again_BP.double() - expected_BP).norm())
    assert expected_BP.abs().max() > 0.1
    for chunk in (1, 7, 23, 100):
        whole = MlpHessian(mlp, theta_P, x, y, chunk=chunk, threads=3, **how)
        half = MlpHessian(mlp, *single, chunk=chunk, threads=2, **how)

        torch.testing.assert_close(whole.block(v_BP), expected_BP, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(whole(v_BP[0]), expected_BP[0], rtol=1e-10, atol=1e-13)
        error = float((half.block(v_BP.float()).double() - expected_BP).norm())
        assert error <= 4 * granted + 1e-7 * float(expected_BP.norm())


def test_float32_stays_within_its_round_off(digits: tuple[Tensor, Tensor]):
    """784-128-128-10 on real digits: as near to float64 as differentiating twice is."""
    x, y = digits
    mlp = Mlp((784, 128, 128, 10))
    draw = torch.Generator().manual_seed(3)
    theta_P = 3 * mlp.initial(draw, torch.float64)
    v_P = torch.randn(mlp.dim, generator=draw, dtype=torch.float64)
    exact_P = MlpHessian(mlp, theta_P, x.double(), y, chunk=700)(v_P)

    def error(product_P: Tensor) -> float:
        return float((product_P.double() - exact_P).norm() / exact_P.norm())

    twice = AutodiffHessian(
        lambda theta, a, b: cross_entropy_sum(mlp.logits(theta, a), b),
        theta_P,
        zip(x.double().split(1000), y.split(1000), strict=True),
    )
    single = MlpHessian(mlp, theta_P.float(), x.float(), y, chunk=700, threads=2)
    single_twice = AutodiffHessian(
        lambda theta, a, b: cross_entropy_sum(mlp.logits(theta, a), b),
        theta_P.float(),
        zip(x.float().split(1000), y.split(1000), strict=True),
    )

    assert error(twice(v_P)) < 1e-13
    assert inputs_of(x.float(), chunk=700).columns.listed
    assert error(single(v_P.float())) < 2 * error(single_twice(v_P.float())) < 1e-5


def test_no_examples_and_weights_that_are_not_finite_are_refused():
    theta_P, x, y = problem((6, 4, 3), 11, sparse=False)
    with pytest.raises(ValueError, match="at least one example"):
        MlpHessian(Mlp((6, 4, 3)), theta_P, x[:0], y[:0])
    with pytest.raises(NonFiniteError):
        MlpHessian(Mlp((6, 4, 3)), theta_P * torch.inf, x, y)


@pytest.mark.parametrize("sparse", [False, True])
def test_inputs_divided_before_are_taken_as_they_are(sparse: bool):
    """The same products to the last bit; two networks may share them."""
    widths = (6, 4, 5, 3)
    theta_P, x, y = problem(widths, 11, sparse=sparse)
    divided = inputs_of(x, y, chunk=4)
    v_P = torch.linspace(-1, 1, len(theta_P), dtype=torch.float64)

    for at_P in (theta_P, theta_P.flip(0)):
        own = MlpHessian(Mlp(widths), at_P, x, y, chunk=4)
        given = MlpHessian(Mlp(widths), at_P, x, y, inputs=divided)

        assert given.columns is divided.columns
        assert torch.equal(given(v_P), own(v_P))
        assert torch.equal(given.gradient_P, own.gradient_P)
        assert given.loss == own.loss
    assert divided.columns.listed == sparse


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_products_do_not_disturb_each_other(gauss_newton: bool):
    """Room is shared by chunks and vectors of a block; alone or together, first or last."""
    widths = (6, 4, 5, 3)
    theta_P, x, y = problem(widths, 11, sparse=True)
    draw = torch.Generator().manual_seed(4)
    v_BP = torch.randn(3, len(theta_P), generator=draw, dtype=torch.float64)
    hessian = MlpHessian(Mlp(widths), theta_P, x, y, chunk=4, gauss_newton=gauss_newton)
    copy_BP = v_BP.clone()

    together_BP = hessian.block(v_BP)
    held_BP = together_BP.clone()
    alone_BP = torch.stack([hessian(v_P) for v_P in v_BP.flip(0)]).flip(0)

    assert torch.equal(together_BP, held_BP)
    assert torch.equal(v_BP, copy_BP)
    torch.testing.assert_close(alone_BP, together_BP, rtol=1e-13, atol=1e-15)
    assert hessian.products == 6


def test_theta_is_copied():
    """The operator stays that of θ, whatever an optimiser does to the tensor afterwards."""
    widths = (6, 4, 3)
    theta_P, x, y = problem(widths, 11, sparse=True)
    hessian = MlpHessian(Mlp(widths), theta_P, x, y)
    v_P = torch.ones_like(theta_P)
    before_P = hessian(v_P)

    theta_P.zero_()

    assert torch.equal(hessian(v_P), before_P)
