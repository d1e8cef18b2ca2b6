"""`examples`: the samples in which features are strongest, with the words and patches that show it.

    batches → one run of the model each → coders of the layers that are wanted → for every sample
    and feature its largest activation → the strongest samples of each feature, so far

Held are the examples that are kept, their pictures made small, and one batch; whatever the size of
the dataset. A sample counts once for a feature. Written are `examples.json`, which the viewer and
`trace --examples` read (docs/viewer.md has its fields), and the pictures beside it.
"""

from __future__ import annotations

import io
import json
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_vlm.coders import load_clt
from sparsify_vlm.data.batching import batches, prefetched
from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.encoding import decode_images, encode_decoded
from sparsify_vlm.data.pictures import as_seen
from sparsify_vlm.data.sources import open_samples
from sparsify_vlm.errors import UserError
from sparsify_vlm.features.wanted import Feature, wanted_features
from sparsify_vlm.files import write_atomically, write_json
from sparsify_vlm.models import Role, TokenTable, record_tokens
from sparsify_vlm.progress import Progress
from sparsify_vlm.replacement.loading import load_replacement

if TYPE_CHECKING:
    from sparsify_vlm.data import EncodedBatch
    from sparsify_vlm.data.rows import Sample
    from sparsify_vlm.features.config import ExamplesConfig
    from sparsify_vlm.models import LoadedModel
    from sparsify_vlm.replacement import VLMReplacementModel

FORMAT, VERSION = "sparsify-vlm examples", 1
FILE = "examples.json"
Picture = tuple[int, int]
"""Number of a sample, and of one of its pictures."""


def examples(cfg: ExamplesConfig, model: VLMReplacementModel | None = None) -> Path:
    """Write the strongest examples of features; returns the path of `examples.json`.

    `model` takes the place of loading the coder and its model. Raises `UserError` for whatever of
    `cfg` cannot be used.
    """
    folder = Path(cfg.output_dir or cfg.graph or "")
    _check_folder(folder)
    model = model or load_replacement(cfg, load_clt(cfg.clt), cfg.clt)
    wanted = wanted_features(cfg, model)
    data = DataConfig(**{f.name: getattr(cfg, f.name) for f in fields(DataConfig)})
    source = open_samples(data, model.loaded)
    best = Strongest(model, wanted, cfg)
    encoded = prefetched(batches(source, model.loaded, cfg.batch_size, cfg.ctx_len))
    progress = Progress("Looking for examples", source.size, unit="samples")
    with progress, closing(encoded):
        for batch in encoded:
            best.add(batch)
            progress.update(len(batch))
    for reason in source.bad:
        print(f"  skipped {reason}")
    return _write(folder, best)


# ---- what is kept


@dataclass(order=True)
class Example:
    """One sample of one feature; the strongest come first, of equals the earliest."""

    rank: tuple[float, int]
    """Minus the activation, and the sample's number."""
    picture: Picture | None = field(compare=False)
    shown: dict[str, Any] = field(compare=False)
    """Its fields in the file, but for the picture's name."""


