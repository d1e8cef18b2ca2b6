"""This project's and EleutherAI's layout, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from sparsify_vlm.coders.clt import Clt
from sparsify_vlm.coders.formats import curt_tigges, eleuther
from sparsify_vlm.coders.formats.checked import CheckedTensors
from sparsify_vlm.coders.formats.eleuther_tensors import stored_bias, stored_skip, target_key
from sparsify_vlm.coders.formats.on_disk import OnDisk, Segment
from sparsify_vlm.coders.formats.rows import Rows
from sparsify_vlm.coders.formats.stored import full_threshold

DESCRIPTION = eleuther.DESCRIPTION


def recognises(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of this layout, or one of its coder folders."""
    return (folder / eleuther.SHEET).is_file() or any(
        (place / eleuther.CFG).is_file() and not curt_tigges.recognises(place)
        for place in (folder, *folder.iterdir())
    )


class Stored(OnDisk):
    """A folder per layer with `cfg.json` and `sae.safetensors`."""

    format = "sparsify"

    def __init__(self, folder: Path) -> None:
        self._stored = eleuther.read_config(folder)
        config = self._stored.config
        self._files = [CheckedTensors(child / eleuther.TENSORS) for child in self._stored.folders]
        config.train_post_encoder = eleuther.post_encoder_wanted(self._stored, self._files)
        super().__init__(folder, config)

    def stored_encoder(self, s: int) -> Tensor:
        return self._files[s].read("encoder.weight", (self.cfg.num_latents, self.cfg.d_model))

    def in_scale(self, s: int) -> float:
        if not self.cfg.normalize_io:
            return 1.0
        return math.sqrt(self.cfg.d_model) / float(self._files[s].read("in_norm", (1,)))

    def encoder_bias(self, s: int) -> Tensor:
        file = self._files[s]
        bias = file.read("encoder.bias", (self.cfg.num_latents,))
        if self.cfg.transcode:
            return bias
        b_dec = file.read(target_key("b_dec", 0, file), (self.cfg.d_model,))
        return bias - self.stored_encoder(s) @ b_dec

    def threshold(self, s: int) -> Tensor | None:
        file, size = self._files[s], {"jumprelu": self.cfg.num_latents, "batchtopk": 1}
        if self.cfg.activation not in size:
            return None
        if self.cfg.activation == "batchtopk" and "threshold" not in file.keys:
            return None
        stored = file.read("threshold", (size[self.cfg.activation],))
        return full_threshold(self.cfg, stored)

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Clt:
        return eleuther.load(self.path, device, dtype)

    def output_bias(self, t: int) -> Tensor:
        parts = [stored_bias(self.cfg, s, k, self._files[s]) for s, k in self.cfg.sources(t)]
        found = [part for part in parts if part is not None]
        return torch.stack(found).sum(0) * self.out_scale(t)

    def skip(self, s: int, k: int) -> Tensor | None:
        W, t = stored_skip(self.cfg, s, k, self._files[s]), self.cfg.targets(s)[k]
        factor = self.in_scale(s) * self.cfg.write_factor(s, t) * self.out_scale(t)
        return None if W is None else W * factor

    # ---- decoders

    def decoder_segments(self, s: int) -> list[Segment]:
        own = [self._table(s, k) for k in range(len(self.cfg.targets(s)))]
        own = own[:1] if self.cfg.per_source_tied else own
        if not self.cfg.secondary_target_tied:
            return [Segment(own)]
        seconds = [self._table(t, 0) for t in self.cfg.targets(s)]
        return [Segment(own + seconds)]

    def _table(self, s: int, k: int) -> Rows:
        """Where W_dec[s][k] is stored."""
        cfg, F, d = self.cfg, self.cfg.num_latents, self.cfg.d_model
        if cfg.coalesce_topk == "none":
            file = self._files[s]
            return file.rows(target_key("W_dec", 0 if cfg.per_source_tied else k, file), (F, d))
        t = cfg.targets(s)[k]
        file, sources = self._files[t], cfg.sources(t)
        if cfg.coalesce_topk == "concat":
            return file.rows(target_key("W_dec", 0, file), (F, d))
        blocks = self._stored.cfgs[t].get("n_sources") or len(sources)
        return file.rows("W_dec", (blocks * F, d)).part(sources.index((s, k)) * F, F)

    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        count = len(self.cfg.targets(s))
        if self.cfg.secondary_target_tied:
            tables = tables[:-count].expand(count, -1, -1) + tables[-count:]
        return tables.transpose(0, 1).expand(-1, count, -1)

    def out_scale(self, t: int) -> float:
        if not self.cfg.normalize_io:
            return 1.0
        own = self._files[t - self.cfg.target_offset]  # the layer whose first target is t
        return float(own.read("out_norm", (1,))) / math.sqrt(self.cfg.d_model)

    def decoder_scale(self, s: int, first: int, rows: int) -> Tensor | None:
        cfg, targets = self.cfg, self.cfg.targets(s)
        if not (cfg.divide_cross_layer or cfg.normalize_io or cfg.post_encoder_scale):
            return None
        factors = [cfg.write_factor(s, t) * self.out_scale(t) for t in targets]
        scale = torch.tensor(factors).view(1, -1, 1)
        if not cfg.post_encoder_scale:
            return scale
        file, shape = self._files[s], (cfg.num_latents,)
        post = [
            file.read(target_key("post_enc_scale", k, file), shape) for k in range(len(targets))
        ]
        return torch.stack(post, dim=1)[first : first + rows, :, None] * scale
