"""MTP modules against a reference of plain loops: one document at a time, stock decoder layers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from posttrain.policy import mtp
from posttrain.policy.model import PolicyForCausalLM, positions
from posttrain.policy.mtp import (
    IGNORE,
    MTPOutput,
    MTPRequest,
    cross_entropy_sum,
    documents,
    draft_quality,
    shift,
    targets,
)

# Float32 on both sides, values of order 1; the reference runs documents alone and cut to length,
# so matrix products differ in shape and sums in order.
CLOSE = {"rtol": 2e-4, "atol": 3e-5}


# --- the reference


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


class ReferenceModule(nn.Module):
    """The weights of one module: three norms, a matrix, a stock decoder layer with stock router."""

    def __init__(self, policy: PolicyForCausalLM, k: int) -> None:
        super().__init__()
        config = policy.config
        index = config.num_hidden_layers + k
        self.layer = DeepseekV3DecoderLayer(config, index)
        own, rest = {}, {}
        for name, tensor in policy.model.layers[index].state_dict().items():
            part = name.split(".")[0]
            (own if part in ("enorm", "hnorm", "eh_proj", "shared_head") else rest)[name] = tensor
        self.layer.load_state_dict(rest, strict=True)
        assert set(own) == {
            "enorm.weight",
            "hnorm.weight",
            "eh_proj.weight",
            "shared_head.norm.weight",
        }
        self.own = nn.ParameterDict({n.replace(".", "-"): own[n].clone() for n in own})

    def weight(self, name: str) -> Tensor:
        return self.own[name.replace(".", "-") + "-weight"]


@dataclass
class Scores:
    """Per depth: hidden states and logits of every document, and the cross-entropies."""

    hidden: list[list[Tensor]] = field(default_factory=list)
    logits: list[list[Tensor]] = field(default_factory=list)
    losses: list[list[Tensor]] = field(default_factory=list)


class Reference(nn.Module):
    """h^0 = trunk; h^k_i = layer(M [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]); softmax predicts t_{i+k+1}.

    k counts from 1 here, as in the report. A document alone: position i exists at depth k only if
    t_{i+k} does. The embedding is zero at i = 0; h^k is taken after the module's last norm.
    """

    def __init__(self, policy: PolicyForCausalLM, stock: DeepseekV3ForCausalLM) -> None:
        super().__init__()
        self.stock = stock
        self.depth = policy.config.num_nextn_predict_layers
        self.modules_k = nn.ModuleList(ReferenceModule(policy, k) for k in range(self.depth))
        self.rotary = DeepseekV3RotaryEmbedding(policy.config)
        self.eps = policy.config.rms_norm_eps

    def score(self, documents: list[tuple[Tensor, Tensor]]) -> Scores:
        """Score documents given as (ids, labels), each of one dimension."""
        scores = Scores([[] for _ in range(self.depth)], [[] for _ in range(self.depth)])
        scores.losses = [[] for _ in range(self.depth)]
        for ids, labels in documents:
            self.score_one(ids, labels, scores)
        return scores

    def score_one(self, ids: Tensor, labels: Tensor, scores: Scores) -> None:
        n = len(ids)
        h = self.stock.model(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
        for k in range(1, self.depth + 1):
            length = n - k
            if length <= 0:
                return
            module = self.modules_k[k - 1]
            rows = []
            for i in range(length):
                embedding = self.stock.model.embed_tokens.weight[ids[i + k]]
                if i == 0:
                    embedding = torch.zeros_like(embedding)
                pair = [
                    rms(embedding, module.weight("enorm"), self.eps),
                    rms(h[i], module.weight("hnorm"), self.eps),
                ]
                rows.append(module.weight("eh_proj") @ torch.cat(pair))
            x = torch.stack(rows).unsqueeze(0)
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
            position = torch.arange(length).unsqueeze(0)
            out = module.layer(
                x, attention_mask=mask, position_embeddings=self.rotary(x, position_ids=position)
            )[0]
            h = rms(out, module.weight("shared_head.norm"), self.eps)
            logits = h @ self.stock.lm_head.weight.T
            scores.hidden[k - 1].append(h)
            scores.logits[k - 1].append(logits)
            for i in range(length):
                if i + k + 1 < n and labels[i + k + 1] != IGNORE:
                    loss = -logits[i].log_softmax(-1)[labels[i + k + 1]]
                    scores.losses[k - 1].append(loss)

    def gradient_of(self, name: str) -> Tensor | None:
        """The gradient of the parameter that the policy calls `name`."""
        parts = name.split(".")
        trunk_layers = self.stock.config.num_hidden_layers
        if parts[:2] != ["model", "layers"] or int(parts[2]) < trunk_layers:
            return self.stock.get_parameter(name).grad
        module, rest = self.modules_k[int(parts[2]) - trunk_layers], ".".join(parts[3:])
        if rest.replace(".", "-") in module.own:
            return module.own[rest.replace(".", "-")].grad
        return module.layer.get_parameter(rest).grad


# --- batches: the same documents, laid out in three ways

LENGTHS = [9, 1, 12, 2, 3, 7]


def make_documents(make_ids: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Documents of several lengths, down to one token; a prompt of each is not scored."""
    result = []
    for seed, n in enumerate(LENGTHS):
        ids = make_ids(n, seed=seed)
        labels = ids.clone()
        labels[: n // 3] = IGNORE
        if n == 12:
            labels[8] = IGNORE
        result.append((ids, labels))
    return result


def lay_out(
    docs: list[tuple[Tensor, Tensor]], layout: str
) -> tuple[dict[str, Tensor], Tensor, list[tuple[int, int]]]:
    """Return model inputs, labels (B, S), and each document's (row, first column)."""
    if layout == "packed":
        ids = torch.cat([d for d, _ in docs]).unsqueeze(0)
        labels = torch.cat([labels for _, labels in docs]).unsqueeze(0)
        position = torch.cat([torch.arange(len(d)) for d, _ in docs]).unsqueeze(0)
        starts = torch.tensor([0, *(len(d) for d, _ in docs)]).cumsum(0).tolist()
        places = [(0, start) for start in starts[:-1]]
        return {"input_ids": ids, "position_ids": position}, labels, places
    width = max(len(d) for d, _ in docs) + 2
    ids = torch.full((len(docs), width), 5)  # padded with a token that documents use too
    labels = torch.full((len(docs), width), IGNORE)
    mask = torch.zeros(len(docs), width, dtype=torch.long)
    places = []
    for row, (d, label) in enumerate(docs):
        first = width - len(d) if layout == "left" else 0
        ids[row, first : first + len(d)] = d
        labels[row, first : first + len(d)] = label
        mask[row, first : first + len(d)] = 1
        places.append((row, first))
    return {"input_ids": ids, "attention_mask": mask}, labels, places


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


# --- the shifts


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
        loss = cross_entropy_sum(*leaves, labels)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves)])
    plain = sum(-(hidden[t] @ head.T).log_softmax(-1)[labels[t]] for t in range(23))
    torch.testing.assert_close(results[0][0].detach(), plain, rtol=1e-6, atol=0)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order


def test_cross_entropy_of_a_bfloat16_policy_is_summed_in_float32() -> None:
    """4096 losses of about 2.3: in bfloat16 the sum would stop at a few hundred."""
    hidden, head = torch.zeros(4096, 4).bfloat16(), torch.zeros(10, 4).bfloat16()
    loss = cross_entropy_sum(hidden, head, torch.zeros(4096).long())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4096 * torch.tensor(10.0).log().item(), rel=1e-5)


def test_draft_quality_worked_example() -> None:
    """p = (.5 .3 .2), q = (.2 .3 .5): the draft is token 2, kept with .2; then p = q: with .5."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    acceptance, agreement = draft_quality(torch.stack([p, p]), torch.stack([q, p]), torch.eye(3))
    assert acceptance == pytest.approx((0.2 + 0.5) / 2)
    assert agreement == 0.5


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
