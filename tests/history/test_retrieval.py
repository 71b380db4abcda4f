"""Retrieval: what may be retrieved, each method against arithmetic by hand or a real encoder, and the cache."""

import copy
import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from conftest import ROOT
from trl_perce.history import encoders
from trl_perce.history.entries import HistoryEntry, HistoryRow, folded, gives_away, to_examples
from trl_perce.history.retrieval import Retriever


DATA = ROOT.parent / "shared" / "data" / "product_reviews" / "test.jsonl"
PROMPT = ({"role": "user", "content": "{persona}\n\nWrite."},)
SEWING = (
    "My dentist is kind and the waiting room is bright.",
    "This sewing machine hems a dress in no time; the thread never tears.",
    "We grilled trout by the lake.",
    "The novel drags in the middle but ends well.",
)

needs_bm25s = pytest.mark.skipif(find_spec("bm25s") is None, reason="needs pip install 'trl_perce[retrieval]'")


def make_row(search, entries, response="the target", time=None, id="r", user="u"):
    entries = [HistoryEntry(text=e, search=e) if isinstance(e, str) else e for e in entries]
    return HistoryRow(id, user, PROMPT, response, tuple(entries), search, time)


def words(start, end):
    return " ".join(f"w{number}" for number in range(start, end))


def timed(*times, response=None):
    return [HistoryEntry(f"text {index}", "text", response, time) for index, time in enumerate(times)]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory, tokenizer) -> str:
    """A folder with a tiny random BERT of 64 positions, without its pooler, as Contriever's checkpoint may be."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 3},
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def count_texts(retriever: Retriever) -> list[int]:
    """Texts of each batch that goes through the retriever's model from now on."""
    counts = []
    retriever._encoder.model.register_forward_hook(lambda model, args, output: counts.append(len(output[0])))
    return counts


# ── what may be retrieved ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["recency", "random", pytest.param("bm25", marks=needs_bm25s)])
def test_never_the_target(method):
    entries = [
        HistoryEntry("a", "tea", response=" The\n TARGET\t"),
        HistoryEntry("b", "tea", response="the target."),
        HistoryEntry("the target", "the target"),  # has no response: cannot be told
        HistoryEntry("d", "tea", response="the target"),
    ]
    assert sorted(Retriever(method)([make_row("tea", entries)])[0]) == [1, 2]


@pytest.mark.parametrize(
    "response, text, expected",
    [
        ("thank you", "thank you", True),
        ("thank you", "oh, thank you all", False),  # too short to be a quotation
        ("we met in the park", "he says that we met in the park today", True),
        # Eight words at a time, and what is left over: 24 of 30, 24 of 31, 24 of 32, 32 of 40; a title has to be there whole
        (words(0, 30), words(0, 25) + " and so on", True),
        (words(0, 31), words(0, 25) + " and so on", False),
        (words(0, 32), words(0, 16) + " not " + words(24, 32), False),
        (words(0, 40), words(0, 16) + " not " + words(24, 40), True),
        (words(0, 23), words(0, 22), False),
        (words(0, 9), words(0, 8) + " else", False),
        (words(0, 40), "another opening: " + words(3, 40), True),
    ],
)
def test_what_gives_a_response_away(response, text, expected):
    assert gives_away(response, text) is expected


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=40),
    st.text("xyz ", max_size=20),
    st.text("xyz ", max_size=20),
)
def test_a_text_around_a_response_gives_it_away_and_one_without_its_words_does_not(response, before, after):
    assert gives_away(" ".join(response), folded(f"{before} {' '.join(response)} {after}"))
    assert not gives_away(" ".join(response), folded(f"{before} {after}"))


def test_a_near_duplicate_of_the_response_is_not_retrieved_and_counted(caplog):
    post = words(0, 60)
    entries = [
        HistoryEntry("x", "x", response=f"Another opening: {post.upper()}"),
        HistoryEntry("y", "y", response=words(50, 90)),
    ]
    assert Retriever("recency")([make_row("tea", entries, response=post)]) == [[1]]
    assert "1 entry holds the row's own response, or nearly all of it: not retrieved." in caplog.text


