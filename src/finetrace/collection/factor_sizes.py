"""How large Kronecker factors are: their sums while rows are collected, what making them holds, and the factors themselves.

Matrices are (rows, columns) of the blocks, in every function.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetrace.collection.modules import Block

LARGEST_SIDE = 32_766  # beyond it, LAPACK's workspace of 2 d^2 + 6 d + 1 numbers has a length that 32 bits do not hold
WITHOUT = (  # what to do where they are too large
    "do without them (a method such as exact or gradcos, and no --kronecker), or build the index with --projection "
    "two-sided:KOUTxKIN or with --modules that leave this layer out."
)
DECOMPOSING = 5 * 8  # bytes an entry: a sum and its mean, the eigenvectors, and a workspace as large as two of them


def both_sides(matrices: Sequence[tuple[int, int]]) -> int:
    """Entries of the sums: a square matrix for each side of every block."""
    return sum(rows**2 + columns**2 for rows, columns in matrices)


def factor_bytes(matrices: Sequence[tuple[int, int]], entry_bytes: int) -> int:
    """Bytes of finished factors: both eigenbases of every matrix, and two sets of eigenvalues in float64."""
    return both_sides(matrices) * entry_bytes + 2 * 8 * sum(r * c for r, c in matrices)


def held_bytes(matrices: Sequence[tuple[int, int]], entry_bytes: int) -> int:
    """Bytes that the sums hold while rows are collected: themselves, and what a batch adds until it is whole."""
    return 2 * both_sides(matrices) * entry_bytes


def finishing_bytes(matrices: Sequence[tuple[int, int]], entry_bytes: int) -> int:
    """Bytes held while factors are made of their sums: those that are finished, and the largest side that is decomposed."""
    return factor_bytes(matrices, entry_bytes) + DECOMPOSING * max(max(matrix) for matrix in matrices) ** 2


def largest(blocks: Sequence[Block]) -> Block:
    """The block whose factors take most."""
    return max(blocks, key=lambda block: both_sides([block.matrix]))


def too_wide(blocks: Sequence[Block]) -> Block | None:
    """A block with a side that cannot be decomposed, whatever the memory; `None` where there is none."""
    widest = max(blocks, key=lambda block: max(block.matrix))
    return widest if max(widest.matrix) > LARGEST_SIDE else None
