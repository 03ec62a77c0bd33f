"""emoji.py: 1,900 real pictures to learn from, with questions about pictures never seen.

    python tests/emoji.py DIR             fetches the pictures with npm (74 MB), and writes into DIR
    python tests/emoji.py DIR package     the same from a folder that was unpacked before

The pictures are Google's Noto Emoji, of the package emoji-datasource-google. The package says what
each is called and which kind it is of (assets/sheet.py reads it). The main colour is counted in the
pixels. What it writes:

    pictures/         each emoji on several backgrounds, 64 x 64
    train.json        samples in LLaVA's format: one picture and up to four questions, two pictures
                      and one, or a question without a picture
    questions.jsonl   questions about pictures that are in no sample, with the right answers: for
                      --eval and for --score exact of generate.py
    seen.jsonl        the same about pictures that are in the samples, drawn anew

Emoji that are alike (a woman who runs and a man who runs; the flags of Norway and of Svalbard) are
all trained on, or none of them is.
"""
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
import data
import sheet

# What a picture shows, and the package's subcategories that leave no doubt about it.
KINDS = {
    "flag": "country-flag, subdivision-flag",
    "face": "face-smiling, face-affection, face-tongue, face-hand, face-neutral-skeptical, "
            "face-sleepy, face-unwell, face-hat, face-glasses, face-concerned",
    "person": "person, person-role, person-activity, person-sport, person-gesture, person-fantasy",
    "hand": "hand-fingers-open, hand-fingers-closed, hand-fingers-partial, hand-single-finger, "
            "hands",
    "animal": "animal-mammal, animal-bird, animal-marine, animal-reptile, animal-bug, "
              "animal-amphibian",
    "plant": "plant-flower, plant-other",
    "food": "food-fruit, food-vegetable, food-prepared, food-asian, food-sweet",
    "vehicle": "transport-ground, transport-air, transport-water",
    "building": "place-building, place-religious",
    "sign": "alphanum, arrow, av-symbol, keycap, math, other-symbol, punctuation, religion, "
            "transport-sign, warning, zodiac",
}
# These are in such a subcategory, but are something else.
UNCLEAR = set("""
    anchor bricks building_construction busstop construction empty_nest feather feet fuelpump
    microbe motorway nest_with_eggs octagonal_sign oil_drum pig_nose
    railway_track ring_buoy rock roller_skate rosette rotating_light satellite seat shell
    spider_web station traffic_light vertical_traffic_light wheel wing wood""".split())

# A colour's hue in degrees, and how bright it may be, of 255. There are gaps between the colours:
# what falls into one counts for none of them.
HUES = {
    "red": (345, 370, 150, 255),
    "brown": (12, 40, 60, 160),
    "orange": (20, 36, 215, 255),
    "yellow": (42, 62, 200, 255),
    "green": (85, 165, 60, 255),
    "blue": (190, 245, 90, 255),
    "purple": (260, 290, 80, 255),
    "pink": (300, 340, 180, 255),
}

SIZE = 64  # pixels a side
TWINS = 100.0  # pictures are alike if they differ by less: the mean square of 12 x 12 pixels'
# Not parts of what an emoji shows: how it is drawn, man, woman, person, female, male, rightwards.
VARIANTS = {"FE0F", "200D", "1F468", "1F469", "1F9D1", "2640", "2642", "27A1"}


class Emoji(NamedTuple):
    """A picture, and what is known about it."""
    picture: Image.Image  # RGBA
    name: str  # "tiger face"
    kind: str | None  # one of KINDS, where there is no doubt
    color: str | None  # the main colour, where there is no doubt
    family: Any  # pictures of one family are all trained on, or all held out


# ------------------------------------------------------------------------------------------------
# 1. What is known about a picture


def read_emoji(package):
    """The unpacked package -> [Emoji, ...]. Its five skin tones alone show nothing, and are left
    out."""
    found = [(row, picture) for row, picture in sheet.read_package(package)
             if row["category"] != "Component"]
    pictures = [picture for _, picture in found]
    families = families_of([row["unified"] for row, _ in found], pictures)
    return [Emoji(picture, row["name"].lower(), kind_of(row), color_of(picture), family)
            for (row, picture), family in zip(found, families)]


