"""The world of facts: names that cannot be guessed, drawings that never come twice; training on it, and what the log says of loads."""
import collections
import json

import numpy as np
import pytest
import torch

import data
import train
from data import Facts, facts
from test_train import base, rows, run                                             # noqa: F401 (base is a fixture)
from train import BACKBONES
from upcycle import load, load_backbones, upcycle


def pixels(sample):
    return np.asarray(sample["images"][0]).tobytes()


def test_an_item_is_always_the_same_and_another_seed_draws_it_otherwise():
    one, again, other = Facts(50, 100), Facts(50, 100), Facts(50, 100, seed=1)
    assert [pixels(one[i]) for i in (0, 99)] == [pixels(again[i]) for i in (0, 99)]
    assert [one[i]["conversations"] for i in range(100)] == [again[i]["conversations"] for i in range(100)]
    assert pixels(one[0]) != pixels(other[0])


def test_every_fact_comes_equally_often_with_its_own_name_and_in_another_order_each_round():
    said = [Facts(40, 120)[i]["conversations"] for i in range(120)]
    assert all(turns[0]["value"] == "<image>\nWhat is this?" for turns in said)
    names = [turns[1]["value"] for turns in said]
    assert set(collections.Counter(names).values()) == {3} and set(names) == {name for _, name in facts()[:40]}
    assert names[:40] != names[40:80] != names[80:]


def test_held_out_drawings_are_of_the_same_facts_and_none_of_them_is_trained_on():
    trained, held_out = Facts(30, 300), Facts(30, 60, held_out=True)
    assert not {pixels(trained[i]) for i in range(300)} & {pixels(held_out[i]) for i in range(60)}
    assert {held_out[i]["conversations"][1]["value"] for i in range(60)} == {name for _, name in facts()[:30]}
    unknown = Facts(30, 30, first=30)
    assert not {unknown[i]["conversations"][1]["value"] for i in range(30)} & {name for _, name in facts()[:30]}


def test_a_name_says_nothing_of_its_picture():
    """Which picture has which name is a shuffle: each of a name's words is spread over the sheet (whose rows are sorted by kind) like
    1,024 numbers that were drawn at random. Mutual information of word and eighth of the sheet, against that of shuffled pairs."""
    pairs = facts()
    assert len(pairs) == 1024 and len({name for _, name in pairs}) == 1024 and sorted(place for place, _ in pairs) == list(range(1024))

    def information(places, words):
        joint = collections.Counter(zip(places, words))
        left, right, n = collections.Counter(places), collections.Counter(words), len(words)
        return sum(count / n * np.log(count * n / (left[a] * right[b])) for (a, b), count in joint.items())
    eighths = [place // 128 for place, _ in pairs]
    rng = np.random.default_rng(0)
    for which in (0, 1):
        words = [name.split()[which] for _, name in pairs]
        chance = [information(rng.permutation(eighths).tolist(), words) for _ in range(40)]
        assert information(eighths, words) <= np.mean(chance) + 3 * np.std(chance)
        assert information([words.index(word) for word in words], words) > 2 * max(chance)        # it would be seen


def test_the_two_words_of_a_name_are_one_token_each_for_the_shipped_tokenizer():
    _, tokenizer = load_backbones(BACKBONES)
    assert {len(tokenizer.encode(" " + name).ids) for _, name in facts()} == {2}


@pytest.mark.parametrize("i", [-1, 100])
def test_an_item_that_is_not_there_is_an_index_error(i):
    with pytest.raises(IndexError):
        Facts(50, 100)[i]


def test_a_missing_sheet_says_how_to_make_it_again(monkeypatch):
    monkeypatch.setattr(data, "SHEET", "missing.png")
    data.emoji_sheet.cache_clear()
    with pytest.raises(ValueError, match="missing.png.*assets/sheet.py makes it again"):
        data.draw_fact(0, 0)
    data.emoji_sheet.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Training on facts, and the loads in the log


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):                                               # noqa: F811
    out = tmp_path_factory.mktemp("facts")
    return run(base, out / "o", "--stage", 3, "--facts", 12, "--steps", 3, "--micro-batch", 4, "--n-experts", 3)


