"""Good files of strangers and hostile ones: images and archives."""
import functools
import io
import random
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from fuzz_mutations import mutated, odd_json
from PIL import Image, PngImagePlugin

# ---- images


def image_file(image: Image.Image, kind: str, **options) -> bytes:
    """An image as a file of some kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def claiming_png(w: int, h: int, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A png that claims to have any size; there are few pixels in it."""
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + more
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 2000))
        + png_chunk(b"IEND", b"")
    )


def compressed_zeros(n: int) -> bytes:
    """About n zero bytes, compressed, made in little memory."""
    compressor = zlib.compressobj(1)
    block = bytes(2 ** 20)
    parts = [compressor.compress(block) for _ in range(n >> 20)]
    return b"".join(parts) + compressor.flush()


@functools.cache
def image_files() -> list[bytes]:
    """Files of all kinds of images: good ones, refused ones, bombs."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8))
    rgba = rgb.convert("RGBA")
    frames = [rgb.rotate(90 * k).convert("P") for k in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6                        # orientation: turned by 90 degrees
    exif[0x010e] = "a picture"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 99, zip=True)

    files = [image_file(rgb, "PNG", exif=exif, pnginfo=text), image_file(rgba, "PNG")]
    files += [image_file(rgb.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "I;16")]
    files += [
        image_file(rgb, "JPEG", exif=exif),
        image_file(rgb.convert("CMYK"), "JPEG", progressive=True),
        image_file(frames[0], "GIF", transparency=3, **animated),
        image_file(rgb, "WEBP", exif=exif),
        image_file(rgba, "WEBP", lossless=True),
        image_file(frames[0], "WEBP", **animated),
    ]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files.append(image_file(rgb, "TIFF", compression=compression))
    files.append(image_file(rgb.convert("1"), "TIFF", compression="group4"))
    files += [image_file(rgb.convert(mode), "TIFF") for mode in "FI"]
    files += [image_file(rgb.convert(mode), "BMP") for mode in ("RGB", "P")]

    # Formats that must not be opened.
    files += [image_file(rgb, kind) for kind in ("PPM", "ICO", "PDF", "EPS")]

    # Absurd sizes, and much in little.
    zeros = compressed_zeros(30_000_000)
    files += [
        claiming_png(60_000, 60_000),
        claiming_png(8000, 8000),
        claiming_png(8000, 8000, 16, 6),
        claiming_png(0, 0),
        claiming_png(2 ** 31, 1),
        claiming_png(9, 9, more=png_chunk(b"zTXt", b"a\0\0" + zeros)),
        claiming_png(9, 9, more=png_chunk(b"iCCP", b"a\0\0" + zeros)),
    ]
    return files


@functools.cache
def label_map_files() -> list[bytes]:
    files = []
    for mode in ("1", "L", "P", "I;16"):
        for kind in ("PNG", "TIFF"):
            files.append(image_file(Image.new(mode, (20, 24), 3), kind))
    return files


# ---- archives

ROW = {"text": "a red circle", "label": 3, "boxes": [["dog", 1, 2, 9, 10]], "mask": "m.png"}

ZIPPED_NAMES = [
    "a.png", "b/c.PNG", "../../canary.png", "/canary.png", "b/../../../canary.png",
    "C:\\canary.png", "a\0.png", "x" * 5000 + ".png", "\udcff.png", "link.png", "b/", ".png",
    "a.txt", "metadata.jsonl", "日本.png", "a.png", "con.jpg",
]
TARRED_NAMES = [
    "a.png", "a.txt", "a.cls", "a.json", "b/c.1.PNG", "b/c.1.json", "../../canary.png",
    "/canary.png", "b/../../../canary.png", "./a.png", "x" * 300 + ".png", "日本.png", ".png",
    "metadata.jsonl", "link.png", "a.tar", "\udcff.png", "con.jpg",
]

# Fields in the directory of a .zip: its mark, offset from there, and width, in bytes.
ZIP_FIELDS = [
    (b"PK\1\2", 8, 2),          # flags
    (b"PK\3\4", 6, 2),          # flags, in front of the file
    (b"PK\1\2", 10, 2),         # method
    (b"PK\1\2", 20, 4),         # size, compressed
    (b"PK\1\2", 24, 4),         # size
    (b"PK\1\2", 42, 4),         # place
    (b"PK\5\6", 8, 2),          # number of files on this disk
    (b"PK\5\6", 12, 4),         # size of the directory
]


def is_image(name: str) -> bool:
    return name.lower().endswith(("png", "jpg"))


@functools.cache
def zip_bomb(name: str) -> bytes:
    """A .zip with a file of 1.5 GB in less than 10 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("version", "3")
        with archive.open(name, "w") as member:
            for _ in range(1500):
                member.write(b"\n" * 10 ** 6)
    return file.getvalue()


