"""Blocks and passes: at once or one by one, from memory or a loader, graphs kept or made anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from networks import NETWORKS, Apply, N, Square, columns, dense, operator, problem
from spectra.errors import UsageError


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_block_is_its_single_products(network: str, gauss_newton: bool):
    model, x, y = problem(network)
    hessian = operator(
        model, nn.CrossEntropyLoss(), (x, y), batch_size=4, gauss_newton=gauss_newton
    )
    v_BP = torch.randn(5, hessian.dim, dtype=torch.float64)

    single_BP = torch.stack([hessian(v_P) for v_P in v_BP])

    torch.testing.assert_close(hessian.block(v_BP), single_BP, rtol=1e-11, atol=1e-13)
    assert hessian.products == 10


class Loops(Square):
    """a² with a derivative that vmap cannot take."""

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        """The derivative."""
        (a,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * a * slope if float(slope.detach().abs().sum()) >= 0 else slope


def test_a_block_that_vmap_cannot_take_is_computed_one_by_one():
    _, x, y = problem("mlp")
    affine = [nn.Linear(36, 3).double(), nn.Linear(3, 3).double()]
    ours = nn.Sequential(nn.Flatten(), affine[0], Apply(Loops.apply), affine[1])
    theirs = nn.Sequential(nn.Flatten(), affine[0], Apply(torch.square), affine[1])
    _, _, H_PP = dense(theirs, nn.CrossEntropyLoss(), x, y)

    hessian = operator(ours, nn.CrossEntropyLoss(), (x, y), batch_size=4)
    actual_PP = columns(hessian)

    assert not hessian._batched
    torch.testing.assert_close(actual_PP, H_PP, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_memory_and_loader_give_the_same_bits(kind: str):
    """Whether graphs are kept or made anew; also in float32 and inside no_grad."""
    model, x, y = problem("cnn")
    model, x = model.float(), x.float()
    data = {
        "list": list(zip(x.split(4), y.split(4), strict=True)),
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
    }[kind]
    loss = nn.CrossEntropyLoss()
    v_P = torch.randn(operator(model, loss, (x, y)).dim)

    memory = operator(model, loss, (x, y), batch_size=4)
    with torch.no_grad():
        other = operator(model, loss, data)
        product_P = other(v_P)

    assert (memory.kept, other.kept) == (3, 3 if kind == "list" else 0)
    assert torch.equal(product_P, memory(v_P))
    assert (other.loss, other.examples) == (memory.loss, N)
    assert torch.equal(other.gradient_P, memory.gradient_P)
    assert product_P.dtype == torch.float32


def test_as_many_graphs_are_kept_as_there_is_memory_for():
    """A bound between two and three batches keeps two, and the products stay the same."""
    model, x, y = problem("cnn")
    loss = nn.CrossEntropyLoss()
    whole = operator(model, loss, (x, y), batch_size=4)
    v_P = torch.ones(whole.dim, dtype=torch.float64)
    kept = {}
    for kilobytes in range(1, 200):
        hessian = operator(model, loss, (x, y), batch_size=4, graph_bytes=1024 * kilobytes)
        kept.setdefault(hessian.kept, hessian)
        if hessian.kept == 3:
            break

    assert set(kept) == {0, 1, 2, 3}
    assert all(torch.equal(hessian(v_P), whole(v_P)) for hessian in kept.values())


def test_the_memory_for_graphs_is_not_that_of_the_data():
    """Ten examples of 80 kB: what is kept besides them is a few numbers each."""
    model, x = nn.Linear(10_000, 2).double(), torch.ones(N, 10_000, dtype=torch.float64)
    y = torch.arange(N) % 2

    hessian = operator(model, nn.CrossEntropyLoss(), (x, y), batch_size=4, graph_bytes=10_000)

    assert hessian.kept == 3


def test_a_loader_that_changes_between_products_is_found_out():
    model, x, y = problem("cnn")

    class Drifting:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            return iter([(x + (self.passes == 3), y)])

    hessian = operator(model, nn.CrossEntropyLoss(), Drifting())
    v_P = torch.ones(hessian.dim, dtype=torch.float64)
    hessian(v_P)

    with pytest.raises(UsageError, match="batch 1 is not what it was"):
        hessian(v_P)


def test_inputs_may_be_what_forward_names():
    """Batches of mappings and tuples, as tokenisers give them."""
    model, x, y = problem("mlp")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, pixels: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"scores": self.inner(pixels * scale)}

    scale = torch.tensor(0.5, dtype=torch.float64)
    _, _, H_PP = dense(model, nn.CrossEntropyLoss(), x / 2, y)
    data = [({"pixels": x[:7], "scale": scale}, y[:7]), ((x[7:], scale), {"labels": y[7:]})]

    def loss(output: dict[str, Tensor], targets: Tensor | dict[str, Tensor]) -> Tensor:
        labels = targets["labels"] if isinstance(targets, dict) else targets
        return functional.cross_entropy(output["scores"], labels)

    torch.testing.assert_close(columns(operator(Two(), loss, data)), H_PP, rtol=1e-11, atol=1e-13)
    with pytest.raises(UsageError, match="returns a dict"):
        operator(Two(), loss, data, gauss_newton=True)
