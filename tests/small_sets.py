"""Small sets of digits in the files of MNIST: given, damaged and as they must be stored."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np

from spectra import idx


def small_set(*, seed: int = 0, train: int = 20, test: int = 5) -> dict[str, bytes]:
    generator = np.random.default_rng(seed)
    files = {}
    for (images, labels), count in ((idx.TRAIN, train), (idx.TEST, test)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[images] = idx.encode(pixels)
        files[labels] = idx.encode(generator.integers(0, 10, count, dtype=np.uint8))
    return files


def put(files: dict[str, bytes], folder: Path, *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def flip(path: Path, where: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def stored_as(files: dict[str, bytes]) -> dict[str, bytes]:
    """What a folder must hold, to the byte and to the last file name."""
    sums = "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in idx.FILES)
    return {**files, "SHA256SUMS": sums.encode()}


class Lines(list[str]):
    """Receives messages and holds them to be single lines."""

    def __call__(self, line: str) -> None:  # noqa: D102
        assert "\n" not in line
        self.append(line)
