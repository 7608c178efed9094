"""What holds for all numbers, lists and texts (Hypothesis)."""

import functools
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.math import algebra
from rewards.math.answers import compare, read_answer
from rewards.math.judging import equal, readable
from rewards.math.structure import TooDeepError, read_structure
from rewards.math.tidy import tidy
from rewards.math.words import labelled, phrase, plain_text, time_of_day

# No deadlines: the first formulas fill the parser's tables, and the machine may be busy.
patient = functools.partial(settings, deadline=None, derandomize=True)

integers = st.integers(min_value=-(10**12), max_value=10**12)
fractions = st.fractions(-(10**6), 10**6, max_denominator=10**4).filter(
    lambda value: value.denominator > 1
)
words = r"\frac \sqrt \text{ \pm \cup \infty \begin{pmatrix} \end{pmatrix} \\ \le \in \{ \} \left("
signs = st.sampled_from([*r"7x{}$\^_&,=%/-+()[]:.!|<> ", *words.split()])
texts = st.one_of(st.text(max_size=60), st.lists(signs, max_size=15).map("".join))


def verdict(gold: str, answer: str) -> bool:
    quick = compare(read_answer(gold), read_answer(answer))
    return equal(gold, answer) if quick is None else quick


def integer_forms(value: int) -> list[str]:
    return [
        str(value),
        f"{value:,}",
        f"{value:,}".replace(",", "{,}"),
        f"{value:,}".replace(",", r",\!"),
        f"{value}.0",
        f"${value}$",
        rf"\${value}",
        rf"{value} \text{{ cm}}",
        rf"{value}^\circ",
        rf"x = {value}",
        rf"\frac{{{2 * value}}}{{2}}",
        rf"\text{{{value}}}",
        f"{value}.",
    ]


@patient(max_examples=60)
@given(value=integers, data=st.data())
def test_an_integer_in_any_two_forms_is_equal(value: int, data: st.DataObject) -> None:
    gold = data.draw(st.sampled_from(integer_forms(value)))
    answer = data.draw(st.sampled_from(integer_forms(value)))
    assert verdict(gold, answer)


@patient(max_examples=60)
@given(value=integers, other=integers, data=st.data())
def test_two_integers_are_equal_in_no_form(value: int, other: int, data: st.DataObject) -> None:
    if value == other:
        other += 1
    gold = data.draw(st.sampled_from(integer_forms(value)))
    answer = data.draw(st.sampled_from(integer_forms(other)))
    assert not verdict(gold, answer)


def fraction_forms(value: Fraction) -> list[str]:
    top, below = value.numerator, value.denominator
    sign, whole, rest = "-" if top < 0 else "", abs(top) // below, abs(top) % below
    mixed = [rf"{sign}{whole}\frac{{{rest}}}{{{below}}}", f"{sign}{whole} {rest}/{below}"]
    return [
        f"{top}/{below}",
        rf"\frac{{{top}}}{{{below}}}",
        rf"\dfrac{{{3 * top}}}{{{3 * below}}}",
        rf"\frac{{{-top}}}{{{-below}}}",
        rf"{sign}\tfrac{{{abs(top)}}}{{{below}}}",
        *(mixed if whole else []),
        rf"\left( \frac{{{top}}}{{{below}}} \right)",
    ]


@patient(max_examples=60)
@given(value=fractions, data=st.data())
def test_a_fraction_in_any_two_forms_is_equal(value: Fraction, data: st.DataObject) -> None:
    gold = data.draw(st.sampled_from(fraction_forms(value)))
    answer = data.draw(st.sampled_from(fraction_forms(value)))
    assert verdict(gold, answer)
    assert verdict(gold, f"{float(value):.12f}")


@patient(max_examples=60)
@given(value=fractions, step=st.fractions(min_value=Fraction(1, 100), max_value=1), data=st.data())
def test_another_fraction_is_equal_in_no_form(
    value: Fraction, step: Fraction, data: st.DataObject
) -> None:
    other = value + step
    gold = data.draw(st.sampled_from(fraction_forms(value)))
    assert not verdict(gold, rf"\frac{{{other.numerator}}}{{{other.denominator}}}")
    # Relative to its size, more than the tolerance away.
    assert not verdict(gold, f"{float(value) * 1.001 + 0.001:.12f}")


@patient(max_examples=50)
@given(values=st.lists(integers, min_size=2, max_size=5, unique=True), data=st.data())
def test_the_order_counts_in_tuples_alone(values: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(values))
    first, second = (", ".join(map(str, order)) for order in (values, shuffled))
    assert verdict(first, second)
    assert verdict(rf"\{{{first}\}}", rf"\{{{second}\}}")
    assert verdict(f"({first})", f"({second})") == (values == shuffled)
    assert not verdict(first, f"{second}, {max(values) + 1}")
    assert not verdict(f"({first})", f"({second}, {max(values) + 1})")


@patient(max_examples=15)
@given(roots=st.tuples(*[st.integers(-99, 99)] * 3), error=st.integers(1, 5))
def test_a_product_equals_what_it_expands_to(roots: tuple[int, int, int], error: int) -> None:
    a, b, c = roots
    product = f"(x - ({a}))(x - ({b}))({c} - x)".replace("- (-", "+ (")
    expanded = f"-x^3 + ({a + b + c}) x^2 - ({a * b + b * c + a * c}) x + ({a * b * c}"
    assert verdict(product, f"{expanded})")
    assert not verdict(product, f"{expanded} + {error})")


@patient(max_examples=200)
@given(text=texts)
def test_any_text_is_read_or_refused(text: str) -> None:
    tidied = tidy(text)
    assert "\n" not in tidied
    plain = plain_text(tidied)
    for words in (phrase(tidied, plain), time_of_day(plain), labelled(plain)):
        assert words is None or isinstance(words, str | tuple)
    try:
        structure = read_structure(tidied)
    except TooDeepError:
        return
    assert structure is not None


@patient(max_examples=100)
@given(gold=texts, answer=texts)
def test_any_two_texts_are_equal_or_not(gold: str, answer: str) -> None:
    try:
        read = readable(gold)
        outcome = verdict(gold, answer)
    except (TooDeepError, algebra.TooLargeError):
        return
    assert read in (True, False)
    assert outcome in (True, False)
