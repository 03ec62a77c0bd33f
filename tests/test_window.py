"""The window of generate.py: the page in a real browser, and the server without one.

In the browser: what is shown is what `answer` says and what the routers choose. Without: what strangers may send."""
import base64
import contextlib
import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import data as d
import generate
from model import Config, CuMo
from upcycle import load, save
from test_audio import write_wav
from test_generate import build, picture, prompt
from test_routing import EAR, TEXT, talker

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")
QUESTION = "What color is the ring?"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return d.train_tokenizer([t["value"] for s in d.Drawn("chat", 50) for t in s["conversations"]], 320)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Small models with loud weights, each with its experts where the system of its name has them."""
    size = tokenizer.get_vocab_size()
    return {"tiny": build(size, scales=(1, 2)), "moe-llava": talker(size, eval_capacity_factor=2.0), "uni-moe": talker(size, audio=EAR),
            "dense": build(size, n_experts=0, connector=0), "words": CuMo(Config(vision=None, text=TEXT | dict(vocab_size=size), template="tiny"))}


@pytest.fixture(scope="module")
def windows(models, tokenizer):
    """-> window(name): the port of a server in this process, as `serve` opens it."""
    with contextlib.ExitStack() as stack:
        ports = {}

        def window(name, **options):
            if name not in ports or options:
                server = generate.open_window(models[name], tokenizer, name, 0, **{"max_new_tokens": 12, **options})
                thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
                thread.start()
                stack.callback(thread.join)
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
                if options:
                    return server.server_port
                ports[name] = server.server_port
            return ports[name]
        yield window


def png(image):
    return generate.as_png(image)


def question(*images, text=QUESTION, sounds=(), **more):
    turn = {"from": "human", "text": text, "images": list(images), "sounds": list(sounds)}
    return {"turns": [turn], "temperature": 0, **more}


def send(port, method, path, body=b"", **headers):
    """-> (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, response.read()


def ask(port, asked, statuses=(200,)):
    """-> the lines of the answer."""
    status, body = send(port, "POST", "/ask", asked)
    assert status in statuses
    return [json.loads(line) for line in body.splitlines()]


def only(lines, key):
    found, = [line[key] for line in lines if key in line]
    return found


def error(port, asked, status=400):
    message = only(ask(port, asked, [status]), "error")
    assert "\n" not in message and len(message) < 300
    return message


# ---------------------------------------------------------------------------------------------------------------------
# What the lines of an answer say


def decoder_choices(model, tokenizer, sample):
    """For each layer of the decoder with experts the choices of all tokens that were read, by one forward pass over everything."""
    texts, senses = generate.sense(model, [sample])
    prompt = generate.tokens_of(model, tokenizer, texts)
    said = model.generate(prompt, eos=tokenizer.token_to_id("</s>"), max_new_tokens=12, **senses)
    tokens = torch.cat([prompt[prompt != d.PAD], said[0, :-1]]).unsqueeze(0)                 # the last one is never read
    with torch.no_grad():
        return [r.experts.tolist() for r in model(tokens, **senses).routing["text"]]


@pytest.mark.parametrize("name", ["tiny", "moe-llava", "uni-moe", "dense"])
def test_lines_tell_the_answer_and_what_the_routers_chose(name, models, windows, tokenizer):
    model, sound = models[name], d.draw_sound(d.make_sound(3)) if name == "uni-moe" else None
    wav = [generate.as_wav(*sound)] if sound else []
    lines = ask(windows(name), question(png(picture(0)), sounds=wav))
    heard = [d.read_wav("a sound", content=base64.b64decode(file)) for file in wav]
    sample = generate.sample_of(QUESTION, [picture(0)], audio=heard)
    reply = generate.answer(model, tokenizer, [sample], max_new_tokens=12)[0]
    pieces = "".join(line.get("text", "") for line in lines)
    assert only(lines, "reply") == reply and reply.rstrip("\ufffd") == pieces.strip() != ""              # half a character is not streamed

    # The prompt's tokens, and what the tower got.
    turns = sample["conversations"]
    ids = d.encode_chat(turns, tokenizer, "tiny", 36, 4 if sound else 0)[0]
    pieces = only(lines, "pieces")
    assert [p for p in pieces if not isinstance(p, str)] == [i for i in ids if i < 0] and len(pieces) == len(ids)
    assert "".join(p for p in pieces if isinstance(p, str)).endswith(f"{QUESTION}<a>")
    seen, = [Image.open(io.BytesIO(base64.b64decode(file))) for line in lines for file in line.get("seen", [])]
    assert seen.tobytes() == picture(0).tobytes()

    # Where experts see, the choices are those of routing_of; where they read, those of a forward pass.
    layers = [layer for line in lines for layer in line.get("layers", [])]
    assert bool(layers) == (name != "dense")
    seeing = {layer["name"]: torch.tensor([place[0] for place in layer["places"]])
              for layer in layers if layer["part"] != "text" and layer["scale"] == 1}
    want = generate.routing_of(model, [picture(0)])
    assert list(seeing) == list(want) and all(torch.equal(seeing[key], want[key][0]) for key in want)
    reading = {}
    for layer in layers:
        if layer["part"] == "text":
            reading.setdefault(layer["name"], []).extend(place[0] for place in layer["places"])
    assert list(reading) == [f"layer {i}" for i, e in enumerate(model.config.text.n_experts) if e]
    assert list(reading.values()) == decoder_choices(model, tokenizer, sample)

    # Probabilities sum to 1, the choices are the largest, and the weights are theirs, rescaled.
    for layer in layers:
        experts, weights, p = map(torch.tensor, zip(*layer["places"]))
        torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]), atol=5e-4, rtol=0)
        chosen = p.gather(-1, experts)
        torch.testing.assert_close(chosen, p.topk(experts.shape[-1]).values)
        torch.testing.assert_close(chosen / chosen.sum(-1, keepdim=True), weights, atol=1e-3, rtol=0)


