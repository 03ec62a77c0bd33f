"""The world of facts: names that cannot be guessed, drawings that never come twice."""
import collections

import numpy as np
import pytest

import data
from data import Facts, facts
from train import BACKBONES
from upcycle import load_backbones


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
    with pytest.raises(ValueError, match="missing.png.*assets/emoji.py makes it again"):
        data.draw_fact(0, 0)
    data.emoji_sheet.cache_clear()
