"""generate.py's pictures of the decoder's routing: counts worked out by hand, what must add up, colours at their places, the command line.

And hearing on the command line: sounds and videos in a prompt, a chat and a question file."""
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data as d
import generate
from generate import MODALITIES, DecoderRouting, decoder_routing, draw_decoder_routing, shares
from kernels import Routing
from model import Config, CuMo, Output
from upcycle import load, save
from test_audio import write_wav
from test_generate import assert_words_apart, build, picture, prompt, word_boxes, written       # noqa: F401 (the last two are fixtures)

TEXT = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, rope_theta=1e4, n_experts=[4, 0, 3], top_k=2)
EAR = dict(n_mels=80, n_frames=150, dim=32, n_layers=1, n_heads=4, ffn_dim=64, n_queries=4, n_query_layers=1)


def talker(vocab_size, vision_experts=0, audio=None, **text):
    """A small model with loud weights whose decoder's layers 0 and 2 have 4 and 3 experts."""
    torch.manual_seed(0)
    model = CuMo(Config(vision=dict(image_size=48, patch_size=8, dim=32, n_layers=2, n_heads=2, ffn_dim=48, n_experts=vision_experts),
                        text=TEXT | dict(vocab_size=vocab_size) | text, audio=audio, template="tiny"))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p[0].numel() ** -0.5) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return d.train_tokenizer([t["value"] for s in d.Drawn("chat", 50) for t in s["conversations"]], 320)


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):
    """Model folders "tiny" (experts in the decoder), "both" (also where it sees), "ears", "dense", "words"; questions and their images."""
    path, size = tmp_path_factory.mktemp("world"), tokenizer.get_vocab_size()
    for name, model in (("tiny", talker(size)), ("both", talker(size, vision_experts=4)), ("ears", talker(size, audio=EAR)),
                        ("dense", build(size, n_experts=0, connector=0)),
                        ("words", CuMo(Config(vision=None, text=TEXT | dict(vocab_size=size), template="tiny")))):
        save(model, str(path / name), tokenizer)
    for i in range(4):
        picture(i).save(path / f"{i}.png")
    write_wav(path / "a.wav", *d.draw_sound(d.make_sound(3)))
    (path / "film").mkdir()
    for i in range(3):
        picture(i).save(path / "film" / f"{i}.png")
    rows = [{"question_id": i, "image": [f"{j % 4}.png" for j in range(i, i + i % 3)], "text": f"Where is it, {'really ' * i}?"}
            for i in range(5)]
    (path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def asked():
    """Samples of text, one and two images, of many lengths, and replies to them."""
    samples = [prompt("<image>\nWhat color is the ring?", picture(0)), prompt("Why?"),
               prompt("<image><image>\nThe same?", picture(1), picture(2)),
               prompt("Where is the star? " * 5), prompt("<image>\nWho?", picture(3))]
    return samples, ["red", "", "a large blue cross at the top left", "two", "no sign"]


def run(world, *flags):
    generate.main(["--model", str(world / flags[0]), "--device", "cpu", "--max-new-tokens", "6", *map(str, flags[1:])])


def size_of(file):
    with Image.open(file) as png:
        assert png.format == "PNG"
        return png.size


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_a_case_counted_by_hand(tokenizer, monkeypatch):
    """Rows "t I A t" and "t t PAD PAD" through two layers of 3 and 2 experts; the second layer drops two choices."""
    model = talker(tokenizer.get_vocab_size(), n_layers=2, n_experts=[3, 2])
    tokens = torch.tensor([[5, d.IMAGE, d.AUDIO, 6], [7, 8, d.PAD, d.PAD]])
    first = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [0, 1], [1, 0], [0, 1], [0, 1]])
    second = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]])
    real = (tokens != d.PAD).flatten().float().unsqueeze(1)                        # (8, 1): PAD's weights are 0
    weights = torch.tensor([[.6, .4], [1, 0], [.6, .4], [.6, .4], [.6, .4], [0, 1], [0, 0], [0, 0]])
    zero, passed = torch.zeros(()), []

    def forward(self, given, **senses):
        passed.append((self.training, torch.is_grad_enabled(), senses))
        routing = [Routing(real.expand(8, 2) * 0.5, first, zero, zero), Routing(weights, second, zero, zero)]
        return Output(None, None, {}, None, {"text": routing})
    monkeypatch.setattr(generate, "tokens_of", lambda *_: tokens)
    monkeypatch.setattr(CuMo, "forward", forward)
    model.train()
    stats = decoder_routing(model, tokenizer, [prompt("a"), prompt("b")], ["c", "d"])
    assert passed == [(False, False, {})] and model.training
    assert stats.tokens == [4, 1, 1] and stats.prompts == 2 and stats.layers == [0, 1] and stats.n_experts == [3, 2]
    assert stats.kept[0].T.tolist() == [[4, 3, 1], [0, 1, 1], [1, 0, 1]]
    assert stats.kept[1].T.tolist() == [[3, 4, 0], [0, 1, 0], [1, 1, 0]]
    assert stats.dropped.tolist() == [[0, 0, 0], [1, 1, 0]]
    assert stats.pathways == [Counter({(0, 0): 3, (1, 0): 1}), Counter({(1, 1): 1}), Counter({(2, 1): 1})]
    assert stats.top() == [((0, 0), 3 / 6), ((1, 0), 1 / 6), ((1, 1), 1 / 6), ((2, 1), 1 / 6)] and stats.top(1, 0) == [((0, 0), 0.75)]
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b))
    close(shares(stats.kept.sum(2), 1), [[5 / 12, 4 / 12, 3 / 12], [4 / 10, 6 / 10, 0]])
    close(shares(stats.kept, 2)[0], [[4 / 5, 0, 1 / 5], [3 / 4, 1 / 4, 0], [1 / 3, 1 / 3, 1 / 3]])
    close(shares(stats.kept, 1)[1].T, [[3 / 7, 4 / 7, 0], [0, 1, 0], [1 / 2, 1 / 2, 0]])
    stats.add(decoder_routing(model, tokenizer, [prompt("a"), prompt("b")], ["c", "d"]))
    assert stats.tokens == [8, 2, 2] and stats.prompts == 4 and int(stats.dropped.sum()) == 4


