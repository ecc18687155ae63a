"""Files, runs and spectra of the pipeline are true.

The numbers in the files are held against plain PyTorch on the weights beside them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

import oracles
from snapshots import contents, copy
from spectra import pipeline
from spectra.artifacts import Store
from spectra.progress import Silent
from spectra.tracking import MlflowTracker
from sweeps import Result, Tiny, results_of, strengths, sweep

LABELS = ("0.00000", "0.00200", "0.01000")


@pytest.fixture(scope="module")
def test_digits() -> tuple[Tensor, Tensor]:
    """The 500 test digits of the sample, read without the package's reader."""
    import gzip

    folder = Path(__file__).parents[1] / "sample"
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 784) / 255
    return (
        torch.from_numpy((images - 0.1307) / 0.3081),
        torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64)),
    )


# ----------------------------------------------------------------------------- what is in the files


@pytest.mark.parametrize("form", ["csv", "npy", "none"])
def test_a_sweep_leaves_its_files_and_no_others(tiny: Tiny, tmp_path: Path, form: str):
    strengths = [0.0, 0.01]

    swept = sweep(tiny(artifacts__out=str(tmp_path / "r"), artifacts__eigenvectors=form,
                       sweep__strengths=strengths))  # fmt: skip

    expected = {"Model-1.csv"}.union(*(results_of(f"1-{l2:.5f}", form) for l2 in strengths))
    assert set(contents(tmp_path / "r")) == expected
    assert [record.l2 for record in swept.records] == strengths
    assert swept.reused == 0
    assert swept.drawn is None


def test_the_table_has_a_line_a_strength(done: Path):
    lines = (done / "Model-1.csv").read_text().splitlines()

    assert lines[0].startswith("L2_strength,Train_Loss,Train_Reg_Loss,Test_Loss,Test_Accuracy")
    assert [float(line.split(",")[0]) for line in lines[1:]] == [0.0, 0.002, 0.01]


