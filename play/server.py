"""The page's server: one session, shown to every tab that is open, on this machine alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from envs.base import one_line
from play.movie import Movie, compose
from play.session import Session, View
from tools import ConfigError

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]  # what a browser on this machine may call it
PAGE = Path(__file__).parent / "page.html"
SPEEDS = (1, 60)  # steps per second
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
}


def bind(port: int) -> socket.socket:
    """Raises ConfigError where the port is in use, or not ours."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"port {port} cannot be used ({reason}): choose another with --port"
        ) from None
    return found


def plain(x: Any) -> Any:
    """A number as JSON has it, which knows neither NaN nor infinity."""
    return x if x is None or math.isfinite(x) else "not finite"


def png(picture: Any) -> str:
    """A picture (H,W,3) as the address of an image."""
    _, data = cv2.imencode(".png", picture[..., ::-1])
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Player:
    """Steps a session at its speed while somebody looks, and does what the page asks for.

    make_session: called in the one thread that the session lives in. videos: the folder that
    recordings go to. Raises what ``make_session`` raises.
    """

    def __init__(self, make_session: Callable[[], Session], videos: Path):
        # Of all that the session does: OpenGL draws in the thread that its environment was made in.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session")
        try:
            self.session = self.thread.submit(make_session).result()
        except BaseException:
            self.thread.shutdown(wait=False)
            raise
        self.videos = videos
        self.sockets: set[WebSocket] = set()
        self.held: dict[WebSocket, set[str]] = {}  # keys that are down in each tab
        self.paused, self.speed = False, 15
        self.movie: Movie | None = None
        self.wake = asyncio.Event()

    async def run(self) -> None:
        while True:
            if not self.sockets or self.paused:
                self.wake.clear()
                await self.wake.wait()
                continue
            began = time.monotonic()
            await self.do(self._advance)
            await asyncio.sleep(max(0.0, 1.0 / self.speed - (time.monotonic() - began)))

    def _advance(self) -> None:
        if not self.paused:  # it may have been, while this waited for its turn
            self.session.step()

    async def do(self, act: Any, *args: Any) -> None:
        """Change the session and show it."""
        await self.send(await self._in_thread(self._change, act, *args))

    async def _in_thread(self, act: Callable[..., str], *args: Any) -> str:
        return await asyncio.get_running_loop().run_in_executor(self.thread, act, *args)

    def _change(self, act: Any, *args: Any) -> str:
        act(*args)
        view = self.session.view()
        if self.movie:
            try:
                self.movie.add(compose(view, self.session.now.action, self.session.hand))
            except Exception as error:  # whatever a codec raises
                self.session.message = f"the recording failed: {one_line(error)}"
                self.movie.discard()
                self.movie = None
        return self.state(view)

    def state(self, view: View) -> str:
        """What the page shows, as JSON."""
        session = self.session
        pictures = []
        for name, (title, picture) in view.pictures.items():
            pictures.append({"id": name, "title": title, "src": png(picture)})
        message, session.message = session.message, ""
        numbers, levels = {key: plain(x) for key, x in view.numbers.items()}, []
        for level in view.levels:
            nats = {"prior": plain(level.prior), "post": plain(level.post)}
            levels.append(level._asdict() | nats)
        found = {"type": "state", "pictures": pictures, "numbers": numbers}
        found |= {"levels": levels, "message": message}
        found |= {"dreaming": session.now.dreaming, "hand": session.hand, "paused": self.paused}
        found |= {"speed": self.speed, "recording": self.movie is not None}
        return json.dumps(found | {"action": session.now.action, "over": session.now.over})

    async def send(self, text: str) -> None:
        """To every tab; one that left is forgotten."""
        for websocket in list(self.sockets):
            try:
                await websocket.send_text(text)
            except (WebSocketDisconnect, RuntimeError, KeyError):  # KeyError: it sent no text
                self.sockets.discard(websocket)

    # ------------------------------------------------------------ what the page asks for

    async def serve(self, websocket: WebSocket) -> None:
        """A tab, as long as it is open. Pages of other origins are refused."""
        if websocket.headers.get("origin") != f"http://{websocket.headers.get('host')}":
            await websocket.close(1008)
            return
        await websocket.accept()
        await websocket.send_text(json.dumps({"type": "hello"} | self.hello()))
        self.sockets.add(websocket)
        self.wake.set()
        try:
            await self.do(lambda: None)
            while True:
                await self.answer(websocket, await websocket.receive_text())
        except (WebSocketDisconnect, RuntimeError, KeyError):  # KeyError: it sent no text
            pass
        finally:
            self.sockets.discard(websocket)
            self._hold(websocket, [])

    def hello(self) -> dict[str, Any]:
        agent = self.session.agent
        facts = {"task": agent.facts["task"], "dynamics": agent.config.dynamics.type}
        facts |= {"trained": agent.facts["step"], "note": self.session.note}
        return facts | {"keys": self.session.controls.legend()}

    async def answer(self, websocket: WebSocket, text: str) -> None:
        """{"do": NAME, "value": ...}; what is no such thing is ignored."""
        try:
            asked = json.loads(text)
            name, value = str(asked["do"]), asked.get("value")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return
        session = self.session
        moves = {"reset": session.reset, "back": session.back}
        if name == "keys" and isinstance(value, list):
            self._hold(websocket, value)
        elif name in moves:
            self.paused = self.paused or name == "back"
            await self.do(moves[name])
        elif name == "step":
            self.paused = True
            await self.do(session.step)
        elif name in ("hand", "dream"):
            await self.do(self._switch, name, value)
        elif name == "pause":
            self.paused = not self.paused
            self.wake.set()
            await self.do(lambda: None)
        elif name == "speed" and type(value) in (int, float) and value == value:
            self.speed = round(min(max(value, SPEEDS[0]), SPEEDS[1]))
            await self.do(lambda: None)
        elif name == "record":
            await self.do(self._switch_recording)
        elif name == "what if":
            await websocket.send_text(await self._in_thread(self._what_if))

    def _hold(self, websocket: WebSocket, keys: list[Any]) -> None:
        """The keys of a tab, none once it left, beside those of the others."""
        self.held[websocket] = {str(key) for key in keys[:20]}
        if websocket not in self.sockets:
            del self.held[websocket]
        self.session.held = set().union(*self.held.values())

    def _switch(self, name: str, value: Any) -> None:
        """To the hand or the dream where ``value`` is True, from it where False, else over: a page
        that asks twice before it is answered means the same both times.
        """
        session = self.session
        now = session.hand if name == "hand" else session.now.dreaming
        if now is value:
            return
        if name == "dream":
            session.switch()
        else:
            session.hand = not now

    def _switch_recording(self) -> None:
        try:
            if self.movie:
                self.movie.close()
                self.session.message = f"recorded {self.movie.path}"
                self.movie = None
            else:
                # several may begin in one second
                name = datetime.datetime.now().strftime("play-%Y%m%d-%H%M%S-%f.mp4")
                self.movie = Movie(self.videos / name, self.speed)
        except OSError as error:
            self.movie, self.session.message = None, f"the recording failed: {one_line(error)}"

    def _what_if(self) -> str:
        options = []
        for option in self.session.what_if():
            numbers = {key: plain(option[key]) for key in ("reward", "value", "cont")}
            frames = [png(frame) for frame in option["frames"]]
            options.append(option | numbers | {"frames": frames})
        return json.dumps({"type": "what if", "options": options})

    def close_movie(self) -> None:
        """What was recorded so far becomes a whole file."""
        movie, self.movie = self.movie, None
        if movie:
            movie.close()

    def close(self) -> None:
        self.close_movie()
        self.thread.submit(self.session.close).result()
        self.thread.shutdown()


def make_app(player: Player) -> Starlette:
    """The page and its socket, for this machine's own browser alone."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(player.run())
        yield
        task.cancel()
        player.close_movie()  # here, for a signal other than Ctrl-C ends the process after this

    page = lambda request: FileResponse(PAGE, headers=HEADERS)
    routes = [Route("/", page), WebSocketRoute("/socket", player.serve)]
    # a page elsewhere whose name is made to lead here has another host
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], lifespan=lifespan)


def serve(player: Player, listening: socket.socket) -> None:
    """Serve the page until a signal ends it; Ctrl-C goes on as KeyboardInterrupt.

    listening: of ``bind``.
    """
    config = uvicorn.Config(
        make_app(player), log_level="warning", ws_max_size=2**16, timeout_graceful_shutdown=1
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        player.close()
