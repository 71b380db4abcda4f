# SPDX-License-Identifier: Apache-2.0

"""
What PerCE costs over TRL's own SFT on the data and with the model of a recipe: step times and peak memory of
`token_weighting: uniform` (TRL's SFT) and `perce`, in one process, on the same rows, interleaved A B A B. Prints medians and
their ratio. (step_cost.py does so for given lengths, and counts what the ratio must be.)

    python examples/benchmarks/step_time.py --config recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml \
        --model_name_or_path .cache/SmolLM2-135M-Instruct --dataset_name data/product_review --max_length 1024

Takes the arguments of `trl-perce train`; `--max_steps` (default 4) is the number of steps a round, the first of which does
not count, and there are 3 rounds. Linux only (it reads /proc).
"""

import copy
import statistics
import sys

import torch
from trl import get_peft_config, get_quantization_config

from measure import StepTimes, peak_memory, reset_peak_memory
from trl_perce import PerCETrainer
from trl_perce.cli.common import load_data
from trl_perce.cli.train import make_parser


ROUNDS = 3


def main() -> None:
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config(sys.argv[1:])
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    training_args.eval_strategy = training_args.save_strategy = "no"
    training_args.logging_steps = training_args.max_steps = (
        4 if training_args.max_steps < 0 else training_args.max_steps
    )
    training_args.disable_tqdm = True
    dataset = load_data(script_args, dataset_args)[script_args.dataset_train_split]

    device = "cuda" if torch.cuda.is_available() and not training_args.use_cpu else "cpu"
    trainers, times, memory, tokens = {}, {}, {}, 0
    for weighting in ("uniform", "perce"):
        args = copy.copy(training_args)
        args.token_weighting = weighting
        times[weighting] = StepTimes()
        trainers[weighting] = PerCETrainer(
            model_args.model_name_or_path,
            args,
            train_dataset=dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            callbacks=[times[weighting]],
        )
    counted = {weighting: [] for weighting in trainers}
    for _ in range(ROUNDS):
        for weighting, trainer in trainers.items():
            times[weighting].epochs.clear()
            reset_peak_memory(device)
            trainer.train()
            memory[weighting] = max(memory.get(weighting, 0), peak_memory(device) / 2**20)
            counted[weighting] += [seconds for epoch in times[weighting].epochs for seconds in epoch][1:]
            tokens = trainer.state.log_history[-2]["num_tokens"] / trainer.state.global_step

    median = {weighting: statistics.median(seconds) for weighting, seconds in counted.items()}
    print(f"\n{'':10}{'s/step':>10}{'tokens/s':>10}{'peak MiB':>10}   ({len(counted['perce'])} steps each)")
    for weighting, seconds in median.items():
        print(f"{weighting:10}{seconds:10.3f}{tokens / seconds:10.0f}{memory[weighting]:10.0f}")
    log = next(log for log in trainers["perce"].state.log_history if "counterfactual/token_ratio" in log)
    print(
        f"step-time ratio {median['perce'] / median['uniform']:.3f}, peak-memory ratio {memory['perce'] / memory['uniform']:.3f}"
    )
    print(f"counterfactual tokens over factual ones {log['counterfactual/token_ratio']:.3f}")


if __name__ == "__main__":
    main()
