# SPDX-License-Identifier: Apache-2.0

"""What must hold before a model loads, and the parts of a run that are looked up for it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftModel, PromptLearningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin
from transformers.integrations import get_reporting_integration_callbacks
from transformers.tokenization_mistral_common import MistralCommonBackend
from trl.trainer.utils import get_config_model_id

from ..config import PerCEConfig
from ..utils.logger import get_logger
from .collator import DataCollatorForPerCE, DataCollatorForTokenWeights


logger = get_logger(__name__)


def check_arguments(args: PerCEConfig, data_collator, kwargs: dict[str, Any]) -> None:
    """
    Raise a `ValueError` on arguments of the trainer that cannot go together, saying what to write instead.

    Args:
        args ([`PerCEConfig`]): Configuration of the trainer.
        data_collator ([`~transformers.DataCollator`] or `None`): The collator that was passed, if any.
        kwargs (`dict[str, Any]`): Further arguments of the trainer, such as `peft_config`.
    """
    peft_config = kwargs.get("peft_config")
    targets = getattr(peft_config, "target_modules", None) or ()
    if (
        re.fullmatch(targets, "lm_head")
        if isinstance(targets, str)
        else any(name.split(".")[-1] == "lm_head" for name in targets)
    ):
        raise ValueError(
            "The adapter sits on `lm_head`, where it would not be trained: log-probabilities are computed from "
            "`lm_head.weight` directly. Remove 'lm_head' from `target_modules` (`lora_target_modules`)."
        )
    if args.token_weighting == "uniform":
        return
    if args.label_smoothing_factor or kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            f"`token_weighting='{args.token_weighting}'` weights the log-probabilities of single tokens. Leave "
            "`label_smoothing_factor` at 0 and `compute_loss_func` unset, or set `token_weighting='uniform'`."
        )
    if args.packing or args.eval_packing:
        _check_packing(args)
    if (args.packing or args.padding_free) and isinstance(peft_config, PromptLearningConfig):
        raise ValueError(
            f"`packing` and `padding_free` do not go with a `{type(peft_config).__name__}`: PEFT ignores the positions that "
            "keep documents apart. Set both to `False`, or use a LoRA adapter."
        )
    ours, purpose = {
        "perce": (DataCollatorForPerCE, "does not build the counterfactual pass"),
        "given": (DataCollatorForTokenWeights, "does not pass the weights of the rows on"),
    }.get(args.token_weighting, (object, ""))
    if data_collator is not None and not isinstance(data_collator, ours):
        raise ValueError(
            f"`data_collator` is a `{type(data_collator).__name__}`, which {purpose}. Pass a `{ours.__name__}` or none."
        )


def check_model(model, kwargs: dict[str, Any]) -> None:
    """
    Raise a `ValueError` on a name of a model that cannot be trained as it is.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): As the trainer gets it. A model that is loaded is left to TRL.
        kwargs (`dict[str, Any]`): Further arguments of the trainer, such as `quantization_config`.
    """
    if not isinstance(model, str):
        return
    folder = Path(model).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"{model!r} is an adapter, of the model {base!r}. Write the model (`model_name_or_path`) to train a new adapter on it; "
            "`resume_from_checkpoint` continues a run. To train this adapter further, pass the trainer "
            "`PeftModel.from_pretrained(base_model, folder, is_trainable=True)`."
        )
    if kwargs.get("quantization_config") is not None and kwargs.get("peft_config") is None:
        raise ValueError(
            "A model in 4 or 8 bit can only be trained through an adapter. Set `use_peft` (`peft_config`), or leave out "
            "`load_in_4bit` and `load_in_8bit` (`quantization_config`)."
        )


def check_dataset(dataset, name: str) -> None:
    """
    Raise a `TypeError` on what is no dataset, and say how to make one of it.

    Args:
        dataset (`Any`): What was passed; `None` is left to TRL.
        name (`str`): Name of the argument.
    """
    remedies: dict[tuple[type, ...], str] = {
        (list, tuple): "Write `Dataset.from_list(rows)`",
        (str, Path): "Load it first: `load_dataset('json', data_files=path, split='train')`",
        (DatasetDict, IterableDatasetDict): "Give one of its splits, such as `dataset['train']`",
        (dict,): "Write `Dataset.from_dict(columns)`, or `Dataset.from_list([row])` of one row",
    }
    remedy = next((remedy for kinds, remedy in remedies.items() if isinstance(dataset, kinds)), None)
    if remedy is None and type(dataset).__name__ == "DataFrame":
        remedy = "Write `Dataset.from_pandas(frame, preserve_index=False)`"
    if remedy is not None:
        raise TypeError(f"`{name}` is a {type(dataset).__name__}, and a `datasets.Dataset` is needed. {remedy}.")


def check_trackers(report_to: list[str]) -> None:
    """
    Raise a `ValueError` on a tracker that is unknown or not installed. `Trainer` makes them when the model is loaded.

    Args:
        report_to (`list[str]`): Names, as in `TrainingArguments`.
    """
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"`report_to` is {', '.join(report_to)}: {error} Or write `report_to: none`.") from error


def _check_packing(args: PerCEConfig) -> None:
    if args.packing_strategy != "bfd":
        raise ValueError(
            f"`packing_strategy='{args.packing_strategy}'` cuts rows apart, and a response from its persona. Set "
            "`packing_strategy='bfd'`, or `token_weighting='uniform'`."
        )
    if args.eval_packing and not args.packing:
        raise ValueError(
            "`eval_packing=True` without `packing=True` pads packed rows, whose documents see each other (TRL 1.16). Set "
            "`packing=True` too, or `eval_packing=False`."
        )
    if args.max_length is None:
        raise ValueError("`packing=True` needs `max_length`, the number of tokens of a packed row. Set it.")


def is_prepared_by_trl(train_dataset, args: PerCEConfig) -> bool:
    """Whether `SFTTrainer` will tokenize `train_dataset`. Raises where PerCE could not work with what it gets instead."""
    if train_dataset is None:
        return False  # `SFTTrainer` says so
    first = next(iter(train_dataset), None)
    if first is None:
        raise ValueError("The train dataset is empty. Give it at least one row.")
    if "image" in first or "images" in first:
        if args.token_weighting != "uniform":
            raise ValueError(
                f"The dataset holds images, for which `token_weighting='{args.token_weighting}'` is not supported. Remove "
                "the image columns, or set `token_weighting='uniform'`."
            )
        return False
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        needed = {"perce": "persona_mask", "given": "token_weights"}.get(args.token_weighting)
        if needed is not None and needed not in first:
            raise ValueError(
                f"`skip_prepare_dataset=True` needs a dataset with the columns 'input_ids', 'labels' and {needed!r}; "
                f"it has {', '.join(map(repr, first))}."
            )
        return False
    return True


def load_processor(model, args: PerCEConfig):
    """
    The tokenizer of the run, or the processor of a multimodal model, loaded as `SFTTrainer` would once it has the model. Where a processor
    cannot be loaded, since it is not there or a package is missing, its tokenizer is all that text needs. Of Mistral's own tokenizer
    (mistral-common), which does not tell where its tokens are in a text, Hugging Face's takes the place.
    """
    by_name = isinstance(model, str)
    name = model if by_name else get_config_model_id(model.config)
    revision = (args.model_init_kwargs or {}).get("revision") if by_name else None
    kwargs = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(name, **kwargs)
    except (ImportError, OSError, ValueError) as error:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        reason = next(line.strip() for line in str(error).splitlines() if line.strip())
        logger.warning(f"The tokenizer alone is used, and saved, without the processor:\n{reason}")
        return tokenizer
    if isinstance(processor, MistralCommonBackend):
        return _load_instead_of_mistrals(name, revision) or processor
    return processor


def load_tokenizer(model, args: PerCEConfig, processing_class):
    """The tokenizer of the run: that of `processing_class`, or where it is `None`, of [`load_processor`]."""
    if processing_class is None:
        processing_class = load_processor(model, args)
    if isinstance(processing_class, ProcessorMixin):  # a vision-language model, of which only the text is trained
        tokenizer = processing_class.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or processing_class.chat_template
        processing_class = tokenizer
    if not getattr(processing_class, "is_fast", False):  # which Mistral's has not
        raise ValueError(
            f"The tokenizer ({type(processing_class).__name__}) gives no character offsets, without which the persona's "
            "tokens cannot be told. Use a fast tokenizer (one that is backed by the `tokenizers` library)"
            + (
                ": `PreTrainedTokenizerFast.from_pretrained(name)`, of a model with 'tokenizer.json'."
                if isinstance(processing_class, MistralCommonBackend)
                else "."
            )
        )
    return processing_class


def _load_instead_of_mistrals(name: str, revision: str | None) -> PreTrainedTokenizerFast | None:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
    except (OSError, ValueError):  # no 'tokenizer.json'
        return None
    logger.warning(f"{name}: Hugging Face's tokenizer is used instead of Mistral's own (mistral-common).")
    return tokenizer


def chat_template(args: PerCEConfig) -> str | None:
    """The template that `chat_template_path` names, which `SFTTrainer` will use; `None` if the tokenizer's own is used."""
    path = args.chat_template_path
    if path is None:
        return None
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code).chat_template


