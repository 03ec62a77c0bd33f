"""backbones.py: stage 0 makes the pre-trained backbones of the tiny presets again.

    python assets/backbones.py                     tiny-backbones, then uni-moe-tiny-backbones
    python assets/backbones.py --kind image        the first alone: a tower and a decoder
    python assets/backbones.py --kind hearing      the second alone: these and an ear

Real presets start from CLIP, Mistral and Whisper. The drawn world has backbones of its own, so that
nothing needs to be downloaded. They are trained in the way that real ones are:

    0a    the tower, contrastively, on scenes and their captions (as CLIP)
    0b    the decoder, on text about scenes
    0c    the ear, on sounds and what they are (as Whisper)
    0d    the decoder, on text about scenes and sounds

Their results ship beside this file, so train.py never needs it. A run writes to --out: one file a
stage, log.jsonl, and a checkpoint from which --resume goes on.
"""
import argparse
import dataclasses
import functools
import os
import random
import sys
from dataclasses import dataclass

# OpenMP's threads wait for each other by spinning, on a busy machine for ages: they shall give up
# sooner. libgomp reads this when torch is loaded. What the user has set holds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data
import generate
import train
from model import IGNORE, IMAGE, PAD, Config, CuMo, TextConfig, choose_trainable
from train import say
from upcycle import add_audio, load_backbones, save_backbones

KINDS = {"image": ("0a", "0b"), "hearing": ("0c", "0d")}
PRESETS = {"image": "tiny", "hearing": "uni-moe-tiny"}
FILES = {
    "0a": "tower.safetensors",
    "0b": "tiny-backbones.safetensors",
    "0c": "ear.safetensors",
    "0d": "uni-moe-tiny-backbones.safetensors",
}
STAGES = {
    "0a": train.Stage(name="0a", lr=1e-3, batch_size=64, steps=3000),
    "0b": train.Stage(name="0b", lr=2e-3, batch_size=64, steps=4500),
    "0c": train.Stage(name="0c", lr=1e-3, batch_size=64, steps=1000),
    "0d": train.Stage(name="0d", lr=1e-3, batch_size=64, steps=1000),
}
TITLES = {
    "0a": "tower, contrastively, on captions",
    "0b": "decoder, on text",
    "0c": "ear, on descriptions of sounds",
    "0d": "decoder, on text about scenes and sounds",
}

# -------------------------------------------------------------------------------------------------
# What several stages need


@dataclass
class Parts:
    """What train.py's loop reads: {name of a loss: its value}."""
    parts: dict


def cell_phrases(scene: dict) -> list[str]:
    """What each of the nine cells shows: "top left large red circle", "center empty", ..."""
    phrases = [f"{place} empty" for place in data.PLACES]
    for cell, size, color, shape in scene["objects"]:
        phrases[cell] = f"{data.PLACES[cell]} {size} {color} {shape}"
    if scene["sign"]:
        row, word = scene["sign"]
        for cell in range(3 * row, 3 * row + 3):
            phrases[cell] = f"{data.PLACES[cell]} sign {word}"
    return phrases


def patch_cells(side: int) -> torch.Tensor:
    """(side * side,) the cell of the 3 x 3 grid in which each patch's centre lies."""
    third = torch.arange(side) * 3 // side
    return (3 * third.unsqueeze(1) + third).flatten()


# a few hundred phrases, asked for all the time
@functools.cache
def ids_of(phrase: str, tokenizer) -> list[int]:
    return tokenizer.encode(" " + phrase).ids


def small_decoder(vocab_size: int, dim: int) -> CuMo:
    """Two layers, to read or write a few words."""
    return CuMo(Config(vision=None, text=TextConfig(
        vocab_size=vocab_size, dim=dim, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=3 * dim,
        rope_theta=1e4)))


# -------------------------------------------------------------------------------------------------
# 0a: the tower


