"""Folders of EleutherAI's clt-training: written by hand with its keys, and ours as it reads them.

`Fork` computes what that program's runner computes from such a folder, in its order: layer after
layer, each live source's decoder, then the target's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, load_clt, save_clt
from sparsify_vlm.errors import UserError

L, T, D, F, K, CROSS = 5, 7, 4, 12, 3, 3

DEFAULTS = {
    "activation": "topk",
    "num_latents": 0,
    "expansion_factor": F // D,
    "k": K,
    "transcode": True,
    "skip_connection": False,
    "n_targets": 0,
    "n_sources": 0,
    "normalize_io": False,
    "divide_cross_layer": False,
    "train_post_encoder": True,
    "post_encoder_scale": False,
    "per_source_tied": False,
    "secondary_target_tied": False,
    "coalesce_topk": "none",
    "topk_coalesced": False,
}

VARIANTS = [
    {},
    {"skip_connection": True, "post_encoder_scale": True},
    {"activation": "groupmax"},
    {"activation": "batchtopk"},
    {"per_source_tied": True, "skip_connection": True},
    {"coalesce_topk": "concat", "skip_connection": True},
    {"coalesce_topk": "concat", "topk_coalesced": True},
    {"coalesce_topk": "per-layer", "skip_connection": True, "post_encoder_scale": True},
    {"coalesce_topk": "per-layer", "topk_coalesced": True},
    {"secondary_target_tied": True, "per_source_tied": True, "skip_connection": True},
    {"secondary_target_tied": True, "skip_connection": True},
    {"divide_cross_layer": True, "skip_connection": True},
    {"normalize_io": True, "skip_connection": True},
    {"normalize_io": True, "coalesce_topk": "per-layer", "skip_connection": True},
    {"normalize_io": True, "secondary_target_tied": True, "divide_cross_layer": False},
]


def sources_of_the_trainer() -> list[int]:
    """`n_sources` as the fork's trainer counts them: one too many beyond a source's reach."""
    counts, ends = [], []
    for position in range(L):
        ends.append(position + min(CROSS, L - position))
        while ends[0] < position:
            ends.pop(0)
        counts.append(len(ends))
    return counts


def write(folder: Path, cross: int = CROSS, **fields: Any) -> Path:
    """A checkpoint as the fork writes it, all tensors random."""
    flags = DEFAULTS | fields
    coalesced = flags["coalesce_topk"] != "none"
    for s in range(L):
        n = min(cross, L - s)
        numbered = cross > 0 and flags["transcode"]
        n_sources = sources_of_the_trainer()[s] if cross else 0
        per_target = [f"s.{k}" for k in range(n)] if numbered else [""]
        own = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F)}
        for end in per_target:
            own[f"post_enc{end}"] = torch.randn(F) / 4
            if flags["post_encoder_scale"]:
                own[f"post_enc_scale{end}"] = torch.rand(F) + 0.5
        for end in [""] if coalesced else per_target:
            own[f"b_dec{end}"] = torch.randn(D)
            if flags["skip_connection"]:
                own[f"W_skip{end}"] = torch.randn(D, D)
        if coalesced or flags["per_source_tied"]:
            blocks = max(1, n_sources) if flags["coalesce_topk"] == "per-layer" else 1
            own["W_dec"] = torch.randn(blocks * F, D)
        else:
            own |= {f"W_dec{end}": torch.randn(F, D) for end in per_target}
        if flags["normalize_io"]:
            own |= {"in_norm": torch.rand(1) + 1, "out_norm": torch.rand(1) + 1}
        child = folder / f"layers.{s}.mlp"
        child.mkdir(parents=True)
        numbers = {"n_targets": n if cross else 0, "n_sources": n_sources, "d_in": D}
        (child / "cfg.json").write_text(json.dumps(flags | numbers))
        save_file(own, child / "sae.safetensors")
    return folder


class Fork:
    """A folder and what the fork computes from it."""

    def __init__(self, folder: Path) -> None:
        children = [folder / f"layers.{s}.mlp" for s in range(L)]
        self.cfgs = [DEFAULTS | json.loads((c / "cfg.json").read_text()) for c in children]
        self.tensors = [load_file(c / "sae.safetensors") for c in children]
        self.cfg = self.cfgs[0]

    def get(self, s: int, name: str, k: int, default: Tensor | float | None = None) -> Any:
        own = self.tensors[s]
        return own.get(f"{name}s.{k}", own.get(name, default))

    def inputs(self, s: int, x: Tensor) -> Tensor:
        return x * D**0.5 / self.tensors[s]["in_norm"] if self.cfg["normalize_io"] else x

    def encode(self, s: int, x: Tensor) -> Tensor:
        weight, bias = self.tensors[s]["encoder.weight"], self.tensors[s]["encoder.bias"]
        if not self.cfg["transcode"]:
            x = x - self.tensors[s]["b_dec"]
        pre = (x @ weight.T + bias).relu()
        if self.cfg["activation"] == "topk":
            return pre * (pre >= pre.topk(self.cfg["k"]).values[:, -1:])
        if self.cfg["activation"] == "batchtopk":  # no token reaches the fork's cap of 4 k here
            return pre * (pre >= pre.flatten().topk(K * T).values[-1])
        groups = pre.view(T, K, F // K)
        return (groups * (groups == groups.amax(-1, keepdim=True))).view(T, F)

    def decode_one(self, s: int, k: int, u: Tensor, x: Tensor) -> Tensor:
        """One coder's output for its k-th target, with its bias and skip connection."""
        out = u @ self.get(s, "W_dec", k) + self.get(s, "b_dec", k)
        W_skip = self.get(s, "W_skip", k)
        return out if W_skip is None else out + x @ W_skip.T

    def reconstruct(self, x: Tensor) -> list[Tensor]:
        x = torch.stack([self.inputs(s, x[s]) for s in range(L)])
        acts = [self.encode(s, x[s]) for s in range(L)]
        outputs = []
        for t in range(L):
            live = [s for s in range(t + 1) if s + max(1, self.cfgs[s]["n_targets"]) > t]
            u = {}
            for s in live:
                k = t - s
                post = self.get(s, "post_enc", k, 0.0) * (acts[s] > 0)
                u[s] = (acts[s] + post) * self.get(s, "post_enc_scale", k, 1.0)
            y = self.sum_of(t, live, u, x)
            outputs.append(
                y * self.tensors[t]["out_norm"] / D**0.5 if self.cfg["normalize_io"] else y
            )
        return outputs

    def sum_of(self, t: int, live: list[int], u: dict[int, Tensor], x: Tensor) -> Tensor:
        if self.cfg["coalesce_topk"] != "none":
            return self.coalesced(t, live, u, x)
        divide = max(1, len(live) - 1) if self.cfg["divide_cross_layer"] else 1
        others = sum(self.decode_one(s, t - s, u[s], x[s]) for s in live if s != t)
        out = self.decode_one(t, 0, u[t], x[t]) + others / divide
        if self.cfg["secondary_target_tied"]:
            out = out + self.decode_one(t, 0, sum(u.values()), x[t])
        return out

    def coalesced(self, t: int, live: list[int], u: dict[int, Tensor], x: Tensor) -> Tensor:
        values = torch.cat([u[s] for s in live], dim=1)
        if self.cfg["topk_coalesced"]:
            values = values * (values >= values.topk(K).values[:, -1:])
        if self.cfg["coalesce_topk"] == "concat":
            values = sum(values.split(F, dim=1))
        missing = len(self.tensors[t]["W_dec"]) - values.shape[1]
        values = torch.cat([values, torch.zeros(T, missing)], dim=1)
        return self.decode_one(t, 0, values, x[t])


