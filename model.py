"""model.py: the whole architecture. Senses, a bridge from each to the decoder's width, a LLaMA-style decoder, each dense or with experts.

    pixels ──► VisionTransformer ──► Connector ──┐
    mel    ──► AudioTransformer ───► Resampler ──┼──► token embeddings ──► Decoder ──► logits
    text   ──► embedding ────────────────────────┘

CuMo (arXiv 2405.05949) is LLaVA with the FFNs of the vision tower and of the connector turned into mixtures of experts. So there
is one block, attention + feed-forward, used by tower and decoder alike, and its feed-forward is an `FFN` or a `MoE`. The number
of experts in a config, layer by layer, is the only switch: 0 is dense. MoE-LLaVA has its experts in the decoder; so has Uni-MoE
(arXiv 2405.11273), which also hears.

A batch of conversations is one tensor: tokens (B, T). Ids >= 0 are text, IMAGE and AUDIO mark the slots that features take, PAD
fills the right-hand end. Features are written over the slots in one piece: no loop over samples, static shapes.

Shapes: B batch, T tokens in a sequence, N tokens of an image (with or without CLS), D width, F FFN width, E experts, K top-k,
H heads, V vocabulary, n images, S image side, m chunks of sound, Q queries. `python model.py` prints each preset's parameter counts.
"""
import copy
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from kernels import ACTIVATIONS, FFN, MoE, feed_forward

IMAGE, AUDIO, PAD, IGNORE = -200, -201, -1, -100     # slots for features, padding, label that is not learnt (also in data.py)

# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration: a few parts, plain numbers


@dataclass
class VisionConfig:
    image_size: int = 336           # S, pixels
    patch_size: int = 14
    dim: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    ffn_dim: int = 4096
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    select_layer: int = -2          # which hidden state are the features: -2 is the input of the last layer (LLaVA's choice)
    scales: list = field(default_factory=lambda: [1])    # S2 (arXiv 2403.13043): [1, 3] also reads the image 3x enlarged, in 9 crops
    n_experts: list | int = 0       # per layer; 0 is dense. One number is repeated for all layers
    top_k: int = 2

    @property
    def n_used_layers(self) -> int:
        """Layers that the features pass through: -1 all, -2 all but the last."""
        return self.n_layers + 1 + self.select_layer


@dataclass
class ConnectorConfig:
    act: str = "gelu"
    n_experts: int = 0
    top_k: int = 2


@dataclass
class TextConfig:
    vocab_size: int = 32000
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8             # grouped-query attention: several query heads share a key/value head
    head_dim: int | None = None     # default dim / n_heads
    ffn_dim: int = 14336
    act: str = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: dict | None = None           # Llama 3.1's stretch of the long wavelengths, see rope_table
    sliding_window: int | None = None
    qkv_bias: bool = False                     # Qwen2
    tie_embeddings: bool = False
    n_experts: list | int = 0
    top_k: int = 2
    capacity_factor: float | None = None       # in training; None: nothing is dropped
    eval_capacity_factor: float | None = None  # outside training (MoE-LLaVA: 1.5 and 2.0)
    min_capacity: int = 0                      # slots that every expert has at least
    noisy: bool = False                        # DeepSpeed's Gumbel noise on the second choice, in training only
    aux: str = "mean"               # auxiliary losses over the layers: "mean" (CuMo-Mixtral) or "sum" (MoE-LLaVA)

    @property
    def expert_limits(self) -> dict:
        """What a MoE of the decoder is told beside its sizes: kernels.MoE's last arguments."""
        names = ("capacity_factor", "eval_capacity_factor", "min_capacity", "noisy")
        return {name: getattr(self, name) for name in names}


@dataclass
class AudioConfig:
    """Whisper's encoder (large-v2's sizes), and the resampler behind it."""
    n_mels: int = 80
    n_frames: int = 3000            # mel frames of a 30 s chunk, 10 ms each; the second convolution halves them
    dim: int = 1280
    n_layers: int = 32
    n_heads: int = 20
    ffn_dim: int = 5120
    act: str = "gelu"
    norm_eps: float = 1e-5
    n_experts: list | int = 0       # always 0 here; VisionBlock asks
    top_k: int = 2
    n_queries: int = 50             # Q: AUDIO slots of a chunk
    n_query_layers: int = 2

    def __post_init__(self):
        self.n_experts = [0] * self.n_layers if isinstance(self.n_layers, int) else []


