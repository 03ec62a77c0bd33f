"""kernels.py: the hot path of a mixture of experts. Route tokens, send them to experts, bring the answers back.

A mixture-of-experts (MoE) block replaces one feed-forward network (FFN) by E of them, the experts, and a router that picks K for
each token. Parameters grow E-fold and arithmetic only K-fold. In plain words, for each token x:

    p = softmax(router(x))                     how much does x want each expert?
    pick the K largest p, rescale them to sum to 1
    y = sum over those K of  p_k * expert_k(x)

The mathematics is that short. What makes MoE code hard to read is speed: experts want big matrix products, but tokens choose them
one by one. `moe_ffn` has three backends that give the same answer:

    loop      the definition, one expert after the other. Read this one.
    sorted    sort the (token, choice) pairs by expert once; each expert then owns a contiguous slice. Any device, any dtype.
    grouped   the same order, but one `grouped_mm` kernel multiplies all slices at once; nothing waits for the host (CUDA bf16).

The released CuMo code loops over samples *and* experts in Python; MoE-LLaVA's lives inside DeepSpeed. This file needs torch only
and can be lifted out alone. `python tests/bench.py layers` times the backends.

Shapes, used throughout: N tokens, D width, F FFN width, E experts, K top-k, "..." any leading dimensions (images, say).
"""
import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# 1. Routing: logits -> who goes where, how much it counts, and how even the load is


class Routing(NamedTuple):
    """What a router decided. `weights` (..., N, K) float32, 0 where a choice was dropped or the token is masked; `experts`
    (..., N, K) int64, best choice first; `balance` and `z` the two auxiliary losses, float32 scalars."""
    weights: Tensor
    experts: Tensor
    balance: Tensor
    z: Tensor


def route(logits: Tensor, top_k: int, mask: Tensor | None = None, capacity_factor: float | None = None,
          min_capacity: int = 0, noise: Tensor | None = None) -> Routing:
    """Top-k routing with the balance and z losses of CuMo (section 3.2; ST-MoE eq. 5 for z).

    logits (..., N, E), any float dtype. mask (..., N) bool, False for padding, which gets weight 0 and counts nowhere.
    capacity_factor: None drops nothing; else expert slots are limited as in DeepSpeed's top-2 gate, which MoE-LLaVA uses.
    noise (..., N, E): added to the logits when the choices behind the first are made (that gate's Gumbel noise), and nowhere else.
    Raises ValueError for a top_k outside 1..E and a capacity factor that is not positive.

    The losses are means over the N tokens of each leading index and then over the leading indices: with (images, tokens, E) the
    load is evened out inside every single image, which is what the released CuMo code does.
    """
    n_experts = logits.shape[-1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k = {top_k} must lie between 1 and the number of experts, {n_experts}")
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(f"capacity_factor = {capacity_factor} must be positive, or None to drop nothing")
    logits = logits.float()                                                  # bf16 has too few digits for a softmax
    p = logits.softmax(-1)                                                   # (..., N, E)
    if noise is None:
        weights, experts = p.topk(top_k, dim=-1)                             # (..., N, K) twice, largest first
    else:
        first = p.argmax(-1, keepdim=True)
        others = (logits + noise).scatter(-1, first, -torch.inf).topk(top_k - 1, dim=-1).indices
        experts = torch.cat([first, others], -1)
        weights = p.gather(-1, experts)
    real = None if mask is None else mask.unsqueeze(-1).to(p.dtype)          # (..., N, 1) 1 for tokens, 0 for padding

    def mean(t):                                                             # over the tokens: (..., N, C) -> (..., C)
        # no einsum: autocast makes it bf16
        return t.sum(-2) / max(1, t.shape[-2]) if real is None else (t * real).sum(-2) / real.sum(-2).clamp(min=1)

    # Balance: fraction of tokens whose first choice is e, times mean probability of e. Only the second factor carries gradient:
    # an expert that is chosen too often has its probability pushed down. Perfectly even gives exactly 1.
    first = _one_hot(experts[..., 0], n_experts).to(p.dtype)                 # (..., N, E)
    balance = n_experts * (mean(p) * mean(first)).sum(-1)                    # (...)
    # z: keeps the logits small, where float rounding cannot flip a choice and the softmax still has gradient.
    z = mean(logits.logsumexp(-1, keepdim=True).square()).squeeze(-1)        # (...)
    if mask is not None:
        weights = weights * real
        row = mask.any(-1).to(p.dtype)                                       # rows that are padding only count nowhere
        balance, z = (balance * row).sum() / row.sum().clamp(min=1), (z * row).sum() / row.sum().clamp(min=1)
    if capacity_factor is not None:
        weights = weights * _within_capacity(experts, mask, n_experts, capacity_factor, min_capacity)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)                     # not a clamp to tiny: its gradient overflows
    return Routing(weights, experts, balance.mean(), z.mean())


