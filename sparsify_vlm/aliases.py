"""Short names of models. Standard library only: the command line reads it before torch is there."""

from __future__ import annotations

# Names that stand for a model on the Hub.
HUB_ALIASES = {"llava": "llava-hf/llava-1.5-7b-hf"}

# Names of the models that ship with the package.
EMBEDDED = ("tiny-llava", "tiny-llama")
