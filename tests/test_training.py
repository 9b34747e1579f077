"""The parts of training: schedule, optimiser, evaluation, checkpoints; and that a model does learn."""
import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_model
from torch.nn import functional as F

import transformer
from transformer import Config, UserError


def test_the_learning_rate():
    config = Config(max_iters=1000, warmup_iters=100, learning_rate=1e-3)
    rates = [transformer.get_lr(step, config) for step in (0, 50, 100, 550, 999, 1000, 1200)]
    assert rates == pytest.approx([1e-3 / 101, 51e-3 / 101, 1e-3, 0.5e-3, 1e-3 / 900, 0, 0])  # the first is not zero
    for warmup_iters in (0, 1, 9, 10, 11, 100):
        short = Config(max_iters=10, warmup_iters=warmup_iters, learning_rate=1.0)
        assert all(0 < transformer.get_lr(step, short) <= 1 for step in range(10))


def test_weight_decay_is_for_matrices_only():
    model = tiny_model()
    decayed, rest = transformer.make_optimizer(model, Config(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in rest["params"])
    together = {id(p) for p in decayed["params"] + rest["params"]}
    assert together == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) == 2 + 4 * TINY["n_layer"]  # two tables; four matrices in a block


def take_steps(model, optimizer, x, y, n, lr=1e-2):
    return [transformer.train_step(model, optimizer, x, y, lr, model.config)[0] for _ in range(n)]


def test_a_tiny_model_learns_one_batch_by_heart():
    torch.manual_seed(0)
    model = transformer.GPT(Config(**{**TINY, "n_embd": 32}, weight_decay=0.0), 11)
    idx = torch.randint(11, (4, 17))
    x, y = idx[:, :-1], idx[:, 1:]
    assert take_steps(model, transformer.make_optimizer(model, model.config), x, y, 150)[-1] < 0.5 < math.log(11)
    assert (model.eval()(x)[0].argmax(-1) == y)[:, 3:].float().mean() > 0.95  # what comes first cannot be known


def test_a_step_clips_the_gradient_and_takes_the_rate_given(monkeypatch):
    """An SGD step is the gradient times the rate: its length shows whether it was clipped."""
    x = y = torch.arange(11)[None]
    for clip, expected in [(1e9, None), (0.01, 0.01)]:
        model = tiny_model(grad_clip=clip, dropout=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        _, grad_norm = transformer.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), x, y, 0.5, model.config)
        moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before)]).norm().item()
        assert grad_norm > 0.1 and moved == pytest.approx(0.5 * (expected or grad_norm), rel=1e-3)


def test_a_gradient_that_is_no_number_leaves_the_weights_as_they_are():
    model = tiny_model()
    optimizer = transformer.make_optimizer(model, model.config)
    before = [p.detach().clone() for p in model.parameters()]
    model.forward = lambda x, y: (None, model.lm_head.weight.sum() * float("inf"))
    with pytest.raises(UserError, match="not a finite number"):
        transformer.train_step(model, optimizer, torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 0.1, model.config)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("n_layer, depth", [(5, 2), (6, 2), (2, 1), (3, 3)])
