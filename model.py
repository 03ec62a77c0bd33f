"""model.py: the whole architecture: senses, a bridge from each sense to the decoder, the decoder.

    pixels ──► VisionTransformer ──► Connector ──┐
    mel    ──► AudioTransformer ───► Resampler ──┼──► token embeddings ──► Decoder ──► logits
    text   ──► embedding ────────────────────────┘

The two Transformers and the Decoder are stacks of blocks: attention, then a feed-forward. The
Connector is a feed-forward alone, the Resampler blocks whose few queries look at many states.

CuMo (arXiv 2405.05949) is LLaVA with the feed-forwards of the vision tower and of the connector
turned into mixtures of experts. MoE-LLaVA (arXiv 2401.15947) has its experts in the decoder, and so
has Uni-MoE (arXiv 2405.11273), which also hears. So there is one switch: the number of experts in
the configuration, layer by layer. 0 makes an `FFN`, any other number a `MoE` (kernels.py).

A batch of conversations is one tensor, tokens (B, T). Ids from 0 on are text. The marks IMAGE and
AUDIO keep slots free for the features of images and sounds, and PAD fills the right-hand end. Two
rows, where an image has four slots (in CuMo 576):

    What   is     IMAGE  IMAGE  IMAGE  IMAGE  ?      A      ball
    Name   three  colors PAD    PAD    PAD    PAD    PAD    PAD

The features are written over the slots of all rows at once, so nothing loops over the samples.

Letters for shapes, in all of this file: B batch, T tokens in a sequence, V vocabulary, n images,
S x S pixels of an image, N its patches (inside the tower CLS is one more; behind a pixel shuffle
there are fewer, and the slots are as many) or states of a sound, m chunks of sound, Q slots of a
chunk, D width, H heads (H_kv of keys and values), d width of a head, E experts, K experts a token.

`python model.py` prints the number of parameters of every preset.
"""
import copy
import dataclasses
import functools
import itertools
import math
import re
import warnings
from dataclasses import dataclass, field
from types import NoneType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from kernels import ACTIVATIONS, MoE, feed_forward

# Marks in `tokens` and `labels`; data.py has the same.
IMAGE = -200
AUDIO = -201
PAD = -1
IGNORE = -100  # the label of a token that is not learnt

# ------------------------------------------------------------------------------------------------
# 1. Configuration. The defaults are CuMo's around Mistral-7B, without experts and S2 scales; the
#    presets stand in section 13. On a first reading, the sizes, n_experts, top_k, select_layer and
#    scales will do; most other fields are there for the checkpoints of other models. Section 12
#    checks each value against the type of its field, to which Annotated adds the lowest and the
#    highest number.

Size = Annotated[int, 1, 10**9]
Layers = Annotated[int, 1, 1000]  # a billion layers, a typing error, would take days to build
Token = Annotated[int, 0, 10**9]
Experts = Annotated[int, 0, 10**6]  # 0 is dense
Positive = Annotated[float, 1e-12, 1e12]
Activation = Literal[tuple(ACTIVATIONS)]


@dataclass
class VisionConfig:
    """A vision tower. The defaults are CLIP's ViT-L; section 13 has what differs in SigLIP's."""
    image_size: Size = 336  # in pixels
    patch_size: Size = 14
    dim: Size = 1024
    n_layers: Layers = 24
    n_heads: Size = 16
    ffn_dim: Size = 4096
    act: Activation = "quick_gelu"
    norm_eps: Positive = 1e-5
    # CLIP puts a token of its own, CLS, in front of the patches, and a norm in front of the layers.
    # SigLIP has neither; it has a bias on the patches, and a norm behind the last layer.
    n_prefix_tokens: Annotated[int, 0, 1] = 1
    pre_norm: bool = True
    patch_bias: bool = False
    post_norm: bool = False
    # Which hidden state are the features? -1: what the last layer gives. -2: what the layer before
    # it gives (LLaVA's choice with CLIP). The last layer is then of no use.
    select_layer: int = -2
    # S2 (arXiv 2403.13043): [1, 3] reads the image also three times enlarged, in 9 crops.
    scales: list[Size] = field(default_factory=lambda: [1])
    # A number for each layer, or one number for all of them. 0 is dense.
    n_experts: Experts | list[Experts] = 0
    top_k: int = 2  # upcycling writes it (train.py --top-k)
    # Do the weights of a token's experts sum to 1? None: from top-2 on (kernels.route).
    renormalise: bool | None = None
    # How it wants its pictures, see data.PictureFormat: the mean and standard deviation of red,
    # green and blue; how a picture becomes a square; and the filter that makes it larger or
    # smaller.
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    image_aspect: Literal["pad", "crop", "stretch"] = "pad"
    image_filter: Literal["bicubic", "bilinear"] = "bicubic"

    @property
    def side(self) -> int:
        """Patches from one edge of the image to the other. Pixels that are left over at the right
        and at the bottom are not seen: SigLIP's 384 have 27 patches of 14, and 6 left over."""
        return self.image_size // self.patch_size

    @property
    def n_used_layers(self) -> int:
        """Layers that the features pass through: all for select_layer -1, all but one for -2."""
        return self.n_layers + 1 + self.select_layer


@dataclass
class ConnectorConfig:
    act: Activation = "gelu"
    # 2 makes one token of 2 x 2 patches, see function pixel_shuffle. 1: a token for each patch.
    pixel_shuffle: Size = 1
    n_experts: Experts = 0
    top_k: int = 2
    renormalise: bool | None = None


@dataclass
class TextConfig:
    """The decoder."""
    vocab_size: Size = 32000
    dim: Size = 4096
    n_layers: Layers = 32
    n_heads: Size = 32
    # Grouped-query attention: several query heads share a head of keys and values.
    n_kv_heads: Size = 8
    head_dim: Size | None = None  # None: dim / n_heads
    ffn_dim: Size = 14336
    act: Activation = "silu"
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    rope_scaling: dict[str, Positive] | None = None  # Llama 3.1's, see rope_table
    sliding_window: Size | None = None
    qkv_bias: bool = False  # Qwen2 has them
    qk_norm: bool = False  # Qwen3 normalises each head's queries and keys
    tie_embeddings: bool = False
    n_experts: Experts | list[Experts] = 0  # a number for each layer, or one for all
    top_k: int = 2
    renormalise: bool | None = None
    # The experts' capacity (kernels.route) in training and outside of it. None drops nothing;
    # MoE-LLaVA has 1.5 and 2.0.
    capacity_factor: Positive | None = None
    eval_capacity_factor: Positive | None = None
    min_capacity: Annotated[int, 0, 10**9] = 0
    noisy: bool = False  # in training, choose the second expert with DeepSpeed's Gumbel noise
    # The auxiliary losses of the decoder's layers: their "mean" (CuMo-Mixtral), or their "sum"
    # (MoE-LLaVA, whose routers also compute in float32, see expert_limits).
    aux: Literal["mean", "sum"] = "mean"
    # What the files of a decoder say beside its shape. None, or no end: they do not say.
    max_positions: Size | None = None  # tokens that it learnt to read at once
    start_token: Token | None = None
    # Each of them ends an answer, as the template's end does.
    end_tokens: list[Token] = field(default_factory=list)

    @property
    def expert_limits(self) -> dict:
        """What a MoE of the decoder is told beside its sizes: the last arguments of kernels.MoE."""
        return {
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "min_capacity": self.min_capacity,
            "noisy": self.noisy,
            "renormalise": self.renormalise,
            # A MoE-LLaVA has DeepSpeed's gate, whatever type the other weights have.
            "float32_router": self.aux == "sum",
        }


