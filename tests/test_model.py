"""model.py: parameter counts, vision, connector, decoder, the splice, losses, decoding."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import data
import model as M
from model import AUDIO, IGNORE, IMAGE, PAD, Config, CuMo, MoE, choose_trainable, count_parameters, sample, total_loss

EXPERTS = dict(vision=dict(n_experts=4), connector=dict(n_experts=4))        # CuMo in small
TEXT_EXPERTS = dict(n_experts=[4, 0])                                        # MoE-LLaVA in small


def tokens_of(*rows, length=None):
    """Lists of ids -> (B, T), padded on the right; "I" stands for one image's 4 slots."""
    rows = [[t for x in row for t in ([IMAGE] * 4 if x == "I" else [x])] for row in rows]
    length = length or max(map(len, rows))
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def labels_of(tokens):
    return torch.where(tokens >= 0, tokens, IGNORE)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and counts


def counts_of(name):
    with torch.device("meta"):
        return count_parameters(CuMo(Config.from_preset(name)))


def mlp(dim, hidden, out):                                                   # two layers with biases
    return dim * hidden + hidden + hidden * out + out


def test_parameter_counts_are_the_papers():
    tower = 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 1024 + 24 * (4 * (1024 * 1024 + 1024) + 4 * 1024)     # all but the FFNs
    ffn, router = mlp(1024, 4096, 1024), 4 * 1024
    connector, connector_router = mlp(2048, 4096, 4096), 4 * 2048
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 2 * 4096
    rest, swiglu = 2 * 32000 * 4096 + 4096 + 32 * attention, 3 * 4096 * 14336
    mixtral = rest + 32 * (8 * swiglu + 8 * 4096), rest + 32 * (2 * swiglu + 8 * 4096)

    counts = counts_of("cumo-mistral-7b")
    assert counts["vision"] == (tower + 24 * (4 * ffn + router), tower + 24 * (2 * ffn + router)) == (907_952_128, 505_053_184)
    assert counts["connector"] == (4 * connector + connector_router, 2 * connector + connector_router)
    assert counts["text"] == (rest + 32 * swiglu,) * 2 == (7_241_732_096,) * 2
    total, active = (sum(c[i] for c in counts.values()) / 1e9 for i in (0, 1))
    assert abs(total - 8.26) < 0.02 and abs(active - 7.80) < 0.02

    counts = counts_of("cumo-mixtral-8x7b")
    assert counts["text"] == mixtral
    total, active = (sum(c[i] for c in counts.values()) / 1e9 for i in (0, 1))
    assert abs(total - 47.7) < 0.1 and abs(active - 13.5) < 0.1


def test_counts_add_up_to_all_parameters(tiny_model):
    model = tiny_model(**EXPERTS)
    counts = count_parameters(model)
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["text"][0] == counts["text"][1]


def test_parts_of_the_presets_for_one_gpu_are_as_large_as_transformers_models():
    t = pytest.importorskip("transformers", reason="the other opinion is transformers'")
    smol = t.LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                         vocab_size=49152, tie_word_embeddings=True)
    qwen3 = t.Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, intermediate_size=3072,
                          tie_word_embeddings=True)
    eyes = t.SiglipVisionConfig(vision_use_head=False), t.SiglipVisionConfig(vision_use_head=False, image_size=512)
    for preset, eye, text in (("cumo-smol", eyes[0], smol), ("cumo-qwen3", eyes[1], qwen3)):
        config = Config.from_preset(preset)
        config.vision.n_experts = [0] * 12
        with torch.device("meta"):
            ours = count_parameters(CuMo(config))
            assert ours["vision"][0] == t.SiglipVisionModel(eye).num_parameters()
            model = t.AutoModelForCausalLM.from_config(text)
        model.tie_weights()
        assert ours["text"][0] == model.num_parameters() == {"cumo-smol": 134_515_008, "cumo-qwen3": 596_049_920}[preset]


@pytest.mark.parametrize("name", M.PRESETS)
def test_config_survives_json(name):
    config = Config.from_preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_do_not_share_lists(monkeypatch):
    monkeypatch.setitem(M.PRESETS, "mine", dict(vision=dict(scales=[1], n_layers=2, n_experts=[0, 0])))
    config = Config.from_preset("mine")
    config.vision.scales.append(3)
    config.vision.n_experts[0] = 4
    assert Config.from_preset("mine").vision.scales == [1] and Config.from_preset("mine").vision.n_experts == [0, 0]


