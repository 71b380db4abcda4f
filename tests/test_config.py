import dataclasses

import pytest
import torch
from trl import SFTConfig

from trl_perce import PerCEConfig
from trl_perce.config import copy_config, has_accelerator


def test_every_new_field_has_help_and_the_defaults_are_the_papers():
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    new = {field.name: field for field in dataclasses.fields(PerCEConfig) if field.name not in inherited}
    assert {name: field.default for name, field in new.items()} == {
        "token_weighting": "perce",
        "weight_clip_min": 0.8,
        "weight_clip_max": 5.0,
        "weight_normalization": "none",
        "counterfactual": "drop",
        "counterfactual_batch_tokens": None,
        "counterfactual_refresh_epochs": 1,
        "persona_start_marker": "<persona>",
        "persona_end_marker": "</persona>",
        "truncate_persona": True,
        "chat_template_kwargs": None,
        "answer_only_loss": False,
        "on_nonfinite": "stop",
        "check_model": True,
    }
    assert all(field.metadata["help"] for field in new.values())
    assert all(f"        {name} (" in PerCEConfig.__doc__ for name in new)


def test_inherited_defaults_are_not_touched():
    ours = {field.name: field.default for field in dataclasses.fields(PerCEConfig)}
    assert ours.pop("assistant_only_loss") is None  # by the kind of rows, as its documentation says
    for field in dataclasses.fields(SFTConfig):
        if field.name in ours:
            assert ours[field.name] == field.default or field.default is dataclasses.MISSING


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_weighting": "persona"}, "`token_weighting` is 'persona'. Write one of 'perce', 'loss', 'entropy'"),
        ({"weight_normalization": "batch"}, "Write one of 'none', 'sequence'"),
        ({"counterfactual": "swap"}, "Write one of 'drop', 'drop_turn', 'mask'"),
        ({"weight_clip_min": 6.0}, r"`weight_clip_min` \(6.0\) is over `weight_clip_max` \(5.0\)"),
        ({"weight_clip_min": -0.1}, "`weight_clip_min` is -0.1. Write a finite number that is not negative"),
        ({"weight_clip_max": float("nan")}, "`weight_clip_max` is nan"),
        ({"weight_clip_max": float("inf")}, "`weight_clip_max` is inf"),
        ({"persona_start_marker": ""}, "not empty"),
        ({"answer_only_loss": True, "assistant_only_loss": False}, "Leave one of them out"),
        ({"persona_start_marker": "##", "persona_end_marker": "##"}, "none contains the other"),
        ({"persona_start_marker": "@", "persona_end_marker": "@@"}, "none contains the other"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        PerCEConfig("out", **values)


def test_the_token_is_not_pickled(tmp_path):
    """`training_args.bin` goes to the Hub with the adapter."""
    args = PerCEConfig(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_secret")
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes() and args.hub_token == "hf_secret"
    kept = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert kept.hub_token is None and kept.weight_clip_max == args.weight_clip_max
    assert copy_config(args).hub_token == "hf_secret"


@pytest.mark.skipif(has_accelerator(), reason="the CPU is chosen where there is nothing else")
def test_without_an_accelerator_the_cpu_is_chosen(tmp_path):
    args = PerCEConfig(str(tmp_path))
    assert args.use_cpu and args.device.type == "cpu" and args.bf16 is False and args.mixed_precision == "no"
    asked = PerCEConfig(str(tmp_path), bf16=True)
    assert asked.use_cpu and asked.bf16 and asked.mixed_precision == "bf16"
    assert copy_config(asked, max_length=None).use_cpu


def test_on_a_cpu_bf16_is_asked_for(tmp_path):
    assert not PerCEConfig(str(tmp_path), use_cpu=True).bf16
    assert PerCEConfig(str(tmp_path), use_cpu=True, bf16=True).bf16
    assert SFTConfig(str(tmp_path), use_cpu=True).bf16  # TRL 1.16's default, from which this departs
