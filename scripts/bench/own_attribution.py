"""One process of `bench_attribution.py`: our `attribute` on a written case.

    own_attribution.py FOLDER OUTPUT OPTIONS    # OPTIONS: JSON, see `main`

Writes OUTPUT.json (figures) and OUTPUT.safetensors (the graph); peer_attribution.py does the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from timed_calls import timed

from sparsify_vlm import attribute
from sparsify_vlm.replacement import VLMReplacementModel


def main(folder: Path, output: str, options: dict) -> None:
    """`options`: `threads`, `arguments` of `attribute`, `dense` (store the adjacency)."""
    torch.set_num_threads(options["threads"])
    model = VLMReplacementModel.from_pretrained(str(folder / "model"), folder / "clt")
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))[None]
    graph, figures = timed(lambda: attribute(model, {"input_ids": ids}, **options["arguments"]))
    figures |= {
        "active": len(graph.active_features), "nodes": graph.n_nodes,
        "edges": len(graph.edges.weight), "features": graph.n_features,
    }  # fmt: skip
    if options["dense"]:
        found = {
            "active_features": graph.active_features,
            "activation_values": graph.activation_values,
            "selected_features": graph.selected_features,
            "logit_token_ids": graph.logit_token_ids,
            "adjacency": graph.adjacency,
        }
        save_file({k: v.contiguous() for k, v in found.items()}, output + ".safetensors")
    Path(output + ".json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
