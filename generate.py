"""generate.py: talk with a model about pictures, measure it, and see what its experts do.

    python generate.py --model out/tiny --image X.png --prompt "What color is the circle?"
        one answer
    python generate.py --model out/tiny --image X.png
        a chat (Ctrl-D ends it)
    python generate.py --model out/uni-moe --image X.png --audio Y.wav --video FRAMES_DIR
        a chat about all of them
    python generate.py --model out/tiny --serve
        a window in the browser: talk, and watch the experts choose
    python generate.py --model out/tiny --image X.png --routing routing.png
        a picture: which expert took which patch (or token)
    python generate.py --model out/tiny --eval-drawn 1200
        accuracy on held-out drawn scenes
    python generate.py --model out/tiny --eval questions.jsonl --images DIR --out answers.jsonl
        answer a file; goes on where it stopped. The same on 8 GPUs:
    torchrun --nproc_per_node 8 generate.py --model M --eval questions.jsonl --images DIR --out FILE
    python generate.py --score vqa --answers answers.jsonl --annotations FILE
        points: exact, vqa, textvqa, pope, choice, mme
    python generate.py --write-drawn DIR 500
        drawn questions as such files, to try it

The default model was taught the questions of data.ask, among them: What color is the star? What
shape is at the top left? Where is the red circle? How many rings are there? Is the red circle above
the blue square? What does the sign say? Describe the scene.

How the model comes to an answer is model.py's business (CuMo.generate). Here are the two ends of
it: a question and its files become tensors, and tokens become text again.
"""
import argparse
import base64
import glob
import hashlib
import io
import ipaddress
import json
import math
import os
import random
import re
import socket
import sys
import time
import traceback
import warnings
import wave
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

# On a busy machine, OpenMP's threads spin for ages while they wait for each other. Let them give up
# sooner. libgomp reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat
from tqdm import tqdm

import data
from kernels import MoE
from model import NOT_FINITE, CuMo, check_sampling, store_by_columns
from upcycle import load, write_atomically

# -------------------------------------------------------------------------------------------------
# 1. Answers
#
# A sample is what is asked, and what it is about:
#
#     {"images": ["X.png"],
#      "conversations": [{"from": "human", "value": "<image>\nWhat color is the circle?"}]}
#
# and perhaps "audio": ["Y.wav"] and "video": [["frame1.png", "frame2.png"]]. Each file has its mark
# in the text, "<image>", "<audio>" or "<video>", which says where the model meets it.


def answer(model: CuMo, tokenizer, samples: list[dict], stream=None, image_embeds=None,
           audio_embeds=None, max_new_tokens: int = 64, **options) -> list[str]:
    """Samples whose conversations end with the human's turn -> the model's next turns, stripped.

    options: temperature, top_p, generator, compile, too_long (CuMo.generate). stream: called with
    each new piece of text of the first sample. image_embeds, audio_embeds: features of what the
    samples hold, where it was encoded before; then a sample with sounds says their "slots" itself,
    and marks a video as an image."""
    # What is said, and what there is to see and to hear.
    if image_embeds is None and audio_embeds is None:
        texts, senses = sense(model, samples)
    else:
        texts = [(sample["conversations"], sample.get("slots", 0)) for sample in samples]
        senses = {"image_embeds": image_embeds, "audio_embeds": audio_embeds}

    # The model goes on where the text ends, until it says the template's end mark, or another one
    # that the decoder brought along.
    tokens = tokens_of(model, tokenizer, texts)  # (B, T)
    ends = [data.end_token(tokenizer, model.config.template), *model.config.text.end_tokens]
    on_token = None
    if stream is not None:
        on_token = streamer(tokenizer, stream, ends)
    out = model.generate(tokens, eos=ends, on_token=on_token, max_new_tokens=max_new_tokens,
                         **senses, **options)  # (B, up to max_new_tokens)

    # A row that ended before the longest one is filled up with the end mark.
    replies = []
    for row in out.tolist():
        said = [token for token in row if token not in ends]
        replies.append(tokenizer.decode(said).strip())
    return replies


def tokens_of(model, tokenizer, texts):
    """`sense`'s texts -> tokens (B, T) int64, padded with PAD on the right."""
    config = model.config
    rows = []
    for conversations, slots in texts:
        ids, _ = data.encode_chat(
            conversations, tokenizer, config.template, config.n_image_tokens, slots)
        rows.append(ids)
    return data.pad_rows(rows, data.PAD).to(device_of(model))


def streamer(tokenizer, write, ends=()):
    """A function for CuMo.generate's on_token, which writes each new piece of the first row's text,
    without the tokens that end it.

    All tokens so far are decoded anew each time: a token alone does not know whether a space
    belongs before it, and a character may take several tokens."""
    tokens = []
    written = ""

    def on_token(token):  # (B,)
        nonlocal written
        if int(token[0]) in ends:
            return
        tokens.append(int(token[0]))
        text = tokenizer.decode(tokens).lstrip()

        # This is how a character looks whose last token is still missing: wait for it. (Still call
        # `write`: whoever counts its calls counts the tokens.)
        if text.endswith("\ufffd"):
            write("")
            return
        write(text[len(written):])
        written = text

    return on_token


def chat(model: CuMo, tokenizer, images: list, prompt: str | None, audio=(), video=(),
         **options) -> list[dict]:
    """Answer `prompt`, or without one whatever the user types, and print it word by word.

    The pictures and sounds are encoded once, with the first question, and kept. Returns the
    conversation."""
    show = partial(print, end="", flush=True)
    questions = typed_lines() if prompt is None else [prompt.strip()]
    # A talk that grows beyond what the decoder learnt to read goes on, and the user is told.
    too_long = "warn" if prompt is None else "error"
    conversation = []
    if prompt is None:
        # Files that cannot be opened end the talk before it begins.
        sense(model, [sample_of("", images, video, audio)])
    for question in questions:
        try:
            # The first question brings the files along. `opening` is that turn, with "<video>"
            # replaced by "<image>"s. In later turns such a mark is a word ("marks": none).
            if conversation:
                conversation.append({"from": "human", "value": question, "marks": []})
            else:
                sample = sample_of(question, images, video, audio)
                opening, slots, embeds = encode_senses(model, sample)
                conversation += sample["conversations"]

            # The model reads the whole conversation again, but does not look at the pictures again.
            asked = {"conversations": opening + conversation[1:], "slots": slots}
            reply = answer(model, tokenizer, [asked], stream=show, too_long=too_long, **embeds,
                           **options)[0]
        except ValueError as e:
            # In a talk, a line that cannot be answered is taken back, and the talk goes on.
            if prompt is not None or str(e) == NOT_FINITE:
                raise
            print(e)
            conversation = conversation[:-1]
            continue
        print()
        conversation.append({"from": "gpt", "value": reply, "marks": []})
    return conversation


def typed_lines():
    """What the user types, line by line, until Ctrl-D."""
    try:
        while True:
            line = input("> ").strip()
            if line:
                yield line
    except EOFError:
        print()


# -------------------------------------------------------------------------------------------------
# You can stop here on a first reading. Below this line: measuring a model on the drawn world,
# answering and scoring files of questions, pictures of what the experts do, the command line.
# But first, what `answer` and `chat` left out: how a sample's files become tensors.
# -------------------------------------------------------------------------------------------------
# 2. What the model sees and hears


def device_of(model):
    return model.text.embed.weight.device


def sense(model, samples):
    """Samples -> (texts, senses): what is said, and what the model sees and hears.

    texts: for each sample (conversations, slots), as data.load_senses gives them: a "<video>" is
    now as many "<image>" as it fills, and slots says how many tokens each sound takes.
    senses: arguments of CuMo.forward and CuMo.generate, each only if there is any, on the model's
    device: "images" (n, 3, S, S), "audio" (chunks, n_mels, n_frames), "frames" (n_marks,) int64."""
    # A model without eyes or ears needs no sizes. If there are files for it, load_senses complains
    # about sounds, and the model itself about images.
    config = model.config
    wanted = data.picture_format(config.vision)
    ears = data.sound_format(config)

    texts = []
    pictures = []
    chunks = []
    frames = []
    for sample in samples:
        conversations, images, audio, frames_here, slots = data.load_senses(
            sample, wanted, average=not config.frames_apart, **ears)
        texts.append((conversations, slots))
        pictures.extend(images)
        frames.extend(frames_here or [1] * len(images))
        if audio is not None:
            chunks.extend(audio)

    # What there is none of is left out: a language model alone is given tokens and nothing else.
    device = device_of(model)
    senses = {}
    if pictures:
        senses["images"] = torch.stack(pictures).to(device)
    if chunks:
        senses["audio"] = torch.stack(chunks).to(device)

    # As soon as one sample of the batch has a video, every image counts as a video of one frame.
    if any(sample.get("video") for sample in samples):
        senses["frames"] = torch.tensor(frames, device=device)
    return texts, senses


@torch.no_grad()
def encode_senses(model, sample):
    """-> (conversations, slots, embeds): as `sense`, but seen and heard already.

    embeds: "image_embeds" (n, N, D) and "audio_embeds" (chunks, Q, D), each only if there is any.
    """
    texts, senses = sense(model, [sample])
    conversations, slots = texts[0]
    embeds = {}
    if "images" in senses:
        frames = senses.get("frames")
        embeds["image_embeds"] = model.encode_images(senses["images"], None, frames)
    if "audio" in senses:
        embeds["audio_embeds"] = model.encode_audio(senses["audio"])
    return conversations, slots, embeds


def sample_of(text, images=(), video=(), audio=()):
    """A sample that asks this about these files. In front of the text comes a "<image>\\n" for each
    image that the text does not mark itself; so for videos and sounds."""
    head = ""
    for mark, files in (("<image>", images), ("<video>", video), ("<audio>", audio)):
        head += (mark + "\n") * (len(files) - text.count(mark))
    return {"images": list(images), "video": list(video), "audio": list(audio),
            "conversations": [{"from": "human", "value": head + text}]}


# -------------------------------------------------------------------------------------------------
# 3. Measuring on the drawn world

# Set by torchrun, where several processes share the questions of --eval.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# A world is what a question is about: a scene, a sound, or both together.
TYPES = {"image": data.TYPES, "sound": data.SOUND_TYPES, "both": data.BOTH_TYPES}
TITLES = {"image": "scenes", "sound": "sounds", "both": "pairs of a scene and a sound"}


def drawn_questions(n, seed=0, world="image"):
    """n (what, type, question, answer), each about another held-out scene, sound, or both.

    The types come in turn. what: the scene; in a world with sounds it has a "sound", too, and in
    the world "sound" nothing else."""
    types = TYPES[world]
    questions = []
    i = 0
    while len(questions) < n:
        what = draw_world(900_000_000 + seed * 10_000_019 + i, world)
        kind = types[len(questions) % len(types)]
        i += 1

        # Ask mostly for signs that are there.
        if kind == "sign" and not what["sign"] and i % 4 != 0:
            continue

        # Not every scene allows every type of question; then the next scene is tried.
        pair = data.ask_any(what, what.get("sound"), kind, random.Random(i))
        if pair:
            questions.append((what, kind, *pair))
    return questions


def draw_world(number, world):
    """A held-out scene, sound, or both."""
    what = {}
    if world != "sound":
        what = data.make_scene(number, held_out=True)
    if world == "sound":
        what["sound"] = data.make_sound(number, held_out=True)
    if world == "both":
        what["sound"] = data.make_sound(number, held_out=True, kinds=("beeps", "glide"))
    return what


def drawn_sample(what, question, in_words=False):
    """A sample for `answer`: scene and sound as pixels and waves, or in_words as descriptions."""
    images = []
    audio = []
    words = []
    if "objects" in what:
        images.append(data.draw_scene(what))
        words.append(data.describe(what))
    if "sound" in what:
        audio.append(data.draw_sound(what["sound"]))
        words.append(data.describe_sound(what["sound"]))

    # In words, the decoder alone is measured: it need not see or hear.
    if in_words:
        return sample_of(" ".join(words) + "\n" + question)
    return sample_of(question, images, audio=audio)


def evaluate(model, tokenizer, n, batch=100, in_words=False, world="image", asked=None, **options):
    """n drawn questions -> {type: [right, asked]} by exact match.

    in_words: scene and sound are given as text. world: see drawn_questions. asked: a list that
    gets each (sample, reply). options: as for `answer`, but answers have up to 16 tokens."""
    def draw(question):
        what, kind, text, right = question
        return kind, drawn_sample(what, text, in_words), right

    questions = drawn_questions(n, world=world)
    return count_right(model, tokenizer, questions, draw, batch, asked, **options)


def recall(model, tokenizer, n_facts, n, seed=0, asked=None, batch=100):
    """n new drawings of n_facts known facts, and as many of unknown ones: {"known": [right, asked],
    "unknown": the same}. Nobody can know the latter: what is right there is chance (1 in 1,406)."""
    scores = {}
    for name, first in (("known", 0), ("unknown", n_facts)):
        # Who was taught all pictures that there are leaves no unknown ones.
        n_here = min(n_facts, data.N_FACTS - first)
        if n_here == 0:
            continue
        facts = data.Facts(n_here, n, seed, held_out=True, first=first)

        def draw(i):
            sample = facts[i]
            right = sample["conversations"].pop()["value"]
            return name, sample, right

        scores |= count_right(model, tokenizer, range(n), draw, batch, asked)
    return scores


