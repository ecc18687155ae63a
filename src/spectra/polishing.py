"""The polishing of a trained strength, and how far the training was from where it ends.

After every step the point reached is written, so a sweep that is killed goes on from it and ends
with the same bytes. That file says what it belongs to, and is deleted once the strength's result is
on the disk.

What the training left undone is told by three distances: in the objective, in the weights and in
the spectrum, the last as the angle between the leading eigenspaces before and after.

The chain of strengths goes on from the weights as trained, which are kept beside the polished ones:
a sweep with polishing trains the same networks as one without.

Letters: P parameters, K eigenpairs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra import analysis, artifacts, checkpoint, solve
from spectra.artifacts import Record, Store
from spectra.curvature.spectrum import Spectrum
from spectra.errors import ParameterError, WeightsError
from spectra.objective import L2Penalty
from spectra.params import Params
from spectra.plan import Task
from spectra.polish.network import Labelled
from spectra.polish.newton import Polished, State
from spectra.polish.symmetric import polish_network
from spectra.train import Trained, evaluate
from spectra.workbench import Workbench

_BULK_IS_BELOW = 2.0
"""Ratio |λ_i|/|λ_{i+1}| at which the leading pairs end; without one all K are compared."""


@dataclass(frozen=True)
class Departure:
    """How far a solution of the training was from the polished one.

    Attributes:
        verdict: How the polishing ended.
        minimum: Whether no negative curvature was found where it ended.
        products: What it cost, evaluations of loss and gradient at their price.
        steps: Accepted.
        escapes: How many of them left a saddle.
        gradient_norm: ‖∇L_eff‖ where it ended, evaluated in float64.
        gradient_norm_before: The same at the trained weights.
        cosine: cos(∇L_CE, θ − ref) where it ended, −1 at a stationary point with λ > 0.
        lowest_curvature: The lowest of H_eff found there, None where it was not looked for.
        distance: ‖θ − θ*‖.
        loss_drop: L_eff(θ) − L_eff(θ*), nats.
        cross_entropy_drop: L_CE(θ) − L_CE(θ*), nats.
        leading: How many pairs lead, up to the largest gap.
        overlap: Mean squared cosine between the leading eigenspaces before and after.
        overlap_all: The same of all K pairs.
        eigenvalue_1: λ_1 of H_CE before and after.
        eigenvalue_k: λ_K before and after.
        eigenvalue_min: The smallest before and after.
    """

    verdict: str
    minimum: bool
    products: float
    steps: int
    escapes: int
    gradient_norm: float
    gradient_norm_before: float
    cosine: float
    lowest_curvature: float | None
    distance: float
    loss_drop: float
    cross_entropy_drop: float
    leading: int
    overlap: float
    overlap_all: float
    eigenvalue_1: tuple[float, float]
    eigenvalue_k: tuple[float, float]
    eigenvalue_min: tuple[float, float]

    def metrics(self) -> dict[str, float]:
        """What a tracker is told."""
        return {
            "polish_products": self.products,
            "polish_distance": self.distance,
            "polish_loss_drop": self.loss_drop,
            "polish_overlap": self.overlap,
            "polish_gradient_norm": self.gradient_norm,
        }

    def as_bytes(self) -> bytes:
        """The file `polish-{ID}-{L2}.json`."""
        return artifacts.json_bytes(asdict(self))


def report_name(key: str) -> str:
    """The name of the file with the departure of `{ID}-{L2}`."""
    return f"polish-{key}.json"


def trained_name(key: str) -> str:
    """The name of the weights of `{ID}-{L2}` before polishing."""
    return f"trained_weights-{key}.pth"


def state_name(key: str) -> str:
    """The name of the point that the polishing of `{ID}-{L2}` has reached; there while it lasts."""
    return f"polish-state-{key}.pth"


def start_name(store: Store, key: str) -> str:
    """The weights of `{ID}-{L2}` that the next strength of a chain starts from: as trained."""
    record, trained = store.record(key), trained_name(key)
    return trained if record and trained in record.files else artifacts.weights_name(key)


def check_dtypes(params: Params) -> None:
    """Refuse polished weights finer than the products: the spectrum would be of their rounding.

    Raises:
        ParameterError: `polish.dtype` is float64 and `runtime.dtype` float32.
    """
    wanted, has = params.polish, params.runtime.dtype
    if wanted.enabled and (wanted.dtype, has) == ("float64", "float32"):
        raise ParameterError(
            "polish.dtype: float64 is finer than runtime.dtype, float32, so the spectrum would not "
            "be of the weights written but of their rounding; use runtime.dtype=float64, or "
            "polish.dtype=null to end at the floor of float32"
        )


def finish(
    bench: Workbench,
    store: Store,
    task: Task,
    trained: Trained,
    *,
    parameters: dict[str, Any],
    on_product: Callable[[int], None],
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Polish a trained strength if that is asked for, analyse and write it; see `solve.finish`.

    Raises:
        NotConvergedError: Pairs are missing within the budget; those found are written.
        StorageError: The files cannot be written.
    """
    how: dict[str, Any] = {"parameters": parameters, "on_product": on_product, "say": say}
    if not bench.params.polish.enabled:
        return solve.finish(bench, store, task, trained, **how)
    penalty = bench.penalty(task.l2)
    before = analysis.analyse(
        bench, bench.network, trained.theta_P, penalty=penalty,
        product=analysis.hessian(bench, bench.network, trained.theta_P),
        generator=bench.generator(task.replicate, "lanczos", task.l2), on_product=on_product,
    )  # fmt: skip
    polished, found = polish_strength(bench, store, task, trained, on_product=on_product)

    def besides(after: Spectrum) -> dict[str, bytes]:
        told = departure(trained.theta_P, before, found, after, penalty)
        state = bench.network.state_dict
        return {
            report_name(task.key): told.as_bytes(),
            trained_name(task.key): artifacts.state_dict_bytes(state(trained.theta_P)),
            artifacts.weights_name(task.key): artifacts.state_dict_bytes(state(found.x_P)),
        }

    if not found.stationary:
        say(
            f"{task.key}: not polished to a stationary point, but to |grad L_eff| = "
            f"{found.gradient_norm:.1e} after {found.products:.0f} products ({found.verdict}); "
            f"raise polish.max_products (now {bench.params.polish.max_products})"
        )
    record = solve.finish(bench, store, task, polished, besides=besides, **how)
    store.discard([state_name(task.key)])
    return record


