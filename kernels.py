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
and can be lifted out alone. `python kernels.py` checks the backends against each other and times them.

Shapes, used throughout: N tokens, D width, F FFN width, E experts, K top-k, "..." any leading dimensions (images, say).
"""
import argparse
import ctypes
import functools
import os
import platform
import sys
import time
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "silu": F.silu}


def ffn(x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None, b_in: Tensor | None = None,
        b_out: Tensor | None = None, act: str = "gelu") -> Tensor:
    """A dense FFN. x (..., D), w_in (F, D), w_out (D_out, F), biases (F,), (D_out,) -> (..., D_out).

    With w_gate (F, D) it is the gated FFN of LLaMA (act "silu" makes it SwiGLU): act(x W_gate) * (x W_in), then W_out."""
    h = F.linear(x, w_in, b_in)                                              # (..., F)
    h = ACTIVATIONS[act](h) if w_gate is None else ACTIVATIONS[act](F.linear(x, w_gate)) * h
    return F.linear(h, w_out, b_out)


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
            y = torch.addcmul(y, rows[:, k], weights[:, k:k + 1])
        return y

    @staticmethod
    def backward(ctx, grad):
        rows, weights, order = ctx.saved_tensors
        of_out = grad.index_select(0, order // weights.shape[1]).mul_(weights.flatten()[order].unsqueeze(-1))
        return of_out, torch.linalg.vecdot(rows, grad.unsqueeze(1)), None, None


# All experts on rows in expert order. Each takes its segment through the whole FFN before the next begins, while its rows are still in
# the cache. Every product is written where it belongs: rows of one output, one expert's slice of a gradient. Autograd over split, `ffn`
# and cat computes the same and copies all of it once more. As operators they are one node each to torch.compile, whatever the sizes are.

_INTO = {"gelu": torch.ops.aten.gelu.out, "silu": torch.ops.aten.silu.out,                         # ACTIVATIONS, written to `out`
         "quick_gelu": lambda x, out: torch.mul(x, torch.sigmoid(1.702 * x), out=out)}


def _quick_gelu_backward(grad, x):
    s = torch.sigmoid(1.702 * x)
    return grad * s * (1 + 1.702 * x * (1 - s))


_DERIVATIVES = {"gelu": torch.ops.aten.gelu_backward, "silu": torch.ops.aten.silu_backward, "quick_gelu": _quick_gelu_backward}


def _ffn_outputs(x, w_in, w_out, w_gate, b_in, b_out, counts, act):
    n, hidden = x.shape[0], (x.shape[0], w_in.shape[1])                      # not len: torch.compile would take it for a constant
    return x.new_empty(n, w_out.shape[1]), x.new_empty(hidden), x.new_empty(hidden), x.new_empty(hidden if w_gate is not None else 0)


def _ffn_gradients(grad, x, h, a, gate, w_in, w_out, w_gate, counts, act, needs):
    like = x, w_in, w_out, w_gate, w_in[:, :, 0], w_out[:, :, 0]
    return [torch.empty_like(t) if need else grad.new_empty(0) for t, need in zip(like, needs)]    # those that nobody needs stay empty


def _segments(counts):
    """-> each expert and its rows. One wait for the device, on CUDA."""
    start = 0
    for e, n in enumerate(counts.tolist()):
        yield e, slice(start, start + n)
        start += n


@torch.library.custom_op("nanocumo::ffn_segments", mutates_args=())
def ffn_segments(x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None, b_in: Tensor | None, b_out: Tensor | None,
                 counts: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, D), counts (E,) rows for each expert -> (M, D_out), and for the way back x W_in, what W_out multiplies, x W_gate: (M, F)."""
    out, h, a, gate = _ffn_outputs(x, w_in, w_out, w_gate, b_in, b_out, counts, act)

    def product(t, w, b, into):
        torch.mm(t[rows], w[e].t(), out=into[rows]) if b is None else torch.addmm(b[e], t[rows], w[e].t(), out=into[rows])
    for e, rows in _segments(counts):
        product(x, w_in, b_in, h)
        if w_gate is None:
            _INTO[act](h[rows], out=a[rows])
        else:
            product(x, w_gate, None, gate)
            torch.mul(ACTIVATIONS[act](gate[rows]), h[rows], out=a[rows])
        product(a, w_out, b_out, out)
    return out, h, a, gate


