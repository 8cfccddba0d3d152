"""Odd pictures: each is either read by a stated rule, or refused by one clear error, soon and in little memory.

A case is a name, what makes the picture (called in a child process that may be killed) and what must come of it: the
size and the first pixel, or the error. Files are made by Pillow or by hand, byte by byte.
"""

import base64
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guarded import Child
from PIL import Image

from minivlm.processing.images import load_image

Made = Callable[[Path], Any]  # an empty folder → what is given to `load_image`


def file(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    """A picture as the bytes of a file; a red one of 3x2 if none is given."""
    stream = io.BytesIO()
    (image or Image.new("RGB", (3, 2), (200, 0, 0))).save(stream, kind, **options)
    return stream.getvalue()


def frames(kind: str, **options: Any) -> bytes:
    """A red picture, then a blue one."""
    return file(kind, save_all=True, append_images=[Image.new("RGB", (3, 2), (0, 0, 200))], **options)


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes | None = None, *extra: bytes) -> bytes:
    """A PNG from its parts: with any size in its header, and any chunks before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    others = b"".join(chunk(each[:4], each[4:]) for each in extra)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100) if data is None else data))
    return b"\x89PNG\r\n\x1a\n" + header + others + pixels + chunk(b"IEND", b"")


def oriented(tag: int, kind: str = "JPEG") -> bytes:
    """3x2, its first row red, its second blue, to be turned."""
    image = Image.new("RGB", (48, 32), (250, 0, 0))
    image.paste((0, 0, 250), (0, 16, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = tag
    return file(kind, image, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = file("JPEG", Image.new("L", (64, 64), 100), progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


def tiff(width: int, height: int, mode: str = "L", **tags: int) -> bytes:
    """A TIFF with other numbers in its header than its picture has."""
    whole = bytearray(file("TIFF", Image.new(mode, (4, 4), 7)))
    entries = struct.unpack_from("<I", whole, 4)[0]
    for place in range(entries + 2, entries + 2 + 12 * struct.unpack_from("<H", whole, entries)[0], 12):
        tag = struct.unpack_from("<H", whole, place)[0]
        for number, value in ((256, width), (257, height), *((int(key[1:]), value) for key, value in tags.items())):
            if tag == number:
                struct.pack_into("<HI", whole, place + 2, 4, 1)
                struct.pack_into("<I", whole, place + 8, value)
    return bytes(whole)


def circle() -> bytes:
    """A TIFF whose first page is followed by its first page."""
    whole = bytearray(file("TIFF"))
    page = struct.unpack_from("<I", whole, 4)[0]
    struct.pack_into("<I", whole, page + 2 + 12 * struct.unpack_from("<H", whole, page)[0], page)
    return bytes(whole)


def written(content: bytes, name: str = "x.png") -> Made:
    """The path of a file with this content."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def special(what: str) -> Made:
    """A path that is no file."""

    def make(folder: Path) -> str:
        if what == "pipe":
            os.mkfifo(folder / "x.png")
        elif what == "folder":
            (folder / "x.png").mkdir()
        else:
            (folder / "x.png").symlink_to(folder / "x.png" if what == "loop" else what)
        return str(folder / "x.png")

    return make


def sparse(folder: Path) -> Path:
    with (folder / "x.bmp").open("wb") as stream:
        stream.write(file("BMP"))
        stream.truncate(2**40)
    return folder / "x.bmp"


def opened(content: bytes) -> Made:
    """A `PIL.Image` that is not decoded yet."""
    return lambda folder: Image.open(io.BytesIO(content))


def plain(value: Any) -> Made:
    return lambda folder: value


def mode(name: str, value: Any, **info: Any) -> Made:
    """A `PIL.Image` of one colour."""

    def make(folder: Path) -> Image.Image:
        image = Image.new(name, (3, 2), value)
        image.info.update(info)
        return image

    return make


def palette(kind: str, transparency: Any = None) -> Image.Image:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50], kind)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def bomb(kind: bytes) -> Made:
    """A PNG with 128 MB of zeros in a chunk, packed; made when it is asked for, which takes a while."""
    return lambda folder: png(1, 1, 8, 2, b"\0\x01\x02\x03", kind + zlib.compress(bytes(2**27)))


def closed(folder: Path) -> Image.Image:
    image = Image.open(io.BytesIO(file("PNG")))
    image.close()
    return image


