"""Random projections of gradients: of both sides before they are multiplied, or of the flattened gradient afterwards.

Entries are random signs, scaled so that E[<P g, P h>] = <g, h>. They come from the Philox counter on the CPU, whose stream
NumPy keeps fixed, keyed by seed, block and place: the same on every machine and device, for training rows and queries.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetrace.errors import FinetraceError

Kind = Literal["none", "two-sided", "rademacher", "sparse"]
CHUNK = 1 << 22  # entries of a matrix that are made at a time
KEPT = 1 << 30  # bytes of signs that one model's blocks keep between batches; more are drawn again
NONZEROS = 8  # in a column of a sparse matrix


@dataclass(frozen=True)
class Projection:
    """What is done to the gradient of every block that it makes smaller.

    Attributes:
        kind: `two-sided`: sum_t (P_out delta_t)(P_in a_t)^T, the gradient itself never formed (LoGra, arXiv 2405.13954).
            `rademacher`, `sparse`: P vec(G), after it was formed; P has signs everywhere (Achlioptas, 2003), or in a few
            places of each column (Kane and Nelson, arXiv 1012.1577).
        outputs: Rows of P_out; of `rademacher` and `sparse`, rows of P. A side or gradient no longer than that stays as it is.
        inputs: Rows of P_in.
        seed: Of the random numbers, beside each block's name.
    """

    kind: Kind = "none"
    outputs: int = 0
    inputs: int = 0
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Projection:
        """From `none`, `two-sided:KOUTxKIN`, `rademacher:K` or `sparse:K`."""
        if text == "none":
            return cls(seed=seed)
        found = re.fullmatch(r"two-sided:([1-9][0-9]*)x([1-9][0-9]*)", text)
        if found:
            return cls("two-sided", int(found[1]), int(found[2]), seed)
        found = re.fullmatch(r"(rademacher|sparse):([1-9][0-9]*)", text)
        if found is None:
            raise FinetraceError(
                f"--projection {text}: not known; use none, two-sided:KOUTxKIN, rademacher:K, sparse:K or auto "
                "(for instance two-sided:64x64)."
            )
        kind: Kind = next(each for each in get_args(Kind) if each == found[1])
        return cls(kind, int(found[2]), 0, seed)

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        if self.kind == "none":
            return "none"
        return (
            f"{self.kind}:{self.outputs}x{self.inputs}" if self.kind == "two-sided" else f"{self.kind}:{self.outputs}"
        )

    @property
    def flat(self) -> bool:
        """Whether it takes gradients apart from their two sides, which leaves no Kronecker structure."""
        return self.kind in ("rademacher", "sparse")

    def sides(self, name: str, outputs: int, inputs: int) -> Sides | None:
        """What is done to the sides of a weight (outputs, inputs) of this name; `None` where nothing is."""
        if self.kind != "two-sided" or (outputs <= self.outputs and inputs <= self.inputs):
            return None
        return Sides(name, (outputs, min(outputs, self.outputs)), (inputs, min(inputs, self.inputs)), self.seed)

    def flattened(self, name: str, size: int) -> Flat | None:
        """What is done to a flattened gradient of this size; `None` where nothing is."""
        return Flat(name, size, self.outputs, self.kind, self.seed) if self.flat and size > self.outputs else None


class Sides:
    """P_out and P_in of one weight, (k, d) signs over sqrt(k); a side that is short enough has none.

    Attributes:
        outputs: d_out, and what it becomes.
        inputs: d_in, and what it becomes.
    """

    def __init__(self, name: str, outputs: tuple[int, int], inputs: tuple[int, int], seed: int) -> None:
        self.name = name
        self.outputs = outputs
        self.inputs = inputs
        self.seed = seed
        self._made: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def project_inputs(self, inputs: Tensor) -> Tensor:
        """(..., d_in) to (..., k_in)."""
        return self._project("inputs", inputs, self.inputs)

    def project_deltas(self, deltas: Tensor) -> Tensor:
        """(..., d_out) to (..., k_out)."""
        return self._project("outputs", deltas, self.outputs)

    def matrix(self, side: Literal["inputs", "outputs"]) -> Tensor:
        """(k, d) P of a side, float64; the identity where the side stays as it is."""
        size, kept = self.inputs if side == "inputs" else self.outputs
        if kept == size:
            return torch.eye(size, dtype=torch.float64)
        drawn = signs(kept * size, self.seed, self.name, side).reshape(kept, size)
        return torch.from_numpy(drawn).double().div_(kept**0.5)

    def _project(self, side: Literal["inputs", "outputs"], values: Tensor, sizes: tuple[int, int]) -> Tensor:
        if sizes[0] == sizes[1]:
            return values
        key = (side, values.device, values.dtype)
        if key not in self._made:
            self._made[key] = self.matrix(side).to(values.dtype).to(values.device)
        return values @ self._made[key].T


class Flat:
    """P (k, d) for the flattened gradient of one block, made some columns at a time."""

    def __init__(self, name: str, size: int, kept: int, kind: Kind, seed: int) -> None:
        self.name = name
        self.size = size
        self.kept = kept
        self.kind = kind
        self.seed = seed
        self.keep_bytes = 0  # of signs; the chunks are kept while they all fit
        self._chunks: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    @property
    def nonzeros(self) -> int:
        """In a column."""
        return min(NONZEROS, self.kept) if self.kind == "sparse" else self.kept

    def project(self, rows: Tensor) -> Tensor:
        """(B, d) to (B, k)."""
        found = torch.zeros(self.kept, len(rows), dtype=rows.dtype, device=rows.device)
        step = max(1, CHUNK // self.nonzeros)
        for chunk, start in enumerate(range(0, self.size, step)):
            part = rows[:, start : start + step].T  # (c, B)
            columns = part.shape[0]
            if self.kind == "rademacher":
                (drawn,) = self._chunk(chunk, columns, rows.device)
                found += drawn.to(rows.dtype).T @ part
            else:
                place, sign = self._chunk(chunk, columns, rows.device)
                for one in range(self.nonzeros):
                    found.index_add_(0, place[:, one], part * sign[:, one : one + 1].to(rows.dtype))
        return found.T / self.nonzeros**0.5

    def matrix(self) -> Tensor:
        """(k, d) P, float64; for small blocks and tests."""
        return self.project(torch.eye(self.size, dtype=torch.float64)).T

    def _chunk(self, chunk: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """Signs (c, k), or places and signs (c, nonzeros) of a sparse matrix."""
        key = (chunk, device)
        if key in self._chunks:
            return self._chunks[key]
        count = columns * self.nonzeros
        if self.kind == "rademacher":
            drawn = signs(count, self.seed, self.name, "flat", chunk).reshape(columns, self.kept)
            made: tuple[Tensor, ...] = (torch.from_numpy(drawn).to(device),)
        else:  # one nonzero in each of as many groups of rows
            words = _words(-(-count // 2), self.seed, self.name, "flat", chunk).view("<u4")[:count].astype(np.int64)
            first = np.arange(self.nonzeros + 1) * self.kept // self.nonzeros
            place = first[:-1] + ((words.reshape(columns, -1) >> 1) * np.diff(first) >> 31)
            sign = ((words & 1) * 2 - 1).astype(np.int8).reshape(columns, -1)
            made = (torch.from_numpy(place).int().to(device), torch.from_numpy(sign).to(device))
        if self.size * self.nonzeros * (1 if self.kind == "rademacher" else 5) <= self.keep_bytes:
            self._chunks[key] = made
        return made


def signs(count: int, seed: int, *where: object) -> NDArray[np.int8]:
    """(count,) -1 or 1 with equal chances, fixed by the seed and the place."""
    words = _words(-(-count // 64), seed, *where)
    return np.unpackbits(words.view(np.uint8), count=count, bitorder="little").astype(np.int8) * np.int8(2) - np.int8(1)


def _words(count: int, seed: int, *where: object) -> NDArray[np.uint64]:
    """(count,) 64 random bits each, least significant byte first."""
    text = "\0".join(map(str, ("projection", seed, *where)))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count).astype("<u8")
