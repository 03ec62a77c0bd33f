"""upcycle.py: a dense model becomes a mixture of experts; and how weights get in and out.

Sparse upcycling (arXiv 2212.05055) does not train experts from scratch. Every expert starts as a
copy of the trained dense FFN, and only the router is new. The weights of a token's experts sum to 1
(where it has two or more), so at first the upcycled block computes exactly what the dense one did:
training goes on where it was, and the experts grow apart from there. CuMo's "co-upcycling" does
this in the vision tower and in the connector at once, between its second and third stage. Uni-MoE's
experts are no copies of one FFN: they were fine-tuned apart, each on one modality or task, and meet
in one decoder.

The second part of this file reads and writes model folders: this project's own (config.json,
model.safetensors, tokenizer.json) and those of other programs. `python upcycle.py --help` says how
to convert one into another.

Shapes: N tokens, D width (D_out behind the FFN), F FFN width, E experts.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import stat
import sys
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from functools import partial
from os.path import exists, join
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
from kernels import FFN, MoE
from model import (ROPE_SCALING, SIGLIP, AudioConfig, AudioTransformer, Config, Connector,
                   ConnectorConfig, CuMo, Decoder, Resampler, TextConfig, VisionConfig,
                   VisionTransformer, adapted, check_fields, merge_state)

# -------------------------------------------------------------------------------------------------
# 1. Dense -> experts


@torch.no_grad()
def experts_from(dense: FFN, n_experts, top_k, generator, real_router=False, **limits) -> MoE:
    """A MoE whose experts are all copies of one dense FFN, on its device, in its dtype and mode.

    In short: for each weight w of the FFN, the MoE's is torch.stack([w] * n_experts), and its
    router is 0.02 * torch.randn(n_experts, dim). All else here is care.

    real_router: draw the router now, on the CPU, even if the dense FFN is on meta and gets its
    weights later (FSDP). limits: what else kernels.MoE takes. Asserts that the output is unchanged
    (`assert_same_output`).
    """
    ffn_dim, dim = dense.w_in.shape
    # A module on meta takes no memory: its weights are made below.
    with torch.device("meta"):
        moe = MoE(dim, ffn_dim, dense.act, n_experts, top_k, dim_out=len(dense.w_out),
                  gated=dense.w_gate is not None, bias=dense.b_in is not None, **limits)

    # Every expert is a copy, so each weight gets E in front: w_in (F, D) becomes (E, F, D).
    state = {name: torch.stack([w] * n_experts) for name, w in dense.named_parameters()}

    # Only the router is new, and small, so that in the beginning no expert is preferred by much.
    router = torch.randn(n_experts, dim, generator=generator) * 0.02  # (E, D)
    device = dense.w_in.device
    if real_router and dense.w_in.is_meta:
        device = "cpu"
    state["router"] = router.to(device, dense.w_in.dtype)
    moe.load_state_dict(state, assign=True)
    moe.train(dense.training)

    # x is drawn even on meta, where nothing can be compared: otherwise the generator would give the
    # next layer another router than without meta.
    assert_same_output(dense, moe, torch.randn(16, dim, generator=generator))
    return moe


def assert_same_output(dense, moe, x):
    """Assert that the MoE gives what the dense FFN gives for x (N, D). Where a token's weights are
    not rescaled to sum to 1, it must give that, times the sum of the weights."""
    # There is nothing to compare on meta, and experts with a capacity may drop tokens.
    if dense.w_in.is_meta or moe.capacity_factor or moe.eval_capacity_factor:
        return
    x = x.to(dense.w_in)
    before = dense(x)[0].float()
    after, routing = moe(x)
    if not rescales(moe):
        before = before * routing.weights.sum(-1, keepdim=True)  # (N, D) * (N, 1)
    difference = (before - after.float()).abs().max()

    # Rounding is allowed: weights sum to 1 only nearly, and long sums are added in another order.
    # A real fault would be larger by far.
    tolerance = (8 * torch.finfo(x.dtype).eps + 1e-4) * before.abs().max().clamp(min=1e-3)
    assert difference <= tolerance, f"upcycling changed the output by {difference}"


def upcycle(model: CuMo, vision=0, connector=0, text=0, top_k: int = 2, seed: int = 0,
            real_routers: bool = False, experts=None, average: bool = False) -> CuMo:
    """Turn dense FFNs into MoEs, in place, and return the model.

    vision, connector, text: the number of experts, for all layers of the part or as a list with one
    for each layer; 0 leaves a layer dense. CuMo's third stage is upcycle(model, vision=4,
    connector=4), MoE-LLaVA's is upcycle(model, text=[4, 0] * 16), after which train.make_experts
    also sets its losses in the config (balance_coef, z_coef, text.aux) and its capacity.
    experts: folders or CuMos of this architecture, fine-tuned apart, to be put together as the
    decoder's experts (`mix_experts`), without `text` in all layers. Uni-MoE then trains without
    routing losses: set balance_coef and z_coef to 0 in the config.
    real_routers: a model on meta, whose other weights come later, gets its routers now.
    With top_k=1, or renormalise=False in the config, the output changes: see warn_of_weights.
    Raises ValueError for what cannot be done, before anything changes; of `experts`, whose tensors
    are read one by one, a damaged folder may be noticed later.
    """
    # Uni-MoE: as many experts as there are models to put together.
    sources = []
    if experts is not None:
        sources = open_sources(model, experts, average)
        text = text or len(sources)
    wanted = {"vision": vision, "connector": connector, "text": text}
    counts = layer_counts(model, wanted, top_k, sources)
    warn_of_weights(model.config, counts, top_k)

    # A generator of its own: the same routers in every process.
    generator = torch.Generator().manual_seed(seed)
    for part, numbers in counts.items():
        if not any(numbers):
            continue
        config = getattr(model.config, part)
        # Only the decoder's experts can have a capacity.
        limits = {"renormalise": config.renormalise}
        if part == "text":
            limits = config.expert_limits
        # owner: the block, or the connector, whose .ffn it is.
        for layer, (owner, n_experts) in enumerate(zip(ffn_owners(model, part), numbers)):
            if n_experts == 0:
                continue
            owner.ffn = experts_from(owner.ffn, n_experts, top_k, generator, real_routers, **limits)

            # The config follows, so that a saved model is built with these experts.
            config.top_k = top_k
            if part == "connector":
                config.n_experts = n_experts
            else:
                config.n_experts[layer] = n_experts
    if sources:
        mix_experts(model, sources, average)
    return model


@torch.no_grad()
def mix_experts(model, sources, average):
    """Uni-MoE's mixture: expert e of every decoder MoE becomes the FFN of the e-th source.

    All else stays the model's own, or with `average` becomes the mean over the sources, whose
    weights stream through one by one.
    """
    params = dict(model.named_parameters())
    # A source is dense: its FFN (F, D) becomes slice e of the model's (E, F, D).
    for e, tensors in enumerate(sources):
        for name, _, tensor in tensors:
            if name.startswith("text.") and is_stacked(name, params):
                copy_into_shard(params[name], e, tensor)
            elif average:
                # A running mean: the first counts 1/1, the second 1/2, the third 1/3...
                params[name].lerp_(tensor.to(params[name]), 1 / (e + 1))


# ---- You can stop here on a first reading. Below this line: the checks behind upcycle, other ----
# ---- programs' names and configurations, model folders in and out, and the command line.      ----


def moe_layers(where, n_layers):
    """The decoder layers that get experts: a place by name, as MoE-LLaVA compares them (every other
    layer is its choice), or layer numbers with commas. Raises ValueError for anything else."""
    layers = list(range(n_layers))
    half = n_layers // 2
    places = {"every_other": layers[::2], "all": layers,
              "first_half": layers[:half], "second_half": layers[half:]}
    chosen = places.get(where)
    if chosen is None:
        try:
            chosen = [int(i) for i in where.split(",")]
        except ValueError:
            raise ValueError(f"--moe-layers {where}: {', '.join(places)}, or layer numbers "
                             "with commas") from None
    if not chosen or not set(chosen) <= set(layers) or len(set(chosen)) < len(chosen):
        raise ValueError(f"--moe-layers {where}: the decoder has layers 0 to {n_layers - 1}; "
                         "name each once")
    return chosen


def expert_counts(n_layers, where, n_experts):
    """The number of experts of each decoder layer, 0 where it stays dense.

    where: as for moe_layers. n_experts: one number for all of these layers, or one for each of
    them, with commas. For example (4, "0,3", "4,2") gives [4, 0, 0, 2].
    """
    layers = moe_layers(where, n_layers)
    numbers = [int(n) for n in n_experts.split(",")]
    if len(numbers) not in (1, len(layers)):
        raise ValueError(f"--n-experts {n_experts} has {len(numbers)} numbers, --moe-layers "
                         f"{where} are {len(layers)} layers")
    return spread(numbers, layers, n_layers)


def spread(numbers, layers, n_layers):
    """One number for each of these layers, or one for them all -> one for every layer, or 0."""
    if len(numbers) == 1:
        numbers = numbers * len(layers)
    number_of = dict(zip(layers, numbers, strict=True))
    return [number_of.get(layer, 0) for layer in range(n_layers)]


def ffn_owners(model, part):
    """The modules of a part that have an FFN each: its layers, or the connector itself."""
    module = getattr(model, part)
    if module is None:
        return []
    return getattr(module, "layers", [module])


def open_sources(model, experts, average):
    """For each model to be put together, a stream of (our name, None, tensor).

    The sizes of all of them are compared with the model's before the first tensor is read.
    """
    on_meta = next(model.parameters()).is_meta
    if not experts or on_meta or any(model.config.text.n_experts):
        raise ValueError("experts: name one model at least, and put them into a dense decoder "
                         "that has its weights")
    streams = []
    for i, source in enumerate(experts):
        where = f"expert {i}"
        if isinstance(source, CuMo):
            state = merge_state(source.state_dict(), source)
            if source is model and average:
                # Averaging changes the model while the others still stream in.
                state = {name: tensor.clone() for name, tensor in state.items()}
            streams.append((name, None, tensor) for name, tensor in state.items())
        else:
            where = os.fspath(source)
            source, _ = load_decoder(where, later=streams)

        # What cannot become an expert of this model.
        if any(source.config.text.n_experts):
            raise ValueError(f"{where}: has experts in its decoder; only dense models can become "
                             "experts")
        check_same_sizes(where, source.config, model.config, average)
    return streams


def load_decoder(folder, **options):
    """As `load`, or ValueError for a folder that has no decoder to take experts from."""
    model, tokenizer = load(folder, **options)
    if not isinstance(model, CuMo):
        raise ValueError(f"{folder}: an encoder alone; experts come from models with a decoder")
    return model, tokenizer


# -------------------------------------------------------------------------------------------------
# 2. What other programs call the same tensors
#
# The names in CuMo's own checkpoints are called the published names here. Those of CLIP, SigLIP,
# LLaMA, Mistral, Mixtral, Qwen2, Qwen3, LLaVA and MoE-LLaVA differ from them by prefixes and a few
# words, and RENAMES turns all of them into published names. TABLE says what we call each of these.
# It serves loading, saving and the listing that `python upcycle.py` prints.
#
# {i} is a layer, {e} an expert; {p} is weight or bias, and {w} our w or b. Their experts have a
# tensor each; ours are stacked, so w_in[{e}] is one slice of a tensor (E, F, D).

TOWER = "model.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
WHISPER = "audio_tower.encoder."

TABLE = [  # (published prefix, our prefix, rows of published name and our name)
    (TOWER, "vision.", """
        embeddings.class_embedding             cls
        embeddings.patch_embedding.{p}         patch.{p}
        embeddings.position_embedding.weight   pos
        post_layernorm.{p}                     post_norm.{p}
        pre_layrnorm.{p}                       pre_norm.{p}"""),  # the typo is CLIP's
    (TOWER + "encoder.layers.{i}.", "vision.layers.{i}.", """
        layer_norm1.{p}                        norm1.{p}
        layer_norm2.{p}                        norm2.{p}
        self_attn.q_proj.{p}                   q.{p}
        self_attn.k_proj.{p}                   k.{p}
        self_attn.v_proj.{p}                   v.{p}
        self_attn.out_proj.{p}                 o.{p}
        mlp.fc1.{p}                            ffn.{w}_in
        mlp.fc2.{p}                            ffn.{w}_out
        gate.weight                            ffn.router
        experts.{e}.fc1.{p}                    ffn.{w}_in[{e}]
        experts.{e}.fc2.{p}                    ffn.{w}_out[{e}]"""),
    (PROJECTOR, "connector.", """
        0.{p}                                  ffn.{w}_in
        2.{p}                                  ffn.{w}_out
        gate.weight                            ffn.router
        experts.{e}.0.{p}                      ffn.{w}_in[{e}]
        experts.{e}.2.{p}                      ffn.{w}_out[{e}]"""),
    (WHISPER, "audio.", """
        conv1.{p}                              conv1.{p}
        conv2.{p}                              conv2.{p}
        embed_positions.weight                 pos
        layer_norm.{p}                         norm.{p}"""),
    (WHISPER + "layers.{i}.", "audio.layers.{i}.", """
        self_attn_layer_norm.{p}               norm1.{p}
        final_layer_norm.{p}                   norm2.{p}
        self_attn.q_proj.{p}                   q.{p}
        self_attn.k_proj.weight                k.weight
        self_attn.v_proj.{p}                   v.{p}
        self_attn.out_proj.{p}                 o.{p}
        fc1.{p}                                ffn.{w}_in
        fc2.{p}                                ffn.{w}_out"""),
    ("", "text.", """
        model.embed_tokens.weight              embed.weight
        model.norm.weight                      norm.weight
        lm_head.weight                         head.weight"""),
    ("model.layers.{i}.", "text.layers.{i}.", """
        input_layernorm.weight                 norm1.weight
        post_attention_layernorm.weight        norm2.weight
        self_attn.q_proj.{p}                   q.{p}
        self_attn.k_proj.{p}                   k.{p}
        self_attn.v_proj.{p}                   v.{p}
        self_attn.o_proj.weight                o.weight
        self_attn.q_norm.weight                q_norm.weight
        self_attn.k_norm.weight                k_norm.weight
        mlp.gate_proj.weight                   ffn.w_gate
        mlp.up_proj.weight                     ffn.w_in
        mlp.down_proj.weight                   ffn.w_out
        block_sparse_moe.gate.weight           ffn.router
        block_sparse_moe.experts.{e}.w1.weight ffn.w_gate[{e}]
        block_sparse_moe.experts.{e}.w3.weight ffn.w_in[{e}]
        block_sparse_moe.experts.{e}.w2.weight ffn.w_out[{e}]"""),
]
PUBLISHED = {}  # our name -> the published one, with {i} and {e} in both
for their_prefix, our_prefix, rows in TABLE:
    for row in rows.strip().splitlines():
        for kind in ("weight", "bias"):
            theirs, ours = row.replace("{p}", kind).replace("{w}", kind[0]).split()
            PUBLISHED[our_prefix + ours] = their_prefix + theirs

# Words of LLaVA in transformers and of MoE-LLaVA, for reading and writing: (published, theirs).
LLAVA_WORDS = [(PROJECTOR + "0.", PROJECTOR + "linear_1."),
               (PROJECTOR + "2.", PROJECTOR + "linear_2.")]
MOE_LLAVA_WORDS = [(".block_sparse_moe.gate.", ".mlp.deepspeed_moe.gate.wg."),
                   (".block_sparse_moe.experts.",
                    ".mlp.deepspeed_moe.experts.deepspeed_experts.")]

RENAMES = [  # applied one after the other
    # The tower in LLaVA (vision_tower.vision_model.X) and MoE-LLaVA
    # (model.image_tower.image_tower.vision_model.X).
    (r"^(model\.)?(vision|image)_tower\.((vision|image)_tower\.)?(vision_model\.)?", TOWER),
    # In CLIP's and SigLIP's folders, old and new (vision_model.encoder.X), and in CuMo's clip.bin
    # (encoder.X). What (?=...) looks at stays.
    (r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)", TOWER),
    # The connector in LLaVA and MoE-LLaVA.
    (r"^(model\.)?(mm_projector|multi_modal_projector)\.(image_spatial_proj\.)?", PROJECTOR),
    *((re.escape(theirs), ours) for ours, theirs in LLAVA_WORDS + MOE_LLAVA_WORDS),
    # MoE-LLaVA's experts.
    (r"(\.experts\.\d+\.)gate_proj\.", r"\1w1."),
    (r"(\.experts\.\d+\.)up_proj\.", r"\1w3."),
    (r"(\.experts\.\d+\.)down_proj\.", r"\1w2."),
    # The decoder in LLaVA.
    (r"^(model\.)?language_model\.(?=lm_head)", ""),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
]
# What a checkpoint may hold and this model has no place for: what is behind CLIP's last layer,
# which LLaVA does not use, and SigLIP's head, which makes one vector of an image; constants that
# old versions stored; the half of CLIP and SigLIP that reads; Whisper's; and a head that is tied
# to the embedding and stored there, under their name or ours.
IGNORED = (r"\.post_layernorm\.|^model\.vision_tower\.vision_model\.head\."
           r"|\.position_ids$|\.rotary_emb\.inv_freq$"
           r"|^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$"
           r"|^audio_tower\.(decoder|proj_out)\.|^lm_head\.weight$|^text\.head\.weight$")


def published_name(name):
    """A tensor's name in any of the layouts but Whisper's -> its published name."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def published_whisper_name(name):
    """Whisper's names collide with CLIP's, so they get a prefix of their own."""
    return "audio_tower." + name.removeprefix("model.")


