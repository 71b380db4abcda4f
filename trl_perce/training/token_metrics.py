# SPDX-License-Identifier: Apache-2.0

"""The metrics of a log line: means over the trained tokens of all processes and micro-batches since the last one."""

from collections import defaultdict

import torch
from accelerate import Accelerator


class TokenMetrics:
    """
    Sums over trained tokens, kept on the device until a log line wants them.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        bounds (`tuple[float, float]`): Clipping bounds of the weights.
    """

    def __init__(self, accelerator: Accelerator, bounds: tuple[float, float]):
        self.accelerator, self.bounds = accelerator, bounds
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(
        self,
        mode: str,
        log_probs: torch.Tensor,
        weights: torch.Tensor,
        pir: torch.Tensor,
        factual_tokens: torch.Tensor | int,
        counterfactual_tokens: int,
    ) -> None:
        """
        Add a micro-batch.

        Args:
            mode (`str`): `"train"` or `"eval"`, which are kept apart.
            log_probs (`torch.Tensor` of shape `(N,)`): Of the trained tokens, in nats.
            weights (`torch.Tensor` of shape `(N,)`): Theirs, before they are normalized.
            pir (`torch.Tensor` of shape `(K,)`): Of those that the counterfactual pass scores, in nats.
            factual_tokens (`torch.Tensor` or `int`): Tokens of the factual pass, without padding.
            counterfactual_tokens (`int`): Tokens that the counterfactual pass ran for them.
        """
        sums = [
            *(log_probs.numel(), -log_probs.sum(), weights.sum()),
            *((weights <= self.bounds[0]).sum(), (weights >= self.bounds[1]).sum()),
            *(pir.numel(), pir.sum(), (pir > 1).sum()),
            *(counterfactual_tokens, factual_tokens),
        ]
        self._sums[mode].append(torch.stack([torch.as_tensor(x, device=log_probs.device).float() for x in sums]))

    def pop(self, mode: str) -> dict[str, float]:
        """
        The metrics of what was added since the last call, and start anew. To be called by all processes together.

        Args:
            mode (`str`): `"train"` or `"eval"`.

        Returns:
            `dict[str, float]`: `nll` and `pir/mean` (nats a token), `pir/personal_fraction`, `weight/mean`, `weight/at_min` and
            `weight/at_max`, `counterfactual/token_ratio`. Means over no token at all are left out.
        """
        if mode not in self._sums:
            return {}
        # Summed on the CPU in float64, which counts beyond float32's 16 million
        total = torch.stack(self._sums.pop(mode)).cpu().double().sum(0).float().to(self.accelerator.device)
        tokens, nll, weight, at_min, at_max, paired, pir, personal, ours, theirs = self.accelerator.reduce(
            total, reduction="sum"
        ).tolist()
        metrics: dict[str, float] = {}
        if tokens:
            metrics |= {"nll": nll / tokens, "weight/mean": weight / tokens}
            metrics |= {"weight/at_min": at_min / tokens, "weight/at_max": at_max / tokens}
        if paired:
            metrics |= {"pir/mean": pir / paired, "pir/personal_fraction": personal / paired}
        return metrics | {"counterfactual/token_ratio": ours / theirs}
