"""data.py: from pictures, sounds and conversations to tensors. Imports no other file of the project.

1. images        pad to square, resize, normalise as LLaVA and CLIP do
2. sounds        WAV files, resampled to 16 kHz, as the log-mel pictures that Whisper hears
3. chat          templates, token ids, and labels from character offsets
4. drawn world   the default's data: scenes of shapes and signs, drawn on the fly, with captions, questions and one right answer each
5. drawn sounds  its hearing counterpart: beeps, glides and pairs; and questions that need eyes and ears
6. datasets      the drawn world, and LLaVA's JSON with images, sounds and videos on disk
7. batches       padding, and a sampler that can be resumed in the middle of an epoch

A sample, everywhere: {"images": [path or PIL image], "conversations": [{"from": "human" | "gpt", "value": text}, ...]}, and perhaps
"audio": [path or (wave, sample rate)] and "video": [[path or PIL image of each frame], ...]. "<image>", "<audio>" and "<video>" in a
text mark the place of the next one.
"""
import functools
import json
import math
import mmap
import os
import random
import re
import wave
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
MEAN_COLOR = tuple(int(m * 255) for m in CLIP_MEAN)
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
    seen, tall, first, last = resize_padded(image, size)
    x = np.empty((3, size, size), np.float32)
    for out, band, (scale, shift), mean in zip(x, seen.split(), NORMALISE, MEAN_COLOR):       # plane by plane, two passes over each
        out, band = (out.T, np.asarray(band).T) if tall else (out, np.asarray(band))
        out[:first] = out[last:] = np.float32(mean) * np.float32(scale) + np.float32(shift)
        np.multiply(band, scale, out=out[first:last], dtype=np.float32, casting="unsafe")
        out[first:last] += shift
    return torch.from_numpy(x)


