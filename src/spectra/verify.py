"""Results rechecked: every file against its manifest, some against the Hessian itself.

The first is a matter of bytes (see `inspection`). The second reads weights, eigenvalues and
eigenvectors back from the files and has the certificate computed again, as somebody would who was
handed the folder and nothing else: under the parameters that each result says it was made with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from spectra import analysis, artifacts, inspection, params
from spectra.artifacts import Record, Store
from spectra.curvature.claim import Claim
from spectra.curvature.eigen import Extreme
from spectra.errors import ParameterError, SpectraError, UsageError
from spectra.inspection import Fault, Floats
from spectra.params import Params
from spectra.progress import Progress
from spectra.workbench import Workbench, open_bench

_TAKEN_OVER = (
    "model.hidden", "model.activation", "objective.penalty", "spectrum.rtol", "spectrum.product",
    "spectrum.solver", "runtime.dtype", "runtime.threads", "data.mean", "data.std",
)  # fmt: skip
"""Parameters of a result under which its numbers are recomputed."""


@dataclass(frozen=True)
class Verified:
    """What a recheck found.

    Attributes:
        results: How many results there are.
        sampled: Of which these had their pairs recomputed.
        faults: Everything that is wrong.
        repaired: Results that were taken away, to be done again.
    """

    results: int
    sampled: tuple[str, ...]
    faults: tuple[Fault, ...]
    repaired: tuple[str, ...] = ()

    @property
    def bad(self) -> list[str]:
        """The results that something is wrong with."""
        return sorted({fault.key for fault in self.faults if fault.key is not None})


def verify(
    asked: Params, store: Store, *, sample: int | None, repair: bool, progress: Progress
) -> Verified:
    """Recheck a folder of results.

    Args:
        asked: Where the data are, and on what device to compute.
        store: The folder.
        sample: How many results have their pairs recomputed, spread over the folder; None: all.
        repair: Take away the results that are bad, so that the next sweep does them again.
        progress: Told what happens.

    Raises:
        UsageError: There are no results.
        DataError: The data cannot be had.
        StorageError: A sweep holds the folder, or it cannot be written, with `repair`.
    """
    if not any(store.root.glob(artifacts.manifest_name("*"))):
        raise UsageError(f"{store.root} holds no results; name a sweep's folder with --results")
    if not repair:
        return _verified(asked, store, sample, progress)
    with store.held():
        found = _verified(asked, store, sample, progress)
        whole = {record.key: record for record in store.records()}
        for key in found.bad:
            if key in whole:
                store.remove(whole[key])
            else:
                (store.root / artifacts.manifest_name(key)).unlink(missing_ok=True)
    return Verified(found.results, found.sampled, found.faults, tuple(found.bad))


def _verified(asked: Params, store: Store, sample: int | None, progress: Progress) -> Verified:
    records, faults = inspection.inspect(store)
    bad = {fault.key for fault in faults}
    good = [record for record in records if record.key not in bad]
    chosen = _spread(good, sample)
    benches: dict[str, Workbench] = {}
    for record in chosen:
        progress.begin(record.key, epochs=0)
        faults += _recomputed(asked, store, record, benches, progress)
    return Verified(len(records), tuple(r.key for r in chosen), tuple(faults))


def _spread(records: Sequence[Record], sample: int | None) -> list[Record]:
    """So many results, from the first to the last."""
    if sample is None or sample >= len(records):
        return list(records)
    places = np.linspace(0, len(records) - 1, sample).round().astype(int)
    return [records[i] for i in dict.fromkeys(places.tolist())]


def _recomputed(
    asked: Params,
    store: Store,
    record: Record,
    benches: dict[str, Workbench],
    progress: Progress,
) -> list[Fault]:
    """What a certificate made from the files of a result complains of."""
    try:
        vectors_KP = inspection.read_vectors(store, record)
        if vectors_KP is None:
            progress.say(f"{record.key}: without eigenvectors there is nothing to recompute")
            return []
        bench = _bench(asked, record, benches, progress.say)
        complaints = _complaints(bench, store, record, vectors_KP, progress)
    except (SpectraError, ValueError, OSError) as error:
        complaints = [f"cannot be recomputed: {error}"]
    name = next((n for n in record.files if n.startswith("Hessian-eigenvectors")), "")
    return [Fault(record.key, name, complaint) for complaint in complaints]


def _complaints(
    bench: Workbench, store: Store, record: Record, vectors_KP: Floats, progress: Progress
) -> Sequence[str]:
    told = record.parameters.get("data.digest")
    if told != bench.data_digest:
        return [f"belongs to other data ({told}, here {bench.data_digest})"]
    network, theta_P = bench.weights(store.root / artifacts.weights_name(record.key))
    if vectors_KP.shape[1] != network.dim:
        return [f"rows have {vectors_KP.shape[1]} entries, the network {network.dim} parameters"]
    claim = Claim(
        np.array(record.eigenvalues), vectors_KP, np.array(record.residuals),
        Extreme(float(record.row["lambda_min"]), float("nan"), converged=True, vector_P=None),
        loss=float(record.row["Train_Loss"]), weights=_weights_said(store, record),
    )  # fmt: skip
    subset = bench.params.certificate.pairs
    return analysis.certify(
        bench, network, theta_P, claim, penalty=bench.penalty(record.l2),
        product=analysis.hessian(bench, network, theta_P),
        generator=bench.generator(record.replicate, "certificate", record.l2),
        on_product=lambda number: progress.product(record.key, number),
        subset="all" if subset is None else subset,
    ).complaints  # fmt: skip


def _weights_said(store: Store, record: Record) -> str | None:
    """The digest of the weights that the certificate was made at, where there is one."""
    name = artifacts.certificate_name(record.key)
    if name not in record.files:
        return None
    said = orjson.loads((store.root / name).read_bytes()).get("weights")
    return str(said) if said is not None else None


def _bench(
    asked: Params, record: Record, benches: dict[str, Workbench], say: Callable[[str], None]
) -> Workbench:
    """A workbench with the parameters of a result; one for all results that share them."""
    changes: dict[str, Any] = {
        key: record.parameters[key] for key in _TAKEN_OVER if key in record.parameters
    }
    reference = record.parameters.get("objective.reference")
    own = params.digest(changes)
    if own not in benches:
        sections = asked.model_dump()
        for key, value in changes.items():
            section, _, name = key.partition(".")
            sections[section][name] = value
        benches[own] = open_bench(Params.model_validate(sections), say)
    if benches[own].reference_digest != reference:
        raise ParameterError(
            "objective.reference: the result was made with another reference point, "
            f"of SHA-256 {reference}; give that file"
        )
    return benches[own]
