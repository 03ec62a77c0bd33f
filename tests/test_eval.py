"""generate.py's question files: answers that do not depend on how the work was cut, runs that go on, and scores worked out by hand."""
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import data as d
import generate
from model import Config, CuMo
from upcycle import save
from test_generate import ROOT, build, picture


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model of random, loud weights ("tiny"), images (0.png ...) and questions of many lengths (questions.jsonl)."""
    path = tmp_path_factory.mktemp("world")
    tokenizer = d.train_tokenizer([t["value"] for s in d.Drawn("chat", 50) for t in s["conversations"]], 320)
    save(build(tokenizer.get_vocab_size()), str(path / "tiny"), tokenizer)
    save(CuMo(Config(vision=None, text=dict(vocab_size=tokenizer.get_vocab_size(), dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48),
                     template="tiny")), str(path / "blind"), tokenizer)
    for i in range(4):
        picture(i).save(path / f"{i}.png")
    write(path / "questions.jsonl", [
        {"question_id": 7, "image": "0.png", "text": "What color is the ring?"},
        {"question_id": "b", "text": "Why?"},
        {"question_id": 3, "image": ["1.png", "2.png"], "text": "The same? é猫"},
        {"question_id": 4, "image": "3.png", "text": "Where is the star? " * 6},
        {"question_id": 50, "image": ["2.png", "1.png"], "text": "Is <image> below <image> or not?"},
        {"question_id": 6, "image": "1.png", "text": "Is there a red circle below the blue one, or are there two?"},
        {"question_id": 1, "image": [], "text": "Where is the sign? " * 3},
        {"question_id": 8, "image": "2.png", "text": "Who?"}])
    return path


def flags(world, out, *more):
    return ["--model", str(world / "tiny"), "--eval", str(world / "questions.jsonl"), "--images", str(world), "--out", str(out),
            "--device", "cpu", "--max-new-tokens", "6", *map(str, more)]


@pytest.fixture(scope="module")
def alone(world):
    """The bytes of the answers given one at a time."""
    generate.main(flags(world, world / "alone.jsonl", "--batch", 1))
    return (world / "alone.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_answers_stand_in_the_order_of_the_questions_and_are_those_of_answer(world, alone):
    questions = read(world / "questions.jsonl")
    rows = [json.loads(line) for line in alone.decode().splitlines()]
    assert [(r["question_id"], r["prompt"]) for r in rows] == [(q["question_id"], q["text"]) for q in questions]
    assert all(set(r) - {"image"} == {"question_id", "prompt", "text", "model_id", "metadata"} and r["model_id"] == "tiny" for r in rows)
    assert [r.get("image") for r in rows] == [q.get("image") or None for q in questions]         # POPE's labels are found by it
    model, tokenizer = generate.load(str(world / "tiny"))
    ask = lambda text, *images: generate.answer(model, tokenizer, [{"images": images, "conversations": [{"from": "human", "value": text}]}],
                                                max_new_tokens=6)[0]
    two = [picture(1), picture(2)]
    assert rows[0]["text"] == ask("<image>\nWhat color is the ring?", picture(0)) and rows[1]["text"] == ask("Why?")
    assert rows[2]["text"] == ask("<image>\n<image>\nThe same? é猫", *two)
    assert rows[4]["text"] == ask("Is <image> below <image> or not?", *two[::-1])
    assert len({r["text"] for r in rows}) > 5


@pytest.mark.parametrize("batch", [3, 16])
def test_a_batch_of_any_size_gives_the_answers_given_one_at_a_time(batch, world, alone, tmp_path):
    generate.main(flags(world, tmp_path / "new" / "a.jsonl", "--batch", batch))
    assert (tmp_path / "new" / "a.jsonl").read_bytes() == alone and [p.name for p in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_a_json_list_of_questions_is_the_same_as_its_lines(world, alone, tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(read(world / "questions.jsonl"), indent=1))
    generate.main(flags(world, tmp_path / "a.jsonl", "--eval", tmp_path / "q.json"))
    assert (tmp_path / "a.jsonl").read_bytes() == alone


def test_two_processes_go_on_from_the_parts_of_three_and_give_the_answers_of_one(world, alone, tmp_path):
    out, lines = tmp_path / "a.jsonl", alone.decode().splitlines()
    kept = {**json.loads(lines[3]), "text": "kept"}                                # not asked again, so this text must come out
    (tmp_path / "a.jsonl.part-1-of-3").write_text(json.dumps(kept) + "\n" + lines[4][:40])
    (tmp_path / "a.jsonl.part-0-of-2").write_text(lines[0][:-9])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "generate.py")]
    run = subprocess.Popen([*launch, *flags(world, out, "--batch", 2)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        shown, errors = run.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == 0, errors
    assert read(out) == [kept if i == 3 else json.loads(line) for i, line in enumerate(lines)]
    assert shown.count("wrote 8 answers") == 1 and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_stopped_run_goes_on_and_asks_only_what_is_missing(cut, world, alone, tmp_path, monkeypatch, capsys):
    out, part, asked, real, loaded = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part-0-of-1", [], generate.answer, generate.load

    def once(model, tokenizer, samples, **options):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(s["row"]["question_id"] for s in samples)
        return real(model, tokenizer, samples, **options)
    monkeypatch.setattr(generate, "answer", once)
    with pytest.raises(KeyboardInterrupt):
        generate.main(flags(world, out, "--batch", 2))
    assert "goes on" in capsys.readouterr().err and not out.exists() and len(read(part)) == 4
    if cut:                                                                        # 1 takes only the newline: that answer is whole
        os.truncate(part, part.stat().st_size - cut)
    lost, first = [asked[3]] if cut == 30 else [], list(asked)
    monkeypatch.setattr(generate, "answer", lambda m, t, samples, **o: asked.extend(s["row"]["question_id"] for s in samples)
                        or real(m, t, samples, **o))
    generate.main(flags(world, out, "--batch", 3))
    assert out.read_bytes() == alone and not part.exists()
    assert sorted(map(str, asked[4:])) == sorted(map(str, {7, "b", 3, 4, 50, 6, 1, 8} - set(first) | set(lost)))

    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("loaded a model to do nothing"))
    generate.main(flags(world, out))
    assert "already holds all 8" in capsys.readouterr().out and out.read_bytes() == alone
    monkeypatch.setattr(generate, "load", loaded)
    out.write_bytes(b"".join(alone.splitlines(keepends=True)[2:]))                 # questions were added to the file since
    del asked[:]
    generate.main(flags(world, out))
    assert set(asked) == {7, "b"} and out.read_bytes() == alone


def test_a_finished_file_stops_nothing_else_that_was_asked(world, alone, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(alone)
    generate.main(flags(world, tmp_path / "a.jsonl"))
    assert "already holds all 8 answers" in capsys.readouterr().out
    generate.main(flags(world, tmp_path / "a.jsonl", "--prompt", "Why?"))
    assert "already holds" not in capsys.readouterr().out and (tmp_path / "a.jsonl").read_bytes() == alone


def test_what_only_looks_like_a_part_is_left_alone(world, alone, tmp_path):
    other = tmp_path / "a.jsonl.part-0-of-1.bak"
    other.write_text("mine\n")
    generate.main(flags(world, tmp_path / "a.jsonl"))
    assert (tmp_path / "a.jsonl").read_bytes() == alone and other.read_text() == "mine\n"


def test_ctrl_c_ends_the_program_with_130(world, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(d, "encode_chat", stop)
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags(world, tmp_path / "a.jsonl")])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(generate.__file__, run_name="__main__")
    assert e.value.code == 130


def test_images_are_read_batch_by_batch(world, alone, tmp_path, monkeypatch):
    most, real = [], generate.sense

    def sense(model, samples):
        texts, senses = real(model, samples)
        most.append(len(senses.get("images", ())))
        return texts, senses
    monkeypatch.setattr(generate, "sense", sense)
    generate.main(flags(world, tmp_path / "a.jsonl", "--batch", 2))
    assert max(most) <= 4 and sum(most) == 8


GOOD = '{"question_id": 1, "image": "0.png", "text": "What?"}\n'


@pytest.mark.parametrize("text, message", [
    (GOOD + '{"question_id": 2, "text": \n', "q.jsonl.*line 2"), ('[{"question_id": 1,\n "text" "x"}]', "q.jsonl.*line 2"),
    (GOOD + '{"text": "x"}\n', "row 2.*question_id"), ('{"text": "x"}\n', "row 1.*question_id"),
    ('{"question_id": 1, "image": "0.png"}', "row 1.*text"),
    ('{"question_id": 1, "text": 5}', "row 1.*text"), ("[1, 2]", "row 1.*object"), (GOOD + GOOD, "question_id 1 comes twice"),
    ('{"question_id": 1, "text": "x"}\n{"question_id": "1", "text": "x"}', "comes twice"), ("", "q.jsonl"),
    ('{"question_id": 1, "image": "gone.png", "text": "x"}', "gone.png"),
    ('{"question_id": 1, "image": ["0.png", "gone.png"], "text": "x"}', "gone.png"),
    ('{"question_id": 1, "image": 5, "text": "x"}', "image"), ('{"question_id": 1, "image": [5], "text": "x"}', "image"),
    ('{"question_id": 1, "image": "0.png", "text": "<image> or <image>"}', "2 <image>.*1 images"),
    ('{"question_id": 1, "image": ["0.png", "1.png"], "text": "<image>?"}', "1 <image>.*2 images"),
    ('{"question_id": 1, "text": "<image>?"}', "1 <image>.*0 images"), ('{"question_id": 1, "image": "bad.png", "text": "x"}', "bad.png")])
def test_a_bad_question_file_is_a_value_error_that_names_the_place(text, message, world, tmp_path):
    (world / "bad.png").write_text("no picture")
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        generate.main(flags(world, tmp_path / "a.jsonl", "--eval", tmp_path / "q.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


def test_missing_files_and_flags_are_value_errors_in_words(world, tmp_path):
    write(world / "exact.jsonl", [{"question_id": 1, "answer": "x"}])
    questions = str(world / "questions.jsonl")
    for argv, message in ((["--eval", questions], "--out"), (flags(world, tmp_path / "a", "--batch", 0), "--batch"),
                          (flags(world, tmp_path / "a", "--eval", "gone.jsonl"), "gone.jsonl"),
                          (flags(world, tmp_path / "a", "--model", world / "blind"), "blind.*cannot see"),
                          (["--score", "exact", "--answers", "a"], "--annotations"),
                          (["--score", "vqa", "--annotations", "a"], "--answers"),
                          (["--score", "vqa", "--answers", "gone", "--annotations", questions], "row 1.*answers"),
                          (["--score", "exact", "--answers", "gone", "--annotations", str(world / "exact.jsonl")], "gone"),
                          (["--write-drawn", str(tmp_path / "d"), "x"], "number"), (["--write-drawn", str(tmp_path / "d"), "0"], "number")):
        with pytest.raises(ValueError, match=message):
            generate.main(argv)


@pytest.mark.parametrize("where", ["a.jsonl", "a.jsonl.part-0-of-4"])
@pytest.mark.parametrize("change", [{"question_id": 99}, {"prompt": "Another?"}, {"model_id": "another"}])
def test_answers_of_other_questions_or_models_are_not_touched(where, change, world, alone, tmp_path):
    lines = alone.decode().splitlines()
    write(tmp_path / where, [json.loads(lines[0]), {**json.loads(lines[1]), **change}])
    before = (tmp_path / where).read_bytes()
    with pytest.raises(ValueError, match=f"{where}.*choose another --out"):
        generate.main(flags(world, tmp_path / "a.jsonl"))
    assert (tmp_path / where).read_bytes() == before


@pytest.mark.parametrize("where", ["a.jsonl", "a.jsonl.part-0-of-4"])
@pytest.mark.parametrize("more", [["--max-new-tokens", 3], ["--temperature", 0.5], ["--template", "vicuna"], "weights"])
def test_answers_that_were_made_otherwise_are_not_mixed_in(where, more, world, alone, tmp_path):
    (tmp_path / where).write_bytes(alone)
    if more == "weights":                                                          # trained on, in the same folder
        model = shutil.copytree(world / "tiny", tmp_path / "x" / "tiny")
        weights = load_file(model / "model.safetensors")
        next(w for name, w in weights.items() if name.startswith("connector"))[:] += 1
        save_file(weights, model / "model.safetensors")
        more = ["--model", model]
    with pytest.raises(ValueError, match=f"{where} holds answers that were made otherwise.*choose another --out"):
        generate.main(flags(world, tmp_path / "a.jsonl", *more))
    assert (tmp_path / where).read_bytes() == alone


@pytest.mark.parametrize("text", ["my notes\n", '{"question_id": 7', "[]\n"])
def test_a_file_that_holds_no_answers_is_not_overwritten(text, world, tmp_path):
    (tmp_path / "notes.txt").write_text(text)
    with pytest.raises(ValueError, match="choose another --out"):
        generate.main(flags(world, tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == text


@pytest.fixture
def echo(monkeypatch):
    """answer(), but quick: it reads the pictures as ever, and says the question again."""
    def answer(model, tokenizer, samples, **_):
        generate.sense(model, samples)
        return [sample["row"]["text"] for sample in samples]
    monkeypatch.setattr(generate, "answer", answer)


def test_two_questions_with_one_id_are_both_answered_and_the_run_goes_on(world, tmp_path, echo):
    rows = [{"question_id": "OCR/0.png", "image": "0.png", "text": text} for text in ("Is it red?", "Is it blue?")]     # as MME's
    questions, out = write(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    write(tmp_path / "a.jsonl.part-0-of-1", [{"question_id": "OCR/0.png", "prompt": "Is it blue?", "text": "kept", "model_id": "tiny"}])
    generate.main(flags(world, out, "--eval", questions))
    assert [(r["prompt"], r["text"]) for r in read(out)] == [("Is it red?", "Is it red?"), ("Is it blue?", "kept")]


def test_llavas_scienceqa_file_is_asked_with_what_the_human_says_and_a_suffix(world, tmp_path, echo):
    turns = lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "B"}]
    rows = [{"id": "4", "conversations": turns("Which?\nA. cat\nB. dog")},
            {"id": "5", "image": "0.png", "conversations": turns("<image>\nContext: x\nA. cat\nB. dog")}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    generate.main(flags(world, tmp_path / "a.jsonl", "--eval", tmp_path / "q.json", "--suffix", "The letter, please."))
    assert [(r["question_id"], r["prompt"]) for r in read(tmp_path / "a.jsonl")] == [
        ("4", "Which?\nA. cat\nB. dog\nThe letter, please."), ("5", "Context: x\nA. cat\nB. dog\nThe letter, please.")]
    asked = generate.read_questions(str(tmp_path / "q.json"), str(world))
    assert [q["conversations"][0]["value"] for q in asked.values()] == [row["conversations"][0]["value"] for row in rows]


def test_a_broken_picture_is_reported_and_left_out_and_asked_again_when_it_is_whole(world, tmp_path, echo, capsys):
    for name in ("good", "cut"):
        picture(0).save(tmp_path / f"{name}.png")
    os.truncate(tmp_path / "cut.png", 300)
    questions = [{"question_id": i, "image": "cut.png" if i == 3 else "good.png", "text": f"What, {i}?"} for i in range(6)]
    file, out = write(tmp_path / "q.jsonl", questions), tmp_path / "a.jsonl"
    argv = flags(world, out, "--eval", file, "--images", tmp_path, "--batch", 4)
    for _ in range(2):                                                             # once more, and it is still broken
        generate.main(argv)
        shown = capsys.readouterr()
        assert "question 3" in shown.err and "cut.png" in shown.err and "1 of 6 questions could not be answered" in shown.out
        assert [r["question_id"] for r in read(out)] == [0, 1, 2, 4, 5] and not list(tmp_path.glob("*part*"))

    right = write(tmp_path / "exact.jsonl", [{"question_id": i, "answer": f"What, {i}?"} for i in range(6)])
    with pytest.raises(ValueError, match="1 of 6.*'3'.*--allow-missing"):
        generate.main(["--score", "exact", "--answers", str(out), "--annotations", right])
    generate.main(["--score", "exact", "--answers", str(out), "--annotations", right, "--allow-missing"])
    assert "5 of     5" in capsys.readouterr().out

    picture(0).save(tmp_path / "cut.png")
    generate.main(argv)
    assert "could not" not in capsys.readouterr().out and [r["question_id"] for r in read(out)] == list(range(6))


def test_when_a_hundred_questions_in_a_row_fail_the_run_ends(world, tmp_path, monkeypatch):
    questions = write(tmp_path / "q.jsonl", [{"question_id": i, "text": "What?"} for i in range(300)])
    asked = []

    def fail(model, tokenizer, samples, **_):
        asked.extend(s["row"]["question_id"] for s in samples)
        raise ValueError("the logits are NaN")
    monkeypatch.setattr(generate, "answer", fail)
    with pytest.raises(ValueError, match="100 questions in a row.*NaN"):
        generate.main(flags(world, tmp_path / "a.jsonl", "--eval", questions))
    assert len(set(asked)) < 120 and not (tmp_path / "a.jsonl").exists()


DEEP = '{"question_id": 1, "text": ' + "[" * 1000 + "]" * 1000 + "}"


@pytest.mark.parametrize("text, message", [
    ('{"annotations": 5}', "row 1"), ('{\n"annotations": 5}', "row 1"), ('{"annotations": []}', "no rows"), ("{}", "row 1"), ("5", "row 1"),
    (DEEP, "too deeply"), (GOOD + DEEP, "line 2 on.*too deeply"), ("[" * 1000 + "]" * 1000, "too deeply"),
    ('{"question_id": ' + "1" * 5000 + "}", "number is too long"),
    ('{"question_id": 1, "text": "half \\ud83d"}', "row 1: half a character")])
def test_json_of_another_kind_is_a_value_error_in_every_file(text, message, world, tmp_path):
    (tmp_path / "x.json").write_text(text)
    file, good = str(tmp_path / "x.json"), write(tmp_path / "good.jsonl", [{"question_id": 1, "text": "x", "answer": "x"}])
    for argv in (flags(world, tmp_path / "a.jsonl", "--eval", file), ["--score", "exact", "--answers", file, "--annotations", good],
                 ["--score", "exact", "--answers", good, "--annotations", file]):
        with pytest.raises(ValueError, match=message):
            generate.main(argv)


def test_files_may_begin_with_a_byte_order_mark(world, tmp_path):
    for text in (GOOD, GOOD + GOOD.replace("1", "2"), f"[{GOOD}]", '{"annotations": [' + GOOD + "]}", '{"1": {"text": "What?"}}'):
        (tmp_path / "x.json").write_text("\ufeff" + text, encoding="utf-8")
        assert generate.read_rows(str(tmp_path / "x.json"), "text", str)[0]["text"] == "What?"


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_all(kind, annotations, replies):
    """Annotations {id: row} and replies {id: text} -> {name: [points, possible]}."""
    return generate.sum_points(kind, [({"question_id": key, **row}, replies[key]) for key, row in annotations.items()])


def test_exact_match_counts_by_type_and_takes_any_of_several_answers():
    annotations = {"1": {"answer": "red", "type": "color"}, "2": {"answer": ["two", "2"], "type": "count"},
                   "3": {"answer": "blue ", "type": "color"}, "4": {"answer": 3}}
    replies = {"1": " red\n", "2": "2", "3": "Blue", "4": "3"}                     # "Blue" is not "blue": exact is exact
    assert score_all("exact", annotations, replies) == {"accuracy": [3, 4], "color": [1, 2], "count": [1, 1]}


@pytest.mark.parametrize("text, form", [
    ("The two  dogs.", "2 dogs"), ("None", "0"), ("Ten", "10"), ("a an The", ""), (" what\ttime\n", "what time"),
    ("dont", "don't"), ("DONT", "don't"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("yalld've", "yalld've"),
    ("Im", "im"), ("lets", "lets"), ("it's", "it's"), ("twas", "'twas"), ("ow's'at", "'ow's'at"),
    ("left-hand", "left hand"), ("left - hand", "left hand"), ("left -hand-side", "left handside"),      # one minus at a blank: all go
    ("red/blue, green", "red blue green"), ("1,000", "1000"), ("1,000-2", "10002"), ("1, 2", "1 2"), ("x,y", "x y"),
    ("u.s.a.", "usa"), ("3.5", "3.5"), ("5.", "5"), (".5", ".5"), ("10:30", "10:30"), ('the "STOP" sign!', "stop sign"),
    ("#1 @home", "#1 home")])
def test_normal_form_of_an_answer_is_that_of_the_vqa_evaluation(text, form):
    assert generate.normalise(text) == form


def humans(**counts):
    return {"answers": [{"answer": text} for text, n in counts.items() for _ in range(n)]}


@pytest.mark.parametrize("scorer", ["vqa", "textvqa"])
@pytest.mark.parametrize("agree, points", [
    (0, 0),
    (1, Fraction(3, 10)),      # leave out who agrees: 0 of 9, 0 points; leave out one of the other nine: 1/3 each. 9 * 1/3 / 10
    (2, Fraction(6, 10)),      # twice 1/3, eight times 2/3: (2/3 + 16/3) / 10
    (3, Fraction(9, 10)),      # three times 2/3, seven times 1: (2 + 7) / 10
    (4, 1), (7, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_ten_times_nine_humans(scorer, agree, points):
    row = humans(blue=agree, red=10 - agree)
    for answers in (row["answers"], [h["answer"] for h in row["answers"]]):        # VQA v2 writes objects, TextVQA plain texts
        assert score_all(scorer, {"1": {"answers": answers}}, {"1": "blue"}) == {"accuracy": [pytest.approx(float(points)), 1]}


def test_vqa_normalises_only_where_humans_differ_and_textvqa_always():
    agreed, differ = {"1": humans(yes=10)}, {"1": humans(yes=9, Yeah=1)}
    assert score_all("vqa", agreed, {"1": "Yes."})["accuracy"] == [0, 1] != score_all("vqa", agreed, {"1": " yes\n"})["accuracy"]
    assert score_all("vqa", differ, {"1": "Yes."})["accuracy"] == [1, 1] == score_all("textvqa", agreed, {"1": "Yes."})["accuracy"]
    assert score_all("vqa", {"1": humans(two=2, **{"2": 2, "Two.": 6})}, {"1": "the two"})["accuracy"] == [1, 1]


def test_vqa_as_llava_hands_it_in_cleans_the_reply_and_never_the_humans():
    agreed = {"1": humans(yes=10), "2": humans(**{"2": 10}), "3": humans(Red=10)}
    said = {"1": "Yes.", "2": "Two", "3": "Red"}
    assert score_all("vqa", agreed, said)["accuracy"] == [1, 3] and score_all("vqa-llava", agreed, said)["accuracy"] == [2, 3]


def test_gqa_takes_a_reply_without_capitals_and_its_last_period():
    rows = {str(i): {"answer": answer} for i, answer in enumerate(["no", "left", "tv.", "No"])}
    assert score_all("gqa", rows, {"0": "No.", "1": " Left\n", "2": "tv.", "3": "No"})["accuracy"] == [2, 4]


def test_scienceqas_questions_with_an_image_have_a_number_of_their_own():
    rows = {"1": {"answer": 0, "choices": ["a", "b"], "image": "image.png"}, "2": {"answer": 0, "choices": ["a", "b"], "image": None}}
    assert score_all("choice", rows, {"1": "B", "2": "A"}) == {"accuracy": [1, 2], "unparsed": [0, 2], "with an image": [0, 1]}


def test_textvqa_drops_commas_and_question_marks_and_parts_the_s():
    both = lambda said, reply: [score_all(scorer, {"1": {"answers": [said] * 9 + ["else"]}}, {"1": reply})["accuracy"][0]
                                for scorer in ("vqa", "textvqa")]
    assert both("joe's", "joe 's") == [0, 1] and both("joe's", "Joe's") == [1, 1]
    assert both("x,y", "xy") == [0, 1] and both("x,y", "x y") == [1, 0]            # VQA v2: a blank; m4c: nothing
    assert both("why?not", "whynot") == [0, 1]


def test_vqa_sums_by_answer_type_and_wants_ten_humans():
    annotations = {"1": {**humans(red=8, blue=2), "answer_type": "other"}, "2": {**humans(yes=10), "answer_type": "yes/no"},
                   "3": {**humans(red=10), "answer_type": "other"}}
    scores = score_all("vqa", annotations, {"1": "blue", "2": "yes", "3": "blue"})
    assert scores == {"accuracy": [pytest.approx(1.6), 3], "other": [pytest.approx(0.6), 2], "yes/no": [1, 1]}
    for answers in (["red"] * 9, ["red"] * 9 + [5], [{"text": "red"}] * 10):
        with pytest.raises(ValueError, match="'1'.*ten"):
            score_all("vqa", {"1": {"answers": answers}}, {"1": "red"})


def test_pope_reads_yes_and_no_as_llava_and_counts_them():
    cases = [("Yes, there is.", "yes"), ("Yes. No doubt.", "yes"),                 # TP, TP: the second sentence is not read
             ("No, there is none.", "yes"),                                        # FN
             ("There is not, I think.", "no"), ("no", "no"),                       # TN, TN
             ("I see a cat", "no"), ("nothing", "no")]                             # FP, FP: what says no "no" is a yes
    annotations, replies = ({str(i): f(case) for i, case in enumerate(cases)} for f in (lambda c: {"label": c[1]}, lambda c: c[0]))
    assert score_all("pope", annotations, replies) == {
        "accuracy": [4, 7], "precision": [2, 4], "recall": [2, 3], "F1": [4, 7],   # F1 = 2 p r / (p + r) = (2/3) / (7/6) = 4/7
        "yes ratio": [4, 7], "TP": [2, 7], "FP": [2, 7], "TN": [2, 7], "FN": [1, 7]}
    never = score_all("pope", annotations, dict.fromkeys(annotations, "no"))
    assert never["precision"] == [0, 0] and never["recall"] == [0, 3] and never["F1"] == [0, 3]
    generate.print_table(never, "no zero division")


@pytest.mark.parametrize("reply, index", [
    ("A", 0), ("B.", 1), ("(C)", 2), ("(C).", 2), ("B. dog", 1), ("(B) a dog", 1), (" D\n", 3), ("The answer is B.", 1),
    ("Dogs bark. The answer is (C).", 2), ("so the answer is A", 0), ("A. The answer is B.", 0), ("dog", 1), ("Dog.", 1),
    ("E", None), ("(F)", None), ("b", None), ("A dog", None), ("dogs", None), ("", None), ("cat or dog", None),
    ("B)", 1), ("B) dog", 1), ("B:", 1), ("(B): dog", 1), ("**B**", 1), ("**B.** dog", 1), ("Answer: B", 1), ("**Answer:** (B)", 1),
    ("The correct answer is B.", 1), ("B. The dog's answer: woof", 1), ("B\n\nIt barks.", 1), ("It barks.\nAnswer: dog", 1), ("Answer: A dog", None), ("B-side", None),
    ("The answer is Apples.", None), ("The answer is A. The answer is B.", None), ("twin", None), ("The answer is E.", None)])
def test_a_choice_is_a_letter_or_the_text_of_exactly_one_option(reply, index):
    assert generate.choice_of(reply, ["cat", "dog", "bird", "fish."]) == index
    assert generate.choice_of(reply, ["cat", "dog", "twin", "Twin"]) == index


def test_choices_are_scored_by_letter_or_index_and_unparsed_replies_are_wrong():
    row = lambda answer: {"answer": answer, "choices": ["cat", "dog"]}
    scores = score_all("choice", {"1": row("B"), "2": row(0), "3": row(1), "4": row("A")},
                                   {"1": "dog", "2": "A.", "3": "A", "4": "who knows"})
    assert scores == {"accuracy": [2, 4], "unparsed": [1, 4]}
    for answer in ("C", 2, -1, None, "AB"):
        with pytest.raises(ValueError, match="'1'.*choices"):
            score_all("choice", {"1": row(answer)}, {"1": "A"})


def test_annotations_are_understood_in_the_layouts_of_their_benchmarks(tmp_path):
    rows = [{"question_id": i, "answers": humans(red=10)["answers"], "answer": "red"} for i in (1, 2)]
    answers = write(tmp_path / "a.jsonl", [{"question_id": str(i), "text": "red"} for i in (2, 1)])
    for name, content in (("lines", "\n".join(map(json.dumps, rows))), ("list", json.dumps(rows, indent=1)),
                          ("vqa", json.dumps({"annotations": rows})), ("textvqa", json.dumps({"data": rows})),
                          ("ids", json.dumps({str(r.pop("question_id")): r for r in json.loads(json.dumps(rows))}))):
        (tmp_path / name).write_text(content)
        for kind in ("exact", "vqa", "textvqa"):
            assert generate.score(kind, str(tmp_path / name), answers) == ({"accuracy": [2, 2]}, 0)


def test_scienceqa_problems_of_other_splits_are_left_out(tmp_path):
    problems = {"10": {"answer": 1, "choices": ["x", "y"], "split": "test"}, "11": {"answer": 0, "choices": ["x", "y"], "split": "train"},
                "12": {"answer": 0, "choices": ["x", "y"], "split": "test"}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    answers = [{"question_id": "10", "text": "B"}, {"question_id": 12, "text": "y"}]
    score = lambda answers: generate.score("choice", str(tmp_path / "problems.json"), write(tmp_path / "a", answers))
    assert score(answers) == ({"accuracy": [1, 2], "unparsed": [0, 2]}, 0)
    with pytest.raises(ValueError, match="1 of 2.*'12'"):
        score(answers[:1])


def test_missing_answers_are_an_error_and_answers_without_annotation_are_counted(tmp_path, capsys):
    annotations = write(tmp_path / "exact.jsonl", [{"question_id": i, "answer": "x"} for i in range(5)])
    with pytest.raises(ValueError, match="a.jsonl: 3 of 5.*'1'"):
        generate.score("exact", annotations, write(tmp_path / "a.jsonl", [{"question_id": i, "text": "x"} for i in (0, 4)]))
    with pytest.raises(ValueError, match="5 of 5.*'0'"):
        generate.score("exact", annotations, write(tmp_path / "a.jsonl", [{"question_id": "z", "text": "x"}]))
    answers = write(tmp_path / "a.jsonl", [{"question_id": i, "text": "x" * (1 + i % 2)} for i in range(7)])
    generate.main(["--score", "exact", "--answers", answers, "--annotations", annotations])
    shown = capsys.readouterr().out.splitlines()
    assert "2 answers" in shown[0] and shown[1].split() == ["accuracy", "3", "of", "5", "60.0%"] and len(shown) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The official files: their ids do not tell their questions apart

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    """POPE as LLaVA asks it: three files of labels, each numbered from 1, and one of questions. Every second question of a picture, about
    what is there, is the same in all three. -> (folder, questions, {category: F1 as LLaVA's eval_pope.py counts it})"""
    folder, rng, questions, right = tmp_path_factory.mktemp("pope"), np.random.default_rng(0), [], {}
    for n, (category, first) in enumerate({"adversarial": 1, "popular": 20000001, "random": 10000001}.items()):
        labels = []
        for i in range(40 - 4 * n):
            thing = f"{'not ' * n if i % 2 else ''}thing {i % 8}"
            labels.append({"question_id": i + 1, "image": f"COCO_{i // 4}.jpg", "text": f"Is there a {thing} in the image?",
                           "label": "no" if i % 2 else "yes"})
        write(folder / f"coco_pope_{category}.json", labels)
        asked = [{"question_id": first + i, "image": row["image"], "text": row["text"] + SHORT, "category": category}
                 for i, row in enumerate(labels)]
        questions += [{**q, "reply": str(rng.choice(["Yes", "No"]))} for q in asked]

        said = [q["reply"].lower() for q in questions if q["category"] == category]                # by order, as there
        pairs = list(zip(said, (row["label"] for row in labels), strict=True))
        tp, fp, fn = (pairs.count(p) for p in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
        right[category] = 2 * tp / (2 * tp + fp + fn)
    return folder, questions, right


def answers_to(questions, file, *more):
    rows = [{"question_id": q["question_id"], "prompt": q["text"], "text": q["reply"], "model_id": "m", **{k: q[k] for k in more}}
            for q in questions]
    return write(file, rows)


def test_pope_is_paired_as_llava_does_by_the_order_within_a_category(pope, tmp_path):
    folder, questions, right = pope
    answers = answers_to(questions, tmp_path / "a.jsonl")
    for category, expected in right.items():
        sums, _ = generate.score("pope", str(folder / f"coco_pope_{category}.json"), answers)
        assert sums["F1"][0] / sums["F1"][1] == expected
    assert len(set(right.values())) == 3


def test_pope_with_pictures_missing_is_paired_by_picture_and_question(pope, tmp_path):
    folder, questions, _ = pope
    same = {(q["image"], q["text"]): q["reply"] for q in questions}                # a greedy model's: one answer to one question
    kept = [{**q, "reply": same[q["image"], q["text"]]} for q in questions if q["image"] != "COCO_2.jpg"]
    answers = answers_to(kept[::-1], tmp_path / "a.jsonl", "image")
    for category in ("random", "popular"):
        file = str(folder / f"coco_pope_{category}.json")
        with pytest.raises(ValueError, match="4 of .*'9'.*--allow-missing"):
            generate.score("pope", file, answers)
        sums, _ = generate.score("pope", file, answers, allow_missing=True)
        labels = [row for row in read(file) if row["image"] != "COCO_2.jpg"]
        right = [same[row["image"], row["text"] + SHORT].lower() == row["label"] for row in labels]
        assert sums["accuracy"] == [sum(right), len(right)]


def test_pope_labels_without_text_are_paired_by_id(pope, tmp_path):
    folder, questions, right = pope
    labels = [{k: row[k] for k in ("question_id", "image", "label")} for row in read(folder / "coco_pope_adversarial.json")]
    answers = answers_to(questions[:40], tmp_path / "a.jsonl", "image")
    sums, _ = generate.score("pope", write(tmp_path / "labels.json", labels), answers)
    assert sums["F1"][0] / sums["F1"][1] == right["adversarial"]


def test_pope_labels_of_other_questions_are_an_error_even_where_the_ids_agree(pope, tmp_path):
    folder, questions, _ = pope
    answers = answers_to(questions[:40], tmp_path / "a.jsonl")                     # adversarial alone
    for allow in (False, True):
        with pytest.raises(ValueError, match="question '2' was 'Is there a thing 1.*not thing 1.*other questions"):
            generate.score("pope", str(folder / "coco_pope_popular.json"), answers, allow)


def test_textvqa_is_scored_by_picture_and_question(tmp_path):
    words = "\nReference OCR token: STOP, what is it?"                             # LLaVA puts the words that OCR finds behind or in front
    asked = [("pic1", "What is it?", "red"), ("pic1", "What is it about?", "blue"), ("pic2", "What is it?", "green")]
    data = {"data": [{"question": text.lower(), "image_id": image, "question_id": 34602 + i, "answers": [human] * 10}
                     for i, (image, text, human) in enumerate(asked)]}
    (tmp_path / "val.json").write_text(json.dumps(data))
    for frame in ("{}" + words + SHORT, words[1:] + "\n{}" + SHORT, "{}" + SHORT, "OCR tokens: a, b. Question: {} Short answer:", "{}", "Say: {}"):
        rows = [{"question_id": image, "text": frame.format(text), "reply": reply}
                for (image, text, _), reply in zip(asked, ("red", "blue", "wrong"))]
        answers = answers_to(rows[::-1], tmp_path / "a.jsonl")
        assert generate.score("textvqa", str(tmp_path / "val.json"), answers) == ({"accuracy": [2, 3]}, 0)
        one = answers_to(rows[1:], tmp_path / "b.jsonl")
        with pytest.raises(ValueError, match="1 of 3.*'34602'"):
            generate.score("textvqa", str(tmp_path / "val.json"), one)
    by_their_own_ids = [{"question_id": 34602 + i, "text": text, "reply": "red"} for i, (_, text, _) in enumerate(asked)]
    assert generate.score("textvqa", str(tmp_path / "val.json"), answers_to(by_their_own_ids, tmp_path / "c.jsonl"))[0] == {"accuracy": [1, 3]}


def test_an_answer_to_a_longer_question_is_none_to_a_shorter_one(tmp_path):
    """"What is the brand name?" holds "what is the brand"."""
    rows = [{"image_id": "p", "question_id": i, "question": text, "answers": [human] * 10}
            for i, (text, human) in enumerate((("what is the brand", "nike"), ("what is the brand name", "nike air")))]
    (tmp_path / "val.json").write_text(json.dumps({"data": rows}))
    replies = [{"question_id": "p", "text": "Say: what is the brand", "reply": "nike"},
               {"question_id": "p", "text": "Say: what is the brand name", "reply": "nike air"}]
    score = lambda rows, *allow: generate.score("textvqa", str(tmp_path / "val.json"), answers_to(rows, tmp_path / "a.jsonl"), *allow)
    for order in (1, -1):
        assert score(replies[::order]) == ({"accuracy": [2, 2]}, 0)
    for frame in ("{}", "Say: {}"):
        longer = {**replies[1], "text": frame.format("what is the brand name")}
        with pytest.raises(ValueError, match="1 of 2.*'0'"):
            score([longer])
        assert score([longer], True) == ({"accuracy": [1, 1]}, 0)


def official_mme(categories, answers):
    """MME's calculation.py over LLaVA's answers, two lines a picture: {category: (acc + acc+) * 100}."""
    scores = {}
    for category in categories:
        right = [row["text"].lower()[:4].startswith(row["truth"].lower()) for row in answers if row["question_id"].startswith(category)]
        both = [a and b for a, b in zip(right[::2], right[1::2])]
        scores[category] = 100 * (sum(right) / len(right) + sum(both) / len(both))
    return scores


@pytest.fixture(scope="module")
def mme(tmp_path_factory):
    """A folder as MME's, the rows that LLaVA would write for it (with "truth"), and its categories."""
    folder, rng, rows = tmp_path_factory.mktemp("MME"), np.random.default_rng(1), []
    for category, below in {"existence": "", "artwork": "questions_answers_YN", "code_reasoning": ""}.items():
        (folder / category / below).mkdir(parents=True)
        for i in range(8):
            texts = [f"Is a c{'+' * j} code number {i} shown?" for j in (0, 2)]
            truth = rng.permutation(["Yes", "No"])
            lines = [f"{text}{' ' * (1 + i % 2)}Please answer yes or no.\t{right}\n" for text, right in zip(texts, truth)]
            (folder / category / below / f"{i:04}.txt").write_text("".join(lines))
            name = f"{category}/{'images/' if below else ''}{i:04}.png"
            rows += [{"question_id": name, "prompt": text + SHORT, "text": str(rng.choice(["Yes.", "No", "maybe"], p=[.45, .45, .1])),
                      "truth": right} for text, right in zip(texts, truth)]
    return folder, rows, ["existence", "artwork", "code_reasoning"]


def test_mme_is_scored_as_its_own_tool_does(mme, tmp_path, capsys):
    folder, rows, categories = mme
    sums, _ = generate.score("mme", str(folder), write(tmp_path / "a.jsonl", rows))
    right = official_mme(categories, rows)
    assert {name: sums[name] for name in categories} == {name: [pytest.approx(points), 200] for name, points in right.items()}
    assert sums["perception"] == [pytest.approx(right["existence"] + right["artwork"]), 400]
    assert sums["cognition"] == [pytest.approx(right["code_reasoning"]), 200] and sums["accuracy"][1] == 48 == 2 * sums["accuracy+"][1]
    generate.print_table(sums, "MME")
    assert "code_reasoning accuracy+" in capsys.readouterr().out

    lines = [{"question_id": row["question_id"], "text": row["prompt"], "answer": row["truth"]} for row in rows]
    assert generate.score("mme", write(tmp_path / "mme.jsonl", lines), str(tmp_path / "a.jsonl"))[0] == sums


def test_mme_counts_a_picture_only_with_both_its_answers_and_wants_yes_or_no(mme, tmp_path):
    folder, rows, _ = mme
    answers = write(tmp_path / "a.jsonl", rows[1:])
    with pytest.raises(ValueError, match="1 of 48"):
        generate.score("mme", str(folder), answers)
    sums, _ = generate.score("mme", str(folder), answers, allow_missing=True)
    assert sums["accuracy"][1] == 47 and sums["accuracy+"][1] == 23
    with pytest.raises(ValueError, match="Yes or No"):
        score_all("mme", {"OCR/1": {"answer": "perhaps"}}, {"OCR/1": "Yes"})
    with pytest.raises(ValueError, match="no MME"):
        generate.score("mme", str(tmp_path), answers)


def test_an_id_that_comes_twice_needs_annotations_that_say_which_question_they_mean(tmp_path):
    rows = [{"question_id": 1, "prompt": text, "text": text[0]} for text in ("one?", "two?")]
    answers = write(tmp_path / "a.jsonl", rows)
    right = [{"question_id": 1, "question": text, "answer": text[0]} for text in ("one?", "two?")]
    assert generate.score("exact", write(tmp_path / "e.jsonl", right), answers) == ({"accuracy": [2, 2]}, 0)
    with pytest.raises(ValueError, match="question_id 1 comes twice.*'question'"):
        generate.score("exact", write(tmp_path / "e.jsonl", [{"question_id": 1, "answer": "o"}]), answers)
    for file, twice in (("e.jsonl", right[:1] * 2), ("a.jsonl", rows[:1] * 2)):
        write(tmp_path / "e.jsonl", right), write(tmp_path / "a.jsonl", rows), write(tmp_path / file, twice)
        with pytest.raises(ValueError, match=f"{file}: question_id 1 comes twice"):
            generate.score("exact", str(tmp_path / "e.jsonl"), answers)


# ---------------------------------------------------------------------------------------------------------------------
# The drawn world as files


def test_drawn_files_can_be_answered_and_scored_in_every_way(world, tmp_path, monkeypatch, capsys):
    folder, n = tmp_path / "drawn", 90
    generate.main(["--write-drawn", str(folder), str(n)])
    drawn, questions, exact = generate.drawn_questions(n), read(folder / "questions.jsonl"), read(folder / "exact.jsonl")
    assert [q["text"] for q in questions] == [question for _, _, question, _ in drawn]
    assert [(e["type"], e["answer"]) for e in exact] == [(kind, answer) for _, kind, _, answer in drawn]
    for q, (scene, _, _, _) in zip(questions[:20], drawn):                         # the pixels that --eval-drawn shows
        assert np.array_equal(np.asarray(Image.open(folder / "images" / q["image"])), np.asarray(d.draw_scene(scene)))

    right = {e["question_id"]: e["answer"] for e in exact}                         # a model that errs on every fifth question
    monkeypatch.setattr(generate, "answer", lambda m, t, samples, **_: [
        "who knows" if s["row"]["question_id"] % 5 == 4 else right[s["row"]["question_id"]] for s in samples])
    answers = str(folder / "answers.jsonl")
    generate.main(flags(world, answers, "--eval", folder / "questions.jsonl", "--images", folder / "images"))
    scores = {kind: generate.score(kind, str(folder / f"{kind}.jsonl"), answers)[0] for kind in generate.SCORERS if kind != "mme"}
    assert scores["exact"]["accuracy"] == [72, 90] and scores["exact"]["color"] == [8, 10] and len(scores["exact"]) == 1 + len(d.TYPES)
    assert scores["vqa"] == scores["vqa-llava"] == scores["gqa"] == scores["exact"]                    # all ten humans say the same
    assert scores["textvqa"]["accuracy"] == [sum(k == "sign" and i % 5 != 4 for i, (_, k, _, _) in enumerate(drawn)), 10]   # the ten signs
    assert scores["pope"]["accuracy"][1] == sum(a in ("yes", "no") for a in right.values()) == 20
    n_choice = sum(a in d.COLORS or a in d.SHAPES for a in right.values())
    missed = sum(a in d.COLORS or a in d.SHAPES for i, a in right.items() if i % 5 == 4)
    assert scores["choice"] == {"accuracy": [n_choice - missed, n_choice], "unparsed": [missed, n_choice]} and n_choice == 30
    letters = [row["answer"] for row in read(folder / "choice.jsonl")]
    assert set(letters) == set("ABCD") and all(len(set(row["choices"])) == 4 for row in read(folder / "choice.jsonl"))
    generate.write_drawn(str(tmp_path / "again"), n)
    assert all((tmp_path / "again" / f.name).read_bytes() == f.read_bytes() for f in folder.glob("*.jsonl") if f.name != "answers.jsonl")
