"""How rows are made and edges listed: by matrices or autograd, from tables kept or made anew."""

from __future__ import annotations

import pytest
import torch
from families import N_LAYERS, shared
from prompts import one_prompt, random_coder

from sparsify_vlm.graphs import attribute
from sparsify_vlm.graphs.columns import Columns
from sparsify_vlm.graphs.edge_list import EdgeList
from sparsify_vlm.graphs.rows import Reads, RowMaker
from sparsify_vlm.replacement import LocalModel, VLMReplacementModel


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma2"])
def test_rows_where_nothing_can_be_kept(name):
    """Matrices made anew for every batch, a table for each source, no table of tokens; with coders
    whose positions have very different numbers of features."""
    loaded = shared(name)
    coder = random_coder(loaded, activation="relu")
    local = LocalModel(VLMReplacementModel(loaded, coder), one_prompt(loaded))
    rows = []
    for size in (1 << 30, 1):
        columns = Columns(local, size)
        maker = RowMaker(local, columns, columns.n, size, fast=True)
        table = columns.features[::3]
        vectors = torch.cat([local.encoder_rows(int(f[0]), f[2:]) for f in table])
        rows.append(maker.rows(Reads(table[:, 0], table[:, 1], vectors)))
    assert rows[0].abs().max() > 0.1
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-5)


def test_vectors_in_tables_are_what_features_write():
    """Against the coder's own decoding of one feature alone."""
    loaded = shared("llama")
    coder = random_coder(loaded, activation="relu")
    local = LocalModel(VLMReplacementModel(loaded, coder), one_prompt(loaded))
    keep = torch.rand(local.n_positions, generator=torch.Generator().manual_seed(0)) ** 6
    for latents in local.latents.values():  # from few features at a position to all of them
        few = torch.rand(latents.values.shape, generator=torch.Generator().manual_seed(1))
        latents.values[few > keep[:, None]] = 0
    columns = Columns(local, 1 << 30)
    G = torch.randn(5, local.n_positions, local.stack.d_model)
    for layer in range(N_LAYERS):
        (tables,) = columns.tables(layer)
        assert len(tables.tables) > 2
        found = tables.products(G)
        for row, (s, p, i) in zip(found, columns.features[tables.columns].tolist(), strict=True):
            a = columns.activations[columns.features.eq(torch.tensor([s, p, i])).all(1)]
            written = coder.W_dec[s][layer - s][i] * a
            torch.testing.assert_close(row, G[:, p] @ written, rtol=1e-4, atol=1e-5)


def test_edges_are_listed_by_target_and_source():
    dense = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).relu()
    dense[4] = 0
    listed = EdgeList(9, 36)
    for targets in ([7, 2], [4], [0, 8, 1, 3], [6, 5]):
        listed.add(torch.tensor(targets), dense[targets][:, 1:5], torch.tensor([2, 3, 5, 8]))
    edges = listed.joined()
    expected = torch.zeros(9, 9)
    expected[:, [2, 3, 5, 8]] = dense[:, 1:5]
    target, source = expected.nonzero(as_tuple=True)
    assert torch.equal(edges.target, target)
    assert torch.equal(edges.source, source)
    assert torch.equal(edges.weight, expected[target, source])
    assert edges.source.dtype == torch.int64


@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "gpt2", "granite", "olmo2", "qwen3_vl"])
def test_matrices_and_autograd_agree(name):
    loaded = shared(name)
    local = LocalModel(
        VLMReplacementModel(loaded, random_coder(loaded, skip_connection=True)), one_prompt(loaded)
    )
    one, other = (attribute(local.model, local, fast=fast).adjacency for fast in (True, False))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
