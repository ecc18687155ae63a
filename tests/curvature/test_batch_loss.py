"""Sums and what they are divided by: batches of any size make the loss of all data at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.curvature.batch_loss import BatchLoss, Loss
from spectra.errors import UsageError

DRAW = torch.Generator().manual_seed(31)
N, C = 11, 4
OUTPUT = torch.randn(N, C, generator=DRAW, dtype=torch.float64)
LABELS = torch.randint(0, C, (N,), generator=DRAW)
SOME = torch.where(torch.arange(N) % 3 == 0, -100, LABELS)
REAL = torch.randn(N, C, generator=DRAW, dtype=torch.float64)
SHARE = torch.softmax(REAL, 1)
SIGNS = 2 * torch.randint(0, 2, (N, C), generator=DRAW) - 1.0
WEIGHT = torch.tensor([0.1, 5.0, 1.0, 2.5], dtype=torch.float64)
PIXELS = torch.randn(N, C, 2, 3, generator=DRAW, dtype=torch.float64)
PIXEL_LABELS = torch.randint(0, C, (N, 2, 3), generator=DRAW)
PIXEL_LABELS[:5, 0] = 2
CUTS = [[11], [4, 4, 3], [1] * 11, [9, 2]]


def combined(loss: BatchLoss, output: Tensor, targets: Tensor, cut: list[int]) -> float:
    """Σ S / Σ n over batches."""
    total, divisor = 0.0, 0.0
    for z, y in zip(output.split(cut), targets.split(cut), strict=True):
        part, n = loss(z, (z, y))
        assert part.shape == ()
        total, divisor = total + float(part), divisor + n
    return total / divisor


CE = nn.CrossEntropyLoss


def entropy(z: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy as a function of the caller's own."""
    return functional.cross_entropy(z, y)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    ("loss", "output", "targets"),
    [
        (CE(), OUTPUT, LABELS),
        (CE(label_smoothing=0.2), OUTPUT, LABELS),
        (CE(weight=WEIGHT), OUTPUT, LABELS),
        (CE(weight=WEIGHT, label_smoothing=0.2), OUTPUT, LABELS),
        (CE(), OUTPUT, SOME),
        (CE(weight=WEIGHT), OUTPUT, SOME),
        (CE(ignore_index=2), OUTPUT, LABELS),
        (CE(), OUTPUT, SHARE),
        (CE(weight=WEIGHT), OUTPUT, SHARE),
        (CE(ignore_index=2, weight=WEIGHT), PIXELS, PIXEL_LABELS),
        (nn.NLLLoss(weight=WEIGHT), OUTPUT.log_softmax(1), SOME),
        (functional.cross_entropy, OUTPUT, SOME),
        (partial(functional.cross_entropy, weight=WEIGHT, ignore_index=1), OUTPUT, LABELS),
        (functional.nll_loss, OUTPUT.log_softmax(1), SOME),
        (nn.MSELoss(), OUTPUT, REAL),
        (functional.mse_loss, OUTPUT, REAL),
        (partial(functional.huber_loss, delta=0.3), OUTPUT, REAL),
        (nn.L1Loss(), OUTPUT, REAL),
        (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), OUTPUT, SHARE),
        (nn.KLDivLoss(), OUTPUT.log_softmax(1), SHARE),
        (nn.KLDivLoss(reduction="batchmean"), OUTPUT.log_softmax(1), SHARE),
        (nn.MultiMarginLoss(), OUTPUT, LABELS),
        (nn.MultiLabelSoftMarginLoss(), OUTPUT, (SIGNS > 0).double()),
        (nn.SoftMarginLoss(), OUTPUT, SIGNS),
        (nn.PoissonNLLLoss(), OUTPUT, SHARE),
        (lambda z, y: ((z - y) ** 2).sum(1).mean(), OUTPUT, REAL),
        (entropy, OUTPUT, LABELS),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_batches_make_the_mean_that_the_loss_itself_gives(
    loss: Callable[..., Tensor], output: Tensor, targets: Tensor, cut: list[int]
):
    whole = float(loss(output, targets))
    assert abs(whole) > 1e-3

    assert combined(BatchLoss(loss), output, targets, cut) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (nn.MSELoss(reduction="sum"), None),
        (nn.MSELoss(reduction="sum"), "sum"),
        (partial(functional.mse_loss, reduction="sum"), None),
        (lambda z, y: ((z - y) ** 2).sum(), "sum"),
    ],
)
def test_a_sum_is_divided_by_the_number_of_examples(loss: Loss, reduction: str, cut: list[int]):
    expected = float(((OUTPUT - REAL) ** 2).sum()) / N

    actual = combined(BatchLoss(loss, reduction), OUTPUT, REAL, cut)

    assert actual == pytest.approx(expected, rel=1e-12)


