"""
The private seams of TRL that we stand on, as read in TRL 1.16.0. If one of these fails after an upgrade, read the named
place of TRL again and then the place of ours.
"""

import inspect

import trl
from trl import SFTTrainer
from trl.trainer import sft_trainer, utils


READ_IN = "1.16.0"


def source(obj) -> str:
    return inspect.getsource(obj)


def hint(what: str) -> str:
    return f"TRL {trl.__version__} changed {what} (read in {READ_IN})"


def test_compute_loss_calls_the_model_it_is_given_and_is_linear_in_log_probs():
    # trainer.py `compute_loss` passes a model that weights `log_probs`
    text = source(SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in text, hint("SFTTrainer.compute_loss")
    assert "per_token_loss = -outputs.log_probs" in text, hint("SFTTrainer.compute_loss")
    assert "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)" in text, hint("the loss")
    assert text.count("outputs.log_probs") == 2, hint("the uses of `log_probs` in compute_loss (nll and dft)")
    assert list(inspect.signature(SFTTrainer.compute_loss).parameters)[1:] == [
        "model",
        "inputs",
        "return_outputs",
        "num_items_in_batch",
    ], hint("the signature of compute_loss")


def test_the_fused_head_returns_what_we_read():
    fields = set(utils.FusedCausalLMOutput.__dataclass_fields__)
    assert {"log_probs", "entropy", "label_mask"} <= fields, hint("FusedCausalLMOutput")
    text = source(SFTTrainer.__init__)
    assert 'outputs=("log_probs", "entropy", "is_top1")' in text, hint("add_fused_lm_head's outputs")


def test_prepare_dataset_can_be_run_twice():
    # trainer.py `_prepare_dataset` runs it without truncation, adds the mask, and runs it again
    parameters = list(inspect.signature(SFTTrainer._prepare_dataset).parameters)
    assert parameters == [
        *("self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    ], hint("the signature of _prepare_dataset")
    text = source(SFTTrainer._prepare_dataset)
    for seam in (
        'is_processed = "input_ids" in column_names',
        'if "labels" not in column_names:',
        "if args.max_length is not None and not packing:",
        'return {"input_ids": example["input_ids"][sl], "labels": example["labels"][sl]}',
        "if args.shuffle_dataset:",
    ):
        assert seam in text, hint(f"_prepare_dataset: {seam}")


def test_init_prepares_train_and_eval_and_keeps_the_template():
    text = source(SFTTrainer.__init__)
    assert text.count("self._prepare_dataset(") == 3, hint("where __init__ prepares datasets")
    assert "self.chat_template = get_training_chat_template(processing_class)" in text, hint("self.chat_template")
    assert "self._tokenizer = processing_class" in text, hint("self._tokenizer")
    assert list(inspect.signature(SFTTrainer.__init__).parameters)[1:7] == [
        *("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
    ], hint("the order of SFTTrainer's arguments")


def test_the_collator_takes_what_we_pass_on():
    fields = list(sft_trainer.DataCollatorForLanguageModeling.__dataclass_fields__)
    assert fields == ["pad_token_id", "padding_free", "return_position_ids", "pad_to_multiple_of", "return_tensors"], (
        hint("DataCollatorForLanguageModeling")
    )


def test_metrics_are_averaged_and_prefixed_by_log():
    text = source(SFTTrainer.log)
    assert "sum(val) / len(val) for key, val in self._metrics[mode].items()" in text, hint("SFTTrainer.log")
    assert 'f"eval_{key}"' in text, hint("SFTTrainer.log")


def test_signature_columns():
    text = source(SFTTrainer._set_signature_columns_if_needed)
    assert '["input_ids", "labels", "seq_lengths"]' in text, hint("_set_signature_columns_if_needed")


def test_names_that_are_not_public():
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence
    from trl.data_utils import get_dataset_column_names

    for function, parameters in (
        (get_dataset_column_names, ["dataset"]),
        (utils.global_then_local_main_first, []),
        (utils.get_config_model_id, ["config"]),
        (resolve_accelerate_config_argument, ["launch_args"]),
        (_subtract_subsequence, ["lst", "subseq"]),
    ):
        assert list(inspect.signature(function).parameters) == parameters, hint(function.__qualname__)
    assert {"padding_value", "padding_side", "pad_to_multiple_of"} <= inspect.signature(utils.pad).parameters.keys()
