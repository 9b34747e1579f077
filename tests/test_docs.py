"""What the pages in docs/ and the README say about the scripts is there."""
import re

import pytest
from conftest import ROOT

import bigram
import transformer

PAGES = ["README.md", "docs/guide.md"]


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