def count_right(model, tokenizer, questions, draw, batch, asked, max_new_tokens=16, **options):
    """-> {type: [right, asked]} by exact match. draw: a question -> (type, sample, answer)."""
    was_training = model.training
    model.eval()
    scores = {}
    for group in batches(questions, batch, "evaluating"):
        # The pictures of a batch are drawn now, and forgotten afterwards.
        drawn = [draw(question) for question in group]
        samples = [sample for _, sample, _ in drawn]
        replies = answer(
            model, tokenizer, samples, max_new_tokens=max_new_tokens, **options)
        for (kind, _, right), reply in zip(drawn, replies):
            add_points(scores, {kind: (reply == right, 1)})
        if asked is not None:
            asked.extend(zip(samples, replies))
    model.train(was_training)
    return scores


def batches(items, size, title):
    """Some of the items at a time, with a progress bar."""
    starts = range(0, len(items), size)
    for start in tqdm(starts, title, leave=False, disable=RANK > 0, mininterval=1):
        yield items[start:start + size]


def add_points(scores, points):
    """Add {name: (points, possible)} to the sums {name: [points, possible]}."""
    for name, new in points.items():
        so_far = scores.get(name, (0, 0))
        scores[name] = [so_far[0] + new[0], so_far[1] + new[1]]


def print_table(scores, title):
    """{name: [points, possible]} as lines, and their sum unless there is an "accuracy"."""
    rows = list(scores.items())
    if "accuracy" not in scores:
        total = {}
        for score in scores.values():
            add_points(total, {"all": score})
        rows += total.items()

    lines = [title]
    width = max([10] + [len(name) for name, _ in rows])
    for name, (points, possible) in rows:
        percent = 100 * points / max(possible, 1)
        lines.append(f"  {name:{width}} {round(points, 1):7} of {possible:5}  {percent:5.1f}%")

    # Through tqdm, so that a progress bar which is still running does not end up in the table.
    tqdm.write("\n".join(lines), file=sys.stdout)
    sys.stdout.flush()


# -------------------------------------------------------------------------------------------------
# 4. Question files, LLaVA's: JSON lines in, JSON lines out
#
# A run of hours is interrupted sooner or later. So answers go to disk batch by batch, every process
# appends to a part of its own, OUT.part-RANK-of-WORLD, and the last step merges the parts. A run
# that finds parts goes on from them, with any number of processes.


def read_rows(file, needs, kind):
    """The rows of a file of questions, answers or annotations.

    It may be JSON lines, a JSON list, VQA's {"annotations": [...]}, TextVQA's {"data": [...]}, or
    ScienceQA's {id: {...}}. Raises ValueError naming file and place: malformed JSON, a row without
    question_id or without `needs` (a `kind`: str, list, ...)."""
    rows = list_rows(file)
    if not rows:
        raise ValueError(f"{file}: holds no rows")
    for number, row in enumerate(rows, 1):
        # JSON can hold half a character, which no tokenizer takes.
        data.check_text(row, f"{file}: row {number}")
        if (not isinstance(row, dict) or not isinstance(row.get("question_id"), (int, str))
                or not isinstance(row.get(needs), kind)):
            raise ValueError(f"{file}: row {number} must be an object with question_id and "
                             f"{needs}, not {str(row)[:200]}")
    return rows


def list_rows(file):
    """The rows of a file in any of read_rows' layouts, unchecked."""
    rows = data.read_json(file)
    if len(rows) == 1 and isinstance(rows[0], dict):
        # An object alone is VQA's, TextVQA's or ScienceQA's; or a list of one.
        whole = rows[0]
        for name in ("annotations", "data"):
            if isinstance(whole.get(name), list):
                return whole[name]
        if whole and all(isinstance(row, dict) for row in whole.values()):
            return [{"question_id": key, **row} for key, row in whole.items()]
    return [as_question(row) for row in rows]


def as_question(row):
    """LLaVA asks ScienceQA with a file like those that it is trained on (llava_test_CQM-A.json):
    what the human says first is the question. Other rows stay as they are."""
    if not data.has_turns(row) or not row["conversations"] or "question_id" in row:
        return row
    first = row["conversations"][0]
    text = first.get("value") if isinstance(first, dict) else None
    if isinstance(text, str):
        text = text.replace("<image>", "").strip()
    return {"question_id": row.get("id"), **row, "text": text}


def key_of(row, asked):
    """What tells a question from the others. Its id alone does not: LLaVA's files for TextVQA and
    MME have the picture's id there, and ask about a picture several times."""
    return str(row.get("question_id")), str(row.get(asked, ""))


def by_key(rows, asked, file):
    """{key_of(row): row}. Raises ValueError where the same question comes twice."""
    keyed = {}
    for row in rows:
        key = key_of(row, asked)
        if key in keyed:
            raise ValueError(f"{file}: question_id {row['question_id']!r} comes twice with the "
                             "same text; give each question its own")
        keyed[key] = row
    return keyed


def read_questions(file, folder="", suffix=""):
    """LLaVA's questions -> {key_of: sample for `answer`, with the question's own "row"}.

    A question is {"question_id", "text"} and perhaps "image": a file below `folder` or a list of
    them, "audio": the same, "video": as in data.LlavaJson. The human's turn is LLaVA's:
    "<image>\\n" for every image (so for videos, sounds), then the text; or the text alone where it
    has its own marks. `suffix` is one more line of the text. Raises ValueError as read_rows and
    by_key, for a missing file, and for marks and files that differ in number."""
    rows = read_rows(file, "text", str)
    if suffix:
        rows = [{**row, "text": f"{row['text']}\n{suffix}"} for row in rows]

    samples = {}
    for key, row in by_key(rows, "text", file).items():
        where = f"{file}: question {key[0]!r}"
        images = question_files(row, "image", folder, where)
        videos = question_files(row, "video", folder, where)
        sounds = question_files(row, "audio", folder, where)
        samples[key] = {**sample_of(row["text"], images, videos, sounds), "row": row}
    return samples


def question_files(row, kind, folder, where):
    """A question's "image" or "audio" -> its files; "video" -> for each the files of its frames."""
    files = data.files_of(row, kind, folder, where)

    # Find out now, and not after an hour of answers, that a file is missing or a mark too many.
    # (Without sounds "<audio>" may be an HTML tag: check_questions knows the model.)
    n_marks = row["text"].count(f"<{kind}>")
    may_be_a_tag = kind == "audio" and not files
    if n_marks not in (0, len(files)) and not may_be_a_tag:
        raise ValueError(f"{where}: the text has {n_marks} <{kind}>, "
                         f"the question has {len(files)} {kind}s")
    for name in sum(files, []) if kind == "video" else files:
        try:
            data.check_file(name)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    return files


def author_of(args, model_id):
    """What stands beside each answer: which model gave it, and how. ("metadata" is LLaVA's key.)"""
    made = {"weights": checksum_of(args.model), "template": args.template,
            "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    if args.temperature:
        made |= {"top_p": args.top_p, "seed": args.seed}
    return {"model_id": model_id, "metadata": made}


def checksum_of(folder):
    """Of a model folder's weights and configuration; None of a model on the hub."""
    if not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name == "config.json" or name.endswith((".safetensors", ".bin")):
            with open(f"{folder}/{name}", "rb") as f:
                for piece in iter(partial(f.read, 2**24), b""):
                    digest.update(piece)
    return digest.hexdigest()[:16]


def answered(out, questions, author):
    """{key_of: answer's row} of `out` and its parts, as far as they exist. author: see author_of.

    Raises ValueError for anything but answers to these questions by this model, made in this way:
    it would be mixed in, or overwritten."""
    done = {}
    for file in filter(os.path.exists, [out, *parts_of(out)]):
        for row in parse_lines(file):
            # A kill may cut off the last line of a part; that question is asked again.
            if isinstance(row, bytes) and file != out:
                continue
            key = None
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                key = key_of(row, "prompt")
            if key not in questions or row.get("model_id") != author["model_id"]:
                raise ValueError(
                    f"{file} holds something else than answers of {author['model_id']} to these "
                    f"questions; choose another --out: {str(row)[:200]}")
            # An earlier version, and LLaVA, do not say how an answer was made.
            made = row.get("metadata") or author["metadata"]
            if made != author["metadata"]:
                raise ValueError(f"{file} holds answers that were made otherwise, {made}; now it "
                                 f"is {author['metadata']}: choose another --out")
            done[key] = row
    return done


def parse_lines(file):
    """A file's lines, parsed. A line that is no JSON, as when a kill cut it short, stays bytes."""
    rows = []
    for line in filter(None, Path(file).read_bytes().splitlines()):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            rows.append(line)
    return rows


def parts_of(out):
    """The files into which the processes of this and of earlier runs wrote their answers."""
    files = glob.glob(glob.escape(out) + ".part-*-of-*")
    return sorted(file for file in files if re.search(r"\.part-\d+-of-\d+$", file))


def answer_file(model, tokenizer, questions, out, author, batch, **options):
    """read_questions' samples -> `out`: for each a line {"question_id", "prompt", "text",
    "model_id", "metadata", and "image" if it has one}, in their order. Returns this process's
    share of them, [(sample, reply), ...].

    A question that cannot be answered, as its picture is broken, is reported and left out; the same
    command asks it again. options: as for `answer`. Under torchrun each process answers every
    WORLD-th question; the process group must be there."""
    check_questions(model, author["model_id"], questions)

    # 1. This process's share of the questions, without those that an earlier run has answered.
    # (Other processes may be writing already, but only answers to their own share).
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    done = answered(out, questions, author)
    share = list(questions)[RANK::WORLD]
    todo = [questions[key] for key in share if key not in done]

    # 2. Like with like, so that there is little padding; and the longest first, so that a batch too
    # large for the memory fails at once.
    todo.sort(key=size_of_question, reverse=True)

    # 3. Answer them, into this process's part.
    part = f"{out}.part-{RANK}-of-{WORLD}"
    try:
        errors = append_answers(model, tokenizer, todo, part, author, batch, **options)
    except KeyboardInterrupt:
        print(f"\nstopped; the answers so far are in {part}, "
              f"and the same command goes on from there", file=sys.stderr)
        raise
    done = answered(out, questions, author)
    asked = [(questions[key], done[key]["text"]) for key in share if key in done]

    # 4. When all parts are complete, process 0 merges them, in the order of the questions.
    if WORLD > 1:
        dist.barrier()
    if RANK == 0:
        done = answered(out, questions, author)
        if not done:
            raise ValueError(f"no question could be answered; {errors[-1]}")
        merge_answers(questions, done, out)
    return asked


def merge_answers(questions, done, out):
    """All parts -> `out`. Says how many questions have no answer."""
    write_lines(out, [done[key] for key in questions if key in done])
    for file in parts_of(out):
        os.remove(file)
    print(f"wrote {len(done)} answers to {out}")
    n_missing = len(questions) - len(done)
    if n_missing:
        print(f"{n_missing} of {len(questions)} questions could not be answered, see above; the "
              "same command asks them again, and --score needs --allow-missing without them")


def size_of_question(sample):
    n_pictures = len(sample["images"]) + len(sample["video"])
    return n_pictures, len(sample["audio"]), len(sample["row"]["text"])


def append_answers(model, tokenizer, todo, part, author, batch, **options):
    """Answer the samples `todo` in batches, and append each batch to the file `part` at once.

    Returns the errors since the last question that could be answered."""
    errors = []
    with open(part, "a", encoding="utf-8") as f:
        # The file may end with a line that was cut off.
        if f.tell() > 0:
            f.write("\n")
        for group in batches(todo, batch, "answering"):
            # The images of a group are read now, and forgotten afterwards.
            for sample, reply in zip(group, answer_each(model, tokenizer, group, **options)):
                if isinstance(reply, str):
                    errors.clear()
                    f.write(json.dumps(row_of(sample, reply, author)) + "\n")
                    continue

                # This one is left out. When all fail, it is not the questions that are broken.
                errors.append(f"question {sample['row']['question_id']!r}: {reply}")
                tqdm.write(f"left out: {errors[-1]}", file=sys.stderr)
                if len(errors) == 100:
                    raise ValueError(f"100 questions in a row cannot be answered; {errors[-1]}")
            f.flush()
    return errors


def row_of(sample, reply, author):
    """A line of the file of answers. (POPE's labels are found by the image.)"""
    question = sample["row"]
    row = {"question_id": question["question_id"], "prompt": question["text"], "text": reply,
           **author}
    image = question.get(data.key_of_files(question, "image"))
    if image:
        row["image"] = image
    return row


def answer_each(model, tokenizer, group, **options):
    """`answer`, with a ValueError in the place of each reply that cannot be given."""
    try:
        return answer(model, tokenizer, group, **options)
    except ValueError as e:
        # Which one is it? Ask them one by one.
        if len(group) == 1:
            return [e]
        return [answer_each(model, tokenizer, [sample], **options)[0] for sample in group]


def write_lines(file, rows):
    """Rows -> a file of JSON lines."""
    def write(name):
        with open(name, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)

    write_atomically(file, write)


def check_senses(model, name, sample):
    """Raises ValueError if the sample needs a sense that the model does not have."""
    if model.vision is None and (sample["images"] or sample["video"]):
        raise ValueError(f"{name} is a language model alone; it cannot see images or videos")
    if model.audio is None and sample["audio"]:
        raise ValueError(f"{name} has no ears; it cannot hear sounds")


def check_questions(model, name, questions):
    """Raises ValueError for questions that need a sense that the model does not have, and for an
    "<audio>" without sound: to a model with ears it is no HTML tag."""
    for (question, text), sample in questions.items():
        check_senses(model, name, sample)
        n_marks = text.count("<audio>")
        if model.audio is not None and n_marks and not sample["audio"]:
            raise ValueError(f"question {question!r}: the text has {n_marks} <audio>, "
                             "the question has 0 audios")


# -------------------------------------------------------------------------------------------------
# 5. Scores
#
# A scorer takes the annotation of one question and the reply to it, and gives {name: (points,
# possible)}, which sum_points adds up. A right answer is "accuracy" (1, 1), a wrong one (0, 1); and
# (0, 0) says that this question does not count: a reply "no" in POPE's precision, for example.


def score_exact(row, reply):
    """row: {"answer": text, or a list of texts any of which is right, "type": optional}.

    The reply must be the same text, but for white space around it."""
    answers = row["answer"]
    if not isinstance(answers, list):
        answers = [answers]
    right = reply.strip() in [str(text).strip() for text in answers]
    return {"accuracy": (right, 1)}


def score_gqa(row, reply):
    """row: {"answer": text, "type": optional}. GQA (arXiv 1902.09506) as LLaVA evaluates it: the
    answers are lower case, and the reply is taken without capitals and its last period."""
    return score_exact(row, reply.strip().rstrip(".").lower())


def with_one_apostrophe_forgotten(words):
    """"can't couldn't've" -> {"cant": "can't", "couldnt've": "couldn't've", "couldn'tve": ...}."""
    forms = {}
    for word in words.split():
        for i, character in enumerate(word):
            if character == "'":
                forms[word[:i] + word[i + 1:]] = word
    return forms


CONTRACTIONS = with_one_apostrophe_forgotten("""
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've""")
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBERS)}


