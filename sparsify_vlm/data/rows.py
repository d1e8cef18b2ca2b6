"""From a dataset's row to a sample: the shapes of rows that people have, known by their columns.

| shape | columns | becomes |
|---|---|---|
| tokens | input_ids | the tokens |
| conversation | conversations or messages, with image(s) where there are any | its turns |
| The Cauldron | images, texts (a list of user/assistant pairs) | its turns, one after another |
| question | question, query, prompt or instruction; answer(s); image(s) | user, assistant |
| caption | image(s), text or caption | the image alone as the user's turn, text as the answer; a \
text with `<image>` in it is a whole prompt and is taken as it is |
| image | image(s) | the image alone as the user's turn |
| text | text | plain text, packed into chunks by `sources` |

One row is one sample, with all its turns: the image is then encoded once, as VLMs are trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsify_vlm.data.config import DataConfig
from sparsify_vlm.data.images import BadImage, BadSample, ImageRef, image_ref
from sparsify_vlm.errors import UserError

IMAGE_MARK = "<image>"
IMAGES = ("images", "image", "img", "image_path", "image_file", "file_name", "jpg", "png", "webp")
CONVERSATIONS = ("texts", "conversations", "conversation", "messages")
QUESTIONS = ("question", "query", "prompt", "instruction")
ANSWERS = ("multiple_choice_answer", "answer", "answers", "response", "output")
TEXTS = ("text", "caption", "captions", "content")
TYPES = ("type", "question_type")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `n_images` images stand before its text."""

    role: str
    """user, assistant or system."""
    text: str
    n_images: int = 0


@dataclass(frozen=True)
class Sample:
    """One sample, images undecoded."""

    id: str
    """`name#row`, the row counted from 0 in the dataset's own order; shapes has ids of its own."""
    turns: tuple[Turn, ...] = ()
    images: tuple[ImageRef, ...] = ()
    text: str | None = None
    """Text taken as it is, without a chat template."""
    input_ids: tuple[int, ...] | None = None
    """Text that is tokenised already; no images then."""
    kind: str = "chat"
    """chat or text."""
    type: str | None = None
    """The question's type, where the dataset has one."""

    @property
    def answer(self) -> str | None:
        """The last turn's text if it is the assistant's."""
        last = self.turns[-1] if self.turns else None
        return last.text if last is not None and last.role == "assistant" else None

    def without_answer(self) -> Sample:
        """The same sample up to the last answer."""
        return replace(self, turns=self.turns[:-1]) if self.answer is not None else self


@dataclass(frozen=True)
class Columns:
    """Which column is read as what; None where there is none."""

    shape: str
    """tokens, conversation, question, caption, image or text."""
    image: str | None = None
    conversations: str | None = None
    question: str | None = None
    answer: str | None = None
    text: str | None = None
    type: str | None = None


def recognise(columns: Collection[str], cfg: DataConfig, name: str) -> Columns:
    """Decide how the rows of the dataset `name` are read.

    Raises:
        UserError: a column named by a flag is missing, or no known shape fits.
    """

    def find(flag: str, known: tuple[str, ...]) -> str | None:
        asked: str | None = getattr(cfg, flag) if flag else None
        if asked is not None and asked not in columns:
            have = ", ".join(sorted(columns))
            raise UserError(f"--{flag} {asked}: {name} has no such column; it has {have}")
        return asked or next((column for column in known if column in columns), None)

    image = find("image_column", IMAGES)
    conversations = find("conversations_column", CONVERSATIONS)
    question = find("question_column", QUESTIONS)
    answer = find("answer_column", ANSWERS)
    text = find("text_column", TEXTS)
    shape = _shape(cfg, columns, bool(image), bool(conversations), bool(question), bool(answer))
    if shape is None:
        raise UserError(
            f"{name}: no known kind of row has the columns {', '.join(sorted(columns))}; name them "
            "with --image_column, --question_column, --answer_column, --conversations_column or "
            "--text_column"
        )
    if shape == "text" and image:
        shape = "caption"
    return Columns(shape, image, conversations, question, answer, text, find("", TYPES))


def _shape(
    cfg: DataConfig,
    columns: Collection[str],
    image: bool,
    conversations: bool,
    question: bool,
    answer: bool,
) -> str | None:
    """The first shape that fits: what flags name, then what the columns are called."""
    candidates = (
        ("conversation", cfg.conversations_column),
        ("question", cfg.question_column),
        ("text", cfg.text_column),
        ("tokens", "input_ids" in columns),
        ("conversation", conversations),
        ("question", question and (image or answer)),  # a text corpus may have a "prompt" column
        ("text", any(text in columns for text in TEXTS)),
        ("image", image),
        ("question", question),
    )
    return next((shape for shape, fits in candidates if fits), None)