@pytest.mark.parametrize("method", ["recency", "random", pytest.param("bm25", marks=needs_bm25s)])
def test_never_later(method):
    assert sorted(Retriever(method)([make_row("text", timed(5, 1, 3, 4.9), time=5)])[0]) == [1, 2, 3]
    assert sorted(Retriever(method)([make_row("text", timed(5, 1, 3, 4.9))])[0]) == [0, 1, 2, 3]  # the user setting
    with pytest.raises(ValueError, match=r"Row 'r': entry 1 of the history has no `time`, but the row has one"):
        Retriever(method)([make_row("text", timed(5, None, 3), time=5)])


def test_excluded_entries_do_not_touch_the_order():
    """Later entries full of one word would make that word common, and the other one rare."""
    pytest.importorskip("bm25s")
    past = [HistoryEntry(text, text, None, 1.0) for text in ("linen", "linen flax", "silk weft", "wool")]
    later = [HistoryEntry("silk", "silk", None, 9.0)] * 50
    expected = Retriever("bm25")([make_row("linen silk", past, time=2.0)])
    assert Retriever("bm25")([make_row("linen silk", past + later, time=2.0)]) == expected == [[2, 0, 1, 3]]
    (with_later,) = Retriever("bm25", k=60)([make_row("linen silk", past + later)])
    assert [index for index in with_later if index < 4] == [0, 1, 2, 3]


def test_rows_without_entries_are_counted(caplog, tiny_bert):
    caplog.set_level(logging.INFO, "trl_perce")
    rows = [
        make_row("a", []),
        make_row("a", timed(3, 4), time=2),
        make_row("a", timed(1, response="The target")),
        make_row("a", timed(1, 2, 9), time=5),
    ]
    assert Retriever("recency")(rows) == [[], [], [], [1, 0]]
    assert "3 of 4 rows get no history entry: 1 have an empty history, of 2 every entry" in caplog.text
    assert (
        "2 entries may be retrieved; left out are 1 that hold the row's own response, or nearly all of it, and 3 that are"
        in caplog.text
    )
    assert Retriever(model=tiny_bert)(rows)[:3] == [[], [], []]
    assert Retriever(model="no/such-model")(rows[:3]) == [[], [], []]  # nothing to embed, so no model is loaded
    assert Retriever("random")([]) == []


TEXTS = st.lists(st.sampled_from("linen silk wool tea the 🧵 Tea".split()), max_size=4).map(" ".join)
RESPONSES = st.sampled_from([None, "the target", "The  Target ", "a", "b"])


@st.composite
def history_rows(draw, index=0):
    has_time = draw(st.booleans())
    time = st.integers(0, 4).map(float)
    entry = st.builds(HistoryEntry, TEXTS, TEXTS, RESPONSES, time)
    row_time = draw(time) if has_time else None
    return make_row(
        draw(TEXTS), draw(st.lists(entry, max_size=8)), "the target", row_time, id=draw(st.text(max_size=2))
    )


@pytest.mark.parametrize("method", ["recency", "random", "contriever", pytest.param("bm25", marks=needs_bm25s)])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(history_rows(), min_size=1, max_size=4), k=st.integers(1, 5), seed=st.integers(0, 3))
def test_rules(method, tiny_bert_retriever, rows, k, seed):
    retriever = tiny_bert_retriever if method == "contriever" else Retriever(method, k=k, seed=seed)
    retriever.k = k
    results = retriever(rows)
    assert results == retriever(rows)
    for row, result in zip(rows, results, strict=True):
        allowed = {
            index
            for index, entry in enumerate(row.history)
            if (entry.response or "").lower().split() != ["the", "target"]
            and (row.time is None or entry.time < row.time)
        }
        assert set(result) <= allowed and len(set(result)) == len(result) == min(k, len(allowed))
        assert retriever([row]) == [result]  # alone or among others
        retriever.k = k + 3
        assert retriever([row])[0][:k] == result
        retriever.k = k


def test_equal_texts_are_a_tie_wherever_they_stand(tiny_bert_retriever):
    """A product of matrices may sum the last rows in another order than the first: a score at a border of rounding then differs."""
    tiny_bert_retriever.k = 9
    rows = [
        make_row(" ".join(words), ["silk"] * 9) for words in product("linen silk wool tea the Tea".split(), repeat=4)
    ]
    assert tiny_bert_retriever(rows) == [[*range(9)]] * len(rows)