@dataclass
class Config:
    vision: VisionConfig | None = field(default_factory=VisionConfig)          # None: a language model alone
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    audio: AudioConfig | None = None                                           # None: the model hears nothing
    template: str = "mistral"       # chat template, see data.py
    frames_apart: bool = False      # a video's frames as so many images; else as one, with their mean features (Uni-MoE)
    balance_coef: float = 0.1       # CuMo, section 4.1
    z_coef: float = 0.01

    def __post_init__(self):
        for name, kind in (("vision", VisionConfig), ("connector", ConnectorConfig), ("text", TextConfig), ("audio", AudioConfig)):
            if isinstance(getattr(self, name), dict):
                setattr(self, name, _from_dict(kind, getattr(self, name), f"{name}."))
            part = getattr(self, name)
            if not isinstance(part, kind) and not (name in ("vision", "audio") and part is None):
                raise ValueError(f"{name} must be an object with {kind.__name__}'s fields, not {part!r}")
            for key in ("image_size", "patch_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size",
                        "n_mels", "n_frames", "n_queries", "n_query_layers"):
                if part is not None and hasattr(part, key) and not (isinstance(getattr(part, key), int) and getattr(part, key) > 0):
                    raise ValueError(f"{name}.{key} = {getattr(part, key)!r} must be a whole number above 0")
        for name in ("vision", "text", "audio"):
            part = getattr(self, name)
            if part is None:
                continue
            if isinstance(part.n_experts, int):
                part.n_experts = [part.n_experts] * part.n_layers
            if len(part.n_experts) != part.n_layers:
                raise ValueError(f"{name}.n_experts lists {len(part.n_experts)} layers, {name}.n_layers is {part.n_layers}")
            if part.dim % part.n_heads:
                raise ValueError(f"{name}.dim = {part.dim} is not a multiple of {name}.n_heads = {part.n_heads}")
        for name in ("vision", "connector", "text", "audio"):
            part = getattr(self, name)
            if part is None:
                continue
            for e in [part.n_experts] if isinstance(part.n_experts, int) else part.n_experts:
                if e < 0 or (e and not 1 <= part.top_k <= e):
                    raise ValueError(f"{name}: top_k = {part.top_k} of n_experts = {e}; need 1 <= top_k <= n_experts, or 0 experts")
            if part.act not in ACTIVATIONS:
                raise ValueError(f"{name}.act = {part.act!r}; known: {', '.join(ACTIVATIONS)}")
        if v := self.vision:
            if v.image_size % v.patch_size:
                raise ValueError(f"vision.image_size = {v.image_size} is not a multiple of vision.patch_size = {v.patch_size}")
            if not -v.n_layers - 1 <= v.select_layer <= -1:
                raise ValueError(f"vision.select_layer = {v.select_layer} must lie between {-v.n_layers - 1} and -1")
            if not v.scales or v.scales[0] != 1 or any(not isinstance(s, int) or s < 1 for s in v.scales):
                raise ValueError(f"vision.scales = {v.scales} must be whole numbers that begin with 1, for example [1, 3]")
        for key in ("n_frames", "dim"):                                            # halved by a convolution; half sines, half cosines
            if self.audio and getattr(self.audio, key) % 2:
                raise ValueError(f"audio.{key} = {getattr(self.audio, key)} must be even")
        t = self.text
        t.head_dim = t.head_dim or t.dim // t.n_heads
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(t, name) is not None and not getattr(t, name) > 0:
                raise ValueError(f"text.{name} = {getattr(t, name)} must be positive, or null to drop nothing")
        if t.n_heads % t.n_kv_heads:
            raise ValueError(f"text.n_heads = {t.n_heads} is not a multiple of text.n_kv_heads = {t.n_kv_heads}")
        if t.aux not in ("mean", "sum"):
            raise ValueError(f"text.aux = {t.aux!r}; known: mean, sum")
        if t.rope_scaling is not None and (missing := ROPE_SCALING - t.rope_scaling.keys()):
            raise ValueError(f"text.rope_scaling lacks {', '.join(sorted(missing))}")

    @classmethod
    def from_dict(cls, d: dict) -> "Config":
        """From config.json. Raises ValueError naming an unknown key."""
        return _from_dict(cls, d)

    @classmethod
    def from_preset(cls, name: str) -> "Config":
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict(copy.deepcopy(PRESETS[name]))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def n_image_tokens(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2 if self.vision else 0

    @property
    def n_audio_tokens(self) -> int:
        """Of a chunk."""
        return self.audio.n_queries if self.audio else 0


ROPE_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _from_dict(kind, d: dict, where: str = ""):
    known = [f.name for f in dataclasses.fields(kind)]
    for key in d:
        if key not in known:
            raise ValueError(f"unknown config key {where + key!r}; known: {', '.join(known)}")
    return kind(**d)


LLAMA_7B = dict(n_kv_heads=32, ffn_dim=11008, rope_theta=1e4)                      # the rest as in Mistral-7B, TextConfig's defaults
PRESETS = {
    # Trains on a laptop CPU in minutes: 48 x 48 pixels, 36 patches of 8 x 8.
    "tiny": dict(
        vision=dict(image_size=48, patch_size=8, dim=128, n_layers=4, n_heads=4, ffn_dim=512, scales=[1]),
        text=dict(vocab_size=512, dim=128, n_layers=5, n_heads=4, n_kv_heads=2, ffn_dim=384, rope_theta=1e4),
        template="tiny"),
    # CuMo, Table 1: CLIP ViT-L/14-336 with S2 scales 1 and 3, and Mistral-7B-Instruct-v0.2 (no sliding window since v0.2).
    # These are stage 3's shapes; train.py begins stages 1 and 2 with the experts taken out.
    "cumo-mistral-7b": dict(
        vision=dict(scales=[1, 3], n_experts=4), connector=dict(n_experts=4), text=dict()),
    "cumo-mixtral-8x7b": dict(
        vision=dict(scales=[1, 3], n_experts=4), connector=dict(n_experts=4), text=dict(n_experts=8)),
    # The same around a decoder of TinyLlama-1.1B's shape (arXiv 2401.02385): what one GPU can train.
    "cumo-1b": dict(
        vision=dict(scales=[1, 3], n_experts=4), connector=dict(n_experts=4), template="vicuna",
        text=dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632, rope_theta=1e4)),
    # MoE-LLaVA (arXiv 2401.15947) on OpenChat-7B, a Mistral: experts in every other layer of the decoder, a LLaVA-1.5 all else.
    "moe-llava-mistral-7b": dict(
        vision=dict(), text=dict(rope_theta=1e4, sliding_window=4096, n_experts=[4, 0] * 16, capacity_factor=1.5, eval_capacity_factor=2.0,
                                 aux="sum"), template="openchat", balance_coef=0.01, z_coef=0.0),
    # Uni-MoE: LLaMA-7B with one expert per modality or task in every layer, and no auxiliary loss. The paper hears speech with Whisper
    # and other sounds with BEATs (arXiv 2212.09058); here one Whisper hears everything.
    "uni-moe-7b": dict(vision=dict(), audio=dict(), text=dict(**LLAMA_7B, n_experts=4), template="vicuna", balance_coef=0.0, z_coef=0.0),
    "uni-moe-7b-every-other": dict(
        vision=dict(), audio=dict(), text=dict(**LLAMA_7B, n_experts=[4, 0] * 16), template="vicuna", balance_coef=0.0, z_coef=0.0),
}
PRESETS["uni-moe-tiny"] = dict(                                                    # tiny, and an ear for 1.5 s
    vision=PRESETS["tiny"]["vision"], text=dict(**PRESETS["tiny"]["text"], n_experts=4), template="tiny", balance_coef=0.0, z_coef=0.0,
    audio=dict(n_mels=80, n_frames=150, dim=128, n_layers=3, n_heads=4, ffn_dim=512, n_queries=16, n_query_layers=2))

