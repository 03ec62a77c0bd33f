"""train.py: the three stages of CuMo, from pre-trained backbones to a model that answers questions about pictures.

    python train.py                                     the embedded default: preset tiny, drawn data, CPU, minutes
    torchrun --nproc_per_node 2 train.py                the same with data parallelism (--fsdp: sharded)
    python train.py --stage 3 --init DIR --data FILE.json --images DIR      one stage on LLaVA's data format
    torchrun --nproc_per_node 8 train.py --preset cumo-mistral-7b --stage 1 --vision CLIP_DIR --llm MISTRAL_DIR --data ... --images ...
                                                        real models; stages 2 and 3 start from what the one before left

    stage 0   for who has no backbones: the tower learns from captions (contrastively), the decoder from text
    stage 1   pre-training: the connector alone learns to make image patches read like words
    stage 2   pre-finetuning: everything trains, still dense, on captions ("to warm up", CuMo section 3.3)
    stage 3   instruction tuning: FFNs of tower and connector are upcycled to experts, everything trains on questions

Each stage starts from the folder that the stage before it left. A run writes to --out: checkpoint.pt (--resume goes on from it),
stage1/, stage2/ and at last the model itself, log.jsonl, loss.png, routing.png.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

import data as d
import generate
from model import IGNORE, PAD, PRESETS, Config, CuMo, Decoder, MoE, TextConfig, count_parameters
from upcycle import assemble, load, load_backbones, save, save_backbones, upcycle, write_atomically

BACKBONES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny-backbones.safetensors")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun

# ---------------------------------------------------------------------------------------------------------------------
# 1. The recipe and the flags. A stage says what trains, on what, and how; flags override it

EVERYTHING = ("vision", "connector", "text")
RECIPE = {    # the paper's numbers (section 4.1 and the released scripts), for the 7B presets
    1: dict(trains=("connector",), kind="caption", template="plain", lr=1e-3, batch_size=256, max_length=2048, aux=False),
    2: dict(trains=EVERYTHING, kind="caption", template=None, lr=2e-6, batch_size=128, max_length=4096, aux=False),
    3: dict(trains=EVERYTHING, kind="chat", template=None, lr=4e-6, batch_size=256, max_length=4096, experts=True),
}
MIXTRAL = {3: dict(lr=2e-6)}      # where the released script of CuMo-Mixtral differs
TINY = {      # the same stages for a model four thousand times smaller, which wants larger steps
    "0a": dict(lr=1e-3, batch_size=64, steps=3000),
    "0b": dict(lr=2e-3, batch_size=64, steps=4500),
    1: dict(lr=2e-3, batch_size=64, steps=100, max_length=256),
    2: dict(lr=5e-4, batch_size=64, steps=120, max_length=256),
    3: dict(lr=5e-4, batch_size=64, steps=300, max_length=256),
}
OVERRIDES = {"tiny": TINY, "cumo-mixtral-8x7b": MIXTRAL}


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    preset: str = arg("tiny", "model sizes: " + ", ".join(PRESETS))
    stage: int | None = arg(None, "run this stage only (0 to 3); default: 1, 2 and 3")
    from_scratch: bool = arg(False, "begin with stage 0: make the tiny backbones again instead of taking the shipped ones")
    vision: str | None = arg(None, "stage 1 of a real model: CLIP folder or hub name, for the tower")
    llm: str | None = arg(None, "stage 1 of a real model: folder or hub name of the language model")
    init: str | None = arg(None, "model folder to start from, of any layout; default: what the stage before left in --out")
    out: str | None = arg(None, "folder for the model, checkpoints, log and pictures (default: out/PRESET)")
    resume: bool = arg(False, "go on from the checkpoint in --out, exactly")
    dense: bool = arg(False, "do not upcycle in stage 3: the comparison")
    n_experts: int = arg(4, "experts in each FFN of tower and connector from stage 3 on")
    top_k: int = arg(2, "experts that each token is sent to")
    balance_coef: float | None = arg(None, "weight of the load-balancing losses (CuMo: 0.1)")
    z_coef: float | None = arg(None, "weight of the router z-losses (CuMo: 0.01)")
    data: str | None = arg(None, "train on this LLaVA .json or .jsonl file instead of the drawn scenes")
    images: str = arg("", "folder that the paths in --data are relative to")
    template: str | None = arg(None, "chat template: " + ", ".join(d.TEMPLATES) + "; default: the stage's")
    strict: bool = arg(False, "stop at the first broken sample instead of replacing it (over 1%% broken stops in any case)")
    steps: int | None = arg(None, "optimizer steps; default: the stage's, or one epoch of --data")
    epochs: int = arg(1, "passes over --data, when --steps is not given")
    batch_size: int | None = arg(None, "samples per step, over all processes")
    micro_batch: int | None = arg(None, "samples per process in one forward pass; the rest of a batch is accumulated")
    max_length: int | None = arg(None, "longest sequence in tokens, image slots included")
    lr: float | None = arg(None, "peak learning rate, after a linear warm-up, before the cosine to zero")
    warmup: float = arg(0.03, "share of the steps that warms up")
    weight_decay: float = arg(0.0, "AdamW's")
    grad_clip: float = arg(1.0, "largest gradient norm")
    seed: int = arg(0, "of new weights, data order and drawn scenes")
    device: str | None = arg(None, "cuda or cpu; default: cuda where there is one")
    fsdp: bool = arg(False, "with torchrun: shard weights, gradients and optimizer over the processes (FSDP2) instead of DDP")
    checkpointing: bool = arg(False, "activation checkpointing: less memory, a third more arithmetic")
    matmul: str = arg("highest", "float32 matrix products: highest, or medium: in bfloat16 where the CPU can (AMX), a third faster")
    compile: bool | None = arg(None, "torch.compile the blocks; default: on CUDA (on a CPU a short run ends before it pays)")
    workers: int = arg(0, "processes that load data; 0 loads between the steps")
    save_every: int = arg(200, "steps between checkpoints")
    eval_questions: int = arg(1200, "held-out questions after the last stage (a quarter of them after the others)")


def parse(argv=None) -> Args:
    """Flags from the dataclass: one for each field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Args):
        flag, text, kind = "--" + f.name.replace("_", "-"), f.metadata["help"], f.type
        if f.default is not None and kind is not bool:
            text += f" (default: {f.default})" if f.default != "" else ""
        if kind in (bool, bool | None):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction if f.default is None else "store_true", help=text)
        else:
            parser.add_argument(flag, type=next(t for t in (int, float, str) if t is kind or (t | None) == kind), default=f.default,
                                help=text)
    args = Args(**vars(parser.parse_args(argv)))
    for name in ("steps", "batch_size", "micro_batch", "max_length", "epochs", "save_every", "eval_questions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {getattr(args, name)} must be at least 1")
    if args.matmul not in ("highest", "high", "medium"):
        raise ValueError(f"--matmul {args.matmul}: known are highest, high and medium")
    if args.stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"--stage {args.stage}: the stages are 0, 1, 2 and 3")
    if not 1 <= args.top_k <= args.n_experts:                                      # now, not when stage 3 begins
        raise ValueError(f"top_k = {args.top_k} of {args.n_experts} experts; need 1 <= --top-k <= --n-experts")
    if args.device not in (None, "cuda", "cpu"):
        raise ValueError(f"--device {args.device}: cuda or cpu")
    if bool(args.vision) != bool(args.llm) or (args.vision and (args.init or args.stage not in (None, 1))):
        raise ValueError("--vision DIR and --llm DIR go together, start stage 1, and leave no room for --init")
    args.out = os.path.normpath(args.out or f"out/{args.preset}")                   # "out/tiny/" must not become "out/tiny/.1"
    return args


