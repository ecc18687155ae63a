"""Every strength of a plan: trained in order, analysed and written beside the training.

A strength that fails is an outcome like another: there is no result, and the chain goes on from the
last strength that has weights, now and whenever it is resumed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from spectra import failures, polishing, runtime, solve
from spectra.artifacts import Record, Store
from spectra.errors import DivergedError, NumericalError
from spectra.executors import Workers
from spectra.failures import Failure
from spectra.plan import Plan, Task
from spectra.progress import Progress
from spectra.train import Trained
from spectra.workbench import Workbench

Outcome: TypeAlias = "Record | Failure"
"""What becomes of a strength."""

Ended: TypeAlias = "tuple[int, Outcome, float | None]"
"""A strength's place in the sweep, what became of it, and the seconds it took, if any now."""


def outcomes_of(
    bench: Workbench, store: Store, laid: Plan, done: Mapping[str, Outcome], progress: Progress
) -> Generator[Ended, None, None]:
    """Every task's place, outcome and seconds, in order; those there already take none.

    Groups are trained one after the other while workers analyse and write what is trained. A
    strength that fails is one more outcome: the chain goes on from the last that has weights.
    """
    reached: dict[int, tuple[str, Tensor]] = {}  # the latest weights of each replicate
    diverged = {d for d, o in done.items() if isinstance(o, Failure) and not o.trained}
    underway: deque[tuple[int, Future[tuple[Outcome, float | None]]]] = deque()
    step = 0
    with Workers(bench.workers, partial(runtime.prepare_thread, bench.machine)) as workers:
        for group in laid.groups:
            # What is finished is told of at once. Of the rest, one strength waits for each that is
            # under way, so that workers never do.
            while len(underway) > 2 * workers.count or (underway and underway[0][1].done()):
                yield _next(underway)
            left = any(task.digest not in done for task in group)
            began = time.monotonic()
            trained = _train(bench, store, group, reached, diverged, progress) if left else []
            seconds = (time.monotonic() - began) / len(group)
            for i, task in enumerate(group):
                work: Callable[[], tuple[Outcome, float | None]]
                if task.digest in done:
                    work = partial(_there, done[task.digest])
                else:
                    work = partial(
                        _finish, bench, store, laid, task, trained[i], seconds, workers, progress
                    )
                underway.append((step + i, workers.submit(work)))
            step += len(group)
            for task, outcome in zip(group, trained, strict=False):
                if isinstance(outcome, Trained):
                    reached[task.replicate] = (task.digest, outcome.theta_P)
                else:
                    diverged.add(task.digest)
        while underway:
            yield _next(underway)


def _next(underway: deque[tuple[int, Future[tuple[Outcome, float | None]]]]) -> Ended:
    step, future = underway.popleft()
    outcome, seconds = future.result()
    return step, outcome, seconds


def _origin(task: Task, diverged: Container[str]) -> Task | None:
    """The task whose weights one starts from: the last before it that has some."""
    origin = task.previous
    while origin is not None and origin.digest in diverged:
        origin = origin.previous
    return origin


def _train(
    bench: Workbench,
    store: Store,
    group: Sequence[Task],
    reached: Mapping[int, tuple[str, Tensor]],
    diverged: Container[str],
    progress: Progress,
) -> list[Trained | DivergedError]:
    """Train a group, from what was reached before it or, in a resumed chain, from the files.

    Files hold the same bytes. A stack is trained whole even where some of it is done, because
    its composition can change the last bits.
    """
    starts: list[tuple[int, float, Tensor]] = []
    for task in group:
        origin = _origin(task, diverged)
        latest, start_P = reached.get(task.replicate, ("", torch.empty(0)))
        if origin is None:
            start_P = bench.initial(task.replicate)
        elif origin.digest != latest:
            _, start_P = bench.weights(store.root / polishing.start_name(store, origin.key))
        starts.append((task.replicate, task.l2, start_P))
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    progress.begin(group[0].key + more, epochs=bench.params.train.max_epochs)
    return solve.optimise(bench, starts, on_epoch=lambda _, epoch: progress.epoch(epoch))


def _there(outcome: Outcome) -> tuple[Outcome, float | None]:
    return outcome, None


def _finish(
    bench: Workbench,
    store: Store,
    laid: Plan,
    task: Task,
    trained: Trained | DivergedError,
    training_s: float,
    workers: Workers,
    progress: Progress,
) -> tuple[Outcome, float | None]:
    """What is left of a task once it is trained; on the disk when this returns."""
    began = time.monotonic()
    runtime.return_memory()

    def on_product(number: int) -> None:
        workers.check()
        progress.product(task.key, number)

    outcome: Outcome
    try:
        if isinstance(trained, DivergedError):
            raise trained
        outcome = polishing.finish(
            bench, store, task, trained, parameters=dict(laid.parameters), on_product=on_product,
            say=progress.say,
        )  # fmt: skip
    except NumericalError as error:
        files = {}
        if isinstance(trained, Trained):
            files = solve.write_weights(bench, store, task, trained)
        outcome = Failure(task.digest, task.replicate, task.l2, task.label, str(error), files)
        failures.put(store, outcome)
    runtime.return_memory()
    return outcome, training_s + time.monotonic() - began
