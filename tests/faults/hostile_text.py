"""Model text that means harm, or looks like it: drawn from a grammar, mutated from real answers, and bombs."""

from __future__ import annotations

import random
from collections.abc import Callable

REAL = (
    "42", "-7", "3.50", "1,234", r"\frac{3}{4}", r"\dfrac12", r"2\sqrt{3}", "x^2+2x+1", "(x+1)^2", r"\frac{\pi}{2}",
    "(1,2)", r"\{1,2\}", r"[0,1)\cup(2,3]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "x=5", r"5\text{ cm}",
    r"90^\circ",
    "3+2i", r"\text{Monday}", r"\infty", "50\\%", r"\binom{5}{2}", "10^{100}", r"x\in(-\infty,3]", "y=2x-1", "$-5.00",
    r"\log_2 8", r"\sin^2 x+\cos^2 x", "1/3", "2:3", "12:30", "B", "(C)", r"\text{(A)}", "[[1, 2], [3, 4]]", "1 2 3",
)  # fmt: skip
"""Answers as responses and data sets write them."""

KEPT = (
    ("7", "8"), ("7", "-7"), ("7", "7.5"), ("7", "77"), ("7", "0.7"), ("7", "x"), ("7", r"\frac{7}{2}"), ("7", "7,8"),
    (r"\frac{1}{2}", r"\frac{1}{3}"), (r"\frac{1}{2}", "2"), (r"2\sqrt{3}", r"2\sqrt{5}"), (r"2\sqrt{3}",
    r"3\sqrt{2}"),
    ("x^2+1", "x^2-1"), ("x^2+1", "x^3+1"), ("(1,2)", "(2,1)"), ("(1,2)", "(1,2,3)"), (r"\pi", "3.14"), ("-1", "1"),
    (r"\{1,2\}", r"\{1,3\}"), ("10^{20}", "10^{21}"), (r"\text{Monday}", r"\text{Friday}"), ("3+2i", "3-2i"),
    (r"\frac{1}{2}", r"\frac{1}{2} ?? \frac{1}{3}"), ("7", "7t"), ("7", r"7\mathrm{i}"), ("56", "7 8"),
    ("1, 2", "1<x<2"), ("7", r"7\text{ or 8}"), ("7", r"7\text{ cm}, 8\text{ cm}"),
    ("7", r"7\text{ feet }8\text{ inches}"),
    ("1000000007", "1000000009"), (r"\infty", r"-\infty"), ("0", "1"), ("2^{100}", "2^{101}"),
)  # fmt: skip
"""Pairs of an answer and another that is not right for it, however it is dressed."""

_DIGITS = (
    "0123456789", "٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "৩৪৫", "𝟎𝟏𝟐𝟑𝟒𝟓", "²³¹⁴⁵", "①②③", "〇一二三", "½¾", "ⅣⅫ",
)  # fmt: skip
_COMMANDS = (
    r"\frac", r"\dfrac", r"\sqrt", r"\sqrt[3]", r"\binom", r"\boxed", r"\fbox", r"\text", r"\left(", r"\right)",
    r"\pi",
    r"\int", r"\sum_{i=1}^{n}", r"\lim_{x\to0}", r"\prod", r"\infty", r"\\", r"\{", r"\}", r"\begin{matrix}",
    r"\cdot",
    r"\end{matrix}", r"\begin{cases}", r"\overline", r"\mod", r"\log", r"\sin", r"\to", r"\$", r"\%", r"\,", "\\",
    r"\ ",
)  # fmt: skip
_PLAIN = (
    "{", "}", "(", ")", "[", "]", "^", "_", "**", "+", "-", "*", "/", "//", "=", ",", ".", ":", ";", "!", "!!", "'",
    '"',
    "`", "#", "####", "$", "$$", "%", "&", "|", "~", "\n", "\t", "\x00", "\x1b", "\ufeff", "\u202e", "\u200b",
    "\u2212",
    "\ud800", "x", "y", "e", "i", "or", "and", "answer is", "The answer is", "<answer>", "</answer>", "<think>",
    "inf",
    "</think>", "(A)", "B.", "Option C", "wait", "not", "nan", "None", "True", "lambda", "if", "for", "import",
)  # fmt: skip
_CODE = (
    "9**9**9", "9**9**9**9", "[0]*10**12", "'a'*10**12", "sum(range(10**12))", "(lambda f: f(f))(lambda f: f(f))",
    "[x for x in iter(int, 1)]", "10**10**7 % 7", "factorial(10**7)", "range(10**18)", "exit()", "quit(1)", "1/0",
    "integrate(exp(x**x), x)", "solve(x**100 - x + 1, x)", "factorint(10**60 + 7)", "Symbol('x')**(10**9)", "...",
    "expand((x + y + 1)**500)", "Matrix(200, 200, lambda i, j: x**(i*j)).det()", "primerange(10**12)", "print(1)",
    "().__class__.__bases__[0].__subclasses__()", "open('/etc/passwd').read()", "__import__('os').system('true')",
    "breakpoint()", "input()", "help()", "globals()", "eval('1+1')", "exec('x = 1')", "compile('1', '', 'eval')",
)  # fmt: skip
_TEX_BOMBS = (
    r"\int_0^1 x^{x^{x}} \, dx", r"\sum_{n=1}^{10^{9}} \frac{1}{n^{n}}", r"10^{10^{10^{10}}}",
    r"\binom{10^9}{5\cdot10^8}",
    "99999999!", "(x+1)^{99999}", r"\prod_{k=1}^{100000} k", r"\sqrt[1000000]{2^{1000001}}", r"9^{9^{9}}",
    "1e999999999",
    r"\sin(10^{1000000})", r"\frac{d^{1000}}{dx^{1000}} x^{x}", r"\lim_{x\to0} \frac{\sin(x^{x^{x}})}{x^{100}}",
    "0^{-1}",
    r"\log_{0} 0", r"\frac{0}{0}", r"\tan(\tan(\tan(\tan(x^9))))", r"(((((2^2)^{99})^{99})^{99})^{99})",
    r"0.\overline{9}",
)  # fmt: skip


