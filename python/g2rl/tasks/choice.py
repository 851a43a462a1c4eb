r"""Multiple choice: which option, A to J, a response claims.

A claim is a box, an ``<answer>`` element, or a sentence that gives the answer ("The answer is (B)", "B is correct");
without one, what the response ends with. Two claims that differ are no answer, whichever of them is right; a letter
that is only mentioned, denied or supposed is no claim. The formats are those that the extraction of MMLU-Pro
(https://github.com/TIGER-AI-Lab/MMLU-Pro) and simple-evals (https://github.com/openai/simple-evals) look for, and what
models write besides.

Model text is untrusted: only its last `WINDOW` characters are read, in bounded time, and nothing here raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from g2rl.tasks.answers import MAX_PHRASES, NOT_MINE, WINDOW, after_thinking, boxed_spans, reconsiders
from g2rl.tasks.spelling import UNSEEN, canonical, without_wrappers

LETTERS = "ABCDEFGHIJ"
_MAX_CONTENT = 1_000  # characters of a box or a line; a longer one names no option

_MARKUP = re.compile(rf"[{''.join(map(chr, UNSEEN))}]|\*+|`+|\$+|\\[()\[\]]|\\boxed(?=\{{)")
_ENCLOSED = r"[(\[{]\s?([A-Ja-j])\s?[)\]}]"
# A bare capital that is not part of a word, formula or name ("B-cells", "C = 2"), nor an article or the pronoun: after
# a blank only words follow that go on about an answer.
_BARE = (
    r"([A-J])(?![A-Za-z0-9_'’^=(\[{<>/*+–—-]|\s{0,3}[+*/^=]\s{0,3}[A-Za-z0-9]|\s{1,3}"
    r"(?!(?:because|since|as|due|given|which|so|and|or|but|not|rather|based|according)\b)[A-Za-z0-9])"
)
_SMALL = r"([a-j])(?=\s{0,3}[.)]?\s{0,3}(?:\n|$))"
_LETTER = rf"(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\s{{1,3}})?(?:{_ENCLOSED}|{_BARE}|{_SMALL})"
_FIRST = re.compile(rf"\s{{0,3}}(?:(?:either|both|between|one of)\s{{1,3}})?{_LETTER}")
_HEDGE = r"(?:\s|\b(?:and|or|maybe|perhaps|possibly|even|also|else|either)\b){0,6}"
_NEXT = re.compile(
    rf"[\s.…)]{{0,8}}(?:[,;/&+–—-]|\b(?:and|or)\b){_HEDGE}{_LETTER}|\s{{0,3}}{_ENCLOSED}"
    r"|[.)]?\s{1,3}([A-J])(?=[.)]?\s{0,3}(?:$|\n|[A-J](?![A-Za-z])))"
)
_ALTERNATIVE = re.compile(rf"(?:\b(?:or|and)\b|[;,/]){_HEDGE}(?:{_ENCLOSED}|([A-J])[):](?!\w))")
# A dash before a number is its sign.
_LINK = re.compile(r"^(?:[\s)\].,:—]|[–-](?=\s+[^\s\d.]))*(?:(?:i\.e\.|that is|namely|which is),?\s)?")
_TAG = re.compile(r"<answer>([^<]{1,1000})</answer>")
_LABEL = re.compile(r"[(\[]?([A-J])([)\].:])\s{0,8}(\S.*)?$")

_SUBJECT = (
    r"(?:answer(?:\s{1,3}(?:choice|option|letter))?"
    r"|(?:correct|right|best|final|my)\s{1,3}(?:option|choice|letter|pick|selection))"
)
_PHRASE = re.compile(
    rf"\b(?:{_SUBJECT}(?:\s{{1,3}}(?:to|for|of)\s[^.:\n]{{1,60}}?)?\s{{0,3}}"
    r"(?:\b(?:is|was|(?:would|must|should|will|has to)\s{1,3}be)\b|[:=]|-{1,2}>?|=>|→|–|—)"
    r"|(?:I|we)(?:['’](?:ll|d)|\s{1,3}(?:will|would|should|can|must))?\s{1,3}(?:choose|select|pick|go\s{1,3}with)\b"
    r"|(?:so|thus|therefore|hence),?\s{1,3}(?:choose|select|pick)\b)"
    r"(?:\s{0,3}(?:\b(?:therefore|thus|then|hence|clearly|definitely|probably|most|likely|indeed|simply)\b|:)){0,3}",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    rf"(?:{_ENCLOSED}|(?<![A-Za-z0-9])([A-J])\)?)\s{{1,3}}(?:is|must be|seems)\s{{1,3}}"
    r"(?:(?:indeed|clearly|therefore|thus|the|only)\s{1,3}){0,3}(?:correct|right|best)"
    r"(?:\s{1,3}(?:answer|option|choice|one))?(?=\s{0,3}(?:[.,;!\n]|$|(?:and|or|because|since|as)\b))"
)
# "Statement B is correct" is about another B.
_BEFORE_VERDICT = re.compile(
    r"(?:^|[.,;:!?\n(]|\b(?:so|that|only|and|or|thus|therefore|hence|then|option|choice|answer))\s*$", re.IGNORECASE
)
_CLAUSE = re.compile(r"[.,;:!?\n]|\b(?:so|thus|therefore|hence|then|but|and)\b", re.IGNORECASE)
_TAKEN_BACK = re.compile(
    r"[)\]}]?\s{0,3}(?:\?|(?:is|was|would|seems|cannot|can['’]t)\b(?!\s{1,3}(?:the\s{1,3})?(?:correct|right|best))"
    r"|,?\s{0,3}(?:if|unless|when)\b)",
    re.IGNORECASE,
)
_REASON = re.compile(r"[.\n]|\b(?:because|since|as|while|whereas|rather|not|but|instead|unlike|which)\b", re.IGNORECASE)
_BECAUSE = re.compile(r"[)\].,:]{0,2}\s{0,3}(?:because|since)\b")
_DENIED = re.compile(
    r"\b(?:neither|except|eliminat\w*|rul\w+ out|exclud\w+|reject\w*|discard\w*|unlike|rather|instead|versus|vs|"
    r"contradict\w*|dismiss\w*|remov\w+|possibly)\b|\?",
    re.IGNORECASE,
)
_THEREFORE = r"\b(?:so|thus|therefore|hence),?\s+(?:(?:it['’]s|it is|it must be|that['’]s)\s+)?"
_ENDING = re.compile(
    rf"(?:{_THEREFORE}|\bit must be\s+|\b(?:option|choice|choose|pick|select)\s+|(?:→|=>)\s*)([A-J])[.!]?$"
    rf"|(?:{_THEREFORE}|\b(?:is|be|are|option|choice|answer|choose|pick|select|with)\s+|(?:→|=>|:)\s*)"
    r"[(\[]([A-J])[)\]][.!]?$",
    re.IGNORECASE,
)
_BOLD_ENDING = re.compile(
    rf"(?:{_THEREFORE}|\b(?:get|obtain|is|be|option|choice|choose|pick|select|with)\s+|(?:→|=>|:)\s*)"
    r"\*\*[(\[]?([A-J])[)\]]?[.!]?\*\*[.!]?$",
    re.IGNORECASE,
)


def boxed_letter(response: str, options: Sequence[str] = ()) -> str | None:
    r"""Return the letter in the last box of a response: what the prompt asks for and the training reward takes.

    None without a box, when the last one holds no letter, and when anything else in the response claims another.
    """
    boxes = _boxes(after_thinking(response)[-WINDOW:])
    return claimed_letter(response, options) if boxes and _read(boxes[-1], {}) else None


def claimed_letter(response: str, options: Sequence[str] = ()) -> str | None:
    """Return the letter of the one option that a response claims as its answer, None if it claims none or several.

    Args:
        response: the whole response.
        options: the options' texts, at most ten; an answer that quotes one of them claims its letter. Without them
            only letters are read.
    """
    text = after_thinking(response)[-WINDOW:]
    texts = _option_keys(options)
    plain = _plain(text)
    marked = set().union(*(_read(content, texts) for content in [*_boxes(text), *_TAG.findall(text)]))
    claims = marked | _stated(plain, texts) | _judged(plain)
    if claims and not marked and reconsiders(plain, _PHRASE, _VERDICT):
        return None
    if not claims:
        claims = _standing_alone(plain, texts) or _ending(text, plain)
    return claims.pop() if len(claims) == 1 else None


def _plain(text: str) -> str:
    """Return `text` without the marks of Markdown and TeX that surround letters."""
    return _MARKUP.sub("", without_wrappers(text))


def _key(text: str) -> str:
    return canonical(_plain(text), units=False).casefold().strip(" .,;:!\"'“”")


def _option_keys(options: Sequence[str]) -> dict[str, str]:
    """Return letters by option text; a text that two options share names neither."""
    keys = [_key(option) for option in options]
    return {key: letter for key, letter in zip(keys, LETTERS, strict=False) if key and keys.count(key) == 1}


def _boxes(text: str) -> list[str]:
    return [text[start:end] for start, end in boxed_spans(text) if end - start <= _MAX_CONTENT]


def _letters(text: str) -> tuple[set[str], int]:
    """Return the letters that `text` starts with ("B", "(A) or (C)", "A, B and D"), and where they end."""
    found: set[str] = set()
    end = 0
    match = _FIRST.match(text)
    while match:
        found.add(_letter(match))
        end = match.end()
        match = _NEXT.match(text, end)
    return found, end


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def _quoted(text: str, texts: dict[str, str]) -> set[str]:
    letter = texts.get(_key(text)) if texts and len(text) <= _MAX_CONTENT else None
    return {letter} if letter else set()


def _read(content: str, texts: dict[str, str]) -> set[str]:
    """Return the letters that `content` as a whole names: as letters, by an option's text, or as ``C) text``."""
    plain = _plain(content).strip()
    letters, end = _letters(plain)
    if len(letters) > 1 or (letters and not plain[end:].strip(" .!)]}")):
        return letters
    quoted = _quoted(plain, texts)
    label = _LABEL.match(plain)
    return {label[1]} | _quoted(label[3], texts) if label and label[3] and not quoted else quoted


