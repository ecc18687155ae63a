"""The pieces of work that contenders are compared by, one function each.

    set-up, product   the Hessian over all training images, times a vector
    gauss-newton      the Gauss-Newton matrix times a vector
    top pairs         the k leading eigenpairs at rtol, judged by `verify`
    steps, epoch      training at batch 64, without and with an evaluation of both sets
    strength          one strength of a sweep: training, spectrum, files
    memory            the peak of a fresh process that computes products, and how much of it
                      was not there before the contender began

Where a contender would take too long its row is composed of rows that were measured, and says
so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ours, verify
from benchmarks.contender import Contender, MatVec, MissingError, Pairs
from benchmarks.result import OURS, Result
from benchmarks.timing import Times, interleave, now, once, paced_ratios
from benchmarks.workload import Problem

_RIGHT = 1e-4
"""Relative error up to which a product in float32 is right."""
_DOUBLE_CHECKS = 3
_STRENGTHS = 3
_PAIRED = {"recipe": "plain"}  # whose products are the same in exact arithmetic


def product(result: Result, contenders: Sequence[Contender], problem: Problem) -> None:
    """Time the setting up of a product and the product."""
    v_P = _direction(problem)
    for contender in contenders:
        contender.tune(problem)
    makers = {contender.name: contender.operator for contender in contenders}
    ready = _set_up(result, "product", makers, v_P, problem)
    times = _in_turns(result, ready, v_P, problem)
    exact_P = ours.judge(problem)(v_P)
    notes = {c.name: c.note(problem) for c in contenders}
    for name, made in ready.items():
        if made.image_P is None:
            continue
        deviation = _deviation(made.image_P, exact_P)
        notes[name] = "; ".join(filter(None, [notes[name], f"relative error {deviation:.0e}"]))
        if deviation > _RIGHT:
            result.skip(f"{name}: its product is wrong, relative error {deviation:.1e}")
    result.add("set-up", problem.name, {n: [ready[n].setup_s] for n in times})
    result.add("product", problem.name, {n: t["total"] for n, t in times.items()}, notes=notes)


def gauss_newton(result: Result, contenders: Sequence[Contender], problem: Problem) -> None:
    """Time the product with the Gauss-Newton matrix of those that have it."""
    v_P = _direction(problem)
    makers = {c.name: c.gauss_newton for c in contenders if c.gauss_newton is not None}
    ready = _set_up(result, "Gauss-Newton product", makers, v_P, problem)
    times = _in_turns(result, ready, v_P, problem)
    notes = {}
    images = {name: made.image_P for name, made in ready.items() if made.image_P is not None}
    exact_P = images.get("plain")
    for name, image_P in images.items() if exact_P is not None else ():
        deviation = _deviation(image_P, exact_P)
        if deviation > _RIGHT:
            result.skip(f"{name}: its Gauss-Newton product is not plain PyTorch's, {deviation:.1e}")
        if name != "plain":
            notes[name] = f"{deviation:.0e} from plain PyTorch's"
    result.add("gauss-newton", problem.name, {n: t["total"] for n, t in times.items()},
               notes=notes)  # fmt: skip


def _direction(problem: Problem) -> Tensor:
    """The vector that all products are taken of."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(problem.mlp.dim, generator=generator).to(problem.device)


def _deviation(image_P: Tensor, exact_P: Tensor) -> float:
    """The relative error of a product."""
    return float((image_P - exact_P).norm() / exact_P.norm())


@dataclass(frozen=True)
class _Made:
    """A product that was set up, in how long, and what it first gave."""

    product: MatVec
    setup_s: float
    image_P: Tensor | None


def _set_up(
    result: Result,
    work: str,
    makers: Mapping[str, Callable[[Problem], MatVec]],
    v_P: Tensor,
    problem: Problem,
) -> dict[str, _Made]:
    """Make products and warm them up; who cannot is told of and left out."""
    ready = {}
    for name, make in makers.items():
        start = now(problem.device)
        try:
            made = make(problem)
            setup_s = now(problem.device) - start
            # A warm-up; there seven seconds change nothing.
            image_P = made(v_P) if name != "recipe" else None
        except Exception as error:  # a peer may fail in any way
            result.failed(f"{name}, {work}", error)
            continue
        ready[name] = _Made(made, setup_s, image_P)
    return ready


def _in_turns(result: Result, ready: Mapping[str, _Made], v_P: Tensor, problem: Problem) -> Times:
    """What the products of one vector take."""
    return interleave(
        {n: once(lambda f=made.product: f(v_P), problem.device) for n, made in ready.items()},
        rounds=problem.size.rounds,
        budget_s=problem.size.budget_s,
        failed=result.failed,
    )


