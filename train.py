"""train.py: train a CuMo, from pre-trained backbones to answers about pictures.

    python train.py              the default: preset tiny, drawn data, minutes on a CPU
    python train.py --resume     go on after Ctrl-C or a crash, exactly (with --out, if it had one)
    python train.py --help       all flags, in groups

One stage on data of your own (in LLaVA's format); one of a real model; and what one would cost:

    python train.py --stage 3 --init DIR --data FILE.json --images DIR
    torchrun --nproc_per_node 8 train.py --preset cumo-mistral-7b --stage 1 \\
        --vision CLIP_DIR --llm MISTRAL_DIR --data FILE.json --images DIR
    python train.py --preset cumo-mistral-7b --stage 3 --gpus 8 --fsdp --checkpointing --plan

Each of the three stages begins with the folder that the stage before it left:

    stage 1   pre-training: the connector alone learns to make image patches read like words
    stage 2   pre-finetuning: everything trains, still dense, on captions
    stage 3   instruction tuning: FFNs of tower and connector are copied into experts, and
              everything trains on questions

--recipe moe-llava and --recipe uni-moe have other rows for these stages (section 4). A run writes
to --out: run.json (its flags, and which stages are done), checkpoint/, stage1/, stage2/, at last
the model itself, and log.jsonl, loss.png and (of drawn scenes) scores.jsonl and routing.png.
`torchrun --max-restarts 3 ... train.py` goes on by itself after a process died.
"""
from __future__ import annotations

import argparse
import atexit
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
import weakref
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows has none

# On a busy machine, OpenMP's threads spin for ages while they wait for each other. Let them give up
# sooner. libgomp reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_state_dict)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torch.utils.flop_counter import flop_registry, shape_wrapper
from tqdm import tqdm

import data
import generate
from data import N_FACTS, TEMPLATES
from model import (IGNORE, PAD, PRESETS, Config, Connector, CuMo, MoE, SenseBlock, add_lora,
                   choose_trainable, count_parameters, merge_state, part_parameters, plain_name,
                   total_loss)
from upcycle import (assemble, copy_into_shard, expert_counts, load, load_backbones, read_json,
                     read_scales, save, upcycle, write_json)

# Throughout: args is an Args (section 5), stage a Stage (section 1), device a torch.device. A
# stage's name is 1, 2 or 3; Uni-MoE's are also called "2 sound" and so on.

# Set by torchrun. A single process that torchrun started forms a group, too.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ

# ------------------------------------------------------------------------------------------------
# 1. CuMo's recipe: the paper's values (section 4.1 and the released scripts), for the 7B presets


@dataclass
class Stage:
    """What trains, on what, and how. Presets and flags change these values (see `settings`)."""
    trains: tuple = ()            # parts of the model
    kind: str = "caption"         # of drawn samples: captions, questions ("chat"), see data.Drawn
    template: str | None = None   # how a conversation is written; None: as the model knows
    lr: float = 1e-3              # the learning rate at its peak
    batch_size: int = 64          # samples a step, over all processes
    max_length: int = 2048        # tokens of a sample, those of images included
    routing_losses: bool = True   # do the routers' losses count?
    lora: list | None = None      # adapters on the decoder: [rank, alpha, "ffn" or "all"]
    steps: int | None = None      # None: one epoch of --data
    name: int | str = 0           # this one and the next three are filled in by `settings`
    part_lrs: dict = field(default_factory=dict)  # parts whose peak is another one
    has_experts: bool = False
    micro_batch: int = 1          # samples in one forward pass of one process
    checksum: str | None = None   # of --data, filled in by `load_samples`


