"""Every hostile file gives upright pixels or the right verdict, and costs neither memory nor minutes."""

import io
import json
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from tests.needs import TESTDATA
from workers.errors import AssetError, ErrorKind
from workers.images.decode import MAX_BYTES, decode, thumbnail_jpeg

NASTY = TESTDATA / "nasty"
ENTRIES = json.loads((NASTY / "nasty.json").read_text())["files"] if (NASTY / "nasty.json").exists() else []
NEEDS_NASTY = pytest.mark.usefixtures("testdata")

# workers.images silences Pillow's warnings for its process; pytest makes them errors again for each test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")

# What each file that nasty.json wants refused must be refused as.
REFUSED_AS = {
    "decompression_bomb.gif": {"too_large"},
    "bomb_30000x30000.png": {"too_large"},
    "truncated_jpeg.jpg": {"truncated"},
    "truncated_image.png": {"truncated"},
    "half_photo.jpg": {"truncated"},
    "broken.png": {"not_image"},
    "xhdn0g08.png": {"not_image"},
    "zero_width.gif": {"not_image"},
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": {"truncated"},
    "zero_bytes.jpg": {"not_image"},
    "s3_error_body.jpg": {"not_image"},
    "random_bytes.jpg": {"not_image"},
    "corrupted.heic": {"truncated"},
}

# Its note asks for the primary picture, which is grey, and its colours are those of the first: test_heif.py has it.
OF_ANOTHER_PICTURE = ("zPug_3.heic",)


