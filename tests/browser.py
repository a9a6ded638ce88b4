"""A headless Chromium, driven over its DevTools pipe: one page, its messages, its requests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import AbstractContextManager
from fcntl import F_DUPFD, fcntl
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser(AbstractContextManager["Browser"]):
    """Opens a file; `events` are Chromium's messages since then."""

    def __init__(self, page: Path, width_px: int, *, dark: bool = False) -> None:
        assert CHROMIUM is not None
        # Ends above 4, as Chromium reads from 3 and writes to 4.
        ends = [fcntl(end, F_DUPFD, 5) for end in (*os.pipe(), *os.pipe())]
        reads, sends, receives, writes = ends
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=lambda: (os.dup2(reads, 3), os.dup2(writes, 4)),
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._send, self._receive = os.fdopen(sends, "wb", 0), os.fdopen(receives, "rb")
        self._numbers, self._session, self._rest = count(1), {}, b""
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        (target,) = (each["targetId"] for each in targets if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=page.as_uri())
        while not self.told("Page.loadEventFired"):
            self.events.append(self._read())

    def told(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": parameters, **self._session}
        self._send.write(json.dumps(asked).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        told = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._receive.fileno(), 1 << 16)
            assert part, "Chromium has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._send.close()
        self._receive.close()