def pattern_of(name):
    """model.layers.7.experts.2.x -> model.layers.{i}.experts.{e}.x, and w_in[2] -> w_in[{e}]"""
    name = re.sub(r"(?<=layers\.)\d+", "{i}", name)
    return re.sub(r"(?<=experts\.)\d+|(?<=\[)\d+(?=\])", "{e}", name)


def is_stacked(name, names):
    """Does our tensor of this name hold all experts' weights? Then there is a router beside it."""
    owner, _, kind = name.rpartition(".")
    return kind != "router" and owner + ".router" in names


def published_places(state):
    """{published name: (our name, expert)} of all tensors of our state dict.

    expert is None where the two tensors are the same, and else which slice of ours is theirs:
    "text.layers.1.ffn.w_in" (4, F, D) gives four, the first of which is
    "model.layers.1.block_sparse_moe.experts.0.w3.weight": ("text.layers.1.ffn.w_in", 0).
    """
    places = {}
    for ours, tensor in state.items():
        pattern = pattern_of(ours)
        experts = [None]
        if is_stacked(ours, state):
            pattern += "[{e}]"
            experts = range(len(tensor))

        # The layer's number, if there is one, is the same on both sides.
        layer = re.search(r"layers\.(\d+)|$", ours)[1]
        for expert in experts:
            places[PUBLISHED[pattern].format(i=layer, e=expert)] = (ours, expert)
    return places


def published(state):
    """Our state dict under the published names, experts one by one: views, no copies."""
    out = {}
    for theirs, (ours, expert) in published_places(state).items():
        out[theirs] = state[ours] if expert is None else state[ours][expert]
    return out


# The prefixes under which the two are written; RENAMES reads older and newer ones, too.
HF_LLAVA_NAMES = [*LLAVA_WORDS, (TOWER, "vision_tower.vision_model."),
                  (PROJECTOR, "multi_modal_projector."), ("lm_head.", "language_model.lm_head."),
                  *((f"model.{part}.", f"language_model.model.{part}.")
                    for part in ("embed_tokens", "layers", "norm"))]
MOE_LLAVA_NAMES = [*MOE_LLAVA_WORDS, (TOWER, "model.image_tower.image_tower.vision_model."),
                   (PROJECTOR, PROJECTOR + "image_spatial_proj."),
                   (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")]


def respelled(tensors, names):
    """Tensors under their published names -> the same under another layout's."""
    out = {}
    for name, tensor in tensors.items():
        for published_part, theirs in names:
            name = name.replace(published_part, theirs)
        out[name] = tensor
    return out


# -------------------------------------------------------------------------------------------------
# 3. Configurations in: other programs' config.json -> ours
#
# Each family has a reader. It takes what config.json says (`theirs`), {published name: shape} of
# all tensors, and the folder's path. What a config leaves out is read off the tensors' shapes, or
# it is the default of transformers' class.

DECODERS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
            "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
            "mixtral": "MixtralForCausalLM"}
# How a conversation is written where the tokenizer does not tell.
TEMPLATE_OF = {"llama": "vicuna", "mistral": "mistral", "qwen2": "vicuna", "qwen3": "vicuna",
               "mixtral": "mistral"}
LLAVA_DECODERS = {  # model_type of a whole model -> its decoder's
    "llava": "llama", "llava_llama": "llama", "moe_llava_llama": "llama",
    "llava_mistral": "mistral", "moe_llava_mistral": "mistral", "llava_mixtral": "mixtral"}
TOWERS = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
SUPPORTED = (f"this project's own, {', '.join(DECODERS.values())}, {', '.join(TOWERS.values())}, "
             "CLIPModel, SiglipModel, WhisperModel, the published CuMo (llava_mistral, "
             "llava_mixtral), LLaVA-1.5 (llava, llava_llama) and MoE-LLaVA (moe_llava_mistral, "
             "moe_llava_llama)")

PATCHES_ONLY = ("only patch features without CLS, no image start and end tokens, no video tower, "
                "and connectors of type mlp2x_gelu and smoe_mlp are supported; the config asks "
                "for others")

# Our field -> their key: read here, written in section 4.
CLIP_KEYS = dict(
    image_size="image_size", patch_size="patch_size", dim="hidden_size",
    n_layers="num_hidden_layers", n_heads="num_attention_heads", ffn_dim="intermediate_size",
    act="hidden_act", norm_eps="layer_norm_eps")
DECODER_KEYS = dict(
    vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers",
    n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
    ffn_dim="intermediate_size", act="hidden_act", norm_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings", max_positions="max_position_embeddings",
    start_token="bos_token_id")
LLAVA_KEYS = dict(select_layer="mm_vision_select_layer", scales="scales")
LOSS_KEYS = dict(balance_coef="balance_loss_coef", z_coef="router_z_loss_coef")
MOE_LLAVA_KEYS = dict(top_k="top_k_experts", capacity_factor="capacity_factor",
                      eval_capacity_factor="eval_capacity_factor", min_capacity="min_capacity")


def read_object(theirs, key):
    """An object inside their config; {} where there is none."""
    value = theirs.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} = {value!r:.60} must be an object")
    return value


def read_keys(theirs, keys):
    """{our field: its value in their config}; null there counts as left out."""
    return {ours: theirs[key] for ours, key in keys.items() if theirs.get(key) is not None}


def write_keys(config, keys):
    """{their key: the value of our field}; what we do not know is left out."""
    fields = {key: getattr(config, ours) for ours, key in keys.items()}
    return {key: value for key, value in fields.items() if value is not None}


