"""
The private seams of TRL and Transformers that we stand on, as read in TRL 1.16.0 and Transformers 5.24.0. If one of
these fails after an upgrade, read the named place again and then the place of ours.
"""

import inspect
import re

import transformers
import trl
from datasets import Dataset
from transformers import Trainer
from transformers.generation.continuous_batching import cb_logits_processors, input_outputs
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from trl import SFTTrainer, chat_template_utils
from trl.trainer import sft_trainer, utils


READ_IN = "1.16.0"
TRANSFORMERS_READ_IN = "5.24.0"


def source(obj) -> str:
    return inspect.getsource(obj)


def hint(what: str) -> str:
    return f"TRL {trl.__version__} changed {what} (read in {READ_IN})"


def transformers_hint(what: str) -> str:
    return f"Transformers {transformers.__version__} changed {what} (read in {TRANSFORMERS_READ_IN})"


def test_the_window_is_gathered_before_its_first_step():
    # trainer.py `get_batch_samples` runs the E-step on all micro-batches of an optimizer step
    assert list(inspect.signature(Trainer.get_batch_samples).parameters) == [
        *("self", "epoch_iterator", "num_batches", "device"),
    ], transformers_hint("the signature of get_batch_samples")
    text = source(Trainer._run_epoch)
    gathered = text.index("batch_samples, num_items_in_batch = self.get_batch_samples(")
    assert gathered < text.index("for i, inputs in enumerate(batch_samples):") < text.index("self.training_step("), (
        transformers_hint("where the window is gathered")
    )
    assert "get_batch_samples" not in SFTTrainer.__dict__, hint("get_batch_samples, which it did not override")
    text = source(Trainer.training_step)
    for seam in ("model.train()", "self.optimizer.train()", "with self.compute_loss_context_manager():"):
        assert seam in text, transformers_hint(f"training_step: {seam}")
    text = source(Trainer._prepare_for_training)
    assert "self.model_wrapped = model" in text, transformers_hint("which model is trained (model_wrapped)")


def test_the_random_state_is_loaded_after_the_window_is_gathered():
    # training/checkpoint_mixin.py `_load_rng_state` is called ahead of the E-step, and once
    assert list(inspect.signature(Trainer._load_rng_state).parameters) == ["self", "checkpoint"]
    text = source(Trainer._run_epoch)
    assert text.count("self._load_rng_state(resume_from_checkpoint)") == 2, transformers_hint(
        "_load_rng_state's calls"
    )
    gathered, loaded = text.index("self.get_batch_samples("), text.rindex("self._load_rng_state(")
    assert gathered < loaded < text.index("for i, inputs in enumerate(batch_samples):"), transformers_hint(
        "where the random state is loaded"
    )


def test_evaluation_does_not_gather_windows():
    # trainer.py `compute_loss` runs the E-step itself on a batch that comes from elsewhere
    assert "get_batch_samples" not in source(Trainer.evaluation_loop), transformers_hint("evaluation_loop")


def test_checkpoints_save_and_load_the_optimizer_on_every_process():
    # training/checkpoint_mixin.py keeps `counterfactual_refresh_epochs`'s log-probabilities beside it
    for function, argument, caller in (
        (Trainer._save_optimizer_and_scheduler, "output_dir", Trainer._save_checkpoint),
        (Trainer._load_optimizer_and_scheduler, "checkpoint", Trainer._prepare_for_training),
    ):
        assert list(inspect.signature(function).parameters) == ["self", argument], transformers_hint(function.__name__)
        assert f"self.{function.__name__}(" in source(caller), transformers_hint(caller.__name__)
    assert "self.state.epoch = epoch + (step + 1) / steps_in_epoch" in source(Trainer._run_epoch), transformers_hint(
        "state.epoch, whose whole part is the epoch"
    )


def test_the_state_of_the_trainer_is_the_last_file_of_a_checkpoint():
    # checkpoints.py takes a checkpoint that has one for whole, and checkpoint_mixin.py `_save_rng_state` lets it wait for all processes
    text = source(Trainer._save_checkpoint)
    order = ["self.save_model(", "self._save_optimizer_and_scheduler(", "self._save_scaler(", "self._save_rng_state("]
    order += ["self.state.save_to_json(", "rotate_checkpoints("]
    places = [text.index(seam) for seam in order]
    assert places == sorted(places), transformers_hint("the order of _save_checkpoint")
    assert "if not self.args.save_only_model:" in text[: places[1]], transformers_hint("_save_checkpoint")