@pytest.mark.parametrize("d, words", [
    (dict(colour="red"), "'colour'"),
    (dict(vision=dict(depth=3)), "'vision.depth'"),
    (dict(connector=dict(n_experts=2, top_k=3)), "connector: top_k = 3 of n_experts = 2"),
    (dict(vision=dict(n_experts=4, top_k=5)), "vision: top_k = 5"),
    (dict(text=dict(n_experts=2, top_k=0)), "text: top_k = 0"),
    (dict(text=dict(n_experts=-1)), "text.n_experts = -1"),
    (dict(connector=dict(n_experts=10**20)), "connector.n_experts = 1000"),
    (dict(vision=dict(image_size=5, patch_size=8)), "5 .* 8"),
    (dict(vision=dict(image_size=50, patch_size=8), connector=dict(pixel_shuffle=4)), "connector.pixel_shuffle = 4 .* 6 x 6"),
    (dict(connector=dict(pixel_shuffle=0)), "connector.pixel_shuffle = 0"),
    (dict(vision=dict(post_norm=True)), "vision.post_norm .* -1, not -2"),
    (dict(vision=dict(n_prefix_tokens=2)), "vision.n_prefix_tokens = 2"),
    (dict(vision=dict(n_layers=3, n_experts=[4, 4])), "lists 2 layers.* 3"),
    (dict(text=dict(n_layers=2, n_experts=[4, 4, 0])), "lists 3 layers.* 2"),
    (dict(vision=dict(dim=30, n_heads=4)), "vision.dim = 30"),
    (dict(text=dict(n_heads=6, n_kv_heads=4, dim=48)), "n_kv_heads = 4"),
    (dict(vision=dict(n_layers=2, select_layer=-4)), "select_layer = -4"),
    (dict(vision=dict(select_layer=0)), "select_layer = 0"),
    (dict(vision=dict(scales=[3, 1])), r"\[3, 1\]"),
    (dict(vision=dict(scales=[])), r"\[\]"),
    (dict(text=dict(act="relu")), "'relu'"),
    (dict(text=dict(aux="max")), "'max'"),
    (dict(text=None), "text"),
    (dict(vision=5), "vision"),
    (dict(text=dict(n_heads=0)), "text.n_heads"),
    (dict(vision=dict(patch_size=0)), "vision.patch_size"),
    (dict(text=dict(norm_eps="abc")), "text.norm_eps = 'abc' must be a number from"),
    (dict(text=dict(norm_eps=float("nan"))), "text.norm_eps = nan must be"),
    (dict(text=dict(n_experts=4, top_k=1.5)), "text.top_k = 1.5 must be a whole number"),
    (dict(template=5), "template = 5 must be text"),
    (dict(frames_apart=1), "frames_apart = 1 must be true or false"),
    (dict(balance_coef="a"), "balance_coef = 'a' must be a number"),
    (dict(text=dict(sliding_window=[])), r"text.sliding_window = \[\] must be a whole number from 1 to 1e\+09 or null"),
    (dict(text=dict(rope_theta=None)), "text.rope_theta = None"),
    (dict(text=dict(rope_scaling=5)), "text.rope_scaling = 5 must be an object, each value a number"),
    (dict(text=dict(rope_scaling=dict(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64, rope_typ=3))), "rope_typ"),
    (dict(text=dict(rope_scaling=dict(factor="a"))), "text.rope_scaling = {'factor': 'a'}"),
    (dict(text=dict(rope_scaling=dict(factor=8, low_freq_factor=4, high_freq_factor=4, original_max_position_embeddings=64))), "low_freq"),
    (dict(text=dict(head_dim=3)), "text.head_dim = 3 must be even"),
    (dict(text=dict(n_heads=True)), "text.n_heads = True"),
    (dict(text=dict(n_layers=10**9)), "text.n_layers = 1000000000 must be a whole number from 1 to 1000"),
    (dict(text=dict(n_experts="4")), "text.n_experts = '4' must be a whole number from 0 to 1e.06 or a list, each"),
    (dict(text=dict(n_experts=[4.0] * 32)), "text.n_experts = .4.0"),
    (dict(text=dict(act=[])), r"text.act = \[\] must be one of gelu, gelu_pytorch_tanh, quick_gelu, silu"),
    (dict(text=dict(capacity_factor="1")), "text.capacity_factor = '1'"),
    (dict(text=dict(min_capacity=-1)), "text.min_capacity = -1"),
    (dict(text=dict(qkv_bias="no")), "text.qkv_bias = 'no' must be true or false"),
    (dict(vision=dict(scales=5)), "vision.scales = 5 must be a list"),
    (dict(vision=dict(scales=[1, True])), "vision.scales"),
    (dict(vision=dict(select_layer="x")), "vision.select_layer = 'x'"),
    (dict(audio=5), "audio must be an object"),
])
def test_config_errors_name_the_field(d, words):
    with pytest.raises(ValueError, match=words) as e:
        Config.from_dict(d)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_field_without_limits_needs_only_its_annotation():
    @dataclasses.dataclass
    class Part:
        mean: list[float] = None
        end: int | list[int] | None = None
        anything: list = None
    M.check_fields("new.", Part, dict(mean=[0.5, 1], end=[2, 7], anything=["a", 1]))
    M.check_fields("new.", Part, dict(end=None))
    for name, value in (("mean", [0.5, "1"]), ("mean", 0.5), ("end", "2"), ("anything", 1)):
        with pytest.raises(ValueError, match=f"new.{name} = "):
            M.check_fields("new.", Part, {name: value})


def test_unknown_preset_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'huge'.*cumo-mistral-7b"):
        Config.from_preset("huge")


# ---------------------------------------------------------------------------------------------------------------------
# Vision


@torch.no_grad()
def hidden_states(tower, images):
    """Everything the tower's layers see, from input of the first to output of the last: n_layers + 1 of (n, 1 + N, D)."""
    patches = [images[:, :, y:y + 8, x:x + 8].flatten(1) @ tower.patch.weight.flatten(1).T for y in (0, 8) for x in (0, 8)]
    x = torch.stack([tower.cls.expand(len(images), -1), *patches], 1) + tower.pos
    states = [tower.pre_norm(x)]
    for layer in tower.layers:
        states.append(layer(states[-1])[0])
    return states


