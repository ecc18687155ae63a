"""A sweep with polishing: the files are stationary, and what is told of them is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor

import oracles
from snapshots import contents
from spectra import data, pipeline, polishing
from spectra.artifacts import Store
from spectra.errors import ParameterError
from spectra.params import Params
from spectra.polish.newton import State
from spectra.progress import Silent
from spectra.tracking import NoTracker

Tiny = Callable[..., Params]
WIDTHS = (784, 8, 10)
ON = {"polish__enabled": True, "sweep__strengths": [0.01, 0.02], "train__max_epochs": 3}
ON["certificate__pairs"] = None


class Says(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.lines.append(text)


def sweep(params: Params, progress: Silent | None = None) -> pipeline.Swept:
    return pipeline.sweep(
        params, replace=False, draw=False, progress=progress or Silent(), tracker=NoTracker()
    )


def theta(folder: Path, name: str) -> Tensor:
    state = torch.load(folder / name, weights_only=True)
    return torch.cat([tensor.double().reshape(-1) for tensor in state.values()])


@pytest.fixture(scope="module")
def seen(sample_root: Path, digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The digits as a sweep in float32 sees them, to the last bit, in float64."""
    from conftest import tiny_params

    wanted = tiny_params(sample_root).data
    data.ensure(wanted, say=print)
    train = data.load(wanted).train
    inputs_ND = train.inputs(
        mean=0.1307, std=0.3081, dtype=torch.float32, device=torch.device("cpu")
    ).double()
    torch.testing.assert_close(inputs_ND, digits[0], rtol=1e-6, atol=1e-6)
    return inputs_ND, train.labels_N


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    """A finished sweep with polishing, which no test changes."""
    from conftest import tiny_params

    folder = tmp_path_factory.mktemp("polished") / "results"
    sweep(tiny_params(sample_root, artifacts__out=str(folder), **ON))
    return folder


@pytest.mark.parametrize(("key", "l2"), [("1-0.01000", 0.01), ("1-0.02000", 0.02)])
def test_what_is_told_is_true_of_the_files(
    done: Path, seen: tuple[Tensor, Tensor], key: str, l2: float
):
    loss = oracles.mean_loss(WIDTHS, "sigmoid", *seen)
    star_P = theta(done, f"model_weights-{key}.pth")
    trained_P = theta(done, f"trained_weights-{key}.pth")
    told = orjson.loads((done / f"polish-{key}.json").read_bytes())
    table = np.genfromtxt(done / "Model-1.csv", delimiter=",", names=True)
    (row,) = table[table["L2_strength"] == l2]

    def effective(theta_P: Tensor) -> float:
        return float(loss(theta_P)) + l2 * float(theta_P.square().sum())

    gradient_P = oracles.gradient(loss, star_P)
    assert told["verdict"] == "floor"
    assert told["minimum"]
    assert float((gradient_P + 2 * l2 * star_P).norm()) == pytest.approx(
        told["gradient_norm"], rel=1e-3
    )
    assert row["gradient_norm"] < 1e-5
    assert told["gradient_norm_before"] > 1e-3
    assert told["cosine"] == pytest.approx(-1, abs=1e-9)
    assert told["distance"] == pytest.approx(float((star_P - trained_P).norm()), rel=1e-6)
    assert told["loss_drop"] == pytest.approx(effective(trained_P) - effective(star_P), rel=1e-4)
    assert told["loss_drop"] > 0
    assert row["theta_norm"] == pytest.approx(float(star_P.norm()), rel=1e-6)
    assert row["Train_Loss"] == pytest.approx(float(loss(star_P)), rel=1e-6)
    values_K = np.loadtxt(done / f"Hessian-eigenvalues-{key}.csv")
    assert told["eigenvalue_1"][1] == pytest.approx(values_K[0], rel=1e-6)
    vectors_KP = np.loadtxt(done / f"Hessian-eigenvectors-{key}.csv", delimiter=",")
    image_P = oracles.forward_over_reverse(loss, star_P)(torch.from_numpy(vectors_KP[0]))
    assert float(torch.from_numpy(vectors_KP[0]) @ image_P) == pytest.approx(values_K[0], rel=1e-4)
    assert 0 < told["overlap"] <= 1 + 1e-9