def count(names, pattern):
    """How many layers or experts there are, by the largest number in the names that match."""
    found = [re.search(pattern, name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def first_dimension(shapes, pattern):
    """The first dimension of the first tensor whose name matches: how wide its output is."""
    return next((shape[0] for name, shape in shapes.items() if re.search(pattern, name)), None)


def vision_config(theirs, shapes, **more):
    """The tower's config, from CLIP's (which may be empty) or SigLIP's and the shapes. more: other
    fields."""
    kind = theirs.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise ValueError(f"a vision tower of type {kind} is not supported; supported: "
                         f"{', '.join(TOWERS.values())}")
    siglip = is_siglip(shapes)
    if siglip and not theirs:
        raise ValueError("a SigLIP tower without its own config.json, which says how many heads it "
                         "has; put its folder where mm_vision_tower says")
    dim, _, patch_size, _ = shapes[TOWER + "embeddings.patch_embedding.weight"]  # (D, 3, P, P)
    n_positions, _ = shapes[TOWER + "embeddings.position_embedding.weight"]  # (1 + N, D)
    family = SIGLIP if siglip else {}

    # What the family and the shapes say, and over it what the config says.
    fields = family | dict(
        # A square of patches, and CLIP's CLS.
        image_size=math.isqrt(n_positions) * patch_size,
        patch_size=patch_size, dim=dim,
        n_layers=count(shapes, TOWER + r"encoder\.layers\.(\d+)\."),
        # The default of both families. Without any config: every CLIP's heads are 64 wide.
        n_heads=12 if theirs else max(1, dim // 64),
        ffn_dim=first_dimension(shapes, TOWER + r"encoder\.layers\.0\..*fc1\.weight"),
    )
    vision = VisionConfig(**fields | read_keys(theirs, CLIP_KEYS) | more)
    return Config(vision=vision).vision  # Config checks the fields


def is_siglip(shapes):
    """Are these the tensors of a SigLIP tower? It has neither CLIP's CLS nor its first norm."""
    return not {TOWER + "embeddings.class_embedding", TOWER + "pre_layrnorm.weight"} & shapes.keys()


def text_config(theirs, shapes, kind):
    """The decoder's config, from that of a Hugging Face decoder of this kind (see DECODERS)."""
    vocab_size, dim = shapes["model.embed_tokens.weight"]
    attention = "model.layers.0.self_attn."

    # What the shapes and transformers' defaults say, and over it what the config says.
    fields = dict(
        vocab_size=vocab_size, dim=dim, n_heads=32, norm_eps=1e-6,
        n_layers=count(shapes, r"^model\.layers\.(\d+)\."),
        ffn_dim=first_dimension(shapes, r"^model\.layers\.0\..*(up_proj|\.w3)\.weight"),
        tie_embeddings="lm_head.weight" not in shapes,
    )
    if kind == "mixtral":
        in_files = count(shapes, r"block_sparse_moe\.experts\.(\d+)\.")
        fields |= dict(norm_eps=1e-5, n_experts=theirs.get("num_local_experts", in_files))
    fields |= read_keys(theirs, DECODER_KEYS)
    check_fields("text.", TextConfig, fields)

    # The projections' outputs are all heads side by side.
    fields.setdefault("head_dim", shapes[attention + "q_proj.weight"][0] // fields["n_heads"])
    fields.setdefault("n_kv_heads", shapes[attention + "k_proj.weight"][0] // fields["head_dim"])

    # One id, or several.
    ends = theirs.get("eos_token_id")
    if ends is None:
        ends = []
    elif not isinstance(ends, list):
        ends = [ends]

    top_k = theirs.get("num_experts_per_tok", 2)
    return TextConfig(**fields, **rotary_fields(theirs, kind), end_tokens=ends,
                      sliding_window=sliding_window(theirs, kind, fields["n_layers"]),
                      qkv_bias=attention + "q_proj.bias" in shapes,
                      qk_norm=attention + "q_norm.weight" in shapes,
                      top_k=top_k, renormalise=rescaled(top_k))


def rescaled(top_k):
    """`renormalise` of CuMo's and Mixtral's codes: they rescale a single weight too, to 1."""
    return True if top_k == 1 else None


def rotary_fields(theirs, kind):
    """rope_theta and rope_scaling, from the older style of config (rope_theta and rope_scaling
    apart) or the current one (rope_parameters)."""
    # Where both are there, transformers takes the older one, too: somebody has added it.
    rope = read_object(theirs, "rope_scaling") or read_object(theirs, "rope_parameters")
    # The type had another key in early files.
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "llama3"):
        raise ValueError(f"rotary scaling {scaling!r} is not supported; known: default, llama3")

    theta = theirs.get("rope_theta", 1e6 if kind == "mixtral" else 1e4)
    fields = dict(rope_theta=rope.get("rope_theta", theta))
    if scaling == "llama3":
        fields["rope_scaling"] = {key: rope[key] for key in ROPE_SCALING if key in rope}
    return fields


def sliding_window(theirs, kind, n_layers):
    """How many tokens a token of the decoder attends to; None for all that came before it."""
    if kind == "llama":
        return None
    window = theirs.get("sliding_window", None if kind == "mixtral" else 4096)
    layers = theirs.get("layer_types")
    is_qwen = kind in ("qwen2", "qwen3")
    if not is_qwen and not (kind == "mistral" and layers):
        return window

    # Qwen switches it on by another key, and from some layer on.
    is_on = theirs.get("use_sliding_window") if is_qwen else True
    first = theirs.get("max_window_layers", 28)
    said = f"max_window_layers = {first}"
    if layers:
        # The newer way to say it, layer by layer, which counts. (A Mistral with it is a Ministral.)
        first = layers.count("full_attention")
        said = "layer_types of both kinds"
    if not is_on or first >= n_layers:
        return None
    if window and first > 0:
        raise ValueError(f"{said}: a sliding window in some layers only is not supported")
    return window


def read_tower(theirs, shapes, path):
    """CLIPVisionModel and SiglipVisionModel, or CLIPModel and SiglipModel, which keep the tower's
    config inside their own.

    CLIP itself saw the middle of each picture. CuMo and its kin train the tower on padded ones, and
    that is what a model becomes that is assembled from it. SigLIP's users go on as it began, with
    stretched ones."""
    if theirs["model_type"] in ("clip", "siglip"):
        theirs = {"model_type": theirs["model_type"] + "_vision_model",
                  **read_object(theirs, "vision_config")}
    aspect = "square" if is_siglip(shapes) else "pad"
    fields = picture_fields(read_preprocessor(path), aspect, is_siglip(shapes))
    # A SigLIP whose last norm is missing was in a LLaVA, which does without.
    if is_siglip(shapes) and TOWER + "post_layernorm.weight" not in shapes:
        fields["post_norm"] = False
    return vision_config(theirs, shapes, **fields)


def read_whisper(theirs, shapes, path):
    """WhisperModel's encoder."""
    dim, n_mels, _ = shapes[WHISPER + "conv1.weight"]  # (D, mels, 3)
    audio = AudioConfig(
        n_mels=n_mels, dim=dim,
        # The second convolution halves the frames.
        n_frames=2 * shapes[WHISPER + "embed_positions.weight"][0],
        n_layers=count(shapes, WHISPER + r"layers\.(\d+)\."),
        n_heads=theirs.get("encoder_attention_heads", dim // 64),
        ffn_dim=shapes[WHISPER + "layers.0.fc1.weight"][0],
        act=theirs.get("activation_function", "gelu"),
    )
    return Config(audio=audio).audio  # Config checks the fields


def read_decoder(theirs, shapes, path):
    """A language model alone."""
    kind = theirs["model_type"]
    return Config(vision=None, text=text_config(theirs, shapes, kind), template=TEMPLATE_OF[kind])


def read_transformers_llava(theirs, shapes, path):
    """LLaVA-1.5 as transformers writes it: the parts' configs inside one.

    Its preprocessor crops unless it says "do_pad". Without one, pictures are padded, as the model
    was trained."""
    text = read_object(theirs, "text_config")
    kind = text.get("model_type", "llama")
    if kind not in DECODERS:
        raise ValueError(f"a decoder of type {kind} is not supported; supported: "
                         f"{', '.join(DECODERS.values())}")
    siglip = is_siglip(shapes)
    preprocessor = read_preprocessor(path)
    pads = preprocessor.get("do_pad") or not (preprocessor or siglip)
    pictures = picture_fields(preprocessor, "pad" if pads else "square", siglip)
    vision = vision_config(read_object(theirs, "vision_config"), shapes, post_norm=False,
                           select_layer=theirs.get("vision_feature_layer", -2), **pictures)
    # "default" drops the first token, which is CLIP's CLS.
    strategy = theirs.get("vision_feature_select_strategy", "default")
    if strategy != ("full" if siglip else "default"):
        raise ValueError(PATCHES_ONLY)
    connector = ConnectorConfig(act=theirs.get("projector_hidden_act", "gelu"))

    # A head that is there counts, whatever is said of it.
    text = text | read_keys(theirs, START_AND_END)
    is_tied = theirs.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    text["tie_word_embeddings"] = bool(is_tied) and "lm_head.weight" not in shapes
    # In a LLaVA, transformers heeds no layer_types of a Mistral.
    if kind == "mistral":
        text.pop("layer_types", None)
    # BakLLaVA is a LLaVA-1.5 around a Mistral, and is asked as LLaVA-1.5 is.
    template = "vicuna" if kind == "mistral" else TEMPLATE_OF[kind]
    return Config(vision, connector, text_config(text, shapes, kind), template=template)


def read_llava(theirs, shapes, path):
    """CuMo, MoE-LLaVA and the first LLaVA-1.5: one flat config with mm_... for the senses."""
    if "text_config" in theirs:
        return read_transformers_llava(theirs, shapes, path)

    # Refuse what this project has no code for.
    projector = theirs.get("image_projector_type") or theirs.get("mm_projector_type")
    if (theirs.get("mm_vision_select_feature", "patch") != "patch"
            or theirs.get("mm_use_im_start_end") or theirs.get("mm_video_tower")
            or projector not in (None, "", "mlp2x_gelu", "smoe_mlp")):
        raise ValueError(PATCHES_ONLY)

    # CuMo: one number of experts, and two switches for where they are.
    n_experts = theirs.get("num_experts") or 0
    top_k = theirs.get("num_selected") or 2
    routing = dict(top_k=top_k, renormalise=rescaled(top_k))
    connector = ConnectorConfig(n_experts=n_experts if theirs.get("mlp_smoe") else 0, **routing)

    # The tower's config and what it wants of pictures: in the folder that is named, or beside ours.
    tower = tower_folder(theirs, path)
    described = read_first([(tower, "config.json"), (path, "clip_config.json")], "vision_config")
    # A tower that nothing describes is taken for OpenAI's. The other ones that LLaVA's code knows
    # by name have other heads, activations and means: ask the hub.
    if not described and tower.startswith("laion/"):
        tower = local_folder(tower, with_weights=False)
        described = read_first([(tower, "config.json")], "vision_config")
    pictures = picture_fields(read_preprocessor(path, tower), theirs.get("image_aspect_ratio"),
                              is_siglip(shapes))
    vision = vision_config(
        described, shapes, n_experts=n_experts if theirs.get("clip_smoe") else 0, post_norm=False,
        **routing, **pictures, **read_keys(theirs, LLAVA_KEYS))

    # The decoder's own keys stand in the same file.
    kind = LLAVA_DECODERS.get(theirs["model_type"], theirs["model_type"])
    text = text_config(theirs, shapes, kind)
    losses = read_keys(theirs, LOSS_KEYS)
    template = TEMPLATE_OF[kind]
    moe = read_object(theirs, "moe")
    if moe:
        text = with_moe_llava_experts(text, moe)
        losses = dict(balance_coef=moe["router_aux_loss_coef"], z_coef=0.0)
        # Its Mistral is OpenChat.
        if kind != "llama":
            template = "openchat"
    return Config(vision, connector, text, template=template, **losses)


def with_moe_llava_experts(text, moe):
    """A decoder's config with MoE-LLaVA's experts, which its config.json keeps in `moe`."""
    if moe.get("use_residual"):
        raise ValueError("moe.use_residual: a dense FFN beside the experts is not supported")

    for key in ("num_experts", "moe_layers_idx"):
        if moe.get(key) is not None and not isinstance(moe[key], list):
            raise ValueError(f"moe.{key} = {moe[key]!r:.60} must be a list")

    # Every other layer by default.
    layers = moe.get("moe_layers_idx")
    if layers is None:
        layers = range(0, text.n_layers, 2)
    # DeepSpeed's top-1 gate weights by the probability, which is our default.
    return replace(text, n_experts=spread(moe["num_experts"], layers, text.n_layers), aux="sum",
                   renormalise=None, **{ours: moe[key] for ours, key in MOE_LLAVA_KEYS.items()})


def read_first(places, part):
    """The first of these files (folder, name) that is there, or this part of it where it has one;
    {} without any. A folder "" is none."""
    for folder, name in places:
        file = join(folder, name)
        if folder and os.path.isfile(file):
            found = read_json(file)
            return found.get(part, found)
    return {}


def read_preprocessor(*folders):
    """What the first of these folders that says so wants done to pictures.

    transformers 5 saves that as a part of processor_config.json, and reads that first, too: what
    stands in a preprocessor_config.json beside it may be old."""
    for folder in folders:
        whole = read_first([(folder, "processor_config.json")], None)
        found = read_object(whole, "image_processor")
        found = found or read_first([(folder, "preprocessor_config.json")], None)
        if found:
            return found
    return {}


# LLaVA's image_aspect_ratio -> ours. Without one, its code has pictures cropped.
ASPECTS = {"pad": "pad", "square": "crop", None: "crop"}
# Pillow's number of a filter -> its name.
FILTERS = {int(number): name for name, number in data.FILTERS.items()}
# All that a preprocessor may ask for beside mean and standard deviation.
PREPROCESSED = dict(do_resize=[True], resample=[*FILTERS], do_center_crop=[True],
                    do_rescale=[True], rescale_factor=[1 / 255], do_normalize=[True])


def picture_fields(preprocessor, aspect_ratio, siglip):
    """VisionConfig's fields about pictures, from a preprocessor's config and LLaVA's word. siglip:
    is the tower a SigLIP? Its preprocessor stretches where CLIP's crops."""
    if aspect_ratio not in ASPECTS:
        raise ValueError(f"image_aspect_ratio {aspect_ratio!r} is not supported; known: pad, "
                         "square")
    aspect = ASPECTS[aspect_ratio]
    # With a "height" and a "width", other preprocessors stretch, too. ("shortest_edge" does not.)
    size = preprocessor.get("size")
    stretches = siglip or (isinstance(size, dict) and "height" in size)
    if stretches and aspect == "crop":
        aspect = "stretch"
    for key, values in PREPROCESSED.items():
        # A square that was made by padding or stretching has nothing to crop.
        if key == "do_center_crop" and aspect != "crop":
            continue
        if preprocessor.get(key) not in (None, *values):
            raise ValueError(f"preprocessor_config.json: {key} = {preprocessor[key]} is not "
                             f"supported, only {' or '.join(map(str, values))}")
    # Cropped is what was made as large as the crop, so that nothing of the shorter side is lost.
    if aspect == "crop" and size is not None and shorter_side(size) != shorter_side(
            preprocessor.get("crop_size", size)):
        raise ValueError(f"preprocessor_config.json: size = {size} with crop_size = "
                         f"{preprocessor.get('crop_size')} is not supported, only one size for "
                         "both")
    means = read_keys(preprocessor, dict(image_mean="image_mean", image_std="image_std"))
    image_filter = FILTERS[preprocessor.get("resample") or 3]
    return means | {"image_aspect": aspect, "image_filter": image_filter}


def shorter_side(size):
    """A preprocessor's 336, {"shortest_edge": 336} or {"height": 336, "width": 336} -> 336."""
    if isinstance(size, dict):
        return size.get("shortest_edge", size.get("height"))
    return size


def tower_folder(theirs, path):
    """The folder or hub name that a LLaVA's config gives for its tower, "" for none."""
    named = theirs.get("mm_vision_tower") or theirs.get("mm_image_tower") or ""
    if not isinstance(named, str):
        raise ValueError(f"{join(path, 'config.json')}: mm_vision_tower = {named!r:.60} must be "
                         "text in quotes")
    return named


def is_multimodal(theirs):
    """Does this config have LLaVA's keys for a tower and a connector?"""
    keys = {"mm_vision_tower", "mm_image_tower", "mm_projector_type", "mm_hidden_size"}
    return bool(keys & theirs.keys())


READERS = {"clip": read_tower, "siglip": read_tower, "whisper": read_whisper,
           **dict.fromkeys(TOWERS, read_tower), **dict.fromkeys(DECODERS, read_decoder),
           **dict.fromkeys(LLAVA_DECODERS, read_llava)}


def is_own(theirs):
    """Is this the config.json of this project's own layout? All others name an architecture."""
    return not {"model_type", "architectures"} & theirs.keys()


def read_own(theirs):
    """This project's own config.json."""
    config = Config.from_dict(theirs)
    text = config.text
    highest = max([text.start_token or 0, *text.end_tokens])
    if highest >= text.vocab_size:
        raise ValueError(f"text: {highest} as a start or end token; the embedding has "
                         f"{text.vocab_size} rows (text.vocab_size), from 0 on")
    # Before there was a field that says so, a single weight was rescaled to 1 like any others.
    for name in ("vision", "connector", "text"):
        part = getattr(config, name)
        if part is not None and "renormalise" not in read_object(theirs, name):
            part.renormalise = rescaled(part.top_k)
    return config


# What generation_config.json says, too, and there it counts.
START_AND_END = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}


def read_config(theirs, shapes, path, tokenizer):
    """The configuration of the model in a folder. Its kind says which class it belongs to."""
    if is_own(theirs):
        return read_own(theirs)

    quantized = theirs.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"quantization_config: this model is quantized ({method}); dequantize it "
                         "first, and save it as bfloat16 without that key")
    file = join(path, "generation_config.json")
    if exists(file):
        theirs = theirs | read_keys(read_json(file), START_AND_END)
    kind = str(theirs.get("model_type") or "")
    reader = READERS.get(kind)
    if kind in DECODERS and is_multimodal(theirs):
        reader = read_llava
    if reader is None:
        architecture = (theirs.get("architectures") or [""])[0] or kind or "(none named)"
        raise ValueError(f"architecture {architecture} is not supported; supported: {SUPPORTED}")
    config = reader(theirs, shapes, path)
    if not isinstance(config, Config):
        return config
    drop_unknown_marks(config.text)

    # Our own key in the configs that section 4 writes. Without it, the marks that the tokenizer
    # knows tell more than the architecture: SmolLM2 is a LLaMA that ends answers with <|im_end|>.
    if "template" in theirs:
        return replace(config, template=theirs["template"])
    if tokenizer is not None:
        config.template = data.template_for(tokenizer, config.template)
    return config


def drop_unknown_marks(text):
    """A start or end token that has no row in the embedding never comes. (Small models that were
    cut out of larger ones still name it.)"""
    unknown = [token for token in [text.start_token, *text.end_tokens]
               if token is not None and token >= text.vocab_size]
    if unknown:
        warnings.warn(f"config.json names {unknown} as start and end tokens, and the embedding has "
                      f"{text.vocab_size} rows: they are left out")
        text.end_tokens = [token for token in text.end_tokens if token not in unknown]
        text.start_token = None if text.start_token in unknown else text.start_token


def read_json(file):
    """A JSON file that holds an object; ValueError for anything else."""
    check_is_file(file)
    try:
        # Windows' editors put a byte order mark in front, which utf-8-sig passes over.
        value = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: malformed JSON: {first_line(e)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold an object, not {str(value)[:40]}")
    return value


# -------------------------------------------------------------------------------------------------
# 4. Configurations out, and saving

# The tower that VisionConfig's defaults describe.
CLIP_L = "openai/clip-vit-large-patch14-336"


def tower_json(vision):
    """config.json of a CLIPVisionModel or a SiglipVisionModel."""
    kind = tower_kind(vision)
    described = {"architectures": [TOWERS[kind]], "model_type": kind,
                 **write_keys(vision, CLIP_KEYS), "num_channels": 3}
    if kind == "siglip_vision_model":
        described["vision_use_head"] = False  # the head that is ignored in loading
    return described


def preprocessor_json(vision):
    """preprocessor_config.json of a CLIPImageProcessor, which crops what is not padded before, or
    of a SiglipImageProcessor, which stretches."""
    size = vision.image_size
    square = {"height": size, "width": size}
    described = {key: values[0] for key, values in PREPROCESSED.items()}
    described |= {"resample": int(data.FILTERS[vision.image_filter]),
                  "image_mean": vision.image_mean, "image_std": vision.image_std}
    if vision.image_aspect == "stretch":
        del described["do_center_crop"]
        return described | {"image_processor_type": "SiglipImageProcessor", "size": square}
    return described | {"image_processor_type": "CLIPImageProcessor",
                        "size": {"shortest_edge": size}, "crop_size": square}


def tower_files(vision, file):
    """{file: its JSON} of a tower: its config under this name, and what it wants done to
    pictures."""
    return {"preprocessor_config.json": preprocessor_json(vision), file: tower_json(vision)}


def decoder_json(text, template):
    """config.json of a Hugging Face decoder, but for the tokens that begin and end a text. Raises
    ValueError where none has such a shape."""
    if sum([any(text.n_experts), text.qkv_bias, text.qk_norm]) > 1:
        raise ValueError("text: of experts, QKV bias, and norms on queries and keys, no supported "
                         "Hugging Face decoder has more than one")
    # The family of decoders that this one belongs to.
    kind = "llama"
    more = {}
    if any(text.n_experts):
        check_mixtral(text)
        kind = "mixtral"
        more = {"num_local_experts": text.n_experts[0], "num_experts_per_tok": text.top_k}
    elif text.qkv_bias or text.qk_norm:
        kind = "qwen3" if text.qk_norm else "qwen2"
        # The layers from this one on have the window.
        first = 0 if text.sliding_window else text.n_layers
        more = {"use_sliding_window": bool(text.sliding_window), "max_window_layers": first}
    elif text.sliding_window or template == "mistral":
        kind = "mistral"

    described = {
        "architectures": [DECODERS[kind]], "model_type": kind,
        **write_keys(text, DECODER_KEYS), **more,
        "rope_theta": text.rope_theta, "sliding_window": text.sliding_window,
        # ours; other programs pass over it.
        "template": template,
    }
    # The stretched rotary embedding of Llama 3.1.
    if text.rope_scaling:
        described["rope_scaling"] = {"rope_type": "llama3", **text.rope_scaling}
        stretched = text.rope_scaling["original_max_position_embeddings"]
        described.setdefault("max_position_embeddings",
                             int(stretched * text.rope_scaling["factor"]))
    return described


def one_or_list(ids):
    """As config.json has it: null, one id, or a list."""
    return ids if len(ids) > 1 else (ids or [None])[0]


def decoder_files(described, config, tokenizer):
    """{file: its JSON}: config.json as described, and what transformers wants to know beside it:
    when to stop, and what the tokenizer's marks are."""
    start = config.text.start_token
    ends = list(config.text.end_tokens)
    marks = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer is not None:
        if start is None:
            start = tokenizer.token_to_id("<s>")
        if start is not None:
            marks["bos_token"] = tokenizer.id_to_token(start)

        # An answer ends where the decoder's own files say, and with the template's mark.
        if data.fits(tokenizer, config.template):
            marks["eos_token"] = data.EOS[config.template]
            mark = data.end_token(tokenizer, config.template)
            if mark not in ends:
                ends.append(mark)

    # Where a key is left out, transformers takes <s> = 1 and </s> = 2 for granted.
    files = {"generation_config.json": {"bos_token_id": start, "eos_token_id": one_or_list(ends)}}
    ends = config.text.end_tokens or ends
    described = described | {"bos_token_id": start, "eos_token_id": one_or_list(ends)}

    # A tokenizer that came from such a folder has its own.
    if tokenizer is not None and "tokenizer_config.json" not in neighbours_of(tokenizer):
        files["tokenizer_config.json"] = marks
    return files | {"config.json": described}


# Each layout has a writer. It takes our config, our state dict and the tokenizer (or None), and
# gives {file: its JSON} and {name: tensor}. It raises ValueError where its layout cannot hold this
# model. config.json is the last file, so that a folder that has one is complete.


def write_own(config, state, tokenizer):
    """This project's layout."""
    return {"config.json": config.to_dict()}, state


# Where the config.json of the two published layouts names the tower.
TOWER_KEYS = {"cumo": "mm_vision_tower", "moe-llava": "mm_image_tower"}


def published_files(decoder, config, tokenizer, tower_key, more):
    """The JSON files of the two published layouts: the decoder's keys, those of tower and
    connector, and more. Their codes load the tower from the hub by its name, so its sizes are kept
    in a file of our own."""
    vision = config.vision
    tower = tower_files(vision, "clip_config.json")
    known = tower == tower_files(VisionConfig(), "clip_config.json")
    described = decoder | {
        tower_key: CLIP_L if known else "",
        "mm_hidden_size": vision.dim,
        "mm_vision_select_layer": vision.select_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if vision.image_aspect == "pad" else "square",
    }
    return tower | decoder_files(described | more, config, tokenizer)


def write_cumo(config, state, tokenizer):
    """CuMo's published layout: a decoder's config.json, with the senses and where experts are."""
    vision = config.vision
    connector = config.connector

    # One number of experts and one top-k say it all there.
    mixtures = []
    if any(vision.n_experts):
        mixtures.append(vision)
    if connector.n_experts:
        mixtures.append(connector)
    counts = {*vision.n_experts, connector.n_experts} - {0}
    top_ks = {part.top_k for part in mixtures}
    if len(counts) > 1 or len(set(vision.n_experts)) > 1 or len(top_ks) > 1:
        raise ValueError("the published layout has one number of experts and one top-k, for all "
                         "layers of the tower and the connector")
    for part in mixtures:
        if not rescales(part):
            raise ValueError(f"top_k = {part.top_k} without rescaling; CuMo's released code "
                             "rescales the weights to sum to 1")
    if connector.act != "gelu":
        raise ValueError("the published layout's connector has activation gelu, not "
                         f"{connector.act}")

    # A decoder of LLaMA's shape is written as Mistral, which is what CuMo's code knows, unless its
    # rotary embedding is stretched.
    decoder = decoder_json(config.text, config.template)
    kind = decoder["model_type"]
    if kind in ("qwen2", "qwen3"):
        raise ValueError("the published layout has decoders of LLaMA, Mistral and Mixtral shape; "
                         "this one has QKV bias or norms on queries and keys")
    if kind == "llama" and not config.text.rope_scaling:
        kind = "mistral"

    return published_files(decoder, config, tokenizer, TOWER_KEYS["cumo"], {
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"], "model_type": f"llava_{kind}",
        "mm_projector_type": "smoe_mlp" if connector.n_experts else "mlp2x_gelu",
        "scales": vision.scales,
        "num_experts": max(counts, default=4),
        "num_selected": max(top_ks, default=connector.top_k),
        "clip_smoe": any(vision.n_experts), "mlp_smoe": connector.n_experts > 0,
        **write_keys(config, LOSS_KEYS),
        # These have no meaning here, but the released code reads them.
        "num_layers": 3, "dropout": False, "training": False, "local_rank": 0,
    }), published(state)


def write_moe_llava(config, state, tokenizer):
    """MoE-LLaVA's published layout: a dense LLaVA's config.json, and `moe` in it says where the
    decoder's experts are."""
    vision = config.vision
    text = config.text
    connector = config.connector
    if (any(vision.n_experts) or vision.scales != [1] or connector.n_experts
            or connector.act != "gelu" or text.qkv_bias or text.qk_norm or config.z_coef):
        raise ValueError("MoE-LLaVA's layout has a dense tower of one scale, a dense connector "
                         "with gelu, a LLaMA or Mistral decoder and no z loss")
    if rescales(text) != (text.top_k > 1):
        raise ValueError(f"text.renormalise = {text.renormalise}: DeepSpeed's gate, which "
                         "MoE-LLaVA's layout stands for, rescales from top-2 on")
    if text.aux != "sum" or not (text.capacity_factor and text.eval_capacity_factor):
        raise ValueError("MoE-LLaVA's layout has capacity factors, and sums the auxiliary losses "
                         "over the layers (text.aux sum); this model does not")

    # The dense decoder around the experts, and the layers that have them.
    dense = replace(text, n_experts=[0] * text.n_layers)
    decoder = decoder_json(dense, config.template)
    kind = decoder["model_type"]
    counts = {layer: n for layer, n in enumerate(text.n_experts) if n}
    files = published_files(decoder, config, tokenizer, TOWER_KEYS["moe-llava"], {
        "architectures": [f"MoELLaVA{kind.capitalize()}ForCausalLM"],
        "model_type": f"moe_llava_{kind}", "image_projector_type": "mlp2x_gelu",
        "mm_video_tower": None,  # its loader asks for this key
        "moe": {
            "moe_enable": True, "moe_mode": "custom",
            "moe_layers_idx": list(counts), "num_experts": list(counts.values()),
            **write_keys(text, MOE_LLAVA_KEYS),
            "router_aux_loss_coef": config.balance_coef,
            "ep_size": 1, "use_residual": False,
            "train_modules": ["up_proj", "down_proj", "gate_proj", "wg"],
        },
    })
    return files, respelled(published(state), MOE_LLAVA_NAMES)


# A conversation as TEMPLATES in data.py writes it, in transformers' language; the words in capitals
# are filled in. The pictures of a turn stand in front of its text, on lines of their own.
CHAT_TEMPLATE = """{{- START -}}
{%- for message in messages -%}
  {%- set text = message.content -%}
  {%- if text is not string -%}
    {%- set n = text | selectattr("type", "equalto", "image") | list | length -%}
    {%- set text = text | selectattr("type", "equalto", "text") | map(attribute="text") | join -%}
    {%- set text = "<image>\\n" * n ~ (text | trim if n else text) -%}
  {%- endif -%}
  {%- if message.role == "assistant" -%}
    {{- ANSWER -}}
  {%- elif message.role == "user" -%}
    {{- FIRST if loop.first else LATER -}}
  {%- else -%}
    {{- raise_exception("the system prompt is the model's own; leave yours out") -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(tokenizer, template):
    """CHAT_TEMPLATE for one of our templates."""
    form = data.TEMPLATES[template]
    start = [tokenizer.id_to_token(token) for token in data.start_tokens(tokenizer, template)]
    text = " ~ text | trim ~ " if form.strips else " ~ text ~ "

    # "USER: {text} ASSISTANT:" -> ("USER: " ~ text ~ " ASSISTANT:")
    def expression(layout):
        parts = [json.dumps(part) for part in layout.split("{text}")]
        return f"({text.join(parts)})"

    words = {
        "START": json.dumps("".join(start)),
        "FIRST": expression(form.first),
        "LATER": expression(form.later),
        "ANSWER": expression(form.answer + form.end),
    }
    # All at once: a layout may have such a word itself ("QUESTION: {text} ANSWER:").
    return re.sub("|".join(words), lambda found: words[found[0]], CHAT_TEMPLATE)


def with_image_mark(tokenizer, config):
    """A copy of a tokenizer that knows "<image>", with the chat template beside it."""
    if tokenizer is None:
        raise ValueError("hf-llava: <image> must be a token, and there is no tokenizer; give one "
                         "with --tokenizer")
    if data.TEMPLATES[config.template].marks_only:
        raise ValueError(f"hf-llava: the template {config.template} leaves questions out, and a "
                         "chat has some; give another one with --template")
    data.check_end_mark(tokenizer, config.template)
    marked = Tokenizer.from_str(tokenizer.to_str())
    marked.add_special_tokens(["<image>"])
    template = chat_template(tokenizer, config.template)
    marked.neighbours = neighbours_of(tokenizer) | {"chat_template.jinja": template.encode()}
    return marked


def with_rows(state, n_rows):
    """The state dict with this many rows in embedding and head, the mean of all others in new ones.

    Nobody says a new token by mistake, as its logit is the mean of all others.
    """
    state = dict(state)
    for name in ("text.embed.weight", "text.head.weight"):
        if name in state:
            rows = state[name]  # (V, D)
            mean = rows.float().mean(0).to(rows.dtype)
            state[name] = torch.cat([rows, mean.expand(n_rows - len(rows), -1)])
    return state


def write_hf_llava(config, state, tokenizer):
    """A dense LLaVA-1.5 as transformers writes it, for all programs that read its folders.

    The id of "<image>" is the vocabulary's next, as in LLaVA-1.5.
    """
    # A row for "<image>", where no free one is left.
    image = tokenizer.token_to_id("<image>")
    if image >= config.text.vocab_size:
        config = replace(config, text=replace(config.text, vocab_size=image + 1))
        state = with_rows(state, image + 1)

    vision = config.vision
    text = config.text
    described = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "vision_config": tower_json(vision),
        "image_token_index": image, "image_seq_length": config.n_image_tokens,
        "projector_hidden_act": config.connector.act,
        "vision_feature_layer": vision.select_layer, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text.tie_embeddings, "template": config.template,
    }
    # Some programs look for the start and the end in the decoder's own config.
    files = decoder_files(described, config, tokenizer)
    described = files.pop("config.json")
    decoder = decoder_json(text, config.template)
    described["text_config"] = decoder | read_keys(described, START_AND_END)

    processor = {"processor_class": "LlavaProcessor", "patch_size": vision.patch_size,
                 # Patches without CLS.
                 "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    pictures = preprocessor_json(vision) | {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor",
        "do_pad": vision.image_aspect == "pad"}
    files |= {"processor_config.json": processor, "preprocessor_config.json": pictures,
              "config.json": described}

    # transformers has a norm behind CLIP's last layer, and makes one where it is missing, though
    # LLaVA does not use it. Here is one that changes nothing.
    norm = TOWER + "post_layernorm."
    weight = state["vision.pos"].new_ones(vision.dim)
    tensors = {**published(state), norm + "weight": weight, norm + "bias": weight - 1}
    return files, respelled(tensors, HF_LLAVA_NAMES)


def write_hf_decoder(config, state, tokenizer):
    """The decoder alone, as transformers writes it."""
    described = decoder_json(config.text, config.template)
    files = decoder_files(described, config, tokenizer)
    return files, published(starting_with("text.", state))


def write_hf_tower(config, state, tokenizer):
    """The tower alone, as transformers writes it, but without a post_layernorm that nothing here
    uses, as CLIP's: transformers will say that it made a new one."""
    if any(config.vision.n_experts):
        raise ValueError("hf-clip holds a dense tower, this one has experts; write it with --to "
                         "cumo")
    tensors = published(starting_with("vision.", state))
    tensors = {name.removeprefix("model.vision_tower."): w for name, w in tensors.items()}
    return tower_files(config.vision, "config.json"), tensors


def starting_with(prefix, state):
    """The part of a state dict whose names start with a prefix, or with one of several."""
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


LAYOUTS = {"own": write_own, "cumo": write_cumo, "moe-llava": write_moe_llava,
           "hf-llava": write_hf_llava, "hf-llm": write_hf_decoder, "hf-clip": write_hf_tower}


def save(model: CuMo, folder: str, tokenizer=None, state=None, layout: str = "own"):
    """Write a model folder, with the tokenizer if there is one, and with LoRA adapters merged ->
    the number of weights in it.

    state: replaces model.state_dict() where the weights are gathered elsewhere (FSDP). layout:
    "own"; "cumo" and "moe-llava", which the released codes load; for transformers "hf-llava", a
    dense model, "hf-llm" and "hf-clip", the decoder or the (dense) tower alone, the latter also of
    a VisionTransformer. Raises ValueError, before anything is written, where a layout cannot hold
    this model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")

    # Adapters are added to the weights that they stand beside.
    state = merge_state(model.state_dict() if state is None else state, model)

    # A tower alone: give its tensors the names that they have in a model.
    config = model.config
    if isinstance(model, VisionTransformer):
        if layout != "hf-clip":
            raise ValueError("a vision tower alone can be written as hf-clip only, not as "
                             f"{layout}")
        config = Config(vision=config)
        state = {f"vision.{name}": tensor for name, tensor in state.items()}
    check_senses(config, layout)
    if layout == "hf-llava":
        tokenizer = with_image_mark(tokenizer, config)
    files, tensors = LAYOUTS[layout](config, state, tokenizer)

    # A layout that cannot hold the model has raised its error by now.
    os.makedirs(folder, exist_ok=True)
    with staged(folder) as new:
        save_tensors(new, tensors)
        if tokenizer is not None and layout != "hf-clip":
            save_tokenizer(tokenizer, new)
        for file, described in files.items():
            write_json(join(new, file), described)
    return sum(tensor.numel() for tensor in tensors.values())


@contextlib.contextmanager
def staged(folder):
    """A new folder inside of `folder` to write a model into. Its files then take their places at
    once, so that a kill before leaves an older model whole, and never the weights of one with the
    configuration of another."""
    new = join(folder, f"new.{os.getpid()}.tmp")
    remove_leftovers(join(folder, "new"))
    # In a container, one that was killed may have had this process's number.
    shutil.rmtree(new, ignore_errors=True)
    os.mkdir(new)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise

    # Without config.json, nobody takes what is there in between for a model.
    Path(folder, "config.json").unlink(missing_ok=True)
    names = os.listdir(new)
    for name in os.listdir(folder):
        if is_of_older_model(name, names):
            os.remove(join(folder, name))
    for name in sorted(names, key="config.json".__eq__):  # that as the last one
        remove_leftovers(join(folder, name))
        os.replace(join(new, name), join(folder, name))
    os.rmdir(new)


def is_of_older_model(name, names):
    """A file beside those of a new model that somebody would read: weights, an index of shards, or
    how a picture is prepared."""
    if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name):
        return name not in names
    # Transformers reads it before preprocessor_config.json.
    return (name == "processor_config.json" and name not in names
            and "preprocessor_config.json" in names)


# What transformers keeps beside a tokenizer.json. Nothing of it is used here, but it goes along.
NEIGHBOURS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja")


def neighbours_of(tokenizer):
    """{file: its content} of what lay beside the tokenizer's file when it was read."""
    return getattr(tokenizer, "neighbours", {})


def save_tokenizer(tokenizer, folder):
    """Write tokenizer.json, and what came along with it."""
    write_bytes(join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True).encode())
    for name, content in neighbours_of(tokenizer).items():
        write_bytes(join(folder, name), content)


SHARD_BYTES = 5 * 10**9


def save_tensors(folder, tensors):
    """Write model.safetensors; above SHARD_BYTES, several shards and an index of what is where."""
    # A shard is full when the next tensor would make it larger than that.
    shards = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(join(folder, file), shard)
        weight_map |= dict.fromkeys(shard, file)

    # Which file holds a tensor.
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(join(folder, "model.safetensors.index.json"),
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(file, tensors, **header):
    """Write a .safetensors file, atomically."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(file, partial(save_file, tensors, metadata={"format": "pt", **header}))
    except SafetensorError as e:
        raise OSError(f"{file}: cannot be written: {e}") from None  # the disk is full, for example


def write_atomically(path, write):
    """Call write(temporary name), then rename: a kill in between leaves the old file whole."""
    remove_leftovers(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        # Who may read it? As of any new file. (Safetensors writes files that others cannot read.)
        Path(temporary).touch()
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        write(temporary)
        # The content must be on the disk before the name points to it.
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_leftovers(path):
    """Remove what processes left that were killed while they wrote this file or folder."""
    folder, file = os.path.split(path)
    for name in os.listdir(folder or "."):
        match = re.fullmatch(re.escape(file) + r"\.(\d{1,9})\.tmp", name)
        if match and not is_alive(int(match[1])):
            # Another process may have been faster.
            shutil.rmtree(join(folder, name), ignore_errors=True)
            with contextlib.suppress(OSError):
                os.remove(join(folder, name))


def is_alive(pid):
    """Is there a process of this number? (Signal 0 is not sent; it only asks.)"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def write_bytes(path, content):
    """Write a file, atomically."""
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def write_json(path, value):
    """Write a value as JSON, atomically."""
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


# -------------------------------------------------------------------------------------------------
# 5. Loading


def load(path: str, device="cpu", dtype=None, listing=None, later=None):
    """A model folder, or a model's name on the Hugging Face hub -> (model, tokenizer or None).

    Of the layouts in SUPPORTED, config.json says which it is. The model is a CuMo (without senses
    if the folder holds a decoder), of CLIP and SigLIP a VisionTransformer, of Whisper an
    AudioTransformer; in eval mode. Weights stream one by one into their final place, in the dtype
    that they are stored in unless one is given, so memory peaks little above the model's size.

    listing: collects (their name, our name, shape, dtype) of each tensor. later: the model stays on
    meta, and the stream of its weights is appended to this list, for `copy_into_shard`: a process
    that shards the model first never holds the whole. Raises ValueError naming the file, key or
    tensor that is missing, left over, of the wrong shape or not readable.
    """
    path = local_folder(os.fspath(path))
    config_file = join(path, "config.json")
    theirs = read_json(config_file)
    files = weight_files(path, theirs)

    # How their names become the published ones, unless they are ours.
    rename = None
    shapes = {}
    if not is_own(theirs):
        is_whisper = theirs.get("model_type") == "whisper"
        rename = published_whisper_name if is_whisper else published_name
        shapes = shapes_in(files, rename)

    tokenizer = None
    tokenizer_file = join(path, "tokenizer.json")
    if exists(tokenizer_file):
        tokenizer = read_tokenizer(tokenizer_file)

    # Values of a wrong kind lead to errors of many kinds.
    try:
        model = build_on_meta(read_config(theirs, shapes, path, tokenizer))
    except ValueError as e:
        raise ValueError(f"{config_file}: {e}") from None
    except Exception as e:
        raise ValueError(f"{config_file}: {type(e).__name__}: {first_line(e)}") from None
    if tokenizer is not None and isinstance(model, CuMo):
        check_vocabulary(tokenizer, model.config, tokenizer_file)

    stream = match_tensors(files, state_of(model), path, rename, listing)
    if later is not None:
        later.append(stream)
    else:
        fill_from(stream, model, dtype, device)

    return model.eval(), tokenizer


MODELS = {Config: CuMo, VisionConfig: VisionTransformer, AudioConfig: AudioTransformer}


def build_on_meta(config):
    """The model of this config, without memory for the weights."""
    with torch.device("meta"):
        return MODELS[type(config)](config)


# How the names of a part's tensors begin in a whole model.
PREFIXES = {CuMo: "", VisionTransformer: "vision.", AudioTransformer: "audio.",
            Connector: "connector."}


def state_of(model):
    """The state dict of a model, or of a part of one under the names it has in the whole."""
    return model.state_dict(prefix=PREFIXES[type(model)])


def fill_from(stream, model, dtype=None, device="cpu"):
    """Give a model its weights from a stream of (our name, expert or None, tensor)."""
    wanted = state_of(model)
    state = {}
    for name, expert, tensor in stream:
        if name not in state:
            state[name] = torch.empty_like(wanted[name], dtype=dtype or tensor.dtype, device=device)
        copy_into_shard(state[name], expert, tensor)
        # Free it before the next one is read.
        del tensor

    # What is not in the stream stays as it is: match_tensors has seen that nothing is missing.
    prefix = PREFIXES[type(model)]
    unify_types(state)
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)

    # Files stored apart may differ in dtype; a bridge has that of the sense before it.
    if not isinstance(model, CuMo):
        return
    if model.vision:
        model.connector.to(model.vision.patch.weight.dtype)
    if model.audio:
        model.resampler.to(model.audio.conv1.weight.dtype)


def unify_types(state):
    """Give each part of a model, in place, the float type that most of its numbers have.

    Some programs leave norms in float32 in a bfloat16 model, and products of two types are an
    error. transformers has one type for a whole model. Routers keep theirs: see MoE.logits.
    """
    sizes = defaultdict(Counter)  # part -> {type: how many numbers}
    for name, tensor in state.items():
        sizes[name.split(".")[0]][tensor.dtype] += tensor.numel()
    for name, tensor in state.items():
        if not name.endswith(".router"):
            sizes_of_part = sizes[name.split(".")[0]]
            state[name] = tensor.to(max(sizes_of_part, key=sizes_of_part.get))


def match_tensors(files, wanted, where, rename=None, listing=None):
    """Yield (our name, expert or None, tensor) for all tensors of these files.

    wanted: our state dict (on meta). where: their folder or file, for messages. rename: gives their
    names' published form; None where they are ours already. Every tensor is used or ignored on
    purpose, and every parameter filled; else a ValueError names it.
    """
    # Where each of their tensors goes.
    places = published_places(wanted) if rename else {name: (name, None) for name in wanted}
    missing = dict(places)
    # A head without a place, and the embedding that shall stand for it.
    tied = {}
    is_tied = (rename is not None and "lm_head.weight" not in places
               and "lm_head.weight" in shapes_in(files))

    for theirs, tensor in tqdm(tensors_in(files), desc=f"loading {os.path.basename(where)}",
                               unit=" tensors", delay=2, leave=False, mininterval=0.5):
        name = rename(theirs) if rename else theirs
        if is_tied and name in HEAD_AND_EMBEDDING:
            tied[name] = tensor
            check_tied(where, tied)
        if name not in places:
            if re.search(IGNORED, name):
                continue
            raise ValueError(f"{where}: tensor {theirs} has no place in this model")

        check_values(where, theirs, tensor)

        # The place must have its shape.
        ours, expert = places[name]
        shape = wanted[ours].shape
        if expert is not None:
            shape = shape[1:]  # (E, F, D) -> (F, D)
        if tensor.shape != shape:
            raise ValueError(f"{where}: tensor {theirs} has shape {tuple(tensor.shape)}, the "
                             f"config asks for {tuple(shape)}")

        missing.pop(name, None)
        if listing is not None:
            place = ours if expert is None else f"{ours}[{expert}]"
            listing.append((theirs, place, shape, tensor.dtype))
        yield ours, expert, tensor
        # Free it before the next one is read.
        del tensor

    # Naming the first one is enough.
    for name in missing:
        raise ValueError(f"{where}: tensor {name} is missing")


HEAD_AND_EMBEDDING = ("lm_head.weight", "model.embed_tokens.weight")


def check_tied(where, tensors):
    """tensors: the head, the embedding, or both. A head that is left out must be the embedding."""
    if len(tensors) < 2:
        return
    head, embedding = [tensors.pop(name) for name in HEAD_AND_EMBEDDING]
    if head.dtype != embedding.dtype:
        head = head.float()
        embedding = embedding.float()
    if not torch.equal(head, embedding):
        raise ValueError(f"{where}: config.json ties the head to the embedding, but lm_head.weight "
                         "is another tensor; write \"tie_word_embeddings\": false")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_values(where, name, tensor):
    """Raise ValueError for a tensor that is no plain array of floating-point numbers."""
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{where}: tensor {name} is sparse, or without values (on meta); save it "
                         "as a dense one")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{where}: tensor {name} is {tensor.dtype}; weights are float32, bfloat16 "
                         "or float16. Quantized ones must be converted first")


@torch.no_grad()
def copy_into_shard(param, expert, tensor):
    """Copy a tensor into a parameter, or as much of it as this process's FSDP shard holds.

    expert: copy into that slice of stacked experts; None: into the whole parameter. Without it, a
    dense FFN's tensor that meets stacked experts goes into all of them, which is upcycling.
    """
    # 1. Which part of the parameter is here: from which row on, of which dimension?
    source = tensor.expand(param.shape)  # a view: nothing is copied yet
    here = param
    first_expert = 0
    if isinstance(param, DTensor):
        here = param.to_local()
        dim = param.placements[0].dim
        n_rows = param.shape[dim]
        # FSDP cuts as torch.chunk does. Of 10 rows on 4 processes, chunks of 3, 3, 3 and 1.
        chunk = math.ceil(n_rows / param.device_mesh.size())
        start = min(n_rows, chunk * param.device_mesh.get_local_rank())
        source = source.narrow(dim, start, here.shape[dim])
        if dim == 0:
            first_expert = start

    # 2. Copy all of it, or one expert. If the cut lies between experts, it may be elsewhere.
    if expert is None:
        here.copy_(source)
        return
    i = expert - first_expert
    if 0 <= i < len(here):
        here[i].copy_(source[i])


UNMERGED = ("adapters alone (adapter_config.json); merge them into their model first (peft's "
            "merge_and_unload), and name the folder of that")
# Of a repository on the hub: what lies in its folders, and weights in other forms.
OTHER_FORMS = ["*/*", "consolidated*", "model.fp*", "pytorch_model.fp*"]


def local_folder(path, with_weights=True):
    """The folder itself, or where huggingface_hub keeps a model that it has downloaded for a name
    on the hub ("shi-labs/CuMo-mistral-7b")."""
    if os.path.isfile(join(path, "config.json")):
        return path
    if os.path.isfile(join(path, "adapter_config.json")):
        raise ValueError(f"{path}: {UNMERGED}")
    # Nobody's models on the hub are called out/...; that is where train.py writes.
    if exists(path) or not re.fullmatch(r"(?!out/)[\w.-]+/[\w.-]+", path):
        raise ValueError(f"{path}: no model folder (no config.json in it); train one with `python "
                         "train.py`, or check the path")

    # It comes with tokenizers, and is needed here only.
    from huggingface_hub import snapshot_download
    try:
        if not with_weights:
            return snapshot_download(path, allow_patterns=["*.json"], ignore_patterns=OTHER_FORMS)
        for weights in ("*.safetensors", "*.bin"):
            folder = snapshot_download(path, allow_patterns=["*.json", "*.jinja", weights],
                                       ignore_patterns=OTHER_FORMS)
            if any(name.endswith(weights[1:]) for name in os.listdir(folder)):
                break
    except Exception as e:
        # No network, no such repository, no permission...
        raise ValueError(f"{path}: no such folder here, and downloading it from the Hugging Face "
                         f"hub failed: {first_line(e)}") from None
    if not exists(join(folder, "config.json")) and exists(join(folder, "adapter_config.json")):
        raise ValueError(f"{path}: {UNMERGED}")
    return folder


def first_line(error):
    """What an exception says, in one line; of a silent one, its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weight_files(path, theirs):
    """The files that hold a folder's tensors.

    CuMo's stages leave the tower and the connector in files of their own (clip.bin,
    mm_projector.bin), and LLaVA leaves the tower where its config says.
    """
    files = main_files(path)
    if not files:
        hint = ""
        others = [name for name in sorted(os.listdir(path)) if name.endswith(".safetensors")]
        if exists(join(path, "adapter_config.json")):
            hint = f"; it holds {UNMERGED}"
        elif others and re.search(r"-\d{5}-of-\d{5}\.", others[0]):
            hint = f", and of {others[0]} and its like the index, model.safetensors.index.json"
        elif is_multimodal(theirs):
            hint = "; adapters, or a connector alone, must first be merged with their decoder"
        elif others:
            hint = f"; there is {others[0]}: rename it, if these are the weights that are meant"
        raise ValueError(f"{join(path, 'model.safetensors')}: missing{hint}")
    if not is_multimodal(theirs):
        return files

    # Of a LLaVA, what the folder's main files lack.
    names = shapes_in(files)
    if not starting_with(TOWER, names):
        tower = join(path, "clip.bin")
        if exists(tower):
            files.append(tower)
        else:
            # Of a name on the hub, this is where it was downloaded to; its config.json is there.
            named = tower_folder(theirs, path) or "(no mm_vision_tower in the config)"
            theirs["mm_vision_tower"] = local_folder(named)
            files += weight_files(theirs["mm_vision_tower"], {})
    connector = join(path, "mm_projector.bin")
    if not starting_with(PROJECTOR, names) and exists(connector):
        files.append(connector)
    return files


def main_files(path):
    """A folder's one file of weights, or the shards that its index names; [] without either."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = join(path, name)
        index = file + ".index.json"
        # Transformers, too, takes the single file first. An index beside it is an older model's.
        if exists(file):
            return [file]
        if exists(index):
            return shards_of(path, index)
    return []


