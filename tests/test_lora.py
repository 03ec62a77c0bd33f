"""LoRA (model.py): nothing at first, exact products and gradients, merged and gone."""
import copy

import pytest
import torch

from kernels import FFN
from model import MoE, CuMo, adapted, add_lora, choose_trainable, count_parameters, drop_lora, merge_lora, merge_state, plain_name, rope_table
from upcycle import load, save, upcycle

TOKENS = torch.tensor([[7, 1, 2, 30, 9, 3], [5, 6, 2, 2, 11, 8]])


def noisy(model, std=0.1):
    """As after some training: no B is zero."""
    generator = torch.Generator().manual_seed(3)
    for _, _, lora in adapted(model):
        lora.b.data.copy_(torch.randn(lora.b.shape, generator=generator) * std)
    return model


@pytest.fixture(params=["dense", "experts"])
def model(request, tiny_model):
    return tiny_model(text=dict(n_experts=[4, 0] if request.param == "experts" else 0, qkv_bias=True))


@pytest.mark.parametrize("which", ["ffn", "all"])
@torch.no_grad()
def test_zero_effect_at_first_and_only_the_chosen_weights(model, which):
    want, names = model(TOKENS).logits, set(model.state_dict())
    assert add_lora(model, 3, 6, which) is model
    assert torch.equal(model(TOKENS).logits, want)
    assert len(adapted(model)) == 2 * (3 if which == "ffn" else 7)
    for name, p in model.named_parameters():
        assert p.requires_grad != name.endswith(".original"), name
        assert name.startswith("text.layers.") or plain_name(name) == name
    assert {plain_name(name) for name in model.state_dict()} - {None} == names
    for module, name, lora in adapted(model):
        w = module.parametrizations[name].original                                 # E lead every tensor: --expert-parallel deals them out
        assert lora.a.shape == (*w.shape[:-2], 3, w.shape[-1]) and lora.b.shape == (*w.shape[:-1], 3) and lora.scale == 2
        assert not lora.b.any() and 0 < lora.a.abs().max() <= w.shape[-1] ** -0.5
    noisy(model)
    assert not torch.allclose(model(TOKENS).logits, want, atol=1e-3)


@torch.no_grad()
def test_every_expert_has_an_adapter_of_its_own(tiny_model):
    model = add_lora(tiny_model(text=dict(n_experts=4)), 2, 2, "ffn")
    lora = model.text.layers[0].ffn.parametrizations.w_in[0]
    before = model.text.layers[0].ffn.w_in.clone()
    lora.b[1] += 1
    changed = (model.text.layers[0].ffn.w_in != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False] and not torch.equal(lora.a[0], lora.a[1])


@torch.no_grad()
def test_merging_and_back(model):
    noisy(add_lora(model, 3, 6))
    want, state = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    merge_lora(model)
    merge_lora(model)                                                              # a second time does nothing
    torch.testing.assert_close(model(TOKENS).logits, want, rtol=0, atol=1e-6)
    merge_lora(model, on=False)
    torch.testing.assert_close(model(TOKENS).logits, want, rtol=0, atol=1e-5)
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, state[name], rtol=0, atol=1e-6)


@torch.no_grad()
def test_dropping_leaves_a_plain_model(model):
    names, plain = list(model.state_dict()), copy.deepcopy(model)
    noisy(add_lora(model, 3, 6))
    twin, want = copy.deepcopy(model), model(TOKENS).logits
    merged = merge_state(model.state_dict(), model)
    assert adapted(model) and torch.equal(model(TOKENS).logits, want)              # merge_state touches nothing
    drop_lora(model)
    assert not adapted(model) and set(model.state_dict()) == set(names) == set(merged) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(merged[name], w) for name, w in model.state_dict().items())
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    torch.testing.assert_close(model(TOKENS).logits, want, rtol=0, atol=1e-6)
    assert torch.equal(twin(TOKENS).logits, want) and len(adapted(twin)) == 14     # deep copies do not share their fate
    state = model.state_dict()                                                     # without adapters: passed through
    again = merge_state(state, model)
    assert list(again) == list(state) and all(again[name] is w for name, w in state.items())
    merge_lora(twin)
    assert all(torch.equal(merge_state(twin.state_dict(), twin)[name], w) for name, w in merged.items())       # asleep: not added twice


