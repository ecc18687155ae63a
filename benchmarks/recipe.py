"""The published recipe, as it is usually written: a DataLoader and double backward.

Every image is turned from a PIL image into a tensor and normalised anew each time it is used,
in training and in every Hessian product. A product differentiates twice per batch of 512; the
batches are averaged with their sizes as weights, for 60,000 is no multiple of 512. The solver
is `eigsh(k=30, which="LM", tol=1e-3)`, which here would take some ten minutes a network: the
row for it multiplies the product measured by the number of products counted with the same
solver, the same start and the same operator in memory.

Sources: the training and the solver of the sweep in arXiv 2512.11866; the transforms of
PyTorch's own MNIST example.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.contender import Contender, MatVec
from benchmarks.timing import now
from benchmarks.workload import BATCH, LR, MEAN, STD, Digits, Problem

HVP_BATCH = 512


class _Images(Dataset[tuple[Tensor, int]]):
    """MNIST as `torchvision.datasets.MNIST` gives it: an image at a time, through PIL."""

    def __init__(self, digits: Digits) -> None:
        from torchvision import transforms

        self._pixels = digits.pixels_ND.reshape(-1, 28, 28)
        self._labels = digits.labels_N.cpu()
        self._transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self._pixels[index].numpy())
        return self._transform(image), int(self._labels[index])


def operator(problem: Problem) -> MatVec:
    """A product that reads all images through the loader."""
    model, parameters = _model(problem)
    loader = DataLoader(_Images(problem.train), batch_size=HVP_BATCH)

    def product(v_P: Tensor) -> Tensor:
        result_P, examples = torch.zeros_like(v_P), 0
        for images, labels in loader:
            x, y = images.to(problem.device), labels.to(problem.device)
            loss = functional.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            slope = torch.cat([g.reshape(-1) for g in gradients]) @ v_P
            parts = torch.autograd.grad(slope, parameters)
            result_P += len(y) * torch.cat([part.reshape(-1) for part in parts])
            examples += len(y)
        return result_P / examples

    return product


def epoch(problem: Problem) -> dict[str, float]:
    """One epoch of Adam with weight decay, and an evaluation of both sets through loaders."""
    model, _ = _model(problem)
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=2 * problem.l2)
    loader = DataLoader(_Images(problem.train), batch_size=BATCH, shuffle=True)
    start = now(problem.device)
    for images, labels in loader:
        optimiser.zero_grad()
        scores = model(images.to(problem.device))
        functional.cross_entropy(scores, labels.to(problem.device)).backward()
        optimiser.step()
    steps = now(problem.device) - start
    for digits in (problem.train, problem.test):
        _evaluate(model, DataLoader(_Images(digits), batch_size=HVP_BATCH), problem.device)
    return {"steps": steps, "epoch": now(problem.device) - start}


@torch.no_grad()
def _evaluate(
    model: nn.Module, loader: DataLoader[tuple[Tensor, int]], device: torch.device
) -> None:
    for images, labels in loader:
        scores, y = model(images.to(device)), labels.to(device)
        functional.cross_entropy(scores, y, reduction="sum").item()
        (scores.argmax(1) == y).sum().item()


def tune(_: Problem) -> None:
    """Nothing but the import, which is nobody's set-up."""
    import torchvision  # noqa: F401


def _model(problem: Problem) -> tuple[nn.Module, list[nn.Parameter]]:
    model = nn.Sequential(nn.Flatten(), problem.module())
    return model, list(model.parameters())


CONTENDER = Contender(
    name="recipe",
    title="published recipe",
    operator=operator,
    leading=None,
    epoch=epoch,
    package="torchvision",
    note=lambda _: f"DataLoader, PIL transforms, batches of {HVP_BATCH} in a product",
    tune=tune,
)
