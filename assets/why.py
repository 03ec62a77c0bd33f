"""why.py: what do experts buy, and what do the routers' losses do? The same training in many ways.

    python assets/why.py                       the main rows of the table, one seed
    python assets/why.py --rows all --seeds 0,1,2
    python assets/why.py --worlds skills       on the drawn scenes: what experts do not buy
    python assets/why.py --rows losses         with and without the losses, upcycling, renormalising

A row is one run of train.py from the shipped backbones, in which everything trains. A world of 200
facts has 200 pictures, each with a name that nobody can guess (data.Facts). All rows of a seed see
the same data in the same order. Rows with experts in the same place do the same arithmetic: two
experts for each token. Prints the table (Markdown), and draws into --out: why.png if all of the
main rows are asked for; losses.png and apart.png with --rows losses.

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
from threading import Lock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

import data
import generate
import train
from model import CuMo
from upcycle import load, load_backbones, save, upcycle

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
# Where the experts are, by the word in front, and the color in the picture.
PLACES = {
    "dense": ("dense", "#bbbbbb"),
    "": ("in tower and connector", "#f7b267"),
    "connector": ("in the connector", "#c9ddf2"),
    "tower": ("in the tower", "#d8cdec"),
    "decoder": ("in the decoder", "#86b6e0"),
}

# The same four experts with something missing. SCRATCH and BARE begin with a model of their own.
SCRATCH = "experts from scratch"
BARE = "weights not renormalised"
LOSSES = {
    "no losses": "--n-experts 4 --balance-coef 0 --z-coef 0",
    "no balance loss": "--n-experts 4 --balance-coef 0",
    "no z loss": "--n-experts 4 --z-coef 0",
    SCRATCH: "--n-experts 4",
    BARE: "--n-experts 4",
}
FLAGS = ROWS | LOSSES

# What the worlds are called, and their flags.
WORLDS = {
    "100": "--facts 100",
    "200": "--facts 200",
    "400": "--facts 400 --steps 2000",
    "skills": "",
}
TITLES = {
    "100": "100 facts",
    "200": "200 facts",
    "400": "400 facts, twice as long",
    "skills": "skills (drawn scenes)",
}

# Torch draws the random numbers of all threads from one row, so they draw one at a time.
DRAWING = Lock()

# Small steps in small batches: what is memorised best in a given time, of what was tried.
RECIPE = "--stage 3 --lr 5e-4 --batch-size 16 --steps 1000 --eval-questions 600"


# ------------------------------------------------------------------------------------------------
# 1. Runs


def run(args, world, row, seed):
    """Train one row and measure it -> its numbers, as one line of the file of results."""
    out = folder(args, world, row, seed)
    # What is trained already, but was not noted, is only measured.
    if os.path.exists(train.run_file(out)) and train.read_run(out)["done"]:
        return {"world": world, "row": row, "seed": seed, **numbers_of(out, world, seed)}

    source = train.BACKBONES
    if row in (SCRATCH, BARE):
        with DRAWING:
            source = begin_otherwise(row, seed, os.path.join(args.out, f"{row} {seed}"))
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--init", source,
               "--seed", str(seed), "--out", out]
    command += shlex.split(f"{RECIPE} {WORLDS[world]} {FLAGS[row]}")
    # What was interrupted goes on.
    if os.path.exists(out):
        command = [*command[:2], "--resume", "--out", out]

    print(f"{world}, {row}, seed {seed}: python {shlex.join(command[1:])}", flush=True)
    # One thread each, as the runs of a batch go side by side.
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return {"world": world, "row": row, "seed": seed, **numbers_of(out, world, seed)}


def folder(args, world, row, seed):
    name = f"{world} {row} {seed}".replace(":", "")
    return os.path.join(args.out, name.replace(" ", "-"))


def begin_otherwise(row, seed, out):
    """Write a model whose experts are no copies of its FFNs, or whose weights are plain
    probabilities -> its folder."""
    torch.manual_seed(seed)  # the same connector as that of the other rows
    model, tokenizer = load_backbones(train.BACKBONES)
    model.float()
    upcycle(model, vision=4, connector=4, seed=seed)
    if row == BARE:
        model.config.vision.renormalise = False
        model.config.connector.renormalise = False
    else:
        # Experts as a new model has them; all else stays.
        new = CuMo(model.config).state_dict()
        experts = {name: tensor for name, tensor in new.items()
                   if ".ffn." in name and not name.endswith("router")
                   and name.split(".")[0] in ("vision", "connector")}
        model.load_state_dict(experts, strict=False)
    save(model, out, tokenizer)
    return out


def numbers_of(out, world, seed):
    """-> {"loss", "right", "parameters", "activated", "seconds"} of a finished run."""
    scores = generate.log_rows(os.path.join(out, "scores.jsonl"))[-1]["scores"]
    # Nobody can know the names of unknown pictures: they are a control.
    scores.pop("unknown", None)
    right, asked = (sum(column) for column in zip(*scores.values()))

    # What a step takes in quiet moments, since other programs may run too.
    steps = read_log(out)
    quick = sorted(row["seconds"] for row in steps)[len(steps) // 20]

    model, tokenizer = load(out)
    counts = train.count_parameters(model).values()
    return {
        "loss": held_out_loss(model, tokenizer, world, seed),
        "right": right / asked,
        "parameters": sum(total for total, _ in counts),
        "activated": sum(activated for _, activated in counts),
        "seconds": quick * len(steps),
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
    print(f"\n| {TITLES[world]} | loss on new pictures | % right | parameters | activated "
          "| seconds |")
    print("|---|---|---|---|---|---|")
    for row, runs in results.items():
        one = runs[0]
        cells = [row, spread([run["loss"] for run in runs], "{:.3f}"),
                 spread([100 * run["right"] for run in runs], "{:.1f}"),
                 f"{one['parameters'] / 1e6:.2f}M", f"{one['activated'] / 1e6:.2f}M",
                 f"{statistics.mean(run['seconds'] for run in runs):.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def draw_why(everything, png):
    """A panel for each world: a bar for each row's mean loss, and a dot for each seed."""
    height = 256
    page, pen = generate.blank_page(generate.WIDTH, height * len(everything))
    for k, (world, results) in enumerate(everything.items()):
        top = height * k + 70
        bottom = top + 130
        generate.label(pen, generate.WIDTH / 2, top - 50, f"{TITLES[world]}: loss on new pictures",
                       font=generate.FONT)
        shown = dict.fromkeys(place_of(row) for row in results)
        names, colors = zip(*(PLACES[name] for name in shown))
        generate.legend(pen, 60, top - 32, colors, names)

        # The axis.
        ticks = generate.round_ticks(0, max(run["loss"] for runs in results.values()
                                            for run in runs))

        def place(loss):
            return bottom - (bottom - top) * loss / ticks[-1]
        for tick in ticks:
            pen.line((60, place(tick), generate.WIDTH - 20, place(tick)), "#dddddd")
            pen.text((54, place(tick)), f"{tick:g}", "black", generate.SMALL, anchor="rm")

        # The rows.
        wide = (generate.WIDTH - 80) / len(results)
        for i, (row, runs) in enumerate(results.items()):
            x = 60 + wide * (i + 0.5)
            losses = [run["loss"] for run in runs]
            color = PLACES[place_of(row)][1]
            pen.rectangle((x - 28, place(statistics.mean(losses)), x + 28, bottom), color)
            for j, loss in enumerate(losses):
                dot = x + 14 * (j - (len(losses) - 1) / 2)
                pen.ellipse((dot - 4, place(loss) - 4, dot + 4, place(loss) + 4), "black")
            generate.label(pen, x, bottom + 14, row.rpartition(": ")[2])
            share = statistics.mean(100 * run["right"] for run in runs)
            generate.label(pen, x, bottom + 31, f"{share:.0f}% right", "#555555")
    generate.save_png(page, png)
    print(f"wrote {png}")


