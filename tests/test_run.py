"""transformer.py as a user runs it: training, writing, interruptions, and everything one can get wrong."""
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, Command, fork, run, some_text
from hypothesis import given, settings, strategies as st

import transformer

FLAGS = [*TINY_FLAGS, "--max-iters", 30, "--eval-interval", 10, "--eval-tokens", 500, "--warmup-iters", 15,
         "--dropout", 0.1, "--noise", 0.1, "--rename", 0.5]


def train(out_dir, text_file, *more, **how):
    return fork("--data", text_file, "--out-dir", out_dir, *FLAGS, *more, **how)


def log_of(out_dir):
    """log.csv without the seconds, which no two runs share."""
    rows = list(csv.DictReader((out_dir / "log.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_end(one, other):
    """Two runs ended the same, bit for bit: weights, optimiser, log, best model, sample."""
    assert log_of(one) == log_of(other)
    for name in ("latest.pt", "model.pt"):
        a, b = (torch.load(out / name, weights_only=True) for out in (one, other))
        for key in a["model"]:
            assert torch.equal(a["model"][key], b["model"][key]), (name, key)
    a, b = (torch.load(out / "latest.pt", weights_only=True)["optimizer"]["state"] for out in (one, other))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    assert (one / "sample.txt").read_text() == (other / "sample.txt").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: (its folder, the text, what the command printed)."""
    folder = tmp_path_factory.mktemp("trained")
    text_file = folder / "text.txt"
    text_file.write_text(some_text())
    done = run("transformer.py", "--data", text_file, "--out-dir", folder / "run", *FLAGS, cwd=folder)  # with matplotlib
    assert done.returncode == 0, done.stderr
    return folder / "run", text_file, done.stdout


# training

def test_a_run_leaves_a_model_a_log_and_a_sample(trained):
    out_dir, text_file, printed = trained
    assert {file.name for file in out_dir.iterdir()} == set(transformer.FILES)
    rows = list(csv.DictReader((out_dir / "log.csv").open()))
    assert list(rows[0]) == "step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm".split(",")
    assert [(int(row["step"]), int(row["tokens"])) for row in rows] == [(10, 640), (20, 1280), (30, 1920)]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert 0 < float(rows[0]["seconds"]) < float(rows[2]["seconds"])
    assert (out_dir / "sample.txt").read_text() in printed
    assert "device cpu, precision fp32" in printed and "4,000 characters" in printed
    assert "n_layer 1, 4," in printed and re.search(r"^step 25: the model grows to n_layer 2, 7,", printed, re.MULTILINE)
    assert "this takes about" in printed and "--prompt" in printed.splitlines()[-1]
    assert "\r" not in printed  # a file is no terminal


def test_the_log_holds_the_losses_of_the_saved_model(trained):
    out_dir, text_file, _ = trained
    model, checkpoint = transformer.load_checkpoint(out_dir / "latest.pt")
    train_data, val_data, itos = transformer.load_data(text_file, 16)
    assert checkpoint["itos"] == itos
    row = log_of(out_dir)[-1]
    for data, name in ((train_data, "train_loss"), (val_data, "val_loss")):
        assert f"{transformer.estimate_loss(model, data, len(val_data), 'cpu'):.4f}" == f"{float(row[name]):.4f}"


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained, tmp_path):
    out_dir, text_file, _ = trained
    assert train(tmp_path / "same", text_file, cwd=tmp_path).returncode == 0
    assert_same_end(out_dir, tmp_path / "same")
    assert train(tmp_path / "other", text_file, "--seed", 7).returncode == 0
    assert log_of(tmp_path / "other") != log_of(out_dir)


def number_of_steps(printed):
    return int(re.search(r"^(\d+) steps fit", printed, re.MULTILINE)[1])


def test_minutes_set_max_iters_and_max_iters_repeat_the_run(trained, tmp_path):
    flags = ["--data", trained[1], *TINY_FLAGS, "--warmup-iters", 30, "--dropout", 0.1]
    done = fork("--out-dir", tmp_path / "minutes", *flags, "--minutes", 0.01)
    assert done.returncode == 0, done.stderr
    steps = number_of_steps(done.stdout)
    assert steps > 15 and log_of(tmp_path / "minutes")[-1]["step"] == str(steps)
    assert fork("--out-dir", tmp_path / "steps", *flags, "--max-iters", steps).returncode == 0
    assert_same_end(tmp_path / "minutes", tmp_path / "steps")


def test_minutes_that_are_interrupted(trained, tmp_path):
    """Before and after it is known how many steps fit; the same command with --resume goes on."""
    command = ["--data", trained[1], "--out-dir", tmp_path, *TINY_FLAGS, "--warmup-iters", 400]  # and 20 minutes, by default
    for seen, more in [("steps will show", []), ("steps fit", ["--resume"]), ("step", ["--resume"])]:
        going = Command(*command, *more)
        going.wait_for(seen)
        os.kill(going.process.pid, signal.SIGTERM)
        done = going.wait()
        assert done.returncode == 143, done.stderr
        assert ("fit into 20 min" in done.stdout) == (seen != "step")
        if seen == "steps fit":
            steps = number_of_steps(done.stdout)
    assert transformer.load_checkpoint(tmp_path / "latest.pt")[1]["run"]["max_iters"] == steps
    assert f"of {steps}, and saved" in done.stdout


def test_a_run_is_drawn(trained, tmp_path):
    from matplotlib.image import imread
    picture = imread(trained[0] / "loss.png")
    assert picture.shape == (720, 960, 4)
    assert (picture[:, :, :3].min(axis=(1, 2)) < 0.9).mean() > 0.5  # more than a frame and white
    transformer.draw_log(tmp_path / "nothing.png", (trained[0] / "log.csv").read_text().split("\n")[:1])
    assert not (tmp_path / "nothing.png").exists()  # no evaluation, no picture


def test_without_matplotlib_a_run_says_how_to_draw_it(trained, tmp_path):
    done = train(tmp_path, trained[1])
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("pip install matplotlib") == 1 and not (tmp_path / "loss.png").exists()
    done = fork("--resume", "--data", trained[1], "--out-dir", tmp_path, picture=True)
    assert done.returncode == 0 and "pip install" not in done.stdout and (tmp_path / "loss.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == set(transformer.FILES)  # nothing half-written is left


def test_a_text_of_one_character_only(tmp_path):
    text_file = tmp_path / "text.txt"
    text_file.write_text("a" * 1000)
    done = train(tmp_path / "run", text_file)
    assert done.returncode == 0 and "val loss 0.0000" in done.stdout
    assert fork("--out-dir", tmp_path / "run", "--prompt", "a", "--max-new-tokens", 5).stdout == "aaaaaa\n"


def test_on_a_terminal_the_status_line_is_rewritten(trained, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    args = ["--data", trained[1], "--out-dir", tmp_path, *FLAGS, "--eval-interval", 30]
    done = subprocess.Popen([sys.executable, str(ROOT / "transformer.py"), *map(str, args)], stdout=theirs,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    printed = b""
    try:
        while piece := os.read(ours, 10_000):
            printed += piece
    except OSError:  # how a terminal ends
        pass
    assert done.wait() == 0
    assert b"\rstep 1 of 30 | loss " in printed and b"tokens/s" in printed and b"left" in printed


# writing with the trained model

def write(out_dir, *args, **how):
    return fork("--out-dir", out_dir, *args, **how)


def test_writing_needs_no_text_and_prints_only_the_text(trained, tmp_path):
    out_dir = tmp_path / "moved"
    out_dir.mkdir()
    (out_dir / "model.pt").write_bytes((trained[0] / "model.pt").read_bytes())
    done = write(out_dir, "--prompt", "Speaker 1", "--max-new-tokens", 40, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Speaker 1") and len(done.stdout) == 9 + 40 + 1
    assert write(out_dir, "--prompt", "Speaker 1", "--max-new-tokens", 40).stdout == done.stdout
    assert write(out_dir, "--prompt", "Speaker 1", "--max-new-tokens", 40, "--seed", 5).stdout != done.stdout


def test_it_writes_what_generate_generates(trained):
    model, checkpoint = transformer.load_checkpoint(trained[0] / "model.pt")
    itos = checkpoint["itos"]
    idx = torch.from_numpy(transformer.encode("line 4", itos)).long()[None]
    out = model.eval().generate(idx, 60, 0.8, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(2))
    done = write(trained[0], "--prompt", "line 4", "--max-new-tokens", 60, "--temperature", 0.8, "--top-k", 5, "--top-p", 0.9,
                 "--seed", 2)
    assert done.stdout == transformer.decode(out[0].tolist(), itos) + "\n"


def test_several_samples_an_empty_prompt_and_a_prompt_from_a_file(trained, tmp_path):
    done = write(trained[0], "--prompt", "line", "--num-samples", 3, "--max-new-tokens", 10)
    assert len(done.stdout) == 3 * (4 + 10 + 1) + 2 and done.stdout.count("line") >= 3
    assert len(write(trained[0], "--prompt", "", "--max-new-tokens", 10).stdout) == 10 + 1
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("of the text.\n")
    done = write(trained[0], "--prompt-file", prompt, "--max-new-tokens", 10)
    assert done.stdout.startswith("of the text.\n") and len(done.stdout) == 13 + 10 + 1
    long = "line 4 of the text.\n" * 10  # longer than the context
    assert write(trained[0], "--prompt", long, "--max-new-tokens", 10).stdout.startswith(long)


def test_characters_come_one_by_one_and_ctrl_c_ends_it(trained):
    writer = subprocess.Popen([sys.executable, str(ROOT / "transformer.py"), "--out-dir", str(trained[0]), "--prompt", "line",
                               "--max-new-tokens", "100000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(writer.stdout.read(50)) == 50  # long before the end
    writer.send_signal(signal.SIGINT)
    writer.stdout.read()
    assert writer.wait(timeout=20) == 130 and writer.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="a shell with pipes")
def test_a_pipe_that_closes_early(trained):
    command = f"{sys.executable} {ROOT}/transformer.py --out-dir {trained[0]} --prompt line --max-new-tokens 100000000 | head -c 60"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert len(done.stdout) == 60 and done.stderr == b""


# interruptions

def test_resuming_is_exact(trained, tmp_path):
    """Ctrl-C and SIGTERM again and again: the end is that of the unbroken run, dropout, warm-up and all."""
    out_dir, number, stops = tmp_path / "run", signal.SIGTERM, 0
    command = ["--data", trained[1], "--out-dir", out_dir, *FLAGS]
    going = Command(*command)
    while True:
        going.wait_for("step")  # "step 1 of 30 | ...": the first line after a step
        if going.process.is_alive():
            os.kill(going.process.pid, number)
        done = going.wait()
        if done.returncode == 0:  # this time it was at the end before the signal came
            break
        assert done.returncode == 128 + number, done.stderr
        assert "stopped after step" in done.stdout and "--resume" in done.stdout and done.stderr == ""
        if stops == 0:  # before the first evaluation even, there is a model to write with
            assert fork("--out-dir", out_dir, "--prompt", "line", "--max-new-tokens", 5).returncode == 0
        number, stops = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM, stops + 1
        going = Command(*command, "--resume")
    assert stops >= 3
    assert_same_end(out_dir, trained[0])


def test_kill_9_at_any_moment(trained, tmp_path):
    """Killed at random moments, a run always leaves files that load, and ends as if nothing had happened.

    It saves after every step, so that many of the kills come in the middle of a save.
    """
    flags = ["--data", trained[1], *FLAGS, "--n-layer", 1, "--max-iters", 20, "--eval-interval", 1]
    assert fork("--out-dir", tmp_path / "unbroken", *flags).returncode == 0
    out_dir, rng, kills = tmp_path / "run", random.Random(0), 0
    latest = out_dir / "latest.pt"
    while not latest.exists() or transformer.load_checkpoint(latest)[1]["progress"][0] < 20:
        going = Command("--out-dir", out_dir, *flags, "--resume" if latest.exists() else "--overwrite")
        going.wait_for("step" if kills else "device")
        going.process.join(timeout=0.2 * rng.random() + 0.02 * kills)  # longer each time: it gets there
        kills += going.process.is_alive()
        going.process.kill()
        going.process.join()
        for file in out_dir.glob("*.pt"):
            transformer.load_checkpoint(file)
    assert kills >= 3
    assert_same_end(out_dir, tmp_path / "unbroken")


def test_a_second_signal_ends_it_at_once(trained, tmp_path):
    """During an evaluation, say, that someone does not want to wait for."""
    signals = transformer.catch_signals()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_run_can_be_trained_for_longer(trained, tmp_path):
    out_dir = tmp_path / "run"
    assert train(out_dir, trained[1]).returncode == 0
    done = fork("--resume", "--data", trained[1], "--out-dir", out_dir)
    assert done.returncode == 0 and "finished after step 30" in done.stdout and "--max-iters" in done.stdout
    assert_same_end(out_dir, trained[0])
    done = fork("--resume", "--data", trained[1], "--out-dir", out_dir, "--max-iters", 40)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in log_of(out_dir)] == ["10", "20", "30", "40"]


def test_resuming_with_other_settings_or_another_text_is_refused(trained, tmp_path):
    out_dir, text_file, _ = trained
    before = {file.name: file.read_bytes() for file in out_dir.iterdir()}
    resume = ["--resume", "--out-dir", out_dir, "--max-iters", 40]
    done = fork(*resume, "--data", text_file, "--n-layer", 3)
    assert done.returncode == 2 and "--n-layer 3 contradicts the saved run's 2" in done.stderr
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:-1] + "!")  # the same characters, but for one
    done = fork(*resume, "--data", other)
    assert done.returncode == 2 and "not the text" in done.stderr
    assert {file.name: file.read_bytes() for file in out_dir.iterdir()} == before


def test_a_model_alone_is_no_run_to_resume(trained, tmp_path):
    (tmp_path / "latest.pt").write_bytes((trained[0] / "model.pt").read_bytes())
    done = train(tmp_path, trained[1], "--resume")
    assert done.returncode == 2 and "not a run to go on with" in done.stderr and done.stderr.count("\n") == 1


def test_a_second_run_does_not_destroy_the_first(trained, tmp_path):
    out_dir, text_file, _ = trained
    before = {file.name: file.read_bytes() for file in out_dir.iterdir()}
    done = train(out_dir, text_file)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in ("--prompt", "--resume", "--out-dir", "--overwrite"))
    assert {file.name: file.read_bytes() for file in out_dir.iterdir()} == before

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "log.csv").write_text("mine")
    assert train(mine, text_file).returncode == 2 and (mine / "log.csv").read_text() == "mine"
    assert train(mine, text_file, "--overwrite").returncode == 0
    assert_same_end(mine, out_dir)


def test_a_loss_that_is_no_number_ends_the_run(trained, tmp_path):
    done = train(tmp_path, trained[1], "--learning-rate", 10, "--grad-clip", 1e9, "--n-layer", 8, "--max-iters", 10_000,
                 "--eval-interval", 3, "--weight-decay", 100)
    assert done.returncode == 2 and "not a finite number" in done.stderr and "--learning-rate" in done.stderr
    for file in tmp_path.glob("*.pt"):
        model, _ = transformer.load_checkpoint(file)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_full_disk(trained, tmp_path, monkeypatch, capsys):
    """The disk fills up while a checkpoint is written: one line, and the state from before is intact."""
    out_dir = tmp_path / "run"
    argv = [str(part) for part in ("--data", trained[1], "--out-dir", out_dir, *FLAGS)]
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 5:  # the first evaluation writes four files
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(transformer.os, "fsync", fsync)
    assert transformer.main(argv) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert not list(out_dir.glob("*.part"))
    done = train(out_dir, trained[1], "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_end(out_dir, trained[0])


def test_out_of_memory_names_the_batch_size(monkeypatch, capsys):
    def run(argv):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(transformer, "run", run)
    assert transformer.main([]) == 2
    captured = capsys.readouterr()
    assert "--batch-size" in captured.err and captured.err.count("\n") == 1


# several processes

def test_two_processes_go_on_where_one_stopped_and_end_where_one_ends(trained, tmp_path):
    """With dropout off, to rounding; and only the first of the two prints and saves. The model grows in between."""
    going = Command("--data", trained[1], "--out-dir", tmp_path / "one", *TINY_FLAGS, "--warmup-iters", 50,
                    "--eval-interval", 20, "--eval-tokens", 500)
    going.wait_for("steps will show")
    os.kill(going.process.pid, signal.SIGTERM)
    assert going.wait().returncode == 143
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    resume = ["--resume", "--data", str(trained[1]), "--max-iters", "60", "--out-dir"]
    assert fork(*resume, tmp_path / "one").returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(ROOT / "transformer.py"), *resume, str(tmp_path / "two")],
                          capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 60: train loss") == 1 and done.stdout.count("the model grows to n_layer 2") == 1
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"]
        assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), abs=1e-4)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-3)


def test_a_batch_that_cannot_be_split(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformer, "WORLD_SIZE", 3)
    assert transformer.main([str(part) for part in ("--out-dir", tmp_path / "run", "--data", trained[1], *FLAGS)]) == 2
    assert "--batch-size 4 cannot be split evenly over 3 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# bad input

def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        transformer.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for field in transformer.Config.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in printed
    assert "blocks, one after the other (default 6)" in printed


@pytest.fixture
def files(tmp_path, text_file):
    """Files and folders that are wrong in some way, by name."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("ab" * 80)
    (tmp_path / "binary.txt").write_bytes(b"abc\xff" + b"d" * 1000)
    (tmp_path / "unreadable.txt").write_text("a" * 1000)
    (tmp_path / "unreadable.txt").chmod(0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.pt").write_bytes(b"PK\x03\x04" + b"\x00" * 100)
    (tmp_path / "sealed").mkdir(mode=0o500)
    return tmp_path


BAD = [
    ("--data nope.txt", "nope.txt"),
    ("--data .", "directory"),
    ("--data unreadable.txt", "ermission"),
    ("--data empty.txt", "170"),  # how long a text must be for windows of 16
    ("--data short.txt", "170"),
    ("--data binary.txt", "byte 3"),
    ("--n-embd 15", "--n-embd 15 must be a multiple of --n-head 2"),
    ("--precision fp8", "--precision"),
    ("--device abacus", "abacus"),
    ("--unknown 1", "--unknown"),
    ("--out-dir text.txt", "text.txt"),
    ("--out-dir sealed", "ermission"),
    ("--n-layer 100 --n-embd 10000", "billion"),
    ("--resume --out-dir nowhere", "nowhere"),
    *[(f"--{name} {value}", f"--{name}") for value in ("0", "-1", "nan", "x", "1" + "0" * 30)
      for name in ("n-layer", "n-head", "n-embd", "block-size", "batch-size", "max-iters", "eval-interval", "eval-tokens")],
    *[(f"--{name} {value}", f"--{name}") for value in ("-1", "nan", "inf", "x", "1e30")
      for name in ("dropout", "learning-rate", "weight-decay", "beta2", "grad-clip", "warmup-iters", "seed", "minutes")],
    ("--minutes 1 --max-iters 1", "--minutes"), ("--max-iters 1000000000", "--max-iters"),
    ("--dropout 1", "--dropout"), ("--learning-rate 0", "--learning-rate"), ("--grad-clip 0", "--grad-clip"),
    # writing
    ("--prompt a --out-dir nowhere", "nowhere"),
    ("--prompt a --out-dir damaged", "damaged"),
    ("--prompt aé --out-dir trained", "'é'"),
    ("--prompt-file nope.txt --out-dir trained", "nope.txt"),
    ("--prompt a --out-dir trained --n-layer 2", "--n-layer"),
    ("--temperature 1", "--prompt"),
    *[(f"--prompt a --out-dir trained --{name} {value}", f"--{name}") for name, value in [
        ("temperature", "-0.1"), ("temperature", "nan"), ("top-k", "0"), ("top-p", "0"), ("top-p", "1.1"), ("top-p", "nan"),
        ("max-new-tokens", "0"), ("max-new-tokens", "-1"), ("num-samples", "0"), ("seed", "-1")]],
]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", "cuda"))


@pytest.mark.parametrize("args, message", BAD, ids=[args for args, _ in BAD])
def test_bad_input_gets_one_line_and_changes_nothing(args, message, files, trained, monkeypatch, capsys):
    if "ermission" in message and os.geteuid() == 0:
        pytest.skip("root may do anything")
    monkeypatch.chdir(files)
    (files / "trained").symlink_to(trained[0])
    argv = args.split()
    if "--prompt" not in args:
        argv = [str(part) for part in ("--data", "text.txt", *FLAGS, *argv)]
    before = sorted(str(path) for path in files.rglob("*"))
    assert transformer.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("transformer.py: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""
    assert sorted(str(path) for path in files.rglob("*")) == before


def test_bad_input_as_a_command(text_file, tmp_path):
    done = run("transformer.py", "--data", text_file, "--n-layer", 0, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "transformer.py: --n-layer must be from 1 to 100, not 0\n"


NAMES = ["--" + name.replace("_", "-") for name in transformer.Config.__dataclass_fields__]
values = st.one_of(st.integers().map(str), st.floats().map(str), st.text(), st.sampled_from(["", "cpu", "fp32", "1", "2"]))


@settings(deadline=None, max_examples=80)
@given(flags=st.lists(st.tuples(st.sampled_from(NAMES + ["--top-k", "--x"]), values), max_size=4))
def test_any_flags_either_make_sense_or_get_one_line(flags):
    """Random values for the flags: a run would start (train is not called here), or there is one UserError."""
    started = []
    real, transformer.train = transformer.train, lambda config, checkpoint, stopped: started.append(config)
    try:
        transformer.run([f"{name}={value}" for name, value in flags])
    except transformer.UserError as error:
        assert "\n" not in str(error).strip() or any("\n" in value for _, value in flags)
    else:
        config, = started
        transformer.GPT(transformer.Config(n_layer=1, n_embd=config.n_head, n_head=config.n_head, block_size=1), 2)
    finally:
        transformer.train = real