@pytest.mark.parametrize("label", LABELS)
def test_the_numbers_of_a_strength_are_those_of_its_weights(
    done: Path, label: str, digits: tuple[Tensor, Tensor], test_digits: tuple[Tensor, Tensor]
):
    result = Result(done, f"1-{label}")
    theta_P = result.theta_P.requires_grad_()
    row, l2 = result.row, float(label)

    loss = result.loss(theta_P, *digits)
    accuracy = 100 * float(result.hits.double().mean())
    (gradient_P,) = torch.autograd.grad(loss, theta_P)
    theta_P = theta_P.detach()
    loss = float(loss.detach())
    assert row["Train_Loss"] == pytest.approx(loss, rel=1e-6)
    assert row["Train_Accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert row["Train_Reg_Loss"] == pytest.approx(
        loss + l2 * float(theta_P.square().sum()), rel=1e-6
    )
    assert row["theta_norm"] == pytest.approx(float(theta_P.norm()), rel=1e-9)
    assert row["gradient_norm_ce"] == pytest.approx(float(gradient_P.norm()), rel=1e-4)
    assert row["gradient_norm"] == pytest.approx(
        float((gradient_P + 2 * l2 * theta_P).norm()), rel=1e-4
    )
    test_loss = float(result.loss(theta_P, *test_digits))
    assert row["Test_Loss"] == pytest.approx(test_loss, rel=1e-6)
    assert row["Test_Accuracy"] == pytest.approx(100 * float(result.hits.double().mean()))
    assert list(result.gradients) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    np.testing.assert_allclose(
        np.concatenate(list(result.gradients.values())), gradient_P, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("label", LABELS)
def test_the_pairs_of_a_strength_are_those_of_its_weights(
    done: Path, label: str, digits: tuple[Tensor, Tensor]
):
    """Their residuals in float64, by double differentiation of an independent network."""
    result = Result(done, f"1-{label}")
    vectors_KP = np.loadtxt(done / f"Hessian-eigenvectors-1-{label}.csv", delimiter=",")
    theta_P = result.theta_P.requires_grad_()

    (gradient_P,) = torch.autograd.grad(result.loss(theta_P, *digits), theta_P, create_graph=True)
    assert vectors_KP.shape == (3, theta_P.numel())
    np.testing.assert_allclose(vectors_KP @ vectors_KP.T, np.eye(3), atol=1e-5)
    for value, vector_P in zip(result.values_K, vectors_KP, strict=True):
        v_P = torch.from_numpy(vector_P)
        (image_P,) = torch.autograd.grad(gradient_P, theta_P, v_P, retain_graph=True)
        assert float((image_P - value * v_P).norm()) <= 1.1e-3 * abs(value)
        assert float(v_P @ image_P) == pytest.approx(value, rel=1e-4)


def test_eigenvalues_are_those_of_the_dense_hessian(
    tiny: Tiny, tmp_path: Path, digits: tuple[Tensor, Tensor]
):
    """Of a network small enough for all 805 × 805 entries; the smallest one too."""
    sweep(tiny(model__hidden=[1], artifacts__out=str(tmp_path), sweep__strengths=[0.001],
               spectrum__k=5))  # fmt: skip
    result = Result(tmp_path, "1-0.00100")

    H_PP = oracles.dense_hessian(lambda theta_P: result.loss(theta_P, *digits), result.theta_P)

    exact = torch.linalg.eigvalsh(H_PP).numpy()
    leading = exact[np.argsort(-np.abs(exact))[:5]]
    np.testing.assert_allclose(result.values_K, leading, rtol=1e-4)
    assert result.row["lambda_max"] == pytest.approx(exact[-1], rel=1e-4)
    assert result.row["lambda_min"] == pytest.approx(exact[0], rel=1e-2, abs=1e-4)


def test_residuals_and_parameters_stand_in_the_manifest(done: Path, sample_root: Path):
    for record in Store(done).records():
        assert len(record.eigenvalues) == len(record.residuals) == 3
        assert record.row["worst_residual"] == pytest.approx(
            max(r / abs(v) for r, v in zip(record.residuals, record.eigenvalues, strict=True))
        )
        assert record.row["worst_residual"] <= 1e-3
        assert record.parameters["model.hidden"] == [8]
        sums = (sample_root / "sample" / "SHA256SUMS").read_bytes()
        assert record.parameters["data.digest"] == hashlib.sha256(sums).hexdigest()
        for name, facts in record.files.items():
            content = (done / name).read_bytes()
            assert facts == {
                "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
            }  # fmt: skip


def test_npy_and_csv_hold_the_same_vectors(tiny: Tiny, tmp_path: Path, done: Path):
    sweep(tiny(artifacts__out=str(tmp_path), artifacts__eigenvectors="npy",
               sweep__strengths=[0.0]))  # fmt: skip

    binary = np.load(tmp_path / "Hessian-eigenvectors-1-0.00000.npy", allow_pickle=False)
    text = np.loadtxt(done / "Hessian-eigenvectors-1-0.00000.csv", delimiter=",", dtype=np.float32)
    assert binary.tobytes() == text.tobytes()


# ----------------------------------------------------------------------------------------- tracking


def test_runs_tell_what_the_files_tell(tiny: Tiny, tmp_path: Path, database: Path):
    params = tiny(artifacts__out=str(tmp_path / "r"), artifacts__report=str(tmp_path / "p"),
                  tracking__enabled=True, tracking__log_eigenvectors=True,
                  sweep__strengths=[0.0, 0.01])  # fmt: skip

    sweep(params, draw=True, tracker=MlflowTracker(f"sqlite:///{database}", "x"))

    client = MlflowClient(f"sqlite:///{database}")
    (parent,) = strengths(database, "sweep")
    runs = sorted(strengths(database), key=lambda run: run.data.metrics["l2"])
    assert parent.data.params["train.lr"] == "0.0015"
    assert parent.data.tags["spectra.folder"] == str(tmp_path / "r")
    assert "report/summary.md" in [
        file.path for file in client.list_artifacts(parent.info.run_id, "report")
    ]
    assert [run.info.run_name for run in runs] == ["1 L2=0.00000", "1 L2=0.01000"]
    for run, key in zip(runs, ("1-0.00000", "1-0.01000"), strict=True):
        result, metrics = Result(tmp_path / "r", key), run.data.metrics
        assert metrics["train_loss"] == result.row["Train_Loss"]
        assert metrics["test_accuracy"] == result.row["Test_Accuracy"]
        assert [metrics[f"eigenvalue_{i:02d}"] for i in (1, 2, 3)] == result.values_K.tolist()
        assert run.data.params["l2"] == str(float(key[2:]))
        assert run.data.tags["spectra.version"]
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
            f"Hessian-eigenvalues-{key}.csv", f"model_weights-{key}.pth", f"manifest-{key}.json",
            f"Hessian-eigenvectors-{key}.csv", f"certificate-{key}.json",
        }  # fmt: skip
        assert metrics["certified"] == 1
        assert run.data.tags["spectra.verdict"] == "not stationary"
        vectors = (tmp_path / "r" / f"Hessian-eigenvectors-{key}.csv").read_bytes()
        digest = run.data.tags["spectra.eigenvectors.sha256"]
        assert digest == hashlib.sha256(vectors).hexdigest()
        (epoch,) = client.get_metric_history(run.info.run_id, "epoch/objective")
        assert (epoch.step, epoch.value) == (1, pytest.approx(result.row["Train_Reg_Loss"]))
    assert all(run.info.status == "FINISHED" for run in [parent, *runs])


