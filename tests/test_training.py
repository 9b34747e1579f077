"""The parts of training: schedule, optimizer, evaluation, checkpoints."""
import os

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_model
from torch.nn import functional as F

import transformer
from transformer import Config, UserError


def test_the_learning_rate():
    config = Config(max_iters=1000, warmup_iters=100, learning_rate=1e-3)
    rates = [transformer.get_lr(step, config) for step in (0, 50, 100, 550, 999, 1000)]
    assert rates == pytest.approx([1e-3 / 101, 51e-3 / 101, 1e-3, 0.5e-3, 1e-3 / 900, 0])  # the first is not zero
    for warmup_iters in (0, 1, 9, 10, 11, 100):
        short = Config(max_iters=10, warmup_iters=warmup_iters, learning_rate=1.0)
        assert all(0 < transformer.get_lr(step, short) <= 1 for step in range(10))


def test_weight_decay_is_for_matrices_only():
    model = tiny_model()
    decayed, rest = transformer.make_optimizer(model, Config(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in rest["params"])
    assert {id(p) for p in decayed["params"] + rest["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) == 2 + 4 * TINY["n_layer"]  # two tables; four matrices in a block


@pytest.mark.parametrize("length", [17, 33, 640, 1000])
def test_the_evaluation_covers_everything_once_or_a_part_evenly(length):
    """The mean loss over every character but the first, each predicted from its own window only, in whole windows."""
    model, data = tiny_model(dropout=0.5), np.random.default_rng(0).integers(11, size=length).astype(np.int32)
    losses = []
    for i in range(0, length - 16, 16):
        window = torch.from_numpy(data[i:i + 17]).long()[None]
        with torch.no_grad():
            losses += F.cross_entropy(model(window[:, :-1])[0][0], window[0, 1:], reduction="none").tolist()
    assert len(losses) > length - 1 - 16
    for _ in range(2):
        assert transformer.estimate_loss(model.train(), data, length) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    seen = []
    model.forward = lambda x, y: (seen.append(x[:, 0]), (None, torch.tensor(0.0)))[1]
    transformer.estimate_loss(model, np.repeat([0, 1, 2, 3], 4000).astype(np.int32), 1600)
    assert torch.bincount(torch.cat(seen)).tolist() == [25, 25, 25, 25]


def save(path, **changes):
    model = tiny_model(**changes)
    transformer.save_checkpoint(path, {"model": model.state_dict(), "config": vars(model.config), "itos": "abcdefghijk", "more": 1})
    return model


def test_a_checkpoint_gives_the_model_back(tmp_path):
    model = save(tmp_path / "model.pt", n_layer=3, dropout=0.25)
    loaded, checkpoint = transformer.load_checkpoint(tmp_path / "model.pt")
    assert loaded.config == model.config and (checkpoint["itos"], checkpoint["more"]) == ("abcdefghijk", 1)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert loaded.lm_head.weight is loaded.token_embedding_table.weight
    assert {"blocks.0.sa.qkv.weight", "blocks.2.ffwd.net.2.bias", "position_embedding_table.weight"} < checkpoint["model"].keys()
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code from the file was run",))


def test_a_damaged_checkpoint_is_refused_and_no_code_in_it_is_run(tmp_path):
    path = tmp_path / "model.pt"
    save(path)
    whole = path.read_bytes()
    others = [whole[:cut] for cut in (0, 1, *np.random.default_rng(0).integers(len(whole), size=20), len(whole) - 1)]
    for thing in ({"model": {}, "config": {}, "itos": "ab"}, [1], Malicious()):
        torch.save(thing, path)
        others.append(path.read_bytes())
    for content in [*others, b"To be, or not to be" * 100]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot load .*model.pt"):
            transformer.load_checkpoint(path)


def test_a_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """Until the new file is complete and on the disk, the old one stands in its place."""
    path, sizes, real = tmp_path / "model.pt", [], os.fsync
    save(path)
    before = path.read_bytes()

    def fsync(handle):
        sizes.append(os.fstat(handle).st_size)
        assert path.read_bytes() == before
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(path, n_layer=1)
    assert sizes == [path.stat().st_size] and sizes[0] < len(before)
