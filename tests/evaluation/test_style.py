"""Style by cosines with users' texts, against sentence-transformers called by hand and plain loops."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments
from trl_perce.evaluation.evaluate import evaluate
from trl_perce.evaluation.style import LuarEncoder, check_encoder, load_encoder, style_values


TEXTS = [
    "Look, I sew. Linen only! Needles, thread, done.",
    "Hm. Wool? Never! Linen. Always.",
    "look, i sew.  linen only! needles, thread, done.",  # the first, but for case and white space
    "I would be most grateful if you could recommend a train to Vienna.",
    "It is with great pleasure that I write to you about my garden.",
    "lol no idea, ask my bro",
    "Look, I sew. Linen only! Needles, thread, done.",  # nobody's
    "",
]
USERS = ["a", "a", "a", "b", "b", "c", None, "c"]
PREDICTIONS = [
    "Ha! Silk? No. Linen.",
    "Needles! Fine. Go.",
    "I sew.",
    "I should be delighted to hear of it.",
    "",
    "no",
    "x",
]


def by_hand(minilm, predictions, rows, texts, users):
    from sentence_transformers import SentenceTransformer

    model, values = SentenceTransformer(minilm, device="cpu"), []

    def cosine(one, other):
        one, other = (model.encode(text).astype(np.float64) for text in (one, other))
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    def fold(text):
        return re.sub(r"\s+", " ", text.lower())

    for prediction, row in zip(predictions, rows, strict=True):
        by_user = {}
        for user, text in zip(users, texts, strict=True):
            if user and text and fold(text) != fold(texts[row]):
                by_user.setdefault(user, {}).setdefault(fold(text), text)
        if users[row] not in by_user:
            values.append([np.nan] * 3)
            continue
        means = {
            user: np.mean([cosine(prediction, text) if prediction else 0.0 for text in own.values()])
            for user, own in by_user.items()
        }
        own = means.pop(users[row])
        values.append([own, np.mean([*means.values()]), own - np.mean([*means.values()])])
    return np.array(values)


@pytest.fixture(scope="module")
def encoder(minilm):
    return load_encoder(minilm, False, "cpu")


def test_cosines(minilm, encoder):
    rows = [0, 1, 2, 3, 4, 5, 6]
    found = style_values(PREDICTIONS, rows, TEXTS, USERS, encoder)
    expected = by_hand(minilm, PREDICTIONS, rows, TEXTS, USERS)
    assert [*found] == ["style/own", "style/other", "style/margin"]
    assert np.stack([*found.values()], axis=1) == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert np.isnan(expected[:, 0]).tolist() == [False] * 5 + [True] * 2 and expected[4].tolist() == [0, 0, 0]
    assert (found["style/margin"][:4] > 0).all()  # each is written as its user writes


def make_rows():
    return [
        {"user": user, "persona": f"I am {user}.", "prompt": "{persona}\nSay it:\n", "completion": text}
        for user, text in zip(USERS, TEXTS, strict=True)
        if user and text
    ]


def test_in_an_evaluation(minilm, tiny_model, tokenizer, tmp_path, monkeypatch):
    rows = make_rows()
    args = GenerationArguments(temperature=0.0, max_new_tokens=8, bf16=False, use_cpu=True)

    def run(folder="eval", **options):
        options = EvaluationArguments(metrics=["rouge"], likelihood=False, **options)
        return evaluate(tiny_model, tokenizer, rows, tmp_path / folder, args, options, {"name": "tiny"})

    run(swap_persona=True)
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_model", None)  # the predictions are kept
    result = run(swap_persona=True, style_encoder=minilm)
    for folder, prefix in (("", ""), ("swapped", "swapped/")):
        lines = (tmp_path / "eval" / folder / "predictions.jsonl").read_text().splitlines()
        texts = [json.loads(line)["prediction"] for line in lines]
        expected = by_hand(minilm, texts, range(6), TEXTS[:6], USERS[:6])
        table = [json.loads(line) for line in (tmp_path / "eval" / "metrics.jsonl").read_text().splitlines()]
        names = [f"{prefix}style/{name}" for name in ("own", "other", "margin")]
        found = np.array([[row[name] for name in names] for row in table], float)
        assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)
        assert result["metrics"][names[2]]["mean"] == pytest.approx(np.nanmean(expected[:, 2]), abs=1e-5)
        assert result["metrics"][names[2]]["rows"] == 5
    report = (tmp_path / "eval" / "report.md").read_text()
    assert "1 of 6 predictions have no value: their users have no other text." in report
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_encoder", None)  # the values are kept
    assert run(swap_persona=True, style_encoder=minilm) == result
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="style in .* was measured by .*, and here by"):
        run("again", baseline=str(tmp_path / "eval"), style_encoder=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("users", "encoder", "message"),
    [
        (
            ["a", "b"] * 3,
            "./nowhere",
            "`style_encoder`: there is no encoder './nowhere', neither as a folder (seen from",
        ),
        (["a", "b"] * 3, "nobody/nothing", "there is no encoder 'nobody/nothing'"),
        (["a"] * 6, None, "`style_encoder` compares users, and there are rows of 1."),
        (["a", "a", "a", "b", "c", "d"], None, "no user has two different ones"),
        (["a", "b"] * 3, "luar", "brings code of its own. Set `trust_remote_code`"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_loads(
    minilm, tiny_model, tokenizer, tmp_path, monkeypatch, users, encoder, message
):
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_model", None)
    rows = [{**row, "user": user} for row, user in zip(make_rows(), users, strict=True)]
    if message.startswith("no user"):
        rows[1]["completion"] = rows[0]["completion"]  # the third is the same already
    if encoder == "luar":
        encoder = str(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "LUAR"}')
        monkeypatch.setitem(sys.modules, "einops", sys.modules["json"])
    args = GenerationArguments(temperature=0.0, max_new_tokens=8, bf16=False, use_cpu=True)
    options = EvaluationArguments(metrics=["rouge"], style_encoder=encoder or minilm)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        evaluate(tiny_model, tokenizer, rows, tmp_path / "eval", args, options, {"name": "tiny"})


def test_without_the_package(minilm, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "LUAR"}')
    for package, encoder in (("einops", str(tmp_path)), ("sentence_transformers", minilm)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs the package {package}: pip install"):
            check_encoder(encoder, True)


CODE = {
    "config.py": """
