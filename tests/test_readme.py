"""The README's Python runs as it stands there, and gives the numbers that it promises."""
import contextlib
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_there_are_four_snippets():
    assert len(SNIPPETS) == 4


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


def test_upcycling_the_shipped_backbones_changes_nothing():
    assert run(snippet_with("load_backbones")) == ["True"]


def test_four_of_eight_tokens_are_dropped_at_capacity_factor_one():
    one, two = (eval(line) for line in run(snippet_with("capacity_factor=1.0")))
    assert [w > 0 for w in one] == [True] * 4 + [False] * 4 and all(w > 0 for w in two)


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


def test_every_function_of_the_papers_tables_is_there():
    import importlib
    tables = TEXT[TEXT.index("## From the papers"):TEXT.index("## MoE-LLaVA and Uni-MoE")]
    for module, name in re.findall(r"`(kernels|model|upcycle|generate)\.(\w+)", tables):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
