"""data.py: pictures, conversations, the drawn world, datasets and batches."""
import io
import itertools
import json
import os
import random
import re
import struct
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import data as d

# ---------------------------------------------------------------------------------------------------------------------
# Images


def picture(w, h, mode="RGB"):
    """Gradients with some noise: bicubic filters that differ give different pixels."""
    y, x = np.mgrid[:h, :w]
    rgb = np.stack([255 * x / w, 255 * y / h, 127 + 120 * np.sin(x / 3 + y / 5)], -1)
    rgb += np.random.default_rng(0).normal(0, 12, (h, w, 3))
    image = Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray((255 * x / w).astype(np.uint8)))
    return image.convert(mode)


def encoded_image(kind):
    out = io.BytesIO()
    picture(90, 70).save(out, kind)
    return out.getvalue()


def png_header(w, h):
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))


def one_pixel():
    out = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(out, "PNG")
    return out.getvalue()


BAD_IMAGES = {"missing": lambda: None, "empty": lambda: b"", "text": lambda: b"no picture at all\n" * 50, "one pixel": one_pixel,
              "half a JPEG": lambda: encoded_image("JPEG")[:1500], "half a PNG": lambda: encoded_image("PNG")[:6000],
              "30,000 x 30,000": lambda: png_header(30_000, 30_000)}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_a_value_error_naming_the_file(kind, tmp_path):
    file, content = tmp_path / "bad-picture.png", BAD_IMAGES[kind]()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="bad-picture.png"):
        d.load_image(str(file), 48)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_image_cut_anywhere_raises_nothing_but_value_errors(kind, tmp_path):
    content, failed = encoded_image(kind), 0
    for cut in range(1, len(content), len(content) // 40):
        (tmp_path / "cut").write_bytes(content[:cut])
        try:
            d.load_image(str(tmp_path / "cut"), 48)
        except ValueError as e:
            failed += "cut" in str(e)
    assert failed >= 20                                                            # (a decoder may forgive a short tail)


# Pictures of every kind


def levels(image, size=16):
    """(size, size, 3): what load_image made of a picture, as values of 0 to 255 again."""
    pixels = d.load_image(image, size).permute(1, 2, 0).double().numpy()
    return (pixels * d.CLIP_STD + d.CLIP_MEAN) * 255


def stored(image, kind, **how):
    """The picture, written to a file of this kind and opened again."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return Image.open(io.BytesIO(file.getvalue()))


RAMP = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
GRAY = {"PNG": lambda: stored(Image.fromarray(RAMP), "PNG"), "TIFF": lambda: stored(Image.fromarray(RAMP), "TIFF"),
        "big-endian TIFF": lambda: stored(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
        "PGM": lambda: Image.open(io.BytesIO(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())),
        "in memory": lambda: Image.fromarray(RAMP), "16-bit RGB": lambda: Image.open(io.BytesIO(png(RAMP)))}


def png(gray, clear=None, colors=False):
    """A PNG of 16 bits a color, which Pillow cannot write; or with a level that is clear, of 16 bits of gray (or of each of three equal colors)."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    kind, repeats = (2, 3) if clear is None or colors else (0, 1)
    marked = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear) * repeats)
    rows = b"".join(b"\0" + np.repeat(row, repeats).astype(">u2").tobytes() for row in gray)
    header = struct.pack(">IIBBBBB", *gray.shape, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + marked + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", GRAY)
def test_a_ramp_of_16_bits_stays_a_ramp(kind):
    assert np.abs(levels(GRAY[kind]()) - (RAMP >> 8)[..., None]).max() < 1e-3


def tiff(pixels, bits, white_is_zero):
    """A TIFF of gray in so many bits, which Pillow cannot write."""
    strip = pixels.astype("<u2").tobytes()
    if bits < 16:
        packed = "".join(f"{int(v):0{bits}b}" for v in pixels.flat)
        strip = int(packed, 2).to_bytes(len(packed) // 8, "big")
    h, w = pixels.shape
    tags = [(256, w), (257, h), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, h), (279, len(strip))]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip


@pytest.mark.parametrize("bits, white_is_zero", [(16, False), (16, True), (12, False)])
def test_a_tiff_says_how_many_bits_and_whether_0_is_white(bits, white_is_zero):
    pixels = RAMP >> (16 - bits)
    got = levels(Image.open(io.BytesIO(tiff(2 ** bits - 1 - pixels if white_is_zero else pixels, bits, white_is_zero))))
    assert np.abs(got - (RAMP >> 8)[..., None]).max() < 1e-3


def test_clear_gray_of_16_bits_becomes_white():
    got = levels(Image.open(io.BytesIO(png(RAMP, clear=0))))
    assert np.abs(got[0, 0] - 255).max() < 1e-3 and np.abs(got[0, 1] - (RAMP[0, 1] >> 8)).max() < 1e-3


def test_a_clear_color_of_16_bits_becomes_white():
    pixels = np.array([[0x1234, 0x0034, 0x3412, 0xff00]] * 4, np.uint16)
    got = levels(Image.open(io.BytesIO(png(pixels, clear=0x1234, colors=True))), 4)[0, :, 0]
    assert np.abs(got - (255, 0x00, 0x34, 0xff)).max() < 1e-3


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), NotImplementedError("pixel format"), struct.error("too short")])
def test_whatever_pillow_raises_is_a_value_error(error, monkeypatch, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(self):
        raise error
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ValueError, match="a.png: cannot be read as an image"):
        d.load_image(tmp_path / "a.png", 16)


@pytest.mark.parametrize("pixels", [RAMP.astype(np.int32), RAMP.astype(np.float32) / 65535, (RAMP >> 1).astype(np.int16)])
def test_32_bits_a_pixel_are_refused_by_name(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match="depth.tiff: .*32 bits.*save it with 8 or 16"):
        d.load_image(tmp_path / "depth.tiff", 16)


def test_a_picture_is_turned_though_another_entry_of_its_exif_data_is_odd(tmp_path):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHHHI", 8, 2, 274, 3, 1, 6, 0, 282, 2, 3) + b"72\0\0" + bytes(4)
    Image.new("RGB", (40, 20)).save(tmp_path / "odd.jpg", exif=exif)
    assert d.open_image(tmp_path / "odd.jpg").size == (20, 40)


@pytest.mark.parametrize("name", ["data:image/png;base64," + "A" * 10_000, "https://x.org/a.png"])
def test_a_picture_that_is_no_file_is_refused_in_few_words(name):
    with pytest.raises(ValueError, match="read from files; save it as one") as e:
        d.load_image(name, 16)
    assert len(str(e.value)) < 200


# How EXIF's eight orientations are made of an upright picture: what undoes each.
HELD = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", HELD)
def test_a_picture_is_turned_upright_as_its_camera_says(orientation, kind):
    upright, exif = picture(60, 40), Image.Exif()
    exif[0x0112] = orientation
    held = upright.transpose(Image.Transpose[HELD[orientation]]) if orientation > 1 else upright
    image = stored(held, kind, exif=exif, **dict(quality=100, subsampling=0) if kind == "JPEG" else {})
    apart = np.abs(levels(image, 48) - levels(upright, 48)).max()
    assert apart < (6 if kind == "JPEG" else 1e-3)                                 # turned wrongly it would be 200
    image = stored(held, "PNG", exif=exif)
    d.load_image(image, 48)
    assert image.size == held.size                                                 # a caller's own picture stays as it is


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_data_say_nothing():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    good, rng = exif.tobytes(), random.Random(0)
    want = levels(picture(60, 40), 48)
    for _ in range(100):
        damaged = bytearray(good)
        for _ in range(4):
            damaged[rng.randrange(6, len(good))] = rng.randrange(256)
        got = levels(stored(picture(60, 40), "PNG", exif=bytes(damaged)), 48)
        assert got.shape == want.shape
    assert np.abs(levels(stored(picture(60, 40), "PNG", exif=good[:9]), 48) - want).max() < 1e-3


