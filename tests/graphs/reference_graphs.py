"""The graphs under tests/oracles/attribution, with the models and coders they belong to."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsify_vlm.replacement import VLMReplacementModel

ROOT = Path(__file__).parents[1] / "oracles" / "attribution"
CASES = {
    "llama_relu": "clt_circuit_tracer",
    "llama_topk": "clt_eleutherai",
    "llama_soft_tokens": "clt_circuit_tracer",
}


def oracle(case: str) -> dict[str, Tensor]:
    """What circuit-tracer computed."""
    return load_file(ROOT / "cases" / case / "oracle.safetensors")


def meta(case: str) -> dict[str, Any]:
    """Scores and interventions."""
    return json.loads((ROOT / "cases" / case / "meta.json").read_text())


@cache
def model(case: str) -> VLMReplacementModel:
    """The replacement model of a case."""
    folder = ROOT / "cases" / case / CASES[case]
    return VLMReplacementModel.from_pretrained(str(ROOT / "models" / "tiny_llama"), folder)


def inputs(case: str) -> dict[str, Tensor]:
    """The prompt, with soft tokens where the case has some."""
    reference = oracle(case)
    ids = reference["input_ids"]
    if "soft_positions" not in reference:
        return {"input_ids": ids[None]}
    embeddings = model(case).loaded.model.get_input_embeddings()(ids).detach().clone()
    embeddings[reference["soft_positions"]] = reference["soft_embeds"]
    return {"input_ids": ids[None], "inputs_embeds": torch.as_tensor(embeddings)[None]}
