"""A headless Chromium for tests, driven over its DevTools protocol."""

import asyncio
import base64
import itertools
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

INSTALL = "no chromium on PATH; install it: apt-get update && apt-get install -y chromium"


class Tab:
    """An open page. `errors` collects uncaught exceptions, console errors and what the security policy refused."""

    def __init__(self, socket):
        self.errors = []
        self.requests = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers = {}
        self._events = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
                continue
            method, given = said["method"], said["params"]
            if method == "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "assert"):
                self.errors.append(str(given["args"]))
            elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
                self.errors.append(given["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            if method in self._events:
                self._events[method].set()

    async def call(self, method, **arguments):
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": arguments})
        said = await asyncio.wait_for(answer, 60)
        assert "error" not in said, said
        return said["result"]

    async def open(self, url):
        """Load a page, to its load event."""
        loaded = self._events["Page.loadEventFired"] = asyncio.Event()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(loaded.wait(), 60)

    async def run(self, script):
        """The value of a JavaScript expression; promises are waited for."""
        done = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def size(self, width, height):
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def scheme(self, name):
        """Prefer ``light`` or ``dark``."""
        feature = {"name": "prefers-color-scheme", "value": name}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def press(self, key, *, shift=False):
        """A key: a character, or a name such as ``ArrowDown``."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else None)
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        codes |= {name: 33 + i for i, name in enumerate(("PageUp", "PageDown", "End", "Home"))}
        codes |= {f"Arrow{name}": 37 + i for i, name in enumerate(("Left", "Up", "Right", "Down"))}
        given = {"key": key, "modifiers": 8 if shift else 0, "windowsVirtualKeyCode": codes.get(key, 0)}
        if text is not None:
            given["text"] = text
        await self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **given)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **given)
        await self.settle()

    async def hover(self, selector):
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = await self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        await self.settle()

    async def settle(self):
        """Two frames later."""
        await self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    async def screenshot(self, path):
        shot = await self.call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(shot["data"]))  # noqa: ASYNC240  a test waits for nothing else


@asynccontextmanager
async def chromium(profile_dir):
    """A browser with one tab; it is gone when the block is left."""
    binary = shutil.which("chromium")
    assert binary is not None, INSTALL
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
    process = subprocess.Popen(  # noqa: ASYNC220
        [binary, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile_dir}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = Path(profile_dir) / "DevToolsActivePort"
        for _ in range(600):
            if port_file.is_file() and port_file.read_text().count("\n") >= 1:
                break
            assert process.poll() is None, "chromium did not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                (target,) = [one for one in await reply.json() if one["type"] == "page"]
            url = target["webSocketDebuggerUrl"]
            async with session.ws_connect(url, max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.call(f"{domain}.enable")
                yield tab
    finally:
        process.terminate()
        process.wait(20)
