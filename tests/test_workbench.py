"""The bench: parameters become the objects of the numerics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectra import artifacts
from spectra.errors import DataError, ParameterError, WeightsError
from spectra.mlp import Mlp
from spectra.params import Params
from spectra.workbench import open_bench

Tiny = Callable[..., Params]


def save(path: Path, network: Mlp, *, scale: float = 1.0) -> Path:
    theta_P = scale * network.initial(torch.Generator().manual_seed(3), torch.float32)
    path.write_bytes(artifacts.state_dict_bytes(network.state_dict(theta_P)))
    return path


def test_data_and_network_are_as_the_parameters_say(tiny: Tiny):
    bench = open_bench(tiny(data__mean=0.5, data__std=0.25, model__activation="tanh"), print)

    assert bench.network == Mlp((784, 8, 10), "tanh")
    assert bench.train_set.inputs_ND.shape == (2500, 784)
    assert bench.test_set.inputs_ND.shape == (500, 784)
    assert bench.train_set.inputs_ND.dtype == torch.float32
    assert (bench.train_set.inputs_ND.min(), bench.train_set.inputs_ND.max()) == (-2.0, 2.0)
    assert bench.reference is None
    assert bench.penalty(0.5).reference_P is None


def test_inputs_are_divided_once(tiny: Tiny):
    """Most of a digit's pixels are listed by their non-zeros; bytes and chunks stay complete."""
    bench = open_bench(tiny(), print)
    inputs, test = bench.train_set.inputs, bench.test_set.inputs

    assert bench.train_set.inputs is inputs
    assert inputs.columns.listed
    assert sum(chunk.count for chunk in inputs.chunks) == 2500
    assert sum(chunk.count for chunk in test.chunks) == 500


def test_the_dtype_is_that_of_the_parameters(tiny: Tiny):
    bench = open_bench(tiny(runtime__dtype="float64"), print)

    assert bench.train_set.inputs_ND.dtype == torch.float64
    assert bench.initial(1).dtype == torch.float64


def test_initial_weights_follow_from_seed_and_replicate(tiny: Tiny):
    bench, again = open_bench(tiny(), print), open_bench(tiny(), print)
    other = open_bench(tiny(runtime__seed=1), print)

    assert torch.equal(bench.initial(1), again.initial(1))
    assert not torch.equal(bench.initial(1), bench.initial(2))
    assert not torch.equal(bench.initial(1), other.initial(1))


def test_generators_differ_by_replicate_purpose_and_strength(tiny: Tiny):
    bench = open_bench(tiny(), print)
    keys = [(1, "batches", 0.1), (2, "batches", 0.1), (1, "lanczos", 0.1), (1, "batches", 0.2)]

    drawn = [tuple(torch.randint(1 << 40, (3,), generator=bench.generator(*k))) for k in keys]

    assert len({tuple(int(n) for n in numbers) for numbers in drawn}) == 4


def test_a_reference_point_is_read_with_its_digest(tiny: Tiny, tmp_path: Path):
    path = save(tmp_path / "ref.pth", Mlp((784, 8, 10)))

    bench = open_bench(tiny(objective__reference=str(path), objective__penalty="half"), print)

    assert bench.reference is not None
    theta_P, digest = bench.reference
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    penalty = bench.penalty(0.5)
    assert (penalty.coefficient, penalty.shift) == (0.25, 0.5)
    assert penalty.value(theta_P) == 0.0


def test_a_reference_point_of_another_network_is_refused(tiny: Tiny, tmp_path: Path):
    path = save(tmp_path / "ref.pth", Mlp((784, 9, 10)))

    with pytest.raises(ParameterError, match=r"has widths \(784, 9, 10\), model.hidden makes"):
        open_bench(tiny(objective__reference=str(path)), print)


@pytest.mark.parametrize(
    ("widths", "words"),
    [((783, 8, 10), "takes 783 inputs, the data have 784"),
     ((784, 8, 9), "tells 9 classes apart, the data have 10")],
)  # fmt: skip
def test_weights_must_fit_the_data(tiny: Tiny, tmp_path: Path, widths: tuple[int, ...], words: str):
    path = save(tmp_path / "w.pth", Mlp(widths))

    with pytest.raises(WeightsError, match=words):
        open_bench(tiny(), print).weights(path)


def test_weights_that_are_not_finite_are_refused(tiny: Tiny, tmp_path: Path):
    path = save(tmp_path / "w.pth", Mlp((784, 8, 10)), scale=float("nan"))

    with pytest.raises(WeightsError, match="contains NaN or infinity") as caught:
        open_bench(tiny(), print).weights(path)

    assert str(path) in str(caught.value)


def test_data_that_cannot_be_had_are_said_so(tiny: Tiny, tmp_path: Path):
    missing = tiny(data__root=str(tmp_path / "data"), data__folder=str(tmp_path / "absent"))

    with pytest.raises(DataError, match="no source gave the data set 'sample'"):
        open_bench(missing, lambda _: None)


def test_parameters_name_the_device_that_auto_has_come_to(
    tiny: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
):
    """Results of one folder are of one device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert open_bench(tiny(runtime__device="auto"), print).params == tiny(runtime__device="cpu")
