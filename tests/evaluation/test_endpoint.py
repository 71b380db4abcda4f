"""The client for endpoints: against a small server of our own, and, with the judge and the builder, a real one."""

import json
import logging
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import ROOT
from servers import needs_openai, requests_of, user
from trl_perce.benchmarks.persona_qa import judge_words, load_rows
from trl_perce.benchmarks.persona_qa_builder import build_rows
from trl_perce.evaluation.endpoint import Endpoint, EndpointError


pytest_plugins = ["servers"]


@needs_openai
def test_answers_come_in_order_and_several_at_a_time(echo):
    texts = [f"text {index}" for index in range(12)]
    endpoint = Endpoint(echo.url, "m", temperature=0.3, max_tokens=7, concurrency=3)
    answers = endpoint.ask([user(text) for text in [*texts, texts[0], "nothing"]])
    assert answers == [*(f"echo: {text}" for text in texts), "echo: text 0", ""]
    assert sorted(echo.texts) == sorted([*texts, "nothing"])  # the equal one once
    assert 1 < echo.most <= 3
    assert {**echo.bodies[0], "messages": []} == {"model": "m", "messages": [], "temperature": 0.3, "max_tokens": 7}
    assert echo.keys == {"Bearer none"}
    assert endpoint.ask([]) == []


@needs_openai
def test_key_of_the_environment(echo, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    Endpoint(echo.url, "m").ask([user("a")])
    assert echo.keys == {"Bearer secret-7"}


@needs_openai
def test_the_key_is_written_nowhere(echo, monkeypatch, tmp_path, caplog):
    key = "sk-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "answers.jsonl"
    endpoint = Endpoint(echo.url, "m", cache_path=path)
    endpoint.ask([user("a"), user("b")], seeds=[1, 2])
    with pytest.raises(EndpointError, match="no to Bearer <OPENAI_API_KEY>") as error:
        endpoint.ask([user("key")])  # the server repeats the key
    assert echo.keys == {f"Bearer {key}"}
    texts = "".join(traceback.format_exception(error.value)), path.read_text(), caplog.text, repr(endpoint)
    assert all(texts) and not any(key in text for text in texts)
    monkeypatch.setenv("OPENAI_API_KEY", "no")  # is no secret, and part of many words
    with pytest.raises(EndpointError, match="no to bad"):
        Endpoint(echo.url, "m").ask([user("bad")])
    with pytest.raises(ValueError, match="password.*OPENAI_API_KEY"):
        Endpoint("https://me:pw@localhost/v1", "m")


@needs_openai
def test_seeds_tell_requests_apart(echo, tmp_path):
    endpoint = Endpoint(echo.url, "m", temperature=1.0, cache_path=tmp_path / "answers.jsonl")
    assert endpoint.ask([user("a"), user("a"), user("b")], seeds=[0, 1, 1]) == ["echo: a", "echo: a", "echo: b"]
    asked = sorted((body["messages"][0]["content"], body["seed"]) for body in echo.bodies)
    assert asked == [("a", 0), ("a", 1), ("b", 1)]
    endpoint.ask([user("a")], seeds=[1])
    assert len(echo.texts) == 3
    endpoint.ask([user("a")])
    assert len(echo.texts) == 4 and "seed" not in echo.bodies[-1]


@needs_openai
def test_finished_answers_are_not_asked_again(echo, tmp_path, caplog):
    path = tmp_path / "folder" / "answers.jsonl"
    texts = ["a", "b\nc", "ü 🧵"]
    Endpoint(echo.url, "m", cache_path=path).ask([user(text) for text in texts])
    assert len(echo.texts) == 3
    assert Endpoint(echo.url.replace("127.0.0.1", "localhost"), "m", cache_path=path).ask(
        [user(text) for text in texts[::-1]]
    ) == [f"echo: {text}" for text in texts[::-1]]
    assert len(echo.texts) == 3 and len(path.read_text().splitlines()) == 3
    for other in ({"temperature": 1.0}, {"max_tokens": 5}):  # another request
        Endpoint(echo.url, "m", cache_path=path, **other).ask([user("a")])
    Endpoint(echo.url, "n", cache_path=path).ask([user("a")])
    assert len(echo.texts) == 6

    # Killed while it wrote: the last line is torn
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-9])
    assert Endpoint(echo.url, "m", cache_path=path).ask([user(text) for text in texts]) == [
        f"echo: {t}" for t in texts
    ]
    assert "1 of 3 lines cannot be read" in caplog.text and len(echo.texts) == 7
    caplog.clear()
    kept = [line for line in path.read_bytes().splitlines() if line != lines[2][:-9]]
    assert all(json.loads(line)["answer"].startswith("echo") for line in kept) and len(kept) == 3
    Endpoint(echo.url, "m", cache_path=path).ask([user(text) for text in texts])
    assert len(echo.texts) == 7