class Strongest:
    """The strongest examples of some features over a stream of batches.

    Attributes:
        kept: examples of each feature, the strongest first.
        pictures: PNGs of those that an example shows.
    """

    def __init__(
        self, model: VLMReplacementModel, wanted: list[Feature], cfg: ExamplesConfig
    ) -> None:
        self.model, self.cfg = model, cfg
        self.kept: dict[Feature, list[Example]] = {feature: [] for feature in wanted}
        self.pictures: dict[Picture, bytes] = {}
        self._uses: Counter[Picture] = Counter()
        self._seen = 0
        self._slots = {
            layer: _slots([index for at, index in wanted if at == layer], model)
            for layer in sorted({layer for layer, _ in wanted})
        }
        n_latents = model.clt.cfg.num_latents
        self._least = {layer: torch.zeros(n_latents) for layer in self._slots}
        """The weakest that is kept of each latent, where there is no more room."""

    @torch.no_grad()
    def add(self, batch: EncodedBatch) -> None:
        """Look at a batch."""
        if not len(batch):
            return
        model, clt = self.model, self.model.clt
        site, layers = model.input_site, list(self._slots)
        table = record_tokens(model.loaded, batch.inputs, site, layers)
        rows = _Rows(model.loaded, batch, table, self._seen)
        counted = ~model.excluded.of(table.input_ids.long(), table.position)
        for x, layer in zip(table.x, layers, strict=True):
            latents = clt.encode_layer(model.layers.index(layer), x[counted].to(clt.device))
            tokens = counted.nonzero()[:, 0][:, None].expand_as(latents.values).cpu()
            values, indices = latents.values.float().cpu(), latents.indices.cpu()
            here = (self._slots[layer][indices]) & (values > 0)
            self._offer(layer, rows, tokens[here], indices[here], values[here])
        self._seen += len(batch)

    def _offer(
        self, layer: int, rows: _Rows, tokens: Tensor, indices: Tensor, values: Tensor
    ) -> None:
        """Activations [n] of a layer's features at tokens of a batch, in any order."""
        least = self._least[layer]
        for index, token, value in _by_feature_and_sample(rows, tokens, indices, values, least):
            kept = self.kept[(layer, index)]
            peak = int(value.argmax())
            rank = (-float(value[peak]), rows.number(int(token[peak])))
            if len(kept) == self.cfg.top and kept[-1].rank < rank:
                continue
            picture, shown = rows.example(token, value, self.cfg)
            if picture is not None:
                self._use(picture, rows)
            insort(kept, Example(rank, picture, shown))
            if len(kept) > self.cfg.top and (gone := kept.pop().picture) is not None:
                self._uses[gone] -= 1
                if not self._uses[gone]:
                    del self.pictures[gone], self._uses[gone]
            if len(kept) == self.cfg.top:
                least[index] = -kept[-1].rank[0]

    def _use(self, picture: Picture, rows: _Rows) -> None:
        self._uses[picture] += 1
        if picture not in self.pictures:
            self.pictures[picture] = rows.png(picture, self.cfg)


def _slots(indices: list[int], model: VLMReplacementModel) -> Tensor:
    """bool [F]: which latents of a layer are looked at."""
    wanted = torch.zeros(model.clt.cfg.num_latents, dtype=torch.bool)
    wanted[torch.tensor(indices)] = True
    return wanted