class Contrastive(nn.Module):
    """CLIP's loss (arXiv 2103.00020), for whole images and for regions.

    CLIP pulls an image and its caption together and pushes the other captions of the batch away.
    That alone teaches what is in an image but not where. So each patch is also matched with the
    words for its own cell of the grid (as RegionCLIP does, arXiv 2112.09106), on the features that
    the connector will see. The text encoder is CLIP's: causal, read off at the last token.
    """

    def __init__(self, vision, vocab_size: int, dim: int = 128):
        super().__init__()
        self.vision = vision
        self.text = small_decoder(vocab_size, dim).text
        # an embedding instead of logits
        self.text.head = nn.Linear(dim, dim, bias=False)
        self.image_head = nn.Linear(vision.config.dim, dim, bias=False)
        self.patch_head = nn.Linear(vision.config.dim, dim, bias=False)
        # logarithms of the scales by which similarities become logits: for regions, for images
        self.scale = nn.Parameter(torch.full((2,), 2.3))

    def encode_text(self, tokens):
        """(P, T) right-padded -> (P, dim) of length 1."""
        real = tokens != PAD
        x = self.text(self.text.embed(tokens.clamp(min=0)), real)  # (P, T, dim)
        last = real.sum(1) - 1
        x = x[torch.arange(len(x), device=x.device), last]  # (P, dim)
        return F.normalize(x.float(), dim=-1)

    def forward(self, tokens, labels, images, captions):
        """tokens (P, T) the batch's different phrases, labels (B, 1 + N) the phrase of each patch
        (the first label is unused), images (B, 3, S, S), captions (B, T)."""
        n_layers = self.vision.config.n_layers
        last, features = self.vision.run_layers(images, n_layers)
        patches = F.normalize(self.patch_head(features).float(), dim=-1)  # (B, N, dim)
        whole = F.normalize(self.image_head(last[:, 0]).float(), dim=-1)  # (B, dim)
        # at most 100, as in CLIP
        scale = self.scale.clamp(max=4.6).exp()

        # each patch finds its phrase among all phrases of the batch
        similar = patches @ self.encode_text(tokens).T * scale[0]  # (B, N, P)
        regions = F.cross_entropy(similar.flatten(0, 1), labels[:, 1:].flatten())

        # each image finds its caption, and each caption its image
        pairs = whole @ self.encode_text(captions).T * scale[1]  # (B, B)
        diagonal = torch.arange(len(whole), device=whole.device)
        clip = (F.cross_entropy(pairs, diagonal) + F.cross_entropy(pairs.T, diagonal)) / 2
        return Parts({"regions": regions, "clip": 0.3 * clip})


