"""The model of an operator: what counts as its parameters, that it stays, what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from networks import Apply, N, Square, columns, dense, operator, problem
from spectra.errors import NonFiniteError, UsageError

# -------------------------------------------------------------------------- parameters of the model


@pytest.mark.parametrize("tied", ["module", "parameter"])
def test_frozen_parameters_are_left_out_and_tied_ones_counted_once(tied: str):
    """A module that occurs twice, or two whose weight is one; the model stays the same."""
    _, x, y = problem("mlp")
    first, second, third = (nn.Linear(size, 3).double() for size in (36, 3, 3))
    first.weight.requires_grad_(False)
    third.weight = second.weight
    third = second if tied == "module" else third
    model = nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), third)
    before = copy.deepcopy(model.state_dict())
    _, gradient_P, H_PP = dense(model, nn.CrossEntropyLoss(), x, y)

    hessian = operator(model, nn.CrossEntropyLoss(), (x, y), batch_size=4)

    assert hessian.dim == 3 + 9 + 3 + (0 if tied == "module" else 3)
    torch.testing.assert_close(columns(hessian), H_PP, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(hessian.gradient_P, gradient_P, rtol=1e-11, atol=1e-13)
    assert model[5].weight is model[3].weight
    assert isinstance(model[5].weight, nn.Parameter)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_parameter_that_is_not_used_has_no_curvature():
    model, x, y = problem("mlp")
    model.register_parameter("idle", nn.Parameter(torch.ones(2).double()))

    H_PP = columns(operator(model, nn.CrossEntropyLoss(), (x, y)))

    assert next(iter(model.named_parameters()))[0] == "idle"
    assert not H_PP[:2].any()
    assert H_PP[2:, 2:].abs().max() > 0.1


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_linear_has_no_curvature(gauss_newton: bool, trained: bool):
    """Also where the loss has a parameter of its own, on which the gradient depends."""
    _, x, _ = problem("mlp")
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=trained)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3).double())
    data = (x, torch.ones(N, 3, dtype=torch.float64))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return scale * (z * y).sum(1).mean()

    hessian = operator(model, loss, data, batch_size=4, gauss_newton=gauss_newton)

    assert hessian.gradient_P[-3:].tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert not columns(hessian).any()
    assert not hessian(hessian.gradient_P).any()
    assert hessian._batched


def test_the_model_is_left_as_it_was():
    model, x, y = problem("cnn")
    model[5].bias.requires_grad_(False)
    model[0].train()
    before = copy.deepcopy(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [module.training for module in model.modules()]

    hessian = operator(model, nn.CrossEntropyLoss(), (x, y), batch_size=4)
    columns(hessian)

    assert [module.training for module in model.modules()] == modes
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad
    assert [p.grad is None for p in model.parameters()] == [False] + 5 * [True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    for b, c in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(b, c)


def test_the_operator_stays_that_of_its_weights():
    model, x, y = problem("cnn")
    hessian = operator(model, nn.CrossEntropyLoss(), (x, y), graph_bytes=0)
    v_P = torch.ones(hessian.dim, dtype=torch.float64)
    before_P = hessian(v_P)

    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(1)

    assert torch.equal(hessian(v_P), before_P)


# ----------------------------------------------------------------------------------------- refusals


class Once(Square):
    """a² with a derivative that forbids another, as kernels written by hand often have."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        """The derivative."""
        (a,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * a * slope


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_an_operation_that_would_silently_lose_its_curvature_is_refused(gauss_newton: bool):
    _, x, y = problem("mlp")
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3).double(), Apply(Once.apply))

    with pytest.raises(UsageError, match="once_differentiable"):
        operator(model, nn.CrossEntropyLoss(), (x, y), gauss_newton=gauss_newton)


def test_an_operation_without_a_second_derivative_is_named():
    draw = torch.Generator().manual_seed(2)
    model = nn.EmbeddingBag(5, 3, mode="max")
    data = (torch.randint(0, 5, (6, 2), generator=draw), torch.randint(0, 3, (6,), generator=draw))

    with pytest.raises(UsageError, match=r"only once: .*_embedding_bag.* plain tensor") as caught:
        operator(model, nn.CrossEntropyLoss(), data)(torch.ones(15))
    assert "\n" not in str(caught.value)


def test_chance_is_found_out_where_no_module_tells_of_it():
    _, x, y = problem("mlp")
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 3).double(), Apply(lambda a: functional.dropout(a, 0.5))
    )

    with pytest.raises(UsageError, match=r"and then .* model.eval\(\)"):
        operator(model, nn.CrossEntropyLoss(), (x, y))


def test_a_penalty_in_the_loss_is_refused_for_it_would_be_missed():
    model, x, y = problem("mlp")

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(z, labels) + 0.1 * model[1].weight.square().sum()

    with pytest.raises(UsageError, match="adds 2c to every eigenvalue"):
        operator(model, loss, (x, y))


def test_a_loss_without_the_weights_in_it_is_refused():
    model, x, y = problem("mlp")
    with pytest.raises(UsageError, match="does not depend on the trainable parameters"):
        operator(model, lambda z, y: functional.cross_entropy(z.detach(), y), (x, y))


@pytest.mark.parametrize("data", [[], (torch.zeros(0, 36), torch.zeros(0).long())], ids=["", "0"])
def test_no_examples_are_refused(data: object):
    model, *_ = problem("mlp")
    for given in (data, DataLoader([], batch_size=2)):  # type: ignore[var-annotated]
        with pytest.raises(UsageError, match="at least one example"):
            operator(model.float(), nn.CrossEntropyLoss(), given)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float):
    model, x, y = problem("cnn")
    x[7] = bad

    with pytest.raises(NonFiniteError, match=r"NaN in the data, or try model.double\(\)"):
        operator(model, nn.CrossEntropyLoss(), (x, y), batch_size=4)
