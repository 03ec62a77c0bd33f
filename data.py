"""data.py: from pictures and conversations to tensors. Imports no other file of the project.

1. images        pad to square, resize, normalise as LLaVA and CLIP do
2. chat          templates, token ids, and labels from character offsets
3. drawn world   the default's data: scenes of shapes and signs, drawn on the fly, with captions, questions and one right answer each
4. datasets      the drawn world, and LLaVA's JSON with images on disk
5. batches       padding, and a sampler that can be resumed in the middle of an epoch

A sample, everywhere: {"images": [path or PIL image], "conversations": [{"from": "human" | "gpt", "value": text}, ...]}; "<image>" in
a text marks the place of the next image.
"""
import json
import os
import random
import re
import tempfile
import time
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE, AUDIO, PAD, IGNORE = -200, -201, -1, -100     # as in model.py: image slot, audio slot, padding, label that is not learnt

# ---------------------------------------------------------------------------------------------------------------------
# 1. Images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)      # of the pixels CLIP was trained on, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORMALISE = [(1 / (255 * std), -mean / std) for mean, std in zip(CLIP_MEAN, CLIP_STD)]     # (x / 255 - mean) / std = x * scale + shift


def load_image(image, size: int) -> torch.Tensor:
    """A path or PIL image -> (3, size, size) float32, padded to a square with CLIP's mean colour, resized (bicubic), normalised.

    Padding instead of cropping keeps what is at the edges (LLaVA's image_aspect_ratio "pad"). Raises ValueError, naming the file, if
    it is missing, truncated, no picture, smaller than 2 pixels a side, or so large that it must be a decompression bomb."""
    name = image if isinstance(image, (str, os.PathLike)) else "the image"
    try:
        if isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        if min(image.size) < 2:
            raise ValueError(f"it is {image.width} x {image.height} pixels, too small to be a picture")
        image.load()                                                               # decodes: a truncated file fails here
        image = image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file; check the path, and --images") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{name}: cannot be read as an image: {e}") from None
    width = side = max(image.size)
    if image.width == side:        # Pillow resizes rows first, then columns; a row of padding stays as it is, so add those in between
        image, width = image.resize((size, image.height), Image.Resampling.BICUBIC), size
    image = pad(image, width, side).resize((size, size), Image.Resampling.BICUBIC)
    x = np.empty((3, size, size), np.float32)
    for out, band, (scale, shift) in zip(x, image.split(), NORMALISE):             # plane by plane, in two passes over the pixels
        np.multiply(np.asarray(band), scale, out=out, dtype=np.float32, casting="unsafe")
        out += shift
    return torch.from_numpy(x)


def pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """An RGB image in the middle of a larger one of CLIP's mean colour."""
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height), tuple(int(m * 255) for m in CLIP_MEAN))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def pad_to_square(image: Image.Image) -> Image.Image:
    return pad(image, max(image.size), max(image.size))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Chat: templates, ids, labels

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = ("plain", "tiny", "mistral", "vicuna")
SLOTS = {"<image>": IMAGE, "<audio>": AUDIO}
EOS = {"plain": "\n", "tiny": "</s>", "mistral": "</s>", "vicuna": "</s>"}         # what ends an answer