def test_elements_count_where_examples_have_unequal_ones():
    """Two sequences of 2 and 5 steps, batched one by one: the mean over the 7."""
    short, long = OUTPUT[None, :2], OUTPUT[None, 2:7]
    loss = BatchLoss(nn.MSELoss())

    parts = [loss(z, (z, torch.zeros_like(z))) for z in (short, long)]

    total, divisor = (sum(column) for column in zip(*parts, strict=True))
    assert float(total / divisor) == pytest.approx(float((OUTPUT[:7] ** 2).mean()), rel=1e-12)


def test_a_batch_of_ignored_labels_adds_nothing():
    part, n = BatchLoss(CE())(OUTPUT, (OUTPUT, torch.full((N,), -100)))

    assert (float(part), n) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (lambda z, y: functional.cross_entropy(z, y, weight=WEIGHT), None),
        (lambda z, y: functional.cross_entropy(z, y, ignore_index=1), "mean"),
        (lambda z, y: functional.cross_entropy(z, y, reduction="sum"), None),
        (entropy, "sum"),
        (lambda z, y: ((z.mean(0) - y.double().mean()) ** 2).sum(), None),
    ],
    ids=["weights", "ignored", "sum as mean", "mean as sum", "couples examples"],
)
def test_a_function_that_is_not_what_it_is_said_to_be_is_refused(loss: Loss, reduction: str):
    with pytest.raises(UsageError, match="two parts of it make") as caught:
        BatchLoss(loss, reduction)(OUTPUT, (OUTPUT, LABELS))
    assert "\n" not in str(caught.value)


def test_a_module_of_the_callers_own_says_its_reduction():
    class Squares(nn.Module):
        reduction = "sum"

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return ((z - y) ** 2).sum()

    loss = BatchLoss(Squares())

    assert loss.reduction == "sum"
    assert combined(loss, OUTPUT, REAL, [5, 6]) == pytest.approx(
        float(((OUTPUT - REAL) ** 2).sum()) / N
    )


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(UsageError, match="reduction='none'"):
        BatchLoss(nn.MSELoss(reduction="none"))
    with pytest.raises(UsageError, match=r"scalar tensor, got \(11, 4\)"):
        BatchLoss(lambda z, _y: z**2)(OUTPUT, (OUTPUT, LABELS))
    with pytest.raises(UsageError, match="scalar tensor, got float"):
        BatchLoss(lambda _z, _y: 1.0)(OUTPUT, (OUTPUT, LABELS))  # type: ignore[arg-type,return-value]


def test_contradictions_are_programming_mistakes():
    with pytest.raises(ValueError, match="says 'mean'"):
        BatchLoss(nn.MSELoss(), "sum")
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        BatchLoss(nn.MSELoss(), "none")  # type: ignore[arg-type]


def test_the_loss_of_the_caller_is_left_as_it_is():
    loss = nn.MSELoss()

    BatchLoss(loss)(OUTPUT, (OUTPUT, REAL))

    assert loss.reduction == "mean"


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (CE(), True),
        (CE(reduction="sum"), True),
        (functional.cross_entropy, True),
        (partial(functional.cross_entropy, reduction="sum"), True),
        (CE(weight=WEIGHT), False),
        (CE(label_smoothing=0.1), False),
        (CE(ignore_index=0), False),
        (partial(functional.cross_entropy, label_smoothing=0.1), False),
        (nn.NLLLoss(), False),
        (entropy, False),
        (type("Focal", (CE,), {"__module__": "mine"})(), False),
    ],
)
def test_a_plain_cross_entropy_is_told_from_others(loss: Loss, plain: bool):
    assert BatchLoss(loss).plain_cross_entropy == plain