# ---------------------------------------------------------------------------------------------------------------------
# 2. The senses: CLIP's ViT and Whisper's encoder, the connector and the resampler


class VisionBlock(nn.Module):
    """Pre-norm block, bidirectional attention, biases everywhere (CLIP), or everywhere but in the keys (Whisper)."""

    def __init__(self, c, layer: int, k_bias: bool = True):
        super().__init__()
        self.n_heads = c.n_heads
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps), nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim, bias=b) for b in (True, k_bias, True, True))
        self.ffn = feed_forward(c.dim, c.ffn_dim, c.act, c.n_experts[layer], c.top_k, bias=True)

    def forward(self, x: Tensor):
        """x (n, N, D) -> the same, and the Routing or None."""
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))   # (n, H, N, D/H)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h, r = self.ffn(self.norm2(x))
        return x + h, r


class VisionTransformer(nn.Module):
    """Images (n, 3, S, S) -> patch features of the select layer (n, N, D * len(scales)), N = (S / patch)^2, CLS dropped."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        n = (c.image_size // c.patch_size) ** 2
        self.patch = nn.Conv2d(3, c.dim, c.patch_size, stride=c.patch_size, bias=False)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.pos = nn.Parameter(torch.empty(n + 1, c.dim))
        self.pre_norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.layers = nn.ModuleList(VisionBlock(c, i) for i in range(c.n_layers))
        self.checkpointing = False

    def encode(self, images: Tensor, aux: list | None = None, both: bool = False):
        """One pass at base size: images (n, 3, S, S) -> hidden state of the select layer (n, 1 + N, D); CLS first.

        `aux` collects a Routing for every MoE layer. Layers behind the select layer do not touch the features; but the released
        CuMo counts their routers in the auxiliary losses, so they run when somebody collects. both=True gives (last hidden state,
        selected one), for contrastive training."""
        x = self.patch(images).flatten(2).transpose(1, 2)                          # (n, N, D)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.pos.to(x.dtype)
        x = self.pre_norm(x)
        n_used = self.config.n_used_layers
        for i, layer in enumerate(self.layers):
            if i == n_used:
                selected = x
                if not both and not (aux is not None and any(isinstance(b.ffn, MoE) for b in self.layers[i:])):
                    return selected
            x, r = checkpoint(layer, x, use_reentrant=False) if self.checkpointing and self.training else layer(x)
            if aux is not None and r is not None:
                aux.append(r)
        if n_used == self.config.n_layers:
            selected = x
        return (x, selected) if both else selected

    def forward(self, images: Tensor, aux: list | None = None) -> Tensor:
        """images (n, 3, S, S) float, normalised (data.load_image) -> features (n, N, D * len(scales)).

        S2: a scale s > 1 enlarges the image s-fold, cuts it into s x s crops of size S that are encoded each for itself, lays the
        crops' feature maps side by side, and averages them back onto the base grid. Scales are concatenated channel-wise."""
        side, features = self.config.image_size // self.config.patch_size, []
        if images.shape[1:] != (3, self.config.image_size, self.config.image_size):
            size = self.config.image_size
            raise ValueError(f"images are {tuple(images.shape)}, the tower reads (n, 3, {size}, {size})")
        images = images.to(self.patch.weight.dtype)
        for s in self.config.scales:
            if s == 1:
                features.append(self.encode(images, aux)[:, 1:])                   # (n, N, D)
                continue
            n, size = len(images), self.config.image_size
            big = F.interpolate(images.float(), scale_factor=s, mode="bicubic").to(images.dtype)     # (n, 3, s S, s S)
            crops = big.view(n, 3, s, size, s, size).permute(0, 2, 4, 1, 3, 5).reshape(n * s * s, 3, size, size)
            f = self.encode(crops, aux)[:, 1:]                                     # (n s s, N, D)
            f = f.view(n, s, s, side, side, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, s * side, s * side)
            f = F.interpolate(f.float(), size=(side, side), mode="area").to(f.dtype)
            features.append(f.flatten(2).transpose(1, 2))                          # (n, N, D)
        return torch.cat(features, -1)


def sinusoids(length: int, dim: int, device=None) -> Tensor:
    """Whisper's positions (length, dim): sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi."""
    freq = 1e4 ** -torch.linspace(0, 1, dim // 2, device=device)
    angle = torch.arange(length, device=device).unsqueeze(1) * freq
    return torch.cat([angle.sin(), angle.cos()], 1)


class AudioTransformer(nn.Module):
    """Whisper's encoder: log-mel (m, 80, 3000), a 30 s chunk each, -> hidden states (m, 1500, D)."""

    def __init__(self, c: AudioConfig):
        super().__init__()
        self.config = c
        self.conv1, self.conv2 = nn.Conv1d(c.n_mels, c.dim, 3, padding=1), nn.Conv1d(c.dim, c.dim, 3, stride=2, padding=1)
        self.pos = nn.Parameter(torch.empty(c.n_frames // 2, c.dim))               # sinusoids, stored as weights
        self.layers = nn.ModuleList(VisionBlock(c, i, k_bias=False) for i in range(c.n_layers))
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.checkpointing = False

    def forward(self, mel: Tensor) -> Tensor:
        if mel.shape[1:] != (self.config.n_mels, self.config.n_frames):
            raise ValueError(f"mel is {tuple(mel.shape)}, the encoder hears (n, {self.config.n_mels}, {self.config.n_frames})")
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))))        # (m, D, n_frames / 2)
        x = x.transpose(1, 2) + self.pos
        for layer in self.layers:
            x, _ = checkpoint(layer, x, use_reentrant=False) if self.checkpointing and self.training else layer(x)
        return self.norm(x)


class ResamplerBlock(nn.Module):
    """Pre-norm block in which Q queries look at N hidden states and at each other; then a feed-forward."""

    def __init__(self, c: AudioConfig):
        super().__init__()
        self.n_heads = c.n_heads
        self.norm1, self.norm2, self.norm_heard = (nn.LayerNorm(c.dim, eps=c.norm_eps) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim, bias=b) for b in (True, False, True, True))     # as Whisper's
        self.ffn = FFN(c.dim, c.ffn_dim, c.act, bias=True)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        """x (m, Q, D), heard (m, N, D) -> (m, Q, D)."""
        h = self.norm1(x)
        seen = torch.cat([self.norm_heard(heard), h], 1)                           # (m, N + Q, D)
        q, k, v = (w(t).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w, t in ((self.q, h), (self.k, seen), (self.v, seen)))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))[0]