def expression(draw: random.Random, depth: int = 4) -> str:
    """Nested formulas of the grammar's pieces; balanced three times in four."""
    if depth == 0 or draw.random() < 0.2:
        return _number(draw) if draw.random() < 0.7 else draw.choice("xyzabn")
    one, two = (lambda: expression(draw, depth - 1),) * 2
    return draw.choice(
        (
            lambda: rf"\frac{{{one()}}}{{{two()}}}",
            lambda: rf"\sqrt{{{one()}}}",
            lambda: f"{one()}^{{{two()}}}",
            lambda: f"({one()}{draw.choice('+-*/,')}{two()})",
            lambda: one() + draw.choice(("+", "-", " ", "=", ",", r"\cdot ")) + two(),
            lambda: rf"\left[{one()}\right)",
            lambda: rf"\{{{one()},{two()}\}}",
            lambda: one() + draw.choice(_COMMANDS) + two(),
        )
    )()


def _number(draw: random.Random) -> str:
    digits = draw.choice(_DIGITS) if draw.random() < 0.3 else "0123456789"
    length = draw.choice((1, 1, 2, 3, 5, 30, 400 if draw.random() < 0.05 else 4))
    return "".join(draw.choice(digits) for _ in range(length))


def soup(draw: random.Random) -> str:
    """Pieces without order."""
    return "".join(draw.choice(draw.choice((_COMMANDS, _PLAIN, _PLAIN, REAL))) for _ in range(draw.randrange(40)))


def mutated(draw: random.Random) -> str:
    """A real answer with pieces removed, doubled, swapped or put in."""
    text = draw.choice(REAL)
    for _ in range(draw.randrange(1, 6)):
        at, to = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        text = draw.choice(
            (
                text[:at] + text[to:],
                text[:to] + text[at:],
                text[:at] + draw.choice(_PLAIN + _COMMANDS) + text[at:],
                text[:at] + draw.choice(REAL) + text[to:],
                text[:at] + text[at:to][::-1] + text[to:],
            )
        )
    return text


def code(draw: random.Random) -> str:
    """What an evaluating judge must survive."""
    return draw.choice(("{}", "[{}]", "({})", "str({})", "{} + 1")).format(draw.choice(_CODE))


def tex_bomb(draw: random.Random) -> str:
    """Short formulas that take a computer algebra system long."""
    return draw.choice(("{}", "1+{}", r"\frac{{{}}}{{2}}", "x={}")).format(draw.choice(_TEX_BOMBS))


def nested(draw: random.Random) -> str:
    """Up to a few hundred levels of one thing."""
    depth = draw.randrange(2, 400)
    opened, closed = draw.choice(
        (("{", "}"), ("(", ")"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\boxed{", "}"), ("[", "]"))
    )
    return opened * depth + "1" + closed * (depth - draw.choice((0, 0, 1)))


def long(draw: random.Random) -> str:
    """A megabyte of one thing, or of what regular expressions go through again and again."""
    piece = draw.choice(
        (r"\frac", "{", "}", r"\boxed{", r"\boxed", r"\text{", "$", "$x", r"\(", r"\[", "1", "1,", "1/", "-", " ",
        "\n", "a",
         "answer is ", "The answer is (A) or ", "<answer>", "<think>", "(A)", "so ", r"\\", "#### ", "**", ". ",
         "\\", "9^",
         "not ", "= 1 ", "is 1 ", "A. ", "(A) x\n", "wait, ", "1 1", "\u200b", "٣", "**B**", r"\text{\text{",
         "1{,}000")
    )  # fmt: skip
    text = piece * (1_000_000 // len(piece))
    return text + draw.choice(("", r"\boxed{7}", "}", "The answer is 7", "7", "!"))


_DRESSES: tuple[Callable[[str], str], ...] = (
    str,
    "${}$".format,
    " {} ".format,
    lambda text: rf"\text{{{text}}}" if "\\" not in text else text,
    lambda text: rf"\left({text}\right)" if "," not in text else text,
    r"\mathrm{{{}}}".format,
    r"\displaystyle {}".format,
    "{}.".format,
    "{{{}}}".format,
    r"\boxed{{{}}}".format,
    r"{}\,".format,
)


def dressed(draw: random.Random, answer: str) -> str:
    """`answer` in other clothes: none of them changes what it is worth."""
    for _ in range(draw.randrange(3)):
        answer = draw.choice(_DRESSES)(answer)
    return answer


def hostile(draw: random.Random) -> str:
    """Any of the short kinds."""
    kinds = ((expression, 30), (soup, 25), (mutated, 30), (code, 7), (nested, 5), (tex_bomb, 3))
    return draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0](draw)


def response(draw: random.Random) -> str:
    """A whole response around hostile pieces."""
    frames = (
        "{}", r"\boxed{{{}}}", "The answer is {}.", "<answer>{}</answer>", "#### {}", "so {} = {}",
        r"It is \boxed{{{}}} or {}.",
        "<think>{}</think>{}", "**Answer:** ({})", r"\[{}\]", "${}$", "Wait, {} is wrong. \\boxed{{{}}}",
        "{}\n\n{}\n{}",
    )  # fmt: skip
    return draw.choice(frames).format(*(hostile(draw) for _ in range(3)))
