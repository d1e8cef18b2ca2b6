"""Graphs against a slow reference in float64: every source goes forwards, through dense matrices.

Layers are [S·d, S·d] matrices made of the model's own weights and patterns. A source's vector is
carried up through all of them at once, and its edges are read off at the encoders. No autograd, no
gradient, and nothing of the package's replacement or graph code is in it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, N_LAYERS, Family, _causal, load
from prompts import random_coder
from torch import Tensor

from sparsify_vlm.coders import Clt
from sparsify_vlm.graphs import Difference, Feature, attribute
from sparsify_vlm.graphs import attribution as attribution_module
from sparsify_vlm.models import LoadedModel
from sparsify_vlm.replacement import VLMReplacementModel

ALLOWED = 5e-5
"""Of an edge, where the largest are below 10; else of the largest, divided by 10."""

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "jumprelu": {"activation": "jumprelu"},
    "before the norm": {"activation": "relu", "input_site": "resid_mid"},
    "later layers": {"target_offset": 1, "n_targets": 2, "skip_connection": True},
    "skip": {"activation": "relu", "skip_connection": True},
    "skip before the norm": {"skip_connection": True, "input_site": "resid_mid", "n_targets": 2},
    "normalised": {"normalize_io": True, "skip_connection": True},
    "post-encoder": {"train_post_encoder": True, "post_encoder_scale": True},
}


@cache
def loaded_model(name: str) -> LoadedModel:
    slides = Family(lambda: _causal(tf.Gemma2ForCausalLM, tf.Gemma2Config, sliding_window=4))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if name == "gemma2":  # windows smaller than the prompt
            patch.setitem(FAMILIES, "gemma2", slides)
        return load(name, Path(folder))


def prompt(loaded: LoadedModel, soft: bool = False) -> dict[str, Tensor]:
    inputs = dict(loaded.processor(["what colour is the thing ? it is red"], return_tensors="pt"))
    if soft:
        rows = loaded.model.get_input_embeddings()(inputs["input_ids"]).detach().clone()
        rows[0, 2:5] += torch.randn(3, rows.shape[-1], generator=torch.Generator().manual_seed(9))
        inputs = {"input_ids": inputs["input_ids"], "inputs_embeds": rows}
    return inputs


@dataclass
class Dense:
    """One prompt's model. starts, mids, y [S, d] by layer; layers [S·d, S·d] from a layer's start
    to its MLP; norms [S, d] in front of the MLPs, with last_norm behind all."""

    starts: list[Tensor] = field(default_factory=list)
    mids: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    layers: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    last_norm: Tensor = field(default_factory=lambda: torch.zeros(0))
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))

    def read(self, layer: int, stream: Tensor, site: str) -> Tensor:
        return stream if site == "resid_mid" else stream * self.norms[layer]


@torch.no_grad()
def dense(loaded: LoadedModel, inputs: dict[str, Tensor]) -> Dense:
    """Llama and Gemma 2, from their weights."""
    model = copy.deepcopy(loaded.model).double()
    model.set_attn_implementation("eager")
    gemma, eps = "gemma" in model.config.model_type, model.config.rms_norm_eps

    def scale(module: Any, h: Tensor) -> Tensor:
        weight = module.weight + 1 if gemma else module.weight
        return weight / (h.square().mean(-1, keepdim=True) + eps).sqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own are of float32
            module.forward = lambda h, module=module: scale(module, h) * h
    found, patterns, attended, last = Dense(), [], [], []
    for layer in model.model.layers:
        before = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        behind = layer.post_feedforward_layernorm if gemma else layer.mlp
        layer.input_layernorm.register_forward_pre_hook(lambda _, a: found.starts.append(a[0][0]))
        before.register_forward_pre_hook(lambda _, a: found.mids.append(a[0][0]))
        behind.register_forward_hook(lambda _, a, out: found.y.append(out[0]))
        layer.self_attn.register_forward_hook(lambda _, a, out: attended.append(out[0][0]))
        layer.self_attn.register_forward_hook(lambda _, a, out: patterns.append(out[1][0]))
    model.model.norm.register_forward_pre_hook(lambda _, a: last.append(a[0][0]))
    given = {k: v.double() if k == "inputs_embeds" else v for k, v in inputs.items()}
    if "inputs_embeds" in given:
        del given["input_ids"]
    found.logits = model(**given, use_cache=False).logits[0, -1]
    for i, layer in enumerate(model.model.layers):
        (S, d), attention = found.starts[i].shape, layer.self_attn
        heads, width = len(patterns[i]), attention.head_dim
        group = attention.num_key_value_groups
        values = scale(layer.input_layernorm, found.starts[i])
        moved = torch.zeros(S, d, S, d, dtype=torch.float64)
        for h in range(heads):
            V = attention.v_proj.weight[h // group * width :][:width]
            out = attention.o_proj.weight[:, h * width :][:, :width] @ V
            moved += torch.einsum("qk,ab,kb->qakb", patterns[i][h], out, values)
        if gemma:
            moved *= scale(layer.post_attention_layernorm, attended[i])[:, :, None, None]
        found.layers.append(moved.view(S * d, S * d) + torch.eye(S * d, dtype=torch.float64))
        made = (found.layers[i] @ found.starts[i].flatten()).view(S, d)
        torch.testing.assert_close(made, found.mids[i], rtol=0, atol=1e-8)
        before = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        found.norms.append(scale(before, found.mids[i]))
    found.last_norm = scale(model.model.norm, last[0])
    return found


class Reference:
    """features, activations: (layer, position, index) and values of what is active."""

    def __init__(self, model: Dense, clt: Clt) -> None:
        self.model, self.clt, self.cfg = model, copy.deepcopy(clt).double(), clt.cfg
        self.S, self.d = model.starts[0].shape
        self.features: list[tuple[int, int, int]] = []
        self.activations: list[float] = []
        self.u: dict[tuple[int, int], Tensor] = {}
        y_hat = [torch.zeros(self.S, self.d, dtype=torch.float64) for _ in model.y]
        for t in {t for s in self.cfg.source_layers() for t in self.cfg.targets(s)}:
            y_hat[t] += self.clt.b_dec[t] * self.made(t)
        for s in self.cfg.source_layers():
            x = model.read(s, model.mids[s], self.cfg.input_site) * self.given(s)
            a = self.active(s, x @ self.clt.W_enc[s].T + self.clt.b_enc[s])
            for p, i in a.nonzero().tolist():
                self.features.append((s, p, i))
                self.activations.append(float(a[p, i]))
            for k, t in enumerate(self.cfg.targets(s)):
                u = a
                if self.cfg.train_post_encoder:
                    u = (a + self.clt.post_enc[s][k] * (a > 0)) * self.clt.post_scale[s][k]
                self.u[s, t] = u
                y_hat[t] += u @ self.clt.W_dec[s][k] * self.made(t)
                if self.clt.W_skip is not None:
                    y_hat[t] += x @ self.clt.W_skip[s][k].T * self.made(t)
        self.errors = torch.stack(model.y) - torch.stack(y_hat)
        self.errors[:, 0] = 0

    def given(self, s: int) -> float:
        return math.sqrt(self.d) / float(self.clt.in_norm[s]) if self.cfg.normalize_io else 1.0

    def made(self, t: int) -> float:
        return float(self.clt.out_norm[t]) / math.sqrt(self.d) if self.cfg.normalize_io else 1.0

    def active(self, s: int, pre: Tensor) -> Tensor:
        a = pre.clamp(min=0)
        if self.cfg.activation == "topk":
            a = torch.where(a >= a.topk(self.cfg.k, 1).values[:, -1:], a, 0)
        if self.cfg.activation == "jumprelu":
            a = torch.where(pre > self.clt.threshold[s], a, 0)
        a[0] = 0  # the special token at the start
        return a

    def adjacency(self, directions: Tensor, others: list[tuple[int, int, int]]) -> Tensor:
        """[N, N] with targets `directions` behind the last norm, then the features `others`."""
        L, S, d, n = len(self.model.y), self.S, self.d, len(self.features)
        columns = n + L * S + S
        writes = torch.zeros(columns, L, S, d, dtype=torch.float64)
        for j, (s, p, i) in enumerate(self.features):
            for k, t in enumerate(self.cfg.targets(s)):
                writes[j, t, p] = self.u[s, t][p, i] * self.clt.W_dec[s][k][i] * self.made(t)
        for node in range(L * S):
            writes[n + node, node // S, node % S] = self.errors[node // S, node % S]
        stream = torch.zeros(columns, S, d, dtype=torch.float64)
        for p in range(S):
            stream[n + L * S + p, p] = self.model.starts[0][p]
        N = columns + len(directions) + len(others)
        A = torch.zeros(N, N, dtype=torch.float64)
        rows = [*enumerate(self.features), *enumerate(others, columns + len(directions))]
        for layer in range(L):
            mid = (stream.flatten(1) @ self.model.layers[layer].T).view(columns, S, d)
            stream = mid + writes[:, layer]
            if layer in self.cfg.source_layers():
                x = self.model.read(layer, mid, self.cfg.input_site) * self.given(layer)
                for row, (s, p, i) in rows:
                    if s == layer:
                        A[row, :columns] = x[:, p] @ self.clt.W_enc[layer][i]
                for k, t in enumerate(self.cfg.targets(layer)):
                    if self.clt.W_skip is not None:
                        writes[:, t] += x @ self.clt.W_skip[layer][k].T * self.made(t)
                stream = mid + writes[:, layer]
        last = stream[:, -1] * self.model.last_norm[-1]
        A[columns : columns + len(directions), :columns] = directions @ last.T
        return A


def unembedding(loaded: LoadedModel) -> Tensor:
    return loaded.model.get_output_embeddings().weight.detach().double()


def check(graph: Any, expected: Tensor) -> None:
    size = max(1.0, float(expected.abs().max()) / 10)
    assert (graph.adjacency.double() - expected).abs().max() < ALLOWED * size


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_likeliest_tokens(name, variant):
    loaded = loaded_model(name)
    coder, inputs = random_coder(loaded, **VARIANTS[variant]), prompt(loaded)
    reference = Reference(dense(loaded, inputs), coder)
    top = reference.model.logits.softmax(0).topk(10)
    ids = top.indices[: int((top.values.cumsum(0) < 0.95).sum()) + 1]
    W = unembedding(loaded)
    expected = reference.adjacency(W[ids] - W.mean(0), [])
    for options in ({}, {"fast": True}, {"fast": False}, {"fast": True, "batch_size": 1}):
        graph = attribute(VLMReplacementModel(loaded, coder), inputs, **options)
        assert graph.active_features.tolist() == [list(one) for one in reference.features]
        found = torch.tensor(reference.activations)
        torch.testing.assert_close(graph.activation_values, found, rtol=0, atol=2e-5)
        assert graph.logit_token_ids.tolist() == ids.tolist()
        check(graph, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("soft", [False, True])
def test_given_targets_and_chosen_nodes(name, soft, monkeypatch):
    """Every token, differences, a direction, and features that are active or not, at any layer."""
    monkeypatch.setattr(attribution_module, "ROUND", 16)
    loaded = loaded_model(name)
    coder = random_coder(loaded, activation="jumprelu", skip_connection=True)
    inputs = prompt(loaded, soft)
    reference = Reference(dense(loaded, inputs), coder)
    W, S = unembedding(loaded), reference.S
    direction = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(5))
    others = [(2, 6, 3), (0, 2, 4), (1, S - 1, 7), (0, 0, 3), (1, 5, 0), (2, 6, 4)]
    targets = [*range(len(W)), Difference(3, 5), direction, *(Feature(*one) for one in others)]
    rows = torch.cat([W - W.mean(0), (W[3] - W[5])[None], direction.double()[None]])
    whole, n = reference.adjacency(rows, others), len(reference.features)
    model = VLMReplacementModel(loaded, coder)
    check(attribute(model, inputs, targets=targets), whole)
    for count, options in ((1, {}), (40, {"fast": True}), (40, {"fast": False, "batch_size": 3})):
        graph = attribute(model, inputs, targets=targets, max_feature_nodes=count, **options)
        columns = n + (N_LAYERS + 1) * S
        chosen = most_influential(whole, n, columns, graph.logit_probabilities.double(), count)
        assert graph.selected_features.tolist() == chosen
        kept = torch.cat([torch.tensor(chosen), torch.arange(n, len(whole))])
        check(graph, whole[kept][:, kept])


def most_influential(
    whole: Tensor, n: int, columns: int, weights: Tensor, count: int, together: int = 16
) -> list[int]:
    """By the definition, `together` at a time: sums over all paths through what is chosen."""
    share = whole.abs() / whole.abs().sum(1, keepdim=True).clamp(min=1e-30)
    chosen: list[int] = []
    while len(chosen) < count:
        flow = torch.zeros(len(whole), dtype=torch.float64)
        flow[columns:] = weights
        passed, reached = torch.zeros(len(whole), dtype=torch.bool), torch.zeros_like(flow)
        passed[chosen] = True
        for _ in range(10):  # no path is longer
            flow = flow @ share
            reached += flow
            flow = torch.where(passed, flow, 0)
        reached[chosen] = -1
        more = min(together, count - len(chosen))
        chosen += reached[:n].argsort(descending=True)[:more].tolist()
    return sorted(chosen)
