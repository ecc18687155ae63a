"""Products of tall matrices with a narrow side, in the order of summation that keeps precision.

Where one side of a product has a few columns only, matrix libraries add the terms of an entry up in
one running sum. Over 60,000 examples whose terms are alike, the round-off of such a sum grows with
their number: 4e-4 of the result in float32, where wider products show 1e-6. They are slow besides.
Here the narrow side comes first, which the libraries divide into many sums, and where that does not
help the rows are added up in blocks.

Letters: n rows, X and Y columns.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (SIAM, 2002), ch. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 12
"""Columns below which a product is narrow."""
_FEW = 4
"""Columns below which it stays one running sum with the narrow side first."""
_BLOCK = 100
"""Rows added up in one sum then."""


def product(a_nX: Tensor, w_XY: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """The product aw, plus a bias; a narrow result lies column by column."""
    if w_XY.shape[1] >= NARROW:
        return a_nX @ w_XY if bias_Y is None else torch.addmm(bias_Y, a_nX, w_XY)
    w_YX = w_XY.t().contiguous()
    a_Xn = a_nX.t()
    result_Yn = w_YX @ a_Xn if bias_Y is None else torch.addmm(bias_Y[:, None], w_YX, a_Xn)
    return result_Yn.t()


def add_product(sums_nY: Tensor, a_nX: Tensor, w_XY: Tensor) -> Tensor:
    """Add the product aw to what is there, which is returned."""
    if w_XY.shape[1] >= NARROW:
        return sums_nY.addmm_(a_nX, w_XY)
    return sums_nY.add_(product(a_nX, w_XY))


def outer(a_nX: Tensor, b_nY: Tensor) -> Tensor:
    """The product aᵀb, a sum over rows."""
    x, y = a_nX.shape[1], b_nY.shape[1]
    if x >= _FEW and y >= NARROW:
        return a_nX.t() @ b_nY
    if y >= _FEW and x >= NARROW:
        return (b_nY.t() @ a_nX).t()
    return _in_blocks(b_nY, a_nX).t() if y < x else _in_blocks(a_nX, b_nY)


def add_outer(sums_XY: Tensor, a_nX: Tensor, b_nY: Tensor) -> None:
    """Add aᵀb to what is there."""
    if a_nX.shape[1] >= _FEW and b_nY.shape[1] >= NARROW:
        sums_XY.addmm_(a_nX.t(), b_nY)
    else:
        sums_XY += outer(a_nX, b_nY)


def _in_blocks(a_nX: Tensor, b_nY: Tensor) -> Tensor:
    """aᵀb by way of blocks of rows, the last of which may be smaller."""
    whole = len(a_nX) // _BLOCK * _BLOCK
    a_mbX, b_mbY = (rows[:whole].unflatten(0, (-1, _BLOCK)) for rows in (a_nX, b_nY))
    return torch.bmm(a_mbX.transpose(1, 2), b_mbY).sum(0) + a_nX[whole:].t() @ b_nY[whole:]
