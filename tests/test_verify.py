"""A folder rechecked: every planted defect is named and nothing else; a sweep redoes just it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from conftest import Command, tiny_params
from snapshots import contents
from spectra import artifacts, inspection, verify
from spectra.artifacts import Store
from spectra.errors import UsageError
from spectra.params import Params
from spectra.progress import Silent
from spectra.verify import Verified
from sweeps import sweep

Tiny = Callable[..., Params]
KEY = "1-0.00200"
WEIGHTS = artifacts.weights_name(KEY)
VALUES, MANIFEST = artifacts.eigenvalues_name(KEY), artifacts.manifest_name(KEY)


def check(
    params: Params, folder: Path, *, sample: int | None = 0, repair: bool = False
) -> Verified:
    return verify.verify(params, Store(folder), sample=sample, repair=repair, progress=Silent())


@pytest.fixture(scope="module", params=["csv", pytest.param("npy", marks=pytest.mark.slow)])
def done(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sample_root: Path
) -> Path:
    """A finished sweep of three strengths, which no test changes."""
    folder = tmp_path_factory.mktemp("sweep") / "r"
    sweep(tiny_params(sample_root, artifacts__out=str(folder),
                      artifacts__eigenvectors=request.param))  # fmt: skip
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(done, tmp_path / "r"))


def form_of(folder: Path) -> str:
    return "npy" if any(folder.glob("*.npy")) else "csv"


def bind(folder: Path, *names: str, **fields: object) -> None:
    """Have the manifest vouch for files as they are now: only their meaning can give them away."""
    path = folder / MANIFEST
    manifest = orjson.loads(path.read_bytes())
    for name in names:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {
            "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        }  # fmt: skip
    for field, value in fields.items():
        manifest[field] = value
    del manifest["seal"]
    path.write_bytes(artifacts.manifest_bytes(manifest))


def test_a_good_folder_has_no_faults(tiny: Tiny, done: Path):
    before = contents(done)

    found = check(tiny(), done, sample=None)

    assert found.faults == ()
    assert found.results == 3
    assert found.sampled == ("1-0.00000", "1-0.00200", "1-0.01000")
    assert contents(done) == before


def test_a_sample_is_spread_over_the_folder(tiny: Tiny, done: Path):
    assert check(tiny(), done, sample=2).sampled == ("1-0.00000", "1-0.01000")
    assert check(tiny(), done, sample=0).sampled == ()


def test_a_folder_without_results_is_refused(tiny: Tiny, tmp_path: Path):
    with pytest.raises(UsageError, match="holds no results; name a sweep's folder"):
        check(tiny(), tmp_path)


# ------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(
    "name", ["model_weights-{}.pth", "Hessian-eigenvalues-{}.csv", "Hessian-eigenvectors-{}.{}",
             "gradients-{}.csv", "history-{}.csv", "certificate-{}.json"],
)  # fmt: skip
@pytest.mark.parametrize("defect", ["missing", "short", "flipped"])
def test_a_damaged_file_is_named_and_just_its_result_redone(
    tiny: Tiny, copy: Path, done: Path, name: str, defect: str
):
    """One flipped bit in the middle; the later strengths of the chain stay."""
    path = copy / name.format(KEY, form_of(copy))
    content = bytearray(path.read_bytes())
    if defect == "missing":
        path.unlink()
    elif defect == "short":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    found = check(tiny(), copy)

    (fault,) = found.faults
    assert (fault.key, fault.file) == (KEY, path.name)
    said = {"missing": "is missing", "short": "were written", "flipped": "SHA-256"}[defect]
    assert said in str(fault)

    assert check(tiny(), copy, repair=True).repaired == (KEY,)
    params = tiny(artifacts__out=str(copy), artifacts__eigenvectors=form_of(copy))
    assert sweep(params).reused == 2
    assert contents(copy) == contents(done)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"digest": "x"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_named_and_redone(tiny: Tiny, copy: Path, done: Path, content: bytes):
    (copy / MANIFEST).write_bytes(content)

    found = check(tiny(), copy)

    assert KEY in found.bad
    assert f"{MANIFEST}: is no manifest, or is not as it was written" in map(str, found.faults)
    check(tiny(), copy, repair=True)
    params = tiny(artifacts__out=str(copy), artifacts__eigenvectors=form_of(copy))
    assert sweep(params).reused == 2
    assert contents(copy) == contents(done)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("field", "value"),
    [("files", []), ("files", None), ("files", {"a": 3}), ("files", {"a": {}}),
     ("files", {"../a": {"bytes": 1, "sha256": "0"}}), ("row", {}), ("row", None), ("row", [1]),
     ("parameters", None), ("eigenvalues", ["a"]), ("eigenvalues", []), ("eigenvalues", None),
     ("residuals", [1.0]), ("l2", "x"), ("label", 3), ("replicate", "1"), ("digest", None)],
)  # fmt: skip
def test_a_manifest_of_other_types_is_none(copy: Path, field: str, value: object, sealed: bool):
    """Also where it vouches for itself, or is from before manifests did."""
    manifest = orjson.loads((copy / MANIFEST).read_bytes()) | {field: value}
    del manifest["seal"]
    content = artifacts.manifest_bytes(manifest) if sealed else orjson.dumps(manifest)
    (copy / MANIFEST).write_bytes(content)

    assert Store(copy).record(KEY) is None
    assert len(Store(copy).records()) == 2


@pytest.mark.parametrize("field", ["row", "eigenvalues", "residuals", "parameters"])
def test_a_number_changed_in_a_manifest_is_noticed(tiny: Tiny, copy: Path, done: Path, field: str):
    """By the sweep too, which does the result again."""
    manifest = orjson.loads((copy / MANIFEST).read_bytes())
    if field in ("row", "parameters"):
        manifest[field][{"row": "Train_Loss", "parameters": "train.lr"}[field]] *= 1.0000001
    else:
        manifest[field][0] *= 1.0000001
    (copy / MANIFEST).write_bytes(orjson.dumps(manifest))

    assert KEY in check(tiny(), copy).bad
    params = tiny(artifacts__out=str(copy), artifacts__eigenvectors=form_of(copy))
    assert sweep(params).reused == 2
    assert contents(copy) == contents(done)


def test_a_manifest_without_a_seal_is_taken_at_its_word(tiny: Tiny, copy: Path):
    manifest = orjson.loads((copy / MANIFEST).read_bytes())
    del manifest["seal"]
    (copy / MANIFEST).write_bytes(orjson.dumps(manifest))

    assert check(tiny(), copy).faults == ()


def test_strays_and_leftovers_are_named_and_belong_to_no_result(tiny: Tiny, copy: Path):
    strays = ("model_weights-1-0.00300.pth", "Hessian-eigenvalues-4-0.00000.csv",
              "history-1-0.00200000.csv", ".manifest-1-0.00200.json.partial")  # fmt: skip
    for name in strays:
        (copy / name).write_bytes(b"")

    found = check(tiny(), copy, repair=False)

    assert {fault.file for fault in found.faults} == set(strays)
    assert found.bad == []


@pytest.mark.parametrize("defect", ["missing", "a line less", "another number", "a line more"])
def test_the_table_is_held_against_the_manifests(tiny: Tiny, copy: Path, defect: str):
    path = copy / "Model-1.csv"
    header, first, *rest = path.read_text().splitlines(keepends=True)
    if defect == "missing":
        path.unlink()
    elif defect == "a line less":
        path.write_text("".join([header, *rest]))
    elif defect == "another number":
        path.write_text("".join([header, first.replace("0.0,", "0.0,1", 1), *rest]))
    else:
        path.write_text("".join([header, first, *rest, first.replace("0.0,", "0.5,", 1)]))

    found = check(tiny(), copy)

    assert [fault.file for fault in found.faults] == ["Model-1.csv"]
    assert found.bad == []
    params = tiny(artifacts__out=str(copy), artifacts__eigenvectors=form_of(copy))
    assert sweep(params).reused == 3
    assert check(tiny(), copy).faults == ()


# ---------------------------------------------------------------- what the right bytes do not tell


@pytest.mark.parametrize("defect", ["value", "order", "count", "manifest"])
def test_eigenvalues_are_held_against_the_manifest(tiny: Tiny, copy: Path, defect: str):
    path = copy / VALUES
    values_K = np.loadtxt(path)
    changed_K = {
        "value": values_K * [1, 1, 1 + 1e-6], "order": values_K[::-1], "count": values_K[:-1],
        "manifest": values_K,
    }[defect]  # fmt: skip
    path.write_text("".join(f"{value!r}\n" for value in changed_K.tolist()))
    bind(copy, VALUES)
    if defect == "manifest":
        bind(copy, eigenvalues=[*values_K.tolist()[:-1], 0.0])

    assert f"{VALUES}: does not hold the eigenvalues of the manifest" in map(
        str, check(tiny(), copy).faults
    )


@pytest.mark.parametrize("defect", ["no state_dict", "a layer less", "another width"])
def test_weights_are_those_of_the_network(tiny: Tiny, copy: Path, defect: str):
    path = copy / WEIGHTS
    state = torch.load(path, weights_only=True)
    if defect == "a layer less":
        state.popitem()
        state.popitem()
    elif defect == "another width":
        state = {name: torch.cat([t, t])[: t.shape[0] + 1] if "fc1" in name else t
                 for name, t in state.items()}  # fmt: skip
    torch.save([1, 2] if defect == "no state_dict" else state, path)
    bind(copy, WEIGHTS)

    found = check(tiny(), copy, sample=3)

    assert found.bad == [KEY]
    assert found.faults[0].file == WEIGHTS


@pytest.mark.parametrize("defect", ["a vector", "a swap", "a row less", "weights", "nan"])
def test_recomputing_finds_what_every_digest_agrees_with(tiny: Tiny, copy: Path, defect: str):
    form = form_of(copy)
    name = artifacts.eigenvectors_name(KEY, form)
    vectors_KP = np.loadtxt(copy / name, delimiter=",") if form == "csv" else np.load(copy / name)
    vectors_KP = vectors_KP.astype(np.float32)
    if defect == "a vector":
        vectors_KP[1] += 1e-2 * np.random.default_rng(0).normal(size=vectors_KP.shape[1]) / 80
    elif defect == "a swap":
        vectors_KP = vectors_KP[[1, 0, 2]]
    elif defect == "a row less":
        vectors_KP = vectors_KP[:2]
    elif defect == "nan":
        vectors_KP[2, 5] = np.nan
    else:
        state = torch.load(copy / WEIGHTS, weights_only=True)
        state["fc2.weight"][3, 2] += 0.05
        torch.save(state, copy / WEIGHTS)
    if form == "npy":
        np.save(copy / name, vectors_KP)
    else:
        np.savetxt(copy / name, vectors_KP, delimiter=",", fmt="%.9g")
    bind(copy, name, WEIGHTS)
    assert check(tiny(), copy, sample=0).faults == ()

    found = check(tiny(), copy, sample=None)

    assert found.bad == [KEY]
    assert check(tiny(), copy, sample=None, repair=True).repaired == (KEY,)
    params = tiny(artifacts__out=str(copy), artifacts__eigenvectors=form)
    assert sweep(params).reused == 2
    assert check(tiny(), copy, sample=None).faults == ()


def test_results_are_recomputed_under_their_own_parameters(tiny: Tiny, copy: Path):
    """Those asked for may be another network's; only where the data are is taken from them."""
    assert check(tiny(model__hidden=[5, 4], model__activation="tanh"), copy, sample=1).faults == ()


