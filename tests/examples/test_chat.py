import argparse
import json
import os
import shutil
import subprocess
import sys

from chat import Chat
from conftest import CHATML, ROOT
from trl_perce.persona.marks import mark_persona


def test_a_chat_with_a_persona(tiny_model, tmp_path):
    (tmp_path / "me.txt").write_text("I sew my own dresses.\n")
    (tmp_path / "other.txt").write_text("I bake.\n")
    lines = [
        "/pir",
        "What should I buy?",
        "/pir",
        "Is {persona} fine?",
        "And <persona>?",
        "/what",
        "/persona /nowhere",
    ]
    lines += [f"/persona {tmp_path / 'other.txt'}", "/pir", "And now?", "And then?", "/pir", "/quit", "not read"]
    argv = [sys.executable, "examples/chat.py", "--model", tiny_model, "--persona", str(tmp_path / "me.txt")]
    argv += ["--template", r"Me: {persona}\n", "--max_new_tokens", "8", "--temperature", "0"]
    text, env = "".join(f"{line}\n" for line in lines), {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(argv, input=text, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    output = result.stdout  # a random model may write anything between
    assert output.count("There is no answer yet.") == 2
    texts = [
        "I sew my own dresses.",
        "Me: … What should I buy?",
        "without '{persona}'",
        "without '<persona>'",
        "/reset",
    ]
    texts += ["No such file", "There is no answer yet.", "I bake.", "And then?"]
    places = [
        output.rindex(text) if "answer yet" in text else output.index(text) for text in texts if text != "/reset"
    ]
    assert places == sorted(places) and output.count("/reset") == 2 and "not read" not in output
    assert output.count("Persona   ") == 2 and "[…]: a personal token" in output


def test_the_persona_in_a_system_message(tiny_model, tmp_path, tokenizer, capsys):
    """With the template's arguments that the training had."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "trl_perce.json").write_text(json.dumps({"chat_template_kwargs": {"mood": "glad"}}))
    (folder / "chat_template.jinja").write_text("{{ mood }}: " + CHATML)
    argv = {
        "model": str(folder),
        "system": "Of me: {persona}",
        "template": "Me: {persona}\n",
        "chat_template_kwargs": None,
    }
    chat = Chat(argparse.Namespace(**argv, max_new_tokens=4, temperature=0), "I sew.")
    prompts = []
    chat.model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    for text in ("/pir", "What now?", "And then?", "/pir", "/reset", "Once more?"):
        chat.take(text)
    begin = "glad: <|im_start|>system\nOf me: I sew.<|im_end|>\n<|im_start|>user\n"
    texts = [tokenizer.decode(ids) for ids in prompts]
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert texts[0] == f"{begin}What now?{end}" and f"{begin}Once more?{end}" in texts
    scored = [text for text in texts[1:] if text.startswith("glad") and "And then?" in text and not text.endswith(end)]
    assert [text.count("I sew.") for text in scored] == [1, 0]  # `/pir`, with and without the persona
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    _, (span,) = mark_persona({"persona": "I sew.", "prompt": chat.messages[:-1], "completion": chat.messages[-1:]})
    assert span[:2] == ("prompt", 0) and "I sew." in capsys.readouterr().out