def top_pairs(result: Result, contenders: Sequence[Contender], problem: Problem) -> None:
    """Time the leading eigenpairs and judge them."""
    size = problem.size
    found: dict[str, Pairs] = {}
    able = [c for c in contenders if c.leading is not None]

    def solve(contender: Contender) -> None:
        assert contender.leading is not None
        found[contender.name] = contender.leading(problem, size.k, size.rtol)

    for contender in able:
        contender.tune(problem)
    times = interleave(
        {c.name: once(lambda c=c: solve(c), problem.device) for c in able},
        rounds=size.rounds,
        budget_s=size.budget_s,
        failed=result.failed,
        pace=OURS,
    )
    found = {name: pairs for name, pairs in found.items() if name in times}
    if not found:
        return
    judge = ours.judge(problem)
    images = {name: verify.images(judge, pairs.vectors_KP) for name, pairs in found.items()}
    wanted_K = verify.reference(
        [(pairs.vectors_KP, images[name]) for name, pairs in found.items()], size.k
    )
    certificates = {
        name: verify.certify(
            pairs.values_K, pairs.vectors_KP, images[name],
            wanted_K=wanted_K, rtol=size.rtol, stopped=pairs.stopped,
        ).as_dict() | {"products": pairs.products}
        for name, pairs in found.items()
    }  # fmt: skip
    notes = {c.name: c.note(problem) for c in able}
    values = {name: t["total"] for name, t in times.items()}
    how = {}
    for name, twin in _PAIRED.items():
        seconds = result.median("product", None, name)  # the same on every network
        if seconds is not None and twin in found:
            count = found[twin].products
            values[name], how[name] = [seconds * count], "composed"
            certificates[name] = certificates[twin]
            notes[name] = f"{count} products counted × {seconds:.2f} s measured, not run"
    result.add(
        "top pairs", problem.name, values, how=how, notes=notes, certificates=certificates,
        paced=paced_ratios(times, "total"),
    )  # fmt: skip
    if OURS in found:
        _check_the_judge(result, problem, found[OURS], images[OURS])


def _check_the_judge(
    result: Result, problem: Problem, pairs: Pairs, images_KP: torch.Tensor
) -> None:
    """Compare the judge's products with float64 ones, for a few vectors."""
    exact = ours.judge(problem, dtype=torch.float64)
    chosen = sorted({round(i * (len(pairs.values_K) - 1) / (_DOUBLE_CHECKS - 1))
                     for i in range(_DOUBLE_CHECKS)})  # fmt: skip
    scale = float(abs(pairs.values_K[0]))
    errors = [
        float((exact(pairs.vectors_KP[i].double()) - images_KP[i]).norm()) / scale for i in chosen
    ]
    result.say(f"  the judge's float32 products differ from float64 by {max(errors):.0e} |λ_1|")
    result.add("judge", problem.name, {OURS: [max(errors)]}, unit="of |λ_1|")


def epoch(result: Result, contenders: Sequence[Contender], problem: Problem) -> None:
    """Time an epoch of training."""
    able = {c.name: c.epoch for c in contenders if c.epoch is not None}
    for contender in contenders:
        if contender.name in able:
            contender.tune(problem)
    times = interleave(
        {name: (lambda f=f: f(problem)) for name, f in able.items()},
        rounds=problem.size.rounds,
        budget_s=problem.size.budget_s,
        failed=result.failed,
    )
    notes = {c.name: c.note(problem) for c in contenders}
    for part in ("steps", "epoch"):
        result.add(part, problem.name, {n: t[part] for n, t in times.items()}, notes=notes)


def strength(result: Result, problem: Problem, folder: Path) -> None:
    """Time one whole strength of ours, and compose those of the others."""
    epochs = problem.size.epochs
    try:
        runs = [ours.strength(problem, folder, certified=False) for _ in range(_STRENGTHS)]
        whole, _ = ours.strength(problem, folder, certified=True)
    except MissingError as reason:
        result.skip(str(reason))
        return
    spent = f"{runs[0][1]}; {whole:.1f} s with the certificate, which no other makes"
    values, how, notes = {OURS: [seconds for seconds, _ in runs]}, {}, {OURS: spent}
    for name, part in (("plain", "epoch"), ("recipe", "steps")):
        training = result.median(part, problem.name, name)
        pairs = result.median("top pairs", problem.name, name)
        if training is None or pairs is None:
            result.skip(f"whole strength of '{name}': its epoch or its pairs were not measured")
            continue
        values[name], how[name] = [epochs * training + pairs], "composed"
        without = "no files" if name == "plain" else "no evaluation, no files"
        notes[name] = f"{epochs} epochs × {training:.2f} s + pairs {pairs:.1f} s; {without}"
    result.add("strength", problem.name, values, how=how, notes=notes)


def memory(result: Result, contenders: Sequence[Contender], problem: Problem, folder: Path) -> None:
    """The peak memory of each contender's products, each in a process of its own."""
    peaks, added = {}, {}
    for contender in contenders:
        command = [
            sys.executable, "-m", "benchmarks.memory", contender.name, str(folder),
            problem.device.type, str(problem.threads),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            result.skip(f"memory of {contender.title}: {last}")
            continue
        read = json.loads(done.stdout.splitlines()[-1])
        peaks[contender.name] = [read["peak_mb"]]
        added[contender.name] = [read["peak_mb"] - read["before_mb"]]
    result.add("memory", problem.name, peaks, unit="MB")
    result.add("memory, added", problem.name, added, unit="MB")
