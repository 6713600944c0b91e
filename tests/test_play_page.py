"""The page of ``python -m play``: who may come, what a tab can ask for, and in a browser."""

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import ClassVar

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from browser import browser
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import forked
import hidreamer
from conftest import ROOT
from play.movie import Movie, record
from play.server import Player
from play.session import Level, Session

LONG = {"task": 9 * "gym_a_module:", "dynamics": "rssm", "trained": 1, "note": "a note"}
LONG["keys"] = [{"name": "one", "keys": ["1"]}, {"name": "last", "keys": ["#24"]}]
STRANGE = '{value: "not finite", cont: "not finite", step: 5}'
CASES = [("rssm", "image"), ("hrssm", "grid"), ("hrvq", "vector"), ("hrvq", "multi")]


# ---------------------------------------------------------------- the server


@contextlib.contextmanager
def served(folder, *words, cwd=None):
    """-> its address and process."""
    command = [sys.executable, "-m", "play", str(folder), "--port", "0", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with forked.popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd
    ) as process:
        line = process.stdout.readline()
        try:
            assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
            yield line.split()[0], process
        finally:
            process.terminate()
            process.wait(30)


def say(socket, what, value=None):
    socket.send(json.dumps({"do": what, "value": value}))


def until(socket, true, tries=400):
    for _ in range(tries):
        message = json.loads(socket.recv(timeout=30))
        if true(message):
            return message
    raise AssertionError("it never came")


def test_who_may_come(trained):
    with served(trained("rssm", "image")) as (url, process):
        port = int(url.rsplit(":", 1)[1])
        open_ports = [f"127.0.0.1:{port}"]
        with urllib.request.urlopen(url) as reply:
            text = reply.read().decode()
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        # nothing is loaded from elsewhere
        assert "src=" not in text.replace("img-src", "") and "@import" not in text
        assert "http://" not in text.replace("ws://", "") and "https://" not in text
        for host, status in (("localhost", 200), ("evil.example", 400), (open_ports[0], 200)):
            request = urllib.request.Request(url, headers={"Host": host})
            try:
                found = urllib.request.urlopen(request).status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status, host
        address = url.replace("http", "ws") + "/socket"
        others = [None, "http://evil.example", f"http://localhost:{port}", "null", "http://["]
        for origin in [url, *others]:
            if origin == url:
                with connect(address, origin=origin, proxy=None) as tab:
                    assert json.loads(tab.recv())["task"] == "dummy_image"
                continue
            with (
                pytest.raises(InvalidStatus, match="403"),
                connect(address, origin=origin, proxy=None),
            ):
                pass
        with socket.socket() as outside:  # another address of this machine
            outside.settimeout(2)
            assert outside.connect_ex(("127.0.0.2", port)) != 0
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""


def test_what_a_tab_can_ask_for(trained, tmp_path):
    folder = hidreamer.export(trained("hrvq", "multi"), tmp_path / "agent")
    with served(folder, cwd=tmp_path) as (url, process):
        address = url.replace("http", "ws") + "/socket"
        with connect(address, origin=url, proxy=None, max_size=None) as tab:
            hello = until(tab, lambda m: m["type"] == "hello")
            assert hello["dynamics"] == "hrvq" and len(hello["keys"]) == 5
            for text in ("no json", "[]", "3", '{"do": 3}', '{"do": "keys", "value": 7}', "{}"):
                tab.send(text)  # is ignored
            say(tab, "speed", 1000)
            until(tab, lambda m: m.get("speed") == 60)
            say(tab, "dream")
            until(tab, lambda m: m.get("dreaming"))
            say(tab, "hand")
            until(tab, lambda m: m.get("hand"))
            say(tab, "keys", ["2", "w"])
            until(tab, lambda m: "1: 2" in m.get("action", ""))
            say(tab, "pause")
            paused = until(tab, lambda m: m.get("paused"))
            say(tab, "step")
            numbers = paused["numbers"]
            until(tab, lambda m: m["numbers"]["step"] != numbers["step"])
            say(tab, "back")
            until(tab, lambda m: m["numbers"]["step"] == numbers["step"])
            time.sleep(0.3)  # paused, it stays there
            say(tab, "speed", 7)
            assert until(tab, lambda m: m.get("speed") == 7)["numbers"]["step"] == numbers["step"]
            say(tab, "what if")
            options = until(tab, lambda m: m["type"] == "what if")["options"]
            assert len(options) == 6 and options[0]["frames"][0].startswith("data:image/png")
            say(tab, "record")
            until(tab, lambda m: m.get("recording"))
            for _ in range(5):
                say(tab, "step")
            say(tab, "reset")
            say(tab, "record")
            done = until(tab, lambda m: m.get("message", "").startswith("recorded"))
            movie = done["message"].removeprefix("recorded ")
            assert len(iio.imread(movie)) >= 5 and str(tmp_path) in movie
            say(tab, "record")
            until(tab, lambda m: m.get("recording"))
        process.terminate()  # what was recorded until then is a whole file
        process.wait(30)
        assert process.stderr.read() == ""
    movies = list(tmp_path.glob("*.mp4"))
    assert movies and not any("tmp" in path.name for path in movies)
    assert all(len(iio.imread(path)) for path in movies)


