"""The script that made the embedded model: cleaning, splitting, shards, and a tiny training run."""

import json
import lzma
import random
from dataclasses import asdict

import pytest
import torch

from prodial_kernels.embedded.making import corpus as corpus_module
from prodial_kernels.embedded.making.corpus import Document, gather, read_corpus
from prodial_kernels.embedded.making.evaluate import bits_per_byte
from prodial_kernels.embedded.making.html_text import html_to_text
from prodial_kernels.embedded.making.optimise import TrainOptions, train
from prodial_kernels.embedded.making.pretrain import main
from prodial_kernels.embedded.making.sources import SOURCES, Source
from prodial_kernels.embedded.making.tokens import (
    build_shards,
    load_shard,
    load_tokenizer,
    token_byte_lengths,
)

PAGE = """<html><head><title>no</title><script>var x = 1;</script></head><body>
<div class="sphinxsidebar"><ul><li>menu</li></ul></div>
<div class="body" role="main"><h1>Queues<a class="headerlink" href="#q">¶</a></h1>
<p>A queue is
 &ldquo;first in&rdquo;, <em>first</em> out.</p>
<ul><li><p>put</p></li><li>get</li></ul>
<div class="highlight"><pre>def f(x):
    if x:
\treturn x</pre></div></div>
<div class="footer">copyright</div></body></html>"""


def test_html_keeps_what_a_reader_reads():
    assert html_to_text(PAGE) == (
        'Queues\n\nA queue is "first in", first out.\n\n- put\n\n- get\n\n'
        "def f(x):\n    if x:\n        return x"
    )


def test_html_with_unclosed_furniture_keeps_the_rest():
    text = html_to_text("<body><ul><li class='search'>find<li>go</ul><p>The text.</p>")
    assert text.endswith("The text.")


def test_sources_are_distinct_and_licensed():
    packages = [source.package for source in SOURCES]
    assert len(set(packages)) == len(packages)
    assert all(source.licence for source in SOURCES)
    assert any(source.held_out for source in SOURCES)


def _prose(rng: random.Random) -> str:
    sentence = "the value of a queue is set by this option and you can read it from that file"
    return " ".join(rng.choice(sentence.split()) for _ in range(60)) + "."


def test_gather_cleans_deduplicates_and_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_version", lambda archive: "1.0")
    (tmp_path / "deb").mkdir()
    rng = random.Random(0)
    repeated = _prose(rng)
    for package in ("alpha-doc", "beta-doc"):
        (tmp_path / "deb" / f"{package}_1.0_all.deb").touch()
        folder = tmp_path / "unpacked" / package / "html"
        folder.mkdir(parents=True)
        for i in range(150):
            body = f"<p>{_prose(rng)}</p><p>{_prose(rng)}</p><p>{repeated}</p>"
            (folder / f"{i}.html").write_text(f"<body>{body}</body>", encoding="utf-8")
        (folder / "genindex.html").write_text(f"<body><p>{_prose(rng)}</p></body>")
        (folder / "de.html").write_text("<body><p>" + "das ist ein Satz " * 40 + "</p></body>")
    sources = [
        Source("alpha-doc", "MIT", skip=("/7.html",)),
        Source("beta-doc", "MIT", held_out=True),
    ]
    documents = list(read_corpus(gather(sources, tmp_path, processes=1)))
    names = {document.name for document in documents if document.package == "alpha-doc"}
    assert "html/1.html" in names
    assert not names & {"html/7.html", "html/genindex.html", "html/de.html"}
    assert sum(document.text.count(repeated) for document in documents) == 1
    splits = {document.package: set() for document in documents}
    for document in documents:
        splits[document.package].add(document.split)
    assert splits == {"alpha-doc": {"train", "heldout_docs"}, "beta-doc": {"heldout_project"}}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [row["licence"] for row in manifest] == ["MIT", "MIT"]
    assert manifest[0]["train_bytes"] == sum(
        len(d.text.encode()) for d in documents if d.split == "train"
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(1)
    with lzma.open(folder / "corpus.jsonl.xz", "wt", encoding="utf-8") as out:
        for i in range(40):
            split = ("train", "train", "heldout_docs", "heldout_project")[i % 4]
            document = Document("alpha-doc", f"{i}.html", split, f"{_prose(rng)}\n\n    x = {i}\n")
            out.write(json.dumps(asdict(document)) + "\n")
    build_shards(folder / "corpus.jsonl.xz", folder, vocab_size=300)
    return folder


def test_shards_hold_the_text(shards):
    tokenizer = load_tokenizer(shards)
    ids = load_shard(shards / "heldout_docs.bin.xz").tolist()
    texts = [d.text for d in read_corpus(shards / "corpus.jsonl.xz") if d.split == "heldout_docs"]
    assert ids.count(0) == len(texts)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(texts)
    lengths = token_byte_lengths(tokenizer)
    assert int(lengths[ids].sum()) == sum(len(text.encode()) for text in texts)


def test_missing_shard_and_large_vocabulary_are_reported(tmp_path):
    with pytest.raises(ValueError, match="make it with the corpus command"):
        load_shard(tmp_path / "train.bin.xz")
    with pytest.raises(ValueError, match="vocab_size: expected at most 32768"):
        build_shards(tmp_path / "corpus", tmp_path, vocab_size=40_000)


def test_train_command_writes_a_model_that_loads_and_scores(shards, tmp_path, capsys):
    # Same code path as on a GPU, save for the kernels, the graph and autocast.
    out = tmp_path / "model"
    size = ["--hidden-size", "32", "--layers", "2", "--sequence-length", "32", "--batch-size", "4"]
    limits = ["--max-steps", "20", "--max-seconds", "60", "--warmup-steps", "2", "--log-every", "5"]
    device = ["--device", "cpu", "--mixer", "torch"]
    assert main(["train", "--shards", str(shards), "--out", str(out), *size, *limits, *device]) == 0
    result = json.loads((out / "training.json").read_text())
    assert result["steps"] == 20
    assert result["losses"][-1][1] < result["losses"][0][1] - 0.1
    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), "--shards", str(shards)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    scores = {line["stream"]: line["bits_per_byte"] for line in lines}
    # Stored in float16, so equal to the score in training but for rounding.
    assert scores["heldout_docs"] == pytest.approx(result["heldout_docs_bits_per_byte"], rel=1e-3)


