"""Products of any network against dense Hessians and finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import oracles
from spectra.curvature.batch_loss import BatchLoss, Loss
from spectra.curvature.batches import Batches
from spectra.curvature.module_operator import ModuleHessian
from spectra.errors import NonFiniteError, UsageError

N = 10


class Attention(nn.Module):
    """A transformer's layer, whose fused kernels could be differentiated only once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The value."""
        return self.head(self.layer(x.reshape(len(x), 9, 4)).mean(1))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The value."""
        return self.head(self.cell(x.reshape(len(x), 6, 6))[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": convolutional,
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.ELU(), nn.Linear(3, 3)),
    "normed": lambda: nn.Sequential(
        nn.Flatten(), weight_norm(nn.Linear(36, 2)), nn.Softplus(), nn.Linear(2, 3)
    ),
    "attention": Attention,
    "recurrent": Recurrent,
}


def entropy(z: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy as a function of the caller's own."""
    return functional.cross_entropy(z, y)


def problem(network: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A random network in float64, ten 6×6 images, and labels."""
    torch.manual_seed(41)
    model = NETWORKS[network]().double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(N, 1, 6, 6, dtype=torch.float64)
    return model, x, torch.randint(0, 3, (N,))


def operator(
    model: nn.Module, loss: Loss, data: object, *, batch_size: int | None = None, **settings: object
) -> ModuleHessian:
    return ModuleHessian(
        model,
        BatchLoss(loss),
        Batches(data, batch_size=batch_size),
        **settings,  # type: ignore[arg-type]
    )


def columns(hessian: ModuleHessian) -> Tensor:
    return hessian.block(torch.eye(hessian.dim, dtype=hessian.gradient_P.dtype))


def dense(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and Hessian of all the data as one batch."""
    output, theta_P = oracles.module_output(model, x)

    def whole(theta: Tensor) -> Tensor:
        return loss(output(theta), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        H_PP = torch.autograd.functional.hessian(whole, theta_P)
        return float(whole(theta_P)), oracles.gradient(whole, theta_P), H_PP


# ------------------------------------------------------------------------------------ identity


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


# ------------------------------------------------------------------------- blocks and passes


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


class Loops(torch.autograd.Function):
    """a² with a derivative that vmap cannot take."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor) -> Tensor:
        """The value."""
        ctx.save_for_backward(a)
        return a.square()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        """The derivative."""
        (a,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * a * slope if float(slope.detach().abs().sum()) >= 0 else slope


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        """The value."""
        return self.function(a)


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


# ---------------------------------------------------------------------- parameters of the model


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


# ------------------------------------------------------------------------------------- refusals


class Once(torch.autograd.Function):
    """a² with a derivative that forbids another, as kernels written by hand often have."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor) -> Tensor:
        """The value."""
        ctx.save_for_backward(a)
        return a.square()

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
