"""Every format by property: what is written is read back equal, and no bytes break a reader.

A reader meets random bytes and, more to the point, good files with a few bytes changed, cut out
or put in. It may return what it can make of them or refuse in its own words; anything else is a
traceback in somebody's terminal.
"""

from __future__ import annotations

import gzip
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ruamel.yaml import YAML

from spectra import artifacts, checkpoint, idx, mlp, plan
from spectra.artifacts import COLUMNS, Record, Store
from spectra.errors import DataError, ParameterError, SpectraError, WeightsError
from spectra.params import Params, flatten, load

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

finite = st.floats(allow_nan=False, allow_infinity=False)
single = st.floats(allow_nan=False, allow_infinity=False, width=32)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/\n:"), min_size=1, max_size=12)


def numbers(dtype: type, shape: st.SearchStrategy[tuple[int, ...]]) -> st.SearchStrategy[Any]:
    """Arrays of any finite numbers: subnormal, of either zero, at the ends of the range."""
    return hnp.arrays(dtype, shape, elements=single if dtype is np.float32 else finite)


# ------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
@quick
def test_gradients_read_back_by_name_and_bit(dtype: type, data: st.DataObject):
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
    drawn = data.draw(st.dictionaries(names, numbers(dtype, shapes), min_size=1, max_size=4))

    lines = b"".join(artifacts.gradient_lines(drawn)).decode().removesuffix("\n").split("\n")

    assert len(lines) == len(drawn)
    for line, (name, array) in zip(lines, drawn.items(), strict=True):
        label, _, text = line.partition(": ")
        assert label == f"dL/d{name}"
        read = np.array([dtype(number) for number in text.split(", ")], dtype)
        assert read.tobytes() == array.tobytes()


@given(st.lists(st.tuples(finite, st.integers(-(2**63), 2**63 - 1)), max_size=5))
@quick
def test_a_table_reads_back_equal(rows: list[tuple[float, int]]):
    written = [{"loss": loss, "epoch": epoch} for loss, epoch in rows]

    header, *lines = b"".join(artifacts.table_lines(written, ("epoch", "loss"))).splitlines()

    assert header == b"epoch,loss"
    read = [line.split(b",") for line in lines]
    assert [(float(loss), int(epoch)) for epoch, loss in read] == rows
    assert [math.copysign(1, float(loss)) for _, loss in read] == [
        math.copysign(1, loss) for loss, _ in rows
    ]


@given(hnp.arrays(st.sampled_from([np.float32, np.float64]), hnp.array_shapes(max_dims=3)))
@quick
def test_arrays_read_back_bit_for_bit(array: Any):  # noqa: ANN401
    read = np.load(io.BytesIO(artifacts.array_bytes(array)), allow_pickle=False)

    assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | st.text(max_size=9)
