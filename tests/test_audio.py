"""data.py's ears: WAV files, resampling, Whisper's features, sounds and videos in samples, and the drawn sounds."""
import hashlib
import json
import os
import random
import re
import struct
import tracemalloc
import wave
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

import data as d

# ---------------------------------------------------------------------------------------------------------------------
# WAV files


def sine(frequency, seconds=1.0, rate=16_000, level=0.5):
    return (level * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path, samples, rate=16_000, width=2, channels=1):
    """samples: float (n,) or (n, channels) in [-1, 1)"""
    scaled = np.round(np.asarray(samples, np.float64).reshape(-1) * 2 ** (8 * width - 1)).astype(np.int64)
    if width == 1:
        raw = (scaled + 128).astype(np.uint8).tobytes()
    else:
        raw = scaled.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(raw)
    return str(path)


def header(seconds, rate=16_000, fmt=1, bits=16, channels=1, data=b""):
    """A WAV's header that promises so many seconds, and what little data follows."""
    size = int(seconds * rate) * channels * bits // 8
    form = struct.pack("<IHHIIHH", 16, fmt, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size) + data


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_every_width_reads_as_written(width, channels, tmp_path):
    step = 2.0 ** (1 - 8 * width)
    left = np.array([-1, -0.5, -step, 0, step, 0.25, 1 - max(step, 2 ** -20)])
    both = np.stack([left, left[::-1]], 1)[:, :channels]
    got, rate = d.read_wav(write_wav(tmp_path / "x.wav", both, 22_050, width, channels))
    assert rate == 22_050 and got.dtype == np.float32 and got.shape == left.shape
    assert np.abs(got - both.mean(1)).max() <= 1e-7


def extensible(content, subformat=1):
    """The same WAV with the longer header that ffmpeg writes for 24 bits: the format stands in the first bytes of a GUID."""
    guid = struct.pack("<H", subformat) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    form = struct.pack("<IH", 40, 0xFFFE) + content[22:36] + struct.pack("<H", 22) + content[34:36] + bytes(4) + guid
    return b"RIFF" + struct.pack("<I", len(content) + 16) + content[8:16] + form + content[36:]


@pytest.mark.parametrize("width", [2, 3])
def test_extensible_pcm_reads_like_plain_pcm_and_other_kinds_are_refused(width, tmp_path):
    file, wave = tmp_path / "x.wav", sine(440, 0.01)
    content = open(write_wav(file, wave, 16_000, width), "rb").read()
    plain, _ = d.read_wav(file)
    file.write_bytes(extensible(content))
    assert np.array_equal(d.read_wav(file)[0], plain) and file.read_bytes() == extensible(content)
    file.write_bytes(extensible(content, 3))
    with pytest.raises(ValueError, match="x.wav: .*ffmpeg"):
        d.read_wav(file)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("channels", [1, 2])
def test_floats_read_as_written(dtype, channels, tmp_path):
    both = np.stack([sine(440), sine(880, level=1.5)], 1)[:, :channels].astype(dtype)     # floats may be louder than 1
    content = header(1, fmt=3, bits=8 * both.itemsize, channels=channels, data=both.tobytes())
    for form in (content, extensible(content, 3), piped(content, 0xFFFFFFFF)):
        (tmp_path / "x.wav").write_bytes(form)
        wave, rate = d.read_wav(tmp_path / "x.wav")
        assert wave.dtype == np.float32 and rate == 16_000 and np.abs(wave - both.mean(1)).max() < 1e-6


def piped(content, size):
    """The same WAV as a program writes it into a pipe, where it cannot come back to fill in the size."""
    at = content.index(b"data") + 4
    return content[:4] + struct.pack("<I", size) + content[8:at] + struct.pack("<I", size) + content[at + 4:]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x80000000, 0x7FFFF000])          # others, ffmpeg, arecord, sox
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_wav_from_a_pipe_is_read_to_its_end(size, width, tmp_path):
    content = open(write_wav(tmp_path / "x.wav", sine(440, 0.2), width=width), "rb").read()
    want, _ = d.read_wav(tmp_path / "x.wav")
    for rest in (b"", b"\1"[:width - 1]):                                          # a killed program leaves half a sample
        (tmp_path / "x.wav").write_bytes(piped(content, size) + rest)
        assert np.array_equal(d.read_wav(tmp_path / "x.wav", max_seconds=1)[0], want)


def test_chunks_around_the_samples_are_passed_over(tmp_path):
    content = open(write_wav(tmp_path / "x.wav", sine(440, 0.2)), "rb").read()
    want, _ = d.read_wav(tmp_path / "x.wav")
    odd, rest = b"LIST\5\0\0\0a data"[:13] + b"\0", b"id3 \4\0\0\0data"
    (tmp_path / "x.wav").write_bytes(content[:36] + odd + content[36:] + rest)
    assert np.array_equal(d.read_wav(tmp_path / "x.wav")[0], want)


def listed(content):
    """With a chunk of words behind the samples."""
    content += b"LIST\x0c\0\0\0INFOISFTLavf"
    return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]


