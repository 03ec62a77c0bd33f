"""assets/why.py: rows that differ in one thing, numbers that are kept, pictures of what the logs say."""
import json
import os
import sys
import types

import pytest
import torch

import generate
import train
from data import Facts
from upcycle import load, load_backbones, upcycle

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets"))
import why                                                                         # noqa: E402


@pytest.fixture(scope="module")
def control():
    """What the row "4 experts" begins with, at seed 0."""
    torch.manual_seed(0)
    model, tokenizer = load_backbones(train.BACKBONES)
    return upcycle(model.float(), vision=4, connector=4, seed=0), tokenizer


def test_experts_from_scratch_differ_from_the_control_in_experts_alone(control, tmp_path):
    model, _ = load(why.begin_otherwise(why.SCRATCH, 0, str(tmp_path / "scratch")))
    wanted, got = control[0].state_dict(), model.state_dict()
    assert wanted.keys() == got.keys()
    differ = {name for name in wanted if not torch.equal(wanted[name], got[name])}
    assert differ == {name for name in wanted
                      if name.startswith(("vision", "connector")) and ".ffn.w_" in name or name == "connector.ffn.w_in"
                      or name.startswith("vision") and ".ffn.b_" in name}
    w_in = model.vision.layers[0].ffn.w_in
    assert all(not torch.equal(w_in[0], w_in[e]) for e in (1, 2, 3))
    assert 0.3 < w_in.std() / control[0].vision.layers[0].ffn.w_in.std() < 3         # as large as a new model's, not as noise


def test_weights_not_renormalised_are_probabilities_and_nothing_else_changes(control, tmp_path):
    model, _ = load(why.begin_otherwise(why.BARE, 0, str(tmp_path / "bare")))
    wanted, got = control[0].state_dict(), model.state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    _, routing = model.connector.ffn(torch.randn(2, 5, model.connector.ffn.router.shape[1]))
    assert (routing.weights.sum(-1) < 0.999).all()
    _, routing = control[0].connector.ffn(torch.randn(2, 5, model.connector.ffn.router.shape[1]))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 5))


def test_the_held_out_loss_is_the_mean_over_all_labels_however_it_is_cut(control):
    model, tokenizer = control
    losses = [why.held_out_loss(model, tokenizer, "100", 0, n=12, batch=batch) for batch in (12, 4)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # One sample at a time, by hand.
    total, labels = 0.0, 0
    samples = Facts(100, 12, 0, held_out=True)
    encoded = why.data.Encoded(samples, tokenizer, "tiny", why.data.picture_format(model.config.vision), 36, 256)
    for i in range(12):
        batch = why.data.collate([encoded[i]])
        with torch.no_grad():
            logits = model(batch["tokens"], batch["images"]).logits[0, :-1].double()
        wanted = batch["labels"][0, 1:]
        kept = wanted >= 0
        total -= logits.log_softmax(-1)[kept, wanted[kept]].sum().item()
        labels += kept.sum().item()
    assert losses[0] == pytest.approx(total / labels, abs=1e-5)


def test_what_was_measured_is_not_measured_again_and_is_drawn(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.jsonl"
    with open(results, "w") as f:
        for seed in (0, 1):
            for row in why.MAIN:
                numbers = dict(loss=0.25 + seed, right=0.5, parameters=2_000_000, activated=1_000_000, seconds=60.0)
                print(json.dumps({"world": "100", "row": row, "seed": seed, **numbers}), file=f)
    monkeypatch.setattr(why, "run", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sys, "argv", ["why.py", "--worlds", "100", "--seeds", "0,1", "--out", str(tmp_path / "o"),
                                      "--results", str(results)])
    drawn = []
    rectangle = generate.ImageDraw.ImageDraw.rectangle
    monkeypatch.setattr(generate.ImageDraw.ImageDraw, "rectangle",
                        lambda pen, box, color=None, *more: (drawn.append((box, color)), rectangle(pen, box, color, *more)))
    why.main()
    assert "| dense | 0.750 ± 0.707 (0.250, 1.250) | 50.0 ± 0.0 (50.0, 50.0) | 2.00M | 1.00M | 60 |" in capsys.readouterr().out
    bars = {box: color for box, color in drawn if box[2] - box[0] == 56}             # the others are the legend's
    assert sorted(bars.values()) == ["#bbbbbb"] + ["#f7b267"] * 3 and {color for _, color in drawn} == set(bars.values())
    assert {(bottom - top) / 130 for _, top, _, bottom in bars} == {0.75 / 1.5}       # the axis ends at 1.5
    assert os.path.exists(tmp_path / "o" / "why.png")


def test_what_is_trained_but_not_noted_is_only_measured(tmp_path, monkeypatch):
    args = types.SimpleNamespace(out=str(tmp_path))
    out = why.folder(args, "100", "dense", 0)
    why.train.begin_run(why.train.parse(["--out", out]), [3])
    monkeypatch.setattr(why.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(why, "numbers_of", lambda *where: {"loss": where[1:]})
    assert why.run(args, "100", "dense", 0) == {"world": "100", "row": "dense", "seed": 0, "loss": ("100", 0)}


def test_pictures_whose_logs_are_elsewhere_are_not_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["why.py", "--worlds", "200", "--rows", "losses", "--out", str(tmp_path)])
    why.main()
    assert "which are not in" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_pictures_of_the_losses_show_the_logs_numbers(tmp_path, monkeypatch):
    logs = {}
    for k, row in enumerate(("4 experts", *why.LOSSES)):
        with open(tmp_path / "log.jsonl", "w") as f:
            for step in range(40):
                names = ("vision 0", "vision 1", "vision 2", "connector 0")
                print(json.dumps({"stage": 3, "step": step, "lm": 3.0 - k, "vision/z": 2.0 + k, "apart": dict.fromkeys(names, step / 100),
                                  "load": {"connector 0": [0.1, 0.2, 0.3, 0.4]}}), file=f)
            print(json.dumps({"stage": 3, "step": 39, "val_loss": 1.0}), file=f)
        logs[row] = why.read_log(tmp_path)
    charts = []
    monkeypatch.setattr(generate, "line_chart", lambda pen, box, lines, title, *_: charts.append(lines))
    why.draw_losses(logs, str(tmp_path / "x.png"))
    why.draw_apart(logs, str(tmp_path / "y.png"))
    without, both, z, apart, loss = charts
    for chart in (without, both):
        assert [points[0][1] for *_, points in chart] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [points[-1] for *_, points in z] == [(40, 5.0), (40, 2.0)]
    assert apart[0][3][7] == (8, 0.07) and len(apart) == 4
    assert [points[0] for *_, points in loss] == [(10, -1.0), (10, 3.0)]


@pytest.mark.parametrize("flags, words", [
    (["--rows", "32 experts"], "--rows 32 experts: known are dense, 2 experts"),
    (["--worlds", "300"], "--worlds 300: known are 100, 200, 400, skills")])
def test_rows_and_worlds_that_are_not_there_are_named(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["why.py", *flags])
    with pytest.raises(SystemExit):
        why.parse()
    assert words in capsys.readouterr().err
