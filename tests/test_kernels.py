"""kernels.py against the formulas of DESIGN.md section 4, written out again in plain Python."""
import math
import textwrap
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import MoE, Routing, moe_ffn, route

# ---------------------------------------------------------------------------------------------------------------------
# Routing


def plain_route(logits, k, mask=None, factor=None, min_capacity=0):
    """One row of tokens, lists of Python floats: logits N x E -> (weights N x K, experts N x K, balance, z)."""
    n_experts, mask = len(logits[0]), mask or [True] * len(logits)
    weights, experts, first, mean_p, z, n_real = [], [], [0] * n_experts, [0.0] * n_experts, 0.0, sum(mask)
    for row, real in zip(logits, mask):
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        chosen = sorted(range(n_experts), key=lambda e: -p[e])[:k]
        experts.append(chosen)
        weights.append([p[e] * real for e in chosen])
        if real:
            first[chosen[0]] += 1
            mean_p = [a + b for a, b in zip(mean_p, p)]
            z += math.log(total) ** 2
    if factor is not None:                               # every token's first choice queues up, then every second choice, ...
        capacity = max(min_capacity, math.ceil(Fraction(n_real * k) * Fraction(factor) / n_experts))
        taken = [0] * n_experts
        for choice in range(k):
            for n, real in enumerate(mask):
                if real:
                    e = experts[n][choice]
                    taken[e] += 1
                    if taken[e] > capacity:
                        weights[n][choice] = 0.0
    if k > 1:                                            # a single weight stays the probability
        weights = [[w / (sum(row) or 1) for w in row] for row in weights]
    n = max(n_real, 1)
    return weights, experts, n_experts * sum(a / n * b / n for a, b in zip(mean_p, first)), z / n


def check_rows(r, logits, k, mask=None, *capacity):
    """A Routing of logits (rows, N, E) against plain_route row by row; rows of padding only count nowhere."""
    masks = [None] * len(logits) if mask is None else mask.tolist()
    rows = [plain_route(row.tolist(), k, m, *capacity) for row, m in zip(logits, masks)]
    torch.testing.assert_close(r.weights, torch.tensor([row[0] for row in rows]), rtol=1e-5, atol=1e-6)
    assert r.experts.tolist() == [row[1] for row in rows]
    counted = [row for row, m in zip(rows, masks) if m is None or any(m)]
    for got, i in ((r.balance, 2), (r.z, 3)):
        assert got.item() == pytest.approx(sum(row[i] for row in counted) / max(len(counted), 1), rel=1e-5)
        assert got.dtype == torch.float32 and got.shape == ()
    assert r.weights.dtype == torch.float32 and r.experts.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 2, 5])
def test_routing_is_softmax_topk_renormalised_from_top_2_on_with_losses_averaged_over_rows(k):
    logits = torch.randn(3, 7, 5) * 2
    r = route(logits, k)
    check_rows(r, logits, k)
    torch.testing.assert_close(r.weights.sum(-1), torch.ones(3, 7) if k > 1 else logits.softmax(-1).amax(-1))
    assert torch.equal(route(logits, 1, renormalise=True).weights, torch.ones(3, 7, 1))      # as in the released CuMo, and in Mixtral
    deep = route(logits.view(3, 1, 7, 5), k)                                 # more leading dimensions: the same rows
    assert torch.equal(deep.weights[:, 0], r.weights) and deep.weights.shape == (3, 1, 7, k)
    torch.testing.assert_close((deep.balance, deep.z), (r.balance, r.z))


def test_one_row_needs_no_leading_dimension():
    logits = torch.randn(6, 4)
    for got, want in zip(route(logits, 2)[:4], route(logits[None], 2)):
        torch.testing.assert_close(got, want.view_as(got))