@dataclass
class Config:
    vision: VisionConfig | None = field(default_factory=VisionConfig)  # None: a language model
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    audio: "AudioConfig | None" = None  # None: it hears nothing (section 7)
    template: str = "mistral"  # of conversations, see data.py
    # True: each frame of a video fills the slots of an image. False: the whole video fills those
    # of one image, with the mean of its frames' features (Uni-MoE).
    frames_apart: bool = False
    # What the auxiliary losses weigh (total_loss). These are CuMo's, section 4.1 of the paper.
    balance_coef: float = 0.1
    z_coef: float = 0.01

    def __post_init__(self):
        fill_in(self)
        validate(self)

    @classmethod
    def from_dict(cls, d: dict) -> "Config":
        """From config.json. A ValueError names a key that is unknown."""
        return part_from_dict(cls, d)

    @classmethod
    def from_preset(cls, name: str) -> "Config":
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict(copy.deepcopy(PRESETS[name]))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def n_image_tokens(self) -> int:
        """IMAGE slots of an image."""
        if self.vision is None:
            return 0
        return (self.vision.side // self.connector.pixel_shuffle) ** 2

    @property
    def n_audio_tokens(self) -> int:
        """AUDIO slots of a chunk of sound."""
        if self.audio is None:
            return 0
        return self.audio.n_queries


# ------------------------------------------------------------------------------------------------
# 2. Seeing: the block of all senses, the vision tower, and the connector


def split_heads(x, n_heads):
    """x (B, T, H * d) -> (B, H, T, d)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """x (B, H, T, d) -> (B, T, H * d)."""
    return x.transpose(1, 2).flatten(2)


class SenseBlock(nn.Module):
    """A transformer block in which every token looks at all tokens, before it and behind it.

    `config` is a VisionConfig or an AudioConfig. CLIP and SigLIP have biases everywhere, Whisper
    everywhere but in the keys.
    """

    def __init__(self, config, n_experts=0, k_bias=True):
        super().__init__()
        dim = config.dim
        self.n_heads = config.n_heads
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=k_bias)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.ffn = feed_forward(dim, config.ffn_dim, config.act, n_experts, config.top_k, bias=True,
                                renormalise=config.renormalise)

    def attention(self, x, seen):
        """Each of x (n, N, D) looks at all of seen (n, N_seen, D) -> (n, N, D). Here x and seen are
        the same; in the Resampler they are not."""
        q = split_heads(self.q(x), self.n_heads)  # (n, H, N, d)
        k = split_heads(self.k(seen), self.n_heads)  # (n, H, N_seen, d)
        v = split_heads(self.v(seen), self.n_heads)  # (n, H, N_seen, d)
        return self.o(merge_heads(F.scaled_dot_product_attention(q, k, v)))

    def forward(self, x):
        """x (n, N, D) -> the same shape, and the Routing (None where the FFN is dense)."""
        h = self.norm1(x)
        x = x + self.attention(h, h)
        h, routing = self.ffn(self.norm2(x))
        return x + h, routing


class VisionTransformer(nn.Module):
    """Images (n, 3, S, S) -> features of their patches (n, N, D * number of scales)."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch = nn.Conv2d(3, dim, config.patch_size, stride=config.patch_size,
                               bias=config.patch_bias)
        if config.n_prefix_tokens:
            self.cls = nn.Parameter(torch.empty(dim))
        self.pos = nn.Parameter(torch.empty(config.n_prefix_tokens + config.side ** 2, dim))

        self.pre_norm = nn.Identity()
        if config.pre_norm:
            self.pre_norm = nn.LayerNorm(dim, eps=config.norm_eps)

        # n_experts is a list by now (fill_in, section 12).
        self.layers = nn.ModuleList(SenseBlock(config, n) for n in config.n_experts)
        self.post_norm = nn.Identity()
        if config.post_norm:
            self.post_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.checkpointing = False

    def forward(self, images, routings=None):
        """images (n, 3, S, S) float, normalised (data.load_image) -> (n, N, D * scales).

        `routings` collects the Routing of every MoE layer, scale by scale.
        """
        size = self.config.image_size
        check_shape("images are", images, (3, size, size))
        images = images.to(self.patch.weight.dtype)
        features = []
        for scale in self.config.scales:
            if scale == 1:
                features.append(self.encode(images, routings))  # (n, N, D)
            else:
                features.append(encode_enlarged(self, images, scale, routings))  # (n, N, D)
        return torch.cat(features, -1)

    def encode(self, images, routings=None):
        """images (n, 3, S, S) -> features of their patches (n, N, D), at one scale."""
        # A layer runs if the features or the losses need it. With select_layer -2, nobody reads
        # what the last layer makes; but if it has experts, its router counts in the losses.
        n_layers = n_needed_layers(self.config, routings is not None)
        return self.run_layers(images, n_layers, routings)[1]

    def run_layers(self, images, n_layers, routings=None):
        """images (n, 3, S, S) -> the last of n_layers hidden states, with CLS in front (n, 1 + N,
        D), and the features: the patches' hidden states at the select layer (n, N, D)."""
        # A convolution whose stride is its width cuts the image into patches and projects each.
        # (n, D, side, side), then (n, D, N), then (n, N, D):
        x = self.patch(images).flatten(2).transpose(1, 2)
        n_prefix = self.config.n_prefix_tokens
        if n_prefix:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)  # (n, 1 + N, D)
        # (Under autocast the patches are bfloat16. The sum is float32, as are the positions.)
        x = self.pre_norm(x + self.pos)

        selected = x  # if the select layer lies before all layers
        for i in range(n_layers):
            # This is layer(x). With checkpointing it keeps no activations (section 9).
            x, routing = run_block(self, self.layers[i], x)
            collect(routing, routings)
            if i + 1 == self.config.n_used_layers:
                selected = x

        # Without the CLS token: LLaVA gives the decoder patches only.
        return x, self.post_norm(selected[:, n_prefix:])


class Connector(nn.Module):
    """Features (n, N, D_in) -> the decoder's width (n, N, D). D_in = D_vision * number of scales.

    LLaVA-1.5's MLP of two layers, or experts of that shape. With a pixel shuffle by a factor, N
    becomes N / factor^2.
    """

    def __init__(self, config, dim_in, dim_out):
        super().__init__()
        self.factor = config.pixel_shuffle
        dim_in = dim_in * self.factor ** 2
        # Inside, the MLP is as wide as the decoder.
        self.ffn = feed_forward(dim_in, dim_out, config.act, config.n_experts, config.top_k,
                                dim_out=dim_out, bias=True, renormalise=config.renormalise)

    def forward(self, x, routings=None):
        if self.factor > 1:
            x = pixel_shuffle(x, self.factor)  # (n, N / factor^2, factor^2 * D_in)
        y, routing = self.ffn(x)  # (n, N, D)
        collect(routing, routings)
        return y


# ------------------------------------------------------------------------------------------------
# 3. Speaking: the decoder, a LLaMA, Mistral, Qwen2, Qwen3 or Mixtral


def rope_table(positions, head_dim, theta, scaling=None):
    """positions (B or 1, T) -> cos and sin (B or 1, T, d) float32 for rotary embeddings.

    In the layout of Hugging Face's LLaMA: numbers i and i + d/2 of a head are a pair.
    """
    # Pair i turns by theta^(-2i/d) at every step: the first fast, the last hardly at all.
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    freq = theta ** (-exponent / head_dim)  # (d / 2,)
    if scaling is not None:
        freq = slow_down(freq, scaling)

    angle = positions.float().unsqueeze(-1) * freq  # (B, T, d / 2)
    angle = torch.cat([angle, angle], -1)  # (B, T, d)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (B, H, T, d): turns each pair by the angle of its position.

    Both q and k are turned, so their product depends on how far apart they stand, not on where.
    """
    cos = cos.unsqueeze(1).to(x.dtype)  # (B, 1, T, d)
    sin = sin.unsqueeze(1).to(x.dtype)
    a, b = x.chunk(2, -1)  # (B, H, T, d / 2)

    # (a, b) turned by an angle is (a cos - b sin, b cos + a sin).
    return x * cos + torch.cat([-b, a], -1) * sin


class DecoderBlock(nn.Module):
    """A block as LLaMA's: RMSNorm, causal attention with rotary positions, a gated FFN or a MoE."""

    def __init__(self, config, n_experts):
        super().__init__()
        dim = config.dim
        dim_q = config.n_heads * config.head_dim
        dim_kv = config.n_kv_heads * config.head_dim
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads

        self.norm1 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.norm2 = nn.RMSNorm(dim, eps=config.norm_eps)
        self.q = nn.Linear(dim, dim_q, bias=config.qkv_bias)
        self.k = nn.Linear(dim, dim_kv, bias=config.qkv_bias)
        self.v = nn.Linear(dim, dim_kv, bias=config.qkv_bias)
        self.o = nn.Linear(dim_q, dim, bias=False)

        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

        self.ffn = feed_forward(dim, config.ffn_dim, config.act, n_experts, config.top_k,
                                gated=True, **config.expert_limits)

    def forward(self, x, rope, real, attend=None, cache=None, positions=None):
        """x (B, T, D) -> the same shape, and the Routing (None where the FFN is dense).

        rope (cos, sin); real (B, T) is False at PAD; attend as from visible_keys, or None for
        plain causal attention, which has a faster kernel. cache: this layer's (k, v), to which the
        keys and values of x are written first.
        """
        # 1. Attention.
        h = self.norm1(x)  # (B, T, D)
        q = split_heads(self.q(h), self.n_heads)  # (B, H, T, d)
        k = split_heads(self.k(h), self.n_kv_heads)  # (B, H_kv, T, d)
        v = split_heads(self.v(h), self.n_kv_heads)  # (B, H_kv, T, d)
        # Autocast's norms give float32, and the cache holds one type.
        q = rotate(self.q_norm(q).to(v.dtype), *rope)
        k = rotate(self.k_norm(k).to(v.dtype), *rope)
        if cache is not None:
            n_keys = x.shape[1] if attend is None else attend.shape[-1]
            k, v = write_keys(cache, positions, k, v, n_keys)  # (B, H_kv, keys, d)
        elif attend is not None:
            # Several heads of queries share one of keys: enable_gqa below sees to that. But on a
            # GPU, the kernel that takes a mask wants as many heads of keys as of queries.
            k, v = [t.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for t in (k, v)]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None,
                                           enable_gqa=True)  # (B, H, T, d)
        x = x + self.o(merge_heads(h))  # (B, T, D)

        # 2. Feed-forward. It gets the batch as one row, so that its routing statistics are means
        #    over all tokens of the batch, as in Mixtral's code. (In the tower x keeps its shape
        #    (n, N, D), and the means are taken image by image.)
        h = self.norm2(x).flatten(0, 1)  # (B * T, D)
        h, routing = self.ffn(h, real.flatten())
        return x + h.view_as(x), routing


class Decoder(nn.Module):
    """Embeddings of tokens (B, T, D) -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderBlock(config, n) for n in config.n_experts)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.checkpointing = False

    def forward(self, x, real, routings=None, sample_positions=None, cache=None, positions=None,
                n_keys=None, run=None, last=None):
        """x (B, T, D), real (B, T) False at PAD -> logits (B, T, V). `routings` collects Routings.

        With a cache, x is written to it from position 0 on; or to `positions` (B, T), where each
        row has its own, all of them below n_keys. sample_positions: see CuMo.forward. run:
        run_block compiled, see section 9. last (B,): the place of each row whose logits alone are
        wanted, (B, V).

        Padding needs no attention mask: it lies to the right of every real token, and causal
        attention never looks to the right.
        """
        config = self.config
        window = config.sliding_window

        # Where does each token stand, and which keys may it look at? (None: all up to its own.)
        from_start = positions is None
        if from_start:
            n_keys = x.shape[1]
            positions = torch.arange(n_keys, device=x.device).unsqueeze(0)  # (1, T)
        attend = None
        if not from_start or sample_positions is not None or (window and window < n_keys):
            # (B or 1, 1, T, keys)
            attend = visible_keys(positions, n_keys, window, sample_positions)

        # Samples that share a row bring their own positions. One that has a row for itself counts
        # as the row does.
        if sample_positions is None:
            sample_positions = positions  # (B or 1, T)
        rope = rope_table(sample_positions, config.head_dim, config.rope_theta, config.rope_scaling)
        run = run or run_block
        for i, layer in enumerate(self.layers):
            kept = None if cache is None else cache.layers[i]
            x, routing = run(self, layer, x, rope, real, attend, kept, positions)
            collect(routing, routings)

        # Many small models have no head of their own: a word's logit is then the product with the
        # word's embedding.
        head = self.embed if self.head is None else self.head
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # (B, D)
        return F.linear(self.norm(x), head.weight)  # (B, T, V)

    def apply_expert_limits(self):
        """Tell every MoE the config's capacities. Call it when these have changed."""
        for layer in self.layers:
            if isinstance(layer.ffn, MoE):
                for name, value in self.config.expert_limits.items():
                    setattr(layer.ffn, name, value)


