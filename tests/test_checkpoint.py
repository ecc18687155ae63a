"""Reading weights: whatever the file is, a dictionary of tensors or one line, and nothing runs."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from spectra import artifacts, checkpoint
from spectra.errors import WeightsError


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_checkpoints_that_hold_a_state_dict_will_do(tmp_path: Path, key: str):
    torch.save({"epoch": 3, key: state()}, tmp_path / "c.pth")

    assert list(checkpoint.load_state_dict(tmp_path / "c.pth")) == list(state())


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_the_trap_of_these_tests_works(tmp_path: Path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "executed")))

    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, how: str):
    path, trap = tmp_path / "evil.pth", {"fc1.weight": Trap(tmp_path / "executed")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=how == "torch")

    text = refused(path)

    assert "would run code" in text
    assert "torch.save(model.state_dict(), path)" in text
    assert not (tmp_path / "executed").exists()


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        checkpoint.load_state_dict(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_whole_model_is_refused(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")

    assert "not a plain state_dict" in refused(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [[1, 2], 3.0, torch.zeros(3)])
def test_what_is_no_dictionary_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "m.pth")

    assert f"holds a {type(content).__name__}, not a state_dict" in refused(tmp_path / "m.pth")


@pytest.mark.parametrize("keep", [0, 1, 100, 700, -30])
def test_truncated_files_are_refused(tmp_path: Path, keep: int):
    (tmp_path / "t.pth").write_bytes(artifacts.state_dict_bytes(state())[:keep])

    refused(tmp_path / "t.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused_or_harmless(tmp_path: Path, zipped: bool):
    buffer, random = io.BytesIO(), np.random.default_rng(0)
    torch.save(state(), buffer, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "d.pth"
    refusals = 0
    for _ in range(150):
        damaged = bytearray(buffer.getvalue())
        for place in random.integers(0, len(damaged), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            assert isinstance(checkpoint.load_state_dict(path), dict)
        except WeightsError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 50


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "t.pth").write_text("fc1.weight: 1, 2, 3\n")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as other:
        other.writestr("a.txt", "text")

    refused(tmp_path / "t.pth")
    refused(tmp_path / "z.pth")


def test_missing_files_and_folders_are_named(tmp_path: Path):
    assert "No such file" in refused(tmp_path / "absent.pth")
    assert "Is a directory" in refused(tmp_path)
