from __future__ import annotations

import io
import struct
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from sparsify_vlm.data.images import BadImage, ImageRef, image_ref

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (100, 100, 100)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageRef("it", data=buffer.getvalue())


def pixels(ref: ImageRef) -> np.ndarray:
    image = ref.decode()
    assert image.mode == "RGB"
    return np.asarray(image)


def test_an_rgb_image_is_unchanged() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (pixels(saved(Image.fromarray(values))) == values).all()


def test_transparency_lies_over_white() -> None:
    values = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    alpha = values[..., 3:] / 255
    expected = np.round(values[..., :3] * alpha + 255 * (1 - alpha))
    assert np.abs(pixels(saved(Image.fromarray(values, "RGBA"))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "CMYK", "YCbCr"])
def test_modes_become_the_colours_they_show(mode: str) -> None:
    shades = [(0, 0, 0), (255, 255, 255)] if mode in ("L", "1", "LA") else [RED, GREEN, BLUE]
    rgb = np.array([shades], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(rgb).convert(mode)
    ref = saved(image, "TIFF") if mode in ("CMYK", "YCbCr") else saved(image)
    assert np.abs(pixels(ref).astype(int) - rgb).max() <= 2


def test_palette_transparency_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image, transparency=1)).tolist() == [[list(RED), [255, 255, 255]]]


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    assert pixels(saved(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 0x80, 0xFF]


def test_floats_are_refused() -> None:
    with pytest.raises(BadImage, match="32-bit floats"):
        saved(Image.new("F", (2, 2)), "TIFF").decode()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    """Each picture is stored turned as its tag says; all show red, green / blue, grey."""
    upright = np.array([[RED, GREEN], [BLUE, GREY]], dtype=np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    ref = saved(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (pixels(ref) == upright).all()


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    ref = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(ref)[0, 0].tolist() == list(RED)


def damaged(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("name", ["half.jpg", "half.png", "half.gif", "half.webp", "half.bmp"])
def test_a_truncated_image_is_named(tmp_path: Path, name: str) -> None:
    path = damaged(tmp_path, name)
    with pytest.raises(BadImage, match=name):
        ImageRef(name, path=str(path)).decode()


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a" * 3])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"notes\.png"):
        ImageRef("notes.png", path=str(path)).decode()


def test_a_missing_image_says_where_it_was_sought(tmp_path: Path) -> None:
    ref = image_ref("away.png", tmp_path, "column image")
    with pytest.raises(BadImage, match=rf"away\.png is missing: .*{tmp_path.name}.*--image_root"):
        ref.decode()


def test_an_image_is_fetched_over_http(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), RED).save(tmp_path / "a.png")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        assert (pixels(image_ref(f"{where}/a.png", None, "it")) == RED).all()
        with pytest.raises(BadImage, match=r"b\.png cannot be fetched: .*404"):
            image_ref(f"{where}/b.png", None, "it").decode()
        server.shutdown()


@pytest.mark.parametrize("url", ["nothing://host/a.png", "http://127.0.0.1:9/a.png"])
def test_an_url_that_cannot_be_fetched_is_named(url: str) -> None:
    with pytest.raises(BadImage, match=rf"image {url} cannot be fetched: "):
        image_ref(url, None, "it").decode()


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    data = saved(Image.new("RGB", (1, 1))).data
    assert data is not None
    header = b"IHDR" + struct.pack(">II", 1_000_000, 1_000_000) + data[24:29]  # 3 terabytes
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(BadImage, match="too large"):
        ImageRef("it", data=bomb).decode()


def test_the_limit_on_pixels_is_the_callers() -> None:
    ref = saved(Image.new("RGB", (20, 10)))
    assert ref.decode(200).size == (20, 10)
    with pytest.raises(BadImage, match=r"\(20 × 10\) is too large.*199"):
        ref.decode(199)


def test_pillows_own_limit_can_be_raised() -> None:
    ref = saved(Image.new("1", (9_500, 9_500)))  # above Pillow's 89 million
    with pytest.raises(BadImage, match="too large"):
        ref.decode()
    assert ref.decode(100_000_000).size == (9_500, 9_500)


def test_columns_hold_paths_bytes_pictures_or_both(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), RED)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    cells = [
        "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").as_uri(),
        data,
        image,
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": "a.png"},
    ]
    for cell in cells:
        decoded = image_ref(cell, tmp_path, "it").decode()
        assert decoded.size == (3, 2)
        assert decoded.getpixel((0, 0)) == RED


def test_a_column_that_holds_no_image_is_refused() -> None:
    with pytest.raises(BadImage, match="int, not an image"):
        image_ref(7, None, "column image")
