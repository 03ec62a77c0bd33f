"""kernels.py: one mixture-of-experts layer, whole. It needs torch and no other file: copy it.

A feed-forward network (FFN) is two thirds or more of a transformer's weights, and every token
passes through all of it. A mixture of experts (MoE) has E such networks and a router, which picks K
of them for each token. The weights grow E-fold, the arithmetic only K-fold. For one token x:

    p = softmax(router(x))                     how much does x want each expert?
    pick the K largest p, rescale them to sum to 1 (K = 1 keeps its p)
    y = sum over those K of  p_k * expert_k(x)

The mathematics is that short. What makes the code of such layers hard to read is speed: processors
want a few big matrix products, and tokens choose their experts one by one. `moe_ffn` therefore has
three backends, which give the same answer:

    loop      the definition, one expert after the other. Read this one first.
    sorted    sorts the choices by expert: each expert's tokens lie side by side. Any device.
    grouped   the same order, and one kernel multiplies all experts' parts at once. The host
              never has to wait for the GPU. bfloat16.

How to use it:

    import torch
    from kernels import MoE

    layer = MoE(dim=64, ffn_dim=256, act="gelu", n_experts=4, top_k=2, bias=True)
    for name, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, std=0.02)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)

    x = torch.randn(8, 100, 64)               # 8 images of 100 tokens
    y, routing = layer(x)                     # (8, 100, 64), and who went where
    loss = (y - x.flip(1)).square().mean()    # your loss, whatever it is
    loss = loss + 0.1 * routing.balance + 0.01 * routing.z
    loss.backward()
    optimizer.step()

Letters for shapes, in all of this file: N tokens, D width, F width inside the FFN, E experts,
K experts a token (top-k), M = N * K choices; "..." any leading dimensions, such as images. From
section 3 on there are none: N then counts the tokens of all images.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------
# 1. Routing: who goes where, how much does it count, and how evenly is the work shared?


class Routing(NamedTuple):
    """What a router decided."""
    weights: Tensor  # (..., N, K) float32; 0 where a choice was dropped or the token is padding
    experts: Tensor  # (..., N, K) int64, the best choice first
    balance: Tensor  # () float32, the load-balancing loss: 1 when the load is perfectly even
    z: Tensor        # () float32, the z-loss: 0 if the exponentials of a token's logits sum to 1
    # load: (E,) float32, each expert's share of the first choices, the mean over images. None in a
    # routing made by hand.
    load: Tensor | None = None


def route(logits: Tensor, top_k: int, mask: Tensor | None = None,
          capacity_factor: float | None = None, min_capacity: int = 0,
          noise: Tensor | None = None, renormalise: bool | None = None) -> Routing:
    """Top-k routing with CuMo's two auxiliary losses ("Loss Function" in its section 3; the z-loss
    is ST-MoE's, equation 5).

    logits (..., N, E) of any float type. mask (..., N) bool is False at padding, which gets
    weight 0 and counts nowhere. capacity_factor limits an expert's slots (`within_capacity`); None
    drops nothing. noise (..., N, E) is added to the logits for the choices after the first only
    (DeepSpeed's gate draws Gumbel noise for it). renormalise: whether a token's weights are
    rescaled to sum to 1; None rescales them for top_k >= 2 only.

    The losses are means over the N tokens of each leading index, then over the leading indices.
    With (images, tokens, E) the load is balanced inside every image, as in the released CuMo.

    ValueError for a top_k outside 1..E, a capacity factor that is not positive, and a mask of
    another shape.
    """
    n_experts = logits.shape[-1]
    check_route(logits, top_k, mask, capacity_factor)

    # 1. How much does each token want each expert? In float32: bfloat16 has too few digits.
    logits = logits.float()
    p = logits.softmax(-1)  # (..., N, E)

    # 2. The K best experts of each token.
    if noise is None:
        weights, experts = p.topk(top_k, dim=-1)  # (..., N, K) twice
    else:
        experts = choose_with_noise(logits, p, top_k, noise)  # (..., N, K)
        weights = p.gather(-1, experts)

    # 3. The load-balancing loss: for each expert, the share of tokens whose first choice it is,
    #    times its mean probability. Only the probability has a gradient. So an expert that is
    #    chosen too often has its probability pushed down, and the others catch up. (Second choices
    #    are not balanced, as in the released CuMo.) Times E, so that an even load gives 1: that is
    #    E times a sum of E terms of 1/E * 1/E.
    first_choice = one_hot(experts[..., 0], n_experts).to(p.dtype)  # (..., N, E)
    share = mean_over_tokens(first_choice, mask)  # (..., E)
    probability = mean_over_tokens(p, mask)
    balance = n_experts * (share * probability).sum(-1, keepdim=True)  # (..., 1)

    # 4. The z-loss. A softmax does not change if all logits grow by the same amount, so they could
    #    drift to where they are so large that rounding flips choices. This loss is 0 where their
    #    exponentials sum to 1, and grows when they all drift up or down.
    z = logits.logsumexp(-1, keepdim=True).square()  # (..., N, 1)
    z = mean_over_tokens(z, mask)  # (..., 1)

    # 5. Drop what must not count: padding, and choices that came too late for a slot (section 5;
    #    CuMo has no capacity).
    if mask is not None:
        weights = weights * mask.unsqueeze(-1)
    if capacity_factor is not None:
        capacity = slots_per_expert(experts, mask, n_experts, capacity_factor, min_capacity)
        weights = weights * within_capacity(experts, mask, n_experts, capacity)

    # 6. What is left of a token's weights sums to 1 again. But with top_k = 1 the one weight stays
    #    the probability: rescaled it would be 1 whatever the router says, and the router would
    #    learn nothing from the task. The Switch Transformer (arXiv 2101.03961, equation 2) and
    #    DeepSpeed's top-1 gate keep it, too.
    if renormalise or (renormalise is None and top_k > 1):
        weights = sum_to_1(weights)

    # 7. All means so far are one for each image (in a decoder, one for all tokens).
    #    (The sum is of one number. FSDP would warn of squeeze's result, which is a view.)
    balance = mean_over_images(balance, mask).sum(0)  # ()
    z = mean_over_images(z, mask).sum(0)  # ()
    load = mean_over_images(share, mask)  # (E,)
    return Routing(weights, experts, balance, z, load)


def sum_to_1(weights: Tensor) -> Tensor:
    """weights (..., N, K) rescaled; where nothing is left of a token's weights they stay 0."""
    # What is left may be tiny, and the gradient grows as one over it; hence the clamp, which
    # DeepSpeed's gates have, too.
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp(min=torch.finfo(weights.dtype).eps)


def mean_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., N, C) -> (..., C): the mean over the real tokens."""
    # Not by einsum, which autocast would compute in bfloat16.
    if mask is None:
        return x.sum(-2) / max(1, x.shape[-2])
    real = mask.unsqueeze(-1).to(x.dtype)  # (..., N, 1)
    return (x * real).sum(-2) / real.sum(-2).clamp(min=1)


def mean_over_images(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., C), one row for each leading index -> (C,): the mean over those with a real token."""
    has_tokens = None if mask is None else mask.any(-1).flatten()
    return mean_over_tokens(x.reshape(-1, x.shape[-1]), has_tokens)


