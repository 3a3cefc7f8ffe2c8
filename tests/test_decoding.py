"Image files as people have them: kinds, depths, orientations, and metadata that must not cost a picture."

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from synthetic_sets import encoded, picture, png16

from dddm import decoding as decoding_module
from dddm.decoding import decode_files, decode_image


def test_file_kinds():
    rgb = np.asarray(picture(0)).transpose(2, 0, 1)
    for format in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(decode_image(encoded(picture(0), format)), rgb)
    assert np.array_equal(decode_image(encoded(picture(0, mode="L")))[0], np.asarray(picture(0).convert("L")))
    assert np.array_equal(
        decode_image(encoded(picture(0)), channels=1)[0], np.asarray(picture(0).convert("L"))
    )
    assert decode_image(encoded(picture(0, mode="P"))).shape == (3, 8, 8)
    assert decode_image(encoded(picture(0, mode="CMYK"), "JPEG")).shape == (3, 8, 8)
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert (decode_image(encoded(clear)) == 255).all()
    with pytest.raises(ValueError, match="16 bits a channel"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))


@pytest.mark.parametrize(
    "blob",
    [
        png16(0, 1),
        png16(2, 3),
        png16(4, 2),
        png16(6, 4),
        b"P6 # two\n2 2\n65535\n" + bytes(24),
        b"II*\0\x08\0\0\0\x09\0"
        + b"".join(
            struct.pack("<HHII", *tag)
            for tag in (
                (256, 3, 1, 2),
                (257, 3, 1, 2),
                (258, 3, 3, 130),
                (259, 3, 1, 1),
                (262, 3, 1, 2),
                (273, 4, 1, 136),
                (277, 3, 1, 3),
                (278, 3, 1, 2),
                (279, 4, 1, 24),
            )
        )
        + bytes(4)
        + bytes(8)
        + struct.pack("<HHH", 16, 16, 16)
        + bytes(24),
    ],
    ids=["PNG grey", "PNG", "PNG grey alpha", "PNG alpha", "PPM", "TIFF"],
)
def test_sixteen_bits_are_refused(blob):
    with pytest.raises(ValueError, match="16 bits a channel are more than 8|is not 8 bits a channel"):
        decode_image(blob)


def test_grey_stays_grey_under_transparency():
    grey = picture(3, mode="L")
    with_alpha = Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    for blob in (encoded(with_alpha), encoded(grey, transparency=44)):
        assert decode_image(blob).shape == (1, 8, 8)
    assert np.array_equal(decode_image(encoded(with_alpha)), decode_image(encoded(grey)))
    assert decode_image(encoded(picture(3), "GIF")).shape == (3, 8, 8) and decode_image(
        encoded(with_alpha), channels=3
    ).shape == (3, 8, 8)


def test_size_cuts_the_centre_and_averages():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20] = [255, 0, 0]
    pixels[:, 40:] = [0, 0, 255]
    pixels[:, 20:40] = 100
    assert (
        decode_image(encoded(Image.fromarray(pixels)), size=5) == 100
    ).all()  # nothing of the sides bleeds in
    assert np.array_equal(decode_image(encoded(picture(3)), size=8), decode_image(encoded(picture(3))))


def test_upright_by_exif():
    image, exif = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(
        decode_image(encoded(image, exif=exif)), np.asarray(image)[::-1, ::-1].transpose(2, 0, 1)
    )


def test_every_orientation():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }
    for orientation, right in turns.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        for format in ("PNG", "TIFF"):
            assert np.array_equal(
                decode_image(encoded(Image.fromarray(pixels), format, exif=exif)), right.transpose(2, 0, 1)
            )


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


PNG = encoded(picture(0))


LONG = b"x" * 3_000_000


METADATA = {
    "text": chunk(b"tEXt", b"prompt\0" + LONG),
    "packed text": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(LONG)),
    "international text": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
    "damaged text": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "profile": chunk(b"iCCP", b"big\0\0" + zlib.compress(LONG)),
    "damaged profile": chunk(b"iCCP", b"odd\0\0" + b"no zlib"),
    "many texts": chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "EXIF": chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
}


@pytest.mark.parametrize("where", [33, -12], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_costs_a_png(kind, where):
    blob = PNG[:where] + METADATA[kind] + PNG[where:]
    assert np.array_equal(decode_image(blob), decode_image(PNG))


def test_what_bad_metadata_does_not_excuse():
    "Beside a text that is too long, damaged pixels and 16 bits stay refused, and an orientation is followed."
    long = METADATA["text"]
    with pytest.raises(OSError):
        decode_image(PNG[:33] + long + PNG[33:120])
    deep = png16(2, 3)
    with pytest.raises(ValueError, match="16 bits"):
        decode_image(deep[:33] + long + deep[33:])
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet)
    turned = encoded(picture(0, (8, 6)), pnginfo=info)
    assert np.array_equal(decode_image(turned[:33] + long + turned[33:]), decode_image(turned))
    assert decode_image(turned).shape == (3, 6, 8)


