"""Which assets a prompt file's keys mean: exactly, or by the tightest rule that finds an asset.

The rules are tried one after the other for each key. First come the asset's own key, the key without its suffix, and
another spelling of either. A number means every file of that number. Looser rules (folders left out, another suffix)
count only if one key matches one asset. If two keys or two assets look the same to such a rule, they are not matched,
and this is reported.

Everything is in a temporary SQLite file, so ten million keys need little memory.
"""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.prompts import key_forms

_ROWS = 10_000
_STEPS = 10_000  # of SQLite's machine, between two looks at `stop`: some milliseconds
_NAMED = 5
_ENDINGS = (4, 3, 2, 1)


class MatchingError(RuntimeError):
    """The disk had no room for the matching. The message says where and why."""


class Rule(StrEnum):
    """How a key was found to mean an asset, from tight to loose."""

    KEY = "key"  # the asset's own key
    STEM = "name without suffix"  # YOLO's label files and many detectors give no suffix
    SPELLING = "other spelling"  # Unicode form, \ for /, ./, %20, .JPG for .jpg
    FOLDERS = "other folders"  # the source's own, images/ for labels/, or more folders on one side
    SUFFIX = "other suffix"  # a.jpg for a.png
    NUMBER = "number"  # 7 for 0007.jpg in any folder


class Pair(NamedTuple):
    asset: int
    key: str
    rule: Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The result for a prompt file's keys.

    by_rule: number of keys that mean an asset, by rule. unmatched: keys that mean no asset. ambiguous: unmatched keys
    for which a loose rule found several assets, or one asset that another key also means. several: keys that mean
    several assets; all these assets get the prompts. The first few of each are named. assets: how many have a prompt.
    """

    by_rule: dict[str, int]
    unmatched: int
    unmatched_first: tuple[str, ...]
    ambiguous: int
    ambiguous_first: tuple[str, ...]
    several: int
    several_first: tuple[tuple[str, tuple[str, ...]], ...]
    assets: int

    def as_json(self) -> dict[str, Any]:
        return {
            "by_rule": self.by_rule,
            "unmatched": self.unmatched,
            "unmatched_first": list(self.unmatched_first),
            "ambiguous": self.ambiguous,
            "ambiguous_first": list(self.ambiguous_first),
            "several": self.several,
            "several_first": [{"key": key, "assets": list(assets)} for key, assets in self.several_first],
            "assets_matched": self.assets,
        }


class Matching:
    """A finished matching. Its pairs are read from the temporary file while it is open."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def pairs(self, *, exact: bool = True) -> Iterator[Pair]:
        """Every asset of every key, without the pairs whose key is the asset's own."""
        rows = self._db.execute(
            "SELECT asset.id, prompt.key, pair.rule FROM pair JOIN asset ON asset.n = pair.asset "
            "JOIN prompt ON prompt.n = pair.prompt WHERE ? OR pair.rule <> ? ORDER BY asset.n",
            (exact, str(Rule.KEY)),
        )
        for asset, key, rule in rows:
            yield Pair(asset=asset, key=key, rule=Rule(rule))

    def report(self) -> Matched:
        by_rule = dict(self._db.execute("SELECT rule, count(DISTINCT prompt) FROM pair GROUP BY rule").fetchall())
        unmatched, first = self._named("rule IS NULL")
        ambiguous, ambiguous_first = self._named("rule IS NULL AND ambiguous")
        several = self._db.execute(
            "SELECT prompt, count(*) OVER () FROM pair GROUP BY prompt HAVING count(*) > 1 ORDER BY prompt LIMIT ?",
            (_NAMED,),
        ).fetchall()
        return Matched(
            by_rule={str(rule): by_rule[rule] for rule in Rule if rule in by_rule},
            unmatched=unmatched,
            unmatched_first=first,
            ambiguous=ambiguous,
            ambiguous_first=ambiguous_first,
            several=several[0][1] if several else 0,
            several_first=tuple(self._assets_of(prompt) for prompt, _ in several),
            assets=self._db.execute("SELECT count(DISTINCT asset) FROM pair").fetchone()[0],
        )

    def _named(self, condition: str) -> tuple[int, tuple[str, ...]]:
        count = self._db.execute(f"SELECT count(*) FROM prompt WHERE {condition}").fetchone()[0]
        rows = self._db.execute(f"SELECT key FROM prompt WHERE {condition} ORDER BY n LIMIT ?", (_NAMED,))
        return count, tuple(key for (key,) in rows)

    def _assets_of(self, prompt: int) -> tuple[str, tuple[str, ...]]:
        [key] = self._db.execute("SELECT key FROM prompt WHERE n = ?", (prompt,)).fetchone()
        rows = self._db.execute(
            "SELECT asset.key FROM pair JOIN asset ON asset.n = pair.asset WHERE prompt = ? ORDER BY asset.n LIMIT ?",
            (prompt, _NAMED),
        )
        return key, tuple(name for (name,) in rows)


