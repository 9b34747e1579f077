"""transformer.py as a user runs it: training, writing, interruptions, and everything one can get wrong."""
import csv
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import make_dataclass

import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, Command, fork, run, some_text, status

import transformer

FLAGS = [*TINY_FLAGS, "--max-iters", 30, "--eval-interval", 10, "--warmup-iters", 15, "--dropout", 0.1]
FILES = {"latest.pt", "model.pt", "log.csv", "loss.png", "sample.txt"}


def train(out_dir, text_file, *more, **how):
    return fork("--data", text_file, "--out-dir", out_dir, *FLAGS, *more, **how)


def write(out_dir, *args, **how):
    return fork("--out-dir", out_dir, *args, **how)


def log_of(out_dir):
    """log.csv without the seconds, which no two runs share."""
    rows = list(csv.DictReader((out_dir / "log.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_end(one, other):
    """Two runs ended the same, bit for bit: weights, optimiser, log, best model."""
    assert log_of(one) == log_of(other)
    for name in ("latest.pt", "model.pt"):
        a, b = (torch.load(out / name, weights_only=True) for out in (one, other))
        assert a["depth"] == b["depth"]
        for key in a["model"]:
            assert torch.equal(a["model"][key], b["model"][key]), (name, key)
    a, b = (torch.load(out / "latest.pt", weights_only=True)["optimizer"]["state"] for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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
    assert {file.name for file in out_dir.iterdir()} == FILES
    rows = list(csv.DictReader((out_dir / "log.csv").open()))
    assert list(rows[0]) == "step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm".split(",")
    assert [(int(row["step"]), int(row["tokens"])) for row in rows] == [(0, 0), (10, 640), (20, 1280), (30, 1920)]
    assert float(rows[0]["val_loss"]) == pytest.approx(math.log(len(set(some_text()))), abs=0.1)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert 0 < float(rows[1]["seconds"]) < float(rows[3]["seconds"])
    assert (out_dir / "sample.txt").read_text() in printed
    for part in ("4,000 characters", "2 layers, 7,", "fp32 on cpu", "1 of 2 blocks train for the first 85%",
                 "\nstep 1 of 30 | loss ", "\nstep 25: the model grows to 2 blocks\n", "(on up to 400 characters)"):
        assert part in printed
    model, checkpoint = transformer.load_checkpoint(out_dir / "latest.pt")
    *splits, itos = transformer.load_data(text_file, 16)
    assert checkpoint["itos"] == itos and model.depth == 2
    assert (out_dir / "sample.txt").read_text() == "".join(transformer.sample(model, itos, seed=1337))
    for data, name in zip(splits, ("train_loss", "val_loss")):
        assert f"{transformer.estimate_loss(model, data, 400):.4f}" == f"{float(log_of(out_dir)[-1][name]):.4f}"


def test_the_best_model_by_validation_loss_is_kept(trained, tmp_path, monkeypatch):
    """By losses that are made up: the training loss falls to the end, the other one does not."""
    losses, weights = {"step 0": (4, 5), "step 10": (3, 1), "step 20": (2, 3), "step 30": (1, 2)}, {}

    def evaluate(what, model, splits, max_tokens):
        weights[what] = model.lm_head.weight.clone()
        return dict(zip(("train_loss", "val_loss"), losses.get(what, ())))

    monkeypatch.setattr(transformer, "evaluate", evaluate)
    assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS) == 0
    best, _ = transformer.load_checkpoint(tmp_path / "run" / "model.pt")
    assert best.depth == 1 and torch.equal(best.lm_head.weight, weights["step 10"])
    assert torch.equal(weights["the best model"], weights["step 10"]) and not torch.equal(weights["step 20"], weights["step 10"])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained, tmp_path, monkeypatch):
    out_dir, text_file, _ = trained
    for name, more in [("seed", ["--seed", 7]), ("dropout", ["--dropout", 0])]:
        assert train(tmp_path / name, text_file, *more).returncode == 0
        assert log_of(tmp_path / name)[1] != log_of(out_dir)[1]
    real, drawn = transformer.train_step, []
    monkeypatch.setattr(transformer, "train_step", lambda *args: (drawn.append(torch.initial_seed()), real(*args))[1])
    assert status(transformer, "--data", text_file, "--out-dir", tmp_path / "same", *FLAGS) == 0
    assert_same_end(out_dir, tmp_path / "same")
    assert len(set(drawn)) == 30  # each step has a dropout of its own


def test_minutes_set_max_iters_and_max_iters_repeat_the_run(trained, tmp_path):
    flags = ["--data", trained[1], *TINY_FLAGS, "--warmup-iters", 30, "--dropout", 0.1]
    done = fork("--out-dir", tmp_path / "minutes", *flags, "--minutes", 0.02)
    steps = int(re.search(r"^(\d+) steps fit into 0.02 min", done.stdout, re.MULTILINE)[1])
    assert steps > 15 and log_of(tmp_path / "minutes")[-1]["step"] == str(steps)
    assert fork("--out-dir", tmp_path / "steps", *flags, "--max-iters", steps).returncode == 0
    assert_same_end(tmp_path / "minutes", tmp_path / "steps")


def test_it_writes_between_evaluations_and_that_changes_nothing(trained, tmp_path, monkeypatch, capsys):
    """With a clock that runs 1,000 times as fast a text comes after almost every step."""
    real, start = transformer.time.perf_counter, transformer.time.perf_counter()
    monkeypatch.setattr(transformer.time, "perf_counter", lambda: start + 10_000 * (real() - start))
    assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS) == 0
    monkeypatch.undo()
    assert_same_end(tmp_path / "run", trained[0])
    printed = capsys.readouterr().out
    assert printed.count("\n\n") > 5 and printed.count("| loss ") > 5


def test_a_run_is_drawn_where_there_is_matplotlib(trained, tmp_path):
    from matplotlib.image import imread
    picture = imread(trained[0] / "loss.png")
    assert picture.shape == (720, 960, 4) and (picture[:, :, :3].min(axis=(1, 2)) < 0.9).mean() > 0.5  # more than white
    done = train(tmp_path / "run", trained[1])
    assert done.returncode == 0 and done.stderr == "" and not (tmp_path / "run" / "loss.png").exists()


def test_a_field_added_to_config_is_a_flag(trained, tmp_path, monkeypatch, capsys):
    """Of any type, with a help text or without."""
    added = [("width", int, 3), ("slope", float, transformer.flag(-0.5, "how steep, in %")), ("kind", str, "a"), ("fast", bool, False)]
    monkeypatch.setattr(transformer, "Config", make_dataclass("Config", added, bases=(transformer.Config,)))
    with pytest.raises(SystemExit):
        transformer.main(["--help"])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--width", "how steep, in % (default: -0.5)", "--kind", "--fast", "--no-fast"))
    flags = [*FLAGS, "--max-iters", 1, "--width", 5, "--no-fast"]
    assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *flags) == 0
    config = transformer.load_checkpoint(tmp_path / "run" / "model.pt")[0].config
    assert (config.width, config.slope, config.kind, config.fast) == (5, -0.5, "a", False)
    assert status(transformer, *FLAGS, "--fast", "False") == 2


