r"""One spelling for final answers in mathematics: what is judged, compared and voted by.

`read` gives the notation in which answers are judged, `number` the exact value of those that are plain numbers,
`canonical` a key that plainly equal answers share. Answers are model text: everything here takes time linear in their
length and never raises.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from string import ascii_lowercase

MAX_ANSWER = 10_000
"""A longer answer counts as none."""
_MAX_DIGITS = 300
"""Numbers with more characters are compared as text: Python refuses to convert very long ones."""
_MAX_UNIT = 60  # characters
_PRINTED = Fraction(1, 10**12)  # of a number, what its last printed digit is worth at most
_LAYERS = 8  # of markup around an answer that are taken off

_FRACTIONS = "\u00bd\u2153\u2154\u00bc\u00be\u2155\u2156\u2157\u2158\u2159\u215a\u215b\u215c\u215d\u215e"  # 1/2 to 7/8
UNSEEN = [0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF]
"""Signs that take no room: soft hyphen, joiners, marks of direction."""
_SIGNS = str.maketrans(
    dict.fromkeys(UNSEEN)
    | {wide: chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)}  # digits, brackets and commas of East Asian text
    | {sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("\u2044")) for sign in _FRACTIONS}
    | {"\u2212": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u221e": r"\infty "}
    | {"\u03c0": r"\pi ", "\u00b0": r"^\circ ", "\u2205": r"\emptyset ", "\u2208": r"\in "}
    | {"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2044": "/", "\u2010": "-"}
)
_RAISED = re.compile("\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_ROOT = re.compile("\u221a\\s*(?:([0-9]+(?:\\.[0-9]+)?|[A-Za-z])|\\(([^()]*)\\)|(?=\\{))")
# An en dash is a sign where no number precedes it, between numbers it makes a range.
_DASH = re.compile(r"(^|[(\[{,=])(\s*)\u2013(?=\s*[0-9.\\(A-Za-z])")
_ROW_END = re.compile(r"\\\\\s*\[[0-9.]+\s*(?:mm|cm|in|pt|em|ex)\]")
_LETTER = r"(\\(?:pi|theta|alpha|beta|gamma|phi|omega)(?![A-Za-z])|[0-9A-Za-z])"
_FRAC = re.compile(rf"\\[dtc]?frac(?![A-Za-z])\s*(?:{_LETTER}\s*(?:{_LETTER}|(?=\{{)))?")
# Thousands keep their comma close, with a thin space at most; a blank beside it makes two items of a list.
_CLOSE_COMMA = re.compile(r"(?:\{,\}|,\s*\\!)\s*")
# Between the digits of a number it divides no list, whatever stands around the number.
_THOUSANDS = re.compile(r"(?<=[0-9])(?<![0-9]{4})(?:\{,\}|,\s*\\!|,!)\s*(?=[0-9]{3}(?![0-9]))")
_PLAIN_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_REPEATING = re.compile(r"(?<![0-9])([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar)\s*\{?([0-9]{1,20})\}?")
_PYTHON_POWER = re.compile(r"(?<=[0-9A-Za-z)}])( ?)\*\*\1(?:([+-]?[0-9A-Za-z]+)|\(([^()]*)\))")
# Thousands as other countries divide them: by blanks, or by more than one dot.
_OTHER_THOUSANDS = re.compile(r"(?<![0-9.,])(?<![0-9] )[0-9]{1,3}(?:(?: [0-9]{3})+|(?:\.[0-9]{3}){2,})(?![0-9]| [0-9])")
_EMPTY_SET = re.compile(r"\\\{\s*\\\}|\\varnothing(?![A-Za-z])")
_OPENING = re.compile(r"[(\[|]|\\\{")
_SPACING = re.compile(
    r"(?P<row>\\\\)|(?<=[0-9,])\\,(?=[0-9]{3}(?![0-9]))|\\!|(?P<blank>(?:\\[,;:> ]|\\q?quad(?![A-Za-z])|[\s~])+)"
)

_MARKED = re.compile(
    r"(?i:(?:(?:so|thus|therefore|hence|then|we|have|get|find|that|the|final|correct|answer|solution|is|are)[,:]? )+"
    r"\$([^$]+)\$(?: is the (?:final |correct )?(?:answer|solution))?\.?)"
    r"|\$\$?((?:[^$\\]|\\.)+)\$\$?|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]"
    r"|\*\*?([^*]+)\*\*?|__?([^_]+)__?|`+([^`]+)`+",
    re.DOTALL,
)
_STYLE = r"\\(?:math(?:bf|rm|it|sf|normal)|text(?:bf|it|rm|normal)?|boldsymbol|bm|mbox|operatorname)(?![A-Za-z])"
_GROUP = re.compile(rf"({_STYLE})?\s*\{{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HEAD = re.compile(
    r"=\s*|\\(?:display|text)style(?![A-Za-z])\s*|(?P<text>\\text\s*\{\s*)?(?:(?:so|thus|therefore|hence),?\s+)?"
    r"(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is:?|:)\s*(?(text)\}\s*)",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_LETTERS = re.compile(r"[A-Z](?:(?:,(?: and)?| and) ?[A-Z])+")  # of several options or statements
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r"10 ?\^ ?\{{? ?(?P<{}>[+-]? ?[0-9]{{1,3}})(?![0-9]) ?\}}?"
_MONEY = r"(?:(?:US ?)?\\?\$|[\u20ac\u00a3\u00a5\u20b9]|USD|EUR|GBP|Rs\.?)"
SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12
}  # fmt: skip
"""Words that multiply the number before them."""
_SCALE = rf"(?: ?(?P<scale>(?i:{'|'.join(SCALES)}))s?(?![A-Za-z-]))?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?:{_MONEY} ?(?P<late>[+-]?) ?)?(?:{_POWER.format('alone')}"
    rf"|(?:(?P<whole>[0-9]+) ?)?\\frac ?\{{ ?(?P<top>[+-]?{_DECIMAL}) ?\}} ?"
    rf"(?:\{{ ?(?P<bottom>{_DECIMAL}) ?\}}|(?P<digit>[0-9]))"
    rf"|(?:(?P<mixed>[0-9]+) )?(?P<over>{_DECIMAL}) ?/ ?(?P<under>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<e>[+-]?[0-9]{{1,3}})(?![0-9.])"
    rf"| ?(?:\\times|\\cdot|\*|x) ?{_POWER.format('ten')})?)"
    rf"(?: ?{_MONEY})?{_SCALE}(?P<percent> ?\\?%| per ?cent(?:age)?(?![A-Za-z]))?"
)

_TENS = "twen|thir|for|fif|six|seven|eigh|nine"
CHANGES = (
    r"(?i:\b(?:or|not|if|unless|except|never|maybe|perhaps|possibly|wrong|versus|vs|plus|minus|squared|cubed|mod|modulo"
    r"|factorial|divided|mille|half|halves|thirds?|gross"
    r"|(?:power|sin|cos|tan|cot|log|ln|exp|sqrt|pi|alpha|beta|gamma|delta|theta|lambda|omega"  # but not: power plants
    r"|false|incorrect"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    rf"|(?:four|{_TENS})teen|(?:{_TENS})ty)(?![ -][a-z])"
    r"|dozens?|(?:hundred|thousand|million|billion|trillion)(?:s|ths?)?"
    rf"|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|(?:four|{_TENS})teen|(?:{_TENS})tie)ths?)\b)"
)
"""Words behind a number that make another one of it, or none: they are no unit."""
_CHANGES = re.compile(CHANGES)
_UNIT = re.compile(
    r"(?:\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree)(?: ?[CF])?"
    r"|[A-Za-z]+\.?(?:\^ ?\{?[23]\}?)?(?:(?: ?/ ?|-| )[A-Za-z]+\.?(?:\^ ?\{?[23]\}?)?)*"
)
# Behind other answers than plain numbers.
_TEXT_UNIT = re.compile(rf"(?:(?<=[0-9)}}])|(?<=\\pi)) ?{_STYLE} ?\{{ ?([^{{}}]*?) ?\}}(?:\^ ?\{{?[23]\}}?)?")
_ENDS_IN_WORDS = re.compile(rf"{_STYLE} ?\{{[^{{}}]*[A-Za-z][^{{}}]*\}}$")
_LAST_UNIT = re.compile(r"(?:(?<=[0-9)}])|(?<=\\pi)) ([A-Za-z][A-Za-z. ]*)(?:\^ ?\{?[23]\}?)?$")
_JOINS = re.compile(r"(?:and|but|to|then|through|until|with|where|choose)\b", re.IGNORECASE)
_AREA_OR_VOLUME = re.compile(r"\b(?:(square|sq)|cubic|cu)\b|\^ ?\{?([23])")
_TIME = re.compile(r"0?([0-9]{1,2}(?::[0-5][0-9]){1,2})(?: {0,2}([ap])\.? ?m\.?)?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z]+")
# Shorter words than these may as well be products of variables; four letters hardly are.
_SHORT_UNITS = frozenset(
    "km cm mm nm ft in yd mi kg mg lb lbs oz ml dl hr hrs min mins sec secs ms yr yrs mph kph rpm sq cu gal deg rad "
    "ohm hz khz mhz kw kwh usd eur gbp day cup can men man cow cat dog hen egg box bag car bus boy way bit pen hat toy "
    "ton per of old".split()
)
_LETTER_UNITS = frozenset("mshglCF")  # of a rate, m/s, or as text
_ARTICLE = re.compile(r" an? (?=[a-z]{3})")  # dollars a day

_NOISE = re.compile(
    r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\[()\[\],]|\\?[$%]|\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree(?![A-Za-z])"
)
_LOOSE_BLANK = re.compile(r"(?<![0-9]) | (?![0-9])")  # all but the one in `1 2`, which is not 12
_LISTING_COMMA = re.compile(r" , ?|, ")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")


@dataclass(frozen=True)
class Number:
    """A plain number.

    Attributes:
        value: without its percent sign.
        percent: whether it has one.
        step: what one more in its last digit would add, zeros at a whole number's end left out; 0 for a fraction.
    """

    value: Fraction
    percent: bool
    step: Fraction

    @property
    def share(self) -> Fraction:
        """The value, of 100 where there is a percent sign."""
        return self.value / 100 if self.percent else self.value

    def same(self, other: Number) -> bool:
        """Whether both are the same number.

        50 % is 0.5, and it is 50 as well: answers in percent come with and without the sign. Below 1 % only the sign
        tells: 0.5 % is not 0.5. A fraction is its decimal to as many digits as computers print, not to fewer.
        """
        step = 0 if self.step and other.step else max(self.step, other.step)
        printed = step < 1 and step <= _PRINTED * abs(self.share)
        if self.share == other.share or (printed and abs(self.share - other.share) < step):
            return True
        return self.percent != other.percent and self.value == other.value and abs(self.value) >= 1


def without_wrappers(text: str) -> str:
    r"""Return `text` with the content of ``\\text{}`` and its kin in place of them."""
    return _WRAPPER.sub(r"\1", text)


def unwrap_text(answer: str) -> str:
    r"""Return ``word`` for an answer that is ``\text{word}`` as a whole, any other unchanged."""
    match = _WRAPPER.fullmatch(answer.strip())
    return match[1] if match else answer


def unit_kind(unit: str) -> str:
    """Return what tells a unit from others with the same number: of an area or a volume, a time's half of the day."""
    if unit in ("am", "pm"):
        return unit
    power = _AREA_OR_VOLUME.search(unit)
    return "" if power is None else "area" if power[1] or power[2] == "2" else "volume"


