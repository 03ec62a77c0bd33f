"""why.py: what do experts buy? The same training with more and more experts, in three worlds.

    python assets/why.py                       the main rows of the table, one seed
    python assets/why.py --rows all --seeds 0,1,2
    python assets/why.py --worlds skills       on the drawn scenes: what experts do not buy

A row is one run of train.py from the shipped backbones, in which everything trains. A world of 200
facts has 200 pictures, each with a name that nobody can guess (data.Facts). All rows of a seed see
the same data in the same order, and all but "dense" do the same arithmetic: two experts for each
token. Prints the table (Markdown), and draws it.

Each run's numbers are kept in assets/why.jsonl, and are not measured twice: for numbers of your own
machine, name another file (--results).
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

import data
import generate
import train
from upcycle import load

# Each row's flags for train.py. top-2 is the default.
ROWS = {
    "dense": "--dense",
    "2 experts": "--n-experts 2",
    "4 experts": "--n-experts 4",
    "8 experts": "--n-experts 8",
    "16 experts": "--n-experts 16",
    "connector: 4 experts": "--n-experts 4 --experts-in connector",
    "tower: 4 experts": "--n-experts 4 --experts-in vision",
    "decoder: 2 experts": "--n-experts 2 --experts-in text",
    "decoder: 4 experts": "--n-experts 4 --experts-in text",
    "decoder: 8 experts": "--n-experts 8 --experts-in text",
    "decoder: 16 experts": "--n-experts 16 --experts-in text",
}
MAIN = ("dense", "2 experts", "4 experts", "8 experts")

# What the worlds are called, and their flags.
WORLDS = {
    "100": "--facts 100",
    "200": "--facts 200",
    "skills": "",
}
TITLES = {"100": "100 facts", "200": "200 facts", "skills": "skills: the drawn scenes"}

# Small steps in small batches: what is memorised best in a given time, of what was tried.
RECIPE = "--stage 3 --lr 5e-4 --batch-size 16 --steps 1000 --eval-questions 600"


# ------------------------------------------------------------------------------------------------
# 1. Runs


def run(args, world, row, seed):
    """Train one row and measure it -> its numbers, as one line of the file of results."""
    out = os.path.join(args.out, f"{world} {row} {seed}".replace(":", "").replace(" ", "-"))
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--init", train.BACKBONES,
               "--seed", str(seed), "--out", out]
    command += shlex.split(f"{RECIPE} {WORLDS[world]} {ROWS[row]}")
    # What was interrupted goes on.
    if os.path.exists(out):
        command = [*command[:2], "--resume", "--out", out]

    print(f"{world}, {row}, seed {seed}: {shlex.join(command[1:])}", flush=True)
    # One thread each, as the runs of a batch go side by side.
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return {"world": world, "row": row, "seed": seed, **numbers_of(out, world, seed)}


def numbers_of(out, world, seed):
    """-> {"loss", "right", "parameters", "activated", "seconds"} of a finished run."""
    with open(os.path.join(out, "scores.jsonl")) as f:
        scores = json.loads(f.read().splitlines()[-1])["scores"]
    # Nobody can know the names of unknown pictures: they are a control.
    scores.pop("unknown", None)
    right, asked = (sum(column) for column in zip(*scores.values()))

    with open(os.path.join(out, "log.jsonl")) as f:
        steps = [row for row in map(json.loads, f) if "seconds" in row]

    model, tokenizer = load(out)
    counts = train.count_parameters(model).values()
    return {
        "loss": held_out_loss(model, tokenizer, world, seed),
        "right": right / asked,
        "parameters": sum(total for total, _ in counts),
        "activated": sum(activated for _, activated in counts),
        # The median step, so that a busy moment does not count.
        "seconds": statistics.median(row["seconds"] for row in steps) * len(steps),
    }


@torch.no_grad()
def held_out_loss(model, tokenizer, world, seed, n=1000, batch=100):
    """The language loss on n new drawings of the known facts, or on n new scenes."""
    if world == "skills":
        samples = data.Drawn("chat", n, seed, held_out=True)
    else:
        samples = data.Facts(int(world), n, seed, held_out=True)
    encoded = data.Encoded(samples, tokenizer, model.config.template,
                           data.picture_format(model.config.vision), model.config.n_image_tokens,
                           max_length=256)
    total = 0.0
    n_labels = 0
    for start in range(0, n, batch):
        items = data.collate([encoded[i] for i in range(start, start + batch)])
        n_here = train.count_labels(items)
        out = model(items["tokens"], items["images"], labels=items["labels"])
        total += out.parts["lm"].item() * n_here
        n_labels += n_here
    return total / n_labels


# ------------------------------------------------------------------------------------------------
# 2. The table and the picture. results: {row: [the numbers of each seed]}


def spread(values, form):
    """"0.024 ± 0.003 (0.021, 0.024, 0.027)"; a single value alone."""
    if len(values) == 1:
        return form.format(values[0])
    mean = form.format(statistics.mean(values))
    each = ", ".join(form.format(value) for value in values)
    return f"{mean} ± {form.format(statistics.stdev(values))} ({each})"


def print_table(world, results):
    print(f"\n| {TITLES[world]} | loss on new pictures | right | parameters | activated | seconds |")
    print("|---|---|---|---|---|---|")
    for row, runs in results.items():
        one = runs[0]
        cells = [row, spread([run["loss"] for run in runs], "{:.3f}"),
                 spread([100 * run["right"] for run in runs], "{:.1f}"),
                 f"{one['parameters'] / 1e6:.2f}M", f"{one['activated'] / 1e6:.2f}M",
                 f"{statistics.mean(run['seconds'] for run in runs):.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def draw(everything, png):
    """A panel for each world: the loss of each row, a dot a seed and a bar for their mean."""
    width = 130 * max(len(results) for results in everything.values()) + 80
    page, pen = generate.blank_page(width, 300 * len(everything))
    for panel, (world, results) in enumerate(everything.items()):
        top = 300 * panel + 50
        bottom = top + 190
        generate.label(pen, width / 2, top - 26, f"{TITLES[world]}: loss on new pictures",
                       font=generate.FONT)
        # The axis.
        high = 1.1 * max(run["loss"] for runs in results.values() for run in runs)
        for k in range(5):
            y = bottom - (bottom - top) * k / 4
            pen.line((60, y, width - 20, y), "#dddddd")
            pen.text((54, y), f"{high * k / 4:.2g}", "black", generate.SMALL, anchor="rm")
        # The rows.
        for i, (row, runs) in enumerate(results.items()):
            x = 60 + 130 * (i + 0.5)
            losses = [run["loss"] for run in runs]
            y = bottom - (bottom - top) * statistics.mean(losses) / high
            color = "#999999" if row == "dense" else generate.EXPERT_COLORS[1]
            pen.rectangle((x - 36, y, x + 36, bottom), color)
            for loss in losses:
                y = bottom - (bottom - top) * loss / high
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), "black")
            generate.label(pen, x, bottom + 16, row)
            share = statistics.mean(100 * run["right"] for run in runs)
            generate.label(pen, x, bottom + 34, f"{share:.1f}% right")
    generate.save_png(page, png)
    print(f"wrote {png}")


# ------------------------------------------------------------------------------------------------
# 3. The program


def read_results(file):
    """-> {(world, row, seed): numbers} of what was measured before."""
    if not os.path.exists(file):
        return {}
    with open(file) as f:
        rows = [json.loads(line) for line in f]
    return {(row["world"], row["row"], row["seed"]): row for row in rows}


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(MAIN),
                        help="all, or some of: " + ", ".join(ROWS))
    parser.add_argument("--worlds", default="100,200", help="some of: " + ", ".join(WORLDS))
    parser.add_argument("--seeds", default="0", help="with commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--out", default="out/why", help="the runs' folders")
    parser.add_argument("--results", default=os.path.join(ROOT, "assets", "why.jsonl"))
    args = parser.parse_args()

    args.rows = list(ROWS) if args.rows == "all" else args.rows.split(",")
    args.worlds = args.worlds.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    for name, known in (("rows", ROWS), ("worlds", WORLDS)):
        unknown = set(getattr(args, name)) - set(known)
        if unknown:
            parser.error(f"--{name} {', '.join(sorted(unknown))}: known are {', '.join(known)}")
    return args


def main():
    args = parse()
    known = read_results(args.results)
    wanted = [(world, row, seed) for seed in args.seeds for world in args.worlds
              for row in args.rows]
    missing = [one for one in wanted if one not in known]

    # Results are written as they come.
    with ThreadPoolExecutor(args.jobs) as pool, open(args.results, "a") as f:
        for numbers in pool.map(lambda one: run(args, *one), missing):
            print(json.dumps(numbers), file=f, flush=True)
    known = read_results(args.results)

    everything = {}
    for world in args.worlds:
        everything[world] = {row: [known[world, row, seed] for seed in args.seeds]
                             for row in args.rows}
        print_table(world, everything[world])
    os.makedirs(args.out, exist_ok=True)
    draw(everything, os.path.join(args.out, "why.png"))


if __name__ == "__main__":
    main()
