"""train.py on many processes: FSDP that never holds the whole model, checkpoints in shards, resuming on other numbers of processes, and
coming back after a process died. Two launches of two processes, for all tests here."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import model as m
import train
from test_train import (ROOT, SMALL, assert_same_run, base, flags, interrupt_at, mixture, quiet_machine, rows, run, start,   # noqa: F401
                        weights, write_llava)
from upcycle import load, save, upcycle

STAGE3 = ("--stage", 3, "--lr", 1e-3, "--steps", 5, "--batch-size", 4, "--save-every", 2, "--eval-questions", 1)
THREE = ("--steps", 4, "--save-every", 2, "--batch-size", 4, "--eval-questions", 1)

# train.py, whose second checkpoint fails: argv[-1] says how. "full": rank 1's disk is full; "killed": both die when all is written but
# run.json, which makes it a checkpoint
FAULTY = """
import os, runpy, sys
import torch.distributed.checkpoint as dcp
import train
how, calls, save, write = sys.argv.pop(), [], dcp.save, dcp.FileSystemWriter.write_data
def faulty(*args, **kw):
    calls.append(1)
    out = save(*args, **kw)
    if how == "killed" and len(calls) == 2:
        os._exit(9)
    return out
def full(*args, **kw):
    if how == "full" and len(calls) == 2 and train.RANK == 1:
        raise OSError(28, "No space left on device")
    return write(*args, **kw)
dcp.save, dcp.FileSystemWriter.write_data = faulty, full
try:
    runpy.run_path(train.__file__, run_name="__main__")
finally:
    dcp.save, dcp.FileSystemWriter.write_data = save, write
"""

# What each of two processes holds of a folder's model, and whether both together hold what one does: argv: JSON file for the results,
# JSON list of [vision folder or None, folder]; the last one is weighed
SHARDS = """
import json, re, sys, torch
import train
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from upcycle import assemble, load, upcycle
def now(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
def sharded(vision, folder):
    later = []
    model, _ = assemble(vision, folder, None, [1, 3], seed=3, dtype=torch.float32, later=later) if vision else load(folder, later=later)
    assert all(p.is_meta for name, p in model.named_parameters() if not name.startswith("connector."))
    if not any(model.config.vision.n_experts):
        upcycle(model, vision=4, connector=4, seed=7, real_routers=True)
    return train.distribute(train.Args(fsdp=True), model, torch.device("cpu"), later)
def whole(vision, folder):
    model, _ = assemble(vision, folder, None, [1, 3], seed=3, dtype=torch.float32) if vision else load(folder, dtype=torch.float32)
    return model if any(model.config.vision.n_experts) else upcycle(model, vision=4, connector=4, seed=7)
result = {"same": [], "share": [], "mib": {}}
*folders, large = json.loads(sys.argv[2])
for vision, folder in folders:
    model = sharded(vision, folder)
    got, want = get_model_state_dict(model, options=train.WHOLE), whole(vision, folder).state_dict()
    equal = lambda k: got[k].dtype == torch.float32 and torch.equal(got[k], want[k])
    result["same"].append(train.RANK > 0 or got.keys() == want.keys() and all(equal(k) for k in want))
    result["share"].append(sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters()))
    del model, got, want
for name, make in (("sharded", sharded), ("whole", whole)):
    open("/proc/self/clear_refs", "w").write("5")                                  # the peak begins anew
    before = now("VmRSS")
    model = make(*large)
    result["mib"][name] = now("VmHWM") - before
    result["mib"]["model"] = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    del model
json.dump(result, open(sys.argv[1] + str(train.RANK), "w"))
"""

# torchrun's own child: rank 1 dies at its n-th batch, the first time
DYING = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(1)
root, at = sys.argv.pop(1), int(sys.argv.pop(1))
sys.path.insert(0, root)
import data, train
real, calls = data.collate, []
def collate(samples):
    calls.append(1)
    if len(calls) == at and train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(samples)
data.collate = collate
runpy.run_path(train.__file__, run_name="__main__")
"""


