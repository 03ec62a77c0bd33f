"""generate.py: talk with a model about pictures, measure it, and see what its experts do.

    python generate.py --model out/tiny --image X.png --prompt "What color is the circle?"       one answer
    python generate.py --model out/tiny --image X.png                                            a chat (Ctrl-D ends it)
    python generate.py --model out/uni --image X.png --audio Y.wav --video FRAMES_DIR            a chat about all of them
    python generate.py --model out/tiny --image X.png --routing routing.png                      which expert took which patch (or token)
    python generate.py --model out/tiny --eval-drawn 1200                                        accuracy on held-out drawn scenes
    python generate.py --model out/tiny --eval questions.jsonl --images DIR --out answers.jsonl  answer a file; goes on where it stopped
    torchrun --nproc_per_node 8 generate.py --model M --eval questions.jsonl --images DIR --out answers.jsonl      the same on 8 GPUs
    python generate.py --score vqa --answers answers.jsonl --annotations FILE                    points: exact, vqa, textvqa, pope, choice
    python generate.py --write-drawn DIR 500                                                     drawn questions as such files, to try it

The default model was taught the questions of data.ask, among them: What color is the star? What shape is at the top left? Where is
the red circle? How many rings are there? Is the red circle above the blue square? What does the sign say? Describe the scene.
"""
import argparse
import glob
import json
import math
import os
import random
import re
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import ImageFont
from tqdm import tqdm

import data as d
from model import CuMo, MoE
from upcycle import load, write_atomically

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun; --eval alone uses them

# ---------------------------------------------------------------------------------------------------------------------
# 1. Answers


def load_images(model: CuMo, images: list) -> torch.Tensor:
    """Paths, PIL images or tensors of load_image -> (n, 3, S, S) on the model's device."""
    images = [i if isinstance(i, torch.Tensor) else d.load_image(i, model.config.vision.image_size) for i in images]
    return torch.stack(images).to(model.text.embed.weight.device)


def sense(model: CuMo, samples: list[dict]) -> tuple[list[tuple], dict]:
    """Samples with "images" and perhaps "audio" and "video" (data.load_senses) -> [(conversations, AUDIO slots of each sound), ...], and
    what the model sees and hears, in order: {"images", "audio", "frames"}, each only if there is any, on the model's device."""
    c, device = model.config, model.text.embed.weight.device
    size, seconds = c.vision.image_size if c.vision else 1, c.audio.n_frames / 100 if c.n_audio_tokens else 0.
    turns, images, audio, frames, slots = zip(*(
        d.load_senses(s, size, c.n_audio_tokens, seconds, average=not c.frames_apart) for s in samples))
    pictures, senses = [image for group in images for image in group], {}
    if pictures:
        senses["images"] = load_images(model, pictures)
    if any(f is not None for f in frames):                                         # beside a video every image is one of a single frame
        senses["frames"] = torch.tensor([n for group, f in zip(images, frames) for n in (f or [1] * len(group))], device=device)
    if any(a is not None and len(a) for a in audio):
        senses["audio"] = torch.cat(audio).to(device)
    return list(zip(turns, slots)), senses


def tokens_of(model: CuMo, tokenizer, texts: list[tuple]) -> torch.Tensor:
    """`sense`'s conversations and slots -> tokens (B, T)."""
    c = model.config
    rows = [d.encode_chat(turns, tokenizer, c.template, c.n_image_tokens, slots)[0] for turns, slots in texts]
    return d.pad_rows(rows, d.PAD).to(model.text.embed.weight.device)


def eos_id(tokenizer, template: str) -> int:
    """The token that ends an answer in this template."""
    return tokenizer.encode(d.EOS[template], add_special_tokens=False).ids[-1]


def answer(model: CuMo, tokenizer, samples: list[dict], stream=None, image_embeds=None, audio_embeds=None, **options) -> list[str]:
    """Samples whose conversations end with the human's turn -> the model's next turns, stripped of white space.

    options: max_new_tokens, temperature, top_p, generator (CuMo.generate). stream: called with each new piece of text of the first
    sample. image_embeds, audio_embeds: features of what the samples hold, where it was encoded before (then a sample with sounds says
    their "slots", and marks a video as an image)."""
    c = model.config
    if image_embeds is None and audio_embeds is None:
        texts, senses = sense(model, samples)
    else:
        texts = [(s["conversations"], s.get("slots", 0)) for s in samples]
        senses = dict(image_embeds=image_embeds, audio_embeds=audio_embeds)
    eos, said, shown = eos_id(tokenizer, c.template), [], [""]

    def on_token(token):
        said.append(int(token[0]))
        text = tokenizer.decode(said).lstrip()
        if not text.endswith("\ufffd"):                                            # a character may take several tokens
            stream(text[len(shown[0]):])
            shown[0] = text
    options.setdefault("max_new_tokens", 64)
    out = model.generate(tokens_of(model, tokenizer, texts), eos=eos, on_token=on_token if stream else None, **senses, **options)
    return [tokenizer.decode([t for t in row if t != eos]).strip() for row in out.tolist()]


def chat(model, tokenizer, images: list, prompt: str | None, audio=(), video=(), **options) -> list[dict]:
    """One answer to `prompt`, or without one a loop that reads questions. What it sees and hears is encoded once and kept. Returns the
    conversation."""
    sample, embeds = {"images": images, "audio": list(audio), "video": list(video), "conversations": []}, {}
    conversation, write = sample["conversations"], lambda text: print(text, end="", flush=True)
    while True:
        try:
            text = (prompt if prompt is not None else input("> ")).strip()
        except EOFError:
            print()
            return conversation
        if text and not conversation:
            head = "".join(f"<{kind}>\n" * (len(files) - text.count(f"<{kind}>"))
                           for kind, files in (("image", images), ("video", video), ("audio", audio)))
            conversation.append({"from": "human", "value": head + text})
            with torch.no_grad():
                ((turns, slots),), senses = sense(model, [sample])                 # turns: each "<video>" is an "<image>" now
                if "images" in senses:
                    embeds["image_embeds"] = model.encode_images(senses["images"], None, senses.get("frames"))
                if "audio" in senses:
                    embeds["audio_embeds"] = model.encode_audio(senses["audio"])
        elif text:
            conversation.append({"from": "human", "value": text})
        if text:
            asked = {"images": [], "conversations": turns + conversation[1:], "slots": slots}
            reply = answer(model, tokenizer, [asked], stream=write, **embeds, **options)[0]
            print()
            conversation.append({"from": "gpt", "value": reply})
        if prompt is not None:
            return conversation


# ---------------------------------------------------------------------------------------------------------------------
# 2. Measuring on the drawn world


