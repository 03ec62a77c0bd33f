"""generate.py: talk with a model about pictures, measure it, and see what its experts do.

    python generate.py --model out/tiny --image X.png --prompt "What color is the circle?"       one answer
    python generate.py --model out/tiny --image X.png                                            a chat (Ctrl-D ends it)
    python generate.py --model out/tiny --image X.png --routing routing.png                      which expert took which patch
    python generate.py --model out/tiny --eval-drawn 1200                                        accuracy on held-out drawn scenes

The default model was taught the questions of data.ask, among them: What color is the star? What shape is at the top left? Where is
the red circle? How many rings are there? Is the red circle above the blue square? What does the sign say? Describe the scene.
"""
import argparse
import math
import random
import sys

import torch
from PIL import ImageFont
from tqdm import tqdm

import data as d
from model import CuMo, MoE
from upcycle import load, write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# 1. Answers


def load_images(model: CuMo, images: list) -> torch.Tensor:
    """Paths or PIL images -> (n, 3, S, S) on the model's device."""
    return torch.stack([d.load_image(image, model.config.vision.image_size) for image in images]).to(model.text.embed.weight.device)


def eos_id(tokenizer, template: str) -> int:
    """The token that ends an answer in this template."""
    return tokenizer.encode(d.EOS[template], add_special_tokens=False).ids[-1]


def answer(model: CuMo, tokenizer, samples: list[dict], stream=None, image_embeds=None, **options) -> list[str]:
    """Samples whose conversations end with the human's turn -> the model's next turns, stripped of white space.

    options: max_new_tokens, temperature, top_p, generator (CuMo.generate). stream: called with each new piece of text of the first
    sample. image_embeds: features of the samples' images, where they were encoded before."""
    c = model.config
    rows = [d.encode_chat(s["conversations"], tokenizer, c.template, c.n_image_tokens)[0] for s in samples]
    images = None
    if image_embeds is None and any(s["images"] for s in samples):
        images = load_images(model, [image for s in samples for image in s["images"]])
    eos, said, shown = eos_id(tokenizer, c.template), [], [""]

    def on_token(token):
        said.append(int(token[0]))
        text = tokenizer.decode(said).lstrip()
        if not text.endswith("\ufffd"):                                            # a character may take several tokens
            stream(text[len(shown[0]):])
            shown[0] = text
    options.setdefault("max_new_tokens", 64)
    out = model.generate(d.pad_rows(rows, d.PAD).to(model.text.embed.weight.device), images, image_embeds=image_embeds, eos=eos,
                         on_token=on_token if stream else None, **options)
    return [tokenizer.decode([t for t in row if t != eos]).strip() for row in out.tolist()]


def chat(model, tokenizer, images: list, prompt: str | None, **options):
    """One answer to `prompt`, or without one a loop that reads questions. The images are encoded once and kept."""
    embeds, conversation = None, []
    if images:
        with torch.no_grad():
            embeds = model.encode_images(load_images(model, images))
    write = lambda text: print(text, end="", flush=True)
    while True:
        try:
            text = (prompt if prompt is not None else input("> ")).strip()
        except EOFError:
            print()
            return
        if text:
            head = "<image>\n" * (len(images) - text.count("<image>")) if not conversation else ""
            conversation.append({"from": "human", "value": head + text})
            reply = answer(model, tokenizer, [{"conversations": conversation, "images": images}], stream=write,
                           image_embeds=embeds, **options)[0]
            print()
            conversation.append({"from": "gpt", "value": reply})
        if prompt is not None:
            return


# ---------------------------------------------------------------------------------------------------------------------
# 2. Measuring on the drawn world


def drawn_questions(n: int, seed: int = 0) -> list[tuple]:
    """n (scene, type, question, answer), one a held-out scene, the types in turn."""
    out, i = [], 0
    while len(out) < n:
        scene = d.make_scene(900_000_000 + seed * 10_000_019 + i, held_out=True)
        i, kind = i + 1, d.TYPES[len(out) % len(d.TYPES)]
        if kind == "sign" and not scene["sign"] and i % 4:                         # mostly signs that are there
            continue
        if qa := d.ask(scene, kind, random.Random(i)):
            out.append((scene, kind, *qa))
    return out


def evaluate(model: CuMo, tokenizer, n: int, batch: int = 100, in_words: bool = False) -> dict:
    """{type: [right, asked]} by exact match. in_words: the scene is given as text instead of as an image."""
    scores, questions, was_training = {}, drawn_questions(n), model.training
    model.eval()
    for i in tqdm(range(0, n, batch), desc="evaluating", leave=False, mininterval=1):
        part = questions[i:i + batch]
        samples = [{"images": [] if in_words else [d.draw_scene(scene)],
                    "conversations": [{"from": "human", "value": (d.describe(scene) if in_words else "<image>") + "\n" + question}]}
                   for scene, _, question, _ in part]
        for (_, kind, _, right), reply in zip(part, answer(model, tokenizer, samples, max_new_tokens=8)):
            score = scores.setdefault(kind, [0, 0])
            score[0] += reply == right
            score[1] += 1
    model.train(was_training)
    return scores


def print_table(scores: dict, title: str):
    tqdm.write(title, file=sys.stdout)
    for kind, (right, asked) in [*scores.items(), ("all", [sum(v[i] for v in scores.values()) for i in (0, 1)])]:
        tqdm.write(f"  {kind:10} {right:5} of {asked:5}  {100 * right / asked:5.1f}%", file=sys.stdout)
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pictures of the routing

EXPERT_COLORS = ((230, 80, 60), (60, 140, 230), (250, 190, 40), (80, 180, 90), (150, 90, 200), (60, 200, 200), (240, 120, 180), (150, 150, 150))


