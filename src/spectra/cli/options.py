"""The options that several commands share, each written once.

A flag that is not given is None, which is what lets the environment and params.yaml through; so
the help names the parameter, whose value in force may be any, and not a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def place(flag: str, what: str) -> Any:  # noqa: ANN401  (as typer.Option itself)
    """An option that names a folder: an empty name, as of an unset variable, is none."""

    def folder(name: str | Path) -> Path:
        if not str(name):
            raise typer.BadParameter("a folder needs a name, got ''")
        return Path(name)

    return typer.Option(flag, parser=folder, help=what)


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
Out = Annotated[Path | None, place("--out", "Folder for the results.")]
Track = Annotated[
    bool | None, typer.Option("--track/--no-track", help="Log to MLflow.", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Of weights, batches and directions; runtime.seed")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32 or float64")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads of Hessian products; runtime.threads")
]
Activation = Annotated[str | None, typer.Option("--activation", help="sigmoid, tanh, relu or gelu")]
Hidden = Annotated[
    str | None, typer.Option("--hidden", metavar="W,W,...", help="Hidden widths, as 128,128.")
]
Penalty = Annotated[str | None, typer.Option("--penalty", help="full: λ‖θ‖², half: (λ/2)‖θ‖²")]
Reference = Annotated[
    str | None, typer.Option("--reference", help="Weights file to penalise the distance from.")
]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help="adam or sgd")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate; train.lr")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Examples a step; train.batch_size")
]
MaxEpochs = Annotated[
    int | None, typer.Option("--max-epochs", help="Bound on the epochs; train.max_epochs")
]
Patience = Annotated[
    int | None,
    typer.Option("--patience", help="Epochs without a better value until it stops; train.patience"),
]
Pairs = Annotated[int | None, typer.Option("--k", help="Eigenpairs of largest magnitude.")]
Rtol = Annotated[
    float | None,
    typer.Option("--rtol", help="‖Hv − λv‖ / |λ| at which a pair has converged; spectrum.rtol"),
]
MaxProducts = Annotated[
    int | None, typer.Option("--max-products", help="Bound on the products; spectrum.max_products")
]
Vectors = Annotated[
    str | None, typer.Option("--eigenvectors", help="csv (48 MB a strength), npy (14 MB) or none")
]
