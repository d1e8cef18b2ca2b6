"""One clear line for every way in which a model cannot be had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors
from safetensors import SafetensorError

from sparsify_vlm.errors import UserError

WAY_OUT = "tiny-llava, which comes with sparsify-vlm, always works"


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the errors of loading model `name` into one `UserError` of one line."""
    try:
        yield
    except Exception as error:
        reason = _reason(name, error)
        if reason is None:
            raise
        raise UserError(f"model '{name}' {reason} ({WAY_OUT})") from error


def _reason(name: str, error: Exception) -> str | None:
    causes = list(_chain(error))
    text = " ".join(str(error).split())

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if is_a(errors.GatedRepoError) or "gated repo" in text:
        return (
            f"is gated: accept its terms on https://huggingface.co/{name}, then log in with "
            "'hf auth login' or set HF_TOKEN"
        )
    if is_a(errors.RevisionNotFoundError):
        return "has no such revision: check --revision"
    if is_a(errors.RepositoryNotFoundError) or "is not a local folder" in text:
        return "is neither a folder here nor a model on the Hub, or is private: check the name"
    if is_a(errors.HFValidationError):
        return "is neither a folder here nor a possible Hub id: check the path"
    if is_a(errors.LocalEntryNotFoundError) or is_a(errors.OfflineModeIsEnabled):
        return "is not in the local cache and the Hub cannot be reached: check name and network"
    if "trust_remote_code" in text:
        return "brings its own code: if you trust its authors, pass --trust_remote_code True"
    if isinstance(error, SafetensorError):
        return f"has a damaged weight file: {text}"
    if isinstance(error, ImportError):
        return f"needs a package that is not installed: {_sentence(text)}"
    if any(s in text for s in ("Unrecognized model", "not recognize this architecture")):
        return "has no config.json of a model type that this version of transformers knows"
    if "ignore_mismatched_sizes" in text:
        return "has weights of other shapes than its config.json says"
    if isinstance(error, json.JSONDecodeError):
        return f"has a configuration, tokenizer or processor file that is not JSON: {text}"
    if isinstance(error, errors.StrictDataclassError):
        return f"has a config.json that is not understood: {_sentence(text)}"
    # What the library tokenizers raises has no type of its own.
    if "instantiate the backend tokenizer" in text or type(error) is Exception:
        return f"has no tokenizer that can be read: {_sentence(text)}"
    if isinstance(error, OSError):
        return f"cannot be loaded: {_sentence(text)}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _sentence(text: str) -> str:
    """The first sentence, without full stop."""
    return text.split(". ")[0].rstrip(".")