def render(conversations: list, template: str) -> list[tuple[str, bool]]:
    """Turns -> [(text, learnt?), ...]. Their concatenation is what the model reads; it learns to write the learnt pieces.

    A conversation that ends with the human's turn is a prompt: the text stops where the assistant begins to speak.
    Raises ValueError for an unknown template, a turn without "from" or "value", and turns that do not alternate from human on."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
    if not conversations:
        raise ValueError("the conversation is empty")
    pieces = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise ValueError(f"turn {i + 1} must be an object with the texts 'from' and 'value', not {str(turn)[:80]}")
        speaker, text = turn["from"], turn["value"]
        if speaker != ("human", "gpt")[i % 2]:
            raise ValueError(f"turn {i + 1} is from {speaker!r}; turns must alternate human, gpt, human, ...")
        if speaker == "human":
            if text.count("<image>") == 1:                     # as LLaVA: a single image is put at the head of its turn
                text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
            if template == "plain":
                text = "".join(re.findall("<image>|<audio>", text))
        match template, speaker:
            # plain: LLaVA's pre-training. The question is dropped; image, caption, newline.
            case "plain", "human": pieces.append((text, False))
            case "plain", _: pieces.append((text + "\n", True))
            case "tiny", "human": pieces.append((f"<q>{text}<a>", False))
            case "tiny", _: pieces.append((f" {text}</s>", True))
            # The space before an answer belongs to what is learnt: most tokenizers merge it into the answer's first word.
            # An empty answer is learnt as such; LLaVA takes an empty turn for one still to come, and writes no end mark.
            # mistral: CuMo's "mistral_instruct_system". The released code spells "<s>" out although its tokenizer adds one too.
            case "mistral", "human":
                head = f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n" if i == 0 else "[INST] "
                pieces.append((f"{head}{text} [/INST]", False))
            case "mistral", _: pieces.append((f" {text} </s>", True))
            # vicuna: LLaVA-1.5's "v1".
            case "vicuna", "human": pieces.append(((SYSTEM + " ") * (i == 0) + f"USER: {text} ASSISTANT:", False))
            case "vicuna", _: pieces.append((f" {text}</s>", True))
    return pieces


def encode_chat(conversations: list, tokenizer, template: str, n_image_tokens: int, n_audio_tokens: int = 0):
    """Turns -> (ids, labels), lists of int of equal length; each "<image>" becomes n_image_tokens times IMAGE.

    LLaVA finds the answers by tokenizing pieces again and adding up lengths; where a tokenizer merges across a border the sums
    differ and the sample is dropped with "tokenization mismatch". Here the text is tokenized once, and a token is learnt if its
    characters reach into an answer. Raises ValueError as `render` does, and if a complete conversation leaves nothing to learn."""
    pieces = render(conversations, template)
    mask = b"".join(bytes([learnt]) * len(text) for text, learnt in pieces)        # 1 for each character of an answer
    ids, labels, at = [], [], 0                                                    # at: characters before this chunk
    marks = "(<image>|<audio>)" if n_audio_tokens else "(<image>)"                 # without audio, "<audio>" is but an HTML tag
    for i, chunk in enumerate(re.split(marks, "".join(text for text, _ in pieces))):
        if i % 2:                                                                  # text, mark, text, mark, ..., text
            n = n_image_tokens if chunk == "<image>" else n_audio_tokens
            ids += [SLOTS[chunk]] * n
            labels += [IGNORE] * n
        else:                                                                      # each chunk alone, as LLaVA does
            encoding = tokenizer.encode(chunk, add_special_tokens=True)
            for token, (a, b), special in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask):
                if special and a == b and at > 0:                                  # the tokenizer's own <s>: only at the very start
                    continue
                ids.append(token)
                labels.append(token if 1 in mask[at + a:at + b] else IGNORE)
        at += len(chunk)
    if any(learnt for _, learnt in pieces) and all(label == IGNORE for label in labels):
        raise ValueError(f"nothing to learn, all labels are masked: {str(conversations)[:300]}")
    return ids, labels


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer (any text in, the same text out) with the specials of the tiny template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[AddedToken(s, special=True) for s in ("</s>", "<q>", "<a>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# 3. The drawn world: a CLEVR for a laptop
#
# One to five objects stand in the cells of a 3 x 3 grid, a little off centre; in a third of the scenes a sign with a printed word
# fills a row. Every question has one right answer, and no answer can be guessed from the question.

COLORS = {"red": (220, 50, 47), "green": (60, 170, 60), "blue": (50, 90, 220), "yellow": (235, 210, 50), "purple": (150, 60, 190),
          "orange": (240, 140, 30), "cyan": (70, 205, 215), "white": (240, 240, 240)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"large": 6.3, "small": 3.9}                                               # radius in pixels
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WORDS = ("stop", "open", "exit", "taxi", "cafe", "bank", "park", "hotel", "zoo", "bus", "shop", "gym", "bar", "spa", "farm", "port",
         "gate", "news", "milk", "bread", "books", "music", "pizza", "sale")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
DRAWN_SIZE = 48
TYPES = ("color", "color at", "shape at", "size", "where", "count", "exists", "relation", "sign")
WEIGHTS = (8, 1, 1, 3, 5, 3, 4, 4, 2)                                              # how often each is asked in training: the hard ones more


def make_scene(seed: int, held_out: bool = False) -> dict:
    """{"objects": [(cell, size, color, shape), ...] by cell, "sign": None or (row, word), "seed"}: a pure function of its arguments.

    Training and held-out scenes differ by content, not by seed alone: one description in ten is held out, by its checksum, so no
    held-out combination of objects and places is ever trained on."""
    for attempt in range(10_000):
        rng = random.Random(seed * 10_007 + attempt)
        sign = (rng.randrange(3), rng.choice(WORDS)) if rng.random() < 0.35 else None
        cells = [c for c in range(9) if sign is None or c // 3 != sign[0]]
        n = rng.choices((1, 2, 3, 4, 5), (1, 2, 3, 3, 2))[0]
        # Few colours and shapes to a scene, so that "the red one" and "the circle" are often not enough to tell which
        colors, shapes = rng.sample(list(COLORS), min(n, 3)), rng.sample(SHAPES, min(n, 3))
        objects = [(c, rng.choice(list(SIZES)), rng.choice(colors), rng.choice(shapes)) for c in sorted(rng.sample(cells, n))]
        scene = {"objects": objects, "sign": sign, "seed": seed}
        if (zlib.crc32(describe(scene).encode()) % 10 == 0) == held_out:
            return scene


def draw_scene(scene: dict) -> Image.Image:
    """The scene as a 48 x 48 RGB image. Position in the cell, shade, background and noise vary with the scene's seed."""
    rng, scale = random.Random(scene["seed"] * 10_007 + 1), 2                      # drawn twice as large, then averaged: soft edges
    base = rng.randrange(20, 70)
    img = Image.new("RGB", (DRAWN_SIZE * scale,) * 2, tuple(base + rng.randrange(-15, 16) for _ in range(3)))
    draw = ImageDraw.Draw(img)
    for cell, size, color, shape in scene["objects"]:
        r = SIZES[size] * rng.uniform(0.9, 1.1)
        x, y = (16 * (i + 0.5) + rng.uniform(-1.5, 1.5) for i in (cell % 3, cell // 3))
        fill = tuple(min(255, max(0, v + rng.randrange(-14, 15))) for v in COLORS[color])
        at = lambda *points: [((x + r * a) * scale, (y + r * b) * scale) for a, b in points]
        box = at((-1, -1), (1, 1))
        match shape:
            case "circle": draw.ellipse(box, fill)
            case "ring": draw.ellipse(box, outline=fill, width=round(0.42 * r * scale))
            case "square": draw.rectangle(at((-0.85, -0.85), (0.85, 0.85)), fill)
            case "triangle": draw.polygon(at((0, -1), (1, 0.85), (-1, 0.85)), fill)
            case "cross":
                draw.rectangle(at((-0.35, -1), (0.35, 1)), fill)
                draw.rectangle(at((-1, -0.35), (1, 0.35)), fill)
            case "star": draw.polygon(at(*STAR), fill)
    img = img.reduce(scale)
    if scene["sign"]:
        row, word = scene["sign"]
        draw, width = ImageDraw.Draw(img), 6 * len(word)
        x, y = rng.randrange(2, DRAWN_SIZE - width - 2), 16 * row + rng.randrange(1, 4)
        ink, paper = rng.choice((((20, 20, 20), (225, 225, 215)), ((245, 245, 240), (30, 70, 40)), ((250, 240, 90), (40, 40, 60))))
        draw.rectangle((x - 2, y, x + width + 1, y + 11), paper)
        draw.text((x, y), word, ink, font=FONT)
    noise = rng.randbytes(DRAWN_SIZE * DRAWN_SIZE * 3).translate(bytes(i % 13 for i in range(256)))
    noise = np.frombuffer(noise, np.uint8).reshape(DRAWN_SIZE, DRAWN_SIZE, 3)
    return Image.fromarray((np.asarray(img).astype(np.int16) + noise - 6).clip(0, 255).astype(np.uint8))


STAR = [(np.sin(i * np.pi / 5) * (1.12, 0.45)[i % 2], -np.cos(i * np.pi / 5) * (1.12, 0.45)[i % 2]) for i in range(10)]
FONT = ImageFont.load_default_imagefont()                                          # 6 x 11 pixels a letter, inside Pillow: the same everywhere


def phrases(scene: dict) -> dict:
    """{cell: "top left: large red circle"}, in scan order; a sign's phrase stands at its row's first cell: "middle: sign open"."""
    out = {cell: f"{PLACES[cell]}: {size} {color} {shape}" for cell, size, color, shape in scene["objects"]}
    if scene["sign"]:
        row, word = scene["sign"]
        out[3 * row] = f"{('top', 'middle', 'bottom')[row]}: sign {word}"
    return dict(sorted(out.items()))


def describe(scene: dict) -> str:
    """The caption, place first, in scan order: "top left: large red circle. middle: sign open."."""
    return " ".join(p + "." for p in phrases(scene).values())


def ask(scene: dict, kind: str, rng: random.Random):
    """A question of that type and its answer, or None where the scene offers none."""
    objects, pick = scene["objects"], rng.choice
    unique = lambda i: [o for o in objects if [p[i] for p in objects].count(o[i]) == 1]
    things = [o[2:] for o in objects]
    named = [o for o in objects if things.count(o[2:]) == 1]                       # "the red circle" names exactly one
    thing = lambda o: f"{o[2]} {o[3]}"
    match kind:
        case "color" if unique(3):
            o = pick(unique(3))
            return f"What color is the {o[3]}?", o[2]
        case "color at":
            o = pick(objects)
            return f"What color is the shape at the {PLACES[o[0]]}?", o[2]
        case "shape at":
            o = pick(objects)
            return f"What shape is at the {PLACES[o[0]]}?", o[3]
        case "size" if named:
            o = pick(named)
            return f"Is the {thing(o)} large or small?", o[1]
        case "where" if named:
            o = pick(named)
            return f"Where is the {thing(o)}?", PLACES[o[0]]
        case "count":
            i, o = rng.randrange(4), pick(objects)
            word = (o[2], o[3], pick(list(COLORS)), pick(SHAPES))[i]               # half of them about something that is there
            n = sum(word in p for p in objects)
            return f"How many {word}{' shapes' if word in COLORS else 'es' if word == 'cross' else 's'} are there?", NUMBERS[n]
        case "exists":
            there = {o[2:] for o in objects}
            # A "no" is a near miss where there is one: a colour and a shape that are both there, but not together
            near = sorted({(a[2], b[3]) for a in objects for b in objects} - there)
            yes = rng.random() < 0.5
            o = pick(sorted(there)) if yes else pick(near) if near and rng.random() < 0.7 else (pick(list(COLORS)), pick(SHAPES))
            return f"Is there a {o[0]} {o[1]}?", "yes" if tuple(o) in there else "no"
        case "relation" if len(named) > 1:
            a, b = rng.sample(named, 2)
            axis = pick([i for i in (0, 1) if (a[0] % 3, a[0] // 3)[i] != (b[0] % 3, b[0] // 3)[i]])
            less = (a[0] % 3 < b[0] % 3) if axis == 0 else (a[0] // 3 < b[0] // 3)
            yes = rng.random() < 0.5
            word = (("right of", "left of"), ("below", "above"))[axis][less == yes]
            return f"Is the {thing(a)} {word} the {thing(b)}?", "yes" if yes else "no"
        case "sign":
            return "What does the sign say?", scene["sign"][1] if scene["sign"] else "no sign"
    return None


def ask_many(scene: dict, n: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """n different questions about a scene where it offers so many: [(type, question, answer), ...], types drawn by WEIGHTS."""
    out, seen = [], set()
    for kind in rng.choices(TYPES, WEIGHTS, k=4 * n):
        if len(out) == n:
            break
        if kind == "sign" and not scene["sign"] and rng.random() < 0.7:            # "no sign" must not be the usual answer
            continue
        if (qa := ask(scene, kind, rng)) and qa[0] not in seen:
            seen.add(qa[0])
            out.append((kind, *qa))
    return out


def as_turns(pairs, head: str = "<image>\n") -> list[dict]:
    """[(question, answer), ...] -> conversations; `head` stands before the first question."""
    return [turn for i, (q, a) in enumerate(pairs)
            for turn in ({"from": "human", "value": head * (i == 0) + q}, {"from": "gpt", "value": a})]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Datasets: something with a length, whose items are samples


class Drawn:
    """The drawn world. kind "caption": describe the scene; "chat": questions and answers, several turns. Item i is always the same."""

    def __init__(self, kind: str, size: int, seed: int = 0, held_out: bool = False, n_questions: int = 6):
        self.kind, self.size, self.seed, self.held_out, self.n_questions = kind, size, seed, held_out, n_questions

    def __len__(self):
        return self.size

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.size:
            raise IndexError(i)
        seed = self.seed * 100_000_007 + i
        scene, rng = make_scene(seed, self.held_out), random.Random(seed)
        if self.kind == "caption":
            pairs, types = [("Describe the scene.", describe(scene))], ["caption"]
        else:
            asked = ask_many(scene, self.n_questions, rng)
            pairs, types = [(q, a) for _, q, a in asked], [t for t, _, _ in asked]
        return {"id": str(seed), "images": [draw_scene(scene)], "conversations": as_turns(pairs), "types": types, "scene": scene}


class LlavaJson:
    """LLaVA's format: a JSON list, or JSONL, of {"id", "image": path | [paths] | absent, "conversations"}; paths below image_dir.

    Raises ValueError naming the file, and the line where the JSON is malformed."""

    def __init__(self, file: str, image_dir: str = ""):
        self.file, self.image_dir = str(file), image_dir
        try:
            with open(file, encoding="utf-8") as f:
                text = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{file}: cannot be read: {e}") from None
        self.samples, number = [], 1                                               # number: the line that is being read
        try:
            if text.lstrip().startswith("["):
                self.samples = json.loads(text)
            else:
                for number, line in enumerate(text.split("\n"), 1):
                    if line.strip():
                        self.samples.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ValueError(f"{file}: malformed JSON in line {number + e.lineno - 1}: {e.msg}") from None
        if not self.samples:
            raise ValueError(f"{file}: holds no samples")

    def __len__(self):
        return len(self.samples)

    def lengths(self, n_image_tokens: int = 0) -> list[int]:
        """Words and image slots per sample: enough to put samples of like length into one batch. (LLaVA sorts text-only samples apart.)"""
        return [sum(len(v.split()) + v.count("<image>") * n_image_tokens for v in (str(t.get("value", "")) for t in s["conversations"]
                                                                                   if isinstance(t, dict)))
                if isinstance(s, dict) and isinstance(s.get("conversations"), list) else 0 for s in self.samples]

    def __getitem__(self, i: int) -> dict:
        sample = self.samples[i]
        where = f"{self.file}: sample {i + 1}"
        if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
            raise ValueError(f"{where}: must be an object with a list 'conversations'")
        images = sample.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(p, str) for p in images):
            raise ValueError(f"{where}: 'image' must be a path or a list of paths")
        return {"id": f"{where} (id {sample.get('id', '-')})", "images": [os.path.join(self.image_dir, p) for p in images],
                "conversations": sample["conversations"]}


class Encoded(torch.utils.data.Dataset):
    """Samples as tensors: {"tokens" (T,), "labels" (T,), "images" (k, 3, S, S), "broken": [messages], "truncated": bool}.

    A sample that cannot be used is reported in "broken" and replaced by its successor; the trainer prints and counts it.
    strict=True raises instead. Too long a sample is cut on the right; a cut that would lose image slots makes it broken."""

    def __init__(self, data, tokenizer, template: str, image_size: int, n_image_tokens: int, max_length: int, strict: bool = False):
        if len(data) == 0:
            raise ValueError("the data set is empty")
        self.data, self.tokenizer, self.template, self.strict = data, tokenizer, template, strict
        self.image_size, self.n_image_tokens, self.max_length = image_size, n_image_tokens, max_length

    def __len__(self):
        return len(self.data)

    def encode(self, sample: dict) -> dict:
        n_marks = sum(str(t.get("value", "")).count("<image>") for t in sample["conversations"] if isinstance(t, dict))
        if n_marks != len(sample["images"]):
            raise ValueError(f"the text has {n_marks} <image>, the sample has {len(sample['images'])} images")
        ids, labels = encode_chat(sample["conversations"], self.tokenizer, self.template, self.n_image_tokens)
        if truncated := len(ids) > self.max_length:
            if IMAGE in ids[self.max_length:]:
                raise ValueError(f"{len(ids)} tokens, over the limit of {self.max_length}, and cutting would lose an image")
            ids, labels = ids[:self.max_length], labels[:self.max_length]
            if all(label == IGNORE for label in labels):
                raise ValueError(f"nothing to learn in the first {self.max_length} tokens; raise --max-length")
        images = [load_image(image, self.image_size) for image in sample["images"]]
        return {"tokens": torch.tensor(ids), "labels": torch.tensor(labels), "truncated": truncated,
                "images": torch.stack(images) if images else torch.empty(0, 3, self.image_size, self.image_size)}

    def __getitem__(self, i: int) -> dict:
        broken = []
        for j in range(i, i + 100):
            name = f"sample {j % len(self) + 1}"
            try:
                sample = self.data[j % len(self)]
                name = sample["id"]
                return {**self.encode(sample), "broken": broken}
            except ValueError as e:
                message = str(e) if name in str(e) else f"{name}: {e}"
                if self.strict:
                    raise ValueError(message) from None
                broken.append(message)
        raise ValueError(f"100 samples in a row are broken; the last one: {broken[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Batches


def pad_rows(rows: list, fill: int, multiple: int = 8) -> torch.Tensor:
    """Lists or (T_i,) tensors -> (B, T) int64, filled on the right; T is rounded up so that few different lengths occur."""
    length = -(-max(len(r) for r in rows) // multiple) * multiple
    rows = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r) for r in rows], batch_first=True, padding_value=fill)
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=fill)


def collate(samples: list) -> dict:
    """Encoded samples -> tokens (B, T), labels (B, T), images (n, 3, S, S) in order of appearance, broken, truncated.

    As in the released code, a sample without an image brings a blank one, which fills no slot. They stand behind the others."""
    blank = [torch.zeros(1, *s["images"].shape[1:]) for s in samples if not len(s["images"])]
    return {"tokens": pad_rows([s["tokens"] for s in samples], PAD), "labels": pad_rows([s["labels"] for s in samples], IGNORE),
            "images": torch.cat([s["images"] for s in samples] + blank), "broken": sum((s["broken"] for s in samples), []),
            "truncated": sum(s["truncated"] for s in samples)}


class Batches:
    """Endless lists of indices, one a micro-batch: a pure function of (seed, step), so a run can go on anywhere.

    A step's global batch is cut the same way whatever the number of processes: each takes every world-th sample and goes through
    its share in micro-batches. With `lengths`, samples of like length share a batch (less padding): as LLaVA, the shuffled
    epoch is cut into groups of 50 batches, each group is sorted by length, and the batches are shuffled again."""

    def __init__(self, n: int, batch_size: int, micro_batch: int, seed: int = 0, start_step: int = 0, rank: int = 0, world: int = 1,
                 lengths: list | None = None):
        if batch_size % (micro_batch * world):
            raise ValueError(f"batch size {batch_size} is not a multiple of {world} processes x {micro_batch} samples at a time")
        self.n, self.batch_size, self.micro_batch, self.seed, self.start_step = n, batch_size, micro_batch, seed, start_step
        self.rank, self.world, self.lengths = rank, world, lengths
        self.per_epoch = max(1, n // batch_size)                                   # the last, incomplete batch is left out

    def epoch(self, number: int) -> torch.Tensor:
        """(per_epoch, batch_size) indices."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.n, generator=g)
        order = order.repeat(-(-self.batch_size // self.n))[:self.per_epoch * self.batch_size]
        if self.lengths is not None:
            length = torch.tensor(self.lengths)
            order = torch.cat([part[length[part].argsort(stable=True)] for part in order.split(50 * self.batch_size)])
        order = order.view(self.per_epoch, self.batch_size)
        return order if self.lengths is None else order[torch.randperm(self.per_epoch, generator=g)]

    def __iter__(self):
        step = self.start_step
        while True:
            epoch = self.epoch(step // self.per_epoch)
            for batch in epoch[step % self.per_epoch:]:
                yield from batch[self.rank::self.world].reshape(-1, self.micro_batch).tolist()
                step += 1


# ---------------------------------------------------------------------------------------------------------------------
# 6. `python data.py`: how fast are images, against what Pillow needs in any case?


def image_speed(width: int, height: int, size: int = 336, n: int = 24, rounds: int = 7) -> tuple[float, float]:
    """Images a second on one core: (Pillow's decoding and resizing alone, load_image), of n JPEGs of that size, smooth noise.

    Time is this thread's own, so that a busy machine counts little; the two take turns, and the best round counts."""
    rng, best = np.random.default_rng(0), [float("inf")] * 2
    bare = lambda file: Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, f"{i}.jpg") for i in range(n)]
        for file in files:
            coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
        for i in range(2 * rounds):
            start = time.thread_time()
            for file in files:
                load_image(file, size) if i % 2 else bare(file)
            best[i % 2] = min(best[i % 2], (time.thread_time() - start) / n)
    return 1 / best[0], 1 / best[1]


if __name__ == "__main__":
    print("JPEGs -> 336 x 336, images a second and core\n            Pillow alone  load_image")
    for width, height in ((640, 480), (480, 640)):
        bare, ours = image_speed(width, height)
        print(f"{width} x {height} {bare:14.0f} {ours:11.0f}   {100 * ours / bare:.0f}%")