def on_one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text):
    """VQA v2's normal form of an answer: "The two  dogs." and "2 dogs" are the same, and "dont" is
    "don't"."""
    text = on_one_line(text)

    # A punctuation mark goes away everywhere if it stands beside a blank anywhere, or if a comma
    # stands between digits ("1,000"). Else it becomes a blank: "left-hand" is two words.
    # Apostrophes and colons always stay.
    has_thousands = re.search(r"\d,\d", text)
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if has_thousands or mark + " " in text or " " + mark in text:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")

    # A period stays before a digit only.
    out = re.sub(r"\.(?!\d)", "", out).lower()

    # Numbers become digits, articles go, and forgotten apostrophes come back.
    words = []
    for word in out.split():
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def score_vqa(row, reply, form=None):
    """row: {"answers": ten of {"answer": text} or text, "answer_type": optional}. VQA accuracy
    (arXiv 1505.00468).

    form: what normalises answers. Without it, this follows the official code (GT-Vision-Lab/VQA),
    which normalises only where the humans differ: else "Yes." is no "yes". Raises ValueError where
    there are not ten.
    """
    humans = []
    for human in row["answers"]:
        humans.append(human.get("answer") if isinstance(human, dict) else human)
    if len(humans) != 10 or not data.are_texts(humans):
        raise ValueError("'answers' must be texts of ten humans, not " + str(row["answers"])[:200])

    reply = on_one_line(reply)
    humans = [on_one_line(human) for human in humans]
    if form is None and len(set(humans)) > 1:
        form = normalise
    if form is not None:
        reply = form(reply)
        humans = [form(human) for human in humans]

    # What three humans say is right: min(1, agreeing / 3) points. The official code takes the mean
    # of this over the ten ways to leave one human out (so that a human can be scored likewise).
    # Two agree, say: without one of them there is 1 left, else 2; (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    # For one or three it is 0.3 and 0.9, and from four on it is 1.
    return {"accuracy": (min(1, 0.3 * humans.count(reply)), 1)}


def m4c_form(text):
    """normalise, but commas and question marks are dropped before, and "'s" is a word by itself."""
    text = text.lower().replace(",", "").replace("?", "")
    return normalise(text.replace("'s", " 's"))


def score_llavas_vqa(row, reply):
    """row: as for score_vqa. LLaVA's numbers for VQA v2: it hands in answers in m4c's form."""
    return score_vqa(row, m4c_form(reply))


def score_textvqa(row, reply):
    """row: {"answers": ten}. TextVQA as m4c and LLaVA evaluate it: VQA accuracy, but every answer
    is normalised, in m4c's form."""
    return score_vqa(row, reply, m4c_form)


def says_no(reply):
    """As LLaVA reads it: there is a "no", "No" or "not" in the first sentence."""
    first_sentence = reply.split(".")[0].replace(",", "")
    words = first_sentence.split(" ")
    return any(word in words for word in ("No", "not", "no"))


def score_pope(row, reply):
    """row: {"label": "yes" | "no"}. POPE (arXiv 2305.10355): does the model see what is not there?

    Positive is "yes", and so is any reply that does not say no. Where the model never says yes
    LLaVA divides by zero; here precision is 0."""
    said_yes = not says_no(reply)
    is_yes = row["label"].strip().lower() != "no"
    both = said_yes and is_yes

    # (points, of how many) for each score: both are added up over all questions, then divided.
    return {
        "accuracy": (said_yes == is_yes, 1),
        "precision": (both, said_yes),
        "recall": (both, is_yes),
        "F1": (2 * both, said_yes + is_yes),
        "yes ratio": (said_yes, 1),
        "TP": (both, 1),
        "FP": (said_yes and not is_yes, 1),
        "TN": (not said_yes and not is_yes, 1),
        "FN": (not said_yes and is_yes, 1),
    }


def choice_of(reply, choices):
    """Which option a reply means, as an index: "B", "B.", "B)", "B:", "(B)", "**B**", "B. a cat",
    "Answer: B", "... The answer is B.", or the text of exactly one option; else None.

    LLaVA's script for ScienceQA knows "B", "B. a cat" and "The answer is B." alone, and the latter
    also finds "The answer is Apples"."""
    # Asterisks make it bold. What counts is the start, or what comes behind "Answer:".
    reply = reply.replace("*", "").strip()
    whole = reply
    reply = re.split(r"\b[Aa]nswer:\s*", reply)[-1].strip()

    # A letter at the start, or else in "The answer is ...".
    letters = (re.findall(r"^\(([A-Z])\)(?:[.:\s]|$)", reply)
               or re.findall(r"^([A-Z])(?:[.:)]\s|[.:)]?(?:\n|$))", reply)
               or re.findall(r"^([A-Z])\. ", whole)
               or re.findall(r"\b[Aa]nswer is:? \(?([A-Z])\b", reply))
    if len(letters) == 1:
        index = ord(letters[0]) - ord("A")
        if index < len(choices):
            return index

    # Or an option word by word.
    same = [i for i, text in enumerate(choices) if plain(text) == plain(reply)]
    return same[0] if len(same) == 1 else None


def plain(text):
    return str(text).replace("*", "").strip().rstrip(".").lower()


def score_choice(row, reply):
    """row: {"answer": letter or index from 0, "choices": [text, ...], "type": optional}.

    A reply that names no option is wrong; "unparsed" counts them. "with an image": ScienceQA's
    questions that have one, whose accuracy the papers quote."""
    # The right option, as an index.
    right = row.get("answer")
    if isinstance(right, str) and len(right) == 1:
        right = ord(right) - ord("A")
    if right not in range(len(row["choices"])):
        raise ValueError("'answer' must be the letter or the index of one of the 'choices', "
                         f"not {right!r}")
    said = choice_of(reply, row["choices"])
    points = {"accuracy": (said == right, 1), "unparsed": (said is None, 1)}
    if row.get("image"):
        points["with an image"] = points["accuracy"]
    return points


def score_mme(row, reply):
    """row: {"question_id": "existence/1.png", "answer": "Yes" | "No"}. MME (arXiv 2306.13394) reads
    a reply as its own tool does: the first four letters say yes or no, or it is wrong.

    What follows from the two questions about a picture is in mme_totals."""
    right = row["answer"].strip().lower()
    if right not in ("yes", "no"):
        raise ValueError(
            f"{row['question_id']}: 'answer' must be Yes or No, not {row['answer']!r}")
    return {"accuracy": (right in reply.lower()[:4], 1)}


MME_SENSES = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}


def mme_totals(pairs):
    """sum_points for MME, with the sums of MME's own tool.

    accuracy: of the questions; accuracy+: of the pictures, right where both questions about it are.
    A category has 100 points for each of the two, and categories add up to perception and
    cognition."""
    # The points of each picture's questions.
    pictures = {}
    for row, reply in pairs:
        right, _ = score_mme(row, reply)["accuracy"]
        pictures.setdefault(str(row["question_id"]), []).append(right)

    # A picture whose other question has no answer does not count in accuracy+.
    sums = {}
    for picture, rights in pictures.items():
        both = len(rights) == 2
        points = {"accuracy": (sum(rights), len(rights)),
                  "accuracy+": (both and all(rights), both)}
        add_points(sums, points)
        category = picture.split("/")[0]
        add_points(sums, {f"{category} {name}": new for name, new in points.items()})

    # What MME's tool prints.
    totals = {}
    for sense, categories in MME_SENSES.items():
        for category in categories.split():
            if f"{category} accuracy" in sums:
                points = 0
                for name in ("accuracy", "accuracy+"):
                    right, asked = sums[f"{category} {name}"]
                    points += 100 * right / max(asked, 1)
                sums[category] = [points, 200]
                add_points(totals, {sense: (points, 200)})
    return sums | totals


# --score's name -> (scorer, the key that an annotation needs, its type).
SCORERS = {
    "exact": (score_exact, "answer", (str, int, float, list)),
    "gqa": (score_gqa, "answer", str),
    "vqa": (score_vqa, "answers", list),
    "vqa-llava": (score_llavas_vqa, "answers", list),
    "textvqa": (score_textvqa, "answers", list),
    "pope": (score_pope, "label", str),
    "choice": (score_choice, "choices", list),
    "mme": (score_mme, "answer", str),
}


def score(kind, annotations, answers, allow_missing=False):
    """Two files -> ({name: [points, possible]}, how many answers have no annotation and so do not
    count). kind: one of SCORERS.

    Raises ValueError for annotated questions without an answer, as half a benchmark is another
    benchmark; allow_missing leaves them out."""
    rows = read_annotations(kind, annotations)
    replies = read_rows(answers, "text", str)
    by_key(rows, "question" if "question" in rows[0] else "text", annotations)
    by_key(replies, "prompt", answers)
    pairs = pair(kind, rows, replies, answers)

    # ScienceQA's problems.json holds the training questions, too: keep the splits that were asked.
    splits = {row.get("split") for row, reply in pairs if reply}
    if splits:
        pairs = [(row, reply) for row, reply in pairs if row.get("split") in splits]

    missing = [row["question_id"] for row, reply in pairs if reply is None]
    if missing and (not allow_missing or len(missing) == len(pairs)):
        raise ValueError(f"{answers}: {len(missing)} of {len(pairs)} questions have no answer, "
                         f"first {str(missing[0])!r}; --allow-missing scores the others")
    pairs = [(row, reply) for row, reply in pairs if reply]
    n_used = len({id(reply) for _, reply in pairs})
    points = sum_points(kind, [(row, reply["text"]) for row, reply in pairs])
    return points, len(replies) - n_used


def sum_points(kind, pairs):
    """[(annotation, reply)] -> {name: [points, possible]}: the sums over all questions and, where
    annotations have a "type" (VQA v2: "answer_type"), over those of a type."""
    if kind == "mme":
        return mme_totals(pairs)
    scorer = SCORERS[kind][0]
    sums = {}
    for row, reply in pairs:
        try:
            points = scorer(row, reply)
        except ValueError as e:
            raise ValueError(f"question {str(row['question_id'])!r}: {e}") from None
        question_type = row.get("type") or row.get("answer_type")
        if question_type:
            points[str(question_type)] = points["accuracy"]
        add_points(sums, points)
    return sums


# Which answer belongs to which annotation. An id alone does not say it: see key_of; and POPE's
# three files of labels (random, popular, adversarial) all begin with number 1, while LLaVA asks all
# three in one file. So what is asked must agree, too.


def read_annotations(kind, file):
    """The rows of --annotations. MME's are a folder of texts: existence/1.txt, or the same below
    questions_answers_YN/, with a line "question<TAB>answer" for each question about 1.png."""
    if kind != "mme" or not os.path.isdir(file):
        _, needs, kind_needed = SCORERS[kind]
        return read_rows(file, needs, kind_needed)

    rows = []
    for name in sorted(glob.glob("**/*.txt", root_dir=file, recursive=True)):
        path = Path(name)
        picture = f"{path.parts[0]}/{path.stem}"
        for line in Path(file, path).read_text(encoding="utf-8-sig").splitlines():
            # Lines without a tab, such as blank ones, are none.
            question, _, right = line.rpartition("\t")
            if question:
                rows.append({"question_id": picture, "question": question, "answer": right})
    if not rows:
        raise ValueError(f"{file}: no MME in it: no CATEGORY/*.txt with lines of a question, a tab "
                         "and its answer")
    return rows