def odd_zip(rng: random.Random) -> bytes:
    """Odd names, links, encryption, and lies in the directory; sometimes a bomb."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        names = rng.sample(ZIPPED_NAMES, rng.randrange(1, 8))
        for name in names * rng.choice((1, 1, 2)):
            info = zipfile.ZipInfo(name.encode("utf8", "replace").decode())
            info.compress_type = rng.choice((0, 8, 8, 12, 14))
            data = image_files()[0] if is_image(name) else b'{"file_name": "a.png"}'
            if name == "link.png":
                info.external_attr = 0o120777 << 16
                data = b"/etc/passwd"
            archive.writestr(info, data, compresslevel=1)

    data = bytearray(file.getvalue())
    for mark, offset, width in ZIP_FIELDS:
        if rng.random() < 0.1 and mark in data:
            i = data.find(mark) + offset
            one = b"\1".ljust(width, b"\0")
            data[i:i + width] = rng.choice((rng.randbytes(width), b"\xff" * width, one))
    if rng.random() < 0.02:
        return zip_bomb(rng.choice(("metadata.jsonl", "a.png", "a.txt")))
    return mutated(rng, bytes(data)) if rng.random() < 0.3 else bytes(data)


MEMBER_TYPES = [tarfile.REGTYPE] * 12 + [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
    tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"\x00", b"Z",
]
PAX_HEADERS = ("size", "path", "GNU.sparse.map", "GNU.sparse.major", "linkpath", "mtime")
PAX_VALUES = ("-1", "99999999999999", "/canary.png", "0,9", "é")
TAR_SIZES = (
    b"77777777777\0", b"\x80" + bytes(10) + b"\7", b"\xff" * 12, b"-0000000001\0", b"00000000001\0",
)


def odd_tar(rng: random.Random) -> bytes:
    """Odd names, links, devices, sparse members, pax headers, and sizes that lie."""
    file = io.BytesIO()
    how = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    mode = rng.choice(("w", "w", "w", "w", "w", "w", "w:gz", "w:xz"))
    with tarfile.open(fileobj=file, mode=mode, format=how, errors="surrogateescape") as archive:
        for name in rng.choices(TARRED_NAMES, k=rng.randrange(1, 12)):
            is_short = how == tarfile.USTAR_FORMAT
            member = tarfile.TarInfo(name[:90] if is_short else name)
            data = image_files()[0]
            if not is_image(name):
                data = odd_json(rng, ROW).encode("utf8", "surrogatepass")
            member.type = rng.choice(MEMBER_TYPES)
            member.linkname = rng.choice(("/etc/passwd", "a.png", "../../canary"))
            if how == tarfile.PAX_FORMAT and rng.random() < 0.1:
                member.pax_headers = {rng.choice(PAX_HEADERS): rng.choice(PAX_VALUES)}
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    data = bytearray(file.getvalue())
    if rng.random() < 0.2 and len(data) > 512:
        lie_about_a_size(rng, data)
    return mutated(rng, bytes(data)) if rng.random() < 0.3 else bytes(data)


def lie_about_a_size(rng: random.Random, tar: bytearray) -> None:
    """Change the size in one of the first headers; its checksum holds."""
    i = 512 * rng.randrange(min(len(tar) // 512, 9))
    tar[i + 124:i + 136] = rng.choice(TAR_SIZES)
    tar[i + 148:i + 156] = b" " * 8
    tar[i + 148:i + 156] = b"%06o\0 " % sum(tar[i:i + 512])