def test_telemetry_is_one_method():
    # hub/upload_mixin.py makes it do nothing
    for cls in SFTTrainer.__mro__[:-1]:
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and "send_telemetry(" in source(member):
                assert name == "_send_telemetry" or "self._send_telemetry()" in source(member), hint(
                    "who sends telemetry"
                )
    assert "_send_telemetry" in dir(SFTTrainer), hint("_send_telemetry")


def test_what_is_uploaded():
    # hub/upload.py `upload_again` goes on with what `push_to_hub` began
    text = source(Trainer.push_to_hub)
    for seam in (
        'ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]',
        "folder_path=self.args.output_dir",
        "repo_id=self.hub_model_id",
        "revision = self.args.hub_revision",
    ):
        assert seam in text, transformers_hint(f"push_to_hub: {seam}")
    text = source(Trainer._push_from_checkpoint)
    assert "self.push_in_progress = PushInProgress(push_jobs)" in text, transformers_hint("_push_from_checkpoint")
    assert "run_as_future=True" in text, transformers_hint("_push_from_checkpoint")


def test_the_norm_of_the_gradient_is_asked_for_before_each_step():
    # trainer.py `_get_grad_norm` leaves a step out
    assert list(inspect.signature(Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"], (
        transformers_hint("the signature of _get_grad_norm")
    )
    text = source(Trainer._run_epoch)
    norm, step = (
        text.index("grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)"),
        text.index("optimizer.step()"),
    )
    assert text.index("self.training_step(") < norm < step, transformers_hint("_run_epoch")
    # Outside of any condition but that of the last micro-batch: also without clipping
    assert "if do_sync_step:\n                    grad_norm = None" in text, transformers_hint("_run_epoch")


def test_the_fused_head_asks_one_function_whether_to_score_every_position():
    # fused_head.py replaces it
    assert source(utils).count("_use_triton") == 2, hint("the uses of `_use_triton` (its import and `compact`)")
    assert "compact = _use_triton(hidden_states.device)" in source(utils.add_fused_lm_head), hint("add_fused_lm_head")


def test_packing_drops_the_mask_in_trl_and_not_in_pack_dataset():
    # dataset.py `pack_dataset_with_mask`
    text = source(SFTTrainer._prepare_dataset)
    for seam in (
        'dataset = dataset.select_columns(["input_ids", "labels"])',
        "dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)",
    ):
        assert seam in text, hint(f"_prepare_dataset: {seam}")
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "other": [[4, 5], [6]]})
    assert trl.pack_dataset(rows, 3)[0] == {"input_ids": [1, 2, 3], "other": [4, 5, 6], "seq_lengths": [2, 1]}
    assert "self.padding_free = args.padding_free or (args.packing" in source(SFTTrainer.__init__), hint(
        "padding_free"
    )


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


def test_the_loss_is_divided_by_the_tokens_of_the_window_where_the_model_takes_their_number():
    # trainer.py says that it does, for every model: the loss is ours
    text = source(Trainer._get_num_items_in_batch)
    for seam in ("self.model_accepts_loss_kwargs", 'batch["labels"][..., 1:]', "if self._loss_shifts_labels"):
        assert seam in text, transformers_hint(f"_get_num_items_in_batch: {seam}")
    assert "self.model_accepts_loss_kwargs and num_items_in_batch is not None" in source(Trainer.training_step), (
        transformers_hint("training_step: whose loss is divided by the steps of accumulation")
    )
    text = source(Trainer)
    rest = text.replace(source(Trainer.__init__), "").replace(source(Trainer._get_num_items_in_batch), "")
    rest = rest.replace(source(Trainer.training_step), "").replace(source(Trainer.compute_loss), "")
    assert "self.model_accepts_loss_kwargs" not in rest, transformers_hint("who asks model_accepts_loss_kwargs")


def test_kernels_of_recurrent_layers_are_named_in_the_source():
    # training/model_check.py finds there which packages a hybrid needs to pack
    from transformers.models.qwen3_next import modeling_qwen3_next

    text = inspect.getsource(modeling_qwen3_next)
    for seam in ('hub_with_fallback("causal_conv1d_fn", "causal_conv1d")', '"fla"'):
        assert seam in text, transformers_hint(f"how modeling files name kernels: {seam}")


