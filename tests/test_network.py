"""No request that the user did not ask for, also without `HF_HUB_OFFLINE`; nothing is pickled or run that could be code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ROOT
from processes import recipe
from rows import make_chat_rows, write_splits
from trl_perce.cli.main import main


ROWS = make_chat_rows(6)
PROGRAM = """
import json, sys

asked = []

def listen(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or event == "socket.connect" and isinstance(args[1], tuple):
        asked.append(f"{event} {args[1:] if event == 'socket.connect' else args[:2]}")

sys.addaudithook(listen)
from trl_perce.cli.main import main

for argv in json.loads(sys.argv[1]):
    code = main(argv)
    assert not code, (argv[0], code)
    print(f"ASKED {argv[0]} {asked}")
"""


@pytest.fixture
def data(tmp_path):
    return write_splits(tmp_path / "data", train=ROWS, test=ROWS)


def test_no_request_that_nobody_asked_for(tmp_path, tiny_model, data):
    config = recipe(tmp_path / "config.yaml", model_name_or_path=tiny_model, dataset_name=data, num_train_epochs=1)
    adapter = str(tmp_path / "run")
    shared = ["--model_name_or_path", adapter, "--dataset_name", data]
    commands = [
        ["train", "--config", config, "--output_dir", adapter],
        ["score", *shared, "--output_dir", str(tmp_path / "scores")],
        [
            "evaluate",
            *shared,
            "--output_dir",
            str(tmp_path / "evaluation"),
            "--metrics",
            "rouge",
            "--max_new_tokens",
            "4",
        ],
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB") and name != "CI"}
    argv = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    env |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("ASKED")]
    assert lines == ["ASKED train []", "ASKED score []", "ASKED evaluate []"]


class Payload:
    def __reduce__(self):
        return open, (os.environ["TRL_PERCE_TEST_PAYLOAD"], "w")


def test_weights_that_are_pickles_do_not_run(tmp_path, tiny_model, data, monkeypatch, capsys):
    """A `pytorch_model.bin` can hold any code; it is read as weights alone or not at all."""
    monkeypatch.setenv("TRL_PERCE_TEST_PAYLOAD", str(tmp_path / "was-run"))
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "payload": Payload()}, folder / "pytorch_model.bin")
    for file in os.listdir(tiny_model):
        if "token" in file or "template" in file:
            (folder / file).write_bytes(open(os.path.join(tiny_model, file), "rb").read())
    (tmp_path / "was-run").unlink(missing_ok=True)  # saving ran it
    with pytest.raises((SystemExit, Exception)):
        main(
            [
                "score",
                "--model_name_or_path",
                str(folder),
                "--dataset_name",
                data,
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
    assert not (tmp_path / "was-run").exists()


def test_yaml_is_data(tmp_path, tiny_model, data, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_model}\nseed: !!python/object/apply:os.system ['touch {tmp_path}/was-run']\n"
    )
    for command in ("train", "score", "evaluate", "reproduce"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--config", str(config)])
        assert stopped.value.code == 2 and "python/object/apply" in capsys.readouterr().err
    assert not (tmp_path / "was-run").exists()
