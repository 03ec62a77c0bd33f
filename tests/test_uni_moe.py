"""Uni-MoE's recipe: connectors, experts trained apart with adapters, experts put together; and batches of mixed senses on two processes.

Everything runs on a model of 0.1M parameters; one launch of two processes serves all tests that need them."""
import json
import os
import re
import wave

import numpy as np
import pytest
import torch

import backbones
import data as d
import generate
import model as m
import train
from test_train import (SMALL, assert_same_run, base, checkpoint, command_line, interrupt_at, quiet_machine, rows, say, start, weights,  # noqa: F401
                        write_llava)
from upcycle import load, load_backbones, save

EAR = dict(n_mels=128, n_frames=150, dim=32, n_layers=2, n_heads=4, ffn_dim=64, n_queries=4, n_query_layers=1)
STAGES = ("stage1", "stage2-image", "stage2-sound", "stage2-both", "")


@pytest.fixture(scope="module")
def hearing(base, tmp_path_factory):
    """A dense model folder that sees and hears."""
    folder = str(tmp_path_factory.mktemp("hearing"))
    torch.manual_seed(1)
    save(m.CuMo(m.Config(**SMALL, audio=EAR)), folder, load(base)[1])
    return folder


def flags(source, out, *more):
    more = [str(f) for f in more]
    given = {"--recipe": "uni-moe", "--init": source, "--out": out, "--device": "cpu", "--batch-size": 6, "--eval-questions": 9, "--steps": 2,
             "--lora-rank": 4}
    if "--data" in more:
        del given["--eval-questions"]
    return [str(x) for kv in given.items() if kv[0] not in more for x in kv] + more


@pytest.fixture(scope="module")
def whole(hearing, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("whole") / "out")
    torch.set_num_threads(1)
    train.main(flags(hearing, out, "--lr", 1e-2))
    return out


def moved(before, after):
    before, after = (load(folder)[0].state_dict() if isinstance(folder, str) else folder for folder in (before, after))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------------------------------------
# 1. The three stages


def test_what_moves_in_each_stage(hearing, whole):
    parts = lambda names: {name.split(".")[0] for name in names}
    assert parts(moved(hearing, f"{whole}/stage1")) == {"connector", "resampler"}
    for stage in STAGES[1:4]:
        assert all(re.fullmatch(r"text\.layers\.\d\.ffn\.w_(in|gate|out)", name) for name in moved(f"{whole}/stage1", f"{whole}/{stage}"))
        assert len(moved(f"{whole}/stage1", f"{whole}/{stage}")) == 6              # two layers' FFNs, merged: plain names
    args = train.parse(flags(hearing, whole))
    begun = load(f"{whole}/stage1")[0]
    train.make_experts(args, begun)
    changed = moved(begun.state_dict(), whole)
    assert parts(changed) == {"connector", "resampler", "text"}
    assert {name.split(".", 3)[-1] for name in changed if name.startswith("text.")} == {
        "q.weight", "k.weight", "v.weight", "o.weight", "ffn.w_in", "ffn.w_gate", "ffn.w_out", "ffn.router"}


def test_the_experts_are_those_that_were_trained_apart(hearing, whole):
    begun = load(f"{whole}/stage1")[0]
    train.make_experts(train.parse(flags(hearing, whole)), begun)
    assert begun.config.text.n_experts == [4, 4] and (begun.config.balance_coef, begun.config.z_coef) == (0, 0)
    for e, stage in enumerate(STAGES[:4]):
        source = load(f"{whole}/{stage}")[0]
        for layer, dense in zip(begun.text.layers, source.text.layers):
            for name in ("w_in", "w_gate", "w_out"):
                assert torch.equal(getattr(layer.ffn, name)[e], getattr(dense.ffn, name))


def test_log_and_scores_tell_the_stages_apart(whole):
    assert [(r["stage"], r["step"]) for r in rows(whole)] == [(s, i) for s in (1, "2 image", "2 sound", "2 both", 3) for i in (0, 1)]
    with open(f"{whole}/scores.jsonl") as f:
        scores = {row["stage"]: row["scores"] for row in map(json.loads, f)}
    assert set(scores[3]) == {*d.TYPES, *d.SOUND_TYPES, *d.BOTH_TYPES} and set(scores["2 sound"]) <= set(d.SOUND_TYPES)


def test_auxiliary_loss_is_off_and_a_flag_turns_it_on(hearing, whole, tmp_path):
    last = rows(whole)[-1]
    assert last["loss"] == pytest.approx(last["lm"]) and last["text/balance"] > 0.5
    train.main(flags(f"{whole}/stage1", tmp_path / "o", "--stage", 3, "--steps", 1, "--balance-coef", 0.5,
                     "--experts", f"{whole}/stage1,{whole}/stage2-image"))
    last = rows(tmp_path / "o")[-1]
    assert last["loss"] == pytest.approx(last["lm"] + 0.5 * last["text/balance"])
    assert load(str(tmp_path / "o"))[0].config.text.n_experts == [2, 2]


