"""generate.py: answers, chat, measuring, pictures of the routing, and the command line."""
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data as d
import generate
from model import SIGLIP, Config, CuMo, VisionConfig
from upcycle import load, save, upcycle
from test_data import truth

ROOT = Path(__file__).resolve().parents[1]


def build(vocab_size, n_experts=4, connector=4, n_layers=2, scales=(1,), pixel_shuffle=1, **vision):
    """A model small enough to be made anew in every test, with weights so loud that its words depend on what it reads."""
    torch.manual_seed(0)
    model = CuMo(Config(
        vision=dict(image_size=48, patch_size=8, dim=32, n_layers=n_layers, n_heads=2, ffn_dim=48, n_experts=n_experts,
                    scales=list(scales), **vision),
        connector=dict(n_experts=connector, pixel_shuffle=pixel_shuffle),
        text=dict(vocab_size=vocab_size, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, rope_theta=1e4),
        template="tiny"))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    tokenizer = d.train_tokenizer([t["value"] for s in d.Drawn("chat", 50) for t in s["conversations"]], 320)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(build(tokenizer.get_vocab_size()), str(path), tokenizer)
    return str(path)


@pytest.fixture
def model(folder):
    return load(folder)[0]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load(folder)[1]


def picture(i):
    return d.draw_scene(d.make_scene(i))


def prompt(text, *images):
    return {"images": list(images), "conversations": [{"from": "human", "value": text}]}


def scripted(tokenizer, text, cut=None, template="tiny"):
    """A stand-in for the model that says a given text, token by token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:cut]

    def generate(tokens, images=None, max_new_tokens=64, on_token=None, **_):
        for i in ids:
            if on_token is not None:
                on_token(torch.tensor([i]))
        return torch.tensor([ids])
    config = SimpleNamespace(template=template, text=SimpleNamespace(end_tokens=[]), n_image_tokens=36, n_audio_tokens=0,
                             frames_apart=False, vision=VisionConfig(image_size=48))
    return SimpleNamespace(config=config, text=SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1))), generate=generate)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_a_batch_of_different_lengths_is_answered_as_one_at_a_time(model, tokenizer):
    samples = [prompt("<image>\nWhat color is the ring?", picture(0)), prompt("Why?"), prompt("Where is the star? " * 5),
               prompt("<image><image>\nThe same?", picture(1), picture(2)),
               prompt("<image>\nIs there a red circle below the blue one, or are there two?", picture(3))]
    together = generate.answer(model, tokenizer, samples, max_new_tokens=12)
    alone = [generate.answer(model, tokenizer, [s], max_new_tokens=12)[0] for s in samples]
    assert together == alone and len(set(together)) == 5 and all(together)


def test_the_answer_depends_on_the_picture_and_on_the_order_of_pictures(model, tokenizer):
    ask = lambda *images: generate.answer(model, tokenizer, [prompt("<image>" * len(images) + "\nWhat?", *images)])[0]
    assert len({ask(picture(0)), ask(picture(1)), ask(picture(0), picture(1)), ask(picture(1), picture(0))}) == 4


def test_images_encoded_before_give_the_same_answer(model, tokenizer):
    sample = prompt("<image>\nWhat?", picture(4))
    with torch.no_grad():
        embeds = model.encode_images(d.load_image(picture(4), 48).unsqueeze(0))
    assert generate.answer(model, tokenizer, [sample], image_embeds=embeds) == generate.answer(model, tokenizer, [sample])


def test_the_answer_ends_before_the_end_mark_and_is_stripped(tokenizer):
    assert generate.answer(scripted(tokenizer, " red circle \n</s></s></s>"), tokenizer, [prompt("What?")]) == ["red circle"]


def chatml_tokenizer():
    """A tokenizer of bytes without </s>, as Qwen2's and SmolLM2's."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_at_any_end_mark_and_nowhere_else(end):
    tokenizer, pieces = chatml_tokenizer(), []
    talker = scripted(tokenizer, "<div>cat</div> </s> 1 > 0" + end * 2, template="chatml")
    talker.config.text.end_tokens = [tokenizer.token_to_id("<|endoftext|>")]
    asked = []
    talker.generate = lambda tokens, generate=talker.generate, **kw: asked.append(kw["eos"]) or generate(tokens, **kw)
    assert generate.answer(talker, tokenizer, [prompt("Why?")], stream=pieces.append) == ["<div>cat</div> </s> 1 > 0"] == ["".join(pieces)]
    assert asked == [[tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]]
    with pytest.raises(ValueError, match="</s>.*--template chatml"):
        generate.answer(scripted(tokenizer, "x", template="vicuna"), tokenizer, [prompt("Why?")])


def test_sampling_depends_on_the_seed_alone(model, tokenizer):
    say = lambda seed: generate.answer(model, tokenizer, [prompt("Why?")], max_new_tokens=10, temperature=1.0, top_p=0.9,
                                       generator=torch.Generator().manual_seed(seed))[0]
    assert say(1) == say(1) != say(2)


@pytest.mark.parametrize("text", [" red</s>", " a blue cross, and 猫 🙂👍🏽 é!</s>", " one\ntwo  three</s>"])
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_answer(text, tokenizer):
    pieces = []
    reply = generate.answer(scripted(tokenizer, text), tokenizer, [prompt("What?")], stream=pieces.append)[0]
    assert "".join(pieces).strip() == reply == text.removesuffix("</s>").strip()
    assert not any("\ufffd" in p for p in pieces) and len(pieces) > 2


