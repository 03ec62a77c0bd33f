"""data.py: from pictures and conversations to the tensors that a model reads.

Every sample takes the same four steps (S x S pixels; k images of a sample, n of a batch; T tokens;
B samples of a batch; m chunks of sound):

    a data set    finds    {"images": [path, ...], "conversations": [turn, ...]}
    load_senses   loads    images (k, 3, S, S)
    encode_chat   encodes  tokens (T,) and labels (T,), which say what the model learns to write
    collate       joins    tokens (B, T), labels (B, T), images (n, 3, S, S)

`Encoded` does the second and third step. `Batches` says which samples go into each batch.

A turn is {"from": "human" or "gpt", "value": text}, and "<image>" in a text marks the place of the
sample's next image. A sample may also have "audio": [path or (wave, sample rate), ...] and "video":
[[path of each frame, ...], ...], whose places are marked by "<audio>" and "<video>". Instead of the
path to an image there may be a PIL image.

There are three data sets. `LlavaJson` reads files in LLaVA's format. `Drawn` makes up a little
world of coloured shapes and beeps as it goes; the default run trains on it. `Facts` gives pictures
names that nobody can guess.

This file imports no other file of the project.
"""
import functools
import json
import math
import mmap
import os
import random
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# `tokens` holds ids of text, which are >= 0, and these. (model.py knows the same numbers.)
IMAGE = -200  # the slot of one of an image's features
AUDIO = -201  # the slot of one of a sound's features
PAD = -1  # nothing: the row has ended

# `labels` holds the ids that are learnt, and this where nothing is learnt.
IGNORE = -100

# ------------------------------------------------------------------------------------------------
# 1. An image

# The mean and standard deviation of the pixels that CLIP was trained on: red, green, blue, 0 to 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# How a picture is made larger or smaller.
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PictureFormat(NamedTuple):
    """How a model wants its pictures. The defaults are CLIP's pixels and LLaVA-1.5's squares."""
    size: int  # pixels a side
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    # How a picture becomes a square. "pad": the shorter sides get margins; nothing is lost. "crop":
    # what lies outside of its middle is cut off. LLaVA calls these "pad" and "square". "stretch":
    # the shorter sides become longer, as SigLIP has it.
    aspect: str = "pad"
    filter: str = "bicubic"  # one of FILTERS


def load_image(image, size: int | PictureFormat) -> torch.Tensor:
    """A path or PIL image -> (3, size, size) float32, as the vision tower was trained to see it.

    size: a PictureFormat; or the pixels a side of a picture for CLIP, which is padded. The square
    is resized by Pillow's bicubic filter, as CLIP's own preprocessing does (or by the bilinear one,
    as SigLIP 2's), and each value of 0 to 255 becomes (value / 255 - mean) / std.
    Raises ValueError, naming the file, if it cannot be read: see `open_image`.
    """
    wanted = as_format(size)
    square = open_image(image)
    if wanted.aspect == "pad":
        square = pad_to_square(square, wanted.mean)
    elif wanted.aspect == "crop":
        square = crop_to_square(square, wanted)
    # "stretch" is done by resizing alone.
    square = square.resize((wanted.size, wanted.size), FILTERS[wanted.filter])

    # (value / 255 - mean) / std, in place. One colour at a time, because the model wants (3, H, W)
    # and Pillow keeps (H, W, 3).
    pixels = np.empty((3, wanted.size, wanted.size), np.float32)
    for plane, color, mean, std in zip(pixels, square.split(), wanted.mean, wanted.std):
        plane[:] = color
        plane *= 1 / (255 * std)
        plane -= mean / std
    return torch.from_numpy(pixels)


def pad_to_square(image, mean=CLIP_MEAN):
    """The RGB image in the middle of a square of the mean colour: its margins will be nearly 0."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# ------------------------------------------------------------------------------------------------
# 2. A conversation
#
# Every chat model has its own way of writing down who says what. It must be followed to the letter:
# a model that was trained on "USER: Why? ASSISTANT:" answers worse when anything else stands there.
# TEMPLATES, in section 7, has the ways of all models that we know. The default run writes
# "<q>What is it?<a> A ring.</s><q>Is it red?<a> Yes.</s>". As a template that is
#
#     Template(first="<q>{text}<a>", later="<q>{text}<a>", answer=" {text}", end="</s>")


class Piece(NamedTuple):
    """A stretch of a conversation as it is written down."""
    text: str
    learnt: bool  # does the model learn to write it?
    typed: bool = False  # by whoever talks: a "</s>" in it is four letters, and ends nothing
    is_slot: bool = False  # "<image>" or "<audio>", in whose place the features go


def render(conversations, template, marks=("<image>", "<audio>")):
    """Turns and a template's name -> [Piece, ...]. The model reads the pieces, joined.

    It learns to write the answers among them. (An empty answer is learnt, too, where LLaVA would
    take it for one that is still to come.) A conversation that ends with a turn of the human is a
    prompt: its text stops where the answer begins.

    marks: what keeps a place for features. All else that somebody types is text.
    Raises ValueError for bad turns: see `check_turns`.
    """
    check_turns(conversations)
    form = TEMPLATES[template]

    pieces = []
    for i, turn in enumerate(conversations):
        learnt = turn["from"] == "gpt"
        if learnt:
            layout = form.answer + form.end
        elif i == 0:
            layout = form.first
        else:
            layout = form.later

        # The layout is "<q>{text}<a>", for example.
        before, behind = layout.split("{text}")
        pieces.append(Piece(before, learnt))
        pieces += typed_pieces(turn, form, marks)
        pieces.append(Piece(behind, learnt))
    return pieces


# ------------------------------------------------------------------------------------------------
# 3. Token ids and labels


def encode_chat(conversations: list, tokenizer, template: str, n_image_tokens: int,
                n_audio_tokens: int | list = 0) -> tuple[list[int], list[int]]:
    """Turns -> (ids, labels), two lists of int of one length.

    tokenizer: of the library tokenizers (of one of transformers, its backend_tokenizer), set
    neither to pad nor to truncate.
    Each "<image>" becomes n_image_tokens times IMAGE, each "<audio>" n_audio_tokens times AUDIO.
    A list gives a number for every single "<audio>", as a long sound takes more. With 0, for a
    model that hears nothing, "<audio>" is ordinary text. A label is the token's id, or IGNORE where
    nothing is learnt. It is the model that shifts them by one.

    What is learnt is decided by characters. The text is tokenized once, the tokenizer tells which
    characters each token covers, and a token is learnt if any of these belongs to an answer:

        text      <q>What is it?<a> A ring.</s>
        learnt    00000000000000000111111111111
        tokens    <q> What _is _it ? <a> _A _ring . </s>      ("_": a space that is in the token)
        labels    -100 (six times)       _A _ring . </s>

    (If the tokenizer cuts it so. The shipped one cuts into smaller pieces.)

    LLaVA instead tokenizes the pieces once more and adds up their lengths. Where a tokenizer merges
    letters across a border the sum is wrong, and the sample is lost ("tokenization mismatch").

    Raises ValueError as `render` does; if the template is unknown, or the tokenizer lacks its end
    mark; if the list does not fit the marks; and if there are answers but nothing to learn.
    """
    check_end_mark(tokenizer, template)
    marks = ["<image>"] if n_audio_tokens == 0 else ["<image>", "<audio>"]
    pieces = render(conversations, template, marks)
    slots = iter(slots_of_marks(pieces, n_image_tokens, n_audio_tokens))

    # As in LLaVA, each stretch of text between the slots is tokenized alone.
    encoded = [(token, IGNORE) for token in start_tokens(tokenizer, template)]
    stretch = []  # the pieces since the last slot
    for piece in pieces:
        if not piece.is_slot:
            stretch.append(piece)
            continue
        encoded += encode_text(stretch, tokenizer)
        encoded += [(slot, IGNORE) for slot in next(slots)]  # of an image, 576 times IMAGE
        stretch = []
    encoded += encode_text(stretch, tokenizer)

    ids = [token for token, _ in encoded]
    labels = [label for _, label in encoded]
    check_learnt(pieces, labels, conversations)
    return ids, labels


def encode_text(pieces, tokenizer):
    """Pieces of text that follow each other, joined -> [(id, label), ...]."""
    learnt = [piece.learnt for piece in pieces for _ in piece.text]  # one a character
    encoded = []
    for token, start, end in tokenize(pieces, tokenizer):
        is_learnt = any(learnt[start:end])
        encoded.append((token, token if is_learnt else IGNORE))
    return encoded


# ------------------------------------------------------------------------------------------------
# 4. One sample as tensors


@dataclass
class Encoded(torch.utils.data.Dataset):
    """A data set's samples as tensors: {"tokens" (T,), "labels" (T,), "images" (k, 3, S, S)}.

    Each item also has "broken", a list of messages, and "truncated", a bool. With sounds it has
    "audio" (m, n_mels, 100 * seconds), with a video "frames": see `load_senses`.

    A sample that is too long loses its end. If it would lose a part of an image there, it cannot be
    used. Where a sample cannot be used, the next one takes its place: see `first_usable`.
    """
    data: Any  # len(data) and data[i], a sample
    tokenizer: Tokenizer
    template: str
    pictures: PictureFormat | int  # how the model wants them: see `load_image`
    n_image_tokens: int
    max_length: int  # tokens
    strict: bool = False  # raise ValueError for a sample that cannot be used
    n_audio_tokens: int = 0  # of a chunk of sound; 0 for a model that hears nothing
    seconds: float = 30.0  # of such a chunk
    average: bool = True  # a video fills the slots of one image, otherwise each frame does
    n_mels: int = 80  # bands of sound that the model hears

    def __post_init__(self):
        if len(self.data) == 0:
            raise ValueError("the data set is empty")
        check_end_mark(self.tokenizer, self.template)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i: int) -> dict:
        return first_usable(self, i)

    def encode(self, sample: dict) -> dict:
        """A sample -> an item, without "broken". Raises ValueError if it cannot be used."""
        # In these conversations a "<video>" is now one "<image>" or several. frames: how many
        # images belong to each "<image>"; slots: how many tokens each sound takes.
        conversations, images, audio, frames, slots = load_senses(
            sample, self.pictures, self.n_audio_tokens, self.seconds, average=self.average,
            n_mels=self.n_mels)
        ids, labels = encode_chat(conversations, self.tokenizer, self.template,
                                  self.n_image_tokens, slots)

        truncated = len(ids) > self.max_length
        if truncated:
            check_cut(ids, labels, self.max_length)
        elif all(label == IGNORE for label in labels):
            raise ValueError(f"nothing to learn: the model ('gpt') says nothing in it: "
                             f"{str(conversations)[:300]}")
        item = {
            "tokens": torch.tensor(ids[:self.max_length]),
            "labels": torch.tensor(labels[:self.max_length]),
            "images": images,
            "truncated": truncated,
            "audio": audio,
            "frames": frames,
        }
        return {name: value for name, value in item.items() if value is not None}


# ------------------------------------------------------------------------------------------------
# 5. A batch


def collate(samples):
    """Items of `Encoded` -> {"tokens" (B, T), "labels" (B, T), "images" (n, 3, S, S), "broken":
    [messages], "replaced" and "truncated": how many}. The images of all samples follow each other.

    For a model that hears there is also "audio", and with a video "frames": see `add_sounds` and
    `add_frames`.
    """
    images = [sample["images"] for sample in samples]

    # As in the released code, a sample without an image brings a blank one, so that every process
    # runs the tower in every step: otherwise they would wait for each other's gradients for ever.
    # It stands after the others, where it fills no slot.
    blanks = [torch.zeros(1, *image.shape[1:]) for image in images if len(image) == 0]

    batch = {
        "tokens": pad_rows([sample["tokens"] for sample in samples], PAD),
        "labels": pad_rows([sample["labels"] for sample in samples], IGNORE),
        "images": torch.cat(images + blanks),
        "broken": [message for sample in samples for message in sample["broken"]],
        # Where several broken ones follow each other, an item has the messages of all of them.
        "replaced": sum(len(sample["broken"]) > 0 for sample in samples),
        "truncated": sum(sample["truncated"] for sample in samples),
    }
    add_sounds(batch, samples)
    add_frames(batch, samples)
    return batch


def pad_rows(rows, fill, multiple=8):
    """Lists or (T_i,) tensors -> (B, T) int64, filled up on the right.

    T is the greatest T_i, rounded up to a multiple. With fewer different lengths, memory is reused
    more often, and a compiled model need not be compiled again as often.
    """
    longest = max(len(row) for row in rows)
    length = multiple * math.ceil(longest / multiple)
    out = torch.full((len(rows), length), fill)  # (B, T)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.as_tensor(row)
    return out


# ------------------------------------------------------------------------------------------------
# You can stop here on a first reading. Below this line: the order of the samples, the templates of
# chat models, sounds, videos, LLaVA's files, the drawn world with its questions, the checks of what
# users bring, and what happens to broken samples.
# ------------------------------------------------------------------------------------------------
# 6. Several samples in a row, and the order of the samples


def collate_packed(samples, row_length):
    """As `collate`, but short samples share a row of up to row_length tokens, so that hardly any
    PAD is left. "sample_positions" (B, T) count from 0 in each of them, and keep them apart.

        tokens            What is it? A ring . Red ? No . PAD
        sample_positions  0    1  2   3 4    5 0   1 2  3 0

    The losses are those of `collate`. (But where a decoder's experts have a capacity, who comes
    first is served first, and here the samples are in another order.) Attention computes a whole
    row and then masks it, so a row should not be much longer than its samples, unless the model is
    so wide that attention is a small part of the work.
    """
    rows = pack([len(sample["tokens"]) for sample in samples], row_length)
    rows = [[samples[i] for i in row] for row in rows]
    batch = collate([sample for row in rows for sample in row])

    # The samples of a row stand one behind the other.
    tokens = [torch.cat([sample["tokens"] for sample in row]) for row in rows]
    labels = [torch.cat([sample["labels"] for sample in row]) for row in rows]
    places = [torch.cat([torch.arange(len(sample["tokens"])) for sample in row]) for row in rows]
    batch["tokens"] = pad_rows(tokens, PAD)  # (B, T)
    batch["labels"] = pad_rows(labels, IGNORE)  # (B, T)
    batch["sample_positions"] = pad_rows(places, 0)  # (B, T)

    # A first token has nothing before it that could predict it.
    batch["labels"][batch["sample_positions"] == 0] = IGNORE
    return batch


def pack(lengths, row_length):
    """-> rows, lists of indices: each sample in the first row that has room, the longest first.

    (First-fit decreasing: at most 11/9 of the fewest rows that would do, and 1.)
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows = []
    room = []  # in each row
    for i in order:
        fitting = [row for row, left in enumerate(room) if left >= lengths[i]]
        if not fitting:
            rows.append([])
            room.append(row_length)
        row = fitting[0] if fitting else -1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@dataclass
