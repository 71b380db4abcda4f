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

"""
`make demo`: fine-tune SmolLM2-135M-Instruct with PerCE on a LoRA adapter, and show what it learned.

Trains through the command line's own code on the persona questions that come with the package (159 rows of 53 people),
then scores the answers of 17 other people with the adapter off ("before") and on ("after").
"""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smollm2 import ensure_smollm2
from trl_perce.persona import token_mask


ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml"
OUTPUT = "outputs/demo"
# Name in the log → heading
COLUMNS = {
    **{"loss": "loss", "nll": "nll", "pir/mean": "PIR", "pir/personal_fraction": "PIR > 1"},
    **{"weight/mean": "weight", "weight/at_min": "at min", "weight/at_max": "at max"},
    "counterfactual/token_ratio": "tokens",
}


def response_scores(model, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (nats) of a row's response tokens, with the persona in the context and without it."""
    passes = []
    for keep in ([True] * len(row["input_ids"]), [not is_persona for is_persona in row["persona_mask"]]):
        input_ids = torch.tensor([[token for token, kept in zip(row["input_ids"], keep, strict=True) if kept]])
        labels = torch.tensor([label for label, kept in zip(row["labels"], keep, strict=True) if kept])
        trained = labels != -100
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=input_ids, use_cache=False).logits[0]
        log_probs = logits[:-1][trained[1:]].float().log_softmax(-1)
        passes.append(log_probs.gather(1, labels[trained][:, None])[:, 0])
    return passes[0], passes[1]


def personal_tokens(row: dict, tokenizer) -> torch.Tensor:
    """For each response token, whether it lies in a word that is annotated as personal."""
    tokens = [token for token in row["labels"] if token != -100]
    pieces = [tokenizer.decode(token) for token in tokens]
    answer, ends, position = "".join(pieces), [], 0
    for piece in pieces:
        position += len(piece)
        ends.append(position)
    spans, start = [], 0
    for word in row["personal_words"]:
        start = answer.index(word, start)
        spans.append((start, start + len(word)))
    return torch.tensor(token_mask(list(zip([0, *ends], ends, strict=False)), spans), dtype=torch.bool)


def coloured(row: dict, pir: torch.Tensor, tokenizer) -> Text:
    """The answer, each token on a background that says how personal it is: none at PIR 0, full orange at 5 nats."""
    text = Text()
    for token, value in zip([label for label in row["labels"] if label != -100], pir.tolist(), strict=True):
        piece = tokenizer.decode(token)
        if token in tokenizer.all_special_ids or not piece.strip():
            continue
        strength = min(max(value, 0.0), 5.0) / 5.0
        red, green, blue = (round(255 + (full - 255) * strength) for full in (230, 97, 1))
        space = piece[: len(piece) - len(piece.lstrip())]
        text.append(space)
        text.append(piece.strip(), style=f"#000000 on #{red:02x}{green:02x}{blue:02x}" if value > 0.2 else "")
    return text


def main() -> None:
    console, started = Console(highlight=False), time.time()
    os.chdir(ROOT)
    folder = ensure_smollm2()
    arguments = ["--config", RECIPE, "--model_name_or_path", os.path.relpath(folder), "--output_dir", OUTPUT]
    console.rule("Train")
    console.print(f"$ trl-perce train {' '.join(arguments)}\n", soft_wrap=True)

    from trl_perce.cli import train

    trainer = train.main(*train.make_parser().parse_args_and_config(arguments))
    logs = trainer.state.log_history

    console.rule("What the log says")
    table = Table("step", *COLUMNS.values())
    for log in (log for log in logs if "loss" in log):
        table.add_row(str(log["step"]), *(f"{log[name]:.3f}" for name in COLUMNS))
    console.print(table)
    console.print(
        "loss: weighted, nll: not weighted, both in nats a token. PIR: mean, in nats, and the share of tokens over 1. weight: "
        "mean, and the shares at its bounds 0.8 and 5. tokens: those of the counterfactual pass over the factual one's.\n"
    )

    console.rule("Held-out answers of people who were not in the training data")
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    rows = list(trainer.eval_dataset)
    personal = [personal_tokens(row, tokenizer) for row in rows]
    after = [response_scores(model, row) for row in rows]
    with model.disable_adapter():
        before = [response_scores(model, row) for row in rows]
    is_personal = torch.cat(personal)
    table = Table("tokens", "number", "log-likelihood before", "after", "PIR before", "after")
    for name, chosen in (("in personal words", is_personal), ("others", ~is_personal)):
        cells = []
        for scores in (before, after):
            factual, without = (torch.cat(column)[chosen] for column in zip(*scores, strict=True))
            cells.append((f"{factual.mean():.3f}", f"{(factual - without).mean():+.3f}"))
        table.add_row(name, str(int(chosen.sum())), cells[0][0], cells[1][0], cells[0][1], cells[1][1])
    console.print(table)
    console.print("Means over tokens, in nats. The adapter is off before and on after.\n")

    by_pir = sorted(range(len(rows)), key=lambda i: (after[i][0] - after[i][1]).mean().item())
    for title, index in (("The most personal answer", by_pir[-1]), ("The median one", by_pir[len(rows) // 2])):
        row, pir = rows[index], after[index][0] - after[index][1]
        console.rule(f"{title}, coloured by PIR")
        console.print(f"[bold]Persona[/]   {row['persona']}")
        console.print(f"[bold]Question[/]  {row['prompt'][0]['content'].split(chr(10))[-1]}")
        console.print(Text.assemble(("Answer    ", "bold"), coloured(row, pir, tokenizer)))
        tokens = [tokenizer.decode(label).strip() for label in row["labels"] if label != -100]
        most = sorted(zip(pir.tolist(), tokens, strict=True), reverse=True)[:6]
        console.print("[bold]PIR[/]       " + ", ".join(f"{token} {value:+.1f}" for value, token in most) + " nats")
        console.print(f"[bold]Annotated[/] {', '.join(row['personal_words'])}\n")

    console.print(f"The adapter lies in [bold]{OUTPUT}[/]; plain PEFT loads it.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"{time.time() - started:.0f} s, peak memory {peak:.1f} GiB.")


if __name__ == "__main__":
    main()
