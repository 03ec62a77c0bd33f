"""why.py: what do experts buy? The same training with more and more experts, in two worlds.

    python assets/why.py                    dense and 2, 4, 8 experts, 400 facts, one seed
    python assets/why.py --rows all --facts 400,1000 --seeds 0,1,2
    python assets/why.py --skills           the same rows on the drawn world: what they do not buy

A row is one run of train.py's stage 3 from the shipped backbones, in which everything trains. All
rows of a seed see the same data in the same order, and all but "dense" do the same arithmetic: two
experts for each token. Runs that are done are not repeated. Prints a table (Markdown), and draws
it.
"""
import argparse
import json
import os
import statistics
import sys

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


def run(args, row, n_facts, seed):
    """Train one row, unless it is there -> its numbers."""
    world = f"facts-{n_facts}" if n_facts else "skills"
    name = row.replace(" ", "-").replace(",", "").replace(":", "")
    out = os.path.join(args.out, world, f"{name}-{seed}")
    if not os.path.exists(os.path.join(out, "scores.jsonl")):
        flags = ["--stage", "3", "--init", train.BACKBONES, "--lr", str(args.lr),
                 "--steps", str(args.steps), "--seed", str(seed), "--out", out, *ROWS[row].split()]
        flags += ["--facts", str(n_facts)] if n_facts else []
        if os.path.exists(out):
            flags = ["--resume", "--out", out]
        train.main(flags)
    return numbers_of(out, n_facts, seed)


def numbers_of(out, n_facts, seed):
    """-> {"loss", "right", "parameters", "activated", "seconds"} of a finished run."""
    file = os.path.join(out, "numbers.json")
    if os.path.exists(file):
        with open(file) as f:
            return json.load(f)

    with open(os.path.join(out, "scores.jsonl")) as f:
        scores = json.loads(f.read().splitlines()[-1])["scores"]
    if n_facts:
        right, asked = scores["known"]
    else:
        right, asked = (sum(column) for column in zip(*scores.values()))
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]

    model, tokenizer = load(out)
    counts = train.count_parameters(model).values()
    numbers = {
        "loss": held_out_loss(model, tokenizer, n_facts, seed),
        "right": right / asked,
        "parameters": sum(total for total, _ in counts),
        "activated": sum(activated for _, activated in counts),
        "seconds": sum(row.get("seconds", 0) for row in rows),
    }
    train.write_json(file, numbers)
    return numbers


@torch.no_grad()
def held_out_loss(model, tokenizer, n_facts, seed, n=1000, batch=100):
    """The language loss on n new drawings of the known facts, or on held-out scenes."""
    samples = data.Drawn("chat", n, seed, held_out=True)
    if n_facts:
        samples = data.Facts(n_facts, n, seed, held_out=True)
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


def spread(values, form):
    """"0.024 ± 0.003 (0.021, 0.024, 0.027)"; a single value alone."""
    if len(values) == 1:
        return form.format(values[0])
    each = ", ".join(form.format(value) for value in values)
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values))} ({each})"


def print_table(results, n_facts):
    title = f"{n_facts} facts" if n_facts else "skills"
    print(f"\n| {title} | loss on new pictures | right | parameters | activated | seconds |")
    print("|---|---|---|---|---|---|")
    for row, runs in results.items():
        one = runs[0]
        cells = [row, spread([run["loss"] for run in runs], "{:.3f}"),
                 spread([100 * run["right"] for run in runs], "{:.1f}%"),
                 f"{one['parameters'] / 1e6:.2f}M", f"{one['activated'] / 1e6:.2f}M",
                 spread([run["seconds"] for run in runs][:1], "{:.0f}")]
        print("| " + " | ".join(cells) + " |", flush=True)


def draw(everything, png):
    """A panel for each world: the loss of each row, a dot a seed and a bar for their mean."""
    width = 130 * max(len(results) for results in everything.values()) + 80
    page, pen = generate.blank_page(width, 300 * len(everything))
    for panel, (n_facts, results) in enumerate(everything.items()):
        top = 300 * panel + 50
        bottom = top + 190
        title = f"{n_facts} facts" if n_facts else "skills: the drawn scenes"
        generate.label(pen, width / 2, top - 26, f"{title}: loss on pictures that it has never seen",
                       font=generate.FONT)
        high = 1.1 * max(run["loss"] for runs in results.values() for run in runs)
        for k in range(5):
            y = bottom - (bottom - top) * k / 4
            pen.line((60, y, width - 20, y), "#dddddd")
            pen.text((54, y), f"{high * k / 4:.2g}", "black", generate.SMALL, anchor="rm")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(MAIN),
                        help="all, or some of: " + ", ".join(ROWS))
    parser.add_argument("--facts", default="400", help="sizes of the world of facts, with commas")
    parser.add_argument("--skills", action="store_true", help="the drawn world instead")
    parser.add_argument("--seeds", default="0", help="with commas")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", default="out/why")
    args = parser.parse_args()

    rows = list(ROWS) if args.rows == "all" else args.rows.split(",")
    worlds = [0] if args.skills else [int(n) for n in args.facts.split(",")]
    everything = {}
    for n_facts in worlds:
        everything[n_facts] = {row: [] for row in rows}
    for seed in args.seeds.split(","):
        for n_facts in worlds:
            for row in rows:
                everything[n_facts][row].append(run(args, row, n_facts, int(seed)))
    for n_facts, results in everything.items():
        print_table(results, n_facts)
    draw(everything, os.path.join(args.out, "skills.png" if args.skills else "facts.png"))


if __name__ == "__main__":
    main()