def clear(kind):
    """A picture from clear black on the left to full red, blue or gray on the right, and its (color, alpha) there."""
    alpha = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8), (16, 16))
    solid = Image.new("RGB", (16, 16), (200, 30, 90))
    if kind in ("RGBA", "RGBa"):
        solid.putalpha(Image.fromarray(alpha))
        return solid.convert(kind), (200, 30, 90), alpha
    if kind == "LA":
        return Image.merge("LA", [Image.new("L", (16, 16), 60), Image.fromarray(alpha)]), (60, 60, 60), alpha
    steps = np.where(alpha > 99, 255, 0).astype(np.uint8)                          # one color of these is clear as a whole
    if kind == "P":
        image = Image.fromarray((steps > 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 200, 30, 90])
        return stored(image, "GIF", transparency=0), (200, 30, 90), steps
    image = Image.fromarray(np.where(steps > 0, 60, 0).astype(np.uint8))
    if kind == "RGB":
        return stored(image.convert("RGB"), "PNG", transparency=(0, 0, 0)), (60, 60, 60), steps
    return stored(image, "PNG", transparency=0), (60, 60, 60), steps


@pytest.mark.parametrize("kind", ["RGBA", "RGBa", "LA", "P", "L", "RGB"])
def test_what_is_transparent_lies_on_white(kind):
    image, color, alpha = clear(kind)
    share = alpha[..., None] / 255
    assert np.abs(levels(image) - (share * np.array(color) + (1 - share) * 255)).max() < 2


@pytest.mark.parametrize("mode, kind, near", [("CMYK", "JPEG", 12), ("CMYK", "TIFF", 1), ("P", "PNG", 1), ("YCbCr", "JPEG", 12), ("RGB", "WEBP", 16),
                                              ("RGBA", "PNG", 1), ("HSV", None, 4)])
@pytest.mark.parametrize("color", [(220, 40, 60), (30, 160, 80), (250, 250, 250)])
def test_colors_are_right_in_every_mode(mode, kind, near, color):
    image = Image.new("RGB", (16, 16), color).convert(mode, palette=Image.Palette.ADAPTIVE)
    image = stored(image, kind) if kind else image
    assert np.abs(levels(image) - np.array(color)).max() <= near


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_black_and_white_are_black_and_white(mode):
    board = np.indices((16, 16)).sum(0) % 2 * 255
    image = stored(Image.fromarray(board.astype(np.uint8)).convert(mode), "PNG")
    assert image.mode == mode and np.abs(levels(image) - board[..., None]).max() < 1e-3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    image = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    assert image.n_frames == 3 and np.abs(levels(image) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("size", [(3, 65_000), (65_000, 3), (20_000, 90), (31_000, 300)])
def test_a_ribbon_is_refused_before_its_square_fills_the_memory(size, tmp_path):
    Image.new("1", size).save(tmp_path / "ribbon.png")
    with pytest.raises(ValueError, match=f"ribbon.png: .*{size[0]} x {size[1]} pixels.*cut it"):
        d.load_image(tmp_path / "ribbon.png", 16)


@pytest.mark.parametrize("read", [lambda path: d.load_image(path, 16), d.read_wav])
def test_what_is_no_file_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}: is a folder, a pipe or a device"):
            read(path)


# ---------------------------------------------------------------------------------------------------------------------
# Chat. In the expected texts «...» marks what is learnt: the answer, the space that leads to it, and the end mark. A model that
# is asked stops reading before that space, so it has to write it.

SYS = ("A chat between a curious user and an artificial intelligence assistant. "
       "The assistant gives helpful, detailed, and polite answers to the user's questions.")
INST = f"<s>[INST] <<SYS>>\n{SYS}\n<</SYS>>\n\n"                                    # CuMo's mistral_instruct_system; then LLaVA's v1
CHATS = {
    "one turn": (["<image>\nWhat is it?", "A red ring."], {
        "plain": "<image>«A red ring.\n»",
        "tiny": "<q><image>\nWhat is it?<a>« A red ring.</s>»",
        "mistral": INST + "<image>\nWhat is it? [/INST]« A red ring. </s>»",
        "vicuna": SYS + " USER: <image>\nWhat is it? ASSISTANT:« A red ring.</s>»"}),
    "several turns": (["<image>\nWhat?", "A ring.", "Which color?", "Red,\n\nI think. ", "Sure?", "Yes."], {
        "plain": "<image>«A ring.\nRed,\n\nI think. \nYes.\n»",
        "tiny": "<q><image>\nWhat?<a>« A ring.</s>»<q>Which color?<a>« Red,\n\nI think. </s>»<q>Sure?<a>« Yes.</s>»",
        "mistral": INST + "<image>\nWhat? [/INST]« A ring. </s>»[INST] Which color? [/INST]« Red,\n\nI think.  </s>»"
                          "[INST] Sure? [/INST]« Yes. </s>»",
        "vicuna": SYS + " USER: <image>\nWhat? ASSISTANT:« A ring.</s>»USER: Which color? ASSISTANT:« Red,\n\nI think. </s>»"
                        "USER: Sure? ASSISTANT:« Yes.</s>»"}),
    "prompt": (["<image>\nWhat?", "A ring.", "Which color?"], {
        "plain": "<image>«A ring.\n»",
        "tiny": "<q><image>\nWhat?<a>« A ring.</s>»<q>Which color?<a>",
        "mistral": INST + "<image>\nWhat? [/INST]« A ring. </s>»[INST] Which color? [/INST]",
        "vicuna": SYS + " USER: <image>\nWhat? ASSISTANT:« A ring.</s>»USER: Which color? ASSISTANT:"}),
    "first prompt": (["<image>\nWhat?"], {
        "plain": "<image>",
        "tiny": "<q><image>\nWhat?<a>",
        "mistral": INST + "<image>\nWhat? [/INST]",
        "vicuna": SYS + " USER: <image>\nWhat? ASSISTANT:"}),
    "text only": (["Two plus two?", "Four."], {
        "plain": "«Four.\n»",
        "tiny": "<q>Two plus two?<a>« Four.</s>»",
        "mistral": INST + "Two plus two? [/INST]« Four. </s>»",
        "vicuna": SYS + " USER: Two plus two? ASSISTANT:« Four.</s>»"}),
    "image behind the words": ([" What is <image> it?  ", "A ring."], {            # LLaVA puts it at the head
        "plain": "<image>«A ring.\n»",
        "tiny": "<q><image>\nWhat is  it?<a>« A ring.</s>»",
        "mistral": INST + "<image>\nWhat is  it? [/INST]« A ring. </s>»",
        "vicuna": SYS + " USER: <image>\nWhat is  it? ASSISTANT:« A ring.</s>»"}),
    "image alone": (["<image>", "A ring."], {
        "plain": "<image>«A ring.\n»",
        "tiny": "<q><image><a>« A ring.</s>»",
        "mistral": INST + "<image> [/INST]« A ring. </s>»",
        "vicuna": SYS + " USER: <image> ASSISTANT:« A ring.</s>»"}),
    "several images": (["<image>\n<image>\nThe same?", "No.", "And <image>", "Yes."], {
        "plain": "<image><image>«No.\n»<image>«Yes.\n»",
        "tiny": "<q><image>\n<image>\nThe same?<a>« No.</s>»<q><image>\nAnd<a>« Yes.</s>»",
        "mistral": INST + "<image>\n<image>\nThe same? [/INST]« No. </s>»[INST] <image>\nAnd [/INST]« Yes. </s>»",
        "vicuna": SYS + " USER: <image>\n<image>\nThe same? ASSISTANT:« No.</s>»USER: <image>\nAnd ASSISTANT:« Yes.</s>»"}),
    "other scripts": (["<image>\n這是什麼？ 🙂", "猫とЖ 🐈‍⬛!", "Où ça 👍🏽", "Là, à côté é🙂"], {
        "plain": "<image>«猫とЖ 🐈‍⬛!\nLà, à côté é🙂\n»",
        "tiny": "<q><image>\n這是什麼？ 🙂<a>« 猫とЖ 🐈‍⬛!</s>»<q>Où ça 👍🏽<a>« Là, à côté é🙂</s>»",
        "mistral": INST + "<image>\n這是什麼？ 🙂 [/INST]« 猫とЖ 🐈‍⬛! </s>»[INST] Où ça 👍🏽 [/INST]« Là, à côté é🙂 </s>»",
        "vicuna": SYS + " USER: <image>\n這是什麼？ 🙂 ASSISTANT:« 猫とЖ 🐈‍⬛!</s>»USER: Où ça 👍🏽 ASSISTANT:« Là, à côté é🙂</s>»"}),
    "empty answer": (["<image>\nWhat?", "", "So?", "No."], {
        "plain": "<image>«\nNo.\n»",
        "tiny": "<q><image>\nWhat?<a>« </s>»<q>So?<a>« No.</s>»",
        "mistral": INST + "<image>\nWhat? [/INST]«  </s>»[INST] So? [/INST]« No. </s>»",
        "vicuna": SYS + " USER: <image>\nWhat? ASSISTANT:« </s>»USER: So? ASSISTANT:« No.</s>»"}),
}
CHATML = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
LLAMA3 = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to understand "
          "the visual content that the user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>",
          "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
