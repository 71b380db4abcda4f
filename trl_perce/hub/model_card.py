# SPDX-License-Identifier: Apache-2.0

"""The model card of a trained adapter: what a stranger needs to use it, and nothing of what it was trained on."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import __version__
from ..utils.files import find_shipped, write_text


_TEMPLATE = Path(__file__).with_name("model_card.md")
_PACKAGES = ("trl", "transformers", "peft", "torch", "datasets")
# Metrics of the log, and what they are
_STATISTICS = {
    "pir/mean": "mean PIR (nats)",
    "pir/personal_fraction": "share of tokens with PIR > 1",
    "weight/mean": "mean weight",
    "weight/at_min": "share of weights at the lower bound",
    "weight/at_max": "share of weights at the upper bound",
    "nll": "loss without weights (nats a token)",
    "counterfactual/token_ratio": "tokens of the counterfactual pass over those of the factual one",
}
_EVALUATED = {
    "nll": "negative log-likelihood of held-out responses (nats a token)",
    "loss": "weighted loss on held-out responses",
    "pir/mean": "mean PIR on held-out responses (nats)",
    "pir/personal_fraction": "share of held-out tokens with PIR > 1",
}
_METHODS = {"perce": "PerCE", "loss": "LossCE", "entropy": "EntCE", "given": "weighted CE", "uniform": "CE"}
# With fewer different prompts, what they share could be a prompt itself
_MIN_PROMPTS = 5


def write_model_card(trainer, repo: str, model_name: str | None, dataset_name: str | None) -> None:
    """
    Write `README.md` to the trainer's `output_dir`, in the place of TRL's, whose tags and links to trackers it takes over.

    Args:
        trainer ([`PerCETrainer`]): After, or in, training.
        repo (`str`): What loads the model: its name on the Hub, or its folder ([`folder_as_seen`]).
        model_name (`str`, *optional*): Name of the model. Defaults to the last part of `repo`.
        dataset_name (`str`, *optional*): Name of the dataset on the Hub, or its path, which the card does not show.
    """
    args, model, folder = trainer.args, trainer.model, Path(trainer.args.output_dir)
    of_trl = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    is_adapter = isinstance(model, PeftModel)
    base = model.config.name_or_path
    base_id = None if not base or _is_local(base) else base
    dataset_id = None if not dataset_name or _is_local(dataset_name) else dataset_name
    name = model_name or repo.split("/")[-1]
    found = prompt_format(trainer.train_dataset, trainer.processing_class)
    results = _last_evaluation(trainer.state.log_history)
    data = ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if is_adapter and base_id else None,
        datasets=[dataset_id] if dataset_id else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset_id or "custom",
                dataset_name=dataset_id or "held-out rows",
                metric_type=metric,
                metric_name=_EVALUATED[metric],
                metric_value=round(value, 4),
            )
            for metric, value in results.items()
        ]
        or None,
        library_name="peft" if is_adapter else "transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=sorted({*(of_trl.data.tags or ()), *_tags(model)}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo=repo,
        base=base_id or (Path(base).name if base else None),
        base_id=base_id,
        dataset_id=dataset_id,
        is_adapter=is_adapter,
        model_class=_own_class(model),
        method=_METHODS[args.token_weighting],
        args=args,
        badges=[line.strip() for line in of_trl.text.splitlines() if line.strip().startswith("[<img ")],
        statistics=_statistics(trainer.state.log_history),
        results=[(_EVALUATED[metric], _shown(value)) for metric, value in results.items()],
        settings=_settings(trainer),
        prompt_format=found and found[0],
        ending=found and found[1],
        paper=trainer._paper,
        # Ours has no metadata where it is only on the path
        versions=[("trl_perce", __version__), *((package, version(package)) for package in _PACKAGES)],
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)
    write_text(folder / "README.md", card.content)


def folder_as_seen(folder: str | Path) -> str:
    """
    A folder as it can be loaded from the current one.

    Args:
        folder (`str` or `Path`): It need not exist.

    Returns:
        `str`: Relative if it is in the current folder, else absolute; with slashes.
    """
    path, here = Path(folder).expanduser().absolute(), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) and path != here else path).as_posix()


def is_written_by_us(card: Path) -> bool:
    """Whether a card may be written over: there is none, or it is this package's, TRL's or PEFT's blank one."""
    if not card.is_file():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in ("trl-perce", "generated_from_trainer", "[More Information Needed]"))