def drawn_questions(n: int, seed: int = 0, world: str = "image") -> list[tuple]:
    """n (what, type, question, answer), one a held-out scene, sound, or both, the types in turn. what: a scene; a world with sounds,
    "sound" or "both", puts {"sound": ...} into it."""
    out, i, types = [], 0, {"image": d.TYPES, "sound": d.SOUND_TYPES, "both": d.BOTH_TYPES}[world]
    while len(out) < n:
        number = 900_000_000 + seed * 10_000_019 + i
        what = {} if world == "sound" else d.make_scene(number, held_out=True)
        i, kind = i + 1, types[len(out) % len(types)]
        if world != "image":
            what = what | {"sound": d.make_sound(number, True, *[("beeps", "glide")] * (world == "both"))}
        if kind == "sign" and not what["sign"] and i % 4:                          # mostly signs that are there
            continue
        senses = {"image": [what], "sound": [what.get("sound")], "both": [what, what.get("sound")]}[world]
        if qa := {"image": d.ask, "sound": d.ask_sound, "both": d.ask_both}[world](*senses, kind, random.Random(i)):
            out.append((what, kind, *qa))
    return out


def evaluate(model: CuMo, tokenizer, n: int, batch: int = 100, in_words: bool = False, world: str = "image",
             asked: list | None = None) -> dict:
    """{type: [right, asked]} by exact match. in_words: scene and sound are given as text. world: "image", "sound" or
    "both", see drawn_questions. asked: a list that gets each (sample, reply)."""
    scores, questions, was_training = {}, drawn_questions(n, world=world), model.training
    model.eval()
    for i in tqdm(range(0, n, batch), desc="evaluating", leave=False, mininterval=1):
        part, samples = questions[i:i + batch], []
        for what, _, question, _ in part:
            images = [d.draw_scene(what)] if "objects" in what and not in_words else []
            audio = [d.draw_sound(what["sound"])] if "sound" in what and not in_words else []
            words = [d.describe(what)] if "objects" in what else []
            words += [d.describe_sound(what["sound"])] if "sound" in what else []
            head = " ".join(words) + "\n" if in_words else "<image>\n" * len(images) + "<audio>\n" * len(audio)
            samples.append({"images": images, "audio": audio, "conversations": [{"from": "human", "value": head + question}]})
        replies = answer(model, tokenizer, samples, max_new_tokens=16)
        for (_, kind, _, right), reply in zip(part, replies):
            score = scores.setdefault(kind, [0, 0])
            score[0] += reply == right
            score[1] += 1
        if asked is not None:
            asked += zip(samples, replies)
    model.train(was_training)
    return scores


def print_table(scores: dict, title: str):
    """{name: [points, possible]} as lines, and their sum unless there is an "accuracy" among them."""
    tqdm.write(title, file=sys.stdout)
    total = {} if "accuracy" in scores else {"all": [sum(v[i] for v in scores.values()) for i in (0, 1)]}
    for kind, (right, asked) in (scores | total).items():
        tqdm.write(f"  {kind:10} {round(right, 1):7} of {asked:5}  {100 * right / max(asked, 1):5.1f}%", file=sys.stdout)
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Question files, LLaVA's: JSON lines in, JSON lines out
#
# A run of hours is interrupted sooner or later. So answers go to disk batch by batch, every process appends to a part of its own,
# OUT.part-RANK-of-WORLD, and the last step merges the parts. A run that finds parts goes on from them, with any number of processes.


def read_rows(file: str, needs: str, kind) -> dict[str, dict]:
    """{question_id as text: row} of JSONL, a JSON list, VQA's {"annotations": [...]}, TextVQA's {"data": [...]}, or ScienceQA's
    {id: {...}}. Raises ValueError naming file and place: malformed JSON, a row without question_id or without `needs` (a `kind`: str,
    list, ...), an id that comes twice."""
    try:
        with open(file, encoding="utf-8") as f:
            rows = json.load(f)
        rows = rows.get("annotations") or rows.get("data") or [{"question_id": key, **row} for key, row in rows.items()]
    except (OSError, ValueError, AttributeError, TypeError):                       # a list, JSONL, or an error: LlavaJson says which
        rows = d.LlavaJson(file).samples
    out = {}
    for i, row in enumerate(rows, 1):
        key = row.get("question_id") if isinstance(row, dict) else None
        if not isinstance(key, (int, str)) or not isinstance(row.get(needs), kind):
            raise ValueError(f"{file}: row {i} must be an object with question_id and {needs}, not {str(row)[:200]}")
        if str(key) in out:
            raise ValueError(f"{file}: question_id {key!r} comes twice; give each question its own")
        out[str(key)] = row
    return out


def read_questions(file: str, folder: str = "") -> dict[str, dict]:
    """{"question_id", "image": a file below `folder`, a list of them, or absent, "audio", "video" (as in LlavaJson), "text"} ->
    {id: sample for `answer`, with the row}.

    The human's turn is LLaVA's: "<image>\\n" for every image (so for videos, sounds), then the text; or the text alone where it has its own
    marks. Raises ValueError as read_rows, for a missing file, and for marks and files that differ in number."""
    samples = {}
    for key, row in read_rows(file, "text", str).items():
        where, sample, head = f"{file}: question {key!r}", {"row": row}, ""
        for kind, name in (("image", "images"), ("video", "video"), ("audio", "audio")):
            files = row.get(kind) or []
            files = [files] if isinstance(files, str) and kind != "video" else files
            if not isinstance(files, (str, list)):
                raise ValueError(f"{where}: '{kind}' must be a file or a list of files, not {files!r}")
            files = d.video_files(files, folder, where) if kind == "video" else [os.path.join(folder, str(f)) for f in files]
            n_marks = row["text"].count(f"<{kind}>") * (kind != "audio" or len(files) > 0)     # without sounds "<audio>" is but text
            if n_marks not in (0, len(files)):
                raise ValueError(f"{where}: the text has {n_marks} <{kind}>, the question has {len(files)} {kind}s")
            for f in sum(files, []) if kind == "video" else files:                 # now, and not after an hour of answers
                if not os.path.isfile(f):
                    raise ValueError(f"{f}: no such file (question {key!r}); check --images")
            sample[name], head = files, head + f"<{kind}>\n" * (len(files) - n_marks)
        samples[key] = sample | {"conversations": [{"from": "human", "value": head + row["text"]}]}
    return samples