# writing with the trained model

def test_it_writes_what_generate_generates_and_needs_only_the_model(trained, tmp_path):
    (tmp_path / "moved").mkdir()
    shutil.copy(trained[0] / "model.pt", tmp_path / "moved")
    model, checkpoint = transformer.load_checkpoint(trained[0] / "model.pt")
    idx = torch.tensor(transformer.encode("line 4", checkpoint["itos"])).long()[None]
    for seed in (2, 5):
        out = model.eval().generate(idx, 60, 0.8, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        done = write("moved", "--prompt", "line 4", "--max-new-tokens", 60, "--temperature", 0.8, "--top-k", 5,
                     "--top-p", 0.9, "--seed", seed, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == transformer.decode(out[0].tolist(), checkpoint["itos"]) + "\n"


def test_several_samples_an_empty_prompt_and_a_prompt_from_a_file(trained, tmp_path):
    texts = write(trained[0], "--prompt", "line", "--num-samples", 3, "--max-new-tokens", 40).stdout.split("\n\nline")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert len(write(trained[0], "--prompt", "", "--max-new-tokens", 10).stdout) == 10 + 1
    (tmp_path / "prompt.txt").write_bytes(b"of the\r\ntext.\n")
    done = write(trained[0], "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 10)
    assert done.stdout.startswith("of the\ntext.\n") and len(done.stdout) == 13 + 10 + 1
    assert write(trained[0], "--prompt", "of the\r\ntext.\n", "--max-new-tokens", 10).stdout == done.stdout
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
def test_a_pipe_that_closes_early(trained, tmp_path):
    script = f"{sys.executable} {ROOT}/transformer.py"
    command = f"{script} --out-dir {trained[0]} --prompt line --max-new-tokens 100000000 | head -c 60"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert len(done.stdout) == 60 and done.stderr == b""
    # When training it is like SIGTERM: what there is is saved, and the command has failed.
    flags = " ".join(map(str, [*TINY_FLAGS, "--max-iters", 10**8, "--eval-interval", 10**8]))
    for redirect, index in [("", 1), ("2>&1", 2)]:
        command = f"({script} --data {trained[1]} --out-dir {tmp_path}/{index} {flags} {redirect}; echo $? >{tmp_path}/rc) | head -n 2"
        done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
        assert done.stdout.startswith(b"text ") and int((tmp_path / "rc").read_text()) != 0
        assert (b"--resume goes on" in done.stderr) == (redirect == "")
        assert "run" in transformer.load_checkpoint(tmp_path / str(index) / "latest.pt")[1]


# what stands behind standard output

def test_any_standard_output_will_do(trained, monkeypatch):
    """A notebook's, IDLE's, a thread's, none at all: it has no `reconfigure`, and signals are another's business."""
    for train_too in (False, True):
        with redirect_stdout(io.StringIO()) as printed:
            out_dir = trained[0].with_name(f"thread{train_too}")
            args = ["--data", trained[1], "--out-dir", out_dir, *FLAGS] if train_too else ["--out-dir", trained[0], "--prompt", "line"]
            ended = []
            thread = threading.Thread(target=lambda: ended.append(status(transformer, *args)))
            thread.start()
            thread.join()
        assert not ended[0] and ("finished" if train_too else "line") in printed.getvalue()
    monkeypatch.setattr(sys, "stdout", None)
    assert status(transformer, "--data", trained[1], "--out-dir", trained[0].with_name("none"), *FLAGS) == 0


def test_odd_texts_and_characters_that_a_console_lacks_reach_a_file(tmp_path):
    for word in ("ال أكون ", "a"):
        (tmp_path / "text.txt").write_text(word * 200, encoding="utf-8")
        console = dict(PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
        assert train(tmp_path / "run", tmp_path / "text.txt", "--overwrite").returncode == 0
        done = run("transformer.py", "--out-dir", tmp_path / "run", "--prompt", word, "--max-new-tokens", 20, **console)
        assert done.returncode == 0 and done.stdout.startswith(word) and set(done.stdout) <= {*word, "\n"}


# interruptions

def test_resuming_is_exact(trained, tmp_path):
    """Ctrl-C and SIGTERM again and again: the end is that of the unbroken run, dropout, warm-up and all."""
    out_dir, number, stops = tmp_path / "run", signal.SIGTERM, 0
    command = ["--data", trained[1], "--out-dir", out_dir, *FLAGS]
    going = Command(*command)
    while True:
        going.wait_for("| loss")  # "step 1 of 30 | ...": the first line after a step
        if going.process.is_alive():
            os.kill(going.process.pid, number)
        done = going.wait()
        if done.returncode == 0:  # this time it was at the end before the signal came
            break
        assert done.returncode == 128 + number, done.stderr
        assert "--resume" in done.stdout and done.stderr == ""
        number, stops = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM, stops + 1
        going = Command(*command, "--resume")
    assert stops >= 3
    assert_same_end(out_dir, trained[0])


def test_kill_9_at_any_moment(trained, tmp_path):
    """Killed at random moments, a run always leaves files that load, and ends as if nothing had happened.

    It saves after every step, so that many of the kills come in the middle of a save.
    """
    flags = ["--data", trained[1], *FLAGS, "--n-layer", 1, "--max-iters", 40, "--eval-interval", 1]
    assert fork("--out-dir", tmp_path / "unbroken", *flags).returncode == 0
    out_dir, rng, kills = tmp_path / "run", random.Random(0), 0
    latest = out_dir / "latest.pt"
    while not latest.exists() or transformer.load_checkpoint(latest)[1]["run"]["step"] < 40:
        going = Command("--out-dir", out_dir, *flags, "--resume" if latest.exists() else "--overwrite")
        going.wait_for("text")
        going.process.join(timeout=0.2 * rng.random() + 0.02 * kills)  # longer each time: it gets there
        kills += going.process.is_alive()
        going.process.kill()
        going.process.join()
        for file in out_dir.glob("*.pt"):
            transformer.load_checkpoint(file)
    assert kills >= 3
    assert_same_end(out_dir, tmp_path / "unbroken")


def test_a_second_ctrl_c_ends_it_at_once(trained, monkeypatch, tmp_path):
    """During an evaluation, say, that someone does not want to wait for. (SIGTERM again is SIGTERM once more.)"""
    def train(*run):
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert transformer.stopped == [signal.SIGTERM, signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(transformer, "train", train)
    try:
        assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS) == 130
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])


def test_a_run_can_be_trained_for_longer(trained, tmp_path, monkeypatch):
    """From another folder, too, though the path of its text was relative to the first."""
    monkeypatch.chdir(trained[1].parent)
    out_dir = tmp_path / "run"
    assert train(out_dir, "text.txt").returncode == 0
    done = fork("--resume", "--out-dir", out_dir, "--n-embd", 16, cwd=tmp_path)  # which it has already
    assert done.returncode == 0 and "finished after step 30" in done.stdout and "--max-iters" in done.stdout
    assert_same_end(out_dir, trained[0])
    shutil.move(out_dir, tmp_path / "out/transformer")  # and to another place
    out_dir = tmp_path / "out/transformer"
    done = fork("--resume", "--max-iters", 40, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in log_of(out_dir)] == ["0", "10", "20", "30", "40"]
    done = fork("--resume", "--max-iters", 25, cwd=tmp_path)  # it is beyond that
    assert done.returncode == 0 and "finished after step 40" in done.stdout and len(log_of(out_dir)) == 5


def test_resuming_with_other_settings_or_another_text_is_refused(trained, tmp_path):
    out_dir, text_file, _ = trained
    before = content(out_dir)
    resume = ["--resume", "--out-dir", out_dir, "--max-iters", 40]
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:-1] + "!")  # the same characters, but for one
    for args, message in [(["--data", text_file, "--n-layer", 3], "--n-layer: the saved run has 2"),
                          (["--data", other], "not the text"), (["--data", tmp_path / "gone"], "--data FILE")]:
        done = fork(*resume, *args)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "latest.pt").write_bytes((out_dir / "model.pt").read_bytes())
    done = fork("--resume", "--out-dir", tmp_path / "alone")
    assert done.returncode == 2 and "no run to go on with" in done.stderr and done.stderr.count("\n") == 1
    assert content(out_dir) == before