def warn_of_noise(model, args: PerCEConfig) -> bool:
    """
    Warn of what draws at random in a forward pass of training, naming each source. PIR is the difference of two passes, and two draws
    differ.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As `SFTTrainer` has set it up.
        args ([`PerCEConfig`]): Configuration of the trainer, for `neftune_noise_alpha`.

    Returns:
        `bool`: Whether there was anything to warn of.
    """
    sources: dict[tuple[str, float], str] = {}  # name and probability → whose it is
    for path, module in model.named_modules():
        found = {name: value for name, value in vars(module).items() if "drop" in name}  # of a functional dropout
        if isinstance(module, torch.nn.Dropout):
            name = "lora_dropout" if "lora_dropout" in path else path.split(".")[-1]
            found = {name: module.p}
        is_adapter = "lora_dropout" in found or isinstance(module, BaseTunerLayer)
        for name, value in found.items():
            for p in value.values() if isinstance(value, dict) else [value]:  # PEFT has one for each adapter
                if isinstance(p, int | float) and p is not True and p > 0:
                    sources.setdefault((name, p), "adapter" if is_adapter else "model")
    config = model.config.get_text_config().to_dict()
    lines = []
    for (name, p), owner in sources.items():
        keys = [key for key, value in config.items() if "drop" in key and value == p]
        # Some keep it under another name than the configuration, where more than one may have this value
        keys = [f"`{key}`" for key in keys if not key.startswith(("classifier_", "summary_"))]
        of_config = f" (config: {', '.join(keys)})" if owner == "model" and keys and f"`{name}`" not in keys else ""
        lines.append(f"the {owner}'s `{name}` {p:g}{of_config}")
    if args.neftune_noise_alpha:
        lines.append(f"`neftune_noise_alpha` {args.neftune_noise_alpha:g}")
    if lines:
        logger.warning(
            "Each of the two passes draws its own dropout or noise, which makes PIR\nnoisy. Set to 0:\n  - "
            + "\n  - ".join(lines)
        )
    return bool(lines)