def place_of(row):
    """"decoder: 4 experts" -> "decoder", "4 experts" -> "" and "dense" -> "dense"."""
    return row if row == "dense" else row.rpartition(": ")[0]


def draw_losses(logs, png):
    """How a layer's tokens are shared out without the losses and with them, and what z does."""
    page, pen = generate.blank_page(880, 240)
    for k, (row, name) in enumerate({"no losses": "no losses", "4 experts": "both losses"}.items()):
        curves = []
        for e in range(4):
            points = [(log["step"] + 1, log["load"]["connector 0"][e]) for log in logs[row]]
            curves.append((f"{e}", generate.EXPERT_COLORS[e], 2, smooth(points)))
        generate.line_chart(pen, panel(k), curves, f"the connector's experts, {name}", "step",
                            "share", (0, 1))

    curves = []
    for k, (row, name) in enumerate({"no z loss": "without z", "4 experts": "with z"}.items()):
        points = [(log["step"] + 1, log["vision/z"]) for log in logs[row]]
        curves.append((name, generate.EXPERT_COLORS[k], 2, smooth(points)))
    generate.line_chart(pen, panel(2), curves, "the tower's z", "step", "z",
                        (0, max(y for *_, points in curves for _, y in points)))
    generate.save_png(page, png)
    print(f"wrote {png}")


