"""How answers are made comparable before they are compared.

Two forms: `plain` for exact match and loyalty, which only forgives what a reader would not see, and `vqa_normal` for
VQA accuracy, after the published evaluation of VQA.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

#: Source: GT-Vision-Lab/VQA vqaEval.py, its table of number words
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
#: Source: GT-Vision-Lab/VQA vqaEval.py
_ARTICLES = frozenset({"a", "an", "the"})
#: removed where a space is beside them, a space otherwise. Source: GT-Vision-Lab/VQA vqaEval.py@a013f00; the list of
#: facebookresearch/mmf m4c_evaluators.py, which LLaVA uses, is the same
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
#: words whose apostrophes people leave out. Source: the words of GT-Vision-Lab/VQA vqaEval.py; the forms without
#: apostrophes are derived here
_CONTRACTIONS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "i'd've",
    "i'm",
    "i've",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "let's",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "she'd've",
    "she's",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
#: without its apostrophe the word means something else, so it stays as it is
_WORDS_OF_THEIR_OWN = frozenset({"lets", "shes"})


def _forms_without_apostrophes(word: str) -> list[str]:
    """Every way of leaving out one apostrophe or more."""
    parts = word.split("'")
    glues = itertools.product(("", "'"), repeat=len(parts) - 1)
    forms = ["".join(itertools.chain(*zip(parts, (*glue, ""), strict=True))) for glue in glues]
    return [form for form in forms if form != word and form not in _WORDS_OF_THEIR_OWN]


_FULL_FORM = {form: word for word in _CONTRACTIONS for form in _forms_without_apostrophes(word)}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_WORD = re.compile(r"[^\W_]+")


def plain(text: str) -> str:
    """For exact match: case, width and runs of white space do not count, nor do quotes and full stops around it."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip("\"'`").rstrip(".!").strip()


def vqa_normal(text: str) -> str:
    """For VQA accuracy: punctuation, articles, number words and contractions as in the published evaluation.

    One difference: the published pattern for full stops ends after 32 of them.
    """
    text = text.replace("\n", " ").replace("\t", " ").replace("\u2019", "'").strip()
    numbers = bool(_COMMA_IN_NUMBER.search(text))
    bare = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space or numbers else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", bare).lower().split())
    return " ".join(_FULL_FORM.get(word, word) for word in words if word not in _ARTICLES)


def yes_or_no(text: str) -> bool | None:
    """True or False after the first word that is yes or no; None if there is none."""
    for word in _WORD.findall(text.casefold()):
        if word in ("yes", "no"):
            return bool(word == "yes")
    return None
