"""train.py: CuMo's three stages, from pre-trained backbones to a model that answers questions about pictures; MoE-LLaVA's; Uni-MoE's.

    python train.py                                     the embedded default: preset tiny, drawn data, CPU, minutes
    torchrun --nproc_per_node 2 train.py                the same with data parallelism (--fsdp: sharded; --expert-parallel 2: experts are)
    python train.py --stage 3 --init DIR --data FILE.json --images DIR      one stage on LLaVA's data format
    torchrun --nproc_per_node 8 train.py --preset cumo-mistral-7b --stage 1 --vision CLIP_DIR --llm MISTRAL_DIR --data ... --images ...
                                                        real models; stages 2 and 3 start from what the one before left
    python train.py --preset cumo-mistral-7b --stage 3 --gpus 8 --fsdp --checkpointing --plan    what it would cost; --bench: how fast it is

    stage 0   for who has no backbones: the tower learns from captions (contrastively), the decoder from text
    stage 1   pre-training: the connector alone learns to make image patches read like words
    stage 2   pre-finetuning: everything trains, still dense, on captions ("to warm up", CuMo section 3.3)
    stage 3   instruction tuning: FFNs of tower and connector are upcycled to experts, everything trains on questions

That is CuMo's recipe. --recipe moe-llava has its experts in the decoder; --recipe uni-moe also hears, and trains its experts apart:

    stage 0   the ear learns from sounds and what they are, the decoder from text about scenes and sounds
    stage 1   connector and resampler learn from captions of scenes and of sounds
    stage 2   one set of decoder FFNs for images, one for sounds, one for both, each apart, by LoRA
    stage 3   these become the experts of one decoder, and routers, connectors and adapters train on all senses

Each stage starts from the folder that the stage before it left. A run writes to --out: checkpoint.pt, or with --fsdp checkpoint/,
which --resume goes on from (on any number of processes), stage1/, stage2/ and at last the model itself, log.jsonl, loss.png, routing.png.
`torchrun --max-restarts 3 ... train.py ...` goes on by itself after a process died.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain
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
from tqdm import tqdm

import data as d
import generate
import kernels
from model import (IGNORE, IMAGE, PAD, PRESETS, Config, Connector, CuMo, MoE, TextConfig, add_lora, count_parameters, flops, merge_state,
                   plain_name)
from upcycle import (add_audio, assemble, load, load_backbones, put, read_json, save, save_backbones, upcycle, write_atomically,
                     write_json)

DRAWN = "tiny", "uni-moe-tiny"                                                           # presets of the drawn world; backbones are shipped
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
BACKBONES, HEARING = (os.path.join(ASSETS, f"{preset}-backbones.safetensors") for preset in DRAWN)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ                                                  # also with one process: FSDP on one GPU, say
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
FILES = {"0a": "tower.safetensors", "0b": "backbones.safetensors", "0c": "ear.safetensors", "0d": "backbones.safetensors",
         1: "stage1", 2: "stage2", **{stage: stage.replace("2 ", "stage2-") for stage in SENSES}, 3: ""}      # what a stage leaves in --out
RECIPES = {"cumo": RECIPE, "moe-llava": MOE_LLAVA, "uni-moe": UNI_MOE}
MIXTRAL = {3: dict(lr=2e-6)}      # where the released script of CuMo-Mixtral differs
TINY = {      # the same stages for a model four thousand times smaller, which wants larger steps
    "0a": dict(lr=1e-3, batch_size=64, steps=3000),
    "0b": dict(lr=2e-3, batch_size=64, steps=4500),
    "0c": dict(lr=1e-3, batch_size=64, steps=1000),
    "0d": dict(lr=1e-3, batch_size=64, steps=1000),
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
    stage: int | None = arg(None, "run this stage only (0 to 3); default: 1, 2 and 3")
    from_scratch: bool = arg(False, "begin with stage 0: make the tiny backbones again instead of taking the shipped ones")
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
    bench: bool = arg(False, "time a step of stage 3 with random weights: with experts, dense at equal FLOPs, and as released")
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
    if args.expert_parallel > 1 and args.bench:
        raise ValueError("--bench times experts that are all on one process: leave --expert-parallel out")
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
    if args.stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"--stage {args.stage}: the stages are 0, 1, 2 and 3")
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
    """Of 1 1, of "0a" 0, of "2 sound" 2."""
    return int(str(stage)[0])


def settings(args: Args, stage, world: int | None = None) -> dict:
    """A stage's numbers: the recipe's, the preset's over them, the flags over both."""
    n = number(stage)
    s = {**RECIPES[args.recipe][n], **OVERRIDES.get((args.recipe, args.preset), {}).get(n, {})} if n else dict(TINY[stage])
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
    if rank and n:
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


