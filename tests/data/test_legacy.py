"""Import of L{layer}/batch_{i}_{x,y}.pt folders in all their shapes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import contents
from torch import Tensor

from sparsify_vlm.cli import main
from sparsify_vlm.data import ActivationStore, ImportActivationsConfig, import_activations
from sparsify_vlm.errors import UserError

DEPTH, WIDTH, N_TARGETS = 5, 6, 3
SIZES = [(2, 7), (2, 4), (1, 5)]  # (batch, seq) of every batch

Layout = Callable[[list[Tensor]], Any]
LAYOUTS: dict[str, Layout] = {
    "targets first": torch.stack,
    "tokens first": lambda ys: torch.stack(ys, -2),
    "list": list,
}


def activations() -> list[tuple[Tensor, Tensor]]:
    """x and y of every batch, [layers, batch, seq, width]."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(DEPTH, b, s, WIDTH, generator=generator),
            torch.randn(DEPTH, b, s, WIDTH, generator=generator),
        )
        for b, s in SIZES
    ]


def write(
    folder: Path,
    layout: Layout = torch.stack,
    flat: bool = False,
    offset: int = 1,
    n_sources: int = DEPTH - 1,
) -> Path:
    """The older layout: per source, targets beyond the last layer filled with zeros."""
    for number, (x, y) in enumerate(activations()):
        shape = (DEPTH, -1, WIDTH) if flat else x.shape
        x, y = x.reshape(shape), y.reshape(shape)
        for layer in range(n_sources):
            targets = [
                y[t] if t < DEPTH else torch.zeros_like(y[0])
                for t in range(layer + offset, layer + offset + N_TARGETS)
            ]
            place = folder / f"L{layer}"
            place.mkdir(parents=True, exist_ok=True)
            torch.save(x[layer].clone(), place / f"batch_{number}_x.pt")
            torch.save(layout([t.clone() for t in targets]), place / f"batch_{number}_y.pt")
    return folder


def imported(src: Path, dst: Path, **changes: Any) -> ActivationStore:
    return ActivationStore(
        import_activations(ImportActivationsConfig(str(src), str(dst), **changes))
    )


def expected(kind: int, layer: int) -> Tensor:
    return torch.cat([pair[kind][layer].reshape(-1, WIDTH) for pair in activations()])


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path: Path, layout: str, flat: bool) -> None:
    store = imported(write(tmp_path / "src", LAYOUTS[layout], flat), tmp_path / "dst")
    assert len(store) == sum(b * s for b, s in SIZES)
    assert store.x_layers == [0, 1, 2, 3]
    assert store.y_layers == [1, 2, 3, 4]
    assert store.hookpoints[4] == "language_model.model.layers.4.mlp"
    for layer in range(DEPTH - 1):
        view = store.view(layer)
        assert view.targets == list(range(layer + 1, min(layer + 4, DEPTH)))
        x, ys = view[:]
        assert torch.equal(x, expected(0, layer))
        for target, y in zip(view.targets, ys, strict=True):
            assert torch.equal(y, expected(1, target))


def test_own_layer_as_first_target(tmp_path: Path) -> None:
    src = write(tmp_path / "src", offset=0, n_sources=DEPTH)
    store = imported(src, tmp_path / "dst", target_offset=0)
    assert store.x_layers == store.y_layers == list(range(DEPTH))
    assert store.n_targets == N_TARGETS
    assert torch.equal(store.view(4).y[0][:], expected(1, 4))


def test_each_activation_is_stored_once(tmp_path: Path) -> None:
    src = write(tmp_path / "src")
    store = imported(src, tmp_path / "dst")
    size = sum(p.stat().st_size for p in (tmp_path / "dst").glob("*_y.safetensors"))
    assert size < 4 * len(store) * WIDTH * 4 + 1000


def test_what_is_not_known_stays_unknown(tmp_path: Path) -> None:
    store = imported(write(tmp_path / "src", flat=True), tmp_path / "dst")
    rows = store.rows(range(len(store)))
    assert set(rows.role.tolist()) == {255}
    assert store.roles["unknown"] == len(store)
    for column in (rows.input_ids, rows.position, rows.sample):
        assert set(column.tolist()) == {-1}
    assert rows.x[4].isnan().all()
    assert rows.y[0].isnan().all()
    assert rows.x[:4].isfinite().all()
    with pytest.raises(UserError, match=r"does not hold y of \S+layers.0.mlp"):
        store.view(0, target_offset=0)
    store.check_model("anything", WIDTH, store.hookpoints)