def pair(kind, rows, replies, file):
    """Annotations and answers -> [(annotation, its answer or None), ...].

    Raises ValueError if the answer with an annotation's id is one to another question, or if there
    are two of them."""
    field = "question_id"
    if kind == "pope":
        in_order = pair_in_order(rows, replies)
        if in_order:
            return in_order

        # Answers may name their pictures, and then they are found by these. (LLaVA's do not.)
        if all("image" in row for row in rows + replies) and all(map(question_of, rows)):
            field = "image"

    # 1. The answers that stand at the place of each annotation.
    places = {}
    for reply in replies:
        places.setdefault(place(kind, reply[field]), []).append(reply)
    found = []
    for row in rows:
        here = places.get(place(kind, row[field]), [])
        if kind == "textvqa" and not here:
            # LLaVA's questions have the picture's id in the place of their own.
            here = places.get(place(kind, row.get("image_id")), [])
        found.append(here)

    # 2. Among these, the one to its question: word by word, or else within more words. Then the
    #    longest questions choose first, so that "Say: what is the brand name" is no answer to "what
    #    is the brand".
    chosen = {}
    taken = {}  # number of a reply -> the question that it answers
    longest_first = sorted(range(len(rows)), key=lambda i: -len(question_of(rows[i])))
    for exactly in (True, False):
        for i in longest_first:
            if i in chosen:
                continue
            question = question_of(rows[i])
            fits = [reply for reply in found[i] if asks(reply, question, exactly)]
            if not exactly:
                fits = [reply for reply in fits if taken.get(id(reply), question) == question]
            if len({str(reply.get("prompt")) for reply in fits}) > 1:
                raise ValueError(
                    f"{file}: question_id {fits[0]['question_id']!r} comes twice; give the "
                    "annotations a 'question' that says which one they mean")
            if fits:
                chosen[i] = fits[0]
                taken[id(fits[0])] = question

    # 3. Where several questions share a place, one of them may just have no answer. Elsewhere these
    #    are other questions.
    shared = field == "image" or kind in ("textvqa", "mme")
    for i, row in enumerate(rows):
        if found[i] and i not in chosen and not shared:
            raise ValueError(
                f"{file}: question {str(row['question_id'])!r} was {found[i][0]['prompt']!r}, but "
                f"its annotation is about {question_of(row)!r}: these are annotations of other "
                "questions")
    return [(row, chosen.get(i)) for i, row in enumerate(rows)]


def place(kind, name):
    """The id of a question, or the file name of a picture, as far as it is the same everywhere."""
    path = Path(str(name))
    if kind == "mme":
        # "artwork/images/10002.jpg" and "artwork/10002" are the same.
        return str(name).split("/")[0], path.stem
    return path.name if kind == "pope" else str(name)


def pair_in_order(labels, replies):
    """POPE's answers to one file of labels, among those to all three, as LLaVA finds them: by their
    order. None unless just one run of answers, as long as the labels, is to these questions."""
    starts = []
    for start in range(len(replies) - len(labels) + 1):
        if all(map(is_about, labels, replies[start:])):
            starts.append(start)
    if len(starts) != 1:
        return None
    return list(zip(labels, replies[starts[0]:]))


def is_about(label, reply):
    """Does the prompt ask the label's question, about its picture if the answer names one?"""
    if "image" in label and "image" in reply:
        if place("pope", label["image"]) != place("pope", reply["image"]):
            return False
    question = question_of(label)
    return question != "" and question in prompt_of(reply)


def asks(reply, question, exactly):
    """Is it a reply to this question, word by word or at least among other words? One without a
    prompt is a reply to any question, and an annotation without a question is about any reply."""
    prompt = prompt_of(reply) or question
    if exactly:
        return question in ("", prompt)
    return question in prompt


def question_of(row):
    """What an annotation asks, or "" if it does not say it."""
    return wording(row.get("question", row.get("text")))


def prompt_of(reply):
    """What was asked, or "" in a file of answers that does not say it."""
    return wording(reply.get("prompt"))


def wording(text):
    """A question without what differs between the files of a benchmark. "" if it is no text.

    LLaVA may put TextVQA's words in front of it or behind it, and a request for a short answer at
    the end (its eval_textvqa.py). Capitals, blanks and MME's request at the end differ, and so does
    the "imange" of POPE's first label files, which LLaVA asks for."""
    if not isinstance(text, str):
        return ""
    framed = re.match(r"OCR tokens: .*Question: (.*?) Short answer:", text, re.DOTALL)
    if framed:
        text = framed[1]
    around = ("Reference OCR token:", "Answer the question using")
    lines = [line for line in text.split("\n") if not line.startswith(around)]
    text = " ".join(" ".join(lines).replace("<image>", " ").lower().split())
    return text.replace(" imange", " image").removesuffix("please answer yes or no.").strip()


def write_drawn(folder, n):
    """The n questions of --eval-drawn as files: questions.jsonl, images/, and for --score {kind}
    the annotations {kind}.jsonl."""
    os.makedirs(f"{folder}/images", exist_ok=True)
    files = {}
    for i, (scene, kind, question, right) in enumerate(drawn_questions(n)):
        image = f"{i:05}.png"
        data.draw_scene(scene).save(f"{folder}/images/{image}")
        rows = annotations_of(kind, right, random.Random(i))
        rows["questions"] = {"image": image, "text": question}
        for name, row in rows.items():
            files.setdefault(name, []).append({"question_id": i, **row})

    for name, rows in files.items():
        write_lines(f"{folder}/{name}.jsonl", rows)
    answers = f"{folder}/answers.jsonl"
    print(f"""wrote {n} questions. Answer and score them:
  python generate.py --eval {folder}/questions.jsonl --images {folder}/images --out {answers}
  python generate.py --score exact --answers {answers} --annotations {folder}/exact.jsonl""")


def annotations_of(kind, right, rng):
    """{scorer: annotation of a drawn question}, for those scorers that can judge it."""
    rows = {"exact": {"answer": right, "type": kind}}
    rows["gqa"] = rows["exact"]

    # Ten humans who all say the same. To read is what TextVQA asks for, and POPE for yes or no.
    rows["vqa"] = {"answers": [{"answer": right}] * 10, "answer_type": kind}
    rows["vqa-llava"] = {"answers": [m4c_form(right)] * 10, "answer_type": kind}
    if kind == "sign":
        rows["textvqa"] = {"answers": [right] * 10}
    if right in ("yes", "no"):
        rows["pope"] = {"label": right}

    # Colors and shapes have others of their kind to choose from.
    for words in (data.COLORS, data.SHAPES):
        if right in words:
            others = [word for word in words if word != right]
            choices = [right, *rng.sample(others, 3)]
            rng.shuffle(choices)
            rows["choice"] = {"answer": "ABCD"[choices.index(right)], "choices": choices}
    return rows


# -------------------------------------------------------------------------------------------------
# 6. Pictures: what all of them are drawn with

# The README shows a picture at most 830 pixels wide: a wider one would lose its small print.
WIDTH = 830
EXPERT_COLORS = ((230, 80, 60), (60, 140, 230), (250, 190, 40), (80, 180, 90),
                 (150, 90, 200), (60, 200, 200), (240, 120, 180), (150, 150, 150),
                 (150, 40, 40), (30, 70, 140), (160, 110, 20), (40, 100, 50),
                 (200, 170, 240), (170, 235, 225), (255, 205, 170), (80, 80, 80))
FONT = ImageFont.load_default(16)
SMALL = ImageFont.load_default(13)


def expert_colors(n):
    """From the seventeenth expert on they repeat."""
    return [EXPERT_COLORS[e % len(EXPERT_COLORS)] for e in range(n)]


def blank_page(width, height):
    """-> (the page, the pen that draws on it). Coordinates are pixels from the top left corner."""
    page = Image.new("RGB", (width, height), "white")
    return page, ImageDraw.Draw(page)


def save_png(page, png):
    write_atomically(png, partial(page.save, format="PNG"))


def label(draw, x, y, text, color="black", font=SMALL):
    """A word or a few around the middle (x, y)."""
    draw.text((x, y), str(text), color, font, anchor="mm")


def ink_on(color):
    return "white" if sum(color) < 300 else "black"


def legend(draw, x, y, colors, texts, dy=0):
    """Squares of color with a text beside each, in a row, or dy pixels below each other."""
    for color, text in zip(colors, texts):
        draw.rectangle((x, y, x + 12, y + 12), color)
        draw.text((x + 18, y + 7), text, "black", SMALL, anchor="lm")
        y += dy
        if not dy:
            x += 32 + draw.textlength(text, SMALL)


def expert_legend(draw, x, y, n):
    """Which color is which of n experts, as far as each has its own."""
    draw.text((x, y + 7), "expert", "black", SMALL, anchor="lm")
    legend(draw, x + 52, y, expert_colors(n), [str(e) for e in range(min(n, len(EXPERT_COLORS)))])


def bars(draw, box, columns, colors, lines=()):
    """Bars side by side in box (left, top, right, bottom). A share of 1 is as high as the box.

    columns: for each bar the shares that it consists of, from the bottom up, in these colors, each
    with its percentage where that fits. lines: for each bar the shares at which lines go across
    behind it."""
    left, top, right, bottom = box
    height = bottom - top
    pitch = (right - left) / len(columns)

    # A bar takes four fifths of its place, so that the lines can be seen between the bars.
    half = min(0.4 * pitch, 75)
    for i, column in enumerate(columns):
        middle = left + (i + 0.5) * pitch
        if lines:
            for share in lines[i]:
                y = bottom - height * share
                draw.line((middle - pitch / 2, y, middle + pitch / 2, y), "#aaaaaa")

        # Each share stands on the one before, from `low` up to `high` (y grows downwards).
        low = bottom
        for share, color in zip(column, colors):
            high = low - height * share
            if share > 0:
                draw.rectangle((middle - half, high, middle + half, low), color)
            if low - high >= 12 and half >= 14:
                label(draw, middle, (low + high) / 2, f"{share:.0%}", ink_on(color))
            low = high


def round_ticks(low, high, n=4):
    """About n steps of 1, 2 or 5 times a power of ten: the multiples that enclose low and high."""
    span = high - low or 1
    power = 10.0 ** math.floor(math.log10(span / n))
    step = next(k * power for k in (1, 2, 5, 10) if k * power > 0.99 * span / n)
    # A hair's breadth over a tick is on the tick.
    first = math.floor(low / step + 1e-6)
    last = max(first + 1, math.ceil(high / step - 1e-6))
    return [k * step for k in range(first, last + 1)]