@torch.library.custom_op("nanocumo::ffn_segments_backward", mutates_args=())
def ffn_segments_backward(grad: Tensor, x: Tensor, h: Tensor, a: Tensor, gate: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None,
                          counts: Tensor, act: str, needs: list[bool]) -> list[Tensor]:
    """grad (M, D_out) of the output -> gradients of x, w_in, w_out, w_gate, b_in, b_out, those that `needs` names."""
    dx, dw_in, dw_out, dw_gate, db_in, db_out = gradients = _ffn_gradients(grad, x, h, a, gate, w_in, w_out, w_gate, counts, act, needs)
    for e, rows in _segments(counts):
        if needs[2]:
            torch.mm(grad[rows].t(), a[rows], out=dw_out[e])                 # an expert without tokens: no rows, so zero
        if needs[5]:
            torch.sum(grad[rows], 0, out=db_out[e])
        da = grad[rows] @ w_out[e]                                           # (n_e, F)
        if w_gate is None:
            dh = _DERIVATIVES[act](da, h[rows])
        else:
            dh, dgate = da * ACTIVATIONS[act](gate[rows]), _DERIVATIVES[act](da * h[rows], gate[rows])
        if needs[0]:
            torch.mm(dh, w_in[e], out=dx[rows])
            if w_gate is not None:
                dx[rows].addmm_(dgate, w_gate[e])
        if needs[1]:
            torch.mm(dh.t(), x[rows], out=dw_in[e])
        if needs[3]:
            torch.mm(dgate.t(), x[rows], out=dw_gate[e])
        if needs[4]:
            torch.sum(dh, 0, out=db_in[e])
    return gradients


ffn_segments.register_fake(_ffn_outputs)
ffn_segments_backward.register_fake(_ffn_gradients)


def _ffn_save(ctx, inputs, output):
    x, w_in, w_out, w_gate, _, _, counts, ctx.act = inputs
    ctx.save_for_backward(x, *output[1:], w_in, w_out, w_gate, counts)
    ctx.set_materialize_grads(False)                                         # of the three that are for the way back only


def _ffn_backward(ctx, grad, *_):
    needs = list(ctx.needs_input_grad[:6])
    out = ffn_segments_backward(grad.contiguous(), *ctx.saved_tensors, ctx.act, needs)
    return *(g if need else None for g, need in zip(out, needs)), None, None


ffn_segments.register_autograd(_ffn_backward, setup_context=_ffn_save)


@register_flop_formula(torch.ops.nanocumo.ffn_segments)                      # FlopCounterMode does not look into an operator
def _(x, w_in, w_out, w_gate, *args, out_shape=None, **kw):
    return 2 * x[0] * w_in[1] * (x[1] * (1 if w_gate is None else 2) + w_out[1])


@register_flop_formula(torch.ops.nanocumo.ffn_segments_backward)
def _(grad, x, h, a, gate, w_in, w_out, w_gate, counts, act, needs, out_shape=None, **kw):
    gates = 1 if w_gate is None else 2
    return 2 * x[0] * w_in[1] * (w_out[1] * (1 + needs[2]) + x[1] * (gates * needs[0] + needs[1] + needs[3]))


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
    """As moe_loop, with one sort and E contiguous segments."""
    x, counts, order, inverse = _sort_by_expert(x, experts, w_in.shape[0])
    out = ffn_segments(x, *(None if w is None else w.to(x.dtype) for w in (w_in, w_out, w_gate, b_in, b_out)), counts, act)[0]
    return _Combine.apply(out, weights, order, inverse)


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

# ---------------------------------------------------------------------------------------------------------------------
# 3. `python kernels.py`: are the backends right, and what does sparsity cost?


def samples_and_experts(x, r, w_in, w_out, w_gate, b_in, b_out, act):
    """How the released CuMo dispatches, as a yardstick: x (B, N, D), a Python loop over samples, and in it over experts. Each answer is
    added in place to a slice of one tensor, so that going back autograd copies the gradient of the whole tensor for each of them."""
    y, experts = x.new_zeros(*x.shape[:2], w_out.shape[1]), _per_expert(w_in, w_out, w_gate, b_in, b_out)
    for b in range(len(x)):
        for e, expert in enumerate(experts):
            token, choice = torch.where(r.experts[b] == e)
            y[b][token] += r.weights[b][token, choice, None].to(x.dtype) * ffn(x[b][token], *expert, act)
    return y