@pytest.fixture(scope="module")
def tiny_bert_retriever(tiny_bert):
    return Retriever(model=tiny_bert, batch_size=3)


# ── recency and chance ───────────────────────────────────────────────────────────────────────────────────────────────


def test_recency():
    def retrieve(*times):
        return Retriever("recency", k=3)([make_row("a", timed(*times))])[0]

    assert retrieve(None, None, None, None) == [3, 2, 1]
    assert retrieve(3, 9, 1, 5) == [1, 3, 0]
    assert retrieve(2, 7, 7, 1) == [2, 1, 0]  # at the same time: what stands last
    with pytest.raises(ValueError, match=r"Row 'r': entry 1 of the history has no `time`, but others have one"):
        retrieve(2, None)


def test_random():
    rows = [make_row("a", timed(*[None] * 20), id=str(index)) for index in range(400)]
    results = Retriever("random")(rows)
    assert Retriever("random")(rows[::-1]) == results[::-1]
    assert Retriever("random", seed=1)(rows) != results
    counts = np.bincount(np.concatenate(results), minlength=20)  # 1600 draws: 80 each, standard deviation 8
    assert counts.min() > 45 and counts.max() < 120
    firsts = np.bincount([result[0] for result in results], minlength=20)
    assert firsts.max() < 45  # 20 each
    assert results[:3] == [[10, 4, 18, 14], [7, 15, 17, 19], [18, 15, 4, 19]]  # as another process had it


# ── BM25 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bm25_by_hand(query, documents, k1=1.5, b=0.75):
    """Robertson's formula with Lucene's inverse document frequency."""
    documents = [re.findall(r"\w\w+", document.lower()) for document in documents]
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for word in re.findall(r"\w\w+", query.lower()):
            containing = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            count = words.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(words) / mean_length))
        scores.append(score)
    return sorted(range(len(documents)), key=lambda index: (-round(scores[index], 5), index))


@needs_bm25s
def test_bm25_is_the_formula():
    assert Retriever("bm25")([make_row("Where do I buy sewing thread?", SEWING)]) == [[1, 0, 2, 3]]
    generator = np.random.default_rng(0)
    words = np.array([f"word{index}" for index in range(40)])
    chances = 1 / np.arange(1, 41)
    rows, expected = [], []
    for _ in range(40):
        query, *documents = [
            " ".join(generator.choice(words, generator.integers(1, 15), p=chances / chances.sum())) for _ in range(9)
        ]
        rows.append(make_row(query, documents))
        expected.append(bm25_by_hand(query, documents))
    assert Retriever("bm25", k=8)(rows) == expected
    assert len({tuple(one) for one in expected}) > 30


@needs_bm25s
@pytest.mark.parametrize("query", ["", "the", "?!", "unknown", "tea"])
@pytest.mark.parametrize("entries", [("", ""), ("the", "?"), ("", "coffee"), ("coffee", "milk")])
def test_bm25_without_common_words_keeps_the_order(query, entries):
    assert Retriever("bm25")([make_row(query, entries)]) == [[0, 1]]


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_contriever_by_hand(tiny_bert):
    long = "I sew. " * 40  # more than the 64 positions
    texts = [*SEWING, "a", long, ""]
    model, tokenizer = AutoModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    by_hand = []
    for text in texts:  # one by one, without padding
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            by_hand.append(model(torch.tensor([[1, *ids[:62], 2]])).last_hidden_state[0].mean(0))
    retriever = Retriever(model=tiny_bert, k=7, batch_size=4)
    embeddings = encoders.embed_texts(retriever._encoder, texts, False, 4)
    for text, expected in zip(texts, by_hand, strict=True):
        assert embeddings[text].dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(embeddings[text]), expected, atol=2e-5, rtol=1e-4)
    scores = torch.stack([by_hand[0] @ one for one in by_hand])
    expected = scores.argsort(descending=True).tolist()
    rows = [make_row(texts[0], texts)]
    assert retriever(rows) == [expected] and expected != sorted(expected)
    for batch_size in (1, 64):
        assert Retriever(model=tiny_bert, k=7, batch_size=batch_size)(rows) == [expected]


