"""train.py: the same numbers however a batch is cut, a run that survives being killed, and errors that say what to do.

Everything runs on a model of 0.1M parameters. Two processes are started once, by torchrun, for all tests that need them.
"""
import dataclasses
import json
import math
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import backbones
import data as d
import model as m
import train
from upcycle import load, load_backbones, save, upcycle

ROOT = os.path.dirname(os.path.abspath(train.__file__))
SMALL = dict(vision=dict(image_size=48, patch_size=8, dim=32, n_layers=3, n_heads=4, ffn_dim=64),
             text=dict(vocab_size=512, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, rope_theta=1e4), template="tiny")
TIMES = ("images_per_s", "seconds", "waiting")       # what may differ between two runs of the same thing

# Runs jobs one after the other in this process, as `python train.py ARGV` would, with a fault at the n-th batch or checkpoint:
# argv of this script: project root, result file, JSON list of {"argv", "fault": None | "kill" | "interrupt" | "half", "at", "rank",
# "file": another program than train.py}
SCRIPT = """
import json, os, runpy, signal, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
root, result_file, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path[:0] = [root, os.path.join(root, "assets")]
import data, train
from torch.distributed.checkpoint import FileSystemWriter
real_collate, real_write, result = data.collate, FileSystemWriter.write_data, []
if train.LAUNCHED:                                  # one process group for all jobs
    dist.init_process_group("gloo")
    leave, dist.init_process_group, dist.destroy_process_group = dist.destroy_process_group, lambda *_, **__: None, lambda: None
for job in jobs:
    calls, fault = 0, job.get("fault") if train.RANK == job.get("rank", 0) else None
    def collate(samples):
        global calls
        calls += 1
        if calls == job["at"]:
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGINT)
        return real_collate(samples)
    def half(writer, *args):
        global calls
        calls += 1
        done = real_write(writer, *args)
        if calls == job["at"]:
            name = os.path.join(writer.path, "__0_0.distcp")
            os.truncate(name, os.path.getsize(name) // 2)
            os._exit(9)
        return done
    data.collate = collate if fault in ("kill", "interrupt") else real_collate
    FileSystemWriter.write_data = half if fault == "half" else real_write
    sys.argv = ["train.py", *job["argv"]]
    try:
        runpy.run_path(job.get("file", train.__file__), run_name="__main__")
        result.append(None)
    except SystemExit as e:
        if len(jobs) == 1:
            raise
        result.append(e.code)
    with open(result_file + str(train.RANK), "w") as f:
        json.dump(result, f)
if train.LAUNCHED:
    leave()
"""