def test_patches_of_an_enlarged_image_lie_where_they_lie_in_the_image(models):
    model, aux = models["tiny"], {"vision": [], "connector": []}
    with torch.no_grad(), generate.watch(model) as watched:
        model.encode_images(generate.load_images(model, [picture(1), picture(2)]), aux)
    layer = [layer for layer in generate.watched_layers(model, watched.choices) if layer["scale"] == 2][0]
    r = aux["vision"][2]                                        # two layers at scale 1, then the first at scale 2: 2 x 4 crops
    for image in range(2):
        for y in range(12):
            for x in range(12):
                crop, patch = 4 * image + y // 6 * 2 + x // 6, 1 + y % 6 * 6 + x % 6                   # 1: behind CLS
                assert layer["places"][144 * image + 12 * y + x][0] == r.experts[crop, patch].tolist()


def test_watching_changes_nothing_and_ends(models, tokenizer):
    model = models["uni-moe"]
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    plain = generate.answer(model, tokenizer, [prompt("Why?")], max_new_tokens=6)
    with pytest.raises(KeyError), generate.watch(model):
        assert generate.answer(model, tokenizer, [prompt("Why?")], max_new_tokens=6) == plain and hooks() == 3
        raise KeyError
    assert hooks() == 0


def test_what_an_expert_turned_away_has_no_weight(tokenizer):
    model = talker(tokenizer.get_vocab_size(), eval_capacity_factor=0.5)
    with torch.no_grad(), generate.watch(model) as watched:
        model(torch.arange(40).view(1, -1))
    layer = generate.watched_layers(model, watched.choices)[0]
    assert sum(weights == [0, 0] for _, weights, _ in layer["places"]) > 3


def test_each_turn_brings_its_files_along(models, windows, tokenizer):
    first = question(png(picture(0)))
    reply = only(ask(windows("tiny"), first), "reply")
    first["turns"] += [{"from": "gpt", "text": reply, "images": [], "sounds": []},
                       {"from": "human", "text": "And here?", "images": [png(picture(1)), png(picture(2))], "sounds": []}]
    lines = ask(windows("tiny"), first)
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": reply},
             {"from": "human", "value": "<image>\n<image>\nAnd here?"}]
    sample = {"images": [picture(0), picture(1), picture(2)], "conversations": turns}
    assert only(lines, "reply") == generate.answer(models["tiny"], tokenizer, [sample], max_new_tokens=12)[0]
    assert len(only(lines, "seen")) == 3 and only(lines, "pieces").count(d.IMAGE) == 3 * 36


def test_temperature_is_heeded(windows):
    replies = {only(ask(windows("words"), question(text="Why?", temperature=t)), "reply") for t in (0, 0, 1.5, 1.5)}
    assert len(replies) == 3


def test_the_pieces_of_a_text_are_whole(tokenizer):
    ids = [d.IMAGE, d.IMAGE, *tokenizer.encode("<q> How  many rings, 猫 or é?<a>").ids, d.AUDIO]
    pieces = generate.pieces_of(tokenizer, ids)
    assert pieces[:2] == [d.IMAGE] * 2 and pieces[-1] == d.AUDIO and len(pieces) == len(ids)
    assert "".join(pieces[2:-1]).replace("\ufffd", "").startswith("<q> How  many rings, ")


def test_each_token_of_an_answer_is_a_piece_also_half_a_character(tokenizer):
    pieces, ids = [], tokenizer.encode("a 猫 or é 🙂?").ids
    on_token = generate.streamer(tokenizer, pieces.append)
    for token in ids:
        on_token(torch.tensor([token]))
    assert len(pieces) == len(ids) and "".join(pieces) == "a 猫 or é 🙂?" and pieces.count("") >= 4


# ---------------------------------------------------------------------------------------------------------------------
# What the page gets besides


def test_the_page_runs_its_own_script_and_no_other(windows):
    connection = http.client.HTTPConnection("127.0.0.1", windows("tiny"))
    connection.request("GET", "/")
    response = connection.getresponse()
    page, policy = response.read(), response.headers["Content-Security-Policy"]
    assert page == (ROOT / "assets/page.html").read_bytes() and page.count(b"<script>") == 1
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "connect-src 'self'" in policy
    assert not re.search(rb"https?://|innerHTML|eval\(|document\.write|insertAdjacent", page)


