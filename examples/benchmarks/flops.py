# SPDX-License-Identifier: Apache-2.0

"""
The arithmetic of a training step, counted from shapes: how much longer than TRL's SFT must a PerCE step take?

Counted are the floating-point operations (2 per multiply-add) of the matrix products of a decoder with frozen base weights
and LoRA adapters on all its linear layers:

- **forward**: the linear layers, the adapters, the attention scores and values;
- **backward**: the base weights are frozen, so their layers cost only the gradient of their input (1 × forward); the adapters
  cost that of their input and of their weights (2 ×); attention costs 2.5 ×, since SDPA computes its scores anew. Without
  gradient checkpointing nothing below the first layer's adapters needs a gradient;
- **recompute**, with gradient checkpointing: the forward of the layers once more, but for the product that ends each layer
  (the `B` of the down projection), whose result no gradient needs;
- **head**, TRL's fused one: the logits forward, and again backward, and the gradient of its input. TRL scores the labelled
  positions where Triton runs (CUDA), and every position elsewhere. PerCE scores the labelled ones everywhere.

Attention is causal: a token attends to itself and to what stands before. Not counted are norms, activations, softmax, the
optimizer and, in NF4, dequantization: they are in the measured times.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Row:
    """
    Lengths of a training row, in tokens.

    Args:
        persona (`int`): Persona, which the counterfactual pass does without.
        question (`int`): The rest of the prompt.
        response (`int`): Response, the labelled tokens.
    """

    persona: int
    question: int
    response: int

    @property
    def length(self) -> int:
        return self.persona + self.question + self.response


def _linear_layers(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Input and output sizes of a decoder layer's linear layers: q, k, v, o, gate, up, down."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]


def _base(config: PreTrainedConfig, tokens: int) -> int:
    """Base linear layers of one decoder layer, forward."""
    return 2 * tokens * sum(inputs * outputs for inputs, outputs in _linear_layers(config))


def _adapters(config: PreTrainedConfig, tokens: int, rank: int) -> int:
    """Adapters of one decoder layer, forward."""
    return 2 * tokens * rank * sum(inputs + outputs for inputs, outputs in _linear_layers(config))


def _attention(config: PreTrainedConfig, tokens: int, causal: bool) -> int:
    """Scores and values of one decoder layer, forward."""
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    return 2 * 2 * pairs * config.num_attention_heads * config.head_dim


def _head(config: PreTrainedConfig, positions: int) -> int:
    """Logits of so many positions."""
    return 2 * positions * config.hidden_size * config.vocab_size


def scoring_pass(config: PreTrainedConfig, tokens: int, scored: int, rank: int, causal: bool = True) -> int:
    """
    Floating-point operations of a forward pass without gradient over one row.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of a Llama or Qwen3.
        tokens (`int`): Length of the row.
        scored (`int`): Number of positions that the head scores.
        rank (`int`): Rank of the LoRA adapters.
        causal (`bool`, *optional*, defaults to `True`): Whether attention computes no pair of a token and a later one.

    Returns:
        `int`: Floating-point operations.
    """
    layer = _base(config, tokens) + _adapters(config, tokens, rank) + _attention(config, tokens, causal)
    return config.num_hidden_layers * layer + _head(config, scored)


def training_pass(
    config: PreTrainedConfig, tokens: int, scored: int, rank: int, checkpointing: bool, causal: bool = True
) -> int:
    """
    Floating-point operations of a forward and a backward pass over one row.

    Args:
        checkpointing (`bool`): Whether the layers' activations are computed anew in the backward pass.

    The other arguments, and what is returned, are as in [`scoring_pass`].
    """
    base, adapters = _base(config, tokens), _adapters(config, tokens, rank)
    attention = _attention(config, tokens, causal)
    layer = base + adapters + attention  # forward
    layer += base + 2 * adapters + 5 * attention // 2  # backward
    unneeded = 0
    if checkpointing:
        layer += base + adapters + attention - 2 * tokens * rank * config.hidden_size
    else:
        # The input of the first layer needs no gradient, and q, k and v stand on it
        unneeded = sum(2 * tokens * inputs * (outputs + rank) for inputs, outputs in _linear_layers(config)[:3])
    return config.num_hidden_layers * layer - unneeded + 3 * _head(config, scored)


def step_ratio_floor(
    config: PreTrainedConfig,
    row: Row,
    rank: int,
    checkpointing: bool,
    counterfactual: str | None,
    refresh_epochs: int = 1,
    sft_scores_all: bool = False,
) -> float:
    """
    Operations of a PerCE step over those of TRL's SFT step on the same rows.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of a Llama or Qwen3.
        row ([`Row`]): Lengths of every row of the batch.
        rank (`int`): Rank of the LoRA adapters.
        checkpointing (`bool`): Whether gradient checkpointing is on.
        counterfactual (`str` or `None`): `"drop"`, `"mask"`, or `None` for a weighting without a counterfactual pass.
        refresh_epochs (`int`, *optional*, defaults to `1`):
            The counterfactual pass runs in one of so many epochs; the ratio is that of their mean.
        sft_scores_all (`bool`, *optional*, defaults to `False`):
            Whether TRL's head scores every position, as it does without Triton.

    Returns:
        `float`: The ratio. It may be below 1 where SFT scores positions that PerCE does not.
    """
    scored = row.length - 1 if sft_scores_all else row.response
    sft = training_pass(config, row.length, scored, rank, checkpointing)
    factual = training_pass(config, row.length, row.response, rank, checkpointing)
    if counterfactual is None:
        return factual / sft
    tokens = row.length if counterfactual == "mask" else row.length - row.persona
    return (factual + scoring_pass(config, tokens, row.response, rank) / refresh_epochs) / sft