@pytest.mark.parametrize("select", [-1, -2, -3, -4])
@pytest.mark.parametrize("n_experts", [0, 4, [4, 0, 0]])
def test_features_are_the_select_layers_without_cls(tiny_model, select, n_experts):
    tower = tiny_model(vision=dict(select_layer=select, n_experts=n_experts)).vision
    images = torch.randn(2, 3, 16, 16)
    want = hidden_states(tower, images)[select][:, 1:]
    for aux in (None, []):                                                   # collecting runs more layers, and changes nothing
        torch.testing.assert_close(tower(images, aux), want, rtol=1e-4, atol=1e-5)
    last, features = tower.run_layers(images, tower.config.n_layers)
    torch.testing.assert_close(last, hidden_states(tower, images)[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-5)


def test_pixel_shuffle_lays_neighbours_side_by_side_as_nanovlm_does():
    x = torch.randn(2, 36, 5)
    got = M.pixel_shuffle(x, 3)
    assert got.shape == (2, 4, 45)
    for row in range(2):
        for column in range(2):
            patches = [x[:, 6 * (3 * row + y) + 3 * column + i] for y in range(3) for i in range(3)]
            assert torch.equal(got[:, 2 * row + column], torch.cat(patches, -1))
    idefics3 = pytest.importorskip("transformers.models.idefics3.modeling_idefics3")     # SmolVLM's ancestor
    assert torch.equal(got, idefics3.Idefics3Connector.pixel_shuffle(None, x, 3))


@pytest.mark.parametrize("vision", [{}, M.SIGLIP])
@torch.no_grad()
def test_a_pixel_shuffle_fills_fewer_slots_also_with_scales_and_experts(tiny_model, vision):
    model = tiny_model(vision=dict(**vision, image_size=32, scales=[1, 2], n_experts=3), connector=dict(pixel_shuffle=2, n_experts=4))
    assert model.config.n_image_tokens == 4 and model.connector.ffn.w_in.shape == (4, 16, 4 * 2 * 16)
    tokens = torch.tensor([[1, *[M.IMAGE] * 4, 2, 3]])
    out = model(tokens, torch.randn(1, 3, 32, 32), labels=tokens.clamp(min=0))
    assert out.image_embeds.shape == (1, 4, 16) and out.routing["connector"][0].experts.shape == (1, 4, 2)
    with pytest.raises(ValueError, match=r"16 IMAGE slots, the images give 4 features \(4 an image\)"):
        model(torch.full((1, 16), M.IMAGE), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("scale", [2, 3])
@torch.no_grad()
def test_s2_reads_crops_row_by_row_and_pools_them_by_area(tiny_model, scale):
    model = tiny_model(vision=dict(scales=[1, scale]))
    images = torch.randn(2, 3, 16, 16)
    got = model.vision(images)
    assert got.shape == (2, 4, 32)
    for i in range(2):
        big = F.interpolate(images[i:i + 1], size=(16 * scale, 16 * scale), mode="bicubic")
        grid = torch.zeros(2 * scale, 2 * scale, 16)                         # patches of the enlarged image, (row, column, D)
        for row in range(scale):
            for column in range(scale):
                crop = big[:, :, 16 * row:16 * row + 16, 16 * column:16 * column + 16]
                grid[2 * row:2 * row + 2, 2 * column:2 * column + 2] = hidden_states(model.vision, crop)[-2][0, 1:].view(2, 2, 16)
        pooled = torch.stack([grid[r * scale:(r + 1) * scale, c * scale:(c + 1) * scale].mean((0, 1)) for r in (0, 1) for c in (0, 1)])
        want = torch.cat([hidden_states(model.vision, images[i:i + 1])[-2][0, 1:], pooled], -1)
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-4)


def test_every_vision_router_counts_also_the_last_one(tiny_model):
    model = tiny_model(vision=dict(n_experts=4, scales=[1, 2]), connector=dict(n_experts=4))
    tokens, images = tokens_of([3, "I", "I", 5]), torch.randn(2, 3, 16, 16)
    out = model(tokens, images)
    assert len(out.routing["vision"]) == 3 * 2 and len(out.routing["connector"]) == 1 and out.routing["text"] == []
    assert [r.experts.shape for r in out.routing["vision"]] == [(2, 5, 2)] * 3 + [(8, 5, 2)] * 3          # crops with their CLS
    assert out.routing["connector"][0].experts.shape == (2, 4, 2)
    for kind in ("balance", "z"):
        for part in ("vision", "connector"):
            mean = sum(getattr(r, kind) for r in out.routing[part]) / len(out.routing[part])
            torch.testing.assert_close(out.parts[f"{part}/{kind}"], mean)
    with torch.no_grad():
        model.vision.layers[-1].ffn.router.mul_(3)
    other = model(tokens, images)
    assert torch.equal(other.logits, out.logits) and (other.parts["vision/z"] - out.parts["vision/z"]).abs() > 1e-3


def test_the_tower_refuses_images_of_another_size(tiny_model):
    with pytest.raises(ValueError, match=r"\(1, 3, 24, 24\).*16, 16"):
        tiny_model().vision(torch.zeros(1, 3, 24, 24))


def put(linear, hf):
    linear.weight.copy_(hf.weight)
    if linear.bias is not None:
        linear.bias.copy_(hf.bias)


@torch.no_grad()
def loud(hf):
    for p in hf.parameters():
        p.normal_(0, p.shape[-1] ** -0.5) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
    return hf.eval()


@torch.no_grad()
def test_vision_equals_transformers_clip(tiny_model):
    hf = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    theirs = loud(hf.CLIPVisionModel(hf.CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=3,
                                                         num_attention_heads=2, intermediate_size=24)))
    tower, inner = tiny_model().vision, getattr(theirs, "vision_model", theirs)
    tower.patch.weight.copy_(inner.embeddings.patch_embedding.weight)
    tower.cls.copy_(inner.embeddings.class_embedding)
    tower.pos.copy_(inner.embeddings.position_embedding.weight)
    put(tower.pre_norm, inner.pre_layrnorm)
    for a, b in zip(tower.layers, inner.encoder.layers, strict=True):
        for mine, name in ((a.q, "q_proj"), (a.k, "k_proj"), (a.v, "v_proj"), (a.o, "out_proj")):
            put(mine, getattr(b.self_attn, name))
        put(a.norm1, b.layer_norm1)
        put(a.norm2, b.layer_norm2)
        for mine, his in ((a.ffn.w_in, b.mlp.fc1.weight), (a.ffn.b_in, b.mlp.fc1.bias), (a.ffn.w_out, b.mlp.fc2.weight),
                          (a.ffn.b_out, b.mlp.fc2.bias)):
            mine.copy_(his)
    images = torch.randn(2, 3, 16, 16)
    want = theirs(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(images), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Decoder


@pytest.mark.parametrize("kind, window", [("Mistral", None), ("Mistral", 3), ("Mixtral", None)])
@torch.no_grad()
def test_decoder_equals_transformers(tiny_model, kind, window):
    hf = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    theirs = loud(getattr(hf, kind + "ForCausalLM")(getattr(hf, kind + "Config")(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        sliding_window=window, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=500.0),
        attn_implementation="eager", **(dict(num_local_experts=4) if kind == "Mixtral" else {}))))
    ours = tiny_model(vision=None, text=dict(sliding_window=window, rope_theta=500.0, n_experts=4 if kind == "Mixtral" else 0))
    text = ours.text
    put_weight = lambda mine, his: mine.weight.copy_(his.weight)
    put_weight(text.embed, theirs.model.embed_tokens)
    put_weight(text.norm, theirs.model.norm)
    put_weight(text.head, theirs.lm_head)
    for a, b in zip(text.layers, theirs.model.layers, strict=True):
        for mine, name in ((a.q, "q_proj"), (a.k, "k_proj"), (a.v, "v_proj"), (a.o, "o_proj")):
            put_weight(mine, getattr(b.self_attn, name))
        put_weight(a.norm1, b.input_layernorm)
        put_weight(a.norm2, b.post_attention_layernorm)
        if kind == "Mistral":
            weights = b.mlp.gate_proj.weight, b.mlp.up_proj.weight, b.mlp.down_proj.weight
        else:
            a.ffn.router.copy_(b.mlp.gate.weight)
            weights = *b.mlp.experts.gate_up_proj.chunk(2, 1), b.mlp.experts.down_proj         # (E, 2 F, D): gate, then up
        for mine, his in zip((a.ffn.w_gate, a.ffn.w_in, a.ffn.w_out), weights):
            mine.copy_(his)
    tokens = torch.randint(40, (2, 9))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


