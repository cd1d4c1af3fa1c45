"""HEIC and AVIF, which phones write, under the same policy as all other pictures."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.heif_files import Heif, Item, box, full_box, grid, hevc_item, size_box
from workers.errors import AssetError, ErrorKind
from workers.images.decode import decode

TESTDATA = Path(os.environ.get("MASKFLEET_TESTDATA", Path(__file__).parents[3] / "shared" / "testdata"))
NASTY = TESTDATA / "nasty" / "files"

# workers.images silences Pillow's warnings for its process; pytest makes them errors again for each test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")


def gradient(width=160, height=96):
    """A picture without any symmetry, and without the fine detail that a lossy format changes."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([across, down, (across + down) / 4], axis=2).astype(np.uint8)
    rgb[: height // 3, : width // 4] = (250, 10, 120)
    return Image.fromarray(rgb)


def heic(image, **options):
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **{"quality": 95, "chroma": 444, **options})
    return file.getvalue()


def avif(image, **options):
    file = io.BytesIO()
    image.save(file, "AVIF", **{"quality": 95, "subsampling": "4:4:4", "speed": 9, **options})
    return file.getvalue()


WRITERS = {"HEIC": heic, "AVIF": avif}


def kind_of(data, **options):
    with pytest.raises(AssetError) as caught:
        decode(data, name="x.heic", **options)
    assert str(caught.value).startswith("x.heic: ")
    assert str(caught.value).isprintable()
    return caught.value.kind


def image_or_verdict(data, **options):
    try:
        return decode(data, name="x", **options), None
    except AssetError as error:
        return None, error


def assert_alike(image, picture, tolerance=3):
    """Alike on average, which is all that a lossy format promises; a wrong turn or a wrong scale differs by dozens."""
    assert image.shape == (picture.height, picture.width, 3)
    assert np.abs(image - np.asarray(picture.convert("RGB")).astype(int)).mean() < tolerance


# --- pixels


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_comes_out_as_it_was(writer, mode):
    picture = gradient().convert(mode)

    assert_alike(decode(WRITERS[writer](picture), name="x"), picture)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_shown_over_white(writer, mode):
    picture = gradient().convert(mode)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    over_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))

    assert_alike(decode(WRITERS[writer](picture), name="x"), over_white)


@pytest.mark.parametrize("bits", [10, 12])
def test_more_than_8_bits_are_scaled(bits, monkeypatch):
    monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    samples = np.asarray(gradient()).astype(np.uint16) * 257
    file = io.BytesIO()
    pillow_heif.encode("RGB;16", (160, 96), samples.tobytes(), file, quality=95, chroma=444)

    image = decode(file.getvalue(), name="x")

    assert pillow_heif.open_heif(file.getvalue()).info["bit_depth"] == bits
    assert_alike(image, gradient())
    assert image.max() >= 250


def test_a_grid_of_tiles_is_one_picture():
    tile = hevc_item(gradient(64, 64), hidden=True)

    image = decode(grid(tile, rows=2, columns=3, size_wh=(180, 120)).write(), name="x")

    whole = Image.new("RGB", (192, 128))
    for left, top in ((0, 0), (64, 0), (128, 0), (0, 64), (64, 64), (128, 64)):
        whole.paste(gradient(64, 64), (left, top))
    assert_alike(image, whole.crop((0, 0, 180, 120)))


def test_the_first_frame_of_an_animation_is_taken():
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")

    assert decode(avif(black, save_all=True, append_images=[white]), name="x").mean() < 5


def test_the_primary_picture_is_taken_wherever_it_stands():
    items = {1: hevc_item(Image.new("RGB", (64, 64))), 2: hevc_item(Image.new("RGB", (64, 64), "white"))}

    assert decode(Heif(items=items, primary=2).write(), name="x").mean() > 250


@pytest.mark.skipif(not NASTY.exists(), reason=f"{NASTY} is not here")
def test_the_primary_of_three_pictures_is_taken_though_it_is_the_second():
    image = decode((NASTY / "zPug_3.heic").read_bytes(), name="x")

    assert image.shape == (64, 64, 3)
    assert (image == image[..., :1]).all(), "the primary one is grey, the first is not"


