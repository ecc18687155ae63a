"""Plain PyTorch with the data in memory: what a careful user writes without a library.

A product differentiates twice over the full batch. The training loop takes batches by index
from tensors in memory; it runs with one thread or with all of them, whichever a short trial
finds faster on this machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, func, nn
from torch.nn import functional

from benchmarks.contender import Contender, MatVec, by_eigsh
from benchmarks.threads import StepThreads
from benchmarks.timing import now
from benchmarks.workload import BATCH, LR, Digits, Problem


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


def gauss_newton(problem: Problem) -> MatVec:
    """(1/N) Σ Jᵀ (diag p − p pᵀ) J v over one full batch: J v forwards, its transpose backwards."""
    model = problem.module()
    names, sizes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    examples = len(problem.train.labels_N)

    def scores_of(given: dict[str, Tensor]) -> Tensor:
        scores_NC: Tensor = func.functional_call(model, given, (problem.train.inputs_ND,))
        return scores_NC

    def product(v_P: Tensor) -> Tensor:
        parts = v_P.split([size.numel() for size in sizes])
        v = {n: part.view(size) for n, part, size in zip(names, parts, sizes, strict=True)}
        scores_NC, change_NC = func.jvp(scores_of, (theta,), (v,))
        p_NC = scores_NC.softmax(dim=1)
        curved_NC = p_NC * (change_NC - (p_NC * change_NC).sum(dim=1, keepdim=True)) / examples
        _, backwards = func.vjp(scores_of, theta)
        (image,) = backwards(curved_NC)
        return torch.cat([image[name].reshape(-1) for name in names])

    return product


def epoch(problem: Problem) -> dict[str, float]:
    """One epoch of Adam with weight decay, and an evaluation of both sets."""
    threads = _threads.of(problem)
    model, optimiser = _start(problem)
    start = now(problem.device)
    torch.set_num_threads(threads)
    order = torch.randperm(len(problem.train.labels_N)).to(problem.device)
    _steps(model, optimiser, problem.train, order)
    steps = now(problem.device) - start
    torch.set_num_threads(problem.threads)
    for digits in (problem.train, problem.test):
        _evaluate(model, digits)
    return {"steps": steps, "epoch": now(problem.device) - start}


def _trial(problem: Problem, threads: int) -> float:
    """Seconds of the steps of an epoch with so many threads, after a quarter of it to warm up."""
    torch.set_num_threads(threads)
    model, optimiser = _start(problem)
    order = torch.arange(len(problem.train.labels_N), device=problem.device)
    _steps(model, optimiser, problem.train, order[: len(order) // 4])
    start = now(problem.device)
    _steps(model, optimiser, problem.train, order)
    seconds = now(problem.device) - start
    torch.set_num_threads(problem.threads)
    return seconds


_threads = StepThreads(_trial)


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
    return "; ".join(filter(None, ["full batch", _threads.note(problem)]))


CONTENDER = Contender(
    name="plain",
    title="plain PyTorch",
    operator=operator,
    leading=by_eigsh(operator),
    epoch=epoch,
    gauss_newton=gauss_newton,
    note=_note,
    tune=_threads.tune,
)
