"""Push, download and use an adapter over HTTP, with the real client; and uploads that fail."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers.utils.hub import hf_api

from conftest import ROOT, make_tiny_model
from hub_server import GOOD, READ_ONLY
from processes import recipe
from rows import make_chat_rows, write_splits
from trl_perce import PerCETrainer, PerContrastCallback
from trl_perce.cli.main import main
from trl_perce.hub.upload import UploadError, make_repo, upload_again


pytest_plugins = ["hub_server"]
ROWS = make_chat_rows()
# Loads an adapter by its name and answers, as the model card says
USE = """
import json, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "About me: I am Zarquon.\\nWhat should I buy, number 3?"}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].size(1) :]
print(json.dumps(answer.tolist()))
"""


@pytest.fixture
def environment(hub, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": GOOD, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    return env | home | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def train_argv(tmp_path, tiny_model):
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": write_splits(tmp_path / "data", train=ROWS, test=ROWS[:3]),
        "push_to_hub": True,
    }
    values |= {"eval_strategy": "epoch", "num_train_epochs": 1}
    return ["train", "--config", recipe(tmp_path / "config.yaml", **values), "--output_dir", str(tmp_path / "adapter")]


def run(*argv, env):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_train_push_download_generate(hub, environment, train_argv, tmp_path):
    argv = [*train_argv, "--hub_model_id", "tester/zarq", "--save_strategy", "steps", "--save_steps", "2"]
    hub.faults += [("PUT", "/lfs/", "cut", 1), ("POST", "/commit/", "500", 1)]
    result = run("-m", "trl_perce", *argv, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"pushed to the Hub in {hub.url}/tester/zarq" in result.stdout and not hub.faults
    assert GOOD not in result.stdout + result.stderr

    files, folder = hub.repos["tester/zarq"], tmp_path / "adapter"
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "README.md",
        "trl_perce.json",
    } <= files.keys()
    assert (
        not any(name.startswith("checkpoint-") for name in files)
        and hub.commits["tester/zarq"][-1] == "End of training"
    )
    assert all(files[name] == (folder / name).read_bytes() for name in files)
    assert not any(b"Zarquon" in data or GOOD.encode() in data for data in files.values())  # no persona, no token

    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert {"trl", "trl-perce", "perce", "lora"} <= {*data["tags"]} and "qlora" not in data["tags"]
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation" and "datasets" not in data
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = [
        log for log in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "eval_nll" in log
    ][-1]
    assert metrics["nll"] == round(last["eval_nll"], 4) and metrics["pir/mean"] == round(last["eval_pir/mean"], 4)
    for text in (
        'from_pretrained("tester/zarq"',
        "<|im_start|>user\nAbout me: {persona}\nWhat should I buy, number …<|im_end|>",
        r"w_i = \mathrm{clip}(\mathrm{PIR}(y_i;\theta), 0.8, 5)",
        "| mean PIR (nats) |",
        "eprint        = {arXiv:2603.06595}",
    ):
        assert text in card.text, card.text

    loaded = [run("-c", USE, name, env=environment) for name in ("tester/zarq", str(folder))]
    assert loaded[0].returncode == 0, loaded[0].stderr
    assert loaded[0].stdout == loaded[1].stdout and len(json.loads(loaded[0].stdout)) == 12


@pytest.fixture
def online(hub, monkeypatch):
    """The client of this process, too, talks to the server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api(), "endpoint", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", GOOD)
    return hub


def test_a_bad_token_is_told_before_the_model_loads(online, train_argv, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobodynobody")
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", None)
    assert main(train_argv) == 1
    output = "".join(capfd.readouterr())
    message = (
        "trl-perce train: error: `push_to_hub`: there is no repository 'adapter' to push to. The Hub does not accept"
    )
    assert message in output and "hf_nobody" not in output
    assert not (tmp_path / "adapter").exists() or not any((tmp_path / "adapter").iterdir())


@pytest.mark.parametrize("token, message", [("", "does not accept the token"), (READ_ONLY, "may not write there")])
def test_a_repository_that_cannot_be_made(online, make_args, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UploadError, match=message) as error:
        make_repo(make_args(push_to_hub=True))
    assert not token or token not in str(error.value)


def test_an_upload_that_fails_for_good_leaves_the_adapter(online, train_argv, tmp_path, capfd):
    online.faults += [("POST", "/commit/", "403", 1)]
    assert main([*train_argv, "--save_strategy", "no"]) == 1
    folder, last = tmp_path / "adapter", capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "trl-perce train: error: The upload to tester/adapter failed. The token may not write there"
    )
    assert f"{folder} is as it was; `hf upload tester/adapter {folder} --exclude" in last
    assert "adapter_model.safetensors" not in online.repos["tester/adapter"]
    # What the message says to do
    program, *arguments = shlex.split(last.split("`")[-2])
    program = os.path.join(os.path.dirname(sys.executable), program)
    env = {"HF_TOKEN": GOOD, "HF_ENDPOINT": online.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    uploaded = subprocess.run([program, *arguments], env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert uploaded.returncode == 0, uploaded.stderr
    files = online.repos["tester/adapter"]
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert {*files} == {file.name for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("times, tries", [(0, 2), (2, 4), (9, 3)])
def test_an_upload_is_tried_again(online, make_args, tmp_path, caplog, times, tries):
    args = make_args(push_to_hub=True, output_dir=str(tmp_path / "adapter"), hub_token=GOOD)
    (tmp_path / "adapter" / "checkpoint-1").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "README.md", "_private", "checkpoint-1/optimizer.pt"):
        (tmp_path / "adapter" / name).write_text(name)
    make_repo(args)
    online.faults += [("POST", "/commit/", "500", times)] if times else []
    error = OSError(f"the line is cut, {GOOD}")
    if times == 9:
        with pytest.raises(UploadError, match="The upload to tester/adapter failed. .* is as it was"):
            upload_again(error, "tester/adapter", args, "End", attempts=3, wait=0.01)
    else:
        upload_again(error, "tester/adapter", args, "End", attempts=4, wait=0.01)
        assert {*online.repos["tester/adapter"]} == {"adapter_model.safetensors", "README.md"}
    assert sum("/commit/" in path for _, path in online.requests) == tries - 1
    assert caplog.text.count("Trying again") == tries - 1 and GOOD not in caplog.text


def test_what_the_callback_shows_stays_here(online, make_args, tokenizer, tmp_path):
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 3}
    args = make_args(output_dir=str(tmp_path / "adapter"), report_to="tensorboard", hub_always_push=True, **options)
    rows = Dataset.from_list(ROWS)
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = make_tiny_model("llama")
    trainer = PerCETrainer(model, args, None, rows, rows, tokenizer, peft_config=lora)
    trainer.add_callback(PerContrastCallback(trainer, num_rows=2))
    trainer.train()
    trainer.push_to_hub()
    files = online.repos["tester/adapter"]
    assert any(name.startswith("runs/") for name in files) and "checkpoint-3/optimizer.pt" in files
    assert not any(b"Zarquon" in data or b"Quibbles, number" in data for data in files.values())
    assert "Zarquon" in (tmp_path / "adapter" / "_percontrast" / "step-3.html").read_text(encoding="utf-8")


def test_an_upload_in_the_background_that_fails_is_told(online, train_argv, capfd, caplog):
    online.faults += [("POST", "/commit/", "403", 1)]
    assert main([*train_argv, "--save_strategy", "steps", "--save_steps", "3"]) == 0
    assert "An upload to tester/adapter during training failed. The token may not write there" in caplog.text
    assert "adapter_model.safetensors" in online.repos["tester/adapter"]
