"""What a tracker is told of a sweep, of a strength and of a lone training, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from spectra import artifacts, plan, polishing, provenance
from spectra.artifacts import Record, Store
from spectra.curvature.certificate import Certificate
from spectra.failures import Failure
from spectra.params import Params, digest, flatten
from spectra.plan import Plan
from spectra.tracking import FOLDER, Logged
from spectra.train import Trained
from spectra.workbench import Workbench

_METRICS = {
    "Train_Loss": "train_loss",
    "Train_Reg_Loss": "objective",
    "Test_Loss": "test_loss",
    "Test_Accuracy": "test_accuracy",
    "Train_Accuracy": "train_accuracy",
    "theta_norm": "theta_norm",
    "gradient_norm": "gradient_norm",
    "gradient_norm_ce": "gradient_norm_ce",
    "lambda_max": "lambda_max",
    "lambda_min": "lambda_min",
    "worst_residual": "worst_residual",
    "converged": "converged",
    "products": "products",
    "epochs": "epochs",
    "best_epoch": "best_epoch",
    "distinct_units": "distinct_units",
    "certified": "certified",
    "negative_directions": "negative_directions",
}


def training_run(
    params: Params,
    bench: Workbench,
    trained: Trained,
    *,
    replicate: int,
    l2: float,
    file: Path,
    seconds: float,
) -> Logged:
    """What the tracker is told of a lone training."""
    bound = plan.decisive(
        params, data_digest=bench.data_digest, reference_digest=bench.reference_digest
    )
    best = trained.best
    return Logged(
        name=f"train {replicate} L2={l2:g}",
        digest=digest(bound, {"replicate": replicate, "l2": l2}),
        params={**flatten(params), "l2": l2, "replicate": replicate},
        metrics={
            "l2": l2,
            "train_loss": best.cross_entropy,
            "objective": best.objective,
            "train_accuracy": best.accuracy,
            "test_loss": best.test_cross_entropy,
            "test_accuracy": best.test_accuracy,
            "theta_norm": best.theta_norm,
        },
        series=series([vars(epoch) for epoch in trained.history]),
        files=[file],
        tags=provenance.tags(bench.data_digest, digest(bound)),
        seconds=seconds,
    )


def sweep_run(params: Params, laid: Plan, store: Store, bench: Workbench) -> dict[str, Any]:
    """What the tracker is told of the parent run."""
    grid = params.sweep.grid()
    folder = store.root.resolve()
    return {
        "key": digest({"plan": laid.digest, "folder": str(folder)}),
        "name": f"sweep {len(grid)} strengths {min(grid):g}..{max(grid):g}",
        "params": flatten(params),
        "tags": {
            **provenance.tags(bench.data_digest, laid.digest),
            FOLDER: str(folder),
        },
    }


def entry(outcome: Record | Failure) -> str:
    """What its run is recognised by: a failure that is tried again and succeeds is another."""
    failed = "failed:" if isinstance(outcome, Failure) else ""
    return failed + outcome.digest


def strength_run(
    params: Params,
    store: Store,
    outcome: Record | Failure,
    bench: Workbench,
    seconds: float | None,
) -> Logged:
    """What the tracker is told of one strength, whatever became of it."""
    if isinstance(outcome, Record):
        return _finished_run(params, store, outcome, bench, seconds)
    return Logged(
        name=f"{outcome.replicate} L2={outcome.label} failed",
        digest=entry(outcome),
        params={**flatten(params), "l2": outcome.l2, "replicate": outcome.replicate},
        metrics={"l2": outcome.l2},
        tags=provenance.tags(bench.data_digest, outcome.digest),
        seconds=seconds,
        failure=outcome.reason,
    )


def _finished_run(
    params: Params, store: Store, record: Record, bench: Workbench, seconds: float | None
) -> Logged:
    """What the tracker is told of a strength with a result."""
    key = record.key
    row = record.row
    metrics = {
        "l2": record.l2,
        **{_METRICS[column]: float(value) for column, value in row.items() if column in _METRICS},
        **{f"eigenvalue_{i:02d}": v for i, v in enumerate(record.eigenvalues, start=1)},
        **{f"residual_{i:02d}": v for i, v in enumerate(record.residuals, start=1)},
    }
    vectors = artifacts.eigenvectors_name(key, params.artifacts.eigenvectors)
    files = [
        artifacts.eigenvalues_name(key),
        artifacts.weights_name(key),
        artifacts.manifest_name(key),
    ]
    tags = provenance.tags(bench.data_digest, record.digest)
    vouching = artifacts.certificate_name(key)
    if vouching in record.files:
        certificate = Certificate(orjson.loads(store.read(vouching)))
        metrics |= certificate.metrics()
        tags["spectra.verdict"] = certificate.verdict
        files.append(vouching)
    told = polishing.report_name(key)
    if told in record.files:
        polished = polishing.Departure(**orjson.loads(store.read(told)))
        metrics |= polished.metrics()
        tags["spectra.polished"] = polished.verdict
        files.append(told)
    if vectors in record.files:
        tags |= {
            "spectra.eigenvectors": str((store.root / vectors).resolve()),
            "spectra.eigenvectors.sha256": str(record.files[vectors]["sha256"]),
        }
        if params.tracking.log_eigenvectors:
            files.append(vectors)
    return Logged(
        name=f"{record.replicate} L2={record.label}",
        digest=record.digest,
        params={**flatten(params), "l2": record.l2, "replicate": record.replicate},
        metrics=metrics,
        series=series(store.history(record)),
        files=[store.root / name for name in files],
        tags=tags,
        seconds=seconds,
    )


def series(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Per-epoch numbers by name; the prefix groups them in the tracker's charts."""
    names = [name for name in history[0] if name != "epoch"]
    return {f"epoch/{name}": [epoch[name] for epoch in history] for name in names}
