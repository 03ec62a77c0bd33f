"""train.py: CuMo's three stages, from pre-trained backbones to a model that answers questions about pictures; MoE-LLaVA's; Uni-MoE's.

    python train.py                                     the embedded default: preset tiny, drawn data, CPU, minutes
    torchrun --nproc_per_node 2 train.py                the same with data parallelism (--fsdp: sharded; --expert-parallel 2: experts are)
    python train.py --stage 3 --init DIR --data FILE.json --images DIR      one stage on LLaVA's data format
    torchrun --nproc_per_node 8 train.py --preset cumo-mistral-7b --stage 1 --vision CLIP_DIR --llm MISTRAL_DIR --data ... --images ...
                                                        real models; stages 2 and 3 start from what the one before left
    python train.py --preset cumo-mistral-7b --stage 3 --gpus 8 --fsdp --checkpointing --plan    what it would cost

    stage 1   pre-training: the connector alone learns to make image patches read like words
    stage 2   pre-finetuning: everything trains, still dense, on captions ("to warm up", CuMo section 3.3)
    stage 3   instruction tuning: FFNs of tower and connector are upcycled to experts, everything trains on questions

That is CuMo's recipe. --recipe moe-llava has its experts in the decoder; --recipe uni-moe also hears, and trains its experts apart:

    stage 1   connector and resampler learn from captions of scenes and of sounds
    stage 2   one set of decoder FFNs for images, one for sounds, one for both, each apart, by LoRA
    stage 3   these become the experts of one decoder, and routers, connectors and adapters train on all senses

Each stage starts from the folder that the stage before it left. A run writes to --out: checkpoint.pt, or with --fsdp checkpoint/,
which --resume goes on from (on any number of processes), stage1/, stage2/ and at last the model itself, log.jsonl, loss.png, routing.png.
`torchrun --max-restarts 3 ... train.py ...` goes on by itself after a process died.
"""
import argparse
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry, shape_wrapper
from tqdm import tqdm

import data as d
import generate
from model import (IGNORE, PRESETS, Config, Connector, CuMo, MoE, add_lora, choose_trainable, count_parameters, merge_state,
                   plain_name)
from upcycle import assemble, copy_into_shard, expert_counts, load, load_backbones, read_json, save, upcycle, write_atomically, write_json

DRAWN = "tiny", "uni-moe-tiny"                                                           # presets of the drawn world; backbones are shipped
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
BACKBONES, HEARING = (os.path.join(ASSETS, f"{preset}-backbones.safetensors") for preset in DRAWN)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)                         # gathered, on rank 0
# A checkpoint holds what trains (of a run with LoRA, the adapters); the rest is in the folder that the stage started from
TRAINED, SHARDS = (StateDictOptions(full_state_dict=full, cpu_offload=full, ignore_frozen_params=True, strict=False)
                   for full in (True, False))

# ---------------------------------------------------------------------------------------------------------------------
# 1. The recipe and the flags. A stage says what trains, on what, and how; flags override it

EVERYTHING = ("vision", "connector", "text")
RECIPE = {    # the paper's numbers (section 4.1 and the released scripts), for the 7B presets
    1: dict(trains=("connector",), kind="caption", template="plain", lr=1e-3, batch_size=256, max_length=2048, aux=False),
    2: dict(trains=EVERYTHING, kind="caption", template=None, lr=2e-6, batch_size=128, max_length=4096, aux=False),
    3: dict(trains=EVERYTHING, kind="chat", template=None, lr=4e-6, batch_size=256, max_length=4096),
}
MOE_LLAVA = {    # the connector, then dense LLaVA on instructions, then "MoE-tuning" of the decoder's FFNs (section 3.3 there; the released
    1: dict(RECIPE[1]),                        # scripts tune all decoder layers' FFNs and the connector, the paper the MoE layers)
    2: dict(trains=("connector", "text"), kind="chat", template=None, lr=2e-5, batch_size=128, max_length=2048),
    3: dict(trains=("connector", "text.ffn"), kind="chat", template=None, lr=2e-5, batch_size=128, max_length=2048),
}
UNI_MOE = {      # the connectors, then one set of FFNs a sense, apart, then these as experts of one decoder (arXiv 2405.11273, section 3.3)
    1: dict(RECIPE[1], trains=("connector", "resampler"), kind="mixed caption", lr=2e-5, batch_size=32),
    2: dict(trains=(), lora=(64, 16, "ffn"), kind="chat", template=None, lr=4e-5, batch_size=16, max_length=2048, aux=False),
    3: dict(trains=("connector", "resampler", "text.router"), lora=(8, 16, "all"), kind="mixed chat", template=None, lr=4e-5, batch_size=16,
            max_length=2048),
}
SENSES = {"2 image": "chat", "2 sound": "sound chat", "2 both": "both chat"}       # stage 2 of the drawn default: its experts' questions
FILES = {1: "stage1", 2: "stage2", **{stage: stage.replace("2 ", "stage2-") for stage in SENSES}, 3: ""}      # what a stage leaves in --out
RECIPES = {"cumo": RECIPE, "moe-llava": MOE_LLAVA, "uni-moe": UNI_MOE}
MIXTRAL = {3: dict(lr=2e-6)}      # where the released script of CuMo-Mixtral differs
TINY = {      # the same stages for a model four thousand times smaller, which wants larger steps
    1: dict(lr=2e-3, batch_size=64, steps=100, max_length=256),
    2: dict(lr=5e-4, batch_size=64, steps=120, max_length=256),
    3: dict(lr=5e-4, batch_size=64, steps=300, max_length=256),
}
OVERRIDES = {("cumo", "tiny"): TINY, ("cumo", "cumo-mixtral-8x7b"): MIXTRAL,
             ("moe-llava", "tiny"): {1: TINY[1], 2: TINY[3], 3: dict(lr=3e-4, batch_size=64, steps=200, max_length=256)},
             ("uni-moe", "uni-moe-tiny"): {1: dict(lr=2e-3, batch_size=64, steps=200, max_length=352),
                                           2: dict(lr=2e-3, batch_size=64, steps=200, max_length=352),
                                           3: dict(lr=1e-3, batch_size=64, steps=300, max_length=352)}}
