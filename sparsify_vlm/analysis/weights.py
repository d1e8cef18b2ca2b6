"""What the decoders weigh: norms from every source layer to every target layer.

A raw decoder norm carries the scale of its target, σ_t = sqrt(E‖y_t − ȳ_t‖²), so it is divided by
it; then norms at different targets can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsify_vlm.coders import Clt


def decoder_norms(clt: Clt, sigma: Sequence[float]) -> list[list[float | None]]:
    """Mean over latents of ‖W_{s→t}[i]‖ / σ_t, as [source layer][target layer].

    W_{s→t} is all that a unit written by a latent adds to ŷ_t, in the units of y_t.

    Args:
        clt: a cross-layer transcoder of L layers.
        sigma: the standard deviation σ_t of each of the L targets.

    Returns:
        L × L numbers; None where the source does not write to the target.
    """
    n_layers = clt.cfg.n_layers
    norms: list[list[float | None]] = [[None] * n_layers for _ in range(n_layers)]
    for target in range(n_layers):
        for source, k in clt.cfg.sources(target):
            mean = clt.decoder_matrix(source, k).norm(dim=1).mean()
            norms[source][target] = float(mean / sigma[target])
    return norms
