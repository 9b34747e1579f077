"""The README and the pages in docs/ describe what is in the scripts."""
import io
import re
import sys
import tokenize
from functools import reduce
from types import SimpleNamespace

import benchmark
import pytest
from conftest import ROOT, TINY_FLAGS, status

import bigram
import transformer

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README, GUIDE, EXERCISES = (PAGES[name] for name in ("README.md", "docs/guide.md", "docs/exercises.md"))
PAGES_TEXT = README + GUIDE + EXERCISES
SOURCE = "".join((ROOT / name).read_text("utf-8") for name in ("transformer.py", "bigram.py"))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"""(?:\]\(|src=")(?!https?:)([^)#"]+)""", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_pages_keep_their_size():
    assert len(README.splitlines()) <= 150 and [line for line in README.splitlines() if len(line) > 120] == []
    assert [name for name, page in PAGES.items() if "{{" in page] == []  # a figure that is still to come
    steps = re.findall(r"\n## \d+\. (.*?)\nTry", GUIDE, re.DOTALL)
    prose = [re.sub(r"```.*?```", "", step, flags=re.DOTALL).splitlines()[1:] for step in steps]
    assert len(steps) == 12 and [lines for lines in prose if len(list(filter(None, lines))) > 10] == []


def test_every_name_on_the_pages_exists():
    code = [SOURCE, *re.findall(r"```python\n(.*?)```", PAGES_TEXT, re.DOTALL), *(solution for solution, *_ in SOLUTIONS.values())]
    tokens = tokenize.generate_tokens(io.StringIO("".join(code)).readline)
    known = {token.string for token in tokens if token.type == tokenize.NAME}

    def is_there(name):
        for script in (transformer, bigram):
            if hasattr(script, name.split(".")[0]):
                return reduce(lambda thing, part: getattr(thing, part, None), name.split("."), script) is not None
        return set(name.split(".")) <= known or f'"{name}"' in SOURCE or (ROOT / name).exists()
    names = set(re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", PAGES_TEXT)) - {"SOLUTIONS", "torchrun"}
    assert len(names) > 60 and [name for name in names if not is_there(name)] == []
    assert not any(map(is_there, ("GPT.no_such_method", "no_such_function", "no_such_file.pt")))


def test_every_flag_on_the_pages_exists(capsys):
    assert status(transformer, "--help") == status(bigram, "--help") == 0
    scripts = "".join(path.read_text("utf-8") for folder in ("docs", "tests") for path in ROOT.glob(f"{folder}/*.py"))
    known = re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out) + re.findall(r'add_argument\("(--[a-z-]+)"', scripts)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGES_TEXT))
    assert len(flags) > 20 and flags - set(known) <= {"--nproc_per_node"}  # torchrun's


# The guide: its snippets, and what it tells the reader to try

def test_the_guides_snippets_run_and_its_quotations_are_on_the_page():
    names = {}
    head, check = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(head + check, names)
    with pytest.raises(AssertionError):  # and it does compare
        exec(check.replace("third *", "(2 - third) *"), names)
    quoted, = re.findall(r"```py\n(.*?)```", GUIDE, re.DOTALL)
    assert set(quoted.splitlines()) - {line.strip() for line in SOURCE.splitlines()} == {"..."}


TRIES = {}  # text: ([(old, new), ...], [flag, ...])
for text in [*re.findall(r"^- (.*?)(?=\n\n|\n- )", GUIDE, re.DOTALL | re.MULTILINE), "Exercise 8: delete `wei += mask`"]:
    edits = re.findall(r"change\s+`([^`]+)`\s+to\s+`([^`]+)`", text)
    edits += [(old, "") for old in re.findall(r"delete\s+`([^`]+)`", text)]
    flags = " ".join(re.findall(r"`(--[^`]+)`", text)).split()
    if edits or flags:
        TRIES[text] = edits, flags


@pytest.mark.parametrize("text", TRIES, ids=lambda text: text[:50])
def test_what_is_to_be_tried_trains_and_generates(text, tmp_path, text_file, capsys):
    assert len(TRIES) == 15 and sum(len(edits) for edits, _ in TRIES.values()) == 15
    edits, flags = TRIES[text]
    file = ROOT / ("bigram.py" if "`bigram.py`" in text else "transformer.py")
    page, script = file.read_text("utf-8"), SimpleNamespace(__name__="edited", __file__=str(file))
    for old, new in edits:
        assert old in page
        page = page.replace(old, new)
    exec(page, vars(script))
    if file.name == "bigram.py":
        assert status(script, "--data", text_file) == 0
        return
    where = ["--out-dir", tmp_path / "out", "--device", "cpu"]
    assert status(script, "--data", text_file, *TINY_FLAGS, *flags, "--max-iters", 2, *where) == 0
    capsys.readouterr()
    assert status(script, "--prompt", "line", "--max-new-tokens", 40, *where) == 0
    assert len(capsys.readouterr().out) == len("line") + 40 + len("\n")


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
    "The most likely next characters": ("""
import torch, transformer
def most_likely(model, itos, text, k):
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


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiny", "--device", "cpu"])
    benchmark.main()
    printed = capsys.readouterr().out
    for label in ("training, batches of 4", "generation, 1 at once", "generation, 64 at once", "loading 3 MB", "to the tenth step"):
        assert label in printed
