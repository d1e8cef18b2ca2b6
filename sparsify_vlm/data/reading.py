"""From a dataset's name to its rows: shapes, local files and folders, the Hub, streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.local import (
    JSON_SUFFIXES,
    METADATA,
    Rows,
    parse_split,
    read_image_folder,
    read_json,
    read_metadata,
    slice_rows,
)
from sparsify_vlm.errors import UserError
from sparsify_vlm.hub import offline_if_unreachable

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sparsify_vlm.models import LoadedModel

SHAPES = "shapes"
VLM_DATASET, VLM_DATA_ARGS = "HuggingFaceM4/the_cauldron", "name=vqav2"
TEXT_DATASET = "EleutherAI/SmolLM2-135M-10B"
"""Upstream's own default."""
SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled."""
TABLES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}


class Stream:
    """Rows of a streamed dataset, in the same order at every iteration."""

    own_ids = False

    def __init__(
        self,
        name: str,
        dataset: IterableDataset,
        columns: list[str],
        root: Path | None,
        identity: str,
    ) -> None:
        self.name, self.dataset, self.columns = name, dataset, columns
        self.root, self.identity = root, identity

    def __iter__(self) -> Iterator[dict[str, Any]]:
        read = 0
        try:
            for row in self.dataset:
                yield row
                read += 1
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"dataset {self.name}: the stream broke off after {read} rows: {_line(error)}"
            ) from None


class TableRows(Rows):
    """Rows of a `datasets.Dataset`, images left undecoded."""

    def __init__(self, name: str, dataset: Dataset, root: Path | None, identity: str) -> None:
        super().__init__(name, list(dataset.column_names), root, identity)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.dataset[index]
        return row


class ShapesRows(Rows):
    """The embedded scenes; generated in random order, so that they are not shuffled again."""

    shuffled = True
    own_ids = True

    def __init__(self, split: str, text_only: bool, arguments: dict[str, Any]) -> None:
        from sparsify_vlm.data.shapes import ShapesDataset

        arguments = {"text_only": text_only} | arguments
        try:
            self.dataset = ShapesDataset(split, **arguments)
            usable = len(self.dataset) >= 0 and index(self.dataset.seed) >= 0
        except (TypeError, OverflowError):
            usable = False
        if not usable:
            given = [f"{n}={value}" for n, value in arguments.items() if n != "text_only"]
            raise UserError(
                "--data_args for shapes knows size and seed, whole numbers from 0 on, and nothing "
                f"like {','.join(given)}"
            )
        columns = ["question", "answer", "type", "id"]
        columns += [] if arguments["text_only"] else ["image"]
        super().__init__(SHAPES, columns, None, f"shapes 1 {split} {sorted(arguments.items())}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def open_rows(cfg: DataConfig, loaded: LoadedModel) -> Rows | Stream:
    """The rows of `cfg.dataset`, or of the model's default dataset. Raises `UserError`."""
    dataset, arguments = cfg.dataset, _arguments(cfg.data_args)
    if dataset is None:
        dataset, defaults = default_dataset(loaded)
        arguments = _arguments(defaults) | arguments
    if dataset == SHAPES:
        return _shapes(cfg, loaded, arguments)
    path = Path(dataset).expanduser()
    if path.exists():
        rows = open_local(path, cfg, arguments)
    elif path.suffix in (*JSON_SUFFIXES, *TABLES, ".bin") or dataset.startswith((".", "/", "~")):
        raise UserError(f"dataset {dataset}: there is no such file or folder")
    else:
        rows = _load(dataset, dataset, cfg, arguments, None)
    if cfg.image_root is not None:
        rows.root = Path(cfg.image_root).expanduser()
        if not rows.root.is_dir():
            raise UserError(f"--image_root {cfg.image_root}: there is no such folder")
    return rows


def default_dataset(loaded: LoadedModel) -> tuple[str, str]:
    """Dataset and data_args for a model without a dataset."""
    if Path(loaded.name).name in ("tiny-llava", "tiny-llama"):
        return SHAPES, ""
    return (VLM_DATASET, VLM_DATA_ARGS) if loaded.is_vlm else (TEXT_DATASET, "")


def _arguments(text: str) -> dict[str, Any]:
    """ "name=vqav2,size=100" as a dict, with YAML's notion of numbers and booleans."""
    import yaml

    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    try:
        if all(name.strip() and equals for name, equals, _ in pairs):
            return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}
    except yaml.YAMLError:
        pass  # told below
    raise UserError(f"--data_args {text}: write it as arg1=val1,arg2=val2")


def _shapes(cfg: DataConfig, loaded: LoadedModel, arguments: dict[str, Any]) -> Rows:
    split = parse_split(cfg.split)[0]
    if cfg.max_examples is not None:
        arguments = {"size": cfg.max_examples} | arguments
    return slice_rows(ShapesRows(split, not loaded.is_vlm, arguments), cfg.split)


