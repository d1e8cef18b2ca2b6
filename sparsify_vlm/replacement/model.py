"""The replacement model: every MLP's write is the sum of what the coders write there.

In one forward call, layer after layer, on the stream as it has become:

1. the coder of layer l encodes x_l;
2. MLP l writes ŷ_l = b_l + Σ_{s writes to l} a_s W_{s→l} (+ skip) instead of y_l;
3. the latents of l are kept until the last layer they write to has been reached.

All writes stay at their token's position, so that in `generate` a step with a key-value cache needs
the new token only. Layers no coder writes to keep their MLP, and so do the tokens the coders were
not trained on (`ExcludedTokens`); nothing else of the original MLPs is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_vlm.coders import Clt, CltConfig, Latents, load_clt
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel, Stack, load_model
from sparsify_vlm.models.stack import InputSite
from sparsify_vlm.replacement.ablation import Ablation
from sparsify_vlm.replacement.excluded import ExcludedTokens
from sparsify_vlm.replacement.interventions import (
    Change,
    Intervened,
    Mode,
    intervene,
    steered,
)
from sparsify_vlm.replacement.local import LocalModel

Write = Callable[[int, Tensor], "Tensor | None"]
"""`write(layer, x) -> y_hat`, both [B, S, d]; layer counts the coder's hookpoints. None keeps the
layer's own MLP."""

Decode = Callable[[int, Sequence["Latents | None"], Any], "Tensor | None"]
"""`decode(target, latents by layer, x by layer) -> y_hat`; see `CrossLayerSums`."""


class VLMReplacementModel:
    """A model whose MLPs are replaced by a cross-layer transcoder (or per-layer coders).

        model = VLMReplacementModel.from_pretrained("tiny-llava", "checkpoints/t")
        model(**inputs).logits                            # inputs: the processor's batch
        model.generate(**inputs, max_new_tokens=8)
        with model.replaced(Ablation(cross=True)):        # everything run here, cross writes off
            model.loaded.forward(inputs)

    Attributes:
        loaded: the model; outside of the calls above it is as it was.
        clt: the coder.
        layers: the model's layer behind each of the coder's hookpoints.
        excluded: the tokens at which the model's own MLPs go on writing.
    """

    def __init__(
        self, loaded: LoadedModel, clt: Clt, excluded: ExcludedTokens | None = None
    ) -> None:
        """Raises `UserError` if the coder is not for this model (width, hookpoints)."""
        self.loaded, self.clt = loaded, clt
        self.layers = _model_layers(loaded.stack, clt.cfg)
        if excluded is None:
            excluded = ExcludedTokens.as_trained(clt.cfg.training, loaded.tokenizer)
        self.excluded = excluded

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: LoadedModel | str | None,
        clt_or_path: Clt | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **loading: Any,
    ) -> VLMReplacementModel:
        """Load what is given by name; a model None is the one the coder was trained on.

        `device`, `dtype` and `loading` (revision, token, trust_remote_code, load_in_8bit,
        load_in_4bit) are those of `load_model`. The coder keeps its own dtype. Raises `UserError`
        as both loaders do.
        """
        clt = clt_or_path if isinstance(clt_or_path, Clt) else load_clt(clt_or_path)
        if model_or_path is None:
            model_or_path = clt.cfg.model
        if model_or_path is None:
            raise UserError(f"{clt_or_path} does not say which model it is for: give --model")
        loaded = (
            load_model(model_or_path, device, dtype, **loading)
            if isinstance(model_or_path, str)
            else model_or_path
        )
        return cls(loaded, clt.to(loaded.device))

    @property
    def input_site(self) -> InputSite:
        """Where the coders read."""
        return self.clt.cfg.input_site  # type: ignore[return-value]

    # ---- running

    def __call__(self, ablate: Ablation | None = None, **inputs: Any) -> Any:
        """Same as `forward`."""
        return self.forward(ablate, **inputs)

    def forward(self, ablate: Ablation | None = None, **inputs: Any) -> Any:
        """The model's output for a processor's whole batch, logits [B, S, V]; no gradients."""
        with self.replaced(ablate):
            return self.loaded.forward(inputs, logits=True)

    def generate(self, ablate: Ablation | None = None, **inputs: Any) -> Tensor:
        """transformers' `generate` on the replaced model: inputs and its options, token ids out."""
        self.loaded.stack.layout.check(inputs)
        with torch.no_grad(), self.replaced(ablate):
            ids: Tensor = self.loaded.model.generate(**self.loaded.to_device(inputs))
        return ids

    @contextmanager
    def replaced(self, ablate: Ablation | None = None, *, training: bool = False) -> Iterator[None]:
        """Context in which `loaded` is the replacement model, without what `ablate` names.

        Gradients flow if they are on; `training` activates latents as in training. Raises
        `UserError` if `ablate` names layers there are not.
        """
        ablate = ablate or Ablation()
        ablate.check(self.clt.cfg)
        sums = CrossLayerSums(self.clt, _ablated(self.clt, ablate), training)
        with self.writing(sums.write):
            yield

    # ---- tracing

    def attribute(self, inputs: Mapping[str, Any] | LocalModel, **options: Any) -> Any:
        """The `AttributionGraph` of one prompt; the same as `sparsify_vlm.attribute`."""
        import sparsify_vlm

        return sparsify_vlm.attribute(self, inputs, **options)

    def intervene(
        self,
        inputs: Mapping[str, Any] | LocalModel,
        interventions: Sequence[Change],
        mode: Mode = "constrained",
    ) -> Intervened:
        """Run one prompt with features set to values, the stream steered or image patches
        exchanged; nothing of the model is replaced.

            out = model.intervene(inputs, [Intervention(layer, position, latent, 0.0)], "free")
            out = model.intervene(inputs, [PatchIntervention([(2, 3)], by="mean")], "free")
            out.logits, out.features(graph.active_features)

        `inputs` may be the prompt's `LocalModel`, which saves making it again for many runs. Modes
        are explained in `interventions.py`. Raises `UserError` for what does not exist.
        """
        return intervene(self, inputs, interventions, mode)

    @contextmanager
    def intervening(self, interventions: Sequence[Change]) -> Iterator[None]:
        """Context in which `loaded` runs and generates with changes, otherwise free.

        with model.intervening([Intervention(6, None, 1234, 8.0)]):
            model.loaded.model.generate(**inputs)
        with model.intervening([SteeringVector.from_feature(model, 6, 1234, value=8.0)]):
            model.loaded.model.generate(**inputs)

        One prompt at a time, without padding. Raises `UserError` for what does not exist.
        """
        with steered(self, interventions):
            yield

    @contextmanager
    def writing(self, write: Write) -> Iterator[None]:
        """Context in which `write` says what each MLP writes, but for excluded tokens.

        The building block of `replaced`, for interventions and baselines.
        """
        positions = {layer: i for i, layer in enumerate(self.layers)}
        kept: list[Tensor | None] = [None]

        def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[0] = self.excluded.in_forward(args, kwargs)

        handle = self.loaded.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with self.loaded.stack.replacing(
                lambda layer, x: write(positions[layer], x),
                self.input_site,
                self.layers,
                lambda: kept[0],
            ):
                yield
        finally:
            handle.remove()