EVERYTHING = ("vision", "connector", "text")
CUMO_STAGES = {
    #        trains, drawn samples, template, learning rate, batch, tokens
    1: Stage(("connector",), "caption", "plain", 1e-3, 256, 2048, routing_losses=False),
    2: Stage(EVERYTHING, "caption", None, 2e-6, 128, 4096, routing_losses=False),
    3: Stage(EVERYTHING, "chat", None, 4e-6, 256, 4096),
}
# Stage 3 begins by making the experts: 4 in each layer of tower and connector, of which a token
# goes to 2 (--upcycle-at, --experts-in, --n-experts, --top-k).


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to zero."""
    n_warm = max(1, round(steps * warmup))
    if step < n_warm:
        return peak * (step + 1) / n_warm
    done = (step - n_warm) / max(1, steps - n_warm)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


# ------------------------------------------------------------------------------------------------
# 2. The loop


def train(args, stage, model, batches_from, device, later=(), held_out=()):
    """Train for stage.steps steps -> the whole weights (on process 0), and whether to stop now.

    model(**batch).parts is {name of a loss: its value}. batches_from(first) gives micro-batches
    without end, from step `first` on. later: weights that FSDP fills in. held_out: data to measure
    only.
    """
    # wrapped: the model inside DDP or FSDP, or itself. experts: those that are dealt out, if any.
    experts, wrapped, optimizer = set_up(args, stage, model, device, later)
    first, counts = resume(args, stage, model, optimizer, experts)  # 0 and zeros in a new run
    n_micro = stage.batch_size // (stage.micro_batch * WORLD)
    coefs = routing_coefs(stage, model)

    # While the device computes a step, a thread reads the next one's micro-batches. (iter() draws a
    # random number: here it is before the seeds of all steps.)
    data_of_steps = read_ahead(iter(batches_from(first)), n_micro, stage.steps - first)
    note_flags(args)  # what could be refused has been
    with (closing(Log(args.out, stage, first)) as log, catch_signals() as signals,
          closing(data_of_steps)):
        for step in range(first, stage.steps):
            begin = time.perf_counter()
            lr = set_lr(optimizer, step, stage.steps, args.warmup)
            # Random numbers depend on seed, step and process alone, so a resumed run draws what the
            # whole one would have drawn. (Of CuMo's parts none draws any; --noisy-gate does.)
            torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)

            # 1. Data. What does not fit into memory at once comes as several micro-batches. The
            #    losses will be means over the labels and images of all of them, in all processes,
            #    so these are counted first. (Ctrl-C is counted, too: where one process is told to
            #    stop, all stop behind the same step.)
            micro_batches = next(data_of_steps)
            waited = time.perf_counter() - begin
            totals = count(micro_batches, len(signals), device)
            add_to_counts(counts, totals, stage.batch_size)

            # 2. Forward and backward.
            if args.cuda_graphs:
                zero_replayed_gradients(model)
            losses, loads = compute_gradients(model, wrapped, micro_batches, totals, coefs, device)

            # 3. Clip the gradients; then look at the numbers, which is to wait for the device.
            norm = clip_gradients(model, experts, args.grad_clip)
            apart = experts_apart(model)
            losses, loads, apart, norm = to_numbers(losses, loads, apart, norm)
            losses["loss"] = total_loss(losses, *coefs)

            # 4. Step, unless something is not finite: one bad batch must not poison the weights.
            if math.isfinite(losses["loss"]) and math.isfinite(norm):
                optimizer.step()
                counts["skipped in a row"] = 0
            else:
                skip_step(args, stage, step, losses["loss"], norm, counts)
            optimizer.zero_grad(set_to_none=True)

            # 5. Log; now and then also the loss on held-out data.
            log.write(step, losses, loads, apart, lr, norm, totals.images, begin, waited)
            is_best = measure_held_out(args, stage, model, wrapped, held_out, log, step, counts)

            # 6. Save, now and then and at Ctrl-C. After the last step the model itself is saved.
            stop = totals.signals > 0
            if step < stage.steps - 1 and (stop or is_best or (step + 1) % args.save_every == 0):
                write_checkpoint(args, stage, model, optimizer, experts, step + 1, counts)
                if stop:
                    stop_run(args, stage, step + 1)

    log.report(counts, args.compile)
    return_to_best(args, stage, model, optimizer, experts, counts)
    return gather_weights(model, experts), stop or len(signals) > 0


def compute_gradients(model, wrapped, micro_batches, totals, coefs, device):
    """Forward and backward -> the step's losses, and each expert's share of the first choices.

    wrapped: the model inside DDP or FSDP, or the model itself.
    """
    losses = defaultdict(float)
    loads = {}
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        with exchange_gradients(wrapped, is_last), autocast(device):
            out = wrapped(**inputs(model, batch, device))
            # How much of the step's batch, over all processes, is this micro-batch?
            portions = {term: portion_of(term, batch, totals, len(micro_batches))
                        for term in out.parts}
            # Not out.loss, which takes the micro-batch for all of the batch.
            loss = total_loss(out.parts, *coefs, portions)
            # backward() adds to the gradients of the micro-batches before. The losses of all
            # processes are portions of one sum, too. But DDP and FSDP take the mean of their
            # gradients, so multiply by the number of processes.
            (loss * WORLD).backward()
        for term, value in out.parts.items():
            losses[term] += portions[term] * value.detach()
        add_loads(loads, out, portions)
    return losses, loads


# ------------------------------------------------------------------------------------------------
# 3. A stage, and the program


def run_stage(args, name, source, device):
    """Train one stage from the model in `source`, and leave a model folder."""
    stage = settings(args, name)
    torch.manual_seed(args.seed)  # the same new weights in every process

    # 1. The model. With FSDP most of its weights come `later`, as no process could hold them all.
    later = [] if args.fsdp else None
    model, tokenizer = load_model(args, stage, source, later)

    # 2. Its experts, and what trains.
    if stage.has_experts:
        make_experts(args, model)
    apply_flags(args, stage, model)
    choose_trainable(model, stage.trains)
    if stage.lora:
        add_lora(model, *stage.lora, args.seed, real=args.fsdp)
    if not args.fsdp:
        model.to(device)

    # 3. The data.
    samples, order, held_out = load_samples(args, stage, model.config, tokenizer)
    batches_from = make_loader(samples, stage, args, choose_collate(args, stage), order)

    # 4. Train, and save the model.
    print_stage(args, stage, model, source)
    weights, stopped = train(args, stage, model, batches_from, device, later or (), held_out)
    if RANK == 0:
        save(model, result_path(args, name), tokenizer, merge_state(weights, model))
    finish_stage(args, stopped)


def main(argv=None):
    args = parse(argv)
    try:
        if args.plan:
            plan(args)
        else:
            run_stages(args)
    finally:
        unlock_folder()  # --out is free for another run


def run_stages(args):
    """Train and measure the stages, one after the other."""
    start = time.time()
    device = join_processes(args, prepare_device(args))

    # A resumed run skips what is done. A new one does not write over an old one.
    stages = stages_of(args)
    trained, measured = stages_done(args, stages)
    begin_run(args, measured)
    say(f"nanoCuMo {name_of_model(args)} on {WORLD} x {device.type} ({torch.get_num_threads()} "
        f"threads), torch {torch.__version__}, stages {', '.join(map(str, stages))} -> {args.out}")

    # Each stage begins with what the one before it left on the disk.
    for name in stages:
        began = time.time()
        if name in trained:
            say(f"stage {name}: done before")
        else:
            run_stage(args, name, source_of(args, name, stages), device)
        if name not in measured:
            measure_stage(args, name, device, began)

    say(f"done in {(time.time() - start) / 60:.1f} minutes. {args.out} holds what was trained, "
        f"log.jsonl and pictures. Try:\n  {next_command(args, stages[-1])}")
    leave_processes()


# ---- You can stop here on a first reading. Below this line: the other recipes and all flags (4,
# 5), what the loop and a stage call (6, 7, 8), checkpoints (9), several processes (10), what a run
# would cost (11), and the checks of flags (12). ----

# ------------------------------------------------------------------------------------------------
# 4. The other recipes, and what presets change

# MoE-LLaVA (arXiv 2401.15947, section 3.3): the connector; then a dense LLaVA; then the decoder's
# FFNs become experts. Its paper trains the layers with experts then ("text.moe"); its released
# scripts, which this follows, all FFNs of the decoder and the connector.
MOE_LLAVA_STAGES = {
    1: CUMO_STAGES[1],
    2: Stage(("connector", "text"), "chat", None, 2e-5, 128, 2048),
    3: Stage(("connector", "text.ffn"), "chat", None, 2e-5, 128, 2048),
}
# Uni-MoE (arXiv 2405.11273, section 3.3) also hears: the connectors of both senses; then one set of
# FFNs for each sense, each apart, by LoRA; then these are the experts of one decoder.
UNI_MOE_STAGES = {
    1: Stage(("connector", "resampler"), "mixed caption", "plain", 2e-5, 32, 2048,
             routing_losses=False),
    2: Stage((), "chat", None, 4e-5, 16, 2048, routing_losses=False, lora=[64, 16, "ffn"]),
    3: Stage(("connector", "resampler", "text.router"), "mixed chat", None, 4e-5, 16, 2048,
             lora=[8, 16, "all"]),
}
RECIPES = {"cumo": CUMO_STAGES, "moe-llava": MOE_LLAVA_STAGES, "uni-moe": UNI_MOE_STAGES}

# Models two thousand times smaller want larger steps, and fewer.
TINY = {
    1: dict(lr=2e-3, batch_size=64, steps=100, max_length=256),
    2: dict(lr=5e-4, batch_size=64, steps=120, max_length=256),
    3: dict(lr=5e-4, batch_size=64, steps=300, max_length=256),
}
TINY_MOE_LLAVA = {
    1: TINY[1],
    2: TINY[3],  # it learns from questions already, as CuMo's stage 3 does
    3: dict(lr=3e-4, batch_size=64, steps=200, max_length=256),
}
TINY_UNI_MOE = {
    1: dict(lr=2e-3, batch_size=64, steps=200, max_length=352),
    2: dict(lr=2e-3, batch_size=64, steps=200, max_length=352),
    3: dict(lr=1e-3, batch_size=64, steps=300, max_length=352),
}
# What one GPU trains. nanoVLM (github.com/huggingface/nanoVLM, models/config.py) trains all parts
# at once, at one rate for the connector and another one for the backbones: 2e-3 and 1e-4 in v0.1
# (222M, batches of 256), 3e-3 and 5e-5 in v0.2 (128), 5e-3 and 5e-5 later. Nobody has tuned these
# values for experts. The micro-batches are for 24 GB (stage 3 of Qwen3's with --checkpointing).
SMOL = {
    1: dict(lr=2e-3, batch_size=256, micro_batch=32, max_length=256),
    2: dict(lr=1e-4, batch_size=128, micro_batch=8, max_length=1024),
    3: dict(lr=5e-5, batch_size=128, micro_batch=8, max_length=1024),
}
QWEN3 = {
    1: dict(lr=2e-3, batch_size=256, micro_batch=8, max_length=256),
    2: dict(lr=5e-5, batch_size=128, micro_batch=2, max_length=1024),
    3: dict(lr=2e-5, batch_size=128, micro_batch=2, max_length=1024),
}
PRESET_VALUES = {
    ("cumo", "tiny"): TINY,
    ("cumo", "cumo-smol"): SMOL,
    ("cumo", "cumo-qwen3"): QWEN3,
    ("cumo", "cumo-mixtral-8x7b"): {3: dict(lr=2e-6)},  # from its released script
    ("moe-llava", "tiny"): TINY_MOE_LLAVA,
    ("uni-moe", "uni-moe-tiny"): TINY_UNI_MOE,
}

# Without --preset, the values go by the model's activated parameters (`fit_to_size`). Models of a
# few million take the tiny preset's; from a billion on, the recipe's own, the papers' for 7B. In
# between, stage 1 is as there: LLaVA-1.5 and TinyLLaVA (arXiv 2402.14289) train a new connector
# with 1e-3, around 13B and around 1B. But where everything trains, small models want more than
# CuMo's 2e-6: nanoVLM (github.com/huggingface/nanoVLM, models/config.py), of a SigLIP and a SmolLM2
# of 0.1 and 0.4B, gives tower and decoder 5e-5.
SIZES = {"tiny": 20e6, "small": 1e9}  # below so many
PRESET_VALUES["cumo", "small"] = {2: dict(lr=5e-5), 3: dict(lr=5e-5)}

# In the drawn world, Uni-MoE's stage 2 runs three times: for images, for sounds, and for both.
SENSES = {"2 image": "chat", "2 sound": "sound chat", "2 both": "both chat"}
# What a stage leaves in --out. The last one leaves the model itself.
FOLDERS = {1: "stage1", 2: "stage2", 3: "", "2 image": "stage2-image", "2 sound": "stage2-sound",
           "2 both": "stage2-both"}

# The presets of the drawn world, and their pre-trained backbones (made by assets/backbones.py).
DRAWN = ("tiny", "uni-moe-tiny")
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
BACKBONES = os.path.join(ASSETS, "tiny-backbones.safetensors")
HEARING = os.path.join(ASSETS, "uni-moe-tiny-backbones.safetensors")

# ------------------------------------------------------------------------------------------------
# 5. Flags

PARTS = ("vision", "connector", "audio", "resampler", "text", "text.ffn", "text.moe", "text.router")
# Groups of flags in --help. Each begins at the flag that is named here.
GROUPS = {
    "preset": ("model", "what is trained, and from which weights"),
    "data": ("data", "what it learns from"),
    "trains": ("optimisation", "how it learns; where no default is given, it is the stage's"),
    "dense": ("experts", "which FFNs become experts, and how tokens are sent to them"),
    "device": ("running", "on what it runs; several processes are started by torchrun"),
    "plan": ("planning", "what a run would cost, before it costs anything"),
}


def flag(default, help: str, **limits):
    """A field of Args: a flag, and what `validate` reads.

    at_least, above, at_most, choices: the values that will do; parts: the same, of a list with
    commas. Where the flag would do nothing, it is refused: belongs_to names another flag that must
    be given too (or one of several), not_with one that must not be given, recipes those that know
    it, and with of_experts there must be a stage with experts. read: the function that reads the
    flag's text, or raises ValueError.
    """
    return field(default=default, metadata={"help": help, **limits})


def read_rates(text):
    """--lr: "2e-5" -> {"others": 2e-5}, "text=2e-5,connector=1e-3" -> {"text": 2e-5, ...}."""
    if text is None:
        return {}
    rates = {}
    for item in text.split(","):
        part, _, number = item.rpartition("=")
        part = part or "others"
        if part not in (*PARTS, "others"):
            raise ValueError(f"--lr {text}: {part!r} is no part; known are {', '.join(PARTS)}")
        if part in rates:
            raise ValueError(f"--lr {text}: gives {part} two learning rates")

        try:
            rates[part] = float(number)
        except ValueError:
            rates[part] = math.nan
        if not 0 <= rates[part] < math.inf:
            raise ValueError(f"--lr {text}: {number!r} is no learning rate; give one (2e-5), or "
                             "one for each part that you name (connector=1e-3,text=2e-5)")
    return rates


def files_and_weights(texts):
    """--data: ["a.json:3", "b.json:1"] -> (["a.json", "b.json"], [3.0, 1.0]). Without weights these
    are None."""
    files = []
    weights = []
    for text in texts:
        file, colon, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan

        # A colon may belong to the name.
        is_name = math.isnan(weight) and not os.path.exists(file)
        if not colon or is_name or os.path.exists(text):
            files.append(text)
            continue

        if not 0 < weight < math.inf:
            raise ValueError(f"--data {text}: {number!r} is no weight; give one above 0, as in "
                             f"{file}:2")
        files.append(file)
        weights.append(weight)

    if weights and len(weights) < len(files):
        raise ValueError(f"--data {' '.join(texts)}: give each file a weight, or none")

    # What is held out of the one would be learnt from the other.
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"--data {' '.join(texts)}: names a file twice; give it once, with a "
                         "larger weight")
    return files, weights or None


@dataclass
class Args:
    given = {}  # no flag: those that the user gave, also when the run began, and their values

    preset: str = flag(
        "tiny", "model sizes, and the hyperparameters that go with them: " + ", ".join(PRESETS)
        + "; with weights of your own, leave it out: sizes and template come from their folders, "
        "and the hyperparameters by the model's size")
    recipe: str | None = flag(
        None, "cumo: experts in tower and connector; moe-llava: in the decoder; uni-moe: "
        "in the decoder, trained apart, for images and sounds; default: the preset's",
        choices=tuple(RECIPES))
    stage: int | None = flag(None, "run this stage only (1 to 3); default: 1, 2 and 3")
    vision: str | None = flag(
        None, "stage 1 of a real model: CLIP or SigLIP folder or hub name, for the tower")
    llm: str | None = flag(
        None, "stage 1 of a real model: folder or hub name of the language model; its tokenizer "
        "says which chat template it knows")
    scales: str | None = flag(
        None, "stage 1 of a real model: S2 scales at which it reads an image; 1,3: also three "
        "times enlarged, in 9 crops (default: the preset's, or 1)", read=read_scales,
        belongs_to=("vision",))
    audio: str | None = flag(
        None, "uni-moe's stage 1: folder or hub name of Whisper, for hearing",
        recipes=("uni-moe",), belongs_to=("vision",))
    pixel_shuffle: int | None = flag(
        None, "a new model's tokens are so many by so many patches each: 2 makes a quarter of the "
        "tokens; default: the preset's", at_least=1)
    init: str | None = flag(
        None, "model folder to start from, of any layout; default: what the stage before "
        "left in --out")
    out: str | None = flag(
        None, "folder for the model, checkpoints, log and pictures (default: out/PRESET; without a "
        "preset, out/ and the name of --llm)")
    resume: bool = flag(
        False, "go on with the run in --out, exactly, and with its flags; those of speed and "
        "memory may be given anew")

    data: list | None = flag(
        None, "train on these LLaVA .json or .jsonl files instead of the drawn scenes. Several are "
        "joined; or mixed, with a weight behind each: a.json:3 b.json:1 draws three samples of "
        "four from a.json. An epoch then still has as many samples as the files together, but "
        "those of a small file with a large weight come several times", metavar="FILE[:WEIGHT]",
        read=files_and_weights)
    images: str = flag(
        "", "folder that the paths in all --data files (sounds and videos too) are relative to, "
        "as LLaVA's --image_folder", belongs_to=("data",))
    val: str | None = flag(
        None, "another such file, on which the loss is measured but nothing learnt",
        belongs_to=("data",), not_with="val_fraction")
    val_fraction: float | None = flag(
        None, "hold out this share of --data for that (0.02: every fiftieth, by chance)",
        above=0, at_most=0.9, belongs_to=("data",))
    val_every: int | None = flag(
        None, "steps between two such measurements; one more follows the last step; default: "
        "--save-every", at_least=1, belongs_to=("val", "val_fraction", "facts"))
    keep_best: bool = flag(
        False, "save the weights of the measurement with the lowest loss on held-out data, not the "
        "last ones; every measurement that is better than all before writes a checkpoint",
        belongs_to=("val", "val_fraction", "facts"))
    facts: int | None = flag(
        None, "learn the names of so many pictures instead of the drawn scenes: how much can the "
        "model hold? (data.Facts)", at_least=1, at_most=N_FACTS, not_with="data")
    template: str | None = flag(
        None, "chat template: " + ", ".join(TEMPLATES) + "; default: plain in stage 1, then the "
        "one whose marks the decoder's tokenizer knows", choices=tuple(TEMPLATES))
    max_length: int | None = flag(
        None, "longest sample in tokens, image slots included; default: the stage's",
        at_least=1)
    pack: bool = flag(
        False, "put several short samples in one row of up to --max-length tokens, each blind to "
        "the others: the same losses with hardly any padding. A batch still counts samples, and "
        "is drawn without regard to their length")
    frames_apart: bool = flag(
        False, "take the frames of a video for images of their own, instead of one image "
        "with their mean features")
    strict: bool | None = flag(
        None, "stop at the first broken sample instead of replacing it (over 1%% broken "
        "stops in any case)")
    workers: int = flag(0, "processes that load data; 0 loads in a thread", at_least=0)
    eval_questions: int = flag(
        1200, "held-out questions after the last stage (a quarter of them after the "
        "others)", at_least=1, not_with="data")

    trains: str | None = flag(
        None, "parts that train, with commas: " + ", ".join(PARTS) + " (the "
        "decoder's FFNs; its layers with experts; its routers), or none (but adapters); in a run "
        "of all stages, this holds in those with experts", parts=(*PARTS, "none"))
    steps: int | None = flag(
        None, "optimizer steps; default: the stage's, or one epoch of --data",
        at_least=1, at_most=10**7)
    epochs: int = flag(
        1, "passes over --data, when --steps is not given", at_least=1, at_most=10**6,
        belongs_to=("data",), not_with="steps")
    batch_size: int | None = flag(
        None, "samples per step, over all processes", at_least=1, at_most=10**6)
    micro_batch: int | None = flag(
        None, "samples per process in one forward pass; the rest of a batch is "
        "accumulated", at_least=1)
    lr: str | None = flag(
        None, "peak learning rate, between a linear warm-up and a cosine to zero: of all that "
        "trains (2e-5); or of parts, named as for --trains (connector=1e-3,text=2e-5), while the "
        "others keep the stage's; the narrower name holds (text=1e-5,text.router=1e-4)",
        read=read_rates)
    warmup: float = flag(0.03, "share of the steps that warms up", at_least=0, at_most=1)
    weight_decay: float = flag(0.0, "weight decay of AdamW, on matrices alone", at_least=0)
    grad_clip: float = flag(1.0, "largest gradient norm; inf: any", above=0, at_most=math.inf)
    seed: int = flag(0, "of new weights, data order and drawn scenes", at_least=0)
    lora_rank: int | None = flag(
        None, "train adapters of this rank on the decoder instead of the weights themselves, and "
        "merge them at the end; 0: none; default: the stage's (uni-moe: 64, then 8)", at_least=0)
    lora_alpha: float | None = flag(
        None, "adapters count alpha / rank (default: 16)", above=0)

    dense: bool = flag(False, "make no experts in stage 3: the comparison")
    upcycle_at: int = flag(3, "the stage that turns FFNs into experts",
                           choices=(1, 2, 3), recipes=("cumo", "moe-llava"),
                           of_experts=True)
    n_experts: str = flag(
        "4", "experts in each FFN that is upcycled; of moe-llava's decoder also one number for "
        "each of --moe-layers: 4,2,4", of_experts=True)
    experts_in: str | None = flag(
        None, "parts whose FFNs become experts: vision, connector, text, with commas; default: "
        "vision,connector", parts=("vision", "connector", "text"), recipes=("cumo",),
        of_experts=True)
    top_k: int = flag(
        2, "experts that each token is sent to; with 1, an expert counts as much as its "
        "probability, so upcycling changes the output at first", of_experts=True)
    moe_layers: str | None = flag(
        None, "decoder layers that get experts: every_other (moe-llava's), all "
        "(uni-moe's), first_half, second_half, or 0,3,5",
        recipes=("moe-llava", "uni-moe"), of_experts=True)
    balance_coef: float | None = flag(
        None, "weight of the load-balancing losses (CuMo: 0.1, MoE-LLaVA: 0.01)", at_least=0)
    z_coef: float | None = flag(
        None, "weight of the router z-losses (CuMo: 0.01, MoE-LLaVA: 0)", at_least=0)
    capacity_factor: float | None = flag(
        1.5, "moe-llava: expert slots in training, over an even share of the choices; "
        "0: drop nothing", at_least=0, recipes=("moe-llava",), of_experts=True)
    eval_capacity_factor: float | None = flag(
        2.0, "moe-llava: the same outside training", at_least=0, recipes=("moe-llava",),
        of_experts=True)
    noisy_gate: bool = flag(
        False, "moe-llava: choose the second expert with Gumbel noise while training, "
        "as DeepSpeed does", recipes=("moe-llava",), of_experts=True)
    experts: str | None = flag(
        None, "uni-moe's stage 3: model folders with commas; the FFNs of each become "
        "one expert. A single one is copied. Default: the drawn stages' four",
        recipes=("uni-moe",))
    average: bool = flag(
        False, "uni-moe's stage 3: take what is not FFN from the mean of --experts, not "
        "from the first", recipes=("uni-moe",), of_experts=True)

    device: str | None = flag(
        None, "cuda or cpu; default: cuda where there is one", choices=("cuda", "cpu"))
    matmul: str = flag(
        "highest", "float32 matrix products: highest; high: a GPU's in TF32; medium: a CPU's in "
        "bfloat16 where it can (AMX), a third faster", choices=("highest", "high", "medium"))
    compile: bool | None = flag(
        None, "torch.compile the blocks; default: on CUDA, but not for the tiny presets "
        "(a short run ends before it pays)")
    cuda_graphs: bool | None = flag(
        None, "record the kernels of the tower's blocks once and replay them: faster where the "
        "CPU cannot launch them in time; wants the same number of pictures in each micro-batch")
    checkpointing: bool | None = flag(
        None, "activation checkpointing: less memory, a third more arithmetic")
    fsdp: bool | None = flag(
        None, "with torchrun: shard weights, gradients and optimizer over the "
        "processes (FSDP2) instead of DDP")
    expert_parallel: int = flag(
        1, "with torchrun: deal the experts out to groups of so many processes; tokens "
        "travel to them", at_least=1)
    save_every: int = flag(200, "steps between checkpoints", at_least=1)

    plan: bool = flag(
        False, "train nothing: print parameters, arithmetic, memory on each GPU and "
        "GPU-hours of --stage (or of all)")
    gpus: int = flag(
        1, "plan for this number of GPUs (with --fsdp, --checkpointing or without, as "
        "given)", at_least=1, belongs_to=("plan",))
    gpu_gb: int = flag(80, "memory of each GPU, in GB", at_least=1, belongs_to=("plan",))
    peak_tflops: float = flag(
        989.0, "what a GPU could do at best (an H100's dense bfloat16)", above=0,
        belongs_to=("plan",))
    mfu: float = flag(0.4, "the share of it that training reaches", above=0, at_most=1,
                      belongs_to=("plan",))


# A resumed run may change how it computes, not what. All flags but these, and all values of the
# stage but its micro-batch, must be as they were when the checkpoint was written. (Where a decoder
# has experts, its balance loss and its capacity go by micro-batches: there, micro_batch and the
# number of processes change the numbers a little.)
FREE = {"out", "resume", "images", "val_every", "strict", "workers",
        "eval_questions", "micro_batch", "device", "compile", "cuda_graphs", "checkpointing",
        "fsdp", "expert_parallel", "save_every", "plan", "gpus", "gpu_gb", "peak_tflops", "mfu"}


def parse(argv=None):
    """Flags -> Args. There is a flag for each field."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    for f in dataclasses.fields(Args):
        if f.name in GROUPS:
            group = parser.add_argument_group(*GROUPS[f.name])
        add_flag(group, f)
    # Only what the user gives is in here, so that it can be told from a default.
    given = vars(parser.parse_args(argv))
    args = fill_in(given)
    if args.resume:
        args = fill_in(flags_of_run(args.out, given))
    try:
        validate(args)
    except ValueError as e:
        # Of a run that an earlier version began, when it did not refuse that.
        if args.resume and os.path.exists(run_file(args.out)):
            raise ValueError(f"{e} (or out of {run_file(args.out)}, where the run's flags stand)"
                             ) from None
        raise
    return args