def test_copies_and_dense_are_the_comparisons(whole, tmp_path):
    train.main(flags(f"{whole}/stage1", tmp_path / "copies", "--stage", 3, "--steps", 1, "--experts", f"{whole}/stage2-both"))
    copies = load(str(tmp_path / "copies"))[0]
    assert copies.config.text.n_experts == [4, 4]
    train.main(flags(f"{whole}/stage2-both", tmp_path / "dense", "--stage", 3, "--steps", 1, "--dense"))
    assert load(str(tmp_path / "dense"))[0].config.text.n_experts == [0, 0]
    assert moved(f"{whole}/stage2-both", str(tmp_path / "dense"))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Adapters in checkpoints


def test_a_checkpoint_holds_what_trains_and_restores_the_run(hearing, whole, tmp_path, monkeypatch):
    three = flags(hearing, tmp_path / "o", "--lr", 1e-2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)                                                     # in the stage of sounds and scenes, four batches before it
        with pytest.raises(KeyboardInterrupt):
            train.main(three)
    _, about, tensors = checkpoint(tmp_path / "o")
    names = [name for name in tensors if name.startswith("model.")]
    assert about["identity"]["stage"] == "2 both" and names
    assert all(re.search(r"ffn\.parametrizations\.w_(in|gate|out)\.0\.[ab]$", name) for name in names)
    train.main([*three, "--resume"])
    assert_same_run(str(tmp_path / "o"), whole, 0)


def test_lora_serves_other_recipes_too(base, tmp_path):
    train.main(["--init", base, "--out", str(tmp_path / "o"), "--stage", "3", "--steps", "1", "--batch-size", "4", "--eval-questions", "1",
                "--trains", "vision,connector", "--lora-rank", "2", "--lora-alpha", "4", "--lr", "1e-2"])
    after = load(str(tmp_path / "o"))[0]
    assert after.config.vision.n_experts == [4, 4, 4] and not any("parametrizations" in name for name in after.state_dict())
    changed = moved({k: v for k, v in load(base)[0].state_dict().items() if k.startswith("text.")},
                    {k: v for k, v in after.state_dict().items() if k.startswith("text.")})
    assert len(changed) == 2 * 7


# ---------------------------------------------------------------------------------------------------------------------
# 3. Files of all senses, one process and two


def write_mixture(folder):
    """8 samples: text alone, an image, a sound of one chunk or two, both, a video; sorted so that two ranks see different senses."""
    for name, seconds in (("short", 0.5), ("long", 2.0)):
        with wave.open(os.path.join(folder, f"{name}.wav"), "wb") as f:
            f.setparams((1, 2, 8000, 0, "NONE", ""))
            t = np.arange(int(8000 * seconds)) / 8000
            f.writeframes((8000 * np.sin(2 * np.pi * 440 * t)).astype("<i2").tobytes())
    sound = lambda name, answer: {"audio": f"{name}.wav", "conversations": say("<audio>\nHow long is it?", answer)}
    seen = {"image": "red.png", "conversations": say("<image>\nWhat color is this?", "red")}
    return write_llava(folder, [
        sound("short", "short"), {"conversations": say("Say red.", "red")}, sound("long", "long"), {"conversations": say("Say blue.", "blue")},
        seen, sound("short", "short"), {"image": "blue.png", "audio": "long.wav", "conversations": say("<image>\n<audio>\nBoth?", "blue long")},
        {"video": ["red.png", "blue.png", "white.png"], "conversations": say("<video>\nWhich colors?", "many")}])