def gradient(width=60, height=40, mode="RGB"):
    """A picture without any symmetry."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([across, down, (across + down) / 4], axis=2).astype(np.uint8)
    rgb[: height // 3, : width // 4] = (250, 10, 120)
    return Image.fromarray(rgb).convert(mode)


def saved(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def kind_of(data, **options):
    with pytest.raises(AssetError) as caught:
        decode(data, name="x.jpg", **options)
    assert str(caught.value).startswith("x.jpg: ")
    return caught.value.kind


def image_or_verdict(data, **options):
    try:
        return decode(data, **options), None
    except AssetError as error:
        return None, error


# --- the hostile files


@NEEDS_NASTY
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["file"] for entry in ENTRIES])
def test_a_hostile_file_gives_what_its_description_expects(entry, capfd):
    data = (NASTY / "files" / entry["file"]).read_bytes()

    image, verdict = image_or_verdict(data, name=entry["file"])

    if verdict:
        assert entry["expect"] != "process", verdict
        assert entry["file"] in str(verdict)
        if entry["expect"] == "reject":
            assert verdict.kind in REFUSED_AS[entry["file"]]
    else:
        assert entry["expect"] != "reject"
        assert_upright_rgb(image, entry["display_size"])
        if entry.get("ref8x8") and entry.get("refpolicy") != "either" and entry["file"] not in OF_ANOTHER_PICTURE:
            assert_looks_like(image, entry)

    assert capfd.readouterr() == ("", "")


def assert_upright_rgb(image, size_wh):
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.shape == (size_wh[1], size_wh[0], 3)


def assert_looks_like(image, entry):
    small = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX)).reshape(64, 3).astype(int)
    reference = np.asarray(entry["ref8x8"]).reshape(64, 3)
    tolerance = 25 if entry["mode"] in ("CMYK", "LAB") else 12
    assert np.abs(small - reference).max() <= tolerance


@NEEDS_NASTY
def test_pictures_with_the_eight_orientations_are_the_same_upright():
    means = []
    for orientation in range(1, 9):
        image = decode((NASTY / "files" / f"Landscape_{orientation}.jpg").read_bytes(), name="x")
        means.append(np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)).astype(int))

    assert all(np.abs(mean - means[0]).mean() <= 3 for mean in means)  # each shows its number


DECODE_AND_MEASURE = """
import resource, sys
from pathlib import Path
from tests.needs import TESTDATA
from workers.errors import AssetError
from workers.images.decode import decode
files = {path: Path(path).read_bytes() for path in sys.argv[1:]}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path, data in files.items():
    try:
        decode(data, name="bomb")
        outcome = "decoded"
    except AssetError as error:
        outcome = error.kind.value
    print(outcome, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def webp_of_huge_canvas():
    flags_and_size = bytes([2, 0, 0, 0]) + (16382).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + flags_and_size + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = saved(gradient(), "WEBP")[12:]
    anmf = bytes(6) + (59).to_bytes(3, "little") + (39).to_bytes(3, "little") + bytes(4) + frame
    body += b"ANMF" + struct.pack("<I", len(anmf)) + anmf
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_of_a_million_strips():
    strips = 3_000_000
    header = [(256, 4, 1, 10), (257, 4, 1, strips), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    header += [(273, 4, strips, 122), (278, 4, 1, 1), (279, 4, strips, 122), (277, 3, 1, 1)]
    directory = struct.pack("<H", len(header)) + b"".join(struct.pack("<HHII", *entry) for entry in header)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(122, b"\0") + bytes(4 * strips)


@NEEDS_NASTY
def test_bombs_are_refused_without_memory(tmp_path):
    (tmp_path / "canvas.webp").write_bytes(webp_of_huge_canvas())
    (tmp_path / "strips.tif").write_bytes(tiff_of_a_million_strips())
    paths = [
        NASTY / "files" / entry["file"] for entry in ENTRIES if entry["bytes"] < 120_000 and "bomb" in entry["file"]
    ]
    paths += [NASTY / "files" / "png_decompression_dos.png", *sorted(tmp_path.iterdir())]

    done = subprocess.run(
        [sys.executable, "-c", DECODE_AND_MEASURE, *paths], capture_output=True, text=True, check=True, timeout=300
    )

    outcomes = dict(zip(paths, (line.split() for line in done.stdout.splitlines()), strict=True))
    assert done.stderr == ""
    assert len(outcomes) == 5
    for outcome, grown_mb in outcomes.values():
        assert outcome == "too_large"
        assert int(grown_mb) < 32


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    plain = saved(Image.new("L", (3000, 3000), 128), "JPEG", progressive=True)
    last_scan = plain[plain.rindex(b"\xff\xc4") : -2]

    bomb = plain[:-2] + last_scan * 2000 + plain[-2:]

    assert len(bomb) < 200_000
    assert kind_of(bomb) == ErrorKind.DECODE_TIMEOUT
    assert decode(plain, name="x").shape == (3000, 3000, 3)


def test_an_end_marker_hidden_in_a_comment_does_not_hide_scans():
    plain = saved(Image.new("L", (3000, 3000), 128), "JPEG", progressive=True)
    last_scan = plain[plain.rindex(b"\xff\xc4") : -2]

    assert kind_of(plain[:-2] + b"\xff\xfe\0\4\xff\xd9" + last_scan * 2000 + plain[-2:]) == ErrorKind.DECODE_TIMEOUT


PLAIN_PNG, PLAIN_GIF, PLAIN_JPEG = (saved(gradient(), kind) for kind in ("PNG", "GIF", "JPEG"))
GIF_BLOCKS = 13 + 3 * 256  # behind the header and the palette


@pytest.mark.parametrize(
    "tedious",
    [
        PLAIN_JPEG[:2] + b"\xff\xe5\0\2" * 200_000 + PLAIN_JPEG[2:],
        PLAIN_JPEG[:20] + b"junk" * 50_000 + PLAIN_JPEG[20:],
        PLAIN_JPEG[:2] + b"\xff" * 200_000 + PLAIN_JPEG[2:],
        PLAIN_PNG[:33] + b"\0\0\0\0teSt\x1b\xd6\x8a\x5b" * 200_000 + PLAIN_PNG[33:],
        PLAIN_GIF[:GIF_BLOCKS] + b"!\xfe" + b"\1x" * 200_000 + b"\0" + PLAIN_GIF[GIF_BLOCKS:],
        PLAIN_GIF[:GIF_BLOCKS] + b"junk" * 50_000 + PLAIN_GIF[GIF_BLOCKS:],
    ],
    ids=["segments", "junk", "padding", "chunks", "comment", "stray bytes"],
)
def test_a_file_of_endless_pieces_is_refused_before_they_are_parsed(tedious):
    assert kind_of(tedious) == ErrorKind.DECODE_TIMEOUT


@pytest.mark.parametrize("opening", [b"<!---->", b"<?xml ?>", b"<!--", b" ", b"\xff"])
def test_sniffing_takes_no_time_whatever_the_bytes_are(opening):
    assert kind_of(opening * 500_000) in (ErrorKind.NOT_IMAGE, ErrorKind.DECODE_TIMEOUT)


def test_bytes_behind_the_picture_do_not_count_as_scans():
    trailer = b"\xff\xda" * 5000

    assert decode(saved(gradient(2000, 2000), "JPEG", progressive=True) + trailer, name="x").shape == (2000, 2000, 3)


# --- limits


def test_a_picture_over_the_pixel_limit_is_refused_and_one_at_the_limit_is_not():
    data = saved(gradient(60, 40), "PNG")

    assert kind_of(data, max_pixels=60 * 40 - 1) == ErrorKind.TOO_LARGE
    assert decode(data, name="x", max_pixels=60 * 40).shape == (40, 60, 3)


def test_more_bytes_than_the_limit_are_refused():
    assert kind_of(bytes(MAX_BYTES + 1)) == ErrorKind.TOO_LARGE


# --- what is not decoded


def test_zero_bytes_are_called_empty():
    with pytest.raises(AssetError, match="x: empty, 0 bytes") as caught:
        decode(b"", name="x")
    assert caught.value.kind == ErrorKind.NOT_IMAGE


@pytest.mark.parametrize(
    "body", [b"<?xml version='1.0'?><Error>", b"<!DOCTYPE html><p>", b"\n <html>", b"<Error><Code>"]
)
def test_an_error_page_under_an_images_name_is_named_as_such(body):
    with pytest.raises(AssetError, match="perhaps an error page") as caught:
        decode(body, name="x")
    assert caught.value.kind == ErrorKind.NOT_IMAGE


def test_first_bytes_are_shown_without_control_characters():
    with pytest.raises(AssetError) as caught:
        decode(b"\x1b[31m\0\r\n\xff" * 9, name="x")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("named", "head"),
    [
        ("SVG", b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg xmlns="http://www.w3.org/2000/svg">'),
        ("PSD", b"8BPS\0\1"),
        ("JPEG XL", b"\xff\x0a"),
        ("JPEG 2000", b"\xff\x4f\xff\x51"),
        ("PDF", b"%PDF-1.7"),
        ("video", b"\0\0\0\x18ftypisom"),
        ("DICOM", bytes(128) + b"DICM"),
        ("Netpbm", b"P6 2 2 255\n"),
    ],
)
def test_an_unsupported_format_is_named(named, head):
    with pytest.raises(AssetError, match=named) as caught:
        decode(head + bytes(64), name="x")
    assert caught.value.kind == ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_unsupported(mode):
    assert kind_of(saved(Image.new(mode, (4, 4), 7), "TIFF")) == ErrorKind.UNSUPPORTED


def test_a_tiff_that_begins_with_a_preview_is_unsupported():
    assert kind_of(saved(gradient(), "TIFF", tiffinfo={254: 1})) == ErrorKind.UNSUPPORTED


# --- cut and damaged files

SAMPLES = {
    "jpeg": saved(gradient(), "JPEG"),
    "progressive": saved(gradient(), "JPEG", progressive=True),
    "png": saved(gradient(), "PNG"),
    "webp": saved(gradient(), "WEBP"),
    "lossless webp": saved(gradient(), "WEBP", lossless=True),
    "tiff": saved(gradient(), "TIFF"),
    "deflated tiff": saved(gradient(), "TIFF", compression="tiff_adobe_deflate"),
    "bmp": saved(gradient(), "BMP"),
    "gif": saved(gradient(), "GIF"),
}
# Bytes at the end that hold no pixels: PNG's IDAT checksum and IEND, a JPEG's padding bits, GIF's terminators.
IDLE_TAIL_BYTES = {"png": 20, "gif": 3}


@pytest.mark.parametrize("sample", SAMPLES)
@settings(max_examples=40, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_truncated(sample, part):
    whole = SAMPLES[sample]
    first, last = 40, len(whole) - 1 - IDLE_TAIL_BYTES.get(sample, 0)

    assert kind_of(whole[: first + int(part * (last - first))]) == ErrorKind.TRUNCATED


@pytest.mark.parametrize(
    "directory",
    [
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<QQHHQQQ", 16, 1, 258, 3, 8, 2**64 - 1, 0),  # BitsPerSample: eight values, too far away
    ],
)
def test_a_bigtiff_that_leads_to_the_end_of_64_bits_is_truncated(directory):
    with pytest.raises(AssetError) as caught:
        decode(b"II+\0\x08\0\0\0" + directory, name="big.tif")
    assert caught.value.kind == ErrorKind.TRUNCATED


def test_a_jpeg_of_thousands_of_exif_segments_is_refused_at_once_and_one_of_a_few_is_read():
    def with_segments(number: int) -> bytes:
        jpeg, body = saved(gradient(), "JPEG"), b"Exif\0\0" + bytes(4000)
        return jpeg[:2] + (b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body) * number + jpeg[2:]

    assert decode(with_segments(20), name="a.jpg").shape[2] == 3
    began = time.process_time()
    with pytest.raises(AssetError) as caught:
        decode(with_segments(8_000), name="a.jpg")
    assert caught.value.kind == ErrorKind.DECODE_TIMEOUT
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("alpha", "colour"), [(0, [30, 20, 10]), (255, [30, 20, 10]), (51, [210, 208, 206])])
def test_a_bmp_whose_alpha_is_empty_everywhere_is_opaque(alpha, colour):
    pixels = bytes([10, 20, 30, alpha]) * 4
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    file = b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header.ljust(108, b"\0") + pixels

    assert decode(file, name="a.bmp").tolist() == [[colour] * 2] * 2


def test_a_tiff_cut_between_two_tags_is_truncated():
    whole = SAMPLES["deflated tiff"]
    (directory,) = struct.unpack_from("<I", whole, 4)

    assert kind_of(whole[: directory + 2 + 12]) == ErrorKind.TRUNCATED


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if "tiff" not in sample])
@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_damaged_bytes_give_pixels_or_a_verdict_and_nothing_else(sample, changes):
    damaged = bytearray(SAMPLES[sample])
    for position, value in changes:
        damaged[position % len(damaged)] = value

    image, verdict = image_or_verdict(bytes(damaged), name="x", max_pixels=10**6)

    assert image is not None or verdict.kind in ("not_image", "truncated", "unsupported", "too_large")