@pytest.mark.parametrize("rate", [0, -1, float("nan"), 44_100.5])
def test_a_wave_has_a_whole_rate(rate):
    with pytest.raises(ValueError, match="sample rate of"):
        d.log_mel(np.zeros(1000, np.float32), rate)
    assert d.log_mel(sine(440, 0.2), 44_100.0).equal(d.log_mel(sine(440, 0.2), 44_100))


BAD_WAVS = {"missing": (None, "no such file; check the path"), "empty": (b"", "empty.*ffmpeg"),
            "text": (b"no sound" * 50, "ffmpeg"), "mp3": (b"ID3\4" + bytes(300), "ffmpeg"),
            "truncated": (header(2, data=bytes(16_000)), "truncated, 8000 of 32000 samples.*again"),
            "header alone": (header(2), "truncated, 0 of 32000"), "half a header": (header(2)[:30], "ends too early"),
            "0 samples": (header(0), "0 samples"), "0 samples before a list": (listed(header(0)), "0 samples"),
            "24 bits in 4 bytes": (header(1, bits=24, data=bytes(48_000)).replace(struct.pack("<HH", 3, 24), struct.pack("<HH", 4, 24)),
                                   "1 samples of 24 bits in 4 bytes; they must be packed"), "pipe without samples": (piped(header(0), 0xFFFFFFFF), "0 samples"),
            "half floats": (header(1, fmt=3, bits=16, data=bytes(32_000)), "16 bits.*format 3.*ffmpeg"),
            "mu-law": (header(1, fmt=7, bits=8, data=bytes(16_000)), "mu-law.*ffmpeg"), "MP3 inside": (header(1, fmt=85), "format 85.*ffmpeg"),
            "A-law": (header(1, fmt=6, bits=8, data=bytes(16_000)), "A-law.*ffmpeg"), "no channels": (header(1, channels=0), "0 samples"),
            "data first": (header(1).replace(b"fmt ", b"tmf "), "before their format"), "RF64": (b"RF64" + header(1)[4:], "RIFF.*ffmpeg"),
            "rate of 0": (header(0.001, data=bytes(32)).replace(struct.pack("<I", 16_000), bytes(4)), "0 Hz"),
            "64 bits": (header(1, bits=64, data=bytes(128_000)), "64 bits"),
            "3 hours": (header(3 * 3600), "10,800 s of sound, over the limit of 600 s; cut it")}


@pytest.mark.parametrize("kind", BAD_WAVS)
def test_bad_wav_is_a_value_error_naming_file_and_remedy(kind, tmp_path):
    content, message = BAD_WAVS[kind]
    if content is not None:
        (tmp_path / "bad-sound.wav").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad-sound.wav: .*{message}"):
        d.load_audio(tmp_path / "bad-sound.wav")


def test_wav_cut_anywhere_is_a_value_error(tmp_path):
    content = open(write_wav(tmp_path / "x.wav", sine(440, 0.1)), "rb").read()
    for cut in [*range(0, 60), *range(60, len(content), 97), len(content) - 1]:
        (tmp_path / "cut.wav").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="cut.wav"):
            d.read_wav(tmp_path / "cut.wav")


def test_a_three_hour_wave_is_refused_before_it_is_computed():
    hours = np.broadcast_to(np.float32(0), 3 * 3600 * 16_000)                      # no memory behind it
    with pytest.raises(ValueError, match="10,800 s.*limit of 600 s"):
        d.log_mel(hours, 16_000)
    with pytest.raises(ValueError, match="limit of 30 s"):
        d.log_mel(hours[:16_000 * 31], 16_000, seconds=1.5)
    assert d.MAX_CHUNKS == 20 and d.log_mel(np.zeros(16_000 * 30), 16_000, seconds=1.5).shape == (20, 80, 150)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_wave_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        d.log_mel(np.array([0, bad, 0.5]), 16_000)


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 100))])
def test_what_is_no_mono_wave_is_a_value_error(bad):
    with pytest.raises(ValueError, match="mono"):
        d.log_mel(bad, 16_000)


# ---------------------------------------------------------------------------------------------------------------------
# Resampling


def level(y, frequency):
    """The amplitude of a tone in the middle second of a three-second wave at 16 kHz."""
    middle, window = y[16_000:32_000].astype(np.float64), np.hanning(16_000)
    return 2 * abs((middle * window * np.exp(-2j * np.pi * frequency * np.arange(16_000) / 16_000)).sum()) / window.sum()


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_frequency_and_level_up_to_nine_tenths(rate):
    for part in (0.02, 0.31, 0.62, 0.9):
        f = round(part * min(rate, 16_000) / 2)
        y = d.resample(sine(f, 3, rate), rate)
        assert y.dtype == np.float32 and len(y) == 48_000
        assert abs(20 * np.log10(level(y, f) / 0.5)) < 0.05
        assert np.abs(y[16_000:32_000] - sine(f, 3)[16_000:32_000]).max() < 5e-4   # the very same tone, phase and all


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_what_lies_above_the_new_nyquist_is_60_db_down(rate):
    for f in np.linspace(8000, rate / 2 - 1, 12):
        y = d.resample(sine(f, 3, rate, level=1), rate)[16_000:32_000]
        assert 10 * np.log10(2 * np.mean(y.astype(np.float64) ** 2) + 1e-12) < -60