from transformers import PretrainedConfig

class LUARConfig(PretrainedConfig):
    model_type = "LUAR"
""",
    "model.py": """
import torch
from transformers import AutoModel, PreTrainedModel
from .config import LUARConfig

class LUAR(PreTrainedModel):
    config_class = LUARConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = AutoModel.from_pretrained(config.backbone)
        self.linear = torch.nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask):
        authors, texts, tokens = input_ids.shape
        mask = attention_mask.reshape(-1, tokens)
        states = self.transformer(input_ids.reshape(-1, tokens), mask).last_hidden_state
        means = ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).reshape(authors, texts, -1)
        return self.linear(means.amax(1))
""",
}


def test_a_model_that_is_called_as_luar_is(tmp_path, tokenizer):
    """Code of its own, which loads a backbone while it is made, and shapes as on the model card. Not LUAR itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = BertModel(BertConfig(vocab_size=400, **sizes))
    backbone.save_pretrained(tmp_path / "backbone")
    folder = tmp_path / "luar"
    tokenizer.save_pretrained(folder)
    for name, code in CODE.items():
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "config.LUARConfig", "AutoModel": "model.LUAR"}
    config = {"model_type": "LUAR", "auto_map": auto_map, "backbone": str(tmp_path / "backbone")}
    (folder / "config.json").write_text(json.dumps(config))

    from safetensors.torch import save_file

    trained = {f"transformer.{name}": weight + 0.1 for name, weight in backbone.state_dict().items()}
    trained |= {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}
    save_file(trained, folder / "model.safetensors")
    texts = ["I sew.", "I love linen, and needles."]
    found = LuarEncoder(str(folder), "cpu").embed(texts)

    backbone.load_state_dict({name: trained[f"transformer.{name}"] for name in backbone.state_dict()})
    backbone.eval()
    for text, embedding in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = backbone(ids).last_hidden_state[0].mean(0)
        assert embedding == pytest.approx((trained["linear.weight"] @ mean + trained["linear.bias"]).numpy(), abs=1e-4)
    del trained["linear.bias"]
    save_file(trained, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lack linear.bias"):
        LuarEncoder(str(folder), "cpu")