@pytest.mark.parametrize("experts", [0, 4])
def test_gradients_are_those_of_the_explicit_product(tiny_model, experts):
    model = noisy(add_lora(tiny_model(text=dict(n_experts=experts)).double(), 3, 6))
    model(TOKENS, labels=TOKENS).loss.backward()
    explicit = copy.deepcopy(model)
    drop_lora(explicit)
    explicit.zero_grad()
    weights = {}                                                                   # W + s B A by hand, in a plain model
    for (module, name, lora), (path, _) in zip(adapted(model), [(n, m) for n, m in model.named_modules() if hasattr(m, "parametrizations")
                                                                for _ in m.parametrizations]):
        w = module.parametrizations[name].original.detach()
        a, b = lora.a.detach().clone().requires_grad_(), lora.b.detach().clone().requires_grad_()
        weights[f"{path}.{name}"] = a, b, lora, w + 2 * torch.einsum("...or,...ri->...oi", b, a)
    out = torch.func.functional_call(explicit, {k: v[3] for k, v in weights.items()}, (TOKENS,), dict(labels=TOKENS))
    out.loss.backward()
    assert len(weights) == 14
    for a, b, lora, _ in weights.values():
        for ours, hand in ((lora.a.grad, a.grad), (lora.b.grad, b.grad)):
            torch.testing.assert_close(ours, hand, rtol=1e-9, atol=1e-12)
            assert ours.abs().max() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith(".original"))


def test_only_adapters_learn_and_the_decoder_follows(tiny_model):
    model = tiny_model(text=dict(n_experts=4))
    model.requires_grad_(False)
    frozen = copy.deepcopy(model.state_dict())
    add_lora(model, 4, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(20):
        losses.append((loss := model(TOKENS, labels=TOKENS).parts["lm"]).item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    for name, w in model.state_dict().items():
        assert plain_name(name) is None or torch.equal(w, frozen[plain_name(name)])


def test_the_seed_decides_and_real_ones_on_meta(tiny_config):
    a, b, c = (add_lora(CuMo(tiny_config()), 2, 2, seed=seed).state_dict() for seed in (1, 1, 2))
    name = "text.layers.1.ffn.parametrizations.w_out.0.a"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    for real in (False, True):
        with torch.device("meta"):
            model = add_lora(CuMo(tiny_config()), 2, 2, seed=1, real=real)
        assert model.state_dict()[name].is_meta != real and model.text.layers[0].ffn.parametrizations.w_in.original.is_meta
    assert torch.equal(model.state_dict()[name], a[name])


def test_it_works_compiled_checkpointed_and_under_autocast(tiny_model):
    model = noisy(add_lora(tiny_model(text=dict(n_experts=[4, 0])), 3, 6))
    block, x, rope = model.text.layers[0], torch.randn(2, 6, 16), rope_table(torch.arange(6)[None], 4, 1e4)
    real = torch.ones(2, 6, dtype=torch.bool)
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        y = run(x, rope, real)[0]
        y.square().sum().backward()
        results.append([y.detach()] + [p.grad for p in block.parameters() if p.grad is not None])
    assert len(results[0]) > 14
    torch.testing.assert_close(results[0], results[1])

    grads = []
    for on in (False, True):
        model.train().checkpointing(on)
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if n.endswith((".a", ".b"))])
    torch.testing.assert_close(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
    torch.testing.assert_close(loss, model(TOKENS, labels=TOKENS).loss, rtol=0.05, atol=0)


def test_counts_and_folders(tiny_model, tmp_path):
    model = tiny_model(text=dict(n_experts=4))
    before = count_parameters(model)["text"]
    noisy(add_lora(model, 2, 4, "ffn"))
    after, one = count_parameters(model)["text"], 2 * 3 * 2 * (16 + 24)            # layers, weights, rank, O + I
    assert after == (before[0] + 4 * one, before[1] + 2 * one)
    save(model, tmp_path)                                                          # a folder holds plain weights
    loaded, _ = load(tmp_path)
    assert not adapted(loaded)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-6)


def test_errors(tiny_model):
    model = tiny_model()
    for kw, words in ((dict(rank=0, alpha=1), "rank = 0"), (dict(rank=1.5, alpha=1), "1.5"), (dict(rank=2, alpha=0), "alpha = 0"),
                      (dict(rank=2, alpha=1, which="vision"), "'vision' matches nothing")):
        with pytest.raises(ValueError, match=words):
            add_lora(model, **kw)
    assert not adapted(model)
    add_lora(model, 2, 1, "ffn")
    with pytest.raises(ValueError, match="already"):
        add_lora(model, 2, 1)
    with pytest.raises(ValueError, match="merge them first"):
        upcycle(model, text=4)
    drop_lora(model)
    assert isinstance(upcycle(model, text=4).text.layers[0].ffn, MoE) and not isinstance(model.text.layers[0].ffn, FFN)


def test_what_trains_is_chosen_before_the_adapters_are_added(tiny_model):
    model = add_lora(tiny_model(), 2, 4)
    with pytest.raises(ValueError, match="choose what trains before add_lora"):
        choose_trainable(model, ["text.ffn"])