def test_a_model_grows_into_copies_of_its_blocks(n_layer, depth):
    """With the optimizer's memory; and what was not in use was not touched before."""
    torch.manual_seed(0)
    model = transformer.GPT(Config(**{**TINY, "n_layer": n_layer}), 11)
    optimizer, (x, y) = transformer.make_optimizer(model, model.config), torch.randint(11, (2, 4, 16))
    unused, model.depth = copy.deepcopy(model.blocks[depth:].state_dict()), depth
    take_steps(model, optimizer, x, y, 3)
    assert all(torch.equal(value, unused[name]) for name, value in model.blocks[depth:].state_dict().items())
    old, memory = copy.deepcopy((model, optimizer))
    transformer.grow(model, optimizer)
    assert model.depth == n_layer
    for i, block in enumerate(model.blocks):
        for p, q in zip(block.parameters(), old.blocks[i * depth // n_layer].parameters(), strict=True):
            assert torch.equal(p, q)
            assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(value, memory.state[q][key]) for key, value in optimizer.state[p].items())
    pointers = {value.data_ptr() for state in optimizer.state.values() for value in state.values()}
    assert len(pointers) == 3 * len(list(model.parameters()))  # no two weights share a memory
    losses = take_steps(model, optimizer, x, y, 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("length", [17, 33, 640, 1000])
def test_the_evaluation_covers_everything_once_or_a_part_evenly(length):
    """The mean loss over every character but the first, each predicted from its own window alone, in whole windows."""
    model, data = tiny_model(dropout=0.5), np.random.default_rng(0).integers(11, size=length).astype(np.int32)
    losses = []
    for i in range(0, length - 16, 16):
        window = torch.from_numpy(data[i:i + 17]).long()[None]
        with torch.no_grad():
            losses += F.cross_entropy(model(window[:, :-1])[0][0], window[0, 1:], reduction="none").tolist()
    assert len(losses) > length - 1 - 16
    estimate = transformer.estimate_loss(model.train(), data, length)  # dropout is off, all the same
    assert estimate == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert transformer.estimate_loss(model.train(), data, length) == estimate
    seen = []
    model.forward = lambda x, y: (seen.append(x[:, 0]), (None, torch.tensor(0.0)))[1]
    transformer.estimate_loss(model, np.repeat([0, 1, 2, 3], 4000).astype(np.int32), 1600)
    assert torch.bincount(torch.cat(seen)).tolist() == [25, 25, 25, 25]


@pytest.mark.parametrize("minutes", [1, 20])
def test_the_steps_that_fit_take_the_minutes(minutes, monkeypatch):
    """By a clock on which a step takes 0.1 seconds for each block, with a train_step that only moves its hands."""
    clock = [0.0]

    def train_step(model, *_):
        clock[0] += 0.1 * model.depth * (1 + clock[0] % 0.3)  # other work slows some of the steps down
        return 0.0, 0.0

    monkeypatch.setattr(transformer.timeit, "repeat", lambda step, number, repeat: [
        -clock[0] + (step(), clock[0])[1] for _ in range(repeat)])
    monkeypatch.setattr(transformer, "train_step", train_step)
    config = Config(**{**TINY, "n_layer": 6}, minutes=minutes)
    model = transformer.GPT(config, 11)
    model.depth = 2
    before = [p.clone() for p in model.parameters()]
    steps = transformer.steps_that_fit(config, model)
    assert 0.7 < steps * (0.85 * 0.2 + 0.15 * 0.6) / (60 * minutes) < 1
    assert model.depth == 2 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def save(path, **changes):
    model = tiny_model(**changes)
    transformer.save_checkpoint(path, model, "abcdefghijk", more=1)
    return model


def test_a_checkpoint_gives_the_model_back(tmp_path):
    path = tmp_path / "model.pt"
    model = tiny_model(n_layer=3, dropout=0.25)
    model.depth = 1
    transformer.save_checkpoint(str(path), model, "abcdefghijk", more=1)
    loaded, checkpoint = transformer.load_checkpoint(str(path))
    assert loaded.config == model.config and loaded.depth == 1
    assert checkpoint["itos"] == "abcdefghijk" and checkpoint["more"] == 1
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(ours, theirs), name
    assert loaded.lm_head.weight is loaded.token_embedding_table.weight
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    del checkpoint["depth"], checkpoint["config"]["prompt"]  # an older page had other settings, and all blocks in use
    checkpoint["config"]["noise"] = 0.1
    torch.save(checkpoint, path)
    loaded, _ = transformer.load_checkpoint(path)
    assert loaded.config == model.config and loaded.depth == 3


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code from the file was run",))


def test_no_checkpoint_that_is_another_thing_or_damaged_is_taken_for_whole(tmp_path):
    """Cut or flipped anywhere, it is refused; or the flip was in padding, and every number is what it was."""
    path = tmp_path / "model.pt"
    model, whole, rng = save(path), path.read_bytes(), np.random.default_rng(0)
    others = [b"To be, or not to be" * 100, pickle.dumps(Malicious())]
    for thing in ({"model": {}, "config": {}, "itos": "ab"}, Malicious()):
        torch.save(thing, path)
        others.append(path.read_bytes())
    for content in others + [whole[:cut] for cut in (0, *rng.integers(len(whole), size=40))]:
        path.write_bytes(content)
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


def test_a_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """Until the new file is complete and on the disk, the old one stands in its place."""
    path, steps = tmp_path / "model.pt", []
    save(path)
    before, fsync = path.read_bytes(), os.fsync

    def failing(handle):
        steps.append(os.fstat(handle).st_size)
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left on device"):
        save(path)
    assert steps[0] == pytest.approx(len(before), rel=0.01)  # it was complete when it was to be made safe
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append(path.read_bytes() == before), fsync(handle)))
    save(path, n_layer=1)
    assert steps[1:] == [True] and len(path.read_bytes()) < len(before)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):  # or what else keeps the system from reading it
        transformer.load_checkpoint(tmp_path)


@pytest.mark.parametrize("bf16, fp32, picked", [(1.0, 2.0, "bf16"), (1.0, 1.2, "fp32"), (2.0, 1.0, "fp32")])
def test_the_precision_is_bf16_where_it_is_clearly_faster(bf16, fp32, picked, monkeypatch):
    seconds, multiplied = {torch.bfloat16: bf16, torch.float32: fp32}, []

    def repeat(product, **_):
        product()
        return [seconds[multiplied[-1]]]

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (multiplied.append(a.dtype), torch.matmul(a, b))[1])
    monkeypatch.setattr(transformer.timeit, "repeat", repeat)
    assert transformer.pick_precision("cpu") == picked
