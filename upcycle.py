"""upcycle.py: weights in and out, and dense -> mixture of experts.

Sparse upcycling (arXiv 2212.05055) does not train experts from scratch: every expert starts as a copy of the trained dense FFN,
and only the router is new. Since the chosen experts' weights sum to 1, the upcycled block computes at first exactly what the dense
one did, so training goes on where it was and the experts grow apart from there. CuMo's "co-upcycling" does this in the vision
tower and in the connector at once, between its second and third stage.

A model folder holds config.json, model.safetensors (in shards with an index above 5 GB) and tokenizer.json.
"""
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model import FFN, Config, CuMo, MoE

SHARD_BYTES = 5 * 10**9

# ---------------------------------------------------------------------------------------------------------------------
# 1. Dense -> experts


def upcycle(model: CuMo, vision=0, connector=0, text=0, top_k: int = 2, seed: int = 0) -> CuMo:
    """Turn dense FFNs into MoEs, in place: every expert a copy, the router Normal(0, 0.02).

    vision, connector, text: the number of experts, for all layers or (vision, text) a list with one number a layer; 0 leaves a
    layer as it is. CuMo's stage 3 is upcycle(model, vision=4, connector=4); MoE-LLaVA's is upcycle(model, text=[4, 0] * 16).
    Raises ValueError for a bad count, and where a layer already has experts. Asserts that the output has not changed."""
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
        owner.ffn = experts_from(owner.ffn, n_experts, top_k, generator, getattr(part, "capacity_factor", None))
        part.top_k = top_k
        if isinstance(part.n_experts, list):
            part.n_experts[layer] = n_experts
        else:
            part.n_experts = n_experts
    return model


@torch.no_grad()
def experts_from(dense: FFN, n_experts: int, top_k: int, generator: torch.Generator, capacity_factor=None) -> MoE:
    """One dense FFN -> a MoE of n_experts copies of it, on the same device and in the same dtype."""
    (ffn_dim, dim), like = dense.w_in.shape, dense.w_in
    with torch.device("meta"):
        moe = MoE(dim, ffn_dim, dense.act, n_experts, top_k, len(dense.w_out), dense.w_gate is not None, dense.b_in is not None,
                  capacity_factor)
    state = {name: w.detach().unsqueeze(0).repeat(n_experts, *[1] * w.dim()) for name, w in dense.named_parameters()}
    router = torch.randn(n_experts, dim, generator=generator) * 0.02
    state["router"] = router.to(like.device if not like.is_meta else "meta", like.dtype)
    moe.load_state_dict(state, assign=True)
    moe.requires_grad_(True)
    if not like.is_meta and capacity_factor is None:
        x = torch.randn(16, dim, generator=generator).to(like.device, like.dtype)
        before, after = dense(x)[0].float(), moe(x)[0].float()
        tolerance = 8 * torch.finfo(like.dtype).eps * before.abs().max().clamp(min=1e-3)    # weights sum to 1 but for rounding
        assert (before - after).abs().max() <= tolerance, f"upcycling changed the output by {(before - after).abs().max()}"
    return moe


# ---------------------------------------------------------------------------------------------------------------------
# 2. Our own folder


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


def save(model: CuMo, folder: str, tokenizer: Tokenizer | None = None, state: dict | None = None):
    """Write a model folder. `state` replaces model.state_dict() where the weights are gathered elsewhere (FSDP)."""
    os.makedirs(folder, exist_ok=True)
    state = {k: v.detach().contiguous() for k, v in (model.state_dict() if state is None else state).items()}
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
        write_json(os.path.join(folder, "model.safetensors.index.json"),
                   {"metadata": {"total_size": sum(t.nbytes for t in state.values())},
                    "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}})
    elif os.path.exists(index := os.path.join(folder, "model.safetensors.index.json")):
        os.remove(index)                                                           # of an older, larger model: load would follow it
    if tokenizer is not None:
        write_atomically(os.path.join(folder, "tokenizer.json"), lambda name: tokenizer.save(name))
    write_json(os.path.join(folder, "config.json"), model.config.to_dict())        # last: a folder with a config is complete


def load(path: str, device="cpu", dtype: torch.dtype | None = None):
    """A model folder -> (model in eval mode, tokenizer or None).

    Weights keep their stored dtype unless one is given. Raises ValueError naming the file, key or tensor that is missing, left
    over, of the wrong shape, or not readable."""
    config = read_config(path)
    with torch.device("meta"):
        model = CuMo(config)
    fill(model, read_tensors(path, device, dtype), path)
    file = os.path.join(path, "tokenizer.json")
    return model.eval(), read_tokenizer(file) if os.path.exists(file) else None


def read_config(path: str) -> Config:
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        raise ValueError(f"{path}: no model folder (no config.json in it); train one with `python train.py`, or check the path")
    with open(file, encoding="utf-8") as f:
        try:
            return Config.from_dict(json.load(f))
        except (ValueError, TypeError) as e:                                       # malformed JSON is a ValueError too
            raise ValueError(f"{file}: {e}") from None


def read_tokenizer(file: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(file)
    except Exception as e:                                                         # tokenizers raises bare Exceptions
        raise ValueError(f"{file}: cannot be read as a tokenizer: {e}") from None


def read_tensors(path: str, device="cpu", dtype=None) -> dict:
    """All tensors of a folder's safetensors files, by name."""
    index = os.path.join(path, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            try:
                files = sorted(set(json.load(f)["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{index}: not an index of shards: {e!r}") from None
    tensors = {}
    for file in files:
        file = os.path.join(path, file)
        try:
            with safe_open(file, framework="pt", device=str(device)) as f:
                for name in f.keys():
                    tensors[name] = f.get_tensor(name) if dtype is None else f.get_tensor(name).to(dtype)
        except FileNotFoundError:
            raise ValueError(f"{file}: missing") from None
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file}: cannot be read, truncated perhaps: {e}") from None
    return tensors


def fill(model: torch.nn.Module, tensors: dict, where: str):
    """Put tensors into the model: every parameter filled, every tensor used, or a ValueError that names it."""
    wanted = model.state_dict()
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"{where}: tensor {name} is missing")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise ValueError(f"{where}: tensor {name} has no place in this model")
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{where}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for {tuple(wanted[name].shape)}")
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The tiny preset's pre-trained backbones: what CLIP and Mistral are to the real presets. One file, the tokenizer in its header


def save_backbones(model: CuMo, file: str, tokenizer: Tokenizer):
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items() if not k.startswith("connector.")}
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    write_atomically(file, lambda name: save_file(state, name, metadata={
        "format": "pt", "tokenizer": tokenizer.to_str(), "config": json.dumps(model.config.to_dict())}))


def load_backbones(file: str):
    """-> (CuMo with pre-trained tower and decoder and a new connector, tokenizer)."""
    try:
        with safe_open(file, framework="pt") as f:
            tensors, meta = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    except (FileNotFoundError, SafetensorError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); make it again with `python train.py --from-scratch`") from None
    if not meta or not {"config", "tokenizer"} <= meta.keys():
        raise ValueError(f"{file}: has no config and tokenizer in its header; make it again with `python train.py --from-scratch`")
    model = CuMo(Config.from_dict(json.loads(meta["config"])))
    fill(model, {**{k: v for k, v in model.state_dict().items() if k.startswith("connector.")}, **tensors}, file)
    return model, Tokenizer.from_str(meta["tokenizer"])