DECODERS = {"dense": {}, "window": dict(sliding_window=3), "experts": TEXT_EXPERTS, "tied": dict(tie_embeddings=True),
            "experts, window": dict(n_experts=4, sliding_window=4)}


@pytest.mark.parametrize("text", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_cached_logits_equal_those_of_one_pass(tiny_model, text):
    model = tiny_model(vision=None, text=text)
    tokens = torch.randint(40, (2, 11))
    want, cache = model(tokens).logits, M.Cache(model.config.text, 2, 14, "cpu", torch.float32)
    x, real = model.text.embed(tokens), torch.ones(2, 11, dtype=torch.bool)
    got = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 11)):           # prefill, single steps, a chunk
        positions = torch.arange(start, end).expand(2, -1)
        got.append(model.text(x[:, start:end], real[:, start:end], cache=cache, positions=positions, n_keys=14))
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)


def greedy(model, row, images, steps):
    """One row, no cache, no padding: the whole sequence through the model again for every token."""
    tokens = row.unsqueeze(0)
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens, images).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[0, len(row):].tolist()


@pytest.mark.parametrize("text", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_generation_equals_full_recomputation_for_rows_of_any_length(tiny_model, text):
    model = tiny_model(text=text, **EXPERTS)
    images = torch.randn(3, 3, 16, 16)
    tokens = tokens_of([7, "I", 3], [5], ["I", 9, 1, "I", 12, 30, 2], [4, 4, 8], length=16)
    got = model.generate(tokens, images, max_new_tokens=9)
    assert got.shape == (4, 9) and got.dtype == torch.int64
    for row, generated, own in zip(tokens, got.tolist(), (images[:1], None, images[1:], None)):
        assert generated == greedy(model, row[row != PAD], own, 9)
    assert len({tuple(row) for row in got.tolist()}) > 1 and len(got.unique()) > 2              # not the same word over and over


@torch.no_grad()
def test_generation_ignores_training_mode_and_checkpointing(tiny_model):
    model = tiny_model()
    tokens, images = tokens_of([7, "I", 3], [5, 6]), torch.randn(1, 3, 16, 16)
    want = model.generate(tokens, images, max_new_tokens=5)
    model.train().checkpointing()
    assert torch.equal(model.generate(tokens, images, max_new_tokens=5), want)


def test_generation_works_in_bf16_and_under_autocast(tiny_model):
    model = tiny_model(**EXPERTS)
    tokens, images = tokens_of([7, "I", 3], [5, 6]), torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        first = model(tokens, images).logits[[0, 1], [5, 1]].argmax(-1)
        assert torch.equal(model.generate(tokens, images, max_new_tokens=3)[:, 0], first)
    model.bfloat16()
    first = model(tokens, images).logits[[0, 1], [5, 1]].argmax(-1)
    assert torch.equal(model.generate(tokens, images, max_new_tokens=3)[:, 0], first)


@torch.no_grad()
def test_image_embeds_take_the_place_of_images(tiny_model):
    model = tiny_model(**EXPERTS)
    tokens, images = tokens_of([7, "I", 3], ["I", 6]), torch.randn(2, 3, 16, 16)
    embeds = model.encode_images(images)
    assert torch.equal(model(tokens, image_embeds=embeds).logits, model(tokens, images).logits)
    assert torch.equal(model.generate(tokens, image_embeds=embeds, max_new_tokens=4), model.generate(tokens, images, max_new_tokens=4))


@torch.no_grad()
def test_rows_are_filled_with_eos_behind_their_first(tiny_model):
    model = tiny_model()
    tokens = tokens_of([7, 3], [5], [11, 20, 30])
    free, shown = model.generate(tokens, max_new_tokens=10).tolist(), []
    eos = free[0][2]
    stop = [row.index(eos) if eos in row else 10 for row in free]
    length = min(10, max(stop) + 1)                                          # stops when the last row is done
    want = [[eos if i > at else t for i, t in enumerate(row)][:length] for row, at in zip(free, stop)]
    got = model.generate(tokens, max_new_tokens=10, eos=eos, on_token=lambda t: shown.append(t.tolist()))
    assert got.tolist() == want and [list(t) for t in zip(*shown)] == want and len(set(stop)) > 1
    assert model.generate(tokens[:1], max_new_tokens=10, eos=eos).tolist() == [free[0][:stop[0] + 1]]     # alone: no filling at all


@torch.no_grad()
def test_any_of_several_ends_ends_a_row(tiny_model):
    model, tokens = tiny_model(), tokens_of([7, 3], [5], [11, 20, 30])
    free = model.generate(tokens, max_new_tokens=10).tolist()
    ends = [free[0][2], free[1][4], 39]
    stop = [next((i for i, t in enumerate(row) if t in ends), 10) for row in free]
    want = [[ends[0] if i > at else t for i, t in enumerate(row)][:min(10, max(stop) + 1)] for row, at in zip(free, stop)]
    assert model.generate(tokens, max_new_tokens=10, eos=ends).tolist() == want and len(set(stop)) > 1
    assert model.generate(tokens, max_new_tokens=10, eos=[]).tolist() == free


@torch.no_grad()
def test_context_ends_where_the_decoders_does(tiny_model):
    model, tokens = tiny_model(text=dict(max_positions=12)), tokens_of([7, 3], [5], length=8)
    assert model.generate(tokens, max_new_tokens=10).shape == (2, 10)                       # padding does not count
    with pytest.raises(ValueError, match="2 tokens and up to 11 .* 12 that"):
        model.generate(tokens, max_new_tokens=11)
    with pytest.warns(UserWarning, match="12 that this decoder"):
        assert model.generate(tokens, max_new_tokens=11, too_long="warn").shape == (2, 11)


def test_sampling_follows_temperature_and_top_p():
    p = torch.tensor([0.1, 0.5, 0.04, 0.36])
    draw = lambda t, top_p, n=8000: sample(p.log().expand(n, 4), t, top_p, torch.Generator().manual_seed(1)).bincount(minlength=4) / n
    torch.testing.assert_close(draw(1.0, 1.0), p, rtol=0, atol=0.02)
    torch.testing.assert_close(draw(2.0, 1.0), p.sqrt() / p.sqrt().sum(), rtol=0, atol=0.02)
    torch.testing.assert_close(draw(1.0, 0.8), torch.tensor([0, 0.5, 0, 0.36]) / 0.86, rtol=0, atol=0.02)     # 0.5 is not 0.8 yet
    assert draw(1.0, 0.4).tolist() == [0, 1, 0, 0] and draw(0.01, 1.0).tolist() == [0, 1, 0, 0] and draw(0, 1.0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-300])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    logits = torch.tensor([[-3.0, 5.0, 4.99], [80.0, -1e4, 79.9]])
    assert sample(logits, temperature, 0.9).tolist() == [1, 0]


