"""The ablation: what an influence's success hangs on, one factor at a time and all together."""

from __future__ import annotations

from itertools import product

LOSSES = ("all", "response", "first:5", "first:20", "probe")
PADDINGS = ("", "@128")
CURVATURES = ("ekfac", "exact", "lissa", "datainf", "gradsim")  # ekfac first: its factors come with the gradients
SIMILARITIES = ("none", "cosine", "relatif")
LAYERS = ("all", "last-fifth")

# loss positions x padding x curvature x similarity x layers: 300 methods on ten passes over the rows
ABLATION = tuple(
    f"{curvature}:normalise={similarity},loss_on={loss}{padding},layers={layers}"
    for loss, padding, curvature, similarity, layers in product(LOSSES, PADDINGS, CURVATURES, SIMILARITIES, LAYERS)
)
