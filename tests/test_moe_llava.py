"""MoE-LLaVA: experts in the decoder. DeepSpeed's top-2 gate said a second time, the published layout written by hand, the recipe's three stages
on a model of 0.1M parameters, decoding with a cache, and experts in every part at once.
"""
import dataclasses
import json
import math
import random
import re
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data as d
import model as m
import train
from kernels import route
from model import PAD, Config, CuMo
from upcycle import load, save, upcycle

# ---------------------------------------------------------------------------------------------------------------------
# 1. The gate


def deepspeed_top2(logits, factor, min_capacity, noise=None):
    """deepspeed/moe/sharded_moe.py's top2gating, in its dense form. logits (N, E) -> combined weights (N, E), which first and which second
    choices are served (N, E) both, the loss."""
    n, n_experts = logits.shape
    gates = logits.softmax(1)
    capacity = max(math.ceil(Fraction(n, n_experts) * 2 * Fraction(factor)), min_capacity)       # exact for factors that binary numbers hold
    mask1 = F.one_hot(gates.argmax(1), n_experts)
    second = (logits if noise is None else logits + noise).masked_fill(mask1.bool(), -math.inf)
    mask2 = F.one_hot(second.argmax(1), n_experts)
    locations1, locations2 = mask1.cumsum(0) - 1, mask2.cumsum(0) - 1 + mask1.sum(0, keepdim=True)
    l_aux = (gates.mean(0) * mask1.to(gates.dtype).mean(0)).mean() * n_experts * n_experts
    mask1, mask2 = mask1 * (locations1 < capacity), mask2 * (locations2 < capacity)
    gates1, gates2 = (gates * mask1).sum(1, keepdim=True), (gates * mask2).sum(1, keepdim=True)
    total = (gates1 + gates2).clamp(min=torch.finfo(gates.dtype).eps)
    return gates1 / total * mask1 + gates2 / total * mask2, mask1, mask2, l_aux


def deepspeed_top1(logits, factor, min_capacity):
    """The same file's top1gating, token by token, with use_rts=False: whoever comes first is served. logits (N, E) -> weights (N, E), loss."""
    n, n_experts = logits.shape
    capacity = max(math.ceil(Fraction(n, n_experts) * Fraction(factor)), min_capacity)
    gates, taken = logits.softmax(1), [0] * n_experts
    served, first = torch.zeros_like(gates), torch.zeros_like(gates)
    for i, expert in enumerate(gates.argmax(1).tolist()):
        first[i, expert] = 1
        taken[expert] += 1
        if taken[expert] <= capacity:
            served[i, expert] = 1
    return gates * served, n_experts * (gates.mean(0) * first.mean(0)).sum()


def test_route_is_deepspeeds_top_1_gate():
    """Not rescaled: the weight is the probability, so the router has a gradient."""
    dropped = 0
    for logits, factor, least, g in cases(100, seed=5):
        x, y = (logits.clone().requires_grad_() for _ in range(2))
        r, (weights, loss) = route(x, 1, capacity_factor=factor, min_capacity=least), deepspeed_top1(y, factor, least)
        got = torch.zeros_like(x).scatter(1, r.experts, r.weights)
        torch.testing.assert_close((got, r.balance), (weights, loss), atol=2e-6, rtol=2e-6)
        ramp = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        ((got * ramp).sum() + r.balance).backward()
        ((weights * ramp).sum() + loss).backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
        dropped += int((r.weights == 0).sum())
    assert dropped > 500


def dense(r, n_experts):
    """A Routing of (N, 2) as the gate's (N, E)."""
    one_hot = F.one_hot(r.experts, n_experts)
    return (r.weights.unsqueeze(-1) * one_hot).sum(1), *((r.weights != 0).unsqueeze(-1) * one_hot).unbind(1)


def assert_same_gate(r, wanted, n_experts, tolerance=2e-6):
    combined, first, second = dense(r, n_experts)
    torch.testing.assert_close(combined, wanted[0].to(combined.dtype), atol=tolerance, rtol=tolerance)
    assert torch.equal(first, wanted[1]) and torch.equal(second, wanted[2])
    torch.testing.assert_close(r.balance, wanted[3].to(r.balance.dtype), atol=tolerance, rtol=tolerance)


