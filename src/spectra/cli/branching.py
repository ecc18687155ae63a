"""The command that follows a branch of stationary points: `branch`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from spectra.cli.console import explained, finite, load, print_json
from spectra.cli.options import (
    Activation,
    Device,
    DType,
    Json,
    ParamsFile,
    Penalty,
    Quiet,
    Seed,
    Sets,
    Threads,
    place,
)


def branch(
    weights: Annotated[Path, typer.Argument(help="A state_dict of a fully connected network.")],
    to: Annotated[float, typer.Option("--to", min=0, help="Strength λ to follow it to.")],
    l2: Annotated[
        float | None,
        typer.Option("--l2", min=0, help="Strength of the weights; read from a name of ours."),
    ] = None,
    step: Annotated[
        float | None, typer.Option("--step", help="Longest step in λ; a twentieth of the way.")
    ] = None,
    beyond: Annotated[
        bool, typer.Option("--beyond", help="Go on through folds, until λ is back at the start.")
    ] = False,
    max_products: Annotated[
        float, typer.Option("--max-products", min=1, help="Hessian products of the branch.")
    ] = 100_000,
    polish_products: Annotated[
        float, typer.Option("--polish-products", min=1, help="Products to polish the start with.")
    ] = 5000,
    out: Annotated[Path, place("--out", "Folder for the files.")] = Path("results"),
    activation: Activation = None,
    penalty: Penalty = None,
    seed: Seed = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    params: ParamsFile = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Follow stationary points in λ from saved weights, and locate where they fold."""
    with explained(
        "the points so far are written; go on from branch_weights-...-last.pth with --l2"
    ):
        from spectra import branches, display
        from spectra.artifacts import Store
        from spectra.continuation.branch import Follow
        from spectra.errors import ParameterError
        from spectra.workbench import open_bench

        named = re.fullmatch(r"(?:trained_)?model_weights-(\d+-(\d+\.\d+))", weights.stem)
        if l2 is None:
            if named is None:
                raise ParameterError(f"--l2: {weights} does not tell its strength; give it")
            l2 = float(named[2])
        for flag, value in (("--l2", l2), ("--to", to)):
            finite(flag, value)
        if step is not None and not 0 < step < math.inf:
            what = "above 0" if math.isfinite(step) else "a finite number"
            raise ParameterError(f"--step: must be {what}, got {step:g}")
        flags = {
            "model.activation": activation, "objective.penalty": penalty, "runtime.seed": seed,
            "runtime.device": device, "runtime.dtype": dtype,
            "runtime.threads": threads,
        }  # fmt: skip
        loaded = load(params, sets, flags)
        key = named[1] if named else weights.stem
        how = Follow(
            to=to, longest=step or abs(to - l2) / 20 or 1.0, beyond=beyond,
            max_products=max_products,
        )  # fmt: skip
        spent = 0

        def on_product() -> None:
            nonlocal spent
            spent += 1
            progress.product(key, spent)

        followed, told = None, 0
        with display.shown(quiet=quiet) as progress:
            bench = open_bench(loaded, progress.say)
            progress.begin(key, epochs=0)
            for followed in branches.follow(
                bench, weights, l2=l2, how=how, out=Store(out), key=key,
                max_polish=polish_products, on_product=on_product,
            ):  # fmt: skip
                for point in followed.points[told:]:
                    progress.say(display.branch_line(point))
                told = len(followed.points)
        assert followed is not None
        if as_json:
            print_json({
                "weights": str(weights), "l2": l2, "to": to, "ended": followed.ended,
                "moved": followed.distance, "merged": followed.merged.widths,
                "events": [
                    {"kind": p.kind, "l2": p.l2, "theta_norm": p.r**0.5, "loss": p.loss,
                     "lowest": p.lowest, "negative_directions": p.negative}
                    for p in followed.events
                ],
                "points": len(followed.points), "products": round(followed.points[-1].products),
                "files": [str(path) for path in followed.files],
            })  # fmt: skip
        else:
            display.print_branch(followed)
