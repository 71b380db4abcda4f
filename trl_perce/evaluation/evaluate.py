# SPDX-License-Identifier: Apache-2.0

"""
The evaluation of a model on rows: predictions, their overlap with the references, uptake of the persona, likelihoods, a judge.

    predictions.jsonl ──► metrics, uptake ──┐
    scores/scores.jsonl ──► likelihoods ────┼──► metrics.jsonl (rows) ──► metrics.json (means, intervals) ──► report.md
    judge.jsonl ────────────────────────────┘
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from ..config import copy_config, describe_precision
from ..persona.marks import PersonaError
from ..scoring.loading import find_adapter, load_model, load_scoring_tokenizer
from ..scoring.percontrast import PerContrast
from ..scoring.preparation import Preparation
from ..scoring.score_file import ScoreFile, read_scores, remove_scores
from ..scoring.scores import TokenScores
from ..training.checks import load_tokenizer
from ..utils.files import fingerprint, read_lines, write_json, write_json_lines
from ..utils.row_file import RowFile, remove_rows
from .arguments import EvaluationArguments, GenerationArguments
from .generate import TransformersGenerator, VLLMGenerator, import_vllm
from .likelihood import likelihood_values, score_swapped, token_likelihoods
from .metrics import text_metrics
from .options import option_questions, option_rows, option_values
from .predictions import choose_rows, make_prompts, other_rows
from .report import write_report
from .results import compare, read_baseline, summarise
from .style import check_baseline, check_encoder, check_texts, load_encoder, style_values
from .uptake import persona_uptakes


logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"
# Settings that predictions and scores depend on
_SHARED_SETTINGS = [
    *("max_length", "truncate_persona", "chat_template_path", "eos_token", "bf16", "fp16"),
    *("persona_start_marker", "persona_end_marker", "chat_template_kwargs"),
]
_GENERATION_SETTINGS = ["temperature", "top_p", "max_new_tokens", "guidance_scale", "seed"]
_SCORE_SETTINGS = ["counterfactual", "personal_threshold", "truncation_mode", "answer_only_loss"]


def evaluate(
    model,
    tokenizer,
    rows: Iterable[dict[str, Any]],
    folder: str | Path,
    args: GenerationArguments,
    options: EvaluationArguments | None = None,
    settings: dict[str, Any] | None = None,
    adapter: str | None = None,
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """
    Evaluate a model on rows. Called again with the same folder, it goes on where it stopped and does nothing twice.

    On several processes (Accelerate) all of them call it, with the same arguments, and share the rows' predictions and scores; the model is
    whole on each. The main process alone asks the judge, writes the results and has them.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Name or folder of a model or of an adapter, which is
            loaded when a step needs it; or a model, which is run where it is, with its adapters, and left as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `None`): If `None`, it is loaded from the model's name.
        rows (iterable of `dict`): Rows with `prompt` and `completion`, or with `messages`, a persona, and if possible `user` and `id`. Of
            `messages`, predictions are of the last one, which must be the assistant's; likelihoods are of all the assistant's, which are
            what is trained.
        folder (`str` or `Path`): Where to write `predictions.jsonl`, `metrics.jsonl`, `metrics.json`, `report.md`, and the rest.
        args ([`GenerationArguments`]): Configuration of generation and scoring. Only responses are scored, whatever
            `completion_only_loss` and `assistant_only_loss` are.
        options ([`EvaluationArguments`], *optional*): What to evaluate.
        settings (`dict[str, Any]`, *optional*): What identifies the model, as JSON takes it (its name, the training run). Earlier
            results in the folder are used only where it is the same. By default the names of model and adapter; a model that is
            loaded needs it.
        adapter (`str`, *optional*): Name or folder of an adapter to put on the model, where `model` is a name.
        say (`Callable[[str], None]`, *optional*): Takes a line about each step. By default it is logged.

    Returns:
        `dict[str, Any]`: What `metrics.json` holds: `"rows"`, `"users"` (told by their personas where they are not named), `"predicted"`,
            `"unanswered"` (thoughts without an answer), `"earlier_replies"` (of conversations, without a prediction), `"trimmed"`, `"settings"`, `"personal_by"`, `"style_encoder"`, `"metrics"` (`{name: {"mean", "interval", "rows"}}`), `"judge"` and `"baseline"` (`None`, or `"folder"` and `"tests"`).
            Empty on other processes than the main one.

    Raises:
        `PersonaError`: A row's persona is unclear; the message names the row.
        `ValueError`: Options or rows do not fit, or the folder holds results of other settings.
        `FileNotFoundError`: A folder that an option names, or NLTK's data for METEOR, are not there.
    """
    evaluation = Evaluation(model, tokenizer, rows, folder, args, options, settings, adapter, say)
    return evaluation.run()


class Evaluation:
    """
    One evaluation. What can be wrong with options, rows and earlier results is found when it is made, before a model loads;
    [`~Evaluation.run`] does the rest. Arguments and errors are those of [`evaluate`].
    """

    def __init__(
        self, model, tokenizer, rows, folder, args, options=None, settings=None, adapter=None, say=logger.info
    ):
        self.options = options or EvaluationArguments()
        self.args = copy_config(args, completion_only_loss=None, assistant_only_loss=None)  # the responses alone
        self.is_main = PartialState().is_main_process
        self.folder, self.say = Path(folder), say if self.is_main else _say_nothing
        self.rows = [*rows]
        self.options_to_score = option_rows(self.rows)
        self.model, self.base, self.adapter = model, None, None
        if isinstance(model, str):
            self.base, self.adapter = find_adapter(model, adapter)
            self.tokenizer = load_scoring_tokenizer(self.base, self.adapter, self.args, tokenizer)
        else:
            self.model = model = _whole(model)
            self.tokenizer = load_tokenizer(model, self.args, tokenizer)
        self._check_options()
        prepared = Preparation(self.tokenizer, self.args).tokenizer
        self.prompts = make_prompts(self.rows, prepared, self.args)
        self.swapped = make_prompts(self.rows, prepared, self.args, True) if self.options.swap_persona else None
        self.users = [None if row.get("user") is None else str(row["user"]) for row in self.rows]
        # What the bootstrap draws: users, told by their personas where they are not named
        known = {prompt.row: prompt.user or prompt.persona for prompt in self.prompts}
        self.groups = [known.get(row) or None for row in range(len(self.rows))]
        references = {prompt.row: prompt.reference for prompt in self.prompts}
        self.texts = [references.get(row, "") for row in range(len(self.rows))]
        if self.options.style_encoder is not None:
            check_texts(self.texts, self.groups)
        self.fitting = len(self.prompts)
        chosen = choose_rows([known[prompt.row] for prompt in self.prompts], self.options.prediction_rows)
        self.prompts = [self.prompts[place] for place in chosen]
        if self.swapped is not None:
            self.swapped = [self.swapped[place] for place in chosen]
        baseline = self.options.baseline
        self.baseline = None if baseline is None else read_baseline(baseline, self.prompts)
        if baseline is not None and self.options.style_encoder is not None:
            check_baseline(baseline, self.options.style_encoder)
        if settings is None and self.base is None:
            raise ValueError("`settings` is missing: a name that tells this model's results from another's.")
        names = {"model": self.base, "adapter": self.adapter}
        self.settings = {
            **(names if settings is None else settings),
            "rows": len(self.rows),
            "fingerprint": fingerprint(self.rows),
        }
        self._vllm, self.personal_by = None, None
        self._open_files()

    def run(self) -> dict[str, Any]:
        """Do what is not done yet, write the results, and return what `metrics.json` holds (on the main process)."""
        predictions = self._predictions(self.file, self.prompts, False)
        swapped = self._predictions(self.swapped_file, self.swapped, True) if self.swapped is not None else None
        scores = {name: self._scores(name) for name in self.score_files}
        if not self.is_main:
            return {}
        values = self._text_values(predictions, swapped)
        if self.options.likelihood:
            values |= self._likelihood_values(scores)
        judged = None
        judge_url, judge_model = self.options.judge_base_url, self.options.judge_model
        if judge_url is not None and judge_model is not None:  # both, or neither
            judged, judge_values = self._judge(predictions, judge_url, judge_model)
            values |= judge_values
        unanswered = sum("raw" in line and not line["prediction"] for line in predictions)
        result = self._result(values, judged, unanswered)
        lines = [
            {"row": index, "id": row.get("id"), "user": self.users[index]}
            | {name: _plain(own[index]) for name, own in values.items()}
            for index, row in enumerate(self.rows)
        ]
        write_json_lines(self.folder / "metrics.jsonl", lines)
        write_json(self.folder / "metrics.json", result)
        write_report(result, predictions, self.folder / "report.md")
        return result

    # ── before the model loads ───────────────────────────────────────────────────────────────────────────────────────

    def _check_options(self) -> None:
        options = self.options
        if self.is_main:  # or all would download NLTK's data
            text_metrics([], [], metrics=options.metrics)  # unknown names, missing packages and data
        if options.style_encoder is not None:
            check_encoder(options.style_encoder, self.args.trust_remote_code)
        if self.args.counterfactual == "swap":
            raise ValueError(
                "`counterfactual='swap'` is not for evaluation. Set `swap_persona`, and `counterfactual='drop'`."
            )
        if options.reference_scores is not None and not (Path(options.reference_scores) / "scores.jsonl").is_file():
            raise FileNotFoundError(
                f"`reference_scores`: there is no 'scores.jsonl' in {options.reference_scores!r}. Give the output folder of "
                "`trl-perce score`, or the folder 'scores' of another evaluation."
            )
        if options.use_vllm:
            check_vllm_processes(PartialState().num_processes)
            if not isinstance(self.model, str):
                raise ValueError("`use_vllm` needs the name or folder of a model, and got one that is loaded already.")
            if self.args.guidance_scale != 1:
                raise ValueError("`use_vllm` does not go with `guidance_scale`. Leave one of them out.")
            import_vllm()

    def _open_files(self) -> None:
        folder = self.folder
        parts = {"scores": folder / "scores", "reference": folder / "reference"}
        parts |= {name: folder / f"scores_{name}" for name in ("swapped", "options", "options_swapped")}
        if self.options.overwrite:
            for own in (folder, folder / "swapped"):
                remove_rows(own, PREDICTIONS)
            for own in parts.values():
                remove_scores(own)
            for name in ("metrics.json", "metrics.jsonl", "report.md", "judge.jsonl") if self.is_main else ():
                (folder / name).unlink(missing_ok=True)
        shared = self.settings | {name: getattr(self.args, name) for name in _SHARED_SETTINGS}
        generation = {name: getattr(self.args, name) for name in _GENERATION_SETTINGS}
        generation["use_vllm"] = self.options.use_vllm
        if self.options.prediction_rows is not None:
            generation["prediction_rows"] = self.options.prediction_rows
        scoring = shared | {name: getattr(self.args, name) for name in _SCORE_SETTINGS}
        self.file = RowFile(folder, PREDICTIONS, shared | generation)
        if self.options.swap_persona:
            self.swapped_file = RowFile(folder / "swapped", PREDICTIONS, shared | generation | {"swap_persona": True})
        is_adapter = self.adapter is not None or isinstance(self.model, PeftModel)
        names = (["scores"] if self.options.likelihood else []) + (["swapped"] if self._scores_swapped else [])
        if self.options.likelihood and self.options_to_score:
            names += ["options"] + (["options_swapped"] if self._scores_swapped else [])
        if self.options.likelihood and is_adapter and self.options.reference_scores is None:
            names.append("reference")
        self.score_files = {name: ScoreFile(parts[name], scoring | {"scored": name}) for name in names}
        missing = [name for name, file in self.score_files.items() if not file.is_finished]
        if self.options.use_vllm and missing and not self.file.is_finished:
            raise ValueError(
                "`use_vllm` holds the GPU's memory, in which the likelihoods' model has no room. Call with `--likelihood False` "
                "first, then again without it: the predictions are kept."
            )

    @property
    def _scores_swapped(self) -> bool:
        return self.options.likelihood and self.options.swap_persona

    @property
    def _dtype(self) -> Any:
        """Of the model's weights. A name's is what was asked for: a run that only goes on may never load it."""
        return (self.args.model_init_kwargs or {}).get("dtype") if self.base is not None else self.model.dtype

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _loaded(self):
        if isinstance(self.model, str) and self.base is not None:
            self.model = load_model(self.base, self.adapter, self.args)
        return self.model

    def _predictions(self, file: RowFile, prompts, is_swapped: bool) -> list[dict[str, Any]]:
        what = "predictions with swapped personas" if is_swapped else "predictions"
        if file.done:
            self.say(f"{len(file.done)} {what} are there already.")
        if not file.is_finished:
            if self.options.use_vllm:
                if self._vllm is None:  # the model is a name, and there is a base: see `_check_options`
                    self._vllm = VLLMGenerator(self.adapter or self.base, self.tokenizer, self.args)  # type: ignore[arg-type]
                generator = self._vllm
            else:
                generator = TransformersGenerator(self._loaded(), self.tokenizer, self.args)
            done, started = len(file.done), time.time()
            file.append_lines(generator.iterate(prompts, frozenset(file.done), file.share()))
            file.finish()
            self.say(f"Generated {len(file.done) - done} {what} in {time.time() - started:.1f} s.")
        return [*file.lines()] if self.is_main else []

    def _text_values(self, predictions, swapped) -> dict[str, np.ndarray]:
        """Overlap and uptake, of the predictions and of those with swapped personas."""
        style = [] if self.options.style_encoder is None else [self.options.style_encoder, self.texts, self.groups]
        said = [prompt.conversation for prompt in self.prompts]
        self.digest = fingerprint([self.options.metrics, predictions, swapped, said, *style])
        values = self._earlier_values()
        if values is None:
            values = self._metrics_of(predictions)
            if swapped is not None:
                values |= {f"swapped/{name}": own for name, own in self._metrics_of(swapped, predictions).items()}
        self.text_names = [*values]
        return values

    def _earlier_values(self) -> dict[str, np.ndarray] | None:
        """The values of the last call, where they are of the same predictions and metrics."""
        result, lines = self.folder / "metrics.json", self.folder / "metrics.jsonl"
        if not (result.is_file() and lines.is_file()):
            return None
        earlier = json.loads(result.read_text(encoding="utf-8"))["text_metrics"]
        if earlier["digest"] != self.digest:
            return None
        rows = [*read_lines(lines)]
        return {name: np.array([row[name] for row in rows], dtype=float) for name in earlier["names"]}

    def _metrics_of(self, predictions, with_own=None) -> dict[str, np.ndarray]:
        """
        Metrics of predictions. `with_own` are those with the rows' own personas, where `predictions` were made with others'.
        """
        if not predictions:
            return {}
        texts, personas = ([line[key] for line in predictions] for key in ("prediction", "persona"))
        said = {prompt.row: prompt.conversation for prompt in self.prompts}
        queries = [said[line["row"]] for line in predictions]
        values = dict(text_metrics(texts, [line["reference"] for line in predictions], metrics=self.options.metrics))
        if with_own is not None:
            own = {line["row"]: line["persona"] for line in with_own}
            values["uptake/other"] = persona_uptakes(texts, personas, queries)  # of the persona that was in the prompt
            values["uptake/own"] = persona_uptakes(texts, [own[line["row"]] for line in predictions], queries)
        else:
            values["uptake/own"] = persona_uptakes(texts, personas, queries)
            try:
                others = other_rows([line["user"] for line in predictions], personas)
            except PersonaError as error:
                self.say(f"No uptake of another user's persona to compare with. {error}")
            else:
                values["uptake/other"] = persona_uptakes(texts, [personas[other] for other in others], queries)
        if self.options.style_encoder is not None:
            of_rows = [line["row"] for line in predictions]
            values |= style_values(texts, of_rows, self.texts, self.groups, self._style_encoder)
        values["num_tokens"] = np.array([line["num_tokens"] for line in predictions], dtype=float)
        values["finished"] = np.array([line["finished"] for line in predictions], dtype=float)
        return {name: self._by_row(predictions, own) for name, own in values.items()}

    @cached_property
    def _style_encoder(self):
        name, device = str(self.options.style_encoder), "cpu" if self.args.use_cpu else None
        return load_encoder(name, self.args.trust_remote_code, device)

    def _by_row(self, predictions, own: np.ndarray) -> np.ndarray:
        """Values of predictions as values of all rows, NaN for those that were left out."""
        values = np.full(len(self.rows), np.nan)
        values[[line["row"] for line in predictions]] = own
        return values

    def _likelihood_values(self, by_name: dict[str, list[TokenScores]]) -> dict[str, np.ndarray]:
        scores = by_name["scores"]
        folder = self.options.reference_scores
        if folder is not None:
            reference, self.personal_by = self._given_reference(folder), folder
        elif "reference" in by_name:
            reference, self.personal_by = by_name["reference"], "the base model, without its adapter"
        else:
            reference, self.personal_by = scores, "the evaluated model itself"
        values = likelihood_values(token_likelihoods(scores, reference, by_name.get("swapped")))
        if "options" in by_name:
            values |= option_values(self.rows, by_name["options"], by_name.get("options_swapped"))
        return values

    def _scores(self, name: str) -> list[TokenScores]:
        file = self.score_files[name]
        if not file.is_finished:
            model = self._loaded()
            # Another's persona takes the place of a row's own, whose turn stays
            is_swapped = name.endswith("swapped")
            args = copy_config(self.args, counterfactual="drop") if is_swapped else self.args
            scorer = PerContrast(model, self.tokenizer, args)
            of_options = name.startswith("options")
            rows = self.options_to_score if of_options else self.rows
            prepared, done, started = scorer.prepare(rows), frozenset(file.done), time.time()
            share = file.share()
            if name == "reference":
                with model.disable_adapter():
                    file.append(scorer.iterate(prepared, done, share))
            elif is_swapped:
                questions = option_questions(self.rows) if of_options else None
                users = self.users if questions is None else [self.users[question] for question in questions]
                file.append(score_swapped(scorer, prepared, users, done, share, questions))
            else:
                file.append(scorer.iterate(prepared, done, share))
            file.finish()
            self.say(f"Scored {len(file.done) - len(done)} rows ({name}) in {time.time() - started:.1f} s.")
        return [*file] if self.is_main else []

    def _given_reference(self, folder: str) -> list[TokenScores]:
        by_row = {scores.row: scores for scores in read_scores(folder)}
        missing = [row for row in range(len(self.rows)) if row not in by_row]
        if missing:
            raise ValueError(
                f"`reference_scores`: {folder!r} has no scores of {len(missing)} rows, first row "
                f"{missing[0]}. Score the same rows."
            )
        return [by_row[row] for row in range(len(self.rows))]

    def _judge(self, predictions, base_url: str, model: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        from .endpoint import Endpoint
        from .judge import judge_predictions

        endpoint = Endpoint(
            base_url,
            model,
            max_tokens=self.options.judge_max_tokens,
            cache_path=self.folder / "judge_answers.jsonl",
            extra_body=self.options.judge_extra_body,  # type: ignore[arg-type]  # parsed by now
        )
        judged = judge_predictions(predictions, endpoint)
        judged.write(self.folder / "judge.jsonl", predictions)
        values = {f"judge/{name}": self._by_row(predictions, own) for name, own in judged.scores.items()}
        return {"model": model, "criteria": judged.summary(), "cut": endpoint.num_cut}, values

    # ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _result(self, values: dict[str, np.ndarray], judged: dict[str, Any] | None, unanswered: int) -> dict[str, Any]:
        trimmed = [prompt.trimmed for prompt in self.prompts if prompt.trimmed]
        compared = None
        if self.baseline is not None:
            tests = compare(values, self.baseline, self.groups)
            compared = {"folder": self.options.baseline, "tests": tests}
        used = {name: getattr(self.args, name) for name in _SHARED_SETTINGS + _GENERATION_SETTINGS + _SCORE_SETTINGS}
        return {
            "rows": len(self.rows),
            "users": len({*self.groups} - {None}),
            "predicted": len(self.prompts),
            "too_long": len(self.rows) - self.fitting,
            "unanswered": unanswered,
            "earlier_replies": sum(prompt.earlier_replies for prompt in self.prompts),
            "trimmed": {"rows": len(trimmed), "tokens": sum(trimmed)},
            "settings": self.settings | used | {"precision": describe_precision(self.args, self._dtype)},
            "personal_by": self.personal_by,
            "style_encoder": self.options.style_encoder,
            "metrics": summarise(values, self.groups),
            "judge": judged,
            "baseline": compared,
            "text_metrics": {"digest": self.digest, "names": self.text_names},
        }


def check_vllm_processes(count: int) -> None:
    """Raise a `ValueError` if there is more than one process for vLLM, which schedules by itself."""
    if count > 1:
        raise ValueError(
            f"`use_vllm` generates in one process, and there are {count}. Leave `num_processes` and `accelerate_config` out, or "
            "set `num_processes` to 1."
        )


def _say_nothing(line: str) -> None:
    """What other processes than the main one say."""


def _whole(model):
    """
    A model that a process can run while another runs another batch. `DistributedDataParallel`, which talks to the others in every
    forward, is taken off.

    Raises:
        `ValueError`: Each process has a part of the model.
    """
    if PartialState().num_processes == 1:
        return model
    model = extract_model_from_parallel(model)
    if isinstance(model, FSDP) or any(
        isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters()
    ):
        raise ValueError(
            "Each process has a part of the model (FSDP, ZeRO-3), and evaluation needs all of it on each. Save it, and give its "
            "folder as the model."
        )
    return model


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