@pytest.mark.parametrize("number, how", [(math.nan, {}), (math.nan, dict(temperature=1.0)), (math.inf, dict(eos=3)), (-math.inf, {})])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_likely_cause(number, how, tiny_model):
    model, steps = tiny_model(), []
    with torch.no_grad():
        model.text.norm.weight.fill_(number)
    with pytest.raises(ValueError, match="NaN or infinite.*diverged.*float16"):
        model.generate(tokens_of([7], [8, 9]), max_new_tokens=3, on_token=steps.append, **how)
    assert len(steps) == 1                                                         # it stops at once


def test_sampling_repeats_with_its_generator(tiny_model):
    model = tiny_model()
    go = lambda seed: model.generate(tokens_of([7], [8, 9]), max_new_tokens=8, temperature=1.5,
                                     generator=torch.Generator().manual_seed(seed)).tolist()
    assert go(1) == go(1) != go(2)


@pytest.mark.parametrize("rows, words", [([[PAD, 3]], "right only"), ([[3, PAD, 4]], "right only"), ([[3, 4], [PAD, PAD]], "empty"),
                                         ([[3, -100, 4]], "are these labels")])
def test_padding_that_is_not_on_the_right_and_marks_that_are_none_are_refused(tiny_model, rows, words):
    model, tokens = tiny_model(), torch.tensor(rows)
    with pytest.raises(ValueError, match=words):
        model.generate(tokens)
    if words != "empty":                                                     # which is no fault where nothing is to follow
        for ask in (model, model.embed, model.count_slots):
            with pytest.raises(ValueError, match=words):
                ask(tokens)


@pytest.mark.parametrize("kw", [dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=math.nan), dict(top_p=0.0), dict(top_p=1.5)])
def test_generate_refuses_numbers_out_of_range(tiny_model, kw):
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        tiny_model().generate(torch.tensor([[1]]), **kw)


def test_what_inference_mode_leaves_in_the_compiled_cache_can_be_written_to(tiny_model):
    model, tokens = tiny_model(), tokens_of([7, 8, 9])
    with torch.inference_mode():
        want = model.generate(tokens, max_new_tokens=3, compile="eager")
    assert torch.equal(model.generate(tokens, max_new_tokens=3, compile="eager"), want)
    assert torch.equal(model.generate(tokens, max_new_tokens=3, eos=()), want)


@pytest.mark.parametrize("part, words", [("audio", "no part 'audio'"), ("text.foo", "the decoder has no part 'text.foo'")])
def test_a_part_that_is_not_there_is_named(tiny_model, part, words):
    with pytest.raises(ValueError, match=words):
        M.part_parameters(tiny_model(), part)


# ---------------------------------------------------------------------------------------------------------------------
# The splice, padding, losses