@torch.no_grad()
def routing_of(model: CuMo, images: list) -> dict[str, torch.Tensor]:
    """{"layer 0": (n, N, K) experts of each patch, best first, ..., "connector": the same}: dense layers are left out, CLS too."""
    aux = {"vision": [], "connector": []}
    model.eval().encode_images(load_images(model, images), aux)
    layers = [i for i, layer in enumerate(model.vision.layers) if isinstance(layer.ffn, MoE)]
    out = {f"layer {i}": r.experts[:, 1:].cpu() for i, r in zip(layers, aux["vision"])}       # the base scale comes first
    return out | {"connector": r.experts.cpu() for r in aux["connector"]}


def draw_routing(model: CuMo, images: list, png: str, population: list | None = None, n_layers: int = 5):
    """Each image with its patches in the colour of their first-choice expert, layer by layer; below, the expert load per layer
    (CuMo, Figure 4) over `population`, by default the images shown. Raises ValueError for a model without experts."""
    shown = routing_of(model, images)
    if not shown:
        raise ValueError("this model is dense: there is no routing to draw")
    load = routing_of(model, population) if population else shown
    names = [n for n in shown if n != "connector"]
    n_layers = min(n_layers, len(names))                                           # spread over the depth
    names = [names[round(i * (len(names) - 1) / max(1, n_layers - 1))] for i in range(n_layers)] + ["connector"] * ("connector" in shown)
    n_experts = max([*model.config.vision.n_experts, model.config.connector.n_experts])
    panel, gap, top, bars = 192, 16, 64, 110
    width = max(640, (len(names) + 1) * (panel + gap) + gap)
    height = top + len(images) * (panel + gap) + bars + 76
    img = d.Image.new("RGB", (width, height), "white")
    draw, font, small = d.ImageDraw.Draw(img), ImageFont.load_default(16), ImageFont.load_default(13)
    color = lambda e: EXPERT_COLORS[e % len(EXPERT_COLORS)]
    draw.text((gap, 12), "First-choice expert of each patch", "black", font)
    for e in range(n_experts):
        x = 300 + e * 95
        draw.rectangle((x, 12, x + 16, 28), color(e))
        draw.text((x + 22, 12), f"expert {e}", "black", small)
    for column, name in enumerate(["image", *names]):
        draw.text((gap + column * (panel + gap) + panel / 2, top - 14), name, "black", font, anchor="mm")
    for row, image in enumerate(images):
        if not isinstance(image, d.Image.Image):
            image = d.Image.open(image)
        square = d.pad_to_square(image.convert("RGB"))                             # as the model sees it
        square = square.resize((panel, panel), d.Image.Resampling.NEAREST if square.width < panel else d.Image.Resampling.BICUBIC)
        y = top + row * (panel + gap)
        img.paste(square, (gap, y))
        for column, name in enumerate(names, 1):
            first = shown[name][row, :, 0]                                         # (N,)
            grid = math.isqrt(len(first))
            paint = torch.tensor([color(int(e)) for e in first], dtype=torch.uint8).view(grid, grid, 3).numpy()
            paint = d.Image.fromarray(paint).resize((panel, panel), d.Image.Resampling.NEAREST)
            img.paste(d.Image.blend(square.convert("L").convert("RGB"), paint, 0.55), (gap + column * (panel + gap), y))
    base = height - 44
    n_images = load[names[0]].shape[0]
    draw.text((gap, base - bars - 26), f"Expert load: share of first choices, {n_images} image{'s' * (n_images > 1)}; the line is an even load",
              "black", font)
    shares = {name: torch.bincount(load[name][..., 0].flatten(), minlength=n_experts) / load[name][..., 0].numel() for name in names}
    high = max(2 / n_experts, *(float(s.max()) for s in shares.values()))
    for column, name in enumerate(names, 1):
        x, w = gap + column * (panel + gap), panel / n_experts
        for e, v in enumerate(shares[name].tolist()):
            draw.rectangle((x + e * w + 3, base - v / high * bars, x + (e + 1) * w - 3, base), color(e))
            draw.text((x + (e + 0.5) * w, base - 10), f"{100 * v:.0f}%", "black", small, anchor="mm")
        even = base - bars / n_experts / high
        draw.line((x, even, x + panel, even), "#444444")
        draw.text((x + panel / 2, base + 16), name, "black", font, anchor="mm")
    write_atomically(png, lambda name: img.save(name, "PNG"))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/tiny", help="model folder (default: out/tiny)")
    parser.add_argument("--image", action="append", default=[], help="picture to talk about; give it again for several")
    parser.add_argument("--prompt", help="question; without it, a chat")
    parser.add_argument("--routing", metavar="FILE.png", help="draw which experts took which patches of the images")
    parser.add_argument("--eval-drawn", type=int, metavar="N", help="ask N questions about held-out drawn scenes")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this much probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(argv)
    model, tokenizer = load(args.model, args.device)
    if tokenizer is None:
        raise ValueError(f"{args.model}: no tokenizer.json in it, so there are no words to talk with")
    if args.image and model.vision is None:
        raise ValueError(f"{args.model} is a language model alone; it cannot see --image")
    if args.routing:
        if not args.image:
            raise ValueError("--routing needs at least one --image")
        draw_routing(model, args.image, args.routing)
        print(f"wrote {args.routing}")
    if args.eval_drawn:
        print_table(evaluate(model, tokenizer, args.eval_drawn), f"{args.model}: {args.eval_drawn} questions about held-out scenes, exact match")
    if args.prompt is not None or not (args.routing or args.eval_drawn):
        chat(model, tokenizer, args.image, args.prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
             top_p=args.top_p, generator=torch.Generator(args.device).manual_seed(args.seed))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"generate.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
