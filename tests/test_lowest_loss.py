"""docs/lowest_loss.py: the tricks one by one, and a small run to its end, interrupted and resumed exactly."""
import importlib.util

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS, some_text
from test_run import assert_same_end

import transformer

spec = importlib.util.spec_from_file_location("lowest_loss", ROOT / "docs" / "lowest_loss.py")
lowest_loss = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lowest_loss)

TEXT = "ROMEO:\nO Tybalt, the prince, Romeo!\n\nPARIS:\nWhy, ROMEO, the paris of Verona\n\nTIMON:\nAnd Timon? And\n"
NAMES = lowest_loss.find_names(TEXT)
FLAGS = [*TINY_FLAGS, "--max-iters", "20", "--eval-interval", "5", "--dropout", "0.1", "--warmup-iters", "2"]


def run(*args):
    return lowest_loss.main([str(arg) for arg in args]) or 0


def rename(text, p, seed=0):
    return lowest_loss.rename(text, NAMES, set(text + text.upper() + TEXT), np.random.default_rng(seed), p)


def test_made_up_names_keep_their_length_and_are_the_same_throughout_a_window():
    assert NAMES == {3: ["and", "why"], 5: ["romeo", "timon"], 6: ["tybalt", "verona"]}
    assert rename(TEXT, 0.0) == TEXT
    texts = [rename(TEXT, 1.0, seed) for seed in range(20)]
    assert len(set(texts)) > 5 and any("Tybona" in text for text in texts)
    for text in texts:
        assert len(text) == len(TEXT) and text[:5] in ("ROMEO", "TIMON", "ROMON", "TIMEO")
        assert f", {text[:5]}, the paris of " in text and text[:5].capitalize() + "!" in text
        assert "the prince, " in text and "PARIS:" in text
    shares = [rename("ROMEO ", 0.5, seed) != "ROMEO " for seed in range(400)]
    assert 0.28 < np.mean(shares) < 0.47  # three quarters of a half: in a quarter both halves are its own


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_the_fraction_asked_for_is_replaced(p):
    x = torch.randint(1000, (50, 999), generator=torch.Generator().manual_seed(0)) * 2
    seen = lowest_loss.replace_some(x, np.random.default_rng(0), p)
    assert seen.shape == x.shape and seen.dtype == x.dtype and torch.isin(seen, x).all()
    assert (seen != x).float().mean().item() == pytest.approx(p, abs=0.01)


@pytest.fixture
def watched(monkeypatch):
    """What happens at each step: its batch, learning rate and weights; stop_at interrupts the run in that step."""
    class Seen(list):
        stop_at = None

    seen, forward, make_optimizer = Seen(), transformer.GPT.forward, transformer.make_optimizer

    def watched_forward(self, idx, *args, **kwargs):
        if self.training:
            self.batch = idx, *args
        return forward(self, idx, *args, **kwargs)

    def watched_optimizer(model, config):
        def record(optimizer, *_):  # after the optimizer's own work, before the mean is taken
            seen.append((*model.batch, optimizer.param_groups[0]["lr"], model.lm_head.weight.detach().clone()))
            if len(seen) == seen.stop_at:
                raise KeyboardInterrupt
        optimizer = make_optimizer(model, config)
        optimizer.register_step_post_hook(record)
        return optimizer

    monkeypatch.setattr(transformer.GPT, "forward", watched_forward)
    monkeypatch.setattr(transformer, "make_optimizer", watched_optimizer)
    return seen


@pytest.mark.parametrize("text", [some_text().lower(), some_text().upper(), "生存还是毁灭,这是一个问题" * 100,
                                  "STRAẞE WEIẞER Straße İstanbul " * 50], ids=["lower", "upper", "no case", "ß and İ"])
def test_any_text_trains_and_the_targets_are_what_was_shown(text, tmp_path, watched):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert run("--data", tmp_path / "text.txt", "--out-dir", tmp_path / "run", *FLAGS) == 0
    x, y = (torch.cat(parts) for parts in list(zip(*watched))[:2])
    # only characters of the input are replaced: a target is the next character as it was before that
    assert 0.02 < (x[:, 1:] != y[:, :-1]).float().mean() < 0.12


def test_batches_have_made_up_names(text_file, tmp_path, watched, monkeypatch):
    monkeypatch.setattr(lowest_loss.rename, "__defaults__", (1.0,))
    (tmp_path / "text.txt").write_text("Tybalt, Verona; " * 200)
    assert run("--data", tmp_path / "text.txt", "--out-dir", tmp_path / "run", *FLAGS) == 0
    _, checkpoint = transformer.load_checkpoint(tmp_path / "run" / "model.pt")
    shown = "".join(transformer.decode(window, checkpoint["itos"]) for _, y, *_ in watched for window in y)
    assert "Tybona" in shown and "Veralt" in shown


def test_the_mean_of_the_last_weights_is_kept_and_a_run_is_resumed_exactly(tmp_path, text_file, watched, monkeypatch):
    monkeypatch.setattr(lowest_loss, "AVERAGED", 0.5)  # steps 10 to 19
    flags = ["--data", text_file, *FLAGS, "--out-dir"]
    assert run(*flags, tmp_path / "unbroken") == 0
    _, _, rates, weights = zip(*watched)
    assert len(weights) == 20 and rates[10:] == (1e-4,) * 10 and rates[9] == pytest.approx(1e-3 / 8)
    kept, _ = transformer.load_checkpoint(tmp_path / "unbroken" / "latest.pt")
    assert torch.allclose(kept.lm_head.weight, torch.stack(weights[10:]).mean(dim=0), atol=1e-7)
    assert not torch.allclose(kept.lm_head.weight, weights[-1], atol=1e-7)
    for watched.stop_at in (7, 12, 17):
        watched.clear()
        folder = tmp_path / str(watched.stop_at)
        assert run(*flags, folder) == 130 and len(watched) == watched.stop_at
        assert run("--resume", "--out-dir", folder) == 0
        assert_same_end(folder, tmp_path / "unbroken")
    assert run("--prompt", "line", "--out-dir", folder) == 0


def test_a_plain_run_can_go_on_with_the_tricks(tmp_path, text_file, watched, monkeypatch):
    monkeypatch.setattr(lowest_loss, "AVERAGED", 0.5)
    make_optimizer, folder = transformer.make_optimizer, tmp_path / "run"
    assert (transformer.main([*FLAGS, "--data", str(text_file), "--out-dir", str(folder)]) or 0) == 0
    assert run("--resume", "--max-iters", 30, "--out-dir", folder) == 0  # steps 15 to 29, of which 15 to 19 have no mean
    kept, _ = transformer.load_checkpoint(folder / "latest.pt")
    mean = (6 * watched[20][-1] + sum(row[-1] for row in watched[21:])) / 15  # the first one stands for what is missing
    assert torch.allclose(kept.lm_head.weight, mean, atol=1e-6)
    assert transformer.make_optimizer is make_optimizer  # all is put back