def read(answer: str, units: bool = True) -> tuple[str, str]:
    r"""Return `answer` as it is judged, normalised, and the unit that was taken off; empty where none was.

    TeX stands in place of other notations, and nothing around it: signs that Unicode has for TeX's become that; ``$``,
    ``**``, ``\mathbf{}`` and their kin around the whole go, and so does ``=`` before it; ``\frac\pi2`` gets its braces;
    ``4.5e33`` and ``x**2`` become powers, ``3 1/2`` a mixed fraction, ``0.\overline{3}`` a fraction, ``1 000`` one
    number. The unit of a time of day is its half: ``am``, ``pm``.

    Args:
        units: take off what stands behind a plain number and does not change it: ``18 dollars``, ``10 km/h``; and words
            set as text behind numbers elsewhere, as in ``3\text{ cm}, 5\text{ cm}``.
    """
    text = _RAISED.sub(lambda raised: f"^{{{unicodedata.normalize('NFKC', raised.group())}}}", answer[:MAX_ANSWER])
    text = text.translate(_SIGNS)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}" if root[1] or root[2] else r"\sqrt", text)
    text = _REPEATING.sub(_fraction_of, _PYTHON_POWER.sub(lambda power: f"^{{{power[2] or power[3]}}}", text))
    text = _FRAC.sub(_braced, _ROW_END.sub(r"\\\\", _DASH.sub(r"\1\2-", text)))
    text = _EMPTY_SET.sub(r"\\emptyset", text)
    text = _without_thousands(_CLOSE_COMMA.sub(",", _THOUSANDS.sub("", text)))
    text = _bare(_SPACING.sub(lambda space: space["row"] or (" " if space["blank"] else ""), text))
    text = _OTHER_THOUSANDS.sub(lambda grouped: re.sub("[ .]", "", grouped.group()), text)
    if time := _TIME.fullmatch(without_wrappers(text)):
        return time[1], f"{time[2]}m".lower() if time[2] else ""
    start, found, behind = _measured(text)
    if found and _value(found) and (not behind or (units and _is_unit(behind))):
        return text[:start] + _spelled(found), behind
    return (_without_units(text) if units else text), ""