def adds_up(stats, samples):
    for m, n in enumerate(stats.tokens):
        assert ((stats.kept[:, :, m].sum(1) + stats.dropped[:, m]) == n * stats.top_k).all()
    assert stats.tokens[1] == 36 * sum(len(s["images"]) for s in samples) and stats.prompts == len(samples)
    assert (stats.kept[1, 3:] == 0).all()                                          # the second layer has 3 experts
    for counts, dim in ((stats.kept.sum(2), 1), (stats.kept, 1), (stats.kept, 2)):
        torch.testing.assert_close(shares(counts, dim).sum(dim), (counts.sum(dim) > 0).float())
    for modality in (None, 0, 1):
        paths = stats.top(10 ** 6, modality)
        assert abs(sum(share for _, share in paths) - 1) < 1e-9 and all(0 <= a < 4 and 0 <= b < 3 for (a, b), _ in paths)
        assert [share for _, share in paths] == sorted((share for _, share in paths), reverse=True)
        assert stats.top(2, modality) == paths[:2]


def test_counts_add_up_and_do_not_depend_on_the_batch(tokenizer, asked):
    model, (samples, replies) = talker(tokenizer.get_vocab_size()), asked
    whole = decoder_routing(model, tokenizer, samples, replies)
    adds_up(whole, samples)
    ids = [d.encode_chat(s["conversations"] + [{"from": "gpt", "value": r}], tokenizer, "tiny", 36)[0] for s, r in zip(samples, replies)]
    assert whole.tokens == [sum(i >= 0 for row in ids for i in row), 36 * 4, 0] and not whole.dropped.any()
    cut = DecoderRouting(model.config.text)
    for i in range(5):
        cut.add(decoder_routing(model, tokenizer, samples[i:i + 1], replies[i:i + 1]))
    parts = decoder_routing(model, tokenizer, samples[:2], replies[:2])
    parts.add(decoder_routing(model, tokenizer, samples[2:], replies[2:]))
    for other in (cut, parts):
        assert torch.equal(other.kept, whole.kept) and other.pathways == whole.pathways and other.prompts == 5