def answered(files: list[str], questions: dict, model_id: str) -> dict[str, dict]:
    """{id: answer's row} of these files, as far as they exist. Raises ValueError for anything but answers to these questions by this
    model: it would be mixed in, or overwritten. A line that a kill cut off (only in a part) does not count; it is asked again."""
    done = {}
    for file in filter(os.path.exists, files):
        for line in Path(file).read_bytes().splitlines():
            try:
                row = json.loads(line or b"null")
            except ValueError:
                row = None if ".part-" in file else line
            if row is None:
                continue
            key = str(row.get("question_id")) if isinstance(row, dict) else None
            if key not in questions or (row.get("prompt"), row.get("model_id")) != (questions[key]["row"]["text"], model_id):
                raise ValueError(f"{file} holds something else than answers of {model_id} to these questions; choose another --out: "
                                 f"{str(row)[:200]}")
            done[key] = row
    return done


def parts_of(out: str) -> list[str]:
    return sorted(glob.glob(glob.escape(out) + ".part-*-of-*"))


def answer_file(model: CuMo, tokenizer, questions: dict, out: str, model_id: str, batch: int, **options):
    """read_questions' samples -> `out`: a line {"question_id", "prompt", "text", "model_id"} for each, in their order.

    options: as for `answer`. Under torchrun each process answers every WORLD-th question; the process group must be there."""
    if model.vision is None and any(q["images"] or q["video"] for q in questions.values()):
        raise ValueError(f"{model_id} is a language model alone; it cannot see the questions' images")
    if model.audio is None and any(q["audio"] for q in questions.values()):
        raise ValueError(f"{model_id} has no ears; it cannot hear the questions' sounds")
    for key, q in questions.items():                                               # to a model with ears "<audio>" is no HTML tag
        if model.audio is not None and (n := q["conversations"][0]["value"].count("<audio>")) != len(q["audio"]):
            raise ValueError(f"question {key!r}: the text has {n} <audio>, the question has {len(q['audio'])} audios")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    part, line = f"{out}.part-{RANK}-of-{WORLD}", lambda row: json.dumps(row) + "\n"
    done = answered([out, *parts_of(out)], questions, model_id)    # others may be writing already: answers to their own share only
    todo = [q for key, q in list(questions.items())[RANK::WORLD] if key not in done]
    # Like with like, so that there is little padding; the longest first, so that a batch too large for the memory fails at once
    todo.sort(key=lambda q: (len(q["images"]) + len(q["video"]), len(q["audio"]), len(q["row"]["text"])), reverse=True)
    try:
        with open(part, "a", encoding="utf-8") as f, tqdm(total=len(todo), desc="answering", disable=RANK > 0, mininterval=1) as bar:
            if f.tell():
                f.write("\n")                                                      # behind a line that was cut off
            for i in range(0, len(todo), batch):
                group = todo[i:i + batch]                                          # its images are read now, and forgotten after
                for row, reply in zip([q["row"] for q in group], answer(model, tokenizer, group, **options)):
                    f.write(line({"question_id": row["question_id"], "prompt": row["text"], "text": reply, "model_id": model_id}))
                f.flush()
                bar.update(len(group))
    except KeyboardInterrupt:
        print(f"\nstopped; the answers so far are in {part}, and the same command goes on from there", file=sys.stderr)
        raise
    if WORLD > 1:
        dist.barrier()                                                             # all parts are complete
    if RANK == 0:
        done = answered([out, *parts_of(out)], questions, model_id)
        write_atomically(out, lambda name: Path(name).write_text("".join(line(done[key]) for key in questions), encoding="utf-8"))
        for file in parts_of(out):
            os.remove(file)
        print(f"wrote {len(questions)} answers to {out}")


# ---------------------------------------------------------------------------------------------------------------------
# 4. Scores: annotations {id: row} and replies {id: text} of the same questions -> {name: [points, possible]}


def by_type(annotations: dict, points: dict) -> dict:
    """{id: 0..1} summed up: "accuracy" over all, and over each "type" (VQA v2: "answer_type") where the annotations have one."""
    groups = {"accuracy": list(annotations)}
    for key, row in annotations.items():
        if kind := row.get("type") or row.get("answer_type"):
            groups.setdefault(str(kind), []).append(key)
    return {kind: [sum(points[key] for key in keys), len(keys)] for kind, keys in groups.items()}


def score_exact(annotations: dict, replies: dict) -> dict:
    """row: {"answer": text, or a list of texts any of which is right, "type": optional}. The same text, but for outer blanks."""
    right = lambda row: [str(a).strip() for a in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])]
    return by_type(annotations, {key: replies[key].strip() in right(row) for key, row in annotations.items()})


CONTRACTIONS = {w[:i] + w[i + 1:]: w for w in """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've
    y'all'll you'd you'd've you'll you're you've""".split() for i, c in enumerate(w) if c == "'"}      # any one apostrophe forgotten
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}}


