"""figures.py: the diagrams of the README. The third is drawn from train.py's tables.

    python assets/figures.py        writes architecture.svg, upcycling.svg and stages.svg beside it

Coordinates are pixels from the top left corner. The README shows 830 of them side by side.
"""
import os
import sys
from html import escape

ASSETS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(ASSETS))

import train

WIDTH = 830
GREY, BLUE, ORANGE, PALE = "#d9d9d9", "#9ec5f0", "#f7b267", "#ffe6c7"
LINE, SOFT = "#444444", "#555555"


# -------------------------------------------------------------------------------------------------
# 1. What all of them are drawn with: each function gives a piece of SVG


def text(x, y, words, size=13, anchor="middle", color="black", bold=False):
    weight = "bold" if bold else "normal"
    return (f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" '
            f'font-weight="{weight}" fill="{color}">{escape(words)}</text>')


def box(x, y, width, height, fill="white", words="", size=13, dashed=False):
    """A rectangle with words in its middle; "a|b" are two lines."""
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    pieces = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" '
              f'stroke="{LINE}"{dashes}/>']
    lines = words.split("|")
    for i, line in enumerate(lines):
        middle = y + height / 2 + (i - (len(lines) - 1) / 2) * (size + 1)
        pieces.append(text(x + width / 2, middle + size * 0.36, line, size))
    return "\n".join(pieces)


def stack(x, y, width, height, fill, words):
    """Four experts behind each other; the one in front lies in the box."""
    pieces = [box(x, y - 10 * k, width, height, fill) for k in (3, 2, 1)]
    return "\n".join([*pieces, box(x, y, width, height, fill, words)])


def arrow(x, y, to_x, to_y, color=LINE, dashed=False):
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return (f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{color}" stroke-width="1.6" '
            f'marker-end="url(#head)"{dashes}/>')