def start(folder, jobs, processes=1, timeout=300):
    """Run the jobs in their own process(es) -> (exit code, stdout, stderr)."""
    script = os.path.join(folder, "script.py")
    with open(script, "w") as f:
        f.write(SCRIPT)
    launch = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    p = subprocess.Popen([*launch, script, ROOT, os.path.join(folder, "result"), json.dumps(jobs)], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        out, err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        raise
    return p.returncode, out, err


@pytest.fixture(autouse=True)
def quiet_machine():
    """One thread, so that sums are bit for bit the same in every process; and signal handlers as they were."""
    threads, handlers = torch.get_num_threads(), [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for s, handler in handlers:
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dense model folder to start from."""
    folder = str(tmp_path_factory.mktemp("base"))
    scenes = [d.make_scene(i) for i in range(200)]
    texts = [d.describe(s) for s in scenes] + [f"{q} {a}" for s in scenes for _, q, a in d.ask_many(s, 6, random.Random(0))]
    torch.manual_seed(0)
    save(m.CuMo(m.Config(**SMALL)), folder, d.train_tokenizer(texts, 512))
    return folder


def flags(base, out, *more):
    more = [str(f) for f in more]
    given = {"--init": base, "--out": out, "--device": "cpu", "--batch-size": 8, "--eval-questions": 9, "--steps": 5}
    if "--data" in more:                                                           # of these nobody asks drawn questions
        del given["--eval-questions"]
    return [str(x) for kv in given.items() if kv[0] not in more for x in kv] + more


def run(base, out, *more):
    train.main(flags(base, out, *more))
    return str(out)


def command_line(argv, monkeypatch):
    """`python train.py ARGV` in this process -> what it exits with (None: success)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    try:
        runpy.run_path(train.__file__, run_name="__main__")
    except SystemExit as e:
        return e.code


def rows(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def checkpoint(out):
    """The newest checkpoint -> (its path, step and so on, {name: tensor})."""
    path, about = train.newest_checkpoint(str(out))
    shapes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(t.size) for name, t in shapes.items()}
    dcp.load(tensors, checkpoint_id=path)
    return path, about, tensors


def assert_same_run(out, reference, tolerance=1e-5):
    """Losses of every step, gradient norms and final weights. Biases of the tower's keys are left out: a softmax does not feel
    them, their gradient is zero but for rounding, and Adam makes steps of any size out of rounding."""
    got, want = rows(out), rows(reference)
    assert [(r["stage"], r["step"]) for r in got] == [(r["stage"], r["step"]) for r in want]
    for g, w in zip(got, want):
        assert g.keys() | {"apart"} == w.keys() | {"apart"}                        # which sharded experts do not tell
        for part, load in w.get("load", {}).items():                               # each expert's share, rounded to 1e-4
            assert g["load"][part] == pytest.approx(load, abs=tolerance + 1.1e-4), f"step {w['step']}: {part}"
        for key in g.keys() & w.keys() - {"load"}:
            assert g[key] == pytest.approx(w[key], abs=tolerance), f"step {w['step']}: {key}"
    got, want = weights(out), weights(reference)
    assert got.keys() == want.keys()
    for name in want:
        if not name.endswith(".k.bias"):
            torch.testing.assert_close(got[name], want[name], atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")


def interrupt_at(monkeypatch, n, where=d, sig=signal.SIGINT):
    """Send this process a signal while it collates its n-th batch."""
    real, calls = where.collate, []

    def collate(*args):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), sig)
        return real(*args)
    monkeypatch.setattr(where, "collate", collate)


# ---------------------------------------------------------------------------------------------------------------------
# 1. LLaVA's format on disk

COLORS = {"red": (220, 50, 47), "green": (60, 170, 60), "blue": (50, 90, 220), "white": (240, 240, 240)}
say = lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


def write_llava(folder, samples, name="data.json"):
    for color, rgb in COLORS.items():
        Image.new("RGB", (40, 30), rgb).save(os.path.join(folder, f"{color}.png"))
    with open(os.path.join(folder, name), "w") as f:
        json.dump([{"id": str(i), **s} for i, s in enumerate(samples)], f)
    return ["--data", os.path.join(folder, name), "--images", str(folder)]


def one(color, **more):
    return {"image": f"{color}.png", "conversations": say("<image>\nWhat color is this?", color), **more}


def mixture():
    """16 samples: one image, several turns, two images, no image."""
    out = []
    for a, b in zip(COLORS, [*list(COLORS)[1:], "red"]):
        out += [one(a), {"image": [f"{a}.png"], "conversations": say("<image>\nWhat color is this?", a, "Are you sure?", f"yes, {a}")},
                {"image": [f"{a}.png", f"{b}.png"], "conversations": say("<image>\n<image>\nWhich colors are these?", f"{a} and {b}")},
                {"conversations": say(f"Say {a}.", a)}]
    return out


def alternating():
    """4 samples whose lengths alternate between text-only and pictures: cut for two processes, one of them sees no picture."""
    return [{"conversations": say("Say red.", "red")}, {"image": "red.png", "conversations": say("<image>\nWhat color is this?", "red")},
            {"conversations": say("Say red." + " Red, I said." * 16, "red green")},                    # longer than 36 slots and a question
            {"image": "blue.png", "conversations": say("<image>\nWhat color is this?" + " Take your time." * 8, "blue")}]


# ---------------------------------------------------------------------------------------------------------------------
# 2. However the batch is cut


@pytest.fixture(scope="module")
def ways(base, tmp_path_factory):
    """The same training in one process and in two, in several ways -> the folder of them all."""
    folder = str(tmp_path_factory.mktemp("ways"))
    at = lambda name: os.path.join(folder, name)
    mixed = ["--steps", 3, "--batch-size", 4, "--stage", 3, "--lr", 1e-3, *write_llava(folder, alternating())]
    stage3, three = ["--stage", 3, "--lr", 1e-3], ["--steps", 4, "--save-every", 2, "--batch-size", 4]
    # What practitioners expect, all at once: a mixture of two files, packed rows, learning rates by part, the best weights
    file, pictures = write_llava(folder, mixture(), "mixture.json")[1::2]
    write_llava(folder, [one("red"), one("blue")] * 2, "colors.json")
    practice = ["--steps", 4, "--batch-size", 4, "--stage", 3, "--lr", "1e-3,text=5e-4,connector=2e-3", "--data", f"{file}:3",
                f"{folder}/colors.json:2", "--images", pictures, "--pack", "--val-fraction", 0.2, "--val-every", 1, "--keep-best"]
    torch.set_num_threads(1)
    run(base, at("single"), *stage3)
    run(base, at("single mixed"), *mixed)
    run(base, at("single practice"), *practice)
    jobs = [dict(argv=flags(base, at("ddp"), *stage3)),
            dict(argv=flags(base, at("fsdp"), *stage3, "--fsdp")),
            dict(argv=flags(base, at("ddp micro"), *stage3, "--micro-batch", 2)),
            dict(argv=flags(base, at("fsdp micro"), *stage3, "--fsdp", "--micro-batch", 2)),
            dict(argv=flags(base, at("ddp mixed"), *mixed)),
            dict(argv=flags(base, at("fsdp mixed"), *mixed, "--fsdp")),
            dict(argv=flags(base, at("ddp practice"), *practice)),
            dict(argv=flags(base, at("fsdp practice"), *practice, "--fsdp")),
            dict(argv=flags(base, at("odd"), *stage3, "--batch-size", 3)),
            dict(argv=flags(base, at("fsdp stopped"), *stage3, "--fsdp"), fault="interrupt", at=3, rank=1),
            dict(argv=flags(base, at("fsdp stopped"), *stage3, "--fsdp", "--resume")),
            dict(argv=flags(base, at("three"), *three)),
            dict(argv=flags(base, at("three killed"), *three), fault="kill", at=4 + 4, rank=1)]
    code, out, err = start(folder, jobs, processes=2)
    assert code != 0 and train.newest_checkpoint(at("three killed"))[0], f"{out}\n{err}"
    with open(at("result0")) as f:
        results = json.load(f)
    names = [os.path.basename(j["argv"][3]) for j in jobs]
    failed = [r is not None for r in results]
    assert failed == [n == "odd" or j.get("fault") == "interrupt" for n, j in zip(names, jobs[:-1])], f"{results}\n{out}\n{err}"
    again, out, err = start(folder, [dict(argv=[*jobs[-1]["argv"], "--resume"])], processes=2)
    assert again == 0, f"{out}\n{err}"
    return folder, dict(zip(names, results))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one(ways, way):
    assert len(rows(f"{ways[0]}/{way}")) == 5
    assert_same_run(f"{ways[0]}/{way}", f"{ways[0]}/single")


@pytest.mark.parametrize("way", ["ddp micro", "fsdp micro"])
def test_two_processes_that_accumulate_gradients_train_as_one(ways, way):
    assert_same_run(f"{ways[0]}/{way}", f"{ways[0]}/single")


@pytest.mark.parametrize("size", [1, 2])
def test_gradient_accumulation_changes_nothing(ways, base, tmp_path, size):
    assert_same_run(run(base, tmp_path / "o", "--stage", 3, "--lr", 1e-3, "--micro-batch", size), f"{ways[0]}/single")


@pytest.mark.parametrize("way", ["ddp mixed", "fsdp mixed"])
def test_a_process_without_pictures_does_not_hang_and_changes_nothing(ways, way):
    lengths, shares = d.LlavaJson(f"{ways[0]}/data.json").lengths(36), []
    for rank in (0, 1):
        shares.append(next(iter(d.Batches(4, 4, 2, 0, 0, rank, 2, lengths))))
    assert sorted(any("image" in alternating()[i] for i in share) for share in shares) == [False, True]    # else this tests nothing
    assert_same_run(f"{ways[0]}/{way}", f"{ways[0]}/single mixed")


@pytest.mark.parametrize("way", ["ddp practice", "fsdp practice"])
def test_two_processes_mix_pack_and_keep_the_best_as_one(ways, way):
    assert [r["val_loss"] > 1 for r in rows(f"{ways[0]}/{way}") if "val_loss" in r] == [True] * 4
    assert set(rows(f"{ways[0]}/{way}")[0]["lr"]) == {"others", "text", "connector"}
    assert_same_run(f"{ways[0]}/{way}", f"{ways[0]}/single practice")


def test_a_batch_that_two_processes_cannot_share_is_an_error(ways):
    assert ways[1]["odd"].startswith("train.py: batch size 3 is not a multiple of 2 processes")


def test_ctrl_c_at_one_process_stops_all_and_resume_goes_on_exactly_under_fsdp(ways):
    assert rows(f"{ways[0]}/fsdp stopped") == rows(f"{ways[0]}/fsdp")
    for name, w in weights(f"{ways[0]}/fsdp").items():
        assert torch.equal(weights(f"{ways[0]}/fsdp stopped")[name], w), name


def test_two_processes_killed_in_stage_2_resume_exactly(ways):
    assert [(r["stage"], r["step"]) for r in rows(f"{ways[0]}/three killed")] == [(s, i) for s in (1, 2, 3) for i in range(4)]
    assert rows(f"{ways[0]}/three killed") == rows(f"{ways[0]}/three")
    for name, w in weights(f"{ways[0]}/three").items():
        assert torch.equal(weights(f"{ways[0]}/three killed")[name], w), name


def test_portions_make_the_loss_independent_of_the_cut(base):
    model, tokenizer = load(base)
    upcycle(model, vision=4, connector=4)
    samples = [d.Drawn("chat", 5, 3)[i] for i in range(5)]
    samples.insert(1, {"id": "text", "images": [], "conversations": say("Say red.", "red", "And green?", "green")})
    encoded = d.Encoded(samples, tokenizer, "tiny", 48, 36, 400)
    torch.manual_seed(1)

    def parts(cut):
        batches = [d.collate([encoded[i] for i in part]) for part in cut]
        for b in batches:
            assert len(b["images"]) == len(b["tokens"])                            # one image a row, or a blank
        total, out = train.count(batches, 0, "cpu"), {}
        for b in batches:
            for name, v in model.train()(b["tokens"], b["images"], labels=b["labels"]).parts.items():
                out[name] = out.get(name, 0) + train.portion_of(name, b, total, len(batches)) * v.item()
        return out
    whole = parts([range(6)])
    assert whole["lm"] > 1 and whole["vision/balance"] > 0.9 and whole["connector/z"] > 0.1
    for cut in ([[0], [1], [2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[i] for i in range(6)]):
        assert parts(cut) == pytest.approx(whole, rel=1e-5)


def test_portions_make_the_decoders_z_loss_and_load_independent_of_the_cut(base):
    """They are means over tokens, so a micro-batch of short samples counts less."""
    model, tokenizer = load(base)
    upcycle(model, text=4)
    samples = [{"id": i, "images": [], "conversations": say("Say red. " * n, "red")} for i, n in enumerate((1, 9, 30))]
    encoded = d.Encoded(samples, tokenizer, "tiny", 48, 36, 400)

    def measured(cut):
        batches, z, loads = [d.collate([encoded[i] for i in part]) for part in cut], 0, {}
        total = train.count(batches, 0, "cpu")
        for b in batches:
            out = model.train()(b["tokens"], b["images"], labels=b["labels"])
            portions = {name: train.portion_of(name, b, total, len(batches)) for name in out.parts}
            z += portions["text/z"] * out.parts["text/z"].item()
            train.add_loads(loads, out, portions)
        return [z, *loads["text 1"].tolist()]
    torch.nn.init.normal_(model.text.layers[1].ffn.router)
    whole = measured([range(3)])
    assert whole[0] > 0.1 and max(whole[1:]) > 0.3
    for cut in ([[0], [1], [2]], [[0, 1], [2]]):
        assert measured(cut) == pytest.approx(whole, rel=1e-4)


def test_portions_by_hand():
    batch, total = {"n_labels": 3, "n_images": 1, "n_tokens": 30}, train.Totals(labels=12, images=4, tokens=40, broken=0, truncated=0, signals=0)
    assert train.portion_of("lm", batch, total, 2) == 0.25
    assert train.portion_of("vision/z", batch, total, 2) == train.portion_of("connector/balance", batch, total, 2) == 0.25
    assert train.portion_of("text/balance", batch, total, 2) == 0.75
    assert train.portion_of("clip", batch, total, 2) == 0.5
    assert train.portion_of("vision/z", {"n_labels": 3, "n_images": 0}, total._replace(images=0), 2) == 0       # a batch of text alone


def test_activation_checkpointing_changes_nothing(ways, base, tmp_path, monkeypatch):
    real, used = m.checkpoint, []
    monkeypatch.setattr(m, "checkpoint", lambda f, *args, **kw: used.append(f) or real(f, *args, **kw))
    assert_same_run(run(base, tmp_path / "o", "--stage", 3, "--lr", 1e-3, "--checkpointing"), f"{ways[0]}/single")
    assert len(used) == 5 * (3 + 2)                                                # five steps through all blocks


def test_loading_in_worker_processes_changes_nothing(ways, base, tmp_path):
    assert rows(run(base, tmp_path / "o", "--stage", 3, "--lr", 1e-3, "--workers", 1)) == rows(f"{ways[0]}/single")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Stopped, killed, resumed


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Three stages, uninterrupted: what every interrupted run below must equal."""
    torch.set_num_threads(1)
    return run(base, tmp_path_factory.mktemp("whole") / "o", *THREE)


THREE = ("--steps", 6, "--save-every", 2, "--batch-size", 4)


def assert_resumes_exactly(base, out, whole):
    """The steps that a resumed run logs, its losses and weights are those of the run that nobody stopped."""
    run(base, out, *THREE, "--resume")
    assert [(r["stage"], r["step"]) for r in rows(out)] == [(s, i) for s in (1, 2, 3) for i in range(6)]
    assert rows(out) == rows(whole)
    for folder in ("stage1", "stage2", ""):
        want, got = weights(os.path.join(whole, folder)), weights(os.path.join(out, folder))
        assert all(torch.equal(got[name], want[name]) for name in want), folder
    assert not os.path.exists(os.path.join(out, "checkpoint"))


@pytest.mark.parametrize("step", [1, 3])             # before stage 2's first checkpoint, and after it
def test_killed_in_stage_2_resumes_exactly(base, whole, tmp_path, step):
    out = str(tmp_path / "o")
    code, text, err = start(tmp_path, [dict(argv=flags(base, out, *THREE), fault="kill", at=6 + step + 1)])
    assert code == -signal.SIGKILL, f"{text}\n{err}"
    assert (train.newest_checkpoint(out)[0] is not None) == (step == 3)
    last = (rows(out)[-1]["stage"], rows(out)[-1]["step"])                   # a batch is made while the step before it is taken
    assert last in ((2, step - 1), (2, step - 2) if step > 1 else (1, 5))
    assert_resumes_exactly(base, out, whole)


def test_killed_while_writing_a_checkpoint_the_one_before_is_whole(base, whole, tmp_path):
    out = str(tmp_path / "o")
    code, text, err = start(tmp_path, [dict(argv=flags(base, out, *THREE), fault="half", at=2 + 2)])    # stage 2, behind step 4
    assert code == 9, f"{text}\n{err}"
    assert train.newest_checkpoint(out)[1]["step"] == 2 and rows(out)[-1]["step"] == 3
    assert_resumes_exactly(base, out, whole)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_litter(base, whole, tmp_path, monkeypatch):
    real, calls, out = dcp.FileSystemWriter.write_data, [], str(tmp_path / "o")

    def full(*args):
        calls.append(1)
        done = real(*args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return done
    with monkeypatch.context() as patch, pytest.raises(OSError, match="checkpoint/4: cannot be written: .*No space"):
        patch.setattr(dcp.FileSystemWriter, "write_data", full)
        run(base, out, *THREE)
    assert os.listdir(os.path.join(out, "checkpoint")) == ["2"]
    assert_resumes_exactly(base, out, whole)


def test_ctrl_c_exits_with_130_and_resumes_exactly(base, whole, tmp_path):
    out = str(tmp_path / "o")
    code, text, err = start(tmp_path, [dict(argv=flags(base, out, *THREE), fault="interrupt", at=6 + 2)])
    assert code == 130 and "Traceback" not in err and "--resume" in text, f"{text}\n{err}"
    assert train.newest_checkpoint(out)[1]["step"] == 2
    assert_resumes_exactly(base, out, whole)


def test_sigterm_leaves_a_checkpoint_too(base, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 6 + 5, sig=signal.SIGTERM)
        run(base, tmp_path / "o", *THREE)
    assert_resumes_exactly(base, str(tmp_path / "o"), whole)


def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_nothing_is_lost(base, tmp_path):
    """It goes to all processes of the group. Those that load data must go on until the run has its checkpoint."""
    data_flags = write_llava(tmp_path, [{**mixture()[i % 4], "id": str(i)} for i in range(64)])
    for color, rgb in COLORS.items():                                              # large ones: the run waits for them, so a dead worker shows
        Image.new("RGB", (1600, 1600), rgb).save(tmp_path / f"{color}.png")
    argv = flags(base, tmp_path / "o", "--stage", 3, "--steps", 500, "--workers", 1, *data_flags)
    with subprocess.Popen([sys.executable, train.__file__, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as p:
        log, patience = tmp_path / "o" / "log.jsonl", time.monotonic() + 100
        try:
            while p.poll() is None and time.monotonic() < patience and not (log.exists() and log.read_text().count("\n") > 0):
                time.sleep(0.02)
            os.killpg(p.pid, signal.SIGINT)
            text, err = p.communicate(timeout=100)
        except BaseException:
            os.killpg(p.pid, signal.SIGKILL)                                       # or this test would wait for it for ever
            raise
    assert p.returncode == 130 and "Traceback" not in err and "stopped after step" in text, f"{text}\n{err}"
    assert train.newest_checkpoint(str(tmp_path / "o"))[1]["step"] == len(rows(tmp_path / "o"))


@pytest.mark.parametrize("fault", ["strict", "error"])
def test_a_failed_run_ends_though_its_workers_heed_no_signal(base, tmp_path, fault):
    samples = [{**mixture()[i % 4], "id": str(i)} for i in range(16)]
    argv = flags(base, tmp_path / "o", "--stage", 3, "--workers", 1, *write_llava(tmp_path, samples + [one("purple")] * 4 * (fault == "strict")), "--strict")
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\nimport train\n"
                      + ("train.clip_gradients = lambda *_: 1 / 0\n" if fault == "error" else "")
                      + "try:\n    train.main(sys.argv[1:])\nexcept ValueError as e:\n    sys.exit(str(e))\n")
    done = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and ("purple.png" if fault == "strict" else "ZeroDivisionError") in done.stderr


def test_ranks_that_torchrun_did_not_give_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but torchrun did not start this process"):
        run(base, tmp_path / "o", "--stage", 3)


def test_bfloat16_on_the_cpu_leaves_a_gpus_attention_and_the_next_run_alone(monkeypatch):
    def flash(*argv):
        train.prepare_device(train.parse(list(argv)))
        return torch.backends.cuda.flash_sdp_enabled()
    assert not flash("--matmul", "medium", "--device", "cpu") and flash("--device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flash("--matmul", "medium", "--device", "cuda")
    torch.set_float32_matmul_precision("highest")


def test_what_only_makes_a_run_faster_can_be_taken_back_when_it_is_resumed(tmp_path):
    out = str(tmp_path / "o")
    train.begin_run(train.parse(["--out", out, "--strict", "--checkpointing"]), [])
    args = train.parse(["--resume", "--out", out, "--no-strict", "--no-checkpointing"])
    assert not args.strict and not args.checkpointing
    assert train.parse(["--resume", "--out", out]).checkpointing


def test_a_checkpoint_before_the_first_good_step_changes_nothing(base, tmp_path, monkeypatch):
    """To read AdamW's state where there is none, torch makes one, by a step that must not count."""
    logs = []
    for save_every in (1, 99):
        norms = iter([math.nan])
        real = train.clip_gradients
        with monkeypatch.context() as patch:
            patch.setattr(train, "clip_gradients", lambda *args: real(*args) * next(norms, 1.0))
            logs.append(rows(run(base, tmp_path / str(save_every), "--stage", 3, "--lr", 1e-3, "--steps", 4, "--batch-size", 2,
                                 "--eval-questions", 1, "--save-every", save_every)))
    assert logs[0][1:] == logs[1][1:] and len(logs[0]) == 4 and logs[0][2]["lm"] < logs[0][1]["lm"]


def test_gradients_that_begin_as_zeros_do_not_hide_adamws_moments_from_a_resumed_run(base, tmp_path, monkeypatch):
    """--cuda-graphs, whose graphs alone need a GPU."""
    real = train.prepare_device

    def without_graphs(args):
        args.cuda_graphs = False
        device = real(args)
        args.cuda_graphs = True
        return device
    monkeypatch.setattr(train, "prepare_device", without_graphs)
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    run(base, whole, "--stage", 3, "--cuda-graphs")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        run(base, cut, "--stage", 3, "--cuda-graphs")
    run(base, cut, "--stage", 3, "--cuda-graphs", "--resume")
    assert rows(cut) == rows(whole)
    assert all(torch.equal(weights(cut)[name], w) for name, w in weights(whole).items())


def test_ctrl_c_in_the_last_step_of_a_stage_is_not_lost(base, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 6)
        run(base, tmp_path / "o", *THREE)
    assert {r["stage"] for r in rows(tmp_path / "o")} == {1}
    assert_resumes_exactly(base, str(tmp_path / "o"), whole)


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """A run of stage 3 that was stopped after its second step."""
    out = tmp_path_factory.mktemp("stopped") / "o"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run(base, out, "--stage", 3)
    return str(out)


@pytest.mark.parametrize("other", [("--lr", 1e-4), ("--batch-size", 4), ("--steps", 9), ("--seed", 1), ("--dense",), ("--n-experts", 3),
                                   ("--top-k", 1), ("--balance-coef", 0.5), ("--max-length", 300), ("--template", "vicuna"),
                                   ("--warmup", 0.5), ("--weight-decay", 0.1), ("--grad-clip", 0.5), "data", "init"])
def test_resume_with_other_flags_is_an_error(base, stopped, tmp_path, other):
    stopped = shutil.copytree(stopped, tmp_path / "o")
    if other == "data":
        other = write_llava(tmp_path, mixture())
    if other == "init":
        save(m.CuMo(m.Config(**{**SMALL, "text": {**SMALL["text"], "dim": 16}})), str(tmp_path / "narrow"), load(base)[1])
        other = ["--init", str(tmp_path / "narrow")]
    with pytest.raises(ValueError, match="run.json was written with .*: give the same flags"):
        run(base, stopped, "--stage", 3, "--resume", *other)


def test_a_log_line_cut_short_is_written_again(base, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "o")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"stage": 3, "step": 2, "lo')
    assert [r["step"] for r in rows(run(base, out, "--stage", 3, "--resume"))] == [0, 1, 2, 3, 4]


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("how", ["call", "bytes"])
def test_a_forged_checkpoint_runs_no_code(base, stopped, tmp_path, monkeypatch, how):
    out = shutil.copytree(stopped, tmp_path / "o")
    monkeypatch.chdir(tmp_path)
    file = out / "checkpoint" / "2" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    if how == "call":                                                              # the table of contents itself calls something
        metadata.planner_data = Evil()
    else:                                                                          # it says that a tensor is a pickle, which calls something
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        (file.parent / "__0_0.distcp").write_bytes(pickle.dumps(Evil()))
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"checkpoint/2/.metadata: cannot be read: .metadata names .*, which train.py does not write") as e:
        run(base, out, "--stage", 3, "--resume")
    assert "\n" not in str(e.value) and not (tmp_path / "pwned").exists()


def test_what_may_differ_is_named_and_all_else_is_compared(base, stopped, tmp_path):
    identity = train.newest_checkpoint(stopped)[1]["identity"]
    fields = {f.name for f in dataclasses.fields(train.Args)}
    assert train.FREE <= fields and fields - train.FREE <= set(identity) and not {"name", "micro_batch", "device"} & set(identity)
    out = shutil.copytree(stopped, tmp_path / "o")
    run(base, out, "--stage", 3, "--resume", "--micro-batch", 4, "--checkpointing", "--save-every", 3, "--eval-questions", 7)
    assert [r["step"] for r in rows(out)] == list(range(5))


def test_resume_of_another_stage_is_an_error(base, stopped):
    with pytest.raises(ValueError, match=r"run.json was written with stage 3 \(now 2\)"):
        run(base, stopped, "--stage", 2, "--resume")


def test_a_new_run_does_not_write_over_an_unfinished_one(base, stopped):
    files = {name: open(os.path.join(stopped, "checkpoint/2", name), "rb").read() for name in os.listdir(os.path.join(stopped, "checkpoint/2"))}
    with pytest.raises(ValueError, match="holds an unfinished run"):
        run(base, stopped, "--stage", 3)
    assert files and all(open(os.path.join(stopped, "checkpoint/2", name), "rb").read() == files[name] for name in files)


def test_resume_of_a_finished_run_is_an_error(base, whole):
    with pytest.raises(ValueError, match="nothing to resume"):
        run(base, whole, *THREE, "--resume")


def test_a_single_stage_does_not_write_over_a_finished_one(base, whole):
    with pytest.raises(ValueError, match="holds this stage already"):
        run(base, whole, "--stage", 2)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_new_run_moves_an_old_one_aside(base, tmp_path, slash):
    out = str(tmp_path / "o")
    for seed in (0, 1, 2):
        run(base, out + slash, "--steps", 1, "--batch-size", 2, "--seed", seed)
    assert sorted(os.listdir(tmp_path)) == ["o", "o.1", "o.2"]
    losses = [rows(os.path.join(tmp_path, o))[-1]["loss"] for o in ("o.1", "o.2", "o")]
    assert len(set(losses)) == 3
    assert all(os.path.exists(os.path.join(tmp_path, o, "model.safetensors")) for o in ("o.1", "o.2", "o"))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Numbers: learning rate, settings, what trains


def test_lr_at_by_hand():
    lr = [train.lr_at(i, 10, 2.0, 0.2) for i in range(10)]
    assert lr == pytest.approx([1, 2, 2, 1.9238795, 1.7071068, 1.3826834, 1, 0.6173166, 0.2928932, 0.0761205], abs=1e-6)
    assert train.lr_at(0, 1, 3.0, 0.03) == 3.0                                     # a single step is not lost to the warm-up
    assert train.lr_at(0, 1000, 3.0, 0.03) == pytest.approx(0.1) and train.lr_at(29, 1000, 3.0, 0.03) == 3.0
    assert 0 < train.lr_at(999, 1000, 3.0, 0.03) < 1e-4


def test_the_log_has_the_learning_rate_of_each_step(whole):
    for r in rows(whole):
        assert r["lr"] == pytest.approx(train.lr_at(r["step"], 6, train.TINY[r["stage"]]["lr"], 0.03), rel=1e-12)


def test_flags_go_over_the_tiny_preset_and_that_over_the_recipe(monkeypatch):
    s = train.settings(train.parse([]), 1)
    assert s.trains == ("connector",) and s.template == "plain" and not s.has_experts                # recipe
    assert s.lr == train.TINY[1]["lr"] != train.CUMO_STAGES[1].lr and s.batch_size == train.TINY[1]["batch_size"]
    s = train.settings(train.parse("--lr 0.5 --steps 7 --batch-size 12 --max-length 99 --template vicuna".split()), 1)
    assert (s.lr, s.steps, s.batch_size, s.max_length, s.template) == (0.5, 7, 12, 99, "vicuna")
    s = train.settings(train.parse(["--preset", "cumo-mistral-7b"]), 3)
    assert s == dataclasses.replace(train.CUMO_STAGES[3], name=3, has_experts=True, micro_batch=4) and s.lr == 4e-6 and s.batch_size == 256
    assert s.routing_losses and not train.settings(train.parse([]), 2).routing_losses
    assert train.settings(train.parse([]), 3).has_experts and not train.settings(train.parse(["--dense"]), 3).has_experts
    micro = lambda *argv: train.settings(train.parse([*argv]), 3).micro_batch
    assert micro("--batch-size", "12") == 12 and micro("--batch-size", "12", "--micro-batch", "3") == 3
    assert micro("--preset", "cumo-mistral-7b") == 4 and micro("--batch-size", "2", "--micro-batch", "3") == 2
    monkeypatch.setattr(train, "WORLD", 4)
    assert micro("--batch-size", "12") == 3


def small(select=-2, moe=False):
    torch.manual_seed(0)
    model = m.CuMo(m.Config(**{**SMALL, "vision": {**SMALL["vision"], "select_layer": select}}))
    return upcycle(model, vision=4, connector=4) if moe else model


@pytest.fixture(scope="module")
def batch(base):
    encoded = d.Encoded(d.Drawn("chat", 4, 5), load(base)[1], "tiny", 48, 36, 400)
    b = d.collate([encoded[i] for i in range(4)])
    return {k: b[k] for k in ("tokens", "images", "labels")}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("select", [-1, -2, -3])
def test_exactly_what_trains_gets_a_gradient(batch, stage, moe, select):
    reached = small(select, moe)                                                   # all that the loss can reach, by experiment
    reached.train()(**batch).loss.backward()
    reached = {n for n, p in reached.named_parameters() if p.grad is not None}
    trains = train.CUMO_STAGES[stage].trains
    want = {n for n in reached if n.split(".")[0] in trains}
    model = small(select, moe)
    m.choose_trainable(model, trains)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == want
    model.train()(**batch).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == want
    assert any(n.startswith("connector.") for n in want) and ("text.embed.weight" in want) == (stage > 1)
    if stage > 1 and select == -2:                             # of the layer behind the features the router alone trains, or nothing
        last = {n.removeprefix("vision.layers.2.ffn.") for n in want if n.startswith("vision.layers.2.ffn.")}
        assert last == ({"router"} if moe else set())


def test_stage_1_moves_the_connector_alone_and_stage_2_everything(base, whole):
    before, after = weights(base), weights(os.path.join(whole, "stage1"))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if n.startswith("connector.")}
    still = {n for n, w in weights(os.path.join(whole, "stage2")).items() if torch.equal(w, after[n])}
    assert still == {n for n in before if n.startswith("vision.layers.2.")}        # behind the features