def _without_units(text: str) -> str:
    """Return `text` without units that are set as text, and without one at its end."""

    def unit(found: re.Match[str]) -> str:
        words = found[1]
        letters = {name for name in _NAME.findall(words) if len(name) == 1}
        is_other = _CHANGES.search(words) or _JOINS.match(words) or follows_words(found)
        return found.group() if is_other or not (letters <= _LETTER_UNITS and _UNIT.fullmatch(words)) else " "

    def last(found: re.Match[str]) -> str:
        return "" if _is_unit(found[1]) and not follows_words(found) else found.group()

    def follows_words(found: re.Match[str]) -> bool:
        return _ENDS_IN_WORDS.search(found.string[: found.start()]) is not None

    return _LAST_UNIT.sub(last, _TEXT_UNIT.sub(unit, text).rstrip())


def _without_thousands(text: str) -> str:
    r"""Return text without plain commas if each divides a number's thousands, as in ``1,000\pi``, and none a pair."""
    if _OPENING.search(text) or "," in _PLAIN_THOUSANDS.sub("", text):
        return text
    return _PLAIN_THOUSANDS.sub(lambda grouped: grouped.group().replace(",", ""), text)


def number(normal: str) -> Number | None:
    """Return the value of a normalised answer that is a plain number, None for any other."""
    found = _NUMBER.fullmatch(normal) if len(normal) <= _MAX_DIGITS else None
    return _value(found) if found else None