def one_hot(index: Tensor, n: int) -> Tensor:
    """index (...) int64 -> (..., n) bool."""
    # F.one_hot would look at the values first, and on a GPU that means to wait for them.
    return index.unsqueeze(-1) == torch.arange(n, device=index.device)


# ------------------------------------------------------------------------------------------------
# 2. One FFN, and a layer of E of them


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's CLIP was trained with this approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Another approximation of GELU, which SigLIP was trained with."""
    return F.gelu(x, approximate="tanh")


# A new activation is one line here. The names are those of transformers.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def ffn(x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None,
        b_in: Tensor | None = None, b_out: Tensor | None = None, act: str = "gelu") -> Tensor:
    """A dense FFN. x (..., D), w_in (F, D), w_out (D_out, F), biases (F,) and (D_out,) -> (...,
    D_out).

    With w_gate (F, D) it is LLaMA's gated FFN: act(x w_gate) * (x w_in), then w_out. With the
    activation "silu" that is called SwiGLU (arXiv 2002.05202).
    """
    h = F.linear(x, w_in, b_in)  # (..., F)
    if w_gate is None:
        h = ACTIVATIONS[act](h)
    else:
        h = ACTIVATIONS[act](F.linear(x, w_gate)) * h
    return F.linear(h, w_out, b_out)  # (..., D_out)