def normalise(text: str) -> str:
    """VQA v2's normal form of an answer: "The two  dogs." and "2 dogs" are the same, and "dont" is "don't".

    Punctuation goes away where that sign stands beside a blank, and everywhere if a comma stands between digits ("1,000"); else it
    becomes a blank ("left-hand" is two words). A period stays before a digit only; apostrophes and colons always stay."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out, thousands = text, re.search(r"\d,\d", text)
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        out = out.replace(sign, "" if thousands or sign + " " in text or " " + sign in text else " ")
    words = [DIGITS.get(w, w) for w in re.sub(r"\.(?!\d)", "", out).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def score_vqa(annotations: dict, replies: dict, form=normalise, always: bool = False) -> dict:
    """row: {"answers": ten of {"answer": text} or text, "answer_type": optional}. VQA accuracy (arXiv 1505.00468).

    What three humans say is right. Each of the ten is left out in turn (so that humans can be scored likewise) and the mean taken:
    0, 0.3, 0.6, 0.9, 1 points if 0, 1, 2, 3, 4 or more agree. Raises ValueError where there are not ten."""
    points = {}
    for key, row in annotations.items():
        humans = [h.get("answer") if isinstance(h, dict) else h for h in row["answers"]]
        if len(humans) != 10 or not all(isinstance(h, str) for h in humans):
            raise ValueError(f"question {key!r}: 'answers' must be texts of ten humans, not {str(row['answers'])[:200]}")
        reply, *humans = (text.replace("\n", " ").replace("\t", " ").strip() for text in (replies[key], *humans))
        # This follows the official code (GT-Vision-Lab/VQA), which normalises only where the humans differ: else "Yes." is no "yes".
        # LLaVA never sees that, as it hands in answers in m4c's normal form, below
        if always or len(set(humans)) > 1:
            reply, *humans = map(form, (reply, *humans))
        agree = humans.count(reply)
        points[key] = sum(min(1, (agree - (h == reply)) / 3) for h in humans) / 10
    return by_type(annotations, points)


def score_textvqa(annotations: dict, replies: dict) -> dict:
    """row: {"answers": ten}. TextVQA as m4c and LLaVA evaluate it: VQA accuracy, but always normalised, and before that commas and
    question marks are dropped and "'s" becomes a word of its own."""
    form = lambda text: normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))
    return score_vqa(annotations, replies, form, always=True)


def score_pope(annotations: dict, replies: dict) -> dict:
    """row: {"label": "yes" | "no"}. POPE (arXiv 2305.10355): does the model see what is not there? Positive is "yes".

    As LLaVA reads it, a reply with "no", "No" or "not" in its first sentence is a no, and all else a yes, whatever it says. LLaVA
    pairs replies and labels by their order, here by question_id; and where nobody says yes it divides by zero, here precision is 0."""
    said_no = lambda text: bool({"No", "not", "no"} & set(text.split(".")[0].replace(",", "").split(" ")))
    count = Counter((not said_no(replies[key]), row["label"].strip().lower() != "no") for key, row in annotations.items())
    tp, fp, tn, fn, n = count[True, True], count[True, False], count[False, False], count[False, True], len(annotations)
    return {"accuracy": [tp + tn, n], "precision": [tp, tp + fp], "recall": [tp, tp + fn], "F1": [2 * tp, 2 * tp + fp + fn],
            "yes ratio": [tp + fp, n], "TP": [tp, n], "FP": [fp, n], "TN": [tn, n], "FN": [fn, n]}


def choice_of(reply: str, choices: list) -> int | None:
    """Which option a reply means: "B", "B.", "(B)", "B. a cat", "... The answer is B.", or the text of exactly one option; else None.

    LLaVA's script for ScienceQA knows no brackets and no texts, and its "The answer is A" also finds "The answer is Apples"."""
    reply, plain = reply.strip(), lambda text: str(text).strip().rstrip(".").lower()
    head = re.match(r"\(([A-Z])\)(?:[.\s]|$)|([A-Z])(?:\.\s|\.?$)", reply)
    letters = [head[1] or head[2]] if head else re.findall(r"[Tt]he answer is \(?([A-Z])\b", reply)
    if len(letters) == 1 and ord(letters[0]) - ord("A") < len(choices):
        return ord(letters[0]) - ord("A")
    same = [i for i, text in enumerate(choices) if plain(text) == plain(reply)]
    return same[0] if len(same) == 1 else None


def score_choice(annotations: dict, replies: dict) -> dict:
    """row: {"answer": letter or index from 0, "choices": [text, ...]}. A reply that names no option is wrong; "unparsed" counts them."""
    points, unparsed = {}, 0
    for key, row in annotations.items():
        right, said = row.get("answer"), choice_of(replies[key], row["choices"])
        right = ord(right) - ord("A") if isinstance(right, str) and len(right) == 1 else right
        if right not in range(len(row["choices"])):
            raise ValueError(f"question {key!r}: 'answer' must be the letter or the index of one of the 'choices', not {right!r}")
        points[key], unparsed = said == right, unparsed + (said is None)
    return by_type(annotations, points) | {"unparsed": [unparsed, len(points)]}


SCORERS = {"exact": (score_exact, "answer", (str, int, float, list)), "vqa": (score_vqa, "answers", list),    # the key a row needs
           "textvqa": (score_textvqa, "answers", list), "pope": (score_pope, "label", str), "choice": (score_choice, "choices", list)}


def score(kind: str, annotations: str, answers: str) -> tuple[dict, int]:
    """Two files -> ({name: [points, possible]}, how many answers have no annotation; they are left out).

    Raises ValueError for annotated questions without an answer: half a benchmark is another benchmark."""
    scorer, *needs = SCORERS[kind]
    rows, replies = read_rows(annotations, *needs), {key: row["text"] for key, row in read_rows(answers, "text", str).items()}
    splits = {row.get("split") for key, row in rows.items() if key in replies}     # problems.json holds the training questions, too
    rows = {key: row for key, row in rows.items() if not splits or row.get("split") in splits}
    if missing := [key for key in rows if key not in replies]:
        raise ValueError(f"{answers}: {len(missing)} of {len(rows)} questions have no answer, first {missing[0]!r}")
    return scorer(rows, replies), len(replies.keys() - rows.keys())


SYNONYMS = {"circle": "disc", "cross": "plus sign", "purple": "violet", "cyan": "light blue", "large": "big", "center": "in the middle"}


