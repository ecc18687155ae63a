"""Plain PyTorch with the data in memory: what a careful user writes without a library.

A product differentiates twice over the full batch. The training loop takes batches by index
from tensors in memory; it runs with one thread or with all of them, whichever a short trial
finds faster on this machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.contender import Contender, MatVec, by_eigsh
from benchmarks.timing import now
from benchmarks.workload import BATCH, LR, Digits, Problem

_TRIAL_STEPS = 100
_best_threads: dict[tuple[int, str], int] = {}


def operator(problem: Problem) -> MatVec:
    """Double backward over one full batch."""
    model = problem.module()
    parameters = list(model.parameters())

    def product(v_P: Tensor) -> Tensor:
        loss = functional.cross_entropy(model(problem.train.inputs_ND), problem.train.labels_N)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        slope = torch.cat([g.reshape(-1) for g in gradients]) @ v_P
        parts = torch.autograd.grad(slope, parameters)
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def epoch(problem: Problem) -> dict[str, float]:
    """One epoch of Adam with weight decay, and an evaluation of both sets."""
    tune(problem)
    model, optimiser = _start(problem)
    start = now(problem.device)
    torch.set_num_threads(_best_threads[_key(problem)])
    order = torch.randperm(len(problem.train.labels_N)).to(problem.device)
    _steps(model, optimiser, problem.train, order)
    steps = now(problem.device) - start
    torch.set_num_threads(problem.threads)
    for digits in (problem.train, problem.test):
        _evaluate(model, digits)
    return {"steps": steps, "epoch": now(problem.device) - start}


def tune(problem: Problem) -> None:
    """Find the faster number of threads for a step."""
    if _key(problem) in _best_threads:
        return
    times = {}
    for threads in sorted({1, problem.threads}):
        torch.set_num_threads(threads)
        model, optimiser = _start(problem)
        count = min(_TRIAL_STEPS * BATCH, len(problem.train.labels_N))
        order = torch.arange(count, device=problem.device)
        _steps(model, optimiser, problem.train, order[: count // 4])
        start = now(problem.device)
        _steps(model, optimiser, problem.train, order)
        times[threads] = now(problem.device) - start
    torch.set_num_threads(problem.threads)
    _best_threads[_key(problem)] = min(times, key=lambda threads: times[threads])


def _key(problem: Problem) -> tuple[int, str]:
    return problem.threads, problem.device.type


def _start(problem: Problem) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = problem.module()
    return model, torch.optim.Adam(model.parameters(), lr=LR, weight_decay=2 * problem.l2)


def _steps(
    model: nn.Module, optimiser: torch.optim.Optimizer, digits: Digits, order: Tensor
) -> None:
    for batch in order.split(BATCH):
        optimiser.zero_grad()
        scores = model(digits.inputs_ND[batch])
        functional.cross_entropy(scores, digits.labels_N[batch]).backward()
        optimiser.step()


@torch.no_grad()
def _evaluate(model: nn.Module, digits: Digits) -> tuple[float, float]:
    scores = model(digits.inputs_ND)
    loss = functional.cross_entropy(scores, digits.labels_N).item()
    return loss, (scores.argmax(1) == digits.labels_N).float().mean().item()


def _note(problem: Problem) -> str:
    threads = _best_threads.get(_key(problem))
    if threads is None or problem.device.type != "cpu":
        return "full batch"
    return f"full batch; {threads} thread(s) in a training step"


CONTENDER = Contender(
    name="plain",
    title="plain PyTorch",
    operator=operator,
    leading=by_eigsh(operator),
    epoch=epoch,
    note=_note,
    tune=tune,
)