def test_the_page_is_told_about_the_model(windows):
    told = {name: json.loads(send(windows(name), "GET", "/model")[1]) for name in ("tiny", "uni-moe", "dense", "words")}
    assert [told[name]["dense"] for name in told] == [False, False, True, False]
    assert [told[name]["worlds"] for name in told] == [["image"], ["image", "sound", "both"], ["image"], []]
    assert told["tiny"]["colors"] == [list(color) for color in generate.EXPERT_COLORS] and told["tiny"]["name"] == "tiny"
    assert all(told[name]["examples"] for name in told) and told["tiny"]["temperature"] == 0
    port = windows("words", temperature=0.7)
    assert json.loads(send(port, "GET", "/model")[1])["temperature"] == 0.7


def test_worlds_are_drawn_anew_with_their_description(windows):
    for world, n_images, n_sounds in (("image", 1, 0), ("sound", 0, 1), ("both", 1, 1)):
        drawn = [json.loads(send(windows("uni-moe"), "POST", "/draw", {"world": world})[1]) for _ in range(2)]
        assert drawn[0] != drawn[1]
        for one in drawn:
            assert (len(one["images"]), len(one["sounds"])) == (n_images, n_sounds) and one["truth"].endswith(".")
            assert 1 <= len(one["examples"]) <= 4
            assert all(Image.open(io.BytesIO(base64.b64decode(file))).size == (48, 48) for file in one["images"])
            assert all(len(d.read_wav("a sound", content=base64.b64decode(file))[0]) == 24_000 for file in one["sounds"])
    assert send(windows("tiny"), "POST", "/draw", {"world": "sound"})[0] == 400


# ---------------------------------------------------------------------------------------------------------------------
# What strangers send


