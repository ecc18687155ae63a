"""fetch, train, spectrum, sweep, draw: the only place where numerics meet files and trackers.

`sweep` is the main job; it reads as the story of one: lay out the plan, hold the folder, settle
what is there, do what is left, draw.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from spectra import artifacts, data, estimate, plan, report, runs, runtime, solve
from spectra.artifacts import Record, Store
from spectra.curvature.spectrum import Spectrum
from spectra.errors import DivergedError, NumericalError, UsageError
from spectra.executors import Workers
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.params import Params
from spectra.plan import Plan, Task
from spectra.progress import Progress
from spectra.report import Drawn
from spectra.tracking import Tracker
from spectra.train import Trained
from spectra.workbench import Workbench, open_bench


@dataclass(frozen=True)
class Swept:
    """A finished sweep: its results in order, what was drawn, and how many were there before."""

    records: tuple[Record, ...]
    reused: int
    drawn: Drawn | None
    seconds: float


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


def fetch(params: Params, progress: Progress) -> data.Stored:
    """Have the data set verified and in place."""
    return data.ensure(params.data, say=progress.say)


def train(
    params: Params, *, l2: float, replicate: int, out: Path, progress: Progress, tracker: Tracker
) -> TrainedFile:
    """Train one network at one strength from its seeded initial weights and save it."""
    bench = open_bench(params, progress.say)
    key = f"{replicate}-{plan.strength_labels([l2])[l2]}"
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
    Store(out).write(name, [artifacts.state_dict_bytes(state)])
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
    network, theta_P = bench.weights(weights)
    own_name = re.fullmatch(r"model_weights-(\d+-(\d+\.\d+))", weights.stem)
    if l2 is None:
        # The name rounds; the manifest beside it, where there is one, does not.
        told = Store(weights.parent).record(own_name[1]) if own_name else None
        l2 = told.l2 if told else float(own_name[2]) if own_name else 0.0
    key = own_name[1] if own_name else weights.stem
    penalty = bench.penalty(l2)
    if penalty.reference_P is not None and penalty.reference_P.shape != theta_P.shape:
        raise UsageError(f"objective.reference and {weights} are not of the same shape")
    progress.begin(key, epochs=0)
    found = solve.analyse(
        bench, network, theta_P, penalty=penalty,
        generator=bench.generator(0, "lanczos", l2), on_product=partial(progress.product, key),
    )  # fmt: skip
    store = Store(out)
    written = solve.write_spectrum(store, key, network, found, params.artifacts.eigenvectors)
    name = artifacts.gradients_name(key, of="_eff")
    parts = {n: t.cpu().numpy() for n, t in network.split(found.gradient_P).items()}
    store.write(name, artifacts.gradient_lines(parts, of="L_eff"))
    solve.complain_if_unconverged(bench, found, key, store)
    norm = float(theta_P.double().norm())
    return Examined(network, l2, norm, found, tuple(out / n for n in (*written, name)))


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
        UsageError: The folder holds results of other parameters.
        StorageError: Too little disk, or the folder is in use or cannot be written.
        NumericalError: A strength failed; those before it are kept.
    """
    began = time.monotonic()
    bench = open_bench(params, progress.say)
    solve.check_pairs(bench, bench.network)  # before hours of training
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
            with closing(_done(bench, store, laid, done, progress)) as strengths:
                for step, record, seconds in strengths:
                    if seconds is not None:
                        done[record.digest] = record
                        table = _finished(laid, record.replicate, done)
                        store.write_table(record.replicate, table)
                        progress.done(record, seconds)
                    if record.digest not in logged:
                        run = runs.strength_run(params, store, record, bench, seconds)
                        tracker.log(run, step=step)
            for replicate in laid.chains:
                store.write_table(replicate, _finished(laid, replicate, done))
            drawn = report.draw(store.root, Path(params.artifacts.report)) if draw else None
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            tracker.end("KILLED" if stopped else "FAILED", metrics={}, files=[])
            raise
        records = tuple(done[task.digest] for task in laid.tasks)
        tracker.end(
            "FINISHED", metrics={"strengths": len(records)}, files=drawn.files if drawn else ()
        )
    return Swept(records, reused, drawn, time.monotonic() - began)


def draw(params: Params) -> Drawn:
    """Draw the figures and tables of the results that are there."""
    return report.draw(Path(params.artifacts.out), Path(params.artifacts.report))


