# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The steps of a grid: data, training, the untrained model's scores, evaluation."""

import gc
import hashlib
import importlib
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from ..files import written_whole
from ..history import to_examples
from ..retrieval import Retriever
from .grid import Step
from .settings import Cell, Settings, Task


class Steps:
    """
    Makes the steps of a grid.

    Args:
        settings ([`Settings`]): The grid.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self.data = {
            name: self._data_step(task) for name, task in settings.tasks.items() if task.benchmark not in ("aloe",)
        }

    def data_path(self, task: str, split: str) -> Path:
        return self.folder / "data" / task / f"{split}.jsonl"

    def _data_step(self, task: Task) -> Step:
        sizes = {"train": task.train_rows, "validation": task.validation_rows, "test": task.test_rows}
        sizes = {split: rows for split, rows in sizes.items() if rows and (task.is_trained or split == "test")}
        options = {"benchmark": task.benchmark, **task.options, "rows": sizes, "retrieval": task.retrieval}
        if task.test_split != "test":
            options["test_split"] = task.test_split
        return Step(
            folder=self.folder / "data" / task.name,
            kind="data",
            settings=options,
            run=lambda: {split: self._write_rows(task, split, rows) for split, rows in sizes.items()},
        )

    def _write_rows(self, task: Task, split: str, num_rows: int) -> dict[str, Any]:
        """Load a split, retrieve, and write it as rows that `trl-perce train` and `evaluate` take."""
        benchmark = importlib.import_module(f"trl_perce.benchmarks.{task.benchmark}")
        source = task.test_split if split == "test" else split
        rows = benchmark.load(split=source, num_rows=num_rows, **task.options)
        if task.benchmark != "general_qa":
            retriever = Retriever(**task.retrieval, cache_dir=self.folder / "cache" / "retrieval")
            rows = to_examples(rows, retriever(rows))
        path = self.data_path(task.name, split)
        with written_whole(path) as part:
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return {"rows": len(rows), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def train(self, cell: Cell) -> Step:
        """The step that trains a run: `trl-perce train` with the recipe `train.yaml`, which is left in its folder."""
        folder = self.folder / "runs" / cell.name
        recipe = self._recipe(cell, folder)
        return Step(
            folder=folder,
            kind="train",
            settings={"recipe": recipe, "data": self.data[cell.task].settings},
            run=lambda: self._train(recipe, folder),
            needs=(self.data[cell.task],),
        )

    def _recipe(self, cell: Cell, folder: Path) -> dict[str, Any]:
        task = self.settings.tasks[cell.task]
        evaluates = {"eval_strategy": "epoch", "dataset_test_split": "validation"} if task.validation_rows else {}
        return {
            **{"eval_strategy": "no"},
            **evaluates,
            **self.settings.training,
            **self.settings.models[cell.model],
            **self.settings.methods[cell.method],
            **{"learning_rate": cell.learning_rate, "seed": cell.seed},
            **{"weight_clip_min": cell.clip[0], "weight_clip_max": cell.clip[1]},
            **{"dataset_name": str(self.folder / "data" / cell.task), "output_dir": str(folder)},
        }

    def _train(self, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
        from ..cli import train

        arguments = [argument for key, value in self.settings.launch.items() for argument in (f"--{key}", str(value))]
        if recipe.get("save_strategy", "steps") != "no":
            arguments += ["--resume_from_checkpoint", "true"]
        _run_command(train.run, recipe, folder / "train", arguments)
        return read_log(folder)


def _run_command(
    run: Callable[[list[str]], int], config: dict[str, Any], path: Path, arguments: list[str] = ()
) -> None:
    """
    Run one of our commands in this process, with a YAML file of its own, which is left beside its log.

    Args:
        run (`Callable[[list[str]], int]`): The command's `run`.
        config (`dict[str, Any]`): Content of the YAML file.
        path (`Path`): Of the file and of the log, without the suffixes `.yaml` and `.log`.
        arguments (`list[str]`): Further arguments.

    Raises:
        `RuntimeError`: The command has not ended well; the message has the end of its log.
    """
    with written_whole(path.with_suffix(".yaml")) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    log_path = path.with_suffix(".log")
    with open(log_path, "a", buffering=1, encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            code = run(["--config", str(path.with_suffix(".yaml")), *arguments])
        except SystemExit as error:  # of its parser
            code = error.code
    gc.collect()  # a trainer is a cycle, which would hold its model
    if code:
        raise RuntimeError(f"{log_path} ends with: {log_path.read_text(encoding='utf-8')[-2000:]}")


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
