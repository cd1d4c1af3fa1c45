"""Brush masks agree with label_studio_sdk to the byte, with streams written by others, and refuse hostile ones."""

import contextlib
import hashlib
import json
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from label_studio_sdk.converter.brush import decode_rle, mask2rle

from orchestrator.label_studio.brush import (
    BrushError,
    decode_brush,
    encode_brush_counts,
    encode_brush_edges,
    pack_runs,
    unpack_runs,
)
from orchestrator.shapes.runs import edges_from_pixels
from tests.needs import TESTDATA
from tests.pixels import decode_counts
from workers.masks import encode_counts

VECTORS = TESTDATA / "ls_vectors"
needs_vectors = pytest.mark.usefixtures("testdata")


@st.composite
def masks(draw):
    """(H, W) bool of all densities, with long runs as well as single pixels."""
    height, width = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.sampled_from([1, 1, 3, 12]))
    coarse = random.random((height // grain + 1, width // grain + 1)) < draw(st.sampled_from([0, 0.02, 0.3, 0.6, 1]))
    return np.kron(coarse, np.ones((grain, grain), bool))[:height, :width]


def long_masks():
    """Masks whose runs end just before, at and after every length where the format takes another width or token."""
    # Runs are four values a pixel: widths change at 8, 16, 256 and 65,536 values.
    for pixels in (1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 32768, 32769, 49152, 49153, 70000):
        for before in (0, 1, 16385):
            mask = np.zeros((1, before + pixels + 3), bool)
            mask[0, before : before + pixels] = True
            yield mask
            yield ~mask


@given(masks())
@example(np.zeros((1, 1), bool))
@example(np.ones((1, 1), bool))
@example(np.ones((1, 7), bool))
@example(np.ones((7, 1), bool))
@settings(max_examples=150, deadline=None)
def test_brush_streams_equal_the_sdk_and_come_back(mask):
    expected = mask2rle(mask.astype(np.uint8) * 255)

    assert encode_brush(mask) == expected
    assert encode_brush(np.asfortranarray(mask)) == expected
    assert encode_brush_counts(encode_counts(mask), mask.shape) == expected
    assert np.array_equal(decode_brush(expected, mask.shape), mask)


def test_long_runs_equal_the_sdk_and_come_back():
    for mask in long_masks():
        for turned in (mask, mask.T):
            rle = encode_brush_counts(encode_counts(turned), turned.shape)
            assert rle == encode_brush(turned) == mask2rle(turned.astype(np.uint8) * 255)
            assert np.array_equal(decode_brush(rle, turned.shape), turned)


@given(masks())
@settings(max_examples=30, deadline=None)
def test_the_sdk_reads_our_streams(mask):
    rgba = decode_rle(encode_brush(mask)).reshape(*mask.shape, 4)

    assert np.array_equal(rgba[..., 3], mask * np.uint8(255))


@given(st.lists(st.tuples(st.integers(1, 70000), st.integers(0, 255)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_runs_come_back(runs):
    lengths, values = (np.array(column, np.int64) for column in zip(*runs, strict=True))

    read_lengths, read_values = unpack_runs(bytes(pack_runs(lengths, values)))

    assert np.array_equal(np.repeat(read_values, read_lengths), np.repeat(values, lengths))


def encode_brush(mask):
    return encode_brush_edges(edges_from_pixels(mask), mask.shape)


def test_masks_of_the_wrong_kind_are_refused():
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros((2, 2, 1), bool)):
        with pytest.raises(ValueError, match="expected"):
            encode_counts(wrong)
    with pytest.raises(ValueError, match="32 bits"):
        pack_runs(np.array([2**32]), np.array([0]))


@needs_vectors
def test_third_party_streams_give_their_expected_masks():
    vectors = json.loads((VECTORS / "decode_vectors.json").read_text())["vectors"]
    for vector in vectors:
        rle = _rle_of(vector)
        size = (vector["height"], vector["width"])

        touched = decode_brush(rle, size, min_alpha=1)
        covered = decode_brush(rle, size)

        expected = cv2.imread(str(VECTORS / vector["expected_mask_png"]), cv2.IMREAD_GRAYSCALE) > 0
        assert np.array_equal(touched, expected)
        assert np.array_equal(touched, decode_counts(vector["coco_rle"]["counts"], size))
        assert int(touched.sum()) == vector["expected_pixels"]
        assert int(covered.sum()) == vector["pixels_alpha_ge_128"]
    assert len(vectors) == 4


@needs_vectors
def test_third_party_runs_are_read_and_written_to_the_byte():
    by_id = {v["id"]: v for v in json.loads((VECTORS / "encode_vectors.json").read_text())["vectors"]}
    written, read, invalid = (
        by_id[f"sdk_{name}"] for name in ("test_rle_encoding", "rle_with_zero_bytes", "invalid_negative_byte")
    )

    values = np.array(written["values"])
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    assert pack_runs(np.diff(starts, append=values.size), values[starts]) == written["bytes"]

    for vector in (written, read):
        lengths, values = unpack_runs(bytes(vector["bytes"]))
        decoded = np.repeat(values, lengths).astype(np.uint8)
        if "values" in vector:
            assert decoded.tolist() == vector["values"]
        else:
            assert decoded.size == vector["decoded_length"]
            assert hashlib.sha256(decoded.tobytes()).hexdigest() == vector["decoded_sha256"]
            mask = decode_brush(vector["bytes"], (1, decoded.size // 4), min_alpha=1)
            assert int(mask.sum()) == vector["nonzero_alpha"]
    with pytest.raises(BrushError, match="whole numbers"):
        decode_brush(invalid["bytes"], (1, 1))


@needs_vectors
def test_reference_masks_are_encoded_to_the_byte():
    masks = json.loads((VECTORS / "reference_encoded_masks.json").read_text())["masks"]
    for mask in masks:
        size = (mask["height"], mask["width"])
        assert encode_brush_counts(mask["coco_rle"]["counts"], size) == mask["ls_rle"]
        assert np.array_equal(decode_brush(mask["ls_rle"], size), decode_counts(mask["coco_rle"]["counts"], size))
    assert len(masks) == 15


def test_half_covered_pixels_of_an_edited_brush_belong_to_it():
    alpha = np.array([[0, 1, 127, 128, 191, 255]])
    stream = pack_runs(np.full(6, 4), alpha.ravel())

    assert decode_brush(stream, (1, 6)).tolist() == [[False, False, False, True, True, True]]
    assert decode_brush(stream, (1, 6), min_alpha=1).tolist() == [[False, True, True, True, True, True]]


def test_only_the_alpha_of_literal_values_counts():
    # One token without repeat, 8 values: red, green and blue of an opaque and of a transparent pixel.
    values = [9, 8, 7, 255, 255, 255, 255, 0]
    bits = f"{8:032b}{7:05b}" + "".join(f"{w - 1:04b}" for w in (3, 4, 8, 16)) + "0" + "00" + f"{7:03b}"
    bits += "".join(f"{v:08b}" for v in values)
    stream = int(bits.ljust(128, "0"), 2).to_bytes(16, "big")

    assert decode_rle(list(stream)).tolist() == values
    assert decode_brush(list(stream), (1, 2)).tolist() == [[True, False]]


@pytest.mark.parametrize(
    "rle",
    [
        None,
        5,
        "AAAA",
        {"0": 1},
        [1.5],
        ["1"],
        [None],
        [[1]],
        [256] * 20,
        [-1, 2, 3, 4],
        [10**400],
        [],
        [0],
        [0, 0, 0, 16],
    ],
)
def test_what_is_not_a_stream_is_refused(rle):
    with pytest.raises(BrushError, match="brush stream"):
        decode_brush(rle, (2, 2))


def test_streams_of_another_frame_are_refused():
    stream = encode_brush(np.eye(8, dtype=bool))

    for size in ((8, 7), (4, 4), (9, 9), (80000, 80000)):
        with pytest.raises(BrushError, match="has"):
            decode_brush(stream, size)


def test_streams_that_end_early_or_run_over_are_refused():
    stream = encode_brush(np.eye(8, dtype=bool))
    for kept in range(len(stream) - 2):
        with pytest.raises(BrushError):
            decode_brush(stream[:kept], (8, 8))

    # The header says 12 values, the only run has 16.
    shorter = [0, 0, 0, 12, *pack_runs(np.array([16]), np.array([255]))[4:]]
    with pytest.raises(BrushError, match="past"):
        decode_brush(shorter, (1, 3))
    words = pack_runs(np.array([16]), np.array([255]))
    words[4] = 0xF9
    with pytest.raises(BrushError, match="32-bit"):
        decode_brush(words, (1, 4))


@given(masks(), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_streams_give_a_mask_or_a_named_error(mask, data):
    stream = encode_brush(mask)
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(4, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BrushError):
        assert decode_brush(stream, mask.shape).shape == mask.shape


def test_a_header_that_lies_costs_no_memory():
    stream = [255, 255, 255, 252, *encode_brush(np.ones((1, 4), bool))[4:]]
    tracemalloc.start()
    with pytest.raises(BrushError):
        decode_brush(stream, (2, 2))
    with pytest.raises(BrushError):
        decode_brush(stream, (1, (2**32 - 4) // 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1_000_000


def _rle_of(vector):
    """The stream that a decode vector names by file and path."""
    content = json.loads((VECTORS / vector["file"]).read_text())
    annotation = content[0] if isinstance(content, list) else content["annotations"][0]
    prefix = vector["source"].rpartition("#")[2]
    return next(r["value"]["rle"] for r in annotation["result"] if r.get("id") == prefix and "rle" in r["value"])
