"""An answer's text -> a number, a phrase, or LaTeX; and the comparisons that need no algebra."""

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math.extraction import NUMBER

# Longer answers are wrong unasked: no real one comes near, and parsing one costs time.
MAX_LENGTH = 1000
# A fraction equals its decimal when they differ by at most this, relative to values above 1.
TOLERANCE = Fraction(1, 1_000_000)

_TEXT_COMMAND = r"\\(?:text|textbf|textit|textrm|mbox|hbox|mathrm|mathbf|operatorname)\s*"
_TEXT = re.compile(_TEXT_COMMAND + r"\{([^{}]*)\}")
_POWER = r"(?:\s*\^\s*(?:[0-9]|\{\s*[0-9]\s*\}))?"
# A single letter without a space before it is a symbol: 3\mathrm{i}.
_TRAILING_UNIT = re.compile(
    rf"(?<=\S)\s*{_TEXT_COMMAND}\{{(?:\s[^{{}}]*|[^{{}}]{{2,}})\}}{_POWER}$"
)
_WORD_UNIT = rf"(?:[A-Za-z]{{3,}}|cm|mm|km|ft|in|mi|yd|kg|mg|gm|lb|oz|hr)[.]?{_POWER}"
_UNITS = rf"((?:\s+{_WORD_UNIT}(?:\s*[/-]\s*[A-Za-z]+)?)*)"
_PERCENT = r"\s*(%|percent\b|per cent\b)?"
_DECIMAL = re.compile(rf"([-+]?)\s*({NUMBER}|[0-9]+\.){_PERCENT}{_UNITS}")
_FRACTION = re.compile(
    rf"([-+]?)\s*(?:([0-9]+)(?:\s+|(?=\\)))??"
    rf"(?:\\frac\s*\{{\s*(-?{NUMBER})\s*\}}\s*\{{\s*(-?{NUMBER})\s*\}}|({NUMBER})\s*/\s*({NUMBER}))"
    rf"{_PERCENT}{_UNITS}"
)
_BASED = re.compile(r"(?=[A-Z]*[0-9])([0-9A-Z]+)\s*_\s*\{?\s*([0-9]+)\s*\}?")
_CLOCK = re.compile(r"[0-9]{1,2}(?::[0-9]{2}\s*[ap]\.?\s*m?|\s*[ap]\.?\s*m)\.?", re.IGNORECASE)
_CHOICES = re.compile(r"\(?\s*[A-Z]\s*\)?(?:\s*,\s*\(?\s*[A-Z]\s*\)?)*")
_WORD = re.compile(r"[A-Za-z]{3,}")
# Beside these, letters are variables.
_FORMULA_WORDS = re.compile(
    r"sin|cos|tan|cot|sec|csc|log|sqrt|exp|arcsin|arccos|arctan|sinh|cosh|tanh|gcd|lcm|mod"
    r"|infinity|frac",
    re.IGNORECASE,
)
_FORMULA_SIGNS = frozenset("\\+*/^_=<>{}|")

