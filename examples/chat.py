# SPDX-License-Identifier: Apache-2.0

"""
Chat with a model that knows who you are, and see which of its words come from that.

    python examples/chat.py --model outputs/demo --persona me.txt

`--model` is an adapter or a model, `--persona` a text file about you. It begins your first message, or with `--system` stands in a system
message, whichever the model was trained with. In the chat:

    /pir            colour the last answer by how much likelier the persona makes each token
    /persona FILE   be somebody else, and begin anew
    /reset          begin anew
    /quit           leave (or Ctrl-D)
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from transformers import TextStreamer

from trl_perce import PerContrast
from trl_perce.history.entries import find_mark
from trl_perce.hub.run_settings import read_run_settings
from trl_perce.scoring.heatmap.terminal import print_heatmap


HELP = "/pir colours the last answer, /persona FILE, /reset, /quit"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or name of an adapter or a model")
    parser.add_argument("--persona", type=Path, required=True, help="text file about the user")
    parser.add_argument(
        "--template", default="About me: {persona}\n\n", help="begins the first message; {persona} is the file's text"
    )
    parser.add_argument(
        "--system",
        nargs="?",
        const="About the user: {persona}",
        help="put the persona into a system message, this one or 'About the user: {persona}'",
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json.loads,
        help="arguments of the chat template as JSON, such as '{\"enable_thinking\": false}' (default: those of the training)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.4, help="0 is greedy")
    args = parser.parse_args()
    for name in ("template", "system"):
        text = getattr(args, name)
        if text is not None:
            setattr(args, name, text.replace("\\n", "\n"))
            if text.count("{persona}") != 1:
                parser.error(f"--{name} must hold {{persona}} once")
    Chat(args, _read(parser, args.persona)).run()


def _read(parser: argparse.ArgumentParser, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--persona: {error}")


class Chat:
    """Messages so far, with `{persona}` where the persona goes, so that scoring can take it out again."""

    def __init__(self, args: argparse.Namespace, persona: str):
        self.args, self.persona, self.messages = args, persona, []
        self.console = Console(highlight=False)
        if args.chat_template_kwargs is None:
            args.chat_template_kwargs = read_run_settings(args.model).get("chat_template_kwargs")
        self.scorer = PerContrast(args.model, chat_template_kwargs=args.chat_template_kwargs)
        self.model, self.tokenizer = self.scorer.model, self.scorer.tokenizer

    def run(self) -> None:
        self.console.print(f"{self.args.model}. {HELP}", style="dim", markup=False)
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if text == "/quit":
                break
            if text:
                self.take(text)

    def take(self, text: str) -> None:
        command, _, argument = text.partition(" ")
        if command == "/pir":
            self.show_pir()
        elif command == "/reset":
            self.messages = []
        elif command == "/persona":
            try:
                self.persona, self.messages = Path(argument.strip()).read_text(encoding="utf-8").strip(), []
            except (OSError, UnicodeDecodeError) as error:
                self.console.print(str(error), style="red", markup=False)
        elif mark := find_mark([text]):
            self.console.print(f"Write it without {mark!r}, which marks the persona.", markup=False)
        elif command.startswith("/"):
            self.console.print(HELP, markup=False)
        else:
            self.answer(text)

    def answer(self, text: str) -> None:
        before = [*self.messages]
        if not self.messages and self.args.system is not None:
            self.messages.append({"role": "system", "content": self.args.system})
        elif not self.messages:
            text = self.args.template + text
        self.messages.append({"role": "user", "content": text})
        first = {**self.messages[0], "content": self.messages[0]["content"].replace("{persona}", self.persona, 1)}
        prompt = self.tokenizer.apply_chat_template(
            [first, *self.messages[1:]],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            **(self.args.chat_template_kwargs or {}),
        ).to(self.model.device)
        sampling = (
            {"do_sample": True, "temperature": self.args.temperature}
            if self.args.temperature
            else {"do_sample": False}
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = self.model.generate(
                **prompt, **sampling, max_new_tokens=self.args.max_new_tokens, streamer=streamer
            )
        except KeyboardInterrupt:  # of this answer, not of the chat
            self.messages = before
            print()
            return
        answer = self.tokenizer.decode(output[0, prompt["input_ids"].size(1) :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})

    def show_pir(self) -> None:
        if not self.messages:
            self.console.print("There is no answer yet.")
            return
        row = {"persona": self.persona, "prompt": self.messages[:-1], "completion": self.messages[-1:]}
        print_heatmap([self.scorer.score(row)], self.console)


if __name__ == "__main__":
    main()