for _, texts in CHATS.values():                                                        # MoE-LLaVA's openchat differs in the end mark alone
    texts["openchat"] = texts["vicuna"].replace("</s>", "<|end_of_turn|>")
    for name, (system, question, answer, end) in {"chatml": CHATML, "llama3": LLAMA3}.items():
        text = re.sub(r"\s+</s>", "</s>", texts["tiny"]) if name == "llama3" else texts["tiny"]        # Llama 3 strips
        text = re.sub("<a>« ?", "<a>«", text).replace("<q>", question).replace("<a>", answer)
        texts[name] = system + text.replace("</s>", end)
EVERY = pytest.mark.parametrize("name, template", [(n, t) for n in CHATS for t in d.TEMPLATES])


def turns(texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def words():
    """Text for tokenizers: common words get tokens of their own, those of the other scripts do not."""
    return [SYS, "USER: What is it? ASSISTANT: A red ring. [INST] Which color? [/INST] Yes, sure. No, two plus two is four. "] * 3


MARKS = ["<s>", "</s>", "<|end_of_turn|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer():
    t = d.train_tokenizer(words(), 400)
    t.add_special_tokens(MARKS)
    return t


def sentencepiece(kind):
    """LLaMA's and Mistral's kind of tokenizer: spaces are "▁", one stands before the first word, unknown characters fall back to
    bytes, a <s> goes in front. prepend: as LLaMA's were converted ("legacy"); metaspace: as they are now."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(words(), trainers.BpeTrainer(vocab_size=250, show_progress=False))
    learnt = json.loads(t.to_str())["model"]
    vocab = {}
    for token in ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learnt["vocab"]]:
        vocab.setdefault(token, len(vocab))
    t = Tokenizer(models.BPE(vocab, [tuple(m) for m in learnt["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ["<unk>", *MARKS]])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def spm(request):
    return sentencepiece(request.param)


def unmark(marked):
    return re.sub("[«»]", "", marked), "".join(re.findall("«(.*?)»", marked, re.S))


def llava_ids(text, tokenizer, n, bos=True):
    """The text between the images is tokenized chunk by chunk; a <s> that the tokenizer adds stays at the first only."""
    ids = []
    for i, chunk in enumerate(text.split("<image>")):
        new = tokenizer.encode(chunk, add_special_tokens=bos).ids
        has_bos = bos and tokenizer.post_processor is not None
        ids += new if i == 0 else [-200] * n + new[has_bos:]
    return ids


@EVERY
def test_ids_are_the_spelled_out_text_and_labels_the_answers(name, template, tokenizer):
    conversation, expected = CHATS[name][0], CHATS[name][1][template]
    text, answers = unmark(expected)
    ids, labels = d.encode_chat(turns(conversation), tokenizer, template, 5)
    assert ids == llava_ids(text, tokenizer, 5)
    assert len(labels) == len(ids) and all(label in (-100, i) for i, label in zip(ids, labels))
    assert all(label == -100 for i, label in zip(ids, labels) if i < 0)
    assert tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False) == answers
    masked = [i for i, label in zip(ids, labels) if label == -100 and i >= 0]
    assert tokenizer.decode(masked, skip_special_tokens=False) == re.sub("«.*?»|<image>", "", expected, flags=re.S)


@EVERY
def test_sentencepiece_ids_equal_llavas_with_one_bos_in_front(name, template, spm):
    text, answers = unmark(CHATS[name][1][template])
    ids, labels = d.encode_chat(turns(CHATS[name][0]), spm, template, 3)
    assert ids == llava_ids(text, spm, 3, bos=template not in ("chatml", "llama3"))
    # The released CuMo spells "<s>" out though its tokenizer adds one, too: for mistral there are two
    n = {"mistral": 2, "chatml": 0, "llama3": 0}.get(template, 1)
    assert ids[:n] == [1] * n and ids.count(1) == n and labels[:n] == [-100] * n
    learnt = spm.decode([label for label in labels if label != -100], skip_special_tokens=False)
    # This kind puts a space before each chunk, and drops the first when decoding
    assert learnt.replace("\n ", "\n").replace("> \n", ">\n") == answers.removeprefix(" ")


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
@pytest.mark.parametrize("template", ["tiny", "mistral", "vicuna", "openchat", "chatml", "llama3"])
@pytest.mark.parametrize("name", [n for n in CHATS if "prompt" not in n])
def test_a_prompt_is_what_stands_before_the_learnt_answer(name, template, kind, tokenizer):
    conversation, t = turns(CHATS[name][0]), tokenizer if kind == "bytes" else sentencepiece(kind)
    for n in range(2, len(conversation) + 1, 2):
        ids, labels = d.encode_chat(conversation[:n], t, template, 2)
        prompt, _ = d.encode_chat(conversation[:n - 1], t, template, 2)
        assert ids[:len(prompt)] == prompt and labels[len(prompt):] == ids[len(prompt):] != []


def test_labels_of_plain_are_all_behind_the_image_as_llavas(spm):
    for caption in ("A ring.", "猫", "🙂 A", " red"):
        ids, labels = d.encode_chat(turns(["<image>\nDescribe.", caption]), spm, "plain", 4)
        assert labels == [-100] * 5 + ids[5:] and ids[:5] == [1] + [-200] * 4


@pytest.mark.parametrize("template, text", [("mistral", INST + "  Why?\n [/INST] No. </s>"),
                                            ("vicuna", SYS + " USER:   Why?\n ASSISTANT: No.</s>")])
def test_a_turn_without_image_keeps_its_white_space_as_llavas(template, text, tokenizer):
    assert d.encode_chat(turns(["  Why?\n", "No."]), tokenizer, template, 1)[0] == tokenizer.encode(text).ids


def test_openchat_wants_a_tokenizer_with_its_end_mark(tokenizer):
    ids, _ = d.encode_chat(turns(["Why?", "No."]), tokenizer, "openchat", 1)
    assert ids[-1] == tokenizer.token_to_id("<|end_of_turn|>")
    with pytest.raises(ValueError, match="end_of_turn.*--template vicuna"):
        d.encode_chat(turns(["Why?", "No."]), d.train_tokenizer(words(), 400), "openchat", 1)


# What the chat models of the field bring: GPT-2's kind of tokenizer, and a template in Jinja (Qwen2's and Llama 3's).
BYTES = {
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
               "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "llama3": (MARKS[5:], "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
               "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")}


def gpt2_kind(marks, trim_offsets=True, **more):
    """The tokenizer of a model that has no </s>. trim_offsets, SmolLM2's: tokens of blanks are told to stand for no characters."""
    t = Tokenizer(models.BPE(**more))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.post_processor, t.decoder = processors.ByteLevel(trim_offsets=trim_offsets), decoders.ByteLevel()
    t.train_from_iterator(words(), trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens(marks)
    return t


@pytest.mark.parametrize("template", BYTES)
def test_ids_equal_apply_chat_templates_and_labels_are_the_answers(template):
    transformers = pytest.importorskip("transformers")
    marks, jinja = BYTES[template]
    t = gpt2_kind(marks)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token=marks[0], chat_template=jinja)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})         # so LLaVA-NeXT makes room for an image
    image, system = theirs.convert_tokens_to_ids("<image>"), re.search("(You are.*?)<", (CHATML if template == "chatml" else LLAMA3)[0])[1]
    for texts in (["<image>\nWhat is it?", "A  red\n\nring. ", "Sure?", "Yes."], ["  Why?\n", "No", "Which   color?"], ["What?", ""]):
        messages = [{"role": "system", "content": system}]
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        want = theirs.apply_chat_template(messages, add_generation_prompt=len(texts) % 2 == 1, return_dict=False)
        ids, labels = d.encode_chat(turns(texts), t, template, 1)
        assert ids == [d.IMAGE if i == image else i for i in want]
        learnt = t.decode([i for i in labels if i >= 0], skip_special_tokens=False)
        assert learnt == "".join(a + "<|im_end|>\n" if template == "chatml" else a.strip() + "<|eot_id|>" for a in texts[1::2])