def test_balance_counts_first_choices_only_and_is_one_when_even():
    even = torch.tensor([[0.0, 8, 2, 1], [8, 0, 2, 1], [1, 0, 2, 8], [0, 1, 8, 2]])      # each expert first once; second: 2 mostly
    assert route(even, 2).experts[:, 1].bincount().tolist() == [0, 0, 3, 1]
    assert route(even, 2).balance.item() == pytest.approx(1, abs=1e-6)
    assert route(torch.tensor([[0.0, 60, 30, 0]] * 5), 2).balance.item() == pytest.approx(4)     # all to one: E


def test_every_row_is_balanced_for_itself():
    logits = 60 * F.one_hot(torch.tensor([[0] * 6, [1] * 6]), 2).float()     # two images, each of one expert: even only in the sum
    assert route(logits, 1).balance.item() == pytest.approx(2)
    assert route(logits.flatten(0, 1), 1).balance.item() == pytest.approx(1)


@pytest.mark.parametrize("capacity", [(), (1.0, 2)])
def test_padding_gets_no_weight_and_counts_nowhere(capacity):
    logits = torch.randn(4, 6, 3) * 2
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    r = route(logits, 2, mask, *capacity)
    check_rows(r, logits, 2, mask, *capacity)
    assert not r.weights[~mask].any() and r.weights[mask].any()
    other = route(torch.where(mask[..., None], logits, 50 * torch.randn(4, 6, 3)), 2, mask, *capacity)
    for got, want in ((other.weights, r.weights), (other.balance, r.balance), (other.z, r.z)):
        assert torch.equal(got, want)
    short = route(logits[1:2, :3], 2, None, *capacity)                       # as if the padding were not there
    alone = route(logits[1:2], 2, mask[1:2], *capacity)
    torch.testing.assert_close((alone.weights[:, :3], alone.balance, alone.z), (short.weights, short.balance, short.z))


def test_all_padding_gives_zero_losses():
    r = route(torch.randn(2, 3, 4), 2, torch.zeros(2, 3, dtype=torch.bool))
    assert r.balance == 0 and r.z == 0 and not r.weights.any()


@pytest.mark.parametrize("k, factor, min_capacity, n, n_experts", [
    (1, 1.0, 0, 9, 3), (2, 1.0, 0, 10, 4), (2, 1.5, 0, 7, 4), (2, 0.3, 0, 9, 3), (2, 0.1, 3, 8, 4), (3, 1.0, 0, 11, 4), (2, 9.0, 0, 8, 4)])
def test_capacity_drops_as_a_queue_would(k, factor, min_capacity, n, n_experts):
    logits = torch.randn(3, n, n_experts) + torch.linspace(0, 3, n_experts)  # a favourite expert, so that places run out
    mask = torch.rand(3, n) < 0.8
    for m in (None, mask):
        r = route(logits, k, m, factor, min_capacity)
        check_rows(r, logits, k, m, factor, min_capacity)
        free = route(logits, k, m)                                           # the losses judge wishes, not what was served
        assert torch.equal(r.balance, free.balance) and torch.equal(r.z, free.z)
    assert (route(logits, k, None, factor, min_capacity).weights == 0).any() == (factor < 9)


def test_capacity_equals_deepspeeds_dense_top2_gate():
    n, n_experts, factor = 24, 4, 1.0
    logits = (torch.randn(n, n_experts) + torch.tensor([0.0, 0, 1, 2])).double()
    gates = logits.softmax(-1)
    one = F.one_hot(gates.argmax(-1), n_experts)
    two = F.one_hot(gates.masked_fill(one.bool(), 0).argmax(-1), n_experts)
    place_1, place_2 = one.cumsum(0) - 1, two.cumsum(0) - 1 + one.sum(0)     # second choices queue behind all first ones
    capacity = math.ceil(n / n_experts * factor * 2)
    one, two = one * (place_1 < capacity), two * (place_2 < capacity)
    served = gates * (one + two)                                             # (N, E)
    served = served / served.sum(-1, keepdim=True).clamp(min=1e-9)
    r = route(logits, 2, None, factor)
    torch.testing.assert_close(torch.zeros(n, n_experts).scatter(1, r.experts, r.weights), served.float())
    assert (r.weights == 0).any()


