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
        for max_iters in (1, 2, 10):  # even a run shorter than its warm-up peaks, at half of it, and ends at 0
            short = Config(max_iters=max_iters, warmup_iters=warmup_iters, learning_rate=1.0)
            rates = [transformer.get_lr(step, short) for step in range(max_iters + 1)]
            assert all(0 < rate <= 1 for rate in rates[:-1]) and rates[-1] == 0
            assert max(rates) == pytest.approx(1) and rates.index(max(rates)) == min(warmup_iters, max_iters // 2)


def test_which_parameter_is_whose_and_weight_decay_is_for_matrices_only():
    model = tiny_model()
    adamw, muon = transformer.make_optimizers(model, Config(weight_decay=0.3))
    alone, = transformer.make_optimizers(model, Config(weight_decay=0.3, optimizer="adamw"))
    tables, vectors = (group["params"] for group in adamw.param_groups)
    matrices, (in_blocks,) = alone.param_groups[0]["params"], (group["params"] for group in muon.param_groups)
    assert {id(p) for p in tables} == {id(model.lm_head.weight), id(model.position_embedding_table.weight)}
    assert {id(p) for p in in_blocks} == {id(p) for p in model.blocks.parameters() if p.dim() == 2} and len(in_blocks) == 4 * TINY["n_layer"]
    assert {id(p) for p in matrices} == {id(p) for p in [*tables, *in_blocks]} and len(matrices) == len(tables) + len(in_blocks)
    assert {id(p) for p in vectors} == {id(p) for p in alone.param_groups[1]["params"]} == {id(p) for p in model.parameters() if p.dim() == 1}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    alone.step()
    assert {(round(s["exp_avg"].max().item(), 6), round(s["exp_avg_sq"].max().item(), 6)) for s in alone.state.values()} == {(0.1, 0.01)}
    for optimizer, decays in [(adamw, [0.3, 0]), (alone, [0.3, 0]), (muon, [0.3])]:
        assert [group["weight_decay"] for group in optimizer.param_groups] == decays


SHAPES = [(24, 24), (12, 40), (40, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_makes_all_singular_values_about_1_and_keeps_the_directions(shape):
    """To float32's precision, which bfloat16 does not have: against the polynomial of the singular values in float64."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = S / S.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.6 < s.min() and s.max() < 1.3 and S.max() / S.min() > 2
    torch.testing.assert_close(transformer.orthogonalize(G).double(), U @ s.diag() @ Vh, atol=1e-5, rtol=0)
    assert transformer.orthogonalize(torch.zeros(shape)).equal(torch.zeros(shape))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 or later")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_makes_the_steps_of_pytorchs_muon(shape):
    """PyTorch's computes in bfloat16: so does ours when asked to; float32 is close to that."""
    rng = torch.Generator().manual_seed(0)
    start, exact = torch.randn(shape, generator=rng), {}
    for dtype in (torch.bfloat16, torch.float32):
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        muon = transformer.Muon([ours], weight_decay=0.2, dtype=dtype)
        reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for lr in (0.1, 0.05, 0.02):
            muon.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
            ours.grad = theirs.grad = torch.randn(shape, generator=rng)
            muon.step(), reference.step()
        exact[dtype] = (ours - theirs).norm() / (theirs - start).norm()
    assert exact[torch.bfloat16] < 0.04 and exact[torch.float32] < 0.04, exact


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_computes_in_the_precision_of_the_run(dtype, monkeypatch):
    model, seen, orthogonalize = tiny_model(), set(), transformer.orthogonalize
    monkeypatch.setattr(transformer, "orthogonalize", lambda G: (seen.add(G.dtype), orthogonalize(G))[1])
    _, muon = transformer.make_optimizers(model, Config(dtype=dtype))
    muon.param_groups[0]["lr"] = 0.1
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    muon.step()
    assert seen == {getattr(torch, dtype)}


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
        with pytest.raises(UserError, match="cannot load a model from .*model.pt"):
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