class FFN(nn.Module):
    """A dense FFN as a module.

    Its weights lie as in nn.Linear, (out, in), and have the names that MoE's stacked weights
    have. So to turn an FFN into an expert is one torch.stack (upcycle.py).
    """

    def __init__(self, dim, ffn_dim, act, dim_out=None, gated=False, bias=False):
        super().__init__()
        self.act = act
        add_weights(self, [], dim, ffn_dim, dim_out, gated, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None):
        """x (..., D) -> (..., D_out), and None where a MoE gives its Routing.

        Called as a MoE is, so that a block need not know which of them it has."""
        y = ffn(x, self.w_in, self.w_out, self.w_gate, self.b_in, self.b_out, self.act)
        return y, None


class MoE(nn.Module):
    """E FFNs and a router, which is one matrix without a bias.

    capacity_factor limits the experts' slots in training, eval_capacity_factor outside of it; None
    drops nothing. noisy draws the choices after the first with Gumbel noise while training.
    renormalise: as for `route`. float32_router: compute the logits in float32, see `logits`.
    """

    def __init__(self, dim, ffn_dim, act, n_experts, top_k, dim_out=None, gated=False, bias=False,
                 capacity_factor=None, eval_capacity_factor=None, min_capacity=0, noisy=False,
                 renormalise=None, float32_router=False):
        super().__init__()
        self.act = act
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy = noisy
        self.renormalise = renormalise
        self.float32_router = float32_router
        self.backend = None  # None lets moe_ffn choose
        self.group = None    # the processes that share the experts, see moe_parallel

        # The router, and E FFNs stacked: w_in is (E, F, D).
        self.router = nn.Parameter(torch.empty(n_experts, dim))
        add_weights(self, [n_experts], dim, ffn_dim, dim_out, gated, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None):
        """x (..., N, D), mask (..., N) False at padding -> (..., N, D_out), and the Routing.

        With a capacity factor the answer for a token depends on its company, since the tokens of a
        batch compete for slots. That holds in generation too, where a prompt is routed whole and
        every later step routes one token a row.
        """
        logits = self.logits(x)  # (..., N, E)

        # The largest of logits + Gumbel noise is a draw from their softmax, and minus the logarithm
        # of an exponential draw is such noise. DeepSpeed draws it in evaluation too; here an answer
        # can be repeated.
        noise = None
        if self.noisy and self.training:
            noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()

        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        routing = route(logits, self.top_k, mask, factor, self.min_capacity, noise,
                        self.renormalise)
        # It makes one list of all tokens, x (N, D), and calls moe_loop, moe_sorted or moe_grouped.
        y = moe_ffn(x, routing, self.w_in, self.w_out, self.w_gate, self.b_in, self.b_out,
                    self.act, self.backend, self.group)
        return y, routing

    def logits(self, x: Tensor) -> Tensor:
        """x (..., N, D) -> how much each token wants each expert (..., N, E).

        In the released CuMo and in Mixtral the router is a linear layer like any other: it computes
        in its own type, which is bfloat16 there, and inside autocast in autocast's. DeepSpeed's
        gate, which MoE-LLaVA has, computes in float32 wherever it is (float32_router). It matters:
        rounding to bfloat16 gives one token in some hundreds another pair of experts. (What it is
        given may be rounded already: on GPUs, FSDP hands out weights and inputs in bfloat16.)
        """
        if not self.float32_router:
            return F.linear(x.to(self.router.dtype), self.router)
        # Tensors on meta have shapes and no values, so that costs can be counted on them. Autocast
        # does not know them; there is nothing to switch off.
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):
            return F.linear(x.float(), self.router.float())


def add_weights(module, lead, dim, ffn_dim, dim_out, gated, bias):
    """Give a module the weights of an FFN. lead: the dimensions in front, [E] of E FFNs.

    Empty: whoever builds the layer fills it (upcycling, loading, or a random start).
    """
    if dim_out is None:
        dim_out = dim
    module.w_in = nn.Parameter(torch.empty(*lead, ffn_dim, dim))
    module.w_gate = nn.Parameter(torch.empty(*lead, ffn_dim, dim)) if gated else None
    module.w_out = nn.Parameter(torch.empty(*lead, dim_out, ffn_dim))
    module.b_in = nn.Parameter(torch.zeros(*lead, ffn_dim)) if bias else None
    module.b_out = nn.Parameter(torch.zeros(*lead, dim_out)) if bias else None


