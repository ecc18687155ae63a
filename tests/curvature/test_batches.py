"""The same batches on every pass, and what is refused because it cannot promise them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from spectra.curvature.batches import Batch, Batches, examples_of
from spectra.errors import UsageError

X = torch.arange(20.0).reshape(10, 2)
Y = torch.arange(10)


class Stream:
    """Gives what its function gives, a pass at a time."""

    def __init__(self, passes: list[list[tuple[Tensor, Tensor]]]) -> None:
        self.passes = iter(passes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(next(self.passes))


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize(
    ("data", "sizes", "streamed"),
    [
        ((X, Y), [10], False),
        ([X, Y], [10], False),
        ([(X[:7], Y[:7]), [X[7:], Y[7:]]], [7, 3], False),
        (DataLoader(TensorDataset(X, Y), batch_size=4), [4, 4, 2], True),
        (Stream([[(X[:1], Y[:1]), (X[1:], Y[1:])]] * 2), [1, 9], True),
    ],
    ids=["pair", "list pair", "batches", "loader", "stream"],
)
def test_every_kind_of_data_gives_all_examples_twice(
    data: object, sizes: list[int], streamed: bool
):
    batches = Batches(data)

    assert batches.streamed == streamed
    assert (batches.pair is None) == (len(sizes) > 1)
    assert [examples_of(batch) for batch in batches] == sizes
    inputs, targets = joined(batches)
    assert torch.equal(inputs, X)
    assert torch.equal(targets, Y)


def test_tensors_are_cut_with_a_ragged_last_batch():
    assert [len(y) for _, y in Batches((X, Y), batch_size=4)] == [4, 4, 2]
    assert [len(y) for _, y in Batches((torch.zeros(1100, 1), torch.zeros(1100)))] == [512, 512, 76]


def test_inputs_may_be_tuples_and_mappings():
    (tuple_batch,) = Batches([((X, Y), None)])
    (dict_batch,) = Batches([({"ids": X}, {"labels": Y[:3]})])

    assert torch.equal(tuple_batch[0][1], Y)
    assert examples_of(tuple_batch) == 10
    assert torch.equal(dict_batch[0]["ids"], X)
    assert examples_of(dict_batch) == 3


# -------------------------------------------------------------------------- pass against pass


def changed(kind: str) -> list[Batch]:
    """The batches (0..3), (4..9) after something happened to them."""
    x, y = X.clone(), Y.clone()
    cut = 4
    if kind == "flipped":
        x = x.flip(1)  # the sum of every example stays
    elif kind == "one bit":
        x[5, 0] += 1e-6
    elif kind == "label":
        y[4], y[5] = Y[5], Y[4]
    elif kind == "dtype":
        x = x.double()
    elif kind == "shape":
        x = x[:, None]
    elif kind == "cut":
        cut = 5
    return [(x[:cut], y[:cut]), (x[cut:], y[cut:])]


@pytest.mark.parametrize("kind", ["flipped", "one bit", "label", "dtype", "shape", "cut"])
def test_a_batch_that_changed_is_refused(kind: str):
    batches = Batches(Stream([changed("no"), changed("no"), changed(kind)]))
    assert len(list(batches)) == len(list(batches)) == 2

    with pytest.raises(UsageError, match=r"batch [12] is not what it was .* shuffle=False"):
        list(batches)


@pytest.mark.parametrize("order", [[1, 0], [0], [], [0, 1, 1]], ids=str)
def test_batches_that_come_otherwise_are_refused(order: list[int]):
    same = changed("no")
    batches = Batches(Stream([same, [same[i] for i in order]]))
    list(batches)

    with pytest.raises(
        UsageError, match=r"is not what it was|gave 2 batches at first and [01] now"
    ):
        list(batches)


def test_a_pass_that_was_broken_off_binds_nothing():
    batches = Batches(Stream([changed("cut"), changed("no"), changed("no")]))
    next(iter(batches))

    assert len(list(batches)) == len(list(batches)) == 2


def test_a_loader_that_shuffles_unseen_is_found_out():
    """By a sampler of its own kind, which no name gives away."""

    class Sneaky(RandomSampler):
        pass

    data = TensorDataset(X, Y)
    order = (i for run in ([3, 1, 2, 0], [0, 1, 2, 3]) for i in run)

    class Once:
        def __iter__(self) -> Iterator[int]:
            return (next(order) for _ in range(4))

        def __len__(self) -> int:
            return 4

    batches = Batches(DataLoader(data, batch_size=2, sampler=Once()))
    list(batches)

    with pytest.raises(UsageError, match="batch 1 is not"):
        list(batches)
    with pytest.raises(UsageError, match="Sneaky"):
        Batches(DataLoader(data, sampler=Sneaky(data)))


# ---------------------------------------------------------------------------- refused at sight


class Pairs(Dataset[tuple[Tensor, int]]):
    """A data set of single examples."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return X[i], i


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(TensorDataset(X, Y), shuffle=True), "shuffle=False"),
        (((X, Y) for _ in range(2)), "only once; pass a list"),
        (iter([(X, Y)]), "only once"),
        (Pairs(), r"DataLoader\(dataset"),
        (X, "are a Tensor"),
        ({"x": X}, "are a dict"),
        (3, "are a int"),
        ((X, Y[:9]), r"\(10, 2\) and targets \(9,\)"),
        ([(X, Y), (X, Y, Y)], "batch 2 is a tuple of 3, not a pair"),
        ([(X, Y), X], "batch 2 is a Tensor, not a pair"),
        ([(X.numpy(), Y.numpy())], "inputs of batch 1 are a ndarray .* torch.as_tensor"),
        ((X.numpy(), Y.numpy()), "batch 1 is a ndarray, not a pair"),
    ],
)
def test_what_is_no_data_is_refused_with_the_remedy(data: object, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        Batches(data)
    assert "\n" not in str(caught.value)


def test_batches_of_a_stream_are_checked_as_they_come():
    with pytest.raises(UsageError, match="batch 1 is a Tensor"):
        list(Batches(DataLoader(X, batch_size=2)))  # type: ignore[arg-type]


def test_a_batch_size_must_be_one_and_of_use():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Batches((X, Y), batch_size=0)
    with pytest.raises(ValueError, match="in batches"):
        Batches([(X, Y)], batch_size=2)