def test_real_encoder(minilm):
    """Against sentence-transformers called by hand, and with sense: no word is common to the query and the entry."""
    from sentence_transformers import SentenceTransformer

    queries = [
        "Which needles do I need for linen?",
        "Tips for catching fish?",
        "A book for the beach",
        "My tooth aches",
    ]
    results = Retriever(minilm, k=4, batch_size=3)([make_row(query, SEWING) for query in queries])
    assert [result[0] for result in results] == [1, 2, 3, 0]
    model = SentenceTransformer(minilm, device="cpu")
    assert model.similarity_fn_name == "cosine"
    query_vectors, entry_vectors = model.encode(queries), model.encode(SEWING)
    for query, result in zip(query_vectors, results, strict=True):
        cosine = entry_vectors @ query / np.linalg.norm(entry_vectors, axis=1) / np.linalg.norm(query)
        assert result == np.argsort(-cosine).tolist()


def test_the_models_own_similarity_and_prompts(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm, device="cpu", similarity_fn_name="euclidean")
    model.prompts = {"query": "sewing: ", "document": ""}
    del model[2]  # without normalization the distance and the cosine differ
    model.save(str(tmp_path))
    retriever = Retriever(str(tmp_path), k=4)
    (result,) = retriever([make_row("books", SEWING)])
    query, entries = model.encode("sewing: books"), model.encode(SEWING)
    assert result == np.argsort(np.linalg.norm(entries - query, axis=1)).tolist()
    assert retriever._encoder.identity != Retriever(minilm)._encoder.identity


@pytest.mark.skipif(not DATA.is_file(), reason=f"needs the data of {DATA.parent}")
def test_real_reviews(minilm, tmp_path):
    """What is retrieved has more words of the query than what is drawn by chance; the target is never there."""
    rows = []
    for line in DATA.read_text(encoding="utf-8").splitlines():
        user = json.loads(line)
        history = tuple(
            HistoryEntry(one["reviewText"], f"{one['summary']} {one['description']}"[:200], one["reviewText"])
            for one in user["reviews"]
        )
        rows += [
            HistoryRow(
                f"{user['reviewer']}-{index}", str(user["reviewer"]), PROMPT, entry.response, history, entry.search
            )
            for index, entry in enumerate(history)
        ]

    def shared_words(indices, row):
        words = [set(re.findall(r"\w{4,}", row.history[index].search.lower())) for index in indices]
        query = set(re.findall(r"\w{4,}", row.search.lower()))
        return np.mean([len(query & one) / len(query) for one in words])

    overlap = {}
    for method in ("random", minilm, *(["bm25"] if find_spec("bm25s") else [])):
        retrieved = Retriever(method, k=2, cache_dir=tmp_path)(rows)
        for row, indices, example in zip(rows, retrieved, to_examples(rows, retrieved), strict=True):
            assert 0 < len(indices) <= 2 and row.response not in example["persona"]
        overlap[method] = np.mean([shared_words(*pair) for pair in zip(retrieved, rows, strict=True)])
    assert all(overlap[method] > 1.2 * overlap["random"] for method in overlap if method != "random"), overlap


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


ROWS = [
    make_row("I sew", [f"entry {index} of linen" for index in range(20)], id="0"),
    make_row("I buy", [f"entry {index} of linen" for index in range(10, 30)], id="1"),
    make_row("I sew", ["I sew", *SEWING], id="2"),
]


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_each_text_is_embedded_once(tiny_bert, tmp_path, caplog):
    caplog.set_level(logging.INFO, "trl_perce")
    first = Retriever(model=tiny_bert, cache_dir=tmp_path, batch_size=8)
    counts = count_texts(first)
    results = first(ROWS)
    assert results == Retriever(model=tiny_bert)(ROWS)
    assert sum(counts) == 2 + 35  # distinct queries and entries
    files = files_of(tmp_path)
    assert len(files) == 2

    second = Retriever(model=tiny_bert, cache_dir=tmp_path, batch_size=8)
    counts = count_texts(second)
    assert second(ROWS) == results and counts == [] and files_of(tmp_path) == files
    assert "the embeddings of 2 of 2 queries are known" in caplog.text
    assert "the embeddings of 35 of 35 history entries are known" in caplog.text

    more = [*ROWS, make_row("I sew", ["entry 1 of linen", "new"], id="3")]
    assert second(more)[:3] == results and counts == [1]  # the new one alone
    assert len(files_of(tmp_path)) == 3