def settings(args: Args, stage) -> dict:
    """A stage's numbers: the recipe's, the preset's over them, the flags over both."""
    s = {**RECIPE.get(stage, {}), **OVERRIDES.get(args.preset, {}).get(stage, {})}
    for name in ("steps", "batch_size", "max_length", "lr", "template"):
        if getattr(args, name) is not None:
            s[name] = getattr(args, name)
    s["experts"] = s.get("experts", False) and not args.dense
    share = s["batch_size"] // WORLD                                               # samples per process and step
    s["micro_batch"] = min(args.micro_batch or (share if args.preset == "tiny" else 4), max(1, share))
    return s


# ---------------------------------------------------------------------------------------------------------------------
# 2. One loop for every stage


def say(*words):
    if RANK == 0:
        tqdm.write(" ".join(str(w) for w in words), file=sys.stdout)
        sys.stdout.flush()


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    n_warm = max(1, round(steps * warmup))
    if step < n_warm:
        return peak * (step + 1) / n_warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, steps - n_warm)))


def choose_trainable(model: CuMo, trains):
    """requires_grad for the named parts, less the weights that no loss reaches (DDP insists on a gradient for everything else).

    With select_layer -2 the last vision layer does not touch the features. When it has experts, its router still counts in the
    auxiliary losses (as in the released code), but its experts' outputs go nowhere; when it is dense, it does not even run."""
    model.requires_grad_(False)
    for name in trains:
        getattr(model, name).requires_grad_(True)
    if model.vision is not None:
        n_used = model.config.vision.n_used_layers
        reached = [i for i, layer in enumerate(model.vision.layers) if i < n_used or isinstance(layer.ffn, MoE)]
        for i, layer in enumerate(model.vision.layers):
            if i > max(reached, default=-1):
                layer.requires_grad_(False)
            elif i >= n_used and i == max(reached):
                for name, p in layer.ffn.named_parameters():
                    p.requires_grad_(name == "router" and "vision" in trains)


