# SPDX-License-Identifier: Apache-2.0

"""The model under test in a conversation, through Transformers."""

import logging
import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


class TransformersResponder:
    """
    Replies to conversations in batches, padded on the left. One that leaves no room for the reply loses its oldest messages, which is
    logged.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): In evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        temperature (`float`, *optional*, defaults to `0.4`): Of sampling, as in the paper's inference; 0 for greedy decoding.
        max_new_tokens (`int`, *optional*, defaults to `512`): Tokens that a reply may have.
        batch_size (`int`, *optional*, defaults to `8`): Conversations at a time.
        seed (`int`, *optional*, defaults to `0`): Of sampling. The same batch gives the same replies, whatever came before it.
        chat_template_kwargs (`dict[str, Any]`, *optional*): For the chat template, such as `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 0.4,
        max_new_tokens: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.batch_size, self.seed = batch_size, seed
        self.chat_template_kwargs = chat_template_kwargs or {}
        # Models without positions have no limit
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def __call__(self, conversations: list[list[dict[str, str]]]) -> Iterator[str]:
        """
        Reply to conversations.

        Args:
            conversations (`list[list[dict[str, str]]]`): Messages `{"role", "content"}`, the user's last.

        Yields:
            `str`: A reply each, in order, as batches are finished.
        """
        for start in range(0, len(conversations), self.batch_size):
            texts = [self._fit(messages) for messages in conversations[start : start + self.batch_size]]
            yield from self._generate(texts)

    def _fit(self, messages: list[dict[str, str]]) -> str:
        text, total = self._render(messages), len(messages)
        while len(messages) > 2 and len(self._encode([text])["input_ids"][0]) + self.max_new_tokens > self.max_length:
            messages = messages[2:]
            text = self._render(messages)
        if len(messages) < total:
            logger.warning(f"A conversation is too long for the model: its first {total - len(messages)} messages go")
        return text

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )

    def _encode(self, texts: list[str], **kwargs):
        return self.tokenizer(texts, add_special_tokens=False, **kwargs)  # the template has written them

    def _generate(self, texts: list[str]) -> list[str]:
        inputs = self._encode(texts, padding=True, padding_side="left", return_tensors="pt").to(self.model.device)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": self.temperature}
        if not self.temperature:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        torch.manual_seed(self.seed + zlib.crc32("\0".join(texts).encode()))
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        replies = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [reply.strip() for reply in replies]