def _problem(b, n, d, f, d_out, e, gated, bias, device, dtype, seed=0):
    """Random x (B, N, D), router logits (B, N, E), and expert weights that want gradients."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, scale=1.0: (torch.randn(*shape, generator=g) * scale).to(device, dtype).requires_grad_()
    x, logits = draw(b, n, d), draw(b, n, e)
    weights = [draw(e, f, d, scale=d**-0.5), draw(e, d_out, f, scale=f**-0.5), draw(e, f, d, scale=d**-0.5) if gated else None,
               draw(e, f) if bias else None, draw(e, d_out) if bias else None]
    return x, logits, weights


def check(device: str) -> float:
    """Each backend's output and gradients against `loop` in float64: the largest relative error, asserted and printed."""
    print(f"{'backend':10} {'dtype':10} {'error':>10}   largest |difference| / |reference| of output and all gradients, "
          "against loop in float64")
    for backend, dtype, limit in (("loop", torch.float32, 1e-5), ("sorted", torch.float64, 1e-12), ("sorted", torch.float32, 1e-5),
                                  ("grouped", torch.bfloat16, 3e-2)):
        worst = 0.0
        for act, gated in (("gelu", False), ("quick_gelu", False), ("silu", True)):
            for bias in (False, True):
                for n, d, f, e, k in ((33, 16, 24, 4, 2), (5, 10, 7, 8, 3), (1, 8, 8, 4, 1)):    # some experts stay empty
                    results = []
                    for which, kind in (("loop", torch.float64), (backend, dtype)):
                        x, logits, weights = _problem(2, n, d, f, d, e, gated, bias, device, dtype)
                        x, logits, *weights = [None if t is None else t.detach().to(kind).requires_grad_() for t in (x, logits, *weights)]
                        y = moe_ffn(x, route(logits, k), *weights, act=act, backend=which)
                        (y * torch.linspace(-1, 1, y.numel(), device=device, dtype=kind).view_as(y)).sum().backward()
                        results.append([t.detach().double() for t in (y, x.grad, *(w.grad for w in weights if w is not None))])
                    for got, want in zip(results[1], results[0]):
                        worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-9)))
        print(f"{backend:10} {str(dtype)[6:]:10} {worst:10.1e}")
        assert worst < limit, f"{backend} in {dtype} is wrong: {worst} over {limit}"


