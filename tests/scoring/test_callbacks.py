import numpy as np
import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from conftest import make_tiny_model
from reference import make_rows
from trl_perce import PerCETrainer, PerContrast, PerContrastCallback


def make_trainer(make_args, tokenizer, rows=None, model=None, **kwargs):
    dataset = Dataset.from_list([row.tokenized() for row in make_rows(seed=51, count=8)])
    args = make_args(**{"max_length": None, "max_steps": 4, "learning_rate": 1e-2, "eval_steps": 2, **kwargs})
    return PerCETrainer(
        model or make_tiny_model("llama"),
        args,
        train_dataset=dataset,
        eval_dataset=dataset if rows is None else rows,
        processing_class=tokenizer,
    )


def test_training_goes_on_as_without_it(make_args, tokenizer):
    runs = []
    for with_callback in (False, True):
        trainer = make_trainer(make_args, tokenizer, eval_strategy="steps")
        if with_callback:
            trainer.add_callback(PerContrastCallback(trainer, num_rows=3))
        trainer.train()
        logs = [
            {key: value for key, value in log.items() if "runtime" not in key and "per_second" not in key}
            for log in trainer.state.log_history
            if "percontrast/pir_mean" not in log
        ]
        runs.append((logs, [parameter.detach().clone() for parameter in trainer.model.parameters()]))
    assert runs[0][0] == runs[1][0] and any("pir/mean" in log for log in runs[0][0])
    assert all((one == other).all() for one, other in zip(runs[0][1], runs[1][1], strict=True))


def test_scores_at_evaluations_and_checkpoints(make_args, tokenizer, tmp_path):
    trainer = make_trainer(
        make_args,
        tokenizer,
        eval_strategy="steps",
        save_strategy="steps",
        save_steps=4,
        report_to="tensorboard",
        output_dir=str(tmp_path / "run"),
    )
    callback = PerContrastCallback(trainer, num_rows=3)
    trainer.add_callback(callback)
    rows = [row for row in make_rows(seed=51, count=8) if row.persona][:3]
    scorer = PerContrast(trainer.model, tokenizer, use_cpu=True, bf16=False)
    before = np.concatenate([scores.pir for scores in scorer.score([row.tokenized() for row in rows])])
    trainer.train()
    after = np.concatenate([scores.pir for scores in scorer.score([row.tokenized() for row in rows])])

    logs = [log for log in trainer.state.log_history if "percontrast/pir_mean" in log]
    assert [log["step"] for log in logs] == [0, 2, 4]  # step 4 is an evaluation and a checkpoint, and scored once
    for log, pir in ((logs[0], before), (logs[-1], after)):
        assert log["percontrast/pir_mean"] == pytest.approx(pir.mean(), abs=1e-5)
        assert log["percontrast/personal_fraction"] == pytest.approx((pir > 1).mean())
    assert logs[0]["percontrast/pir_mean"] != logs[-1]["percontrast/pir_mean"]

    page = (tmp_path / "run" / "checkpoint-4" / "percontrast.html").read_text(encoding="utf-8")
    assert "rows of the evaluation at step 4" in page
    (tensorboard,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback))
    events = EventAccumulator(tensorboard.logging_dir, {"tensors": 0}).Reload()
    steps = [event.step for event in events.Tensors("percontrast/text_summary")]
    assert steps == [0, 2, 4]
    table = events.Tensors("percontrast/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert len(table.splitlines()) == 2 + 3 and table.splitlines()[2].startswith("| 4 | 0 |")
    assert [event.step for event in events.Scalars("train/percontrast/pir_mean")] == [0, 2, 4]


def test_own_rows_as_text(make_args, tokenizer):
    row = {
        "persona": "I sew my own dresses.",
        "prompt": [{"role": "user", "content": "About me: {persona}\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": "A new set | of needles."}],
    }
    trainer = make_trainer(make_args, tokenizer, eval_strategy="no")
    callback = PerContrastCallback(trainer, [row])
    trainer.add_callback(callback)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "percontrast/pir_mean" in log] == [0]
    (scores,) = callback._scores
    assert scores.persona == row["persona"] and scores.response.startswith("A new set | of needles.")


def test_there_must_be_rows(make_args, tokenizer):
    without = [row.tokenized() for row in make_rows(seed=52, count=5, with_persona=0)[1:]]
    trainer = make_trainer(make_args, tokenizer, rows=Dataset.from_list(without))
    with pytest.raises(ValueError, match="No row to score has a persona"):
        PerContrastCallback(trainer)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="has no evaluation dataset"):
        PerContrastCallback(trainer)
    trainer = make_trainer(make_args, tokenizer, packing=True, max_length=64)
    with pytest.raises(ValueError, match="is packed"):
        PerContrastCallback(trainer)


def test_rows_are_scored_in_the_precision_of_the_training(make_args, tokenizer):
    for bf16 in (True, False):
        callback = PerContrastCallback(make_trainer(make_args, tokenizer, bf16=bf16), num_rows=1)
        assert callback._scorer.args.bf16 is bf16
