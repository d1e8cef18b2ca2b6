"""The embedded pair as shipped, loaded as any Hub model is, asked through its own chat template."""

from __future__ import annotations

import stat
from collections import Counter, defaultdict

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from sparsify_vlm.data.shapes import QUESTION_TYPES, ShapesDataset, cell_patches
from sparsify_vlm.models.load import CHECKPOINTS

N = 400  # held-out questions, 100 of each type


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llava():
    folder = CHECKPOINTS / "tiny-llava"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="module")
def llama():
    folder = CHECKPOINTS / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _prompt(chat, question: str, image: bool) -> str:
    parts = [{"type": "image"}] * image + [{"type": "text", "text": question}]
    return chat.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )


def _answers(model, tokenizer, inputs) -> list[str]:
    """Greedy answers; one that does not end within 4 tokens keeps them all."""
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def _see(llava, questions: list[str], images: list) -> list[str]:
    model, processor = llava
    texts = [_prompt(processor, question, image=True) for question in questions]
    inputs = processor(
        text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"
    )
    return _answers(model, processor.tokenizer, inputs)


def _accuracy(rows: list[dict], answers: list[str]) -> dict[str, float]:
    right = Counter(r["type"] for r, a in zip(rows, answers, strict=True) if r["answer"] == a)
    asked = Counter(row["type"] for row in rows)
    return {kind: right[kind] / asked[kind] for kind in QUESTION_TYPES}


@pytest.fixture(scope="module")
def rows():
    return list(ShapesDataset("heldout", N, seed=11))


def test_tiny_llava_answers_from_the_image(llava, rows):
    found = _see(llava, [r["question"] for r in rows], [r["image"] for r in rows])
    assert all(share >= 0.95 for share in _accuracy(rows, found).values()), found


def _question_prior() -> dict[str, float]:
    """The share right of the commonest answer to each wording, by question type."""
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in ShapesDataset("heldout", 6000, seed=14, text_only=True):
        wording = row["question"].rsplit(". ", 1)[1]
        answers[row["type"], wording][row["answer"]] += 1
    best = Counter[str]()
    for (kind, _), counts in answers.items():
        best[kind] += max(counts.values())
    return {kind: best[kind] / (6000 / len(QUESTION_TYPES)) for kind in QUESTION_TYPES}


def test_with_another_image_only_the_prior_is_left(llava, rows):
    # The next row of the same type, so that its image is as likely to admit the question.
    other = [rows[(i + 4) % N]["image"] for i in range(N)]
    found = _accuracy(rows, _see(llava, [r["question"] for r in rows], other))
    for kind, prior in _question_prior().items():
        # Three standard errors of 100 questions above what the question alone allows.
        assert found[kind] <= prior + 3 * (prior * (1 - prior) / 100) ** 0.5, (kind, prior, found)
        assert prior < 0.65


def test_tiny_llama_answers_from_the_words(llama):
    model, tokenizer = llama
    told = list(ShapesDataset("heldout", N, seed=12, text_only=True))
    texts = [_prompt(tokenizer, row["question"], image=False) for row in told]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    found = _accuracy(told, _answers(model, tokenizer, inputs))
    assert all(share >= 0.95 for share in found.values()), found


def test_prompts_are_those_of_llava_15(llava, llama):
    _, processor = llava
    turn = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    ask = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "what colour is the circle?"}],
    }
    said = processor.apply_chat_template([ask, turn], tokenize=False)
    assert said == "USER: <image>\nwhat colour is the circle? ASSISTANT: red</s>"
    image = ShapesDataset("train", 1)[0]["image"]
    ids = processor(text=said, images=image, return_tensors="pt")["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words[:3] == ["<s>", "USER:", "<image>"]
    assert words.count("<image>") == 36
    assert " ".join(words[38:]) == "\n what colour is the circle ? ASSISTANT: red </s>"
    _, tokenizer = llama
    told = _prompt(tokenizer, "there is a red circle at the top left. what …?", image=False)
    assert told == "USER: there is a red circle at the top left. what …? ASSISTANT:"


def test_words_survive_the_tokenizer(llava):
    tokenizer = llava[1].tokenizer
    for row in ShapesDataset("train", 200, text_only=True):
        ids = tokenizer(row["question"])["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["question"]


def test_the_pair_is_transformers_own_and_of_one_shape(llava, llama):
    assert isinstance(llava[0], LlavaForConditionalGeneration)
    assert isinstance(llama[0], LlamaForCausalLM)
    seeing, telling = llava[0].config.get_text_config(), llama[0].config
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        assert getattr(seeing, name) == getattr(telling, name)
    assert (telling.num_hidden_layers, telling.hidden_size) == (8, 96)


def test_the_folders_are_small_and_readable_by_all():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 for path in files)
    assert not {p.suffix for p in files} - {".json", ".jinja", ".safetensors"}


def test_an_answer_hangs_on_the_cell_of_the_asked_object(llava):
    """Replacing a cell's image tokens by the mean image token hurts most where the object is."""
    model, processor = llava
    data = ShapesDataset("heldout", 80, seed=13, types=("colour", "shape"))
    rows = list(data)
    texts = [_prompt(processor, row["question"], image=True) for row in rows]
    batch = processor(
        text=texts,
        images=[row["image"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    answer = processor.tokenizer([r["answer"] for r in rows], add_special_tokens=False)
    answer_ids = torch.tensor(answer["input_ids"])
    is_image = batch["input_ids"] == model.config.image_token_id
    scores = []
    with torch.no_grad():
        features = torch.stack(
            list(model.model.get_image_features(batch["pixel_values"]).pooler_output)
        )
        mean = features.mean((0, 1))
        for cell in range(9):
            blanked = features.clone()
            blanked[:, [r * 6 + c for r, c in cell_patches(cell)]] = mean
            embeds = model.get_input_embeddings()(batch["input_ids"])
            embeds[is_image] = blanked.flatten(0, 1)
            logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
            scores.append(logits[:, -1].log_softmax(-1).gather(1, answer_ids)[:, 0])
    hurt_most = torch.stack(scores).argmin(0).tolist()
    asked = [row["scene"].objects[data.question(i).asked[0]].cell for i, row in enumerate(rows)]
    assert sum(a == b for a, b in zip(hurt_most, asked, strict=True)) >= 0.9 * len(rows)