def fill_in(given):
    """{field: value} -> Args, with the defaults that depend on other flags."""
    args = Args(**given)
    args.given = given
    if args.recipe is None:
        # uni-moe of uni-moe-7b; of most presets, CuMo's.
        named = [recipe for recipe in RECIPES if args.preset.startswith(recipe)]
        args.recipe = named[0] if named else "cumo"
    if args.recipe == "uni-moe" and args.preset == "tiny":
        args.preset = "uni-moe-tiny"  # with an ear
    if args.out is None:
        name = name_of_model(args)
        if name in DRAWN and args.recipe != "cumo":
            name = args.recipe
        args.out = os.path.join("out", name)
    args.out = os.path.normpath(args.out)  # else "out/tiny/" would be moved to "out/tiny/.1"
    return args


def name_of_model(args):
    """The preset's name; without one, that of the decoder's folder, if there is one."""
    if args.llm and "preset" not in args.given:
        return os.path.basename(os.path.normpath(args.llm))
    return args.preset


def add_flag(group, f):
    text = f.metadata["help"]
    if f.type == "bool":
        how = {"action": "store_true"}
    elif f.type == "bool | None":
        # It may be on, off (--no-compile), or not given.
        how = {"action": argparse.BooleanOptionalAction}
    elif f.type == "list | None":
        how = {"nargs": "+", "action": "extend", "metavar": f.metadata["metavar"]}
    else:
        how = {"type": kind_of(f)}
        if f.default not in (None, ""):
            text += f" (default: {f.default})"
    group.add_argument(flag_name(f.name), default=argparse.SUPPRESS, help=text, **how)


def kind_of(f):
    """The type of a flag's values. The annotation of a field is a text: "int", or "int | None"."""
    kinds = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
    return kinds[f.type.removesuffix(" | None")]


def flag_name(name):
    return "--" + name.replace("_", "-")


def stage_number(name):
    """1 -> 1, "2 sound" -> 2."""
    return int(str(name)[0])


def settings(args, name, world=None, preset=None):
    """The values of a stage: the recipe's; over them the preset's; over both the flags.

    world: the number of processes, if not those of this run. preset: one of SIZES, if there is no
    other preset.
    """
    # A copy, since the row itself belongs to all runs.
    preset = preset or args.preset
    number = stage_number(name)
    of_preset = PRESET_VALUES.get((args.recipe, preset), {}).get(number, {})
    stage = dataclasses.replace(RECIPES[args.recipe][number], name=name, **of_preset)
    stage.kind = SENSES.get(name, stage.kind)
    for value in ("steps", "batch_size", "max_length", "template"):
        if getattr(args, value) is not None:
            setattr(stage, value, getattr(args, value))
    stage.part_lrs = read_rates(args.lr)
    stage.lr = stage.part_lrs.pop("others", stage.lr)

    # Uni-MoE's experts are trained apart in stage 2, so there they always come in stage 3.
    # Routers that a model brings along (a Mixtral's) are left alone until experts are made.
    begins_at = 3 if args.recipe == "uni-moe" else args.upcycle_at
    stage.has_experts = number >= begins_at and not args.dense
    stage.routing_losses = stage.routing_losses or stage.has_experts

    # In a run of all stages, these flags are about those with experts.
    is_meant = stage.has_experts or args.stage is not None
    if is_meant and {"balance_coef", "z_coef"} & set(args.given):
        stage.routing_losses = True
    if args.trains and is_meant:
        stage.trains = tuple(part for part in args.trains.split(",") if part != "none")
    stage.lora = choose_lora(args, stage.lora, is_meant)
    if stage.lora and not args.trains:
        # Adapters instead of the decoder's weights: of these, none but the routers.
        stage.trains = tuple("text.router" if part == "text" else part for part in stage.trains)
    # Uni-MoE's stage 2 trains adapters on the decoder's FFNs; without them, the FFNs themselves.
    if not stage.trains and not stage.lora and args.trains is None:
        stage.trains = ("text.ffn",)

    # Tiny models take their whole share of a batch at once, 7B ones four samples.
    share = max(1, stage.batch_size // (world or WORLD))  # samples of one process in a step
    usual = share if preset in DRAWN else of_preset.get("micro_batch", 4)
    stage.micro_batch = min(args.micro_batch or usual, share)
    return stage


def choose_lora(args, lora, is_meant):
    """The stage's adapters, as the flags change them: [rank, alpha, which weights], or None."""
    rank, alpha, which = lora or (0, 16, "all")
    if args.lora_rank is not None and (lora or is_meant):
        rank = args.lora_rank
    if not rank:
        return None
    return [rank, args.lora_alpha or alpha, which]


# ------------------------------------------------------------------------------------------------
# 6. What the loop calls


def say(text):
    """Print on process 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def wait_for_all():
    """All processes go on together."""
    if LAUNCHED:
        dist.barrier()


def sum_over_processes(tensor, device):
    """-> the sum; on the device, unless there is only this process."""
    if LAUNCHED:
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor


def set_up(args, stage, model, device, later):
    """-> the experts that are dealt out (if any), the module to call, and its optimizer."""
    experts = shard_experts(args, model, device)
    wrapped = distribute(args, model, device, later)
    groups = parameter_groups(args, stage, model)
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, fused=device.type == "cuda")
    model.train()
    return experts, wrapped, optimizer


def read_ahead(batches, n_micro, n_steps):
    """The micro-batches of n_steps steps, a list for each. A thread reads the next list before it
    is asked for."""
    def next_step():
        return list(islice(batches, n_micro))

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next_step)
        for step in range(n_steps):
            micro_batches = ahead.result()
            if step < n_steps - 1:
                ahead = reader.submit(next_step)
            yield micro_batches


def zero_replayed_gradients(model):
    """With --cuda-graphs, the gradients of replayed blocks begin as zeros instead of as nothing.

    A replayed graph writes its gradients to the same place each time. A weight without a gradient
    would take that place for its own, and the next micro-batch would write over it; to zeros the
    gradient is added.
    """
    for block in blocks_to_replay(model):
        for p in block.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None


def set_lr(optimizer, step, steps, warmup):
    """Give each group its learning rate of this step -> that of all, or {part: its own}."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, steps, group["peak"], warmup)
        rates[group["part"]] = group["lr"]
    if list(rates) == ["others"]:
        return rates["others"]
    return rates


def parameter_groups(args, stage, model):
    """AdamW's groups. Of each learning rate there are two: matrices decay; norms, biases, routers
    and the CLS vector do not.

    As in nanoGPT, one-dimensional weights do not decay. The biases of experts have two dimensions,
    (E, F), and a router has, (E, D); so these go by name.
    """
    # A wide part comes before the narrower ones in it, whose rates hold: text, then text.ffn.
    part_of = {}
    for part in PARTS:
        if part in stage.part_lrs:
            part_of |= dict.fromkeys(part_parameters(model, part), part)

    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        last = name.rpartition(".")[2]
        is_matrix = p.dim() >= 2 and last not in ("b_in", "b_out", "router")
        part = part_of.get(p, "others")
        groups.setdefault((part, is_matrix), []).append(p)

    # A flag must do something. (In a run of all stages, it may in another one.)
    for part in stage.part_lrs:
        if args.stage is not None and not {(part, True), (part, False)} & set(groups):
            raise ValueError(f"--lr {args.lr}: nothing of {part} trains in stage {stage.name}")
    return [{"params": params, "part": part, "peak": stage.part_lrs.get(part, stage.lr),
             "weight_decay": args.weight_decay if is_matrix else 0.0}
            for (part, is_matrix), params in groups.items()]


def routing_coefs(stage, model):
    """-> the weights of the load-balancing losses and of the z-losses."""
    config = getattr(model, "config", None)
    if config is None or not stage.routing_losses:
        return 0.0, 0.0
    return config.balance_coef, config.z_coef


class Totals(NamedTuple):
    """Numbers of a step, over its micro-batches and all processes."""
    labels: float
    images: float  # blank ones included
    tokens: float
    broken: float
    truncated: float
    signals: float


def count(micro_batches, n_signals, device):
    """Count what the losses are means over. Each micro-batch gets its "n_labels", "n_images" and
    "n_tokens"."""
    total = torch.tensor([0, 0, 0, 0, 0, n_signals], dtype=torch.float64)
    for batch in micro_batches:
        batch["n_labels"] = count_labels(batch)
        batch["n_images"] = len(batch["images"])
        batch["n_tokens"] = int((batch["tokens"] != PAD).sum())
        for message in batch["broken"]:
            tqdm.write(f"broken sample replaced: {message}", file=sys.stdout)
        total += torch.tensor([batch["n_labels"], batch["n_images"], batch["n_tokens"],
                               batch["replaced"], batch["truncated"], 0])
    # The same numbers in all processes; so they also agree on when to stop.
    return Totals(*sum_over_processes(total, device).tolist())


def count_labels(batch):
    # The model shifts labels by one, so the first of a row teaches nothing.
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def add_to_counts(counts, totals, batch_size):
    counts["broken"] += int(totals.broken)
    counts["truncated"] += int(totals.truncated)
    counts["samples"] += batch_size
    # Early in a run, ten broken ones are let through.
    if counts["broken"] > 0.01 * max(counts["samples"], 1000):
        raise ValueError(f"{counts['broken']} of {counts['samples']} samples are broken, over 1%: "
                         "mend the data (listed above)")


def portion_of(term, batch, totals, n_micro):
    """How much of the step's batch a micro-batch is, for this term of the loss.

    The language loss is a mean over labels, a router's loss in tower and connector a mean over
    images, and in the decoder one over tokens. Say one micro-batch has 10 labels and another has
    30. The mean of both means would count a label of the first three times as much; portions of
    1/4 and 3/4 count all labels alike, however the batch is cut.
    """
    if term == "lm":
        return batch["n_labels"] / max(1, totals.labels)
    if term.startswith(("vision/", "connector/")):
        return batch["n_images"] / max(1, totals.images)
    if term.startswith("text/"):
        return batch["n_tokens"] / max(1, totals.tokens)
    return 1 / (n_micro * WORLD)  # the losses of assets/backbones.py


def inputs(model, batch, device):
    """What the model takes of a micro-batch, on its device."""
    # What is no tensor (messages, counts) is for the loop alone.
    given = {}
    for name, value in batch.items():
        if torch.is_tensor(value):
            given[name] = value.to(device, non_blocking=True)
    if isinstance(model, CuMo):
        # Counted here, where the tokens still are. To count on the device is to wait for it.
        given["slots"] = CuMo.count_slots(batch["tokens"], batch.get("sample_positions"))
    return given


def autocast(device):
    """On CUDA, matrix products are in bfloat16, from float32 weights."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def exchange_gradients(wrapped, is_last):
    """The context of a micro-batch. DDP exchanges gradients after the last one only.

    FSDP does so after each, or else every process would have to keep all gradients whole.
    """
    if isinstance(wrapped, DDP) and not is_last:
        return wrapped.no_sync()
    return nullcontext()


def add_loads(loads, out, portions):
    """Add a micro-batch's part to {"vision 0": each expert's share of the first choices (E,),
    "vision 1": ..., "connector 0": ...}. With several scales, all layers come once for each."""
    for part, routings in getattr(out, "routing", {}).items():
        for i, routing in enumerate(routings):
            name = f"{part} {i}"
            loads[name] = loads.get(name, 0.0) + portions[f"{part}/balance"] * routing.load


@torch.no_grad()
def experts_apart(model):
    """{"vision 0": how far the experts of this layer have grown apart, ...}.

    That is the mean distance between their weights and the mean expert's, over the mean expert's
    size: 0 after upcycling, sqrt(E - 1) where they have nothing in common. One matrix of the FFN
    stands for all, with its adapters added. Experts that are shared out over processes are left
    out.
    """
    apart = {}
    for part, module in model.named_children():
        layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
        for i, layer in enumerate(layers):
            if layer.group is not None or isinstance(layer.router, DTensor):
                continue
            w_in = layer.w_in  # (E, F, D); with adapters, each look would compute it anew
            mean = w_in.mean(dim=0)  # (F, D)
            distances = (w_in - mean).flatten(1).norm(dim=1)  # (E,)
            apart[f"{part} {i}"] = distances.mean() / mean.norm()
    return apart


def to_numbers(losses, loads, apart, norm):
    """Sum losses and loads over the processes, and read them and the other numbers in one go."""
    # A process has only its part of each sum; the others are the same in all.
    row = torch.cat([value.float().view(-1) for value in (*losses.values(), *loads.values())])
    row = sum_over_processes(row, row.device)
    rest = [value.float().view(1) for value in (*apart.values(), norm)]
    # In one piece: to read a number off the device is to wait for it.
    numbers = iter(torch.cat([row, *rest]).tolist())
    losses = {name: next(numbers) for name in losses}
    loads = {name: list(islice(numbers, len(load))) for name, load in loads.items()}
    apart = {name: next(numbers) for name in apart}
    return losses, loads, apart, next(numbers)


def skip_step(args, stage, step, loss, norm, counts):
    """Count and report a step that is not finite. Ten in a row end the run."""
    counts["skipped"] += 1
    counts["skipped in a row"] += 1
    say(f"stage {stage.name}, step {step}: loss {loss}, gradient norm {norm}: step skipped")
    if counts["skipped in a row"] == 10:
        path, saved = newest_checkpoint(args.out)
        last_good = "none"
        if path is not None:
            last_good = f"{path}, step {saved['step']}"
        raise ValueError("10 steps in a row without a finite loss. The last good checkpoint is "
                         f"{last_good}; try a smaller --lr")


def stop_run(args, stage, step):
    say(f"stopped after step {step} of {stage.steps}; `--resume --out {args.out}` goes on from "
        f"{checkpoint_path(args, step)}")
    raise KeyboardInterrupt


@contextmanager
def catch_signals():
    """Collect SIGINT and SIGTERM in a list, so that the loop can end in good order."""
    caught = []

    def note(number, _):
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """The progress bar, and log.jsonl: one JSON object a step (the README says what is in it).

    A resumed run drops the lines behind its checkpoint, so that each step stands there once.
    """

    def __init__(self, out, stage, first):
        self.stage = stage
        self.seconds = 0.0
        self.waited = 0.0
        path = os.devnull
        if RANK == 0:
            path = os.path.join(out, "log.jsonl")
            drop_lines(path, stage.name, first)
        # Line by line, so that a run that is killed leaves whole lines.
        self.file = open(path, "a", buffering=1)
        self.bar = tqdm(total=stage.steps, initial=first, desc=f"stage {stage.name}",
                        disable=RANK != 0, dynamic_ncols=True, mininterval=1)

    def write(self, step, losses, loads, apart, lr, norm, n_images, begin, waited):
        """begin: when the step began. waited: the seconds until its data was there."""
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.waited += waited
        # A model has no experts in some parts; losses of 0 are theirs, and are left out.
        losses = {name: loss for name, loss in losses.items() if loss != 0 or name == "loss"}
        row = losses | {"lr": lr, "grad_norm": norm, "images_per_s": n_images / seconds,
                        "seconds": seconds, "waiting": waited / seconds}
        if loads:
            row["load"] = {name: [round(n, 4) for n in load] for name, load in loads.items()}
        if apart:
            row["apart"] = {name: round(distance, 5) for name, distance in apart.items()}
        self.write_row(step, row)

        shown = [f"{short(name)} {loss:.3g}" for name, loss in losses.items()]
        rates = lr if isinstance(lr, dict) else {"": lr}
        shown += [f"lr {part} {rate:.3g}".replace("  ", " ") for part, rate in rates.items()]
        shown.append(f"{row['images_per_s']:.0f} img/s")
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update()

    def write_row(self, step, values):
        row = {"stage": self.stage.name, "step": step} | values
        self.file.write(json.dumps(row) + "\n")

    def write_held_out(self, step, loss, is_best):
        self.write_row(step, {"val_loss": loss} | ({"best": True} if is_best else {}))
        say(f"stage {self.stage.name}, after step {step + 1}: loss on held-out data {loss:.4f}")

    def report(self, counts, compiled):
        text = f"stage {self.stage.name}: {self.stage.steps} steps done"
        found = [f"{counts[what]} {what}" for what in ("skipped", "broken", "truncated")
                 if counts[what]]
        if found:
            text += f" ({', '.join(found)})"
        text += f"; waited {100 * self.waited / self.seconds:.0f}% of the time for data"
        if compiled:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            text += f"; compiled {graphs} graphs"
        say(text)

    def close(self):
        self.bar.close()
        self.file.close()


def short(name):
    """connector/balance -> c/bal: the bar is narrow."""
    part, _, kind = name.partition("/")
    if not kind:
        return part
    return f"{part[0]}/{kind[:3]}"


def drop_lines(path, name, first):
    """Keep the lines of other stages, and of this one those before step `first`."""
    if not os.path.exists(path):
        return
    rows = generate.log_rows(path)
    keep = [row for row in rows if row["stage"] != name or row.get("step", 0) < first]
    generate.write_lines(path, keep)


def measure_held_out(args, stage, model, wrapped, held_out, log, step, counts):
    """The language loss on held_out, every --val-every steps and after the last one -> the log.

    Returns whether these weights are to be kept: with --keep-best, if there were no better ones.
    Training does not notice: nothing is drawn by chance that the next step does not draw anew, and
    no gradient is left behind.
    """
    every = args.val_every or args.save_every
    if not held_out or ((step + 1) % every and step + 1 < stage.steps):
        return False

    # This process's share, in micro-batches. All processes get equally many, as they compute
    # together. Where one has too few, it repeats sample 0, which does not count.
    mine = range(RANK, len(held_out), WORLD)
    size = stage.micro_batch
    cuts = [mine[i:i + size] for i in range(0, len(mine), size)]
    fillers = math.ceil(len(held_out) / (WORLD * size)) - len(cuts)
    batches = DataLoader(held_out, batch_sampler=cuts + [[0]] * fillers,
                         collate_fn=choose_collate(args, stage), num_workers=args.workers,
                         worker_init_fn=leave_signals)

    # The mean is over all labels: (sum of losses, their number).
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)

    model.eval()
    for i, batch in enumerate(batches):
        for message in batch["broken"]:
            tqdm.write(f"broken held-out sample replaced: {message}", file=sys.stdout)
        n_labels = count_labels(batch)
        with torch.no_grad(), autocast(device):
            loss = wrapped(**inputs(model, batch, device)).parts["lm"]
        if i < len(cuts):
            total += torch.tensor([n_labels * loss.item(), n_labels])
    model.train()

    loss_sum, n_labels = sum_over_processes(total, device).tolist()
    loss = loss_sum / max(1, n_labels)

    is_best = args.keep_best and loss < counts.get("best loss", math.inf)
    if is_best:
        counts["best loss"] = loss
        counts["best step"] = step + 1
    log.write_held_out(step, loss, is_best)
    return is_best


def return_to_best(args, stage, model, optimizer, experts, counts):
    """--keep-best, after the last step: take the weights of the best one from its checkpoint."""
    best = counts["best step"]
    if not args.keep_best:
        return
    if best == 0:
        say(f"stage {stage.name}: no loss on held-out data was a number: the last weights are kept")
        return
    if best < stage.steps:
        path = checkpoint_path(args, best)
        try:
            read_checkpoint(model, optimizer, experts, path)
        except ValueError as e:
            raise ValueError(f"{e}. It holds the best weights. Put it back; or delete {path}, and "
                             "--resume keeps the best of the last steps instead") from None
    say(f"stage {stage.name}: the weights after step {best} are kept, whose loss on held-out data "
        f"is the lowest, {counts['best loss']:.4f}")


# ------------------------------------------------------------------------------------------------
# 7. What a stage calls


def load_model(args, stage, source, later):
    """-> the model that a stage begins with, in float32, and its tokenizer.

    later: a list that takes the weights of a model on meta, for FSDP; None to load them here.
    """
    if args.vision and stage.name == 1:
        # A real model's parts, with a new connector between them.
        preset = Config.from_preset(args.preset) if "preset" in args.given else Config()
        scales = read_scales(args.scales) if args.scales else preset.vision.scales
        shuffle = args.pixel_shuffle or preset.connector.pixel_shuffle
        model, tokenizer = assemble(args.vision, args.llm, None, scales, None, args.seed,
                                    torch.float32, later=later, audio=args.audio,
                                    pixel_shuffle=shuffle)

        # The template that the decoder's folder tells. Over it that of a preset, unless the
        # tokenizer does not know its marks.
        has_tokenizer = tokenizer is not None and "preset" in args.given
        if has_tokenizer and data.fits(tokenizer, preset.template):
            model.config.template = preset.template
    elif source.endswith(".safetensors"):
        model, tokenizer = load_backbones(source, args.pixel_shuffle or 1)
    else:
        model, tokenizer = load(source, dtype=torch.float32, later=later)

    check_model(args, stage, model, tokenizer, source)
    return model.float(), tokenizer  # backbones may be stored in fewer bits


def leave_signals(_):
    """A process that loads data goes on at Ctrl-C: the run decides when to end, and until then it
    needs data."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The run's lock on --out is not this process's, which may outlive the run by some seconds.
    while LOCKS:
        os.close(LOCKS.pop())


