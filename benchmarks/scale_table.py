"""What 10^4, 10^6 and 10^8 examples take on models of 0.1B, 8B and 70B: python benchmarks/scale_table.py [--tflops 400 ...].

Nothing is measured: shapes, bytes and choices are those of finetrace's own code (`planning.cost`, `planning.disk`,
`index.sizing`, `curvature.solvers`), rates are arguments. It prints Markdown tables.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetrace.attribution.exact import Exact
from finetrace.collection import Block
from finetrace.collection.factor_sizes import factor_bytes
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS
from finetrace.curvature.solvers import DENSE_BYTES, DUAL_BYTES, PASSES, SKETCH_BYTES, choose, packed, sketch_rank
from finetrace.index.sizing import SHARD_BYTES
from finetrace.index.sums import disk
from finetrace.planning.cost import Shape
from finetrace.units import duration, size

COUNTS = (10**4, 10**6, 10**8)
REPRESENTATIONS = len(DEFAULT_REPRESENTATIONS)  # that an index keeps, in float32


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder with gated feed-forward layers and no biases; `tied`: the vocabulary projection is the embedding."""

    name: str
    layers: int
    hidden: int
    heads: int
    shared: int
    width: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of one layer: q, k, v, o, gate, up, down."""
        q, k, h, f = self.heads * self.width, self.shared * self.width, self.hidden, self.inner
        return [(q, h), (k, h), (k, h), (h, q), (f, h), (f, h), (h, f)]

    @property
    def entries(self) -> int:
        """Of the linear weights, the vocabulary projection left out."""
        return self.layers * sum(r * c for r, c in self.linears)

    @property
    def weights(self) -> int:
        """Entries of all weights, the norms left out."""
        return self.entries + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def shape(self, below: int, added: int, above: int, tracked: Sequence[tuple[int, int]]) -> Shape:
        """With `added` weights of an adapter, `below` entries under the lowest tracked matrix, `above` layers from it on."""
        return Shape(
            layers=self.layers,
            hidden=self.hidden,
            attention=self.heads * self.width,
            keys=self.shared * self.width,
            intermediate=self.inner,
            vocabulary=self.vocabulary,
            below=below,
            above=self.entries + added - below,
            layers_above=above,
            tracked=tuple(tracked),
            contracted=sum(r * c for r, c in tracked),
        )


@dataclass(frozen=True)
class Layout:
    """What of a model is tracked.

    Attributes:
        name: As the tables say it.
        shape: Of a pass.
        drawn: Operations a token of projecting both sides, which `Shape` does not count.
        shared: Sides of Kronecker factors that are another layer's too, as both see the same input.
    """

    name: str
    model: Architecture
    shape: Shape
    drawn: float = 0.0
    shared: tuple[int, ...] = ()

    @property
    def widths(self) -> list[int]:
        """Entries of each block."""
        return [r * c for r, c in self.shape.tracked]

    @property
    def entries(self) -> int:
        """D of a row."""
        return sum(self.widths)

    def row_bytes(self, entry: int) -> int:
        """Of one example: gradient, representations, loss."""
        return entry * self.entries + 4 * (REPRESENTATIONS * self.model.hidden + 1)

    def operations(self, tokens: int, loss_tokens: int) -> float:
        """Of collecting one example."""
        return self.shape.collection(1, tokens, loss_tokens) + tokens * self.drawn


MODELS = (
    Architecture("0.1B", 30, 576, 9, 3, 64, 1536, 49_152, True),  # SmolLM2-135M, the embedded model
    Architecture("8B", 32, 4096, 32, 8, 128, 14_336, 128_256, False),  # as Llama 3.1 has it
    Architecture("70B", 80, 8192, 64, 8, 128, 28_672, 128_256, False),
)


def lora(model: Architecture, rank: int = 4) -> Layout:
    """A and B of the query and value projections of every layer."""
    q, _, v, *_ = model.linears
    tracked = [side for out, into in (q, v) for side in ((rank, into), (out, rank))] * model.layers
    added = sum(r * c for r, c in tracked)
    below = q[0] * q[1]  # the first query projection itself is registered before its A
    shape = model.shape(below, added, model.layers, tracked)
    return Layout(f"LoRA r={rank} on q, v", model, shape, shared=(model.hidden,) * model.layers)


def two_sided(model: Architecture, k: int = 64) -> Layout:
    """Every linear layer, projected on both sides; a vocabulary projection with a weight of its own too."""
    linears = model.linears * model.layers + ([] if model.tied else [(model.vocabulary, model.hidden)])
    tracked = [(min(k, out), min(k, into)) for out, into in linears]
    drawn = 2.0 * k * sum((out if out > k else 0) + (into if into > k else 0) for out, into in linears)
    return Layout(f"all linear, two-sided:{k}x{k}", model, model.shape(0, 0, model.layers, tracked), drawn)


def one_layer(model: Architecture, k: int = 32) -> Layout:
    """The last layer's down projection alone."""
    out, into = model.linears[-1]
    shape = model.shape(model.entries - out * into, 0, 1, [(k, k)])
    return Layout(f"one layer, two-sided:{k}x{k}", model, shape, 2.0 * k * (out + into))


