"""upcycle.py: weights in and out, and dense -> mixture of experts.

Sparse upcycling (arXiv 2212.05055) does not train experts from scratch: every expert starts as a copy of the trained dense FFN,
and only the router is new. Since the chosen experts' weights sum to 1, the upcycled block computes at first exactly what the dense
one did, so training goes on where it was and the experts grow apart from there. CuMo's "co-upcycling" does this in the vision
tower and in the connector at once, between its second and third stage. Uni-MoE's experts need not be copies of one FFN: fine-tuned
apart before, each on one modality or task, they meet as experts of one decoder.

A model folder holds config.json, model.safetensors (in shards with an index above 5 GB) and tokenizer.json.
"""
import argparse
import dataclasses
import json
import math
import os
import pickle
import re
import sys
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model import (FFN, ROPE_SCALING, AudioConfig, AudioTransformer, Config, ConnectorConfig, CuMo, MoE, Resampler, TextConfig,
                   VisionConfig, VisionTransformer, adapted, merge_state)

SHARD_BYTES = 5 * 10**9

# ---------------------------------------------------------------------------------------------------------------------
# 1. Dense -> experts


def upcycle(model: CuMo, vision=0, connector=0, text=0, top_k: int = 2, seed: int = 0, real_routers: bool = False,
            experts: list | None = None, average: bool = False) -> CuMo:
    """Turn dense FFNs into MoEs, in place: every expert a copy, the router Normal(0, 0.02).

    vision, connector, text: the number of experts, for all layers or (vision, text) a list with one number a layer; 0 leaves a
    layer as it is. CuMo's stage 3 is upcycle(model, vision=4, connector=4); MoE-LLaVA's is upcycle(model, text=[4, 0] * 16).
    real_routers: a model on meta, whose weights come later (`put`), gets its routers now.

    experts: dense models of the same architecture (folders, or CuMos) that were fine-tuned apart, Uni-MoE's mixture: expert e of the
    decoder's MoEs (in every layer, or as `text` says) gets the FFN of the e-th. All else stays the model's, or with `average` becomes
    the mean over the experts' models. Their weights stream through one by one: they are never all in memory.
    Raises ValueError for a bad count, and where a layer already has experts. Asserts that copies do not change the output."""
    sources = [] if experts is None else sources_of(model, experts, average)
    if experts is not None:
        text = text or len(sources)
        if wrong := {n for n in ([text] if isinstance(text, int) else text) if n not in (0, len(sources))}:
            raise ValueError(f"text: {min(wrong)} experts asked for, {len(sources)} given to put together")
    if adapted(model):
        raise ValueError("this model has LoRA adapters; merge them first (drop_lora)")
    jobs = []                                                                      # (config part, its FFN owner, layer, experts)
    for name, wanted in (("vision", vision), ("connector", connector), ("text", text)):
        module, part = getattr(model, name), getattr(model.config, name)
        if module is None and (wanted if isinstance(wanted, int) else any(wanted)):
            raise ValueError(f"{name}: this model has no such part to upcycle")
        owners = [] if module is None else [module] if name == "connector" else list(module.layers)
        wanted = [wanted] * len(owners) if isinstance(wanted, int) else list(wanted)
        if len(wanted) != len(owners):
            raise ValueError(f"{name}: {len(wanted)} expert counts for {len(owners)} layers")
        for layer, (owner, n_experts) in enumerate(zip(owners, wanted)):
            if n_experts and not 1 <= top_k <= n_experts:
                raise ValueError(f"{name}: top_k = {top_k} of {n_experts} experts; need 1 <= top_k <= experts")
            if n_experts and isinstance(owner.ffn, MoE):
                raise ValueError(f"{name} layer {layer} already has {len(owner.ffn.router)} experts")
            if n_experts and part.top_k != top_k and (any(part.n_experts) if isinstance(part.n_experts, list) else part.n_experts):
                raise ValueError(f"{name} already has experts with top_k = {part.top_k}; all its layers share one, got {top_k}")
            if n_experts:
                jobs.append((part, owner, layer, n_experts))
    generator = torch.Generator().manual_seed(seed)                                # the same routers on every rank
    for part, owner, layer, n_experts in jobs:
        limits = part.expert_limits if part is model.config.text else {}
        owner.ffn = experts_from(owner.ffn, n_experts, top_k, generator, real_routers, **limits)
        part.top_k = top_k
        if isinstance(part.n_experts, list):
            part.n_experts[layer] = n_experts
        else:
            part.n_experts = n_experts
    params = dict(model.named_parameters())
    stacked = {name for path, m in model.text.named_modules(prefix="text") if isinstance(m, MoE) for name, _ in m.named_parameters(path)}
    for e, tensors in enumerate(sources):
        for name, _, tensor in tensors:
            if name in stacked:
                put(params[name], e, tensor)
            elif average:                                                          # a running mean: 1 / 1 of the first, 1 / 2 of the next
                params[name].data.lerp_(tensor.to(params[name]), 1 / (e + 1))
    return model


OF_EXPERTS = {"n_experts", "top_k", "capacity_factor", "eval_capacity_factor", "min_capacity", "noisy", "aux"}


def sources_of(model: CuMo, experts: list, average: bool) -> list:
    """For each of the models to be put together, a stream of (our name, None, tensor); all are compared before the first is read."""
    if not experts or next(model.parameters()).is_meta or any(model.config.text.n_experts):
        raise ValueError("experts: name one model at least, and put them into a dense decoder that has its weights")
    streams, ours = [], dataclasses.asdict(model.config)
    for i, source in enumerate(experts):
        where = f"expert {i}" if isinstance(source, CuMo) else os.fspath(source)
        if isinstance(source, CuMo):
            state = merge_state(source.state_dict(), source)
            if source is model and average:                                        # which changes the model while others still stream in
                state = {name: t.clone() for name, t in state.items()}
            tensors = [((name, None, t) for name, t in state.items())]
        else:
            source, _ = load(source, later=(tensors := []))
        if not isinstance(source, CuMo):
            raise ValueError(f"{where}: an encoder alone; experts come from models with a decoder")
        if any(source.config.text.n_experts):
            raise ValueError(f"{where}: has experts in its decoder; only dense models can become experts")
        theirs = dataclasses.asdict(source.config)
        for part in ("text", "vision", "connector", "audio"):
            a, b = ours[part] or {}, theirs[part] or {}
            if part != "text" and not average and not (a and b):                   # a decoder without senses can be an expert
                continue
            for key in a | b:
                if a.get(key) != b.get(key) and not (part == "text" and key in OF_EXPERTS):
                    raise ValueError(f"{where}: {part}.{key} = {b.get(key)}, the model that it goes into has {a.get(key)}")
        streams += tensors
    return streams