def feed_forward(dim, ffn_dim, act, n_experts=0, top_k=2, dim_out=None, gated=False, bias=False,
                 **limits):
    """An FFN, or with n_experts above 0 a MoE of that shape. Only a MoE looks at `limits`."""
    if n_experts == 0:
        return FFN(dim, ffn_dim, act, dim_out, gated, bias)
    return MoE(dim, ffn_dim, act, n_experts, top_k, dim_out, gated, bias, **limits)


# ------------------------------------------------------------------------------------------------
# 3. Dispatch: take the tokens to their experts, and the answers back


class Stack(NamedTuple):
    """The weights of a layer's E FFNs. MoE hands them over by way of `moe_ffn` (section 4)."""
    w_in: Tensor  # (E, F, D)
    w_out: Tensor  # (E, D_out, F)
    w_gate: Tensor | None = None  # (E, F, D)
    b_in: Tensor | None = None  # (E, F)
    b_out: Tensor | None = None  # (E, D_out)


# Three tokens a, b, c choose two of the experts 0 and 1 each. That is M = N * K = 6 choices:
#
#     choice             0    1    2    3    4    5      in token order, two each
#     of token           a    a    b    b    c    c
#     for expert         1    0    0    1    1    0      experts = [[1, 0], [0, 1], [1, 0]]


def moe_loop(x, weights, experts, stack, act):
    """The definition. x (N, D), weights and experts (N, K), stack a Stack -> (N, D_out)."""
    y = x.new_zeros(len(x), stack.w_out.shape[1])
    for e, expert in enumerate(split_experts(stack)):
        # Which tokens chose expert e, and as which of their choices? In the example, expert 0:
        # token = (0, 1, 2) and choice = (1, 0, 1). Tokens a and c want it second, token b first.
        token, choice = torch.where(experts == e)  # (n_e,) twice
        weight = weights[token, choice].unsqueeze(-1)  # (n_e, 1)
        y = y.index_add(0, token, weight * ffn(x[token], *expert, act))
    return y


def split_experts(stack: Stack) -> list[tuple]:
    """-> one tuple (w_in, w_out, w_gate, b_in, b_out) for each expert; None stays None.

    By unbind: in the backward pass it stacks the experts' gradients once. With w[e], every expert
    would fill a whole (E, ...) tensor with zeros for its part.
    """
    n_experts = len(stack.w_in)
    columns = [[None] * n_experts if w is None else w.unbind(0) for w in stack]
    return list(zip(*columns))


# Sorting. The choices of the example, those for expert 0 first:
#
#     order              1    2    5  | 0    3    4      which choice stands here
#     token              0    1    2  | 0    1    2      whose it is: order // 2
#     rows               a    b    c  | a    b    c      the copies that expert 0 | expert 1 gets
#     counts             3            | 3
#     inverse            3    0    1    4    5    2      where choice 0, 1, 2, ... stands in `rows`
#
# Expert 0 now multiplies rows 0 to 2 in one piece and expert 1 rows 3 to 5. Then the answers go
# back to their tokens: token b's choices are 2 and 3, whose answers stand at inverse[2] = 1 and
# inverse[3] = 4. These are added up.


def sort_by_expert(experts: Tensor, n_experts: int):
    """experts (N, K) -> token (M,) of each row, order (M,), inverse (M,), counts (E,) rows of
    each."""
    flat = experts.flatten()  # (M,) in token order
    order = flat.argsort(stable=True)  # (M,) stable: an expert keeps its tokens in their order
    position = torch.arange(len(order), device=order.device)
    # inverse[order[i]] = i
    inverse = torch.empty_like(order).scatter_(0, order, position)  # (M,)
    counts = one_hot(flat, n_experts).sum(0)  # (E,)
    token = order // experts.shape[1]  # (M,)
    return token, order, inverse, counts


def copy_to_experts(x, token):
    """x (N, D) in token order -> (M, D): each row's token, in expert order."""
    return x.index_select(0, token)


def sum_per_token(rows, inverse, top_k):
    """rows (M, D) in expert order -> (N, D): for each token the sum of its K rows."""
    rows = rows.index_select(0, inverse)  # (M, D) in token order
    if top_k == 1:
        return rows
    return rows.view(-1, top_k, rows.shape[-1]).sum(1)