def test_the_template_is_the_one_whose_marks_the_tokenizer_knows(tokenizer):
    for name, (marks, _) in BYTES.items():
        assert d.template_for(gpt2_kind(marks), "vicuna") == name
    assert d.template_for(sentencepiece("prepend"), "mistral") == "chatml"
    assert d.template_for(d.train_tokenizer(words(), 400), "mistral") == "mistral"
    assert d.template_for(gpt2_kind(["<|end_of_turn|>"]), "mistral") == "openchat"


def test_a_tokenizer_without_the_end_mark_is_refused_and_told_what_fits():
    chat, t = turns(["Why?", "No."]), gpt2_kind(BYTES["chatml"][0])
    t.add_tokens(["</"])
    with pytest.raises(ValueError, match="vicuna ends answers with </s>.*--template chatml$"):
        d.encode_chat(chat, t, "vicuna", 1)
    with pytest.raises(ValueError, match="does not know </s>.*--template chatml"):
        d.Encoded([chat], t, "mistral", 16, 4, 64)                                # before a run, not in its every sample
    with pytest.raises(ValueError, match="unknown template 'nope'"):
        d.Encoded([chat], t, "nope", 16, 4, 64)
    with pytest.raises(ValueError, match="use another tokenizer"):
        d.end_token(gpt2_kind([]), "vicuna")
    named = Tokenizer(models.BPE({"<": 0, "/": 1, "s": 2, ">": 3, "</s>": 4}, []))      # as in Qwen2: in the vocabulary, but never made
    with pytest.raises(ValueError, match="does not know </s>"):
        d.end_token(named, "vicuna")
    assert d.end_token(t, "chatml") == t.token_to_id("<|im_end|>")


def test_what_the_tokenizer_adds_stands_once_and_in_front_alone(tokenizer):
    t = Tokenizer.from_str(tokenizer.to_str())
    bos, eos = (t.token_to_id(mark) for mark in ("<s>", "</s>"))
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)])
    for template in ("vicuna", "tiny", "plain", "openchat"):
        for texts in (["<image>\nWhat?"], ["What?"], ["<image>\nWhat?", "A ring.", "And <image> <image>?"]):
            ids, labels = d.encode_chat(turns(texts), t, template, 2)
            bare, bare_labels = d.encode_chat(turns(texts), tokenizer, template, 2)
            assert ids == [bos, *bare] and labels == [-100, *bare_labels] and (len(texts) > 1 or eos not in ids)


TYPED = "Is </s> a mark, <|im_end|> too, <|eot_id|><s>?"


@pytest.mark.parametrize("template", [name for name in d.TEMPLATES if name != "plain"])
@pytest.mark.parametrize("kind", ["bytes", "not special", "prepend", "metaspace"])
def test_marks_that_somebody_types_are_text(template, kind, tokenizer):
    t = sentencepiece(kind) if kind in ("prepend", "metaspace") else tokenizer
    if kind == "not special":                                                      # some tokenizers do not say that their marks are marks
        described = json.loads(t.to_str())
        for token in described["added_tokens"]:
            token["special"] = False
        t = Tokenizer.from_str(json.dumps(described))
    marks = {t.token_to_id(mark) for mark in MARKS}
    if kind == "not special":                                                      # then those of the templates count
        marks &= {t.token_to_id(mark) for form in d.TEMPLATES.values() for mark in form.tokens}
    for typed, harmless in (([TYPED], ["Is it?"]), (["<image>\nWhat?", TYPED, "So?"], ["<image>\nWhat?", "Yes.", "So?"])):
        ids, labels = d.encode_chat(turns(typed), t, template, 1)
        clean, clean_labels = d.encode_chat(turns(harmless), t, template, 1)
        assert [i for i in ids if i in marks] == [i for i in clean if i in marks]
        assert [i for i in labels if i in marks] == [i for i in clean_labels if i in marks]
        said = t.decode([i for i in ids if i >= 0 and i not in marks])
        assert TYPED.replace(" ", "") in said.replace(" ", "")
    assert not t.encode_special_tokens


@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "Unigram"])
def test_a_character_that_the_tokenizer_does_not_know_is_no_mark(kind):
    special = ["<unk>", "<s>", "</s>"]
    if kind == "BPE":
        t, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(vocab_size=60, special_tokens=special)
    elif kind == "WordLevel":
        t, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(special_tokens=special)
    else:
        t, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=40, special_tokens=special, unk_token="<unk>")
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(["USER: What is it? ASSISTANT: A red ring."] * 5, trainer)
    ids, labels = d.encode_chat(turns(["What is 猫?", "A 猫 ring."]), t, "vicuna", 1)
    assert ids.count(t.token_to_id("<unk>")) >= 2 and t.token_to_id("<unk>") in labels
    assert ids.count(t.token_to_id("</s>")) == 1 and labels[-1] == t.token_to_id("</s>")       # the template's own


