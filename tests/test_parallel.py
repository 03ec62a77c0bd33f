"""--expert-parallel: experts on other ranks than their tokens, and the numbers of a single process.

One launch of two processes serves all tests here: this file as a program, for kernels.moe_parallel, and then train.py in several ways.
"""
import json
import os
import sys

import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [(here := os.path.dirname(os.path.abspath(__file__))), os.path.dirname(here)]     # for the launched processes
import kernels as k
import model as m
import train
from test_train import (SMALL, alternating, assert_same_run, base, checkpoint, flags, interrupt_at, quiet_machine, rows, run,  # noqa: F401 (fixtures)
                        start, weights, write_llava)
from upcycle import load, save

# ---------------------------------------------------------------------------------------------------------------------
# 1. The exchange. Every rank computes the definition over all ranks' tokens with all experts, and its own part in parallel

CASES = {              # tokens of rank 0 and rank 1, experts, top-k, and which experts are chosen
    "uneven": (7, 12, 4, 2, "any"),
    "one expert a rank": (6, 5, 2, 1, "any"),
    "more experts than tokens": (2, 3, 8, 3, "any"),
    "all to rank 1": (6, 9, 4, 2, "last"),
    "one expert alone": (5, 4, 4, 1, "first"),
    "rank 0 without tokens": (0, 9, 4, 2, "any"),
    "rank 1 without tokens, rank 0 without askers": (5, 0, 4, 2, "last"),
    "nobody has tokens": (0, 0, 4, 2, "any"),
    "dropped choices": (8, 8, 4, 2, "dropped"),
}