# ------------------------------------------------------------------------------------------------
# 4. What is minimised


def lm_loss(logits, labels):
    """logits (B, T, V), labels (B, T) -> the mean loss of the labels that are learnt, float32."""
    # The logits at place t predict the token at t + 1, so the labels move one place to the left.
    # (To cut the last place off the logits instead would copy the largest tensor of all.)
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # (B * T,)
    total = F.cross_entropy(logits.flatten(0, 1).float(), target, ignore_index=IGNORE,
                            reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def total_loss(parts, balance_coef, z_coef, portions=None):
    """What is minimised: parts["lm"] + balance_coef * balance losses + z_coef * z losses.

    parts: {"lm": scalar, "vision/balance": scalar, "vision/z": ...}. What is no ".../balance" or
    ".../z" has the weight 1.
    portions: the same names. train.py gives the model a batch in several micro-batches, and says
    here how much of the batch this one is: with 10 of its 40 labels, portions["lm"] is 1/4; vision
    and connector go by images, the decoder's routers by tokens. The losses of the micro-batches
    then add up to the batch's, however it is cut. (Not the decoder's balance, which is a product of
    two means over a micro-batch; nor what a capacity drops, since tokens queue by micro-batches.)
    """
    # Two sums, added at the end. (Another order would change the last digit.)
    task = 0.0
    auxiliary = 0.0
    for name, value in parts.items():
        portion = 1.0 if portions is None else portions[name]
        if name.endswith("/balance"):
            auxiliary = auxiliary + balance_coef * portion * value
        elif name.endswith("/z"):
            auxiliary = auxiliary + z_coef * portion * value
        else:
            task = task + portion * value
    return task + auxiliary


# ------------------------------------------------------------------------------------------------
# 5. The whole


class Output(NamedTuple):
    logits: Tensor               # (B, T, V)
    loss: Tensor | None          # total_loss of the parts; None without labels
    parts: dict                  # "lm", "vision/balance", "vision/z", ...: scalars, not weighted
    image_embeds: Tensor | None  # (n, N, D) what the connector gave
    routing: dict                # part -> list of Routing, a layer each; vision: scale by scale


class CuMo(nn.Module):
    """The multimodal model. `with torch.device("meta")` builds it without any memory."""

    def __init__(self, config):
        super().__init__()
        # A copy, since upcycling changes it and other models may have been built from the same. It
        # is checked once more, as whoever made it may have changed it since.
        config = copy.deepcopy(config)
        config.__post_init__()
        vision = config.vision
        audio = config.audio
        dim = config.text.dim

        self.config = config
        self.vision = None
        self.connector = None
        self.audio = None
        self.resampler = None
        if vision is not None:
            self.vision = VisionTransformer(vision)
            self.connector = Connector(config.connector, vision.dim * len(vision.scales), dim)
        if audio is not None:
            self.audio = AudioTransformer(audio)
            self.resampler = Resampler(audio, dim)
        self.text = Decoder(config.text)

        self.lm_loss = lm_loss  # train.py puts a compiled one here
        self.cache = None  # compiled generation keeps its Cache here, see section 9
        self.init_weights()

    def forward(self, tokens, images=None, audio=None, labels=None, image_embeds=None,
                audio_embeds=None, frames=None, slots=None, sample_positions=None) -> Output:
        """tokens (B, T) int64; images (n, 3, S, S) and audio (m, n_mels, n_frames) float, in order
        of appearance, blank ones last; labels (B, T) int64, IGNORE where nothing is learnt.

        The labels stand where the tokens stand; they are shifted here. image_embeds (n, N, D) and
        audio_embeds (m, Q, D): what was encoded before. frames: see average_frames. slots: what
        count_slots gives; with it, nothing here waits for the device. Give it to a compiled model:
        while torch.compile traces nothing can be counted, so blanks would not be added.
        sample_positions (B, T) int64: each token's place in its sample, where several samples share
        a row (data.collate_packed); each begins at 0, and none sees another. Its first label must
        be IGNORE, since the token in front of it belongs to the sample before.
        ValueError where the slots and the features do not match.
        """
        # 1. How many slots are there? To count on a GPU is to wait for it, so do it first.
        may_wait = slots is None
        if slots is None:
            slots = self.count_slots(tokens, sample_positions)

        # 2. In training, blank images and sounds stand in where there are none: the released code
        #    counts them in the losses, and every process must run every module (add_blank_images).
        #    (slots is None on meta, and while torch.compile traces.)
        n_images = count_images(images, frames)  # those that were given
        if labels is not None and slots is not None:
            if image_embeds is None:
                images, frames = add_blank_images(self, tokens, images, frames, slots)
            if audio_embeds is None:
                audio = add_blank_sound(self, tokens, audio, slots)

        # 3. The senses. Each list collects the Routings of one part's layers.
        routings = {"vision": [], "connector": [], "text": []}
        if images is not None and len(images):
            image_embeds = self.encode_images(images, routings, frames, may_wait)  # (n, N, D)
        if audio is not None and len(audio):
            audio_embeds = self.encode_audio(audio)  # (m, Q, D)

        # 4. The decoder.
        x = self.embed(tokens, image_embeds, audio_embeds, slots)  # (B, T, D)
        logits = self.text(x, tokens != PAD, routings["text"], sample_positions)  # (B, T, V)

        # 5. The losses.
        parts = {
            "lm": torch.zeros((), device=tokens.device),
            **self.routing_losses(routings, tokens.device),
        }
        loss = None
        if labels is not None:
            parts["lm"] = self.lm_loss(logits, labels)
            loss = total_loss(parts, self.config.balance_coef, self.config.z_coef)

        # Hand out the features of the images that were given, without those of blanks added here.
        # (As a copy: FSDP would warn of a view.)
        if images is not None and len(images) and n_images < len(image_embeds):
            image_embeds = image_embeds[:n_images].clone() if n_images else None
        return Output(logits, loss, parts, image_embeds, routings)

    @staticmethod
    def count_slots(tokens, sample_positions=None):
        """tokens (B, T), sample_positions as for `forward` -> [IMAGE slots, samples without any,
        AUDIO slots]. Without sample_positions, each row is a sample.

        It is None on meta, where tokens have no values, and while torch.compile traces.
        """
        if tokens.is_meta or torch.compiler.is_compiling():
            return None
        is_image = tokens == IMAGE
        without = (~is_image.any(1)).sum()
        if sample_positions is not None:
            begins = (sample_positions == 0) & (tokens != PAD)  # (B, T): a sample's first token
            number = begins.flatten().cumsum(0)  # (B * T,): which sample a token belongs to
            without = begins.sum() - len(number[is_image.flatten()].unique())
        # With the same wait for the device, see that padding is on the right only.
        counts = [is_image.sum(), without, (tokens == AUDIO).sum(), *misplaced(tokens)]
        *slots, n_behind, n_unknown = torch.stack(counts).tolist()
        refuse_misplaced(n_behind, n_unknown)
        return slots

    def encode_images(self, images, routings=None, frames=None, may_wait=True):
        """images (n, 3, S, S) -> embeddings for the IMAGE slots (n, N, D).

        frames (videos,) int64 makes them (videos, N, D), see average_frames.
        """
        if self.vision is None:
            raise ValueError("this model is a language model alone; it was given images")
        if routings is None:
            routings = {"vision": None, "connector": None}
        features = self.vision(images, routings["vision"])  # (n, N, D_vision * scales)
        embeds = self.connector(features, routings["connector"])  # (n, N, D)
        if frames is not None:
            embeds = average_frames(embeds, frames, may_wait)
        return embeds

    def encode_audio(self, mel):
        """mel (m, n_mels, n_frames), chunks of sound (data.log_mel) -> embeddings for the AUDIO
        slots (m, Q, D)."""
        if self.audio is None:
            raise ValueError("this model hears nothing; it was given audio")
        return self.resampler(self.audio(mel))

    def embed(self, tokens, image_embeds=None, audio_embeds=None, slots=None):
        """tokens (B, T), image_embeds (n, N, D), audio_embeds (m, Q, D) -> (B, T, D).

        Text gets the embeddings of its words, slots get features. Features that are left over must
        be blanks: one image for each sample without any, or one chunk where nothing sounds at all.
        """
        if slots is None:
            slots = self.count_slots(tokens)
        if slots is not None:
            check_slots(self.config, slots, image_embeds, audio_embeds)
        # Marks are negative numbers. Here they look up word 0: slots are written over, and nobody
        # reads PAD.
        x = self.text.embed(tokens.clamp(min=0))  # (B, T, D)
        x = fill_slots(x, tokens == IMAGE, image_embeds)
        return fill_slots(x, tokens == AUDIO, audio_embeds)

    def routing_losses(self, routings, device):
        """routings: part -> list of Routing -> {"part/balance": scalar, "part/z": scalar}.

        A part's loss is the mean over its layers (and over scales, in the vision tower); MoE-LLaVA
        sums over those of the decoder. Without experts it is 0.
        """
        losses = {}
        for part, layers in routings.items():
            summed = part == "text" and self.config.text.aux == "sum"
            for kind in ("balance", "z"):
                per_layer = [getattr(routing, kind) for routing in layers]
                loss = torch.stack(per_layer or [torch.zeros((), device=device)])  # (layers,)
                losses[f"{part}/{kind}"] = loss.sum() if summed else loss.mean()
        return losses

    @torch.no_grad()
    def generate(self, tokens, images=None, audio=None, max_new_tokens: int = 64,
                 temperature: float = 0.0, top_p: float = 1.0, eos: int | list | None = None,
                 image_embeds=None, on_token=None, generator=None, compile: bool | str = False,
                 audio_embeds=None, frames=None, too_long: str = "error") -> Tensor:
        """Continues tokens (B, T), padded with PAD on the right -> (B, <= max_new_tokens) int64.

        temperature 0 takes the most probable token; top_p < 1 draws from the smallest set of tokens
        that has this much probability. Behind an eos (one, or any of a list) a row holds eos (the
        first). `on_token` gets the (B,) tokens of each step. compile: True, or a backend of
        torch.compile, see section 9. too_long: "error", or "warn" for more tokens than the decoder
        learnt to read. Each row's next token takes the row's own position, over its padding.
        """
        check_sampling(max_new_tokens, temperature, top_p)
        slots = self.count_slots(tokens)
        check_prompt(tokens, max_new_tokens, self.config.text.max_positions, too_long)

        # 1. The senses see and hear once.
        if images is not None and len(images):
            image_embeds = self.encode_images(images, None, frames)  # (n, N, D)
        if audio is not None and len(audio):
            audio_embeds = self.encode_audio(audio)  # (m, Q, D)

        # 2. A cache for the keys and values of the prompt and of all new tokens. run_prompt and
        #    run_token are `prefill` and `decode`, or these compiled, which want a few lengths only.
        n_prompt = tokens.shape[1]
        n_cache = n_prompt + max_new_tokens
        length = (tokens != PAD).sum(1)  # (B,)
        if compile:
            tokens, n_cache = pad_to_rungs(tokens, n_cache)
        x = self.embed(tokens, image_embeds, audio_embeds, slots)  # (B, T, D)
        check_all_met(self.config, slots, images, audio, frames)
        run_prompt, run_token, cache = prepare_steps(self, x, n_cache, compile)

        # 3. The whole prompt at once, then one token after the other.
        logits = run_prompt(self.text, x, tokens != PAD, length - 1, cache)  # (B, V)
        done = torch.zeros_like(length, dtype=torch.bool)  # (B,)
        finite = torch.ones_like(done)  # (B,)
        ends = as_ends(eos, tokens.device)
        said = []
        for step in range(max_new_tokens):
            # A row's new token takes the place behind the row's last one. Two prompts, of 3 and 4
            # tokens; the new ones are 1 and 2:
            #
            #     prompts      a b c PAD    after two steps    a b c 1 2        (over its PAD)
            #                  d e f g                         d e f g 1 2
            if step > 0:
                n_keys = n_cache if compile else n_prompt + step
                logits = run_token(self.text, token, length + step - 1, cache, n_keys,
                                   real=~done)  # (B, V)
            token = sample(logits, temperature, top_p, generator)  # (B,)
            finite = finite & logits.amax(-1).isfinite()  # (B,)
            # A row that is done says its end once more, and so stays done.
            token = torch.where(done, ends[0], token)
            done = torch.isin(token, ends)
            said.append(token)
            if on_token is not None:
                on_token(token)

            # Stop when all rows are done, or at fault.
            if may_ask(tokens.device, step) and (done | ~finite).all():
                break

        if not finite.all():
            # Its keys are not numbers, and would spoil the next answer: 0 * NaN is NaN.
            self.cache = None
            raise ValueError(NOT_FINITE)
        return drop_idle_steps(torch.stack(said, 1), ends)  # (B, steps)

    def checkpointing(self, on=True):
        """Activation checkpointing, see run_block."""
        for part in (self.vision, self.audio, self.text):
            if part is not None:
                part.checkpointing = on

    @torch.no_grad()
    def init_weights(self, parts=("vision", "connector", "audio", "resampler", "text")):
        """New weights for these parts, see section 8. Weights on meta have no values to set."""
        for name, p in self.named_parameters():
            part = name.split(".")[0]
            if part in parts and not p.is_meta:
                init_weight(p, name, getattr(self, part))


def fill_slots(x, is_slot, features):
    """x (B, T, D), is_slot (B, T) bool, features (n, N, D) -> x, with features in its slots.

    Each place fetches the feature of the slot that it is, or else the one of the last slot before
    it, and drops that again:

        is slot     .   S   S   .   S   .
        number      0   0   1   1   2   2       cumulative sum - 1, at least 0
        takes       x   f0  f1  x   f2  x

    (masked_scatter does the same. But its gradient waits for the device.)
    """
    if features is None or len(features) == 0:
        return x
    number = (is_slot.flatten().cumsum(0) - 1).clamp(min=0)  # (B * T,)
    features = features.to(x.dtype).flatten(0, 1)  # (n * N, D)
    fetched = features.index_select(0, number).view_as(x)  # (B, T, D)
    return torch.where(is_slot.unsqueeze(-1), fetched, x)


# ------------------------------------------------------------------------------------------------
# You can stop here on a first reading. Below this line: images read at several scales, the ear,
# videos, the cache, compiled generation, LoRA, which weights train, checks, presets, counting.
# ------------------------------------------------------------------------------------------------
# 6. More to see in an image, and fewer tokens for it: S2, and the pixel shuffle


def encode_enlarged(tower, images, scale, routings):
    """images (n, 3, S, S) -> features (n, N, D), read off the images enlarged `scale` times.

    The tower knows one size, S. So the enlarged image is cut into scale x scale crops of that
    size; each is encoded alone; their features are laid side by side again, and averaged down to
    as many as an image at scale 1 has (arXiv 2403.13043). Small print becomes legible, and the
    decoder gets not one token more.
    """
    n = len(images)
    size = tower.config.image_size
    side = tower.config.side

    # Enlarge, in float32, as the released code does.
    big = F.interpolate(images.float(), scale_factor=scale, mode="bicubic")
    big = big.to(images.dtype)  # (n, 3, scale * S, scale * S)

    # Cut into crops: row by row, and from left to right.
    crops = big.view(n, 3, scale, size, scale, size)  # (n, 3, row, y, column, x)
    crops = crops.permute(0, 2, 4, 1, 3, 5)  # (n, row, column, 3, y, x)
    crops = crops.reshape(n * scale * scale, 3, size, size)  # (n * scale^2, 3, S, S)

    # Each crop is an image like any other.
    features = tower.encode(crops, routings)  # (n * scale^2, N, D)

    # Lay the crops' maps of features side by side, as the crops lie in the image.
    maps = features.view(n, scale, scale, side, side, -1)  # (n, row, column, y, x, D)
    maps = maps.permute(0, 5, 1, 3, 2, 4)  # (n, D, row, y, column, x)
    maps = maps.reshape(n, -1, scale * side, scale * side)  # (n, D, scale * side, scale * side)

    # Average scale x scale neighbours.
    maps = F.interpolate(maps.float(), size=(side, side), mode="area")  # (n, D, side, side)
    return maps.to(features.dtype).flatten(2).transpose(1, 2)  # (n, N, D)


def pixel_shuffle(x, factor):
    """x (n, N, D), the patches of a square, row by row -> (n, N / factor^2, factor^2 * D).

    Each square of factor x factor neighbours becomes one token, so that nothing is lost and the
    decoder reads a fraction of the tokens. Its numbers lie patch after patch, row by row, as in
    nanoVLM, SmolVLM (arXiv 2504.05299) and InternVL. (F.pixel_unshuffle has another order: all
    patches' first numbers, then all their second ones.)
    """
    side = math.isqrt(x.shape[1]) // factor
    x = x.unflatten(1, (side, factor, side, factor))  # (n, row, y, column, x, D)
    x = x.transpose(2, 3)  # (n, row, column, y, x, D)
    return x.flatten(3).flatten(1, 2)  # (n, row * column, y * x * D)


# ------------------------------------------------------------------------------------------------
# 7. Hearing: Whisper's encoder, and a resampler that makes few tokens of its many states


@dataclass
class AudioConfig:
    """Whisper's encoder, in the sizes of large-v2, and the resampler behind it."""
    n_mels: Size = 80
    n_frames: Size = 3000  # of a chunk of 30 s, 10 ms each
    dim: Size = 1280
    n_layers: Layers = 32
    n_heads: Size = 20
    ffn_dim: Size = 5120
    act: Activation = "gelu"
    norm_eps: Positive = 1e-5
    # The ear is dense. These three stand here since config.json has them for every sense.
    n_experts: Experts | list[Experts] = 0
    top_k: int = 2
    renormalise: bool | None = None
    n_queries: Size = 50  # AUDIO slots of a chunk
    n_query_layers: Layers = 2


def sinusoids(length, dim, device=None):
    """Whisper's positions (length, dim): sines, then cosines, wavelengths 2 pi to 20000 pi."""
    exponent = torch.linspace(0, 1, dim // 2, device=device, dtype=torch.float32)
    freq = 1e4 ** -exponent  # (dim / 2,)
    angle = torch.arange(length, device=device).unsqueeze(1) * freq  # (length, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], 1)


class AudioTransformer(nn.Module):
    """Whisper's encoder: log-mel spectra (m, n_mels, n_frames), 30 s each -> states (m, N, D)."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        # Sinusoids, which Whisper stores as weights.
        self.pos = nn.Parameter(torch.empty(config.n_frames // 2, dim))
        layers = range(config.n_layers)
        self.layers = nn.ModuleList(SenseBlock(config, k_bias=False) for _ in layers)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.checkpointing = False

    def forward(self, mel):
        """mel (m, n_mels, n_frames) -> (m, N, D), N = n_frames / 2."""
        check_shape("mel is", mel, (self.config.n_mels, self.config.n_frames))
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))  # (m, D, n_frames)
        x = F.gelu(self.conv2(x))  # (m, D, n_frames / 2)
        x = x.transpose(1, 2) + self.pos  # (m, N, D)
        for layer in self.layers:
            x, _ = run_block(self, layer, x)
        return self.norm(x)


class ResamplerBlock(SenseBlock):
    """A SenseBlock in which queries look at the states of a sound, and at each other."""

    def __init__(self, config):
        super().__init__(config, k_bias=False)
        self.norm_heard = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x, heard):
        """x (m, Q, D), heard (m, N, D) -> (m, Q, D)."""
        h = self.norm1(x)  # (m, Q, D)
        seen = torch.cat([self.norm_heard(heard), h], 1)  # (m, N + Q, D)
        x = x + self.attention(h, seen)
        h, _ = self.ffn(self.norm2(x))
        return x + h


class Resampler(nn.Module):
    """States of a sound (m, N, D_audio) -> the decoder's width (m, Q, D).

    30 s have 1500 states, which would fill the decoder's context. So Q = 50 learnt queries look
    at them, and what they find stands for the sound. Uni-MoE does this with Q-Formers (BLIP-2,
    arXiv 2301.12597): self-attention among the queries, then cross-attention, starting from the
    weights of BERT, or for speech from Whisper's decoder; then a linear layer. Here the two
    attentions are one, over states and queries together, as in Flamingo's Perceiver resampler
    (arXiv 2204.14198): half the weights, the same sight, and nothing to download.
    """

    def __init__(self, config, dim_out):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.n_queries, config.dim))
        self.layers = nn.ModuleList(ResamplerBlock(config) for _ in range(config.n_query_layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.out = nn.Linear(config.dim, dim_out)

    def forward(self, heard):
        x = self.queries.to(heard.dtype).expand(len(heard), -1, -1)  # (m, Q, D_audio)
        for layer in self.layers:
            x = layer(x, heard)
        return self.out(self.norm(x))  # (m, Q, D)


# ------------------------------------------------------------------------------------------------
# 8. New weights, blank images and sounds, videos, windows, long contexts


def run_block(tower, block, *args):
    """block(*args). With checkpointing, only the block's input is kept for the backward pass,
    which then computes the block a second time: slower, in far less memory."""
    if tower.checkpointing and tower.training and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def collect(routing, routings):
    """Add what a layer tells of its routing to the list, if it has experts and there is a list."""
    if routing is not None and routings is not None:
        routings.append(routing)


def init_weight(p, name, part):
    """A matrix from Normal(0, 0.64 / sqrt(inputs)), a bias 0. (A norm stays 1, as it is built.)

    At a width of 1024 that is GPT-2's 0.02, and at every other width it gives outputs of the same
    size. (With 0.02, a width of 128 begins with attention that is nearly uniform, and learns late.)
    """
    if name.split(".")[-1].startswith("b"):
        # A bias. (This comes first: a MoE's are stacked, and look like matrices.)
        nn.init.zeros_(p)
    elif name == "audio.pos":
        p.copy_(sinusoids(*p.shape, device=p.device))
    elif p.dim() > 1 or name == "vision.cls":
        is_convolution = p.dim() == 4 or ".conv" in name
        n_inputs = p[0].numel() if is_convolution else p.shape[-1]
        std = 0.64 * n_inputs ** -0.5
        # The two products of a block that add to the residual stream are made smaller, the more
        # blocks there are, as in GPT-2. Otherwise the stream grows with depth.
        if hasattr(part, "layers") and name.endswith(("o.weight", "w_out")):
            std /= (2 * len(part.layers)) ** 0.5
        nn.init.normal_(p, std=std)


def add_blank_images(model, tokens, images, frames, slots):
    """A blank image for each sample that has none, behind the others -> (images, frames).

    It fills no slot. The released code also adds one, and counts it in the auxiliary losses.
    It also makes every process run every module: otherwise DDP and FSDP would wait for each
    other for ever. data.collate appends them; this is for a caller that did not.
    """
    n_image_slots, n_without, _ = slots
    appended = count_images(images, frames) * model.config.n_image_tokens != n_image_slots
    if model.vision is None or n_without == 0 or appended:
        return images, frames

    side = model.config.vision.image_size
    blanks = torch.zeros(n_without, 3, side, side, device=tokens.device)
    if frames is not None:
        frames = F.pad(frames, (0, n_without), value=1)
    if images is not None:
        blanks = torch.cat([images, blanks.to(images)])
    return blanks, frames


def add_blank_sound(model, tokens, audio, slots):
    """The same for a batch without any sound. One chunk is enough, as the ear has no auxiliary
    loss that would count it."""
    has_sound = slots[2] > 0 or (audio is not None and len(audio) > 0)
    if model.audio is None or has_sound:
        return audio
    config = model.config.audio
    return torch.zeros(1, config.n_mels, config.n_frames, device=tokens.device)


def count_images(images, frames):
    """Images that fill slots; a video counts as one."""
    if images is None:
        return 0
    return len(images) if frames is None else len(frames)


def average_frames(embeds, frames, may_wait):
    """embeds (n, N, D) of images, frames (videos,): the next frames[i] of them are a video ->
    (videos, N, D), the mean over each video's frames. An image is a video of one frame.

    Without may_wait, frames are not checked where that means to wait for the device.
    The mean is over what the connector gives, as in the released Uni-MoE. So a video costs as many
    tokens as an image, and what it loses is the order of its frames.
    """
    if may_wait or frames.is_cpu:
        check_frames(frames, len(embeds))
    # Frames [3, 1, 2] -> video [0, 0, 0, 1, 2, 2]
    video = torch.repeat_interleave(frames, output_size=len(embeds))  # (n,)
    share = embeds / frames[video].to(embeds.dtype)[:, None, None]  # (n, N, D)
    return embeds.new_zeros(len(frames), *embeds.shape[1:]).index_add(0, video, share)


def visible_keys(positions, n_keys, window, sample_positions=None):
    """positions (B or 1, T) of the queries -> (B or 1, 1, T, n_keys) bool: what each may look at.

    That is the past and itself, and with a sliding window only the nearest `window` of these.
    sample_positions (B, T): each query's place in its sample. So many keys before it are of that
    sample; what lies further back is another one's. Two samples, of two tokens and of three:

        positions          0 1 2 3 4        sees   x . . . .
        sample_positions   0 1 0 1 2               x x . . .
                                                   . . x . .
                                                   . . x x .
                                                   . . x x x
    """
    keys = torch.arange(n_keys, device=positions.device)
    distance = positions.unsqueeze(-1) - keys  # (B, T, keys): how far back a key lies
    visible = distance >= 0
    if window:
        visible = visible & (distance < window)
    if sample_positions is not None:
        visible = visible & (distance <= sample_positions.unsqueeze(-1))  # (B, T, keys)
    return visible.unsqueeze(1)


def slow_down(freq, scaling):
    """Llama 3.1's way to longer contexts: freq (d / 2,), the turns of rope's pairs -> the same.

    Pairs that turn often within the old context tell neighbours apart, and stay as they are. Those
    that turn less than about once there are slowed down by `factor`. In between it is a mixture.
    """
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (keep + (1 - keep) / scaling["factor"])


# ------------------------------------------------------------------------------------------------
# 9. The two steps of generation and their cache, plain and compiled
#
# A decoding step is a few hundred tiny kernels, and to launch them from Python takes longer than
# they do. torch.compile fuses them, and on a GPU a step's kernels are recorded once, as a CUDA
# graph, which is launched in one go. A graph wants the same shapes and the same memory every time.
# So prompt and cache are padded to a few lengths ("rungs"), a step attends to the whole cache, and
# the cache is kept for the next call, with the graph that writes to it.


class Cache:
    """The keys and values of all tokens so far: layers[i] is (k, v), each (B, H_kv, length, d).

    Tensors of their own for each layer: of a larger one, torch.compile would copy all to write to
    a part of it.
    """

    def __init__(self, config, batch, length, device, dtype):
        self.key = (batch, length, device, dtype)  # compiled generation asks whether it fits again
        self.replay = None  # a step that is recorded as a CUDA graph, see recorded_step
        self.recorded_for = None  # and of which decoder
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        new = functools.partial(torch.zeros, shape, device=device, dtype=dtype)
        self.layers = [(new(), new()) for _ in range(config.n_layers)]


def write_keys(cache, positions, k, v, n_keys):
    """Writes k and v (B, H_kv, T, d) to positions (B or 1, T) of each row of a layer's cache (k, v)
    -> its first n_keys keys and values."""
    # Row b's token t goes to cache[b, :, positions[b, t]].
    rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)  # (B, 1)
    keys, values = cache
    keys[rows, :, positions] = k.transpose(1, 2)
    values[rows, :, positions] = v.transpose(1, 2)
    return keys[:, :, :n_keys], values[:, :, :n_keys]


def prefill(text, x, real, last, cache, run=None):
    """The prompt x (B, T, D), and last (B,), where each row's last token stands -> its logits
    (B, V)."""
    return text(x, real, cache=cache, run=run, last=last)


def decode(text, token, position, cache, n_keys, run=None, real=None):
    """One step: token (B,) at position (B,) -> logits of the next one (B, V).

    Attention looks at the first n_keys of the cache. real (B,) is False in rows that have ended:
    they take no expert's slots. Nothing in here waits for the device.
    """
    x = text.embed(token.unsqueeze(1))  # (B, 1, D)
    if real is None:
        real = torch.ones_like(token, dtype=torch.bool)
    real = real.unsqueeze(1)  # (B, 1)
    logits = text(x, real, cache=cache, positions=position.unsqueeze(1), n_keys=n_keys, run=run)
    return logits[:, 0]


@torch.no_grad()
def store_by_columns(text):
    """Turn a decoder's tall matrices in memory, in place, for steps on a CPU; nothing else changes.

    A step multiplies each matrix with one vector. torch's float32 kernel reads a tall matrix with
    short rows twice as fast where its columns are what lies side by side.
    """
    for w in text.parameters():
        if w.dim() == 2 and len(w) > 1000 and w.dtype == torch.float32:
            w.data = w.t().contiguous().t()  # (rows, columns) still


def sample(logits, temperature, top_p, generator=None):
    """logits (B, V) -> token (B,)."""
    # So near to 0 only the best token has a chance, and the division below would overflow.
    # (vLLM draws the same line.)
    if temperature < 1e-5:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (B, V) twice

    # Drop a token when those before it have top_p of the probability already.
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= top_p, 0)

    # Divide each p_i by a random number of the exponential distribution: number i comes out as the
    # largest with probability p_i. torch.multinomial does the same, but waits for the device.
    noise = torch.empty_like(p).exponential_(generator=generator)
    best = (p / noise).argmax(-1, keepdim=True)  # (B, 1)
    return ids.gather(-1, best).squeeze(-1)


def as_ends(eos, device):
    """One end of answers or a list of them -> (n,). Without any nothing ends: no token is -1."""
    if eos is None or eos == [] or eos == ():
        eos = -1
    return torch.tensor(eos, device=device).view(-1)


def may_ask(device, step):
    """Is this a step at which to ask the device whether all rows are done? To ask is to wait. So a
    GPU is asked at every eighth step only, and may run a few steps too far."""
    return device.type != "cuda" or step % 8 == 7


def drop_idle_steps(said, ends):
    """said (B, steps) without the steps behind the one in which the last row ended."""
    n_steps = int((~torch.isin(said, ends)).any(0).sum())  # in which some row went on
    return said[:, :n_steps + 1]


def rung(n):
    """The smallest of 64, 96, 128, 192, 256, 384, 512, ... that is at least n.

    So there are few lengths, and from 64 on at most a third of one is padding.
    """
    power = max(64, 2 ** (n - 1).bit_length())
    between = power * 3 // 4
    if power > 64 and n <= between:
        return between
    return power


def pad_to_rungs(tokens, n_cache):
    """tokens (B, T) and the length of their cache -> both on a rung; the prompt fits the cache."""
    n_cache = rung(n_cache)
    n_prompt = tokens.shape[1]
    return F.pad(tokens, (0, rung(n_prompt) - n_prompt), value=PAD), n_cache


def prepare_steps(model, x, n_cache, backend):
    """x (B, T, D) the prompt -> (prefill, decode, a Cache); compiled, if there is a backend."""
    # The type of keys and values: autocast's where that is on, otherwise the prompt's own.
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    key = (len(x), n_cache, x.device, dtype)
    if not backend:
        return prefill, decode, Cache(model.config.text, *key)

    # The cache of the last call is used again if it fits. Nobody looks at what it still holds.
    cache = model.cache
    if cache is None or cache.key != key:
        # Later calls write to it, too, also where this one runs in torch.inference_mode.
        with torch.inference_mode(False):
            cache = Cache(model.config.text, *key)
        model.cache = cache

    run_prompt = functools.partial(prefill, run=compiled(backend))
    if not may_record(model.config.text, x.device, dtype):
        return run_prompt, functools.partial(decode, run=compiled(backend)), cache
    return run_prompt, recorded_step(model.text, cache, backend), cache


@functools.cache
def compiled(backend, tuned=False):
    """-> run_block, compiled. The blocks are alike, so one that is compiled serves them all.

    (The 30 blocks of SmolLM2-135M took a CPU six minutes to compile as one graph, and so half a
    minute.) tuned: try out how to cut each kernel's work into tiles. (The steps of a 7B decoder,
    batch 1, were 1.16 times as fast for it on an H100.)
    """
    if backend is True:
        backend = "inductor"
    options = None
    if tuned and backend == "inductor":
        options = {"coordinate_descent_tuning": True}

    # One graph for each batch size and rung: more than the eight that are allowed.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(run_block, fullgraph=True, dynamic=False, backend=backend,
                         options=options)


def may_record(config, device, dtype):
    """Can a decoder's steps be recorded as a CUDA graph?

    What is recorded cannot wait for the host. In another type than bfloat16, experts go through
    kernels.moe_sorted, which reads the sizes of its slices there. And autocast keeps copies of
    weights, which a graph would look for where they no longer are.
    """
    waits = any(config.n_experts) and dtype != torch.bfloat16
    return device.type == "cuda" and not waits and not torch.is_autocast_enabled("cuda")


def recorded_step(text, cache, backend):
    """-> `decode` into this cache, as a CUDA graph that is recorded once and then launched anew.

    A graph holds kernels and addresses. When it is launched, the inputs are copied to where those
    of the recording were; and the logits always come to the same place, so read them before the
    next step.
    """
    # A graph of the call before serves again, unless the weights have moved, the config changed, or
    # adapters were merged.
    weights = itertools.chain(text.parameters(), text.buffers())
    merged = [lora.merged for _, _, lora in adapted(text)]
    decoder = [*(w.data_ptr() for w in weights), str(text.config), text.training, merged, backend]
    if cache.recorded_for != decoder:
        batch, n_keys, device, _ = cache.key
        run = compiled(backend, tuned=True)

        def step(token, position, real):
            return decode(text, token, position, cache, n_keys, run, real)

        # It runs the step a few times first, to compile it. Any tokens will do: what they write to
        # the cache, the prompt writes over.
        with torch.inference_mode(False):
            token = torch.zeros(batch, dtype=torch.long, device=device)
            inputs = token, token.clone(), torch.ones_like(token, dtype=torch.bool)
        with torch.cuda.device(device):
            cache.replay = torch.cuda.make_graphed_callables(step, inputs)
        cache.recorded_for = decoder

    def run_token(text, token, position, cache, n_keys, real):
        return cache.replay(token, position, real)
    return run_token


# ------------------------------------------------------------------------------------------------
# 10. LoRA (arXiv 2106.09685): train a few numbers instead of the weights
#
# The weight W stays as it is. What is learnt is a product of two thin matrices: W + alpha / rank *
# B A. B starts at zero, so nothing changes at first; and merged in the end, nothing is left of it.
#
# torch's parametrizations hide this from all other code: whoever reads `ffn.w_in` gets W + BA, be
# it a linear layer's weight or E stacked experts, each with its own A and B. The price is that W +
# BA is spelt out, where other code computes B (A x). In arithmetic that is next to nothing (`rank`
# multiplications a weight, however many tokens follow). In memory it is a copy of each such weight
# until the backward pass (with checkpointing, of one layer's weights), and W's gradient exists for
# a moment, before it becomes the gradients of A and B.


class LoRA(nn.Module):
    """The adapter of one weight w (..., out, in)."""

    def __init__(self, w, rank, alpha, generator, device):
        super().__init__()
        *experts, n_out, n_in = w.shape
        self.scale = alpha / rank
        self.merged = False

        # Drawn as in PEFT (Kaiming's uniform); the paper has a normal distribution.
        a = torch.empty(*experts, rank, n_in, device="cpu")
        a.uniform_(-n_in**-0.5, n_in**-0.5, generator=generator)
        b = torch.zeros(*experts, n_out, rank, device=device, dtype=w.dtype)
        self.a = nn.Parameter(a.to(device, w.dtype))  # (..., rank, in)
        self.b = nn.Parameter(b)  # (..., out, rank)

    def product(self, a, b):
        """What is added to the weight (..., out, in)."""
        return (self.scale * b) @ a

    def forward(self, w):
        """w (..., out, in) -> the same shape."""
        if self.merged:
            return w
        return w + self.product(self.a, self.b)


LORA_WEIGHTS = {"ffn": ["ffn.w_in", "ffn.w_gate", "ffn.w_out"]}
LORA_WEIGHTS["all"] = LORA_WEIGHTS["ffn"] + ["q.weight", "k.weight", "v.weight", "o.weight"]


def add_lora(model, rank, alpha, which="all", seed=0, real=False):
    """Adapters on the decoder's weights, in place: "ffn" those of the FFNs (which become experts),
    "all" those of attention too. The weights under them are frozen; biases, norms and routers are
    left alone.

    real: a model on meta, whose weights come later, gets its adapters now. In a state dict,
    "q.weight" becomes "q.parametrizations.weight.original", and A and B are
    "q.parametrizations.weight.0.a" and "q.parametrizations.weight.0.b".
    """
    if not (isinstance(rank, int) and rank >= 1 and alpha > 0):
        raise ValueError(f"LoRA: rank = {rank} must be a whole number above 0, alpha = {alpha} "
                         "above 0")
    if which not in LORA_WEIGHTS:
        raise ValueError(f"LoRA on {which!r} matches nothing; known: ffn, all")
    if adapted(model):
        raise ValueError("this model has LoRA adapters already; merge them first (drop_lora)")

    generator = torch.Generator().manual_seed(seed)  # the same adapters on every process
    for block in model.text.layers:
        for path in LORA_WEIGHTS[which]:
            module_name, name = path.split(".")
            module = getattr(block, module_name)
            w = getattr(module, name).requires_grad_(False)
            device = "cpu" if w.is_meta and real else w.device
            lora = LoRA(w, rank, alpha, generator, device)
            # Unsafe: without a trial run, which would read weights that are not there on meta.
            parametrize.register_parametrization(module, name, lora, unsafe=True)
    return model


def adapted(model):
    """(module, the name of its weight, the adapter on it) of each adapter."""
    found = []
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name, adapters in module.parametrizations.items():
                found.append((module, name, adapters[0]))
    return found


@torch.no_grad()
def merge_lora(model, on=True):
    """W += scale * B A, and the adapters rest. on=False takes that back, up to rounding.

    A state dict that is taken meanwhile counts BA twice in another model: take merge_state's.
    """
    for module, name, lora in adapted(model):
        if lora.merged != on:
            w = module.parametrizations[name].original
            w.add_(lora.product(lora.a, lora.b), alpha=1 if on else -1)
            lora.merged = on


def drop_lora(model):
    """Merge for good: plain weights with plain names, all of which want gradients again."""
    merge_lora(model)
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        # Torch has given the module a class of its own, derived from its plain class. torch's
        # remove_parametrizations would take the weight out of that class; but deep copies of the
        # module share the class, and would lose theirs. So the module returns to its plain class.
        weights = {name: w.original for name, w in module.parametrizations.items()}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, w in weights.items():
            module.register_parameter(name, w.requires_grad_(True))


def plain_name(name):
    """A name in the state dict of a model with adapters -> the name without them; None for A and B.

    "text.layers.0.q.parametrizations.weight.original" -> "text.layers.0.q.weight".
    """
    plain = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
    return None if ".parametrizations." in plain else plain


def merge_state(state, model):
    """What drop_lora(model) would leave in its state dict, while the model stays as it is.

    `state` is the model's state dict with whole tensors (gathered from all processes, say).
    """
    merged = {}
    for name, tensor in state.items():
        plain = plain_name(name)
        if plain is None:
            continue
        if plain != name:
            adapter = name.removesuffix("original") + "0"
            lora = model.get_submodule(adapter)
            if not lora.merged:
                tensor = tensor + lora.product(state[adapter + ".a"], state[adapter + ".b"])
        merged[plain] = tensor
    return merged


# ------------------------------------------------------------------------------------------------
# 11. Which weights train


def choose_trainable(model, trains):
    """Set requires_grad for the parts named in `trains` (see `part_parameters`), and for nothing
    else.

    Weights that no loss reaches stay frozen even then: DDP insists on a gradient for all others.
    ValueError for a model with LoRA adapters: add them afterwards, as they freeze what is below.
    """
    if adapted(model):
        raise ValueError("this model has LoRA adapters: choose what trains before add_lora")
    model.requires_grad_(False)
    for part in trains:
        for p in part_parameters(model, part):
            p.requires_grad_(True)
    if model.vision is not None:
        freeze_unreached_layers(model.vision)


def part_parameters(model, part):
    """The parameters of one of the model's modules ("vision", "connector", "audio", "resampler",
    "text"), or of "text.ffn" (all FFNs of the decoder), "text.moe" (those with experts) or
    "text.router"."""
    if not part.startswith("text."):
        module = getattr(model, part, None)
        if module is None:
            raise ValueError(f"this model has no part {part!r}")
        return list(module.parameters())
    if part not in ("text.ffn", "text.moe", "text.router"):
        raise ValueError(f"the decoder has no part {part!r}: text.ffn, text.moe or text.router")
    ffns = [layer.ffn for layer in model.text.layers]
    if part != "text.ffn":
        ffns = [ffn for ffn in ffns if isinstance(ffn, MoE)]
    if part == "text.router":
        return [moe.router for moe in ffns]
    return [p for ffn in ffns for p in ffn.parameters()]


def n_needed_layers(vision, with_losses):
    """Layers of the vision tower that must run. The features do not need those behind the select
    layer; but the released CuMo counts the routers there in the auxiliary losses."""
    needed = vision.n_used_layers
    if with_losses:
        for i, n_experts in enumerate(vision.n_experts):
            if n_experts > 0:
                needed = max(needed, i + 1)
    return needed


def freeze_unreached_layers(vision):
    """Freeze what lies behind the select layer, where the features are read off, but for routers.

    With select_layer -2 the last layer does not touch the features. When it is dense, it does not
    even run. When it has experts, its router still counts in the auxiliary losses (as in the
    released code), and what comes before its experts reaches the router; but the experts' outputs
    go nowhere.
    """
    n_used = vision.config.n_used_layers
    n_counted = n_needed_layers(vision.config, with_losses=True)
    vision.layers[n_counted:].requires_grad_(False)
    if n_counted > n_used:
        for name, p in vision.layers[n_counted - 1].ffn.named_parameters():
            if name != "router":
                p.requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# 12. Checks: of a configuration, and of what a model is given

PARTS = {
    "vision": VisionConfig,
    "connector": ConnectorConfig,
    "text": TextConfig,
    "audio": AudioConfig,
}
ROPE_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
KINDS_IN_ENGLISH = {
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    bool: "true or false",
    list: "a list",
    NoneType: "null",
}
# Numbers that are a multiple of another one of their part.
MULTIPLES = [("dim", "n_heads"), ("n_heads", "n_kv_heads")]


def part_from_dict(kind, values, where=""):
    """kind(**values). `where` stands in front of the key that an error names."""
    known = kind.__annotations__
    for key in values:
        if key not in known:
            raise ValueError(f"unknown config key {where + key!r}; known: {', '.join(known)}")
    return kind(**values)


def fill_in(config):
    """Turn dictionaries into parts, and write out what a configuration may leave out."""
    for name, kind in PARTS.items():
        part = getattr(config, name)
        if part is None and name in ("vision", "audio"):
            continue
        if isinstance(part, dict):
            part = part_from_dict(kind, part, name + ".")
        if not isinstance(part, kind):
            raise ValueError(f"{name} must be an object with {kind.__name__}'s fields, not "
                             f"{part!r}")
        setattr(config, name, part)
        check_fields(name + ".", kind, vars(part))

        # One number of experts holds for all layers.
        if name != "connector" and isinstance(part.n_experts, int):
            part.n_experts = [part.n_experts] * part.n_layers
        if name == "audio":
            if any(part.n_experts):
                raise ValueError(f"audio.n_experts = {part.n_experts}: the ear is dense, so 0")
            part.n_experts = [0] * part.n_layers
        check_experts(name, part)
    if config.text.head_dim is None:
        config.text.head_dim = config.text.dim // config.text.n_heads


def check_fields(where, kind, values):
    """ValueError for a value that its field's annotation does not allow.

    kind: the class of a part of the configuration; values: some or all of its fields, {name:
    value}; where: what stands in front of a field's name in the error. A field needs nothing but
    its annotation: int, float, str, bool, list, list[...], dict, dict[str, ...], A | B, None,
    Literal["a", "b"], or Annotated[int, lowest, highest].
    """
    annotations = get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        if not allows(annotations[name], value):
            raise ValueError(f"{where}{name} = {value!r:.60} must be "
                             f"{in_english(annotations[name])}")

    for multiple, of in MULTIPLES:
        if multiple in values and of in values and values[multiple] % values[of]:
            raise ValueError(f"{where}{multiple} = {values[multiple]} is not a multiple of "
                             f"{where}{of} = {values[of]}")


def allows(kind, value):
    """Is this a value for a field with this annotation?"""
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin is Annotated:
        number, lowest, highest = inner
        return allows(number, value) and lowest <= value <= highest
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(allows(inner[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(allows(inner[1], v) for v in value.values())
    if origin is not None:  # int | None
        return any(allows(one, value) for one in inner)
    if kind is float:
        # JSON may write 1.0 as 1. Infinity, "not a number" and what float32 cannot hold are none.
        return type(value) in (int, float) and abs(value) < 1e38
    # Not isinstance: to Python, True is the number 1.
    return type(value) is kind


def in_english(kind):
    """What an annotation asks for."""
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin is Annotated:
        number, lowest, highest = inner
        return f"{in_english(number)} from {lowest:g} to {highest:g}"
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is list:
        return f"a list, each entry {in_english(inner[0])}"
    if origin is dict:
        return f"an object, each value {in_english(inner[1])}"
    if origin is not None:
        return " or ".join(in_english(one) for one in inner)
    return KINDS_IN_ENGLISH.get(kind, "an object")


def check_experts(name, part):
    counts = part.n_experts
    if name == "connector":
        counts = [counts]
    elif len(counts) != part.n_layers:
        raise ValueError(f"{name}.n_experts lists {len(counts)} layers, {name}.n_layers is "
                         f"{part.n_layers}")
    for n_experts in counts:
        if n_experts != 0 and not 1 <= part.top_k <= n_experts:
            raise ValueError(f"{name}: top_k = {part.top_k} of n_experts = {n_experts}; need 1 <= "
                             "top_k <= n_experts, or 0 experts")


def validate(config):
    """Whether the numbers of a configuration fit together. ValueError names the field."""
    own = {name: value for name, value in vars(config).items() if name not in PARTS}
    check_fields("", Config, own)

    scaling = config.text.rope_scaling
    if scaling is not None:
        for wrong, word in ((ROPE_SCALING - scaling.keys(), "lacks"),
                            (scaling.keys() - ROPE_SCALING, "must not have")):
            if wrong:
                raise ValueError(f"text.rope_scaling {word} {', '.join(sorted(wrong))}")
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"text.rope_scaling = {scaling}: low_freq_factor must be below "
                             "high_freq_factor")
    check_even("text", config.text, "head_dim")  # rotary embeddings turn pairs of numbers

    if config.vision is not None:
        validate_vision(config.vision)
        side = config.vision.side
        if side % config.connector.pixel_shuffle:
            raise ValueError(f"connector.pixel_shuffle = {config.connector.pixel_shuffle} does not "
                             f"divide the {side} x {side} patches of the tower")

    if config.audio is not None:
        # A convolution halves the frames; the positions are half sines and half cosines.
        check_even("audio", config.audio, "n_frames")
        check_even("audio", config.audio, "dim")


def validate_vision(vision):
    if vision.image_size < vision.patch_size:
        raise ValueError(f"vision.image_size = {vision.image_size} must be at least "
                         f"vision.patch_size = {vision.patch_size}")

    lowest = -vision.n_layers - 1
    if not lowest <= vision.select_layer <= -1:
        raise ValueError(f"vision.select_layer = {vision.select_layer} must lie between {lowest} "
                         "and -1")

    if vision.post_norm and vision.select_layer != -1:
        raise ValueError("vision.post_norm = true: this norm follows the last layer, so it goes "
                         f"with select_layer = -1, not {vision.select_layer}")

    if vision.scales[:1] != [1]:
        raise ValueError(f"vision.scales = {vision.scales} must begin with 1, for example [1, 3]")

    for name in ("image_mean", "image_std"):
        colors = getattr(vision, name)
        if len(colors) != 3 or (name == "image_std" and min(colors) <= 0):
            raise ValueError(f"vision.{name} = {colors} must be three numbers, of red, green and "
                             "blue; image_std's above 0")


def check_even(where, part, name):
    value = getattr(part, name)
    if value % 2:
        raise ValueError(f"{where}.{name} = {value} must be even")


def check_shape(what, x, shape):
    if x.shape[1:] != shape or not x.is_floating_point():
        raise ValueError(f"{what} {tuple(x.shape)} {x.dtype}, the model takes (n, "
                         f"{', '.join(map(str, shape))}) of a float type (see data.py)")


def check_frames(frames, n_images):
    if torch.compiler.is_compiling() or frames.is_meta:
        return
    total = int(frames.sum())
    if total != n_images or (frames < 1).any():
        raise ValueError(f"frames {frames.tolist()} must be above 0 and add up to the number of "
                         f"images, {n_images}; they give {total}")


def check_slots(config, slots, image_embeds, audio_embeds):
    """slots: what count_slots gives. As many features as slots, or as many and the blanks."""
    n_image_slots, n_without, n_audio_slots = slots
    n_seen = count_features(image_embeds)
    n_heard = count_features(audio_embeds)
    if n_seen not in (n_image_slots, n_image_slots + n_without * config.n_image_tokens):
        raise ValueError(f"tokens have {n_image_slots} IMAGE slots, the images give {n_seen} "
                         f"features ({config.n_image_tokens} an image)")

    if config.audio is None and (n_audio_slots or n_heard):
        raise ValueError(f"tokens have {n_audio_slots} AUDIO slots, this model hears nothing")
    # Where nothing sounds at all, a blank chunk may be there.
    if n_heard != n_audio_slots and (n_audio_slots or n_heard != config.n_audio_tokens):
        raise ValueError(f"tokens have {n_audio_slots} AUDIO slots, the sounds give {n_heard} "
                         f"features ({config.n_audio_tokens} a chunk)")


def check_all_met(config, slots, images, audio, frames):
    """In generation, what is given without slots must be blank: the answer would ignore it, without
    a word."""
    n_image_slots, _, n_audio_slots = slots
    n_images = n_image_slots // max(1, config.n_image_tokens)
    if frames is not None:
        n_images = int(frames[:n_images].sum())
    check_met("images", images, n_images, f"{config.n_image_tokens} times IMAGE")
    n_chunks = n_audio_slots // max(1, config.n_audio_tokens)
    check_met("chunks of sound", audio, n_chunks, f"{config.n_audio_tokens} times AUDIO")


def check_met(what, given, n_met, slots):
    if given is not None and len(given) > n_met and given[n_met:].any():
        raise ValueError(f"{len(given)} {what} were given, and the tokens have slots for {n_met}: "
                         f"each wants {slots} where the text speaks of it")


def misplaced(tokens):
    """tokens (B, T) -> how many stand behind padding, and how many are marks that nobody knows."""
    is_pad = tokens == PAD
    known = (tokens >= 0) | is_pad | (tokens == IMAGE) | (tokens == AUDIO)
    return (is_pad[:, :-1] & ~is_pad[:, 1:]).sum(), (~known).sum()


def refuse_misplaced(n_behind, n_unknown):
    if n_behind:
        raise ValueError(f"tokens must be padded with PAD = {PAD} on the right only; {n_behind} "
                         "stand directly behind a PAD")
    if n_unknown:
        raise ValueError(f"tokens below 0 are IMAGE = {IMAGE}, AUDIO = {AUDIO} or PAD = {PAD}; "
                         f"there are {n_unknown} others (are these labels?)")


def count_features(embeds):
    return 0 if embeds is None else embeds.shape[:2].numel()


def check_sampling(max_new_tokens, temperature, top_p):
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"need max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1; got "
                         f"{max_new_tokens}, {temperature}, {top_p}")


NOT_FINITE = (
    "the model's logits are NaN or infinite, so no token is the best. Most likely so are its "
    "weights: a run that diverged (see its log.jsonl) or a damaged file. Or the numbers outgrew a "
    "narrow type: take bfloat16 or float32 instead of float16")


def check_prompt(tokens, max_new_tokens, limit, too_long):
    """No row is empty; and the prompt and its answer fit into what the decoder learnt to read, if
    that is known. (Transformers goes on with a warning, and the answers get worse.)"""
    real = tokens != PAD  # (B, T)
    if not real.any(1).all():
        raise ValueError(f"a row of tokens is empty: it holds nothing but PAD = {PAD}")
    if too_long not in ("error", "warn"):
        raise ValueError(f"too_long = {too_long!r} must be 'error' or 'warn'")
    if limit is None:
        return

    longest = int(real.sum(1).max())
    if longest + max_new_tokens > limit:
        message = (f"a prompt of {longest} tokens and up to {max_new_tokens} of the answer are "
                   f"more than the {limit} that this decoder learnt to read at once "
                   "(text.max_positions); shorten the prompt or the answer")
        if too_long == "error":
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


# ------------------------------------------------------------------------------------------------
# 13. Presets

# SigLIP's towers (arXiv 2303.15343), and SigLIP 2's of a fixed resolution (2502.14786). Which of
# their features are best is not settled. Here they are the last layer's behind the last norm, which
# SigLIP's own head reads, and with it nanoVLM, PaliGemma and SmolVLM. LLaVA-OneVision takes the
# input of the last layer, without a norm: select_layer -2, post_norm false.
SIGLIP = dict(
    act="gelu_pytorch_tanh",
    norm_eps=1e-6,
    n_prefix_tokens=0,
    pre_norm=False,
    patch_bias=True,
    post_norm=True,
    select_layer=-1,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
    image_aspect="stretch",
)
SIGLIP_B = dict(
    **SIGLIP,
    patch_size=16,
    dim=768,
    n_layers=12,
    n_heads=12,
    ffn_dim=3072,
    n_experts=4,
)
TINY_VISION = dict(
    image_size=48,
    patch_size=8,
    dim=128,
    n_layers=4,
    n_heads=4,
    ffn_dim=512,
)
TINY_TEXT = dict(
    vocab_size=512,
    dim=128,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=384,
    rope_theta=1e4,
)
LLAMA_7B = dict(
    n_kv_heads=32,
    ffn_dim=11008,
    rope_theta=1e4,
)
# What CuMo adds to LLaVA. These are the shapes of stage 3; train.py begins stages 1 and 2 without
# the experts.
CUMO = dict(
    vision=dict(scales=[1, 3], n_experts=4),
    connector=dict(n_experts=4),
)
# Uni-MoE has no auxiliary loss.
UNI_MOE = dict(
    audio=dict(),
    template="vicuna",
    balance_coef=0.0,
    z_coef=0.0,
)

PRESETS = {
    # Trains on a laptop's CPU in minutes: 48 x 48 pixels, 36 patches.
    "tiny": dict(
        vision=TINY_VISION,
        text=TINY_TEXT,
        template="tiny",
    ),
    # CuMo, Table 1: CLIP ViT-L/14-336 with S2 scales 1 and 3, and Mistral-7B-Instruct-v0.2 (which
    # has no sliding window).
    "cumo-mistral-7b": CUMO,
    "cumo-mixtral-8x7b": dict(**CUMO, text=dict(n_experts=8)),
    # The same around a decoder of TinyLlama-1.1B's shape (arXiv 2401.02385): what one GPU trains.
    "cumo-1b": dict(
        **CUMO,
        text=dict(
            dim=2048,
            n_layers=22,
            n_heads=32,
            n_kv_heads=4,
            ffn_dim=5632,
            rope_theta=1e4,
        ),
        template="vicuna",
    ),
    # CuMo around the parts of nanoVLM-222M (github.com/huggingface/nanoVLM, v0.1): SigLIP-B/16-224,
    # SmolLM2-135M (arXiv 2502.02737), 49 tokens an image. A consumer's GPU trains it.
    "cumo-smol": dict(
        vision=dict(**SIGLIP_B, image_size=224),
        connector=dict(n_experts=4, pixel_shuffle=2),
        text=dict(
            vocab_size=49152,
            dim=576,
            n_layers=30,
            n_heads=9,
            n_kv_heads=3,
            ffn_dim=1536,
            rope_theta=1e5,
            tie_embeddings=True,
            max_positions=8192,
        ),
        template="chatml",
    ),
    # The same around Qwen3-0.6B (arXiv 2505.09388), with nanoVLM's tower of today, which is
    # SigLIP2-B/16-512: 1024 patches, 64 tokens. (With experts SigLIP2-so400m has 1.2B weights,
    # twice as many as this decoder, and no GPU of 24 GB trains them.)
    "cumo-qwen3": dict(
        vision=dict(**SIGLIP_B, image_size=512),
        connector=dict(n_experts=4, pixel_shuffle=4),
        text=dict(
            vocab_size=151936,
            dim=1024,
            n_layers=28,
            n_heads=16,
            n_kv_heads=8,
            head_dim=128,
            ffn_dim=3072,
            norm_eps=1e-6,
            rope_theta=1e6,
            qk_norm=True,
            tie_embeddings=True,
            max_positions=40960,
        ),
        template="chatml",
    ),
    # MoE-LLaVA on OpenChat-7B, a Mistral: experts in every other layer of the decoder; all else is
    # LLaVA-1.5.
    "moe-llava-mistral-7b": dict(
        text=dict(
            rope_theta=1e4,
            sliding_window=4096,
            n_experts=[4, 0] * 16,
            capacity_factor=1.5,
            eval_capacity_factor=2.0,
            aux="sum",
        ),
        template="openchat",
        balance_coef=0.01,
        z_coef=0.0,
    ),
    # Uni-MoE: LLaMA-7B with an expert for each modality or task in every layer. The paper hears
    # speech with Whisper and other sounds with BEATs (arXiv 2212.09058); here one Whisper hears
    # everything.
    "uni-moe-7b": dict(**UNI_MOE, text=dict(**LLAMA_7B, n_experts=4)),
    "uni-moe-7b-every-other": dict(**UNI_MOE, text=dict(**LLAMA_7B, n_experts=[4, 0] * 16)),
    # The tiny preset with an ear, for sounds of 1.5 s.
    "uni-moe-tiny": dict(
        UNI_MOE,
        vision=TINY_VISION,
        audio=dict(
            n_frames=150,
            dim=128,
            n_layers=3,
            n_heads=4,
            ffn_dim=512,
            n_queries=16,
        ),
        text=dict(**TINY_TEXT, n_experts=4),
        template="tiny",
    ),
}

# ------------------------------------------------------------------------------------------------
# 14. Counting parameters


def count_parameters(model):
    """{part: (total, activated)}."""
    return {name: count(part) for name, part in model.named_children()}


def count(part):
    """(total, activated): a token passes through K of the E experts of a MoE, so K / E of their
    weights are activated."""
    total = sum(p.numel() for p in part.parameters())
    idle = 0
    for moe in part.modules():
        if isinstance(moe, MoE):
            n_experts = len(moe.router)
            n_weights = sum(p.numel() for p in moe.parameters()) - moe.router.numel()
            idle += n_weights // n_experts * (n_experts - moe.top_k)
    return total, total - idle


def in_words(n):
    """1234567 -> "1.23M"."""
    if n > 1e9:
        return f"{n / 1e9:.2f}B"
    return f"{n / 1e6:.2f}M"


# What the papers say; MoE-LLaVA and Uni-MoE count the decoder alone.
IN_PAPER = {
    ("cumo-mistral-7b", "all"): "8.26B / 7.80B",
    ("cumo-mixtral-8x7b", "all"): "47.7B / 13.5B",
    ("moe-llava-mistral-7b", "text"): "15.2B / 9.6B, which LLaMA-7B's shape has",
    ("uni-moe-7b", "text"): "19.7B / 11.1B",
    ("uni-moe-7b-every-other", "text"): "13.2B / 8.9B",
}


def main():
    print(f"{'preset':22} {'part':10} {'total':>16} {'activated':>16}")
    for preset in PRESETS:
        with torch.device("meta"):
            model = CuMo(Config.from_preset(preset))
        counts = count_parameters(model)
        counts["all"] = count(model)
        for part, (total, activated) in counts.items():
            line = f"{preset:22} {part:10} {total:16,} {activated:16,}"
            paper = IN_PAPER.get((preset, part))
            if part == "all" or paper is not None:
                line += f"   = {in_words(total)} / {in_words(activated)}"
            if paper is not None:
                line += f"   (paper: {paper})"
            print(line)
        print()


if __name__ == "__main__":
    main()
