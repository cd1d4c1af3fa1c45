"""The scene generator: what a seed promises, and the files of the demo."""

import numpy as np
import pytest

from workers.training.demo_scenes import write_demo_scenes
from workers.training.scenes import MIN_VISIBLE_UNITS2, draw_scene


def test_a_seed_gives_the_same_scene_again_and_another_seed_another():
    first, again, other = draw_scene(7, (120, 160)), draw_scene(7, (120, 160)), draw_scene(8, (120, 160))

    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.owner, again.owner)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_disjoint_and_each_object_shows_enough_of_itself(seed):
    scene = draw_scene(seed, (256, 200))

    masks = scene.masks

    assert scene.image.shape == (256, 200, 3)
    assert scene.image.dtype == np.uint8
    assert masks.shape == (scene.object_count, 256, 200)
    assert masks.sum(axis=0).max(initial=0) <= 1
    assert (masks.sum(axis=(1, 2)) >= MIN_VISIBLE_UNITS2 * 256**2).all()


def test_an_object_looks_unlike_what_surrounds_the_scene():
    scenes = [draw_scene(seed, (256, 256)) for seed in range(10)]

    distances = [
        np.linalg.norm(s.image[mask].mean(axis=0) - s.image[s.owner == 0].mean(axis=0))
        for s in scenes
        for mask in s.masks
    ]

    assert np.mean(np.array(distances) > 20) > 0.9


def test_the_demo_is_a_dozen_files_some_of_them_hostile(tmp_path):
    write_demo_scenes(tmp_path)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]

    assert len(files) == 13
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert len(list((tmp_path / "hostile").iterdir())) == 4