def exchange(case: str, backend: str, act: str, gated: bool, bias: bool, dtype=torch.float64) -> float:
    """The largest |difference| to moe_loop of this rank's output and gradients, relative to the largest value."""
    *n, n_experts, top_k, kind = CASES[case]
    rank, draw = dist.get_rank(), torch.Generator().manual_seed(len(case))
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    x, w, logits, dy = rand(sum(n), 8), rand(sum(n), top_k).abs(), rand(sum(n), n_experts), rand(sum(n), 6)
    if kind in ("last", "first"):
        logits[:, :n_experts // 2] += 100 if kind == "first" else -100
    if kind == "first":
        logits[:, 0] += 100
    experts = logits.topk(top_k).indices
    if kind == "dropped":
        w[torch.rand(w.shape, generator=draw) < 0.4] = 0
    stacked = [rand(n_experts, 5, 8), rand(n_experts, 6, 5), rand(n_experts, 5, 8) if gated else None,
               rand(n_experts, 5) if bias else None, rand(n_experts, 6) if bias else None]
    mine, held = slice(0, n[0]) if rank == 0 else slice(n[0], None), slice(rank * n_experts // 2, (rank + 1) * n_experts // 2)
    results = []
    for rows_of, part, forward in ((slice(None), slice(None), lambda x, w, e, *p: k.moe_loop(x, w, e, k.Stack(*p), act)),
                                   (mine, held, lambda x, w, e, *p: k.moe_ffn(x, k.Routing(w, e, None, None), *p, act=act, backend=backend,
                                                                              group=dist.group.WORLD))):
        kind_of = torch.float64 if not results else dtype
        leaves = [t if t is None else t.to(kind_of, copy=True).requires_grad_() for t in
                  (x[rows_of], w[rows_of], *(s if s is None else s[part] for s in stacked))]
        y = forward(leaves[0], leaves[1], experts[rows_of], *leaves[2:])
        y.backward(dy[rows_of].to(kind_of))
        results.append([y.detach(), *(t.grad for t in leaves if t is not None)])
    (y, dx, dw, *dp), got = results
    worst = 0.0
    for g, want in zip(got, [y[mine], dx[mine], dw[mine], *(t[held] for t in dp)], strict=True):
        assert g.shape == want.shape and g.isfinite().all(), case
        worst = max(worst, float((g - want).abs().max() / want.abs().max().clamp(min=1)) if want.numel() else 0.0)
    return worst


def compare():
    worst = {}
    for case in CASES:
        for backend, act, gated, bias in (("sorted", "gelu", False, True), ("loop", "silu", True, False), ("sorted", "silu", True, True)):
            key = f"{case}, {backend}, {act}"
            worst[key] = max(worst.get(key, 0), exchange(case, backend, act, gated, bias))
        worst[f"{case}, bfloat16"] = exchange(case, "grouped", "gelu", False, True, torch.bfloat16)
    with open(sys.argv[1] + str(dist.get_rank()), "w") as f:
        json.dump(worst, f)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Training


@pytest.fixture(scope="module")
def ways(base, tmp_path_factory):
    """The same training in one process and in two that share the experts -> the folder of them all, and what each job ended with."""
    folder = str(tmp_path_factory.mktemp("parallel"))
    at = lambda name: os.path.join(folder, name)
    torch.set_num_threads(1)
    stage3, two, clip = ["--stage", 3, "--lr", 1e-3], ["--expert-parallel", 2], ["--grad-clip", 0.1]
    mixed = [*stage3, "--steps", 4, "--batch-size", 4, *write_llava(folder, alternating())]
    speaker, tokenizer = load(base)
    config = speaker.config.to_dict()
    torch.manual_seed(1)                                                           # experts in the decoder, few slots, an odd layer dense
    save(m.CuMo(m.Config.from_dict({**config, "text": {**config["text"], "n_experts": [4, 0], "capacity_factor": 0.7}})), at("speaker"), tokenizer)
    run(base, at("single"), *stage3, "--steps", 10)
    run(base, at("single clip"), *stage3, *clip)
    run(base, at("single mixed"), *mixed)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4)
        run(base, at("single stopped"), *stage3, "--steps", 10)
    jobs = [dict(argv=[at("errors")], file=os.path.abspath(__file__)),
            dict(argv=flags(base, at("experts"), *stage3, *two, "--steps", 10)),
            dict(argv=flags(base, at("experts clip"), *stage3, *two, *clip, "--micro-batch", 2, "--checkpointing")),
            dict(argv=flags(base, at("experts mixed"), *mixed, *two)),
            dict(argv=flags(base, at("experts stopped"), *stage3, *two, "--steps", 10), fault="interrupt", at=4, rank=1),
            dict(argv=flags(base, at("single stopped"), *stage3, *two, "--steps", 10, "--resume")),
            dict(argv=flags(at("speaker"), at("text ddp"), *stage3, "--steps", 3)),
            dict(argv=flags(at("speaker"), at("text experts"), *stage3, *two, "--steps", 3)),
            dict(argv=flags(base, at("three experts"), *stage3, *two, "--n-experts", 3)),
            dict(argv=flags(base, at("three ranks"), *stage3, "--expert-parallel", 3)),
            dict(argv=flags(base, at("fsdp"), *stage3, *two, "--fsdp")),
            dict(argv=flags(base, at("late"), *two, "--n-experts", 3))]
    code, out, err = start(folder, jobs, processes=2)
    assert code == 0, f"{out}\n{err}"
    with open(at("result0")) as f:
        results = json.load(f)
    names = [os.path.basename(j["argv"][-1] if "file" in j else j["argv"][3]) for j in jobs]
    failed = [n for n, r in zip(names, results) if r is not None]
    assert failed == ["experts stopped", "three experts", "three ranks", "fsdp", "late"], f"{results}\n{out}\n{err}"
    return folder, dict(zip(names, results))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_exchange_gives_the_definitions_output_and_gradients(ways, rank):
    with open(f"{ways[0]}/errors{rank}") as f:
        errors = json.load(f)
    assert len(errors) == 4 * len(CASES)
    for name, error in errors.items():
        assert error < (5e-2 if "bfloat16" in name else 1e-13), f"{name}: {error}"


def test_ten_steps_with_experts_on_two_ranks_are_a_single_processes(ways):
    assert len(rows(f"{ways[0]}/experts")) == 10
    assert_same_run(f"{ways[0]}/experts", f"{ways[0]}/single")


def test_accumulated_clipped_recomputed_gradients_too(ways):
    assert min(r["grad_norm"] for r in rows(f"{ways[0]}/single clip")) > 0.1       # else nothing is clipped
    assert_same_run(f"{ways[0]}/experts clip", f"{ways[0]}/single clip")


def test_a_rank_without_pictures_serves_the_others_tokens(ways):
    """test_train.py shows that these batches leave one rank without a picture."""
    assert_same_run(f"{ways[0]}/experts mixed", f"{ways[0]}/single mixed")


def test_experts_in_the_decoder_with_capacity_and_padding_train_as_without_sharding(ways):
    assert_same_run(f"{ways[0]}/text experts", f"{ways[0]}/text ddp")
    assert any(r["text/balance"] > 0.5 for r in rows(f"{ways[0]}/text ddp"))


def test_a_checkpoint_is_that_of_a_single_process_and_resumes_as_one(ways, base):
    _, about, tensors = checkpoint(f"{ways[0]}/experts stopped")
    assert about["step"] == 4 and tensors["model.connector.ffn.w_in"].shape == (4, 32, 32)
    assert tensors["optimizer.connector.ffn.w_in.exp_avg"].shape == (4, 32, 32)
    out = run(base, f"{ways[0]}/experts stopped", "--stage", 3, "--lr", 1e-3, "--steps", 10, "--resume")
    assert_same_run(out, f"{ways[0]}/single")


def test_a_single_processes_checkpoint_resumes_with_experts_on_two_ranks(ways):
    assert [r["step"] for r in rows(f"{ways[0]}/single stopped")] == list(range(10))
    assert_same_run(f"{ways[0]}/single stopped", f"{ways[0]}/single")


@pytest.mark.parametrize("job, words", [
    ("three experts", "vision.layers.0.ffn: 3 experts cannot be dealt out evenly to --expert-parallel 2 processes"),
    ("three ranks", "--expert-parallel 3: 2 process(es) cannot form groups of 3"),
    ("fsdp", "--expert-parallel and --fsdp"),
    ("late", "--n-experts 3 is not a multiple of --expert-parallel 2")])
def test_what_cannot_be_dealt_out_is_one_line(ways, job, words):
    assert ways[1][job].startswith(f"train.py: {words}") and "\n" not in ways[1][job]
    assert job == "three experts" or not os.path.exists(f"{ways[0]}/{job}")


@pytest.mark.parametrize("argv, words", [(["--expert-parallel", "2"], "1 process"), (["--expert-parallel", "0"], "must be at least 1")])
def test_expert_parallelism_needs_as_many_processes(argv, words):
    with pytest.raises(ValueError, match=words):
        train.parse(argv)


if __name__ == "__main__":                           # in each of the processes that test_train.start launched
    compare()