def cases(n_cases, seed):
    """(logits float32, capacity factor, min_capacity, generator): few slots, and in every other case an expert that everybody wants."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    for i in range(n_cases):
        n, n_experts = rng.randint(1, 60), rng.choice((2, 3, 4, 8))
        logits = 1.5 * torch.randn(n, n_experts, generator=g)
        logits[:, 0] += 2 * (i % 2)
        yield logits, rng.choice((0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)), rng.choice((0, 0, 1, 4)), g


@pytest.mark.parametrize("noisy", [False, True])
def test_route_is_deepspeeds_gate(noisy):
    dropped = whole = lost = 0
    for logits, factor, least, g in cases(150, seed=1 + noisy):
        n_experts, noise = logits.shape[1], None
        if noisy:
            noise = -torch.empty_like(logits).exponential_(generator=g).log()
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 5e-6)):              # route computes in float32
            x, y = (logits.detach().clone().to(dtype).requires_grad_() for _ in range(2))
            r = route(x, 2, capacity_factor=factor, min_capacity=least, noise=noise)
            wanted = deepspeed_top2(y, factor, least, noise)
            assert_same_gate(r, wanted, n_experts, tolerance)
            ramp = torch.linspace(-1, 1, logits.numel()).view_as(logits)
            ((dense(r, n_experts)[0] * ramp).sum() + r.balance).backward()
            ((wanted[0] * ramp).sum() + wanted[3]).backward()
            torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
        assert torch.equal(r.experts[:, 0], logits.argmax(1)) and (r.experts[:, 0] != r.experts[:, 1]).all()
        kept = r.weights != 0
        assert torch.allclose(r.weights.sum(1), kept.any(1).float())
        dropped, whole, lost = dropped + int((~kept).sum()), whole + kept.numel(), lost + int((~kept).all(1).sum())
    assert dropped > 0.25 * whole and lost > 100                                    # heavy, and some tokens find no expert at all


def test_padding_takes_no_slot_and_does_not_count():
    for i, (logits, factor, least, g) in enumerate(cases(100, seed=3)):
        real = torch.rand(len(logits), generator=g) < 0.6
        real[int(torch.randint(len(real), (), generator=g))] = True
        noise = torch.randn(logits.shape, generator=g) if i % 2 else None
        r = route(logits, 2, real, factor, least, noise)
        assert (r.weights[~real] == 0).all()
        wanted = deepspeed_top2(logits[real].double(), factor, least, None if noise is None else noise[real])
        assert_same_gate(r._replace(weights=r.weights[real], experts=r.experts[real]), wanted, logits.shape[1])
    nothing = route(logits, 2, torch.zeros(len(logits), dtype=torch.bool), 1.0)
    assert (nothing.weights == 0).all() and nothing.balance == 0


def test_each_leading_index_has_its_own_slots():
    logits = torch.randn(3, 40, 4)
    together = route(logits, 2, capacity_factor=0.5)
    for i in range(3):
        alone = route(logits[i], 2, capacity_factor=0.5)
        assert torch.equal(together.weights[i], alone.weights) and torch.equal(together.experts[i], alone.experts)


@pytest.mark.parametrize("more, words", [
    (dict(capacity_factor=0), "capacity_factor = 0 must be positive"), (dict(capacity_factor=-1.), "capacity_factor = -1.0 must be positive"),
    (dict(top_k=5), "top_k = 5 must lie between 1 and the number of experts, 4"), (dict(top_k=0), "top_k = 0 must lie between")])
def test_route_refuses(more, words):
    with pytest.raises(ValueError, match=words):
        route(torch.zeros(3, 4), **{"top_k": 2, **more})


# ---------------------------------------------------------------------------------------------------------------------
# 2. The published layout, written here by hand

D, FFN_DIM, LAYERS, PLACES, EXPERTS, VOCAB = 32, 48, 4, [0, 2], 4, 64             # heads 8 wide, 2 of 4 for keys and values
EYE = dict(model_type="clip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28,
           patch_size=7, hidden_act="quick_gelu", layer_norm_eps=1e-5)
MOE = dict(moe_enable=True, moe_mode="sparse", moe_layers_idx=PLACES, ep_size=1, num_experts=[EXPERTS] * len(PLACES), top_k_experts=2,
           capacity_factor=1.5, eval_capacity_factor=2.0, min_capacity=0, use_residual=False, router_aux_loss_coef=0.01)


def published_tensors(dtype=torch.float32, gate_dtype=None):
    shapes, eye = {}, "model.image_tower.image_tower.vision_model."
    shapes |= {eye + "embeddings.class_embedding": (24,), eye + "embeddings.patch_embedding.weight": (24, 3, 7, 7),
               eye + "embeddings.position_embedding.weight": (17, 24)}
    for norm in ("pre_layrnorm", *(f"encoder.layers.{i}.layer_norm{j}" for i in range(3) for j in (1, 2))):
        shapes |= {f"{eye}{norm}.weight": (24,), f"{eye}{norm}.bias": (24,)}
    for i in range(3):
        for name, out, into in (("self_attn.q_proj", 24, 24), ("self_attn.k_proj", 24, 24), ("self_attn.v_proj", 24, 24),
                                ("self_attn.out_proj", 24, 24), ("mlp.fc1", 40, 24), ("mlp.fc2", 24, 40)):
            shapes |= {f"{eye}encoder.layers.{i}.{name}.weight": (out, into), f"{eye}encoder.layers.{i}.{name}.bias": (out,)}
    for i, into in ((0, 24), (2, D)):
        shapes |= {f"model.mm_projector.image_spatial_proj.{i}.weight": (D, into), f"model.mm_projector.image_spatial_proj.{i}.bias": (D,)}
    shapes |= {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,), "lm_head.weight": (VOCAB, D)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,), at + "self_attn.q_proj.weight": (D, D),
                   at + "self_attn.k_proj.weight": (D // 2, D), at + "self_attn.v_proj.weight": (D // 2, D),
                   at + "self_attn.o_proj.weight": (D, D)}
        if i in PLACES:
            shapes[at + "mlp.deepspeed_moe.gate.wg.weight"] = (EXPERTS, D)
        for ffn in [f"mlp.deepspeed_moe.experts.deepspeed_experts.{e}." for e in range(EXPERTS)] if i in PLACES else ["mlp."]:
            shapes |= {f"{at}{ffn}gate_proj.weight": (FFN_DIM, D), f"{at}{ffn}up_proj.weight": (FFN_DIM, D),
                       f"{at}{ffn}down_proj.weight": (D, FFN_DIM)}
    g, out = torch.Generator().manual_seed(5), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        noise = noise * noise[0].numel() ** -0.5 if len(shape) > 1 else 0.3 * noise + (0 if name.endswith(("bias", "class_embedding")) else 1)
        out[name] = noise.to(gate_dtype if gate_dtype and name.endswith("wg.weight") else dtype)
    return out


def write_published(folder, moe=MOE, tensors=None, **more):
    config = dict(architectures=["MoELLaVAMistralForCausalLM"], model_type="moe_llava_mistral", hidden_size=D, intermediate_size=FFN_DIM,
                  num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB, hidden_act="silu",
                  rms_norm_eps=1e-5, rope_theta=1e4, sliding_window=4096, tie_word_embeddings=False, mm_image_tower="",
                  image_projector_type="mlp2x_gelu", mm_video_tower=None, mm_hidden_size=24, mm_vision_select_layer=-2,
                  mm_vision_select_feature="patch", moe=moe)
    for name, value in (("config.json", config | more), ("clip_config.json", EYE)):
        (folder / name).write_text(json.dumps(value))
    save_file(tensors or published_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def question(vocab=VOCAB, n_slots=16, rows=2, seed=0):
    """Tokens (rows, T), an image and some words each, the rows after the first shorter; images; labels."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.cat([torch.full((rows, n_slots), m.IMAGE), torch.randint(vocab, (rows, 9), generator=g)], 1)
    for i in range(1, rows):
        tokens[i, -2 * i:] = PAD
    return tokens, torch.where(tokens < 0, m.IGNORE, tokens)


