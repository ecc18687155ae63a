"""fetch, train, spectrum, sweep, draw: the only place where numerics meet files and trackers.

`sweep` is the main job; it reads as the story of one: lay out the plan, hold the folder, settle
what is there, do what is left, draw.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spectra import (
    analysis,
    artifacts,
    data,
    estimate,
    failures,
    plan,
    polishing,
    report,
    runs,
    solve,
)
from spectra.artifacts import Record, Store
from spectra.curvature.certificate import Certificate
from spectra.curvature.claim import Claim
from spectra.curvature.spectrum import Spectrum
from spectra.errors import DivergedError, NumericalError, StorageError, UsageError
from spectra.failures import Failure
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.params import Params
from spectra.plan import Plan
from spectra.progress import Progress
from spectra.report import Drawn
from spectra.strengths import Outcome, outcomes_of
from spectra.tracking import Tracker
from spectra.train import Trained
from spectra.workbench import open_bench


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        records: Its results in order.
        failed: Its strengths that have none, in order.
        reused: How many of both were there before.
        drawn: What was drawn.
        seconds: How long it took.
        unlogged: How many strengths the tracker has not got.
    """

    records: tuple[Record, ...]
    failed: tuple[Failure, ...]
    reused: int
    drawn: Drawn | None
    seconds: float
    unlogged: int = 0


@dataclass(frozen=True)
class TrainedFile:
    """A trained network and where its weights are."""

    path: Path
    trained: Trained
    penalty: L2Penalty


@dataclass(frozen=True)
class Examined:
    """The spectrum of a weights file, and the files written."""

    network: Mlp
    l2: float
    theta_norm: float
    found: Spectrum
    files: tuple[Path, ...]
    vouched: Certificate | None = None


def fetch(params: Params, progress: Progress) -> data.Stored:
    """Have the data set verified and in place."""
    return data.ensure(params.data, say=progress.say)


def train(
    params: Params, *, l2: float, replicate: int, out: Path, progress: Progress, tracker: Tracker
) -> TrainedFile:
    """Train one network at one strength from its seeded initial weights and save it."""
    bench = open_bench(params, progress.say)
    params = bench.params
    key = f"{replicate}-{plan.strength_labels([l2])[l2]}"
    with _beside(out, key) as store:
        began = time.monotonic()
        progress.begin(key, epochs=params.train.max_epochs)
        (trained,) = solve.optimise(
            bench, [(replicate, l2, bench.initial(replicate))],
            on_epoch=lambda _, epoch: progress.epoch(epoch),
        )  # fmt: skip
        if isinstance(trained, DivergedError):
            raise trained
        name = artifacts.weights_name(key)
        state = bench.network.state_dict(trained.theta_P)
        store.write(name, [artifacts.state_dict_bytes(state)])
        tracker.log(
            runs.training_run(
                params, bench, trained, replicate=replicate, l2=l2, file=out / name,
                seconds=time.monotonic() - began,
            )
        )  # fmt: skip
        return TrainedFile(out / name, trained, bench.penalty(l2))


def spectrum(
    params: Params, *, weights: Path, l2: float | None, out: Path, progress: Progress
) -> Examined:
    """Compute the spectrum of a saved network over the full training set and write its files."""
    bench = open_bench(params, progress.say)
    params = bench.params
    network, theta_P = bench.weights(weights)
    own_name = re.fullmatch(r"model_weights-(\d+-(\d+\.\d+))", weights.stem)
    if l2 is None:
        # The name rounds; the manifest beside it, where there is one, does not.
        told = Store(weights.parent).record(own_name[1]) if own_name else None
        l2 = told.l2 if told else float(own_name[2]) if own_name else 0.0
    key = own_name[1] if own_name else weights.stem
    penalty = bench.penalty_at(l2, theta_P, weights)
    with _beside(out, key) as store:
        progress.begin(key, epochs=0)
        product = analysis.hessian(bench, network, theta_P)
        found = analysis.analyse(
            bench, network, theta_P, penalty=penalty, product=product,
            generator=bench.generator(0, "lanczos", l2), on_product=partial(progress.product, key),
        )  # fmt: skip
        written = solve.write_spectrum(store, key, network, found, params.artifacts.eigenvectors)
        name = artifacts.gradients_name(key, of="_eff")
        parts = {n: t.cpu().numpy() for n, t in network.split(found.gradient_P).items()}
        store.write(name, artifacts.gradient_lines(parts, of="L_eff"))
        solve.complain_if_unconverged(bench, found, key, store)
        names = [*written, name]
        vouched = None
        if params.certificate.pairs is not None:
            vouched = analysis.certify(
                bench, network, theta_P, Claim.of(found, theta_P), penalty=penalty,
                product=product, generator=bench.generator(0, "certificate", l2),
                on_product=lambda number: progress.product(key, found.pairs.products + number),
            )  # fmt: skip
            names.append(artifacts.certificate_name(key))
            store.write(names[-1], [artifacts.json_bytes(vouched.content)])
        norm = float(theta_P.double().norm())
        return Examined(network, l2, norm, found, tuple(out / n for n in names), vouched)


