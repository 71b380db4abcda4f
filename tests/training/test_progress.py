"""The lines that a training prints, and who prints them."""

import itertools
import json
import math

import pytest
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from conftest import make_tiny_model
from rows import make_chat_rows
from trl_perce import PerCETrainer
from trl_perce.training import progress
from trl_perce.training.progress import LinePrinter, LineProgress


EXTREMES = (0.0, 3.21987, -12.3456, 99999.99, -123456.7, 1e300, -1e300, 1e-300, math.nan, math.inf, -math.inf)
NAMES = ("loss", "nll", "pir/mean", "pir/personal_fraction", "weight/mean", "learning_rate", "grad_norm", "num_tokens")


@pytest.fixture(scope="module")
def make_trainer(tokenizer, tmp_path_factory):
    from trl_perce import PerCEConfig

    def make(callbacks=None, **kwargs):
        defaults = {
            **{"output_dir": str(tmp_path_factory.mktemp("run")), "max_steps": 4, "logging_steps": 2, "eval_steps": 4},
            **{"eval_strategy": "steps", "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
            **{"max_length": None, "gradient_checkpointing": False},
        }
        data = Dataset.from_list(make_chat_rows())
        args = PerCEConfig(**{**defaults, **kwargs})
        model = make_tiny_model("llama")
        return PerCETrainer(model, args, None, data, data.take(3), tokenizer, callbacks=callbacks)

    return make


def split(line: str) -> list[str]:
    return line.replace(" %", "%").split()


@pytest.mark.parametrize("token_weighting, bar", [("perce", False), ("loss", True), ("uniform", False)])
def test_one_line_a_log(make_trainer, capsys, token_weighting, bar):
    trainer = make_trainer(token_weighting=token_weighting, disable_tqdm=not bar)
    capsys.readouterr()
    trainer.train()
    lines, history = capsys.readouterr().out.splitlines(), trainer.state.log_history
    titles = {
        "perce": "step loss nll PIR personal weight lr tokens/s left",
        "loss": "step loss nll weight lr tokens/s left",
        "uniform": "step loss lr tokens/s left",
    }[token_weighting].split()
    assert split(lines[0]) == titles and len(lines) == 5 and max(map(len, lines)) <= 80
    assert {len(line) for line in lines[:3]} == {len(lines[0])}  # in columns
    metrics = {"PIR": "pir/mean", "weight": "weight/mean", "loss": "loss", "nll": "nll"}
    percent = {"perce": [2, 4]}.get(token_weighting, [])
    for line, log in zip(lines[1:3], [log for log in history if "loss" in log], strict=True):
        cells = dict(zip(titles, split(line), strict=True))
        assert cells["step"] == str(log["step"]) and float(cells["lr"]) == pytest.approx(
            log["learning_rate"], rel=0.01
        )
        for title in metrics.keys() & cells.keys():
            assert cells[title] == f"{log[metrics[title]]:.3f}"
        if percent:
            assert cells["personal"] == f"{100 * log['pir/personal_fraction']:.1f}%"
        assert float(cells["tokens/s"]) > 0 and cells["left"].startswith("0:00:0")
    (evaluated,) = (log for log in history if "eval_loss" in log)
    shown = [
        name
        for name in ("loss", "nll", "pir/mean", "pir/personal_fraction", "weight/mean")
        if f"eval_{name}" in evaluated
    ]
    texts = [
        f"{100 * evaluated[f'eval_{n}']:.1f}%" if n.endswith("fraction") else f"{evaluated[f'eval_{n}']:.3f}"
        for n in shown
    ]
    assert split(lines[3]) == ["4", *texts, "eval,", "0:00:00"]
    assert (
        lines[4] == f"4 steps in 0:00:0{int(history[-1]['train_runtime'])}, mean loss {history[-1]['train_loss']:.3f}"
    )
    # The rest is where it was
    assert {"grad_norm", "entropy", "num_tokens", "mean_token_accuracy"} <= history[0].keys()


def make_printer(kind=LinePrinter, max_steps=4, columns=(*NAMES[:6], "tokens/s", "time_left"), **state):
    return kind(columns), TrainerState(max_steps=max_steps, **state)


@pytest.mark.parametrize("max_steps, seconds", [(4, 1.0), (99_999_999, 1e-5), (10_000_000, 1e3)])
def test_all_values_fit_into_80_columns(make_args, capsys, monkeypatch, max_steps, seconds):
    clock = itertools.count(step=seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    args, (printer, state) = make_args(), make_printer(max_steps=max_steps)
    printer.on_train_begin(args, state, TrainerControl())
    for index, value in enumerate(EXTREMES):
        state.global_step = min(index, max_steps)
        printer.on_step_end(args, state, TrainerControl())
        share = {"pir/personal_fraction": 1.0 if value else 0.0}
        logs = {name: value for name in NAMES} | share
        printer.on_log(args, state, TrainerControl(), logs | {"num_tokens": 1000.0**index})
        name = "eval_" + "of_the_user_" * index
        evaluated = {f"{name}_{metric}": value for metric in NAMES[:5]} | {f"{name}_pir/personal_fraction": math.nan}
        printer.on_log(args, state, TrainerControl(), evaluated | {f"{name}_runtime": 1e7 * seconds})
        others = {"eval_a_metric_of_the_user" * 4: value, "their/other": "text " * 30}
        printer.on_log(args, state, TrainerControl(), others)
    printer.on_log(args, state, TrainerControl(), {"train_runtime": 1e7 * seconds, "train_loss": 1e300})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 * len(EXTREMES) and max(map(len, lines)) <= 80, max(lines, key=len)
    losses = [float(split(line)[1]) for line in lines if "%" in line and "eval" not in line]
    assert len(losses) == len(EXTREMES)
    for found, value in zip(losses, EXTREMES, strict=True):
        assert found == pytest.approx(value, rel=0.05, abs=0.001, nan_ok=True)


def test_speed_and_time_left_are_of_the_clock(make_args, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    args, control, (printer, state) = make_args(), TrainerControl(), make_printer(max_steps=40, global_step=10)
    printer.on_train_begin(args, state, control)  # resumed at step 10

    def pass_by(event, seconds, **kwargs):
        now[0] += seconds
        getattr(printer, event)(args, state, control, **kwargs)

    state.global_step = 12
    pass_by("on_step_end", 4)
    pass_by("on_log", 0, logs={"loss": 1.0, "num_tokens": 1000.0})  # 1000 tokens in 4 s; 2 of 30 steps in 4 s
    pass_by("on_evaluate", 20.5)
    state.global_step = 13
    pass_by("on_step_end", 2)
    pass_by("on_log", 0, logs={"loss": 1.0, "num_tokens": 1300.0})  # 300 tokens in 2 s; 3 of 30 steps in 26.5 s
    pass_by("on_save", 6)
    state.global_step = 14
    pass_by("on_step_end", 1)
    pass_by("on_log", 0, logs={"loss": 1.0, "num_tokens": 1400.0})  # 100 tokens in 1 s; 4 of 30 steps in 33.5 s
    rows = [split(line)[-2:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["250", "0:00:56"], ["150", "0:03:58"], ["100", "0:03:37"]]


class Mine(ProgressCallback):
    pass


def test_who_prints(make_trainer, make_args, capsys):
    def kinds(trainer):
        return [
            type(c) for c in trainer.callback_handler.callbacks if isinstance(c, (PrinterCallback, ProgressCallback))
        ]

    assert kinds(make_trainer()) == [LinePrinter] and kinds(make_trainer(disable_tqdm=False)) == [LineProgress]
    # A user's own stay, beside the one that Transformers adds
    assert kinds(make_trainer([Mine()])) == [Mine, PrinterCallback]
    assert kinds(make_trainer([PrinterCallback()], disable_tqdm=False)) == [PrinterCallback, ProgressCallback]
    silent = make_trainer()
    silent.remove_callback(PrinterCallback)
    assert kinds(silent) == []
    capsys.readouterr()

    printer, state = make_printer(is_world_process_zero=True)
    logs, control = {"loss": 1.0, "eval_a": 0.5}, TrainerControl()
    printer.on_log(make_args(log_level="error"), state, control, logs)
    state.is_world_process_zero = False
    printer.on_log(make_args(), state, control, logs)
    assert capsys.readouterr().out == ""
    state.is_world_process_zero = True
    printer.on_log(make_args(log_level="warning"), state, control, logs)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["eval_a", "0.5"]  # a user's own metric
    assert logs == {"loss": 1.0, "eval_a": 0.5} and json.dumps(logs)


def test_a_line_goes_above_the_bar(make_args, capsys):
    printer, state = make_printer(LineProgress)
    args, control = make_args(), TrainerControl()
    printer.on_train_begin(args, state, control)
    assert isinstance(printer.training_bar, tqdm)
    printer.on_log(args, state, control, {"loss": 1.5})
    printer.on_train_end(args, state, control)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split()[:2] == ["0", "1.500"] and "0/4" in err and "1.500" not in err