@contextmanager
def match(
    keys: Iterable[str], assets: Iterable[tuple[int, str]], *, source: str, stop: threading.Event | None = None
) -> Iterator[Matching]:
    """Match a prompt file's keys with (id, key) of a job's assets. Both may be of any number and are read once.

    source: the job's source; a key may begin with its last folders. stop: ends the matching soon after it is set.
    Raises MatchingError if the disk is full, or when it is stopped.
    """
    with tempfile.TemporaryDirectory(prefix="maskfleet-match-") as folder:
        db = sqlite3.connect(Path(folder) / "match.sqlite", isolation_level=None)
        if stop is not None:
            db.set_progress_handler(lambda: int(stop.is_set()), _STEPS)
        try:
            _fill(db, keys, assets)
            _match_own_words(db)
            _match_loosely(db, source.rstrip("/"))
            yield Matching(db)
        except sqlite3.Error as error:
            raise MatchingError(
                f"{folder}: the prompts cannot be matched there ({error}); is the disk full?"
            ) from error
        finally:
            db.close()


def _fill(db: sqlite3.Connection, keys: Iterable[str], assets: Iterable[tuple[int, str]]) -> None:
    # The file is not needed after this process, so nothing waits for the disk.
    db.executescript(
        """PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE;
           CREATE TABLE prompt (n INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, rule TEXT,
                                ambiguous INTEGER NOT NULL DEFAULT 0);
           CREATE TABLE asset (n INTEGER PRIMARY KEY, id INTEGER NOT NULL, key TEXT NOT NULL,
                               taken INTEGER NOT NULL DEFAULT 0);
           CREATE TABLE pair (prompt INTEGER NOT NULL, asset INTEGER NOT NULL, rule TEXT NOT NULL,
                              PRIMARY KEY (prompt, asset)) WITHOUT ROWID;"""
    )
    _insert(db, "INSERT OR IGNORE INTO prompt (key) VALUES (?)", ((key,) for key in keys))
    _insert(db, "INSERT INTO asset (id, key) VALUES (?, ?)", iter(assets))


def _insert(db: sqlite3.Connection, statement: str, rows: Iterator[tuple[Any, ...]]) -> None:
    db.execute("BEGIN")
    while batch := list(islice(rows, _ROWS)):
        db.executemany(statement, batch)
    db.execute("COMMIT")


Form = Callable[[str], str | None]


def _match_own_words(db: sqlite3.Connection) -> None:
    """Match keys that equal an asset's key, whole or without the suffix. For most files this is enough."""
    db.execute(
        "INSERT INTO pair SELECT prompt.n, asset.n, ? FROM asset JOIN prompt USING (key)",
        (str(Rule.KEY),),
    )
    _settle(db, Rule.KEY)
    db.create_function("stem", 1, key_forms.without_suffix, deterministic=True)
    db.execute(
        """INSERT INTO pair WITH named AS MATERIALIZED (SELECT n, stem(key) AS stem FROM asset)
           SELECT prompt.n, named.n, ? FROM named JOIN prompt ON prompt.key = named.stem WHERE prompt.rule IS NULL""",
        (str(Rule.STEM),),
    )
    _settle(db, Rule.STEM)


def _match_loosely(db: sqlite3.Connection, source: str) -> None:
    """Match the other keys, among the assets of the same name group."""
    if not db.execute("SELECT EXISTS (SELECT 1 FROM prompt WHERE rule IS NULL)").fetchone()[0]:
        return
    db.create_function("name_group", 1, key_forms.group, deterministic=True)
    db.executescript(
        """CREATE TEMP TABLE wanted AS SELECT DISTINCT name_group(key) AS name FROM prompt WHERE rule IS NULL;
           CREATE UNIQUE INDEX temp.wanted_name ON wanted (name);
           CREATE TEMP TABLE alike AS
               WITH grouped AS MATERIALIZED (SELECT n, key, name_group(key) AS name FROM asset)
               SELECT n, key FROM grouped JOIN wanted USING (name);"""
    )
    spelling, stem = key_forms.spelling, key_forms.without_suffix

    # Whole names before names without a suffix: a.jpg means a.jpg, also if there is an a.png.
    _join(db, Rule.SPELLING, spelling, spelling, one_asset=True)
    _join(db, Rule.SPELLING, spelling, lambda key: stem(spelling(key)))
    for rule, of_prompt, of_asset in _loose_rules(source):
        _join_one_to_one(db, rule, of_prompt, of_asset)
    _join(db, Rule.NUMBER, _number_asked, lambda key: key_forms.number(stem(key)))


def _number_asked(key: str) -> str | None:
    return key_forms.number(key) if key.isdecimal() else None


