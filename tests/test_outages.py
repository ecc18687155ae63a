"""What the machine can do to a sweep, each of it really done: what is said, what stays on the disk.

Every test ends with the same command run again, which must leave the bytes of a sweep that nothing
happened to.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conftest import Command, tiny_params
from spectra import pipeline
from spectra.progress import Silent
from spectra.tracking import NoTracker
from test_sweep_killed import check_runs, contents

SWEEP = ("sweep", "--no-report")
STRENGTHS = (0.0, 0.002, 0.01)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, sample_root: Path) -> dict[str, bytes]:
    """The files of the sweep of `Command`, undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "r"
    params = tiny_params(sample_root, artifacts__out=str(folder), artifacts__eigenvectors="npy")
    pipeline.sweep(params, replace=False, draw=False, progress=Silent(), tracker=NoTracker())
    return contents(folder)


def after_the_first(running: subprocess.Popen[str]) -> None:
    """Wait until the first strength is told of."""
    assert running.stderr is not None
    while not (line := running.stderr.readline()).startswith("[1/"):
        assert line, "the sweep ended before its first strength"


def one_line(text: str) -> str:
    """What is said at the end, after the lines of progress."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("spectra: ")]
    assert len(lines) == 1, text
    return lines[0]


def goes_on(command: Command, expected: dict[str, bytes], count: int = len(STRENGTHS)) -> None:
    """The same command again ends with the bytes of an undisturbed sweep and a run a strength."""
    last = command(*SWEEP)
    assert last.returncode == 0, last.stderr
    assert contents(command.folder / "test_data") == expected
    check_runs(command.folder / "mlflow.db", command.folder / "test_data", count)


# ---------------------------------------------------------------------------------- the terminal


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"),
     pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
     pytest.param(signal.SIGHUP, 129, "terminated", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_signal_ends_it_in_order(
    command: Command, expected: dict[str, bytes], number: int, code: int, word: str
):
    running = command.start(*SWEEP)
    after_the_first(running)
    running.send_signal(number)
    if number != signal.SIGINT:  # whose second ends it at once
        time.sleep(0.2)
        running.send_signal(number)  # as `timeout` does: to the process, and to its group
    _, said = running.communicate(timeout=60)

    assert running.returncode == code
    assert word in one_line(said)
    assert "Traceback" not in said
    assert not list((command.folder / "test_data").glob(".*"))
    goes_on(command, expected)


# A store whose end takes forever stands for whatever an orderly end may wait for.
_SLOW_END = """
import sys, time
from spectra import cli
from spectra.tracking import MlflowTracker
def end(self, *given, **named):
    print("ending", file=sys.stderr, flush=True)
    time.sleep(600)