PARTS = ("vision", "connector", "audio", "resampler", "text", "text.ffn", "text.moe", "text.router")


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Args:
    preset: str = arg("tiny", "model sizes: " + ", ".join(PRESETS))
    recipe: str | None = arg(None, "cumo: experts in tower and connector; moe-llava: in the decoder; uni-moe: in the decoder, trained apart, "
                             "for images and sounds; default: the preset's")
    stage: int | None = arg(None, "run this stage only (1 to 3); default: 1, 2 and 3")
    vision: str | None = arg(None, "stage 1 of a real model: CLIP folder or hub name, for the tower")
    llm: str | None = arg(None, "stage 1 of a real model: folder or hub name of the language model")
    audio: str | None = arg(None, "uni-moe's stage 1: folder or hub name of Whisper, for hearing")
    init: str | None = arg(None, "model folder to start from, of any layout; default: what the stage before left in --out")
    out: str | None = arg(None, "folder for the model, checkpoints, log and pictures (default: out/PRESET)")
    resume: bool = arg(False, "go on from the checkpoint in --out, exactly. Yours only: FSDP's is read with pickle, which can run code")
    dense: bool = arg(False, "do not upcycle in stage 3: the comparison")
    upcycle_at: int = arg(3, "the stage that turns FFNs into experts")
    trains: str | None = arg(None, "parts that train, with commas: " + ", ".join(PARTS) + " (the decoder's FFNs; its MoE layers; its "
                             "routers), or none (but adapters); of a run of all stages, in those with experts; default: the stage's")
    n_experts: str = arg("4", "experts in each FFN that is upcycled; in the decoder also one number for each of --moe-layers: 4,2,4")
    top_k: int = arg(2, "experts that each token is sent to")
    moe_layers: str | None = arg(None, "decoder layers that get experts: every_other (moe-llava's), all (uni-moe's), first_half, "
                                 "second_half, or 0,3,5")
    experts: str | None = arg(None, "uni-moe's stage 3: model folders with commas; each one's FFNs become one expert. A single one is "
                              "copied. Default: the drawn stages' four")
    average: bool = arg(False, "uni-moe's stage 3: what is not FFN from the mean of --experts, not from the first")
    lora_rank: int | None = arg(None, "train adapters of this rank on the decoder instead of the weights themselves, and merge them at the "
                                "end; 0: none; default: the stage's (uni-moe: 64, then 8)")
    lora_alpha: float | None = arg(None, "they count alpha / rank (default: 16)")
    frames_apart: bool = arg(False, "a video's frames as so many images, instead of one with their mean features")
    capacity_factor: float | None = arg(1.5, "moe-llava: expert slots in training, over an even share of the choices; 0: drop nothing")
    eval_capacity_factor: float | None = arg(2.0, "moe-llava: the same outside training")
    noisy_gate: bool = arg(False, "moe-llava: choose the second expert with Gumbel noise while training, as DeepSpeed does")
    balance_coef: float | None = arg(None, "weight of the load-balancing losses (CuMo: 0.1, MoE-LLaVA: 0.01)")
    z_coef: float | None = arg(None, "weight of the router z-losses (CuMo: 0.01, MoE-LLaVA: 0)")
    data: str | None = arg(None, "train on this LLaVA .json or .jsonl file instead of the drawn scenes")
    images: str = arg("", "folder that the paths in --data (sounds and videos too) are relative to")
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
    expert_parallel: int = arg(1, "with torchrun: deal the experts out to groups of so many processes; tokens travel to them")
    checkpointing: bool = arg(False, "activation checkpointing: less memory, a third more arithmetic")
    matmul: str = arg("highest", "float32 matrix products: highest, or medium: in bfloat16 where the CPU can (AMX), a third faster")
    compile: bool | None = arg(None, "torch.compile the blocks; default: on CUDA (on a CPU a short run ends before it pays)")
    workers: int = arg(0, "processes that load data; 0 loads between the steps")
    save_every: int = arg(200, "steps between checkpoints")
    plan: bool = arg(False, "build nothing: print parameters, arithmetic, memory on each GPU and GPU-hours of --stage (or of all)")
    gpus: int = arg(1, "of --plan: that many, each with --gpu-gb of memory (with --fsdp, --checkpointing or without, as given)")
    gpu_gb: int = arg(80, "of --plan: memory of a GPU")
    peak_tflops: float = arg(989., "of --plan: what a GPU could do (an H100's dense bfloat16)")
    mfu: float = arg(0.4, "of --plan: the share of it that training reaches")
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
    for name in ("steps", "batch_size", "micro_batch", "max_length", "epochs", "save_every", "eval_questions", "expert_parallel",
                 "gpus", "gpu_gb"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {getattr(args, name)} must be at least 1")
    if args.expert_parallel > 1 and args.fsdp:
        raise ValueError("--expert-parallel and --fsdp are two ways to shard the same weights: give one of them")
    if (world := args.gpus if args.plan else WORLD) % args.expert_parallel:
        raise ValueError(f"--expert-parallel {args.expert_parallel}: {world} process(es) cannot form groups of {args.expert_parallel}")
    try:
        numbers = [int(n) for n in args.n_experts.split(",")]
    except ValueError:
        raise ValueError(f"--n-experts {args.n_experts}: a number, or several with commas") from None
    if args.stage is None and not args.dense and any(n % args.expert_parallel for n in numbers):     # others' are known when loaded
        raise ValueError(f"--n-experts {args.n_experts} is not a multiple of --expert-parallel {args.expert_parallel}")
    if args.matmul not in ("highest", "high", "medium"):
        raise ValueError(f"--matmul {args.matmul}: known are highest, high and medium")
    if args.stage not in (None, 1, 2, 3):
        raise ValueError(f"--stage {args.stage}: the stages are 1, 2 and 3 (backbones for tiny presets: python assets/backbones.py)")
    if not 1 <= args.top_k <= min(numbers):                                        # now, not when stage 3 begins
        raise ValueError(f"top_k = {args.top_k} of {args.n_experts} experts; need 1 <= --top-k <= --n-experts")
    args.recipe = args.recipe or next((name for name in RECIPES if args.preset.startswith(name)), "cumo")
    if args.recipe not in RECIPES:
        raise ValueError(f"--recipe {args.recipe}: known are {', '.join(RECIPES)}")
    if args.recipe == "uni-moe" and args.preset == "tiny":
        args.preset = "uni-moe-tiny"                                               # with an ear
    if args.recipe == "cumo" and len(numbers) > 1:
        raise ValueError(f"--n-experts {args.n_experts}: the tower's layers and the connector have one number")
    for name, value in (("experts", args.experts), ("average", args.average), ("audio", args.audio)):
        if value and args.recipe != "uni-moe":
            raise ValueError(f"--{name} belongs to --recipe uni-moe")
    if (args.lora_rank or 0) < 0 or (args.lora_alpha is not None and args.lora_alpha <= 0):
        raise ValueError(f"--lora-rank {args.lora_rank} must be at least 1 (0: no adapters), --lora-alpha {args.lora_alpha} above 0")
    for part in (args.trains or "").split(",") if args.trains is not None else ():
        if part not in PARTS and part != "none":
            raise ValueError(f"--trains {args.trains}: {part!r} is no part; known: {', '.join(PARTS)}")
    if args.upcycle_at not in (1, 2, 3):
        raise ValueError(f"--upcycle-at {args.upcycle_at}: the stages are 1, 2 and 3")
    for name in ("capacity_factor", "eval_capacity_factor"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0, or 0 to drop nothing")
    if args.device not in (None, "cuda", "cpu"):
        raise ValueError(f"--device {args.device}: cuda or cpu")
    if bool(args.vision) != bool(args.llm) or (args.vision and (args.init or args.stage not in (None, 1))):
        raise ValueError("--vision DIR and --llm DIR go together, start stage 1, and leave no room for --init")
    name = args.recipe if args.preset in DRAWN and args.recipe != "cumo" else args.preset
    args.out = os.path.normpath(args.out or f"out/{name}")                         # "out/tiny/" must not become "out/tiny/.1"
    return args


def number(stage) -> int:
    """Of 1 1, of "2 sound" 2."""
    return int(str(stage)[0])


def settings(args: Args, stage, world: int | None = None) -> dict:
    """A stage's numbers: the recipe's, the preset's over them, the flags over both."""
    n = number(stage)
    s = {**RECIPES[args.recipe][n], **OVERRIDES.get((args.recipe, args.preset), {}).get(n, {})}
    if stage in SENSES:
        s["kind"] = SENSES[stage]
    for name in ("steps", "batch_size", "max_length", "lr", "template"):
        if getattr(args, name) is not None:
            s[name] = getattr(args, name)
    s["experts"] = n >= (3 if args.recipe == "uni-moe" else args.upcycle_at) and not args.dense
    s["aux"] = s.get("aux", True) or s["experts"]
    if args.trains and (s["experts"] or args.stage is not None):                   # of all stages, those with experts
        s["trains"] = tuple(part for part in args.trains.split(",") if part != "none")
    rank, alpha, where = s.pop("lora", (0, 16, "all"))
    rank = args.lora_rank if args.lora_rank is not None and (rank or s["experts"] or args.stage is not None) else rank
    if rank:
        s["lora"] = [rank, args.lora_alpha or alpha, where]
    share = s["batch_size"] // (world or WORLD)                                               # samples per process and step
    s["micro_batch"] = min(args.micro_batch or (share if args.preset in DRAWN else 4), max(1, share))
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


def shard_experts(args: Args, model: nn.Module, device):
    """--expert-parallel n: keep 1 / n of each MoE's experts here; kernels.moe_parallel takes the tokens to them. All else stays
    data-parallel. -> {name: weight} of what was cut, and the ranks as a table: a row of n ranks shares the experts, each holds its part;
    down a column all hold the same ones."""
    n, experts = args.expert_parallel, {}
    if n == 1 or not any(isinstance(m, MoE) for m in model.modules()):
        return experts, None
    mesh = init_device_mesh(device.type, (WORLD // n, n), mesh_dim_names=("column", "row"))
    for path, m in model.named_modules():
        if isinstance(m, MoE):
            if len(m.router) % n:
                raise ValueError(f"{path}: {len(m.router)} experts cannot be dealt out evenly to --expert-parallel {n} processes")
            m.group = mesh.get_group("row")
            experts.update({f"{path}.{name}": p for name, p in m.named_parameters() if name != "router"})
    for p in experts.values():
        p.data = p.data.chunk(n)[mesh.get_local_rank("row")].clone()               # (E, ...) -> (E / n, ...); the whole is freed
    DDP._set_params_and_buffers_to_ignore_for_model(model, list(experts))          # they differ from rank to rank
    return experts, mesh


def show_whole(model: nn.Module, optimizer, experts: dict, mesh):
    """In state dicts a shard (E / n, ...) appears as a DTensor (E, ...), which knows of what it is a part. Who saves and loads them
    gathers and cuts DTensors anyway, for FSDP: so a checkpoint is a single process's, and resumes on any number of them."""
    whole = lambda t: DTensor.from_local(t, mesh, [Replicate(), Shard(0)], run_check=False) if t.dim() else t    # not AdamW's step count
    part = lambda t: t.to_local() if isinstance(t, DTensor) else t.chunk(mesh.shape[1])[mesh.get_local_rank("row")] if t.dim() else t

    def weights(change, state):
        # (to cut, only what is whole: what a checkpoint leaves out, as it does not train, torch puts in as this rank has it)
        state.update({name: change(state[name]) for name, p in experts.items()
                      if name in state and (change is whole or state[name].shape != p.shape)})

    def moments(change, state):                                                    # its keys are numbers or names, in the order of params
        keys, params = ([p for group in g for p in group["params"]] for g in (state["param_groups"], optimizer.param_groups))
        ours = {key for key, p in zip(keys, params) if any(p is e for e in experts.values())}
        state["state"] = {key: {k: change(t) for k, t in v.items()} if key in ours else v for key, v in state["state"].items()}
    model.register_state_dict_post_hook(lambda _, state, *__: weights(whole, state))
    model.register_load_state_dict_pre_hook(lambda _, state, *__: weights(part, state))
    optimizer.register_state_dict_post_hook(lambda _, state: moments(whole, state))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: moments(part, state))


def clip_gradients(params: list, experts: dict, mesh, limit: float) -> torch.Tensor:
    """Scale gradients down to a norm of at most `limit`, over all weights of the model -> the norm that it was."""
    if not experts:
        return torch.nn.utils.clip_grad_norm_(params, limit)
    cut, grads = set(experts.values()), {True: [], False: []}
    for p in params:
        grads[p in cut].append(p.grad)
    for g in grads[True]:                                                          # DDP's mean over ranks, where DDP does not look: each
        dist.all_reduce(g, group=mesh.get_group("column"))                         # rank has its row's tokens, the column has all
        g /= WORLD
    square = lambda some: torch.nn.utils.get_total_norm(some).square()
    total = square(grads[True]).to(params[0])
    dist.all_reduce(total, group=mesh.get_group("row"))                            # every expert once
    norm = (total + square(grads[False]).to(total)).sqrt()
    torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
    return norm


def even(p: nn.Parameter) -> Shard | None:
    """Where FSDP cuts a weight: its first dimension that all processes can share evenly. That is not always dimension 0, as it would be
    otherwise: of 4 experts (E, F, D), 8 processes would get one each, or nothing."""
    return next((Shard(i) for i, n in enumerate(p.shape) if n % WORLD == 0), None)


def distribute(args: Args, model: nn.Module, device, later=()) -> nn.Module:
    """Compile, shard or replicate. FSDP2 shards every block for itself and the rest as one; compute is bf16 on CUDA.

    With FSDP no process ever holds the whole model: it comes on meta but for new weights (routers, a connector), it is cut while it
    has no weights, and then `later`, streams of (name, expert, tensor), fills each process's shards, tensor by tensor."""
    if args.checkpointing and isinstance(model, CuMo):
        model.checkpointing()
    blocks = [b for m in model.modules() if type(m) is nn.ModuleList for b in m]     # (LoRA's parametrizations are such lists, too)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    if args.compile:
        # The second length (or number of images) that it meets makes torch.compile write a graph for all of them, so lengths need no
        # ladder to be padded to. But it gives up at 8 graphs of one function, and the stage before must not count
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in blocks:
            block.compile()
        for m in model.modules():
            if isinstance(m, Connector):
                m.compile(dynamic=True)                                            # there is one: better one graph for all lengths at once
            if isinstance(m, CuMo):
                m.lm_loss = torch.compile(m.lm_loss, dynamic=True)                 # without a float32 copy of (B, T, V)
    if WORLD == 1:
        return model
    if args.fsdp:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" \
            else MixedPrecisionPolicy()
        new = [(name, None, p.detach()) for name, p in model.named_parameters() if not p.is_meta]
        model.to("meta")
        for module in [*blocks, model]:
            fully_shard(module, mp_policy=policy, shard_placement_fn=even)
        model.to_empty(device=device)
        params = {plain_name(name) or name: p for name, p in model.named_parameters()}
        for name, *item in chain(new, *later):
            copy_into_shard(params[plain_name(name) or name], *item)
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


def checkpoints(out: str) -> list[str]:
    """checkpoint.pt, where every process holds the whole model; checkpoint/STEP/, to which FSDP's write their shards, gathering nothing."""
    file, folder = os.path.join(out, "checkpoint.pt"), os.path.join(out, "checkpoint")
    return [file] * os.path.exists(file) + [os.path.join(folder, step) for step in (os.listdir(folder) if os.path.isdir(folder) else [])]


def newest_checkpoint(out: str):
    """-> (path, its identity, step and counts), or (None, None). A folder is complete when it has its run.json, which is written last."""
    found = [(path, read_json(run)) for path in checkpoints(out) if os.path.exists(run := os.path.join(path, "run.json"))]
    for path in checkpoints(out):
        if path.endswith(".pt"):
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found.append((path, {key: whole[key] for key in ("identity", "step", "counts")}))
    return max(found, key=lambda item: item[1]["step"], default=(None, None))


def drop_checkpoints(out: str, but: str | None = None):
    for path in checkpoints(out):
        if path == but:
            continue
        if os.path.exists(run := os.path.join(path, "run.json")):                  # first: what remains is not taken for a whole one
            os.remove(run)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    if but is None and os.path.isdir(os.path.join(out, "checkpoint")):
        os.rmdir(os.path.join(out, "checkpoint"))


def write_checkpoint(args: Args, model: nn.Module, optimizer, about: dict) -> str:
    """-> its path. At every moment of this there is one complete checkpoint, if there was one before."""
    path = os.path.join(args.out, *("checkpoint", str(about["step"])) if args.fsdp and WORLD > 1 else ("checkpoint.pt",))
    if path.endswith(".pt"):                                                       # every rank takes part: --expert-parallel gathers
        weights, state = get_state_dict(model, optimizer, options=TRAINED)
        if RANK == 0:
            write_atomically(path, lambda name: torch.save({**about, "model": weights, "optimizer": state}, name))
    else:
        try:
            dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=SHARDS))), checkpoint_id=path)
        except CheckpointException as e:                                           # of one rank, and told to all
            if RANK == 0:
                shutil.rmtree(path, ignore_errors=True)
            raise OSError(f"{path}: cannot be written: {next(iter(e.failures.values()))[0]}") from None
        if RANK == 0:
            write_json(os.path.join(path, "run.json"), about)
    if RANK == 0:
        drop_checkpoints(args.out, path)
    if WORLD > 1:
        dist.barrier()
    return path