def test_stage_3_upcycles_and_the_experts_grow_apart(base, whole, tmp_path):
    model, _ = load(whole)
    assert model.config.vision.n_experts == [4, 4, 4] and model.config.connector.n_experts == 4
    assert not torch.equal(*model.connector.ffn.w_in[:2]) and not torch.equal(*model.vision.layers[0].ffn.w_in[:2])
    dense, _ = load(run(base, tmp_path / "o", "--stage", 3, "--dense", "--steps", 1, "--batch-size", 2))
    assert dense.config.vision.n_experts == [0, 0, 0] and dense.config.connector.n_experts == 0


def test_the_model_is_saved_with_the_template_it_learnt(base, whole, tmp_path):
    for stage, template, want in ((3, "vicuna", "vicuna"), (1, "plain", "tiny")):
        out = run(base, tmp_path / template, "--stage", stage, "--template", template, "--steps", 1, "--batch-size", 2)
        assert load(os.path.join(out, "stage1" if stage == 1 else ""))[0].config.template == want
    assert [load(os.path.join(whole, f))[0].config.template for f in ("stage1", "stage2", "")] == ["tiny"] * 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_model_that_the_last_line_speaks_of_is_there(base, tmp_path, capsys, stage):
    run(base, tmp_path / "o", "--stage", stage, "--steps", 1, "--batch-size", 2)
    folder = capsys.readouterr().out.split("--model ")[-1].split()[0]
    assert folder.startswith(str(tmp_path)) and load(folder)[1] is not None