def save_bin(folder, source):
    """A safetensors folder -> the same with a .bin."""
    shutil.copytree(source, folder)
    torch.save(weights(folder), os.path.join(folder, "pytorch_model.bin"))
    os.remove(os.path.join(folder, "model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def launched(base, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("scale"))
    at = lambda name: os.path.join(folder, name)
    for name, text in (("faulty.py", FAULTY), ("shards.py", SHARDS), ("dying.py", DYING)):
        with open(at(name), "w") as f:
            f.write(text)
    torch.set_num_threads(1)
    run(base, at("one"), *STAGE3)
    run(base, at("one, 3 experts"), *STAGE3, "--n-experts", 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        run(base, at("one to fsdp"), *STAGE3)
    dense, tokenizer = load(base)                                                  # the layouts
    save(dense, at("clip"), layout="hf-clip")
    save(dense, at("llm"), tokenizer, layout="hf-llm")
    save(dense.bfloat16(), at("published"), tokenizer, layout="cumo")
    save(upcycle(load(base)[0], vision=4, connector=4, top_k=2), at("own experts"), tokenizer)
    save(upcycle(load(base)[0], vision=3, connector=3, text=3), at("published experts"), tokenizer, layout="cumo")
    save_bin(at("bin"), at("published experts"))
    save(m.CuMo(m.Config(**{**SMALL, "vision": {**SMALL["vision"], "dim": 256, "ffn_dim": 1024, "n_layers": 4},
                            "text": {**SMALL["text"], "dim": 256, "ffn_dim": 1024, "n_layers": 8}})), at("large"), tokenizer)
    layouts = [[None, at(name)] for name in ("published", "own experts", "published experts", "bin")]
    layouts += [[at("clip"), at("llm")], [None, at("large")]]
    real = ["--preset", "cumo-mistral-7b", "--out", at("real"), "--steps", "1", "--batch-size", "2", "--max-length", "400", "--device",
            "cpu", "--stage", "1", "--vision", at("clip"), "--llm", at("llm"), *write_llava(folder, mixture())]
    fsdp, stopped = [*STAGE3, "--fsdp"], dict(fault="interrupt", at=3, rank=1)
    jobs = [dict(argv=[at("memory"), json.dumps(layouts)], file=at("shards.py")),
            dict(argv=real + ["--fsdp"]),
            dict(argv=flags(base, at("fsdp"), *fsdp)),
            dict(argv=flags(base, at("fsdp, 3 experts"), *fsdp, "--n-experts", 3)),
            dict(argv=flags(base, at("one to fsdp"), *fsdp, "--resume")),
            dict(argv=flags(base, at("fsdp to one"), *fsdp), **stopped),
            dict(argv=flags(base, at("fsdp to ddp"), *fsdp), **stopped),
            dict(argv=flags(base, at("fsdp to ddp"), *STAGE3, "--resume", "--no-fsdp")),
            dict(argv=flags(base, at("fsdp to ep"), *fsdp), **stopped),
            dict(argv=flags(base, at("fsdp to ep"), *STAGE3, "--resume", "--expert-parallel", 2)),
            dict(argv=[*flags(base, at("full"), *fsdp), "full"], file=at("faulty.py")),
            dict(argv=flags(base, at("three"), *THREE, "--fsdp")),
            dict(argv=[*flags(base, at("killed"), *fsdp), "killed"], file=at("faulty.py"))]
    code, out, err = start(folder, jobs, processes=2)
    with open(at("result0")) as f:
        results = json.load(f)
    failed = [(r, j) for r, j in zip(results, jobs) if (r is not None) != (j.get("fault") == "interrupt" or j["argv"][-1] == "full")]
    assert code != 0 and len(results) == len(jobs) - 1 and not failed, f"{failed}\n{out}\n{err[-9000:]}"
    return folder, dict(zip((j["argv"][-1] for j in jobs), results))


def only(folder, name):
    """The one checkpoint that a stopped run left."""
    (step,) = os.listdir(os.path.join(folder, name, "checkpoint"))
    return step


# ---------------------------------------------------------------------------------------------------------------------
# 1. No process holds the whole model


def test_every_layout_is_filled_shard_by_shard_with_what_one_process_loads(launched):
    for rank in "01":
        with open(os.path.join(launched[0], "memory" + rank)) as f:
            result = json.load(f)
        assert result["same"] == [True] * 5
        assert all(0.45 < share < 0.55 for share in result["share"]), result       # 3 experts too


def test_a_process_never_holds_much_more_than_its_share(launched):
    for rank in "01":
        with open(os.path.join(launched[0], "memory" + rank)) as f:
            mib = json.load(f)["mib"]
        assert mib["model"] > 60 and mib["sharded"] < 0.5 * mib["model"] + 16 < 0.9 * mib["whole"], mib


@pytest.mark.parametrize("name", ["", ", 3 experts"])
def test_shards_filled_from_the_folder_train_as_one_process(launched, name):
    assert_same_run(f"{launched[0]}/fsdp{name}", f"{launched[0]}/one{name}")


def test_fsdp_starts_from_a_tower_and_a_decoder(launched):
    model, tower = load(f"{launched[0]}/real/stage1")[0], load(f"{launched[0]}/clip")[0]
    assert model.config.vision.scales == [1, 3] and rows(f"{launched[0]}/real")[0]["lm"] > 1
    assert all(torch.equal(w, model.vision.state_dict()[name]) for name, w in tower.state_dict().items())


def test_one_process_under_torchrun_is_sharded_too(launched, base):
    out = f"{launched[0]}/alone"
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", os.path.join(ROOT, "train.py"),
                        *flags(base, out, *STAGE3, "--fsdp")], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stdout + p.stderr
    assert_same_run(out, f"{launched[0]}/one")


@pytest.mark.parametrize("world, cut", [(2, [0, 0, 1, 0, 0]), (4, [0, 1, 1, 0, 0]), (8, [1, 1, 1, 0, 0])])
def test_fsdp_cuts_where_all_processes_get_the_same(monkeypatch, world, cut):
    monkeypatch.setattr(train, "WORLD", world)
    shapes = [(4, 64, 32), (2, 64, 32), (3, 64, 32), (64, 32), (64,)]
    assert [train.shard_dimension(torch.empty(shape)).dim for shape in shapes] == cut
    assert train.shard_dimension(torch.empty(37)) is None                                     # the last gets fewer, or none


# ---------------------------------------------------------------------------------------------------------------------
# 2. Checkpoints


def test_the_shards_of_two_processes_resume_in_one(launched, base, tmp_path):
    out = shutil.copytree(f"{launched[0]}/fsdp to one", tmp_path / "o")
    step = only(launched[0], "fsdp to one")
    assert {"run.json", ".metadata", "__0_0.distcp", "__1_0.distcp"} == set(os.listdir(out / "checkpoint" / step))
    assert 0 < int(step) < 5
    sizes = [os.path.getsize(out / "checkpoint" / step / f"__{rank}_0.distcp") for rank in (0, 1)]
    assert max(sizes) < 1.2 * min(sizes)                                           # nothing was gathered
    run(base, out, *STAGE3, "--resume")
    assert_same_run(out, f"{launched[0]}/one")
    assert not (out / "checkpoint").exists()


@pytest.mark.parametrize("way", ["one to fsdp", "fsdp to ddp", "fsdp to ep"])
def test_a_run_resumes_in_another_form(launched, way):
    assert_same_run(f"{launched[0]}/{way}", f"{launched[0]}/one")
    assert not [name for name in os.listdir(f"{launched[0]}/{way}") if "checkpoint" in name]


@pytest.mark.parametrize("way, left", [("full", {"2"}), ("killed", {"2", "4"})])
def test_a_checkpoint_that_fails_leaves_the_one_before(launched, base, tmp_path, way, left):
    out = shutil.copytree(f"{launched[0]}/{way}", tmp_path / "o")
    assert set(os.listdir(out / "checkpoint")) == left and train.newest_checkpoint(str(out))[1]["step"] == 2
    if way == "full":
        said = launched[1]["full"]
        assert said.startswith("train.py: ") and "checkpoint/4: cannot be written: " in said and "No space" in said and "\n" not in said
    run(base, out, *STAGE3, "--resume")
    assert_same_run(out, f"{launched[0]}/one")
    assert not (out / "checkpoint").exists()


def test_the_checks_on_resuming_hold_for_shards_too(launched, base, tmp_path):
    out = shutil.copytree(f"{launched[0]}/fsdp to one", tmp_path / "o")
    with pytest.raises(ValueError, match=r"run.json was written with lr 0.001 \(now 0.5\): give the same flags"):
        run(base, out, *STAGE3, "--resume", "--lr", 0.5)
    with pytest.raises(ValueError, match=r"run.json was written with stage 3 \(now 2\)"):
        run(base, out, *STAGE3, "--resume", "--stage", 2)
    with pytest.raises(ValueError, match="holds an unfinished run"):
        run(base, out, *STAGE3)


# ---------------------------------------------------------------------------------------------------------------------
# 3. A process dies


def test_torchrun_brings_a_run_back_that_ends_as_if_nothing_had_happened(launched, base):
    out = f"{launched[0]}/died"
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2",
                        f"{launched[0]}/dying.py", ROOT, str(4 + 4), *flags(base, out, *THREE, "--fsdp")],      # stage 2, behind step 2
                       capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stdout + p.stderr
    for line in ("stage 2: going on after step 2 of 4", "stage 1: done before"):
        assert p.stdout.count(line) == 1, p.stdout + p.stderr
    assert not os.path.exists(f"{out}.1")
    assert [(r["stage"], r["step"]) for r in rows(out)] == [(s, i) for s in (1, 2, 3) for i in range(4)]
    assert rows(out) == rows(f"{launched[0]}/three")
    for name, w in weights(f"{launched[0]}/three").items():
        assert torch.equal(weights(out)[name], w), name


def test_signal_handlers_come_back_when_training_raises(base, tmp_path):
    before = [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="purple"):
        run(base, tmp_path / "o", "--stage", 3, "--strict", *write_llava(tmp_path, [{**mixture()[0], "image": "purple.png"}] * 8))
    assert [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)] == before