@torch.no_grad()
def experts_from(dense: FFN, n_experts: int, top_k: int, generator: torch.Generator, real_router: bool = False, **limits) -> MoE:
    """One dense FFN -> a MoE of n_experts copies of it, on the same device and in the same dtype. limits: MoE's capacities."""
    (ffn_dim, dim), like = dense.w_in.shape, dense.w_in
    with torch.device("meta"):
        moe = MoE(dim, ffn_dim, dense.act, n_experts, top_k, len(dense.w_out), dense.w_gate is not None, dense.b_in is not None,
                  **limits)
    state = {name: w.detach().unsqueeze(0).repeat(n_experts, *[1] * w.dim()) for name, w in dense.named_parameters()}
    router = torch.randn(n_experts, dim, generator=generator) * 0.02
    state["router"] = router.to("cpu" if like.is_meta and real_router else like.device, like.dtype)
    moe.load_state_dict(state, assign=True)
    moe.requires_grad_(True)
    x = torch.randn(16, dim, generator=generator).to(like.device, like.dtype)      # drawn in any case: the next router depends on it
    if not like.is_meta and not moe.capacity_factor and not moe.eval_capacity_factor:
        before, after = dense(x)[0].float(), moe(x)[0].float()
        # Weights sum to 1 but for rounding, and long sums come out in another order; what is wrong would be off by far more
        tolerance = (8 * torch.finfo(like.dtype).eps + 1e-4) * before.abs().max().clamp(min=1e-3)
        assert (before - after).abs().max() <= tolerance, f"upcycling changed the output by {(before - after).abs().max()}"
    return moe


PLACEMENTS = "every_other", "all", "first_half", "second_half"


def moe_layers(where: str, n_layers: int) -> list[int]:
    """The decoder layers that get experts, of n_layers.

    where: one of PLACEMENTS, which MoE-LLaVA compares (every other layer is its choice), or layer
    numbers with commas. Raises ValueError for anything else, and for layers that do not exist.
    """
    half = n_layers // 2
    if where == "every_other":
        layers = list(range(0, n_layers, 2))
    elif where == "all":
        layers = list(range(n_layers))
    elif where == "first_half":
        layers = list(range(half))
    elif where == "second_half":
        layers = list(range(half, n_layers))
    else:
        try:
            layers = [int(i) for i in where.split(",")]
        except ValueError:
            raise ValueError(f"--moe-layers {where}: {', '.join(PLACEMENTS)}, or layer numbers "
                             "with commas") from None

    outside = [i for i in layers if not 0 <= i < n_layers]
    if not layers or outside or len(set(layers)) < len(layers):
        raise ValueError(f"--moe-layers {where}: the decoder has layers 0 to {n_layers - 1}; "
                         "name each once")
    return layers


def expert_counts(n_layers: int, where: str, n_experts: str) -> list[int]:
    """The number of experts of each decoder layer, 0 where it stays dense.

    where: as for moe_layers. n_experts: one number for all of these layers, or one for each of
    them, with commas. For example (4, "0,3", "4,2") gives [4, 0, 0, 2].
    """
    layers = moe_layers(where, n_layers)
    numbers = [int(n) for n in n_experts.split(",")]
    if len(numbers) == 1:
        numbers = numbers * len(layers)
    if len(numbers) != len(layers):
        raise ValueError(f"--n-experts {n_experts} has {len(numbers)} numbers, --moe-layers {where} "
                         f"are {len(layers)} layers")
    counts = [0] * n_layers
    for layer, number in zip(layers, numbers):
        counts[layer] = number
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# 2. What other programs call the same tensors. One table serves loading, saving and the listing that `python upcycle.py` prints
#
# Left, the published CuMo names; Hugging Face's CLIP, LLaMA, Mistral, Mixtral, Qwen2 and LLaVA differ from them by prefixes (RENAMES).
# {i} is a layer, {e} an expert: ours are stacked, so w_in[{e}] is a slice. {p} stands for weight and bias.

TOWER, PROJECTOR = "model.vision_tower.vision_model.", "model.mm_projector."
NAMES = {}
for theirs, ours in {
    TOWER + "embeddings.class_embedding": "vision.cls",
    TOWER + "embeddings.patch_embedding.weight": "vision.patch.weight",
    TOWER + "embeddings.position_embedding.weight": "vision.pos",
    TOWER + "pre_layrnorm.{p}": "vision.pre_norm.{p}",                             # the typo is CLIP's
    **{TOWER + "encoder.layers.{i}." + a: "vision.layers.{i}." + b for a, b in {
        "layer_norm1.{p}": "norm1.{p}", "layer_norm2.{p}": "norm2.{p}",
        "self_attn.q_proj.{p}": "q.{p}", "self_attn.k_proj.{p}": "k.{p}", "self_attn.v_proj.{p}": "v.{p}", "self_attn.out_proj.{p}": "o.{p}",
        "mlp.fc1.weight": "ffn.w_in", "mlp.fc1.bias": "ffn.b_in", "mlp.fc2.weight": "ffn.w_out", "mlp.fc2.bias": "ffn.b_out",
        "gate.weight": "ffn.router",
        "experts.{e}.fc1.weight": "ffn.w_in[{e}]", "experts.{e}.fc1.bias": "ffn.b_in[{e}]",
        "experts.{e}.fc2.weight": "ffn.w_out[{e}]", "experts.{e}.fc2.bias": "ffn.b_out[{e}]"}.items()},
    **{"audio_tower.encoder." + a: "audio." + b for a, b in {                       # Whisper
        "conv1.{p}": "conv1.{p}", "conv2.{p}": "conv2.{p}", "embed_positions.weight": "pos", "layer_norm.{p}": "norm.{p}",
        "layers.{i}.self_attn_layer_norm.{p}": "layers.{i}.norm1.{p}", "layers.{i}.final_layer_norm.{p}": "layers.{i}.norm2.{p}",
        "layers.{i}.self_attn.q_proj.{p}": "layers.{i}.q.{p}", "layers.{i}.self_attn.k_proj.weight": "layers.{i}.k.weight",
        "layers.{i}.self_attn.v_proj.{p}": "layers.{i}.v.{p}", "layers.{i}.self_attn.out_proj.{p}": "layers.{i}.o.{p}",
        "layers.{i}.fc1.weight": "layers.{i}.ffn.w_in", "layers.{i}.fc1.bias": "layers.{i}.ffn.b_in",
        "layers.{i}.fc2.weight": "layers.{i}.ffn.w_out", "layers.{i}.fc2.bias": "layers.{i}.ffn.b_out"}.items()},
    PROJECTOR + "0.weight": "connector.ffn.w_in", PROJECTOR + "0.bias": "connector.ffn.b_in",
    PROJECTOR + "2.weight": "connector.ffn.w_out", PROJECTOR + "2.bias": "connector.ffn.b_out",
    PROJECTOR + "gate.weight": "connector.ffn.router",
    PROJECTOR + "experts.{e}.0.weight": "connector.ffn.w_in[{e}]", PROJECTOR + "experts.{e}.0.bias": "connector.ffn.b_in[{e}]",
    PROJECTOR + "experts.{e}.2.weight": "connector.ffn.w_out[{e}]", PROJECTOR + "experts.{e}.2.bias": "connector.ffn.b_out[{e}]",
    "model.embed_tokens.weight": "text.embed.weight", "model.norm.weight": "text.norm.weight", "lm_head.weight": "text.head.weight",
    **{"model.layers.{i}." + a: "text.layers.{i}." + b for a, b in {
        "input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight",
        "self_attn.q_proj.{p}": "q.{p}", "self_attn.k_proj.{p}": "k.{p}", "self_attn.v_proj.{p}": "v.{p}", "self_attn.o_proj.weight": "o.weight",
        "mlp.gate_proj.weight": "ffn.w_gate", "mlp.up_proj.weight": "ffn.w_in", "mlp.down_proj.weight": "ffn.w_out",
        "block_sparse_moe.gate.weight": "ffn.router", "block_sparse_moe.experts.{e}.w1.weight": "ffn.w_gate[{e}]",
        "block_sparse_moe.experts.{e}.w3.weight": "ffn.w_in[{e}]", "block_sparse_moe.experts.{e}.w2.weight": "ffn.w_out[{e}]"}.items()},
}.items():
    for p in ("weight", "bias") if "{p}" in theirs else ("",):
        NAMES[theirs.replace("{p}", p)] = ours.replace("{p}", p)