def sweep(
    params: Params, *, replace: bool, draw: bool, progress: Progress, tracker: Tracker
) -> Swept:
    """Train and analyse every strength of the grid, for every replicate; go on where it stopped.

    Args:
        params: Of the sweep.
        replace: Delete results of other parameters that stand in the folder; refuse otherwise.
        draw: Draw the report at the end.
        progress: Told what happens.
        tracker: Logs the runs.

    Raises:
        ParameterError: `spectrum.k` or `polish.dtype` does not fit the rest.
        UsageError: The folder holds results of other parameters.
        StorageError: Too little disk, or the folder is in use or cannot be written.
    """
    began = time.monotonic()
    polishing.check_dtypes(params)
    bench = open_bench(params, progress.say)
    params = bench.params
    analysis.check_pairs(bench, bench.network)  # before hours of training
    laid = plan.plan(
        params, data_digest=bench.data_digest, reference_digest=bench.reference_digest,
        stack=bench.stack,
    )  # fmt: skip
    store = Store(Path(params.artifacts.out))
    with store.held():
        done = _settle(store, laid, replace=replace)
        reused = len(done)
        left = [task for task in laid.tasks if task.digest not in done]
        if left:
            estimate.announce(bench, store.root, len(left), len(laid.tasks), progress.say)
        logged = tracker.begin(**runs.sweep_run(params, laid, store, bench), fresh=not done)
        progress.sweep(total=len(laid.tasks), done=reused)
        try:
            with closing(outcomes_of(bench, store, laid, done, progress)) as ended:
                for step, outcome, seconds in ended:
                    if seconds is not None:
                        done[outcome.digest] = outcome
                        table = _finished(laid, outcome.replicate, done)
                        store.write_table(outcome.replicate, table)
                        progress.done(outcome, seconds)
                    if runs.entry(outcome) not in logged:
                        run = runs.strength_run(params, store, outcome, bench, seconds)
                        tracker.log(run, step=step)
            for replicate in laid.chains:
                store.write_table(replicate, _finished(laid, replicate, done))
            outcomes = [done[task.digest] for task in laid.tasks]
            records = tuple(outcome for outcome in outcomes if isinstance(outcome, Record))
            failed = tuple(outcome for outcome in outcomes if isinstance(outcome, Failure))
            drawn = None
            if draw and records:
                drawn = report.draw(store.root, Path(params.artifacts.report))
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            tracker.end("KILLED" if stopped else "FAILED", metrics={}, files=[])
            raise
        unlogged = tracker.end(
            "FINISHED", metrics={"strengths": len(records), "failed": len(failed)},
            files=drawn.files if drawn else (),
        )  # fmt: skip
    return Swept(records, failed, reused, drawn, time.monotonic() - began, unlogged)


def complain(swept: Swept) -> None:
    """Turn what a sweep lived with into an error, now that the rest is done and told.

    Raises:
        NumericalError: Strengths failed.
        StorageError: The tracker has not got all of it.
    """
    later = "; the same command logs what MLflow has not got" if swept.unlogged else ""
    if swept.failed:
        which = ", ".join(failure.key for failure in swept.failed[:5])
        more = f" and {len(swept.failed) - 5} more" if len(swept.failed) > 5 else ""
        raise NumericalError(
            f"{len(swept.failed)} of {len(swept.failed) + len(swept.records)} strengths failed "
            f"({which}{more}); the others are whole. The reasons are in failed-*.json{later}"
        )
    if swept.unlogged:
        raise StorageError(
            f"MLflow has not got {swept.unlogged} of the runs; the results are whole, and the same "
            "command logs them"
        )


def draw(params: Params) -> Drawn:
    """Draw the figures and tables of the results that are there."""
    return report.draw(Path(params.artifacts.out), Path(params.artifacts.report))


@contextmanager
def _beside(out: Path, key: str) -> Iterator[Store]:
    """A folder to write files of `{ID}-{L2}` into that are no part of a sweep.

    Raises:
        UsageError: A sweep's result of that name stands there; its files are not written over.
        StorageError: A sweep holds the folder, or it cannot be created.
    """
    store = Store(out)
    with store.held(alone=False):
        if store.record(key) is not None:
            raise UsageError(
                f"{out} holds a sweep's result {key}, which would be written over; choose another "
                "folder with --out"
            )
        yield store


def _settle(store: Store, laid: Plan, *, replace: bool) -> dict[str, Outcome]:
    """The plan's results and failures that are there and intact, by digest.

    Results of others are removed or refused, their failures are forgotten. Another grid may write
    the same strength with more decimals; its files are others then.
    """
    wanted = {task.digest: task.key for task in laid.tasks}
    records = [r for r in store.records() if r.replicate in laid.chains]
    own = [r for r in records if wanted.get(r.digest) == r.key]
    foreign = [r for r in records if wanted.get(r.digest) != r.key]
    failed = failures.found(store)
    owned = {r.replicate for r in records} | {f.replicate for f in failed}
    unknown = [i for i in laid.chains if i not in owned and store.has_table(i)]
    if (foreign or unknown) and not replace:
        if foreign:
            what = f"{len(foreign)} results of other parameters ({_difference(foreign, laid)})"
        else:
            what = f"Model-{unknown[0]}.csv of another program"
        raise UsageError(
            f"{store.root} holds {what}; choose another folder with --out, or delete them "
            "with --replace"
        )
    for record in foreign:
        store.remove(record)
    done: dict[str, Outcome] = {r.digest: r for r in own if store.intact(r)}
    for failure in failed:
        if wanted.get(failure.digest) == failure.key and failure.digest not in done:
            done[failure.digest] = failure
        elif failure.replicate in laid.chains:
            failures.forget(store, failure.key)
    return done


def _difference(foreign: Sequence[Record], laid: Plan) -> str:
    """What tells results in the folder from those of the plan, in a few words."""
    theirs = foreign[0].parameters
    changes = [
        f"{key} is {laid.parameters[key]}, theirs {theirs.get(key)}"
        for key in laid.parameters
        if theirs.get(key) != laid.parameters[key]
    ]
    shown = ", ".join(changes[:3]) or "another grid of strengths"
    return shown + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _finished(laid: Plan, replicate: int, done: Mapping[str, Outcome]) -> list[Record]:
    outcomes = [done[task.digest] for task in laid.chains[replicate] if task.digest in done]
    return [outcome for outcome in outcomes if isinstance(outcome, Record)]
