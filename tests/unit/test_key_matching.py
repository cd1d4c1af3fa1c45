"""A prompt file's keys mean assets exactly, or by the tightest rule that leaves no doubt."""

from __future__ import annotations

import unicodedata

import pytest

from orchestrator.prompts.key_matching import Matched, match

NFD = unicodedata.normalize("NFD", "müllé.png")
NFC = unicodedata.normalize("NFC", "müllé.png")


def matches(keys: list[str], assets: list[str], source: str = "/data/ds/images/val") -> tuple[set[str], Matched]:
    """ "key > asset" of each pair, and the report."""
    with match(keys, enumerate(assets), source=source) as matching:
        return {f"{pair.key} > {assets[pair.asset]}" for pair in matching.pairs()}, matching.report()


@pytest.mark.parametrize(
    ("key", "asset", "rule"),
    [
        ("a/b.jpg", "a/b.jpg", "key"),
        ("a/b", "a/b.jpg", "name without suffix"),
        ("b.png", "b.png", "key"),  # of b.png.txt
        ("lot_jpg.rf.0a1b", "lot_jpg.rf.0a1b.jpg", "name without suffix"),
        (NFC, NFD, "other spelling"),
        (NFD, NFC, "other spelling"),
        ("sub\\a.png", "sub/a.png", "other spelling"),
        ("./sub//a.png", "sub/a.png", "other spelling"),
        (".\\sub\\a", "sub/a.png", "other spelling"),
        ("my%20photo%C3%A9.jpg", "my photoé.jpg", "other spelling"),
        ("a b.jpg", "a%20b.jpg", "other spelling"),
        ("a.JPG", "a.jpg", "other spelling"),
        ("a.png", "a.PNG", "other spelling"),
        ("images\\a.png", "a.png", "other folders"),
        ("images/a.png", "a.png", "other folders"),
        ("a.png", "images/a.png", "other folders"),
        ("obj_train_data/a", "a.jpg", "other folders"),
        ("ds/labels/train/a", "ds/images/train/a.jpg", "other folders"),
        ("labels/train/a", "images/train/a.png", "other folders"),
        ("val/a.jpg", "a.jpg", "other folders"),
        ("images/val/a.jpg", "a.jpg", "other folders"),
        ("C:\\export\\2024\\cam1\\a.jpg", "cam1/a.jpg", "other folders"),
        ("/home/me/ds/a.jpg", "a.jpg", "other folders"),
        ("a.jpg", "val2017/a.jpg", "other folders"),
        ("JPEGImages/a.jpg", "a.jpg", "other folders"),
        ("a.jpg", "a.png", "other suffix"),
        ("x/a.jpeg", "y/a.webp", "other suffix"),
        ("0", "000000.png", "number"),
        ("139", "val2017/000000000139.jpg", "number"),
        ("139", "val2014/COCO_val2014_000000000139.jpg", "number"),
    ],
)
def test_a_key_finds_its_asset(key: str, asset: str, rule: str) -> None:
    found, report = matches([key], ["other.png", asset, "zz/other.png"])
    assert found == {f"{key} > {asset}"}
    assert report.by_rule == {rule: 1}
    assert (report.unmatched, report.several, report.assets) == (0, 0, 1)


@pytest.mark.parametrize(
    ("keys", "assets"),
    [
        (["train/1.jpg", "valid/1.jpg"], ["1.jpg"]),  # two pictures of one name, of which one is here
        (["x/a.jpg"], ["y/a.jpg", "z/a.jpg"]),
        (["a.bmp"], ["a.jpg", "a.png"]),
        (["x/a.jpg"], ["x/b.jpg"]),
        (["lot.v2"], ["lot.png"]),  # a dot of the name is no suffix
        (["7"], ["img_7.png"]),  # the number is not the name
        (["img_7"], ["7.png"]),
        (["a%ff.png"], ["aÿ.png"]),
    ],
)
def test_a_key_that_leaves_a_doubt_finds_nothing(keys: list[str], assets: list[str]) -> None:
    found, report = matches(keys, assets)
    assert found == set()
    assert (report.unmatched, report.assets) == (len(keys), 0)


def test_a_loose_rule_gives_no_asset_that_a_tighter_one_gave_to_another_key() -> None:
    found, report = matches(["val/1.jpg", "train/1.jpg"], ["1.jpg"])
    assert found == {"val/1.jpg > 1.jpg"}
    assert (report.ambiguous, report.ambiguous_first) == (1, ("train/1.jpg",))


def test_a_sources_folder_with_a_dot_is_known_by_its_own_spelling() -> None:
    found, _ = matches(["St.Louis/1.jpg", "St.Louis/a/1.jpg"], ["1.jpg", "a/1.jpg"], source="/data/St.Louis")
    assert found == {"St.Louis/1.jpg > 1.jpg", "St.Louis/a/1.jpg > a/1.jpg"}


def test_an_exact_key_is_not_given_to_its_likes() -> None:
    found, _ = matches(["a.jpg", "b.png", "images/b.png"], ["a.jpg", "sub/a.jpg", "b.png", "x/b.png"])
    assert found == {"a.jpg > a.jpg", "b.png > b.png"}


@pytest.mark.parametrize(
    ("key", "assets"),
    [("a", ["a.jpg", "a.png"]), ("1", ["left/0001.png", "right/0001.png"])],
)
def test_a_key_that_means_several_assets_is_said_with_their_names(key: str, assets: list[str]) -> None:
    found, report = matches([key], assets)
    assert found == {f"{key} > {asset}" for asset in assets}
    assert (report.several, report.several_first) == (1, ((key, tuple(assets)),))


def test_keys_of_one_file_may_be_written_in_different_ways() -> None:
    keys = ["a.png", ".\\b.png", "c", "images/d.png", "5", "gone.png", "a%2Epng"]
    found, report = matches(keys, ["a.png", "b.png", "c.jpg", "d.png", "05.png"])
    assert found >= {".\\b.png > b.png", "c > c.jpg", "images/d.png > d.png", "5 > 05.png", "a.png > a.png"}
    assert sum(report.by_rule.values()) == 6
    assert report.unmatched_first == ("gone.png",)


@pytest.mark.slow
def test_many_keys_and_assets_are_matched_in_little_memory() -> None:
    import tracemalloc

    def peak_of(count: int) -> int:
        tracemalloc.start()
        keys = (f"labels/{n:07}" for n in range(count))
        assets = ((n, f"images/{n:07}.jpg") for n in range(count))
        with match(keys, assets, source="/x") as matching:
            pairs = sum(1 for _ in matching.pairs())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pairs == count
        return peak

    peak_of(10)
    assert peak_of(40_000) < peak_of(20_000) + 2**20
