"""bench.py: what it compares computes the same, and its tables say what was measured."""
import pytest
import torch

import bench
from kernels import moe_ffn, route
from model import IMAGE, PRESETS, CuMo
from upcycle import save


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_the_benchmark_compares_with_transformers_on_the_same_function(name):
    pytest.importorskip("transformers")
    x, logits, weights = bench.random_layer(bench.Layer(1, 33, 16, 24, 16, gated=True), 4, "cpu", torch.float32)
    theirs, params = bench.as_transformers(name, weights)
    results = []
    for run, leaves in ((lambda r: moe_ffn(x[0], r, *weights, act="silu"), [w for w in weights if w is not None]), (lambda r: theirs(x[0], r), params)):
        x.grad = logits.grad = None
        y = run(route(logits[0], 2))
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, x.grad, logits.grad, *(w.grad for w in leaves)])
    (*ours, w_in, w_out, w_gate), (*others, gate_up, down) = results
    for got, want in zip([*others, gate_up, down], [*ours, torch.cat([w_gate, w_in], 1), w_out], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", [[], ["--transformers"]])
def test_the_benchmark_prints_time_over_dense_and_the_ceiling_it_measured(monkeypatch, capsys, flag):
    if flag:
        pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "LAYERS", {"tiny": bench.Layer(2, 5, 8, 12, 8), "tiny, gated": bench.Layer(2, 5, 8, 12, 8, gated=True)})
    bench.main(["layers", "--repeat", "1", "--device", "cpu", *flag])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("    ")]
    assert "matrix products reach" in out and ("tiny, gated" in out) == bool(flag)
    assert [row[0] for row in rows] == (["dense,", "sorted", "loop", "samples"] * 2 + ["transformers"] * 2)[:4 + 6 * bool(flag)]
    assert all(float(row[-4]) > 0 and row[-3].endswith("x") and row[-2].endswith("%") and row[-1].endswith("x") for row in rows)
    assert rows[0][-3] == rows[0][-1] == "1.00x"


def test_packing_is_timed_against_a_row_for_each_and_leaves_less_padding(capsys):
    bench.bench_pack(n_batches=2, batch_size=6, repeat=1)
    out = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()[-3:]}
    padding = [float(rows[name][0].rstrip("%")) for name in ("drawn by chance", "of like lengths", "packed (--pack)")]
    assert "12 samples of" in out and padding[2] < padding[0] and rows["packed (--pack)"][3] == "1.00x"
    assert float(rows["packed (--pack)"][1]) < float(rows["drawn by chance"][1]) == 6


@pytest.mark.parametrize("preset", ["tiny", "cumo-small"])
def test_bench_of_a_training_step(capsys, monkeypatch, preset):
    monkeypatch.setitem(PRESETS, "cumo-small", PRESETS["tiny"] | dict(connector=dict(n_experts=4)))    # of words at random, as real presets
    bench.main(f"step --preset {preset} --device cpu --micro-batch 2 --steps 1 --max-length 128".split())
    text = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()[-3:]}
    assert set(rows) == {"experts", "as released", "dense"} and "matrix products reach" in text
    assert rows["dense"][-2] == "1.00x" and rows["experts"][-1] == "1.00x" and all(float(r[1]) > 0 for r in rows.values())


def test_the_released_dispatch_computes_the_same(tiny_model, monkeypatch):
    model = tiny_model(vision=dict(n_experts=4), connector=dict(n_experts=4), text=dict(n_experts=4))
    tokens, images = torch.tensor([[IMAGE] * 4 + [1, 2, 3]] * 2), torch.randn(2, 3, 16, 16)
    want = model(tokens, images).logits
    monkeypatch.setattr("kernels.moe_ffn", bench.as_released)
    assert torch.allclose(model(tokens, images).logits, want, atol=1e-4)


def test_bench_of_decoding(capsys, monkeypatch, tiny_model, tmp_path):
    pytest.importorskip("transformers")
    calls, real = [], CuMo.generate
    monkeypatch.setattr(CuMo, "generate", lambda self, *a, **kw: calls.append(kw["compile"]) or real(self, *a, **kw))
    save(tiny_model(vision=None), tmp_path / "m")
    bench.bench_decode(str(tmp_path / "m"), "cpu", (False, "aot_eager"), True, prompt=8, n=3)
    assert calls == ([False] * 3 + ["aot_eager"] * 3) * 2
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-6:]]
    assert [row[:2] for row in rows] == [[how, batch] for batch in "18" for how in ("transformers", "eager", "compiled")]
    assert all(float(row[2]) > 0 and row[-1].endswith("%") for row in rows)


def test_transformers_decoder_that_is_timed_has_our_weights(tiny_model):
    pytest.importorskip("transformers")
    model, tokens = tiny_model(vision=None), torch.randint(40, (2, 9))
    assert torch.allclose(bench.as_transformers_decoder(model)(tokens).logits, model(tokens).logits, atol=1e-4)


def test_bytes_of_a_decoding_step(tiny_model):
    model = tiny_model(text=dict(n_experts=[4, 0]))
    t, weights = model.config.text, {name: p.numel() for name, p in model.text.named_parameters()}
    experts = sum(n for name, n in weights.items() if ".0.ffn.w" in name)
    rest = sum(weights.values()) - experts - weights["embed.weight"]
    router = weights["layers.0.ffn.router"]
    cache = 2 * 2 * 10 * t.n_kv_heads * t.head_dim
    assert bench.decode_bytes(model, 1, 10) == pytest.approx(4 * (rest - router / 2 + experts / 2 + cache))


def test_bench_of_images(capsys, monkeypatch):
    real = bench.noisy_jpegs
    monkeypatch.setattr(bench, "noisy_jpegs", lambda *size: real(*size[:3], 2))
    bench.bench_images(rounds=1)
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row[:9] for row in rows] == ["640 x 480", "640 x 427", "480 x 640", "together "]
    assert all(float(x) > 0 for row in rows for x in row[9:].rstrip("%").split())


@pytest.mark.parametrize("argv, words", [("step --expert-parallel 2 --plan --gpus 2", "leave --expert-parallel out"),
                                         ("decode nope", "unknown preset 'nope'")])
def test_what_cannot_be_timed(argv, words):
    with pytest.raises(ValueError, match=words):
        bench.main(argv.split())


@pytest.mark.parametrize("argv", ["", "layers --steps 3", "images --fast"])
def test_unknown_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        bench.main(argv.split())
    assert "usage" in capsys.readouterr().err