# ---------------------------------------------------------------------------------------------------------------------
# 5. Losses that are no number


def poison(monkeypatch, steps):
    """Make the training loss NaN in these steps; collects a weight's values as each step finds it."""
    real, seen = m.CuMo.forward, []

    def forward(self, *args, **kw):
        out = real(self, *args, **kw)
        if self.training:
            seen.append({n: p.detach().clone() for n, p in self.named_parameters()})
            if len(seen) - 1 in steps:
                out = out._replace(parts={**out.parts, "lm": out.parts["lm"] * math.nan})
        return out
    monkeypatch.setattr(m.CuMo, "forward", forward)
    return seen


same = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(base, tmp_path, monkeypatch, capsys):
    seen = poison(monkeypatch, (2, 4))
    out = run(base, tmp_path / "o", "--stage", 3, "--steps", 7)
    assert [same(a, b) for a, b in zip(seen, seen[1:])] == [False, False, True, False, True, False]
    assert all(p.isfinite().all() for p in weights(out).values())
    assert [math.isnan(r["loss"]) for r in rows(out)] == [i in (2, 4) for i in range(7)]
    assert "7 steps done (2 skipped)" in capsys.readouterr().out
    assert os.path.exists(os.path.join(out, "loss.png"))


def test_ten_bad_steps_in_a_row_stop_and_name_the_last_good_checkpoint(base, tmp_path, monkeypatch):
    seen = poison(monkeypatch, range(3, 99))
    with pytest.raises(ValueError, match="10 steps in a row") as e:
        run(base, tmp_path / "o", "--stage", 3, "--steps", 30, "--save-every", 2)
    path, about, tensors = checkpoint(tmp_path / "o")
    assert f"{path}, step {about['step']}" in str(e.value) and "--lr" in str(e.value)
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    first, last = ({k: seen[i][k] for k in saved} for i in (0, 3))                 # what trains, of the weights at that step
    assert saved and len(seen) == 13 and same(last, saved) and not same(first, saved)


