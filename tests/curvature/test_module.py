"""The two functions for any network: which product they choose, and what comes out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import oracles
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.module import eigenpairs_of, hessian_of, named
from spectra.curvature.module_operator import ModuleHessian
from spectra.errors import UsageError

N = 13


def images() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(61)
    x = torch.randn(N, 1, 5, 5, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (N,), generator=draw)


def cnn() -> nn.Module:
    torch.manual_seed(62)
    layers = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*layers).double()


def mlp(activation: str = "gelu") -> nn.Module:
    torch.manual_seed(63)
    act = oracles.MODULES[activation]()
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4), act, nn.Linear(4, 3)).double()
    for p in model.parameters():
        p.data *= 3
    return model


def entropy(z: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy as a function of the caller's own."""
    return functional.cross_entropy(z, y)


def dense(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    output, theta_P = oracles.module_output(model, x)
    return oracles.dense_hessian(lambda theta: loss(output(theta), y), theta_P)


def sorted_pairs(H_PP: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(H_PP.numpy())
    order = np.argsort(-np.abs(values))[:k]
    return values[order], vectors[:, order].T


@pytest.mark.parametrize("make", [cnn, mlp])
@pytest.mark.parametrize("kind", ["tensors", "batches", "loader"])
def test_eigenpairs_are_those_of_the_dense_hessian(make: Callable[[], nn.Module], kind: str):
    """Of a small CNN and an MLP, ragged batches included; the smallest eigenvalue too."""
    x, y = images()
    model = make()
    H_PP = dense(model, functional.cross_entropy, x, y)
    expected_K, vectors_KP = sorted_pairs(H_PP, 6)
    data: dict[str, object] = {
        "tensors": (x, y),
        "batches": list(zip(x.split(4), y.split(4), strict=True)),
        "loader": DataLoader(TensorDataset(x, y), batch_size=5),
    }

    pairs = eigenpairs_of(model, nn.CrossEntropyLoss(), data[kind], k=6, rtol=1e-9)

    assert pairs.converged_K.all()
    np.testing.assert_allclose(pairs.values_K, expected_K, rtol=1e-8)
    overlaps_K = np.abs((pairs.vectors_KP * vectors_KP).sum(1))
    np.testing.assert_allclose(overlaps_K, 1, rtol=1e-8)
    assert pairs.smallest.value == pytest.approx(float(torch.linalg.eigvalsh(H_PP)[0]), rel=1e-6)
    parts = named(model, torch.from_numpy(pairs.vectors_KP[0]))
    assert {name: part.shape for name, part in parts.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert torch.cat([part.flatten() for part in parts.values()]).numpy() == pytest.approx(
        pairs.vectors_KP[0]
    )


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("activation", oracles.MODULES)
def test_the_fused_product_is_chosen_where_it_applies_and_is_the_same(
    activation: str, gauss_newton: bool
):
    x, y = images()
    model = mlp(activation)
    loss = nn.CrossEntropyLoss()

    fused = hessian_of(model, loss, (x, y), gauss_newton=gauss_newton)
    by_name = hessian_of(
        model, loss, (x, y), product="fused", batch_size=4, gauss_newton=gauss_newton
    )
    twice = hessian_of(model, loss, (x, y), product="autodiff", gauss_newton=gauss_newton)

    assert isinstance(fused, MlpHessian)
    assert isinstance(by_name, MlpHessian)
    assert isinstance(twice, ModuleHessian)
    v_BP = torch.randn(4, twice.dim, dtype=torch.float64)
    expected_BP = twice.block(v_BP)
    assert expected_BP.abs().max() > 0.1
    torch.testing.assert_close(fused.block(v_BP), expected_BP, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_name(v_BP[0]), expected_BP[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fused.gradient_P, twice.gradient_P, rtol=1e-10, atol=1e-12)
    assert fused.loss == pytest.approx(twice.loss, rel=1e-12)
    assert (fused.dim, fused.examples) == (twice.dim, twice.examples)


@pytest.mark.parametrize("kind", ["batches", "loader"])
def test_the_fused_product_takes_batches_too(kind: str):
    """Put together, the last smaller one included; of a loader both passes are compared."""
    x, y = images()
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    data = loader if kind == "loader" else [(x[:3], y[:3]), (x[3:], y[3:])]

    fused = hessian_of(mlp(), nn.CrossEntropyLoss(), data)
    twice = hessian_of(mlp(), nn.CrossEntropyLoss(), data, product="autodiff")

    assert isinstance(fused, MlpHessian)
    assert fused.examples == len(y)
    v_BP = torch.randn(2, fused.dim, dtype=torch.float64)
    torch.testing.assert_close(fused(v_BP), twice(v_BP), rtol=1e-10, atol=1e-12)


def test_a_loader_that_draws_anew_is_not_put_together():
    class Drawn(Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(1, 5, 5, dtype=torch.float64), torch.tensor(i % 3)

    for product in ("auto", "fused"):
        with pytest.raises(UsageError, match="is not what it was in the first pass"):
            hessian_of(mlp(), nn.CrossEntropyLoss(), DataLoader(Drawn()), product=product)


def test_a_sum_of_cross_entropies_is_averaged_by_both_products():
    x, y = images()
    loss = nn.CrossEntropyLoss(reduction="sum")

    fused = hessian_of(mlp(), loss, (x, y))
    twice = hessian_of(mlp(), loss, (x, y), product="autodiff", batch_size=4)

    assert isinstance(fused, MlpHessian)
    expected = float(functional.cross_entropy(mlp()(x), y).detach())
    assert fused.loss == pytest.approx(expected, rel=1e-12)
    assert twice.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "loss", "memory"),
    [
        (cnn, nn.CrossEntropyLoss(), 1 << 20),
        (mlp, nn.CrossEntropyLoss(weight=torch.ones(3).double()), 1 << 20),
        (mlp, nn.CrossEntropyLoss(), 1000),
        (mlp, nn.CrossEntropyLoss(), 0),
        (mlp, entropy, 1 << 20),
    ],
)
def test_the_general_product_is_chosen_elsewhere(
    make: Callable[[], nn.Module], loss: Callable[..., Tensor], memory: int
):
    x, y = images()
    assert 1000 < x.nbytes < 1 << 20
    data = DataLoader(TensorDataset(x, y), batch_size=4)

    hessian = hessian_of(make(), loss, data, graph_bytes=memory)

    assert isinstance(hessian, ModuleHessian)
    v_P = torch.linspace(-1, 1, hessian.dim, dtype=torch.float64)
    expected_P = dense(make(), functional.cross_entropy, x, y) @ v_P
    torch.testing.assert_close(hessian(v_P), expected_P, rtol=1e-10, atol=1e-12)
    with pytest.raises(UsageError, match=r"fused product does not apply: .*product='auto'"):
        hessian_of(make(), loss, data, product="fused", graph_bytes=memory)


def with_equal_units() -> nn.Module:
    """Twenty hidden units, four of them different."""
    few = nn.utils.parameters_to_vector(mlp("sigmoid").parameters()).detach()
    _, theta_P, _ = oracles.repeated((25, 4, 3), few, [(9, 6, 4, 1)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 20), nn.Sigmoid(), nn.Linear(20, 3)).double()
    nn.utils.vector_to_parameters(theta_P, model.parameters())
    return model


@pytest.mark.parametrize("ends", [True, False])
def test_equal_units_are_merged_for_the_pairs(ends: bool):
    """Their Hessian is that of the whole network, copies of repeated eigenvalues included."""
    x, y = images()
    model = with_equal_units()
    told: list[int] = []
    expected_K, _ = sorted_pairs(dense(model, functional.cross_entropy, x, y), 12)

    merged, whole, other = (
        eigenpairs_of(model, nn.CrossEntropyLoss(), (x, y), k=12, rtol=1e-9, ends=ends, **how)
        for how in ({"on_product": told.append}, {"merge_units": False}, {"product": "autodiff"})
    )

    assert (np.abs(np.diff(expected_K)) < 1e-12).sum() >= 3
    for pairs in (merged, whole, other):
        assert pairs.converged_K.all()
        np.testing.assert_allclose(pairs.values_K, expected_K, rtol=1e-8)
    np.testing.assert_allclose(merged.vectors_KP @ merged.vectors_KP.T, np.eye(12), atol=1e-10)
    assert merged.vectors_KP.tobytes() != whole.vectors_KP.tobytes()
    assert told[-1] == merged.products


def test_equal_units_are_not_merged_for_the_gauss_newton_matrix():
    x, y = images()
    model = with_equal_units()
    theta_P = nn.utils.parameters_to_vector(model.parameters()).detach()
    product = oracles.gauss_newton((25, 20, 3), "sigmoid", theta_P, x.flatten(1))
    expected_K, _ = sorted_pairs(product(torch.eye(len(theta_P), dtype=torch.float64)), 5)

    pairs = eigenpairs_of(model, nn.CrossEntropyLoss(), (x, y), k=5, rtol=1e-9, gauss_newton=True)

    np.testing.assert_allclose(pairs.values_K, expected_K, rtol=1e-8)


def test_a_regression_has_the_hessian_of_its_mean_over_elements():
    x, _ = images()
    y = torch.randn(N, 3, dtype=torch.float64)
    model = cnn()
    H_PP = dense(model, lambda z, t: ((z - t) ** 2).mean(), x, y)

    by_class = hessian_of(model, nn.MSELoss(), (x, y), batch_size=6)
    by_hand = hessian_of(
        model, lambda z, t: ((z - t) ** 2).sum(), (x, y), reduction="sum", batch_size=6
    )

    identity_PP = torch.eye(len(H_PP), dtype=torch.float64)
    torch.testing.assert_close(by_class.block(identity_PP), H_PP, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_hand.block(identity_PP), 3 * H_PP, rtol=1e-10, atol=1e-12)


def test_the_same_generator_gives_the_same_bits():
    x, y = images()
    first, second = (eigenpairs_of(cnn(), nn.CrossEntropyLoss(), (x, y), k=3) for _ in range(2))
    other = eigenpairs_of(
        cnn(), nn.CrossEntropyLoss(), (x, y), k=3, generator=torch.Generator().manual_seed(5)
    )

    assert np.array_equal(first.vectors_KP, second.vectors_KP)
    assert not np.array_equal(first.vectors_KP, other.vectors_KP)
    np.testing.assert_allclose(first.values_K, other.values_K, rtol=1e-5)


def test_a_spent_budget_is_told_and_not_raised():
    x, y = images()

    pairs = eigenpairs_of(cnn(), nn.CrossEntropyLoss(), (x, y), k=6, rtol=1e-12, max_products=8)

    assert not pairs.converged_K.all()
    assert len(pairs.values_K) == 6


def test_arguments_that_do_not_exist_are_programming_mistakes():
    x, y = images()
    loss = nn.CrossEntropyLoss()

    with pytest.raises(ValueError, match=r"product must be .* got 'hand'"):
        hessian_of(cnn(), loss, (x, y), product="hand")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k=77 .* must be in 1\.\.76"):
        eigenpairs_of(cnn(), loss, (x, y), k=77)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        hessian_of(mlp(), loss, (x, y), batch_size=0)
