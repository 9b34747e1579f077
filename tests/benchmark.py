"""
How fast is it on this machine? Prints one table; takes a few minutes, longer with a peer on a CPU.

    python tests/benchmark.py
    python tests/benchmark.py --peer ../nanoGPT              # compared with a checkout of nanoGPT
    python tests/benchmark.py --peer ../ng-video-lecture     # or of the lecture's code

A peer runs in the same process, in turns with ours, and the last column is the ratio of the two (above 1: ours is
faster). It trains at its own settings: batches of 64, dropout 0.2, torch.compile on CUDA only. The best of several
tries counts, as other programs can only slow it down; but where a peer takes a minute (generation on a CPU) it has one
try, compared with the median of ours before and after it.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformer  # noqa: E402


def seconds(work, device="cpu"):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(label, ours, unit, theirs=None):
    """One line of the table; higher is better, unless the unit is a time."""
    ratio = "" if theirs is None else theirs / ours if unit == "s" else ours / theirs
    numbers = ["" if n is None else f"{n:,.4g}" if n < 100 else f"{n:,.0f}" for n in (ours, theirs)]
    print(f"{label:<44}{numbers[0]:>12}{numbers[1]:>12} {unit:<9}" + (f"{ratio:>6.1f}" if ratio else ""), flush=True)


class Ours:
    def __init__(self, sizes, device, dropout=0.0, optimizer="muon"):
        self.dtype = transformer.fastest_dtype(device)
        config = transformer.Config(**sizes, dropout=dropout, optimizer=optimizer, dtype=self.dtype)
        self.model = transformer.GPT(config, 65).to(device)
        self.optimizers = transformer.make_optimizers(self.model, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
        self.net = torch.compile(self.model) if device == "cuda" else self.model
        self.generate = lambda idx, n: list(self.model.generate(idx, n))


class NanoGPT:
    def __init__(self, path, sizes, device):
        sys.path.insert(0, str(path))
        import model  # nanoGPT's
        self.model = model.GPT(model.GPTConfig(vocab_size=65, **sizes, dropout=0.2, bias=False)).to(device)
        self.optimizers = [self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)]
        self.generate = self.model.generate
        self.net = torch.compile(self.model) if device == "cuda" else self.model
        self.dtype = "bfloat16" if device == "cuda" else "float32"


class Lecture:
    def __init__(self, path, sizes, device):
        # importing gpt.py would train, so only what comes before that is run
        source, names = (path / "gpt.py").read_text().split("\nmodel = GPTLanguageModel()")[0], {}
        source = source.replace("open('input.txt'", f"open({str(path / 'input.txt')!r}")
        exec(compile(source, "gpt.py", "exec"), names)
        names.update(sizes, dropout=0.2, vocab_size=65, device=device)
        self.model = self.net = names["GPTLanguageModel"]().to(device)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=3e-4)]
        self.generate = self.model.generate
        self.dtype = "float32"


def train_step(it, batch_size, block_size, device):
    """One step of training as all of them do it: forward, backward, clip, update."""
    def step():
        it.model.train()
        x, y = torch.randint(65, (2, batch_size, block_size), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=it.dtype == "bfloat16"):
            _, loss = it.net(x, y)
        it.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(it.model.parameters(), 1.0)
        for optimizer in it.optimizers:
            optimizer.step()
    return step


def generation(it, sequences, tokens, device):
    def generate():
        it.model.eval()
        with torch.no_grad():
            it.generate(torch.zeros(sequences, 1, dtype=torch.long, device=device), tokens)
    return generate


def load_text(mb, folder):
    """Loads a text of so many million bytes: returns (seconds, peak memory in bytes)."""
    path, text = Path(folder) / "text.txt", (ROOT / "input.txt").read_bytes()
    path.write_bytes((text * (mb * 1_000_000 // len(text) + 1))[:mb * 1_000_000])
    took = seconds(lambda: transformer.load_data(path, 256))
    tracemalloc.start()
    transformer.load_data(path, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took, peak


def start_up(sizes, device, folder):
    """Seconds from the command to its first line, and to the first line of a trained step (the tenth)."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-u", str(ROOT / "transformer.py"), "--data", str(ROOT / "input.txt"), "--overwrite",
                           "--device", device, "--out-dir", folder, *flags],
                          stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        first = time.perf_counter() - start
        while not process.stdout.readline().startswith("step 10 "):
            assert process.poll() is None
        tenth = time.perf_counter() - start
        process.kill()
    return first, tenth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT or of ng-video-lecture")
    parser.add_argument("--text-mb", type=int, default=100, help="size of the text to load, in million bytes")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args()
    device = args.device
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32) if args.tiny else \
        dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
    tokens, tries = (40, 1) if args.tiny else (1000, 3)
    lecture = args.peer and (args.peer / "gpt.py").exists()
    peer = args.peer and (Lecture if lecture else NanoGPT)(args.peer.resolve(), sizes, device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{name}; torch {torch.__version__}, {transformer.fastest_dtype(device)}; {sizes}")
    print(f"{'':<44}{'ours':>12}{args.peer.name[-12:] if args.peer else '':>13}{'':<10}{'ratio' if peer else ''}")

    theirs = None
    if peer:  # on a CPU one such step takes long enough for a measure
        step = train_step(peer, 64, sizes["block_size"], device)
        theirs = 64 * sizes["block_size"] / min(seconds(step, device) for _ in range(20 if device == "cuda" else 2))
    settings = [(16, 0.0, "muon"), (64, 0.2, "muon")] if device == "cuda" else [(4, 0.0, "adamw"), (16, 0.0, "muon"), (16, 0.2, "muon")]
    for batch_size, dropout, optimizer in settings:
        ours = Ours(sizes, device, dropout, optimizer)
        step = train_step(ours, batch_size, sizes["block_size"], device)
        took = min(seconds(step, device) for _ in range(20 if device == "cuda" else 3 + 2 * tries))
        row(f"training, {optimizer}, batches of {batch_size}, dropout {dropout}", batch_size * sizes["block_size"] / took, "tokens/s", theirs)
        if optimizer == "muon":
            share = min(seconds(ours.optimizers[1].step, device) for _ in range(3)) / took
            row("  Muon's share of such a step", share, "")

    ours, theirs = Ours(sizes, device), None
    write = generation(ours, 1, tokens, device)
    took = [seconds(write, device) for _ in range(tries)]
    if peer:
        theirs = tokens / seconds(generation(peer, 1, tokens, device), device)
        took += [seconds(write, device) for _ in range(tries)]
    row(f"generation, 1 at once, {tokens} tokens each", tokens / statistics.median(took), "tokens/s", theirs)
    took = min(seconds(generation(ours, 64, tokens // 4, device), device) for _ in range(tries))
    row(f"generation, 64 at once, {tokens // 4} tokens each", 64 * (tokens // 4) / took, "tokens/s")

    with tempfile.TemporaryDirectory() as folder:
        mb = 3 if args.tiny else args.text_mb
        took, memory = load_text(mb, folder)
        row(f"loading {mb} MB of text", mb / took, "MB/s")
        row("  peak memory, in times the text's size", memory / mb / 1e6, "x")
        first, tenth = (min(times) for times in zip(*(start_up(sizes, device, folder) for _ in range(tries))))
        row("python transformer.py, to its first line", first, "s")
        row("python transformer.py, to the tenth step", tenth, "s")
    if not args.tiny:
        theirs = seconds(lambda: subprocess.run([sys.executable, "bigram.py"], cwd=args.peer, check=True, capture_output=True)) if lecture else None
        ours = seconds(lambda: subprocess.run([sys.executable, ROOT / "bigram.py"], check=True, capture_output=True))
        row("python bigram.py, in all", ours, "s", theirs)


if __name__ == "__main__":
    main()
