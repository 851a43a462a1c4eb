r"""Final answers in mathematics where a response has no box: what evaluation accepts beside the box.

In this order: the box, if there is any; an ``<answer>`` element; what follows "the answer is" or ``####``; the formula
or the number that the last sentence ends with. Where that leaves a choice between values, or the sentence denies, asks
or supposes, there is no answer. Takes time linear in the text's length and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from g2rl.tasks.answers import (
    BOX,
    MAX_PHRASES,
    NOT_MINE,
    WINDOW,
    after_thinking,
    extract_tagged,
    last_number,
    one_box,
    reconsiders,
    same_spelling,
)
from g2rl.tasks.spelling import CHANGES, canonical

_MAX_SENTENCE = 2_000
_MAX_WORDS = 60  # characters of an answer in words, and of the unit behind a number

_MARKUP = re.compile(r"\*\*|__|`+")
_FORMULA = re.compile(
    r"(?<!\\)\$\$((?:[^$\\]|\\.)+)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+)\$"
    r"|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]",
    re.DOTALL,
)
# Words between two dollar signs: money, not a formula. Commands and the content of braces are no words.
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?!(?:and|or|if|mod|in)\b)[A-Za-z]{2,}(?![^{}]{0,80}\})")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
_PHRASE = re.compile(
    r"\banswers?\b(?:\s{1,3}(?:to|for|of)\s[^.:\n]{1,60}?)?\s{0,3}"
    r"(?:(?:\b(?:is|are|was|(?:would|must|should|will)\s{1,3}be)\b\s{0,3}:?|[:=])\s{0,3}|(?=\\\(|\\\[|\$))"
    r"(?:(?:therefore|thus|then|hence|simply|just|indeed)\s{1,3})?|^####\s{1,3}",
    re.IGNORECASE | re.MULTILINE,
)
# Over the last line.
_HEADING = re.compile(
    r"^#{0,6}\s{0,3}(?:(?:my|the)\s)?(?:final\s)?answers?\s{0,3}\n\s{0,3}(?=\S[^\n]{0,200}\Z)",
    re.IGNORECASE | re.MULTILINE,
)
_CLAUSE = re.compile(r"[.;:!?\n]|,(?![0-9])|\b(?:so|thus|therefore|hence|then|but|and|which|it['’]s)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^\s.])[.!?](?=\s|$)|\n[^\S\n]*\n")
_REASON = re.compile(r",?\s(?:because|since|as|where|which|by|using|from|for|so|with)\s", re.IGNORECASE)
_SUPPOSED = re.compile(
    r"\b(?:if|whether|unless|when|suppos\w+|assum\w+|maybe|perhaps|could|might|may|between|either|neither)\b|\?",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|no|never|nor|wrong|incorrect|false|cannot)\b|n['’]t\b", re.IGNORECASE)
_HEDGE = re.compile(r"(?:[\s,;/&]|\b(?:or|and)\b)*", re.IGNORECASE)
_UNIT = r"(?:\s?(?:[%€£¥°]|[ckm]?m[²³]|[ckm]m\b|kg\b|mg\b|ml\b|mph\b))?"
_NUMBER = rf"([-\u2212]?\\?\$?[0-9](?:[0-9.,/]*[0-9])?)(?![0-9^*/(\\{{_]){_UNIT}(?![A-Za-z])"
# What makes another number of the one before it, or says that it is no exact one.
_MORE = (
    rf"(?!.*(?:[0-9=^*\\]|{CHANGES}|\b(?:is|was|are|were|has|had|of|and|than|roots?|square(?!\s+[a-z])|times|over"
    r"|quarters?|base|choose|remainder|point|below|score)\b))"
)
_WORDS = rf"(?:\s{_MORE}[^\n]{{0,{_MAX_WORDS}}})?"
_STARTS_WITH_NUMBER = re.compile(rf"(?:[A-Za-z]\s?=\s?)?{_NUMBER}{_WORDS}$")
_ENDS_WITH_NUMBER = re.compile(
    r"(?:=|\b(?:is|are|equals?|gets?|becomes?|has|have|costs?|makes?|total of|gives?|yields?|be|takes?|left with)\b"
    rf"|\bit['’]s)\s?{_NUMBER}{_WORDS}$"
)


def lenient_answer(response: str, same: Callable[[str, str], bool] = same_spelling) -> str | None:
    """Return the final answer of a response, boxed or not, None if it has none or leaves a choice as in `one_box`."""
    text = after_thinking(response)
    if BOX.search(text):
        return one_box(text, same)
    text = text[-WINDOW:]
    tagged = extract_tagged(text)
    text = _MARKUP.sub("", text if tagged is None else f"The answer is {tagged}")
    stated = [_stated(text, match) for match in list(_PHRASE.finditer(text))[-MAX_PHRASES:]]
    if stated:
        if reconsiders(text, _PHRASE):
            return None
        # A response that gives two different answers leaves the choice to its reader.
        return stated[0] if len({answer and canonical(answer) for answer in stated}) == 1 else None
    text = text.strip()
    heading = _HEADING.search(text)
    return _stated(text, heading) if heading else _concluded(text)


def _formulas(text: str) -> list[re.Match[str]]:
    return [match for match in _FORMULA.finditer(text) if not _is_money(match)]


def _is_money(formula: re.Match[str]) -> bool:
    """Whether there are words between two dollar signs, or an equals sign before the second: no formula."""
    content = _content(formula)
    return content.endswith("=") or _PROSE.search(content) is not None


def _content(formula: re.Match[str]) -> str:
    return next(filter(None, formula.groups())).strip()


def _outside(text: str) -> str:
    """Return `text` with a blank in place of each formula."""
    return _FORMULA.sub(lambda match: match.group() if _is_money(match) else " ", text)


def _stated(text: str, phrase: re.Match[str]) -> str | None:
    """Return the answer that follows a phrase, None if what follows is no single answer."""
    before = _CLAUSE.split(text[max(0, phrase.start() - 80) : phrase.start()])[-1]
    sentence = _first_sentence(text[phrase.end() : phrase.end() + _MAX_SENTENCE].strip())
    outside = _outside(sentence)
    if NOT_MINE.search(before) or _SUPPOSED.search(outside) or _DENIED.search(outside):
        return None
    return _only_answer(_REASON.split(sentence)[0].strip(" :"))


def _first_sentence(text: str) -> str:
    """Return the first sentence, or the first line where that is shorter, but a displayed formula whole."""
    formula = _FORMULA.match(text)
    head = formula.end() if formula else 0
    end = _SENTENCE_END.search(text, max(0, head - 1))
    return text[:head] + text[head : end.start() + (end.group() == "?") if end else None].partition("\n")[0]


def _only_answer(sentence: str) -> str | None:
    """Return the answer in what follows "the answer is": formulas, a number with its unit, or a few words."""
    formulas = _formulas(sentence)
    if formulas:
        return ", ".join(map(_content, formulas)) if last_number(_outside(sentence)) is None else None
    if not _WORD.search(sentence):
        return sentence or None
    number = _STARTS_WITH_NUMBER.match(sentence)
    if number:
        return number[1]
    return sentence if len(sentence) <= _MAX_WORDS and last_number(sentence) is None else None


def _concluded(text: str) -> str | None:
    """Return what a response without such a phrase ends with: the formulas of its last sentence, else a number."""
    sentence = _last_sentence(text)
    if _SUPPOSED.search(_outside(sentence)) or _DENIED.search(_CLAUSE.split(_outside(sentence))[-1]):
        return None
    formulas = _formulas(sentence)
    short = len(text) <= _MAX_WORDS and not formulas
    if short or (len(text) <= _MAX_SENTENCE and not _WORD.search(_outside(text))):
        alone = _only_answer(text.rstrip(" ."))
        if alone is not None:
            return alone
    if not formulas:
        number = _ENDS_WITH_NUMBER.search(sentence)
        return number[1] if number else None
    values = [_content(formulas[-1])]
    for earlier, later in zip(formulas[-2::-1], formulas[:0:-1], strict=True):
        if not _HEDGE.fullmatch(sentence[earlier.end() : later.start()]):
            break
        values.insert(0, _content(earlier))
    return ", ".join(values) if last_number(sentence[formulas[-1].end() :]) is None else None


def _last_sentence(text: str) -> str:
    """Return the last sentence of at most `_MAX_SENTENCE` characters; a displayed formula is part of the one before."""
    text = text[-_MAX_SENTENCE:].rstrip().rstrip(".!")
    blank = _FORMULA.sub(lambda match: "x" * len(match.group()), text)
    return text[max((end.end() for end in _SENTENCE_END.finditer(blank)), default=0) :].strip()