# Forward, a token is copied to its K experts; so backward, its gradient is the sum of its K copies'
# gradients. Forward, K answers are summed; so backward, each gets a copy of the sum's gradient.
# Each of the two functions is therefore the other's backward pass. Autograd, left alone, would
# scatter and add, which is slow on a CPU, and on a GPU adds in another order each time.


class ToExperts(torch.autograd.Function):
    """copy_to_experts, whose gradient is sum_per_token."""

    @staticmethod
    def forward(ctx, x, token, inverse, top_k):
        # inverse and top_k are for the backward pass alone.
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return copy_to_experts(x, token)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return sum_per_token(grad, inverse, ctx.top_k), None, None, None


class FromExperts(torch.autograd.Function):
    """sum_per_token, whose gradient is copy_to_experts."""

    @staticmethod
    def forward(ctx, rows, token, inverse, top_k):
        ctx.save_for_backward(token)
        return sum_per_token(rows, inverse, top_k)

    @staticmethod
    def backward(ctx, grad):
        token, = ctx.saved_tensors
        return copy_to_experts(grad, token), None, None, None


def moe_sorted(x, weights, experts, stack, act):
    """As moe_loop, but each expert's rows are one slice, read and written once."""
    token, order, inverse, counts = sort_by_expert(experts, len(stack.w_in))
    rows = ToExperts.apply(x, token, inverse, experts.shape[1])  # (M, D)

    # Each expert takes its slice through the whole FFN before the next begins: its rows are still
    # in the cache. Python must know the slices' sizes, so this waits for the device.
    slices = rows.split(sizes_of_slices(counts, len(rows)))
    outputs = [ffn(part, *expert, act) for part, expert in zip(slices, split_experts(stack))]
    rows = torch.cat(outputs)  # (M, D_out)

    return weighted_sum(rows, weights, order, token, inverse)  # (N, D_out)


def weighted_sum(rows, weights, order, token, inverse):
    """The answers (M, D_out) in expert order -> (N, D_out): each token's, weighted and added up."""
    weight = weights.flatten().index_select(0, order)  # (M,)
    return FromExperts.apply(rows * weight.unsqueeze(1), token, inverse, weights.shape[1])


# ------------------------------------------------------------------------------------------------
# You can stop here on a first reading. Below this line: `moe_ffn`, which MoE calls and which
# passes its tokens on to one of the backends; experts with a limited number of slots; the backend
# for GPUs; experts that live on several GPUs; and the checks of what is passed in.
# ------------------------------------------------------------------------------------------------
# 4. Which backend


def moe_ffn(x: Tensor, r: Routing, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None,
            b_in: Tensor | None = None, b_out: Tensor | None = None, act: str = "gelu",
            backend: str | None = None, group=None) -> Tensor:
    """y = sum over k of  weights[:, k] * FFN_{experts[:, k]}(x).

    x (..., N, D); r is what `route` gave for these tokens; w_in and w_gate (E, F, D), w_out (E,
    D_out, F), b_in (E, F), b_out (E, D_out). Returns (..., N, D_out) in x's type (inside
    autocast: in autocast's). backend is "loop", "sorted", "grouped", or None to choose: grouped
    for bfloat16 on CUDA, otherwise sorted. group: the processes that share the experts
    (`moe_parallel`).

    ValueError for an unknown backend or activation, a routing of other tokens or over another
    number of experts, and for "grouped" with another type than bfloat16. (torch.func's transforms
    take the loop alone.)
    """
    # (float64 stays what it is, as in nn.Linear.)
    under_autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if under_autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if backend is None:
        backend = "sorted"
        # Tensors on meta have no values; train.py --plan counts on them what a GPU would do.
        if x.dtype == torch.bfloat16 and (x.is_cuda or x.is_meta):
            backend = "grouped"
    stack = Stack(w_in, w_out, w_gate, b_in, b_out)
    check_moe_ffn(x, r, act, backend)
    check_experts(r, stack, group)

    # One long list of tokens, whatever the leading dimensions are.
    top_k = r.experts.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])  # (N, D)
    weights = r.weights.reshape(-1, top_k).to(x.dtype)  # (N, K)
    experts = r.experts.reshape(-1, top_k)  # (N, K)

    if group is None:
        y = BACKENDS[backend](tokens, weights, experts, stack, act)
    else:
        y = moe_parallel(tokens, weights, experts, stack, act, backend, group)
    return y.view(*x.shape[:-1], w_out.shape[1])  # (..., N, D_out)