def _one_hot(index: Tensor, n: int) -> Tensor:
    """index (...) int64 -> (..., n) bool. F.one_hot looks at the values first, and where it does, that is a wait for them."""
    return index.unsqueeze(-1) == torch.arange(n, device=index.device)


def _within_capacity(experts: Tensor, mask: Tensor | None, n_experts: int, factor: float, min_capacity: int) -> Tensor:
    """1 where a choice still finds a free slot at its expert, else 0: (..., N, K).

    Every expert has `capacity` slots. They fill in token order, all first choices before any second choice; who comes too late is
    dropped. DeepSpeed counts padding as tokens; here padding takes no slot.
    """
    top_k = experts.shape[-1]
    real = torch.ones_like(experts[..., 0]) if mask is None else mask.long()         # (..., N)
    n_real = real.sum(-1, keepdim=True).double()                                     # (..., 1) float64: ceil must be exact
    capacity = (n_real * top_k * factor / n_experts).ceil().clamp(min=min_capacity)  # (..., 1)
    queue = _one_hot(experts.transpose(-1, -2), n_experts) * real[..., None, :, None]   # (..., K, N, E)
    place = queue.flatten(-3, -2).cumsum(-2).view_as(queue) * queue                  # 1 for the first in line at its expert
    return (place.sum(-1).transpose(-1, -2) <= capacity.unsqueeze(-1)).float()


# ---------------------------------------------------------------------------------------------------------------------
# 2. One FFN, and E of them

def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "silu": F.silu}


def ffn(x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None, b_in: Tensor | None = None,
        b_out: Tensor | None = None, act: str = "gelu") -> Tensor:
    """A dense FFN. x (..., D), w_in (F, D), w_out (D_out, F), biases (F,), (D_out,) -> (..., D_out).

    With w_gate (F, D) it is the gated FFN of LLaMA (act "silu" makes it SwiGLU): act(x W_gate) * (x W_in), then W_out."""
    h = F.linear(x, w_in, b_in)                                              # (..., F)
    h = ACTIVATIONS[act](h) if w_gate is None else ACTIVATIONS[act](F.linear(x, w_gate)) * h
    return F.linear(h, w_out, b_out)


class FFN(nn.Module):
    """A dense FFN.

    Weights lie as in nn.Linear, (out, in), and have the names that MoE stacks. So to upcycle
    one is a single torch.stack.
    """

    def __init__(self, dim, ffn_dim, act, dim_out=None, gated=False, bias=False):
        super().__init__()
        if dim_out is None:
            dim_out = dim
        self.act = act
        self.w_in = nn.Parameter(torch.empty(ffn_dim, dim))
        self.w_gate = nn.Parameter(torch.empty(ffn_dim, dim)) if gated else None
        self.w_out = nn.Parameter(torch.empty(dim_out, ffn_dim))
        self.b_in = nn.Parameter(torch.zeros(ffn_dim)) if bias else None
        self.b_out = nn.Parameter(torch.zeros(dim_out)) if bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None):
        """x (..., D) -> (..., D_out), and None in the place of a Routing."""
        y = ffn(x, self.w_in, self.w_out, self.w_gate, self.b_in, self.b_out, self.act)
        return y, None


