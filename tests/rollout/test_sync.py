from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.policy.checkpoint import named_tensors
from posttrain.rollout.engine import Engine
from posttrain.rollout.sync import SyncError


def models(engine: Engine) -> tuple[Any, Any]:
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    return worker.policy_models()


def test_new_weights_replace_the_old_ones_everywhere(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(1)
    report = engine.sync(named_tensors(policy))
    assert report.tensors == len(dict(named_tensors(policy)))
    assert report.unused == 0
    held = dict(engine.llm.collective_rpc("policy_checksums")[0])
    assert set(held) == set(dict(named_tensors(policy)))


def test_an_engine_without_drafts_leaves_mtp_modules_out(plain_engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(1)
    report = plain_engine.sync(named_tensors(policy))
    assert report.unused == sum("layers.3." in name for name, _ in named_tensors(policy))
    assert report.tensors + report.unused == len(dict(named_tensors(policy)))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.7.up_proj.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(engine: Engine, tiny: Any, name: str) -> None:
    stream = ((n, t) for n, t in named_tensors(tiny.policy(1)) if n != name)
    with pytest.raises(SyncError, match=name):
        engine.sync(stream)
    with pytest.raises(SyncError, match="no verified weights"):
        engine.score([[1, 2, 3]])
    engine.sync(named_tensors(tiny.policy(1)))  # and a whole stream repairs it
    engine.score([[1, 2, 3]])


def changed(stream: Iterator[tuple[str, Tensor]], name: str, to: Any) -> Iterator[Any]:
    for n, tensor in stream:
        yield (n, to(tensor)) if n == name else (n, tensor)


def test_what_does_not_belong_is_refused(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(1)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    for stream, message in (
        (iter([("model.layers.0.no_such.weight", torch.zeros(1))]), "no such tensor"),
        (changed(named_tensors(policy), name, lambda t: t[:-1]), "sent as"),
        (changed(named_tensors(policy), name, lambda t: t / 0), "not finite"),
        ((pair for pair in named_tensors(policy) for _ in range(2)), "more than once"),
        # the drafter shares the trunk's head: another one would overwrite it
        (
            changed(named_tensors(policy), "model.layers.3.shared_head.head.weight", lambda t: -t),
            "lm_head.weight",
        ),
    ):
        with pytest.raises(SyncError, match=message):
            engine.sync(stream)
    engine.sync(named_tensors(policy))


def test_a_failed_sync_still_runs_through_the_stream(engine: Engine, tiny: Any) -> None:
    # other processes gather sharded tensors and would wait for ever
    seen = []
    stream = ((seen.append(n), (n, t))[1] for n, t in named_tensors(tiny.policy(1)))
    with pytest.raises(SyncError, match="sent as"):
        engine.sync(changed(stream, "model.norm.weight", lambda t: t[:-1]))
    assert len(seen) == len(dict(named_tensors(tiny.policy(1))))
    engine.sync(named_tensors(tiny.policy(1)))


def swap_rows(weight: Tensor) -> None:
    weight[[0, 1]] = weight[[1, 0]]


CORRUPTIONS: dict[str, tuple[str, Callable[[nn.Module, nn.Module], None]]] = {
    "one value of one expert": (
        r"layers\.2\.mlp\.experts\.\d+\.(gate|up)_proj",
        lambda m, d: m.model.layers[2].mlp.experts.routed_experts.w13_weight[5, 3, 2].add_(1e-6),
    ),
    "two experts swapped": (
        r"layers\.1\.mlp\.experts\.0\.down_proj.*experts\.1\.down_proj",
        lambda m, d: swap_rows(m.model.layers[1].mlp.experts.routed_experts.w2_weight),
    ),
    "a router bias": (
        r"layers\.1\.mlp\.gate\.e_score_correction_bias",
        lambda m, d: m.model.layers[1].mlp.gate.e_score_correction_bias[3].add_(1e-3),
    ),
    "an MTP norm": (r"layers\.3\.hnorm", lambda m, d: d.model.layers["3"].hnorm.weight[0].mul_(2)),
    "an MTP expert": (
        r"layers\.3\.mlp\.experts",
        lambda m, d: d.model.layers["3"].mtp_block.mlp.experts.routed_experts.w2_weight[0].neg_(),
    ),
    "the stored head": (r"lm_head", lambda m, d: m.lm_head.weight[0, 0].add_(1)),
    "a projection": (
        r"layers\.0\.self_attn\.o_proj",
        lambda m, d: setattr(
            m.model.layers[0].self_attn.o_proj,
            "cpu_linear",
            lambda x, w, b, old=m.model.layers[0].self_attn.o_proj.cpu_linear: old(x, w, b) * 1.001,
        ),
    ),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_of_the_engines_memory_is_named(
    engine: Engine, tiny: Any, corruption: str
) -> None:
    engine.sync(named_tensors(tiny.policy(1)))
    engine.link.verify()
    message, corrupt = CORRUPTIONS[corruption]
    with torch.no_grad():
        corrupt(*models(engine))
    with pytest.raises(SyncError, match=message):
        engine.link.verify()
    engine.sync(named_tensors(tiny.policy(1)))


def test_a_bias_that_no_longer_reaches_the_router_is_found(engine: Engine, tiny: Any) -> None:
    engine.sync(named_tensors(tiny.policy(1)))
    experts = models(engine)[0].model.layers[1].mlp.experts.routed_experts
    bias = experts.e_score_correction_bias
    experts.e_score_correction_bias = nn.Parameter(bias.detach() * 0, requires_grad=False)
    try:
        with pytest.raises(SyncError, match="e_score_correction_bias"):
            engine.link.verify()
    finally:
        experts.e_score_correction_bias = bias
