"""Writes the dozen files of `maskfleet demo`: drawn scenes as in a bucket, and four files that are not images.

`python -m workers.training.demo_scenes --out orchestrator/scenes`. The files ship with the package. This script shows
where they come from, and can draw them again.
"""

import argparse
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from workers.training.scenes import RgbImage, draw_scene

# Training (below 2 ** 40) and the benchmark use other seeds.
FIRST_SEED = 8_000_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoScene:
    """One drawn file. seed: added to FIRST_SEED. size_hw: the upright size. is_turned: it is a phone's portrait."""

    key: str
    seed: int
    size_hw: tuple[int, int]
    is_turned: bool = False  # stored rotated by 90 degrees; EXIF orientation 6 makes it upright


DEMO_SCENES = (
    DemoScene(key="slate.jpg", seed=43, size_hw=(480, 640)),
    DemoScene(key="sandstone.jpg", seed=19, size_hw=(480, 640)),
    DemoScene(key="tiles.jpg", seed=48, size_hw=(384, 512)),
    DemoScene(key="phone portrait.jpg", seed=45, size_hw=(640, 480), is_turned=True),
    DemoScene(key="soft ground.webp", seed=8, size_hw=(480, 640)),
    DemoScene(key="microscope/cells 16 bit.png", seed=0, size_hw=(300, 400)),
    DemoScene(key="microscope/cells.jpg", seed=30, size_hw=(384, 512)),
    DemoScene(key="Müllers Kiste 🧩/neon.jpg", seed=25, size_hw=(384, 512)),
    DemoScene(key="Müllers Kiste 🧩/ribbon.jpg", seed=23, size_hw=(480, 640)),
)


def write_demo_scenes(out: Path) -> None:
    """Write every file of the demo into the folder out. Files of the same name are replaced."""
    for scene in DEMO_SCENES:
        _write(out / scene.key, _encode_scene(scene))
    whole = _encode(".jpg", draw_scene(FIRST_SEED + 12, (384, 512)).image)
    _write(out / "hostile/broken off.jpg", whole[: len(whole) // 3])
    _write(out / "hostile/notes.jpg", b"These are the notes of the excursion, saved under the wrong name.\n")
    _write(out / "hostile/empty.png", b"")
    _write(out / "hostile/30000x30000.png", _huge_png(30_000))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _encode_scene(scene: DemoScene) -> bytes:
    image = draw_scene(FIRST_SEED + scene.seed, scene.size_hw).image
    if "16 bit" in scene.key:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint16)
        return bytes(cv2.imencode(".png", grey * 257)[1])
    if scene.is_turned:
        return _add_orientation(_encode(".jpg", np.rot90(image)), 6)
    return _encode(Path(scene.key).suffix, image)


def _encode(suffix: str, image: RgbImage) -> bytes:
    quality = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else [cv2.IMWRITE_WEBP_QUALITY, 90]
    return bytes(cv2.imencode(suffix, np.ascontiguousarray(image[..., ::-1]), quality)[1])


def _add_orientation(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG with an EXIF segment that holds the orientation tag (0x0112) and nothing else."""
    directory = struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + directory
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def _huge_png(side_px: int) -> bytes:
    """A valid header for side x side RGB pixels, with almost no data."""
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, body) for name, body in chunks)


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    write_demo_scenes(parser.parse_args().out)
