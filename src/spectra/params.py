"""Parameters: `params.yaml` -> frozen, validated objects.

Every parameter has one home, one of the sections below, and four places it may come from;
the first that names it wins: a command-line flag, the environment
(`SPECTRA_<SECTION>_<KEY>`), `params.yaml`, the default written here. The YAML reader is the
one DVC uses, so that `1e-4` means the same to both.

The defaults are the experiment of arXiv 2512.11866 (Adam with lr 0.0015, batch 64, at most 50
epochs a strength, patience 5, a network carried upward in strength), in this project's
convention of the penalty.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from spectra import yamlfile
from spectra.errors import ParameterError

ENVIRONMENT_PREFIX = "SPECTRA_"

Activation = Literal["sigmoid", "tanh", "relu", "gelu"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float32", "float64"]
VectorFormat = Literal["csv", "npy", "none"]
DataSource = Literal["auto", "folder", "torchvision", "pypi"]

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]  # more is a slip, and no counter's number
Threads = Annotated[int, Field(ge=1, le=1024)]  # OpenMP crashes on absurd numbers
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]  # file names spell it out
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _place(name: str) -> str:
    if not name or "\0" in name:
        raise ValueError("a file or folder needs a name, and one without NUL")
    return name


Place = Annotated[str, AfterValidator(_place)]


class Section(BaseModel):
    """A frozen group of parameters; keys it does not know are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataParams(Section):
    """Which IDX data set, where it is kept and where it may come from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "mnist"
    root: Place = "data"
    source: DataSource = "auto"
    folder: Place | None = None
    mean: FiniteFloat = 0.1307
    std: PositiveFloat = 0.3081


class ModelParams(Section):
    """The multilayer perceptron: 784 inputs, `hidden` widths, 10 classes."""

    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(strict=False, max_length=64)
    ] = (128, 128)
    activation: Activation = "sigmoid"


class ObjectiveParams(Section):
    """The penalty: `full` is λ‖θ − ref‖², `half` is (λ/2)‖θ − ref‖²; no ref means 0."""

    penalty: Literal["full", "half"] = "full"
    reference: Place | None = None


class TrainParams(Section):
    """The optimiser and when it stops."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: PositiveFloat = 0.0015
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    batch_size: PositiveInt = 64
    max_epochs: PositiveInt = 50
    patience: PositiveInt = 5
    monitor: Literal["objective", "cross_entropy"] = "objective"
    threads: Threads = 1
    stack: PositiveInt | None = None


class SweepParams(Section):
    """The grid of strengths, the replicates and how one strength follows from another."""

    l2_min: Strength = 0.0
    l2_max: Strength = 0.09
    points: Annotated[int, Field(ge=1, le=1_000_000)] = 451
    strengths: Annotated[tuple[Strength, ...], Field(strict=False)] | None = None
    ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(strict=False)] = (1,)
    protocol: Literal["continuation", "independent"] = "continuation"
    direction: Literal["up", "down"] = "up"

    @model_validator(mode="after")
    def _grid_makes_sense(self) -> SweepParams:
        for name, values in (("strengths", self.strengths), ("ids", self.ids)):
            if values is not None and not values:
                raise ValueError(f"{name} is empty; give at least one value")
            if values is not None and len(set(values)) < len(values):
                twice = next(v for v in values if values.count(v) > 1)
                raise ValueError(f"{name} names {twice:g} twice; every value may stand there once")
        if self.strengths is None:
            if self.l2_max < self.l2_min:
                raise ValueError(
                    f"l2_max={self.l2_max:g} is below l2_min={self.l2_min:g}; exchange them and "
                    "use direction: down for a downward sweep"
                )
            # Strengths have 15 digits; closer ones would be the same number.
            width = self.l2_max - self.l2_min
            if self.points > 1 and width / (self.points - 1) <= 1e-14 * self.l2_max:
                raise ValueError(
                    f"points={self.points} strengths do not fit between l2_min={self.l2_min:g} "
                    f"and l2_max={self.l2_max:g}; use points: 1 or widen the range"
                )
        return self

    def grid(self) -> tuple[float, ...]:
        """The strengths λ in the order in which they are visited."""
        if self.strengths is not None:
            values = sorted(self.strengths)
        elif self.points == 1:
            values = [self.l2_min]
        else:
            width = self.l2_max - self.l2_min
            # i·width/(n − 1) rounds to the shortest decimals: 0.09·2/450 is 0.0004, not 0.00039999.
            values = [self.l2_min + i * width / (self.points - 1) for i in range(self.points)]
            values = [float(f"{value:.15g}") for value in values]
        values = [value + 0.0 for value in values]  # -0.0 is 0.0
        return tuple(values if self.direction == "up" else reversed(values))