def test_other_data_are_said(tiny: Tiny, copy: Path):
    manifest = orjson.loads((copy / MANIFEST).read_bytes())
    bind(copy, parameters=manifest["parameters"] | {"data.digest": "another"})

    found = check(tiny(), copy, sample=None)

    assert found.bad == [KEY]
    assert "belongs to other data (another, here " in str(found.faults[0])


def test_vectors_read_back_as_they_were_found(done: Path):
    """Within the precision they were written in, orthonormal."""
    (record, *_) = Store(done).records()
    vectors_KP = inspection.read_vectors(Store(done), record)

    assert vectors_KP is not None
    assert vectors_KP.dtype == np.float32
    np.testing.assert_allclose(vectors_KP @ vectors_KP.T, np.eye(3), atol=1e-5)


# ---------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_says_what_is_bad_and_the_next_sweep_redoes_it(command: Command):
    """Exit codes 0, 5, 0 with the repair, 0 again; the JSON says what the lines say."""
    assert command("sweep", "--no-report", "--no-track", "--quiet").returncode == 0
    folder = command.folder / "test_data"
    before = contents(folder)

    good = command("verify", "--sample", "1")
    assert good.returncode == 0, good.stderr
    assert good.stdout == "3 results, 0 bad; pairs recomputed of 1: 1-0.00000\n"

    (folder / VALUES).write_bytes(before[VALUES][:-3])
    bad = command("verify", "--sample", "0", "--json")
    assert bad.returncode == 5
    told = orjson.loads(bad.stdout)
    assert told["bad"] == [KEY]
    assert [fault["file"] for fault in told["faults"]] == [VALUES]

    repaired = command("verify", "--sample", "0", "--repair")
    assert repaired.returncode == 0
    assert repaired.stdout.splitlines()[0].startswith(f"{VALUES}: has ")
    assert "1 results taken away" in repaired.stderr
    assert command("sweep", "--no-report", "--no-track", "--quiet").returncode == 0
    assert contents(folder) == before


def test_a_sample_that_is_no_number_is_refused(command: Command):
    for sample in ("-1", "some", "1.5", ""):
        ended = command("verify", f"--sample={sample}")
        assert ended.returncode == 2
        assert ended.stderr.startswith("spectra: --sample: a number of results, 0 or more, or all")
