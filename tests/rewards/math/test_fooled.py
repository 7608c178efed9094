"""What a policy might try for a reward without knowing the answer, and what is decided on each."""

import pytest

from rewards import load

GOLD = "17"
WRONG = {
    "every number boxed": "".join(rf"\boxed{{{n}}} " for n in range(100)),
    "every number boxed, with words": " or ".join(rf"\boxed{{{n}}}" for n in range(100)),
    "every number boxed, a line each": "\n".join(rf"$\boxed{{{n}}}$" for n in range(100)),
    "two boxes, one right": r"It is \boxed{16} or \boxed{17}.",
    "two boxes, the other way round": r"It is $\boxed{17}$ or $\boxed{16}$.",
    "two names boxed": r"$x = \boxed{16}$ and $y = \boxed{17}$",
    "the right box first, another last": r"First \boxed{17}. On reflection it must be \boxed{16}.",
    "a list in a box": r"\boxed{15, 16, 17, 18}",
    "a set in a box": r"\boxed{\{15, 16, 17, 18\}}",
    "words in a box": r"\boxed{16 \text{ or } 17}",
    "right first, then another": r"\boxed{17 \text{ or } 16}",
    "another inside the text": r"\boxed{17\text{ or 16}}",
    "an interval": r"\boxed{[16, 18]}",
    "an inequality": r"\boxed{x > 16}",
    "a plus-minus": r"\boxed{16 \pm 1}",
    "an equation that is false": r"\boxed{16 = 17}",
    "a chain of equations": r"\boxed{15 = 16 = 17}",
    "a name with two values": r"\boxed{x = 16 = 17}",
    "an unfounded rounding": r"\boxed{16 \approx 17}",
    "digits apart": r"\boxed{1 6 1 7}",
    "hashes with a list": "#### 15, 16, 17, 18",
    "hashes with words": "#### 16 or 17",
    "hashes with no sign between": "#### 16 17",
    "tag with a list": "<answer>15 16 17 18</answer>",
    "tag with words": "<answer>16 or 17</answer>",
    "words with a list": "The answer is 15, 16, 17, 18.",
    "words with words": "The answer is 16 or 17.",
    "the gold in the reasoning": r"<think>\boxed{17}</think> I cannot say.",
    "the gold in the question": "Question: is 17 prime? The number 17 is given.",
    "the gold before another answer": "They say the answer is 17. The answer is 16.",
    "the gold in a box that never closes": r"The answer is 16, not \boxed{17",
    "hashes against a box": "\\boxed{16}\n#### 17",
    "a tag against hashes": "#### 16\n<answer>17</answer>",
    "an empty box": r"\boxed{} 17",
    "a box of another name": r"\boxed{x}",
}
CHOICE = {
    "every letter": r"\boxed{A, B, C, D, E}",
    "every letter, joined": r"\boxed{ABCDE}",
    "every letter, labelled": r"\boxed{(A) (B) (C) (D) (E)}",
    "two letters": r"\boxed{C \text{ or } D}",
    "two labels": r"\boxed{(C) \text{ or } (D)}",
    "a list of options": r"\boxed{(C) 1 (D) 2}",
    "not that one": r"\boxed{\text{not C}}",
}


@pytest.mark.parametrize("name", WRONG)
def test_earns_nothing(name: str) -> None:
    assert load("math")(completions=[WRONG[name]], answer=[GOLD]) == [0.0]


def test_the_fallback_takes_any_last_number() -> None:
    completion = WRONG["the gold in the question"]
    assert load("math", fallback="last_number")(completions=[completion], answer=[GOLD]) == [1.0]
    marked = "The answer is 16, though the question says 17."
    assert load("math", fallback="last_number")(completions=[marked], answer=[GOLD]) == [0.0]


@pytest.mark.parametrize("name", CHOICE)
def test_choice_earns_nothing(name: str) -> None:
    assert load("math")(completions=[CHOICE[name]], answer=["C"]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        # One answer that is stated twice, or made up in several boxes, is one answer.
        (r"\boxed{17}. Check: 34/2 = 17. So \boxed{17}.", "17"),
        (r"The roots are $\boxed{2}$ and $\boxed{-3}$.", "-3, 2"),
        (r"At first \boxed{16}, but a term was missing. With it, we get \boxed{17}.", "17"),
        (r"\boxed{\frac{34}{2} = 17}", "17"),
        (r"\boxed{x = \frac{51}{3} = 17}", "17"),
        (r"\boxed{\frac{1}{3} \approx 0.333}", r"\frac{1}{3}"),
        (r"\boxed{\text{(C) } 42}", "C"),
    ],
)
def test_honest_answers_that_look_alike(completion: str, gold: str) -> None:
    assert load("math")(completions=[completion], answer=[gold]) == [1.0]
