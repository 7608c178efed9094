"""MTP as the report has it, in plain loops: one document at a time, stock decoder layers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp import IGNORE


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
