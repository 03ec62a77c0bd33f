"""The plan against what is counted and measured: FLOPs by torch's own counter, memory by the allocator's log of a real run."""
import json
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import IMAGE, Config, CuMo, VisionTransformer, choose_trainable, flops

ALL = ("vision", "connector", "text")


def config_of(*flags, stage=3):
    args = train.parse(["--stage", str(stage), *flags])
    return args, train.planned(args, train.settings(args, stage))[0]


def counted(config, trains, length, rows=2, device="meta"):
    """(forward, backward) FLOPs a sample, as FlopCounterMode sees them. It does not know the CPU's fused attention, so: spelt out."""
    with torch.device(device):
        model, images = CuMo(config).train(), torch.zeros(rows, 3, *[config.vision.image_size] * 2)
        tokens = torch.zeros(rows, length, dtype=torch.long)
    tokens[:, :config.n_image_tokens] = IMAGE
    choose_trainable(model, trains)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(tokens, images, labels=tokens.clamp(min=0)).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() / rows, backward.get_total_flops() / rows


@pytest.mark.parametrize("stage,device", [(1, "meta"), (3, "meta"), (3, "cpu")])
def test_flops_of_tiny(stage, device):
    args, config = config_of("--preset", "tiny", stage=stage)
    trains = train.settings(args, stage)["trains"]
    forward, backward = counted(config, trains, 128, device=device)
    assert sum(flops(config, 128).values()) == pytest.approx(forward, rel=0.01)
    assert sum(flops(config, 128, trains=trains).values()) == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize("change", [
    dict(vision=dict(scales=[1, 2], n_experts=3)), dict(vision=dict(n_experts=[0, 3, 0], select_layer=-1)),
    dict(connector=dict(n_experts=4)), dict(text=dict(n_experts=4, top_k=3, tie_embeddings=True)),
    dict(vision=dict(select_layer=-3)), dict(text=dict(n_experts=[4, 0]))])
def test_flops_of_every_kind_of_layer(tiny_config, change):
    config = tiny_config(**change)
    for trains in (ALL, ("connector",), ("text",), ("connector", "text.ffn"), ("connector", "text.moe")):
        if "text.moe" in trains and not any(config.text.n_experts):
            continue
        forward, backward = counted(config, trains, 24)
        assert sum(flops(config, 24).values()) == pytest.approx(forward, rel=0.01)
        assert sum(flops(config, 24, trains=trains).values()) == pytest.approx(backward, rel=0.05), trains


def test_flops_of_a_clip_l_tower():
    with torch.device("meta"):
        tower, images = VisionTransformer(Config().vision), torch.zeros(2, 3, 336, 336)
    with FlopCounterMode(display=False) as forward:
        tower(images)
    assert flops(Config(), 1)["vision"] == pytest.approx(forward.get_total_flops() / 2, rel=0.001)
    assert forward.get_total_flops() / 2 == pytest.approx(366e9, rel=0.01)         # as the literature has it: 191 GMACs less the last layer


def allocated(run):
    """The most bytes that were allocated at once in run(): the profiler logs every allocation (+) and release (-) of the CPU's
    allocator, those inside of operators too. What the plan says comes from tensors without memory, so the two share no arithmetic."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, n in events:
        now += n
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("stage,micro,checkpointing", [(3, 8, False), (3, 4, False), (3, 8, True), (1, 8, False)])
def test_memory_is_what_a_run_allocates(stage, micro, checkpointing):
    args, config = config_of("--preset", "tiny", "--device", "cpu", "--batch-size", "8", "--micro-batch", str(micro), stage=stage)
    s = train.settings(args, stage)

    def run():
        model = CuMo(config).train()
        choose_trainable(model, s["trains"])
        model.checkpointing(checkpointing)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):                                                         # AdamW's state is there from the first step's end
            for _ in range(8 // micro):
                tokens, images = torch.full((micro, s["max_length"]), 7), torch.randn(micro, 3, 48, 48)
                tokens[:, :config.n_image_tokens] = IMAGE
                model(tokens, images, labels=tokens.clamp(min=0)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    planned = train.memory(args, stage, 1, False, checkpointing)
    assert planned["peak"] == pytest.approx(allocated(run), rel=0.1)


def test_plan_prints_all_that_it_promises(capsys):
    train.main("--preset cumo-mistral-7b --stage 3 --gpus 8 --fsdp --checkpointing --plan --max-length 1024".split())
    text = capsys.readouterr().out
    assert re.search(r"all +8,250,388,480 +7,797,141,504 +8,216,813,568", text)    # the paper's 8.26B and 7.80B
    assert "6,441 steps" in text and "GPU-hours" in text and "40% of 989 TFLOP/s" in text
    assert "fits into 80 GB" in text
    header, off, on = (line.split() for line in text.splitlines()[-5:-2])
    assert float(off[-1]) > float(on[-1]) and float(off[2]) == float(on[2]) == round(4 * 8_250_388_480 / 8 / 1e9, 2)


def test_plan_of_all_stages_and_what_does_not_fit(capsys):
    train.main("--preset tiny --plan --device cpu --gpu-gb 1 --steps 7 --batch-size 64 --peak-tflops 1e-6".split())
    text = capsys.readouterr().out
    assert [f"stage {i}" in text for i in (1, 2, 3)] == [True] * 3 and text.count("7 steps") == 3 and "448 samples" in text
    assert "does NOT fit into 1 GB; the smallest number (1, 2, 4, 8...) that does: 1 GPUs with --fsdp --checkpointing" in text
    with pytest.raises(ValueError, match="not a multiple of --gpus 3"):
        train.main(["--plan", "--gpus", "3"])


def test_hours_are_arithmetic_over_speed(capsys):
    train.main("--preset tiny --plan --stage 3 --steps 10 --peak-tflops 0.001 --mfu 0.5 --micro-batch 8".split())
    _, config = config_of("--preset", "tiny")
    work = 10 * 64 * sum(sum(flops(config, 256, trains=t).values()) for t in (None, ALL))
    hours = float(re.search(r"([\d.]+) GPU-hours", capsys.readouterr().out)[1])
    assert hours == pytest.approx(work / 0.5e9 / 3600, rel=0.02)


def test_plan_takes_its_steps_from_data(tmp_path, capsys):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": []}] * 130))
    train.main(["--plan", "--stage", "2", "--data", str(file), "--micro-batch", "2"])
    assert "2 steps" in capsys.readouterr().out                                    # 130 samples, 64 a step


def test_fsdp_shares_out_and_the_rest_does_not():
    args, _ = config_of("--preset", "tiny", "--batch-size", "16", "--micro-batch", "2")
    one, ddp, fsdp = (train.memory(args, 3, gpus, sharded, False) for gpus, sharded in ((1, False), (8, False), (8, True)))
    assert fsdp["weights"] == one["weights"] / 8 and fsdp["optimizer"] == one["optimizer"] / 8 and fsdp["gradients"] == one["gradients"] / 8
    assert ddp["DDP buckets"] == one["gradients"] and ddp["weights"] == one["weights"]
