r"""Final answers in model text: the last ``\boxed{...}`` and the last number.

Model text is untrusted: every function here takes time linear in the text's length and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from g2rl.tasks.spelling import MAX_ANSWER, canonical

MAX_TEXT = 1_000_000
"""Characters of a response that are searched for boxes, tags and numbers, counted from its end."""
WINDOW = 20_000
"""The same where sentences are read."""
MAX_PHRASES = 100
"""Of those that say an answer, the last ones are read."""
_MAX_BOXES = 8  # that stand side by side and are compared
_MAX_BETWEEN = 100  # characters between such boxes

# A box may be written with a doubled backslash, as text that went through JSON twice has it; after a box and its
# blanks comes the brace, if there is one. `\\.` swallows escaped braces and line breaks `\\`.
_TEX = re.compile(r"(\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(\{)?)|\\.|[{}]", re.DOTALL)
# What TeX would take as the argument where there is no brace: a control word, here with the groups that follow it,
# or one character, here a whole number (`\boxed 42` means 42 to whoever writes it, although TeX would box the 4). The
# first letter of a word is no answer: "write \boxed around it".
_TOKEN = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*|\\[A-Za-z]+(?:\{[^{}]{0,200}\}){0,3}|[A-Za-z](?![A-Za-z])")

_SPACES = re.compile(r"\s*")
BOX = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])")
# Between boxes of which the reader may choose: "or", "x =", formula signs, nothing that tells a step from an answer.
_BESIDE = re.compile(
    r"(?:[\s,;:/&{}$.~=]|\\[\\,;:!() \[\]]|\\q?quad(?![A-Za-z])|\\text(?![A-Za-z])"
    r"|\b(?:or|and|maybe|perhaps|possibly|also|else|either)\b|[A-Za-z](?:_[0-9])?\s?=)*",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\b(?:or|maybe|perhaps|possibly|also|else|either)\b", re.IGNORECASE)
_JOINED = re.compile(r"[,;&]|\band\b", re.IGNORECASE)
_STEP = re.compile(r"(?<!\.)\.(?!\.)|\n\s*\n")  # a sentence or a paragraph ends

# Before "answer is": it is somebody else's, or none that is meant.
NOT_MINE = re.compile(
    r"\b(?:if|whether|unless|suppos\w+|assum\w+|imagine|let['’]s say|maybe|perhaps|might|could|may|possible|tempt\w+|"
    r"worst|common|naive|initial\w*|previous|other|another|students?|his|her|their|not|never|no|nor|doubt|unlikely|"
    r"wrong\w*|incorrect\w*|false\w*|why)\b|n['’]t\b",
    re.IGNORECASE,
)
_RECONSIDERED = re.compile(
    r"\b(?:wait|actually|hold on|scratch that|on second thought|correction|let me re\w+|I made an? (?:error|mistake)"
    r"|(?:that|this|it)(?:['’]s| is| was| seems| must be| can(?:no|['’])t be) (?:not right|not correct|wrong|incorrect"
    r"|impossible))\b",
    re.IGNORECASE,
)

_COMMA = r"(?:,(?:\\!)?|\{,\}|\\,)"
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212\u2013]?(?:\\?\$)?)"
    r"(?:\\[dtc]?frac\s?\{(?P<top>-?[0-9]+)\}\s?\{(?P<bottom>[0-9]+)\}"
    rf"|(?<![A-Za-z0-9_])(?P<plain>(?:[0-9]{{1,3}}(?:{_COMMA}[0-9]{{3}}(?![0-9]))+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<over>/[0-9]+(?![0-9/]|\.[0-9]))?)"
)


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}`` in `text`, None without one.

    Braces are matched; of nested boxes the inner one counts. A box that is never closed or is empty does not
    count, so that an earlier one is taken. ``\boxed 7`` without braces holds the number, control word or character
    that follows. Only the last `MAX_TEXT` characters are read; a content above `MAX_ANSWER` characters is None.
    """
    boxes, _ = final_boxes(text)
    return boxes[0] if boxes else None


def final_boxes(text: str) -> tuple[list[str], bool]:
    r"""Return the content of the last box as in `extract_boxed`, then others of boxes that stand right before it.

    Those in ``\boxed{12} or \boxed{13}`` are two; a box far before the last one, before other words, or before the end
    of a sentence or paragraph, is a step.

    Returns:
        The contents, and whether all of them are parts of one answer: ``\boxed{12} and \boxed{13}``.
    """
    text = text[-MAX_TEXT:]
    spans = boxed_spans(text)
    if not spans or spans[-1][1] - spans[-1][0] > MAX_ANSWER:
        return [], False
    first, joined = len(spans) - 1, True
    while first and (between := _side_by_side(text, spans[first - 1][1], spans[first][0])) is not None:
        joined = joined and _JOINED.search(between) is not None and not _CHOICE.search(between)
        first -= 1
    return list(dict.fromkeys(text[start:end].strip() for start, end in spans[first:][::-1])), joined


