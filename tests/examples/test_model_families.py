"""The sweep over model families: its truth, and what it says of right and wrong."""

import pytest

import model_families as sweep


@pytest.fixture(scope="module")
def llama():
    return sweep.build("LlamaForCausalLM", "llama")


def test_a_right_model_is_right_and_a_wrong_path_is_seen(llama, monkeypatch):
    found = {"paths": {}}
    sweep.check(llama, found, lambda: None)
    assert [*found["paths"]] == [*sweep.PATHS]
    assert {sweep.verdict(outcome) for outcome in found["paths"].values()} == {"right"}, found

    rows = sweep.make_rows()
    truth = sweep.Truth(llama, rows)
    right = {key: truth.log_probs[key] - truth.dropped[key] for key in truth.dropped}
    assert truth.error(right, "drop") == truth.error(right, "mask") == 0
    assert truth.error({**right, 200: right[200] + 0.5}, "drop") == pytest.approx(0.5)
    assert truth.error({key: right[key] for key in [*right][1:]}, "drop") == float("inf")


def test_each_type_of_layer_is_there_and_the_window_is_short():
    config = sweep.shrink(sweep.CONFIG_MAPPING["gemma3"], {})
    assert {*config.text_config.layer_types} == {"sliding_attention", "full_attention"}
    assert config.text_config.sliding_window < min(sum(row["persona_mask"]) or 99 for row in sweep.make_rows())


def test_the_table_tells_refused_from_wrong():
    paths = dict.fromkeys(sweep.PATHS, {"nats": 1e-6})
    paths |= {"mask": {"nats": 0.5}, "packed": {"refused": "ValueError: Set `packing` to False."}}
    paths |= {"accumulated": {"nats": 1e-6, "loss": 0.02}, "LoRA": {"crash": "RuntimeError: sizes"}}
    paths["generation"] = {"nats": 0.0, "said": "Rows are generated one at a time."}
    results = [
        {"class": "SomeForCausalLM", "types": ["some"], "paths": paths},
        {"class": "OtherForCausalLM", "types": ["other"], "not_built": "ValueError: no"},
    ]
    text = sweep.report(results)
    some = "| Some | right | right | **off 0.5** | right | right | right | refused [1] | **loss 2 %** | right [2] | error [3] |"
    assert some in text and "| mask | 0 | 0 | 1 | 0 |" in text and "| packed | 0 | 1 | 0 | 0 |" in text
    assert "`OtherForCausalLM` | ValueError: no" in text