def test_results_of_an_untracked_sweep_are_logged_later(
    tiny: Tiny, tmp_path: Path, done: Path, database: Path
):
    copy(done, tmp_path / "r")
    params = tiny(artifacts__out=str(tmp_path / "r"), tracking__enabled=True)

    swept = sweep(params, tracker=MlflowTracker(f"sqlite:///{database}", "x"))

    assert swept.reused == 3
    runs = strengths(database)
    assert len(runs) == 3
    assert all("seconds" not in run.data.metrics for run in runs)


# -------------------------------------------------------------------------------------- equal units


def with_equal_units(hidden: int, copies: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
    """A network on digits of a few units, each repeated."""
    draw = torch.Generator().manual_seed(51)
    dim = 785 * hidden + (hidden + 1) * 10
    theta_p = 0.3 * torch.randn(dim, generator=draw, dtype=torch.float64)
    widths, theta_P, _ = oracles.repeated((784, hidden, 10), theta_p, [copies])
    return widths, theta_P


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merging_equal_units_changes_no_eigenvalue(
    tiny: Tiny, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    """Of 16 units that are three; the pairs of the merged network stand, none is asked again."""
    from spectra.curvature import spectrum as module

    outcomes: list[object] = []
    usual = module.reduced_eigenpairs

    def watched(*given: object, **named: object) -> object:
        outcomes.append(usual(*given, **named))
        return outcomes[-1]

    monkeypatch.setattr(module, "reduced_eigenpairs", watched)
    widths, theta_P = with_equal_units(3, (9, 6, 1))
    weights = tmp_path / "w.pth"
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    sizes = [(16, 784), (16,), (10, 16), (10,)]
    parts = theta_P.split([16 * 784, 16, 160, 10])
    torch.save({n: p.view(s) for n, p, s in zip(names, parts, sizes, strict=True)}, weights)

    merged, whole = (
        pipeline.spectrum(
            tiny(spectrum__merge_units=merge, spectrum__k=20, runtime__dtype=dtype),
            weights=weights, l2=0.0, out=tmp_path / str(merge), progress=Silent(),
        ).found
        for merge in (True, False)
    )  # fmt: skip

    assert widths == (784, 16, 10)
    assert len(outcomes) == 1
    assert outcomes[0].vectors_KP is merged.pairs.vectors_KP
    assert merged.units == whole.units == (3,)
    np.testing.assert_allclose(merged.pairs.values_K, whole.pairs.values_K, rtol=2e-5)
    assert (merged.loss, merged.shift) == (whole.loss, whole.shift)
    assert merged.pairs.smallest.value == pytest.approx(whole.pairs.smallest.value, rel=1e-3)


def test_how_many_units_are_different_is_told(
    tiny: Tiny, tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the table and in MLflow. Training keeps equal units equal, whoever looks for them."""
    _, theta_P = with_equal_units(3, (5, 2, 1))
    monkeypatch.setattr("spectra.workbench.Workbench.initial", lambda *_: theta_P)
    how = {"runtime__dtype": "float64", "sweep__strengths": [0.0]}

    sweep(tiny(artifacts__out=str(tmp_path / "r"), tracking__enabled=True, **how),
          tracker=MlflowTracker(f"sqlite:///{database}", "x"))  # fmt: skip
    sweep(tiny(artifacts__out=str(tmp_path / "whole"), spectrum__merge_units=False, **how))

    (run,) = strengths(database)
    merged, whole = (Result(tmp_path / name, "1-0.00000") for name in ("r", "whole"))
    assert run.data.metrics["distinct_units"] == 3
    assert merged.row["distinct_units"] == whole.row["distinct_units"] == 3
    assert torch.equal(merged.theta_P, whole.theta_P)
    np.testing.assert_allclose(merged.values_K, whole.values_K, rtol=1e-5)


def test_units_that_all_differ_are_counted_too(done: Path):
    assert [Result(done, f"1-{label}").row["distinct_units"] for label in LABELS] == [8, 8, 8]


# ------------------------------------------------------------------------------------- the spectrum


def test_spectrum_finds_what_the_sweep_found(tiny: Tiny, tmp_path: Path, done: Path):
    weights = done / "model_weights-1-0.01000.pth"

    examined = pipeline.spectrum(tiny(), weights=weights, l2=None, out=tmp_path, progress=Silent())

    result = Result(done, "1-0.01000")
    assert examined.l2 == 0.01
    np.testing.assert_allclose(examined.found.pairs.values_K, result.values_K, rtol=1e-4)
    assert examined.found.objective == result.row["Train_Reg_Loss"]
    assert set(contents(tmp_path)) == {path.name for path in examined.files} == {
        "Hessian-eigenvalues-1-0.01000.csv", "Hessian-eigenvectors-1-0.01000.csv",
        "gradients-1-0.01000.csv", "gradients_eff-1-0.01000.csv", "certificate-1-0.01000.json",
    }  # fmt: skip
    lines = (tmp_path / "gradients_eff-1-0.01000.csv").read_text().splitlines()
    assert lines[0].startswith("dL_eff/dfc1.weight: ")
    effective_P = np.concatenate(
        [np.array(line.split(": ")[1].split(", "), float) for line in lines]
    )
    expected_P = np.concatenate(list(result.gradients.values())) + 0.02 * result.theta_P.numpy()
    np.testing.assert_allclose(effective_P, expected_P, atol=1e-6)


def test_an_oracle_agrees_that_the_digits_are_the_digits(digits: tuple[Tensor, Tensor]):
    """The tests above rest on inputs that did not come through the package."""
    assert digits[0].shape == (2500, 784)
    assert torch.equal(digits[0], oracles.sample_digits()[0])


def test_the_strength_of_a_result_is_known_beyond_its_rounded_name(tiny: Tiny, tmp_path: Path):
    """A sole strength of 1e-6 is called 0.00000; the manifest beside the weights tells it."""
    params = tiny(artifacts__out=str(tmp_path / "all"), sweep__strengths=[1e-6])
    sweep(params)
    weights = tmp_path / "all" / "model_weights-1-0.00000.pth"
    (tmp_path / weights.name).write_bytes(weights.read_bytes())

    known, alone = (
        pipeline.spectrum(params, weights=file, l2=None, out=tmp_path / "out", progress=Silent())
        for file in (weights, tmp_path / weights.name)
    )

    assert (known.l2, alone.l2) == (1e-6, 0.0)
