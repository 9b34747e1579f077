"""Every snippet of docs/training.md and docs/inside.md runs, at a size for a test, and shows what it says it shows."""
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS
from matplotlib.figure import Figure

import transformer

PAGES = {name: (ROOT / "docs" / name).read_text("utf-8") for name in ("training.md", "inside.md")}
TRIED = ["Watch it come alive", "The curves", "From bigram to GPT in numbers", "Gradient flow",
         "Shapes", "What does attention look at?", "What has it learned about letters?"]


def snippet(heading):
    section, = [part for page in PAGES.values() for part in page.split("\n## ") if part.startswith(heading + "\n")]
    code, = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in; what a snippet wraps is afterwards as it was."""
    monkeypatch.chdir(tmp_path)
    for thing, name in ((transformer, "attention"), (transformer, "train_step"), (transformer.Block, "forward")):
        monkeypatch.setattr(thing, name, getattr(thing, name))
    return tmp_path


@pytest.fixture
def trained(folder):
    """A small model of six blocks with six heads, where a run leaves it: its model and its vocabulary."""
    itos = "".join(sorted(set((ROOT / "input.txt").read_text("utf-8"))))
    torch.manual_seed(0)
    model = transformer.GPT(transformer.Config(n_embd=48, block_size=64), len(itos)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save(model, itos)
    return model, itos


def save(model, itos):
    path = "out/transformer/latest.pt"
    transformer.Path(path).parent.mkdir(parents=True, exist_ok=True)
    transformer.save_checkpoint(path, model, itos)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    figures, savefig = {}, Figure.savefig

    def watched(self, path, **more):
        figures[path] = self
        savefig(self, path, **more)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def test_no_snippet_is_left_out():
    assert sum(page.count("```python\n") for page in PAGES.values()) == len(TRIED)
    assert all(snippet(heading) for heading in TRIED)


def test_links_and_pictures_of_the_inside_are_there():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES["inside.md"])
    assert targets and [target for target in targets if not (ROOT / "docs" / target).exists()] == []


# docs/training.md

def test_it_writes_on_the_way_and_that_changes_nothing(folder, text_file, monkeypatch, capsys):
    def steps_that_fit(config, model):  # a step that is only timed is not counted
        x = torch.zeros(4, 16, dtype=torch.long)
        transformer.train_step(model, transformer.make_optimizer(model, config), x, x, 0.0, config)
        return 5

    monkeypatch.setattr(transformer, "steps_that_fit", steps_that_fit)
    flags = ["--data", str(text_file), *TINY_FLAGS, "--grow-at", "0", "--out-dir"]
    assert transformer.main([*flags, "plain"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["alive.py", *flags, "watched"])
    with pytest.raises(SystemExit) as exit:
        exec(snippet("Watch it come alive").replace("(0, 100, 300, 1000, 3000)", "(0, 2, 4)"), {})
    assert exit.value.code == 0

    shown = re.findall(r"after (\d+) steps, validation loss (\d\.\d\d):\n(.{200})\n\n", capsys.readouterr().out, re.DOTALL)
    logs = [np.genfromtxt(f"{name}/log.csv", delimiter=",", names=True) for name in ("plain", "watched")]
    assert [(int(step), float(loss)) for step, loss, text in shown] == [
        (step, round(float(logs[0]["val_loss"][step]), 2)) for step in (0, 2, 4)]
    assert logs[0]["val_loss"].tolist() == logs[1]["val_loss"].tolist()
    weights = [transformer.load_checkpoint(f"{name}/latest.pt")[0].lm_head.weight for name in ("plain", "watched")]
    assert torch.equal(*weights)


def test_the_curves_are_drawn(folder, drawn):
    (folder / "out/transformer").mkdir(parents=True)
    (folder / "out/transformer/log.csv").write_text(
        "step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm\n0,0,0,4.1,4.2,0,0\n9,2000000,9,1.1,1.5,0,1\n")
    exec(snippet("The curves"), {})
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn["curves.png"].axes[0].lines}
    assert lines["validation loss"] == [[0, 4.2], [2, 1.5]] and lines["training loss"] == [[0, 4.1], [2, 1.1]]
    assert lines["the model grows"] == [[1.7, 0], [1.7, 1]]


@pytest.mark.parametrize("name", ["head", "head_ffwd", "head_ffwd_residual"])
def test_the_variants_train_and_write(name, folder, text_file, monkeypatch):
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


def test_the_gradients_are_drawn(folder, drawn, capsys):
    code = snippet("Gradient flow").replace("n_embd=192, max_iters=1001", "n_embd=12, block_size=16, max_iters=3")
    exec(code.replace("(0, 100, 1000)", "(0, 1, 2)"), {})
    rows = re.findall(r"(\w+)'s start, step (\d), loss ([\d.]+):((?: [\d.e+-]+){7})\n", capsys.readouterr().out)
    assert [(start, step) for start, step, *_ in rows] == [(s, str(i)) for s in ("GPT", "PyTorch") for i in range(3)]
    assert float(rows[0][2]) == pytest.approx(np.log(62), abs=0.1) and float(rows[3][2]) > 4.5  # the table is too large
    for ax in drawn["gradients.png"].axes:
        assert len(ax.lines) == 3 and all(line.get_ydata().min() > 0 for line in ax.lines)


# docs/inside.md

def test_the_shapes_are_those_of_the_model(trained, capsys):
    model, itos = trained
    exec(snippet("Shapes"), {})
    first, second, last = re.fullmatch(r"(.*?)(\n +scores.*?)\n(next: .*?)\n", capsys.readouterr().out, re.DOTALL).groups()
    assert re.findall(r"\w+ \(\d+, \d+\)", first) == ["embedding (5, 48)", "query (5, 8)", "key (5, 8)", "value (5, 8)"]
    numbers = [[float(n) for n in row[3:].split()] for row in second.splitlines()[2:]]
    weights = torch.tensor(numbers)[:, 10:]
    idx = torch.tensor(transformer.encode("KING ", itos)).long()[None]
    block, x = model.blocks[0], model.token_embedding_table(idx) + model.position_embedding_table.weight[:5]
    q, k, v = (part[0, :, :8] for part in block.sa.qkv(block.ln1(x)).split(48, dim=-1))
    expected = (q @ k.T / 8**0.5).masked_fill(torch.ones(5, 5).triu(1) == 1, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(weights, expected, atol=0.006, rtol=0)
    probs = model(idx)[0][0, -1].softmax(dim=-1)
    assert last.startswith(f"next: {itos[probs.argmax()]!r} {probs.max():.1%}") and last.count("%") == 5


def test_attention_is_drawn_and_what_the_model_computes_stays_the_same(trained, drawn):
    model, itos = trained
    names = {}
    exec(snippet("What does attention look at?"), names)
    assert len(names["maps"]) == 6 and len(drawn["attention.png"].axes) == 6
    for weights in names["maps"]:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
        assert weights.shape[0] == 6 and weights.triu(1).abs().max() == 0
    image = drawn["attention.png"].axes[0].images[0].get_array()
    assert np.array_equal(image, names["maps"][0][0]) and not np.array_equal(image, names["maps"][0][1])
    idx = torch.tensor(transformer.encode(names["text"], itos)).long()[None]
    watched = model(idx)[0]
    transformer.attention = names["attention"]
    assert torch.equal(watched, model(idx)[0])


def test_letters_are_drawn_and_capitals_find_their_own(trained, drawn, capsys):
    model, itos = trained
    with torch.no_grad():  # each capital like its small letter, but X like y
        for c in itos:
            if c.isupper():
                row = model.token_embedding_table.weight[itos.index("y" if c == "X" else c.lower())]
                model.token_embedding_table.weight[itos.index(c)] = row + 0.1 * torch.randn(48)
    save(model, itos)
    exec(snippet("What has it learned about letters?"), {})
    capitals = [c for c in itos if c.isupper()]
    assert capsys.readouterr().out.split() == [c + ("y" if c == "X" else c.lower()) for c in capitals]
    texts = [text.get_text() for ax in drawn["letters.png"].axes for text in ax.texts]
    assert len(texts) == 2 * len(set(texts)) and set(capitals) < set(texts) and "¶" in texts
