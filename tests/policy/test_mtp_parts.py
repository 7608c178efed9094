"""Shifts, documents, targets, cross-entropy and draft quality, against tables and plain loops."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.policy import mtp
from posttrain.policy.model import positions
from posttrain.policy.mtp import (
    IGNORE,
    cross_entropy_sum,
    documents,
    draft_quality,
    shift,
    targets,
)


def test_worked_example_of_the_shifts() -> None:
    """[a0 a1 a2 a3 | b0 b1 b2] of the module's docstring, then a depth further, then padded."""
    labels = torch.tensor([[10, 11, 12, 13, 20, 21, 22]])
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    no = IGNORE
    assert shift(labels, 1, 0).tolist() == [[11, 12, 13, 20, 21, 22, 0]]
    assert targets(labels, document, 0).tolist() == [[12, 13, no, no, 22, no, no]]
    assert targets(labels, document, 1).tolist() == [[13, no, no, no, no, no, no]]
    assert targets(labels, document, 2).tolist() == [[no] * 7]
    labels[0, 2] = no
    assert targets(labels, document, 0).tolist() == [[no, 13, no, no, 22, no, no]]
    padded = torch.tensor([[-1, -1, 0, 0, 0, 1, -1]])
    assert targets(torch.arange(7).unsqueeze(0), padded, 0).tolist() == [[no, no, 4, no, no, no, no]]  # fmt: skip


def test_worked_example_of_documents() -> None:
    packed = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert documents(packed, None).tolist() == [[0, 0, 0, 1, 2, 2]]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    ids = torch.zeros_like(mask)
    assert positions(ids, mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    left, right = documents(positions(ids, mask), mask).tolist()
    assert left[:2] == [-1, -1]
    assert right[3] == -1
    assert left[2] == left[3] != right[0] == right[1] == right[2]


rows = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@given(row=rows, by=st.integers(0, 12), fill=st.integers(-100, 3))
def test_shift_equals_plain_indexing(row: list[int], by: int, fill: int) -> None:
    expected = [row[i + by] if i + by < len(row) else fill for i in range(len(row))]
    assert shift(torch.tensor([row, row[::-1]]), by, fill)[0].tolist() == expected


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    depth=st.integers(0, 4),
    data=st.data(),
)
@settings(deadline=None)
def test_documents_and_targets_equal_plain_loops(
    lengths: list[int], left: int, right: int, depth: int, data: st.DataObject
) -> None:
    """Documents by their positions; a row's targets by looking t_{i+depth+2} up in the document."""
    if left or right:
        lengths = lengths[:1]  # a padded row holds one document
    n = sum(lengths)
    width = left + n + right
    labels = data.draw(st.lists(st.sampled_from([IGNORE, 3, 4, 5]), min_size=width, max_size=width))
    expected, numbers, place = [IGNORE] * width, [-1] * width, left
    for number, length in enumerate(lengths):
        for i in range(length):
            numbers[place + i] = number
            if i + depth + 2 < length:
                expected[place + i] = labels[place + i + depth + 2]
        place += length
    mask = torch.tensor([[0] * left + [1] * n + [0] * right])
    position = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    if left or right:
        position = positions(torch.zeros_like(mask), mask)
    document = documents(position, mask if left or right else None)
    same = [[a == b for b in numbers] for a in numbers]
    found = document[0].tolist()
    assert [[a == b for b in found] for a in found] == same
    assert [d == -1 for d in found] == [d == -1 for d in numbers]
    assert targets(torch.tensor([labels]), document, depth)[0].tolist() == expected


@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4))
@settings(deadline=None)
def test_rows_are_never_one_document(lengths: list[int]) -> None:
    """A row that begins at any position begins a document, also where positions run on."""
    document = documents(torch.arange(12).view(3, 4), None)
    assert document.tolist() == [[0] * 4, [1] * 4, [2] * 4]
    position = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    both = documents(torch.cat([position, position]), None)
    assert set(both[0].tolist()).isdisjoint(both[1].tolist())


# --- the loss and the metrics


def test_cross_entropy_in_chunks_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients; 23 tokens in chunks of 5."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator)
    head = torch.randn(11, 8, generator=generator)
    labels = torch.randint(0, 11, (23,), generator=generator)
    results = []
    for chunk in (10_000, 5):
        monkeypatch.setattr(mtp, "LOSS_CHUNK_TOKENS", chunk)
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = cross_entropy_sum(leaves[0], partial(F.linear, weight=leaves[1]), labels)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves)])
    plain = sum(-(hidden[t] @ head.T).log_softmax(-1)[labels[t]] for t in range(23))
    torch.testing.assert_close(results[0][0].detach(), plain, rtol=1e-6, atol=0)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order


def test_cross_entropy_of_a_bfloat16_policy_is_summed_in_float32() -> None:
    """4096 losses of about 2.3: in bfloat16 the sum would stop at a few hundred."""
    hidden, head = torch.zeros(4096, 4).bfloat16(), torch.zeros(10, 4).bfloat16()
    loss = cross_entropy_sum(hidden, partial(F.linear, weight=head), torch.zeros(4096).long())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4096 * torch.tensor(10.0).log().item(), rel=1e-5)


def test_draft_quality_worked_example() -> None:
    """p = (.5 .3 .2), q = (.2 .3 .5): the draft is token 2, kept with .2; then p = q: with .5."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    acceptance, agreement = draft_quality(torch.stack([p, p]), torch.stack([q, p]), lambda x: x)
    assert acceptance == pytest.approx((0.2 + 0.5) / 2)
    assert agreement == 0.5
