"""train.py as practitioners expect it: values by a model's size, mixtures of files, learning rates by part, the best weights, packed rows."""
import dataclasses
import json
import os
import signal
import shutil

import pytest
import torch

import data as d
import train
from model import part_parameters
from test_train import (assert_same_run, base, interrupt_at, mixture, one, quiet_machine, rows, run, same, say, towers,  # noqa: F401
                        weights, write_llava)
from upcycle import load, upcycle
from upcycle import main as upcycle_main
from upcycle import parse as upcycle_parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and three files: one of 16 samples, two of 4."""
    folder = tmp_path_factory.mktemp("files")
    for name, samples in (("a", mixture()), ("b", [one("red")] * 4), ("c", [{"conversations": say("Say red.", "red")}] * 4)):
        write_llava(folder, samples, f"{name}.json")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# 1. Without a preset


def by_size(towers, monkeypatch, tiny, small, *more):  # noqa: F811
    monkeypatch.setattr(train, "SIZES", {"tiny": tiny, "small": small})
    args = train.parse(["--stage", "1", *towers[0], *more])
    stage = train.settings(args, 1)
    model, _ = train.load_model(args, stage, "", None)
    stage.name = 3                                                                 # where everything trains
    train.apply_flags(args, stage, model)
    return args, stage, model.config


def test_template_and_scales_come_from_the_folders_and_flags_and_a_preset_still_rules(towers, monkeypatch):  # noqa: F811
    args, _, config = by_size(towers, monkeypatch, 1e9, 1e9)
    assert (config.template, config.vision.scales, args.out) == ("tiny", [1], os.path.join("out", "llm"))
    for preset, template in (("cumo-mistral-7b", "mistral"), ("cumo-1b", "vicuna"), ("tiny", "tiny")):
        _, _, config = by_size(towers, monkeypatch, 1e9, 1e9, "--preset", preset)
        assert config.template == template and config.vision.scales == ([1] if preset == "tiny" else [1, 3])
    _, _, config = by_size(towers, monkeypatch, 1e9, 1e9, "--preset", "cumo-1b", "--scales", "1,2", "--template", "vicuna")
    assert config.vision.scales == [1, 2] and config.template == "vicuna"


def test_without_a_preset_hyperparameters_go_by_the_models_size(towers, monkeypatch, capsys):  # noqa: F811
    values = lambda stage: (stage.lr, stage.batch_size, stage.max_length, stage.micro_batch, stage.steps)
    assert values(by_size(towers, monkeypatch, 1e9, 1e9)[1])[0] == train.TINY[1]["lr"] and "no --preset" not in capsys.readouterr().out
    assert values(by_size(towers, monkeypatch, 10, 1e9)[1]) == (5e-5, 256, 4096, 4, None)
    assert "no --preset; 0.00B activated parameters: the values for small models" in capsys.readouterr().out
    assert values(by_size(towers, monkeypatch, 10, 10)[1]) == (4e-6, 256, 4096, 4, None)
    assert values(by_size(towers, monkeypatch, 10, 10, "--lr", "1e-4", "--micro-batch", "2")[1]) == (1e-4, 256, 4096, 2, None)
    assert values(by_size(towers, monkeypatch, 10, 10, "--preset", "tiny")[1])[1:] == (64, 256, 64, 100)


def test_all_stages_run_without_a_preset(towers, tmp_path, capsys):  # noqa: F811
    train.main([*towers[0], *towers[1], "--scales", "1,2", "--steps", "1", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "o")])
    config = load(str(tmp_path / "o"))[0].config
    assert (config.template, config.vision.scales, config.connector.n_experts) == ("tiny", [1, 2], 4)
    text = capsys.readouterr().out
    assert "nanoCuMo llm on 1 x cpu" in text and text.count("template plain") == 1 and text.count("template tiny") == 2


# ---------------------------------------------------------------------------------------------------------------------
# 2. Mixtures of files


def test_an_epoch_of_a_mixture_has_its_shares_and_every_sample_of_a_source_equally_often():
    sources = [0] * 70 + [1] * 20 + [2] * 10
    batches = d.Batches(100, 10, 10, seed=3, sources=sources, shares=[0.25, 0.5, 0.25])
    seen = torch.zeros(100, dtype=torch.long)
    for number in range(4):
        epoch = batches.epoch(number).flatten()
        assert [sum(sources[i] == k for i in epoch.tolist()) for k in range(3)] == [25, 50, 25]
        seen += epoch.bincount(minlength=100)
        for k in range(3):                                                         # over the epochs' borders, too
            counts = seen[torch.tensor(sources) == k]
            assert counts.max() - counts.min() <= 1
    first = [[sources[i] for i in batch] for batch in batches.epoch(0).tolist()]
    assert all(len(set(batch)) > 1 for batch in first)                             # no step has one source alone


@pytest.mark.parametrize("weights", [(1.5, 1, 1.5), (2.5, 1, 1, 1.5), (0.5, 1, 2, 0.5), (1,) * 10])
def test_every_file_with_a_share_of_one_sample_gives_one(weights):
    """Rounding to even would give nothing to what lies between 1.5 and 2.5."""
    n = round(sum(weights))
    sources = [i % len(weights) for i in range(n * len(weights))]
    batches = d.Batches(n, n, n, sources=sources, shares=[weight / sum(weights) for weight in weights])
    drawn = [sources[i] for i in batches.mixture(0).tolist()]
    assert len(drawn) == n and all(drawn.count(i) >= weight - 0.5 for i, weight in enumerate(weights))


@pytest.mark.parametrize("lengths", [None, [i % 7 for i in range(90)]])
def test_a_mixture_goes_on_exactly_and_is_the_same_for_any_number_of_processes(lengths):
    kw = dict(seed=5, lengths=lengths, sources=[i % 3 for i in range(90)], shares=[0.2, 0.2, 0.6])
    take = lambda n, *args, **more: [batch for _, batch in zip(range(n), d.Batches(90, 8, *args, **kw, **more))]
    whole = take(30, 8)
    for start in (1, 10, 11, 12, 23):
        assert take(30 - start, 8, start_step=start) == whole[start:]
    ranks = [take(60, 2, rank=rank, world=2) for rank in (0, 1)]
    for step in range(30):
        assert sorted(sum([*ranks[0][2 * step:2 * step + 2], *ranks[1][2 * step:2 * step + 2]], [])) == sorted(whole[step])
    if lengths:                                                                    # lengths sort a step's samples, not the steps
        assert all([lengths[i] for i in batch] == sorted(lengths[i] for i in batch) for batch in whole)


def test_a_run_on_a_mixture_says_its_shares_and_resumes_exactly(base, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    broken = {"conversations": "hello"}                                            # is replaced, as in a single file
    write_llava(folder, [*mixture()[:15], broken], "broken.json")
    files = ["--data", f"{folder / 'broken.json'}:1", f"{folder / 'b.json'}:3", "--images", str(folder), "--batch-size", 4, "--steps", 6]
    whole = run(base, tmp_path / "whole", "--stage", 3, *files)
    text = capsys.readouterr().out
    assert "broken.json: 25.0% of an epoch, 0.312 times its 16 samples" in text and "b.json: 75.0% of an epoch, 3.75 times its 4 samples" in text
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        run(base, tmp_path / "o", "--stage", 3, *files)
    shutil.copytree(tmp_path / "o", tmp_path / "other")
    train.main(["--resume", "--out", str(tmp_path / "o")])
    assert rows(tmp_path / "o") == rows(whole) and same(weights(tmp_path / "o"), weights(whole))

    old = (folder / "b.json").read_text()                                          # the identity covers the second file
    try:
        write_llava(folder, [one("blue")] * 4, "b.json")
        with pytest.raises(ValueError, match="has other contents now"):
            train.main(["--resume", "--out", str(tmp_path / "other")])
    finally:
        (folder / "b.json").write_text(old)
    with pytest.raises(ValueError, match=r"was written with .*data \['"):
        run(base, tmp_path / "other", "--stage", 3, "--resume", "--data", f"{folder / 'broken.json'}:2", f"{folder / 'b.json'}:3",
            "--images", str(folder))


def test_files_without_weights_are_joined(base, folder):  # noqa: F811
    args = train.parse(["--data", str(folder / "a.json"), str(folder / "c.json"), "--images", str(folder)])
    model, tokenizer = load(base)
    stage = dataclasses.replace(train.settings(args, 3), template="tiny")
    samples, order, _ = train.load_samples(args, stage, model.config, tokenizer)
    assert len(samples) == 20 and list(order) == ["lengths"] and len(order["lengths"]) == 20
    assert "a.json" in samples.data[15]["id"] and "c.json: sample 1" in samples.data[16]["id"]


def test_a_run_of_an_earlier_version_goes_on(base, folder, tmp_path, monkeypatch):  # noqa: F811
    """It wrote --data as a text and --lr as a number."""
    argv = ["--stage", 3, "--data", folder / "a.json", "--images", folder, "--lr", "1e-3", "--batch-size", 4, "--steps", 4]
    whole = run(base, tmp_path / "whole", *argv)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run(base, tmp_path / "o", *argv)
    for file in (tmp_path / "o/run.json", *(tmp_path / "o").glob("checkpoint/*/run.json")):
        about = json.loads(file.read_text())
        values = about.get("flags") or about["identity"]
        values |= {"data": values["data"][0], "lr": float(values["lr"])}
        for new in ("pack", "keep_best", "scales", "part_lrs"):
            values.pop(new, None)
        file.write_text(json.dumps(about))
    train.main(["--resume", "--out", str(tmp_path / "o")])
    assert rows(tmp_path / "o") == rows(whole)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Learning rates by part


@pytest.mark.parametrize("lora", [None, [4, 16, "all"]])
def test_each_part_has_its_own_peak_the_narrower_name_holds_and_the_others_keep_the_stages(base, lora):  # noqa: F811
    model = upcycle(load(base)[0], text=[4, 0])
    if lora:
        train.add_lora(model, *lora)
    args = train.parse("--lr text=1e-3,text.router=2e-3,connector=3e-3 --weight-decay 0.1 --stage 3 --recipe moe-llava --trains "
                       "vision,connector,text".split())
    stage = train.settings(args, 3)
    assert stage.lr == train.TINY_MOE_LLAVA[3]["lr"] and stage.part_lrs == {"text": 1e-3, "text.router": 2e-3, "connector": 3e-3}
    _, _, optimizer = train.set_up(args, stage, model, torch.device("cpu"), ())
    lr = train.set_lr(optimizer, 2, 12, 0.5)
    assert lr == pytest.approx({"text": 0.5e-3, "text.router": 1e-3, "connector": 1.5e-3, "others": stage.lr / 2})
    peaks = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    routers = part_parameters(model, "text.router")
    assert len(optimizer.param_groups) == 7 and len(routers) == 1                  # two a rate, but of the router
    for name, p in model.named_parameters():
        if p.requires_grad:
            part = "text.router" if any(p is router for router in routers) else name.split(".")[0]
            assert peaks[p][0] == lr.get(part, lr["others"]), name
    assert peaks[routers[0]][1] == 0.0


def test_a_rate_of_zero_leaves_a_part_alone_and_a_resumed_run_has_the_same_rates(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    argv = ["--stage", 3, "--lr", "connector=1e-3,text=0", "--steps", 4, "--batch-size", 4]
    whole = run(base, tmp_path / "whole", *argv)
    assert "lr connector 0.001, text 0.0, others 0.0005" in capsys.readouterr().out
    assert [set(row["lr"]) for row in rows(whole)] == [{"connector", "text", "others"}] * 4
    assert rows(whole)[0]["lr"] == {"connector": 1e-3, "text": 0.0, "others": 5e-4}
    before, after = weights(base), weights(whole)
    assert all(torch.equal(after[name], w) for name, w in before.items() if name.startswith("text."))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run(base, tmp_path / "o", *argv)
    train.main(["--resume", "--out", str(tmp_path / "o")])
    assert rows(tmp_path / "o") == rows(whole) and same(weights(tmp_path / "o"), after)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The best weights


@pytest.fixture
def diverging(monkeypatch):
    """From the fourth step on the learning rate is far too large; -> the weights at every measurement."""
    monkeypatch.setattr(train, "lr_at", lambda step, steps, peak, warmup: peak if step < 3 else 2000 * peak)
    real, seen = train.measure_held_out, []

    def measure(args, stage, model, *more):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return real(args, stage, model, *more)
    monkeypatch.setattr(train, "measure_held_out", measure)
    return seen


def test_keep_best_saves_the_weights_of_the_lowest_held_out_loss_also_when_resumed(base, folder, tmp_path, monkeypatch, capsys, diverging):  # noqa: F811
    argv = ["--stage", 3, "--dense", "--data", folder / "a.json", "--images", folder, "--val-fraction", 0.2, "--val-every", 1, "--steps", 6,
            "--batch-size", 4, "--keep-best"]
    whole = run(base, tmp_path / "whole", *argv)
    measured = [row for row in rows(whole) if "val_loss" in row]
    losses = [row["val_loss"] for row in measured]
    best = losses.index(min(losses))
    assert best < 5 and [row.get("best", False) for row in measured] == [loss == min(losses[:i + 1]) for i, loss in enumerate(losses)]
    assert f"the weights after step {best + 1} are kept, whose loss on held-out data is the lowest, {min(losses):.4f}" in capsys.readouterr().out
    saved = weights(whole)
    assert all(torch.equal(saved[name], w) for name, w in diverging[best].items()) and not same(saved, diverging[-1])
    assert not os.path.exists(os.path.join(whole, "checkpoint"))

    real = train.Log.write

    def write(self, step, *values):
        real(self, step, *values)
        if step == best:                                                           # the step after that is the last one
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Log, "write", write)
        run(base, tmp_path / "o", *argv)
    kept = sorted(int(path.name) for path in train.checkpoints(tmp_path / "o"))
    assert len(kept) == 2 and kept[0] == best + 1
    train.main(["--resume", "--out", str(tmp_path / "o")])
    assert rows(tmp_path / "o") == rows(whole) and same(weights(tmp_path / "o"), saved)


def test_a_run_whose_best_weights_are_damaged_says_what_to_do_and_then_ends(base, folder, tmp_path, monkeypatch, capsys, diverging):  # noqa: F811
    out = tmp_path / "o"
    argv = ["--stage", 3, "--dense", "--data", folder / "a.json", "--images", folder, "--val-fraction", 0.2, "--val-every", 2, "--steps", 6,
            "--batch-size", 2, "--save-every", 5, "--keep-best"]

    def damage(*args):
        best, _ = sorted(train.checkpoints(out))                                   # and the newest, that of step 5
        os.truncate(best / "__0_0.distcp", 100)
        return real(*args)
    real = train.return_to_best
    with monkeypatch.context() as patch:
        patch.setattr(train, "return_to_best", damage)
        with pytest.raises(ValueError, match="It holds the best weights.*or delete .*checkpoint.*--resume") as e:
            run(base, out, *argv)
    best, _ = sorted(train.checkpoints(out))
    assert "\n" not in str(e.value) and f"delete {best}," in str(e.value)
    shutil.rmtree(best)
    train.main(["--resume", "--out", str(out)])
    text = capsys.readouterr().out
    assert f"{best}, which held the best weights, is gone" in text and "the weights after step 6 are kept" in text
    assert all(torch.equal(weights(out)[name], w) for name, w in diverging[-1].items())


def test_the_folder_that_we_are_in_can_be_out_and_keeps_its_checkpoint(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run(base, ".", "--stage", 3, "--steps", 3, "--batch-size", 2)
    assert len(train.complete_checkpoints(".")) == 1
    train.main(["--resume", "--out", "."])
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Packed rows


def test_a_run_with_packed_rows_is_the_run_without(base, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """With samples of one, two and no images; all of them are one batch, so that its order is all that differs. What is held out is packed, too."""
    argv = ["--stage", 3, "--steps", 3, "--batch-size", 20, "--data", folder / "a.json", folder / "c.json", "--images", folder,
            "--val", folder / "b.json", "--val-every", 1]
    apart = run(base, tmp_path / "apart", *argv)
    real, held_out = train.inputs, []
    monkeypatch.setattr(train, "inputs", lambda model, batch, device: held_out.append((model.training, batch)) or real(model, batch, device))
    packed = run(base, tmp_path / "packed", *argv, "--pack")
    assert_same_run(packed, apart)
    held_out = [batch for is_training, batch in held_out if not is_training]
    assert len(held_out) == 3 and all("sample_positions" in batch for batch in held_out)
    assert "--pack: 20 samples in" in capsys.readouterr().out


def test_packing_mixed_lengths_leaves_less_padding_and_batches_are_not_by_length(base, folder, capsys):  # noqa: F811
    args = train.parse(["--data", str(folder / "a.json"), str(folder / "c.json"), "--images", str(folder), "--pack"])
    model, tokenizer = load(base)
    stage = dataclasses.replace(train.settings(args, 3), template="tiny")
    samples, order, _ = train.load_samples(args, stage, model.config, tokenizer)
    text = next(line for line in capsys.readouterr().out.splitlines() if "--pack" in line)
    without, with_packing = float(text.split("without --pack ")[1].split("%")[0]), float(text.split("tokens; ")[1].split("%")[0])
    assert order == {} and "20 samples in" in text and with_packing < 15 and without > 40
    batch = train.choose_collate(args, stage)([samples[i] for i in range(20)])     # the message is about what is trained on
    assert f"{len(batch['tokens'])} rows of up to {batch['tokens'].shape[1]} tokens" in text


# ---------------------------------------------------------------------------------------------------------------------
# 6. Wrong values


WRONG = {                                            # flags -> words that the one line must hold
    "--lr 1e-3x": "'1e-3x' is no learning rate",
    "--lr -1": "'-1' is no learning rate",
    "--lr nan": "'nan' is no learning rate",
    "--lr connector=": "connector=: '' is no learning rate",
    "--lr eye=1": "'eye' is no part; known are vision",
    "--lr text=1,text=2": "gives text two learning rates",
    "--stage 1 --lr text=1e-3": "text does not train; what trains is connector",
    "--lr audio=1e-3": "audio does not train",
    "--stage 1 --lr 1e-3,connector=2e-3": "0.001 does nothing: what trains is connector, all with rates of their own; leave 0.001 out",
    "--lr others=1e-3,vision=1e-4,connector=2e-3,text=1e-5": "what trains is connector, text, vision, all with rates",
    "--stage 3 --recipe moe-llava --lr 1e-3,connector=2e-3,text=1e-5": "what trains is connector, text, all with rates",
    "--stage 2 --recipe uni-moe --lr 1e-3,text.ffn=1e-5": "what trains is text, all with rates",
    "--data FOLDER/a.json:0": "'0' is no weight",
    "--data FOLDER/a.json:x": "'x' is no weight",
    "--data missing.json:inf": "'inf' is no weight",
    "--data FOLDER/a.json:1 FOLDER/b.json:-1": "'-1' is no weight",
    "--data FOLDER/a.json:2 FOLDER/b.json": "give each file a weight, or none",
    "--data FOLDER/a.json FOLDER/a.json": "names a file twice; give it once",
    "--data FOLDER/a.json:1 FOLDER/./a.json:2 --val-fraction 0.2": "names a file twice; give it once",
    "--data FOLDER/a.json --val FOLDER/a.json": "a.json is a file of --data",
    "--data FOLDER/b.json:1 FOLDER/a.json:2 --val FOLDER/./a.json": "is a file of --data",
    "--recipe uni-moe --data FOLDER/a.json": "trains one stage 2, not one for each sense: give --stage",
    "--recipe uni-moe --fsdp": "--fsdp cannot put Uni-MoE's experts together",
    "--init FOLDER/o/stage2 --out FOLDER/o": "lies in --out",
    "--init FOLDER --out FOLDER/./": "lies in --out",
    "--keep-best": "--keep-best does nothing without --val or --val-fraction",
    "--scales 1,3": "--scales does nothing without --vision",
    "--vision A --llm B --scales 1,x": "--scales 1,x: whole numbers from 1 to 16",
    "--vision A --llm B --scales 0": "--scales 0: whole numbers from 1 to 16",
    "--vision A --llm B --template nope": "--template nope: known are plain, tiny",
    "--vision A --llm B --plan": "--plan counts a preset, not a folder",
}


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_values_of_flags_are_one_line(folder, argv):
    with pytest.raises(ValueError) as e:
        train.parse(argv.replace("FOLDER", str(folder)).split())
    assert WRONG[argv] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_is_learnt_is_not_held_out_under_another_name(folder, tmp_path, link):
    link(folder / "a.json", tmp_path / "val.json")
    shutil.copy(folder / "a.json", tmp_path / "copy.json")
    argv = ["--data", str(folder / "b.json"), str(folder / "a.json"), "--val"]
    with pytest.raises(ValueError, match="^--val .*val.json is a file of --data .*--val-fraction") as e:
        train.parse([*argv, str(tmp_path / "val.json")])
    assert "\n" not in str(e.value)
    for other in ("copy.json", "missing.json"):                                    # what is missing is said when it is read
        assert train.parse([*argv, str(tmp_path / other)]).val.endswith(other)


@pytest.mark.parametrize("argv", [
    "--stage 1 --lr 1e-3", "--stage 1 --trains vision,connector --lr 1e-3,connector=2e-3", "--lr 1e-3,connector=2e-3",
    "--stage 3 --lr 1e-3,text=5e-4,connector=2e-3", "--recipe moe-llava --lr 1e-3,connector=2e-3,text.ffn=1e-5",
    "--stage 3 --recipe moe-llava --lr 1e-3,connector=2e-3,text.moe=1e-5",
    "--stage 3 --recipe uni-moe --lr 1e-3,connector=2e-3,resampler=2e-3,text.router=1e-5"])
def test_a_rate_for_the_others_is_taken_where_one_stage_trains_others(argv):
    assert train.read_rates(train.parse(argv.split()).lr)["others"] == 1e-3


def test_all_of_uni_moes_second_stages_begin_with_init():
    args = train.parse("--recipe uni-moe --stage 2 --init x".split())
    assert {train.source_of(args, name, train.stages_of(args)) for name in train.stages_of(args)} == {"x"}


def test_fsdp_shards_what_it_does_not_deal_out():
    argv = "--plan --preset cumo-mixtral-8x7b --stage 3 --gpus 8".split()
    plain, dealt = train.parse(argv), train.parse([*argv, "--expert-parallel", "4"])
    assert train.memory(plain, 3, 16, True, True) == train.memory(dealt, 3, 16, True, True)
    assert train.memory(plain, 3, 8, False, True)["weights"] > train.memory(dealt, 3, 8, False, True)["weights"]


@pytest.mark.parametrize("same", [True, False])
def test_what_torchrun_starts_again_is_resumed_only_if_it_had_begun(tmp_path, same):
    """Before its first line is written, the folder may hold another run, which must be moved aside."""
    args = train.parse(["--recipe", "uni-moe", "--out", str(tmp_path / "o")])
    (tmp_path / "o" / "stage1").mkdir(parents=True)
    (tmp_path / "o" / "stage1" / "config.json").write_text("{}")
    train.begin_run(train.parse(["--out", str(tmp_path / "o"), *(["--recipe", "uni-moe"] if same else [])]), [1])
    args.resume = True                                                             # as join_processes says
    assert train.stages_done(args, train.stages_of(args)) == (([1], [1]) if same else ([], []))
    assert args.resume == same and (tmp_path / "o").exists() == same and (tmp_path / "o.1").exists() != same


def test_what_only_the_model_or_the_data_can_tell_is_one_line_too(base, folder):  # noqa: F811
    model, tokenizer = load(base)
    args = train.parse("--stage 3 --trains text --lr text.moe=1e-3".split())
    with pytest.raises(ValueError, match="nothing of text.moe trains in stage 3"):
        train.set_up(args, train.settings(args, 3), model, torch.device("cpu"), ())
    args = train.parse(["--data", f"{folder / 'a.json'}:1000", f"{folder / 'b.json'}:1", "--images", str(folder)])
    with pytest.raises(ValueError, match="b.json:1: gives no sample to an epoch of 20"):
        train.load_samples(args, train.settings(args, 3), model.config, tokenizer)
    args = train.parse(["--data", f"{folder / 'a.json'}:1", f"{folder / 'b.json'}:1", "--images", str(folder), "--val-fraction", "0.9"])
    with pytest.raises(ValueError, match="all its samples are held out.*smaller --val-fraction"):
        train.load_samples(args, train.settings(args, 3), model.config, tokenizer)


@pytest.mark.parametrize("argv, refused", [("--lr text.moe=1e-3", True), ("--lr text.router=1e-3 --recipe moe-llava", False),
                                           ("--lr text=1e-3,text.router=1e-3 --recipe moe-llava --dense", True),
                                           ("--lr text.router=1e-3 --experts-in vision,text", False)])
def test_a_rate_for_experts_that_the_decoder_never_gets_stops_the_first_stage(argv, refused):
    args = train.parse(argv.split())
    stage = train.settings(args, 1)
    if not refused:
        train.load_model(args, stage, train.BACKBONES, None)
        return
    with pytest.raises(ValueError, match="the decoder has no experts, and gets none"):
        train.load_model(args, stage, train.BACKBONES, None)


@pytest.mark.parametrize("scales", ["1,x", "0", "", "1;3"])
def test_upcycle_checks_its_scales_in_the_same_words(scales, tmp_path):
    with pytest.raises(ValueError, match="--scales .*: whole numbers from 1 to 16"):
        upcycle_parse(["--vision", "A", "--llm", "B", "--scales", scales, "--out", str(tmp_path / "o")])


def test_a_template_is_for_what_is_talked_to_and_fits_before_stage_1(base, towers, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match="--template vicuna: .* is a tower alone"):
        upcycle_main(["--from", towers[0][1], "--to", "hf-clip", "--template", "vicuna", "--out", str(tmp_path / "o")])
    with pytest.raises(ValueError, match="does not know <.im_start.>"):
        run(base, tmp_path / "run", "--template", "chatml", "--steps", 1)
    assert not os.path.exists(tmp_path / "run" / "log.jsonl")


def test_a_stages_row_is_not_changed_by_a_run():
    rows_before = {n: dataclasses.replace(stage) for n, stage in train.CUMO_STAGES.items()}
    train.settings(train.parse(["--lr", "connector=1"]), 1).part_lrs["x"] = 1
    assert train.CUMO_STAGES == rows_before and train.CUMO_STAGES[1].part_lrs == {}


def test_adapters_come_in_the_place_of_the_decoders_weights_unless_trains_names_them():
    argv = ["--preset", "cumo-mistral-7b", "--stage", "3", "--init", "x", "--lora-rank", "8"]
    assert train.settings(train.parse(argv), 3).trains == ("vision", "connector", "text.router")
    assert train.settings(train.parse([*argv, "--trains", "text"]), 3).trains == ("text",)
    assert train.settings(train.parse(argv[:-2]), 3).trains == ("vision", "connector", "text")


@pytest.mark.parametrize("flag", ["--balance-coef", "--z-coef"])
def test_a_weight_of_the_routers_losses_that_is_given_counts_in_every_single_stage(flag):
    argv = ["--stage", "2", "--init", "x"]
    assert not train.settings(train.parse(argv), 2).routing_losses and train.settings(train.parse([*argv, flag, "5"]), 2).routing_losses
    assert not train.settings(train.parse([flag, "5"]), 2).routing_losses       # of all stages, those with experts


def test_a_plan_leaves_out_what_is_held_out_and_asks_for_gpus_that_the_batch_fits(tmp_path, monkeypatch, capsys):
    argv = write_llava(tmp_path, mixture())
    argv = [str(a) for a in ("--plan", "--stage", 3, *argv, "--val-fraction", 0.5, "--batch-size", 4)]
    train.main(argv)
    assert "\n2 steps of" in capsys.readouterr().out                              # of 16 samples, 8 are left
    asked = []

    def memory(args, name, gpus, fsdp, checkpointing):
        asked.append(gpus)
        return {"peak": 1e15 if gpus < 4 else 1.0}
    monkeypatch.setattr(train, "memory", memory)
    args = train.parse("--preset cumo-1b --stage 3 --batch-size 12 --micro-batch 4 --plan".split())
    assert train.smallest_fit(args, train.settings(args, 3)) == "4 GPUs with --fsdp" and 2 not in asked