# --- colours


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel_across_strips(file_format):
    picture = gradient(1000, 700)

    assert np.array_equal(decode(saved(picture, file_format), name="x"), np.asarray(picture))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_over_its_full_range(file_format):
    samples = np.array([[0, 256, 128 * 257, 65535]], np.uint16)

    assert decode(saved(Image.fromarray(samples), file_format), name="x")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_grey_tiff_where_zero_is_white_is_turned_over():
    samples = np.array([[0, 128 * 257, 65535]], np.uint16)

    white_is_zero = saved(Image.fromarray(samples), "TIFF", tiffinfo={262: 0})

    assert decode(white_is_zero, name="x")[0, :, 0].tolist() == [255, 127, 0]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LAB", "RGB"])
def test_every_mode_becomes_rgb(mode):
    picture = gradient().convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        picture = Image.merge("LAB", [Image.new("L", (60, 40), value) for value in (255, 128, 128)])

    image = decode(saved(picture, "TIFF"), name="x")

    assert_upright_rgb(image, (60, 40))
    if mode == "LAB":
        assert image.min() >= 253


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_shown_over_white(file_format):
    picture = Image.new("RGBA", (3, 1))
    for column, pixel in enumerate([(0, 0, 0, 0), (0, 0, 0, 128), (0, 0, 0, 255)]):
        picture.putpixel((column, 0), pixel)

    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    image = decode(saved(picture, file_format, **options), name="x")

    assert image[0, :, 0].tolist() == [255, 127, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_colour_is_shown_over_white(mode):
    picture = Image.fromarray(np.zeros((1, 2), np.uint16)) if mode == "I;16" else Image.new(mode, (2, 1), 0)

    data = saved(picture, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)

    assert decode(data, name="x").min() == 255


def test_the_first_frame_is_taken():
    black, white = Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 255)

    for file_format in ("GIF", "WEBP", "TIFF", "PNG"):
        assert decode(saved(black, file_format, save_all=True, append_images=[white]), name="x").max() == 0


