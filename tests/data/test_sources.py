from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Image, List
from families import picture

from sparsify_vlm.data import BadSample, DataConfig, Sample, SampleSource, open_samples
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import LoadedModel

QUESTION = "what colour is the circle?"


def opened(vlm: LoadedModel, path: Path | str, **flags: Any) -> SampleSource:
    return open_samples(DataConfig(dataset=str(path), **flags), vlm)


def rows(n: int = 10) -> list[dict[str, Any]]:
    return [{"image": f"p{i}.png", "question": QUESTION, "answer": str(i)} for i in range(n)]


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def answers(samples: list[Sample]) -> list[str | None]:
    return [sample.answer for sample in samples]


def colours(sample: Sample) -> bytes:
    return sample.images[0].decode().tobytes()


def as_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", rows())


def as_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows()))
    return path


def as_json_in_an_object(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps({"version": 2, "data": rows()}))
    return path


def as_json_lines_called_json(folder: Path) -> Path:
    return write_jsonl(folder / "rows.json", rows())


def as_folder_with_json(folder: Path) -> Path:
    return as_json(folder).parent


def as_csv(folder: Path) -> Path:
    lines = [f"p{i}.png,{QUESTION},{i}" for i in range(10)]
    (folder / "rows.csv").write_text("\n".join(["image,question,answer", *lines]))
    return folder / "rows.csv"


def as_imagefolder(folder: Path) -> Path:
    content = [{"file_name": row.pop("image"), **row} for row in rows()]
    write_jsonl(folder / "metadata.jsonl", content)
    return folder


def as_imagefolder_csv(folder: Path) -> Path:
    (folder / "train").mkdir()
    for path in folder.glob("*.png"):
        shutil.move(path, folder / "train")
    lines = [f'p{i}.png,"{QUESTION}",{i}' for i in range(10)]
    (folder / "train/metadata.csv").write_text("\n".join(["file_name,question,answer", *lines]))
    return folder


def table(folder: Path) -> Dataset:
    content = rows()
    for row in content:
        data = (folder / row["image"]).read_bytes()
        row["image"] = {"bytes": data, "path": row["image"]}
    return Dataset.from_list(content).cast_column("image", Image())


