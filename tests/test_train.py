"""Training against PyTorch's own optimisers and autograd, and what early stopping promises."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import astuple, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import oracles
from clouds import DATA, MLP, SPARSE, START, TEST, WIDTHS, draw, examples, run
from spectra.backprop import Forward, Layers
from spectra.descent import Optimisation
from spectra.errors import DivergedError
from spectra.minibatches import SplitRows
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.train import Epoch, Examples, evaluate, train


def reference_course(
    data: Examples, how: Optimisation, weight_decay: float, origin_P: Tensor | None, epochs: int
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
            loss = functional.cross_entropy(network(data.inputs_ND[batch]), data.labels_N[batch])
            if origin_P is not None:
                offset_P = nn.utils.parameters_to_vector(network.parameters()) - origin_P
                loss = loss + weight_decay / 2 * offset_P.square().sum()
            loss.backward()
            optimizer.step()
        course.append(nn.utils.parameters_to_vector(network.parameters()).detach().clone())
    return course


@pytest.mark.parametrize("data", [DATA, SPARSE], ids=["dense", "mostly background"])
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
    how: Optimisation, convention: str, factor: float, referenced: bool, data: Examples
):
    """Adam and SGD with weight_decay = 2c on the same batches, the last of 2 examples ragged.

    Every epoch of three improves, so each run's best weights are its last.
    """
    assert isinstance(data.rows, SplitRows) == (data is SPARSE)
    origin_P = MLP.initial(draw(8), torch.float64) if referenced else None
    penalty = L2Penalty(0.004, convention, origin_P)

    course = reference_course(data, how, factor * 0.004, origin_P, 3)
    for epochs, expected_P in enumerate(course, start=1):
        trained = run(replace(how, max_epochs=epochs), penalty=penalty, data=data)
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
