"""What a reader must know of an index to take its scores for what they are."""

from __future__ import annotations

from finetrace._version import __version__
from finetrace.index.manifest import Manifest
from finetrace.index.store import Index


def index_facts(index: Index) -> dict[str, str]:
    """Name to value, in order."""
    manifest = index.manifest
    width = sum(block.size for block in index.blocks)
    facts = {
        "model": manifest.model.name,
        "adapter": f"{manifest.model.adapter_fingerprint} (kept in the index)" if manifest.model.adapter else "none",
        "training examples": f"{manifest.kept:,} ({manifest.tokens:,} tokens{_with_left_out(manifest)})",
        "loss on": manifest.encoding.loss_on,
        "gradients at": f"the {manifest.model.at} of the fine-tuning, unless a method says otherwise",
        "gradient entries": f"{width:,} in {len(index.blocks)} matrices",
        "computed in": f"{manifest.model.dtype}, kept in {manifest.feature_dtype}",
        "sign": "positive = proponent: training on the example makes the answer more likely",
        "finetrace": __version__,
    }
    if manifest.projection != "none":
        facts["projected by"] = f"{manifest.projection}, seed {manifest.projection_seed}"
    if manifest.left_out:
        facts["left out"] = ", ".join(f"{each.id} ({each.reason})" for each in manifest.left_out[:4])
        facts["left out"] += ", ..." if len(manifest.left_out) > 4 else ""
    if manifest.skipped:
        facts["not tracked"] = ", ".join(list(manifest.skipped)[:4]) + (", ..." if len(manifest.skipped) > 4 else "")
    return facts


def _with_left_out(manifest: Manifest) -> str:
    return f", those of {len(manifest.left_out)} left out among them" if manifest.left_out else ""