def as_saved_dataset(folder: Path) -> Path:
    table(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder: Path) -> Path:
    DatasetDict({"train": table(folder), "test": table(folder)}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_parquet(folder: Path) -> Path:
    table(folder).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    table(folder).select(range(5)).to_parquet(folder / "data/train-00000-of-00002.parquet")
    table(folder).select(range(5, 10)).to_parquet(folder / "data/train-00001-of-00002.parquet")
    for path in folder.glob("*.png"):
        path.unlink()
    return folder


KINDS = [
    as_jsonl,
    as_json,
    as_json_in_an_object,
    as_json_lines_called_json,
    as_folder_with_json,
    as_csv,
    as_imagefolder,
    as_imagefolder_csv,
    as_saved_dataset,
    as_saved_splits,
    as_parquet,
    as_parquet_folder,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_gives_its_rows(vlm: LoadedModel, pictures: Path, kind: Any) -> None:
    source = opened(vlm, kind(pictures), shuffle_seed=-1)
    samples = list(source)
    assert len(source) == source.size == 10
    assert answers(samples) == [str(i) for i in range(10)]
    assert all(sample.turns[0].text == QUESTION for sample in samples)
    assert colours(samples[7]) == picture(48, 48, 7).tobytes()
    assert len({sample.id for sample in samples}) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_datasets(vlm: LoadedModel, pictures: Path, kind: Any) -> None:
    source = opened(vlm, kind(pictures), shuffle_seed=3, max_examples=6)
    shuffled = Dataset.from_dict({"answer": [str(i) for i in range(10)]}).shuffle(3)
    assert answers(list(source)) == shuffled["answer"][:6]
    assert answers(list(source.from_index(4))) == shuffled["answer"][4:6]


@pytest.mark.parametrize("kind", [as_jsonl, as_json, as_imagefolder, as_saved_dataset, as_parquet])
def test_slices_of_a_split(vlm: LoadedModel, pictures: Path, kind: Any) -> None:
    path = kind(pictures)
    for split, expected in [("[:3]", "012"), ("[40%:70%]", "456"), ("[-2:]", "89"), ("[8:]", "89")]:
        source = opened(vlm, path, split=f"train{split}", shuffle_seed=-1)
        assert answers(list(source)) == list(expected)


def test_a_folder_of_images_in_natural_order(vlm: LoadedModel, pictures: Path) -> None:
    picture(48, 48, 10).save(pictures / "p10.png")
    (pictures / "notes.txt").write_text("no image")
    samples = list(opened(vlm, pictures, shuffle_seed=-1))
    assert len(samples) == 11
    assert [colours(sample) for sample in samples[9:]] == [
        picture(48, 48, 9).tobytes(),
        picture(48, 48, 10).tobytes(),
    ]
    assert samples[0].turns[0].n_images == 1


def test_lists_of_images_stay_undecoded(vlm: LoadedModel, pictures: Path) -> None:
    """The Cauldron's rows, whose second picture is damaged: decoded only when it is wanted."""
    data = [(pictures / f"p{i}.png").read_bytes() for i in range(2)]
    cells = [[{"bytes": data[0], "path": None}], [{"bytes": data[1][:50], "path": None}]]
    turns = [[{"user": QUESTION, "assistant": "red", "source": "x"}]] * 2
    dataset = Dataset.from_dict({"images": cells, "texts": turns})
    dataset = dataset.cast_column("images", List(Image()))
    dataset.save_to_disk(pictures / "saved")
    good, bad = opened(vlm, pictures / "saved", shuffle_seed=-1)
    assert colours(good) == picture(48, 48, 0).tobytes()
    assert bad.answer == "red"


def test_image_root_says_where_paths_start(
    vlm: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    path = as_jsonl(tmp_path)
    source = opened(vlm, path, image_root=str(pictures), shuffle_seed=-1)
    assert colours(next(iter(source))) == picture(48, 48, 0).tobytes()
    with pytest.raises(UserError, match=r"--image_root .*away"):
        opened(vlm, path, image_root=str(tmp_path / "away"))


def test_streams_give_the_same_rows(vlm: LoadedModel, pictures: Path) -> None:
    path = as_parquet(pictures)
    source = opened(vlm, path, streaming=True, shuffle_seed=-1)
    assert source.size is None
    with pytest.raises(TypeError, match="length is not known"):
        len(source)
    assert answers(list(source)) == [str(i) for i in range(10)]
    assert colours(next(iter(source))) == picture(48, 48, 0).tobytes()


def test_streams_start_anywhere_in_a_fixed_order(vlm: LoadedModel, pictures: Path) -> None:
    source = opened(vlm, as_parquet(pictures), streaming=True, shuffle_seed=5, max_examples=8)
    order = list(source)
    assert len(order) == 8
    assert answers(order) != [str(i) for i in range(8)]
    for start in (0, 3, 7, 8):
        assert list(source.from_index(start)) == order[start:]


def test_a_stream_that_breaks_off_says_where(vlm: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\n" + "a,b\n" * 3 + "c,d,e,f\n")
    with pytest.raises(UserError, match=r"rows\.csv: the stream broke off after 0 rows: .*line 5"):
        list(opened(vlm, tmp_path / "rows.csv", streaming=True, shuffle_seed=-1))


def test_bad_rows_leave_their_number_empty(vlm: LoadedModel, tmp_path: Path) -> None:
    content = rows()
    content[2]["question"], content[5]["image"] = None, 5
    path = write_jsonl(tmp_path / "rows.jsonl", content)
    with path.open("a") as file:
        file.write("{broken\n")
    source = opened(vlm, path, shuffle_seed=-1, skip_bad=True)
    assert source.size == 11
    assert answers(list(source)) == list("01346789")
    assert answers(list(source.from_index(5))) == list("6789")
    ids = [line.split(":")[0] for line in source.bad]
    assert ids == ["rows.jsonl#2", "rows.jsonl#5", "rows.jsonl#10"]
    strict = opened(vlm, path, shuffle_seed=-1)
    with pytest.raises(BadSample, match=r"rows\.jsonl#2: .*skip_bad"):
        list(strict)


def test_shapes_by_default(vlm: LoadedModel, llm: LoadedModel) -> None:
    seen, told = (open_samples(DataConfig(max_examples=12), model) for model in (vlm, llm))
    assert len(seen) == len(told) == 12
    assert len(next(iter(seen)).images) == 1
    first = next(iter(told))
    assert not first.images
    assert first.turns[0].text.startswith("there ")
    assert {sample.type for sample in seen} >= {"colour", "count"}


def test_shapes_arguments(vlm: LoadedModel) -> None:
    source = opened(vlm, "shapes", split="heldout", data_args="size=7,seed=3")
    assert len(source) == 7
    assert next(iter(source)).id == "shapes-heldout-3-0"
    assert not next(iter(opened(vlm, "shapes", data_args="text_only=True"))).images
    with pytest.raises(UserError, match=r"--data_args for shapes.*colour"):
        opened(vlm, "shapes", data_args="colour=red")
    with pytest.raises(UserError, match=r"arg1=val1"):
        opened(vlm, "shapes", data_args="size")
    with pytest.raises(UserError, match=r"arg1=val1"):
        opened(vlm, "shapes", data_args="size=[")
    with pytest.raises(UserError, match="splits train, heldout"):
        opened(vlm, "shapes", split="test")


def test_defaults_of_other_models() -> None:
    from sparsify_vlm.data.reading import default_dataset

    class Model:
        name = "llava"
        is_vlm = True

    assert default_dataset(Model()) == ("HuggingFaceM4/the_cauldron", "name=vqav2")  # type: ignore[arg-type]


def test_the_fingerprint_follows_order_and_data(vlm: LoadedModel, pictures: Path) -> None:
    path = as_jsonl(pictures)

    def mark(**flags: Any) -> str:
        return opened(vlm, path, **flags).fingerprint

    assert mark() == mark() == mark(skip_bad=True)
    assert len({mark(), mark(shuffle_seed=1), mark(max_examples=5), mark(split="train[:5]")}) == 4
    before = mark()
    write_jsonl(path, rows(9))
    assert mark() != before


MISTAKES = [
    ("away.jsonl", {}, r"away\.jsonl: there is no such file"),
    ("./away", {}, "there is no such file or folder"),
    ("rows.jsonl", {"split": "test"}, "only the split train, not test"),
    ("rows.jsonl", {"split": "train[:a]"}, r"--split train\[:a\]"),
    ("rows.jsonl", {"answer_column": "a"}, "--answer_column a"),
    ("pictures", {"split": "train[5:5]"}, "has no rows"),
    ("broken.json", {}, r"broken\.json is not JSON"),
    ("number.json", {}, "no list of rows"),
    ("latin.jsonl", {}, r"latin\.jsonl is not JSON: 'utf-8' codec"),
    ("odd.bin", {}, r"odd\.bin is no file of 16-bit tokens: it has 3 bytes"),
    ("weights.pt", {}, r"unknown kind of file; known are \.json"),
    ("broken.parquet", {}, r"broken\.parquet cannot be read"),
    ("torn.csv", {}, r"torn\.csv cannot be read: .*line 3"),
    ("empty", {}, "holds no dataset"),
    ("saved", {"split": "dev"}, "splits train, test; there is no dev"),
    ("parquet", {"split": "dev"}, r"--split dev.*train"),
    ("nobody/nothing", {}, r"nobody/nothing cannot be had .*shapes"),
    ("nobody/nothing", {"streaming": True}, r"nobody/nothing cannot be had .*shapes"),
]


@pytest.mark.parametrize(("dataset", "flags", "message"), MISTAKES)
def test_mistakes_end_in_one_line(
    vlm: LoadedModel, pictures: Path, monkeypatch: Any, dataset: str, flags: Any, message: str
) -> None:
    monkeypatch.chdir(pictures.parent)
    write_jsonl(Path("rows.jsonl"), rows())
    Path("broken.json").write_text("[{")
    Path("number.json").write_text("5")
    Path("weights.pt").write_bytes(b"x")
    Path("latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    Path("odd.bin").write_bytes(b"abc")
    Path("broken.parquet").write_bytes(b"PAR1 no")
    Path("torn.csv").write_text("image,question\na,b\nc,d,e,f\n")
    Path("empty").mkdir()
    Path("parquet").mkdir()
    if dataset in ("saved", "parquet"):
        splits = DatasetDict({"train": table(pictures), "test": table(pictures)})
        splits.save_to_disk("saved")
        splits["train"].to_parquet("parquet/rows.parquet")
    with pytest.raises(UserError, match=message) as caught:
        opened(vlm, dataset, **flags)
    assert "\n" not in str(caught.value)


def test_a_text_model_refuses_images(llm: LoadedModel, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl has images, which tiny-llama does not read"):
        opened(llm, as_jsonl(pictures))


def test_settings_that_exclude_each_other() -> None:
    for flags, message in [
        ({"dataset": "a", "dataset_mix": "b"}, "--dataset and --dataset_mix"),
        ({"ctx_len": 0}, "--ctx_len"),
        ({"max_examples": 0}, "--max_examples"),
    ]:
        with pytest.raises(UserError, match=message):
            DataConfig(**flags)  # type: ignore[arg-type]


def test_large_json_lines_are_not_loaded(vlm: LoadedModel, pictures: Path) -> None:
    source = opened(vlm, as_jsonl(pictures), shuffle_seed=-1)
    assert answers(list(islice(source, 2))) == ["0", "1"]
    assert not hasattr(source.rows, "rows")  # type: ignore[attr-defined]
