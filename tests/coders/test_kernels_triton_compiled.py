"""The Triton kernels compiled for compute capability 9.0, which needs no GPU.

What the interpreter runs need not compile. Checked besides: that rows are read 16 bytes at a time,
and that the encoder's products go to the tensor cores.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsify_vlm.coders.kernels import triton_launch as launch

if platform.system() != "Linux":
    pytest.skip("Triton is published for Linux alone", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES = 227 * 1024
"""That one block may have."""

POINTERS = {
    "addresses": "*i64",
    "crow": "*i64", "col": "*i64", "rows": "*i64", "start": "*i64", "order": "*i64",
    "token": "*i64", "out": "*fp32", "value_like": "*fp32", "grad": "*fp32", "decay": "*fp32",
    "dots": "*fp32", "values": "*fp32", "b": "*fp32", "pre": "*bf16", "maxima": "*bf16",
}  # fmt: skip
FLOATS = ("beta1", "rest1", "beta2", "rest2", "step_size", "root", "eps")


def compiled(
    name: str, constants: dict[str, Any], types: dict[str, str], options: dict[str, int]
) -> Any:
    """What Triton makes of a kernel where pointers and d are divisible by 16."""
    kernel = getattr(launch._kernels(), name)
    signature, divisible = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        other = "fp32" if argument in FLOATS else "i32"
        signature[argument] = (POINTERS | types).get(argument, other)
        if signature[argument][0] == "*" or argument == "width":
            divisible[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, places, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= SHARED_BYTES
    return made


def each_config(tuner: Any) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    for config in tuner.configs:
        yield config.kwargs, {"num_warps": config.num_warps, "num_stages": config.num_stages}


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("table", ["*fp32", "*bf16"])
@pytest.mark.parametrize("aligned", [16, 2])
def test_decode(table: str, aligned: int) -> None:
    """Each of the tiles that are tuned."""
    for tiles, options in each_config(launch._decoder()[0]):
        constants = {**tiles, "ALIGNED": aligned}
        made = compiled("decode", constants, {"table_like": table}, options)
        assert aligned == 2 or "ld.global.v4.b32" in made.asm["ptx"]


@pytest.mark.parametrize("moments", ["*fp32", "*bf16"])
@pytest.mark.parametrize(
    ("adam", "decay", "dots"),
    [(True, True, True), (True, False, False), (False, False, True), (False, False, False)],
)
@pytest.mark.parametrize("width", [96, 4096])
def test_backward(moments: str, adam: bool, decay: bool, dots: bool, width: int) -> None:
    constants = {"ADAM": adam, "DECAY": decay, "DOTS": dots, **launch._row_tiles(width)}
    types = {"W": "*fp32", "G": "*fp32", "exp_avg": moments, "exp_avg_sq": moments}
    types |= {"row_keys": "*i32", "column_keys": "*i32"}
    made = compiled("backward", constants, types, {})
    assert width < 512 or "ld.global.v4.b32" in made.asm["ptx"]


def test_dots() -> None:
    made = compiled("dots", launch._row_tiles(4096), {"W": "*fp32", "x": "*fp32"}, {})
    assert "ld.global.v4.b32" in made.asm["ptx"]


@pytest.mark.parametrize(
    ("precision", "instruction"),
    [("bf16", "wgmma.mma_async"), ("tf32", ".tf32"), ("ieee", "fma.rn")],
)
def test_encode(precision: str, instruction: str) -> None:
    """Each of the tiles that are tuned."""
    kind = "*bf16" if precision == "bf16" else "*fp32"
    fixed: dict[str, Any] = {"GROUP": launch.GROUP, "WIDEN": False}
    fixed["PRECISION"] = "tf32" if precision == "tf32" else "ieee"
    for tiles, options in each_config(launch._encoder(precision)[0]):
        made = compiled("encode", {**tiles, **fixed}, {"x": kind, "W": kind}, options)
        assert instruction in made.asm["ptx"]