def test_capacity_by_hand():
    p = torch.tensor([[.6, .3, .1], [.6, .3, .1], [.6, .1, .3], [.1, .6, .3]])           # capacity ceil(4 / 3 * 2 * 0.75) = 2
    r = route(p.log(), 2, None, 0.75)
    # Expert 0's two places go to tokens 0 and 1. Expert 1: token 3's first choice comes before token 0's second, then it is full.
    torch.testing.assert_close(r.weights, torch.tensor([[2 / 3, 1 / 3], [1, 0], [0, 1], [2 / 3, 1 / 3]]))
    padded = route(p.log(), 2, torch.tensor([False, True, True, True]), 0.75)            # token 0 wants no place: all others fit
    torch.testing.assert_close(padded.weights, torch.tensor([[0, 0], [2 / 3, 1 / 3], [2 / 3, 1 / 3], [2 / 3, 1 / 3]]))


@pytest.mark.parametrize("n, n_experts, k, factor", [(10, 4, 2, 1.0), (10, 5, 2, 1.5), (7, 4, 2, 1.5), (8, 5, 3, 1.25), (64, 5, 3, 1.25)])
def test_capacity_is_rounded_up_exactly(n, n_experts, k, factor):
    logits = torch.zeros(n, n_experts)
    logits[:, 0] = 1                                                         # all want expert 0 first
    served = int((route(logits, k, None, factor).weights[:, 0] > 0).sum())   # 8 / 5 * 3 * 1.25 is 6, but 6.000000000000001 in floats
    assert served == math.ceil(Fraction(n * k) * Fraction(factor) / n_experts)


def test_gradients_of_routing_equal_a_dense_restatement():
    logits = (torch.randn(2, 9, 4) * 2).double()
    mask = torch.rand(2, 9) < 0.7
    up = torch.randn(2, 9, 2)

    a = logits.float().requires_grad_()
    r = route(a, 2, mask)
    ((r.weights * up).sum() + 3 * r.balance + 0.5 * r.z).backward()

    b = logits.clone().requires_grad_()
    p, real = b.softmax(-1), mask.double()
    top = p.gather(-1, r.experts)
    weights = top / top.sum(-1, keepdim=True) * real[..., None]
    n = real.sum(1)
    mean_p = (p * real[..., None]).sum(1) / n[:, None]
    fraction = (F.one_hot(r.experts[..., 0], 4) * real[..., None]).sum(1) / n[:, None]   # a constant: counting has no gradient
    z = ((b.exp().sum(-1).log() ** 2) * real).sum(1) / n
    ((weights * up).sum() + 3 * (4 * (mean_p * fraction).sum(-1)).mean() + 0.5 * z.mean()).backward()
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_dropped_and_masked_tokens_have_finite_gradients():
    logits = torch.zeros(6, 2).requires_grad_()                              # all choose alike; five of six find no place
    r = route(logits, 1, torch.tensor([True] * 5 + [False]), capacity_factor=0.1)
    assert r.weights[:, 0].tolist() == [0.5, 0, 0, 0, 0, 0]
    (r.weights * 1000).sum().backward()
    assert logits.grad.isfinite().all()