@pytest.fixture(scope="module")
def ways(hearing, whole, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ways"))
    at = lambda name: os.path.join(folder, name)
    experts = ",".join(f"{whole}/{stage}" for stage in STAGES[:4])
    common = ["--stage", 3, "--experts", experts, "--lr", 1e-3, "--steps", 50, "--batch-size", 4, *write_mixture(folder)]
    go = lambda name, *more: flags(f"{whole}/stage1", at(name), *common, *more)
    start_at = ["--init", at("together")]
    torch.set_num_threads(1)
    train.main(go("single"))
    model, tokenizer = load(f"{whole}/stage1")
    train.make_experts(train.parse(go("unused")), model)
    save(model, at("together"), tokenizer)
    fsdp = [f for f in go("fsdp", "--fsdp") if f not in ("--experts", experts)]
    fsdp[fsdp.index("--init") + 1] = at("together")
    jobs = [dict(argv=go("ddp")), dict(argv=go("parallel", "--expert-parallel", "2")), dict(argv=fsdp)]
    code, out, err = start(folder, jobs, processes=2)
    with open(at("result0")) as f:
        assert code == 0 and json.load(f) == [None] * len(jobs), f"{out}\n{err}"
    return folder


@pytest.mark.parametrize("way", ["ddp", "parallel", "fsdp"])
def test_two_processes_with_different_senses_train_as_one(ways, way):
    assert len(rows(f"{ways}/{way}")) == 50
    # A mean over each process's tokens is what the routing statistics are; with no coefficient on them they touch nothing else
    got, want = rows(f"{ways}/{way}"), rows(f"{ways}/single")
    for key in ("loss", "lm", "grad_norm"):
        assert [r[key] for r in got] == pytest.approx([r[key] for r in want], abs=1e-5)
    got, want = weights(f"{ways}/{way}"), weights(f"{ways}/single")
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=0, msg=lambda text: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# 4. Bad input, one line each


@pytest.mark.parametrize("more, words", [
    (("--lora-rank", -1), "--lora-rank = -1 must be at least 0"), (("--lora-alpha", 0), "--lora-alpha = 0.0 must be above 0"),
    (("--experts", "nowhere,elsewhere"), "nowhere"), (("--moe-layers", "0,2"), "--moe-layers 0,2: the decoder has layers 0 to 1"),
    (("--n-experts", "4,x"), "--n-experts 4,x"), (("--n-experts", "4,2,4"), "--n-experts 4,2,4: with --recipe uni-moe, all layers have one number")])
def test_bad_values(hearing, tmp_path, more, words):
    more = more if more[0] == "--experts" else (*more, "--experts", hearing)
    with pytest.raises(ValueError, match=words) as e:
        train.main(flags(hearing, tmp_path / "o", "--stage", 3, *more))
    assert "\n" not in str(e.value) and not (tmp_path / "o" / "log.jsonl").exists()


def test_flags_of_another_recipe_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--experts belongs to --recipe uni-moe"):
        train.main(["--experts", "a,b"])


def test_experts_of_different_architectures_are_refused(hearing, tmp_path):
    other = m.Config(**{**SMALL, "text": {**SMALL["text"], "ffn_dim": 48}}, audio=EAR)
    save(m.CuMo(other), tmp_path / "other", load(hearing)[1])
    with pytest.raises(ValueError, match="other: text.ffn_dim = 48, the model that it goes into has 64"):
        train.main(flags(hearing, tmp_path / "o", "--stage", 3, "--experts", f"{hearing},{tmp_path / 'other'}"))


def test_a_broken_sound_is_reported_and_replaced(hearing, tmp_path, capsys):
    files = write_mixture(tmp_path)
    with open(tmp_path / "short.wav", "r+b") as f:
        f.truncate(2000)
    train.main(flags(hearing, tmp_path / "o", "--stage", 1, "--steps", 2, *files))
    out = capsys.readouterr().out
    assert "broken sample replaced" in out and "short.wav" in out


def test_a_deaf_model_says_what_it_wants(base, tmp_path):
    with pytest.raises(ValueError, match="hears nothing.*--audio WHISPER_DIR"):
        train.main(flags(base, tmp_path / "o", "--stage", 1, "--preset", "uni-moe-7b"))


# ---------------------------------------------------------------------------------------------------------------------
# 5. The ear


def test_stage_0_teaches_an_ear_and_then_the_decoder(tmp_path):
    backbones.main(["--kind", "hearing", "--out", str(tmp_path / "o"), "--device", "cpu", "--steps", "2", "--batch-size", "4",
                    "--eval-questions", "5"])
    first, heard, spoken = (load_backbones(f)[0].state_dict() for f in (train.BACKBONES, tmp_path / "o/ear.safetensors",
                                                                        tmp_path / "o/uni-moe-tiny-backbones.safetensors"))
    assert torch.equal(heard["audio.pos"], m.sinusoids(*heard["audio.pos"].shape))
    same = lambda a, b, part: all(torch.equal(a[k], b[k]) for k in a if k.startswith(part))
    assert same(first, heard, ("vision.", "text.")) and same(heard, spoken, ("vision.", "audio.")) and not same(heard, spoken, "text.")


def test_the_shipped_backbones_are_the_preset_s_but_dense():
    config, preset = load_backbones(train.HEARING)[0].config, m.Config.from_preset("uni-moe-tiny")
    preset.text.n_experts = [0] * preset.text.n_layers
    assert config == preset


def test_plan_of_uni_moe(capsys):
    train.main("--preset uni-moe-7b --stage 3 --gpus 8 --plan --steps 100 --micro-batch 1 --max-length 1024".split())
    text = capsys.readouterr().out
    assert re.search(r"text +19,\d{3},\d{3},\d{3} +11,\d{3},\d{3},\d{3}", text) and "100 steps" in text and "a sound" in text
    with pytest.raises(ValueError, match="--steps or --data"):
        train.main("--preset uni-moe-7b --stage 3 --gpus 8 --plan".split())
