"""A branch of stationary points from a weights file on, with its files.

The weights are polished at their strength first. Hidden units that are all but equal are merged, so
the branch is followed among networks that keep them equal: their stationary points are those of
the whole network, in a few thousand coordinates instead of 10⁵, and the directions that would part
them are watched beside.

| File                                | Contents                                              |
| ----------------------------------- | ----------------------------------------------------- |
| branch-{ID}-{L2}.csv                | one line a point, in the order of the branch          |
| branch-{ID}-{L2}.json               | events, how it was followed and why it ended          |
| branch_weights-{ID}-{L2}-{kind}.pth | float64 weights at the start, at each event, at the end |

They are written anew after every point, so that whatever stops it leaves a branch. Weights that
an earlier branch of the same name has left go with the first: what is there is of one branch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from spectra import __version__, artifacts
from spectra.artifacts import Store
from spectra.continuation.branch import Branch, Follow, Kind, Part, Point
from spectra.continuation.sphere import Sphere
from spectra.curvature.differences import Differences
from spectra.curvature.equal_units import Quotient, quotient
from spectra.errors import NotConvergedError, ParameterError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.polish.landscape import Local
from spectra.polish.network import Labelled, NetworkLandscape, NetworkLocal
from spectra.polish.newton import Polished, polish
from spectra.train import evaluate
from spectra.workbench import Workbench

COLUMNS = (
    "L2_strength", "kind", "theta_norm", "Train_Loss", "Train_Reg_Loss", "Test_Loss",
    "Test_Accuracy", "gradient_norm", "slope", "lowest", "lowest_breaking",
    "negative_directions", "products",
)  # fmt: skip
"""Of branch-{ID}-{L2}.csv. `slope` is dλ/d‖θ‖², zero at a fold; `lowest` the smallest eigenvalue of
H_eff among networks whose merged units stay equal, `lowest_breaking` that which parts them."""

MERGED_WITHIN = 1e-3
"""Distance, relative to their weights, within which units are merged (see `equal_units.quotient`).
Training by batches leaves units that share a fate some 1e-5 apart, others 1e-1."""

_EVENTS = ("fold", "crossing", "breaking")
_TOLERANCE = 1e-9
"""‖∇L_eff‖ of a point. Points and gradients are float64 whatever the products are in, so that a
strength follows from them to some 1e-9."""


@dataclass
class Followed:
    """A branch as far as it was followed.

    Attributes:
        network: The whole network.
        merged: The network with its equal units merged.
        distance: How far polishing moved the weights, ‖θ − θ_file‖.
        polished: What it found.
        points: Of the branch.
        ended: Why it ended; empty while it goes on.
        files: Written.
    """

    network: Mlp
    merged: Mlp
    distance: float
    polished: Polished
    points: list[Point] = field(default_factory=list)
    ended: str = ""
    files: list[Path] = field(default_factory=list)

    @property
    def events(self) -> list[Point]:
        """Folds, crossings and breakings."""
        return [point for point in self.points if point.kind in _EVENTS]


@dataclass(frozen=True)
class _Ground:
    """What a branch is followed on."""

    bench: Workbench
    network: Mlp
    classes: Quotient | None
    landscape: NetworkLandscape

    @property
    def merged(self) -> Mlp:
        return self.classes.mlp if self.classes else self.network

    def parameters(self, x_P: Tensor) -> Tensor:
        """θ of the network evaluated."""
        return self.classes.scale_p.to(x_P) * x_P if self.classes else x_P

    def lifted(self, x_P: Tensor) -> Tensor:
        """θ of the whole network."""
        return _in(self.classes, x_P.dtype).lift(x_P) if self.classes else x_P

    def parts(self, local: Local) -> list[Part]:
        """The directions that would part merged units."""
        if self.classes is None:
            return []
        assert isinstance(local, NetworkLocal)
        found: list[Part] = []
        for layer in range(self.merged.layers - 1):
            apart = Differences(local.hessian, self.classes, layer)
            if apart.dim:
                found.append(Part(apart, apart.dim, _copies(apart)))
        return found


def follow(
    bench: Workbench,
    weights: Path,
    *,
    l2: float,
    how: Follow,
    out: Store,
    key: str,
    max_polish: float,
    on_product: Callable[[], None] = lambda: None,
) -> Iterator[Followed]:
    """Polish a network and follow its branch; what is known so far after every point.

    Args:
        bench: Data and parameters.
        weights: A `state_dict`.
        l2: Its strength λ.
        how: Where to, and how.
        out: Where the files go.
        key: `{ID}-{L2}` or another name for them.
        max_polish: Bound on the products of polishing.
        on_product: Told of every product.

    Raises:
        ParameterError: The strength to follow to is where the branch begins.
        UsageError: The reference point does not fit the weights.
        NotConvergedError: The weights could not be polished within the budget.
        StorageError: A sweep holds the folder, or the files cannot be written.
    """
    if how.to == l2:
        raise ParameterError(f"--to: must differ from the strength of the weights, {l2:g}")
    network, theta_P = bench.weights(weights)
    penalty = bench.penalty_at(l2, theta_P, weights)
    with ExitStack() as lasting:
        # A folder that is not there is made by a branch, not by weights that cannot be polished.
        there = out.root.exists()
        if there:
            lasting.enter_context(out.held(alone=False))
        ground, x_P = _ground(bench, network, theta_P, penalty)
        found = polish(
            ground.landscape, x_P.double(), penalty, max_products=max_polish, tolerance=_TOLERANCE,
            generator=bench.generator(0, "lanczos", l2), products_in=bench.machine.dtype,
            on_product=lambda _: on_product(),
        )  # fmt: skip
        if not found.stationary:
            raise NotConvergedError(
                f"{weights} could not be polished at L2 {l2:g}: ‖∇L_eff‖ is "
                f"{found.gradient_norm:.1e} after {found.products:.0f} products, {_TOLERANCE:.0e} "
                "is wanted; raise --polish-products or start where the penalty is stronger"
            )
        if not there:
            lasting.enter_context(out.held(alone=False))
        distance = float((ground.lifted(found.x_P) - theta_P.double()).norm())
        told = Followed(network, ground.merged, distance, found)
        sphere = Sphere(
            ground.landscape, penalty, tolerance=_TOLERANCE, products_in=bench.machine.dtype,
            max_products=400, generator=bench.generator(0, "lanczos", how.to),
            on_product=on_product,
        )  # fmt: skip
        branch = Branch(sphere, how, ground.parts)
        rows: list[dict[str, Any]] = []
        for point in branch.points(found.x_P):
            told.points.append(point)
            told.ended = branch.ended
            rows.append(_row(ground, point))
            _write(out, key, told, rows, ground, how)
            yield told
        told.ended = branch.ended
        if not told.points:
            raise NotConvergedError(
                f"no branch could be followed from {weights}: the corrector failed at its first "
                "point"
            )
        _write(out, key, told, rows, ground, how)
        yield told


def _ground(
    bench: Workbench, network: Mlp, theta_P: Tensor, penalty: L2Penalty
) -> tuple[_Ground, Tensor]:
    """The landscape with equal units merged, and where the weights are on it.

    A reference point need not have equal units where the network has them, so with one nothing
    is merged.
    """
    data = bench.train_set
    labelled = Labelled(
        data.inputs, data.labels_N, bench.params.runtime.threads, exact_ND=data.inputs_ND
    )
    classes = quotient(network, theta_P, MERGED_WITHIN)
    if penalty.reference_P is not None or classes.mlp.dim == network.dim:
        return _Ground(bench, network, None, NetworkLandscape(network, labelled)), theta_P
    landscape = NetworkLandscape.merged(classes, labelled)
    return _Ground(bench, network, classes, landscape), classes.merge(theta_P) / classes.scale_p


def _in(classes: Quotient, dtype: torch.dtype) -> Quotient:
    """The same classes, counted in a dtype."""
    layers = [type(c)(c.of_unit_H, c.counts_G.to(dtype)) for c in classes.layers]
    return Quotient(classes.whole, layers)


def _copies(apart: Differences) -> Callable[[Tensor], int]:
    """How many directions of the whole network an eigenvector of the differences stands for."""

    def copies(vector_p: Tensor) -> int:
        reached_G = vector_p.view(len(apart.counts), -1).norm(dim=1)
        return apart.counts[int(reached_G.argmax())] - 1

    return copies


def _row(ground: _Ground, point: Point) -> dict[str, Any]:
    """A line of the table."""
    theta_p = ground.parameters(point.x_P).to(ground.bench.machine.dtype)
    test_loss, test_accuracy = evaluate(ground.merged, theta_p, ground.bench.test_set)
    return {
        "L2_strength": point.l2,
        "kind": point.kind,
        "theta_norm": float(ground.lifted(point.x_P).norm()),
        "Train_Loss": point.loss,
        "Train_Reg_Loss": point.objective,
        "Test_Loss": test_loss,
        "Test_Accuracy": test_accuracy,
        "gradient_norm": point.gradient_norm,
        "slope": point.slope,
        "lowest": point.lowest,
        "lowest_breaking": point.breaking,
        "negative_directions": point.negative,
        "products": round(point.products),
    }


def _write(
    out: Store,
    key: str,
    told: Followed,
    rows: list[dict[str, Any]],
    ground: _Ground,
    how: Follow,
) -> None:
    """Bring the files up to the last point."""
    table, summary = f"branch-{key}.csv", f"branch-{key}.json"
    if not told.files:
        out.discard(_left_behind(out, key))
    out.write(table, artifacts.table_lines(rows, COLUMNS))
    content = {
        "ended": told.ended or "unfinished",
        "events": [row for row in rows if row["kind"] in _EVENTS],
        "network": told.network.widths,
        "merged": told.merged.widths,
        "start": {
            "polished_by": told.polished.products, "moved": told.distance,
            "gradient_norm": told.polished.gradient_norm,
        },
        "how": {"to": how.to, "longest": how.longest, "beyond": how.beyond},
        "penalty": ground.bench.params.objective.penalty,
        "data": ground.bench.data_digest,
        "dtype": ground.bench.params.runtime.dtype,
        "spectra": __version__,
    }  # fmt: skip
    out.write(summary, [artifacts.json_bytes(content)])
    kind = told.points[-1].kind
    number = sum(point.kind == kind for point in told.points)
    last = "last" if kind == "step" else kind if number == 1 else f"{kind}-{number}"
    state = ground.network.state_dict(ground.lifted(told.points[-1].x_P))
    name = f"branch_weights-{key}-{last}.pth"
    out.write(name, [artifacts.state_dict_bytes(state)])
    paths = [out.root / n for n in (table, summary, name)]
    told.files += [path for path in paths if path not in told.files]


def _left_behind(out: Store, key: str) -> list[str]:
    """The weights that an earlier branch of the same name has written."""
    kinds = "|".join(kind for kind in (*get_args(Kind), "last") if kind != "step")
    ours = re.compile(rf"branch_weights-{re.escape(key)}-(?:{kinds})(?:-[1-9]\d*)?\.pth")
    there = out.root.glob("branch_weights-*.pth")
    return [path.name for path in there if ours.fullmatch(path.name)]
