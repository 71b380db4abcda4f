"""Whether a CPU is slow at bfloat16, and who is told."""

import pytest
import torch
from accelerate import PartialState

from trl_perce.utils import bfloat16
from trl_perce.utils.bfloat16 import bf16_slowdown, slow_bf16, warn_of_slow_bf16


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="others may have instructions for it")
def test_a_cpu_without_instructions_is_slow():
    assert bf16_slowdown() > 2 and "`dtype: float32`" in slow_bf16()


@pytest.mark.parametrize(
    ("times", "dtype", "autocast", "warned"),
    [
        (19.4, torch.bfloat16, None, True),
        (19.4, torch.float32, torch.bfloat16, True),
        (19.4, torch.float32, torch.float16, False),
        (1.2, torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_a_model_on_a_slow_cpu_is_warned_of_once(times, dtype, autocast, warned, monkeypatch, caplog):
    PartialState()  # for the logger
    bfloat16._warn_once.cache_clear()
    monkeypatch.setattr(bfloat16, "bf16_slowdown", lambda: times)
    model = torch.nn.Linear(2, 2).to(dtype)
    for _ in range(2):
        warn_of_slow_bf16(model, autocast)
    assert [record.message for record in caplog.records] == [
        "bfloat16 is slow on this CPU: the matrix products of a training step take 19 times as long as in float32. Set "
        "`dtype: float32` and `bf16: false`."
    ] * warned
    warn_of_slow_bf16(model.to("meta"), autocast)  # elsewhere than on a CPU
    bfloat16._warn_once.cache_clear()
