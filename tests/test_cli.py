"""The command line: what it prints where, and what it ends with.

What needs a process of its own (signals, start-up, a terminal that is not one) has one; the
rest runs in this process, where a start costs nothing.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from conftest import ROOT, Command
from spectra.artifacts import Store
from spectra.cli import app

Run = Callable[..., Any]
FORCED = {"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1"}


@pytest.fixture
def run(command: Command, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`spectra` in this process, with the tiny parameters and an empty folder around it."""
    monkeypatch.chdir(command.folder)
    for name, value in command.tiny.items():
        monkeypatch.setenv(name, value)
    # By its full path: within a process, MLflow keeps one `mlflow.db` open for all folders.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{command.folder / 'mlflow.db'}")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def only_json(result: Any) -> dict[str, Any]:  # noqa: ANN401
    """Standard output, which must be one JSON object."""
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


# -------------------------------------------------------------------------------------- start-up


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom spectra.cli import app\n"
        "try: app(['sweep', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'numpy', 'matplotlib', 'scipy', 'orjson', 'spectra.params'}\n"
        "print(heavy & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "set()"
    assert "--strengths" in done.stdout


def test_help_names_commands_and_exit_codes(run: Run):
    shown = run("--help")

    assert shown.exit_code == 0
    for word in ("data", "train", "spectrum", "sweep", "report", "Exit codes", "143"):
        assert word in shown.stdout


# ----------------------------------------------------------------------------------------- usage