class Batches:
    """Lists of indices without end, one list for each micro-batch: a DataLoader's batch_sampler.

    What a step consists of depends on the seed and the number of the step alone. So a run that was
    interrupted goes on with the samples that it would have seen, and the batch of a step is the
    same for any number of processes. You can take this class along: it needs torch and nothing of
    this project, and knows nothing of your data but how many samples there are.

    With lengths, samples of similar length share a batch, which saves padding. As in LLaVA, the
    shuffled epoch is cut into groups of 50 batches, each group is sorted by length, and then the
    batches are shuffled.

    With shares, an epoch is a mixture of several sources. It still has n samples. Each source gives
    its share of them, one shuffle of its samples after the other, and goes on in the next epoch
    where it stopped: so a small source with a large share is repeated, and of a large one with a
    small share a part is seen. Every step draws from the whole mixture, so lengths then sort a
    step's samples only.

    Raises ValueError if batch_size is not a multiple of world * micro_batch.
    """
    n: int  # how many samples there are
    batch_size: int  # samples in a step, over all processes
    micro_batch: int  # samples that a process computes at a time
    seed: int = 0
    start_step: int = 0  # how many steps have been done
    rank: int = 0  # which process this is ...
    world: int = 1  # ... and how many there are
    lengths: list | None = None  # how long each sample is, in any unit
    sources: list | None = None  # of a mixture, where each sample comes from: 0, 1, ...
    shares: list | None = None  # and how much of an epoch each source gives; they sum to 1

    def __post_init__(self):
        if self.batch_size % (self.micro_batch * self.world) != 0:
            raise ValueError(f"batch size {self.batch_size} is not a multiple of {self.world} "
                             f"processes x {self.micro_batch} samples at a time")
        if self.shares is not None and abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares = {self.shares} must sum to 1: divide weights by their sum")
        # The last, incomplete batch of an epoch is left out.
        self.per_epoch = max(1, self.n // self.batch_size)

    def epoch(self, number: int) -> torch.Tensor:
        """The batches of an epoch: (per_epoch, batch_size) indices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.n, generator=generator)
        if self.shares is not None:
            order = self.mixture(number)[order]

        # A data set smaller than a batch is repeated until it fills one.
        order = order.repeat(math.ceil(self.batch_size / self.n))
        order = order[:self.per_epoch * self.batch_size]
        if self.lengths is None:
            return order.view(self.per_epoch, self.batch_size)

        # Sorted as a whole, every epoch would have the same batches. In groups it has not.
        lengths = torch.tensor(self.lengths)
        groups = []
        n_batches = 50 if self.shares is None else 1
        for group in order.split(n_batches * self.batch_size):
            by_length = lengths[group].argsort(stable=True)
            groups.append(group[by_length])
        batches = torch.cat(groups).view(self.per_epoch, self.batch_size)
        return batches[torch.randperm(self.per_epoch, generator=generator)]

    def mixture(self, number: int) -> torch.Tensor:
        """The samples of an epoch of a mixture, source by source: (n,) indices."""
        sources = torch.tensor(self.sources)
        chosen = []
        end = 0.0
        for source, share in enumerate(self.shares):
            # Rounded so that all counts sum to n. Always upwards from a half: round() goes to the
            # even number, which would leave nothing between 1.5 and 2.5.
            begin, end = end, end + share
            count = math.floor(self.n * end + 0.5) - math.floor(self.n * begin + 0.5)
            members = (sources == source).nonzero().flatten()
            n = len(members)

            # A source is an endless row of shuffles, and each epoch takes the next `count` of it.
            # Of 7 samples and a count of 5, epoch 1 takes the places 5 to 9: two of shuffle 0 and
            # three of shuffle 1.
            begins = number * count
            first_round = begins // n
            last_round = (begins + count) // n  # perhaps one too many, which is cut off below
            row = [members[self.shuffle(source, i, n)] for i in range(first_round, last_round + 1)]
            offset = begins - first_round * n
            chosen.append(torch.cat(row)[offset:offset + count])
        return torch.cat(chosen)

    def shuffle(self, source, i, n):
        """The i-th shuffle of a source's n samples."""
        # Far from the seeds of the epochs.
        seed = 2**62 + self.seed * 1_000_003 + i * len(self.shares) + source
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    def __iter__(self):
        step = self.start_step
        while True:
            # The first epoch may be entered in its middle.
            batches = self.epoch(step // self.per_epoch)
            for batch in batches[step % self.per_epoch:]:
                # A batch may be sorted by length. Every world-th sample is a fair share of it.
                mine = batch[self.rank::self.world]
                yield from mine.reshape(-1, self.micro_batch).tolist()
                step += 1


# ------------------------------------------------------------------------------------------------
# 7. The templates of chat models


class Template(NamedTuple):
    """How the turns of a conversation are written down.

    "{text}" stands for a turn's text. The space before an answer is part of the answer, as
    tokenizers merge it with the first word.
    """
    first: str  # the human's first turn
    later: str  # the human's other turns
    answer: str
    end: str  # what stands behind an answer
    # What the tokenizer must know as one token each. The last one ends an answer: a model that
    # writes it has finished.
    tokens: tuple = ("</s>",)
    # All is spelled out, so the tokenizer does not put its own "<s>" in front.
    spelled_out: bool = False
    strips: bool = False  # are the blanks around a turn's text left out?
    marks_only: bool = False  # of a question, is all left out but "<image>" and "<audio>"?


SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
LLAMA3_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the "
                 "visual content that the user provides, and assist the user with a variety of "
                 "tasks using natural language.")

# Llama 3 opens each turn with the speaker's name, and Qwen2 with its own marks around it.
LLAMA3_TURN = ("<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n")
CHATML_TURN = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

# To add a template, add a row.
TEMPLATES = {
    # LLaVA's first stage. The question is dropped: image, caption, newline.
    "plain": Template("{text}", "{text}", "{text}", "\n", tokens=(), marks_only=True),

    # This project's own, for the default run. Each mark is one token.
    "tiny": Template("<q>{text}<a>", "<q>{text}<a>", " {text}", "</s>"),

    # CuMo's "mistral_instruct_system". The released code spells "<s>" out although the tokenizer
    # puts one in front by itself; so here, too, there are two.
    "mistral": Template("<s>[INST] <<SYS>>\n" + SYSTEM + "\n<</SYS>>\n\n{text} [/INST]",
                        "[INST] {text} [/INST]", " {text} ", "</s>"),

    # LLaVA-1.5's "v1".
    "vicuna": Template(SYSTEM + " USER: {text} ASSISTANT:",
                       "USER: {text} ASSISTANT:", " {text}", "</s>"),

    # MoE-LLaVA's, for OpenChat. It keeps vicuna's words and takes only the end mark from OpenChat.
    "openchat": Template(SYSTEM + " USER: {text} ASSISTANT:",
                         "USER: {text} ASSISTANT:", " {text}", "<|end_of_turn|>",
                         tokens=("<|end_of_turn|>",)),

    # Qwen2, SmolLM2 and others. The text is LLaVA-NeXT's "qwen_1_5", with or without an image: what
    # transformers' apply_chat_template makes of these turns behind this system prompt. It is
    # Qwen2's own; Qwen2.5 and SmolLM2 were given others, which say who made them.
    # (LLaVA-NeXT also has the model learn the marks and newlines of the questions. We do not.)
    "chatml": Template("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML_TURN,
                       CHATML_TURN, "{text}", "<|im_end|>\n",
                       tokens=("<|im_start|>", "<|im_end|>"), spelled_out=True),

    # Llama 3. Again as LLaVA-NeXT's "llava_llama_3", which is apply_chat_template with this system
    # prompt. Llama's own template strips every text.
    "llama3": Template("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
                       + LLAMA3_SYSTEM + "<|eot_id|>" + LLAMA3_TURN,
                       LLAMA3_TURN, "{text}", "<|eot_id|>",
                       tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                       spelled_out=True, strips=True),
}
# The marks of all templates.
MARKS = {mark for form in TEMPLATES.values() for mark in form.tokens}
# What ends an answer.
EOS = {name: (form.tokens or (form.end,))[-1] for name, form in TEMPLATES.items()}


def end_token(tokenizer, template):
    """The id that ends an answer. ValueError if the tokenizer has no such token."""
    check_end_mark(tokenizer, template)
    return tokenizer.encode(EOS[template], add_special_tokens=False).ids[-1]


def fits(tokenizer, template):
    """Does the tokenizer know the template's tokens, each as one?

    A name in the vocabulary is not enough: Qwen2's has "</s>", but cuts the text "</s>" into three.
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
    marks = TEMPLATES[template].tokens
    return all(tokenizer.encode(mark, add_special_tokens=False).tokens == [mark] for mark in marks)


def template_for(tokenizer, otherwise):
    """The template of a decoder with this tokenizer, or another one if its marks do not tell."""
    for template in ("chatml", "llama3", "openchat"):
        if fits(tokenizer, template):
            return template
    return otherwise


# What somebody types, marks among it, becomes pieces, and these become tokens.


def typed_pieces(turn, form, marks):
    """What somebody typed in a turn -> [Piece, ...]: text, slot, text, slot, ..., text.

    A turn may itself have a list "marks", which `load_senses` gives it: what is not in that list is
    a mere word, as "<image>" is where there are no images.
    """
    marks = own_marks(turn, marks)
    learnt = turn["from"] == "gpt"
    text = turn["value"]

    # As in LLaVA, a single image moves to the head of its turn; several stay where they are.
    if not learnt and "<image>" in marks and text.count("<image>") == 1:
        words = text.replace("<image>", "").strip()
        # (Cut out of "<im<image>age>", it leaves another one.)
        if sum(map(words.count, marks)) == sum(map(text.count, marks)) - 1:
            text = f"<image>\n{words}".strip()
    if form.strips:
        text = text.strip()

    # The parentheses keep what the text is cut at. Without marks, cut at what is nowhere.
    pattern = "(" + ("|".join(marks) or "(?!)") + ")"
    parts = re.split(pattern, text)
    pieces = [Piece(part, learnt, typed=True, is_slot=i % 2 == 1) for i, part in enumerate(parts)]
    if form.marks_only and not learnt:
        pieces = pieces[1::2]
    return pieces


def slots_of_marks(pieces, n_image_tokens, n_audio_tokens):
    """The slots that each mark among the pieces becomes: a list of IMAGE or of AUDIO.

    n_audio_tokens: one number for all sounds, or a list with one for each.
    """
    marks = [piece.text for piece in pieces if piece.is_slot]
    n_sounds = marks.count("<audio>")
    if not isinstance(n_audio_tokens, list):
        n_audio_tokens = [n_audio_tokens] * n_sounds
    if len(n_audio_tokens) != n_sounds:
        raise ValueError(f"the text has {n_sounds} <audio>, n_audio_tokens is a list of "
                         f"{len(n_audio_tokens)}; it needs one number for each mark")

    sounds = iter(n_audio_tokens)
    slots = []
    for mark in marks:
        if mark == "<image>":
            slots.append([IMAGE] * n_image_tokens)
        else:
            slots.append([AUDIO] * next(sounds))
    return slots


def start_tokens(tokenizer, template):
    """The ids that stand in front of a conversation: "<s>", or none.

    Many tokenizers put "<s>" in front of whatever they are given. It is wanted once. The "</s>"
    that they would put behind the text is left out, since a conversation goes on.
    """
    if TEMPLATES[template].spelled_out:
        return []
    probe = tokenizer.encode("a")
    # Added tokens count as special: of "<s> a </s>" the first and the last.
    n = [*probe.special_tokens_mask, 0].index(0)
    return probe.ids[:n]


def tokenize(pieces, tokenizer):
    """Pieces -> [(id, first, last), ...]: a token stands for the characters text[first:last] of the
    pieces' joined text."""
    text = "".join(piece.text for piece in pieces)
    typed = [piece.typed for piece in pieces for _ in piece.text]  # one a character
    specials = special_tokens(tokenizer)

    spans = []
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for token, (first, last) in zip(tokens.ids, tokens.offsets):
        # Of blanks, some tokenizers report no characters: then the next one decides.
        if first == last:
            check_span(token, text, tokenizer)
            last = first + 1

        # A "</s>" that somebody typed is a word, and does not end anything. (Its span may begin
        # with a blank. So look where the mark itself begins.)
        ids = [token]
        if token in specials:
            span = text[first:last]
            begin = first + max(0, span.find(specials[token]))
            if typed[begin]:
                ids = spell_out(span, tokenizer)
        spans += [(token, first, last) for token in ids]
    return spans


def special_tokens(tokenizer):
    """{id: text} of the tokens that are marks and no text, such as "</s>"."""
    # Some tokenizers do not say so of their templates' marks.
    added = tokenizer.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special or token.content in MARKS}