def test_nine_bad_steps_in_a_row_do_not_stop(base, tmp_path, monkeypatch):
    poison(monkeypatch, [*range(1, 10), *range(11, 13)])
    assert len(rows(run(base, tmp_path / "o", "--stage", 3, "--steps", 14, "--batch-size", 2))) == 14


def test_a_run_that_diverges_at_once_says_that_there_is_no_checkpoint(base, tmp_path):
    with pytest.raises(ValueError, match="last good checkpoint is none; try a smaller --lr"):
        run(base, tmp_path / "o", "--stage", 3, "--steps", 30, "--lr", "1e9", "--batch-size", 2)


# ---------------------------------------------------------------------------------------------------------------------
# 6. LLaVA's format: what it may hold, and what is broken


def test_llava_json_of_all_kinds_trains(base, tmp_path):
    out = run(base, tmp_path / "o", "--stage", 3, "--steps", 60, "--lr", 5e-3, *write_llava(tmp_path, mixture()))
    lm = [r["lm"] for r in rows(out)]
    assert sum(lm[-5:]) < 0.4 * sum(lm[:5]), lm
    assert os.path.exists(os.path.join(out, "model.safetensors"))


def test_without_steps_an_epoch_is_trained(base, tmp_path):
    argv = ["--init", base, "--out", tmp_path / "o", "--device", "cpu", "--stage", 3, "--epochs", 2, "--batch-size", 4]
    train.main([str(a) for a in argv] + write_llava(tmp_path, mixture()))
    assert len(rows(tmp_path / "o")) == 8                                          # 16 samples, twice, 4 a step