@pytest.mark.parametrize("text", [{}, TEXT_EXPERTS, dict(n_experts=4, eval_capacity_factor=0.6), dict(sliding_window=3)])
@torch.no_grad()
def test_padding_changes_no_logit_loss_or_statistic(tiny_model, text):
    model = tiny_model(text=text, **EXPERTS)
    images = torch.randn(2, 3, 16, 16)
    rows = [7, "I", 3, 9], [5, 6], [2, 8, "I", 1, 30]
    short, long = tokens_of(*rows), tokens_of(*rows, length=14)
    a, b = model(short, images, labels=labels_of(short)), model(long, images, labels=labels_of(long))
    real = short != PAD
    torch.testing.assert_close(a.logits[real], b.logits[:, :short.shape[1]][real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.parts, b.parts)
    for r, s in zip(a.routing["text"], b.routing["text"]):
        torch.testing.assert_close(r.weights[real.flatten()], s.weights[(long != PAD).flatten()])
        assert not s.weights[(long == PAD).flatten()].any()
    if "eval_capacity_factor" not in text:                                       # rows share the experts' places, else they are independent
        alone = model(short[1:2, :2]).logits
        torch.testing.assert_close(a.logits[1:2, :2], alone, rtol=1e-5, atol=1e-5)


def mixed_items(n=9):
    """Items as data.Encoded gives them: none, one or two images, 3 to 20 tokens, of which about half are learnt."""
    gen, items = torch.Generator().manual_seed(1), []
    for i in range(n):
        tokens = torch.randint(1, 40, (3 + 17 * i // n,), generator=gen)
        learnt = torch.rand(tokens.shape, generator=gen) < 0.5
        learnt[0] = i % 2 == 0                                                   # nothing foretells a first token: it never counts
        tokens = torch.cat([tokens[:1], *[torch.full((4,), IMAGE)] * (i % 3), tokens[1:]])
        labels = torch.full_like(tokens, IGNORE)
        labels[tokens >= 0] = torch.where(learnt, tokens[tokens >= 0], IGNORE)
        items.append({"tokens": tokens, "labels": labels, "images": torch.randn(i % 3, 3, 16, 16, generator=gen), "broken": [], "truncated": False})
    return items


@pytest.mark.parametrize("text", [{}, dict(n_experts=4), dict(n_experts=[4, 0], aux="sum", capacity_factor=9.0), dict(sliding_window=3)],
                         ids=["dense", "experts", "moe-llava", "window"])
def test_packed_samples_have_the_losses_and_gradients_of_samples_apart(tiny_model, text):
    items, results = mixed_items(), []
    apart, packed = data.collate(items), data.collate_packed(items, 40)
    assert packed["tokens"].shape[0] < len(items) / 2 and packed["tokens"].numel() < 0.6 * apart["tokens"].numel()
    for batch in (apart, packed):
        model = tiny_model(text=text, **EXPERTS).train()
        out = model(**{name: t for name, t in batch.items() if torch.is_tensor(t)})
        out.loss.backward()
        results.append((out.parts, {name: p.grad for name, p in model.named_parameters()}))
    (parts, grads), (packed_parts, packed_grads) = results
    assert parts["lm"] > 1 and parts["vision/balance"] > 0.5 and (parts["text/z"] > 0.1) == ("n_experts" in text)
    torch.testing.assert_close(packed_parts, parts, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-5, atol=1e-5, msg=name)


@torch.no_grad()
def test_packed_samples_do_not_see_each_other(tiny_model):
    model, items = tiny_model(), [item for item in mixed_items() if not len(item["images"])]
    packed = data.collate_packed(items, 40)
    assert len(packed["tokens"]) == 1
    logits = model(packed["tokens"], sample_positions=packed["sample_positions"]).logits[0]
    begins = (packed["sample_positions"][0] == 0).nonzero().flatten().tolist()[:len(items)]
    for item, begin in zip(sorted(items, key=lambda item: -len(item["tokens"])), begins, strict=True):
        alone = model(item["tokens"][None]).logits[0]
        torch.testing.assert_close(logits[begin:begin + len(alone)], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(packed["tokens"]).logits[0, begins[1]:], logits[begins[1]:], atol=0.1)      # without positions they do


def test_a_packed_sample_without_an_image_counts_as_a_blank_one(tiny_model):
    model, packed = tiny_model(), data.collate_packed(mixed_items(), 40)
    counts = CuMo.count_slots(packed["tokens"], packed["sample_positions"])
    assert counts == [4 * 9, 3, 0] and len(packed["images"]) == 9 + 3
    model(packed["tokens"], packed["images"][:9], labels=packed["labels"], sample_positions=packed["sample_positions"])        # the model adds its own
    for n in (8, 11):
        with pytest.raises(ValueError, match=f"36 IMAGE slots, the images give {4 * n} features"):
            model(packed["tokens"], packed["images"][:n], sample_positions=packed["sample_positions"])


def test_text_statistics_are_means_over_all_real_tokens_of_the_batch(tiny_model):
    model = tiny_model(text=dict(n_experts=4))
    tokens = tokens_of([7, 3, 9, 1, 1], [5, 6])
    r = model(tokens).routing["text"][0]
    x = model.text.embed(tokens.clamp(min=0))
    rope = M.rope_table(torch.arange(5)[None], 4, 1e4)
    block, seen = model.text.layers[0], []
    block.norm2.register_forward_hook(lambda module, args, y: seen.append(y))
    block(x, rope, tokens != PAD)
    logits = F.linear(seen[0], block.ffn.router)[tokens != PAD].double()                        # (7, E)
    p = logits.softmax(-1)
    first = F.one_hot(p.argmax(-1), 4).double()
    assert r.balance.item() == pytest.approx(4 * (p.mean(0) * first.mean(0)).sum().item(), rel=1e-5)
    assert r.z.item() == pytest.approx((logits.logsumexp(-1) ** 2).mean().item(), rel=1e-5)


@torch.no_grad()
def test_features_go_to_the_slots_in_order_over_the_batch(tiny_model):
    model = tiny_model()
    images = torch.randn(3, 3, 16, 16)
    tokens = tokens_of([7, "I", 3], [5, 6], ["I", 4, "I"])
    out = model(tokens, images)
    assert out.image_embeds.shape == (3, 4, 16) and model(tokens[1:2]).image_embeds is None
    x = model.embed(tokens, out.image_embeds)
    for place, want in (((0, slice(1, 5)), 0), ((2, slice(0, 4)), 1), ((2, slice(5, 9)), 2)):
        assert torch.equal(x[place], out.image_embeds[want])
        torch.testing.assert_close(x[place], model.encode_images(images[want:want + 1])[0])   # alone, some CPUs round otherwise
    assert torch.equal(x[1, :2], model.text.embed.weight[[5, 6]]) and torch.equal(x[2, 4], model.text.embed.weight[4])
    torch.testing.assert_close(out.logits[2], model(tokens[2:], images[1:]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_slots_that_do_not_match_the_features_are_an_error_with_both_numbers(tiny_model, n_images):
    model, tokens, images = tiny_model(), tokens_of([7, "I", 3], ["I"]), torch.randn(n_images, 3, 16, 16)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"8 IMAGE slots.* {4 * n_images} features"):
            call(tokens, images)


def test_sound_is_refused(tiny_model):
    model = tiny_model()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="hears nothing"):
            call(torch.tensor([[1, 2]]), audio=torch.zeros(1, 80, 3000))
        with pytest.raises(ValueError, match="AUDIO"):
            call(torch.tensor([[1, AUDIO, 2]]))


PARTS = {"lm", "vision/balance", "vision/z", "connector/balance", "connector/z", "text/balance", "text/z"}


@pytest.mark.parametrize("aux", ["mean", "sum"])
def test_loss_is_cross_entropy_of_the_next_token_plus_weighted_router_losses(tiny_model, aux):
    model = tiny_model(text=dict(n_experts=4, aux=aux), balance_coef=0.3, z_coef=0.07, **EXPERTS)
    tokens, images = tokens_of([7, "I", 3, 9, 11], [5, 6, 2]), torch.randn(1, 3, 16, 16)
    labels = torch.full_like(tokens, IGNORE)
    labels[0, 6:8], labels[1, 1] = tokens[0, 6:8], 6                         # three words are learnt
    labels[0, 0] = 7                                                         # the first has nothing before it
    out = model(tokens, images, labels=labels)
    nll = [-out.logits[b, t - 1].double().log_softmax(-1)[labels[b, t]].item() for b, t in ((0, 6), (0, 7), (1, 1))]
    assert out.parts["lm"].item() == pytest.approx(sum(nll) / 3, rel=1e-5)
    for name, routings in out.routing.items():                               # the setting speaks of the decoder only
        for kind in ("balance", "z"):
            total = sum(getattr(r, kind).item() for r in routings)
            n = 1 if (name, aux) == ("text", "sum") else len(routings)
            assert out.parts[f"{name}/{kind}"].item() == pytest.approx(total / n, rel=1e-5)
    assert set(out.parts) == PARTS and all(v.shape == () for v in out.parts.values())
    extra = sum((0.3 if name.endswith("balance") else 0.07) * v.item() for name, v in out.parts.items() if name != "lm")
    assert out.loss.item() == pytest.approx(out.parts["lm"].item() + extra, rel=1e-5) and extra > 0.5


def test_total_loss_is_the_outputs_and_shares_of_micro_batches_add_up_to_it(tiny_model):
    model = tiny_model(balance_coef=0.3, z_coef=0.07, **EXPERTS)
    tokens, images = tokens_of([7, "I", 3, 9, 11], ["I", 6, 2], ["I", 5], ["I", 8, 8, 1]), torch.randn(4, 3, 16, 16)
    labels = labels_of(tokens)
    whole = model(tokens, images, labels=labels)
    assert torch.equal(total_loss(whole.parts, 0.3, 0.07), whole.loss)
    assert torch.equal(total_loss(whole.parts, 0.0, 0.0), whole.parts["lm"])              # stages 1 and 2 train without the routers' losses
    n_labels, summed = (labels[:, 1:] != IGNORE).sum(), 0
    for rows in ([0], [1, 2, 3]):
        parts = model(tokens[rows], images[rows], labels=labels[rows]).parts
        share = {name: len(rows) / 4 for name in parts} | {"lm": (labels[rows, 1:] != IGNORE).sum() / n_labels}
        summed = summed + total_loss(parts, 0.3, 0.07, share)
    torch.testing.assert_close(summed, whole.loss)
    assert total_loss({"clip": 2.0, "regions": 3.0, "x/balance": 5.0, "x/z": 7.0}, 0.5, 0.25) == 2 + 3 + 2.5 + 1.75


def test_a_caller_that_counts_the_slots_saves_the_model_the_counting(tiny_model, monkeypatch):
    model = tiny_model(**EXPERTS)
    tokens, images = tokens_of([7, "I", 3], [5, 6], ["I"]), torch.randn(3, 3, 16, 16)
    want, frames = {}, torch.tensor([2, 1])
    for given in (None, frames):                                             # the second row gets a blank image in either case
        want[given is None] = model(tokens, images[:2] if given is None else images, labels=labels_of(tokens), frames=given)
    slots = CuMo.count_slots(tokens)
    assert slots == model.count_slots(tokens) == [8, 1, 0]
    monkeypatch.setattr(CuMo, "count_slots", None)
    for given in (None, frames):
        out = model(tokens, images[:2] if given is None else images, labels=labels_of(tokens), frames=given, slots=slots)
        assert torch.equal(out.loss, want[given is None].loss) and len(out.image_embeds) == 2
    with pytest.raises(ValueError, match="8 IMAGE slots.* 4 features"):      # and they are held against the features as ever
        model(tokens, images[:1], slots=slots)
    with pytest.raises(ValueError, match="number of images, 3; they give 4"):
        model(tokens, images, frames=torch.tensor([2, 2]), slots=slots)


def test_without_labels_there_is_no_loss_and_without_experts_no_router_loss(tiny_model):
    model, tokens = tiny_model(), tokens_of([7, 3])
    assert model(tokens).loss is None
    out = model(tokens, labels=tokens)
    assert set(out.parts) == PARTS and out.loss == out.parts["lm"] and all(v == 0 for k, v in out.parts.items() if k != "lm")
    assert model(tokens, labels=torch.full_like(tokens, IGNORE)).loss == 0   # nothing to learn: zero, not 0 / 0


def gradients(model, *args, **kw):
    model.zero_grad(set_to_none=True)
    out = model(*args, **kw)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_neither_loss_nor_gradients(tiny_model, monkeypatch):
    model = tiny_model(text=TEXT_EXPERTS, **EXPERTS).train()
    tokens, images = tokens_of([7, "I", 3, 9], [5, 6]), torch.randn(1, 3, 16, 16)
    plain = gradients(model, tokens, images, labels=labels_of(tokens))
    calls, original = [], M.checkpoint
    monkeypatch.setattr(M, "checkpoint", lambda *a, **kw: (calls.append(1), original(*a, **kw))[1])
    model.checkpointing()
    torch.testing.assert_close(gradients(model, tokens, images, labels=labels_of(tokens)), plain)
    assert len(calls) == 3 + 2
    model.checkpointing(False)
    model(tokens, images)
    assert len(calls) == 3 + 2


@pytest.mark.parametrize("parts", [{}, EXPERTS])
@pytest.mark.parametrize("training", [False, True])
def test_a_row_without_an_image_counts_as_a_blank_one(tiny_model, parts, training):
    """As the released data set gives it one: in the auxiliary losses, in no slot, and the same text loss and logits."""
    model, rows = tiny_model(**parts).train(training), ([7, "I", 3, 9], [5, 6, 8], [4, 2])
    tokens, image = tokens_of(*rows), torch.randn(1, 3, 16, 16)
    out, reached = model(tokens, image, labels=labels_of(tokens)), gradients(model, tokens, image, labels=labels_of(tokens))[1]
    aux = {"vision": [], "connector": []}
    model.encode_images(torch.cat([image, torch.zeros(2, 3, 16, 16)]), aux)
    for name, routings in aux.items():
        for kind in ("balance", "z"):
            want = torch.stack([getattr(r, kind) for r in routings]).mean() if routings else torch.zeros(())
            torch.testing.assert_close(out.parts[f"{name}/{kind}"], want)
    asked = model(tokens, image)                                             # without labels nothing is learnt, and no blank is needed
    torch.testing.assert_close(asked.logits, out.logits)
    assert out.image_embeds.shape[0] == asked.image_embeds.shape[0] == 1
    pictured = tokens_of([7, "I", 9, 2])
    _, with_images = gradients(model, pictured, torch.randn(1, 3, 16, 16), labels=labels_of(pictured))
    assert set(reached) == set(with_images) and ("vision.layers.2.ffn.router" in reached) == bool(parts)


def test_a_text_only_batch_leaves_the_text_loss_and_its_gradients_alone(tiny_model):
    model, tokens = tiny_model().train(), tokens_of([7, 3, 9, 2], [5, 6])
    alone = tiny_model(vision=None).train()
    alone.load_state_dict({name: p for name, p in model.state_dict().items() if name.startswith("text.")})
    loss, grads = gradients(model, tokens, labels=labels_of(tokens))
    want_loss, want = gradients(alone, tokens, labels=labels_of(tokens))
    torch.testing.assert_close(loss, want_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name] if name in want else torch.zeros_like(grad))


@pytest.mark.parametrize("parts", [{}, EXPERTS, dict(vision=dict(n_experts=[4, 0, 4]))])
@pytest.mark.parametrize("trains", [("connector",), ("vision", "connector", "text")])
def test_every_trainable_parameter_gets_a_gradient_from_a_text_only_batch(tiny_model, parts, trains):
    model, tokens = tiny_model(**parts).train(), tokens_of([7, 3, 9, 2], [5, 6])
    choose_trainable(model, trains)
    _, reached = gradients(model, tokens, labels=labels_of(tokens))
    assert set(reached) == {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_a_language_model_alone_works_and_refuses_images(tiny_model):
    model = tiny_model(vision=None)
    assert model.vision is None and model.connector is None and model.config.n_image_tokens == 0
    tokens = tokens_of([7, 3, 9], [5])
    out = model.train()(tokens, labels=labels_of(tokens))
    assert out.loss.isfinite() and out.logits.shape == (2, 3, 40)
    assert model.generate(tokens, max_new_tokens=4).tolist() == [greedy(model, row[row != PAD], None, 4) for row in tokens]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="language model alone"):
            call(tokens, torch.zeros(1, 3, 16, 16))


def test_new_weights_follow_the_seed_and_are_all_set(tiny_config):
    def build():
        torch.manual_seed(3)
        return CuMo(tiny_config(text=TEXT_EXPERTS, **EXPERTS))
    a, b = build(), build()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for name, p in a.named_parameters():                                     # torch.empty that nobody filled would show here
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)), name
        elif "b_" in name or name.endswith("bias"):
            assert not p.any(), name
        else:
            assert 0.001 < p.std() < 1 and p.mean().abs() < 5 * p.std() / p.numel() ** 0.5, name
    assert sum(isinstance(m, MoE) for m in a.modules()) == 3 + 1 + 1


