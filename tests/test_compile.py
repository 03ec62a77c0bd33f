"""torch.compile: the training forward and generation are one graph each, give eager mode's numbers, and are compiled a bounded number of
times. The backends used here trace and differentiate as the real one does, but write no code: that would take minutes."""
import contextlib
import copy
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as m
import train
from model import AUDIO, IMAGE, PAD, Cache, Config, CuMo, MoE
from test_train import base, flags, write_llava                                    # noqa: F401 (base is a fixture)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(preset):
    """The preset's structure (scales, experts, grouped queries, what runs where) at the smallest sizes; an image takes 4 tokens."""
    c = Config.from_preset(preset).to_dict()
    n_text = 4 if any(c["text"]["n_experts"]) else 0
    shuffle = min(2, c["connector"]["pixel_shuffle"])
    c["vision"] |= dict(image_size=16 * shuffle, patch_size=8, dim=16, n_layers=2, n_heads=2, ffn_dim=24, n_experts=4)
    c["connector"] |= dict(n_experts=4, pixel_shuffle=shuffle)
    c["text"] |= dict(vocab_size=40, dim=16, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=24, n_experts=n_text)
    if c["audio"]:
        c["audio"] |= dict(n_mels=5, n_frames=12, dim=16, n_layers=1, n_heads=2, ffn_dim=24, n_queries=3)
    return CuMo(Config.from_dict(c))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Training


def structure(preset):
    """What of a preset's small model shapes its graph: all of its config but numbers that are only multiplied by, and the template."""
    c = small(preset).config.to_dict()
    return {name: {key: v for key, v in (part or {}).items() if key != "rope_theta"} for name, part in c.items() if isinstance(part, (dict, type(None)))}


# Presets that are alike but for their sizes have one graph, and are compiled once
UNLIKE = [preset for i, preset in enumerate(m.PRESETS) if structure(preset) not in [structure(p) for p in list(m.PRESETS)[:i]]]


# In bfloat16 by the dispatch that a GPU uses, for every preset; in float32 by the CPU's, whose graph is several times larger, for the
# preset that has experts everywhere; and with two samples in a row
@pytest.mark.parametrize("preset, dtype, packed", [(preset, torch.bfloat16, False) for preset in UNLIKE] + [
    ("cumo-mixtral-8x7b", torch.float32, False), ("tiny", torch.bfloat16, True)])