class Regions(torch.utils.data.Dataset):
    """Scenes, and how a list of them becomes a batch for Contrastive."""

    def __init__(self, size, seed, tokenizer, config):
        self.scenes = data.Drawn("caption", size, seed)
        self.tokenizer = tokenizer
        self.wanted = data.picture_format(config.vision)
        self.cells = patch_cells(config.vision.image_size // config.vision.patch_size)  # (N,)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return self.scenes[i]

    def collate(self, samples):
        end = [self.tokenizer.token_to_id("</s>")]

        # the different phrases of the batch, and which of them each patch shows
        phrases = [cell_phrases(sample["scene"]) for sample in samples]
        different = sorted({phrase for nine in phrases for phrase in nine})
        index = {phrase: i for i, phrase in enumerate(different)}
        of_cells = torch.tensor([[index[phrase] for phrase in nine] for nine in phrases])  # (B, 9)
        labels = of_cells[:, self.cells]  # (B, N)
        # train.py shifts labels by one
        labels = F.pad(labels, (1, 0), value=IGNORE)  # (B, 1 + N)

        captions = [self.tokenizer.encode(" " + data.describe(s["scene"])).ids for s in samples]
        return {
            "tokens": data.pad_rows([ids_of(p, self.tokenizer) + end for p in different], PAD),
            "labels": labels,
            "images": torch.stack([data.load_image(s["images"][0], self.wanted) for s in samples]),
            "captions": data.pad_rows([ids + end for ids in captions], PAD),
            "broken": [],
            "replaced": 0,
            "truncated": 0,
        }


def train_scene_tokenizer(vocab_size: int):
    """A tokenizer for what the tiny template will be asked to spell."""
    def texts():
        for i in range(4000):
            scene = data.make_scene(i)
            asked = data.ask_many(scene, 6, random.Random(i))
            pairs = [("Describe the scene.", data.describe(scene))]
            pairs += [(question, answer) for _, question, answer in asked]
            chat = data.render(data.as_turns(pairs), "tiny")
            yield "".join(piece.text for piece in chat) + data.describe(scene)

    return data.train_tokenizer(texts(), vocab_size)


# -------------------------------------------------------------------------------------------------
# 0b and 0d: the decoder


class TextOnly(nn.Module):
    """The decoder learns language, and the questions, from descriptions in place of images and
    sounds.

    One in ten descriptions is spelled out, its phrases in any order. The others come in the layout
    of an image: one slot a patch, which holds the sum of the embeddings of its cell's words, with
    noise. Both are text; the second has the decoder look things up by place, among slots that hold
    many words at once. That is what patches are once the connector makes them read like words. A
    sound's slots hold the words of its description one after the other.
    """

    def __init__(self, model: CuMo):
        super().__init__()
        self.model = model
        self.config = model.config

    def sum_of_words(self, bags):
        """bags (n, N, W) word ids of each slot, padded with PAD -> (n, N, D)."""
        words = self.model.text.embed(bags.clamp(min=0)) * (bags != PAD).unsqueeze(-1)
        x = words.sum(2)  # (n, N, D)
        if self.training and len(x):
            x = x + torch.randn_like(x) * x.detach().std() * 0.1
        return x

    def forward(self, tokens, labels, bags, sounds=None):
        """tokens, labels (B, T), bags (n, N, W) of images and sounds (m, Q, W)."""
        audio_embeds = None
        image_embeds = self.sum_of_words(bags)
        if sounds is not None:
            audio_embeds = self.sum_of_words(sounds)
        return self.model(tokens, labels=labels, image_embeds=image_embeds,
                          audio_embeds=audio_embeds)


class Described(torch.utils.data.Dataset):
    """Scenes in words, and for a model that hears also sounds: captions and questions.

    A sample is ids, labels, and a list of word ids for each slot of its image and of its sound.
    """

    def __init__(self, size, seed, tokenizer, config):
        self.size = size
        self.seed = seed
        self.tokenizer = tokenizer
        self.n = config.n_image_tokens
        self.n_audio = config.n_audio_tokens
        self.cells = patch_cells(config.vision.image_size // config.vision.patch_size)  # (N,)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        # what there is to see and to hear
        seed = self.seed * 100_000_007 + i
        world = "image"
        if self.n_audio:
            world = ("image", "both", "sound", "both")[i % 4]
        scene = None
        sound = None
        if world != "sound":
            scene = data.make_scene(seed)
        if world != "image":
            kinds = ("beeps", "glide") if world == "both" else tuple(data.SOUND_KINDS)
            sound = data.make_sound(seed, kinds=kinds)

        # nine in ten are laid out as the slots of an image, the others spelled out in words
        rng = random.Random(seed + 1)
        laid_out = rng.random() < 0.9
        odds = (6, 1, 1) if world == "sound" else (18, 1, 1)
        kind = rng.choices(("questions", "caption", "plain"), odds)[0]
        if laid_out:
            head = self.marks(scene, sound)
        else:
            head = self.spelled_out(scene, sound, rng)

        # what is said about it
        if kind == "questions" or world == "both":
            kind = "questions"
            pairs = self.questions(scene, sound, world, rng)
        elif scene:
            pairs = [("Describe the scene.", data.describe(scene))]
        else:
            pairs = [("Describe the sound.", data.describe_sound(sound))]

        template = "plain" if kind == "plain" and laid_out else "tiny"
        turns = data.as_turns(pairs, head)
        ids, labels = data.encode_chat(turns, self.tokenizer, template, self.n, self.n_audio)
        if not laid_out:
            return ids, labels, None, None
        return ids, labels, self.image_slots(scene), self.sound_slots(sound)

    def marks(self, scene, sound) -> str:
        head = ""
        if scene:
            head += "<image>\n"
        if sound:
            head += "<audio>\n"
        return head

    def spelled_out(self, scene, sound, rng) -> str:
        """Their descriptions, a scene's phrases in any order."""
        said = []
        if scene:
            said = [phrase + "." for phrase in data.phrases(scene).values()]
            said = rng.sample(said, len(said))
        if sound:
            said.append(data.describe_sound(sound))
        return " ".join(said) + "\n"

    def questions(self, scene, sound, world, rng) -> list[tuple[str, str]]:
        n = {"image": 5 if self.n_audio else 8, "sound": 3, "both": 10}[world]
        asked = data.ask_many(scene, n, rng, sound)
        if world == "both":
            # those that need eyes and ears
            of_both = [question for question in asked if question[0] in data.BOTH_TYPES]
            asked = of_both[:6] or asked[:3]
        return [(question, answer) for _, question, answer in asked]

    def image_slots(self, scene):
        """The word ids of each patch's cell, or None without a scene."""
        if scene is None:
            return None
        phrases = cell_phrases(scene)
        return [ids_of(phrases[cell], self.tokenizer) for cell in self.cells]

    def sound_slots(self, sound):
        """The ids of one word for each slot, then empty slots; or None without a sound."""
        if sound is None:
            return None
        words = [ids_of(word, self.tokenizer) for word in data.describe_sound(sound).split()]
        return words + [[PAD]] * (self.n_audio - len(words))

    def collate(self, samples):
        def bags(rows, n):
            """[n slots of word ids, or None, ...] -> (number of those not None, n, W)."""
            rows = [row for row in rows if row is not None]
            slots = [slot for row in rows for slot in row]
            if not slots:
                return torch.full((0, n, 1), PAD)
            width = max(len(slot) for slot in slots)
            return data.pad_rows(slots, PAD, 1).view(len(rows), n, width)

        ids, labels, images, sounds = zip(*samples)
        batch = {
            "tokens": data.pad_rows(ids, PAD),
            "labels": data.pad_rows(labels, IGNORE),
            "bags": bags(images, self.n),
            "images": [],
            "broken": [],
            "replaced": 0,
            "truncated": 0,
        }
        if self.n_audio:
            batch["sounds"] = bags(sounds, self.n_audio)
        return batch


# -------------------------------------------------------------------------------------------------
# 0c: the ear


class Transcribe(nn.Module):
    """The ear learns as Whisper is trained (arXiv 2212.04356): from a sound, write down what it is.

    The writer is thrown away afterwards.
    """

    def __init__(self, ear, vocab_size: int):
        super().__init__()
        self.ear = ear
        self.writer = small_decoder(vocab_size, ear.config.dim)
        self.config = self.writer.config

    def forward(self, tokens, labels, audio):
        # what it hears stands where an image would
        return self.writer(tokens, labels=labels, image_embeds=self.ear(audio))


class Sounds(torch.utils.data.Dataset):
    """Drawn sounds and what they are."""

    def __init__(self, size, seed, tokenizer, config):
        self.sounds = data.Drawn("sound caption", size, seed)
        self.tokenizer = tokenizer
        self.n = config.audio.n_frames // 2
        self.seconds = config.audio.n_frames / 100
        self.n_mels = config.audio.n_mels

    def __len__(self):
        return len(self.sounds)

    def __getitem__(self, i):
        sample = self.sounds[i]
        ids = self.tokenizer.encode(" " + data.describe_sound(sample["sound"])).ids
        ids = ids + [self.tokenizer.token_to_id("</s>")]
        audio = data.load_audio(sample["audio"][0], self.seconds, self.n_mels)
        return [IMAGE] * self.n + ids, [IGNORE] * self.n + ids, audio

    def collate(self, samples):
        ids, labels, audio = zip(*samples)
        return {
            "tokens": data.pad_rows(ids, PAD),
            "labels": data.pad_rows(labels, IGNORE),
            "audio": torch.cat(audio),
            "images": [],
            "broken": [],
            "replaced": 0,
            "truncated": 0,
        }


# -------------------------------------------------------------------------------------------------
# One stage, and the program


def path_of(args: train.Args, stage: str) -> str:
    """The file that a finished stage leaves."""
    return os.path.join(args.out, FILES[stage])


def settings(args: train.Args, name: str) -> train.Stage:
    """A stage's values: its own, the flags over them."""
    stage = dataclasses.replace(STAGES[name])
    for value in ("steps", "batch_size", "lr"):
        if getattr(args, value) is not None:
            setattr(stage, value, getattr(args, value))
    share = max(1, stage.batch_size // train.WORLD)
    stage.micro_batch = min(args.micro_batch or share, share)
    return stage


def begin(args: train.Args, stage: str):
    """-> the model that a stage starts from, and its tokenizer."""
    if stage == "0a":
        config = Config.from_preset(args.preset)
        tokenizer = train_scene_tokenizer(config.text.vocab_size)
        return CuMo(config), tokenizer
    if stage == "0b":
        return load_backbones(path_of(args, "0a"))
    if stage == "0d":
        return load_backbones(path_of(args, "0c"))

    # 0c: an ear for the backbones that were just made, or else for the shipped ones
    made = path_of(args, "0b")
    model, tokenizer = load_backbones(made if os.path.exists(made) else train.BACKBONES)
    model.config.balance_coef = 0.0
    model.config.z_coef = 0.0
    ear = CuMo(Config.from_preset(args.preset)).audio
    add_audio(model, ear, args.seed)
    return model, tokenizer


def objective(args: train.Args, stage: str, model: CuMo, tokenizer, n_samples: int):
    """-> the module that gives a stage's losses, with requires_grad set, and its data set."""
    vocab_size = model.config.text.vocab_size
    if stage == "0a":
        choose_trainable(model, ("vision",))
        # the contrastive loss reaches the last layer too
        model.vision.requires_grad_(True)
        samples = Regions(n_samples, args.seed + 11, tokenizer, model.config)
        return Contrastive(model.vision, vocab_size), samples
    if stage == "0c":
        samples = Sounds(n_samples, args.seed + 13, tokenizer, model.config)
        trained = Transcribe(model.audio, vocab_size)
        # sinusoids, as Whisper's
        trained.ear.pos.requires_grad_(False)
        return trained, samples
    choose_trainable(model, ("text",))
    samples = Described(n_samples, args.seed + 12, tokenizer, model.config)
    return TextOnly(model), samples


def run_stage(args: train.Args, name: str, device):
    """Train one stage and leave its file; a decoder is also asked questions in words."""
    stage = settings(args, name)
    torch.manual_seed(args.seed)
    model, tokenizer = begin(args, name)

    # Every scene is seen once.
    n_samples = stage.steps * stage.batch_size
    trained, samples = objective(args, name, model, tokenizer, n_samples)
    say(f"stage {name}: {TITLES[name]}; {stage.steps} steps of {stage.batch_size}, lr {stage.lr:g}")
    batches_from = train.make_loader(samples, stage, args, samples.collate)
    _, stopped = train.train(args, stage, trained, batches_from, device)

    if train.RANK == 0:
        save_backbones(model, path_of(args, name), tokenizer)
        worlds = {"0b": ("image",), "0d": ("image", "sound", "both")}
        for world in worlds.get(name, ()):
            scores = generate.evaluate(model, tokenizer, args.eval_questions, in_words=True,
                                       world=world)
            generate.print_table(
                scores, f"the decoder alone, on held-out {world} questions in words")
    train.finish_stage(args, stopped)


def parse(argv=None) -> tuple[list[str], train.Args]:
    """-> the kinds of backbones to make, and train.py's settings with the given flags."""
    def count(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} must be at least 1")
        return int(text)

    default = train.Args()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="default: both, one after the other")
    parser.add_argument("--out", default=os.path.join("out", "backbones"),
                        help="folder for what is made (default: out/backbones)")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --out")
    parser.add_argument("--steps", type=count, help="optimizer steps; default: the stage's")
    parser.add_argument("--batch-size", type=count, help="samples per step, over all processes")
    parser.add_argument("--micro-batch", type=count,
                        help="samples per process in one forward pass; default: all at once")
    parser.add_argument("--lr", type=float, help="peak learning rate; default: the stage's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and their order")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--matmul", choices=("highest", "high", "medium"), default=default.matmul,
                        help="as train.py's: medium is a third faster on CPUs with AMX")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile the blocks; default: off, as such short runs end "
                        "before it pays")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--save-every", type=count, default=default.save_every,
                        help="steps between checkpoints")
    parser.add_argument("--eval-questions", type=count, default=default.eval_questions,
                        help="held-out questions for a trained decoder")
    flags = vars(parser.parse_args(argv))
    kind = flags.pop("kind")
    kinds = list(KINDS) if kind is None else [kind]
    flags["out"] = os.path.normpath(flags["out"])
    return kinds, train.Args(recipe="cumo", **flags)