def shards_of(path, index):
    """The files of a folder that an index of shards names."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [join(path, name) for name in names]
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index}: not an index of shards: {e!r}") from None
    # Say so now, not when the other shards have been read.
    for file in files:
        if not exists(file):
            raise ValueError(f"{file}: missing; the index names it. Copy or download it again")
    return files


def tensors_in(files, device="cpu"):
    """Yield (name, tensor) of .safetensors and .bin files. On "meta", only shapes are read."""
    for file in files:
        with errors_that_name(file):
            if not str(file).endswith(".safetensors"):
                state = read_bin(file, device)
                for name in list(state):
                    yield name, state.pop(name)
                continue

            # The file is opened anew for each tensor: it is mapped into memory, and pages that
            # were read count as memory as long as it is open.
            for name in safe_open(file, "pt").keys():
                with safe_open(file, "pt") as f:
                    if device == "meta":
                        tensor = torch.empty(f.get_slice(name).get_shape(), device=device)
                    else:
                        tensor = f.get_tensor(name)
                yield name, tensor
                del tensor


class Shapes(dict):
    """{published name: shape}; a name that is not there is an error that says so."""

    def __missing__(self, name):
        raise ValueError(f"tensor {name} is missing")


def shapes_in(files, rename=published_name):
    """The shapes of all tensors in these files, read off their headers."""
    return Shapes((rename(name), tensor.shape) for name, tensor in tensors_in(files, "meta"))


def read_bin(file, device):
    """The tensors of a .bin, which is a pickle. weights_only refuses one that would run code."""
    # Where shapes are enough, the file is mapped and its tensors are not read.
    mmap = device == "meta" and zipfile.is_zipfile(file)
    state = torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and torch.is_tensor(t) for name, t in state.items()):
        raise ValueError("must hold a dictionary of tensors")
    return state


@contextlib.contextmanager
def errors_that_name(file):
    """Turn whatever goes wrong while a file is read into one line that names the file."""
    check_is_file(file)
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{file}: missing") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: damaged, or more than tensors, a pickle that would run code: "
                         "refused. Convert it to safetensors where you trust it") from None
    except Exception as e:
        raise ValueError(f"{file}: cannot be read, truncated perhaps: {first_line(e)}") from None


def check_is_file(file):
    """Raise ValueError for a folder, or for a pipe, which would be waited for for ever."""
    if exists(file) and not os.path.isfile(file):
        raise ValueError(f"{file}: a folder or a pipe stands in the file's place")


def read_tokenizer(file):
    """A tokenizer.json, without the truncation and padding that it may ask for: data.py pads and
    cuts."""
    check_is_file(file)
    try:
        tokenizer = Tokenizer.from_str(Path(file).read_text(encoding="utf-8-sig"))
    except Exception as e:
        # Tokenizers raises bare Exceptions.
        raise ValueError(f"{file}: cannot be read as a tokenizer: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    # They are kept with it, for `save_tokenizer`.
    tokenizer.neighbours = {}
    for name in NEIGHBOURS:
        neighbour = Path(file).with_name(name)
        if neighbour.is_file():
            tokenizer.neighbours[name] = neighbour.read_bytes()
    return tokenizer


def check_vocabulary(tokenizer, config, where):
    """Raise ValueError unless the decoder has an embedding for all that the tokenizer may say."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= config.text.vocab_size:
        raise ValueError(f"{where}: its ids go up to {highest}, the decoder's embedding has "
                         f"{config.text.vocab_size} rows (text.vocab_size), from 0 on; this "
                         "tokenizer belongs to another model, or got tokens for which the "
                         "embedding must be enlarged first")