def draw_apart(logs, png):
    """How far the copies grow apart, and what it would be to begin without a copy."""
    page, pen = generate.blank_page(590, 240)
    curves = []
    names = {"vision 0": "tower 0", "vision 1": "1", "vision 2": "2", "connector 0": "connector"}
    for k, (layer, name) in enumerate(names.items()):
        points = [(log["step"] + 1, log["apart"][layer]) for log in logs["4 experts"]]
        curves.append((name, generate.EXPERT_COLORS[k], 2, points))
    generate.line_chart(pen, panel(0), curves, "distance between experts", "step", "")

    curves = []
    for k, (row, name) in enumerate({SCRATCH: "from scratch", "4 experts": "upcycled"}.items()):
        points = [(log["step"] + 1, log["lm"]) for log in logs[row]]
        curves.append((name, generate.EXPERT_COLORS[k], 2, smooth(points)))
    generate.line_chart(pen, panel(1), curves, "training loss", "step", "loss", (0, 3))
    generate.save_png(page, png)
    print(f"wrote {png}")


def panel(k):
    """The box of the k-th panel in a row."""
    return (10 + 290 * k, 10, 286 + 290 * k, 230)


def read_log(out):
    """A row for each step."""
    return [row for row in generate.log_rows(os.path.join(out, "log.jsonl")) if "lm" in row]


def smooth(points, width=10):
    """The mean of every `width` points, where the last of them stands: a batch of 16 pictures is
    noisy."""
    groups = [points[i:i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], statistics.mean(y for _, y in group)) for group in groups]


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
                        help="all, losses, or some of: " + ", ".join(FLAGS))
    parser.add_argument("--worlds", default="100,200", help="some of: " + ", ".join(WORLDS))
    parser.add_argument("--seeds", default="0", help="with commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--out", default="out/why", help="the runs' folders")
    parser.add_argument("--results", default=os.path.join(ROOT, "assets", "why.jsonl"))
    args = parser.parse_args()

    groups = {"all": list(ROWS), "losses": ["4 experts", *LOSSES]}
    args.rows = groups.get(args.rows) or args.rows.split(",")
    args.worlds = args.worlds.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    for name, known in (("rows", FLAGS), ("worlds", WORLDS)):
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

    # Each result is written as soon as it is there.
    with open(args.results, "a") as f, ThreadPoolExecutor(args.jobs) as pool:
        def measure(one):
            f.write(json.dumps(run(args, *one)) + "\n")
            f.flush()

        list(pool.map(measure, missing))
    known = read_results(args.results)

    everything = {}
    for world in args.worlds:
        everything[world] = {row: [known[world, row, seed] for seed in args.seeds]
                             for row in args.rows}
        print_table(world, everything[world])
    os.makedirs(args.out, exist_ok=True)
    if set(MAIN) <= set(args.rows):
        draw_why(everything, os.path.join(args.out, "why.png"))
    if {"4 experts", *LOSSES} <= set(args.rows):
        folders = {row: folder(args, args.worlds[-1], row, args.seeds[0]) for row in args.rows}
        if all(os.path.exists(os.path.join(out, "log.jsonl")) for out in folders.values()):
            logs = {row: read_log(out) for row, out in folders.items()}
            draw_losses(logs, os.path.join(args.out, "losses.png"))
            draw_apart(logs, os.path.join(args.out, "apart.png"))
        else:
            print("losses.png and apart.png are drawn from the runs' logs, which are not in "
                  f"{args.out}; to train anew, name another file by --results")


if __name__ == "__main__":
    main()