def choose_trainable(model: CuMo, trains):
    """requires_grad for the named parts, less the weights that no loss reaches (DDP insists on a gradient for everything else).

    With select_layer -2 the last vision layer does not touch the features. When it has experts, its router still counts in the
    auxiliary losses (as in the released code), but its experts' outputs go nowhere; when it is dense, it does not even run."""
    model.requires_grad_(False)
    for name in trains:
        if name in ("text.ffn", "text.moe", "text.router"):
            for layer in model.text.layers:
                if name == "text.ffn" or isinstance(layer.ffn, MoE):
                    (layer.ffn.router if name == "text.router" else layer.ffn).requires_grad_(True)
        else:
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
    if not LAUNCHED:
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
            put(params[plain_name(name) or name], *item)
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
    path = os.path.join(args.out, *("checkpoint", str(about["step"])) if args.fsdp and LAUNCHED else ("checkpoint.pt",))
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
    if LAUNCHED:
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
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)           # a resumed run draws the same noise (stage 0)
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
                              sum(b["truncated"] for b in micro), len(stopping)], dtype=torch.float64, device=device if LAUNCHED else "cpu")
        if LAUNCHED:
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
            with nullcontext() if i == n_micro - 1 or args.fsdp or not LAUNCHED else wrapped.no_sync(), autocast:
                inputs = {k: v.to(device, non_blocking=True) for k, v in b.items() if torch.is_tensor(v) and (k != "images" or len(v))}
                parts = wrapped(**inputs).parts
                share = {name: weigh(name, b, total, n_micro) for name in parts}
                loss = sum(coef(name) * share[name] * parts[name] for name in parts)
                (loss * WORLD).backward()                                          # DDP and FSDP average over ranks
            for name in parts:
                sums[name] = sums.get(name, 0) + share[name] * parts[name].detach()
        row = torch.stack([v.float() for v in sums.values()])
        if LAUNCHED:
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
    if LAUNCHED:
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
                "labels": F.pad(labels, (1, 0), value=IGNORE),
                "images": torch.stack([d.load_image(s["images"][0], self.size) for s in samples]),
                "captions": d.pad_rows([self.tokenizer.encode(" " + d.describe(s["scene"])).ids + end for s in samples], PAD),
                "broken": [], "truncated": 0}


class TextOnly(nn.Module):
    """Stages 0b and 0d. The decoder learns language, and the questions, from descriptions in place of images and sounds.

    One in ten descriptions is spelled out, phrases in any order. The others come in the layout of an image: one slot a
    patch, holding the sum of the embeddings of its cell's words, with noise. Both are text; the second has the decoder look things
    up by place among slots that hold many words at once, which is what patches are once the connector makes them read like words.
    A sound's slots hold the words of its description one after the other."""

    def __init__(self, model: CuMo):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, tokens, labels, bags, sounds=None):
        """bags (n, N, W) and sounds (m, Q, W): word ids of each slot, padded with PAD."""
        slots = [None if b is None else (self.model.text.embed(b.clamp(min=0)) * (b != PAD).unsqueeze(-1)).sum(2) for b in (bags, sounds)]
        if self.training:
            slots = [None if x is None or not len(x) else x + torch.randn_like(x) * x.detach().std() * 0.1 for x in slots]
        return self.model(tokens, labels=labels, image_embeds=slots[0], audio_embeds=slots[1])


