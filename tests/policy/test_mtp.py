"""MTP modules against a reference of plain loops: losses, gradients, documents, detaching."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp import IGNORE, MTPOutput, MTPRequest
from tests.policy.reference import LENGTHS, Reference, lay_out, make_documents

# Float32 on both sides, values of order 1; the reference runs documents alone and cut to length,
# so matrix products differ in shape and sums in order.
CLOSE = {"rtol": 2e-4, "atol": 3e-5}


def run(
    policy: PolicyForCausalLM, inputs: dict[str, Tensor], request: MTPRequest
) -> tuple[Tensor, MTPOutput, list[Tensor]]:
    """One pass: trunk logits, MTP output, each module's hidden states (B, S, D)."""
    hidden: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: hidden.append(call[2]))
        for module in policy.model.mtp_modules
    ]
    policy.model.mtp_request = request
    logits = policy(**inputs).logits
    for hook in hooks:
        hook.remove()
    output = policy.model.take_extras().mtp
    assert output is not None
    return logits, output, hidden


MakePolicy = Callable[..., PolicyForCausalLM]
MakeStock = Callable[[PolicyForCausalLM], DeepseekV3ForCausalLM]
MakeIds = Callable[..., Tensor]


@pytest.mark.parametrize("layout", ["packed", "left", "right"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_hidden_states_losses_and_gradients_equal_the_reference(
    make_policy: MakePolicy, make_stock: MakeStock, make_ids: MakeIds, depth: int, layout: str
) -> None:
    """Nothing crosses documents or padding: the reference never sees two documents at a time."""
    policy = make_policy(num_nextn_predict_layers=depth, q_lora_rank=12 if depth == 2 else None)
    reference = Reference(policy, make_stock(policy))
    docs = make_documents(make_ids)
    inputs, labels, places = lay_out(docs, layout)
    _, output, hidden = run(policy, inputs, MTPRequest(labels, num_items=17))
    expected = reference.score(docs)

    for k in range(depth):
        long_enough = [p for p, (d, _) in zip(places, docs, strict=True) if len(d) > k + 1]
        assert len(long_enough) == len(expected.hidden[k])
        for (row, first), h, logits in zip(
            long_enough, expected.hidden[k], expected.logits[k], strict=True
        ):
            ours = hidden[k][row, first : first + len(h)]
            torch.testing.assert_close(ours, h, **CLOSE)
            torch.testing.assert_close(policy.lm_head(ours), logits, **CLOSE)
        losses = torch.stack(expected.losses[k])
        assert output.tokens[k] == len(losses)
        assert output.token_losses[k] == pytest.approx(losses.mean().item(), rel=1e-5)

    loss = sum(torch.stack(losses).sum() / 17 for losses in expected.losses) / depth
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=0)
    output.loss.backward()
    loss.backward()
    for name, parameter in policy.named_parameters():
        gradient = reference.gradient_of(name)
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_yarn_and_both_attentions_equal_the_reference(
    make_policy: MakePolicy, make_stock: MakeStock, make_ids: MakeIds, attention: str
) -> None:
    policy = make_policy(num_nextn_predict_layers=2, yarn=True, attention=attention)
    stock = make_stock(policy)
    reference = Reference(policy, stock)
    policy.config._attn_implementation = "eager"  # the reference's masks are for eager attention
    docs = make_documents(make_ids)
    expected = reference.score(docs)
    policy.config._attn_implementation = attention
    inputs, labels, _ = lay_out(docs, "packed")
    _, output, _ = run(policy, inputs, MTPRequest(labels))
    for k in range(2):
        mean = torch.stack(expected.losses[k]).mean().item()
        assert output.token_losses[k] == pytest.approx(mean, rel=1e-5)


def test_layouts_give_the_same_trunk_mtp_and_counts(
    make_policy: MakePolicy, make_ids: MakeIds
) -> None:
    """Packed, padded on the left, padded on the right, alone: losses, gradients, load counts."""
    base = make_policy(num_nextn_predict_layers=2)
    docs = make_documents(make_ids)
    tokens = [sum(int((y[k + 2 :] != IGNORE).sum()) for _, y in docs) for k in range(2)]
    results = []
    for layout in ("packed", "left", "right", "alone"):
        policy = copy.deepcopy(base)
        total = torch.zeros(())
        seen = [0, 0]
        for some in [docs] if layout != "alone" else [[d] for d in docs]:
            inputs, labels, _ = lay_out(some, "packed" if layout == "alone" else layout)
            _, output, _ = run(policy, inputs, MTPRequest(labels, num_items=sum(LENGTHS)))
            total = total + output.loss
            seen = [a + b for a, b in zip(seen, output.tokens, strict=True)]
        total.backward()
        assert seen == tokens
        loads = [router.load_E for router in policy.model.routers]
        results.append((total.item(), [p.grad for p in policy.parameters()], loads))
    for loss, gradients, loads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for one, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        for one, other in zip(loads, results[0][2], strict=True):
            assert torch.equal(one, other)
    n = sum(LENGTHS)
    reach = [n, n, sum(x - 1 for x in LENGTHS), sum(max(x - 2, 0) for x in LENGTHS)]
    assert [int(load.sum()) for load in results[0][2]] == [4 * x for x in reach]


def test_what_padding_holds_changes_nothing(make_policy: MakePolicy, make_ids: MakeIds) -> None:
    """Other ids and labels under the mask: the same loss, bit by bit, and the same gradients."""
    base = make_policy(num_nextn_predict_layers=2)
    docs = make_documents(make_ids)
    results = []
    for noise in (False, True):
        policy = copy.deepcopy(base)
        inputs, labels, _ = lay_out(docs, "right")
        if noise:
            hole = inputs["attention_mask"] == 0
            inputs["input_ids"] = torch.where(hole, make_ids(*hole.shape), inputs["input_ids"])
            labels = torch.where(hole, 7, labels)
        _, output, _ = run(policy, inputs, MTPRequest(labels))
        output.loss.backward()
        results.append((output, [p.grad for p in policy.parameters()]))
    assert results[0][0].loss.item() == results[1][0].loss.item()
    assert results[0][0].tokens == results[1][0].tokens
    for one, other in zip(results[0][1], results[1][1], strict=True):
        # Experts gather padded tokens too: sums run in another order. Values are of order 0.1.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, 4.0, torch.tensor(4)])
def test_num_items_divides_sums(
    make_policy: MakePolicy, make_ids: MakeIds, num_items: float | Tensor | None
) -> None:
    """By default each depth is a mean over its own tokens; depths are averaged (eq. 25)."""
    policy = make_policy(num_nextn_predict_layers=2)
    inputs, labels, _ = lay_out(make_documents(make_ids), "packed")
    _, output, _ = run(policy, inputs, MTPRequest(labels, num_items=num_items))
    assert output.tokens[0] > output.tokens[1]
    parts = [
        mean if num_items is None else mean * n / 4
        for mean, n in zip(output.token_losses, output.tokens, strict=True)
    ]
    assert output.loss.item() == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_detached_loss_trains_the_modules_alone(make_policy: MakePolicy, make_ids: MakeIds) -> None:
    """No gradient at trunk, embedding or head; the modules' own are those of the whole graph."""
    attached = make_policy(num_nextn_predict_layers=2)
    detached = copy.deepcopy(attached)
    inputs, labels, _ = lay_out(make_documents(make_ids), "packed")
    losses = []
    for policy, detach in ((attached, False), (detached, True)):
        logits, output, _ = run(policy, inputs, MTPRequest(labels, detach=detach))
        # The trunk's own loss is in the graph too, as it is in training.
        (output.loss + 0.0 * logits.sum()).backward()
        losses.append(output.loss.item())
    assert losses[0] == losses[1]
    own = {id(p) for m in detached.model.mtp_modules for p in m.parameters()}
    for name, parameter in detached.named_parameters():
        other = attached.get_parameter(name)
        assert other.grad.abs().sum() > 0, name
        if id(parameter) in own:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-8)
        else:
            assert parameter.grad is None or parameter.grad.abs().sum() == 0, name


