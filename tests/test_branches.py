"""A branch of a small network on real digits, against the whole network written out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from spectra import artifacts, branches
from spectra.artifacts import Store
from spectra.continuation.branch import Follow
from spectra.errors import NotConvergedError, ParameterError
from spectra.mlp import Mlp
from spectra.params import Params
from spectra.workbench import Workbench, open_bench

Tiny = Callable[..., Params]
Loss = Callable[[Tensor], Tensor]


@pytest.fixture
def coalesced(tmp_path: Path) -> Callable[[], Path]:
    """Weights of 784-4-10 of which three units are nearly the same."""

    def saved() -> Path:
        mlp = Mlp((784, 4, 10))
        theta_P = mlp.initial(torch.Generator().manual_seed(1), torch.float32)
        weight, bias, leaving, _ = mlp.split(theta_P).values()
        for unit in (1, 2):
            weight[unit], bias[unit], leaving[:, unit] = weight[0], bias[0], leaving[:, 0]
        weight += 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        path = tmp_path / "model_weights-1-0.02000.pth"
        path.write_bytes(artifacts.state_dict_bytes(mlp.state_dict(theta_P)))
        return path

    return saved


def small(bench: Workbench, images: int = 100) -> Workbench:
    """The bench with a few of the digits, cut before they are prepared."""
    data = bench.train_set
    cut = type(data)(data.inputs_ND[:images], data.labels_N[:images])
    return Workbench(
        bench.params, bench.machine, cut, bench.test_set, bench.data_digest, bench.reference
    )


def follow(
    bench: Workbench, weights: Path, out: Path, *, to: float = 0.022, l2: float = 0.02
) -> branches.Followed:
    how = Follow(to=to, longest=0.001, beyond=True)
    told = branches.follow(
        bench, weights, l2=l2, how=how, out=Store(out), key="1-0.02000", max_polish=4000
    )
    return list(told)[-1]


def whole(bench: Workbench, *, c: float, reference_P: Tensor | float = 0.0) -> Loss:
    data = bench.train_set
    return oracles.mean_loss(
        (784, 4, 10),
        "sigmoid",
        data.inputs_ND.double(),
        data.labels_N,
        c=c,
        reference_P=reference_P,
    )


def written(path: Path) -> tuple[Tensor, Mlp]:
    state = torch.load(path, weights_only=True)
    assert all(tensor.dtype == torch.float64 for tensor in state.values())
    return torch.cat([tensor.reshape(-1) for tensor in state.values()]), Mlp((784, 4, 10))


def lowest_count(loss: Callable[[Tensor], Tensor], theta_P: Tensor) -> int:
    """Negative directions of the whole Hessian, written out."""
    hessian_PP = oracles.dense_hessian(loss, theta_P)
    return int((torch.linalg.eigvalsh(hessian_PP) < 0).sum())


@pytest.mark.parametrize("convention", ["full", "half"])
def test_written_points_are_stationary_for_the_whole_network(
    tiny: Tiny, coalesced: Callable[..., Path], tmp_path: Path, convention: str
):
    params = tiny(model__hidden=[4], objective__penalty=convention, runtime__dtype="float64")
    bench = small(open_bench(params, print))
    factor = 1.0 if convention == "full" else 0.5

    found = follow(bench, coalesced(), tmp_path / "out", l2=0.02 / factor, to=0.022 / factor)

    assert found.merged.widths[1] < 4, "equal units are merged"
    assert found.ended in ("target", "back")
    table = (tmp_path / "out" / "branch-1-0.02000.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == len(found.points)
    assert [row["kind"] for row in rows] == [point.kind for point in found.points]
    named = {path.stem.rsplit("1-0.02000-", 1)[1]: path for path in found.files[2:]}
    assert {"start", found.points[-1].kind} - {"step"} <= set(named)
    seen: dict[str, int] = {}
    for row, point in zip(rows, found.points, strict=True):
        assert float(row["L2_strength"]) == point.l2, "numbers read back exactly"
        seen[point.kind] = seen.get(point.kind, 0) + 1
        times = seen[point.kind]
        name = point.kind if times == 1 else f"{point.kind}-{times}"
        if point.kind == "step" or name not in named:
            continue
        theta_P, _ = written(named[name])
        c = factor * point.l2
        ce_P = oracles.gradient(whole(bench, c=0.0), theta_P)
        assert float((ce_P + 2 * c * theta_P).norm()) <= 2e-9
        cosine = torch.nn.functional.cosine_similarity(ce_P, theta_P, dim=0)
        assert float(cosine) == pytest.approx(-1.0, abs=1e-12)
        assert float(row["theta_norm"]) == pytest.approx(float(theta_P.norm()), rel=1e-12)
        value = float(whole(bench, c=c)(theta_P))
        assert float(row["Train_Reg_Loss"]) == pytest.approx(value, abs=1e-11)
    rises = np.diff([p.objective for p in found.points]) / np.diff([p.l2 for p in found.points])
    means = [(a.r + b.r) / 2 for a, b in zip(found.points, found.points[1:], strict=False)]
    np.testing.assert_allclose(rises, factor * np.array(means), rtol=1e-2)


@pytest.mark.slow
def test_negative_directions_are_those_of_the_whole_hessian(
    tiny: Tiny, coalesced: Callable[..., Path], tmp_path: Path
):
    """Those that keep units equal and, m − 1 times each, those that part them."""
    bench = small(open_bench(tiny(model__hidden=[4], runtime__dtype="float64"), print))

    found = follow(bench, coalesced(), tmp_path / "out", to=0.025)

    counts = [point.negative for point in found.points]
    assert max(counts) > 0, "otherwise nothing is compared"
    for path in found.files[2:]:
        theta_P, _ = written(path)
        kind = path.stem.rsplit("-", 1)[1]
        point = (
            found.points[-1] if kind == "last" else next(p for p in found.points if p.kind == kind)
        )
        if kind in ("start", "target", "last"):
            assert point.negative == lowest_count(whole(bench, c=point.l2), theta_P)


def test_same_command_gives_the_same_bytes(
    tiny: Tiny, coalesced: Callable[..., Path], tmp_path: Path
):
    weights = coalesced()
    for folder in ("a", "b"):
        bench = small(open_bench(tiny(model__hidden=[4]), print))
        follow(bench, weights, tmp_path / folder)

    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(names) >= 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    content = json.loads((tmp_path / "a" / "branch-1-0.02000.json").read_text())
    assert content["ended"] in ("target", "back")
    assert content["network"] == [784, 4, 10]


def test_around_a_reference_point_nothing_is_merged(
    tiny: Tiny, coalesced: Callable[..., Path], tmp_path: Path
):
    """What the penalty pulls to need not have equal units where the network has them."""
    weights = coalesced()
    mlp = Mlp((784, 4, 10))
    reference_P = 0.05 * mlp.initial(torch.Generator().manual_seed(9), torch.float32)
    around = tmp_path / "around.pth"
    around.write_bytes(artifacts.state_dict_bytes(mlp.state_dict(reference_P)))
    params = tiny(model__hidden=[4], objective__reference=str(around), runtime__dtype="float64")
    bench = small(open_bench(params, print))

    found = follow(bench, weights, tmp_path / "out", l2=0.05, to=0.051)

    assert found.merged.widths == found.network.widths == (784, 4, 10)
    theta_P, _ = written(next(path for path in found.files if path.stem.endswith("start")))
    loss = whole(bench, c=found.points[0].l2, reference_P=reference_P.double())
    assert float(oracles.gradient(loss, theta_P).norm()) <= 2e-9
    offset_P = theta_P - reference_P.double()
    assert found.points[0].r == pytest.approx(float(offset_P @ offset_P), rel=1e-12)
    assert {point.breaking for point in found.points} == {None}


def test_strength_that_is_the_target_is_refused(
    tiny: Tiny, coalesced: Callable[..., Path], tmp_path: Path
):
    bench = small(open_bench(tiny(model__hidden=[4]), print))

    with pytest.raises(ParameterError, match="must differ from the strength"):
        follow(bench, coalesced(), tmp_path, to=0.02)


def test_weights_that_cannot_be_polished_are_refused(
    tiny: Tiny, coalesced: Callable[..., Path], tmp_path: Path
):
    bench = small(open_bench(tiny(model__hidden=[4]), print))

    with pytest.raises(NotConvergedError, match="--polish-products"):
        for _ in branches.follow(
            bench, coalesced(), l2=0.02, how=Follow(to=0.03, longest=0.01), key="x",
            out=Store(tmp_path / "none"), max_polish=3,
        ):  # fmt: skip
            pass
    assert not (tmp_path / "none").exists()
