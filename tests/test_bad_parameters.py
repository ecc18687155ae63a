"""Bad parameters, from flags, the environment and `params.yaml`: one line each."""
# ruff: noqa: E501  (a row is a line)

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pytest import MonkeyPatch

from bad_input import Row, Stage, params, rows

FLAGS = (
    # --- the words themselves
    Row("a misspelt command", "swep", "no such command 'swep'. Did you mean 'sweep'? see `spectra --help`"),
    Row("a misspelt flag", "sweep --pionts 3", "no such option: --pionts; did you mean '--points'? see `spectra sweep --help`"),
    Row("a flag without its value", "train --lr", "option '--lr' requires an argument; see `spectra --help`"),
    Row("a value for a switch", "sweep --replace=3", "option '--replace' does not take a value; see `spectra --help`"),
    Row("text for a whole number", "sweep --points x", "--points: …integer…'x'; see `spectra sweep --help`"),
    Row("a fraction for a whole number", "sweep --k 2.5", "--k: …integer…'2.5'; see `spectra sweep --help`"),
    Row("text for a number", "train --lr x", "--lr: …number…'x'; see `spectra train --help`"),
    Row("a word too many", "data now", "got unexpected extra argument…(now); see `spectra data --help`"),
    Row("no weights named", "spectrum", "WEIGHTS: is missing; see `spectra spectrum --help`"),
    Row("a negative strength", "train --l2 -1", "--l2: …0…'-1'; see `spectra train --help`"),
    Row("a negative replicate", "train --id -1", "--id: …0…'-1'; see `spectra train --help`"),
    Row("an infinite strength", "train --l2 inf", "--l2: a strength must be a finite number, got inf"),
    Row("a strength that is no number", "train --l2 nan", "--l2: …'nan'; see `spectra train --help`"),
    Row("a huge replicate", f"train --id {2**70}", "--id: …9223372036854775807…; see `spectra train --help`"),
    Row("a huge strength", "train --l2 1e300", "--l2: a strength may be 1e+09 at most, got 1e+300"),
    Row("a huge strength among others", "sweep --strengths 1,1e300", "sweep.strengths.1: input should be less than or equal to 1000000000, got 1e+300"),
    Row("another grid than the one there", "sweep --strengths 0,1e-300", "test_data holds 2 results of other parameters (another grid of strengths); choose another folder with --out, or delete them with --replace"),
    Row("other parameters than those there", "sweep --lr 0.5", "test_data holds 2 results of other parameters (train.lr is 0.5, theirs 0.0015); choose another folder with --out, or delete them with --replace"),
    # --- --set
    Row("--set without =", "train --set train.lr", "--set train.lr: write SECTION.KEY=VALUE, as train.lr=0.001"),
    Row("--set without a key", "train --set =3", "'' is not a parameter; write SECTION.KEY=VALUE, for example train.lr=0.001"),
    Row("--set without a section", "train --set lr=1", "'lr' is not a parameter; write SECTION.KEY=VALUE, for example train.lr=0.001"),
    Row("--set of a misspelt key", "train --set train.lrr=1", "unknown parameter 'train.lrr'; did you mean 'train.lr'?"),
    Row("--set of a misspelt section", "train --set trian.lr=1", "unknown section 'trian'; did you mean 'train'?"),
    Row("--set of a line feed", ("train", "--set", "train.a\nb=1"), "unknown parameter 'train.a\\nb'; did you mean 'train.lr'?"),
    Row("--set of a terminal command", ("train", "--set", "train.\x1b[2J=1"), "unknown parameter 'train.\\x1b[2J'; did you mean 'train.lr'?"),
    # --- out of range, a section after the other
    Row("a name that leaves the folder", "data --name ../x", "data.name: …"),
    Row("an absolute name", "data --name /etc", "data.name: …"),
    Row("an unknown source", "data --source web", "data.source: input should be 'auto', 'folder', 'torchvision' or 'pypi', got 'web'"),
    Row("no spread", "train --set data.std=0", "data.std: input should be greater than 0, got 0"),
    Row("a mean that is no number", "train --set data.mean=.nan", "data.mean: input should be a finite number, got nan"),
    Row("no unit", "train --hidden 0", "model.hidden.0: input should be greater than or equal to 1, got 0"),
    Row("fewer than no unit", "train --hidden 8,-3", "model.hidden.1: input should be greater than or equal to 1, got -3"),
    Row("units in words", "train --hidden eight", "model.hidden.0: input should be a valid integer, got 'eight'"),
    Row("a million units", "train --hidden 1000000", "model.hidden.0: input should be less than or equal to 65536, got 1000000"),
    Row("layers without end", "train --hidden " + ",".join(["1"] * 3000), "model.hidden: tuple should have at most 64 items after validation, not 3000, got …"),
    Row("an unknown activation", "train --activation sigmod", "model.activation: input should be 'sigmoid', 'tanh', 'relu' or 'gelu', got 'sigmod'; did you mean 'sigmoid'?"),
    Row("an unknown penalty", "train --penalty both", "objective.penalty: input should be 'full' or 'half', got 'both'"),
    Row("an unknown optimiser", "train --optimizer lbfgs", "train.optimizer: input should be 'adam' or 'sgd', got 'lbfgs'"),
    Row("no learning", "train --lr 0", "train.lr: input should be greater than 0, got 0.0"),
    Row("learning that is no number", "train --lr nan", "train.lr: input should be a finite number, got nan"),
    Row("all momentum", "train --set train.momentum=1", "train.momentum: input should be less than 1, got 1"),
    Row("an empty batch", "train --batch-size 0", "train.batch_size: input should be greater than or equal to 1, got 0"),
    Row("a huge batch", f"train --batch-size {2**70}", "train.batch_size: input should be less than 2147483648, got 1180591620717411303424"),
    Row("no epoch", "train --max-epochs 0", "train.max_epochs: input should be greater than or equal to 1, got 0"),
    Row("a huge number of epochs", f"train --max-epochs {2**70}", "train.max_epochs: input should be less than 2147483648, got 1180591620717411303424"),
    Row("no patience", "train --patience 0", "train.patience: input should be greater than or equal to 1, got 0"),
    Row("an unknown monitor", "train --set train.monitor=loss", "train.monitor: input should be 'objective' or 'cross_entropy', got 'loss'"),
    Row("an empty stack", "sweep --set train.stack=0", "train.stack: input should be greater than or equal to 1, got 0"),
    Row("an empty list of strengths", "sweep --strengths ", "sweep: strengths is empty; give at least one value"),
    Row("a strength twice", "sweep --strengths 0.1,0.10", "sweep: strengths names 0.1 twice; every value may stand there once"),
    Row("a strength nobody can tell from another", "sweep --strengths 0.1,0.10000000000000001", "sweep: strengths names 0.1 twice; every value may stand there once"),
    Row("nan among the strengths", "sweep --strengths 0.1,.nan", "sweep.strengths.1: input should be a finite number, got nan"),
    Row("infinity among the strengths", "sweep --strengths .inf", "sweep.strengths.0: input should be a finite number, got inf"),
    Row("a negative strength among others", "sweep --strengths 0.1,-0.1", "sweep.strengths.1: input should be greater than or equal to 0, got -0.1"),
    Row("strengths in words", "sweep --strengths some", "sweep.strengths.0: input should be a valid number, got 'some'"),
    Row("no point", "sweep --points 0", "sweep.points: input should be greater than or equal to 1, got 0"),
    Row("a huge number of points", f"sweep --points {2**70}", "sweep.points: input should be less than or equal to 1000000, got 1180591620717411303424"),
    Row("an upside-down range", "sweep --l2-min 0.3 --l2-max 0.1", "sweep: l2_max=0.1 is below l2_min=0.3; exchange them and use direction: down for a downward sweep"),
    Row("a range of one number", "sweep --points 3 --l2-min 0.1 --l2-max 0.1", "sweep: points=3 strengths do not fit between l2_min=0.1 and l2_max=0.1; use points: 1 or widen the range"),
    Row("an infinite range", "sweep --l2-max inf", "sweep.l2_max: input should be a finite number, got inf"),
    Row("a range from no number", "sweep --l2-min nan", "sweep.l2_min: input should be a finite number, got nan"),
    Row("a replicate twice", "sweep --ids 1,1", "sweep: ids names 1 twice; every value may stand there once"),
    Row("a negative replicate among others", "sweep --ids 1,-2", "sweep.ids.1: input should be greater than or equal to 0, got -2"),
    Row("no replicate", "sweep --ids ", "sweep: ids is empty; give at least one value"),
    Row("a huge replicate among others", f"sweep --ids {2**70}", "sweep.ids.0: input should be less than 9223372036854775808, got 1180591620717411303424"),
    Row("an unknown direction", "sweep --direction sideways", "sweep.direction: input should be 'up' or 'down', got 'sideways'"),
    Row("an unknown protocol", "sweep --protocol parallel", "sweep.protocol: input should be 'continuation' or 'independent', got 'parallel'"),
    Row("no pair", "sweep --k 0", "spectrum.k: input should be greater than or equal to 1, got 0"),
    Row("as many pairs as parameters", "sweep --k 3190", "spectrum.k: must be below the number of parameters, 3190, got 3190"),
    Row("as many pairs as the weights have", "spectrum test_data/model_weights-1-0.01000.pth --k 3190", "spectrum.k: must be below the number of parameters, 3190, got 3190"),
    Row("a tolerance of nothing", "sweep --rtol 0", "spectrum.rtol: input should be greater than 0, got 0.0"),
    Row("a tolerance that is no number", "sweep --rtol nan", "spectrum.rtol: input should be a finite number, got nan"),
    Row("a tolerance of anything", "sweep --rtol 1e9", "spectrum.rtol: input should be less than 1, got 1000000000.0"),
    Row("a tolerance below the round-off", "spectrum test_data/model_weights-1-0.01000.pth --rtol 1e-12", "spectrum.rtol: 1e-12 is below …, the round-off of the products measured at these weights; use spectrum.rtol=… or more, or runtime.dtype=float64"),
    Row("no product", "sweep --set spectrum.max_products=0", "spectrum.max_products: input should be greater than or equal to 1, got 0"),
    Row("an unknown solver", "sweep --set spectrum.solver=qr", "spectrum.solver: input should be 'lanczos' or 'eigsh', got 'qr'"),
    Row("certified pairs in words", "sweep --set certificate.pairs=some", "certificate.pairs: must be a number of pairs (0 or more), all, or null, got 'some'"),
    Row("a short probe", "sweep --set certificate.probe=1", "certificate.probe: input should be greater than or equal to 2, got 1"),
    Row("an unknown device", "train --device tpu", "runtime.device: input should be 'auto', 'cpu' or 'cuda', got 'tpu'; did you mean 'cpu'?"),
    Row("whole numbers for weights", "train --dtype int8", "runtime.dtype: input should be 'float32' or 'float64', got 'int8'"),
    Row("no thread", "train --threads 0", "runtime.threads: input should be greater than or equal to 1, got 0"),
    Row("ten thousand threads", "train --threads 10000", "runtime.threads: input should be less than or equal to 1024, got 10000"),
    Row("a negative seed", "train --seed -1", "runtime.seed: input should be greater than or equal to 0, got -1"),
    Row("a seed of 70 bits", f"train --seed {2**70}", "runtime.seed: input should be less than 9223372036854775808, got 1180591620717411303424"),
    Row("an unknown format", "sweep --eigenvectors txt", "artifacts.eigenvectors: input should be 'csv', 'npy' or 'none', got 'txt'"),
    Row("a number for a folder", "sweep", "artifacts.out: input should be a valid string, got 3", prepare=params("artifacts: {out: 3}\n")),
    Row("no experiment", "sweep --set tracking.experiment=''", "tracking.experiment: …"),
    Row("a number for a switch", "sweep --set tracking.enabled=1", "tracking.enabled: input should be a valid boolean, got 1"),
    # --- the environment
    Row("a misspelt variable", "train", "environment variable SPECTRA_TRAIN_LRR names no parameter; did you mean 'SPECTRA_TRAIN_LR'?; unset it or correct it", env={"SPECTRA_TRAIN_LRR": "1"}),
    Row("a variable of a misspelt section", "train", "environment variable SPECTRA_TRIAN_LR names no parameter; did you mean 'SPECTRA_TRAIN_LR'?; unset it or correct it", env={"SPECTRA_TRIAN_LR": "1"}),
    Row("an empty variable", "train", "train.lr: input should be a valid number, got None", env={"SPECTRA_TRAIN_LR": ""}),
    Row("a variable out of range", "train", "train.lr: input should be greater than 0, got -1", env={"SPECTRA_TRAIN_LR": "-1"}),
)  # fmt: skip

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def fifo(here: Path) -> None:
    os.mkfifo(here / "pipe")