class Resampler(nn.Module):
    """Hidden states of sound (m, N, D_a) -> decoder width (m, Q, D): learnt queries ask, and their few answers stand for the many states.

    A chunk of 30 s has 1500 states, which would fill the decoder's context; 50 queries make 50 tokens of them. Uni-MoE does so with
    Q-Formers (BLIP-2, arXiv 2301.12597): self-attention among the queries, then cross-attention, starting from BERT's weights, or from
    the Whisper decoder's for speech; then a linear layer. Here the two attentions are one, over states and queries together, as in
    Flamingo's Perceiver resampler (arXiv 2204.14198): half the weights, the same sight, and nothing to download."""

    def __init__(self, c: AudioConfig, dim_out: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(c.n_queries, c.dim))
        self.layers = nn.ModuleList(ResamplerBlock(c) for _ in range(c.n_query_layers))
        self.norm, self.out = nn.LayerNorm(c.dim, eps=c.norm_eps), nn.Linear(c.dim, dim_out)

    def forward(self, heard: Tensor) -> Tensor:
        x = self.queries.to(heard.dtype).expand(len(heard), -1, -1)
        for layer in self.layers:
            x = layer(x, heard)
        return self.out(self.norm(x))


class Connector(nn.Module):
    """Vision features (n, N, D_v) -> decoder width (n, N, D): LLaVA-1.5's two-layer MLP, or experts of that shape."""

    def __init__(self, c: ConnectorConfig, dim_in: int, dim_out: int):
        super().__init__()
        self.ffn = feed_forward(dim_in, dim_out, c.act, c.n_experts, c.top_k, dim_out=dim_out, bias=True)

    def forward(self, x: Tensor, aux: list | None = None) -> Tensor:
        y, r = self.ffn(x)
        if aux is not None and r is not None:
            aux.append(r)
        return y


# ---------------------------------------------------------------------------------------------------------------------
# 3. Decoder: LLaMA / Mistral / Mixtral


def rope_table(positions: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, T, head_dim) float32 for rotary embeddings, in the half-split layout of Hugging Face's LLaMA.

    scaling: Llama 3.1's way to longer contexts. Pairs that turn often within the old context (short wavelengths: they tell
    neighbours apart) stay; those that turn less than once or so are slowed by `factor`; in between the two are mixed."""
    freq = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    if scaling is not None:
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)         # in the old context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / scaling["factor"])
    angle = positions.float().unsqueeze(-1) * freq                                 # (B, T, head_dim / 2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, d): each pair (x_i, x_{i + d/2}) turned by its position's angle, so q.k depends on the distance only."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    return x * cos + torch.cat([-b, a], -1) * sin


class Cache:
    """Keys and values, at fixed size: k[layer] and v[layer] are (B, H_kv, T_max, head_dim). One tensor a layer: torch.compile would
    copy all of a larger one in order to write to a part of it."""

    def __init__(self, c: TextConfig, batch: int, length: int, device, dtype):
        self.k, self.v = ([torch.zeros(batch, c.n_kv_heads, length, c.head_dim, device=device, dtype=dtype) for _ in range(c.n_layers)]
                          for _ in "kv")

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, n_keys: int):
        """k, v (B, H_kv, T, d) to positions (B or 1, T) of their rows; returns the first n_keys of the layer's keys and values."""
        rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer][:, :, :n_keys], self.v[layer][:, :, :n_keys]


class DecoderBlock(nn.Module):
    def __init__(self, c: TextConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, eps=c.norm_eps), nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.q = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.ffn = feed_forward(c.dim, c.ffn_dim, c.act, c.n_experts[layer], c.top_k, gated=True,
                                **c.expert_limits)

    def forward(self, x, rope, real, attend=None, cache=None, positions=None):
        """x (B, T, D), rope (cos, sin), real (B, T) False at PAD, attend None (causal) or (B or 1, 1, T, keys) bool."""
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.q, self.k, self.v))   # (B, H, T, d)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.write(self.layer, positions, k, v, x.shape[1] if attend is None else attend.shape[-1])
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None, enable_gqa=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h, r = self.ffn(self.norm2(x).flatten(0, 1), real.flatten())               # one row of B*T tokens: batch-wide statistics
        return x + h.view_as(x), r


class Decoder(nn.Module):
    """Token embeddings (B, T, D) -> logits (B, T, V)."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(DecoderBlock(c, i) for i in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.head = None if c.tie_embeddings else nn.Linear(c.dim, c.vocab_size, bias=False)
        self.checkpointing = False

    def apply_expert_limits(self):
        """Tell every MoE the config's capacities. Call it after a change of these in the config."""
        for layer in self.layers:
            if isinstance(layer.ffn, MoE):
                for name, value in self.config.expert_limits.items():
                    setattr(layer.ffn, name, value)

    def forward(self, x, real, aux=None, cache=None, positions=None, n_keys=None):
        """x (B, T, D), real (B, T) bool. With a cache, x is written to it before attending: from position 0 on, or to positions (B, T),
        each row's own, all below n_keys (default: the cache's length). What lies behind n_keys costs nothing.

        Why padding needs no attention mask: it lies to the right of every real token, and causal attention never looks right."""
        window, attend, anywhere = self.config.sliding_window, None, positions is not None
        if not anywhere:
            positions, n_keys = torch.arange(x.shape[1], device=x.device).unsqueeze(0), x.shape[1]     # (1, T)
        n_keys = n_keys or cache.k[0].shape[2]
        if anywhere or (window is not None and window < n_keys):
            keys = torch.arange(n_keys, device=x.device)
            ago = positions.unsqueeze(-1) - keys                                   # (B, T, keys) how far back a key lies
            attend = ((ago >= 0) & (ago < (window or n_keys))).unsqueeze(1)        # (B, 1, T, keys)
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for layer in self.layers:
            if self.checkpointing and self.training and cache is None:
                x, r = checkpoint(layer, x, rope, real, attend, use_reentrant=False)
            else:
                x, r = layer(x, rope, real, attend, cache, positions)
            if aux is not None and r is not None:
                aux.append(r)
        return F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The whole