def test_the_cache_is_of_the_weights(tiny_bert, tmp_path):
    """A moved folder is the same model; other weights under the same name, another length or another kind are not."""
    cache, folder = tmp_path / "cache", tmp_path / "model"
    Retriever(model=tiny_bert, cache_dir=cache)(ROWS)
    files = files_of(cache)
    shutil.copytree(tiny_bert, folder)
    torch.rand(3)
    state = torch.get_rng_state()
    moved = Retriever(model=str(folder), cache_dir=cache)
    moved(ROWS)
    assert files_of(cache) == files and torch.equal(torch.get_rng_state(), state)

    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5, 0] += 1e-3
    model.save_pretrained(folder)
    Retriever(model=str(folder), cache_dir=cache)(ROWS)
    assert len(files_of(cache)) == 4
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 5}))
    Retriever(model=str(folder), cache_dir=cache)(ROWS)
    assert len(files_of(cache)) == 6


def test_torn_files_are_embedded_again(tiny_bert, tmp_path, caplog):
    results = Retriever(model=tiny_bert, cache_dir=tmp_path)(ROWS)
    (largest,) = [path for path in files_of(tmp_path) if path.stat().st_size > 1000]
    whole = largest.read_bytes()
    for torn in (whole[:-7], whole[:50], b"", b"\0" * len(whole)):
        largest.write_bytes(torn)
        largest.with_name(largest.name + ".part").write_bytes(torn)  # what a killed run leaves
        other = largest.with_name("other.safetensors")  # holds what no later call will need
        other.write_bytes(torn)
        caplog.clear()
        retriever = Retriever(model=tiny_bert, cache_dir=tmp_path)
        counts = count_texts(retriever)
        assert retriever(ROWS) == results and sum(counts) == 35
        assert f"{largest} cannot be read" in caplog.text
        assert largest.read_bytes() == whole and not other.exists() and not list(tmp_path.rglob("*.part"))


def test_two_at_once_embed_once(tiny_bert, tmp_path):
    retrievers = [Retriever(model=tiny_bert, cache_dir=tmp_path) for _ in range(3)]
    counts = [count_texts(retriever) for retriever in retrievers]
    results = [None] * 3

    def run(index):
        results[index] = retrievers[index](ROWS)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2] and sum(map(sum, counts)) == 37


def test_a_killed_run_goes_on(tiny_bert, tmp_path):
    texts = [f"{index} linen " + "thread " * (index % 9) for index in range(15_000)]
    script = (
        "import json, sys; from trl_perce.history.encoders import ContrieverEncoder, embed_texts\n"
        "embed_texts(ContrieverEncoder(sys.argv[1]), json.load(sys.stdin), False, 16, sys.argv[2])"
    )
    command = [sys.executable, "-c", script, tiny_bert, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(texts))
    process.stdin.close()
    while len(files_of(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = files_of(tmp_path)
    retriever = Retriever(model=tiny_bert, cache_dir=tmp_path)
    counts = count_texts(retriever)
    (result,) = retriever([make_row("I sew", texts)])
    assert sum(counts) == 1 + len(texts) - encoders.SHARD * len(kept)
    assert kept.items() <= files_of(tmp_path).items()
    assert [result] == Retriever(model=tiny_bert)([make_row("I sew", texts)])


# ── wrong input ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wrong_arguments(minilm, tmp_path):
    for name in ("k", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` is 0, but must be at least 1"):
            Retriever("recency", **{name: 0})
    with pytest.raises(ValueError, match=r"`model` is 'x', but the retrieval method is 'bm25'"):
        Retriever("bm25", model="x")
    for unknown in ("bm52", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=f"'{unknown}' is neither 'contriever', 'bm25', 'recency' nor 'random'"):
            Retriever(unknown)([make_row("a", ["b"])])


@pytest.mark.parametrize("package,method", [("bm25s", "bm25"), ("sentence_transformers", "some/model")])
def test_without_the_package(package, method, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'trl_perce\[retrieval\]'"):
        Retriever(method)
    Retriever("contriever")