@atexit.register
def end_workers():
    """At the end, Python sends SIGTERM to the processes that load data, which they do not heed, and
    waits for them. After an error, nobody else has told them to end."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise at the first
    for worker in workers:
        worker.kill()


def make_loader(samples, stage, args, collate, order=None):
    """-> a function: the first step -> micro-batches without end, as `train` wants it.

    order: of data.Batches, the lengths, sources and shares.
    """
    def start_from(step):
        batches = data.Batches(len(samples), stage.batch_size, stage.micro_batch, args.seed, step,
                               RANK, WORLD, **(order or {}))
        return DataLoader(samples, batch_sampler=batches, collate_fn=collate,
                          num_workers=args.workers, persistent_workers=args.workers > 0,
                          worker_init_fn=leave_signals,
                          pin_memory=torch.cuda.is_available())
    return start_from


def choose_collate(args, stage):
    """How samples become a batch."""
    if args.pack:
        return functools.partial(data.collate_packed, row_length=stage.max_length)
    return data.collate


def decoder_experts(args, n_layers, n_experts=None):
    """The number of experts of each decoder layer, by the flags or by the recipe's placement."""
    where = args.moe_layers
    if where is None:
        where = "all" if args.recipe == "uni-moe" else "every_other"
    return expert_counts(n_layers, where, n_experts or args.n_experts)


def expert_parts(args):
    """The parts of the model that have experts."""
    if args.experts_in:
        return args.experts_in.split(",")
    return ["vision", "connector"] if args.recipe == "cumo" else ["text"]


def numbers_of(part):
    """A part's config -> its numbers of experts, layer by layer. The connector is one layer."""
    return part.n_experts if isinstance(part.n_experts, list) else [part.n_experts]


def make_experts(args, model):
    """Upcycle where the recipe says, unless a stage before did so."""
    config = model.config
    # With FSDP the model is on meta, where tensors have no memory. Its new routers are not.
    how = {"top_k": args.top_k, "seed": args.seed, "real_routers": args.fsdp}

    # 1. Turn FFNs into experts, and say what their routers' losses count.
    if any(any(numbers_of(getattr(config, name))) for name in expert_parts(args)):
        check_experts(args, config)
    elif args.recipe == "cumo":
        upcycle(model, **dict.fromkeys(expert_parts(args), int(args.n_experts)), **how)
        # Released stage-2 folders have zeros here.
        if not config.balance_coef and not config.z_coef:
            config.balance_coef = Config.balance_coef
            config.z_coef = Config.z_coef
    elif args.recipe == "moe-llava":
        upcycle(model, text=decoder_experts(args, config.text.n_layers), **how)
        # It adds up its balance losses over the layers, and has no z-loss.
        config.balance_coef = 0.01
        config.z_coef = 0.0
        config.text.aux = "sum"
    else:
        join_experts(args, model, how)

    # 2. MoE-LLaVA's experts take a limited number of tokens: the flags', or their defaults, also
    #    where the model had experts with other limits.
    if args.recipe == "moe-llava":
        config.text.capacity_factor = args.capacity_factor or None
        config.text.eval_capacity_factor = args.eval_capacity_factor or None
        config.text.noisy = args.noisy_gate
        model.text.apply_expert_limits()


def join_experts(args, model, how):
    """Uni-MoE's mixture: each folder's FFNs become one expert."""
    folders = mixture(args)
    counts = decoder_experts(args, model.config.text.n_layers, str(len(folders)))
    if args.fsdp:
        raise ValueError("--fsdp cannot put experts together: do it first, with `python upcycle.py "
                         "--experts A,B,C,D --out DIR`, and --init DIR")
    upcycle(model, text=counts, experts=folders, average=args.average, **how)
    # The paper has no routing losses. --balance-coef has.
    model.config.balance_coef = 0.0
    model.config.z_coef = 0.0


def mixture(args):
    """The folder of each expert. A single folder is there --n-experts times: these are the "pure
    copies" of the paper's Table 8."""
    folders = expert_folders(args)
    if len(folders) == 1:
        return folders * int(args.n_experts)
    if "n_experts" in args.given and args.n_experts != str(len(folders)):
        raise ValueError(f"--n-experts {args.n_experts}: the mixture has {len(folders)} experts, "
                         "one for each of its folders; leave the flag out")
    return folders


def expert_folders(args):
    """Uni-MoE's experts: one decoder as stage 1 left it, and one trained for each sense."""
    if args.experts:
        return args.experts.split(",")
    return [result_path(args, name) for name in (1, *SENSES)]


def fit_to_size(args, stage, model):
    """Without --preset, the stage's values are those for models of this size (SIZES)."""
    if "preset" in args.given:
        return
    _, activated = [sum(column) for column in zip(*count_parameters(model).values())]
    fitting = [size for size, limit in SIZES.items() if activated < limit]
    size = fitting[0] if fitting else "large"
    # The default preset is a tiny one already.
    if size == "tiny":
        return

    vars(stage).update(vars(settings(args, stage.name, preset=size)))
    # A run of this size is long enough for compilation to pay.
    if "compile" not in args.given:
        args.compile = args.device != "cpu" and torch.cuda.is_available()
    say(f"stage {stage.name}: no --preset; {activated / 1e9:.2f}B activated parameters: the values "
        f"for {size} models")


def apply_flags(args, stage, model):
    """Write into the model's configuration what flags say about it, and into the stage what the
    model says about that."""
    fit_to_size(args, stage, model)
    config = model.config
    if args.balance_coef is not None:
        config.balance_coef = args.balance_coef
    if args.z_coef is not None:
        config.z_coef = args.z_coef
    config.frames_apart = config.frames_apart or args.frames_apart

    # Longer than what the decoder learnt to read at once: by mistake, or because it is the default.
    limit = config.text.max_positions
    if limit is not None and stage.max_length > limit:
        if args.max_length is not None:
            raise ValueError(f"--max-length {args.max_length}: this decoder learnt to read {limit} "
                             "tokens at once (text.max_positions in its config.json)")
        stage.max_length = limit

    if stage.template is None:
        stage.template = config.template
    # The model will be asked in the layout that it learns; but nobody asks in "plain".
    if args.template and args.template != "plain":
        config.template = args.template


def load_samples(args, stage, config, tokenizer):
    """-> the data set, what `make_loader` needs to know of the order of its samples, and the data
    set that is held out, if any.

    Where stage.steps is an epoch, it becomes a number here.
    """
    order = {}
    held_out = None
    if args.data:
        samples, order, held_out = load_files(args, stage, config)
    else:
        if stage.steps is None:
            raise ValueError(f"stage {stage.name}: drawn scenes have no end, and a model of this "
                             "size no default: give --steps; or samples of your own with --data")

        # Every drawn scene is seen once.
        seed = args.seed + stage_number(stage.name)
        n = stage.steps * stage.batch_size
        samples = data.Drawn(stage.kind, n, seed)
        if args.facts:
            samples = data.Facts(args.facts, n, seed)
            held_out = data.Facts(args.facts, 2 * args.facts, seed, held_out=True)
        if stage.kind == "mixed chat":
            # Image, sound, both, and so on. Questions about a sound are the shortest.
            order["lengths"] = [(1, 0, 2)[i % 3] for i in range(len(samples))]

    encode = functools.partial(
        data.Encoded, tokenizer=tokenizer, template=stage.template,
        pictures=data.picture_format(config.vision), n_image_tokens=config.n_image_tokens,
        max_length=stage.max_length, strict=args.strict, average=not config.frames_apart,
        **data.sound_format(config))
    samples = encode(samples)
    if args.pack:
        # Whatever their lengths, samples fill rows. So the batches can be drawn by chance alone.
        by_length = order
        order = {name: value for name, value in order.items() if name != "lengths"}
        print_padding(args, stage, samples, by_length, order)
    return samples, order, encode(held_out) if held_out else ()


def load_files(args, stage, config):
    """The samples of --data, as load_samples returns them, but not yet encoded."""
    # 1. Read all files, as one data set.
    files, weights = files_and_weights(args.data)
    parts = [data.LlavaJson(file, args.images) for file in files]
    lengths = [part.lengths(config.n_image_tokens, config.n_audio_tokens) for part in parts]
    order = {"lengths": list(chain(*lengths))}  # batches of like lengths have less padding
    if weights:
        order["sources"] = list(chain(*([i] * len(part) for i, part in enumerate(parts))))

    # 2. Hold some out, and mix the others.
    samples, order, held_out = hold_out(args, ConcatDataset(parts), order)
    if weights:
        order["shares"] = [weight / sum(weights) for weight in weights]
        check_shares(args, files, order)

    # 3. A resumed run must go on with the same data.
    contents = hashlib.sha256()
    for file in [*files, args.val]:
        if file:
            contents.update(Path(file).read_bytes())
    stage.checksum = contents.hexdigest()
    fit_to_data(args, stage, len(samples))
    return samples, order, held_out


