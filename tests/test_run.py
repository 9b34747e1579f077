"""transformer.py as a user runs it: training, generation, interruptions, and everything one can get wrong."""
import io
import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, Command, fork, run, some_text, status

import transformer

FLAGS = [*TINY_FLAGS, "--max-iters", 30, "--eval-interval", 10, "--warmup-iters", 15, "--dropout", 0.1]


def train(out_dir, text_file, *more, **how):
    return fork("--data", text_file, "--out-dir", out_dir, *FLAGS, *more, **how)


def log_of(out_dir):
    """log.csv without the seconds, which no two runs share: a row of numbers for each evaluation."""
    rows = np.genfromtxt(out_dir / "log.csv", delimiter=",", names=True)
    return rows[[name for name in rows.dtype.names if name != "seconds"]]


def latest(out_dir):
    return torch.load(out_dir / "latest.pt", weights_only=True)


def assert_same_end(one, other):
    """Two runs ended the same, bit for bit: weights, optimizer, log, best model."""
    assert log_of(one).tolist() == log_of(other).tolist()
    for a, b in [[torch.load(out / name, weights_only=True)["model"] for out in (one, other)] for name in ("latest.pt", "model.pt")]:
        assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(*(latest(out)["optimizers"] for out in (one, other)), strict=True):
        a, b = a["state"], b["state"]
        assert a.keys() == b.keys() and all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def assert_one_line(done, *words):
    """Exit status 2 and one line on standard error, after the usage line."""
    assert done.returncode == 2 and done.stderr.count("\n") == 2 and "[options]\ntransformer.py: error: " in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text_file):
    """A finished run: (its folder, the text, what the command printed)."""
    out_dir = tmp_path_factory.mktemp("trained") / "run"
    done = run("transformer.py", "--data", text_file, "--out-dir", out_dir, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    return out_dir, text_file, done.stdout


@pytest.fixture(scope="session", params=["muon", "adamw"])
def either(request, trained, tmp_path_factory):
    """Runs with either optimizer: (the flag, a finished run's folder, the text)."""
    flag = ["--optimizer", request.param]
    if request.param == "muon":
        return flag, *trained[:2]
    out_dir = tmp_path_factory.mktemp("either") / "run"
    assert train(out_dir, trained[1], *flag).returncode == 0
    return flag, out_dir, trained[1]


# training

def test_what_a_run_prints_and_leaves_behind(trained):
    out_dir, text_file, printed = trained
    assert {file.name for file in out_dir.iterdir()} == {"model.pt", "latest.pt", "log.csv"}
    model, checkpoint = transformer.load_checkpoint(out_dir / "latest.pt")
    *splits, itos = transformer.load_data(text_file, 16)
    assert checkpoint["itos"] == itos and vars(model.config)["dtype"] == "float32"
    rows = log_of(out_dir)
    assert rows.dtype.names == ("step", "learning_rate", "grad_norm", "train_loss", "val_loss")
    assert rows["step"].tolist() == [0, 10, 20, 30]
    assert rows["learning_rate"][1:] == pytest.approx([model.config.learning_rate * rate for rate in (11 / 16, 10 / 15, 0)])
    assert rows["val_loss"][0] == pytest.approx(math.log(len(itos)), abs=0.1) and rows["val_loss"][-1] < rows["val_loss"][0]
    losses = [transformer.estimate_loss(model, data, 10_000) for data in splits]
    assert losses == pytest.approx(list(rows[-1])[-2:])
    for part in ("4,000 characters", "\nstep 10 of 30: loss ", " min left\n", "best model, on up to 400 characters of each split: train loss",
                 "\nstep 30: train loss {:.4f}, val loss {:.4f}\n".format(*losses), "".join(transformer.sample(model, itos))):
        assert part in printed


def test_the_best_model_by_validation_loss_is_kept(trained, tmp_path, monkeypatch):
    """With made-up losses: the training loss falls to the end, the validation loss does not."""
    losses, weights = iter([4, 5, 3, 2, 2, 2.001, 1, 3, 1, 2]), []

    def estimate_loss(model, data, max_tokens):
        weights.append(model.lm_head.weight.clone())
        return next(losses)

    monkeypatch.setattr(transformer, "estimate_loss", estimate_loss)
    assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS) == 0
    best, _ = transformer.load_checkpoint(tmp_path / "run" / "model.pt")
    assert torch.equal(best.lm_head.weight, weights[2]) and not torch.equal(weights[4], weights[2])
    assert torch.equal(weights[-1], weights[2])  # the last line is about it, too