def page(height, *pieces):
    """The pieces on a white page, for readers in dark mode."""
    head = ('<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="context-stroke"/>'
            '</marker>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif">', f"<defs>{head}</defs>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *pieces, "</svg>", ""])


# -------------------------------------------------------------------------------------------------
# 2. The architecture, and which FFNs become experts


def draw_architecture():
    tower, connector, decoder = 100, 350, 560  # the left ends of the three columns
    pieces = [
        text(tower + 95, 28, "Vision tower (CLIP)", 14, bold=True),
        text(connector + 75, 28, "Connector", 14, bold=True),
        text(decoder + 95, 28, "Decoder (LLM)", 14, bold=True),
        box(tower, 40, 190, 200, "#fafafa"),
        box(connector, 40, 150, 200, "#fafafa"),
        box(decoder, 40, 190, 200, "#fafafa"),

        # What goes in and comes out.
        box(14, 116, 56, 48, "white", "image"),
        arrow(70, 140, tower - 2, 140),
        arrow(tower + 190, 140, connector - 2, 140),
        arrow(connector + 150, 140, decoder - 2, 140),
        arrow(decoder + 190, 140, decoder + 224, 140),
        text(decoder + 245, 145, "text"),
        text((tower + 190 + connector) / 2, 130, "patches", 11, color=SOFT),
        text((connector + 150 + decoder) / 2, 130, "“words”", 11, color=SOFT),
    ]

    # A block: attention, and then the FFN, which becomes a router and experts.
    for x, where in ((tower, "× every block"), (decoder, "× every (other) block")):
        pieces += [box(x + 20, 194, 150, 30, "white", "attention"),
                   arrow(x + 95, 194, x + 95, 176),
                   box(x + 40, 152, 110, 22, PALE, "router: 2 of 4", 12),
                   stack(x + 20, 112, 150, 32, ORANGE, "FFN → 4 experts"),
                   text(x + 95, 72, where, 11, color=SOFT)]
    for x, systems in ((tower + 95, "in CuMo"), (connector + 75, "in CuMo"),
                       (decoder + 95, "in MoE-LLaVA and Uni-MoE")):
        pieces.append(text(x, 57, systems, 11, bold=True))
    pieces += [box(connector + 20, 152, 110, 22, PALE, "router: 2 of 4", 12),
               stack(connector + 12, 112, 126, 32, ORANGE, "MLP → 4 experts"),
               text(connector + 75, 206, "makes of each patch", 12),
               text(connector + 75, 222, "a vector like a word’s", 12)]

    # Uni-MoE's ear; and the question.
    pieces += [box(14, 262, 56, 34, "white", "sound", dashed=True),
               arrow(70, 279, tower - 2, 279, dashed=True),
               box(tower, 262, 190, 34, "white", "ear (Whisper’s encoder)", dashed=True),
               arrow(tower + 190, 279, connector - 2, 279, dashed=True),
               box(connector, 262, 150, 34, "white", "resampler", dashed=True),
               arrow(connector + 150, 279, decoder + 40, 244, dashed=True),
               text(decoder + 110, 284, "“What color is the star?”"),
               arrow(decoder + 110, 268, decoder + 110, 244)]

    # What the colors say.
    pieces += [box(100, 318, 16, 14, ORANGE),
               text(124, 330, "FFNs that become experts, in the systems named above them", 12,
                    "start"),
               box(560, 318, 16, 14, "white", dashed=True),
               text(584, 330, "only in Uni-MoE, which also hears", 12, "start")]
    return page(346, *pieces)


# -------------------------------------------------------------------------------------------------
# 3. Upcycling: one FFN, four copies and a router


def draw_upcycling():
    pieces = [text(130, 28, "before: one FFN", 14, bold=True),
              text(540, 28, "after: four copies and a new router", 14, bold=True),
              text(22, 135, "x", 16),
              arrow(34, 130, 70, 130),
              box(72, 112, 116, 36, BLUE, "FFN, weights W"),
              arrow(188, 130, 216, 130),
              text(244, 135, "FFN(x)", 14)]

    # After: two of four copies are chosen.
    pieces += [text(312, 135, "x", 16),
               arrow(324, 130, 344, 130),
               box(346, 108, 76, 44, PALE, "router")]
    for e, weight in enumerate((0.6, None, 0.4, None)):
        y = 44 + 48 * e
        middle = y + 18
        is_chosen = weight is not None
        color = LINE if is_chosen else "#bbbbbb"
        pieces += [arrow(422, 130, 488, middle, color, dashed=not is_chosen),
                   box(490, y, 150, 36, ORANGE if is_chosen else "#fbdcb8",
                       f"expert {e}, weights W")]
        if is_chosen:
            pieces += [arrow(640, middle, 704, 130),
                       text(672, middle - 6 if middle < 130 else middle + 12, f"× {weight}", 13)]
    pieces += [f'<circle cx="716" cy="130" r="11" fill="white" stroke="{LINE}"/>',
               text(716, 135, "+", 16),
               arrow(727, 130, 746, 130),
               text(786, 135, "FFN(x)", 14)]

    # Why that is so, and what comes then.
    pieces += [text(415, 262, "0.6 · FFN(x) + 0.4 · FFN(x) = FFN(x): the same output at step 0, "
                    "whatever the router chooses,", 14),
               text(415, 282, "since its weights add up to 1 and all copies are equal.", 14),
               text(415, 310, "Then each copy learns from the tokens that it gets, "
                    "and they grow apart.", 13, color=SOFT)]
    return page(326, *pieces)


# -------------------------------------------------------------------------------------------------
# 4. What trains in each stage of the three recipes

# A part of the model, as train.py calls it -> what the picture calls it.
PARTS = {"vision": "vision tower", "connector": "connector", "audio": "ear",
         "resampler": "resampler", "text.ffn": "decoder’s FFNs", "text.router": "decoder’s routers",
         "text": "rest of decoder"}
RECIPES = {"cumo": "CuMo", "moe-llava": "MoE-LLaVA", "uni-moe": "Uni-MoE"}
COLORS = {"": "white", "frozen": GREY, "trains": BLUE, "LoRA": "#dcebfb", "experts": ORANGE,
          "experts,|LoRA": PALE}


def state(recipe, number, part):
    """One of COLORS: what becomes of a part in a stage, by train.py's tables; "" if there is no
    such part. "text" is the decoder without its FFNs."""
    args = train.parse(["--recipe", recipe])
    stage = train.settings(args, number)
    module = part.split(".")[0]
    has_experts = stage.has_experts and module in train.expert_parts(args)
    if part in ("audio", "resampler") and recipe != "uni-moe":
        return ""
    if part == "text.router":
        if not has_experts:
            return ""
        # The router of an FFN that trains trains with it.
        trains = {"text", "text.ffn", "text.router"} & set(stage.trains)
        return "trains" if trains else "frozen"

    trains = part in stage.trains or module in stage.trains
    is_expert = has_experts and part != "text"
    if trains:
        return "experts" if is_expert else "trains"
    # Adapters sit on the decoder: on its FFNs, or on all of it.
    if stage.lora and (part == "text.ffn" or (part == "text" and stage.lora[2] == "all")):
        return "experts,|LoRA" if is_expert else "LoRA"
    return "frozen"


def draw_stages():
    pieces = []
    for r, (recipe, name) in enumerate(RECIPES.items()):
        left = 130 + 234 * r
        pieces.append(text(left + 109, 24, name, 15, bold=True))
        for number in (1, 2, 3):
            x = left + 74 * (number - 1)
            stage = train.settings(train.parse(["--recipe", recipe]), number)
            times = " × 3" if recipe == "uni-moe" and number == 2 else ""
            pieces += [text(x + 35, 46, f"stage {number}{times}", 12, bold=True),
                       text(x + 35, 61, stage.kind, 10, color=SOFT)]
            for row, part in enumerate(PARTS):
                what = state(recipe, number, part)
                if what:
                    pieces.append(box(x, 70 + 36 * row, 70, 31, COLORS[what], what, 12))
    for row, name in enumerate(PARTS.values()):
        pieces.append(text(120, 90 + 36 * row, name, 13, "end"))
    bottom = 70 + 36 * len(PARTS)
    pieces.append(text(WIDTH / 2, bottom + 20, "grey: frozen.  Blue: trains, dense.  Orange: trains, "
                       "as experts.  LoRA: only thin matrices beside the weights train.", 12,
                       color=SOFT))
    pieces.append(text(WIDTH / 2, bottom + 38, "Small print: what a stage learns from. Caption: "
                       "descriptions.  Chat: questions and answers.  Mixed: images and sounds.",
                       12, color=SOFT))
    return page(bottom + 52, *pieces)


FIGURES = {"architecture.svg": draw_architecture, "upcycling.svg": draw_upcycling,
           "stages.svg": draw_stages}


def main():
    for name, draw in FIGURES.items():
        with open(os.path.join(ASSETS, name), "w", encoding="utf-8") as file:
            file.write(draw())


if __name__ == "__main__":
    main()
