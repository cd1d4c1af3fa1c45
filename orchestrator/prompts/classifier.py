"""From --classify, --classifier and --classify-threshold to what is stored on a job's row."""

from __future__ import annotations

from db.texts import is_storable
from workers.classifiers.asked import BACKGROUND, AskedClassifier, ClassifierError
from workers.classifiers.classifier import MAX_WORD_CHARS, MAX_WORDS, examine

_DEFAULT_THRESHOLD = 0.5


def read_classifier(name: str, words: str, *, threshold: float | None = None) -> AskedClassifier:
    """Find the classifier and check its words, which are separated by commas.

    Raises ClassifierError for words that are none, twice, too long or "background", and what `examine` raises.
    """
    listed = [word.strip() for word in words.split(",") if word.strip()]
    if not listed or len(listed) > MAX_WORDS:
        raise ClassifierError(f"--classify: {len(listed)} words, expected 1 to {MAX_WORDS}, separated by commas")
    # CLIP and most SigLIPs read small letters and single spaces. Words that look the same to them share their score.
    as_read = [" ".join(word.lower().split()) for word in listed]
    for n, word in enumerate(listed):
        if as_read[n] in as_read[:n]:
            raise ClassifierError(f"--classify: {word!r} comes twice, for capitals and spaces count as the same word")
        if as_read[n] == BACKGROUND:
            raise ClassifierError(f"--classify: {BACKGROUND!r} is always asked beside the words; leave it out")
        if len(word) > MAX_WORD_CHARS or not word.isprintable() or not is_storable(word):
            raise ClassifierError(f"--classify: {word[:120]!r} is no label, expected at most {MAX_WORD_CHARS} letters")
    found, identity = examine(name)
    limit = _DEFAULT_THRESHOLD if threshold is None else threshold
    return AskedClassifier(name=found, identity=identity, words=tuple(listed), threshold=limit)