FILES = (
    Row("no file", "train --params absent.yaml", "cannot read parameters from absent.yaml: No such file or directory; correct --params"),
    Row("an empty name", "train --params ", "cannot read parameters from .: Is a directory; correct --params"),
    Row("a folder", "train --params test_data", "cannot read parameters from test_data: Is a directory; correct --params"),
    Row("params.yaml a folder", "train", "cannot read parameters from params.yaml: Is a directory; correct --params", prepare=lambda here: ((here / "params.yaml").unlink(), (here / "params.yaml").mkdir())),
    Row("a pipe", "train --params pipe", "pipe is a pipe; write the parameters to a file", prepare=fifo),
    Row("bytes without end", "train --params /dev/zero", "/dev/zero has more than 1,048,576 bytes; it is no file of parameters"),
    Row("a name with NUL", ("train", "--params", "a\0b"), "…embedded null …, got 'a\\x00b'…"),
    Row("a name that is no text", ("train", "--params", "\udcff.yaml"), "cannot read parameters from \\udcff.yaml: No such file or directory; correct --params"),
    Row("a name with a line feed", ("train", "--params", "a\nb.yaml"), "cannot read parameters from a\\nb.yaml: No such file or directory; correct --params"),
    Row("a name that is too long", "train --params " + "a" * 300, "cannot read parameters from aaa…: File name too long; correct --params"),
    Row("a loop of links", "train --params loop", "cannot read parameters from loop: Too many levels of symbolic links; correct --params", prepare=lambda here: (here / "loop").symlink_to("loop")),
    Row("a list", "train", "params.yaml must hold sections of parameters, not a list", prepare=params("- lr\n")),
    Row("a word", "train", "params.yaml must hold sections of parameters, not a text", prepare=params("lr\n")),
    Row("a section that is a number", "train", "params.yaml: section 'train' must hold keys and values, not a number", prepare=params("train: 3\n")),
    Row("an empty section", "train", "params.yaml: section 'train' must hold keys and values, not …", prepare=params("train:\n")),
    Row("an unknown section", "train", "unknown section 'trian'; did you mean 'train'?", prepare=params("trian: {lr: 0.1}\n")),
    Row("an unknown key", "train", "unknown parameter 'train.learning_rate'; did you mean 'train.lr'?", prepare=params("train: {learning_rate: 0.1}\n")),
    Row("a key that is a number", "train", "train.1: keys should be strings, got 1", prepare=params("train: {1: 2}\n")),
    Row("a key that is a list", "train", "train.('a',): keys should be strings, got ('a',)", prepare=params("train: {[a]: 2}\n")),
    Row("a section that is null", "train", "None: keys should be strings, got None", prepare=params("null: {}\n")),
    Row("a number in quotes", "train", "train.lr: input should be a valid number, got '0.1'", prepare=params("train: {lr: '0.1'}\n")),
    Row("a list for a number", "train", "train.lr: input should be a valid number, got [0.1]", prepare=params("train: {lr: [0.1]}\n")),
    Row("keys and values for a number", "train", "train.lr: input should be a valid number, got keys and values", prepare=params("train: {lr: {a: 1}}\n")),
    Row("a date for a number", "train", "train.lr: input should be a valid number, got datetime.date(2001, 1, 1)", prepare=params("train: {lr: 2001-01-01}\n")),
    Row("a bracket left open", "train", "params.yaml is not valid YAML in line …", prepare=params("train: {lr: [1\n")),
    Row("tabs", "train", "params.yaml is not valid YAML in line …", prepare=params("train:\n\tlr: 1\n")),
    Row("a key twice", "train", "params.yaml is not valid YAML in line …", prepare=params("train: {lr: 1, lr: 2}\n")),
    Row("a section twice", "train", "params.yaml is not valid YAML in line …", prepare=params("train: {lr: 1}\ntrain: {lr: 2}\n")),
    Row("a tag that would run code", "train", "params.yaml is not valid YAML in line …", prepare=params("train: !!python/object/apply:os.system ['touch canary']\n")),
    Row("two documents", "train", "params.yaml is not valid YAML in line …", prepare=params("train: {lr: 1}\n---\ntrain: {lr: 2}\n")),
    Row("text in Latin-1", "train", "params.yaml is not valid YAML: …", prepare=lambda here: (here / "params.yaml").write_bytes("data: {name: é}\n".encode("latin-1"))),
    Row("bytes", "train", "params.yaml is not valid YAML: …", prepare=lambda here: (here / "params.yaml").write_bytes(bytes(range(256)) * 8)),
    Row("brackets without end", "train", "params.yaml is not valid YAML: maximum recursion depth exceeded…", prepare=params("[" * 5_000)),
    Row("a billion laughs", "train", "unknown section 'a'; known are data, …", prepare=params(BOMB)),
    Row("a billion laughs as a value", "train", "train.lr: input should be a valid number, got [[...], [...], …]", prepare=params(BOMB.replace("i: ", "train: {lr: ").rstrip("\n") + "}\n")),
    Row("an alias of itself", "train", "train.lr: input should be a valid number, got keys and values", prepare=params("train: &t {lr: *t}\n")),
    Row("a number of a million digits", "train", "params.yaml is not valid YAML: Exceeds the limit (4300…", prepare=params(f"runtime: {{seed: {'9' * 10_000}}}\n")),
    Row("a number in base sixty", "train", "runtime.seed: input should be a valid integer, got '1:30'", prepare=params("runtime: {seed: 1:30}\n")),
)  # fmt: skip
TABLE = FLAGS + FILES