class Output(NamedTuple):
    logits: Tensor                  # (B, T, V)
    loss: Tensor | None             # parts["lm"] + balance_coef * sum of balance + z_coef * sum of z; None without labels
    parts: dict                     # "lm", "vision/balance", "vision/z", "connector/balance", ...: raw scalars
    image_embeds: Tensor | None     # (n, N, D) what the connector gave
    routing: dict                   # part -> list of Routing: one a layer (vision: for each scale in turn)


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) -> the mean over the labels that are learnt, a float32 scalar.

    The logits at t speak of the token at t + 1. The labels are shifted, not the logits: these are large, and a slice is a copy."""
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()                  # (B * T,)
    total = F.cross_entropy(logits.flatten(0, 1).float(), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


class CuMo(nn.Module):
    """The multimodal model. Built on the current default device: `with torch.device("meta")` costs no memory."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config = copy.deepcopy(config)                 # upcycling changes it: no other model's business
        v, t = config.vision, config.text
        self.vision = VisionTransformer(v) if v else None
        self.connector = Connector(config.connector, v.dim * len(v.scales), t.dim) if v else None
        self.audio = AudioTransformer(config.audio) if config.audio else None
        self.resampler = Resampler(config.audio, t.dim) if config.audio else None
        self.text = Decoder(t)
        self.cache = None                                            # compiled generation keeps its Cache here
        self.lm_loss = lm_loss                                       # or that compiled
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, parts=("vision", "connector", "audio", "resampler", "text"), gain: float = 0.64):
        """Normal(0, gain / sqrt(fan in)): GPT-2's 0.02 at width 1024, and the same output scale at every other width (with 0.02 a
        width of 128 starts with nearly uniform attention and learns late). The two projections that write to the residual stream
        are scaled down by depth, as in GPT-2."""
        for name, p in self.named_parameters():
            part = name.split(".")[0]
            if part not in parts:
                continue
            if name.split(".")[-1].startswith("b"):                  # first: a MoE's biases are stacked, (E, F)
                nn.init.zeros_(p)
            elif name == "audio.pos":
                p.copy_(sinusoids(*p.shape, device=p.device))
            elif p.dim() > 1 or name == "vision.cls":                # what is left are norms (ones) and biases (zeros)
                std = gain * (p[0].numel() if p.dim() == 4 or ".conv" in name else p.shape[-1]) ** -0.5
                if part != "connector" and name.endswith(("o.weight", "w_out")):
                    std /= (2 * len(getattr(self, part).layers)) ** 0.5
                nn.init.normal_(p, std=std)

    def checkpointing(self, on: bool = True):
        """Activation checkpointing: keep each block's input only, and compute the block again in the backward pass."""
        for part in (self.vision, self.audio, self.text):
            if part is not None:
                part.checkpointing = on

    def encode_images(self, images: Tensor, aux: dict | None = None, frames: Tensor | None = None) -> Tensor:
        """images (n, 3, S, S) -> embeddings for the IMAGE slots (n, N, D), or (videos, N, D) with frames (videos,) int64: then the
        next frames[i] images are one video, and it gets the mean over its frames. An image is a video of one frame."""
        if self.vision is None:
            raise ValueError("this model is a language model alone; it was given images")
        aux = aux if aux is not None else {"vision": None, "connector": None}
        embeds = self.connector(self.vision(images, aux["vision"]), aux["connector"])
        if frames is None:
            return embeds
        if not torch.compiler.is_compiling() and not frames.is_meta and (int(frames.sum()) != len(images) or (frames < 1).any()):
            raise ValueError(f"frames {frames.tolist()} must be above 0 and add up to the number of images, {len(images)}; "
                             f"they give {int(frames.sum())}")
        # The mean is over what the connector gives, as in the released Uni-MoE: a video costs as many tokens as an image, and what
        # it loses is the order of its frames
        video = torch.arange(len(frames), device=embeds.device).repeat_interleave(frames, output_size=len(images))     # (n,)
        share = embeds / frames[video].to(embeds.dtype)[:, None, None]
        return embeds.new_zeros(len(frames), *embeds.shape[1:]).index_add(0, video, share)

    def encode_audio(self, mel: Tensor) -> Tensor:
        """mel (m, n_mels, n_frames), chunks of sound (data.log_mel) -> embeddings for the AUDIO slots (m, Q, D)."""
        if self.audio is None:
            raise ValueError("this model hears nothing; it was given audio")
        return self.resampler(self.audio(mel))

    def count_slots(self, tokens: Tensor) -> list[int] | None:
        """tokens (B, T) -> [IMAGE slots, rows without one, AUDIO slots]; None on meta, and while torch.compile traces.

        To count is to wait for the device. So a forward pass does it once, and first, while there is nothing to wait for."""
        if tokens.is_meta or torch.compiler.is_compiling():
            return None
        images = tokens == IMAGE
        return torch.stack([images.sum(), (~images.any(1)).sum(), (tokens == AUDIO).sum()]).tolist()

    def embed(self, tokens: Tensor, image_embeds: Tensor | None = None, audio_embeds: Tensor | None = None,
              counts: list[int] | None = None) -> Tensor:
        """tokens (B, T), image_embeds (n, N, D), audio_embeds (m, Q, D) -> (B, T, D): word embeddings, and features written over the
        IMAGE and AUDIO slots, in order. What is left over must be blanks: one image for each row without an image's slots, or, where
        nothing sounds in the whole batch, one chunk. counts: of the slots, where they are known (`count_slots`)."""
        if counts := counts or self.count_slots(tokens):
            c, (n_images, n_blank, n_sounds) = self.config, counts
            n_seen, n_heard = (0 if e is None else e.shape[:2].numel() for e in (image_embeds, audio_embeds))
            if n_seen not in (n_images, n_images + n_blank * c.n_image_tokens):
                raise ValueError(f"tokens have {n_images} IMAGE slots, the images give {n_seen} features ({c.n_image_tokens} an image)")
            if self.audio is None and (n_sounds or n_heard):
                raise ValueError(f"tokens have {n_sounds} AUDIO slots, this model hears nothing")
            if n_heard not in (n_sounds, n_sounds or c.n_audio_tokens):
                raise ValueError(f"tokens have {n_sounds} AUDIO slots, the sounds give {n_heard} features ({c.n_audio_tokens} a chunk)")
        x = self.text.embed(tokens.clamp(min=0))                                   # (B, T, D)
        for slots, embeds in ((tokens == IMAGE, image_embeds), (tokens == AUDIO, audio_embeds)):
            if embeds is not None and len(embeds):
                # Each place fetches the feature of the slot that it is, or of the last one before it, which it then does not take. To
                # write by the mask (masked_scatter) says the same, but going back that waits for the device to count the mask
                which = (slots.flatten().cumsum(0) - 1).clamp(min=0)               # (B * T,)
                fetched = embeds.to(x.dtype).flatten(0, 1).index_select(0, which).view_as(x)
                x = torch.where(slots.unsqueeze(-1), fetched, x)
        return x

    def forward(self, tokens: Tensor, images: Tensor | None = None, audio: Tensor | None = None, labels: Tensor | None = None,
                image_embeds: Tensor | None = None, audio_embeds: Tensor | None = None, frames: Tensor | None = None) -> Output:
        """tokens (B, T) int64, images (n, 3, S, S) float and audio (m, n_mels, n_frames) float in order of appearance (blank ones last),
        labels (B, T) int64 with -100 where nothing is learnt (shifted here, not by the caller). frames: see encode_images. image_embeds
        (n, N, D) and audio_embeds (m, Q, D) take the place of what was encoded before. ValueError when slots and features do not match."""
        aux = {"vision": [], "connector": [], "text": []}
        n = 0 if images is None else len(images if frames is None else frames)
        counts = self.count_slots(tokens)
        n_slots, n_blank, n_sounds = counts or (0, 0, 1)
        if labels is not None and self.vision and image_embeds is None and n_blank and n * self.config.n_image_tokens == n_slots:
            # Training: a row without an image brings a blank one, which fills no slot. The released code does so too, and counts the
            # blanks in the auxiliary losses. It also makes every rank run every module, without which DDP and FSDP would hang.
            # data.collate appends them; here they are appended for who did not.
            blank = torch.zeros(n_blank, 3, *[self.config.vision.image_size] * 2, device=tokens.device)
            images = torch.cat([images, blank.to(images)]) if n else blank
            frames = None if frames is None else F.pad(frames, (0, n_blank), value=1)
        if labels is not None and self.audio and audio_embeds is None and not n_sounds and (audio is None or not len(audio)):
            # The same for a silent batch, that every rank runs the ear too. One chunk does, as no auxiliary loss counts it
            audio = torch.zeros(1, self.config.audio.n_mels, self.config.audio.n_frames, device=tokens.device)
        if images is not None and len(images):
            image_embeds = self.encode_images(images, aux, frames)
        if audio is not None and len(audio):
            audio_embeds = self.encode_audio(audio)
        real = tokens != PAD
        logits = self.text(self.embed(tokens, image_embeds, audio_embeds, counts), real, aux["text"])      # (B, T, V)
        zero = torch.zeros((), device=tokens.device)
        parts, loss = {"lm": zero}, None
        for name, routings in aux.items():
            reduce = torch.sum if name == "text" and self.config.text.aux == "sum" else torch.mean
            for kind in ("balance", "z"):
                parts[f"{name}/{kind}"] = reduce(torch.stack([getattr(r, kind) for r in routings])) if routings else zero
        if labels is not None:
            parts["lm"] = self.lm_loss(logits, labels)
            loss = parts["lm"] + sum(coef * parts[f"{name}/{kind}"] for name in aux
                                     for kind, coef in (("balance", self.config.balance_coef), ("z", self.config.z_coef)))
        return Output(logits, loss, parts, image_embeds[:n] if n else None if images is not None else image_embeds, aux)

    @torch.no_grad()
    def generate(self, tokens: Tensor, images: Tensor | None = None, audio: Tensor | None = None, max_new_tokens: int = 64,
                 temperature: float = 0.0, top_p: float = 1.0, eos: int | None = None, image_embeds: Tensor | None = None,
                 on_token=None, generator: torch.Generator | None = None, compile: bool | str = False,
                 audio_embeds: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        """Continue tokens (B, T), right-padded with PAD -> (B, <= max_new_tokens) int64; behind an eos a row holds eos.

        temperature 0 is greedy; top_p < 1 samples from the smallest set of tokens with that much probability. `on_token` is called
        with each step's (B,) tokens, to stream. Rows may differ in length: each row's next token is written at its own position,
        over its padding, so nothing is ever shifted or re-computed.

        compile: prefill and decode step as one compiled graph each (a text names torch.compile's backend), on CUDA replayed as CUDA
        graphs. Graphs want the same shapes and the same memory every time: so prompt and cache are padded to a few lengths, a step
        attends over the whole cache, and the cache is kept for the next call. In eager mode a step attends over what is written."""
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"need max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1; got {max_new_tokens}, {temperature}, {top_p}")
        if images is not None and len(images):
            image_embeds = self.encode_images(images, None, frames)
        if audio is not None and len(audio):
            audio_embeds = self.encode_audio(audio)
        real = tokens != PAD
        length = real.sum(1)                                                       # (B,)
        if not torch.equal(real, torch.arange(tokens.shape[1], device=tokens.device) < length.unsqueeze(1)) or not (length > 0).all():
            raise ValueError("tokens must be padded with PAD = -1 on the right only, and no row may be empty")
        first, following, cache, n_cache, on_cuda = prefill, decode, None, tokens.shape[1] + max_new_tokens, tokens.is_cuda
        if compile:
            first, following = compiled("inductor" if compile is True else compile, on_cuda)
            cache, n_cache = self.cache, rung(n_cache)
            tokens = F.pad(tokens, (0, min(rung(tokens.shape[1]), n_cache) - tokens.shape[1]), value=PAD)
        x = self.embed(tokens, image_embeds, audio_embeds)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        key = len(x), n_cache, dtype, x.device
        if cache is None or (len(cache.k[0]), cache.k[0].shape[2], cache.k[0].dtype, cache.k[0].device) != key:
            cache = Cache(self.config.text, len(x), n_cache, x.device, dtype)
            if compile:
                self.cache = cache
                for t in cache.k + cache.v:
                    torch._dynamo.mark_static_address(t, guard=False)              # a CUDA graph may write to it in place
        logits = first(self.text, x, tokens != PAD, length - 1, cache)             # (B, V) at each row's last token
        done, out = torch.zeros_like(length, dtype=torch.bool), []
        for step in range(max_new_tokens):
            token = sample(logits, temperature, top_p, generator)                  # (B,)
            if eos is not None:
                token = torch.where(done, eos, token)
                done |= token == eos
            out.append(token)
            if on_token is not None:
                on_token(token)
            # To ask is to wait for the device; so a GPU is asked now and then only, and runs a few steps too far
            if step == max_new_tokens - 1 or (eos is not None and (not on_cuda or step % 8 == 7) and done.all()):
                break
            logits = following(self.text, token, length + step, cache, n_cache if compile else tokens.shape[1] + step + 1)
        out = torch.stack(out, 1)                                                  # (B, steps)
        return out if eos is None else out[:, :1 + int(((out == eos).cumsum(1) == 0).any(0).sum())]


