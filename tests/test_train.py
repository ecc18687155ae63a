"""Training against PyTorch's own optimisers and autograd, and what early stopping promises.

A stack of networks is held against each of its members trained alone, which is held against a
plain PyTorch loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import oracles
from spectra import train as module
from spectra.backprop import Forward, Layers
from spectra.errors import DivergedError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.train import Epoch, Examples, Optimisation, Trained, evaluate, train, train_stack

WIDTHS = (6, 5, 4, 3)
MLP = Mlp(WIDTHS)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Examples:
    """Three overlapping clouds: learnable, and not to zero loss."""
    generator = draw(seed)
    labels_N = torch.randint(0, 3, (count,), generator=generator)
    x = torch.randn(count, 6, generator=generator, dtype=dtype)
    x[:, :3] += 1.5 * functional.one_hot(labels_N, 3)
    return Examples(x, labels_N)


DATA, TEST = examples(50, 1), examples(30, 2)
START = 2 * MLP.initial(draw(3), torch.float64)


def run(how: Optimisation, *, penalty: L2Penalty | None = None, **changes: object) -> Trained:
    arguments = {
        "data": DATA,
        "test": TEST,
        "penalty": penalty or L2Penalty(0.01),
        "generator": draw(7),
        **changes,
    }
    return train(MLP, START, how=how, **arguments)


def reference_course(
    how: Optimisation, weight_decay: float, origin_P: Tensor | None, epochs: int
) -> list[Tensor]:
    """θ after every epoch of a plain PyTorch loop over an nn.Sequential."""
    parts: list[nn.Module] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        parts += [nn.Linear(fan_in, fan_out, dtype=torch.float64), nn.Sigmoid()]
    network = nn.Sequential(*parts[:-1])
    nn.utils.vector_to_parameters(START.clone(), network.parameters())
    decay = weight_decay if origin_P is None else 0.0
    optimizer: torch.optim.Optimizer
    if how.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), lr=how.lr, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=decay
        )
    generator, course = draw(7), []
    for _ in range(epochs):
        for batch in torch.randperm(50, generator=generator).split(how.batch_size):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(DATA.inputs_ND[batch]), DATA.labels_N[batch])
            if origin_P is not None:
                offset_P = nn.utils.parameters_to_vector(network.parameters()) - origin_P
                loss = loss + weight_decay / 2 * offset_P.square().sum()
            loss.backward()
            optimizer.step()
        course.append(nn.utils.parameters_to_vector(network.parameters()).detach().clone())
    return course


@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize(("convention", "factor"), [("full", 2.0), ("half", 1.0)])
@pytest.mark.parametrize(
    "how",
    [
        Optimisation(lr=0.01, batch_size=16, max_epochs=3),
        Optimisation(optimizer="sgd", lr=0.01, momentum=0.9, batch_size=16, max_epochs=3),
        Optimisation(optimizer="sgd", lr=0.1, momentum=0.0, batch_size=16, max_epochs=3),
    ],
    ids=["adam", "momentum", "sgd"],
)
def test_epochs_equal_those_of_a_plain_loop(
    how: Optimisation, convention: str, factor: float, referenced: bool
):
    """Adam and SGD with weight_decay = 2c on the same batches, the last of 2 examples ragged.

    Every epoch of three improves, so each run's best weights are its last.
    """
    origin_P = MLP.initial(draw(8), torch.float64) if referenced else None
    penalty = L2Penalty(0.004, convention, origin_P)

    course = reference_course(how, factor * 0.004, origin_P, 3)
    for epochs, expected_P in enumerate(course, start=1):
        trained = run(replace(how, max_epochs=epochs), penalty=penalty)
        assert trained.best.epoch == epochs
        torch.testing.assert_close(trained.theta_P, expected_P, rtol=1e-10, atol=1e-12)


def test_every_number_of_an_epoch_is_a_fact_about_its_weights():
    """Re-evaluating the returned weights gives the best epoch's numbers, to the last bit."""
    penalty = L2Penalty(0.02, "half")
    trained = run(Optimisation(lr=0.02, batch_size=16, max_epochs=6), penalty=penalty)
    theta_P, best = trained.theta_P, trained.best

    loss, accuracy = evaluate(MLP, theta_P, DATA)
    test_loss, test_accuracy = evaluate(MLP, theta_P, TEST)
    assert (best.cross_entropy, best.accuracy) == (loss, accuracy)
    assert (best.test_cross_entropy, best.test_accuracy) == (test_loss, test_accuracy)
    assert best.objective == loss + penalty.value(theta_P)
    direct = oracles.mean_loss(WIDTHS, "sigmoid", DATA.inputs_ND, DATA.labels_N, c=0.01)
    assert best.objective == pytest.approx(float(direct(theta_P)), rel=1e-12)
    assert best.theta_norm == pytest.approx(float(theta_P.norm()), rel=1e-14)
    assert best == trained.history[best.epoch - 1]