# --- orientation

TURNS = {  # EXIF orientation: irot's quarter turns against the clock, then imir's axis (0 turns over top and bottom)
    1: (),
    2: (box(b"imir", b"\1"),),
    3: (box(b"irot", b"\2"),),
    4: (box(b"imir", b"\0"),),
    5: (box(b"irot", b"\1"), box(b"imir", b"\0")),
    6: (box(b"irot", b"\3"),),
    7: (box(b"irot", b"\3"), box(b"imir", b"\0")),
    8: (box(b"irot", b"\1"),),
}


def turned(picture, orientation):
    picture = picture.copy()
    picture.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(picture)


def exif_block(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("with_exif", [False, True])
def test_the_turn_in_the_boxes_of_a_heic_is_applied_once_whatever_exif_repeats(orientation, with_exif):
    items = {1: hevc_item(gradient(), more=TURNS[orientation])}
    references = []
    if with_exif:  # as phones write it: both, and the boxes count
        items[2] = Item(kind=b"Exif", content=bytes(4) + exif_block(orientation)[6:])
        references = [(b"cdsc", 2, [1])]

    image = decode(Heif(items=items, references=references).write(), name="x")

    assert_alike(image, turned(gradient(), orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_alone_does_not_turn_a_heic_as_the_standard_says(orientation):
    items = {1: hevc_item(gradient()), 2: Item(kind=b"Exif", content=bytes(4) + exif_block(orientation)[6:])}

    image = decode(Heif(items=items, references=[(b"cdsc", 2, [1])]).write(), name="x")

    assert_alike(image, gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_turn_of_an_avif_is_applied_once(orientation):
    data = avif(gradient(), exif=exif_block(orientation))  # Pillow writes it into irot and imir

    assert_alike(decode(data, name="x"), turned(gradient(), orientation))


@settings(max_examples=40, deadline=None)
@given(exif=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda tail: b"II*\0\x08\0\0\0" + tail)))
def test_a_broken_exif_block_does_not_fail_a_heic(exif):
    items = {1: hevc_item(gradient(64, 64)), 2: Item(kind=b"Exif", content=bytes(4) + exif)}

    assert_alike(decode(Heif(items=items, references=[(b"cdsc", 2, [1])]).write(), name="x"), gradient(64, 64))


# --- cut and damaged files

SAMPLES = {
    "heic": heic(gradient()),
    "avif": avif(gradient()),
    "grid": grid(hevc_item(gradient(64, 64), hidden=True), rows=2, columns=2, size_wh=(120, 120)).write(),
}


@pytest.mark.parametrize("sample", SAMPLES)
@settings(max_examples=40, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_truncated(sample, part):
    whole = SAMPLES[sample]
    first, last = 40, len(whole) - 1

    assert kind_of(whole[: first + int(part * (last - first))]) == ErrorKind.TRUNCATED


@pytest.mark.parametrize("sample", SAMPLES)
@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_damaged_bytes_give_pixels_or_a_verdict_and_nothing_else(sample, changes):
    damaged = bytearray(SAMPLES[sample])
    for position, value in changes:
        damaged[position % len(damaged)] = value

    image, verdict = image_or_verdict(bytes(damaged), max_pixels=10**6)

    assert image is not None or verdict.kind in ("not_image", "truncated", "unsupported", "too_large")


@pytest.mark.parametrize("brand", [b"heic", b"avif"])
def test_boxes_of_nearly_64_bits_are_no_picture(brand):
    def long_box(kind: bytes, size_bytes: int, content: bytes) -> bytes:
        return struct.pack(">I4sQ", 1, kind, size_bytes) + content

    inside = long_box(b"free", 2**63 + 5, bytes(40))
    file = box(b"ftyp", brand + bytes(4) + b"mif1" + brand) + long_box(b"meta", 2**64 - 1, bytes(4) + inside)
    with pytest.raises(AssetError) as caught:
        decode(file, name="a.heic")
    assert caught.value.kind == ErrorKind.TRUNCATED


def test_a_codec_that_is_not_in_the_wheel_is_unsupported():
    av1_as_heic = SAMPLES["avif"].replace(b"avif", b"mif1")

    assert kind_of(av1_as_heic) == ErrorKind.UNSUPPORTED


# --- bombs

DECODE_AND_MEASURE = """
import resource, sys
from pathlib import Path
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
    print(Path(path).stem, outcome, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def nested_grids(depth):
    """Ten tiles, each a grid of the same ten, and so on: ten to the power of depth."""
    tile = hevc_item(gradient(64, 64), hidden=True)
    items, references = {}, []
    for level in range(depth):
        for number in range(10):
            items[100 * level + number + 1] = Item(
                kind=b"grid", content=bytes([0, 1, 0, 9]) + struct.pack(">II", 64, 64), properties=[size_box(64, 64)]
            )
            references.append((b"dimg", 100 * level + number + 1, range(100 * (level + 1) + 1, 100 * (level + 1) + 11)))
    items |= {100 * depth + number + 1: tile for number in range(10)}
    return Heif(items=items, references=references)


def in_a_circle():
    content = bytes([0, 1, 0, 0]) + struct.pack(">II", 64, 64)
    grids = {number: Item(kind=b"grid", content=content, properties=[size_box(64, 64)]) for number in (1, 2)}
    return Heif(items=grids, references=[(b"dimg", 1, [2]), (b"dimg", 2, [1])])


def with_endless_table():
    table = full_box(b"ipma", 0, 0, struct.pack(">I", 2**31), bytes(2**21))
    first = full_box(b"pitm", 0, 0, struct.pack(">H", 1))
    meta = full_box(b"meta", 0, 0, first, box(b"iprp", box(b"ipco", size_box(64, 64)), table))
    return box(b"ftyp", b"heic", bytes(4)) + meta + box(b"mdat", b"x")


def with_size(data, width, height):
    start = data.index(b"ispe") + 8
    return data[:start] + struct.pack(">II", width, height) + data[start + 8 :]


@pytest.mark.slow
def test_bombs_are_refused_without_memory_or_time(tmp_path):
    plain = hevc_item(Image.new("RGB", (4096, 4096), "teal"))
    bombs = {
        "huge": (with_size(SAMPLES["heic"], 2**20, 2**20), "too_large"),
        "huge-avif": (with_size(SAMPLES["avif"], 30_000, 30_000), "too_large"),
        "lying": (with_size(Heif(items={1: plain}).write(), 64, 64), "truncated"),
        "tiles": (grid(plain, rows=16, columns=16, size_wh=(64, 64)).write(), "too_large"),
        "nested": (nested_grids(7).write(), "too_large"),
        "deep": (nested_grids(12).write(), "not_image"),
        "circle": (in_a_circle().write(), "not_image"),
        "table": (with_endless_table(), "not_image"),
    }
    for name, (data, _) in bombs.items():
        (tmp_path / f"{name}.heic").write_bytes(data)
        assert len(data) < 3_000_000

    done = subprocess.run(
        [sys.executable, "-c", DECODE_AND_MEASURE, *sorted(tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )

    outcomes = {name: (kind, int(mb)) for name, kind, mb in map(str.split, done.stdout.splitlines())}
    assert {name: kind for name, (kind, _) in outcomes.items()} == {name: kind for name, (_, kind) in bombs.items()}
    assert max(mb for _, mb in outcomes.values()) < 64


def test_a_picture_of_many_tiles_within_the_limit_is_read():
    tile = hevc_item(gradient(64, 64), hidden=True)

    assert decode(grid(tile, rows=30, columns=30, size_wh=(1900, 1900)).write(), name="x").shape == (1900, 1900, 3)


def test_decoding_leaves_pillows_own_openers_as_they_were():
    decode(SAMPLES["heic"], name="x")

    assert "HEIF" not in Image.OPEN
