"""train.py's runs: --resume alone goes on, a finished model is left alone, damage is named, flags act or are refused, data that does not
fill a batch, and data that is held out."""
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import data as d
import generate
import train
from test_routing import made
from test_train import (ROOT, SCRIPT, assert_same_run, base, flags, interrupt_at, mixture, one, quiet_machine, rows, run, same,     # noqa: F401 (fixtures)
                        weights, write_llava)
from upcycle import load, save, upcycle, write_tensors

STAGE3 = ("--stage", 3, "--lr", 1e-3, "--steps", 5, "--batch-size", 4, "--eval-questions", 4)


def resume(out, *more):
    train.main(["--resume", "--out", str(out), *map(str, more)])


def read(out, *names):
    with open(os.path.join(out, *names), "rb") as f:
        return f.read()


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run that nobody stops."""
    torch.set_num_threads(1)
    return run(base, tmp_path_factory.mktemp("whole") / "o", *STAGE3)


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """The same run, stopped after step 4, with the checkpoints of steps 2 and 4. Each test damages a copy."""
    out = tmp_path_factory.mktemp("stopped") / "o"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "drop_checkpoints", lambda *_, **__: None)            # a kill just before this leaves both
        interrupt_at(patch, 4)
        run(base, out, *STAGE3, "--save-every", 2)
    assert sorted(os.listdir(out / "checkpoint")) == ["2", "4"]
    return out


def assert_is(out, whole):
    assert rows(out) == rows(whole) and same(weights(out), weights(whole))
    assert not os.path.exists(os.path.join(out, "checkpoint")) and os.path.exists(os.path.join(out, "routing.png"))


def forget_that_it_is_measured(out):
    (out / "run.json").write_text(json.dumps({**json.loads(read(out, "run.json")), "done": []}))


# ---------------------------------------------------------------------------------------------------------------------
# 1. --resume


def test_resume_alone_goes_on_with_the_flags_of_the_run(stopped, whole, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "o")
    resume(out, "--save-every", 3)                                                 # a flag that may differ
    assert_is(out, whole)
    kept = json.loads(read(out, "run.json"))
    assert kept["flags"]["lr"] == "0.001" and kept["flags"]["save_every"] == 3 and kept["done"] == [3]


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_finished_model_is_never_touched(base, whole, tmp_path, version):
    out = shutil.copytree(whole, tmp_path / "o")
    if version == "earlier":
        os.remove(out / "run.json")
    before = {name: read(out, name) for name in os.listdir(out)}
    with pytest.raises(ValueError, match="nothing to resume: .* holds a finished run"):
        resume(out)
    with pytest.raises(ValueError, match="holds this stage already, and it is finished"):
        run(base, out, *STAGE3)
    assert {name: read(out, name) for name in os.listdir(out)} == before


def test_killed_while_it_is_measured_a_run_measures_and_draws(base, stopped, whole, tmp_path, monkeypatch):
    """Killed three times, each time a bit later: before there are scores, and before either picture."""
    out = shutil.copytree(stopped, tmp_path / "o")

    def killed(*_, **__):
        raise KeyboardInterrupt
    made = []
    for where in ("evaluate", "draw_experts", "draw_curves"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(generate, where, killed)
            resume(out)
        made.append(os.stat(out / "model.safetensors").st_mtime_ns)
        assert not (out / "checkpoint").exists() and not (out / "loss.png").exists()
        assert (out / "scores.jsonl").exists() == (where != "evaluate")
    resume(out)
    assert_is(out, whole)
    assert {*made, os.stat(out / "model.safetensors").st_mtime_ns} == {made[0]}     # trained once
    assert {name for name in os.listdir(whole)} == set(os.listdir(out))
    assert len(read(out, "scores.jsonl").splitlines()) == 1
    with pytest.raises(ValueError, match="nothing to resume"):
        resume(out)


def test_the_checkpoint_of_a_finished_stage_is_left_over(stopped, whole, tmp_path):
    """A kill between saving the model and dropping its checkpoints."""
    out = shutil.copytree(whole, tmp_path / "o")
    shutil.copytree(stopped / "checkpoint", out / "checkpoint")
    forget_that_it_is_measured(out)
    model = os.stat(out / "model.safetensors").st_mtime_ns
    resume(out)
    assert_is(out, whole)
    assert os.stat(out / "model.safetensors").st_mtime_ns == model


def test_a_run_goes_on_behind_its_last_finished_stage(tmp_path):
    args = train.parse(["--out", str(tmp_path)])
    finished = lambda *names: train.stage_to_resume(args, [1, 2, 3], names)
    assert [finished(), finished(1), finished(1, 2), finished(2), finished(3)] == [0, 1, 2, 2, 3]


def test_resume_with_a_wrong_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="typo holds no run to go on with"):
        resume(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_a_flag_that_repeats_a_default_is_no_contradiction(stopped, tmp_path):
    assert train.parse(["--resume", "--out", str(stopped), "--seed", "0", "--recipe", "cumo"]).lr == "0.001"
    assert train.parse(["--resume", "--out", str(stopped), "--lr", "1e-3"]).lr == "1e-3"  # the same rate
    with pytest.raises(ValueError, match="lr 0.001"):
        train.parse(["--resume", "--out", str(stopped), "--lr", "2e-3"])


@pytest.mark.parametrize("changed", ["data.json", "val.json"])
def test_data_that_has_changed_is_another_run(base, tmp_path, changed):
    argv = write_llava(tmp_path, mixture())
    (tmp_path / "val.json").write_bytes((tmp_path / "data.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run(base, tmp_path / "o", "--stage", 3, "--steps", 3, "--batch-size", 4, *argv, "--val", tmp_path / "val.json")
    with pytest.raises(ValueError, match="was written with val .*val.json .now .*other.json.: give the same flags"):
        resume(tmp_path / "o", "--val", tmp_path / "other.json")
    samples = json.loads((tmp_path / changed).read_text())
    (tmp_path / changed).write_text(json.dumps(samples[::-1]))
    with pytest.raises(ValueError, match="checkpoint/2: what --data .* names has other contents now"):
        resume(tmp_path / "o")


def test_a_resumed_run_that_is_refused_stays_as_it_was(stopped, whole, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "o")
    before = (out / "run.json").read_bytes()
    for bad in (["--micro-batch", 3], ["--init", tmp_path]):
        with pytest.raises(ValueError):
            resume(out, *bad)
        assert (out / "run.json").read_bytes() == before
    resume(out, "--save-every", 3)
    assert json.loads((out / "run.json").read_text())["flags"]["save_every"] == 3
    assert_is(out, whole)


def test_samples_are_no_longer_than_what_the_decoder_learnt_to_read(base, tmp_path):
    model, tokenizer = load(base)
    model.config.text.max_positions = 100
    save(model, tmp_path / "short", tokenizer)
    args = train.parse(["--stage", "3", "--init", str(tmp_path / "short"), "--out", str(tmp_path / "o")])
    stage = train.settings(args, 3)
    train.apply_flags(args, stage, model)
    assert stage.max_length == 100                                                 # the stage's own would be 256
    with pytest.raises(ValueError, match="--max-length 101: this decoder learnt to read 100 tokens"):
        run(tmp_path / "short", tmp_path / "o", "--stage", 3, "--max-length", 101)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Damage

DAMAGE = [("checkpoint/4/.metadata", "cut"), ("checkpoint/4/.metadata", "empty"), ("checkpoint/4/.metadata", "missing"),
          ("checkpoint/4/__0_0.distcp", "cut"), ("checkpoint/4/__0_0.distcp", "empty"), ("checkpoint/4/__0_0.distcp", "missing"),
          ("checkpoint/4/run.json", "cut"), ("checkpoint/4/run.json", "empty"), ("checkpoint/4/run.json", "{}"),
          ("run.json", "cut"), ("run.json", "{}"), ("run.json", '{"flags": {"lr": "abc"}, "done": []}'),
          ("run.json", '{"flags": {"no_such": 1}, "done": []}'), ("run.json", '{"flags": ' * 50_000)]


def damage(file, how):
    if how == "missing":
        os.remove(file)
    elif how in ("cut", "empty"):
        os.truncate(file, os.path.getsize(file) // 2 if how == "cut" else 0)
    else:
        file.write_text(how)


@pytest.mark.parametrize("file, how", DAMAGE, ids=lambda x: x[:40])
def test_damage_is_one_line_that_names_the_file(stopped, tmp_path, file, how):
    out = shutil.copytree(stopped, tmp_path / "o")
    shutil.rmtree(out / "checkpoint" / "2")
    damage(out / file, how)
    with pytest.raises(ValueError) as e:
        resume(out)
    assert file in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_where_a_checkpoint_is_damaged_the_one_before_is_used(stopped, whole, tmp_path, capsys, file):
    out = shutil.copytree(stopped, tmp_path / "o")
    damage(out / "checkpoint" / "4" / file, "cut")
    resume(out)
    assert "going on after step 2 of 5" in capsys.readouterr().out
    assert_is(out, whole)


@pytest.mark.parametrize("how", ["empty", "missing", '{"identity": {}, "counts": {}, "step": 4}'])
def test_where_nothing_says_what_a_checkpoint_is_the_one_before_is_used(stopped, tmp_path, how):
    out = shutil.copytree(stopped, tmp_path / "o")
    damage(out / "checkpoint" / "4" / "run.json", how)
    path, about = train.newest_checkpoint(str(out))
    assert path.endswith("checkpoint/2") and about["step"] == 2


def test_foreign_and_cut_lines_in_the_log_and_half_written_files_are_no_reason_to_stop(stopped, whole, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "o")
    with open(out / "log.jsonl", "ab") as f:
        f.write(b'[1]\n"x"\n\n{"a": 1}\n\xff\xfe\n{"stage": 3, "step": "x"}\n' + b"[" * 100_000 + b'\n{"stage": 3, "step": 4, "lo')
    (out / "model.safetensors.999999999.tmp").write_text("half")                   # of a process that is gone
    resume(out)
    assert_is(out, whole)
    assert not list(out.glob("*.tmp"))


def test_a_picture_that_fails_ends_no_run(whole, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OverflowError("int too large")
    out = shutil.copytree(whole, tmp_path / "o")
    forget_that_it_is_measured(out)
    for picture in ("draw_experts", "draw_curves"):
        monkeypatch.setattr(generate, picture, fail)
    resume(out)
    assert capsys.readouterr().out.count("could not be drawn") == 2
    assert json.loads(read(out, "run.json"))["done"] == [3]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tell")
def test_a_process_whose_torchrun_is_killed_dies_with_it():
    heard, alive = os.pipe()
    parent = os.fork()
    if parent == 0:                                                                # torchrun ...
        if os.fork() == 0:                                                         # ... and its child
            train.die_with_parent()
            os.write(alive, b"ready")
            time.sleep(20)
            os._exit(0)
        time.sleep(20)
    os.close(alive)
    assert os.read(heard, 5) == b"ready"
    os.kill(parent, 9)
    os.waitpid(parent, 0)
    begun = time.time()
    assert os.read(heard, 5) == b"" and time.time() - begun < 10                   # the pipe ends as nobody is left who could write


@pytest.mark.parametrize("n_experts", [48, 256])
def test_the_routing_of_many_experts_in_many_layers_is_drawn(tmp_path, n_experts):
    generate.draw_decoder_routing(made([n_experts] * 128, 2, n=3), str(tmp_path / "r.png"))
    assert min(Image.open(tmp_path / "r.png").size) > 600


# ---------------------------------------------------------------------------------------------------------------------
# 3. Flags

REFUSED = {                                          # flags -> words that the message must hold
    "--steps 100000000000000000000": "--steps = 100000000000000000000 must be at most 10000000",
    "--seed 100000000000000000000": "--seed = 100000000000000000000 must be at most",
    "--seed -1": "--seed = -1 must be at least 0",
    "--plan --peak-tflops 0": "--peak-tflops = 0.0 must be above 0",
    "--plan --mfu 0": "--mfu = 0.0 must be above 0",
    "--plan --mfu 1.5": "--mfu = 1.5 must be at most 1",
    "--lr nan": "'nan' is no learning rate",
    "--lr inf": "'inf' is no learning rate",
    "--lr -1": "'-1' is no learning rate",
    "--warmup 2": "--warmup = 2.0 must be at most 1",
    "--grad-clip 0": "--grad-clip = 0.0 must be above 0",
    "--weight-decay nan": "--weight-decay = nan must be at least 0",
    "--balance-coef inf": "--balance-coef = inf must be at most",
    "--data x --val-fraction 1": "--val-fraction = 1.0 must be at most 0.9",
    "--images x": "--images does nothing without --data",
    "--epochs 2": "--epochs does nothing without --data",
    "--data x --epochs 2 --steps 3": "--epochs does nothing with --steps",
    "--data x --eval-questions 5": "--eval-questions does nothing with --data",
    "--val x": "--val does nothing without --data",
    "--data x --val-every 5": "--val-every does nothing without --val or --val-fraction or --facts",
    "--data x --val y --val-fraction 0.1": "--val does nothing with --val-fraction",
    "--gpus 8": "--gpus does nothing without --plan",
    "--recipe uni-moe --facts 5": "--facts shows pictures alone",
    "--mfu 0.5": "--mfu does nothing without --plan",
    "--trains audio": "a model of --recipe cumo hears nothing",
    "--lora-alpha 8": "--lora-alpha does nothing without --lora-rank",
    "--recipe uni-moe --audio x": "--audio does nothing without --vision",
    "--noisy-gate": "--noisy-gate belongs to --recipe moe-llava",
    "--capacity-factor 1": "--capacity-factor belongs to --recipe moe-llava",
    "--moe-layers all": "--moe-layers belongs to --recipe moe-llava and uni-moe",
    "--recipe uni-moe --upcycle-at 2": "--upcycle-at belongs to --recipe cumo and moe-llava",
    "--dense --n-experts 8": "--n-experts is about experts, and this run makes none",
    "--stage 1 --top-k 1": "--top-k is about experts, and this run makes none",
    "--dense --trains text": "give --stage",
    "--dense --lora-rank 8": "--lora-rank is about the stages with experts",
    "--trains none": "nothing would train in stage 3; give --lora-rank",
    "--stage 2 --init x --trains none": "nothing would train in stage 2",
    "--recipe uni-moe --experts a,b": "give --stage 3",
    "--recipe uni-moe --stage 3 --init x --experts a,b --n-experts 4": "the mixture has 2 experts",
    "--recipe uni-moe --n-experts 8": "the mixture has 4 experts",
    "--recipe uni-moe --stage 3 --init x --experts a --n-experts 4,2": "all layers have one number",
    "--recipe uni-moe --stage 3 --init x --experts a,b,c --top-k 4": "top_k = 4 of 3 experts",
    "--out o --data o/data.json": "--data o/data.json lies in --out o, which a new run moves aside",
    "--out o --data d.json --images o/pictures": "--images o/pictures lies in --out o",
}


@pytest.mark.parametrize("argv", REFUSED)
def test_a_flag_acts_or_is_refused(argv):
    with pytest.raises(ValueError) as e:
        train.parse(argv.split())
    assert REFUSED[argv] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("value, words", [("abc", "must be of the type int"), (True, "must be of the type int"), (1.5, "must be of the type int"),
                                          ([], "must be of the type int"), (0, "must be at least 1"), (10**400, "must be at most")])
def test_limits_stand_in_the_fields_and_one_check_reads_them(value, words):
    fields = {f.name: f for f in train.dataclasses.fields(train.Args)}
    with pytest.raises(ValueError, match=words):
        train.check_limits(fields["steps"], value)
    train.check_limits(fields["steps"], None)                                      # not given
    train.check_limits(fields["z_coef"], 1)                                            # JSON has one kind of number
    with pytest.raises(ValueError, match="--seed = None"):
        train.check_limits(fields["seed"], None)


def test_unimoes_experts_are_as_many_as_their_folders():
    argv = "--recipe uni-moe --stage 3 --init x --experts"
    assert train.mixture(train.parse(f"{argv} a,b,c,d,e --top-k 5".split())) == list("abcde")
    assert train.mixture(train.parse(f"{argv} a --n-experts 3".split())) == ["a"] * 3
    args = train.parse(f"{argv} a,b --plan --preset uni-moe-7b --steps 1".split())
    assert set(train.planned(args, train.settings(args, 3))[0].text.n_experts) == {2}


def test_without_adapters_unimoes_stage_2_trains_the_ffns_themselves():
    stage = train.settings(train.parse("--recipe uni-moe --lora-rank 0".split()), "2 sound")
    assert stage.trains == ("text.ffn",) and stage.lora is None
    assert train.settings(train.parse("--recipe uni-moe".split()), "2 sound").trains == ()


def test_experts_that_no_stage_makes_stop_the_first_one(base, tmp_path):
    for argv, words in ((("--trains", "text.moe"), "--trains text.moe: the decoder has no experts"),
                        (("--lr", "text.router=1e-3,1e-4"), "--lr text.router=1e-3,1e-4: the decoder has no experts")):
        with pytest.raises(ValueError, match=words):
            run(base, tmp_path / "o", *argv)
        assert not (tmp_path / "o" / "stage1").exists()


def test_two_runs_do_not_share_a_folder(base, whole, tmp_path):
    """A second one would move the folder of the first aside, and the first would go on writing into the second's."""
    out = shutil.copytree(whole, tmp_path / "o")
    hold = f"import fcntl, os; fcntl.flock(os.open({str(out)!r}, os.O_RDONLY), fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for argv in ((), STAGE3):
            with pytest.raises(ValueError, match="another run is training there"):
                run(base, out, "--steps", 1, *argv)
        other.kill()                                                               # the lock goes with it, however it ends
    with pytest.raises(ValueError, match="it is finished"):
        run(base, out, *STAGE3)
    hold = hold.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB")
    is_free = lambda: subprocess.run([sys.executable, "-c", hold], input=b"\n", capture_output=True).returncode == 0
    train.lock_folder(out)
    assert not is_free()
    train.lock_folder(tmp_path)                                                    # this process holds one at a time
    assert is_free()
    train.unlock_folder()


