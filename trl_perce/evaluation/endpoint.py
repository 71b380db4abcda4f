# SPDX-License-Identifier: Apache-2.0

"""A client for OpenAI-compatible endpoints (vLLM, llama.cpp, `transformers serve`, OpenAI, …): judges and data builders."""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm


logger = logging.getLogger(__name__)


class EndpointError(RuntimeError):
    """A request failed for good."""


class Endpoint:
    """
    Asks a chat model behind an OpenAI-compatible endpoint, several requests at a time, and keeps every finished answer in
    a file, so that a run that was killed does not pay twice.

    Needs `pip install 'trl_perce[judge]'`. The key is read from the environment variable `OPENAI_API_KEY`; local servers
    mostly take any, so without the variable a dummy is sent. It goes into the requests' header and nowhere else: not into the
    file of answers, a log or an error, also where a server repeats it. Failed requests are repeated by the package `openai`. Where the
    endpoint refuses `max_tokens` or `temperature` (reasoning models of OpenAI do), it gets `max_completion_tokens`, or no temperature.

    Args:
        base_url (`str`): Of the endpoint, such as `"http://localhost:8000/v1"`.
        model (`str`): Name of the model as the server knows it.
        temperature (`float`, *optional*, defaults to `0.0`): Of sampling. `transformers serve` heeds it only where the
            model's own generation configuration samples.
        max_tokens (`int`, *optional*, defaults to `512`): Tokens that an answer may have, what a reasoning model thinks included. An answer
            that is cut off there is counted, and not kept in the file: with a larger budget, or another time, it is asked again.
        concurrency (`int`, *optional*, defaults to `4`): Requests at the same time.
        cache_path (`str` or `Path`, *optional*): File of finished answers, JSON lines `{"key", "answer"}`, made if it is
            not there. If `None`, nothing is kept.
        max_retries (`int`, *optional*, defaults to `5`): How often a failed request is repeated.
        timeout (`float`, *optional*, defaults to `600.0`): Seconds that a request may take.
        extra_body (`dict[str, Any]`, *optional*): What else a request says, such as
            `{"chat_template_kwargs": {"enable_thinking": False}}` (vLLM) or `{"reasoning_effort": "low"}`.
        keep_cut (`bool`, *optional*, defaults to `False`): Whether a text that was cut off at `max_tokens` is an answer like others, kept
            and not counted: for those whose length is limited on purpose, such as a simulated user's messages.

    Attributes:
        num_cut (`int`): How many requests of the last [`~Endpoint.ask`] have an answer that was cut off at `max_tokens`.

    Raises:
        `ImportError`: The package `openai` is not installed.
        `ValueError`: A name and password stand in `base_url`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrency: int = 4,
        cache_path: str | Path | None = None,
        max_retries: int = 5,
        timeout: float = 600.0,
        extra_body: dict[str, Any] | None = None,
        keep_cut: bool = False,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("Asking an endpoint needs the package openai: pip install 'trl_perce[judge]'") from error
        if re.match(r"[a-z]+://[^/]*@", base_url):
            raise ValueError(
                "`base_url` holds a name or password before the '@', which would be seen in logs. Remove it, and set the key "
                "in the environment variable OPENAI_API_KEY."
            )
        self.base_url = base_url
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.concurrency = concurrency
        self.extra_body = extra_body
        self.keep_cut = keep_cut
        self.num_cut = 0
        self.cache_path = None if cache_path is None else Path(cache_path)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._secret = (
            key if len(key) >= 8 else None
        )  # "none", "EMPTY", "x": local servers take any, there is nothing to hide
        self._client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=max_retries, timeout=timeout)
        self._error, self._status_error = openai.OpenAIError, openai.APIStatusError
        self._refused: frozenset[str] = frozenset()  # parameters that this endpoint does not take
        self._lock = threading.Lock()

    def ask(
        self, conversations: list[list[dict[str, str]]], desc: str | None = None, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """
        The model's answers. Equal conversations are asked once, also over runs: what shall differ (several samples, votes)
        must differ in its messages or its seed.

        Args:
            conversations (`list[list[dict[str, str]]]`): Messages `{"role", "content"}` of each request.
            desc (`str`, *optional*): Title of the progress bar, which shows on a terminal only.
            seeds (`Sequence[int]`, *optional*): Seed of each request's sampling. If `None`, none is sent.

        Returns:
            `list[str]`: The text of each answer, in the order of the conversations; empty where the model said nothing.

        Raises:
            [`EndpointError`]: A request failed for good. The answers that were there by then are in the file.
        """
        requests = [self._request(messages) for messages in conversations]
        for request, seed in zip(requests, seeds, strict=True) if seeds is not None else ():
            request["seed"] = seed
        keys = [_key(request) for request in requests]
        answers = self._read_cache()
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in answers}
        if answers and keys:
            logger.info(f"{self.cache_path}: {len(set(keys)) - len(missing)} of {len(set(keys))} answers are known")
        cut: list[str] = []  # keys
        executor = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {executor.submit(self._complete, key, request, cut): key for key, request in missing.items()}
            for future in tqdm(as_completed(futures), total=len(futures), desc=desc, disable=None):
                answers[futures[future]] = future.result()
        except self._error as error:
            executor.shutdown(cancel_futures=True)
            kept = "Set `cache_path` to keep finished answers."
            if self.cache_path is not None:
                kept = f"Finished answers are kept in {self.cache_path}: the same call goes on from there."
            done = sum(future.done() and not future.cancelled() and not future.exception() for future in futures)
            reason, cause = str(error), error
            if self._secret and self._secret in f"{error} {error!r} {error.__cause__!r}":  # the server repeats the key
                reason, cause = reason.replace(self._secret, "<OPENAI_API_KEY>"), None
            message = (
                f"{self.base_url} (model {self.model!r}): {reason} {done} of {len(futures)} requests were answered."
            )
            raise EndpointError(f"{message} {kept}") from cause
        finally:
            executor.shutdown(cancel_futures=True)  # on an error or Ctrl-C, nothing more is asked
        self.num_cut = sum(key in cut for key in keys)
        if self.num_cut:
            logger.warning(
                f"{self.num_cut} of {len(keys)} answers of {self.model!r} were cut off at {self.max_tokens} tokens. They are not kept. "
                "Raise the budget (`max_tokens`; of a judge: `judge_max_tokens`), which thinking counts towards, or have the model "
                "think less (`extra_body`)."
            )
        return [answers[key] for key in keys]

    def _request(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        request = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return request if self.extra_body is None else request | {"extra_body": self.extra_body}

    def _complete(self, key: str, request: dict[str, Any], cut: list[str]) -> str:
        choice = self._create(request).choices[0]
        answer = choice.message.content or ""
        if choice.finish_reason == "length" and not (self.keep_cut and answer):
            cut.append(key)
        elif self.cache_path is not None:
            with self._lock:  # in the thread: an answer that comes after another request failed is kept too
                _append(self.cache_path, key, answer)
        return answer

    def _create(self, request: dict[str, Any]):
        """A completion, without the parameters that the endpoint refuses: one try more for each of them."""
        refused = self._refused
        while True:
            try:
                completion = self._client.chat.completions.create(**_without(request, refused))
            except self._status_error as error:
                found = _refused_parameter(error) if error.status_code in (400, 422) else None
                if found is None or found in refused:
                    raise
                refused |= {found}
            else:
                with self._lock:
                    if new := refused - self._refused:
                        self._refused |= refused
                        logger.warning(
                            f"{self.base_url} (model {self.model!r}) refuses {', '.join(f'`{name}`' for name in sorted(new))}: "
                            "`max_completion_tokens` takes the place of `max_tokens`, the model's own temperature that of ours."
                        )
                return completion

    def _read_cache(self) -> dict[str, str]:
        if self.cache_path is None or not self.cache_path.exists():
            return {}
        answers, unreadable = {}, 0
        for line in self.cache_path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                answers[entry["key"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                unreadable += 1
        if unreadable:
            logger.warning(
                f"{self.cache_path}: {unreadable} of {unreadable + len(answers)} lines cannot be read (a run was killed "
                "while it wrote). They are asked again."
            )
        return answers


def _refused_parameter(error) -> str | None:
    """Which of the parameters that have a substitute an error of an endpoint names."""
    named = str(getattr(error, "param", None) or error)
    return next((name for name in ("max_tokens", "temperature") if re.search(rf"\b{name}\b", named)), None)


def _without(request: dict[str, Any], refused: frozenset[str]) -> dict[str, Any]:
    sent = {name: value for name, value in request.items() if name not in refused}
    return sent | {"max_completion_tokens": request["max_tokens"]} if "max_tokens" in refused else sent


def _append(cache_path: Path, key: str, answer: str) -> None:
    cache_path.parent.mkdir(parents=True, exist_ok=True)
    with open(cache_path, "ab+") as file:
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        if file.tell() and not _ends_with_newline(file):
            line = b"\n" + line  # behind a line that was torn
        file.write(line)


def _ends_with_newline(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _key(request: dict) -> str:
    """Of all that the answer depends on. The address is not in it: a server on another port is still the same model."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
