"""Files that are not the weights of a network of the family: one line each, and nothing runs."""
# ruff: noqa: E501  (a row is a line)

from __future__ import annotations

import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from pytest import MonkeyPatch
from torch import Tensor

from bad_input import WEIGHTS, Row, Stage, rows

Prepare = Callable[[Path], object]


def good() -> dict[str, Tensor]:
    """A network as the data want it: 784 inputs, 4 units, 10 classes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc1.weight": (4, 784), "fc1.bias": (4,), "fc2.weight": (10, 4), "fc2.bias": (10,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saved(content: object, **how: object) -> Prepare:
    return lambda here: torch.save(content, here / "w.pth", **how)


def having(changes: Mapping[object, object]) -> Prepare:
    """The good network with other tensors."""
    return saved({**good(), **changes})


def lacking(name: str) -> Prepare:
    return saved({key: tensor for key, tensor in good().items() if key != name})


def raw(data: bytes) -> Prepare:
    return lambda here: (here / "w.pth").write_bytes(data)


def cut(share: float) -> Prepare:
    def prepare(here: Path) -> None:
        data = (here / WEIGHTS).read_bytes()
        (here / "w.pth").write_bytes(data[: int(len(data) * share)])

    return prepare


class Trap:
    """Unpickled, it makes a folder `canary` where the command runs."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("canary",))


def legacy_tar(here: Path) -> None:
    """The format before 2017: a tar of `pickle`, `tensors` and `storages`."""
    (here / "pickle").write_bytes(pickle.dumps({"fc1.weight": 1}))
    with tarfile.open(here / "w.pth", "w") as tar:
        tar.add(here / "pickle", "pickle")