class Described(torch.utils.data.Dataset):
    """Scenes in words for stage 0b, for stage 0d also sounds in words: captions and questions."""

    def __init__(self, size, seed, tokenizer, config):
        self.size, self.seed, self.tokenizer, self.n, self.n_audio = size, seed, tokenizer, config.n_image_tokens, config.n_audio_tokens
        self.cells = patch_cells(config.vision.image_size // config.vision.patch_size)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        seed = self.seed * 100_000_007 + i
        world = ("image", "both", "sound", "both")[i % 4] if self.n_audio else "image"
        scene, rng = d.make_scene(seed) if world != "sound" else None, random.Random(seed + 1)
        sound = d.make_sound(seed, kinds=("beeps", "glide") if world == "both" else tuple(d.SOUND_KINDS)) if world != "image" else None
        merged, kind = rng.random() < 0.9, rng.choices(("questions", "caption", "plain"), (18, 1, 1) if world != "sound" else (6, 1, 1))[0]
        spoken = [p + "." for p in d.phrases(scene).values()] if scene else []
        head = "<image>\n" * bool(scene) + "<audio>\n" * bool(sound) if merged else \
            " ".join(rng.sample(spoken, len(spoken)) + ([d.describe_sound(sound)] if sound else [])) + "\n"
        if kind == "questions" or world == "both":
            asked = d.ask_many(scene, {"image": 5 if self.n_audio else 8, "sound": 3, "both": 10}[world], rng, sound)
            asked = [qa for qa in asked if qa[0] in d.BOTH_TYPES][:6] or asked[:3] if world == "both" else asked
            kind, pairs = "questions", [(q, a) for _, q, a in asked]
        else:
            pairs = [("Describe the scene.", d.describe(scene))] if scene else [("Describe the sound.", d.describe_sound(sound))]
        ids, labels = d.encode_chat(d.as_turns(pairs, head), self.tokenizer, "plain" if kind == "plain" and merged else "tiny", self.n,
                                    self.n_audio)
        if not merged:
            return ids, labels, None, None
        phrases, words = cell_phrases(scene) if scene else None, d.describe_sound(sound).split() if sound else []
        return (ids, labels, [ids_of(phrases[c], self.tokenizer) for c in self.cells] if scene else None,
                [ids_of(w, self.tokenizer) for w in words] + [[PAD]] * (self.n_audio - len(words)) if sound else None)

    def collate(self, samples):
        def bags(rows, n):                                                         # (how many, n slots, W words)
            slots = [slot for row in rows if row for slot in row] or [[PAD]] * n
            return d.pad_rows(slots, PAD, 1).view(-1, n, max(len(b) for b in slots))[:sum(row is not None for row in rows)]
        ids, labels, images, sounds = zip(*samples)
        return {"tokens": d.pad_rows(ids, PAD), "labels": d.pad_rows(labels, IGNORE), "bags": bags(images, self.n), "images": [],
                "broken": [], "truncated": 0} | ({"sounds": bags(sounds, self.n_audio)} if self.n_audio else {})


class Transcribe(nn.Module):
    """Stage 0c. The ear, as Whisper is trained: from a sound, write down what it is. The writer is thrown away afterwards."""

    def __init__(self, ear, vocab_size: int):
        super().__init__()
        dim = ear.config.dim
        self.ear, self.writer = ear, CuMo(Config(vision=None, text=TextConfig(
            vocab_size=vocab_size, dim=dim, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=3 * dim, rope_theta=1e4)))
        self.config = self.writer.config

    def forward(self, tokens, labels, audio):
        return self.writer(tokens, labels=labels, image_embeds=self.ear(audio))     # what it hears stands where an image would


class Sounds(torch.utils.data.Dataset):
    """Drawn sounds and what they are, for stage 0c."""

    def __init__(self, size, seed, tokenizer, config):
        self.sounds, self.tokenizer, self.n = d.Drawn("sound caption", size, seed), tokenizer, config.audio.n_frames // 2
        self.seconds = config.audio.n_frames / 100

    def __len__(self):
        return len(self.sounds)

    def __getitem__(self, i):
        sample = self.sounds[i]
        ids = self.tokenizer.encode(" " + d.describe_sound(sample["sound"])).ids + [self.tokenizer.token_to_id("</s>")]
        return [IMAGE] * self.n + ids, [IGNORE] * self.n + ids, d.load_audio(sample["audio"][0], self.seconds)

    def collate(self, samples):
        ids, labels, audio = zip(*samples)
        return {"tokens": d.pad_rows(ids, PAD), "labels": d.pad_rows(labels, IGNORE), "audio": torch.cat(audio), "images": [], "broken": [],
                "truncated": 0}


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


def pretrain(args: Args, part: str, device):
    """Stage "0a" makes --out/tower.safetensors, stage "0b" teaches the decoder and makes --out/backbones.safetensors. For a model that
    hears, "0c" adds an ear to the shipped backbones and makes --out/ear.safetensors, "0d" teaches the decoder to speak of sounds."""
    file, s = place(args, part), settings(args, part)
    torch.manual_seed(args.seed)
    if part != "0a":
        model, tokenizer = load_backbones(BACKBONES if part == "0c" else place(args, {"0b": "0a", "0d": "0c"}[part]))
    else:
        config = Config.from_preset(args.preset)
        def texts():                                                               # what the tiny template will be asked to spell
            for i in range(4000):
                scene = d.make_scene(i)
                pairs = [("Describe the scene.", d.describe(scene))] + [qa[1:] for qa in d.ask_many(scene, 6, random.Random(i))]
                yield "".join(text for text, _ in d.render(d.as_turns(pairs), "tiny")) + d.describe(scene)
        tokenizer = d.train_tokenizer(texts(), config.text.vocab_size)
        model = CuMo(config)
    if part == "0c":
        model.config.balance_coef = model.config.z_coef = 0.0
        ear = CuMo(Config.from_preset(args.preset)).audio
        add_audio(model, ear, args.seed)
    n_scenes = s["steps"] * s["batch_size"]                                        # every scene once
    if part == "0a":
        choose_trainable(model, ("vision",))
        model.vision.requires_grad_(True)                                          # the contrastive loss reaches the last layer too
        data, trained = Regions(n_scenes, args.seed + 11, tokenizer, model.config), Contrastive(model.vision, model.config.text.vocab_size)
    elif part == "0c":
        data, trained = Sounds(n_scenes, args.seed + 13, tokenizer, model.config), Transcribe(model.audio, model.config.text.vocab_size)
        trained.ear.pos.requires_grad_(False)                                      # sinusoids, as Whisper's
    else:
        choose_trainable(model, ("text",))
        data, trained = Described(n_scenes, args.seed + 12, tokenizer, model.config), TextOnly(model)
    what = {"0a": "tower, contrastively, on captions", "0b": "decoder, on text", "0c": "ear, on descriptions of sounds",
            "0d": "decoder, on text about scenes and sounds"}[part]
    say(f"stage {part}: {what}; {s['steps']} steps of {s['batch_size']}")

    def done(_):
        if RANK == 0:
            save_backbones(model, file, tokenizer)
            for world in {"0b": ("image",), "0d": ("image", "sound", "both")}.get(part, ()):
                generate.print_table(generate.evaluate(model, tokenizer, args.eval_questions, in_words=True, world=world),
                                     f"the decoder alone, on held-out {world} questions in words")
    train(args, part, s, trained, loader(data, s, args, data.collate), device, done)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Stages 1 to 3


def moe_layers(where: str, n_layers: int) -> list[int]:
    """The decoder layers that get experts. MoE-LLaVA compares these placements; every other layer is its choice."""
    half, ranges = n_layers // 2, {"every_other": (0, n_layers, 2), "all": (n_layers,)}
    ranges |= {"first_half": (half,), "second_half": (half, n_layers)}
    try:
        layers = list(range(*ranges[where])) if where in ranges else [int(i) for i in where.split(",")]
    except ValueError:
        raise ValueError(f"--moe-layers {where}: {', '.join(ranges)}, or layer numbers with commas") from None
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < n_layers for i in layers):
        raise ValueError(f"--moe-layers {where}: the decoder has layers 0 to {n_layers - 1}; name each once")
    return layers