def test_epochs_are_told_as_they_end():
    told: list[Epoch] = []

    trained = run(Optimisation(max_epochs=4), on_epoch=told.append)

    assert tuple(told) == trained.history
    assert [epoch.epoch for epoch in told] == [1, 2, 3, 4]


ERRATIC = Optimisation(optimizer="sgd", lr=3.0, momentum=0.9, batch_size=16, max_epochs=200)


@pytest.mark.parametrize("patience", [1, 3, 7])
@pytest.mark.parametrize("monitor", ["objective", "cross_entropy"])
def test_patience_counts_epochs_without_a_new_best(patience: int, monitor: str):
    """A course that a large rate makes erratic ends exactly `patience` epochs after its best."""
    trained = run(replace(ERRATIC, patience=patience, monitor=monitor))
    watched = [getattr(epoch, monitor) for epoch in trained.history]

    assert trained.best.epoch == len(watched) - patience
    assert getattr(trained.best, monitor) == min(watched)
    assert len(watched) < ERRATIC.max_epochs
    # No earlier run of `patience` epochs without a new best: it would have stopped there.
    bests = [i for i, value in enumerate(watched) if value < min(watched[:i], default=1e9)]
    assert all(later - earlier <= patience for earlier, later in pairwise(bests))


def test_the_best_epoch_s_weights_are_restored():
    """The objective worsened after the best epoch, and the weights returned are not the last."""
    trained = run(replace(ERRATIC, patience=4))
    again = run(replace(ERRATIC, patience=4, max_epochs=trained.best.epoch))

    assert trained.history[-1].objective > 1.01 * trained.best.objective
    assert torch.equal(trained.theta_P, again.theta_P)
    loss, _ = evaluate(MLP, trained.theta_P, DATA)
    assert loss + L2Penalty(0.01).value(trained.theta_P) == trained.best.objective


def test_the_start_is_no_candidate():
    """Even where every epoch is worse than the start, an epoch's weights are returned."""
    start_P = run(Optimisation(lr=0.05, max_epochs=40)).theta_P
    trained = train(
        MLP, start_P, data=DATA, test=TEST, penalty=L2Penalty(0.01), generator=draw(7),
        how=Optimisation(lr=0.5, max_epochs=1),
    )  # fmt: skip

    loss, _ = evaluate(MLP, start_P, DATA)
    assert trained.best.objective > loss + L2Penalty(0.01).value(start_P)
    assert trained.best.epoch == 1
    assert not torch.equal(trained.theta_P, start_P)


def test_the_monitor_decides_what_best_means():
    """Learnt without a penalty, then shrunk by a strong one: L_eff falls while L_CE rises."""
    start_P = run(Optimisation(lr=0.02, max_epochs=40), penalty=L2Penalty(0.0)).theta_P
    how = Optimisation(lr=0.01, batch_size=16, max_epochs=30, patience=3)
    by_objective, by_cross_entropy = (
        train(
            MLP, start_P, data=DATA, test=TEST, penalty=L2Penalty(0.2),
            how=replace(how, monitor=monitor), generator=draw(7),
        )
        for monitor in ("objective", "cross_entropy")
    )  # fmt: skip

    assert by_cross_entropy.best.epoch == 1
    assert len(by_cross_entropy.history) == 4
    assert by_objective.best.epoch > 4
    assert by_objective.best.cross_entropy > by_cross_entropy.best.cross_entropy
    assert by_objective.best.objective < by_cross_entropy.best.objective