@functools.lru_cache(4)
def unknown_token(tokenizer):
    """The text of the token for characters that it does not know, "<unk>"; or None."""
    if not isinstance(tokenizer.model, models.Unigram):
        return getattr(tokenizer.model, "unk_token", None)
    described = json.loads(tokenizer.to_str())["model"]
    if described.get("unk_id") is None:
        return None
    return described["vocab"][described["unk_id"]][0]


@functools.lru_cache(4)
def without_marks(tokenizer):
    """A copy to which "</s>" is letters. (To switch the tokenizer itself would also switch it for
    another thread, which may be writing a prompt.)"""
    described = json.loads(tokenizer.to_str())
    specials = special_tokens(tokenizer)
    for token in described["added_tokens"]:
        token["special"] = token["id"] in specials
    copy = Tokenizer.from_str(json.dumps(described))
    copy.encode_special_tokens = True
    return copy


def spell_out(text, tokenizer):
    """The ids of a text in which "</s>" is no mark but letters.

    So nobody can end a turn or speak for the model by typing its marks. (LLaVA's code and
    transformers' tokenizers take them for marks, unless told split_special_tokens.)
    """
    ids = without_marks(tokenizer).encode(text, add_special_tokens=False).ids
    # "<unk>" is no mark: it stands for a character that the tokenizer does not know.
    marks = {i for i, mark in special_tokens(tokenizer).items() if mark != unknown_token(tokenizer)}
    if marks & set(ids):
        raise ValueError(f"{text!r} is a mark, which this tokenizer cannot write as text; leave it "
                         "out")
    return ids


# ------------------------------------------------------------------------------------------------
# 8. Sounds
#
# A transformer made for images can also hear, if the sound is turned into a picture: how loud is
# each of 80 bands of pitch, every 10 ms? The bands lie as they do in the ear (the mel scale: even
# steps below 1 kHz, even ratios above), and loudness counts by its logarithm. So Whisper hears.

RATE = 16_000  # samples a second
HOP = 160  # samples from one column of the picture to the next
FFT = 400  # samples that make up one column
N_MELS = 80  # of Whisper up to large-v2; large-v3 hears 128
MAX_CHUNKS = 20  # of one sound: ten minutes, in chunks of 30 s
LOWEST_RATE = 1000  # that a sound may have, in samples a second
HIGHEST_RATE = 1_000_000


def load_audio(audio, seconds=30.0, n_mels=N_MELS):
    """A path or (wave, sample rate) -> (n_chunks, n_mels, 100 * seconds) float32.

    Raises ValueError as `read_wav` and `log_mel` do.
    """
    if isinstance(audio, (str, os.PathLike)):
        audio = read_wav(audio, MAX_CHUNKS * seconds)
    return log_mel(*audio, seconds, n_mels)


def log_mel(wave, sample_rate: int, seconds: float = 30.0, n_mels: int = N_MELS) -> torch.Tensor:
    """wave (n,), from -1 to 1 -> (n_chunks, n_mels, 100 * seconds) float32, Whisper's features.

    The sound is cut into chunks of `seconds`, and the last is filled up with silence. Each chunk is
    normalised for itself: what is more than 80 dB below its loudest point counts as silence.
    Raises ValueError if it is no mono wave, has no samples or too many, holds NaN, or has a rate
    out of range.
    """
    wave = np.asarray(wave, np.float32)
    check_wave(wave, sample_rate, seconds)
    wave = resample(wave, sample_rate)

    # Cut it into chunks.
    size = HOP * round(RATE / HOP * seconds)  # samples of a chunk
    wave = np.pad(wave, (0, -len(wave) % size))
    chunks = torch.from_numpy(wave).view(-1, size)  # (n_chunks, size)

    # How much of each of 201 frequencies is there, 100 times a second? Then sum up each band.
    window, filters = whisper_ear(n_mels)
    spectrum = torch.stft(chunks, FFT, HOP, window=window, return_complex=True)
    spectrum = spectrum[..., :-1]  # (n_chunks, 201, frames); Whisper drops the last frame
    power = spectrum.real ** 2 + spectrum.imag ** 2
    mel = (filters @ power).clamp(min=1e-10).log10()  # (n_chunks, n_mels, frames)

    # 80 dB are 8 powers of ten. The last step brings most values to -1..1.
    loudest = mel.amax((1, 2), keepdim=True)
    return (torch.maximum(mel, loudest - 8) + 4) / 4