def close(found: list[Tensor | None], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_folders_of_the_fork_are_read(fields, tmp_path):
    write(tmp_path / "theirs", **fields)
    clt, x = load_clt(tmp_path / "theirs"), torch.randn(L, T, D)
    close(clt.reconstruct(x), Fork(tmp_path / "theirs").reconstruct(x))
    save_clt(clt, tmp_path / "ours")
    close(Fork(tmp_path / "ours").reconstruct(x), Fork(tmp_path / "theirs").reconstruct(x))
    again = load_clt(tmp_path / "ours")
    for a, b in zip(clt.reconstruct(x), again.reconstruct(x), strict=True):
        assert torch.equal(a, b)
    assert len(list(again.named_parameters())) == len(list(clt.named_parameters()))


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "groupmax"},
        {"coalesce_topk": "concat"},
        {"normalize_io": True},
        {"normalize_io": True, "transcode": False},
        {"transcode": False, "coalesce_topk": "per-layer", "topk_coalesced": True},
        {"secondary_target_tied": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_coders_without_cross_layer_targets_are_read(fields, tmp_path):
    write(tmp_path / "theirs", cross=0, **fields)
    clt, x = load_clt(tmp_path / "theirs"), torch.randn(L, T, D)
    close(clt.reconstruct(x), Fork(tmp_path / "theirs").reconstruct(x))
    save_clt(clt, tmp_path / "ours")
    close(Fork(tmp_path / "ours").reconstruct(x), Fork(tmp_path / "theirs").reconstruct(x))


def test_flags_without_effect_in_the_fork_are_dropped(tmp_path):
    fields = {"topk_coalesced": True, "divide_cross_layer": True}
    cfg = load_clt(write(tmp_path / "a", **fields)).cfg
    assert (cfg.topk_coalesced, cfg.divide_cross_layer) == (False, True)
    fields |= {"coalesce_topk": "concat", "per_source_tied": True}
    cfg = load_clt(write(tmp_path / "b", **fields)).cfg
    assert (cfg.topk_coalesced, cfg.divide_cross_layer, cfg.per_source_tied) == (True, False, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coalesce_topk": "group"}, "coalesce_topk 'group' cannot be read here"),
        ({"activation": "gelu"}, "activation 'gelu' cannot be read here"),
        (
            {"secondary_target_tied": True, "divide_cross_layer": True},
            "--divide_cross_layer .* --secondary_target_tied",
        ),
        ({"secondary_target_tied": True, "coalesce_topk": "concat"}, "--secondary_target_tied"),
    ],
)
def test_what_is_not_known_is_refused_by_name(fields, message, tmp_path):
    write(tmp_path, **fields)
    with pytest.raises(UserError, match=rf"cfg\.json: .*{message}"):
        load_clt(tmp_path)