def test_samples_and_positions_where_x_has_them(tmp_path: Path) -> None:
    store = imported(write(tmp_path / "src"), tmp_path / "dst", model="llava")
    rows = store.rows(range(len(store)))
    assert store.n_samples == 5
    assert rows.sample.tolist() == [0] * 7 + [1] * 7 + [2] * 4 + [3] * 4 + [4] * 5
    assert rows.position.tolist() == [*range(7), *range(7), *range(4), *range(4), *range(5)]
    assert store.model == "llava-hf/llava-1.5-7b-hf"


def test_layers_and_batches_in_numerical_order(tmp_path: Path) -> None:
    for number in range(12):
        place = tmp_path / "src" / "L10"
        place.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((3, 2), 1.0 + number), place / f"batch_{number}_x.pt")
        torch.save(torch.full((1, 3, 2), 1.0 + number), place / f"batch_{number}_y.pt")
    store = imported(tmp_path / "src", tmp_path / "dst")
    assert (store.x_layers, store.y_layers) == ([10], [11])
    assert store.view(10)[::3][0][:, 0].tolist() == [1.0 + number for number in range(12)]


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    src = write(tmp_path / "src")
    path = src / "L1" / "batch_1_y.pt"
    y = torch.load(path, weights_only=True)
    y[0, 1, 2, 3] += 1e-3
    torch.save(y, path)
    with pytest.raises(UserError, match=r"L1/batch_1_y.pt and .*L0/batch_1_y.pt differ .* layer 2"):
        imported(src, tmp_path / "dst")


def test_wrong_offset_is_noticed_or_harmless_never_silent(tmp_path: Path) -> None:
    """With one offset for another the copies still agree; the last layer tells them apart."""
    store = imported(write(tmp_path / "src"), tmp_path / "dst", target_offset=0)
    assert store.y_layers == [0, 1, 2, 3]
    assert store.manifest["target_offset"] == 0


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run by unpickling",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "L2/batch_0_y.pt is missing"),
        (lambda p: p.write_bytes(b"nonsense"), "L2/batch_0_y.pt cannot be read as tensors"),
        (lambda p: p.write_bytes(p.read_bytes()[:300]), "L2/batch_0_y.pt cannot be read"),
        (
            lambda p: p.write_bytes(pickle.dumps(Evil(), protocol=2)),
            "L2/batch_0_y.pt cannot be read",
        ),
        (lambda p: torch.save(torch.zeros(3, 9, WIDTH), p), "does not fit"),
        (lambda p: torch.save(torch.zeros(3, 2, 7, WIDTH + 1), p), "where x is"),
        (lambda p: torch.save({"y": 1}, p), "not a tensor or a list"),
        (
            lambda p: torch.save(torch.zeros(0, WIDTH), p.with_name("batch_0_x.pt")),
            "L2/batch_0_x.pt holds no activations",
        ),
        (lambda p: torch.save(torch.zeros(3, 2, 7, WIDTH).half(), p), "float16"),
    ],
)
def test_spoilt_files_are_named(
    tmp_path: Path, spoil: Callable, message: str, capsys: pytest.CaptureFixture
) -> None:
    src = write(tmp_path / "src")
    spoil(src / "L2" / "batch_0_y.pt")
    with pytest.raises(UserError, match=message):
        imported(src, tmp_path / "dst")
    assert "run by unpickling" not in capsys.readouterr().out
    assert not (tmp_path / "dst").exists()


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        imported(tmp_path / "src", tmp_path / "dst")
    src = write(tmp_path / "src")
    (src / "L1" / "batch_1_x.pt").unlink()
    with pytest.raises(UserError, match=r"L1/batch_1_x.pt is missing"):
        imported(src, tmp_path / "dst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folders L0, L1"):
        imported(tmp_path / "empty", tmp_path / "dst")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    src = write(tmp_path / "src")
    line = ["import-activations", str(src), str(tmp_path / "dst")]
    assert main(line) == 0
    assert "27 tokens, x of 4 layers, y of 4" in capsys.readouterr().out
    before = contents(tmp_path / "dst")
    assert main(line) == 0
    assert contents(tmp_path / "dst") == before
    assert main([*line, "--target_offset", "0"]) == 1
    assert "already holds another capture" in capsys.readouterr().err