def _stated(plain: str, texts: dict[str, str]) -> set[str]:
    """Return what sentences such as "the answer is ..." claim."""
    found: set[str] = set()
    for match in list(_PHRASE.finditer(plain))[-MAX_PHRASES:]:
        if not NOT_MINE.search(_clause_before(plain, match.start())):
            lines = plain[match.end() : match.end() + _MAX_CONTENT].lstrip().split("\n", 2)
            if len(lines) < 2 or not _goes_on(lines[0], lines[1]):
                found |= _claim(lines[0].strip(), texts)
    return found


def _clause_before(plain: str, end: int) -> str:
    return _CLAUSE.split(plain[max(0, end - 80) : end])[-1]


def _goes_on(line: str, following: str) -> bool:
    """Whether two lines are neighbours in a list of options: ``(A) ...``, ``(B) ...``."""
    first, second = _LABEL.match(line.strip()), _LABEL.match(following.strip())
    return first is not None and second is not None and ord(second[1]) == ord(first[1]) + 1


def _claim(line: str, texts: dict[str, str]) -> set[str]:
    """Return the letters that a line claims which follows "the answer is"."""
    letters, end = _letters(line)
    if not letters or line[end:].strip(" .!)]}"):
        # An option may read "E. coli" or "A small increase".
        for part in (line, line.partition(". ")[0], _REASON.split(line)[0]):
            if quoted := _quoted(part, texts):
                return quoted
    rest = line[end:]
    if not letters or _TAKEN_BACK.match(rest):
        return set()
    # "(B) Paris", "B, that is Paris", "B (Paris)": the text may be another option's.
    letters |= _quoted(_LINK.sub("", rest).strip(" ()[]"), texts)
    return letters | {_letter(match) for match in _ALTERNATIVE.finditer(_REASON.split(rest.lstrip(" )."))[0])}