def test_what_a_gifs_first_frame_leaves_free_of_its_canvas_is_white():
    picture = Image.new("P", (3, 2), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    data = bytearray(saved(picture, "GIF", optimize=False))
    data[6:10] = struct.pack("<HH", 6, 4)  # the canvas; the frame stays 3 x 2
    frame = data.index(struct.pack("<cHHHH", b",", 0, 0, 3, 2))
    data[frame + 1 : frame + 5] = struct.pack("<HH", 2, 1)  # its corner
    expected = np.full((4, 6, 3), 255)
    expected[1:3, 2:5] = (0, 0, 255)

    assert np.array_equal(decode(bytes(data), name="x"), expected)


def test_pixels_are_the_same_from_many_threads():
    data = saved(gradient(500, 300), "JPEG")
    alone = decode(data, name="x")

    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(image, alone) for image in pool.map(lambda _: decode(data, name="x"), range(32)))


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(gradient(), file_format, exif=exif)

    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        upright = ImageOps.exif_transpose(picture).convert("RGB")

    assert np.array_equal(decode(data, name="x"), np.asarray(upright))


@settings(max_examples=80, deadline=None)
@given(
    exif=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda tail: b"Exif\0\0II*\0\x08\0\0\0" + tail))
)
def test_a_broken_exif_block_does_not_fail_the_picture(exif):
    assert decode(saved(gradient(6, 4), "JPEG", exif=exif), name="x").size == 6 * 4 * 3


