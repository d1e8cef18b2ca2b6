"""What to read: the options that every command taking a dataset shares."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify_vlm.errors import UserError

MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: a quarter of a gigabyte as 24-bit RGB."""

MOST_ROWS = 2**53
"""No dataset is longer, and every number up to here is a whole one in JSON."""


@dataclass
class DataConfig:
    """A dataset and how its rows become samples."""

    dataset: str | None = None
    """Dataset: `shapes`, a Hub id, or a local file or folder (json, jsonl, csv, parquet, arrow,
    a folder of images, save_to_disk). Default: shapes for the embedded models, The Cauldron's
    vqav2 for a VLM."""

    split: str = "train"
    """Split to read; a slice such as train[:1000] or train[10%:] is understood."""

    data_args: str = ""
    """Arguments for the dataset's constructor, as arg1=val1,arg2=val2: name=vqav2 for
    `load_dataset`, size=50000,seed=1 for shapes."""

    dataset_mix: str | None = None
    """YAML file naming several datasets with weights, read together instead of --dataset."""

    streaming: bool = False
    """Read a Hub dataset as a stream, without downloading it first."""

    ctx_len: int = 2048
    """Tokens per sample at most; text without images is packed into chunks of this length."""

    max_examples: int | None = None
    """Read at most this many rows (of plain text: chunks), taken after shuffling."""

    shuffle_seed: int = 42
    """Seed of the order in which rows are read; negative keeps the dataset's own order."""

    text_column: str | None = None
    """Column of plain text or captions. Default: recognised by its name."""

    image_column: str | None = None
    """Column of one image or a list of images. Default: recognised by its name."""

    question_column: str | None = None
    """Column of the question or instruction. Default: recognised by its name."""

    answer_column: str | None = None
    """Column of the answer or answers. Default: recognised by its name."""

    conversations_column: str | None = None
    """Column of whole conversations (LLaVA's, The Cauldron's or chat messages). Default:
    recognised by its name."""

    image_root: str | None = None
    """Folder that image paths in the rows are relative to. Default: where the dataset's file is."""

    skip_bad: bool = False
    """Skip rows that cannot be used (image missing, truncated, corrupt, too large; image tokens
    beyond --ctx_len) instead of stopping; they are counted and listed at the end."""

    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Images with more pixels than this are refused, before they are decoded."""

    data_preprocessing_num_proc: int = 1
    """Processes that tokenise plain text; as with upstream, their number moves the chunks."""

    def __post_init__(self) -> None:
        if self.dataset and self.dataset_mix:
            raise UserError("--dataset and --dataset_mix exclude each other; give one of them")
        for name in ("ctx_len", "max_image_pixels", "data_preprocessing_num_proc"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.max_examples is not None and not 1 <= self.max_examples <= MOST_ROWS:
            raise UserError(
                f"--max_examples {self.max_examples}: choose a number from 1 to {MOST_ROWS}"
            )
