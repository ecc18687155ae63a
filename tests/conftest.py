"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bad_input
import oracles
from spectra import params as parameters
from spectra.params import DataParams, Params

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests share a machine with others, and summation order with themselves."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """2,500 real digits: inputs (N, 784) in float64 and labels."""
    return oracles.sample_digits()


@pytest.fixture(scope="session")
def mnist_params() -> DataParams:
    """The whole of MNIST, fetched when not there."""
    from spectra import data

    params = DataParams(root=str(ROOT / "data"))
    data.ensure(params, say=print)
    return params


@pytest.fixture(scope="session")
def mnist(mnist_params: DataParams) -> tuple[Tensor, Tensor]:
    """Its 60,000 training digits: inputs in float64 and labels."""
    from spectra import data

    train = data.load(mnist_params).train
    device = torch.device("cpu")
    inputs_ND = train.inputs(mean=0.1307, std=0.3081, dtype=torch.float64, device=device)
    return inputs_ND, train.labels_N


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of the caller's steers a test, and no test leaves the process changed."""
    for name in list(os.environ):
        if name.startswith(("SPECTRA_", "MLFLOW_", "GITHUB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> None:
    """SIGINT raises `KeyboardInterrupt`, whatever the shell or a command here has made of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.root` in which the shipped digits are laid out."""
    from spectra import data

    root = tmp_path_factory.mktemp("data")
    data.ensure(tiny_params(root).data, say=print)
    return root


def tiny_params(root: Path, **settings: object) -> Params:
    """A network of 6,370 parameters, an epoch of 40 steps, three pairs: half a second a strength.

    `section__key` is `section.key`.
    """
    chosen = {
        "data.name": "sample", "data.root": str(root), "data.source": "folder",
        "data.folder": str(ROOT / "sample"), "model.hidden": [8], "train.max_epochs": 1,
        "train.threads": 1, "sweep.strengths": [0.0, 0.002, 0.01], "spectrum.k": 3,
        "runtime.threads": 1, "tracking.enabled": False,
    }  # fmt: skip
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    nothing = Path(os.devnull)
    return parameters.load(nothing, overrides=chosen, environ={})


@pytest.fixture
def tiny(sample_root: Path) -> Callable[..., Params]:
    """See `tiny_params`."""
    return lambda **settings: tiny_params(sample_root, **settings)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    """A finished sweep of three strengths, which no test changes."""
    import sweeps

    folder = tmp_path_factory.mktemp("sweep") / "results"
    sweeps.sweep(tiny_params(sample_root, artifacts__out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database whose tables are there: making them takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(migrated: Path, tmp_path: Path) -> Path:
    """A fresh copy of an empty MLflow database."""
    return Path(shutil.copy(migrated, tmp_path / "mlflow.db"))


# A shell that starts the tests in the background makes them ignore SIGINT, and nohup SIGHUP;
# children inherit it.
_LISTENING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


class Command:
    """The installed `spectra` in processes of its own, in a folder with tiny parameters."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.executable = Path(sys.executable).with_name("spectra")
        shutil.copy(ROOT / "sample" / "params.yaml", folder / "params.yaml")
        self.tiny = {
            f"SPECTRA_{name}": value
            for name, value in {
                "DATA_ROOT": str(root), "DATA_FOLDER": str(ROOT / "sample"), "MODEL_HIDDEN": "[8]",
                "TRAIN_MAX_EPOCHS": "1", "SPECTRUM_K": "3", "RUNTIME_THREADS": "1",
                "SWEEP_STRENGTHS": "[0.0, 0.002, 0.01]",
            }.items()
        }  # fmt: skip

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start it and do not wait."""
        words = [str(self.executable), *map(str, arguments)]
        return subprocess.Popen(
            [sys.executable, "-c", _LISTENING, *words], cwd=self.folder, text=True,
            env=os.environ | self.tiny | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        running = self.start(*arguments, **environment)
        out, err = running.communicate(timeout=120)
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)


@pytest.fixture
def command(tmp_path: Path, sample_root: Path, database: Path) -> Command:
    """`spectra` in an empty folder with tiny parameters and a migrated `mlflow.db`."""
    assert database.parent == tmp_path
    return Command(tmp_path, sample_root)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> Path:
    """A folder with `params.yaml` and the finished sweep of those parameters."""
    folder = tmp_path_factory.mktemp("finished")
    return bad_input.finished_sweep(folder, sample_root, ROOT / "sample")


@pytest.fixture
def stage(tmp_path: Path, finished: Path) -> bad_input.Stage:
    """A copy of it, on which one bad input is tried."""
    return bad_input.Stage(tmp_path, finished)