def expert_counts(args: Args, n_layers: int, on: bool = True) -> list[int]:
    """Experts of each decoder layer, by --moe-layers and --n-experts."""
    where = args.moe_layers if args.moe_layers is not None else "all" if args.recipe == "uni-moe" else "every_other"
    numbers = [int(n) for n in args.n_experts.split(",")]
    places = moe_layers(where, n_layers)
    if len(numbers) not in (1, len(places)):
        raise ValueError(f"--n-experts {args.n_experts} has {len(numbers)} numbers, --moe-layers {where} are {len(places)} layers")
    counts = dict(zip(places, numbers * (len(places) if len(numbers) == 1 else 1)))
    return [counts.get(i, 0) * on for i in range(n_layers)]


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
        upcycle(model, text=expert_counts(args, c.text.n_layers), **how)
        c.balance_coef, c.z_coef, c.text.aux = 0.01, 0.0, "sum"                    # MoE-LLaVA sums over layers and has no z-loss
    else:
        folders = expert_folders(args)
        folders = folders * int(args.n_experts) if len(folders) == 1 else folders  # "pure copies", the paper's Table 8
        args.n_experts = str(len(folders))
        counts = expert_counts(args, c.text.n_layers)
        if real_routers:
            raise ValueError("--fsdp cannot put experts together: do it first, with `python upcycle.py --experts A,B,C,D --out DIR`, "
                             "and --init DIR")
        upcycle(model, text=counts, **how, experts=folders, average=args.average)
        c.balance_coef, c.z_coef = 0.0, 0.0                                        # the paper has no auxiliary loss; --balance-coef has
    if args.recipe == "moe-llava":
        c.text.capacity_factor, c.text.eval_capacity_factor = args.capacity_factor or None, args.eval_capacity_factor or None
        c.text.noisy = args.noisy_gate