def canonical(answer: str, units: bool = True) -> str:
    r"""Return one spelling for answers that are plainly equal, for voting and for equality without a computer algebra.

    Of the normalised answer, blanks, degree signs and wrappers such as ``\text{}`` go; a number becomes its exact
    value in lowest terms (``+07.50`` -> ``15/2``, ``1,234.0`` -> ``1234``, ``\frac{2}{4}`` -> ``1/2``). A list that
    would be a number without its blanks keeps them: ``10, 100`` is neither ``10,100`` nor ``100, 10``. `units` as in
    `read`.
    """
    return key_of(read(answer, units)[0])


def key_of(normal: str) -> str:
    """Return what `canonical` makes of a normalised answer."""
    plain = number(normal)
    if plain is not None:
        return str(plain.value if abs(plain.value) >= 1 else plain.share)
    text = _NOISE.sub("", without_wrappers(normal)).strip()
    items = [_LOOSE_BLANK.sub("", item) for item in _LISTING_COMMA.split(text)]
    text = ",".join(items).rstrip(".")
    # Of two items that are no number of thousands.
    return ", ".join(items).rstrip(".") if len(items) > 1 and _GROUPED.fullmatch(text) else text


def _braced(fraction: re.Match[str]) -> str:
    first, second = fraction[1], fraction[2]
    return r"\frac" + (f"{{{first}}}" if first else "") + (f"{{{second}}}" if second else "")


def _fraction_of(repeating: re.Match[str]) -> str:
    whole, once, again = repeating.groups()
    top = int(whole + once + again) - int(whole + once or "0")
    return rf"\frac{{{top}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _bare(text: str) -> str:
    """Return `text` without markup and groups around the whole, nor what leads to it, nor a full stop."""
    for _ in range(_LAYERS):
        text = text.strip()
        head, marked = _HEAD.match(text), _MARKED.fullmatch(text)
        if marked:
            text = next(filter(None, marked.groups()))
        elif head:
            text = text[head.end() :]
        elif text.endswith(".") and not text.endswith("..") and not _WORD.search(text):
            text = text[:-1]  # a sentence keeps its full stop, by which math-verify knows it
        else:
            inside = _inside(text)
            if inside is None:
                break
            text = inside
    return text.strip()