def polish_strength(
    bench: Workbench,
    store: Store,
    task: Task,
    trained: Trained,
    *,
    on_product: Callable[[int], None],
) -> tuple[Trained, Polished]:
    """Polish a trained strength, from where an earlier attempt has got to.

    Args:
        bench: Data and parameters.
        store: Where the point reached is kept.
        task: The strength and replicate.
        trained: Its network.
        on_product: Told the running number of products.

    Returns:
        The polished weights with their losses and accuracies, and how the polishing went.

    Raises:
        StorageError: The point reached cannot be written.
    """
    how, data = bench.params.polish, bench.train_set
    name = state_name(task.key)
    dtype = bench.machine.dtype if how.dtype is None else getattr(torch, how.dtype)

    def keep(state: State) -> None:
        store.write(name, [_as_bytes(state, task.digest)])

    found = polish_network(
        bench.network, trained.theta_P.to(dtype), bench.penalty(task.l2),
        Labelled(data.inputs, data.labels_N, bench.params.runtime.threads, data.inputs_ND),
        max_products=how.max_products, tolerance=how.tolerance,
        merge=bench.params.spectrum.merge_units,
        generator=bench.generator(task.replicate, "polish", task.l2),
        state=_read(store.root / name, task.digest, bench.machine.device),
        on_product=lambda spent: on_product(round(spent)), on_step=keep,
    )  # fmt: skip
    theta_P = found.x_P.to(bench.machine.dtype)
    _, accuracy = evaluate(bench.network, theta_P, data)
    test_loss, test_accuracy = evaluate(bench.network, theta_P, bench.test_set)
    best = replace(
        trained.best, cross_entropy=found.loss, objective=found.objective, accuracy=accuracy,
        test_cross_entropy=test_loss, test_accuracy=test_accuracy,
        theta_norm=float(found.x_P.double().norm()),
    )  # fmt: skip
    return Trained(theta_P, best, trained.history), found


