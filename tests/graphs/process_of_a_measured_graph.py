"""Started by test_graph_memory.py: makes graphs, or a prompt's own model, in forks of its own.

A call is the folder of model, coder and prompt, and the bytes a graph is allowed; with 0 of them
the prompt's own model is made. Said are the bytes it took, beside what was expected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from forks import serve

from sparsify_vlm.graphs import attribute
from sparsify_vlm.replacement import LocalModel, VLMReplacementModel
from sparsify_vlm.replacement.local_size import expected_bytes, held_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench.timed_calls import resident, timed


def measured(call: tuple[str, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder, allowed = Path(call[0]), call[1]
    model = VLMReplacementModel.from_pretrained(str(folder / "model"), folder / "clt")
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))[None]
    inputs = {"input_ids": ids}
    short = {"input_ids": ids[:, :20]}  # for what is loaded at the first call only
    if allowed:
        attribute(model, short)
        graph, figures = timed(
            lambda: attribute(model, inputs, max_feature_nodes=60, memory=allowed)
        )
        peak = figures["peak"] - figures["loaded"]
        return {"peak": peak, "active": len(graph.active_features)}
    LocalModel(model, short)
    local, figures = timed(lambda: LocalModel(model, inputs))
    return {
        "local": resident() - figures["loaded"],
        "expected": expected_bytes(model, ids.shape[1]),
        "held": held_bytes(local),
    }


if __name__ == "__main__":
    serve(measured)
