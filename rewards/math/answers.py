"""An answer's text -> a number, a phrase, or LaTeX; and the comparisons that need no algebra."""

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math.extraction import NUMBER
from rewards.math.tidy import TEXT_COMMAND, tidy
from rewards.math.units import Unit, read_unit
from rewards.math.words import labelled, number_word, phrase, plain_text, time_of_day

# Longer answers are not tried: no real one comes near, and parsing one costs time.
MAX_LENGTH = 1000
# A fraction equals its decimal when they differ by at most this, relative to values above 1.
TOLERANCE = Fraction(1, 1_000_000)

_POWER = r"(?:\s*\^\s*(?:[0-9]|\{\s*[0-9]\s*\}))?"
_ANY_TEXT = rf"{TEXT_COMMAND}\{{[^{{}}]*\}}"
# A single letter without a space before it is a symbol, and so is i anywhere.
_TRAILING_UNIT = re.compile(
    rf"(?<=\S)(?:\s*{TEXT_COMMAND}\{{(\s[^{{}}]*|[^{{}}]{{2,}})\}}({_POWER})"
    rf"|\s+{TEXT_COMMAND}\{{([A-DF-HJ-Za-df-hj-z])\}}({_POWER})"
    rf"|\s*\\frac\s*\{{\s*{_ANY_TEXT}\s*\}}\s*\{{\s*{_ANY_TEXT}\s*\}}"
    rf"|\s*{_ANY_TEXT}\s*/\s*{_ANY_TEXT})$"
)
# Another answer rather than a unit: 5\\text{ or 6}.
_NO_UNIT = re.compile(r"\b(?:or|and)\b|\s[0-9]")
_WORD_UNIT = rf"(?:[A-Za-z]{{3,}}|cm|mm|km|ft|in|mi|yd|kg|mg|gm|lb|oz|hr|mL|ml|sq|cu)[.]?{_POWER}"
_UNITS = rf"((?:\s+{_WORD_UNIT}(?:\s*[/-]\s*[A-Za-z]+)?)*)"
_PERCENT = r"\s*(%|percent(?:age)?\b|per cent\b|pct\b)?"
_SIMPLE = re.compile(r"\$?(-?)\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\.?")
_DECIMAL = re.compile(rf"([-+]?)\s*({NUMBER}|[0-9]+\.){_PERCENT}{_UNITS}")
_FRACTION = re.compile(
    rf"([-+]?)\s*(?:([0-9]+)(?:\s+|\s*(?=\\)))??"
    rf"(?:\\frac\s*\{{\s*([-+]?)({NUMBER})\s*\}}\s*\{{\s*([-+]?)({NUMBER})\s*\}}"
    rf"|({NUMBER})\s*/\s*({NUMBER}))"
    rf"{_PERCENT}{_UNITS}"
)
_BASED = re.compile(r"(-?)\s*\(?([0-9A-Z.]*[0-9][0-9A-Z]*)\)?\s*_\s*\{?\s*([0-9]+)\s*\}?")
_REPEATING = re.compile(
    r"(-?)\s*([0-9]*)\.([0-9]*)\\(?:overline|bar|dot|overline\s)\s*\{?([0-9]+)\}?"
)
# Two numbers side by side are none: "5 6", but not \\log_2 3.
DIGITS_APART = re.compile(r"(?<![_^0-9.])[0-9][0-9.]*\s+\.?[0-9]")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in comparable form. At most one of `number`, `digits` and `phrase` is set."""

    latex: str
    number: Fraction | None = None
    is_percent: bool = False
    is_decimal: bool = False
    unit: Unit | None = None
    digits: tuple[str, str] | None = None  # the digits, the base
    phrase: str | None = None


def read_answer(text: str) -> Answer:
    r"""`text` in comparable form. Currency signs and thousands separators are dropped.

    >>> read_answer(r"\$1{,}250.50").number
    Fraction(2501, 2)
    >>> read_answer(r"2\frac{3}{4} \text{ miles}").number
    Fraction(11, 4)
    >>> read_answer(r"\text{(E)}").phrase
    'e'
    """
    if len(text) > MAX_LENGTH:
        return Answer(text)
    simple = _SIMPLE.fullmatch(text.strip())
    if simple is not None:
        value = _fraction(simple[2])
        return Answer(
            simple[1] + simple[2], -value if simple[1] else value, is_decimal="." in simple[2]
        )
    tidied = tidy(text)
    plain = plain_text(tidied)
    time = time_of_day(plain)
    if time is not None:
        return Answer(tidied, phrase=time)
    latex, unit = _without_unit(tidied)
    number = _read_number(latex, unit) or _read_number(plain, unit)
    if number is None and latex.startswith("("):
        number = _read_number(latex.strip("() "), unit)
    if number is not None:
        return number
    based = _BASED.fullmatch(latex)
    if based is not None:
        return Answer(latex, digits=(based[1] + based[2], based[3]))
    word = number_word(plain)
    if word is not None:
        return Answer(latex, Fraction(word))
    words = phrase(tidied, plain)
    if words is not None:
        return Answer(tidied, phrase=words)
    return Answer(latex, unit=unit)


def compare(gold: Answer, answer: Answer) -> bool | None:
    """Whether the two are equal, or None when that takes algebra.

    Numbers are compared exactly, a fraction with a decimal within TOLERANCE. A percent sign may be
    left out (50 for 50%) or worked out (0.5 for 50%). A number in a base may leave the base out.
    Phrases are compared without case, spaces and punctuation; a choice by its letter.
    """
    if not answer.latex or len(answer.latex) > MAX_LENGTH:
        return False
    if gold.number is not None and answer.number is not None:
        return _numbers_equal(gold, gold.number, answer, answer.number)
    if gold.digits is not None or answer.digits is not None:
        return _digits_equal(gold, answer)
    by_letter = _choices_equal(gold, answer)
    if by_letter is not None:
        return by_letter
    if gold.phrase is not None or answer.phrase is not None:
        return _as_phrase(gold) == _as_phrase(answer)
    if gold.latex.replace(" ", "") == answer.latex.replace(" ", ""):
        return True
    return None


def _numbers_equal(gold: Answer, wanted: Fraction, answer: Answer, value: Fraction) -> bool:
    if gold.unit is not None and answer.unit is not None:
        if gold.unit[:2] != answer.unit[:2]:
            return False
        wanted, value = wanted * gold.unit[2], value * answer.unit[2]
    mixed = gold.is_decimal != answer.is_decimal and 1 not in (
        wanted.denominator,
        value.denominator,
    )
    allowed = TOLERANCE * max(Fraction(1), abs(wanted)) if mixed else Fraction(0)
    scales = [Fraction(1)]
    if gold.is_percent != answer.is_percent:
        scales.append(Fraction(1, 100) if answer.is_percent else Fraction(100))
    return any(abs(wanted - scale * value) <= allowed for scale in scales)


def _digits_equal(gold: Answer, answer: Answer) -> bool | None:
    if gold.digits is not None and answer.digits is not None:
        return gold.digits == answer.digits
    based, other = (gold, answer) if gold.digits is not None else (answer, gold)
    if based.digits is not None and based.digits[0] == re.sub("[, ]", "", other.latex):
        return True
    return None if "_" in other.latex else False


def _choices_equal(gold: Answer, answer: Answer) -> bool | None:
    """The verdict on the letter of a choice; None where it is not about one."""
    stated = labelled(plain_text(answer.latex))
    if stated is None:
        return None
    wanted = labelled(plain_text(gold.latex))
    if wanted is not None and (gold.phrase == wanted[0] or wanted[1]):
        return wanted[0] == stated[0]
    # The gold may be the text of the option.
    return compare(gold, read_answer(stated[1])) or None if stated[1] else None


def _as_phrase(answer: Answer) -> str:
    """A phrase, or a formula read as one: \\text{VW} may be VW."""
    if answer.phrase is not None:
        return answer.phrase
    letters = answer.latex.replace(" ", "")
    # A single letter is a variable, whose case counts.
    return letters.casefold() if len(letters) > 1 else ""


def _without_unit(latex: str) -> tuple[str, Unit | None]:
    match = _TRAILING_UNIT.search(latex)
    if match is None:
        return latex, None
    name, power = match[1] or match[3] or "", match[2] or match[4] or ""
    if _NO_UNIT.search(name):
        return latex, None
    return latex[: match.start()], read_unit(name.strip() + power)


def _read_number(text: str, unit: Unit | None) -> Answer | None:
    match = _DECIMAL.fullmatch(text)
    if match is not None:
        value = _fraction(match[2])
        value = -value if match[1] == "-" else value
        latex, unit = text[: match.start(4)], unit or read_unit(match[4])
        return Answer(latex, value, bool(match[3]), "." in match[2], unit)
    match = _REPEATING.fullmatch(text)
    if match is not None:
        fixed = Fraction(int(match[2] + match[3] or 0), 10 ** len(match[3]))
        cycle = Fraction(int(match[4]), (10 ** len(match[4]) - 1) * 10 ** len(match[3]))
        value = fixed + cycle
        return Answer(text, -value if match[1] else value, unit=unit)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    below = _fraction(match[6] or match[8])
    signs = [match[1], match[3], match[5]]
    if not below or (match[2] and (match[3] or match[5])):
        return None
    value = int(match[2] or 0) + _fraction(match[4] or match[7]) / below
    value = -value if signs.count("-") % 2 else value
    latex, unit = text[: match.start(10)], unit or read_unit(match[10])
    is_decimal = any("." in (part or "") for part in match.group(4, 6, 7, 8))
    return Answer(latex, value, bool(match[9]), is_decimal, unit)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))
