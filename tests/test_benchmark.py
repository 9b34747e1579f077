"""The benchmark runs, and prints its table; its numbers are for people to read, not for a test."""
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import benchmark


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiny", "--device", "cpu"])
    benchmark.main()
    printed = capsys.readouterr().out
    for what in ("training, batches of 4", "generation, 1 at once", "generation, 64 at once", "loading 3 MB", "to the first step"):
        assert what in printed
