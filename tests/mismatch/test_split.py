"""The parts of a mismatch on numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.mismatch.split import Gap, aligned, only_layer, shuffled, split
from posttrain.policy.replay import MISSING


def test_gap_on_numbers() -> None:
    """Of log-ratios ln 2, 0 and -ln 2: k3 terms 2 - 1 - ln 2, 0 and 1/2 - 1 + ln 2."""
    gap = Gap.of(torch.tensor([math.log(2), 0.0, -math.log(2)]))
    assert gap.mean == pytest.approx(2 * math.log(2) / 3)
    assert gap.largest == pytest.approx(math.log(2))
    assert gap.k3 == pytest.approx(0.5 / 3)
    assert Gap.of(torch.zeros(0)) == Gap()
    assert math.isnan(Gap().mean)


def test_k3_estimates_the_divergence() -> None:
    """KL((.7, .2, .1) || (.5, .3, .2)), by the mean over the first distribution."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    expected = (p * (p / q).log()).sum().item()
    drawn = torch.tensor([0] * 7 + [1] * 2 + [2])
    assert Gap.of((q / p).log()[drawn]).k3 == pytest.approx(expected, rel=1e-6)


def test_small_ratios_keep_their_digits() -> None:
    """d^2 / 2 at 1e-6, where exp(d) - 1 - d in float32 would be 0 or worse."""
    assert Gap.of(torch.tensor([1e-6])).k3 == pytest.approx(5e-13, rel=1e-5)


@given(st.lists(st.floats(-3, 3, width=32), max_size=12), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_joined_gaps_are_the_gap_of_all(ratios: list[float], cut: int) -> None:
    whole = Gap.of(torch.tensor(ratios))
    parts = Gap.joined([Gap.of(torch.tensor(ratios[:cut])), Gap.of(torch.tensor(ratios[cut:]))])
    assert parts.tokens == whole.tokens
    assert parts.largest == whole.largest
    for name in ("total", "total_k3"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-12)


def test_split_adds_up_and_knows_which_tokens_changed() -> None:
    """Two rows of five positions, the last three the completion's; the second row has two tokens.

    A token was chosen one position before it: row 0 at positions 1, 2, 3, row 1 at 1, 2.
    """
    engine = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.5, 9.0]])
    own = torch.tensor([[-1.25, -2.0, -0.5], [-2.0, -1.75, 9.0]])
    replayed = torch.tensor([[-1.125, -2.0, -0.625], [-3.0, -1.5, 9.0]])
    mine = torch.tensor([[0, 1], [2, 3]]).expand(2, 5, 2, 2).clone()
    theirs = mine.flip(-1)  # the same experts in another order
    theirs[0, 0] = 7  # not before a token of the completion
    theirs[0, 1, 0] = torch.tensor([1, 5])  # one expert of layer 0
    theirs[1, 2, 1] = torch.tensor([6, 7])  # both of layer 1
    theirs[0, 3] = MISSING
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    parts = split(engine, own, replayed, mine, theirs, mask)
    assert parts.precision_N.tolist() == [0.125, 0.0, 0.125, 0.0, 0.0]
    assert parts.routing_N.tolist() == [0.125, 0.0, -0.125, -1.0, 0.25]
    assert torch.equal(parts.engine_N - parts.own_N, parts.precision_N + parts.routing_N)
    assert parts.differing_NL.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0], [0, 2]]
    assert parts.changed_N.tolist() == [True, False, False, False, True]
    assert parts.choices_differing() == [0.1, 0.2]
    assert parts.tokens_differing() == [0.2, 0.2]
    gaps = parts.gaps()
    assert gaps["without_replay"].mean == pytest.approx(0.3)
    assert gaps["precision"].mean == pytest.approx(0.05)
    assert gaps["routing"].mean == pytest.approx(0.3)
    assert gaps["changed_without_replay"].total == 0.5
    assert gaps["changed_precision"].total == 0.125
    # KL of the engine from the trainer: the log-ratio is b - a.
    assert gaps["without_replay"].total_k3 == pytest.approx(
        sum(math.exp(d) - 1 - d for d in (-0.25, 0.0, 0.0, 1.0, -0.25))
    )


def test_records_are_laid_at_their_rows_starts() -> None:
    records = [torch.tensor([[[1]], [[2]]]), torch.tensor([[[3]]])]
    assert aligned(records, [1, 3], 4)[..., 0, 0].tolist() == [[-1, 1, 2, -1], [-1, -1, -1, 3]]


def test_a_shuffled_record_holds_the_same_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    record = torch.randint(0, 100, (3, 20, 2, 2), generator=generator, dtype=torch.int8)
    record[1, :6] = MISSING
    other = shuffled(record, 0)
    assert torch.equal(other < 0, record < 0)
    assert (other != record).flatten(2).any(-1).float().mean() > 0.8
    rows = [
        sorted(r[r[:, 0, 0] >= 0].flatten(1).tolist())
        for r in (record.flatten(0, 1), other.flatten(0, 1))
    ]
    assert rows[0] == rows[1]
    assert torch.equal(other, shuffled(record, 0))


def test_one_layers_record_leaves_the_others_out() -> None:
    record = torch.arange(8).reshape(1, 2, 2, 2)
    assert only_layer(record, 1).tolist() == [[[[-1, -1], [2, 3]], [[-1, -1], [6, 7]]]]