def _loose_rules(source: str) -> Iterator[tuple[Rule, Form, Form]]:
    spelling, layout = key_forms.spelling, key_forms.without_layout
    stem, plain = key_forms.without_suffix, key_forms.without_image_suffix

    folder = spelling(f"{source}/_").removesuffix("/_")  # as a file's name, its suffix would be in small letters

    def below(key: str) -> str | None:
        return key_forms.below_source(spelling(key), folder)

    def bare(key: str) -> str:
        return layout(spelling(key))

    folders: list[tuple[Form, Form]] = [(below, spelling), (bare, bare)]
    folders += [(_ending_of(bare, parts), _ending_of(bare, parts)) for parts in _ENDINGS]
    for of_prompt, of_asset in folders:
        yield Rule.FOLDERS, of_prompt, of_asset
        yield Rule.FOLDERS, of_prompt, _then(of_asset, stem)
    for of_prompt, of_asset in [(spelling, spelling), *folders]:
        yield Rule.SUFFIX, _then(of_prompt, plain), _then(of_asset, stem)


def _ending_of(form: Form, parts: int) -> Form:
    return _then(form, lambda key: key_forms.ending(key, parts))


def _then(first: Form, second: Callable[[str], str]) -> Form:
    def both(key: str) -> str | None:
        found = first(key)
        return None if found is None else second(found)

    return both


def _join(db: sqlite3.Connection, rule: Rule, of_prompt: Form, of_asset: Form, *, one_asset: bool = False) -> None:
    """Match every key without an asset with all assets of its form."""
    if not _make_forms(db, of_prompt, of_asset):
        return
    alone = "WHERE form IN (SELECT form FROM asset_form GROUP BY form HAVING count(*) = 1)" if one_asset else ""
    db.execute(
        f"""INSERT INTO pair SELECT prompt_form.n, asset_form.n, ? FROM prompt_form
            JOIN (SELECT * FROM asset_form {alone}) AS asset_form USING (form)""",
        (str(rule),),
    )
    _settle(db, rule)


def _join_one_to_one(db: sqlite3.Connection, rule: Rule, of_prompt: Form, of_asset: Form) -> None:
    """Match a key without an asset with the one asset of its form, if no other key has that form or that asset."""
    if not _make_forms(db, of_prompt, of_asset):
        return
    db.executescript(
        """CREATE TEMP TABLE one_prompt AS SELECT form, min(n) AS n, count(*) AS many FROM prompt_form GROUP BY form;
           CREATE TEMP TABLE one_asset AS
               SELECT form, min(asset_form.n) AS n, count(*) AS many, max(taken) AS taken
               FROM asset_form JOIN asset USING (n) GROUP BY form;
           UPDATE prompt SET ambiguous = 1 WHERE n IN (
               SELECT prompt_form.n FROM prompt_form JOIN one_prompt USING (form) JOIN one_asset USING (form)
               WHERE one_prompt.many > 1 OR one_asset.many > 1 OR one_asset.taken);"""
    )
    db.execute(
        """INSERT INTO pair SELECT one_prompt.n, one_asset.n, ? FROM one_prompt JOIN one_asset USING (form)
           WHERE one_prompt.many = 1 AND one_asset.many = 1 AND NOT taken""",
        (str(rule),),
    )
    db.executescript("DROP TABLE one_prompt; DROP TABLE one_asset;")
    _settle(db, rule)


def _make_forms(db: sqlite3.Connection, of_prompt: Form, of_asset: Form) -> bool:
    """Make tables of the forms: of all keys without an asset, and of the `alike` assets. False if no key is left."""
    db.executescript("DROP TABLE IF EXISTS prompt_form; DROP TABLE IF EXISTS asset_form;")
    db.create_function("form_of_prompt", 1, of_prompt, deterministic=True)
    db.create_function("form_of_asset", 1, of_asset, deterministic=True)
    db.executescript(
        """CREATE TEMP TABLE prompt_form AS
               WITH formed AS MATERIALIZED (SELECT form_of_prompt(key) AS form, n FROM prompt WHERE rule IS NULL)
               SELECT form, n FROM formed WHERE form <> '';
           CREATE INDEX temp.prompt_form_form ON prompt_form (form);"""
    )
    if not db.execute("SELECT EXISTS (SELECT 1 FROM prompt_form)").fetchone()[0]:
        return False
    db.execute(
        """CREATE TEMP TABLE asset_form AS
               WITH formed AS MATERIALIZED (SELECT form_of_asset(key) AS form, n FROM alike)
               SELECT form, n FROM formed WHERE form IN (SELECT form FROM prompt_form)"""
    )
    db.execute("CREATE INDEX temp.asset_form_form ON asset_form (form)")
    return True


def _settle(db: sqlite3.Connection, rule: Rule) -> None:
    for table, column, change in (("prompt", "prompt", "rule = :rule"), ("asset", "asset", "taken = 1")):
        db.execute(
            f"UPDATE {table} SET {change} WHERE n IN (SELECT {column} FROM pair WHERE rule = :rule)",
            {"rule": str(rule)},
        )
