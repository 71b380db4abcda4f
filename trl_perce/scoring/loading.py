# SPDX-License-Identifier: Apache-2.0

"""Models and tokenizers for scoring."""

import logging
import warnings

from accelerate import PartialState
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file
from trl.trainer.utils import create_model_from_path

from ..config import PerCEConfig
from ..training.checks import load_tokenizer


logger = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An adapter does not fit the model that it is put on."""


def find_adapter(name: str, adapter: str | None = None) -> tuple[str, str | None]:
    """
    Tell a model from an adapter.

    Args:
        name (`str`): Name or folder of a model, or of an adapter.
        adapter (`str`, *optional*): Name or folder of an adapter to put on it.

    Returns:
        `tuple[str, str | None]`: The base model's name and the adapter's.

    Raises:
        `ValueError`: Both are adapters, or `adapter` is none.
    """
    is_adapter = find_adapter_config_file(name) is not None
    if adapter is None:
        return (PeftConfig.from_pretrained(name).base_model_name_or_path, name) if is_adapter else (name, None)
    if is_adapter:
        raise ValueError(
            f"Both {name!r} and {adapter!r} are adapters. Give the base model as the model, or leave one out."
        )
    if find_adapter_config_file(adapter) is None:
        raise ValueError(
            f"There is no 'adapter_config.json' in {adapter!r}. Give the folder or the name of a PEFT adapter."
        )
    return name, adapter


def load_scoring_tokenizer(
    base: str, adapter: str | None, args: PerCEConfig, processing_class=None
) -> PreTrainedTokenizerBase:
    """
    The tokenizer that lies with the adapter (TRL saves the one of the training there, with its chat template), or else
    that of the base model.

    Args:
        base (`str`): Name or folder of the base model.
        adapter (`str` or `None`): Name or folder of the adapter, if any.
        args ([`PerCEConfig`]): Gives `trust_remote_code` and the model's revision.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): Goes first, if given.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: A fast tokenizer.
    """
    if processing_class is None and adapter is not None:
        saved = cached_file(adapter, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
        if saved is not None:
            processing_class = AutoTokenizer.from_pretrained(adapter, trust_remote_code=args.trust_remote_code)
    return load_tokenizer(base, args, processing_class)


def load_model(
    base: str, adapter: str | None, args: PerCEConfig, quantization_config=None
) -> PreTrainedModel | PeftModel:
    """
    Load a model for scoring, onto the GPU(s) if there are any; of several processes (Accelerate), each onto its own.

    Args:
        base (`str`): Name or folder of the base model.
        adapter (`str` or `None`): Name or folder of the adapter to put on it, if any.
        args ([`PerCEConfig`]): Gives `model_init_kwargs`; without a `dtype` there, the model keeps its own.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): Quantization of the base model.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: In evaluation mode.

    Raises:
        `AdapterError`: Weights of the adapter have no place in the model.
    """
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    state = PartialState()
    if state.num_processes > 1 and state.device.type != "cpu":
        kwargs.setdefault("device_map", {"": state.device})  # TRL's "auto" would spread each copy over all GPUs
    model = create_model_from_path(base, **kwargs)
    return (model if adapter is None else _put_on(model, base, adapter)).eval()


def _put_on(model: PreTrainedModel, base: str, adapter: str) -> PeftModel:
    """Put an adapter on a model; PEFT would leave out what has no place there, and go on with the model as it was."""
    on = f"the model {base!r} ({type(model).__name__})"
    weights = load_peft_weights(adapter, device="cpu")
    try:
        with warnings.catch_warnings():
            # Hundreds of names; what does not fit is said below
            warnings.filterwarnings("ignore", "Found missing adapter keys|You have passed exclude_modules")
            peft_model = PeftModel.from_pretrained(model, adapter)
        lost = set_peft_model_state_dict(peft_model, weights).unexpected_keys
    except (ValueError, RuntimeError) as error:  # no such modules, or other sizes
        reason = next(iter(str(error).splitlines()[-1:]), "").strip()
        raise AdapterError(f"The adapter {adapter!r} does not fit {on}: {reason}") from error
    if peft_model.active_peft_config.is_prompt_learning:  # PEFT puts these elsewhere, and fails if they do not fit
        return peft_model
    if lost or not weights:
        expected = next((name for name, _ in peft_model.named_parameters() if ".lora_" in name), None)
        raise AdapterError(
            f"{len(lost)} of the {len(weights)} weights of the adapter {adapter!r} have no place in {on}, such as "
            f"{next(iter(lost), None)!r}"
            + (f"; the model has {expected!r}" if expected else "")
            + ". It was trained on another model or class: its model card names which."
        )
    if all(not weight.any() for name, weight in weights.items() if "lora_B" in name) and "lora_B" in str([*weights]):
        logger.warning(f"The adapter {adapter!r} changes nothing: all its `lora_B` are 0, as before training.")
    return peft_model