class SpectrumParams(Section):
    """The eigenpairs wanted and the means allowed."""

    k: PositiveInt = 30
    rtol: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    max_products: PositiveInt = 5000
    solver: Literal["lanczos", "eigsh"] = "lanczos"
    product: Literal["fused", "autodiff"] = "fused"
    merge_units: bool = True


class CertificateParams(Section):
    """What vouches for a spectrum; `pairs: null` writes no certificate."""

    pairs: int | Literal["all"] | None = 2
    probe: Annotated[int, Field(ge=2, le=10_000)] = 12
    stationary: PositiveFloat = 1e-4

    @field_validator("pairs", mode="before")
    @classmethod
    def _pairs_make_sense(cls, value: object) -> object:
        if value is None or value == "all" or (type(value) is int and value >= 0):
            return value
        raise ValueError("must be a number of pairs (0 or more), all, or null")


class PolishParams(Section):
    """Descent from trained weights to a stationary point of L_eff; `tolerance: null` is the floor.

    `dtype` is that of the polished weights and decides the floor; null means `runtime.dtype`, which
    it must not be finer than.
    """

    enabled: bool = False
    tolerance: PositiveFloat | None = None
    max_products: PositiveInt = 3000
    dtype: DType | None = None


class ArtifactParams(Section):
    """Where results go. Eigenvectors as text take some 48 MB a strength."""

    out: Place = "test_data"
    report: Place = "report"
    eigenvectors: VectorFormat = "csv"

    @model_validator(mode="after")
    def _folders_differ(self) -> ArtifactParams:
        if Path(self.out).absolute() == Path(self.report).absolute():
            raise ValueError(f"out and report are both {self.out}; give the report its own folder")
        return self


class TrackingParams(Section):
    """MLflow: `uri: null` means `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` here."""

    enabled: bool = True
    uri: Place | None = None
    experiment: Annotated[str, Field(min_length=1)] = "spectra"
    log_eigenvectors: bool = False


