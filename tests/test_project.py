"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import spectra
from spectra.curvature.eigen import EigenPairs

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "spectra").rglob("*.py"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))


def test_there_are_modules():
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_module_opens_with_a_docstring_and_is_short(path: Path):
    source = path.read_text(encoding="utf-8")

    assert ast.get_docstring(ast.parse(source))
    assert source.count("\n") <= 400


def test_versions_agree():
    (version,) = re.findall(r'^version = "(.+)"$', text("pyproject.toml"), re.MULTILINE)

    assert version == spectra.__version__
    assert re.findall(r"^version: (.+)$", text("CITATION.cff"), re.MULTILINE) == [version]
    assert f"[{version}]" in text("CHANGELOG.md") or "Unreleased" in text("CHANGELOG.md")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_make_targets_that_are_named_exist(name: str):
    """In code: `make X`, or a line that is a command."""
    body = text(name)
    named = set(re.findall(r"`make ([a-z-]+)", body))
    named |= set(re.findall(r"^(?:step |\$ | {4})?make ([a-z-]+)", body, re.MULTILINE))

    assert named <= targets()
    assert named or name == "README.md"


def test_every_target_is_phony_and_explained():
    makefile = text("Makefile")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)

    assert set(phony.split()) == targets()
    assert set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) == targets()


def test_the_check_before_a_change_is_bash_and_checks():
    lines = text(".ci/run").splitlines()

    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert {"step make check", "step make test"} <= set(lines)


def test_stages_name_files_that_exist():
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]

    assert list(stages) == ["data", "sweep", "summary"]
    for name, stage in stages.items():
        sources = [path for path in stage["deps"] if path.startswith("src/")]
        assert sources, name
        assert all((ROOT / path).exists() for path in sources), name
        assert len(set(stage["deps"])) == len(stage["deps"]), name
        assert stage["cmd"].startswith("spectra ")


def test_stages_name_parameters_that_exist():
    from ruamel.yaml import YAML

    from spectra.params import Params, flatten

    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    known = set(flatten(Params())) | set(Params.model_fields)
    used = set(re.findall(r"\$\{(\w[\w.]+)\}", text("dvc.yaml")))

    assert used
    assert used.union(*(stage.get("params", []) for stage in stages.values())) <= known


def test_stages_run_commands_that_exist():
    from ruamel.yaml import YAML
    from typer.testing import CliRunner

    from spectra.cli import app

    for stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values():
        _, command, *flags = stage["cmd"].split()
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert all(flag in shown.stdout for flag in flags)


def test_the_report_stage_lists_what_the_report_writes():
    from spectra.report import figures

    drawn = {f"{name}.{form}" for name in figures.NAMES for form in ("svg", "png")}
    listed = set(re.findall(r"^ +- \$\{artifacts\.report\}/([\w.]+)$", text("dvc.yaml"),
                            re.MULTILINE))  # fmt: skip

    assert listed == drawn | {"summary.md", "summary.json", "sweep.csv"}


def test_the_supported_pythons_agree():
    project = text("pyproject.toml")

    assert 'requires-python = ">=3.10"' in project
    assert 'target-version = "py310"' in project
    assert 'python_version = "3.10"' in project
    assert "(3, 10)" in text("Makefile")
    assert sys.version_info >= (3, 10)


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]):
    """The convolutional example, as it stands: ten converged values and the smallest."""
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
        if "eigenpairs_of" in block
    )
    names: dict[str, object] = {}

    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own text

    pairs = names["pairs"]
    assert isinstance(pairs, EigenPairs)
    assert pairs.values_K.shape == (10,)
    assert pairs.converged_K.all()
    assert capsys.readouterr().out