def test_counts_are_those_of_the_routers(tokenizer, asked):
    model, inputs = talker(tokenizer.get_vocab_size()), []
    model.text.layers[0].ffn.register_forward_pre_hook(lambda moe, args: inputs.append(args))
    stats = decoder_routing(model, tokenizer, *asked)
    x, real = inputs[0]
    experts = (x @ model.text.layers[0].ffn.router.T).topk(2, -1).indices[real]
    assert torch.equal(torch.bincount(experts.flatten(), minlength=4), stats.kept[0].sum(1))
    first = Counter(experts[:, 0].tolist())
    assert first == sum((Counter({path[0]: n}) for paths in stats.pathways for path, n in paths.items()), Counter())


def test_drops_over_the_capacity_are_counted_by_modality(tokenizer, asked):
    model = talker(tokenizer.get_vocab_size(), eval_capacity_factor=0.5)
    stats = decoder_routing(model, tokenizer, *asked)
    adds_up(stats, asked[0])
    n, total = sum(stats.tokens), stats.dropped.sum(1)
    assert (total >= n * 2 - torch.tensor([4 * -(-n // 4), 3 * -(-n // 3)])).all() and (stats.dropped[:, :2] > 0).all()
    assert (stats.kept.sum(2).amax(1) <= torch.tensor([-(-n // 4), -(-n // 3)])).all()      # capacity: N / E * K * 0.5


def test_sounds_are_a_modality(tokenizer):
    model, sound = talker(tokenizer.get_vocab_size(), audio=EAR), d.draw_sound(d.make_sound(1))
    sample = prompt("<image>\n<audio><audio>\nSo?", picture(0)) | {"audio": [sound, sound]}
    stats = decoder_routing(model, tokenizer, [sample], ["red"])
    assert stats.tokens[1:] == [36, 8] and (stats.kept.sum(1)[:, 2] == 16).all()


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def made(n_experts, n_modalities, seed=0, n=100):
    """Counts of random paths, with a favourite path per modality."""
    rng = np.random.default_rng(seed)
    stats = DecoderRouting(Config(vision=None, text=dict(n_layers=len(n_experts), n_experts=n_experts)).text)
    for m in range(n_modalities):
        favourite = [int(rng.integers(e)) for e in n_experts]
        for _ in range(n):
            path = tuple(favourite if rng.random() < 0.5 else [int(rng.integers(e)) for e in n_experts])
            stats.pathways[m][path] += 1
            for layer, e in enumerate(path):
                stats.kept[layer, e, m] += 1
                stats.kept[layer, (e + 1) % n_experts[layer], m] += 1
    stats.prompts = 7
    return stats


@pytest.mark.parametrize("n_experts, n_modalities", [([2], 1), ([4, 4, 4], 2), ([4] * 16, 3), ([8] * 16, 1), ([16] * 16, 3), ([4, 2, 8], 3), ([4] * 40, 2)])
def test_pictures_of_all_sizes(n_experts, n_modalities, tmp_path, word_boxes):
    draw_decoder_routing(made(n_experts, n_modalities), str(tmp_path / "r.png"))
    width, height = size_of(tmp_path / "r.png")
    assert width == 830 and 450 <= height <= 1000 and [p.name for p in tmp_path.iterdir()] == ["r.png"]
    assert any(f"{100 * n_modalities:,} tokens" in t and "7 prompts" in t for *_, t in word_boxes)
    assert_words_apart(word_boxes, tmp_path / "r.png")


def test_bars_have_their_experts_and_modalitys_colors(tmp_path):
    stats = DecoderRouting(Config(vision=None, text=dict(n_layers=4, n_experts=[0, 2, 0, 2], top_k=1)).text)
    stats.kept[0] = torch.tensor([[30, 0, 0], [0, 10, 0]])                         # layer 1: text at expert 0, image at expert 1
    stats.kept[1] = torch.tensor([[0, 0, 0], [30, 10, 0]])                         # layer 3: all at expert 1
    stats.pathways[0][0, 1], stats.pathways[1][1, 1] = 30, 10
    draw_decoder_routing(stats, str(tmp_path / "r.png"))
    pixels = np.asarray(Image.open(tmp_path / "r.png").convert("RGB"))
    x = [96 + 297 // 2 - 40, 96 + 297 + 297 // 2 - 40]                             # beside the bars' middles, where percentages stand
    red, blue, text, image = *generate.EXPERT_COLORS[:2], MODALITIES["text"], MODALITIES["image"]
    at = lambda x, y: tuple(int(v) for v in pixels[y, x])
    assert [at(x[0], 154 + y) for y in (3, 17, 23, 77)] == [blue, blue, red, red]            # all tokens: 75% red from below
    assert [at(x[1], 154 + y) for y in (3, 77)] == [blue, blue]
    assert [at(x[i], 246 + y) for y in (20, 92 + 20) for i in (0, 1)] == [red, blue, blue, blue]       # text, then image
    top = 246 + 2 * 92 + 72
    assert [at(x[i], top + y) for y in (9, 29) for i in (0, 1)] == [red, blue, blue, blue]   # the pathways 0-1 and 1-1,
    assert at(708, top + 9) == text and at(708, top + 29) == image                           # of text, then of images


def test_the_pathways_shown_are_the_most_used(tmp_path, written):
    stats = made([4] * 3, 2, n=2000)
    draw_decoder_routing(stats, str(tmp_path / "r.png"))
    name = lambda path: "-".join(map(str, path))
    table = written[[i for i, t in enumerate(written) if t.startswith("Pathways")][0] + 2 + 3:]     # behind "layer" and three numbers
    rows = [table[i:i + 4] for i in range(0, len(table), 4)]                        # three cells, and the share beside them
    shown = [(share, "-".join(cells)) for *cells, share in rows]
    colored = [(f"{share:.1%} of {what}", name(path)) for m, what in ((0, "text"), (1, "image")) for path, share in stats.top(2, m)]
    assert shown[:4] == colored and len(shown) == 10
    rest = [(f"{share:.1%} of all", name(path)) for path, share in stats.top(20) if name(path) not in [p for _, p in colored]]
    assert shown[4:] == rest[:6]


def test_nothing_counted_is_an_error_in_words(tmp_path):
    for stats in (DecoderRouting(Config(vision=None, text=dict(n_layers=2, n_experts=4)).text), DecoderRouting(Config().text)):
        with pytest.raises(ValueError, match="no routing to draw"):
            draw_decoder_routing(stats, str(tmp_path / "r.png"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_a_picture_from_an_image_and_a_prompt_or_the_usual_one(world, tmp_path, capsys, written):
    run(world, "tiny", "--image", world / "0.png", "--routing", tmp_path / "a.png")
    shown = capsys.readouterr().out
    model, tokenizer = load(str(world / "tiny"))
    reply = generate.answer(model, tokenizer, [prompt("<image>\nDescribe the scene.", picture(0))], max_new_tokens=6)[0]
    assert shown.startswith("> Describe the scene.") and reply.rstrip("\ufffd").strip() in shown and f"wrote {tmp_path / 'a.png'}" in shown
    turns = [{"from": "human", "value": "<image>\nDescribe the scene."}, {"from": "gpt", "value": reply}]
    n = len(d.encode_chat(turns, tokenizer, "tiny", 36)[0])
    assert any(f"{n} tokens" in t and "image 36" in t and "1 prompt" in t for t in written)
    run(world, "tiny", "--image", world / "0.png", "--prompt", "Who?", "--routing", tmp_path / "b.png")
    run(world, "words", "--prompt", "Who?", "--routing", tmp_path / "c.png")       # no image needed
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"} and size_of(tmp_path / "b.png")[0] == 830


def test_experts_in_both_places_give_two_pictures(world, tmp_path, capsys):
    run(world, "both", "--image", world / "0.png", "--image", world / "1.png", "--routing", tmp_path / "r.v1.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.v1-text.png", "r.v1.png"]
    assert capsys.readouterr().out.count("wrote") == 2
    assert size_of(tmp_path / "r.v1-text.png")[0] == size_of(tmp_path / "r.v1.png")[0] == 830


def test_an_evaluation_is_averaged(world, tmp_path, written, capsys):
    flags = ["--eval", world / "q.jsonl", "--images", world, "--out", tmp_path / "a.jsonl", "--routing", tmp_path / "r.png"]
    run(world, "both", *flags, "--batch", 2)
    title = [t for t in written if "5 prompts" in t]
    assert len(title) == 1 and f"image {36 * (1 + 2 + 0 + 1)}" in title[0] and any("4 images" in t for t in written)
    assert "wrote 5 answers" in capsys.readouterr().out
    pictures = [(tmp_path / name).read_bytes() for name in ("r.png", "r-text.png")]
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines, lines[:2]):                                                # answers of an earlier run count as well
        (tmp_path / "a.jsonl").write_text("".join(kept))
        run(world, "both", *flags, "--batch", 5)
        assert [(tmp_path / name).read_bytes() for name in ("r.png", "r-text.png")] == pictures
    assert (tmp_path / "a.jsonl").read_text() == "".join(lines)


def test_processes_add_their_shares_up(asked, tokenizer, tmp_path, monkeypatch):
    model, (samples, replies), sent = talker(tokenizer.get_vocab_size(), vision_experts=4), asked, []
    draw = lambda name, *which: generate.draw_experts(model, tokenizer, *([x[i] for i in which] for x in (samples, replies)),
                                                      str(tmp_path / name), [picture(0)])
    assert draw("alone.png", *range(5)) == [str(tmp_path / "alone.png"), str(tmp_path / "alone-text.png")]

    def gather(parts, mine):                                                       # a process with a share, and one without a question
        sent.append(mine)
        parts[:] = sent[::-1] + [([], DecoderRouting(model.config.text))] * (3 - len(sent))
    monkeypatch.setattr(generate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(generate.dist, "all_gather_object", gather)
    monkeypatch.setattr(generate, "RANK", 1)
    assert draw("none.png", 1, 3) == [] and not (tmp_path / "none.png").exists()
    monkeypatch.setattr(generate, "RANK", 0)
    draw("two.png", 0, 2, 4)
    for name in ("two", "two-text"):
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / f"{name.replace('two', 'alone')}.png").read_bytes()


def test_drawn_questions_are_averaged(world, tmp_path, written, capsys):
    run(world, "tiny", "--eval-drawn", 9, "--routing", tmp_path / "r.png")
    assert any("9 prompts" in t and f"image {9 * 36}" in t for t in written) and "of     9" in capsys.readouterr().out
    run(world, "both", "--eval-drawn", 4, "--routing", tmp_path / "s.png")
    assert any("4 images" in t for t in written)
    run(world, "ears", "--eval-drawn", 4, "--routing", tmp_path / "t.png")         # of images, of sounds, of both
    assert any("12 prompts" in t and f"image {8 * 36}, audio {8 * 4})" in t for t in written)
    assert "sounds" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("model, flags, message", [
    ("dense", ["--image", "0.png"], "dense"), ("dense", ["--eval-drawn", "3"], "dense"), ("tiny", [], "--image.*--prompt"),
    ("both", [], "--image"), ("words", ["--image", "0.png"], "cannot see"), ("words", [], "--prompt"),
    ("words", ["--prompt", " "], "--prompt"),
    ("tiny", ["--image", "gone.png"], "gone.png"), ("tiny", ["--audio", "a.wav"], "cannot hear"),
    ("ears", ["--audio", "gone.wav"], "gone.wav"),
    ("tiny", ["--eval", "q.jsonl", "--images", ".", "--out", "x.jsonl", "--eval-drawn", "3"], "one of them")])
def test_bad_input_is_a_value_error_in_words(model, flags, message, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(ValueError, match=message):
        run(world, model, *flags, "--routing", str(tmp_path / "r.png"))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Hearing, and videos


def test_sounds_and_videos_are_answered_and_kept_through_a_chat(world, monkeypatch, capsys):
    model, tokenizer = load(str(world / "ears"))
    encoded = Counter()
    see, hear = model.encode_images, model.encode_audio
    monkeypatch.setattr(model, "encode_images", lambda *a: encoded.update(images=len(a[0])) or see(*a))
    monkeypatch.setattr(model, "encode_audio", lambda mel: encoded.update(audio=len(mel)) or hear(mel))
    lines = iter(["What?", "And?", None])
    monkeypatch.setattr("builtins.input", lambda _: next(lines) or (_ for _ in ()).throw(EOFError))
    film = [[str(world / "film" / f"{i}.png") for i in range(3)]]
    sample = {"images": [picture(3)], "video": film, "audio": [str(world / "a.wav")]}
    said = generate.chat(model, tokenizer, sample["images"], None, sample["audio"], film, max_new_tokens=6)
    assert encoded == {"images": 4, "audio": 1} and said[0]["value"] == "<image>\n<video>\n<audio>\nWhat?" and len(said) == 4
    for n in (1, 3):
        again = generate.answer(model, tokenizer, [sample | {"conversations": said[:n]}], max_new_tokens=6)
        assert again == [said[n]["value"]]
    silent = generate.answer(model, tokenizer, [prompt("<image>\nWhat?", picture(3))], max_new_tokens=6)
    mixed = generate.answer(model, tokenizer, [prompt("<image>\nWhat?", picture(3)), sample | {"conversations": said[:1]}, prompt("Why?")],
                            max_new_tokens=6)
    assert mixed[:2] == [silent[0], said[1]["value"]]


def test_the_command_line_hears_and_watches(world, tmp_path, capsys, written):
    run(world, "ears", "--audio", world / "a.wav", "--video", world / "film", "--video", world / "0.png", world / "1.png",
        "--prompt", "What?")
    assert len(capsys.readouterr().out) > 1
    run(world, "ears", "--audio", world / "a.wav", "--routing", tmp_path / "r.png")
    assert "> Describe the sound." in capsys.readouterr().out and any("audio 4)" in t for t in written)


def test_question_files_hold_sounds_and_videos(world, tmp_path):
    rows = [{"question_id": 1, "audio": "a.wav", "video": "film", "text": "What?"}, {"question_id": 2, "text": "An audio tag?"},
            {"question_id": 3, "video": [["0.png", "1.png"], "film"], "text": "<video> or <video>?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = generate.read_questions(str(tmp_path / "q.jsonl"), str(world))
    first, _, last = questions.values()
    assert first["conversations"][0]["value"] == "<video>\n<audio>\nWhat?" and [len(v) for v in last["video"]] == [2, 3]
    flags = ["--eval", tmp_path / "q.jsonl", "--images", world, "--out", tmp_path / "a.jsonl", "--routing", tmp_path / "r.png"]
    run(world, "ears", *flags)
    model, tokenizer = load(str(world / "ears"))
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert [row["text"]] == generate.answer(model, tokenizer, [questions[str(row["question_id"]), row["prompt"]]], max_new_tokens=6)
    with pytest.raises(ValueError, match="cannot hear"):
        run(world, "tiny", *flags[:5], tmp_path / "b.jsonl")
    (tmp_path / "q.jsonl").write_text('{"question_id": 2, "text": "An <audio> tag?"}')
    run(world, "tiny", *flags[:5], tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="'2'.*1 <audio>.*0 audios"):
        run(world, "ears", *flags[:5], tmp_path / "d.jsonl")


@pytest.mark.parametrize("row, message", [
    ({"audio": "gone.wav"}, "gone.wav"), ({"audio": 5}, "'audio'"), ({"video": "0.png"}, "0.png.*folder"),
    ({"video": [["gone.png"]]}, "gone.png"), ({"video": 5}, "'video'"),
    ({"audio": "a.wav", "text": "<audio> or <audio>"}, "2 <audio>.*1 audio"), ({"text": "<image>"}, "1 <image>.*0 images"), ({"text": "<video>"}, "1 <video>.*0 video")])
def test_bad_sounds_and_videos_are_told_by_name(row, message, world, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "x"} | row))
    with pytest.raises(ValueError, match=message):
        generate.read_questions(str(tmp_path / "q.jsonl"), str(world))


@pytest.mark.parametrize("kind, types", [("sound", d.SOUND_TYPES), ("both", d.BOTH_TYPES)])
def test_drawn_questions_about_sounds_are_held_out(kind, types, tokenizer):
    questions = generate.drawn_questions(60, world=kind)
    assert [k for _, k, _, _ in questions] == (list(types) * 60)[:60]
    train = {d.describe_sound(d.make_sound(i)) for i in range(2000)}
    assert not train & {d.describe_sound(what["sound"]) for what, *_ in questions if what["sound"]["kind"] != "glide"} and ("objects" in questions[0][0]) == (kind == "both")
    asked = []
    scores = generate.evaluate(talker(tokenizer.get_vocab_size(), audio=EAR), tokenizer, 12, world=kind, asked=asked)
    assert set(scores) == set(types) and sum(n for _, n in scores.values()) == 12 == len(asked)
    assert all(len(s["audio"]) == 1 and len(s["images"]) == (kind == "both") for s, _ in asked)
