# SPDX-License-Identifier: Apache-2.0

"""
What `counterfactual_refresh_epochs` does to the weights and to the result: trains with each value on the same rows, computes
the exact counterfactual log-probabilities beside the kept ones at every step, and compares the weights epoch by epoch.

    python examples/benchmarks/refresh.py --config recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml \
        --model_name_or_path .cache/SmolLM2-135M-Instruct --num_train_epochs 3

Takes the arguments of `trl-perce train`. Values: 1 (exact) and 3. Prints two Markdown tables.
"""

import copy
import sys
from collections import defaultdict

import pandas as pd
import torch
from tqdm import tqdm
from transformers import TrainerCallback
from trl import get_peft_config, get_quantization_config

from trl_perce import PerCETrainer
from trl_perce.cli.common import load_data
from trl_perce.cli.train import make_parser
from trl_perce.training.estep import EStep
from trl_perce.training.weighting import perce_weights


REFRESH_EPOCHS = (1, 3)


class ExactBeside(EStep):
    """Also computes what the E-step may have kept, for the comparison only."""

    def __call__(self, model, batches, epoch=None):
        copies = [dict(batch) for batch in batches]
        super().__call__(model, batches, epoch)
        if epoch is not None:
            super().__call__(model, copies)
            for batch, exact in zip(batches, copies, strict=True):
                batch["exact_counterfactual_log_probs"] = exact["counterfactual_log_probs"]


class ComparedTrainer(PerCETrainer):
    """Notes, for each token of each epoch, PIR from the log-probabilities in use and from exact ones."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        step = self._e_step
        self._e_step = ExactBeside(step.accelerator, step.collator, step.hidden_size, step.batch_tokens)
        self.pirs = defaultdict(list)

    def _token_weights(self, outputs, inputs, exact_counterfactual_log_probs=None, **kwargs):
        if exact_counterfactual_log_probs is not None and exact_counterfactual_log_probs.numel():
            paired = kwargs["has_counterfactual"][:, 1:][outputs.label_mask]
            log_probs = outputs.log_probs[outputs.label_mask].detach()[paired]
            used, exact = (log_probs - x for x in (kwargs["counterfactual_log_probs"], exact_counterfactual_log_probs))
            self.pirs[int(self.state.epoch)].append(torch.stack([used, exact], dim=1))
        return super()._token_weights(outputs, inputs, **kwargs)


class Bar(TrainerCallback):
    """Progress over all runs."""

    def __init__(self, bar):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.total = state.max_steps * len(REFRESH_EPOCHS)
        self.bar.update()


def main() -> None:
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config(sys.argv[1:])
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    training_args.eval_strategy = training_args.save_strategy = training_args.logging_strategy = "no"
    training_args.disable_tqdm = True
    dataset = load_data(script_args, dataset_args)
    bounds = (training_args.weight_clip_min, training_args.weight_clip_max)

    weights, results = [], []
    bar = tqdm(desc="Steps", disable=not sys.stderr.isatty())
    for refresh_epochs in REFRESH_EPOCHS:
        args = copy.copy(training_args)
        args.counterfactual_refresh_epochs = refresh_epochs
        trainer = ComparedTrainer(
            model_args.model_name_or_path,
            args,
            train_dataset=dataset[script_args.dataset_train_split],
            eval_dataset=dataset[script_args.dataset_test_split],
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            callbacks=[Bar(bar)],
        )
        trainer.train()
        for epoch, pirs in sorted(trainer.pirs.items()):
            pir = pd.DataFrame(torch.cat(pirs).numpy(), columns=["used", "exact"])
            weight = pir.apply(lambda column: perce_weights(torch.tensor(column.values), *bounds).numpy())
            weights.append(
                {
                    "refresh": refresh_epochs,
                    "epoch": epoch,
                    "tokens": len(pir),
                    "rank correlation of PIR": pir.corr("spearman").iloc[0, 1],
                    "of weights": weight.corr("spearman").iloc[0, 1],
                    "mean weight": float(weight["used"].mean()),
                    "exact mean weight": float(weight["exact"].mean()),
                    "mean difference": float((weight["used"] - weight["exact"]).abs().mean()),
                    "PIR > 1": (pir["used"] > 1).mean(),
                    "exact PIR > 1": (pir["exact"] > 1).mean(),
                }
            )
        trainer.evaluate()
        log = trainer.state.log_history[-1]
        names = ("eval_loss", "eval_nll", "eval_pir/mean", "eval_pir/personal_fraction", "eval_weight/mean")
        results.append({"refresh": refresh_epochs, **{name: log[name] for name in names}})
        del trainer
    bar.close()
    for table in (weights, results):
        print(to_markdown(table) + "\n")


def to_markdown(rows: list[dict[str, float]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    lines += [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
