"""The trunk against transformers' own DeepSeek-V3: same weights, same inputs, same numbers."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from posttrain.policy import router as router_module
from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp import MTPRequest
from posttrain.policy.router import Router

# Both sides run the same float32 operations; only positions of left-padded rows differ (RoPE of
# shifted angles) and the order in which a token's experts are summed. Values are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

KINDS = ["plain", "left", "right", "packed"]


def batch(kind: str, make_ids: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return model inputs and the mask (B, S) of real tokens."""
    if kind == "packed":
        ids = make_ids(1, 21)
        positions = torch.tensor([[*range(9), *range(1), *range(11)]])
        return {"input_ids": ids, "position_ids": positions}, torch.ones(1, 21).bool()
    ids = make_ids(3, 14)
    real = torch.ones(3, 14).bool()
    if kind == "plain":
        return {"input_ids": ids}, real
    for row, padding in enumerate((0, 3, 9)):
        edge = slice(0, padding) if kind == "left" else slice(14 - padding, 14)
        real[row, edge] = False
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}, real


def loss_of(logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Cross-entropy of next tokens between real neighbours."""
    scored = real[:, :-1] & real[:, 1:]
    return F.cross_entropy(logits[:, :-1][scored], ids[:, 1:][scored])


def assert_trunk_gradients_equal(policy: PolicyForCausalLM, stock: DeepseekV3ForCausalLM) -> None:
    ours = dict(policy.named_parameters())
    for name, parameter in stock.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(ours[name].grad, parameter.grad, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("yarn", [False, True], ids=["rope", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_logits_and_gradients_equal_transformers(
    make_policy: Callable[..., PolicyForCausalLM],
    make_stock: Callable[..., DeepseekV3ForCausalLM],
    make_ids: Callable[..., Tensor],
    kind: str,
    attention: str,
    yarn: bool,
    q_lora_rank: int | None,
) -> None:
    policy = make_policy(attention=attention, yarn=yarn, q_lora_rank=q_lora_rank)
    stock = make_stock(policy)
    inputs, real = batch(kind, make_ids)
    # transformers separates packed documents only without a cache; the policy trains without one.
    expected = stock(**inputs, use_cache=False).logits
    logits = policy(**inputs).logits
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    loss_of(expected, inputs["input_ids"], real).backward()
    loss_of(logits, inputs["input_ids"], real).backward()
    assert_trunk_gradients_equal(policy, stock)


@pytest.mark.parametrize(
    ("n_group", "topk_group", "top_k", "norm"),
    [(1, 1, 4, True), (2, 1, 8, True), (8, 3, 6, False), (4, 4, 1, True)],
)
def test_other_groupings_equal_transformers(
    make_policy: Callable[..., PolicyForCausalLM],
    make_stock: Callable[..., DeepseekV3ForCausalLM],
    make_ids: Callable[..., Tensor],
    n_group: int,
    topk_group: int,
    top_k: int,
    norm: bool,
) -> None:
    fields = {"n_group": n_group, "topk_group": topk_group, "num_experts_per_tok": top_k}
    policy = make_policy(**fields, norm_topk_prob=norm)
    stock = make_stock(policy)
    inputs, real = batch("plain", make_ids)
    expected = stock(**inputs).logits
    logits = policy(**inputs).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    loss_of(expected, inputs["input_ids"], real).backward()
    loss_of(logits, inputs["input_ids"], real).backward()
    if norm and top_k == 1:
        # A single gate is 1 whatever the score: no gradient reaches the router on either side.
        for name, parameter in stock.named_parameters():
            if name.endswith("gate.weight"):
                parameter.grad = None
                policy.get_parameter(name).grad = None
                parameter.requires_grad_(False)
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(policy.get_parameter(name).grad, parameter.grad, **CLOSE)


def test_a_group_fill_of_zero_would_be_noticed(
    make_policy: Callable[..., PolicyForCausalLM],
    make_stock: Callable[..., DeepseekV3ForCausalLM],
    make_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The biases of these tests tell -inf from 0.0, which agree while the bias is zero."""
    policy = make_policy()
    inputs, _ = batch("plain", make_ids)
    expected = make_stock(policy)(**inputs).logits
    fill = Tensor.masked_fill
    monkeypatch.setattr(
        router_module.torch.Tensor,
        "masked_fill",
        lambda self, mask, value: fill(self, mask, 0.0 if value == float("-inf") else value),
    )
    assert (policy(**inputs).logits - expected).abs().max() > 0.1


def test_no_token_is_dropped_when_all_want_the_same_experts(
    make_policy: Callable[..., PolicyForCausalLM],
    make_stock: Callable[..., DeepseekV3ForCausalLM],
) -> None:
    policy = make_policy()
    for router in policy.model.routers:
        router.e_score_correction_bias.copy_(torch.tensor([5.0] * 4 + [0.0] * 12))
    ids = torch.full((4, 16), 7)
    logits = policy(input_ids=ids).logits
    torch.testing.assert_close(logits, make_stock(policy)(input_ids=ids).logits, **CLOSE)
    for router in policy.model.routers[:2]:
        assert router.load_E.tolist() == [64] * 4 + [0] * 12


def test_generation_equals_transformers(
    make_policy: Callable[..., PolicyForCausalLM],
    make_stock: Callable[..., DeepseekV3ForCausalLM],
    make_ids: Callable[..., Tensor],
) -> None:
    """With a cache, from left-padded prompts; generation counts no load."""
    policy, (inputs, _) = make_policy().eval(), batch("left", make_ids)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = make_stock(policy).eval().generate(**inputs, **options)
    assert torch.equal(policy.generate(**inputs, **options), expected)
    assert all(router.load_E is None for router in policy.model.routers)


def test_embeddings_as_input_equal_ids(
    make_policy: Callable[..., PolicyForCausalLM], make_ids: Callable[..., Tensor]
) -> None:
    policy, ids = make_policy(), make_ids(2, 9)
    embeds = policy.model.embed_tokens(ids)
    assert torch.equal(policy(inputs_embeds=embeds).logits, policy(input_ids=ids).logits)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_config_is_true_to_the_modules_inside(
    make_policy: Callable[..., PolicyForCausalLM], depth: int
) -> None:
    """Names are the released ones; embedding and head are held once, by the trunk."""
    policy = make_policy(num_nextn_predict_layers=depth)
    assert len(policy.model.mtp_modules) == depth == policy.config.num_nextn_predict_layers
    assert len(policy.model.routers) == 2 + depth
    names = {n for n, _ in policy.named_parameters() if n.startswith("model.layers.")}
    extra = {n.split(".", 3)[3] for n in names if int(n.split(".")[2]) >= 3}
    if depth:
        own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
        layer = {n.split(".", 3)[3] for n in names if n.startswith("model.layers.2.")}
        assert extra == own | layer
    else:
        assert not extra


def test_a_fresh_policy_is_initialised_like_transformers(
    make_config: Callable[..., object],
) -> None:
    """Normal weights of the configured spread (modules included), ones in norms, zero biases."""
    torch.manual_seed(0)
    policy = PolicyForCausalLM(make_config(hidden_size=64, initializer_range=0.05))
    for name, parameter in policy.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # 500 draws or more: the sample's spread is within 15% of the true one (5 sigma).
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name
    for router in policy.model.routers:
        assert router.e_score_correction_bias.abs().sum() == 0


def test_counts_are_not_saved_and_biases_are(
    make_policy: Callable[..., PolicyForCausalLM], make_ids: Callable[..., Tensor]
) -> None:
    policy = make_policy()
    before = set(policy.state_dict())
    policy(input_ids=make_ids(2, 9))
    assert policy.model.routers[0].load_E is not None
    assert set(policy.state_dict()) == before
    assert not any("load" in name for name in before)
    biases = {name for name in before if name.endswith("mlp.gate.e_score_correction_bias")}
    assert biases == {f"model.layers.{k}.mlp.gate.e_score_correction_bias" for k in (1, 2, 3)}
    assert not any("_head" in name.removeprefix("lm_head") for name in before if "shared" not in name)  # fmt: skip


@pytest.mark.parametrize("mode", ["no_grad", "eval"])
def test_passes_that_do_not_train_do_not_count(
    make_policy: Callable[..., PolicyForCausalLM], make_ids: Callable[..., Tensor], mode: str
) -> None:
    policy, ids = make_policy(), make_ids(2, 9)
    policy.model.wants_balance_loss = True
    policy.model.mtp_request = MTPRequest(ids)
    if mode == "eval":
        policy.eval()
    with torch.set_grad_enabled(mode == "eval"):
        policy(input_ids=ids)
    assert all(router.load_E is None for router in policy.model.routers)
    extras = policy.model.take_extras()
    assert extras.balance_loss is None
    assert extras.mtp is not None, "evaluation may ask for the MTP loss"


@pytest.mark.parametrize("kind", ["left", "right"])
def test_padding_is_not_counted(
    make_policy: Callable[..., PolicyForCausalLM], make_ids: Callable[..., Tensor], kind: str
) -> None:
    """Counts of a padded batch are the sums over its rows, each run alone without padding."""
    policy, (inputs, real) = make_policy(num_nextn_predict_layers=2), batch(kind, make_ids)
    policy.model.mtp_request = MTPRequest(inputs["input_ids"])
    policy(**inputs)
    counted = [router.load_E.clone() for router in policy.model.routers]
    for router in policy.model.routers:
        router.load_E = None
    for ids, mask in zip(inputs["input_ids"], real, strict=True):
        policy.model.mtp_request = MTPRequest(ids[mask].unsqueeze(0))
        policy(input_ids=ids[mask].unsqueeze(0))
    for router, load_E in zip(policy.model.routers, counted, strict=True):
        assert torch.equal(router.load_E, load_E)
    lengths = real.sum(1)
    expected = [lengths, lengths, lengths - 1, lengths - 2]  # trunk, trunk, depth 0, depth 1
    assert [int(load.sum()) for load in counted] == [4 * int(n.sum()) for n in expected]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once_and_gives_the_same_gradients(
    make_policy: Callable[..., PolicyForCausalLM],
    make_ids: Callable[..., Tensor],
    reentrant: bool,
    detach: bool,
) -> None:
    """With gradient checkpointing and without: loads, losses and every gradient are equal."""
    ids = make_ids(2, 12)
    plain = make_policy(num_nextn_predict_layers=2)
    recomputing = copy.deepcopy(plain)
    recomputing.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for policy in (plain, recomputing):
        policy.model.mtp_request = MTPRequest(ids, detach=detach)
        policy.model.wants_balance_loss = not reentrant
        logits = policy(input_ids=ids).logits
        extras = policy.model.take_extras()
        loss = loss_of(logits, ids, torch.ones_like(ids).bool()) + extras.mtp.loss
        if not reentrant:
            loss = loss + extras.balance_loss
        loss.backward()
    for one, other in zip(plain.model.routers, recomputing.model.routers, strict=True):
        assert torch.equal(one.load_E, other.load_E)
    for name, parameter in plain.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        # Recomputation repeats the same operations; gradients are summed in another order.
        torch.testing.assert_close(
            recomputing.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6
        )


def test_balance_loss_refuses_reentrant_recomputation(
    make_policy: Callable[..., PolicyForCausalLM], make_ids: Callable[..., Tensor]
) -> None:
    """Its scores would carry no graph, and the loss no gradient, without a word."""
    policy = make_policy()
    policy.gradient_checkpointing_enable({"use_reentrant": True})
    policy.model.wants_balance_loss = True
    with pytest.raises(RuntimeError, match="use_reentrant: false"):
        policy(input_ids=make_ids(2, 9))


def test_extras_are_taken_once(
    make_policy: Callable[..., PolicyForCausalLM], make_ids: Callable[..., Tensor]
) -> None:
    """A request holds for one pass, and what was taken is gone."""
    policy, ids = make_policy(), make_ids(2, 9)
    policy.model.mtp_request = MTPRequest(ids)
    policy(input_ids=ids)
    assert policy.model.take_extras().mtp is not None
    policy(input_ids=ids)
    extras = policy.model.take_extras()
    assert extras.mtp is None
    assert extras.balance_loss is None


def test_biases_stay_float32_in_a_narrower_policy(
    make_policy: Callable[..., PolicyForCausalLM],
) -> None:
    """0.5 + 0.001 is 0.5 in bfloat16: a bias of that type would stand still."""
    policy = make_policy()
    expected = [r.e_score_correction_bias.clone() for r in policy.model.routers]
    policy.to(torch.bfloat16)
    for router, bias in zip(policy.model.routers, expected, strict=True):
        assert isinstance(router, Router)
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.e_score_correction_bias, bias)