def test_upsampling_adds_no_images_above_the_old_nyquist():
    spectrum = np.abs(np.fft.rfft(d.resample(sine(3600, 3, 8000), 8000)[16_000:32_000] * np.hanning(16_000)))
    assert spectrum.argmax() == 3600 and 20 * np.log10(spectrum[4000:].max() / spectrum.max()) < -60


@pytest.mark.parametrize("rate", [11_025, 44_099])
def test_odd_rates_need_no_large_table(rate):
    x = sine(441, 0.1, rate)
    tracemalloc.start()                                                            # 16,000 filters would need 40 MB and more
    y = d.resample(x, rate)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 and abs(len(y) - 1600) <= 1 and np.abs(y - sine(441)[:len(y)])[400:1200].max() < 5e-4


@pytest.mark.parametrize("rate", [0, 44, 5_000_000])
def test_absurd_rate_is_a_value_error(rate):
    with pytest.raises(ValueError, match=f"sample rate of {rate} Hz"):
        d.resample(np.zeros(100, np.float32), rate)


# ---------------------------------------------------------------------------------------------------------------------
# Whisper's features

WAVES = {"sweep": np.sin(2 * np.pi * (100 * (t := np.arange(48_000) / 16_000) + 1200 * t ** 2)).astype(np.float32),
         "silence": np.zeros(20_000, np.float32), "30 s of noise": np.random.default_rng(0).normal(0, 0.1, 480_000).astype(np.float32),
         "one sample": np.ones(1, np.float32)}


