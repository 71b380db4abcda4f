# SPDX-License-Identifier: Apache-2.0

"""What of a model is trained: where adapters cannot sit, and the parts that text alone never runs through."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from ..config import PerCEConfig
from ..utils.logger import get_logger


logger = get_logger(__name__)

# Layers of Mamba whose weights its kernels take directly, so that an adapter on them has no effect and no gradient
_READ_BY_KERNELS = ("out_proj", "x_proj", "dt_proj")


def trains_text_alone(train_dataset) -> bool:
    """
    Whether a dataset has no images.

    Args:
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Its first row is looked at.

    Returns:
        `bool`: Whether it is text, tokenized or not.
    """
    return not {"image", "images"} & {*next(iter(train_dataset), {})}


def fit_adapter(peft_config: Any, model, args: PerCEConfig, quantization_config=None):
    """
    Keep an adapter off what it could not train, and say what it leaves out: towers of other modalities (see [`unused_by_text`]); with
    `all-linear` also the layers of Mamba whose weights its kernels take directly, and the experts of a mixture, which are no linear
    layers.

    Args:
        peft_config ([`~peft.PeftConfig`] or `None`): As it was passed. It is not changed.
        model (`str` or [`~transformers.PreTrainedModel`]): A model, or the name of one, of which only the configuration is read.
        args ([`PerCEConfig`]): Gives `trust_remote_code` and `model_init_kwargs`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): Of the base model, if it is loaded by its name.

    Returns:
        [`~peft.PeftConfig`] or `None`: One to use instead, with `exclude_modules`.
    """
    if getattr(peft_config, "target_modules", None) is None or not hasattr(peft_config, "exclude_modules"):
        return peft_config
    quantized = quantization_config is not None or getattr(model, "quantization_method", None) is not None
    model = _skeleton(model, args) if isinstance(model, str) else model
    if not isinstance(model, PreTrainedModel):
        return peft_config
    unused = unused_by_text(model)
    excluded = [f"{re.escape(name)}\\..*" for name in unused]
    if unused:
        logger.warning(f"Only text is trained, so the adapter leaves out:\n  - {_listed(unused)}")
    if str(peft_config.target_modules).lower() == "all-linear":
        direct = [*dict.fromkeys(_any_layer(name) for name in _read_by_kernels(model))]
        excluded += direct
        if direct:
            kinds = sorted({name.split(".")[-1] for name in direct})
            logger.warning(
                f"The adapter leaves out {', '.join(kinds)} of the Mamba layers:\ntheir kernels read the weights past an adapter."
            )
        _say_experts(model, peft_config, quantized)
    if not excluded:
        return peft_config
    peft_config = copy.copy(peft_config)
    given = peft_config.exclude_modules
    if given:
        own = given if isinstance(given, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(given)))})"
        excluded = [own, *excluded]
    peft_config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in excluded)
    return peft_config


def freeze_unused(model) -> None:
    """
    Freeze what text alone never runs through: it would get no gradient, for which distributed training waits in vain.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As `SFTTrainer` has set it up, before there is an optimizer.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    frozen = []
    for name in unused_by_text(base):
        trained = [weight for weight in base.get_submodule(name).parameters() if weight.requires_grad]
        for weight in trained:
            weight.requires_grad_(False)
        frozen += [name] if trained else []
    if frozen:
        logger.warning(f"Only text is trained, so these stay frozen:\n  - {_listed(frozen)}")


def unused_by_text(model: PreTrainedModel) -> list[str]:
    """
    Parts of a multimodal model that text alone does not run through: what lies outside of its decoder and its embeddings, such as a
    vision tower and its projector.

    Args:
        model ([`~transformers.PreTrainedModel`]): It may be without weights.

    Returns:
        `list[str]`: Names of modules with weights, none inside of another. Empty of a model that is text alone.
    """
    if model.config.get_text_config() is model.config:
        return []
    kept = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    within = {id(module) for part in kept if part is not None for module in part.modules()}

    def outside(module: torch.nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            own = {id(part) for part in child.modules()}
            if not own & within:
                if any(True for _ in child.parameters()):
                    yield f"{path}{name}"
            elif id(child) not in within:
                yield from outside(child, f"{path}{name}.")

    return [*outside(model, "")]


def _skeleton(name: str, args: PerCEConfig) -> PreTrainedModel | None:
    """A model without weights, of the class that TRL will load; `None` where that is not one of Transformers'."""
    revision = (args.model_init_kwargs or {}).get("revision")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        if architecture is None:
            return None
        with init_empty_weights():
            return architecture(config)
    except Exception as error:  # loading will say it, if it is an error at all
        logger.debug(f"No skeleton of {name!r}: {error}")
        return None


def _read_by_kernels(model: PreTrainedModel) -> Iterator[str]:
    for name, module in model.named_modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):  # a layer of Mamba 1 or 2
            yield from (f"{name}.{child}" for child, _ in module.named_children() if child in _READ_BY_KERNELS)


def _any_layer(name: str) -> str:
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))


def _listed(names: list[str]) -> str:
    return "\n  - ".join(names)


def experts(model: PreTrainedModel) -> dict[str, int]:
    """
    Experts of a mixture that are kept as one parameter for all of a layer, not as linear layers.

    Args:
        model ([`~transformers.PreTrainedModel`]): It may be without weights.

    Returns:
        `dict[str, int]`: How `target_parameters` calls them (their name inside of a layer) → their number of values in all layers.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if "expert" in f"{path} {type(module).__name__}".lower():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3:
                    inside = re.split(r"\.\d+\.", f"{path}.{name}")[-1]
                    found[inside] = found.get(inside, 0) + weight.numel()
    return found


def _say_experts(model: PreTrainedModel, peft_config, quantized: bool) -> None:
    given = getattr(peft_config, "target_parameters", None) or ()
    left = {name: size for name, size in experts(model).items() if not any(name.endswith(one) for one in given)}
    if left:
        share = sum(left.values()) / sum(weight.numel() for weight in model.parameters())
        neither = "neither trained nor quantized" if quantized else "not trained"
        logger.warning(
            f"The experts ({share:.0%} of the weights) are no linear layers: {neither}.\nTo train them too, set `target_parameters` "
            "(`lora_target_parameters`), beside\n`all-linear` for the target modules, to\n  - " + _listed([*left])
        )
