"""Products of a chunk with a first layer, against the dense matrix."""

from __future__ import annotations

import pytest
import torch

from backgrounds import BACKGROUND, mostly_background
from spectra.chunks import Entries


@pytest.mark.parametrize("width", [1, 2, 3, 12])
def test_a_table_may_lie_in_memory_in_any_way(width: int):
    """Column by column, with gaps, or as a single column of a wider matrix."""
    x = mostly_background(40, 9, BACKGROUND)
    entries = Entries.of(x - BACKGROUND)
    draw = torch.Generator().manual_seed(7)
    wide = torch.randn(9, 2 * width, generator=draw, dtype=torch.float64)

    for table in (wide[:, :width], wide[:, ::2], wide[:, :width].t().contiguous().t()):
        expected = (x - BACKGROUND) @ table
        torch.testing.assert_close(entries.times(table), expected, rtol=1e-12, atol=1e-13)
