"""Hearing and Uni-MoE (model.py, upcycle.py): resampler, sounds in their slots, video, counts, FLOPs, experts put together, folders."""
import copy
import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import data
import generate
import upcycle as U
from kernels import route
from model import AUDIO, IGNORE, IMAGE, PAD, Config, CuMo, add_lora, count_parameters, merge_state, sinusoids
from test_plan import assert_counted, assert_flops, rehearsed
from upcycle import add_audio, assemble, load, save, upcycle

AUDIO_TINY = dict(n_mels=5, n_frames=12, dim=8, n_layers=2, n_heads=2, ffn_dim=12, n_queries=3, n_query_layers=2)


@pytest.fixture
def hearing(tiny_model):
    """-> make(...): a model with eyes (4 slots an image) and ears (3 slots a chunk), its weights loud."""
    return lambda **kw: tiny_model(**{"audio": AUDIO_TINY, "template": "tiny", **kw})


def tokens_of(*rows):
    """Lists of ids -> (B, T); "I" stands for one image's slots, "A" for one chunk's."""
    rows = [[t for x in row for t in ([IMAGE] * 4 if x == "I" else [AUDIO] * 3 if x == "A" else [x])] for row in rows]
    return torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])


def labels_of(tokens):
    return torch.where(tokens >= 0, tokens, IGNORE)


MIXED = [7, "I", 3, "A", 2], [5, 6], ["A", "A", 9], [8, "I", "I", 1]


def senses(n=3, m=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, 16, 16, generator=g).to(dtype), torch.randn(m, 5, 12, generator=g).to(dtype)


def test_packed_rows_keep_sounds_and_videos_in_their_slots(hearing):
    """The longest sample comes first, so that images and sounds change their order with their samples."""
    rows, images, sounds, frames = (*MIXED, [4, "I", "A", 2, 9, 9, 9]), [1, 0, 0, 3, 2], [1, 0, 2, 0, 1], [[1], [], [], [1, 2], [2]]
    pixels, mels = senses(6, 4)
    items = []
    for row, image, sound, groups in zip(rows, pixels.split(images), mels.split(sounds), frames):
        tokens = tokens_of(row)[0]
        items.append({"tokens": tokens, "labels": labels_of(tokens), "images": image, "audio": sound, "frames": groups, "broken": [], "truncated": False})
    apart, packed = data.collate(items), data.collate_packed(items, 24)
    assert len(packed["tokens"]) < 4 and not torch.equal(packed["audio"], apart["audio"])
    model = hearing(vision=dict(n_experts=4), text=dict(n_experts=4)).train()
    want, got = (model(**{name: t for name, t in batch.items() if torch.is_tensor(t)}).parts for batch in (apart, packed))
    assert want["lm"] > 1 and want["vision/z"] > 0.01
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and counts


def counts_of(name):
    with torch.device("meta"):
        return count_parameters(CuMo(Config.from_preset(name)))


def test_counts_are_the_papers():
    attention, ffn, rest = 4 * 4096**2, 3 * 4096 * 11008, 2 * 32000 * 4096 + 65 * 4096
    for name, n_moe, paper in (("uni-moe-7b", 32, (19.7, 11.1)), ("uni-moe-7b-every-other", 16, (13.2, 8.9))):
        counts = counts_of(name)
        assert list(counts) == ["vision", "connector", "audio", "resampler", "text"]
        total, active = (rest + 32 * attention + ((k - 1) * n_moe + 32) * ffn + n_moe * 4 * 4096 for k in (4, 2))
        assert counts["text"] == (total, active)
        assert tuple(round(n / 1e9, 1) for n in (total, active)) == paper
        assert counts["vision"] == (303_505_408,) * 2
        assert counts["audio"] == (636_784_640,) * 2                               # Whisper large-v2's encoder
    assert counts_of("uni-moe-tiny")["vision"] == counts_of("tiny")["vision"]


@pytest.mark.parametrize("audio, words", [
    (dict(n_frames=13), "audio.n_frames = 13 must be even"), (dict(n_frames=0), "audio.n_frames = 0"),
    (dict(dim=9, n_heads=3), "audio.dim = 9"), (dict(n_heads=3), "audio.dim = 8 .* audio.n_heads = 3"),
    (dict(n_layers="2"), "audio.n_layers = '2'"), (dict(n_queries=0), "audio.n_queries"),
    (dict(act="relu"), "audio.act = 'relu'"), (dict(hz=3), "audio.hz"), (5, "audio must be an object")])
