"""Packed rows against the same documents alone, one a row."""

import torch

from posttrain.policy.mtp import IGNORE, MTPRequest
from posttrain.training.packing import PackedRows
from tests.policy.tiny import tiny_policy

DOCUMENTS = [([5, 6, 7, 8, 9], 2), ([11, 12, 13], 1), ([21, 22, 23, 24], 2), ([31, 32, 33], 1)]


def packed(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of the named documents, whose first `prompt` tokens are not trained on."""
    examples = []
    for row in rows:
        documents = [DOCUMENTS[i] for i in row]
        examples.append(
            {
                "input_ids": [token for ids, _ in documents for token in ids],
                "labels": [
                    token if i >= prompt else IGNORE
                    for ids, prompt in documents
                    for i, token in enumerate(ids)
                ],
                "seq_lengths": [len(ids) for ids, _ in documents],
            }
        )
    return PackedRows(pad_token_id=0)(examples)


def train(rows: list[list[int]]) -> tuple[float, float, list[int], float, torch.Tensor]:
    """Main and MTP loss sums, expert loads, balance loss, and the gradient of the embedding."""
    policy = tiny_policy().train()
    batch = packed(rows)
    labels = batch.pop("labels")
    policy.model.mtp_request = MTPRequest(labels, num_items=1.0)
    policy.model.wants_balance_loss = True
    logits = policy(**batch).logits
    main = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    extras = policy.model.take_extras()
    (main + extras.mtp.loss).backward()
    load = torch.stack([r.load_E for r in policy.model.routers]).flatten().tolist()
    gradient = policy.model.embed_tokens.weight.grad
    return main.item(), extras.mtp.loss.item(), load, extras.balance_loss.item(), gradient


def test_packed_rows_train_as_the_documents_alone() -> None:
    alone = train([[0], [1], [2], [3]])
    together = train([[0, 1], [2, 3]])  # rows of 8 and 7: one position of padding
    for one, other in zip(alone, together, strict=True):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        # float32 sums in another order: small entries of a gradient have the noise of the large
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_padding_has_no_document_and_first_tokens_are_no_labels() -> None:
    batch = packed([[0, 1], [2]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch["padding_mask"].tolist() == [[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE, IGNORE, 7, 8, 9, IGNORE, 12, 13],
        [IGNORE, IGNORE, 23, 24, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