MlflowTracker.end = end
cli.main()
"""


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(command: Command, expected: dict[str, bytes]):
    running = subprocess.Popen(
        [sys.executable, "-c",
         "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + _SLOW_END,
         *SWEEP],
        cwd=command.folder, env=os.environ | command.tiny, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    after_the_first(running)
    running.send_signal(signal.SIGINT)
    assert running.stderr is not None
    while running.stderr.readline().strip() != "ending":
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)

    assert running.returncode == 130
    assert "stopped at once" in one_line(said)
    goes_on(command, expected)


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_fault(command: Command):
    """As in `spectra sweep --json | head -c 1`."""
    running = command.start("sweep", "--no-report", "--json", "--quiet")
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    with running.stderr:
        said = running.stderr.read()
    running.wait(timeout=60)

    assert running.returncode == 141, said
    assert said == ""


# ------------------------------------------------------------------------------------- the folder


@pytest.mark.slow
def test_a_second_sweep_is_refused_and_harms_nothing(command: Command, expected: dict[str, bytes]):
    first = command.start(*SWEEP)
    after_the_first(first)
    second = command(*SWEEP)
    _, said = first.communicate(timeout=60)

    if second.returncode == 0:  # the first was too fast for it
        pytest.skip("the first sweep had ended")
    assert second.returncode == 5
    assert "is in use by another sweep" in one_line(second.stderr)
    assert first.returncode == 0, said
    goes_on(command, expected)


@pytest.mark.parametrize("put_back", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_that_vanishes_ends_it(
    command: Command, expected: dict[str, bytes], tmp_path: Path, put_back: bool
):
    """Like a mount that goes away; an empty folder in its place is not taken for it."""
    running = command.start(*SWEEP)
    after_the_first(running)
    (tmp_path / "test_data").rename(tmp_path / "elsewhere")
    if put_back:
        (tmp_path / "test_data").mkdir()
    _, said = running.communicate(timeout=60)

    assert running.returncode == 5
    assert "was removed or replaced while it was in use" in one_line(said)
    assert put_back == (tmp_path / "test_data").exists()
    shutil.rmtree(tmp_path / "test_data", ignore_errors=True)
    (tmp_path / "elsewhere").rename(tmp_path / "test_data")
    goes_on(command, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB at `test_data`, or skips."""
    folder = tmp_path / "test_data"
    mounted: list[Path] = []

    def mount(kilobytes: int, *more: str) -> Path:
        folder.mkdir(exist_ok=True)
        options = ",".join([f"size={kilobytes}k", *more])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip("a disk of its own cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


# What is free when the sweep starts is not what is free when it writes: another program's file.
_FULL = """
import shutil, sys
from spectra import cli
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)
cli.main()
"""


def test_a_disk_that_fills_up_ends_it(
    command: Command, expected: dict[str, bytes], small_disk: Callable[..., Path]
):
    """Room for one strength and a part of the next."""
    one = sum(len(b) for name, b in expected.items() if "0.00000" in name)
    folder = small_disk(int(1.6 * one / 1024))
    words = [sys.executable, "-c", _FULL, *SWEEP]
    ended = subprocess.run(
        words, cwd=command.folder, env=os.environ | command.tiny, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 5, ended.stderr
    assert "No space left on device" in one_line(ended.stderr)
    assert "finished strengths are kept" in ended.stderr
    assert not list(folder.glob(".*"))
    there = contents(folder)
    assert "manifest-1-0.00000.json" in there
    assert {n: b for n, b in there.items() if "0.00000" in n} == {
        n: b for n, b in expected.items() if "0.00000" in n
    }
    subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
    goes_on(command, expected)


def test_a_disk_too_small_is_refused_before_any_work(
    command: Command, small_disk: Callable[..., Path]
):
    folder = small_disk(64)
    ended = command(*SWEEP)

    assert ended.returncode == 5
    assert "3 strengths need" in one_line(ended.stderr)
    assert contents(folder) == {}


def test_a_read_only_disk_is_said(command: Command, small_disk: Callable[..., Path]):
    small_disk(100_000, "ro")
    ended = command(*SWEEP)

    assert ended.returncode == 5
    assert "the file system is read-only; choose another folder with --out" in one_line(
        ended.stderr
    )


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_permission_denied_is_said(command: Command, sample_root: Path, open_folder: Path):
    """As another user, where the tests are run by root, whom no mode stops."""
    shutil.copytree(sample_root, open_folder / "data").chmod(0o755)
    shutil.copy(command.folder / "params.yaml", open_folder)
    mine = open_folder / "mine"
    mine.mkdir(mode=0o555)
    words = [str(command.executable), *SWEEP, "--no-track", "--out", str(mine / "r")]
    if os.geteuid() == 0:
        become = shutil.which("setpriv")
        if become is None:
            pytest.skip("root ignores permissions, and there is no setpriv to become another")
        words = [become, "--reuid=65534", "--clear-groups", *words]
        helped = [*words[:3], str(command.executable), "--help"]
        may = subprocess.run(helped, cwd=open_folder, capture_output=True, check=False)
        if may.returncode:
            pytest.skip("another user may not run the command")
    readable = {"SPECTRA_DATA_ROOT": str(open_folder / "data")}
    ended = subprocess.run(
        words, cwd=open_folder, env=os.environ | command.tiny | readable,
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ended.returncode == 5, ended.stderr
    assert "permission denied; choose another folder with --out" in one_line(ended.stderr)
    assert list(mine.iterdir()) == []


# --------------------------------------------------------------------------------------- memory


def test_too_little_memory_is_one_line(command: Command):
    """A limit on the address space, beneath what a wide network needs."""
    code = (
        "import resource, torch\n"
        "from spectra import cli\n"
        "import spectra.pipeline\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)\n"
        "cli.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *SWEEP, "--hidden", "60000", "--no-track"],
        cwd=command.folder, env=os.environ | command.tiny, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 6, ended.stderr
    assert "there is not enough memory" in one_line(ended.stderr)
    assert "use a smaller network" in ended.stderr


# ------------------------------------------------------------------------------- the store of runs


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_locked_store_costs_only_the_runs(
    command: Command, expected: dict[str, bytes], when: str
):
    """Another program holds the database: the sweep goes on, says so once, and is logged later."""
    holder = sqlite3.connect(command.folder / "mlflow.db", isolation_level=None)
    with closing(holder):
        if when == "before":
            holder.execute("BEGIN EXCLUSIVE")
        running = command.start(*SWEEP)
        if when != "before":
            after_the_first(running)
            holder.execute("BEGIN EXCLUSIVE")
        _, said = running.communicate(timeout=110)
        assert contents(command.folder / "test_data") == expected
        if running.returncode == 0:
            pytest.skip("the sweep had ended before the store was locked")
        assert running.returncode == 5, said
        assert said.count("not logged for now: ") == 1
        assert "locked" in said
        assert "the results are whole, and the same command logs them" in one_line(said)
    goes_on(command, expected)


@pytest.mark.slow
def test_a_store_that_is_deleted_is_made_anew(command: Command, expected: dict[str, bytes]):
    """The next sweep logs what is on the disk and in no store."""
    running = command.start(*SWEEP)
    after_the_first(running)
    (command.folder / "mlflow.db").unlink()
    running.communicate(timeout=60)

    assert contents(command.folder / "test_data") == expected
    goes_on(command, expected)


@pytest.mark.slow
def test_a_server_that_is_away_costs_only_the_runs(command: Command, expected: dict[str, bytes]):
    """Nobody listens at the port; the store is found when it is named again."""
    away = command(
        *SWEEP, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_TIMEOUT="2",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )  # fmt: skip

    assert away.returncode == 5, away.stderr
    assert "the results are whole" in one_line(away.stderr)
    assert contents(command.folder / "test_data") == expected
    goes_on(command, expected)