def test_config_errors_name_the_field(tiny_config, audio, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(audio={**AUDIO_TINY, **audio} if isinstance(audio, dict) else audio)


def test_configs_old_and_new(tiny_config):
    config = tiny_config(audio=AUDIO_TINY)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config and config.n_audio_tokens == 3
    old = tiny_config().to_dict()
    assert old.pop("audio") is None
    assert Config.from_dict(old) == tiny_config() and Config.from_dict(old).n_audio_tokens == 0


def test_a_new_ear_leaves_the_other_weights_alone_and_has_whispers_positions(tiny_config):
    torch.manual_seed(0)
    plain = CuMo(tiny_config())
    torch.manual_seed(0)
    model = CuMo(tiny_config(audio=AUDIO_TINY))
    assert [name for name, _ in model.named_children()] == ["vision", "connector", "audio", "resampler", "text"]
    assert plain.audio is None and all(torch.isfinite(p).all() for p in model.parameters())
    pos = sinusoids(750, 64)
    assert torch.equal(model.audio.pos, sinusoids(6, 8)) and torch.equal(pos[0], torch.tensor([0.] * 32 + [1.] * 32))
    for t, i in ((3, 0), (700, 17), (31, 31)):                                     # Whisper's formula, spelt out
        angle = torch.tensor(t * 10000 ** (-i / 31), dtype=torch.float64)
        torch.testing.assert_close(pos[t, [i, 32 + i]].double(), torch.stack([angle.sin(), angle.cos()]), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Resampler, slots, video


def test_resampler(hearing):
    resampler, heard = hearing().resampler, torch.randn(2, 6, 8, requires_grad=True)
    y = resampler(heard)
    assert y.shape == (2, 3, 16)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in resampler.named_parameters() if not n.endswith("k.bias"))
    assert (heard.grad.abs().sum(-1) > 0).all()                                    # every state is asked
    with torch.no_grad():
        torch.testing.assert_close(resampler(heard[1:]), y[1:])                    # chunks know nothing of each other
        torch.testing.assert_close(resampler(heard[:, torch.randperm(6)]), y)      # the states tell of their places, not their order
        block, x, h = resampler.layers[0], torch.randn(1, 3, 8), heard[:1]
        seen, q = torch.cat([block.norm_heard(h), block.norm1(x)], 1)[0], block.q(block.norm1(x))[0]
        heads = slice(0, 4), slice(4, 8)
        parts = [(q[:, s] @ block.k(seen)[:, s].T / 2).softmax(-1) @ block.v(seen)[:, s] for s in heads]
        x1 = x + block.o(torch.cat(parts, -1))
        torch.testing.assert_close(block(x, h), x1 + block.ffn(block.norm2(x1))[0])


@torch.no_grad()
def test_sounds_fill_their_slots_in_order(hearing):
    model, tokens, (images, mel) = hearing(), tokens_of(*MIXED), senses()
    seen, heard = model.encode_images(images), model.encode_audio(mel)
    assert heard.shape == (3, 3, 16)
    queues = {IMAGE: list(seen.flatten(0, 1)), AUDIO: list(heard.flatten(0, 1))}
    want = torch.stack([torch.stack([queues[int(t)].pop(0) if int(t) in queues else model.text.embed.weight[max(0, int(t))] for t in row])
                        for row in tokens])
    assert torch.equal(model.embed(tokens, seen, heard), want) and not any(queues.values())
    logits = model.text(want, tokens != PAD)
    assert torch.equal(model(tokens, images, mel).logits, logits)
    assert torch.equal(model(tokens, image_embeds=seen, audio_embeds=heard).logits, logits)


@pytest.mark.parametrize("text", [{}, dict(n_experts=4)])
@torch.no_grad()
def test_a_mixed_batch_is_each_row_alone(hearing, text):
    model, tokens, (images, mel) = hearing(text=text).double(), tokens_of(*MIXED), senses(dtype=torch.float64)
    together, i, a = model(tokens, images, mel).logits, 0, 0
    for row, what in zip(tokens, MIXED):
        n, m, real = what.count("I"), what.count("A"), row != PAD
        alone = model(row[None, real], images[i:i + n], mel[a:a + m]).logits[0]
        i, a = i + n, a + m
        torch.testing.assert_close(together[tokens.eq(row).all(1)][0, real], alone, rtol=1e-5, atol=1e-5)
    assert (i, a) == (3, 3)


def test_a_blank_chunk_changes_nothing_and_wakes_every_module(hearing):
    model = hearing().train()
    tokens, (images, mel) = tokens_of([7, "I", 3], [5, 6, 1]), senses(1)
    labels, blank = labels_of(tokens), torch.zeros(1, 5, 12)
    outs = [model(tokens, images, audio, labels) for audio in (None, mel[:0], blank, mel[:1])]
    plain = model(tokens, images)
    for out in outs:
        assert torch.equal(out.loss, outs[0].loss)
        torch.testing.assert_close(out.logits, plain.logits)
        model.zero_grad()
        out.loss.backward()
        for part in (model.audio, model.resampler):
            assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
    model(tokens_of(["A", 3]), audio=mel[:1], labels=torch.tensor([[IGNORE] * 3 + [3]])).loss.backward()
    assert model.resampler.queries.grad.any() and model.audio.conv1.weight.grad.any()


def test_slots_that_do_not_match(hearing, tiny_model):
    model, (_, mel) = hearing(), senses()
    for call in (model, model.generate):
        for what, m, words in ((["A", "A"], 1, "6 AUDIO slots.* 3 features"), (["A", 3], 2, "3 AUDIO slots.* 6 features"),
                               (["A", 3], 0, "3 AUDIO slots.* 0 features"), ([1, 3], 2, "0 AUDIO slots.* 6 features")):
            tokens = tokens_of(what)
            with pytest.raises(ValueError, match=words):
                call(tokens, audio=mel[:m])
    with pytest.raises(ValueError, match="3 AUDIO slots.* 0 features"):            # a blank chunk must not fill them
        model(tokens_of(["A", 3]), labels=torch.tensor([[IGNORE] * 3 + [3]]))
    with pytest.raises(ValueError, match=r"mel is \(1, 5, 10\).* 5, 12"):
        model(tokens_of(["A", 3]), audio=mel[:1, :, :10])
    with pytest.raises(ValueError, match="hears nothing"):
        tiny_model()(tokens_of([3]), audio_embeds=torch.zeros(1, 3, 16))


def test_a_model_that_learnt_frames_apart_is_asked_so(hearing):
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(5)]
    asked = [{"images": [], "video": [frames], "conversations": [{"from": "human", "value": "<video>\nWhat?"}]}]
    for apart, groups in ((False, [5]), (True, [1] * 5)):
        texts, given = generate.sense(hearing(frames_apart=apart), asked)
        assert texts[0][0][0]["value"].count("<image>") == len(groups) and given["frames"].tolist() == groups