def test_too_few_blocks_are_named(tmp_path):
    write(tmp_path, coalesce_topk="per-layer")
    path = tmp_path / "layers.3.mlp" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_sources": 2}))
    with pytest.raises(UserError, match=r"layers\.3\.mlp.*n_sources is 2"):
        load_clt(tmp_path)


# ---- keys of what we write


def saved_keys(tmp_path: Path, **options: Any) -> tuple[set[str], dict[str, Any]]:
    """Keys and cfg.json of the layer before the last."""
    cfg = CltConfig(
        d_model=D, hookpoints=[f"layers.{s}.mlp" for s in range(L)], num_latents=F, k=K, **options
    )
    child = save_clt(Clt(cfg), tmp_path) / f"layers.{L - 2}.mlp"
    return set(load_file(child / "sae.safetensors")), json.loads((child / "cfg.json").read_text())


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"W_dec", "b_dec"}),
        ({"activation": "groupmax"}, {"W_dec", "b_dec"}),
        ({"coalesce_topk": "concat", "skip_connection": True}, {"W_dec", "b_dec", "W_skip"}),
        (
            {"activation": "batchtopk"},
            {"W_decs.0", "b_decs.0", "post_encs.0", "threshold"},
        ),
        (
            {"per_source_tied": True, "n_targets": 2},
            {"W_dec", "b_decs.0", "b_decs.1", "post_encs.0", "post_encs.1"},
        ),
        (
            {"coalesce_topk": "per-layer", "n_targets": 2, "skip_connection": True},
            {"W_dec", "b_dec", "W_skip", "post_encs.0", "post_encs.1"},
        ),
        (
            {"normalize_io": True, "transcode": False, "input_site": "mlp_out"},
            {"W_dec", "b_dec", "post_enc", "in_norm", "out_norm"},
        ),
        (
            {"activation": "jumprelu", "transcode": False, "input_site": "mlp_out"},
            {"W_dec", "b_dec", "post_enc", "threshold"},
        ),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_keys_are_the_fork_s(options, keys, tmp_path):
    found, cfg = saved_keys(tmp_path, **options)
    assert found - {"encoder.weight", "encoder.bias"} == keys
    for name in ("coalesce_topk", "per_source_tied", "normalize_io"):
        assert cfg.get(name, DEFAULTS[name]) == options.get(name, DEFAULTS[name])
    assert cfg["activation"] == options.get("activation", "topk")
    numbered = any(".0" in key for key in keys)
    assert cfg.get("n_targets", 0) == (options.get("n_targets", 1) if numbered else 0)


def test_sparsify_refuses_what_it_would_misread(tmp_path):
    from sparsify import SparseCoder

    for i, options in enumerate(
        [
            {"normalize_io": True},
            {"secondary_target_tied": True},
            {"activation": "batchtopk"},
            {"activation": "jumprelu", "transcode": False, "input_site": "mlp_out"},
        ]
    ):
        saved_keys(tmp_path / str(i), **options)
        with pytest.raises((RuntimeError, TypeError), match=r"key\(s\)|batchtopk|jumprelu"):
            SparseCoder.load_from_disk(tmp_path / str(i) / "layers.0.mlp")