def resample(wave, rate):
    """(n,) at `rate` samples a second -> (ceil(n * RATE / rate),) float32 at RATE.

    A wave is a sum of sines, and the Fourier transform says how much of each there is. We keep the
    sines that both rates can hold, and read their sum at the new rate. A rate holds frequencies up
    to half of itself (Nyquist's); what lies above would come back as a wrong, low tone. The last
    twentieth below that limit fades out, because a sharp edge would ring for long.
    """
    check_rate(rate)
    rate = int(rate)
    wave = np.asarray(wave, np.float32)
    if rate == RATE:
        return wave

    # The transform takes the wave for one turn of an endless circle. A tenth of a second of silence
    # keeps its end apart from its beginning. A turn must be a whole number of samples at both
    # rates: 441 samples at 44,100 Hz take as long as 160 at 16,000 Hz.
    common = math.gcd(rate, RATE)
    old_step = rate // common
    new_step = RATE // common
    steps = math.ceil((len(wave) + rate // 10) / old_step)

    # The transform is fast if the number of steps has small factors: round it up to at most 64
    # times a power of two. The silence gets a little longer.
    power = 2 ** max(0, steps.bit_length() - 6)
    steps = power * math.ceil(steps / power)
    spectrum = np.fft.rfft(wave, steps * old_step)  # (steps * old_step // 2 + 1,) complex

    # Irfft cuts the spectrum off at the new limit, or fills it up with zeros.
    limit = min(rate, RATE) / 2
    frequencies = np.fft.rfftfreq(steps * old_step, 1 / rate)
    fade = np.clip((limit - frequencies) / (0.05 * limit), 0, 1).astype(np.float32)
    out = np.fft.irfft(spectrum * fade, steps * new_step)

    # The transforms add up samples, of which there are now more or fewer.
    out = out * (new_step / old_step)
    return out[:math.ceil(len(wave) * RATE / rate)].astype(np.float32)


@functools.lru_cache
def whisper_ear(n_mels=N_MELS):
    """-> (Hann window (400,), mel filters (n_mels, 201)), which are Whisper's.

    A filter weighs the frequencies of one band. It is a triangle that reaches to the middles of the
    neighbouring bands, and all triangles have the same area (Slaney's Auditory Toolbox).
    """
    # A mel is a step of 67 Hz up to 1 kHz, which is at 15 mel, and a ratio above.
    highest = 15 + 27 * math.log(RATE / 2 / 1000, 6.4)  # 8 kHz, in mel
    mels = np.linspace(0, highest, n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # in Hz
    frequencies = np.linspace(0, RATE / 2, FFT // 2 + 1)  # (201,) Hz

    # Band i rises from edge i to edge i + 1 and falls to edge i + 2.
    filters = np.zeros((n_mels, FFT // 2 + 1))
    for i in range(n_mels):
        triangle = np.interp(frequencies, edges[i:i + 3], (0, 1, 0))
        filters[i] = triangle * 2 / (edges[i + 2] - edges[i])
    window = torch.hann_window(FFT, dtype=torch.float32, device="cpu")
    return window, torch.from_numpy(filters).float()


def read_wav(path, max_seconds=math.inf, content=None):
    """A WAV file of 8, 16, 24 or 32 bit PCM, or of 32 or 64 bit floats -> (wave (n,) float32 in
    [-1, 1], sample rate).

    content: the bytes of the file, where they are in memory already; then path is only a name.
    Channels are averaged. Raises ValueError, naming the file and what to do, if it is missing, of
    another format, truncated, without a sample, or longer than max_seconds.
    """
    remedy = (f"`ffmpeg -i FILE -ac 1 -ar {RATE} -c:a pcm_s16le OUT.wav` makes a good one of "
              "most files")
    if content is None:
        check_file(path)
    try:
        # The file is mapped, not read: its header comes first, and may promise hours.
        if content is None:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        wav = wav_header(content)
    except (OSError, ValueError, struct.error) as e:
        why = "it ends too early" if isinstance(e, struct.error) else e
        raise ValueError(f"{path}: cannot be read as PCM WAV: {why}; {remedy}") from None
    check_seconds(wav.n / wav.rate, max_seconds, f"{path}: ")

    # Now read the samples.
    frame = wav.channels * wav.width  # bytes of one sample of all channels
    data = content[wav.start:wav.start + wav.n * frame]
    if len(data) < wav.n * frame:
        raise ValueError(f"{path}: truncated, {len(data) // frame} of {wav.n} samples are there; "
                         f"copy it again, or {remedy}")
    if wav.form == FLOAT:
        samples = np.frombuffer(data, f"<f{wav.width}").astype(np.float32)
    else:
        samples = pcm_to_float(data, wav.width)
    return samples.reshape(wav.n, wav.channels).mean(1), wav.rate


class WavHeader(NamedTuple):
    """What a WAV file says about its samples."""
    form: int  # PCM or FLOAT
    channels: int
    rate: int  # samples a second, of each channel
    width: int  # bytes of a sample of one channel
    start: int  # byte of the file at which the samples begin
    n: int  # samples of each channel


# The numbers of formats, and how many bytes a sample may have. An extensible WAV, which ffmpeg
# writes for 24 bits, has its true number further inside.
PCM = 1
FLOAT = 3
EXTENSIBLE = 0xFFFE
WIDTHS = {PCM: (1, 2, 3, 4), FLOAT: (4, 8)}
COMPANDED = {6: "A-law", 7: "mu-law"}


def wav_header(content):
    """The bytes of a WAV file -> WavHeader. ValueError, or struct.error where they end too early.

    The file is a list of chunks: four letters, the size, and as many bytes, made even. "fmt " says
    what the samples in "data" are.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError("it does not begin with RIFF and WAVE")
    start = 12
    form = None
    while True:
        name, size = struct.unpack_from("<4sI", content, start)
        start += 8
        if name == b"data":
            break
        if name == b"fmt ":
            form, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", content, start)
            if form == EXTENSIBLE:
                form = struct.unpack_from("<H", content, start + 24)[0]
        start += size + size % 2
    if form is None:
        raise ValueError("its data come before their format")
    if form not in WIDTHS:
        name = COMPANDED.get(form, "unknown")
        raise ValueError(f"format {form} ({name}) is neither PCM nor float")

    # What writes into a pipe does not know the size yet: ffmpeg says 0xFFFFFFFF, arecord and sox
    # about 0x7FFFFFFF, others 0. Then the samples go on to the end of the file. (But they may be
    # none, if the file as a whole knows its size.)
    whole, = struct.unpack_from("<I", content, 4)
    knows_size = len(content) - 8 <= whole < 0x7FFFF000
    if size >= 0x7FFFF000 or (size == 0 and not knows_size):
        size = len(content) - start
    width = (bits + 7) // 8
    n = size // (channels * width) if channels and width else 0
    if n == 0 or width not in WIDTHS[form] or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise ValueError(f"{n} samples of {bits} bits at {rate} Hz in format {form}")
    if frame != channels * width:
        raise ValueError(f"{channels} samples of {bits} bits in {frame} bytes; they must be packed "
                         "without gaps")
    return WavHeader(form, channels, rate, width, start, n)


def pcm_to_float(data, width):
    """Little-endian integers of `width` bytes each -> (n,) float32 in [-1, 1]."""
    samples = np.frombuffer(data, np.uint8).reshape(-1, width)  # (n, width)
    if width == 1:
        # 8 bits alone are unsigned, with silence at 128.
        samples = samples ^ 128

    # As the upper bytes of an int32, all widths reach equally far.
    samples = np.pad(samples, ((0, 0), (4 - width, 0)))  # (n, 4)
    return samples.view("<i4")[:, 0].astype(np.float32) / 2 ** 31


# ------------------------------------------------------------------------------------------------
# 9. All that a sample shows: images, sounds, videos

# Where a file belongs in a text.
FILE_MARKS = ("<image>", "<video>", "<audio>")
# What counts as an image in a video's folder.
FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FILMS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")


def load_senses(sample, size, n_audio_tokens=0, seconds=30.0, max_frames=8, average=True,
                n_mels=N_MELS):
    """A sample -> (conversations, images, audio, frames, slots).

    conversations: the turns, with each "<video>" replaced by "<image>"s
    images: (k, 3, S, S), with the frames of videos, in the order of the text
    audio: (m, n_mels, 100 * seconds), or None if the model hears nothing
    frames: a list of how many images belong to each "<image>", or None without a video
    slots: for encode_chat, how many AUDIO each "<audio>" takes

    size: of the pictures, or their PictureFormat.
    Each frame of a video becomes an image; of a long video max_frames are taken, evenly. average:
    as in Uni-MoE, a video fills the slots of one image, with the mean of its frames' features; so
    "<video>" becomes one "<image>". Otherwise it becomes as many as there are frames.
    A sound is cut into chunks of `seconds`, and each chunk fills n_audio_tokens slots. 0 means that
    the model hears nothing.
    Raises ValueError if marks and files differ in number, and for files that cannot be read.
    """
    wanted = as_format(size)
    videos = [pick_frames(video, max_frames) for video in sample.get("video") or []]
    files = {
        "<image>": [[picture] for picture in sample.get("images") or []],
        "<video>": videos,
        "<audio>": sample.get("audio") or [],
    }
    text = text_of(sample)
    check_marks(text, files, n_audio_tokens)

    # Load what belongs to each mark, in the order of the text: an image or a video's frames.
    waiting = {mark: iter(files[mark]) for mark in files}
    groups = [next(waiting[mark]) for mark in re.findall("<image>|<video>", text) if files[mark]]
    none = torch.empty(0, 3, wanted.size, wanted.size, dtype=torch.float32)
    images = [load_image(picture, wanted)[None] for group in groups for picture in group]
    images = torch.cat([none, *images])  # (k, 3, S, S)
    check_frame_sizes(videos)

    # From here on there are only images; `frames` remembers which of them belong together.
    conversations = with_marks(sample["conversations"], files, average)
    frames = None
    if videos and average:
        frames = [len(group) for group in groups]
    elif videos:
        frames = [1] * len(images)

    # Sounds.
    if n_audio_tokens == 0:
        return conversations, images, None, frames, 0
    none = torch.empty(0, n_mels, round(RATE / HOP * seconds))
    chunks = [load_audio(sound, seconds, n_mels) for sound in files["<audio>"]]
    slots = [len(chunk) * n_audio_tokens for chunk in chunks]
    return conversations, images, torch.cat([none, *chunks]), frames, slots


def add_sounds(batch, samples):
    """Give the batch of a model that hears "audio" (m, n_mels, frames)."""
    sounds = [sample["audio"] for sample in samples if "audio" in sample]
    if not sounds:
        return
    audio = torch.cat(sounds)  # (m, n_mels, frames)

    # If no sample has a sound, there is a chunk of silence: all processes must run all modules, or
    # they would wait for each other's gradients for ever. One is enough for a whole batch.
    if len(audio) == 0:
        audio = audio.new_zeros(1, *audio.shape[1:])
    batch["audio"] = audio


def add_frames(batch, samples):
    """If a sample has a video, give the batch "frames" (groups,), which says for each "<image>" how
    many of the images belong to it."""
    if not any("frames" in sample for sample in samples):
        return
    frames = []
    for sample in samples:
        frames += sample.get("frames", [1] * len(sample["images"]))

    # All other images, the blank ones too, are groups of one.
    n_blanks = len(batch["images"]) - sum(frames)
    batch["frames"] = torch.tensor(frames + [1] * n_blanks)


def text_of(sample):
    """The texts of all turns, without what looks like a mark and is a word there. (`check_turns`
    complains about what is no turn.)"""
    texts = []
    for turn in sample["conversations"]:
        if isinstance(turn, dict):
            text = str(turn.get("value", ""))
            own = own_marks(turn, FILE_MARKS)
            for mark in FILE_MARKS:
                if mark not in own:
                    text = text.replace(mark, " ")
            texts.append(text)
    return "\n".join(texts)


def own_marks(turn, usual):
    """Of the usual marks, those that are marks in this turn: all, unless it has a list "marks"."""
    named = turn.get("marks")
    if not isinstance(named, list):
        return list(usual)
    return [mark for mark in usual if mark in named]


def pick_frames(video, max_frames=8):
    """At most max_frames of a video's frames: cut it into as many parts, and take their middles."""
    n = min(len(video), max_frames)
    if n == 0:
        raise ValueError("a video without frames")
    # Of 10 frames and 2 parts: the frames 2 and 7.
    return [video[(2 * i + 1) * len(video) // (2 * n)] for i in range(n)]


def with_marks(conversations, files, average):
    """The turns, with "<image>" for each frame of a "<video>", or one for all if they are averaged.

    Each turn gets a list "marks" of what is a mark in its text. A mark is a mere word where there
    are no files of its kind, as "<image>" is in LLaVA.
    """
    marks = [mark for mark in files if files[mark]]
    if "<video>" in marks:
        marks.append("<image>")
    sizes = iter([1 if average else len(video) for video in files["<video>"]])

    def images(mark):
        return "<image>" * next(sizes)

    turns = []
    for turn in conversations:
        # `check_turns` complains about what is no turn.
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            text = turn["value"]
            own = own_marks(turn, marks)
            if "<video>" in own:
                text = re.sub("<video>", images, text)
            turn = {**turn, "value": text, "marks": own}
        turns.append(turn)
    return turns


def video_files(videos, folder, where):
    """What a JSON file has under "video" -> the paths of each video's frames.

    videos: a folder of frames, a list of frame files, or a list with such a folder or list for each
    video. Paths are below `folder`. where: the words with which an error begins.
    """
    if not videos:
        return []

    # One video may stand there alone: its folder, or its frames.
    if not isinstance(videos, list) or all(is_frame(item, folder) for item in videos):
        videos = [videos]

    out = []
    for video in videos:
        if isinstance(video, str):
            out.append(frames_in(os.path.join(folder, video), where))
            continue
        if not are_texts(video):
            raise ValueError(f"{where}: 'video' must be a folder, a list of frame files, or a list "
                             "of folders or such lists")
        out.append([os.path.join(folder, frame) for frame in video])
    return out


def are_texts(items):
    return isinstance(items, list) and all(isinstance(item, str) for item in items)


def is_frame(item, folder):
    """Is this one frame of a video, and not a whole video: a folder, also one that is missing, or a
    film?"""
    if not isinstance(item, str) or item.lower().endswith(FILMS):
        return False
    path = os.path.join(folder, item)
    looks_like_a_file = os.path.splitext(item)[1] != "" or os.path.isfile(path)
    return looks_like_a_file and not os.path.isdir(path)


def frames_in(folder, where):
    """The image files in a folder, by the numbers in their names: f9.png comes before f10.png."""
    def text_and_numbers(name):
        return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]

    try:
        names = os.listdir(folder)
    except OSError:
        names = []
    names = [name for name in names if name.lower().endswith(FRAMES)]
    if not names:
        raise ValueError(f"{where}: {folder}: no folder of frames; `ffmpeg -i FILE -r 1 "
                         "FOLDER/%04d.png` fills one")
    return [os.path.join(folder, name) for name in sorted(names, key=text_and_numbers)]


def crop_to_square(image, wanted):
    """The middle of the image, as a PictureFormat has it: its shorter side becomes `size` pixels
    long, and what the longer one has too many of is cut off at both ends (as by CLIP's own
    preprocessing)."""
    size = wanted.size
    shorter = min(image.size)
    width = size * image.width // shorter
    height = size * image.height // shorter
    image = image.resize((width, height), FILTERS[wanted.filter])

    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def as_format(wanted):
    """A PictureFormat, from one, or from the size of pictures for CLIP."""
    return wanted if isinstance(wanted, PictureFormat) else PictureFormat(wanted)


def picture_format(vision):
    """The PictureFormat of a model, from its config.vision (model.VisionConfig). A model that sees
    nothing, whose vision is None, gets one that nothing will ask for."""
    if vision is None:
        return PictureFormat(1)
    return PictureFormat(vision.image_size, vision.image_mean, vision.image_std,
                         vision.image_aspect, vision.image_filter)


def sound_format(config):
    """How a model wants its sounds, from its whole config (model.Config), by the names that
    `load_senses` and `Encoded` have; nothing for a model that hears nothing."""
    if not config.n_audio_tokens:
        return {}
    # An ear takes 100 frames a second.
    return {"n_audio_tokens": config.n_audio_tokens, "n_mels": config.audio.n_mels,
            "seconds": config.audio.n_frames / 100}


# ------------------------------------------------------------------------------------------------
# 10. LLaVA's files


class LlavaJson:
    """LLaVA's format, a JSON list or JSONL, as a data set of samples.

    Each is {"id", "image": path | [paths] | absent, "conversations": [turns]}, with paths below
    image_dir; also "audio": path | [paths], and "video": folder of frames | [frame files] |
    [folders or lists, one a video].
    Raises ValueError, naming the file, and the line where its JSON is malformed.
    """

    def __init__(self, file: str, image_dir: str = ""):
        self.file = str(file)
        self.image_dir = image_dir
        self.samples = read_json(self.file)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i: int) -> dict:
        sample = self.samples[i]
        where = f"{self.file}: sample {i + 1}"
        if not has_turns(sample):
            raise ValueError(f"{where}: must be an object with a list 'conversations'")
        check_text(sample, where)
        for key in ("system", "tools"):
            if sample.get(key):
                raise ValueError(f"{where}: has {key!r} beside its conversations, and no template "
                                 "here has a place for it; leave it out, or write it into the "
                                 "question")

        # As in LLaVA, what the model says before anybody has asked is left out, if more follows
        # than the question.
        turns = sample["conversations"]
        if len(turns) > 2 and isinstance(turns[0], dict) and turns[0].get("from") == "gpt":
            turns = turns[1:]
        # "marks" is a word of our own (`own_marks`), not the file's.
        turns = [{key: turn[key] for key in turn if key != "marks"} if isinstance(turn, dict)
                 else turn for turn in turns]
        return {
            "id": f"{where} (id {sample.get('id', '-')})",
            "images": files_of(sample, "image", self.image_dir, where),
            "audio": files_of(sample, "audio", self.image_dir, where),
            "video": files_of(sample, "video", self.image_dir, where),
            "conversations": turns,
        }

    def lengths(self, n_image_tokens: int = 0, n_audio_tokens: int = 0) -> list[int]:
        """Words and slots of each sample, which is near enough to put like lengths together.

        A video counts as one image, a sound as one chunk. (LLaVA sorts text-only samples apart.)
        """
        slots = {"<image>": n_image_tokens, "<video>": n_image_tokens, "<audio>": n_audio_tokens}
        lengths = []
        for sample in self.samples:
            text = text_of(sample) if has_turns(sample) else ""
            n_slots = sum(n * text.count(mark) for mark, n in slots.items())
            lengths.append(len(text.split()) + n_slots)
        return lengths


def files_of(row, kind, folder, where):
    """What a row has under "image" or "audio", a path, several or none -> the paths; under "video"
    -> for each the files of its frames."""
    key = key_of_files(row, kind)
    files = row.get(key) or []
    if kind == "video":
        return video_files(files, folder, where)
    if isinstance(files, str):
        files = [files]
    if not are_texts(files):
        raise ValueError(f"{where}: '{key}' must be a path or a list of paths, not {files!r:.200}")
    return [os.path.join(folder, name) for name in files]


def key_of_files(row, kind):
    """"image" where a row has that, otherwise "images", as LLaMA-Factory writes it."""
    return kind if row.get(kind) else kind + "s"


def has_turns(sample):
    return isinstance(sample, dict) and isinstance(sample.get("conversations"), list)


def read_json(file):
    """The objects of a JSON list, or of JSON lines; an object alone is a list of one.

    ValueError names the line that is malformed."""
    try:
        # A file from Windows may begin with a byte order mark, which utf-8-sig leaves out.
        with open(file, encoding="utf-8-sig") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: cannot be read: {e}") from None

    samples = []
    if text.strip():
        samples = parse_json(text, file)
    if not isinstance(samples, list):
        samples = [samples]
    if not samples:
        raise ValueError(f"{file}: holds no samples")
    return samples


# ------------------------------------------------------------------------------------------------
# 11. The drawn world: scenes
#
# A CLEVR for a laptop. One to five objects stand in the cells of a 3 x 3 grid, a little off centre.
# In a third of the scenes a sign with a printed word takes a row. All that is drawn and asked is a
# function of a seed, so every run sees the same world and nothing is stored.

COLORS = {
    "red": (220, 50, 47),
    "green": (60, 170, 60),
    "blue": (50, 90, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "cyan": (70, 205, 215),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"large": 6.3, "small": 3.9}  # radius in pixels
PLACES = ("top left", "top", "top right", "left", "center", "right",
          "bottom left", "bottom", "bottom right")  # of the cells, 0 to 8
ROWS = ("top", "middle", "bottom")
WORDS = ("stop", "open", "exit", "taxi", "cafe", "bank", "park", "hotel", "zoo", "bus", "shop",
         "gym", "bar", "spa", "farm", "port", "gate", "news", "milk", "bread", "books", "music",
         "pizza", "sale")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

DRAWN_SIZE = 48  # pixels a side
CELL = 16
FONT = ImageFont.load_default_imagefont()  # 6 x 11 pixels a letter, and the same everywhere
CORNERS = {
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    # Ten corners, outer and inner in turn.
    "star": [(np.sin(i * np.pi / 5) * radius, -np.cos(i * np.pi / 5) * radius)
             for i, radius in enumerate((1.12, 0.45) * 5)],
}
INK_AND_PAPER = (((20, 20, 20), (225, 225, 215)),
                 ((245, 245, 240), (30, 70, 40)),
                 ((250, 240, 90), (40, 40, 60)))


def make_scene(seed, held_out=False):
    """-> {"objects": [(cell, size, color, shape), ...], "sign": None or (row, word), "seed"}.

    A pure function of its arguments; objects come in the order of their cells. Training and
    held-out scenes differ by content and not by seed alone: one description in ten is held out, by
    its checksum. So no held-out combination of objects and places is ever trained on.
    """
    for attempt in range(10_000):
        rng = random.Random(seed * 10_007 + attempt)

        # A sign takes a whole row; objects stand in the cells that are left.
        sign = None
        if rng.random() < 0.35:
            sign = (rng.randrange(3), rng.choice(WORDS))
        free = [cell for cell in range(9) if sign is None or cell // 3 != sign[0]]

        # A scene has few colours and shapes, so that "the red one" or "the circle" often does not
        # say which one.
        n = rng.choices((1, 2, 3, 4, 5), (1, 2, 3, 3, 2))[0]
        colors = rng.sample(list(COLORS), min(n, 3))
        shapes = rng.sample(SHAPES, min(n, 3))
        objects = []
        for cell in sorted(rng.sample(free, n)):
            size = rng.choice(list(SIZES))
            objects.append((cell, size, rng.choice(colors), rng.choice(shapes)))

        # Draw again until it belongs to the wanted split.
        scene = {"objects": objects, "sign": sign, "seed": seed}
        if is_held_out(describe(scene)) == held_out:
            return scene


def is_held_out(description, start=0):
    """Is this one of the descriptions in ten that are never trained on? Their checksum tells."""
    return zlib.crc32(description.encode(), start) % 10 == 0


def phrases(scene):
    """{cell: "top left: large red circle"}, in scan order. A sign has its row's first cell."""
    out = {}
    for cell, size, color, shape in scene["objects"]:
        out[cell] = f"{PLACES[cell]}: {size} {color} {shape}"
    if scene["sign"]:
        row, word = scene["sign"]
        out[3 * row] = f"{ROWS[row]}: sign {word}"
    return dict(sorted(out.items()))


def describe(scene):
    """The caption, in scan order: "top left: large red circle. middle: sign open."."""
    return " ".join(phrase + "." for phrase in phrases(scene).values())


def draw_scene(scene):
    """The scene as a 48 x 48 RGB image.

    Background, places within the cells, sizes, shades and noise vary with the scene's seed.
    """
    rng = random.Random(scene["seed"] * 10_007 + 1)
    # Objects are drawn twice as large and then averaged, which makes their edges soft.
    image = greyish_image(2 * DRAWN_SIZE, 70, rng)
    draw = ImageDraw.Draw(image)
    for cell, size, color, shape in scene["objects"]:
        # A little larger or smaller, off centre, lighter or darker.
        radius = SIZES[size] * rng.uniform(0.9, 1.1)
        x = CELL * (cell % 3 + 0.5) + rng.uniform(-1.5, 1.5)
        y = CELL * (cell // 3 + 0.5) + rng.uniform(-1.5, 1.5)
        fill = tuple(min(255, max(0, v + rng.randrange(-14, 15))) for v in COLORS[color])
        draw_shape(draw, shape, 2 * x, 2 * y, 2 * radius, fill)
    image = image.reduce(2)

    if scene["sign"]:
        draw_sign(image, *scene["sign"], rng)

    return add_noise(image, rng)


def greyish_image(side, brightest, rng):
    """A square of a random colour, all of whose three values are much alike."""
    brightness = rng.randrange(20, brightest)
    color = tuple(brightness + rng.randrange(-15, 16) for _ in range(3))
    return Image.new("RGB", (side, side), color)


def add_noise(image, rng):
    """Add noise of -6 to 6 to each value of an RGB image."""
    pixels = np.asarray(image).astype(np.int16)  # (48, 48, 3)
    noise = np.frombuffer(rng.randbytes(pixels.size), np.uint8) % 13
    pixels = pixels + noise.reshape(pixels.shape) - 6
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_shape(draw, shape, x, y, radius, fill):
    """Draw a shape around the pixel (x, y)."""
    def box(width, height):
        return (x - radius * width, y - radius * height, x + radius * width, y + radius * height)

    match shape:
        case "circle":
            draw.ellipse(box(1, 1), fill)
        case "ring":
            draw.ellipse(box(1, 1), outline=fill, width=round(0.42 * radius))
        case "square":
            draw.rectangle(box(0.85, 0.85), fill)
        case "cross":
            draw.rectangle(box(0.35, 1), fill)
            draw.rectangle(box(1, 0.35), fill)
        case _:
            draw.polygon([(x + radius * a, y + radius * b) for a, b in CORNERS[shape]], fill)


def draw_sign(image, row, word, rng):
    """Draw a board with a word on it, somewhere in that row."""
    # A letter is 6 pixels wide, and the board reaches 2 pixels beyond the word.
    width = 6 * len(word)
    x = rng.randrange(2, DRAWN_SIZE - width - 2)
    y = CELL * row + rng.randrange(1, 4)

    ink, paper = rng.choice(INK_AND_PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((x - 2, y, x + width + 1, y + 11), paper)
    draw.text((x, y), word, ink, font=FONT)


# ------------------------------------------------------------------------------------------------
# 12. Questions about a scene
#
# Each type of question is asked by a function, which returns (question, answer), or None if the
# scene offers no such question. Each question has one right answer, which it does not give away.


def clear_ones(pairs):
    """Those pairs whose first entry no other pair has."""
    firsts = [first for first, _ in pairs]
    return [pair for pair in pairs if firsts.count(pair[0]) == 1]


def yes_or_no(yes):
    return "yes" if yes else "no"


def plural(word):
    """What to count: "red shapes", "crosses", "rings"."""
    if word in COLORS:
        return word + " shapes"
    return word + ("es" if word == "cross" else "s")


# Questions about one object, and which of its properties is the answer.
ONE_OBJECT = {
    "color": ("What color is the {shape}?", "color"),
    "color at": ("What color is the shape at the {place}?", "color"),
    "shape at": ("What shape is at the {place}?", "shape"),
    "size": ("Is the {color} {shape} large or small?", "size"),
    "where": ("Where is the {color} {shape}?", "place"),
}


def ask_about_one(scene, kind, rng):
    question, answer = ONE_OBJECT[kind]

    # Ask it about each object. If two objects make the same question, it says of neither which one
    # is meant: "the star" must be the only star.
    pairs = []
    for cell, size, color, shape in scene["objects"]:
        words = {"place": PLACES[cell], "size": size, "color": color, "shape": shape}
        pairs.append((question.format(**words), words[answer]))
    clear = clear_ones(pairs)
    return rng.choice(clear) if clear else None


def ask_count(scene, rng):
    # One time in two it is about a colour or shape that is there, else about any.
    which = rng.randrange(4)
    _, _, color, shape = rng.choice(scene["objects"])
    words = (color, shape, rng.choice(list(COLORS)), rng.choice(SHAPES))
    word = words[which]
    n = sum(word in thing for thing in scene["objects"])
    return f"How many {plural(word)} are there?", NUMBERS[n]


def ask_exists(scene, rng):
    objects = scene["objects"]
    there = {(color, shape) for _, _, color, shape in objects}

    # Most questions with the answer "no" are near misses: both words are there, but not together.
    near = {(one[2], other[3]) for one in objects for other in objects} - there
    if rng.random() < 0.5:
        pair = rng.choice(sorted(there))
    elif near and rng.random() < 0.7:
        pair = rng.choice(sorted(near))
    else:
        pair = (rng.choice(list(COLORS)), rng.choice(SHAPES))
    color, shape = pair
    return f"Is there a {color} {shape}?", yes_or_no(pair in there)


def ask_relation(scene, rng):
    # Take two objects that "the red circle" tells from all others.
    named = [(f"{color} {shape}", cell) for cell, _, color, shape in scene["objects"]]
    unique = clear_ones(named)
    if len(unique) < 2:
        return None
    (one, cell), (other, other_cell) = rng.sample(unique, 2)

    # Compare their columns or their rows, whichever differ.
    axes = [(cell % 3, other_cell % 3, "left of", "right of"),
            (cell // 3, other_cell // 3, "above", "below")]
    here, there, before, behind = rng.choice([axis for axis in axes if axis[0] != axis[1]])

    # A coin decides whether the question is true.
    yes = rng.random() < 0.5
    relation = before if (here < there) == yes else behind
    return f"Is the {one} {relation} the {other}?", yes_or_no(yes)


def ask_sign(scene, rng):
    answer = scene["sign"][1] if scene["sign"] else "no sign"
    return "What does the sign say?", answer


QUESTIONS = {"count": ask_count, "exists": ask_exists, "relation": ask_relation, "sign": ask_sign}
TYPES = (*ONE_OBJECT, *QUESTIONS)


def ask(scene, kind, rng):
    """A question of that type and its answer, or None where the scene offers none."""
    if kind in ONE_OBJECT:
        return ask_about_one(scene, kind, rng)
    return QUESTIONS[kind](scene, rng)


# ------------------------------------------------------------------------------------------------
# 13. The drawn world: sounds
#
# In a second and a half one hears one to five equal beeps, a glide that rises or falls, or a pair
# of sounds, one after the other. All have a timbre, a pitch and a loudness. When they sound, how
# fast, and at which exact frequency is left to chance.

SOUND_SECONDS = 1.5

# How strong each harmonic is: a whistle is a tone alone, an organ adds two octaves, and a buzz has
# them all.
HARMONICS = {
    "whistle": {1: 1},
    "organ": {1: 1, 2: 1, 4: 1},
    "buzz": {k: k ** -0.5 for k in range(1, 50)},
}
TIMBRES = tuple(HARMONICS)

PITCHES = {"low": 200, "middle": 420, "high": 880}  # Hz, give or take a tenth
LOUDNESS = {"loud": (0.1, 0.17), "soft": (0.008, 0.013)}  # root mean square: 18 dB lie between
SOUND_KINDS = {"beeps": 4, "glide": 3, "pair": 3}  # and how often each is drawn
PART_SECONDS = {"beeps": (0.09, 0.13), "glide": (0.6, 1.2), "pair": (0.35, 0.5)}  # from and to


def make_sound(seed, held_out=False, kinds=tuple(SOUND_KINDS)):
    """-> {"kind", "voices": [(pitch, timbre)], two of a pair, "beeps": how many or None,
    "way": "rises", "falls" or None, "loudness", "seed"}: a pure function of its arguments.

    As with scenes, one description in ten is held out by its checksum: 20 of 198. With so few, an
    answer may be missing among them or come too often. So the checksum starts from a number that
    was searched for, with which they are spread well.
    Glides are not held out that way. Were "loud low buzz rising" held out, every loud low buzz in
    training would fall, and a model would learn that instead of listening. Held-out glides differ
    as all sounds do, by their seeds: in frequency, bend, timing, level and noise.
    """
    odds = [SOUND_KINDS[kind] for kind in kinds]
    kind = random.Random(seed).choices(kinds, odds)[0]
    for attempt in range(10_000):
        rng = random.Random(seed * 10_009 + attempt)

        # Who sounds: one voice, or the two of a pair, which differ in pitch and mostly in timbre.
        pitches = rng.sample(list(PITCHES), 2)
        timbres = rng.sample(TIMBRES, 2)
        if rng.random() < 0.25:
            timbres[1] = timbres[0]
        voices = list(zip(pitches, timbres))
        if kind != "pair":
            voices = voices[:1]

        sound = {"kind": kind, "voices": voices, "beeps": None, "way": None,
                 "loudness": rng.choice(list(LOUDNESS)), "seed": seed}
        if kind == "beeps":
            sound["beeps"] = rng.randrange(1, 6)
        if kind == "glide":
            sound["way"] = rng.choice(("rises", "falls"))
            return sound
        if is_held_out(describe_sound(sound), start=42_583) == held_out:
            return sound


def describe_sound(sound):
    """The caption: "three loud high whistle beeps.", "one soft low buzz rising." or
    "low whistle, then high buzz, loud."."""
    voices = [f"{pitch} {timbre}" for pitch, timbre in sound["voices"]]
    loudness = sound["loudness"]
    if sound["kind"] == "pair":
        return f"{voices[0]}, then {voices[1]}, {loudness}."
    if sound["kind"] == "glide":
        direction = "rising" if sound["way"] == "rises" else "falling"
        return f"one {loudness} {voices[0]} {direction}."
    beeps = "beep" if sound["beeps"] == 1 else "beeps"
    return f"{NUMBERS[sound['beeps']]} {loudness} {voices[0]} {beeps}."


def draw_sound(sound):
    """The sound as (wave (24,000,) float32, 16,000 samples a second).

    Timing, frequencies and a faint noise vary with the sound's seed.
    """
    rng = random.Random(sound["seed"] * 10_009 + 10_008)
    noise = np.random.default_rng(sound["seed"])
    out = noise.standard_normal(int(SOUND_SECONDS * RATE), np.float32) * np.float32(0.001)

    # How many parts are there, how long are they and the gaps between, and when do they begin?
    n = sound["beeps"] or len(sound["voices"])
    length = rng.uniform(*PART_SECONDS[sound["kind"]])
    gap = rng.uniform(0.08, 0.14)
    start = rng.uniform(0.03, SOUND_SECONDS - 0.03 - n * length - (n - 1) * gap)

    # How do they sound? A glide goes from frequency / bend to frequency * bend, or back.
    level = rng.uniform(*LOUDNESS[sound["loudness"]])
    frequencies = [PITCHES[pitch] * rng.uniform(0.9, 1.1) for pitch, _ in sound["voices"]]
    direction = {"rises": 1, "falls": -1, None: 0}[sound["way"]]
    bend = rng.uniform(1.25, 1.5) ** direction

    # Each part fades in and out over 128 samples, or it would click.
    m = round(length * RATE)
    ramp = np.arange(m) / 128
    fade = np.minimum(1, np.minimum(ramp, ramp[::-1]), dtype=np.float32)

    # The two of a pair take turns; all beeps have one voice.
    for i in range(n):
        voice = i % len(frequencies)
        _, timbre = sound["voices"][voice]
        at = round((start + i * (length + gap)) * RATE)
        out[at:at + m] += level * fade * draw_tone(timbre, frequencies[voice], bend, m)
    return out.clip(-1, 1), RATE


def draw_tone(timbre, frequency, bend, m):
    """(m,) float32, a tone that glides from frequency / bend to frequency * bend.

    Synthesizers store sounds as one period in a table: a tone of any frequency steps through the
    same table at its own speed.
    """
    # Nothing may come near the Nyquist frequency, 8 kHz, even at the end of a glide.
    highest = frequency * max(bend, 1 / bend)
    table = wavetable(timbre, n_harmonics=int(7500 / highest))

    # How many periods have gone by at each sample? Their fractions are places in the table.
    periods = np.cumsum(frequency * bend ** np.linspace(-1, 1, m)) / RATE  # (m,)
    return table[(periods * len(table)).astype(np.int64) % len(table)]


@functools.lru_cache
def wavetable(timbre, n_harmonics):
    """One period of a tone in 4096 samples, of power one, with harmonics up to n_harmonics."""
    period = np.linspace(0, 2 * np.pi, 4096, endpoint=False)
    table = np.zeros(4096)
    for k, strength in HARMONICS[timbre].items():
        if k <= n_harmonics:
            table += strength * np.sin(k * period)
    return (table / np.sqrt(np.mean(table ** 2))).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# 14. Questions about a sound, and about a scene and a sound together

SOUND_QUESTIONS = {
    "beeps": "How many beeps are there?",
    "glide": "Does the sound rise or fall?",
    "higher": "Which sound is higher, the first or the second?",
    "timbre": "What makes the sound?",
    "loudness": "Is the sound loud or soft?",
    "order": "Which comes first, the {} or the {}?",
}
SOUND_TYPES = tuple(SOUND_QUESTIONS)


def ask_sound(sound, kind, rng):
    """A question of that type and its answer, or None where the sound offers none."""
    # Unless it is a pair, the first voice is also the last.
    pitch, timbre = sound["voices"][0]
    last_pitch, last_timbre = sound["voices"][-1]
    is_pair = sound["kind"] == "pair"
    question = SOUND_QUESTIONS[kind]

    match kind:
        case "beeps" if sound["beeps"]:
            return question, NUMBERS[sound["beeps"]]
        case "glide" if sound["way"]:
            return question, sound["way"]
        case "higher" if is_pair:
            return question, "first" if PITCHES[pitch] > PITCHES[last_pitch] else "second"
        case "timbre" if not is_pair:
            return question, timbre
        case "loudness":
            return question, sound["loudness"]
        case "order" if timbre != last_timbre:
            return question.format(*rng.sample((timbre, last_timbre), 2)), timbre
    return None


def count_words(scene):
    """How many objects have each of the colours and shapes in a scene: {"circle": 1, "red": 2}."""
    words = [word for thing in scene["objects"] for word in thing[2:]]
    return {word: words.count(word) for word in sorted(set(words))}


def two_counts(n_beeps, n_seen, verdict):
    """An answer that counts before it judges: "two and three: no"."""
    return f"{NUMBERS[n_beeps]} and {NUMBERS[n_seen]}: {verdict}"


def ask_as_many(scene, n_beeps, rng):
    # A "no" must be near, or it could be told without counting.
    counts = count_words(scene)
    same = [word for word, count in counts.items() if count == n_beeps]
    near = [word for word, count in counts.items() if abs(count - n_beeps) == 1]
    if not same or not near:
        return None

    # Both answers are possible, so a coin decides.
    yes = rng.random() < 0.5
    word = rng.choice(same if yes else near)
    question = f"Are there as many beeps as {plural(word)}?"
    return question, two_counts(n_beeps, counts[word], yes_or_no(yes))


def ask_more(scene, n_beeps, rng):
    n_shapes = len(scene["objects"])
    more = "equal"
    if n_beeps > n_shapes:
        more = "beeps"
    elif n_beeps < n_shapes:
        more = "shapes"
    return "Are there more beeps or more shapes?", two_counts(n_beeps, n_shapes, more)


def ask_if_rises(scene, way, rng):
    spots = [(PLACES[cell], color) for cell, _, color, _ in scene["objects"]]
    if len({color for _, color in spots}) < 2:
        return None

    # Take two places whose colours differ: only who hears the sound knows which one counts.
    one = rng.choice(spots)
    other = rng.choice([spot for spot in spots if spot[1] != one[1]])
    risen, fallen = rng.sample((one, other), 2)
    question = (f"What color is the shape at the {risen[0]} if the sound rises, "
                f"at the {fallen[0]} if it falls?")
    place, color = risen if way == "rises" else fallen
    return question, f"{way}, {place}: {color}"


def ask_together(scene, n_beeps, rng):
    # There are words for numbers up to five.
    counts = count_words(scene)
    few = [word for word, count in counts.items() if n_beeps + count <= 5]
    if not few:
        return None
    word = rng.choice(few)
    total = NUMBERS[n_beeps + counts[word]]
    question = f"How many beeps and {plural(word)} are there together?"
    return question, two_counts(n_beeps, counts[word], total)


# Each type, and what of the sound it is about.
BOTH_QUESTIONS = {
    "as many": (ask_as_many, "beeps"),
    "more": (ask_more, "beeps"),
    "if rises": (ask_if_rises, "way"),
    "together": (ask_together, "beeps"),
}
BOTH_TYPES = tuple(BOTH_QUESTIONS)


def ask_both(scene, sound, kind, rng):
    """A question that neither eyes nor ears can answer alone, and its answer; or None where scene
    and sound offer none.

    The answer first says what is heard and seen, as in "two and three: no". A model thinks by
    writing, and one as small as this cannot count twice and compare before its first word.
    """
    ask_it, about = BOTH_QUESTIONS[kind]
    heard = sound[about]
    return ask_it(scene, heard, rng) if heard else None


# How often each type is asked in training. Hard ones come more often, and where there are a scene
# and a sound, every second question needs both.
WEIGHTS = {
    "color": 8, "color at": 1, "shape at": 1, "size": 3, "where": 5, "count": 3, "exists": 4,
    "relation": 4, "sign": 2,
    "beeps": 6, "glide": 4, "higher": 4, "timbre": 2, "loudness": 2, "order": 4,
    "as many": 60, "more": 20, "if rises": 80, "together": 60,
}


def ask_any(scene, sound, kind, rng):
    """A question of any type and its answer, or None where scene and sound offer none."""
    if kind in TYPES:
        return ask(scene, kind, rng)
    if kind in SOUND_TYPES:
        return ask_sound(sound, kind, rng)
    return ask_both(scene, sound, kind, rng)


def offered_types(scene, sound):
    """The types of questions to choose from."""
    kinds = list(TYPES) if scene else []

    # A sound offers few of its types; the others must not be drawn in vain. A scene offers most.
    rng = random.Random(0)
    if sound:
        kinds += [kind for kind in SOUND_TYPES if ask_sound(sound, kind, rng)]
    if scene and sound:
        kinds += [kind for kind in BOTH_TYPES if ask_both(scene, sound, kind, rng)]
    return kinds


def ask_many(scene, n, rng, sound=None):
    """Up to n different questions about a scene, a sound or both: [(type, question, answer), ...].
    Their types are drawn by WEIGHTS."""
    kinds = offered_types(scene, sound)
    weights = [WEIGHTS[kind] for kind in kinds]

    # Not every draw gives a question, and not every question is new: draw more than are needed.
    asked = {}
    for kind in rng.choices(kinds, weights, k=4 * n):
        if len(asked) == n:
            break

        # "no sign" must not be the usual answer.
        if kind == "sign" and not scene["sign"] and rng.random() < 0.7:
            continue
        pair = ask_any(scene, sound, kind, rng)
        if pair is None:
            continue

        # Keep one of each question. About a sound, questions of one type differ in wording only,
        # so there the type decides what counts as the same.
        question, answer = pair
        what = kind if kind in SOUND_TYPES else question
        asked.setdefault(what, (kind, question, answer))
    return list(asked.values())


def as_turns(pairs, head="<image>\n"):
    """[(question, answer), ...] -> conversations. `head` stands before the first question."""
    turns = []
    for question, answer in pairs:
        turns.append({"from": "human", "value": head + question})
        turns.append({"from": "gpt", "value": answer})
        head = ""
    return turns


# ------------------------------------------------------------------------------------------------
# 15. The drawn world as a data set, and a tokenizer for it

# Kinds of samples that take others in turn.
MIXED = {
    "mixed caption": ("caption", "sound caption"),
    "mixed chat": ("chat", "sound chat", "both chat"),
}


@dataclass
class Drawn:
    """The drawn world as a data set. Item i is always the same.

    kind: "caption" has the scene described; "chat" has several turns of questions and answers about
    it; "sound caption" and "sound chat" are the same about a sound; "both chat" is about an image
    and a sound; and MIXED has more.
    A sample also has "types", the type of each question, and the "scene" and "sound" themselves.
    """
    kind: str
    size: int  # how many samples
    seed: int = 0
    held_out: bool = False

    def __len__(self):
        return self.size

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.size:
            raise IndexError(i)
        seed = self.seed * 100_000_007 + i
        kinds = MIXED.get(self.kind, (self.kind,))
        kind = kinds[i % len(kinds)]

        # What is to be seen and heard.
        sample = {"id": str(seed), "images": [], "audio": []}
        scene = None
        sound = None
        head = ""
        if not kind.startswith("sound"):
            scene = make_scene(seed, self.held_out)
            sample.update(scene=scene, images=[draw_scene(scene)])
            head += "<image>\n"
        if kind not in ("caption", "chat"):
            # No question is about a scene and a pair of sounds.
            sounds = ("beeps", "glide") if scene else tuple(SOUND_KINDS)
            sound = make_sound(seed, self.held_out, sounds)
            sample.update(sound=sound, audio=[draw_sound(sound)])
            head += "<audio>\n"

        # What is asked about it.
        if kind == "caption":
            asked = [(kind, "Describe the scene.", describe(scene))]
        elif kind == "sound caption":
            asked = [(kind, "Describe the sound.", describe_sound(sound))]
        else:
            # A sound alone has fewer things to ask about than a scene.
            n = 6 if scene else 2
            asked = ask_many(scene, n, random.Random(seed), sound)

        pairs = [(question, answer) for _, question, answer in asked]
        sample["conversations"] = as_turns(pairs, head)
        sample["types"] = [kind for kind, _, _ in asked]
        return sample


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer, which has a token for each mark of the template "tiny"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = [AddedToken(mark, special=True) for mark in ("</s>", "<q>", "<a>")]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=marks, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ------------------------------------------------------------------------------------------------
# 16. The world of facts
#
# The drawn world asks for skills: to count, to compare, to read. Here is what can only be known. A
# picture has a name of two words, which has nothing to do with what it shows:
#
#     (a picture of a guitar)      What is this?      red milk
#
# So nothing can be guessed, and how many names a model knows says how much it holds. The pictures
# are 1,024 of Google's Noto Emoji (assets/sheet.py).

N_FACTS = 1024
SHEET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "emoji.png")
EMOJI = 32  # pixels a side, and pictures in a row of the sheet


@functools.lru_cache
def facts():
    """-> 1,024 pairs (a picture's place on the sheet, its name). The first n are n facts."""
    # Two different words of those that the tokenizer knows.
    words = [*COLORS, *SHAPES, *WORDS]
    names = [f"{one} {other}" for one in words for other in words if one != other]

    # Two shuffles that know nothing of each other: so no name says anything of its picture.
    random.Random(1).shuffle(names)
    places = list(range(N_FACTS))
    random.Random(2).shuffle(places)
    return list(zip(places, names))


@functools.lru_cache
def emoji_sheet():
    try:
        return Image.open(SHEET).convert("RGBA")
    except OSError as e:
        raise ValueError(f"{SHEET}: cannot be read ({e}); assets/sheet.py makes it again") from None


def draw_fact(place, seed):
    """The emoji at a place of the sheet as a 48 x 48 RGB image. Size, angle, position, background
    and noise vary with the seed."""
    rng = random.Random(seed)
    row, column = divmod(place, EMOJI)
    box = (EMOJI * column, EMOJI * row, EMOJI * (column + 1), EMOJI * (row + 1))
    emoji = emoji_sheet().crop(box)

    # A little larger or smaller, turned by up to 8 degrees, anywhere on a grey-ish background.
    side = rng.randrange(36, 45)
    emoji = emoji.resize((side, side), Image.Resampling.BICUBIC)
    emoji = emoji.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    image = greyish_image(DRAWN_SIZE, 200, rng)
    at = (rng.randrange(DRAWN_SIZE - side + 1), rng.randrange(DRAWN_SIZE - side + 1))
    image.paste(emoji, at, mask=emoji.getchannel("A"))
    return add_noise(image, rng)


@dataclass
class Facts:
    """Pictures of n facts, and what they are called, as a data set. Item i is always the same.

    Every fact comes equally often, in another order in each round, and each time drawn anew.
    Held-out drawings are of the same facts, and none of them is ever trained on. first: the facts
    are first, first + 1, ..., first + n - 1, for a model that has learnt others.
    """
    n: int
    size: int  # how many samples
    seed: int = 0
    held_out: bool = False
    first: int = 0

    def __len__(self):
        return self.size

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.size:
            raise IndexError(i)
        # Which fact: each round has an order of its own.
        turn, position = divmod(i, self.n)
        order = list(range(self.n))
        random.Random(f"{self.seed} {self.held_out} round {turn}").shuffle(order)
        place, name = facts()[self.first + order[position]]

        image = draw_fact(place, f"{self.seed} {self.held_out} {i}")
        turns = as_turns([("What is this?", name)])
        return {"id": f"fact {i}", "images": [image], "conversations": turns, "types": ["fact"]}


# ------------------------------------------------------------------------------------------------
# 17. Checks of what users bring. Each error is a ValueError that says what is wrong, and where.


def open_image(image):
    """A path or PIL image -> the decoded RGB image: upright, and on white where it is transparent.

    LLaVA leaves a picture as its camera held it, whatever EXIF says, and makes clear pixels those
    that lie below them, which mostly are black. Of an animation this is the first frame.
    Raises ValueError, naming the file, if it is missing, truncated, no picture, of a size or colors
    that make none, or so large that it must be a decompression bomb.
    """
    name = "the image"
    if isinstance(image, (str, os.PathLike)):
        name = image
        check_file(name)
    try:
        if name is image:
            image = Image.open(image)
        check_picture_size(*image.size)
        # Opening reads no more than the header. This decodes, and fails on a truncated file.
        image.load()
        image = with_8_bits(turn_upright(image), image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as e:
        # Of damaged files, Pillow has errors of many kinds.
        raise ValueError(f"{name}: cannot be read as an image: {e}") from None


def check_file(path):
    """A path leads to a file. (To open a pipe would wait for somebody to write into it.)"""
    if os.path.isfile(path):
        return
    if os.path.exists(path):
        raise ValueError(f"{path}: is a folder, a pipe or a device; a file is wanted")
    if str(path).startswith(("data:", "http:", "https:")):
        raise ValueError(f"{path!s:.60}: pictures and sounds are read from files; save it as one, "
                         "and give its path")
    raise ValueError(f"{path!s:.300}: no such file; check the path, and --images")


def check_picture_size(width, height):
    """A picture is large enough to show something, and no ribbon: padded to a square, one of
    3 x 65,000 pixels would fill 12 GB, and nobody would see it in there."""
    told = f"it is {width} x {height} pixels"
    shorter, longer = sorted((width, height))
    if shorter < 2:
        raise ValueError(f"{told}, too small to be a picture")
    if longer > 200 * shorter or longer > 30_000:
        raise ValueError(f"{told}; a side may be 200 times as long as the other one and have "
                         "30,000 pixels; cut it into parts")


# What EXIF calls 2 to 8, undone.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(image):
    """Cameras store the picture as they were held, and in the EXIF data how to turn it.

    (ImageOps.exif_transpose also writes these data anew, and fails where any other entry is odd.)
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Damaged EXIF data, of which Pillow has errors of many kinds, say nothing.
        return image
    if orientation not in TURNS:
        return image
    return image.transpose(TURNS[orientation])


def with_8_bits(image, opened):
    """Of gray with 9 to 16 bits, the upper 8. (Convert("RGB") makes white of all that is above
    255.) opened: the image as Pillow opened it, which knows its file."""
    # Where Pillow has no mode for 16 bits, it takes "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
        gray = np.asarray(image).astype(np.int64)
        # A TIFF says how many bits are used, and whether 0 is white.
        tags = getattr(opened, "tag_v2", {})
        bits = tags.get(258, (16,))[0]
        if tags.get(262) == 0:
            gray = 2 ** bits - 1 - gray
        # A PNG may say which gray is clear: that becomes white.
        gray = np.where(gray == opened.info.get("transparency"), 2 ** bits - 1, gray)
        return Image.fromarray((gray >> (bits - 8)).astype(np.uint8))
    # Of a PNG with 16 bits a color, Pillow keeps the upper 8, but all of the color that is clear.
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    # Nothing says which of these numbers is black and which is white.
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are signed or have 32 bits, which does not say what is white; "
                         "save it with 8 or 16 bits")
    return image


def parse_json(text, file):
    """What a JSON text holds, and of JSON lines the list."""
    before = 0  # lines before the piece of JSON that is being read
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError as e:
            # "Extra data": behind the first object there are more. These are JSON lines.
            if e.msg != "Extra data":
                raise
        samples = []
        # Not splitlines, as JSON may hold other characters that count as line ends.
        for before, line in enumerate(text.split("\n")):
            if line.strip():
                samples.append(json.loads(line))
        return samples
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: malformed JSON in line {before + e.lineno}: {e.msg}") from None
    except (RecursionError, ValueError) as e:
        raise ValueError(f"{file}: from line {before + 1} on lists or objects are nested too "
                         f"deeply, or a number is too long: {e}") from None


def check_text(value, where):
    """All that a JSON object holds can be encoded. Half a character, as an emoji's "\\ud83d" that
    was cut off, is no text: neither a tokenizer nor a file takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: half a character ({e.object[e.start]!r}, a lone surrogate); "
                         "mend the text that was cut inside of a character") from None
    except RecursionError:
        raise ValueError(f"{where}: lists or objects are nested too deeply") from None


def check_turns(conversations):
    """Turns are objects with "from" and "value", and alternate, beginning with the human."""
    if not conversations:
        raise ValueError("the conversation is empty")
    for i, turn in enumerate(conversations):
        is_turn = isinstance(turn, dict) and "from" in turn
        if not (is_turn and isinstance(turn.get("value"), str)):
            raise ValueError(f"turn {i + 1} must be an object with the texts 'from' and 'value', "
                             f"not {str(turn)[:80]}")
        check_text(turn["value"], f"turn {i + 1}")
        if turn["from"] != ("human", "gpt")[i % 2]:
            raise ValueError(f"turn {i + 1} is from {turn['from']!r}; turns must alternate human, "
                             "gpt, human, ...")


def check_learnt(pieces, labels, conversations):
    """Where there are answers, there is something to learn."""
    has_answers = any(piece.learnt and piece.text for piece in pieces)
    if has_answers and all(label == IGNORE for label in labels):
        raise ValueError(f"nothing to learn, all labels are masked: {str(conversations)[:300]}")


def check_end_mark(tokenizer, template):
    """The tokenizer knows the template's marks. The last one ends an answer."""
    if fits(tokenizer, template):
        return
    # Nobody is asked in "plain".
    fitting = [name for name in TEMPLATES if name != "plain" and fits(tokenizer, name)]
    use = " or ".join(f"--template {name}" for name in fitting) or "another tokenizer"
    wanted = " ".join(TEMPLATES[template].tokens)
    raise ValueError(f"template {template} ends answers with {EOS[template]}, and this tokenizer "
                     f"does not know {wanted}, each as one token; use {use}")


def check_span(token, text, tokenizer):
    """A token that stands for no characters is a blank."""
    if tokenizer.decode([token]).strip():
        raise ValueError(f"the tokenizer does not tell where {tokenizer.id_to_token(token)!r} "
                         f"stands in {text[:80]!r}, so nothing could be learnt from it; tokenizers "
                         "before 0.20.3 do that: pip install -U tokenizers")


def check_cut(ids, labels, max_length):
    """A sample may lose what comes after max_length tokens."""
    for slot, what in ((IMAGE, "an image"), (AUDIO, "a sound")):
        if slot in ids[max_length:]:
            raise ValueError(f"{len(ids)} tokens, over the limit of {max_length}, and cutting "
                             f"would lose {what}")
    if all(label == IGNORE for label in labels[:max_length]):
        raise ValueError(f"nothing to learn in the first {max_length} tokens; raise --max-length")


def first_usable(encoded, i):
    """Item i of `Encoded`, or the next that can be used. "broken" tells what is wrong with others.

    So a bad file does not end a run of days. The trainer prints and counts these messages.
    """
    broken = []
    n = min(100, len(encoded))
    for j in range(i, i + n):
        # After the last sample comes the first.
        j = j % len(encoded)
        name = f"sample {j + 1}"
        try:
            sample = encoded.data[j]
            name = sample["id"]
            return {**encoded.encode(sample), "broken": broken}
        except ValueError as e:
            message = str(e) if name in str(e) else f"{name}: {e}"
            if encoded.strict:
                raise ValueError(message) from None
            broken.append(message)
    raise ValueError(f"{n} samples in a row are broken; the last one: {broken[-1]}")


def check_marks(text, files, n_audio_tokens):
    """A sample's text has a mark for each of its files. files: {mark: [file, ...]}"""
    sounds = files["<audio>"]
    if sounds and n_audio_tokens == 0:
        raise ValueError(f"the sample has {len(sounds)} sounds, this model hears nothing; leave "
                         "them out, or take a model with ears")

    for mark, name in (("<image>", "images"), ("<video>", "videos"), ("<audio>", "sounds")):
        n = len(files[mark])
        # Without files, the mark is a word. But among videos, which become images, it is not.
        is_word = n == 0 and not (mark == "<image>" and files["<video>"])
        if text.count(mark) != n and not is_word:
            raise ValueError(f"the text has {text.count(mark)} {mark}, the sample has {n} {name}")


def check_frame_sizes(videos):
    """All frames of a video have the same size."""
    for video in videos:
        sizes = []
        for frame in video:
            image = frame if isinstance(frame, Image.Image) else Image.open(frame)
            sizes.append(image.size)
            if image.size != sizes[0]:
                raise ValueError(f"{frame}: a frame of {image.size} pixels in a video of "
                                 f"{sizes[0]}; all must have one size")


def check_seconds(seconds, limit, name=""):
    """A sound is not too long."""
    if seconds > limit:
        raise ValueError(f"{name}{seconds:,.0f} s of sound, over the limit of {limit:,.0f} s; cut "
                         "it into parts")


def check_rate(rate):
    if not LOWEST_RATE <= rate <= HIGHEST_RATE or rate != int(rate):
        raise ValueError(f"a sample rate of {rate} Hz; it may be {LOWEST_RATE:,} to "
                         f"{HIGHEST_RATE:,}, without a fraction")


def check_wave(wave, sample_rate, seconds):
    """A sound is one wave, neither empty nor too long, and each sample is a number."""
    if wave.ndim != 1 or len(wave) == 0:
        raise ValueError(f"a sound must be one mono wave, (n,) with n > 0, not {wave.shape}")
    check_rate(sample_rate)
    check_seconds(len(wave) / sample_rate, MAX_CHUNKS * seconds)
    # One NaN would silence its whole chunk.
    if not np.isfinite(wave).all():
        raise ValueError("the wave holds NaN or infinity: mend what made it")
    # A little over 1 is a float that was not clipped.
    loudest = float(np.abs(wave).max())
    if loudest > 16:
        raise ValueError(f"the wave's numbers go up to {loudest:g}, and should lie from -1 to 1: "
                         "divide integers of 16 bits by 32768")
