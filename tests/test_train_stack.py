"""A stack of networks against each of its members trained alone.

Those alone are held against a plain PyTorch loop in `test_train.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import pytest
import torch
from torch import Tensor

from clouds import DATA, MLP, START, TEST, draw, run
from spectra import descent
from spectra.descent import Optimisation
from spectra.errors import DivergedError
from spectra.objective import L2Penalty
from spectra.train import Epoch, Examples, Trained, train, train_stack


@dataclass(frozen=True)
class Members:
    """What a stack is made of: starts, strengths, and seeds of the orders."""

    theta_MP: Tensor
    penalties: list[L2Penalty]
    seeds: list[int]

    @classmethod
    def of(
        cls, strengths: list[float], *, origin_P: Tensor | None = None, scale: float = 2.0
    ) -> Members:
        """Different starts and orders at given strengths."""
        starts = [scale * MLP.initial(draw(20 + i), torch.float64) for i in range(len(strengths))]
        penalties = [L2Penalty(l2, "full", origin_P) for l2 in strengths]
        return cls(torch.stack(starts), penalties, [40 + i for i in range(len(strengths))])

    def together(
        self,
        how: Optimisation,
        *,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        on_epoch: Callable[[int, Epoch], None] = lambda _, __: None,
    ) -> list[Trained | DivergedError]:
        """All of them; on "cpu, stacked" as a GPU does it, every operation for all at once."""
        if device == "cpu, stacked":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(descent, "_InTurn", descent._Together)
                return self.together(how, dtype=dtype, on_epoch=on_epoch)
        data, test = (
            Examples(e.inputs_ND.to(device, dtype), e.labels_N.to(device)) for e in (DATA, TEST)
        )
        penalties = [
            p if p.reference_P is None else replace(p, reference_P=p.reference_P.to(device, dtype))
            for p in self.penalties
        ]
        return train_stack(
            MLP, self.theta_MP.to(device, dtype), data=data, test=test, penalties=penalties,
            how=how, generators=[draw(seed) for seed in self.seeds], on_epoch=on_epoch,
        )  # fmt: skip

    def alone(self, how: Optimisation, member: int) -> Trained:
        """One of them, by `train`, in float64 on the CPU."""
        return train(
            MLP, self.theta_MP[member], data=DATA, test=TEST, penalty=self.penalties[member],
            how=how, generator=draw(self.seeds[member]),
        )  # fmt: skip


def check_same(actual: Trained | DivergedError, expected: Trained, *, rtol: float = 1e-10) -> None:
    """The same course, epoch by epoch and number by number, and the same weights."""
    assert isinstance(actual, Trained)
    assert actual.best.epoch == expected.best.epoch
    assert len(actual.history) == len(expected.history)
    for epoch, wanted in zip(actual.history, expected.history, strict=True):
        assert astuple(epoch) == pytest.approx(astuple(wanted), rel=rtol)
    assert actual.best == actual.history[actual.best.epoch - 1]
    torch.testing.assert_close(
        actual.theta_P.cpu().double(), expected.theta_P, rtol=rtol, atol=rtol / 100
    )


ADAM = Optimisation(lr=0.02, batch_size=16, max_epochs=4)
MOMENTUM = replace(ADAM, optimizer="sgd", momentum=0.9)
PLAIN = replace(ADAM, optimizer="sgd", lr=0.1, momentum=0.0)
optimisers = pytest.mark.parametrize(
    "how", [ADAM, MOMENTUM, PLAIN], ids=["adam", "momentum", "sgd"]
)
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "cpu, stacked",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
STRENGTHS = {"strengths": [0.0, 0.004, 0.3], "replicates": [0.004] * 3, "one": [0.004]}


@devices
@pytest.mark.parametrize("batch_size", [16, 4])
@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize("kind", STRENGTHS)
@optimisers
def test_members_of_a_stack_come_out_as_they_would_alone(
    how: Optimisation, kind: str, referenced: bool, batch_size: int, device: str
):
    """Each in its own order, the last batch a ragged 2; a GPU does eight of 4 as one graph."""
    how = replace(how, batch_size=batch_size)
    origin_P = MLP.initial(draw(8), torch.float64) if referenced else None
    members = Members.of(STRENGTHS[kind], origin_P=origin_P)

    outcomes = members.together(how, device=device)

    assert len(outcomes) == len(STRENGTHS[kind])
    for i, outcome in enumerate(outcomes):
        check_same(outcome, members.alone(how, i))
    norms = {outcome.best.theta_norm for outcome in outcomes if isinstance(outcome, Trained)}
    assert len(norms) == len(outcomes)


@devices
@pytest.mark.parametrize("kind", ["strengths", "replicates"])
def test_a_stack_in_float32_differs_by_round_off(kind: str, device: str):
    """From its members alone in float64, after 16 steps."""
    members = Members.of(STRENGTHS[kind])

    for i, outcome in enumerate(members.together(ADAM, dtype=torch.float32, device=device)):
        assert isinstance(outcome, Trained)
        assert outcome.theta_P.dtype == torch.float32
        check_same(outcome, members.alone(ADAM, i), rtol=2e-4)


def test_a_batch_that_is_all_the_data_is_one_step_of_every_member():
    members = Members.of(STRENGTHS["strengths"])
    how = replace(ADAM, batch_size=64)

    for i, outcome in enumerate(members.together(how)):
        check_same(outcome, members.alone(how, i))


LEAVING = {
    "adam": Optimisation(lr=0.1, batch_size=16, max_epochs=14, patience=2),
    "momentum": Optimisation(
        optimizer="sgd", lr=0.1, momentum=0.9, batch_size=16, max_epochs=14, patience=2
    ),
}


@devices
@pytest.mark.parametrize("kind", ["strengths", "replicates"])
@pytest.mark.parametrize("optimizer", LEAVING)
def test_each_member_stops_by_itself(optimizer: str, kind: str, device: str):
    """It costs nothing then; those that stay go on with their moments and count of steps."""
    members = Members.of([0.3, 0.0, 0.02, 0.1] if kind == "strengths" else [0.02] * 6)
    how = LEAVING[optimizer]
    told: dict[int, list[Epoch]] = {}
    taken, one_pass = [], descent._Descent.one_pass

    def counted(self: descent._Descent, order: Tensor) -> None:
        taken.append(order.numel())
        one_pass(self, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent._Descent, "one_pass", counted)
        outcomes = members.together(
            how, device=device, on_epoch=lambda i, epoch: told.setdefault(i, []).append(epoch)
        )

    lengths = []
    for i, outcome in enumerate(outcomes):
        alone = members.alone(how, i)
        check_same(outcome, alone, rtol=1e-8)
        assert told[i] == list(getattr(outcome, "history", []))
        lengths.append(len(alone.history))
    # Who has stopped takes no further example.
    assert sum(taken) == len(DATA.labels_N) * sum(lengths)
    # Some leave early, and somebody goes on for long enough to have missed lost moments.
    assert len(set(lengths)) >= 3
    assert max(lengths) >= sorted(set(lengths))[0] + 3


@devices
@optimisers
def test_a_member_that_diverges_leaves_the_others_alone(how: Optimisation, device: str):
    """It overflows, some in the first epoch and some later; the others come out unchanged."""
    how = replace(how, max_epochs=8)
    members = Members.of([0.0, 1e10, 0.004, 0.01])
    if how.optimizer == "adam":  # whose steps have a length: it starts where squares overflow
        members.theta_MP[1] = 1e160
    told: list[int] = []

    outcomes = members.together(how, device=device, on_epoch=lambda i, _: told.append(i))

    lost = outcomes.pop(1)
    assert isinstance(lost, DivergedError)
    assert re.search(r"L2 1e\+10 left the finite numbers in epoch \d .*train\.lr", str(lost))
    assert told.count(1) == int(re.findall(r"epoch (\d)", str(lost))[0])
    assert (told.count(1) > 1) == (how.optimizer != "adam")
    for i, outcome in zip((0, 2, 3), outcomes, strict=True):
        check_same(outcome, members.alone(how, i))
        assert told.count(i) == 8


def test_a_stack_of_which_none_is_left_ends():
    members = Members.of([1e10, 1e12])
    how = replace(PLAIN, max_epochs=50)

    outcomes = members.together(how)

    assert all(isinstance(outcome, DivergedError) for outcome in outcomes)
    assert [re.findall(r"L2 (\S+)", str(outcome)) for outcome in outcomes] == [
        ["1e+10"],
        ["1e+12"],
    ]


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stack_run_twice_gives_the_same_bytes(dtype: torch.dtype, device: str):
    """Also where members leave; and another order of examples gives others."""
    members = Members.of([0.3, 0.0, 0.02])
    first, second = (members.together(LEAVING["adam"], dtype=dtype, device=device) for _ in "12")
    torch.manual_seed(5)
    third = replace(members, seeds=[1, 41, 42]).together(
        LEAVING["adam"], dtype=dtype, device=device
    )

    for one, other in zip(first, second, strict=True):
        assert isinstance(one, Trained)
        assert isinstance(other, Trained)
        assert torch.equal(one.theta_P, other.theta_P)
        assert one.history == other.history
    assert isinstance(first[0], Trained)
    assert isinstance(third[0], Trained)
    assert not torch.equal(first[0].theta_P, third[0].theta_P)


def test_a_stack_s_starts_are_left_as_they_were():
    """Also those of a stack that is one vector seen several times."""
    start_P = START.clone()
    members = Members(start_P.expand(3, -1), [L2Penalty(0.01)] * 3, [7, 7, 8])

    first, second, third = members.together(ADAM)

    assert torch.equal(start_P, START)
    assert isinstance(first, Trained)
    assert isinstance(second, Trained)
    assert isinstance(third, Trained)
    check_same(first, run(ADAM))
    torch.testing.assert_close(first.theta_P, second.theta_P, rtol=1e-13, atol=1e-15)
    assert not torch.equal(first.theta_P, third.theta_P)


def test_members_must_come_with_a_penalty_and_a_generator_each():
    members = Members.of([0.0, 0.1])

    with pytest.raises(ValueError, match="argument 2 is shorter"):
        replace(members, seeds=[1]).together(ADAM)
