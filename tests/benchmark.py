"""
How fast is it, on this machine? Prints one table; takes a few minutes, more with a peer on a CPU.

    python tests/benchmark.py
    python tests/benchmark.py --peer ../nanoGPT              # beside a checkout of nanoGPT
    python tests/benchmark.py --peer ../ng-video-lecture     # or of the lecture's code
    python tests/benchmark.py --text-mb 1000                 # load a text of 1 GB

A peer runs in the same process, ours and theirs in turns, and the last column is the ratio of the
two (above 1: ours is faster). Its training runs at its own settings: batches of 64, dropout 0.2,
and torch.compile on CUDA only. Best of several tries, as other work only ever slows down; but where a
peer takes a minute (generation on a CPU) it has one try, and of ours the median before and after it counts.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformer  # noqa: E402


def seconds(work, device):
    transformer.wait_for(device)
    start = time.perf_counter()
    work()
    transformer.wait_for(device)
    return time.perf_counter() - start


def best(device, tries, *works):
    """The shortest time of each piece of work, in seconds; they take turns, so that all have the same weather."""
    times = [[seconds(work, device) for work in works] for _ in range(tries)]
    return [min(column) for column in zip(*times)]


def row(what, ours, unit, theirs=None):
    """One line of the table; higher is better, unless the unit is a time."""
    ratio = "" if theirs is None else theirs / ours if unit == "s" else ours / theirs
    print(f"{what:<44}" + "".join(f"{'' if n is None else f'{n:,.4g}' if n < 100 else f'{n:,.0f}':>12}" for n in (ours, theirs))
          + f" {unit:<9}" + (f"{ratio:>6.1f}" if ratio else ""), flush=True)


# The peers, as they are in their checkouts

class NanoGPT:
    def __init__(self, path, sizes, device):
        sys.path.insert(0, str(path))
        import model  # nanoGPT's
        c = model.GPTConfig(vocab_size=65, n_layer=sizes["n_layer"], n_head=sizes["n_head"], n_embd=sizes["n_embd"],
                            block_size=sizes["block_size"], dropout=0.2, bias=False)
        self.model = model.GPT(c).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
        self.net = torch.compile(self.model) if device == "cuda" else self.model
        self.precision = "bf16" if device == "cuda" else "fp32"


class Lecture:
    def __init__(self, path, sizes, device):
        # importing gpt.py would train, so only what comes before that is run
        source, before = (path / "gpt.py").read_text().split("\nmodel = GPTLanguageModel()")[0], os.getcwd()
        names = {}
        os.chdir(path)  # where it finds its text
        exec(compile(source, "gpt.py", "exec"), names)
        os.chdir(before)
        names.update(sizes, dropout=0.2, vocab_size=65, device=device)
        self.model = self.net = names["GPTLanguageModel"]().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.precision = "fp32"


class Ours:
    def __init__(self, sizes, device, dropout=0.0):
        config = transformer.Config(**sizes, dropout=dropout)
        self.model = transformer.GPT(config, 65).to(device)
        self.optimizer = transformer.make_optimizer(self.model, config, device)
        self.net = torch.compile(self.model) if device == "cuda" else self.model
        self.precision = transformer.pick_precision(device)


def train_step(it, batch_size, block_size, device):
    """One step of training as all of them do it: forward, backward, clip, update."""
    def step():
        it.model.train()
        x, y = torch.randint(65, (2, batch_size, block_size), device=device)
        with transformer.autocast(device, it.precision):
            _, loss = it.net(x, y)
        it.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(it.model.parameters(), 1.0)
        it.optimizer.step()
    return step


def generation(it, sequences, tokens, device):
    def generate():
        it.model.eval()
        with torch.no_grad():
            it.model.generate(torch.zeros(sequences, 1, dtype=torch.long, device=device), tokens)
    return generate


LOAD = """
import re, resource, sys, time
sys.path.insert(0, {root!r})
import transformer
def peak():  # in bytes
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmHWM:\\s+([0-9]+)", file.read())[1])
before, start = peak(), time.perf_counter()
train_data, val_data, itos = transformer.load_data({path!r}, 256)
print(time.perf_counter() - start, peak() - before, len(train_data) + len(val_data))
"""


def load_text(mb):
    """Loads a text of so many million bytes in a process of its own: returns (seconds, peak memory in bytes)."""
    text = (ROOT / "input.txt").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        with open(path, "wb") as file:
            for i in range(0, mb * 1_000_000, len(text)):
                file.write(text[:mb * 1_000_000 - i])
        done = subprocess.run([sys.executable, "-c", LOAD.format(root=str(ROOT), path=str(path))], check=True,
                              capture_output=True, text=True)
    took, memory, length = done.stdout.split()
    assert int(length) == mb * 1_000_000
    return float(took), float(memory)


def start_up(sizes, device):
    """Seconds from the command to the end of the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-u", str(ROOT / "transformer.py"), "--data", str(ROOT / "input.txt"),
                                    "--device", device, "--out-dir", folder, "--max-iters", "1000", *flags],
                                   stdout=subprocess.PIPE, text=True)
        while not process.stdout.readline().startswith("step 1 "):
            assert process.poll() is None
        took = time.perf_counter() - start
        process.kill()
        process.wait()
        process.stdout.close()
    return took


