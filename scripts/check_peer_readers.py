"""What other programs compute with coders in their own layouts, stored for our tests.

    python scripts/check_peer_readers.py circuit-tracer    # in its own environment, see the README
    python scripts/check_peer_readers.py sae-lens          # that it writes beside the results

Makes the folders of `tests/coders/foreign.py` from their seeds in a temporary place, has the
program's own loaders read them, and stores activations and reconstructions of fixed inputs as
`tests/data/peers/NAME.safetensors`. `tests/coders/test_formats_peers.py` holds ours against them.
Needs the program, torch and safetensors, nothing of this project.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "coders"))

from foreign import L, inputs, write_circuit_tracer, write_gemma_scope  # noqa: E402

RESULTS = ROOT / "tests" / "data" / "peers"
TRACER_CASES = {"circuit-tracer jumprelu": True, "circuit-tracer relu": False}
GEMMA_CASES = {"gemma affine": True, "gemma": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", choices=PROGRAMS)
    program = parser.parse_args().program
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        results = dict(PROGRAMS[program](Path(folder)))
    RESULTS.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in (program, "torch", "transformers", "safetensors")}
    path = RESULTS / f"{program}.safetensors"
    save_file(results | {"x": inputs()}, path, versions)
    print(f"{path}: {len(results)} tensors, {path.stat().st_size} bytes, {versions}")


def circuit_tracer(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Its CLT loader and its Gemma Scope 2 loader: activations and reconstructions."""
    from circuit_tracer.transcoder import cross_layer_transcoder as peer

    wanted = {"device": torch.device("cpu"), "dtype": torch.float32, "lazy_decoder": False}
    for name, thresholds in TRACER_CASES.items():
        write_circuit_tracer(folder / name, thresholds)
        yield from _traced(name, peer.load_clt(str(folder / name), **wanted))
    for name, affine in GEMMA_CASES.items():
        write_gemma_scope(folder / name, affine)
        paths = {i: str(folder / name / f"params_layer_{i}.safetensors") for i in range(L)}
        # it reads the layers below the highest number it is given, so name one more
        clt = peer.load_gemma_scope_2_clt(paths | {L: ""}, **wanted)
        yield from _traced(name, clt)


def _traced(name: str, clt: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    parts = clt.compute_attribution_components(inputs(), zero_positions=slice(0, 0))
    yield f"{name}/activations", parts["activation_matrix"].to_dense()
    yield f"{name}/reconstruction", parts["reconstruction"]


def sae_lens(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Its loaders take one layer as a transcoder, with its decoders summed: what they say of a
    cross-layer transcoder is activations, and W_skip."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
        path = folder / Path(repo_id).name / subfolder / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with loaders.safe_open(local(repo_id, filename), framework="pt") as file:
            keys = file.keys()
            return {key: file.get_slice(key).get_shape() for key in keys}

    def read(name: str, repo_id: str, layers: list[str], loader: object) -> Iterator:
        coders = [SAE.from_pretrained(repo_id, layer, converter=loader) for layer in layers]
        encoded = [coder.encode(x) for coder, x in zip(coders, inputs(), strict=True)]
        yield f"{name}/activations", torch.stack(encoded)
        if "affine" in name:
            yield f"{name}/skip", torch.stack([coder.W_skip for coder in coders])

    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    write_circuit_tracer(folder / "relu", thresholds=False, **hooks)
    layers = [str(i) for i in range(L)]
    with mock.patch.multiple(loaders, hf_hub_download=local, get_safetensors_tensor_shapes=shapes):
        tracer = loaders.mntss_clt_layer_huggingface_loader
        yield from read("circuit-tracer relu", "owner/relu", layers, tracer)
        for name, affine in GEMMA_CASES.items():
            place, repository = f"clt/{name.replace(' ', '_')}", "google/gemma-scope-2-1b-pt"
            write_gemma_scope(folder / Path(repository).name / place, affine)
            layers = [f"{place}/params_layer_{i}" for i in range(L)]
            yield from read(name, repository, layers, loaders.gemma_3_sae_huggingface_loader)


PROGRAMS = {"circuit-tracer": circuit_tracer, "sae-lens": sae_lens}

if __name__ == "__main__":
    main()
