"""Final answers in one spelling: what is the same, what is kept apart, and that no text takes long or raises."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from g2rl.tasks.answers import last_number
from g2rl.tasks.spelling import Number, canonical, number, read, unwrap_text


def test_unwrap_text() -> None:
    assert unwrap_text(r"\text{hello}") == "hello"
    assert unwrap_text(r"3 \text{cm}") == r"3 \text{cm}"


SAME = [
    (
        ["7", " 7 ", "$7$", "+7", "07", "7.", "7.0", "7.00", r"\text{7}", r"\(7\)", "14/2", r"\frac{14}{2}"],
        "whole number",
    ),
    (["1234", "1,234", "1{,}234", r"1,\!234", r"1\,234", "1,234.0"], "thousands"),
    (["1234", "1,234 ", r"1,\,234", "1{,} 234", r"1, \!234", r"1,\! 234"], "thousands, blanks around a close comma"),
    (["10, 100", " 10,  100.", "10,\n100", r"10,\ 100", "10,~100", "10 , 100", "10 ,100", r"$10,\quad 100$"], "list"),
    (["x=1234", "x = 1,234", "x = 1{,}234", r"x = \$1,234", "x = 1,234 dollars", "x = 1,!234"], "equation"),
    ([r"1234\pi", r"1{,}234\pi", r"1,\!234 \pi", r"1\,234\pi", r"1,234\pi"], "thousands in an expression"),
    (["y = 2x + 1000", "y = 2x + 1,000", "y=2x+1{,}000"], "thousands at the end of one"),
    (["3, 5", "3,5", "3 , 5"], "list that is no number without its blanks"),
    (
        ["-1/2", r"-\frac{1}{2}", r"\frac{-1}{2}", r"-\dfrac12", r"-\tfrac{2}{4}", "-0.5", "-.5", "\u22120.50"],
        "fraction",
    ),
    (["0", "-0", "+0.0"], "zero"),
    (["50", "50%", r"50\%", "50 percent", r"50\text{ per cent}", r"50 \text{ percent}."], "percent"),
    (["1/200", "0.5%", r"0.5\%", "0.005"], "less than a percent"),
    (["90", r"90^\circ", r"90^{\circ}", "90\u00b0", "90 \u00b0F", r"90\,^\circ\text{C}"], "degrees"),
    (["x+1", "x + 1", r"x\,+\,1", r"x\quad+ 1"], "blanks"),
    (["(1,2)", r"\left(1, 2\right)", "( 1,2 )"], "bracket sizes"),
    ([r"\text{A,C}", "A, C", r"\text{A and C}", r"\text{A, and C}"], "letters"),
    (["Monday", r"\text{Monday}", r"\textbf{Monday}", "Monday."], "word"),
    (["ab", r"\text{a b}"], "blanks between letters"),
    (["18.90", r"\$18.90", "18.9", "$18.90", "18.90\u20ac", "\u00a318.90", r"18.90\$"], "currency"),
    (["18", r"US\$18", "US $18", "\u20b9 18", "Rs. 18", r"\text{Rs }18", "USD 18", "18 USD"], "currency by its name"),
    (
        [
            "18",
            "18 dollars",
            r"18\ \text{dollars per day}",
            "18 cm^2",
            "18 km/h",
            "18 bolts of fabric",
            "18 years old",
            "18 dollars a day",
            "18 cents an hour",
            r"18\mbox{ cm}^2",
            "18 people.",
            r"18 \text{ cm}^2.",
        ],
        "unit",
    ),
    (
        ["1/1000", "1e-3", "1E-03", "10^{-3}", r"1.0\times 10^{-3}", r"1 \cdot 10^{-3}", "1\u00d710\u207b\u00b3"],
        "power",
    ),
    (["7/2", "3 1/2", r"3\frac{1}{2}", r"3\tfrac12", "3\u00bd", "3.5"], "mixed number"),
    (["x+1", "= x+1", r"\mathbf{x+1}", "{x+1}", r"\displaystyle x+1", "**x+1**", r"\boldsymbol{{x + 1}}"], "dress"),
]


@pytest.mark.parametrize("answers, reason", SAME, ids=[case[1] for case in SAME])
def test_canonical_groups_equal_answers(answers: list[str], reason: str) -> None:
    assert len({canonical(answer) for answer in answers}) == 1


DIFFERENT = [
    ("12", "1 2", "blank between numbers"),
    ("31/2", "3 1/2", "mixed number"),
    ("3/2", "3 1/2", "its product"),
    ("0.5", "0.5%", "a percent sign that makes a hundredth of it"),
    ("18", "18 million", "a word that makes another number of it"),
    ("18", "18 x", "a factor"),
    ("18", "18 ab", "factors"),
    ("18", "18 xyz", "three factors"),
    ("18", "18 abcd", "four factors"),
    ("18", "18 a", "a letter that is no article"),
    ("18", "18 dollars and a half", "half of one more"),
    ("18", "18 plus", "a sum that goes on"),
    ("18", "18 pi", "a constant"),
    ("18", "18 s^2", "a square"),
    ("18", "18 hours 30 minutes", "two units"),
    ("1e5", "1e6", "powers"),
    ("e-19", "1e-19", "Euler's number less 19"),
    ("10^{9999}", "10^{9998}", "powers that are not computed"),
    ("(1,234)", "(1234)", "a pair is no thousand"),
    ("1,2", "12", "a list is no thousand"),
    ("1{,}2", "12", "with a close comma"),
    ("1000{,}200", "1000200", "more digits than a group has"),
    (r"(1,234\pi)", r"(1234\pi)", "a pair with a product is no thousand"),
    ("x=1,y=234", "x=1y=234", "nor are equations"),
    ("x = 10, 100", "x = 10100", "a list of solutions"),
    ("x + y = 5", "5", "an equation for its right side"),
    ("10, 100", "10100", "nor is one with items of three digits"),
    ("10, 100", "10,100", "nor one that a blank tells from a number"),
    ("100, 200", "200, 100", "order of a list"),
    ("1,000, 200", "1,000,200", "a list with a number in groups"),
    ("1,200, 300", "1, 200, 300", "where a list is divided"),
    (r"\text{A and C}", "AC", "letters that are no word"),
    ("1/0", "0", "no value"),
    ("7", "-7", "sign"),
    ("0.33", "1/3", "rounding"),
    ("10^20", "10^21", "powers are not evaluated, but differ"),
    ("1", "1!", "a factorial sign is no spacing"),
    (r"\leftarrow", "arrow", "a command that starts like a bracket size"),
    (r"-\frac{-1}{2}", "-1/2", "two signs"),
]


@pytest.mark.parametrize("first, second, reason", DIFFERENT, ids=[case[2] for case in DIFFERENT])
def test_canonical_keeps_answers_apart(first: str, second: str, reason: str) -> None:
    assert canonical(first) != canonical(second)


def test_canonical_of_a_number_is_its_value() -> None:
    assert canonical("+07.50") == "15/2"
    assert canonical("1,234.0") == "1234"


def test_numbers_beyond_the_conversion_limit_are_compared_as_text() -> None:
    long = "7" * 5_000  # Python refuses to convert more than 4300 digits
    assert canonical(long) == long
    assert canonical("0" + long) != long
    assert last_number(f"It is {long}.") == long


# Unicode, TeX's short forms and dress; the last column says why.
NORMALISED = [
    ("2\u22121", "2-1", "minus"),
    ("\u20131", "-1", "en dash before a number"),
    ("(\u20131, 2)", "(-1, 2)", "and inside"),
    ("3\u20135", "3\u20135", "between numbers it is a range"),
    ("2\u221a3", r"2\sqrt{3}", "root of a number"),
    ("\u221a(x+1)", r"\sqrt{x+1}", "of what brackets hold"),
    ("\u221a{2}", r"\sqrt{2}", "of a group"),
    ("x\u00b2+x\u207b\u00b9\u2070", "x^{2}+x^{-10}", "raised digits"),
    ("\u221e", r"\infty", "infinity"),
    ("\u00bdx", r"\frac{1}{2}x", "a fraction in one sign"),
    ("3 \u00b7 4\u00d75", r"3 \cdot 4\times 5", "products"),
    (r"\frac\pi2", r"\frac{\pi}{2}", "fraction of tokens"),
    (r"\dfrac x{y+1}", r"\frac{x}{y+1}", "of a token and a group"),
    (r"\frac{a}{\frac12}", r"\frac{a}{\frac{1}{2}}", "inside another"),
    (r"\frac\sqrt{2}2", r"\frac\sqrt{2}2", "a command with an argument stays"),
    (r"\begin{pmatrix} 1 \\[1mm] 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "rows set apart"),
    (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}", "a row's end is no blank"),
    ("4.5e33", r"4.5\times 10^{33}", "power of ten"),
    ("3 1/2", r"3\frac{1}{2}", "mixed number"),
    ("5 7/2", "5 7/2", "no mixed number"),
    ("= 5", "5", "an equation's right side"),
    ("x = 1/2 = 4/8 ", r"x = 1/2 = \frac{4}{8}", "the last one"),
    (r"\text{The answer is }9", "9", "said before"),
    (r"\text{The answer is not }9", r"\text{The answer is not }9", "denied before"),
    (r"{\text{east}}", r"\text{east}", "a group around a word"),
    (r"\mathbf{\text{east}}", r"\text{east}", "type around a word"),
    (r"\text{east}", r"\text{east}", "a word stays what it is"),
    (r"\text{$x+1$}", "x+1", "a formula as text"),
    ("{1}{2}", "{1}{2}", "two groups are no dress"),
    ("**5**", "5", "bold"),
    ("_x_", "x", "italics"),
    ("** x **", "x", "bold with blanks"),
    ("x**2*y", "x^{2}*y", "a power is none"),
    ("So we have $x$", "x", "a sentence around a formula"),
    ("It is not $x$", "It is not $x$", "one that denies it"),
    ("Answer: 9", "9", "said before, without TeX"),
    ("20 000 dollars", "20000", "thousands by blanks"),
    ("1 000 20", "1 000 20", "no thousands"),
    (r"0.1\overline{6}", r"\frac{15}{90}", "a repeating decimal"),
    ("05:00 PM", "5:00", "a time"),
    (r"\{ \}", r"\emptyset", "the empty set"),
    (r"3\text{ cm}, 5\text{ m}^2", "3 , 5", "units in a list"),
    ("2*3*4", "2*3*4", "a product is no markup"),
    ("$1/3$.", r"\frac{1}{3}", "formula signs and a full stop"),
    (r"\(x\)", "x", "others"),
    (r"\[ x \]", "x", "displayed"),
    ("$3$ and $5$", "$3$ and $5$", "two formulas"),
    ("0.3..", "0.3..", "dots"),
    ("18 m/s", "18", "a rate"),
    ("18 m", "18 m", "one letter may be a variable"),
    ("18 x/y", "18 x/y", "a quotient"),
    (r"1.5 \text{ million}", "1500000", "a million of it"),
    ("-2 dozen eggs", "-24", "a dozen of it, and of what"),
    (r"\frac{1}{8} \text{ hundred}", r"\frac{25}{2}", "no whole number of it"),
    ("18 hundredths", "18 hundredths", "parts of it"),
    ("6 power plants", "6", "what is counted, said in two words"),
    ("18 to the power", "18 to the power", "a power"),
    (r"5\text{ even numbers}", "5", "what is counted"),
    ("", "", "nothing"),
]


@pytest.mark.parametrize("answer, expected, reason", NORMALISED, ids=[case[2] for case in NORMALISED])
def test_normalised(answer: str, expected: str, reason: str) -> None:
    assert read(answer)[0] == expected
    assert read(expected)[0] == expected


def test_units_may_stay() -> None:
    assert read("18 hours", units=False)[0] == "18 hours"
    assert canonical("18 hours", units=False) != canonical("18 days", units=False)


@pytest.mark.parametrize(
    "normal, value, percent, step",
    [
        ("7", 7, False, 1),
        ("700", 700, False, 100),
        ("-1,234.50", Fraction(-12345, 10), False, Fraction(1, 100)),
        (r"6.63\times 10^{-34}", Fraction(663, 10**36), False, Fraction(1, 10**36)),
        (r"-\frac{2}{4}", Fraction(-1, 2), False, 0),
        (r"3\frac{1}{2}", Fraction(7, 2), False, 0),
        (r"12.5\%", Fraction(25, 2), True, Fraction(1, 10)),
        (r"\$-5", -5, False, 1),
    ],
)
def test_numbers(normal: str, value: Fraction, percent: bool, step: Fraction) -> None:
    assert number(normal) == Number(Fraction(value), percent, Fraction(step))


@pytest.mark.parametrize(
    "first, second, same",
    [
        (r"\frac{1}{12}", "0.0833333333333333", True),
        (r"\frac{2}{3}", "0.6666666666667", True),
        (r"\frac{2}{3}", "0.66666666666", False),
        (r"\frac{1}{12}", "0.0833333333333353", False),
        ("0.1000000000000001", "0.1", False),
        ("1000000000000000", "1000000000000001", False),
        (r"\frac{3000000000000001}{3}", "1000000000000000", False),
        (r"\frac{3000000000000001}{3}", "1000000000000001", False),
        (r"\frac{1}{3}", r"0.3333333333333333\%", False),
    ],
)
def test_fractions_are_their_printed_decimals(first: str, second: str, same: bool) -> None:
    one, other = number(first), number(second)
    assert one is not None and other is not None
    assert one.same(other) == other.same(one) == same


@pytest.mark.parametrize(
    "normal",
    ["", "x", "1/0", r"5\frac{7}{2}", "1,2345", "1, 234", "1.2.3", "3/4/2024", "10^{9999}", "--5", "5!", "7" * 301],
)
def test_other_answers_are_no_numbers(normal: str) -> None:
    assert number(normal) is None


@pytest.mark.parametrize(
    "first, second, same",
    [
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("1%", "1", True),
        ("0.5%", "0.5", False),
        ("0.5%", "0.005", True),
        ("50%", "5000%", False),
        ("700%", "7", True),
    ],
)
def test_percent(first: str, second: str, same: bool) -> None:
    one, other = number(first), number(second)
    assert one is not None and other is not None
    assert one.same(other) == other.same(one) == same


@pytest.mark.parametrize(
    "words", ["hundredths", "gross", "thirds", "squared", "or so", "is it if not", "twenty-fifths", "pi"]
)
def test_words_that_change_a_number(words: str) -> None:
    assert read(rf"18 \text{{ {words}}}")[0] != "18"
    assert read(f"18 {words}")[0] != "18"
    assert read(f"x = 18 {words}")[0] != "x = 18"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "dollars",
        "square feet",
        "two-digit numbers",
        "paths",
        "months",
        "times",
        "ones",
        "power plants",
        "six packs",
    ],
)
def test_words_that_do_not(words: str) -> None:
    assert canonical(rf"18 \text{{ {words}}}") == "18"


ADVERSARIAL = [
    "{", "}", "{}", r"\frac", r"\frac1", r"\frac\pi", r"\text{", r"\mathbf{", "**", "*", "_", "`", "$", "$$", r"\(",
    r"\[", "=", ".", "1 ", "1 a ", "1 a/", "a.", "1/", "1,", "1,111", "1e", "10^", "1e9", r"\times 10^{", "\u221a",
    "\u221a(", "\u00b2", "\u2013", "\u00bd", r"\,", r"\!", r"\\[1mm]", r"\text{answer is }", " ", "%", "-", "$1",
    r"\quad", r"\\", "the ", "the $", "1 000 ", "1.000", r"0.\overline{", r".\bar1", "x**", "x ** ", "1:11:",
    r"1\text{", r"1\text{ cm}", "1 cm ", "i ",
]  # fmt: skip


@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_time_is_linear(piece: str) -> None:
    start = time.process_time()
    for text in (piece * (200_000 // len(piece)), "5 " + piece * 100, piece * 30 + "x" + "}" * 30, "{" * 5_000 + piece):
        canonical(text)
        number(text)
    assert time.process_time() - start < 2  # milliseconds, where a quadratic pass would take minutes