@rows(*TABLE)
def test_bad_parameters_are_told_in_one_line(row: Row, stage: Stage, monkeypatch: MonkeyPatch):
    stage.play(row, monkeypatch)


def test_what_could_run_code_ran_none(stage: Stage, monkeypatch: MonkeyPatch):
    """The tag of the table's row asks for a file `canary`."""
    (row,) = (row for row in TABLE if row.name == "a tag that would run code")

    stage.play(row, monkeypatch)

    assert not (stage.folder / "canary").exists()


def test_a_network_beyond_the_memory(stage: Stage):
    """A terabyte; in a process that may have 16 GB, so that no kernel hands it out on credit."""
    words = "train --hidden " + ",".join(["65536"] * 60)
    told = "there is not enough memory: …; use a smaller network, …"

    stage.play_apart(Row("beyond the memory", words, told, code=6), {}, memory=1 << 34)


COLOURED = {"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1", "COLUMNS": "40", "TERM": "xterm-256color"}


@pytest.mark.parametrize(
    "name",
    ["a misspelt command", "a misspelt flag", "text for a whole number", "no weights named",
     "an unknown penalty", "as many pairs as parameters"],
)  # fmt: skip
def test_a_process_of_its_own_says_the_same(stage: Stage, name: str):
    """On a narrow terminal, in colour, and in a CI, where Typer would draw boxes."""
    (row,) = (row for row in TABLE if row.name == name)

    stage.play_apart(row, COLOURED)
