# SPDX-License-Identifier: Apache-2.0

"""The configurations of training and of scoring, which are also their command lines."""

import json
import math
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from accelerate import PartialState
from transformers.utils import is_torch_xla_available
from trl import SFTConfig

from .utils.files import find_shipped


def has_accelerator() -> bool:
    """Whether this machine has something to train on besides its CPU."""
    return torch.accelerator.is_available() or is_torch_xla_available()


@dataclass
class PerCEConfig(SFTConfig):
    r"""
    Configuration class for the [`PerCETrainer`].

    [`PerCEConfig`] inherits every parameter of [`~trl.SFTConfig`] with its default, but for `assistant_only_loss`, and adds
    those of the PerCE loss ([Rethinking Personalization in Large Language Models at the Token
    Level](https://huggingface.co/papers/2603.06595)).

    On a machine without an accelerator `use_cpu` becomes `True`. On a CPU `bf16` is `False` unless it is given: the model
    computes in the dtype that it is loaded in. On an accelerator it is TRL's default.

    Parameters:
        > Parameters that control the token weights

        token_weighting (`str`, *optional*, defaults to `"perce"`):
            Where the weight `w_i` of a trained token comes from. Possible values are:

            - `"perce"`: the token's Personal Influence Ratio (PIR), in nats.
            - `"loss"`: the token's own loss, in nats (the paper's baseline LossCE).
            - `"entropy"`: the entropy of the distribution that predicts it, in nats (the paper's baseline EntCE).
            - `"given"`: the row itself. Tokenized rows have a column `token_weights`, one number for each of `input_ids`
              (`trl-perce score --token_weights` writes such rows); in conversations an assistant's message has a key
              `weight`. Both are 1 where they are missing, and are not clipped. There is no counterfactual pass.
            - `"uniform"`: 1 (plain CE). The loss is then [`~trl.SFTTrainer`]'s own.

            With each of them a message with `weight` 0 is not trained, as in OpenAI's format for fine-tuning.

        weight_clip_min (`float`, *optional*, defaults to `0.8`):
            Lower bound `m` of a weight, dimensionless (Table 7 of the paper).
        weight_clip_max (`float`, *optional*, defaults to `5.0`):
            Upper bound `M` of a weight, dimensionless (Table 7 of the paper).
        weight_normalization (`str`, *optional*, defaults to `"none"`):
            Possible values are:

            - `"none"`: weights as they are (the paper).
            - `"sequence"`: weights divided by their mean over the trained tokens of their own row. It takes the
              learning-rate effect of weights whose mean is not 1 out of a comparison with CE, and does not depend on
              how a batch is split.

        > Parameters that control the counterfactual pass

        counterfactual (`str`, *optional*, defaults to `"drop"`):
            How the persona is taken out of the context. Possible values are:

            - `"drop"`: its tokens leave the sequence, which gets short and cheap. A system message that is the persona and nothing
              else stays as an empty turn.
            - `"drop_turn"`: as `"drop"`, but such a system message leaves with its turn, as if it had not been sent. The rest must
              be as the chat template renders it without the message; a template that writes a system message of its own
              instead (Qwen 2.5's) is refused.
            - `"mask"`: its tokens stay in place, so all positions stay, and no token attends to them. Costs a forward
              pass over the whole sequence, and needs an attention implementation that takes a padding mask.

        counterfactual_batch_tokens (`int` or `str`, *optional*):
            Tokens (padding included) of one forward of the counterfactual pass, which runs over all rows of an optimizer
            step together, sorted by length. More are faster up to a point; fewer need less memory. Changes nothing but
            rounding. By default as many as the largest micro-batch has, so that the pass needs less memory than training
            itself. `"auto"`: as many as fit into half of the memory that is free.
        counterfactual_refresh_epochs (`int`, *optional*, defaults to `1`):
            Epochs for which the counterfactual log-probabilities of a row are kept. 1 computes them at every step
            (exact). With `k`, PIR compares the current factual log-probabilities with counterfactual ones that are up
            to `k - 1` epochs old, and the pass costs a `k`-th. What the model learned meanwhile then counts as personal:
            with a large learning rate that changes the weights a lot (measured in examples/measurements.md). They are saved with
            checkpoints.

        > Parameters that control the persona in the data

        persona_start_marker (`str`, *optional*, defaults to `"<persona>"`):
            Text that opens a persona span in the data. It is taken out before tokenization.
        persona_end_marker (`str`, *optional*, defaults to `"</persona>"`):
            Text that closes a persona span in the data. It is taken out before tokenization.
        truncate_persona (`bool`, *optional*, defaults to `True`):
            Whether a row longer than `max_length` loses persona tokens, from the end of the persona. If `False`, TRL's
            truncation applies, which cuts the end of the row, and so the response, first.

        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template for all rows, such as `{"enable_thinking": False}`. Those in a row's own column
            `chat_template_kwargs`, as TRL reads it, go first, key by key.

        > Parameters that control which tokens are trained

        assistant_only_loss (`bool`, *optional*):
            Which tokens of a conversation are trained. If `None`, it goes by the kind of rows: of `messages` the assistant's
            turns, of `prompt` and `completion` the completion, of plain text all tokens. That is so with every
            `token_weighting`, `"uniform"` too, so that CE and PerCE train the same tokens. [`~trl.SFTConfig`] has `False`,
            which trains `messages` whole, system, persona and user included; a warning counts those tokens. The assistant's
            turns are told by the chat template's `{% generation %}` marks or those of TRL's training template; of `messages` in
            a template without either, by rendering the conversation up to each turn.

        answer_only_loss (`bool`, *optional*, defaults to `False`):
            Whether of an assistant's turn the answer alone is trained, and not the thought before it (`reasoning_content`, or
            between `<think>` and `</think>`, Gemma's and Harmony's marks). By default a thought is trained where the chat template
            writes it. One without a word, which a template adds by itself (Qwen3's `<think>\n\n</think>`), is not trained either
            way: the model would learn not to think.

        > Parameters that control what happens when numbers break

        on_nonfinite (`str`, *optional*, defaults to `"stop"`):
            What to do before an optimizer step from values that are NaN or infinite: log-probabilities or PIR of trained tokens,
            or the gradient. The message names the rows. Possible values are:

            - `"stop"`: raise a `FloatingPointError`.
            - `"skip"`: leave the step out, up to ten in a row. Not with DeepSpeed, whose engine steps by itself.

        > Parameters that control the check of the model

        check_model (`bool`, *optional*, defaults to `True`):
            Whether to score a few short rows before the first step in the ways that training takes (fused head, padded or packed,
            masked) and by plain forward passes with logits, and compare. Where TRL's fused head is off, logits take its
            place; where anything else is off, the error says what to set. Some forwards of a few dozen tokens, once a run,
            which change nothing of the training.

    Raises:
        `ValueError`: A value is out of its range; the message says which and what to write instead.
    """

    token_weighting: str = field(
        default="perce",
        metadata={
            "help": "Where the weight of a trained token comes from: 'perce' (its Personal Influence Ratio), 'loss' (its "
            "own loss, LossCE), 'entropy' (the entropy of its prediction, EntCE), 'given' (the row: its 'token_weights', or the "
            "'weight' of its messages) or 'uniform' (plain CE, exactly TRL's SFT).",
            "choices": ["perce", "loss", "entropy", "given", "uniform"],
        },
    )
    weight_clip_min: float = field(
        default=0.8, metadata={"help": "Lower bound m of a token's weight (Table 7 of the PerCE paper)."}
    )
    weight_clip_max: float = field(
        default=5.0, metadata={"help": "Upper bound M of a token's weight (Table 7 of the PerCE paper)."}
    )
    weight_normalization: str = field(
        default="none",
        metadata={
            "help": "'none' (the paper), or 'sequence': divide the weights by their mean over the trained tokens of "
            "their own row, which takes the learning-rate effect out of a comparison with CE.",
            "choices": ["none", "sequence"],
        },
    )
    counterfactual: str = field(
        default="drop",
        metadata={
            "help": "How the persona is taken out of the context of the counterfactual pass: 'drop' (its tokens leave "
            "the sequence), 'drop_turn' (and with them a system turn that holds nothing else) or 'mask' (they stay in place and no "
            "token attends to them).",
            "choices": ["drop", "drop_turn", "mask"],
        },
    )
    counterfactual_batch_tokens: int | str | None = field(
        default=None,
        metadata={
            "help": "Tokens of one forward of the counterfactual pass. By default as many as the largest micro-batch has; "
            "'auto': as many as fit into half of the memory that is free."
        },
    )
    counterfactual_refresh_epochs: int = field(
        default=1,
        metadata={
            "help": "Epochs for which the counterfactual log-probabilities of a row are kept. 1 computes them at every step "
            "(exact)."
        },
    )
    persona_start_marker: str = field(
        default="<persona>", metadata={"help": "Text that opens a persona span in the data."}
    )
    persona_end_marker: str = field(
        default="</persona>", metadata={"help": "Text that closes a persona span in the data."}
    )
    truncate_persona: bool = field(
        default=True,
        metadata={
            "help": "Whether a row longer than `max_length` loses persona tokens, from the end of the persona. If "
            "False, TRL's truncation applies, which cuts the response first."
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template for all rows, as a JSON object such as '{\"enable_thinking\": false}'. A row's "
            "own column `chat_template_kwargs` goes first, key by key."
        },
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Which tokens of a conversation are trained. By default those of the assistant's turns for rows with "
            "'messages', and the completion for rows with 'prompt' and 'completion'. False: every token of 'messages', as "
            "TRL does by default.",
            "nargs": "?",  # alone it is true, as in TRL
            "const": True,
        },
    )
    answer_only_loss: bool = field(
        default=False,
        metadata={
            "help": "Of an assistant's turn train the answer alone, not the thought before it. A thought without a word, which the "
            "chat template adds by itself, is never trained."
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What to do before an optimizer step from values that are NaN or infinite: 'stop' with an error that names "
            "the rows, or 'skip' the step.",
            "choices": ["stop", "skip"],
        },
    )
    check_model: bool = field(
        default=True,
        metadata={
            "help": "Whether to compare the scores of a few short rows with plain forward passes before the first step, and to "
            "refuse a model on which they are wrong."
        },
    )

    def __post_init__(self):
        # Before `super().__post_init__`, which sets up the device and the process group.
        if self.chat_template_path:  # type: ignore[has-type]
            self.chat_template_path = find_shipped(self.chat_template_path)  # type: ignore[has-type]
        for name in ("token_weighting", "weight_normalization", "counterfactual", "on_nonfinite"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. Write one of {', '.join(map(repr, choices))}.")
        _read_numbers(self, "weight_clip_min", "weight_clip_max", "counterfactual_refresh_epochs")
        for name in ("weight_clip_min", "weight_clip_max"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"`{name}` is {value}. Write a finite number that is not negative.")
        if self.weight_clip_min > self.weight_clip_max:
            raise ValueError(
                f"`weight_clip_min` ({self.weight_clip_min}) is over `weight_clip_max` ({self.weight_clip_max}). Write "
                "a lower bound that is not over the upper one (the paper has 0.8 and 5.0)."
            )
        tokens = self.counterfactual_batch_tokens
        if isinstance(tokens, str) and tokens != "auto":  # from the command line
            tokens = self.counterfactual_batch_tokens = int(tokens) if tokens.isdecimal() else 0
        if not isinstance(tokens, str | None) and tokens < 1:
            raise ValueError("`counterfactual_batch_tokens` must be a positive number of tokens, 'auto', or not set.")
        if self.counterfactual_refresh_epochs < 1:
            raise ValueError(
                f"`counterfactual_refresh_epochs` is {self.counterfactual_refresh_epochs}. Write 1 (computed at every step) "
                "or more."
            )
        start, end = self.persona_start_marker, self.persona_end_marker
        if not start or not end or start in end or end in start:
            raise ValueError(
                f"`persona_start_marker` is {start!r} and `persona_end_marker` is {end!r}. Write two texts that are not "
                "empty and of which none contains the other."
            )
        if self.answer_only_loss and self.assistant_only_loss is False:
            raise ValueError(
                "`answer_only_loss` trains the assistant's answers alone, and `assistant_only_loss=False` every token. Leave one of them out."
            )
        read_object(self, "chat_template_kwargs", '{"enable_thinking": false}')
        # TRL's default stands under the name that Transformers 5.23 warns of, for everybody
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        # TRL's default, `bf16=True`, is an error without `use_cpu`, and emulated by most CPUs
        self.use_cpu: bool = self.use_cpu or not has_accelerator()
        if self.use_cpu and self.bf16 is None:
            self.bf16: bool | None = False
        super().__post_init__()

    def __getstate__(self):
        # `Trainer` pickles its arguments into `training_args.bin`, which goes to the Hub: the token does not
        return self.__dict__ | {"hub_token": None}


@dataclass
class PerContrastConfig(PerCEConfig):
    r"""
    Configuration class for [`PerContrast`].

    [`PerContrastConfig`] inherits every parameter of [`PerCEConfig`], so that a training recipe scores its data as the
    trainer will see it: `max_length`, `truncate_persona`, `chat_template_path`, `completion_only_loss`,
    `assistant_only_loss`, `eos_token`, `weight_clip_min`, … mean the same. Parameters that only matter for training are
    ignored. Rows are padded, not packed, which changes no score.

    Parameters:
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether the model runs under bfloat16 autocast. Unlike in training, it is off unless it is asked for: the model runs in
            its own dtype, and the scores are the model's own numbers. A training recipe with `bf16: true` asks for it, and its
            data is then scored in the precision of the training. The same goes for `fp16`.
        counterfactual (`str`, *optional*, defaults to `"drop"`):
            What takes the place of the persona in the counterfactual pass. Possible values are:

            - `"drop"`: nothing; its tokens leave the sequence.
            - `"drop_turn"`: nothing, and a system message that is the persona and nothing else leaves with its turn.
            - `"mask"`: its tokens stay in place and no token attends to them.
            - `"swap"`: the persona of the next row that has another one. PIR then tells what is specific to *this* user and
              not to having any persona. Not for training.

        personal_threshold (`float`, *optional*, defaults to `1.0`):
            A token with a PIR over it is a personal token, in nats (PerCE paper: 1).
        score_batch_tokens (`int`, *optional*, defaults to `2048`):
            Tokens (padding included) of one forward pass; a longer row is one of its own. Changes speed, memory and
            rounding, nothing else. On CPU more are slower; a large GPU may want more.

    Raises:
        `ValueError`: A value is out of its range; the message says which and what to write instead.
    """

    counterfactual: str = field(
        default="drop",
        metadata={
            "help": "What takes the place of the persona in the counterfactual pass: 'drop' (nothing), 'drop_turn' "
            "(nothing, not even its system turn), 'mask' (its tokens stay and no token attends to them) or 'swap' (the persona of "
            "another row).",
            "choices": ["drop", "drop_turn", "mask", "swap"],
        },
    )
    bf16: bool | None = field(
        default=False,
        metadata={"help": "Run the model under bfloat16 autocast. By default it runs in its own dtype."},
    )
    personal_threshold: float = field(
        default=1.0, metadata={"help": "A token with a PIR over it is a personal token, in nats."}
    )
    score_batch_tokens: int = field(
        default=2048, metadata={"help": "Tokens of one forward pass, padding included, when scoring."}
    )

    def __post_init__(self):
        _read_numbers(self, "personal_threshold", "score_batch_tokens")
        if not math.isfinite(self.personal_threshold):
            raise ValueError(f"`personal_threshold` is {self.personal_threshold}. Write a finite number of nats.")
        if self.score_batch_tokens < 1:
            raise ValueError(f"`score_batch_tokens` is {self.score_batch_tokens}. Write a positive number of tokens.")
        self.bf16: bool | None = bool(self.bf16)  # TRL's default is mixed precision, which rounds
        self.use_cpu: bool = self.use_cpu or not has_accelerator()
        # `TrainingArguments` would set up the devices anew, which takes them from a trainer that is there already
        PartialState(cpu=self.use_cpu, timeout=timedelta(seconds=self.ddp_timeout))
        self.accelerator_config, self.deepspeed, self.fsdp = {"use_configured_state": True}, None, None
        super().__post_init__()


def _read_numbers(args, *names: str) -> None:
    """Make numbers of fields that hold them as text, as YAML reads `"5"` and `5e0`. Raises a `ValueError` where there is none."""
    for name in names:
        value, kind = getattr(args, name), type(type(args).__dataclass_fields__[name].default)
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        is_changed = not isinstance(value, str) and number != value and value == value  # 2.5 of an integer; not NaN
        if number is None or isinstance(value, bool) or is_changed:
            raise ValueError(
                f"`{name}` is {value!r}. Write a number, such as {args.__dataclass_fields__[name].default}."
            )
        setattr(args, name, number)


def read_object(args, name: str, example: str) -> None:
    """
    Make an object of a field that holds it as JSON, as on a command line.

    Args:
        args (`Any`): A configuration.
        name (`str`): The field. `None` stays.
        example (`str`): What to write, for the message.

    Raises:
        `ValueError`: It holds something else.
    """
    value = found = getattr(args, name)
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            pass  # named below
    if not isinstance(found, dict | None):
        raise ValueError(f"`{name}` is {value!r}. Write a JSON object, such as '{example}'.")
    setattr(args, name, found)


def autocast_dtype(args: PerCEConfig) -> torch.dtype | None:
    """
    In which dtype a model runs under autocast.

    Args:
        args ([`PerCEConfig`]): Gives `bf16` and `fp16`.

    Returns:
        `torch.dtype` or `None`: `None` where there is no autocast.
    """
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None


def describe_precision(args: PerContrastConfig, dtype: object = None) -> str:
    """
    In which precision a model runs, for reports.

    Args:
        args ([`PerContrastConfig`]): Gives `bf16` and `fp16`.
        dtype (`torch.dtype` or `str`, *optional*): Of the model's weights. `None` and `"auto"`: its own, whatever that is.

    Returns:
        `str`: Such as `"float32"` or `"float32, under bfloat16 autocast"`.
    """
    name = "the model's own dtype" if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    autocast = autocast_dtype(args)
    return name if autocast is None else f"{name}, under {str(autocast).removeprefix('torch.')} autocast"


def copy_config(args: PerCEConfig, cls: type[PerCEConfig] | None = None, **changes) -> PerCEConfig:
    """
    A copy of a configuration with other values. Not `dataclasses.replace`, which would run `__post_init__` and set up the
    device anew.

    Args:
        args ([`PerCEConfig`]): What to copy.
        cls (`type`, *optional*): Subclass of its class, whose new fields take their defaults. If `None`, its own class.
        **changes: Fields with their new values.

    Returns:
        [`PerCEConfig`]: The copy.
    """
    cls = cls or type(args)
    copy = object.__new__(cls)
    defaults = {name: field.default for name, field in cls.__dataclass_fields__.items()}
    copy.__dict__.update(defaults | args.__dict__ | changes)
    return copy