# -------------------------------------------------------------------------------------------------
# 6. Models put together, and the tiny presets' backbones


def assemble(vision, llm, connector=None, scales=(1,), template=None, seed=0, dtype=None,
             listing=None, later=None, audio=None, pixel_shuffle=1):
    """A model that stage 1 can start from -> (CuMo in eval mode, the decoder's tokenizer or None).

    vision: the tower of this folder, or CuMo's clip.bin. llm: the decoder of this folder.
    connector: an mm_projector.bin of CuMo or LLaVA; without it, a new one. audio: a folder of
    Whisper, for an ear and a new resampler. dtype, listing, later: as for `load`. pixel_shuffle: as
    in ConnectorConfig.
    """
    # Sizes first: the parts are on meta, and their weights are streams.
    streams = []
    if os.path.isfile(vision):
        tower = build_on_meta(vision_config({}, shapes_in([vision])))
        streams.append(match_tensors([vision], state_of(tower), vision, published_name, listing))
    else:
        tower, _, _ = open_part(vision, "vision", listing, streams)
    decoder, config, tokenizer = open_part(llm, "text", listing, streams)
    shapes = shapes_in([connector]) if connector else {}
    model = build_on_meta(replace(
        config,
        vision=replace(tower.config, scales=list(scales)),
        connector=ConnectorConfig(n_experts=count(shapes, r"mm_projector\.experts\.(\d+)\."),
                                  pixel_shuffle=pixel_shuffle),
        text=decoder.config,
        audio=None,
        template=template or config.template,
    ))

    # The connector.
    if connector:
        try:
            fill_from(match_tensors([connector], state_of(model.connector), connector,
                                    published_name, listing), model.connector,
                      dtype or torch.float32)
        except ValueError as e:
            plural = "" if len(scales) == 1 else "s"
            raise ValueError(f"{e}; the tower is {tower.config.dim} wide at {len(scales)} "
                             f"scale{plural}, the decoder {decoder.config.dim}") from None
    else:
        model.connector.to_empty(device="cpu")
        torch.manual_seed(seed)
        model.init_weights(parts=("connector",))

    # The ear, and a new resampler.
    if audio:
        ear, _, _ = open_part(audio, "audio", listing, streams)
        add_audio(model, ear, seed)

    # The weights, now or later.
    if later is not None:
        later.extend(streams)
    else:
        fill_from(itertools.chain(*streams), model, dtype)
    return model.eval(), tokenizer


