"""A run's results as Markdown, and their place in the README.

A cell is the median and, in brackets, its multiple of ours. "≈" marks what was composed of
other rows. An answer that is wrong says so and gives no ratio, for there is nothing to compare;
one that is incomplete, true eigenpairs but not all the leading ones, says so beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_TITLES = {
    "recipe": "published recipe",
    "plain": "plain PyTorch",
    "curvlinops": "curvlinops",
    "eigenthings": "hessian-eigenthings",
    "eigenthings-defaults": "hessian-eigenthings, its defaults",
    "pyhessian": "PyHessian",
    "pyhessian-eigsh": "PyHessian's product in eigsh",
    "ours": "spectra",
}
_COLUMNS = ("recipe", "plain", "curvlinops", "eigenthings", "pyhessian", "ours")
_LABELS = {
    "product": "Hessian product",
    "set-up": "its set-up, once a network",
    "gauss-newton": "Gauss-Newton product",
    "top pairs": "top {k} pairs, rtol {rtol:g}",
    "steps": "training epoch at batch 64, steps only",
    "epoch": "same, both sets evaluated",
    "strength": "one strength: {epochs} epochs, spectrum, files",
    "memory": "peak memory of a process computing products",
    "memory, added": "of it beyond the process and the data",
}


def render(run: Mapping[str, Any]) -> str:
    """The tables of a run."""
    rows = run["rows"]
    parts = [_about(run), _costs(rows, run["settings"])]
    judged = [row for row in rows if row["certificate"] and row["how"] == "measured"]
    if judged:
        parts += ["What the pairs are worth, by one independent judge:", _judged(judged)]
    if run.get("files"):  # results of earlier code have none
        parts += ["Writing the files of one strength:", _files(run["files"])]
    parts += [_growth(table) for table in run["growth"]]
    notes = _notes(rows)
    if notes:
        parts.append("How they ran:\n\n" + "\n".join(f"- {note}" for note in notes))
    if run["skipped"]:
        parts.append("Left out:\n\n" + "\n".join(f"- {reason}" for reason in run["skipped"]))
    return "\n\n".join(parts) + "\n"


def splice(text: str, device: str, body: str) -> str:
    """A document with the part between a device's markers replaced.

    Raises:
        ValueError: The markers are not there, or more than once.
    """
    opening, closing = f"<!-- bench:{device} -->", f"<!-- /bench:{device} -->"
    if text.count(opening) != 1 or text.count(closing) != 1:
        raise ValueError(f"the document needs {opening} and {closing} once each; put them in")
    before, rest = text.split(opening)
    _, after = rest.split(closing)
    return f"{before}{opening}\n{body.strip()}\n{closing}{after}"


def quantity(value: float, unit: str) -> str:
    """A number in three digits with a unit that suits it."""
    if unit == "s" and value < 1:
        return f"{_three(value * 1e3)} ms"
    if unit == "MB" and value >= 1000:
        return f"{_three(value / 1024)} GB"
    return f"{_three(value)} {unit}"


def _three(value: float) -> str:
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}"


def _about(run: Mapping[str, Any]) -> str:
    machine, versions, settings = run["machine"], run["versions"], run["settings"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB"
    if machine["gpu"]:
        where = f"{machine['gpu']}; {where}"
    having = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    networks = ", ".join(
        f"{name} (λ = {facts['l2']:g}, ‖θ‖ = {facts['theta_norm']:.3g})"
        for name, facts in run["networks"].items()
    )
    return (
        f"{where}; {machine['threads']} threads; float32; {settings['examples']:,} images. "
        f"{having}. Networks: {networks}. Medians of up to {settings['rounds']} interleaved "
        "rounds, fewer of what takes long. In brackets: how many times as long as ours it took; "
        "leading pairs are compared with our runs right before and after, so where the machine's "
        "speed changed meanwhile, that is not the quotient of the times printed. ≈: put together "
        "from other rows, not run; –: it has nothing of the kind."
    )


def _costs(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    shown = [name for name in _COLUMNS if any(row["contender"] == name for row in rows)]
    found = {(row["work"], row["network"], row["contender"]): row for row in rows}
    lines: list[list[str]] = []
    for work, label in _LABELS.items():
        for network in dict.fromkeys(row["network"] for row in rows if row["work"] == work):
            cells = [_cell(found.get((work, network, name))) for name in shown]
            lines.append([f"{label.format(**settings)}, {network}", *cells])
    return _markdown(["", *(_TITLES[name] for name in shown)], lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    text = ("≈ " if row["how"] == "composed" else "") + quantity(row["median"], row["unit"])
    verdict = row["certificate"]["verdict"] if row["certificate"] else "right"
    kind, _, why = verdict.partition(": ")
    if kind == "stopped":
        return f"stopped: {why.split(';')[0]} in {text}"
    if kind == "wrong":
        return f"wrong ({text})"
    if row["contender"] == "ours":
        text = f"**{text}**"
    elif row["ratio"] and row["work"] != "set-up":  # some do at once what others put off
        text = f"{text} ({_three(row['ratio'])}×)"
    return text if kind == "right" else f"{text}, {kind}"


def _judged(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        facts = row["certificate"]
        title = _TITLES.get(row["contender"], row["contender"])
        lines.append([
            row["network"],
            title,
            quantity(row["median"], row["unit"]),
            str(facts["products"]),
            f"{facts['within']} of {facts['pairs']}",
            str(facts["distinct"]),
            f"{facts['worst_residual']:.0e}",
            f"{facts['value_error']:.0e}",
            facts["verdict"],
        ])  # fmt: skip
    head = ["network", "", "time", "products", "within rtol", "distinct", "worst residual",
            "worst error of λ", "verdict"]  # fmt: skip
    return _markdown(head, lines)


def _files(kinds: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for kind in kinds:
        sides = [kind.get(who) for who in ("ours", "disk", "savetxt")]
        times = [quantity(side["median"], "s") if side else "–" for side in sides]
        lines.append([kind["file"], f"{_three(kind['bytes'] / 1e6)} MB", *times])
    return _markdown(["", "size", "spectra", "these bytes to the disk", "numpy.savetxt"], lines)


def _growth(table: Mapping[str, Any]) -> str:
    lines = []
    for point in table["points"]:
        mine, theirs = point.get("ours"), point.get("plain")
        factor = f"{_three(theirs['median'] / mine['median'])}×" if mine and theirs else "–"
        cells = [quantity(side["median"], "s") if side else "–" for side in (mine, theirs)]
        lines.append([f"{point['at']:,}", *cells, factor])
    return f"Growth with {table['of']}:\n\n" + _markdown(
        [table["work"], "spectra", "plain PyTorch", ""], lines
    )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = ("product", "strength")
    wanted = [row for row in rows if row["work"] in told or row["how"] == "composed"]
    found = [
        f"{_TITLES.get(row['contender'], row['contender'])}, "
        f"{row['work']} ({row['network']}): {row['note']}"
        for row in wanted
        if row["note"]
    ]
    return list(dict.fromkeys(found))


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose cells cannot break it."""
    clean = [[re.sub(r"\|", r"\\|", cell) for cell in line] for line in (head, *lines)]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (clean[0], rule, *clean[1:]))
