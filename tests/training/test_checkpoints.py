"""Only whole checkpoints are gone on from, and one that cannot be written leaves those before it."""

import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig

from conftest import make_tiny_model
from processes import files_of_at_most
from reference import make_rows
from trl_perce import PerCETrainer
from trl_perce.training.checkpoints import find_damage, last_whole_checkpoint


ROWS = Dataset.from_list([row.tokenized() for row in make_rows(seed=22, count=12)])


@pytest.fixture
def make_trainer(make_args, tokenizer, tmp_path):
    def make(lora_dropout=0.0, **kwargs):
        options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 1}
        return PerCETrainer(
            make_tiny_model("qwen3"),
            make_args(max_length=None, **options | {"output_dir": str(tmp_path / "run")} | kwargs),
            train_dataset=ROWS,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=lora_dropout),
        )

    return make


@pytest.fixture
def run(make_trainer, tmp_path) -> Path:
    """A folder with checkpoints 2, 4 and 6."""
    make_trainer().train()
    return tmp_path / "run"


def cut(path: Path, part: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


NAMES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def test_every_file_that_is_cut_is_noticed(run):
    assert last_whole_checkpoint(run) == (str(run / "checkpoint-6"), [])
    assert {file.name for file in (run / "checkpoint-6").iterdir()} >= set(NAMES)
    for name in NAMES:
        for part in (0, 0.3, 0.99):
            copy = run / "copy"
            shutil.copytree(run / "checkpoint-6", copy)
            assert find_damage(copy) is None
            cut(copy / name, part)
            assert find_damage(copy) == f"{name} is not whole"
            shutil.rmtree(copy)
    (run / "checkpoint-6" / "trainer_state.json").unlink()  # killed before the last file
    (run / "checkpoint-9").mkdir()  # killed before the first
    (run / "checkpoint-final").mkdir()  # somebody's own
    path, damages = last_whole_checkpoint(run)
    assert path == str(run / "checkpoint-4")
    assert ["checkpoint-9" in damages[0], "checkpoint-6" in damages[1], len(damages)] == [True, True, 2]
    assert last_whole_checkpoint(run / "nowhere") == (None, [])


def test_a_damaged_checkpoint_is_passed_over(run, make_trainer, caplog):
    adapter = (run / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    cut(run / "checkpoint-6" / "optimizer.pt")
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 was not written to its end (optimizer.pt is not whole): it is passed over" in caplog.text
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]
    # Steps 5 and 6 were made again, to the same end
    assert (run / "checkpoint-6" / "adapter_model.safetensors").read_bytes() == adapter
    assert find_damage(run / "checkpoint-6") is None


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(run, make_trainer):
    cut(run / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="checkpoint-4 is not whole: adapter_model.safetensors is not whole"):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("weighting", ["perce", "uniform"])
def test_dropout_goes_on_where_it_was(make_trainer, tmp_path, weighting):
    """In the middle of an epoch (step 4 of 6) and at its end: the E-step draws first."""

    def trained(name, **kwargs):
        options = {"lora_dropout": 0.3, "token_weighting": weighting, "num_train_epochs": 2}
        trainer = make_trainer(output_dir=str(tmp_path / name), **options)
        trainer.train(**kwargs)
        logs = [{key: log.get(key) for key in ("loss", "pir/mean")} for log in trainer.state.log_history]
        return logs[:-1], (tmp_path / name / "checkpoint-12" / "adapter_model.safetensors").read_bytes()

    whole = trained("run")
    for step in (4, 6):
        assert trained(str(step), resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}")) == whole


def test_with_damaged_checkpoints_alone_none_is_taken(run, make_trainer):
    for step in (2, 4, 6):
        cut(run / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match="no checkpoint in .*run is whole"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_full_disk(run, make_trainer):
    trainer = make_trainer(num_train_epochs=2)
    largest = max(file.stat().st_size for file in (run / "checkpoint-6").iterdir())
    with (
        files_of_at_most(largest // 2),
        pytest.raises(OSError, match="The checkpoint of step 8 could not be written: .* one is .*checkpoint-6"),
    ):
        trainer.train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(run)[0] == str(run / "checkpoint-6")
    trainer = make_trainer(num_train_epochs=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
