"""tests/emoji.py, on a package of made-up emoji: what is held out is never trained on, and all that is said of a picture is true."""
import json

import pytest
from PIL import Image, ImageDraw

import data
import emoji
import generate
from train import BACKBONES
from upcycle import load_backbones

FILLS = {"red": (220, 30, 30), "blue": (30, 90, 230), "yellow": (250, 210, 40), "green": (60, 170, 60), "purple": (120, 50, 190)}
SUBCATEGORIES = {"country-flag": "flag", "animal-bird": "animal", "face-tongue": "face", "food-sweet": "food", "light & video": None}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """-> a folder like the unpacked package: five things in five colours, a woman who is like nothing else, and a man who is her
    variant; a twin of the first picture; and half a picture in red, half in blue."""
    folder = tmp_path_factory.mktemp("package")
    rows, pictures = [], []

    def add(name, code, category, subcategory, *fills, hole=()):
        picture = Image.new("RGBA", (64, 64))
        draw = ImageDraw.Draw(picture)
        for i, fill in enumerate(fills):
            draw.rectangle((4, 4 + 28 * i, 60, 60), fill=fill)
        draw.rectangle(hole, fill=(0, 0, 0, 0)) if hole else None
        rows.append({"short_name": name, "name": name.upper(), "unified": code, "category": category, "subcategory": subcategory,
                     "sort_order": len(rows), "sheet_x": len(rows), "sheet_y": 0, "has_img_google": True})
        pictures.append(picture)

    holes = [(0, 0, 25, 25), (38, 0, 64, 25), (0, 38, 25, 64), (38, 38, 64, 64), (20, 20, 44, 44)]
    for i, subcategory in enumerate(SUBCATEGORIES):
        for j, (color, fill) in enumerate(FILLS.items()):
            add(f"{color} {subcategory}", f"1F{i}{j}0", "Some", subcategory, fill, hole=holes[i])
    add("woman runs", "1F3C3-200D-2640-FE0F", "People & Body", "person-activity", (250, 120, 200), hole=(0, 0, 30, 64))
    add("man runs", "1F3C3-200D-2642-FE0F", "People & Body", "person-activity", (120, 250, 200), hole=(0, 0, 64, 30))
    add("twin", "1FABC", "Some", "tool", FILLS["red"], hole=holes[0])
    add("both", "1FABD", "Some", "tool", FILLS["red"], FILLS["blue"])
    add("tone", "1F3FB", "Component", "skin-tone", FILLS["yellow"])

    sheet = Image.new("RGBA", (66 * len(rows), 66))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (66 * i + 1, 1))
    (folder / "img/google/sheets").mkdir(parents=True)
    sheet.save(folder / "img/google/sheets/64.png")
    (folder / "emoji.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def written(package, tmp_path_factory):
    """-> what tests/emoji.py writes, and which emoji each picture shows."""
    folder = tmp_path_factory.mktemp("emoji")
    shown = {}
    with pytest.MonkeyPatch.context() as patch:
        add = emoji.Pictures.add

        def add_and_note(self, e):
            path = add(self, e)
            shown[path] = e
            return path
        patch.setattr(emoji.Pictures, "add", add_and_note)
        patch.setattr("sys.argv", ["emoji.py", str(folder), str(package)])
        emoji.main()
    return folder, shown


def rows(folder, name):
    return data.read_json(folder / name)


def test_no_held_out_emoji_nor_one_like_it_is_trained_on(written):
    folder, shown = written
    trained = [shown[path] for sample in rows(folder, "train.json") for path in sample.get("image", [])]
    held_out = [shown[path] for row in rows(folder, "questions.jsonl") for path in row["image"]]
    assert trained and held_out and len({e.name for e in trained + held_out}) == 29
    assert not {e.family for e in trained} & {e.family for e in held_out}
    assert {shown[path].name for row in rows(folder, "seen.jsonl") for path in row["image"]} <= {e.name for e in trained}


def test_variants_and_twins_are_one_family_and_a_skin_tone_is_no_emoji(package):
    family = {e.name: e.family for e in emoji.read_emoji(package)}
    assert family["woman runs"] == family["man runs"] and family["twin"] == family["red country-flag"]
    assert len(set(family.values())) == 27 and "tone" not in family


def test_the_main_colour_is_that_of_most_pixels_and_two_halves_have_none(package):
    color = {e.name: e.color for e in emoji.read_emoji(package)}
    for name in FILLS:
        assert color[f"{name} animal-bird"] == name
    assert color["both"] is None
    assert emoji.color_of(Image.new("RGBA", (64, 64))) is None           # there is nothing to see


def true_answer(text, shown):
    """What is right by the names of what is shown: "red animal-bird", and so on."""
    names = [e.name for e in shown]
    kinds = [SUBCATEGORIES.get(name.split(" ", 1)[-1], "person") for name in names]
    words = text.rstrip("?").replace(",", "").split()
    if text == "What is it?":
        return names[0]
    if text == "What color is it?":
        return names[0].split()[0]
    if text == "What kind is it?":
        return kinds[0]
    if text == "Are both of one kind?":
        return "yes" if kinds[0] == kinds[1] else "no"
    if words[0] == "Which":                       # "Which is a flag, first or second?"
        assert kinds.count(words[-4]) == 1
        return "first" if kinds[0] == words[-4] else "second"
    if words[:2] == ["Is", "it"]:
        return "yes" if kinds[0] == words[-1] else "no"
    name = text.removeprefix("What kind is the ").rstrip("?")
    return SUBCATEGORIES.get(name.split(" ", 1)[-1], "person")


def test_every_answer_is_true(written):
    folder, shown = written
    said = [(row["image"], row["text"], row["answer"], row["type"])
            for name in ("questions.jsonl", "seen.jsonl") for row in rows(folder, name)]
    assert {kind for *_, kind in said} == {"name", "color", "kind", "is it", "same kind", "which", "words alone"}
    for sample in rows(folder, "train.json"):
        turns = [turn["value"].replace("<image>\n", "") for turn in sample["conversations"]]
        said += [(sample.get("image", []), text, answer, "") for text, answer in zip(turns[::2], turns[1::2])]

    for images, text, answer, _ in said:
        seen = [shown[path] for path in images]
        if not any(" " not in e.name or e.name.endswith("runs") for e in seen):
            assert true_answer(text, seen) == answer, (text, [e.name for e in seen])


def test_what_is_written_can_be_trained_on_and_asked_and_right_answers_score_in_full(written):
    folder, _ = written
    tokenizer = load_backbones(BACKBONES)[1]
    samples = data.LlavaJson(folder / "train.json", folder)
    encoded = data.Encoded(samples, tokenizer, "tiny", 48, 36, 256, strict=True)
    numbers = {len(encoded[i]["images"]) for i in range(len(encoded))}
    assert numbers == {0, 1, 2} and any(len(sample["conversations"]) == 6 for sample in samples.samples)

    for name in ("questions", "seen"):
        asked = generate.read_questions(str(folder / f"{name}.jsonl"), str(folder))
        generate.write_lines(folder / "right.jsonl",
                             [generate.row_of(sample, sample["row"]["answer"], {"model_id": "m"}) for sample in asked.values()])
        points, unused = generate.score("exact", str(folder / f"{name}.jsonl"), str(folder / "right.jsonl"))
        assert unused == 0 and all(right == of for right, of in points.values())


def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["emoji.py", str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="npm pack.*unpack it, and name its folder"):
        emoji.main()
