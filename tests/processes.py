"""Runs of the command line in processes of their own."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import torch
import yaml
from safetensors.torch import load_file

from conftest import ROOT


def run(program, *arguments, timeout=300, **env) -> subprocess.CompletedProcess:
    """Run a program of this environment from the root of the repository."""
    result = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def start(argv, preexec_fn=None, **env) -> subprocess.Popen:
    """Start `trl-perce` in a session of its own, from the root of the repository."""
    return subprocess.Popen(
        [sys.executable, "-m", "trl_perce", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        start_new_session=True,
        preexec_fn=preexec_fn,
    )


@contextmanager
def files_of_at_most(size: int):
    """A limit on the size of files, in bytes, fails a write as a full disk does (with EFBIG, not ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def recipe(path, **values) -> str:
    values = {
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1},
        **{"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"},
        **{"learning_rate": 1.0e-2, "max_length": 128, "save_strategy": "no", "per_device_train_batch_size": 2},
        **values,
    }
    path.write_text(yaml.safe_dump(values))
    return str(path)


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(os.path.join(folder, "adapter_model.safetensors"))


def assert_same_adapter(one, two, atol=0.0):
    assert one.keys() == two.keys()
    assert any(value.abs().sum() > 0 for name, value in one.items() if "lora_B" in name)  # it did learn
    for name in one:
        assert torch.allclose(one[name], two[name], atol=atol, rtol=0), (name, (one[name] - two[name]).abs().max())
