"""The pipeline on the shipped digits: what is on the disk is true, resumable and repeatable.

The numbers in the files are held against plain PyTorch on the weights beside them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

import oracles
from spectra import artifacts, estimate, pipeline
from spectra.artifacts import Store
from spectra.errors import (
    ParameterError,
    StorageError,
    UsageError,
)
from spectra.params import Params
from spectra.pipeline import Swept
from spectra.progress import Silent
from spectra.tracking import KIND, MlflowTracker, NoTracker, Tracker

Tiny = Callable[..., Params]
LABELS = ("0.00000", "0.00200", "0.01000")


def sweep(
    params: Params, *, replace: bool = False, draw: bool = False, tracker: Tracker | None = None
) -> Swept:
    return pipeline.sweep(
        params, replace=replace, draw=draw, progress=Silent(), tracker=tracker or NoTracker()
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def touched(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: a rewrite shows even where the bytes are the same."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def results_of(key: str, form: str = "csv") -> set[str]:
    names = {
        f"gradients-{key}.csv", f"Hessian-eigenvalues-{key}.csv", f"model_weights-{key}.pth",
        f"history-{key}.csv", f"certificate-{key}.json", f"manifest-{key}.json",
    }  # fmt: skip
    return names | ({f"Hessian-eigenvectors-{key}.{form}"} if form != "none" else set())


class Result:
    """One strength as its files tell it, and as plain PyTorch tells it from the weights."""

    def __init__(self, folder: Path, key: str) -> None:
        self.state = torch.load(folder / f"model_weights-{key}.pth", weights_only=True)
        table = np.genfromtxt(folder / f"Model-{key[0]}.csv", delimiter=",", names=True, ndmin=1)
        (self.row,) = table[table["L2_strength"] == float(key[2:])]
        self.values_K = np.loadtxt(folder / f"Hessian-eigenvalues-{key}.csv", ndmin=1)
        self.gradients = {
            name.removeprefix("dL/d"): np.array(numbers.split(", "), float)
            for name, numbers in (
                line.split(": ")
                for line in (folder / f"gradients-{key}.csv").read_text().splitlines()
            )
        }

    @property
    def theta_P(self) -> Tensor:  # noqa: N802
        """The weights as one vector in float64."""
        return torch.cat([tensor.double().reshape(-1) for tensor in self.state.values()])

    def loss(self, theta_P: Tensor, inputs_ND: Tensor, labels_N: Tensor) -> Tensor:
        """The mean cross-entropy of a sigmoid network, in the words of `torch.nn`."""
        tensors, start = [], 0
        for tensor in self.state.values():
            tensors.append(theta_P[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
        hidden = torch.sigmoid(torch.nn.functional.linear(inputs_ND, *tensors[:2]))
        for weight, bias in zip(tensors[2:-2:2], tensors[3:-2:2], strict=True):
            hidden = torch.sigmoid(torch.nn.functional.linear(hidden, weight, bias))
        scores = torch.nn.functional.linear(hidden, *tensors[-2:])
        self.hits = scores.argmax(1) == labels_N
        return torch.nn.functional.cross_entropy(scores, labels_N)


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


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    """A finished sweep of three strengths, which no test changes."""
    from conftest import tiny_params

    folder = tmp_path_factory.mktemp("sweep") / "results"
    sweep(tiny_params(sample_root, artifacts__out=str(folder)))
    return folder


# --------------------------------------------------------------------------- what is in the files


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


# ----------------------------------------------------------------------- repeating and resuming


def test_another_folder_gets_the_same_bytes(tiny: Tiny, tmp_path: Path, done: Path):
    sweep(tiny(artifacts__out=str(tmp_path / "elsewhere")))

    assert contents(tmp_path / "elsewhere") == contents(done)


def test_nothing_in_the_folder_tells_a_time_or_a_place(done: Path):
    for name, content in contents(done).items():
        text = content.decode("latin1")
        assert str(done.parent) not in text, name
        assert not re.search(r"20\d\d-[01]\d-[0-3]\d", text), name
        if name.endswith((".json", "Model-1.csv")):
            assert not re.search("seconds|duration|timestamp|run_id", text), name


def test_a_second_run_does_nothing(tiny: Tiny, tmp_path: Path, database: Path):
    params = tiny(artifacts__out=str(tmp_path / "r"), tracking__enabled=True)
    tracker = MlflowTracker(f"sqlite:///{database}", "x")
    sweep(params, tracker=tracker)
    before, runs = touched(tmp_path / "r"), [run.to_dictionary() for run in strengths(database)]

    swept = sweep(params, tracker=MlflowTracker(f"sqlite:///{database}", "x"))

    assert swept.reused == 3
    after = touched(tmp_path / "r")
    assert {n for n in before if before[n] != after[n]} <= {"Model-1.csv"}
    assert [run.to_dictionary() for run in strengths(database)] == runs
    assert len(strengths(database, "sweep")) == 1


def strengths(database: Path, kind: str = "strength") -> list:
    client = MlflowClient(f"sqlite:///{database}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`{KIND}` = '{kind}'")


@pytest.mark.parametrize(
    "lost",
    ["manifest-1-0.00200.json", "model_weights-1-0.00200.pth", "Hessian-eigenvalues-1-0.01000.csv",
     "manifest-1-0.00000.json", "Model-1.csv"],
)  # fmt: skip
def test_what_is_lost_comes_back_as_it_was(tiny: Tiny, tmp_path: Path, done: Path, lost: str):
    folder = tmp_path / "r"
    copy(done, folder)
    (folder / lost).unlink()

    swept = sweep(tiny(artifacts__out=str(folder)))

    assert swept.reused == (3 if lost == "Model-1.csv" else 2)
    assert contents(folder) == contents(done)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for name, content in contents(source).items():
        (target / name).write_bytes(content)


def test_a_damaged_weights_file_is_noticed_and_replaced(tiny: Tiny, tmp_path: Path, done: Path):
    folder = tmp_path / "r"
    copy(done, folder)
    weights = folder / "model_weights-1-0.00200.pth"
    damaged = bytearray(weights.read_bytes())
    damaged[2000] ^= 1
    weights.write_bytes(damaged)

    assert sweep(tiny(artifacts__out=str(folder))).reused == 2
    assert contents(folder) == contents(done)


def test_a_grid_that_goes_on_reuses_its_beginning(tiny: Tiny, tmp_path: Path, done: Path):
    folder = tmp_path / "r"
    sweep(tiny(artifacts__out=str(folder), sweep__strengths=[0.0, 0.002]))
    before = touched(folder)

    assert sweep(tiny(artifacts__out=str(folder))).reused == 2

    after = touched(folder)
    assert {n for n in before if before[n] != after[n]} == {"Model-1.csv"}
    assert contents(folder) == contents(done)


def test_a_finer_grid_with_longer_labels_does_not_lose_its_way(tiny: Tiny, tmp_path: Path):
    """With 1e-6 in the grid, 0 is 0.000000: what 0.00000 holds is of another grid."""
    folder, fresh = tmp_path / "r", tmp_path / "fresh"
    sweep(tiny(artifacts__out=str(folder), sweep__strengths=[0.0]))
    finer = {"sweep__strengths": [0.0, 1e-6]}

    with pytest.raises(UsageError, match="another grid of strengths"):
        sweep(tiny(artifacts__out=str(folder), **finer))
    sweep(tiny(artifacts__out=str(folder), **finer), replace=True)

    sweep(tiny(artifacts__out=str(fresh), **finer))
    assert contents(folder) == contents(fresh)


# --------------------------------------------------------------------- results of something else


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train__lr": 0.5}, "train.lr is 0.5, theirs 0.0015"),
        ({"objective__penalty": "half"}, "objective.penalty is half, theirs full"),
        ({"sweep__strengths": [0.0, 0.002]}, "another grid of strengths"),
        ({"train__lr": 0.5, "train__patience": 1, "spectrum__k": 2, "spectrum__rtol": 0.5},
         " and 1 more"),
        ({"runtime__seed": 5}, "runtime.seed is 5, theirs 0"),
    ],
)  # fmt: skip
def test_other_parameters_are_refused_and_nothing_is_touched(
    tiny: Tiny, done: Path, change: Mapping[str, object], words: str
):
    before = contents(done), touched(done)

    with pytest.raises(UsageError) as caught:
        sweep(tiny(artifacts__out=str(done), **change))

    text = str(caught.value)
    assert words in text
    assert "choose another folder with --out, or delete them with --replace" in text
    assert "\n" not in text
    assert (contents(done), touched(done)) == before


def test_replace_puts_new_results_in_their_place(tiny: Tiny, tmp_path: Path, done: Path):
    folder, fresh = tmp_path / "r", tmp_path / "fresh"
    copy(done, folder)
    (folder / "notes.txt").write_text("mine")
    other = {"train__lr": 0.01, "sweep__strengths": [0.0, 0.5], "artifacts__eigenvectors": "npy"}

    sweep(tiny(artifacts__out=str(folder), **other), replace=True)

    sweep(tiny(artifacts__out=str(fresh), **other))
    assert contents(folder) == contents(fresh) | {"notes.txt": b"mine"}


def test_replace_prunes_a_grid_that_shrank(tiny: Tiny, tmp_path: Path, done: Path):
    folder = tmp_path / "r"
    copy(done, folder)

    swept = sweep(tiny(artifacts__out=str(folder), sweep__strengths=[0.0, 0.002]), replace=True)

    assert swept.reused == 2
    assert len((folder / "Model-1.csv").read_text().splitlines()) == 3
    assert not list(folder.glob("*0.01000*"))


def test_a_table_of_another_program_is_refused(tiny: Tiny, tmp_path: Path):
    (tmp_path / "Model-1.csv").write_text("L2_strength\n0.5\n")
    params = tiny(artifacts__out=str(tmp_path), sweep__strengths=[0.0])

    with pytest.raises(UsageError, match=r"holds Model-1\.csv of another program"):
        sweep(params)
    assert contents(tmp_path) == {"Model-1.csv": b"L2_strength\n0.5\n"}

    sweep(params, replace=True)
    assert (tmp_path / "Model-1.csv").read_text().startswith("L2_strength,Train_Loss")


# ------------------------------------------------------------ replicates, protocols, objectives


def test_replicates_do_not_know_of_each_other(tiny: Tiny, tmp_path: Path, done: Path):
    both, second = tmp_path / "both", tmp_path / "second"

    swept = sweep(tiny(artifacts__out=str(both), sweep__ids=[1, 2], sweep__strengths=[0.0, 0.002]))
    sweep(tiny(artifacts__out=str(second), sweep__ids=[2], sweep__strengths=[0.0, 0.002]))

    assert [(r.replicate, r.l2) for r in swept.records] == [
        (1, 0.0), (1, 0.002), (2, 0.0), (2, 0.002),
    ]  # fmt: skip
    of_second = {n: c for n, c in contents(both).items() if re.search(r"-2[-.]", n)}
    assert of_second == contents(second)
    same = "Hessian-eigenvalues-{}-0.00000.csv"
    assert (both / same.format(1)).read_bytes() == (done / same.format(1)).read_bytes()
    assert (both / same.format(2)).read_bytes() != (both / same.format(1)).read_bytes()


def test_another_replicate_joins_the_folder(tiny: Tiny, tmp_path: Path):
    one = {"artifacts__out": str(tmp_path), "sweep__strengths": [0.0]}
    sweep(tiny(**one))
    before = touched(tmp_path)

    sweep(tiny(**one, sweep__ids=[2]))

    assert {n: t for n, t in touched(tmp_path).items() if n in before} == before
    assert {record.replicate for record in Store(tmp_path).records()} == {1, 2}


def test_an_independent_strength_is_what_train_makes(tiny: Tiny, tmp_path: Path):
    params = tiny(artifacts__out=str(tmp_path / "s"), sweep__protocol="independent",
                  sweep__strengths=[0.002, 0.01])  # fmt: skip
    sweep(params)

    made = pipeline.train(params, l2=0.01, replicate=1, out=tmp_path / "t", progress=Silent(),
                          tracker=NoTracker())  # fmt: skip

    name = "model_weights-1-0.01000.pth"
    assert made.path == tmp_path / "t" / name
    assert made.path.read_bytes() == (tmp_path / "s" / name).read_bytes()


def test_a_chain_starts_where_the_last_strength_ended(tiny: Tiny, tmp_path: Path, done: Path):
    alone = tmp_path / "alone"
    sweep(tiny(artifacts__out=str(alone), sweep__strengths=[0.002]))

    chained, fresh = Result(done, "1-0.00200"), Result(alone, "1-0.00200")

    assert chained.row["Train_Loss"] < fresh.row["Train_Loss"]


def test_downward_starts_at_the_top(tiny: Tiny, tmp_path: Path):
    alone, down = tmp_path / "alone", tmp_path / "down"
    sweep(tiny(artifacts__out=str(alone), sweep__strengths=[0.01]))

    swept = sweep(tiny(artifacts__out=str(down), sweep__direction="down"))

    assert [record.l2 for record in swept.records] == [0.01, 0.002, 0.0]
    for name in results_of("1-0.01000"):
        assert (down / name).read_bytes() == (alone / name).read_bytes()
    table = np.genfromtxt(down / "Model-1.csv", delimiter=",", names=True)
    assert table["L2_strength"].tolist() == [0.01, 0.002, 0.0]


def test_half_is_full_at_half_the_strength(tiny: Tiny, tmp_path: Path):
    """(λ/2)‖θ‖² at 0.02 is λ‖θ‖² at 0.01: the same loss, and other weights than full at 0.02."""
    protocol = {"sweep__protocol": "independent", "spectrum__k": 2}
    for name, penalty, l2 in (("half", "half", 0.02), ("full", "full", 0.02)):
        sweep(tiny(artifacts__out=str(tmp_path / name), objective__penalty=penalty,
                   sweep__strengths=[l2], **protocol))  # fmt: skip
    half, full = (Result(tmp_path / name, "1-0.02000") for name in ("half", "full"))

    assert not torch.equal(half.theta_P, full.theta_P)
    assert half.theta_P.norm() > full.theta_P.norm()
    for result, c in ((half, 0.01), (full, 0.02)):
        penalty = c * float(result.theta_P.square().sum())
        assert result.row["Train_Reg_Loss"] - result.row["Train_Loss"] == pytest.approx(penalty)

    weights = tmp_path / "half" / "model_weights-1-0.02000.pth"
    for penalty, shift in (("half", 0.02), ("full", 0.04)):
        found = pipeline.spectrum(tiny(objective__penalty=penalty), weights=weights, l2=None,
                                  out=tmp_path / "s", progress=Silent())  # fmt: skip
        assert found.l2 == 0.02
        assert found.found.shift == pytest.approx(shift)


def test_a_reference_point_draws_the_weights_to_itself(tiny: Tiny, tmp_path: Path, done: Path):
    point = done / "model_weights-1-0.00200.pth"
    sweep(tiny(artifacts__out=str(tmp_path), objective__reference=str(point),
               sweep__strengths=[0.0, 5.0], train__max_epochs=3))  # fmt: skip
    reference_P = Result(done, "1-0.00200").theta_P
    free, held = Result(tmp_path, "1-0.00000"), Result(tmp_path, "1-5.00000")

    def distance(result: Result) -> float:
        return float((result.theta_P - reference_P).norm())

    assert distance(held) < 0.1 * distance(free)
    assert held.row["Train_Reg_Loss"] - held.row["Train_Loss"] == pytest.approx(
        5.0 * distance(held) ** 2, rel=1e-4
    )
    (record, _) = Store(tmp_path).records()
    assert record.parameters["objective.reference"] == (
        hashlib.sha256(point.read_bytes()).hexdigest()
    )


# -------------------------------------------------------------------------------------- failures


class Remembers(NoTracker):
    """Remembers how a sweep ended."""

    status = "never begun"

    def begin(self, **_: object) -> set[str]:
        """See `Tracker`."""
        self.status = "RUNNING"
        return set()

    def end(self, status: str, **_: object) -> int:
        """See `Tracker`."""
        self.status = status
        return 0


def test_how_many_spectra_are_under_way_changes_no_byte(
    tiny: Tiny, tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch
):
    for count in (0, 3):
        monkeypatch.setattr("spectra.workbench.Workbench.workers", count)
        sweep(tiny(artifacts__out=str(tmp_path / str(count))))
        assert contents(tmp_path / str(count)) == contents(done)


@pytest.mark.parametrize("protocol", ["independent", "continuation"])
def test_a_stack_resumes_to_the_same_bytes(tiny: Tiny, tmp_path: Path, protocol: str):
    """One member of a group is lost; the group is trained whole, the others stay untouched."""
    params = tiny(
        artifacts__out=str(tmp_path), train__stack=3, sweep__protocol=protocol, sweep__ids=[1, 2],
        sweep__strengths=[0.0, 0.002, 0.01],
    )  # fmt: skip
    sweep(params)
    before, untouched = contents(tmp_path), touched(tmp_path)
    (tmp_path / "manifest-2-0.00200.json").unlink()

    assert sweep(params).reused == 5

    assert contents(tmp_path) == before
    kept = {name for name in untouched if "2-0.00200" not in name and "Model" not in name}
    assert {n: t for n, t in touched(tmp_path).items() if n in kept} == {
        name: untouched[name] for name in kept
    }


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_sweep_is_killed_and_goes_on(
    tiny: Tiny, tmp_path: Path, done: Path, stop: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    folder, tracker = tmp_path / "r", Remembers()
    usual = Store.commit

    def stops_after_the_first(self: Store, record: artifacts.Record) -> None:
        usual(self, record)
        if record.l2 == 0.002:
            raise stop

    monkeypatch.setattr(Store, "commit", stops_after_the_first)
    with pytest.raises(stop):
        sweep(tiny(artifacts__out=str(folder)), tracker=tracker)
    monkeypatch.undo()

    assert tracker.status == "KILLED"
    assert sweep(tiny(artifacts__out=str(folder))).reused == 2
    assert contents(folder) == contents(done)


def test_too_many_pairs_are_refused_before_any_training(tiny: Tiny, tmp_path: Path):
    with pytest.raises(ParameterError, match="below the number of parameters, 6370, got 6370"):
        sweep(tiny(artifacts__out=str(tmp_path / "r"), spectrum__k=6370))

    assert not (tmp_path / "r").exists()


def test_a_disk_too_small_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tracker = Remembers()
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: full)

    with pytest.raises(StorageError, match=r"3 strengths need .* 1 kB are free"):
        sweep(tiny(artifacts__out=str(tmp_path / "r")), tracker=tracker)

    assert tracker.status == "never begun"
    assert contents(tmp_path / "r") == {}


# -------------------------------------------------------------------------------------- tracking


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


# ---------------------------------------------------------------------------------- equal units


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


# -------------------------------------------------------------------------------- the spectrum


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