def _settle(store: Store, laid: Plan, *, replace: bool) -> dict[str, Record]:
    """The plan's results that are there and intact, by digest; others are removed or refused.

    Another grid may write the same strength with more decimals; its files are others then.
    """
    wanted = {task.digest: task.key for task in laid.tasks}
    records = [r for r in store.records() if r.replicate in laid.chains]
    own = [r for r in records if wanted.get(r.digest) == r.key]
    foreign = [r for r in records if wanted.get(r.digest) != r.key]
    owned = {r.replicate for r in records}
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
    return {r.digest: r for r in own if store.intact(r)}


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


def _done(
    bench: Workbench, store: Store, laid: Plan, done: Mapping[str, Record], progress: Progress
) -> Generator[tuple[int, Record, float | None], None, None]:
    """Every task's place, record and seconds, in order; those there already take none.

    Groups are trained one after the other while workers analyse and write what is trained. A
    strength that fails ends it, after those trained besides it are finished and on the disk.
    """
    reached: dict[str, Tensor] = {}
    underway: deque[tuple[int, Future[tuple[Record, float | None]]]] = deque()
    step = 0
    with Workers(bench.workers, partial(runtime.prepare_thread, bench.machine)) as workers:
        try:
            for group in laid.groups:
                # One strength waits for each that is under way, so that workers never do.
                while len(underway) > 2 * workers.count:
                    yield _next(underway)
                left = any(task.digest not in done for task in group)
                began = time.monotonic()
                outcomes = _train(bench, store, group, reached, progress) if left else []
                seconds = (time.monotonic() - began) / len(group)
                for i, task in enumerate(group):
                    work: Callable[[], tuple[Record, float | None]]
                    if task.digest in done:
                        work = partial(_there, done[task.digest])
                    else:
                        work = partial(
                            _finish, bench, store, laid, task, outcomes[i], seconds, workers,
                            progress,
                        )  # fmt: skip
                    underway.append((step + i, workers.submit(work)))
                step += len(group)
                reached = {
                    task.digest: outcome.theta_P
                    for task, outcome in zip(group, outcomes, strict=False)
                    if isinstance(outcome, Trained)
                }
                if len(reached) < len(outcomes):
                    break
            while underway:
                yield _next(underway)
        except NumericalError:
            wait([future for _, future in underway])
            raise


def _next(
    underway: deque[tuple[int, Future[tuple[Record, float | None]]]],
) -> tuple[int, Record, float | None]:
    step, future = underway.popleft()
    record, seconds = future.result()
    return step, record, seconds


def _train(
    bench: Workbench,
    store: Store,
    group: Sequence[Task],
    reached: Mapping[str, Tensor],
    progress: Progress,
) -> list[Trained | DivergedError]:
    """Train a group, from what was reached before it or, in a resumed chain, from the files.

    Files hold the same bytes. A stack is trained whole even where some of it is done, because
    its composition can change the last bits.
    """
    starts: list[tuple[int, float, Tensor]] = []
    for task in group:
        if task.previous is None:
            start_P = bench.initial(task.replicate)
        elif task.previous.digest in reached:
            start_P = reached[task.previous.digest]
        else:
            _, start_P = bench.weights(store.root / artifacts.weights_name(task.previous.key))
        starts.append((task.replicate, task.l2, start_P))
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    progress.begin(group[0].key + more, epochs=bench.params.train.max_epochs)
    return solve.optimise(bench, starts, on_epoch=lambda _, epoch: progress.epoch(epoch))


def _there(record: Record) -> tuple[Record, float | None]:
    return record, None


def _finish(
    bench: Workbench,
    store: Store,
    laid: Plan,
    task: Task,
    outcome: Trained | DivergedError,
    training_s: float,
    workers: Workers,
    progress: Progress,
) -> tuple[Record, float | None]:
    """What is left of a task once it is trained."""
    if isinstance(outcome, DivergedError):
        raise outcome
    began = time.monotonic()

    def on_product(number: int) -> None:
        workers.check()
        progress.product(task.key, number)

    record = solve.finish(
        bench, store, task, outcome, parameters=dict(laid.parameters), on_product=on_product
    )
    return record, training_s + time.monotonic() - began


def _finished(laid: Plan, replicate: int, done: Mapping[str, Record]) -> list[Record]:
    return [done[task.digest] for task in laid.chains[replicate] if task.digest in done]