def test_a_run_on_facts_says_the_loss_on_new_drawings_and_what_is_recalled(trained):
    with open(f"{trained}/scores.jsonl") as f:
        scores = json.loads(f.read())["scores"]
    assert {name: asked for name, (_, asked) in scores.items()} == {"known": 9, "unknown": 9} and scores["unknown"][0] == 0
    assert "val_loss" in rows(trained)[-1]
    encoded = data.Encoded(Facts(12, 24, seed=3, held_out=True), load(trained)[1], "tiny", 48, 36, 256)
    batch = data.collate([encoded[i] for i in range(24)])
    with torch.no_grad():
        loss = load(trained)[0](batch["tokens"], batch["images"], labels=batch["labels"]).parts["lm"].item()
    assert rows(trained)[-1]["val_loss"] == pytest.approx(loss, abs=1e-4)


def test_the_logged_load_is_the_count_of_first_choices_over_the_step_s_batch(base, trained):            # noqa: F811
    """Of the first step, whose model is the upcycled base: in two micro-batches it is logged as in one."""
    model, tokenizer = load(base)
    upcycle(model, vision=3, connector=3, seed=0)
    encoded = data.Encoded(Facts(12, 24, seed=3), tokenizer, "tiny", 48, 36, 256)
    order = next(iter(data.Batches(24, 8, 8)))
    batch = data.collate([encoded[i] for i in order])
    with torch.no_grad():
        routing = model(batch["tokens"], batch["images"], labels=batch["labels"]).routing
    wanted = {f"{part} {i}": r.experts[..., 0].flatten().bincount(minlength=3) / r.experts[..., 0].numel()
              for part in routing for i, r in enumerate(routing[part])}
    logged = rows(trained)[0]["load"]
    assert logged.keys() == wanted.keys() and len(logged) == 4
    for name, load_ in wanted.items():
        assert logged[name] == pytest.approx(load_.tolist(), abs=1e-4) and sum(logged[name]) == pytest.approx(1, abs=3e-4)


@pytest.mark.parametrize("parts", ["connector", "vision,text"])
def test_experts_are_made_where_the_flag_says_and_nowhere_else(base, tmp_path, parts):                 # noqa: F811
    out = run(base, tmp_path / "o", "--stage", 3, "--facts", 12, "--steps", 1, "--experts-in", parts)
    config = load(out)[0].config
    has = {name for name in ("vision", "connector", "text") if any(train.numbers_of(getattr(config, name)))}
    assert has == set(parts.split(","))
    assert {name.split()[0] for name in rows(out)[0]["load"]} == has


@pytest.mark.parametrize("more, words", [
    (["--facts", 1025], "--facts = 1025 must be at most 1024"),
    (["--facts", 12, "--data", "x.json"], "--facts does nothing with --data"),
    (["--facts", 12, "--experts-in", "ears"], "'ears' is no part; known are"),
    (["--facts", 12, "--experts-in", "text", "--dense"], "--experts-in is about experts"),
    (["--recipe", "moe-llava", "--experts-in", "text"], "belongs to --recipe cumo")])
def test_flags_about_facts_that_cannot_be_met_are_refused(base, tmp_path, more, words):                # noqa: F811
    with pytest.raises(ValueError, match=words):
        run(base, tmp_path / "o", "--stage", 3, *more)


def test_the_log_says_how_far_experts_have_grown_apart(base, trained):             # noqa: F811
    """Nothing after upcycling; then what a loop over the experts of the trained model says."""
    first, last = rows(trained)[0]["apart"], [row for row in rows(trained) if "apart" in row][-1]["apart"]
    assert first.keys() == rows(trained)[0]["load"].keys() and all(value == pytest.approx(0, abs=1e-6) for value in first.values())
    *used, unused = [last.pop(name) for name in sorted(last) if name.startswith("vision")]
    assert unused == 0                          # nothing uses what the tower's last layer gives, so its experts learn nothing
    assert all(value > 1e-4 for value in [*used, *last.values()])

    torch.manual_seed(0)
    model = upcycle(load(base)[0], vision=3, connector=3)
    moe = model.connector.ffn
    with torch.no_grad():
        moe.w_in += 0.1 * torch.randn_like(moe.w_in)
    experts = moe.w_in.detach().double()
    mean = sum(experts) / 3
    wanted = sum(((expert - mean) ** 2).sum() ** 0.5 for expert in experts) / 3 / (mean ** 2).sum() ** 0.5
    assert train.experts_apart(model)["connector 0"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert train.experts_apart(load(base)[0]) == {}