def test_published_layout_loads_runs_and_comes_back(tmp_path):
    (tmp_path / "a").mkdir()
    folder, tensors = write_published(tmp_path / "a"), published_tensors()
    model, _ = load(folder)
    c = model.config
    assert c.text.n_experts == [4, 0, 4, 0] and c.text.top_k == 2 and not any(c.vision.n_experts) and not c.connector.n_experts
    assert (c.text.capacity_factor, c.text.eval_capacity_factor, c.text.min_capacity, c.text.aux) == (1.5, 2.0, 0, "sum")
    assert (c.balance_coef, c.z_coef, c.text.sliding_window, c.vision.n_heads, c.template) == (0.01, 0, 4096, 3, "openchat")

    # the MoE layer's answer, from the file's tensors by their names and the gate above
    x, at = torch.randn(50, D), "model.layers.2.mlp.deepspeed_moe."
    for training, factor in ((False, 2.0), (True, 1.5)):
        weights = deepspeed_top2(x @ tensors[at + "gate.wg.weight"].T, factor, 0)[0]
        expert = lambda e, name: tensors[f"{at}experts.deepspeed_experts.{e}.{name}_proj.weight"].T
        wanted = sum(weights[:, e:e + 1] * ((F.silu(x @ expert(e, "gate")) * (x @ expert(e, "up"))) @ expert(e, "down")) for e in range(EXPERTS))
        torch.testing.assert_close(model.text.layers[2].ffn.train(training)(x)[0], wanted, atol=1e-5, rtol=1e-5)

    tokens, labels = question()
    images = torch.randn(2, 3, 28, 28)
    out = model.eval()(tokens, images, labels=labels)
    assert out.loss.isfinite() and out.logits.isfinite().all() and len(out.routing["text"]) == 2 and not out.routing["vision"]
    assert out.loss.item() == pytest.approx((out.parts["lm"] + 0.01 * sum(r.balance for r in out.routing["text"])).item())

    save(model, str(tmp_path / "b"), layout="moe-llava")
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert {k: v for k, v in json.loads((tmp_path / "b" / "config.json").read_text())["moe"].items() if k in MOE} == {**MOE, "moe_mode": "custom"}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "moe_llava_mistral"
    again, _ = load(str(tmp_path / "b"))
    assert dataclasses.asdict(again.config) == dataclasses.asdict(c)
    assert torch.equal(again(tokens, images).logits, out.logits)