def _by_feature_and_sample(
    rows: _Rows, tokens: Tensor, indices: Tensor, values: Tensor, least: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, tokens, values) of every latent and sample, tokens ascending, where the latent is
    somewhere stronger than its `least` [F]."""
    if not len(tokens):
        return
    samples = rows.sample[tokens]
    key = (indices * (len(rows.batch) + 1) + samples) * (len(rows.sample) + 1) + tokens
    order = key.argsort()
    tokens, indices, values, samples = (one[order] for one in (tokens, indices, values, samples))
    both = torch.stack([indices, samples])
    _, counts = both.unique_consecutive(dim=1, return_counts=True)
    ends = counts.cumsum(0)
    peaks = torch.segment_reduce(values, "max", lengths=counts)
    strong = (peaks > least[indices[ends - 1]]).nonzero()[:, 0]
    for start, end in zip((ends - counts)[strong].tolist(), ends[strong].tolist(), strict=True):
        yield int(indices[start]), tokens[start:end], values[start:end]


class _Rows:
    """The tokens of a batch, by their row in its table."""

    def __init__(
        self, loaded: LoadedModel, batch: EncodedBatch, table: TokenTable, first: int
    ) -> None:
        self.loaded, self.batch, self._first = loaded, batch, first
        self.sample, self.role = table.sample.long().cpu(), table.role.cpu()
        self.patch, self.ids = table.patch.long().cpu(), table.input_ids.cpu()
        inputs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
        present = loaded.stack.roles(inputs) != Role.PAD
        self.image = loaded.stack.images(inputs)[present].long()

    def number(self, token: int) -> int:
        """The sample's number in the dataset's order."""
        return self._first + int(self.sample[token])

    def example(
        self, tokens: Tensor, values: Tensor, cfg: ExamplesConfig
    ) -> tuple[Picture | None, dict[str, Any]]:
        """What is shown of one sample of a feature that is active at `tokens`."""
        peak = int(tokens[int(values.argmax())])
        activation = torch.zeros(len(self.ids)).index_put_((tokens,), values)
        shown: dict[str, Any] = {"activation": _short(float(values.max()))}
        mine = self.sample == self.sample[peak]
        if self.role[peak] != Role.IMAGE:
            window = self._around(peak, mine, cfg.context)
            shown["tokens"] = [self.loaded.tokenizer.decode([int(self.ids[i])]) for i in window]
            shown["values"] = [_short(float(activation[i])) for i in window]
        if not bool((self.image[mine] >= 0).any()):
            return None, shown
        image = max(int(self.image[peak]), 0)
        patches = self._patches(mine & (self.image == image), activation)
        if patches is not None and (self.role[peak] == Role.IMAGE or bool(patches.any())):
            shown["patches"] = [[_short(value) for value in row] for row in patches.tolist()]
        return (self.number(peak), image), shown

    def _around(self, peak: int, mine: Tensor, context: int) -> list[int]:
        """Rows of the words around one, image tokens left out."""
        words = (mine & (self.role != Role.IMAGE)).nonzero()[:, 0].tolist()
        start = max(0, words.index(peak) - 2 * context // 3)
        return words[start : start + context]

    def _patches(self, tokens: Tensor, activation: Tensor) -> Tensor | None:
        """Activations [rows, columns] of one picture; None where its tokens have no places."""
        placed = (tokens & (self.patch[:, 0] >= 0)).nonzero()[:, 0]
        if not len(placed):
            return None
        places = self.patch[placed]
        table = torch.zeros((places.amax(0) + 1).tolist())
        return table.index_put_((places[:, 0], places[:, 1]), activation[placed], accumulate=True)

    def png(self, picture: Picture, cfg: ExamplesConfig) -> bytes:
        """A picture as the patch grid lies on it, made small."""
        sample: Sample = self.batch.samples[picture[0] - self._first]
        images = decode_images(self.loaded, sample, cfg.max_image_pixels)
        alone = encode_decoded(self.loaded, [sample], [images], cfg.ctx_len)
        image = (as_seen(self.loaded, alone.inputs, images) or images)[picture[1]].copy()
        image.thumbnail((cfg.picture_size, cfg.picture_size))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


def _short(value: float) -> float:
    """Four digits are enough to look at."""
    return float(f"{value:.4g}")


# ---- files


def _check_folder(folder: Path) -> None:
    """Refuse folders that hold neither examples nor a graph."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / "graph-metadata.json").is_file() and not (folder / FILE).exists():
        return
    if _old(folder) is None:
        raise UserError(f"--output_dir {folder} holds something else: give another folder")


def _old(folder: Path) -> dict[str, Any] | None:
    """The examples that a folder holds; None where it has none of ours."""
    try:
        value = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and value.get("format") == FORMAT else None


def _picture_name(picture: Picture) -> str:
    return f"example-{picture[0]}-{picture[1]}.png"


def _write(folder: Path, best: Strongest) -> Path:
    found = {feature: kept for feature, kept in best.kept.items() if kept}
    if not found:
        raise UserError("none of the features is active on these samples: nothing to show")
    for picture, png in best.pictures.items():
        write_atomically(folder / _picture_name(picture), lambda path, b=png: path.write_bytes(b))  # type: ignore[misc]
    features = {
        f"{layer}_{index}": [
            example.shown
            | ({} if example.picture is None else {"image": _picture_name(example.picture)})
            for example in kept
        ]
        for (layer, index), kept in sorted(found.items())
    }
    was = _old(folder) or {}
    write_json(folder / FILE, {"format": FORMAT, "version": VERSION, "features": features})
    _forget(folder, was, {_picture_name(picture) for picture in best.pictures})
    silent = len(best.kept) - len(found)
    more = f"; {silent} were not active" if silent else ""
    print(
        f"{folder / FILE}: examples of {len(found)} features, {len(best.pictures)} pictures{more}"
    )
    return folder / FILE


def _forget(folder: Path, was: dict[str, Any], needed: set[str]) -> None:
    """Remove the pictures of the examples that stood here before."""
    named = {one.get("image") for ones in was.get("features", {}).values() for one in ones}
    for name in named - needed - {None}:
        if name == Path(name).name and name.startswith("example-"):
            (folder / name).unlink(missing_ok=True)
