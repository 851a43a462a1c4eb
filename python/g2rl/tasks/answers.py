r"""Final answers in model text: the last ``\boxed{...}``, the last number, and one spelling for equal answers.

Model text is untrusted: every function here takes time linear in the text's length and never raises.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_TEXT = 1_000_000
"""Characters of a response that are searched, counted from its end."""
MAX_ANSWER = 10_000
"""A longer answer counts as none."""
_MAX_DIGITS = 300
"""Numbers with more characters are compared as text: Python refuses to convert very long ones."""

# A box may be written with a doubled backslash, as text that went through JSON twice has it; after a box and its
# blanks comes the brace, if there is one. `\\.` swallows escaped braces and line breaks `\\`.
_TEX = re.compile(r"(\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(\{)?)|\\.|[{}]", re.DOTALL)
# What TeX would take as the argument where there is no brace: a control word, here with the groups that follow it,
# or one character, here a whole number (`\boxed 42` means 42 to whoever writes it, although TeX would box the 4). The
# first letter of a word is no answer: "write \boxed around it".
_TOKEN = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*|\\[A-Za-z]+(?:\{[^{}]{0,200}\}){0,3}|[A-Za-z](?![A-Za-z])")

_SPACES = re.compile(r"\s*")

# Before "answer is": it is somebody else's, or none that is meant.
NOT_MINE = (
    r"\b(?:if|whether|unless|suppos\w+|assum\w+|imagine|let['’]s say|maybe|perhaps|might|could|may|possible|tempt\w+|"
    r"worst|common|naive|initial\w*|previous|other|another|students?|his|her|their|not|never|no|nor|doubt|unlikely|"
    r"wrong\w*|incorrect\w*|false\w*|why)\b|n['’]t\b"
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

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_NOISE = re.compile(
    r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\[()\[\]!,]|\\?[$%]|\^(?:\\circ|\{\\circ\}|\u00b0)|\u00b0|\\degree(?![A-Za-z])"
)
_BLANK = re.compile(r"(?:\\[;:> ]|\\q?quad(?![A-Za-z])|[\s~])+")
_LOOSE_BLANK = re.compile(r"(?<![0-9]) | (?![0-9])")  # all but the one in `1 2`, which is not 12
# Thousands keep their comma close, with a thin space at most; a blank beside it makes two items of a list.
_CLOSE_COMMA = re.compile(r"(?:\{,\}|,\s*\\!)\s*")
_LISTING_COMMA = re.compile(r" , ?|, ")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_FRACTION = re.compile(r"([+-]?)\\frac(?:\{([+-]?[0-9]+)\}\{([0-9]+)\}|([0-9])([0-9]))")
_RATIONAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[0-9]+/[0-9]+)")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}`` in `text`, None without one.

    Braces are matched; of nested boxes the inner one counts. A box that is never closed or is empty does not
    count, so that an earlier one is taken. ``\boxed 7`` without braces holds the number, control word or character
    that follows. Only the last `MAX_TEXT` characters are read; a content above `MAX_ANSWER` characters is None.
    """
    text = text[-MAX_TEXT:]
    spans = boxed_spans(text)
    if not spans or spans[-1][1] - spans[-1][0] > MAX_ANSWER:
        return None
    return text[slice(*spans[-1])].strip()


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
    """Return what follows the last ``</think>``; nothing of a ``<think>`` that never ends."""
    text = text[-MAX_TEXT:].rpartition("</think>")[2]
    return "" if "<think>" in text else text


def reconsiders(text: str, *claims: re.Pattern[str]) -> bool:
    """Whether what follows the last match of `claims` in `text` takes it back: "Wait, that's wrong"."""
    end = max((match.end() for claim in claims for match in claim.finditer(text)), default=0)
    return _RECONSIDERED.search(text, end) is not None


def unwrap_text(answer: str) -> str:
    r"""Return ``word`` for an answer that is ``\text{word}`` as a whole, any other unchanged."""
    match = _WRAPPER.fullmatch(answer.strip())
    return match[1] if match else answer


def without_wrappers(text: str) -> str:
    r"""Return `text` with the content of ``\\text{}`` and its kin in place of them."""
    return _WRAPPER.sub(r"\1", text)


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


def extract_answer(text: str, allow_number: bool) -> str | None:
    """Return the last boxed content of `text`, else with `allow_number` its last number, else None."""
    boxed = extract_boxed(text)
    if boxed is None and allow_number:
        return last_number(text)
    return boxed


def canonical(answer: str) -> str:
    r"""Return one spelling for answers that are plainly equal, for voting and for equality without a computer algebra.

    Blanks, ``$``, ``%``, degree signs, spacing commands and wrappers such as ``\text{}`` go; a number becomes its exact
    value in lowest terms (``+07.50`` -> ``15/2``, ``1,234.0`` -> ``1234``, ``\frac{2}{4}`` -> ``1/2``). A list that
    would be a number without its blanks keeps them: ``10, 100`` is neither ``10,100`` nor ``100, 10``.
    """
    text = _CLOSE_COMMA.sub(",", answer[:MAX_ANSWER].replace("\u2212", "-"))
    text = _BLANK.sub(" ", _NOISE.sub("", without_wrappers(text)))
    items = [_LOOSE_BLANK.sub("", item) for item in _LISTING_COMMA.split(text)]
    text = re.sub(r"\\[dtc]frac", r"\\frac", ",".join(items)).rstrip(".")
    grouped = _GROUPED.fullmatch(text)
    if grouped and len(items) > 1:
        return ", ".join(items).rstrip(".")
    number = text.replace(",", "") if grouped else text
    match = _FRACTION.fullmatch(number)
    if match:
        sign, top, bottom = match[1], match[2] or match[4], match[3] or match[5]
        number = number if sign and top[0] in "+-" else f"{sign}{top}/{bottom}"
    if len(number) <= _MAX_DIGITS and _RATIONAL.fullmatch(number):
        try:
            return str(Fraction(number.rstrip(".")))
        except ZeroDivisionError:
            return text
    return text