BAD = [
    (["train", "--lr", "0"], "train.lr: input should be greater than 0, got 0.0"),
    (["train", "--lr", "nan"], "train.lr: input should be a finite number, got nan"),
    (["train", "--l2", "inf"], "--l2: a strength must be a finite number, got inf"),
    (["train", "--hidden", "8,x"], "model.hidden.1: input should be a valid integer, got 'x'"),
    (["train", "--hidden", "0"], "model.hidden.0: input should be greater than or equal to 1"),
    (["train", "--activation", "sigmod"], "did you mean 'sigmoid'?"),
    (["train", "--penalty", "both"], "objective.penalty: input should be 'full' or 'half'"),
    (["train", "--device", "tpu"], "runtime.device"),
    (["train", "--dtype", "float16"], "runtime.dtype"),
    (["train", "--threads", "100000"], "less than or equal to 1024"),
    (["train", "--reference", "absent.pth"], "cannot read weights from absent.pth"),
    (["train", "--set", "train.lrr=1"], "unknown parameter 'train.lrr'; did you mean 'train.lr'?"),
    (["train", "--set", "trian.lr=1"], "did you mean 'train'?"),
    (["train", "--set", "train.lr"], "--set train.lr: write SECTION.KEY=VALUE"),
    (["train", "--set", "lr=1"], "write SECTION.KEY=VALUE"),
    (["train", "--set", "train.lr=2001-99-99"], "train.lr: input should be a valid number"),
    (["train", "--params", "absent.yaml"], "cannot read parameters from absent.yaml: No such file"),
    (["train", "--params", "."], "cannot read parameters from .: Is a directory"),
    (["sweep", "--strengths", "0.1,0.1"], "strengths names 0.1 twice"),
    (["sweep", "--strengths", ""], "strengths is empty"),
    (["sweep", "--strengths", "0.1,nan"], "sweep.strengths.1: input should be a valid number"),
    (["sweep", "--points", "0"], "sweep.points: input should be greater than or equal to 1"),
    (["sweep", "--l2-min", "0.3", "--l2-max", "0.1"], "l2_max=0.1 is below l2_min=0.3"),
    (["sweep", "--ids", "1,1"], "ids names 1 twice"),
    (["sweep", "--ids", "-1"], "sweep.ids.0: input should be greater than or equal to 0"),
    (["sweep", "--direction", "sideways"], "sweep.direction: input should be 'up' or 'down'"),
    (["sweep", "--k", "6370"], "spectrum.k: must be below the number of parameters, 6370"),
    (["sweep", "--eigenvectors", "txt"], "artifacts.eigenvectors"),
    (["spectrum", "absent.pth"], "cannot read weights from absent.pth: No such file"),
    (["spectrum", "."], "cannot read weights from .: Is a directory"),
    (["spectrum", "params.yaml"], "params.yaml is refused: it is not a plain state_dict"),
    (["report"], "test_data holds no finished results to draw; run `spectra sweep` first"),
    (["report", "--results", "absent"], "absent holds no finished results"),
    (["data", "--name", "../x"], "data.name"),
    (["data", "--source", "web"], "data.source"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_what_cannot_be_done_is_said_in_one_line(run: Run, words: list[str], message: str):
    refused = run(*words)

    assert refused.exit_code == 2
    assert isinstance(refused.exception, SystemExit)  # anything else would be a traceback
    complaint = [line for line in refused.stderr.splitlines() if line.startswith("spectra: ")]
    assert complaint == refused.stderr.splitlines()[-1:]
    assert message in complaint[0]
    assert refused.stdout == ""


@pytest.mark.parametrize(
    "words", [["swep"], ["train", "--lrr", "1"], ["train", "--lr", "x"], ["train", "--l2", "-1"],
              ["train", "--l2", "nan"],
              ["spectrum"]],
)  # fmt: skip
def test_misspelt_words_end_with_2(run: Run, words: list[str]):
    refused = run(*words)

    assert refused.exit_code == 2
    assert isinstance(refused.exception, SystemExit)
    assert "Traceback" not in refused.stderr


def test_a_misspelt_variable_ends_with_2(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPECTRA_TRAIN_LERNRATE", "1")

    refused = run("train")

    assert refused.exit_code == 2
    assert "SPECTRA_TRAIN_LERNRATE names no parameter" in refused.stderr


def test_colour_does_not_break_messages(run: Run, monkeypatch: pytest.MonkeyPatch):
    for name, value in FORCED.items():
        monkeypatch.setenv(name, value)

    refused = run("train", "--lr", "0")

    assert refused.stderr == "spectra: train.lr: input should be greater than 0, got 0.0\n"
    assert only_json(run("data", "--json", "--quiet"))["source"]


# ------------------------------------------------------------------------------- the other codes


def test_data_that_are_not_there_end_with_3(run: Run, tmp_path: Path):
    refused = run("train", "--set", f"data.root={tmp_path / 'd'}", "--set", "data.folder=absent")

    assert refused.exit_code == 3
    assert refused.stderr.splitlines()[-1].startswith("spectra: no source gave the data set")


def test_damaged_data_end_with_3(run: Run, tmp_path: Path):
    (tmp_path / "idx").mkdir()
    for path in (ROOT / "sample").glob("*.gz"):
        (tmp_path / "idx" / path.name).write_bytes(path.read_bytes()[:1000])

    refused = run("data", "--folder", tmp_path / "idx", "--set", f"data.root={tmp_path / 'd'}")

    assert refused.exit_code == 3
    assert refused.stderr.splitlines()[-1].startswith("spectra: ")


@pytest.mark.parametrize(
    "words",
    [["train", "--lr", "1e38"], ["sweep", "--lr", "1e38"],
     ["sweep", "--set", "spectrum.max_products=4"]],
)  # fmt: skip
def test_runs_that_fail_end_with_4(run: Run, words: list[str]):
    failed = run(*words, "--no-track")

    assert failed.exit_code == 4
    assert failed.stderr.splitlines()[-1].startswith("spectra: ")
    assert "raise spectrum.max_products" in failed.stderr or "lower train.lr" in failed.stderr


def test_a_spectrum_that_does_not_converge_ends_with_4(run: Run, tmp_path: Path):
    weights = only_json(run("train", "--json", "--no-track"))["weights"]

    failed = run("spectrum", weights, "--max-products", "4", "--json")

    assert failed.exit_code == 4
    assert failed.stdout == ""
    assert "raise spectrum.max_products (now 4)" in failed.stderr


@pytest.mark.parametrize("command_", ["train", "sweep", "spectrum"])
def test_a_folder_that_cannot_be_written_ends_with_5(run: Run, tmp_path: Path, command_: str):
    weights = [only_json(run("train", "--json", "--no-track"))["weights"]]
    (tmp_path / "file").write_text("")

    words = [command_, *(weights if command_ == "spectrum" else ["--no-track"])]
    failed = run(*words, "--out", "file")

    assert failed.exit_code == 5
    assert "choose another with --out" in failed.stderr.splitlines()[-1]


def test_a_store_that_cannot_be_opened_ends_with_5(run: Run):
    failed = run("sweep", "--set", "tracking.uri=sqlite:////proc/nowhere/x.db")

    assert failed.exit_code == 5
    assert failed.stderr.startswith("spectra: the MLflow store sqlite:////proc/nowhere/x.db")
    assert failed.stderr.count("\n") == 1


def test_a_folder_in_use_ends_with_5(run: Run, tmp_path: Path):
    with Store(tmp_path / "test_data").held():
        failed = run("sweep", "--no-track")

    assert failed.exit_code == 5
    assert "is in use by another sweep" in failed.stderr


def test_other_parameters_end_with_2_and_are_replaced_when_asked(run: Run, tmp_path: Path):
    words = ["sweep", "--strengths", "0.1", "--no-track", "--no-report", "--quiet"]
    assert run(*words).exit_code == 0

    refused = run(*words, "--lr", "0.01")
    assert refused.exit_code == 2
    assert "(train.lr is 0.01, theirs 0.0015)" in refused.stderr
    assert run(*words, "--lr", "0.01", "--replace").exit_code == 0


# -------------------------------------------------------------------------------------- the JSON


def test_json_is_all_there_is_on_stdout(run: Run, tmp_path: Path):
    data = only_json(run("data", "--json"))
    assert set(data) == {"folder", "sha256", "source"}
    assert re.fullmatch("[0-9a-f]{64}", data["sha256"])

    trained = only_json(run("train", "--json", "--l2", "0.01"))
    assert Path(trained["weights"]).exists()
    assert (trained["l2"], trained["replicate"], trained["epochs"]) == (0.01, 1, 1)
    assert 0 <= trained["test_accuracy"] <= 100

    spectrum = only_json(run("spectrum", trained["weights"], "--json"))
    assert spectrum["l2"] == 0.01
    assert spectrum["shift"] == 0.02
    assert spectrum["loss"] == pytest.approx(trained["cross_entropy"], rel=1e-6)
    assert spectrum["objective"] == pytest.approx(trained["objective"], rel=1e-6)
    assert len(spectrum["eigenvalues"]) == len(spectrum["residuals"]) == 3
    assert spectrum["converged"] == [True] * 3
    assert spectrum["lambda_min"] <= min(spectrum["eigenvalues"])
    assert spectrum["products"] > 3
    assert spectrum["gradient_norm"] > 0
    assert spectrum["parameters"] == 6370
    assert all(Path(path).exists() for path in spectrum["files"])

    swept = only_json(run("sweep", "--json"))
    assert [row["L2_strength"] for row in swept["strengths"]] == [0.0, 0.002, 0.01]
    assert swept["results"] == "test_data"
    assert swept["reused"] == 0
    assert swept["findings"]
    assert all(Path(path).exists() for path in swept["report"])
    assert only_json(run("sweep", "--json"))["reused"] == 3

    drawn = only_json(run("report", "--json"))
    assert drawn["findings"] == swept["findings"]
    assert drawn["files"] == swept["report"]


def test_spectrum_takes_weights_of_another_program(
    run: Run, tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor]
):
    """In float64, under other names, with tanh; checked against double differentiation."""
    torch.manual_seed(5)
    network = torch.nn.Sequential(
        torch.nn.Linear(784, 6), torch.nn.Tanh(), torch.nn.Linear(6, 10)
    ).double()
    torch.save(network.state_dict(), tmp_path / "theirs.pt")

    found = only_json(
        run("spectrum", "theirs.pt", "--activation", "tanh", "--dtype", "float64", "--l2", "0.5",
            "--eigenvectors", "npy", "--json")
    )  # fmt: skip

    assert found["widths"] == [784, 6, 10]
    loss = torch.nn.functional.cross_entropy(network(digits[0]), digits[1])
    tensors = list(network.parameters())
    gradient_P = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, tensors, create_graph=True)]
    )
    theta_P = torch.cat([t.detach().reshape(-1) for t in tensors])
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
    expected = loss.detach() + 0.5 * theta_P.square().sum()
    assert found["objective"] == pytest.approx(float(expected), rel=1e-10)
    effective_P = gradient_P.detach() + theta_P
    assert found["gradient_norm"] == pytest.approx(float(effective_P.norm()), rel=1e-8)
    (vectors,) = (path for path in found["files"] if path.endswith(".npy"))
    for value, vector_P in zip(found["eigenvalues"], np.load(vectors), strict=True):
        v_P = torch.from_numpy(vector_P)
        image = torch.autograd.grad(gradient_P, tensors, v_P, retain_graph=True)
        image_P = torch.cat([part.reshape(-1) for part in image])
        assert float((image_P - value * v_P).norm()) <= 1.01e-3 * abs(value)