class MoE(nn.Module):
    """E such FFNs and a router, which has no bias.

    capacity_factor limits the experts' slots in training and eval_capacity_factor outside of it;
    None drops nothing. noisy draws the second choice with Gumbel noise while training.
    """

    def __init__(self, dim, ffn_dim, act, n_experts, top_k, dim_out=None, gated=False, bias=False,
                 capacity_factor=None, eval_capacity_factor=None, min_capacity=0, noisy=False):
        super().__init__()
        if dim_out is None:
            dim_out = dim
        self.act = act
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy = noisy

        # None lets moe_ffn choose the backend
        self.backend = None
        # the ranks that share the experts, see moe_parallel; None: every rank has them all
        self.group = None

        self.router = nn.Parameter(torch.empty(n_experts, dim))
        self.w_in = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.w_gate = nn.Parameter(torch.empty(n_experts, ffn_dim, dim)) if gated else None
        self.w_out = nn.Parameter(torch.empty(n_experts, dim_out, ffn_dim))
        self.b_in = nn.Parameter(torch.zeros(n_experts, ffn_dim)) if bias else None
        self.b_out = nn.Parameter(torch.zeros(n_experts, dim_out)) if bias else None

    def forward(self, x: Tensor, mask: Tensor | None = None):
        """x (..., N, D), mask (..., N) False at padding -> (..., N, D_out) and the Routing.

        With a capacity factor the answer for a token depends on its company, since the tokens of a
        batch compete for slots. That holds in generation too, where a prompt is routed whole and
        every later step routes one token a row.
        """
        # MoE-LLaVA keeps its routers in float32
        logits = F.linear(x.to(self.router.dtype), self.router)  # (..., N, E)

        # DeepSpeed draws the noise in evaluation too; here an answer can be repeated
        noise = None
        if self.noisy and self.training:
            noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()

        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        r = route(logits, self.top_k, mask, factor, self.min_capacity, noise)
        y = moe_ffn(x, r, self.w_in, self.w_out, self.w_gate, self.b_in, self.b_out, self.act,
                    self.backend, self.group)
        return y, r


def feed_forward(dim, ffn_dim, act, n_experts=0, top_k=2, dim_out=None, gated=False, bias=False,
                 **limits):
    """An FFN, or with n_experts above 0 a MoE of that shape. Only a MoE looks at `limits`."""
    if n_experts == 0:
        return FFN(dim, ffn_dim, act, dim_out, gated, bias)
    return MoE(dim, ffn_dim, act, n_experts, top_k, dim_out, gated, bias, **limits)


def moe_ffn(x: Tensor, r: Routing, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None, b_in: Tensor | None = None,
            b_out: Tensor | None = None, act: str = "gelu", backend: str | None = None, group=None) -> Tensor:
    """y = sum_k weights[:, k] * FFN_{experts[:, k]}(x).

    x (..., N, D); r as `route` gave it for those tokens; w_in, w_gate (E, F, D), w_out (E, D_out, F), b_in (E, F),
    b_out (E, D_out). Returns (..., N, D_out) in x's dtype (autocast's inside autocast). backend: "loop", "sorted", "grouped",
    or None to choose: grouped for bf16 on CUDA (and on meta, where train.py --plan stands for it), else sorted. group: the ranks that
    share the experts (`moe_parallel`). Raises ValueError for an unknown backend or activation, and for grouped with another dtype
    than bf16."""
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(ACTIVATIONS)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):           # on meta there are only shapes
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if backend is None:
        backend = "grouped" if x.device.type in ("cuda", "meta") and x.dtype == torch.bfloat16 else "sorted"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if r.experts.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"routing is for tokens {tuple(r.experts.shape[:-1])}, x has tokens {tuple(x.shape[:-1])}")
    top_k = r.experts.shape[-1]
    run = BACKENDS[backend] if group is None else functools.partial(moe_parallel, run=BACKENDS[backend], group=group)
    y = run(x.reshape(-1, x.shape[-1]), r.weights.reshape(-1, top_k).to(x.dtype), r.experts.reshape(-1, top_k),
            w_in, w_out, w_gate, b_in, b_out, act)
    return y.view(*x.shape[:-1], w_out.shape[1])


def _per_expert(*weights):
    """[(w_in, w_out, ...) of expert 0, of expert 1, ...]; None stays None. With unbind the backward pass stacks the experts'
    gradients once; with w[e] it would fill a whole (E, ...) tensor with zeros for every expert."""
    return list(zip(*([None] * len(weights[0]) if w is None else w.unbind(0) for w in weights)))


