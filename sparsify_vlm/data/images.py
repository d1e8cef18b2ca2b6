"""Images as they come (path, bytes, decoded) and their decoding to RGB, each failure by name."""

from __future__ import annotations

import io
import struct
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import numpy as np

from sparsify_vlm.data.config import MAX_IMAGE_PIXELS
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


URL_TIMEOUT = 60.0  # seconds without an answer


class BadSample(UserError):
    """A row that cannot be used; `--skip_bad` goes on without it.

    Attributes:
        id: the sample's id.
        reason: what is wrong with it, without the id.
    """

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"{id}: {reason} (--skip_bad goes on without such rows)")
        self.id, self.reason = id, reason


class BadImage(Exception):
    """Why an image could not be decoded; `decode` callers turn it into a `BadSample`."""


@dataclass(frozen=True)
class ImageRef:
    """An image that has not been decoded: one of `path`, `data` and `image` is set.

    `path` may be a URL: HTTP, or what fsspec reads (hf://, s3://, zip://…); `name` is how messages
    call it.
    """

    name: str
    path: str | None = None
    data: bytes | None = None
    image: Any = None

    def decode(self, max_pixels: int = MAX_IMAGE_PIXELS) -> Image:
        """The image as 8-bit RGB, upright. Raises `BadImage`."""
        from PIL import Image, UnidentifiedImageError

        try:
            with self._open(max_pixels) as image:
                return to_rgb(image)
        except BadImage as error:
            raise BadImage(f"image {self.name} {error}") from None
        except FileNotFoundError:
            raise BadImage(
                f"image {self.name} is missing: there is no file {self.path}; "
                "--image_root says where paths start"
            ) from None
        except UnidentifiedImageError:
            raise BadImage(f"{self.name} is not an image that Pillow reads") from None
        except Image.DecompressionBombError:
            raise BadImage(f"image {self.name} {_too_large(max_pixels)}") from None
        # Pillow's decoders raise all of these on damaged files.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise BadImage(f"image {self.name} cannot be decoded: {_first_line(error)}") from None

    def _open(self, max_pixels: int) -> AbstractContextManager[Image]:
        """Context with the image, closed behind it unless it came decoded."""
        from PIL import Image

        if self.image is None:
            _pillows_limit(max_pixels)
        image = self.image or Image.open(io.BytesIO(self._read()))
        if image.width * image.height > max_pixels:
            raise BadImage(f"({image.width} × {image.height}) {_too_large(max_pixels)}")
        return image if self.image is None else nullcontext(image)

    def _read(self) -> bytes:
        if self.data is not None:
            return self.data
        assert self.path is not None
        if "://" in self.path:
            return _read_url(self.path)
        return Path(self.path).read_bytes()


def _read_url(url: str) -> bytes:
    """What `url` holds: by Python's own client over HTTP, for which fsspec asks for a package
    that nothing here installs, and by fsspec otherwise."""
    import fsspec

    try:
        if url.startswith(("http://", "https://")):
            request = Request(url, headers={"User-Agent": "sparsify-vlm"})
            with urlopen(request, timeout=URL_TIMEOUT) as answer:
                return bytes(answer.read())
        with fsspec.open(url, "rb") as file:
            data: bytes = file.read()
            return data
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - every protocol raises errors of its own
        raise BadImage(f"cannot be fetched: {_first_line(error)}") from None


def _too_large(max_pixels: int) -> str:
    return f"is too large: more than {max_pixels} pixels (--max_image_pixels allows more)"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _pillows_limit(max_pixels: int) -> None:
    """Let Pillow open what `max_pixels` allows; its limit is global to the process.

    Its warning between that limit and its double is silenced: those images are refused here.
    """
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def to_rgb(image: Image) -> Image:
    """Any Pillow image as a new one of 8-bit RGB: upright by its EXIF orientation, first frame.

    Transparency is laid over white, as a viewer would show it; 16-bit grey keeps its upper 8 bits.
    Raises `BadImage` for pixel types without a defined range (32-bit floats and integers).
    """
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _grey_16_bit(image)
    elif image.mode == "F":
        raise BadImage("holds 32-bit floats, whose range is not defined; convert it to 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_16_bit(image: Image) -> Image:
    from PIL import Image

    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise BadImage("holds 32-bit integers beyond 16 bits; convert it to 8 bits")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def image_ref(value: Any, root: Path | None, name: str) -> ImageRef:
    """What stands in a row's image column, as an `ImageRef`.

    Args:
        value: a path or URL, bytes, a PIL image, or the {bytes, path} of `Image(decode=False)`.
        root: folder that a relative path starts at.
        name: what to call an image that has no path.

    Raises:
        BadImage: for anything else.
    """
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        path = value.get("path")
        if value.get("bytes") is not None:
            return ImageRef(f"{name} {path}" if path else name, data=value["bytes"])
        value = path
    if isinstance(value, str | Path):
        path = str(value)
        full = path if "://" in path or root is None else str(root / path)
        return ImageRef(path, path=full)
    if isinstance(value, bytes | bytearray):
        return ImageRef(name, data=bytes(value))
    if hasattr(value, "convert") and hasattr(value, "size"):
        return ImageRef(name, image=value)
    raise BadImage(f"{name} holds {type(value).__name__}, not an image, its bytes or its path")
