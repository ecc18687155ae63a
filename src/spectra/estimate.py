"""What a sweep will cost, measured on this machine just before it starts.

Time is an upper bound in epochs (early stopping usually ends sooner) and a typical number of
products; disk is what the files take. A sweep that the disk cannot hold is refused before any
work is done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from spectra import analysis, artifacts
from spectra.descent import Optimisation
from spectra.errors import StorageError
from spectra.params import CertificateParams
from spectra.train import Examples, train
from spectra.workbench import Workbench


@dataclass(frozen=True)
class Estimate:
    """Cost of one strength: seconds of training at most, of its spectrum, and bytes."""

    training_s: float
    spectrum_s: float
    bytes: int


def measure(bench: Workbench) -> Estimate:
    """Time a short stretch of training and one Hessian product; takes a second or two."""
    network, params = bench.network, bench.params
    data, test = bench.train_set, bench.test_set
    batch = params.train.batch_size
    some = min(len(data.labels_N), 64 * batch)
    few = -(-some * len(test.labels_N) // len(data.labels_N))
    theta_P = bench.initial(0)
    ends: list[float] = []
    # The second epoch of two: what happens once, such as dividing the inputs, is not an epoch's.
    train(
        network, theta_P,
        data=Examples(data.inputs_ND[:some], data.labels_N[:some]),
        test=Examples(test.inputs_ND[:few], test.labels_N[:few]),
        penalty=bench.penalty(0.0),
        how=Optimisation(batch_size=batch, max_epochs=2, threads=params.train.threads),
        generator=torch.Generator().manual_seed(0),
        on_epoch=lambda _: ends.append(time.monotonic()),
    )  # fmt: skip
    epoch_s = (ends[1] - ends[0]) * len(data.labels_N) / some
    hessian = analysis.hessian(bench, network, theta_P)
    hessian(theta_P)
    began = time.monotonic()
    hessian(theta_P)
    product_s = time.monotonic() - began
    k = params.spectrum.k
    products = 6 * k + 40 + certificate_products(k, params.certificate)
    return Estimate(
        training_s=epoch_s * params.train.max_epochs,
        spectrum_s=product_s * products,
        bytes=strength_bytes(
            network.dim, k, params.artifacts.eigenvectors, params.runtime.dtype,
            tracked=params.tracking.enabled, vectors_tracked=params.tracking.log_eigenvectors,
        ),
    )  # fmt: skip


def certificate_products(k: int, how: CertificateParams) -> int:
    """What a certificate costs, in products that spectra are solved with.

    One in float64 by differentiation costs about as much as five.
    """
    if how.pairs is None:
        return 0
    checked = k if how.pairs == "all" else min(how.pairs, k)
    return how.probe + checked + 5 * (checked + 3)


def strength_bytes(
    dim: int, k: int, form: str, dtype: str, *, tracked: bool, vectors_tracked: bool = False
) -> int:
    """Bytes that the files of one strength take, the tracker's copies included.

    Args:
        dim: P.
        k: Eigenvectors.
        form: Their format: "csv", "npy" or "none".
        dtype: Of the numbers.
        tracked: Whether the weights are also kept as an artifact of a run.
        vectors_tracked: Whether the eigenvectors are too.
    """
    text, binary = artifacts.TEXT_BYTES[dtype], 8 if dtype == "float64" else 4
    vectors = {"csv": text, "npy": binary, "none": 0}[form] * k * dim
    if tracked and vectors_tracked:
        vectors *= 2
    gradient = text * dim
    weights = binary * dim * (2 if tracked else 1)
    return int(vectors + gradient + weights) + 400 * k + 40_000


def announce(
    bench: Workbench, folder: Path, left: int, total: int, say: Callable[[str], None]
) -> None:
    """Say what the strengths that are left will take.

    Raises:
        StorageError: They do not fit on the disk.
    """
    one = measure(bench)
    # Beside a training step, which takes one thread, spectra take what is left of the others.
    beside = bench.params.runtime.threads if bench.workers else 1
    each = max(one.training_s, one.training_s / beside + one.spectrum_s)
    need = left * one.bytes
    free = shutil.disk_usage(_existing(folder)).free
    done = f" ({total - left} of {total} are done)" if left < total else ""
    say(
        f"{left} strengths to do{done}: at most about "
        f"{duration(left * each)} "
        f"({one.training_s:.0f} s of training and {one.spectrum_s:.0f} s of spectrum each, less "
        f"where it stops early), {size(need)} of disk in {folder} ({size(free)} free)"
    )
    if need > free:
        raise StorageError(
            f"{left} strengths need {size(need)} in {folder}, {size(free)} are free; use "
            "--eigenvectors npy (a third) or none, or choose another disk with --out"
        )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as a person says them, in powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
