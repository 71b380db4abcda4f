# SPDX-License-Identifier: Apache-2.0

"""Configuration of an evaluation: how predictions are made, and what is measured. Each field is an option of the command."""

import math
from dataclasses import dataclass, field

from ..config import PerContrastConfig, read_object


@dataclass
class GenerationArguments(PerContrastConfig):
    r"""
    Configuration of the generation of predictions.

    [`GenerationArguments`] inherits every parameter of [`PerContrastConfig`], so that one object configures generation and
    scoring, and a training recipe can be used for both. `max_length`, `truncate_persona`, `chat_template_path`, `eos_token`,
    the persona's markers, `bf16`, `fp16` and `seed` matter here. Like scoring, generation runs in the model's own dtype unless
    `bf16` or `fp16` asks for autocast.

    Parameters:
        temperature (`float`, *optional*, defaults to `0.4`):
            Of sampling (PerCE paper: 0.4). 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Samples only from the likeliest tokens that have this probability together. What the model's own generation
            configuration says of sampling is not heeded, so that models are compared alike.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Tokens that a prediction may have (PerCE paper: 512). Prompts have `max_length - max_new_tokens`.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Scale `g` of persona guidance: the next token is drawn from `log P(y|x) + g (log P(y|p, x) − log P(y|x))`, with the
            prompt without its persona as Transformers' negative prompt. Over 1 the persona counts more, 0 leaves it out. 1 is
            none; others cost a second forward pass.
        generation_batch_tokens (`int`, *optional*, defaults to `16384`):
            Tokens (prompt, padding and `max_new_tokens` of each row) of one batch, or of the cache of continuous batching. Changes
            speed, memory and rounding.
        continuous_batching (`bool`, *optional*):
            Whether rows are generated with Transformers' continuous batching, in which a row that is finished makes room for the
            next one. Changes speed, memory and rounding. By default where it was measured to be faster, which on CPU it was not.
            Models whose layers are not all attention, prompt tuning, `guidance_scale` and autocast from another dtype do not go with
            it: rows are then padded to batches, which is logged.

    Raises:
        `ValueError`: A value is out of its range; the message says which and what to write instead.
    """

    temperature: float = field(default=0.4, metadata={"help": "Temperature of sampling; 0 is greedy."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens that have this probability together."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens that a prediction may have."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Persona guidance at decoding: over 1 the persona counts more. 1 is none."}
    )
    generation_batch_tokens: int = field(
        default=16384, metadata={"help": "Tokens of one batch of generation: prompts, padding and `max_new_tokens`."}
    )
    continuous_batching: bool | None = field(
        default=None,
        metadata={
            "help": "Generate with Transformers' continuous batching, in which a row that is finished makes room for the next one. "
            "By default where it was measured to be faster, which on CPU it was not."
        },
    )

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"`temperature` is {self.temperature}. Write 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}. Write a number over 0 and up to 1.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}. Write a finite number, 1 for no guidance.")
        if self.guidance_scale != 1 and self.counterfactual == "drop_turn":
            raise ValueError("`guidance_scale` does not go with `counterfactual='drop_turn'`. Set it to 'drop'.")
        for name in ("max_new_tokens", "generation_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. Write a positive number of tokens.")
        if self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise ValueError(
                f"`max_length={self.max_length}` leaves no room for a prompt beside `max_new_tokens={self.max_new_tokens}`. "
                "Raise `max_length` (the PerCE paper has 5000), or lower `max_new_tokens`."
            )
        super().__post_init__()


@dataclass
class EvaluationArguments:
    """
    What is evaluated.

    Parameters:
        metrics (`list[str]`, *optional*, defaults to `["rouge", "meteor"]`):
            Of [`~metrics.text_metrics`]: `"rouge"`, `"meteor"`, `"bleu"`.
        prediction_rows (`int`, *optional*):
            How many rows get predictions, which take most of the time; likelihoods are of all rows. Rows of as many users as possible
            are taken, by the same rule for every model ([`~predictions.choose_rows`]). If `None`, all; 0 makes none.
        likelihood (`bool`, *optional*, defaults to `True`):
            Whether the log-likelihood of the references' personal and other tokens is computed. On by default: it tells models
            apart that overlap with one reference does not, and costs a few forward passes, little beside generation.
        reference_scores (`str`, *optional*):
            Folder with `scores.jsonl` of the same rows, from `trl-perce score` or another evaluation (`…/scores`), which decides
            which tokens are personal: that of the untrained model. If `None`, an adapter's base model decides, and a model
            without an adapter decides itself.
        swap_persona (`bool`, *optional*, defaults to `False`):
            Whether predictions and likelihoods are made with another user's persona, too, which tells use of the right persona from
            copying whatever persona there is. Doubles the cost of generation.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM generates the predictions.
        judge_base_url (`str`, *optional*):
            OpenAI-compatible endpoint of a judge ([`~judge.judge_predictions`]). The key is read from `OPENAI_API_KEY`.
        judge_model (`str`, *optional*):
            The judge's name there.
        judge_max_tokens (`int`, *optional*, defaults to `512`):
            Tokens that a reply of the judge may have, what it thinks included.
        judge_extra_body (`dict[str, Any]` or `str`, *optional*):
            What else the requests to the judge say, as a dictionary or in JSON, such as
            `{"chat_template_kwargs": {"enable_thinking": false}}`.
        baseline (`str`, *optional*):
            Folder of another evaluation of the same rows, which this one is compared with, row by row.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether earlier results are removed from the folder instead of going on with them.
    """

    metrics: list[str] = field(
        default_factory=lambda: ["rouge", "meteor"], metadata={"help": "Of 'rouge', 'meteor', 'bleu'."}
    )
    prediction_rows: int | None = field(
        default=None,
        metadata={"help": "Rows that get predictions, of as many users as possible; 0 makes none. By default all."},
    )
    likelihood: bool = field(
        default=True, metadata={"help": "Compute the log-likelihood of the references' personal and other tokens."}
    )
    reference_scores: str | None = field(
        default=None,
        metadata={
            "help": "Folder with scores.jsonl of the same rows (of the untrained model) that decides which tokens are personal. By "
            "default an adapter's base model decides, and a model without an adapter itself."
        },
    )
    swap_persona: bool = field(
        default=False, metadata={"help": "Generate and score with another user's persona, too. Doubles the cost."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM."})
    judge_base_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible endpoint of a judge."})
    judge_model: str | None = field(default=None, metadata={"help": "The judge's name at the endpoint."})
    judge_max_tokens: int = field(
        default=512, metadata={"help": "Tokens of a reply of the judge. One that thinks needs more."}
    )
    judge_extra_body: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON that goes into the requests to the judge, such as "
            '\'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
        },
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Folder of another evaluation of the same rows to compare with."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Remove earlier results from `output_dir` instead of going on with them."}
    )

    def __post_init__(self):
        if self.prediction_rows is not None and self.prediction_rows < 0:
            raise ValueError(f"`prediction_rows` is {self.prediction_rows}. Write a number of rows, or leave it out.")
        if self.prediction_rows == 0 and not self.likelihood:
            raise ValueError("`prediction_rows` is 0 and `likelihood` is off: nothing would be evaluated.")
        if (self.judge_base_url is None) != (self.judge_model is None):
            raise ValueError("`judge_base_url` and `judge_model` belong together. Set both, or neither.")
        if self.judge_max_tokens < 1:
            raise ValueError(f"`judge_max_tokens` is {self.judge_max_tokens}. Write a positive number of tokens.")
        read_object(self, "judge_extra_body", '{"chat_template_kwargs": {"enable_thinking": false}}')