def line_chart(draw, box, curves, title="", x_title="", y_title="", y_range=None):
    """Curves on a grid with round ticks, in box (left, top, right, bottom), titles and all.

    curves: [(name, color, width in pixels, [(x, y), ...]), ...], of finite numbers, the last one on
    top. The names make a legend, without those that are "". Of 30 points or fewer each has a mark.
    y_range: (low, high) to be shown, widened to round numbers (default: all that there is); what
    lies outside is drawn at the edge. A box of 276 x 210 is a third of a page."""
    # 1. What is shown of either axis.
    points = sum([points for *_, points in curves], []) or [(0, 0)]
    xs, ys = zip(*points)
    x_low, x_high = min(xs), max(xs)
    y_ticks = round_ticks(*(y_range or (min(ys), max(ys))))

    # 2. Where it goes. Around the grid there are the title and legend, the ticks, the axis's title.
    left = box[0] + 46
    top = box[1] + 46
    right = box[2] - 18
    bottom = box[3] - 40

    def place(x, y):
        y = min(max(y, y_ticks[0]), y_ticks[-1])
        across = (x - x_low) / (x_high - x_low or 1)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + (right - left) * across, bottom - (bottom - top) * up

    # 3. The grid, and all words.
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 6, y), f"{tick:.6g}", "black", SMALL, anchor="rm")
    for tick in round_ticks(x_low, x_high, (right - left) // 50):
        if x_low <= tick <= x_high:
            x = place(tick, 0)[0]
            draw.line((x, bottom, x, bottom + 4), "#888888")
            draw.text((x, bottom + 6), f"{tick:,.6g}", "black", SMALL, anchor="ma")
    label(draw, (left + right) / 2, bottom + 30, x_title, "#555555")
    label(draw, (box[0] + box[2]) / 2, box[1] + 12, title, font=FONT)
    draw.text((box[0] + 8, top - 16), y_title, "#555555", SMALL, anchor="lm")
    named = [curve for curve in curves if curve[0]]
    beside = left + draw.textlength(y_title, SMALL)
    legend(draw, beside, top - 23, [color for _, color, *_ in named], [name for name, *_ in named])

    # 4. The curves.
    for _, color, width, points in curves:
        spots = [place(x, y) for x, y in points]
        draw.line(spots, color, width, joint="curve")
        if len(spots) <= 30:
            for x, y in spots:
                draw.rectangle((x - 2, y - 2, x + 2, y + 2), color)


def even_shares(n):
    """Where the borders between n equal shares lie: 0, 1/n, ..., 1."""
    return [k / n for k in range(n + 1)]


def shares(counts, dim):
    """Counts as shares of their sum over dim, and 0 where there is nothing to share."""
    return counts / counts.sum(dim, keepdim=True).clamp(min=1)


# -------------------------------------------------------------------------------------------------
# 7. What the experts see: patches of images (CuMo)


def sees_by_experts(model):
    """Are there experts on the way to the features?

    The last vision layer is left out: with select_layer -2 the features are its input. Its router
    is trained by the auxiliary losses (as in the released CuMo), but its experts' output goes
    nowhere.
    """
    vision = model.config.vision
    if vision is None:
        return False
    return any(vision.n_experts[:vision.n_used_layers]) or model.config.connector.n_experts > 0


def load_images(model, images):
    """Paths or PIL images -> (n, 3, S, S) on the model's device."""
    wanted = data.picture_format(model.config.vision)
    return torch.stack([data.load_image(image, wanted) for image in images]).to(device_of(model))


@contextmanager
def watch(model):
    """Inside of `with watch(model) as watched:`, this is kept of whatever the model does:

    watched.choices: each time that a layer with experts runs, (name of its module, Routing,
    probabilities (..., N, E)); watched.images: each time that the tower runs, (n, 3, S, S)."""
    watched = SimpleNamespace(choices=[], images=[])

    def keep_choices(name, moe, inputs, outputs):
        # A Routing has no probabilities. The router is a small matrix: ask it once more.
        probabilities = moe.logits(inputs[0]).float().softmax(-1)  # (..., N, E)
        watched.choices.append((name, outputs[1], probabilities))

    def keep_images(tower, inputs):
        watched.images.append(inputs[0])

    hooks = []
    if model.vision is not None:
        hooks.append(model.vision.register_forward_pre_hook(keep_images))
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            hooks.append(module.register_forward_hook(partial(keep_choices, name)))
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def watched_layers(model, choices, n_tokens=None, base_only=False):
    """What `watch` kept -> plain lists, a layer after the other, as they ran: [{
    "part": "vision", "connector" or "text", "name": "layer 0" or "connector", "scale": 1,
    "places": [(experts [K], best first, their weights [K], probabilities [E]), ...]}, ...]

    In vision and connector the places are the patches of one image after the other, row by row,
    without CLS (at scale 3 nine times as many; behind a pixel shuffle fewer); in the decoder they
    are the tokens, of which n_tokens are no padding. base_only: not those of larger scales."""
    layers = []
    n_runs = Counter()
    for module, routing, probabilities in choices:
        part = module.split(".")[0]
        layer = {"part": part, "name": part, "scale": 1}
        if part != "connector":
            layer["name"] = f"layer {module.split('.')[2]}"

        # At each of its scales the tower runs anew.
        if part == "vision":
            scales = model.config.vision.scales
            layer["scale"] = scales[n_runs[module] % len(scales)]
            n_runs[module] += 1
            if base_only and layer["scale"] > 1:
                continue

        decided = []
        for tensor in (routing.experts, routing.weights, probabilities):
            if part == "vision":
                n_prefix = model.config.vision.n_prefix_tokens
                tensor = join_crops(tensor[:, n_prefix:], layer["scale"])  # (n, N, K or E)
            if part == "text":
                tensor = tensor[:n_tokens]  # (N, K or E)
            if tensor.is_floating_point():
                tensor = tensor.double().round(decimals=4)
            decided.append(tensor.flatten(0, -2).tolist())  # (n * N, K or E)
        layer["places"] = list(zip(*decided))
        layers.append(layer)
    return layers


def join_crops(tensor, scale):
    """(n * scale^2, N, C) of the crops of n images, see encode_enlarged -> (n, scale^2 * N, C) of
    the patches of these images, row by row."""
    side = math.isqrt(tensor.shape[1])
    n_channels = tensor.shape[2]
    crops = tensor.view(-1, scale, scale, side, side, n_channels)  # (n, row, column, y, x, C)
    return crops.transpose(2, 3).reshape(-1, (scale * side) ** 2, n_channels)


@torch.no_grad()
def see_patches(model, images):
    """{"layer 0": ((n, N, K) experts of each patch, best first, (n, N, E) their probabilities),
    ..., "connector": the same}, at the base scale.

    Dense layers are left out, layers whose output is not used (see sees_by_experts), and CLS."""
    with watch(model) as watched:
        model.eval().encode_images(load_images(model, images))
    seen = {}
    for layer in watched_layers(model, watched.choices, base_only=True):
        experts, _, probabilities = (torch.tensor(column) for column in zip(*layer["places"]))
        seen[layer["name"]] = (experts.view(len(images), -1, experts.shape[-1]),
                               probabilities.view(len(images), -1, probabilities.shape[-1]))
    return seen


def routing_of(model, images):
    """{"layer 0": (n, N, K) experts of each patch, best first, ...}, see see_patches."""
    return {name: experts for name, (experts, _) in see_patches(model, images).items()}


def survey(model, images):
    """Over all images -> {"layer 0": (load, sure, patch), ..., "connector": the same}.

    load (E,): each expert's share of the first choices. patch (n, E): of the patches of an image
    whose first choice an expert is, the one that it is surest of; sure (n, E): its probability
    there, or 0 if there is no such patch."""
    # In batches: there may be many images.
    seen = {}
    for group in batches(images, 16, "counting"):
        for name, (experts, probabilities) in see_patches(model, group).items():
            is_first = experts[..., :1] == torch.arange(probabilities.shape[-1])  # (n, N, E)
            sure, patch = (probabilities * is_first).max(1)  # (n, E)
            seen.setdefault(name, []).append((is_first.sum(1), sure, patch))

    surveyed = {}
    for name, groups in seen.items():
        counts, sure, patch = (torch.cat(parts) for parts in zip(*groups))  # (n, E)
        surveyed[name] = (shares(counts.sum(0), 0), sure, patch)
    return surveyed


PANEL = 144  # pixels a side, of an image in draw_routing's picture
GAP = 16  # between two panels
STEP = PANEL + GAP  # from one panel to the next, to the right and downwards
TOP = 92  # above the first row of panels: the title, the legend, and the panels' names
LOAD = 110  # height of the bars below the panels: a share of 11% has room for its number
PATCH = 24  # pixels a side, of a patch that an expert is sure of; six of them are a panel wide


def draw_routing(model, images, png, population=None, n_layers=3):
    """Each image as the tower gets it, and with its patches in the color of their first-choice
    expert, for at most n_layers layers, spread over the depth; below, over `population` (by default
    the images shown), the expert load per layer (CuMo, Figure 4), and the patches that each expert
    is surest of.

    images, population: as for load_images. png: the file's name. Raises ValueError for a model
    without experts."""
    # What is shown of whom.
    routing = routing_of(model, images)
    if not routing:
        raise ValueError("this model is dense: there is no routing to draw")
    names = spread_over_depth(list(routing), n_layers)
    population = population or images
    surveyed = survey(model, population)
    n_experts = max(len(surveyed[name][0]) for name in names)
    colors = expert_colors(n_experts)

    # 1. An empty page with headings. Many experts have one line of patches each, few have two.
    n_lines = 1 if n_experts > 8 else 2
    pitch = n_lines * PATCH + 8  # from an expert's patches to the next one's
    bars_bottom = TOP + len(images) * STEP + 30 + LOAD
    patches_top = bars_bottom + 66
    page, draw = blank_page(WIDTH, patches_top + n_experts * pitch + 8)
    draw.text((GAP, 12), "First-choice expert of each patch", "black", FONT)
    expert_legend(draw, GAP, 40, n_experts)
    counted = "1 image" if len(population) == 1 else f"{len(population)} images"
    draw.text((GAP, bars_bottom - LOAD - 30), f"Expert load: share of first choices, {counted}; "
              "the lines are an even load", "black", FONT)
    draw.text((GAP, patches_top - 30), "The patches that each expert is surest of, one an image at "
              f"most, {counted}", "black", FONT)
    legend(draw, GAP, patches_top + 5, colors, [f"expert {e}" for e in range(n_experts)], dy=pitch)

    # 2. A row an image: as the tower gets it, and in the colors of each layer's experts.
    wanted = data.picture_format(model.config.vision)
    label(draw, GAP + PANEL / 2, TOP - 14, f"image, {wanted.size} x {wanted.size}", font=FONT)
    for row, tensor in enumerate(load_images(model, images).cpu()):
        top = TOP + row * STEP
        panel = as_seen(tensor, wanted)
        page.paste(panel, (GAP, top))
        for column, name in enumerate(names, 1):
            first = routing[name][row, :, 0]  # (N,)
            page.paste(paint_patches(panel, first, colors), (panel_left(column), top))

    # 3. Below each layer's column, the load, and each expert's patches.
    for column, name in enumerate(names, 1):
        left = panel_left(column)
        load, sure, patches = surveyed[name]
        side = math.isqrt(routing[name].shape[1])  # the connector may have fewer than the tower
        box = (left, bars_bottom - LOAD, left + PANEL, bars_bottom)
        bars(draw, box, [load.tolist()], colors, [even_shares(len(load))])
        for y in (TOP - 14, bars_bottom + 14):
            label(draw, left + PANEL / 2, y, name, font=FONT)
        for e in range(len(load)):
            top = patches_top + e * pitch
            for k, i in enumerate(surest(sure[:, e], 6 * n_lines)):
                patch = cut_patch(model.config.vision, population[i], side, int(patches[i, e]))
                page.paste(patch, (left + k % 6 * PATCH, top + k // 6 * PATCH))
    save_png(page, png)


def surest(sure, n):
    """survey's probabilities of an expert, (n,) -> the numbers of at most n images, best first."""
    order = sure.argsort(descending=True, stable=True)
    return [i for i in order[:n].tolist() if sure[i] > 0]


def cut_patch(vision, image, side, number):
    """What lies at place `number` of side x side, as the tower gets it: a patch, or behind a pixel
    shuffle a square of several."""
    wanted = data.picture_format(vision)
    pixels = pixels_of(data.load_image(image, wanted), wanted)
    size = vision.patch_size * vision.side // side  # in pixels
    row, column = divmod(number, side)
    x = column * size
    y = row * size
    box = (x, y, x + size, y + size)
    return pixels.resize((PATCH - 2, PATCH - 2), Image.Resampling.NEAREST, box)


def panel_left(column):
    return GAP + column * STEP


def spread_over_depth(names, n_layers):
    """At most n_layers of the layers, from the first to the last one; the connector always."""
    layers = [name for name in names if not name.startswith("connector")]
    which = torch.linspace(0, len(layers) - 1, min(n_layers, len(layers)))
    return [layers[i] for i in which.round().int()] + [n for n in names if n not in layers]


def pixels_of(tensor, wanted):
    """data.load_image's (3, S, S) in this format -> an image of the very pixels that the tower
    gets."""
    # Undo the normalisation.
    mean = torch.tensor(wanted.mean).view(3, 1, 1)
    std = torch.tensor(wanted.std).view(3, 1, 1)
    pixels = (tensor.float().cpu() * std + mean).clamp(0, 1) * 255  # (3, S, S)
    pixels = pixels.round().byte().permute(1, 2, 0)  # (S, S, 3)
    return Image.fromarray(pixels.numpy())


def as_seen(tensor, wanted):
    """data.load_image's (3, S, S) in this format -> a panel. A small image is enlarged without
    smoothing, so that one can see how few pixels the tower gets."""
    pixels = pixels_of(tensor, wanted)

    # A tower that reads more pixels than a panel has loses some in the picture, smoothly.
    smooth = pixels.width > PANEL
    resampling = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return pixels.resize((PANEL, PANEL), resampling)


def paint_patches(seen, experts, colors):
    """A panel whose N patches have the colors of their experts, (N,), a little lighter or darker
    where the image is so: against its median, as a dark image would make all colors brown."""
    # A pixel a patch, enlarged.
    side = math.isqrt(len(experts))
    paint = torch.tensor(colors, dtype=torch.uint8)[experts].view(side, side, 3)
    paint = Image.fromarray(paint.numpy()).resize((PANEL, PANEL), Image.Resampling.NEAREST)

    # Soft light with a grey of 128 leaves a color as it is.
    grey = seen.convert("L")
    median = Image.new("L", grey.size, ImageStat.Stat(grey).median[0])
    light = ImageChops.subtract(grey, median, offset=128)
    return ImageChops.soft_light(paint, light.convert("RGB"))


# -------------------------------------------------------------------------------------------------
# 8. What the decoder's experts read: words and pictures (and sounds) side by side
#
# Who takes what? MoE-LLaVA (arXiv 2401.15947) asks it with three figures, 4 to 6, counted here over
# whole conversations: how even is the load, does an expert prefer a modality, and which pathways,
# expert after expert through the layers, do tokens take?

MODALITIES = {"text": (125, 30, 85), "image": (0, 150, 136), "audio": (205, 110, 30)}  # and colors


class DecoderRouting:
    """Counts of the decoder's routing, for L layers with experts, at most E experts in a layer, and
    M modalities (text, image, audio).

    layers: which layers these are; n_experts: how many each has, [L]
    kept (L, E, M): choices served; dropped (L, M): choices over an expert's capacity
    pathways: for each modality {(first choice in each layer, ...): tokens}"""

    def __init__(self, text):
        self.layers = [i for i, n in enumerate(text.n_experts) if n]
        self.n_experts = [n for n in text.n_experts if n]
        self.top_k = text.top_k
        most = max(self.n_experts, default=0)
        self.kept = torch.zeros(len(self.layers), most, len(MODALITIES), dtype=torch.long)
        self.pathways = [Counter() for _ in MODALITIES]
        self.prompts = 0

    def add(self, other):
        self.kept += other.kept
        self.prompts += other.prompts
        for mine, theirs in zip(self.pathways, other.pathways):
            mine.update(theirs)

    @property
    def tokens(self):
        """How many there were of each modality; PAD is none."""
        return [paths.total() for paths in self.pathways]

    @property
    def dropped(self):
        """In every layer each token makes top_k choices; so many of these were not served."""
        return self.top_k * torch.tensor(self.tokens) - self.kept.sum(1)  # (L, M)

    def top(self, n=10, modality=None):
        """The n most used pathways of a modality or of all tokens: [((expert, ...), share of these
        tokens), ...]."""
        if modality is None:
            paths = sum(self.pathways, Counter())
        else:
            paths = self.pathways[modality]
        # Of those used alike, the path of lower numbers comes first.
        most_used = Counter(dict(sorted(paths.items()))).most_common(n)
        return [(path, count / paths.total()) for path, count in most_used]


@torch.no_grad()
def decoder_routing(model, tokenizer, samples, replies):
    """A batch of samples with the replies to them -> DecoderRouting, the counts of their tokens.

    It is one more forward pass, over prompt, reply and end mark: decoding with a cache routes the
    reply token by token, and under a capacity factor a token alone is never dropped. So the drops
    counted are those of this pass, and they depend on the batch; without a capacity factor, nothing
    does."""
    # The whole conversations, as if the replies were given.
    whole = []
    for sample, reply in zip(samples, replies, strict=True):
        turns = [*sample["conversations"], {"from": "gpt", "value": reply, "marks": []}]
        whole.append({**sample, "conversations": turns})
    texts, senses = sense(model, whole)
    tokens = tokens_of(model, tokenizer, texts)  # (B, T)

    # One forward pass tells every layer's choices.
    was_training = model.training
    routing = model.eval()(tokens, **senses).routing["text"]  # one for each layer with experts
    model.train(was_training)

    # Whose choices are these? A token is a word, or a slot of an image or of a sound; PAD is none.
    stats = DecoderRouting(model.config.text)
    stats.prompts = len(samples)
    tokens = tokens.flatten()  # (B * T,)
    for m, mine in enumerate((tokens >= 0, tokens == data.IMAGE, tokens == data.AUDIO)):
        for layer, r in enumerate(routing):
            served = r.experts[mine][r.weights[mine] > 0]  # (choices,)
            count = torch.bincount(served, minlength=stats.kept.shape[1])  # (E,)
            stats.kept[layer, :, m] = count.cpu()

        # A pathway is what the routers wished first, served or not.
        first = torch.stack([r.experts[mine, 0] for r in routing], 1)  # (N of this modality, L)
        stats.pathways[m].update(map(tuple, first.tolist()))
    return stats


# The picture of these counts. The layers are columns, the same in both panels, from x = LEFT to
# RIGHT.
LEFT = 96
RIGHT = 690
ROW = 92  # from one row of bars to the next


def layer_span(stats, i):
    """Where the column of the i-th layer with experts begins and ends."""
    width = (RIGHT - LEFT) / len(stats.layers)
    return LEFT + i * width, LEFT + (i + 1) * width


def draw_decoder_routing(stats, png):
    """A DecoderRouting in two panels: which experts do the work, for all tokens and for those of
    each modality; and the pathways.

    Raises ValueError if nothing was counted."""
    if not stats.layers or not sum(stats.tokens):
        raise ValueError("there is no routing to draw: no layer of the decoder has experts, "
                         "or no token was counted")

    # The modalities that there are: (index, name, color).
    heard = [(m, name, MODALITIES[name]) for m, name in enumerate(MODALITIES) if stats.tokens[m]]
    paths = paths_to_show(stats, heard)
    pathways_top = 246 + ROW * len(heard) + 72
    page, draw = blank_page(WIDTH, pathways_top + 20 * len(paths) + 36)

    write_summary(draw, stats, heard)
    draw_work(draw, stats, 154, heard)
    draw_pathways(draw, stats, pathways_top, paths)
    save_png(page, png)


def write_summary(draw, stats, heard):
    counts = ", ".join(f"{name} {stats.tokens[m]:,}" for m, name, _ in heard)
    prompts = "1 prompt" if stats.prompts == 1 else f"{stats.prompts:,} prompts"
    draw.text((16, 12), f"The decoder's experts: {sum(stats.tokens):,} tokens ({counts}) of "
              f"{prompts}", "black", FONT)

    # Only a capacity factor makes an expert turn tokens away.
    dropped = stats.dropped.sum()
    share = float(dropped / (dropped + stats.kept.sum()))
    draw.text((16, 38), f"with the model's replies. Each token chooses {stats.top_k} experts a "
              f"layer; {share:.1%} of the choices came over an expert's capacity and were dropped",
              "#555555", SMALL)
    expert_legend(draw, 16, 66, max(stats.n_experts))


def draw_heading(draw, stats, top, bottom, title):
    """A panel's title, and below the panel the numbers of the layers."""
    draw.text((16, top - 34), title, "black", FONT)
    draw.text((16, bottom + 14), "layer", "black", SMALL, anchor="lm")
    # Of many layers, some.
    step = math.ceil(len(stats.layers) / 24)
    for i in range(0, len(stats.layers), step):
        left, right = layer_span(stats, i)
        label(draw, (left + right) / 2, bottom + 14, stats.layers[i])


def draw_work(draw, stats, top, heard):
    """A row of bars for all tokens, and one for each modality: an expert that is taller in one
    than in the first row prefers that modality."""
    title = "Who does the work: served choices by expert (lines: an even load)"
    bottom = top + ROW * (1 + len(heard)) - 12
    draw_heading(draw, stats, top, bottom, title)
    colors = expert_colors(max(stats.n_experts))
    # Layers may have different numbers of experts, and so different lines.
    lines = [even_shares(n) for n in stats.n_experts]
    rows = [("all tokens", "black", stats.kept.sum(2))]  # (L, E)
    rows += [(name, color, stats.kept[:, :, m]) for m, name, color in heard]
    for name, color, counts in rows:
        draw.text((16, top + 40), name, color, FONT, anchor="lm")
        bars(draw, (LEFT, top, RIGHT, top + 80), shares(counts, 1).tolist(), colors, lines)
        top += ROW


def paths_to_show(stats, heard):
    """At most ten (path, share, of what, its color): the two most used of each modality, and then
    the most used of all tokens that are not among these."""
    rows = []
    for m, name, color in heard:
        for path, share in stats.top(2, m):
            rows.append((path, share, name, color))

    # These are often the most used of all, too; do not show one twice.
    shown = [path for path, *_ in rows]
    for path, share in stats.top(20):
        if path not in shown and len(rows) < 10:
            rows.append((path, share, "all", (200, 200, 200)))
    return rows


def draw_pathways(draw, stats, top, paths):
    """A table: a row is a pathway, which goes from left to right through the experts in it."""
    used = len(set().union(*stats.pathways))
    possible = f"{math.prod(stats.n_experts):,}"
    if len(possible) > 12:
        # Many layers with many experts: more than a float can hold.
        possible = f"1e{sum(math.log10(n) for n in stats.n_experts):.0f}"
    title = (f"Pathways of first choices: the most used ({used:,} of {possible} possible ones were "
             "taken)")
    draw_heading(draw, stats, top, top + 20 * len(paths), title)

    colors = expert_colors(max(stats.n_experts))
    y = top
    for path, share, name, color in paths:
        # A cell is the expert that a token chose first in this layer.
        for i, expert in enumerate(path):
            left, right = layer_span(stats, i)
            draw.rectangle((left + 1, y, right - 1, y + 17), colors[expert])
            if draw.textlength(str(expert), SMALL) < right - left:
                label(draw, (left + right) / 2, y + 9, expert, ink_on(colors[expert]))

        # Beside it, how many take this path, and of whom.
        legend(draw, RIGHT + 12, y + 2, [color], [f"{share:.1%} of {name}"])
        y += 20


def draw_experts(model, tokenizer, samples, replies, png, shown=(), batch=16, alone=False):
    """The pictures of samples and the replies to them -> the files written.

    Experts in the vision part: `png`, with the images `shown` (default: the first three) and the
    load over all; in the decoder: `png`, or NAME-text.png beside the other. With a process group,
    unless `alone`, samples are a process's share: the decoder's counts are added up, and process 0
    draws (the vision part from all images)."""
    # 1. Count.
    images = []
    for sample in samples:
        images += sample["images"]
        for video in sample.get("video") or []:
            images += data.pick_frames(video)  # those that the model saw
    stats = DecoderRouting(model.config.text)
    if stats.layers:
        pairs = list(zip(samples, replies, strict=True))
        for group in batches(pairs, batch, "counting"):
            stats.add(decoder_routing(model, tokenizer, *zip(*group)))

    # 2. Add the processes up.
    if dist.is_initialized() and not alone:
        parts = [None] * WORLD
        dist.all_gather_object(parts, (images, stats))
        if RANK > 0:
            return []
        images, stats = parts[0]
        for more_images, more_stats in parts[1:]:
            images += more_images
            stats.add(more_stats)

    # 3. Draw.
    files = []
    if sees_by_experts(model) and (images or not stats.layers):
        if not images:
            raise ValueError("--routing needs at least one --image (or an evaluation with images): "
                             "this model's experts are where it sees")
        draw_routing(model, list(shown) or images[:3], png, images)
        files.append(png)
    if stats.layers:
        name, ending = os.path.splitext(png)
        file = f"{name}-text{ending}" if files else png
        draw_decoder_routing(stats, file)
        files.append(file)
    return files


# -------------------------------------------------------------------------------------------------
# 9. The loss of a training run


def log_rows(log_file):
    """The rows of train.py's log.jsonl, of each step and each loss on held-out data; or those of
    its scores.jsonl.

    Lines that a kill has cut short, or that another program has written, are passed over."""
    rows = []
    for row in parse_lines(log_file):
        if isinstance(row, dict) and "stage" in row and isinstance(row.get("step", 0), int):
            rows.append(row)
    return rows


CHART = 210  # height of a row of charts in draw_curves' picture
PARTS = {"vision": "#1f5fbf", "connector": "#d9822b", "text": "#7d1e55"}  # and their colors


def draw_curves(log_file, png):
    """train.py's log.jsonl -> the language loss of each stage, side by side; below, for each stage
    with experts, its auxiliary losses, and the load of its MoE layers."""
    stages = {}
    for row in log_rows(log_file):
        stages.setdefault(str(row["stage"]), []).append(row)
    with_experts = [stage for stage, rows in stages.items() if any("load" in row for row in rows)]

    # Up to three stages stand side by side. Below, each stage with experts takes two rows.
    columns = max(1, min(3, len(stages)))
    n_rows = max(1, math.ceil(len(stages) / columns))
    page, draw = blank_page(WIDTH, CHART * (n_rows + 2 * len(with_experts)))
    for i, (stage, rows) in enumerate(stages.items()):
        draw_loss(draw, cell(i // columns, i % columns, columns), stage, rows)
    for i, stage in enumerate(with_experts):
        draw_auxiliary_losses(draw, n_rows + 2 * i, stage, stages[stage])
        draw_load(draw, CHART * (n_rows + 2 * i + 1), stage, stages[stage])
    save_png(page, png)


def cell(row, column, columns):
    """The box of a chart, in a row of so many columns."""
    width = WIDTH / columns
    return column * width, row * CHART, (column + 1) * width, (row + 1) * CHART


def logged(rows, name):
    """[(steps done, value), ...]. A value that is not a number cannot be drawn."""
    return [(row["step"] + 1, row[name]) for row in rows
            if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]


def running_mean(points):
    """[(x, y), ...] -> each y as the mean of those around it, of a fortieth of all to either side.

    At both ends there are fewer, as many on one side as on the other: so the mean is never late."""
    reach = min(1 + len(points) // 40, 100)
    means = []
    for i, (x, _) in enumerate(points):
        r = min(reach, i, len(points) - 1 - i)
        around = [y for _, y in points[i - r:i + r + 1]]
        means.append((x, sum(around) / len(around)))
    return means


def draw_loss(draw, box, stage, rows):
    # The first steps' losses may be so high that all others would lie on the ground: leave them out
    losses = logged(rows, "lm") or logged(rows, "loss")
    losses = losses[len(losses) // 50:]
    curves = [("each step", "#bbbbbb", 1, losses), ("mean", "#1f5fbf", 2, running_mean(losses))]
    held_out = logged(rows, "val_loss")
    title = f"stage {stage}"
    if losses:
        last = [y for _, y in losses[-10:]]
        title += f": loss {sum(last) / len(last):.3f} at the end"
    if held_out:
        curves.append(("held out", "#c0392b", 1, held_out))

    high = max([y for _, y in losses], default=0)
    line_chart(draw, box, curves, title, "step", y_range=(0, high))


def draw_auxiliary_losses(draw, row, stage, rows):
    for column, (kind, name) in enumerate((("balance", "load-balancing"), ("z", "z"))):
        steps = []
        means = []
        for part, color in PARTS.items():
            points = logged(rows, f"{part}/{kind}")
            if points:
                steps.append(("", "#cccccc", 1, points))
                means.append((part, color, 2, running_mean(points)))
        line_chart(draw, cell(row, column, 2), steps + means, f"stage {stage}: {name} loss", "step")


def draw_load(draw, top, stage, rows):
    """The load of at most four layers, and the connector's, over the steps of a stage."""
    loads = {}
    for row in rows:
        for name, load in row.get("load", {}).items():
            loads.setdefault(name, []).append(load)
    names = spread_over_depth(list(loads), 4)
    draw.text((16, top + 4), f"stage {stage}: each expert's share of the first choices, from the "
              "first step to the last one (lines: an even load)", "black", FONT)
    expert_legend(draw, 16, top + 34, max(len(loads[name][0]) for name in names))

    # A bar is the mean of several steps.
    high = top + 60
    low = top + 170
    for i, name in enumerate(names):
        left = 20 + 162 * i
        steps = torch.tensor(loads[name])  # (steps, E)
        groups = steps.tensor_split(min(20, len(steps)))
        for share in even_shares(steps.shape[1]):
            y = low - (low - high) * share
            draw.line((left - 5, y, left + 145, y), "#888888")
        columns = [group.mean(0).tolist() for group in groups]  # [bars][E]
        bars(draw, (left, high, left + 140, low), columns, expert_colors(steps.shape[1]))
        label(draw, left + 70, low + 14, name)


# -------------------------------------------------------------------------------------------------
# 10. A window: talk to the model in a browser, and watch its experts choose
#
# The page, assets/page.html, asks for three things: GET /model, what the model can do; POST /draw,
# a new scene or sound of the drawn world; POST /ask, the answer to a conversation, as lines of
# JSON. It sends the whole conversation each time, so the server keeps nothing.

PAGE = Path(__file__).with_name("assets") / "page.html"
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow reads more, some with other programs

# What a visitor may send.
MAX_BYTES = 20_000_000  # with all pictures and sounds
MAX_PIXELS = 50_000_000  # in a picture
MAX_SIDE = 10_000  # of a picture: padded to a square, that is 400 MB
MAX_FILES = 8  # pictures and sounds in a conversation
MAX_LETTERS = 4_000  # in a turn
MAX_TOKENS = 8_192  # in a conversation
MAX_WAITING = 50  # visitors


def serve(model, tokenizer, name, port, host="127.0.0.1", **options):
    """Open the window, until Ctrl-C. options: of `answer`. ValueError if it does not open."""
    server = open_window(model, tokenizer, name, port, host, **options)
    print(f"{name}: http://{host}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
    if host not in ("127.0.0.1", "localhost"):
        print(f"--host {host}: whoever reaches this machine over the network can talk to the model "
              "without a password, and what is said travels unencrypted", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()

    # Answers stop at their next token. (To leave while the model computes would crash.)
    server.closing = True
    patience = time.monotonic() + 10
    while server.queue and time.monotonic() < patience:
        time.sleep(0.05)
    server.server_close()


def open_window(model, tokenizer, name, port, host="127.0.0.1", **options):
    """-> a server that is ready to serve_forever()."""
    try:
        server = ThreadingHTTPServer((host, port), Visit)
    except (OSError, OverflowError) as e:
        raise ValueError(f"--serve {port} on {host}: {e}; try another port, or another "
                         "--host") from None
    server.talker = (model.eval(), tokenizer, name, options)
    server.names = {"localhost", host.lower(), socket.gethostname().lower()}
    server.queue = []
    server.closing = False
    return server


class Refused(ValueError):
    """Refused(status of HTTP, why)"""


class Visit(BaseHTTPRequestHandler):
    """A request, in a thread of its own. Nothing in it is written to disk or taken for a path."""
    timeout = 20  # seconds that a visitor may neither talk nor listen
    disable_nagle_algorithm = True  # a token is sent at once, not together with the next ones
    begun = False  # whether the visitor has got the head of the response

    def do_GET(self):
        # If the visitor leaves, an error ends his answer at the next token.
        with suppress(ConnectionError, TimeoutError):
            self.respond()

    do_POST = do_GET

    def respond(self):
        """Do what is asked for, or say in a line why not."""
        rooms = {"GET /": self.send_page, "GET /model": self.send_model,
                 "POST /draw": self.send_drawing, "POST /ask": self.send_answer}
        try:
            check_visitor(self.headers, self.server.names)
            room = f"{self.command} {self.path}"
            if room not in rooms:
                raise Refused(404, "there is no such page")
            rooms[room]()
        except (ConnectionError, TimeoutError):
            raise
        except ValueError as e:
            status, why = e.args if isinstance(e, Refused) else (400, str(e))
            self.say({"error": why}, status)
        except Exception:
            # A fault of ours, or no memory left. Other visitors must not suffer from it.
            traceback.print_exc()
            self.say({"error": "the server failed at this; its terminal says why"}, 500)

    def begin(self, kind, status=200, policy="default-src 'none'"):
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()

    def say(self, line, status=200):
        """Send a line of JSON. The status counts if it is the first one."""
        if self.server.closing:
            raise ConnectionAbortedError
        if not self.begun:
            self.begin("application/x-ndjson", status)
        text = json.dumps(line).encode() + b"\n"
        # In pieces, since `timeout` is for each: a large model's routing takes long on a slow line.
        for start in range(0, len(text), 65_536):
            self.wfile.write(text[start:start + 65_536])

    def send_page(self):
        """The page may run its own script and no other, and talk to this server and no other."""
        page = PAGE.read_bytes()
        script = page.split(b"<script>")[1].split(b"</script>")[0]
        known = base64.b64encode(hashlib.sha256(script).digest()).decode()
        self.begin("text/html; charset=utf-8", policy=f"default-src 'none'; connect-src 'self'; "
                   f"script-src 'sha256-{known}'; style-src 'unsafe-inline'; img-src data:; "
                   "media-src data:; frame-ancestors 'none'")
        self.wfile.write(page)

    def send_model(self):
        model, _, name, options = self.server.talker
        examples = ["Who are you?", "What can you see?", "Describe the image in detail."]
        if model.config.template == "tiny":
            examples = ["How many circles are there?", "What does the sign say?",
                        "Describe the scene."]
        dense = not any(isinstance(module, MoE) for module in model.modules())
        self.say({"name": name, "dense": dense, "worlds": worlds_of(model), "examples": examples,
                  "temperature": options.get("temperature", 0), "colors": EXPERT_COLORS,
                  "max_bytes": MAX_BYTES})

    def send_drawing(self):
        """A new scene, sound, or both, with its true description and questions about it."""
        world = self.read_json().get("world")
        if world not in worlds_of(self.server.talker[0]):
            raise ValueError("this model has no senses for such a world")
        what = draw_world(random.randrange(10**9, 2 * 10**9), world)
        sample = drawn_sample(what, "")
        truth = drawn_sample(what, "", in_words=True)["conversations"][0]["value"]
        scene = what if sample["images"] else None
        questions = data.ask_many(scene, 4, random.Random(), what.get("sound"))
        self.say({"images": [as_png(image) for image in sample["images"]],
                  "sounds": [as_wav(*sound) for sound in sample["audio"]], "truth": truth.strip(),
                  "examples": [question for _, question, _ in questions]})

    def send_answer(self):
        model, tokenizer, _, options = self.server.talker
        asked = self.read_json()
        with in_turn(self.server.queue, self.say):
            sample, temperature = read_question(asked)
            options = {**options, "temperature": temperature}
            answer_watched(model, tokenizer, sample, self.say, **options)

    def read_json(self):
        """The object that the visitor sent."""
        try:
            length = int(self.headers["Content-Length"])
            if length <= MAX_BYTES:
                return dict(json.loads(self.rfile.read(max(0, length))))
        except (ValueError, TypeError, RecursionError):
            raise ValueError("this is not a JSON object") from None
        raise Refused(413, f"{length:,} bytes, over the limit of {MAX_BYTES:,} for a conversation "
                           "with its pictures and sounds")

    def log_message(self, *args):
        """What visitors do is not written down."""


def check_visitor(headers, names):
    """Only the page itself may ask, and no other page that is open in somebody's browser.

    Such a page's requests carry its Origin. If its domain was made to point to this machine (DNS
    rebinding), they carry the domain as Host; an address as Host cannot be forged like that."""
    host = headers.get("Host", "").lower()
    name = re.sub(r":\d+$", "", host).strip("[]")
    if name not in names:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise Refused(403, "the server does not know itself by this name; open it by its "
                               "address, or start it with --host NAME") from None
    if headers.get("Origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
        raise Refused(403, "this server talks to its own page only")


@contextmanager
def in_turn(queue, say):
    """Wait in the queue for one's turn. Who waits is told the place again and again, which also
    shows who has left."""
    if len(queue) > MAX_WAITING:
        raise ValueError(f"{MAX_WAITING} visitors are waiting already; try again later")
    visitor = object()
    queue.append(visitor)
    try:
        while queue[0] is not visitor:
            say({"queue": queue.index(visitor)})
            time.sleep(0.1)
        yield
    finally:
        queue.remove(visitor)


def worlds_of(model):
    """The drawn worlds that the model has the senses for."""
    senses = {"image": [model.vision], "sound": [model.audio], "both": [model.vision, model.audio]}
    return [world for world, needed in senses.items() if None not in needed]


def as_png(image):
    """An image as a PNG file in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def as_wav(samples, rate):
    """(n,) float32 in [-1, 1] as a 16-bit WAV file in base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", None))  # one channel of two bytes
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def read_question(asked):
    """{"temperature": ..., "turns": [{"from": "human", "text": ..., "images": [...], "sounds":
    [...]}, {"from": "gpt", ...}, ...]}, files in base64 -> (a sample, temperature)."""
    sample = {"images": [], "audio": [], "conversations": []}
    try:
        if sum(len(turn["images"] + turn["sounds"]) for turn in asked["turns"]) > MAX_FILES:
            raise ValueError(f"over {MAX_FILES} pictures and sounds; clear the conversation")
        if sum(len(turn["text"]) for turn in asked["turns"]) > 20 * MAX_TOKENS:
            raise ValueError(f"over {20 * MAX_TOKENS:,} letters; clear the conversation")
        for turn in asked["turns"]:
            if turn["from"] == "human" and len(turn["text"]) > MAX_LETTERS:
                raise ValueError(f"a text of over {MAX_LETTERS:,} letters; make it shorter")

            # Each turn brings its own files along, as the first one does in `chat`.
            images = [read_picture(base64.b64decode(file)) for file in turn["images"]]
            sounds = [data.read_wav("a sound", content=base64.b64decode(file))
                      for file in turn["sounds"]]
            part = sample_of(turn["text"], images, audio=sounds)
            sample["images"] += images
            sample["audio"] += sounds
            # What else looks like a mark in it is a word.
            marks = ["<image>"] * bool(images) + ["<audio>"] * bool(sounds)
            about = {"from": turn["from"], "marks": marks}
            sample["conversations"].append(part["conversations"][0] | about)
        temperature = float(asked["temperature"])
    except (KeyError, TypeError, AttributeError, OverflowError) as e:
        raise ValueError(f"this is not what the page would send: {e!r}") from None
    if not 0 <= temperature <= 2:
        raise ValueError(f"a temperature of {temperature}; it may be 0 to 2")
    return sample, temperature


def read_picture(content):
    """The bytes of a file -> an RGB image."""
    try:
        image = Image.open(io.BytesIO(content), formats=PICTURES)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"a picture cannot be read as {', '.join(PICTURES)}") from None

    # Until here only the header was read, which says how much memory the pixels will take.
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels, over the limit of "
                         f"{MAX_PIXELS:,}, or of {MAX_SIDE:,} a side; make it smaller")
    return data.open_image(image)


def answer_watched(model, tokenizer, sample, say, **options):
    """Answer a sample, and say(line) for each step of it:

    {"pieces": [...], "seen": [...]}: the tokens of the prompt, IMAGE and AUDIO among them; and the
        images as the tower got them, as PNGs
    {"text": a piece of the answer, which is one token}
    {"layers": [...]}: watched_layers of what the model has read since the last such line: first of
        the prompt, then of one token, the last but one that it wrote
    {"reply": the whole answer}"""
    with watch(model) as watched:
        # 1. See and hear. The answer gets the features, so that no picture is encoded twice.
        conversations, slots, embeds = encode_senses(model, sample)

        # 2. The prompt as tokens, and the pictures as the tower got them.
        tokens = tokens_of(model, tokenizer, [(conversations, slots)])[0]  # (T,)
        ids = tokens[tokens != data.PAD].tolist()
        if len(ids) > MAX_TOKENS:
            raise ValueError(f"{len(ids):,} tokens, over the limit of {MAX_TOKENS:,}; clear the "
                             "conversation to begin a new one")
        wanted = data.picture_format(model.config.vision)
        seen = [as_png(pixels_of(image, wanted)) for images in watched.images for image in images]
        say({"pieces": pieces_of(tokenizer, ids), "seen": seen})

        # 3. Answer. After each token, tell which experts the decoder chose.
        def tell_layers():
            say({"layers": watched_layers(model, watched.choices, len(ids))})
            watched.choices.clear()

        def stream(piece):
            say({"text": piece})
            tell_layers()

        asked = {"images": [], "conversations": conversations, "slots": slots}
        reply = answer(model, tokenizer, [asked], stream=stream, **embeds, **options)[0]
        tell_layers()
    say({"reply": reply})


def pieces_of(tokenizer, ids):
    """Tokens -> the text of each; IMAGE and AUDIO stay what they are."""
    pieces = []
    for token in ids:
        if token < 0:
            pieces.append(token)
            continue

        # A token alone may lose the blank before it; behind another, here itself, it does not.
        once = tokenizer.decode([token], skip_special_tokens=False)
        twice = tokenizer.decode([token, token], skip_special_tokens=False)
        pieces.append(twice[len(once):])
    return pieces


# -------------------------------------------------------------------------------------------------
# 11. The command line


def load_model(args):
    """The model and its tokenizer, which can do what the flags ask."""
    model, tokenizer = load(args.model, args.device)
    if args.template:
        model.config.template = args.template
    check_model(args, model, tokenizer)
    # A CPU decodes faster so.
    if args.device == "cpu":
        store_by_columns(model.text)
    return model, tokenizer


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    on_cuda = torch.cuda.is_available()
    add("--model", default="out/tiny", help="model folder (default: out/tiny)")
    add("--device", default="cuda" if on_cuda else "cpu", help="cuda or cpu")

    # What the talk is about.
    add("--image", action="append", default=[],
        help="picture to talk about; give it again for several")
    add("--audio", action="append", default=[], metavar="WAV",
        help="sound to talk about; also several times")
    add("--video", action="append", nargs="+", default=[], metavar="DIR_OR_FRAME",
        help="video to talk about: a folder of frames, or its frames; also several times")
    add("--prompt", help="question; without it, a chat")

    # How it is answered.
    add("--template", metavar="NAME",
        help="chat template: " + ", ".join(TALKS) + "; default: the one that the model learnt, or "
        "whose marks its tokenizer knows")
    add("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--top-p", type=float, default=1.0,
        help="sample from the likeliest tokens with this much probability (default: 1)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--compile", action="store_true",
        help="compile prefill and decoding; on CUDA as CUDA graphs. The first answers take a "
             "minute longer, so it is for many or long ones")

    # Pictures and measuring.
    add("--routing", metavar="FILE.png",
        help="draw which experts took which patches of the images, or which tokens of prompt and "
             "reply where the decoder has experts (both: also FILE-text.png); with --eval or "
             "--eval-drawn averaged over it. --eval's answers are counted as they stand in --out, "
             "also those of earlier runs")
    add("--eval-drawn", type=int, metavar="N",
        help="ask N questions about held-out drawn scenes; a model that hears, N also about sounds "
             "and about both")
    add_file_flags(parser)

    # Which flags were typed? argparse does not tell. So the line is read once more, into a
    # namespace where all are there already, as None: defaults go where a name is missing, so what
    # is not None then was typed.
    args = parser.parse_args(argv)
    untouched = argparse.Namespace(**dict.fromkeys(vars(args)))
    values = vars(parser.parse_args(argv, untouched))
    args.given = {name for name, value in values.items() if value is not None}

    # From now on, a video is the list of its frames.
    videos = []
    for files in args.video:
        # One name may be a folder, or else a frame.
        if len(files) == 1 and not data.is_frame(files[0], ""):
            files = files[0]
        videos += data.video_files(files, "", "--video")
    args.video = videos
    return args


def add_file_flags(parser):
    """What concerns files of questions and answers, and the window."""
    add = parser.add_argument
    command = parser.add_mutually_exclusive_group()
    command.add_argument(
        "--eval", metavar="FILE",
        help="answer a question file as LLaVA's: a JSON object with question_id, text and image (a "
             "file, a list of files, or none), perhaps audio and video, a line; or a list of "
             "conversations, as for ScienceQA. An interrupted run goes on where it stopped; under "
             "torchrun every process answers its share")
    command.add_argument(
        "--score", choices=SCORERS,
        help="score a file of answers: exact match; GQA (the same without capitals); VQA accuracy "
             "(ten humans) by the official code, to which \"Yes.\" is no \"yes\" where all humans "
             "agree, and as LLaVA reports it, from cleaned answers; TextVQA's; POPE (yes or no); "
             "multiple choice; MME. Needs no model")
    command.add_argument(
        "--write-drawn", nargs="+", metavar=("DIR", "N"),
        help="write N (default: 500) drawn questions into DIR: questions.jsonl and images/ for "
             "--eval, and for --score one file of annotations a kind")
    command.add_argument(
        "--serve", nargs="?", type=int, const=7860, metavar="PORT",
        help="open a window in the browser: talk, and watch the experts (default: port 7860)")
    add("--host", default="127.0.0.1",
        help="of --serve: who can reach it; 0.0.0.0 lets the whole network in (default: 127.0.0.1, "
             "this machine alone)")
    add("--images", default="", metavar="DIR",
        help="of --eval: the folder below which its images lie")
    add("--out", metavar="FILE",
        help="of --eval: the answers, a JSON object a line, in the order of the questions")
    add("--suffix", metavar="TEXT",
        help="of --eval: a last line for every question; LLaVA asks ScienceQA with \"Answer with "
             "the option's letter from the given choices directly.\"")
    add("--batch", type=int, default=16,
        help="questions answered together (default: 16; of --eval-drawn 100)")
    add("--answers", metavar="FILE", help="of --score: what --eval wrote to --out")
    add("--annotations", metavar="FILE",
        help="of --score: the right answers, JSON or JSON lines, by question_id; of MME its folder")
    add("--allow-missing", action="store_true",
        help="of --score: leave out questions that have no answer")


def main(argv=None):
    args = parse(argv)
    check_flags(args)

    # 1. What needs no model.
    if args.score:
        scores, n_extra = score(args.score, args.annotations, args.answers, args.allow_missing)
        extra = f"; {n_extra} answers have no annotation and do not count" if n_extra else ""
        print_table(scores, f"{args.answers}: {args.score}{extra}")
        return
    if args.write_drawn:
        folder, n = folder_and_number(args.write_drawn)
        write_drawn(folder, n)
        return

    # 2. A file of questions is read before the model is loaded: an error in it comes at once.
    args.device = own_device(args.device)
    model_id = os.path.basename(os.path.abspath(args.model))
    if args.eval:
        questions = read_questions(args.eval, args.images, args.suffix)
        author = author_of(args, model_id)
        n_done = len(answered(args.out, questions, author))
        other = args.routing or args.given & {"prompt", "eval_drawn"}
        if n_done == len(questions) and not parts_of(args.out) and not other:
            if RANK == 0:
                print(f"{args.out} already holds all {n_done} answers")
            return
        if WORLD > 1:
            join_processes(args)

    # 3. The model, and how it is to answer.
    model, tokenizer = load_model(args)
    generator = torch.Generator(args.device).manual_seed(args.seed + RANK)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
               "top_p": args.top_p, "compile": args.compile, "generator": generator}

    if args.serve is not None:
        serve(model, tokenizer, model_id, args.serve, args.host, **options)
        return

    # 4. Ask. `asked` keeps the pairs (sample, reply) that --routing is to draw.
    talk = args.prompt is not None or not (args.routing or args.eval_drawn or args.eval)
    if args.eval_drawn:
        asked = evaluate_and_print(args, model, tokenizer, options)
    elif args.routing and not args.eval:
        sample, reply = conversation_to_draw(args, model, tokenizer, options)
        asked = [(sample, reply)]
        talk = talk and reply is None
    if args.eval:
        asked = answer_file(model, tokenizer, questions, args.out, author, args.batch, **options)

    # 5. Draw what the experts did.
    if args.routing:
        samples = [sample for sample, _ in asked]
        replies = [reply for _, reply in asked]
        files = draw_experts(model, tokenizer, samples, replies, args.routing, shown=args.image,
                             batch=args.batch)
        for file in files:
            print(f"wrote {file}")
    if dist.is_initialized():
        dist.destroy_process_group()

    # 6. Talk.
    if talk:
        chat(model, tokenizer, args.image, args.prompt, args.audio, args.video, **options)


def own_device(device):
    """The device of this process: where torchrun starts several, each has a GPU of its own."""
    if WORLD > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        # Only what can be written there and read again is a device.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from None
    return device


def join_processes(args):
    """Let the processes of torchrun know each other."""
    if args.device != "cpu":
        torch.cuda.set_device(args.device)
    backend = "gloo" if args.device == "cpu" else "nccl"
    # Whoever is done first waits for the last: longer, perhaps, than the usual ten minutes.
    dist.init_process_group(backend, timeout=timedelta(days=1))


def conversation_to_draw(args, model, tokenizer, options):
    """-> (sample, reply) for --routing without an evaluation.

    Experts in the decoder route words, too, so there the prompt is answered (or a usual one); where
    experts only see, the reply is None."""
    sample = {"images": args.image, "audio": args.audio, "video": args.video}
    if not any(model.config.text.n_experts):
        return sample, None

    # Without a prompt, ask for a description of what there is.
    prompt = args.prompt
    if not prompt:
        thing = "sound"
        if args.video:
            thing = "video"
        if args.image:
            thing = "image"
        if args.image and model.config.template == "tiny":
            thing = "scene"
        prompt = f"Describe the {thing}."
        print(f"> {prompt}")

    # The last turn is the reply. The picture draws it apart.
    *turns, last = chat(model, tokenizer, args.image, prompt, args.audio, args.video, **options)
    return {**sample, "conversations": turns}, last["value"]


def evaluate_and_print(args, model, tokenizer, options):
    """--eval-drawn: print a table for each world that the model has the senses for.

    -> [(sample, reply), ...] for --routing, or None without it."""
    # Drawn questions have short answers about small pictures: other numbers, if none are given.
    batch = args.batch if "batch" in args.given else 100
    if "max_new_tokens" not in args.given:
        options = {**options, "max_new_tokens": 16}

    # Pictures that nobody draws from are not kept.
    asked = [] if args.routing else None
    for world in worlds_of(model):
        scores = evaluate(
            model, tokenizer, args.eval_drawn, batch, world=world, asked=asked, **options)
        print_table(scores, f"{args.model}: {args.eval_drawn} questions about held-out "
                            f"{TITLES[world]}, exact match")
    return asked


# Templates in which one can ask: "plain" leaves questions out.
TALKS = [name for name in data.TEMPLATES if name != "plain"]
# Which flags a deed takes. ("prompt" is also a chat, in which the prompts are typed.)
ASKING = {"model", "device", "template", "max_new_tokens", "temperature", "top_p", "seed"}
USES = {
    "prompt": {*ASKING, "compile", "routing", "prompt", "image", "audio", "video"},
    "eval": {*ASKING, "compile", "routing", "eval", "images", "out", "suffix", "batch"},
    "eval_drawn": {*ASKING, "compile", "routing", "eval_drawn", "batch"},
    "routing": {"image", "batch"},
    "score": {"score", "answers", "annotations", "allow_missing"},
    "write_drawn": {"write_drawn"},
    "serve": {*ASKING, "serve", "host"},
}
LIMITS = {
    "max_new_tokens": (1, 1_000_000),
    "seed": (0, 2**62),
    "eval_drawn": (1, 1_000_000),
    "batch": (1, 1_000_000),
    "serve": (0, 65_535),
}


def check_flags(args):
    """Raises ValueError for flags that do not go together, or would be ignored."""
    if args.eval and not args.out:
        raise ValueError("--eval needs --out, a file for the answers")
    if args.score and (not args.answers or not args.annotations):
        raise ValueError("--score needs --answers and --annotations")
    if args.eval and args.routing and args.eval_drawn:
        raise ValueError("--routing averages over --eval or over --eval-drawn; "
                         "ask for one of them at a time")
    for name in sorted(args.given):
        if getattr(args, name) == "" and name not in ("prompt", "images"):
            raise ValueError(f"{flag(name)} is empty; leave it out, or give a name")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty; leave it out for a chat")

    if args.template not in (None, *TALKS):
        raise ValueError(f"--template {args.template}: known are {', '.join(TALKS)}")
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag(name)} must be from {low} to {high}, not {value}")

    # A flag that is given acts, or is refused.
    does = deeds(args)
    used = set().union(*[USES[deed] for deed in does])
    for name in sorted(args.given - used):
        if name in USES:
            raise ValueError(f"{flag(name)} does not go with {' and '.join(map(flag, does))}: give "
                             "one of them")
        acts_with = " or ".join(flag(deed) for deed in USES if name in USES[deed])
        hint = "; a --prompt is about an --image" if name == "images" else ""
        raise ValueError(f"{flag(name)} acts with {acts_with} only{hint}")
    if args.serve is not None and args.temperature > 2:
        raise ValueError(f"--temperature {args.temperature}: the window's goes up to 2")
    shared = args.eval and args.prompt is None and not args.eval_drawn
    if WORLD > 1 and not shared and not args.score:
        raise ValueError("torchrun shares out the questions of --eval, and nothing else: start "
                         "this with python")
    if args.temperature == 0 and args.serve is None and args.given & {"top_p", "seed"}:
        raise ValueError("--top-p and --seed are for sampling: give a --temperature above 0, too")


def flag(name):
    return "--" + name.replace("_", "-")


def deeds(args):
    """What this run does, in the words of USES."""
    does = args.given & USES.keys()
    alone = does & {"score", "write_drawn", "serve"}
    if alone:
        return alone
    if not does - {"routing"}:
        does.add("prompt")
    return does


def folder_and_number(words):
    """--write-drawn's DIR and N, which is 500 if it is not given."""
    n = words[1] if len(words) > 1 else "500"
    if len(words) > 2 or not n.isdecimal() or int(n) < 1:
        raise ValueError("--write-drawn takes a folder and a number of questions, "
                         f"not {' '.join(words)}")
    return words[0], int(n)


def check_model(args, model, tokenizer):
    """Raises ValueError if the model cannot do what the flags ask, or a file is missing."""
    if tokenizer is None:
        raise ValueError(
            f"{args.model}: no tokenizer.json in it, so there are no words to talk with")
    data.check_end_mark(tokenizer, model.config.template)
    for file in args.image + args.audio + sum(args.video, []):
        data.check_file(file)
    given = {"images": args.image, "audio": args.audio, "video": args.video}
    check_senses(model, args.model, given)

    if args.eval_drawn and not worlds_of(model):
        raise ValueError(f"{args.model} neither sees nor hears: there is no drawn world for it")
    if args.routing:
        decides = any(model.config.text.n_experts)
        if not decides and not sees_by_experts(model):
            raise ValueError(f"{args.model}: this model is dense: there is no routing to draw")
        os.makedirs(os.path.dirname(args.routing) or ".", exist_ok=True)
        something = any(given.values()) or args.eval or args.eval_drawn
        if not something and not (decides and args.prompt):
            raise ValueError("--routing needs at least one --image (or --audio, --video or "
                             "--prompt where the decoder has experts), --eval or --eval-drawn")


def plain_warning(message, *_):
    """A user wants to know what is wrong, not in which line of the code it was noticed."""
    return f"{message}\n"


if __name__ == "__main__":
    warnings.formatwarning = plain_warning
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"generate.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
