"""Generation: the cache changes nothing but the speed, and sampling follows the distribution it should."""
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings, strategies as st

from transformer import next_token_probs


def generate(model, idx, n, **how):
    return model.generate(idx, n, generator=torch.Generator().manual_seed(3), **how)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"temperature": 0},
                                 {"top_p": 0.7}], ids=str)
def test_the_cache_gives_token_for_token_what_recomputation_gives(batch, block_size, prompt, how):
    """For prompts shorter than, as long as and longer than the context; the text outgrows the window several times."""
    model = tiny_model(block_size=block_size)
    idx = torch.randint(11, (batch, prompt), generator=torch.Generator().manual_seed(1))
    cached, plain = generate(model, idx, 50, **how), generate(model, idx, 50, kv_cache=False, **how)
    assert cached.shape == (batch, prompt + 50)
    assert torch.equal(cached[:, :prompt], idx)
    assert torch.equal(cached, plain)
    if how != {"temperature": 0}:  # the text is not one character over and over, which would prove little
        assert len(set(cached[:, prompt:].flatten().tolist())) > 1


def test_the_cache_gives_the_same_logits():
    """The numbers themselves, not only the tokens drawn from them: piece by piece equals all at once."""
    model = tiny_model()
    idx = torch.randint(11, (2, 16))
    cache, logits = model.new_cache(2), []
    with torch.no_grad():
        for start, end in [(0, 5), (5, 6), (6, 7), (7, 15), (15, 16)]:
            logits.append(model(idx[:, start:end], cache=cache, start=start)[0])
        torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_embd, n_head", [(8, 2), (15, 3)])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_spelled_out_it_computes_what_forward_computes(n_embd, n_head, threads):
    """For any number of threads, be it a divisor of the matrices' rows or not."""
    model, before = tiny_model(n_embd=n_embd, n_head=n_head), torch.get_num_threads()
    idx = torch.randint(11, (1, 16))
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            next_logits = model.spelled_out(model.new_cache(1))
            logits = [next_logits(idx[0, i], i) for i in range(16)]
            torch.testing.assert_close(torch.stack(logits), model(idx)[0][0], rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_the_window_rule():
    """Until the context is full each token sees all before it; then the later half stays, and it fills up again."""
    model, seen = tiny_model(block_size=8), []
    forward, spelled_out = model.forward, model.spelled_out
    model.forward = lambda idx, **how: (seen.append(idx.size(1)), forward(idx, **how))[1]

    def counting(cache):
        next_logits = spelled_out(cache)
        return lambda *what: (seen.append("one"), next_logits(*what))[1]
    model.spelled_out = counting
    generate(model, torch.zeros(1, 6, dtype=torch.long), 12, kv_cache=False)
    assert seen == [6, 7, 8, 4, 5, 6, 7, 8, 4, 5, 6, 7]
    seen.clear()
    generate(model, torch.zeros(2, 6, dtype=torch.long), 12)
    assert seen == [6, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]  # what the cached way computes: mostly one position
    seen.clear()
    generate(model, torch.zeros(1, 6, dtype=torch.long), 12)
    assert seen == [6, "one", "one", 4, "one", "one", "one", "one", 4, "one", "one", "one"]


def test_stream_yields_what_generate_appends():
    model, idx = tiny_model(), torch.zeros(2, 3, dtype=torch.long)
    streamed = list(model.stream(idx, 20, generator=torch.Generator().manual_seed(3)))
    assert all(token.shape == (2, 1) for token in streamed)
    assert torch.equal(torch.cat([idx, *streamed], dim=1), generate(model, idx, 20))


def test_top_k_1_and_temperature_0_are_greedy():
    model, idx = tiny_model(), torch.zeros(1, 3, dtype=torch.long)
    expected = idx
    for _ in range(10):
        expected = torch.cat([expected, model(expected)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generate(model, idx, 10, top_k=1), expected)
    assert torch.equal(generate(model, idx, 10, temperature=0), expected)


LOGITS = torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()  # whose softmax is just that


@pytest.mark.parametrize("how, expected", [
    ({}, [0.5, 0.1, 0.25, 0.15]),
    ({"temperature": 0.5}, [0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345]),  # squares
    ({"temperature": 0}, [1, 0, 0, 0]),
    ({"temperature": 1e-5}, [1, 0, 0, 0]),
    ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 100}, [0.5, 0.1, 0.25, 0.15]),
    ({"top_p": 1.0}, [0.5, 0.1, 0.25, 0.15]),
    ({"top_p": 0.8}, [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9]),  # 0.5 + 0.25 is not enough yet
    ({"top_p": 0.7}, [2 / 3, 0, 1 / 3, 0]),
    ({"top_p": 1e-9}, [1, 0, 0, 0]),  # the likeliest always stays
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


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20), st.floats(0, 100), st.integers(1, 30), st.floats(1e-9, 1))
def test_always_a_distribution(logits, temperature, top_k, top_p):
    logits = torch.tensor([logits])
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert (probs >= 0).all() and probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probs > 0).sum() <= top_k
    assert logits[0, probs.argmax()] >= logits.max() - 1e-4  # of several likeliest, up to rounding, any may stay


def test_rows_of_a_batch_are_independent():
    both = torch.cat([LOGITS, LOGITS.flip(1)])
    probs = next_token_probs(both, 0.9, 3, 0.8)
    torch.testing.assert_close(probs[0], probs[1].flip(0))