def resize_padded(image: Image.Image, size: int) -> tuple[Image.Image, bool, int, int]:
    """Of pad_to_square(image).resize((size, size)) the part that is not mere padding, bit for bit, and (tall, first, last): it is
    the square's columns (tall) or rows first to last.

    Pillow resizes along rows first, then along columns, each output pixel from the input within `reach` of its centre. So of the padded
    axis only the output from `first` to `last` sees the image; it is resized alone, from just as much padding as it sees. Its ends are
    where input and output pixels' edges meet (every `step` outputs; Pillow's arithmetic is exact there), or the ends of the square."""
    side, short, tall = max(image.size), min(image.size), image.height > image.width
    step, at = size // math.gcd(side, size), (side - short) // 2
    reach = 2 * max(1, side / size) + 1                                            # bicubic looks two pixels far, of the coarser grid
    first = max(0, int((at - reach) * size / side)) // step * step
    last = min(size, -(-math.ceil((at + short + reach) * size / side) // step) * step)
    if 2 * short < side:                                                           # for narrow images Pillow changes the order
        first, last = 0, size
    low, high = (first * side // size, last * side // size)
    start, stop = max(0, math.floor(low - reach)), min(side, math.ceil(high + reach))
    part = (lambda *ends: (ends[0], 0, ends[1], ends[2])) if tall else (lambda *ends: (0, ends[0], ends[2], ends[1]))
    shape = lambda n, across: (n, across) if tall else (across, n)
    if not tall:
        image = image.resize((size, image.height), Image.Resampling.BICUBIC)       # along rows, which are whole
    canvas = Image.new("RGB", shape(stop - start, image.height if tall else size), MEAN_COLOR)
    canvas.paste(image, shape(at - start, 0))
    seen = canvas.resize(shape(last - first, size), Image.Resampling.BICUBIC, box=part(low - start, high - start, side if tall else size))
    return seen, tall, first, last


def pad_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), MEAN_COLOR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# 2. Sounds: Whisper's ears
#
# A tower built for images can hear once a sound is made into one: how loud each of 80 pitch bands is, every 10 ms. The bands lie as
# the ear's do (mel scale: even below 1 kHz, by ratio above), and loudness counts by its logarithm.

RATE, HOP, FFT, N_MELS = 16_000, 160, 400, 80                                      # of Whisper: a 25 ms window every 10 ms
MAX_CHUNKS = 20                                                                    # of one sound: ten minutes in chunks of 30 s
RATES = (1000, 1_000_000)                                                          # the lowest and the highest that a sound may have


def read_wav(path, max_seconds: float = math.inf) -> tuple[np.ndarray, int]:
    """A WAV file of 8, 16, 24 or 32 bit PCM -> (wave (n,) float32 in [-1, 1], sample rate); channels are averaged.

    Raises ValueError, naming the file and what to do, if it is missing, of another format, truncated, without a sample, or (seen
    before it is read) longer than max_seconds."""
    remedy = f"`ffmpeg -i FILE -ac 1 -ar {RATE} -c:a pcm_s16le OUT.wav` makes a good one of most files"
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:     # changes stay in memory
            at = memory.find(b"fmt ", 0, 4096) + 8
            if memory[at:at + 2] == b"\xfe\xff" and memory[at + 24:at + 26] == b"\1\0":
                memory[at:at + 2] = b"\1\0"      # "extensible" PCM, ffmpeg's 24 bits: the same samples; `wave` knows it from Python 3.12 on
            f = wave.open(memory)
            channels, width, rate, n = f.getnchannels(), f.getsampwidth(), f.getframerate(), f.getnframes()
            if n == 0 or width > 4 or not RATES[0] <= rate <= RATES[1]:
                raise wave.Error(f"{n} samples of {8 * width} bits at {rate} Hz")
            data = f.readframes(n) if n / rate <= max_seconds else None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path, and --images") from None
    except (OSError, EOFError, ValueError, wave.Error) as e:                       # (an empty file cannot be mapped: ValueError)
        raise ValueError(f"{path}: cannot be read as PCM WAV: {str(e) or 'it ends too early'}; {remedy}") from None
    if data is None:
        raise ValueError(f"{path}: {n / rate:,.0f} s of sound, over the limit of {max_seconds:,.0f} s; cut it into parts")
    if len(data) < n * channels * width:
        raise ValueError(f"{path}: truncated, {len(data) // (channels * width)} of {n} samples are there; copy it again, or {remedy}")
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)                         # little-endian bytes
    full = np.zeros((len(raw), 4), np.uint8)
    full[:, 4 - width:] = raw ^ 128 if width == 1 else raw                         # the top bytes of an int32; 8 bits are unsigned
    return full.view("<i4").reshape(-1, channels).astype(np.float32).mean(1) / 2 ** 31, rate


def resample(wave: np.ndarray, rate: int, to: int = RATE) -> np.ndarray:
    """(n,) at `rate` -> (ceil(n * to / rate),) float32 at `to` samples a second.

    Samples fix the wave in between (Shannon): it is a sum of sincs, one a sample, and can be read at any time. Read more slowly, it must
    first lose what is above the new Nyquist frequency (half the rate), or that would come back as a wrong, low tone. A wider sinc, made
    finite by a Kaiser window, does both: up to 0.9 of the lower Nyquist levels keep within 0.01 dB, from 1.0 on less than -60 dB is left.
    Polyphase: after `up` new samples the two grids meet again, so only `up` filters differ. Each is made, used with a stride and
    forgotten: rates without a common divisor (44,099) need many, but never a large table."""
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"a sample rate of {rate} Hz; it may be {RATES[0]:,} to {RATES[1]:,}")
    wave = np.ascontiguousarray(wave, np.float32)
    up, down = to // math.gcd(rate, to), rate // math.gcd(rate, to)
    if up == down:
        return wave
    cutoff = 0.95 * min(1, to / rate)                                              # in units of the old Nyquist
    half = math.ceil(48 / min(1, to / rate))                                       # taps on each side: 48 samples of the slower rate
    n_out = -(-len(wave) * up // down)
    out, windows = np.empty(n_out, np.float32), np.lib.stride_tricks.sliding_window_view(np.pad(wave, half), 2 * half + 1)
    for phase in range(min(up, n_out)):                                            # new samples phase, phase + up, ... are alike
        first, fraction = divmod(phase * down, up)                                 # where they stand on the old grid
        t = np.arange(-half, half + 1) - fraction / up
        taps = cutoff * np.sinc(cutoff * t) * np.i0(7 * np.sqrt(np.maximum(0, 1 - (t / half) ** 2))) / np.i0(7)
        out[phase::up] = windows[first::down][:len(out[phase::up])] @ taps.astype(np.float32)      # row i is centered at old sample i
    return out


@functools.lru_cache
def whisper_ear() -> tuple[torch.Tensor, torch.Tensor]:
    """-> (Hann window (400,), mel filters (80, 201): a triangle for each band over the frequencies, of equal area, as Slaney's)."""
    hertz = lambda mel: np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))         # linear up to 1 kHz = 15 mel
    edges, f = hertz(np.linspace(0, 15 + 27 * math.log(8, 6.4), N_MELS + 2)), np.linspace(0, RATE / 2, FFT // 2 + 1)
    left, middle, right = (edges[i:i + N_MELS, None] for i in range(3))
    triangles = np.minimum((f - left) / (middle - left), (right - f) / (right - middle)).clip(0)
    return torch.hann_window(FFT), torch.from_numpy(triangles * 2 / (right - left)).float()


def log_mel(wave, sample_rate: int, seconds: float = 30.0) -> torch.Tensor:
    """wave (n,) -> (n_chunks, 80, 100 * seconds) float32, Whisper's features: chunks of `seconds`, the last filled up with silence.

    Each chunk is normalised for itself: what is more than 80 dB below its loudest point counts as silence. Raises ValueError if
    it has no samples, is no mono wave, holds NaN, or would take more than MAX_CHUNKS chunks."""
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"a sound must be one mono wave, (n,) with n > 0, not {wave.shape}")
    if len(wave) > MAX_CHUNKS * seconds * sample_rate:
        raise ValueError(f"{len(wave) / sample_rate:,.0f} s of sound, over the limit of {MAX_CHUNKS * seconds:,.0f} s; cut it into parts")
    if not np.isfinite(wave).all():                                                # one NaN would silence its whole chunk
        raise ValueError("the wave holds NaN or infinity: mend what made it")
    wave, n = resample(wave, sample_rate), HOP * round(RATE / HOP * seconds)       # n: samples of a chunk
    chunks, (window, filters) = torch.from_numpy(np.pad(wave, (0, -len(wave) % n))).view(-1, n), whisper_ear()
    spectrum = torch.stft(chunks, FFT, HOP, window=window, return_complex=True)[..., :-1]          # (n_chunks, 201, frames)
    mel = (filters @ (spectrum.real ** 2 + spectrum.imag ** 2)).clamp(min=1e-10).log10()           # (n_chunks, 80, frames)
    return (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4


def load_audio(audio, seconds: float = 30.0) -> torch.Tensor:
    """A path or (wave, sample rate) -> (n_chunks, 80, 100 * seconds). Raises ValueError as `read_wav` and `log_mel` do."""
    return log_mel(*(read_wav(audio, MAX_CHUNKS * seconds) if isinstance(audio, (str, os.PathLike)) else audio), seconds)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Chat: templates, ids, labels

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
EOS = {"plain": "\n", "tiny": "</s>", "mistral": "</s>", "vicuna": "</s>", "openchat": "<|end_of_turn|>"}     # what ends an answer
TEMPLATES = tuple(EOS)
SLOTS = {"<image>": IMAGE, "<audio>": AUDIO}


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
            # vicuna: LLaVA-1.5's "v1". openchat: the same with OpenChat's end mark; MoE-LLaVA does not use OpenChat's own words.
            case _, "human": pieces.append(((SYSTEM + " ") * (i == 0) + f"USER: {text} ASSISTANT:", False))
            case _, _: pieces.append((f" {text}{EOS[template]}", True))
    return pieces


def encode_chat(conversations: list, tokenizer, template: str, n_image_tokens: int, n_audio_tokens: int | list = 0):
    """Turns -> (ids, labels), lists of int of equal length; each "<image>" becomes n_image_tokens times IMAGE, each "<audio>"
    n_audio_tokens times AUDIO. A list says how many for each "<audio>" in order: a long sound has several chunks.

    LLaVA finds the answers by tokenizing pieces again and adding up lengths; where a tokenizer merges across a border the sums
    differ and the sample is dropped with "tokenization mismatch". Here the text is tokenized once, and a token is learnt if its
    characters reach into an answer. Raises ValueError as `render` does, and if a complete conversation leaves nothing to learn."""
    pieces = render(conversations, template)
    if template == "openchat" and tokenizer.token_to_id(EOS[template]) is None:
        raise ValueError(f"template openchat ends answers with {EOS[template]}, which this tokenizer does not know; use --template vicuna")
    mask = b"".join(bytes([learnt]) * len(text) for text, learnt in pieces)        # 1 for each character of an answer
    ids, labels, at = [], [], 0                                                    # at: characters before this chunk
    marks = "(<image>)" if n_audio_tokens == 0 else "(<image>|<audio>)"            # without audio, "<audio>" is but an HTML tag
    chunks = re.split(marks, "".join(text for text, _ in pieces))                  # text, mark, text, mark, ..., text
    n_sounds = chunks[1::2].count("<audio>")
    slots = n_audio_tokens if isinstance(n_audio_tokens, list) else [n_audio_tokens] * n_sounds
    if len(slots) != n_sounds:
        raise ValueError(f"the text has {n_sounds} <audio>, n_audio_tokens is a list of {len(slots)}; it needs one number for each mark")
    slots = iter(slots)
    for i, chunk in enumerate(chunks):
        if i % 2:
            n = n_image_tokens if chunk == "<image>" else next(slots)
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
# 4. The drawn world: a CLEVR for a laptop
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
FONT = ImageFont.load_default_imagefont()                                          # 6 x 11 pixels a letter, and the same everywhere


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


def plural(word: str) -> str:
    return word + (" shapes" if word in COLORS else "es" if word == "cross" else "s")


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
            return f"How many {plural(word)} are there?", NUMBERS[n]
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


def ask_many(scene: dict | None, n: int, rng: random.Random, sound: dict | None = None) -> list[tuple[str, str, str]]:
    """n different questions about a scene, a sound or both, where they offer so many: [(type, question, answer), ...], drawn by weight."""
    weights, probe = dict(zip(TYPES, WEIGHTS)) if scene else {}, random.Random(0)
    if sound:                                                                      # which offers few types: only those are drawn from
        weights |= {kind: w for kind, w in zip(SOUND_TYPES, SOUND_WEIGHTS) if ask_sound(sound, kind, probe)}
    if scene and sound:
        weights |= {kind: w for kind, w in zip(BOTH_TYPES, BOTH_WEIGHTS) if ask_both(scene, sound, kind, probe)}
    out, seen = [], set()
    for kind in rng.choices(list(weights), list(weights.values()), k=4 * n):
        if len(out) == n:
            break
        if kind == "sign" and not scene["sign"] and rng.random() < 0.7:            # "no sign" must not be the usual answer
            continue
        qa = ask(scene, kind, rng) if kind in TYPES else ask_sound(sound, kind, rng) if kind in SOUND_TYPES else (
            ask_both(scene, sound, kind, rng))
        if qa and (what := kind if kind in SOUND_TYPES else qa[0]) not in seen:
            seen.add(what)
            out.append((kind, *qa))
    return out


def as_turns(pairs, head: str = "<image>\n") -> list[dict]:
    """[(question, answer), ...] -> conversations; `head` stands before the first question."""
    return [turn for i, (q, a) in enumerate(pairs)
            for turn in ({"from": "human", "value": head * (i == 0) + q}, {"from": "gpt", "value": a})]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Drawn sounds: the same for the ears
#
# One to five equal beeps, a glide that rises or falls, or a pair of sounds one after the other, in a second and a half. All have a
# timbre, a pitch and a loudness; when they sound, how fast and at what exact frequency is left to chance.

SOUND_SECONDS = 1.5
TIMBRES = {"whistle": lambda k: k == 1,                                            # how strong harmonic k is: the tone alone,
           "organ": lambda k: k in (1, 2, 4),                                      # with its octaves,
           "buzz": lambda k: k ** -0.5}                                            # with all of them
PITCHES = {"low": 200, "middle": 420, "high": 880}                                 # Hz, give or take a tenth
LOUDNESS = {"loud": (0.1, 0.17), "soft": (0.008, 0.013)}                           # root mean square, from and to: 18 dB lie in between
SOUND_KINDS = {"beeps": 4, "glide": 3, "pair": 3}                                  # and how often each is drawn
SOUND_TYPES = ("beeps", "glide", "higher", "timbre", "loudness", "order")
SOUND_WEIGHTS = (6, 4, 4, 2, 2, 4)
BOTH_TYPES = ("as many", "more", "if rises", "together")
BOTH_WEIGHTS = (60, 20, 80, 60)                                                    # every second question about both needs both


def make_sound(seed: int, held_out: bool = False, kinds=tuple(SOUND_KINDS)) -> dict:
    """{"kind", "voices": [(pitch, timbre)], two of a pair, "beeps": how many or None, "way": "rises", "falls" or None, "loudness", "seed"}:
    a pure function of its arguments.

    As with scenes, one description in ten is held out by its checksum: 20 of 198. With so few, an answer may be missing or too
    frequent among them; so the checksum starts from a number that was searched for, with which the answers are spread well. Not so
    glides: were "loud low buzz rising" held out, every loud low buzz in training would fall, and that be learnt instead of to listen.
    Held-out glides differ as all sounds do, by their seeds: in frequency, bend, timing, level and noise."""
    kind = random.Random(seed).choices(kinds, [SOUND_KINDS[k] for k in kinds])[0]
    for attempt in range(10_000):
        rng = random.Random(seed * 10_009 + attempt)
        pitches, timbres = rng.sample(list(PITCHES), 2), rng.sample(list(TIMBRES), 2)
        if rng.random() < 0.25:
            timbres[1] = timbres[0]
        sound = {"kind": kind, "voices": list(zip(pitches, timbres))[:1 + (kind == "pair")], "beeps": None, "way": None,
                 "loudness": rng.choice(list(LOUDNESS)), "seed": seed}
        if kind == "beeps":
            sound["beeps"] = rng.randrange(1, 6)
        elif kind == "glide":
            sound["way"] = rng.choice(("rises", "falls"))
        if kind == "glide" or (zlib.crc32(describe_sound(sound).encode(), 42_583) % 10 == 0) == held_out:
            return sound


def describe_sound(sound: dict) -> str:
    """The caption: "three loud high whistle beeps.", "one soft low buzz rising.", "low whistle, then high buzz, loud."."""
    first, *second = (" ".join(voice) for voice in sound["voices"])
    match sound["kind"]:
        case "beeps": return f"{NUMBERS[sound['beeps']]} {sound['loudness']} {first} beep{'s' * (sound['beeps'] > 1)}."
        case "glide": return f"one {sound['loudness']} {first} {'rising' if sound['way'] == 'rises' else 'falling'}."
        case "pair": return f"{first}, then {second[0]}, {sound['loudness']}."


@functools.lru_cache
def wavetable(timbre: str, n_harmonics: int) -> np.ndarray:
    """One period in 4096 samples, of power one, as synthesizers keep it: a tone of any frequency steps through it at its own speed."""
    period = np.linspace(0, 2 * np.pi, 4096, endpoint=False)
    table = sum(TIMBRES[timbre](k) * np.sin(k * period) for k in range(1, n_harmonics + 1))
    return (table / np.sqrt(np.mean(table ** 2))).astype(np.float32)


def draw_sound(sound: dict) -> tuple[np.ndarray, int]:
    """The sound as (wave (24,000,) float32, 16,000). Timing, frequencies and the faint noise vary with the sound's seed."""
    rng = random.Random(sound["seed"] * 10_009 + 10_008)
    out = np.random.default_rng(sound["seed"]).standard_normal(int(SOUND_SECONDS * RATE), np.float32) * np.float32(0.001)
    shortest, longest = {"beeps": (0.09, 0.13), "glide": (0.6, 1.2), "pair": (0.35, 0.5)}[sound["kind"]]
    n, length, gap = sound["beeps"] or len(sound["voices"]), rng.uniform(shortest, longest), rng.uniform(0.08, 0.14)
    start = rng.uniform(0.03, SOUND_SECONDS - 0.03 - n * length - (n - 1) * gap)
    level = rng.uniform(*LOUDNESS[sound["loudness"]])
    voices = [(PITCHES[pitch] * rng.uniform(0.9, 1.1), timbre) for pitch, timbre in sound["voices"]]
    bend = rng.uniform(1.25, 1.5) ** {"rises": 1, "falls": -1, None: 0}[sound["way"]]
    m = round(length * RATE)
    fade = np.minimum(1, np.minimum(np.arange(m), np.arange(m)[::-1]) / 128, dtype=np.float32)      # without clicks
    for i in range(n):
        frequency, timbre = voices[i % len(voices)]
        phase = np.cumsum(frequency * bend ** np.linspace(-1, 1, m)) / RATE        # in periods; around the middle of the glide
        table = wavetable(timbre, int(7500 / (frequency * max(bend, 1 / bend))))   # nothing above the Nyquist frequency
        at = round((start + i * (length + gap)) * RATE)
        out[at:at + m] += level * fade * table[(phase * 4096).astype(np.int64) % 4096]
    return out.clip(-1, 1), RATE


def ask_sound(sound: dict, kind: str, rng: random.Random):
    """A question of that type and its answer, or None where the sound offers none."""
    (pitch, timbre), (second, other) = sound["voices"][0], sound["voices"][-1]
    match kind:
        case "beeps" if sound["kind"] == "beeps": return "How many beeps are there?", NUMBERS[sound["beeps"]]
        case "glide" if sound["kind"] == "glide": return "Does the sound rise or fall?", sound["way"]
        case "higher" if sound["kind"] == "pair":
            return "Which sound is higher, the first or the second?", "first" if PITCHES[pitch] > PITCHES[second] else "second"
        case "timbre" if sound["kind"] != "pair": return "What makes the sound?", timbre
        case "loudness": return "Is the sound loud or soft?", sound["loudness"]
        case "order" if timbre != other:
            return "Which comes first, the {} or the {}?".format(*rng.sample((timbre, other), 2)), timbre
    return None


def ask_both(scene: dict, sound: dict, kind: str, rng: random.Random):
    """A question that neither eyes nor ears alone can answer, and its answer; or None where the two offer none. The answer first says what
    is seen and heard, "two and three: no": a model thinks by writing, and one this small cannot count twice and compare before a word."""
    objects, n = scene["objects"], sound["beeps"]
    things = [word for o in objects for word in o[2:]]
    counts = {word: things.count(word) for word in sorted(set(things))}            # {"red": 2, "circle": 1, ...}
    match kind:
        case "as many" if n in counts.values() and (near := [w for w, c in counts.items() if abs(c - n) == 1]):
            same = [word for word, c in counts.items() if c == n]                  # both answers are at hand, so a coin decides
            yes = rng.random() < 0.5
            word = rng.choice(same if yes else near)
            return f"Are there as many beeps as {plural(word)}?", f"{NUMBERS[n]} and {NUMBERS[counts[word]]}: {'yes' if yes else 'no'}"
        case "more" if n:
            m = len(objects)
            more = "equal" if n == m else "beeps" if n > m else "shapes"
            return "Are there more beeps or more shapes?", f"{NUMBERS[n]} and {NUMBERS[m]}: {more}"
        case "if rises" if sound["way"] and len({o[2] for o in objects}) > 1:
            a = rng.choice(objects)
            a, b = rng.sample((a, rng.choice([o for o in objects if o[2] != a[2]])), 2)
            question = f"What color is the shape at the {PLACES[a[0]]} if the sound rises, at the {PLACES[b[0]]} if it falls?"
            o = a if sound["way"] == "rises" else b
            return question, f"{sound['way']}, {PLACES[o[0]]}: {o[2]}"
        case "together" if n and (few := [word for word, c in counts.items() if n + c <= 5]):
            word = rng.choice(few)
            m = counts[word]
            return f"How many beeps and {plural(word)} are there together?", f"{NUMBERS[n]} and {NUMBERS[m]}: {NUMBERS[n + m]}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# 6. Datasets: something with a length, whose items are samples

FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")                        # what counts as an image in a video's folder
MIXED = {"mixed caption": ("caption", "sound caption"), "mixed chat": ("chat", "sound chat", "both chat")}


class Drawn:
    """The drawn world. kind "caption": describe the scene; "chat": questions and answers, several turns; "sound caption" and "sound chat":
    the same about a sound; "both chat": about an image and a sound; MIXED: these in turn. Item i is always the same."""

    def __init__(self, kind: str, size: int, seed: int = 0, held_out: bool = False, n_questions: int = 6):
        self.kind, self.size, self.seed, self.held_out, self.n_questions = kind, size, seed, held_out, n_questions

    def __len__(self):
        return self.size

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.size:
            raise IndexError(i)
        seed = self.seed * 100_000_007 + i
        kinds = MIXED.get(self.kind, (self.kind,))
        kind = kinds[i % len(kinds)]
        scene = None if kind.startswith("sound") else make_scene(seed, self.held_out)
        sound = None if kind in ("caption", "chat") else make_sound(seed, self.held_out) if scene is None else (
            make_sound(seed, self.held_out, ("beeps", "glide")))                   # no question is about a scene and a pair
        if kind.endswith("caption"):
            asked = [(kind, "Describe the scene.", describe(scene)) if scene else (kind, "Describe the sound.", describe_sound(sound))]
        else:                                                                      # two of a sound's three: the hard ones more often
            asked = ask_many(scene, self.n_questions if scene else -(-self.n_questions // 3), random.Random(seed), sound)
        sample = {"id": str(seed), "images": [draw_scene(scene)] if scene else [], "audio": [draw_sound(sound)] if sound else [],
                  "conversations": as_turns([qa[1:] for qa in asked], "<image>\n" * bool(scene) + "<audio>\n" * bool(sound)),
                  "types": [qa[0] for qa in asked]}
        return sample | ({"scene": scene} if scene else {}) | ({"sound": sound} if sound else {})


class LlavaJson:
    """LLaVA's format: a JSON list, or JSONL, of {"id", "image": path | [paths] | absent, "conversations"}; paths below image_dir.
    Also "audio": path | [paths], and "video": folder of frames | [frame files] | [folders or lists, one a video].

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

    def lengths(self, n_image_tokens: int = 0, n_audio_tokens: int = 0) -> list[int]:
        """Words and slots per sample, a video as one image, a sound as one chunk: enough to put samples of like length into one batch.
        (LLaVA sorts text-only samples apart.)"""
        slots = {"<image>": n_image_tokens, "<video>": n_image_tokens, "<audio>": n_audio_tokens}
        return [sum(len(v.split()) + sum(n * v.count(mark) for mark, n in slots.items())
                    for v in (str(t.get("value", "")) for t in s["conversations"] if isinstance(t, dict)))
                if isinstance(s, dict) and isinstance(s.get("conversations"), list) else 0 for s in self.samples]

    def __getitem__(self, i: int) -> dict:
        sample = self.samples[i]
        where = f"{self.file}: sample {i + 1}"
        if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
            raise ValueError(f"{where}: must be an object with a list 'conversations'")
        paths = {}
        for key in ("image", "audio"):
            files = sample.get(key) or []
            files = [files] if isinstance(files, str) else files
            if not isinstance(files, list) or not all(isinstance(p, str) for p in files):
                raise ValueError(f"{where}: '{key}' must be a path or a list of paths")
            paths[key] = [os.path.join(self.image_dir, p) for p in files]
        video = sample.get("video") or []
        return {"id": f"{where} (id {sample.get('id', '-')})", "images": paths["image"], "audio": paths["audio"],
                "video": video_files(video if isinstance(video, (str, list)) else [video], self.image_dir, where),
                "conversations": sample["conversations"]}


def video_files(videos, folder: str, where: str) -> list[list[str]]:
    """A folder of frames, a list of frame files, or a list of such folders or lists -> the frame files of each video."""
    join = lambda p: os.path.join(folder, p)
    if not videos:
        return []
    if isinstance(videos, str) or all(isinstance(p, str) and not os.path.isdir(join(p)) for p in videos):
        videos = [videos]                                                      # one video: its folder, or its frames
    out = []
    for video in videos:
        if isinstance(video, str):
            names = os.listdir(join(video)) if os.path.isdir(join(video)) else []
            names.sort(key=lambda name: [(text, int(n or 0)) for text, n in re.findall(r"(\D*)(\d*)", name)])      # f10 after f9
            if not (names := [name for name in names if name.lower().endswith(FRAMES)]):
                raise ValueError(f"{where}: {join(video)}: no folder of frames; `ffmpeg -i FILE -r 1 FOLDER/%04d.png` fills one")
            video = [os.path.join(video, name) for name in names]
        if not isinstance(video, list) or not all(isinstance(p, str) for p in video):
            raise ValueError(f"{where}: 'video' must be a folder, a list of frame files, or a list of folders or such lists")
        out.append([join(p) for p in video])
    return out


def load_senses(sample: dict, image_size: int, n_audio_tokens: int = 0, seconds: float = 30.0, max_frames: int = 8, average: bool = True):
    """A sample's files as tensors -> (conversations, images (k, 3, S, S), audio (m, 80, 100 * seconds), frames, slots).

    Of a video max_frames frames are taken, evenly, and each becomes an image. average: as in Uni-MoE, a video fills the slots of one image,
    with the mean of its frames' features. So its "<video>" becomes one "<image>", and `frames` says for each "<image>" in order how many
    of the images in a row stand behind it (None without a video). Otherwise a "<video>" becomes as many "<image>" as it has frames.
    slots: for encode_chat, how many AUDIO each "<audio>" takes, n_audio_tokens a chunk. With n_audio_tokens = 0, for a model that hears
    nothing, audio is None and slots 0. Raises ValueError if marks and files differ in number."""
    pictures, sounds, videos = sample.get("images") or [], sample.get("audio") or [], []
    for video in sample.get("video") or []:
        if not (k := min(len(video), max_frames)):
            raise ValueError("a video without frames")
        videos.append([video[(2 * i + 1) * len(video) // (2 * k)] for i in range(k)])      # the middle of each of k equal parts
    if sounds and not n_audio_tokens:
        raise ValueError(f"the sample has {len(sounds)} sounds, this model hears nothing; leave them out, or take a model with ears")
    text = "\n".join(str(t.get("value", "")) for t in sample["conversations"] if isinstance(t, dict))
    for mark, name, files in (("<image>", "images", pictures), ("<video>", "videos", videos), ("<audio>", "sounds", sounds)):
        if text.count(mark) != len(files) and (n_audio_tokens or mark != "<audio>"):
            raise ValueError(f"the text has {text.count(mark)} {mark}, the sample has {len(files)} {name}")
    one, many, marks = iter(pictures), iter(videos), iter("<image>" * (1 if average else len(v)) for v in videos)
    groups = [[next(one)] if mark == "<image>" else next(many) for mark in re.findall("<image>|<video>", text)]
    conversations = [{**t, "value": re.sub("<video>", lambda _: next(marks), t["value"])}          # (a bad turn is for `render` to tell)
                     if isinstance(t, dict) and isinstance(t.get("value"), str) else t for t in sample["conversations"]]
    images = [load_image(picture, image_size) for group in groups for picture in group]
    for video in videos:
        sizes = [(frame if isinstance(frame, Image.Image) else Image.open(frame)).size for frame in video]
        for frame, size in zip(video, sizes):
            if size != sizes[0]:
                raise ValueError(f"{frame}: a frame of {size} pixels in a video of {sizes[0]}; all must have one size")
    chunks = [load_audio(sound, seconds) for sound in sounds]
    return (conversations, torch.stack(images) if images else torch.empty(0, 3, image_size, image_size),
            torch.cat([torch.empty(0, N_MELS, round(RATE / HOP * seconds)), *chunks]) if n_audio_tokens else None,
            [n for group in groups for n in ([len(group)] if average else [1] * len(group))] if videos else None,
            [len(c) * n_audio_tokens for c in chunks] if n_audio_tokens else 0)


class Encoded(torch.utils.data.Dataset):
    """Samples as tensors: {"tokens" (T,), "labels" (T,), "images" (k, 3, S, S), "broken": [messages], "truncated": bool}; with
    n_audio_tokens also "audio" (m, 80, 100 * seconds), and where there is a video "frames", as load_senses says.

    A sample that cannot be used is reported in "broken" and replaced by its successor; the trainer prints and counts it.
    strict=True raises instead. Too long a sample is cut on the right; a cut that would lose slots makes it broken."""

    def __init__(self, data, tokenizer, template: str, image_size: int, n_image_tokens: int, max_length: int, strict: bool = False,
                 n_audio_tokens: int = 0, seconds: float = 30.0, max_frames: int = 8, average: bool = True):
        if len(data) == 0:
            raise ValueError("the data set is empty")
        self.data, self.tokenizer, self.template, self.strict = data, tokenizer, template, strict
        self.image_size, self.n_image_tokens, self.max_length = image_size, n_image_tokens, max_length
        self.senses = dict(image_size=image_size, n_audio_tokens=n_audio_tokens, seconds=seconds, max_frames=max_frames, average=average)

    def __len__(self):
        return len(self.data)

    def encode(self, sample: dict) -> dict:
        conversations, images, audio, frames, slots = load_senses(sample, **self.senses)
        ids, labels = encode_chat(conversations, self.tokenizer, self.template, self.n_image_tokens, slots)
        if truncated := len(ids) > self.max_length:
            for slot, what in ((IMAGE, "an image"), (AUDIO, "a sound")):
                if slot in ids[self.max_length:]:
                    raise ValueError(f"{len(ids)} tokens, over the limit of {self.max_length}, and cutting would lose {what}")
            ids, labels = ids[:self.max_length], labels[:self.max_length]
            if all(label == IGNORE for label in labels):
                raise ValueError(f"nothing to learn in the first {self.max_length} tokens; raise --max-length")
        item = {"tokens": torch.tensor(ids), "labels": torch.tensor(labels), "truncated": truncated, "images": images}
        return item | ({} if audio is None else {"audio": audio}) | ({} if frames is None else {"frames": frames})

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
# 7. Batches


def pad_rows(rows: list, fill: int, multiple: int = 8) -> torch.Tensor:
    """Lists or (T_i,) tensors -> (B, T) int64, filled on the right; T is rounded up so that few different lengths occur."""
    length = -(-max(len(r) for r in rows) // multiple) * multiple
    rows = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r) for r in rows], batch_first=True, padding_value=fill)
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=fill)


def collate(samples: list) -> dict:
    """Encoded samples -> tokens (B, T), labels (B, T), images (n, 3, S, S) in order of appearance, broken, truncated.

    As in the released code, a sample without an image brings a blank one, which fills no slot. They stand behind the others.
    With a model that hears also audio (m, 80, frames); where no sample has a sound, one silent chunk, so that every process runs
    every module. It needs no more: the ear has no routing statistics. With a video also frames (groups,), the blank images' ones behind."""
    blank = [torch.zeros(1, *s["images"].shape[1:]) for s in samples if not len(s["images"])]
    batch = {"tokens": pad_rows([s["tokens"] for s in samples], PAD), "labels": pad_rows([s["labels"] for s in samples], IGNORE),
             "images": torch.cat([s["images"] for s in samples] + blank), "broken": sum((s["broken"] for s in samples), []),
             "truncated": sum(s["truncated"] for s in samples)}
    if sounds := [s["audio"] for s in samples if "audio" in s]:
        audio = torch.cat(sounds)                                                  # (m, 80, frames)
        batch["audio"] = audio if len(audio) else audio.new_zeros(1, *audio.shape[1:])
    if any("frames" in s for s in samples):
        batch["frames"] = torch.tensor(sum((s.get("frames", [1] * len(s["images"])) for s in samples), []) + [1] * len(blank))
    return batch


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