class RuntimeParams(Section):
    """What can change the last bits of a result: seed, device, dtype, threads."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Device = "cpu"
    dtype: DType = "float32"
    threads: Threads = 2


class Params(Section):
    """All parameters of `spectra`; a section that is not given has its defaults."""

    data: DataParams = DataParams()
    model: ModelParams = ModelParams()
    objective: ObjectiveParams = ObjectiveParams()
    train: TrainParams = TrainParams()
    sweep: SweepParams = SweepParams()
    polish: PolishParams = PolishParams()
    spectrum: SpectrumParams = SpectrumParams()
    certificate: CertificateParams = CertificateParams()
    runtime: RuntimeParams = RuntimeParams()
    artifacts: ArtifactParams = ArtifactParams()
    tracking: TrackingParams = TrackingParams()


def load(
    path: Path | None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Params:
    """Read, merge and validate the parameters.

    Args:
        path: A YAML file, or None for `params.yaml` in this folder if there is one.
        overrides: `section.key -> value`, from the command line. Text is read as YAML, and a
            value of None counts as not given.
        environ: The environment, `os.environ` unless given.

    Raises:
        ParameterError: The file is missing or not YAML, a key is unknown, or a value is of the
            wrong type or out of range.
    """
    merged = yamlfile.read(path)
    for section, values in merged.items():
        if section in Params.model_fields and not isinstance(values, dict):
            raise ParameterError(
                f"{path or yamlfile.USUAL}: section '{section}' must hold keys and values, "
                f"not a {yamlfile.kind(values)}"
            )
    for key, text in (os.environ if environ is None else environ).items():
        if key.startswith(ENVIRONMENT_PREFIX):
            section, name = _environment_key(key)
            _put(merged, section, name, _read(section, name, text))
    for dotted, value in (overrides or {}).items():
        if value is None:
            continue
        section, _, name = dotted.partition(".")
        read = _read(section, name, value) if isinstance(value, str) else value
        _put(merged, section, name, read)
    try:
        return Params.model_validate(merged)
    except ValidationError as error:
        raise ParameterError(_one_line(error)) from None


def digest(*sections: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of some sections, as 16 hexadecimal digits."""
    plain = [s.model_dump(mode="json") if isinstance(s, BaseModel) else dict(s) for s in sections]
    return hashlib.sha256(orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def flatten(params: BaseModel) -> dict[str, Any]:
    """`section.key -> value`, as tables and trackers want it."""
    return {
        f"{section}.{key}": value
        for section, values in params.model_dump(mode="json").items()
        for key, value in values.items()
    }


def _environment_key(variable: str) -> tuple[str, str]:
    """`SPECTRA_TRAIN_MAX_EPOCHS` -> `('train', 'max_epochs')`."""
    section, _, name = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("_")
    known = {
        f"{ENVIRONMENT_PREFIX}{s}_{key}".upper(): (s, key)
        for s, field in Params.model_fields.items()
        for key in _section(field.annotation).model_fields
    }
    if (section, name) not in known.values():
        raise ParameterError(
            f"environment variable {repr(variable)[1:-1]} names no parameter"
            + _nearest(variable, known)
            + "; unset it or correct it"
        )
    return section, name


def _read(section: str, name: str, text: str) -> Any:  # noqa: ANN401
    """The value that a word stands for: what YAML reads, but for text the word as it is.

    A folder may be called `2026`, `null: void` or by a line feed; quotes are taken off.
    """
    value = yamlfile.scalar(text)
    group = Params.model_fields.get(section)
    field = _section(group.annotation).model_fields.get(name) if group else None
    kinds = field and (get_args(field.annotation) or (field.annotation,))
    if not kinds or not {str, Place} & set(kinds):
        return value
    if isinstance(value, str) and text[:1] in ("'", '"'):
        return value
    return None if type(None) in kinds and text.strip() in ("", "~", "null") else text


def _put(merged: dict[str, Any], section: str, name: str, value: Any) -> None:  # noqa: ANN401
    if not section or not name:
        raise ParameterError(
            f"{(section or name)!r} is not a parameter; write SECTION.KEY=VALUE, "
            "for example train.lr=0.001"
        )
    merged.setdefault(section, {})[name] = value


def _section(annotation: Any) -> type[Section]:  # noqa: ANN401
    assert isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation


def _one_line(error: ValidationError) -> str:
    """The first complaint as one line: what, limit, value, remedy."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        fields = Params.model_fields
        if len(path) == 1:
            return f"unknown section {name!r}" + _nearest(name, fields)
        known = _section(fields[path[0]].annotation).model_fields
        everywhere = {
            f"{s}.{k}": None
            for s, field in fields.items()
            for k in _section(field.annotation).model_fields
        }
        here = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"; did you mean '{path[0]}.{here[0]}'?" if here else _nearest(name, everywhere)
        return f"unknown parameter {name!r}{hint}"
    text = first["msg"].removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    value = first["input"]
    if isinstance(value, dict | Section):
        return f"{name}: {text}" + (", got keys and values" if len(path) > 1 else "")
    hint = ""
    if first["type"] == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, _choices(path), n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
    if isinstance(value, float) and not math.isfinite(value):
        text = "input should be a finite number"
    return f"{name}: {text}, got {_SHOWN.repr(value)}{hint}"


_SHOWN = reprlib.Repr()
"""How a value is shown: lists that YAML's aliases nest nine deep would fill the memory."""
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 1, 120, 120


def _choices(path: list[str]) -> list[str]:
    field = _section(Params.model_fields[path[0]].annotation).model_fields[path[1]]
    return [str(choice) for choice in get_args(field.annotation)]


def _nearest(word: str, known: Any) -> str:  # noqa: ANN401
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else f"; known are {', '.join(known)}"
