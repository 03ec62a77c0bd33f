"""upcycle.py over other programs' layouts: what is loaded computes what transformers computes, what is saved comes back bit for bit, what
is broken is named in one line, and memory stays near the model's size.

transformers' models here have a few thousand random weights, loud ones, biases and norms too (transformers starts biases at zero, where a
forgotten one would not be noticed). Each is made once and its answers are kept: `hf` below. Tests that need no second opinion run
without transformers.
"""
import copy
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import data
import generate
import upcycle as U
from model import IMAGE, PAD, SIGLIP, CuMo, VisionConfig, VisionTransformer, choose_trainable
from upcycle import assemble, load, main, save

UPCYCLE = Path(U.__file__)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
EYE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7)
LLAMA3 = dict(factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)
HF_IMAGE, N_SLOTS, N_NEW = 60, 16, 30                            # LLaVA's image token here; patches of an image; tokens to generate
DECODERS = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3), tie_word_embeddings=True, head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=6)),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=0, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16, use_sliding_window=True, sliding_window=6, max_window_layers=0, tie_word_embeddings=True)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
}
SIGLIP_EYE = {**EYE, "image_size": 30}                           # as in so400m-patch14-384: pixels are left over


@torch.no_grad()
def loud(model):
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise * p[0].numel() ** -0.5 if p.dim() > 1 else p + 0.3 * noise)
    return model.eval()


class Reference:
    """A transformers model and what it says to three rows of different lengths: longer than a window of 6 and a context of 16."""

    def __init__(self, t, name):
        text = t.LlamaConfig(**SMALL)
        if name in DECODERS:
            kind, more = DECODERS[name]
            self.model = getattr(t, kind + "ForCausalLM")(getattr(t, kind + "Config")(**SMALL, **more))
        elif name == "llava":                                    # heads 64 wide, which is what a tower without a config is taken to have
            eye = t.CLIPVisionConfig(**{**EYE, "hidden_size": 128, "num_attention_heads": 2})
            self.model = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=eye, text_config=text, image_token_index=HF_IMAGE))
        elif name == "llava-siglip":
            self.model = t.LlavaForConditionalGeneration(t.LlavaConfig(
                vision_config=t.SiglipVisionConfig(**EYE), text_config=t.Qwen3Config(**SMALL, head_dim=16), image_token_index=HF_IMAGE,
                vision_feature_layer=-1, vision_feature_select_strategy="full"))
        elif name in ("clip", "siglip"):
            words = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
            model, config, eye = (t.CLIPModel, t.CLIPConfig, EYE) if name == "clip" else (t.SiglipModel, t.SiglipConfig, SIGLIP_EYE)
            self.model = model(config(vision_config=eye, text_config=words))
        elif name == "siglip-vision":
            self.model = t.SiglipVisionModel(t.SiglipVisionConfig(**SIGLIP_EYE))
        else:
            self.model = t.CLIPVisionModel(t.CLIPVisionConfig(**EYE))
        loud(self.model)
        g = torch.Generator().manual_seed(3)
        size = 30 if name.startswith("siglip") else 28
        self.images = torch.randn(2, 3, size, size, generator=g) if "l" in name and name not in DECODERS else None
        if name in ("clip", "clip-vision", "siglip", "siglip-vision"):
            return
        self.rows = [torch.randint(3, 60, (n,), generator=g) for n in (40, 23, 9)]
        if name.startswith("llava"):                             # two rows with an image, one without
            self.rows = [torch.cat([row[:at], torch.full((N_SLOTS,), HF_IMAGE), row[at:]]) if at else row
                         for row, at in zip(self.rows, (3, 5, None))]
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.logits, self.said = self.ask(self.model)
        T = len(self.rows[0])
        self.tokens = torch.stack([torch.cat([row, torch.full((T - len(row),), PAD)]) for row in self.rows])
        if name.startswith("llava"):
            self.tokens[self.tokens == HF_IMAGE] = IMAGE

    @torch.no_grad()
    def ask(self, model, n_new=N_NEW):
        """Each row alone -> logits (T, V) of each, and what follows it, greedily (B, n_new)."""
        logits, said = [], []
        for i, row in enumerate(self.rows):
            more = {"pixel_values": self.images[i:i + 1].to(model.dtype)} if HF_IMAGE in row else {}
            ids = row.unsqueeze(0)
            logits.append(model(input_ids=ids, **more).logits[0].float())
            if n_new:
                more["attention_mask"] = torch.ones_like(ids)
                said.append(model.generate(ids, max_new_tokens=n_new, do_sample=False, **more)[0, len(row):])
        return logits, torch.stack(said) if said else None

    @torch.no_grad()
    def check(self, model, tolerance=1e-4):
        """Our model, given the rows as one padded batch, says the same."""
        logits = model(self.tokens, self.images).logits.float()
        for ours, theirs in zip(logits, self.logits):
            assert theirs.abs().max() > 1                                          # loud enough for the tolerance to mean something
            assert (ours[:len(theirs)] - theirs).abs().max() < tolerance
        assert torch.equal(model.generate(self.tokens, self.images, max_new_tokens=N_NEW), self.said)


@pytest.fixture(scope="module")
def hf():
    """-> hf(name): a Reference, made once."""
    t = pytest.importorskip("transformers", reason="comparing with transformers needs it: pip install transformers")
    t.logging.set_verbosity_error()
    t.logging.disable_progress_bar()
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, Reference(t, name))