# ------------------------------------------------------------------------------------- the words


def test_plain_lines_where_there_is_no_terminal(run: Run):
    swept = run("sweep", "--no-track", "--no-report")

    assert swept.exit_code == 0
    assert "\x1b" not in swept.stdout + swept.stderr
    lines = swept.stderr.splitlines()
    assert lines[-4].startswith("3 strengths to do: at most about ")
    assert [line[:15] for line in lines[-3:]] == [f"[{i}/3] L2 0.0{d}" for i, d in
                                                 ((1, "000"), (2, "020"), (3, "100"))]  # fmt: skip
    assert "3 strengths in" in swept.stdout
    assert "results  test_data/ (start with Model-1.csv)" in swept.stdout
    assert "tracking is off" in swept.stdout


@pytest.mark.parametrize(
    "words", [["data"], ["train", "--no-track"], ["sweep", "--no-track", "--no-report"]]
)
def test_quiet_is_silent(run: Run, words: list[str]):
    done = run(*words, "--quiet")

    assert done.exit_code == 0
    assert done.stderr == ""
    assert done.stdout


def test_flags_beat_the_environment_and_a_grid_beats_a_list(run: Run):
    """SPECTRA_SWEEP_STRENGTHS holds three strengths here."""
    swept = only_json(
        run("sweep", "--json", "--no-track", "--no-report", "--points", "2", "--l2-max", "0.5",
            "--k", "2")
    )  # fmt: skip

    assert [row["L2_strength"] for row in swept["strengths"]] == [0.0, 0.5]
    assert len(swept["strengths"][0]["eigenvalues"]) == 2


