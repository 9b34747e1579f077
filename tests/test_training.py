"""The parts of training: schedule, optimiser, evaluation, checkpoints; and that a model does learn."""
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_model
from torch.nn import functional as F

import transformer
from transformer import Config, UserError


@pytest.mark.parametrize("p", [0.1, 0.5, 1])
def test_noise_misreads_the_share_asked_for(p):
    torch.manual_seed(0)
    x = torch.randint(1000, (50, 999)) * 2
    seen = transformer.misread(x, p)
    assert seen.shape == x.shape and seen.dtype == x.dtype
    assert (seen != x).float().mean().item() == pytest.approx(p, abs=0.01)  # one in a thousand is replaced by itself
    assert torch.isin(seen, x).all()
    assert not torch.equal(transformer.misread(x, p), seen)
    assert torch.equal(transformer.misread(x, 0.0), x)


TEXT = "ROMEO:\nO Tybalt, the prince, Romeo!\n\nPARIS:\nWhy, ROMEO, the paris of Verona\n\nTIMON:\nAnd Timon? And\n"


def rename(text, p, seed=0):
    itos = "".join(sorted(set(TEXT + text + text.upper())))
    ids = torch.from_numpy(transformer.encode(text, itos))[None].long()
    renamed = transformer.rename(ids, p, transformer.find_names(TEXT), itos, np.random.default_rng(seed))
    assert renamed.shape == ids.shape and renamed.dtype == ids.dtype
    return transformer.decode(renamed[0], itos)


def test_names_are_the_words_never_written_small():
    assert transformer.find_names(TEXT) == {3: ["and", "why"], 5: ["romeo", "timon"], 6: ["tybalt", "verona"]}


def test_rename_gives_a_name_another_throughout_and_leaves_the_rest():
    assert rename(TEXT, 0.0) == TEXT
    texts = [rename(TEXT, 1.0, seed) for seed in range(20)]
    assert len(set(texts)) > 5
    for text in texts:
        romeo = text[:5]
        assert romeo in ("ROMEO", "TIMON", "ROMON", "TIMEO")
        assert f", {romeo}, the paris of " in text
        assert romeo.capitalize() + "!" in text
        assert "the prince, " in text and "PARIS:" in text
    assert any("Tybona" in text for text in texts)


def test_rename_keeps_the_length_where_changing_case_would_not():
    text = "STRAẞE WEIẞER Straße \u0130stanbul \u0130skender"
    itos = "".join(sorted(set(text + text.upper() + text.lower())))
    ids = torch.from_numpy(transformer.encode(text, itos))[None].long()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert transformer.rename(ids, 1.0, transformer.find_names(text), itos, rng).shape == ids.shape


def test_rename_replaces_the_share_asked_for():
    shares = [rename("ROMEO ", 0.5, seed) != "ROMEO " for seed in range(400)]
    assert 0.28 < np.mean(shares) < 0.47  # three quarters of a half: in a quarter both halves are its own


def test_learning_rate_at_the_corners():
    config = Config(max_iters=1000, warmup_iters=100, learning_rate=1e-3)
    rates = [transformer.get_lr(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 101)  # small, but not zero
    assert rates[100] == max(rates) == pytest.approx(1e-3)
    assert rates[550] == pytest.approx(0.5e-3)  # half of the way down
    assert 0 < rates[-1] == pytest.approx(1e-3 / 900)
    assert transformer.get_lr(1000, config) == 0
    assert all(a < b for a, b in zip(rates[:100], rates[1:]))
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))


@pytest.mark.parametrize("warmup_iters", [0, 1, 9, 10, 11, 100])
def test_learning_rate_of_a_short_run(warmup_iters):
    config = Config(max_iters=10, warmup_iters=warmup_iters, learning_rate=1.0)
    assert all(0 < transformer.get_lr(step, config) <= 1 for step in range(10))


def test_weight_decay_is_for_matrices_only():
    model = tiny_model()
    decayed, rest = transformer.make_optimizer(model, Config(weight_decay=0.3), "cpu").param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in rest["params"])
    together = {id(p) for p in decayed["params"] + rest["params"]}
    assert together == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) == 2 + 4 * TINY["n_layer"]  # two tables; four matrices in a block


def test_a_tiny_model_learns_one_batch_by_heart():
    torch.manual_seed(0)
    config = Config(**{**TINY, "n_embd": 32}, weight_decay=0.0)
    model = transformer.GPT(config, 11)
    optimizer = transformer.make_optimizer(model, config, "cpu")
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    idx = torch.randint(11, (4, 17))
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 < math.log(11)  # the first characters of the windows cannot be known
    assert (model(idx[:, :-1])[0].argmax(-1) == idx[:, 1:])[:, 3:].float().mean() > 0.95


