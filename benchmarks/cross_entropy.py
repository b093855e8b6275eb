"""Loss and gradient of a batch's logits, some rows at a time and all at once: python benchmarks/cross_entropy.py [--rounds 7].

The same logits in bfloat16, once through `finetrace.cross_entropy` and once widened and given to torch, which keeps float32
copies. Processor time, the memory that pages had to be found for, and whether losses and gradients are equal bit by bit.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from finetrace.cross_entropy import cross_entropy


def whole(logits: Tensor, targets: Tensor) -> Tensor:
    """(R,) losses by autograd."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def once(loss: Callable[[Tensor, Tensor], Tensor], made: Tensor, targets: Tensor) -> tuple[float, int, Tensor, Tensor]:
    """Processor seconds, pages, losses and gradient."""
    logits = made.clone().requires_grad_()
    pages, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    losses = loss(logits, targets)
    losses.mean().backward()
    taken = time.process_time() - started
    assert logits.grad is not None
    return taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages, losses.detach(), logits.grad


def main() -> None:
    """Medians over rounds, and the ratio within them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=560, help="tokens of the loss in a batch")
    parser.add_argument("--vocabulary", type=int, default=49152)
    args = parser.parse_args()
    made = torch.randn(args.rows, args.vocabulary).to(torch.bfloat16)
    targets = torch.randint(args.vocabulary, (args.rows,))
    found: dict[str, list[tuple[float, int, Tensor, Tensor]]] = {"all at once": [], "some rows at a time": []}
    for _ in range(args.rounds + 1):  # the first warms up
        for name, loss in (("all at once", whole), ("some rows at a time", cross_entropy)):
            found[name].append(once(loss, made, targets))
    equal = all(torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) for a, b in zip(*found.values(), strict=True))
    print(
        f"{args.rows} rows x {args.vocabulary} in bfloat16, {torch.get_num_threads()} thread(s), equal bit by bit: {equal}"
    )
    for name, rounds in found.items():
        seconds = statistics.median(each[0] for each in rounds[1:])
        pages = statistics.median(each[1] for each in rounds[1:])
        print(
            f"  {name}: {seconds:.3f} s of processor time, {pages * resource.getpagesize() / 1e6:,.0f} MB of new pages"
        )
    ratios = sorted(a[0] / b[0] for a, b in zip(*(rounds[1:] for rounds in found.values()), strict=True))
    print(f"  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {args.rounds} rounds)")


if __name__ == "__main__":
    main()
