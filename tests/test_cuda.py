"""What a GPU must get right. Skipped without one; `bash tests/gpu.sh` runs this file, and then the timings, in one go.

The reference is always the CPU: in float32, in float64 with the same routing, or eager mode's tokens.
"""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import kernels
import model as m
import train
from kernels import moe_ffn, route
from model import IMAGE, PAD, Cache, Config, CuMo, MoE, add_lora
from upcycle import load_backbones, upcycle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
ROOT = Path(__file__).resolve().parents[1]
RECIPES = ["cumo", "moe-llava", "uni-moe"]


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch._dynamo.reset()


def recipe_model(recipe):
    """The recipe's tiny model with experts, from the shipped backbones, and a batch of what it trains on."""
    torch.manual_seed(0)
    if recipe == "uni-moe":
        model, tokenizer = load_backbones(train.HEARING)
        model = upcycle(model.float(), text=4)
        add_lora(model, 4, 16.0)
        samples = data.Drawn("mixed chat", 12, 0)
    else:
        model, tokenizer = load_backbones(train.BACKBONES)
        model = model.float()
        if recipe == "cumo":
            model = upcycle(model, vision=4, connector=4)
        else:
            model = upcycle(model, text=[4, 0, 4, 0, 4])
            model.config.text.capacity_factor = 1.5
            model.text.apply_expert_limits()
        samples = data.Drawn("chat", 12, 0)
    config = model.config
    with torch.no_grad():                                   # experts that differ, or a wrong expert would not be noticed
        for module in model.modules():
            if isinstance(module, MoE):
                for p in module.parameters():
                    p.add_(torch.randn_like(p) * p.std() * 0.3 if p.numel() and p.std() > 0 else 0.0)
    seconds = config.audio.n_frames / 100 if config.audio else 0.0
    encoded = data.Encoded(samples, tokenizer, "tiny", config.vision.image_size, config.n_image_tokens, 352,
                           n_audio_tokens=config.n_audio_tokens, seconds=seconds)
    batch = data.collate([encoded[i] for i in range(len(samples))])
    batch = {k: v for k, v in batch.items() if torch.is_tensor(v) and len(v)}
    return model.train(), batch