PARTS = {  # what a folder that is to give a part must hold, alone or in a whole model
    "vision": (VisionTransformer, "has no vision tower; --vision wants a CLIP or SigLIP folder"),
    "text": (Decoder, "has no decoder; --llm wants a language model's folder"),
    "audio": (AudioTransformer, "is no ear; --audio wants a Whisper folder"),
}


def open_part(folder, part, listing, streams):
    """(a part of the model in a folder, on meta; the model's config; its tokenizer). Of the
    folder's weights, only those of this part join the streams."""
    found = []
    model, tokenizer = load(folder, listing=listing, later=found)
    streams.append(item for item in found[0] if item[0].startswith(part + "."))
    module = getattr(model, part, model)
    kind, complaint = PARTS[part]
    if not isinstance(module, kind):
        raise ValueError(f"{folder}: {complaint}")
    return module, model.config, tokenizer


def add_audio(model: CuMo, audio: AudioTransformer, seed=0) -> CuMo:
    """Give a model an ear, in place: this encoder, and a new resampler behind it."""
    if model.config.audio:
        raise ValueError("this model hears already")

    # Through Config, which checks the fields; the ear's config and the model's are then one.
    model.config.audio = replace(model.config, audio=replace(audio.config)).audio
    audio.config = model.config.audio

    # An ear on meta gets its weights later; the resampler is new and has them now.
    weight = audio.conv1.weight
    device = "cpu" if weight.is_meta else weight.device
    with torch.device(device):
        resampler = Resampler(audio.config, model.config.text.dim).to(weight.dtype)

    # The decoder comes last, as in a model that was born with ears.
    text = model.text
    del model.text
    model.audio = audio
    model.resampler = resampler
    model.text = text
    torch.manual_seed(seed)
    model.init_weights(parts=("resampler",))
    return model.train(model.training)


