"""Final answers without a box: what is accepted, what never is, and that no text takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from g2rl.tasks.lenient import lenient_answer
from g2rl.tasks.verifier import MathVerifier

# (gold, response, verdict, reason)
CASES = [
    ("204", r"So the walk takes \boxed{204} minutes.", True, "box"),
    ("42", r"\boxed{42", False, "a box that is never closed"),
    ("42", r"The answer is 42. \boxed{43}", False, "a wrong box before anything else"),
    ("13", r"\boxed{12} or \boxed{13}", False, "two boxes side by side"),
    ("13", r"\boxed{12}\boxed{13}", False, "two boxes, no word between"),
    ("13", r"$\boxed{12}$, $\boxed{13}$", False, "two boxes in formulas"),
    ("13", r"$x=\boxed{12}$ or $x=\boxed{13}$", False, "two boxes in equations"),
    ("13", r"Either \boxed{12} or maybe \boxed{13}", False, "two boxes, one doubted"),
    (r"\frac{639}{40}", r"$\boxed{\frac{639}{40}} = \boxed{15.975}$", True, "two boxes with one answer"),
    ("13", r"First \boxed{12}, which was too small. In the end \boxed{13}.", True, "a box corrected"),
    ("204", "Thus $m=204$.", True, "the last formula"),
    ("7", "Since $a=2$, we get $f(a)=7$.", True, "the last of two formulas"),
    ("9", "Answer \\( 9 \\)", True, "phrase without a verb"),
    ("9", "The answer is\n$$ 9 $$", True, "displayed formula"),
    (r"\frac{1}{2}", "The answer is 1/2.", True, "plain fraction"),
    ("0.5", "**Answer:** $\\frac12$", True, "bold phrase"),
    ("18", "She makes 9 * 2 = 18 dollars every day.", True, "a sum in a sentence"),
    ("18", "So the total is $18.", True, "money"),
    ("18", "She keeps $2 and pays $9 twice. The answer is $18 because $9 is paid twice.", True, "money is no formula"),
    ("18", "16 - 3 - 4 = 9\n#### 18", True, "the data set's own form"),
    ("1234", "The answer is 1,234 apples.", True, "grouped digits and a unit"),
    ("-5", "The answer is -5.", True, "sign"),
    ("50", "The final answer is: 50%", True, "per cent"),
    (r"\text{Evelyn}", "The answer is Evelyn.", True, "a word"),
    ("x^2+1", "The answer is $1+x^2$.", True, "an expression"),
    ("3,5", "The roots are $3$ and $5$.", True, "all of several values"),
    ("7", "<answer>7</answer>", True, "answer element"),
    ("7", "The answer is 7. So the answer is 7.", True, "the same twice"),
    ("14/3", "14/3", True, "nothing but the answer"),
    ("7", "<think>Is it 8? The answer is 8.</think>\nThe answer is 7.", True, "after thinking"),
    ("8", r"<think>So \boxed{7}.</think> The answer is 8.", True, "words after thinking outrank a box in it"),
    ("7", r"<think>So \boxed{7}.</think> The answer is 8.", False, "which counts for nothing"),
    ("18", "Janet makes 9 * $2 = $18 every day.", True, "money on both sides of an equals sign"),
    ("12", "It's not $10$ but $12$.", True, "another value denied"),
    ("12.5", "It is not 10 which is 12.5€", True, "another value denied, a currency"),
    ("1000", "1 000", True, "digits grouped by blanks"),
    (r"28\%", "28 percent", True, "per cent in a word"),
    (r"\text{Monday}", "Monday", True, "nothing but the word"),
    ("7", "<think>It is 7", False, "a thought that does not end"),
    ("7", "7 is wrong", False, "denied at the end"),
    ("7", "It is $8$, not $7$.", False, "denied after another"),
    ("7", "If n is odd, it is 7.", False, "on a condition that comes first"),
    ("7", "The answer is 7. Wait, that's wrong.", False, "taken back"),
    ("7", "A tempting answer is 7.", False, "tempting only"),
    ("7", "The answer is not $7$.", False, "denied"),
    ("7", "The answer isn't 7.", False, "denied, shortened"),
    ("7", "It is wrong that the answer is 7.", False, "denied from afar"),
    ("7", "If the answer is 7, then n is odd.", False, "supposed"),
    ("7", "The answer is 7 if n is odd.", False, "on a condition"),
    ("7", "Is the answer 7?", False, "asked"),
    ("7", "The answer is 7?", False, "asked after all"),
    ("7", "The answer is 7 or 8.", False, "two numbers"),
    ("8", "The answer is 7 or 8.", False, "two numbers, the last right"),
    ("8", "The answer is $7$ or $8$.", False, "two formulas"),
    ("8", "So it is $7$ or $8$.", False, "two formulas, no phrase"),
    ("8", "The answer is 7. The answer is 8.", False, "two answers"),
    ("8", "Answer: 7\nAnswer: 8", False, "two lines"),
    ("36", r"The final answer is $\$36$. I hope it is correct.", True, "money in a formula"),
    ("36", r"So she pays $\$36$.", True, "the same at the end"),
    ("36", r"It is \$30 and \$36 together.", False, "escaped signs make no formula"),
    ("5", "We get 2+3.\n\n**Final Answer**\n\n5", True, "over the last line"),
    ("5", "We add what each of them has and find it.\n\n### Final Answer\n5", True, "a heading"),
    ("5", "### Answer\nFirst we get 5.\nThen we add 3 to it.", False, "a heading of several lines"),
    ("7", "### Answer\nWe add 3 and 4. The answer is 7.", True, "a heading, and what it says"),
    ("28", "The area is 28 square inches.", True, "a unit of area"),
    ("28", "The answer is 28 square.", False, "no unit"),
    ("28", "It takes 28 months.", True, "a word that ends like a part"),
    ("3", "The roots are $3$ and $5$.", False, "one of two roots"),
    ("10100", "The roots are $10$ and $100$.", False, "two roots that are no number"),
    ("4", "So $x=3$ and $y=4$.", False, "one of two equations"),
    ("3", "She has 18 apples after 3 days.", False, "the last number is another one"),
    ("2", "The answer is sqrt(2).", False, "a number inside an expression"),
    ("2", "The answer is the square root of 2.", False, "the same in words"),
    ("2", "The answer is 2 pi.", False, "a multiple of it"),
    ("2", "The answer is 2 dozen.", False, "a dozen of it"),
    ("5", "The answer is 5 sevenths.", False, "a seventh of it"),
    ("3", "The answer is 3 quarters.", False, "a quarter of it"),
    ("28", "The sum is 28 hundredths.", False, "a hundredth of it"),
    ("5", "The answer is 5 base eight.", False, "another base"),
    ("7", "The answer is 7 factorial.", False, "its factorial"),
    ("7", "The answer is 7 divided by two.", False, "half of it"),
    ("5", "The answer is 5 degrees below zero.", False, "its negative"),
    ("2", "The answer is 2 point five.", False, "a half more"),
    ("5", "The answer is 5 to one.", False, "a ratio"),
    ("2", "The answer is 2^10.", False, "a power of it"),
    ("2", "The answer is 2x.", False, "a coefficient"),
    ("2", "The number is 2 more than 5.", False, "compared with another"),
    ("2", "This completes step 2.", False, "a number that numbers"),
    ("7", "It lies between 7 and 9.", False, "a bound"),
    ("7", "It could be 7.", False, "a guess"),
    ("7", "We must find the sum.", False, "no number"),
    ("2", "AZYUK2A", False, "a digit inside a word"),
    (r"\frac{1}{3}", "The answer is 0.33.", False, "a rounded decimal"),
    ("7", "", False, "nothing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(limit_s=6, workers=2) as made:
        yield made


def test_table(verifier: MathVerifier) -> None:
    answers = [lenient_answer(response) for _, response, _, _ in CASES]
    verdicts = verifier.judge([(gold, answer) for (gold, *_), answer in zip(CASES, answers, strict=True)])
    wrong = [(case, answer) for case, answer, v in zip(CASES, answers, verdicts, strict=True) if v is not case[2]]
    assert not wrong


ADVERSARIAL = [
    r"\boxed{" * 4_000,
    "answer is " * 5_000,
    "answer to the " * 5_000,
    "$" * 100_000,
    "$a" * 50_000,
    "$$a " * 30_000,
    r"\( " * 30_000,
    r"\[ " * 30_000,
    "is 7 " * 20_000,
    "7 " * 50_000,
    "1," * 50_000,
    "is " + "7" * 100_000,
    "the answer is " + "x " * 50_000,
    " " * 100_000,
    "\n \n" * 30_000,
    "a. " * 30_000,
    "<answer>" * 10_000,
    "####  " * 20_000,
    "or " * 50_000,
    "{" * 50_000 + "}" * 50_000,
]


@pytest.mark.parametrize("response", ADVERSARIAL, ids=[text[:16] for text in ADVERSARIAL])
def test_time_is_bounded(response: str) -> None:
    start = time.process_time()
    for text in (response, response * 10):
        lenient_answer(text)
    assert time.process_time() - start < 2  # a linear search takes a small part of that, a quadratic one minutes
