"""Image files and tensors: safe decoding, and the way to [-1, 1] and back.

Shapes: an image is (C, H, W) in [-1, 1]; C is 1 for grey, 3 for RGB, 4 for RGBA.
        Pillow's sizes are (width, height).

Image files may come from strangers: only the formats below are opened, whatever a file
is called, and an image with too many pixels is refused before it is decoded.
"""
import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tinyldm.errors import require

# Why so few: Pillow gives an EPS file to GhostScript, which executes it as a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

NEAREST = Image.Resampling.NEAREST
BICUBIC = Image.Resampling.BICUBIC
LANCZOS = Image.Resampling.LANCZOS

EXIF_ORIENTATION = 0x0112       # the number of the tag
TIFF_BITS = 258                 # the numbers of tags
TIFF_PHOTOMETRIC = 262
EXIF_IN_PNG = b"eXIf"           # the name of the part of a PNG that has EXIF data

# Pillow warns about images with more pixels than this; load_image turns that into an
# error.
Image.MAX_IMAGE_PIXELS = 64_000_000


# ---- sizes

def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (H, W). One number is that of a square."""
    if isinstance(size, int):
        return size, size
    h, w = size
    return h, w


def size_text(size: tuple[int, int]) -> str:
    """Return a size (H, W) as flags have it: 64x96, or 64 for a square."""
    h, w = size
    return str(h) if h == w else f"{h}x{w}"


# ---- tensors

def to_tensor(image: Image.Image) -> Tensor:
    """Grey, RGB or RGBA image of 8 bits per channel -> (C, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image)))   # (H, W, C)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def map_to_tensor(label_map: Image.Image) -> Tensor:
    """Image of one channel, whose pixels are class numbers -> (H, W) int64."""
    return torch.from_numpy(np.int64(label_map))


def to_image(x: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] -> image of 8 bits per channel, rounded to nearest.

    C is 1, 3 or 4, for a grey, an RGB or an RGBA image.
    """
    x = (x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    pixels = x.round().byte().permute(1, 2, 0)                  # (H, W, C)
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels.numpy())


def as_rgb(x: Tensor) -> Tensor:
    """Images (..., C, H, W) -> (..., 3, H, W), for networks and grids that need RGB.

    Grey is repeated. RGBA is laid on white, as load_rgb does. Of any other number of
    channels, the first three are taken; of two, the first is repeated.
    """
    C = x.shape[-3]
    if C == 4:
        alpha = (x[..., 3:, :, :] + 1) / 2                      # in 0..1
        return x[..., :3, :, :] * alpha + (1 - alpha)
    if C < 3:
        x = x[..., :1, :, :].repeat_interleave(3, dim=-3)
    return x[..., :3, :, :]


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
        if image.format == "TIFF":
            check_tiff(image)
        if least_side:
            image.draft(None, (least_side, least_side))
        return ImageOps.exif_transpose(image)


def check_tiff(image: Image.Image) -> None:
    """Raise ValueError for greys whose scale Pillow does not apply."""
    bits = image.tag_v2.get(TIFF_BITS, (8,))[0]
    white_is_0 = image.tag_v2.get(TIFF_PHOTOMETRIC) == 0
    if 8 < bits < 16 or (bits == 16 and white_is_0):
        how = ", of which 0 is white" if white_is_0 else ""
        raise ValueError(f"it has greys of {bits} bits{how}; save it with 8 or 16 bits, 0 black")


def load_rgb(data: bytes, least_side: int | None = None) -> Image.Image:
    """Decode the bytes of an image file as RGB; transparent parts become white.

    Arguments and errors are load_image's.
    """
    image = with_8_bits(load_image(data, least_side))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def with_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits, or of numbers in 0..1, with 8 bits per pixel.

    Why by hand: Pillow's own conversion clips everything above 255. Raises ValueError for
    other numbers, as nothing says what is black and what is white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image

    pixels = np.asarray(image)
    low = pixels.min()
    high = pixels.max()
    is_share = image.mode == "F" and low >= 0 and high <= 1         # False for nan
    if not is_share:
        raise ValueError(
            f"its pixels are numbers in {low:g}..{high:g}; save it with 8 or 16 bits, or as "
            "floats in 0..1"
        )
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def load_grey(data: bytes, least_side: int | None = None) -> Image.Image:
    """Decode the bytes of an image file as grey: its luma; transparent parts are white.

    Arguments and errors are load_image's.
    """
    return load_rgb(data, least_side).convert("L")


def load_rgba(data: bytes, least_side: int | None = None) -> Image.Image:
    """Decode the bytes of an image file as RGB and alpha, which is 255 where it has none.

    Arguments and errors are load_image's.
    """
    image = load_image(data, least_side)
    if image.has_transparency_data:
        return image.convert("RGBA")
    return load_rgb(data, least_side).convert("RGBA")


# How image files are decoded, by the number of channels.
LOADERS = {1: load_grey, 3: load_rgb, 4: load_rgba}


def image_loader(channels: int) -> Callable[..., Image.Image]:
    """Return the function that decodes image files with so many channels.

    Raises BadInput for a number that image files do not have.
    """
    require(
        channels in LOADERS,
        f"{channels} channels: image files have 1 (grey), 3 (RGB) or 4 (RGBA); for other "
        "numbers, write a data set of your own (tinyldm/data/README.md)",
    )
    return LOADERS[channels]


def upright_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) of an image file, as load_image gives it.

    Only the header is read. Raises an error of Pillow for what is not an image.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format == "TIFF" or EXIF_IN_PNG in data:
        return load_image(data).size        # what a header alone does not tell
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def stored_orientation(data: bytes) -> int:
    """Return how EXIF data say that the image in a file is turned, 1..8; 1 is upright."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if EXIF_IN_PNG in data:
        image.load()                        # it may stand behind the pixels
    return orientation(image)


def orientation(image: Image.Image) -> int:
    """Return how EXIF data says that a stored image is turned, 1..8; 1 is upright."""
    # Why not image.getexif: a PNG's decodes all pixels if there is no EXIF data.
    exif = Image.Image.getexif(image)
    return exif.get(EXIF_ORIENTATION, 1)


def turned_like(other: Image.Image, data: bytes) -> Image.Image:
    """Turn another image as the EXIF data of an image file says that this is turned."""
    other = other.copy()
    other.getexif()[EXIF_ORIENTATION] = stored_orientation(data)
    return ImageOps.exif_transpose(other)


def why_unreadable(error: Exception) -> str:
    """Return in one line why an image cannot be read, from the error of load_image."""
    if isinstance(error, UnidentifiedImageError):       # its own text has an address
        return "it is not an image"
    return " ".join(str(error).split()) or type(error).__name__


def load_map(data: bytes) -> Image.Image:
    """Decode the bytes of a label map: an image of one channel of class numbers.

    Raises ValueError for an image with several channels, and load_image's errors.
    """
    image = load_image(data)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
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
