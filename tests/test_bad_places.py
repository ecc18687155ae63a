"""Folders that results cannot come from or go to: one line each."""
# ruff: noqa: E501  (a row is a line)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pytest import MonkeyPatch

from bad_input import WEIGHTS, Row, Stage, params, results, rows

ANOTHER = "choose another with --out"
EMPTY = "a folder needs a name, got ''; see `spectra"


def manifests(act: Callable[[Path], object]) -> Callable[[Path], object]:
    """A folder `old` of damaged copies of the manifests alone."""

    def prepare(here: Path) -> None:
        (here / "old").mkdir()
        for path in (here / "test_data").glob("manifest-*"):
            (here / "old" / path.name).write_bytes(path.read_bytes())
            act(here / "old" / path.name)

    return prepare


def text(content: bytes) -> Callable[[Path], object]:
    return manifests(lambda path: path.write_bytes(content))


NOTHING = "old holds no finished results to draw; run `spectra sweep` first, or name the folder a sweep wrote to"

TABLE = (
    Row("results under no name", "sweep --out ", f"--out: {EMPTY} sweep --help`"),
    Row("weights under no name", "train --out ", f"--out: {EMPTY} train --help`"),
    Row(
        "a spectrum under no name", f"spectrum {WEIGHTS} --out ", f"--out: {EMPTY} spectrum --help`"
    ),
    Row("a report under no name", "report --out ", f"--out: {EMPTY} report --help`"),
    Row("a report of no name", "report --results ", f"--results: {EMPTY} report --help`"),
    Row(
        "no name in the file",
        "sweep",
        "artifacts.out: a file or folder needs a name, and one without NUL, got ''",
        prepare=params("artifacts: {out: ''}\n"),
    ),
    Row(
        "NUL in the file",
        "sweep",
        "artifacts.out: a file or folder needs a name, and one without NUL, got 'a\\x00b'",
        prepare=params('artifacts: {out: "a\\0b"}\n'),
    ),
    Row(
        "NUL in the data's root",
        "data",
        "data.root: a file or folder needs a name, and one without NUL, got 'a\\x00b'",
        prepare=params('data: {root: "a\\0b"}\n'),
    ),
    Row(
        "NUL in the reference point",
        "train",
        "objective.reference: a file or folder needs a name, and one without NUL, got 'a\\x00b'",
        prepare=params('objective: {reference: "a\\0b"}\n'),
    ),
    Row(
        "results in a file",
        "sweep --out params.yaml",
        f"cannot write params.yaml: File exists; the path is a file, not a folder; {ANOTHER}",
        5,
    ),
    Row(
        "weights in a file",
        "train --out params.yaml",
        f"cannot write params.yaml: File exists; the path is a file, not a folder; {ANOTHER}",
        5,
    ),
    Row(
        "a spectrum in a file",
        f"spectrum {WEIGHTS} --out params.yaml",
        f"cannot write params.yaml: File exists; the path is a file, not a folder; {ANOTHER}",
        5,
    ),
    Row(
        "results under a file",
        "sweep --out params.yaml/x",
        "cannot write params.yaml/x: Not a directory; a part of the path is a file; choose another folder with --out",
        5,
    ),
    Row(
        "results where none can be",
        "sweep --out /proc/x",
        "cannot write /proc/x: No such file or directory; check the folder and run again: finished strengths are kept",
        5,
    ),
    Row(
        "results in a loop of links",
        "sweep --out loop",
        "cannot write loop: …; …",
        5,
        prepare=lambda here: (here / "loop").symlink_to("loop"),
    ),
    Row(
        "a name that is too long",
        "sweep --out " + "a" * 300,
        "cannot write aaa…: File name too long; check the folder and run again: finished strengths are kept",
        5,
    ),
    Row(
        "a report in a file",
        "report --out params.yaml",
        "cannot write params.yaml/…: File exists; the path is a file, not a folder; …",
        5,
    ),
    Row(
        "a report among the results",
        "report --out test_data",
        "artifacts: out and report are both test_data; give the report its own folder",
    ),
    Row(
        "a report among the results by another name",
        "report --out ./test_data/",
        "artifacts: out and report are both test_data; give the report its own folder",
    ),
    Row(
        "a report of nothing",
        "report --results absent",
        "absent holds no finished results to draw; run `spectra sweep` first, or name the folder a sweep wrote to",
    ),
    Row(
        "a report of a file",
        "report --results params.yaml",
        "params.yaml holds no finished results to draw; run `spectra sweep` first, or name the folder a sweep wrote to",
    ),
    Row(
        "a report of an empty folder",
        "report --results old",
        NOTHING,
        prepare=lambda here: (here / "old").mkdir(),
    ),
    Row("a report of empty manifests", "report --results old", NOTHING, prepare=text(b"")),
    Row(
        "a report of manifests cut short",
        "report --results old",
        NOTHING,
        prepare=manifests(lambda path: path.write_bytes(path.read_bytes()[:-40])),
    ),
    Row(
        "a report of manifests of other things",
        "report --results old",
        NOTHING,
        prepare=text(b'{"digest": 1, "files": []}'),
    ),
    Row(
        "a report of manifests that are lists",
        "report --results old",
        NOTHING,
        prepare=text(b"[1, 2]"),
    ),
    Row(
        "a report of manifests that are bytes",
        "report --results old",
        NOTHING,
        prepare=text(bytes(range(256))),
    ),
    Row(
        "a report of manifests without a row",
        "report --results old",
        NOTHING,
        prepare=manifests(
            lambda path: path.write_bytes(path.read_bytes().replace(b"Train_Loss", b"Train_Toss"))
        ),
    ),
    Row(
        "a report of manifests that are folders",
        "report --results old",
        NOTHING,
        prepare=manifests(lambda path: (path.unlink(), path.mkdir())),
    ),
    Row(
        "a table of another program",
        "sweep --out old",
        "old holds Model-1.csv of another program; choose another folder with --out, or delete them with --replace",
        prepare=lambda here: (
            (here / "old").mkdir(),
            (here / "old" / "Model-1.csv").write_text("L2,loss\n"),
        ),
    ),
    Row(
        "a sample in words",
        "verify --sample some",
        "--sample: a number of results, 0 or more, or all; got some",
    ),
    Row(
        "a negative sample",
        "verify --sample -1",
        "--sample: a number of results, 0 or more, or all; got -1",
    ),
)


@rows(*TABLE)
def test_bad_places_are_told_in_one_line(row: Row, stage: Stage, monkeypatch: MonkeyPatch):
    stage.play(row, monkeypatch)


def test_results_replace_links_and_leave_their_targets(stage: Stage, monkeypatch: MonkeyPatch):
    """A link out of the folder under a result's name must not become a way to write there."""
    target = stage.folder / "precious.txt"
    target.write_text("not to be written")
    (stage.folder / "new").mkdir()
    for name in ("Model-1.csv", "model_weights-1-0.01000.pth", "manifest-1-0.01000.json"):
        (stage.folder / "new" / name).symlink_to(target)
    monkeypatch.chdir(stage.folder)

    code, _, err = stage.run("sweep", "-q", "--no-report", "--out", "new", "--replace")

    assert (code, err) == (0, "")
    assert target.read_text() == "not to be written"
    assert not any(path.is_symlink() for path in (stage.folder / "new").iterdir())
    loaded = torch.load(stage.folder / "new" / "model_weights-1-0.01000.pth", weights_only=True)
    assert list(loaded) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert results(stage.folder) == stage.before
