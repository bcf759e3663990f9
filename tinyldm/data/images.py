"""Image files and tensors: safe decoding, and the way to [-1, 1] and back.

Shapes: an image is (3, H, W) in [-1, 1]. Pillow's sizes are (width, height).

Image files may come from strangers: only the formats below are opened, whatever a file
is called, and an image with too many pixels is refused before it is decoded.
"""
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Why so few: Pillow gives an EPS file to GhostScript, which executes it as a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

NEAREST = Image.Resampling.NEAREST
LANCZOS = Image.Resampling.LANCZOS

# Pillow warns about images with more pixels than this; load_image turns that into an
# error.
Image.MAX_IMAGE_PIXELS = 64_000_000


# ---- tensors

def to_tensor(image: Image.Image) -> Tensor:
    """RGB image of 8 bits per channel -> (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))                  # (H, W, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def map_to_tensor(label_map: Image.Image) -> Tensor:
    """Image of one channel, whose pixels are class numbers -> (H, W) int64."""
    return torch.from_numpy(np.int64(label_map))


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image of 8 bits per channel, rounded to nearest."""
    x = (x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    pixels = x.round().byte().permute(1, 2, 0)                  # (H, W, 3)
    return Image.fromarray(pixels.numpy())


# ---- files

def load_image(data: bytes, least_side: int | None = None) -> Image.Image:
    """Decode the bytes of an image file, and rotate the image as its EXIF data says.

    least_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, if no side becomes
    shorter than this. Why: that is several times faster than decoding all of it.

    Raises an error of Pillow for what is not an image, or has too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if least_side:
            image.draft(None, (least_side, least_side))
        return ImageOps.exif_transpose(image)


def load_rgb(data: bytes, least_side: int | None = None) -> Image.Image:
    """Decode the bytes of an image file as RGB; transparent parts become white.

    Arguments and errors are load_image's.
    """
    image = load_image(data, least_side)

    # 16 bits to 8. Why by hand: Pillow's own conversion clips everything above 255.
    if image.mode.startswith("I;16"):
        image = image.point(lambda v: v / 256).convert("L")

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_map(data: bytes) -> Image.Image:
    """Decode the bytes of a label map: an image of one channel of class numbers.

    Raises ValueError for an image with several channels, and load_image's errors.
    """
    image = load_image(data)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        n_channels = len(image.getbands())
        raise ValueError(f"has {n_channels} channels; a label map has one")
    return image


def fit_image(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling, name: str
) -> Image.Image:
    """Scale an image and crop its centre, so that it has a size (width, height).

    Warns if that changes the image; name tells the reader of the warning which image it
    is.
    """
    if image.size != size:
        width, height = size
        how = " (nearest)" if resample == NEAREST else ""
        warnings.warn(
            f"{name}: {image.width}x{image.height} is scaled and cropped to "
            f"{width}x{height}{how}",
            stacklevel=2,
        )
    return ImageOps.fit(image, size, resample)