@pytest.mark.parametrize("n_mels", [80, 128])                                     # up to large-v2; large-v3
@pytest.mark.parametrize("kind", WAVES)
def test_log_mel_equals_transformers(kind, n_mels):
    transformers = pytest.importorskip("transformers")
    want = transformers.WhisperFeatureExtractor(n_mels)(WAVES[kind], sampling_rate=16_000, return_tensors="pt").input_features
    got = d.log_mel(WAVES[kind], 16_000, n_mels=n_mels)
    assert got.shape == want.shape == (1, n_mels, 3000) and got.dtype == torch.float32 and (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("n_mels", [80, 128])
def test_mel_filters_equal_transformers(n_mels):
    audio = pytest.importorskip("transformers.audio_utils")
    want = audio.mel_filter_bank(201, n_mels, 0, 8000, 16_000, norm="slaney", mel_scale="slaney").T
    assert np.abs(d.whisper_ear(n_mels)[1].numpy() - want).max() < 1e-7


def test_chunks_are_computed_each_for_itself():
    x = np.concatenate([sine(440, 30), sine(880, 30, level=0.001), sine(300, 7)])
    mel = d.log_mel(x, 16_000)
    assert mel.shape == (3, 80, 3000)
    for chunk, part in zip(mel, (x[:480_000], x[480_000:960_000], x[960_000:])):
        assert torch.equal(chunk, d.log_mel(part, 16_000)[0])
    assert (mel.amax((1, 2)) - mel.amin((1, 2)) <= 2 + 1e-6).all()                 # 80 dB, of its own loudest point
    assert d.log_mel(x[:24_000], 16_000, 1.5).shape == (1, 80, 150) and d.log_mel(x[:24_001], 16_000, 1.5).shape == (2, 80, 150)


def test_path_and_wave_and_any_rate_give_the_same_features(tmp_path):
    mels = [d.load_audio((sine(440, 2, rate), rate), 2) for rate in (16_000, 44_100, 8000)]
    assert torch.equal(d.load_audio(write_wav(tmp_path / "x.wav", sine(440, 2)), 2), d.log_mel(*d.read_wav(tmp_path / "x.wav"), 2))
    for mel in mels[1:]:
        assert mel.shape == (1, 80, 200) and (mel - mels[0]).abs()[:, 5:30, 10:190].max() < 0.4
        assert torch.equal(mel.mean(2).argmax(), mels[0].mean(2).argmax())


# ---------------------------------------------------------------------------------------------------------------------
# Sounds and videos in samples


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = d.train_tokenizer(["What is it? A red ring. Yes, no, five."] * 3, 300)
    tokenizer.add_special_tokens(sorted({mark for form in d.TEMPLATES.values() for mark in form.tokens}))
    return tokenizer


def item(*texts, images=(), **more):
    return {"id": "n", "images": list(images), "conversations": turns(*texts), **more}


def encoded(samples, tokenizer, **kw):
    return d.Encoded(samples, **{**dict(tokenizer=tokenizer, template="tiny", pictures=16, n_image_tokens=4, max_length=96,
                                        n_audio_tokens=3, seconds=1.0), **kw})


SHORT, LONG = (sine(440, 0.5), 16_000), (sine(880, 2.5), 16_000)                   # one chunk of a second; three
COLORS = [Image.new("RGB", (20, 20), c) for c in ("red", "orange", "yellow", "green", "blue", "purple", "white", "gray", "black", "pink")]
RED, BLUE = COLORS[0], COLORS[4]


def test_every_chunk_of_a_long_sound_fills_its_own_slots(tokenizer):
    sample = item("<image>\n<audio> and <audio>\nWhat?", "Yes.", images=[RED], audio=[LONG, SHORT])
    x = encoded([sample], tokenizer)[0]
    assert x["audio"].shape == (4, 80, 100) and torch.equal(x["audio"], torch.cat([d.load_audio(LONG, 1.0), d.load_audio(SHORT, 1.0)]))
    runs = [len(run) for run in re.findall("a+", "".join("a" if i == d.AUDIO else "." for i in x["tokens"].tolist()))]
    assert runs == [9, 3] and (x["tokens"] == d.IMAGE).sum() == 4 and (x["labels"][x["tokens"] < 0] == d.IGNORE).all()
    assert "frames" not in x
    assert torch.equal(encoded([sample], tokenizer, n_mels=128)[0]["audio"][3:], d.load_audio(SHORT, 1.0, 128))
    assert encoded([item("What?", "Yes.")], tokenizer, n_mels=128)[0]["audio"].shape == (0, 128, 100)


def test_encode_chat_takes_one_number_for_each_audio_mark(tokenizer):
    chat = turns("<audio>\nWhat?", "Yes.", "And <audio>?", "No.")
    for template in d.TEMPLATES:
        a, b = (d.encode_chat(chat, tokenizer, template, 4, n) for n in ([2, 2], 2))
        assert a == b and a[0].count(d.AUDIO) == 4
        ids = d.encode_chat(chat, tokenizer, template, 4, [5, 1])[0]
        assert [i for i in ids if i != d.AUDIO] == [i for i in a[0] if i != d.AUDIO] and ids.count(d.AUDIO) == 6
    for wrong in ([], [2], [2, 2, 2]):
        with pytest.raises(ValueError, match=f"2 <audio>.*list of {len(wrong)}"):
            d.encode_chat(chat, tokenizer, "tiny", 4, wrong)
    assert d.AUDIO not in d.encode_chat(chat, tokenizer, "tiny", 4)[0]             # to the deaf an HTML tag
    assert tokenizer.decode(d.encode_chat(turns("<audio>", "Yes."), tokenizer, "tiny", 4, 0)[0]).count("<audio>") == 1


BAD_SENSES = {"too few sounds": (item("<audio><audio>", "Yes.", audio=[SHORT]), {}, "2 <audio>, the sample has 1 sounds"),
              "too many sounds": (item("<audio>", "Yes.", audio=[SHORT] * 2), {}, "1 <audio>, the sample has 2 sounds"),
              "an image among videos": (item("<image><video>", "Yes.", video=[[RED]]), {}, "1 <image>, the sample has 0 images"),
              "video without mark": (item("<image>", "Yes.", images=[RED], video=[[RED]]), {}, "0 <video>, the sample has 1 videos"),
              "frames without end": (item("<video>", "Yes.", video=[[]]), {}, "without frames"),
              "deaf": (item("<audio>", "Yes.", audio=[SHORT]), {"n_audio_tokens": 0}, "hears nothing; leave them out"),
              "missing sound": (item("<audio>", "Yes.", audio=["/nowhere/gone.wav"]), {}, "gone.wav: no such file"),
              "long sound": (item("<audio>", "Yes.", audio=[(np.zeros(16_000 * 21), 16_000)]), {}, "21 s of sound, over the limit of 20 s"),
              "sound cut off": (item("What?", "Yes. " * 60, "And <audio>", "No.", audio=[SHORT]), {}, "over the limit of 96.*lose a sound"),
              "missing frame": (item("<video>", "Yes.", video=[["/nowhere/f.png"]]), {}, "f.png: no such file"),
              "frames of two sizes": (item("<video>", "Yes.", video=[[RED, Image.new("RGB", (30, 10))]]), {}, r"\(30, 10\).*\(20, 20\)")}


@pytest.mark.parametrize("kind", BAD_SENSES)
def test_sample_whose_files_do_not_fit_is_a_value_error(kind, tokenizer):
    sample, how, message = BAD_SENSES[kind]
    with pytest.raises(ValueError, match=message):
        encoded([sample], tokenizer, strict=True, **how)[0]
    good = item("Why?", "No.")
    assert re.search(message, encoded([sample, good], tokenizer, **how)[0]["broken"][0])


def test_frame_of_another_size_is_named(tmp_path, tokenizer):
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for i, file in enumerate(files):
        Image.new("RGB", (20, 20 + 4 * (i == 2))).save(file)
    with pytest.raises(ValueError, match=r"2\.png.*\(20, 24\).*\(20, 20\)"):
        encoded([item("<video>", "Yes.", video=[files])], tokenizer, strict=True)[0]


@pytest.mark.parametrize("mark", ["<image>", "<audio>", "<video>"])
def test_a_mark_without_a_file_is_a_word_as_in_llava(mark, tokenizer):
    others = {"images": [RED], "video": [[RED]], "audio": [SHORT]}
    others.pop({"<image>": "images", "<audio>": "audio", "<video>": "video"}[mark])
    if mark == "<image>":
        others.pop("video")                                                        # its frames become images: the word is refused there
    places = "".join({"images": "<image>", "video": "<video>", "audio": "<audio>"}[kind] for kind in others)
    for files, places in (({}, ""), (others, places)):
        x = encoded([item(f"{places}Is  {mark} a tag? ", f"{mark} is.", **files)], tokenizer, strict=True)[0]
        text = tokenizer.decode([i for i in x["tokens"].tolist() if i >= 0], skip_special_tokens=False)
        assert f"Is  {mark} a tag?" in text and f"<a> {mark} is.</s>" in text and x["broken"] == []
        assert sorted({i for i in x["tokens"].tolist() if i < 0}) == sorted([-201] * ("audio" in files) + [-200] * bool(files.keys() - {"audio"}))


def test_a_sample_without_sound_keeps_the_word_for_a_deaf_model(tokenizer):
    x = encoded([item("What is <audio> in HTML?", "Yes.")], tokenizer, n_audio_tokens=0)[0]
    assert "audio" not in x and "<audio>" in tokenizer.decode(x["tokens"].tolist())


def shown(images):
    """Which of COLORS each image tensor is."""
    known = torch.stack([d.load_image(c, 16) for c in COLORS])
    return [int((known - image).abs().amax((1, 2, 3)).argmin()) for image in images]


@pytest.mark.parametrize("n, most, want", [(10, 8, [0, 1, 3, 4, 5, 6, 8, 9]), (8, 8, list(range(8))), (3, 8, [0, 1, 2]), (10, 1, [5]),
                                           (10, 2, [2, 7])])
def test_frames_are_taken_evenly(n, most, want):
    _, images, _, frames, _ = d.load_senses(item("<video>", "Yes.", video=[COLORS[:n]]), 16, max_frames=most)
    assert shown(images) == want and frames == [len(want)]


def test_averaged_video_takes_one_images_slots_and_frames_say_how_many_stand_behind(tokenizer):
    sample = item("<image> then <video>, <image>?", "Yes.", "And <video>", "No.", images=[BLUE, RED], video=[COLORS[1:4], COLORS[5:10]])
    chat, images, audio, frames, slots = d.load_senses(sample, 16)
    assert [t["value"] for t in chat][::2] == ["<image> then <image>, <image>?", "And <image>"] and (audio, slots) == (None, 0)
    assert frames == [1, 3, 1, 5] and shown(images) == [4, 1, 2, 3, 0, 5, 6, 7, 8, 9]
    assert sample["conversations"][0]["value"].count("<video>") == 1               # the sample stays as it was
    x = encoded([sample], tokenizer)[0]
    assert (x["tokens"] == d.IMAGE).sum() == 4 * 4 and x["images"].shape[0] == 10 and list(x["frames"]) == frames


def test_video_that_is_not_averaged_takes_an_images_slots_a_frame(tokenizer):
    sample = item("<image> then <video>", "Yes.", images=[BLUE], video=[COLORS[1:4]])
    x = encoded([sample], tokenizer, average=False)[0]
    assert (x["tokens"] == d.IMAGE).sum() == 4 * 4 and shown(x["images"]) == [4, 1, 2, 3] and list(x["frames"]) == [1] * 4


def test_collate_joins_sounds_and_frames_in_order(tokenizer):
    samples = [item("<audio>", "Yes.", audio=[SHORT]), item("<video>", "Yes.", video=[COLORS[:2]]), item("Why?", "No."),
               item("<image><image><audio>", "Yes.", images=[RED, BLUE], audio=[LONG])]
    data = encoded(samples, tokenizer)
    rows = [data[i] for i in range(4)]
    batch = d.collate(rows)
    assert torch.equal(batch["audio"], torch.cat([d.load_audio(SHORT, 1.0), d.load_audio(LONG, 1.0)]))
    assert (batch["tokens"] == d.AUDIO).sum(1).tolist() == [3, 0, 0, 9]
    assert batch["frames"].dtype == torch.int64 and batch["frames"].tolist() == [2, 1, 1, 1, 1]    # two blank images behind
    assert len(batch["images"]) == batch["frames"].sum() == 6 and not batch["images"][4:].any()
    assert (batch["tokens"] == d.IMAGE).sum(1).tolist() == [0, 4, 0, 8]
    silent = d.collate([rows[2]])
    assert silent["audio"].shape == (1, 80, 100) and not silent["audio"].any() and "frames" not in silent
    assert not {"audio", "frames"} & set(d.collate([encoded(samples, tokenizer, n_audio_tokens=0)[2]]))


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.png", "f9.png", "f1.png", "a2.jpg", "notes.txt", "f010b.png"):
        (tmp_path / name).touch()
    assert [os.path.basename(f) for f in d.video_files(str(tmp_path), "", "x")[0]] == ["a2.jpg", "f1.png", "f9.png", "f10.png", "f010b.png"]


def test_json_brings_sounds_and_videos(tmp_path):
    for name in ("clip/002.png", "clip/010.png", "clip/001.JPG", "other/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        RED.save(tmp_path / name)
    (tmp_path / "clip/notes.txt").write_text("no frame")
    chat = turns("<audio>\n<video> What?", "Yes.")
    samples = [{"audio": "a.wav", "video": "clip", "conversations": chat},
               {"audio": ["a.wav", "b.wav"], "video": ["other/1.png", "clip/001.JPG"], "conversations": chat},
               {"video": ["clip", "other"], "conversations": chat}, {"video": [["other/1.png"], "clip"], "conversations": chat},
               {"conversations": chat}]
    (tmp_path / "x.json").write_text(json.dumps(samples))
    data = d.LlavaJson(tmp_path / "x.json", str(tmp_path))
    below = lambda *names: [str(tmp_path / name) for name in names]
    clip, other = below("clip/001.JPG", "clip/002.png", "clip/010.png"), below("other/1.png")
    assert [s["audio"] for s in data] == [below("a.wav"), below("a.wav", "b.wav"), [], [], []]
    assert [s["video"] for s in data] == [[clip], [other + clip[:1]], [clip, other], [other, clip], []]
    assert data.lengths(10, 7) == [4 + 17] * 5 and data.lengths() == [4] * 5


@pytest.mark.parametrize("wrong, message", [
    ({"audio": 5}, "'audio' must"), ({"audio": [5]}, "'audio' must"), ({"video": 5}, "'video' must"), ({"video": [5]}, "'video' must"),
    ({"video": [[5]]}, "'video' must"), ({"video": {"a": 1}}, "'video' must"), ({"video": "gone"}, "gone: no folder of frames.*ffmpeg"),
    ({"video": "empty"}, "empty: no folder of frames")])
def test_sounds_and_videos_of_wrong_type_are_value_errors_naming_the_sample(wrong, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text(json.dumps([{"conversations": turns("Why?", "No.")}, {"conversations": [], **wrong}]))
    with pytest.raises(ValueError, match=f"x.json: sample 2: .*{message}"):
        d.LlavaJson(tmp_path / "x.json", str(tmp_path))[1]


# ---------------------------------------------------------------------------------------------------------------------
# Drawn sounds. What the wave says is read from it by somebody who knows nothing of data.draw_sound.


def heard(x):
    """The parts of a wave: [(start, end, fundamental at a fifth, at four fifths, share of power in the fundamental, partials)]"""
    power = np.convolve(x.astype(np.float64) ** 2, np.ones(320) / 320, "same")
    on = np.flatnonzero(np.diff(np.concatenate([[0], power > 0.15 * np.median(power[power > power.max() / 4]), [0]]).astype(int)))
    parts = []
    for a, b in on.reshape(-1, 2):
        if b - a > 600:
            spectra = []
            for at in (0.2, 0.8):
                middle = int(a + at * (b - a))
                piece = x[max(0, middle - 512):middle + 512]
                spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 16_000))              # a bin is a hertz
                spectra.append((spectrum, next(f for f in range(80, 8000) if spectrum[f] > 0.35 * spectrum.max()
                                               and spectrum[f] == spectrum[max(0, f - 60):f + 60].max())))
            spectrum, f = spectra[0]
            peak = lambda k: spectrum[int(k * f) - 15:int(k * f) + 16].max() / spectrum[f - 15:f + 16].max()
            parts.append((a, b, spectra[0][1], spectra[1][1], "buzz" if peak(3) > 0.2 else "organ" if peak(2) > 0.2 else "whistle"))
    return parts


@pytest.fixture(scope="module")
def sounds():
    return [d.make_sound(i) for i in range(500)] + [d.make_sound(i, True) for i in range(100)]


def test_the_wave_sounds_as_described(sounds):
    """Kind, number, pitch, timbre, loudness, direction and order, all from the wave."""
    for sound in sounds[-150:]:
        x, rate = d.draw_sound(sound)
        assert x.dtype == np.float32 and x.shape == (24_000,) and rate == 16_000 and np.abs(x).max() < 1
        parts = heard(x)
        words = [(min(d.PITCHES, key=lambda p: abs(np.log((f + g) / 2 / d.PITCHES[p]))), timbre) for _, _, f, g, timbre in parts]
        loudness = "loud" if np.abs(x).max() > 0.1 else "soft"
        first = " ".join(words[0])
        rise = parts[0][3] / parts[0][2]
        if len(set(words)) == 2 and len(words) == 2:
            said = f"{first}, then {' '.join(words[1])}, {loudness}."
        elif not 0.9 < rise < 1.1:
            said = f"one {loudness} {first} {'rising' if rise > 1 else 'falling'}."
        else:
            said = f"{d.NUMBERS[len(parts)]} {loudness} {first} beep{'s' * (len(parts) > 1)}."
        assert said == d.describe_sound(sound), sound


def truth(caption, question):
    """The answer, read from the caption alone."""
    is_, words = lambda pattern: re.fullmatch(pattern, question), caption.rstrip(".").replace(",", "").split()
    if is_(r"How many beeps are there\?"):
        return words[0]
    if is_(r"Does the sound rise or fall\?"):
        return {"rising": "rises", "falling": "falls"}[words[-1]]
    if is_(r"Which sound is higher, the first or the second\?"):
        order = ("low", "middle", "high")
        return "first" if order.index(words[0]) > order.index(words[3]) else "second"
    if is_(r"What makes the sound\?"):
        return words[3]
    if is_(r"Is the sound loud or soft\?"):
        return next(w for w in ("loud", "soft") if w in words)
    if m := is_(r"Which comes first, the (\w+) or the (\w+)\?"):
        assert {m[1], m[2]} == {words[1], words[4]} and m[1] != m[2]
        return words[1]
    raise AssertionError(question)


def truth_of_both(scene, sound, question):
    is_, objects, n = lambda pattern: re.fullmatch(pattern, question), scene["objects"], sound["beeps"]
    count = lambda words: sum(words.split()[0] in (o[2], o[3], o[3] + "s", o[3] + "es") for o in objects)
    if m := is_(r"Are there as many beeps as (.+)\?"):
        return "yes" if count(m[1]) == n else "no"
    if is_(r"Are there more beeps or more shapes\?"):
        return "beeps" if n > len(objects) else "shapes" if n < len(objects) else "equal"
    if m := is_(r"What color is the shape at the (.+) if the sound rises, at the (.+) if it falls\?"):
        colors = [next(o[2] for o in objects if d.PLACES[o[0]] == place) for place in m.groups()]
        assert colors[0] != colors[1]
        return colors[sound["way"] == "falls"]
    if m := is_(r"How many beeps and (.+) are there together\?"):
        return "zero one two three four five".split()[n + count(m[1])]
    raise AssertionError(question)


@pytest.fixture
def unseen(monkeypatch):
    """What the questions are does not depend on drawing, which takes most of the time."""
    monkeypatch.setattr(d, "draw_scene", lambda scene: None)
    monkeypatch.setattr(d, "draw_sound", lambda sound: None)


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_what_sound_and_scene_say(held_out, unseen):
    counts = Counter()
    for sample in d.Drawn("mixed chat", 900, seed=4, held_out=held_out):
        conversation, senses = sample["conversations"], ("scene" in sample, "sound" in sample)
        head = "<image>\n" * senses[0] + "<audio>\n" * senses[1]
        assert (len(sample["images"]), len(sample["audio"])) == senses and conversation[0]["value"].startswith(head)
        questions = [t["value"].removeprefix(head) for t in conversation[::2]]
        assert len(set(questions)) == len(questions) == len(sample["types"]) and not re.search("<", " ".join(questions))
        for kind, question, turn in zip(sample["types"], questions, conversation[1::2]):
            counts[kind] += 1
            if kind in d.SOUND_TYPES:
                assert truth(d.describe_sound(sample["sound"]), question) == turn["value"]
            elif kind in d.BOTH_TYPES:
                seen, answer = turn["value"].split(": ")
                assert truth_of_both(sample["scene"], sample["sound"], question) == answer
                assert re.split(" and |, ", seen)[0] == (sample["sound"]["way"] or d.NUMBERS[sample["sound"]["beeps"]])
            else:
                assert kind in d.TYPES and senses[0]
    assert set(counts) == set(d.TYPES + d.SOUND_TYPES + d.BOTH_TYPES)


def test_hard_questions_are_asked_more_than_easy_ones(unseen):
    sounds, both = list(d.Drawn("sound chat", 600)), [kind for sample in d.Drawn("both chat", 300) for kind in sample["types"]]
    asked = {kind: Counter(t for s in sounds if s["sound"]["kind"] == kind for t in s["types"]) for kind in d.SOUND_KINDS}
    for kind, hard in (("beeps", "beeps"), ("glide", "glide"), ("pair", "higher")):
        assert asked[kind][hard] > 1.2 * asked[kind]["loudness"] > 0
    assert sum(kind in d.BOTH_TYPES for kind in both) > 0.45 * len(both)           # (a scene and a sound offer only so many)
    assert Counter(len(s["types"]) for s in sounds)[2] > 570 and all(s["types"] for s in sounds)


@pytest.mark.parametrize("held_out", [False, True])
def test_no_answer_can_be_guessed_from_its_question(held_out, unseen):
    """Training balances two-way answers; the few held-out sounds at least have every answer, none of them mostly."""
    said = defaultdict(Counter)
    for kind in ("sound chat", "both chat"):
        for sample in d.Drawn(kind, 1500, seed=5, held_out=held_out):
            for kind_, turn in zip(sample["types"], sample["conversations"][1::2]):
                said[kind_][turn["value"].split(": ")[-1]] += 1
    share = lambda kind: max(said[kind].values()) / said[kind].total()
    for kind in ("glide", "higher", "loudness", "as many"):
        assert len(said[kind]) == 2 and share(kind) < 0.6, (kind, said[kind])
    for kind, n in (("beeps", 5), ("timbre", 3), ("more", 3), ("if rises", 8), ("together", 4)):
        assert len(said[kind]) == n and share(kind) < (0.6 if held_out else 0.5), (kind, said[kind])
    assert share("order") < (0.65 if held_out else 0.45)


def test_as_many_needs_both_senses():
    """Neither the number of beeps nor the number of shapes asked about tells the answer."""
    by_beeps, by_shapes = defaultdict(Counter), defaultdict(Counter)
    for i in range(6000):
        scene, sound, rng = d.make_scene(i), d.make_sound(i, kinds=("beeps",)), random.Random(i)
        if qa := d.ask_both(scene, sound, "as many", rng):
            word = re.fullmatch(r"Are there as many beeps as (.+)\?", qa[0])[1]
            shapes = sum(word.split()[0] in (o[2], o[3] + "s", o[3] + "es") for o in scene["objects"])
            answer = qa[1].split(": ")
            assert answer[0] == f"{d.NUMBERS[sound['beeps']]} and {d.NUMBERS[shapes]}"
            by_beeps[sound["beeps"]][answer[1]] += 1
            by_shapes[shapes][answer[1]] += 1
    for counter in [*by_beeps.values(), *(c for c in by_shapes.values() if c.total() > 100)]:
        if counter.total() > 100:
            assert 0.25 < counter["yes"] / counter.total() < 0.75, (by_beeps, by_shapes)


def test_sounds_and_samples_are_functions_of_their_seed():
    assert d.make_sound(7) == d.make_sound(7) and d.make_sound(7, True) == d.make_sound(7, True) != d.make_sound(7)
    assert np.array_equal(d.draw_sound(d.make_sound(7))[0], d.draw_sound(d.make_sound(7))[0])
    for kind in ("sound caption", "sound chat", "both chat", "mixed chat"):
        a, b, other = (d.Drawn(kind, 20, seed=s) for s in (1, 1, 2))
        for i in (19, 4, 2):
            assert a[i]["conversations"] == b[i]["conversations"] and np.array_equal(a[i]["audio"][0][0], b[i]["audio"][0][0])
            assert a[i]["sound"] != other[i]["sound"]
    image, sound, both = (d.Drawn(kind, 9, seed=1) for kind in d.MIXED["mixed chat"])
    mixed = d.Drawn("mixed chat", 9, seed=1)
    for i in range(9):
        assert mixed[i]["conversations"] == (image, sound, both)[i % 3][i]["conversations"]
    sample = d.Drawn("sound caption", 3)[1]
    assert [t["value"] for t in sample["conversations"]] == ["<audio>\nDescribe the sound.", d.describe_sound(sample["sound"])]
    assert sample["images"] == [] and "scene" not in sample and sample["types"] == ["sound caption"]


def test_held_out_sounds_are_never_trained_on(sounds):
    train = {d.describe_sound(s) for s in sounds[:500]} | {d.describe_sound(d.make_sound(i)) for i in range(3000, 6000)}
    held_out = {d.describe_sound(d.make_sound(i, True)) for i in range(1500)}
    glides = {c for c in train if c.endswith(("rising.", "falling."))}             # held out by their seeds alone: see make_sound
    assert len(train) > 200 and len(held_out - glides) == 20 and train & held_out == glides and len(glides) == 36
    assert {c.split()[0] for c in held_out} >= {"one", "two", "three", "four", "five", "low", "middle", "high"}
    for sample in d.Drawn("both chat", 40, seed=3, held_out=True):
        assert d.describe_sound(sample["sound"]) in held_out and sample["scene"] == d.make_scene(int(sample["id"]), True)


def test_image_kinds_ask_and_show_what_they_did_before_there_were_sounds():
    known = {"caption": "4925400a751c2d95", "chat": "fa31e35451ed0d7e"}
    for kind, want in known.items():
        digest = hashlib.sha256()
        for sample in d.Drawn(kind, 60, seed=3):
            assert sample.pop("audio") == [] and sample.keys() == {"id", "images", "conversations", "types", "scene"}
            digest.update(sample.pop("images")[0].tobytes() + repr(sorted(sample.items())).encode())
        assert digest.hexdigest()[:16] == want


def test_a_drawn_sample_goes_through_to_a_batch(tokenizer):
    data = d.Encoded(d.Drawn("mixed chat", 6), tokenizer, "tiny", 48, 36, 1000, n_audio_tokens=4, seconds=d.SOUND_SECONDS)
    batch = d.collate([data[i] for i in range(6)])
    assert batch["audio"].shape == (4, 80, 150) and batch["broken"] == [] and batch["truncated"] == 0
    assert (batch["tokens"] == d.AUDIO).sum(1).tolist() == [0, 4, 4] * 2 and (batch["tokens"] == d.IMAGE).sum(1).tolist() == [36, 0, 36] * 2


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_wave_of_16_bit_integers_that_was_not_scaled_is_refused(kind):
    wave = (12_000 * np.sin(np.arange(8000) / 5)).astype(kind)
    with pytest.raises(ValueError, match="go up to 1[12].*divide integers of 16 bits by 32768"):
        d.log_mel(wave, 16_000)
    assert torch.isfinite(d.log_mel(1.5 * wave / 12_000, 16_000)).all()            # not clipped: let through


def test_features_do_not_depend_on_the_type_that_weights_have_by_default():
    wave = np.sin(np.arange(8000) / 5).astype(np.float32)
    want = d.log_mel(wave, 16_000)
    d.whisper_ear.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(d.log_mel(wave, 16_000), want)
    finally:
        torch.set_default_dtype(torch.float32)
        d.whisper_ear.cache_clear()
