r"""LaTeX as models and data sets write it -> one spelling of it.

Only spelling changes here: delimiters, sizes, spaces, shorthand, Unicode signs, thousands separators,
currency and degree signs. Every rewrite is linear in the length of the text.
"""

import re

_DELETED = dict.fromkeys(
    # Invisible: zero-width characters, direction marks, byte-order mark, control characters.
    [
        *range(9),
        *range(14, 32),
        *range(8203, 8208),
        *range(8234, 8239),
        *range(8288, 8304),
        173,
        65279,
    ]
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{FRACTION SLASH}": "/",
    "\N{DIVISION SLASH}": "/",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{GREEK SMALL LETTER THETA}": r"\theta ",
    "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "\N{GREEK SMALL LETTER BETA}": r"\beta ",
    "\N{INFINITY}": r"\infty ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{VULGAR FRACTION ONE HALF}": " 1/2",
    "\N{VULGAR FRACTION ONE QUARTER}": " 1/4",
    "\N{VULGAR FRACTION THREE QUARTERS}": " 3/4",
    "\N{VULGAR FRACTION ONE THIRD}": " 1/3",
    "\N{VULGAR FRACTION TWO THIRDS}": " 2/3",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{IDEOGRAPHIC FULL STOP}": ".",
    "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    **{sign: f"^{{{power}}}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}
_CHARACTERS = str.maketrans({**_DELETED, **_FULL_WIDTH, **_SIGNS})

_END = r"(?![A-Za-z])"
TEXT_COMMAND = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|operatorname)\s*"
)
_DEGREE = rf"(?:\^\s*(?:\\circ{_END}|\{{\s*\\circ\s*\}})|\\degree{_END})"
_DEGREES = re.compile(rf"\s*{_DEGREE}")
_ANGLE = re.compile(rf"([0-9.]+|\b[a-z]\b|\\[a-z]+)\s*{_DEGREE}")
_BRACED = re.compile(r"\{([^{},]*(?:\{[^{}]*\}[^{},]*)*)\}")
# One degree, as a factor.
DEGREES = r"\cdot \frac{\pi}{180} "
# Not an ellipsis.
_END_OF_SENTENCE = re.compile(r"(?<![.\s])\s*(?:\.{1,2}|[,;]+)$")
_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def _compiled(*rewrites: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rewrites)


_REWRITES = _compiled(
    (r"\\(?:left|right)\s*\.", ""),
    (rf"\\(?:left|right|middle|[bB]igg?[lrm]?){_END}", ""),
    (rf"\\lbrace{_END}", r"\\{"),
    (rf"\\rbrace{_END}", r"\\}"),
    (rf"\\lbrack{_END}", "["),
    (rf"\\rbrack{_END}", "]"),
    (rf"\\langle{_END}", "("),
    (rf"\\rangle{_END}", ")"),
    # Thousands separators that are no plain comma: 1,\!000  1{,}000  1\,000  1 000
    (r"(?<=[0-9])(?:\s?,\s?\\!\s?|\s?\{\s?,\s?\}\s?|\\[,;: ])(?=[0-9]{3}(?![0-9]))", ""),
    (r"\{,\}", ","),
    (r"\\!", ""),
    (r"(?<!\\)\\$", ""),
    # Not after a backslash: a double one ends a row of a matrix.
    (r"(?<!\\)\\[,;:> ()\[\]]|(?<!\\)\\\n", " "),
    (rf"\\(?:q?quad|displaystyle|textstyle|limits|nolimits|hfill|,){_END}|~", " "),
    (r"\\?[$€£¥₹]|^\*\*|\*\*$", " "),
    # A single letter in upright type is a symbol (3\mathrm{i}), and a unit after a space.
    (r"(?<!\s)\\mathrm\s*\{([A-Za-z])\}|\\mathrm\s*\{([ei])\}", r"\1\2"),
    (
        r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|ensuremath|underline|boxed)\s*\{([^{}]*)\}",
        r"{\1}",
    ),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (rf"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it){_END}", ""),
    # A segment by its ends; a bar over digits is a repeating decimal.
    (r"\\(?:overline|overrightarrow|overleftrightarrow|widehat)\s*\{([A-Z]{2,})\}", r"\1"),
    (r"\\%", "%"),
    (rf"\\(?:[dtc]frac|nicefrac|sfrac){_END}", r"\\frac"),
    (rf"\\leq?(?:slant)?{_END}|<=|≤", r"\\le "),
    (rf"\\geq?(?:slant)?{_END}|>=", r"\\ge "),
    (rf"\\neq?{_END}|\\not\s*=|!=", r"\\ne "),
    (rf"\\(?:approx|doteq|simeq|thickapprox){_END}|≈", r"\\approx "),
    # A sign before the only value.
    (r"^\s*(?:=|\\approx)\s*", ""),
    (rf"\\lt{_END}", "<"),
    (rf"\\gt{_END}", ">"),
    (rf"\\colon{_END}", ":"),
    (rf"\\(?:backslash|smallsetminus){_END}", r"\\setminus "),
    (rf"\\(?:varnothing){_END}", r"\\emptyset "),
    (rf"(?:{TEXT_COMMAND}\{{\s*)?\b[Aa]ll real(?: number)?s\b(?:\s*\}})?", r"\\Reals "),
    (r"\\(?:mathbb\s*\{?\s*R\s*\}?|R(?![A-Za-z]))", r"\\Reals "),
    # Plain-text spellings: √15  sqrt(2)  pi  infinity  x**2
    (r"√\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt "),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt(?=\s*[0-9{])", r"\\sqrt "),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\*\*", "^"),
    # Shorthand: \frac12  \frac \pi4  \frac1{2}  \frac{1}2  \sqrt2  \sqrt(2)
    (r"\\frac\s*([0-9a-zA-Z]|\\[a-z]+)\s*([0-9a-zA-Z]|\\[a-z]+)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([0-9a-zA-Z])\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([0-9a-zA-Z]|\\[a-z]+)", r"\\sqrt{\1}"),
    # Words between several answers.
    (rf",?\s*{TEXT_COMMAND}\{{\s*,?\s*(?:and|or)\s*\}}", ", "),
    (r"(?<=[0-9)}\]]),?\s+(?:and|or)\s+(?=[-+0-9(\[\\]|[a-z]\s*=)", ", "),
)


def tidy(text: str) -> str:
    r"""One line of LaTeX in one spelling.

    >>> tidy(r"$\left(1{,}000 ,\ \dfrac12\right)$.")
    '(1000 , \\frac{1}{2})'
    """
    text = text.strip().translate(_CHARACTERS)
    # In a sine the unit of an angle counts; elsewhere it is left out as other units are.
    if _TRIGONOMETRY.search(text):
        text = _ANGLE.sub(lambda match: f"({match[1]}{DEGREES})", text)
    text = _DEGREES.sub(" ", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _END_OF_SENTENCE.sub("", " ".join(text.split())).lstrip(": ")
    braced = _BRACED.fullmatch(text)
    return text if braced is None else braced[1]