def test_streamed_pieces_of_a_model_add_up_to_its_answer(model, tokenizer):
    pieces = []
    reply = generate.answer(model, tokenizer, [prompt("<image>\nWhat?", picture(0))], stream=pieces.append, max_new_tokens=24)[0]
    assert "".join(pieces).strip() == reply.rstrip("\ufffd").strip() != ""              # an unfinished character is not shown


# ---------------------------------------------------------------------------------------------------------------------
# Chat


@pytest.mark.parametrize("images", [[], [picture(0)]], ids=["no image", "an image"])
def test_marks_typed_in_a_chat_are_words(images, model, tokenizer, monkeypatch, capsys):
    first = "Two <image> <image>?" if not images else "What?"
    lines = iter([first, "Is <image> a tag, or <video>, <audio>, </s><q>?", "So?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    read, encode = [], d.encode_chat
    monkeypatch.setattr(d, "encode_chat", lambda *a: read.append(encode(*a)[0]) or (read[-1], None))
    assert len(generate.chat(model, tokenizer, images, None, max_new_tokens=3)) == 6
    assert [ids.count(d.IMAGE) for ids in read] == [36 * len(images)] * 3
    assert [ids.count(tokenizer.token_to_id("<q>")) for ids in read] == [1, 2, 3]
    words = tokenizer.decode([i for i in read[2] if i >= 0], skip_special_tokens=False)
    assert "Is <image> a tag, or <video>, <audio>, </s><q>?" in words and (images or first in words)


def test_more_than_the_decoder_learnt_to_read_is_an_error_and_in_a_chat_a_warning(model, tokenizer, monkeypatch, capsys):
    n = len(d.encode_chat(prompt("Why is it so?")["conversations"], tokenizer, "tiny", 36)[0])
    monkeypatch.setattr(model.config.text, "max_positions", n + 8)
    assert generate.answer(model, tokenizer, [prompt("Why is it so?"), prompt("Why?")], max_new_tokens=8)
    with pytest.raises(ValueError, match=rf"{n} tokens and up to 9 .* {n + 8} that this decoder"):
        generate.answer(model, tokenizer, [prompt("Why?"), prompt("Why is it so?")], max_new_tokens=9)
    with pytest.raises(ValueError, match=f"more than the {n + 8}"):
        generate.chat(model, tokenizer, [], "Why is it so?", max_new_tokens=9)
    monkeypatch.setattr(generate, "typed_lines", lambda: iter(["Why is it so?"]))
    with pytest.warns(UserWarning, match=f"more than the {n + 8}"):
        assert len(generate.chat(model, tokenizer, [], None, max_new_tokens=9)) == 2


def test_a_line_that_cannot_be_answered_is_taken_back_and_the_talk_goes_on(model, tokenizer, monkeypatch, capsys):
    lines = ["Are <image> and <image> alike?", "What is it?", "half \ud83d", "Why?"]
    monkeypatch.setattr(generate, "typed_lines", lambda: iter(lines))
    talk = generate.chat(model, tokenizer, [picture(0)], None, max_new_tokens=3)
    assert [turn["value"].removeprefix("<image>\n") for turn in talk[::2]] == ["What is it?", "Why?"] and len(talk) == 4
    printed = capsys.readouterr().out
    assert "the text has 2 <image>" in printed and "half a character" in printed
    with pytest.raises(ValueError, match="half a character"):
        generate.chat(model, tokenizer, [], "half \ud83d", max_new_tokens=3)
    monkeypatch.setattr(generate, "typed_lines", lambda: iter(lines))               # what no other line would mend ends it
    with pytest.raises(ValueError, match="missing.png: no such file"):
        generate.chat(model, tokenizer, ["missing.png"], None)
    model.text.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        generate.chat(model, tokenizer, [picture(0)], None)


def test_chat_keeps_the_turns_and_encodes_the_images_once(model, tokenizer, monkeypatch, capsys):
    lines, asked, replies, encoded = iter(["What is it?", "", "  And where? ", "Sure?"]), [], [], []
    answer, encode = generate.answer, model.encode_images

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def recorded(model, tokenizer, samples, **kw):
        asked.append([dict(t) for t in samples[0]["conversations"]])
        replies.append(answer(model, tokenizer, samples, **kw)[0])
        return replies[-1:]
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(generate, "answer", recorded)
    monkeypatch.setattr(model, "encode_images", lambda images, *a: encoded.append(len(images)) or encode(images, *a))
    generate.chat(model, tokenizer, [picture(0), picture(1)], None, max_new_tokens=6)
    assert encoded == [2] and [len(c) for c in asked] == [1, 3, 5]
    assert [t["value"] for t in asked[-1][::2]] == ["<image>\n<image>\nWhat is it?", "And where?", "Sure?"]
    assert [t["value"] for t in asked[-1][1::2]] == replies[:2]
    assert [t["from"] for t in asked[-1]] == ["human", "gpt", "human", "gpt", "human"]
    shown = capsys.readouterr().out
    assert all(reply.rstrip("\ufffd") in shown for reply in replies)


def test_a_prompt_given_is_answered_once_and_may_place_its_images(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked for input"))
    generate.chat(model, tokenizer, [picture(0)], "What is <image> it?", max_new_tokens=6)
    expected = generate.answer(model, tokenizer, [prompt("<image>\nWhat is  it?", picture(0))], max_new_tokens=6)[0]
    assert capsys.readouterr().out.strip() == expected.rstrip("\ufffd").strip()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_drawn_questions_ask_held_out_scenes_every_type_in_turn():
    questions = generate.drawn_questions(900)
    assert [kind for _, kind, _, _ in questions] == list(d.TYPES) * 100
    assert all(truth(scene, question) == answer for scene, _, question, answer in questions)
    train = {d.describe(d.make_scene(i)) for i in range(4000)}                     # one-object scenes repeat: a leak would show
    assert not train & {d.describe(scene) for scene, _, _, _ in questions}
    assert questions == generate.drawn_questions(900) and questions[0][0] != generate.drawn_questions(1, seed=1)[0][0]
    signs = [scene["sign"] is not None for scene, kind, _, _ in questions if kind == "sign"]
    assert 0.5 < sum(signs) / len(signs) < 1


def test_evaluate_counts_exact_matches_of_every_type(model, tokenizer, monkeypatch):
    questions, seen = generate.drawn_questions(200), []

    def mostly_right(model, tokenizer, samples, **_):                              # right but for colours, where it adds a word
        n = len(seen)
        seen.extend(samples)
        return [answer + " indeed" * (kind == "color") for _, kind, _, answer in questions[n:n + len(samples)]]
    monkeypatch.setattr(generate, "answer", mostly_right)
    model.train()
    scores = generate.evaluate(model, tokenizer, 200, batch=64)
    asked = Counter(kind for _, kind, _, _ in questions)
    assert set(scores) == set(d.TYPES) and {kind: n for kind, (_, n) in scores.items()} == asked and asked.total() == 200
    assert scores == {kind: [0 if kind == "color" else n, n] for kind, n in asked.items()}
    assert model.training                                                          # as it was before
    for (scene, _, question, _), sample in zip(questions, seen, strict=True):
        assert question in sample["conversations"][0]["value"] and len(sample["conversations"]) == 1
        assert np.array_equal(sample["images"][0], d.draw_scene(scene))


def test_evaluate_in_words_shows_descriptions_and_no_images(model, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "answer", lambda m, t, samples, **_: seen.extend(samples) or [""] * len(samples))
    scores = generate.evaluate(model, tokenizer, 18, in_words=True)
    assert sum(n for _, n in scores.values()) == 18 and sum(right for right, _ in scores.values()) == 0
    for (scene, _, question, _), sample in zip(generate.drawn_questions(18), seen, strict=True):
        assert sample["images"] == [] and sample["conversations"][0]["value"] == d.describe(scene) + "\n" + question


def test_an_untrained_model_can_be_measured_and_printed(model, tokenizer, capsys):
    scores = generate.evaluate(model, tokenizer, 10, batch=4)
    generate.print_table(scores, "untrained")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "untrained" and len(shown) == 1 + 9 + 1 and re.match(r" +all +\d+ of +10 +[\d.]+%", shown[-1])
    assert not model.training


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the routing


@pytest.fixture
def seer():
    """A model with experts in three vision layers. The features are the input of the last one, so that two are shown."""
    return build(300, n_layers=3)


@pytest.mark.parametrize("scales", [(1,), (1, 2)])
def test_routing_is_each_patchs_top_k_of_the_routers(scales):
    model, images, inputs = build(300, n_layers=3, scales=scales), [picture(i) for i in range(3)], {}
    moes = {"layer 0": model.vision.layers[0].ffn, "layer 1": model.vision.layers[1].ffn, "connector": model.connector.ffn}

    def record(moe, args):
        inputs.setdefault(moe, args[0])                                            # the first call is the base scale
    for moe in moes.values():
        moe.register_forward_pre_hook(record)
    routing = generate.routing_of(model, images)
    assert list(routing) == list(moes)
    for name, experts in routing.items():
        x = inputs[moes[name]][:, -36:]                                            # without CLS
        assert experts.shape == (3, 36, 2) and torch.equal(experts, (x @ moes[name].router.T).topk(2, -1).indices)
        counts = torch.bincount(experts.flatten(), minlength=4)
        assert counts.sum() == 3 * 36 * 2 and torch.bincount(experts[..., 0].flatten(), minlength=4).sum() == 3 * 36


def test_a_tower_without_cls_shows_all_its_patches_and_a_pixel_shuffle_fewer():
    model = build(300, pixel_shuffle=2, **SIGLIP)
    shapes = {name: tuple(experts.shape) for name, experts in generate.routing_of(model, [picture(0), picture(1)]).items()}
    assert shapes == {"layer 0": (2, 36, 2), "layer 1": (2, 36, 2), "connector": (2, 9, 2)}


def test_dense_layers_and_those_behind_the_features_have_no_routing():
    assert list(generate.routing_of(build(300, n_experts=[0, 4, 4], connector=0, n_layers=3), [picture(0)])) == ["layer 1"]
    assert not generate.sees_by_experts(build(300, n_experts=[0, 0, 4], connector=0, n_layers=3))
    whole = build(300, n_layers=3)
    whole.config.vision.select_layer = -1                                           # the features are the last layer's output
    assert list(generate.routing_of(whole, [picture(0)])) == ["layer 0", "layer 1", "layer 2", "connector"]
    assert list(generate.routing_of(build(300, n_experts=0, connector=2), [picture(0)])) == ["connector"]


@pytest.fixture
def written(monkeypatch):
    """[text, ...] that draw_routing writes into its picture."""
    texts, draw = [], d.ImageDraw.ImageDraw.text

    def record(self, at, text, *a, **kw):
        texts.append(text)
        draw(self, at, text, *a, **kw)
    monkeypatch.setattr(d.ImageDraw.ImageDraw, "text", record)
    return texts


@pytest.fixture
def word_boxes(monkeypatch):
    """[(left, top, right, bottom, text), ...] of all that is written into a picture."""
    boxes, draw = [], d.ImageDraw.ImageDraw.text

    def record(self, at, words, fill, font, anchor="la"):
        if words:
            boxes.append((*self.textbbox(at, words, font, anchor=anchor), words))
        draw(self, at, words, fill, font, anchor=anchor)
    monkeypatch.setattr(d.ImageDraw.ImageDraw, "text", record)
    return boxes


def assert_words_apart(boxes, png):
    """No word leaves the picture or meets another."""
    width, height = Image.open(png).size
    for i, (a, b, c, e, words) in enumerate(boxes):
        assert a >= 0 and b >= 0 and c <= width and e <= height, words
        for a2, b2, c2, e2, more in boxes[:i]:
            assert c <= a2 or c2 <= a or e <= b2 or e2 <= b, (words, more)


def panel_at(pixels, row, column):
    """The pixels of a panel of draw_routing's picture."""
    y, x = generate.TOP + row * generate.STEP, generate.panel_left(column)
    return pixels[y:y + generate.PANEL, x:x + generate.PANEL]


def panels(texts):
    return [t for t in texts if re.fullmatch(r"layer \d+|connector", t)]


@pytest.mark.parametrize("images", [[picture(0)],
                                    [picture(0), picture(1).resize((90, 40)), picture(2).resize((300, 400)).convert("L")]])
def test_routing_picture_shows_every_image_and_layer(images, seer, tmp_path, written):
    generate.draw_routing(seer, images, str(tmp_path / "r.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]                         # no temporary left behind
    names = panels(written)
    assert sorted(set(names)) == ["connector", "layer 0", "layer 1"]
    with Image.open(tmp_path / "r.png") as png:
        rows = len(images) + 1                                                     # one more for the expert load
        assert png.format == "PNG" and png.width == 830 and rows * 144 <= png.height <= rows * 350
        pixels = np.asarray(png.convert("RGB"))
    for i in range(len(images)):                                                   # every panel is painted
        for j in range(4):
            assert len(np.unique(panel_at(pixels, i, j).reshape(-1, 3), axis=0)) > 20


def test_routing_picture_reads_image_files(seer, tmp_path):
    picture(0).save(tmp_path / "a.png")
    draw = lambda image, name: generate.draw_routing(seer, [image], str(tmp_path / name)) or (tmp_path / name).read_bytes()
    assert draw(str(tmp_path / "a.png"), "1.png") == draw(tmp_path / "a.png", "2.png") == draw(picture(0), "3.png")


@pytest.mark.parametrize("image", [picture(0), picture(1).resize((90, 40)), picture(2).resize((300, 400)).convert("L")])
def test_the_image_is_shown_as_the_tower_gets_it(image, seer, tmp_path, written):
    generate.draw_routing(seer, [image], str(tmp_path / "r.png"))
    pixels = panel_at(np.asarray(Image.open(tmp_path / "r.png").convert("RGB")), 0, 0)
    assert "image, 48 x 48" in written
    assert np.array_equal(pixels, np.repeat(np.repeat(pixels[::3, ::3], 3, 0), 3, 1))       # 48 x 48 squares of 3 x 3
    seen = torch.from_numpy(pixels[::3, ::3].copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (d.CLIP_MEAN, d.CLIP_STD))
    torch.testing.assert_close((seen - mean) / std, d.load_image(image, 48), atol=0.5 / 255 / 0.26 + 1e-4, rtol=0)


def test_another_normalisation_is_undone_in_the_picture(seer):
    half, image = (0.5, 0.5, 0.5), picture(1).resize((48, 48))
    wanted = d.PictureFormat(48, half, half)
    assert np.array_equal(generate.as_seen(d.load_image(image, wanted), wanted).resize((48, 48), Image.Resampling.NEAREST), image)


@pytest.mark.parametrize("light", [0, 120, 255])
def test_patches_are_painted_in_the_color_of_their_first_choice(light, seer, tmp_path):
    """Whatever the picture's brightness: black, grey or white."""
    plain = Image.new("RGB", (48, 48), (light, light, light))
    generate.draw_routing(seer, [plain], str(tmp_path / "r.png"))
    pixels, first = np.asarray(Image.open(tmp_path / "r.png").convert("RGB")).astype(int), generate.routing_of(seer, [plain])
    for column, name in enumerate(["layer 0", "layer 1", "connector"], 1):
        middles = panel_at(pixels, 0, column)[12::24, 12::24].reshape(36, 3)
        assert np.abs(middles - np.array(generate.EXPERT_COLORS)[first[name][0, :, 0]]).max() <= 2


def test_what_is_lighter_in_the_picture_is_lighter_in_the_patch():
    seen = Image.new("RGB", (144, 144), (40, 40, 40))
    seen.paste((200, 200, 200), (0, 0, 20, 20))
    seen.paste((0, 0, 0), (30, 0, 40, 20))
    painted = np.asarray(generate.paint_patches(seen, torch.zeros(36, dtype=torch.long), generate.EXPERT_COLORS[:1])).astype(int)
    assert painted[10, 10].sum() > painted[60, 60].sum() > painted[10, 35].sum()
    assert (painted.argmax(-1) == 0).all()                                         # all of it is red still


def test_the_patches_that_an_expert_is_surest_of(seer, tmp_path, monkeypatch):
    """Against the router's own probabilities: of each image the best patch whose first choice the expert is, then the best of these."""
    images = [picture(i) for i in range(5)]
    surveyed, inputs = generate.survey(seer, images), []
    seer.vision.layers[1].ffn.register_forward_pre_hook(lambda moe, args: inputs.append(args[0][:, 1:]))
    generate.routing_of(seer, images)
    p = (inputs[0] @ seer.vision.layers[1].ffn.router.T).softmax(-1)               # (5, 36, 4)
    load, sure, patch = surveyed["layer 1"]
    assert list(surveyed) == ["layer 0", "layer 1", "connector"] and sure.shape == patch.shape == (5, 4)
    wanted = []
    for e in range(4):
        best = []
        for i in range(5):
            mine = [(p[i, k, e].item(), k) for k in range(36) if p[i, k].argmax() == e]
            if mine:
                best.append((*max(mine), i))
                assert sure[i, e].item() == pytest.approx(max(mine)[0], abs=1e-4) and patch[i, e] == max(mine)[1]
            else:
                assert sure[i, e] == 0
        wanted.append([(i, k) for _, k, i in sorted(best, reverse=True)])
        assert generate.surest(sure[:, e], 3) == [i for i, _ in wanted[e][:3]]
    cut = []
    monkeypatch.setattr(generate, "cut_patch", lambda vision, image, side, k: cut.append((images.index(image), k)) or Image.new("RGB", (22, 22)))
    generate.draw_routing(seer, images[:1], str(tmp_path / "r.png"), images)
    counts = [sum(int((s > 0).sum()) for s in sure.T) for _, sure, _ in surveyed.values()]
    assert cut[counts[0]:counts[0] + counts[1]] == sum(wanted, []) and len(cut) == sum(counts)


def test_a_patch_is_cut_where_it_lies():
    image = Image.new("RGB", (48, 48))
    image.paste((255, 0, 0), (16, 8, 24, 16))                                      # column 2, row 1 of 6 x 6
    vision = build(300).config.vision
    reds = [k for k in range(36) if np.asarray(generate.cut_patch(vision, image, 6, k))[..., 0].min() > 250]
    assert reds == [1 * 6 + 2] and generate.cut_patch(vision, image, 6, 8).size == (22, 22)
    image.paste((255, 0, 0), (16, 16, 32, 32))                                     # behind a pixel shuffle there are 3 x 3 places
    reds = [k for k in range(9) if np.asarray(generate.cut_patch(vision, image, 3, k))[..., 0].min() > 250]
    assert reds == [4]


def test_behind_a_pixel_shuffle_the_connectors_places_are_squares_of_patches(tmp_path, monkeypatch):
    sides = []
    real = generate.cut_patch
    monkeypatch.setattr(generate, "cut_patch", lambda vision, image, side, k: sides.append((side, k)) or real(vision, image, side, k))
    generate.draw_routing(build(300, pixel_shuffle=2), [picture(0)], str(tmp_path / "r.png"))
    assert {side for side, _ in sides} == {6, 3} and max(k for side, k in sides if side == 3) <= 8


def test_without_pictures_the_decoders_routing_is_drawn_alone(tokenizer, tmp_path):
    both = build(tokenizer.get_vocab_size())
    upcycle(both, text=4)
    file = str(tmp_path / "r.png")
    assert generate.draw_experts(both, tokenizer, [prompt("Why?")], ["So."], file) == [file]


def test_the_load_counts_the_frames_that_the_model_saw(seer, tokenizer, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(generate, "draw_routing", lambda model, shown, png, images: counted.extend(images))
    sample = {"images": [], "video": [[picture(i) for i in range(20)]], "conversations": []}
    generate.draw_experts(seer, tokenizer, [sample], [""], str(tmp_path / "r.png"))
    assert len(counted) == 8


@pytest.mark.parametrize("n_experts", [8, 16])
def test_words_of_the_routing_picture_meet_no_others(n_experts, tmp_path, word_boxes):
    images = [picture(0), picture(1)]
    word_boxes.clear()                                                             # the signs in the pictures
    generate.draw_routing(build(300, n_experts=n_experts, connector=n_experts, n_layers=4), images, str(tmp_path / "r.png"))
    assert_words_apart(word_boxes, tmp_path / "r.png")


@pytest.mark.parametrize("n_layers, most", [(30, 5), (30, 3), (30, 1), (3, 5)])
def test_a_deep_model_shows_at_most_n_layers_spread_over_its_depth(n_layers, most, tmp_path, written):
    generate.draw_routing(build(300, n_layers=n_layers), [picture(0)], str(tmp_path / "r.png"), n_layers=most)
    shown = [int(name[6:]) for name in dict.fromkeys(panels(written)) if name != "connector"]
    assert len(shown) == min(most, n_layers - 1) and len(panels(written)) == 2 * (len(shown) + 1)      # once above, once below
    assert shown == sorted(shown) and shown[0] == 0 and (most == 1 or shown[-1] == n_layers - 2)
    assert Image.open(tmp_path / "r.png").width == 830 or most == 5               # three, and the connector, are as wide as the README


def test_expert_load_is_the_share_of_first_choices_over_the_population(seer, tmp_path, written):
    population = [picture(i) for i in range(6)]
    generate.draw_routing(seer, [picture(0)], str(tmp_path / "r.png"), population)
    shown = [int(t[:-1]) for t in written if re.fullmatch(r"\d+%", t)]
    routing = generate.routing_of(seer, population).values()
    expected = torch.stack([torch.stack([(r[..., 0] == e).float().mean() for e in range(4)]) for r in routing])        # (3, 4)
    numbers = [100 * share for share in expected.flatten().tolist() if share * generate.LOAD >= 12]       # where there is room for them
    assert len(shown) == len(numbers) >= 4 and all(abs(a - b) <= 0.51 for a, b in zip(shown, numbers))
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "r.png").convert("RGB")).copy())
    top = generate.TOP + generate.STEP + 30
    for column, shares in enumerate(expected, 1):
        line = pixels[top:top + generate.LOAD, generate.panel_left(column) + 30]     # from the bar's top to its foot
        for share, color in zip(shares, generate.EXPERT_COLORS):
            height = (line == torch.tensor(color)).all(1).sum()
            assert abs(height - share * generate.LOAD) < 2.1
    assert any("6 images" in t for t in written)


def test_a_dense_model_has_no_routing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="dense"):
        generate.draw_routing(build(300, n_experts=0, connector=0), [picture(0)], str(tmp_path / "r.png"))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Charts, and the loss of a run


@pytest.mark.parametrize("low, high", [(0, 2.37), (0, 1e-4), (1.003, 1.07), (-3, 5), (7, 7), (0, 0), (1, 6441), (0.1, 0.3), (0, 0.30000001)])
def test_ticks_are_few_round_numbers_that_enclose_the_data(low, high):
    ticks = generate.round_ticks(low, high)
    assert ticks[0] <= low + 1e-6 * (ticks[1] - ticks[0]) and ticks[-1] >= high - 1e-6 * (ticks[1] - ticks[0]) and 2 <= len(ticks) <= 7
    digits = {f"{b - a:.1e}"[:3] for a, b in zip(ticks, ticks[1:])}
    assert digits in ({"1.0"}, {"2.0"}, {"5.0"}) and all(len(f"{t:g}") <= 7 for t in ticks)


def test_the_running_mean_lies_in_the_data():
    """It is never late: a straight line stays as it is, to both ends, and a falling curve has as much above as below."""
    line = [(x, 5.0 - 0.01 * x) for x in range(300)]
    assert [y for _, y in generate.running_mean(line)] == pytest.approx([y for _, y in line])
    curve = [(x, 2 * 0.98 ** x) for x in range(300)]
    smooth = generate.running_mean(curve)
    assert smooth[0] == curve[0] and smooth[-1] == curve[-1] and [x for x, _ in smooth] == [x for x, _ in curve]
    assert max(abs(a / b - 1) for (_, a), (_, b) in zip(smooth, curve)) < 0.01
    noise = [(x, float(x % 2)) for x in range(300)]
    assert all(abs(y - 0.5) < 0.1 for _, y in generate.running_mean(noise)[10:-10])
    assert generate.running_mean([]) == [] and generate.running_mean([(3, 1.5)]) == [(3, 1.5)]


def test_a_chart_s_points_lie_where_its_ticks_say(monkeypatch):
    page, draw = generate.blank_page(830, 300)
    texts, lines = {}, []
    write, line = draw.text, draw.line
    monkeypatch.setattr(draw, "text", lambda at, words, *a, **kw: texts.setdefault(str(words), at) and write(at, words, *a, **kw))
    monkeypatch.setattr(draw, "line", lambda points, color, *a, **kw: lines.append((points, color)) or line(points, color, *a, **kw))
    points = [(100, 3.0), (200, 0.5), (400, 1.25), (700, 99.0)]
    generate.line_chart(draw, (0, 0, 830, 300), [("the curve", (255, 0, 0), 2, points)], "A title", "steps", "loss", (0, 4))
    assert {"A title", "steps", "loss", "the curve", "0", "1", "4", "200", "700"} <= texts.keys()
    (drawn,) = [points for points, color in lines if color == (255, 0, 0)]
    x = lambda value: texts["200"][0] + (value - 200) * (texts["700"][0] - texts["200"][0]) / 500
    y = lambda value: texts["0"][1] + min(value, 4) * (texts["4"][1] - texts["0"][1]) / 4        # what lies above is drawn at the edge
    assert np.array(drawn) == pytest.approx(np.array([(x(a), y(b)) for a, b in points]))
    pixels = np.asarray(page)
    for px, py in drawn:                                                           # few points have marks
        assert tuple(pixels[round(py), round(px)]) == (255, 0, 0)


@pytest.mark.parametrize("curves", [[], [("", "red", 1, [])], [("one", "red", 1, [(5, 0.25)])], [("level", "red", 1, [(0, 2.0), (9, 2.0)])]])
def test_a_chart_of_little_is_drawn_all_the_same(curves, word_boxes, tmp_path):
    page, draw = generate.blank_page(276, 210)
    generate.line_chart(draw, (0, 0, 276, 210), curves, "little", "step")
    generate.save_png(page, str(tmp_path / "c.png"))
    assert_words_apart(word_boxes, tmp_path / "c.png")


def run_log(path, n_experts, stages=3):
    """A log of stages of 100 steps, the last with experts (if any) in two layers and the connector."""
    rng, rows = np.random.default_rng(0), []
    for stage in range(1, stages + 1):
        for step in range(100):
            row = {"stage": stage, "step": step, "lm": 2 / (step + 1) + rng.random() / 10, "loss": 9.0}
            if stage == stages and n_experts:
                row |= {f"{part}/{kind}": rng.random() for part in ("vision", "connector") for kind in ("balance", "z")}
                row["load"] = {name: rng.dirichlet([5] * n_experts).tolist() for name in ("vision 0", "vision 1", "connector 0")}
            rows.append(row)
            if step % 50 == 49:
                rows.append({"stage": stage, "step": step, "val_loss": 0.5})
    rows[3]["lm"] = float("nan")
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    return str(path / "log.jsonl"), rows


def test_the_numbers_of_the_loss_picture_are_the_log_s(tmp_path, monkeypatch):
    log, rows = run_log(tmp_path, 4)
    charts, loads = {}, []
    monkeypatch.setattr(generate, "line_chart", lambda draw, box, curves, title, *a, **kw: charts.update({title.split(": loss ")[0]: curves}))
    monkeypatch.setattr(generate, "bars", lambda draw, box, columns, colors: loads.append(columns))
    generate.draw_curves(log, str(tmp_path / "loss.png"))
    assert list(charts) == ["stage 1", "stage 2", "stage 3", "stage 3: load-balancing loss", "stage 3: z loss"]
    for stage in (1, 2, 3):
        each, mean, held_out = charts[f"stage {stage}"]
        mine = [r for r in rows if r["stage"] == stage]
        wanted = [(r["step"] + 1, r["lm"]) for r in mine if r.get("lm") == r.get("lm") and "lm" in r]
        assert each[3] == wanted[len(wanted) // 50:] and mean[3] == generate.running_mean(each[3])        # without the first fiftieth
        assert held_out[3] == [(50, 0.5), (100, 0.5)]
    for title, kind in (("load-balancing loss", "balance"), ("z loss", "z")):
        curves = charts[f"stage 3: {title}"]
        assert [name for name, *_ in curves] == ["", "", "vision", "connector"]
        for curve, part in zip(curves, ("vision", "connector")):
            assert curve[3] == [(r["step"] + 1, r[f"{part}/{kind}"]) for r in rows if f"{part}/{kind}" in r]
    for columns, name in zip(loads, ("vision 0", "vision 1", "connector 0"), strict=True):
        logged = np.array([r["load"][name] for r in rows if "load" in r])          # a bar is the mean of five steps
        assert np.array(columns) == pytest.approx(logged.reshape(20, 5, 4).mean(1), abs=1e-6)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("n_experts", [0, 4, 16])
def test_the_loss_picture_is_legible_for_runs_of_all_kinds(stages, n_experts, tmp_path, word_boxes):
    generate.draw_curves(run_log(tmp_path, n_experts, stages)[0], str(tmp_path / "loss.png"))
    with Image.open(tmp_path / "loss.png") as png:
        assert png.size == (830, 210 if n_experts == 0 else 630)
        pixels = np.asarray(png.convert("RGB"))
    assert_words_apart(word_boxes, tmp_path / "loss.png")
    for e in range(n_experts):                                                     # every expert can be seen in a load
        assert (pixels[480:] == generate.EXPERT_COLORS[e]).all(-1).sum() > 200


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_main_answers_draws_and_measures(folder, tmp_path, capsys):
    picture(0).save(tmp_path / "a.png")
    generate.main(["--model", folder, "--image", str(tmp_path / "a.png"), "--prompt", "What color is the ring?", "--device", "cpu",
                   "--max-new-tokens", "5", "--routing", str(tmp_path / "r.png"), "--eval-drawn", "9"])
    model, tokenizer = load(folder)
    reply = generate.answer(model, tokenizer, [prompt("<image>\nWhat color is the ring?", picture(0))], max_new_tokens=5)[0]
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(reply.rstrip("\ufffd").strip()) and "of     9" in shown and (tmp_path / "r.png").exists()


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"), (["--prompt", "x", "--temperature", "-1"], "temperature"),
    (["--prompt", "x", "--top-p", "0"], "top_p"), (["--routing", "r.png"], "--image"),
    (["--prompt", "x", "--image", "gone.png"], "gone.png"), (["--routing", "r.png", "--image", "gone.png"], "gone.png")])
def test_wrong_flags_are_value_errors_in_words(flags, message, folder):
    with pytest.raises(ValueError, match=message):
        generate.main(["--model", folder, "--device", "cpu", *flags])


def test_a_folder_without_tokenizer_is_an_error_in_words(tmp_path):
    save(build(300), str(tmp_path / "m"))
    with pytest.raises(ValueError, match="tokenizer"):
        generate.main(["--model", str(tmp_path / "m"), "--prompt", "Why?", "--device", "cpu"])


@pytest.mark.parametrize("more", [["--prompt", "What?"], ["--routing", "r.png"]])
def test_a_language_model_shown_an_image_is_an_error_in_words(more, tokenizer, tmp_path):
    text = dict(vocab_size=320, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48)
    save(CuMo(Config(vision=None, text=text, template="tiny")), str(tmp_path / "m"), tokenizer)
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="image"):
        generate.main(["--model", str(tmp_path / "m"), "--image", str(tmp_path / "a.png"), "--device", "cpu", *more])


