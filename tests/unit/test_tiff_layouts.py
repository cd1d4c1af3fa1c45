"""A TIFF of any layout gives the pixels that a second decoder (tifffile) reads, or is refused by the layout's name."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tiff_files import REVERSED_BITS, Layout, write_tiff
from workers.errors import AssetError, ErrorKind
from workers.images.decode import decode

TESTDATA = Path(os.environ.get("MASKFLEET_TESTDATA", Path(__file__).parents[3] / "shared" / "testdata"))
REPORTS = TESTDATA / "reports"
NEEDS_REPORTS = pytest.mark.skipif(not REPORTS.exists(), reason=f"{REPORTS} is not here")

# workers.images silences Pillow's warnings for its process; pytest makes them errors again for each test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")

COLOURS = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "separated": 4}
UNSPECIFIED, PREMULTIPLIED, ALPHA = 0, 1, 2  # ExtraSamples


def picture(layout, dtype, height=23, width=37):
    """(H, W, S) samples without any symmetry; colours that were multiplied by their alpha do not exceed it."""
    bands = COLOURS[layout.photometric] + len(layout.extra)
    down, across = np.mgrid[0:height, 0:width]
    samples = np.stack(
        [((across * (3 + band) + down * (9 - band) + 40 * band) % 200) / 199 for band in range(bands)], 2
    )
    if PREMULTIPLIED in layout.extra:
        colours = COLOURS[layout.photometric]
        samples[..., :colours] *= samples[..., colours : colours + 1]
    return (samples * np.iinfo(dtype).max).astype(dtype)


def by_policy(samples, layout):
    """What decode documents, from an array of samples: scaled, not clipped; alpha over white; other samples unread."""
    levels = samples.astype(float) / np.iinfo(samples.dtype).max
    colours = COLOURS[layout.photometric]
    colour = levels[..., :colours]
    if layout.photometric == "miniswhite":
        colour = 1 - colour
    if layout.photometric == "separated":
        colour = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    alpha = levels[..., colours : colours + 1] if layout.extra[:1] in ((PREMULTIPLIED,), (ALPHA,)) else 1
    if layout.extra[:1] == (PREMULTIPLIED,):
        colour = colour + (1 - alpha)
    elif layout.extra[:1] == (ALPHA,):
        colour = colour * alpha + (1 - alpha)
    return np.broadcast_to(255 * colour, (*colour.shape[:2], 3))


def as_tifffile_reads(data, layout, samples):
    """The second decoder's array, as (H, W, S); for LZW, which it cannot unpack alone, what was written."""
    if layout.packing == "LZW":
        return samples
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        array = file.pages[0].asarray()
    if layout.planar:
        array = np.moveaxis(array, 0, -1)
    return array.reshape(samples.shape)


layouts = st.builds(
    Layout,
    order=st.sampled_from("<>"),
    bigtiff=st.booleans(),
    planar=st.booleans(),
    tile_hw=st.sampled_from([None, None, (16, 16), (32, 48)]),
    rows_per_strip=st.sampled_from([1, 5, 23, 100]),
    packing=st.sampled_from(["none", "none", "LZW", "deflate", "PackBits"]),
    predictor=st.booleans(),
    fill_order=st.sampled_from([1, 1, 1, 2]),
    photometric=st.sampled_from(["rgb", "rgb", "minisblack", "miniswhite", "separated"]),
    extra=st.sampled_from([(), (), (0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 2)]),
)


@settings(max_examples=400, deadline=None)
@given(layout=layouts, dtype=st.sampled_from([np.uint8, np.uint16]))
@example(layout=Layout(planar=True), dtype=np.uint16)
@example(layout=Layout(planar=True, order=">", bigtiff=False, tile_hw=(16, 16)), dtype=np.uint16)
@example(layout=Layout(planar=True, extra=(0,)), dtype=np.uint8)
@example(layout=Layout(planar=True, extra=(2,), photometric="minisblack", packing="deflate"), dtype=np.uint8)
def test_a_layout_gives_the_pixels_of_a_second_decoder_or_is_refused_by_name(layout, dtype):
    samples = picture(layout, dtype)
    if layout.planar and samples.shape[2] == 1:
        layout = Layout(**{**vars(layout), "planar": False})
    if layout.predictor and layout.packing not in ("LZW", "deflate"):
        layout = Layout(**{**vars(layout), "predictor": False})
    data = write_tiff(samples, layout)

    image, verdict = image_or_verdict(data)

    if verdict:
        assert verdict.kind == ErrorKind.UNSUPPORTED
        assert f"{samples.shape[2]} x {samples.dtype.itemsize * 8} bits" in str(verdict)
        assert not is_promised(layout, dtype), verdict
    else:
        wanted = by_policy(as_tifffile_reads(data, layout, samples), layout)
        assert np.abs(image - wanted).max() <= tolerance(layout, dtype)