# ------------------------------------------------------------------------------------------------
# 5. Choices with noise, and capacity


def choose_with_noise(logits: Tensor, p: Tensor, top_k: int, noise: Tensor) -> Tensor:
    """logits, p, noise (..., N, E) -> experts (..., N, K): the best, then the best with noise."""
    first = p.argmax(-1, keepdim=True)  # (..., N, 1)
    rest = (logits + noise).scatter(-1, first, -torch.inf)
    others = rest.topk(top_k - 1, dim=-1).indices
    return torch.cat([first, others], -1)


def slots_per_expert(experts: Tensor, mask: Tensor | None, n_experts: int, factor: float,
                     min_capacity: int) -> Tensor:
    """How many choices each expert takes, (..., 1) float64: its even share, times the factor.

    DeepSpeed counts padding among the tokens. Here padding takes no slot. The result is rounded
    up, and a share of 55 must not become 56 because 1.1 has no end in binary digits: so it is
    computed in float64, and what is above a whole number by rounding alone counts as that number.
    """
    top_k = experts.shape[-1]
    if mask is None:
        mask = torch.ones_like(experts[..., 0], dtype=torch.bool)  # (..., N)
    n_tokens = mask.sum(-1, keepdim=True).double()  # (..., 1)
    share = n_tokens * top_k * factor / n_experts
    return (share - 1e-9).ceil().clamp(min=min_capacity)


def within_capacity(experts: Tensor, mask: Tensor | None, n_experts: int,
                    capacity: Tensor) -> Tensor:
    """experts (..., N, K) -> (..., N, K) float: 1 where the choice finds a free slot, otherwise 0.

    As in DeepSpeed's top-2 gate, which MoE-LLaVA uses: slots fill in token order, all first
    choices before any second choice. (Its top-1 gate draws lots for the slots, unless it is told
    not to with use_rts=False; here an answer can be repeated.) Three tokens with first choices 0 0
    1 and second choices 1 1 0, and two slots an expert: they queue as

        choice           0  0  1  1  1  0        first choices, then second ones
        queue at 0       1  2  .  .  .  3        a running count of those who want expert 0
        queue at 1       .  .  1  2  3  .
        finds a slot     y  y  y  y  n  n        place in the queue at most 2
    """
    # Who wants which expert, in queueing order.
    wants = one_hot(experts.transpose(-1, -2), n_experts).long()  # (..., K, N, E)
    if mask is not None:
        wants = wants * mask[..., None, :, None]

    # Each expert counts, down the queue, those who want it. (Padding wants nobody: its place is 0,
    # which is free, and its weight is 0 already.)
    queue = wants.flatten(-3, -2)  # (..., K * N, E): all first choices, then all second ones
    place = queue.cumsum(-2).view_as(wants)  # (..., K, N, E) in every expert's queue
    place = (place * wants).sum(-1)  # (..., K, N) in the queue of the expert that is wanted
    place = place.transpose(-1, -2)  # (..., N, K)
    return (place <= capacity.unsqueeze(-1)).float()


# ------------------------------------------------------------------------------------------------
# 6. The backend for GPUs: one kernel for all experts


def moe_grouped(x, weights, experts, stack, act):
    """As moe_sorted, but the slices' sizes stay on the device: the host does not wait for them."""
    w_in, w_out, w_gate, b_in, b_out = stack
    top_k = experts.shape[1]
    token, order, inverse, counts = sort_by_expert(experts, len(w_in))
    expert = experts.flatten().index_select(0, order)  # (M,) the expert of each row
    ends = counts.cumsum(0).to(torch.int32)  # (E,) where each slice ends
    rows = ToExperts.apply(x, token, inverse, top_k)  # (M, D)

    h = grouped_product(rows, w_in, ends)  # (M, F)
    if b_in is not None:
        h = h + PickRows.apply(b_in.to(h.dtype), expert)
    if w_gate is None:
        h = ACTIVATIONS[act](h)
    else:
        h = ACTIVATIONS[act](grouped_product(rows, w_gate, ends)) * h

    # The last product is linear, so a weight may as well be applied before it: w * (W h) = W (w
    # * h). Then the router's gradient needs h, which is there, and no (M, D_out) has to be kept
    # for it.
    weight = weights.flatten().index_select(0, order)  # (M,)
    rows = grouped_product(h * weight.unsqueeze(1), w_out, ends)  # (M, D_out)
    y = FromExperts.apply(rows, token, inverse, top_k)  # (N, D_out)

    if b_out is not None:
        # Each token gets its experts' biases, weighted: that is one small product.
        gates = weights.new_zeros(len(x), len(w_in)).scatter_add(1, experts, weights)  # (N, E)
        y = y + gates @ b_out.to(y.dtype)
    return y