def to_sample(row: Mapping[str, Any], columns: Columns, id: str, root: Path | None) -> Sample:
    """One row as a `Sample`. Raises `BadSample` if it does not fit what was recognised."""
    try:
        return _read(row, columns, id, root)
    except BadImage as error:
        raise BadSample(id, str(error)) from None
    except KeyError as error:
        raise BadSample(id, f"not a {columns.shape} row: it has no {error}") from None
    except (TypeError, ValueError, IndexError) as error:
        raise BadSample(id, f"not a {columns.shape} row: {error}") from None


def _read(row: Mapping[str, Any], columns: Columns, id: str, root: Path | None) -> Sample:
    kind = row.get(columns.type) if columns.type else None
    kind = kind if isinstance(kind, str) else None
    if columns.shape == "tokens":
        if not len(row["input_ids"]):
            raise ValueError("no tokens")
        return Sample(id, input_ids=tuple(map(int, row["input_ids"])), kind="text")
    if columns.shape == "text":
        return Sample(id, text=_string(row[columns.text or ""]), kind="text")
    images = _images(row, columns, root)
    if columns.shape == "conversation":
        turns = _conversation(row[columns.conversations or ""])
    elif columns.shape == "question":
        turns = _question(row, columns)
    else:
        if not images:
            raise BadImage(f"column {columns.image} holds no image")
        caption = _string(row[columns.text or ""]) if columns.shape == "caption" else ""
        if IMAGE_MARK in caption:
            return Sample(id, images=images, text=caption, kind="text", type=kind)
        turns = [Turn("user", ""), Turn("assistant", caption)][: 2 if caption else 1]
    return Sample(id, _place_images(turns, len(images)), images, type=kind)


def _images(row: Mapping[str, Any], columns: Columns, root: Path | None) -> tuple[ImageRef, ...]:
    value = row.get(columns.image) if columns.image else None
    if value is None or value == "":
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(image_ref(v, root, f"column {columns.image}") for v in values)


def _string(value: Any) -> str:
    """Text of a cell; of several captions the first."""
    if isinstance(value, list | tuple):
        value = value[0]
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _question(row: Mapping[str, Any], columns: Columns) -> list[Turn]:
    turns = [Turn("user", _string(row[columns.question or ""]))]
    answer = _answer(row.get(columns.answer)) if columns.answer else None
    return turns if answer is None else [*turns, Turn("assistant", answer)]


def _answer(value: Any) -> str | None:
    """The answer; of several (VQAv2 has ten) the most frequent, the earliest of equals."""
    if isinstance(value, Mapping):
        value = value["answer"] if "answer" in value else value["text"]
    if isinstance(value, list | tuple):
        given = [_answer(v) for v in value]
        value = Counter(given).most_common(1)[0][0] if given else None
    return None if value is None else str(value)


def _conversation(value: Any) -> list[Turn]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError("expected a list of turns, one at least")
    turns: list[Turn] = []
    for entry in value:
        if "user" in entry and "assistant" in entry:
            turns += [_turn(speaker, entry[speaker]) for speaker in ("user", "assistant")]
        elif "from" in entry:
            turns.append(_turn(entry["from"], entry["value"]))
        else:
            turns.append(_turn(entry["role"], entry["content"]))
    return turns


def _turn(speaker: str, content: Any) -> Turn:
    if speaker not in ROLES:
        raise ValueError(f"unknown speaker {speaker!r}; known are {', '.join(ROLES)}")
    if isinstance(content, list | tuple):  # chat messages in parts
        parts = [IMAGE_MARK if part["type"] == "image" else part["text"] for part in content]
        content = "\n".join(parts)
    if not isinstance(content, str):
        raise TypeError(f"expected text, found {type(content).__name__}")
    return Turn(ROLES[speaker], content)


def _place_images(turns: list[Turn], n_images: int) -> tuple[Turn, ...]:
    """Take the image markers out of the texts and count them; none at all: the first user turn.

    Raises `BadImage` when markers and images differ in number.
    """
    marks = [turn.text.count(IMAGE_MARK) if turn.role == "user" else 0 for turn in turns]
    if sum(marks) == 0 and n_images:
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise BadImage("has an image but no user turn to show it in")
        marks[first] = n_images
    if sum(marks) != n_images:
        raise BadImage(f"has {n_images} images but {sum(marks)} {IMAGE_MARK} marks in its text")
    return tuple(
        Turn(turn.role, turn.text.replace(IMAGE_MARK, "").strip(), n) if n else turn
        for turn, n in zip(turns, marks, strict=True)
    )