def _side_by_side(text: str, end: int, start: int) -> str | None:
    """Return what is between a box that ends and one that starts there, if that is nothing but "or" and its like."""
    between = BOX.sub("", text[end:start]) if 0 <= start - end <= _MAX_BETWEEN else "no"
    if not _BESIDE.fullmatch(between) or (_STEP.search(between) and not _CHOICE.search(between)):
        return None
    return between


def boxed_spans(text: str) -> list[tuple[int, int]]:
    r"""Return (start, end) of the content of each ``\boxed`` or ``\fbox`` that is closed and not empty, by start."""
    opened: list[int | None] = []  # for each open brace: where its box's content starts, None for a plain brace
    spans: list[tuple[int, int]] = []
    for match in _TEX.finditer(text):
        box, brace = match.group(1), match.group(2)
        if brace:
            opened.append(match.end())
        elif box:
            token = _TOKEN.match(text, match.end())
            if token:
                spans.append(token.span())
        elif match.group() == "{":
            opened.append(None)
        elif match.group() == "}" and opened:
            start = opened.pop()
            # Only the leading blanks are read, so that nested boxes take linear time.
            if start is not None and _SPACES.match(text, start).end() < match.start():  # type: ignore[union-attr]
                spans.append((start, match.start()))
    return sorted(spans)


def extract_tagged(text: str) -> str | None:
    """Return the content of the last ``<answer>...</answer>`` in `text`, None without one."""
    text = text[-MAX_TEXT:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0 or end - start > MAX_ANSWER:
        return None
    return text[start + len("<answer>") : end].strip()


def after_thinking(text: str) -> str:
    """Return what follows the last ``</think>``, which alone answers; nothing of a ``<think>`` that never ends.

    Only the last `MAX_TEXT` characters are read.
    """
    text = text[-MAX_TEXT:].rpartition("</think>")[2]
    return "" if "<think>" in text else text


def reconsiders(text: str, *claims: re.Pattern[str]) -> bool:
    """Whether what follows the last match of `claims` in `text` takes it back: "Wait, that's wrong"."""
    end = max((match.end() for claim in claims for match in claim.finditer(text)), default=0)
    return _RECONSIDERED.search(text, end) is not None


def _is_sign(text: str, at: int) -> bool:
    """Whether the dash at `text[at]` negates: not after a digit, closing bracket or letter (`3-5`, `3 -5`, `GPT-4`)."""
    if at and text[at - 1] in " \t":
        before = text[max(0, at - 20) : at].rstrip(" \t")[-1:]
        return not before or not (before.isdigit() or before in ")]}")
    return at == 0 or not (text[at - 1].isalnum() or text[at - 1] in ")]}_")


def last_number(text: str) -> str | None:
    r"""Return the last integer, decimal or fraction in `text` in plain spelling, None without one.

    ``1,234``, ``1{,}234`` -> ``1234``; ``\frac{3}{4}``, ``3/4`` -> ``3/4``; ``-$5.00`` -> ``-5.00``; ``50%`` -> ``50``;
    a Unicode minus becomes ``-``. A dash between numbers or inside a word (``3-5``, ``GPT-4``) is no sign, and digits
    glued to a preceding letter (``H2O``) are no number. Only the last `MAX_TEXT` characters are read.
    """
    text = text[-MAX_TEXT:]
    last: re.Match[str] | None = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None or last.end() - last.start() > MAX_ANSWER:
        return None
    negative = last["sign"][:1] in ("-", "\u2212", "\u2013") and _is_sign(text, last.start())
    if last["top"] is not None:
        number = f"{last['top']}/{last['bottom']}"
    elif last["over"] and text[last.start() - 1 : last.start()] == "/":
        number = last["over"][1:]  # a date such as 3/4/2024
    else:
        number = re.sub(r"[^0-9.]", "", last["plain"]) + (last["over"] or "")
    if negative and number.startswith("-"):
        return number[1:]
    return "-" + number if negative else number


def same_spelling(first: str, second: str) -> bool:
    """Whether two answers are plainly equal: `canonical`."""
    return canonical(first) == canonical(second)


def one_box(text: str, same: Callable[[str, str], bool] = same_spelling) -> str | None:
    """Return the last box's content, None without one and where boxes right before it hold another answer, by `same`.

    Boxes that "and" or a comma joins make a list, in their order.
    """
    boxes, joined = final_boxes(text)
    if not boxes or len(boxes) > _MAX_BOXES:
        return None
    if all(same(boxes[0], other) for other in boxes[1:]):
        return boxes[0]
    return ", ".join(boxes[::-1]) if joined else None


def extract_answer(text: str, allow_number: bool, same: Callable[[str, str], bool] = same_spelling) -> str | None:
    """Return `one_box` of what follows thinking; without a box and with `allow_number` its last number, else None."""
    text = after_thinking(text)
    if allow_number and extract_boxed(text) is None:
        return last_number(text)
    return one_box(text, same)
