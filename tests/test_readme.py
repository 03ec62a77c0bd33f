"""The README's Python runs as it stands there, and gives the numbers that it promises."""
import contextlib
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import figures
import train
from kernels import MoE
from model import Config, CuMo, add_lora, choose_trainable
from upcycle import upcycle

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(snippet, more=""):
    """-> the lines that a snippet prints, run in the project's folder as a program of its own."""
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        exec(compile(snippet + more, "README.md", "exec"), {"__name__": "__main__"})
    return printed.getvalue().splitlines()


def snippet_with(word):
    found, = [s for s in SNIPPETS if word in s]
    return found


def test_there_are_five_snippets():
    assert len(SNIPPETS) == 5


def test_the_idea_computes_what_the_layer_does():
    check = """
from kernels import route, moe_ffn
w_in, b_in = (torch.stack([getattr(e[0], n) for e in experts]) for n in ("weight", "bias"))
w_out, b_out = (torch.stack([getattr(e[2], n) for e in experts]) for n in ("weight", "bias"))
want = moe_ffn(x, route(logits, K), w_in, w_out, None, b_in, b_out)
print(torch.allclose(y, want, atol=1e-5))
"""
    assert run(snippet_with("torch.nn.GELU()"), check) == ["True"]


def test_without_a_balance_loss_one_expert_gets_everything_and_with_it_nobody_is_left_out():
    alone, balanced = (eval(line) for line in run(snippet_with("def shares")))
    assert max(alone) > 0.95 and min(balanced) > 0.1
    promised = re.findall(r"# \[([\d., ]+)\]", snippet_with("def shares"))
    for numbers, got in zip(promised, (alone, balanced)):
        assert [float(n) for n in numbers.split(",")] == pytest.approx(got, abs=0.1)


def test_upcycling_the_shipped_backbones_changes_nothing_and_a_shifted_expert_changes_later_tokens():
    unchanged, shifted = run(snippet_with("load_backbones"))
    assert unchanged == "True"
    assert eval(shifted) == [False, True, True, True, True, True] and shifted in TEXT


def test_four_of_eight_tokens_are_dropped_at_capacity_factor_one():
    one, two = (eval(line) for line in run(snippet_with("capacity_factor=1.0")))
    assert [w > 0 for token in one for w in token] == [True, True] * 4 + [False, False] * 4
    assert len(two) == 8 and all(w > 0 for token in two for w in token)


def test_the_reader_of_the_log_reads_what_a_run_writes(tmp_path):
    import train
    for name in (1, 3):
        log = train.Log(tmp_path, SimpleNamespace(name=name, steps=3), 0)
        for step, loss in enumerate((2.0, 0.5 * name, 1.75)):
            log.write(step, {"lm": loss, "loss": loss}, {}, {}, {"text": 1e-3, "others": 2e-3}, 1.0, 4, 0.0, 0.0)
        log.write_held_out(2, 1.25, True)
        log.close()
    snippet = snippet_with("log.jsonl").replace("out/tiny", str(tmp_path))
    assert run(snippet) == ["stage 1: lm is lowest after step 2: 0.500", "stage 1: val_loss is lowest after step 3: 1.250",
                            "stage 3: lm is lowest after step 2: 1.500", "stage 3: val_loss is lowest after step 3: 1.250"]


def test_the_table_of_the_log_has_every_key_that_a_run_writes():
    table = TEXT[TEXT.index("`log.jsonl` in the run's folder"):TEXT.index("import json\n\ncurves")]
    for key in ("stage", "step", "loss", "lm", "lr", "grad_norm", "load", "apart", "images_per_s", "seconds", "waiting", "val_loss", "best"):
        assert f"`{key}`" in table, key


def test_the_cauldron_becomes_llavas_json(tmp_path, monkeypatch):
    """With one subset's rows in the place of the download."""
    from PIL import Image

    import data
    texts = [{"user": "What is it?", "assistant": "A ring."}, {"user": "Red?", "assistant": "Yes."}]
    rows = [{"images": [Image.new("L", (9, 7))] * 2, "texts": texts}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *names, split: rows))
    monkeypatch.chdir(tmp_path)
    snippet, = re.findall(r"```py\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    sample = data.LlavaJson("cauldron.json", "cauldron")[0]
    assert [data.load_image(file, 8).shape for file in sample["images"]] == [(3, 8, 8)] * 2
    assert [turn["value"] for turn in sample["conversations"]] == ["<image>\n<image>\nWhat is it?", "A ring.", "Red?", "Yes."]


def test_no_line_of_text_is_too_wide():
    wide = [line for line in TEXT.splitlines() if len(line) >= 120 and not line.startswith("|")]
    assert not wide


def test_every_file_and_picture_that_is_named_is_there():
    for path in re.findall(r"\]\(((?:assets|tests)/[^)#]+)\)", TEXT) + re.findall(r"`(tests/\w+\.\w+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_link_inside_the_page_leads_to_a_heading():
    text = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links and not set(links) - set(anchors)


def test_every_function_of_the_papers_tables_is_there():
    import importlib
    tables = TEXT[TEXT.index("## From the papers"):TEXT.index("## Where this differs")]
    for module, name in re.findall(r"`(kernels|model|upcycle|generate)\.(\w+)", tables):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_the_diagrams_are_those_that_figures_py_draws_from_the_tables(name):
    assert (ROOT / "assets" / name).read_text(encoding="utf-8") == figures.FIGURES[name]()


@pytest.mark.parametrize("recipe, number", [(recipe, number) for recipe in figures.RECIPES for number in (1, 2, 3)])
def test_the_grid_of_stages_says_what_trains_in_a_model_of_that_stage(recipe, number):
    """What a stage does to a model's weights, against each cell of the picture's column."""
    args = train.parse(["--recipe", recipe])
    stage = train.settings(args, number)
    config = Config.from_preset(args.preset)
    config.text.n_experts = [0] * config.text.n_layers                             # dense, as a run begins
    model = CuMo(config)
    if stage.has_experts and recipe == "uni-moe":
        upcycle(model, text=4)                                                     # in the place of networks that were trained apart
    elif stage.has_experts:
        train.make_experts(args, model)
    choose_trainable(model, stage.trains)
    if stage.lora:
        add_lora(model, *stage.lora, 0)

    def part_of(name):
        part = name.split(".")[0]
        if part == "text" and ".ffn." in name:
            part = "text.router" if name.endswith("router") else "text.ffn"
        return part
    found = {part: set() for part in figures.PARTS}
    for name, p in model.named_parameters():
        if "vision.layers.3." not in name:                                         # no loss reaches the last layer's FFN
            is_adapter = "parametrizations" in name and not name.endswith("original")
            found[part_of(name)].add((is_adapter, p.requires_grad))
    for part, kinds in found.items():
        is_moe = any(isinstance(m, MoE) for n, m in model.named_modules() if part_of(n + ".") == part)
        word = "experts" if is_moe and part != "text.router" else "trains"
        if not kinds:
            wanted = ""
        elif (True, True) in kinds:
            wanted = "experts,|LoRA" if word == "experts" else "LoRA"
        else:
            wanted = word if (False, True) in kinds else "frozen"
        assert figures.state(recipe, number, part) == wanted, part