BROKEN = {"missing": one("purple"), "no picture": one("text"), "marks": {"image": ["red.png", "blue.png"], "conversations": say("<image>\nWhat color is this?", "red")},
          "turns": {"image": "red.png", "conversations": say("<image>\nWhat?", "red")[::-1]}, "object": {"conversations": "hello"}}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_named_replaced_and_counted(base, tmp_path, capsys, kind):
    argv = write_llava(tmp_path, [*mixture(), BROKEN[kind]] + mixture()[:7])
    (tmp_path / "text.png").write_text("this is no picture")
    out = run(base, tmp_path / "o", "--stage", 3, "--steps", 3, *argv)             # one epoch: 24 samples
    text = capsys.readouterr().out
    said = [line for line in text.splitlines() if line.startswith("broken sample replaced:")]
    where = {"missing": "purple.png", "no picture": "text.png"}.get(kind, "data.json: sample 17")
    assert len(said) == 1 and "data.json" in said[0] and where in said[0], text
    assert "3 steps done (1 broken)" in text and all(math.isfinite(r["loss"]) for r in rows(out))


def test_a_replaced_sample_is_its_successor(base, tmp_path):
    good, mended = mixture()[:4], mixture()[:4]
    good.insert(1, BROKEN["missing"])
    mended.insert(1, mended[1])
    a = run(base, tmp_path / "a", "--stage", 3, "--steps", 1, "--batch-size", 5, *write_llava(tmp_path, good))
    b = run(base, tmp_path / "b", "--stage", 3, "--steps", 1, "--batch-size", 5, *write_llava(tmp_path, mended))
    assert rows(a)[0]["lm"] == pytest.approx(rows(b)[0]["lm"], rel=1e-5)


def test_more_than_one_percent_broken_stops(base, tmp_path):
    with pytest.raises(ValueError, match="11 of .* broken, over 1%"):
        run(base, tmp_path / "o", "--stage", 3, "--steps", 99, "--batch-size", 2, *write_llava(tmp_path, [one("red"), one("purple")]))


def test_nothing_but_broken_samples_stops(base, tmp_path):
    with pytest.raises(ValueError, match="purple.png"):
        run(base, tmp_path / "o", "--stage", 3, *write_llava(tmp_path, [one("purple")] * 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first_broken_sample_in_one_line(base, tmp_path, monkeypatch, workers):
    argv = write_llava(tmp_path, [*mixture(), one("purple")])
    argv += ["--stage", 3, "--steps", 9, "--batch-size", 4, "--strict", "--workers", workers]
    code = command_line(flags(base, tmp_path / "o", *argv), monkeypatch)
    assert code.startswith("train.py: ") and "purple.png" in code and "\n" not in code


# ---------------------------------------------------------------------------------------------------------------------
# 7. The command line


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    p = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "--preset", "nope", "--out", str(tmp_path / "o")],
                       capture_output=True, text=True, timeout=300)
    assert p.returncode == 1 and p.stdout == ""
    assert p.stderr.count("\n") == 1 and p.stderr.startswith("train.py: unknown preset 'nope'; known: tiny, ")


ERRORS = {                                           # flags -> words that the message must hold
    "--preset nope": "unknown preset 'nope'",
    "--stage 7": "--stage 7: the stages are 1, 2 and 3",
    "--stage 0": "python assets/backbones.py",
    "--stage 3 --data missing.json": "missing.json: cannot be read",
    "--stage 3 --data malformed.json": "malformed.json: malformed JSON in line 3",
    "--stage 3 --data malformed.jsonl": "malformed.jsonl: malformed JSON in line 2",
    "--stage 3 --data empty.json": "empty.json: holds no samples",
    "--stage 3 --data nothing.json": "nothing.json: holds no samples",
    "--top-k 5": "top_k = 5",                        # at once, not after two stages
    "--n-experts 0": "top_k = 2",
    "--stage 3 --batch-size 3 --micro-batch 2": "batch size 3 is not a multiple",
    "--steps 0": "--steps = 0 must be at least 1",
    "--batch-size -4": "--batch-size = -4 must be at least 1",
    "--stage 3 --template nope": "--template nope: known are plain, tiny",
    "--stage 3 --max-length 20": "over the limit of 20",
    "--init nowhere": "nowhere: no model folder",
    "--init speechless": "has no tokenizer.json",
    "--init blind": "blind",
    "--device abacus": "--device abacus",
    "--preset cumo-mistral-7b --stage 3 --init BASE": "--data",
}


