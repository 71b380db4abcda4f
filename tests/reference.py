"""PerCE in plain PyTorch and float64, from the formulas, row by row: no padding, no batching, nothing of the library."""

import copy
from dataclasses import dataclass

import torch


@dataclass
class Row:
    """`before + persona + after` is the prompt; the tests build rows from these parts, so nothing must be found in them."""

    before: list[int]
    persona: list[int]
    after: list[int]
    response: list[int]

    def tokenized(self) -> dict[str, list[int]]:
        prompt = self.before + self.persona + self.after
        mask = [0] * len(self.before) + [1] * len(self.persona) + [0] * len(self.after + self.response)
        return {
            "input_ids": prompt + self.response,
            "labels": [-100] * len(prompt) + self.response,
            "persona_mask": mask,
        }


def make_rows(seed: int, count: int, vocab: int = 400, with_persona: float = 0.75) -> list[Row]:
    """Ragged rows: 1-6 tokens before, 0-12 of persona, 1-5 after, 1-7 of response."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        size = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(4, vocab, (size,), generator=generator).tolist()

    rows = []
    for index in range(count):
        has_persona = index == 0 or float(torch.rand((), generator=generator)) < with_persona
        rows.append(Row(tokens(1, 6), tokens(1, 12) if has_persona else [], tokens(1, 5), tokens(1, 7)))
    return rows


def response_log_probs(model, context: list[int], response: list[int], **kwargs):
    """Log-probabilities in nats and entropies of a response, from the raw logits of one row."""
    logits = model(input_ids=torch.tensor([context + response]), use_cache=False, **kwargs).logits[0]
    log_softmax = torch.log_softmax(logits[len(context) - 1 : -1], dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, torch.tensor(response)[:, None])[:, 0], entropy


def masked_context_log_probs(model, row: Row):
    """The counterfactual with everything in place: full sequence, and a 4D mask that hides the persona's tokens."""
    ids = row.tokenized()["input_ids"]
    size, start, end = len(ids), len(row.before), len(row.before) + len(row.persona)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[:, start:end] = False
    seen |= torch.eye(size, dtype=torch.bool)  # a row of the softmax needs one entry; no other token sees these
    bias = torch.zeros(1, 1, size, size, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    logits = model(
        input_ids=torch.tensor([ids]), attention_mask=bias, position_ids=torch.arange(size)[None], use_cache=False
    ).logits[0]
    log_softmax = torch.log_softmax(logits[size - len(row.response) - 1 : -1], dim=-1)
    return log_softmax.gather(1, torch.tensor(row.response)[:, None])[:, 0]


@dataclass
class Reference:
    loss: float
    gradients: dict[str, torch.Tensor]
    pir: list[list[float]]
    weights: list[list[float]]


def reference(
    model,
    rows: list[Row],
    weighting: str = "perce",
    counterfactual: str = "drop",
    clip_min: float = 0.8,
    clip_max: float = 5.0,
    normalization: str = "none",
) -> Reference:
    """Loss (nats a token), gradients, PIR and weights of one batch that holds all the rows."""
    model = copy.deepcopy(model).double().eval()
    total, count, all_pir, all_weights = 0.0, 0, [], []
    for row in rows:
        log_probs, entropy = response_log_probs(model, row.before + row.persona + row.after, row.response)
        with torch.no_grad():
            if weighting == "loss":
                weights = (-log_probs).clamp(clip_min, clip_max)
            elif weighting == "entropy":
                weights = entropy.clamp(clip_min, clip_max)
            elif weighting == "perce" and row.persona:
                if counterfactual == "drop":
                    without, _ = response_log_probs(model, row.before + row.after, row.response)
                else:
                    without = masked_context_log_probs(model, row)
                all_pir.append((log_probs - without).tolist())
                weights = (log_probs - without).clamp(clip_min, clip_max)
            else:
                weights = torch.ones_like(log_probs)
            if normalization == "sequence":
                weights = weights / weights.mean()
        all_weights.append(weights.tolist())
        total = total - (weights.detach() * log_probs).sum()
        count += len(row.response)
    loss = total / count
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Reference(loss.item(), gradients, all_pir, all_weights)
