# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce aloe`: does a model find out, while it talks, how its user wants to be answered (ALOE, Tables 4 and 9)?

    trl-perce aloe --model_name_or_path Qwen/Qwen3-0.6B --data_dir ../shared/data/aloe --output_dir outputs/aloe \\
        --judge_base_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-32B
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .common import (
    MODEL_SETTINGS,
    check_config_keys,
    check_rest,
    check_writable,
    disable_progress_bars,
    model_init_kwargs,
)


HELP = "Let a model talk with simulated users and have a judge rate how well it suits them (ALOE)"
# Settings that the result depends on
_SETTINGS = ["adapter", "temperature", "max_new_tokens", "seed", "chat_template_kwargs"]
_POSITIVE = ["rounds", "max_new_tokens", "batch_size", "simulator_max_tokens", "judge_max_tokens", "concurrency"]
_FIGURES = {
    "ir": "Improvement rate, per round",
    "n_ir": "Normalised improvement rate, per round",
    "n_r2": "R² of the regression line",
}
_COUNTS = {
    "unparsable": "replies of the judge without a rating",
    "empty_messages": "empty messages",
    "empty_replies": "empty replies",
    "reciting": "conversations with a user who recites its persona",
}


def make_parser():
    from trl import ModelConfig, TrlParser

    @dataclass
    class AloeArguments:
        """Arguments of `trl-perce aloe` beside those that say which model and how it is loaded."""

        data_dir: str = field(
            metadata={"help": "Folder with ALOE's 'profile_eval.jsonl' and 'personality_eval.jsonl'."}
        )
        judge_base_url: str = field(
            metadata={
                "help": "OpenAI-compatible endpoint of the judge, such as http://localhost:8000/v1. The key is read from "
                "the environment variable OPENAI_API_KEY."
            }
        )
        judge_model: str = field(metadata={"help": "Name of the judge as its server knows it."})
        simulator_base_url: str | None = field(
            default=None, metadata={"help": "Endpoint of the model that plays the users. By default the judge's."}
        )
        simulator_model: str | None = field(
            default=None, metadata={"help": "Model that plays the users. By default the judge's."}
        )
        simulator_temperature: float = field(
            default=1.0, metadata={"help": "Sampling temperature of the simulated users. The judge's is 0."}
        )
        model_base_url: str | None = field(
            default=None,
            metadata={
                "help": "Endpoint of the model under test, if it is served: `model_name_or_path` is then its name there. By "
                "default it is loaded with Transformers."
            },
        )
        adapter: str | None = field(
            default=None, metadata={"help": "Folder or name of a PEFT adapter to put on the model."}
        )
        output_dir: str = field(default="outputs/aloe", metadata={"help": "Folder of what is written."})
        conversations: int | None = field(
            default=None, metadata={"help": "Conversations, drawn with `seed`. By default all (100 in ALOE)."}
        )
        personalities: int = field(
            default=5, metadata={"help": "Personalities that each profile is paired with: the first so many."}
        )
        rounds: int = field(default=10, metadata={"help": "Rounds of each conversation."})
        temperature: float = field(default=0.4, metadata={"help": "Sampling temperature of the model; 0 is greedy."})
        max_new_tokens: int = field(default=512, metadata={"help": "Tokens that a reply of the model may have."})
        batch_size: int = field(default=8, metadata={"help": "Conversations at a time, where the model is loaded."})
        seed: int = field(default=0, metadata={"help": "Of the drawn conversations and of the model's sampling."})
        chat_template_kwargs: str | None = field(
            default=None,
            metadata={
                "help": "Arguments of the chat template as JSON, where the model is loaded, such as "
                "'{\"enable_thinking\": false}'."
            },
        )
        simulator_max_tokens: int = field(default=300, metadata={"help": "Tokens that a user's message may have."})
        judge_max_tokens: int = field(
            default=300, metadata={"help": "Tokens that the judge may write. More for a judge that reasons first."}
        )
        concurrency: int = field(default=4, metadata={"help": "Requests at the same time."})
        cache_path: str | None = field(
            default=None,
            metadata={
                "help": "File of the endpoints' answers. By default 'answers.jsonl' in `output_dir`; runs that share one "
                "begin with the same messages."
            },
        )
        trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
        overwrite: bool = field(
            default=False, metadata={"help": "Remove an earlier run from `output_dir` instead of going on with it."}
        )

    return TrlParser(
        (AloeArguments, ModelConfig),
        prog="trl-perce aloe",
        description=f"{HELP}. Writes conversations.jsonl and aloe.json to --output_dir. Called again, it goes on where it "
        "stopped.",
    )


