"""bench.py: how fast it is. Where there is a ceiling, it is measured, too, and the share reached.

    python tests/bench.py layers                    a MoE layer, against a dense FFN of equal FLOPs
    python tests/bench.py step --preset tiny        a step of stage 3, against a dense model's and
                                                    the released code's way
    python tests/bench.py profile --preset cumo-1b  what takes a step's time on a GPU
    python tests/bench.py pack                      samples of mixed lengths, packed and padded
    python tests/bench.py decode cumo-mistral-7b    decoding, against the memory's bandwidth
    python tests/bench.py images                    reading images, against Pillow's bare work
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import sys
import tempfile
import time
from typing import NamedTuple
from unittest import mock

# OpenMP's threads wait for each other by spinning, on a busy machine for ages: they shall give up
# sooner. libgomp reads this when torch is loaded. What the user has set holds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data
import kernels
import train
from kernels import ffn, moe_ffn, route
from model import IMAGE, Config, CuMo, MoE, choose_trainable, store_by_columns
from upcycle import load, load_backbones, save

# -------------------------------------------------------------------------------------------------
# What several of the commands need


def median_seconds(runs: dict, device: str, repeat: int, calls: int | None = None,
                   clock=time.perf_counter) -> dict:
    """{name: a callable} -> {name: median seconds of `repeat` calls}.

    The callables take turns, so that a slow moment of the machine hits all of them. A GPU gets
    five calls in a row (or `calls`), as it does in training, where the next kernels are in the
    queue before the last ones are done.
    """
    if calls is None:
        calls = 5 if device == "cuda" else 1
    times = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            for _ in range(calls):
                run()
            if device == "cuda":
                torch.cuda.synchronize()

            # the first turn warms up
            if turn > 0:
                times[name].append((clock() - start) / calls)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def bytes_kept(run, weights: list) -> int:
    """Bytes that the forward pass run() keeps for the backward pass, without the weights."""
    known = {w.untyped_storage().data_ptr() for w in weights if w is not None}
    kept = {}

    def pack(t):
        memory = t.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(kept.values())


def matmul_speed(device: str, dtype: torch.dtype, repeat: int = 7) -> float:
    """FLOP/s of one large matrix product, the ceiling of everything that computes."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = median_seconds({"matmul": lambda: a @ a}, device, repeat)
    return 2 * n**3 / seconds["matmul"]


