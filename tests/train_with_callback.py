"""`trl-perce train` with a `PerContrastCallback`; writes what it logged to `percontrast.json`."""

import json
import os

from trl import get_peft_config

from trl_perce import PerCETrainer, PerContrastCallback
from trl_perce.cli.common import load_data
from trl_perce.cli.train import end, make_parser


script_args, args, model_args, dataset_args = make_parser().parse_args_and_config()
data = load_data(script_args, dataset_args)
trainer = PerCETrainer(
    model_args.model_name_or_path,
    args,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    peft_config=get_peft_config(model_args),
)
trainer.add_callback(PerContrastCallback(trainer, num_rows=3))
trainer.train()
if trainer.is_world_process_zero():
    logs = [log for log in trainer.state.log_history if "percontrast/pir_mean" in log]
    with open(os.path.join(args.output_dir, "percontrast.json"), "w") as file:
        json.dump(logs, file)
end(trainer)
