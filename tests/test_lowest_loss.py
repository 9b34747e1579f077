"""docs/lowest_loss.py: the tricks one by one, and a tiny run to its end that is resumed exactly."""
import importlib.util
import os
import signal

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
FLAGS = [*TINY_FLAGS, "--max-iters", "20", "--eval-interval", "5", "--dropout", "0.1"]


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
def test_the_share_asked_for_is_misread(p):
    x = torch.randint(1000, (50, 999), generator=torch.Generator().manual_seed(0)) * 2
    seen = lowest_loss.misread(x, np.random.default_rng(0), p)
    assert seen.shape == x.shape and seen.dtype == x.dtype and torch.isin(seen, x).all()
    assert (seen != x).float().mean().item() == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize("text", [some_text().lower(), some_text().upper(), "生存还是毁灭,这是一个问题" * 100, "STRAẞE WEIẞER Straße İstanbul " * 50])
def test_any_text_trains_and_the_targets_are_what_was_shown(text, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    real, batches = transformer.train_step, []
    monkeypatch.setattr(transformer, "train_step", lambda net, optimizer, x, y, *more: (batches.append((x, y)), real(net, optimizer, x, y, *more))[1])
    assert lowest_loss.main(["--data", str(tmp_path / "text.txt"), "--out-dir", str(tmp_path / "run"), *FLAGS]) == 0
    x, y = (torch.cat(parts) for parts in zip(*batches))
    assert 0.02 < (x[:, 1:] != y[:, :-1]).float().mean() < 0.12  # misread alone: a target is the next character as it is


def test_the_mean_of_the_last_weights_is_kept_and_a_run_is_resumed_exactly(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(lowest_loss, "AVERAGED", 0.5)  # steps 10 to 19, with growth at step 13
    run = ["--data", str(text_file), *FLAGS, "--grow-at", "0.65", "--warmup-iters", "2", "--out-dir"]
    real, weights, rates, stop_at = transformer.train_step, [], [], 0

    def train_step(net, optimizer, x, y, lr, config):
        if len(weights) + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        result = real(net, optimizer, x, y, lr, config)
        weights.append(net.lm_head.weight.detach().clone())
        rates.append(lr)
        return result

    monkeypatch.setattr(transformer, "train_step", train_step)
    assert lowest_loss.main([*run, str(tmp_path / "unbroken")]) == 0
    assert len(weights) == 20 and rates[10:] == [1e-4] * 10 and rates[9] == pytest.approx(1e-3 / 8)
    kept, _ = transformer.load_checkpoint(tmp_path / "unbroken" / "latest.pt")
    assert torch.allclose(kept.lm_head.weight, torch.stack(weights[10:]).mean(dim=0), atol=1e-7)
    assert not torch.allclose(kept.lm_head.weight, weights[-1], atol=1e-7)
    for stop_at in (7, 12, 15):
        weights.clear()
        folder = tmp_path / str(stop_at)
        assert lowest_loss.main([*run, str(folder)]) == 143 and len(weights) == stop_at
        assert lowest_loss.main(["--resume", "--out-dir", str(folder)]) == 0
        assert_same_end(folder, tmp_path / "unbroken")
    assert transformer.main([*run, str(tmp_path / "plain")]) == 0  # without a mean of its steps 15 to 19
    assert lowest_loss.main(["--resume", "--max-iters", "30", "--out-dir", str(tmp_path / "plain")]) == 0
    kept, _ = transformer.load_checkpoint(tmp_path / "plain" / "latest.pt")
    assert torch.allclose(kept.lm_head.weight, torch.stack(weights[-10:]).mean(dim=0), atol=1e-3)
    assert kept.lm_head.weight.norm() > 0.95 * weights[-1].norm()
    assert lowest_loss.main(["--prompt", "line", "--out-dir", str(folder)]) is None
    assert transformer.train_step is train_step  # all is put back