@torch.no_grad()
def test_a_published_layout_of_top_1_has_deepspeeds_top_1_gate(tmp_path):
    moe = {**MOE, "top_k_experts": 1, "min_capacity": 4}
    (tmp_path / "a").mkdir()
    model, tensors = load(write_published(tmp_path / "a", moe=moe))[0], published_tensors()
    x, at = torch.randn(50, D), "model.layers.2.mlp.deepspeed_moe."
    for training, factor in ((False, 2.0), (True, 1.5)):
        weights, loss = deepspeed_top1(x @ tensors[at + "gate.wg.weight"].T, factor, 4)
        expert = lambda e, name: tensors[f"{at}experts.deepspeed_experts.{e}.{name}_proj.weight"].T
        wanted = sum(weights[:, e:e + 1] * ((F.silu(x @ expert(e, "gate")) * (x @ expert(e, "up"))) @ expert(e, "down")) for e in range(EXPERTS))
        got, routing = model.text.layers[2].ffn.train(training)(x)
        torch.testing.assert_close((got, routing.balance), (wanted, loss), atol=1e-5, rtol=1e-5)
    save(model.eval(), str(tmp_path / "b"), layout="moe-llava")
    assert load(str(tmp_path / "b"))[0].config == model.config
    model.config.text.renormalise = True                                       # as models of before were trained: that gate computes otherwise
    with pytest.raises(ValueError, match="text.renormalise = True: DeepSpeed's gate"):
        save(model, str(tmp_path / "c"), layout="moe-llava")


