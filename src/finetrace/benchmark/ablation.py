"""The ablation: what an influence's success hangs on, one factor at a time and all together."""

from __future__ import annotations

from itertools import product

LOSSES = ("all", "response", "first:5", "first:20", "probe")
PADDINGS = ("", "@128")
CURVATURES = ("ekfac", "exact", "lissa", "datainf", "gradsim")  # ekfac first: its factors come with the gradients
SIMILARITIES = ("none", "cosine", "relatif")
LAYERS = ("all", "last-fifth")

# loss positions x padding x curvature x similarity x layers at the end of the fine-tuning, and without padding at its start:
# 450 methods on fifteen passes over the rows
ABLATION = tuple(
    f"{curvature}:normalise={similarity},loss_on={loss}{padding},layers={layers}{at}"
    for at, loss, padding, curvature, similarity, layers in product(
        ("", ",at=start"), LOSSES, PADDINGS, CURVATURES, SIMILARITIES, LAYERS
    )
    if not (at and padding)
)
