"""What the pages in docs/ and the README say about the scripts is there."""
import re
import sys

import pytest
from conftest import ROOT, TINY_FLAGS

import bigram
import transformer

GUIDE, EXERCISES = ((ROOT / "docs" / name).read_text("utf-8") for name in ("guide.md", "exercises.md"))
PAGES = ["README.md", "docs/guide.md", "docs/exercises.md", "docs/experiments.md", "docs/training.md", "docs/inside.md"]


def is_there(name):
    for thing in (transformer, bigram):
        for part in name.split("."):
            thing = getattr(thing, part, None)
        if thing is not None:
            return True
    return name in transformer.Config.__dataclass_fields__


@pytest.mark.parametrize("page", PAGES)
def test_links_to_other_files_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_every_flag_in_the_readme_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", (ROOT / "README.md").read_text("utf-8")))
    known = {"--" + name.replace("_", "-") for name in transformer.Config.__dataclass_fields__}
    source = "".join((ROOT / name).read_text("utf-8") for name in ("transformer.py", "tests/benchmark.py"))
    assert flags - known - set(re.findall(r'"(--[a-z-]+)"', source)) == {"--help", "--nproc_per_node"}


# The guide: its names, its snippets, and what it tells the reader to try

def test_the_guides_snippets_run_and_its_names_exist():
    names = {}
    head, check = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(head + check, names)
    with pytest.raises(AssertionError):  # and it does compare
        exec(check.replace("third *", "(2 - third) *"), names)
    quoted, = re.findall(r"```py\n(.*?)```", GUIDE, re.DOTALL)
    source = (ROOT / "transformer.py").read_text("utf-8")
    assert [line for line in quoted.splitlines() if line.strip() not in source and line != "..."] == []
    spoken_of = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)`", GUIDE)
    assert [name for name in spoken_of if not (is_there(name) or name in names or name.endswith(".py"))] == []
    assert len(spoken_of) > 20 and not is_there("GPT.no_such_method") and not is_there("no_such_function")


EDITS = re.findall(r"`([^`]+)`\sto\s`([^`]+)`", GUIDE)
EDITS += [(old, "") for old in re.findall(r"delete\s`([^`]+)`", GUIDE)] + [("wei += mask", "")]  # that one: exercise 8


@pytest.mark.parametrize("old, new", EDITS)
def test_what_is_to_be_changed_on_the_page_trains_and_writes(old, new, tmp_path, text_file, monkeypatch):
    page = (ROOT / "transformer.py").read_text("utf-8")
    assert len(EDITS) == 12 and page.count(old) == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no picture, which would take longest
    names = {"__name__": "edited", "__file__": str(ROOT / "transformer.py")}
    exec(page.replace(old, new), names)
    flags = ["--data", str(text_file), "--out-dir", str(tmp_path / "out"), *TINY_FLAGS, "--max-iters", "2"]
    assert names["main"](flags) == 0 and len((tmp_path / "out/sample.txt").read_text("utf-8")) == 200


def test_every_flag_in_the_guide_and_the_exercises_exists():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", GUIDE + EXERCISES))
    assert len(flags) > 15 and all(is_there(flag.replace("-", "_")) for flag in flags)


# The exercises' checks, each with a solution that must pass and one that must not

SOLUTIONS = {
    "The loss before training": ("""
import math
def untrained_loss(vocab_size):
    return -math.log(1 / vocab_size)
""", "log(", "log2("),
    "Count the parameters": ("""
def parameters(V, L, C, T):
    return V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
""", "V * C + T * C", "V * C"),
    "Average the past in three ways": ("""
import torch
def average_loop(x):
    out = torch.empty_like(x)
    for t in range(x.size(1)):
        out[:, t] = x[:, :t + 1].mean(dim=1)
    return out
def average_matrix(x):
    wei = torch.tril(torch.ones(x.size(1), x.size(1)))
    return (wei / wei.sum(dim=1, keepdim=True)) @ x
def average_softmax(x):
    return torch.full((x.size(1), x.size(1)), float("-inf")).triu(1).softmax(dim=1) @ x
""", "triu(1)", "triu(2)"),
    "The likeliest next characters": ("""
import torch, transformer
def likeliest(model, itos, text, k):
    logits, _ = model(torch.tensor(transformer.encode(text, itos)).long()[None])
    probs, ids = logits[0, -1].softmax(dim=-1).topk(k)
    return [(itos[i], p) for i, p in zip(ids.tolist(), probs.tolist())]
""", "logits[0, -1]", "logits[0, 0]"),
    "Attention without matrix products": ("""
import math, torch
def loop_attention(q, k, v):
    out = torch.zeros_like(q)
    for i in range(len(q)):
        weights = [math.exp(sum(a * b for a, b in zip(q[i], k[j])) / len(q[i])**0.5) for j in range(i + 1)]
        out[i] = sum(weight / sum(weights) * v[j] for j, weight in enumerate(weights))
    return out
""", "**0.5", "**0.4"),
    "Why the scores are scaled": ("""
import torch
def score_std(d, scaled):
    torch.manual_seed(0)
    scores = torch.randn(300, d) @ torch.randn(300, d).T
    return (scores / d**0.5 if scaled else scores).std().item()
""", "d**0.5", "d"),
    "Temperature, seen from the other side": ("""
from transformer import next_token_probs
def temperature_for(logits, p):
    low, high = 1e-3, 100
    for _ in range(60):
        middle = (low * high)**0.5
        low, high = (middle, high) if next_token_probs(logits, middle).max() > p else (low, middle)
    return middle
""", "range(60)", "range(6)"),
    "Look into the future": ("""
import torch
def leaks(model):
    idx, changed = torch.zeros(2, 1, 8, dtype=torch.long)
    changed[0, -1] = 1
    return not torch.allclose(model(idx)[0][:, :-1], model(changed)[0][:, :-1])
""", "return not", "return"),
    "A batch that does not fit": ("""
import torch
def accumulated_gradients(model, x, y, parts):
    model.zero_grad()
    for some_x, some_y in zip(x.chunk(parts), y.chunk(parts)):
        loss = model(some_x, some_y)[1] / parts
        loss.backward()  # adds to the gradients that are there
    return [p.grad for p in model.parameters()]
""", " / parts", ""),
    "Another schedule": ("""
import math
def cosine_lr(step, config):
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    done = (step - config.warmup_iters) / (config.max_iters - config.warmup_iters)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
""", "(1 + math.cos(math.pi * done)) / 2", "(1 - done)"),
    "Rotary positions": ("""
import torch
def rotate(x, start):
    T, d = x.shape[-2:]
    angles = torch.arange(start, start + T)[:, None] * 10_000 ** -(torch.arange(d // 2) * 2 / d)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)
""", "a * angles.sin() + b * angles.cos()", "a * angles.cos() + b * angles.sin()"),
    "Your weights in Hugging Face's GPT-2": ("""
import transformers
def to_hugging_face(model):
    c, vocab_size = model.config, model.lm_head.out_features
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head))
    names = {"token_embedding_table": "wte", "position_embedding_table": "wpe", "blocks": "h", "ln1": "ln_1",
             "ln2": "ln_2", "sa.qkv": "attn.c_attn", "sa.proj": "attn.c_proj",
             "ffwd.net.0": "mlp.c_fc", "ffwd.net.2": "mlp.c_proj"}
    for name, p in model.named_parameters():
        for ours, new in names.items():
            name = name.replace(ours, new)
        theirs.transformer.get_parameter(name).data = p.data.t() if ".c_" in name else p.data
    return theirs
""", '"ln1": "ln_1"', '"ln1": "ln_2"'),
    "Find the head that looks one character back": ("""
import torch, transformer
def previous_weights(model, idx):
    attention, means = transformer.attention, []
    def watched(q, k, v, mask, *dropout):
        weights = attention(q, k, torch.eye(k.size(2)).expand(*k.shape[:3], -1), mask)
        means.append(weights.diagonal(-1, 2, 3).mean(dim=(0, 2)))
        return attention(q, k, v, mask, *dropout)
    transformer.attention = watched
    with torch.no_grad():
        model(idx)
    transformer.attention = attention
    return torch.stack(means)
""", "diagonal(-1", "diagonal(-2"),
}


@pytest.mark.parametrize("title", SOLUTIONS)
def test_the_checks_of_the_exercises_tell_right_from_wrong(title):
    assert re.findall(r"## \d+\. (.*)", EXERCISES) == list(SOLUTIONS)
    exercise, = re.findall(r"## \d+\. " + title + r"\n((?:(?!\n## ).)*)", EXERCISES, re.DOTALL)
    check, = re.findall(r"```python\n(.*?)```", exercise, re.DOTALL)
    solution, right, wrong = SOLUTIONS[title]
    assert right in solution and all(part in exercise for part in (" minutes", "test_docs.py", "<summary>Hint"))
    if "import transformers" in solution:
        pytest.importorskip("transformers")
    exec(solution + check, {})
    with pytest.raises(AssertionError):
        exec(solution.replace(right, wrong) + check, {})
