"""The plan against what is counted and measured: FLOPs by a formula and by torch's own counter, memory by the allocator's log of a real run."""
import json
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import AUDIO, IMAGE, SIGLIP, Config, CuMo, MoE, choose_trainable

ALL = ("vision", "connector", "text")


def config_of(*flags, stage=3):
    args = train.parse(["--stage", str(stage), *flags])
    return args, train.planned(args, train.settings(args, stage))[0]


def flops_by_hand(config, n_tokens, n_images=1, trains=None, n_audio=0):
    """{part: FLOPs} of one training sample's forward pass, with n_audio chunks of sound; or, with `trains`, the parts that train, of its
    backward pass.

    Only matrix products count, at two FLOPs a multiply-add: each weight matrix meets each token, and in attention each token meets
    all T of its sequence, twice (q k, p v). Going back, a product becomes two: the gradient of its input, and of its weight. So frozen
    parts before the first trained one cost nothing, and those behind it half. Left out: what is computed a second time (by
    checkpointing, by attention kernels), and that a causal kernel skips half."""
    def ffn(dim, width, out, n_experts, top_k, gated=0):                           # multiply-adds a token
        one = (1 + gated) * dim * width + width * out
        if not n_experts:
            return one
        return top_k * one + dim * n_experts + (0 if gated else n_experts * out)   # K experts, the router, the tower's experts' last biases

    def one_hot(width, n_experts, top_k):                                          # the gradient of their first biases is a product too
        return top_k * n_experts * width

    v, c, a, t, parts = config.vision, config.connector, config.audio, config.text, {}
    biases = {}
    if v:
        crops = n_images * sum(s * s for s in v.scales)                            # S2: a scale s is s x s crops
        n, seen = v.side**2, v.side**2 + v.n_prefix_tokens                         # patches; with CLIP's CLS
        unused = any(v.n_experts[v.n_used_layers:])                                # layers that run for their routers' losses only
        layers = [ffn(v.dim, v.ffn_dim, v.dim, e, v.top_k) for e in v.n_experts[:None if unused else v.n_used_layers]]
        inner = 4 * v.dim**2 * len(layers) + sum(layers)
        if trains is not None and unused:                                          # the last experts' answers go nowhere
            inner -= layers[-1] - v.dim * v.n_experts[-1]
        behind = v.n_experts[:v.n_used_layers]
        biases["vision"] = crops * seen * sum(one_hot(v.ffn_dim, e, v.top_k) for e in behind)
        parts["vision"] = crops * n * 3 * v.patch_size**2 * v.dim, crops * seen * inner, crops * seen**2 * 2 * v.dim * len(layers)
        n = config.n_image_tokens                                                  # with a pixel shuffle fewer, and wider ones
        biases["connector"] = n_images * n * one_hot(t.dim, c.n_experts, c.top_k)
        wide = v.dim * len(v.scales) * v.side**2 // n
        entry, whole = wide * t.dim * (c.top_k if c.n_experts else 1), ffn(wide, t.dim, t.dim, c.n_experts, c.top_k)
        parts["connector"] = n_images * n * entry, n_images * n * (whole - entry), 0
    if a:
        states, asked = a.n_frames // 2, a.n_queries                               # two convolutions of width 3, the second of stride 2
        entry, inner = a.n_frames * 3 * a.n_mels * a.dim, 3 * a.dim**2 + a.n_layers * (4 * a.dim**2 + 2 * a.dim * a.ffn_dim)
        parts["audio"] = n_audio * entry, n_audio * states * inner, n_audio * states**2 * 2 * a.dim * a.n_layers
        layer = asked * (2 * a.dim**2 + 2 * a.dim * a.ffn_dim) + (states + asked) * 2 * a.dim**2         # q, o, FFN; k, v
        parts["resampler"] = (0, n_audio * (layer * a.n_query_layers + asked * a.dim * t.dim),
                              n_audio * asked * (states + asked) * 2 * a.dim * a.n_query_layers)
    q, kv = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
    layers = [ffn(t.dim, t.ffn_dim, t.dim, e, t.top_k, 1) for e in t.n_experts]
    inner = sum(layers) + 2 * t.dim * (q + kv) * t.n_layers + t.dim * t.vocab_size
    parts["text"] = 0, n_tokens * inner, n_tokens**2 * 2 * q * t.n_layers
    some = {"text.ffn": n_tokens * sum(layers), "text.moe": n_tokens * sum(cost for cost, e in zip(layers, t.n_experts) if e)}
    if trains is None:
        return {part: 2.0 * sum(costs) for part, costs in parts.items()}
    back, before = {}, {"connector": {"vision"}, "resampler": {"audio"}, "text": set(parts)}
    learning = set()
    for part, (entry, inner, attention) in parts.items():                          # entry: the products that meet the part's input
        reached = bool(learning & before.get(part, set()))                         # a part before this one wants a gradient
        learns = inner if part in trains else max((some[p] for p in trains if p in some and part == "text"), default=0)
        back[part] = 2.0 * (entry * (reached + (learns > 0)) + (inner + learns + 2 * attention) * (reached or learns > 0))
        back[part] += 2.0 * biases.get(part, 0) * (learns > 0)
        learning |= {part} if learns > 0 else set()
    return back