facts = st.fixed_dictionaries({"sha256": st.text("0123456789abcdef"), "bytes": st.integers(0, 10)})


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any result that can be."""
    pairs = draw(st.lists(st.tuples(finite, finite), min_size=1, max_size=4))
    return Record(
        digest=draw(st.text(max_size=9)), replicate=draw(st.integers(0, 2**63 - 1)),
        l2=draw(finite), label=f"{draw(st.integers(0, 9**9))}.00000",
        row={column: draw(finite) for column in COLUMNS},
        eigenvalues=tuple(value for value, _ in pairs),
        residuals=tuple(residual for _, residual in pairs),
        parameters=draw(st.dictionaries(st.text(max_size=9), plain, max_size=4)),
        files=draw(st.dictionaries(names.filter(lambda n: Path(n).name == n), facts, max_size=3)),
    )  # fmt: skip


@given(records())
@quick
def test_a_manifest_reads_back_equal(tmp_path: Path, record: Record):
    store = Store(tmp_path)

    store.commit(record)

    assert store.record(record.key) == record


@given(
    st.dictionaries(
        names, numbers(np.float64, hnp.array_shapes(max_dims=2, max_side=4)), min_size=1, max_size=4
    ),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
@quick
def test_weights_read_back_bit_for_bit(tmp_path: Path, arrays: dict[str, Any], dtype: torch.dtype):
    state = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    (tmp_path / "w.pth").write_bytes(artifacts.state_dict_bytes(state))

    read = checkpoint.load_state_dict(tmp_path / "w.pth")

    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == dtype
        assert read[name].shape == tensor.shape
        bits = (t.reshape(-1).view(torch.uint8) for t in (read[name], tensor))
        assert torch.equal(*bits)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 2**32))
@quick
def test_a_network_is_what_its_state_dict_says(widths: list[int], seed: int):
    network = mlp.Mlp(tuple(widths), "tanh")
    theta_P = network.initial(torch.Generator().manual_seed(seed), torch.float64)

    again, read_P = mlp.from_state_dict(network.state_dict(theta_P), "tanh")

    assert again == network
    assert torch.equal(read_P, theta_P)


@given(
    st.lists(st.floats(0, 1e9), min_size=1, max_size=12, unique=True)
    | st.lists(st.floats(0, 1e-3), min_size=1, max_size=12, unique=True)
)
@quick
def test_labels_of_strengths_are_distinct_and_read_back(strengths: list[float]):
    """To half of the last decimal, and exactly where decimals do not tell them apart."""
    labels = plan.strength_labels([value + 0.0 for value in strengths])

    assert len(set(labels.values())) == len(set(strengths))
    for strength, label in labels.items():
        assert len(label) <= 40
        if "e" in label:
            assert float(label) == strength
        else:
            decimals = len(label.partition(".")[2])
            assert decimals >= 5
            assert abs(float(label) - strength) <= 0.5001 * 10**-decimals + 1e-16 * strength


# ---------------------------------------------------------------------------------------- data


@given(data=st.data(), zipped=st.booleans())
@settings(quick, max_examples=25)
def test_a_data_set_reads_back_equal(tmp_path: Path, data: st.DataObject, zipped: bool):
    arrays = {}
    for images, labels in (idx.TRAIN, idx.TEST):
        count = data.draw(st.integers(1, 4))
        arrays[images] = data.draw(hnp.arrays(np.uint8, (count, 28, 28), fill=st.integers(0, 255)))
        arrays[labels] = data.draw(hnp.arrays(np.uint8, (count,), elements=st.integers(0, 9)))
    files = {name: idx.encode(array) for name, array in arrays.items()}

    idx.write_set(files, tmp_path / "stored")
    given_files = tmp_path / "given"
    given_files.mkdir(exist_ok=True)
    for name, content in files.items():
        (given_files / name).write_bytes(gzip.compress(content) if zipped else content)

    assert idx.read_set(tmp_path / "stored", limit=1 << 20) == files
    assert idx.read_set(given_files, limit=1 << 20) == files
    idx.compare(files, idx.read_sums(tmp_path / "stored"), whose="the stored one")
    for name, array in idx.arrays(files).items():
        np.testing.assert_array_equal(array, arrays[name])


# ---------------------------------------------------------------------------------- parameters

choices = {
    "data.mean": finite, "data.std": st.floats(1e-9, 1e9), "data.name": st.from_regex(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True
    ),
    "data.root": names, "data.folder": names, "model.activation": st.sampled_from(["tanh", "relu"]),
    "model.hidden": st.lists(st.integers(1, 65_536), max_size=4),
    "objective.penalty": st.sampled_from(["full", "half"]),
    "train.lr": st.floats(1e-300, 1e300), "train.momentum": st.floats(0, 0.999),
    "train.batch_size": st.integers(1, 2**31 - 1), "train.stack": st.none() | st.integers(1, 9),
    "sweep.strengths": st.none() | st.lists(st.floats(0, 1e9), min_size=1, max_size=5, unique=True),
    "sweep.ids": st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True),
    "spectrum.rtol": st.floats(1e-300, 0.5), "spectrum.merge_units": st.booleans(),
    "certificate.pairs": st.none() | st.just("all") | st.integers(0, 99),
    "runtime.seed": st.integers(0, 2**63 - 1), "tracking.experiment": names,
    "tracking.uri": st.none() | names,
}  # fmt: skip
some = st.fixed_dictionaries({}, optional=choices)


def sections(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in flat.items():
        section, key = dotted.split(".")
        nested.setdefault(section, {})[key] = value
    return nested


def as_yaml(content: object, *, lines: bool = False) -> str:
    """As one line, or as sections of lines: in braces ruamel writes `?0`, but does not read it."""
    text, writer = io.StringIO(), YAML(typ="safe", pure=True)
    if lines:
        writer.default_flow_style = False
    writer.dump(content, text)
    return text.getvalue()


def as_word(value: object) -> str:
    """A value as a word of the command line or of the environment: text is itself."""
    if isinstance(value, str):
        return value if value.strip() not in ("", "~", "null") and value[0] not in "'\"" else "'x'"
    return as_yaml(value).removesuffix("\n").removesuffix("...").removesuffix("\n")


@given(some)
@quick
def test_parameters_read_back_equal(tmp_path: Path, chosen: dict[str, Any]):
    first = load(Path(os.devnull), environ={}, overrides={
        key: value for key, value in chosen.items() if not isinstance(value, str)
    })  # fmt: skip
    (tmp_path / "p.yaml").write_text(
        as_yaml(sections(flatten(first)), lines=True), encoding="utf-8"
    )

    assert load(tmp_path / "p.yaml", environ={}) == first


@given(some, some, some)
@example({"tracking.experiment": "?0"}, {}, {})
@quick
def test_flags_beat_the_environment_and_that_the_file(
    tmp_path: Path, file: dict[str, Any], environ: dict[str, Any], flags: dict[str, Any]
):
    (tmp_path / "p.yaml").write_text(as_yaml(sections(file), lines=True), encoding="utf-8")
    words = {key: as_word(value) for key, value in environ.items()}
    variables = {f"SPECTRA_{key.replace('.', '_')}".upper(): word for key, word in words.items()}

    found = flatten(
        load(tmp_path / "p.yaml", environ=variables,
             overrides={key: as_word(value) for key, value in flags.items()})
    )  # fmt: skip

    wanted = flatten(Params()) | file
    for given_words in (environ, flags):
        wanted |= {
            key: "x" if isinstance(value, str) and as_word(value) == "'x'" else value
            for key, value in given_words.items()
        }
    assert found == wanted


# ---------------------------------------------------------------------------- whatever the bytes


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file with a few bytes changed, taken out, doubled or put in; or any bytes at all."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = draw(st.integers(at, min(len(content), at + 40)))
        content[at:end] = draw(st.binary(max_size=8) | st.just(bytes(content[at:end]) * 2))
    return bytes(content)


def reads_or_refuses(read: Callable[[], object], own: type[SpectraError]) -> object:
    """What a reader makes of bytes, or None where it refuses them in its own words."""
    try:
        return read()
    except own as error:
        assert str(error)
        assert "\n" not in str(error)
        assert "Traceback" not in str(error)
        return None


IMAGES = idx.encode(np.arange(3 * 784, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28))


@given(damaged(IMAGES) | damaged(gzip.compress(IMAGES, mtime=0)))
@settings(quick, max_examples=150)
def test_no_bytes_break_the_reader_of_images(tmp_path: Path, content: bytes):
    path = tmp_path / "images"
    path.write_bytes(content)

    found = reads_or_refuses(
        lambda: idx.read(path, magic=idx.IMAGES_MAGIC, limit=1 << 20), DataError
    )

    if found is not None:  # what it lets through, it also parses
        assert isinstance(found, bytes)
        assert idx.parse(found, magic=idx.IMAGES_MAGIC, what="x").size == len(found) - 16


def weights(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"fc1.weight": torch.ones(3, 4), "fc1.bias": torch.zeros(3)}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@given(damaged(weights(zipped=True)) | damaged(weights(zipped=False)))
@settings(quick, max_examples=150)
def test_no_bytes_break_the_reader_of_weights(tmp_path: Path, content: bytes):
    path = tmp_path / "w.pth"
    path.write_bytes(content)

    found = reads_or_refuses(
        lambda: mlp.from_state_dict(checkpoint.load_state_dict(path), "tanh"), WeightsError
    )

    if found is not None:
        network, theta_P = found  # type: ignore[misc]
        assert theta_P.shape == (network.dim,)
        assert bool(torch.isfinite(theta_P).all())


SHIPPED = (Path(__file__).parents[1] / "params.yaml").read_bytes()


@given(damaged(SHIPPED) | damaged(b"train: {lr: 1.0e-3, stack: null}\nsweep: {ids: [1, 2]}\n"))
@settings(quick, max_examples=100)
def test_no_bytes_break_the_reader_of_parameters(tmp_path: Path, content: bytes):
    path = tmp_path / "p.yaml"
    path.write_bytes(content)

    found = reads_or_refuses(lambda: load(path, environ={}), ParameterError)

    assert found is None or found == load(None, environ={}, overrides={
        key: value for key, value in flatten(found).items() if not isinstance(value, str)
    } | {key: f"'{value}'" for key, value in flatten(found).items() if isinstance(value, str)})  # type: ignore[arg-type]  # fmt: skip


@given(st.text(max_size=40), st.text(max_size=20))
@quick
def test_no_words_break_the_reader_of_words(key: str, value: str):
    reads_or_refuses(lambda: load(Path(os.devnull), environ={}, overrides={key: value}),
                     ParameterError)  # fmt: skip
    reads_or_refuses(
        lambda: load(Path(os.devnull), environ={f"SPECTRA_{key}": value}), ParameterError
    )


@given(records(), st.data())
@settings(quick, max_examples=100)
def test_no_bytes_break_the_reader_of_manifests(
    tmp_path: Path, record: Record, data: st.DataObject
):
    store = Store(tmp_path)
    store.commit(record)
    path = tmp_path / artifacts.manifest_name(record.key)
    good = path.read_bytes()
    path.write_bytes(data.draw(damaged(good)))

    found = store.record(record.key)

    # None, or what was written: the seal tells a changed number from the one that was meant.
    assert found is None or found == record