def test_the_same_seed_gives_the_same_run_and_each_step_its_own_dropout(trained, tmp_path, monkeypatch):
    out_dir, text_file, _ = trained
    for name, more in [("seed", ["--seed", 7]), ("dropout", ["--dropout", 0])]:
        assert train(tmp_path / name, text_file, *more).returncode == 0
        assert log_of(tmp_path / name)[1] != log_of(out_dir)[1]
    real, drawn, training = transformer.GPT.forward, [], []

    def forward(self, idx, targets=None, cache=None, start=0):
        if targets is not None and len(targets) == TINY["batch_size"]:
            drawn.append(torch.initial_seed())
            training.append((self.training, torch.is_grad_enabled()))
        return real(self, idx, targets, cache, start)

    monkeypatch.setattr(transformer.GPT, "forward", forward)
    assert status(transformer, "--data", text_file, "--out-dir", tmp_path / "same", *FLAGS) == 0
    assert_same_end(out_dir, tmp_path / "same")
    assert len(set(drawn)) == 30 and set(training) == {(True, True)}


def test_gradients_are_clipped_and_the_rate_is_that_of_the_schedule(trained, tmp_path, monkeypatch):
    """With plain gradient descent, how far a step moves the weights shows whether the gradient was clipped."""
    monkeypatch.setattr(transformer, "make_optimizers", lambda model, config: [torch.optim.SGD(model.parameters(), lr=99.0)])
    flags = ["--grad-clip", 0.01, "--learning-rate", 1, "--max-iters", 1, "--out-dir", tmp_path / "run"]
    assert status(transformer, "--data", trained[1], *FLAGS, *flags) == 0
    after, checkpoint = transformer.load_checkpoint(tmp_path / "run" / "latest.pt")
    torch.manual_seed(1337)
    before = transformer.GPT(after.config, len(checkpoint["itos"]))
    moved = torch.cat([(p - q).flatten() for p, q in zip(after.parameters(), before.parameters())]).norm().item()
    assert moved == pytest.approx(0.01 * transformer.get_lr(0, after.config), rel=1e-3)
    assert log_of(tmp_path / "run")["grad_norm"][1] > 0.1  # the log has it as it was before


def test_a_run_that_diverges_ends_and_saves_no_broken_weights(trained, tmp_path):
    done = train(tmp_path / "run", trained[1], "--learning-rate", 1e9)
    assert_one_line(done, "training diverged", "--learning-rate")
    for file in (tmp_path / "run").glob("*.pt"):
        assert all(p.isfinite().all() for p in transformer.load_checkpoint(file)[0].parameters())


def test_a_field_added_to_config_is_a_flag_and_is_saved(trained, tmp_path, monkeypatch, capsys):
    added = [("width", int, 3), ("slope", float, 0.0), ("kind", str, "a"), ("fast", bool, False)]
    monkeypatch.setattr(transformer, "Config", make_dataclass("Config", added, bases=(transformer.Config,)))
    assert status(transformer, "--help") == 0
    assert "--width" in capsys.readouterr().out
    flags = ["--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS, "--max-iters", 1]
    assert status(transformer, *flags, "--fast", "False") == 2  # not read as true
    assert status(transformer, *flags, "--width", 5, "--slope", 0.5) == 0
    config = transformer.load_checkpoint(tmp_path / "run" / "model.pt")[0].config
    assert (config.width, config.slope, config.kind, config.fast) == (5, 0.5, "a", False)


@pytest.mark.parametrize("bf16, fp32, faster", [(1.0, 2.0, "bfloat16"), (1.0, 1.1, "float32"), (2.0, 1.0, "float32")])
def test_the_faster_precision_is_chosen_once_and_kept(bf16, fp32, faster, trained, tmp_path, monkeypatch):
    seconds = iter([bf16, fp32])
    monkeypatch.setattr(transformer.timeit, "repeat", lambda *_, **__: [next(seconds)])
    flags = ["--out-dir", tmp_path / "run", "--max-iters"]
    assert status(transformer, "--data", trained[1], *FLAGS, "--dtype", "", *flags, 1) == 0
    products, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (products.append(linear(*args)), products[-1])[1])
    assert status(transformer, "--resume", *flags, 2) == 0  # a second choice would find no more seconds
    assert latest(tmp_path / "run")["config"]["dtype"] == faster
    assert [p.dtype for p in products if p.requires_grad][0] == getattr(torch, faster)


