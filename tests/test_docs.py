"""What the pages in docs/ and the README say about the scripts is there."""
import re

import pytest
import torch
from conftest import ROOT, TINY_FLAGS

import bigram
import transformer

PAGES = ["README.md", "docs/guide.md", "docs/exercises.md", "docs/experiments.md", "docs/training.md"]


def is_there(name):
    for thing in (transformer, bigram):
        for part in name.split("."):
            thing = getattr(thing, part, None)
        if thing is not None:
            return True
    return name in transformer.Config.__dataclass_fields__


def test_the_guide_names_functions_and_classes_that_exist():
    names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)`", (ROOT / "docs/guide.md").read_text("utf-8"))
    names = [name for name in names if not name.endswith(".py")]
    assert len(names) > 20
    assert [name for name in names if not is_there(name)] == []
    assert not is_there("GPT.no_such_method") and not is_there("no_such_function")


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


# The exercises' checks, each with a solution that must pass and one that must not

SOLUTIONS = {
    "Count the parameters": ("""
def parameters(V, L, C, T):
    return V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
""", "V * C + T * C", "V * C"),
    "Average the past in three ways": ("""
import torch
def average_loop(x):
    out = torch.empty_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            out[b, t] = x[b, :t + 1].mean(dim=0)
    return out
def average_matrix(x):
    wei = torch.tril(torch.ones(x.size(1), x.size(1)))
    return (wei / wei.sum(dim=1, keepdim=True)) @ x
def average_softmax(x):
    wei = torch.zeros(x.size(1), x.size(1)).masked_fill(torch.ones(x.size(1), x.size(1)).triu(1) == 1, float("-inf"))
    return wei.softmax(dim=1) @ x
""", "triu(1)", "triu(2)"),
    "Attention without matrix products": ("""
import math, torch
def loop_attention(q, k, v):
    out = torch.zeros_like(q)
    for i in range(len(q)):
        weights = [math.exp(sum(a * b for a, b in zip(q[i], k[j])) / len(q[i])**0.5) for j in range(i + 1)]
        for j in range(i + 1):
            out[i] += weights[j] / sum(weights) * v[j]
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
    idx = torch.zeros(1, 8, dtype=torch.long)
    changed = idx.clone()
    changed[0, -1] = 1
    return not torch.allclose(model(idx)[0][:, :-1], model(changed)[0][:, :-1])
""", "return not", "return"),
    "A batch that does not fit": ("""
import torch
def accumulated_gradients(model, x, y, parts):
    total = [torch.zeros_like(p) for p in model.parameters()]
    for some_x, some_y in zip(x.chunk(parts), y.chunk(parts)):
        loss = model(some_x, some_y)[1] / parts
        for sum_, part in zip(total, torch.autograd.grad(loss, list(model.parameters()))):
            sum_ += part
    return total
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
}


@pytest.mark.parametrize("title", SOLUTIONS)
def test_the_checks_of_the_exercises_tell_right_from_wrong(title):
    text = (ROOT / "docs/exercises.md").read_text("utf-8")
    check, = re.findall(r"## \d+\. " + title + r"\n(?:(?!\n##).)*?```python\n(.*?)```", text, re.DOTALL)
    solution, right, wrong = SOLUTIONS[title]
    assert right in solution
    exec(solution + check, {})
    with pytest.raises(AssertionError):
        exec(solution.replace(right, wrong) + check, {})


# The snippets of docs/training.md, each at a size for a test

def snippet(heading):
    text = (ROOT / "docs/training.md").read_text("utf-8")
    code, = re.findall(r"## " + heading + r"\n(?:(?!\n## )[\s\S])*?```python\n(.*?)```", text, re.DOTALL)
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["head", "head_ffwd", "head_ffwd_residual"])
def test_the_variants_train_and_write(name, folder, text_file, monkeypatch):
    monkeypatch.setattr(transformer.Block, "forward", transformer.Block.forward)  # to have them back afterwards
    monkeypatch.setattr(transformer.GPT, "spelled_out", transformer.GPT.spelled_out)
    monkeypatch.setattr("sys.argv", ["variant.py", name, "--data", str(text_file), *TINY_FLAGS, "--max-iters", "3"])
    with pytest.raises(SystemExit) as exit:
        exec(snippet("From bigram to GPT in numbers"), {})
    assert exit.value.code == 0
    model, checkpoint = transformer.load_checkpoint(folder / "out" / name / "model.pt")
    x = torch.randn(1, 3, 16)
    block = model.blocks[0]
    parts = {"head": block.sa(x), "head_ffwd": block.ffwd(block.sa(x)),
             "head_ffwd_residual": x + block.sa(x) + block.ffwd(x + block.sa(x))}
    torch.testing.assert_close(block(x), parts[name])


def test_the_gradients_are_drawn(folder, text_file, capsys):
    code = snippet("Gradient flow").replace("n_embd=192, max_iters=1001", "n_embd=24, max_iters=3, block_size=16, "
                                            f"data={str(text_file)!r}").replace("(0, 100, 1000)", "(0, 1, 2)")
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" loss")[0] for line in lines] == [f"{kind} {step}" for kind in ("as it is", "naive") for step in range(3)]
    assert lines[0].split(": ")[1] != lines[3].split(": ")[1] and (folder / "gradients.png").exists()


def test_the_scaling_is_drawn(folder, capsys):
    for n_embd in (8, 16, 24, 32, 64):  # the losses follow a power law up to the last, which does not
        model = transformer.GPT(transformer.Config(n_layer=1, n_head=1, n_embd=n_embd, block_size=8), 5)
        size = sum(p.numel() for p in model.parameters())
        val_loss = 5 * size**-0.125 if n_embd < 64 else 3
        (folder / f"out/size{n_embd}").mkdir(parents=True)
        transformer.save_checkpoint(folder / f"out/size{n_embd}/model.pt", model, "abcde")
        (folder / f"out/size{n_embd}/log.csv").write_text(f"step,tokens,seconds,...\n1,2,3,{val_loss - 0.1},{val_loss},0,0\n")
    exec(snippet("Scaling"), {})
    assert "5.00 x parameters^-0.125" in capsys.readouterr().out and (folder / "scaling.png").exists()
