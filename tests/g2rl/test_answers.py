"""Final answers in model text: what is found, and that no text takes long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2rl.tasks.answers import (
    MAX_TEXT,
    extract_answer,
    extract_boxed,
    extract_tagged,
    final_boxes,
    last_number,
    one_box,
)
from g2rl.tasks.spelling import MAX_ANSWER, canonical

BOXED = [
    (r"So it is \boxed{7}.", "7", "plain"),
    (r"\fbox{7}", "7", "the other box"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "nested braces"),
    (r"\boxed{1} or rather \boxed{2}", "2", "the last one counts"),
    (r"\boxed{1} or \boxed{2", "1", "a box that never closes does not count"),
    (r"\boxed{2", None, "nor when it is the only one"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "escaped braces are text"),
    (r"\boxed{1 \} 2}", r"1 \} 2", "an escaped closing brace does not close"),
    (r"\boxed{a \\} b}", r"a \\", "a line break before a brace does not escape it"),
    (r"\boxed{\boxed{3}}", "3", "of nested boxes the inner one"),
    (r"{ \boxed{3} ", "3", "a brace left open outside"),
    (r"} } \boxed{3}", "3", "closing braces without an opening one"),
    (r"\boxed {3}", "3", "a blank before the brace, which TeX skips"),
    ("\\boxed\n{3}", "3", "a line break before the brace"),
    (r"\boxed{ 3 }", "3", "blanks inside go"),
    (r"\boxed 7", "7", "no braces: one token"),
    (r"$\boxed7$", "7", "no braces, no blank"),
    (r"\boxed 42.", "42", "a whole number counts as one token"),
    (r"\boxed -1.5", "-1.5", "with sign and decimals"),
    (r"\boxed x", "x", "one letter"),
    (r"\boxed\pi", r"\pi", "one control word"),
    (r"\boxed\frac{1}{2}", r"\frac{1}{2}", "a control word with its groups"),
    (r"\boxed{5}. I used \boxed as asked.", "5", "the first letter of a word is no answer"),
    (r"\boxed{5} as in \boxed{}", "5", "an empty box, as in a quoted instruction, does not count"),
    (r"\boxed{ }", None, "nor one with blanks only"),
    (r"\\boxed{5}", "5", "a doubled backslash, from text escaped twice"),
    (r"x \\\boxed{5}", "5", "a line break, then a box"),
    (r"\boxedx{5}", None, "another command"),
    ("boxed{5}", None, "no command"),
    ("", None, "nothing"),
]


@pytest.mark.parametrize("text, expected, reason", BOXED, ids=[case[2] for case in BOXED])
def test_extract_boxed(text: str, expected: str | None, reason: str) -> None:
    assert extract_boxed(text) == expected


BOXES = [
    (r"\boxed{12} or \boxed{13}", ["13", "12"], "a choice"),
    (r"$\boxed{12}$, $\boxed{12}$ and $\boxed{13}$.", ["13", "12"], "a list, and one of them twice"),
    (r"\boxed{12}\boxed{13}", ["13", "12"], "nothing between"),
    (r"$x=\boxed{12}$ or maybe $x_2 = \boxed{13}$", ["13", "12"], "equations"),
    (r"\boxed{12}\quad\text{or}\quad\boxed{13}", ["13", "12"], "one formula"),
    ("\\boxed{12}\n\\[\\boxed{13}\\]", ["13", "12"], "lines of their own"),
    ("\\boxed{12}\n\n\\[\\boxed{13}\\]", ["13"], "paragraphs of their own"),
    (r"$a=\boxed{12}$, $b=\boxed{1}$. $a+b=\boxed{13}$", ["13"], "sentences of their own"),
    ("\\boxed{12}.\n\nOr \\boxed{13}", ["13", "12"], "a choice in two sentences"),
    (r"\boxed{12}, which was too small. So \boxed{13}", ["13"], "a step before"),
    (r"\boxed{12}. No, \boxed{13}", ["13"], "corrected"),
    (r"\boxed{12}" + " " * 200 + r"\boxed{13}", ["13"], "far before"),
    (r"\boxed{1} + \boxed{2} = 3, so \boxed{3}", ["3"], "a sum"),
    (r"\boxed{\boxed{3}}", ["3"], "one inside another"),
    ("no box", [], "none"),
]


@pytest.mark.parametrize("text, expected, reason", BOXES, ids=[case[2] for case in BOXES])
def test_boxes_side_by_side(text: str, expected: list[str], reason: str) -> None:
    assert final_boxes(text)[0] == expected


def test_one_box_leaves_no_choice() -> None:
    assert one_box(r"\boxed{12} or \boxed{13}") is None
    assert one_box(r"$\boxed{1/2}$, that is \boxed{3}. Hence $\boxed{0.5} = \boxed{\frac{1}{2}}$") == r"\frac{1}{2}"
    assert one_box(r"\boxed{a} or \boxed{b}", lambda first, second: (first, second) == ("b", "a")) == "b"
    assert one_box("".join(rf"\boxed{{{'0' * i}7}}" for i in range(30))) is None  # more than are compared
    assert extract_answer(r"\boxed{12} or \boxed{13}", allow_number=True) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"The solutions are $\boxed{5}$ and $\boxed{7}$.", "5, 7"),
        (r"$x=\boxed{5}$, $y=\boxed{7}$, and $z=\boxed{5}$", "7, 5"),
        (r"$\boxed{\frac{1}{2}}$ and $\boxed{1/2}$", "1/2"),
        (r"$\boxed{5}$, or $\boxed{7}$", None),
        (r"$\boxed{5}$, $\boxed{7}$ or $\boxed{9}$", None),
        (r"$\boxed{5}$, maybe $\boxed{7}$", None),
        (r"$\boxed{5}$ $\boxed{7}$", None),
        (r"$\boxed{5}=\boxed{7}$", None),
    ],
)
def test_boxes_that_are_joined_make_a_list(text: str, expected: str | None) -> None:
    assert one_box(text) == expected


NUMBERS = [
    ("27 + 5 = 32", "32", "the last of several"),
    ("The answer is 32.", "32", "a full stop is not part of it"),
    ("It costs 1,234.50 in all", "1234.50", "thousands separator and decimals"),
    ("1,234,567", "1234567", "two separators"),
    ("1{,}234", "1234", "separator as TeX wants it"),
    ("2,3", "3", "a list, not a separator"),
    ("1,2345", "2345", "four digits are no group"),
    ("The answer is -5", "-5", "leading minus"),
    ("x = -5", "-5", "minus after a relation"),
    ("x=-5", "-5", "the same without blanks"),
    ("10 - -5", "-5", "minus after an operator"),
    ("\n-5", "-5", "minus at the start of a line"),
    ("  -5", "-5", "minus after blanks only"),
    ("- 5", "5", "a bullet"),
    ("3-5", "5", "between digits: range or difference"),
    ("3 - 5", "5", "difference"),
    ("3 -5", "5", "difference, badly spaced"),
    ("(3)-5", "5", "difference after a bracket"),
    ("pages 3\u20135", "5", "range with a dash"),
    ("GPT-4", "4", "hyphen in a word"),
    ("\u22125", "-5", "Unicode minus"),
    ("-$5", "-5", "minus before the currency"),
    (r"\$5", "5", "escaped currency"),
    ("$-5$", "-5", "in formula signs"),
    ("**-5**", "-5", "in bold"),
    ("50%", "50", "percent sign"),
    ("0.25", "0.25", "decimal"),
    ("about .5", ".5", "decimal without a leading zero"),
    ("3/4", "3/4", "fraction"),
    ("It is 3/4.", "3/4", "fraction at the end of a sentence"),
    (r"\frac{3}{4}", "3/4", "fraction in TeX"),
    (r"-\dfrac{3}{4}", "-3/4", "with a sign before"),
    (r"\frac{-3}{4}", "-3/4", "with a sign inside"),
    (r"-\frac{-3}{4}", "3/4", "with both"),
    ("10/2=5", "5", "the value, not the fraction before it"),
    ("on 3/4/2024", "2024", "a date is no fraction"),
    ("H2O", None, "digits glued to a letter"),
    ("I have 3 apples and x2", "3", "a variable's index is no number"),
    ("100m2", "100", "a unit after it"),
    ("1.2.3", "3", "a version: its last part"),
    ("5...", "5", "dots after it"),
    ("007", "007", "zeros stay; canonical form is another matter"),
    ("\u0663", None, "digits of other scripts"),
    ("none", None, "no number"),
    ("", None, "nothing"),
]


@pytest.mark.parametrize("text, expected, reason", NUMBERS, ids=[case[2] for case in NUMBERS])
def test_last_number(text: str, expected: str | None, reason: str) -> None:
    assert last_number(text) == expected


def test_extract_answer_takes_a_number_only_without_a_box() -> None:
    assert extract_answer(r"\boxed{7} of 9", allow_number=True) == "7"
    assert extract_answer("7 of 9", allow_number=True) == "9"
    assert extract_answer("7 of 9", allow_number=False) is None


@pytest.mark.parametrize(
    "text, expected, reason",
    [
        (r"<think>\boxed{6}?</think> It is \boxed{7}.", "7", "a box after it"),
        (r"So \boxed{6}. </think> It is \boxed{7}.", "7", "one that the prompt began"),
        (r"<think>So \boxed{7}.</think> The answer is 8.", None, "a box in it is no answer"),
        (r"<think>So \boxed{7}.</think>", None, "nor where nothing follows"),
        (r"<think>So \boxed{7}.", None, "nor one that does not end"),
        (r"<think>a</think> \boxed{6} <think>b</think> \boxed{7}", "7", "after the last one"),
        (r"</think> \boxed{7} <think> and \boxed{6}", None, "begun again"),
    ],
)
def test_thinking_is_no_answer(text: str, expected: str | None, reason: str) -> None:
    assert extract_answer(text, allow_number=False) == expected


@pytest.mark.parametrize(
    "text, expected, reason",
    [
        ("<answer>7</answer>", "7", "plain"),
        ("<answer>1</answer> <answer>\n2\n3 </answer>", "2\n3", "the last one, over lines"),
        ("<answer>1</answer> <answer>2", "1", "one that never closes"),
        ("</answer> 1 <answer>", None, "the wrong way round"),
        ("<answer>" + "x" * (MAX_ANSWER + 1) + "</answer>", None, "too long"),
    ],
)
def test_extract_tagged(text: str, expected: str | None, reason: str) -> None:
    assert extract_tagged(text) == expected


@given(st.integers())
def test_integers_survive(n: int) -> None:
    assert last_number(f"So the answer is {n:,}.") == str(n)
    assert canonical(f"{n:,}") == str(n)
    assert extract_boxed(rf"\boxed{{{n}}}") == str(n)


_PIECES = st.sampled_from(
    list("{}[]()\\$%,.;-/^_ \n\u2212\u2013a1279~") + [r"\boxed", r"\boxed{", r"\frac{", r"\text{"]
)


@given(st.one_of(st.text(), st.lists(_PIECES, max_size=60).map("".join)))
def test_no_text_raises(text: str) -> None:
    for value in (extract_boxed(text), last_number(text), extract_tagged(text)):
        assert value is None or value in ("", value.strip())
    assert canonical(text) == canonical(" " + text)


ADVERSARIAL = [
    "\\boxed{", "\\boxed ", "\\boxed{}", "\\", "{", "}", "{}", "\\frac{1", "\\frac{1}{", "\\text{", "1", "1,", "1,111",
    "1/", ".1", "-", "- ", " ", "1 ", "$", "%", "^{", "<answer>", "</answer>", "\\quad", "\\left", "9^", "\\boxed\\x{",
    ", ", ",", " ,", ",\\!", "{,}", "{,} ", "100, ",
]  # fmt: skip


@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_long_text_takes_linear_time(piece: str) -> None:
    # A quadratic pass over so much text would take minutes; the bound leaves room for a slow machine.
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    extract_boxed(text)
    last_number(text)
    extract_tagged(text)
    canonical(text)
    assert time.process_time() - start < 5


def test_a_megabyte_is_read_whole() -> None:
    text = r"\boxed{1}" + "{ \\frac 3-5 x" * 70_000
    assert len(text) < MAX_TEXT
    start = time.process_time()
    assert extract_boxed(text) == "1"
    assert last_number(text) == "5"
    assert time.process_time() - start < 10


def test_only_the_end_of_a_very_long_text_is_read() -> None:
    assert extract_boxed(r"\boxed{1}" + "x" * MAX_TEXT) is None
    assert extract_boxed("x" * (2 * MAX_TEXT) + r"\boxed{1}") == "1"
    assert extract_boxed(rf"\boxed{{{'1' * (MAX_ANSWER + 1)}}}") is None
