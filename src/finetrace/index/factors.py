"""Kronecker factors of an index: sums shard by shard while gradients are collected, then eigenbases and eigenvalues."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetrace import fingerprint
from finetrace.collection import Block
from finetrace.collection.factors import FactorSums, Labels
from finetrace.collection.projection import Projection
from finetrace.curvature.kronecker import KroneckerBasis
from finetrace.errors import FinetraceError
from finetrace.index import shards
from finetrace.index.manifest import Manifest, replacing, write_atomically

FOLDER = "factors"
FORMAT = 2  # 1 had the tokens of the loss alone in its sums; such factors are fitted again


def path(folder: Path, labels: Labels) -> Path:
    """Where the factors of an index lie."""
    return folder / FOLDER / f"{labels}.safetensors"


def part_path(folder: Path, labels: Labels, start: int) -> Path:
    """Where the sums over the shard that begins at row `start` lie until all are there."""
    return folder / FOLDER / f"{labels}.parts-{FORMAT}" / f"{start:09d}.safetensors"


def disk(blocks: Sequence[Block], shards_: int, entry_bytes: int) -> int:
    """Bytes that the sums over all shards take until they are finished, without the sampled gradients."""
    return shards_ * entry_bytes * sum(rows**2 + columns**2 for rows, columns in (block.matrix for block in blocks))


def there(folder: Path, labels: Labels) -> bool:
    """Whether the factors are finished, and of this format."""
    about = path(folder, labels).with_suffix(".json")
    try:
        return about.is_file() and json.loads(about.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return about.is_file()  # reading it will say what is wrong


def refuse_flat(folder: Path, projection: Projection) -> None:
    """A gradient that was projected after it was formed has no two sides any more, and so no Kronecker factors."""
    if projection.flat:
        raise FinetraceError(
            f"{folder}: gradients are projected by {projection.text}, which leaves them no two sides, so K-FAC and EK-FAC "
            "have no factors there; take another method, or build the index with --projection two-sided:KOUTxKIN."
        )


def write_part(
    folder: Path, sums: FactorSums, sampled: Tensor | None, start: int, about: Manifest, writer: str = ""
) -> None:
    """Keep one shard's sums, and the gradients of its sampled loss; `writer` as in `shards.write`."""
    tensors = {f"left.{name}": value.cpu().contiguous() for name, value in sums.left.items()}
    tensors |= {f"right.{name}": value.cpu().contiguous() for name, value in sums.right.items()}
    tensors["tokens"] = torch.tensor(list(sums.tokens.values()), dtype=torch.int64)
    if sampled is not None:
        tensors |= shards.named("sampled", shards.narrowed_rows(sampled, about))
    target = part_path(folder, sums.labels, start)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{target.parent}: cannot be written ({error}); free some space.") from error
    with replacing(target, writer) as part:
        save_file(tensors, str(part))


def has_part(folder: Path, labels: Labels, start: int, rows: int) -> bool:
    """Whether the sums over that shard are whole, and of as many rows as it has."""
    try:
        with safe_open(str(part_path(folder, labels, start)), framework="pt") as file:
            if labels == "model" and file.get_slice("sampled").get_shape()[0] != rows:
                return False
            return "tokens" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def finish(folder: Path, manifest: Manifest, labels: Labels) -> None:
    """From the sums of all shards to eigenbases and eigenvalues, written in one step; the sums are then removed."""
    blocks = [record.block() for record in manifest.blocks]
    parts = [part_path(folder, labels, shard.start) for shard in manifest.shards]
    dtype = manifest.computed_dtype
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}  # fingerprint of a sum -> tensor that holds its eigenvectors
    records = []
    for i, block in enumerate(blocks):
        left, right, tokens = _summed(parts, block, i)
        basis = KroneckerBasis.of(left, right, tokens, manifest.kept)
        squares = torch.zeros_like(basis.kfac)
        for rows in _gradients(folder, manifest, parts, labels, block):
            squares += basis.rotate(rows).double().square().sum(0)
        names = {}
        for side, total, vectors in (("left", left, basis.left), ("right", right, basis.right)):
            key = hashlib.sha256(total.numpy().tobytes()).hexdigest()
            if key not in places:
                places[key] = f"{side}.{i}"
                tensors[places[key]] = vectors.to(dtype).contiguous()
            names[side] = places[key]
        tensors[f"kfac.{i}"] = basis.kfac
        tensors[f"ekfac.{i}"] = squares / manifest.kept
        records.append({"name": block.name, "tokens": tokens, **names})
    with replacing(path(folder, labels)) as part:
        save_file(tensors, str(part))
    about = {
        "format": FORMAT,
        "labels": labels,
        "data_fingerprint": manifest.data_fingerprint,
        "adapter_fingerprint": manifest.model.adapter_fingerprint,
        "sha256": fingerprint.of_file(path(folder, labels)),
        "blocks": records,
    }
    write_atomically(path(folder, labels).with_suffix(".json"), json.dumps(about, indent=1).encode())
    tidy(folder, labels)


