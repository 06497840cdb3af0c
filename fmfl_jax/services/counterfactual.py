"""The same text with words swapped that must not matter (section III-D): he and she, names.

The idea is HELM's (Liang et al., TMLR 2023) and Garg et al., AIES 2019; the lists are ours (word_lists/). All words of
a text are swapped at once and keep their case. "her" is "his" before a word that can follow a possessive and "him"
elsewhere, by one look at the next word: a rule of thumb, which a parser would do better.

    >>> swap_gender("She saw him and his mother.")   # "He saw her and her father."
    >>> swap_words("Dear Emily", read_pairs("name_swaps"))
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

FOLDER = pathlib.Path(__file__).parent / "word_lists"
_WORD = re.compile(r"[^\W\d_]+")
# Words after which "her" stood alone: no noun follows it.
_NO_NOUN = frozenset(
    "a about after again all alone always an and as at away back because before but by do down for from had has her "
    "here his home how if in into is it later more my never no not now of off on or our out over she so than that the "
    "their then there these they this those though through to today too tomorrow under until up was we well were what "
    "when where whether while who why will with yesterday you your".split()
)


def read_pairs(name: str) -> dict[str, str]:
    """Both directions of word_lists/NAME.tsv in lower case. Raises ValueError for a line that is not a pair of words,
    and for a word with two partners: swapping back would be another text."""
    pairs: dict[str, str] = {}
    for left, right in read_rows(name):
        for word, partner in ((left.lower(), right.lower()), (right.lower(), left.lower())):
            if pairs.setdefault(word, partner) != partner:
                raise ValueError(f"{name}: {word!r} has two partners, {pairs[word]!r} and {partner!r}")
    return pairs


def read_rows(name: str) -> list[list[str]]:
    """The pairs of word_lists/NAME.tsv; lines that begin with # are comments. Raises ValueError that names the
    line."""
    rows = []
    for number, line in enumerate((FOLDER / f"{name}.tsv").read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#"):
            row = line.split("\t")
            if len(row) != 2 or not all(row):
                raise ValueError(f"{name}.tsv, line {number}: expected two words and a tab, got {line!r}")
            rows.append(row)
    return rows


def swap_words(text: str, pairs: Mapping[str, str]) -> str:
    """The text with every whole word that `pairs` has (in lower case) replaced, its case kept: Emily, EMILY, emily."""
    return _WORD.sub(lambda found: _as(found[0], pairs.get(found[0].lower()) or found[0]), text)


def swap_gender(text: str, pairs: Mapping[str, str] | None = None) -> str:
    """The text with he and she and their kind swapped, by word_lists/gender_swaps.tsv where pairs is None."""
    if pairs is None:
        pairs = read_pairs("gender_swaps")

    def replace(found: re.Match[str]) -> str:
        word = found[0].lower()
        if word in ("his", "him"):
            return _as(found[0], "her" if word == "him" or _noun_follows(text, found.end()) else "hers")
        if word in ("her", "hers"):
            return _as(found[0], "his" if word == "hers" or _noun_follows(text, found.end()) else "him")
        return _as(found[0], pairs.get(word) or found[0])

    return _WORD.sub(replace, text)


def swap_all(texts: Sequence[str], swap) -> tuple[list[str], list[bool]]:
    """(swapped texts, whether each one changed): what `align.counterfactual` needs. swap: text -> text."""
    swapped = [swap(text) for text in texts]
    return swapped, [before != after for before, after in zip(texts, swapped)]


def _noun_follows(text: str, end: int) -> bool:
    """Whether a word that may belong to a possessive comes next, with nothing but a space between."""
    following = re.match(r"\s+([^\W\d_]+)", text[end:])
    return following is not None and following[1].lower() not in _NO_NOUN


def _as(model: str, word: str) -> str:
    """`word` in the case of `model`."""
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word
