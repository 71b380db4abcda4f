import os
import subprocess
import sys

from conftest import ROOT


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