@torch.no_grad()
def test_tall_matrices_by_columns_are_the_same_model(tiny_model):
    """What generate.py does on a CPU."""
    model = tiny_model(vision=None, text=dict(vocab_size=1200, ffn_dim=1100, tie_embeddings=True))
    tokens, before = torch.randint(0, 1200, (2, 9)), {name: w.clone() for name, w in model.state_dict().items()}
    want, said = model(tokens).logits, model.generate(tokens, max_new_tokens=5)
    M.store_by_columns(model.text)
    tall = {name.split(".")[-2] if "w_" not in name else name.split(".")[-1] for name, w in model.text.named_parameters() if w.stride()[0] == 1 < w.dim()}
    assert tall == {"embed", "w_in", "w_gate"}
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(tokens, max_new_tokens=5), said)


def test_a_picture_or_sound_that_has_no_slots_is_not_ignored_by_an_answer(tiny_model):
    model = tiny_model(audio=dict(n_mels=5, n_frames=12, dim=16, n_layers=1, n_heads=2, ffn_dim=24, n_queries=3))
    text, images, mel = tokens_of([7, 8, 9]), torch.randn(2, 3, 16, 16), torch.randn(1, 5, 12)
    one = tokens_of([5, 6], ["I", 3])                                        # one picture a row, as elsewhere: the second row's is the second
    for tokens, kw, words in ((text, dict(images=images[:1]), "1 images were given, and the tokens have slots for 0"),
                              (one, dict(images=images), "2 images were given, and the tokens have slots for 1"),
                              (one, dict(images=torch.cat([images, images]), frames=torch.tensor([3, 1])), "4 images .* slots for 3"),
                              (text, dict(audio=mel), "1 chunks of sound were given, and the tokens have slots for 0")):
        with pytest.raises(ValueError, match=words):
            model.generate(tokens, max_new_tokens=2, **kw)
    model.generate(text, torch.zeros(1, 3, 16, 16), torch.zeros(1, 5, 12), max_new_tokens=2)
    model.generate(one, torch.cat([images[:1], torch.zeros(1, 3, 16, 16)]), max_new_tokens=2)