@needs_openai
def test_what_was_answered_before_an_error_is_kept(echo, tmp_path):
    path = tmp_path / "answers.jsonl"
    conversations = [user(text) for text in ("a", "b", "bad", *map(str, range(50)))]
    with pytest.raises(
        RuntimeError, match=f"{echo.url}.*'m'.*no to bad.* of 53 requests.*answers.jsonl: the same call"
    ):
        Endpoint(echo.url, "m", concurrency=2, cache_path=path).ask(conversations)
    asked = len(echo.texts)
    assert asked < 10  # the rest was not asked
    assert len(path.read_text().splitlines()) == asked - 1  # every answer that was paid is there
    Endpoint(echo.url, "m", cache_path=path).ask([user("a"), user("b")])
    assert len(echo.texts) == asked


@needs_openai
def test_an_answer_that_is_cut_off_is_counted_and_not_kept(echo, tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    endpoint = Endpoint(echo.url, "m", max_tokens=9, cache_path=path)
    assert endpoint.ask([user(text) for text in ("cut 1", "a", "cut 2", "cut 1")]) == ["", "echo: a", "", ""]
    assert endpoint.num_cut == 3 and "3 of 4 answers of 'm' were cut off at 9 tokens" in caplog.text
    assert len(path.read_text().splitlines()) == 1
    assert endpoint.ask([user("cut 1"), user("a")]) == ["", "echo: a"]
    assert echo.texts.count("cut 1") == 2 and echo.texts.count("a") == 1 and endpoint.num_cut == 1
    assert endpoint.ask([user("a")]) == ["echo: a"] and endpoint.num_cut == 0
    # What is short on purpose, but nothing is never kept
    for kept in (Endpoint(echo.url, "m", cache_path=path, keep_cut=True) for _ in range(2)):
        assert kept.ask([user("cut"), user("limit")]) == ["", "echo: limit"] and kept.num_cut == 1
    assert echo.texts.count("limit") == 1 and echo.texts.count("cut") == 2


@needs_openai
def test_parameters_that_an_endpoint_refuses(echo, tmp_path, caplog):
    # The words of OpenAI's reasoning models
    echo.refused = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model.",
    }
    path = tmp_path / "answers.jsonl"
    endpoint = Endpoint(echo.url, "m", max_tokens=7, concurrency=1, cache_path=path, extra_body={"effort": "low"})
    assert endpoint.ask([user("a"), user("b")]) == ["echo: a", "echo: b"]
    assert echo.texts == ["a", "a", "a", "b"]  # learned once
    assert {**echo.bodies[-1], "messages": []} == {
        **{"model": "m", "messages": [], "max_completion_tokens": 7, "effort": "low"}
    }
    assert "refuses `max_tokens`, `temperature`" in caplog.text and caplog.text.count("refuses") == 1
    echo.refused = {"max_completion_tokens": "max_tokens is too large", "max_tokens": "max_tokens is too large"}
    with pytest.raises(EndpointError, match="max_tokens is too large"):
        Endpoint(echo.url, "m").ask([user("c")])
    assert echo.texts.count("c") == 2
    echo.refused = {"effort": "no effort"}
    with pytest.raises(EndpointError, match="no effort"):
        Endpoint(echo.url, "m", extra_body={"effort": "low"}).ask([user("d")])
    assert echo.texts.count("d") == 1
    echo.refused = {}
    Endpoint(echo.url, "m", max_tokens=7, cache_path=path).ask([user("a")])  # another request
    assert echo.texts.count("a") == 4