def test_video_is_the_mean_of_its_frames(hearing):
    model, (images, _) = hearing(vision=dict(n_experts=4)), senses(6)
    frames, tokens = torch.tensor([3, 1, 2]), tokens_of([7, "I", 3], ["I", "I", 5])
    images.requires_grad_(True)
    each = model.encode_images(images)
    want = torch.stack([each[:3].mean(0), each[3], each[4:].mean(0)])
    torch.testing.assert_close(model.encode_images(images, None, frames), want)
    assert torch.equal(model.encode_images(images, None, torch.ones(6, dtype=torch.long)), each)
    out = model(tokens, images, frames=frames)
    torch.testing.assert_close(out.logits, model(tokens, image_embeds=want).logits, rtol=1e-4, atol=1e-4)
    assert out.image_embeds.shape == (3, 4, 16)
    grads = [torch.autograd.grad(e.square().sum(), images)[0] for e in (out.image_embeds, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(tokens, images, frames=frames, max_new_tokens=3),
                       model.generate(tokens, image_embeds=want.detach(), max_new_tokens=3))
    more = tokens_of([7, "I", 3], ["I", "I", 5], [5, 6, 9])                        # a row without any: a blank of its own, as without video
    trained = model(more, images, labels=labels_of(more), frames=frames)
    asked = model(more, torch.cat([images, torch.zeros(1, 3, 16, 16)]), labels=labels_of(more), frames=torch.tensor([3, 1, 2, 1]))
    assert trained.image_embeds.shape[0] == 3 and torch.equal(trained.loss, asked.loss)
    for wrong in ([3, 1], [3, 1, 3], [6, 0]):
        with pytest.raises(ValueError, match=r"number of images, 6; they give"):
            model.encode_images(images, None, torch.tensor(wrong))


@torch.no_grad()
def test_generation_with_sound(hearing):
    model, tokens, (images, mel) = hearing(), tokens_of(*MIXED), senses()
    got = model.generate(tokens, images, mel, max_new_tokens=4)
    embeds = dict(image_embeds=model.encode_images(images), audio_embeds=model.encode_audio(mel))
    assert torch.equal(got, model.generate(tokens, **embeds, max_new_tokens=4))
    for b, seen, heard in ((0, images[:1], mel[:1]), (2, None, mel[1:]), (3, images[1:], None)):
        row = tokens[b][tokens[b] != PAD]
        for t in got[b]:
            assert model(row[None], seen, heard).logits[0, -1].argmax() == t
            row = torch.cat([row, t[None]])


def test_checkpointing_the_ear_changes_no_gradient(hearing):
    model, tokens, (images, mel) = hearing().train(), tokens_of(*MIXED), senses()
    grads = []
    for on in (False, True):
        model.checkpointing(on)
        assert model.audio.checkpointing == on
        model.zero_grad()
        model(tokens, images, mel, labels_of(tokens)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


def test_one_graph(hearing):
    model = hearing(vision=dict(n_layers=1, select_layer=-1), audio=dict(AUDIO_TINY, n_layers=1, n_query_layers=1))
    senses_to_slots = lambda tokens, images, mel, frames: model.embed(
        tokens, model.encode_images(images, None, frames), model.encode_audio(mel))
    batch = tokens_of(*MIXED), *senses(4), torch.tensor([1, 2, 1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(senses_to_slots, fullgraph=True, backend="aot_eager")(*batch), senses_to_slots(*batch))


@pytest.mark.parametrize("trains", [("audio",), ("resampler",), ("audio", "resampler"), ("text",), ("connector", "resampler", "text.ffn"),
                                    ("vision", "connector", "audio", "resampler", "text")])
@pytest.mark.parametrize("audio", [AUDIO_TINY, dict(AUDIO_TINY, n_frames=150, n_mels=80, n_layers=1, dim=16, n_queries=20)])
def test_flops(tiny_config, trains, audio):
    config = tiny_config(audio=audio)
    forward, backward = assert_flops(config, trains, 64, 0.01, 0.05)
    assert_counted(config, trains, 64, rel=0.02)                                   # (spelt out, attention spares a frozen query's gradient)
    assert list(forward) == ["vision", "connector", "audio", "resampler", "text"]
    assert backward["audio"] == 0 or "audio" in trains
    deaf, _ = rehearsed(tiny_config(), ("connector",), 64)
    assert deaf == {part: forward[part] for part in ("vision", "connector", "text")}


# ---------------------------------------------------------------------------------------------------------------------
# Experts trained apart, put together


@pytest.fixture
def family(tiny_model):
    """-> make(n, **kw): models of one architecture that differ in every weight."""
    def make(n, **kw):
        models = [tiny_model(**kw) for _ in range(n)]
        for i, model in enumerate(models):
            torch.manual_seed(i)
            for p in model.parameters():
                p.data += 0.3 * torch.randn_like(p) * p.abs().mean()
        return models
    return make


def folders_of(models, path):
    for i, model in enumerate(models):
        save(model, path / f"expert{i}")
    return [str(path / f"expert{i}") for i in range(len(models))]


def of_ffn(name):
    return name.startswith("text") and ".ffn.w" in name


@pytest.mark.parametrize("as_folders", [False, True])
@pytest.mark.parametrize("text", [0, [3, 0]])
@torch.no_grad()
def test_each_expert_is_its_source(family, tmp_path, as_folders, text):
    base, *sources = family(4)
    before = copy.deepcopy(base.state_dict())
    copies, model = upcycle(copy.deepcopy(base), text=text or 3), copy.deepcopy(base)
    assert upcycle(model, text=text, experts=folders_of(sources, tmp_path) if as_folders else sources) is model
    counts = [3, 3] if text == 0 else text
    assert model.config.text.n_experts == counts and copies.config == model.config
    for name, w in model.state_dict().items():
        layer = int(name.split(".")[2]) if name.startswith("text.layers") else 1
        if name.endswith("router"):                                                # seeded as for copies
            assert torch.equal(w, copies.state_dict()[name])
        elif of_ffn(name) and counts[layer]:
            assert all(torch.equal(w[e], source.state_dict()[name]) for e, source in enumerate(sources))
        else:
            assert torch.equal(w, before[name])
    same = upcycle(copy.deepcopy(base), text=text, experts=[base] * 3)             # pure copies, the long way round
    assert all(torch.equal(w, copies.state_dict()[name]) for name, w in same.state_dict().items())


@torch.no_grad()
def test_with_routing_forced_to_one_expert_the_model_is_its_source(family, monkeypatch):
    models = family(3)
    for source in models[1:]:                                                      # differing in the FFNs only, as after stage 2
        source.load_state_dict({name: w if of_ffn(name) else models[0].state_dict()[name] for name, w in source.state_dict().items()})
    model, tokens, (images, _) = upcycle(copy.deepcopy(models[0]), experts=models), tokens_of([7, "I", 3], ["I", "I", 5]), senses()
    real = tokens != PAD
    for e, source in enumerate(models):
        one_hot = torch.full((3,), -1e4).index_fill(0, torch.tensor([e]), 1e4)     # its softmax is exactly 0 and 1
        monkeypatch.setattr("kernels.route", lambda logits, *args: route(one_hot.expand_as(logits), *args))
        torch.testing.assert_close(model(tokens, images).logits[real], source(tokens, images).logits[real], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(tokens, images).logits[real], models[e - 1](tokens, images).logits[real], atol=1e-2)


@torch.no_grad()
def test_average(family, tmp_path):
    base, *sources = family(4, audio=AUDIO_TINY)
    model = upcycle(copy.deepcopy(base), experts=folders_of(sources, tmp_path), average=True)
    for name, w in model.state_dict().items():
        if of_ffn(name):
            assert all(torch.equal(w[e], source.state_dict()[name]) for e, source in enumerate(sources))
        elif not name.endswith("router"):
            torch.testing.assert_close(w, torch.stack([s.state_dict()[name] for s in sources]).mean(0))
    again = copy.deepcopy(sources[0])
    upcycle(again, experts=[sources[1], again, sources[2]], average=True)          # the model itself among them
    for name, w in again.state_dict().items():
        if not of_ffn(name):
            torch.testing.assert_close(w, model.state_dict()[name])


@torch.no_grad()
def test_sources_of_other_kinds(family, tiny_model, tmp_path):
    base, other = family(2)
    save(other, tmp_path / "hf", layout="hf-llm")                                  # a decoder alone, as transformers writes it
    adapters = add_lora(copy.deepcopy(other), 2, 4)
    adapters.text.layers[0].ffn.parametrizations.w_in[0].b.fill_(0.1)
    model = upcycle(base, experts=[tmp_path / "hf", adapters])
    merged = merge_state(adapters.state_dict(), adapters)
    for name in ("w_in", "w_gate", "w_out"):
        for i, layer in enumerate(model.text.layers):
            assert torch.equal(getattr(layer.ffn, name)[0], getattr(other.text.layers[i].ffn, name))
            assert torch.equal(getattr(layer.ffn, name)[1], merged[f"text.layers.{i}.ffn.{name}"])


def test_sources_that_do_not_fit(tiny_model, tmp_path, monkeypatch):
    base = tiny_model()
    kinds = {}, dict(text=dict(ffn_dim=32)), dict(text=dict(rope_theta=2e4)), dict(text=dict(n_experts=4)), dict(vision=dict(n_layers=2))
    folders = folders_of([tiny_model(**kind) for kind in kinds], tmp_path)
    state = copy.deepcopy(base.state_dict())
    for e, words in ((1, "expert1: text.ffn_dim = 32, .* 24"), (2, "expert2: text.rope_theta = 20000.0, .* 10000.0"),
                     (3, "expert3: has experts in its decoder"), (4, "expert4: vision.n_layers = 2, .* 3")):
        with pytest.raises(ValueError, match=words):
            upcycle(base, experts=[folders[0], folders[e]])
    with pytest.raises(ValueError, match="expert 1: text.vocab_size = 41, .* 40"):
        upcycle(base, experts=[folders[0], tiny_model(text=dict(vocab_size=41))])
    with pytest.raises(ValueError, match="expert 0: audio.n_mels = 5, .* None"):
        upcycle(base, experts=[tiny_model(audio=AUDIO_TINY)] * 2, average=True)
    with pytest.raises(ValueError, match="4 experts asked for, 2 given"):
        upcycle(base, text=4, experts=folders[:1] * 2)
    with pytest.raises(ValueError, match="one model at least"):
        upcycle(base, experts=[])
    with pytest.raises(ValueError, match="no model folder"):
        upcycle(base, experts=[folders[0], str(tmp_path / "none")])
    assert list(base.state_dict()) == list(state) and all(torch.equal(w, state[name]) for name, w in base.state_dict().items())
    monkeypatch.chdir(tmp_path)
    U.main(["--experts", ",".join(folders[:1] * 2), "--every-other", "--out", "out"])
    assert load("out")[0].config.text.n_experts == [2, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Folders and ears


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def whisper_folder(path, seed=0):
    """As transformers writes WhisperModel: encoder and a bit of decoder, random."""
    torch.manual_seed(seed)
    ear = CuMo(Config(vision=None, text=dict(vocab_size=9, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8), audio=AUDIO_TINY)).audio
    state = U.published({f"audio.{name}": w.detach().contiguous() for name, w in ear.state_dict().items()})
    state["audio_tower.decoder.layer_norm.weight"] = torch.ones(8)
    path.mkdir()
    save_file({name.replace("audio_tower.", "model."): w for name, w in state.items()}, path / "model.safetensors")
    config = {"model_type": "whisper", "architectures": ["WhisperModel"], "encoder_attention_heads": 2}
    (path / "config.json").write_text(json.dumps(config))
    return ear


@torch.no_grad()
def test_folders_of_a_hearing_model(hearing, tmp_path):
    model, tokens, (images, mel) = hearing(text=dict(n_experts=[4, 0])), tokens_of(*MIXED), senses()
    save(model, tmp_path / "own")
    loaded, _ = load(tmp_path / "own")
    assert same(loaded, model) and loaded.config == model.config
    assert torch.equal(loaded(tokens, images, mel).logits, model(tokens, images, mel).logits)
    for layout in ("cumo", "moe-llava"):
        with pytest.raises(ValueError, match=f"layout {layout} has no place for an ear"):
            save(model, tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()


def test_an_ear_for_a_model_that_had_none(tiny_model):
    model, ear = tiny_model(), tiny_model(audio=AUDIO_TINY).audio
    tokens, (images, mel) = tokens_of([7, "I", 3]), senses(1, 1)
    before = model(tokens, images).logits
    assert add_audio(model, ear, seed=3) is model and not model.resampler.training
    assert [name for name, _ in model.named_children()] == ["vision", "connector", "audio", "resampler", "text"]
    assert model.config.audio == ear.config and model.config.n_audio_tokens == 3
    assert torch.equal(model(tokens, images).logits, before) and model(tokens_of([7, "A"]), audio=mel).logits.isfinite().all()
    assert same(add_audio(tiny_model(), copy.deepcopy(ear), seed=3), model)
    with pytest.raises(ValueError, match="hears already"):
        add_audio(model, ear)


def test_backbones_with_an_ear(hearing, tmp_path):
    model, file = hearing(), str(tmp_path / "backbones.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    U.save_backbones(model, file, tokenizer)
    again, _ = U.load_backbones(file)
    assert again.config == model.config and same(again.audio, model.audio) and same(again.text, model.text)
    assert not torch.equal(again.resampler.out.weight, model.resampler.out.weight)                 # new, like the connector


@pytest.mark.parametrize("later", [False, True])
def test_assembling_with_whisper(tiny_model, tmp_path, later):
    model, ear = tiny_model(), whisper_folder(tmp_path / "whisper")
    save(model.vision, tmp_path / "clip", layout="hf-clip")
    save(model, tmp_path / "llm", layout="hf-llm")
    paths, streams = [str(tmp_path / name) for name in ("clip", "llm", "whisper")], [] if later else None
    got, _ = assemble(*paths[:2], audio=paths[2], later=streams, seed=1)
    assert [name for name, _ in got.named_children()] == ["vision", "connector", "audio", "resampler", "text"]
    if later:                                                                      # new parts are real, the rest comes by stream
        assert {n.split(".")[0] for n, p in got.named_parameters() if not p.is_meta} == {"connector", "resampler"}
        streamed = {name for stream in streams for name, _, _ in stream}
        assert streamed == {n for n, p in got.named_parameters() if p.is_meta}
        return
    assert same(got.audio, ear) and same(got.text, model.text)
    assert got.config.audio == dataclasses.replace(ear.config, n_queries=50)       # Whisper's files do not know of queries: the default
    with pytest.raises(ValueError, match="is no ear; --audio wants a Whisper folder"):
        assemble(*paths[:2], audio=paths[0])
    U.main(["--vision", paths[0], "--llm", paths[1], "--audio", paths[2], "--out", str(tmp_path / "out"), "--seed", "1"])
    assert same(load(tmp_path / "out")[0], got)
    with pytest.raises(ValueError, match="--audio goes with"):
        U.main(["--from", paths[1], "--audio", paths[2], "--out", str(tmp_path / "other")])