def rung(n: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that is at least n: lengths padded to it are few, and at most a third of it is
    padding (from 64 on)."""
    power = 1 << max(6, (n - 1).bit_length())                                      # the power of two
    return power * 3 // 4 if n <= power * 3 // 4 and power > 64 else power


def prefill(text: Decoder, x: Tensor, real: Tensor, last: Tensor, cache: Cache) -> Tensor:
    """The whole prompt at once: x (B, T, D), last (B,) the position of each row's last token -> its logits (B, V)."""
    return text(x, real, cache=cache)[torch.arange(len(x), device=x.device), last]


def decode(text: Decoder, token: Tensor, position: Tensor, cache: Cache, n_keys: int) -> Tensor:
    """One step: token, position (B,) -> logits of the next token (B, V). Nothing in it waits for the device."""
    real = torch.ones_like(token, dtype=torch.bool).unsqueeze(1)
    return text(text.embed(token.unsqueeze(1)), real, cache=cache, positions=position.unsqueeze(1), n_keys=n_keys)[:, 0]


@functools.cache
def compiled(backend: str, cuda_graphs: bool):
    """prefill and decode as one graph each. A decode step on a GPU is a few hundred tiny kernels, and to launch them from Python takes
    longer than they do; "reduce-overhead" records them once as a CUDA graph. Prefill is big enough to go without."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)       # a graph per batch size and rung
    graphs = dict(mode="reduce-overhead") if cuda_graphs and backend == "inductor" else {}
    return (torch.compile(prefill, fullgraph=True, dynamic=False, backend=backend),
            torch.compile(decode, fullgraph=True, dynamic=False, backend=backend, **graphs))


def sample(logits: Tensor, temperature: float, top_p: float, generator=None) -> Tensor:
    """logits (B, V) -> token (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                                # drop what lies behind the first top_p of mass
    # The largest of p_i / (an exponential number) is i with probability p_i; torch.multinomial does this too, but waits for the device
    return ids.gather(-1, (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)).squeeze(-1)


def choose_trainable(model: CuMo, trains):
    """Set requires_grad for the parts named in `trains`, and for nothing else.

    A part is one of the model's modules ("vision", "connector", "audio", "resampler", "text"), or
    "text.ffn" (all FFNs of the decoder), "text.moe" (those with experts) or "text.router".

    Weights that no loss reaches stay frozen even then: DDP insists on a gradient for all others.
    """
    model.requires_grad_(False)
    for name in trains:
        if name in ("vision", "connector", "audio", "resampler", "text"):
            getattr(model, name).requires_grad_(True)
            continue
        for layer in model.text.layers:
            if name == "text.ffn":
                layer.ffn.requires_grad_(True)
            elif name == "text.moe" and isinstance(layer.ffn, MoE):
                layer.ffn.requires_grad_(True)
            elif name == "text.router" and isinstance(layer.ffn, MoE):
                layer.ffn.router.requires_grad_(True)
    if model.vision is not None:
        freeze_unreached_layers(model.vision)


def freeze_unreached_layers(vision: VisionTransformer):
    """Freeze what lies behind the select layer, where the features are read off, but for routers.

    With select_layer -2 the last layer does not touch the features. When it is dense, it does not
    even run. When it has experts, its router still counts in the auxiliary losses (as in the
    released code), and what comes before its experts reaches the router; but the experts' outputs
    go nowhere.
    """
    n_used = vision.config.n_used_layers
    last_reached = n_used - 1
    for i, layer in enumerate(vision.layers):
        if i >= n_used and isinstance(layer.ffn, MoE):
            last_reached = i

    for i, layer in enumerate(vision.layers):
        if i > last_reached:
            layer.requires_grad_(False)
        elif i >= n_used and i == last_reached:
            for name, p in layer.ffn.named_parameters():
                if name != "router":
                    p.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# 5. LoRA (arXiv 2106.09685): train a few numbers instead of the weights. W stays as it is, and what is learnt is a product of two thin
# matrices: W + alpha / rank * B A. B starts at zero, so nothing changes at first; merged in the end, nothing is left of them.
#
# A parametrization hides this from all other code: who reads `ffn.w_in` gets W + BA, be it a linear layer's weight or E experts stacked,
# each with its own A and B. The price: W + BA is spelt out where the usual code does B (A x). In arithmetic that is next to nothing
# (rank products a weight, however many tokens follow). In memory it is one more copy of each such weight until the backward pass, or
# with checkpointing of one layer's; and W's gradient exists for a moment, before it becomes those of A and B.


class LoRA(nn.Module):
    def __init__(self, w: Tensor, rank: int, alpha: float, generator: torch.Generator, device):
        super().__init__()
        *experts, n_out, n_in = w.shape
        self.scale, self.merged = alpha / rank, False
        a = torch.empty(*experts, rank, n_in, device="cpu")
        a.uniform_(-n_in**-0.5, n_in**-0.5, generator=generator)                   # Kaiming's, as in PEFT; the paper: normal
        self.a = nn.Parameter(a.to(device, w.dtype))                               # (..., rank, I)
        self.b = nn.Parameter(torch.zeros(*experts, n_out, rank, device=device, dtype=w.dtype))          # (..., O, rank)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.scale * b) @ a                                                # (..., O, I)

    def forward(self, w: Tensor) -> Tensor:
        """w (..., O, I) -> the same shape."""
        return w if self.merged else w + self.product(self.a, self.b)


def add_lora(model: CuMo, rank: int, alpha: float, which: str = "all", seed: int = 0, real: bool = False) -> CuMo:
    """Adapters on the decoder's weights, in place: the FFNs' ("ffn", what becomes experts) or the attention's too ("all"). Those weights
    are frozen; biases, norms and routers are left alone. real: a model on meta, whose weights come later, gets its adapters now.
    In state dicts "q.weight" becomes "q.parametrizations.weight.original", and A and B "q.parametrizations.weight.0.a" and "...0.b"."""
    if not (isinstance(rank, int) and rank >= 1 and alpha > 0):
        raise ValueError(f"LoRA: rank = {rank} must be a whole number above 0, alpha = {alpha} above 0")
    if which not in ("ffn", "all"):
        raise ValueError(f"LoRA on {which!r} matches nothing; known: ffn, all")
    if adapted(model):
        raise ValueError("this model has LoRA adapters already; merge them first (drop_lora)")
    generator = torch.Generator().manual_seed(seed)                                # the same adapters on every rank
    for block in model.text.layers:
        weights = [(block.ffn, name) for name in ("w_in", "w_gate", "w_out")]
        weights += [(linear, "weight") for linear in (block.q, block.k, block.v, block.o) if which == "all"]
        for module, name in weights:
            w = getattr(module, name).requires_grad_(False)
            lora = LoRA(w, rank, alpha, generator, "cpu" if w.is_meta and real else w.device)
            parametrize.register_parametrization(module, name, lora, unsafe=True)  # unsafe: it does not try whether the shapes fit
    return model


def adapted(model: nn.Module) -> list[tuple[nn.Module, str, LoRA]]:
    """(module, its weight's name, the adapter on it) of each."""
    return [(module, name, chain[0]) for module in model.modules() if parametrize.is_parametrized(module)
            for name, chain in module.parametrizations.items()]


@torch.no_grad()
def merge_lora(model: nn.Module, on: bool = True):
    """W += scale B A, and the adapters sleep; or back, with on=False. To a rounding the same, faster."""
    for module, name, lora in adapted(model):
        if lora.merged != on:
            module.parametrizations[name].original += (1 if on else -1) * lora.product(lora.a, lora.b)
            lora.merged = on


def drop_lora(model: nn.Module):
    """Merge for good: plain weights with plain names, which all want gradients again."""
    merge_lora(model)
    for module in {module: None for module, _, _ in adapted(model)}:
        weights = {name: chain.original for name, chain in module.parametrizations.items()}
        module.__class__ = type(module).__bases__[0]                               # by hand: remove_parametrizations changes that class,
        del module.parametrizations                                                # which deep copies of the model share
        for name, w in weights.items():
            setattr(module, name, w.requires_grad_(True))


def plain_name(name: str) -> str | None:
    """A name in the state dict of a model with adapters -> that without them; None for an adapter's own A or B."""
    path, adapter, kind = name.partition(".parametrizations.")                     # "text.layers.0.q", ..., "weight.original"
    return name if not adapter else f"{path}.{kind.removesuffix('.original')}" if kind.endswith(".original") else None


def merge_state(state: dict, model: nn.Module) -> dict:
    """What drop_lora(model) would leave in its state dict, without touching it: `state` holds its tensors whole (gathered, say)."""
    out = {}
    for name, tensor in state.items():
        if (plain := plain_name(name)) not in (None, name):
            adapter = name.removesuffix("original") + "0"
            lora = model.get_submodule(adapter)
            tensor = tensor if lora.merged else tensor + lora.product(state[adapter + ".a"], state[adapter + ".b"])
        if plain:
            out[plain] = tensor
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 6. Counting parameters


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{part: (total, activated)}: a token passes through K of a MoE's E experts, so K / E of their weights are activated."""
    counts = {}
    for part, module in model.named_children():
        total = sum(p.numel() for p in module.parameters())
        idle = sum(p.numel() // len(p) * (len(p) - m.top_k) for m in module.modules() if isinstance(m, MoE)
                   for name, p in m.named_parameters() if name != "router")
        counts[part] = (total, total - idle)
    return counts


def main():
    short = lambda n: f"{n / 1e9:.2f}B" if n > 1e9 else f"{n / 1e6:.2f}M"
    paper = {("cumo-mistral-7b", "all"): "8.26B / 7.80B", ("cumo-mixtral-8x7b", "all"): "47.7B / 13.5B",
             ("moe-llava-mistral-7b", "text"): "15.2B / 9.6B, which LLaMA-7B's shape has", ("uni-moe-7b", "text"): "19.7B / 11.1B",
             ("uni-moe-7b-every-other", "text"): "13.2B / 8.9B"}                  # MoE-LLaVA and Uni-MoE count the decoder alone
    print(f"{'preset':22} {'part':10} {'total':>16} {'activated':>16}")
    for name in PRESETS:
        with torch.device("meta"):
            counts = count_parameters(CuMo(Config.from_preset(name)))
        counts["all"] = tuple(sum(c[i] for c in counts.values()) for i in (0, 1))
        for part, (total, activated) in counts.items():
            note = f"   (paper: {paper[name, part]})" if (name, part) in paper else ""
            note = f"   = {short(total)} / {short(activated)}{note}" if note or part == "all" else ""
            print(f"{name:22} {part:10} {total:16,} {activated:16,}{note}")
        print()


if __name__ == "__main__":
    main()