RED, TURNED = ((3, 2), (200, 0, 0)), ((32, 48), None)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n%%EndComments\n(%pipe%touch run) (w) file\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
H, W = 5, 7

FILES: dict[str, tuple[Made, Any]] = {
    # ---- what cameras, screens and the web make
    "JPEG": (plain(file("JPEG", quality=100, subsampling=0)), ((3, 2), None)),
    "progressive JPEG": (plain(scans(1)), ((64, 64), (100, 100, 100))),
    "JPEG in CMYK": (plain(file("JPEG", Image.new("CMYK", (3, 2)))), ((3, 2), (255, 255, 255))),
    "JPEG with rubbish after its end": (plain(file("JPEG") + b"rubbish" * 99), ((3, 2), None)),
    "two pictures in one JPEG (MPO)": (plain(frames("MPO")), ((3, 2), None)),
    "PNG": (plain(file("PNG")), RED),
    "interlaced WebP without loss": (plain(file("WEBP", lossless=True)), RED),
    "BMP": (plain(file("BMP")), RED),
    "TIFF, packed by deflate": (plain(file("TIFF", compression="tiff_deflate")), RED),
    "GIF": (plain(file("GIF")), RED),
    "animated GIF: the first frame": (plain(frames("GIF")), RED),
    "animated WebP: the first frame": (plain(frames("WEBP", lossless=True)), RED),
    "animated PNG: the first frame": (plain(frames("PNG")), RED),
    "TIFF of several pages: the first": (
        plain(frames("TIFF")),
        RED,
    ),
    "a file named .txt": (written(file("PNG"), "x.txt"), RED),
    "a JPEG named .png": (written(file("JPEG")), ((3, 2), None)),
    "a colour profile that is none": (plain(file("PNG", icc_profile=b"nonsense" * 99)), RED),
    "a name with blanks, ü and a new line": (written(file("PNG"), "a ü\n%41.png"), RED),
    # ---- turned by EXIF, on every route
    "EXIF, bytes": (plain(oriented(6)), TURNED),
    "EXIF, bytearray": (plain(bytearray(oriented(8))), TURNED),
    "EXIF, memoryview": (plain(memoryview(oriented(5))), TURNED),
    "EXIF, path": (written(oriented(6)), TURNED),
    "EXIF, PIL": (opened(oriented(6)), TURNED),
    "EXIF, data: URL": (plain("data:image/jpeg;base64," + base64.b64encode(oriented(7)).decode()), TURNED),
    "EXIF, PNG": (plain(oriented(6, "PNG")), TURNED),
    "EXIF, WebP": (plain(oriented(6, "WEBP")), TURNED),
    "EXIF, TIFF": (plain(oriented(6, "TIFF")), TURNED),
    "EXIF 3: upside down": (plain(oriented(3, "PNG")), ((48, 32), (0, 0, 250))),
    "EXIF that makes no sense": (plain(oriented(77, "PNG")), ((48, 32), (250, 0, 0))),
    "EXIF that is rubbish": (plain(file("PNG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" * 9)), RED),
    # ---- modes
    "1 bit": (mode("1", 1), ((3, 2), (255, 255, 255))),
    "grey": (mode("L", 70), ((3, 2), (70, 70, 70))),
    "grey with alpha: dropped": (mode("LA", (70, 0)), ((3, 2), (70, 70, 70))),
    "RGBA: alpha dropped": (mode("RGBA", (10, 20, 30, 0)), ((3, 2), (10, 20, 30))),
    "RGB with a transparent colour": (mode("RGB", (9, 8, 7), transparency=(9, 8, 7)), ((3, 2), (9, 8, 7))),
    "palette": (plain(palette("RGB")), ((3, 2), (200, 100, 50))),
    "palette with a transparent entry": (plain(palette("RGB", 1)), ((3, 2), (200, 100, 50))),
    "palette with alpha for each entry": (plain(palette("RGB", b"\xff\x00")), ((3, 2), (200, 100, 50))),
    "PNG of a palette with alpha": (plain(file("PNG", palette("RGB", b"\xff\x00"))), ((3, 2), (200, 100, 50))),
    "palette and alpha (PA)": (lambda folder: palette("RGB").convert("PA"), ((3, 2), (200, 100, 50))),
    "CMYK": (mode("CMYK", (100, 50, 20, 10)), ((3, 2), (149, 197, 226))),
    "YCbCr": (mode("YCbCr", (76, 85, 255)), ((3, 2), (254, 0, 0))),
    "HSV": (mode("HSV", (0, 255, 200)), ((3, 2), (200, 0, 0))),
    "LAB": (mode("LAB", (255, 128, 128)), ((3, 2), None)),
    "RGBa, premultiplied": (mode("RGBa", (10, 20, 30, 255)), ((3, 2), (10, 20, 30))),
    "La, premultiplied: Pillow has no way": (mode("La", (9, 9)), "ValueError: .*mode La"),
    "16-bit grey: by 1/257": (mode("I;16", 257 * 80), ((3, 2), (80, 80, 80))),
    "16-bit grey, big-endian": (mode("I;16B", 257 * 80), ((3, 2), (80, 80, 80))),
    "16-bit grey PNG": (
        plain(png(3, 2, 16, 0, b"\0" + b"\x50\x50" * 3 + b"\0" + b"\x50\x50" * 3)),
        ((3, 2), (80,) * 3),
    ),
    "16-bit RGB PNG: the high bytes": (plain(png(1, 1, 16, 2, b"\0\x50\xff\x28\0\x14\0")), ((1, 1), (80, 40, 20))),
    "16-bit grey TIFF": (plain(file("TIFF", Image.new("I;16", (3, 2), 257 * 9))), ((3, 2), (9, 9, 9))),
    "32-bit integers: no range": (mode("I", 70), "ValueError: .*no fixed range"),
    "32-bit floats: no range": (mode("F", 0.5), "ValueError: .*no fixed range"),
    "a TIFF of floats": (plain(file("TIFF", Image.new("F", (3, 2), 0.5))), "ValueError: .*no fixed range"),
    # ---- too large, too long, too costly
    "PNG that says 50,000x50,000": (plain(png(50_000, 50_000)), "ValueError: .*limit"),
    "PNG that says 2³¹ − 1 a side": (plain(png(2**31 - 1, 2**31 - 1)), "ValueError: .*limit"),
    "PNG that says 1x100,000": (plain(png(1, 100_000)), "ValueError: .*a side is at most 65,535"),
    "PNG of 1x65,535": (plain(png(1, 65_535, 8, 0, bytes(2 * 65_535))), ((1, 65_535), (0, 0, 0))),
    "BMP that says 60,000x60,000": (
        plain(file("BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + file("BMP")[26:]),
        "ValueError: .*limit",
    ),
    "GIF that says 65,535x65,535": (plain(b"GIF89a" + b"\xff" * 4 + file("GIF")[10:]), "ValueError: .*limit"),
    "TIFF that says 2³² − 1 a side": (plain(tiff(2**32 - 1, 2**32 - 1)), "(ValueError|OSError): .*"),
    "TIFF that says its strip has 4 GB": (plain(tiff(4, 4, t279=2**32 - 1)), ((4, 4), (7, 7, 7))),
    "TIFF whose strips lie behind its end": (plain(tiff(4, 4, t273=2**31)), "OSError: .*damaged"),
    "TIFF of 60,000 bits a sample": (plain(tiff(4, 4, t258=60_000)), "(ValueError|OSError): .*"),
    "GIF whose frame has 60,000x60,000 and lies outside": (
        plain(file("GIF").replace(b",\0\0\0\0\3\0\2\0", b"," + struct.pack("<4H", *[60_000] * 4))),
        "ValueError: .*limit",
    ),
    "PNG with a second header, of 60,000x60,000": (
        plain(png(2, 2, 8, 2, None, b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))),
        "ValueError: .*limit",
    ),
    "TIFF whose pages go in a circle": (plain(circle()), RED),
    "JPEG of 3,000 scans": (plain(scans(3000)), "ValueError: .*3005 scans"),
    "the same, open": (opened(scans(3000)), "ValueError: .*3005 scans"),
    "PNG with a text of 128 MB, packed": (bomb(b"zTXta\0\0"), "OSError: .*too large"),
    "PNG with a profile of 128 MB, packed": (bomb(b"iCCPa\0\0"), "OSError: .*too large"),
    "PNG whose pixels unpack to 128 MB": (
        lambda folder: png(1, 1, 8, 2, b"\0\x01\x02\x03" + bytes(2**27)),
        ((1, 1), (1, 2, 3)),
    ),
    "a file of 1 TB": (sparse, "ValueError: .*more than the 536,870,912"),
    # ---- broken
    "no bytes": (plain(b""), "ValueError: .*it is empty"),
    "an empty file": (written(b""), "ValueError: .*it is empty"),
    "JPEG cut in half": (plain(file("JPEG", noise())[:2000]), "OSError: .*damaged or cut off"),
    "PNG cut in half": (plain(file("PNG", noise())[:2000]), "OSError: .*damaged or cut off"),
    "WebP cut in half": (plain(file("WEBP", noise())[:1000]), "(OSError|ValueError): .*"),
    "GIF cut in half": (plain(file("GIF", noise())[:2000]), "OSError: .*damaged or cut off"),
    "BMP cut in half": (plain(file("BMP", noise())[:2000]), "OSError: .*damaged or cut off"),
    "TIFF cut in half": (plain(file("TIFF", noise())[:2000]), "(OSError|ValueError): .*"),
    "PNG with a wrong checksum": (plain(file("PNG").replace(b"IDAT", b"IDAT\0", 1)), "OSError: .*"),
    "PNG with pixels that do not unpack": (plain(file("PNG")[:45] + bytes(40)), "OSError: .*"),
    "cut off, open": (opened(file("JPEG", noise())[:2000]), "OSError: the PIL image is damaged"),
    "closed": (closed, "OSError: the PIL image is damaged"),
    "JPEG of a million bytes that fill": (
        plain(b"\xff\xd8" + b"\xff" * 2**20 + file("JPEG")[2:]),
        "OSError: .*more than 1,000,000 parts",
    ),
    "palette of no colours": (lambda folder: Image.new("P", (3, 2), 200), "ValueError: .*palette of no colours"),
    "PNG without its palette": (plain(png(4, 1, 4, 3, b"\0\x12\x34")), "ValueError: .*palette of no colours"),
    "PNG of no width": (plain(png(0, 5)), "ValueError: .*its header is damaged"),
    "palette with alpha for 1,000 entries": (plain(palette("RGB", b"\0" * 1000)), "ValueError: .*mode P"),
    "JPEG of no height": (plain(file("JPEG").replace(b"\x08\0\x02\0\x03", b"\x08\0\0\0\x03")), "ValueError: .*damaged"),
    # ---- no pictures
    "EPS": (plain(EPS), "ValueError: .*PostScript"),
    "EPS, open: it would be run": (opened(EPS), "ValueError: .*EPS"),
    "PDF": (plain(b"%PDF-1.7\n" * 99), "ValueError: .*PDF"),
    "SVG": (plain(SVG), "ValueError: .*SVG"),
    "SVG behind an XML header": (plain(b'<?xml version="1.0"?>\n' + SVG), "ValueError: .*SVG"),
    "a web page": (plain(b"<!DOCTYPE html><html></html>"), "ValueError: .*web page"),
    "HEIC": (plain(b"\0\0\0\x18ftypheic" + bytes(99)), "ValueError: .*HEIC"),
    "a Git LFS pointer": (
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"ValueError: .*.*Git LFS pointer",
    ),
    "PPM, whose decoder is not asked": (plain(b"P6 1 1 255 abc"), "ValueError: .*it begins with"),
    "text": (plain(b"a picture of a cat"), "ValueError: .*it begins with"),
    "only the first bytes of a PNG": (plain(b"\x89PNG\r\n\x1a\n"), "(ValueError|OSError): .*"),
    # ---- paths
    "no such file": (plain("nowhere.png"), "OSError: no image at 'nowhere.png'"),
    "an empty name": (plain(""), "OSError: no image at ''"),
    "a NUL in the name": (plain("a\0b.png"), "OSError: .*(cannot be|no image)"),
    "half a surrogate pair in the name": (plain("\ud800.png"), "OSError: .*(cannot be|no image)"),
    "a name of 5,000 letters": (plain("x" * 5000), "OSError: .*(cannot be|no image)"),
    "somebody else's home": (plain("~nobody-of-this-name/x.png"), "OSError: .*(cannot be|no image)"),
    "a name of a million letters": (plain("x" * 10**6), "OSError: .{0,300}too long$"),
    "a folder": (special("folder"), "OSError: no image"),
    "a pipe that nobody writes to": (special("pipe"), "OSError: no image"),
    "/dev/zero": (special("/dev/zero"), "OSError: no image"),
    "/dev/tty": (special("/dev/tty"), "OSError: no image"),
    "a link to itself": (special("loop"), "OSError: .*(cannot be|no image)"),
    "file: URL": (plain("file:///etc/hostname"), "ValueError: only http"),
    "ftp: URL": (plain("ftp://host/x.png"), "ValueError: only http"),
    "data: URL of no picture": (plain("data:image/png;base64,AAAA"), "ValueError: .*it begins with"),
    "data: URL without base64": (plain("data:,hello"), "ValueError: a data: URL holds base64"),
    "data: URL of broken base64": (plain("data:image/png;base64,!!!!"), "ValueError: .*not valid base64"),
    "DATA: in capitals, with new lines": (
        plain("DATA:image/png;BASE64," + base64.encodebytes(file("PNG")).decode()),
        RED,
    ),
    # ---- arrays and tensors
    "(H, W, 3)": (plain(np.full((H, W, 3), 9, np.uint8)), ((W, H), (9, 9, 9))),
    "(3, H, W)": (plain(np.full((3, H, W), 9, np.uint8)), ((W, H), (9, 9, 9))),
    "(4, H, W)": (plain(np.full((4, H, W), 9, np.uint8)), ((W, H), (9, 9, 9))),
    "(H, W)": (plain(np.full((H, W), 9, np.uint8)), ((W, H), (9, 9, 9))),
    "(H, W, 1)": (plain(np.full((H, W, 1), 9, np.uint8)), ((W, H), (9, 9, 9))),
    "an array read backwards": (
        plain(np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)[::-1, ::-1]),
        ((W, H), None),
    ),
    "float64 in [0, 1]": (plain(np.full((H, W), 0.5)), ((W, H), (128, 128, 128))),
    "big-endian floats": (plain(np.full((H, W), 0.5, ">f4")), ((W, H), (128, 128, 128))),
    "half precision": (plain(np.full((H, W), 0.5, np.float16)), ((W, H), (128, 128, 128))),
    "(3, H, 3): which is the colour?": (plain(np.zeros((3, H, 3), np.uint8)), "ValueError: .*both"),
    "(3, W, 3)": (plain(np.zeros((3, W, 3), np.uint8)), "ValueError: .*both"),
    "(1, W, 3)": (plain(np.zeros((1, W, 3), np.uint8)), "ValueError: .*both"),
    "(H, W, 2)": (plain(np.zeros((H, W, 2), np.uint8)), "ValueError: .*neither"),
    "(H, W, W)": (plain(np.zeros((H, W, W), np.uint8)), "ValueError: .*neither"),
    "a batch of one": (plain(np.zeros((1, H, W, 3), np.uint8)), "ValueError: .*pass a list"),
    "no dimension": (plain(np.array(7, np.uint8)), "ValueError: .*2 or 3 dimensions"),
    "one dimension": (plain(np.zeros(9, np.uint8)), "ValueError: .*2 or 3 dimensions"),
    "no rows": (plain(np.zeros((0, W, 3), np.uint8)), "ValueError: .*empty"),
    "no columns": (plain(np.zeros((H, 0), np.uint8)), "ValueError: .*empty"),
    "a hundred thousand columns": (plain(np.zeros((1, 100_000), np.uint8)), "ValueError: .*a side is at most"),
    "ten thousand million zeros": (plain(np.broadcast_to(np.uint8(0), (10**5, 10**5))), "ValueError: .*at most"),
    "int64": (plain(np.full((H, W), 9, np.int64)), ((W, H), (9, 9, 9))),
    "int64 above 255": (plain(np.full((H, W), 256)), "ValueError: .*0..255.*256"),
    "int64 below 0": (plain(np.full((H, W), -1)), "ValueError: .*0..255.*-1"),
    "uint16": (plain(np.full((H, W), 255, np.uint16)), ((W, H), (255, 255, 255))),
    "16 bits in uint16": (plain(np.full((H, W), 65535, np.uint16)), "ValueError: .*0..255.*scale"),
    "int64 tensor": (plain(torch.full((3, H, W), 9)), ((W, H), (9, 9, 9))),
    "bool": (plain(np.zeros((H, W), bool)), "ValueError: .*bool"),
    "complex": (plain(np.zeros((H, W), complex)), "ValueError: .*complex"),
    "objects": (plain(np.full((H, W), None)), "ValueError: .*object"),
    "texts": (plain(np.full((H, W), "a")), "ValueError: .*or floats"),
    "dates": (plain(np.zeros((H, W), "datetime64[s]")), "ValueError: .*or floats"),
    "floats to 255": (plain(np.full((H, W), 200.0)), ((W, H), (200, 200, 200))),
    "float32 between whole numbers": (plain(np.full((H, W), 200.6, np.float32)), ((W, H), (201, 201, 201))),
    "floats above 255": (plain(np.full((H, W), 255.5)), "ValueError: .*clip them"),
    "floats just above 1": (plain(np.full((H, W), 1.0001)), "ValueError: .*clip them"),
    "normalised floats": (plain(np.full((H, W), -1.5)), "ValueError: .*undo the normalisation"),
    "NaN": (plain(np.full((H, W), np.nan)), r"ValueError: .*\[0, 1\]"),
    "one NaN": (plain(np.where(np.arange(H * W).reshape(H, W) == 9, np.nan, 0.5)), r"ValueError: .*\[0, 1\]"),
    "infinity": (plain(np.full((H, W), np.inf)), r"ValueError: .*\[0, 1\]"),
    "a masked array": (plain(np.ma.array(np.zeros((H, W), np.uint8), mask=True)), "ValueError: .*filled"),
    "records": (plain(np.zeros((H, W), [("r", "u1")])), "ValueError: .*or floats"),
    "bfloat16 tensor": (plain(torch.full((3, H, W), 0.5, dtype=torch.bfloat16)), ((W, H), (128, 128, 128))),
    "float8 tensor": (plain(torch.full((3, H, W), 0.5).to(torch.float8_e4m3fn)), ((W, H), (128, 128, 128))),
    "quantised tensor": (
        lambda folder: torch.quantize_per_tensor(torch.zeros(H, W), 0.1, 0, torch.quint8),
        "ValueError: .*quint8.* has no pixels",
    ),
    "tensor with gradient": (plain(torch.full((3, H, W), 1.0, requires_grad=True)), ((W, H), (255, 255, 255))),
    "tensor on the meta device": (plain(torch.empty(3, H, W, device="meta")), "ValueError: .*meta has no pixels"),
    "sparse tensor": (plain(torch.zeros(H, W).to_sparse()), "ValueError: .*sparse.* has no pixels"),
    "int32 tensor": (plain(torch.full((H, W), 9, dtype=torch.int32)), ((W, H), (9, 9, 9))),
    "bool tensor": (plain(torch.zeros(H, W, dtype=torch.bool)), "ValueError: .*bool"),
    # ---- other things
    "None": (plain(None), "TypeError: .*NoneType"),
    "a number": (plain(3), "TypeError: .*int"),
    "a list of names": (plain(["a.png"]), "TypeError: .*list"),
    "a dict": (plain({"url": "a.png"}), "TypeError: .*dict"),
    "an open file": (plain(io.BytesIO(file("PNG"))), r"TypeError: .*BytesIO \(pass what its read\(\) gives\)"),
    "a PIL image of no columns": (lambda folder: Image.new("RGB", (0, 5)), "ValueError: .*empty"),
    "a PIL image of no rows": (lambda folder: Image.new("RGB", (5, 0)), "ValueError: .*empty"),
    "a generator": (lambda folder: (x for x in "ab"), "TypeError: .*generator"),
}


def look(name: str, folder: Path) -> tuple[tuple[int, int], tuple[int, ...]]:
    """In the child: the size and the first pixel of a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = load_image(FILES[name][0](folder))
    assert image.mode == "RGB"
    return image.size, image.getpixel((0, 0))


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


@pytest.mark.parametrize("name", FILES)
def test_odd_picture(child, tmp_path, name):
    how, found = child.run(look, name, tmp_path)
    expected = FILES[name][1]
    if isinstance(expected, str):
        assert how == "raised", found
        assert re.match(expected, found), found
        return
    assert how == "returned", found
    size, pixel = expected
    assert found[0] == size
    assert pixel is None or found[1] == pixel


def test_the_table_is_long_enough():
    refused = sum(isinstance(expected, str) for _, expected in FILES.values())
    page = Path(__file__).parents[2] / "docs" / "input.md"
    row = f"| {len(FILES)} | {len(FILES) - refused} read by a stated rule, {refused} refused"
    assert row in page.read_text(encoding="utf-8")
