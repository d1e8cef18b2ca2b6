from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image

from sparsify_vlm.data import BadSample, EncodedBatch, ImageRef, Sample, Turn, encode
from sparsify_vlm.data.prompts import Prompter
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel, Role
from sparsify_vlm.models.processors import idle_steps

CTX_LEN = 2048


def picture(width: int, height: int, seed: int) -> ImageRef:
    return ImageRef("it", image=families.picture(width, height, seed))


def chat(id: str, question: str, answer: str | None, *images: ImageRef) -> Sample:
    turns = [Turn("user", question, len(images))]
    if answer is not None:
        turns.append(Turn("assistant", answer))
    return Sample(id, tuple(turns), images)


def mixed(loaded: LoadedModel) -> list[Sample]:
    """One image, none, plain tokens, two images, one image without an answer."""
    tokens = loaded.tokenizer("what is it ? a red green blue thing")["input_ids"]
    return [
        chat("one", "what colour is the thing ?", "red .", picture(40, 24, 1)),
        chat("none", "what is it ?", "blue"),
        Sample("tokens", input_ids=tuple(tokens), kind="text"),
        chat("two", "picture this", "it is green .", picture(24, 32, 2), picture(30, 30, 3)),
        chat("open", "what is the thing ?", None, picture(32, 32, 4)),
    ]


@pytest.fixture(scope="module", params=families.VLMS)
def family(request: pytest.FixtureRequest, tmp_path_factory: Any) -> LoadedModel:
    return families.load(request.param, tmp_path_factory.mktemp("models"))


def test_a_row_means_the_same_in_any_batch(family: LoadedModel) -> None:
    """Logits of every row of a mixed batch are those of the sample alone, in every family."""
    samples = mixed(family)
    batch = encode(family, samples, CTX_LEN)
    together = family.forward(batch.inputs, logits=True).logits
    for row, sample in enumerate(samples):
        alone = encode(family, [sample], CTX_LEN)
        n = int(batch.inputs["attention_mask"][row].sum())
        expected = family.forward(alone.inputs, logits=True).logits
        assert expected.shape[1] == n
        torch.testing.assert_close(together[row, :n], expected[0], atol=2e-5, rtol=1e-4)


def test_the_answers_tokens_are_found(family: LoadedModel) -> None:
    batch = encode(family, mixed(family), CTX_LEN)
    assert batch.answer_mask is not None
    found = [
        family.tokenizer.decode(ids[mask]).split()
        for ids, mask in zip(batch.inputs["input_ids"], batch.answer_mask, strict=True)
    ]
    assert found == [
        ["red", ".", "</s>"],
        ["blue", "</s>"],
        [],
        ["it", "is", "green", ".", "</s>"],
        [],
    ]


def test_no_token_sees_the_answer_before_it_comes(family: LoadedModel) -> None:
    """Another answer changes nothing before it, also where prompts are read in both directions."""
    (first, *_), other = mixed(family), "green a"
    batch = encode(family, [first], CTX_LEN)
    changed = encode(
        family, [replace(first, turns=(first.turns[0], Turn("assistant", other)))], CTX_LEN
    )
    start = int(batch.answer_mask[0].int().argmax())  # type: ignore[index]
    before, after = (family.forward(b.inputs, logits=True).logits[0] for b in (batch, changed))
    torch.testing.assert_close(before[:start], after[:start], atol=2e-5, rtol=1e-4)
    assert (before[start] - after[start]).abs().max() > 1e-3


def test_prompts_for_generation_end_together(family: LoadedModel) -> None:
    """Left-padded, the next token's logits are those that the full text has before its answer."""
    samples = [sample for sample in mixed(family) if sample.answer is not None]
    full = encode(family, samples, CTX_LEN)
    prompt = encode(family, samples, CTX_LEN, with_answer=False)
    assert prompt.answer_mask is None
    assert prompt.inputs["attention_mask"][:, -1].all()
    starts = full.answer_mask.int().argmax(1)  # type: ignore[union-attr]
    assert prompt.inputs["attention_mask"].sum(1).tolist() == starts.tolist()
    for row, start in enumerate(starts.tolist()):
        kept = prompt.inputs["attention_mask"][row].bool()
        ids = prompt.inputs["input_ids"][row][kept]
        assert ids.tolist() == full.inputs["input_ids"][row, :start].tolist()


def text_of(loaded: LoadedModel, batch: EncodedBatch, row: int = 0) -> str:
    text: str = loaded.tokenizer.decode(batch.inputs["input_ids"][row])
    return text.replace("<image> " * 36, "<image> ").replace(" \n ", "\n")