def expert_folders(args: Args) -> list[str]:
    """Uni-MoE's experts: one decoder as stage 1 left it, and one trained for each sense."""
    return args.experts.split(",") if args.experts else [place(args, stage) for stage in (1, *SENSES)]


def run_stage(args: Args, stage: int, source: str, device):
    """Train one stage from a model folder (or a backbones file, or the folders of --vision and --llm) and leave a model folder; measure
    it on held-out scenes."""
    s, began = settings(args, stage), time.time()
    later = [] if args.fsdp and LAUNCHED else None                                # with FSDP weights come last, see `distribute`
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
        expert_counts(args, c.text.n_layers)                                       # wrong ones stop stage 1 already
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


# ---------------------------------------------------------------------------------------------------------------------
# 5. --plan: what a stage will cost, before it costs anything. --bench: how near a step comes to what the device can do

N_SAMPLES = {"cumo": {1: 558_000, 2: 708_000, 3: 1_649_000}, "moe-llava": {1: 558_000, 2: 964_000, 3: 665_000}}       # the papers'


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: sees each operator's results come, and their memory go. `known` ones do not count."""

    def __init__(self, known):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (memory := t.untyped_storage()) not in self.seen:       # a view has its base's
                self.seen.add(memory)
                self.grow(memory.nbytes())
                weakref.finalize(memory, self.grow, -memory.nbytes()).atexit = False
        return out

    def grow(self, n):
        self.now, self.peak = self.now + n, max(self.peak, self.now + n)


@functools.cache
def rehearse(config: str, trains: tuple, lora: tuple, rows: int, length: int, checkpointing: bool, grads: bool, dtype: torch.dtype):
    """A forward and backward pass on meta, where tensors have shapes but no memory -> (bytes that the forward pass leaves for the backward
    pass, the most alive at once), without weights and, with `grads`, gradients that are there before. (torch.compile needs less.)"""
    def attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=False):      # meta would choose the one with the T x T matrix
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = CuMo(Config.from_dict(json.loads(config))).train()
            tokens, images = torch.zeros(rows, length, dtype=torch.long), torch.empty(rows, 3, *[model.config.vision.image_size] * 2)
            audio = torch.empty(rows, model.config.audio.n_mels, model.config.audio.n_frames) if model.config.audio else None
    finally:
        torch.set_default_dtype(usual)
    choose_trainable(model, trains)
    if lora:
        add_lora(model, *lora)
    model.checkpointing(checkpointing)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if grads and p.requires_grad else None
    with Live(t for p in model.parameters() for t in (p, p.grad) if t is not None) as live, \
            mock.patch.object(F, "scaled_dot_product_attention", attention):
        loss = model(tokens, images, audio, labels=tokens).loss
        kept = live.now
        loss.backward()
    return kept, live.peak


