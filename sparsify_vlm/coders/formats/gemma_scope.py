"""Cross-layer transcoders of Gemma Scope 2.

`params_layer_{i}.safetensors` for each layer: `w_enc` [d, F], `b_enc` and `threshold` [F], `w_dec`
[F, L, d] with a slot for every layer of the model, `b_dec` [d] and, in the affine ones,
`affine_skip_connection` [d, d], applied as x @ A to the own layer. The activation is
relu(pre) · [pre > threshold]. x is the output of `pre_feedforward_layernorm`, y that of
`post_feedforward_layernorm`. Slots of earlier layers are zeros; what else they hold is dropped. To
notice it all of them are read, or, where blocks are read unchecked, those of SAMPLED latents, so
that half of the file need not be read. A `config.json` beside them, if there is one, names the
model and where x is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from sparsify_vlm.coders.config import CltConfig
from sparsify_vlm.coders.formats.checked import CheckedTensors, read_json
from sparsify_vlm.coders.formats.on_disk import Assembled, Segment, check_numbers, numbered_files
from sparsify_vlm.coders.formats.rows import Rows, any_non_zero, read_in_turn, read_rows
from sparsify_vlm.coders.formats.stored import BLOCK_BYTES
from sparsify_vlm.errors import UserError

DESCRIPTION = "Gemma Scope 2's params_layer_0.safetensors"
CONFIG, INPUT = "config.json", "pre_feedforward_layernorm.output"
NAME, PATTERN = "params_layer_{}.safetensors", r"params_layer_(\d+)\.safetensors"
SAMPLED = 16
SKIP = "affine_skip_connection"
KEYS = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec", SKIP)


def recognises(folder: Path) -> bool:
    """Whether `folder` holds a cross-layer transcoder of Gemma Scope 2."""
    return bool(numbered_files(folder, PATTERN))


class Stored(Assembled):
    """A file per layer."""

    format = "gemma-scope-2"

    def __init__(self, folder: Path) -> None:
        numbers = numbered_files(folder, PATTERN)
        first = CheckedTensors(folder / NAME.format(numbers[0]))
        d, F = _dimensions(first, "w_enc", 2)
        n_layers = _dimensions(first, "w_dec", 3)[1]
        check_numbers(folder, numbers, n_layers, NAME)
        cfg = CltConfig(
            d_model=d,
            hookpoints=[f"layers.{i}.mlp" for i in range(n_layers)],
            num_latents=F,
            n_targets=n_layers,
            activation="jumprelu",
            skip_connection=SKIP in first.keys,
            own_skip_only=True,
            expansion_factor=max(1, F // d),
            model=_model(folder / CONFIG),
        )
        super().__init__(folder, cfg)
        self.dtype = first.dtype("b_enc")
        self._files = [CheckedTensors(folder / NAME.format(i)) for i in range(n_layers)]
        for file in self._files:
            self._check(file)
        self._acausal: set[int] = set()

    def _check(self, file: CheckedTensors) -> None:
        cfg = self.cfg
        shapes = {
            "w_enc": (cfg.d_model, cfg.num_latents),
            "w_dec": (cfg.num_latents, cfg.n_layers, cfg.d_model),
            "b_dec": (cfg.d_model,),
            **dict.fromkeys(("b_enc", "threshold"), (cfg.num_latents,)),
        }
        if cfg.skip_connection:
            shapes[SKIP] = (cfg.d_model, cfg.d_model)
        elif SKIP in file.keys:
            raise UserError(f"{file.path}: tensor '{SKIP}' is in this layer, but not in layer 0")
        for key, shape in shapes.items():
            file.check(key, shape)
        self.note_unknown(file, KEYS)

    def _read(self, s: int, key: str, *shape: int) -> Tensor:
        return self._files[s].read(key, shape)

    def stored_encoder(self, s: int) -> Tensor:
        file, shape = self._files[s], (self.cfg.d_model, self.cfg.num_latents)
        return file.finite("w_enc", read_rows(file.rows("w_enc", shape))).T

    def encoder_bias(self, s: int) -> Tensor:
        return self._read(s, "b_enc", self.cfg.num_latents)

    def threshold(self, s: int) -> Tensor:
        return self._read(s, "threshold", self.cfg.num_latents)

    def stored_bias(self, t: int) -> Tensor:
        return self._read(t, "b_dec", self.cfg.d_model)

    def stored_skip(self, s: int, k: int) -> Tensor | None:
        if k > 0 or not self.cfg.skip_connection:
            return None
        return self._read(s, SKIP, self.cfg.d_model, self.cfg.d_model).T

    def decoder_segments(self, s: int) -> list[Segment]:
        return [Segment([self._slots(s).beginning(s)])]

    def _slots(self, s: int) -> Rows:
        shape = (self.cfg.num_latents, self.cfg.n_layers, self.cfg.d_model)
        return self._files[s].rows("w_dec", shape)

    def stored_blocks(self, s: int, max_bytes: int, check: bool) -> Iterator[tuple[int, Tensor]]:
        self._look_at_earlier_slots(s, every=check)
        yield from super().stored_blocks(s, max_bytes, check)

    def arrange(self, s: int, first: int, tables: Tensor) -> Tensor:
        return tables[0, :, -len(self.cfg.targets(s)) :]

    def _look_at_earlier_slots(self, s: int, every: bool) -> None:
        """Warn, once, if they are not all zeros, of every latent or of SAMPLED, evenly spaced."""
        if s == 0 or s in self._acausal:
            return
        slots = self._slots(s).until(s)
        step = max(1, slots.count // SAMPLED)
        pieces: Iterable[Sequence[Rows]] = ([slots.part(i, 1)] for i in range(0, slots.count, step))
        if every:
            pieces = Segment([slots]).pieces(BLOCK_BYTES)
        if any(any_non_zero(rows[0]) for rows in read_in_turn(pieces)):
            self._acausal.add(s)
            self.warnings.append(f"layer {s}: non-zero writes to earlier layers dropped")


def _model(path: Path) -> str | None:
    """The model's name from `config.json`; `UserError` if it says something else than is read."""
    if not path.is_file():
        return None
    values = read_json(path)
    kind, site = values.get("architecture", "jump_relu"), values.get("hf_hook_point_in", INPUT)
    if kind != "jump_relu" or not str(site).endswith(INPUT):
        fault = f"architecture '{kind}'" if kind != "jump_relu" else f"input at '{site}'"
        raise UserError(f"{path}: coders with {fault} cannot be read here")
    name = values.get("model_name")
    return name if isinstance(name, str) else None


def _dimensions(file: CheckedTensors, key: str, count: int) -> tuple[int, ...]:
    shape = file.shape(key)
    if len(shape) != count:
        raise UserError(f"{file.path}: tensor '{key}' has shape {list(shape)}, not {count} axes")
    return shape