@pytest.mark.parametrize("argv", ERRORS)
def test_errors_say_in_one_line_what_is_wrong(base, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    for name, text in {"malformed.json": '[\n{"id": 1},\n{"id" 2}\n]', "malformed.jsonl": '{"id": 1}\n{"id"\n', "empty.json": "[]",
                       "nothing.json": ""}.items():
        (tmp_path / name).write_text(text)
    if "speechless" in argv:
        save(small(), "speechless")
    if "blind" in argv:
        save(m.CuMo(m.Config(vision=None, text=SMALL["text"], template="tiny")), "blind", load(base)[1])
    given = argv.replace("BASE", base).split()
    code = command_line(given if "--preset" in given else flags(base, tmp_path / "o", *given), monkeypatch)
    assert isinstance(code, str) and code.startswith("train.py: ") and "\n" not in code and ERRORS[argv] in code, code
    assert not os.path.exists(tmp_path / "o" / "stage1"), "the error came after a stage of training"


def test_help_names_and_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    assert e.value.code == 0
    text = "".join(capsys.readouterr().out.split())                          # argparse breaks lines at hyphens too
    for f in dataclasses.fields(train.Args):
        words = f.metadata["help"].replace("%%", "%")
        assert f"--{f.name.replace('_', '-')}" in text and len(words) > 5 and "".join(words.split()) in text, f.name


def test_flags_arrive_with_their_types():
    args = train.parse("--stage 2 --lr 1e-3 --no-compile --fsdp --data Y --images X --workers 3 --balance-coef 0.2".split())
    assert (args.stage, args.lr, args.compile, args.fsdp, args.images, args.workers, args.balance_coef) == (2, "1e-3", False, True, "X", 3, 0.2)
    assert train.parse("--data Y Z --data X".split()).data == ["Y", "Z", "X"]
    assert train.parse([]) == train.Args(out=os.path.join("out", "tiny"), recipe="cumo") and train.parse(["--compile"]).compile is True


@pytest.mark.parametrize("preset, argv, want", [("tiny", [], False), ("uni-moe-tiny", [], False), ("cumo-1b", [], True),
                                                ("cumo-1b", ["--no-compile"], False), ("tiny", ["--compile"], True), ("cumo-1b", ["--device", "cpu"], False)])
def test_cuda_compiles_all_but_tiny_models(monkeypatch, preset, argv, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "keep_pages", lambda: None)
    args = train.parse(["--preset", preset, *argv])
    train.prepare_device(args)
    assert args.compile is want


def test_a_stage_prints_what_it_runs_with(base, tmp_path, capsys):
    run(base, tmp_path / "o", "--stage", 3, "--steps", 1, "--batch-size", 2, "--lr", 0.25, "--balance-coef", 0.7)
    line = next(line for line in capsys.readouterr().out.splitlines() if "lr 0.25" in line)
    for value in ("trains vision, connector, text", "micro_batch 2", "max_length 256", "template tiny", "balance_coef 0.7", "z_coef 0.01", "seed 0"):
        assert value in line


# ---------------------------------------------------------------------------------------------------------------------
# 8. From scratch


@pytest.fixture(scope="module")
def backbones_made(tmp_path_factory):
    """Stage 0 in two steps each, with small sizes for the tiny preset's -> its folder."""
    out = str(tmp_path_factory.mktemp("made") / "o")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(m.PRESETS, "tiny", SMALL)
        backbones.main(["--kind", "image", "--steps", "2", "--batch-size", "8", "--eval-questions", "9", "--out", out, "--device", "cpu"])
    return out


@pytest.fixture(scope="module")
def scratch(backbones_made, tmp_path_factory):
    """All stages from those backbones, two steps each."""
    out = str(tmp_path_factory.mktemp("scratch") / "o")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(m.PRESETS, "tiny", SMALL)
        train.main(["--init", os.path.join(backbones_made, "tiny-backbones.safetensors"), "--steps", "2", "--batch-size", "8",
                    "--eval-questions", "9", "--out", out, "--device", "cpu"])
    return out


def test_from_scratch_makes_backbones_that_load_and_goes_on_from_them(backbones_made, scratch):
    model, tokenizer = load_backbones(os.path.join(backbones_made, "tiny-backbones.safetensors"))
    assert model.config.to_dict() == m.Config(**SMALL).to_dict() and tokenizer.encode("<q>").ids == [tokenizer.token_to_id("<q>")]
    tower, _ = load_backbones(os.path.join(backbones_made, "tower.safetensors"))
    assert same(dict(tower.vision.named_parameters()), dict(model.vision.named_parameters()))              # 0b trains the decoder alone
    assert not same(dict(tower.text.named_parameters()), dict(model.text.named_parameters()))
    stage1, _ = load(os.path.join(scratch, "stage1"))
    assert same(dict(model.text.named_parameters()), dict(stage1.text.named_parameters()))                 # 1 the connector alone
    assert [(r["stage"], r["step"]) for r in rows(backbones_made)] == [(s, i) for s in ("0a", "0b") for i in (0, 1)]
    assert [(r["stage"], r["step"]) for r in rows(scratch)] == [(s, i) for s in (1, 2, 3) for i in (0, 1)]
    with open(os.path.join(scratch, "scores.jsonl")) as f:
        scores = [json.loads(line) for line in f]
    assert [(s["stage"], sum(asked for _, asked in s["scores"].values())) for s in scores] == [(1, 2), (2, 2), (3, 9)]


@pytest.mark.parametrize("picture", ["loss.png", "routing.png"])
def test_a_run_draws_its_pictures(scratch, picture):
    image = Image.open(os.path.join(scratch, picture))
    assert min(image.size) >= 200 and len(image.convert("RGB").getcolors(10**6)) > 5                       # something is drawn


def test_stage_0_stopped_resumes_exactly(backbones_made, tmp_path, monkeypatch):
    """The decoder's stage draws noise: it must not depend on what was drawn before the stop."""
    monkeypatch.setitem(m.PRESETS, "tiny", SMALL)
    for out in ("whole", "stopped"):
        os.mkdir(tmp_path / out)
        shutil.copy(os.path.join(backbones_made, "tower.safetensors"), tmp_path / out)
    go = lambda out: backbones.main(["--kind", "image", "--resume", "--steps", "4", "--batch-size", "4", "--eval-questions", "1",
                                     "--device", "cpu", "--out", str(tmp_path / out)])
    go("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2, backbones.Described)
        go("stopped")
    go("stopped")
    assert [(r["stage"], r["step"]) for r in rows(tmp_path / "stopped")] == [("0b", i) for i in range(4)]
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    a, b = (load_backbones(str(tmp_path / out / "tiny-backbones.safetensors"))[0].state_dict() for out in ("whole", "stopped"))
    assert all(torch.equal(a[n], b[n]) for n in a if not n.startswith("connector."))                       # the connector is new


@pytest.mark.parametrize("argv, words", [([], "already: --resume"), (["--resume"], "nothing to resume"),
                                         (["--resume", "--kind", "hearing"], "belongs to stage 0b")])
def test_finished_backbones_are_not_written_over(backbones_made, tmp_path, monkeypatch, argv, words):
    monkeypatch.setitem(m.PRESETS, "tiny", SMALL)
    out = shutil.copytree(backbones_made, tmp_path / "o")
    go = ["--kind", "image", "--steps", "2", "--batch-size", "8", "--eval-questions", "9", "--out", str(out), "--device", "cpu"]
    if "hearing" in argv:                                                          # leave a checkpoint of the other kind
        os.remove(out / "tiny-backbones.safetensors")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, 1, backbones.Described)
            backbones.main([*go, "--resume"])
    with pytest.raises(ValueError, match=words):
        backbones.main([*go, *argv])


# ---------------------------------------------------------------------------------------------------------------------
# 9. Real folders: a CLIP and a Mistral, made small


@pytest.fixture(scope="module")
def towers(base, tmp_path_factory):
    """A CLIP folder and a Mistral folder with a tokenizer, as transformers lays them out, and LLaVA data -> (--vision and --llm, --data)."""
    folder, model = tmp_path_factory.mktemp("towers"), load(base)
    clip, llm = str(folder / "clip"), str(folder / "llm")
    save(model[0], clip, layout="hf-clip")
    save(model[0], llm, model[1], layout="hf-llm")
    return ["--vision", clip, "--llm", llm], write_llava(folder, mixture())


def test_the_stages_of_a_real_preset_start_from_folders_and_from_each_other(towers, tmp_path):
    go = ["--preset", "cumo-mistral-7b", "--out", str(tmp_path / "o"), "--steps", "2", "--batch-size", "4", "--max-length", "400", "--device", "cpu",
          *towers[1]]
    train.main([*go, "--stage", "1", *towers[0]])
    first, tokenizer = load(str(tmp_path / "o/stage1"))
    assert first.config.vision.scales == [1, 3] and first.config.template == "mistral" and tokenizer.get_vocab_size() > 100
    for name, source in (("vision", load(towers[0][1])[0].state_dict()), ("text", load(towers[0][3])[0].text.state_dict())):
        for key, w in getattr(first, name).state_dict().items():                   # stage 1 trains the connector alone
            assert torch.equal(w, source[key]), key
    for stage in "23":
        train.main([*go, "--stage", stage])
    last, _ = load(str(tmp_path / "o"))
    assert last.config.vision.n_experts == [4, 4, 4] and last.config.connector.n_experts == 4
    assert [(r["stage"], r["lr"] > 0) for r in rows(tmp_path / "o")] == [(s, True) for s in (1, 1, 2, 2, 3, 3)]


def test_the_presets_default_to_the_papers_hyperparameters(monkeypatch):
    want = {1: (1e-3, 256, 2048, "plain"), 2: (2e-6, 128, 4096, None), 3: (4e-6, 256, 4096, None)}
    for stage, (lr, batch, length, template) in want.items():
        s = train.settings(train.parse(["--preset", "cumo-mistral-7b"]), stage)
        assert (s.lr, s.batch_size, s.max_length, s.template, s.micro_batch) == (lr, batch, length, template, 4)
    assert train.settings(train.parse(["--preset", "cumo-mixtral-8x7b"]), 3).lr == 2e-6
    assert train.parse(["--preset", "cumo-mistral-7b"]).out == os.path.join("out", "cumo-mistral-7b")


def test_a_pixel_shuffle_is_the_presets_or_the_flags_and_only_a_new_connector_has_it(tmp_path):
    plans = {("cumo-smol",): 49, ("cumo-qwen3",): 64, ("cumo-smol", "--pixel-shuffle", "7"): 4, ("tiny", "--pixel-shuffle", "3"): 4}
    for (preset, *more), n in plans.items():
        args = train.parse(["--preset", preset, "--plan", *more])
        assert train.planned(args, train.settings(args, 1))[0].n_image_tokens == n
    args = train.parse(["--preset", "cumo-smol", "--plan", "--pixel-shuffle", "3"])
    with pytest.raises(ValueError, match="pixel_shuffle = 3 does not divide the 14 x 14 patches"):
        train.planned(args, train.settings(args, 1))
    args = train.parse(["--pixel-shuffle", "3"])
    model, tokenizer = train.load_model(args, train.settings(args, 1), train.BACKBONES, None)
    assert model.config.n_image_tokens == 4
    save(model, str(tmp_path), tokenizer)
    args = train.parse(["--stage", "2", "--pixel-shuffle", "2"])
    with pytest.raises(ValueError, match="--pixel-shuffle 2: .* was trained with 3; only stage 1"):
        train.load_model(args, train.settings(args, 2), str(tmp_path), None)


def test_the_presets_for_one_gpu_have_learning_rates_of_their_size():
    for preset, rates in (("cumo-smol", [2e-3, 1e-4, 5e-5]), ("cumo-qwen3", [2e-3, 5e-5, 2e-5])):
        args = train.parse(["--preset", preset])
        stages = [train.settings(args, number) for number in (1, 2, 3)]
        assert [stage.lr for stage in stages] == rates and all(stage.batch_size % stage.micro_batch == 0 for stage in stages)


@pytest.mark.parametrize("argv", [["--vision", "A"], ["--llm", "A"], ["--vision", "A", "--llm", "B", "--stage", "2"],
                                  ["--vision", "A", "--llm", "B", "--init", "C"]])
def test_vision_and_llm_go_together_and_with_stage_1(argv):
    with pytest.raises(ValueError, match="--vision DIR and --llm DIR go together"):
        train.parse(argv)


def test_a_decoder_without_a_tokenizer_says_how_to_make_one(towers, tmp_path):
    bare = shutil.copytree(towers[0][3], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(ValueError, match="no tokenizer.json.*save_pretrained"):
        train.main(["--preset", "cumo-mistral-7b", "--stage", "1", *towers[0][:3], str(bare), *towers[1], "--out", str(tmp_path / "o")])


# ---------------------------------------------------------------------------------------------------------------------
# 10. Pages


@pytest.mark.parametrize("libc, environment, calls", [("glibc", {}, 3), ("glibc", {"MALLOC_ARENA_MAX": "2"}, 0), ("", {}, 0)])
def test_pages_are_kept_with_glibc_alone_and_unless_the_user_tuned_it(monkeypatch, libc, environment, calls):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(train.platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr(train.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *a: seen.append(a)))
    train.keep_pages()
    assert len(seen) == calls


@pytest.mark.skipif(train.platform.libc_ver()[0] != "glibc", reason="other C libraries keep pages or not as they please")
def test_kept_pages_spare_page_faults():
    script = """if True:
        import resource, sys, torch
        sys.path.insert(0, sys.argv[1])
        import train
        faults = []
        for kept in (False, True):
            if kept:
                train.keep_pages()
            for i in range(8):                                                     # as a step does: several, let go together (of a single
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt        # one glibc cannot align the next in the same place)
                tensors = [torch.empty(n * 2**22).fill_(0.) for n in (4, 1, 3, 2)]     # 160 MB
                del tensors
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(sum(faults[4:8]), sum(faults[12:]))"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, "-c", script, os.path.dirname(train.__file__)], env=clean, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    fresh, kept = map(int, p.stdout.split())
    assert kept < 0.1 * fresh or fresh < 100                                       # (huge pages: few faults either way)


@pytest.mark.parametrize("file", ["train.py", "generate.py", "assets/backbones.py", "tests/bench.py"])
@pytest.mark.parametrize("given, want", [({}, "10000 None"), ({"GOMP_SPINCOUNT": "77"}, "77 None"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE")])
def test_threads_give_up_spinning_soon_unless_the_user_says_otherwise(file, given, want):
    """Set before torch is loaded, when libgomp reads it: here a torch that prints what it would find stands in its place."""
    script = """if True:
        import os, runpy, sys
        class Torch:
            def find_spec(name, *_):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
                    sys.exit(0)
        sys.meta_path.insert(0, Torch)
        runpy.run_path(sys.argv[1])"""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    p = subprocess.run([sys.executable, "-c", script, os.path.join(ROOT, file)], env=clean | given, capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.strip() == want, p.stderr
