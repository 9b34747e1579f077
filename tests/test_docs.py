"""The README and the pages in docs/ describe what is in the scripts."""
import io
import re
import sys
import tokenize
from functools import reduce
from types import SimpleNamespace

import benchmark
import measure_docs
import pytest
from conftest import ROOT, TINY_FLAGS, status

import bigram
import transformer

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README, GUIDE, LEARNED, EXERCISES = (PAGES[name] for name in ("README.md", "docs/guide.md", "docs/learned.md",
                                                              "docs/exercises.md"))
PAGES_TEXT = "".join(PAGES.values())
SOURCE = "".join((ROOT / name).read_text("utf-8") for name in ("transformer.py", "bigram.py"))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"""(?:\]\(|src=")(?!https?:)([^)#"]+)""", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_pages_keep_their_size():
    for page, most in [(README, 110), (GUIDE, 340), (EXERCISES, 340), (LEARNED, 240)]:
        assert len(page.splitlines()) <= most and [line for line in page.splitlines() if len(line) > 120] == []
    assert [name for name, page in PAGES.items() if "{{" in page] == []  # a figure that is still to come
    assert len(re.findall(r"\n## \d+\. (?:(?!\n## ).)*\nTry", GUIDE, re.DOTALL)) == 12


def test_every_name_on_the_pages_exists():
    code = [SOURCE, *re.findall(r"```python\n(.*?)```", PAGES_TEXT, re.DOTALL)]
    tokens = tokenize.generate_tokens(io.StringIO("".join(code)).readline)
    known = {token.string for token in tokens if token.type == tokenize.NAME}

    def is_there(name):
        for script in (transformer, bigram):
            if hasattr(script, name.split(".")[0]):
                return reduce(lambda thing, part: getattr(thing, part, None), name.split("."), script) is not None
        return set(name.split(".")) <= known or f'"{name}"' in SOURCE or (ROOT / name).exists()
    names = set(re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", PAGES_TEXT)) - {"torchrun", "pass"}
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
    quoted = "".join(re.findall(r"```py\n(.*?)```", GUIDE, re.DOTALL))
    assert {line.strip() for line in quoted.splitlines()} - {line.strip() for line in SOURCE.splitlines()} == {"..."}


EXPERIMENTS = measure_docs.experiments()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: f"{experiment.step} {experiment.text[:40]}")
def test_what_is_to_be_tried_trains_and_generates(experiment, tmp_path, text_file, capsys):
    file = ROOT / experiment.script
    script = SimpleNamespace(__name__="edited", __file__=str(file))
    exec(experiment.apply(), vars(script))
    if file.name == "bigram.py":
        assert status(script, "--data", text_file) == 0
        return
    where = ["--out-dir", tmp_path / "out", "--device", "cpu"]
    assert status(script, "--data", text_file, *experiment.flags, *TINY_FLAGS, "--max-iters", 2, *where) == 0
    capsys.readouterr()
    assert status(script, "--prompt", "line", "--max-new-tokens", 40, *where) == 0
    assert len(capsys.readouterr().out) == len("line") + 40 + len("\n")


def test_the_experiments_are_found_and_measured(text_file, capsys):
    assert {experiment.step for experiment in EXPERIMENTS} == {0, *range(2, 12)} and sum(e.stated != "" for e in EXPERIMENTS) >= 9
    assert sum(len(experiment.edits) for experiment in EXPERIMENTS) == 13
    measure_docs.main(["0", "--steps", "2", "--data", str(text_file)])
    assert re.fullmatch(r"step +0 +stated +\d\.\d+ +measured \d\.\d{4} +unchanged\n", capsys.readouterr().out)
    guide = "\n    python transformer.py --n-layer 1 --out-dir x\n## 1. Title\n- In `Block`, change `no such line` to `this`.\n"
    with pytest.raises(ValueError, match="no such line"):
        measure_docs.experiments(guide)[1].apply()


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
    "Rotary positions": ("a * angles.sin() + b * angles.cos()", "a * angles.cos() + b * angles.sin()"),
    "Find the head that looks one character back": ("diagonal(-1", "diagonal(-2"),
}


@pytest.mark.parametrize("title", WRONG)
def test_the_checks_of_the_exercises_tell_right_from_wrong(title):
    section, = re.findall(r"## \d+\. " + title + r" \(\d+ minutes\)\n((?:(?!\n## ).)*)", EXERCISES, re.DOTALL)
    check, solution = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    right, wrong = WRONG[title]
    assert right in solution and all(part in section for part in ("<summary>Hint", "<summary>Solution"))
    exec(solution + check, {})
    with pytest.raises(AssertionError):
        exec(solution.replace(right, wrong) + check, {})


def test_each_exercise_is_tried():
    assert re.findall(r"^## \d+\. (.*) \(", EXERCISES, re.MULTILINE) == list(WRONG)


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiny", "--device", "cpu"])
    benchmark.main()
    printed = capsys.readouterr().out
    for label in ("training, adamw, batches of 4", "Muon's share", "generation, 1 at once", "generation, 64 at once", "loading 3 MB", "to the tenth step"):
        assert label in printed