def edit_json(file, edit):
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def older(cfg, key="rope_type"):
    """A current config.json -> how version 4 wrote it."""
    for part in {"text_config", "vision_config"} & cfg.keys():
        older(cfg[part], key)
    cfg.pop("head_dim", None)                                                      # LLaMA's had none before Llama 3.1
    cfg.pop("layer_types", None)
    if "dtype" in cfg:
        cfg["torch_dtype"] = cfg.pop("dtype")
    if rope := cfg.pop("rope_parameters", None):
        cfg["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
        cfg["rope_scaling"] = None if kind == "default" else {key: kind, **rope}


def write(folder, tensors, storage, config=None):
    """Tensors -> "safetensors" or "bin", in one file or, "... shards", in three with an index."""
    folder.mkdir(exist_ok=True)
    base, ext = ("pytorch_model", "bin") if "bin" in storage else ("model", "safetensors")
    put = torch.save if ext == "bin" else lambda part, file: save_file(part, file, metadata={"format": "pt"})
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    if storage.endswith("shards"):
        parts = {f"{base}-{i + 1:05}-of-00003.{ext}": list(tensors)[i::3] for i in range(3)}
        (folder / f"{base}.{ext}.index.json").write_text(json.dumps({"weight_map": {n: f for f, names in parts.items() for n in names}}))
    else:
        parts = {f"{base}.{ext}": list(tensors)}
    for file, names in parts.items():
        put({name: tensors[name] for name in names}, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder):
    """All tensors of a folder of safetensors."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def store(model, folder, how):
    """What save_pretrained writes, and what older versions of transformers and of torch did: ("current" | "v4" | "early v4", storage)."""
    style, storage = how
    model.save_pretrained(folder, max_shard_size="15KB" if storage == "safetensors shards" else "5GB")
    assert (folder / "model.safetensors").exists() == (storage != "safetensors shards")
    if style != "current":
        edit_json(folder / "config.json", lambda cfg: older(cfg, "rope_type" if style == "v4" else "type"))
    if "bin" in storage:
        tensors = read(folder)
        (folder / "model.safetensors").unlink()
        if "model.embed_tokens.weight" in tensors:               # old files hold these too
            tensors["lm_head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
            tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
        write(folder, tensors, storage)
    return folder


STORES = [("current", "safetensors"), ("current", "safetensors shards"), ("v4", "safetensors"), ("v4", "bin"), ("early v4", "bin shards")]
stores = pytest.mark.parametrize("how", STORES, ids=[", ".join(how) for how in STORES])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded computes what transformers computes


@stores
@pytest.mark.parametrize("name", [*DECODERS, "llava"])
def test_logits_and_greedy_answers_are_those_of_transformers(hf, name, how, tmp_path):
    reference = hf(name)
    model, tokenizer = load(store(reference.model, tmp_path, how))
    assert isinstance(model, CuMo) and not model.training and tokenizer is None and (model.vision is not None) == (name == "llava")
    reference.check(model)


@pytest.mark.parametrize("name, change", [
    ("llama3", dict(rope_scaling=None)), ("llama3", dict(rope_theta=1e4)), ("mistral", dict(sliding_window=None)),
    ("mistral", dict(sliding_window=7)), ("qwen2-tied-window", dict(sliding_window=None)), ("mixtral", dict(rope_theta=1e4))])
@torch.no_grad()
def test_the_comparison_would_notice_a_config_read_wrong(hf, name, change, tmp_path):
    reference = hf(name)
    model = load(store(reference.model, tmp_path, STORES[0]))[0]
    reference.check(model)
    model.text.config = dataclasses.replace(model.text.config, **change)
    assert (model(reference.tokens).logits[0] - reference.logits[0]).abs().max() > 0.01


@stores
@pytest.mark.parametrize("name", ["clip", "clip-vision"])
@torch.no_grad()
def test_clips_features_are_those_of_transformers(hf, name, how, tmp_path):
    reference = hf(name)
    store(reference.model, tmp_path, how)
    if how[0] != "current":                                      # older files: constants stored, and the tower always under its prefix
        tensors = read(tmp_path) or {k: v for f in tmp_path.glob("*.bin") for k, v in torch.load(f, weights_only=True).items()}
        tensors = {name if name.startswith(("vision_", "text_", "visual_", "logit_")) else f"vision_model.{name}": t
                   for name, t in tensors.items()}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
        if name == "clip":
            tensors["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
        write(tmp_path, tensors, how[1])
    model = load(tmp_path)[0]
    assert isinstance(model, VisionTransformer) and not model.training
    tower = reference.model.vision_model if name == "clip" else reference.model
    hidden = tower(reference.images, output_hidden_states=True).hidden_states
    assert hidden[-2].abs().max() > 1 and (model(reference.images) - hidden[-2][:, 1:]).abs().max() < 1e-4
    for select in (-1, -3, -4):                                  # every layer, though only one is ever chosen
        model.config.select_layer = select
        assert (model(reference.images) - hidden[select][:, 1:]).abs().max() < 1e-4


DECODER_FIRST = [(r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head")]


@pytest.mark.parametrize("renames", [
    DECODER_FIRST + [(r"^(?=vision_tower|multi)", "model.")], [(r"^vision_tower\.", "vision_tower.vision_model.")],
    DECODER_FIRST + [(r"^vision_tower\.", "model.vision_tower.vision_model."), (r"^(?=multi)", "model.")]],
    ids=["in memory, v5", "v4", "late v4"])
def test_llavas_names_of_every_version_are_understood(hf, renames, tmp_path):
    reference = hf("llava")
    store(reference.model, tmp_path, STORES[0])
    tensors = read(tmp_path)
    for pattern, to in renames:
        assert any(re.match(pattern, name) for name in tensors)
        tensors = {re.sub(pattern, to, name): t for name, t in tensors.items()}
    if "model.language_model.norm.weight" in tensors and not any("vision_model" in name for name in tensors):
        assert tensors.keys() == reference.model.state_dict().keys()
    reference.check(load(write(tmp_path, tensors, "safetensors"))[0])


def test_a_llava_config_that_names_only_what_is_not_a_default_is_read_as_transformers_reads_it(hf, tmp_path):
    """llava-hf/llava-1.5-7b-hf's text_config says neither width nor heads: a part of a config leaves out its class's defaults."""
    t = sys.modules["transformers"] if hf("llava") else None
    text = t.LlamaConfig(**{**SMALL, "hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 32}, rms_norm_eps=1e-5)
    eye = t.CLIPVisionConfig(**{**EYE, "hidden_size": 96, "num_attention_heads": 12})
    model = loud(t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=eye, text_config=text, image_token_index=HF_IMAGE)))
    model.save_pretrained(tmp_path)

    def strip(cfg):
        cfg["text_config"] = dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, torch_dtype="float16", vocab_size=64)
        cfg["vision_config"] = dict(model_type="clip_vision_model", image_size=28, patch_size=7)
    edit_json(tmp_path / "config.json", strip)
    ours = load(tmp_path)[0]
    reference = hf("llava")
    for logits, theirs in zip(ours(reference.tokens, reference.images).logits, reference.ask(model, n_new=0)[0]):
        assert (logits[:len(theirs)] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_keys_that_a_decoders_config_leaves_out_have_transformers_defaults(hf, tiny_model, kind, tmp_path):
    t = sys.modules["transformers"] if hf("llama") else None
    text = dict(n_experts=8 if kind == "mixtral" else 0, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")
    save(tiny_model(vision=None, text=text), tmp_path, layout="hf-llm")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        SMALL, model_type=kind, hidden_size=16, intermediate_size=24, vocab_size=40)))
    ours, theirs = load(tmp_path)[0].config.text, t.AutoConfig.from_pretrained(tmp_path)
    assert ours.norm_eps == theirs.rms_norm_eps and ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.act == theirs.hidden_act and ours.tie_embeddings == theirs.tie_word_embeddings and ours.head_dim == 4
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    if kind == "mixtral":
        assert (ours.top_k, ours.n_experts) == (theirs.num_experts_per_tok, [theirs.num_local_experts] * 2)


@torch.no_grad()
def test_a_mixtral_of_one_expert_a_token_rescales_its_weight_to_1_as_transformers_does(hf, tmp_path):
    reference = hf("mixtral")
    store(reference.model, tmp_path, STORES[0])
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(num_experts_per_tok=1))
    theirs, (ours, _) = type(reference.model).from_pretrained(tmp_path).eval(), load(tmp_path)
    want = reference.ask(theirs, n_new=0)[0][0]
    assert (ours(reference.tokens).logits[0] - want).abs().max() < 1e-4
    again = there_and_back(ours, tmp_path / "again", "hf-llm")
    assert again.config.text == ours.config.text and again.config.text.renormalise is True


@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]])
@torch.no_grad()
def test_where_qwen_lists_its_layers_the_list_counts(hf, kinds, tmp_path):
    reference = hf("qwen2")
    store(reference.model, tmp_path, STORES[0])
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(use_sliding_window=True, sliding_window=6, max_window_layers=0, layer_types=kinds))
    if len(set(kinds)) > 1:
        with pytest.raises(ValueError, match="in some layers only"):
            load(tmp_path)
        return
    theirs = type(reference.model).from_pretrained(tmp_path).eval()
    tokens = torch.arange(20)[None] % 30
    ours = load(tmp_path, dtype=torch.float32)[0].eval()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]])
@torch.no_grad()
def test_a_mistral_that_lists_its_layers_is_a_ministral(hf, kinds, tmp_path):
    reference = hf("mistral")
    store(reference.model, tmp_path, STORES[0])
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(layer_types=kinds))
    if len(set(kinds)) > 1:
        with pytest.raises(ValueError, match="in some layers only"):
            load(tmp_path)
        return
    t = sys.modules["transformers"]
    theirs, tokens = t.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.arange(20)[None] % 30
    torch.testing.assert_close(load(tmp_path)[0](tokens).logits, theirs(tokens).logits, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2"])
@torch.no_grad()
def test_rope_scaling_that_somebody_added_counts_as_in_transformers(hf, name, tmp_path):
    reference = hf(name)
    store(reference.model, tmp_path, STORES[0])
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}))
    with pytest.raises(ValueError, match="'yarn' is not supported"):
        load(tmp_path)
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(rope_scaling=LLAMA3 | {"rope_type": "llama3"}))
    theirs = type(reference.model).from_pretrained(tmp_path).eval()
    assert (load(tmp_path)[0](reference.tokens).logits[0] - reference.ask(theirs, n_new=0)[0][0]).abs().max() < 1e-4


def test_a_llava_without_its_head_is_refused_unless_it_is_tied(hf, tmp_path):
    store(hf("llava").model, tmp_path, STORES[0])
    tensors = read(tmp_path)
    write(tmp_path, {name: t for name, t in tensors.items() if "lm_head" not in name}, "safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        load(tmp_path)
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(tie_word_embeddings=True))
    assert load(tmp_path)[0].text.head is None


def test_end_tokens_beyond_the_embedding_are_left_out_and_what_is_saved_loads(hf, tmp_path):
    store(hf("llama3").model, tmp_path / "a", STORES[0])
    edit_json(tmp_path / "a/config.json", lambda cfg: cfg.update(bos_token_id=1, eos_token_id=[2, 128009]))
    (tmp_path / "a/generation_config.json").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match=r"names \[128009\] as start and end tokens"):
        model, _ = load(tmp_path / "a")
    assert model.config.text.end_tokens == [2] and model.config.text.start_token == 1
    save(model, tmp_path / "b")
    assert same(load(tmp_path / "b")[0], model)


@pytest.mark.parametrize("begin", [0, 1, 2, 28])
@torch.no_grad()
def test_qwen2s_window_begins_at_its_layer_or_is_refused(hf, begin, tmp_path):
    reference = hf("qwen2")
    store(reference.model, tmp_path, STORES[0])

    def window(cfg):
        del cfg["layer_types"]
        cfg.update(use_sliding_window=True, sliding_window=6, max_window_layers=begin)
    edit_json(tmp_path / "config.json", window)
    if begin == 1:
        with pytest.raises(ValueError, match="max_window_layers = 1"):
            load(tmp_path)
        return
    theirs = type(reference.model).from_pretrained(tmp_path).eval()
    assert (load(tmp_path)[0](reference.tokens).logits[0] - reference.ask(theirs, n_new=0)[0][0]).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_llava_ties_its_head_when_transformers_does(hf, tied, tmp_path):
    """The whole model's tie_word_embeddings decides there, whatever the decoder's own says."""
    t = sys.modules["transformers"] if hf("llava") else None
    text = t.Qwen2Config(**SMALL, tie_word_embeddings=True)
    cfg = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**EYE), text_config=text, image_token_index=HF_IMAGE, tie_word_embeddings=tied)
    model = loud(t.LlavaForConditionalGeneration(cfg))
    model.save_pretrained(tmp_path)
    ours, ids = load(tmp_path)[0], torch.arange(3, 20).unsqueeze(0)
    assert (ours(ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "mixtral", "llava", "clip"])
@torch.no_grad()
def test_the_stored_dtype_is_kept_unless_one_is_given(hf, name, dtype, storage, tmp_path):
    reference = hf(name)
    rounded = copy.deepcopy(reference.model)
    for p in rounded.parameters():                               # not .to(dtype), which would round rotary embeddings' buffers too
        p.copy_(p.to(dtype))
    store(copy.deepcopy(rounded).to(dtype), tmp_path, ("current", storage))
    kept, converted = load(tmp_path)[0], load(tmp_path, dtype=torch.float32)[0]
    assert {p.dtype for p in kept.parameters()} == {dtype} and {p.dtype for p in converted.parameters()} == {torch.float32}
    assert same(kept.float(), converted)                                           # the same numbers
    if name == "clip":
        hidden = rounded.vision_model(reference.images, output_hidden_states=True).hidden_states[-2]
        assert (converted(reference.images) - hidden[:, 1:]).abs().max() < 1e-4
        return
    for ours, theirs in zip(converted(reference.tokens, reference.images).logits, reference.ask(rounded, n_new=0)[0]):
        assert (ours[:len(theirs)] - theirs).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What is saved comes back bit for bit

TEXTS = {
    "llama": dict(template="vicuna"),
    "llama3": dict(template="vicuna", text=dict(rope_scaling=LLAMA3, rope_theta=5e5, tie_embeddings=True, head_dim=8)),
    "mistral": dict(template="mistral", text=dict(sliding_window=5, norm_eps=1e-6)),
    "mistral-v0.2": dict(template="mistral", text=dict(rope_theta=1e6)),
    "mistral-stretched": dict(template="mistral", text=dict(sliding_window=5, rope_scaling=LLAMA3)),
    "qwen2": dict(template="vicuna", text=dict(qkv_bias=True)),
    "qwen2-window": dict(template="vicuna", text=dict(qkv_bias=True, sliding_window=5, tie_embeddings=True)),
    "qwen3": dict(template="vicuna", text=dict(qk_norm=True, head_dim=8, tie_embeddings=True)),
    "mixtral": dict(template="mistral", text=dict(n_experts=5, top_k=3)),
    "mixtral-window": dict(template="mistral", text=dict(n_experts=4, sliding_window=5)),
    "own-template": dict(template="tiny"),
}
KNOWN = dict(start_token=1, end_tokens=[2], max_positions=128)                     # or else an export adds what its tokenizer knows
for kw in TEXTS.values():
    kw["text"] = KNOWN | kw.get("text", {})
SIGHTS = {
    "dense": {},
    "experts": dict(vision=dict(n_experts=4, scales=[1, 2]), connector=dict(n_experts=4)),
    "one-of-three": dict(vision=dict(n_experts=3, top_k=1, renormalise=True), connector=dict(n_experts=3, top_k=1, renormalise=True)),
    "connector-only": dict(connector=dict(n_experts=2), vision=dict(scales=[1, 3], select_layer=-1)),
    "tower-only": dict(vision=dict(n_experts=4, act="gelu", norm_eps=1e-6), balance_coef=0.5, z_coef=0.25),
}


def there_and_back(model, folder, layout):
    save(model, folder, words(), layout=layout)
    again, tokenizer = load(folder)
    assert (tokenizer is None) == (layout == "hf-clip") and not again.training
    return again


def words():
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2, "red": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("layout", ["own", "hf-llm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_decoder_comes_back_bit_for_bit(tiny_model, kind, dtype, layout, tmp_path):
    model = tiny_model(vision=None, **TEXTS[kind]).to(dtype)
    again = there_and_back(model, tmp_path, layout)
    assert again.config == model.config and same(again, model)


@pytest.mark.parametrize("layout", ["own", "cumo"])
@pytest.mark.parametrize("sight, kind", [("experts", kind) for kind in TEXTS] + [(sight, "mistral") for sight in SIGHTS])
def test_a_whole_model_comes_back_bit_for_bit(tiny_model, sight, kind, layout, tmp_path):
    model = tiny_model(**SIGHTS[sight], **TEXTS[kind])
    if layout == "cumo" and kind.startswith("qwen"):
        with pytest.raises(ValueError, match="QKV bias"):
            save(model, tmp_path / "out", layout=layout)
        assert not (tmp_path / "out").exists()
        return
    again = there_and_back(model, tmp_path, layout)
    assert again.config == model.config and same(again, model)
    assert same(there_and_back(again, tmp_path / "twice", layout), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tower_and_a_decoder_come_out_of_a_whole_model_bit_for_bit(tiny_model, dtype, tmp_path):
    model = tiny_model(**TEXTS["mistral"]).to(dtype)
    tower, decoder = there_and_back(model, tmp_path / "clip", "hf-clip"), there_and_back(model, tmp_path / "llm", "hf-llm")
    assert same(tower, model.vision) and tower.config == model.config.vision
    assert same(decoder.text, model.text) and decoder.config == dataclasses.replace(model.config, vision=None)
    again = there_and_back(tower, tmp_path / "again", "hf-clip")
    assert same(again, tower) and again.config == tower.config


@pytest.mark.parametrize("name", [*DECODERS, "llava"])
def test_a_foreign_model_comes_back_bit_for_bit_from_every_layout_that_can_hold_it(hf, name, tmp_path):
    model = load(store(hf(name).model, tmp_path / "theirs", STORES[0]))[0]
    vars(model.config.text).update(start_token=1, end_tokens=[2])                  # Qwen2's class does not say
    for layout in ("own", "cumo") if name == "llava" else ("own", "hf-llm"):
        again = there_and_back(model, tmp_path / layout, layout)
        assert again.config == model.config and same(again, model)


@pytest.mark.parametrize("kw, layout, words", [
    (dict(text=dict(n_experts=[4, 0])), "hf-llm", "some layers only"), (dict(text=dict(n_experts=4, qkv_bias=True)), "hf-llm", "QKV bias"),
    (dict(text=dict(n_experts=4, capacity_factor=1.5)), "hf-llm", "capacity"), (dict(vision=dict(n_experts=4)), "hf-clip", "experts"),
    (dict(vision=dict(n_experts=4), connector=dict(n_experts=2)), "cumo", "one number of experts"),
    (dict(vision=dict(n_experts=[4, 0, 4])), "cumo", "one number of experts"), (dict(connector=dict(act="silu")), "cumo", "silu"),
    (dict(vision=dict(n_experts=4, top_k=1), connector=dict(n_experts=4)), "cumo", "top-k"),
    (dict(connector=dict(n_experts=4, top_k=1)), "cumo", "top_k = 1 without rescaling"),
    (dict(text=dict(n_experts=4, top_k=1)), "hf-llm", "top_k = 1 without rescaling"),
    (dict(text=dict(n_experts=4, qk_norm=True)), "hf-llm", "norms on queries"), (dict(text=dict(qk_norm=True)), "moe-llava", "LLaMA or Mistral"),
    (dict(text=dict(qk_norm=True, qkv_bias=True)), "hf-llm", "more than one"),
    (dict(vision=SIGLIP), "cumo", "a SigLIP tower or a pixel shuffle"), (dict(vision=SIGLIP), "moe-llava", "a SigLIP tower"),
    (dict(connector=dict(pixel_shuffle=2)), "cumo", "pixel shuffle"), (dict(vision=dict(pre_norm=False)), "hf-clip", "neither"),
    (dict(vision=None), "cumo", "no tower"), (dict(vision=None), "hf-clip", "no tower"), ({}, "gguf", "unknown layout"),
    (dict(vision=None), "hf-llava", "no tower.*hf-llm"), ({}, "hf-llava", "<image> must be a token.*--tokenizer"),
    (dict(connector=dict(n_experts=4)), "hf-llava", "has experts; write it as cumo or moe-llava, or as hf-llava the dense model of stage 2"),
    (dict(text=dict(n_experts=[4, 0])), "hf-llava", "has experts"), (dict(vision=dict(scales=[1, 2])), "hf-llava", "scale 1 only.*as cumo"),
    (dict(audio=dict(n_mels=5, n_frames=12, dim=16, n_layers=1, n_heads=2, ffn_dim=24)), "hf-llava", "no place for an ear")])
def test_what_a_layout_cannot_hold_is_refused_and_nothing_is_written(tiny_model, kw, layout, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save(tiny_model(**kw), tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_transformers_reads_the_decoder_that_is_written(hf, tiny_model, kind, dtype, tmp_path):
    t = sys.modules["transformers"] if hf("llama") else None
    model = tiny_model(**TEXTS[kind]).to(dtype)
    save(model, tmp_path, words(), layout="hf-llm")
    theirs, report = t.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report                                        # nothing missing, left over or of a wrong shape
    expected = next((name for name in ("mixtral", "qwen2", "qwen3", "mistral") if kind.startswith(name)), "llama")
    assert theirs.config.model_type == expected and theirs.dtype == dtype
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    ids = torch.randint(0, 40, (2, 40))
    assert (model.float()(ids).logits - theirs.float()(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_transformers_reads_the_tower_that_is_written(hf, tiny_model, act, tmp_path):
    t = sys.modules["transformers"] if hf("clip-vision") else None
    model = tiny_model(vision=dict(act=act, norm_eps=1e-6))
    save(model, tmp_path, layout="hf-clip")
    theirs, report = t.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all("post_layernorm" in name for name in report.pop("missing_keys")) and not any(report.values())
    images = torch.randn(2, 3, 16, 16)
    hidden = theirs.eval()(images, output_hidden_states=True).hidden_states
    for select in (-1, -2, -3, -4):
        model.vision.config.select_layer = select
        assert (model.vision(images) - hidden[select][:, 1:]).abs().max() < 1e-4


@pytest.mark.parametrize("kind, n_words", [("llama3", 40), ("mistral", 40), ("qwen2", 5)])
@torch.no_grad()
def test_transformers_reads_the_llava_that_is_written(hf, tiny_model, kind, n_words, tmp_path):
    """With 40 words, as many as the embedding has rows, it grows by one for <image>; with 5 it has a row to spare."""
    t = sys.modules["transformers"] if hf("llava") else None
    model = tiny_model(vision=dict(act="gelu", norm_eps=1e-6, select_layer=-1), connector=dict(act="silu"), **TEXTS[kind])
    tokenizer = words()
    tokenizer.add_tokens([f"word{i}" for i in range(n_words - 4)])
    save(model, tmp_path, tokenizer, layout="hf-llava")
    theirs, report = t.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report                                        # nothing missing, left over or of a wrong shape
    assert theirs.config.image_token_id == n_words and len(theirs.get_input_embeddings().weight) == max(40, n_words + 1)
    assert tokenizer.token_to_id("<image>") is None                                # the caller's own is left alone
    tokens, images = torch.randint(6, 40, (1, 12)), torch.randn(1, 3, 16, 16)
    tokens[:, 2:6] = IMAGE
    asked = dict(input_ids=torch.where(tokens == IMAGE, n_words, tokens), pixel_values=images)
    want, ours = theirs.eval()(**asked).logits, model(tokens, images).logits
    assert ours.abs().max() > 1 and (want[..., :40] - ours).abs().max() < 1e-4
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    said = theirs.generate(**asked, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    assert torch.equal(said[:, 12:], model.generate(tokens, images, max_new_tokens=12))

    # It comes back, and a second time nothing is added.
    again, marked = load(tmp_path)
    assert (again(tokens, images).logits - want).abs().max() < 1e-4 and again.config.template == model.config.template
    save(again, tmp_path / "twice", marked, layout="hf-llava")
    assert same(load(tmp_path / "twice")[0], again)


@pytest.mark.parametrize("saved, aspect", [
    (dict(preprocessor_config=dict(do_pad=False), processor_config=dict(image_processor=dict(do_pad=True))), "pad"),
    (dict(processor_config=dict(patch_size=14)), "pad"), (dict(preprocessor_config=dict(do_pad=False), processor_config=dict(patch_size=14)), "crop"),
    (dict(preprocessor_config=dict(size=dict(height=16, width=16), do_center_crop=False)), "stretch"),
    (dict(preprocessor_config=dict(size=dict(shortest_edge=16))), "crop")])
def test_the_newer_of_two_preprocessors_counts_and_height_and_width_stretch(hf, tmp_path, saved, aspect):
    folder = store(hf("llava").model, tmp_path / "m", STORES[0]) or tmp_path / "m"
    for name, content in saved.items():
        (tmp_path / "m" / f"{name}.json").write_text(json.dumps(content))
    assert load(folder)[0].config.vision.image_aspect == aspect


def test_a_tied_head_may_be_stored_again_but_not_another_one(hf, tmp_path):
    t = sys.modules["transformers"] if hf("llava") else None
    model = loud(t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)))
    for extra, fits in ((0.0, True), (1.0, False)):
        folder = tmp_path / str(fits)
        model.save_pretrained(folder)
        tensors = read(folder)
        head = tensors["model.embed_tokens.weight"] + extra
        write(folder, tensors | {"lm_head.weight": head}, "safetensors")
        if fits:
            assert load(folder)[0].text.head is None
            continue
        with pytest.raises(ValueError, match="config.json ties the head to the embedding, but lm_head.weight is another tensor"):
            load(folder)
        edit_json(folder / "config.json", lambda cfg: cfg.update(tie_word_embeddings=False))
        assert torch.equal(load(folder)[0].text.head.weight, head)


def test_adapters_alone_are_refused_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    config = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "architectures": ["LlavaLlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.safetensors: missing; adapters, or a connector alone, must first be merged"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for _ in range(2):                                                             # with a config.json and without
        with pytest.raises(ValueError, match="adapters alone .*merge_and_unload"):
            load(tmp_path)
        (tmp_path / "config.json").unlink(missing_ok=True)


def test_a_template_without_questions_is_no_chat_template(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="template plain leaves questions out.*--template"):
        save(tiny_model(template="plain"), tmp_path / "o", words(), layout="hf-llava")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("template, aspect", [("vicuna", "pad"), ("mistral", "crop"), ("chatml", "pad"), ("llama3", "pad")])
def test_transformers_processor_makes_our_prompts_and_pictures(hf, tiny_model, template, aspect, tmp_path):
    t = sys.modules["transformers"] if hf("llava") else None
    tokenizer = chat_tokenizer(["<s>", "</s>", *data.TEMPLATES[template].tokens])
    if not data.TEMPLATES[template].spelled_out:                                   # as LLaMA's
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    model = tiny_model(vision=dict(image_mean=HALF, image_std=[0.25, 0.5, 0.5], image_aspect=aspect), template=template, text=dict(vocab_size=300))
    save(model, tmp_path, tokenizer, layout="hf-llava")
    processor = t.AutoProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    human, answer = ["What is it?", " And now? "], "A ring."
    content = [[{"type": "text", "text": human[0]}, {"type": "image", "image": image}], answer, human[1]]
    chat = [{"role": role, "content": said if isinstance(said, list) else [{"type": "text", "text": said}]}
            for role, said in zip(("user", "assistant", "user"), content)]
    theirs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    turns = [{"from": "human", "value": f"<image>\n{human[0]}"}, {"from": "gpt", "value": answer}, {"from": "human", "value": human[1]}]
    ids, _ = data.encode_chat(turns, tokenizer, template, model.config.n_image_tokens)
    mark = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert theirs["input_ids"][0].tolist() == [mark if token == IMAGE else token for token in ids]
    assert (theirs["pixel_values"][0] - data.load_image(image, data.picture_format(model.config.vision))).abs().max() < 1e-5
    with pytest.raises(Exception, match="the system prompt is the model's own"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])


def test_a_chat_template_keeps_words_of_a_layout_that_it_has_itself(monkeypatch):
    jinja2 = pytest.importorskip("jinja2")
    form = data.Template("FIRST: {text} ANSWER:", "LATER: {text} ANSWER:", " {text}", "</s>")
    monkeypatch.setitem(data.TEMPLATES, "words", form)
    filled = jinja2.Template(U.chat_template(chat_tokenizer(["<s>", "</s>"]), "words"))
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}, {"role": "user", "content": "and?"}]
    assert filled.render(messages=chat).endswith("FIRST: why? ANSWER: so.</s>LATER: and? ANSWER:")


def test_the_tower_of_a_siglip_llava_is_read_again_without_the_norm_that_llava_leaves_out(hf, tmp_path):
    reference = hf("llava-siglip")
    store(reference.model, tmp_path / "llava", STORES[0])
    whole = load(tmp_path / "llava")[0]
    save(whole, tmp_path / "tower", layout="hf-clip")
    tower = load(tmp_path / "tower")[0]
    assert not tower.config.post_norm and not whole.config.vision.post_norm and same(tower, whole.vision)


def test_a_decoder_brings_its_losses_weights_along(tiny_model, tmp_path):
    model = tiny_model(vision=None, text=dict(n_experts=4, aux="sum", vocab_size=300), balance_coef=0.01, z_coef=0.0)
    save(model, tmp_path / "llm", chat_tokenizer(["<s>", "</s>"]))
    save(tiny_model(), tmp_path / "clip", layout="hf-clip")
    config = U.assemble(str(tmp_path / "clip"), str(tmp_path / "llm"), None, [1], seed=0)[0].config
    assert (config.balance_coef, config.z_coef, config.text.aux) == (0.01, 0.0, "sum")


@pytest.mark.parametrize("text, words", [(dict(aux="sum"), "MoE-LLaVA's gate"), (dict(noisy=True), "MoE-LLaVA's gate")])
def test_a_gate_that_mixtral_has_not_is_refused(tiny_model, tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        save(tiny_model(text=dict(n_experts=4, **text)), tmp_path / "m", layout="hf-llm")


@torch.no_grad()
def test_llava_becomes_the_published_cumo_layout(hf, tmp_path, capsys):
    reference = hf("llava")
    store(reference.model, tmp_path / "llava", STORES[0])
    main(["--from", str(tmp_path / "llava"), "--to", "cumo", "--out", str(tmp_path / "cumo")])
    names, theirs = read(tmp_path / "cumo"), reference.model.state_dict()
    for published, name in (("model.mm_projector.2.weight", "model.multi_modal_projector.linear_2.weight"),
                            ("model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
                            ("model.vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias")):
        assert torch.equal(names[published], theirs[name])
    assert len(names) == len(theirs) - 2                                           # post_layernorm
    reference.check(load(tmp_path / "cumo")[0])


# ---------------------------------------------------------------------------------------------------------------------
# How a model wants its pictures

HALF = [0.5, 0.5, 0.5]
NORMAL = U.preprocessor_json(VisionConfig(image_mean=HALF, image_std=[0.25, 0.5, 0.5]))


def looks(vision):
    return vision.image_aspect, vision.image_mean, vision.image_std


CLIPS = looks(VisionConfig())


def llava_folder(hf, folder, aspect=None, preprocessor=None, file="preprocessor_config.json"):
    """LLaVA as it was first published, whose config.json says this about pictures."""
    tower, connector, decoder, described = first_llava(hf("llava").model, folder / "tower")
    described.pop("image_aspect_ratio")
    described |= {"image_aspect_ratio": aspect} if aspect else {}
    write(folder, tower | connector | decoder, "safetensors", described)
    if preprocessor:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.parametrize("aspect, ours", [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_image_aspect_ratio_says_whether_pictures_are_padded_or_cropped(hf, aspect, ours, tmp_path):
    assert looks(load(llava_folder(hf, tmp_path, aspect))[0].config.vision) == (ours, *CLIPS[1:])


@pytest.mark.parametrize("aspect, preprocessor, words", [
    ("anyres", None, "image_aspect_ratio 'anyres'"), ("pad", dict(resample=1), "resample = 1"), ("pad", dict(do_normalize=False), "do_normalize"),
    ("square", dict(do_center_crop=False), "do_center_crop"), ("square", dict(size=dict(shortest_edge=40), crop_size=28), "one size for both"),
    ("square", dict(size=dict(longest_edge=28), crop_size=28), "one size for both"), ("pad", dict(image_std=[0, 1, 1]), "vision.image_std"),
    ("pad", dict(image_mean=0.5), "vision.image_mean"), ("pad", dict(image_mean=["a", 1, 1]), "vision.image_mean")])
def test_pictures_of_another_make_are_refused_by_name(hf, aspect, preprocessor, words, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        load(llava_folder(hf, tmp_path, aspect, preprocessor))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tower/preprocessor_config.json"])
def test_mean_and_deviation_come_from_the_preprocessor_of_the_folder_or_of_its_tower(hf, file, tmp_path):
    model, _ = load(llava_folder(hf, tmp_path, "pad", NORMAL, file))
    assert looks(model.config.vision) == ("pad", HALF, [0.25, 0.5, 0.5])


@pytest.mark.parametrize("said, ours", [(None, "pad"), (dict(), "crop"), (dict(do_pad=True), "pad"), (dict(do_pad=False), "crop")])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_transformers_llava_crops_unless_its_preprocessor_pads(hf, said, ours, file, tmp_path):
    store(hf("llava").model, tmp_path, STORES[0])
    if said is not None:
        described = NORMAL | said
        (tmp_path / file).write_text(json.dumps(described if file[:3] == "pre" else {"image_processor": described}))
    assert looks(load(tmp_path)[0].config.vision) == (ours, *(CLIPS[1:] if said is None else (HALF, [0.25, 0.5, 0.5])))


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("layout", ["own", "cumo", "moe-llava"])
def test_how_a_model_wants_its_pictures_comes_back_from_every_layout(tiny_model, layout, aspect, tmp_path):
    moe = dict(n_experts=[4, 0], aux="sum", capacity_factor=1.5, eval_capacity_factor=2.0) if layout == "moe-llava" else {}
    model = tiny_model(vision=dict(image_mean=HALF, image_std=[0.25, 0.5, 0.5], image_aspect=aspect), text=moe, template="vicuna",
                       z_coef=0.0)
    assert looks(there_and_back(model, tmp_path, layout).config.vision) == (aspect, HALF, [0.25, 0.5, 0.5])
    if layout != "own":
        assert json.loads((tmp_path / "config.json").read_text())["image_aspect_ratio"] == ("pad" if aspect == "pad" else "square")


def test_a_tower_brings_its_mean_along_and_transformers_reads_its_preprocessor(hf, tiny_model, tmp_path):
    t = sys.modules["transformers"] if hf("clip") else None
    model = tiny_model(vision=dict(image_mean=HALF, image_std=HALF, image_aspect="crop"), template="mistral")
    save(model, tmp_path / "clip", layout="hf-clip")
    save(model, tmp_path / "llm", words(), layout="hf-llm")
    assembled, _ = assemble(str(tmp_path / "clip"), str(tmp_path / "llm"))
    assert looks(assembled.config.vision) == ("pad", HALF, HALF)                   # new models pad, as CuMo's recipe does
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    theirs = t.CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")(image, return_tensors="pt").pixel_values[0]
    assert (data.load_image(image, data.picture_format(model.config.vision)) - theirs).abs().max() < 1e-5


def test_folders_from_before_these_fields_load_on_as_clip_and_padded(tiny_model, tmp_path):
    save(tiny_model(), tmp_path)

    def older(cfg):
        for name in ("image_mean", "image_std", "image_aspect", "image_filter", "n_prefix_tokens", "pre_norm", "patch_bias", "post_norm"):
            del cfg["vision"][name]
        del cfg["connector"]["pixel_shuffle"], cfg["text"]["qk_norm"]
    edit_json(tmp_path / "config.json", older)
    assert looks(load(tmp_path)[0].config.vision) == CLIPS == ("pad", list(data.CLIP_MEAN), list(data.CLIP_STD))


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP


@pytest.mark.parametrize("name", ["siglip", "siglip-vision"])
@torch.no_grad()
def test_siglips_features_are_those_of_transformers_behind_the_last_norm(hf, name, tmp_path):
    reference = hf(name)
    model = load(store(reference.model, tmp_path, STORES[0]))[0]
    assert isinstance(model, VisionTransformer) and looks(model.config) == ("stretch", HALF, HALF) and model.config.n_heads == 4
    tower = reference.model.vision_model if name == "siglip" else reference.model
    theirs = tower(reference.images, output_hidden_states=True)
    assert theirs.last_hidden_state.shape == (2, 16, 32) and theirs.last_hidden_state.abs().max() > 1
    assert (model(reference.images) - theirs.last_hidden_state).abs().max() < 1e-4
    model.post_norm = torch.nn.Identity()                        # LLaVA-OneVision's choice
    model.config.select_layer = -2
    assert (model(reference.images) - theirs.hidden_states[-2]).abs().max() < 1e-4


def test_a_siglip_config_that_names_nothing_is_base_patch16s(hf, tmp_path):
    """google/siglip-base-patch16-224's config.json says hardly more than its class."""
    tensors = {f"vision_model.{name}": t for name, t in hf("siglip-vision").model.state_dict().items()}
    wide = {name: t.repeat(*[2 if size in (32, 96) else 1 for size in t.shape]) for name, t in tensors.items()}
    theirs = dict(model_type="siglip", vision_config=dict(model_type="siglip_vision_model", num_attention_heads=8))
    vision = load(write(tmp_path, wide, "safetensors", theirs))[0].config
    default = sys.modules["transformers"].SiglipVisionConfig()
    assert (vision.act, vision.norm_eps) == (default.hidden_act, default.layer_norm_eps)
    assert (vision.dim, vision.side, vision.ffn_dim, vision.n_layers) == (64, 4, 64, 3)


@pytest.mark.parametrize("theirs, words", [
    (dict(model_type="siglip2", architectures=["Siglip2Model"]), "Siglip2Model is not supported; .*SiglipVisionModel"),
    (dict(model_type="dinov2"), "dinov2 is not supported; .*SiglipModel"),
    (dict(model_type="llava", vision_config=dict(model_type="siglip2_vision_model"), text_config={}, vision_feature_select_strategy="full"),
     "siglip2_vision_model is not supported; supported: CLIPVisionModel, SiglipVisionModel"),
    (dict(model_type="llava", mm_vision_tower=""), "how many heads")])
def test_towers_of_another_make_are_refused_in_one_line(hf, theirs, words, tmp_path):
    tensors = {f"vision_tower.{name}": t for name, t in hf("siglip-vision").model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as e:
        load(write(tmp_path, tensors, "safetensors", theirs))
    assert "\n" not in str(e.value)


def test_a_llava_with_siglip_and_qwen3_says_what_transformers_says(hf, tmp_path):
    reference = hf("llava-siglip")
    model = load(store(reference.model, tmp_path, STORES[0]))[0]
    assert (model.config.vision.post_norm, model.config.vision.image_aspect) == (False, "stretch")
    reference.check(model)
    edit_json(tmp_path / "config.json", lambda cfg: cfg.update(vision_feature_select_strategy="default"))
    with pytest.raises(ValueError, match="only patch features"):    # it would drop a patch
        load(tmp_path)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@torch.no_grad()
def test_transformers_reads_the_siglip_tower_that_is_written_and_its_preprocessor(hf, tiny_model, filter, tmp_path):
    t = sys.modules["transformers"] if hf("siglip-vision") else None
    model = tiny_model(vision=SIGLIP | dict(image_filter=filter))
    again = there_and_back(model, tmp_path, "hf-clip")
    assert again.config == model.config.vision and same(again, model.vision)
    theirs, report = t.SiglipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = t.SiglipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    ours = data.load_image(image, data.picture_format(model.config.vision))
    assert (ours - pixels[0]).abs().max() < 1e-5
    assert (model.vision(ours[None]) - theirs.eval()(pixels).last_hidden_state).abs().max() < 1e-4


def test_siglip_and_qwen3_are_upcycled_without_a_change_then_trained_saved_and_loaded(hf, tmp_path):
    folders = [str(store(hf(name).model, tmp_path / name, STORES[0])) for name in ("siglip-vision", "qwen3")]
    model, _ = assemble(*folders, scales=(1, 2), pixel_shuffle=2)
    assert model.config.n_image_tokens == 4 and model.config.vision.scales == [1, 2]
    tokens, images = torch.tensor([[5, *[IMAGE] * 4, 6, 7, 8]]), torch.randn(1, 3, 30, 30)
    before = model(tokens, images).logits
    U.upcycle(model, vision=4, connector=4)
    assert (model(tokens, images).logits - before).abs().max() < 1e-4

    choose_trainable(model, ("vision", "connector", "text"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(tokens, images, labels=tokens.clamp(min=0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())      # DDP insists on it
    optimizer.step()
    assert (model.eval()(tokens, images).logits - before).abs().max() > 1e-3
    again = there_and_back(model, tmp_path / "own", "own")
    assert again.config == model.config and same(again, model)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-1.5 as it was first published, and what CuMo's stages leave


def first_llava(model, tower="", **more):
    """transformers' LLaVA -> (tower, connector, decoder: the tensors under liuhaotian's names; config.json)."""
    parts = {}, {}, {}
    for name, t in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            parts[0][name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")] = t
        elif name.startswith("model.multi_modal_projector.linear_"):
            parts[1][f"model.mm_projector.{ {'1': 0, '2': 2}[name[35]]}.{name.rsplit('.')[-1]}"] = t
        else:
            parts[2][name.replace("model.language_model.", "model.")] = t
    return *parts, dict(
        SMALL, architectures=["LlavaLlamaForCausalLM"], model_type="llava", hidden_act="silu", rms_norm_eps=1e-6, rope_scaling=None,
        tie_word_embeddings=False, torch_dtype="float32", max_position_embeddings=2048, pretraining_tp=1, image_aspect_ratio="pad",
        mm_hidden_size=128, mm_projector_type="mlp2x_gelu", mm_use_im_patch_token=False, mm_use_im_start_end=False, use_mm_proj=True,
        mm_vision_select_feature="patch", mm_vision_select_layer=-2, mm_vision_tower=str(tower), tune_mm_mlp_adapter=False, **more)


def stage_outputs(model):
    """(clip.bin, mm_projector.bin) as CuMo's stages write them."""
    tower, connector, *_ = first_llava(model)
    return {name.replace("model.vision_tower.vision_tower.", ""): t for name, t in tower.items()}, connector


@pytest.fixture
def clip_folder(hf, tmp_path):
    """The tower of `hf("llava")` as a CLIPModel's folder: its text half is there too."""
    reference, tower = hf("clip"), hf("llava").model.model.vision_tower
    store(reference.model, tmp_path / "clip", STORES[0])
    tensors = {name: t for name, t in read(tmp_path / "clip").items() if not name.startswith("vision_model.")}
    tensors |= {f"vision_model.{name}": t for name, t in tower.state_dict().items()}
    edit_json(tmp_path / "clip" / "config.json", lambda cfg: cfg.update(vision_config=tower.config.to_dict()))
    return write(tmp_path / "clip", tensors, "safetensors")


@pytest.mark.parametrize("storage", ["bin shards", "safetensors"])
@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_the_first_llava_layout_is_understood(hf, kind, storage, tmp_path):
    tower, connector, decoder, config = first_llava(hf("llava").model, "openai/clip-vit-large-patch14-336")
    model = load(write(tmp_path, tower | connector | decoder, storage, {**config, "model_type": kind}))[0]
    assert model.config.template == "vicuna"
    hf("llava").check(model)


def test_a_llava_without_its_tower_takes_the_one_that_mm_vision_tower_names(hf, clip_folder, tmp_path):
    _, connector, decoder, config = first_llava(hf("llava").model, clip_folder)
    hf("llava").check(load(write(tmp_path / "llava", connector | decoder, "bin shards", config))[0])


def test_a_tower_may_come_from_the_hub(hf, clip_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.append(name) or str(clip_folder))
    _, connector, decoder, config = first_llava(hf("llava").model, "openai/clip-vit-large-patch14-336")
    hf("llava").check(load(write(tmp_path / "llava", connector | decoder, "bin", config))[0])
    assert set(asked) == {"openai/clip-vit-large-patch14-336"}


def test_transformers_llava_around_a_mistral_is_asked_as_llava_is(hf, tmp_path):
    t = sys.modules["transformers"] if hf("llava") else None
    cfg = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**EYE), text_config=t.MistralConfig(**SMALL), image_token_index=HF_IMAGE)
    store(loud(t.LlavaForConditionalGeneration(cfg)), tmp_path / "m", STORES[0])
    assert load(tmp_path / "m")[0].config.template == "vicuna"


@pytest.mark.parametrize("from_the_hub", ["", "somebody/clip", "laion/clip"])
def test_a_narrow_headed_towers_sizes_come_from_mm_vision_tower(hf, tmp_path, monkeypatch, from_the_hub):
    t = sys.modules["transformers"] if hf("llava") else None
    eye = t.CLIPVisionConfig(**EYE)                                                # heads 8 wide
    cfg = t.LlavaConfig(vision_config=eye, text_config=t.LlamaConfig(**SMALL), image_token_index=HF_IMAGE)
    model = loud(t.LlavaForConditionalGeneration(cfg))
    tower, connector, decoder, config = first_llava(model, from_the_hub or tmp_path / "clip")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps(eye.to_dict()))
    if from_the_hub:
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: str(tmp_path / "clip"))
    if from_the_hub == "somebody/clip":                                            # the weights are there alone, too
        write(tmp_path / "clip", {f"vision_model.{name}": w for name, w in model.model.vision_tower.state_dict().items()}, "safetensors")
        tower = {}
    ours, reference = load(write(tmp_path / "llava", tower | connector | decoder, "safetensors", config))[0], hf("llava")
    theirs = reference.ask(model, n_new=0)[0]
    assert (ours(reference.tokens, reference.images).logits[0][:len(theirs[0])] - theirs[0]).abs().max() < 1e-4


def test_cumos_stage_outputs_beside_config_json_are_found(hf, tmp_path):
    _, _, decoder, config = first_llava(hf("llava").model, "openai/clip-vit-large-patch14-336")
    write(tmp_path, decoder, "safetensors", config)
    for file, tensors in zip(("clip.bin", "mm_projector.bin"), stage_outputs(hf("llava").model)):
        torch.save(tensors, tmp_path / file)
    hf("llava").check(load(tmp_path)[0])


def test_cumos_stage_outputs_are_assembled(hf, tmp_path, capsys):
    _, _, decoder, _ = first_llava(hf("llava").model)
    write(tmp_path / "llm", decoder, "safetensors", hf("llama").model.config.to_dict())
    for file, tensors in zip(("clip.bin", "mm_projector.bin"), stage_outputs(hf("llava").model)):
        torch.save(tensors, tmp_path / file)
    model, _ = assemble(str(tmp_path / "clip.bin"), str(tmp_path / "llm"), str(tmp_path / "mm_projector.bin"))
    hf("llava").check(model)
    main(["--vision", str(tmp_path / "clip.bin"), "--llm", str(tmp_path / "llm"), "--connector", str(tmp_path / "mm_projector.bin"),
          "--out", str(tmp_path / "out")])
    assert same(load(tmp_path / "out")[0], model)


@torch.no_grad()
def test_a_connector_with_experts_is_taken_over(tiny_model, tmp_path):
    model = tiny_model(vision=dict(scales=[1, 3]), connector=dict(n_experts=4), template="mistral")
    save(model, tmp_path / "clip", layout="hf-clip")
    save(model, tmp_path / "llm", layout="hf-llm")
    torch.save({name: t for name, t in U.published(model.state_dict()).items() if "mm_projector" in name}, tmp_path / "mm_projector.bin")
    again, _ = assemble(str(tmp_path / "clip"), str(tmp_path / "llm"), str(tmp_path / "mm_projector.bin"), [1, 3])
    assert again.config == model.config and same(again, model)
    images, tokens = torch.randn(1, 3, 16, 16), torch.tensor([[3] + [IMAGE] * 4 + [5, 6]])
    assert torch.equal(again(tokens, images).logits, model(tokens, images).logits)


@torch.no_grad()
def test_parts_stored_in_different_dtypes_run_together(tiny_model, tmp_path):
    """CLIP is published in float32, language models in bfloat16, and LLaVA's connectors in float16."""
    model, images, tokens = tiny_model(template="vicuna"), torch.randn(1, 3, 16, 16), torch.tensor([[3] + [IMAGE] * 4 + [5, 6]])
    want = model(tokens, images).logits
    save(model, tmp_path / "clip", layout="hf-clip")
    save(copy.deepcopy(model).bfloat16(), tmp_path / "llm", layout="hf-llm")
    connector = {name: t.half() for name, t in U.published(model.state_dict()).items() if "mm_projector" in name}
    torch.save(connector, tmp_path / "mm_projector.bin")
    mixed, _ = assemble(str(tmp_path / "clip"), str(tmp_path / "llm"), str(tmp_path / "mm_projector.bin"))
    fresh, _ = assemble(str(tmp_path / "clip"), str(tmp_path / "llm"))
    decoder = {name: t.half() for name, t in U.published({k: v for k, v in model.state_dict().items() if k.startswith("text.")}).items()}
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    config |= dict(model_type="llava", mm_vision_tower=str(tmp_path / "clip"))
    apart = load(write(tmp_path / "llava", connector | decoder, "bin", config))[0]
    for m in (mixed, apart):
        assert (m(tokens, images).logits.float() - want).abs().max() < 0.1 * want.abs().max()
    assert fresh(tokens, images).logits.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def parts(tiny_model, tmp_path):
    """A CLIP folder, an LLM folder with a tokenizer, and the model that they are the parts of."""
    model = tiny_model(template="mistral", text=KNOWN)
    save(model, tmp_path / "clip", layout="hf-clip")
    save(model, tmp_path / "llm", words(), layout="hf-llm")
    return model


def test_a_tower_and_a_decoder_become_a_model_for_stage_1(parts, tmp_path, capsys):
    common = ["--vision", str(tmp_path / "clip"), "--llm", str(tmp_path / "llm"), "--scales", "1,3"]
    main([*common, "--out", str(tmp_path / "a")])
    torch.manual_seed(5)                                                           # the global generator has no say in the new connector
    main([*common, "--out", str(tmp_path / "b"), "--template", "vicuna", "--dtype", "bfloat16"])
    main([*common, "--out", str(tmp_path / "c"), "--seed", "1"])
    (a, tokenizer), (b, _), (c, _) = (load(tmp_path / name) for name in "abc")
    assert tokenizer.to_str() == words().to_str()
    assert same(a.vision, parts.vision) and same(a.text, parts.text)
    assert a.config.vision == dataclasses.replace(parts.config.vision, scales=[1, 3]) and a.config.text == parts.config.text
    assert (a.config.template, b.config.template) == ("mistral", "vicuna") and a.connector.ffn.w_in.shape == (16, 32)
    fresh = a.connector.ffn
    assert fresh.w_in.std() > 0.01 and not fresh.b_in.any() and not torch.equal(fresh.w_in, c.connector.ffn.w_in)
    assert same(b, a.bfloat16())
    images, tokens = torch.randn(1, 3, 16, 16), torch.tensor([[3] + [IMAGE] * 4 + [5, 6]])
    assert load(tmp_path / "c")[0](tokens, images).logits.isfinite().all()


@pytest.mark.parametrize("kw", [
    dict(vision=dict(n_experts=4), connector=dict(n_experts=4), text=dict(n_experts=5)), {}, dict(text=dict(tie_embeddings=True))],
    ids=["experts", "dense", "tied"])
def test_the_table_shows_where_every_tensor_goes(tiny_model, kw, tmp_path, capsys):
    model = tiny_model(**kw)
    save(model, tmp_path / "cumo", layout="cumo")
    theirs = {**read(tmp_path / "cumo"), "model.vision_tower.vision_model.post_layernorm.weight": torch.ones(16)}      # ignored: no line
    write(tmp_path / "cumo", theirs, "safetensors")
    main(["--from", str(tmp_path / "cumo"), "--out", str(tmp_path / "own")])
    rows = [re.fullmatch(r"(\S+) +-> +(\S+) +(\d+(?: x \d+)*) +float32(?:  \((\d+) of them\))?", line)
            for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert all(rows)
    mask = lambda name: re.sub(r"\{[ie]\}", "#", name)
    shown = {}
    for theirs_shown, ours, shape, n in (row.groups() for row in rows):
        shown[mask(theirs_shown)] = shown.get(mask(theirs_shown), 0) + int(n or 1)
    expected = {}
    for name in read(tmp_path / "cumo"):
        if "post_layernorm" not in name:
            masked = re.sub(r"(?<=layers\.)\d+|(?<=experts\.)\d+", "#", name)
            expected[masked] = expected.get(masked, 0) + 1
    assert shown == expected
    ours = {re.sub(r"\[#\]$", "", mask(row[2])) for row in rows}
    assert ours == {re.sub(r"(?<=layers\.)\d+", "#", name) for name in model.state_dict()}
    assert same(load(tmp_path / "own")[0], model)


@pytest.mark.parametrize("layout", ["cumo", "hf-llava", "hf-llm", "hf-clip"])
def test_converting_there_and_back_on_the_command_line(tiny_model, layout, tmp_path, capsys):
    model = tiny_model(template="mistral", text=KNOWN)
    save(model, tmp_path / "own", words())
    main(["--from", str(tmp_path / "own"), "--to", layout, "--out", str(tmp_path / "theirs")])
    written = {"hf-llm": model.text, "hf-clip": model.vision}.get(layout, model)
    assert f"{sum(p.numel() for p in written.parameters()) / 1e6:,.1f}M parameters" in capsys.readouterr().out
    if layout == "hf-clip":
        assert same(load(tmp_path / "theirs")[0], model.vision)
        with pytest.raises(ValueError, match="an encoder alone.*--llm"):
            main(["--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "back")])
        assert not (tmp_path / "back").exists()
        return
    main(["--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "back")])
    again, tokenizer = load(tmp_path / "back")
    marked = words()
    if layout == "hf-llava":
        marked.add_special_tokens(["<image>"])
    assert tokenizer.to_str() == marked.to_str() and same(again.text, model.text)
    assert layout == "hf-llm" or (same(again, model) and again.config == model.config)


def test_a_file_of_backbones_is_converted_like_a_folder(tiny_model, tmp_path, capsys):
    model, file = tiny_model(template="mistral", text=KNOWN), str(tmp_path / "backbones.safetensors")
    U.save_backbones(model, file, words())
    main(["--from", file, "--to", "hf-llm", "--out", str(tmp_path / "llm")])
    assert "text.norm.weight " in capsys.readouterr().out and same(load(tmp_path / "llm")[0].text, model.text)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):                               # of the new connector
        torch.rand(seed + 1)
        main(["--from", file, "--seed", str(seed), "--dtype", "bfloat16", "--out", str(tmp_path / out)])
    (a, tokenizer), (b, _), (c, _) = (load(tmp_path / out) for out in "abc")
    assert same(a, b) and same(a.vision, model.bfloat16().vision) and a.config == model.config and tokenizer.to_str() == words().to_str()
    assert a.connector.ffn.w_in.dtype == torch.bfloat16 and not torch.equal(a.connector.ffn.w_in, c.connector.ffn.w_in)
    fails(["--from", tmp_path / "a/model.safetensors", "--out", tmp_path / "o"], "model.safetensors: cannot be read", "the folder")


def test_a_missing_tokenizer_is_said_and_can_be_given(parts, tmp_path, capsys):
    (tmp_path / "llm" / "tokenizer.json").rename(tmp_path / "t.json")
    main(["--from", str(tmp_path / "llm"), "--out", str(tmp_path / "without")])
    assert "give one with --tokenizer" in capsys.readouterr().out
    main(["--from", str(tmp_path / "llm"), "--out", str(tmp_path / "with"), "--tokenizer", str(tmp_path / "t.json")])
    assert "--tokenizer" not in capsys.readouterr().out and load(tmp_path / "with")[1].to_str() == words().to_str()


# ---------------------------------------------------------------------------------------------------------------------
# Where a decoder's answers end, and what its tokenizer brings along

CHATML_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
JINJA = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def chat_tokenizer(marks):
    """A tokenizer of bytes and these marks. The marks come first, as SmolLM2's do."""
    t = Tokenizer(models.BPE({mark: i for i, mark in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(marks)
    return t


@pytest.fixture
def smollm(hf, tmp_path):
    """A folder as SmolLM2-Instruct's: a LLaMA without </s>, with two ends in generation_config.json, made by transformers."""
    t = sys.modules["transformers"] if hf("llama") else None
    config = t.LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                           max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model = t.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(tmp_path / "smollm")
    theirs = t.PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer(CHATML_MARKS), bos_token="<|im_start|>", eos_token="<|im_end|>",
                                       chat_template=JINJA, model_max_length=96)
    theirs.save_pretrained(tmp_path / "smollm")
    return tmp_path / "smollm"


def test_start_and_end_tokens_beyond_the_embedding_are_refused_with_both_numbers(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "m")
    for name, value in (("end_tokens", [2, 40]), ("start_token", 40)):
        edit_json(tmp_path / "m" / "config.json", lambda cfg: cfg["text"].update(end_tokens=[], start_token=None) or cfg["text"].update({name: value}))
        with pytest.raises(ValueError, match="config.json: text: 40 as a start or end token; the embedding has 40 rows"):
            load(tmp_path / "m")


def test_a_decoder_is_asked_and_ends_as_its_own_files_say(smollm):
    model, tokenizer = load(smollm)
    text = model.config.text
    assert (model.config.template, text.start_token, text.end_tokens, text.max_positions) == ("chatml", 1, [2, 0], 96)
    (smollm / "generation_config.json").unlink()                                   # then config.json counts
    assert load(smollm)[0].config.text.end_tokens == [2]
    for value, ends in ((None, []), ([7, 8], [7, 8])):
        edit_json(smollm / "config.json", lambda cfg: cfg.update(eos_token_id=value))
        assert load(smollm)[0].config.text.end_tokens == ends
    edit_json(smollm / "config.json", lambda cfg: cfg.update(eos_token_id="</s>"))
    with pytest.raises(ValueError, match=r"config.json: text.end_tokens = \['</s>'\] must be a list, each entry a whole number"):
        load(smollm)
    edit_json(smollm / "config.json", lambda cfg: cfg.update(eos_token_id=2, template="tiny"))
    assert load(smollm)[0].config.template == "tiny"                               # our own key in an export tells


def test_parts_and_train_take_the_template_that_the_tokenizer_knows(smollm, tiny_model, tmp_path):
    import train
    save(tiny_model(), tmp_path / "clip", layout="hf-clip")
    main(["--vision", str(tmp_path / "clip"), "--llm", str(smollm), "--out", str(tmp_path / "o")])
    assert load(tmp_path / "o")[0].config.template == "chatml"
    args = train.parse(["--preset", "cumo-1b", "--vision", str(tmp_path / "clip"), "--llm", str(smollm), "--data", "x", "--stage", "1"])
    assert train.load_model(args, train.settings(args, 1), "", None)[0].config.template == "chatml"
    known = chat_tokenizer(["</s>", *CHATML_MARKS])
    known.save(str(smollm / "tokenizer.json"))
    assert train.load_model(args, train.settings(args, 1), "", None)[0].config.template == "vicuna"        # the preset's, where it fits


def test_an_export_keeps_ends_context_and_tokenizer(smollm, tmp_path):
    import transformers
    main(["--from", str(smollm), "--out", str(tmp_path / "own")])
    main(["--from", str(tmp_path / "own"), "--to", "hf-llm", "--out", str(tmp_path / "back")])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    assert (config.bos_token_id, config.max_position_embeddings) == (1, 96)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, [2, 0])
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(f) for f in (tmp_path / "back", smollm))
    assert (ours.eos_token, ours.bos_token, ours.model_max_length, ours.chat_template) == ("<|im_end|>", "<|im_start|>", 96, JINJA)
    chat = [{"role": "user", "content": "Why?"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == theirs.apply_chat_template(chat, add_generation_prompt=True)
    assert load(tmp_path / "back")[0].config == load(smollm)[0].config


@pytest.mark.parametrize("layout", ["hf-llm", "cumo"])
def test_an_export_without_a_source_ends_where_its_template_does(tiny_model, layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = chat_tokenizer(["<unk>", "</s>", "<|end_of_turn|>"])
    save(tiny_model(template="openchat", text=dict(vocab_size=300)), tmp_path, tokenizer, layout=layout)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 2) and "max_position_embeddings" not in config
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|end_of_turn|>" and theirs("Why?").input_ids == tokenizer.encode("Why?").ids


def test_a_tokenizer_beyond_the_embedding_is_refused_when_it_is_loaded_or_given(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "m", words())
    large = words()
    large.add_tokens([f"word{i}" for i in range(40)])
    large.save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"t\.json.*up to 43.*40 rows"):
        main(["--from", str(tmp_path / "m"), "--out", str(tmp_path / "o"), "--tokenizer", str(tmp_path / "t.json")])
    large.save(str(tmp_path / "m" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*up to 43.*40 rows"):
        load(tmp_path / "m")


def test_a_tokenizer_that_is_given_chooses_the_template_too(smollm, tmp_path):
    (smollm / "tokenizer.json").rename(tmp_path / "t.json")
    assert load(smollm)[0].config.template == "vicuna"
    main(["--from", str(smollm), "--out", str(tmp_path / "o"), "--tokenizer", str(tmp_path / "t.json")])
    assert load(tmp_path / "o")[0].config.template == "chatml"


def test_a_template_that_does_not_fit_is_refused_before_anything_is_written(smollm, tmp_path):
    with pytest.raises(ValueError, match="</s>.*--template chatml"):
        main(["--from", str(smollm), "--out", str(tmp_path / "o"), "--template", "vicuna"])
    assert not (tmp_path / "o").exists()


def command(*args):
    """`python upcycle.py ARGS` without a new process -> the exit message, None when all went well."""
    before = sys.argv
    sys.argv = [str(UPCYCLE), *map(str, args)]
    try:
        runpy.run_path(str(UPCYCLE), run_name="__main__")
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before


def fails(args, *words):
    """The command ends with exit status 1, which is what a message for an exit code means, and with one line that holds the words."""
    said = command(*args)
    assert isinstance(said, str) and said.startswith("upcycle.py: ") and "\n" not in said and len(said) < 600, said
    for word in words:
        assert str(word) in said, said
    return said


def test_the_command_as_a_process(parts, tmp_path):
    done = subprocess.run([sys.executable, str(UPCYCLE), "--vision", "clip", "--llm", "llm", "--out", "out"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "->  text.layers.{i}.ffn.w_out" in done.stdout, done
    assert done.stdout.splitlines()[-1].startswith("wrote out (own, ") and same(load(tmp_path / "out")[0].text, parts.text)


def test_a_folder_that_holds_a_model_is_never_written_over(parts, tmp_path):
    before = {file: (tmp_path / "clip" / file).read_bytes() for file in os.listdir(tmp_path / "clip")}
    fails(["--from", tmp_path / "llm", "--to", "hf-llm", "--out", tmp_path / "clip"], tmp_path / "clip", "holds a model already")
    assert before == {file: (tmp_path / "clip" / file).read_bytes() for file in os.listdir(tmp_path / "clip")}


@pytest.mark.parametrize("args, words", [
    ([], "give either --from"), (["--vision", "clip"], "give either --from"), (["--llm", "llm"], "give either --from"),
    (["--from", "llm", "--vision", "clip", "--llm", "llm"], "give either --from"),
    (["--vision", "clip", "--llm", "llm", "--scales", "one"], "--scales one"),
    (["--vision", "clip", "--llm", "llm", "--scales", "3,1"], "scales = [3, 1]"),
    (["--vision", "llm", "--llm", "llm"], "no vision tower"), (["--vision", "clip", "--llm", "clip"], "has no decoder"),
    (["--vision", "clip", "--llm", "llm", "--connector", "nowhere.bin"], "nowhere.bin: missing"),
    (["--from", "llm", "--tokenizer", "clip/config.json"], "cannot be read as a tokenizer"),
    (["--from", "llm", "--tokenizer", "no.json"], "no.json: cannot be read"),
    (["--from", "llm", "--pixel-shuffle", "2"], "--pixel-shuffle goes with --vision"),
    (["--from", "llm", "--scales", "1,3"], "--connector and --scales go with --vision"),
    (["--from", "llm", "--connector", "c.bin"], "--connector and --scales go with --vision"),
    (["--from", "llm", "--vision", "clip"], "give either --from"), (["--experts", "a,b", "--llm", "llm"], "give either --from"),
    (["--vision", "clip", "--llm", "llm", "--pixel-shuffle", "3"], "pixel_shuffle = 3 does not divide the 2 x 2 patches"),
    (["--from", "llm", "--to", "cumo"], "--to hf-llm"), (["--from", "clip", "--to", "hf-llm"], "hf-clip only")])
def test_arguments_that_do_not_go_together_are_named_and_nothing_is_written(parts, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails([*args, "--out", "out"], words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the file, the tensor or the key


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def shards(folder):
    write(folder, read(folder), "safetensors shards")
    (folder / "model.safetensors").unlink()


def to_bin(folder, tensors=None, **kw):
    torch.save(tensors or read(folder), folder / "pytorch_model.bin", **kw)
    (folder / "model.safetensors").unlink()


def tensors(edit, storage="safetensors"):
    """A break that edits the tensors."""
    def change(folder):
        held = read(folder)
        edit(held)
        (folder / "model.safetensors").unlink()
        write(folder, held, storage)
    return change


def cut(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:int((folder / file).stat().st_size * keep)])


def config(**kw):
    return lambda folder: edit_json(folder / "config.json", lambda cfg: cfg.update(kw))


def index(text):
    def change(folder):
        shards(folder)
        (folder / "model.safetensors.index.json").write_text(text)
    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


Q, EXPERT = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"       # what git leaves without git-lfs
BROKEN = {                                                       # name: (how to break a Mixtral's folder, words of the message)
    "shard missing": (both(shards, lambda f: (f / "model-00002-of-00003.safetensors").unlink()),
                      ["model-00002-of-00003.safetensors: missing"]),
    "safetensors cut short": (cut("model.safetensors", 0.7), ["model.safetensors: cannot be read"]),
    "safetensors empty": (cut("model.safetensors", 0), ["model.safetensors: cannot be read"]),
    "safetensors is git's pointer": (lambda f: (f / "model.safetensors").write_bytes(LFS), ["model.safetensors: cannot be read"]),
    "bin cut short": (both(to_bin, cut("pytorch_model.bin", 0.7)), ["pytorch_model.bin: cannot be read"]),
    "bin empty": (both(to_bin, cut("pytorch_model.bin", 0)), ["pytorch_model.bin: cannot be read"]),
    "bin is git's pointer": (both(to_bin, lambda f: (f / "pytorch_model.bin").write_bytes(LFS)), ["llm"]),
    "bin of something else": (lambda f: to_bin(f, {"state": [torch.zeros(1)]}), ["must hold a dictionary of tensors"]),
    "shape": (tensors(lambda t: t.update({Q: t[Q][:8].clone()})), [Q, "(8, 16)", "(16, 16)"]),
    "shape of an expert": (tensors(lambda t: t.update({EXPERT.format(2): torch.zeros(16, 23)})),
                           [EXPERT.format(2), "(16, 23)", "(16, 24)"]),
    "tensor too many": (tensors(lambda t: t.update({"model.layers.0.self_attn.extra.weight": torch.zeros(2)})),
                        ["self_attn.extra.weight", "no place"]),
    "layer too many": (tensors(lambda t: t.update({Q.replace("0", "2"): t[Q].clone()})), [Q.replace("0", "2"), "no place"]),
    "tensor missing": (tensors(lambda t: t.pop(Q)), [Q, "missing"]),
    "tensor missing in a bin": (tensors(lambda t: t.pop("model.norm.weight"), "bin"), ["model.norm.weight is missing"]),
    "embedding missing": (tensors(lambda t: t.pop("model.embed_tokens.weight")), ["model.embed_tokens.weight is missing"]),
    "expert missing": (tensors(lambda t: t.pop(EXPERT.format(3))), [EXPERT.format(3), "missing"]),
    "expert too many": (tensors(lambda t: t.update({EXPERT.format(4): t[EXPERT.format(3)].clone()})), [EXPERT.format(4), "no place"]),
    "experts for a dense config": (config(model_type="mistral"), ["block_sparse_moe", "no place"]),
    "dense for a config of experts": (tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(24, 16)})),
                                      ["mlp.up_proj.weight", "no place"]),
    "code in a bin": (lambda f: to_bin(f, {"a": torch.zeros(1), "b": Bomb()}), ["pytorch_model.bin", "code", "refused"]),
    "code in an old bin": (lambda f: to_bin(f, {"b": Bomb()}, _use_new_zipfile_serialization=False),
                           ["pytorch_model.bin", "code", "refused"]),
    "architecture": (config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
                     ["config.json", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "CLIPModel", "LLaVA-1.5"]),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["config.json", "quantized (gptq)", "dequantize it first"]),
    "weights of another name": (lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors"),
                                ["model.safetensors: missing", "there is model.fp16.safetensors: rename it"]),
    "architecture unnamed": (config(model_type="bloom", architectures=None), ["config.json", "bloom", "LlamaForCausalLM"]),
    "rope scaling": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), ["config.json", "'dynamic'", "llama3"]),
    "rope scaling, current style": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["config.json", "'yarn'", "llama3"]),
    "rope scaling in part": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
                             ["config.json", "original_max_position_embeddings"]),
    "activation": (config(hidden_act="relu2"), ["config.json", "relu2", "silu"]),
    "heads": (config(num_attention_heads=3), ["config.json", "n_heads = 3"]),
    "type of a value": (config(hidden_size="wide"), ["config.json", "text.dim = 'wide' must be a whole number"]),
    "type of our own key": (config(template=5), ["config.json", "template = 5 must be text in quotes"]),
    "zero heads": (config(num_attention_heads=0), ["config.json", "text.n_heads = 0 must be a whole number"]),
    "rope scaling that is a number": (config(rope_scaling=5), ["config.json", "rope_scaling = 5 must be an object"]),
    "architecture that is a list": (config(model_type=["mixtral"], architectures=None), ["config.json", "['mixtral'] is not supported"]),
    "tower that is a number": (config(mm_vision_tower=5), ["config.json", "mm_vision_tower = 5"]),
    "config nested too deep": (lambda f: (f / "config.json").write_text('{"a": ' + "[" * 100000 + "]" * 100000 + "}"),
                               ["config.json: malformed JSON"]),
    # (torch 2.14 refuses these by itself, and does not say which tensor it is)
    "sparse tensor": (lambda f: to_bin(f, {**read(f), Q: read(f)[Q].to_sparse()}), ["llm"]),
    "tensor on meta": (tensors(lambda t: t.update({Q: t[Q].to("meta")}), "bin"), [Q, "is sparse, or without values (on meta)"]),
    "tensor without a name": (lambda f: to_bin(f, {1: torch.zeros(1)}), ["must hold a dictionary of tensors"]),
    "integers": (tensors(lambda t: t.update({Q: t[Q].char()})), [Q, "is torch.int8; weights are float32", "converted first"]),
    "booleans": (tensors(lambda t: t.update({Q: t[Q] > 0})), [Q, "is torch.bool"]),
    "float8": (tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), [Q, "is torch.float8_e4m3fn"]),
    "complex": (tensors(lambda t: t.update({Q: t[Q].to(torch.complex64)}), "bin"), [Q, "is torch.complex64"]),
    "folder for a file": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
                          ["model.safetensors: a folder or a pipe"]),
    "pipe for a file": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
                        ["model.safetensors: a folder or a pipe"]),
    "pipe for a tokenizer": (lambda f: ((f / "tokenizer.json").unlink(), os.mkfifo(f / "tokenizer.json")),
                             ["tokenizer.json: a folder or a pipe"]),
    "pipe for an index": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors.index.json")), ["model.safetensors.index.json: a folder or a pipe"]),
    "tokenizer of a larger model": (lambda f: Tokenizer(models.WordLevel({"?": 40}, unk_token="?")).save(str(f / "tokenizer.json")),
                                    ["tokenizer.json: its ids go up to 40", "has 40 rows"]),
    "config cut short": (cut("config.json", 0.5), ["config.json: malformed JSON"]),
    "config missing": (lambda f: (f / "config.json").unlink(), ["no config.json in it"]),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors: missing"]),
    "index cut short": (index('{"weight_map": {'), ["model.safetensors.index.json: malformed JSON"]),
    "index without a map": (index("{}"), ["model.safetensors.index.json: not an index", "weight_map"]),
    "index that is a list": (index("[]"), ["model.safetensors.index.json"]),
    "index with a list for a map": (index('{"weight_map": ["a"]}'), ["model.safetensors.index.json: not an index"]),
    "index with a number for a file": (index('{"weight_map": {"a": 1}}'), ["model.safetensors.index.json: not an index"]),
    "index of nothing": (index('{"weight_map": {}}'), ["missing"]),
    "tokenizer cut short": (cut("tokenizer.json", 0.5), ["tokenizer.json: cannot be read as a tokenizer"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_names_the_fault(tiny_model, name, tmp_path, monkeypatch, capsys):
    break_it, words_of_it = BROKEN[name]
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    save(tiny_model(vision=None, text=dict(n_experts=4)), tmp_path / "llm", words(), layout="hf-llm")
    break_it(tmp_path / "llm")
    with pytest.raises(ValueError) as e:
        load(tmp_path / "llm")
    assert str(tmp_path / "llm") in str(e.value)
    said = fails(["--from", tmp_path / "llm", "--out", tmp_path / "out"], *words_of_it)
    assert said == f"upcycle.py: {e.value}"
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


def test_widths_that_do_not_fit_are_named(parts, tiny_model, tmp_path):
    """A connector made for another tower, for another decoder, and for other scales."""
    others = (dict(vision=dict(dim=32)), dict(text=dict(dim=24)), dict(vision=dict(scales=[1, 2])),
              dict(connector=dict(n_experts=2), text=dict(dim=24)))
    for i, kw in enumerate(others):
        file = tmp_path / f"mm_projector{i}.bin"
        torch.save({name: t for name, t in U.published(tiny_model(**kw).state_dict()).items() if "mm_projector" in name}, file)
        fails(["--vision", tmp_path / "clip", "--llm", tmp_path / "llm", "--connector", file, "--out", tmp_path / "out"],
              file, "mm_projector.", "has shape", "tower is 16 wide at 1 scale, the decoder 16")
    save(tiny_model(vision=dict(dim=32)), tmp_path / "cumo", layout="cumo")
    held = read(tmp_path / "cumo")
    held |= {name: t for name, t in U.published(parts.state_dict()).items() if "mm_projector" in name}
    write(tmp_path / "cumo", held, "safetensors")
    fails(["--from", tmp_path / "cumo", "--out", tmp_path / "out"], "mm_projector.0.weight has shape (16, 16)", "(16, 32)")


@pytest.mark.parametrize("kw, words", [
    (dict(mm_vision_select_feature="cls_patch"), "without CLS"), (dict(mm_use_im_start_end=True), "start and end"),
    (dict(mm_projector_type="linear"), "mlp2x_gelu"), (dict(clip_smoe=False), "no place"), (dict(num_experts=3), "no place"),
    (dict(num_experts=5), "mm_projector.gate.weight has shape (4, 16)"), (dict(num_selected=5), "top_k = 5"),
    (dict(scales=[1, 3]), "mm_projector"), (dict(mm_vision_select_layer=-9), "select_layer = -9"),
    (dict(mm_vision_select_layer=[-2, -5]), "config.json")])
def test_a_published_config_that_asks_for_something_else_is_refused(tiny_model, kw, words, tmp_path):
    save(tiny_model(vision=dict(n_experts=4), connector=dict(n_experts=4)), tmp_path / "cumo", layout="cumo")
    config(**kw)(tmp_path / "cumo")
    fails(["--from", tmp_path / "cumo", "--out", tmp_path / "out"], tmp_path / "cumo", words)


def test_a_tower_or_a_connector_that_is_nowhere_is_named(tiny_model, tmp_path):
    model = tiny_model(template="vicuna")
    save(model, tmp_path / "cumo", layout="cumo")
    held = read(tmp_path / "cumo")
    write(tmp_path / "cumo", {name: t for name, t in held.items() if "mm_projector" not in name}, "safetensors")
    fails(["--from", tmp_path / "cumo", "--out", tmp_path / "out"], "model.mm_projector.0.weight is missing")
    write(tmp_path / "cumo", {name: t for name, t in held.items() if "vision_tower" not in name}, "safetensors")
    fails(["--from", tmp_path / "cumo", "--out", tmp_path / "out"], "no mm_vision_tower in the config")


def test_the_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable\nand more of that")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    said = fails(["--from", "shi-labs/CuMo-mistral-7b", "--out", tmp_path / "out"],
                 "shi-labs/CuMo-mistral-7b", "no such folder here", "Network is unreachable")
    with pytest.raises(ValueError, match="Network is unreachable"):
        load("shi-labs/CuMo-mistral-7b")
    assert "and more" not in said
    for name in ("", "a/b/c", str(tmp_path / "nowhere"), "nowhere"):               # no hub names: nothing is asked
        with pytest.raises(ValueError, match="no config.json"):
            load(name)


@pytest.mark.parametrize("ext", ["safetensors", "bin"])
def test_a_hub_name_is_downloaded_once_as_safetensors_and_else_as_bin(parts, tmp_path, ext, monkeypatch):
    asked = []
    if ext == "bin":
        to_bin(tmp_path / "llm")

    def download(name, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects
        files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors",
                 "onnx/config.json", "checkpoint-500/model.safetensors", "model.fp16.safetensors", "tokenizer.json", "chat_template.jinja"]
        got = set(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        weights = {file for file in got if file.endswith((".safetensors", ".bin"))}
        assert got - weights == {"config.json", "tokenizer.json", "chat_template.jinja"}
        assert weights in ({"model.safetensors", "model-00001-of-00002.safetensors"}, {"pytorch_model.bin"})
        asked.append(allow_patterns[2])
        return str(tmp_path / "llm")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, tokenizer = load("some-one/model_7b.v1")
    assert same(model.text, parts.text) and tokenizer is not None
    assert asked == (["*.safetensors"] if ext == "safetensors" else ["*.safetensors", "*.bin"])


# ---------------------------------------------------------------------------------------------------------------------
# Memory

MEASURE = """
import re, sys
from upcycle import load
def held(which):                                                # by this process alone; ru_maxrss begins with its parent's
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
load(sys.argv[1])                                               # torch imports some more of itself on first use
for folder in sys.argv[2:]:
    before = held("VmRSS")
    model, _ = load(folder)
    print(held("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


def shapes(kind, dim, ffn_dim, vocab, n_layers, n_experts=8):
    """{name: shape} of a LLaMA or a Mixtral."""
    out = {"model.embed_tokens.weight": [vocab, dim], "lm_head.weight": [vocab, dim], "model.norm.weight": [dim]}
    for i in range(n_layers):
        at = f"model.layers.{i}."
        out |= {f"{at}{name}_layernorm.weight": [dim] for name in ("input", "post_attention")}
        out |= {f"{at}self_attn.{name}_proj.weight": [dim, dim] for name in "qkvo"}
        wide, back = ([f"{at}block_sparse_moe.experts.{e}.{w}.weight" for e in range(n_experts) for w in names]
                      if kind == "mixtral" else [f"{at}mlp.{w}_proj.weight" for w in others]
                      for names, others in ((("w1", "w3"), ("gate", "up")), (("w2",), ("down",))))
        out |= {name: [ffn_dim, dim] for name in wide} | {name: [dim, ffn_dim] for name in back}
        if kind == "mixtral":
            out[at + "block_sparse_moe.gate.weight"] = [n_experts, dim]
    return out


def hollow(folder, kind, storage, *sizes):
    """A folder of bfloat16 zeros. The .safetensors takes no disk: a header, and a hole behind it."""
    tensors, header, at = shapes(kind, *sizes), {}, 0
    write(folder, {n: torch.zeros(shape, dtype=torch.bfloat16) for n, shape in tensors.items()} if storage == "bin" else {}, storage,
          dict(model_type=kind, num_attention_heads=8, num_key_value_heads=8))
    if storage == "bin":
        return folder
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name], at = dict(dtype="BF16", shape=shape, data_offsets=[at, at + size]), at + size
    header = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + at)
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc, which only Linux has")
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """One process for all, the smallest first: the peak that it reads is never an earlier model's. What is freed goes back at once."""
    cases = (("llama", "bin", 512, 1408, 4000, 20), ("mixtral", "safetensors", 512, 1792, 4000, 6),
             ("llama", "safetensors", 1024, 2816, 8000, 10))
    small = hollow(tmp_path / "small", "llama", "safetensors", 64, 64, 64, 1)
    folders = [hollow(tmp_path / f"{kind} {storage}", kind, storage, *sizes) for kind, storage, *sizes in cases]
    done = subprocess.run([sys.executable, "-c", MEASURE, str(small), *map(str, folders)], cwd=UPCYCLE.parent,
                          capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    measured = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == 3
    for folder, (grown, size) in zip(folders, measured):
        assert size > 1.3e8 and 0.9 * size < grown < 1.2 * size + 1e7, (folder.name, grown / size)       # under 0.9: nothing was measured


@torch.no_grad()
def test_whispers_encoder_equals_transformers(tmp_path):
    hf = pytest.importorskip("transformers", reason="the reference is transformers' Whisper")
    torch.manual_seed(0)
    reference = hf.WhisperModel(hf.WhisperConfig(d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                                                 encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                                 decoder_start_token_id=1)).eval()
    reference.save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    mel = torch.randn(1, 80, 3000)
    torch.testing.assert_close(model(mel), reference.encoder(mel).last_hidden_state, atol=1e-4, rtol=0)
    assert tokenizer is None
    with pytest.raises(ValueError, match="3000"):
        model(mel[:, :, :2000])


@torch.no_grad()
def test_an_ear_of_128_bands_is_given_128_bands(parts, tmp_path):
    """Whisper large-v3."""
    hf = pytest.importorskip("transformers", reason="the ear is made by transformers")
    hf.WhisperModel(hf.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                     encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                     decoder_start_token_id=1, num_mel_bins=128)).save_pretrained(tmp_path / "whisper")
    model, _ = assemble(str(tmp_path / "clip"), str(tmp_path / "llm"), audio=str(tmp_path / "whisper"), template="tiny")
    sample = generate.sample_of("What?", audio=[(np.ones(16_000, np.float32), 16_000)])
    _, senses = generate.sense(model, [sample])
    assert senses["audio"].shape == (1, 128, 3000) and model.encode_audio(senses["audio"]).isfinite().all()