def test_the_start_is_left_as_it_was():
    before_P = START.clone()

    run(Optimisation(max_epochs=2))

    assert torch.equal(START, before_P)
    assert START.grad is None


@pytest.mark.parametrize(("activation", "l2"), [("relu", 0.0), ("sigmoid", 0.1)])
def test_divergence_names_the_learning_rate(activation: str, l2: float):
    """NaN by overflow of the scores, infinity by that of the penalty."""
    told: list[Epoch] = []
    with pytest.raises(DivergedError, match=r"epoch 1 .*train\.lr.*1e\+200"):
        train(
            Mlp(WIDTHS, activation), START, data=DATA, test=TEST, penalty=L2Penalty(l2),
            how=Optimisation(optimizer="sgd", lr=1e200), generator=draw(7), on_epoch=told.append,
        )  # fmt: skip
    assert len(told) == 1


def test_the_same_generator_gives_the_same_bytes():
    how = Optimisation(lr=0.01, batch_size=16, max_epochs=3)
    first, second = run(how), run(how)
    torch.manual_seed(5)
    other = run(how, generator=draw(8))

    assert torch.equal(first.theta_P, second.theta_P)
    assert [astuple(e) for e in first.history] == [astuple(e) for e in second.history]
    assert not torch.equal(first.theta_P, other.theta_P)


def test_float32_weights_stay_float32():
    data, test = examples(50, 1, torch.float32), examples(30, 2, torch.float32)
    trained = train(
        MLP, START.float(), data=data, test=test, penalty=L2Penalty(0.01),
        how=Optimisation(max_epochs=2), generator=draw(7),
    )  # fmt: skip

    assert trained.theta_P.dtype == torch.float32


@pytest.mark.parametrize("outcome", ["ends", "diverges", "is interrupted"])
def test_training_takes_its_own_threads_and_gives_them_back(
    outcome: str, monkeypatch: pytest.MonkeyPatch
):
    """However it ends."""
    within = set()
    forward = Layers.forward

    def spying(self: Layers, a_MNH: Tensor) -> Forward:
        within.add(torch.get_num_threads())
        return forward(self, a_MNH)

    def interrupt(_: Epoch) -> None:
        if outcome == "is interrupted":
            raise KeyboardInterrupt

    monkeypatch.setattr(Layers, "forward", spying)
    before = torch.get_num_threads()
    how = Optimisation(max_epochs=2, threads=before + 1)
    how = replace(how, optimizer="sgd", lr=1e200) if outcome == "diverges" else how
    ending = nullcontext() if outcome == "ends" else pytest.raises(
        DivergedError if outcome == "diverges" else KeyboardInterrupt
    )  # fmt: skip

    with ending:
        run(how, on_epoch=interrupt)

    assert within == {before + 1}
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------------------------- evaluation