@pytest.mark.parametrize("entry", [(0x0112, 3, 1, 9), (0x0112, 3, 1, 0), (0x0112, 2, 1, 6), (0x0112, 3, 2, 6)])
def test_an_orientation_that_is_none_of_the_eight_is_ignored(entry):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", *entry, 0)

    assert decode(saved(gradient(6, 4), "JPEG", exif=exif), name="x").shape == (4, 6, 3)


def test_orientation_in_xmp_is_ignored_as_browsers_do():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'

    assert decode(saved(gradient(6, 4), "JPEG", xmp=xmp), name="x").shape == (4, 6, 3)


@pytest.mark.parametrize(("field_type", "xmp"), [(1, b'<r tiff:Orientation="6"/>'), (2, "as text"), (3, (1, 2))])
def test_a_tiff_is_turned_by_its_tag_alone_whatever_its_xmp_is(field_type, xmp):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = field_type
    tags[700] = xmp
    picture = gradient(6, 4)

    assert np.array_equal(decode(saved(picture, "TIFF", tiffinfo=tags), name="x"), np.asarray(picture))


# --- thumbnails


def test_a_thumbnail_is_a_jpeg_of_the_asked_size():
    image = np.asarray(gradient(300, 200))

    with Image.open(io.BytesIO(thumbnail_jpeg(image, 120, quality=70))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (120, 80))


def test_a_thumbnail_is_never_larger_than_its_picture_nor_without_a_side():
    for width, height in ((30, 20), (3000, 1)):
        image = np.zeros((height, width, 3), np.uint8)
        with Image.open(io.BytesIO(thumbnail_jpeg(image, 100))) as thumbnail:
            assert 1 <= thumbnail.size[0] <= min(width, 100)
            assert thumbnail.size[1] >= 1


def test_a_large_bmp_in_run_lengths_is_refused_unread_and_a_small_one_is_read() -> None:
    def packed(pairs: int) -> bytes:
        """64 x 64 pixels of 8 bits: a header, a palette, and so many runs of one pixel."""
        rows = b"".join(bytes([64, n % 256]) + b"\0\0" for n in range(64)) + b"\1\7" * pairs + b"\0\1"
        header = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 8, 1, len(rows), 0, 0, 256, 0)
        palette = b"".join(bytes([n, n, n, 0]) for n in range(256))
        offset = 14 + len(header) + len(palette)
        return struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset) + header + palette + rows

    assert decode(packed(0), name="small.bmp").shape == (64, 64, 3)
    with pytest.raises(AssetError, match="in run lengths, minutes of decoding; save it as PNG") as caught:
        decode(packed(11 << 20), name="large.bmp")
    assert caught.value.kind is ErrorKind.DECODE_TIMEOUT


def png_of(samples, *, bits, colour_type, transparent):
    """A PNG of one row, whose transparent colour is given in samples of `bits` bits."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    colours = len(transparent)
    packed = int("".join(f"{one:0{bits}b}" for one in samples), 2).to_bytes(len(samples) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(samples) // colours, 1, bits, colour_type, 0, 0, 0)
    key = struct.pack(f">{colours}H", *transparent)
    parts = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + packed)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_a_transparent_colour_is_in_the_samples_of_its_png():
    grey4 = png_of([7, 0], bits=4, colour_type=0, transparent=[7])
    grey2 = png_of([0, 1, 2, 3], bits=2, colour_type=0, transparent=[1])
    rgb16 = png_of([1000, 2000, 3000, 40000, 5000, 6000], bits=16, colour_type=2, transparent=[1000, 2000, 3000])

    assert decode(grey4, name="a")[0, :, 0].tolist() == [255, 0]
    assert decode(grey2, name="a")[0, :, 0].tolist() == [0, 255, 170, 255]
    assert decode(rgb16, name="a")[0].tolist() == [[255, 255, 255], [156, 19, 23]]
