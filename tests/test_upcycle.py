"""upcycle.py: dense -> experts without a change in the output, and model folders that come back bit for bit or say what is wrong."""
import copy
import json
import os
import shutil
import stat
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import upcycle as U
from kernels import FFN
from model import IGNORE, IMAGE, PAD, Config, CuMo, MoE
from upcycle import load, load_backbones, save, save_backbones, upcycle, write_atomically

TOKENS = torch.tensor([[7] + [IMAGE] * 4 + [3, 9], [5, 6] + [PAD] * 5])
LABELS = torch.where(TOKENS >= 0, TOKENS, IGNORE)


def run(model):
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return model(TOKENS, images, labels=LABELS)


def words():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "red": 1, "ball": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# Upcycling


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("parts", [dict(vision=4), dict(connector=4), dict(text=4), dict(text=[4, 0]), dict(text=4, top_k=4),
                                   dict(vision=1, top_k=1), dict(vision=[0, 3, 4], connector=2, text=[0, 2], top_k=2)],
                         ids=lambda parts: ",".join(f"{k}={v}" for k, v in parts.items()))
@torch.no_grad()
def test_upcycling_leaves_the_output_unchanged(tiny_model, parts, dtype, tolerance):
    model = tiny_model(vision=dict(scales=[1, 2])).to(dtype)
    before = run(model)
    assert upcycle(model, **parts) is model
    after = run(model)
    assert any(after.routing.values())                                       # there are experts now
    real = TOKENS != PAD                                                     # (experts give padding 0, a dense FFN gives it something)
    for a, b in ((after.logits[real], before.logits[real]), (after.image_embeds, before.image_embeds)):
        assert a.dtype == b.dtype and (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()
    torch.testing.assert_close(after.parts["lm"], before.parts["lm"], rtol=tolerance, atol=0)


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_terms_that_nearly_cancel_do_not_look_like_a_changed_output(seed):
    """Trained FFNs add up large terms of both signs, and their sum is rounded by its terms, in whatever order these come."""
    g = torch.Generator().manual_seed(seed)
    dense, terms = FFN(64, 512, "gelu"), 10 * torch.randn(64, 256, generator=g)
    dense.w_in.copy_(torch.randn(256, 64, generator=g).mul(0.3).repeat(2, 1))
    dense.w_out.copy_(torch.cat([terms + torch.randn(64, 256, generator=g), -terms], 1))
    assert isinstance(U.experts_from(dense, 4, 2, torch.Generator().manual_seed(seed)), MoE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upcycling_that_changes_the_output_is_stopped(tiny_model, monkeypatch, dtype):
    real = MoE.forward

    def wrong(self, x, mask=None):
        y, routing = real(self, x, mask)
        return y * 0.9, routing
    monkeypatch.setattr(MoE, "forward", wrong)
    with pytest.raises(AssertionError, match="upcycling changed the output"):
        upcycle(tiny_model().to(dtype), vision=4)


@torch.no_grad()
def test_weights_that_are_not_rescaled_are_no_changed_output(tiny_model):
    model, x = tiny_model(text=dict(renormalise=False)), torch.randn(5, 16)
    before = model.text.layers[0].ffn(x)[0]
    with pytest.warns(UserWarning, match="renormalise = false changes the output of text: .* 1 / 4 instead of 1 / 2"):
        upcycle(model, text=4)
    after, routing = model.text.layers[0].ffn(x)
    assert routing.weights.sum(-1).max() < 0.9
    torch.testing.assert_close(after, before * routing.weights.sum(-1, keepdim=True))


@torch.no_grad()
def test_upcycling_to_top_1_weights_the_output_by_the_probability_and_says_so(tiny_model):
    model, x = tiny_model(), torch.randn(20, 16)
    dense = {"text": model.text.layers[0].ffn, "vision": model.vision.layers[0].ffn}
    with pytest.warns(UserWarning, match="top_k = 1 changes the output of (vision|text).*about 1 / 4 instead of 1"):
        upcycle(model, vision=4, text=4, top_k=1)
    for part, ffn in dense.items():
        moe = getattr(model, part).layers[0].ffn
        p = (x @ moe.router.T).softmax(-1).amax(-1, keepdim=True)                  # about 1 / 4
        torch.testing.assert_close(moe(x)[0], p * ffn(x)[0], rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings(action="error"):
        upcycle(tiny_model(), text=1, top_k=1)                                     # of one expert, the probability is 1
        released = tiny_model(connector=dict(renormalise=True))                    # as the released CuMo computes
        before = run(released).image_embeds
        torch.testing.assert_close(run(upcycle(released, connector=4, top_k=1)).image_embeds, before, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:top_k = 1")
def test_upcycling_to_top_1_that_changes_the_output_in_another_way_is_stopped(tiny_model, monkeypatch):
    real = MoE.forward
    monkeypatch.setattr(MoE, "forward", lambda self, x, mask=None: (real(self, x, mask)[0] * 0.9, real(self, x, mask)[1]))
    with pytest.raises(AssertionError, match="upcycling changed the output"):
        upcycle(tiny_model(), vision=4, top_k=1)


@torch.no_grad()
def test_folders_from_before_renormalise_keep_their_top_1_weight_of_1(tiny_model, tmp_path):
    model = tiny_model(text=dict(n_experts=4, top_k=1, renormalise=True), vision=dict(n_experts=3))
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("vision", "connector", "text"):
        del config[part]["renormalise"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, _ = load(tmp_path)
    assert again.config == model.config and torch.equal(run(again).logits, run(model).logits)


@torch.no_grad()
def test_experts_are_copies_that_can_grow_apart(tiny_model):
    model = tiny_model()
    dense = {name: w.clone() for name, w in model.named_parameters()}
    upcycle(model, vision=3, connector=2, text=2)
    for name, p in model.named_parameters():
        if name.endswith("router"):
            continue
        for expert in p if ".ffn." in name else [p]:
            assert torch.equal(expert, dense[name]), name
        assert p.requires_grad
    w = model.text.layers[0].ffn.w_in
    w[0] += 1                                                                # no storage is shared
    assert torch.equal(w[1], dense["text.layers.0.ffn.w_in"]) and not torch.equal(w[0], w[1])


def routers(model):
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith("router")}


def test_routers_are_small_and_follow_the_seed_alone(tiny_model):
    first = routers(upcycle(tiny_model(), vision=4, connector=4, text=4, seed=1))
    torch.manual_seed(99)                                                    # the global generator has no say
    again = routers(upcycle(tiny_model(), vision=4, connector=4, text=4, seed=1))
    other = routers(upcycle(tiny_model(), vision=4, connector=4, text=4, seed=2))
    assert len(first) == 3 + 1 + 2 and all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)
    everything = torch.cat([r.flatten() for r in first.values()])
    assert len(everything.unique()) == len(everything)                       # every layer draws its own
    assert abs(everything.std() - 0.02) < 0.003 and abs(everything.mean()) < 0.003


@pytest.mark.filterwarnings("ignore:top_k = 1")
def test_the_config_follows_and_rebuilds_the_model(tiny_model):
    model = upcycle(tiny_model(text=dict(capacity_factor=1.5)), vision=[4, 0, 2], connector=3, text=[0, 4], top_k=1)
    c = model.config
    assert (c.vision.n_experts, c.connector.n_experts, c.text.n_experts) == ([4, 0, 2], 3, [0, 4])
    assert c.vision.top_k == c.connector.top_k == c.text.top_k == 1
    assert [type(layer.ffn) for layer in model.vision.layers] == [MoE, FFN, MoE] and isinstance(model.connector.ffn, MoE)
    assert model.text.layers[1].ffn.capacity_factor == 1.5 and model.vision.layers[0].ffn.capacity_factor is None
    twin = CuMo(Config.from_dict(c.to_dict()))
    twin.load_state_dict(model.state_dict())                                 # strict: names and shapes agree
    with torch.no_grad():
        assert torch.equal(run(twin.eval()).logits, run(model).logits)


@pytest.mark.filterwarnings("ignore:top_k = 1")
def test_parts_that_were_not_asked_for_keep_their_top_k(tiny_model):
    model = upcycle(tiny_model(text=dict(n_experts=4, top_k=3)), vision=4, top_k=1)
    assert model.config.text.top_k == 3 and model.config.connector.n_experts == 0 and model.config.vision.top_k == 1


def test_upcycling_one_model_leaves_others_of_the_same_config_alone(tiny_config):
    config = tiny_config()
    one, other = CuMo(config), CuMo(config)
    upcycle(one, vision=4, connector=4, text=4)
    assert other.config.vision.n_experts == [0, 0, 0] and other.config.connector.n_experts == 0 and one.config.text.n_experts == [4, 4]


@torch.no_grad()
def test_layers_upcycled_in_two_goes_come_back_as_they_were(tiny_model, tmp_path):
    """A config has one top_k for all layers, so a second go with another one is either refused or must survive a save and a load."""
    model = upcycle(tiny_model(), text=[4, 0], top_k=2)
    try:
        upcycle(model, text=[0, 4], top_k=1)
    except ValueError as e:
        assert "top_k" in str(e)
    want = run(model).logits
    save(model, tmp_path)
    assert torch.equal(run(load(tmp_path)[0]).logits, want)


@pytest.mark.parametrize("kw, words", [
    (dict(vision=[4, 4]), "vision: 2 expert counts for 3 layers"), (dict(text=[4, 4, 4]), "text: 3 expert counts for 2 layers"),
    (dict(vision=2, top_k=3), "vision: top_k = 3 of 2"), (dict(connector=4, top_k=0), "connector: top_k = 0"),
    (dict(text=-1), "text: .*-1 experts"), (dict(vision=4, text=[2, 1]), "text: top_k = 2 of 1")])
def test_upcycle_refuses_and_leaves_the_model_as_it_was(tiny_model, kw, words):
    model, untouched = tiny_model(), tiny_model()
    with pytest.raises(ValueError, match=words):
        upcycle(model, **kw)
    assert model.config == untouched.config and same(model, untouched)


@pytest.mark.parametrize("name", ["vision", "connector", "text"])
def test_upcycling_twice_is_refused(tiny_model, name):
    model = upcycle(tiny_model(), **{name: 4})
    with pytest.raises(ValueError, match=f"{name} layer 0 already has 4 experts"):
        upcycle(model, **{name: 2})


@pytest.mark.parametrize("name", ["vision", "connector"])
def test_upcycling_a_part_that_is_not_there_is_refused(tiny_model, name):
    with pytest.raises(ValueError, match=name):
        upcycle(tiny_model(vision=None), **{name: 4})


@torch.no_grad()
def test_a_language_model_alone_is_upcycled(tiny_model, tmp_path):
    model, tokens = tiny_model(vision=None), torch.randint(0, 40, (2, 9))
    want = model(tokens).logits
    for i in range(3):
        save(model, tmp_path / str(i))
    torch.testing.assert_close(upcycle(copy.deepcopy(model), text=4)(tokens).logits, want, rtol=1e-4, atol=1e-5)
    mixed = upcycle(model, experts=[str(tmp_path / str(i)) for i in range(3)])
    assert mixed.config.text.n_experts == [3, 3]
    torch.testing.assert_close(mixed(tokens).logits, want, rtol=1e-4, atol=1e-5)


def test_what_the_command_puts_together_trains_without_routing_losses_as_uni_moe(tiny_model, tmp_path):
    for i in range(2):
        save(tiny_model(vision=None), tmp_path / str(i))
    U.main(["--experts", f"{tmp_path}/0,{tmp_path}/1", "--out", str(tmp_path / "mix")])
    config = load(tmp_path / "mix")[0].config
    assert config.text.n_experts == [2, 2] and config.balance_coef == config.z_coef == 0.0


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_model_that_is_saved_over_another_one_takes_its_place_at_once(tiny_model, tmp_path, monkeypatch, n_shards):
    old, new = tiny_model(), tiny_model(text=dict(norm_eps=0.1))
    for p in new.parameters():
        p.data.neg_()
    size = sum(p.nbytes for p in old.parameters())
    monkeypatch.setattr(U, "SHARD_BYTES", size // (2 * n_shards))
    save(old, tmp_path / "x")                                                      # more shards than the new one has
    monkeypatch.setattr(U, "SHARD_BYTES", size if n_shards == 1 else size // n_shards + 1)
    before = files(tmp_path / "x")
    real, calls = os.replace, []

    class Killed(BaseException):
        pass

    # 1. Killed (no clean-up can be done) at each renaming in turn, also of those inside of the new folder.
    def replace(a, b):
        calls.append(b)
        if len(calls) == n:
            raise Killed
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    for n in range(1, 30):
        calls.clear()
        folder = shutil.copytree(tmp_path / "x", tmp_path / str(n))
        try:
            save(new, folder)
        except Killed:
            if (folder / "config.json").exists():
                assert files(folder) == before
            else:
                with pytest.raises(ValueError, match="no config.json in it"):
                    load(folder)
            continue
        break
    monkeypatch.setattr(os, "replace", real)
    assert n > 4

    # 2. Whole: nothing of the old one is left.
    save(new, tmp_path / "fresh")
    assert files(folder) == files(tmp_path / "fresh")
    again = load(folder)[0]
    assert again.config == new.config and all(torch.equal(a, b) for a, b in zip(again.parameters(), new.parameters(), strict=True))


def test_what_is_written_may_be_read_by_whom_the_umask_says(tiny_model, tmp_path):
    before = os.umask(0o027)
    try:
        save(tiny_model(), tmp_path / "x")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o640}


def test_upcycling_on_meta_makes_shapes_only(tiny_config):
    with torch.device("meta"):
        model = upcycle(CuMo(tiny_config()), vision=4, connector=4, text=4)
        want = CuMo(tiny_config(vision=dict(n_experts=4), connector=dict(n_experts=4), text=dict(n_experts=4)))
    assert {k: v.shape for k, v in model.named_parameters()} == {k: v.shape for k, v in want.named_parameters()}
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Model folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_load_gives_back_what_save_was_given(tiny_model, tmp_path, dtype, tie):
    model = upcycle(tiny_model(text=dict(tie_embeddings=tie, aux="sum"), z_coef=0.5).to(dtype), vision=4, connector=[2], text=[4, 0])
    save(model, tmp_path / "new" / "folder", words())
    again, tokenizer = load(tmp_path / "new" / "folder")
    assert same(model, again) and again.config == model.config
    assert not again.training and all(p.requires_grad and not p.is_meta for p in again.parameters())
    assert torch.equal(run(again).logits, run(model).logits)
    assert tokenizer.to_str() == words().to_str() and tokenizer.encode("a red ball").ids == [0, 1, 2]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_folder_without_tokenizer_and_a_dtype_of_ones_own(tiny_model, tmp_path):
    model = tiny_model(vision=None)
    save(model, tmp_path)
    again, tokenizer = load(tmp_path, dtype=torch.bfloat16)
    assert tokenizer is None and same(again, model.bfloat16())


def test_a_gathered_state_replaces_the_models_own(tiny_model, tmp_path):
    model = tiny_model()
    save(model, tmp_path, state={k: v + 1 for k, v in model.state_dict().items()})
    assert torch.equal(load(tmp_path)[0].text.embed.weight, model.text.embed.weight + 1)


def test_large_models_are_sharded_with_an_index(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(U, "SHARD_BYTES", 6000)
    model = upcycle(tiny_model(), vision=4)
    save(model, tmp_path)
    state = model.state_dict()
    with open(tmp_path / "model.safetensors.index.json") as f:
        index = json.load(f)
    files = sorted(set(index["weight_map"].values()))
    assert list(index["weight_map"]) == list(state) and index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 3
    assert sorted(os.listdir(tmp_path)) == ["config.json", *files, "model.safetensors.index.json"]
    for file in files:
        shard = load_file(tmp_path / file)
        assert sorted(shard) == sorted(name for name, at in index["weight_map"].items() if at == file)
        assert sum(t.nbytes for t in shard.values()) <= 6000 or len(shard) == 1
    assert same(load(tmp_path)[0], model)


def test_an_index_beside_a_single_file_is_an_older_models(tiny_model, tmp_path, monkeypatch):
    """As transformers leaves it, which then reads the single file."""
    model = tiny_model()
    save(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert same(load(tmp_path)[0], model)
    monkeypatch.setattr(U, "SHARD_BYTES", 6000)                                    # nor do we leave a single file beside an index
    save(upcycle(model, vision=4), tmp_path)
    assert "model.safetensors" not in os.listdir(tmp_path) and same(load(tmp_path)[0], model)


@pytest.mark.parametrize("first, then", [(6000, 10**9), (10**9, 6000), (6000, 12000)])
def test_saving_over_a_folder_replaces_the_old_weights(tiny_model, tmp_path, monkeypatch, first, then):
    old, new = tiny_model(), tiny_model()
    with torch.no_grad():
        new.text.embed.weight.add_(1)
    for model, size in ((old, first), (new, then)):
        monkeypatch.setattr(U, "SHARD_BYTES", size)
        save(model, tmp_path)
    assert same(load(tmp_path)[0], new)


@pytest.fixture
def folder(tiny_model, tmp_path):
    save(tiny_model(), tmp_path, words())
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop("text.norm.weight"), "text.norm.weight is missing"),
    (lambda t: t.update(surprise=torch.zeros(2)), "surprise has no place"),
    (lambda t: t.update({"vision.pos": torch.zeros(9, 16)}), r"vision.pos has shape \(9, 16\).*\(5, 16\)"),
    (lambda t: t.update({"text.embed.weight": torch.zeros(40, 16, 1)}), "text.embed.weight has shape")])
def test_load_names_the_tensor_that_does_not_fit(folder, edit, words):
    change(folder, edit)
    with pytest.raises(ValueError, match=words) as e:
        load(folder)
    assert str(folder) in str(e.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_load_names_the_file_that_is_cut_short(folder, file, keep):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:int(len(content) * keep)])
    with pytest.raises(ValueError, match=file):
        load(folder)


def test_load_names_what_is_missing(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere.*config.json"):
        load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: missing"):
        load(folder)


@pytest.mark.parametrize("content, words", [
    ("{", "config.json"), ("[1]", "config.json"), ("null", "config.json"), ('{"colour": 1}', "config.json.*'colour'"),
    ('{"text": {"depth": 1}}', "config.json.*'text.depth'"), ('{"text": {"dim": "wide"}}', "config.json"), ('{"text": null}', "config.json"),
    ('{"vision": 5}', "config.json"), ('{"text": {"n_heads": 0}}', "config.json"), ('{"text": {"dim": -4096}}', "config.json")])
def test_load_refuses_a_malformed_config(folder, content, words):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        load(folder)


@pytest.mark.parametrize("break_it, words", [
    (lambda folder, index: (folder / index["weight_map"]["text.norm.weight"]).unlink(), "model-0.*: missing"),
    (lambda folder, index: (folder / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json"),
    (lambda folder, index: (folder / "model.safetensors.index.json").write_text("{}"), "model.safetensors.index.json")])
def test_load_names_the_shard_or_index_that_is_broken(tiny_model, tmp_path, monkeypatch, break_it, words):
    monkeypatch.setattr(U, "SHARD_BYTES", 6000)
    save(tiny_model(), tmp_path)
    break_it(tmp_path, json.loads((tmp_path / "model.safetensors.index.json").read_text()))
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(str(path), lambda name: open(name, "w").write("old"))

    def die(name):
        with open(name, "w") as f:
            f.write("ne")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_atomically(str(path), die)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomically(str(path), lambda name: open(name, "w").write("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_what_a_kill_left_behind_is_removed_by_the_next_write(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()                                                              # its number is nobody's now
    for pid in (gone.pid, os.getpid(), 1, "now"):
        (tmp_path / f"model.safetensors.{pid}.tmp").touch()
    (tmp_path / f"notes.{gone.pid}.tmp").touch()                                    # somebody else's
    write_atomically(str(tmp_path / "model.safetensors"), lambda name: open(name, "w").write("new"))
    left = [f"model.safetensors.{pid}.tmp" for pid in (1, "now")]                  # those of living processes, and what is not ours
    assert sorted(os.listdir(tmp_path)) == sorted(["model.safetensors", f"notes.{gone.pid}.tmp", *left])


@torch.no_grad()
def test_a_part_has_one_float_type_but_its_routers_keep_theirs(tiny_model, tmp_path):
    """As a fine-tuning with norms in float32 leaves a bfloat16 model."""
    model = tiny_model(vision=dict(n_experts=2), text=dict(n_experts=2)).bfloat16()
    save(model, tmp_path)
    odd = "text.norm.weight", "text.layers.0.q.weight", "vision.pos", "vision.layers.0.ffn.router"
    change(tmp_path, lambda t: t.update({name: t[name].float() for name in odd}))
    again, _ = load(tmp_path)
    assert {name for name, p in again.named_parameters() if p.dtype != torch.bfloat16} == {"vision.layers.0.ffn.router"}
    assert torch.equal(run(again).logits, run(model).logits)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_byte_order_mark_is_read_over(folder, tiny_model, file):
    (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    again, tokenizer = load(folder)
    assert same(again, tiny_model()) and tokenizer.to_str() == words().to_str()


def test_an_interrupted_save_leaves_the_old_model(folder, tiny_model, monkeypatch):
    new = tiny_model()
    with torch.no_grad():
        new.text.embed.weight.add_(1)

    def full(tensors, name, **kw):
        save_file({"half": torch.zeros(1)}, name)
        raise OSError("No space left on device")
    monkeypatch.setattr(U, "save_file", full)
    with pytest.raises(OSError, match="space"):
        save(new, folder)
    assert same(load(folder)[0], tiny_model())


def test_others_may_read_what_is_saved(folder):
    assert all(stat.S_IMODE(os.stat(folder / file).st_mode) & 0o044 == 0o044 for file in os.listdir(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


@torch.no_grad()
def test_backbones_come_back_with_a_new_connector(tiny_model, tmp_path):
    model, file = tiny_model(text=dict(tie_embeddings=True), template="tiny"), str(tmp_path / "assets" / "backbones.safetensors")
    save_backbones(model, file, words())
    with safe_open(file, framework="pt") as f:
        assert not any(name.startswith("connector") for name in f.keys())
    again, tokenizer = load_backbones(file)
    assert same(again.vision, model.vision) and same(again.text, model.text) and again.config == model.config
    assert tokenizer.to_str() == words().to_str()
    fresh = again.connector.ffn
    assert not torch.equal(fresh.w_in, model.connector.ffn.w_in) and fresh.w_in.std() > 0.001 and not fresh.b_in.any()


@pytest.mark.parametrize("break_it", [
    lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:200]), lambda file: file.write_bytes(b""),
    lambda file: save_file({"text.norm.weight": torch.ones(16)}, file)], ids=["missing", "cut short", "empty", "no config inside"])
def test_broken_backbones_are_named(tiny_model, tmp_path, break_it):
    file = tmp_path / "backbones.safetensors"
    save_backbones(tiny_model(), str(file), words())
    break_it(file)
    with pytest.raises(ValueError, match="backbones.safetensors.*"):
        load_backbones(str(file))
