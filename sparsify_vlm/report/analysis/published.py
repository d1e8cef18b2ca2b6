"""What has been published, to stand beside what was measured.

Gemma Scope 2's cross-layer transcoder of Gemma 3 1B (26 layers), as the study "Cross-Layer
Connections in Cross-Layer Transcoders: An Empirical Investigation" measured it, with plain norms.
"""

from __future__ import annotations

SOURCE = "Gemma Scope 2, 1B"
LAYERS = 26
SAME_LAYER_SHARE_MEAN_NORM = 0.195
SAME_LAYER_SHARE_SQUARED_NORM = 0.385
MEAN_NORM_SAME = 0.378
MEAN_NORM_CROSS = 0.125
NORM_BY_DISTANCE = {0: 0.378, 1: 0.196, 5: 0.130, 10: 0.108, 25: 0.046}
"""Mean decoder norm at a distance in layers."""
HALF_LIFE = "7 to 14, by range"
"""Of an exponential through these norms: it depends on which distances are fitted."""
FVU_FULL = 0.287
FVU_ABLATED = 0.437


def decay_factor(distance: int) -> float:
    """Mean norm at a distance over that at distance 0."""
    return NORM_BY_DISTANCE[distance] / NORM_BY_DISTANCE[0]
