"""Where the final answer of a text stands."""

import time

import pytest

from rewards.math.extraction import boxed_contents, final_answer

CASES = [
    # boxed: the last, nested, escaped, cut off
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed {x}", "x"),
    (r"\fbox{7}", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"a { b \boxed{5} c", "5"),
    (r"} \boxed{5} }", "5"),
    (r"\boxed{3} and \boxed{4", "3"),
    (r"\boxed{}", ""),
    # hashes
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### 7\nno: \n#### 8\n", "8"),
    ("#### $18 dollars", "$18"),
    ("#### **18**", "18"),
    ("#### Step 1\n3 + 4\n#### Result: seven\nThe answer is 7.", "7"),
    ("thus\n#### Friday", "Friday"),
    ("#### Answer: 12", "12"),
    # tag
    ("<answer> 5 </answer>", "5"),
    ("<answer>4</answer> no, <answer>5</answer>", "5"),
    ("<answer>4</answer> no, <answer>5", "4"),
    ("<answer>The answer is 5.</answer>", "5"),
    # words
    ("The answer is 5.", "5"),
    ("The answer is 3. No, the answer is 5!", "5"),
    ("The final answer is: 18 dollars a day.", "18"),
    ("The answer is $18.50.", "$18.50"),
    ("The answer is $18 a day, not $20.", "$18"),
    ("The answer is 1,250,000 people", "1,250,000"),
    ("The answer is 5, because 2 + 3 = 5.", "5"),
    ("The answer is 50%.", "50%"),
    ("The answer is -3.", "-3"),
    ("The answer is 1/2.", "1/2"),
    ("The answer is 4 and 5.", "4 and 5"),
    ("The answer is 4 or 5.", "4 or 5"),
    ("The answer is 4, and 5 too.", "4, and 5 too"),
    ("The answer is 2x + 1.", "2x + 1"),
    (r"The answer is \(\frac{1}{2}\).", r"\frac{1}{2}"),
    ("The answer is $x^2$, as shown.", "x^2"),
    ("Answer:\n\\[ x = 3 \\]", "x = 3"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42", "42"),
    ("The answer to this question is 12.", "12"),
    ("2 + 2 = 4\nA: 4", "4"),
    ("The answer is (B).", "(B)"),
    # order of the kinds
    ("#### 1\n<answer>2</answer> the answer is 3, \\boxed{4}", "4"),
    ("the answer is 3\n#### 1\n<answer>2</answer>", "1"),
    ("the answer is 3, <answer>2</answer>", "2"),
    # reasoning is not searched
    (r"<think>perhaps \boxed{3}</think>The answer is 5", "5"),
    (r"<think>\boxed{3}</think> so it is", None),
    # nothing marked
    ("I get 5", None),
    ("a: first\nb: second", None),
    ("unanswered: 5", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_final_answer(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7, so 7 apples", "7"),
        ("it costs $1,250.50.", "$1,250.50"),
        ("16-3", "3"),
        ("it is -3", "-3"),
        ("about 45%", "45%"),
        ("see x2 and v1.5a", None),
        ("none", None),
        (r"3 then \boxed{4} then 5", "4"),
        ("<think>3</think> none", None),
    ],
)
def test_last_number(text: str, expected: str | None) -> None:
    assert final_answer(text, last_number=True) == expected


def test_boxed_contents_in_order() -> None:
    assert boxed_contents(r"\boxed{a} {\boxed{b}} \boxed{c") == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000,
        r"\boxed{" * 15_000,
        r"\boxed{" * 8_000 + "}" * 8_000,
        "####" * 25_000,
        "answer is " * 10_000,
        "answer to" + " " * 100_000,
        "answer to the " * 7_000,
        "answer" + "*" * 100_000,
        "\n" + " " * 100_000 + "A",
        "<answer>" * 12_000,
        "<think>" * 5_000 + "</think>" * 5_000,
        "answer is " + "1," * 50_000,
        "answer is $" + "1," * 50_000,
        "answer is 5 " + "a " * 50_000,
        "1" * 100_000,
        "1." * 50_000,
        ". " * 50_000,
        "-" * 100_000,
        "\\" * 100_000,
    ],
)
def test_extraction_is_linear(text: str) -> None:
    start = time.process_time()
    final_answer(text, last_number=True)
    # Linear: at most a few hundredths of a second. Quadratic in 100,000 characters: minutes.
    assert time.process_time() - start < 2.0