def keep_4bit_weights_trainable_on_cpu(model) -> None:
    """
    Stop bitsandbytes from packing 4-bit weights for inference on the first forward pass in evaluation mode, on CPUs with
    AVX512-BF16. The packed weights stay when training goes on, and have no backward pass (bitsandbytes 0.50.2): all
    gradients behind the first such layer would silently be wrong.
    """
    for module in linear_4bit_modules(model):
        module.support_avx512bf16_for_cpu = False


def make_trainable_in_fp16(model) -> None:
    """
    Put the weights that are trained into float32, since the gradient scaler of `fp16` takes no others. TRL (1.16) casts a quantized
    model's adapters to bfloat16, which a card without bfloat16 could not train.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As `SFTTrainer` has set it up.

    Raises:
        `ValueError`: It has no adapter, and is not in float32: casting it would double its memory unasked.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    for name, weight in trained:
        if weight.dtype != torch.float32 and not isinstance(model, PeftModel):
            raise ValueError(
                f"`fp16=True` trains with a gradient scaler, which takes weights in float32, and {name!r} is in "
                f"{str(weight.dtype).removeprefix('torch.')}. Set `dtype='float32'`, train an adapter (`use_peft`), or set "
                "`bf16=True` instead."
            )
        weight.data = weight.data.float()


def check_4bit_weights_trainable(model) -> None:
    """Raise a `ValueError` on 4-bit weights that bitsandbytes has packed ([`keep_4bit_weights_trainable_on_cpu`])."""
    if any(
        getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in linear_4bit_modules(model)
    ):
        raise ValueError(
            "The 4-bit model has been evaluated on CPU, which packed its weights so that they cannot be trained. Load the "
            "model anew and do not run it before the trainer has it."
        )


def linear_4bit_modules(model) -> list:
    """The layers of a model whose weights are in 4 bit (bitsandbytes)."""
    if "bitsandbytes" not in sys.modules:  # then there can be none
        return []
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]
