"""Image files made byte by byte, of kinds that Pillow does not write."""

import io
import struct
import zlib

import numpy as np
import PIL.ExifTags
import PIL.Image

PHOTO = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)


def encoded(pixels, kind, *, orientation=None, **options):
    """Pixels, or a Pillow image, as a file, with an EXIF orientation where one is named."""
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    if orientation is not None:
        options["exif"] = PIL.Image.Exif()
        options["exif"][PIL.ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def packed_bits(values, bits):
    """Rows of numbers of few bits, each row padded to whole bytes."""
    rows = []
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8)))
    return rows


def png_of_bits(values, bits, *, palette=False, size=None, chunks=()):
    """A PNG of 1, 2 or 4 bits a pixel, grey or with a palette; ``size`` and ``chunks`` make it lie."""
    height, width = size or values.shape
    body = b"".join(b"\0" + row for row in packed_bits(values, bits))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0))]
    parts += [(b"PLTE", bytes(3 * 2**bits))] if palette else []
    parts += [*chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, parts))


def _chunk(part):
    kind, body = part
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff_of_bits(values, bits, *, white_is_zero=False):
    """An uncompressed TIFF of few bits a pixel."""
    height, width = values.shape
    body = b"".join(packed_bits(values, bits))
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, int(not white_is_zero))]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(body))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)