def test_a_process_that_loads_data_does_not_keep_the_lock_of_a_run_that_was_killed(tmp_path):
    """It may outlive the run by some seconds, and the run shall go on at once."""
    script = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
import train
train.lock_folder({str(tmp_path)!r})
if os.fork() == 0:                                                                 # as DataLoader starts one
    train.leave_signals(0)
    print(1, flush=True)
    os.read(0, 1)
    os._exit(0)
os.wait()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        run.kill()
        os.waitpid(run.pid, 0)
        train.lock_folder(tmp_path)                                                # no error
        train.unlock_folder()
        run.stdin.write(b"x")


def test_a_folder_that_cannot_be_moved_aside_is_named_and_an_empty_one_is_used(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.Args(out=".")
    train.stages_done(args, [1, 2, 3])                                             # nothing to move
    (tmp_path / "old").touch()
    with pytest.raises(ValueError, match="--out . holds files, and cannot be moved aside"):
        train.stages_done(args, [1, 2, 3])


def test_a_full_disk_under_a_model_is_one_line_and_no_litter(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))                   # no file may become larger: as if the disk were full
    try:
        with pytest.raises(OSError, match="model.safetensors: cannot be written"):
            write_tensors(str(tmp_path / "model.safetensors"), {"w": torch.zeros(10000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_inf_clips_no_gradient():
    assert train.parse(["--grad-clip", "inf"]).grad_clip == math.inf


def test_fsdp_without_torchrun_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="--fsdp shards the model over the processes of torchrun"):
        run(base, tmp_path / "o", "--fsdp")


@pytest.mark.parametrize("argv, fits", [([], True), (["--n-experts", 3], True), (["--n-experts", 4], False), (["--n-experts", 3, "--top-k", 2], True),
                                        (["--top-k", 1], False), (["--top-k", 2], True), (["--experts-in", "vision,connector"], True),
                                        (["--experts-in", "vision,connector,text"], False), (["--experts-in", "vision"], False)])
def test_experts_that_a_model_has_are_those_that_were_given(base, argv, fits):
    model = upcycle(load(base)[0], vision=3, connector=3)
    args = train.parse([str(a) for a in ("--stage", 3, "--init", "x", *argv)])
    if fits:
        train.make_experts(args, model)
    else:
        with pytest.raises(ValueError, match=r"has experts already (\(([{]3[}] in vision|none in text), top-2\)|in connector: --experts-in)"):
            train.make_experts(args, model)


@pytest.mark.parametrize("argv, fits", [(["--moe-layers", "0"], True), (["--moe-layers", "1"], False), (["--moe-layers", "all"], False), ([], True)])
def test_layers_with_experts_are_those_that_were_given(base, argv, fits):
    model = upcycle(load(base)[0], text=[4, 0])
    args = train.parse(["--recipe", "moe-llava", "--stage", "3", "--init", "x", *argv])
    if fits:
        train.make_experts(args, model)
    else:
        with pytest.raises(ValueError, match="--moe-layers"):
            train.make_experts(args, model)


def test_parts_that_a_model_has_not_cannot_train(base, tmp_path):
    with pytest.raises(ValueError, match="hears nothing; --trains audio"):
        run(base, tmp_path / "o", "--stage", 3, "--trains", "audio")


def test_weight_decay_leaves_norms_biases_and_routers_alone(base):
    model = upcycle(load(base)[0].float(), vision=4, connector=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stage = train.Stage(lr=0.5)
    _, _, optimizer = train.set_up(train.parse(["--weight-decay", "0.1"]), stage, model, torch.device("cpu"), ())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()                                                               # without a gradient, nothing but decay moves a weight
    for name, p in model.named_parameters():
        last = name.split(".")[-1]
        decays = p.dim() > 1 and last not in ("router", "b_in", "b_out")
        assert torch.allclose(p, before[name] * (0.95 if decays else 1)), name
    assert {"router", "b_in", "bias", "cls"} <= {name.split(".")[-1] for name in before}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Data: epochs, batches, and what is held out


@pytest.mark.parametrize("n, world, argv, want", [          # -> steps, batch size, micro-batch
    (20, 1, [], (1, 20, 20)), (20, 1, ["--micro-batch", 8], (1, 16, 8)), (20, 2, [], (1, 20, 10)), (21, 2, [], (1, 20, 10)),
    (3, 2, [], (1, 2, 1)), (130, 1, [], (2, 64, 64)), (130, 1, ["--epochs", 3], (6, 64, 64)), (20, 1, ["--steps", 9], (9, 20, 20))])
def test_epochs_and_steps_are_told_and_a_batch_fits_the_data(monkeypatch, capsys, n, world, argv, want):
    monkeypatch.setattr(train, "WORLD", world)
    args = train.parse(["--data", "d.json", *map(str, argv)])
    stage = train.settings(args, 3)
    train.fit_to_data(args, stage, n)
    assert (stage.steps, stage.batch_size, stage.micro_batch) == want
    text = capsys.readouterr().out
    assert ("do not fill a batch of 64" in text) == (n < 64) and f"d.json: {n} samples, " in text
    assert (f"in each epoch {n % want[1]} others are left out" in text) == (n % want[1] > 0)
    batches = d.Batches(n, stage.batch_size, stage.micro_batch, world=world)
    assert batches.per_epoch * want[0] // stage.steps == n // want[1]


def test_fewer_samples_than_processes_are_an_error(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 4)
    args = train.parse(["--data", "d.json"])
    with pytest.raises(ValueError, match="d.json has 3 samples to learn from, fewer than the 4 processes"):
        train.fit_to_data(args, train.settings(args, 3), 3)


HELD = ("--stage", 3, "--steps", 3, "--batch-size", 4, "--lr", 1e-3, "--micro-batch", 2)


def start_two(folder, jobs):
    """test_train.start with two processes, without torchrun itself, which is a third one that loads torch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "two", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}
    argv = [sys.executable, "-c", SCRIPT, ROOT, os.path.join(folder, "result"), json.dumps(jobs)]
    processes = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        said = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    """Runs with 5 of 16 samples held out, and with 5 others in a file: in one process, and in two in two ways."""
    folder = tmp_path_factory.mktemp("held out")
    torch.set_num_threads(1)
    write_llava(folder, mixture()[:5], "val.json")
    learnt = write_llava(folder, mixture())
    ways = {"fraction": ["--val-fraction", 0.3, "--val-every", 2], "file": ["--val", folder / "val.json", "--val-every", 2], "none": []}
    argv = {name: [*HELD, *learnt, *more] for name, more in ways.items()}
    for name, more in argv.items():
        run(base, folder / name, *more)
    argv |= {"fsdp": [*argv["file"], "--fsdp"], "ep": [*argv["file"], "--expert-parallel", 2]}                 # ep is DDP too
    start_two(folder, [dict(argv=flags(base, folder / name, *argv[name])) for name in ("fsdp", "ep")])
    assert json.loads(read(folder, "result0")) == [None] * 2
    return folder, argv


def held_out_rows(out):
    return [(r["step"], r["val_loss"]) for r in rows(out) if "val_loss" in r]


@pytest.mark.parametrize("way", ["fraction", "file"])
def test_the_loss_on_held_out_data_is_the_mean_over_its_labels(measured, way):
    folder, argv = measured
    out = folder / way
    model, tokenizer = load(str(out))
    samples = d.LlavaJson(str(folder / ("val.json" if way == "file" else "data.json")), str(folder))
    which = range(5) if way == "file" else torch.randperm(16, generator=torch.Generator().manual_seed(0))[:5].tolist()
    encoded = d.Encoded(samples, tokenizer, "tiny", 48, 36, 256)
    total = n = 0
    for i in which:
        batch = d.collate([encoded[i]])
        with torch.no_grad():
            loss = model.float()(batch["tokens"], batch["images"], labels=batch["labels"]).parts["lm"]
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total, n = total + labels * loss.item(), n + labels
    found = held_out_rows(out)
    assert [step for step, _ in found] == [1, 2] and found[-1][1] == pytest.approx(total / n, rel=1e-5)
    assert found[0][1] > found[1][1]


def test_to_measure_changes_nothing(measured):
    folder, _ = measured
    assert [r for r in rows(folder / "file") if "val_loss" not in r] == rows(folder / "none")
    assert same(weights(folder / "file"), weights(folder / "none"))


@pytest.mark.parametrize("way", ["fsdp", "ep"])
def test_all_processes_measure_together(measured, way):
    folder, _ = measured
    assert_same_run(folder / way, folder / "file", 1e-4)


def test_a_resumed_run_has_each_measurement_once(base, measured, tmp_path):
    folder, argv = measured
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4)                                                     # the second micro-batch of the second step
        run(base, tmp_path / "o", *argv["fraction"])
    assert (tmp_path / "o" / "checkpoint" / "2").exists()
    resume(tmp_path / "o")
    assert rows(tmp_path / "o") == rows(folder / "fraction")


def test_what_is_held_out_is_not_learnt(tmp_path):
    samples = list(range(100))
    args = train.parse(["--data", "d.json", "--val-fraction", "0.02"])
    kept, order, held = train.hold_out(args, samples, {"lengths": samples})
    assert len(held) == 2 and sorted([*kept, *held]) == samples and order == {"lengths": list(kept)}
    with pytest.raises(ValueError, match="leaves nothing to learn from"):
        train.hold_out(args, samples[:1], {"lengths": samples[:1]})


def test_the_picture_shows_the_held_out_loss(measured):
    colors = lambda way: {color for _, color in Image.open(measured[0] / way / "loss.png").convert("RGB").getcolors(10**6)}
    red = (192, 57, 43)
    assert red in colors("fraction") and red not in colors("none")


def test_the_closing_hint_asks_about_the_users_data(base, tmp_path):
    args = train.parse(["--out", "o", *write_llava(tmp_path, [one("red")])])
    assert train.next_command(args, 3) == f"python generate.py --model o --image {tmp_path}/red.png --prompt 'What color is this?'"
    frames = tmp_path / "clip"
    frames.mkdir()
    shutil.copy(tmp_path / "red.png", frames)
    args.data = write_llava(tmp_path, [{"id": 1, "video": "clip", "conversations": [{"from": "human", "value": "<video>\nWhat happens?"},
                                                                                    {"from": "gpt", "value": "Red."}]}])[1:2]
    assert train.next_command(args, 3) == f"python generate.py --model o --video {frames} --prompt 'What happens?'"
    args = train.parse(["--out", "o", *write_llava(tmp_path, [{"conversations": 5}])])
    assert train.next_command(args, 3).endswith('--prompt "What is this?"')