def write_drawn(folder: str, n: int):
    """The n questions of --eval-drawn as files: questions.jsonl, images/, and {kind}.jsonl, the annotations for --score {kind}."""
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    files = {name: [] for name in ("questions", *SCORERS)}
    for i, (scene, kind, question, right) in enumerate(drawn_questions(n)):
        add = lambda name, **row: files[name].append(json.dumps({"question_id": i, **row}) + "\n")
        d.draw_scene(scene).save(os.path.join(folder, "images", f"{i:05}.png"))
        add("questions", image=f"{i:05}.png", text=question)
        add("exact", answer=right, type=kind)
        # Ten humans, made up: some are wordy, some know another word, and every third question leaves most of them unsure
        rng = random.Random(i)
        humans = rng.choices((right, f"The {right}.", SYNONYMS.get(right, right), "unsure"), (4, 1, 1, rng.choice((1, 1, 12))), k=10)
        add("vqa", answers=[{"answer": human} for human in humans], answer_type=kind)
        if kind == "sign":                                                         # to read is what TextVQA asks for
            add("textvqa", answers=humans)
        if right in ("yes", "no"):
            add("pope", label=right)
        if others := [w for words in (list(d.COLORS), d.SHAPES) if right in words for w in words if w != right]:
            choices = rng.sample([right, *rng.sample(others, 3)], 4)
            add("choice", answer="ABCD"[choices.index(right)], choices=choices)
    for name, lines in files.items():
        Path(folder, f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"wrote {n} questions. Answer and score them:\n"
          f"  python generate.py --eval {folder}/questions.jsonl --images {folder}/images --out {folder}/answers.jsonl\n"
          f"  python generate.py --score exact --answers {folder}/answers.jsonl --annotations {folder}/exact.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Pictures of the routing

EXPERT_COLORS = ((230, 80, 60), (60, 140, 230), (250, 190, 40), (80, 180, 90),
                 (150, 90, 200), (60, 200, 200), (240, 120, 180), (150, 150, 150))


@torch.no_grad()
def routing_of(model: CuMo, images: list) -> dict[str, torch.Tensor]:
    """{"layer 0": (n, N, K) experts of each patch, best first, ..., "connector": the same}: dense layers are left out, CLS too."""
    aux = {"vision": [], "connector": []}
    model.eval().encode_images(load_images(model, images), aux)
    layers = [i for i, layer in enumerate(model.vision.layers) if isinstance(layer.ffn, MoE)]
    out = {f"layer {i}": r.experts[:, 1:].cpu() for i, r in zip(layers, aux["vision"])}       # the base scale comes first
    return out | {"connector": r.experts.cpu() for r in aux["connector"]}


def draw_routing(model: CuMo, images: list, png: str, population: list | None = None, n_layers: int = 5):
    """Each image with its patches in the colour of their first-choice expert, layer by layer; below, the expert load per layer
    (CuMo, Figure 4) over `population`, by default the images shown. Raises ValueError for a model without experts."""
    shown = routing_of(model, images)
    if not shown:
        raise ValueError("this model is dense: there is no routing to draw")
    load, population = Counter(), population or images
    for i in range(0, len(population), 16):                                        # in batches: the population may be large
        for name, experts in routing_of(model, population[i:i + 16]).items():
            load.update((name, e) for e in experts[..., 0].flatten().tolist())
    names = [n for n in shown if n != "connector"]
    n_layers = min(n_layers, len(names))                                           # spread over the depth
    names = [names[round(i * (len(names) - 1) / max(1, n_layers - 1))] for i in range(n_layers)] + ["connector"] * ("connector" in shown)
    n_experts = max([*model.config.vision.n_experts, model.config.connector.n_experts])
    panel, gap, top, bars = 192, 16, 64, 110
    width = max(640, (len(names) + 1) * (panel + gap) + gap)
    height = top + len(images) * (panel + gap) + bars + 76
    img = d.Image.new("RGB", (width, height), "white")
    draw, font, small = d.ImageDraw.Draw(img), ImageFont.load_default(16), ImageFont.load_default(13)
    color = lambda e: EXPERT_COLORS[e % len(EXPERT_COLORS)]
    draw.text((gap, 12), "First-choice expert of each patch", "black", font)
    for e in range(n_experts):
        x = 300 + e * 95
        draw.rectangle((x, 12, x + 16, 28), color(e))
        draw.text((x + 22, 12), f"expert {e}", "black", small)
    for column, name in enumerate(["image", *names]):
        draw.text((gap + column * (panel + gap) + panel / 2, top - 14), name, "black", font, anchor="mm")
    for row, image in enumerate(images):
        if not isinstance(image, d.Image.Image):
            image = d.Image.open(image)
        square = d.pad_to_square(image.convert("RGB"))                             # as the model sees it
        square = square.resize((panel, panel), d.Image.Resampling.NEAREST if square.width < panel else d.Image.Resampling.BICUBIC)
        y = top + row * (panel + gap)
        img.paste(square, (gap, y))
        for column, name in enumerate(names, 1):
            first = shown[name][row, :, 0]                                         # (N,)
            grid = math.isqrt(len(first))
            paint = torch.tensor([color(int(e)) for e in first], dtype=torch.uint8).view(grid, grid, 3).numpy()
            paint = d.Image.fromarray(paint).resize((panel, panel), d.Image.Resampling.NEAREST)
            img.paste(d.Image.blend(square.convert("L").convert("RGB"), paint, 0.55), (gap + column * (panel + gap), y))
    base = height - 44
    n_images = len(population)
    draw.text((gap, base - bars - 26), f"Expert load: share of first choices, {n_images} image{'s' * (n_images > 1)}; the line is an even load",
              "black", font)
    shares = {name: torch.tensor([load[name, e] for e in range(n_experts)], dtype=torch.float) for name in names}
    shares = {name: counts / counts.sum() for name, counts in shares.items()}
    high = max(2 / n_experts, *(float(s.max()) for s in shares.values()))
    for column, name in enumerate(names, 1):
        x, w = gap + column * (panel + gap), panel / n_experts
        for e, v in enumerate(shares[name].tolist()):
            draw.rectangle((x + e * w + 3, base - v / high * bars, x + (e + 1) * w - 3, base), color(e))
            draw.text((x + (e + 0.5) * w, base - 10), f"{100 * v:.0f}%", "black", small, anchor="mm")
        even = base - bars / n_experts / high
        draw.line((x, even, x + panel, even), "#444444")
        draw.text((x + panel / 2, base + 16), name, "black", font, anchor="mm")
    write_atomically(png, lambda name: img.save(name, "PNG"))


# The decoder's experts see words and pictures (and sounds) side by side. Who takes what? MoE-LLaVA (arXiv 2401.15947) asks it with three
# figures, 4 to 6, counted here over whole conversations: how even is the load, does an expert prefer a modality, and which pathways,
# expert after expert through the layers, do tokens take?

MODALITIES = {"text": (125, 30, 85), "image": (0, 150, 136), "audio": (205, 110, 30)}           # and their colours


class DecoderRouting:
    """Counts of the decoder's routing, for L layers with experts, at most E in a layer, and M modalities (text, image, audio)."""

    def __init__(self, c):
        self.layers = [i for i, n in enumerate(c.n_experts) if n]
        self.n_experts, self.top_k = [n for n in c.n_experts if n], c.top_k
        self.kept = torch.zeros(len(self.layers), max(self.n_experts, default=0), len(MODALITIES), dtype=torch.long)   # choices served
        self.dropped = torch.zeros(len(self.layers), len(MODALITIES), dtype=torch.long)        # choices over an expert's capacity
        self.pathways = [Counter() for _ in MODALITIES]                            # {(first choice in each layer, ...): tokens}
        self.prompts = 0

    def add(self, other: "DecoderRouting"):
        self.kept, self.dropped, self.prompts = self.kept + other.kept, self.dropped + other.dropped, self.prompts + other.prompts
        for mine, theirs in zip(self.pathways, other.pathways):
            mine.update(theirs)

    @property
    def tokens(self) -> list[int]:
        """Of each modality; PAD is none."""
        return [paths.total() for paths in self.pathways]

    def share(self, among: str) -> torch.Tensor:
        """(L, E, M) shares of `kept`, adding up to 1 over the "experts" (which of them serve a modality) or over the "modalities" (what an
        expert serves), and 0 where there is nothing; "load": (L, E), of all choices that a layer served."""
        counts, dim = (self.kept.sum(2), 1) if among == "load" else (self.kept, {"experts": 1, "modalities": 2}[among])
        return counts / counts.sum(dim, keepdim=True).clamp(min=1)

    def top(self, n: int = 10, modality: int | None = None) -> list[tuple]:
        """The n most used pathways of a modality or of all tokens: [((expert, ...), share of these tokens), ...]."""
        paths = sum(self.pathways, Counter()) if modality is None else self.pathways[modality]
        return [(path, count / paths.total()) for path, count in sorted(paths.items(), key=lambda item: (-item[1], item[0]))[:n]]


@torch.no_grad()
def decoder_routing(model: CuMo, tokenizer, samples: list[dict], replies: list[str], stats: DecoderRouting | None = None) -> DecoderRouting:
    """Adds a batch of samples and the replies to them up. It is one more forward pass, over prompt, reply and end mark: decoding with a
    cache routes the reply token by token, and under a capacity factor a token alone is never dropped. So the drops counted are those
    of this pass, and they depend on the batch; without a capacity factor, nothing does."""
    stats, was_training = stats or DecoderRouting(model.config.text), model.training
    texts, senses = sense(model, [{**s, "conversations": [*s["conversations"], {"from": "gpt", "value": reply}]}
                                  for s, reply in zip(samples, replies, strict=True)])
    tokens = tokens_of(model, tokenizer, texts)                                    # (B, T)
    routing = model.eval()(tokens, **senses).routing["text"]
    model.train(was_training)
    tokens = tokens.flatten()
    for m, mine in enumerate((tokens >= 0, tokens == d.IMAGE, tokens == d.AUDIO)):
        for layer, r in enumerate(routing):
            experts, served = r.experts[mine], r.weights[mine] > 0                 # (N of this modality, K) both
            stats.kept[layer, :, m] += torch.bincount(experts[served], minlength=stats.kept.shape[1]).cpu()
            stats.dropped[layer, m] += int((~served).sum())
        first = torch.stack([r.experts[mine, 0] for r in routing], 1)              # (N, L) the router's wish, served or not
        paths, counts = first.unique(dim=0, return_counts=True)
        stats.pathways[m].update(dict(zip(map(tuple, paths.tolist()), counts.tolist())))
    stats.prompts += len(samples)
    return stats


def draw_decoder_routing(stats: DecoderRouting, png: str):
    """Four panels, layers from left to right in each: load, modalities in an expert, experts of a modality, pathways."""
    if not stats.layers or not sum(stats.tokens):
        raise ValueError("there is no routing to draw: no layer of the decoder has experts, or no token was counted")
    names, colors, heard = list(MODALITIES), list(MODALITIES.values()), [m for m, n in enumerate(stats.tokens) if n]
    n, most, left, right, row = len(stats.layers), max(stats.n_experts), 96, 960, 54       # row: height of a pathway's step
    pitch = (right - left) / n
    wide = min(0.74 * pitch, 150)                                                  # of a bar
    tops = [116, 326, 530, 530 + 92 * len(heard) + 68]                             # of the panels
    img = d.Image.new("RGB", (1300, tops[3] + max(most * row, 200) + 44), "white")
    draw, font, small = d.ImageDraw.Draw(img), ImageFont.load_default(16), ImageFont.load_default(13)
    middle, expert = lambda i: left + (i + 0.5) * pitch, lambda e: EXPERT_COLORS[e % len(EXPERT_COLORS)]

    def stack(x, y, w, h, shares, paint, lines=()):
        """A bar from y + h upwards, cut by shares; with percentages where they fit, beside the `lines` that will be drawn across."""
        ends = [0, *torch.tensor(shares).cumsum(0).tolist()]
        for a, b, color in zip(ends, ends[1:], paint):
            low, high = y + h - round(a * h), y + h - round(b * h)
            if low > high:
                draw.rectangle((x, high, x + w - 1, low - 1), color)
            if low - high >= 14 and w >= 30:
                ink, at = "white" if sum(color) < 300 else "black", (low + high) / 2
                for line in lines:
                    if abs(at - line) < 9 and low - high > 30:
                        at = line + (10 if at >= line else -10)
                draw.text((x + w / 2, at), f"{100 * (b - a):.0f}%", ink, small, anchor="mm")

    def panel(top, title, bottom):
        draw.text((16, top - 34), title, "black", font)
        draw.text((16, bottom + 11), "layer" * (pitch <= 62), "black", small, anchor="lm")
        for i, layer in enumerate(stats.layers):
            draw.text((middle(i), bottom + 11), f"layer {layer}" if pitch > 62 else str(layer), "black", small, anchor="mm")

    def legend(top, entries):
        for i, (color, text) in enumerate(entries):
            draw.rectangle((right + 24, top + i * 20, right + 38, top + 14 + i * 20), color)
            draw.text((right + 46, top + 7 + i * 20), text, "black", small, anchor="lm")

    count = ", ".join(f"{names[m]} {stats.tokens[m]:,}" for m in heard)
    served, lost = int(stats.kept.sum()), int(stats.dropped.sum())
    draw.text((16, 12), f"The decoder's experts: {sum(stats.tokens):,} tokens ({count}) of {stats.prompts:,} "
              f"prompt{'s' * (stats.prompts != 1)} with the model's replies", "black", font)
    draw.text((16, 38), f"Each token chooses {stats.top_k} experts a layer; " + (
        f"{lost / (served + lost):.1%} of the choices came over an expert's capacity and were dropped" if lost else "no choice was dropped")
        + ". Bars show choices that were served", "#555555", small)

    load, inside, spread = (stats.share(among).tolist() for among in ("load", "modalities", "experts"))
    panel(tops[0], "Expert load: who does the work in each layer (lines: an even load)", tops[0] + 130)
    legend(tops[0], [(expert(e), f"expert {e}") for e in range(most)])
    for i, e in enumerate(stats.n_experts):
        for k in range(e + 1):
            y = tops[0] + 130 - round(130 * k / e)
            draw.line((left + i * pitch, y, left + (i + 1) * pitch, y), "#bbbbbb")
        stack(middle(i) - wide / 2, tops[0], wide, 130, load[i][:e], map(expert, range(e)))

    panel(tops[1], "What each expert serves: its choices by modality (white lines: an expert without preference)", tops[1] + 126)
    legend(tops[1], [(colors[m], names[m]) for m in heard[::-1]])
    for i, e in enumerate(stats.n_experts):
        w, mix = min(0.86 * pitch / e, 60), stats.kept[i].sum(0) / stats.kept[i].sum().clamp(min=1)
        mix = [tops[1] + 110 - round(110 * m) for m in mix[heard].cumsum(0).tolist()[:-1]]
        for j in range(e):
            x = middle(i) + (j - e / 2) * w
            stack(x + 1, tops[1], int(w) - 1, 110, [inside[i][j][m] for m in heard], [colors[m] for m in heard], mix)
            draw.rectangle((x + 1, tops[1] + 113, x + int(w) - 1, tops[1] + 118), expert(j))
        for y in mix:
            draw.line((middle(i) - e / 2 * w, y, middle(i) + e / 2 * w, y), "white", 2)

    panel(tops[2], "Where each modality goes: its choices by expert", tops[2] + 92 * len(heard) - 12)
    for k, m in enumerate(heard):
        draw.text((16, tops[2] + 92 * k + 40), names[m], colors[m], font, anchor="lm")
        for i, e in enumerate(stats.n_experts):
            stack(middle(i) - wide / 2, tops[2] + 92 * k, wide, 80, [spread[i][j][m] for j in range(e)], map(expert, range(e)))

    # Pathways. Each line keeps its place within the experts that it meets, so that lines run beside each other; drawn three times as large
    used, possible = len(set().union(*stats.pathways)), math.prod(stats.n_experts)
    panel(tops[3], f"Pathways of first choices: the two most used of each modality, and in grey the next of all tokens ({used:,} of "
          f"{possible:{',' if possible < 1e15 else '.0e'}} possible ones were taken)", tops[3] + most * row)
    lines = [(path, share, names[m], tuple(int(c + (255 - c) * 0.5 * i) for c in colors[m]))
             for m in heard for i, (path, share) in enumerate(stats.top(2, m))]
    lines += [(*line, "all", (200, 200, 200)) for line in stats.top(20) if line[0] not in [path for path, *_ in lines]][:10 - len(lines)]
    widths, z = [1.5 + 20 * share / sum(line[1] for line in lines) for _, share, *_ in lines], 3
    canvas = d.Image.new("RGB", (int(right - left) * z, most * row * z), "white")
    pen, gap = d.ImageDraw.Draw(canvas), min(26, 0.3 * pitch) * z / 2                    # gap: half of an expert's width
    node = lambda i, e: ((middle(i) - left) * z, (e + 0.5) * row * z)
    for i, e in enumerate(stats.n_experts):
        for x, y in (node(i, j) for j in range(e)):
            pen.rounded_rectangle((x - gap, y - 21 * z, x + gap, y + 21 * z), 8 * z, "#eeeeee")
    for k in reversed(range(len(lines))):                                          # grey first, colours above
        path, color, at = lines[k][0], lines[k][3], (sum(widths[:k]) + widths[k] / 2 - sum(widths) / 2) * z
        points = [(x + side, y + at) for x, y in (node(i, e) for i, e in enumerate(path)) for side in (-gap, gap)]
        pen.line(points, color, max(1, round(widths[k] * z)), joint="curve")
    img.paste(canvas.resize((int(right - left), most * row), d.Image.Resampling.LANCZOS), (left, tops[3]))
    for e in range(most):
        draw.text((16, tops[3] + (e + 0.5) * row), f"expert {e}", expert(e), font, anchor="lm")
    legend(tops[3], [(color, f"{share:.1%} of {what}: {('-' if n < 9 else '').join(map(str, path[:16]))}{'...' * (n > 16)}")
                     for path, share, what, color in lines])
    write_atomically(png, lambda name: img.save(name, "PNG"))


def sees_by_experts(model: CuMo) -> bool:
    return any(isinstance(m, MoE) for part in (model.vision, model.connector) if part is not None for m in part.modules())


def draw_experts(model: CuMo, tokenizer, samples: list[dict], replies: list[str], png: str, shown: list = (), batch: int = 16,
                 alone: bool = False) -> list[str]:
    """The pictures of samples and the replies to them -> the files written. Experts in the vision part: `png`, with the images `shown`
    (default: the first three) and the load over all; in the decoder: `png`, or NAME-text.png beside the other. With a process group,
    unless `alone`, samples are a process's share: the decoder's counts are added up, and process 0 draws (the vision part from all
    images)."""
    files, images = [], [image for s in samples for image in [*s["images"], *sum(s.get("video") or [], [])]]
    stats = DecoderRouting(model.config.text)
    for i in tqdm(range(0, len(samples), batch), desc="counting", leave=False, disable=RANK > 0) if stats.layers else ():
        decoder_routing(model, tokenizer, samples[i:i + batch], replies[i:i + batch], stats)
    if dist.is_initialized() and not alone:
        parts = [None] * WORLD
        dist.all_gather_object(parts, (images, stats))
        if RANK > 0:
            return []
        (images, stats), *others = parts
        for more, part in others:
            images += more
            stats.add(part)
    if has_eyes := sees_by_experts(model):
        if not images:
            raise ValueError("--routing needs at least one --image (or an evaluation with images): this model's experts are where it sees")
        draw_routing(model, list(shown) or images[:3], png, images)
        files.append(png)
    if stats.layers:
        files.append(os.path.splitext(png)[0] + "-text" + os.path.splitext(png)[1] if has_eyes else png)
        draw_decoder_routing(stats, files[-1])
    return files


def draw_curves(log_file: str, png: str):
    """The language loss of each stage (grey: every step; blue: running mean), side by side."""
    rows = {}
    with open(log_file) as f:
        for line in f:
            row = json.loads(line)
            rows.setdefault(str(row["stage"]), []).append(row.get("lm", row["loss"]))
    width, height, left, top = 330, 240, 46, 34
    img = d.Image.new("RGB", (width * len(rows), height), "white")
    draw = d.ImageDraw.Draw(img)
    for panel, (stage, losses) in enumerate(rows.items()):
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 12, top, height - 30
        losses = [l if math.isfinite(l) else 0. for l in losses]
        high = max(losses[len(losses) // 50:] or losses) * 1.05 or 1.
        at = lambda i, v: (x0 + (x1 - x0) * i / max(1, len(losses) - 1), y1 - (y1 - y0) * min(v, high) / high)
        mean, smooth = 0., []
        for i, v in enumerate(losses, 1):
            mean = 0.9 * mean + 0.1 * v
            smooth.append(mean / (1 - 0.9**i))                                    # as Adam corrects its mean
        for k in range(5):                                                         # grid, and the axis' numbers
            y = at(0, high * k / 4)[1]
            draw.line((x0, y, x1, y), "#dddddd")
            draw.text((x0 - 6, y), f"{high * k / 4:.2g}", "black", anchor="rm")
        draw.line([at(i, v) for i, v in enumerate(losses)], "#bbbbbb")
        draw.line([at(i, v) for i, v in enumerate(smooth)], "#1f5fbf", width=2)
        draw.text(((x0 + x1) / 2, 16), f"stage {stage}: loss, at the end {smooth[-1]:.3f}", "black", anchor="mm")
        draw.text(((x0 + x1) / 2, height - 14), f"{len(losses)} steps", "black", anchor="mm")
    write_atomically(png, lambda name: img.save(name, "PNG"))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/tiny", help="model folder (default: out/tiny)")
    parser.add_argument("--image", action="append", default=[], help="picture to talk about; give it again for several")
    parser.add_argument("--audio", action="append", default=[], metavar="WAV", help="sound to talk about; also several times")
    parser.add_argument("--video", action="append", nargs="+", default=[], metavar="DIR_OR_FRAME", help="video to talk about: a folder of "
                        "frames, or its frames; also several times")
    parser.add_argument("--prompt", help="question; without it, a chat")
    parser.add_argument("--routing", metavar="FILE.png", help="draw which experts took which patches of the images, or which tokens of "
                        "prompt and reply where the decoder has experts (both: also FILE-text.png); with --eval or --eval-drawn averaged "
                        "over it. --eval's answers are counted as they stand in --out, also those of earlier runs")
    parser.add_argument("--eval-drawn", type=int, metavar="N", help="ask N questions about held-out drawn scenes; a model that hears, N "
                        "also about sounds and about both")
    command = parser.add_mutually_exclusive_group()
    command.add_argument("--eval", metavar="FILE", help="answer a question file as LLaVA's: a JSON object with question_id, text and "
                         "image (a file, a list of files, or none), perhaps audio and video, a line. An interrupted run goes on where it "
                         "stopped; under torchrun every process answers its share")
    command.add_argument("--score", choices=SCORERS, help="score a file of answers: exact match, VQA accuracy (ten humans), TextVQA's "
                         "(the same, words cleaned otherwise), POPE (yes or no), multiple choice. Needs no model")
    command.add_argument("--write-drawn", nargs="+", metavar=("DIR", "N"), help="write N (default: 500) drawn questions into DIR: "
                         "questions.jsonl and images/ for --eval, and for --score one file of annotations a kind")
    parser.add_argument("--images", default="", metavar="DIR", help="of --eval: the folder below which its images lie")
    parser.add_argument("--out", metavar="FILE", help="of --eval: the answers, a JSON object a line, in the order of the questions")
    parser.add_argument("--batch", type=int, default=16, help="of --eval: questions answered together (default: 16)")
    parser.add_argument("--answers", metavar="FILE", help="of --score: what --eval wrote to --out")
    parser.add_argument("--annotations", metavar="FILE", help="of --score: the right answers, JSON or JSON lines, by question_id")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this much probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--compile", action="store_true", help="compile prefill and decoding; on CUDA as CUDA graphs. The first answers "
                        "take a minute longer, so it is for many or long ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(argv)
    if args.score:
        if not args.answers or not args.annotations:
            raise ValueError("--score needs --answers and --annotations")
        scores, extra = score(args.score, args.annotations, args.answers)
        note = f"; {extra} answers have no annotation and do not count" if extra else ""
        return print_table(scores, f"{args.answers}: {args.score}{note}")
    if args.write_drawn:
        folder, n, *more = args.write_drawn + ["500"] * (len(args.write_drawn) == 1)
        if more or not n.isdecimal() or int(n) < 1:
            raise ValueError(f"--write-drawn takes a folder and a number of questions, not {' '.join(args.write_drawn)}")
        return write_drawn(folder, int(n))
    if args.eval:
        if not args.out or args.batch < 1:
            raise ValueError("--eval needs --out, a file for the answers, and a --batch of at least 1")
        if args.routing and args.eval_drawn:
            raise ValueError("--routing averages over --eval or over --eval-drawn; ask for one of them at a time")
        questions, name = read_questions(args.eval, args.images), os.path.basename(os.path.abspath(args.model))
        if len(answered([args.out], questions, name)) == len(questions) and not args.routing:
            return print(f"{args.out} already holds all {len(questions)} answers") if RANK == 0 else None
        if WORLD > 1:
            if args.device == "cuda":
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            # Whoever is done first waits for the last: longer, perhaps, than the usual ten minutes
            dist.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=timedelta(days=1))
    model, tokenizer = load(args.model, args.device)
    if tokenizer is None:
        raise ValueError(f"{args.model}: no tokenizer.json in it, so there are no words to talk with")
    video = [frames for files in args.video for frames in d.video_files(files, "", "--video")]
    for file in sum(video, args.image + args.audio):
        if not os.path.isfile(file):
            raise ValueError(f"{file}: no such file")
    if (args.image or video) and model.vision is None:
        raise ValueError(f"{args.model} is a language model alone; it cannot see --image or --video")
    if args.audio and model.audio is None:
        raise ValueError(f"{args.model} has no ears; it cannot hear --audio")
    options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, compile=args.compile,
                   generator=torch.Generator(args.device).manual_seed(args.seed + RANK))
    given, decides, prompt = {"images": args.image, "audio": args.audio, "video": video}, any(model.config.text.n_experts), args.prompt
    talk, asked = prompt is not None or not (args.routing or args.eval_drawn or args.eval), []
    if args.routing and not decides and not sees_by_experts(model):
        raise ValueError(f"{args.model}: this model is dense: there is no routing to draw")
    if args.routing and not args.eval and not args.eval_drawn:                     # the conversation at hand
        if not any(given.values()) and not (prompt and prompt.strip() and decides):
            raise ValueError("--routing needs at least one --image (or --audio, --video or --prompt where the decoder has experts), --eval "
                             "or --eval-drawn")
        reply = None
        if decides:
            thing = ("scene" if model.config.template == "tiny" else "image") if args.image else "video" if video else "sound"
            if not (prompt and prompt.strip()):
                print("> " + (prompt := f"Describe the {thing}."))
            talk = False
            *conversation, reply = chat(model, tokenizer, args.image, prompt, args.audio, video, **options)
            given["conversations"], reply = conversation, reply["value"]
        asked = [(given, reply)]
    if args.eval_drawn:
        worlds = ["image"] * (model.vision is not None or model.audio is None) + ["sound"] * (model.audio is not None)
        for world in worlds + ["both"] * (len(worlds) == 2):
            about = {"image": "scenes", "sound": "sounds", "both": "pairs of a scene and a sound"}[world]
            scores = evaluate(model, tokenizer, args.eval_drawn, world=world, asked=asked if args.routing else None)
            print_table(scores, f"{args.model}: {args.eval_drawn} questions about held-out {about}, exact match")
    if args.eval:
        answer_file(model, tokenizer, questions, args.out, name, args.batch, **options)
        if args.routing:
            if WORLD > 1:
                dist.barrier()                                                     # process 0 has written the answers
            replies = answered([args.out], questions, name)
            asked = [(question, replies[key]["text"]) for key, question in list(questions.items())[RANK::WORLD]]
    if args.routing:
        samples, replies = ([pair[i] for pair in asked] for i in (0, 1))
        for file in draw_experts(model, tokenizer, samples, replies, args.routing, args.image, args.batch):
            print(f"wrote {file}")
    if args.eval and WORLD > 1:
        dist.destroy_process_group()
    if talk:
        chat(model, tokenizer, args.image, prompt, args.audio, video, **options)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"generate.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