def test_the_training_forward_of_every_preset_is_one_graph(preset, dtype, packed):
    model = small(preset).to(dtype).train()
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        moe.backend = "grouped" if dtype == torch.bfloat16 else "sorted"
    model.checkpointing(preset == "tiny")                                          # with activation checkpointing, too
    tokens = torch.randint(0, 40, (2, 16))
    tokens[0, 2:6], tokens[1, 12:] = IMAGE, PAD
    audio = None
    if model.audio:
        tokens[1, 4:7], audio = AUDIO, torch.randn(1, 5, 12).to(dtype)
    side = model.config.vision.image_size
    images = torch.cat([torch.randn(1, 3, side, side), torch.zeros(1, 3, side, side)]).to(dtype)  # the second row has none
    labels = torch.where(tokens >= 0, tokens, -100)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).expand(2, -1) if packed else None
    if packed:                                                                     # a blank one for each of three samples without an image
        images = torch.cat([images, torch.zeros(2, 3, side, side)])
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(1)
        out = forward(tokens, images, audio, labels, sample_positions=positions)
        out.loss.backward()
        results.append([out.loss.detach(), out.logits.detach()] + [p.grad for n, p in model.named_parameters() if not n.endswith("k.bias")])
    for got, want in zip(results[1], results[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * want.norm() + 1e-7
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


class NoMaskedScatter(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert "masked_scatter" not in str(op)                                     # its gradient waits, which its fake hides
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", m.PRESETS)
def test_nothing_in_a_step_or_in_decoding_waits_for_the_device(preset):
    """Fake tensors have no values: who asks for one, or for a shape that depends on one (where a GPU would have to be waited for), fails."""
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = small(preset).train()
        finally:
            torch.set_default_dtype(torch.float32)
        for moe in (module for module in model.modules() if isinstance(module, MoE)):
            moe.backend = "grouped"                                                # the one for CUDA
        model.config.text.noisy, model.config.text.capacity_factor = True, 1.5
        model.text.apply_expert_limits()
        tokens, images = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 3, *[model.config.vision.image_size] * 2)
        for question, error in ((lambda: tokens.sum().item(), DataDependentOutputException),
                                (lambda: tokens[tokens > 0], DynamicOutputShapeException)):
            with pytest.raises(error):                                             # it would be seen
                question()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with NoMaskedScatter():
            slots = [4, 1, 3 if model.audio else 0]                                # the one question; train.py asks it on the CPU
            model(tokens, images, torch.zeros(1, 5, 12) if model.audio else None, labels=tokens, slots=slots).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        text, last, cache = model.eval().text, torch.ones(2, dtype=torch.long), Cache(model.config.text, 2, 32, "cpu", torch.bfloat16)
        with torch.no_grad():
            logits = m.prefill(text, text.embed(tokens), tokens != PAD, last, cache)
            assert m.decode(text, m.sample(logits, 0.7, 0.9), last + 1, cache, 32).shape == (2, 40)


def test_what_is_not_finite_does_not_stay_in_the_cache_of_the_next_answer(tiny_model):
    model = tiny_model(vision=None)
    tokens, value = torch.randint(0, 40, (1, 8)), model.text.layers[0].v.weight
    kept = value.detach().clone()
    want = model.generate(tokens, max_new_tokens=4, compile="eager")
    value.data.fill_(torch.nan)
    with pytest.raises(ValueError):
        model.generate(tokens, max_new_tokens=4, compile="eager")
    value.data.copy_(kept)
    assert model.cache is None and torch.equal(model.generate(tokens, max_new_tokens=4, compile="eager"), want)


def test_cuda_graphs_are_recorded_of_the_senses_blocks_alone_whose_gradients_begin_as_zeros(monkeypatch):
    modes = {}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: modes.__setitem__(self, kw.get("mode")))
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    model = small("tiny")
    m.choose_trainable(model, ("connector", "vision"))
    model.vision.layers[0].requires_grad_(False)
    args = train.Args(compile=True, cuda_graphs=True)
    train.distribute(args, model, torch.device("cpu"))
    assert {block: mode for block, mode in modes.items() if mode} == dict.fromkeys(model.vision.layers, "reduce-overhead")
    assert set(model.text.layers) < set(modes)

    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    train.zero_replayed_gradients(model)
    zeros = {name for name, p in params.items() if p.grad is not None}
    assert zeros == {name for name, p in params.items() if name.startswith("vision.layers") and p.requires_grad} and zeros
    assert not any(params[name].grad.any() for name in zeros)


@pytest.mark.parametrize("argv, words", [
    (["--device", "cpu"], "--cuda-graphs replays what torch.compile wrote for a GPU"),
    (["--checkpointing"], "leave --fsdp, --checkpointing and --expert-parallel out"),
    (["--fsdp"], "leave --fsdp, --checkpointing and --expert-parallel out"),
])
def test_cuda_graphs_are_refused_where_they_cannot_be(argv, words):
    with pytest.raises(ValueError, match=words):
        train.prepare_device(train.parse(["--cuda-graphs", *argv]))


def test_an_epoch_of_mixed_lengths_is_compiled_at_most_eight_times_and_the_log_says_so(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    rng = random.Random(0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    samples = [{"id": i, "image": ["red.png"] * (i % 3), "conversations": [
        {"from": "human", "value": "<image>\n" * (i % 3) + "why " * rng.randrange(1, 40)},
        {"from": "gpt", "value": "red " * rng.randrange(1, 40)}]}
        for i in range(40)]
    batches, forward = set(), CuMo.forward
    monkeypatch.setattr(CuMo, "forward", lambda self, tokens, images=None, **kw:
                        batches.add((tokens.shape[1], len(images))) or forward(self, tokens, images, **kw))
    train.main(flags(base, tmp_path / "o", "--stage", 3, "--steps", 20, "--batch-size", 2, "--max-length", 512,
                     "--compile", *write_llava(tmp_path, samples)))
    printed = capsys.readouterr().out
    n = int(printed.split("compiled ")[1].split(" graphs")[0])
    assert len({t for t, _ in batches}) > 8 and len({n for _, n in batches}) > 2
    assert 2 <= n <= 8 and not counters["graph_break"], printed
    assert "% of the time for data" in printed


# ---------------------------------------------------------------------------------------------------------------------
# 2. Generation


@pytest.mark.parametrize("text", [{}, dict(n_experts=4, sliding_window=5)], ids=["dense", "experts, window"])
def test_compiled_generation_gives_eager_modes_tokens_with_two_graphs(tiny_model, text):
    """Of a block's prefill and of its step: one compiled block serves both layers."""
    model = tiny_model(text=dict(n_layers=2, **text))
    tokens = torch.randint(0, 40, (3, 20))
    tokens[0, 1:5], tokens[1, 7:], tokens[2, 15:] = IMAGE, PAD, PAD
    images = torch.randn(1, 3, 16, 16)
    for batch, n in ((tokens, 9), (torch.where(tokens >= 0, (tokens + 7) % 40, tokens), 12), (tokens[:, :18].clone(), 30)):
        want = model.generate(batch, images, max_new_tokens=n)
        assert torch.equal(model.generate(batch, images, max_new_tokens=n, compile="aot_eager"), want)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert model.generate(tokens, images, max_new_tokens=50, compile="aot_eager").shape == (3, 50)      # a longer cache: two more
    assert counters["stats"]["unique_graphs"] == 4
    other = copy.deepcopy(model)                                                   # another model's weights go through the same graphs
    other.text.head.weight.data = other.text.head.weight.roll(1, 0)
    assert torch.equal(other.generate(tokens, images, max_new_tokens=9, compile="aot_eager"),
                       other.generate(tokens, images, max_new_tokens=9))
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("max_new_tokens", [20, 20_000])
def test_a_decode_step_costs_what_it_attends_to_and_nothing_for_the_unused_cache(tiny_config, monkeypatch, max_new_tokens):
    model, real = CuMo(tiny_config(vision=None)).eval(), F.scaled_dot_product_attention
    keys, flops, counter = [], [], None                                            # of prefill and each step

    class Enough(Exception):
        pass

    def attention(q, k, v, **kw):
        keys.append((q.shape[2], k.shape[2], v.shape[2]))
        return real(q, k, v, **kw)

    def on_token(_):
        flops.append(counter.get_total_flops() - sum(flops))                       # torch counts no attention on a CPU: what is left
        if len(flops) == 20:
            raise Enough
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with pytest.raises(Enough), FlopCounterMode(display=False) as counter:
        model.generate(torch.randint(0, 40, (2, 30)), on_token=on_token, max_new_tokens=max_new_tokens)
    n_layers = model.config.text.n_layers
    assert keys[:n_layers] == [(30, 30, 30)] * n_layers and keys[n_layers:] == [(1, n, n) for n in range(31, 50) for _ in range(n_layers)]
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    assert flops[1:] == [2 * 2 * matrices] * 19                                    # 2 rows, a multiplication and an addition a weight


class Recorder(TorchDispatchMode):
    """A CUDA graph on a CPU: the operators of one call with the tensors that they read and wrote, to be run again just so."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """The CPU is taken for a GPU; -> a list of what is recorded."""
    made = []

    def make_graphed_callables(step, inputs):
        for _ in range(3):
            step(*inputs)
        recorder = Recorder()
        with recorder:
            logits = step(*inputs)
        made.append(recorder)

        def replayed(*new):
            for mine, theirs in zip(inputs, new, strict=True):
                mine.copy_(theirs)
            recorder.replay()
            return logits.detach()
        return replayed
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(m, "may_record", lambda config, device, dtype: True)
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    m.compiled.cache_clear()
    yield made
    m.compiled.cache_clear()


@pytest.mark.parametrize("text", [{}, dict(n_experts=4, eval_capacity_factor=0.5, sliding_window=5)], ids=["dense", "experts, window"])
@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_a_recorded_step_says_what_a_plain_one_says_and_is_recorded_again_only_when_it_must(tiny_model, recordings, monkeypatch, text, how):
    model = tiny_model(text=dict(n_layers=2, **text)).bfloat16()
    for module in model.modules():
        if isinstance(module, MoE):
            module.backend = "grouped"                                             # `sorted` would wait for the host
    tokens = torch.randint(0, 40, (3, 20))
    tokens[0, 1:5], tokens[1, 7:], tokens[2, 15:] = IMAGE, PAD, PAD
    images = torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)

    def check(batch, n, count, eos=None):
        with how():
            got = model.generate(batch, images, max_new_tokens=n, eos=eos, compile=True)
        assert len(recordings) == count
        with monkeypatch.context() as patch:                                       # over as many keys, or bfloat16 would round otherwise
            patch.setattr(m, "may_record", lambda *_: False)
            assert torch.equal(got, model.generate(batch, images, max_new_tokens=n, eos=eos, compile=True))
        return got
    said = check(tokens, 9, 1)
    check(torch.where(tokens >= 0, (tokens + 7) % 40, tokens), 12, 1)              # the same shapes
    check(tokens, 9, 1, eos=int(said[0, 1]))                                       # a row ends before the others
    check(tokens, 50, 2)                                                           # a longer cache
    check(tokens[:1], 9, 3)                                                        # another batch
    model.text.layers[0].q.weight.data.mul_(-1.5)                                  # trained on: the same place
    check(tokens[:1], 9, 3)
    model.text.layers[0].q.weight.data = model.text.layers[0].q.weight.data * 1.5  # moved
    check(tokens[:1], 9, 4)
    model.config.text.norm_eps *= 2                                                # anything of the config
    check(tokens[:1], 9, 5)
    copied, model = model, copy.deepcopy(model)
    check(tokens[:1], 9, 6)
    model = copied
    check(tokens[:1], 9, 6)
    m.add_lora(model, 2, 64.0)                                                     # new weights
    for _, _, lora in m.adapted(model):
        lora.b.data.normal_()
    check(tokens[:1], 9, 7)
    m.merge_lora(model)                                                            # the same ones, used otherwise
    check(tokens[:1], 9, 8)


@pytest.mark.parametrize("text, dtype, graphs", [({}, torch.float32, True), ({}, torch.bfloat16, True),
                                                 (dict(n_experts=4), torch.float32, False), (dict(n_experts=[4, 0]), torch.float16, False),
                                                 (dict(n_experts=4), torch.bfloat16, True)])
def test_steps_that_wait_for_the_host_or_under_autocast_are_not_recorded(tiny_config, monkeypatch, text, dtype, graphs):
    config = tiny_config(vision=None, text=text).text
    assert m.may_record(config, torch.device("cuda", 0), dtype) == graphs
    assert not m.may_record(config, torch.device("cpu"), dtype)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert not m.may_record(config, torch.device("cuda", 0), dtype)


def test_only_a_gpus_step_is_tuned_and_other_backends_know_none_of_inductors_options(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **kw: asked.append((f, kw["backend"], kw["options"])) or f)
    m.compiled.cache_clear()
    for backend, tuned in ((True, False), (True, True), (True, True), ("aot_eager", False), ("aot_eager", True)):
        m.compiled(backend, tuned=tuned)
    tuning = {"coordinate_descent_tuning": True}
    assert asked == [(m.run_block, "inductor", None), (m.run_block, "inductor", tuning), (m.run_block, "aot_eager", None),
                     (m.run_block, "aot_eager", None)]
    m.compiled.cache_clear()


@pytest.mark.parametrize("n, want", [(1, 64), (64, 64), (65, 96), (96, 96), (97, 128), (129, 192), (193, 256), (1025, 1536), (2048, 2048)])
def test_rungs(n, want):
    assert m.rung(n) == want
