"""Answers in words: phrases, letters of a choice, times of day, number words."""

import re

from rewards.math.tidy import TEXT_COMMAND

_TEXT = re.compile(TEXT_COMMAND + r"\{([^{}]*)\}")
_CLOCK = re.compile(r"([0-9]{1,2})(:[0-9]{2})?\s*([ap])\.?\s*(m?)\.?", re.IGNORECASE)
_BARE_CLOCK = re.compile(r"[0-9]{1,2}:0[0-9]")
_CHOICES = re.compile(r"\(?\s*[A-Z]\s*\)?(?:\s*,\s*\(?\s*[A-Z]\s*\)?)*")
# "(C)", "C)", "C.", "option C", and with the text of the option behind: "(C) 42".
_LABEL = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])(?=[).:]|$))[).:]?\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
# Another answer behind the first: "(C) or (D)", "(C) and 5".
_SECOND = re.compile(r"\b[A-J]\b|^(?:and|or)\b|^,")
_WORD = re.compile(r"[A-Za-z]{3,}")
# Beside these, letters are variables.
_FORMULA_WORDS = re.compile(
    r"sin|cos|tan|cot|sec|csc|log|sqrt|exp|arcsin|arccos|arctan|sinh|cosh|tanh|gcd|lcm|mod|max|min"
    r"|infinity|frac",
    re.IGNORECASE,
)
_FORMULA_SIGNS = frozenset("\\+*/^_=<>{}|")
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=[a-z]{3})")
_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBERS = {
    **{word: value for value, word in enumerate(_SMALL)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
    **{
        f"{ten}-{one}": 10 * value + unit
        for value, ten in enumerate(_TENS, 2)
        for unit, one in enumerate(_SMALL[1:10], 1)
    },
    "hundred": 100,
    "one hundred": 100,
}


def plain_text(latex: str) -> str:
    r"""LaTeX without the commands around text.

    >>> plain_text(r"4:30 \text{ p.m.}")
    '4:30 p.m'
    """
    return " ".join(_TEXT.sub(r" \1 ", latex).split()).rstrip(". ")


def number_word(plain: str) -> int | None:
    """The value of a number word up to one hundred, or None."""
    return _NUMBERS.get(plain.casefold())


def time_of_day(plain: str) -> str | None:
    """A time such as 4:30 p.m., 9 am or 12:00 in one spelling; None for anything else.

    Without "am" or "pm", 4:30 is a ratio; 4:05 is not.
    """
    clock = _CLOCK.fullmatch(plain)
    if clock is None:
        return plain if _BARE_CLOCK.fullmatch(plain) else None
    minutes = "" if clock[2] == ":00" else clock[2] or ""
    return f"{int(clock[1])}{minutes}{clock[3]}{clock[4]}".casefold()


def phrase(latex: str, plain: str) -> str | None:
    r"""The answer in words, folded for comparison; None when it is a formula.

    Case, punctuation, spaces and a leading article do not count; several choices are a set.

    >>> phrase(r"\text{(C), (A)}", "(C), (A)")
    'a,c'
    """
    if not any(character.isalnum() for character in plain):
        return None
    if _TEXT.fullmatch(latex.strip("() ")) or _CHOICES.fullmatch(plain.strip("\\{} ")):
        return _fold(plain)
    words = _WORD.findall(plain)
    is_formula = not _FORMULA_SIGNS.isdisjoint(plain) or any(map(_FORMULA_WORDS.fullmatch, words))
    return _fold(plain) if words and not is_formula else None


def labelled(plain: str) -> tuple[str, str] | None:
    """The letter of a choice, folded, and what follows it; None without, or with several letters.

    >>> labelled("(C) 42")
    ('c', '42')
    """
    match = _LABEL.fullmatch(plain)
    if match is None or _SECOND.search(match[3]):
        return None
    return (match[1] or match[2]).casefold(), match[3].strip()


def _fold(plain: str) -> str:
    text = _ARTICLE.sub("", plain.casefold())
    text = re.sub(r"\s*,?\s*\band\b\s*", ",", text)
    parts = re.sub(r"[^\w,:]+", "", text).strip(",").split(",")
    return ",".join(sorted(parts) if all(len(part) == 1 for part in parts) else parts)
