# SPDX-License-Identifier: Apache-2.0

"""TRL's fused head on labelled positions only, and the model's own logits in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer import utils


# What is put around a model, to be called as one with TRL's fused head
Head = Callable[[Any], Callable[..., Any]]


class ModelCheckError(ValueError):
    """A model on which log-probabilities or the loss would be wrong. The message says where, by how much, and what to set."""


@contextmanager
def labelled_positions_only() -> Iterator[None]:
    """
    Let TRL's fused LM head project only the labelled positions on CPU too, inside of this context.

    TRL 1.16 does so on CUDA and XPU; elsewhere it scores every position, so that the tile shapes stay the same for
    devices that would recompile. On a long prompt that is a third of a training step on CPU. Log-probabilities and
    gradients are the same up to rounding.
    """
    compacts = utils._use_triton  # decides nothing but this in `trl.trainer.utils`
    utils._use_triton = lambda device: device.type == "cpu" or compacts(device)
    try:
        yield
    finally:
        utils._use_triton = compacts


def logits_head(model) -> Callable[..., Any]:
    """
    A model's logits in place of TRL's fused head, for models whose logits are more than a product with the head's weight: scaled, capped or
    passed through further layers in a way that TRL (1.16) does not know. It holds the logits of all positions.

    Args:
        model ([`~torch.nn.Module`]): As it is run (wrapped), with TRL's fused head or without.

    Returns:
        `Callable`: To be called as the model. With `fused_lm_head=True` it gives TRL's `FusedCausalLMOutput` with `log_probs` (in
        nats), `entropy`, `is_top1`, `label_mask` and the model's own `aux_loss`, if any; a [`ModelCheckError`] if one
        is asked for and there is none.
    """

    def call(fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs):
        if not fused_lm_head or labels is None:
            return model(**kwargs, **({} if labels is None else {"labels": labels}))
        outputs = model(**kwargs)
        aux_loss = getattr(outputs, "aux_loss", None)
        if kwargs.get("output_router_logits") and aux_loss is None:
            raise ModelCheckError(
                f"{type(outputs).__name__} has no auxiliary loss, so that there is nothing to weight by `router_aux_loss_coef`. Set it "
                "to 0."
            )
        # Virtual tokens (prompt tuning) come before those of the labels
        logits = outputs.logits[:, -labels.size(1) : -1]
        labels = labels[:, 1:].to(logits.device)
        mask = labels != -100
        scores = logits[mask].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found = {
            "log_probs": scores.gather(1, labels[mask][:, None])[:, 0],
            "entropy": -(scores.exp() * scores).sum(-1).detach(),
            "is_top1": scores.argmax(-1) == labels[mask],
        }
        return utils.FusedCausalLMOutput(
            **{name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in found.items()},
            label_mask=mask,
            aux_loss=aux_loss,
        )

    return call
