"""Which solver of (F + lambda I) x = q is the cheapest of those that fit the memory.

F = G^T G / n, segment by segment; every (query, segment) pair is a system of its own, and all go through the rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Solver = Literal["auto", "dual", "primal", "cg", "nystroem"]
RANK = 128  # of the sketch, where memory allows
DENSE_BYTES = 24  # an entry of a d x d matrix: sum, factor and what is added in between
DUAL_BYTES = 32  # an entry of an n x n one
SKETCH_BYTES = 40  # an entry of a sketch: start, image, vectors and the steps between
PASSES = 12  # what a preconditioned solve takes, about
READS = {
    "dual": 4,
    "primal": 3,
    "iterated": PASSES + 2,
}  # of all rows: the matrix or sketch, solutions, their residuals
OPERATIONS_A_BYTE = 25  # in the time of reading one: some 50 GFLOP/s of arithmetic beside 2 GB/s from a disk


def packed(segments: Sequence[int], room: int) -> list[list[int]] | None:
    """Segments of these widths in groups whose d x d matrices fit `room` bytes together; `None` where one alone does not."""
    groups: list[list[int]] = []
    taken = room
    for k, width in enumerate(segments):
        need = DENSE_BYTES * width**2
        if need > room:
            return None
        if taken + need > room:
            groups.append([])
            taken = 0
        groups[-1].append(k)
        taken += need
    return groups


def sketch_rank(segments: Sequence[int], n: int, room: int) -> int:
    """Rank of a sketch that fits `room` bytes; 0 where it would be too small to help."""
    rank = min(RANK, max(1, min(n, max(segments)) // 2), room // (SKETCH_BYTES * sum(segments)))
    return rank if rank >= 8 else 0


def choose(n: int, m: int, segments: Sequence[int], room: int, *, own: bool, itemsize: int = 4) -> Solver:
    """Which solver is the cheapest of those that fit `room` bytes.

    Operations of each, over all segments of width d, D in sum: dual 2 n^2 D, primal 2 n sum d^2, Nystroem about PASSES
    times 4 m n D; and what it reads, `READS` times n D entries of `itemsize` bytes, in operations. `own`: the rows' own
    influence is wanted too, which iterations would have to solve row by row.
    """
    width = sum(segments)
    reading = float(OPERATIONS_A_BYTE * n * width * itemsize)
    iterated = PASSES * 4 * m * n * width + READS["iterated"] * reading if not own else float("inf")
    costs: list[tuple[float, Solver]] = []
    if DUAL_BYTES * n**2 <= room:
        costs.append((2.0 * n**2 * width + READS["dual"] * reading, "dual"))
    if packed(segments, room) is not None:
        costs.append((2.0 * n * sum(d**2 for d in segments) + READS["primal"] * reading, "primal"))
    costs.append((iterated, "nystroem" if sketch_rank(segments, n, room) else "cg"))
    return min(costs, key=lambda each: each[0])[1]