_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
    }
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Thousands separators that are no plain comma: 1,\!000  1{,}000  1\,000
        (r",\s*\\!\s*|\{,\}|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
        (r"\\!", ""),
        (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|°", ""),
        # Not after a backslash: a double one ends a row of a matrix.
        (r"(?<!\\)\\[,;:> ()\[\]]|\\q?quad(?![A-Za-z])|~|\\displaystyle(?![A-Za-z])", " "),
        (r"\\?[$€£¥₹]|^\*\*|\*\*$", " "),
        (r"\\mathrm\s*\{([A-Za-z])\}", r"\1"),
        (r"\\%", "%"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        # Shorthand fractions: \frac12  \frac \pi4  \frac1{2}  \frac{1}2
        (r"\\frac\s*([0-9]|\\[a-z]+)\s*([0-9]|\\[a-z]+)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r",?\s*\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}", ", "),
        (r"(?<=[0-9]),?\s+(?:and|or)\s+(?=[-0-9])", ", "),
    )
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in comparable form. At most one of `number`, `digits` and `phrase` is set."""

    latex: str
    number: Fraction | None = None
    is_percent: bool = False
    is_fraction: bool = False
    digits: tuple[str, str] | None = None  # the digits, the base
    phrase: str | None = None


def read_answer(text: str) -> Answer:
    r"""`text` in comparable form. Currency signs, units and thousands separators are dropped.

    >>> read_answer(r"\$1{,}250.50").number
    Fraction(2501, 2)
    >>> read_answer(r"2\frac{3}{4} \text{ miles}").number
    Fraction(11, 4)
    >>> read_answer(r"\text{(E)}").phrase
    'e'
    """
    if len(text) > MAX_LENGTH:
        return Answer(text)
    tidy = _tidy(text)
    plain = " ".join(_TEXT.sub(r" \1 ", tidy).split()).rstrip(". ")
    if _CLOCK.fullmatch(plain):
        return Answer(tidy, phrase=_fold(plain))
    latex = _TRAILING_UNIT.sub("", tidy)
    number = _read_number(latex) or _read_number(plain)
    if number is not None:
        return number
    based = _BASED.fullmatch(latex)
    if based is not None:
        return Answer(latex, digits=(based[1], based[2]))
    if _is_phrase(tidy, plain):
        return Answer(tidy, phrase=_fold(plain))
    return Answer(latex)


def compare(gold: Answer, answer: Answer) -> bool | None:
    """Whether the two are equal, or None when that takes algebra.

    Numbers are compared exactly, a fraction with a decimal within TOLERANCE. A percent sign may be
    left out (50 for 50%) or worked out (0.5 for 50%). A number in a base may leave the base out.
    Phrases are compared without case, spaces and punctuation.
    """
    if not answer.latex or len(answer.latex) > MAX_LENGTH:
        return False
    if gold.number is not None and answer.number is not None:
        return _numbers_equal(gold, gold.number, answer, answer.number)
    if gold.digits is not None or answer.digits is not None:
        return _digits_equal(gold, answer)
    if gold.phrase is not None or (answer.phrase is not None and gold.number is not None):
        return gold.phrase == answer.phrase
    return True if gold.latex == answer.latex else None


def _numbers_equal(gold: Answer, wanted: Fraction, answer: Answer, value: Fraction) -> bool:
    mixed = gold.is_fraction != answer.is_fraction
    allowed = TOLERANCE * max(Fraction(1), abs(wanted)) if mixed else Fraction(0)
    scales = [Fraction(1)]
    if gold.is_percent != answer.is_percent:
        scales.append(Fraction(1, 100) if answer.is_percent else Fraction(100))
    return any(abs(wanted - scale * value) <= allowed for scale in scales)


def _digits_equal(gold: Answer, answer: Answer) -> bool:
    if gold.digits is not None and answer.digits is not None:
        return gold.digits == answer.digits
    based, other = (gold, answer) if gold.digits is not None else (answer, gold)
    return based.digits is not None and based.digits[0] == re.sub("[, ]", "", other.latex)


def _tidy(text: str) -> str:
    """One line of LaTeX without delimiters, currency, degree signs and spacing commands."""
    text = text.strip().translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(". ")


def _read_number(text: str) -> Answer | None:
    match = _DECIMAL.fullmatch(text)
    if match is not None:
        value = _fraction(match[2])
        value = -value if match[1] == "-" else value
        return Answer(text[: match.start(4)], value, bool(match[3]))
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    below = _fraction(match[4] or match[6])
    if not below:
        return None
    value = int(match[2] or 0) + _fraction(match[3] or match[5]) / below
    value = -value if match[1] == "-" else value
    return Answer(text[: match.start(8)], value, bool(match[7]), is_fraction=True)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))


def _is_phrase(tidy: str, plain: str) -> bool:
    """Words rather than a formula: all inside \\text{}, letters of a choice, or plain words."""
    if not any(character.isalnum() for character in plain):
        return False
    if _TEXT.fullmatch(tidy.strip("() ")) or _CHOICES.fullmatch(plain):
        return True
    words = _WORD.findall(plain)
    is_formula = not _FORMULA_SIGNS.isdisjoint(plain) or any(map(_FORMULA_WORDS.fullmatch, words))
    return bool(words) and not is_formula


def _fold(plain: str) -> str:
    text = re.sub(r"\s*,?\s*\band\b\s*", ",", plain.casefold())
    parts = re.sub(r"[^\w,:]+", "", text).strip(",").split(",")
    # Several choices are a set.
    return ",".join(sorted(parts) if all(len(part) == 1 for part in parts) else parts)