def _judged(plain: str) -> set[str]:
    """Return what sentences such as "option B is correct" claim."""
    found = set()
    for match in _VERDICT.finditer(plain):
        before = plain[max(0, match.start() - 40) : match.start()]
        if _BEFORE_VERDICT.search(before) and not NOT_MINE.search(_clause_before(plain, match.start())):
            found.add(_letter(match))
    return found


def _standing_alone(plain: str, texts: dict[str, str]) -> set[str]:
    """Return what the first and the last line name, unless they are items of a list of options."""
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    lines = [line for line in lines if len(line) <= _MAX_CONTENT]
    found: set[str] = set()
    for line in {*lines[:1], *lines[-1:]}:
        claim = _line(line, texts)
        if claim and not any(_belongs(other, line, texts) for other in lines if other != line):
            found |= claim
    return found


def _line(line: str, texts: dict[str, str]) -> set[str]:
    """Return the letter of a line: letters, also with a reason, an option's text, or ``(B) text`` with its own text."""
    letters, end = _letters(line)
    if letters and _BECAUSE.match(line, end):
        return letters
    label = _LABEL.match(line)
    if not label or not label[3]:
        return _read(line, texts)
    if texts:
        return {label[1]} & _quoted(label[3], texts)
    return {label[1]} if label[2] in ")]" else set()  # "A. Smith" is a name


def _belongs(other: str, line: str, texts: dict[str, str]) -> bool:
    """Whether two lines may be items of the same list: another option's text, or another letter's label."""
    ours, theirs = _LABEL.match(line), _LABEL.match(other)
    if ours and theirs:
        # "(B)" may stand below a list that it decides; right below "(A) ..." it is a list that was cut off.
        return ours[1] != theirs[1] and (bool(ours[3]) or ord(theirs[1]) == ord(ours[1]) - 1)
    return not theirs and bool(_quoted(other, texts) - _quoted(line, texts)) and bool(_quoted(line, texts))


def _ending(text: str, plain: str) -> set[str]:
    """Return the letter that the last sentence ends with as its conclusion.

    A letter at the end may as well be a unit, a vitamin or a point in a figure, so what stands before it must lead to
    an answer.
    """
    marked, last = (t.rstrip()[-_MAX_CONTENT:].rpartition("\n")[2].strip() for t in (text, plain))
    sentence = re.split(r"[.!?;]\s", last)[-1]
    letters = {letter.upper() for letter in re.findall(_ENCLOSED, sentence)}
    if NOT_MINE.search(sentence) or _DENIED.search(sentence) or len(letters) > 1:
        return set()
    match = _ENDING.search(sentence) or _BOLD_ENDING.search(marked)
    return {_letter(match)} if match else set()