def planned(args: Args, s: dict) -> tuple[Config, CuMo]:
    """The preset as a stage trains it, and its model without memory."""
    c = Config.from_preset(args.preset)
    if args.recipe == "cumo":
        e = int(args.n_experts) * s["experts"]
        c.vision.n_experts, c.vision.top_k, c.connector.n_experts, c.connector.top_k = [e] * c.vision.n_layers, args.top_k, e, args.top_k
    else:
        c.text.n_experts, c.text.top_k = expert_counts(args, c.text.n_layers, s["experts"]), args.top_k
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
    kept, top = rehearse(json.dumps(config.to_dict()), tuple(s["trains"]), tuple(s.get("lora", ())), s["micro_batch"], s["max_length"],
                         checkpointing, several or fsdp, torch.bfloat16 if bf16 else torch.float32)
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
        if stage == 0:
            raise ValueError("--plan: stage 0 trains the tiny backbones in minutes; plan 1, 2 or 3")
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
        adapters = {None: (), "ffn": ("text.ffn",), "all": ("text",)}[s.get("lora", [None])[-1]]       # they want W's gradient too
        forward, back = (flops(config, length, n_audio=config.audio is not None, trains=t) for t in (None, (*s["trains"], *adapters)))
        again = {part: forward[part] * (part != "connector" and back[part] > 0) for part in forward}       # the blocks,
        again["text"] = max(0., again["text"] - 2 * length * config.text.dim * config.text.vocab_size)     # not the head
        rows = {part: [*both, sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad),
                       *(work[part] / 1e9 for work in (forward, back, again))] for part, both in count_parameters(model).items()}
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


def as_released(x, r, *weights, **_):
    """In the place of kernels.moe_ffn: the released CuMo's loop over samples and experts."""
    x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
    rows = (x, r) if x.dim() == 3 else (x[None], kernels.Routing(r.weights[None], r.experts[None], r.balance, r.z))
    return kernels.samples_and_experts(*rows, *weights[:6]).view(*x.shape[:-1], -1)


