"""PerCE in plain PyTorch and float64, from the formulas, row by row: no padding, no batching, nothing of the library."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit


# Bound on what is left between two computations in float64, in nats: scores are kept in float32, whose spacing is 2^-20
# between 8 and 16, where most log-probabilities of tiny models lie; a PIR is the difference of two; and twice that, since
# the models' norms compute in float32 still
FLOAT32 = 2**-18

# Bound on the root mean square of what bfloat16 arithmetic does to SmolLM2's log-probabilities, in nats: some 10 roundings
# in each of 30 layers, 2^-9 of the value each, add up as their root, and its logits spread by 3 nats (standard deviation):
# sqrt(300) * 2^-9 * 3 = 0.1; thrice
BF16 = 0.3


@dataclass
class Row:
    """`before + persona + after` is the prompt; the tests build rows from these parts, so nothing must be found in them."""

    before: list[int]
    persona: list[int]
    after: list[int]
    response: list[int]
    weights: list[float] | None = None  # that come with the row, one for each token of the response

    def tokenized(self) -> dict[str, list]:
        prompt = self.before + self.persona + self.after
        mask = [0] * len(self.before) + [1] * len(self.persona) + [0] * len(self.after + self.response)
        row = {
            "input_ids": prompt + self.response,
            "labels": [-100] * len(prompt) + self.response,
            "persona_mask": mask,
        }
        # Where nothing is trained, a weight has no effect
        return row if self.weights is None else row | {"token_weights": [9.0] * len(prompt) + self.weights}


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


def masked_context_log_probs(model, row: Row, dtype=torch.float64):
    """The counterfactual with everything in place: full sequence, and a 4D mask that hides the persona's tokens."""
    ids = row.tokenized()["input_ids"]
    size, start, end = len(ids), len(row.before), len(row.before) + len(row.persona)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[:, start:end] = False
    seen |= torch.eye(size, dtype=torch.bool)  # a row of the softmax needs one entry; no other token sees these
    bias = torch.zeros(1, 1, size, size, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
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
    dft: bool = False,
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
            elif weighting == "given":
                weights = torch.tensor(row.weights, dtype=torch.float64)
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
        probs = log_probs.exp() if dft else torch.ones_like(log_probs)
        total = total - (weights.detach() * probs.detach() * log_probs).sum()
        count += len(row.response)
    loss = total / count
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Reference(loss.item(), gradients, all_pir, all_weights)


def put_4bit_weights(model, quantized):
    """Put into a model in full precision the values that the 4-bit weights of another one stand for."""
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, Linear4bit)}
    assert layers
    for name, layer in layers.items():
        model.get_submodule(name).weight.data.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))