def loss_and_gradients(model, batch, device, dtype=torch.float32, amp=False):
    model = copy.deepcopy(model).to(device, dtype)
    batch = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        out = model(**batch)
    out.loss.backward()
    return out.loss.item(), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def worst(got, want):
    """The largest relative error of a gradient; those that are next to nothing (keys' biases) are held against the norm of all."""
    floor = 1e-3 * torch.stack([g.norm() for g in want.values()]).norm()
    assert got.keys() == want.keys()
    return max((float((got[n] - want[n]).norm() / want[n].norm().clamp(min=floor)), n) for n in want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_and_gradients_in_float32_are_the_cpus(recipe):
    model, batch = recipe_model(recipe)
    want, gradients = loss_and_gradients(model, batch, "cpu")
    loss, got = loss_and_gradients(model, batch, "cuda")
    assert loss == pytest.approx(want, rel=1e-4)
    error, name = worst(got, gradients)
    assert error < 1e-3, name            # of a single weight, sums of thousands of terms; loss and the whole gradient to 1e-4
    total = torch.cat([(got[n] - gradients[n]).flatten() for n in got]).norm() / torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert total < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_and_gradients_in_bfloat16_are_near_float64s_with_the_same_choices(recipe, monkeypatch):
    model, batch = recipe_model(recipe)
    real, choices = route, []

    def record(logits, *args, **kw):
        choices.append(real(logits, *args, **kw).experts)
        return real(logits, *args, **kw)

    def replay(logits, top_k, mask=None, *args, **kw):
        experts = choices.pop(0).to(logits.device)
        # The first choice by a large logit, the rest by noise on the others: `route` then takes just these, with its own weights
        noise = torch.zeros_like(logits, dtype=torch.float32).scatter(-1, experts, 1e4)
        flipped = logits.float().argmax(-1) != experts[..., 0]
        lifted = torch.where(flipped.unsqueeze(-1), torch.zeros_like(logits).scatter(-1, experts[..., :1], 1e-1), 0)
        return real(logits + lifted, top_k, mask, *args[:2], noise=noise)
    monkeypatch.setattr(kernels, "route", record)
    loss, got = loss_and_gradients(model, batch, "cuda", amp=True)
    monkeypatch.setattr(kernels, "route", replay)
    want, gradients = loss_and_gradients(model, batch, "cpu", torch.float64)
    assert not choices
    assert loss == pytest.approx(want, rel=1e-2)
    total = torch.cat([(got[n] - gradients[n]).flatten() for n in got]).norm() / torch.cat([g.flatten() for g in gradients.values()]).norm()
    print(recipe, loss, want, float(total), worst(got, gradients))
    assert total < 3e-2


# ---------------------------------------------------------------------------------------------------------------------
# The dispatch


@pytest.mark.parametrize("act,gated,bias", [("gelu", False, True), ("quick_gelu", False, True), ("silu", True, False), ("gelu", False, False)])
@pytest.mark.parametrize("n,d,f,n_experts,k", [(33, 16, 24, 4, 2), (5, 10, 7, 8, 3), (1, 8, 8, 4, 1), (0, 16, 24, 4, 2), (700, 96, 80, 4, 2)])
@pytest.mark.parametrize("backend", ["grouped", "sorted"])
def test_backends_equal_the_loop_in_float64(backend, n, d, f, n_experts, k, act, gated, bias):
    g = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).bfloat16()
    leaves = [draw(n, d), draw(n, n_experts), draw(n_experts, f, d, scale=d**-0.5), draw(n_experts, d, f, scale=f**-0.5)]
    leaves += [draw(n_experts, f, d, scale=d**-0.5) if gated else None, draw(n_experts, f) if bias else None, draw(n_experts, d) if bias else None]
    results = []
    for device, dtype, how in (("cpu", torch.float64, "loop"), ("cuda", torch.bfloat16, backend)):
        x, logits, *weights = [None if t is None else t.to(device, dtype).requires_grad_() for t in leaves]
        y = moe_ffn(x, route(logits, k), *weights, act=act, backend=how)
        (y * torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view_as(y)).sum().backward()
        results.append([t.detach().double().cpu() for t in (y, *(t.grad for t in (x, logits, *weights) if t is not None))])
    for got, want in zip(results[1], results[0]):
        if k == 1 and got.shape == (n, n_experts):
            continue                                        # the one weight is 1: rounding is all that its router's gradient holds
        # Two weights that sum to 1: the router's gradient is a difference, of which bfloat16 loses more
        limit = 6e-2 if got.shape == (n, n_experts) else 3e-2
        assert (got - want).norm() <= limit * want.norm() + 1e-6


def test_an_expert_that_nobody_chose_gets_no_gradient_and_breaks_nothing():
    x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    logits = torch.randn(64, 4, device="cuda")
    logits[:, 2] = -100.0
    w_in, w_out = (torch.randn(4, a, b, device="cuda", dtype=torch.bfloat16, requires_grad=True) for a, b in ((48, 32), (32, 48)))
    moe_ffn(x, route(logits, 2), w_in, w_out, backend="grouped").sum().backward()
    assert not w_in.grad[2].any() and not w_out.grad[2].any() and w_in.grad[[0, 1, 3]].any() and x.grad.isfinite().all()


