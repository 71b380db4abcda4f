"""Scoring labelled positions only, against TRL's own path on CPU."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer import utils

from conftest import TINY_CONFIGS, make_tiny_model
from reference import make_rows
from trl_perce import DataCollatorForPerCE
from trl_perce.training.fused_head import labelled_positions_only


OUTPUTS = ("log_probs", "entropy", "is_top1")


def score(kind, batch, labelled_only):
    """Per-token outputs, gradients of a loss, and floating-point operations of the head's projection."""
    model = make_tiny_model(kind).double()  # float32's own rounding is about 1e-6, and differs from one CPU to another
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    with FlopCounterMode(display=False) as counter:
        if labelled_only:
            with labelled_positions_only():
                outputs = model(**batch, fused_lm_head=True)
        else:
            outputs = model(**batch, fused_lm_head=True)
        forward = counter.get_total_flops()
    # The weights differ from token to token, as those of PerCE do
    weights = torch.linspace(0.8, 5.0, outputs.log_probs.numel()).view_as(outputs.log_probs)
    (-(weights * outputs.log_probs).sum()).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}, forward


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_outputs_and_gradients_are_trls(kind):
    batch = DataCollatorForPerCE(pad_token_id=3)([row.tokenized() for row in make_rows(seed=51, count=5)])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    ours, gradients, ours_flops = score(kind, batch, labelled_only=True)
    theirs, expected, theirs_flops = score(kind, batch, labelled_only=False)
    assert torch.equal(ours.label_mask, theirs.label_mask) and torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.allclose(ours.log_probs, theirs.log_probs, rtol=1e-6, atol=1e-6)
    assert torch.allclose(ours.entropy, theirs.entropy, rtol=1e-6, atol=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    # What is saved is the projection of the positions without a label
    skipped = int((~ours.label_mask).sum())
    assert skipped > 0 and theirs_flops - ours_flops == 2 * skipped * 32 * 400


def test_a_batch_without_labels_has_a_loss_of_zero_and_zero_gradients():
    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    outputs, gradients, _ = score("llama", batch, labelled_only=True)
    assert outputs.log_probs.tolist() == [[0.0, 0.0]]
    assert all(gradient is None or not gradient.any() for gradient in gradients.values())


def test_nothing_is_left_behind_even_after_an_error():
    before = utils._use_triton
    with pytest.raises(RuntimeError), labelled_positions_only():
        assert utils._use_triton(torch.device("cpu")) and not utils._use_triton(torch.device("meta"))
        raise RuntimeError
    assert utils._use_triton is before and not utils._use_triton(torch.device("cpu"))