def exif_block(*tags):
    "An EXIF block with `tags`, each (number, type, count, four bytes)."
    body = b"".join(
        t.to_bytes(2, "little") + k.to_bytes(2, "little") + n.to_bytes(4, "little") + v for t, k, n, v in tags
    )
    return (
        b"II*\0\x08\0\0\0"
        + len(tags).to_bytes(2, "little")
        + body
        + bytes(4)
        + (72).to_bytes(4, "little")
        + bytes(4)
    )


ODD_TAGS = {
    "resolution as text": (0x11A, 2, 3, b"72\0\0"),
    "unit as bytes": (0x128, 7, 4, b"\2\0\0\0"),
    "resolution 72/0": (0x11A, 5, 1, b"\x26\0\0\0"),
    "unknown type": (0x131, 99, 1, bytes(4)),
    "place outside": (0x131, 2, 400, b"\xff\xff\xff\x7f"),
    "huge count": (0x9286, 7, 2**31, bytes(4)),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD_TAGS)
def test_an_odd_tag_does_not_cost_the_picture_or_its_turn(name, format):
    options = dict(lossless=True) if format == "WEBP" else {}
    image = picture(0, (16, 24))
    plain = decode_image(encoded(image, format, **options))
    turned = decode_image(
        encoded(
            image,
            format,
            exif=b"Exif\0\0" + exif_block((0x112, 3, 1, b"\6\0\0\0"), ODD_TAGS[name]),
            **options,
        )
    )
    assert np.array_equal(turned, np.rot90(plain, -1, (1, 2)))


SEGMENTS = {
    "profile": (0xE2, b"ICC_PROFILE\0"),
    "Photoshop": (0xED, b"Photoshop 3.0\x008BIM\4\4\0"),
    "JFIF": (0xE0, b"JFIF\0"),
    "Adobe": (0xEE, b"Adobe"),
    "several pictures": (0xE2, b"MPF\0II*"),
    "comment": (0xFE, b"\xff\xd8\0"),
    "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0<"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_short_segment_does_not_cost_a_jpeg_or_its_turn(name):
    marker, body = SEGMENTS[name]
    segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
    exif = Image.Exif()
    exif[0x112] = 6
    for image in (picture(0, (16, 24)), picture(0, (16, 24), "CMYK"), picture(0, (16, 24), "L")):
        blob = encoded(image, "JPEG", exif=exif)
        assert np.array_equal(decode_image(blob[:2] + segment + blob[2:]), decode_image(blob))
    with pytest.raises(OSError):
        decode_image(blob[:2] + segment + blob[2:-40])


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"junk" * 20,
        exif_block((0x112, 2, 1, b"6\0\0\0")),
        exif_block((0x112, 3, 1, b"\x63\0\0\0")),
    ],
)
def test_an_unreadable_orientation_leaves_the_picture_as_it_lies(block):
    image = picture(0, (16, 24))
    assert np.array_equal(
        decode_image(encoded(image, "JPEG", exif=b"Exif\0\0" + block)), decode_image(encoded(image, "JPEG"))
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_transparent_grey_is_white_at_any_depth(bits):
    "A row of the four lowest samples; tRNS, the transparent one, counts samples as the file has them."
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    row = sum(sample << (8 * 4 - bits * (i + 1)) for i, sample in enumerate(range(4))).to_bytes(4, "big")
    data = zlib.compress(b"\0" + row[: max(1, bits // 2)])
    blob = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    blob += chunk(b"tRNS", struct.pack(">H", 1)) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    step = 255 // (2**bits - 1)
    assert decode_image(blob).tolist() == [[[0, 255, 2 * step, 3 * step]]]


def test_large_images_come_in_small_blocks(monkeypatch):
    "At most `BLOCK_BYTES` are decoded at a time, whatever the size of the images, and none is lost."
    monkeypatch.setattr(decoding_module, "BLOCK_BYTES", 3 * 8 * 8 * 5)
    files = {f"{i}": encoded(picture(i)) for i in range(12)}
    blocks = list(decode_files(files.__getitem__, list(files), np.arange(12)))
    assert [len(block.pixels) for block in blocks] == [5, 5, 2]
    assert np.concatenate([block.labels for block in blocks]).tolist() == list(range(12))
    assert np.array_equal(blocks[1].pixels[0], decode_image(files["5"]))