class _Uniform(torch.nn.Module):
    """Predicts every token with the same probability; its one parameter changes nothing."""

    def __init__(self, vocab_size):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.vocab_size = vocab_size

    def forward(self, input_ids, use_cache):
        logits = self.bias.expand(*input_ids.shape, self.vocab_size)
        return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize("length", [2, 33, 64, 100])
def test_bits_per_byte_of_a_uniform_model(length):
    lengths = torch.full((256,), 2)
    tokens = torch.randint(0, 256, (length,))
    score = bits_per_byte(_Uniform(256), tokens, lengths, sequence_length=16, batch_size=2)
    assert score == pytest.approx(8 / 2)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        bits_per_byte(_Uniform(256), tokens[:1], lengths)


def test_rate_warms_up_and_falls_to_zero(capsys):
    options = TrainOptions(
        max_seconds=60, max_steps=50, batch_size=1, sequence_length=4, warmup_steps=10, log_every=1
    )
    progress = train(_Uniform(8), torch.randint(0, 8, (64,)), options)
    rates = [json.loads(line)["rate"] for line in capsys.readouterr().out.splitlines()]
    assert progress.steps == 50
    assert rates[0] == pytest.approx(options.learning_rate / 10, rel=0.1)
    assert max(rates) > 0.75 * options.learning_rate
    assert rates[-1] < 0.05 * options.learning_rate


def test_time_limit_ends_training():
    options = TrainOptions(max_seconds=0.3, batch_size=1, sequence_length=4)
    progress = train(_Uniform(8), torch.randint(0, 8, (64,)), options)
    assert progress.steps > 0
    assert progress.seconds < 5


def test_divergence_goes_back_to_good_weights():
    class Diverging(_Uniform):
        def forward(self, input_ids, use_cache):
            # Sampled at every tenth step, so it stays broken until the loop repairs it.
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 15:
                self.bias.data.fill_(float("nan"))
            return super().forward(input_ids, use_cache)

    model = Diverging(8)
    options = TrainOptions(max_seconds=60, max_steps=40, batch_size=1, sequence_length=4)
    progress = train(model, torch.randint(0, 8, (64,)), options)
    assert progress.restarts == 1
    assert torch.isfinite(model.bias).all()


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="batch_size: expected more than 0, got 0"):
        TrainOptions(max_seconds=1, batch_size=0)
    with pytest.raises(ValueError, match="tokens: expected more than sequence_length = 512"):
        train(_Uniform(8), torch.zeros(10, dtype=torch.long), TrainOptions(max_seconds=1))
