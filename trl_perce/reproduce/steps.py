# SPDX-License-Identifier: Apache-2.0

"""
The steps of a grid. Each is one of our commands, called in this process with a YAML file of its own, which stays in its folder:

    data/<task>/                  train.jsonl, validation.jsonl, test.jsonl
    untrained/<model>/<task>/     the model as it comes, evaluated; its scores say which tokens are personal
    weights/<model>/<task>/       training rows with the weights that the untrained model gives them, for methods that take them
    runs/<model>/<task>/<run>/    an adapter, trained; below it a folder for each task that it is evaluated on
"""

import dataclasses
import difflib
import gc
import hashlib
import importlib
import inspect
import json
import os
import re
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..history.entries import to_examples
from ..history.retrieval import Retriever
from ..utils.files import is_disk_error, read_lines, write_json_lines, write_text
from ..utils.memory import peak_memory
from .grid import GridError, Step
from .settings import SEEN, Cell, Settings, Task


# Arguments of training that an evaluation takes over, beside those that say which model it is
_EVALUATED = (
    "max_length",
    "truncate_persona",
    "bf16",
    "fp16",
    "use_cpu",
    "chat_template_path",
    "eos_token",
    "trust_remote_code",
)


@dataclass(frozen=True)
class Command:
    """
    A command that steps are made of. The grid is given them, since the command line stands on the grid.

    Args:
        run (`Callable[[list[str]], int]`): Takes arguments, gives an exit code.
        parser ([`~argparse.ArgumentParser`]): Knows its arguments.
    """

    run: Callable[[list[str]], int]
    parser: ArgumentParser