def test_pictures_whose_values_were_not_normalised_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"torch.uint8, the model takes \(n, 3, 16, 16\) of a float type"):
        tiny_model()(tokens_of(["I"]), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("pre_norm, n_prefix_tokens", [(True, 1), (False, 1), (False, 0)])
def test_under_autocast_the_towers_stream_is_float32_as_the_decoders(tiny_model, pre_norm, n_prefix_tokens):
    model, seen = tiny_model(vision=dict(pre_norm=pre_norm, n_prefix_tokens=n_prefix_tokens, select_layer=-1)), {}
    for name, block in (("tower", model.vision.layers[0]), ("decoder", model.text.layers[0])):
        block.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_of(["I", 3]), torch.randn(1, 3, 16, 16))
    assert seen["decoder"] == torch.float32 and (pre_norm or seen["tower"] == torch.float32)


def test_a_configuration_that_was_changed_is_checked_when_a_model_is_built(tiny_config):
    config = tiny_config()
    config.text.n_layers += 1
    with pytest.raises(ValueError, match="text.n_experts lists"):
        CuMo(config)
    config = tiny_config()
    config.text.n_experts = 4
    assert all(isinstance(layer.ffn, M.MoE) for layer in CuMo(config).text.layers)


def test_experts_in_the_ear_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"audio.n_experts = \[4\]: the ear is dense"):
        tiny_config(audio=dict(n_mels=5, n_frames=12, dim=16, n_layers=1, n_heads=2, ffn_dim=24, n_queries=3, n_experts=4))


def test_an_ears_positions_are_exact_whatever_type_weights_have_by_default():
    want = M.sinusoids(1500, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(M.sinusoids(1500, 64), want) and want.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_prompts_logits_are_made_for_its_last_place_alone(tiny_model, monkeypatch):
    model, real, sizes = tiny_model(vision=None), F.linear, []

    def linear(x, w, *args):
        if w is model.text.head.weight:
            sizes.append(tuple(x.shape[:-1]))
        return real(x, w, *args)
    monkeypatch.setattr(F, "linear", linear)
    model.generate(tokens_of([7, 8, 9, 3], [5, 6]), max_new_tokens=2)
    assert sizes == [(2,), (2, 1)]