def main(argv=None):
    kinds, args = parse(argv)
    device = train.join_processes(args, train.prepare_device(args))
    stages = [stage for kind in kinds for stage in KINDS[kind]]
    finished = [stage for stage in stages if os.path.isfile(path_of(args, stage))]
    file, saved = train.newest_checkpoint(args.out)
    if not args.resume and (finished or file):
        raise ValueError(f"{args.out} holds {' and '.join(FILES[s] for s in finished) or file} "
                         "already: --resume, or another --out")
    if file and saved["identity"]["stage"] not in stages:
        raise ValueError(f"{file} belongs to stage {saved['identity']['stage']}: give the flags "
                         "that this run began with")
    if len(finished) == len(stages):
        raise ValueError(f"nothing to resume: {args.out} holds a finished run")
    os.makedirs(args.out, exist_ok=True)

    for kind in kinds:
        args.preset = PRESETS[kind]
        for stage in KINDS[kind]:
            if stage in finished:
                say(f"stage {stage}: done before")
            else:
                run_stage(args, stage, device)
    if train.RANK == 0:
        generate.draw_curves(os.path.join(args.out, "log.jsonl"),
                             os.path.join(args.out, "loss.png"))
        made = " and ".join(FILES[KINDS[kind][-1]] for kind in kinds)
        say(f"done. {args.out} holds {made}")
    train.leave_processes()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        # one line, without the traceback of a process that loads data
        sys.exit(f"backbones.py: {str(e).rsplit('ValueError: ', 1)[-1].strip()}")
    except KeyboardInterrupt:
        sys.exit(130)
