"""`python -m benchmarks`: ours and its peers on the same work, in one run.

A whole run writes `benchmarks/results/<device>.json` and the tables in the README; a partial
or quick one writes into `build/bench` only, and everything is printed. `--render` draws the
tables of a results file again, say of a run on another machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, rows, table, workload
from benchmarks.contender import Contender
from benchmarks.contenders import CONTENDERS
from benchmarks.files import files
from benchmarks.growth import growth
from benchmarks.peers import EIGENTHINGS_DEFAULTS, PYHESSIAN_EIGSH
from benchmarks.result import Result
from benchmarks.workload import CHAINS, QUICK, Problem, Size

SECTIONS = (
    "product", "gauss-newton", "eigen", "epoch", "strength", "files", "memory", "growth",
)  # fmt: skip
ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "bench"
README = ROOT / "README.md"


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; 0 when it was done."""
    asked = _arguments(arguments)
    if asked.render:
        _into_readme(json.loads(asked.render.read_text(encoding="utf-8")))
        return 0
    run = measure(asked)
    print("\n" + table.render(run))
    whole = not (asked.quick or asked.only or asked.contenders or asked.images)
    name = f"{'quick-' if asked.quick else ''}{asked.device}.json"
    out = asked.out or (ROOT / "benchmarks" / "results" if whole else BUILD) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {out}")
    if whole and not asked.out:
        _into_readme(run)
    return 0


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Do the work and return everything that is known of it."""
    size = QUICK if asked.quick else Size()
    if asked.rounds:
        size = replace(size, rounds=asked.rounds)
    device = torch.device(asked.device)
    threads = asked.threads or machine.cores()
    about = machine.describe(device, threads)
    # A plain user does not ask for it, but L2 makes denormals: nobody shall be slow by those.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    folder = asked.data or (ROOT / "sample" if asked.quick else ROOT / "data" / "mnist")
    if not folder.exists():
        workload.fetch(folder)
    print(f"reading {folder}; training the networks where build/bench has none", flush=True)
    train, test = workload.read(folder, device)
    digits = (train.first(asked.images or len(train.labels_N)), test)
    problems = workload.problems(
        digits,
        threads=threads,
        size=size,
        kept=BUILD / "networks" / folder.name,
        names=list(CHAINS),
    )
    result = Result(say=lambda line: print(line, flush=True))
    contenders = _present(result, asked.contenders)
    took = _sections(asked, result, contenders, problems, folder)
    return {
        "machine": about,
        "versions": machine.versions(),
        "settings": asdict(size) | {
            "examples": len(digits[0].labels_N), "quick": asked.quick, "dtype": "float32",
        },
        "networks": {
            name: {"l2": p.l2, "theta_norm": float(p.theta_P.double().norm())}
            for name, p in problems.items()
        },
        "rows": result.rows,
        "files": result.files,
        "growth": result.growth,
        "skipped": result.skipped,
        "sections_s": took,
    }  # fmt: skip


def _sections(
    asked: argparse.Namespace,
    result: Result,
    contenders: list[Contender],
    problems: dict[str, Problem],
    folder: Path,
) -> dict[str, float]:
    learnt = problems["learnt"]
    few = {"plain", "ours"} if asked.quick else {c.name for c in contenders}

    def eigen() -> None:
        for problem in problems.values():
            there = {c.name for c in contenders}
            also = [PYHESSIAN_EIGSH] if "pyhessian" in there else []
            if problem is learnt and "eigenthings" in there:
                also.append(EIGENTHINGS_DEFAULTS)
            rows.top_pairs(result, [*contenders, *also], problem)

    work = {
        "product": lambda: rows.product(result, contenders, learnt),
        "gauss-newton": lambda: rows.gauss_newton(result, contenders, learnt),
        "eigen": eigen,
        "epoch": lambda: rows.epoch(result, contenders, learnt),
        "strength": lambda: rows.strength(result, learnt, folder),
        "files": lambda: files(result, learnt, BUILD),
        "memory": lambda: rows.memory(
            result, [c for c in contenders if c.name in few], learnt, folder
        ),
        "growth": lambda: growth(result, learnt, quick=asked.quick),
    }
    took = {}
    for name in asked.only or SECTIONS:
        print(f"{name}:", flush=True)
        start = time.perf_counter()
        work[name]()
        took[name] = round(time.perf_counter() - start, 1)
    print("seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in took.items()))
    return took


def _present(result: Result, wanted: list[str] | None) -> list[Contender]:
    present = []
    for contender in CONTENDERS:
        if wanted and contender.name not in wanted:
            continue
        if contender.missing:
            result.skip(contender.missing)
        else:
            present.append(contender)
    return present


def _into_readme(run: dict[str, Any]) -> None:
    device = "cuda" if run["machine"]["gpu"] else "cpu"
    try:
        text = table.splice(README.read_text(encoding="utf-8"), device, table.render(run))
    except ValueError as error:
        print(f"README.md was not changed: {error}", file=sys.stderr)
        return
    README.write_text(text, encoding="utf-8")
    print("README.md has the new tables")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the sample, tiny rounds: a trial")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", type=_names(SECTIONS), help=f"of {','.join(SECTIONS)}")
    names = tuple(contender.name for contender in CONTENDERS)
    parser.add_argument("--contenders", type=_names(names), help=f"of {','.join(names)}")
    parser.add_argument("--rounds", type=int, help="of everything that fits the budget")
    parser.add_argument("--images", type=int, help="only the first of the training images")
    parser.add_argument("--threads", type=int, help="all cores unless given")
    parser.add_argument("--data", type=Path, help="a folder of IDX files; data/mnist")
    parser.add_argument("--out", type=Path, help="where the JSON goes; the README stays")
    parser.add_argument("--render", type=Path, help="only draw this results file into the README")
    return parser.parse_args(arguments)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
