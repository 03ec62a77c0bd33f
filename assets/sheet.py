"""sheet.py: make assets/emoji.png, the pictures of the world of facts (data.Facts).

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python assets/sheet.py package

The pictures are Google's Noto Emoji (https://github.com/googlefonts/noto-emoji, Apache License
2.0), as the package emoji-datasource-google (MIT) has them. 1,024 that do not look like each other
are kept, on one sheet of 32 x 32, with their names in assets/emoji.txt.
"""
import json
import os
import sys

import numpy as np
from PIL import Image

SIDE = 32  # pictures in a row, rows, and pixels a side
CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects",
              "Smileys & Emotion", "Symbols")


def read_package(package):
    """-> [(row of emoji.json, RGBA picture of 64 x 64), ...] in the usual order of emoji."""
    with open(os.path.join(package, "emoji.json"), encoding="utf-8") as f:
        rows = json.load(f)
    sheet = Image.open(os.path.join(package, "img/google/sheets/64.png")).convert("RGBA")

    found = []
    for row in sorted(rows, key=lambda row: row["sort_order"]):
        if row["has_img_google"]:
            # Each picture has a margin of one pixel.
            x = 66 * row["sheet_x"] + 1
            y = 66 * row["sheet_y"] + 1
            found.append((row, sheet.crop((x, y, x + 64, y + 64))))
    return found


def distances(pictures):
    """n pictures -> (n, n): how little each is like each other one; infinite for itself."""
    small = [on_grey(picture).resize((12, 12)) for picture in pictures]
    x = np.stack([np.asarray(image, np.float32).ravel() for image in small])  # (n, 432)
    distance = np.stack([((x - one) ** 2).mean(-1) for one in x])  # (n, n)
    np.fill_diagonal(distance, np.inf)
    return distance


def choose(found, n):
    """The n that are least like any other: twins are dropped, nearest pair first."""
    distance = distances([picture for _, picture in found])
    keep = set(range(len(found)))
    while len(keep) > n:
        # Of the nearest two, the later one goes.
        one, other = np.unravel_index(distance.argmin(), distance.shape)
        gone = max(one, other)
        keep.remove(gone)
        distance[gone] = np.inf
        distance[:, gone] = np.inf
    return [found[i] for i in sorted(keep)]


def on_grey(picture):
    page = Image.new("RGB", picture.size, (128, 128, 128))
    page.paste(picture, mask=picture.getchannel("A"))
    return page


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = [(row["short_name"], picture) for row, picture in read_package(sys.argv[1])
             if row["category"] in CATEGORIES]
    chosen = choose(found, SIDE * SIDE)
    sheet = Image.new("RGBA", (SIDE * SIDE, SIDE * SIDE))
    for i, (_, picture) in enumerate(chosen):
        small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % SIDE * SIDE, i // SIDE * SIDE))

    here = os.path.dirname(os.path.abspath(__file__))
    sheet.quantize(256).save(os.path.join(here, "emoji.png"), optimize=True)
    with open(os.path.join(here, "emoji.txt"), "w", encoding="utf-8") as f:
        f.writelines(name + "\n" for name, _ in chosen)
    print(f"wrote {len(chosen)} of them")


if __name__ == "__main__":
    main()