def image_or_verdict(data):
    try:
        return decode(data, name="x"), None
    except AssetError as error:
        return None, error


def is_promised(layout, dtype):
    """The layouts of docs/images.md: none of them may be refused, whatever its packing, order, strips or tiles."""
    if (layout.bigtiff and layout.order == ">") or layout.fill_order == 2:
        return False
    if layout.photometric == "rgb":
        return layout.extra in ((), (0,), (1,), (2,)) or (layout.planar and not any(layout.extra))
    return layout.extra == () and (layout.photometric, layout.order, dtype) != ("miniswhite", ">", np.uint16)


def tolerance(layout, dtype):
    """In levels of 255. Pillow takes the high byte of 16 bits; premultiplied colours are divided and multiplied."""
    rounding = 0.5 if dtype == np.uint8 else 1.01
    if layout.photometric == "separated":
        return 2.5 * rounding + 0.5
    return {(): rounding, (UNSPECIFIED,): rounding, (ALPHA,): 1 + rounding, (PREMULTIPLIED,): 2 + rounding}[
        layout.extra[:1]
    ]


# --- single layouts


def test_12_bit_grey_is_scaled_over_its_full_range():
    samples = np.array([0, 2048, 4095, 16], np.uint16)
    packed = b"".join(
        ((int(a) << 12) | int(b)).to_bytes(3, "big") for a, b in zip(samples[::2], samples[1::2], strict=True)
    )
    data = grey_tiff(packed, width=4, bits=12)

    assert decode(data, name="x")[0, :, 0].tolist() == [0, 128, 255, 1]


def test_bits_of_a_fax_in_either_fill_order_are_the_same():
    packed = bytes([0b10110000, 0b00000001])

    plain = decode(grey_tiff(packed, width=16, bits=1), name="x")
    reversed_bits = decode(grey_tiff(packed.translate(REVERSED_BITS), width=16, bits=1, fill_order=2), name="x")

    assert plain[0, :5, 0].tolist() == [255, 0, 255, 255, 0]
    assert np.array_equal(plain, reversed_bits)