def test_a_mark_is_a_mark_while_another_thread_spells_it_out(tokenizer):
    stop = []

    def spell_out():
        while not stop:
            d.spell_out(MARKS[0], tokenizer)
    with ThreadPoolExecutor(1) as pool:
        spelling = pool.submit(spell_out)
        try:
            lengths = {len(tokenizer.encode(MARKS[0], add_special_tokens=False).ids) for _ in range(5000)}
        finally:
            stop.append(True)
        spelling.result()
    assert lengths == {1}


def test_a_mark_that_can_be_no_text_is_refused_by_name():
    t = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "Why": 2}, unk_token="?"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match="</s>.*cannot write as text"):
        d.encode_chat(turns(["Why </s> so"]), t, "vicuna", 1)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand_is_refused(monkeypatch):
    tokenizer = gpt2_kind(["</s>"])

    class Old:                                                                     # tokenizers before 0.20.3, with ignore_merges
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, add_special_tokens=True):
            e = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return type("Encoding", (), dict(ids=e.ids, tokens=e.tokens, special_tokens_mask=e.special_tokens_mask,
                                             offsets=[(first, first) for first, _ in e.offsets]))
    with pytest.raises(ValueError, match="tokenizers before 0.20.3"):
        d.encode_chat(turns(["Why?", "No."]), Old(), "vicuna", 1)


def test_audio_slots_are_expanded_and_masked(tokenizer):
    ids, labels = d.encode_chat(turns(["<image>\n<audio>\nWhat?", "Yes."]), tokenizer, "tiny", 4, n_audio_tokens=3)
    assert Counter(i for i in ids if i < 0) == {-200: 4, -201: 3}
    assert all(label == -100 for i, label in zip(ids, labels) if i < 0)


ASK, SAY = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."}
BAD_CHATS = {"starts with gpt": ([SAY, ASK], "turn 1.*gpt"), "two human turns": ([ASK, ASK], "turn 2.*human"),
             "two answers": ([ASK, SAY, SAY], "turn 3"), "missing value": ([ASK, {"from": "gpt"}], "turn 2.*value"),
             "value no text": ([{"from": "human", "value": None}], "turn 1"), "missing from": ([{"value": "Why?"}], "turn 1.*from"),
             "unknown speaker": ([{"from": "system", "value": "x"}], "system"),
             "turn no object": ([ASK, "No."], "turn 2"), "empty": ([], "empty")}


def test_llava_json_skips_what_is_said_before_a_question_and_reads_llama_factorys_images(tmp_path):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "x.png")
    said = {"from": "gpt", "value": "Hello."}
    samples = [{"conversations": [said, ASK, SAY]}, {"conversations": [said, ASK]},
               {"conversations": [{"from": "human", "value": "<image>What?"}, SAY], "images": ["x.png"]}]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    read = d.LlavaJson(str(tmp_path / "d.json"), str(tmp_path))
    assert read[0]["conversations"] == [ASK, SAY] and read[1]["conversations"] == [said, ASK]      # nothing would be learnt: broken
    assert read[2]["images"] == [str(tmp_path / "x.png")]
    assert d.load_senses(read[2], 8)[1].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("kind", BAD_CHATS)
@pytest.mark.parametrize("template", d.TEMPLATES)
def test_bad_conversation_is_a_value_error_that_says_where(kind, template, tokenizer):
    conversation, message = BAD_CHATS[kind]
    with pytest.raises(ValueError, match=message):
        d.encode_chat(conversation, tokenizer, template, 4)


def test_unknown_template_is_a_value_error_naming_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match="alpaca.*mistral"):
        d.encode_chat([ASK, SAY], tokenizer, "alpaca", 4)


def test_nothing_to_learn_is_a_value_error_that_shows_the_sample():
    silent = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))          # drops the answer "\n": no characters, no tokens
    silent.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="all labels are masked.*Why"):
        d.encode_chat(turns(["Why?", ""]), silent, "plain", 4)


@pytest.mark.parametrize("text", ["plain words", "  two\n\tlines  \r\n", "naïve façade 猫とЖ", "🙂👍🏽🐈‍⬛ é\u0301",
                                  "\x00\x7f\ufffd\u2028", "a" * 300])