def rehearsed(config, trains, length, rows=2):
    """The plan's (forward, backward) FLOPs a sample, by part."""
    r = train.rehearse(json.dumps(config.to_dict()), trains, (), rows, length, False, False, torch.bfloat16)
    return tuple({part: work[part] / rows for part in ("vision", "connector", "audio", "resampler", "text") if part in forward_parts(config)}
                 for work in (r.forward, r.backward))


def forward_parts(config):
    return flops_by_hand(config, 1, n_audio=config.audio is not None)


def assert_flops(config, trains, length, rel, rel_back):
    """The plan's FLOPs against the formula above."""
    n_audio = config.audio is not None
    forward, backward = rehearsed(config, trains, length)
    assert sum(forward.values()) == pytest.approx(sum(flops_by_hand(config, length, n_audio=n_audio).values()), rel=rel)
    wanted = flops_by_hand(config, length, trains=trains, n_audio=n_audio)
    assert sum(backward.values()) == pytest.approx(sum(wanted.values()), rel=rel_back), trains
    return forward, backward


def counted(config, trains, length, rows=2, device="meta"):
    """(forward, backward) FLOPs a sample, as FlopCounterMode sees them. It does not know the CPU's fused attention, so: spelt out."""
    with torch.device(device):
        model, images = CuMo(config).train(), torch.zeros(rows, 3, *[config.vision.image_size] * 2)
        tokens = torch.zeros(rows, length, dtype=torch.long)
        audio = torch.zeros(rows, config.audio.n_mels, config.audio.n_frames) if config.audio else None
    tokens[:, :config.n_image_tokens] = IMAGE
    if audio is not None:
        tokens[:, -config.n_audio_tokens:] = AUDIO
    choose_trainable(model, trains)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(tokens, images, audio, labels=tokens.clamp(min=0)).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() / rows, backward.get_total_flops() / rows


def assert_counted(config, trains, length, device="meta", rel=0.05):
    """The plan's FLOPs against torch's own counter, on meta or in a real step. That is in float32, where experts are multiplied slice by
    slice; the plan has bfloat16's way, in which biases are products too."""
    for ours, theirs in zip(rehearsed(config, trains, length), counted(config, trains, length, device=device)):
        assert sum(ours.values()) == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize("stage,device", [(1, "meta"), (3, "meta"), (3, "cpu")])
def test_flops_of_tiny(stage, device):
    args, config = config_of("--preset", "tiny", stage=stage)
    trains = train.settings(args, stage).trains
    forward, backward = assert_flops(config, trains, 128, 0.004, 0.004)
    assert forward == pytest.approx(flops_by_hand(config, 128), rel=0.004)         # and every part
    assert backward == pytest.approx(flops_by_hand(config, 128, trains=trains), rel=0.005)
    assert_counted(config, trains, 128, device, 0.005)


@pytest.mark.parametrize("change", [
    dict(vision=dict(scales=[1, 2], n_experts=3)), dict(vision=dict(n_experts=[0, 3, 0], select_layer=-1)),
    dict(connector=dict(n_experts=4)), dict(text=dict(n_experts=4, top_k=3, tie_embeddings=True)),
    dict(vision=dict(select_layer=-3)), dict(text=dict(n_experts=[4, 0])),
    dict(vision=dict(**SIGLIP, n_experts=3), connector=dict(pixel_shuffle=2), text=dict(qk_norm=True, head_dim=8))])
def test_flops_of_every_kind_of_layer(tiny_config, change):
    config = tiny_config(**change)
    for trains in (ALL, ("connector",), ("text",), ("connector", "text.ffn"), ("connector", "text.moe")):
        if "text.moe" in trains and not any(config.text.n_experts):
            continue
        assert_flops(config, trains, 24, 0.01, 0.05)
        assert_counted(config, trains, 24)


def test_flops_of_a_clip_l_tower():
    forward, _ = rehearsed(Config(), ("connector",), 8, rows=1)
    assert forward["vision"] == pytest.approx(flops_by_hand(Config(), 1)["vision"], rel=0.001)
    assert forward["vision"] == pytest.approx(366e9, rel=0.01)                     # as the literature has it: 191 GMACs less the last layer