def test_compiled_gradients_of_the_layer_are_eager_modes():
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, generator=g).mul(0.2).bfloat16().cuda().requires_grad_()
              for s in ((2, 50, 32), (2, 50, 4), (4, 64, 32), (4, 32, 64), (4, 64), (4, 32))]

    def layer(x, logits, w_in, w_out, b_in, b_out):
        return moe_ffn(x, route(logits, 2), w_in, w_out, None, b_in, b_out, backend="grouped")
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        y = run(*leaves)
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
        results.append([y.detach().float(), *(t.float() for t in gradients)])
    for got, want in zip(results[1], results[0]):
        assert (got - want).norm() <= 2e-2 * want.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Waiting, compiling, decoding


def test_packed_samples_have_the_loss_of_samples_apart_without_a_matrix_of_all_scores():
    model, tokenizer = load_backbones(train.BACKBONES)
    encoded = data.Encoded(data.Drawn("chat", 12, 0), tokenizer, "tiny", model.config.vision.image_size, model.config.n_image_tokens, 352)
    items = [encoded[i] for i in range(12)]
    parts = []
    for batch in (data.collate(items), data.collate_packed(items, 352)):
        batch = {name: t.cuda() for name, t in batch.items() if torch.is_tensor(t)}
        parts.append(model.float().cuda().train()(**batch).parts)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            with torch.autocast("cuda", torch.bfloat16):       # masks and grouped queries at once have no such kernel, hence the repeated keys
                model(**batch).loss.backward()
    torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_in_a_training_step_waits_for_the_device(recipe, monkeypatch):
    """The one wait that is documented, the count of slots, is answered beforehand."""
    model, batch = recipe_model(recipe)
    model = model.cuda()
    batch = {k: v.cuda() for k, v in batch.items()}
    counts = model.count_slots(batch["tokens"])
    monkeypatch.setattr(CuMo, "count_slots", lambda self, tokens, sample_positions: counts)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    for mode in ("default", "error"):                       # the first step fills caches and makes handles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def loud(n_layers=2, **text):
    """A small float32 model on the GPU whose weights are loud, so that no two tokens are nearly as likely."""
    text = dict(vocab_size=60, dim=32, n_layers=n_layers, n_heads=4, n_kv_heads=2, ffn_dim=48, rope_theta=1e4) | text
    torch.manual_seed(0)
    model = CuMo(Config(vision=dict(image_size=16, patch_size=8, dim=16, n_layers=2, n_heads=2, ffn_dim=24), text=text))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
    return model.eval().cuda()


def test_nothing_in_decoding_waits_for_the_device():
    model = loud(n_experts=4).bfloat16()
    text, tokens = model.text, torch.randint(0, 60, (2, 16), device="cuda")
    cache, last = Cache(model.config.text, 2, 32, "cuda", torch.bfloat16), torch.full((2,), 15, device="cuda")
    with torch.no_grad():
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                logits = m.prefill(text, text.embed(tokens), tokens != PAD, last, cache)
                for step in range(1, 4):
                    logits = m.decode(text, m.sample(logits, 0.7, 0.9), last + step, cache, 32)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()