def distribute(args: Args, model: nn.Module, device) -> nn.Module:
    """Compile, shard or replicate. FSDP2 shards every block for itself and the rest as one; compute is bf16 on CUDA."""
    if args.checkpointing and isinstance(model, CuMo):
        model.checkpointing()
    blocks = [b for m in model.modules() if isinstance(m, nn.ModuleList) for b in m]
    if args.compile if args.compile is not None else device.type == "cuda":
        for block in blocks:
            block.compile()
    if WORLD == 1:
        return model
    if args.fsdp:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" \
            else MixedPrecisionPolicy()
        for module in [*blocks, model]:
            fully_shard(module, mp_policy=policy)
        return model
    return DDP(model, device_ids=[device.index] if device.type == "cuda" else None)


def weigh(name: str, batch: dict, total: list, n_micro: int) -> float:
    """What a micro-batch's mean counts in the mean over the whole global batch.

    A language loss is a mean over label tokens, a vision loss over images (blank ones too), and micro-batches differ in both. Averaging means of
    means, as many trainers do, would make the loss depend on how a batch is cut; these weights make it independent of it."""
    if name == "lm":
        return batch["n_labels"] / max(1, total[0])
    if name.startswith(("vision/", "connector/")):
        return batch["n_images"] / max(1, total[1])
    return 1 / (n_micro * WORLD)