# What CLIP, Mistral and Whisper are to the real presets, a shipped file of pre-trained backbones is
# to the tiny ones. The bridges between them are not in it: these begin as new.
BACKBONES = "vision.", "audio.", "text."


def save_backbones(model, file, tokenizer):
    """Write tower, ear and decoder into one file, with config and tokenizer in its header."""
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write_tensors(file, starting_with(BACKBONES, model.state_dict()),
                  tokenizer=tokenizer.to_str(), config=json.dumps(model.config.to_dict()))


def load_backbones(file, pixel_shuffle=1, dtype=None, listing=None):
    """-> (CuMo with pre-trained tower, ear and decoder and new bridges, tokenizer).

    dtype, listing: as for `load`.
    """
    try:
        with safe_open(file, "pt") as f:
            header = f.metadata() or {}
        config = header["config"]
        tokenizer = header["tokenizer"]
    except (FileNotFoundError, SafetensorError, KeyError) as e:
        raise ValueError(f"{file}: cannot be read, or has no config and tokenizer in its header "
                         f"({e}); make it again with `python assets/backbones.py`, or of another "
                         "model give the folder") from None

    # A CuMo is born with new weights; the bridges keep theirs.
    config = json.loads(config)
    config["connector"]["pixel_shuffle"] = pixel_shuffle
    model = CuMo(Config.from_dict(config))
    wanted = starting_with(BACKBONES, state_of(model))
    fill_from(match_tensors([file], wanted, file, listing=listing), model, dtype)
    return model, Tokenizer.from_str(tokenizer)


# -------------------------------------------------------------------------------------------------
# 7. Checks of what upcycle and save are asked for


def layer_counts(model, wanted, top_k, sources):
    """{part: the number of experts of each of its layers}, or a ValueError that says what is wrong.

    wanted: {part: one number or a list}. sources: what is to be put together in the decoder.
    """
    if adapted(model):
        raise ValueError("this model has LoRA adapters; merge them first (drop_lora)")

    counts = {}
    for part, given in wanted.items():
        # One number for each layer.
        owners = ffn_owners(model, part)
        if given and not owners:
            raise ValueError(f"{part}: this model has no such part to upcycle")
        numbers = [given] * len(owners) if isinstance(given, int) else list(given)
        if len(numbers) != len(owners):
            raise ValueError(f"{part}: {len(numbers)} expert counts for {len(owners)} layers")
        counts[part] = numbers

        # What a layer cannot become, or is already.
        config = getattr(model.config, part)
        has_experts = any(isinstance(owner.ffn, MoE) for owner in owners)
        for layer, (owner, n_experts) in enumerate(zip(owners, numbers)):
            if n_experts == 0:
                continue
            if not 1 <= top_k <= n_experts:
                raise ValueError(f"{part}: top_k = {top_k} of {n_experts} experts; need "
                                 "1 <= top_k <= experts")
            if isinstance(owner.ffn, MoE):
                raise ValueError(f"{part} layer {layer} already has {len(owner.ffn.router)} "
                                 "experts")
            if has_experts and config.top_k != top_k:
                raise ValueError(f"{part} already has experts with top_k = {config.top_k}; all "
                                 f"its layers share one, got {top_k}")
            if sources and part == "text" and n_experts != len(sources):
                raise ValueError(f"text: {n_experts} experts asked for, {len(sources)} given to "
                                 "put together")
    return counts


def warn_of_weights(config, counts, top_k):
    """Say that upcycling changes the output, where the weights of a token's experts do not sum to
    1: where the config says so, or where it gets one expert of several.

    That one's weight is the router's probability, at first about 1 / E; if it were 1, the router
    would learn from the auxiliary losses alone (kernels.route). The price is that training begins
    worse than the dense model ended. The released CuMo has the weight 1: to have that too, set
    `renormalise` in the part's config to True before.
    """
    for part, numbers in counts.items():
        most = max(numbers, default=0)
        if most < 2 or rescales(replace(getattr(config, part), top_k=top_k)):
            continue
        cause = "renormalise = false"
        usual = f"1 / {top_k}"
        if top_k == 1:
            cause = "top_k = 1"
            usual = "1"
        warnings.warn(f"{cause} changes the output of {part}: an expert counts as much as its "
                      f"probability, at first about 1 / {most} instead of {usual}", stacklevel=3)