THEIRS = {ours: theirs for theirs, ours in NAMES.items()}

RENAMES = [(re.compile(pattern), to) for pattern, to in (
    (r"^(model\.)?(vision|image)_tower\.((vision|image)_tower\.)?(vision_model\.)?", TOWER),                    # LLaVA, MoE-LLaVA
    (r"^(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", TOWER),      # CLIP, old and new; CuMo's clip.bin
    (r"^(model\.)?(mm_projector|multi_modal_projector)\.", PROJECTOR),
    (r"^model\.mm_projector\.image_spatial_proj\.", PROJECTOR), (r"\.mlp\.deepspeed_moe\.gate\.wg\.", ".block_sparse_moe.gate."),  # MoE-LLaVA
    *((rf"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.{name}_proj\.", rf".block_sparse_moe.experts.\1.{w}.")
      for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))),
    (r"^model\.mm_projector\.linear_1\.", PROJECTOR + "0."), (r"^model\.mm_projector\.linear_2\.", PROJECTOR + "2."),
    (r"^(model\.)?language_model\.(?=lm_head)", ""), (r"^(model\.)?language_model\.(model\.)?", "model."))]
IGNORED = [re.compile(pattern) for pattern in (                                    # what a checkpoint may hold and this model has no use for
    r"\.post_layernorm\.",                                                         # behind CLIP's last layer, which LLaVA does not use
    r"\.position_ids$", r"\.rotary_emb\.inv_freq$",                                # constants that old versions stored
    r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_scale$",            # CLIP's other half
    r"^audio_tower\.(decoder|proj_out)\.")]                                        # Whisper's


def canonical(name: str) -> str:
    """A tensor's name in any of the layouts -> its published CuMo name. (Whisper's collide with CLIP's: `whisper` goes first.)"""
    for pattern, to in RENAMES:
        name = pattern.sub(to, name)
    return name


def whisper(name: str) -> str:
    return "audio_tower." + name.removeprefix("model.")


def translate(name: str):
    """A tensor's name in any of the layouts -> (our name, expert or None); None for a tensor that is left out on purpose; our name is
    None for one that is unknown."""
    name = canonical(name)
    if any(pattern.search(name) for pattern in IGNORED):
        return None
    layer, expert = re.search(r"(?<=layers\.)\d+", name), re.search(r"(?<=experts\.)\d+", name)
    ours = NAMES.get(pattern_of(name))
    if ours is not None and layer:
        ours = ours.replace("{i}", layer[0])
    return ours and ours.removesuffix("[{e}]"), int(expert[0]) if expert else None


def pattern_of(name: str) -> str:
    """model.layers.7.experts.2.x -> model.layers.{i}.experts.{e}.x"""
    return re.sub(r"(?<=experts\.)\d+", "{e}", re.sub(r"(?<=layers\.)\d+", "{i}", name))


def published(state: dict) -> dict:
    """Our state dict -> the same tensors under the published CuMo names, experts one by one (views, no copies)."""
    out = {}
    for name, tensor in state.items():
        theirs, layer = THEIRS.get(pattern_of(name)), re.search(r"(?<=layers\.)\d+", name)
        stacked = THEIRS.get(pattern_of(name) + "[{e}]")
        layer = layer[0] if layer else ""
        if stacked and name.rsplit(".", 1)[0] + ".router" in state:
            out |= {stacked.replace("{i}", layer).replace("{e}", str(e)): part for e, part in enumerate(tensor)}
        else:
            out[theirs.replace("{i}", layer)] = tensor
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 3. Sizes: other programs' config.json <-> ours. What it lacks is read off the tensors' shapes

DECODERS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "mixtral": "MixtralForCausalLM"}
PUBLISHED = {"llava_mistral": "mistral", "llava_mixtral": "mixtral", "llava": "llama", "llava_llama": "llama", "moe_llava_mistral": "mistral",
             "moe_llava_llama": "llama"}                                           # their decoders
SUPPORTED = (f"this project's own, {', '.join(DECODERS.values())}, CLIPVisionModel, CLIPModel, WhisperModel, the published CuMo (llava_mistral, "
             "llava_mixtral), LLaVA-1.5 (llava, llava_llama) and MoE-LLaVA (moe_llava_mistral, moe_llava_llama)")


def count(shapes: dict, pattern: str) -> int:
    """How many layers or experts the tensor names that match `pattern` count."""
    return 1 + max((int(m[1]) for m in (re.search(pattern, name) for name in shapes) if m), default=-1)