@pytest.mark.parametrize("text", [{}, dict(n_experts=4, sliding_window=9)], ids=["dense", "experts, window"])
def test_decoding_with_cuda_graphs_gives_eager_modes_tokens(text):
    model = loud(n_layers=1, **text)
    for batch, length, n in ((1, 20, 30), (8, 20, 30), (1, 70, 20), (8, 33, 12), (1, 20, 30)):
        tokens = torch.randint(0, 60, (batch, length), device="cuda")
        tokens[0, 1:5] = IMAGE
        if batch > 1:
            tokens[1, length // 2:] = PAD
        images = torch.randn(1, 3, 16, 16, device="cuda")
        want = model.generate(tokens, images, max_new_tokens=n)
        got = model.generate(tokens, images, max_new_tokens=n, compile=True)
        assert torch.equal(got, want), (batch, length)


@pytest.mark.parametrize("text", [{}, dict(n_experts=4), dict(n_experts=[4, 0], eval_capacity_factor=0.5)], ids=["dense", "experts", "capacity"])
@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_a_step_recorded_in_bfloat16_says_what_the_same_kernels_say_one_by_one(text, how, monkeypatch):
    model = loud(**text).bfloat16()

    def check(tokens, n):
        with how():
            got = model.generate(tokens, max_new_tokens=n, eos=[7], compile="eager")
        kept = model.cache
        assert kept.replay is not None
        with monkeypatch.context() as patch:
            patch.setattr(m, "may_record", lambda *_: False)
            assert torch.equal(got, model.generate(tokens, max_new_tokens=n, eos=[7], compile="eager"))
        return kept
    tokens = torch.randint(8, 60, (3, 20), device="cuda")
    tokens[1, 9:] = PAD
    first = check(tokens, 30)
    others = torch.where(tokens != PAD, (tokens - 3) % 52 + 8, PAD)
    assert check(others, 25) is first                                               # the same graph
    step = first.replay
    model.text.layers[0].q.weight.data.mul_(-1.5)                                   # trained on, in place
    assert check(tokens, 30).replay is step
    held = [p.data for p in model.parameters()]                                     # so that their places are taken
    model.cpu().cuda()
    assert check(tokens, 30).replay is not step and held
    assert check(tokens[:1], 60) is not first


def test_a_compiled_training_forward_is_one_graph_with_eager_modes_loss():
    model, batch = recipe_model("cumo")
    for part in (model.vision, model.text):
        part.layers = part.layers[:2]
    model.config.vision.n_layers = 2                        # features: what enters the second layer
    model.config.vision.n_experts = model.config.vision.n_experts[:2]
    model, batch = model.cuda(), {k: v.cuda() for k, v in batch.items()}
    losses = []
    torch._dynamo.utils.counters.clear()
    for forward in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_replayed_graphs_give_the_gradients_of_several_micro_batches_of_other_sizes():
    model, batch = recipe_model("cumo")
    for part in (model.vision, model.text):
        part.layers = part.layers[:2]
    model.config.vision.n_layers = 2
    model.config.vision.n_experts = model.config.vision.n_experts[:2]
    batch = {k: v.cuda() for k, v in batch.items()}
    half = {k: v[:6] for k, v in batch.items()}
    m.choose_trainable(model, ("vision", "connector", "text"))
    sums = []
    for args in (train.Args(compile=False), train.Args(compile=True, cuda_graphs=True)):
        copied = copy.deepcopy(model).cuda()
        params = {name: p for name, p in copied.named_parameters() if p.requires_grad}
        call = train.distribute(args, copied, torch.device("cuda"))
        optimizer = torch.optim.SGD(params.values(), lr=0.0)
        for _ in range(3):                                  # compiled, recorded, replayed
            optimizer.zero_grad()
            if args.cuda_graphs:
                train.zero_replayed_gradients(copied)
            for micro in (batch, half, batch):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = call(**micro).loss
                loss.backward()
        sums.append({name: p.grad.double().cpu() for name, p in params.items() if p.grad is not None})
    error, name = worst(sums[1], sums[0])
    assert error < 5e-2, name


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


SMALL = ["--stage", "3", "--init", train.BACKBONES, "--steps", "6", "--batch-size", "8", "--micro-batch", "4", "--eval-questions", "9", "--no-compile",
         "--save-every", "3"]


def launch(out, *flags, torchrun=False):
    """Run train.py as a program -> its exit code and what it printed."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"] if torchrun else [sys.executable]
    run = subprocess.run([*program, "train.py", *SMALL, "--out", str(out), *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                         timeout=100)
    return run.returncode, run.stdout + run.stderr


def losses(out):
    rows = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize("first,then", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_of_one_device_resumes_on_the_other(first, then, tmp_path, monkeypatch):
    real, seen = train.write_checkpoint, []

    def write(*args):
        seen.append(real(*args))
        raise KeyboardInterrupt
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main([*SMALL, "--out", str(whole), "--device", "cpu"])
    monkeypatch.setattr(train, "write_checkpoint", write)
    with pytest.raises(KeyboardInterrupt):
        train.main([*SMALL, "--out", str(cut), "--device", first])
    monkeypatch.setattr(train, "write_checkpoint", real)
    train.main([*SMALL, "--out", str(cut), "--device", then, "--resume"])
    got, want = losses(cut), losses(whole)
    assert got.keys() == want.keys()
    for step in want:
        assert got[step] == pytest.approx(want[step], rel=2e-2), step


@pytest.mark.parametrize("flags", [["--fsdp"], ["--expert-parallel", "1"], ["--fsdp", "--checkpointing"]], ids=" ".join)
def test_torchrun_with_nccl_trains_on_one_gpu(flags, tmp_path):
    code, printed = launch(tmp_path / "o", *flags, torchrun=True)
    assert code == 0, printed[-2000:]
    one, text = launch(tmp_path / "one")
    assert one == 0, text[-2000:]
    got, want = losses(tmp_path / "o"), losses(tmp_path / "one")
    assert list(got) == list(range(6))
    for step in want:
        assert got[step] == pytest.approx(want[step], rel=3e-2), step


def test_experts_exchanged_by_nccl_give_the_definitions_answer(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        leaves = [torch.randn(*s, device="cuda").mul(0.3).requires_grad_() for s in ((40, 16), (4, 24, 16), (4, 16, 24))]
        r = route(torch.randn(40, 4, device="cuda"), 2)
        results = []
        for how in (dict(backend="loop"), dict(backend="sorted", group=dist.group.WORLD)):
            y = moe_ffn(leaves[0], r, leaves[1], leaves[2], **how)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for got, want in zip(results[1], results[0]):
            assert (got - want).norm() <= 1e-4 * want.norm()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_memory_of_a_step_is_what_the_plan_says(checkpointing, monkeypatch):
    """Eager mode; compiling needs less. Sizes at which the libraries' own tens of megabytes do not matter."""
    medium = dict(vision=dict(image_size=224, dim=768, n_layers=12, n_heads=12, ffn_dim=3072, n_experts=4, scales=[1]), connector=dict(n_experts=4),
                  text=dict(vocab_size=16000, dim=1024, n_layers=8, n_heads=16, n_kv_heads=4, ffn_dim=2816, rope_theta=1e4))
    monkeypatch.setitem(m.PRESETS, "medium", medium)
    args = train.parse("--preset medium --stage 3 --steps 1 --batch-size 8 --micro-batch 8 --max-length 1024".split())
    planned = train.memory(args, 3, 1, False, checkpointing)["peak"]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = CuMo(Config.from_preset("medium")).cuda().train()
    m.choose_trainable(model, ("vision", "connector", "text"))
    model.checkpointing(checkpointing)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
    tokens = torch.full((8, 1024), 7, device="cuda")
    tokens[:, :256] = IMAGE
    images = torch.randn(8, 3, 224, 224, device="cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, images, labels=tokens.clamp(min=0)).loss
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"checkpointing {checkpointing}: {peak / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB")
    assert peak == pytest.approx(planned, rel=0.1)


def test_a_language_model_hears_and_watches_videos_on_the_gpu():
    """Encoded sounds and a video's frames: the GPU gives what the CPU gives."""
    model, _ = recipe_model("uni-moe")
    model.eval()
    config = model.config
    mel = torch.randn(2, config.audio.n_mels, config.audio.n_frames)
    frames = torch.tensor([3, 1])
    images = torch.randn(4, 3, config.vision.image_size, config.vision.image_size)
    with torch.no_grad():
        want = model.encode_audio(mel), model.encode_images(images, frames=frames)
        model.cuda()
        got = model.encode_audio(mel.cuda()), model.encode_images(images.cuda(), frames=frames.cuda())
    for a, b in zip(got, want):
        assert (a.cpu() - b).norm() <= 1e-4 * b.norm()