def test_detached_loss_leaves_trunk_gradients_bit_identical(
    make_policy: MakePolicy, make_ids: MakeIds
) -> None:
    base = make_policy(num_nextn_predict_layers=2)
    inputs, labels, _ = lay_out(make_documents(make_ids), "packed")
    gradients = []
    for weight in (0.0, 0.1):
        policy = copy.deepcopy(base)
        if weight:
            policy.model.mtp_request = MTPRequest(labels, detach=True, quality=True)
        loss = policy(**inputs).logits.log_softmax(-1)[..., 7].mean()
        extras = policy.model.take_extras()
        (loss + weight * extras.mtp.loss if weight else loss).backward()
        own = {id(p) for m in policy.model.mtp_modules for p in m.parameters()}
        gradients.append([p.grad for p in policy.parameters() if id(p) not in own])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_nothing_to_predict_gives_zero_and_zero_gradients(
    make_policy: MakePolicy, make_ids: MakeIds
) -> None:
    """Every module parameter still takes part, as DDP demands of each process."""
    policy = make_policy(num_nextn_predict_layers=2)
    ids = make_ids(2, 6)
    for labels in (torch.full_like(ids, IGNORE), ids):
        inputs = {"input_ids": ids if labels is not ids else ids[:, :1]}
        _, output, _ = run(policy, inputs, MTPRequest(labels[:, : inputs["input_ids"].shape[1]]))
        assert output.loss.item() == 0.0
        assert output.tokens == [0, 0]
        output.loss.backward()
        for module in policy.model.mtp_modules:
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() == 0, name


def test_quality_compares_distributions_of_the_same_token(
    make_policy: MakePolicy, make_ids: MakeIds
) -> None:
    """Against plain loops: module k at i and the trunk at i+k+1 both predict t_{i+k+2}."""
    policy = make_policy(num_nextn_predict_layers=2)
    docs = make_documents(make_ids)
    inputs, labels, places = lay_out(docs, "packed")
    logits, output, hidden = run(policy, inputs, MTPRequest(labels, quality=True))
    for k in range(2):
        acceptances, agreements = [], []
        for (row, first), (_, y) in zip(places, docs, strict=True):
            for i in range(len(y) - k - 2):
                if y[i + k + 2] == IGNORE:
                    continue
                p = logits[row, first + i + k + 1].softmax(-1)
                q = policy.lm_head(hidden[k][row, first + i]).softmax(-1)
                acceptances.append(p[q.argmax()].item())
                agreements.append(float(p.argmax() == q.argmax()))
        assert output.acceptance[k] == pytest.approx(sum(acceptances) / len(acceptances), rel=1e-4)
        assert output.agreement[k] == pytest.approx(sum(agreements) / len(agreements))


def test_labels_may_differ_from_inputs(make_policy: MakePolicy, make_ids: MakeIds) -> None:
    """The loss is of the labels asked for, not of the ids read."""
    policy = make_policy()
    ids, labels = make_ids(1, 8), make_ids(1, 8, seed=5)
    _, output, hidden = run(policy, {"input_ids": ids}, MTPRequest(labels))
    logits = policy.lm_head(hidden[0])[0, :6]
    expected = F.cross_entropy(logits, labels[0, 2:]).item()
    assert output.token_losses[0] == pytest.approx(expected, rel=1e-5)