def kind_of(row):
    if row["short_name"] in UNCLEAR:
        return None
    for kind, subcategories in KINDS.items():
        if row["subcategory"] in subcategories.split(", "):
            return kind
    return None


def color_of(picture):
    """The colour that two thirds of an RGBA picture's pixels have for certain, or None."""
    pixels = np.asarray(picture.convert("RGB").convert("HSV"), int)  # (64, 64, 3)
    hue, saturation, value = pixels.transpose(2, 0, 1)
    degrees = hue * 360 / 255
    solid = np.asarray(picture.getchannel("A")) > 250

    # Which pixels are of which colour for certain?
    pale = saturation < 40
    found = {"black": value < 70, "white": pale & (value > 225),
             "gray": pale & (value > 100) & (value < 200)}
    for color, (first, last, darkest, brightest) in HUES.items():
        # Red is on both sides of 0 degrees.
        between = ((degrees >= first) & (degrees <= last)) | (degrees <= last - 360)
        bright = (value >= darkest) & (value <= brightest)
        found[color] = between & bright & (saturation > 90)

    counts = {color: (pixels & solid).sum() for color, pixels in found.items()}
    most = max(counts, key=counts.get)
    return most if counts[most] > 2 / 3 * solid.sum() else None


def families_of(codes, pictures):
    """Code points ("1F3C3-200D-2640-FE0F") and pictures -> the family of each, as any value."""
    # 1. What differs by man or woman alone is one family.
    families = [tuple(part for part in code.split("-") if part not in VARIANTS) for code in codes]

    # 2. So are pictures that look alike.
    twins = np.triu(sheet.distances(pictures) < TWINS)
    for one, other in zip(*np.nonzero(twins)):
        joined, gone = families[one], families[other]
        families = [joined if family == gone else family for family in families]
    return families


def split(emoji, seed=0, share=0.2):
    """-> those to train on, and those that are held out: whole families, a fifth of the emoji."""
    families = sorted({e.family for e in emoji})
    random.Random(seed).shuffle(families)
    sizes = Counter(e.family for e in emoji)
    held_out = set()
    while sum(sizes[family] for family in held_out) < share * len(emoji):
        held_out.add(families.pop())
    return ([e for e in emoji if e.family not in held_out],
            [e for e in emoji if e.family in held_out])


# ------------------------------------------------------------------------------------------------
# 2. Questions. Each is (type, text, right answer).


def with_article(kind):
    if kind == "food":
        return kind
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def ask_about_one(e, rng):
    """All questions about one emoji; the first is about its name."""
    questions = [("name", "What is it?", e.name)]
    if e.color:
        questions.append(("color", "What color is it?", e.color))
    if e.kind:
        questions.append(("kind", "What kind is it?", e.kind))
        # Half of the answers are yes.
        asked = e.kind
        if rng.random() < 0.5:
            asked = rng.choice([kind for kind in KINDS if kind != e.kind])
        answer = "yes" if asked == e.kind else "no"
        questions.append(("is it", f"Is it {with_article(asked)}?", answer))
    return questions


def ask_about_two(emoji, rng):
    """Two emoji, and a question about both."""
    known = [e for e in emoji if e.kind]
    one = rng.choice(known)
    same = [e for e in known if e.kind == one.kind and e is not one]
    others = [e for e in known if e.kind != one.kind]

    if rng.random() < 0.5:
        # An emoji that is the only one of its kind has no answer yes.
        answer = rng.choice(["yes", "no"]) if same else "no"
        other = rng.choice(same if answer == "yes" else others)
        return one, other, ("same kind", "Are both of one kind?", answer)

    other = rng.choice(others)
    answer = rng.choice(["first", "second"])
    asked = one if answer == "first" else other
    return one, other, ("which", f"Which is {with_article(asked.kind)}, first or second?", answer)


def ask_without_picture(emoji, rng):
    e = rng.choice([e for e in emoji if e.kind])
    return "words alone", f"What kind is the {e.name}?", e.kind


# ------------------------------------------------------------------------------------------------
# 3. Files