def outdated(folder: Path, manifest: Manifest, labels: Labels) -> bool:
    """Whether there are factors of other rows than the index has now, or factors that cannot say of which."""
    about = path(folder, labels).with_suffix(".json")
    try:
        return bool(json.loads(about.read_text(encoding="utf-8"))["data_fingerprint"] != manifest.data_fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return about.exists() or path(folder, labels).exists()


def tidy(folder: Path, labels: Labels) -> None:
    """Remove the sums over shards, which finished factors no longer need."""
    shutil.rmtree(part_path(folder, labels, 0).parent, ignore_errors=True)


def remove(folder: Path, labels: Labels) -> bool:
    """Remove finished factors, if there are any; they are fitted again when a method asks for them."""
    about = path(folder, labels).with_suffix(".json")
    found = about.exists() or path(folder, labels).exists()
    about.unlink(missing_ok=True)
    path(folder, labels).unlink(missing_ok=True)
    return found


def digest(folder: Path, labels: Labels) -> str:
    """The checksum that finished factors have."""
    return str(json.loads(path(folder, labels).with_suffix(".json").read_text(encoding="utf-8"))["sha256"])


def read(folder: Path, manifest: Manifest, labels: Labels) -> dict[str, KroneckerBasis]:
    """Every block's basis by name; `FinetraceError` where the file is broken or of another model or data."""
    file = path(folder, labels)
    remedy = f"remove {folder / FOLDER} and they are computed again."
    try:
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        if (about["data_fingerprint"], about["adapter_fingerprint"]) != (
            manifest.data_fingerprint,
            manifest.model.adapter_fingerprint,
        ):
            raise FinetraceError(f"{file}: these factors are of another adapter or data set; {remedy}")
        if fingerprint.of_file(file) != about["sha256"]:
            raise FinetraceError(f"{file}: these factors are broken (their checksum differs); {remedy}")
        tensors = load_file(str(file))
        return {
            record["name"]: KroneckerBasis(
                tensors[record["left"]], tensors[record["right"]], tensors[f"kfac.{i}"], tensors[f"ekfac.{i}"]
            )
            for i, record in enumerate(about["blocks"])
        }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FinetraceError(f"{file}: these factors cannot be read ({error}); {remedy}") from error


def _summed(parts: list[Path], block: Block, i: int) -> tuple[Tensor, Tensor, int]:
    """Sums over all shards, in float64 and in the order of the shards."""
    rows, columns = block.matrix
    left, right = torch.zeros(rows, rows, dtype=torch.float64), torch.zeros(columns, columns, dtype=torch.float64)
    tokens = 0
    for part in parts:
        with safe_open(str(part), framework="pt") as file:
            left += file.get_tensor(f"left.{block.name}")
            right += file.get_tensor(f"right.{block.name}")
            tokens += int(file.get_tensor("tokens")[i])
    return left, right, tokens


def _gradients(folder: Path, manifest: Manifest, parts: list[Path], labels: Labels, block: Block) -> Iterator[Tensor]:
    """(rows, d) pseudo-gradients of a block, shard by shard: of the sampled loss, or of the loss itself."""
    files = parts if labels == "model" else [folder / shards.FOLDER / shard.file for shard in manifest.shards]
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            yield shards.columns_of(opened, "sampled" if labels == "model" else "gradients", block.columns, manifest)
