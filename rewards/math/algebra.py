"""Values in LaTeX -> sympy, and whether two of them are equal. Only the worker imports this.

Equality is decided by numbers: exact rationals exactly, everything else at 50 digits, and expressions with
variables at several points (two different analytic expressions agree at none of them, but for chance).
"""

import functools
import itertools
import math
import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    latex2sympy,
)
from sympy.core.function import AppliedUndef

from rewards.math.answers import DIGITS_APART

DIGITS = 50
EXACT = sympy.Float("1e-30", DIGITS)
# As answers.TOLERANCE: where one side has decimals and the other has none.
APPROXIMATE = sympy.Float("1e-6", DIGITS)
# Numbers with more digits are not computed.
MAX_DIGITS = 20_000

_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)
_MEANING = ConversionConfig(lowercase_symbols=False)
_DECIMAL = re.compile(r"[0-9]*\.[0-9]+")
_NOT_A_VALUE = re.compile(DIGITS_APART.pattern + r"|^[*/^_=<>]|\.\.\.|\\l?dots|\\cdots")


class UnreadableError(ValueError):
    """The text is no formula."""


class TooLargeError(ArithmeticError):
    """Evaluating the formula would take numbers of more than MAX_DIGITS digits."""


@functools.lru_cache(maxsize=512)
def parse(latex: str) -> Any:
    r"""The sympy expression of a value. Raises UnreadableError and TooLargeError.

    >>> parse(r"\frac{x}{2}")
    x/2
    """
    if not latex.strip() or _NOT_A_VALUE.search(latex):
        raise UnreadableError(f"{latex!r:.80} is no formula")
    # Exact decimals: 2.5 is 25/10, and tolerance is for the comparison alone.
    exact = _DECIMAL.sub(lambda match: _as_fraction(match.group()), latex)
    try:
        parsed = latex2sympy(
            exact, is_real=None, normalization_config=_SPELLING, conversion_config=_MEANING
        )
    except (RecursionError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableError(f"{latex!r:.80} is no formula: {error!s:.80}") from None
    if not isinstance(parsed, sympy.Expr | sympy.MatrixBase):
        raise UnreadableError(f"{latex!r:.80} is no single value")
    _check_size(parsed)
    functions = parsed.atoms(AppliedUndef)
    names = {call: sympy.Symbol(str(call)) for call in functions}
    value = (
        parsed.subs({**names, sympy.Symbol("i"): sympy.I}) if names or _has_i(parsed) else parsed
    )
    value = value.doit()
    if value.has(sympy.nan, sympy.zoo):
        raise UnreadableError(f"{latex!r:.80} has no value")
    return value


def equal(gold: str, answer: str) -> bool:
    r"""Whether two values in LaTeX are equal.

    >>> equal(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), equal("x+1", "x-1")
    (True, False)
    """
    return same(parse(gold), parse(answer), tolerance=tolerance(gold, answer))


def rational(value: Fraction) -> sympy.Rational:
    """A fraction as sympy's."""
    return sympy.Rational(value.numerator, value.denominator)


def tolerance(gold: str, answer: str) -> sympy.Float:
    """APPROXIMATE when just one of the two has decimals, else EXACT."""
    mixed = bool(_DECIMAL.search(gold)) != bool(_DECIMAL.search(answer))
    return APPROXIMATE if mixed else EXACT


def same(a: Any, b: Any, tolerance: sympy.Float = EXACT) -> bool:
    """Whether two sympy values are equal within `tolerance`, relative above 1."""
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return (
            isinstance(a, sympy.MatrixBase)
            and isinstance(b, sympy.MatrixBase)
            and a.shape == b.shape
            and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
        )
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        # A decimal for an integer is a different number, not a rounded one.
        exact = tolerance == EXACT or (tolerance == APPROXIMATE and 1 in (a.q, b.q))
        return bool(not exact and abs(a - b) <= tolerance * max(1, abs(a)))
    if a.is_infinite or b.is_infinite:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _close(_number(a), _number(b), tolerance) and _vanishes(a - b, tolerance)
    return _agree_at_points(a, b, symbols, tolerance)


def proportional(a: Any, b: Any, *, positive: bool = False) -> bool:
    """Whether a = c b with a constant c other than 0: then a = 0 and b = 0 say the same.

    With `positive`, c > 0: then a > 0 and b > 0 say the same.
    """
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols or a.free_symbols != b.free_symbols:
        return bool(not symbols and same(a, b))
    point = _points(symbols)[0]
    at_a, at_b = _number(a, point), _number(b, point)
    if at_a is None or at_b is None or not at_a or not at_b:
        return False
    if positive and not (at_a / at_b).is_positive:
        return False
    return _agree_at_points(a * at_b, b * at_a, symbols, EXACT)


def _agree_at_points(a: Any, b: Any, symbols: list[Any], tolerance: sympy.Float) -> bool:
    agreed = 0
    for point in _points(symbols):
        at_a, at_b = _number(a, point), _number(b, point)
        if at_a is None or at_b is None:
            continue
        if not _close(at_a, at_b, tolerance):
            # Beyond the positive numbers roots and logarithms have several conventions.
            if all(value > 0 for value in point.values()) or (at_a.is_real and at_b.is_real):
                return False
            continue
        agreed += 1
    return agreed >= 2 or (agreed == 0 and bool(sympy.simplify(a - b) == 0))


def _points(symbols: list[Any]) -> list[dict[Any, Any]]:
    """Values for the symbols: below 1, above 1, far from 0, below 0, and of mixed sign."""
    primes = itertools.count(2)
    near = [sympy.Rational(sympy.prime(next(primes)), 97) for _ in symbols]
    above = [sympy.Rational(sympy.prime(next(primes) + 40), 83) for _ in symbols]
    far = [60 * x for x in above]
    mixed = [x if n % 2 else -x for n, x in enumerate(above)]
    points = [near, above, far, [-x for x in near], mixed]
    return [dict(zip(symbols, values, strict=True)) for values in points]


def _number(value: Any, point: dict[Any, Any] | None = None) -> Any:
    """`value` at `point` as a number of DIGITS digits, None where it has none."""
    number = value.evalf(DIGITS, subs=point or {}, maxn=4 * DIGITS)
    # Sums, integrals and functions that numbers alone do not make numeric.
    if not number.is_number:
        number = value.subs(point or {}).doit().evalf(DIGITS)
    if not number.is_number or number.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    return number


def _close(a: Any, b: Any, tolerance: sympy.Float) -> bool:
    if a is None or b is None:
        return False
    scale = max(sympy.Float(1), abs(a).evalf(), abs(b).evalf())
    difference = abs(a - b).evalf()
    return bool(difference <= tolerance * scale)


def _vanishes(difference: Any, tolerance: sympy.Float) -> bool:
    """For exact values, that even the difference is nothing: 2^2005 + 1 is not 2^2005 + sqrt(1.1)."""
    if tolerance != EXACT:
        return True
    left = difference.evalf(DIGITS, maxn=20 * DIGITS)
    return bool(abs(left) < EXACT)


def _as_fraction(digits: str) -> str:
    value = Fraction(digits)
    return (
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        if value.denominator > 1
        else str(value)
    )


def _has_i(value: Any) -> bool:
    return sympy.Symbol("i") in value.free_symbols


def _check_size(value: Any) -> None:
    """Raise TooLargeError where evaluation would make a number of more than MAX_DIGITS digits."""
    for part in sympy.preorder_traversal(value):
        if isinstance(part, sympy.Pow):
            base, exponent = _logarithm(part.base), _magnitude(part.exp)
            if abs(base) * exponent > MAX_DIGITS:
                raise TooLargeError("a power is too large to compute")
        elif isinstance(part, sympy.factorial | sympy.factorial2 | sympy.gamma):
            size = _magnitude(part.args[0])
            if size > 2 and size * math.log10(size) > MAX_DIGITS:
                raise TooLargeError("a factorial is too large to compute")


def _magnitude(value: Any) -> float:
    """At least |value| of a number, as far as a float goes; 1 for a symbol."""
    if value.is_Number:
        return min(abs(float(value)), 1e300) if value.is_finite else 1.0
    if isinstance(value, sympy.Pow):
        power = abs(_logarithm(value.base)) * _magnitude(value.exp)
        return 10.0 ** min(power, 300.0)
    if isinstance(value, sympy.factorial):
        size = min(_magnitude(value.args[0]), 1e300)
        return 10.0 ** min(size * math.log10(size + 1), 300.0)
    parts = [_magnitude(part) for part in value.args]
    if isinstance(value, sympy.Mul):
        return min(math.prod(parts), 1e300)
    return min(max(1.0, sum(parts)), 1e300)


def _logarithm(base: Any) -> float:
    """The decimal logarithm of |base|, 0 for symbols."""
    if base.is_Rational and base:
        return math.log10(abs(base.p)) - math.log10(base.q)
    size = _magnitude(base)
    return math.log10(size) if size > 1 else 0.0