# generation with the trained model

def test_the_command_generates_what_generate_generates_and_needs_only_model_pt(trained, tmp_path):
    (tmp_path / "moved").mkdir()
    shutil.copy(trained[0] / "model.pt", tmp_path / "moved")
    model, checkpoint = transformer.load_checkpoint(trained[0] / "model.pt")
    for prompt in ("line 4", "line 4 of the text.\n" * 10):  # shorter and longer than the context
        idx = torch.tensor(transformer.encode(prompt, checkpoint["itos"])).long()[None]
        generator = torch.Generator().manual_seed(2)
        tokens = model.eval().generate(idx, 60, generator, temperature=0.8, top_k=5, top_p=0.9)
        text = prompt + transformer.decode(torch.cat([*tokens]).flatten(), checkpoint["itos"])
        done = fork("--out-dir", "moved", "--prompt", prompt, "--max-new-tokens", 60, "--temperature", 0.8,
                    "--top-k", 5, "--top-p", 0.9, "--seed", 2, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == text + "\n"
    assert len(fork("--out-dir", trained[0], "--prompt", "").stdout) == 500 + 1


@pytest.mark.parametrize("text", ["-ال أكون", "a"], ids=["a dash and Arabic", "one character"])
def test_odd_texts_and_prompts_reach_a_file_as_utf8(text, tmp_path):
    (tmp_path / "text.txt").write_text(text * 200, encoding="utf-8")
    assert train(tmp_path / "run", tmp_path / "text.txt", "--max-iters", 1).returncode == 0
    console = dict(PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    done = run("transformer.py", "--out-dir", tmp_path / "run", f"--prompt={text}", "--max-new-tokens", 20, **console)
    assert done.returncode == 0 and done.stdout.startswith(text) and set(done.stdout) <= {*text, "\n"}


# standard output, and where else it may run

@pytest.mark.skipif(os.name == "nt", reason="a shell with pipes")
@pytest.mark.parametrize("endless", [["--prompt", "line", "--max-new-tokens", 10**8], ["--max-iters", 10**8]], ids=["prompt", "train"])
def test_a_closed_pipe_ends_it_without_a_traceback(endless, trained, tmp_path):
    out_dir = trained[0] if "--prompt" in endless else tmp_path / "run"
    flags = " ".join(map(str, [*TINY_FLAGS, "--eval-interval", 10**8, "--out-dir", out_dir, *endless]))
    done = subprocess.run(f"{sys.executable} {ROOT}/transformer.py --data {trained[1]} {flags} | head -c 60", shell=True,
                          capture_output=True, timeout=60)
    assert len(done.stdout) == 60 and done.stderr == b""


def test_in_a_notebook_or_a_thread_and_nothing_is_left_changed(trained, tmp_path, monkeypatch):
    def state():
        return torch.get_num_threads(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], sys.stderr

    before, threads = state(), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for args in (["--prompt", "line", "--out-dir", trained[0]], ["--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS]):
        with redirect_stdout(io.StringIO()) as printed:
            thread = threading.Thread(target=status, args=(transformer, *args))
            thread.start()
            thread.join()
        assert ("line" if "--prompt" in args else "best model") in printed.getvalue() and state() == before
    assert threads == [1, before[0], before[0]]  # generation sets one, and each command sets back what it found


# interruptions

def test_killed_anywhere_again_and_again_it_ends_like_an_unbroken_run(either, tmp_path):
    """By kill -9, SIGTERM, SIGHUP and Ctrl-C, before each file operation of a save in turn; dropout, warm-up and all."""
    flag, unbroken, text_file = either
    out_dir, kills, names = tmp_path / "run", 0, ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
    while True:
        number = getattr(signal, names[kills % 4])
        again = ["--resume", "--out-dir", out_dir]
        done = fork(*again, kill=(kills + 1, number)) if (out_dir / "latest.pt").exists() else \
            train(out_dir, text_file, *flag, "--overwrite", kill=(kills + 1, number))
        if done.returncode == 0:
            break
        kills += 1
        assert done.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in done.stderr
        assert done.stderr == "" or number == signal.SIGINT
        assert ("--resume" in done.stderr) == (number == signal.SIGINT and (out_dir / "latest.pt").exists())
        for file in out_dir.glob("*.pt"):
            transformer.load_checkpoint(file)
    assert kills > 10
    assert_same_end(out_dir, unbroken)


def test_a_full_disk_is_one_line_and_loses_nothing(trained, tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS) == 2
    assert capsys.readouterr().err.endswith("error: [Errno 28] No space left on device\n")
    assert latest(tmp_path / "run")["step"] == 10
    assert fork("--resume", "--out-dir", tmp_path / "run").returncode == 0
    assert_same_end(tmp_path / "run", trained[0])


def test_the_log_counts_the_seconds_of_all_steps(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "time", Namespace(perf_counter=itertools.count().__next__))  # each step takes 1 second
    flags = ["--data", trained[1], "--out-dir", tmp_path / "run"]
    assert status(transformer, *flags, *FLAGS) == status(transformer, *flags, "--resume", "--max-iters", 50) == 0
    log = np.genfromtxt(tmp_path / "run" / "log.csv", delimiter=",", names=True)
    assert log["seconds"].tolist() == log["step"].tolist() == [0, 10, 20, 30, 40, 50]


def test_a_finished_run_can_be_extended(either, tmp_path, monkeypatch):
    """From another folder and after the run was moved, though the path of its text was relative."""
    flag, _, text_file = either
    monkeypatch.chdir(text_file.parent)
    assert train(tmp_path / "short", text_file.name, *flag, "--max-iters", 20).returncode == 0
    shutil.move(tmp_path / "short", tmp_path / "moved")
    resume = ["--resume", "--out-dir", tmp_path / "moved"]
    done = fork(*resume, "--max-iters", 60, "--eval-interval", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = log_of(tmp_path / "moved")
    assert rows["step"].tolist() == [0, 10, 20, 40, 60]
    rate = transformer.Config(optimizer=flag[1]).learning_rate if flag[1] == "muon" else 1e-3
    assert rows["learning_rate"][3] == pytest.approx(rate * 20 / 45)  # of a run of 60 steps
    log = (tmp_path / "moved" / "log.csv").read_text()
    assert_one_line(fork(*resume, "--max-iters", 25), "60 steps are done", "--max-iters")
    assert fork(*resume).returncode == 0  # nothing is left to do
    assert (tmp_path / "moved" / "log.csv").read_text() == log and latest(tmp_path / "moved")["step"] == 60  # the seconds, too


def test_resuming_with_other_settings_or_another_text_is_refused(trained, tmp_path):
    out_dir, text_file, _ = trained
    before = content(out_dir)
    other = tmp_path / "other.txt"
    text = text_file.read_text()
    other.write_text(text.replace("text", "ttex", 1))  # the same characters
    for args, message in [(["--n-layer", 3], "settings"), (["--seed", 1], "settings"), (["--data", other], "is not the text"),
                          (["--data", tmp_path / "gone"], "--data"), (["--optimizer", "adamw"], "settings")]:
        assert_one_line(fork("--resume", "--out-dir", out_dir, "--max-iters", 40, *args), message)
    assert content(out_dir) == before
    shutil.copytree(out_dir, tmp_path / "copy")  # but the whole command with --resume added continues
    assert train(tmp_path / "copy", text_file, "--resume").returncode == 0
    assert_same_end(tmp_path / "copy", out_dir)


def test_what_is_only_a_view_of_a_run_does_not_end_it(trained, tmp_path, monkeypatch, capsys):
    """A log.csv that cannot be written, and a sample with characters that cannot be shown."""
    out_dir, savetxt = tmp_path / "run", np.savetxt
    monkeypatch.setattr(np, "savetxt", lambda path, *args, **kwargs: savetxt(tmp_path / "no folder" / "log.csv", *args, **kwargs))
    assert status(transformer, "--data", trained[1], "--out-dir", out_dir, *FLAGS) == 0
    assert capsys.readouterr().err.count("log.csv could not be written") == 4 and not (out_dir / "log.csv").exists()
    monkeypatch.undo()
    assert fork("--resume", "--out-dir", out_dir).returncode == 0
    assert_same_end(out_dir, trained[0])  # the log, too
    (tmp_path / "text.txt").write_text("été " * 100, encoding="utf-8")
    done = run("transformer.py", "--data", tmp_path / "text.txt", "--out-dir", tmp_path / "ascii", *FLAGS, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="such names")
@pytest.mark.parametrize("script", ["transformer.py", "bigram.py"])
def test_paths_that_are_not_utf8(script, trained, tmp_path):
    text, out_dir = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"), os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9")
    shutil.copy(trained[1], text)
    flags = [] if script == "bigram.py" else ["--out-dir", out_dir, *FLAGS]
    done = run(script, "--data", text, *flags)
    assert (done.returncode, done.stderr) == (0, "") and "caf?.txt" in done.stdout
    if flags:
        assert_same_end(type(tmp_path)(out_dir), trained[0])


@pytest.mark.skipif(os.name == "nt", reason="a shell")
def test_without_a_standard_output(trained, tmp_path):
    flags = " ".join(map(str, ["--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS]))
    done = subprocess.run(f"{sys.executable} {ROOT}/transformer.py {flags} >&-", shell=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert_same_end(tmp_path / "run", trained[0])


def test_ctrl_c_says_what_helps(trained, tmp_path, monkeypatch, capsys):
    """Before the first save, and while generating, --resume does not."""
    def ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    train_flags = ["--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS]
    monkeypatch.setattr(transformer, "sample", ctrl_c)
    for flags, resume in [(["--prompt", "a", "--out-dir", trained[0]], False), (train_flags, True)]:
        assert status(transformer, *flags) == 130 and ("--resume" in capsys.readouterr().err) == resume
    monkeypatch.setattr(transformer, "estimate_loss", ctrl_c)
    assert status(transformer, *train_flags, "--overwrite") == 130 and "--resume" not in capsys.readouterr().err


def test_a_run_owns_its_folder(trained, tmp_path):
    out_dir, text_file, _ = trained
    before = content(out_dir)
    assert_one_line(train(out_dir, text_file), "--prompt", "--resume", "--out-dir", "--overwrite")
    assert content(out_dir) == before
    pair = [Command("--data", text_file, "--out-dir", tmp_path / "pair", *FLAGS) for _ in range(2)]  # at the same moment
    assert sorted(command.wait().returncode for command in pair) == [0, 2]
    assert_same_end(tmp_path / "pair", out_dir)
    # A run that is killed before its first save leaves a folder that can only be overwritten, and so does --overwrite.
    for folder, more in [("dead", []), ("pair", ["--overwrite"])]:
        path = tmp_path / folder
        assert train(path, text_file, *more, kill=(3, signal.SIGKILL)).returncode == -signal.SIGKILL
        assert not (path / "latest.pt").exists()
        assert_one_line(fork("--resume", "--out-dir", path), "latest.pt")
        assert_one_line(train(path, text_file), "--overwrite")
        assert train(path, text_file, "--overwrite").returncode == 0
        assert_same_end(path, out_dir)


# several processes

def torchrun(n, *args):
    """n processes as torchrun starts them, each with its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    commands = [Command(*args, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)]
    return [command.wait() for command in commands]


def test_several_processes_give_the_losses_of_one_and_only_rank_0_prints(either, tmp_path):
    """Without dropout, up to rounding, and without a warning; and a run of one process is resumed by four."""
    flag, _, text_file = either
    flags = ["--data", text_file, *FLAGS, *flag, "--dropout", 0, "--out-dir"]
    assert fork(*flags, tmp_path / "one").returncode == 0
    killed = Command(*flags, tmp_path / "several", kill=(12, signal.SIGKILL)).wait()
    assert killed.returncode == -signal.SIGKILL and latest(tmp_path / "several")["step"] == 0
    for n, args in [(1, [*flags, tmp_path / "1"]), (2, [*flags, tmp_path / "2"]), (4, ["--resume", "--out-dir", tmp_path / "several"])]:
        done = torchrun(n, *args)
        assert [(d.returncode, d.stderr) for d in done] == [(0, "")] * n
        assert "best model" in done[0].stdout and not any(d.stdout for d in done[1:])
        for one, several in zip(log_of(tmp_path / "one"), log_of(args[-1]), strict=True):
            assert list(several) == pytest.approx(list(one), rel=1e-3)
    done = torchrun(3, *flags, tmp_path / "3")
    assert all(d.returncode == 2 and "multiple of 3" in d.stderr for d in done) and not (tmp_path / "3").exists()


@pytest.mark.parametrize("n", [1, 2])
def test_processes_share_one_choice_of_precision_and_leave_their_group(n, trained, tmp_path):
    """Rank 0 finds float32 faster, rank 1 bfloat16. As torchrun starts them, without a warning."""
    (tmp_path / "page.py").write_text(f"""
import os, sys, timeit
sys.path.insert(0, {str(ROOT)!r})
import torch, transformer
rank = int(os.environ["RANK"])
timeit.repeat = lambda product, **_: [1.0 if (product().dtype == torch.bfloat16) == rank else 2.0]
configs, make = [], transformer.make_optimizers
transformer.make_optimizers = lambda model, config: configs.append(config) or make(model, config)
transformer.main(sys.argv[1:])
with open(__file__ + str(rank), "w") as file:
    print(configs[0].dtype, "left" if not torch.distributed.is_initialized() else "not left", file=file)
""")
    flags = ["--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS, "--dtype", "", "--max-iters", 2]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", tmp_path / "page.py",
                           *map(str, flags)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Warning" not in done.stderr
    assert [(tmp_path / f"page.py{rank}").read_text() for rank in range(n)] == ["float32 left\n"] * n
    assert latest(tmp_path / "run")["config"]["dtype"] == "float32"


def test_torchrun_itself_and_a_killed_process_ends_the_job(trained, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "transformer.py",
               "--data", trained[1], "--out-dir", tmp_path / "two", *map(str, FLAGS), "--max-iters", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while not job.stdout.readline().startswith("step 10 of "):
            assert job.poll() is None
        workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        printed = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and printed.count("step 20:") <= 1


def test_variables_that_a_launcher_left_behind_do_nothing(trained, tmp_path):
    assert train(tmp_path / "run", trained[1], env=dict(WORLD_SIZE="2", RANK="", LOCAL_RANK="x")).returncode == 0
    assert_same_end(tmp_path / "run", trained[0])


# a GPU, as far as it can be tried without one

def test_defaults_are_the_same_on_every_device_and_follow_the_optimizer(trained, monkeypatch, capsys):
    def config(device, **settings):
        args = Namespace(device=device, resume=False, data=trained[1])
        return transformer.start_run(args, dict(n_layer=1, dtype="float32", **settings))[0].config

    monkeypatch.setattr(transformer.GPT, "to", lambda self, device: self)
    assert config("cpu") == config("cuda") == transformer.Config(n_layer=1, dtype="float32")
    adamw = config("cpu", optimizer="adamw", weight_decay=0.7)  # a flag that is given counts
    assert (adamw.learning_rate, adamw.weight_decay) == (1e-3, 0.7)
    assert status(transformer, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in "learning_rate", "weight_decay":
        assert f"default: {getattr(transformer.Config, name)}, with adamw: {getattr(config('cpu', optimizer='adamw'), name)}" in shown


def test_a_gpu_gets_bfloat16_if_it_has_it(monkeypatch):
    for capability, dtype in [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert transformer.fastest_dtype("cuda") == dtype
    assert transformer.fastest_dtype("mps") == "float32"


def test_a_failing_compiler_does_not_end_a_run(trained, tmp_path, monkeypatch):
    class CPUThatIsCalledCUDA(str):
        __eq__, __hash__ = (lambda self, other: other in ("cuda", "cpu")), str.__hash__

    def no_compiler(graph, inputs):
        failed.append(graph)
        raise RuntimeError("no C compiler")

    failed, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=no_compiler))
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    args = Namespace(device=CPUThatIsCalledCUDA("cpu"), out_dir=tmp_path / "run", data=trained[1], resume=False, overwrite=False)
    settings = {**TINY, "max_iters": 30, "eval_interval": 10, "warmup_iters": 15, "dropout": 0.1}
    transformer.train(args, settings)
    assert failed
    assert_same_end(tmp_path / "run", trained[0])


# bad input

@pytest.fixture
def files(tmp_path, text_file, trained):
    """Files and folders that are wrong in some way, by name."""
    shutil.copy(text_file, tmp_path / "text.txt")
    (tmp_path / "trained").symlink_to(trained[0])
    for name, content in [("empty.txt", b""), ("short.txt", b"ab" * 80), ("binary.txt", b"abc\xff" + b"d" * 1000)]:
        (tmp_path / name).write_bytes(content)
    model = (trained[0] / "model.pt").read_bytes()
    earlier = torch.load(trained[0] / "model.pt", weights_only=True)
    earlier["config"]["minutes"] = 20.0
    torch.save(earlier, earlier_file := io.BytesIO())
    for name, content in [("empty", b""), ("cut", model[:-100]), ("other", b"To be"), ("earlier", earlier_file.getvalue()), ("alone", model)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_bytes(content)
        (tmp_path / name / "latest.pt").write_bytes(content)
    return tmp_path


COUNTS = "n-layer", "n-head", "n-embd", "block-size", "batch-size", "max-iters", "eval-interval"
REALS = "dropout", "learning-rate", "weight-decay", "grad-clip"
SAMPLING = ["temperature -0.1", "temperature nan", "temperature inf", "top-k 0", "top-p 0", "top-p 1.1", "top-p nan", "max-new-tokens 0", "seed -1"]
BAD = [  # flags, and what the message must contain; 161: how long a text must be for a block size of 16
    ("--data nope.txt", "nope.txt as UTF-8 text (FileNotFoundError): see --data"), ("--data .", "IsADirectoryError"), ("--data empty.txt", "161"),
    ("--data short.txt", "161"), ("--data binary.txt", "binary.txt as UTF-8"), ("--optimizer adam", "optimizer"), ("--n-embd 15", "multiple of n_head"), ("--dropout 1", "dropout"), ("--dtype float16", "dtype"),
    ("--device abacus", "abacus"), ("--unknown 1", "--unknown"), ("--out-dir text.txt", "text.txt already exists"),
    *[(f"--{name} {value}", name.replace("-", "_")) for name in COUNTS for value in ("0", "-1", "1" + "0" * 30)], ("--n-head 0.5", "0.5"),
    *[(f"--{name} {value}", name.replace("-", "_")) for name in REALS for value in ("-1", "nan", "inf")],
    *[(f"--{flag}", flag[:4]) for flag in ("learning-rate 0", "grad-clip 0", "seed -1", "warmup-iters -1")],
    *[(f"--resume --out-dir {name}", f"{name}/latest.pt, train one first") for name in ("nowhere", "empty", "cut", "other", "earlier")],
    *[(f"--prompt a --out-dir {name}", f"{name}/model.pt, train one first") for name in ("nowhere", "empty", "cut", "other", "earlier")],
    ("--resume --out-dir alone", "is not the text of the saved run"),
    ("--prompt aé --out-dir trained", "'é'"), *[(f"--prompt a --out-dir trained --{flag}", flag[:3]) for flag in SAMPLING],
    *([] if torch.cuda.is_available() else [("--device cuda", "cuda")]),
]


@pytest.mark.parametrize("args, message", BAD, ids=[args for args, _ in BAD])
def test_bad_input_is_one_line_and_changes_nothing(args, message, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    argv = args.split()
    if not {"--prompt", "--resume"} & set(argv):
        argv = ["--data", "text.txt", "--out-dir", "run", *FLAGS, *argv]
    before = content(files)
    returncode = status(transformer, *argv)
    out, err = capsys.readouterr()
    assert_one_line(Namespace(returncode=returncode, stderr=err), message)
    assert out == "" and content(files) == before and not (files / "run").exists()
