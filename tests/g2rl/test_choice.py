"""Multiple choice: what counts as a claim, that two claims are none, and that no text takes long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2rl.tasks.answers import WINDOW
from g2rl.tasks.choice import boxed_letter, claimed_letter
from g2rl.tasks.lenient import lenient_answer

CITIES = ("Paris", "London", "Rome", "Madrid")
CELLS = ("T cells", "B cells", "E. coli", "A small increase", "vitamin C", "10 J", "10.5 J", "Both A and B")
SIGNED = ("-28", "28", "-7", "7", "10", "-14", "14")
TEN = tuple(f"{10 * i} m" for i in range(1, 11))

# (options, gold, response, reason)
RIGHT = [
    (CITIES, "B", "The answer is (B)", "letter in brackets"),
    (CITIES, "B", "The answer is B.", "bare letter"),
    (CITIES, "B", "Answer: B", "after a colon"),
    (CITIES, "B", "**Answer: B**", "bold line"),
    (CITIES, "B", "**Answer:** (B) London", "letter and text"),
    (CITIES, "B", "ANSWER: b", "small letter"),
    (CITIES, "D", "Answer: $D$", "formula signs"),
    (CITIES, "D", r"Answer: \(D\)", "TeX brackets"),
    (CITIES, "D", "The final answer is:\n\nD", "on a line of its own"),
    (TEN, "J", "(J)", "the tenth option"),
    (TEN, "J", "So the correct option is J, 100 m.", "letter, then its text"),
    (CITIES, "C", r"\boxed{C}", "box"),
    (CITIES, "C", r"\boxed{\text{C}}", "text in a box"),
    (CITIES, "C", r"\boxed{\textbf{(C) }\text{Rome}}", "letter and text in a box"),
    (CITIES, "C", "\\boxed{\u200bC\ufeff}", "signs that are not seen"),
    (CITIES, "C", r"\boxed{Rome}", "an option's text in a box"),
    (TEN, "D", r"It is \boxed{40 \text{ m}}", "the same with a unit"),
    (CITIES, "D", "**D**", "bold letter"),
    (CITIES, "D", "D", "nothing but the letter"),
    (CITIES, "D", "d)", "small letter with bracket"),
    (CITIES, "D", "I weighed all of them.\n\nD", "a lone letter at the end"),
    (CITIES, "D", "Spain's capital is asked for.\n(D) Madrid", "last line: label and text"),
    (CITIES, "D", "Spain's capital is asked for, so (D).", "a conclusion in brackets"),
    (CITIES, "D", "We look for Spain's capital. Therefore, D.", "a conclusion"),
    (CITIES, "D", "Weighing all of it we get **D**.", "a bold conclusion"),
    (CITIES, "A", "Paris", "nothing but an option's text"),
    (CITIES, "A", 'The answer is "Paris".', "an option quoted"),
    (CITIES, "A", "The answer is Paris, because it is the capital.", "text, then a reason"),
    (CITIES, "A", "The answer is A because (B) and (C) are in other countries.", "others only in the reason"),
    (CITIES, "A", "The correct choice is A, not B.", "another one denied"),
    (CITIES, "C", "A is wrong because B holds, so the answer is C.", "others only mentioned"),
    (CITIES, "C", "The answer is not A. The answer is C.", "one denied, one claimed"),
    (CITIES, "C", "If the answer is A, it lies in France. It doesn't. The answer is C.", "one supposed, one claimed"),
    (CITIES, "C", "C, because it is Italy's capital.", "a letter with a reason"),
    (CITIES, "C", "Answer: C - Rome", "a dash before the text"),
    (CITIES, "C", "The answer is C (Rome).", "the text in brackets"),
    (CITIES, "C", "Actually, option C is correct.", "a verdict on second thoughts"),
    (CITIES, "C", "I would say the answer is C.", "a careful claim"),
    (CITIES, "C", "Option C is correct.", "a verdict"),
    (CITIES, "C", "<think>The answer is A. Or B?</think>The answer is C.", "after thinking"),
    (CITIES, "C", r"<think>\boxed{A}</think>The answer is C.", "after a box in thinking"),
    (CITIES, "C", "(A) is too far north. (C) is the correct answer.", "a verdict after another option"),
    (CITIES, "C", "I would go with (C).", "a choice"),
    (CITIES, "C", "<answer>C</answer>", "answer element"),
    (CITIES, "C", "The answer is C. I am sure of it.", "the pronoun I is no letter"),
    (CELLS, "B", "The answer is B cells.", "a text that starts with a letter"),
    (CELLS, "C", "The answer is E. coli.", "a text that starts with another letter"),
    (CELLS, "D", "The answer is A small increase.", "an article is no letter"),
    (CELLS, "E", "She lacks it, so the answer is vitamin C.", "a text that ends in another letter"),
    (CELLS, "F", "The answer is 10 J.", "a unit is no letter"),
    (CELLS, "G", "The answer is 10.5 J", "a text that begins like another"),
    (CELLS, "H", "The answer is (H) Both A and B", "letters inside the option's text"),
    (("12.5 percent", "31.25 percent"), "B", "The answer is 31.25 percent.", "a full stop behind percent"),
    (SIGNED, "F", "The answer is (F) -14", "a sign before the text"),
    (SIGNED, "F", "The answer is F. − 14", "a sign apart from it"),
    (CITIES, "B", "The answer is (B).\nTo sum up:\n\\boxed{B}", "the same claim twice"),
    (CITIES, "B", "B. London\n\nIt is the capital of the United Kingdom.", "first line, then a reason"),
    (CITIES, "B", "(A) No.\n(B) Yes.\n(C) No.\nThe best answer is option B.", "after a list"),
]  # fmt: skip

# (options, gold, response, reason)
WRONG = [
    (CITIES, "A", "Answer: E", "another letter, beyond the options"),
    (CITIES, "A", "The answer is B.", "another letter"),
    (CITIES, "A", "The answer is A or B.", "two letters"),
    (CITIES, "B", "The answer is A or B.", "two letters, the other one right"),
    (CITIES, "A", "Answer: A, B", "a list"),
    (CITIES, "A", "Answer: A/B", "a list with a stroke"),
    (CITIES, "A", "Either (A) or (B), so the answer is either A or maybe B.", "a hedge"),
    (CITIES, "B", "The answer is (A) Paris or (B) London.", "two labels"),
    (CITIES, "A", r"\boxed{A}\boxed{B}", "two boxes, the first right"),
    (CITIES, "B", r"\boxed{A}\boxed{B}", "two boxes, the last right"),
    (CITIES, "B", r"\boxed{A \text{ or } B}", "two letters in a box"),
    (CITIES, "B", r"The answer is A. \boxed{B}", "a box against a sentence"),
    (CITIES, "B", "The answer is A.\nThe answer is B.", "two sentences"),
    (CITIES, "B", "Answer: A\nAnswer: B", "two lines"),
    (CITIES, "B", "A is correct and B is correct.", "two verdicts"),
    (CITIES, "B", "The answer is Paris. The answer is (B).", "a text against a letter"),
    (CITIES, "B", "The answer is (B) Paris", "a letter against its text"),
    (CITIES, "B", r"\boxed{\text{(B) Paris}}", "the same in a box"),
    (CITIES, "A", "<think>The answer is A.", "a thought that does not end"),
    (CITIES, "A", "The answer is A. Wait, it's B.", "taken back"),
    (CITIES, "A", "The answer is A. Hmm, that is not right.", "taken back without another"),
    (CITIES, "A", "The answer is (A)(B).", "two letters side by side"),
    (CITIES, "A", "The answer is A - C.", "a range"),
    (CITIES, "A", "The answer is A–C.", "a range with a dash"),
    (CITIES, "B", "The answer is (B), that is Paris.", "a letter against a text beside it"),
    (CITIES, "B", "Answer: B (Paris)", "the same in brackets"),
    (CITIES, "B", "Answer: B - Paris", "the same after a dash"),
    (SIGNED, "G", "The answer is (G) -14", "a letter against another sign"),
    (CITIES, "A", "A tempting answer is (A).", "tempting only"),
    (CITIES, "A", "The student's answer is A.", "somebody else's"),
    (CITIES, "A", "Let's say the answer is A.", "let's say"),
    (CITIES, "B", "A\n\nOn the other hand there is London.\n\nB", "first line against last"),
    (CITIES, "B", "<answer>A</answer><answer>B</answer>", "two answer elements"),
    (CITIES, "A", "The answer is not A.", "denied"),
    (CITIES, "A", "The answer isn't (A).", "denied, shortened"),
    (CITIES, "A", "It is not true that the answer is A.", "denied from afar"),
    (CITIES, "A", "If the answer is A, then it is in France.", "supposed"),
    (CITIES, "A", "Suppose the answer is (A).", "supposed in so many words"),
    (CITIES, "A", "Is the answer A?", "asked"),
    (CITIES, "A", "Could it be that the answer is A?", "asked with a verb"),
    (CITIES, "A", "The answer is A if they speak French.", "on a condition"),
    (CITIES, "A", "To say that the answer is A would be wrong.", "called wrong"),
    (CITIES, "A", "Option A is not correct.", "verdict: not"),
    (CITIES, "A", "Statement A is correct, but that is not asked.", "a statement, not an option"),
    (CITIES, "C", "She lacks vitamin C", "a vitamin"),
    (CITIES, "C", "She lacks vitamin **C**.", "the same in bold"),
    (CITIES, "C", "The temperature is 25 C.", "degrees"),
    (CELLS, "J", "The energy is 10 J.", "joules"),
    (CITIES, "A", "Answer: 5 A", "amperes"),
    (CITIES, "B", "It follows that angle ABC has its vertex in point B.", "a point"),
    (CITIES, "D", "We can rule out (D).", "ruled out"),
    (CITIES, "D", "So it is anything but not D.", "not at the end"),
    (CITIES, "A", "A. Smith proposed it in 1950.", "a name"),
    (CITIES, "C", "Let us see.\n(A) Paris\n(B) London\n(C) Rome", "options restated, then cut off"),
    (CITIES, "C", "Let us see.\n(A) Paris\n(B) London\n(C)", "cut off inside the list"),
    (CITIES, "C", "Let us see.\nParis\nLondon\nRome", "texts restated, then cut off"),
    (CITIES, "A", "The answer is one of the following:\n(A) Paris\n(B) London", "a list after the phrase"),
    (CITIES, "B", "A", "nothing but another letter"),
    (CITIES, "B", r"\boxed{B", "a box that is never closed"),
    (CITIES, "B", "", "nothing"),
    (CITIES, "A", "A good question, which takes some thought.", "an article"),
    (CITIES, "A", "I think so.", "a pronoun"),
    (CELLS, "E", "The answer is E. coli.", "a name that is another option"),
    (CITIES, "A", "Answer: A. B.", "a list with full stops"),
    (CITIES, "B", "It could be (B).", "a guess"),
    (CELLS, "A", "The answer is A small increase.", "an article before another option"),
    (CELLS, "F", "The answer is 10.5 J.", "a text that begins like the right one"),
    (CITIES, "B", "Paris or London? The answer is somewhere.", "no claim"),
    (("5 %", "5", "7", "8"), "A", "The answer is 5", "texts that read alike"),
]  # fmt: skip


@pytest.mark.parametrize("options, gold, response, reason", RIGHT, ids=[case[3] for case in RIGHT])
def test_right(options: tuple[str, ...], gold: str, response: str, reason: str) -> None:
    assert claimed_letter(response, options) == gold


@pytest.mark.parametrize("options, gold, response, reason", WRONG, ids=[case[3] for case in WRONG])
def test_traps(options: tuple[str, ...], gold: str, response: str, reason: str) -> None:
    assert claimed_letter(response, options) != gold
    assert boxed_letter(response, options) != gold


@pytest.mark.parametrize(
    "response, strict",
    [
        (r"So it is \boxed{C}.", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{C} \text{or} \boxed{42}", None),
        (r"\boxed{42}, so \boxed{C}", "C"),
        ("The answer is (C).", None),
        (r"\boxed{Rome}", None),
    ],
)
def test_the_strict_judge_takes_letters_in_boxes_only(response: str, strict: str | None) -> None:
    assert boxed_letter(response, CITIES) == strict


ADVERSARIAL = [
    r"\boxed{" * 4_000,
    r"\boxed{" * 2_000 + "A" + "}" * 2_000,
    r"\text{" * 5_000,
    "answer is " * 5_000,
    "The answer to the " * 3_000,
    "The answer is A" + " or A" * 10_000,
    "The answer is A" + ", maybe possibly " * 3_000,
    "A is correct " * 5_000,
    "(A) " * 20_000,
    "A\n" * 20_000,
    " " * 100_000,
    "\n" * 100_000,
    "*" * 100_000 + "A",
    "Option " * 10_000,
    "<answer>" * 5_000,
    "The answer is" + " " * 50_000 + "A",
    "so it's " * 10_000,
    "A) " + "x" * 50_000,
    "if " * 20_000 + "the answer is A",
    "$" * 50_000 + "{" * 50_000,
    "'" * 100_000,
    "...…" * 20_000,
]


@pytest.mark.parametrize("response", ADVERSARIAL, ids=[text[:16] for text in ADVERSARIAL])
def test_time_is_bounded(response: str) -> None:
    start = time.process_time()
    for text in (response, response * 20):
        claimed_letter(text, CITIES)
        boxed_letter(text, CITIES)
    assert time.process_time() - start < 2  # a linear search takes a small part of that, a quadratic one minutes


def test_only_the_end_is_read() -> None:
    assert claimed_letter("The answer is A." + " " * WINDOW + "The answer is B.", CITIES) == "B"


CLAIMS = (
    "The answer is ({}).", "Answer: {}", "**Answer:** {}", r"\boxed{{{}}}", r"$\boxed{{\text{{{}}}}}$", "I choose {}.",
    "Option {} is correct.", "The correct option is {}.", "<answer>{}</answer>", "So I would go with ({}).",
)  # fmt: skip


@pytest.mark.parametrize("first", CLAIMS)
@pytest.mark.parametrize("second", CLAIMS)
def test_two_claims_are_right_only_if_they_agree(first: str, second: str) -> None:
    for one, other in (("A", "B"), ("C", "A")):
        response = f"{first.format(one)}\n\n{second.format(other)}"
        assert claimed_letter(response, CITIES) is None
        assert boxed_letter(response, CITIES) is None
    assert claimed_letter(f"{first.format('C')}\n\n{second.format('C')}", CITIES) == "C"


PIECES = [
    "The answer is ",
    "A",
    "(B)",
    " or ",
    "\n",
    r"\boxed{",
    "}",
    "$",
    "**",
    "not ",
    "Paris",
    ". ",
    "<answer>",
    "?",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_no_text_raises(text: str) -> None:
    strict = boxed_letter(text, CITIES)
    assert strict is None or strict == claimed_letter(text, CITIES)
    lenient_answer(text)