def big_png(width, height):
    """The header of a picture of that size, and no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("content, words", [
    (b"", "PNG"), (b"hello", "PNG"), (base64.b64decode(png(picture(0)))[:900], "cannot be read as an image"),
    (big_png(9000, 9000), "9000 x 9000 pixels"), (big_png(60_000, 60_000), "PNG"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PNG"),
    (base64.b64decode(png(Image.new("RGB", (1, 1)))), "too small")])
def test_broken_pictures_get_one_line(content, words, windows):
    assert words in error(windows("tiny"), question(base64.b64encode(content).decode()))


@pytest.mark.parametrize("content", [b"", b"RIFF", b"hello", os.urandom(1000)])
def test_broken_sounds_get_one_line(content, windows):
    assert "a sound: cannot be read" in error(windows("uni-moe"), question(sounds=[base64.b64encode(content).decode()]))


def test_files_for_senses_that_the_model_lacks_get_one_line(windows):
    assert "hears nothing" in error(windows("tiny"), question(sounds=[generate.as_wav(*d.draw_sound(d.make_sound(3)))]))
    assert error(windows("words"), question(png(picture(0))))


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"{", 400), (b"[1]", 400), (b"7", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b'"' + b"x" * 1000 + b'"', 400)])
def test_what_is_no_json_object_is_refused(body, status, windows):
    for path in ("/ask", "/draw"):
        got, said = send(windows("tiny"), "POST", path, body)
        assert got == status and "JSON" in json.loads(said)["error"]


@pytest.mark.parametrize("asked", [
    {}, {"turns": 3}, {"turns": []}, {"turns": [3], "temperature": 0}, {"turns": [{"from": "human"}], "temperature": 0},
    question(3), question("/etc/passwd"), question("../../assets/scene.png"), question({"path": "assets/scene.png"}), question("file:///etc/passwd"),
    question(temperature="hot"), question(temperature=None), question(temperature=-1), question(temperature=float("nan")), question(text=7),
    {"turns": question()["turns"] * 2, "temperature": 0}, {"turns": [{**question()["turns"][0], "from": "gpt"}], "temperature": 0},
    question(png(Image.new("RGB", (9, 9))), text="<image> and <image>")])
def test_what_is_no_conversation_gets_one_line(asked, windows):
    error(windows("tiny"), asked)


def test_a_mark_in_a_later_turn_is_a_word(windows):
    """Also one that the model itself wrote: it is sent back with every further question."""
    picture = {**question(png(Image.new("RGB", (40, 30))), text="What is there?"), "temperature": 0}
    turns = [*picture["turns"], {"from": "gpt", "text": "An <image>.", "images": [], "sounds": []},
             {"from": "human", "text": "Which <image> and <audio>?", "images": [], "sounds": []}]
    assert isinstance(only(ask(windows("tiny"), {"temperature": 0, "turns": turns}), "reply"), str)


def test_a_mark_without_a_file_is_a_word(windows):
    for mark in ("<image>", "<audio>", "<video>"):
        assert d.IMAGE not in only(ask(windows("tiny"), question(text=mark)), "pieces")


def test_limits(windows, monkeypatch):
    port = windows("tiny")
    assert "4,000 letters" in error(port, question(text="x" * 4001))
    assert "8 pictures" in error(port, question(*[png(picture(0))] * 9))
    said = {"from": "gpt", "text": "x" * 5000, "images": [], "sounds": []}         # it may have written more than a visitor may
    assert "letters" not in error(port, {"temperature": 0, "turns": [*question()["turns"], said] * 2})
    assert "letters; clear" in error(port, {"temperature": 0, "turns": [*question()["turns"], said] * 40 + question()["turns"]})
    assert "10,000 a side" in error(port, question(base64.b64encode(big_png(30_000, 1600)).decode()))
    assert "would send" in error(port, json.loads('{"turns": [], "temperature": 1' + "0" * 400 + "}"))
    monkeypatch.setattr(generate, "MAX_TOKENS", 30)
    assert "limit of 30" in error(port, question(png(picture(0))))
    monkeypatch.setattr(generate, "MAX_WAITING", -1)
    assert "try again later" in error(port, question())


def test_an_upload_of_100_mb_is_refused_unread(windows):
    for length, status in (("100000000", 413), ("9" * 30, 413), ("-1", 400), ("many", 400)):
        with socket.create_connection(("127.0.0.1", windows("tiny")), timeout=10) as s:
            s.sendall(f"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode() + b"x" * 1000)
            assert f" {status} " in s.makefile().readline()
    with contextlib.suppress(ConnectionError):                  # who sends it all in spite of that
        assert send(windows("tiny"), "POST", "/ask", bytes(100_000_000))[0] == 413
    assert only(ask(windows("tiny"), question()), "reply")


@pytest.mark.parametrize("host, origin, status", [
    ("127.0.0.1:{}", None, 200), ("localhost:{}", "http://localhost:{}", 200), ("[::1]:{}", None, 200), ("192.168.1.7:{}", "http://192.168.1.7:{}", 200),
    ("localhost:8888", "http://localhost:8888", 200), ("evil.example", None, 403), ("evil.example:{}", "http://evil.example:{}", 403),
    ("localhost.evil.example:{}", None, 403), ("", None, 403), ("127.0.0.1:{}", "http://evil.example", 403), ("127.0.0.1:{}", "null", 403),
    ("127.0.0.1:{}", "http://127.0.0.1:1", 403), ("127.0.0.1:{}", "http://localhost:{}", 403)])
def test_only_the_page_itself_may_ask(host, origin, status, windows):
    port = windows("words")
    headers = {"Host": host.format(port)} | ({"Origin": origin.format(port)} if origin else {})
    assert send(port, "GET", "/model", **headers)[0] == status
    assert send(port, "POST", "/ask", question(text="Why?"), **headers)[0] == status


def test_the_name_that_was_given_to_it_is_its_own(models, tokenizer):
    server = generate.open_window(models["words"], tokenizer, "words", 0, "127.0.0.1")
    server.server_close()
    for name in ("localhost:1", "[::1]:80", "[::1]", socket.gethostname().lower()):
        generate.check_visitor({"Host": name}, server.names)
    with pytest.raises(generate.Refused):
        generate.check_visitor({"Host": "gpu.lan:7860"}, server.names)
    generate.check_visitor({"Host": "gpu.lan:7860", "Origin": "http://gpu.lan:7860"}, {"gpu.lan"})


@pytest.mark.parametrize("path", ["/assets/page.html", "/generate.py", "/../generate.py", "/%2e%2e/generate.py", "//etc/passwd", "/ask", "/?x", "/model/.."])
def test_no_path_leads_to_a_file(path, windows):
    status, said = send(windows("words"), "GET", path)
    assert status == 404 and json.loads(said)["error"]


def test_nothing_is_written(windows):
    written = []
    watching = [True]

    def hook(event, args):
        if watching and event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(args[0])
    sys.addaudithook(hook)
    ask(windows("uni-moe"), question(png(picture(0)), sounds=[generate.as_wav(*d.draw_sound(d.make_sound(3)))]))
    error(windows("uni-moe"), question("aGVsbG8=", sounds=["aGVsbG8="]))
    watching.clear()
    assert not written


# ---------------------------------------------------------------------------------------------------------------------
# Several visitors


def test_twenty_at_once_are_answered_one_after_the_other(windows, models, monkeypatch):
    port, alone, inside, most = windows("tiny"), only(ask(windows("tiny"), question(png(picture(0)))), "reply"), [], []
    generate_ = CuMo.generate

    def counted(*args, **options):
        inside.append(1)
        most.append(len(inside))
        try:
            return generate_(*args, **options)
        finally:
            inside.pop()
    monkeypatch.setattr(CuMo, "generate", counted)
    answers = [None] * 20

    def visit(i):
        answers[i] = ask(port, question(png(picture(0))))
    threads = [threading.Thread(target=visit, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [only(lines, "reply") for lines in answers] == [alone] * 20 and max(most) == 1 and len(most) == 20
    places = [[line["queue"] for line in lines if "queue" in line] for lines in answers]
    assert all(told == sorted(told, reverse=True) for told in places) and any(places)


@pytest.fixture(scope="module")
def endless(models, tokenizer, windows):
    """The port of a model that never comes to an end: the end mark is the one token whose logit is 0."""
    model = talker(tokenizer.get_vocab_size())
    with torch.no_grad():
        model.text.head.weight[tokenizer.token_to_id("</s>")] = 0
    models["endless"] = model
    return windows("endless", max_new_tokens=20_000)


def begin(port, n_lines=4):
    """A visitor who has read the first lines of a long answer -> (connection, reader of the lines)."""
    s = socket.create_connection(("127.0.0.1", port), timeout=20)
    body = json.dumps(question(text="Why?")).encode()
    s.sendall(b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    lines = s.makefile("rb")
    while lines.readline().strip():
        pass                                                    # the head
    for _ in range(n_lines):
        assert lines.readline()
    return s, lines


def leave(visitor):
    for end in visitor[::-1]:
        end.close()


def test_who_leaves_stops_his_answer_and_the_next_one_comes_in(endless):
    first = begin(endless)
    second = begin(endless, 2)
    third = begin(endless, 2)
    assert json.loads(third[1].readline()) == {"queue": 2}
    leave(second)                                               # one who only waited
    while json.loads(third[1].readline()) == {"queue": 2}:
        pass
    assert json.loads(third[1].readline()) == {"queue": 1}
    leave(first)                                                # one who is being answered
    start = time.monotonic()
    while "text" not in json.loads(third[1].readline()):
        pass
    assert time.monotonic() - start < 20
    leave(third)


def test_who_does_not_listen_is_not_waited_for(endless, monkeypatch):
    monkeypatch.setattr(generate.Visit, "timeout", 0.3)
    monkeypatch.setattr(generate, "watched_layers", lambda *_: ["x" * 1_000_000])
    deaf = begin(endless, 1)                                    # reads no more, and the line fills up
    start = time.monotonic()
    patient = begin(endless, 1)
    while "queue" in json.loads(patient[1].readline()):
        assert time.monotonic() - start < 30
    leave(patient)
    leave(deaf)


def test_a_fault_is_said_and_does_not_stop_the_others(windows, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(generate, "encode_senses", lambda *_: 1 / 0)
        assert "its terminal says why" in error(windows("tiny"), question(), 500)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert only(ask(windows("tiny"), question()), "reply")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def hear_ctrl_c():
    """Whoever runs the tests in a shell's background has them, and all that they start, ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_it_in_the_midst_of_an_answer(endless, models, tokenizer, tmp_path):
    save(models["endless"], str(tmp_path / "m"), tokenizer)
    command = [sys.executable, str(ROOT / "generate.py"), "--model", str(tmp_path / "m"), "--device", "cpu", "--serve", "0", "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=hear_ctrl_c) as p:
        try:
            shown = p.stdout.readline()
            visitor = begin(int(re.search(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C", shown)[1]))
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=60)
        finally:
            p.kill()                                # or a test that fails would wait for it for ever
    assert p.returncode == 0 and not err.strip() and not out.strip()
    leave(visitor)


@pytest.mark.parametrize("flags, words", [
    (["--image", "x.png"], "--image acts"), (["--prompt", "Why?"], "--prompt does not go with --serve"), (["--routing", "r.png"], "--routing does not go with --serve"),
    (["--eval-drawn", "3"], "--eval-drawn does not go with --serve"), (["--compile"], "--compile acts"), (["--serve", "70000"], "--serve must be from 0 to 65535")])
def test_flags_that_the_window_would_not_heed_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        generate.check_flags(generate.parse(["--serve", *flags] if flags[0] != "--serve" else flags))
    generate.check_flags(generate.parse(["--serve", "--host", "0.0.0.0", "--seed", "1", "--top-p", "0.9", "--temperature", "0.5"]))
    with pytest.raises(ValueError, match="--host acts with --serve only"):
        generate.check_flags(generate.parse(["--host", "0.0.0.0"]))


def test_a_port_that_is_taken_or_none_is_an_error_in_words(windows, models, tokenizer):
    for port, host in ((windows("tiny"), "127.0.0.1"), (70_000, "127.0.0.1"), (0, "no.such.host.invalid")):
        with pytest.raises(ValueError, match=f"--serve {port} on {host}.*another port"):
            generate.open_window(models["tiny"], tokenizer, "tiny", port, host)


def test_an_open_host_says_what_that_means(models, tokenizer, monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt
    monkeypatch.setattr(generate.ThreadingHTTPServer, "serve_forever", stop)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        generate.serve(models["tiny"], tokenizer, "tiny", 0, host)
        assert ("without a password" in capsys.readouterr().out) == warned


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


class Browser:
    """Chromium without a screen, driven by its DevTools protocol: JSON over a websocket."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, end = Path(folder, "DevToolsActivePort"), time.monotonic() + 60
        while not port_file.exists() or len(port_file.read_text().split()) < 2:
            assert self.process.poll() is None and time.monotonic() < end, "chromium does not start"
            time.sleep(0.05)
        port = int(port_file.read_text().split()[0])
        pages = http.client.HTTPConnection("127.0.0.1", port)
        pages.request("GET", "/json/list")
        page, = [page for page in json.load(pages.getresponse()) if page["type"] == "page"]
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.sendall(f"GET /devtools/page/{page['id']} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode())
        self.incoming, self.n_calls, self.faults = self.socket.makefile("rb"), 0, []
        while self.incoming.readline().strip():
            pass
        self.call("Runtime.enable")
        self.call("Log.enable")

    def call(self, method, **params):
        self.n_calls += 1
        text = json.dumps({"id": self.n_calls, "method": method, "params": params}).encode()
        # One frame: final text; masked, as a client's must be (by zeros); the length in 7 bits, or in 16 or 64 that follow.
        length = bytes([0xFE]) + struct.pack(">H", len(text)) if len(text) < 1 << 16 else bytes([0xFF]) + struct.pack(">Q", len(text))
        self.socket.sendall(b"\x81" + (bytes([0x80 | len(text)]) if len(text) < 126 else length) + bytes(4) + text)
        while True:
            message = self.receive()
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(message["params"])
            if message.get("id") == self.n_calls:
                return message["result"]

    def receive(self):
        text, is_last = b"", False
        while not is_last:
            first, length = self.incoming.read(2)
            if length > 125:
                size = 2 if length == 126 else 8
                length = int.from_bytes(self.incoming.read(size), "big")
            text += self.incoming.read(length)
            is_last = first & 0x80
        return json.loads(text)

    def js(self, code):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, code):
        end = time.monotonic() + 40
        while not self.js(code):
            assert time.monotonic() < end, f"in vain: {code}"
            time.sleep(0.03)

    def open(self, port):
        self.faults.clear()
        self.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        self.wait("location.port == '%d' && typeof watched == 'object' && !!watched" % port)

    def choose(self, *files):
        """Files for the page, as by its button."""
        chooser = self.call("Runtime.evaluate", expression="$('chooser')")["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=chooser)
        self.wait(f"$('files').children.length == {len(files)}")

    def ask(self, text):
        """-> the answer that is shown."""
        self.js(f"$('question').value = {json.dumps(text)}; $('ask').click()")
        self.wait("!stopper")
        return self.js("$('log').lastChild.textContent")

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            code = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13}[name]
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, text="\r" * (name == "Enter"))

    def point(self, selector, x=0.5, y=0.5):
        """Move the mouse to the middle of an element, or to this part of its width and height."""
        x, y = self.js("(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
                       f"return [b.x + b.width * {x}, b.y + b.height * {y}]; }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def colors(self, selector):
        """What elements are painted with: experts, or None."""
        found = self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.style.background)")
        known = {f"rgb({r}, {g}, {b})": i for i, (r, g, b) in enumerate(generate.EXPERT_COLORS)}
        return [known.get(color) for color in found]

    def pixels(self, x, y):
        """Of the canvas over the picture (RGBA), at this part of the width and height of each patch, row by row."""
        return self.js(f"""(() => {{
            const copy = Object.assign(document.createElement('canvas'), {{width: $('map').width, height: $('map').width}});
            const pen = copy.getContext('2d', {{willReadFrequently: true}}), unit = copy.width / shown.side;
            pen.drawImage($('map'), 0, 0);
            return [...Array(shown.side ** 2).keys()].map(i => [...pen.getImageData(
                (i % shown.side + {x}) * unit, (Math.floor(i / shown.side) + {y}) * unit, 1, 1).data]);
        }})()""")

    def patches(self):
        """What the patches of the picture are painted with: experts, or None where the canvas is clear."""
        return [None if alpha == 0 else next(i for i, color in enumerate(generate.EXPERT_COLORS) if all(abs(a - b) < 3 for a, b in zip(color, pixel)))
                for *pixel, alpha in self.pixels(0.5, 0.5)]

    def slide(self, slider, value):
        self.js(f"$('{slider}').value = {value}; $('{slider}').dispatchEvent(new Event('input', {{bubbles: true}}))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian's package of that name)")
    browser = Browser(str(tmp_path_factory.mktemp("chromium")))
    yield browser
    browser.process.terminate()
    browser.process.wait()


def bars(browser):
    """-> (probabilities by the text, by the width, ranks of those that are marked)."""
    notes = browser.js("[...document.querySelectorAll('#bars .bar')].map(e => e.lastChild.textContent)")
    widths = browser.js("[...document.querySelectorAll('#bars i')].map(e => e.style.width)")
    ranks = [re.search(r"choice (\d)", note) for note in notes]
    return [float(note.split("%")[0]) / 100 for note in notes], [float(w[:-1]) / 100 for w in widths], [r and int(r[1]) for r in ranks]


@pytest.mark.parametrize("name", ["tiny", "moe-llava", "uni-moe", "dense"])
def test_the_page_shows_the_answer_and_the_choices(name, browser, windows, models, tokenizer):
    model, hears = models[name], name == "uni-moe"
    files = [ROOT / "assets/scene.png"] + [ROOT / "assets/sound.wav"] * hears
    sample = generate.sample_of(QUESTION, [str(files[0])], audio=[str(file) for file in files[1:]])
    browser.open(windows(name))
    browser.choose(*files)
    assert browser.ask(QUESTION) == generate.answer(model, tokenizer, [sample], max_new_tokens=12)[0]
    assert browser.js("document.querySelectorAll('#log .human img').length") == 1
    assert browser.js("document.querySelectorAll('#log .human audio').length") == hears
    if name == "dense":
        assert browser.js("$('watch').hidden") and "dense" in browser.js("$('hint').textContent") and not browser.faults
        return

    # The slider goes through all layers; each patch has the color of its first choice, and so has each token in the decoder.
    seeing = generate.routing_of(model, [str(files[0])])
    reading = decoder_choices(model, tokenizer, sample)
    want = [experts[0, :, 0].tolist() for experts in seeing.values()]
    if name == "tiny":
        want[1:1] = [None]                                      # the layer at scale 2, tested without a browser
    ids = d.encode_chat(sample["conversations"], tokenizer, "tiny", 36, 4)[0]
    want += [[rows[i][0] for i, token in enumerate(ids) if token == d.IMAGE] for rows in reading]
    browser.js("$('layer').focus()")
    for _ in want:
        browser.key("ArrowLeft")
    for i, experts in enumerate(want):
        assert browser.js("Number($('layer').value)") == i
        colors = browser.patches()
        assert colors == experts or (experts is None and len(colors) == 144)
        if reading:
            assert browser.colors("#tokens span")[:len(reading[i])] == [row[0] for row in reading[i]]
        else:
            assert set(browser.colors("#tokens span")) == {None}

        # The router's probabilities at the patch that is pointed at, its choices marked, and its path.
        side = math.isqrt(len(colors))
        browser.point("#map", ((6 + i) % side + 0.5) / side, ((6 + i) // side + 0.5) / side)
        numbers, widths, ranks = bars(browser)
        assert abs(sum(numbers) - 1) < 0.003 and sum(widths) == pytest.approx(1, abs=5e-4)
        assert sorted(filter(None, ranks)) == [1, 2] and ranks.index(1) == colors[6 + i] == numbers.index(max(numbers))
        path = browser.js("[...document.querySelectorAll('#path span')].map(e => Number(e.textContent))")
        assert len(path) == len(want) and path[i] == colors[6 + i] and browser.colors("#path span") == path
        browser.key("ArrowRight")

    # The load is the share of first choices, beside an even one.
    loads = browser.js("[...$('loads').children].map(row => [...row.children[0].children].map(e => parseFloat(e.style.width) / 100))")
    last = torch.tensor([row[0] for row in reading[-1]] if reading else want[-1])
    assert loads[0] == pytest.approx([1 / len(loads[0])] * len(loads[0]), abs=1e-4) and len(loads) == 1 + len(want)
    assert loads[-1] == pytest.approx((torch.bincount(last, minlength=len(loads[-1])) / len(last)).tolist(), abs=1e-4)
    assert not browser.faults


def test_a_token_that_is_pointed_at_shows_its_own_choices(browser, windows, models, tokenizer):
    browser.open(windows("moe-llava"))
    browser.choose(ROOT / "assets/scene.png")
    browser.ask(QUESTION)
    sample = generate.sample_of(QUESTION, [str(ROOT / "assets/scene.png")])
    first, second = decoder_choices(models["moe-llava"], tokenizer, sample)
    browser.slide("layer", 1)
    for i in (0, 40, 20):                                       # a mark, a word, a patch of the picture
        browser.point(f"#tokens span:nth-child({i + 1})")
        assert browser.js("shown.token") == i
        assert bars(browser)[2].index(1) == second[i][0] and browser.colors("#path span") == [first[i][0], second[i][0]]
        assert browser.js("[...$('tokens').children].findIndex(e => e.className == 'chosen')") == i
    y, x = divmod(browser.js("watched.slots.indexOf(20)"), 6)   # that patch is framed in the picture, in white, and no other one
    assert [i for i, edge in enumerate(browser.pixels(0, 0.5)) if edge == [255] * 4] == [6 * y + x, 6 * y + x + 1] and x < 5
    browser.js("$('token').focus()")
    for key, i in (("ArrowRight", 21), ("ArrowLeft", 20), ("ArrowLeft", 19)):
        browser.key(key)
        assert browser.js("shown.token") == i


def test_only_what_one_expert_took(browser, windows, models):
    browser.open(windows("tiny"))
    browser.choose(ROOT / "assets/scene.png")
    browser.ask(QUESTION)
    experts = generate.routing_of(models["tiny"], [str(ROOT / "assets/scene.png")])["layer 0"][0, :, 0].tolist()
    browser.js("$('expert').focus()")
    for expert in range(4):
        browser.key("ArrowRight")                               # by keyboard, which does not lose its place
        assert browser.patches() == [e if e == expert else None for e in experts]
        assert browser.js("document.activeElement == $('expert') && $('expert').nextElementSibling.textContent") == f"expert {expert}"
    for _ in range(5):
        browser.key("ArrowLeft")
    assert browser.patches() == experts and browser.js("$('expert').nextElementSibling.textContent") == "all experts"


def test_arrow_keys_move_over_the_patches_and_stop_at_the_edge(browser, windows):
    browser.open(windows("tiny"))
    browser.choose(ROOT / "assets/scene.png")
    browser.ask(QUESTION)
    browser.js("$('map').focus()")
    at = lambda: browser.js("place(watched.layers[0])")
    start = at()
    for key, step in (("ArrowRight", 1), ("ArrowDown", 6), ("ArrowLeft", -1), ("ArrowUp", -6)):
        browser.key(key)
        start += step
        assert at() == start
    for _ in range(8):
        browser.key("ArrowLeft")
        browser.key("ArrowUp")
    assert at() == 0


def test_several_turns_pictures_and_a_new_beginning(browser, windows, models, tokenizer):
    scene = str(ROOT / "assets/scene.png")
    browser.open(windows("tiny"))
    browser.choose(scene)
    first = browser.ask(QUESTION)
    browser.choose(scene, ROOT / "assets/loss.png")
    second = browser.ask("And here?")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": first}, {"from": "human", "value": "<image>\n<image>\nAnd here?"}]
    sample = {"images": [scene, scene, str(ROOT / "assets/loss.png")], "conversations": turns}
    assert second == generate.answer(models["tiny"], tokenizer, [sample], max_new_tokens=12)[0]
    for i in range(3):
        browser.slide("picture", i)
        assert browser.patches() == generate.routing_of(models["tiny"], sample["images"])["layer 0"][i, :, 0].tolist()
    browser.js("$('clear').click()")
    assert browser.js("turns.length + $('files').children.length + $('log').children.length") == 0 and browser.js("$('watch').hidden")


def test_a_scene_is_drawn_with_its_description_behind_a_click(browser, windows):
    browser.open(windows("uni-moe"))
    buttons = "[...$('bring').querySelectorAll('button')]"
    assert browser.js(f"{buttons}.map(b => b.textContent)") == ["Draw a scene", "Draw a sound", "Draw a scene and a sound"]
    browser.js(f"{buttons}[2].click()")
    browser.wait("$('files').children.length == 2")
    assert browser.js("(truth => !truth.open && truth.lastChild.textContent.endsWith('.'))(document.querySelector('#log details'))")
    browser.js("$('examples').children[0].click()")
    browser.wait("!stopper && turns.length == 2")
    assert browser.js("document.querySelector('.human').textContent == $('examples').children[0].textContent")
    assert browser.js("document.querySelector('#log img').naturalWidth") == 48


def test_an_answer_streams_and_stops(browser, endless):
    browser.open(endless)
    browser.js("$('question').value = 'Why?'; $('question').focus()")
    browser.key("Enter")
    browser.wait("$('log').lastChild.textContent.length > 20")
    browser.js("$('stop').click()")
    browser.wait("!stopper")
    assert browser.js("$('log').lastChild.textContent") == "stopped"
    assert browser.js("turns.length") == 2
    assert browser.js("turns[1].text == $('log').children[1].textContent && turns[1].text.length > 20")

    # Who comes second is told the place. To clear is to stop, too, and nothing of it comes back.
    visitor = begin(endless)
    browser.js("$('question').value = 'Why?'; $('ask').click()")
    browser.wait("$('log').lastChild.dataset.wait == '1 before you'")
    leave(visitor)
    browser.wait("$('log').lastChild.textContent.length > 20")
    browser.js("$('clear').click()")
    browser.wait("!stopper")
    assert browser.js("turns.length + $('log').children.length") == 0 and browser.js("$('watch').hidden")


def test_whatever_is_said_is_text(browser, windows, models, monkeypatch, tmp_path):
    evil = "<img src=x onerror=alert(1)><script>window.hacked = 1</script>"

    def answer(*_, stream, **__):
        stream(evil)
        return [evil]
    monkeypatch.setattr(generate, "answer", answer)
    file = tmp_path / "<script>window.hacked = 1<|script>.png"
    picture(0).save(file)
    browser.open(windows("tiny"))
    browser.choose(file)
    assert browser.ask(evil) == evil and browser.js("$('log').children[0].textContent") == evil
    assert browser.js("[...$('tokens').children].at(-1).textContent") == evil
    assert browser.js("add_token('-5'); add_token(-5); [...$('tokens').children].slice(-2).map(e => e.textContent)") == ["-5", "▪"]
    assert browser.js("document.querySelector('#log img').title") == file.name
    assert browser.js("document.scripts.length") == 1 and browser.js("window.hacked") is None and not browser.faults


def test_what_cannot_be_read_gets_a_line_and_does_not_count(browser, windows, tmp_path):
    (tmp_path / "broken.png").write_text("hello")
    browser.open(windows("tiny"))
    browser.choose(tmp_path / "broken.png")
    assert "cannot be read" in browser.ask(QUESTION) and browser.js("turns.length") == 0
    browser.js("$('clear').click()")
    browser.choose(ROOT / "assets/scene.png")
    assert "cannot" not in browser.ask(QUESTION) and browser.js("turns.length") == 2
    browser.js("model.max_bytes = 1000")
    assert "too large" in browser.ask(QUESTION)


def test_files_are_dropped_and_pasted(browser, windows):
    browser.open(windows("tiny"))
    for event in ("new DragEvent('drop', {dataTransfer: files})", "new ClipboardEvent('paste', {clipboardData: files})"):
        browser.js(f"(() => {{ const files = new DataTransfer(); files.items.add(new File(['x'], 'a.png', {{type: 'image/png'}}));"
                   f"document.dispatchEvent({event}); }})()")
    browser.wait("[...$('files').children].map(file => file.tagName + file.title) == 'IMGa.png,IMGa.png'")
    words = browser.js("""(() => {
        const data = new DataTransfer();
        data.setData("text/plain", "words");
        return ["dragover", "drop"].map(kind => document.dispatchEvent(new DragEvent(kind, {dataTransfer: data, cancelable: true})));
    })()""")
    assert words == [True, True]                                                   # the browser's own way: they go into the question


def test_a_question_waits_for_the_file_that_is_being_read(browser, windows):
    browser.open(windows("tiny"))
    sent = browser.js("""(async () => {
        const bodies = [], real = fetch;
        window.fetch = (url, options) => { bodies.push(options.body); return real(url, options); };
        bring([new File([new Uint8Array(3e6)], "a.png", {type: "image/png"})]);
        const asked = ask("What is it?");
        await asked;
        window.fetch = real;
        return bodies.map(body => JSON.parse(body).turns[0].images.length);
    })()""")
    assert sent == [1]


def test_any_temperature_up_to_2_may_be_typed(browser, windows):
    browser.open(windows("tiny"))
    valid = [browser.js(f"($('temperature').value = {value}, $('form').checkValidity())") for value in (0, 0.25, 2, 2.1)]
    assert valid == [True, True, True, False]