def test_a_run_takes_its_folder_from_its_first_moment_on(trained, tmp_path, monkeypatch):
    out_dir, text_file, _ = trained
    before = content(out_dir)
    done = train(out_dir, text_file)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in ("--prompt", "--resume", "--out-dir", "--overwrite"))
    assert content(out_dir) == before

    def dies(model, config):  # before anything is saved
        raise KeyboardInterrupt

    monkeypatch.setattr(transformer, "make_optimizer", dies)
    assert status(transformer, "--data", text_file, "--out-dir", tmp_path / "run", *FLAGS) == 130
    done = train(tmp_path / "run", text_file)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert train(tmp_path / "run", text_file, "--overwrite").returncode == 0
    assert_same_end(tmp_path / "run", out_dir)


@pytest.mark.parametrize("function, calls, error, message", [
    ("train_step", 12, transformer.UserError("the loss is not a finite number"), "not a finite number"),
    ("write_file", 8, OSError(28, "No space left on device"), "cannot save: No space left on device"),  # the third latest.pt
    ("get_batch", 12, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "--batch-size"),
    ("get_batch", 12, MemoryError(), "--batch-size"),
])
def test_what_ends_a_run_gets_one_line_and_what_was_saved_is_intact(function, calls, error, message, trained, tmp_path, monkeypatch, capsys):
    real, called = getattr(transformer, function), []

    def fails(*args):
        called.append(args)
        if len(called) > calls:
            raise error
        return real(*args)

    monkeypatch.setattr(transformer, function, fails)
    assert status(transformer, "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("transformer.py: error: ") and message in printed and printed.count("\n") == 1
    monkeypatch.undo()
    assert train(tmp_path / "run", trained[1], "--resume").returncode == 0
    assert_same_end(tmp_path / "run", trained[0])


# several processes

def test_two_processes_go_on_where_one_stopped_and_end_where_one_ends(trained, tmp_path):
    """With dropout off, to rounding; and only the first of the two prints and saves. The model grows in between."""
    going = Command("--data", trained[1], "--out-dir", tmp_path / "one", *TINY_FLAGS, "--warmup-iters", 50,
                    "--eval-interval", 20, "--max-iters", 60)
    going.wait_for("| loss")
    os.kill(going.process.pid, signal.SIGTERM)
    assert going.wait().returncode == 143
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    resume = ["--resume", "--out-dir"]
    assert fork(*resume, tmp_path / "one").returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(ROOT / "transformer.py"), *resume, str(tmp_path / "two")],
                          capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 60: train loss") == 1 and done.stdout.count("the model grows to 2 blocks") == 1
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"]
        assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), abs=1e-4)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-3)