def bomb(here: Path) -> None:
    with zipfile.ZipFile(here / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
        archive.writestr("archive/version", "3\n")


def moved_to_cuda(here: Path) -> None:
    """What a GPU would have saved, but for an integer type: the device is in the pickle."""
    torch.save({**good(), "fc2.bias": torch.zeros(10, dtype=torch.int64)}, here / "cpu.pth")
    with zipfile.ZipFile(here / "cpu.pth") as there, zipfile.ZipFile(here / "w.pth", "w") as to:
        for member in there.infolist():
            data = there.read(member)
            if member.filename.endswith("data.pkl"):
                assert data.count(b"X\x03\x00\x00\x00cpu") == 1
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            to.writestr(member.filename, data)


REFUSED = "w.pth is refused: it is not a plain state_dict, or loading it would run code; save it with torch.save(model.state_dict(), path)"
NO_LAYER = "are not the weight and bias of one layer; a fully connected network has NAME.weight, NAME.bias for every layer"
NO_MAP = "are not an affine map; expected (outputs, inputs) and (outputs,)"
KINDS = "weights must be floating point: float16, bfloat16, float32 or float64"
W = "spectrum w.pth"

TABLE = (
    Row("missing", W, "cannot read weights from w.pth: No such file or directory"),
    Row("a folder", "spectrum test_data", "cannot read weights from test_data: Is a directory"),
    Row(
        "under a file",
        "spectrum params.yaml/w.pth",
        "cannot read weights from params.yaml/w.pth: Not a directory",
    ),
    Row("an empty name", "spectrum ", "cannot read weights from .: Is a directory"),
    Row(
        "a pipe",
        W,
        "w.pth is a pipe or a device, not a file of weights; name a file",
        prepare=lambda here: os.mkfifo(here / "w.pth"),
    ),
    Row(
        "bytes without end",
        "spectrum /dev/zero",
        "/dev/zero is a pipe or a device, not a file of weights; name a file",
    ),
    Row(
        "a link to nothing",
        W,
        "cannot read weights from w.pth: No such file or directory",
        prepare=lambda here: (here / "w.pth").symlink_to("nothing"),
    ),
    Row("an empty file", W, "w.pth is not a PyTorch weights file: …", prepare=raw(b"")),
    Row("text", W, REFUSED, prepare=raw(b"fc1.weight: 1, 2, 3\n")),
    Row("noise", W, REFUSED, prepare=raw(bytes(range(256)) * 64)),
    Row("cut in half", W, "w.pth is not whole; copy or save it again", prepare=cut(0.5)),
    Row("cut before its end", W, "w.pth is not whole; copy or save it again", prepare=cut(0.99)),
    Row(
        "a zip of other things",
        W,
        REFUSED,
        prepare=lambda here: zipfile.ZipFile(here / "w.pth", "w").close(),
    ),
    Row(
        "a zip bomb",
        W,
        "w.pth would unpack to 50,000,002 bytes from …; refused: torch.save does not compress",
        prepare=bomb,
    ),
    Row(
        "a format of before 2017",
        W,
        "w.pth is not a PyTorch weights file: …legacy .tar format; save it with torch.save(model.state_dict(), path)",
        prepare=legacy_tar,
    ),
    Row("a whole module", W, REFUSED, prepare=saved(torch.nn.Linear(784, 10))),
    Row("code", W, REFUSED, prepare=saved({"fc1.weight": Trap()})),
    Row(
        "code in the older format",
        W,
        REFUSED,
        prepare=saved({"fc1.weight": Trap()}, _use_new_zipfile_serialization=False),
    ),
    Row("code in a bare pickle", W, REFUSED, prepare=raw(pickle.dumps(Trap(), protocol=2))),
    Row(
        "code in the reference point",
        "train --reference w.pth",
        REFUSED,
        prepare=saved({"fc1.weight": Trap()}),
    ),
    Row(
        "code for a branch",
        "branch w.pth --l2 0.01 --to 0.02",
        REFUSED,
        prepare=saved({"fc1.weight": Trap()}),
    ),
    Row(
        "a number",
        W,
        "w.pth holds a float, not a state_dict; save it with torch.save(model.state_dict(), path)",
        prepare=saved(3.0),
    ),
    Row(
        "a tensor",
        W,
        "w.pth holds a Tensor, not a state_dict; save it with torch.save(model.state_dict(), path)",
        prepare=saved(torch.zeros(3)),
    ),
    Row(
        "no tensor",
        W,
        "w.pth: the state_dict is empty; expected fc1.weight, fc1.bias, ...",
        prepare=saved({}),
    ),
    Row(
        "lists for tensors",
        W,
        "w.pth: 'fc1.weight' is a list, not a tensor; save model.state_dict()",
        prepare=saved({"fc1.weight": [1.0]}),
    ),
    Row(
        "a number among tensors",
        W,
        "w.pth: 'epoch' is a int, not a tensor; save model.state_dict()",
        prepare=having({"epoch": 3}),
    ),
    Row(
        "numbers for names",
        W,
        f"w.pth: keys '0' and '1' {NO_LAYER}",
        prepare=saved({0: torch.zeros(10, 784), 1: torch.zeros(10)}),
    ),
    Row(
        "a missing bias",
        W,
        f"w.pth: keys 'fc1.weight' and 'fc2.weight' {NO_LAYER}",
        prepare=lacking("fc1.bias"),
    ),
    Row(
        "a missing weight",
        W,
        f"w.pth: keys 'fc1.bias' and 'fc2.weight' {NO_LAYER}",
        prepare=lacking("fc1.weight"),
    ),
    Row(
        "a missing last bias",
        W,
        f"w.pth: keys 'fc2.weight' and '?' {NO_LAYER}",
        prepare=lacking("fc2.bias"),
    ),
    Row(
        "a tensor too many",
        W,
        f"w.pth: keys 'norm.running_mean' and '?' {NO_LAYER}",
        prepare=having({"norm.running_mean": torch.zeros(4)}),
    ),
    Row(
        "a convolution",
        W,
        f"w.pth: 'conv.weight' (8, 1, 3, 3) and 'conv.bias' (8,) {NO_MAP}",
        prepare=saved({"conv.weight": torch.zeros(8, 1, 3, 3), "conv.bias": torch.zeros(8)}),
    ),
    Row(
        "scalars",
        W,
        f"w.pth: 'fc1.weight' () and 'fc1.bias' () {NO_MAP}",
        prepare=saved({"fc1.weight": torch.tensor(1.0), "fc1.bias": torch.tensor(1.0)}),
    ),
    Row(
        "no units",
        W,
        f"w.pth: 'fc1.weight' (0, 784) and 'fc1.bias' (0,) {NO_MAP}",
        prepare=having({"fc1.weight": torch.zeros(0, 784), "fc1.bias": torch.zeros(0)}),
    ),
    Row(
        "a transposed weight",
        W,
        f"w.pth: 'fc1.weight' (784, 4) and 'fc1.bias' (4,) {NO_MAP}",
        prepare=having({"fc1.weight": torch.zeros(784, 4)}),
    ),
    Row(
        "a bias of another layer",
        W,
        f"w.pth: 'fc1.weight' (4, 784) and 'fc1.bias' (5,) {NO_MAP}",
        prepare=having({"fc1.bias": torch.zeros(5)}),
    ),
    Row(
        "layers that do not fit",
        W,
        "w.pth: 'fc2.weight' takes 5 inputs but the layer before gives 4",
        prepare=having({"fc2.weight": torch.zeros(10, 5)}),
    ),
    Row(
        "other inputs",
        W,
        "w.pth: the network takes 100 inputs, the data have 784",
        prepare=having({"fc1.weight": torch.zeros(4, 100)}),
    ),
    Row(
        "too few classes",
        W,
        "w.pth: the network tells 9 classes apart, the data have 10",
        prepare=having({"fc2.weight": torch.zeros(9, 4), "fc2.bias": torch.zeros(9)}),
    ),
    Row(
        "NaN",
        W,
        "w.pth: 'fc2.bias' contains NaN or infinity; the network is not usable",
        prepare=having({"fc2.bias": torch.full((10,), torch.nan)}),
    ),
    Row(
        "infinity",
        W,
        "w.pth: 'fc2.bias' contains NaN or infinity; the network is not usable",
        prepare=having({"fc2.bias": torch.full((10,), -torch.inf)}),
    ),
    Row(
        "beyond float32",
        W,
        "w.pth: some weights are beyond the range of float32; use --dtype float64",
        prepare=saved({n: t.double() + 1e300 for n, t in good().items()}),
    ),
    Row(
        "whole numbers",
        W,
        f"w.pth: 'fc2.bias' has dtype torch.int64; {KINDS}",
        prepare=having({"fc2.bias": torch.zeros(10, dtype=torch.int64)}),
    ),
    Row(
        "complex numbers",
        W,
        f"w.pth: 'fc2.bias' has dtype torch.complex64; {KINDS}",
        prepare=having({"fc2.bias": torch.zeros(10, dtype=torch.complex64)}),
    ),
    Row(
        "eighths of a number",
        W,
        f"w.pth: 'fc2.bias' has dtype torch.float8_e4m3fn; {KINDS}",
        prepare=having({"fc2.bias": torch.zeros(10).to(torch.float8_e4m3fn)}),
    ),
    Row(
        "a sparse tensor",
        W,
        "w.pth: 'fc1.weight' has the layout torch.sparse_coo; save a dense tensor",
        prepare=having({"fc1.weight": torch.zeros(4, 784).to_sparse()}),
    ),
    Row(
        "a tensor without values",
        W,
        "w.pth: 'fc1.weight' has no values; save a dense tensor",
        prepare=having({"fc1.weight": torch.zeros(4, 784, device="meta")}),
    ),
    Row(
        "a shape without numbers",
        W,
        "w.pth: 'fc1.weight' holds fewer numbers than its shape; save a contiguous copy",
        prepare=having({"fc1.weight": torch.zeros(1).expand(10**6, 10**6)}),
    ),
    Row(
        "of a GPU that is not here",
        W,
        f"w.pth: 'fc2.bias' has dtype torch.int64; {KINDS}",
        prepare=moved_to_cuda,
    ),
    Row(
        "a reference of other widths",
        "train --reference w.pth",
        "objective.reference: w.pth has widths (784, 3, 10), model.hidden makes them (784, 4, 10); give weights of the same network",
        prepare=having(
            {
                "fc1.weight": torch.zeros(3, 784),
                "fc1.bias": torch.zeros(3),
                "fc2.weight": torch.zeros(10, 3),
            }
        ),
    ),
    Row(
        "a reference unlike the weights",
        f"spectrum {WEIGHTS} --reference w.pth --set model.hidden=[3]",
        f"objective.reference and {WEIGHTS} are not of the same shape",
        prepare=having(
            {
                "fc1.weight": torch.zeros(3, 784),
                "fc1.bias": torch.zeros(3),
                "fc2.weight": torch.zeros(10, 3),
            }
        ),
    ),
    Row(
        "no reference",
        "train --reference absent.pth",
        "cannot read weights from absent.pth: No such file or directory",
    ),
    Row(
        "a reference that is a folder",
        "sweep --reference test_data",
        "cannot read weights from test_data: Is a directory",
    ),
    Row(
        "a strength that is no number",
        f"spectrum {WEIGHTS} --l2 inf",
        "--l2: a strength must be a finite number, got inf",
    ),
    Row(
        "a strength beyond the names",
        f"spectrum {WEIGHTS} --l2 1e300",
        "--l2: a strength may be 1e+09 at most, got 1e+300",
    ),
    Row(
        "a branch from nowhere",
        "branch w.pth --to 0.02",
        "--l2: w.pth does not tell its strength; give it",
        prepare=saved(good()),
    ),
    Row(
        "a branch to nowhere",
        f"branch {WEIGHTS} --to inf",
        "--to: a strength must be a finite number, got inf",
    ),
    Row(
        "a branch without steps",
        f"branch {WEIGHTS} --to 0.02 --step 0",
        "--step: must be above 0, got 0",
    ),
    Row(
        "a name too long for what is written beside it",
        "spectrum " + "w" * 240 + ".pth",
        "cannot write results/…: File name too long; …",
        code=5,
        prepare=lambda here: torch.save(good(), here / ("w" * 240 + ".pth")),
    ),
)


@rows(*TABLE)
def test_bad_weights_are_told_in_one_line(row: Row, stage: Stage, monkeypatch: MonkeyPatch):
    stage.play(row, monkeypatch)

    assert not (stage.folder / "canary").exists()


def test_the_trap_of_the_table_works(tmp_path: Path, monkeypatch: MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    pickle.loads(pickle.dumps(Trap()))

    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["two words.pth", "line\nfeed.pth", "λ→∞ 🙂.pth", "\udcff.pth"])
def test_other_precisions_and_names_are_fine(
    stage: Stage, monkeypatch: MonkeyPatch, dtype: torch.dtype, name: str
):
    torch.save({key: tensor.to(dtype) for key, tensor in good().items()}, stage.folder / "w.pth")
    (stage.folder / "w.pth").rename(stage.folder / name)
    monkeypatch.chdir(stage.folder)

    code, _out, err = stage.run("spectrum", name, "--l2", "0.01", "--quiet")

    assert (code, err) == (0, "")
    written = {path.name for path in (stage.folder / "results").iterdir()}
    assert f"Hessian-eigenvalues-{name.removesuffix('.pth')}.csv" in written