def grey_tiff(packed, *, width, bits, fill_order=1):
    """One row of grey, little-endian, in one strip without compression."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (266, fill_order), (273, 200)]
    entries += [(277, 1), (278, 1), (279, len(packed))]
    numbers = [int.to_bytes(len(entries), 2, "little")]
    for tag, value in entries:
        numbers += [part.to_bytes(size, "little") for part, size in ((tag, 2), (3, 2), (1, 4), (value, 4))]
    return (b"II*\0\x08\0\0\0" + b"".join(numbers)).ljust(200, b"\0") + packed


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float16, np.float32, np.uint32])
@pytest.mark.parametrize("bands", [1, 3])
def test_numbers_without_a_white_are_refused(dtype, bands):
    file = io.BytesIO()
    shape = (4, 5, 3) if bands == 3 else (4, 5)
    tifffile.imwrite(file, np.full(shape, 7, dtype), photometric="rgb" if bands == 3 else "minisblack")

    with pytest.raises(AssetError, match="bits") as caught:
        decode(file.getvalue(), name="x")

    assert caught.value.kind == ErrorKind.UNSUPPORTED


def test_ycbcr_that_is_not_jpeg_is_refused_for_a_cut_in_it_is_not_told():
    file = io.BytesIO()
    samples = np.full((16, 16, 3), 100, np.uint8)
    tifffile.imwrite(file, samples, photometric="ycbcr", compression="zlib", subsampling=(1, 1))

    with pytest.raises(AssetError, match="YCbCr has to be compressed as JPEG") as caught:
        decode(file.getvalue(), name="x")

    assert caught.value.kind == ErrorKind.UNSUPPORTED


def test_lab_in_planes_is_refused_and_side_by_side_it_is_read():
    samples = np.full((16, 16, 3), (255, 128, 128), np.uint8)
    side_by_side, planes = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(side_by_side, samples, photometric="cielab", planarconfig="contig")
    tifffile.imwrite(planes, np.moveaxis(samples, 2, 0), photometric="cielab", planarconfig="separate")

    assert decode(side_by_side.getvalue(), name="x").shape == (16, 16, 3)
    with pytest.raises(AssetError, match="Lab, 3 x 8 bits, one plane a sample") as caught:
        decode(planes.getvalue(), name="x")
    assert caught.value.kind == ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", "zstd", "lzma"])
def test_every_compression_of_pillows_is_read(compression):
    colours = np.zeros((40, 60, 3), np.uint8)
    colours[:20, :30] = (200, 40, 30)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "TIFF", compression=compression)

    assert np.abs(decode(file.getvalue(), name="x")[4:12, 4:22].astype(int) - (200, 40, 30)).max() <= 4


# --- reports


@NEEDS_REPORTS
@pytest.mark.parametrize("file", ["raw-le.tif", "deflate.tif"])
def test_report_45_a_planar_16_bit_picture_is_whole(file):
    folder = REPORTS / "45-planar-16-bit-tiff"
    right = json.loads((folder / "expect.json").read_text())

    image = decode((folder / file).read_bytes(), name=file)

    assert image.shape == (right["size_wh"][1], right["size_wh"][0], 3)
    assert image[0, 0].tolist() == right["[0,0]"]
    assert image[30, 45].tolist() == right["row 30, column 45"]
    is_red = (image == right["row 30, column 45"]).all(axis=2)
    assert is_red[20:40, 30:60].all()
    assert is_red.sum() == 20 * 30


@NEEDS_REPORTS
@pytest.mark.parametrize("file", ["unspecified.tif", "planar4.tif"])
def test_report_21_a_fourth_band_of_no_stated_meaning_is_not_transparency(file):
    image = decode((REPORTS / "21-near-infrared-as-fourth-band" / file).read_bytes(), name=file)

    assert image[0, 0].tolist() == [90, 140, 60]
    assert image[30, 45].tolist() == [200, 40, 30]


@NEEDS_REPORTS
def test_report_21_a_fourth_band_that_is_tagged_as_alpha_is_shown_over_white():
    data = (REPORTS / "21-near-infrared-as-fourth-band" / "alpha-tagged.tif").read_bytes()

    assert decode(data, name="x")[0, 0].tolist() == pytest.approx([229, 237, 224], abs=1)


# --- cut files

CUT = {
    "strips": Layout(),
    "planes": Layout(planar=True),
    "tiles in planes": Layout(planar=True, tile_hw=(16, 16)),
    "deflated planes": Layout(planar=True, packing="deflate"),
    "LZW": Layout(packing="LZW", predictor=True),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", CUT)
@settings(max_examples=15, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_tiff_cut_anywhere_is_truncated(layout, dtype, part):
    whole = write_tiff(picture(CUT[layout], dtype), CUT[layout])
    first, last = 40, len(whole) - 1

    with pytest.raises(AssetError) as caught:
        decode(whole[: first + int(part * (last - first))], name="x")

    assert caught.value.kind == ErrorKind.TRUNCATED


@pytest.mark.parametrize("layout", CUT)
def test_a_strip_or_tile_that_ends_too_early_is_truncated(layout):
    file = io.BytesIO(write_tiff(picture(CUT[layout], np.uint8), CUT[layout]))
    with tifffile.TiffFile(file) as written:
        tags = written.pages[0].tags
        counts = tags["TileByteCounts"] if CUT[layout].tile_hw else tags["StripByteCounts"]
        counts.overwrite([counts.value[0], counts.value[1] // 2, *counts.value[2:]])

    with pytest.raises(AssetError) as caught:
        decode(file.getvalue(), name="x")

    assert caught.value.kind == ErrorKind.TRUNCATED