def test_the_chain_goes_on_from_the_weights_as_trained(done: Path, tiny: Tiny, tmp_path: Path):
    sweep(tiny(artifacts__out=str(tmp_path), **{**ON, "polish__enabled": False}))

    for label in ("0.01000", "0.02000"):
        plain = (tmp_path / f"model_weights-1-{label}.pth").read_bytes()
        assert (done / f"trained_weights-1-{label}.pth").read_bytes() == plain


@pytest.mark.parametrize("after", [1, 3])
def test_a_kill_within_the_polishing_is_gone_on_from(
    done: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    """The state on the disk is taken up, and the end has the same bytes."""
    folder = tmp_path / "r"
    usual, left = Store.write, [after]

    def stops(self: Store, name: str, chunks: object) -> object:
        written = usual(self, name, chunks)  # type: ignore[arg-type]
        if name == "polish-state-1-0.02000.pth":
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        return written

    monkeypatch.setattr(Store, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny(artifacts__out=str(folder), **ON))
    monkeypatch.undo()
    assert (folder / "polish-state-1-0.02000.pth").exists()
    taken: list[State | None] = []
    read = polishing._read
    monkeypatch.setattr(polishing, "_read", lambda *a: taken.append(read(*a)) or taken[-1])

    assert sweep(tiny(artifacts__out=str(folder), **ON)).reused == 1

    assert [state.steps for state in taken if state] == [after]
    assert contents(folder) == contents(done)


def test_a_budget_that_does_not_reach_is_said_and_kept(tiny: Tiny, tmp_path: Path):
    says = Says()
    how = {**ON, "sweep__strengths": [0.01], "polish__max_products": 15}

    sweep(tiny(artifacts__out=str(tmp_path), **how), says)

    told = orjson.loads((tmp_path / "polish-1-0.01000.json").read_bytes())
    assert (told["verdict"], told["minimum"]) == ("budget", False)
    assert any("raise polish.max_products (now 15)" in line for line in says.lines)


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_in_float64_weights_spectrum_and_row_are_of_one_point(
    tiny: Tiny, tmp_path: Path, digits: tuple[Tensor, Tensor], dtype: str | None
):
    how = {**ON, "sweep__strengths": [0.01], "polish__dtype": dtype, "runtime__dtype": "float64"}

    (record,) = sweep(tiny(artifacts__out=str(tmp_path), **how)).records

    state = torch.load(tmp_path / "model_weights-1-0.01000.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float64}
    loss = oracles.mean_loss(WIDTHS, "sigmoid", *digits)
    star_P = theta(tmp_path, "model_weights-1-0.01000.pth")
    assert float((oracles.gradient(loss, star_P) + 0.02 * star_P).norm()) < 1e-12
    assert record.row["gradient_norm"] < 1e-12
    assert record.row["Train_Loss"] == pytest.approx(float(loss(star_P)), rel=1e-13)


def test_weights_finer_than_the_products_are_refused(tiny: Tiny, tmp_path: Path):
    """The spectrum would be of their rounding, and not of the weights beside it."""
    out = tmp_path / "r"
    how = {"artifacts__out": str(out), "polish__dtype": "float64", "data__root": str(out)}

    with pytest.raises(ParameterError, match=r"polish\.dtype: .* use runtime\.dtype=float64, or "):
        sweep(tiny(**ON, **how))

    assert not out.exists()
    polishing.check_dtypes(tiny(polish__dtype="float64"))  # of a polishing that is not done
    polishing.check_dtypes(tiny(**ON, polish__dtype="float32", runtime__dtype="float64"))


def test_a_state_of_another_task_or_in_pieces_is_not_taken(tmp_path: Path):
    path, device = tmp_path / "polish-state-1-0.01000.pth", torch.device("cpu")
    state = State(torch.arange(3.0), 0.5, 17.5, 2, 1)
    path.write_bytes(polishing._as_bytes(state, "mine"))

    taken = polishing._read(path, "mine", device)

    assert taken is not None
    assert torch.equal(taken.x_P, state.x_P)
    assert vars(taken) | {"x_P": None} == vars(state) | {"x_P": None}
    assert polishing._read(path, "another", device) is None
    path.write_bytes(path.read_bytes()[:100])
    assert polishing._read(path, "mine", device) is None
    assert polishing._read(tmp_path / "none", "mine", device) is None
