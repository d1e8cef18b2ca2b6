"""How the loops of `compiled` are compiled: at their first call, kept on disk where that can be.

Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

SUMS = frozenset({"reassoc", "contract", "nsz"})
"""Sums may be taken in another order, by vectors; NaN and infinities keep their meaning."""


def loops(allowed: Set[str] = frozenset()) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function to loops that hold no Python lock; `allowed` are LLVM's fast-math flags.

    Division by zero gives infinity, as in torch: a check would keep the loop from using vectors.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": set(allowed) or False,
    }

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # nowhere to write: compiled anew in every process
            return numba.njit(**options)(function)

    return compiled


def part(function: Callable[..., Any]) -> Any:
    """Compile as part of whatever calls it, with the caller's flags: a call for every row costs,
    and keeps LLVM from seeing that arrays do not overlap."""
    return numba.njit(inline="always")(function)


def _prefetch(context: Any, table: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line of table[row, column], which is not read yet. No bounds are checked,
    and an address outside the table does no harm."""
    signature = types.void(table, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.ptrtoint(array.data, ir.IntType(64))
        for place, stride in zip(
            arguments[1:], cgutils.unpack_tuple(builder, array.strides, 2), strict=True
        ):
            address = builder.add(address, builder.mul(place, stride))
        pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer] + 3 * [int32])
        )
        to_read, into_nearest_cache, data = (ir.Constant(int32, n) for n in (0, 3, 1))
        line = builder.inttoptr(address, pointer)
        builder.call(ask, [line, to_read, into_nearest_cache, data])
        return context.get_dummy_value()

    return signature, generate


prefetch: Any = intrinsic(_prefetch)
"""prefetch(table, row, column)"""
