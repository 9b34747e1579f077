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
    code = [SOURCE, *re.findall(r"```python\n(.*?)```", PAGES_TEXT, re.DOTALL)]
    tokens = tokenize.generate_tokens(io.StringIO("".join(code)).readline)
    known = {token.string for token in tokens if token.type == tokenize.NAME}

    def is_there(name):
        for script in (transformer, bigram):
            if hasattr(script, name.split(".")[0]):
                return reduce(lambda thing, part: getattr(thing, part, None), name.split("."), script) is not None
        return set(name.split(".")) <= known or f'"{name}"' in SOURCE or (ROOT / name).exists()
    names = set(re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", PAGES_TEXT)) - {"torchrun"}
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
for text in [*re.findall(r"^- (.*?)(?=\n\n|\n- )", GUIDE, re.DOTALL | re.MULTILINE), "Exercise 7: delete `wei += mask`"]:
    edits = re.findall(r"change\s+`([^`]+)`\s+to\s+`([^`]+)`", text)
    edits += [(old, "") for old in re.findall(r"delete\s+`([^`]+)`", text)]
    flags = " ".join(re.findall(r"`(--[^`]+)`", text)).split()
    if edits or flags:
        TRIES[text] = edits, flags


@pytest.mark.parametrize("text", TRIES, ids=lambda text: text[:50])
def test_what_is_to_be_tried_trains_and_generates(text, tmp_path, text_file, capsys):
    assert len(TRIES) == 15 and sum(len(edits) for edits, _ in TRIES.values()) == 12
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


# The exercises' checks, which the solutions must pass and wrong ones must not

WRONG = {  # a mistake in each solution, which its check must notice: (right, wrong)
    "The loss before training": ("log(", "log2("),
    "Count the parameters": ("V * C + T * C", "V * C"),
    "Average the past in three ways": ("triu(1)", "triu(2)"),
    "The most likely next characters": ("logits[0, -1]", "logits[0, 0]"),
    "Attention without matrix products": ("**0.5", "**0.4"),
    "Why the scores are scaled": ("d**0.5", "d"),
    "Look into the future": ("return not", "return"),
    "Write the cache": ("cache.append((k, v))", "cache.append((v, k))"),
    "A batch that does not fit": (" / parts", ""),
    "Rotary positions": ("a * angles.sin() + b * angles.cos()", "a * angles.cos() + b * angles.sin()"),
    "Your weights in Hugging Face's GPT-2": ('"ln1": "ln_1"', '"ln1": "ln_2"'),
    "Find the head that looks one character back": ("diagonal(-1", "diagonal(-2"),
}


@pytest.mark.parametrize("title", WRONG)
def test_the_checks_of_the_exercises_tell_right_from_wrong(title):
    section, = re.findall(r"## \d+\. " + title + r"\n((?:(?!\n## ).)*)", EXERCISES, re.DOTALL)
    check, solution = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    right, wrong = WRONG[title]
    assert right in solution and all(part in section for part in (" minutes", "<summary>Hint", "<summary>Solution"))
    if "import transformers" in solution:
        pytest.importorskip("transformers")
    exec(solution + check, {})
    with pytest.raises(AssertionError):
        exec(solution.replace(right, wrong) + check, {})


def test_each_exercise_is_tried():
    assert re.findall(r"^## \d+\. (.*)", EXERCISES, re.MULTILINE) == list(WRONG)


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiny", "--device", "cpu"])
    benchmark.main()
    printed = capsys.readouterr().out
    for label in ("training, adamw, batches of 4", "Muon's share", "generation, 1 at once", "generation, 64 at once", "loading 3 MB", "to the tenth step"):
        assert label in printed
