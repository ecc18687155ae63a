"""Products of any network against dense Hessians, Jacobians and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import oracles
from networks import NETWORKS, N, columns, dense, operator, problem
from spectra.curvature.batch_loss import Loss


def entropy(z: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy as a function of the caller's own."""
    return functional.cross_entropy(z, y)


@pytest.mark.parametrize("graph_bytes", [0, 2 << 30])
@pytest.mark.parametrize("network", NETWORKS)
def test_loss_gradient_and_products_equal_the_dense_ones(network: str, graph_bytes: int):
    """Every column, to round-off; ten examples in batches of 4, 4 and 2."""
    model, x, y = problem(network)
    loss, gradient_P, H_PP = dense(model, nn.CrossEntropyLoss(), x, y)

    hessian = operator(model, nn.CrossEntropyLoss(), (x, y), batch_size=4, graph_bytes=graph_bytes)

    assert H_PP.abs().max() > 0.1
    assert hessian.kept == (3 if graph_bytes else 0)
    torch.testing.assert_close(columns(hessian), H_PP, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hessian.gradient_P, gradient_P, rtol=1e-11, atol=1e-13)
    assert hessian.loss == pytest.approx(loss, rel=1e-13)
    assert not hessian.gradient_P.requires_grad
    assert (hessian.dim, hessian.examples, hessian.products) == (len(H_PP), N, len(H_PP))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0]).double()), "labels"),
        (nn.CrossEntropyLoss(ignore_index=1), "labels"),
        (nn.MSELoss(), "real"),
        (entropy, "labels"),
        (lambda z, y: ((z - y) ** 4).sum(1).mean(), "real"),
        (nn.L1Loss(), "real"),
    ],
    ids=["weighted", "ignored", "squares", "lambda", "quartic", "absolute"],
)
@pytest.mark.parametrize("size", [1, 3, 10])
def test_ragged_batches_have_their_right_weight_under_any_loss(loss: Loss, name: str, size: int):
    model, x, labels = problem("cnn")
    real = torch.randn(N, 3, dtype=torch.float64)
    targets = labels if name == "labels" else real
    value, gradient_P, H_PP = dense(model, loss, x, targets)

    hessian = operator(model, loss, (x, targets), batch_size=size)

    torch.testing.assert_close(columns(hessian), H_PP, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hessian.gradient_P, gradient_P, rtol=1e-11, atol=1e-13)
    assert hessian.loss == pytest.approx(value, rel=1e-13)


def test_products_are_differences_of_the_networks_own_gradient():
    """Taken by `backward()` on the network itself, moved to and fro along v."""
    model, x, y = problem("attention")
    hessian = operator(model, nn.CrossEntropyLoss(), (x, y), batch_size=3)
    v_P = torch.randn(hessian.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    start_P = torch.nn.utils.parameters_to_vector(other.parameters()).detach()

    def gradient(at_P: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(at_P, other.parameters())
        other.zero_grad()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            nn.CrossEntropyLoss()(other(x), y).backward()
        return torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])

    step = 1e-5
    difference_P = (gradient(start_P + step * v_P) - gradient(start_P - step * v_P)) / (2 * step)

    torch.testing.assert_close(hessian(v_P), difference_P, rtol=1e-5, atol=1e-7)
    assert difference_P.norm() > 0.1


@pytest.mark.parametrize("graph_bytes", [0, 2 << 30])
@pytest.mark.parametrize("network", NETWORKS)
def test_gauss_newton_equals_its_definition(network: str, graph_bytes: int):
    """Jᵀ (diag p − p pᵀ) J / N, with the Jacobian of the network alone."""
    model, x, y = problem(network)
    output, theta_P = oracles.module_output(model, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J_NCP = torch.autograd.functional.jacobian(output, theta_P)
    p_NC = torch.softmax(output(theta_P), 1)
    inner_NCC = torch.diag_embed(p_NC) - p_NC[:, :, None] * p_NC[:, None, :]
    G_PP = torch.einsum("nap,nab,nbq->pq", J_NCP, inner_NCC, J_NCP) / N
    loss, gradient_P, H_PP = dense(model, nn.CrossEntropyLoss(), x, y)

    matrix = operator(
        model,
        nn.CrossEntropyLoss(),
        (x, y),
        batch_size=4,
        gauss_newton=True,
        graph_bytes=graph_bytes,
    )

    torch.testing.assert_close(columns(matrix), G_PP, rtol=1e-10, atol=1e-12)
    assert (G_PP - H_PP).abs().max() > 1e-2
    torch.testing.assert_close(matrix.gradient_P, gradient_P, rtol=1e-11, atol=1e-13)
    assert matrix.loss == pytest.approx(loss, rel=1e-13)


def test_gauss_newton_of_squares_is_twice_the_gram_matrix_of_the_jacobian():
    model, x, _ = problem("recurrent")
    y = torch.randn(N, 3, dtype=torch.float64)
    output, theta_P = oracles.module_output(model, x)
    J_RP = torch.func.jacrev(output)(theta_P).reshape(3 * N, -1)

    matrix = operator(model, nn.MSELoss(), (x, y), batch_size=4, gauss_newton=True)

    torch.testing.assert_close(columns(matrix), 2 * J_RP.T @ J_RP / (3 * N), rtol=1e-10, atol=1e-12)
    assert not columns(operator(model, nn.L1Loss(), (x, y), gauss_newton=True)).any()


def test_a_network_that_differentiates_itself_is_taken():
    """dφ/dx by torch.func, which does not allow a graph's memory to be measured."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(torch.func.grad(lambda t: self.net(t[None])[0, 0]))(x)

    model, x = Slope(), torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.net

        def forward(self, x: Tensor) -> Tensor:
            first, _, last = self.net
            return (1 - torch.tanh(first(x)) ** 2) @ (last.weight[0] * first.weight[:, 0])[:, None]

    _, _, H_PP = dense(ByHand(), nn.MSELoss(), x, x**2)

    hessian = operator(model, nn.MSELoss(), (x, x**2), batch_size=3)

    assert hessian.kept == 0
    torch.testing.assert_close(columns(hessian), H_PP, rtol=1e-10, atol=1e-12)