def moe_loop(x, weights, experts, w_in, w_out, w_gate, b_in, b_out, act):
    """The definition. x (N, D), weights and experts (N, K) -> (N, D_out)."""
    y = x.new_zeros(x.shape[0], w_out.shape[1])
    for e, expert in enumerate(_per_expert(w_in, w_out, w_gate, b_in, b_out)):
        token, choice = torch.where(experts == e)                            # who chose expert e, and as which choice
        w = weights[token, choice].unsqueeze(-1)                             # (n_e, 1)
        y = y.index_add(0, token, w * ffn(x[token], *expert, act))
    return y


class _Gather(torch.autograd.Function):
    """rows[index], for an index that holds every row K times, grouped by `inverse` (rows.shape[0] * K,) into K per row.

    The gradient of indexing is a scatter-add, slow on a CPU and non-deterministic on a GPU. But we know where each row's K copies
    went, so the gradient is a gather too, followed by a sum over K."""
    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(inverse)
        ctx.n = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return (grad if grad.shape[0] == ctx.n else grad.view(ctx.n, -1, grad.shape[-1]).sum(1)), None, None


def _sort_by_expert(x, experts, n_experts):
    """Copies of x's rows in expert order (N*K, D), tokens per expert (E,), the order and its inverse (N*K,)."""
    flat = experts.flatten()                                                 # (N*K,) token 0's choices, token 1's, ...
    order = flat.argsort(stable=True)                                        # pairs by expert, in token order inside each
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = _one_hot(flat, n_experts).sum(0)                                # bincount, without a wait for the host
    return _Gather.apply(x, order // experts.shape[-1], inverse), counts, order, inverse


class _Combine(torch.autograd.Function):
    """Expert outputs in sorted order (N*K, D_out) -> back in token order, weighted and summed over K: (N, D_out).

    By hand for its way back: autograd would write weight times gradient in token order and sort that afterwards; here each sorted row
    fetches its token's gradient and its own weight at once."""
    @staticmethod
    def forward(ctx, out, weights, order, inverse):
        rows = out.index_select(0, inverse).view(*weights.shape, out.shape[-1])        # (N, K, D_out)
        ctx.save_for_backward(rows, weights, order)
        y = rows[:, 0] * weights[:, :1]
        for k in range(1, weights.shape[1]):
            y = y.addcmul_(rows[:, k], weights[:, k:k + 1])
        return y

    @staticmethod
    def backward(ctx, grad):
        rows, weights, order = ctx.saved_tensors
        of_out = grad.index_select(0, order // weights.shape[1]).mul_(weights.flatten()[order].unsqueeze(-1))
        return of_out, torch.linalg.vecdot(rows, grad.unsqueeze(1)), None, None


def _grouped(counts, expert):
    """-> product(a, w, b) in one kernel: only the int32 ends of the slices go in, and they stay on the device.

    grouped_mm wants row strides that are multiples of 16 bytes, so widths that are not multiples of 8 are padded with zeros, which
    change no product. It takes no bias, so each row fetches its expert's."""
    ends = counts.cumsum(0).to(torch.int32)                                  # (E,) an expert without tokens repeats the last end

    def product(a, w, b):
        pad_i, pad_o = -w.shape[2] % 8, -w.shape[1] % 8
        if pad_i or pad_o:
            a, w = F.pad(a, (0, pad_i)), F.pad(w, (0, pad_i, 0, pad_o))
        out = F.grouped_mm(a.contiguous(), w.to(a.dtype).contiguous().transpose(-2, -1), offs=ends)
        out = out[:, :w.shape[1] - pad_o]
        return out if b is None else out + b.to(out.dtype).index_select(0, expert)
    return product


def moe_sorted(x, weights, experts, w_in, w_out, w_gate, b_in, b_out, act):
    """As moe_loop. Sorted by expert, the rows of each expert are one contiguous slice."""
    x, counts, order, inverse = _sort_by_expert(x, experts, w_in.shape[0])
    slices = x.split(_row_counts(counts, len(x)))
    per_expert = _per_expert(w_in, w_out, w_gate, b_in, b_out)
    out = torch.cat([ffn(rows, *expert, act) for rows, expert in zip(slices, per_expert)])
    return _Combine.apply(out, weights, order, inverse)


# torch.compile takes the slices' sizes into its graph then; otherwise the graph ends where they
# are read
torch._dynamo.config.capture_scalar_outputs = True


def _row_counts(counts: Tensor, n_rows: int) -> list[int]:
    """counts (E,) of n_rows rows -> the same as a list, which is the one wait for the device."""
    if torch.compiler.is_compiling():
        # A graph is made for any sizes. It must be told what can be said of all of them
        sizes = counts.tolist()
        for size in sizes:
            torch._check(size >= 0)
        torch._check(sum(sizes) == n_rows)
        return sizes
    if counts.is_meta:
        # There are no values. An even split stands for any other, as it costs the same
        even, rest = divmod(n_rows, len(counts))
        return [even + 1] * rest + [even] * (len(counts) - rest)
    return counts.tolist()


def moe_grouped(x, weights, experts, w_in, w_out, w_gate, b_in, b_out, act):
    """As moe_sorted, without the host knowing the segments: nothing waits."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"backend 'grouped' computes in bfloat16, x is {x.dtype}; use backend 'sorted' or cast x")
    x, counts, order, inverse = _sort_by_expert(x, experts, w_in.shape[0])
    product = _grouped(counts, experts.flatten()[order])                     # (N*K,) the expert of each sorted row
    h = product(x, w_in, b_in)                                               # (N*K, F)
    h = ACTIVATIONS[act](h) if w_gate is None else ACTIVATIONS[act](product(x, w_gate, None)) * h
    return _Combine.apply(product(h, w_out, b_out), weights, order, inverse)


BACKENDS = {"loop": moe_loop, "sorted": moe_sorted, "grouped": moe_grouped}

# Expert parallelism: GShard's (arXiv 2006.16668), in Uni-MoE "expert-level model parallelism". Experts too many for one device are dealt
# out to the ranks of a group, and tokens travel to them. Every rank routes its own tokens (routers are small: all have the same). Sorted
# by expert, the (token, choice) pairs are sorted by rank too, so one exchange of contiguous pieces takes each to where its expert lives:
#
#         rank 0 keeps experts 0 and 1          rank 1 keeps experts 2 and 3
#         its tokens want  0 0 1 | 2 3 3        its tokens want  0 1 1 1 | 3
#                            |       \___________________  _______/      |
#                            |        ___________________\/____          |        all-to-all: piece r goes to rank r
#                            |       /                          \        |
#         it runs          0 0 1 | 0 1 1 1      it runs        2 3 3 | 3
#
# Answers go back in the same way, gradients the same two ways in reverse. An expert's gradient so holds the whole group's tokens.


class _AllToAll(torch.autograd.Function):
    """Rows (sum(send), D), cut into one piece a rank, -> the pieces that this rank gets from each rank (sum(receive), D)."""
    @staticmethod
    def forward(ctx, rows, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):                                                 # what came from a rank has its gradient sent there
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


@torch.compiler.disable                                                      # its sizes are known only when it runs
def moe_parallel(x, weights, experts, w_in, w_out, w_gate, b_in, b_out, act, run, group):
    """As moe_loop, on each rank of the group for its own tokens: x (N, D), weights and experts (N, K) as ever, N may differ or be 0.
    But w_in (E / ranks, F, D) and the others are this rank's experts alone: rank r has the r-th part. `run` is the backend.

    Every rank must call it equally often, or the others wait for ever. Dropped choices travel too, and come back with weight 0."""
    n, mine = dist.get_world_size(group), w_in.shape[0]
    rows, counts, order, inverse = _sort_by_expert(x, experts, n * mine)     # (N*K, D), (E,)
    asked = torch.empty_like(counts)                                         # (E,) from each rank in turn: pairs for each expert here
    dist.all_to_all_single(asked, counts, group=group)
    send, receive = torch.stack([counts, asked]).view(2, n, mine).sum(2).tolist()     # the one wait for the device
    rows = _AllToAll.apply(rows, send, receive, group)                       # (M, D)
    expert = torch.arange(mine, device=x.device).repeat(n).repeat_interleave(asked, output_size=sum(receive))          # (M,)
    out = run(rows, rows.new_ones(len(rows), 1), expert.unsqueeze(1), w_in, w_out, w_gate, b_in, b_out, act)           # (M, D_out)
    return _Combine.apply(_AllToAll.apply(out, receive, send, group), weights, order, inverse)
