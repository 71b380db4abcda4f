# SPDX-License-Identifier: Apache-2.0

"""
Token weights: pure functions on flat tensors of trained tokens.

`N` is the number of trained tokens. Log-probabilities and entropies are in nats, weights have no unit. All inputs are
taken as constants: the callers detach them, since no gradient flows through a weight.
"""

import torch


def personal_influence_ratio(log_probs: torch.Tensor, counterfactual_log_probs: torch.Tensor) -> torch.Tensor:
    """
    Personal Influence Ratio of response tokens (PerCE paper, the definition of PIR):

    `PIR(y_i; θ) = log P_θ(y_i | p, x, y_<i) − log P_θ(y_i | x, y_<i)`

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities with the persona `p` in the context, in nats.
        counterfactual_log_probs (`torch.Tensor` of shape `(N,)`): The same without it, in nats.

    Returns:
        `torch.Tensor` of shape `(N,)`: PIR in nats. A token with PIR > 1 is a *personal token*.

    Raises:
        `ValueError`: The two passes did not score the same number of tokens.
    """
    if log_probs.shape != counterfactual_log_probs.shape:
        raise ValueError(
            f"The factual pass scored {log_probs.numel()} tokens and the counterfactual pass "
            f"{counterfactual_log_probs.numel()}. They must be the same tokens."
        )
    return log_probs - counterfactual_log_probs


def perce_weights(pir: torch.Tensor, clip_min: float = 0.8, clip_max: float = 5.0) -> torch.Tensor:
    """
    Weights of the PerCE loss: `w_i = clip(PIR(y_i; θ), m, M)` (PerCE paper, E-step; bounds of its Table 7).

    Args:
        pir (`torch.Tensor` of shape `(N,)`): Personal Influence Ratios, in nats.
        clip_min (`float`, *optional*, defaults to `0.8`): Lower bound `m`.
        clip_max (`float`, *optional*, defaults to `5.0`): Upper bound `M`.

    Returns:
        `torch.Tensor` of shape `(N,)`: Weights.
    """
    return pir.clamp(clip_min, clip_max)


def loss_weights(log_probs: torch.Tensor, clip_min: float = 0.8, clip_max: float = 5.0) -> torch.Tensor:
    """
    Weights of LossCE, the paper's baseline after [Rho-1](https://huggingface.co/papers/2404.07965): the token's own
    loss, `w_i = clip(−log P_θ(y_i | p, x, y_<i), m, M)`.

    Rho-1 itself keeps the tokens whose loss exceeds that of a reference model the most and drops the others; the PerCE
    paper has no reference model and weights by the loss, within the bounds of PerCE so that the methods compare.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities of the trained tokens, in nats.
        clip_min (`float`, *optional*, defaults to `0.8`): Lower bound `m`.
        clip_max (`float`, *optional*, defaults to `5.0`): Upper bound `M`.

    Returns:
        `torch.Tensor` of shape `(N,)`: Weights.
    """
    return (-log_probs).clamp(clip_min, clip_max)


def entropy_weights(entropy: torch.Tensor, clip_min: float = 0.8, clip_max: float = 5.0) -> torch.Tensor:
    """
    Weights of EntCE, the paper's baseline after the [80/20 rule](https://huggingface.co/papers/2506.01939): the entropy
    of the predictive distribution, `w_i = clip(H_i, m, M)` with `H_i = −Σ_v P_θ(v | p, x, y_<i) log P_θ(v | p, x, y_<i)`.

    The 80/20 rule itself trains on the fifth of the tokens with the highest entropy and drops the others; the PerCE
    paper weights by the entropy, within the bounds of PerCE so that the methods compare.

    Args:
        entropy (`torch.Tensor` of shape `(N,)`): Entropies of the predictions of the trained tokens, in nats.
        clip_min (`float`, *optional*, defaults to `0.8`): Lower bound `m`.
        clip_max (`float`, *optional*, defaults to `5.0`): Upper bound `M`.

    Returns:
        `torch.Tensor` of shape `(N,)`: Weights.
    """
    return entropy.clamp(clip_min, clip_max)


def normalize_weights(weights: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    Divide each weight by the mean weight of its own row, so that a row weighs as much as under plain CE:
    `w_i ← w_i · n_r / Σ_{j in r} w_j`, with `n_r` the number of trained tokens of row `r`.

    Args:
        weights (`torch.Tensor` of shape `(N,)`): Weights, not negative. A row whose weights are all 0 keeps them.
        rows (`torch.Tensor` of shape `(N,)` and dtype `torch.int64`): For each weight, the index of its row.
        num_rows (`int`): Number of rows; every index is below it.

    Returns:
        `torch.Tensor` of shape `(N,)`: Weights whose mean over each row is 1.
    """
    total = weights.new_zeros(num_rows).index_add(0, rows, weights)
    count = weights.new_zeros(num_rows).index_add(0, rows, torch.ones_like(weights))
    mean = (total / count.clamp(min=1))[rows]
    return torch.where(mean > 0, weights / mean, weights)