def bigram_total(script, cwd, *args):
    return seconds(lambda: subprocess.run([sys.executable, script, *args], cwd=cwd, check=True, capture_output=True), "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="cuda or cpu")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT or of ng-video-lecture")
    parser.add_argument("--text-mb", type=int, default=100, help="size of the text to load, in million bytes")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args()
    device = transformer.pick_device(args.device)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32) if args.tiny else \
        dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
    tokens, tries = (40, 1) if args.tiny else (1000, 3)

    peer = None
    if args.peer:
        lecture = (args.peer / "gpt.py").exists()
        peer = (Lecture if lecture else NanoGPT)(args.peer.resolve(), sizes, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    precision = transformer.pick_precision(device)
    print(f"{name}; torch {torch.__version__}, {precision}; {sizes}")
    print(f"{'':<44}{'ours':>12}{args.peer.name[-12:] if args.peer else '':>13}{'':<10}{'ratio' if peer else ''}")

    theirs = None
    if peer:  # at its own settings: batches of 64, dropout 0.2. On a CPU one such step takes long enough for a measure.
        step = train_step(peer, 64, sizes["block_size"], device)
        if device == "cuda" or args.tiny:
            best(device, 3, step)
        theirs = 64 * sizes["block_size"] / best(device, 20 if device == "cuda" else 2, step)[0]
    n = sizes["n_layer"]
    for batch_size, dropout, n_layer in [(64, 0.2, n)] if device == "cuda" else \
            [(4, 0.0, max(1, n // 3)), (4, 0.0, n), (8, 0.0, n), (16, 0.0, n), (16, 0.2, n)]:
        step = train_step(Ours({**sizes, "n_layer": n_layer}, device, dropout), batch_size, sizes["block_size"], device)
        best(device, 3, step)
        took, = best(device, 20 if device == "cuda" else 2 * tries, step)
        row(f"training, batches of {batch_size}, dropout {dropout}, {n_layer} blocks", batch_size * sizes["block_size"] / took, "tokens/s", theirs)

    ours = Ours(sizes, device)
    best(device, 1, generation(ours, 1, 10, device))
    for sequences, n, ask_peer in [(1, tokens, True), (64, tokens // 4, False)]:
        works = [generation(it, sequences, n, device) for it in (ours, peer) if it and (ask_peer or it is ours)]
        if len(works) == 2 and device == "cpu":
            ours_first = [seconds(works[0], device) for _ in range(tries)]
            theirs = seconds(works[1], device)
            took = [statistics.median(ours_first + [seconds(works[0], device) for _ in range(tries)]), theirs]
        else:
            took = best(device, tries, *works)
        row(f"generation, {sequences} at once, {n} tokens each", *[sequences * n / took[0], "tokens/s"],
            *[sequences * n / t for t in took[1:]])

    mb = 3 if args.tiny else args.text_mb
    took, memory = load_text(mb)
    row(f"loading {mb} MB of text", mb / took, "MB/s")
    row("  peak memory, in times the text's size", memory / mb / 1e6, "x")
    row("python transformer.py, to the first step", min(start_up(sizes, device) for _ in range(tries)), "s")
    if not args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            ours_bigram = bigram_total(ROOT / "bigram.py", folder, "--device", device)
        row("python bigram.py, in all", ours_bigram, "s",
            bigram_total("bigram.py", args.peer) if peer and lecture else None)


if __name__ == "__main__":
    main()