LAYOUTS = [make(model) for model in MODELS for make in (lora, two_sided, one_layer)]


@dataclass(frozen=True)
class Machine:
    """Rates and sizes that the tables assume; see the arguments."""

    tflops: float
    cpu_tflops: float
    float32_tflops: float
    eigen_tflops: float
    disk: float
    memory: float
    workers: int
    queries: int
    tokens: int
    loss_tokens: int
    startup: float


def shards(layout: Layout, n: int, entry: int) -> tuple[int, int]:
    """(shards, rows a shard) as the index makes them."""
    rows = min(n, max(16, SHARD_BYTES // layout.row_bytes(entry)))
    return -(-n // rows), rows


def collection(layout: Layout, n: int, at: Machine, workers: int, rate: float, entry: int = 2) -> float:
    """Seconds: start-up, then whole shards handed out to whoever is free, each computed and then written."""
    count, rows = shards(layout, n, entry)
    each = layout.operations(at.tokens, at.loss_tokens) / rate + layout.row_bytes(entry) / at.disk
    if count <= workers or workers == 1:
        return at.startup + each * (n if workers == 1 else rows)
    return at.startup + each * rows * -(-count // workers)


@dataclass(frozen=True)
class Solved:
    """How `exact` goes: solver, bytes that it holds, operations, passes over the rows."""

    solver: str
    held: float
    operations: float
    passes: int


def exact(widths: Sequence[int], n: int, m: int, memory: float, *, cosine: bool = False) -> Solved | None:
    """As `exact:solver=auto` decides within `memory` bytes; `None` where a cosine would need a solve for every row.

    Products and Cholesky factors are counted, and for a cosine as many operations again for the rows' own influence. Passes of
    a streamed solver: for the damping, those of the solver with one measurement of the residual, for the scores. They are the
    least there can be: a residual above the tolerance takes more.
    """
    widest, width = max(widths), sum(widths)
    direct = {
        "dual": sum(2.0 * n**2 * d + n**3 / 3 for d in widths),
        "primal": sum(2.0 * n * d**2 + d**3 / 3 for d in widths),
    }
    within = 2 * n * widest * 4 + 40 * m * n + DUAL_BYTES * min(n, widest) ** 2
    if within <= memory:
        name = "dual" if widest >= n else "primal"
        each = [2.0 * n * d * min(n, d) + min(n, d) ** 3 / 3 for d in widths]
        return Solved(f"{name}, in memory", within, (1 + cosine) * sum(each), 1)
    room = int(memory) // 4
    rounds = -(-m // max(1, int(memory) // 2 // (Exact.query_bytes * width)))  # so many queries go through together
    score = 4.0 * m * n * width
    solver = choose(n, m, widths, room, own=cosine, itemsize=2)  # gradients in bfloat16
    if solver == "dual":
        return Solved(solver, DUAL_BYTES * n**2, (1 + cosine) * direct[solver] + score, 1 + cosine + 5 * rounds)
    if solver == "primal":
        groups = packed(widths, room) or []
        held = max(DENSE_BYTES * sum(widths[i] ** 2 for i in group) for group in groups)
        return Solved(solver, held, (1 + cosine) * direct[solver] + score, 2 + cosine + 2 * rounds)
    if cosine:
        return None
    rank = sketch_rank(widths, n, room)
    return Solved(solver, SKETCH_BYTES * width * rank, PASSES * score, 2 + (PASSES + 1) * rounds)


def pass_seconds(layout: Layout, n: int, at: Machine, operations: float, passes: int = 1, entry: int = 2) -> float:
    """Reading the gradients so often, or the products, whichever takes longer: they overlap."""
    return max(passes * n * layout.entries * entry / at.disk, operations / at.float32_tflops)


def table(
    title: str, columns: Sequence[str], cells: Callable[[Layout], Sequence[str]], layouts: Sequence[Layout]
) -> None:
    """Print one, a layout a row."""
    heads = ["model", "tracked", *columns]
    print(f"\n**{title}**\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for layout in layouts:
        print(f"| {' | '.join([layout.model.name, layout.name, *cells(layout)])} |")


def power(n: int) -> str:
    """10^6 with a raised exponent."""
    return "10" + str(round(math.log10(n))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def solved_words(layout: Layout, n: int, at: Machine, *, cosine: bool) -> str:
    """Solver, matrices, time."""
    found = exact(layout.widths, n, at.queries, at.memory, cosine=cosine)
    if found is None:
        return "a solve a row"
    return (
        f"{found.solver}, {size(found.held)}, {duration(pass_seconds(layout, n, at, found.operations, found.passes))}"
    )


def kronecker_words(layout: Layout, at: Machine, entry: int = 2) -> list[str]:
    """Finished factors, what they add to the collection, decompositions, and what lies on the disk until they are finished."""
    tracked = layout.shape.tracked
    added = layout.shape.factors(1, at.tokens, at.loss_tokens, "model") / layout.operations(at.tokens, at.loss_tokens)
    cubes = 10.0 * (sum(r**3 + c**3 for r, c in tracked) - sum(side**3 for side in layout.shared))
    finished = factor_bytes(tracked, 4) - 4 * sum(side**2 for side in layout.shared)
    blocks = [Block("", sides, 0) for sides in tracked]
    one = 4 * sum(r * r + c * c for r, c in tracked)
    sampled = entry * layout.entries
    until = [size(disk(blocks, shards(layout, n, entry)[0], 4) + n * sampled) for n in COUNTS]
    return [size(finished), f"+{added:.0%}", duration(cubes / at.eigen_tflops), size(one), *until]


def print_tables(at: Machine) -> None:
    """All of them."""
    counts = [power(n) for n in COUNTS]

    def rows(x: Layout) -> list[str]:
        operations = x.operations(at.tokens, at.loss_tokens)
        return [
            size(2 * x.model.weights),
            f"{x.entries:,}",
            size(4 * x.entries),
            size(2 * x.entries),
            size(4 * REPRESENTATIONS * x.model.hidden),
            f"{operations / 1e12:.3g}",
        ]

    table(
        "One example",
        [
            "weights in bfloat16",
            "entries",
            "float32",
            "bfloat16",
            f"{REPRESENTATIONS} representations",
            "10¹² operations",
        ],
        rows,
        LAYOUTS,
    )
    table(
        f"Collection, one device, and {at.workers} workers with a device each (gradients in bfloat16)",
        [f"{c}, one" for c in counts] + [f"{c}, {at.workers}" for c in counts] + [f"{counts[0]}, one CPU core"],
        lambda x: [
            *(duration(collection(x, n, at, 1, at.tflops)) for n in COUNTS),
            *(duration(collection(x, n, at, at.workers, at.tflops)) for n in COUNTS),
            duration(collection(x, COUNTS[0], at, 1, at.cpu_tflops)),
        ],
        LAYOUTS,
    )
    table(
        "Disk of the shards",
        [f"{c}, {kind}" for kind in ("float32", "bfloat16") for c in counts],
        lambda x: [size(n * x.row_bytes(entry)) for entry in (4, 2) for n in COUNTS],
        LAYOUTS,
    )
    table(
        f"One pass over gradients in bfloat16, {at.queries} queries",
        counts,
        lambda x: [duration(pass_seconds(x, n, at, 2.0 * at.queries * n * x.entries)) for n in COUNTS],
        LAYOUTS,
    )
    for cosine in (False, True):
        kind = "`exact:normalise=cosine`" if cosine else "`exact`"
        table(
            f"{kind}, {at.queries} queries within {size(at.memory)}: solver, matrices, time",
            counts,
            lambda x, cosine=cosine: [solved_words(x, n, at, cosine=cosine) for n in COUNTS],  # type: ignore[misc]
            LAYOUTS,
        )
    table(
        "Kronecker factors (labels from the model, gradients in bfloat16)",
        ["finished", "operations", "decompositions", "sums of a shard", *(f"until finished, {c}" for c in counts)],
        lambda x: kronecker_words(x, at),
        LAYOUTS,
    )


def main() -> None:
    """Arguments and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400, help="bfloat16 TFLOP/s of a device, reached in a pass")
    parser.add_argument("--cpu-tflops", type=float, default=0.1, help="the same of one CPU core")
    parser.add_argument("--float32-tflops", type=float, default=30, help="float32 TFLOP/s of a device, for scoring")
    parser.add_argument(
        "--eigen-tflops", type=float, default=0.04, help="float64 TFLOP/s of the CPU, 10 n^3 a decomposition"
    )
    parser.add_argument("--disk", type=float, default=2, help="GB/s, read and written, of each worker")
    parser.add_argument("--memory", type=float, default=64, help="GB that scoring may use")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="of an example")
    parser.add_argument("--loss-tokens", type=int, default=100, help="of them in the loss")
    parser.add_argument("--startup", type=float, default=60, help="seconds a worker takes to load the model")
    given = parser.parse_args()
    print_tables(
        Machine(
            tflops=1e12 * given.tflops,
            cpu_tflops=1e12 * given.cpu_tflops,
            float32_tflops=1e12 * given.float32_tflops,
            eigen_tflops=1e12 * given.eigen_tflops,
            disk=1e9 * given.disk,
            memory=1e9 * given.memory,
            workers=given.workers,
            queries=given.queries,
            tokens=given.tokens,
            loss_tokens=given.loss_tokens,
            startup=given.startup,
        )
    )


if __name__ == "__main__":
    main()