@pytest.fixture
def player(trained, tmp_path):
    player = Player(lambda: Session(hidreamer.load(trained("rssm", "image")), seed=0), tmp_path)
    yield player
    player.close()


def test_the_environment_lives_in_one_thread(trained, tmp_path, monkeypatch):
    """OpenGL draws in the thread that it was made in (dm_control refuses others)."""
    threads = set()

    def noted(method):
        def call(*args, **keys):
            threads.add(threading.get_ident())
            return method(*args, **keys)

        return call

    for name in ("__init__", "step", "what_if", "close"):
        monkeypatch.setattr(Session, name, noted(getattr(Session, name)))
    player = Player(lambda: Session(hidreamer.load(trained("rssm", "image")), seed=0), tmp_path)
    for _ in range(3):
        asyncio.run(player.do(player.session.step))
    asyncio.run(player.answer(Tab(), json.dumps({"do": "what if"})))
    player.close()
    assert len(threads) == 1 and threads != {threading.get_ident()}


def test_a_session_that_cannot_be_made_is_raised_here(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Player(lambda: 1 / 0, tmp_path)


def ask(player, tab, what, value=None):
    text = what if value is None and what[0] in "[{" else json.dumps({"do": what, "value": value})
    asyncio.run(player.answer(tab, text))


def test_asking_twice_is_asking_once(player):
    """The page asks by what it was last told, which may be a while ago."""
    session = player.session
    for what, found in (("hand", lambda: session.hand), ("dream", lambda: session.now.dreaming)):
        for value, expected in ((True, True), (True, True), (False, False), (False, False)):
            ask(player, "a tab", what, value)
            assert found() is expected
        ask(player, "a tab", what)
        assert found()


def test_the_keys_of_a_tab_go_with_it(player):
    first, second = Tab(), Tab()
    player.sockets = {first, second}
    ask(player, first, "keys", ["1"])
    ask(player, second, "keys", ["2", 3])
    assert player.session.held == {"1", "2", "3"}
    asyncio.run(player.serve(second))  # which leaves at once
    assert player.session.held == {"1"} and player.sockets == {first}


class Tab:
    """One that leaves as soon as it is asked for something."""

    headers: ClassVar = {"origin": "http://a", "host": "a"}

    async def receive_text(self):
        raise WebSocketDisconnect

    async def accept(self, *args):
        pass

    send_text = accept


def test_recordings_of_one_second_are_files_of_their_own(player, tmp_path):
    for _ in range(3):  # a second ends between two of them at most
        ask(player, "a tab", "record")
        player._change(player.session.step)
        ask(player, "a tab", "record")
    assert len(list(tmp_path.glob("play-*.mp4"))) == 3


def test_a_recording_that_failed_leaves_nothing(player, tmp_path, monkeypatch):
    ask(player, "a tab", "record")
    movie = player.movie

    def fail(frame):
        raise ValueError("no such codec")

    monkeypatch.setattr(movie.file, "write_frame", fail)
    assert "the recording failed: no such codec" in player._change(player.session.step)
    assert player.movie is None and not list(tmp_path.iterdir())
    movie = Movie(tmp_path / "a.mp4")
    movie.add(np.zeros((64, 64, 3), np.uint8))
    close = movie.file.close

    def full():
        close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(movie.file, "close", full)
    with pytest.raises(OSError, match="No space"):
        movie.close()
    assert not list(tmp_path.iterdir())


def test_whatever_a_codec_raises_is_a_file_that_cannot_be_written(player, tmp_path, monkeypatch):
    """PyAV raises EOFError, which is no OSError, on a full disk."""

    def full(self, frame):
        raise EOFError("End of file: 'avcodec_send_frame()'")

    monkeypatch.setattr("imageio.plugins.pyav.PyAVPlugin.write_frame", full)
    with pytest.raises(OSError, match="End of file"):
        record(player.session, tmp_path / "a.mp4", 3)
    assert not list(tmp_path.iterdir())


def test_rewards_after_a_predicted_end_do_not_count(player):
    """The page ranks by reward + continue x value: an end had been worth the rewards after it."""
    cont = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0, 1.0])
    player.session.agent.heads = lambda feat: (
        torch.ones(feat.deter.shape[:2]),
        cont.expand(feat.deter.shape[:2]),
        torch.ones(feat.deter.shape[:2]),
    )
    for option in player.session.what_if(5):
        assert option["reward"] == 1.0 + 0.5 + 0.5 and option["cont"] == 0.0