def _is_local(name: str) -> bool:
    """Whether the name of a model or dataset is no name on the Hub."""
    if Path(find_shipped(name)).expanduser().exists():
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _own_class(model) -> str | None:
    """Name of the class that was trained, where `AutoModelForCausalLM` would load another, whose weights have other names."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    if not type(base).__module__.startswith("transformers."):  # the model's own code, found by its configuration
        return None
    return None if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base.config.model_type) == name else name


def prompt_format(dataset, tokenizer, num_rows: int = 200) -> tuple[str, str] | None:
    """
    How the prompts of tokenized rows are built around the persona: the text that they all share, chat template included. What
    differs stands as `…` and a persona as `{persona}`: no persona, question or response is shown.

    What all prompts share *before* what differs counts as format, down to a label such as "Question: ". What they share *behind* it may
    be the rows' own ("?", "Keep it short."), and counts from the next line or from the next special token of the template on. Where
    all prompts ask the same, that question is the rows' own.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With `input_ids`, `labels` and `persona_mask`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        num_rows (`int`, *optional*, defaults to `200`): How many rows are looked at, from the first on.

    Returns:
        `tuple[str, str]` or `None`: The format, and the shared text behind what differs that does not count as format, which may be
        empty. `None` if it cannot be told: a stream, packed rows, responses that are not marked by `labels`, or fewer than five
        different prompts with one persona each.
    """
    if not isinstance(dataset, Dataset) or not {"labels", "persona_mask"} <= {*dataset.column_names}:
        return None
    if "seq_lengths" in dataset.column_names:
        return None
    parts = {_prompt_parts(row) for row in islice(dataset.with_format(None), num_rows)} - {None}
    if len(parts) < _MIN_PROMPTS:
        return None
    before, personas, after = zip(*parts, strict=True)
    # A token takes the space before a word with it, so that a persona may begin with one that is the prompt's
    texts = [_decode(tokenizer, persona) for persona in personas]
    spaces = {(text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]) for text in texts}
    left, right = spaces.pop() if len(spaces) == 1 else ("", "")
    beginning, ending = _shared(before)
    shown = _decode(tokenizer, beginning)
    if ending is not None:
        label = _decode(tokenizer, ending)
        shown += "…" + label[next((i for i, character in enumerate(label) if character.isspace()), len(label)) :]
    shown += f"{left}{{persona}}{right}"
    only_personas_differ = ending is None
    beginning, ending = _shared(after)
    own = ""
    if ending is not None:
        own, ending_text = _split_ending(ending, tokenizer)
        shown += _decode(tokenizer, beginning) + "…" + ending_text
    elif only_personas_differ:
        text, rest = _split_special(beginning, tokenizer)
        own, lines = text.strip(), text.lstrip()
        shown += text[: len(text) - len(lines)] + "…" + lines[len(lines.rstrip()) :] + rest
    else:
        shown += _decode(tokenizer, beginning)
    # Marks alone say nothing
    return shown, own.strip() if any(character.isalnum() for character in own) else ""


def _split_special(tokens: Sequence[int], tokenizer) -> tuple[str, str]:
    """Text before the first token that the tokenizer was given for a template, and the text from it on."""
    special = {*tokenizer.added_tokens_decoder}
    cut = next((i for i, token in enumerate(tokens) if token in special), len(tokens))
    return _decode(tokenizer, tokens[:cut]), _decode(tokenizer, tokens[cut:])


def _split_ending(tokens: Sequence[int], tokenizer) -> tuple[str, str]:
    """What of a shared ending may be the rows' own text, up to the end of its line, and the rest."""
    text, rest = _split_special(tokens, tokenizer)
    cut = text.find("\n") if "\n" in text else len(text)
    return text[:cut], text[cut:] + rest


def _prompt_parts(row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Tokens before the persona, its own, and those up to the response; `None` unless there is one persona before it."""
    mask, labels = row["persona_mask"], row["labels"]
    trained = [index for index, label in enumerate(labels) if label != -100]
    if 1 not in mask or not trained:
        return None
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if end - start != sum(mask) or end > trained[0]:
        return None
    ids = row["input_ids"]
    return tuple(ids[:start]), tuple(ids[start:end]), tuple(ids[end : trained[0]])


def _shared(sides: Sequence[Sequence[int]]) -> tuple[Sequence[int], Sequence[int] | None]:
    """What token sequences begin and end with alike; no ending where they are the same."""
    shortest = min(map(len, sides))
    first = next((i for i in range(shortest) if len({side[i] for side in sides}) > 1), shortest)
    if first == shortest == max(map(len, sides)):
        return sides[0], None
    last = next((i for i in range(shortest - first) if len({side[-1 - i] for side in sides}) > 1), shortest - first)
    return sides[0][:first], sides[0][len(sides[0]) - last :]


def _decode(tokenizer, tokens: Sequence[int]) -> str:
    # A character may be cut at the border of what is shared
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False).strip("\ufffd")


def _tags(model) -> list[str]:
    tags = ["trl-perce"]
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        tags.append(str(config.peft_type.value).lower())
        if config.peft_type == "LORA" and getattr(model.config, "quantization_config", None) is not None:
            tags.append("qlora")
    return tags


def _last_evaluation(history: list[dict[str, float]]) -> dict[str, float]:
    """Figures of the last evaluation; without weights there is no `nll` beside the loss, which is the same then."""
    last = next((log for log in reversed(history) if "eval_loss" in log), {})
    return {name: last[f"eval_{name}"] for name in _EVALUATED if f"eval_{name}" in last}


def _statistics(history: list[dict[str, float]]) -> list[tuple[str, str, str]]:
    """Name, first and last value in training of each metric."""
    logs = [log for log in history if "loss" in log]
    return [
        (meaning, _shown(logs[0][name]), _shown(logs[-1][name]))
        for name, meaning in _STATISTICS.items()
        if logs and name in logs[0] and name in logs[-1]
    ]


def _shown(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _settings(trainer) -> list[tuple[str, Any]]:
    args, model = trainer.args, trainer.model
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    found = [
        (
            "learning rate",
            f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        ),
        ("epochs", f"{trainer.state.epoch or 0:g}"),
        ("steps", trainer.state.global_step),
        ("rows a step", batch),
        ("max_length", args.max_length or "no limit"),
        ("seed", args.seed),
    ]
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "LORA":
        config = model.active_peft_config
        shape = f"r {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}"
        found.append(("LoRA", f"{shape}, on {_adapted(config)}"))
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        found.append(("quantization of the base model", str(quantization.quant_method.value)))
    return found


def _adapted(config) -> str:
    """What a LoRA sits on: modules, and parameters that are no module's weight (the experts of a mixture)."""
    targets, parameters = config.target_modules or (), getattr(config, "target_parameters", None) or ()
    modules = [targets] if isinstance(targets, str) else sorted({name.split(".")[-1] for name in targets})
    return ", ".join([*modules, *sorted({*parameters})]) or "PEFT's default modules"