def _ablated(clt: Clt, ablate: Ablation) -> Decode:
    offset = clt.cfg.target_offset

    def decode(t: int, latents: Sequence[Latents | None], x: Any) -> Tensor | None:
        if t in ablate.layers:
            return None
        return clt.decode_target(t, latents, x, keep=lambda s: ablate.keeps(s, t, offset))

    return decode


class CrossLayerSums:
    """ŷ of each layer in turn; holds the latents of the layers below in the same forward call.

    `decode(t, latents, x)` makes ŷ_t [T, d] of the latents and x [T, d] of the layers that write to
    t; None keeps the layer's own MLP. x is there for coders with a skip connection only.
    """

    def __init__(self, clt: Clt, decode: Decode, training: bool = False) -> None:
        self.clt, self.cfg, self.decode = clt, clt.cfg, decode
        self.training = training
        self._latents: list[Latents | None] = [None] * self.cfg.n_layers
        self._x: list[Tensor | None] = [None] * self.cfg.n_layers

    def write(self, layer: int, x: Tensor) -> Tensor | None:
        """ŷ of `layer` for its x [B, S, d]; None where the layer keeps its MLP."""
        if layer in self.cfg.source_layers():
            rows = x.flatten(0, 1).to(self.clt.device)
            self._latents[layer] = self.clt.encode_layer(layer, rows, training=self.training)
            if self.clt.W_skip is not None:
                self._x[layer] = rows
        if layer not in self.cfg.target_layers():
            return None
        y_hat = self.decode(layer, self._latents, self._x)
        self._forget(layer)
        return None if y_hat is None else y_hat.view(x.shape).to(x.device)

    def _forget(self, reached: int) -> None:
        for source in self.cfg.source_layers():
            if self.cfg.targets(source)[-1] <= reached:
                self._latents[source] = self._x[source] = None


def _model_layers(stack: Stack, cfg: CltConfig) -> list[int]:
    """The model's layer for each of the coder's hookpoints."""
    if cfg.d_model != stack.d_model:
        raise UserError(
            f"the coder is {cfg.d_model} wide, {stack.model_name} is {stack.d_model}: it was "
            f"trained on {cfg.model or 'another model'}"
        )
    layers = []
    for name in cfg.hookpoints:
        found = stack.match([name])
        if len(found) > 1:
            raise UserError(f"the coder's hookpoint '{name}' stands for {len(found)} MLPs here")
        layers += found
    if layers != sorted(set(layers)):
        raise UserError(
            f"the coder's hookpoints are not in the order of {stack.model_name}'s layers"
        )
    return layers