class Steps:
    """
    Makes the steps of a grid, each once.

    Args:
        settings ([`Settings`]): The grid.
        commands (`Mapping[str, Command]`): `"train"`, `"evaluate"`, and those of `"score"` and `"aloe"` that the grid needs.
        rows (`Mapping[str, Mapping[str, list]]`, *optional*): Rows of tasks whose benchmark is `"rows"`, by task and split. They are
            written as they are; what tells them from others belongs into the task's `options`.

    Attributes:
        data (`dict[str, Step]`): By task.
        untrained (`dict[tuple[str, str], list[Step]]`): By model and task: its evaluation, and its judgement if there is a judge.
        weights (`dict[Path, Step]`): By folder.
        train (`dict[Cell, Step]`): By run.
        evaluate (`dict[tuple[Cell, str], list[Step]]`): By run and task.
    """

    def __init__(
        self,
        settings: Settings,
        commands: Mapping[str, Command],
        rows: Mapping[str, Mapping[str, list]] | None = None,
    ):
        self.settings, self.commands, self._rows = settings, commands, rows or {}
        self._loaded: dict[tuple[str, str], list] = {}  # rows of local files, by task and split
        self.folder = Path(settings.output_dir)
        tasks, cells = settings.tasks, settings.cells()
        self.data: dict[str, Step] = {}
        for task in sorted(
            tasks.values(), key=lambda task: task.of is not None
        ):  # those that others are made of first
            if task.benchmark != "aloe":
                self.data[task.name] = self._data_step(task)
        self.untrained = {
            (model, name): self._evaluations(model, task, self.folder / "untrained" / model / name)
            for model in settings.models
            for name, task in tasks.items()
            if task.test_rows
        }
        self.weights = {
            self._weights_folder(cell): self._weights_step(cell)
            for cell in cells
            if settings.methods[cell.method].get("token_weighting") == "given"
        }
        self.train = {cell: self._train_step(cell) for cell in cells}
        self.evaluate = {
            (cell, name): self._evaluations(cell.model, tasks[name], self._run_folder(cell) / name, cell)
            for cell in cells
            for name in settings.evaluated_tasks(cell)
        }

    def all(self) -> list[Step]:
        """All steps in the order in which they shall run: one run after the other, from training to its last evaluation."""
        steps = [*self.data.values(), *(step for own in self.untrained.values() for step in own)]
        steps += self.weights.values()
        for cell, train in self.train.items():
            steps += [train, *(step for own in self.evaluations_of(cell).values() for step in own)]
        return steps

    def evaluations_of(self, cell: Cell) -> dict[str, list[Step]]:
        """The evaluations of a run, by task."""
        return {task: self.evaluate[(cell, task)] for task in self.settings.evaluated_tasks(cell)}

    def _run_folder(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.name

    def check_data(self) -> None:
        """
        Look at the data that are still to be made, before anything runs: the keys of the tasks, and the rows of local files. What
        comes from the Hub is not downloaded here.

        Raises:
            [`GridError`]: A file is not there, a row is bad, or a key is wrong. The message has a line for each task concerned.
        """
        problems = []
        for name, task in self.settings.tasks.items():
            try:
                if task.benchmark == "aloe":
                    self._check_aloe(task)
                elif self.data[name].state != "done" and name not in self._rows and task.of is None:
                    self._check_data(task, self.data[name].settings["rows"])
            except (ValueError, OSError, ImportError) as error:
                problems.append(f"`tasks`, {name}: {error}")
        if problems:
            raise GridError("\n".join(problems))

    def _check_data(self, task: Task, sizes: dict[str, int]) -> None:
        benchmark = importlib.import_module(f"trl_perce.benchmarks.{task.benchmark}")
        _check_arguments(benchmark.load, task.options, ("split", "num_rows"))
        if task.benchmark != "general_qa":
            _check_arguments(Retriever, task.retrieval, ("cache_dir",))
            Retriever(**task.retrieval)
        if "path" in task.options:
            for split, num_rows in sizes.items():
                self._loaded[(task.name, split)] = _load(benchmark, task, split, num_rows)

    def _check_aloe(self, task: Task) -> None:
        from ..benchmarks.aloe import load_personas

        known = {option.lstrip("-") for option in self.commands["aloe"].parser._option_string_actions}
        for key in task.options:
            if key not in known:
                raise ValueError(_unknown(key, known))
        if "data_dir" not in task.options:
            raise ValueError("`data_dir` is missing: the folder with ALOE's two files.")
        load_personas(task.options["data_dir"])

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _data_step(self, task: Task) -> Step:
        sizes = {"train": task.train_rows, "validation": task.validation_rows, "test": task.test_rows}
        sizes = {split: rows for split, rows in sizes.items() if rows and (task.is_trained or split == "test")}
        options = {"benchmark": task.benchmark, **task.options, "rows": sizes, "retrieval": task.retrieval}
        if task.test_split != "test":
            options["test_split"] = task.test_split
        needs: tuple[Step, ...] = ()
        if task.of is not None and task.name not in self._rows:
            needs = (self.data[task.of],)
            options["of"] = needs[0].settings
        return Step(
            folder=self.folder / "data" / task.name,
            kind="data",
            settings=options,
            run=lambda: self._write_data(task, sizes),
            needs=needs,
        )

    def _write_data(self, task: Task, sizes: dict[str, int]) -> dict[str, Any]:
        try:
            with _output_to(self._data_path(task) / "data.log"):
                return {split: self._write_rows(task, split, rows) for split, rows in sizes.items()}
        except (ValueError, OSError, ImportError) as error:
            if is_disk_error(error):
                raise
            raise GridError(f"`tasks`, {task.name}: {error}") from error

    def _write_rows(self, task: Task, split: str, num_rows: int) -> dict[str, Any]:
        """Load a split, retrieve, and write it as rows that `trl-perce train` and `evaluate` take."""
        rows: list
        if task.name in self._rows:
            rows = self._rows[task.name][split]
        elif task.of is not None:
            rows = self._derived_rows(task, num_rows)
        else:
            benchmark = importlib.import_module(f"trl_perce.benchmarks.{task.benchmark}")
            rows = self._loaded.pop((task.name, split), []) or _load(benchmark, task, split, num_rows)
            if task.benchmark != "general_qa":
                retriever = Retriever(**task.retrieval, cache_dir=self.folder / "cache" / "retrieval")
                rows = to_examples(rows, retriever(rows))
        path = self._data_path(task) / f"{split}.jsonl"
        write_json_lines(path, rows)
        return {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def _derived_rows(self, task: Task, num_rows: int) -> list[dict[str, Any]]:
        from ..benchmarks.irrelevant import ask_irrelevant
        from ..evaluation.predictions import take_rows

        source = self._data_path(self.settings.tasks[str(task.of)])
        if task.benchmark == SEEN:
            return take_rows([*read_lines(source / "train.jsonl")], num_rows)
        return ask_irrelevant(read_lines(source / "test.jsonl"), num_questions=num_rows)

    def _data_path(self, task: Task) -> Path:
        return self.folder / "data" / task.name

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _weights_step(self, cell: Cell) -> Step:
        """Scores the training rows with the untrained model, and writes them with their weights."""
        folder, data = self._weights_folder(cell), self.data[cell.task]
        config = self.model_arguments(cell.model) | {
            "model_name_or_path": self.settings.models[cell.model]["model_name_or_path"],
            **{"dataset_name": str(self._data_path(self.settings.tasks[cell.task])), "dataset_split": "train"},
            **{"weight_clip_min": cell.clip[0], "weight_clip_max": cell.clip[1]},
            "counterfactual": self._counterfactual(cell),
        }

        def run() -> dict[str, Any]:
            arguments = ["--output_dir", str(folder), "--token_weights", "true"]
            run_command(self.commands["score"].run, config, folder / "score", arguments)
            return {}

        return Step(folder, "weights", {"config": config, "data": data.settings}, run, needs=(data,))

    def _train_step(self, cell: Cell) -> Step:
        folder, data = self._run_folder(cell), self.data[cell.task]
        recipe = self._recipe(cell)
        needs: tuple[Step, ...] = (data,)
        settings = {"recipe": recipe, "data": data.settings}
        if (weights := self._weights_of(cell)) is not None:
            settings["weights"] = weights.settings
            needs += (weights,)
        return Step(folder, "train", settings, lambda: self._train(recipe, folder), needs)

    def _weights_folder(self, cell: Cell) -> Path:
        low, high = cell.clip
        return self.folder / "weights" / cell.model / cell.task / f"{self._counterfactual(cell)}-clip{low:g}-{high:g}"

    def _counterfactual(self, cell: Cell) -> str:
        return self.settings.methods[cell.method].get("counterfactual", "drop")

    def _weights_of(self, cell: Cell) -> Step | None:
        given = self.settings.methods[cell.method].get("token_weighting") == "given"
        return self.weights[self._weights_folder(cell)] if given else None

    def _recipe(self, cell: Cell) -> dict[str, Any]:
        task = self.settings.tasks[cell.task]
        evaluates = {"eval_strategy": "epoch", "dataset_test_split": "validation"} if task.validation_rows else {}
        path, method = self._data_path(task), dict(self.settings.methods[cell.method])
        if (weights := self._weights_of(cell)) is not None:  # which rows of training alone have
            evaluates, path = {}, weights.folder / "token_weights"
            method.pop("counterfactual", None)  # of the weights
        return {
            **{"eval_strategy": "no"},
            **evaluates,
            **self.settings.training,
            **self.settings.models[cell.model],
            **method,
            **{"learning_rate": cell.learning_rate, "seed": cell.seed},
            **{"weight_clip_min": cell.clip[0], "weight_clip_max": cell.clip[1]},
            **{"dataset_name": str(path), "output_dir": str(self._run_folder(cell))},
        }

    def _train(self, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
        arguments = [argument for key, value in self.settings.launch.items() for argument in (f"--{key}", str(value))]
        if recipe.get("save_strategy", "steps") != "no":
            arguments += ["--resume_from_checkpoint", "true"]
        with peak_memory() as memory:
            run_command(self.commands["train"].run, recipe, folder / "train", arguments)
        log = read_log(folder)
        return log if self.settings.launch or not memory else log | {"peak_memory": memory}

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _evaluations(self, model: str, task: Task, folder: Path, cell: Cell | None = None) -> list[Step]:
        """The evaluation of a model, or of a run's adapter, on a task; and behind it a judge's, if there is one."""
        source = self.settings.models[model]["model_name_or_path"] if cell is None else str(self._run_folder(cell))
        needs: tuple[Step, ...] = () if cell is None else (self.train[cell],)
        common = self.model_arguments(model) | {"model_name_or_path": source}
        if task.benchmark == "aloe":
            return [self._aloe_step(common | task.options, folder, needs)]
        config = common | self._evaluation_arguments(task)
        if cell is not None and config.get("likelihood", True):
            untrained = self.untrained[(model, task.name)][0]
            needs += (untrained,)
            config["reference_scores"] = str(untrained.folder / "scores")
        step = Step(
            folder=folder,
            kind="evaluate",
            settings={"config": config, "data": self.data[task.name].settings} | _trained_with(needs),
            run=lambda: self._evaluate(config, folder, "evaluate", task),
            needs=(self.data[task.name], *needs),
        )
        if not self.settings.judge or task.benchmark == "general_qa":
            return [step]
        judge = {f"judge_{key}": value for key, value in self.settings.judge.items()}
        judged = Step(
            folder=folder,
            kind="judge",
            # Another wording of the judge's questions is another judgement
            settings={"evaluation": step.settings, "judge": self.settings.judge, "criteria": _criteria()},
            run=lambda: self._evaluate(config | judge, folder, "judge", task),
            needs=(step,),
        )
        return [step, judged]

    def model_arguments(self, model: str) -> dict[str, Any]:
        """What of the arguments of training says how a model is loaded and which rows it sees."""
        from trl import ModelConfig

        names = {field.name for field in dataclasses.fields(ModelConfig)} | {*_EVALUATED}
        arguments = {**self.settings.training, **self.settings.models[model]}
        adapter = {"use_peft", "use_dora", "use_rslora"}  # the adapter's folder knows what it is
        return {
            key: value
            for key, value in arguments.items()
            if key in names and key not in adapter and not key.startswith("lora_")
        }

    def _evaluation_arguments(self, task: Task) -> dict[str, Any]:
        own: dict[str, Any] = {"dataset_name": str(self._data_path(task)), "dataset_split": "test"}
        if task.benchmark == "general_qa":
            own |= {"metrics": ["rouge"], "likelihood": False, "swap_persona": False}
        return {**self.settings.evaluation, **own, **task.evaluation}

    def _evaluate(self, config: dict[str, Any], folder: Path, kind: str, task: Task) -> dict[str, Any]:
        run_command(self.commands["evaluate"].run, config, folder / kind, ["--output_dir", str(folder)])
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
        if task.benchmark == "general_qa":
            return self._score_answers(task, folder)
        return {"metrics": metrics} | prompt_lengths(folder)

    def _score_answers(self, task: Task, folder: Path) -> dict[str, Any]:
        from ..benchmarks import general_qa
        from ..evaluation.results import summarise

        rows = [*read_lines(self._data_path(task) / "test.jsonl")]
        predictions = {line["row"]: line["prediction"] for line in read_lines(folder / "predictions.jsonl")}
        # A question that is too long for the model has no prediction, and counts as answered wrongly
        scores = general_qa.score([predictions.get(index, "") for index in range(len(rows))], rows)
        return {"metrics": summarise(scores, [None] * len(rows)), "unanswered": len(rows) - len(predictions)}

    def _aloe_step(self, config: dict[str, Any], folder: Path, needs: tuple[Step, ...]) -> Step:
        aloe = self.commands["aloe"]
        names = {option.lstrip("-") for option in aloe.parser._option_string_actions}
        config = {key: value for key, value in config.items() if key in names}

        def run() -> dict[str, Any]:
            run_command(aloe.run, config | {"output_dir": str(folder)}, folder / "aloe_run")
            return json.loads((folder / "aloe.json").read_text(encoding="utf-8"))

        return Step(folder, "evaluate", {"config": config} | _trained_with(needs), run, needs)


def _load(benchmark: Any, task: Task, split: str, num_rows: int) -> list:
    return benchmark.load(split=task.test_split if split == "test" else split, num_rows=num_rows, **task.options)


def _check_arguments(function: Callable, given: Mapping[str, Any], ours: tuple[str, ...]) -> None:
    """Raise on keys of the YAML that are no arguments of a function, and on those that it lacks."""
    parameters = {name: one for name, one in inspect.signature(function).parameters.items() if name not in ours}
    for key in given:
        if key not in parameters:
            raise ValueError(_unknown(key, parameters))
    for name, one in parameters.items():
        if one.default is one.empty and name not in given:
            raise ValueError(f"`{name}` is missing.")


def _unknown(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean `{nearest[0]}`?" if nearest else f"There are {', '.join(known)}."
    return f"unknown key `{key}`. {hint}"


def _criteria() -> str:
    """What the judge is asked, as a checksum."""
    from ..evaluation.judge import CRITERIA

    return hashlib.sha256(repr(CRITERIA).encode()).hexdigest()


def _trained_with(needs: tuple[Step, ...]) -> dict[str, Any]:
    """The settings of the training among the steps that an evaluation needs."""
    return {step.kind: step.settings for step in needs if step.kind == "train"}


def prompt_lengths(folder: Path) -> dict[str, Any]:
    """
    Mean length of the prompts of an evaluation with likelihoods (Table 6 of the paper), special tokens included.

    Args:
        folder (`Path`): Of the evaluation.

    Returns:
        `dict[str, Any]`: `"prompt_lengths"`: `"with_persona"` and `"without_persona"`, in tokens, and `"rows"`, those with a persona; or
            nothing where nothing was scored.
    """
    path = folder / "scores" / "scores.jsonl"
    if not path.is_file():
        return {}
    rows = [row for row in read_lines(path) if row["skipped"] is None and row["num_counterfactual_tokens"]]
    if not rows:
        return {}
    lengths = {
        name: sum(row[key] - len(row["tokens"]) for row in rows) / len(rows)
        for name, key in (("with_persona", "num_tokens"), ("without_persona", "num_counterfactual_tokens"))
    }
    return {"prompt_lengths": lengths | {"rows": len(rows)}}


def run_command(
    run: Callable[[list[str]], int], config: dict[str, Any], path: Path, arguments: Sequence[str] = ()
) -> None:
    """
    Run one of our commands in this process, with a YAML file of its own, which is left beside its log.

    Args:
        run (`Callable[[list[str]], int]`): The command's `run`.
        config (`dict[str, Any]`): Content of the YAML file.
        path (`Path`): Of the file and of the log, without the suffixes `.yaml` and `.log`.
        arguments (`Sequence[str]`): Further arguments.

    Raises:
        [`GridError`]: The command has found data, model or arguments wrong, and has said so.
        `RuntimeError`: The command has not ended well; the message has the end of its log.
        `KeyboardInterrupt`: It was stopped by Ctrl-C; or by SIGTERM, which is sent to this process again.
    """
    write_text(path.with_suffix(".yaml"), yaml.safe_dump(config, sort_keys=False))
    log_path = path.with_suffix(".log")
    begin = log_path.stat().st_size if log_path.exists() else 0
    with _output_to(log_path):
        try:
            code: str | int | None = run(["--config", str(path.with_suffix(".yaml")), *arguments])
        except SystemExit as error:  # of its parser
            code = error.code
    gc.collect()  # a trainer is a cycle, which would hold its model
    if not code:
        return
    said = log_path.read_bytes()[begin:].decode("utf-8", errors="replace").strip()
    if code in (130, 143):
        signal.raise_signal(code - 128)
    if code == 2:
        raise GridError(f"{path.parent}: {re.split(r'trl-perce [a-z]+: error: ', said)[-1]}")
    raise RuntimeError(f"{log_path} ends with: {said[-2000:]}")


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """
    Send what this process and its children write to the end of a file. Not by `redirect_stdout`: loggers' handlers that are made
    meanwhile would stay bound to the file, and children would not see it.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)


def read_log(folder: Path) -> dict[str, Any]:
    """
    What a training run has logged.

    Args:
        folder (`Path`): Its `output_dir`, with `trainer_state.json`.

    Returns:
        `dict[str, Any]`: The last value of every evaluation metric, and the mean over the run of every training metric.
    """
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    values: dict[str, list[float]] = {}
    for log in history:
        for key, value in log.items():
            if key not in ("step", "epoch", "learning_rate"):
                values.setdefault(key, []).append(value)
    return {
        key: own[-1] if key.startswith(("eval_", "train_")) else sum(own) / len(own) for key, own in values.items()
    }
