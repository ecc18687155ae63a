"""The plan: file labels, and what a result is bound to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectra import plan as module
from spectra.params import Params, flatten, load
from spectra.plan import Plan, code_digest, decisive, plan, strength_labels

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "spectra"
OTHER = {
    "model.hidden": [8], "model.activation": "tanh", "objective.penalty": "half",
    "train.optimizer": "sgd", "train.lr": 0.5, "train.momentum": 0.5, "train.batch_size": 7,
    "train.max_epochs": 7, "train.patience": 7, "train.monitor": "cross_entropy",
    "train.threads": 7, "train.stack": 7, "sweep.protocol": "independent", "spectrum.k": 7,
    "spectrum.rtol": 0.5, "spectrum.max_products": 7, "spectrum.solver": "eigsh",
    "spectrum.product": "autodiff", "spectrum.merge_units": False, "runtime.seed": 7,
    "polish.enabled": True, "polish.tolerance": 0.5, "polish.max_products": 7,
    "polish.dtype": "float64",
    "certificate.pairs": "all", "certificate.probe": 7, "certificate.stationary": 0.5,
    "runtime.device": "auto", "runtime.dtype": "float64", "runtime.threads": 7,
    "data.mean": 0.5, "data.std": 0.5, "artifacts.eigenvectors": "npy",
}  # fmt: skip
"""A value other than the default for every parameter that decides what a result is."""
INDIFFERENT = {
    "data.name": "x", "data.root": "x", "data.source": "pypi", "data.folder": "x",
    "objective.reference": "the-digest-of-its-contents-counts.pth", "artifacts.out": "x",
    "artifacts.report": "x", "tracking.enabled": False, "tracking.uri": "x",
    "tracking.experiment": "x", "tracking.log_eigenvectors": True,
}  # fmt: skip
GRID = {"sweep.l2_min", "sweep.l2_max", "sweep.points", "sweep.strengths", "sweep.ids",
        "sweep.direction"}  # fmt: skip


def laid(
    *, data: str = "d", reference: str | None = None, stack: int = 1, **settings: object
) -> Plan:
    chosen = {"sweep.strengths": [0.0, 0.1, 0.2]}
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    params = load(None, environ={}, overrides=chosen)
    return plan(params, data_digest=data, reference_digest=reference, stack=stack)


def digests(found: Plan, replicate: int = 1) -> list[str]:
    return [task.digest for task in found.chains[replicate]]


# -------------------------------------------------------------------------------------- labels


def test_labels_have_five_decimals():
    assert strength_labels([0.0, 0.0002, 0.09]) == {
        0.0: "0.00000",
        0.0002: "0.00020",
        0.09: "0.09000",
    }
    assert strength_labels([1e-6]) == {1e-6: "0.00000"}


def test_labels_get_only_the_decimals_that_tell_them_apart():
    assert strength_labels([0.0, 1e-6]) == {0.0: "0.000000", 1e-6: "0.000001"}
    assert strength_labels([0.1, 0.1 + 1e-9])[0.1] == "0.100000000"
    close = strength_labels([1e-30, 2e-30])
    assert [float(label) for label in close.values()] == [1e-30, 2e-30]


@given(st.lists(st.floats(0, 1e6), unique=True, min_size=1, max_size=40))
def test_labels_are_distinct_and_no_longer_than_needed(strengths: list[float]):
    labels = strength_labels(strengths)

    assert len(set(labels.values())) == len(labels)
    (count,) = {len(label.partition(".")[2].partition("e")[0]) for label in labels.values()}
    for fewer in range(5, 18 if "e" in labels[strengths[0]] else count):
        assert len({f"{l2:.{fewer}f}" for l2 in strengths}) < len(strengths)


# ------------------------------------------------------------------------------------- digests


def test_every_parameter_has_its_place_in_these_tests():
    """A new parameter must be put among the decisive or the indifferent ones."""
    assert set(OTHER) | set(INDIFFERENT) | GRID == set(flatten(Params()))


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_decisive_parameter_changes_every_digest(name: str):
    assert flatten(Params())[name] != OTHER[name]

    assert not set(digests(laid(**{name: OTHER[name]}))) & set(digests(laid()))


@pytest.mark.parametrize("name", sorted(INDIFFERENT))
def test_where_things_lie_changes_no_digest(name: str):
    assert flatten(Params())[name] != INDIFFERENT[name]

    assert laid(**{name: INDIFFERENT[name]}).digest == laid().digest


def test_data_and_reference_point_are_bound_by_content():
    assert not set(digests(laid(data="e"))) & set(digests(laid()))
    assert not set(digests(laid(reference="r"))) & set(digests(laid()))
    assert not set(digests(laid(reference="s"))) & set(digests(laid(reference="r")))


def test_the_code_is_bound(monkeypatch: pytest.MonkeyPatch):
    before = digests(laid())

    monkeypatch.setattr(module, "code_digest", lambda: "another")

    assert not set(digests(laid())) & set(before)


def test_a_chain_depends_on_what_came_before_and_on_nothing_after():
    short, long = digests(laid()), digests(laid(sweep__strengths=[0.0, 0.1, 0.2, 0.3]))
    other = digests(laid(sweep__strengths=[0.0, 0.15, 0.2]))

    assert long[:3] == short
    assert other[0] == short[0]
    assert other[2] != short[2]


def test_an_independent_strength_does_not_know_the_grid():
    grid = laid(sweep__protocol="independent")
    alone = laid(sweep__protocol="independent", sweep__strengths=[0.2], sweep__direction="down")

    assert digests(alone)[0] == digests(grid)[2]
    assert all(task.previous is None for task in grid.tasks)


def test_direction_orders_a_chain_and_links_it():
    down = laid(sweep__direction="down").chains[1]

    assert [task.l2 for task in down] == [0.2, 0.1, 0.0]
    assert [task.previous for task in down] == [None, *down[:2]]
    assert not set(digests(laid())) & {task.digest for task in down}


def test_replicates_are_chains_of_their_own():
    both = laid(sweep__ids=[2, 1])

    assert [task.key for task in both.tasks] == [
        "2-0.00000", "2-0.10000", "2-0.20000", "1-0.00000", "1-0.10000", "1-0.20000",
    ]  # fmt: skip
    assert len({task.digest for task in both.tasks}) == 6
    assert digests(both, 2) == digests(laid(sweep__ids=[2]), 2)
    assert both.digest != laid().digest


def test_stacks_follow_from_the_grid_alone():
    """Replicates side by side in a chain, strengths in their order where they are independent."""
    independent = laid(stack=2, sweep__protocol="independent", sweep__ids=[1, 2])
    chained = laid(stack=2, sweep__ids=[1, 2, 3])

    members = [[(t.replicate, t.l2) for t in group] for group in independent.groups]
    assert members == [[(1, 0.0), (1, 0.1)], [(1, 0.2), (2, 0.0)], [(2, 0.1), (2, 0.2)]]
    members = [[(t.replicate, t.l2) for t in group] for group in chained.groups]
    assert members == [
        [(1, 0.0), (2, 0.0)], [(1, 0.1), (2, 0.1)], [(1, 0.2), (2, 0.2)],
        [(3, 0.0)], [(3, 0.1)], [(3, 0.2)],
    ]  # fmt: skip
    first, second, _ = chained.chains[2]
    assert second.previous is first
    assert len({task.digest for task in chained.tasks}) == 9


def test_a_member_of_a_stack_is_bound_to_those_beside_it():
    """Whom it trains with can change its last bits; alone it is bound to nobody."""
    alone = laid(sweep__ids=[1])
    assert digests(laid(stack=4, sweep__ids=[1])) == digests(alone)
    assert digests(laid(stack=1, sweep__ids=[1, 2])) == digests(alone)
    assert not set(digests(laid(stack=4, sweep__ids=[1, 2]))) & set(digests(alone))
    pair, trio = (laid(stack=4, sweep__ids=ids) for ids in ([1, 2], [1, 2, 3]))
    assert not set(digests(pair)) & set(digests(trio))


def test_the_parameters_of_a_plan_are_those_of_its_digests():
    params = Params()
    bound = decisive(params, data_digest="d", reference_digest="r")

    assert laid(reference="r").parameters == bound
    assert bound["objective.reference"] == "r"
    assert set(bound) - {"data.digest", "code", "objective.reference"} == set(OTHER)


# ---------------------------------------------------------------------------------------- code


def test_every_module_of_the_numerics_is_bound():
    """Beside the curvature: what trains, what chooses products and tolerances, what makes the rows.

    The curvature of any network is for Python alone; that the sweep does not use it is what the
    next test sees.
    """
    any_network = {
        "batch_graph.py", "batch_loss.py", "batches.py", "fully_connected.py", "module.py",
        "module_operator.py", "point.py",
    }  # fmt: skip
    modules = {
        "activations", "analysis", "backprop", "chunks", "data", "inputs", "mlp", "objective",
        "polishing", "runtime", "solve", "train", "workbench",
    }  # fmt: skip
    expected = {f"{name}.py" for name in modules} | {
        f"curvature/{path.name}"
        for path in (SOURCE / "curvature").glob("*.py")
        if path.name not in {"__init__.py", *any_network}  # the former is a docstring
    }

    assert expected <= set(module._NUMERICS)
    assert all((SOURCE / name).is_file() for name in module._NUMERICS)
    assert len(set(module._NUMERICS)) == len(module._NUMERICS)


def test_the_numerics_are_closed_under_import():
    """What a module of the numerics imports from the package decides numbers too.

    But for messages, the forms of files and parameters: the files' content is told by their
    digests, and every parameter that decides numbers is bound by its value.
    """
    harmless = {
        "artifacts.py", "checkpoint.py", "errors.py", "idx.py", "params.py", "plan.py",
        "provenance.py",
    }  # fmt: skip
    for name in module._NUMERICS:
        for node in ast.walk(ast.parse((SOURCE / name).read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "spectra"
            ):
                continue
            inside = node.module.removeprefix("spectra").replace(".", "/").lstrip("/")
            files = [f"{inside}.py"] if inside else [f"{alias.name}.py" for alias in node.names]
            for file in files:
                assert file in {*module._NUMERICS, *harmless}, f"{name} imports {file}"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the numerics, which `code_digest.__wrapped__` reads."""
    for name in module._NUMERICS:
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((SOURCE / name).read_bytes())
    monkeypatch.setattr(module, "__file__", str(tmp_path / "plan.py"))
    return tmp_path