@needs_openai
def test_failures_that_pass_are_repeated(echo):
    assert Endpoint(echo.url, "m").ask([user("busy")]) == ["echo: busy"]
    assert echo.texts == ["busy", "busy"]


@needs_openai
def test_no_server(echo, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RuntimeError, match=f"{url}.*Connection error.*Set `cache_path`"):
        Endpoint(url, "m", max_retries=0).ask([user("a")])


@needs_openai
def test_a_killed_run_goes_on(echo, tmp_path):
    path = tmp_path / "answers.jsonl"
    script = (
        "import sys; from trl_perce.evaluation.endpoint import Endpoint\n"
        "texts = [str(index) for index in range(40)]\n"
        "print(len(Endpoint(sys.argv[1], 'm', concurrency=2, cache_path=sys.argv[2]).ask("
        "[[{'role': 'user', 'content': text}] for text in texts])))"
    )
    command = [sys.executable, "-c", script, echo.url, str(path)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes().count(b"\n")
    asked = len(echo.texts)
    assert kept < 40 and asked - kept <= 3  # at most what was under way
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "40\n" and len(echo.texts) == asked + 40 - kept
    assert "%" not in result.stderr  # no bar where there is no terminal


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'trl_perce\[judge\]'"):
        Endpoint("http://localhost:1/v1", "m")


# ── a real server ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_real_judge(server, smollm2, tmp_path):
    url, log = server
    rows, before = load_rows(("test",))[:3], requests_of(log)
    options = {"concurrency": 2, "max_tokens": 32, "cache_path": tmp_path / "judge.jsonl"}
    judgement = judge_words(rows, endpoint := Endpoint(url, smollm2, **options))
    assert requests_of(log) == before + 3
    assert len(judgement.spans) == 3
    assert judgement.unparseable <= 3 and judgement.rejected <= judgement.words
    kept = tmp_path / "judge.jsonl"  # not there if all answers were cut, which this model's may be
    replies = [json.loads(line)["answer"] for line in kept.read_text().splitlines()] if kept.exists() else []
    assert len(replies) == 3 - endpoint.num_cut and all(replies)
    assert judge_words(rows, Endpoint(url, smollm2, **options)) == judgement
    assert requests_of(log) == before + 3 + endpoint.num_cut


def test_real_builder(server, smollm2, tmp_path):
    url, log = server
    personas, before = ["I knit and keep two cats.", "I am a welder. I box."], requests_of(log)
    options = {"concurrency": 1, "max_tokens": 64, "cache_path": tmp_path / "answers.jsonl", "keep_cut": True}
    built = build_rows(personas, Endpoint(url, smollm2, **options), questions=2)
    assert requests_of(log) == before + 4
    assert len(built.rows) + len(built.rejected) == 4 and built.reasons.total() == len(built.rejected)
    assert {row["id"] for row in built.rows + built.rejected} == {"p001-1", "p001-2", "p002-1", "p002-2"}
    assert all(item["reason"] and item["reply"] and item["persona"] in personas for item in built.rejected)
    assert build_rows(personas, Endpoint(url, smollm2, **options), questions=2) == built
    assert requests_of(log) == before + 4


def test_a_merged_adapter_is_served(server, tiny_model, tokenizer, tmp_path):
    url, _ = server
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # as after training: not nothing
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    prompt = tokenizer.apply_chat_template(
        user("I sew.\nWhat now?"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": 12, "do_sample": False}

    def answer():
        reply = model.generate(**prompt, **options)[0, prompt["input_ids"].size(1) :]
        return tokenizer.decode(reply, skip_special_tokens=True)

    tuned = answer()
    with model.disable_adapter():
        assert tuned and tuned != answer()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    (served,) = Endpoint(url, str(tmp_path / "merged"), max_tokens=12).ask([user("I sew.\nWhat now?")])
    assert served == tuned


def test_real_server_without_the_model(server, tmp_path):
    url, _ = server
    with pytest.raises(RuntimeError, match="model 'no/such-model'"):
        Endpoint(url, "no/such-model", max_retries=0).ask([user("Hello")])