def draw(picture, rng):
    """An RGBA picture on a background, as an RGB image. Size, place, angle and background vary."""
    side = rng.randrange(SIZE * 2 // 3, SIZE + 1)
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    page = data.greyish_image(SIZE, 235, rng)
    at = (rng.randrange(SIZE - side + 1), rng.randrange(SIZE - side + 1))
    page.paste(picture, at, mask=picture.getchannel("A"))
    return page


class Pictures:
    """Draws pictures into a folder, and numbers them."""

    def __init__(self, folder, seed):
        os.makedirs(folder / "pictures", exist_ok=True)
        self.folder = folder
        self.rng = random.Random(seed)
        self.n = 0

    def add(self, e):
        """-> the path of a new picture of an emoji, below the folder."""
        path = f"pictures/{self.n:05}.png"
        draw(e.picture, self.rng).save(self.folder / path)
        self.n += 1
        return path


def make_samples(emoji, pictures, rng, views=4):
    """Samples in LLaVA's format. Each emoji is drawn in `views` ways, each with its questions."""
    samples = []

    def add(images, questions):
        turns = data.as_turns([(text, answer) for _, text, answer in questions],
                              "<image>\n" * len(images))
        sample = {"id": len(samples), "image": images, "conversations": turns}
        samples.append({name: value for name, value in sample.items() if value != []})

    # 1. Of an emoji's views only the first asks for its name. Names are long, so they would be most
    # of what is learnt, and a name that was learnt says nothing of other pictures.
    for e in emoji:
        for view in range(views):
            questions = ask_about_one(e, rng)[min(view, 1):]
            rng.shuffle(questions)
            if questions:
                add([pictures.add(e)], questions)

    # 2. Pairs, and words alone.
    for _ in range(len(emoji) // 2):
        one, other, question = ask_about_two(emoji, rng)
        add([pictures.add(one), pictures.add(other)], [question])
    for _ in range(len(emoji) // 2):
        add([], [ask_without_picture(emoji, rng)])
    return samples


def make_questions(emoji, pictures, rng, n=200):
    """Rows of a question file that hold the right answers, too: up to n of each type."""
    # 1. Each emoji's questions, and then as many about pairs and about words as are wanted.
    asked = []
    for e in emoji:
        asked += [([e], question) for question in ask_about_one(e, rng)]
    rng.shuffle(asked)
    for _ in range(2 * n):
        one, other, question = ask_about_two(emoji, rng)
        asked.append(([one, other], question))
    asked += [([], ask_without_picture(emoji, rng)) for _ in range(n)]

    # 2. Draw what is kept.
    rows = []
    counts = Counter()
    for shown, (kind, text, answer) in asked:
        counts[kind] += 1
        if counts[kind] <= n:
            image = [pictures.add(e) for e in shown]
            rows.append({"question_id": len(rows), "image": image, "text": text,
                         "answer": answer, "type": kind})
    return sorted(rows, key=lambda row: row["type"])


def print_majorities(title, rows):
    """What is right if one says the same to all questions of a type?"""
    print(f"\n{title}: type, questions, the most frequent answer and its share")
    for kind in sorted({row["type"] for row in rows}):
        answers = [row["answer"] for row in rows if row["type"] == kind]
        (answer, count), = Counter(answers).most_common(1)
        print(f"{kind:>12} {len(answers):>5}   {answer} {count / len(answers):.1%}")


def fetch(folder):
    """The package by npm -> the folder that it was unpacked into."""
    try:
        subprocess.run(["npm", "pack", "emoji-datasource-google@16.0.0"], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as e:
        sys.exit(f"npm pack emoji-datasource-google: {e}; get the package in another way, unpack "
                 "it, and name its folder behind DIR")
    subprocess.run(["tar", "xzf", "emoji-datasource-google-16.0.0.tgz"], cwd=folder, check=True)
    return folder / "package"


def main():
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    package = sys.argv[2] if len(sys.argv) == 3 else fetch(folder)

    train, held_out = split(read_emoji(package))
    pictures = Pictures(folder, seed=1)
    samples = make_samples(train, pictures, random.Random(2))
    (folder / "train.json").write_text(json.dumps(samples))
    print(f"{folder}/train.json: {len(samples)} samples of {len(train)} emoji; "
          f"{len(held_out)} others are held out")

    for name, asked, seed in (("questions", held_out, 3), ("seen", train, 4)):
        rows = make_questions(asked, pictures, random.Random(seed))
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print_majorities(file, rows)


if __name__ == "__main__":
    main()