@pytest.mark.parametrize("bad", ["missing-model", "bad.png"])
def test_the_program_fails_with_one_line_on_stderr(bad, folder, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    flags = ["--model", folder, "--image", str(tmp_path / bad)] if bad == "bad.png" else ["--model", str(tmp_path / bad)]
    run = subprocess.run([sys.executable, str(ROOT / "generate.py"), *flags, "--prompt", "What?", "--device", "cpu"],
                         capture_output=True, text=True, timeout=120)
    lines = run.stderr.strip().splitlines()
    assert run.returncode == 1 and run.stdout == "" and len(lines) == 1 and bad in lines[0]


def test_before_any_training_the_error_says_to_train_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)                      # to import it would fail
    with pytest.raises(ValueError, match="^out/tiny: no model folder.*python train.py"):
        generate.main(["--prompt", "Why?", "--device", "cpu"])


def test_a_config_may_begin_with_a_byte_order_mark(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text("\ufeff" + config.read_text(), encoding="utf-8")
    assert load(str(tmp_path / "m"))[0].config == load(folder)[0].config


@pytest.mark.parametrize("flags, message", [
    (["--images", "pic.png", "--prompt", "hi"], "--images acts with --eval only.*--image"),
    (["--out", "a", "--prompt", "hi"], "--out acts with --eval"),
    (["--serve", "--prompt", "hi"], "--prompt does not go with --serve"), (["--serve", "--temperature", "3"], "the window's goes up to 2"),
    (["--eval", "", "--out", "a"], "--eval is empty"), (["--routing", "", "--image", "a.png"], "--routing is empty"),
    (["--video", "clip.mp4", "--prompt", "hi"], "clip.mp4: no folder of frames; `ffmpeg"),
    (["--answers", "a"], "--answers acts with --score"), (["--allow-missing", "--prompt", "hi"], "--allow-missing"), (["--batch", "3"], "--batch"),
    (["--suffix", "x"], "--suffix"), (["--eval", "q", "--out", "a", "--image", "x.png"], "--image acts"),
    (["--eval", "q", "--out", "a", "--audio", "x.wav", "--routing", "r.png"], "--audio acts"), (["--eval-drawn", "3", "--images", "x"], "--images"),
    (["--score", "exact", "--answers", "a", "--annotations", "b", "--model", "m"], "--model acts"),
    (["--write-drawn", "d", "--prompt", "x"], "--prompt"),
    (["--score", "exact", "--answers", "a", "--annotations", "b", "--eval-drawn", "3"], "--eval-drawn"), (["--prompt", " "], "--prompt is empty"),
    (["--prompt", "x", "--top-p", "0.5"], "--temperature"), (["--prompt", "x", "--seed", "1"], "--temperature"),
    (["--prompt", "x", "--batch", "16"], "--batch")])                              # given, though it is the default
def test_a_flag_that_would_be_ignored_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        generate.main(flags)


@pytest.mark.parametrize("flags, message", [
    (["--device", "abc"], "--device abc"), (["--device", "cuda"], "--device cuda"), (["--device", "meta"], "--device meta"),
    (["--temperature", "nan"], "temperature"), (["--temperature", "inf"], "temperature"), (["--top-p", "nan"], "top_p"),
    (["--max-new-tokens", "1" + "0" * 20], "--max-new-tokens"), (["--seed", "-1"], "--seed"), (["--seed", "1" + "0" * 20], "--seed"),
    (["--eval-drawn", "0"], "--eval-drawn"), (["--eval-drawn", "-3"], "--eval-drawn"),
    (["--template", "nope"], "--template nope: known are tiny, mistral"), (["--template", "plain"], "--template plain: known are tiny"),
    (["--template", "chatml"], "does not know <.im_start.>.*--template"),
    (["--eval", "q", "--out", "a", "--batch", "1" + "0" * 20], "--batch"),
    (["--prompt", "half \ud83d"], "half a character")])
def test_flags_of_a_wrong_kind_are_value_errors_in_words(flags, message, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if flags == ["--device", "cuda"] and torch.cuda.device_count():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=message):
        generate.main(["--model", folder, *([] if "--prompt" in flags or "--eval" in flags else ["--prompt", "x"]), *flags])


def test_torchrun_is_for_files_of_questions(monkeypatch):
    monkeypatch.setattr(generate, "WORLD", 2)
    for more in ([], ["--eval", "q.jsonl", "--out", "a.jsonl"]):                    # which each process would ask anew
        with pytest.raises(ValueError, match="torchrun shares out the questions of --eval"):
            generate.main(["--eval-drawn", "2", *more])


def test_drawn_pictures_are_kept_only_to_be_drawn_from(folder, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(generate, "evaluate", lambda *_, asked, **__: kept.append(asked) or {"color": [1, 1]})
    generate.main(["--model", folder, "--device", "cpu", "--eval-drawn", "1"])
    assert kept == [None]


def test_a_template_that_is_given_holds_over_the_folders(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "answer", lambda model, *_, **options: seen.append(model.config.template) or [""] * 2)
    for flags in ([], ["--template", "vicuna"]):
        generate.main(["--model", folder, "--device", "cpu", "--eval-drawn", "2", *flags])
    assert seen == [load(folder)[0].config.template, "vicuna"] and seen[0] != "vicuna"


def test_flags_that_are_given_reach_the_drawn_questions(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(generate, "answer", lambda m, t, samples, **options: calls.append((len(samples), options)) or [""] * len(samples))
    for flags in ([], ["--batch", "4", "--max-new-tokens", "3", "--temperature", "0.5", "--seed", "2", "--compile"]):
        generate.main(["--model", folder, "--device", "cpu", "--eval-drawn", "6", *flags])
    (n, default), (first, given), (second, _) = calls
    assert n == 6 and default["max_new_tokens"] == 16 and default["temperature"] == 0 and not default["compile"]
    assert (first, second) == (4, 2) and given["max_new_tokens"] == 3 and given["temperature"] == 0.5 and given["compile"]
    assert given["generator"].initial_seed() == 2


def test_the_folder_of_a_picture_of_the_routing_is_made_before_anything_is_asked(folder, tmp_path, monkeypatch):
    def ask(*_, **__):
        assert (tmp_path / "new").is_dir()
        raise KeyboardInterrupt
    monkeypatch.setattr(generate, "evaluate_and_print", ask)
    with pytest.raises(KeyboardInterrupt):
        generate.main(["--model", folder, "--eval-drawn", "2", "--routing", str(tmp_path / "new" / "r.png"), "--device", "cpu"])
