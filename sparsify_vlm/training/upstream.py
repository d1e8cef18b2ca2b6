"""The pieces of sparsify that are used here.

`sparsify/__init__.py` imports torch, transformers and datasets, which takes seconds. Its
`config.py` needs none of them, so it is run on its own unless sparsify is already imported.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

_NAME = "sparsify_vlm.training._sparsify_config"


def _config_module() -> ModuleType:
    """`sparsify.config`, or the same file run under a name of its own.

    It has to stand in `sys.modules`: simple-parsing reads the fields' docstrings from its source.
    """
    for name in ("sparsify.config", _NAME):
        if name in sys.modules:
            return sys.modules[name]
    package = find_spec("sparsify")
    if package is None or not package.submodule_search_locations:
        raise ImportError("sparsify_vlm needs the package eai-sparsify")
    path = Path(package.submodule_search_locations[0]) / "config.py"
    spec = spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot read {path}")
    module = module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    return module


def imported(name: str) -> ModuleType:
    """The module `sparsify.<name>`, without what importing sparsify prints about Triton."""
    with redirect_stdout(io.StringIO()):
        return import_module(f"sparsify.{name}")


if TYPE_CHECKING:
    from sparsify.config import SparseCoderConfig, TrainConfig
else:
    SparseCoderConfig = _config_module().SparseCoderConfig
    TrainConfig = _config_module().TrainConfig

__all__ = ["SparseCoderConfig", "TrainConfig", "imported"]