def departure(
    theta_P: Tensor, before: Spectrum, polished: Polished, after: Spectrum, penalty: L2Penalty
) -> Departure:
    """How far trained weights were from the polished ones.

    Args:
        theta_P: The trained weights.
        before: Their spectrum.
        polished: Where they were polished to.
        after: The spectrum there.
        penalty: The L2 term.
    """
    end_P = polished.x_P.double()
    centre_P = 0.0 if penalty.reference_P is None else penalty.reference_P.double()
    first, last = before.pairs, after.pairs
    leading = _leading(last.values_K)
    lowest = polished.lowest
    return Departure(
        verdict=polished.verdict,
        minimum=polished.minimum,
        products=polished.products,
        steps=polished.steps,
        escapes=polished.escapes,
        gradient_norm=polished.gradient_norm,
        gradient_norm_before=float(before.gradient_P.double().norm()),
        cosine=_cosine(polished.gradient_ce_P.double(), end_P - centre_P),
        lowest_curvature=None if lowest is None else lowest.value,
        distance=float((theta_P.double() - end_P).norm()),
        loss_drop=before.objective - polished.objective,
        cross_entropy_drop=before.loss - polished.loss,
        leading=leading,
        overlap=_overlap(first.vectors_KP, last.vectors_KP, leading),
        overlap_all=_overlap(first.vectors_KP, last.vectors_KP, len(last.values_K)),
        eigenvalue_1=(float(first.values_K[0]), float(last.values_K[0])),
        eigenvalue_k=(float(first.values_K[-1]), float(last.values_K[-1])),
        eigenvalue_min=(first.smallest.value, last.smallest.value),
    )


def _leading(values_K: NDArray[Any]) -> int:
    """How many eigenvalues come before the largest gap, as a ratio; all of them without one."""
    magnitudes_K = np.maximum(np.abs(values_K), np.finfo(float).tiny)
    ratios = magnitudes_K[:-1] / magnitudes_K[1:]
    if not len(ratios) or ratios.max() < _BULK_IS_BELOW:
        return len(values_K)
    return int(ratios.argmax()) + 1


def _overlap(first_KP: NDArray[Any], last_KP: NDArray[Any], count: int) -> float:
    """The mean squared cosine between the spans of the first rows of two orthonormal sets."""
    products = first_KP[:count].astype(np.float64) @ last_KP[:count].astype(np.float64).T
    return float((products**2).sum() / count)


def _cosine(a_P: Tensor, b_P: Tensor) -> float:
    norms = float(a_P.norm()) * float(b_P.norm())
    return float(a_P @ b_P) / norms if norms else float("nan")


def _as_bytes(state: State, digest: str) -> bytes:
    """A point reached, bound to its task."""
    buffer = io.BytesIO()
    torch.save({**vars(state), "x_P": state.x_P.cpu(), "digest": digest}, buffer)
    return buffer.getvalue()


def _read(path: Path, digest: str, device: torch.device) -> State | None:
    """The point that an earlier attempt at the same task has reached; None without one."""
    if not path.exists():
        return None
    try:
        content = checkpoint.load_state_dict(path)
    except WeightsError:
        return None
    if content.pop("digest", None) != digest:
        return None
    content["x_P"] = content["x_P"].to(device)
    return State(**content)  # type: ignore[arg-type]