def test_numbers_that_nobody_expects(player):
    for text in ("[" * 60000, '{"do": "speed", "value": 1' + 400 * "0" + "}"):
        ask(player, "a tab", text)
    assert player.speed == 60
    ask(player, "a tab", "speed", -math.inf)
    assert player.speed == 1
    player.session.agent.heads = lambda feat: 3 * [torch.full_like(feat.deter[..., 0], math.nan)]
    player.session._levels = lambda: [Level("L0", math.nan, math.inf, 1.0)]
    for text in (player._change(player.session.step), player._what_if()):
        assert "not finite" in text
        json.loads(text, parse_constant=pytest.fail)  # a browser has no NaN in its JSON


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_page_in_a_browser(case, trained, tmp_path):
    """It loads, keys act, the picture changes, and nobody's console complains."""
    with served(trained(*case)) as (url, _), browser() as tab:
        tab.size(1240, 900)
        tab.open(url)
        tab.wait("window.stats && stats().frames > 3")
        assert tab.eval("document.title").startswith(f"dummy_{case[1]}")
        tab.key("p")
        tab.wait("stats().state.paused")
        src = "document.querySelector('#p-imagined img').src"
        before, shot = tab.eval(src), tab.screenshot()
        assert tab.eval("document.querySelector('#p-real img').naturalWidth") > 0
        tab.key("3", up=False)  # a hand on the keys takes over
        tab.wait("stats().state.hand")
        tab.key(".")
        tab.wait(f"{src} !== {json.dumps(before)}")
        expected = "1: 2" if case[1] == "multi" else "action 2"
        if case[1] != "multi":
            assert tab.eval("stats().state.action") == expected
        tab.key("3", down=False)
        assert tab.screenshot() != shot
        tab.key("d")
        tab.wait("stats().state.dreaming && document.body.className === 'dreaming'")
        tab.key("m")
        tab.wait("!stats().state.hand")
        tab.key("x")
        tab.wait("document.querySelectorAll('#options figure').length > 3")
        assert tab.eval("document.getElementById('dialog').innerText.match(/[0-9]+ actions/)")
        tab.eval("document.getElementById('close').click()")
        tab.eval("document.getElementById('agent').click()")  # where it is already
        tab.eval("document.getElementById('asleep').click()")
        tab.key("r")
        tab.key(",")
        tab.key("d")
        tab.wait("!stats().state.dreaming && !stats().state.hand")
        tab.eval(f"hello({json.dumps(LONG)}); show({{...stats().state, numbers: {STRANGE}}})")
        assert tab.eval("document.querySelectorAll('#hand kbd').length") == 1
        assert tab.eval("document.getElementById('n-value').textContent") == "not finite"
        tab.size(390, 844, dark=True)
        picture = iio.imread(tab.screenshot())
        assert picture.shape[:2] == (844, 390) and picture[-1, -1, :3].max() < 60  # dark
        assert tab.eval("document.documentElement.scrollWidth") <= 390  # readable on a phone
        assert tab.errors == []
