"""Generation: the cache changes nothing but the speed, and sampling follows the distribution it should."""
import pytest
import torch
from conftest import tiny_model

import transformer
from transformer import next_token_probs


def generate(model, idx, n, **how):
    return torch.cat([idx, *model.generate(idx, n, torch.Generator().manual_seed(3), **how)], dim=1)


@torch.no_grad()
def recompute(model, idx, n, **how):
    """What generate is to give, without a cache: the whole window is computed for each token."""
    generator, T = torch.Generator().manual_seed(3), model.config.block_size
    window = idx[:, -T:]
    for _ in range(n):
        if window.size(1) > T:
            window = window[:, -max(1, T // 2):]
        probs = next_token_probs(model(window)[0][:, -1], **how)
        idx_next = torch.multinomial(probs, 1, generator=generator)
        window, idx = torch.cat((window, idx_next), dim=1), torch.cat((idx, idx_next), dim=1)
    return idx


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("prompt", [1, 15, 17, 40])
@pytest.mark.parametrize("how", [{}, {"temperature": 2.0, "top_k": 3}, {"temperature": 0}, {"top_p": 0.7}], ids=str)
def test_the_cache_gives_token_for_token_what_recomputation_gives(batch, block_size, prompt, how):
    """For prompts shorter and longer than the context; the text outgrows the window several times."""
    model = tiny_model(block_size=block_size)
    idx = torch.randint(11, (batch, prompt), generator=torch.Generator().manual_seed(1))
    cached = generate(model, idx, 50, **how)
    assert cached.shape == (batch, prompt + 50)
    assert torch.equal(cached, recompute(model, idx, 50, **how))
    if how != {"temperature": 0}:  # the text is not one character over and over, which would prove little
        assert len(set(cached[:, prompt:].flatten().tolist())) > 1


def test_the_window_rule():
    """Until the context is full each token sees all before it; then the second half stays, and it fills up again."""
    model, seen = tiny_model(block_size=8), []
    forward = model.forward
    model.forward = lambda idx, cache, start: (seen.append((start, idx.size(1))), forward(idx, None, cache, start))[1]
    generate(model, torch.zeros(2, 6, dtype=torch.long), 12)
    assert [start + new for start, new in seen] == [6, 7, 8, 4, 5, 6, 7, 8, 4, 5, 6, 7]
    assert [new for start, new in seen] == [6, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]  # mostly one position is computed


def test_an_edited_block_is_used_in_training_and_in_generation(monkeypatch):
    """Block.forward is edited once, for both: here the norms move behind the sums, as in the first Transformer."""
    def post_norm(self, x, cache=None, start=0):
        x = self.ln1(x + self.sa(x, cache, start))
        return self.ln2(x + self.ffwd(x))

    model, idx = tiny_model(), torch.randint(11, (1, 9), generator=torch.Generator().manual_seed(1))
    before, pre = generate(model, idx, 60), model(idx, idx)[1]
    monkeypatch.setattr(transformer.Block, "forward", post_norm)
    assert not torch.allclose(model(idx, idx)[1], pre)
    after = generate(model, idx, 60)
    assert torch.equal(after, recompute(model, idx, 60)) and not torch.equal(after, before)


LOGITS = torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()  # whose softmax is just that


@pytest.mark.parametrize("how, expected", [
    ({}, [0.5, 0.1, 0.25, 0.15]),
    ({"temperature": 0.5}, [0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345]),  # squares
    ({"temperature": 0}, [1, 0, 0, 0]),
    ({"temperature": 1e-9}, [1, 0, 0, 0]),
    ({"temperature": 1e9}, [0.25, 0.25, 0.25, 0.25]),
    ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 100}, [0.5, 0.1, 0.25, 0.15]),
    ({"top_p": 1.0}, [0.5, 0.1, 0.25, 0.15]),
    ({"top_p": 0.8}, [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9]),  # 0.5 + 0.25 is not enough yet
    ({"top_p": 0.7}, [2 / 3, 0, 1 / 3, 0]),
    ({"top_p": 1e-9}, [1, 0, 0, 0]),  # the most likely always stays
    ({"top_p": 1e-50}, [1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.8}, [2 / 3, 0, 1 / 3, 0]),  # of the three, 0.5 and 0.25 have 0.833
])
def test_exact_probabilities(how, expected):
    torch.testing.assert_close(next_token_probs(LOGITS, **how), torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"temperature": 1.5}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_distribution(how):
    """A chi-square test on 100,000 draws through generate itself, from a model that always gives LOGITS."""
    model = tiny_model(vocab_size=4)
    model.forward = lambda idx, **_: (LOGITS.expand(len(idx), idx.size(1), 4), None)
    n = 100_000
    drawn = generate(model, torch.zeros(n, 1, dtype=torch.long), 1, **how)[:, 1]
    counts, probs = torch.bincount(drawn, minlength=4), next_token_probs(LOGITS, **how)[0]
    assert (counts[probs == 0] == 0).all()
    possible = probs > 0
    chi2 = ((counts - n * probs)[possible]**2 / (n * probs)[possible]).sum()
    assert chi2 < 16.3  # of 3 degrees of freedom: exceeded once in 1,000 times; the seed is fixed