def grouped_product(rows: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """rows (M, I), w (E, O, I), ends (E,) -> (M, O): each slice of rows times its expert's matrix.

    F.grouped_mm wants rows whose length is a multiple of 16 bytes. So widths that are no
    multiple of 8 are padded with zeros, which change no product.
    """
    n_out, n_in = w.shape[1:]
    pad_in = -n_in % 8
    pad_out = -n_out % 8
    if pad_in or pad_out:
        rows = F.pad(rows, (0, pad_in))
        w = F.pad(w, (0, pad_in, 0, pad_out))
    w = w.to(rows.dtype).contiguous().transpose(-2, -1)  # (E, I, O)
    return F.grouped_mm(rows.contiguous(), w, offs=ends)[:, :n_out]  # (M, O)


class PickRows(torch.autograd.Function):
    """table (E, C), index (M,) -> table[index] (M, C), here each row's bias.

    Its gradient adds M rows up into E. Autograd does that with atomic additions, and where
    thousands of rows go to four places they queue: on an H100 it took a third of the layer's
    time. One product with a one-hot matrix is the same sum.
    """

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.n_rows = len(table)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, = ctx.saved_tensors
        return one_hot(index, ctx.n_rows).to(grad.dtype).t() @ grad, None


BACKENDS = {"loop": moe_loop, "sorted": moe_sorted, "grouped": moe_grouped}

# Lets torch.compile take the sizes of moe_sorted's slices into its graph. This is a setting of the
# whole process: who copies this file and does not compile moe_sorted can leave it out.
torch._dynamo.config.capture_scalar_outputs = True


def sizes_of_slices(counts: Tensor, n_rows: int) -> list[int]:
    """counts (E,) of n_rows rows -> the same as a list, which is moe_sorted's one wait."""
    if torch.compiler.is_compiling():
        # The graph must hold for any sizes. It is told what can be said of all of them.
        sizes = counts.tolist()
        for size in sizes:
            torch._check(size >= 0)
        torch._check(sum(sizes) == n_rows)
        return sizes
    if counts.is_meta:
        # There are no values. An even split stands for any other, as it costs the same.
        even, rest = divmod(n_rows, len(counts))
        return [even + 1] * rest + [even] * (len(counts) - rest)
    return counts.tolist()


# ------------------------------------------------------------------------------------------------
# 7. Expert parallelism: experts too many for one device are dealt out, and tokens travel to them
#
# This is GShard's way (arXiv 2006.16668); Uni-MoE calls it "expert-level model parallelism".
# Every process ("rank") routes its own tokens. Sorted by expert, the choices are sorted by rank
# too, so one exchange of contiguous pieces takes each to where its expert lives:
#
#         rank 0 keeps experts 0 and 1          rank 1 keeps experts 2 and 3
#         its tokens want  0 0 1 | 2 3 3        its tokens want  0 1 1 1 | 3
#                            |       \___________________  _______/      |
#                            |        ___________________\/____          |        all-to-all:
#                            |       /                          \        |        piece r to rank r
#         it runs          0 0 1 | 0 1 1 1      it runs        2 3 3 | 3
#
# The answers go back in the same way, and the gradients the same two ways in reverse. So an
# expert's gradient holds the tokens of the whole group.


class AllToAll(torch.autograd.Function):
    """Rows (sum(send), D), one piece for each rank, -> the pieces for this rank (sum(receive),
    D)."""

    @staticmethod
    def forward(ctx, rows, send, receive, group):
        ctx.send = send
        ctx.receive = receive
        ctx.group = group
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        # What came from a rank has its gradient sent there.
        return AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


@torch.compiler.disable  # its sizes are known only when it runs
def moe_parallel(x, weights, experts, stack, act, backend, group):
    """As moe_loop, on each rank of the group for its own tokens, whose number N may differ or
    be 0.

    `stack` holds this rank's experts alone, (E / ranks, ...): rank r has the r-th part. Every rank
    must call this equally often, or the others wait for ever. Dropped choices travel too, and come
    back with weight 0.
    """
    n_ranks = dist.get_world_size(group)
    n_here = len(stack.w_in)
    token, order, inverse, counts = sort_by_expert(experts, n_ranks * n_here)
    rows = ToExperts.apply(x, token, inverse, experts.shape[1])  # (M, D)

    # 1. Each rank tells each other one how many choices it brings for which of its experts.
    asked = torch.empty_like(counts)  # (E,) from rank 0 for my experts, from rank 1, ...
    dist.all_to_all_single(asked, counts, group=group)
    # Rows travel to a rank for all of its experts together.
    to_ranks = counts.view(n_ranks, n_here).sum(1)
    from_ranks = asked.view(n_ranks, n_here).sum(1)
    send, receive = torch.stack([to_ranks, from_ranks]).tolist()  # the one wait for the device

    # 2. The rows travel. They come rank by rank, and those of a rank by expert: 0 0 1 | 0 1 1 1.
    rows = AllToAll.apply(rows, send, receive, group)  # (R, D)
    expert = torch.arange(n_here, device=x.device).repeat(n_ranks)  # 0 1 | 0 1
    expert = expert.repeat_interleave(asked, output_size=sum(receive))  # (R,)

    # 3. Every row is now a token with one choice, of weight 1.
    ones = rows.new_ones(len(rows), 1)
    rows = BACKENDS[backend](rows, ones, expert.unsqueeze(1), stack, act)  # (R, D_out)

    # 4. The answers travel back, and each token adds up its own.
    rows = AllToAll.apply(rows, receive, send, group)  # (M, D_out)
    return weighted_sum(rows, weights, order, token, inverse)  # (N, D_out)


# ------------------------------------------------------------------------------------------------
# 8. Checks


def check_route(logits: Tensor, top_k: int, mask: Tensor | None, capacity_factor: float | None):
    n_experts = logits.shape[-1]
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask is for tokens {tuple(mask.shape)}, the logits are of tokens "
                         f"{tuple(logits.shape[:-1])}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k = {top_k} must lie between 1 and the number of experts, "
                         f"{n_experts}")
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(f"capacity_factor = {capacity_factor} must be positive, or None to drop "
                         "nothing")