def bench(args: Args, device):
    """Seconds of a step of stage 3, on data that lies in memory. "dense": no experts, FFNs widened until the FLOPs are equal."""
    s, amp = settings(args, 3), functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=device.type == "cuda")
    config, dense, rows = planned(args, s)[0], planned(args, s | {"experts": False})[0], s["micro_batch"]
    torch.manual_seed(args.seed)
    if args.preset == "tiny":
        data = d.Encoded(d.Drawn("chat", rows, args.seed), load_backbones(BACKBONES)[1], "tiny", config.vision.image_size,
                         config.n_image_tokens, s["max_length"])
        batch = {k: v.to(device) for k, v in d.collate([data[i] for i in range(rows)]).items() if torch.is_tensor(v)}
    else:                                                                          # no tokenizer at hand: any words
        words = torch.randint(config.text.vocab_size, (rows, s["max_length"]))
        tokens = words.index_fill(1, torch.arange(config.n_image_tokens), IMAGE)
        images = torch.randn(rows, 3, *[config.vision.image_size] * 2)
        batch = {"tokens": tokens.to(device), "labels": words.to(device), "images": images.to(device)}
    work = lambda c: sum(sum(flops(c, batch["tokens"].shape[1], trains=t).values()) for t in (None, s["trains"])) * rows
    part, at = dense.vision if args.recipe == "cumo" else dense.text, []
    for part.ffn_dim in (1024, 2048):
        at.append(work(dense))
    part.ffn_dim = max(8, 8 * round((1 + (work(config) - at[0]) / (at[1] - at[0])) * 128))

    def steps(name, c):
        with device:
            model = CuMo(c).train()
        choose_trainable(model, s["trains"])
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer, model = torch.optim.AdamW(params, lr=1e-5, fused=device.type == "cuda"), distribute(args, model, device)

        def step(released=False):
            with mock.patch("model.moe_ffn", as_released) if released else nullcontext(), amp(), \
                    torch.compiler.set_stance("force_eager" if released else "default"):
                model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        return {name: step} | ({"as released": functools.partial(step, True)} if name == "experts" else {})
    time_them = functools.partial(kernels._seconds, device=device.type, repeat=args.steps or 5)
    if device.type == "cuda":                                                      # one model after the other: memory is scarce,
        seconds = time_them(steps("experts", config)) | time_them(steps("dense", dense))
    else:                                                                          # in turn: a CPU's speed drifts
        seconds = time_them(steps("experts", config) | steps("dense", dense))
    peak, cores = kernels.matmul_speed(device.type, torch.bfloat16 if device.type == "cuda" else torch.float32), torch.get_num_threads()
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {cores} threads'}, {args.preset}, {rows} samples of "
          f"{batch['tokens'].shape[1]} tokens; matrix products reach {peak / 1e12:.3f} TFLOP/s\n{'step of stage 3':16} {'seconds':>8} "
          f"{'samples/s':>10} {'TFLOP/s':>9} {'of matmul':>10} {'time / dense':>13} {'time / experts':>15}")
    for name, t in seconds.items():
        speed = work(dense if name == "dense" else config) / t
        print(f"{name:16} {t:8.3f} {rows / t:10.2f} {speed / 1e12:9.3f} {speed / peak:10.1%} {t / seconds['dense']:12.2f}x "
              f"{t / seconds['experts']:14.2f}x")


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    if args.plan:
        return plan(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; leave the flag out for the CPU")
    torch.set_float32_matmul_precision(args.matmul)
    if args.matmul == "medium":                                                    # the CPU's flash kernel multiplies small blocks,
        torch.backends.cuda.enable_flash_sdp(False)                                # for which AMX is slow (the switch is the CPU's too)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        kernels.keep_pages()
    if LAUNCHED:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        restarts, store = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), None
        if restarts and os.environ["GROUP_WORLD_SIZE"] == "1":                     # torchrun's store still has the dead ones' addresses,
            store = dist.PrefixStore(f"restart {restarts}", next(dist.rendezvous("env://"))[0])   # and others might wait for them
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK, world_size=WORLD)
        died = torch.tensor(restarts, device=device)                               # each node counts its own
        dist.all_reduce(died, dist.ReduceOp.MAX)
        args.resume |= bool(died)                                                  # torchrun --max-restarts: one died, all begin again
    Config.from_preset(args.preset)                                                # an unknown name stops here
    if args.bench:
        return bench(args, device)
    stages = [args.stage] if args.stage is not None else [0, 1, 2, 3] if args.from_scratch else [1, 2, 3]
    if args.recipe == "uni-moe":
        senses = [2] if args.data else list(SENSES)
        stages = ["0c", "0d"] * (stages[0] == 0) + [stage for n in stages if n for stage in (senses if n == 2 else [n])]
    elif stages[0] == 0:
        stages = ["0a", "0b", *stages[1:]]
    if stages[0] in ("0a", "0c") and args.preset not in DRAWN:
        raise ValueError(f"stage 0 makes the tiny preset's backbones; {args.preset} starts from real weights: --vision DIR --llm DIR")
    if stages[0] in ("0a", "0c") and args.fsdp:
        raise ValueError("stage 0 makes backbones too small to shard: leave --fsdp out")
    began, first = time.time(), stages[0]
    finished = [s for s in stages if os.path.exists(os.path.join(place(args, s), "config.json")) or os.path.isfile(place(args, s))]
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
    if LAUNCHED:
        dist.barrier()
    os.makedirs(args.out, exist_ok=True)
    say(f"nanoCuMo {args.preset} on {WORLD} x {device.type} ({torch.get_num_threads()} threads), torch {torch.__version__}, "
        f"stages {', '.join(map(str, stages))} -> {args.out}")
    for i, stage in enumerate(stages):
        if stages.index(first) > i:
            say(f"stage {stage}: done before")
            continue
        if number(stage) == 0:
            pretrain(args, stage, device)
        else:
            if args.preset not in DRAWN and stage == 1 and not (args.init or args.vision):
                raise ValueError(f"{args.preset} starts from pre-trained weights: give --vision CLIP_DIR and --llm LLM_DIR, or --init")
            shipped = HEARING if args.recipe == "uni-moe" else BACKBONES
            before = shipped if stage == 1 and i == 0 else place(args, stages[i - 1] if i else number(stage) - 1)
            if args.recipe == "uni-moe" and stage != 1:                            # each from stage 1's; dense, stage 3 from the last
                before = expert_folders(args)[-1 if args.dense else 0] if stage == 3 else place(args, 1)
            run_stage(args, stage, args.init if args.init and i == 0 else before, device)
    if RANK == 0:
        draw_curves(os.path.join(args.out, "log.jsonl"), os.path.join(args.out, "loss.png"))
        last = os.path.normpath(place(args, stages[-1]))
        hint = f" Try:\n  python generate.py --model {last} --image X.png --prompt \"What color is the circle?\""
        say(f"done in {(time.time() - began) / 60:.1f} minutes. {args.out} holds what was trained, log.jsonl and pictures."
            + hint * (stages[-1] not in ("0b", "0d")))
    if LAUNCHED:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:                                             # one line, without a loading process's traceback
        sys.exit(f"train.py: {str(e).rsplit('ValueError: ', 1)[-1].strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