def open_local(path: Path, cfg: DataConfig, arguments: dict[str, Any]) -> Rows | Stream:
    """Rows of a local file or folder. Raises `UserError`."""
    if path.is_file():
        return _local_file(path, cfg, arguments)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(path, cfg)
    name, *_ = parse_split(cfg.split)
    part = path / name if (path / name).is_dir() else path
    for metadata in METADATA:
        if (part / metadata).exists():
            return slice_rows(read_metadata(part / metadata), cfg.split)
    files = [p for p in sorted(part.rglob("*")) if p.is_file()]
    tables = {p.suffix for p in files} & (TABLES.keys() - {".txt"})
    json_files = [p for p in files if p.suffix in JSON_SUFFIXES]
    if tables or len(json_files) > 1:
        return _load(str(path.resolve()), path.name, cfg, arguments, path)
    if json_files:
        return _own(read_json(json_files[0]), cfg)
    images = read_image_folder(part)
    if images is None:
        raise UserError(
            f"{path} holds no dataset: no parquet, arrow, csv, json or image files, and it was not "
            "written by save_to_disk"
        )
    return slice_rows(images, cfg.split)


def _own(rows: Rows, cfg: DataConfig) -> Rows:
    """A single file is the split `train`; a slice of it may be asked for."""
    name = parse_split(cfg.split)[0]
    if name != "train":
        raise UserError(
            f"{rows.name} is one file and has only the split train, not {name}: give --split train"
        )
    return slice_rows(rows, cfg.split)


def _local_file(path: Path, cfg: DataConfig, arguments: dict[str, Any]) -> Rows | Stream:
    if path.suffix in JSON_SUFFIXES:
        return _own(read_json(path), cfg)
    if path.suffix == ".bin":
        from sparsify_vlm.data.text import TokenFileRows

        return _own(TokenFileRows(path, cfg.ctx_len), cfg)
    if path.suffix not in TABLES:
        known = ", ".join([*JSON_SUFFIXES, *TABLES, ".bin"])
        raise UserError(f"dataset {path}: unknown kind of file; known are {known}")
    arguments = {"data_files": {"train": str(path)}} | arguments
    if path.suffix == ".tsv":
        arguments = {"sep": "\t"} | arguments
    return _load(TABLES[path.suffix], path.name, cfg, arguments, path.parent)


def _saved(path: Path, cfg: DataConfig) -> Rows:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {path} cannot be read: {_line(error)}") from None
    if isinstance(found, Dataset):
        return _own(_table(path.name, found, path, cfg), cfg)
    name = parse_split(cfg.split)[0]
    if name not in found:
        raise UserError(f"{path} has the splits {', '.join(found)}; there is no {name}")
    return slice_rows(_table(path.name, found[name], path, cfg), cfg.split)


def _load(
    source: str, name: str, cfg: DataConfig, arguments: dict[str, Any], root: Path | None
) -> Rows | Stream:
    """`datasets.load_dataset`, every failure as one line."""
    offline_if_unreachable()
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
            found = load_dataset(source, split=cfg.split, streaming=cfg.streaming, **arguments)
    # What load_dataset raises for a missing, gated, offline, damaged or misnamed dataset:
    # OSError (DatasetNotFoundError, ConnectionError, Hub errors), ValueError (splits, configs) and
    # DatasetsError, whose cause says more.
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) else None
        raise UserError(_cannot_load(name, cfg, cause or error)) from None
    if cfg.streaming:
        return _stream(name, found, root, cfg)
    return _table(name, found, root, cfg)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without `datasets`' log of an error that is about to be told in one line."""
    from datasets import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _cannot_load(name: str, cfg: DataConfig, error: BaseException) -> str:
    from datasets.exceptions import DatasetNotFoundError

    reason = _line(error)
    if isinstance(error, ConnectionError | DatasetNotFoundError):
        return (
            f"dataset {name} cannot be had ({reason}); check its name and the connection, "
            "or give a local file or folder, or the embedded dataset: shapes"
        )
    if "split" in reason.lower():
        return f"dataset {name}, --split {cfg.split}: {reason}"
    return f"dataset {name} cannot be read: {reason}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _undecoded(dataset: Any) -> Any:
    """The same dataset with every image column, lists of images too, as {bytes, path}."""
    from datasets import Image

    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(column, type(feature)(Image(decode=False)))
    return dataset


def _table(name: str, dataset: Dataset, root: Path | None, cfg: DataConfig) -> TableRows:
    dataset = _undecoded(dataset).with_format(None)
    return TableRows(name, dataset, root, _identity(name, dataset, cfg))


def _identity(name: str, dataset: Dataset, cfg: DataConfig) -> str:
    """Of its size, columns, first and last row: cheap, and the same after another download."""
    probe = [dataset[0], dataset[len(dataset) - 1]] if len(dataset) else []
    digest = hashlib.sha256(repr(probe).encode()).hexdigest()
    columns = " ".join(dataset.column_names)
    return f"{name} {cfg.data_args} {cfg.split} {len(dataset)} {columns} {digest}"


def _stream(name: str, dataset: IterableDataset, root: Path | None, cfg: DataConfig) -> Stream:
    import datasets

    dataset = _undecoded(dataset)
    if cfg.shuffle_seed >= 0:
        dataset = dataset.shuffle(seed=cfg.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    # Which order a seed gives a stream is up to the version of `datasets`.
    identity = f"{name} {cfg.data_args} {cfg.split} datasets {datasets.__version__}"
    stream = Stream(name, dataset, list(dataset.column_names or []), root, identity)
    if not stream.columns:
        stream.columns = list(next(iter(stream), {}))
    return stream