def test_statistics_are_float32_inside_autocast():
    logits = torch.randn(2, 300, 4)
    want = route(logits, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = route(logits, 2)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_bf16_logits_are_routed_in_float32():
    logits = torch.randn(5, 4).bfloat16()
    for a, b in zip(route(logits, 2)[:4], route(logits.float(), 2)):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("kw", [dict(top_k=0), dict(top_k=5), dict(top_k=2, capacity_factor=0.0), dict(top_k=2, capacity_factor=-1)])
def test_route_refuses(kw):
    with pytest.raises(ValueError, match="top_k = |capacity_factor = "):
        route(torch.randn(3, 4), **kw)


# ---------------------------------------------------------------------------------------------------------------------
# Experts

ACTS = {"gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2 ** 0.5)), "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "silu": lambda x: x / (1 + torch.exp(-x))}


def plain_moe(x, weights, experts, w_in, w_out, w_gate, b_in, b_out, act):
    """The definition, token by token: x (N, D), weights and experts (N, K) -> (N, D_out)."""
    rows = []
    for n in range(len(x)):
        y = torch.zeros(w_out.shape[1], dtype=x.dtype)
        for w, e in zip(weights[n], experts[n].tolist()):
            h = w_in[e] @ x[n] + (0 if b_in is None else b_in[e])
            h = ACTS[act](h) if w_gate is None else ACTS[act](w_gate[e] @ x[n]) * h
            y = y + w * (w_out[e] @ h + (0 if b_out is None else b_out[e]))
        rows.append(y)
    return torch.stack(rows)


def problem(n=9, d=6, f=10, d_out=6, e=4, k=2, gated=False, bias=True, dtype=torch.float64):
    """x (N, D), weights (N, K), w_in, w_out, w_gate, b_in, b_out as leaves of that dtype; experts (N, K)."""
    g = torch.Generator().manual_seed(n + 7 * k)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype).requires_grad_()
    experts = torch.rand(n, e, generator=g).topk(k).indices
    leaves = [draw(n, d), draw(n, k), draw(e, f, d), draw(e, d_out, f), draw(e, f, d) if gated else None,
              draw(e, f) if bias else None, draw(e, d_out) if bias else None]
    return leaves, experts