def check_shares(args, files, order):
    """Say what each file gives to an epoch. ValueError if one of them gives nothing."""
    n_epoch = len(order["sources"])
    for i, share in enumerate(order["shares"]):
        n = order["sources"].count(i)
        n_drawn = share * n_epoch
        if n == 0:
            raise ValueError(f"--data {args.data[i]}: all its samples are held out, and none is "
                             "left to learn from; give a smaller --val-fraction, or --val")
        if n_drawn < 1:
            raise ValueError(f"--data {args.data[i]}: gives no sample to an epoch of {n_epoch}: "
                             "give it a larger weight, or leave it out")
        say(f"{files[i]}: {share:.1%} of an epoch, {n_drawn / n:.3g} times its {n} samples")


def print_padding(args, stage, samples, by_length, order):
    """With --pack: how much of a micro-batch is padding, and how much it would be without."""
    if RANK > 0:
        return
    shares = []
    for collate, how in ((data.collate, by_length), (choose_collate(args, stage), order)):
        batches = data.Batches(len(samples), stage.batch_size, stage.micro_batch, args.seed, 0,
                               RANK, WORLD, **how)
        tokens = collate([samples[i] for i in next(iter(batches))])["tokens"]  # (B, T)
        shares.append((tokens == PAD).float().mean().item())
    say(f"stage {stage.name}: --pack: {stage.micro_batch} samples in {len(tokens)} rows of up to "
        f"{tokens.shape[1]} tokens; {shares[1]:.1%} of the first micro-batch is padding (without "
        f"--pack {shares[0]:.1%})")


def hold_out(args, samples, order):
    """-> the samples to learn from, their lengths and sources, and what is held out (or None)."""
    if args.val:
        return samples, order, data.LlavaJson(args.val, args.images)
    if args.val_fraction is None:
        return samples, order, None

    n = n_held_out(args, len(samples))
    if n >= len(samples):
        raise ValueError(f"--val-fraction {args.val_fraction} of {len(samples)} samples in "
                         f"{' '.join(args.data)} leaves nothing to learn from")
    # The same part in each stage and each run with this seed.
    generator = torch.Generator().manual_seed(args.seed)
    shuffled = torch.randperm(len(samples), generator=generator).tolist()
    held = sorted(shuffled[:n])
    kept = sorted(shuffled[n:])
    order = {name: [values[i] for i in kept] for name, values in order.items()}
    return Subset(samples, kept), order, Subset(samples, held)


def n_held_out(args, n):
    """How many of n samples --val-fraction holds out."""
    return max(1, round(args.val_fraction * n))