# Fields in which a source's decoder may differ from the model that it goes into.
ABOUT_EXPERTS = {"n_experts", "top_k", "renormalise", "capacity_factor", "eval_capacity_factor",
                 "min_capacity", "noisy", "aux", "max_positions", "start_token", "end_tokens"}


def check_same_sizes(where, theirs, ours, average):
    """Raise ValueError unless a source's parts have the sizes of the model that they go into."""
    ours = asdict(ours)
    theirs = asdict(theirs)
    for part in ("text", "vision", "connector", "audio"):
        # Field by field; a part that is not there has none.
        our_part = ours[part] or {}
        their_part = theirs[part] or {}

        # Where only FFNs are taken, a decoder without senses will do.
        if part != "text" and not average and not (our_part and their_part):
            continue
        for key in our_part | their_part:
            value = their_part.get(key)
            if value != our_part.get(key) and not (part == "text" and key in ABOUT_EXPERTS):
                raise ValueError(f"{where}: {part}.{key} = {value}, the model that it goes into "
                                 f"has {our_part.get(key)}")


def rescales(part):
    """Do the weights of a token's experts sum to 1? See kernels.route."""
    if part.renormalise is None:
        return part.top_k > 1
    return part.renormalise


def tower_kind(vision):
    """The model_type of a tower, a key of TOWERS. Raises ValueError for one of another make."""
    made = (vision.n_prefix_tokens, vision.pre_norm, vision.patch_bias)
    if made == (1, True, False) and not vision.post_norm:
        return "clip_vision_model"
    if made == (0, False, True):
        return "siglip_vision_model"
    raise ValueError("vision: n_prefix_tokens, pre_norm, patch_bias and post_norm are neither "
                     "CLIP's nor SigLIP's; write it as own")


def check_mixtral(text):
    """Raise ValueError for a mixture that no Hugging Face decoder is."""
    factor = text.capacity_factor or text.eval_capacity_factor
    if len(set(text.n_experts)) > 1:
        raise ValueError("text: experts in some layers only; no Hugging Face decoder has that")
    if factor:
        raise ValueError(f"text: capacity_factor = {factor}; no Hugging Face decoder's experts "
                         "drop tokens")
    if text.aux == "sum" or text.noisy:
        raise ValueError("text: MoE-LLaVA's gate (aux = sum, or noisy), which no Hugging Face "
                         "decoder has")
    if not rescales(text):
        raise ValueError(f"text: top_k = {text.top_k} without rescaling; Mixtral's code rescales "
                         "the weights to sum to 1")


def check_senses(config, layout):
    """Raise ValueError where the layout writes a tower and the model has none, or where it has no
    place for the model's ear, its experts or its scales."""
    is_whole = layout in ("cumo", "moe-llava", "hf-llava")  # tower, connector and decoder
    if config.audio and is_whole:
        raise ValueError(f"the layout {layout} has no place for an ear, and this model hears; "
                         "write it as own (hf-llm: the decoder alone)")
    if config.vision is None and (is_whole or layout == "hf-clip"):
        raise ValueError(f"a language model alone has no tower to write as {layout}; --to hf-llm "
                         "writes the decoder")
    if is_whole and (
            tower_kind(config.vision) != "clip_vision_model"
            or config.vision.image_aspect == "stretch" or config.connector.pixel_shuffle > 1):
        raise ValueError(f"the layout {layout} has CLIP's tower and a token for each patch, and "
                         "this model a SigLIP tower or a pixel shuffle; write it as own")
    if is_whole and config.frames_apart:
        warnings.warn(f"the layout {layout} does not say frames_apart: read again, a video fills "
                      "the slots of one image")
    if layout != "hf-llava":
        return
    if any(config.vision.n_experts + [config.connector.n_experts] + config.text.n_experts):
        raise ValueError("transformers' LLaVA is dense, this model has experts; write it as cumo "
                         "or moe-llava, or as hf-llava the dense model of stage 2")
    if config.vision.scales != [1]:
        raise ValueError("transformers' LLaVA reads a picture at scale 1 only, this model at "
                         f"{config.vision.scales}; write it as cumo")


# -------------------------------------------------------------------------------------------------
# 8. `python upcycle.py`: put a model together or convert one, and see where each tensor goes

ABOUT = """Weights in and out: python upcycle.py ... --out DIR, where ... is one of these.

  --vision CLIP_DIR --llm LLM_DIR --scales 1,3     tower + decoder + new connector: for stage 1
  --vision SIGLIP_DIR --llm LLM_DIR --pixel-shuffle 2     the same, with a quarter of the tokens
  --vision CLIP_DIR --llm LLM_DIR --audio WHISPER_DIR     + ear + new resampler: for Uni-MoE's
  --experts DIR_A,DIR_B,DIR_C,DIR_D     decoders trained apart -> the experts of one
  --from FILE.safetensors     backbones in one file (those in assets/) + new connector: for stage 1
  --from CUMO_DIR             any layout that is understood -> this project's
  --from DIR --to cumo        -> the published CuMo layout
  --from DIR --to hf-llava    a dense model, for transformers and what reads its folders
  --from DIR --to hf-llm      the decoder alone, for transformers (hf-clip: the tower)

A name on the Hugging Face hub can stand in a folder's place. Every tensor's two names are printed;
one that is missing, left over or of the wrong shape is an error."""


def parse(argv=None):
    """The command's flags; ValueError where they do not go together."""
    parser = argparse.ArgumentParser(description=ABOUT,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for flag, metavar, what in (
        ("--vision", "DIR", "take the tower from this folder (CLIP, SigLIP), or from clip.bin"),
        ("--llm", "DIR", "take the decoder and the tokenizer from this folder"),
        ("--audio", "DIR", "take an ear from this folder (Whisper)"),
        ("--connector", "FILE", "take the connector from this mm_projector.bin; default: new"),
        ("--experts", "DIRS", "with commas: their decoders' FFNs become the first one's experts"),
        ("--tokenizer", "FILE", "a tokenizer.json, for folders with an older tokenizer.model"),
    ):
        add(flag, metavar=metavar, help=what)
    add("--template", choices=data.TEMPLATES, help="how a conversation is written; default: by the "
        "marks that the tokenizer knows and by the decoder's architecture")
    add("--from", dest="source", metavar="DIR", help="model to convert: " + SUPPORTED
        + "; or a file of backbones, as assets/ has them")
    add("--average", action="store_true", help="with --experts: all else is the mean over them")
    add("--every-other", action="store_true",
        help="with --experts: in layers 0, 2, 4... only; the others stay dense")
    add("--out", required=True, metavar="DIR", help="folder to write; must not hold a model yet")
    add("--to", choices=LAYOUTS, default="own", help="layout to write (default: own)")
    add("--scales", default="1", help="S2 scales of a new model, for example 1,3 (default: 1)")
    add("--pixel-shuffle", type=int, default=1, metavar="N",
        help="a new model's tokens are N x N patches each (default: 1)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are stored")
    add("--seed", type=int, default=0, help="of a new connector, resampler or routers (default: 0)")
    args = parser.parse_args(argv)

    # Which flags go together.
    ways = [args.source, args.vision or args.llm, args.experts]
    if sum(map(bool, ways)) != 1 or bool(args.vision) != bool(args.llm):
        raise ValueError("give either --from DIR, or --vision DIR and --llm DIR, or --experts DIRS")
    if args.pixel_shuffle != 1 and not args.vision:
        raise ValueError("--pixel-shuffle goes with --vision and --llm: it is a new connector's")
    if (args.connector or args.scales != "1") and not args.vision:
        raise ValueError("--connector and --scales go with --vision and --llm: they are a new "
                         "model's")
    if (args.audio and not args.vision) or (
            (args.average or args.every_other) and not args.experts):
        raise ValueError("--audio goes with --vision and --llm; --average and --every-other go "
                         "with --experts")
    if exists(join(args.out, "config.json")):
        raise ValueError(f"{args.out} holds a model already: choose another --out")
    args.scales = read_scales(args.scales)
    if args.dtype:
        args.dtype = getattr(torch, args.dtype)
    return args


def read_scales(text):
    """--scales, also train.py's: "1,3" -> [1, 3]."""
    scales = text.split(",")
    if not all(scale.isdecimal() and 1 <= int(scale) <= 16 for scale in scales):
        raise ValueError(f"--scales {text}: whole numbers from 1 to 16 with commas, for example "
                         "1,3 (the image, and the same three times enlarged)")
    return [int(scale) for scale in scales]


# The two codes build the tower from what their config.json names, CuMo's as a shape, MoE-LLaVA's
# with its weights.
TOWER_ELSEWHERE = ("For the released code, {key} in config.json must name the tower. If it is not "
                   "OpenAI's, or was trained, write it with --to hf-clip and put its path there.")


def main(argv=None):
    args = parse(argv)
    listing = []
    if args.source and os.path.isfile(args.source):
        torch.manual_seed(args.seed)  # of the new connector
        model, tokenizer = load_backbones(args.source, dtype=args.dtype, listing=listing)
    elif args.source:
        model, tokenizer = load(args.source, dtype=args.dtype, listing=listing)
    elif args.experts:
        model, tokenizer = put_together(args, listing)
    else:
        model, tokenizer = assemble(args.vision, args.llm, args.connector, args.scales,
                                    args.template, args.seed, args.dtype, listing,
                                    audio=args.audio, pixel_shuffle=args.pixel_shuffle)
    print_listing(listing)

    # One layout holds a tower, and none holds an ear alone.
    is_tower = isinstance(model, VisionTransformer)
    if isinstance(model, AudioTransformer) or (is_tower and args.to == "own"):
        raise ValueError(f"{args.source}: an encoder alone; put a tower together with a decoder: "
                         "--vision DIR --llm DIR")

    if not is_tower:
        tokenizer = override(model, tokenizer, args)
    elif args.template:
        raise ValueError(f"--template {args.template}: {args.source} is a tower alone, which is "
                         "not talked to; leave it out")
    n_params = save(model, args.out, tokenizer, layout=args.to)
    print(f"wrote {args.out} ({args.to}, {n_params / 1e6:,.1f}M parameters)")
    if args.to in TOWER_KEYS:
        print(TOWER_ELSEWHERE.format(key=TOWER_KEYS[args.to]))
    if tokenizer is None and args.to != "hf-clip":
        print("No tokenizer.json was found: give one with --tokenizer, or nothing can be trained "
              "or asked")


def override(model, tokenizer, args):
    """--template and --tokenizer, over what the folders say. Returns the tokenizer."""
    config = model.config
    if args.template:
        config.template = args.template
    if args.tokenizer:
        tokenizer = read_tokenizer(args.tokenizer)
        check_vocabulary(tokenizer, config, args.tokenizer)
        if not data.fits(tokenizer, config.template):
            config.template = data.template_for(tokenizer, config.template)
    if args.template and tokenizer is not None:
        data.check_end_mark(tokenizer, args.template)
    return tokenizer


def put_together(args, listing):
    """--experts: the first folder's model, with the FFNs of all folders as experts."""
    folders = args.experts.split(",")
    model, tokenizer = load_decoder(folders[0], dtype=args.dtype, listing=listing)

    where = "every_other" if args.every_other else "all"
    counts = expert_counts(model.config.text.n_layers, where, str(len(folders)))
    upcycle(model, text=counts, seed=args.seed, experts=folders, average=args.average)
    # Uni-MoE trains without routing losses, and so does train.py what begins here.
    model.config.balance_coef = 0.0
    model.config.z_coef = 0.0
    return model, tokenizer


def print_listing(listing):
    """(their name, our name, shape, dtype) of each tensor, a line for all layers and experts that
    are alike."""
    # Numbers of layers and experts become {i} and {e}.
    groups = Counter((pattern_of(theirs), pattern_of(ours), shape, dtype)
                     for theirs, ours, shape, dtype in listing)

    width = max((len(theirs) for theirs, *_ in groups), default=0)
    for (theirs, ours, shape, dtype), n in groups.items():
        sizes = " x ".join(map(str, shape))
        alike = "" if n == 1 else f"  ({n} of them)"
        dtype = str(dtype).removeprefix("torch.")
        print(f"{theirs:{width}}  ->  {ours:36} {sizes:18} {dtype}{alike}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"upcycle.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