def test_the_gate_may_be_stored_in_float32(tmp_path):
    """DeepSpeed keeps its gate in float32 in a model that is bfloat16, and computes it so inside autocast too."""
    tensors = published_tensors(torch.bfloat16, torch.float32)
    model, _ = load(write_published(tmp_path, tensors=tensors))
    moe, x = model.text.layers[2].ffn, torch.randn(50, D)
    want = x @ tensors["model.layers.2.mlp.deepspeed_moe.gate.wg.weight"].T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(moe.logits(x), want)
    tokens, _ = question()
    assert model(tokens, torch.randn(2, 3, 28, 28)).logits.isfinite().all()
    assert model.generate(tokens, torch.randn(2, 3, 28, 28), max_new_tokens=3).shape == (2, 3)
    save(model, str(tmp_path / "b"), layout="moe-llava")
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert all(back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_num_experts_once_stands_for_all_layers(tmp_path):
    model, _ = load(write_published(tmp_path, moe={**MOE, "num_experts": [EXPERTS]}))
    assert model.config.text.n_experts == [4, 0, 4, 0]


@pytest.mark.parametrize("moe, more, words", [
    ({**MOE, "use_residual": True}, {}, "use_residual"),
    (MOE, dict(model_type="moe_llava_phi", architectures=["MoELLaVAPhiForCausalLM"]), "MoELLaVAPhiForCausalLM is not supported"),
    (MOE, dict(model_type="moe_llava_qwen", architectures=["MoELLaVAQWenForCausalLM"]), "MoELLaVAQWenForCausalLM is not supported"),
    (MOE, dict(model_type="moe_llava_phi", architectures=None), "moe_llava_phi is not supported"),
    ({**MOE, "num_experts": [4, 4, 4]}, {}, "config.json"),
    ({**MOE, "num_experts": 4}, {}, "moe.num_experts = 4 must be a list"),
    ({**MOE, "moe_layers_idx": [0, 7], "num_experts": [4]}, {}, "config.json|has no place|missing"),
    (MOE, dict(image_projector_type="qformer"), "mlp2x_gelu")])
def test_published_layouts_that_are_refused(tmp_path, moe, more, words):
    with pytest.raises(ValueError, match=words) as e:
        load(write_published(tmp_path, moe=moe, **more))
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The recipe

SMALL = dict(vision=dict(image_size=48, patch_size=8, dim=32, n_layers=3, n_heads=4, ffn_dim=64),
             text=dict(vocab_size=512, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, rope_theta=1e4), template="tiny")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dense model folder to start from."""
    folder, scenes = str(tmp_path_factory.mktemp("base")), [d.make_scene(i) for i in range(150)]
    texts = [d.describe(s) for s in scenes] + [f"{q} {a}" for s in scenes for _, q, a in d.ask_many(s, 6, random.Random(0))]
    torch.manual_seed(0)
    save(CuMo(Config(**SMALL)), folder, d.train_tokenizer(texts, 512))
    return folder


def flags(init, out, *more):
    return [str(f) for f in ("--recipe", "moe-llava", "--init", init, "--out", out, "--device", "cpu", "--batch-size", 4, "--eval-questions", 4,
                             "--steps", 2, *more)]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """All three stages, 2 steps each -> the folder."""
    out = str(tmp_path_factory.mktemp("run") / "out")
    train.main(flags(base, out))
    return out


def rows(out):
    with open(f"{out}/log.jsonl") as f:
        return [json.loads(line) for line in f]


def moved(before, after):
    """Names of the parameters that differ, and of all."""
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}, set(before)


def upcycled(source, *more):
    model = load(source)[0]
    train.make_experts(train.parse(flags(source, "unused", *more)), model)
    return model


def test_what_moves_in_the_three_stages(base, run):
    stage0, stage1, stage2, stage3 = (load(f)[0] for f in (base, f"{run}/stage1", f"{run}/stage2", run))
    changed, names = moved(stage0, stage1)
    assert changed == {n for n in names if n.startswith("connector.")}
    changed, names = moved(stage1, stage2)
    assert changed == {n for n in names if n.startswith(("connector.", "text."))}
    changed, names = moved(upcycled(f"{run}/stage2"), stage3)
    assert changed == {n for n in names if n.startswith("connector.") or re.match(r"text\.layers\.\d\.ffn\.", n)}
    assert {"text.layers.0.ffn.router", "text.layers.1.ffn.w_gate", "text.layers.2.ffn.w_out"} <= changed


def test_config_after_the_three_stages(run):
    assert not any(load(f"{run}/stage2")[0].config.text.n_experts)
    c = load(run)[0].config
    assert c.text.n_experts == [4, 0, 4, 0] and c.text.top_k == 2 and not any(c.vision.n_experts) and not c.connector.n_experts
    assert (c.text.capacity_factor, c.text.eval_capacity_factor, c.text.aux, c.text.noisy) == (1.5, 2.0, "sum", False)
    assert (c.balance_coef, c.z_coef) == (0.01, 0.0)
    log = rows(run)
    assert [(r["stage"], r["step"]) for r in log] == [(s, i) for s in (1, 2, 3) for i in (0, 1)]
    for r in log:
        assert ("text/balance" in r) == (r["stage"] == 3)
        assert r["loss"] == pytest.approx(r["lm"] + 0.01 * r.get("text/balance", 0))
    assert log[-1]["text/balance"] > 1.5                                          # a sum over two layers, each about 1


def test_text_moe_alone_begins_where_dense_ended(run, tmp_path):
    more = ("--stage", 3, "--trains", "text.moe,connector", "--capacity-factor", 0, "--moe-layers", "1,3")
    train.main(flags(f"{run}/stage2", tmp_path / "out", *more))
    after = load(str(tmp_path / "out"))[0]
    assert after.config.text.capacity_factor is None and after.config.text.n_experts == [0, 4, 0, 4]
    assert after.text.layers[1].ffn.capacity_factor is None and after.text.layers[1].ffn.eval_capacity_factor == 2.0
    changed, names = moved(upcycled(f"{run}/stage2", *more), after)
    assert changed == {n for n in names if n.startswith(("connector.", "text.layers.1.ffn.", "text.layers.3.ffn."))}

    before, tokenizer = load(f"{run}/stage2")
    args, c = train.parse(flags(f"{run}/stage2", tmp_path / "out", *more)), before.config
    s = train.settings(args, 3)
    encoded = d.Encoded(d.Drawn(s.kind, s.steps * s.batch_size, args.seed + 3), tokenizer, s.template or c.template,
                        c.vision.image_size, c.n_image_tokens, s.max_length, False)
    batch = next(iter(train.make_loader(encoded, s, args, d.collate)(0)))
    lm = before.train()(batch["tokens"], batch["images"], labels=batch["labels"]).parts["lm"]
    assert rows(tmp_path / "out")[0]["lm"] == pytest.approx(lm.item(), abs=2e-6)


@pytest.mark.parametrize("where, layers", [("every_other", [0, 2]), ("all", [0, 1, 2, 3]), ("first_half", [0, 1]), ("second_half", [2, 3]),
                                           ("0,3", [0, 3]), ("3", [3]), ("3,1", [1, 3])])
def test_placements(base, where, layers):
    model = upcycled(base, "--moe-layers", where, "--n-experts", 3)
    assert model.config.text.n_experts == [3 * (i in layers) for i in range(4)]
    assert [i for i, layer in enumerate(model.text.layers) if isinstance(layer.ffn, m.MoE)] == layers
    assert all(layer.ffn.router.shape == (3, 32) for layer in model.text.layers if isinstance(layer.ffn, m.MoE))


@pytest.mark.parametrize("more, words", [
    (("--moe-layers", "0,4"), "--moe-layers 0,4: the decoder has layers 0 to 3"), (("--moe-layers", "1,1"), "--moe-layers 1,1: .*each once"),
    (("--moe-layers=-1",), "--moe-layers -1: the decoder has layers 0 to 3"), (("--moe-layers", "odd"), "--moe-layers odd: every_other, all"),
    (("--moe-layers", ""), "--moe-layers"), (("--moe-layers", "0,,2"), "--moe-layers 0,,2"),
    (("--capacity-factor", -1), "--capacity-factor = -1.0 must be at least 0"), (("--eval-capacity-factor", "nan"), "--eval-capacity-factor = nan must be at least 0"),
    (("--top-k", 5), "top_k = 5 of 4 experts"), (("--n-experts", 1), "top_k = 2 of 1 experts"), (("--top-k", 0), "top_k = 0"),
    (("--recipe", "moe"), "--recipe moe: known are cumo, moe-llava"), (("--trains", "text,router"), "'router' is no part"),
    (("--trains", ""), "is no part"), (("--upcycle-at", 4), "--upcycle-at 4")])
def test_bad_values(base, tmp_path, more, words):
    """Each one line; and before anything is trained."""
    with pytest.raises(ValueError, match=words) as e:
        train.main(flags(base, tmp_path / "out", "--stage", 3, *more))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_bad_placement_is_found_before_stage_1(base, tmp_path):
    with pytest.raises(ValueError, match="--moe-layers 0,9"):
        train.main(flags(base, tmp_path / "out", "--moe-layers", "0,9"))
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("text, words", [
    (dict(n_experts=[4, 0]), "text.n_experts lists 2 layers, text.n_layers is 4"), (dict(n_experts=[4, 0, 1, 0]), "top_k = 2 of n_experts = 1"),
    (dict(capacity_factor=0), "text.capacity_factor = 0 must be"), (dict(eval_capacity_factor=-2.), "text.eval_capacity_factor = -2.0"),
    (dict(aux="max"), "text.aux = 'max' must be one of mean, sum")])
def test_bad_configs(text, words):
    with pytest.raises(ValueError, match=words):
        Config(**{**SMALL, "text": {**SMALL["text"], **text}})


def test_upcycled_in_stage_2(base, tmp_path):
    """The experts of stage 2 are stage 3's too."""
    train.main(flags(base, tmp_path / "out", "--upcycle-at", 2, "--steps", 1, "--n-experts", 3))
    stage1, stage2, stage3 = (load(str(tmp_path / "out" / f))[0] for f in ("stage1", "stage2", ""))
    assert stage1.config.text.n_experts == [0] * 4 and stage2.config.text.n_experts == stage3.config.text.n_experts == [3, 0, 3, 0]
    assert [("text/balance" in r) for r in rows(tmp_path / "out")] == [False, True, True]
    changed, names = moved(stage2, stage3)
    assert changed == {n for n in names if n.startswith("connector.") or ".ffn." in n and n.startswith("text.")}


def test_nothing_to_train_is_said(base, tmp_path):
    with pytest.raises(ValueError, match="text.moe"):
        train.main(flags(base, tmp_path / "out", "--stage", 2, "--trains", "text.moe"))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Decoding with a cache

CASES = {"one row": [12], "right-padded rows": [5, 12, 9]}


def prompts(lengths, vocab=40):
    g = torch.Generator().manual_seed(2)
    tokens = torch.full((len(lengths), max(lengths)), PAD)
    for row, n in zip(tokens, lengths):
        row[:n] = torch.randint(vocab, (n,), generator=g)
    return tokens


@pytest.fixture
def listen(monkeypatch):
    """-> lists that fill up: the logits of every step of generation (B, V), and (logits, mask, factor, Routing) of every routing."""
    steps, routings, sample = [], [], m.sample

    def heard(logits, top_k, mask=None, capacity_factor=None, min_capacity=0, noise=None, renormalise=None):
        r = route(logits, top_k, mask, capacity_factor, min_capacity, noise, renormalise)
        routings.append((logits, mask, capacity_factor, r))
        return r
    monkeypatch.setattr(m, "sample", lambda logits, *rest: (steps.append(logits), sample(logits, *rest))[1])
    monkeypatch.setattr("kernels.route", heard)
    return steps, routings


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_cache_equals_recomputation_without_capacity(tiny_model, listen, lengths):
    model = tiny_model(vision=None, text=dict(n_layers=3, n_experts=[4, 0, 4])).double()
    tokens, (steps, _) = prompts(lengths), listen
    out = model.generate(tokens, max_new_tokens=10)
    assert len({int(t) for t in out.flatten()}) > 3                                # not one word again and again
    for row, n, new in zip(range(len(lengths)), lengths, out):
        whole = model(torch.cat([tokens[row, :n], new])[None]).logits[0]           # alone, without padding and without a cache
        assert torch.equal(whole[n - 1:-1].argmax(-1), new)
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), whole[n - 1:-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_with_a_capacity_the_prompt_is_one_batch(tiny_model, listen, lengths):
    model = tiny_model(vision=None, text=dict(n_layers=3, n_experts=[4, 0, 4], eval_capacity_factor=0.25))
    tokens, (steps, routings), n_new = prompts(lengths), listen, 6
    out = model.generate(tokens, max_new_tokens=n_new)
    logits, heard = list(steps), list(routings)
    assert [len(x) for x, *_ in heard] == [tokens.numel()] * 2 + [len(tokens)] * 2 * (n_new - 1)    # then one token a row, all rows together
    for x, mask, factor, r in heard:                                               # and each is DeepSpeed's gate over that many
        assert factor == 0.25
        real = mask if mask is not None else torch.ones(len(x), dtype=torch.bool)
        assert_same_gate(r._replace(weights=r.weights[real], experts=r.experts[real]), deepspeed_top2(x[real], 0.25, 0), 4)
    for _, _, _, r in heard[:2]:
        served = (r.weights != 0).sum()
        assert 0 < served <= 4 * math.ceil(sum(lengths) / 4 * 2 * 0.25) < 2 * sum(lengths)
    if len(lengths) == 1:                                                          # a token alone is never dropped
        assert all((r.weights != 0).all() for _, _, _, r in heard[2:])
    last = torch.tensor(lengths) - 1
    torch.testing.assert_close(logits[0], model(tokens).logits[torch.arange(len(last)), last], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(tokens, max_new_tokens=n_new), out)          # deterministic
    if len(lengths) > 1:                                                           # the company matters
        assert not torch.allclose(model(tokens[1:2]).logits[0, -1], logits[0][1], atol=1e-3)
    assert not torch.allclose(model.train()(tokens).logits, model.eval()(tokens).logits, atol=1e-3)     # in training nothing is limited here


def test_noise_is_for_training_only(tiny_model):
    model = tiny_model(vision=None, text=dict(n_experts=4, noisy=True))
    tokens = prompts([12, 12])
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    a, b = (model(tokens) for _ in range(2))
    assert torch.equal(a.routing["text"][0].experts[:, 0], b.routing["text"][0].experts[:, 0])
    assert not torch.equal(a.routing["text"][0].experts[:, 1], b.routing["text"][0].experts[:, 1])


# ---------------------------------------------------------------------------------------------------------------------
# 5. Experts everywhere: CuMo and MoE-LLaVA in one


def test_experts_in_all_three_parts(tiny_model, tmp_path):
    model = tiny_model()
    model.config.text.capacity_factor, model.config.text.eval_capacity_factor, model.config.text.aux = 1.5, 2.0, "sum"
    upcycle(model, vision=4, connector=4, text=[0, 4])
    tokens, labels = question(vocab=40, n_slots=4)
    images = torch.randn(2, 3, 16, 16)
    m.choose_trainable(model, ("vision", "connector", "text"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model.train()(tokens, images, labels=labels)
    assert [len(out.routing[part]) for part in ("vision", "connector", "text")] == [3, 1, 1]
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith("router"):
            assert not torch.equal(p, before[name]), name
    save(model.eval(), str(tmp_path / "own"))
    again, _ = load(str(tmp_path / "own"))
    assert again.config == model.config
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    assert torch.equal(again(tokens, images).logits, model(tokens, images).logits)
    assert torch.equal(again.generate(tokens, images, max_new_tokens=8), model.generate(tokens, images, max_new_tokens=8))
    with pytest.raises(ValueError, match="MoE-LLaVA's layout"):
        save(model, str(tmp_path / "theirs"), layout="moe-llava")


def test_the_recipe_on_top_of_cumo(base, tmp_path):
    """train.py --recipe moe-llava from a folder whose tower and connector have experts already."""
    model, tokenizer = load(base)
    save(upcycle(model, vision=2, connector=2), str(tmp_path / "cumo"), tokenizer)
    train.main(flags(tmp_path / "cumo", tmp_path / "out", "--stage", 3, "--steps", 1, "--trains", "vision,connector,text.ffn"))
    c = load(str(tmp_path / "out"))[0].config
    assert c.vision.n_experts == [2] * 3 and c.connector.n_experts == 2 and c.text.n_experts == [4, 0, 4, 0]
    assert {"vision/balance", "connector/balance", "text/balance"} <= rows(tmp_path / "out")[0].keys()


@torch.no_grad()
def test_a_row_that_has_ended_takes_no_slot_from_those_that_go_on(tiny_model):
    model = tiny_model(vision=None, text=dict(n_experts=4, top_k=2, capacity_factor=0.5, eval_capacity_factor=0.5, aux="sum"))
    token, position = torch.tensor([7, 7, 7]), torch.zeros(3, dtype=torch.long)
    def step(rows, real):
        cache = m.Cache(model.config.text, rows, 8, "cpu", torch.float32)
        return m.decode(model.text, token[:rows], position[:rows], cache, 1, real=real)[-1]
    alone = step(1, None)
    assert torch.allclose(step(3, torch.tensor([False, False, True])), alone, atol=1e-5)
    assert not torch.allclose(step(3, None), alone, atol=1e-5)                     # three at once do not find a slot each


def test_noise_for_second_choices_is_refused_where_there_are_none():
    with pytest.raises(ValueError, match="--top-k 1 has none"):
        train.parse(["--recipe", "moe-llava", "--top-k", "1", "--noisy-gate"])


@pytest.mark.parametrize("flags, fits", [(["--n-experts", "4,2"], True), (["--n-experts", "2,4"], False), (["--n-experts", "4"], False), ([], True)])
def test_numbers_of_experts_that_are_asked_for_are_held_against_the_layers_in_their_order(tiny_model, flags, fits):
    model = upcycle(tiny_model(text=dict(n_layers=3)), text=[4, 0, 2])
    args = train.parse(["--recipe", "moe-llava", "--stage", "3", "--init", "x", *flags])
    if fits:
        train.check_experts(args, model.config)
    else:
        with pytest.raises(ValueError, match="has experts already"):
            train.check_experts(args, model.config)
