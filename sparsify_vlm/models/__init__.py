"""Which layers, which tokens: loading models, their MLPs, token roles, the embedded tiny models."""

from __future__ import annotations

from sparsify_vlm.models.load import ALIASES, LoadedModel, load_model
from sparsify_vlm.models.record import TokenTable, record_tokens
from sparsify_vlm.models.resolve import is_multimodal, resolve_stack
from sparsify_vlm.models.roles import ROLE_NAMES, Role
from sparsify_vlm.models.stack import INPUT_SITES, InputSite, Stack

__all__ = [
    "ALIASES",
    "INPUT_SITES",
    "ROLE_NAMES",
    "InputSite",
    "LoadedModel",
    "Role",
    "Stack",
    "TokenTable",
    "is_multimodal",
    "load_model",
    "record_tokens",
    "resolve_stack",
]
