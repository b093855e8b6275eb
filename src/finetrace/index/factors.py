"""Kronecker factors of an index: eigenbases and eigenvalues, made of the sums that collection leaves (`index.sums`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from finetrace import fingerprint
from finetrace.atomic import write_atomically, write_tensors
from finetrace.collection import Block
from finetrace.collection.factors import Labels
from finetrace.collection.projection import Projection
from finetrace.curvature.kronecker import KroneckerBasis, eigen
from finetrace.errors import FinetraceError
from finetrace.index import shards, sums
from finetrace.index.manifest import Manifest
from finetrace.index.sums import FOLDER

TENSORS = ("left", "right", "kfac", "ekfac")  # of a block each, by its number
FORMAT = 2  # 1 had the tokens of the loss alone in its sums; such factors are fitted again


def path(folder: Path, labels: Labels) -> Path:
    """Where the factors of an index lie."""
    return folder / FOLDER / f"{labels}.safetensors"


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


def refuse_others(folder: Path, labels: Labels) -> None:
    """Stop where something else has the factors' name."""
    if not _ours(path(folder, labels)):
        raise FinetraceError(
            f"{path(folder, labels)}: these are no factors of finetrace's, and stay as they are; move them elsewhere."
        )


def _ours(file: Path) -> bool:
    """Whether nothing else has the name of factors: a link in the place of their folder may lead to a model's weights."""
    with suppress(OSError, SafetensorError), safe_open(str(file), framework="pt") as there:
        return all(name.split(".")[0] in TENSORS for name in there.keys())  # noqa: SIM118
    return True


def finish(folder: Path, manifest: Manifest, labels: Labels) -> None:
    """From the sums of all shards to eigenbases and eigenvalues, written in one step; the sums are then removed.

    Blocks that share their input have one sum of it: its eigenvectors are computed once and kept once.
    """
    blocks = [record.block() for record in manifest.blocks]
    running = sums.Running(folder, manifest, labels)
    dtype = manifest.computed_dtype
    tensors: dict[str, Tensor] = {}
    known: dict[str, _Decomposed] = {}  # by the fingerprint of a sum
    records = []
    reader = shards.ShardReader(folder, manifest)
    with running.opened(manifest.shards[running.count :]) as files:
        counts = sums.tokens(files).tolist()
        for i, (block, tokens) in enumerate(zip(blocks, counts, strict=True)):
            names: dict[str, str] = {}
            sides: list[tuple[Tensor, Tensor]] = []
            for side, size in zip(("left", "right"), block.matrix, strict=True):
                total = sums.total(files, f"{side}.{block.name}", size)
                key = hashlib.sha256(total.numpy().tobytes()).hexdigest()
                if key in known and known[key].tokens == tokens:
                    sides.append(known[key].again(tensors))
                else:
                    sides.append(eigen(total, tokens))
                if key not in known:
                    values, vectors = sides[-1]
                    known[key] = _Decomposed(f"{side}.{i}", tokens, values, vectors.stride())
                    tensors[f"{side}.{i}"] = vectors.to(dtype).contiguous()
                names[side] = known[key].place
            basis = KroneckerBasis.from_eigen(sides[0], sides[1], tokens, manifest.kept)
            squares = torch.zeros_like(basis.kfac)
            for rows in _gradients(reader, folder, manifest, labels, block):
                squares += basis.rotate(rows).double().square().sum(0)
            tensors[f"kfac.{i}"] = basis.kfac
            tensors[f"ekfac.{i}"] = squares / manifest.kept
            records.append({"name": block.name, "tokens": tokens, **names})
    write_tensors(path(folder, labels), tensors)
    about = {
        "format": FORMAT,
        "labels": labels,
        "data_fingerprint": manifest.data_fingerprint,
        "adapter_fingerprint": manifest.model.adapter_fingerprint,
        "sha256": fingerprint.of_file(path(folder, labels)),
        "blocks_sha256": _digest(records),
        "blocks": records,
    }
    write_atomically(path(folder, labels).with_suffix(".json"), json.dumps(about, indent=1).encode())
    sums.tidy(folder, labels)


@dataclass(frozen=True)
class _Decomposed:
    """A sum whose eigenvectors are in the tensor called `place`.

    `stride` is how `eigh` laid them out: a product's last bits may hang on that, and are not to.
    """

    place: str
    tokens: int
    values: Tensor
    stride: tuple[int, ...]

    def again(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors, these in the dtype in which gradients are turned."""
        kept = tensors[self.place]
        return self.values, torch.empty_strided(kept.shape, self.stride, dtype=kept.dtype).copy_(kept)


def outdated(folder: Path, manifest: Manifest, labels: Labels) -> bool:
    """Whether there are factors of other rows than the index has now, or factors that cannot say of which."""
    about = path(folder, labels).with_suffix(".json")
    try:
        return bool(json.loads(about.read_text(encoding="utf-8"))["data_fingerprint"] != manifest.data_fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        return about.exists() or path(folder, labels).exists()


def remove(folder: Path, labels: Labels) -> bool:
    """Remove finished factors, if there are any; they are fitted again when a method asks for them."""
    about = path(folder, labels).with_suffix(".json")
    if not _ours(path(folder, labels)):
        return False
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
        known = "blocks_sha256" not in about or about["blocks_sha256"] == _digest(
            about["blocks"]
        )  # older ones have none
        if not known or [each["name"] for each in about["blocks"]] != [block.name for block in manifest.blocks]:
            raise FinetraceError(
                f"{file.with_suffix('.json')}: the blocks it names are not those of the index, so it is broken; {remedy}"
            )
        tensors = load_file(str(file))
        return {
            record["name"]: KroneckerBasis(
                tensors[record["left"]], tensors[record["right"]], tensors[f"kfac.{i}"], tensors[f"ekfac.{i}"]
            )
            for i, record in enumerate(about["blocks"])
        }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FinetraceError(f"{file}: these factors cannot be read ({error}); {remedy}") from error


def _digest(records: list[dict[str, Any]]) -> str:
    """The checksum of what is noted of the blocks."""
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def _gradients(
    reader: shards.ShardReader, folder: Path, manifest: Manifest, labels: Labels, block: Block
) -> Iterator[Tensor]:
    """(rows, d) pseudo-gradients of a block, shard by shard: of the sampled loss, or of the loss itself.

    Raises:
        FinetraceError: A shard is missing, or its checksum differs from the manifest's.
    """
    sampled = labels == "model"
    for shard in manifest.shards:
        file = sums.sampled_path(folder, labels, shard.start) if sampled else reader.checked(shard)
        with safe_open(str(file), framework="pt") as opened:
            yield shards.columns_of(opened, "sampled" if sampled else "gradients", block.columns, manifest)