def test_checkpointing_computes_again_what_the_backward_pass_needs():
    """All of a block but its last product, whose result nobody looks at; and no frozen block."""
    _, config = config_of("--preset", "tiny", stage=2)
    for trains in (ALL, ("connector",)):
        plain, again = (train.rehearse(json.dumps(config.to_dict()), trains, (), 2, 64, on, False, torch.bfloat16) for on in (False, True))
        extra = {part: (again.backward[part] - plain.backward[part]) / 2 for part in ALL}
        t, v = config.text, config.vision
        spared = 2 * 64 * t.dim * (t.vocab_size + t.n_layers * t.ffn_dim)
        assert extra["text"] == plain.forward["text"] / 2 - spared and extra["connector"] == 0
        n = config.n_image_tokens
        inside = plain.forward["vision"] / 2 - 2 * n * 3 * v.patch_size**2 * v.dim - 2 * (n + 1) * v.dim * v.ffn_dim * v.n_used_layers
        assert extra["vision"] == (inside if "vision" in trains else 0)


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
        choose_trainable(model, s.trains)
        model.checkpointing(checkpointing)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):                                                         # AdamW's state is there from the first step's end
            for _ in range(8 // micro):
                tokens, images = torch.full((micro, s.max_length), 7), torch.randn(micro, 3, 48, 48)
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
    row = next(line for line in text.splitlines() if line.startswith("all ")).split()
    assert row[4:] == ["21,314.61", "42,243.71", "17,131.81"]                      # GFLOPs: forward, backward, again
    header, off, on = (line.split() for line in text.splitlines()[-5:-2])
    assert float(off[-1]) > float(on[-1]) and float(off[2]) == float(on[2]) == round(4 * 8_250_388_480 / 8 / 1e9, 2)


def test_plan_of_all_stages_and_what_does_not_fit(capsys):
    train.main("--preset tiny --plan --device cpu --gpu-gb 1 --steps 7 --batch-size 64 --peak-tflops 1e-6".split())
    text = capsys.readouterr().out
    assert [f"stage {i}" in text for i in (1, 2, 3)] == [True] * 3 and text.count("7 steps") == 3 and "448 samples" in text
    assert "does NOT fit into 1 GB; the smallest number (1, 2, 4, 8...) that does: 1 GPU with --checkpointing" in text
    with pytest.raises(ValueError, match="not a multiple of --gpus 3"):
        train.main(["--plan", "--gpus", "3"])


def test_hours_are_arithmetic_over_speed(capsys):
    train.main("--preset tiny --plan --stage 3 --steps 10 --peak-tflops 0.001 --mfu 0.5 --micro-batch 8".split())
    _, config = config_of("--preset", "tiny")
    work = 10 * 64 * sum(sum(flops_by_hand(config, 256, trains=t).values()) for t in (None, ALL))
    hours = float(re.search(r"([\d.]+) GPU-hours", capsys.readouterr().out)[1])
    assert hours == pytest.approx(work / 0.5e9 / 3600, rel=0.004)


def test_plan_counts_the_model_that_a_run_would_train():
    def counted(argv):
        args = train.parse(f"--plan --steps 1 {argv}".split())
        return train.planned(args, train.settings(args, args.stage))[0]
    assert counted("--preset cumo-mistral-7b --stage 1 --vision A --llm B --scales 1").vision.scales == [1]
    dense = counted("--recipe moe-llava --preset cumo-smol --stage 1")
    assert not any(dense.vision.n_experts) and dense.connector.n_experts == 0
    with pytest.raises(ValueError, match="nothing to train here; text.moe and text.router need experts"):
        counted("--preset cumo-smol --stage 1 --trains text.moe")


def test_ddp_has_no_buckets_for_experts_that_are_dealt_out():
    argv = ["--preset", "tiny", "--stage", "3", "--gpus", "4", "--experts-in", "text", "--batch-size", "8", "--micro-batch", "2", "--plan"]
    (together, _), (apart, _) = config_of(*argv), config_of(*argv, "--expert-parallel", "4")
    _, model = train.planned(apart, train.settings(apart, 3, 4))
    experts = sum(p.numel() for m in model.modules() if isinstance(m, MoE) for name, p in m.named_parameters() if name != "router")
    sizes = [train.memory(args, 3, 4, False, False)["DDP buckets"] for args in (together, apart)]
    assert experts > 1e5 and sizes[0] - sizes[1] == 4 * experts


def test_one_gpu_that_does_is_one_gpu():
    args = train.parse("--preset tiny --plan --stage 3 --gpu-gb 60 --steps 1".split())
    assert train.smallest_fit(args, train.settings(args, 3)) == "1 GPU"


def test_plan_takes_its_steps_from_data(tmp_path, capsys):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": []}] * 130))
    train.main(["--plan", "--stage", "2", "--data", str(file), "--micro-batch", "2"])
    assert "2 steps" in capsys.readouterr().out                                    # 130 samples, 64 a step
    file.write_text(json.dumps([{"conversations": []}] * 21))
    train.main(["--plan", "--stage", "2", "--data", str(file), "--micro-batch", "2", "--epochs", "5"])
    assert "\n5 steps" in capsys.readouterr().out                                  # a file smaller than a batch is one step an epoch


def test_fsdp_shares_out_and_the_rest_does_not():
    args, _ = config_of("--preset", "tiny", "--batch-size", "16", "--micro-batch", "2")
    one, ddp, fsdp = (train.memory(args, 3, gpus, sharded, False) for gpus, sharded in ((1, False), (8, False), (8, True)))
    assert fsdp["weights"] == one["weights"] / 8 and fsdp["optimizer"] == one["optimizer"] / 8 and fsdp["gradients"] == one["gradients"] / 8
    assert ddp["DDP buckets"] == one["gradients"] and ddp["weights"] == one["weights"]