def run(argv: list[str]) -> int:
    """
    Run ALOE with a model and print its figures.

    Args:
        argv (`list[str]`): Arguments after `trl-perce aloe`.

    Returns:
        `int`: Exit code: 1 where an endpoint failed. Arguments or files that are wrong exit with 2, before a model loads.
    """
    from trl_perce.evaluation.endpoint import EndpointError
    from trl_perce.scoring.loading import AdapterError

    parser = make_parser()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        check_config_keys(parser, argv)
        args, model_args, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
        check_rest(parser, unknown, launch=False)
        run = AloeRun(args, model_args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.exit(2, f"trl-perce aloe: error: {error}\n")
    try:
        run.show(run.aloe.run())
    except AdapterError as error:
        parser.exit(2, f"trl-perce aloe: error: {error}\n")
    except EndpointError as error:
        parser.exit(1, f"trl-perce aloe: error: {error}\n")
    return 0


class AloeRun:
    """
    One run of the command. What can be wrong with arguments, files and an earlier run is found here, before the model loads.

    Args:
        args (`AloeArguments`): Arguments of the command.
        model_args ([`~trl.ModelConfig`]): Says which model and quantization.

    Raises:
        `ValueError`: Arguments, files or an earlier run do not fit; the message says what to write instead.
    """

    def __init__(self, args, model_args):
        from trl_perce.benchmarks.aloe import Aloe, Responder, load_personas, remove_run
        from trl_perce.evaluation.endpoint import Endpoint

        self.args, self.model_args = args, model_args
        self._check()
        personas = load_personas(args.data_dir, args.personalities, args.conversations, args.seed)
        cache_path = args.cache_path or Path(args.output_dir) / "answers.jsonl"
        options = {"concurrency": args.concurrency, "cache_path": cache_path}
        judge = Endpoint(args.judge_base_url, args.judge_model, max_tokens=args.judge_max_tokens, **options)
        simulator = Endpoint(
            args.simulator_base_url or args.judge_base_url,
            args.simulator_model or args.judge_model,
            temperature=args.simulator_temperature,
            max_tokens=args.simulator_max_tokens,
            keep_cut=True,
            **options,
        )
        if args.model_base_url:
            limits = {"temperature": args.temperature, "max_tokens": args.max_new_tokens, "keep_cut": True}
            responder: Responder = Endpoint(
                args.model_base_url, model_args.model_name_or_path, **limits, **options
            ).ask
        else:
            self._load_tokenizer()
            responder = self._respond
        settings = {
            "model": model_args.model_name_or_path,
            **{name: getattr(args, name) for name in _SETTINGS},
            **{name: getattr(model_args, name) for name in MODEL_SETTINGS},
        }
        if args.overwrite:
            remove_run(args.output_dir)
        self.aloe = Aloe(personas, responder, simulator, judge, args.output_dir, args.rounds, settings)

    def _check(self) -> None:
        args, name = self.args, self.model_args.model_name_or_path
        if name is None:
            raise ValueError("`model_name_or_path` is missing. Write a folder with a model, or a name.")
        for key in _POSITIVE:
            if getattr(args, key) < 1:
                raise ValueError(f"`{key}` is {getattr(args, key)}. Write 1 or more.")
        check_writable(args.output_dir)
        if args.model_base_url and (args.adapter or args.chat_template_kwargs):
            raise ValueError(
                "`adapter` and `chat_template_kwargs` are for a model that is loaded here, and `model_base_url` says that it is "
                "served. Give them to the server, or leave `model_base_url` out."
            )
        try:
            self.chat_template_kwargs = json.loads(args.chat_template_kwargs or "{}")
        except ValueError:
            self.chat_template_kwargs = None
        if not isinstance(self.chat_template_kwargs, dict):
            raise ValueError(f"`chat_template_kwargs` is {args.chat_template_kwargs!r}. Write a JSON object.")

    def _load_tokenizer(self) -> None:
        from trl_perce.scoring.loading import find_adapter, load_scoring_tokenizer

        self.args.model_init_kwargs = None
        self.args.model_init_kwargs = model_init_kwargs(self.model_args, self.args)
        self.base, self.adapter = find_adapter(self.model_args.model_name_or_path, self.args.adapter)
        self.tokenizer = load_scoring_tokenizer(self.base, self.adapter, self.args)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {self.base!r} has no chat template, without which a model cannot talk."
            )

    def _respond(self, conversations: list[list[dict[str, str]]]) -> Iterator[str]:
        return self._responder(conversations)

    @cached_property
    def _responder(self):
        """Loaded when it is first asked: not for a run that only lacks verdicts."""
        from trl import get_quantization_config

        from trl_perce.benchmarks.responder import TransformersResponder
        from trl_perce.scoring.loading import load_model

        args = self.args
        model = load_model(self.base, self.adapter, args, get_quantization_config(self.model_args))
        return TransformersResponder(
            model,
            self.tokenizer,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=args.seed,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def show(self, result: dict[str, Any]) -> None:
        """Print the figures."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="ALOE: alignment, from 1 to 5", title_justify="left")
        for heading in ("round", "mean", "95 % interval", "rated"):
            table.add_column(heading, justify="right")
        for row in result["rounds"]:
            table.add_row(str(row["round"]), *_cells(row["alignment"]), f"{row['rated']} of {result['conversations']}")
        table.add_row("6-10", *_cells(result["alignment_late"]), "")
        console = Console(highlight=False)
        console.print(table)
        for name, meaning in _FIGURES.items():
            value, interval = _cells(result[name])
            console.print(f"{meaning}: {value} ({interval})", markup=False)
        counts = ", ".join(f"{result[name]} {meaning}" for name, meaning in _COUNTS.items())
        console.print(f"Of {result['conversations']} conversations: {counts}.", markup=False, soft_wrap=True)
        console.print(
            f"Written to {self.args.output_dir}: conversations.jsonl, aloe.json", markup=False, soft_wrap=True
        )


def _cells(figure: dict[str, Any]) -> tuple[str, str]:
    value, interval = figure["value"], figure["interval"]
    mean = "-" if value is None else f"{value:.3f}"
    return mean, "-" if interval is None else f"{interval[0]:.3f} … {interval[1]:.3f}"