def test_trained_tokenizer_gives_any_text_back(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 400 + len(MARKS)
    assert tokenizer.encode("<q><a></s>").tokens == ["<q>", "<a>", "</s>"]


# ---------------------------------------------------------------------------------------------------------------------
# The drawn world

PLACES = {"top left": (0, 0), "top": (0, 1), "top right": (0, 2), "left": (1, 0), "center": (1, 1), "right": (1, 2),
          "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2)}


def truth(scene, question):
    """The answer, read from the scene's objects by somebody who knows nothing of data.ask."""
    objects = [dict(place=(o[0] // 3, o[0] % 3), size=o[1], color=o[2], shape=o[3]) for o in scene["objects"]]
    found = lambda **wanted: [o for o in objects if all(o[k] == v for k, v in wanted.items())]

    def the(**wanted):
        assert len(found(**wanted)) == 1, f"ambiguous: {question}"
        return found(**wanted)[0]
    is_ = lambda pattern: re.fullmatch(pattern, question)
    if m := is_(r"What color is the (\w+)\?"):
        colors = {o["color"] for o in found(shape=m[1])}
        assert len(colors) == 1, f"ambiguous: {question}"
        return colors.pop()
    if m := is_(r"What color is the shape at the (.+)\?"):
        return the(place=PLACES[m[1]])["color"]
    if m := is_(r"What shape is at the (.+)\?"):
        return the(place=PLACES[m[1]])["shape"]
    if m := is_(r"Is the (\w+) (\w+) large or small\?"):
        return the(color=m[1], shape=m[2])["size"]
    if m := is_(r"Where is the (\w+) (\w+)\?"):
        place = the(color=m[1], shape=m[2])["place"]
        return next(name for name, p in PLACES.items() if p == place)
    if m := is_(r"How many (\w+) shapes are there\?"):
        return "zero one two three four five".split()[len(found(color=m[1]))]
    if m := is_(r"How many (circle|square|triangle|star|cross|ring)(s|es) are there\?"):
        return "zero one two three four five".split()[len(found(shape=m[1]))]
    if m := is_(r"Is there a (\w+) (\w+)\?"):
        return "yes" if found(color=m[1], shape=m[2]) else "no"
    if m := is_(r"Is the (\w+) (\w+) (above|below|left of|right of) the (\w+) (\w+)\?"):
        (r1, c1), (r2, c2) = the(color=m[1], shape=m[2])["place"], the(color=m[4], shape=m[5])["place"]
        return "yes" if {"above": r1 < r2, "below": r1 > r2, "left of": c1 < c2, "right of": c1 > c2}[m[3]] else "no"
    if is_(r"What does the sign say\?"):
        return scene["sign"][1] if scene["sign"] else "no sign"
    raise AssertionError(f"unknown question: {question}")


@pytest.fixture(scope="module")
def scenes():
    return [d.make_scene(i) for i in range(2000)]


@pytest.fixture(scope="module")
def asked(scenes):
    """[(scene, type, question, answer)]"""
    return [(scene, *qa) for i, scene in enumerate(scenes) for qa in d.ask_many(scene, 6, random.Random(i))]


def test_scenes_and_samples_are_functions_of_their_seed():
    assert d.make_scene(7) == d.make_scene(7) and d.make_scene(7, True) == d.make_scene(7, True) != d.make_scene(7)
    a, b, other = d.Drawn("chat", 20, seed=1), d.Drawn("chat", 20, seed=1), d.Drawn("chat", 20, seed=2)
    for i in (19, 3, 0):
        assert a[i]["conversations"] == b[i]["conversations"] and a[i]["images"][0].tobytes() == b[i]["images"][0].tobytes()
        assert a[i]["scene"] != other[i]["scene"]
    assert len(list(a)) == 20                                                      # iteration ends: IndexError behind the last


def test_held_out_descriptions_are_never_trained_on(scenes):
    # One-object scenes repeat so often that among thousands a leak would show
    held_out = {d.describe(d.make_scene(s, held_out=True)) for s in range(100_000, 103_000)}
    train = {d.describe(s) for s in scenes} | {d.describe(d.make_scene(s)) for s in range(50_000, 52_000)}
    assert len(held_out) > 1000 and not held_out & train
    assert all(s["scene"] == d.make_scene(int(s["id"]), True) for s in d.Drawn("chat", 5, seed=3, held_out=True))


def test_scenes_are_rich_and_their_objects_apart(scenes):
    for scene in scenes:
        cells = [o[0] for o in scene["objects"]]
        assert 1 <= len(cells) <= 5 and len(set(cells)) == len(cells) and set(cells) <= set(range(9))
        assert all(o[1] in d.SIZES and o[2] in d.COLORS and o[3] in d.SHAPES for o in scene["objects"])
        assert not scene["sign"] or all(cell // 3 != scene["sign"][0] for cell in cells)
    assert sum(len(s["objects"]) >= 3 for s in scenes) >= len(scenes) / 3
    assert 0.2 < sum(s["sign"] is not None for s in scenes) / len(scenes) < 0.5


def test_every_answer_is_what_the_scene_says(asked):
    for scene, kind, question, answer in asked:
        assert truth(scene, question) == answer, (scene, question)
    counts = Counter(kind for _, kind, _, _ in asked)
    assert set(counts) == set(d.TYPES) and len(counts) >= 8 and min(counts.values()) > 100


def test_samples_ask_what_their_types_say_about_the_scene_shown():
    for sample in d.Drawn("chat", 60, seed=5):
        conversation = sample["conversations"]
        pairs = [(q["value"], a["value"]) for q, a in zip(conversation[::2], conversation[1::2])]
        assert [t["from"] for t in conversation] == ["human", "gpt"] * len(pairs) and len(sample["types"]) == len(pairs) >= 1
        assert pairs[0][0].startswith("<image>\n") and sum(q.count("<image>") for q, _ in pairs) == len(sample["images"]) == 1
        for q, a in pairs:
            assert truth(sample["scene"], q.removeprefix("<image>\n")) == a
        assert len({q for q, _ in pairs}) == len(pairs)                            # no question twice


def test_captions_tell_every_object_and_sign_in_scan_order(scenes):
    names = list(PLACES)
    for scene in scenes[:200]:
        said = {c: f"{names[c]}: {size} {color} {shape}" for c, size, color, shape in scene["objects"]}
        if scene["sign"]:                                                          # its row is otherwise empty
            said[3 * scene["sign"][0]] = f"{('top', 'middle', 'bottom')[scene['sign'][0]]}: sign {scene['sign'][1]}"
        assert d.describe(scene) == " ".join(said[c] + "." for c in sorted(said))
    sample = d.Drawn("caption", 3)[1]
    assert [t["value"] for t in sample["conversations"]] == ["<image>\nDescribe the scene.", d.describe(sample["scene"])]


@pytest.mark.parametrize("kind, answers", [("exists", {"yes", "no"}), ("relation", {"yes", "no"}), ("size", {"large", "small"})])
def test_answers_to_two_way_questions_are_balanced(kind, answers, asked):
    said = Counter(answer for _, k, _, answer in asked if k == kind)
    assert set(said) == answers and all(0.4 <= n / said.total() <= 0.6 for n in said.values())


def test_objects_are_drawn_in_their_color_at_their_place(scenes):
    distance = lambda window, color: np.abs(window - np.array(color)).max(-1).min()
    seen = 0
    for scene in scenes[:300]:
        pixels = np.asarray(d.draw_scene(scene)).astype(int)
        assert pixels.shape == (48, 48, 3)
        for cell, _, color, shape in scene["objects"]:
            if shape != "ring":                                                    # hollow: its middle shows the background
                y, x = 16 * (cell // 3) + 8, 16 * (cell % 3) + 8
                window = pixels[y - 2:y + 2, x - 2:x + 2].reshape(-1, 3)           # placed with some jitter
                own = distance(window, d.COLORS[color])
                assert own <= 25 and own < min(distance(window, v) for name, v in d.COLORS.items() if name != color), (scene, cell)
                seen += 1
    assert seen > 500


def test_empty_cells_are_background_and_signs_are_drawn(scenes):
    for scene in scenes[:100]:
        pixels = np.asarray(d.draw_scene(scene)).astype(int)
        row = scene["sign"][0] if scene["sign"] else None
        for cell in set(range(9)) - {o[0] for o in scene["objects"]}:
            y, x = 16 * (cell // 3) + 8, 16 * (cell % 3) + 8
            if cell // 3 != row:
                assert np.ptp(pixels[y - 4:y + 4, x - 4:x + 4], axis=(0, 1)).max() <= 14    # noise alone
        if row is not None:
            blank = np.asarray(d.draw_scene({**scene, "sign": None})).astype(int)
            assert np.ptp(pixels[16 * row:16 * row + 16], axis=(0, 1)).max() > 150   # ink on paper
            assert [r for r in range(3) if np.abs(pixels - blank)[16 * r:16 * r + 16].max() > 30] == [row]


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA's JSON


def sample(image=None, texts=("Why?", "No."), **more):
    return {**({} if image is None else {"image": image}), "conversations": turns(texts), **more}


SAMPLES = [sample("a.png", ("<image>\nWhat?", "Ring."), id="x"), sample(),
           sample(["a.png", "b.png"], ("<image><image>\nSame?", "No. 猫\u2028")), sample(["a.png"], ("<image>", "ça va"))]


@pytest.mark.parametrize("form", ["json", "pretty json", "jsonl", "jsonl, escaped", "jsonl, blank lines", "jsonl, CRLF", "json, BOM",
                                  "jsonl, BOM"])
def test_json_and_jsonl_give_the_same_samples(form, tmp_path):
    lines = [json.dumps(s, ensure_ascii="escaped" in form) for s in SAMPLES]
    text = {"json": json.dumps(SAMPLES), "pretty json": "\n " + json.dumps(SAMPLES, indent=2, ensure_ascii=False),
            "json, BOM": "\ufeff" + json.dumps(SAMPLES), "jsonl, BOM": "\ufeff" + "\n".join(lines),
            "jsonl, blank lines": "\n\n".join(lines) + "\n\n", "jsonl, CRLF": "\r\n".join(lines)}.get(form, "\n".join(lines) + "\n")
    (tmp_path / "x.json").write_bytes(text.encode())
    data = d.LlavaJson(tmp_path / "x.json", "/pictures")
    assert len(data) == 4 and [data[i]["conversations"] for i in range(4)] == [s["conversations"] for s in SAMPLES]
    a, b = "/pictures/a.png", "/pictures/b.png"
    assert [data[i]["images"] for i in range(4)] == [[a], [], [a, b], [a]]
    assert data.lengths() == [3, 2, 4, 3]
    assert "x.json" in data[0]["id"] and "id x" in data[0]["id"]


GOOD = json.dumps(sample())
BAD_FILES = {"malformed jsonl": (f"{GOOD}\n{GOOD}\n{{broken\n{GOOD}", "line 3"), "cut jsonl": (f"{GOOD}\n{GOOD[:30]}", "line 2"),
             "malformed json": ('[\n{"id": 1},\n{"id": }\n]', "line 3"), "cut json": (f"[{GOOD},\n", "line 2"),
             "text": ("hello", "line 1"), "empty": ("", "no samples"), "white space": ("\n \n", "no samples"),
             "empty list": ("[]", "no samples"), "deep": ("[" * 1000 + "]" * 1000, "too deeply"),
             "deep line": (GOOD + "\n" + "[" * 1000, "line 2 on.*too deeply"), "not utf-8": (b'[{"id": "\xff\xfe"}]', "utf-8"), "missing": (None, "No such file")}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_file_is_a_value_error_naming_file_and_line(kind, tmp_path):
    content, message = BAD_FILES[kind]
    file = tmp_path / "train-data.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"train-data.json.*{message}"):
        d.LlavaJson(str(file))


@pytest.mark.parametrize("wrong", [sample(texts=("Why?", "half \ud83d")), sample("a\ud800.png"), 3, "text", [1], {"id": 1},
                                   {"conversations": "text"}, sample(5), sample([5]), sample({"a": 1})])
def test_sample_of_wrong_type_is_a_value_error_naming_it(wrong, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([sample(), wrong]))
    data = d.LlavaJson(tmp_path / "x.json")
    assert data[0]["conversations"] and len(data.lengths()) == 2
    with pytest.raises(ValueError, match="x.json: sample 2") as e:
        data[1]
    str(e.value).encode()                                                          # it can be printed


def test_half_a_character_in_a_turn_is_an_error_that_can_be_printed(tokenizer):
    with pytest.raises(ValueError, match="turn 1: half a character"):
        d.encode_chat([{"from": "human", "value": "half \ud83d"}], tokenizer, "tiny", 4)


# ---------------------------------------------------------------------------------------------------------------------
# Encoded and collate

RED, BLUE = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 10), "blue")


def item(images=(), texts=("Why?", "No."), name="n"):
    return {"id": name, "images": list(images), "conversations": turns(texts)}


def encoded(samples, tokenizer, **kw):
    return d.Encoded(samples, **{**dict(tokenizer=tokenizer, template="tiny", pictures=16, n_image_tokens=4, max_length=64), **kw})


BROKEN = {"too few images": (item([RED], ("<image><image>\nWhat?", "No.")), "2 <image>.*1 images"),
          "too many images": (item([RED, BLUE], ("<image>\nWhat?", "No.")), "1 <image>.*2 images"),
          "image without mark": (item([RED]), "0 <image>"),
          "missing image": (item(["/nowhere/gone.png"], ("<image>\nWhat?", "No.")), "gone.png: no such file"),
          "bad turns": ({"id": "n", "images": [], "conversations": [ASK, ASK]}, "turn 2"),
          "turn of wrong type": ({"id": "n", "images": [], "conversations": [ASK, 5]}, "turn 2"),
          "image over the limit": (item([RED, RED], ("<image> " + "Why? " * 40 + "<image>", "No.")), "over the limit of 64"),
          "a question alone": (item([], ("Why?",)), "nothing to learn: the model .'gpt'. says nothing"),
          "answer cut off": (item([], ("Why? " * 60, "No.")), "nothing to learn")}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sample_is_reported_and_replaced_by_its_successor(kind, tokenizer):
    bad, message = BROKEN[kind]
    bad = {**bad, "id": "the bad one"}
    good = item([BLUE], ("<image>\nWhat?", "Blue."))
    data = encoded([good, bad], tokenizer)                                         # its successor is the first again
    x, y = data[0], data[1]
    assert torch.equal(x["tokens"], y["tokens"]) and torch.equal(x["images"], y["images"]) and x["broken"] == []
    assert len(y["broken"]) == 1 and "the bad one" in y["broken"][0] and re.search(message, y["broken"][0])
    with pytest.raises(ValueError, match=f"the bad one.*{message}"):
        encoded([good, bad], tokenizer, strict=True)[1]
    with pytest.raises(ValueError, match=f"in a row are broken.*{message}"):
        encoded([bad], tokenizer)[0]


def test_broken_ones_that_follow_each_other_are_counted_once_each(tokenizer):
    good, bad = item([BLUE], ("<image>\nWhat?", "Blue.")), BROKEN[min(BROKEN)][0]
    data = encoded([good, bad, bad, bad, good], tokenizer)
    batch = d.collate([data[i] for i in range(5)])
    assert batch["replaced"] == 3 and len(batch["broken"]) == 1 + 2 + 3


def test_a_folder_of_frames_that_may_not_be_read_is_a_broken_sample(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ValueError, match="sample 3: .*no folder of frames"):
        d.frames_in(str(tmp_path), "sample 3")


def test_broken_json_sample_is_reported_by_file_and_place(tmp_path, tokenizer):
    (tmp_path / "x.json").write_text(json.dumps([sample(), sample("gone.png", ("<image>\nWhat?", "No.")), 5]))
    data = encoded(d.LlavaJson(tmp_path / "x.json", str(tmp_path)), tokenizer)
    assert len(data) == 3
    broken = data[1]["broken"]
    assert len(broken) == 2 and "x.json: sample 2" in broken[0] and "gone.png" in broken[0] and "x.json: sample 3" in broken[1]


def test_too_long_a_sample_is_cut_on_the_right_and_counted(tokenizer):
    long = item([RED], ("<image>\nWhy?", "No, " * 100))
    whole, cut = encoded([long], tokenizer, max_length=1000)[0], encoded([long, item()], tokenizer)
    assert not whole["truncated"] and len(whole["tokens"]) > 64
    assert cut[0]["truncated"] and not cut[1]["truncated"] and cut[0]["broken"] == []
    assert torch.equal(cut[0]["tokens"], whole["tokens"][:64]) and torch.equal(cut[0]["labels"], whole["labels"][:64])
    assert d.collate([cut[0], cut[1], cut[0]])["truncated"] == 2
    exact = encoded([long], tokenizer, max_length=len(whole["tokens"]))[0]
    assert not exact["truncated"] and torch.equal(exact["tokens"], whole["tokens"])


def test_empty_data_set_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        encoded([], tokenizer)


def test_collate_mixes_several_images_one_and_none(tokenizer):
    samples = [item([RED, BLUE], ("<image><image>\nSame?", "No.")), item([], ("Why?", "No, " * 5)),
               item([BLUE], ("<image>\nWhat?", "Blue."))]
    data = encoded(samples, tokenizer)
    rows = [data[i] for i in range(3)]
    batch = d.collate(rows)
    longest = max(len(r["tokens"]) for r in rows)
    assert batch["tokens"].shape == batch["labels"].shape == (3, -(-longest // 8) * 8) and batch["tokens"].dtype == torch.int64
    for row, tokens, labels in zip(rows, batch["tokens"], batch["labels"]):
        n = len(row["tokens"])
        assert torch.equal(tokens[:n], row["tokens"]) and (tokens[n:] == -1).all()
        assert torch.equal(labels[:n], row["labels"]) and (labels[n:] == -100).all()
    red, blue = d.load_image(RED, 16), d.load_image(BLUE, 16)
    assert not torch.equal(red, blue) and torch.equal(batch["images"], torch.stack([red, blue, blue, 0 * red]))
    assert (batch["tokens"] == -200).sum(1).tolist() == [8, 0, 4]
    assert batch["broken"] == [] and batch["truncated"] == 0
    assert torch.equal(d.collate([rows[1]])["images"], torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("lengths, rows", [([3, 9, 5, 5, 2], [[1], [2, 3], [0, 4]]), ([10, 10], [[0], [1]]), ([1] * 4, [[0, 1, 2, 3]]), ([], [])])
def test_packing_puts_the_longest_first_and_each_into_the_first_row_with_room(lengths, rows):
    assert d.pack(lengths, 10) == rows


def test_packed_rows_hold_every_sample_once_and_its_images_in_order(tokenizer):
    samples = [item([RED, BLUE], ("<image><image>\nSame?", "No.")), item([], ("Why?", "No, " * 5)), item([BLUE], ("<image>\nWhat?", "Blue."))] * 3
    data = encoded(samples, tokenizer)
    items = [data[i] for i in range(9)]
    batch = d.collate_packed(items, 64)
    assert batch["tokens"].shape == batch["labels"].shape == batch["sample_positions"].shape and batch["tokens"].shape[1] <= 64
    begins = (batch["sample_positions"] == 0) & (batch["tokens"] != d.PAD)
    found, images = [], iter(batch["images"])
    for tokens, labels, begin in zip(batch["tokens"], batch["labels"], begins):
        cuts = [*begin.nonzero().flatten().tolist(), int((tokens != d.PAD).sum())]
        for a, b in zip(cuts, cuts[1:]):
            seen = [next(images) for _ in range(int((tokens[a:b] == d.IMAGE).sum()) // 4)]
            found.append((tokens[a:b].tolist(), labels[a:b].tolist(), [image.sum().item() for image in seen]))
    want = [(row["tokens"].tolist(), row["labels"].tolist(), [image.sum().item() for image in row["images"]]) for row in items]
    assert sorted(found) == sorted(want) and len(list(images)) == 3 and len(begins) < 9    # three blank ones, behind the others


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def take(n, *args, **kw):
    return list(itertools.islice(iter(d.Batches(*args, **kw)), n))


LENGTHS = [random.Random(i).randrange(5, 500) for i in range(90)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("world, micro", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_global_batches_do_not_depend_on_the_number_of_processes(world, micro, lengths):
    steps, reference = 25, take(25, 90, 8, 8, seed=3, lengths=lengths)             # 11 steps an epoch
    per_step = 8 // (world * micro)
    ranks = [take(steps * per_step, 90, 8, micro, seed=3, rank=r, world=world, lengths=lengths) for r in range(world)]
    assert all(len(batch) == micro for rank in ranks for batch in rank)
    for step in range(steps):
        union = [i for rank in ranks for batch in rank[step * per_step:(step + 1) * per_step] for i in batch]
        assert sorted(union) == sorted(reference[step])


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_resuming_at_any_step_goes_on_with_the_same_sequence(lengths):
    kw = dict(seed=5, rank=1, world=2, lengths=lengths)
    whole = take(60, 90, 8, 2, **kw)                                               # 30 steps of two micro-batches, over two borders
    for start in (0, 1, 10, 11, 12, 21, 22, 23):
        assert take(60 - 2 * start, 90, 8, 2, start_step=start, **kw) == whole[2 * start:]


@pytest.mark.parametrize("lengths", [None, LENGTHS[:80]])
def test_every_sample_comes_once_an_epoch_in_a_new_order(lengths):
    batches = take(30, 80, 8, 8, lengths=lengths)
    epochs = [sum(batches[i:i + 10], []) for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(80)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and take(30, 80, 8, 8, seed=1, lengths=lengths) != batches


@pytest.mark.parametrize("lengths", [None, [3, 1, 2]])
def test_data_set_smaller_than_a_batch_is_repeated(lengths):
    for batch in take(5, 3, 8, 8, lengths=lengths):
        assert len(batch) == 8 and all(count in (2, 3) for count in Counter(batch).values()) and set(batch) == {0, 1, 2}


def test_incomplete_last_batch_leaves_out_other_samples_each_epoch():
    batches = take(20, 19, 10, 10)                                                 # one batch an epoch
    assert all(len(set(batch)) == 10 for batch in batches) and set(sum(batches, [])) == set(range(19))


def test_length_grouping_puts_like_lengths_together():
    lengths = [random.Random(i).randrange(1000) for i in range(1000)]
    spread = lambda batches: sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    grouped, mixed = take(100, 1000, 10, 10, lengths=lengths), take(100, 1000, 10, 10)
    assert sorted(sum(grouped, [])) == list(range(1000))
    assert spread(mixed) > 600 and spread(grouped) < 60
    means = [sum(lengths[i] for i in b) / 10 for b in grouped]
    assert means != sorted(means) and np.corrcoef(means, range(100))[0, 1] < 0.5   # but the batches come in any order


@pytest.mark.parametrize("batch, micro, world", [(8, 3, 1), (8, 8, 2), (9, 2, 1), (6, 1, 4)])
def test_indivisible_batch_is_a_value_error(batch, micro, world):
    with pytest.raises(ValueError, match=f"{batch}.*{world} processes x {micro}"):
        d.Batches(100, batch, micro, world=world)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Fast, and still the same


@pytest.mark.parametrize("size", [7, 48, 224])
def test_pixels_are_those_of_pad_resize_and_normalise_one_after_the_other(size):
    for w, h in ((64, 48), (48, 64), (48, 48), (47, 48), (300, 7), (7, 300), (336, 200), (2, 2)):
        pixels = np.random.default_rng(w).integers(0, 256, (h, w, 3), dtype=np.uint8)
        square = d.pad_to_square(Image.fromarray(pixels)).resize((size, size), Image.Resampling.BICUBIC)
        want = (np.asarray(square) / 255 - d.CLIP_MEAN) / d.CLIP_STD
        got = d.load_image(Image.fromarray(pixels), size)
        assert got.is_contiguous() and np.abs(got.permute(1, 2, 0).numpy() - want).max() < 1e-6


@pytest.mark.parametrize("video", ["clip", ["clip"], ["clip/f0.png", "clip/f1.png"]])
def test_a_videos_folder_is_found_below_a_relative_folder_of_images(tmp_path, monkeypatch, video):
    (tmp_path / "d" / "clip").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "d" / "clip" / f"f{i}.png")
    monkeypatch.chdir(tmp_path)
    for folder in ("d", str(tmp_path / "d")):
        assert d.video_files(video, folder, "here") == [[os.path.join(folder, "clip", f"f{i}.png") for i in range(2)]]


def test_shares_that_are_weights_are_refused_as_a_source_would_never_be_drawn():
    with pytest.raises(ValueError, match="must sum to 1"):
        d.Batches(100, 10, 10, sources=[0] * 50 + [1] * 50, shares=[3, 1])
