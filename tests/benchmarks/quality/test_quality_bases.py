"""Pretraining of the study's bases: pieces, checkpoints in parts, export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality.bases import checkpoint
from benchmarks.quality.bases.checkpoint import CheckpointError, load_state, restore, save_state
from benchmarks.quality.bases.pretrain import Images, Options, Text, pretrain
from benchmarks.quality.bases.shapes import SHAPES, build, load_base
from prodial_kernels.embedded.making.tokens import load_tokenizer, save_tokenizer, train_tokenizer


def quiet(line: str) -> None:
    del line


def text(length: int = 16) -> Text:
    """A stream in which each token decides the next."""
    tokens = (torch.arange(4000) * 5 % 37).short()
    return Text(tokens, {"english": tokens[:300]}, torch.ones(48, dtype=torch.long), length, 300)


def options(steps: int, **more: Any) -> Options:
    return Options(
        600, max_steps=steps, batch_size=4, learning_rate=1e-2, warmup_steps=5, **more
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("toy")])
def test_every_kind_of_base_learns_and_goes_on(name: str, tmp_path: Path) -> None:
    data: Any = text()
    if name == "vim-toy":
        images = torch.zeros(60, 1, 32, 32, dtype=torch.uint8)
        labels = torch.arange(60) % 3
        images[labels == 1] = 120
        images[labels == 2] = 255
        data = Images((images, labels), (images, labels))
    model = build(name, 48)
    first = pretrain(model, data, options(20), tmp_path, say=quiet)
    again = build(name, 48, seed=5)
    then = pretrain(again, data, options(20, final=True), tmp_path, say=quiet)
    assert (first.step, then.step, then.pieces) == (20, 40, 2)
    measure = "error" if name == "vim-toy" else "english"
    figures = [line[measure] for line in then.history]
    assert len(figures) == 2
    assert figures[1] < figures[0] or figures[1] == 0
    assert then.history[-1]["seen"] == 40 * 4 * (1 if name == "vim-toy" else 16)


def test_a_killed_run_goes_on_nearly_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = build("mamba2-toy", 48)
    one = pretrain(whole, text(), options(60), tmp_path / "one", say=quiet)
    for steps in (30, 30):
        parts = build("mamba2-toy", 48)
        two = pretrain(parts, text(), options(steps), tmp_path / "two", say=quiet)
    apart = abs(one.history[-1]["english"] - two.history[-1]["english"])
    # Rounding to 16 bits and a fresh first moment cost little of what was learnt.
    assert one.history[-1]["english"] < 0.7 * math.log2(37)
    assert apart < 0.1 * (math.log2(37) - one.history[-1]["english"])


def test_batches_depend_on_the_step_alone_and_cover_every_window() -> None:
    data = text()
    assert torch.equal(data.draw(7, 4, 0)[0], text().draw(7, 4, 0)[0])
    epoch = torch.cat([data._epochs.take(4 * step, 4, 0)[0] for step in range(200)])
    count = data._epochs.count
    assert sorted(epoch[:count].tolist()) == list(range(count))
    x, y = data.draw(0, 4, 0)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_a_checkpoint_has_two_bytes_a_parameter_in_bounded_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 20_000)
    model = build("mamba1-toy", 300)
    data = text()
    pretrain(model, data, options(3), tmp_path, say=quiet)
    parts = sorted(tmp_path.glob("state.[0-9]*"))
    size = sum(part.stat().st_size for part in parts)
    parameters = sum(p.numel() for p in model.parameters())
    # A toy's vectors, moments and names weigh more than a base's.
    assert 2 * parameters < size < 4 * parameters
    assert len(parts) == -(-size // 20_000)
    assert max(part.stat().st_size for part in parts) <= 20_000
    assert not list(tmp_path.glob("next.*"))


def test_moments_come_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    save_state(tmp_path, model, optimizer, {}, torch.float32)
    other = torch.nn.Linear(6, 4)
    again = torch.optim.AdamW(other.parameters())
    restore(load_state(tmp_path), other, again, step=1)
    assert torch.equal(other.weight, model.weight)
    kept, found = optimizer.state[model.weight], again.state[other.weight]
    torch.testing.assert_close(found["exp_avg_sq"].mean(1), kept["exp_avg_sq"].mean(1))
    torch.testing.assert_close(found["exp_avg_sq"].mean(0), kept["exp_avg_sq"].mean(0))
    bias = again.state[other.bias]["exp_avg_sq"]
    torch.testing.assert_close(bias, optimizer.state[model.bias]["exp_avg_sq"])
    other(torch.randn(8, 6)).square().sum().backward()
    again.step()


def test_a_checkpoint_of_several_saves_is_refused(tmp_path: Path) -> None:
    model = build("mamba2-toy", 48)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path, model, optimizer, {"a": 1})
    (tmp_path / "state.0").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"state\.0 is another checkpoint's"):
        load_state(tmp_path)
    (tmp_path / "state.0").unlink()
    with pytest.raises(CheckpointError, match=r"state\.0 is missing"):
        load_state(tmp_path)
    save_state(tmp_path, model, optimizer, {})
    with pytest.raises(CheckpointError, match="of another model"):
        restore(load_state(tmp_path), build("mamba1-toy", 48))


def test_the_commands_pretrain_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["one two three four " * 20], 300)
    save_tokenizer(tokenizer, tmp_path / "corpus")
    import lzma

    ids = torch.tensor(tokenizer.encode("one two three four " * 300).ids).short()
    for split in ("train", "english", "code", "unseen_english", "unseen_code"):
        data = lzma.compress(ids.numpy().astype("<i2").tobytes())
        (tmp_path / "corpus" / f"{split}.bin.xz").write_bytes(data)
    record = {"sources": [{"package": "p", "version": "1", "licence": "MIT"}]}
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps(record))
    folders = ["--data", str(tmp_path / "corpus"), "--out"]
    more = ["--device", "cpu", "--max-steps", "4", "--batch-size", "2", "--length", "16"]
    arguments = ["pretrain", "--base", "mamba2-toy", *folders, str(tmp_path / "state"), *more]
    assert command.main(arguments) == 0
    arguments = ["export", "--state", str(tmp_path / "state"), *folders, str(tmp_path / "base")]
    assert command.main([*arguments, "--name", "mine"]) == 0
    base = load_base(tmp_path / "base")
    assert (base.name, base.kind) == ("mine", "language")
    saved = load_state(tmp_path / "state")["w/backbone.layers.0.mixer.out_proj.weight"]
    loaded = base.model.backbone.layers[0].mixer.out_proj.weight
    assert torch.equal(loaded, saved.float())
    card = (tmp_path / "base" / "README.md").read_text()
    assert "bits per byte" in card
    assert "| p | 1 | MIT |" in card
    assert load_tokenizer(tmp_path / "base").get_vocab_size() == base.model.config.vocab_size
    capsys.readouterr()
    assert command.main(["export", "--state", str(tmp_path), *folders, str(tmp_path / "x")]) == 2
    assert "expected state.json" in capsys.readouterr().err
