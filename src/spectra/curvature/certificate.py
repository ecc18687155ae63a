"""The certificate of a point: what was checked, what follows, and what kind of point it is.

A stationary point of L_eff is a minimum exactly when λ_min(H_eff) = λ_min(H_CE) + 2c is not
negative, and a saddle when it is. Whether θ is stationary is a matter of a threshold on ‖∇L_eff‖;
the sign of λ_min is one of an interval: where it straddles zero, as at λ = 0 where H_CE has exact
null directions, the verdict stays open, and so it does where the spectrum behind it is not sound.

Pairs are numbered from 1. Numbers that do not exist are null.

Letters: P parameters, K pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra.curvature.claim import Claim, weights_digest
from spectra.curvature.eigen import ROUND_OFF
from spectra.curvature.examination import DEFECT, SAFETY, Findings
from spectra.curvature.intervals import IDENTIFIABLE, Located, located
from spectra.curvature.probe import CHANCE
from spectra.objective import L2Penalty


@dataclass(frozen=True)
class Certificate:
    """What vouches for a spectrum, as the JSON file has it."""

    content: Mapping[str, Any]

    @property
    def sound(self) -> bool:
        """Whether everything that was said agrees with what was recomputed."""
        return bool(self.content["sound"])

    @property
    def complaints(self) -> tuple[str, ...]:
        """What does not, a line each."""
        return tuple(self.content["complaints"])

    @property
    def verdict(self) -> str:
        """minimum, saddle, not stationary or undecided."""
        return str(self.content["verdict"])

    @property
    def negative_directions(self) -> int:
        """Directions in which H_eff is negative for certain."""
        return int(self.content["stationarity"]["negative_directions"])

    def metrics(self) -> dict[str, float]:
        """The key numbers, for a tracker."""
        content = self.content
        numbers = {
            "certified": float(self.sound),
            "negative_directions": float(self.negative_directions),
            "orthogonality_defect": content["orthogonality"]["defect"],
            "noise_relative": content["noise"]["relative"],
            "unidentifiable_vectors": float(
                sum(len(cluster["members"]) for cluster in content["clusters"])
            ),
            "widest_interval": max(
                (pair["high"] - pair["low"] for pair in content["pairs"]), default=0.0
            ),
            "gradient_norm_float64": content["stationarity"]["gradient_norm"],
            "cosine_gradient_theta": content["stationarity"]["cosine"],
        }
        return {name: value for name, value in numbers.items() if value is not None}


def certificate(
    claim: Claim,
    found: Findings,
    theta_P: Tensor,
    *,
    penalty: L2Penalty,
    rtol: float,
    stationary: float,
    environment: Mapping[str, Any],
) -> Certificate:
    """Put together what vouches for a claim.

    Args:
        claim: What was said.
        found: What examining it measured.
        theta_P: The point.
        penalty: The L2 term of the objective.
        rtol: Tolerance of the pairs.
        stationary: ‖∇L_eff‖ up to which θ counts as stationary.
        environment: What it was computed with, for the record.
    """
    scale = float(np.abs(claim.values_K).max())
    last = float(np.abs(claim.values_K).min())
    inside = claim.smallest_inside
    beside = found.beside
    edge = min(last + float(found.errors_K[np.abs(claim.values_K).argmin()]), beside.excluded)
    edge = max(edge, abs(beside.largest), abs(beside.smallest))
    lowest = max(-edge, claim.smallest.value - found.smallest_error) if inside is None else -edge
    spread = located(
        found.rayleigh_K, found.errors_K,
        beyond=(lowest, edge), smallest_singular=found.smallest_singular,
    )  # fmt: skip
    if inside is None:
        smallest = (lowest, claim.smallest.value + min(found.smallest_error, 2 * edge))
    else:
        smallest = (float(spread.low_K[inside]), float(spread.high_K[inside]))
    still = _stationarity(claim, found, theta_P, penalty, spread, smallest, edge)
    sound = not found.complaints
    content = {
        "sound": sound,
        "verdict": _verdict(still, stationary, sound=sound),
        "complaints": list(found.complaints),
        "objective": {
            "convention": penalty.convention, "l2": penalty.l2, "c": penalty.coefficient,
            "shift": penalty.shift, "reference": penalty.reference_P is not None,
        },
        "stationarity": still,
        "smallest": {
            "value": claim.smallest.value, "low": smallest[0], "high": smallest[1],
            "pair": None if inside is None else inside + 1, "checked": found.smallest_checked,
        },
        "pairs": _pairs(claim, found, spread),
        "clusters": [
            {
                "members": [i + 1 for i in cluster.members], "bound": cluster.bound,
                "open": cluster.open,
            }
            for cluster in spread.clusters
        ],
        "orthogonality": {
            "defect": found.defect, "smallest_singular_value": found.smallest_singular,
            "limit": DEFECT * torch.finfo(theta_P.dtype).eps,
        },
        "combination": {
            "along": found.along[1], "along_limit": found.along[2], "vector": found.along[0] + 1,
            "across": found.across[0], "across_limit": found.across[1],
        },
        "completeness": {
            "products": beside.products, "largest": beside.largest, "smallest": beside.smallest,
            "limit": found.limit, "lowest": found.lowest, "exhausted": beside.exhausted,
            "decided": beside.decided, "excluded_above": _finite(beside.excluded),
            "except_with_probability": 0.0 if beside.exhausted else CHANCE,
        },
        "noise": {
            "absolute": found.noise, "relative": found.noise / scale if scale else None,
            "tolerance_of_last": rtol * last, "tolerance_above_noise": rtol * last >= found.noise,
        },
        "thresholds": {
            "rtol": rtol, "stationary": stationary, "identifiable": IDENTIFIABLE,
            "noise_factor": SAFETY, "round_off": ROUND_OFF,
        },
        "weights": weights_digest(theta_P),
        "environment": dict(environment),
    }  # fmt: skip
    return Certificate(content)


def _pairs(claim: Claim, found: Findings, spread: Located) -> list[dict[str, Any]]:
    cluster_of = {i: n for n, c in enumerate(spread.clusters, start=1) for i in c.members}
    said_K = claim.residuals_K
    return [
        {
            "pair": i + 1,
            "value": float(value),
            "low": float(spread.low_K[i]),
            "high": float(spread.high_K[i]),
            "checked": i in found.checked,
            "rayleigh": float(found.rayleigh_K[i]) if i in found.checked else None,
            "residual_bound": float(found.errors_K[i]),
            "residual_from": "float64" if i in found.checked else "solver and noise",
            "residual_said": None if said_K is None else float(said_K[i]),
            "vector_error": float(spread.angles_K[i]),
            "cluster": cluster_of.get(i),
        }
        for i, value in enumerate(claim.values_K)
    ]


def _stationarity(
    claim: Claim,
    found: Findings,
    theta_P: Tensor,
    penalty: L2Penalty,
    spread: Located,
    smallest: tuple[float, float],
    edge: float,
) -> dict[str, Any]:
    again, point_P = found.recomputed, theta_P.detach().double()
    gradient_P = again.gradient_P + penalty.gradient(point_P)
    ce, norm = float(again.gradient_P.norm()), float(point_P.norm())
    cosine = float(again.gradient_P @ point_P) / (ce * norm) if ce * norm > 0 else None
    low, high = (end + penalty.shift for end in smallest)
    surely = spread.high_K + penalty.shift < 0
    straddling = (spread.low_K + penalty.shift < 0) & ~surely
    negative = int(surely.sum())
    outside = claim.smallest_inside is None
    if outside and high < 0:
        negative += 1
    rest_positive = penalty.shift >= edge or (outside and low >= 0)
    return {
        "gradient_norm": float(gradient_P.norm()),
        "gradient_norm_ce": ce,
        "cosine": cosine,
        "theta_norm": norm,
        "loss": again.loss,
        "objective": again.loss + penalty.value(point_P),
        "loss_said": claim.loss,
        "lambda_min": low + (high - low) / 2,
        "lambda_min_low": low,
        "lambda_min_high": high,
        "negative_directions": negative,
        "negative_directions_exact": bool(rest_positive and not straddling.any()),
    }


def _verdict(still: Mapping[str, Any], stationary: float, *, sound: bool) -> str:
    if not still["gradient_norm"] <= stationary:
        return "not stationary"
    if still["lambda_min_high"] < 0:
        return "saddle"
    return "minimum" if sound and still["lambda_min_low"] >= 0 else "undecided"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