def value_and_gradients(run, leaves, dtype):
    """run(*leaves) and the gradients of a fixed weighted sum of it, all as float64."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves]
    y = run(*leaves)
    (y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [t.double() for t in (y.detach(), *(t.grad for t in leaves if t is not None))]


def compare(backend, dtype, limit, act="gelu", **sizes):
    leaves, experts = problem(dtype=dtype, **sizes)
    want = value_and_gradients(lambda x, w, *rest: plain_moe(x, w, experts, *rest, act), leaves, torch.float64)
    run = lambda x, w, *rest: moe_ffn(x, Routing(w, experts, None, None), *rest, act=act, backend=backend)
    got = value_and_gradients(run, leaves, dtype)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and (a - b).norm() <= limit * b.norm() + 1e-12


SIZES = {"usual": {}, "wider out": dict(d_out=13), "one token": dict(n=1), "empty experts": dict(n=2, e=8, k=1), "k = 1": dict(k=1),
         "k = E": dict(k=4), "one expert": dict(e=1, k=1), "multiples of 8": dict(d=16, f=24, d_out=8),
         "many experts": dict(n=5, d=10, f=7, d_out=10, e=8, k=3), "usual, larger": dict(n=66, d=16, f=24, d_out=16)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act, gated", [("gelu", False), ("quick_gelu", False), ("silu", False), ("silu", True), ("gelu", True)])
@pytest.mark.parametrize("backend, dtype, limit", [("loop", torch.float64, 1e-12), ("sorted", torch.float64, 1e-12),
                                                   ("loop", torch.float32, 1e-5), ("sorted", torch.float32, 1e-5),
                                                   ("grouped", torch.bfloat16, 3e-2)])
def test_backend_equals_the_definition_with_all_gradients(backend, dtype, limit, act, gated, bias):
    compare(backend, dtype, limit, act, gated=gated, bias=bias)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend, dtype, limit", [("loop", torch.float64, 1e-12), ("sorted", torch.float64, 1e-12),
                                                   ("sorted", torch.float32, 1e-5), ("grouped", torch.bfloat16, 2e-2)])
def test_backend_equals_the_definition_at_every_size(backend, dtype, limit, sizes):
    compare(backend, dtype, limit, **sizes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act, gated", [("quick_gelu", False), ("silu", True)])
def test_grouped_pads_odd_widths_and_finds_each_rows_bias(act, gated, bias):
    compare("grouped", torch.bfloat16, 2e-2, act, n=30, d=11, f=13, d_out=5, gated=gated, bias=bias)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (4,), (5, 6), (0, 6)])
def test_sorted_gives_the_gradients_that_are_wanted_and_no_others(wanted, gated):
    leaves, experts = problem(gated=gated)
    gradients = []
    for backend in ("loop", "sorted"):
        mine = [None if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        y = moe_ffn(mine[0], Routing(mine[1], experts, None, None), *mine[2:], act="silu", backend=backend)
        if y.requires_grad:
            y.square().sum().backward()
        gradients.append([None if t is None else t.grad for t in mine])
    for i, (want, got) in enumerate(zip(*gradients)):
        assert (got is not None) == (i in wanted and leaves[i] is not None)
        assert got is None or torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_sorted_gradcheck():
    (x, w, *rest), experts = problem(n=4, d=3, f=4, d_out=2, e=3, gated=True)
    run = lambda x, w, *rest: moe_ffn(x, Routing(w, experts, None, None), *rest, act="silu", backend="sorted")
    assert torch.autograd.gradcheck(run, (x, w, *rest))


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped"])
def test_leading_dimensions_and_strides_do_not_matter(backend):
    dtype = torch.bfloat16 if backend == "grouped" else torch.float32
    (_, _, *rest), _ = problem(d=8, d_out=5, dtype=dtype)
    x = torch.randn(2, 7, 3, 8).to(dtype).transpose(1, 2)                    # (2, 3, 7, 8), not contiguous
    r = route(torch.randn(2, 3, 7, 4), 2)
    y = moe_ffn(x, r, *rest, backend=backend)
    flat = Routing(r.weights.view(-1, 2), r.experts.view(-1, 2), r.balance, r.z)
    assert not x.is_contiguous() and y.shape == (2, 3, 7, 5)
    torch.testing.assert_close(y.view(-1, 5), moe_ffn(x.reshape(-1, 8), flat, *rest, backend=backend))


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped"])
def test_masked_tokens_come_out_as_zero(backend):
    (x, _, *rest), _ = problem(dtype=torch.bfloat16)
    mask = torch.arange(9) < 5
    y = moe_ffn(x, route(torch.randn(9, 4), 2, mask), *rest, backend=backend)
    assert not y[5:].any() and y[:5].all()


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped"])
def test_no_tokens_in_no_tokens_out(backend):
    (_, _, *rest), _ = problem(d_out=5, dtype=torch.bfloat16)
    x = torch.zeros(2, 0, 6, dtype=torch.bfloat16)
    assert moe_ffn(x, route(torch.zeros(2, 0, 4), 2), *rest, backend=backend).shape == (2, 0, 5)


@pytest.mark.parametrize("backend", [None, "loop", "sorted", "grouped"])
def test_autocast_computes_in_bf16_and_leaves_gradients_in_float32(backend):
    leaves, experts = problem(n=20, dtype=torch.float32)
    want = value_and_gradients(lambda x, w, *rest: plain_moe(x, w, experts, *rest, "gelu"), leaves, torch.float64)
    x, w, *rest = leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_ffn(x, Routing(w, experts, None, None), *rest, backend=backend)
    assert y.dtype == torch.bfloat16
    (y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    for got, exact in zip((y, x.grad, w.grad, *(t.grad for t in rest if t is not None)), want, strict=True):
        assert (got.double() - exact).norm() < 3e-2 * exact.norm()
        assert got is y or got.dtype == torch.float32


def test_default_on_meta_is_that_of_cuda(monkeypatch):
    used = []
    for name in ("sorted", "grouped"):
        monkeypatch.setitem(kernels.BACKENDS, name, lambda x, *args, name=name: used.append(name) or x)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(3, 8, dtype=dtype, device="meta")
        moe_ffn(x, route(torch.empty(3, 2, device="meta"), 1), torch.empty(2, 8, 8, device="meta"), torch.empty(2, 8, 8, device="meta"))
    assert used == ["grouped", "sorted"]


def test_default_on_the_cpu_is_sorted():
    (x, w, *rest), experts = problem(dtype=torch.float32)
    r = Routing(w, experts, None, None)
    assert torch.equal(moe_ffn(x, r, *rest), moe_ffn(x, r, *rest, backend="sorted"))


@pytest.mark.parametrize("kw, words", [(dict(backend="fast"), "unknown backend 'fast'"), (dict(act="relu"), "unknown activation 'relu'"),
                                       (dict(backend="grouped"), "bfloat16.*float32")])
def test_moe_ffn_refuses(kw, words):
    (x, w, *rest), experts = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        moe_ffn(x, Routing(w, experts, None, None), *rest, **kw)


def test_moe_ffn_refuses_a_routing_for_other_tokens():
    (x, w, *rest), experts = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\(8,\).*\(9,\)"):
        moe_ffn(x, Routing(w[:8], experts[:8], None, None), *rest)
    with pytest.raises(ValueError, match=r"weights \(9, 1\) for experts \(9, 2\)"):
        moe_ffn(x, Routing(w[:, :1], experts, None, None), *rest)


@pytest.mark.parametrize("backend", [None, "loop", "sorted", "grouped"])
def test_moe_ffn_refuses_a_routing_over_another_number_of_experts(backend):
    (x, w, w_in, *rest), experts = problem(dtype=torch.bfloat16)
    for n_experts in (3, 8):                             # with 8, choices of experts 4 to 7 were dropped, or their rows not written
        with pytest.raises(ValueError, match=f"over {n_experts} experts, the layer has 4"):
            moe_ffn(x, route(torch.randn(9, n_experts), 2), w_in, *rest, backend=backend)
    for wrong, words in ((4, "0 to 4"), (-1, "-1 to ")):                         # a routing made by hand does not say of how many
        experts[0] = torch.tensor([wrong, 0])
        with pytest.raises(ValueError, match=f"chooses experts {words}.*the layer has 4"):
            moe_ffn(x, Routing(w, experts, None, None), w_in, *rest, backend=backend)
    with pytest.raises(ValueError, match="differ in the number of experts"):
        moe_ffn(x, route(torch.randn(9, 4), 2), w_in[:3], *rest, backend=backend)


def test_with_expert_parallelism_a_layer_has_its_part_of_the_experts(monkeypatch):
    monkeypatch.setattr(kernels.dist, "get_world_size", lambda group: 2)
    (_, _, *weights), _ = problem()
    stack = kernels.Stack(*weights)
    kernels.check_experts(route(torch.randn(9, 8), 2), stack, "two ranks")
    with pytest.raises(ValueError, match="over 4 experts, the layer has 8"):
        kernels.check_experts(route(torch.randn(9, 4), 2), stack, "two ranks")


def test_a_tiny_weight_that_is_left_gives_no_gradient_that_is_nan():
    """Where the first choice is dropped, the second's p may be next to nothing, and one over it infinite."""
    logits = torch.full((9, 4), -5.0)
    logits[:, 0] = 100.0
    logits[torch.arange(9), 1 + torch.arange(9) % 3] = 0.0
    logits.requires_grad_()
    r = route(logits, 2, capacity_factor=0.5)
    assert (r.weights[-1] < 1e-30).all() and r.weights[0].sum().item() == pytest.approx(1)
    (r.weights * torch.randn(9, 2)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped"])
def test_a_token_may_name_one_expert_twice(backend):
    (x, _, *rest), _ = problem()
    twice = Routing(torch.full((9, 2), 0.25), torch.tensor([[1, 1]] * 9), None, None)
    once = Routing(torch.full((9, 1), 0.5), torch.tensor([[1]] * 9), None, None)
    kind = torch.bfloat16 if backend == "grouped" else torch.float32
    got, want = (moe_ffn(x.to(kind), r, *[t if t is None else t.to(kind) for t in rest], backend=backend) for r in (twice, once))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_a_mask_is_one_number_a_token():
    with pytest.raises(ValueError, match=r"mask is for tokens \(5,\), the logits are of tokens \(2, 5\)"):
        route(torch.randn(2, 5, 4), 2, torch.ones(5, dtype=torch.bool))


def test_rows_without_tokens_count_nowhere():
    logits, mask = torch.randn(3, 7, 4), torch.zeros(3, 7, dtype=torch.bool)
    mask[1, :5] = True
    got, want = route(logits, 2, mask), route(logits[1:2, :5], 2)
    for name in ("balance", "z", "load"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    empty = route(torch.zeros(0, 5, 4), 2)
    assert empty.balance == empty.z == 0 and empty.load.tolist() == [0] * 4


def test_slots_are_rounded_up_but_not_because_of_rounding():
    experts = torch.zeros(100, 2, dtype=torch.long)
    slots = lambda factor, n=100: kernels.slots_per_expert(experts[:n], None, 4, factor, 0).item()
    assert [slots(1.1), slots(1.0), slots(1.5), slots(1.3, 3), slots(2.2)] == [55, 50, 75, 2, 110]


def moe(**more):
    layer = MoE(8, 16, "gelu", 4, 2, **more)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def test_top_1_routers_learn_from_the_task():
    """Rescaled to sum to 1, the only weight is 1 whatever the router says: its gradient was rounding noise, under 1e-7."""
    layer, x, up = moe(), torch.randn(50, 8), torch.randn(50, 8)
    layer.top_k = 1
    (layer(x)[0] * up).sum().backward()
    logits = (x @ layer.router.T).detach().requires_grad_()                      # by hand: p of the best times its FFN
    p, experts = logits.softmax(-1).max(-1)
    y = plain_moe(x, torch.ones(50, 1), experts[:, None], layer.w_in, layer.w_out, None, None, None, "gelu").detach()
    (p * (y * up).sum(1)).sum().backward()
    torch.testing.assert_close(layer.router.grad, logits.grad.T @ x, rtol=1e-4, atol=1e-4)
    assert layer.router.grad.norm() > 1


def test_autocast_rounds_a_router_unless_it_is_a_float32_router():
    """CuMo's and Mixtral's gate is a linear layer in the model's type; DeepSpeed's computes in float32, whatever it is stored in."""
    plain, exact = moe(), moe(float32_router=True)
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(400, 8)
    want = x @ plain.router.T
    with torch.autocast("cpu", torch.bfloat16):
        rounded, logits = plain.logits(x), exact.logits(x)
        y, _ = exact(x)
    assert rounded.dtype == y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, want)
    logits.sum().backward()
    assert exact.router.grad.dtype == torch.float32
    half, x = exact.bfloat16(), x.bfloat16()
    torch.testing.assert_close(half.logits(x), x.float() @ half.router.float().T)
    assert exact.to("meta").logits(x.to("meta")).dtype == torch.float32          # train.py --plan


def test_the_example_in_the_docstring_runs_and_its_loss_falls():
    example = kernels.__doc__.split("How to use it:")[1].split("Letters for shapes")[0]
    scope = {}
    exec(textwrap.dedent(example), scope)
    before = scope["loss"].item()
    for _ in range(20):
        y, routing = scope["layer"](scope["x"])
        loss = (y - scope["x"].flip(1)).square().mean() + 0.1 * routing.balance + 0.01 * routing.z
        scope["optimizer"].zero_grad()
        loss.backward()
        scope["optimizer"].step()
    assert loss.item() < before and scope["y"].shape == (8, 100, 64)