def read_checkpoint(args: Args, model: nn.Module, optimizer, path: str):
    """Whoever wrote it, and on however many processes: each takes its own part."""
    if path.endswith(".pt"):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=args.fsdp)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=TRAINED)
        return
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=SHARDS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                            # that one process is meant to read it alone
        dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=SHARDS)


def train(*args):
    """`optimize`; and however it ends, the signal handlers are as they were and the progress bar is closed."""
    with ExitStack() as undo:
        optimize(undo, *args)


def optimize(undo: ExitStack, args: Args, stage, s: dict, model: nn.Module, loader_from, device, save_result, later=()):
    """Optimize s["steps"] steps of model(**inputs) -> an object with .parts, whose weighted sum is the loss.

    loader_from(step) gives an endless iterator of micro-batches from that step on. Checkpoints, log, progress, Ctrl-C, NaN steps
    and broken samples are dealt with here, once, for all stages."""
    out, steps = args.out, s["steps"]
    n_micro = s["batch_size"] // (s["micro_batch"] * WORLD)
    experts, mesh = shard_experts(args, model, device)
    wrapped = distribute(args, model, device, later)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=s["lr"], weight_decay=args.weight_decay, fused=device.type == "cuda")
    if experts:
        show_whole(model, optimizer, experts, mesh)
    config = getattr(model, "config", None)
    aux = s.get("aux", True)           # stages 1 and 2 do without, as released: a Mixtral's own routers are left alone until stage 3
    coef = lambda name: aux * config.balance_coef if name.endswith("/balance") else aux * config.z_coef if name.endswith("/z") else 1.0
    start = 0
    counts = {"skipped": 0, "broken": 0, "truncated": 0, "samples": 0}
    identity = {"stage": stage, **{k: s.get(k) for k in ("steps", "batch_size", "lr", "max_length", "template", "lora")}, **{
        k: getattr(args, k) for k in ("preset", "recipe", "trains", "upcycle_at", "moe_layers", "capacity_factor", "noisy_gate", "vision",
                                      "llm", "audio", "init", "experts", "average", "seed", "data", "frames_apart", "dense", "n_experts", "top_k",
                                      "balance_coef", "z_coef", "warmup", "weight_decay", "grad_clip", "matmul")}}     # all that numbers depend on
    file, saved = newest_checkpoint(out) if args.resume else (None, None)
    if file and saved["identity"]["stage"] == stage:
        if other := [f"{k} {saved['identity'].get(k)} (now {v})" for k, v in identity.items() if saved["identity"].get(k) != v]:
            raise ValueError(f"{file} was written with {', '.join(other)}: give the same flags")
        read_checkpoint(args, model, optimizer, file)
        start, counts = saved["step"], saved["counts"]
        say(f"stage {stage}: going on after step {start} of {steps}")

    log = Log(os.path.join(out, "log.jsonl"), stage, start) if RANK == 0 else None
    stopping = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        undo.callback(signal.signal, sig, signal.signal(sig, lambda number, _: stopping.append(number)))
    batches, bad_in_a_row, last_saved, spent = iter(loader_from(start)), 0, start, [0., 1e-9]
    # A thread prepares the next batch while torch computes (and lets go of Python's lock); what it raises, result() raises here
    pool, fetch = ThreadPoolExecutor(1), lambda: [next(batches) for _ in range(n_micro)]
    undo.callback(pool.shutdown, wait=False)
    ahead = pool.submit(fetch)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    model.train()
    bar = tqdm(total=steps, initial=start, desc=f"stage {stage}", disable=RANK != 0, dynamic_ncols=True, mininterval=1)
    undo.callback(bar.close)
    for step in range(start, steps):
        begin = time.perf_counter()
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)           # a resumed run draws the same noise
        lr = lr_at(step, steps, s["lr"], args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro = ahead.result()
        waited = time.perf_counter() - begin
        for b in micro:
            b["n_labels"], b["n_images"] = int((b["labels"][:, 1:] != IGNORE).sum()), len(b["images"])
            for message in b["broken"]:
                tqdm.write(f"broken sample replaced: {message}", file=sys.stdout)
        total = torch.tensor([sum(b["n_labels"] for b in micro), sum(b["n_images"] for b in micro), sum(len(b["broken"]) for b in micro),
                              sum(b["truncated"] for b in micro), len(stopping)], dtype=torch.float64, device=device if WORLD > 1 else "cpu")
        if WORLD > 1:
            dist.all_reduce(total)
        total = total.tolist()
        if step < steps - 1:                                                       # from here on: a Ctrl-C counts in the step after
            ahead = pool.submit(fetch)
        counts["broken"] += int(total[2])
        counts["truncated"] += int(total[3])
        counts["samples"] += s["batch_size"]
        if counts["broken"] > 0.01 * max(counts["samples"], 1000):                 # early on, ten are let through
            raise ValueError(f"{counts['broken']} of {counts['samples']} samples are broken, over 1%: mend the data (listed above)")

        sums = {}                                                                  # part -> its mean over the global batch
        for i, b in enumerate(micro):
            # With DDP gradients travel between ranks once a step; FSDP's do each time, or else every rank would have to keep them whole
            with nullcontext() if i == n_micro - 1 or args.fsdp or WORLD == 1 else wrapped.no_sync(), autocast:
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
        norm = clip_gradients(params, experts, mesh, args.grad_clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        *row, norm = torch.cat([row, norm.float().view(1)]).tolist()               # in one piece: to look is to wait for the device
        row = dict(zip(sums, row))
        row["loss"] = sum(coef(name) * v for name, v in row.items())
        if math.isfinite(row["loss"]) and math.isfinite(norm):
            optimizer.step()
            bad_in_a_row = 0
        else:                                                                      # one bad batch must not poison the weights
            counts["skipped"] += 1
            bad_in_a_row += 1
            say(f"stage {stage}, step {step}: loss {row['loss']}, gradient norm {norm}: step skipped")
            if bad_in_a_row == 10:
                raise ValueError(f"10 steps in a row without a finite loss. The last good checkpoint is "
                                 f"{f'{file}, step {last_saved}' if file else 'none'}; try a smaller --lr")
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin
        spent = [spent[0] + waited, spent[1] + seconds]
        row = {"stage": stage, "step": step, **{k: v for k, v in row.items() if v != 0 or k == "loss"}, "lr": lr, "grad_norm": norm,
               "images_per_s": total[1] / seconds, "seconds": seconds, "waiting": waited / seconds}
        if RANK == 0:
            log.write(row)
        bar.set_postfix_str(" ".join(f"{short(k)} {row[k]:.3g}" for k in row if k in ("loss", "lr", *sums))
                            + f" {row['images_per_s']:.0f} img/s", refresh=False)
        bar.update()
        stop = total[4] > 0 and step < steps - 1
        if stop or ((step + 1) % args.save_every == 0 and step < steps - 1):
            last_saved = step + 1
            file = write_checkpoint(args, model, optimizer, {"identity": identity, "step": last_saved, "counts": counts})
        if stop:
            undo.close()
            say(f"stopped after step {step + 1} of {steps}; `--resume` with the same flags goes on from {file}")
            raise KeyboardInterrupt
    undo.close()
    counts = {k: v for k, v in counts.items() if v and k != "samples"}
    say(f"stage {stage}: {steps} steps done" + (f" ({', '.join(f'{v} {k}' for k, v in counts.items())})" if counts else "")
        + f"; waited {100 * spent[0] / spent[1]:.0f}% of the time for data"
        + (f"; compiled {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs" if args.compile else ""))
    save_result(get_model_state_dict(model, options=FULL))
    if RANK == 0:
        drop_checkpoints(out)                                                      # the stage's folder has taken its place
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
# 3. Stages 1 to 3


def place(args: Args, stage) -> str:
    """The file or folder that a finished stage leaves."""
    return os.path.join(args.out, FILES[stage])


def loader(dataset, s: dict, args: Args, collate, lengths=None):
    """-> loader_from(step), as `train` wants it."""
    def start_from(step):
        batches = d.Batches(len(dataset), s["batch_size"], s["micro_batch"], args.seed, step, RANK, WORLD, lengths)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                          persistent_workers=args.workers > 0, pin_memory=torch.cuda.is_available())
    return start_from


def decoder_experts(args: Args, n_layers: int) -> list[int]:
    """The number of experts of each decoder layer, by the flags or the recipe's own placement."""
    where = args.moe_layers
    if where is None:
        where = "all" if args.recipe == "uni-moe" else "every_other"
    return expert_counts(n_layers, where, args.n_experts)


def make_experts(args: Args, model: CuMo, real_routers: bool = False):
    """Upcycle where the recipe says, unless a stage before did so."""
    c, how = model.config, dict(top_k=args.top_k, seed=args.seed, real_routers=real_routers)
    part = c.vision if args.recipe == "cumo" else c.text
    if any(part.n_experts):
        have = set(part.n_experts) - {0}, part.top_k
        if (args.n_experts, args.top_k) != (Args.n_experts, Args.top_k) \
                and have != ({int(n) for n in args.n_experts.split(",")}, args.top_k):
            raise ValueError(f"the model has experts already ({have[0]}, top-{have[1]}): --n-experts and --top-k cannot change them")
    elif args.recipe == "cumo":
        upcycle(model, vision=int(args.n_experts), connector=int(args.n_experts), **how)
        if not c.balance_coef and not c.z_coef:                                    # the released stage-2 folders say 0
            c.balance_coef, c.z_coef = Config.balance_coef, Config.z_coef
    elif args.recipe == "moe-llava":
        upcycle(model, text=decoder_experts(args, c.text.n_layers), **how)
        c.balance_coef, c.z_coef, c.text.aux = 0.01, 0.0, "sum"                    # MoE-LLaVA sums over layers and has no z-loss
    else:
        folders = expert_folders(args)
        folders = folders * int(args.n_experts) if len(folders) == 1 else folders  # "pure copies", the paper's Table 8
        args.n_experts = str(len(folders))
        counts = decoder_experts(args, c.text.n_layers)
        if real_routers:
            raise ValueError("--fsdp cannot put experts together: do it first, with `python upcycle.py --experts A,B,C,D --out DIR`, "
                             "and --init DIR")
        upcycle(model, text=counts, **how, experts=folders, average=args.average)
        c.balance_coef, c.z_coef = 0.0, 0.0                                        # the paper has no auxiliary loss; --balance-coef has
    if args.recipe == "moe-llava":
        c.text.capacity_factor, c.text.eval_capacity_factor = args.capacity_factor or None, args.eval_capacity_factor or None
        c.text.noisy = args.noisy_gate
        model.text.apply_expert_limits()


def expert_folders(args: Args) -> list[str]:
    """Uni-MoE's experts: one decoder as stage 1 left it, and one trained for each sense."""
    return args.experts.split(",") if args.experts else [place(args, stage) for stage in (1, *SENSES)]


def run_stage(args: Args, stage: int, source: str, device):
    """Train one stage from a model folder (or a backbones file, or the folders of --vision and --llm) and leave a model folder; measure
    it on held-out scenes."""
    s, began = settings(args, stage), time.time()
    later = [] if args.fsdp and WORLD > 1 else None                                # with FSDP weights come last, see `distribute`
    torch.manual_seed(args.seed)                                                   # the same new weights on every rank
    if args.vision and stage == 1:
        preset, source = Config.from_preset(args.preset), f"{args.vision} and {args.llm}"
        model, tokenizer = assemble(args.vision, args.llm, None, preset.vision.scales, preset.template, args.seed, torch.float32,
                                    later=later, audio=args.audio)
    else:
        model, tokenizer = load_backbones(source) if source.endswith(".safetensors") else load(source, dtype=torch.float32, later=later)
    if tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer.json, which training needs; copy it there (where there is only a tokenizer.model, "
                         "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it)")
    if getattr(model, "vision", None) is None:
        raise ValueError(f"{source}: a language model alone, without the vision tower and connector that training needs")
    model = model.float()                                                          # master weights (backbones may be stored shorter)
    if args.recipe == "uni-moe" and model.config.audio is None:
        raise ValueError(f"{source}: hears nothing; uni-moe's stage 1 wants --vision, --llm and --audio WHISPER_DIR")
    c = model.config
    if args.recipe != "cumo" and not args.dense and not any(c.text.n_experts):
        decoder_experts(args, c.text.n_layers)                                     # wrong ones stop stage 1 already
    if s["experts"]:
        make_experts(args, model, real_routers=later is not None)
    for name in ("balance_coef", "z_coef"):
        if getattr(args, name) is not None:
            setattr(c, name, getattr(args, name))
    choose_trainable(model, s["trains"])
    if s.get("lora"):
        add_lora(model, *s["lora"], args.seed, real=later is not None)
    if later is None:
        model.to(device)
    template = s["template"] or c.template
    if args.template and args.template != "plain":
        c.template = args.template                                                 # the model is asked in the layout that it learnt
    c.frames_apart |= args.frames_apart
    if args.data:
        data = d.LlavaJson(args.data, args.images)
        lengths = data.lengths(c.n_image_tokens, c.n_audio_tokens)
        s["steps"] = args.steps or max(1, args.epochs * len(data) // s["batch_size"])
    elif "steps" not in s:
        raise ValueError(f"{args.preset} on drawn scenes needs --steps; or give your own with --data")
    else:                                                                          # every drawn scene is seen once
        data = d.Drawn(s["kind"], s["steps"] * s["batch_size"], args.seed + number(stage))
        lengths = [(1, 0, 2)[i % 3] for i in range(len(data))] if s["kind"] == "mixed chat" else None    # a sound's questions are short
    encoded = d.Encoded(data, tokenizer, template, c.vision.image_size, c.n_image_tokens, s["max_length"], args.strict, c.n_audio_tokens,
                        c.audio.n_frames / 100 if c.audio else 0., average=not c.frames_apart)
    counts = count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise ValueError(f"stage {stage}: --trains {args.trains}: nothing to train here; text.moe needs experts, see --upcycle-at")
    say(f"stage {stage}: {s['steps']} steps of {s['batch_size']} from {source}; training "
        f"{', '.join([*s['trains'], *['adapters'] * bool(s.get('lora'))])} ({trained / 1e6:.2f}M of "
        f"{sum(t for t, _ in counts.values()) / 1e6:.2f}M parameters, {sum(a for _, a in counts.values()) / 1e6:.2f}M activated)")

    def done(state):
        if RANK > 0:
            return
        save(model, place(args, stage), tokenizer, merge_state(state, model))
        if not args.data:                                                          # what is measured is what lies on the disk
            n, scores, asked = args.eval_questions if stage == 3 else max(1, args.eval_questions // 4), {}, []
            trained = load(place(args, stage), device)
            hears = {1: ("image", "sound"), 3: ("image", "sound", "both")}
            for world in hears.get(stage, (str(stage)[2:],)) if args.recipe == "uni-moe" else ("image",):
                scores |= (points := generate.evaluate(*trained, n, world=world, asked=asked))
                about = {"image": "scenes", "sound": "sounds", "both": "pairs of a scene and a sound"}[world]
                generate.print_table(points, f"after stage {stage}: {n} questions about held-out {about}, exact match")
            with open(os.path.join(args.out, "scores.jsonl"), "a") as f:
                f.write(json.dumps({"stage": stage, "seed": args.seed, "dense": args.dense, "scores": scores,
                                    "seconds": time.time() - began}) + "\n")
            if stage == 3 and s["experts"]:
                some = asked[::max(1, len(asked) // 250)]
                generate.draw_experts(*trained, *zip(*some), os.path.join(args.out, "routing.png"), alone=True)
    train(args, stage, s, model, loader(encoded, s, args, d.collate, lengths), device, done, later or ())


# ---------------------------------------------------------------------------------------------------------------------
# 4. --plan: what a stage will cost, before it costs anything

N_SAMPLES = {"cumo": {1: 558_000, 2: 708_000, 3: 1_649_000}, "moe-llava": {1: 558_000, 2: 964_000, 3: 665_000}}       # the papers'


# FLOPs of operators for which torch has no formula, by the shapes of their inputs: two for every
# multiply-add. (Going back, a product becomes two, the gradient of either factor. So a frozen weight
# costs only one there, and what lies before the first weight that trains costs nothing.)


def grouped_flops(a, b, *_, **__):
    """a (M, K) by slices of rows with b (E, K, N), or by slices of columns with b (K, N)."""
    return 2 * a[0] * a[1] * b[-1]


def attention_flops(q, k, *_, **__):
    """q (B, H, T, d), k (B, H_kv, S, d): the two products q k and p v.

    A kernel that skips what a causal mask hides does half of it; that is not counted here.
    """
    b, h, t, d = q
    return 2 * 2 * b * h * t * k[2] * d


def attention_backward_flops(grad, q, k, *_, **__):
    """Four products. The kernel also computes q k a second time, which is not counted here."""
    return 2 * attention_flops(q, k)


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FORMULAS = flop_registry | {
    torch.ops.aten._grouped_mm: shape_wrapper(grouped_flops),
    FLASH: shape_wrapper(attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        shape_wrapper(attention_backward_flops),
}


class Meter(TorchDispatchMode):
    """Counts the FLOPs of operators, and the bytes of tensors that are alive.

    It sees each operator's results come, and is told when their memory goes. Tensors in `known` do
    not count.

    torch has both: FlopCounterMode, with the same formulas, and MemTracker. But the first keeps
    tensors alive by the way it follows modules, so that the bytes would be wrong, and the second
    fails where parts are frozen, that is in every stage 1.
    """

    def __init__(self, known):
        super().__init__()
        self.flops = 0
        self.now = 0
        self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        formula = FORMULAS.get(op._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t.untyped_storage())
        return out

    def add(self, memory):
        # a view has the memory of what it is a view of
        if memory in self.seen:
            return
        self.seen.add(memory)
        self.grow(memory.nbytes())
        weakref.finalize(memory, self.grow, -memory.nbytes()).atexit = False

    def grow(self, n: int):
        self.now += n
        self.peak = max(self.peak, self.now)


def mark_parts(model: CuMo, mark):
    """Have mark(part) called whenever the model enters a part, forward or, going back, behind it.

    Going back, a part begins where the gradient of its output is there. The parts run one after the
    other in both directions.
    """
    def watch(part, module):
        def enter(*_):
            mark(part)

        def watch_output(_, inputs, output):
            out = output[0] if isinstance(output, tuple) else output
            if out.requires_grad:
                out.register_hook(enter)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(watch_output)

    for part, module in model.named_children():
        watch(part, module)


def flops_between(marks: list, end: int) -> dict[str, int]:
    """[(part, FLOPs when it was entered), ...] and the FLOPs at the end -> {part: FLOPs in it}."""
    spent = Counter()
    ends = [begin for _, begin in marks[1:]] + [end]
    for (part, begin), until in zip(marks, ends):
        spent[part] += until - begin
    return spent


class Rehearsal(NamedTuple):
    """What one micro-batch's forward and backward pass takes."""
    kept: int  # bytes that the forward pass leaves for the backward pass
    peak: int  # the most bytes that are alive at once
    forward: dict[str, int]  # FLOPs of each part of the model
    backward: dict[str, int]  # the same; with checkpointing, including what is computed again


def meta_batch(config: Config, rows: int, length: int) -> dict:
    """`rows` samples of `length` tokens, each with an image, and a sound if the model hears."""
    with torch.device("meta"):
        tokens = torch.zeros(rows, length, dtype=torch.long)
        batch = {"tokens": tokens, "labels": tokens}
        size = config.vision.image_size
        batch["images"] = torch.empty(rows, 3, size, size)
        if config.audio is not None:
            batch["audio"] = torch.empty(rows, config.audio.n_mels, config.audio.n_frames)
    return batch


@functools.cache
def rehearse(config: str, trains: tuple, lora: tuple, rows: int, length: int, checkpointing: bool,
             grads: bool, dtype: torch.dtype) -> Rehearsal:
    """A forward and backward pass on meta, where tensors have shapes but no memory and no values.

    config: as JSON. The bytes are without weights and, with `grads`, without gradients, which are
    there before then. (torch.compile needs less.) FLOPs are those of matrix products.
    """
    def attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=False):
        # meta would choose the one with the T x T matrix
        return FLASH(q, k, v, 0.0, is_causal)[0]

    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = CuMo(Config.from_dict(json.loads(config))).train()
        batch = meta_batch(model.config, rows, length)
    finally:
        torch.set_default_dtype(usual)
    choose_trainable(model, trains)
    if lora:
        add_lora(model, *lora)
    model.checkpointing(checkpointing)

    known = list(model.parameters())
    for p in model.parameters():
        if grads and p.requires_grad:
            p.grad = torch.zeros_like(p)
            known.append(p.grad)

    marks = []
    with Meter(known) as meter, mock.patch.object(F, "scaled_dot_product_attention", attention):
        mark_parts(model, lambda part: marks.append((part, meter.flops)))
        loss = model(**batch).loss
        kept = meter.now
        forward_flops = meter.flops
        n_forward = len(marks)
        loss.backward()
    forward = flops_between(marks[:n_forward], forward_flops)
    backward = flops_between(marks[n_forward:], meter.flops)
    return Rehearsal(kept, meter.peak, forward, backward)


def rehearse_stage(args: Args, s: dict, config: Config, gpus: int, fsdp: bool,
                   checkpointing: bool) -> Rehearsal:
    """The rehearsal of one micro-batch of a stage, as a run with these flags computes it."""
    # with several micro-batches, gradients are there from the second on
    several = s["batch_size"] > s["micro_batch"] * gpus
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return rehearse(json.dumps(config.to_dict()), tuple(s["trains"]), tuple(s.get("lora", ())),
                    s["micro_batch"], s["max_length"], checkpointing, several or fsdp, dtype)


def planned(args: Args, s: dict) -> tuple[Config, CuMo]:
    """The preset as a stage trains it, and its model without memory."""
    c = Config.from_preset(args.preset)
    if args.recipe == "cumo":
        e = int(args.n_experts) * s["experts"]
        c.vision.n_experts, c.vision.top_k, c.connector.n_experts, c.connector.top_k = [e] * c.vision.n_layers, args.top_k, e, args.top_k
    else:
        c.text.n_experts, c.text.top_k = decoder_experts(args, c.text.n_layers), args.top_k
        if not s["experts"]:
            c.text.n_experts = [0] * c.text.n_layers
    with torch.device("meta"):
        model = CuMo(c)
    choose_trainable(model, s["trains"])
    if s.get("lora"):
        add_lora(model, *s["lora"])
    return c, model


def memory(args: Args, stage, gpus: int, fsdp: bool, checkpointing: bool) -> dict[str, float]:
    """{kind: bytes on each GPU} in a step whose samples are all as long as can be, with an image each; "peak": the most at once."""
    s, bf16, fsdp = settings(args, stage, gpus), args.device != "cpu", fsdp and gpus > 1
    (config, model), short, cut = planned(args, s), 2 if bf16 else 4, gpus if fsdp else 1
    dealt = {p for m in model.modules() if isinstance(m, MoE) for name, p in m.named_parameters() if name != "router"}
    size = lambda params: sum(p.numel() / (args.expert_parallel if p in dealt else 1) for p in params)
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = [size(b.parameters()) for m in model.modules() if type(m) is nn.ModuleList for b in m]
    several = s["batch_size"] > s["micro_batch"] * gpus                            # micro-batches: gradients are there from the first on
    grads = 4 * size(trained) / cut
    kept, top, *_ = rehearse_stage(args, s, config, gpus, fsdp, checkpointing)
    fixed = {"weights": 4 * size(model.parameters()) / cut, "optimizer": 8 * size(trained) / cut}
    if fsdp:         # what is in no block stays gathered, of the blocks this one and the next; one block's gradients are on their way
        fixed["gathered"] = short * (size(model.parameters()) - sum(blocks) + 2 * max(blocks)) + (short + 4) * max(blocks)
    elif gpus > 1:
        fixed["DDP buckets"] = 4 * size(trained)
    if bf16 and not fsdp:
        fixed["bf16 copies"] = 2 * size(model.parameters())                          # autocast's, of every weight
    update = 0 if bf16 else 8 * max(p.numel() for p in trained)                    # AdamW, where it is not fused
    return fixed | {"gradients": grads, "activations": kept, "backward pass": top - kept,
                    "peak": sum(fixed.values()) + max(grads + update, top + grads * (several or fsdp))}


def plan(args: Args):
    for stage in [args.stage] if args.stage is not None else [1, 2, 3]:
        s = settings(args, stage, args.gpus)
        (config, model), n, length = planned(args, s), s["batch_size"], s["max_length"]
        if not (args.data or args.steps or args.recipe in N_SAMPLES):
            raise ValueError(f"--plan: of how many steps? Give --steps or --data; {args.recipe}'s data sets are not on record here")
        n_samples = args.epochs * (len(d.LlavaJson(args.data)) if args.data else N_SAMPLES.get(args.recipe, {}).get(stage, 0))
        steps = s["steps"] if "steps" in s and (args.steps or not args.data) else max(1, n_samples // n)
        way = "FSDP" if args.fsdp else f"experts over {args.expert_parallel}" if args.expert_parallel > 1 else "DDP"
        if n % (args.gpus * s["micro_batch"]):
            raise ValueError(f"batch size {n} is not a multiple of --gpus {args.gpus} x {s['micro_batch']} samples at a time")
        print(f"\n{args.preset}, stage {stage}, {f'{args.gpus} GPUs ({way})' if args.gpus > 1 else '1 GPU'}: steps of {n}, "
              f"{s['micro_batch']} samples a GPU at a time, each of {length} tokens and an image{' and a sound' * (config.audio is not None)}")
        print("{:10} {:>14} {:>14} {:>14} {:>26} {:>10} {:>28}".format("", "parameters", "activated", "trained", "GFLOPs a sample: forward",
                                                                       "backward", "again, with --checkpointing"))
        rows = {}
        plain, again = (rehearse_stage(args, s, config, args.gpus, args.fsdp and args.gpus > 1, on) for on in (False, True))
        for part, both in count_parameters(model).items():
            trained = sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad)
            # FLOPs of one sample: forward, backward, and what checkpointing computes a second time
            work = plain.forward[part], plain.backward[part], again.backward[part] - plain.backward[part]
            rows[part] = [*both, trained, *(flops / s["micro_batch"] / 1e9 for flops in work)]
        rows["all"] = [sum(column) for column in zip(*rows.values())]
        for part, row in rows.items():
            print("{:10} {:14,} {:14,} {:14,} {:26,.2f} {:10,.2f} {:28,.2f}".format(part, *row))
        for on in (False, True):
            kinds = memory(args, stage, args.gpus, args.fsdp, on)
            if not on:
                print(f"{'GB on each GPU; peak: the most at once':42}" + "".join(f"{k:>14}" for k in kinds))
            print(f"{('with' if on else 'without') + ' --checkpointing':42}" + "".join(f"{v / 1e9:14,.2f}" for v in kinds.values()))
        work = sum(rows["all"][3:5 + args.checkpointing]) * 1e9 * n
        hours = steps * work / (args.mfu * args.peak_tflops * 1e12) / 3600
        print(f"{steps:,} steps of {work / 1e12:,.1f} TFLOPs{' with checkpointing' * args.checkpointing}, {steps * n:,} samples: "
              f"{hours:,.2f} GPU-hours, {hours / args.gpus:,.2f} hours, at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s")
        fits = lambda *how: memory(args, stage, *how)["peak"] < args.gpu_gb * 1e9
        least = (f"{gpus} GPUs with --fsdp{' --checkpointing' * on}" for gpus in (2**i for i in range(12)) if n % gpus == 0
                 for on in sorted({args.checkpointing, True}) if fits(gpus, True, on))
        print(f"fits into {args.gpu_gb} GB" if fits(args.gpus, args.fsdp, args.checkpointing) else f"does NOT fit into {args.gpu_gb} GB; "
              f"the smallest number (1, 2, 4, 8...) that does: {next(least, 'none. Try a smaller --micro-batch')}")


# ---------------------------------------------------------------------------------------------------------------------


def keep_pages():
    """Let glibc keep the memory that tensors leave behind.

    It takes every tensor over 32 MB from the kernel anew and gives it back afterwards. Each fresh
    page is then a page fault, that is a trip to the kernel, which fills 4 KB with zeros: a fifth to
    a half of a CPU step on long sequences. The price is a heap with gaps (a step of uni-moe peaks
    at 3.3 GB, not 2.5). Whoever sets glibc's own MALLOC_ variables decides for himself; other C
    libraries are left alone.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or tuned:
        return

    # the numbers of these parameters in <malloc.h>, and their values
    m_mmap_max = (-4, 0)
    m_trim_threshold = (-1, 2**31 - 1)
    m_top_pad = (-2, 10**8)
    libc = ctypes.CDLL(None)
    for parameter, value in (m_mmap_max, m_trim_threshold, m_top_pad):
        libc.mallopt(parameter, value)


def prepare_device(args: Args) -> torch.device:
    """The device that the flags choose, set up for a run."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; leave the flag out for the CPU")
    torch.set_float32_matmul_precision(args.matmul)
    if args.matmul == "medium":
        # the CPU's flash kernel multiplies small blocks, for which AMX is slow (this switch is the
        # CPU's too)
        torch.backends.cuda.enable_flash_sdp(False)

    name = args.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_pages()
    return torch.device(name)


def join_processes(args: Args, device: torch.device) -> torch.device:
    """Under torchrun, meet the other processes -> this process's device.

    Where torchrun has started all of them again because one died, args.resume becomes true.
    """
    if WORLD == 1:
        return device
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    # after a restart torchrun's store still has the dead processes' addresses, and others might wait
    # for these
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    store = None
    if restarts and os.environ["GROUP_WORLD_SIZE"] == "1":
        old_store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {restarts}", old_store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)

    # each node counts its own restarts
    died = torch.tensor(restarts, device=device)
    dist.all_reduce(died, dist.ReduceOp.MAX)
    if died:
        args.resume = True
    return device


def leave_processes():
    if WORLD > 1:
        dist.destroy_process_group()


def stages_of(args: Args) -> list:
    """The stages of this run, in order. uni-moe trains stage 2 once for each sense."""
    numbers = [1, 2, 3]
    if args.stage is not None:
        numbers = [args.stage]
    stages = []
    for n in numbers:
        if n == 2 and args.recipe == "uni-moe" and not args.data:
            stages += SENSES
        else:
            stages.append(n)
    return stages


def source_of(args: Args, stage, stages: list) -> str:
    """The folder or file that a stage starts from."""
    if args.init and stage == stages[0]:
        return args.init
    if stage == 1:
        if args.preset not in DRAWN and not args.vision:
            raise ValueError(f"{args.preset} starts from pre-trained weights: give --vision CLIP_DIR and --llm LLM_DIR, or --init")
        return HEARING if args.recipe == "uni-moe" else BACKBONES
    if args.recipe != "uni-moe":
        return place(args, number(stage) - 1)
    if number(stage) == 2:
        # each sense's expert begins where stage 1 ended
        return place(args, 1)
    # the mixture begins at the first of its experts, a dense model at the last that was trained
    return expert_folders(args)[-1 if args.dense else 0]


def main(argv=None):
    args = parse(argv)
    if args.plan:
        return plan(args)
    device = prepare_device(args)
    device = join_processes(args, device)
    Config.from_preset(args.preset)                                                # an unknown name stops here
    stages = stages_of(args)
    began, first = time.time(), stages[0]
    finished = [s for s in stages if os.path.exists(os.path.join(place(args, s), "config.json"))]
    if args.resume:                                                                # skip what is finished
        file, saved = newest_checkpoint(args.out)
        running = saved["identity"]["stage"] if file else None
        if running is not None and running not in stages:
            raise ValueError(f"{file} belongs to stage {running}: give the flags that this run began with")
        first = running or next((s for s in stages if s not in finished), None)
        if first is None:
            raise ValueError(f"nothing to resume: {args.out} holds a finished run")
    elif args.stage is not None and (finished or checkpoints(args.out)):            # never write over a trained model
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
        run_stage(args, stage, source_of(args, stage, stages), device)
    if RANK == 0:
        generate.draw_curves(os.path.join(args.out, "log.jsonl"), os.path.join(args.out, "loss.png"))
        last = os.path.normpath(place(args, stages[-1]))
        say(f"done in {(time.time() - began) / 60:.1f} minutes. {args.out} holds what was trained, log.jsonl and pictures. Try:\n"
            f"  python generate.py --model {last} --image X.png --prompt \"What color is the circle?\"")
    leave_processes()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:                                             # one line, without a loading process's traceback
        sys.exit(f"train.py: {str(e).rsplit('ValueError: ', 1)[-1].strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
