"""Cleaning, cutting and comparing texts."""

import re

import numpy as np

GRAM = 8  # words of a run that two texts share


def clean(text: str | None) -> str:
    """One line with single spaces, without the empty brackets that removed cross-references left."""
    return re.sub(r"\s*\(\s*\)", "", " ".join((text or "").split()))


def normalised(text: str) -> str:
    """Letters and digits only, in any case."""
    return re.sub(r"[\W_]+", "", text.casefold())


def cut_words(text: str, most: int) -> str:
    """The first words."""
    return " ".join(text.split()[:most])


def cut_characters(text: str, most: int) -> str:
    """The first characters, up to the end of a word."""
    return text if len(text) <= most else text[: most + 1].rsplit(maxsplit=1)[0]


def words(text: str) -> set[str]:
    """The different words, in any case."""
    return set(re.findall(r"\w+", text.casefold()))


def grams(text: str) -> set[str]:
    """The different runs of eight words."""
    sequence = re.findall(r"\w+", text.casefold())
    return {" ".join(sequence[i : i + GRAM]) for i in range(len(sequence) - GRAM + 1)}


def shared(left: list[set], right: list[set]) -> np.ndarray:
    """How many elements each left and each right set have in common."""
    holders = {}
    for j, elements in enumerate(right):
        for element in elements:
            holders.setdefault(element, []).append(j)
    result = np.zeros((len(left), len(right)), dtype=np.int32)
    for i, elements in enumerate(left):
        found = [j for element in elements for j in holders.get(element, ())]
        result[i] = np.bincount(found, minlength=len(right)) if found else 0
    return result


def sizes(sets: list[set]) -> np.ndarray:
    """How many elements each set has, at least one."""
    return np.array([max(len(elements), 1) for elements in sets])


def jaccard(left: list[str], right: list[str]) -> np.ndarray:
    """Similarity (0 to 1) of every left and right text by their words."""
    left, right = [words(text) for text in left], [words(text) for text in right]
    common = shared(left, right)
    return common / (sizes(left)[:, None] + sizes(right)[None] - common)


def gram_share(left: list[str], right: list[str]) -> np.ndarray:
    """Which share (0 to 1) of the smaller text's runs of eight words is in the other text, for every pair."""
    left, right = [grams(text) for text in left], [grams(text) for text in right]
    return shared(left, right) / np.minimum(sizes(left)[:, None], sizes(right)[None])