def fit_to_data(args, stage, n):
    """Say how n samples become steps. Where they do not fill one batch, it is made smaller."""
    files = " ".join(args.data)
    if n < WORLD:
        raise ValueError(f"{files} has {n} samples to learn from, fewer than the {WORLD} "
                         "processes")
    if n < stage.batch_size:
        stage.micro_batch = min(stage.micro_batch, n // WORLD)
        smaller = n - n % (stage.micro_batch * WORLD)
        say(f"{files}: {n} samples do not fill a batch of {stage.batch_size}: it becomes "
            f"{smaller}")
        stage.batch_size = smaller

    per_epoch = n // stage.batch_size
    stage.steps = args.steps or args.epochs * per_epoch
    text = (f"{files}: {n} samples, {stage.steps / per_epoch:.3g} epochs of {per_epoch} steps "
            f"of {stage.batch_size}")
    left_out = n % stage.batch_size
    if left_out:
        text += f"; in each epoch {left_out} others are left out, too few for a batch"
    say(text)


def print_stage(args, stage, model, source):
    """What a stage trains, and the values that it runs with."""
    total, activated = [sum(column) for column in zip(*count_parameters(model).values())]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_trains(args, stage, model)
    say(f"stage {stage.name}: {stage.steps} steps of {stage.batch_size} from {source}; training "
        f"{trained / 1e6:.2f}M of {total / 1e6:.2f}M parameters ({activated / 1e6:.2f}M activated)")

    # The values that it learns by.
    balance, z = routing_coefs(stage, model)
    values = vars(args) | vars(stage) | {"trains": ", ".join(stage.trains) or "adapters",
                                         "balance_coef": balance, "z_coef": z}
    if stage.part_lrs:
        rates = stage.part_lrs | {"others": stage.lr}
        values["lr"] = ", ".join(f"{part} {rate}" for part, rate in rates.items())
    shown = ("trains", "lora", "lr", "warmup", "weight_decay", "grad_clip", "micro_batch",
             "max_length", "template", "balance_coef", "z_coef", "seed")
    say("    " + "; ".join(f"{name} {values[name]}" for name in shown))


# What models are asked about after a stage: of Uni-MoE's, those that a stage has taught.
WORLDS = {1: ("image", "sound"), 3: ("image", "sound", "both"), "2 image": ("image",),
          "2 sound": ("sound",), "2 both": ("both",)}


def measure(args, stage, device, began):
    """Ask the model on the disk held-out questions -> scores.jsonl, and routing.png at the end."""
    is_last = stage.name == 3
    n = args.eval_questions if is_last else max(1, args.eval_questions // 4)
    worlds = WORLDS[stage.name] if args.recipe == "uni-moe" else ("image",)

    # What is measured is what lies on the disk.
    model, tokenizer = load(result_path(args, stage.name), device)
    scores = {}
    asked = []  # every (sample, reply)
    if args.facts:
        worlds = ()
        scores = generate.recall(model, tokenizer, args.facts, n, args.seed, asked)
        generate.print_table(scores, f"after stage {stage.name}: {n} new drawings of known facts, "
                                     "and of unknown ones, exact match")
    for world in worlds:
        points = generate.evaluate(model, tokenizer, n, world=world, asked=asked)
        scores |= points
        generate.print_table(points, f"after stage {stage.name}: {n} questions about held-out "
                                     f"{generate.TITLES[world]}, exact match")

    row = {"stage": stage.name, "seed": args.seed, "dense": args.dense, "scores": scores,
           "seconds": time.time() - began}
    file = os.path.join(args.out, "scores.jsonl")
    drop_lines(file, stage.name, 0)  # of a run that was killed just here
    with open(file, "a") as f:
        f.write(json.dumps(row) + "\n")

    # A picture of where 250 to 500 of these samples were sent.
    if is_last and stage.has_experts:
        samples, replies = zip(*asked[::max(1, len(asked) // 250)])
        png = os.path.join(args.out, "routing.png")
        try_to_draw(generate.draw_experts, model, tokenizer, samples, replies, png, alone=True)


def measure_stage(args, name, device, began):
    """Scores and pictures of a stage whose model is saved. Then the run notes that it is done."""
    if RANK == 0:
        if not args.data:
            measure(args, settings(args, name), device, began)
        try_to_draw(generate.draw_curves, os.path.join(args.out, "log.jsonl"),
                    os.path.join(args.out, "loss.png"))
        run = read_run(args.out)
        write_json(run_file(args.out), run | {"done": run["done"] + [name]})
        drop_checkpoints(args.out)  # there is one if a kill came before `finish_stage`
    wait_for_all()


def try_to_draw(draw, *args, **options):
    """No picture is worth a run."""
    try:
        draw(*args, **options)
    except Exception as e:
        say(f"a picture could not be drawn ({draw.__name__}: {e!r}); all else goes on")


def next_command(args, last):
    """What to try with the model of the last stage: a question of its own data."""
    command = f"python generate.py --model {result_path(args, last)}"
    if not args.data and not args.facts:
        return f'{command} --image X.png --prompt "What color is the circle?"'
    try:
        files, _ = files_and_weights(args.data)
        sample = data.LlavaJson(files[0], args.images)[0]
        question = str(sample["conversations"][0]["value"])
        videos = []
        for frames in sample["video"]:
            folder = os.path.dirname(frames[0])
            # A whole folder of frames has a shorter name.
            is_whole = os.path.isdir(folder) and frames == data.frames_in(folder, "")
            videos.append([folder] if is_whole else frames)
    except (ValueError, TypeError, LookupError):
        # The first sample is a broken one, or there is no data but facts.
        return f'{command} --image X.png --prompt "What is this?"'
    for file in sample["images"]:
        command += f" --image {shlex.quote(file)}"
    for file in sample["audio"]:
        command += f" --audio {shlex.quote(file)}"
    for files in videos:
        command += f" --video {shlex.join(files)}"
    for mark in ("<image>", "<audio>", "<video>"):
        question = question.replace(mark, "")
    question = question.strip()
    return f"{command} --prompt {shlex.quote(question)}"


def finish_stage(args, stopped):
    """What the stage leaves has taken the place of its checkpoints."""
    if RANK == 0:
        drop_checkpoints(args.out)
    wait_for_all()
    if stopped:
        raise KeyboardInterrupt  # pressed in the last step


# ------------------------------------------------------------------------------------------------
# 8. Which stages run, and where each begins


def result_path(args, name):
    """The folder that a finished stage leaves."""
    return os.path.normpath(os.path.join(args.out, FOLDERS[name]))


def stage_numbers(args):
    return [1, 2, 3] if args.stage is None else [args.stage]


def stages_of(args):
    """The stages of this run, in order. uni-moe trains stage 2 once for each sense."""
    stages = []
    for n in stage_numbers(args):
        if n == 2 and args.recipe == "uni-moe" and not args.data:
            stages += SENSES
        else:
            stages.append(n)
    return stages


def finished_stages(out, names):
    """Those whose model is there."""
    return [name for name in names if Path(out, FOLDERS[name], "config.json").exists()]


def stages_done(args, stages):
    """The stages that a resumed run has behind it: those whose model is there, and those of them
    that are measured too. A new run never writes over what is in --out."""
    finished = finished_stages(args.out, stages)
    if RANK == 0 and os.path.isdir(args.out):
        lock_folder(args.out)

    # Did torchrun start this run again? If that was before it had begun, another one lies here.
    if args.resume and "resume" not in args.given:
        run = {"flags": None, "done": []}
        if os.path.exists(run_file(args.out)):
            run = read_run(args.out)
        args.resume = run["flags"] == args.given and len(run["done"]) < len(stages)
        wait_for_all()  # all have looked before process 0 moves anything

    trained = []
    measured = []
    if args.resume:
        trained = stages[:stage_to_resume(args, stages, finished)]
        measured = trained
        if os.path.exists(run_file(args.out)):
            measured = [name for name in read_run(args.out)["done"] if name in trained]
        if len(measured) == len(stages):
            raise ValueError(f"nothing to resume: {args.out} holds a finished run")
    elif args.stage is not None:
        if len(finished) == len(stages):
            raise ValueError(f"{args.out} holds this stage already, and it is finished; to train "
                             "it again, give another --out")
        if finished or checkpoints(args.out):
            raise ValueError(f"{args.out} holds an unfinished run already: --resume, or another "
                             "--out")
    elif RANK == 0 and os.path.exists(args.out) and os.listdir(args.out):
        move_aside(args.out)

    wait_for_all()
    return trained, measured


def stage_to_resume(args, stages, finished):
    """The index of the stage that was cut short, or that comes after the last finished one.

    (Whoever is short of disk may have removed the folders of stages before that.).
    """
    first = max((stages.index(name) + 1 for name in finished), default=0)
    path, saved = newest_checkpoint(args.out)
    if path is None:
        return first
    name = saved["identity"]["stage"]
    if name not in stages:
        raise ValueError(f"{path} belongs to stage {name}: give the flags that this run began "
                         "with")
    # A kill may have left the checkpoint of a stage that is finished.
    return max(first, stages.index(name))


# A run's own file, beside its checkpoints and its model: {"flags": those that were given, "done":
# the stages that are trained and measured}.


def run_file(out):
    return os.path.join(out, "run.json")


def read_run(out):
    """ValueError if somebody has damaged it."""
    file = run_file(out)
    try:
        run = read_fields(file, flags=dict, done=list)
        run["flags"] = as_today(run["flags"])
        known = {f.name: f for f in dataclasses.fields(Args)}
        for name, value in run["flags"].items():
            if name not in known:
                raise ValueError(f"{file}: there is no flag {name!r}")
            check_limits(known[name], value)
    except ValueError as e:
        raise ValueError(f"{file} cannot be used ({e}); delete it, and give --resume with the "
                         "flags that the run began with") from None
    return run


def as_today(values):
    """What an earlier version wrote down: of --data a single file, and of --lr a number."""
    values = dict(values)
    if isinstance(values.get("data"), str):
        values["data"] = [values["data"]]
    if isinstance(values.get("lr"), (int, float)):
        values["lr"] = str(values["lr"])
    return values


def read_fields(file, **kinds):
    """A JSON file with these fields -> {name: value}."""
    values = read_json(str(file))
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"{file}: has no {name!r}, or another value than a {kind.__name__}")
    return values


def begin_run(args, done):
    """Make --out, and note with which flags it was begun."""
    if RANK > 0:
        return
    os.makedirs(args.out, exist_ok=True)
    lock_folder(args.out)
    flags = args.given
    if args.resume and os.path.exists(run_file(args.out)):
        flags = read_run(args.out)["flags"]  # until those of now have proved to fit, see `train`
    write_json(run_file(args.out), {"flags": flags, "done": done})


def note_flags(args):
    """A resumed run goes on: the flags that it was given now are its own."""
    file = run_file(args.out)
    if args.resume and RANK == 0 and os.path.exists(file):
        write_json(file, read_run(args.out) | {"flags": args.given})


LOCKS = []  # the folder that this process trains in, opened


def lock_folder(out):
    """Keep other runs out of this folder. The lock goes when this process ends, however it does."""
    unlock_folder()
    if fcntl is None:
        return
    LOCKS.append(os.open(out, os.O_RDONLY))
    try:
        fcntl.flock(LOCKS[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run is training there; wait for it, or give another "
                         "--out") from None
    except OSError:
        os.close(LOCKS.pop())  # a file system that knows no locks


def unlock_folder():
    while LOCKS:
        # To close it alone would not do: a process that is being started may have it open, too.
        fcntl.flock(LOCKS[0], fcntl.LOCK_UN)
        os.close(LOCKS.pop())


def flags_of_run(out, given):
    """Of a run that is resumed: the flags that it was given, and those that are given now."""
    file = run_file(out)
    if not os.path.exists(file):
        # A run of an earlier version. It must be given its flags again.
        if not finished_stages(out, FOLDERS) and not checkpoints(out):
            raise ValueError(f"--resume: {out} holds no run to go on with; is that the --out that "
                             "the run began with?")
        return given
    flags = read_run(out)["flags"]

    # How processes share the model is their business, not the run's.
    sharing = {"fsdp", "expert_parallel"}
    if not LAUNCHED or sharing & set(given):
        flags = {name: value for name, value in flags.items() if name not in sharing}

    both = flags | given | {"out": out}
    before = vars(fill_in(flags))
    now = vars(fill_in(both))
    fixed = {name for name in given if name not in FREE}
    refuse_changes(file, before, {name: now[name] for name in fixed})
    return both


def refuse_changes(file, before, now):
    """Two different runs must not become one. (Earlier versions wrote down fewer values.)."""
    def differ(name):
        if name == "lr" and isinstance(now[name], str):
            return read_rates(before[name]) != read_rates(now[name])  # 1e-3 is 0.001
        return before[name] != now[name]

    differs = [f"{name} {before[name]} (now {value})" for name, value in now.items()
               if name in before and differ(name)]
    if any(text.startswith("checksum") for text in differs):
        raise ValueError(f"{file}: what --data (or --val) names has other contents now; put the "
                         "old ones back, or begin another run with another --out")
    if differs:
        hint = ""
        if "batch_size" in now:  # a checkpoint's values, not flags
            hint = "; where the data do not fill a batch, start as many processes, too"
        raise ValueError(f"{file} was written with {', '.join(differs)}: give the same flags, or "
                         f"none{hint}")


def move_aside(out):
    """out/tiny -> out/tiny.1, or the next number that is free."""
    n = 1
    while os.path.exists(f"{out}.{n}"):
        n += 1
    try:
        os.rename(out, f"{out}.{n}")
    except OSError as e:
        raise ValueError(f"--out {out} holds files, and cannot be moved aside for a new run "
                         f"({e.strerror}): give another --out") from None
    say(f"{out} holds an earlier run: it is now {out}.{n}")


def source_of(args, name, stages):
    """The folder or file that a stage starts from (or both folders of a real model's stage 1)."""
    if args.init and stage_number(name) == stage_number(stages[0]):
        return args.init
    if name == 1:
        if args.vision:
            return f"{args.vision} and {args.llm}"
        if args.preset not in DRAWN:
            raise ValueError(f"{args.preset} starts from pre-trained weights: give --vision "
                             "CLIP_DIR and --llm LLM_DIR, or --init")
        return HEARING if args.recipe == "uni-moe" else BACKBONES

    if args.recipe != "uni-moe":
        return result_path(args, name - 1)
    if stage_number(name) == 2:
        # The expert of each sense begins where stage 1 ended.
        return result_path(args, 1)

    # The mixture begins at the first of its experts, a dense model at the last that was trained.
    folders = expert_folders(args)
    return folders[-1] if args.dense else folders[0]


# ------------------------------------------------------------------------------------------------
# 9. Checkpoints
#
# A checkpoint is a folder, checkpoint/STEP, in the format of torch.distributed.checkpoint (DCP).
# Each process writes its part of the tensors, and any number of processes can read them. run.json
# is written last and makes the folder a checkpoint. Only then the one before is dropped, so at
# every moment one is complete. It holds what trains (of a run with LoRA, the adapters); the rest
# is in the folder that the stage started from.

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered, on process 0


def identity(args, stage):
    """All that a run's numbers depend on, as it is read back from JSON."""
    # A flag that was not given is None; the stage has the value that holds.
    values = dataclasses.asdict(args) | vars(stage)
    kept = {name: value for name, value in values.items() if name not in FREE}
    kept["stage"] = kept.pop("name")
    return json.loads(json.dumps(kept))


def resume(args, stage, model, optimizer, experts):
    """Go on from the newest checkpoint if it is this stage's -> the first step, and the counts."""
    new = (0, Counter())
    if not args.resume:
        return new

    damage = None
    for path, saved in complete_checkpoints(args.out):
        if saved["identity"]["stage"] != stage.name:
            break

        refuse_changes(path, as_today(saved["identity"]), as_today(identity(args, stage)))
        try:
            read_checkpoint(model, optimizer, experts, path)
        except ValueError as e:
            damage = e
            say(f"{e}; the checkpoint before it will do, if there is one")
            continue
        say(f"stage {stage.name}: going on after step {saved['step']} of {stage.steps}")
        return saved["step"], counts_of(args, saved)
    if damage is not None:
        raise damage
    return new


def counts_of(args, saved):
    """A checkpoint's counts. If the best weights are gone, then without what they count."""
    counts = Counter(saved["counts"])
    best = checkpoint_path(args, counts["best step"])
    if counts["best step"] and not Path(best, "run.json").exists():
        say(f"{best}, which held the best weights, is gone: those that come from here on are "
            "compared with each other only")
        del counts["best step"], counts["best loss"]
    return counts


def checkpoints(out):
    """The folders of all checkpoints, complete or not."""
    return [path for path in Path(out, "checkpoint").glob("*") if path.name.isdigit()]


def newest_checkpoint(out):
    """-> (its path, {"identity", "step", "counts"}), or (None, None)."""
    return next(iter(complete_checkpoints(out)), (None, None))


def complete_checkpoints(out):
    """All (path, {"identity", "step", "counts"}), the newest first. ValueError if none can be used.

    Mostly there is one; a second one with --keep-best, or after a kill at the wrong moment.
    """
    usable = []
    damage = None
    complete = [path for path in checkpoints(out) if Path(path, "run.json").exists()]
    for path in sorted(complete, key=lambda path: int(path.name), reverse=True):
        try:
            about = read_fields(path / "run.json", identity=dict, counts=dict, step=int)
            if "stage" not in about["identity"]:
                raise ValueError("its run.json names no stage")
            usable.append((str(path), about))
        except ValueError as e:
            damage = f"{path}: cannot be read: {e}"
            say(f"{damage}; the checkpoint before it will do, if there is one")
    if damage and not usable:
        raise ValueError(f"{damage}. Delete {Path(out, 'checkpoint')} to begin this stage anew")
    return usable


def drop_checkpoints(out, but=()):
    for path in checkpoints(out):
        if str(path) not in but:
            # First run.json, or else what is left after a kill would be taken for a complete one.
            (path / "run.json").unlink(missing_ok=True)
            shutil.rmtree(path)
    if not but:
        shutil.rmtree(os.path.join(out, "checkpoint"), ignore_errors=True)


def tensors_of(state, experts):
    """The tensors of get_state_dict's (weights, optimizer), as a checkpoint holds them.

    They share memory with the model's: dcp.save writes them, and dcp.load fills them. Values that
    are no tensors, such as learning rates, follow from the flags and are left out.
    """
    weights, optimizer = state
    moments = {}
    for name, values in optimizer["state"].items():
        moments[name] = {key: as_whole(name, t, experts) for key, t in values.items()}
    return {"model": {name: as_whole(name, t, experts) for name, t in weights.items()},
            "optimizer": moments}


def checkpoint_path(args, step):
    # Spelled as `checkpoints` does, also where --out is the folder that we are in.
    return str(Path(args.out, "checkpoint", str(step)))


def write_checkpoint(args, stage, model, optimizer, experts, step, counts):
    path = checkpoint_path(args, step)
    is_new = not optimizer.state
    tensors = tensors_of(get_state_dict(model, optimizer, options=TRAINED), experts)
    if is_new:
        # No step was good so far. torch has just made AdamW's state by a step of size 0, which must
        # not count.
        for state in optimizer.state.values():
            state["step"].zero_()

    # A damaged one may lie there. It must not count as complete before it is.
    Path(path, "run.json").unlink(missing_ok=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # that a single process works alone
            dcp.save(tensors, checkpoint_id=path)
    except CheckpointException as e:
        # One process failed, and all are told.
        if RANK == 0:
            shutil.rmtree(path, ignore_errors=True)
        raise OSError(f"{path}: cannot be written: {first_failure(e)}") from None

    # All have written. Now it becomes a checkpoint, and then the old one may go, but for the best.
    if RANK == 0:
        about = {"identity": identity(args, stage), "step": step, "counts": counts}
        write_json(os.path.join(path, "run.json"), about)
        drop_checkpoints(args.out, but=(path, checkpoint_path(args, counts["best step"])))
    wait_for_all()


def read_checkpoint(model, optimizer, experts, path):
    """Each process reads its own part, whoever wrote it, and on however many processes."""
    # DCP fills these tensors. Those of a new optimizer are made for it here.
    weights, optimizer_state = get_state_dict(model, optimizer, options=TRAINED)
    tensors = tensors_of((weights, optimizer_state), experts)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=Reader(path))
    except CheckpointException as e:
        raise ValueError(f"{path}: cannot be read: {first_failure(e)}") from None
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state,
                   options=TRAINED)


def first_failure(error):
    failure, _ = next(iter(error.failures.values()))
    return " ".join(str(failure).split())  # in one line


class Reader(dcp.FileSystemReader):
    """DCP's reader, but safe: a forged checkpoint runs no code.

    The tensors are read with torch.load(weights_only=True). The table of contents, .metadata, is a
    pickle, and a pickle can call any function that it names.
    """

    def __init__(self, path):
        super().__init__(path)
        contents = os.path.join(path, ".metadata")
        try:
            with open(contents, "rb") as file:
                self.metadata = MetadataUnpickler(file).load()
        except Exception as e:
            raise ValueError(f"{contents}: cannot be read: {e}") from None

        # Is each shard there, and as long as its tensors are?
        for part in self.metadata.storage_data.values():
            shard = Path(path, part.relative_path)
            size = shard.stat().st_size if shard.exists() else 0
            if size < part.offset + part.length:
                raise ValueError(f"{shard}: cannot be read: it has {size} bytes, and tensors up to "
                                 f"{part.offset + part.length}")

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class MetadataUnpickler(pickle.Unpickler):
    """Admits the names that DCP writes for tensors, and nothing else.

    BytesStorageMetadata is not among them, since values that are no tensors are pickles again.
    """
    ADMITTED = {
        "torch": {"Size", "float32"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
            "TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},  # in Python 3.13
    }

    def find_class(self, module, name):
        if name not in self.ADMITTED.get(module, ()):
            raise ValueError(f".metadata names {module}.{name}, which train.py does not write. "
                             "Somebody else has made or changed this file")
        return super().find_class(module, name)


# ------------------------------------------------------------------------------------------------
# 10. Several processes: DDP, FSDP, expert parallelism; and what else makes a run faster


class Experts(NamedTuple):
    """The weights that --expert-parallel deals out; none without it.

    The processes form a table. A row of n processes shares the experts, each holds its part; down a
    column all hold the same ones.
    """
    weights: dict  # name -> this process's part (E / n, ...)
    mesh: DeviceMesh | None


def shard_experts(args, model, device):
    """--expert-parallel n: keep 1 / n of each layer's experts here. kernels.py takes the tokens to
    them. All else stays data-parallel."""
    n = args.expert_parallel
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MoE)}
    if n == 1 or not layers:
        return Experts({}, None)

    mesh = init_device_mesh(device.type, (WORLD // n, n), mesh_dim_names=("column", "row"))
    weights = {}
    for path, layer in layers.items():
        if len(layer.router) % n:
            raise ValueError(f"{path}: {len(layer.router)} experts cannot be dealt out evenly to "
                             f"--expert-parallel {n} processes")
        # This tells the layer to send its tokens around.
        layer.group = mesh.get_group("row")
        for name, p in layer.named_parameters():
            if name != "router":
                # (E, ...) -> (E / n, ...); a copy, so that the whole is freed.
                p.data = p.data.chunk(n)[mesh.get_local_rank("row")].clone()
                weights[f"{path}.{name}"] = p

    # They differ from process to process, so DDP must not make them the same.
    DDP._set_params_and_buffers_to_ignore_for_model(model, list(weights))
    return Experts(weights, mesh)


def as_whole(name, tensor, experts):
    """A tensor of experts, (E / n, ...), as a DTensor (E, ...), which knows of what it is a part.

    So DCP writes, reads and gathers experts as if one process held them all. Other tensors stay as
    they are.
    """
    # AdamW's count of steps has no dimensions, and is the same everywhere.
    if name not in experts.weights or tensor.dim() == 0:
        return tensor
    return DTensor.from_local(tensor, experts.mesh, [Replicate(), Shard(0)], run_check=False)


def gather_weights(model, experts):
    """The state dict with whole tensors, on process 0. All processes must call this."""
    state = get_model_state_dict(model, options=WHOLE)
    for name, part in experts.weights.items():
        whole = as_whole(name, part.detach(), experts).full_tensor()  # (E, ...)
        if RANK == 0:
            state[name] = whole.cpu()
    return state


def clip_gradients(model, experts, limit):
    """Scale gradients down to a norm of at most `limit`, over all weights -> the norm before."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not experts.weights:
        norm = torch.nn.utils.clip_grad_norm_(params, limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm

    dealt_out = set(experts.weights.values())
    of_experts = [p.grad for p in params if p in dealt_out]
    of_others = [p.grad for p in params if p not in dealt_out]

    # DDP does not look at experts, so their mean over processes is taken here. Each process has
    # seen its row's tokens; summed down a column, the tokens of all processes are in it.
    for grad in of_experts:
        dist.all_reduce(grad, group=experts.mesh.get_group("column"))
        grad /= WORLD

    # Down a row, the squares of all experts add up, each once.
    square = torch.nn.utils.get_total_norm(of_experts).square().to(params[0])
    dist.all_reduce(square, group=experts.mesh.get_group("row"))
    square_of_others = torch.nn.utils.get_total_norm(of_others).square().to(square)
    norm = (square + square_of_others).sqrt()
    torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
    return norm


def distribute(args, model, device, later=()):
    """Recompute, compile, shard or replicate, as the flags say -> the module to call."""
    if args.checkpointing and isinstance(model, CuMo):
        model.checkpointing()
    blocks = blocks_of(model)
    if args.compile:
        compile_blocks(args, model, blocks)
    if not LAUNCHED:
        return model
    if args.fsdp:
        shard_weights(model, blocks, device, later)
        return model
    return DDP(model, device_ids=[device.index] if device.type == "cuda" else None)


def blocks_of(model):
    # They are in plain ModuleLists. LoRA's parametrizations are such lists too, of another class.
    return [block for m in model.modules() if type(m) is nn.ModuleList for block in m]


def blocks_to_replay(model):
    """The blocks that --cuda-graphs is for: those of the senses. Pictures and sounds have one size,
    where sentences have a new length each time."""
    return [block for block in blocks_of(model) if isinstance(block, SenseBlock)]


def compile_blocks(args, model, blocks):
    """torch.compile each block by itself.

    The second length (or number of images) that it meets makes torch write a graph for all of them,
    so lengths need no padding to a few steps. But it gives up at 8 graphs of one function, and the
    stage before must not count.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    # A compiled block is some twenty kernels, which the CPU launches one by one. A CUDA graph is a
    # recording of them, which is launched as one.
    replayed = set(blocks_to_replay(model)) if args.cuda_graphs else set()
    for block in blocks:
        block.compile(mode="reduce-overhead" if block in replayed else None)

    if replayed:
        # What the graphs wrote in the pass before may now be overwritten.
        model.register_forward_pre_hook(
            lambda *_: torch.compiler.cudagraph_mark_step_begin())

    for module in model.modules():
        if isinstance(module, Connector):
            # There is one: better one graph for all lengths at once.
            module.compile(dynamic=True)
        if isinstance(module, CuMo):
            # This spares a float32 copy of (B, T, V).
            module.lm_loss = torch.compile(module.lm_loss, dynamic=True)


def shard_weights(model, blocks, device, later):
    """FSDP2, in place: each block is a unit, and the rest is one. On CUDA it computes in bfloat16.

    No process ever holds the whole model. It comes on meta but for new weights (routers, a
    connector). It is cut while it has no weights, and then `later`, streams of (name, expert,
    tensor), fills each process's parts, tensor by tensor.
    """
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    # New weights are kept aside, and the model is cut while it has no memory.
    new = [(name, None, p.detach()) for name, p in model.named_parameters() if not p.is_meta]
    model.to("meta")
    for module in [*blocks, model]:
        fully_shard(module, mp_policy=policy, shard_placement_fn=shard_dimension)
    model.to_empty(device=device)

    # With adapters, a weight's own name is longer than the one in the folder.
    params = {plain_name(name) or name: p for name, p in model.named_parameters()}
    for name, expert, tensor in chain(new, *later):
        copy_into_shard(params[plain_name(name) or name], expert, tensor)


def shard_dimension(p):
    """Where FSDP cuts a weight: its first dimension that all processes can share evenly.

    By default that would be dimension 0. But of 4 experts (E, F, D), 8 processes would get one
    each, or nothing.
    """
    for i, n in enumerate(p.shape):
        if n % WORLD == 0:
            return Shard(i)
    return None


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

    # The numbers of M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD in <malloc.h>, and their values.
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)
    libc.mallopt(-2, 10**8)


def prepare_device(args):
    """The device that the flags choose, set up for a run."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; leave the flag out, or give "
                         "--device cpu")
    torch.set_float32_matmul_precision(args.matmul)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    name = args.device or usual
    # The CPU's flash kernel multiplies small blocks, for which AMX is slow. (The switch is the
    # GPU's as well, and holds for the whole process.)
    uses_amx = args.matmul == "medium" and name == "cpu"
    torch.backends.cuda.enable_flash_sdp(not uses_amx)
    if name == "cpu":
        keep_pages()
    if args.compile is None:
        # On a CPU, or with tiny models, a whole run is shorter than the compilation of its stages.
        args.compile = name == "cuda" and (args.cuda_graphs or args.preset not in DRAWN)
    if args.cuda_graphs and not (name == "cuda" and args.compile):
        raise ValueError("--cuda-graphs replays what torch.compile wrote for a GPU: it goes with "
                         "--device cuda and without --no-compile (a run that is resumed keeps the "
                         "flag: --no-cuda-graphs)")
    return torch.device(name)


def join_processes(args, device):
    """Under torchrun, meet the other processes -> this process's device.

    Where torchrun has started all of them again because one died, args.resume becomes true.
    """
    if not LAUNCHED:
        if WORLD > 1:
            raise ValueError(f"WORLD_SIZE is {WORLD}, but torchrun did not start this process: "
                             "start it with torchrun, or unset RANK and WORLD_SIZE")
        if args.fsdp:
            raise ValueError("--fsdp shards the model over the processes of torchrun: start it "
                             "with that, or leave the flag out")
        return device
    die_with_parent()
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    # After a restart torchrun's store still has the addresses of the dead processes, and others
    # might wait for these.
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    store = None
    if restarts and os.environ["GROUP_WORLD_SIZE"] == "1":
        old_store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {restarts}", old_store)
    # Process 0 saves and measures while the others wait, which may be for longer than the usual ten
    # minutes.
    dist.init_process_group(backend, timeout=timedelta(days=1), store=store, rank=RANK,
                            world_size=WORLD)

    # Each node counts its own restarts.
    died = torch.tensor(restarts, device=device)
    dist.all_reduce(died, dist.ReduceOp.MAX)
    if died:
        args.resume = True
    return device


def die_with_parent():
    """When torchrun is killed, Linux kills this process with it.

    Else it would go on alone, and write into the same folder as the run that is resumed there.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG in <sys/prctl.h>
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def leave_processes():
    if LAUNCHED:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# 11. --plan: what a stage will cost, before it costs anything

# The sizes of the papers' data sets.
N_SAMPLES = {
    "cumo": {1: 558_000, 2: 708_000, 3: 1_649_000},
    "moe-llava": {1: 558_000, 2: 964_000, 3: 665_000},
}

# FLOPs of operators for which torch has no formula, by the shapes of their inputs: two for every
# multiply-add. (Going back, a product becomes two, the gradient of either factor. So a frozen
# weight costs only one there, and what lies before the first weight that trains costs nothing.)


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

    def __init__(self, model, known):
        super().__init__()
        self.flops = Counter()  # of each part of the model
        self.part = None        # the part that computes just now
        self.now = 0            # bytes
        self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)
        for part, module in model.named_children():
            self.watch(part, module)

    def watch(self, part, module):
        """Notice when the model enters this part. One part follows the other in both directions."""
        def enter(*_):
            self.part = part

        def watch_output(_, inputs, output):
            # Going back, a part begins where the gradient of its output is there. (With hooks of
            # modules, the memory that was counted came out larger.)
            out = output[0] if isinstance(output, tuple) else output
            if out.requires_grad:
                out.register_hook(enter)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(watch_output)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        formula = FORMULAS.get(op._overloadpacket)
        if formula is not None:
            self.flops[self.part] += formula(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self.add(t.untyped_storage())
        return out

    def add(self, memory):
        # A view has the memory of what it is a view of.
        if memory not in self.seen:
            self.seen.add(memory)
            self.grow(memory.nbytes())
            weakref.finalize(memory, self.grow, -memory.nbytes())

    def grow(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


class Rehearsal(NamedTuple):
    """What one micro-batch's forward and backward pass takes."""
    kept: int  # bytes that the forward pass leaves for the backward pass
    peak: int  # the most bytes that are alive at once
    forward: dict[str, int]  # FLOPs of each part of the model
    backward: dict[str, int]  # the same; with checkpointing, including what is computed again


def meta_model(config, trains, lora):
    """A model that has shapes but no memory, with requires_grad set."""
    with torch.device("meta"):
        model = CuMo(config)
    choose_trainable(model, trains)
    if lora:
        add_lora(model, *lora)
    return model


@functools.cache
def rehearse(config, trains, lora, rows, length, checkpointing, grads, dtype):
    """A forward and backward pass on meta, where tensors have shapes but no memory and no values.

    config: as JSON. The bytes are without weights and, with `grads`, without gradients, which are
    there before then. (torch.compile needs less.) FLOPs are those of matrix products.
    """
    def attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=False):
        # Meta would choose the one with the T x T matrix.
        return FLASH(q, k, v, 0.0, is_causal)[0]

    model = meta_model(Config.from_dict(json.loads(config)), trains, lora).to(dtype).train()
    model.checkpointing(checkpointing)

    # `rows` samples of `length` tokens, each with an image, and a sound if the model hears.
    size = model.config.vision.image_size
    ear = model.config.audio
    with torch.device("meta"):
        tokens = torch.zeros(rows, length, dtype=torch.long)
        batch = {"images": torch.empty(rows, 3, size, size, dtype=dtype)}
        if ear is not None:
            batch["audio"] = torch.empty(rows, ear.n_mels, ear.n_frames, dtype=dtype)

    # Weights and gradients that are there before are not counted.
    known = list(model.parameters())
    for p in model.parameters():
        if grads and p.requires_grad:
            p.grad = torch.zeros_like(p)
            known.append(p.grad)

    with (Meter(model, known) as meter,
          mock.patch.object(F, "scaled_dot_product_attention", attention)):
        loss = model(tokens, labels=tokens, **batch).loss
        kept = meter.now
        forward = meter.flops
        meter.flops = Counter()
        loss.backward()
    return Rehearsal(kept, meter.peak, forward, meter.flops)


def gradients_add_up(stage, gpus, fsdp):
    """Are there gradients already when a backward pass begins? With several micro-batches, from the
    second on; and FSDP has its own place for them."""
    several = stage.batch_size > stage.micro_batch * gpus
    return several or (fsdp and gpus > 1)


def rehearse_stage(args, stage, config, gpus, fsdp, checkpointing):
    """The rehearsal of one micro-batch of a stage, as a run with these flags computes it."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    grads = gradients_add_up(stage, gpus, fsdp)
    return rehearse(json.dumps(config.to_dict()), tuple(stage.trains), tuple(stage.lora or ()),
                    stage.micro_batch, stage.max_length, bool(checkpointing), grads, dtype)


def planned(args, stage):
    """The preset as a stage trains it, and its model without memory."""
    config = Config.from_preset(args.preset)
    if args.scales is not None:
        config.vision.scales = read_scales(args.scales)
    if args.pixel_shuffle is not None:
        shuffled = dataclasses.replace(config.connector, pixel_shuffle=args.pixel_shuffle)
        config = dataclasses.replace(config, connector=shuffled)
    if args.recipe == "cumo":
        # (The decoder's experts, which a Mixtral brings along, stay.)
        for name in {"vision", "connector", *expert_parts(args)}:
            n = int(args.n_experts) if stage.has_experts and name in expert_parts(args) else 0
            part = getattr(config, name)
            part.n_experts = n if name == "connector" else [n] * part.n_layers
            part.top_k = args.top_k
    else:
        config.vision.n_experts = [0] * config.vision.n_layers
        config.connector.n_experts = 0
        config.text.top_k = args.top_k
        config.text.n_experts = [0] * config.text.n_layers
        if stage.has_experts:
            n_experts = str(len(mixture(args))) if args.experts else args.n_experts
            config.text.n_experts = decoder_experts(args, config.text.n_layers, n_experts)
    model = meta_model(config, stage.trains, stage.lora)
    check_trains(args, stage, model)
    return config, model


def memory(args, name, gpus, fsdp, checkpointing):
    """{kind: bytes on each GPU} in a step whose samples are all as long as can be, with an image
    each; "peak": the most at once."""
    stage = settings(args, name, gpus)
    config, model = planned(args, stage)
    # What FSDP shards is not dealt out, too.
    n_parts = 1 if fsdp else args.expert_parallel
    fsdp = fsdp and gpus > 1
    in_bf16 = args.device != "cpu"

    # The sizes of weights; of experts, what one GPU holds.
    sizes = {p: p.numel() for p in model.parameters()}
    dealt_out = set()
    for module in model.modules():
        if isinstance(module, MoE) and n_parts > 1:
            dealt_out |= {p for weight, p in module.named_parameters() if weight != "router"}
    for p in dealt_out:
        sizes[p] /= n_parts
    everything = sum(sizes.values())
    trained = [p for p in sizes if p.requires_grad]
    n_trained = sum(sizes[p] for p in trained)

    # What a step begins with. Weights and AdamW's two moments are in float32.
    shards = gpus if fsdp else 1
    fixed = {"weights": 4 * everything / shards, "optimizer": 8 * n_trained / shards}
    if fsdp:
        # What is in no block stays gathered; of the blocks, this one and the next. One block's
        # gradients are on their way.
        blocks = [sum(sizes[p] for p in block.parameters()) for block in blocks_of(model)]
        short = 2 if in_bf16 else 4
        gathered = everything - sum(blocks) + 2 * max(blocks)
        fixed["gathered"] = short * gathered + (short + 4) * max(blocks)
    elif gpus > 1:
        # (Experts that are dealt out exchange their gradients without DDP.)
        fixed["DDP buckets"] = 4 * sum(sizes[p] for p in trained if p not in dealt_out)
    if in_bf16 and not fsdp:
        fixed["bf16 copies"] = 2 * everything  # autocast's, of every weight

    # What comes and goes. The peak is in the backward pass, or in AdamW where it is not fused.
    grads = 4 * n_trained / shards
    update = 0 if in_bf16 else 8 * max(p.numel() for p in trained)
    rehearsal = rehearse_stage(args, stage, config, gpus, fsdp, checkpointing)
    # The rehearsal counts gradients as the backward pass makes them. Only where they add up to what
    # is there already, it leaves them out.
    in_backward = rehearsal.peak
    if gradients_add_up(stage, gpus, fsdp):
        in_backward += grads
    peak = sum(fixed.values()) + max(grads + update, in_backward)
    return fixed | {"gradients": grads, "activations": rehearsal.kept,
                    "backward pass": rehearsal.peak - rehearsal.kept, "peak": peak}


def plan(args):
    """Print what the stages would cost."""
    for name in stage_numbers(args):
        stage = settings(args, name, args.gpus)
        steps = planned_steps(args, stage)
        print_head(args, stage)
        flops = print_work(args, stage)
        print_memory(args, stage)
        print_hours(args, stage, steps, flops)
        if fits(args, stage, args.gpus, args.fsdp, args.checkpointing):
            print(f"fits into {args.gpu_gb} GB")
        else:
            print(f"does NOT fit into {args.gpu_gb} GB; the smallest number (1, 2, 4, 8...) that "
                  f"does: {smallest_fit(args, stage)}")


def planned_steps(args, stage):
    if not (args.data or args.steps or args.recipe in N_SAMPLES):
        raise ValueError("--plan: of how many steps? Give --steps or --data; "
                         f"{args.recipe}'s data sets are not on record here")
    if stage.batch_size % (args.gpus * stage.micro_batch):
        raise ValueError(f"batch size {stage.batch_size} is not a multiple of --gpus {args.gpus} x "
                         f"{stage.micro_batch} samples at a time")
    # --steps, or a tiny preset's; else an epoch of the data, the user's or the paper's.
    if args.data and not args.steps:
        files, _ = files_and_weights(args.data)
        n_samples = sum(len(data.LlavaJson(file)) for file in files)
        if args.val_fraction:
            n_samples -= n_held_out(args, n_samples)
    elif stage.steps is not None:
        return stage.steps
    else:
        n_samples = N_SAMPLES[args.recipe][stage.name]
    return args.epochs * max(1, n_samples // stage.batch_size)


def print_head(args, stage):
    way = "DDP"
    if args.fsdp:
        way = "FSDP"
    elif args.expert_parallel > 1:
        way = f"experts over {args.expert_parallel}"
    gpus = f"{args.gpus} GPUs ({way})" if args.gpus > 1 else "1 GPU"
    senses = "an image"
    if Config.from_preset(args.preset).audio is not None:
        senses += " and a sound"
    print(f"\n{args.preset}, stage {stage.name}, {gpus}: steps of {stage.batch_size}, "
          f"{stage.micro_batch} samples a GPU at a time, each of {stage.max_length} tokens and "
          f"{senses}")


def print_work(args, stage):
    """Print parameters and FLOPs of the model's parts -> FLOPs of a sample."""
    config, model = planned(args, stage)
    plain = rehearse_stage(args, stage, config, args.gpus, args.fsdp, False)
    checkpointed = rehearse_stage(args, stage, config, args.gpus, args.fsdp, True)

    # Each part's numbers, and their sums.
    rows = {}
    for part, parameters in count_parameters(model).items():
        trained = sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad)
        again = checkpointed.backward[part] - plain.backward[part]
        work = [plain.forward[part], plain.backward[part], again]
        rows[part] = [*parameters, trained, *[n / stage.micro_batch / 1e9 for n in work]]
    rows["all"] = [sum(column) for column in zip(*rows.values())]

    print("{:10} {:>14} {:>14} {:>14} {:>26} {:>10} {:>28}".format(
        "", "parameters", "activated", "trained", "GFLOPs a sample: forward", "backward",
        "again, with --checkpointing"))
    for part, row in rows.items():
        print("{:10} {:14,} {:14,} {:14,} {:26,.2f} {:10,.2f} {:28,.2f}".format(part, *row))

    forward, backward, again = rows["all"][3:]
    if args.checkpointing:
        backward += again
    return (forward + backward) * 1e9


def print_memory(args, stage):
    without = memory(args, stage.name, args.gpus, args.fsdp, False)
    checkpointed = memory(args, stage.name, args.gpus, args.fsdp, True)
    titles = "".join(f"{kind:>14}" for kind in without)
    print(f"{'GB on each GPU; peak: the most at once':42}{titles}")
    rows = {"without --checkpointing": without, "with --checkpointing": checkpointed}
    for title, kinds in rows.items():
        print(f"{title:42}" + "".join(f"{n / 1e9:14,.2f}" for n in kinds.values()))


def print_hours(args, stage, steps, flops):
    flops *= stage.batch_size
    hours = steps * flops / (args.mfu * args.peak_tflops * 1e12) / 3600
    how = " with checkpointing" if args.checkpointing else ""
    print(f"{steps:,} steps of {flops / 1e12:,.1f} TFLOPs{how}, {steps * stage.batch_size:,} "
          f"samples: {hours:,.2f} GPU-hours, {hours / args.gpus:,.2f} hours, at {args.mfu:.0%} of "
          f"{args.peak_tflops:g} TFLOP/s")


def fits(args, stage, gpus, fsdp, checkpointing):
    return memory(args, stage.name, gpus, fsdp, checkpointing)["peak"] < args.gpu_gb * 1e9


def smallest_fit(args, stage):
    """The smallest number of GPUs that does; with checkpointing only where it must be."""
    for exponent in range(12):
        gpus = 2**exponent
        at_once = settings(args, stage.name, gpus).micro_batch
        if stage.batch_size % (gpus * at_once):
            continue
        way = "1 GPU" if gpus == 1 else f"{gpus} GPUs with --fsdp"
        if not args.checkpointing and fits(args, stage, gpus, True, False):
            return way
        if fits(args, stage, gpus, True, True):
            if gpus == 1:
                return f"{way} with --checkpointing"
            return f"{way} --checkpointing"
    return "none. Try a smaller --micro-batch"


# ------------------------------------------------------------------------------------------------
# 12. Checks of flags, and of the model that a stage begins with


def validate(args):
    """ValueError where flags are out of range or do not go together: at once, not in stage 3."""
    for f in dataclasses.fields(Args):
        check_limits(f, getattr(args, f.name))
    Config.from_preset(args.preset)  # an unknown name stops here
    if args.stage not in (None, 1, 2, 3):
        raise ValueError(f"--stage {args.stage}: the stages are 1, 2 and 3 (backbones for tiny "
                         "presets: python assets/backbones.py)")
    check_expert_flags(args)
    check_given(args)
    elsewhere = args.init is not None or args.stage not in (None, 1)
    if bool(args.vision) != bool(args.llm) or args.vision and elsewhere:
        raise ValueError("--vision DIR and --llm DIR go together, start stage 1, and leave no room "
                         "for --init")
    if args.plan and "preset" not in args.given and (args.vision or args.init):
        raise ValueError("--plan counts a preset, not a folder: give --preset")
    check_rates(args)
    check_val(args)
    if args.stage is None and not args.resume:
        check_sources(args)


def check_rates(args):
    """Each part that --lr names trains in some stage, and so does one that it does not name, where
    it has a rate for the others. (Adapters are the decoder's.)"""
    training = set()
    for name in stages_of(args):
        stage = settings(args, name)
        training |= set(stage.trains)
        if stage.lora:
            training.add("text.ffn" if stage.lora[-1] == "ffn" else "text")
    modules = {part.split(".")[0] for part in training}
    trains = f"what trains is {', '.join(sorted(modules))}"
    rates = read_rates(args.lr)
    for part in rates:
        if part != "others" and part.split(".")[0] not in modules:
            raise ValueError(f"--lr {args.lr}: {part} does not train; {trains}, see --trains")

    # A rate alone is that of all; beside others, it is for what trains without one of its own.
    if len(rates) > 1 and "others" in rates and all(has_rate(part, rates) for part in training):
        rate = rates["others"]
        raise ValueError(f"--lr {args.lr}: {rate:g} does nothing: {trains}, all with rates of "
                         f"their own; leave {rate:g} out, or see --trains")


def has_rate(part, rates):
    """Is a rate for this part there, or for one that it lies in (text.moe in text)?"""
    # Each of the decoder's parts lies in those before it.
    decoder = [name for name in PARTS if name.startswith("text")]
    if part in decoder:
        return bool(rates.keys() & set(decoder[:decoder.index(part) + 1]))
    return part in rates


def check_sources(args):
    """A new run moves an old --out aside. What it begins with must not lie in there."""
    out = Path(args.out).resolve()
    given = [(name, getattr(args, name)) for name in ("init", "vision", "llm", "audio",
                                                   "images", "val")]
    if args.data:
        files, _ = files_and_weights(args.data)
        given += [("data", file) for file in files]
    for name, path in given:
        if path and Path(path).resolve().is_relative_to(out):
            raise ValueError(f"{flag_name(name)} {path} lies in --out {args.out}, which a new run "
                             "moves aside: give another --out")


def check_val(args):
    """The samples of --val are not those of --data, however the file is spelled or linked."""
    if not args.val or not os.path.exists(args.val):
        return
    files, _ = files_and_weights(args.data)
    for file in files:
        if os.path.exists(file) and os.path.samefile(file, args.val):
            raise ValueError(f"--val {args.val} is a file of --data ({file}): its samples would be "
                             "learnt; give another file, or --val-fraction (0.02) instead")


def check_limits(f, value):
    """The kind and the size of a flag's value. A number that is no number (nan) fits no limit."""
    if value is None and "None" in f.type:
        return
    name = flag_name(f.name)
    limits = f.metadata
    kind = kind_of(f)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ValueError(f"{name} = {value!r} must be of the type {kind.__name__}")
    if kind is list and not data.are_texts(value):
        raise ValueError(f"{name} = {value!r} must be a list of texts")

    if kind in (int, float):
        if not value >= limits.get("at_least", -math.inf):
            raise ValueError(f"{name} = {value} must be at least {limits['at_least']}")
        if not value > limits.get("above", -math.inf):
            raise ValueError(f"{name} = {value} must be above {limits['above']}")
        at_most = limits.get("at_most", 2**31 - 1)
        if not value <= at_most:
            raise ValueError(f"{name} = {value} must be at most {at_most}")

    if value not in limits.get("choices", (value,)):
        raise ValueError(f"{name} {value}: known are {', '.join(map(str, limits['choices']))}")
    if "read" in limits:
        limits["read"](value)
    if "parts" in limits:
        for part in value.split(","):
            if part not in limits["parts"]:
                raise ValueError(f"{name} {value}: {part!r} is no part; known are "
                                 f"{', '.join(limits['parts'])}")


def check_given(args):
    """A flag that was given must do something."""
    makes_experts = any(settings(args, name).has_experts for name in stages_of(args))
    for f in dataclasses.fields(Args):
        if f.name not in args.given:
            continue
        name = flag_name(f.name)
        partners = f.metadata.get("belongs_to", ())
        if partners and not any(getattr(args, partner) for partner in partners):
            names = " or ".join(flag_name(partner) for partner in partners)
            raise ValueError(f"{name} does nothing without {names}: give both, or leave it out")

        rival = f.metadata.get("not_with")
        if rival in args.given:
            raise ValueError(f"{name} does nothing with {flag_name(rival)}: give one of them")

        recipes = f.metadata.get("recipes", (args.recipe,))
        if args.recipe not in recipes and getattr(args, f.name):
            raise ValueError(f"{name} belongs to --recipe {' and '.join(recipes)}")
        if "of_experts" in f.metadata and not makes_experts:
            raise ValueError(f"{name} is about experts, and this run makes none: leave it out (or "
                             "--dense, or see --stage)")

    has_rank = args.lora_rank or (args.lora_rank is None and args.recipe == "uni-moe")
    if args.lora_alpha and not has_rank:
        raise ValueError("--lora-alpha does nothing without --lora-rank")
    if args.facts and args.recipe == "uni-moe":
        raise ValueError("--facts shows pictures alone, and --recipe uni-moe would train each of "
                         "its senses on them: take --recipe moe-llava or cumo")
    if args.noisy_gate and args.top_k == 1:
        raise ValueError("--noisy-gate draws the choices after the first, and --top-k 1 has none")
    hearing = {"audio", "resampler"} & set((args.trains or "").split(","))
    from_scratch = args.stage is None and args.init is None
    if hearing and from_scratch and args.recipe != "uni-moe":
        raise ValueError(f"--trains {args.trains}: a model of --recipe {args.recipe} hears nothing")
    if args.stage is None and not makes_experts:
        # Only Uni-MoE has adapters in a stage before that, which --lora-rank changes.
        ignored = args.trains and "--trains"
        if args.lora_rank and args.recipe != "uni-moe":
            ignored = "--lora-rank"
        if ignored:
            raise ValueError(f"{ignored} is about the stages with experts in a run of all stages, "
                             "and this one makes none: give --stage")
    if args.experts and args.stage != 3:
        raise ValueError("--experts are put together in stage 3: give --stage 3, too")
    for stage in (settings(args, name) for name in stages_of(args)):
        if not stage.trains and not stage.lora:
            raise ValueError(f"--trains {args.trains}: nothing would train in stage "
                             f"{stage.name}; give --lora-rank, too, for adapters")

    # What only the last of Uni-MoE's stages would notice.
    of_all_stages = args.recipe == "uni-moe" and args.stage is None and not args.plan
    if of_all_stages and args.data:
        raise ValueError("--recipe uni-moe with --data trains one stage 2, not one for each sense: "
                         "give --stage, and in stage 3 --experts")
    if of_all_stages and args.fsdp and not args.dense:
        raise ValueError("--fsdp cannot put Uni-MoE's experts together: give --stage, and see "
                         "`python upcycle.py --experts`")


def check_expert_flags(args):
    try:
        numbers = [int(n) for n in args.n_experts.split(",")]
    except ValueError:
        raise ValueError(f"--n-experts {args.n_experts}: a number, or several with "
                         "commas") from None
    if args.recipe != "moe-llava" and len(numbers) > 1:
        raise ValueError(f"--n-experts {args.n_experts}: with --recipe {args.recipe}, all layers "
                         "have one number")
    if args.recipe == "uni-moe" and (args.experts or args.stage is None) and not args.dense:
        numbers = [len(mixture(args))]
    if not 1 <= args.top_k <= min(numbers):
        raise ValueError(f"top_k = {args.top_k} of {min(numbers)} experts; need 1 <= --top-k <= "
                         "--n-experts")

    # The number of experts of a single stage's model is known only when that is loaded.
    n = args.expert_parallel
    world = args.gpus if args.plan else WORLD
    if n > 1 and args.fsdp:
        raise ValueError("--expert-parallel and --fsdp are two ways to shard the same weights: "
                         "give one of them")
    if args.cuda_graphs and (args.fsdp or args.checkpointing or n > 1):
        raise ValueError("--cuda-graphs wants all weights and activations to stay in place: leave "
                         "--fsdp, --checkpointing and --expert-parallel out")
    if world % n:
        raise ValueError(f"--expert-parallel {n}: {world} process(es) cannot form groups of {n}")
    if args.stage is None and not args.dense and any(number % n for number in numbers):
        raise ValueError(f"--n-experts {args.n_experts} is not a multiple of --expert-parallel {n}")


def check_model(args, stage, model, tokenizer, source):
    """Is it a model that these flags can train?"""
    if tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer.json, which training needs; copy it there "
                         "(where there is only a tokenizer.model, transformers' "
                         "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it)")
    if getattr(model, "vision", None) is None:
        raise ValueError(f"{source}: a language model alone, without the vision tower and "
                         "connector that training needs")

    config = model.config
    if args.stage is None:
        data.check_end_mark(tokenizer, args.template or config.template)  # not first in stage 2
    check_decoder_experts(args, config)

    if args.pixel_shuffle not in (None, config.connector.pixel_shuffle):
        raise ValueError(f"--pixel-shuffle {args.pixel_shuffle}: the connector of {source} was "
                         f"trained with {config.connector.pixel_shuffle}; only stage 1 makes a new "
                         "one")

    wants_ear = args.recipe == "uni-moe" or {"audio", "resampler"} & set(stage.trains)
    if wants_ear and config.audio is None:
        raise ValueError(f"{source}: hears nothing; --trains {','.join(stage.trains)} of "
                         f"{args.recipe} wants a model that began with --vision, --llm and --audio "
                         "WHISPER_DIR")

    if args.recipe != "cumo" and not args.dense and not any(config.text.n_experts):
        decoder_experts(args, config.text.n_layers)  # a wrong placement stops stage 1 already


def check_decoder_experts(args, config):
    """Does the decoder have the experts that --lr and --trains name, or get them in a later stage?
    """
    makes_experts = any(settings(args, name).has_experts for name in stages_of(args))
    gets_some = makes_experts and "text" in expert_parts(args)
    if gets_some or any(config.text.n_experts):
        return
    given = {"--lr": (args.lr, read_rates(args.lr)),
             "--trains": (args.trains, (args.trains or "").split(","))}
    for flag_given, (text, parts) in given.items():
        named = {"text.moe", "text.router"} & set(parts)
        if named:
            raise ValueError(f"{flag_given} {text}: the decoder has no experts, and gets none: "
                             f"leave {' and '.join(sorted(named))} out, or see --experts-in")


def check_trains(args, stage, model):
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"stage {stage.name}: --trains {args.trains}: nothing to train here; "
                         "text.moe and text.router need experts in the decoder, see --experts-in")


def check_experts(args, config):
    """The model has experts. Flags that ask for others cannot be met."""
    parts = expert_parts(args)
    others = [name for name in ("vision", "connector")
              if name not in parts and any(numbers_of(getattr(config, name)))]
    if "experts_in" in args.given and others:
        raise ValueError(f"the model has experts already in {' and '.join(others)}: --experts-in "
                         "cannot change that")

    for name in parts:
        part = getattr(config, name)
        numbers = set(numbers_of(part)) - {0}
        layers = [n > 0 for n in numbers_of(part)]

        # A flag that was not given asks for nothing.
        differs = "experts" in args.given or ("experts_in" in args.given and not numbers)
        if "n_experts" in args.given:
            asked = [int(n) for n in args.n_experts.split(",")]
            in_order = [n for n in numbers_of(part) if n > 0]
            differs |= asked != in_order if len(asked) > 1 else set(asked) != numbers
        if "top_k" in args.given:
            differs |= args.top_k != part.top_k
        if "moe_layers" in args.given:
            differs |= [n > 0 for n in decoder_experts(args, len(layers))] != layers
        if differs:
            raise ValueError(f"the model has experts already ({numbers or 'none'} in {name}, "
                             f"top-{part.top_k}): --n-experts, --top-k, --moe-layers, --experts "
                             "and --experts-in cannot change them")


if __name__ == "__main__":
    warnings.formatwarning = generate.plain_warning
    try:
        main()
    except (ValueError, OSError) as e:
        # One line, without the traceback of a process that loads data.
        sys.exit(f"train.py: {str(e).rsplit('ValueError: ', 1)[-1].strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
