"""The page in a browser: no errors, no sideways scrolling, curves read out, grids gone through."""

import base64
import fcntl
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from PIL import Image

from torchtitan_flux.report.charts import LEFT, RIGHT, WIDTH, number
from torchtitan_flux.report.page import page
from torchtitan_flux.report.read import read_run

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "about:blank",
]


class Browser:
    """Speaks the DevTools protocol over a pair of pipes: JSON, each message ended by a zero."""

    def __init__(self, to: int, back: int):
        self._to, self._back = os.fdopen(to, "wb"), os.fdopen(back, "rb")
        self._count, self._rest, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        (target,) = (
            one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page"
        )
        attached = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._back.read1(2**16)
            assert more, "the browser is gone"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, page: Path, width: int, height: int) -> None:
        """Load a page into a window of this many CSS pixels."""
        self.events.clear()
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def eval(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What the console shows, and what failed."""
        wanted = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in wanted]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, images inside it left out."""
        urls = (
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        )
        return [url for url in urls if not url.startswith("data:")]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A headless Chromium that ends with the block."""
    commands, answers = os.pipe(), os.pipe()
    # well above 3 and 4, where the browser expects them
    inside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (commands[0], answers[1])]
    os.close(commands[0])
    os.close(answers[1])
    redirect = f'exec "$@" 3<&{inside[0]} 4>&{inside[1]}'
    process = subprocess.Popen(
        ["bash", "-c", redirect, "bash", str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=inside,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in inside:
        os.close(fd)
    try:
        yield Browser(commands[1], answers[0])
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def opened(written, tmp_path_factory) -> Iterator[tuple[Browser, Path]]:
    """A browser, and the page of the run that conftest wrote."""
    folder = tmp_path_factory.mktemp("browser")
    out = folder / "page.html"
    out.write_text(page(read_run(written.folder), 1_770_010_000.0))
    with browser(folder / "profile") as chromium:
        yield chromium, out


@pytest.mark.parametrize(
    ("width", "scheme"), [(320, "dark"), (400, "light"), (1400, "light"), (1400, "dark")]
)
def test_it_fits_the_window_and_nothing_fails(opened, width, scheme):
    chromium, out = opened
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium("Emulation.setEmulatedMedia", features=features)
    chromium.open(out, width, 900)
    for details in (False, True):
        chromium.eval(f"document.querySelectorAll('details').forEach(d => d.open = {details:d})")
        scrolled, inner = chromium.eval("[document.documentElement.scrollWidth, innerWidth]")
        assert inner == width
        assert scrolled <= inner
    assert chromium.complaints == []
    assert chromium.requests == [out.as_uri()]
    assert chromium.eval("[...document.images].every(i => !i.src || i.naturalWidth > 0)")
    assert chromium.eval(  # nothing is stretched
        "(i => Math.abs(i.clientWidth / i.clientHeight - i.naturalWidth / i.naturalHeight) < 0.02)"
        "(document.querySelector('.step.on img'))"
    )
    shot = out.with_name(f"{width}-{scheme}.png")
    chromium.screenshot(shot)
    with Image.open(shot) as image:
        assert image.width == width
        darkest = image.convert("L").getpixel((2, 2))
    assert isinstance(darkest, int)
    assert (darkest < 60) == (scheme == "dark")


def test_letters_can_be_read_on_a_phone(opened):
    chromium, out = opened
    chromium.open(out, 400, 900)
    sizes = chromium.eval(
        "[...document.querySelectorAll('svg text')].map(t =>"
        " t.ownerSVGElement.getScreenCTM().a * parseFloat(getComputedStyle(t).fontSize))"
    )
    assert len(sizes) > 50
    assert min(sizes) >= 9.5


def test_curves_are_read_out_by_pointer_and_by_key(opened, written):
    chromium, out = opened
    chromium.open(out, 1400, 900)
    box = chromium.eval(
        "(() => { const svg = document.querySelector('#grad-norm svg'); svg.scrollIntoView();"
        " const b = svg.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
    )
    read = "document.querySelector('#grad-norm .read').innerText.replace(/\\s+/g, ' ')"
    values = written.scalars["grad_norm"]
    steps = sorted(values)
    assert chromium.eval(read) == f"step {steps[-1]} {number(values[steps[-1]])}"

    def move(share: float) -> None:
        x = box[0] + box[2] * (LEFT + share * (RIGHT - LEFT)) / WIDTH
        chromium("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=box[1] + box[3] / 2)

    for step in (3, 9, 18):
        move((step - 3) / (24 - 3) + 0.02)
        assert chromium.eval(read) == f"step {step} {number(values[step])}"
    chromium("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert chromium.eval(read) == f"step 24 {number(values[24])}"

    chromium.eval("document.querySelector('#grad-norm svg').focus()")
    for step in (21, 18):
        chromium("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
        assert chromium.eval(read) == f"step {step} {number(values[step])}"
    assert chromium.complaints == []


def test_switches_show_other_curves(opened, event_writer, tmp_path):
    """The run of conftest is too short to be smoothed."""
    chromium, _ = opened
    out = tmp_path / "page.html"
    line = [("loss_metrics/global_avg_loss", step, 2 + math.sin(step)) for step in range(1, 60)]
    event_writer(tmp_path / "tb", 0.0, line)
    out.write_text(page(read_run(tmp_path), 0.0))
    chromium.open(out, 1400, 900)
    shown = (
        "['.lin', '.log', '.raw', '.mean'].map(c => getComputedStyle(document.querySelector("
        "`#loss svg ${c === '.lin' || c === '.log' ? c : '.lin ' + c}`)).display !== 'none')"
    )
    assert chromium.eval(shown) == [True, False, True, False]
    chromium.eval("document.querySelector('#switch-log').click()")
    assert chromium.eval(shown)[:2] == [False, True]
    chromium.eval("document.querySelector('#switch-log').click()")
    chromium.eval("document.querySelector('#switch-smooth').click()")
    assert chromium.eval(shown) == [True, False, True, True]


def test_grids_are_gone_through_and_enlarged(opened):
    chromium, out = opened
    chromium.open(out, 1400, 900)
    on = (
        "[...document.querySelectorAll('.step')].filter(s => s.offsetHeight)"
        ".map(s => s.dataset.step)"
    )
    assert chromium.eval(on) == ["18"]
    assert chromium.eval("document.querySelectorAll('.strip button').length") == 2
    chromium.eval("document.querySelector('.strip button').click()")
    assert chromium.eval(on) == ["9"]
    chromium.eval(
        "(() => { const s = document.querySelector('#step'); s.value = 1;"
        " s.dispatchEvent(new Event('input')); })()"
    )
    assert chromium.eval(on) == ["18"]
    chromium.eval("document.querySelector('.step.on img').click()")
    assert chromium.eval("document.querySelector('dialog').open")
    assert chromium.eval(
        "document.querySelector('dialog img').src === document.querySelector('.step.on img').src"
    )
    chromium.eval("document.querySelector('dialog').click()")
    assert not chromium.eval("document.querySelector('dialog').open")
    assert chromium.complaints == []


def test_without_scripts_everything_is_there(opened):
    chromium, out = opened
    chromium("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(out, 400, 900)
        document = chromium("DOM.getDocument")["root"]["nodeId"]
        grids = chromium("DOM.querySelectorAll", nodeId=document, selector=".step img")["nodeIds"]
        boxes = [chromium("DOM.getBoxModel", nodeId=grid)["model"] for grid in grids]
        assert [box["height"] > 0 for box in boxes] == [True, True]
    finally:
        chromium("Emulation.setScriptExecutionDisabled", value=False)
