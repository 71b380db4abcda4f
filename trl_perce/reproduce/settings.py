# SPDX-License-Identifier: Apache-2.0

"""The grid's YAML, checked before anything heavy loads."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..utils.files import read_yaml


# The paper's methods, and ours: name → fields of `PerCEConfig`
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"token_weighting": "uniform"},
    "lossce": {"token_weighting": "loss"},
    "entce": {"token_weighting": "entropy"},
    "perce": {"token_weighting": "perce"},
    "perce_sequence": {"token_weighting": "perce", "weight_normalization": "sequence"},
    # PIR of the start model, computed once: no E-step. And that against another user's persona
    "perce_frozen": {"token_weighting": "given"},
    "perce_swap": {"token_weighting": "given", "counterfactual": "swap"},
}
# Kinds of rows: a task's own, and those that are made of them
OWN, SEEN, IRRELEVANT = "own", "seen", "irrelevant"
DERIVED = (SEEN, IRRELEVANT)
DERIVED_ROWS = 100
BENCHMARKS = ("histories", "longlamp", "lamp", "prefeval", "general_qa", "aloe", *DERIVED)
# Benchmarks that are only evaluated on
_UNTRAINED = ("general_qa", "aloe", *DERIVED)


@dataclass(frozen=True)
class Task:
    """
    A task of the grid.

    Parameters:
        name (`str`): Its key in the YAML.
        benchmark (`str`): `"histories"`, `"longlamp"`, `"lamp"`, `"prefeval"`, `"rows"` (given as they are), `"general_qa"`, `"aloe"`; or
            one made of another task's rows, on which that task's runs alone are evaluated: `"seen"` (some rows to train on, as they
            are: what is told without their persona?) or `"irrelevant"` (personas of its test rows, with questions to which they do
            not matter).
        options (`dict[str, Any]`): What the benchmark's `load` takes beside `split` and `num_rows`; for ALOE, its endpoints.
        train_rows (`int`, *optional*, defaults to `2000`): Rows that are trained on (the paper's number).
        validation_rows (`int`, *optional*, defaults to `0`): Rows for choosing the learning rate. 0: nothing is chosen.
        test_rows (`int`, *optional*, defaults to `500`): Rows that are evaluated (the paper's number). In the YAML 100 where they are
            made of another task's.
        test_split (`str`, *optional*, defaults to `"test"`): Split that they are taken from. LaMP's outputs are public for
            `"validation"` only.
        retrieval (`dict[str, Any]`): What [`~retrieval.Retriever`] takes.
        evaluation (`dict[str, Any]`): Changes of the grid's `evaluation` for this task.
        of (`str`, *optional*): The task whose rows those of `"seen"` and `"irrelevant"` are made of.
    """

    name: str
    benchmark: str
    options: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 2000
    validation_rows: int = 0
    test_rows: int = 500
    test_split: str = "test"
    retrieval: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    of: str | None = None

    @property
    def kind(self) -> str:
        """Of its rows: `"own"`, `"seen"` or `"irrelevant"`."""
        return self.benchmark if self.benchmark in DERIVED else OWN

    @property
    def is_trained(self) -> bool:
        return self.benchmark not in _UNTRAINED


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    model: str
    task: str
    method: str
    learning_rate: float
    clip: tuple[float, float]
    seed: int

    @property
    def name(self) -> str:
        """Path of the run's folder, relative to the grid's `runs`."""
        low, high = self.clip
        return f"{self.model}/{self.task}/{self.method}-lr{self.learning_rate:g}-clip{low:g}-{high:g}-seed{self.seed}"


@dataclass(frozen=True)
class Settings:
    """
    A grid: what is trained with which methods, and evaluated on what.

    Parameters:
        output_dir (`str`): Folder of all outputs.
        models (`dict[str, dict[str, Any]]`): Name → arguments of `trl-perce train` that say which model and adapter, and what else is
            special to it (such as its batch size).
        tasks (`dict[str, Task]`): Name → task.
        methods (`dict[str, dict[str, Any]]`): Name → fields of [`PerCEConfig`]; in the YAML a list of the known names will do. Its own
            `learning_rate` and bounds of the weights take the place of the grid's. With `token_weighting: given` the weights are clipped
            PIRs of the untrained model, against the `counterfactual` of the method (`swap` among them).
        seeds (`list[int]`): Seeds of training: of the adapter's start values and of the order of rows.
        learning_rates (`list[float]`): Peak learning rates.
        clip_ranges (`list[tuple[float, float]]`): Bounds of the weights. CE has no weights and is trained once.
        training (`dict[str, Any]`): Arguments of `trl-perce train` for all runs.
        evaluation (`dict[str, Any]`): Arguments of `trl-perce evaluate` for all evaluations, those of `accelerate launch` among them.
        transfer (`bool`): Whether adapters are evaluated on all tasks (Tables 3 and 8), or on their own and on those that nothing
            is trained on.
        judge (`dict[str, Any]`): `base_url` and `model` of a judge's endpoint, which rates predictions of rows with a persona.
        launch (`dict[str, Any]`): Arguments of `accelerate launch` for the training runs, such as `num_processes: 4` or
            `accelerate_config: recipes/accelerate_configs/fsdp2.yaml`. Without any, a run trains as `trl-perce train` does: on all
            devices that this process sees.
        data_dir (`str`, *optional*): Folder that the `path` of each task is seen from.
        quotes (`str`, *optional*): JSON file of further figures of the paper ([`~reproduce.paper.load_quotes`]).
    """

    output_dir: str
    models: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    learning_rates: list[float]
    clip_ranges: list[tuple[float, float]] = field(default_factory=lambda: [(0.8, 5.0)])
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    transfer: bool = False
    judge: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    quotes: str | None = None
    data_dir: str | None = None

    @property
    def without_weights(self) -> list[str]:
        """The methods that do not weight tokens."""
        return [name for name, own in self.methods.items() if own.get("token_weighting") == "uniform"]

    def cells(self) -> list[Cell]:
        """All runs. Seeds vary slowest, so that a grid that stops early has whole comparisons."""
        trained = [name for name, task in self.tasks.items() if task.is_trained and task.train_rows]
        cells = []
        for seed, rate, model, task, clip, method in product(
            self.seeds, self.learning_rates, self.models, trained, self.clip_ranges, self.methods
        ):
            cell = self.cell(model, task, method, rate, clip, seed)
            if cell not in cells:
                cells.append(cell)
        return cells

    def cell(
        self, model: str, task: str, method: str, learning_rate: float, clip: tuple[float, float], seed: int
    ) -> Cell:
        """The training run of a method at a point of the grid, where its own learning rate and bounds take the place of the grid's."""
        own = self.methods[method]
        if method in self.without_weights:
            clip = self.clip_ranges[0]
        clip = (own.get("weight_clip_min", clip[0]), own.get("weight_clip_max", clip[1]))
        return Cell(model, task, method, own.get("learning_rate", learning_rate), clip, seed)

    def label(self, cell: Cell) -> str:
        """A run's name in what the grid's runs differ in."""
        low, high = cell.clip
        parts = [cell.model] if len(self.models) > 1 else []
        parts += [cell.task, cell.method]
        parts += [f"lr={cell.learning_rate:g}"] if len(self.learning_rates) > 1 else []
        parts += [f"clip={low:g}–{high:g}"] if len(self.clip_ranges) > 1 else []
        return ", ".join([*parts, f"seed={cell.seed}"])

    def evaluated_tasks(self, cell: Cell) -> list[str]:
        """On what a run is evaluated: its own task first."""
        others = [
            name
            for name, task in self.tasks.items()
            if name != cell.task
            and task.test_rows
            and (task.of == cell.task if task.of else self.transfer or not task.is_trained)
        ]
        return ([cell.task] if self.tasks[cell.task].test_rows else []) + others


def load_settings(path: str | Path, **changes) -> Settings:
    """
    Read a grid's YAML. With `extends: other.yaml` it has the keys of another file beside it, except those that it writes itself.

    Args:
        path (`str` or `Path`): The file.
        **changes: Keys that take the place of those in the file.

    Returns:
        [`Settings`]: Checked.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: A key is unknown, missing or has a wrong value; the message says which and what to write instead.
    """
    loaded = _read(Path(path)) | changes
    try:
        return _checked(loaded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(loaded).__name__}.")
    extended = loaded.pop("extends", None)
    return loaded if extended is None else _read(path.parent / extended) | loaded


def _checked(loaded: dict[str, Any]) -> Settings:
    _check_keys(loaded, Settings, "the file")
    methods = loaded["methods"]
    if isinstance(methods, list):
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ValueError(
                f"`methods`: {unknown[0]!r} is not known. Write some of {', '.join(METHODS)}, or name → fields of `PerCEConfig`."
            )
        methods = {name: METHODS[name] for name in methods}
    for key, kind in (
        ("models", dict),
        ("tasks", dict),
        ("seeds", list),
        ("learning_rates", list),
        ("clip_ranges", list),
    ):
        if key in loaded and (not isinstance(loaded[key], kind) or not loaded[key]):
            raise ValueError(f"`{key}` must be a {'list' if kind is list else 'mapping'} that is not empty.")
    for name, model in loaded["models"].items():
        if not isinstance(model, dict) or "model_name_or_path" not in model:
            raise ValueError(
                f"`models`, {name}: `model_name_or_path` is missing. Write a folder or a name on the Hub."
            )
    for rate in loaded["learning_rates"]:
        if not isinstance(rate, float) or rate <= 0:
            raise ValueError(
                f"`learning_rates`: {rate!r} is not a positive number. YAML reads 1.0e-3, but 1e-3 as a text."
            )
    if loaded.get("judge") and set(loaded["judge"]) != {"base_url", "model"}:
        raise ValueError("`judge` must have `base_url` and `model`, and nothing else.")
    clips = loaded.get("clip_ranges", [(0.8, 5.0)])
    for clip in clips:
        if not isinstance(clip, list | tuple) or len(clip) != 2 or not 0 <= clip[0] <= clip[1]:
            raise ValueError(f"`clip_ranges`: {clip!r} is not a pair of bounds. Write such as [0.8, 5.0].")
    tasks = {name: _task(name, task, loaded.get("data_dir")) for name, task in loaded["tasks"].items()}
    if loaded.get("data_dir") is not None and not any("path" in task.options for task in tasks.values()):
        raise ValueError("`data_dir` is given, and no task has a `path`, to be relative to it.")
    for task in tasks.values():
        _check_derived(task, tasks)
    return Settings(
        **loaded
        | {
            "tasks": tasks,
            "methods": methods,
            "clip_ranges": [(float(low), float(high)) for low, high in clips],
        }
    )


def _task(name: str, loaded: dict[str, Any], data_dir: str | None) -> Task:
    own = {field.name for field in dataclasses.fields(Task)} - {"name", "options"}
    if not isinstance(loaded, dict) or loaded.get("benchmark") not in BENCHMARKS:
        raise ValueError(f"`tasks`, {name}: `benchmark` must be one of {', '.join(BENCHMARKS)}.")
    options = {key: value for key, value in loaded.items() if key not in own}
    if data_dir is not None and "path" in options:
        options["path"] = str(Path(data_dir, options["path"]))
    sizes = {"train_rows": 0, "test_rows": DERIVED_ROWS} if loaded["benchmark"] in DERIVED else {}
    return Task(name=name, options=options, **sizes | {key: value for key, value in loaded.items() if key in own})


def _check_derived(task: Task, tasks: dict[str, Task]) -> None:
    where = f"`tasks`, {task.name}:"
    if (task.of is not None) != (task.benchmark in DERIVED):
        says = (
            "needs `of`: the task whose rows it is made of"
            if task.of is None
            else "is made of no other task: leave `of` out"
        )
        raise ValueError(f"{where} `benchmark: {task.benchmark}` {says}.")
    if task.of is None:
        return
    source = tasks.get(task.of)
    if source is None or not source.is_trained or not (source.train_rows and source.test_rows):
        raise ValueError(f"{where} `of: {task.of}` is no task here with rows to train on and to test.")
    if task.options or task.retrieval:
        key = next(iter(task.options or {"retrieval": None}))
        raise ValueError(f"{where} `{key}` is not for rows that are made of another task's. Leave it out.")
    if task.benchmark == IRRELEVANT and task.test_rows > DERIVED_ROWS:
        raise ValueError(f"{where} there are {DERIVED_ROWS} irrelevant questions; `test_rows` is {task.test_rows}.")


def _check_keys(loaded: dict[str, Any], cls: type, where: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in loaded:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1)
            hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known keys: {', '.join(fields)}."
            raise ValueError(f"unknown key `{key}` in {where}. {hint}")
    for key, one in fields.items():
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and key not in loaded:
            raise ValueError(f"the key `{key}` is missing in {where}.")