def test_variables_left_over_by_a_launcher_do_not_matter(trained, tmp_path):
    left = dict(WORLD_SIZE="2", RANK="", LOCAL_RANK="x")
    done = run("transformer.py", "--data", trained[1], "--out-dir", tmp_path / "run", *FLAGS, **left)
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "run", trained[0])


def test_a_batch_that_cannot_be_split(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "WORLD_SIZE", 3)
    with pytest.raises(transformer.UserError, match="--batch-size must be a multiple of 3"):
        transformer.set_up(transformer.Config(**TINY, data=trained[1], out_dir=tmp_path / "run"), {})


# bad input

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
    ("--data nope.txt", "no text nope.txt: give one with --data FILE"),
    ("--data .", "directory"),
    ("--data unreadable.txt", "unreadable.txt: Permission denied"),
    ("--data empty.txt", "161"), ("--data short.txt", "161"),  # how long a text must be for windows of 16
    ("--data binary.txt", "binary.txt is not UTF-8 text: see byte 3; save it as UTF-8, or unpack it"),
    ("--n-embd 15", "--n-embd must be a multiple of --n-head"),
    ("--precision fp8", "--precision"), ("--device abacus", "abacus"), ("--unknown 1", "--unknown"),
    ("--out-dir text.txt", "text.txt: File exists"),
    ("--out-dir sealed", "sealed/log.csv: Permission denied"),
    ("--n-layer 100 --n-embd 10000", "billion"),
    ("--resume --out-dir nowhere", "no nowhere/latest.pt"),
    ("--data= ", "--data is empty"), ("--out-dir= ", "--out-dir is empty"), ("--prompt-file= ", "--prompt-file is empty"),
    *[(f"--{name} {value}", f"--{name}") for value in ("0", "nan", "1" + "0" * 30)
      for name in ("n-layer", "n-head", "n-embd", "block-size", "batch-size", "max-iters", "eval-interval", "eval-tokens")],
    *[(f"--{name} {value}", f"--{name}") for value in ("-1", "nan", "1e30")
      for name in ("dropout", "learning-rate", "weight-decay", "beta2", "grad-clip", "warmup-iters", "seed", "minutes")],
    ("--minutes 1 --max-iters 1", "minutes and max_iters, not both"), ("--dropout 1", "--dropout"), ("--learning-rate 0", "--learning-rate"),
    ("--beta2 1", "--beta2"), ("--grow-at 1", "--grow-at"),
    # writing
    ("--prompt a --out-dir nowhere", "no nowhere/model.pt: train a model"),
    ("--prompt a --out-dir damaged", "damaged/model.pt is damaged"),
    ("--prompt aé --out-dir trained", "'é'"),
    ("--prompt -hello --out-dir trained", "--prompt"),
    ("--prompt line\\nline --out-dir trained", r"'\\'"),
    ("--prompt a --prompt-file b", "not both"),
    ("--prompt-file nope.txt --out-dir trained", "nope.txt: No such file"),
    ("--prompt a --out-dir trained --n-layer 2", "--n-layer is for training"),
    ("--temperature 1", "--prompt"),
    *[(f"--prompt a --out-dir trained --{name} {value}", f"--{name}") for name, value in [
        ("temperature", "-0.1"), ("temperature", "nan"), ("top-k", "0"), ("top-p", "0"), ("top-p", "1.1"),
        ("max-new-tokens", "0"), ("num-samples", "0"), ("seed", "-1")]],
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
        argv = ["--data", "text.txt", *FLAGS, *argv]
        if "--minutes" in args and "--max-iters" not in args:
            del argv[argv.index("--max-iters"):argv.index("--max-iters") + 2]
    before = sorted(str(path) for path in files.rglob("*"))
    assert status(transformer, *argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("transformer.py: error: ") and captured.err.count("\n") == 1
    assert message in captured.err and "[Errno" not in captured.err and captured.out == ""
    assert sorted(str(path) for path in files.rglob("*")) == before


def test_the_command_that_is_shown_can_be_pasted(trained, tmp_path):
    done = train(tmp_path / "my run's folder", trained[1])
    command = done.stdout.splitlines()[-1].replace("python", sys.executable, 1).replace("transformer.py", f"{ROOT}/transformer.py")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) == 500 + 1
