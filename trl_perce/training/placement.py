# SPDX-License-Identifier: Apache-2.0

"""Models that `device_map` has split over devices, or offloaded to CPU memory or the disk (Accelerate keeps those weights on `meta`)."""

import torch


def input_device(model) -> torch.device:
    """
    Where a model takes its inputs.

    Args:
        model ([`~torch.nn.Module`]): Whole, split or offloaded.

    Returns:
        `torch.device`: That of its first weight that is not offloaded; the CPU if all are. Accelerate's hooks move on from there.
    """
    devices = (weight.device for weight in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def check_placement(model, trained: bool = False) -> None:
    """
    Raise a `ValueError` on weights that `device_map` has offloaded and that are needed where they lie: a head, whose weight the
    log-probabilities are computed from directly, or any weight in training.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): With its head.
        trained (`bool`, *optional*, defaults to `False`): Whether it is to be trained.
    """
    if getattr(model, "hf_device_map", None) is None:  # FSDP, too, loads a model onto `meta`, in all processes but one
        return
    offloaded = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if trained and offloaded:
        raise ValueError(
            f"`device_map` has offloaded {len(offloaded)} weights to CPU memory or the disk, such as {offloaded[0]!r}, where they "
            "cannot be trained. Leave `device_map` out, load the model in 4 bit (`load_in_4bit`), or use more GPUs."
        )
    head = model.get_output_embeddings()
    if head is not None and any(weight.device.type == "meta" for weight in head.parameters()):
        raise ValueError(
            "`device_map` has offloaded the head to CPU memory or the disk, and log-probabilities are computed from its weight "
            "directly. Name a device for it in `device_map`, such as {'': 'disk', 'lm_head': 0}."
        )