def name_of(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def samples_and_experts(x, r, w_in, w_out, w_gate, b_in, b_out, act):
    """How the released CuMo dispatches, as a yardstick: x (B, N, D) -> (B, N, D_out).

    It loops in Python over samples, and in each over experts. Every answer is added in place to a
    slice of one tensor, so that autograd, going back, copies the whole tensor's gradient each time.
    """
    y = x.new_zeros(*x.shape[:2], w_out.shape[1])
    experts = kernels.split_experts(kernels.Stack(w_in, w_out, w_gate, b_in, b_out))
    for b in range(len(x)):
        for e, expert in enumerate(experts):
            token, choice = torch.where(r.experts[b] == e)
            weight = r.weights[b][token, choice, None].to(x.dtype)
            y[b][token] += weight * ffn(x[b][token], *expert, act)
    return y


# -------------------------------------------------------------------------------------------------
# layers: forward and backward of one MoE layer


class Layer(NamedTuple):
    n_images: int
    n_tokens: int  # of each image
    dim: int
    ffn_dim: int
    dim_out: int
    gated: bool = False  # as Mixtral's, without biases


LAYERS = {
    "tiny": Layer(64, 37, 128, 512, 128),
    "CLIP ViT-L": Layer(4, 577, 1024, 4096, 1024),
    "connector": Layer(4, 576, 2048, 4096, 4096),
    "CLIP ViT-L, gated": Layer(4, 577, 1024, 4096, 1024, gated=True),
}


def random_layer(layer: Layer, n_experts: int, device: str, dtype: torch.dtype):
    """x (B, N, D), router logits (B, N, E) and the experts' weights, which all want gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        t = torch.randn(*shape, generator=generator) * scale
        return t.to(device, dtype).requires_grad_()

    b, n, d, f, d_out, gated = layer
    e = n_experts
    x = draw(b, n, d)
    logits = draw(b, n, e)
    w_in = draw(e, f, d, scale=d**-0.5)
    w_out = draw(e, d_out, f, scale=f**-0.5)
    if gated:
        w_gate = draw(e, f, d, scale=d**-0.5)
        return x, logits, [w_in, w_out, w_gate, None, None]
    return x, logits, [w_in, w_out, None, draw(e, f), draw(e, d_out)]


@contextlib.contextmanager
def transformers_in_reach():
    """Inside, transformers can be imported; ValueError where it is not installed."""
    # it looks for a package named kernels, and would take this project's file for it
    elsewhere = [path for path in sys.path if os.path.abspath(path) != ROOT]
    try:
        with mock.patch.object(sys, "path", elsewhere):
            yield
    except ImportError:
        raise ValueError("--transformers compares with that library: "
                         "pip install transformers") from None


def as_transformers(name: str, weights: list):
    """The same experts in Hugging Face's Mixtral, by its implementation `name`.

    -> a function of x (N, D) and a Routing that gives (N, D), and its weights.
    """
    with transformers_in_reach():
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    w_in, w_out, w_gate = weights[:3]
    # its default activation is silu
    config = MixtralConfig(num_local_experts=len(w_in), hidden_size=w_in.shape[2],
                           intermediate_size=w_in.shape[1])
    config._experts_implementation = name
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(torch.cat([w_gate, w_in], 1).detach())  # (E, 2F, D)
    experts.down_proj = torch.nn.Parameter(w_out.detach())

    def run(x, r):
        return experts(x, r.experts, r.weights.to(x.dtype))

    return run, list(experts.parameters())


def layer_rows(x, logits, weights, act, compiled, transformers):
    """{row's name: a callable that computes the layer} and the leaves that get gradients."""
    w_in, w_out, *others = weights
    twice = torch.cat([x.detach()] * 2).requires_grad_()
    first = [None if w is None else w[0] for w in others]
    leaves = [t for t in (x, twice, logits, *weights) if t is not None]

    def dense():
        return ffn(twice, w_in[0], w_out[0], *first, act)

    def ours(backend):
        return moe_ffn(x, route(logits, 2), *weights, act=act, backend=backend)

    def released():
        return samples_and_experts(x, route(logits, 2), *weights, act)

    rows = {"dense, K x tokens": dense, "sorted": functools.partial(ours, "sorted")}
    if x.dtype == torch.bfloat16:
        rows["grouped"] = functools.partial(ours, "grouped")
    if compiled:
        # on a GPU "sorted" waits for the sizes of its slices, compiled or not
        rows = {name: run if x.is_cuda and name == "sorted" else torch.compile(run)
                for name, run in rows.items()}
    rows["loop"] = functools.partial(ours, "loop")
    rows["samples x experts"] = released

    def theirs(run):
        return run(x.flatten(0, 1), route(logits.flatten(0, 1), 2)).view(x.shape)

    for name in ("eager", "grouped_mm") if transformers else ():
        run, params = as_transformers(name, weights)
        leaves += params
        rows[f"transformers {name}"] = functools.partial(theirs, run)
        same = torch.allclose(theirs(run), rows["sorted"](), rtol=0.05, atol=0.05)
        assert same, "not the same function"
    return rows, leaves


def bench_layer(name: str, layer: Layer, device: str, dtype: torch.dtype, speed: float, args):
    """One table: the layer by every backend, 4 experts, top-2, beside a dense FFN on 2 x tokens."""
    # a GPU wants more to do
    if device == "cuda" and layer.n_tokens > 100:
        layer = layer._replace(n_images=20 * layer.n_images)
    act = "silu" if layer.gated else "gelu"
    x, logits, weights = random_layer(layer, 4, device, dtype)
    # The layer before was of another size, and torch.compile would write kernels for any size now,
    # which are slower.
    torch._dynamo.reset()
    rows, leaves = layer_rows(x, logits, weights, act, args.compile, layer.gated)

    # the gradient that comes from behind, for the dense row twice as long
    grad = torch.randn(*x.shape[:2], layer.dim_out, device=device, dtype=dtype)
    grads = {row: grad for row in rows}
    grads["dense, K x tokens"] = torch.cat([grad] * 2)

    def once(row):
        # as in a training step: gradients are written, not added
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(rows[row](), grads[row])

    kept = {row: bytes_kept(run, leaves[3:]) for row, run in rows.items()}

    # on a CPU, the small layer's milliseconds are noisy
    repeat = args.repeat
    if name == "tiny" and device == "cpu":
        repeat *= 10
    seconds = median_seconds({row: functools.partial(once, row) for row in rows}, device, repeat)

    # multiply-adds of a token at one expert; it has two experts, and each multiply-add is two
    # FLOPs, forward and twice backward
    n_tokens = layer.n_images * layer.n_tokens
    one = layer.ffn_dim * (layer.dim + layer.dim_out + layer.dim * layer.gated)
    work = 3 * 2 * 2 * n_tokens * one
    shape = f"{layer.dim} -> {layer.ffn_dim} -> {layer.dim_out:4}"
    print(f"\n{name + ':':18} {n_tokens:,} tokens, {shape}         ms  time / dense  of matmul"
          "  kept / dense")
    for row, t in seconds.items():
        ratio = t / seconds["dense, K x tokens"]
        memory = kept[row] / kept["dense, K x tokens"]
        print(f"    {row:44} {t * 1e3:9.2f} {ratio:12.2f}x {work / t / speed:10.1%} {memory:12.2f}x")


def bench_layers(args):
    devices = [args.device]
    if args.device is None:
        devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        speed = matmul_speed(device, dtype)
        print(f"\n{name_of(device)}, {str(dtype)[6:]}; matrix products reach {speed / 1e12:.3f} "
              f"TFLOP/s. Forward + backward, median of {args.repeat} (tiny on a CPU: of "
              f"{10 * args.repeat})")
        for name, layer in LAYERS.items():
            if not layer.gated or args.transformers:
                bench_layer(name, layer, device, dtype, speed, args)


# -------------------------------------------------------------------------------------------------
# step: a whole training step


def as_released(x, r, *weights, **_):
    """In the place of kernels.moe_ffn: the released CuMo's loop over samples and experts."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dim() == 3:
        return samples_and_experts(x, r, *weights[:6])

    # the decoder's tokens are one row: a single sample
    row = r._replace(weights=r.weights[None], experts=r.experts[None])
    return samples_and_experts(x[None], row, *weights[:6])[0]


def a_batch(args, stage: train.Stage, config: Config, device) -> dict:
    """A micro-batch of stage 3 on the device."""
    rows = stage.micro_batch
    if args.preset == "tiny":
        tokenizer = load_backbones(train.BACKBONES)[1]
        drawn = data.Drawn("chat", rows, args.seed)
        encoded = data.Encoded(drawn, tokenizer, "tiny", data.picture_format(config.vision),
                               config.n_image_tokens, stage.max_length)
        batch = data.collate([encoded[i] for i in range(rows)])
    else:
        # there is no tokenizer at hand: any words do
        words = torch.randint(config.text.vocab_size, (rows, stage.max_length))
        slots = torch.arange(config.n_image_tokens)
        size = config.vision.image_size
        batch = {"tokens": words.index_fill(1, slots, IMAGE), "labels": words,
                 "images": torch.randn(rows, 3, size, size)}
    return {name: t.to(device) for name, t in batch.items() if torch.is_tensor(t)}


def step_work(config: Config, stage: train.Stage, n_tokens: int) -> float:
    """FLOPs of a micro-batch, forward and backward."""
    counted = train.rehearse(json.dumps(config.to_dict()), tuple(stage.trains), (),
                             stage.micro_batch, n_tokens, False, False, torch.bfloat16)
    return sum(counted.forward.values()) + sum(counted.backward.values())


def widen(dense: Config, config: Config, stage: train.Stage, n_tokens: int, work: float):
    """Widen the FFNs in the place of `config`'s experts until a step of `dense` costs `work` FLOPs.
    (The connector has no width of its own.)"""
    part = dense.text if any(config.text.n_experts) else dense.vision
    # the work is a linear function of the width: two points give the line
    part.ffn_dim = 1024
    low = step_work(dense, stage, n_tokens)
    part.ffn_dim = 2048
    high = step_work(dense, stage, n_tokens)
    width = 1024 + 1024 * (work - low) / (high - low)
    part.ffn_dim = max(8, 8 * round(width / 8))


def step_runs(name: str, config: Config, stage: train.Stage, args, batch: dict, n_micro: int,
              device) -> dict:
    """{row's name: a callable that makes one step} of a model with random weights.

    A step goes through the batch n_micro times and then updates the weights.
    """
    with device:
        model = CuMo(config).train()
    choose_trainable(model, stage.trains)
    params = [p for p in model.parameters() if p.requires_grad]
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=on_cuda)
    call = train.distribute(args, model, device)

    slots = CuMo.count_slots(batch["tokens"])

    def step():
        if args.cuda_graphs:
            train.zero_replayed_gradients(model)
        for _ in range(n_micro):
            with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
                loss = call(**batch, slots=slots).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    def released():
        with mock.patch("kernels.moe_ffn", as_released), \
                torch.compiler.set_stance("force_eager"):
            step()

    if name == "experts":
        return {"experts": step, "as released": released}
    return {name: step}


def time_steps(runs: dict, device, repeat: int) -> dict:
    """-> {row's name: seconds of a step}."""
    if device.type == "cpu":
        # in turn: a CPU's speed drifts
        return median_seconds(runs, "cpu", repeat)

    # one after the other: memory is scarce
    seconds = {}
    for name, run in runs.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds |= median_seconds({name: run}, "cuda", repeat, calls=1)
            peak = torch.cuda.max_memory_allocated() / 1e9
            reserved = torch.cuda.max_memory_reserved() / 1e9
            print(f"{name}: {seconds[name]:.3f} s, at the most {peak:.2f} GB of GPU memory in use, "
                  f"{reserved:.2f} GB reserved", flush=True)
        except torch.OutOfMemoryError:
            print(f"{name}: more memory than this GPU has")
    return seconds


def prepare_step(args):
    """train.py's flags -> the device, stage 3, its model with experts, and how many micro-batches
    a step has."""
    if args.expert_parallel > 1:
        raise ValueError("step times experts that are all on one process: "
                         "leave --expert-parallel out")
    if args.batch_size is None and args.micro_batch is not None:
        args.batch_size = args.micro_batch  # one micro-batch; with --batch-size, so many as it has
    device = train.prepare_device(args)
    stage = train.settings(args, 3)
    n_micro = stage.batch_size // stage.micro_batch
    config, _ = train.planned(args, stage)
    torch.manual_seed(args.seed)
    return device, stage, config, n_micro


def bench_step(args):
    """Seconds of a step of stage 3, on data that lies in memory."""
    n_steps = args.steps or 5
    device, stage, config, n_micro = prepare_step(args)
    dense, _ = train.planned(args, dataclasses.replace(stage, has_experts=False))
    batch = a_batch(args, stage, config, device)
    n_tokens = batch["tokens"].shape[1]

    # a dense model of equal FLOPs
    work = step_work(config, stage, n_tokens)
    widen(dense, config, stage, n_tokens, work)
    works = {"experts": work, "as released": work, "dense": step_work(dense, stage, n_tokens)}

    runs = step_runs("experts", config, stage, args, batch, n_micro, device)
    if device.type == "cuda":
        seconds = time_steps(runs, device, n_steps)
        del runs
        runs = step_runs("dense", dense, stage, args, batch, n_micro, device)
        seconds |= time_steps(runs, device, n_steps)
    else:
        runs |= step_runs("dense", dense, stage, args, batch, n_micro, device)
        seconds = time_steps(runs, device, n_steps)

    rows = stage.micro_batch * n_micro
    speed = matmul_speed(device.type, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"{name_of(device.type)}, {args.preset}, {n_micro} x {stage.micro_batch} samples of "
          f"{n_tokens} tokens; matrix products reach {speed / 1e12:.3f} TFLOP/s")
    print(f"{'step of stage 3':16} {'seconds':>8} {'samples/s':>10} {'TFLOP/s':>9} "
          f"{'of matmul':>10} {'time / dense':>13} {'time / experts':>15}")
    for name, t in seconds.items():
        reached = works[name] * n_micro / t
        print(f"{name:16} {t:8.3f} {rows / t:10.2f} {reached / 1e12:9.3f} {reached / speed:10.1%} "
              f"{t / seconds.get('dense', t):12.2f}x {t / seconds.get('experts', t):14.2f}x")


# -------------------------------------------------------------------------------------------------
# profile: what takes a step's time on a GPU

# What a kernel is for, by a part of its name. The first that fits counts.
KINDS = {
    "the experts' matrix products": "GroupProblemShape|prepare_grouped",
    "attention": "sdpa|flash|fmha",  # some of these have cutlass in their names, too
    "other matrix products": "gemm|nvjet|cutlass",
    "fused by torch.compile": "triton",
    "adding gradients up, AdamW": "multi_tensor|CUDAFunctor_add",
    "other kernels": "",
}


def bench_profile(args):
    """What takes the time of a step with experts."""
    device, stage, config, n_micro = prepare_step(args)
    if device.type != "cuda":
        raise ValueError("profile looks at a GPU's kernels; there is none here")
    batch = a_batch(args, stage, config, device)
    step = step_runs("experts", config, stage, args, batch, n_micro, device)["experts"]
    seconds = median_seconds({"step": step}, "cuda", 3, calls=1)["step"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()

    times = dict.fromkeys(KINDS, 0.0)
    n_kernels = 0
    for event in profile.events():
        # "#" is in the name of a part of the program, which has kernels of its own.
        if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.name:
            kind = next(kind for kind, names in KINDS.items()
                        if re.search(names, event.name, re.IGNORECASE))
            times[kind] += event.time_range.elapsed_us() / 1e6
            n_kernels += 1
    times["no kernel runs"] = max(0.0, seconds - sum(times.values()))
    print(f"{name_of('cuda')}, {args.preset}, stage 3, {n_micro} x {stage.micro_batch} samples: "
          f"{n_kernels} kernels, {seconds:.3f} s a step")
    for kind, t in sorted(times.items(), key=lambda row: -row[1]):
        print(f"    {kind:30} {t:8.3f} s {t / seconds:7.1%}")


# -------------------------------------------------------------------------------------------------
# pack: train.py --pack, on samples of mixed lengths


def mixed_conversations(n: int, seed: int) -> list:
    """n samples in LLaVA's format: half of them with a picture, and answers of 2 to 90 words, most
    of them short."""
    rng = random.Random(seed)
    samples = []
    for i in range(n):
        words = min(90, round(2 + rng.expovariate(1 / 20)))
        answer = " ".join(rng.choice(["red", "small", "circle", "left"]) for _ in range(words))
        question = "What is there?"
        images = []
        if i % 2 == 0:
            question = f"<image>\n{question}"
            images = [Image.new("RGB", (48, 48), (rng.randrange(256), 90, 90))]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        samples.append({"id": str(i), "images": images, "conversations": turns})
    return samples


def bench_pack(n_batches: int = 4, batch_size: int = 64, repeat: int = 3):
    """Forward and backward of preset tiny, stage 3, in batches that are drawn by chance, of like
    lengths, and drawn by chance and packed."""
    args = train.parse(["--device", "cpu", "--batch-size", str(batch_size)])
    device = train.prepare_device(args)
    stage = train.settings(args, 3)
    config, _ = train.planned(args, stage)
    torch.manual_seed(0)
    model = CuMo(config).train()
    tokenizer = load_backbones(train.BACKBONES)[1]
    n = n_batches * batch_size
    encoded = data.Encoded(mixed_conversations(n, 0), tokenizer, "tiny",
                           data.picture_format(config.vision), config.n_image_tokens,
                           stage.max_length)
    items = [encoded[i] for i in range(n)]
    lengths = [len(item["tokens"]) for item in items]
    packed = functools.partial(data.collate_packed, row_length=stage.max_length)

    batches = {}
    for name, collate, order in (("drawn by chance", data.collate, None),
                                 ("of like lengths", data.collate, lengths),
                                 ("packed (--pack)", packed, None)):
        epoch = data.Batches(n, batch_size, batch_size, lengths=order).epoch(0)
        batches[name] = [collate([items[i] for i in batch]) for batch in epoch.tolist()]

    def run(name):
        for batch in batches[name]:
            model.zero_grad()
            model(**train.inputs(model, batch, device)).loss.backward()

    runs = {name: functools.partial(run, name) for name in batches}
    seconds = median_seconds(runs, "cpu", repeat)
    print(f"{name_of('cpu')}, tiny, stage 3: {n} samples of {min(lengths)} to {max(lengths)} tokens "
          f"(mean {sum(lengths) / n:.0f}), {batch_size} a batch; median of {repeat}")
    print(f"{'batches':16} {'padding':>8} {'rows a batch':>13} {'samples/s':>10} {'time / packed':>14}")
    for name, t in seconds.items():
        tokens = [batch["tokens"] for batch in batches[name]]
        share = 1 - sum(lengths) / sum(t.numel() for t in tokens)
        rows = sum(len(t) for t in tokens) / n_batches
        print(f"{name:16} {share:8.1%} {rows:13.1f} {n / t:10.2f} "
              f"{t / seconds['packed (--pack)']:13.2f}x")


# -------------------------------------------------------------------------------------------------
# decode: how near decoding comes to its limit
#
# A step of decoding multiplies every weight with one vector a row of the batch. That is so little
# arithmetic that the time goes into reading the weights, and behind them the rows' keys and values.
# Bytes over bandwidth is therefore the shortest time that a step can take. A larger batch reads the
# weights once for all its rows: nearly as many steps a second, each with more tokens. (A tiny model
# fits into a CPU's cache, which is faster than memory, and its time goes into starting operators:
# there the share says little.)


def decode_bytes(model: CuMo, batch: int, length: int) -> float:
    """Bytes that a step reads: the decoder's weights, and `length` keys and values for each row."""
    text = model.config.text
    embed = model.text.embed.weight

    # of experts, count those that a batch is likely to meet
    n = 0.0
    for module in model.text.modules():
        met = 1.0
        if isinstance(module, MoE):
            met = 1 - (1 - module.top_k / len(module.router)) ** batch
        n += met * sum(p.numel() for p in module.parameters(recurse=False))

    # of the embedding a step reads a few rows only, unless it is the head as well
    if model.text.head is not None:
        n -= embed.numel()
    n += 2 * text.n_layers * batch * length * text.n_kv_heads * text.head_dim
    return n * embed.element_size()


def own_seconds(device: str) -> float:
    """Seconds. On a CPU they are those of this process, a thread: so others disturb little."""
    if device == "cpu":
        return time.process_time() / torch.get_num_threads()
    return time.perf_counter()


def memory_bandwidth(device: str, dtype: torch.dtype) -> float:
    """Bytes per second, of reading or of copying, whichever is more."""
    x = torch.ones(1 << 30 if dtype == torch.bfloat16 else 1 << 26, device=device, dtype=dtype)
    seconds = median_seconds({"sum": x.sum, "copy": x.clone}, device[:4], 9,
                             clock=functools.partial(own_seconds, device[:4]))
    # a copy also writes
    return max(x.nbytes / seconds["sum"], 2 * x.nbytes / seconds["copy"])


def step_seconds(model: CuMo, tokens: torch.Tensor, n: int, compile) -> float:
    """Seconds of one step of decoding behind a prompt `tokens` (B, T), without that one's pass."""
    times = []
    # the first run warms up (and compiles)
    for _ in range(3):
        seen = []
        ends = []

        def on_token(token):
            seen.append(token)
            # in between, nobody waits for a GPU
            if len(seen) in (1, n):
                token.tolist()
                ends.append(own_seconds(tokens.device.type))

        model.generate(tokens, max_new_tokens=n, on_token=on_token, compile=compile)
        times.append((ends[1] - ends[0]) / (n - 1))
    return min(times[1:])


@torch.no_grad()
def transformers_seconds(theirs, tokens: torch.Tensor, n: int) -> float:
    """The same of a decoder in transformers, by its forward pass alone, without its generate."""
    times = []
    for _ in range(3):
        out = theirs(tokens, use_cache=True)
        out.logits.sum().item()  # the prompt is done
        start = own_seconds(tokens.device.type)
        for _ in range(n - 1):
            token = out.logits[:, -1:].argmax(-1)  # (B, 1)
            out = theirs(token, past_key_values=out.past_key_values)
        out.logits.sum().item()
        times.append((own_seconds(tokens.device.type) - start) / (n - 1))
    return min(times[1:])


def as_transformers_decoder(model: CuMo):
    """The same decoder in transformers, by way of a folder."""
    with tempfile.TemporaryDirectory() as folder, transformers_in_reach():
        from transformers import AutoModelForCausalLM
        save(model, folder, layout="hf-llm")
        return AutoModelForCausalLM.from_pretrained(folder).to(model.text.embed.weight.device)


def decoder_to_time(name: str, device: str, dtype: torch.dtype) -> CuMo:
    """A folder's model, or a preset's decoder with random weights."""
    if os.path.isdir(name):
        return load(name, device, dtype)[0]
    config = Config.from_preset(name)
    # an image is read once, before
    config.vision = None
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = CuMo(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def bench_decode(name: str, device: str, hows: tuple = (False,), transformers: bool = False,
                 prompt: int = 640, n: int = 64, batches: tuple = (1, 8)):
    """Tokens per second of a folder's or a preset's decoder.

    hows: False (eager) and what else CuMo.generate takes for `compile`. The prompt is as long as an
    image's. On a CPU the model is stored as generate.py stores it.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = decoder_to_time(name, device, dtype)
    runs = {}
    if transformers:
        theirs = as_transformers_decoder(model)
        runs["transformers"] = functools.partial(transformers_seconds, theirs)
    if device == "cpu":
        store_by_columns(model.text)
    for how in hows:
        title = "compiled" if how else "eager"
        runs[title] = functools.partial(step_seconds, model, compile=how)

    bandwidth = memory_bandwidth(device, dtype)
    print(f"{name}, {str(dtype)[6:]}, {name_of(device[:4])}, {prompt} tokens of prompt; the memory "
          f"gives {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':12} {'batch':>5} {'tokens/s':>9} {'ms a step':>10} {'MB a token':>11} "
          f"{'of bandwidth':>13}")
    vocab_size = model.config.text.vocab_size
    for batch in batches:
        tokens = torch.randint(vocab_size, (batch, prompt), device=device)
        size = decode_bytes(model, batch, prompt + n // 2)
        for title, seconds in runs.items():
            step = seconds(tokens=tokens, n=n)
            print(f"{title:12} {batch:5} {batch / step:9.1f} {step * 1e3:10.3f} "
                  f"{size / batch / 1e6:11.2f} {size / step / bandwidth:13.1%}", flush=True)


# -------------------------------------------------------------------------------------------------
# images: how fast they are read


def noisy_jpegs(folder: str, width: int, height: int, n: int) -> list[str]:
    """n JPEGs of about 150 kB, as much as COCO's photographs have.

    Decoding takes as long as there is detail, so each is a smooth picture with noise on it.
    """
    rng = np.random.default_rng(0)
    files = []
    for i in range(n):
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 12, (height, width, 1))
        files.append(os.path.join(folder, f"{i}.jpg"))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def image_seconds(width: int, height: int, size: int = 336, n: int = 24, rounds: int = 7):
    """Seconds an image on one core: (Pillow's decoding and resizing alone, data.load_image)."""
    def bare(file):
        Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)

    def ours(file):
        data.load_image(file, size)

    best = {bare: float("inf"), ours: float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        files = noisy_jpegs(folder, width, height, n)
        # the two take turns, the best round counts, and time is this thread's own: so a busy
        # machine disturbs little
        for _ in range(rounds):
            for read in best:
                start = time.thread_time()
                for file in files:
                    read(file)
                best[read] = min(best[read], (time.thread_time() - start) / n)
    return best[bare], best[ours]


def bench_images(rounds: int = 7):
    print("JPEGs -> 336 x 336, images a second and core\n            Pillow alone  load_image")
    # sizes that are common in COCO
    sizes = (640, 480), (640, 427), (480, 640)
    times = {f"{w} x {h}": image_seconds(w, h, rounds=rounds) for w, h in sizes}
    times["together "] = tuple(sum(t) / len(sizes) for t in zip(*times.values()))
    for name, (bare, ours) in times.items():
        print(f"{name} {1 / bare:14.0f} {1 / ours:11.0f}   {100 * bare / ours:.0f}%")


# -------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    layers = commands.add_parser("layers", help="a MoE layer, forward + backward, in float32 on "
                                 "the CPU and in bfloat16 on CUDA where there is one")
    layers.add_argument("--repeat", type=int, default=7, help="timed runs of each (default: 7)")
    layers.add_argument("--compile", action="store_true",
                        help="torch.compile the dense, sorted (not on CUDA) and grouped rows")
    layers.add_argument("--transformers", action="store_true", help="one layer more, which "
                        "Hugging Face's Mixtral has, also by its code")
    layers.add_argument("--device", choices=("cpu", "cuda"), help="default: both")

    commands.add_parser("step", add_help=False, help="a step of stage 3 with random weights: with "
                        "experts, dense at equal FLOPs, and as released. It takes train.py's "
                        "flags; --steps are the timed ones (default: 5)")

    commands.add_parser("profile", add_help=False, help="what takes the time of a step on a GPU; "
                        "flags as for step")

    commands.add_parser("pack", help="samples/s of mixed lengths in rows that they share, against "
                        "a row for each")

    decode = commands.add_parser("decode", help="tokens/s of decoding, and the share of the "
                                 "memory's bandwidth that they take")
    decode.add_argument("model", nargs="?", default="tiny",
                        help="a preset, or a model's folder (default: tiny)")
    decode.add_argument("--compile", action="store_true",
                        help="also compiled; on CUDA it is compiled anyway")
    decode.add_argument("--transformers", action="store_true", help="also by that library")
    decode.add_argument("--prompt", type=int, default=640,
                        help="tokens before those that are timed (default: 640, as many as a "
                             "picture has)")
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    decode.add_argument("--tokens", type=int, default=64, help="that are timed (default: 64)")
    decode.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    commands.add_parser("images", help="images/s and core")

    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("step", "profile"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    for name, least in (("repeat", 1), ("tokens", 2), ("prompt", 1)):
        if getattr(args, name, least) < least:
            raise ValueError(f"--{name} must be at least {least}")
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here")
    if args.command == "layers":
        train.keep_pages()
        bench_layers(args)
    elif args.command == "step":
        bench_step(train.parse(rest))
    elif args.command == "profile":
        bench_profile(train.parse(rest))
    elif args.command == "pack":
        bench_pack()
    elif args.command == "decode":
        hows = (True,)
        if args.device == "cpu":
            hows = (False, True) if args.compile else (False,)
        bench_decode(args.model, args.device, hows, args.transformers, args.prompt, args.tokens,
                     args.batch)
    else:
        bench_images()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"bench.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