@pytest.mark.parametrize("size", [(48, 48), (48, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_steps_that_change_nothing_are_left_out(
    vlm: LoadedModel, size: tuple[int, int], mode: str
) -> None:
    """Pixels are those of the whole processor; 48 × 48 is the size that it makes."""
    images = [families.picture(*size, i).convert(mode) for i in range(3)]
    off = idle_steps(vlm.processor, images)
    assert bool(off) == (size == (48, 48) and mode == "RGB")
    whole = vlm.image_processor(images, return_tensors="pt")
    assert torch.equal(
        vlm.image_processor(images, return_tensors="pt", **off)["pixel_values"],
        whole["pixel_values"],
    )


def test_no_step_is_left_out_where_it_does_something(family: LoadedModel) -> None:
    """In every family, for images of the size that its configuration asks for."""
    processor = getattr(family, "image_processor", None)
    size = dict(processor.size)
    side = size.get("height") or size.get("shortest_edge") or 32
    images = [families.picture(side, side, i) for i in range(2)]
    whole = processor(images, return_tensors="pt")
    short = processor(images, return_tensors="pt", **idle_steps(family.processor, images))
    assert whole.keys() == short.keys()
    for name, value in whole.items():
        ours = short[name]
        same = torch.equal(value, ours) if isinstance(value, torch.Tensor) else value == ours
        assert same, name


def test_remembered_prompts_are_the_templates(vlm: LoadedModel) -> None:
    """Conversations that differ in one part only, each rendered twice."""
    shown = picture(48, 48, 1)
    prompter = Prompter.of(vlm)
    for sample in [
        chat("a", "what is it ?", "red", shown),
        chat("b", "what is it ?", "blue", shown),
        chat("c", "what is it ?", None, shown),
        chat("d", "what is it ?", "red"),
        chat("e", "what is it", "red", shown),
    ] * 2:
        content = [{"type": "image"}] * len(sample.images)
        messages = [
            {
                "role": turn.role,
                "content": [*content * (i == 0), {"type": "text", "text": turn.text}],
            }
            for i, turn in enumerate(sample.turns)
        ]
        expected = vlm.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=sample.answer is None
        )
        assert prompter.render(sample).text == expected


def test_the_chat_template_is_used(vlm: LoadedModel) -> None:
    sample = chat("a", "what colour is the circle?", "red", picture(48, 48, 0))
    text = text_of(vlm, encode(vlm, [sample], CTX_LEN))
    assert (
        " ".join(text.split()) == "<s> USER: <image> what colour is the circle? ASSISTANT: red </s>"
    )


def test_llavas_prompt_where_there_is_no_template(tmp_path: Path) -> None:
    loaded = families.load("llava", tmp_path)
    sample = chat("a", "what is it ?", "red", picture(32, 32, 0))
    batch = encode(loaded, [sample], CTX_LEN)
    image = "<image>" * 16
    expected = loaded.tokenizer(f"USER: {image}\nwhat is it ? ASSISTANT: red</s>")["input_ids"]
    assert batch.inputs["input_ids"][0].tolist() == expected
    opened = encode(loaded, [sample], CTX_LEN, with_answer=False)
    expected = loaded.tokenizer(f"USER: {image}\nwhat is it ? ASSISTANT:")["input_ids"]
    assert opened.inputs["input_ids"][0].tolist() == expected


TEMPLATES = {
    "llava": (  # the one of llava-hf/llava-1.5-7b-hf: no EOS, a space after the answer
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
        "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "bos and closing": (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' }}"
        "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }} "
        "{% endfor %}{{ '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_under_other_templates(tmp_path: Path, template: str) -> None:
    loaded = families.load("llava", tmp_path)
    loaded.processor.chat_template = TEMPLATES[template]
    batch = encode(loaded, [chat("a", "what is it ?", "red .", picture(32, 32, 0))], CTX_LEN)
    assert batch.answer_mask is not None
    ids = batch.inputs["input_ids"][0]
    assert loaded.tokenizer.decode(ids[batch.answer_mask[0]]).split() == ["red", ".", "</s>"]
    assert (ids == loaded.tokenizer.bos_token_id).sum() == 1


def test_of_several_answers_the_last_is_masked(llm: LoadedModel) -> None:
    turns = [Turn("user", "what shape?"), Turn("assistant", "circle")]
    turns += [Turn("user", "what colour?"), Turn("assistant", "red")]
    batch = encode(llm, [Sample("a", tuple(turns))], CTX_LEN)
    ids = batch.inputs["input_ids"][0][batch.answer_mask[0]]  # type: ignore[index]
    assert llm.tokenizer.decode(ids).split() == ["red", "</s>"]


def test_an_answer_that_cannot_be_told_from_its_prompt_is_refused(llm: LoadedModel) -> None:
    batch = encode(llm, [chat("odd", "what colour?", "red")], CTX_LEN)
    inner = llm.tokenizer.chat_template
    llm.tokenizer.chat_template = "{% if add_generation_prompt %}? {% endif %}" + inner
    try:
        with pytest.raises(UserError, match="odd: the chat template's tokens before the answer"):
            assert batch.answer_mask is not None
    finally:
        llm.tokenizer.chat_template = inner


def test_text_is_cut_but_never_images(vlm: LoadedModel) -> None:
    sample = chat("long", "what colour is the circle? " * 10, "red", picture(48, 48, 0))
    batch = encode(vlm, [sample], 50)
    assert batch.inputs["input_ids"].shape == (1, 50)
    roles = vlm.stack.roles(batch.inputs)
    assert (roles == Role.IMAGE).sum() == 36
    assert not batch.answer_mask.any()  # type: ignore[union-attr]
    with pytest.raises(BadSample, match=r"long: 8 image tokens lie beyond 30 tokens.*--ctx_len"):
        encode(vlm, [sample], 30)
    with pytest.raises(BadSample, match=r"long: its prompt has .* more than 50: raise --ctx_len"):
        encode(vlm, [sample], 50, with_answer=False)


def test_half_an_answer_is_masked_as_far_as_it_is_there(vlm: LoadedModel) -> None:
    sample = chat("a", "what colour?", "red red red red", picture(48, 48, 0))
    whole, cut = encode(vlm, [sample], CTX_LEN), encode(vlm, [sample], 46)
    assert whole.answer_mask is not None
    assert cut.answer_mask is not None
    assert cut.answer_mask[0].tolist() == whole.answer_mask[0, :46].tolist()
    assert 0 < cut.answer_mask.sum() < whole.answer_mask.sum()


def test_text_with_the_image_token_is_refused(vlm: LoadedModel) -> None:
    with pytest.raises(BadSample, match=r"a: .*<image> 1 times for 0 images"):
        encode(vlm, [chat("a", "what is <image> ?", "red")], CTX_LEN)


def test_a_template_that_refuses_the_turns_is_named(tmp_path: Path) -> None:
    loaded = families.load("llama", tmp_path)
    loaded.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadSample, match="a: the chat template refuses its turns: roles must alter"):
        encode(loaded, [chat("a", "what ?", "red")], CTX_LEN)


def test_an_image_that_the_processor_refuses_is_named(tmp_path: Path) -> None:
    """Qwen's processor refuses proportions beyond 200 : 1."""
    loaded = families.load("qwen2_5_vl", tmp_path)
    good = chat("good", "what ?", "red", picture(40, 40, 0))
    bad = chat("bad", "what ?", "red", ImageRef("it", image=Image.new("RGB", (2010, 10))))
    with pytest.raises(BadSample, match=r"^bad: the model's processor refuses it: .*200"):
        encode(loaded, [good, bad, good], CTX_LEN)


def test_whole_prompts_place_the_image_themselves(vlm: LoadedModel) -> None:
    text = "USER: <image>\nwhat colour is the circle? ASSISTANT:"
    raw = Sample("a", images=(picture(48, 48, 0),), text=text, kind="text")
    asked = chat("a", "what colour is the circle?", "red", picture(48, 48, 0))
    expected = encode(vlm, [asked], CTX_LEN, with_answer=False).inputs
    inputs = encode(vlm, [raw], CTX_LEN).inputs
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert (inputs["pixel_values"] == expected["pixel_values"]).all()


def test_a_tokenizer_without_padding_token(tmp_path: Path) -> None:
    loaded = families.load("gpt2", tmp_path)
    loaded.tokenizer.pad_token = None
    batch = encode(loaded, [chat("a", "what ?", "red"), chat("b", "what is it ?", "red")], CTX_LEN)
    assert batch.inputs["attention_mask"].sum(1).diff().item() == 2


def test_a_missing_image_is_named(vlm: LoadedModel, tmp_path: Path) -> None:
    ref = ImageRef("away.png", path=str(tmp_path / "away.png"))
    with pytest.raises(BadSample, match=r"a: image away\.png is missing"):
        encode(vlm, [chat("a", "what?", "red", ref)], CTX_LEN)


def test_a_text_model_takes_no_images(llm: LoadedModel) -> None:
    with pytest.raises(BadSample, match="a: has an image, and tiny-llama reads text only"):
        encode(llm, [chat("a", "what?", "red", picture(8, 8, 0))], CTX_LEN)
