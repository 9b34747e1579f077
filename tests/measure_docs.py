"""
Makes every experiment of docs/guide.md and prints the loss that stands there beside the one measured.

    python tests/measure_docs.py             # all of them, at full length, on Tiny Shakespeare if it is there
    python tests/measure_docs.py 4 8         # only those of steps 4 and 8
    python tests/measure_docs.py --steps 2   # can they still be applied? The losses mean nothing

An experiment is an item of a list in the guide. It may "change `this` to `that`" or "delete `this`", in transformer.py
or, if it says so, in bigram.py, and it may name flags. The loss in bold is what the run should end at.
"""
import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
sys.path.insert(0, str(ROOT))


@dataclass
class Experiment:
    step: int  # of the guide; 0 is the run that the others are compared with
    text: str
    script: str
    edits: list  # of pairs: what to replace, by what
    flags: list
    stated: str  # the loss in bold, or ""

    def apply(self):
        """The script with the changes made. Raises ValueError if one of them does not fit it."""
        source = (ROOT / self.script).read_text("utf-8")
        for old, new in self.edits:
            if source.count(old) != 1:
                raise ValueError(f"step {self.step}: {self.script} has {old!r} {source.count(old)} times")
            source = source.replace(old, new)
        return source


def experiments(guide=GUIDE):
    """All experiments of the guide, the unchanged run first."""
    command = re.search(r"\n    python transformer.py ((?:.*\\\n)*.*)\n", guide)[1].replace("\\\n", " ").split()
    base = command[:command.index("--out-dir")]
    stated = re.search(r"\*\*(\d\.\d+)\*\*", guide)
    found = [Experiment(0, "unchanged", "transformer.py", [], base, stated[1] if stated else "")]
    for step, section in re.findall(r"\n## (\d+)\. (.*?)(?=\n## |\Z)", guide, re.DOTALL):
        for text in re.findall(r"^- (.*?)(?=\n\n|\n- |\Z)", section, re.DOTALL | re.MULTILINE):
            edits = re.findall(r"change\s+`([^`]+)`\s+to\s+`([^`]+)`", text)
            edits += [(old, "") for old in re.findall(r"delete\s+`([^`]+)`", text)]
            flags = " ".join(re.findall(r"`(--[^`]+)`", text)).split()
            stated = re.search(r"\*\*(\d\.\d+)\*\*", text)
            if (edits or flags) and not text.startswith("`python"):  # a command is for the reader alone
                in_bigram = "`bigram.py`" in text
                found.append(Experiment(int(step), " ".join(text.split()), "bigram.py" if in_bigram else "transformer.py",
                                        edits, [] if in_bigram else base + flags, stated[1] if stated else ""))
    return found


def measure(experiment, more=()):
    """Runs the changed script with the flags and more; returns the last validation loss of a line that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / experiment.script
        path.write_text(experiment.apply(), "utf-8")
        out = [] if experiment.script == "bigram.py" else ["--out-dir", f"{folder}/out"]
        done = subprocess.run([sys.executable, path, *experiment.flags, *out, *map(str, more)], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    line = "best model.*" if out else r"step \d+"
    return re.findall(rf"^{line}: .*val loss (\d+\.\d+)", done.stdout, re.MULTILINE)[-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", type=int, metavar="STEP", help="steps of the guide; 0 is the unchanged run")
    parser.add_argument("--steps", type=int, help="only so many steps of training")
    parser.add_argument("--data", help="text to train on, by default that of the scripts")
    args = parser.parse_args(argv)
    from transformer import TEXT
    for experiment in experiments():
        if args.only and experiment.step not in args.only:
            continue
        more = ["--data", args.data or TEXT]
        if args.steps and experiment.script == "transformer.py":
            more += ["--max-iters", args.steps]
        loss = measure(experiment, more)
        print(f"step {experiment.step:2}  stated {experiment.stated or '-':>6}  measured {loss}  {experiment.text[:70]}", flush=True)


if __name__ == "__main__":
    main()
