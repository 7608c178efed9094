"""Units of measure: which quantity they measure and how large they are."""

import re
from fractions import Fraction

# The metre, kilogram, second, litre, cent and degree are 1.
_SIZES: tuple[tuple[str, Fraction, str], ...] = (
    ("length", Fraction(1), "m meter meters metre metres"),
    ("length", Fraction(1, 100), "cm centimeter centimeters centimetre centimetres"),
    ("length", Fraction(1, 1000), "mm millimeter millimeters millimetre millimetres"),
    ("length", Fraction(1000), "km kilometer kilometers kilometre kilometres"),
    ("length", Fraction("0.0254"), "in inch inches"),
    ("length", Fraction("0.3048"), "ft foot feet"),
    ("length", Fraction("0.9144"), "yd yard yards"),
    ("length", Fraction("1609.344"), "mi mile miles"),
    ("mass", Fraction(1), "kg kilogram kilograms"),
    ("mass", Fraction(1, 1000), "g gram grams"),
    ("mass", Fraction("0.45359237"), "lb lbs pound pounds"),
    ("mass", Fraction("0.45359237") / 16, "oz ounce ounces"),
    ("time", Fraction(1), "s sec secs second seconds"),
    ("time", Fraction(60), "min mins minute minutes"),
    ("time", Fraction(3600), "h hr hrs hour hours"),
    ("time", Fraction(86400), "day days"),
    ("time", Fraction(604800), "week weeks"),
    ("volume", Fraction(1), "l L liter liters litre litres"),
    ("volume", Fraction(1, 1000), "ml mL milliliter milliliters millilitre millilitres"),
    ("money", Fraction(1), "cent cents"),
    ("money", Fraction(100), "dollar dollars usd USD"),
)
_UNITS = {name: (quantity, size) for quantity, size, names in _SIZES for name in names.split()}
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_UNIT = re.compile(
    r"(?:(square|sq|cubic|cu)\.?\s+)?([A-Za-z]+)\.?(?:\s*\^\s*\{?\s*([0-9])\s*\}?)?", re.IGNORECASE
)

Unit = tuple[str, int, Fraction]


def read_unit(text: str) -> Unit | None:
    """The quantity, power and size of a unit; None for anything that is not in the table.

    >>> read_unit("square inches") == read_unit("in^2")
    True
    """
    match = _UNIT.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        return None
    quantity, size = _UNITS[match[2]]
    power = _POWER_WORDS.get((match[1] or "").lower()) or int(match[3] or 1)
    return quantity, power, size**power