def test_train_says_what_it_found_and_where(run: Run):
    done = run("train", "--l2", "0.01")

    assert re.search(r"^L2 0\.01: best of 1 epochs is 1; train loss \d", done.stdout)
    assert "weights  results/model_weights-1-0.01000.pth" in done.stdout
    assert re.search(r"^runs     mlflow ui .*mlflow\.db, experiment 'spectra'$", done.stdout, re.M)


def test_spectrum_prints_a_table(run: Run):
    weights = only_json(run("train", "--json", "--no-track"))["weights"]

    done = run("spectrum", weights)

    assert "784-8-10 sigmoid, P = 6,370, L2 = 0 (H_eff = H_CE + 0 I)" in done.stdout
    assert len(re.findall(r"^ *[123] +-?[\d.]+ +[\d.e-]+ +[\d.e-]+$", done.stdout, re.M)) == 3


# -------------------------------------------------------------------- in processes of their own


def test_a_signal_ends_a_sweep_cleanly_and_the_next_goes_on(command: Command):
    """Ctrl-C in a first run, SIGTERM in a second; a third finishes."""
    words = ("sweep", "--points", "8", "--l2-max", "0.007", "--max-epochs", "3", "--no-report")
    kept = 0
    for sent, code, word in (
        (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
    ):  # fmt: skip
        running = command.start(*words)
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith(f"[{kept + 2}/8]"):
                running.send_signal(sent)
                break
        _, rest = running.communicate(timeout=60)

        assert running.returncode == code
        *_, last = rest.splitlines()
        assert last == f"spectra: {word}; finished work is kept, the same command goes on"
        assert "Traceback" not in rest
        before, kept = kept, len(Store(command.folder / "test_data").records())
        assert before + 2 <= kept < 8
        assert not list((command.folder / "test_data").glob(".*"))
        (parent, *children) = runs(command.folder)
        assert parent.info.status == "KILLED"
        # The line is printed before the run is logged.
        assert len(children) in (kept - 1, kept)

    done = command(*words, "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused"] == kept
    assert [run.info.status for run in runs(command.folder)] == ["FINISHED"] * 9


def runs(folder: Path) -> list:
    """All runs, the sweep's first."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("spectra")
    found = client.search_runs([experiment.experiment_id])
    return sorted(found, key=lambda run: run.data.tags["spectra.kind"] != "sweep")


def test_the_installed_command_says_everything_in_one_line(command: Command):
    refused = command("train", "--lr", "0", **FORCED)

    assert refused.returncode == 2
    assert refused.stderr == "spectra: train.lr: input should be greater than 0, got 0.0\n"
    assert refused.stdout == ""


def test_a_first_run_writes_nothing_strange(command: Command):
    """A fresh database: MLflow's forty lines of migrations do not appear."""
    (command.folder / "mlflow.db").unlink()

    done = command("train", "--json", "--quiet")

    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["epochs"] == 1
    assert {path.name for path in command.folder.iterdir()} == {
        "params.yaml", "mlflow.db", "mlruns", "results",
    }  # fmt: skip