def vision_config(cfg: dict, shapes: dict, **more) -> VisionConfig:
    """From CLIP's config (it may be empty) and the published names' shapes."""
    dim, _, patch, _ = shapes[TOWER + "embeddings.patch_embedding.weight"]
    n_positions = shapes[TOWER + "embeddings.position_embedding.weight"][0]
    n_layers = count(shapes, re.escape(TOWER) + r"encoder\.layers\.(\d+)\.")
    ffn_dim = next((s[0] for name, s in shapes.items() if re.search(re.escape(TOWER) + r"encoder\.layers\.0\..*fc1\.weight", name)), None)
    return VisionConfig(
        image_size=cfg.get("image_size", math.isqrt(n_positions - 1) * patch), patch_size=cfg.get("patch_size", patch),
        dim=cfg.get("hidden_size", dim), n_layers=cfg.get("num_hidden_layers", n_layers), ffn_dim=cfg.get("intermediate_size", ffn_dim),
        n_heads=cfg.get("num_attention_heads", 12 if cfg else max(1, dim // 64)),  # 12: CLIPVisionConfig's default; 64 wide: every CLIP's
        act=cfg.get("hidden_act", "quick_gelu"), norm_eps=cfg.get("layer_norm_eps", 1e-5), **more)


def text_config(cfg: dict, shapes: dict, kind: str) -> TextConfig:
    """From a Hugging Face decoder's config, in the older style (rope_theta, rope_scaling) or the current one (rope_parameters)."""
    layer = "model.layers.0.self_attn."
    vocab, dim = shapes["model.embed_tokens.weight"]
    n_heads = cfg.get("num_attention_heads", 32)                                   # a part of a config leaves out its class's defaults
    head_dim = cfg.get("head_dim") or shapes[layer + "q_proj.weight"][0] // n_heads
    n_kv = cfg.get("num_key_value_heads") or shapes[layer + "k_proj.weight"][0] // head_dim
    n_experts = cfg.get("num_local_experts", count(shapes, r"block_sparse_moe\.experts\.(\d+)\.")) if kind == "mixtral" else 0
    ffn_dim = next((s[0] for name, s in shapes.items() if re.search(r"model\.layers\.0\..*(up_proj|\.w3)\.weight", name)), None)
    n_layers = cfg.get("num_hidden_layers", count(shapes, r"^model\.layers\.(\d+)\."))
    rope = {**(cfg.get("rope_scaling") or {}), **(cfg.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rotary scaling {rope_type!r} is not supported; known: default, llama3")
    window = None if kind == "llama" else cfg.get("sliding_window", None if kind == "mixtral" else 4096)
    first = cfg.get("max_window_layers", 28) if kind == "qwen2" else 0             # the layer that the window begins at
    if kind == "qwen2" and not cfg.get("use_sliding_window") or first >= n_layers:
        window = None
    elif window and first > 0:
        raise ValueError(f"max_window_layers = {first}: a sliding window in some layers only is not supported")
    return TextConfig(
        vocab_size=cfg.get("vocab_size", vocab), dim=cfg.get("hidden_size", dim), n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv,
        head_dim=head_dim, ffn_dim=cfg.get("intermediate_size", ffn_dim), act=cfg.get("hidden_act", "silu"),
        norm_eps=cfg.get("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6),
        rope_theta=rope.get("rope_theta", cfg.get("rope_theta", 1e6 if kind == "mixtral" else 1e4)),
        rope_scaling={k: rope[k] for k in ROPE_SCALING if k in rope} if rope_type == "llama3" else None,
        sliding_window=window, qkv_bias=layer + "q_proj.bias" in shapes,
        tie_embeddings=cfg.get("tie_word_embeddings", "lm_head.weight" not in shapes),
        n_experts=n_experts, top_k=cfg.get("num_experts_per_tok", 2))


def read_json(file: str) -> dict:
    with open(file, encoding="utf-8") as f:
        try:
            value = json.load(f)
        except ValueError as e:
            raise ValueError(f"{file}: malformed JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold an object, not {str(value)[:40]}")
    return value


def config_of(path: str, cfg: dict, shapes: dict) -> Config | VisionConfig | AudioConfig:
    """The model of a folder with this config.json and tensors of these shapes (under published names)."""
    kind, architecture = cfg.get("model_type", ""), (cfg.get("architectures") or [""])[0]
    if not kind and not architecture:
        return Config.from_dict(cfg)
    if kind in ("clip", "clip_vision_model"):                                      # CLIPModel nests what CLIPVisionModel spreads out
        return vision_config(cfg.get("vision_config") or {} if kind == "clip" else cfg, shapes)
    if kind == "whisper":
        shape = lambda name: shapes[f"audio_tower.encoder.{name}"]
        return AudioConfig(n_mels=shape("conv1.weight")[1], n_frames=2 * shape("embed_positions.weight")[0], dim=shape("conv1.weight")[0],
                           n_layers=count(shapes, r"^audio_tower\.encoder\.layers\.(\d+)\."), ffn_dim=shape("layers.0.fc1.weight")[0],
                           n_heads=cfg.get("encoder_attention_heads", shape("conv1.weight")[0] // 64),
                           act=cfg.get("activation_function", "gelu"))
    if kind in DECODERS and not kind_is_multimodal(cfg):
        return Config(vision=None, text=text_config(cfg, shapes, kind),
                      template=cfg.get("template", "mistral" if kind.startswith("mi") else "vicuna"))
    text_kind = PUBLISHED.get(kind, kind)
    if text_kind not in DECODERS:
        raise ValueError(f"architecture {architecture or kind or '(none named)'} is not supported; supported: {SUPPORTED}")
    if "text_config" in cfg:                                                       # LLaVA as Hugging Face writes it
        text_cfg, vision_cfg, text_kind = cfg["text_config"], cfg.get("vision_config") or {}, cfg["text_config"].get("model_type", "llama")
        if text_kind not in DECODERS:
            raise ValueError(f"a decoder of type {text_kind} is not supported; supported: {', '.join(DECODERS.values())}")
        text_cfg = {**text_cfg, "tie_word_embeddings": "lm_head.weight" not in shapes}       # the decoder's own flag has no say
        select, act = cfg.get("vision_feature_layer", -2), cfg.get("projector_hidden_act", "gelu")
        chosen = cfg.get("vision_feature_select_strategy", "default") == "default"
    else:
        text_cfg, vision_cfg = cfg, {}
        tower = cfg.get("mm_vision_tower") or cfg.get("mm_image_tower") or ""
        for file in (os.path.join(tower, "config.json"), os.path.join(path, "clip_config.json")):
            if not vision_cfg and os.path.dirname(file) and os.path.isfile(file):
                vision_cfg = read_json(file)
                vision_cfg = vision_cfg.get("vision_config", vision_cfg)
        select, act, chosen = cfg.get("mm_vision_select_layer", -2), "gelu", cfg.get("mm_vision_select_feature", "patch") == "patch"
    if not chosen or cfg.get("mm_use_im_start_end") or cfg.get("mm_video_tower") or \
            (cfg.get("image_projector_type") or cfg.get("mm_projector_type") or "mlp2x_gelu") not in ("mlp2x_gelu", "smoe_mlp"):
        raise ValueError("only patch features without CLS, no image start and end tokens, no video tower, and connectors of type "
                         "mlp2x_gelu and smoe_mlp are supported; the config asks for others")
    n_experts, top_k = cfg.get("num_experts") or 0, cfg.get("num_selected") or 2
    vision = vision_config(vision_cfg, shapes, select_layer=select, scales=cfg.get("scales") or [1], top_k=top_k,
                           n_experts=n_experts if cfg.get("clip_smoe") else 0)
    text, moe = text_config(text_cfg, shapes, text_kind), cfg.get("moe")
    if moe:                                                                        # MoE-LLaVA's own part of the config
        if moe.get("use_residual"):
            raise ValueError("moe.use_residual: a dense FFN beside the experts is not supported")
        places = moe.get("moe_layers_idx") if moe.get("moe_layers_idx") is not None else range(0, text.n_layers, 2)
        numbers = moe["num_experts"] if len(moe["num_experts"]) > 1 else moe["num_experts"] * len(places)
        text = dataclasses.replace(text, top_k=moe["top_k_experts"], capacity_factor=moe["capacity_factor"], aux="sum",
                                   eval_capacity_factor=moe["eval_capacity_factor"], min_capacity=moe["min_capacity"],
                                   n_experts=[dict(zip(places, numbers, strict=True)).get(i, 0) for i in range(text.n_layers)])
    template = "vicuna" if text_kind == "llama" else "openchat" if moe else "mistral"      # MoE-LLaVA's Mistral is OpenChat
    return Config(vision=vision, connector=ConnectorConfig(act=act, n_experts=n_experts if cfg.get("mlp_smoe") else 0, top_k=top_k), text=text,
                  balance_coef=moe["router_aux_loss_coef"] if moe else cfg.get("balance_loss_coef", 0.1),
                  z_coef=0.0 if moe else cfg.get("router_z_loss_coef", 0.01), template=cfg.get("template", template))


def kind_is_multimodal(cfg: dict) -> bool:
    return any(key in cfg for key in ("mm_vision_tower", "mm_image_tower", "mm_projector_type", "mm_hidden_size"))


CLIP_L = "openai/clip-vit-large-patch14-336"                                         # VisionConfig's defaults are its sizes


def clip_config_json(v: VisionConfig) -> dict:
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": v.dim, "intermediate_size": v.ffn_dim,
            "num_hidden_layers": v.n_layers, "num_attention_heads": v.n_heads, "image_size": v.image_size, "patch_size": v.patch_size,
            "hidden_act": v.act, "layer_norm_eps": v.norm_eps, "num_channels": 3}


def text_config_json(t: TextConfig, tokenizer, template: str) -> dict:
    experts = set(t.n_experts)
    if len(experts) > 1:
        raise ValueError("text: experts in some layers only; no Hugging Face decoder has that")
    if experts != {0} and t.qkv_bias:
        raise ValueError("text: experts and QKV bias together; no supported Hugging Face decoder has both")
    if experts != {0} and (factor := t.capacity_factor or t.eval_capacity_factor):
        raise ValueError(f"text: capacity_factor = {factor}; no Hugging Face decoder's experts drop tokens")
    kind = "mixtral" if experts != {0} else "qwen2" if t.qkv_bias else "mistral" if t.sliding_window or template == "mistral" else "llama"
    out = {"architectures": [DECODERS[kind]], "model_type": kind, "vocab_size": t.vocab_size, "hidden_size": t.dim, "hidden_act": t.act,
           "intermediate_size": t.ffn_dim, "num_hidden_layers": t.n_layers, "num_attention_heads": t.n_heads, "head_dim": t.head_dim,
           "num_key_value_heads": t.n_kv_heads, "rms_norm_eps": t.norm_eps, "rope_theta": t.rope_theta, "sliding_window": t.sliding_window,
           "tie_word_embeddings": t.tie_embeddings, "max_position_embeddings": 32768,
           "template": template,                                                   # ours; others pass over it
           **{f"{name}_token_id": tokenizer.token_to_id(token) if tokenizer else None for name, token in (("bos", "<s>"), ("eos", "</s>"))}}
    if t.rope_scaling:
        out |= {"rope_scaling": {"rope_type": "llama3", **t.rope_scaling}, "max_position_embeddings":
                int(t.rope_scaling["original_max_position_embeddings"] * t.rope_scaling["factor"])}
    if kind == "mixtral":
        out |= {"num_local_experts": max(experts), "num_experts_per_tok": t.top_k}
    if kind == "qwen2":
        out |= {"use_sliding_window": bool(t.sliding_window), "max_window_layers": 0 if t.sliding_window else t.n_layers}
    return out


def moe_llava_json(config: Config, tokenizer) -> dict:
    """MoE-LLaVA's config.json: a dense LLaVA, and `moe` says where the decoder's experts are."""
    v, t = config.vision, config.text
    if any(v.n_experts) or config.connector.n_experts or config.connector.act != "gelu" or v.scales != [1] or t.qkv_bias or config.z_coef:
        raise ValueError("MoE-LLaVA's layout has a dense tower of one scale, a dense connector with gelu, a LLaMA or Mistral decoder and "
                         "no z loss")
    if t.aux != "sum" or not (t.capacity_factor and t.eval_capacity_factor):
        raise ValueError("MoE-LLaVA's layout has capacity factors, and sums the auxiliary losses over the layers (text.aux sum); this "
                         "model not")
    dense = dataclasses.replace(t, n_experts=0, capacity_factor=None, eval_capacity_factor=None)
    dense.n_experts = [0] * t.n_layers
    described = text_config_json(dense, tokenizer, config.template)
    places = [i for i, n in enumerate(t.n_experts) if n]
    kind = "llama" if described["model_type"] == "llama" else "mistral"
    return described | {
        "architectures": [f"MoELLaVA{kind.capitalize()}ForCausalLM"], "model_type": f"moe_llava_{kind}", "mm_image_tower":
        CLIP_L if clip_config_json(v) == clip_config_json(VisionConfig()) else "", "image_projector_type": "mlp2x_gelu",
        "mm_hidden_size": v.dim, "mm_vision_select_layer": v.select_layer, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "use_mm_proj": True, "image_aspect_ratio": "pad", "moe": {
            "moe_enable": True, "moe_mode": "custom", "moe_layers_idx": places, "num_experts": [t.n_experts[i] for i in places], "ep_size": 1,
            "top_k_experts": t.top_k, "capacity_factor": t.capacity_factor, "eval_capacity_factor": t.eval_capacity_factor,
            "min_capacity": t.min_capacity, "use_residual": False, "router_aux_loss_coef": config.balance_coef,
            "train_modules": ["up_proj", "down_proj", "gate_proj", "wg"]}}


def moe_llava_name(name: str) -> str:
    """A published CuMo name -> MoE-LLaVA's."""
    name = name.replace(TOWER, "model.image_tower.image_tower.vision_model.").replace(PROJECTOR, PROJECTOR + "image_spatial_proj.")
    name = name.replace(".block_sparse_moe.gate.", ".mlp.deepspeed_moe.gate.wg.")
    name = name.replace(".block_sparse_moe.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts.")
    for w, proj in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        name = name.replace(f".{w}.", f".{proj}_proj.")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# 4. Folders: save and load


def write_atomically(path: str, write):
    """Call write(temporary name), then rename: a kill in between leaves the old file whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())                                                   # on the disk before the name points to it
        os.chmod(temporary, 0o644)                                                 # safetensors writes files that others cannot read
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: str, value):
    def write(name):
        with open(name, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1, ensure_ascii=False)
    write_atomically(path, write)


LAYOUTS = ("own", "cumo", "moe-llava", "hf-llm", "hf-clip")


def save(model: CuMo, folder: str, tokenizer: Tokenizer | None = None, state: dict | None = None, layout: str = "own"):
    """Write a model folder. `state` replaces model.state_dict() where the weights are gathered elsewhere (FSDP).

    layout: "own"; "cumo" and "moe-llava", the published ones, which the released codes load; "hf-llm" and "hf-clip", the decoder or the
    (dense) tower alone as transformers writes them. CLIP's post_layernorm, which nothing here uses, is not written: transformers will say
    that it made a new one. Raises ValueError where a layout cannot hold this model."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    state = {k: v.detach().contiguous() for k, v in merge_state(model.state_dict() if state is None else state, model).items()}
    if isinstance(model, VisionTransformer):
        state, config = {f"vision.{name}": tensor for name, tensor in state.items()}, Config(vision=model.config)
        if layout != "hf-clip":
            raise ValueError(f"a vision tower alone can be written as hf-clip only, not as {layout}")
    else:
        config = model.config
    v, c, t, extra = config.vision, config.connector, config.text, {}
    if layout in ("cumo", "moe-llava") and config.audio:
        raise ValueError(f"the layout {layout} has no place for an ear, and this model hears; write it as own (hf-llm: the decoder alone)")
    if layout != "hf-llm" and layout != "own" and v is None:
        raise ValueError(f"a language model alone has no tower to write as {layout}; --to hf-llm writes the decoder")
    if layout == "own":
        described = config.to_dict()
    elif layout == "hf-llm":
        described = text_config_json(t, tokenizer, config.template)
        state = published({name: tensor for name, tensor in state.items() if name.startswith("text.")})
    elif layout == "hf-clip":
        if any(v.n_experts):
            raise ValueError("hf-clip holds a dense tower, this one has experts; write it with --to cumo")
        described, tokenizer = clip_config_json(v), None
        state = {name.removeprefix("model.vision_tower."): tensor for name, tensor in
                 published({name: tensor for name, tensor in state.items() if name.startswith("vision.")}).items()}
    elif layout == "moe-llava":
        described, state = moe_llava_json(config, tokenizer), published(state)
        state = {moe_llava_name(name): tensor for name, tensor in state.items()}
        extra["clip_config.json"] = clip_config_json(v)
    else:
        counts = {n for n in (*v.n_experts, c.n_experts) if n}
        if len(counts) > 1 or len(set(v.n_experts)) > 1 or (any(v.n_experts) and c.n_experts and v.top_k != c.top_k):
            raise ValueError("the published layout has one number of experts and one top-k, for all layers of the tower and the connector")
        if c.act != "gelu":
            raise ValueError(f"the published layout's connector has activation gelu, not {c.act}")
        described = text_config_json(t, tokenizer, config.template)
        kind = {"mixtral": "Mixtral", "mistral": "Mistral", "llama": "Llama" if t.rope_scaling else "Mistral"}.get(described["model_type"])
        if kind is None:
            raise ValueError("the published layout has decoders of LLaMA, Mistral and Mixtral shape; this one has QKV bias")
        described |= {"architectures": [f"Llava{kind}ForCausalLM"], "model_type": f"llava_{kind.lower()}",
                      "mm_vision_tower": CLIP_L if clip_config_json(v) == clip_config_json(VisionConfig()) else "",
                      "mm_hidden_size": v.dim, "mm_vision_select_layer": v.select_layer, "mm_vision_select_feature": "patch",
                      "mm_projector_type": "smoe_mlp" if c.n_experts else "mlp2x_gelu",
                      "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "image_aspect_ratio": "pad",
                      "scales": v.scales, "num_experts": max(counts, default=4), "num_selected": v.top_k if any(v.n_experts) else c.top_k,
                      "num_layers": 3, "dropout": False, "clip_smoe": any(v.n_experts), "mlp_smoe": c.n_experts > 0, "training": False,
                      "balance_loss_coef": config.balance_coef, "router_z_loss_coef": config.z_coef, "local_rank": 0}
        extra["clip_config.json"] = clip_config_json(v)                            # the published layout names a hub model instead
        state = published(state)
    os.makedirs(folder, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards):
        write_atomically(os.path.join(folder, file), lambda name: save_file(shard, name, metadata={"format": "pt"}))
    if len(shards) > 1:
        extra["model.safetensors.index.json"] = {"metadata": {"total_size": sum(t.nbytes for t in state.values())},
                                                 "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
    elif os.path.exists(index := os.path.join(folder, "model.safetensors.index.json")):
        os.remove(index)                                                           # of an older, larger model: load would follow it
    for file, value in extra.items():
        write_json(os.path.join(folder, file), value)
    if tokenizer is not None:
        write_atomically(os.path.join(folder, "tokenizer.json"), lambda name: tokenizer.save(name))
    write_json(os.path.join(folder, "config.json"), described)                     # last: a folder with a config is complete


def load(path: str, device="cpu", dtype: torch.dtype | None = None, listing: list | None = None, later: list | None = None):
    """A model folder, or a model's name on the Hugging Face hub -> (model in eval mode, tokenizer or None).

    Understands our own layout, the published CuMo checkpoints, LLaVA-1.5, and Hugging Face's LLaMA, Mistral, Mixtral and Qwen2 decoders
    (a CuMo without senses: model(tokens) works), CLIP (a VisionTransformer) and Whisper's encoder (an AudioTransformer). config.json says
    which it is, never the folder's name.
    Weights stream tensor by tensor into their final place, in the dtype they are stored in unless one is given, so memory peaks little
    above the model's size. `listing` collects (their name, our name, shape, dtype) of each tensor. `later`: the model stays on meta, and
    the stream of its weights is appended to this list, for `put`: who shards the model first never holds the whole. Raises ValueError
    naming the file, key or tensor that is missing, left over, of the wrong shape, or not readable."""
    path = local_folder(os.fspath(path))
    cfg = read_json(os.path.join(path, "config.json"))
    own = not {"model_type", "architectures"} & cfg.keys()
    files, rename = weight_files(path, cfg, own), whisper if cfg.get("model_type") == "whisper" else str
    shapes = Shapes() if own else shapes_in(files, rename)
    try:
        config = config_of(path, cfg, shapes)
        with torch.device("meta"):
            model = CuMo(config) if isinstance(config, Config) else AudioTransformer(config) if isinstance(config, AudioConfig) else \
                VisionTransformer(Config(vision=config).vision)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:     # values of a wrong kind
        raise ValueError(f"{os.path.join(path, 'config.json')}: {e}") from None
    found = (item for file in files for item in tensors_in(file, rename=rename))
    names, prefix = None if own else translate, {CuMo: "", VisionTransformer: "vision.", AudioTransformer: "audio."}[type(model)]
    if later is not None:
        later.append(matched(model.state_dict(), found, path, names, listing, prefix))
    else:
        fill(model, found, path, names, device, dtype, listing, prefix)
    if isinstance(model, CuMo) and model.vision:
        model.connector.to(model.vision.patch.weight.dtype)                        # stored apart, they may differ
    file = os.path.join(path, "tokenizer.json")
    return model.eval(), read_tokenizer(file) if os.path.exists(file) else None


def local_folder(path: str) -> str:
    """The folder itself; a hub name ("shi-labs/CuMo-mistral-7b") is downloaded by huggingface_hub and cached."""
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(f"{path}: no model folder (no config.json in it); train one with `python train.py`, or check the path")
    from huggingface_hub import snapshot_download                                  # comes with tokenizers; needed here only
    try:
        folder = snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder = snapshot_download(path, allow_patterns=["*.json", "*.bin"])
        return folder
    except Exception as e:                                                         # no network, no such repository, no permission
        raise ValueError(f"{path}: no such folder here, and downloading it from the Hugging Face hub failed: "
                         f"{str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}") from None


def weight_files(path: str, cfg: dict, own: bool) -> list[str]:
    """The files that hold a folder's tensors: shards by the index, or one file; and, for CuMo's stage outputs and for LLaVA, which may keep
    the tower and the connector apart, those too."""
    files = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = os.path.join(path, name), os.path.join(path, name + ".index.json")
        if os.path.exists(index):
            try:
                files = [os.path.join(path, file) for file in sorted(set(read_json(index)["weight_map"].values()))]
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{index}: not an index of shards: {e!r}") from None
            for file in files:
                if not os.path.exists(file):
                    raise ValueError(f"{file}: missing; the index names it. Copy or download it again")
        elif os.path.exists(single):
            files = [single]
        if files:
            break
    if own or not kind_is_multimodal(cfg):
        if not files:
            raise ValueError(f"{os.path.join(path, 'model.safetensors')}: missing")
        return files
    names = shapes_in(files)
    if not any(name.startswith(TOWER) for name in names):
        tower = os.path.join(path, "clip.bin")
        if os.path.exists(tower):
            files.append(tower)
        else:
            tower = local_folder(cfg.get("mm_vision_tower") or cfg.get("mm_image_tower") or "(no mm_vision_tower in the config)")
            files += weight_files(tower, {}, False)
    if not any(name.startswith(PROJECTOR) for name in names) and os.path.exists(os.path.join(path, "mm_projector.bin")):
        files.append(os.path.join(path, "mm_projector.bin"))
    return files


def tensors_in(file: str, shapes_only: bool = False, rename=str):
    """Yield (name, tensor), or (name, shape), of a .safetensors or .bin file (a pickle: weights_only refuses one that runs code)."""
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as f:
                names = list(f.keys())
                if shapes_only:
                    yield from ((rename(name), tuple(f.get_slice(name).get_shape())) for name in names)
                    return
            for name in names:                                                     # opened anew for each tensor: the file is mapped, and
                with safe_open(file, framework="pt") as f:                         # pages that were read count as memory while it is open
                    tensor = f.get_tensor(name)
                yield rename(name), tensor
                del tensor
        else:
            state = torch.load(file, map_location="meta" if shapes_only else "cpu", weights_only=True,
                               mmap=shapes_only and zipfile.is_zipfile(file))      # a mapped page counts as memory
            if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
                raise ValueError("must hold a dictionary of tensors")
            for name in list(state):
                tensor = state.pop(name)
                yield rename(name), tuple(tensor.shape) if shapes_only else tensor
                del tensor
    except FileNotFoundError:
        raise ValueError(f"{file}: missing") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: damaged, or more than tensors, a pickle that would run code: refused. Convert it to safetensors where "
                         "you trust it") from None
    except Exception as e:                                                         # what damaged bytes lead to
        raise ValueError(f"{file}: cannot be read, truncated perhaps: {(str(e) or type(e).__name__).splitlines()[0]}") from None


class Shapes(dict):
    """{published name: shape}."""

    def __missing__(self, name):
        raise ValueError(f"tensor {name} is missing")


def shapes_in(files: list[str], rename=str) -> Shapes:
    """Of the files' tensors, read off their headers."""
    return Shapes({canonical(name): shape for file in files for name, shape in tensors_in(file, True, rename)})


def read_tokenizer(file: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as e:                                                         # tokenizers raises bare Exceptions
        raise ValueError(f"{file}: cannot be read as a tokenizer: {e}") from None
    tokenizer.no_truncation()                                                      # a file may say otherwise; data.py pads and cuts
    tokenizer.no_padding()
    return tokenizer


def fill(model: torch.nn.Module, tensors, where: str, names=None, device="cpu", dtype=None, listing: list | None = None, prefix: str = ""):
    """Put (name, tensor) pairs into the model: every parameter filled, every tensor used or ignored on purpose, or a ValueError that
    names it. `names` translates names as `translate` does; None: they are ours. prefix: where in a CuMo the module `model` stands."""
    wanted, state = model.state_dict(), {}
    for name, expert, tensor in matched(wanted, tensors, where, names, listing, prefix):
        name = name.removeprefix(prefix)
        if name not in state:
            state[name] = torch.empty(wanted[name].shape, dtype=dtype or tensor.dtype, device=device)
        (state[name] if expert is None else state[name][expert]).copy_(tensor)
        del tensor                                                                 # before the next one is read
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)


def matched(wanted: dict, tensors, where: str, names, listing: list | None, prefix: str):
    """Yield (our name in a CuMo, expert or None, tensor) for (name, tensor) pairs; `fill` says what is checked."""
    seen = set()
    for theirs, tensor in tqdm(tensors, desc=f"loading {os.path.basename(where)}", unit=" tensors", delay=2, leave=False, mininterval=0.5):
        to = (theirs, None) if names is None else names(theirs)
        if to is None or (to[0] == "text.head.weight" and to[0] not in wanted):    # left out on purpose; or tied to the embedding
            continue
        name, expert = (to[0] or "?").removeprefix(prefix), to[1]
        stacked = name.rsplit(".", 1)[0] + ".router" in wanted and not name.endswith(".router")
        if name not in wanted or (names and (expert is not None) != stacked) or (expert or 0) >= max(1, len(wanted[name])):
            raise ValueError(f"{where}: tensor {theirs} has no place in this model")
        shape = wanted[name].shape if expert is None else wanted[name].shape[1:]
        if tensor.shape != shape:
            raise ValueError(f"{where}: tensor {theirs} has shape {tuple(tensor.shape)}, the config asks for {tuple(shape)}")
        seen.add(theirs if names is None else canonical(theirs))
        if listing is not None:
            listing.append((theirs, prefix + name + ("" if expert is None else f"[{expert}]"), tuple(shape), tensor.dtype))
        yield prefix + name, expert, tensor
        del tensor                                                                 # before the next one is read
    expected = wanted if names is None else published({prefix + name: tensor for name, tensor in wanted.items()})
    for name in expected:
        if name not in seen:
            raise ValueError(f"{where}: tensor {name} is missing")


@torch.no_grad()
def put(param: torch.Tensor, expert: int | None, tensor: torch.Tensor):
    """Write a tensor into a parameter, or as much of it as this rank's shard holds (FSDP cuts as torch.chunk does). With `expert`, into
    that slice of stacked experts; a dense FFN's tensor that meets stacked experts, into all of them: upcycling."""
    source, here, first = tensor.expand(param.shape), param, 0                     # a view: nothing is copied yet
    if isinstance(param, DTensor):
        here, dim, mesh = param.to_local(), param.placements[0].dim, param.device_mesh
        start = min(param.shape[dim], -(-param.shape[dim] // mesh.size()) * mesh.get_local_rank())
        source, first = source.narrow(dim, start, here.shape[dim]), start if dim == 0 else 0
    if expert is None:
        here.copy_(source)
    elif first <= expert < first + len(here):
        here[expert - first].copy_(source[expert - first])


def assemble(vision: str, llm: str, connector: str | None = None, scales=(1,), template: str | None = None, seed: int = 0,
             dtype: torch.dtype | None = None, listing: list | None = None, later: list | None = None, audio: str | None = None):
    """A model that stage 1 can start from: the tower of one folder (or CuMo's clip.bin), the decoder of another, and a new connector, or
    the one in `connector` (CuMo's and LLaVA's mm_projector.bin); with `audio`, a folder of Whisper, also an ear and a new resampler.
    -> (CuMo in eval mode, the decoder's tokenizer or None)."""
    def part(source, name):                                                        # of what a folder holds, this part alone is wanted
        streams = None if later is None else []
        model, tokenizer = load(source, dtype=dtype, listing=listing, later=streams)
        if streams:
            later.append(item for item in streams[0] if item[0].startswith(name))
        return model, tokenizer
    if os.path.isfile(vision):
        config = Config(vision=vision_config({}, shapes_in([vision]))).vision
        with torch.device("meta"):
            tower = VisionTransformer(config)
        fill(tower, tensors_in(vision), vision, translate, dtype=dtype, listing=listing, prefix="vision.")
    else:
        tower = part(vision, "vision.")[0]
        tower = tower if isinstance(tower, VisionTransformer) else tower.vision
    if tower is None:
        raise ValueError(f"{vision}: has no vision tower; --vision wants a CLIP folder")
    decoder, tokenizer = part(llm, "text.")
    if not isinstance(decoder, CuMo):
        raise ValueError(f"{llm}: has no decoder; --llm wants a language model's folder")
    shapes = shapes_in([connector]) if connector else {}
    with torch.device("meta"):
        model = CuMo(Config(vision=dataclasses.replace(tower.config, scales=list(scales)), text=decoder.config.text,
                            connector=ConnectorConfig(n_experts=count(shapes, r"mm_projector\.experts\.(\d+)\.")),
                            template=template or decoder.config.template))
    model.vision, model.text = tower, decoder.text
    tower.config, decoder.text.config = model.config.vision, model.config.text
    if connector:
        try:
            fill(model.connector, tensors_in(connector), connector, translate, dtype=dtype or tower.patch.weight.dtype, listing=listing,
                 prefix="connector.")
        except ValueError as e:
            raise ValueError(f"{e}; the tower is {tower.config.dim} wide at {len(scales)} scale{'s' * (len(scales) > 1)}, the decoder "
                             f"{decoder.config.text.dim}") from None
    else:
        model.connector.to_empty(device="cpu").to(tower.patch.weight.dtype)
        torch.manual_seed(seed)
        model.init_weights(parts=("connector",))
    if audio:
        ear = part(audio, "audio.")[0]
        if not isinstance(ear, AudioTransformer):
            raise ValueError(f"{audio}: is no ear; --audio wants a Whisper folder")
        add_audio(model, ear, seed)
    return model.eval(), tokenizer


def add_audio(model: CuMo, audio: AudioTransformer, seed: int = 0) -> CuMo:
    """Give a model an ear, in place: this encoder (config.audio becomes its config), and a new resampler behind it."""
    if model.config.audio:
        raise ValueError("this model hears already")
    like = next(audio.parameters())
    config = dataclasses.replace(model.config, audio=dataclasses.replace(audio.config))            # checked as any other
    model.config.audio = audio.config = config.audio
    with torch.device("cpu" if like.is_meta else like.device):                     # an ear on meta gets its weights later, this has them
        resampler = Resampler(config.audio, config.text.dim).to(like.dtype)
    text = model.text
    del model.text                                                                 # comes last, as in a model that was born with ears
    model.audio, model.resampler, model.text = audio, resampler, text
    torch.manual_seed(seed)
    model.init_weights(parts=("resampler",))
    return model.train(model.training)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The tiny preset's pre-trained backbones: what CLIP, Mistral and Whisper are to the real presets. One file, the tokenizer in its
# header


def save_backbones(model: CuMo, file: str, tokenizer: Tokenizer):
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items() if not k.startswith(("connector.", "resampler."))}
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write_atomically(file, lambda name: save_file(state, name, metadata={
        "format": "pt", "tokenizer": tokenizer.to_str(), "config": json.dumps(model.config.to_dict())}))


def load_backbones(file: str):
    """-> (CuMo with pre-trained tower and decoder and a new connector, tokenizer)."""
    try:
        with safe_open(file, framework="pt") as f:
            tensors, meta = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    except (FileNotFoundError, SafetensorError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); make it again with `python assets/backbones.py`") from None
    if not meta or not {"config", "tokenizer"} <= meta.keys():
        raise ValueError(f"{file}: has no config and tokenizer in its header; make it again with `python assets/backbones.py`")
    model = CuMo(Config.from_dict(json.loads(meta["config"])))
    fill(model, ({k: v for k, v in model.state_dict().items() if k.startswith(("connector.", "resampler."))} | tensors).items(), file)
    return model, Tokenizer.from_str(meta["tokenizer"])


# ---------------------------------------------------------------------------------------------------------------------
# 6. `python upcycle.py`: put a model together, convert one, and see where each tensor goes


def print_listing(listing: list):
    """(their name, our name, shape, dtype) of each tensor, one line for all layers and experts that are alike."""
    groups = {}
    for theirs, ours, shape, dtype in listing:
        key = (pattern_of(theirs), re.sub(r"\[\d+\]", "[{e}]", pattern_of(ours)), shape, str(dtype).removeprefix("torch."))
        groups[key] = groups.get(key, 0) + 1
    width = max((len(theirs) for theirs, *_ in groups), default=0)
    for (theirs, ours, shape, dtype), n in groups.items():
        print(f"{theirs:{width}}  ->  {ours:36} {' x '.join(map(str, shape)):18} {dtype}" + (f"  ({n} of them)" if n > 1 else ""))


def main(argv=None):
    parser = argparse.ArgumentParser(description="""Weights in and out.

  python upcycle.py --vision CLIP_DIR --llm LLM_DIR --scales 1,3 --out DIR      tower + decoder + new connector: where stage 1 starts
  ... --vision CLIP_DIR --llm LLM_DIR --audio WHISPER_DIR --out DIR             ... + ear + new resampler: where Uni-MoE's starts
  python upcycle.py --experts DIR_A,DIR_B,DIR_C,DIR_D --out DIR                 decoders trained apart -> the experts of one
  python upcycle.py --from CUMO_DIR --out DIR                                   any layout that is understood -> this project's
  python upcycle.py --from DIR --to cumo --out DIR                              -> the published CuMo layout
  python upcycle.py --from DIR --to hf-llm --out DIR                            the decoder alone, for transformers (hf-clip: the tower)

A name on the Hugging Face hub can stand in a folder's place. Every tensor's two names are printed; one that is missing, left over or of
the wrong shape is an error.""", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", metavar="DIR", help="model to convert: " + SUPPORTED)
    parser.add_argument("--vision", metavar="DIR", help="take the tower from this folder (CLIP), or from CuMo's clip.bin")
    parser.add_argument("--llm", metavar="DIR", help="take the decoder and the tokenizer from this folder")
    parser.add_argument("--audio", metavar="DIR", help="take an ear from this folder (Whisper)")
    parser.add_argument("--experts", metavar="DIRS", help="models, with commas: their decoders' FFNs become experts; the rest: the first's")
    parser.add_argument("--average", action="store_true", help="of --experts: all else is the mean over them")
    parser.add_argument("--every-other", action="store_true", help="of --experts: in layers 0, 2, 4... only; the others stay dense")
    parser.add_argument("--connector", metavar="FILE", help="take the connector from this mm_projector.bin; default: a new one")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not hold a model yet")
    parser.add_argument("--to", choices=LAYOUTS, default="own", help="layout to write (default: own)")
    parser.add_argument("--scales", default="1", help="S2 scales of a model put together, for example 1,3 (CuMo; default: 1)")
    parser.add_argument("--template", help="chat template: mistral, vicuna, openchat, plain or tiny; default: by the decoder's architecture")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, for folders that have only the older tokenizer.model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="store weights so; default: as they are")
    parser.add_argument("--seed", type=int, default=0, help="of a new connector, resampler or routers (default: 0)")
    args = parser.parse_args(argv)
    if bool(args.source) + bool(args.vision and args.llm) + bool(args.experts) != 1:
        raise ValueError("give either --from DIR, or --vision DIR and --llm DIR, or --experts DIRS")
    if (args.audio and not args.vision) or ((args.average or args.every_other) and not args.experts):
        raise ValueError("--audio goes with --vision and --llm; --average and --every-other go with --experts")
    if os.path.exists(os.path.join(args.out, "config.json")):
        raise ValueError(f"{args.out} holds a model already: choose another --out")
    try:
        scales = [int(s) for s in args.scales.split(",")]
    except ValueError:
        raise ValueError(f"--scales {args.scales}: whole numbers with commas, for example 1,3") from None
    listing, dtype = [], getattr(torch, args.dtype) if args.dtype else None
    if args.source or args.experts:
        folders = args.experts.split(",") if args.experts else [args.source]
        model, tokenizer = load(folders[0], dtype=dtype, listing=listing)
        if args.experts:
            if not isinstance(model, CuMo):
                raise ValueError(f"{folders[0]}: an encoder alone; experts come from models with a decoder")
            where = "every_other" if args.every_other else "all"
            counts = expert_counts(model.config.text.n_layers, where, str(len(folders)))
            upcycle(model, text=counts, seed=args.seed, experts=folders, average=args.average)
        if args.template:
            model.config.template = args.template
    else:
        model, tokenizer = assemble(args.vision, args.llm, args.connector, scales, args.template, args.seed, dtype, listing,
                                    audio=args.audio)
    print_listing(listing)
    if args.tokenizer:
        tokenizer = read_tokenizer(args.tokenizer)
    if isinstance(model, AudioTransformer) or (isinstance(model, VisionTransformer) and args.to == "own"):
        raise ValueError(f"{args.source}: an encoder alone; put a tower together with a decoder: --vision DIR --llm DIR")
    save(model, args.out, tokenizer, layout=args.to)
    print(f"wrote {args.out} ({args.to}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M parameters)" + (
        "" if tokenizer or args.to == "hf-clip" else ". No tokenizer.json was found: give one with --tokenizer, or nothing can be trained or asked"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"upcycle.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
