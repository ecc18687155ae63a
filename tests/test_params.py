"""Parameters: where each comes from, what is refused, and in which words."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spectra.errors import ParameterError
from spectra.params import Params, SweepParams, digest, flatten, load

ROOT = Path(__file__).parents[1]


def yaml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path | None = None, **given: dict[str, object]) -> str:
    with pytest.raises(ParameterError) as caught:
        load(path, **({"environ": {}} | given))
    text = str(caught.value)
    assert "\n" not in text
    assert 10 < len(text) < 500
    return text


def test_the_shipped_file_holds_exactly_the_defaults():
    assert load(ROOT / "params.yaml", environ={}) == Params()


@pytest.mark.parametrize("name", ["params.yaml", "sample/params.yaml"])
def test_shipped_files_name_every_key(name: str):
    from ruamel.yaml import YAML

    content = YAML(typ="safe").load(ROOT / name)

    assert {f"{s}.{k}" for s, keys in content.items() for k in keys} == set(flatten(Params()))


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    assert load(None, environ={}) == Params()


def test_the_file_of_the_folder_is_read_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "params.yaml").write_text("train: {lr: 0.25}\n")
    monkeypatch.chdir(tmp_path)

    assert load(None, environ={}).train.lr == 0.25


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path):
    file = yaml(tmp_path, "train: {lr: 0.25, patience: 9}\n")
    environ = {"SPECTRA_TRAIN_LR": "0.5", "PATH": "/bin"}

    assert load(None, environ={}).train.lr == 0.0015
    assert load(file, environ={}).train.lr == 0.25
    assert load(file, environ=environ).train.lr == 0.5
    assert load(file, environ=environ, overrides={"train.lr": 0.75}).train.lr == 0.75
    assert load(file, environ=environ, overrides={"train.lr": None}).train.lr == 0.5
    assert load(file, environ=environ).train.patience == 9


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SPECTRA_SWEEP_IDS", "[3, 4]")

    assert load(yaml(tmp_path, "")).sweep.ids == (3, 4)


def test_a_null_of_the_command_line_is_a_value(tmp_path: Path):
    file = yaml(tmp_path, "sweep: {strengths: [0.5]}\n")

    assert load(file, environ={}, overrides={"sweep.strengths": "null"}).sweep.strengths is None


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("2", 2.0)]
)
def test_small_numbers_are_numbers_everywhere(tmp_path: Path, text: str, value: float):
    file = yaml(tmp_path, f"train: {{lr: {text}}}\n")

    assert load(file, environ={}).train.lr == value
    assert load(None, environ={"SPECTRA_TRAIN_LR": text}).train.lr == value
    assert load(None, environ={}, overrides={"train.lr": text}).train.lr == value


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("trian: {lr: 0.1}", "did you mean 'train'?"),
        ("train: {learning_rate: 0.1, lrr: 1}", "unknown parameter 'train.learning_rate'"),
        ("train: {lrr: 0.1}", "did you mean 'train.lr'?"),
        ("train: {max_epoch: 3}", "did you mean 'train.max_epochs'?"),
        ("spectrum: {rtoll: 3}", "did you mean 'spectrum.rtol'?"),
        ("zzz: {}", "known are data, model"),
        ("objective: {penalty: ful}", "did you mean 'full'?"),
        ("model: {activation: sigmiod}", "did you mean 'sigmoid'?"),
    ],
)
def test_misspellings_name_the_nearest(tmp_path: Path, text: str, nearest: str):
    assert nearest in complaint(yaml(tmp_path, text))


def test_a_misspelt_variable_names_the_nearest():
    text = complaint(environ={"SPECTRA_TRAIN_LRR": "1"})

    assert "SPECTRA_TRAIN_LRR names no parameter" in text
    assert "did you mean 'SPECTRA_TRAIN_LR'?" in text
    assert "unset it" in text


@pytest.mark.parametrize("key", ["lr", ".lr", "train.", ""])
def test_an_override_needs_a_section_and_a_key(key: str):
    assert "SECTION.KEY=VALUE" in complaint(overrides={key: "1"})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.lr", "0", "greater than 0, got 0"),
        ("train.lr", "-1", "greater than 0, got -1"),
        ("train.lr", ".nan", "finite number, got nan"),
        ("train.lr", ".inf", "finite number, got inf"),
        ("train.lr", "fast", "valid number, got 'fast'"),
        ("train.lr", "nan", "valid number, got 'nan'"),
        ("train.lr", "true", "valid number, got True"),
        ("train.lr", "2001-99-99", "valid number, got '2001-99-99'"),
        ("train.lr", "!!int x", "valid number"),
        ("train.momentum", "1.0", "less than 1, got 1.0"),
        ("train.batch_size", "true", "valid integer, got True"),
        ("train.batch_size", "6.5", "valid integer, got 6.5"),
        ("train.batch_size", "0", "greater than or equal to 1, got 0"),
        ("train.threads", "1025", "less than or equal to 1024"),
        ("runtime.threads", "100000", "less than or equal to 1024"),
        ("runtime.seed", "-1", "greater than or equal to 0"),
        ("runtime.seed", str(2**63), "less than 9223372036854775808"),
        ("runtime.dtype", "float16", "got 'float16'"),
        ("model.hidden", "8", "valid tuple, got 8"),
        ("model.hidden", "[8, 0]", "model.hidden.1: input should be greater"),
        ("model.hidden", "[8.0]", "valid integer, got 8.0"),
        ("spectrum.rtol", "[1]", "valid number, got [1]"),
        ("sweep.strengths", "[]", "strengths is empty"),
        ("sweep.strengths", "[0.1, 0.10]", "names 0.1 twice"),
        ("sweep.strengths", "[0.1, .nan]", "finite number, got nan"),
        ("sweep.strengths", "[-0.1]", "greater than or equal to 0, got -0.1"),
        ("sweep.ids", "[]", "ids is empty"),
        ("sweep.ids", "[2, 1, 2]", "names 2 twice"),
        ("sweep.ids", "[true]", "valid integer, got True"),
        ("sweep.l2_max", "-1", "greater than or equal to 0, got -1"),
        ("sweep.l2_max", ".inf", "finite number, got inf"),
        ("sweep.l2_min", "0.5", "l2_max=0.09 is below l2_min=0.5; exchange them"),
        ("sweep.l2_min", "0.09", "points=451 strengths do not fit"),
        ("sweep.points", "0", "greater than or equal to 1"),
        ("sweep.points", "100000000000000", "less than or equal to 1000000"),
        ("data.name", "../x", "pattern"),
        ("tracking.experiment", "''", "at least 1 character"),
        ("tracking.enabled", "1", "valid boolean, got 1"),
    ],
)
def test_bad_values_are_refused_in_one_line(key: str, value: str, words: str):
    text = complaint(overrides={key: value})

    assert text.startswith(key.partition(".")[0])
    assert words in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- lr\n", "must hold sections of parameters, not a list"),
        ("lr\n", "not a text"),
        ("3\n", "not a number"),
        ("train: 3\n", "section 'train' must hold keys and values, not a number"),
        ("train:\n", "section 'train' must hold keys and values"),
        ("train: {lr: [1\n", "is not valid YAML"),
        ("train: {lr: 1, lr: 2}\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML"),
        ("train: {lr: 2001-99-99}\n", "is not valid YAML"),
        ("[" * 4000, "is not valid YAML"),
        ("1: {}\n", "keys should be strings"),
    ],
)
def test_files_that_are_not_parameters_are_refused(tmp_path: Path, text: str, words: str):
    assert words in complaint(yaml(tmp_path, text))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path):
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00train")

    assert "is not valid YAML" in complaint(tmp_path / "p.yaml")


def test_unreadable_paths_are_named(tmp_path: Path):
    assert "absent.yaml: No such file" in complaint(tmp_path / "absent.yaml")
    assert "Is a directory" in complaint(tmp_path)


@given(st.text(alphabet="0123456789-:. []{},!&*#'\"|>%@`eEinfNa_xbT?~\t\n", max_size=14))
def test_any_text_is_a_value_or_refused(text: str):
    try:
        loaded = load(None, environ={}, overrides={"train.lr": text})
    except ParameterError as error:
        assert "\n" not in str(error)
    else:
        assert math.isfinite(loaded.train.lr)
        assert loaded.train.lr > 0


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Params().train.lr = 2.0  # type: ignore[misc]


# ------------------------------------------------------------------------------------ the grid


def test_the_default_grid_is_that_of_the_paper_in_shortest_decimals():
    grid = SweepParams().grid()

    assert len(grid) == 451
    assert grid == tuple(float(f"{2 * i}e-4") for i in range(451))
    assert grid[2] == 0.0004
    assert (grid[0], grid[-1]) == (0.0, 0.09)


def test_downward_is_the_reverse_of_upward():
    assert SweepParams(direction="down").grid() == SweepParams().grid()[::-1]


def test_an_explicit_list_is_sorted_and_beats_the_range():
    given = SweepParams(strengths=(0.3, 0.0, 1e-7), points=4)

    assert given.grid() == (0.0, 1e-7, 0.3)
    assert given.model_copy(update={"direction": "down"}).grid() == (0.3, 1e-7, 0.0)


def test_one_point_is_the_smallest():
    assert SweepParams(points=1, l2_min=0.3, l2_max=0.3).grid() == (0.3,)


def test_minus_zero_is_zero():
    assert str(SweepParams(strengths=(-0.0,)).grid()) == "(0.0,)"


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(2, 60))
def test_a_grid_is_evenly_spaced_distinct_and_whole(low: float, high: float, points: int):
    try:
        sweep = SweepParams(l2_min=low, l2_max=high, points=points)
    except ValidationError:
        assert high <= low or (high - low) / (points - 1) <= 1e-14 * high
        return
    grid = sweep.grid()

    assert len(set(grid)) == points
    assert list(grid) == sorted(grid)
    assert grid[0] == pytest.approx(low, rel=1e-14)
    assert grid[-1] == pytest.approx(high, rel=1e-14)
    step = (high - low) / (points - 1)
    gaps = [b - a for a, b in pairwise(grid)]
    assert max(abs(gap - step) for gap in gaps) <= 1.1e-14 * high  # fifteen digits, twice


def test_a_width_of_a_few_bits_is_refused():
    """The strengths would be the same fifteen digits, and their files the same files."""
    text = complaint(overrides={"sweep.l2_min": 0.1, "sweep.l2_max": 0.1 + 1e-15})

    assert "strengths do not fit" in text


# ------------------------------------------------------------------------------------- digests


def test_a_digest_is_a_known_number_of_the_contents_alone():
    """The first digits of `printf '[{"a":1,"b":[0.5]}]' | sha256sum`."""
    assert digest({"b": [0.5], "a": 1}) == digest({"a": 1, "b": (0.5,)})
    assert digest({"a": 1, "b": [0.5]}) == "e0604397733d94cf"
    assert re.fullmatch("[0-9a-f]{16}", digest(Params()))


@pytest.mark.parametrize("name", sorted(flatten(Params())))
def test_a_digest_feels_every_parameter(name: str):
    changed = {
        "data.name": "x", "data.root": "x", "data.source": "pypi", "data.folder": "x",
        "model.activation": "tanh", "model.hidden": [8], "objective.penalty": "half",
        "objective.reference": "x", "train.optimizer": "sgd", "train.monitor": "cross_entropy",
        "train.momentum": 0.5, "sweep.strengths": [0.5], "sweep.ids": [2],
        "sweep.protocol": "independent", "sweep.direction": "down", "spectrum.solver": "eigsh",
        "spectrum.product": "autodiff", "spectrum.merge_units": False,
        "polish.enabled": True, "polish.dtype": "float64",
        "runtime.device": "auto", "runtime.dtype": "float64", "artifacts.out": "x",
        "artifacts.report": "x", "artifacts.eigenvectors": "npy", "tracking.enabled": False,
        "tracking.uri": "x", "tracking.experiment": "x", "tracking.log_eigenvectors": True,
        "sweep.l2_min": 0.01, "spectrum.rtol": 0.5,
    }.get(name, 7)  # fmt: skip

    other = load(None, environ={}, overrides={name: changed})

    assert flatten(other)[name] == changed
    assert digest(other) != digest(Params())


@pytest.mark.parametrize("text", ["2026", "1e3", "true", "a: b", "#1", "line\nfeed", " x ", "[a]"])
def test_the_name_of_a_folder_is_the_word_itself(text: str):
    """Words of the command line are read as YAML; a name must not become a number."""
    environ = {"SPECTRA_DATA_ROOT": text}

    assert load(None, environ={}, overrides={"artifacts.out": text}).artifacts.out == text
    assert load(None, environ={}, overrides={"data.folder": text}).data.folder == text
    assert load(None, environ=environ).data.root == text


@pytest.mark.parametrize(("text", "folder"), [("null", None), ("", None), ("'null'", "null")])
def test_no_folder_is_told_from_one_of_that_name(text: str, folder: str | None):
    assert load(None, environ={}, overrides={"data.folder": text}).data.folder == folder
