"""What a sweep over the whole of MNIST needs of memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from spectra.params import DataParams

# The peak of this process alone: `ru_maxrss` would hold the size of whoever started it.
_MEASURED = """
import re
from spectra.cli import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_costliest_strengths_take_less_than_3_gib(mnist_params: DataParams, tmp_path: Path):
    """Around λ = 0.01, by the shipped parameters: the second trains beside the first's spectrum."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    words = ["sweep", "--strengths", "0.01,0.0102", "--max-epochs", "8"]

    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *words], cwd=tmp_path, capture_output=True, text=True,
        check=False, env=os.environ | {"SPECTRA_DATA_ROOT": mnist_params.root},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 3 * 2**20
    rows = [
        json.loads((tmp_path / "test_data" / f"manifest-{key}.json").read_text())["row"]
        for key in ("1-0.01000", "1-0.01020")
    ]
    assert [row["converged"] for row in rows] == [30, 30]
    assert sum(row["products"] for row in rows) > 250