def check_moe_ffn(x: Tensor, r: Routing, act: str, backend: str):
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(ACTIVATIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if r.experts.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"routing is for tokens {tuple(r.experts.shape[:-1])}, x has tokens "
                         f"{tuple(x.shape[:-1])}")
    if r.weights.shape != r.experts.shape:
        raise ValueError(f"routing has weights {tuple(r.weights.shape)} for experts "
                         f"{tuple(r.experts.shape)}")
    if backend == "grouped" and x.dtype != torch.bfloat16:
        raise ValueError(f"backend 'grouped' computes in bfloat16, x is {x.dtype}; use backend "
                         "'sorted' or cast x")


def check_experts(r: Routing, stack: Stack, group):
    """Does the layer have the experts that the routing chooses from?

    Otherwise some choices would find no expert: moe_loop would drop them without a word, and the
    other backends would return memory that nobody has written to.
    """
    counts = {len(w) for w in stack if w is not None}
    if len(counts) > 1:
        shapes = [tuple(w.shape) for w in stack if w is not None]
        raise ValueError(f"the experts' weights {shapes} differ in the number of experts, which is "
                         "their first dimension")

    # With expert parallelism the layer has this process's part of them.
    n_experts = len(stack.w_in)
    if group is not None:
        n_experts = n_experts * dist.get_world_size(group)
    if r.load is not None and len(r.load) != n_experts:
        raise ValueError(f"routing is over {len(r.load)} experts, the layer has {n_experts}")

    # A routing that was not made by `route` says which experts, but not of how many. To look costs
    # nothing on a CPU; a GPU would have to be waited for.
    may_look = r.experts.is_cpu and r.experts.numel() and not torch.compiler.is_compiling()
    if r.load is None and may_look:
        lowest, highest = (int(expert) for expert in r.experts.aminmax())
        if lowest < 0 or highest >= n_experts:
            raise ValueError(f"routing chooses experts {lowest} to {highest}, the layer has "
                             f"{n_experts}: 0 to {n_experts - 1}")