def train(args: Args, stage, s: dict, model: nn.Module, loader_from, device, save_result):
    """Optimize s["steps"] steps of model(**inputs) -> an object with .parts, whose weighted sum is the loss.

    loader_from(step) gives an endless iterator of micro-batches from that step on. Checkpoints, log, progress, Ctrl-C, NaN steps
    and broken samples are dealt with here, once, for all stages."""
    out, steps = args.out, s["steps"]
    n_micro = s["batch_size"] // (s["micro_batch"] * WORLD)
    wrapped = distribute(args, model, device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=s["lr"], weight_decay=args.weight_decay, fused=device.type == "cuda")
    config = getattr(model, "config", None)
    aux = s.get("aux", True)           # stages 1 and 2 do without, as released: a Mixtral's own routers are left alone until stage 3
    coef = lambda name: aux * config.balance_coef if name.endswith("/balance") else aux * config.z_coef if name.endswith("/z") else 1.0
    start, file, full = 0, os.path.join(out, "checkpoint.pt"), StateDictOptions(full_state_dict=True, cpu_offload=True)
    counts = {"skipped": 0, "broken": 0, "truncated": 0, "samples": 0}
    identity = {"stage": stage, **{k: s.get(k) for k in ("steps", "batch_size", "lr", "max_length", "template")},
                **{k: getattr(args, k) for k in ("preset", "vision", "llm", "init", "seed", "data", "dense", "n_experts", "top_k", "balance_coef", "z_coef",
                                                 "warmup", "weight_decay", "grad_clip", "matmul")}}      # what the numbers depend on
    if args.resume and os.path.exists(file):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["identity"]["stage"] == stage:
            if other := [f"{k} {saved['identity'].get(k)} (now {v})" for k, v in identity.items() if saved["identity"].get(k) != v]:
                raise ValueError(f"{file} was written with {', '.join(other)}: give the same flags")
            set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=full)
            start, counts = saved["step"], saved["counts"]
            say(f"stage {stage}: going on after step {start} of {steps}")
        del saved

    def checkpoint(step):
        weights, state = get_state_dict(model, optimizer, options=full)            # every rank takes part: FSDP gathers
        if RANK == 0:
            write_atomically(file, lambda name: torch.save(
                {"identity": identity, "step": step, "counts": counts, "model": weights, "optimizer": state}, name))
        if WORLD > 1:
            dist.barrier()

    log = Log(os.path.join(out, "log.jsonl"), stage, start) if RANK == 0 else None
    stopping = []
    handlers = {sig: signal.signal(sig, lambda number, _: stopping.append(number)) for sig in (signal.SIGINT, signal.SIGTERM)}
    batches, bad_in_a_row, last_saved = iter(loader_from(start)), 0, start
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    model.train()
    bar = tqdm(total=steps, initial=start, desc=f"stage {stage}", disable=RANK != 0, dynamic_ncols=True, mininterval=1)
    for step in range(start, steps):
        begin = time.perf_counter()
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)           # a resumed run draws the same noise (stage 0)
        lr = lr_at(step, steps, s["lr"], args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro = [next(batches) for _ in range(n_micro)]
        waited = time.perf_counter() - begin
        for b in micro:
            b["n_labels"], b["n_images"] = int((b["labels"][:, 1:] != IGNORE).sum()), len(b["images"])
            for message in b["broken"]:
                tqdm.write(f"broken sample replaced: {message}", file=sys.stdout)
        total = torch.tensor([sum(b["n_labels"] for b in micro), sum(b["n_images"] for b in micro), sum(len(b["broken"]) for b in micro),
                              sum(b["truncated"] for b in micro), len(stopping)], dtype=torch.float64, device=device)
        if WORLD > 1:
            dist.all_reduce(total)
        total = total.tolist()
        counts["broken"] += int(total[2])
        counts["truncated"] += int(total[3])
        counts["samples"] += s["batch_size"]
        if counts["broken"] > 0.01 * max(counts["samples"], 1000):                 # early on, ten are let through
            raise ValueError(f"{counts['broken']} of {counts['samples']} samples are broken, over 1%: mend the data (listed above)")

        sums = {}                                                                  # part -> its mean over the global batch
        for i, b in enumerate(micro):
            last = i == n_micro - 1                                                # gradients travel between ranks once a step
            if args.fsdp and WORLD > 1:
                wrapped.set_requires_gradient_sync(last)
            with nullcontext() if last or args.fsdp or WORLD == 1 else wrapped.no_sync(), autocast:
                inputs = {k: v.to(device, non_blocking=True) for k, v in b.items() if torch.is_tensor(v) and (k != "images" or len(v))}
                parts = wrapped(**inputs).parts
                share = {name: weigh(name, b, total, n_micro) for name in parts}
                loss = sum(coef(name) * share[name] * parts[name] for name in parts)
                (loss * WORLD).backward()                                          # DDP and FSDP average over ranks
            for name in parts:
                sums[name] = sums.get(name, 0) + share[name] * parts[name].detach()
        row = torch.stack([v.float() for v in sums.values()])
        if WORLD > 1:
            dist.all_reduce(row)
        row = dict(zip(sums, row.tolist()))
        row["loss"] = sum(coef(name) * v for name, v in row.items())
        norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(row["loss"]) and math.isfinite(norm):
            optimizer.step()
            bad_in_a_row = 0
        else:                                                                      # one bad batch must not poison the weights
            counts["skipped"] += 1
            bad_in_a_row += 1
            say(f"stage {stage}, step {step}: loss {row['loss']}, gradient norm {norm}: step skipped")
            if bad_in_a_row == 10:
                raise ValueError(f"10 steps in a row without a finite loss. The last good checkpoint is "
                                 f"{file + f', step {last_saved}' if os.path.exists(file) else 'none'}; try a smaller --lr")
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin
        row = {"stage": stage, "step": step, **{k: v for k, v in row.items() if v != 0 or k == "loss"}, "lr": lr, "grad_norm": norm,
               "images_per_s": total[1] / seconds, "seconds": seconds, "waiting": waited / seconds}
        if RANK == 0:
            log.write(row)
        bar.set_postfix_str(" ".join(f"{short(k)} {row[k]:.3g}" for k in row if k in ("loss", "lr", *sums))
                            + f" {row['images_per_s']:.0f} img/s", refresh=False)
        bar.update()
        stop = total[4] > 0 and step < steps - 1
        if stop or ((step + 1) % args.save_every == 0 and step < steps - 1):
            checkpoint(step + 1)
            last_saved = step + 1
        if stop:
            bar.close()
            say(f"stopped after step {step + 1} of {steps}; `--resume` with the same flags goes on from {file}")
            raise KeyboardInterrupt
    bar.close()
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    counts = {k: v for k, v in counts.items() if v and k != "samples"}
    say(f"stage {stage}: {steps} steps done" + (f" ({', '.join(f'{v} {k}' for k, v in counts.items())})" if counts else ""))
    save_result(get_model_state_dict(model, options=full))
    if RANK == 0 and os.path.exists(file):
        os.remove(file)                                                            # the stage's folder has taken its place
    if WORLD > 1:
        dist.barrier()
    if stopping or total[4] > 0:                                                   # Ctrl-C in the last step
        raise KeyboardInterrupt


def short(name: str) -> str:
    """connector/balance -> c/bal: the bar is narrow."""
    part, _, kind = name.partition("/")
    return f"{part[0]}/{kind[:3]}" if kind else part


class Log:
    """One JSON object a step. A resumed run drops the lines behind its checkpoint, so that each step stands there once."""

    def __init__(self, file: str, stage, start: int):
        keep = []
        if os.path.exists(file):
            with open(file) as f:
                for line in f:
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:                                   # the line that a kill cut short
                        continue
                    if row["stage"] != stage or row["step"] < start:
                        keep.append(line)
        def write(name):
            with open(name, "w") as f:
                f.writelines(keep)
        write_atomically(file, write)
        self.file = open(file, "a", buffering=1)

    def write(self, row: dict):
        self.file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Stage 0: backbones for the tiny preset. Real runs name CLIP and Mistral instead


def cell_phrases(scene: dict) -> list[str]:
    """What each of the nine cells shows, in words: "top left large red circle", "center empty", "bottom sign open"."""
    out = [f"{place} empty" for place in d.PLACES]
    for cell, size, color, shape in scene["objects"]:
        out[cell] = f"{d.PLACES[cell]} {size} {color} {shape}"
    if scene["sign"]:
        for cell in range(3 * scene["sign"][0], 3 * scene["sign"][0] + 3):
            out[cell] = f"{d.PLACES[cell]} sign {scene['sign'][1]}"
    return out


def patch_cells(side: int) -> torch.Tensor:
    """(side * side,) the cell of the 3 x 3 grid in which each patch's centre lies."""
    third = torch.arange(side) * 3 // side
    return (3 * third.unsqueeze(1) + third).flatten()


@functools.cache                                                                   # a few hundred phrases, asked for all the time
def ids_of(phrase: str, tokenizer) -> list[int]:
    return tokenizer.encode(" " + phrase).ids


class Contrastive(nn.Module):
    """Stage 0a. CLIP's loss, for whole images and for regions.

    CLIP pulls an image and its caption together and pushes the other captions of the batch away. That alone teaches what is in an
    image but not where; so each patch is also matched with the words for its own cell of the grid (as RegionCLIP does, arXiv
    2112.09106), on the features that the connector will see. The text encoder is CLIP's: causal, read off at the last token."""

    def __init__(self, vision, vocab_size: int, dim: int = 128):
        super().__init__()
        self.vision, width = vision, vision.config.dim
        config = Config(vision=None, text=TextConfig(vocab_size=vocab_size, dim=dim, n_layers=2, n_heads=4, n_kv_heads=4,
                                                     ffn_dim=3 * dim, rope_theta=1e4))
        self.text = CuMo(config).text
        self.text.head = nn.Linear(dim, dim, bias=False)                           # an embedding instead of logits
        self.image_head, self.patch_head = nn.Linear(width, dim, bias=False), nn.Linear(width, dim, bias=False)
        self.scale = nn.Parameter(torch.full((2,), 2.3))                           # log of CLIP's logit scale

    def encode_text(self, tokens):
        """(P, T) right-padded -> (P, dim) of length 1."""
        real = tokens != PAD
        x = self.text(self.text.embed(tokens.clamp(min=0)), real)
        return F.normalize(x[torch.arange(len(x), device=x.device), real.sum(1) - 1].float(), dim=-1)

    def forward(self, tokens, labels, images, captions):
        """tokens (P, T) the batch's different phrases, labels (B, 1 + N) each patch's phrase (the first is unused), captions (B, T)."""
        last, selected = self.vision.encode(images, both=True)
        patches = F.normalize(self.patch_head(selected[:, 1:]).float(), dim=-1)    # (B, N, dim)
        whole = F.normalize(self.image_head(last[:, 0]).float(), dim=-1)           # (B, dim)
        scale = self.scale.clamp(max=4.6).exp()                                    # at most 100, as CLIP
        regions = F.cross_entropy((patches @ self.encode_text(tokens).T * scale[0]).flatten(0, 1), labels[:, 1:].flatten())
        pairs, diagonal = whole @ self.encode_text(captions).T * scale[1], torch.arange(len(whole), device=whole.device)
        clip = (F.cross_entropy(pairs, diagonal) + F.cross_entropy(pairs.T, diagonal)) / 2
        return Parts({"regions": regions, "clip": 0.3 * clip})


@dataclass
class Parts:
    parts: dict


class Regions(torch.utils.data.Dataset):
    """Scenes for stage 0a, and how a list of them becomes a batch."""

    def __init__(self, size, seed, tokenizer, config):
        self.scenes, self.tokenizer, self.size = d.Drawn("caption", size, seed), tokenizer, config.vision.image_size
        self.cells = patch_cells(config.vision.image_size // config.vision.patch_size)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return self.scenes[i]

    def collate(self, samples):
        phrases = [cell_phrases(s["scene"]) for s in samples]
        index = {p: i for i, p in enumerate(sorted({p for ps in phrases for p in ps}))}
        labels = torch.tensor([[index[p] for p in ps] for ps in phrases])[:, self.cells]      # (B, N)
        end = [self.tokenizer.token_to_id("</s>")]
        return {"tokens": d.pad_rows([ids_of(p, self.tokenizer) + end for p in index], PAD),
                "labels": F.pad(labels, (1, 0), value=IGNORE), "images": torch.stack([d.load_image(s["images"][0], self.size) for s in samples]),
                "captions": d.pad_rows([self.tokenizer.encode(" " + d.describe(s["scene"])).ids + end for s in samples], PAD),
                "broken": [], "truncated": 0}


class TextOnly(nn.Module):
    """Stage 0b. The decoder learns language, and the questions, from descriptions in place of images.

    One in ten descriptions is spelled out, phrases in any order. The others come in the layout of an image: one slot a
    patch, holding the sum of the embeddings of its cell's words, with noise. Both are text; the second has the decoder look things
    up by place among slots that hold many words at once, which is what patches are once the connector makes them read like words."""

    def __init__(self, model: CuMo):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, tokens, labels, bags):
        """bags (n, N, W) word ids of each slot, padded with PAD."""
        words = self.model.text.embed(bags.clamp(min=0)) * (bags != PAD).unsqueeze(-1)        # (n, N, W, D)
        slots = words.sum(2)
        if self.training:
            slots = slots + torch.randn_like(slots) * slots.detach().std() * 0.1
        return self.model(tokens, labels=labels, image_embeds=slots)


class Described(torch.utils.data.Dataset):
    """Scenes in words for stage 0b: captions and questions."""

    def __init__(self, size, seed, tokenizer, config):
        self.size, self.seed, self.tokenizer, self.n = size, seed, tokenizer, config.n_image_tokens
        self.cells = patch_cells(config.vision.image_size // config.vision.patch_size)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        seed = self.seed * 100_000_007 + i
        scene, rng = d.make_scene(seed), random.Random(seed + 1)
        merged, kind = rng.random() < 0.9, rng.choices(("questions", "caption", "plain"), (18, 1, 1))[0]
        spoken = [p + "." for p in d.phrases(scene).values()]
        head = "<image>\n" if merged else " ".join(rng.sample(spoken, len(spoken))) + "\n"
        pairs = [("Describe the scene.", d.describe(scene))] if kind != "questions" else \
            [(q, a) for _, q, a in d.ask_many(scene, 8, rng)]
        ids, labels = d.encode_chat(d.as_turns(pairs, head), self.tokenizer, "plain" if kind == "plain" and merged else "tiny", self.n)
        if not merged:
            return ids, labels, None
        phrases = cell_phrases(scene)
        return ids, labels, [ids_of(phrases[c], self.tokenizer) for c in self.cells]

    def collate(self, samples):
        bags = [slot for _, _, slots in samples if slots for slot in slots] or [[PAD]] * self.n
        n = sum(slots is not None for _, _, slots in samples)
        return {"tokens": d.pad_rows([ids for ids, _, _ in samples], PAD), "labels": d.pad_rows([l for _, l, _ in samples], IGNORE),
                "bags": d.pad_rows(bags, PAD, 1).view(-1, self.n, max(len(b) for b in bags))[:n], "images": [],
                "broken": [], "truncated": 0}


def place(args: Args, stage) -> str:
    """The file or folder that a finished stage leaves."""
    return os.path.join(args.out, {"0a": "tower.safetensors", "0b": "backbones.safetensors", 1: "stage1", 2: "stage2", 3: ""}[stage])


def loader(dataset, s: dict, args: Args, collate, lengths=None):
    """-> loader_from(step), as `train` wants it."""
    def start_from(step):
        batches = d.Batches(len(dataset), s["batch_size"], s["micro_batch"], args.seed, step, RANK, WORLD, lengths)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                          persistent_workers=args.workers > 0, pin_memory=torch.cuda.is_available())
    return start_from


def pretrain(args: Args, part: str, device):
    """Stage "0a" makes --out/tower.safetensors, stage "0b" teaches the decoder and makes --out/backbones.safetensors."""
    file, s = place(args, part), settings(args, part)
    torch.manual_seed(args.seed)
    if part == "0b":
        model, tokenizer = load_backbones(place(args, "0a"))
    else:
        config = Config.from_preset(args.preset)
        def texts():                                                               # what the tiny template will be asked to spell
            for i in range(4000):
                scene = d.make_scene(i)
                pairs = [("Describe the scene.", d.describe(scene))] + [qa[1:] for qa in d.ask_many(scene, 6, random.Random(i))]
                yield "".join(text for text, _ in d.render(d.as_turns(pairs), "tiny")) + d.describe(scene)
        tokenizer = d.train_tokenizer(texts(), config.text.vocab_size)
        model = CuMo(config)
    n_scenes = s["steps"] * s["batch_size"]                                        # every scene once
    if part == "0a":
        choose_trainable(model, ("vision",))
        model.vision.requires_grad_(True)                                          # the contrastive loss reaches the last layer too
        data, trained = Regions(n_scenes, args.seed + 11, tokenizer, model.config), Contrastive(model.vision, model.config.text.vocab_size)
    else:
        choose_trainable(model, ("text",))
        data, trained = Described(n_scenes, args.seed + 12, tokenizer, model.config), TextOnly(model)
    say(f"stage {part}: {'tower, contrastively, on captions' if part == '0a' else 'decoder, on text'}; {s['steps']} steps of {s['batch_size']}")

    def done(_):
        if RANK == 0:
            save_backbones(model, file, tokenizer)
            if part == "0b":
                generate.print_table(generate.evaluate(model, tokenizer, args.eval_questions, in_words=True),
                                     "the decoder alone, on held-out scenes in words")
    train(args, part, s, trained, loader(data, s, args, data.collate), device, done)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Stages 1 to 3


def run_stage(args: Args, stage: int, source: str, device):
    """Train one stage from a model folder (or a backbones file, or the folders of --vision and --llm) and leave a model folder; measure
    it on held-out scenes."""
    s, began = settings(args, stage), time.time()
    torch.manual_seed(args.seed)                                                   # the same new weights on every rank
    if args.vision and stage == 1:
        preset, source = Config.from_preset(args.preset), f"{args.vision} and {args.llm}"
        model, tokenizer = assemble(args.vision, args.llm, scales=preset.vision.scales, template=preset.template, seed=args.seed)
    else:
        model, tokenizer = load_backbones(source) if source.endswith(".safetensors") else load(source)
    if tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer.json, which training needs; copy it there (where there is only a tokenizer.model, "
                         "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it)")
    if getattr(model, "vision", None) is None:
        raise ValueError(f"{source}: a language model alone, without the vision tower and connector that training needs")
    model = model.float()                                                          # master weights
    c = model.config
    for name in ("balance_coef", "z_coef"):
        if getattr(args, name) is not None:
            setattr(c, name, getattr(args, name))
    if s["experts"] and c.vision and not any(c.vision.n_experts):
        upcycle(model, vision=args.n_experts, connector=args.n_experts, top_k=args.top_k, seed=args.seed)
        if not c.balance_coef and not c.z_coef and args.balance_coef is None and args.z_coef is None:
            c.balance_coef, c.z_coef = Config.balance_coef, Config.z_coef          # the released stage-2 folders say 0
    model.to(device)
    choose_trainable(model, s["trains"])
    template = s["template"] or c.template
    if args.template and args.template != "plain":
        c.template = args.template                                                 # the model is asked in the layout that it learnt
    if args.data:
        data = d.LlavaJson(args.data, args.images)
        lengths, s["steps"] = data.lengths(c.n_image_tokens), s.get("steps") if args.steps else max(1, args.epochs * len(data) // s["batch_size"])
    elif "steps" not in s:
        raise ValueError(f"{args.preset} on drawn scenes needs --steps; or give your own with --data")
    else:                                                                          # every drawn scene is seen once
        data, lengths = d.Drawn(s["kind"], s["steps"] * s["batch_size"], args.seed + stage), None
    encoded = d.Encoded(data, tokenizer, template, c.vision.image_size, c.n_image_tokens, s["max_length"], args.strict)
    counts = count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"stage {stage}: {s['steps']} steps of {s['batch_size']} from {source}; training {', '.join(s['trains'])} ({trained / 1e6:.2f}M of "
        f"{sum(t for t, _ in counts.values()) / 1e6:.2f}M parameters, {sum(a for _, a in counts.values()) / 1e6:.2f}M activated)")

    def done(state):
        if RANK > 0:
            return
        save(model, place(args, stage), tokenizer, state)
        if not args.data:                                                          # what is measured is what lies on the disk
            n = args.eval_questions if stage == 3 else max(1, args.eval_questions // 4)
            scores = generate.evaluate(*load(place(args, stage), device), n)
            generate.print_table(scores, f"after stage {stage}: {n} questions about held-out scenes, exact match")
            with open(os.path.join(args.out, "scores.jsonl"), "a") as f:
                f.write(json.dumps({"stage": stage, "seed": args.seed, "dense": args.dense, "scores": scores,
                                    "seconds": time.time() - began}) + "\n")
    train(args, stage, s, model, loader(encoded, s, args, d.collate, lengths), device, done)


def draw_curves(log_file: str, png: str):
    """The language loss of each stage (grey: every step; blue: running mean), side by side."""
    rows = {}
    with open(log_file) as f:
        for line in f:
            row = json.loads(line)
            rows.setdefault(str(row["stage"]), []).append(row.get("lm", row["loss"]))
    width, height, left, top = 330, 240, 46, 34
    img = d.Image.new("RGB", (width * len(rows), height), "white")
    draw = d.ImageDraw.Draw(img)
    for panel, (stage, losses) in enumerate(rows.items()):
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 12, top, height - 30
        losses = [l if math.isfinite(l) else 0. for l in losses]
        high = max(losses[len(losses) // 50:] or losses) * 1.05 or 1.
        at = lambda i, v: (x0 + (x1 - x0) * i / max(1, len(losses) - 1), y1 - (y1 - y0) * min(v, high) / high)
        mean, smooth = 0., []
        for i, v in enumerate(losses, 1):
            mean = 0.9 * mean + 0.1 * v
            smooth.append(mean / (1 - 0.9**i))                                    # as Adam corrects its mean
        for k in range(5):                                                         # grid, and the axis' numbers
            y = at(0, high * k / 4)[1]
            draw.line((x0, y, x1, y), "#dddddd")
            draw.text((x0 - 6, y), f"{high * k / 4:.2g}", "black", anchor="rm")
        draw.line([at(i, v) for i, v in enumerate(losses)], "#bbbbbb")
        draw.line([at(i, v) for i, v in enumerate(smooth)], "#1f5fbf", width=2)
        draw.text(((x0 + x1) / 2, 16), f"stage {stage}: loss, at the end {smooth[-1]:.3f}", "black", anchor="mm")
        draw.text(((x0 + x1) / 2, height - 14), f"{len(losses)} steps", "black", anchor="mm")
    write_atomically(png, lambda name: img.save(name, "PNG"))


def main(argv=None):
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; leave the flag out for the CPU")
    torch.set_float32_matmul_precision(args.matmul)
    if args.matmul == "medium":                                                    # the CPU's flash kernel multiplies small blocks,
        torch.backends.cuda.enable_flash_sdp(False)                                # for which AMX is slow (the switch is the CPU's too)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    Config.from_preset(args.preset)                                                # an unknown name stops here
    stages = [args.stage] if args.stage is not None else [0, 1, 2, 3] if args.from_scratch else [1, 2, 3]
    if stages[0] == 0:
        stages = ["0a", "0b", *stages[1:]]
    if "0a" in stages and args.preset != "tiny":
        raise ValueError(f"stage 0 makes the tiny preset's backbones; {args.preset} starts from real weights: --vision DIR --llm DIR")
    if "0a" in stages and args.fsdp:
        raise ValueError("stage 0 makes backbones too small to shard: leave --fsdp out")
    began, first, file = time.time(), stages[0], os.path.join(args.out, "checkpoint.pt")
    finished = [s for s in stages if os.path.exists(os.path.join(place(args, s), "config.json")) or os.path.isfile(place(args, s))]
    if args.resume:                                                                # skip what is finished
        running = torch.load(file, weights_only=True, mmap=True)["identity"]["stage"] if os.path.exists(file) else None
        if running is not None and running not in stages:
            raise ValueError(f"{file} belongs to stage {running}: give the flags that this run began with")
        first = running or next((s for s in stages if s not in finished), None)
        if first is None:
            raise ValueError(f"nothing to resume: {args.out} holds a finished run")
    elif args.stage is not None and (finished or os.path.exists(file)):            # never write over a trained model
        raise ValueError(f"{args.out} holds {'this stage' if finished else 'an unfinished run'} already: --resume, or another --out")
    elif args.stage is None and RANK == 0 and os.path.exists(args.out):
        n = next(n for n in range(1, 10**6) if not os.path.exists(f"{args.out}.{n}"))
        os.rename(args.out, f"{args.out}.{n}")
        say(f"{args.out} holds an earlier run: it is now {args.out}.{n}")
    if WORLD > 1:
        dist.barrier()
    os.makedirs(args.out, exist_ok=True)
    say(f"nanoCuMo {args.preset} on {WORLD} x {device.type} ({torch.get_num_threads()} threads), torch {torch.__version__}, "
        f"stages {', '.join(map(str, stages))} -> {args.out}")
    for i, stage in enumerate(stages):
        if stages.index(first) > i:
            say(f"stage {stage}: done before")
            continue
        if stage in ("0a", "0b"):
            pretrain(args, stage, device)
        else:
            if args.preset != "tiny" and stage == 1 and not (args.init or args.vision):
                raise ValueError(f"{args.preset} starts from pre-trained weights: give --vision CLIP_DIR and --llm LLM_DIR, or --init")
            before = BACKBONES if stage == 1 and i == 0 else place(args, stages[i - 1] if i else stage - 1)
            run_stage(args, stage, args.init if args.init and i == 0 else before, device)
    if RANK == 0:
        draw_curves(os.path.join(args.out, "log.jsonl"), os.path.join(args.out, "loss.png"))
        if stages[-1] == 3 and not args.dense and not args.data:
            model, _ = load(args.out)
            scenes = [s["images"][0] for s in d.Drawn("caption", 256, args.seed, held_out=True)]
            generate.draw_routing(model, scenes[:3], os.path.join(args.out, "routing.png"), population=scenes)
        last = os.path.normpath(place(args, stages[-1]))
        say(f"done in {(time.time() - began) / 60:.1f} minutes. {args.out} holds what was trained, log.jsonl and pictures." + (
            "" if stages[-1] == "0b" else f" Try:\n  python generate.py --model {last} --image X.png --prompt \"What color is the circle?\""))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:                                             # one line; a loading process wraps its traceback around it
        sys.exit(f"train.py: {str(e).rsplit('ValueError: ', 1)[-1].strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