def _inside(text: str) -> str | None:
    r"""Return what one group holds that is all of `text`, None where none is.

    Words keep their ``\text{}``; letters such as ``A and C`` become a list.
    """
    opened = _GROUP.match(text)
    if not opened:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, opened.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            inside = text[opened.end() : brace.start()]
            if opened[1] and brace.end() == len(text) and _LETTERS.fullmatch(inside.strip()):
                return re.sub(r",? and ?", ", ", inside)
            words = opened[1] and "\\" not in inside and _WORD.search(inside)
            return inside if brace.end() == len(text) and not words else None
    return None


def _measured(text: str) -> tuple[int, re.Match[str] | None, str]:
    """Return a number, where in `text` it begins, and what follows it, where that is short enough for a unit.

    The number is what `text` begins with, or its last equals sign is followed by: ``x = 1,234``.
    """
    for head in dict.fromkeys(("", text[: text.rfind("=") + 1])):
        last = text[len(head) :].lstrip()
        plain = " ".join(without_wrappers(last).split()) if len(last) <= _MAX_DIGITS + _MAX_UNIT else ""
        found = _NUMBER.match(plain)
        if found and found.end() <= _MAX_DIGITS and len(plain) - found.end() <= _MAX_UNIT:
            behind = plain[found.end() :].strip().removesuffix(".")  # of a sentence, or of "in."
            if "=" not in behind:
                return len(text) - len(last), found, behind
    return 0, None, ""


def _is_unit(behind: str) -> bool:
    if not _UNIT.fullmatch(behind) or _CHANGES.search(behind):
        return False
    if not behind[0].isalpha():
        return True  # degrees
    names = _NAME.findall(_ARTICLE.sub(" ", behind))
    rate = "/" in behind or (len(names) == 1 and re.match(r"m ?\^", behind) is not None)
    if any(n.lower() in ascii_lowercase and len(n) > 1 for n in names):
        return False  # abcd
    return all(len(n) > 3 or n.lower() in _SHORT_UNITS or (rate and n.lower() in _LETTER_UNITS) for n in names)


def _spelled(found: re.Match[str]) -> str:
    """Return a number in TeX, without its currency; one with a word such as million is multiplied."""
    sign, exponent = found["sign"] + (found["late"] or ""), found["e"] or found["ten"] or found["alone"]
    percent, decimal = r"\%" if found["percent"] else "", (found["decimal"] or "").replace(",", "")
    multiplied = _value(found) if found["scale"] else None
    if multiplied:
        parts = multiplied.value.as_integer_ratio()
        return (r"\frac{{{}}}{{{}}}".format(*parts) if parts[1] > 1 else str(parts[0])) + percent
    if exponent:
        mantissa = rf"{decimal}\times " if decimal else ""
        return f"{sign}{mantissa}10^{{{exponent.replace(' ', '').lstrip('+')}}}{percent}"
    if decimal:
        return f"{sign}{decimal}{percent}"
    whole = found["whole"] or found["mixed"] or ""
    top, bottom = found["top"] or found["over"], found["bottom"] or found["digit"] or found["under"]
    return rf"{sign}{whole}\frac{{{top}}}{{{bottom}}}{percent}"


def _value(found: re.Match[str]) -> Number | None:
    """Return the value of a number, None where it has none: divided by 0, or mixed with what is no proper fraction."""
    exponent = int((found["e"] or found["ten"] or found["alone"] or "0").replace(" ", ""))
    if found["decimal"] or found["alone"]:
        text = (found["decimal"] or "1").replace(",", "").rstrip(".")
        value, digits = Fraction(text) * Fraction(10) ** exponent, len(text.partition(".")[2])
        zeros = 0 if digits else len(text) - len(text.rstrip("0"))
        step = Fraction(10) ** (exponent - digits + zeros)
    else:
        texts = found["top"] or found["over"], found["bottom"] or found["digit"] or found["under"]
        top, bottom = (Fraction(text.replace(",", "").rstrip(".")) for text in texts)
        whole = found["whole"] or found["mixed"]
        if bottom == 0 or (whole and not (0 < top < bottom and top.denominator == bottom.denominator == 1)):
            return None
        value, step = int(whole or "0") + top / bottom, Fraction(0)
    negative = (found["sign"] + (found["late"] or "")).count("-") % 2
    factor = SCALES[found["scale"].lower()] if found["scale"] else 1
    return Number((-factor if negative else factor) * value, found["percent"] is not None, factor * step)