def _seconds(runs: dict, device: str, repeat: int) -> dict:
    """{name: median seconds} of the callables, run in turn, so that a slow moment of the machine hits all of them."""
    times = {name: [] for name in runs}
    for i in range(repeat + 1):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:                                                            # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def matmul_speed(device: str, dtype: torch.dtype, repeat: int = 7) -> float:
    """FLOP/s of one large matrix product, the ceiling of everything here."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _seconds({"matmul": lambda: a @ a}, device, repeat)["matmul"]


def keep_pages():
    """Let glibc keep the memory that tensors leave behind.

    It takes each one over 32 MB from the kernel anew and gives it back afterwards, and every fresh page is a page fault, that is a
    trip to the kernel that fills 4 KB with zeros: a fifth to a half of a CPU step on long sequences. The price is a heap with gaps
    (uni-moe's `train.py --bench` peaks at 3.3 GB, not 2.5). Whoever sets glibc's own MALLOC_ variables decides; other C libraries do
    without."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 10**8)):     # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of <malloc.h>
            libc.mallopt(parameter, value)


def as_transformers(name: str, weights: list):
    """The same experts in Hugging Face's Mixtral, by its implementation `name`: -> a function of x (N, D) and a Routing that gives (N, D),
    and its weights."""
    try:
        with mock.patch.object(sys, "path", sys.path[1:]):                   # it looks for another package named kernels, and would find
            from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts       # this file and run it again
    except ImportError:
        raise ValueError("--transformers compares with that library: pip install transformers") from None
    w_in, w_out, w_gate = weights[:3]
    config = MixtralConfig(num_local_experts=len(w_in), hidden_size=w_in.shape[2], intermediate_size=w_in.shape[1])      # silu
    config._experts_implementation = name
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(torch.cat([w_gate, w_in], 1).detach())               # (E, 2F, D)
    experts.down_proj = torch.nn.Parameter(w_out.detach())
    return lambda x, r: experts(x, r.experts, r.weights.to(x.dtype)), list(experts.parameters())


LAYERS = {"tiny": (64, 37, 128, 512, 128), "CLIP ViT-L": (4, 577, 1024, 4096, 1024), "connector": (4, 576, 2048, 4096, 4096),
          "CLIP ViT-L, gated": (4, 577, 1024, 4096, 1024)}                   # images, tokens of each, D, F, D_out


def bench(device: str, dtype: torch.dtype, compiled: bool, repeat: int, transformers: bool = False):
    """Forward + backward of a MoE layer, 4 experts, top-2, against one dense FFN over K x tokens: the same arithmetic. transformers: a
    layer of Mixtral's kind (gated, no biases) too, also as that library computes it."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    speed = matmul_speed(device, dtype)
    print(f"\n{name}, {str(dtype)[6:]}; matrix products reach {speed / 1e12:.3f} TFLOP/s. Forward + backward, median of {repeat} "
          f"(of {10 * repeat} at tiny's sizes)")
    for layer, (b, n, d, f, d_out) in LAYERS.items():
        gated = layer.endswith("gated")
        if gated and not transformers:
            continue
        b *= 20 if device == "cuda" and n > 100 else 1                       # a GPU wants more to do
        act = "silu" if gated else "gelu"
        x, logits, weights = _problem(b, n, d, f, d_out, 4, gated, not gated, device, dtype)
        twice, (w_in, w_out, *others) = torch.cat([x.detach()] * 2).requires_grad_(), weights
        one = [None if w is None else w[0] for w in others]
        runs = {"dense, K x tokens": lambda: ffn(twice, w_in[0], w_out[0], *one, act)}
        for backend in ("sorted", "grouped", "loop"):
            if backend != "grouped" or dtype == torch.bfloat16:
                runs[backend] = lambda backend=backend: moe_ffn(x, route(logits, 2), *weights, act=act, backend=backend)
        runs["samples x experts"] = lambda: samples_and_experts(x, route(logits, 2), *weights, act)
        inputs = [t for t in (x, twice, logits, *weights) if t is not None]
        for theirs in ("eager", "grouped_mm") if gated else ():
            run, params = as_transformers(theirs, weights)
            inputs += params
            runs[f"transformers {theirs}"] = lambda run=run: run(x.flatten(0, 1), route(logits.flatten(0, 1), 2)).view(x.shape)
            assert torch.allclose(runs[f"transformers {theirs}"](), runs["sorted"](), rtol=0.05, atol=0.05), "not the same function"
        if compiled:
            runs = {k: torch.compile(run) if k[:5] in ("dense", "sorte", "group") else run for k, run in runs.items()}
        y = torch.randn(b, n, d_out, device=device, dtype=dtype)
        grads = {"dense, K x tokens": torch.cat([y] * 2)}

        def once(k):
            for leaf in inputs:
                leaf.grad = None                                             # as a training step: gradients are written, not added
            torch.autograd.backward(runs[k](), grads.get(k, y))
        t = _seconds({k: functools.partial(once, k) for k in runs}, device, repeat * (10 if layer == "tiny" else 1))
        work = 3 * 2 * 2 * b * n * f * (d + d_out + d * gated)               # forward and twice that backward; K = 2
        print(f"\n{layer + ':':18} {b * n:,} tokens, {d} -> {f} -> {d_out:4}         ms  time / dense  of matmul")
        for k, seconds in t.items():
            print(f"    {k:44} {seconds * 1e3:9.2f} {seconds / t['dense, K x tokens']:12.2f}x {work / seconds / speed:10.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="timed runs of each (default: 7)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the dense, sorted and grouped rows")
    parser.add_argument("--transformers", action="store_true", help="one layer more, which Hugging Face's Mixtral has, also by its code")
    args = parser.parse_args()
    keep_pages()
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        check(device)
        bench(device, torch.bfloat16 if device == "cuda" else torch.float32, args.compile, args.repeat, args.transformers)


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"kernels.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