def test_the_code_digest_feels_every_file(source: Path):
    seen = {code_digest.__wrapped__()}

    assert seen == {code_digest()}
    for name in module._NUMERICS:
        with (source / name).open("a") as file:
            file.write("\nSOMETHING = 1\n")
        seen.add(code_digest.__wrapped__())
    assert len(seen) == 1 + len(module._NUMERICS)


def test_the_code_digest_feels_a_number(source: Path):
    before = code_digest.__wrapped__()
    path = source / "curvature" / "eigen.py"
    text = path.read_text()
    assert "ROUND_OFF = 32" in text

    path.write_text(text.replace("ROUND_OFF = 32", "ROUND_OFF = 33"))

    assert code_digest.__wrapped__() != before


def test_words_around_the_code_do_not_count(source: Path):
    before = code_digest.__wrapped__()
    path = source / "objective.py"
    text = path.read_text()

    path.write_text("# a comment\n" + text.replace('"""The objective: ', '"""The aim:   '))

    assert path.read_text().count("The aim") == 1
    assert code_digest.__wrapped__() == before


def test_dvc_watches_the_numerics():
    from ruamel.yaml import YAML

    stage = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["sweep"]
    watched = {dependency for dependency in stage["deps"] if dependency.startswith("src/")}

    for name in module._NUMERICS:
        path = Path("src/spectra") / name
        assert {str(path), str(path.parent)} & (watched - {"src/spectra"})


def test_dvc_watches_every_decisive_parameter():
    from ruamel.yaml import YAML

    watched = set(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["sweep"]["params"])

    for name in {*OTHER, *GRID, "objective.reference"}:
        assert name in watched or name.split(".")[0] in watched
