"""
Every command and snippet of the documentation is run, as it stands but for the names of models, which become a tiny one, and with
options added that make it short. Links lead somewhere.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from conftest import ROOT, make_tiny_model
from reference import BF16
from rows import write_lines, write_splits
from servers import needs_openai
from trl_perce.cli.main import main
from trl_perce.utils.files import find_shipped


pytest_plugins = ["servers"]
FILES = [
    "README.md",
    "recipes/README.md",
    "CONTRIBUTING.md",
    *sorted(f"examples/{p.name}" for p in ROOT.glob("examples/*.md")),
]
MODELS = r"HuggingFaceTB/SmolLM2-135M-Instruct|Qwen/Qwen3-0\.6B|Qwen/Qwen3-4B"
# What makes a command short, by its name
SHORT = {
    "prepare": "",
    "train": "--model_name_or_path MODEL --dtype float32 --load_in_4bit false --max_steps 1 --report_to none "
    "--gradient_accumulation_steps 1 --save_strategy no --eval_strategy no --attn_implementation eager",
    "score": "--model_name_or_path MODEL --load_in_4bit false --dtype float32 --attn_implementation eager",
    "evaluate": "--metrics rouge --max_new_tokens 4",
    "aloe": "--conversations 1 --rounds 1 --max_new_tokens 4",
    "compare": "--model_name_or_path MODEL --load_in_4bit false --dry_run",
    "reproduce": "--dry_run",
}
REVIEW = {"overall": 4.0, "summary": "Good", "description": "A needle", "reviewText": "Sharp, says number NUMBER."}
PUBLIC = {
    "persona_chat": {
        "user_2_persona": ["I am number NUMBER."],
        "conversation": [{"user": 1, "text": "Who are you?"}, {"user": 2, "text": "Number NUMBER."}],
    },
    "product_reviews": {
        "reviewer": "NUMBER",
        "reviews": [REVIEW, REVIEW | {"reviewText": "Blunt, says number NUMBER."}],
    },
    "prefeval": {
        **{"topic": "topic NUMBER", "preference": "I like number NUMBER.", "question": "Which number?"},
        **{"response": "Number NUMBER.", "options": ["Number NUMBER.", "None."], "answer": 0},
    },
}
# Not ours to run, or run by what runs this
ELSEWHERE = ("make", "pip", "git", "open", "hf", "vllm", "pkill", "pre-commit", "export")


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    found = []
    for block in blocks(name, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^for .*? do (\w+=\S+ )?(.*) & done; wait$", r"\2", line)  # the same for each GPU
            words = shlex.split(line, comments=True)
            if words and words[0] not in ELSEWHERE:
                found.append(words)
    return found


def _write_raw_data(folder):
    """What `trl-perce prepare` reads in the guide."""
    ask = [{"role": "user", "content": "What should I buy?"}, {"role": "assistant", "content": "A set of needles."}]
    users = [
        {"user_id": f"user {n}", "name": f"Ann {n}", "notes": f"I am number {n}.", "messages": ask} for n in range(6)
    ]
    write_lines(folder / "logs.jsonl", users)
    lines = [f"{user['user_id']},{user['name']},{user['notes']},What to buy?,Needles!" for user in users]
    (folder / "export").mkdir()
    (folder / "export" / "1.csv").write_text("\n".join(["user,name,notes,question,answer", *lines]))
    (folder / "mails").mkdir()
    for index in range(12):
        head = (
            f"From: a{index % 4}@example.com\nSubject: Mail {index}\nDate: Mon, {index + 1} Jan 2024 10:00:00 +0000\n"
        )
        (folder / "mails" / f"{index}.eml").write_text(f"{head}\nThis is mail number {index}.\n")


@pytest.fixture
def workspace(tmp_path, tiny_model, tokenizer, monkeypatch):
    """A folder with what the documentation speaks of."""
    rows = [
        {
            "id": f"r{index}",
            "user": f"u{index // 2}",
            "persona": f"I am number {index} and I sew.",
            "prompt": [{"role": "user", "content": "About me: {persona}\n\nWhat should I buy?"}],
            "completion": [{"role": "assistant", "content": f"A new set of needles, number {index}."}],
        }
        for index in range(6)
    ]
    (history,) = map(json.loads, blocks("examples/own_data.md", "json")[:1])
    histories = [{**history, "user": f"user {index}"} for index in range(6)]
    for folder, lines in (("data/product_review", rows), ("data/own", histories), ("my_data", histories)):
        write_splits(tmp_path / folder, train=lines, test=lines)
    for folder, line in PUBLIC.items():  # from examples/get_data.py
        text = json.dumps(line)
        texts = [text.replace("topic NUMBER", "education_resources"), *[text] * 11]  # which the recipe validates on
        lines = [json.loads(text.replace("NUMBER", str(index))) for index, text in enumerate(texts)]
        write_splits(tmp_path / "data" / folder, train=lines[:10], test=lines[10:])
    _write_raw_data(tmp_path)
    for model in ("SmolLM2-135M-Instruct", "gemma-3-270m"):  # from examples/smollm2.py and gemma3.py
        (tmp_path / ".cache" / model).mkdir(parents=True)
    write_lines(tmp_path / "my-secrets.jsonl", rows)
    (tmp_path / "me.txt").write_text("I sew my own dresses.")
    for name in ("my-adapter", "ce", "perce"):
        model = get_peft_model(make_tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
        model.peft_config["default"].base_model_name_or_path = tiny_model
        model.save_pretrained(tmp_path / "outputs" / name)
        tokenizer.save_pretrained(tmp_path / "outputs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_readme_snippets(workspace, tiny_model):
    """As printed; what the first one saves is loaded as its card says."""
    scope = {}
    for snippet in blocks("README.md", "python"):
        snippet = re.sub(MODELS, tiny_model, snippet)
        exec(compile(snippet, "README.md", "exec"), scope)
        if "save_model()" in snippet:
            trained, loaded = scope["trainer"].model, {}
            (card,) = re.findall(
                r"^```python\n(.*?)^```",
                (workspace / "qwen3-perce" / "README.md").read_text(),
                flags=re.DOTALL | re.MULTILINE,
            )
            exec(compile(card.replace("max_new_tokens=128", "max_new_tokens=4"), "card", "exec"), loaded)
            expected = get_peft_model_state_dict(trained)
            found = get_peft_model_state_dict(loaded["model"])
            assert expected.keys() == found.keys() and any(
                value.any() for name, value in found.items() if "lora_B" in name
            )
            assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert scope["trainer"].state.global_step


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_the_readmes_recipe(workspace, tiny_model):
    (recipe,) = blocks("README.md", "yaml")
    (workspace / "config.yaml").write_text(re.sub(MODELS, tiny_model, recipe))
    assert main(["train", "--config", "config.yaml", "--max_steps", "1"]) == 0
    assert (workspace / "outputs" / "qwen3-4b-reviews" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in FILES if name != "README.md" and blocks(name, "python")])
def test_snippets_of_the_guides(workspace, tiny_model, name):
    for snippet in blocks(name, "python"):
        scope = {}
        exec(compile(re.sub(MODELS, tiny_model, snippet).replace('"contriever"', '"bm25"'), name, "exec"), scope)
    if name == "examples/serving.md":
        assert (workspace / "outputs" / "merged" / "model.safetensors").is_file()
    if name == "examples/benchmarks.md":
        assert scope["dataset"].column_names == ["id", "user", "persona", "prompt", "completion"]
    if name == "examples/options.md":
        assert len(scope["scores"].pir)


def test_both_sides_of_the_diff_train_on_the_same_tokens(workspace, tiny_model):
    (diff,) = blocks("examples/sft_to_perce.md", "diff")
    lines = diff.splitlines()
    assert [sum(line.startswith(sign) for line in lines) for sign in "+-"] == [4, 4]
    trainers = []
    for kept in "-+":
        short = "learning_rate=1e-4, max_steps=1" + (
            ", use_cpu=True, bf16=False" if kept == "-" else ""
        )  # TRL's asks for it
        code = "\n".join(line[1:] for line in lines if line[:1] in (" ", kept, ""))
        scope = {}
        exec(re.sub(MODELS, tiny_model, code).replace("learning_rate=1e-4", short), scope)
        trainers.append(scope["trainer"])
    assert [type(trainer).__name__ for trainer in trainers] == ["SFTTrainer", "PerCETrainer"]
    assert [trainer.state.global_step for trainer in trainers] == [1, 1]
    for column in ("input_ids", "labels"):
        assert trainers[0].train_dataset[column] == trainers[1].train_dataset[column]


@pytest.mark.parametrize("name", ["multi_turn.py", "streaming.py"])
def test_scripts(workspace, tiny_model, monkeypatch, capsys, name):
    model = shutil.copytree(tiny_model, "model")
    code = (ROOT / "examples" / name).read_text()
    monkeypatch.setattr(sys, "argv", [name, str(model), "data/product_review/train.jsonl"])
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert "needles" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in FILES if blocks(name, "yaml") or blocks(name, "json")])
def test_data_in_the_documentation(name):
    for block in blocks(name, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    for block in blocks(name, "json"):
        assert isinstance(json.loads(block), dict)


@needs_openai
@pytest.mark.parametrize("name", [name for name in FILES if commands(name)])
def test_commands(workspace, tiny_model, echo, name, capfd):
    echo.reply = lambda body: "4"
    if name == "examples/evaluation.md":
        shutil.copytree("data/product_review", "data/own-rows")
    for words in commands(name):
        words = [re.sub(MODELS, tiny_model, word) for word in words]
        print("$", *words)
        if words[0] == "trl-perce":
            run(words[1], words[2:], tiny_model, echo.url)
        else:
            assert words[0] == "python", words
            run_example(words[1], words[2:], tiny_model)


def run(command: str, argv: list[str], model: str, url: str) -> None:
    short = SHORT[command].replace("MODEL", model).split()
    if command == "aloe":
        shared = ROOT.parent / "shared" / "data" / "aloe"
        if not shared.is_dir():
            return
        argv = [{"../ALOE/datasets": str(shared), "http://localhost:8000/v1": url}.get(word, word) for word in argv]
    if "--num_processes" in argv:  # test_processes.py runs two; here the arguments are looked at
        from trl_perce.cli.common import parse_with_launch
        from trl_perce.cli.main import COMMANDS

        parser = COMMANDS[command].make_parser()
        _, launch_args, own = parse_with_launch(parser, [*map(find_shipped, [*argv, *short])])
        assert "--num_processes" in launch_args and "--num_processes" not in own
        return
    if command == "score" and "--config" not in argv:
        short = []
    assert main([command, *argv, *short]) == 0


def run_example(script: str, argv: list[str], model: str) -> None:
    if script.startswith("examples/benchmarks/"):  # hours; its options are looked at
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in argv if word.startswith("--")), argv
        return
    text = "What should I buy?\n/pir\n" if script == "examples/chat.py" else None
    result = subprocess.run(
        [sys.executable, ROOT / script, *argv], input=text, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "gemm_4bit" not in result.stderr and "FutureWarning" not in result.stderr


def test_the_notebook(smollm2, monkeypatch):
    """Its cells, one after the other; it was saved with their outputs, which GitHub shows."""
    cells = json.loads((ROOT / "examples" / "percontrast.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert sum("image/png" in output.get("data", {}) for cell in codes for output in cell["outputs"]) == 2
    monkeypatch.setenv("MODEL", smollm2)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    scope = {}
    for cell in codes:
        exec("".join(cell["source"]), scope)
    kept = re.search(
        r"mean PIR: ([+-][\d.]+) nats with the right persona, ([+-][\d.]+)", json.dumps(cells, ensure_ascii=False)
    )
    means = [scope[name].pir.mean() for name in ("scores", "other")]
    bound = 2 * BF16 / len(scope["scores"].pir) ** 0.5  # in bfloat16, two passes of each of two machines
    assert [float(number) for number in kept.groups()] == pytest.approx(means, abs=bound)
    assert means[0] - means[1] > 2 * bound