def digits_like(count: int, seed: int, background: float = -0.4242) -> Examples:
    """Inputs of which two columns are off the background at every example, one never."""
    draw_ = draw(seed)
    x = torch.randn(count, 6, generator=draw_, dtype=torch.float64).abs() + background
    x[torch.rand(count, 6, generator=draw_) < 0.8] = background
    x[:, 2] = background
    x[:, [1, 4]] = torch.randn(count, 2, generator=draw_, dtype=torch.float64).abs() + background
    return Examples(x, torch.randint(0, 3, (count,), generator=draw_))


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 10_000])
@pytest.mark.parametrize("seldom", [False, True])
@pytest.mark.parametrize("widths", [(6, 3), WIDTHS], ids=str)
def test_evaluate_is_the_direct_mean(
    widths: tuple[int, ...], seldom: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of 4, 4 and 3 count by their examples; accuracy is in percent."""
    monkeypatch.setattr("spectra.inputs.CHUNK", chunk)
    data = digits_like(11, 5) if seldom else examples(11, 5)
    theta_P = 2 * torch.randn(Mlp(widths).dim, generator=draw(9), dtype=torch.float64)
    scores_NC = oracles.logits(widths, "sigmoid", theta_P, data.inputs_ND)

    loss, accuracy = evaluate(Mlp(widths), theta_P, data)

    assert bool(len(data.inputs.columns.seldom_S)) == seldom
    assert len(data.inputs.chunks) == -(-11 // chunk)
    expected = oracles.mean_loss(widths, "sigmoid", data.inputs_ND, data.labels_N)(theta_P)
    assert loss == pytest.approx(float(expected), rel=1e-13)
    pairs = zip(scores_NC, data.labels_N, strict=True)
    hits = sum(int(scores_C.argmax()) == int(label) for scores_C, label in pairs)
    assert 0 < hits < 11
    assert accuracy == pytest.approx(100 * hits / 11, rel=1e-14)


def test_evaluation_of_float32_adds_up_in_float64():
    """Ten thousand losses of log 3, as float32 rounds it: exact, which a float32 sum is not."""
    count = 10_000
    data = Examples(torch.zeros(count, 6), torch.zeros(count, dtype=torch.int64))

    loss, accuracy = evaluate(MLP, torch.zeros(MLP.dim), data)

    log_3 = torch.log(torch.tensor(3.0))
    assert loss == pytest.approx(float(log_3), rel=1e-13)
    assert float(log_3.repeat(count).sum()) / count != pytest.approx(float(log_3), rel=1e-13)
    assert accuracy == 100


def test_test_data_that_were_divided_otherwise_are_evaluated_exactly():
    """Training on sparse columns with a dense test set, and the other way round."""
    for data, test in [(digits_like(50, 5), TEST), (DATA, digits_like(30, 6))]:
        trained = run(Optimisation(max_epochs=2), data=data, test=test)

        loss = oracles.mean_loss(WIDTHS, "sigmoid", test.inputs_ND, test.labels_N)
        expected = float(loss(trained.theta_P))
        assert trained.best.test_cross_entropy == pytest.approx(expected, rel=1e-12)


def test_evaluate_leaves_no_graph(monkeypatch: pytest.MonkeyPatch):
    seen = []
    loss_sum = module.cross_entropy_sum

    def spying(scores_NC: Tensor, labels_N: Tensor, *, exact: bool) -> Tensor:
        seen.append(scores_NC)
        return loss_sum(scores_NC, labels_N, exact=exact)

    monkeypatch.setattr(module, "cross_entropy_sum", spying)

    evaluate(MLP, START.clone().requires_grad_(), DATA)

    assert [scores_NC.requires_grad for scores_NC in seen] == [False]


# -------------------------------------------------------------------------------------- stacks


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
        """All at once."""
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
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
STRENGTHS = {"strengths": [0.0, 0.004, 0.3], "replicates": [0.004] * 3, "one": [0.004]}


@devices
@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize("kind", STRENGTHS)
@optimisers
def test_members_of_a_stack_come_out_as_they_would_alone(
    how: Optimisation, kind: str, referenced: bool, device: str
):
    """Batches of 16, 16, 16 and the ragged 2, each member in its own order."""
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
    """Those that stay go on with their moments and their count of steps."""
    members = Members.of([0.3, 0.0, 0.02, 0.1] if kind == "strengths" else [0.02] * 6)
    how = LEAVING[optimizer]
    told: dict[int, list[Epoch]] = {}

    outcomes = members.together(
        how, device=device, on_epoch=lambda i, epoch: told.setdefault(i, []).append(epoch)
    )

    lengths = []
    for i, outcome in enumerate(outcomes):
        alone = members.alone(how, i)
        check_same(outcome, alone, rtol=1e-8)
        assert told[i] == list(getattr(outcome, "history", []))
        lengths.append(len(alone.history))
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