def test_the_fused_head_returns_what_we_read():
    fields = set(utils.FusedCausalLMOutput.__dataclass_fields__)
    assert {"log_probs", "entropy", "is_top1", "label_mask", "aux_loss"} <= fields, hint("FusedCausalLMOutput")
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
    from trl.data_utils import common_prefix_length, get_dataset_column_names

    for function, parameters in (
        (get_dataset_column_names, ["dataset"]),
        (common_prefix_length, ["ids", "other_ids"]),
        (utils.global_then_local_main_first, []),
        (utils.get_config_model_id, ["config"]),
        (utils.remove_none_values, ["example"]),
        (resolve_accelerate_config_argument, ["launch_args"]),
        (_subtract_subsequence, ["lst", "subseq"]),
    ):
        assert list(inspect.signature(function).parameters) == parameters, hint(function.__qualname__)
    assert {"padding_value", "padding_side", "pad_to_multiple_of"} <= inspect.signature(utils.pad).parameters.keys()


def test_rows_are_prepared_without_a_trainer():
    # preparation.py hands over what the method reads of its trainer
    text = source(SFTTrainer._prepare_dataset)
    assert {*re.findall(r"\bself\.(\w+)", text)} == {"_tokenizer", "chat_template", "completion_only_loss"}, hint(
        "what _prepare_dataset reads of the trainer"
    )
    text = source(SFTTrainer.__init__)
    for seam in (
        "if args.assistant_only_loss and not has_generation_markers(processing_class.chat_template):",
        "self.chat_template = get_training_chat_template(processing_class)",
        'self.completion_only_loss = "prompt" in dataset_sample and "completion" in dataset_sample',
        "processing_class.chat_template = chat_template_file.read()",
        "self._tokenizer.eos_token = args.eos_token",
    ):
        assert seam in text, hint(f"how the trainer chooses what rows are prepared with: {seam}")


def test_whose_turn_it_is():
    # persona/turns.py chooses, trainer.py gives each dataset its template and `assistant_only_loss`
    text = source(SFTTrainer)
    rest = text.replace(source(SFTTrainer.__init__), "").replace(source(SFTTrainer._prepare_dataset), "")
    for name in ("self.chat_template", "self.completion_only_loss", "assistant_only_loss"):
        assert name not in rest, hint(f"{name} is read elsewhere than in __init__ and _prepare_dataset")
    text = source(SFTTrainer._prepare_dataset)
    for seam in (
        '"assistant_only_loss": args.assistant_only_loss',
        '"chat_template": self.chat_template',
        "return_assistant_tokens_mask=assistant_only_loss",
        'if "assistant_masks" in column_names:',
    ):
        assert seam in text, hint(f"how the assistant's tokens are labelled: {seam}")
    text = source(chat_template_utils.get_training_chat_template)
    assert text.rstrip().endswith(")") and "raise ValueError(" in text[-400:], hint("templates that TRL does not know")
    assert list(inspect.signature(chat_template_utils.has_generation_markers).parameters) == ["chat_template"]


def test_the_fused_head_is_put_on_and_taken_off():
    # percontrast.py `_scoring` takes it off by restoring `forward`
    text = source(utils.add_fused_lm_head)
    assert text.count("model.") == text.count("model.forward") + text.count("model.config"), hint("add_fused_lm_head")
    assert "model.forward = types.MethodType(_fused_forward, model)" in text, hint("add_fused_lm_head")


def test_continuous_batching_takes_our_processor():
    # evaluation/generate.py puts its own in the manager's place for them, before it starts
    text = source(ContinuousBatchingManager)
    assert "logit_processor=self.logit_processor" in source(ContinuousBatchingManager._create_batch_processor), (
        transformers_hint("where the batch processor has its logits processors from")
    )
    for seam in ("self.background_thread_status = BackgroundThreadStatus()", "request_id: str | None = None"):
        assert seam in text, transformers_hint(f"ContinuousBatchingManager: {seam}")
    parameters = list(inspect.signature(ContinuousBatchingManager.add_request).parameters)
    assert parameters[1:3] == ["input_ids", "request_id"], transformers_hint("add_request")
    text = source(cb_logits_processors.ContinuousBatchingLogitsProcessorList)
    for seam in (
        "requests_with_new_token = [request for request in requests_in_batch if request.has_new_token]",
        "arg_storage[current_arg_id, : tensorized_arg.size(0)] = ",
        "scores = processor(scores, logits_processor_args[current_arg_id])",
    ):
        assert seam in text, transformers_hint(f"ContinuousBatchingLogitsProcessorList: {seam}")
    assert "logit_processor.tensors_required" in source(input_outputs), transformers_hint(
        "room for processors' arguments"
    )
    assert transformers.PreTrainedModel._is_stateful is False, transformers_hint("PreTrainedModel._is_stateful")