def test_when_the_model_has_how_many_blocks():
    config = Config(n_layer=6, max_iters=10, grow_at=0.6)
    assert [transformer.n_blocks(step, config) for step in range(10)] == 6 * [2] + 4 * [6]
    for changes, blocks in [({"grow_at": 0.0}, 10 * [6]), ({"n_layer": 1}, 10 * [1]), ({"n_layer": 2}, 6 * [1] + 4 * [2])]:
        other = dataclasses.replace(config, **changes)
        assert [transformer.n_blocks(step, other) for step in range(10)] == blocks
    assert transformer.n_blocks(0, Config(max_iters=1)) == 6  # no run is too short to end with the whole model
    for step in range(11):  # the work left, in steps of the whole model
        left = sum(transformer.n_blocks(s, config) / 6 for s in range(step, 10))
        assert transformer.full_steps(step, config) == pytest.approx(left)


def test_a_model_grows_into_copies_of_its_blocks():
    torch.manual_seed(0)
    config = Config(**{**TINY, "n_layer": 5})
    small = transformer.GPT(dataclasses.replace(config, n_layer=2), 11)
    small_optimizer = transformer.make_optimizer(small, config, "cpu")
    x, y = torch.randint(11, (2, 4, 16))
    def step(model, optimizer):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    for _ in range(3):
        step(small, small_optimizer)
    model, optimizer = transformer.grow(small, small_optimizer, config, "cpu")
    assert len(model.blocks) == model.config.n_layer == 5
    pairs = [(small, model, name) for name in ("token_embedding_table", "position_embedding_table", "ln_f")]
    pairs += [(small.blocks[source], model.blocks[i], None) for i, source in enumerate([0, 0, 0, 1, 1])]
    seen = 0
    for source, copy, name in pairs:
        source, copy = (getattr(module, name) if name else module for module in (source, copy))
        for p, q in zip(source.parameters(), copy.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
            for key, value in small_optimizer.state[p].items():
                assert torch.equal(value, optimizer.state[q][key]) and value.data_ptr() != optimizer.state[q][key].data_ptr()
            seen += 1
    assert seen == len(list(model.parameters()))  # none forgotten
    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("length", [5, 17, 18, 33, 640, 1000])
def test_the_evaluation_covers_everything_exactly_once(length):
    """The mean loss over every character but the first, each predicted from its own window alone."""
    model, data = tiny_model(), np.random.default_rng(0).integers(11, size=length).astype(np.uint8)
    losses = []
    for i in range(0, length - 1, 16):
        window = torch.from_numpy(data[i:i + 17].astype(np.int64))[None]
        with torch.no_grad():
            losses += F.cross_entropy(model(window[:, :-1])[0][0], window[0, 1:], reduction="none").tolist()
    assert len(losses) == length - 1
    estimate = transformer.estimate_loss(model.train(), data, length, "cpu")
    assert estimate == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert model.training
    assert transformer.estimate_loss(model, data, length, "cpu") == estimate


def test_the_evaluation_of_a_part_is_spread_over_the_whole():
    model, data = tiny_model(), np.repeat([0, 1, 2, 3], 4000).astype(np.uint8)
    model.forward = lambda x, y: (seen.append(x), (None, torch.tensor(0.0)))[1]
    seen = []
    transformer.estimate_loss(model, data, 1600, "cpu")
    seen = torch.cat(seen)
    assert seen.shape == (100, 16)
    assert torch.bincount(seen[:, 0]).tolist() == [25, 25, 25, 25]


def test_the_evaluation_stops_when_asked():
    model = tiny_model()
    assert transformer.estimate_loss(model, np.zeros(1000, np.uint8), 1000, "cpu", stopped=[2]) is None
    assert model.training


def save(path, **changes):
    model = tiny_model(**changes)
    transformer.save_checkpoint(path, model, "abcdefghijk", more=1)
    return model


def test_a_checkpoint_gives_the_model_back(tmp_path):
    path = tmp_path / "model.pt"
    model = save(path, dropout=0.25)
    loaded, checkpoint = transformer.load_checkpoint(path)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert checkpoint["itos"] == "abcdefghijk" and checkpoint["more"] == 1
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(ours, theirs), name
    assert loaded.lm_head.weight is loaded.token_embedding_table.weight
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code from the file was run",))


def damaged_files():
    buffer = io.BytesIO()
    torch.save({"model": {}, "config": {}, "itos": "ab"}, buffer)
    yield "another dictionary", buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(Malicious(), buffer)
    yield "a malicious pickle in torch's format", buffer.getvalue()
    yield "a malicious pickle", pickle.dumps(Malicious())
    yield "a text", b"To be, or not to be" * 100
    yield "empty", b""


@pytest.mark.parametrize("content", [content for _, content in damaged_files()], ids=[name for name, _ in damaged_files()])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        transformer.load_checkpoint(path)


def test_no_checkpoint_cut_short_or_with_a_flipped_byte_is_taken_for_whole(tmp_path):
    """Cut or flipped anywhere, it is refused; or the flip was in padding, and every number is what it was."""
    path = tmp_path / "model.pt"
    model, whole = save(path), path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in rng.integers(len(whole), size=40):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged"):
            transformer.load_checkpoint(path)
    refused = 0
    for at in rng.integers(len(whole), size=200):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            loaded, _ = transformer.load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
    assert refused > 50


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.pt"
    save(path)
    before = path.read_bytes()

    def write(file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        transformer.replace_file(path, write)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_the_precision_is_one_that_exists():
    assert transformer.pick_precision("cpu") in ("fp32", "bf16")
