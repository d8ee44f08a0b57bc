"""JupyterLab on a port of its own, and a notebook in it as a reader sees it through headless Chromium."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

#: How long the page may take for what takes it a second; in milliseconds, as Playwright counts.
PATIENCE = 120_000

#: What stands before a cell that was run.
DONE = re.compile(r"\[\d+\]")

# Cells that are not in view have to be in the page too, and nobody may ask about news.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "recordTiming": False},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}

# Notes what a cell shows, each time it changes, as long as its prompt says that it is busy.
WATCH = """cell => {
    const note = () => {
        if (!cell.querySelector('.jp-InputPrompt').textContent.includes('*')) return;
        const output = cell.querySelector('.jp-Cell-outputArea');
        const text = output ? output.innerText : '';
        const drawn = output ? [...output.querySelectorAll('.jp-OutputArea-output :is(svg, img)')] : [];
        const pictures = drawn.map(picture => picture.src || picture.outerHTML).join();
        if (cell.texts.at(-1) !== text) cell.texts.push(text);
        if (pictures && cell.pictures.at(-1) !== pictures) cell.pictures.push(pictures);
    };
    if (cell.watcher) cell.watcher.disconnect();
    cell.texts = [];
    cell.pictures = [];
    cell.watcher = new MutationObserver(note);
    cell.watcher.observe(cell, {subtree: true, childList: true, characterData: true, attributes: true});
}"""


@contextlib.contextmanager
def server(root, home):
    """The address of a JupyterLab that serves the folder `root` and keeps its own files in `home`."""
    runtime, settings = home / "runtime", home / "settings"
    for plugin, values in SETTINGS.items():
        file = settings / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token="]
    options += [f"--ServerApp.root_dir={root}", "--ServerApp.terminals_enabled=False"]
    log = home / "jupyterlab.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "jupyterlab", *options]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield address(process, runtime, log)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def address(process, runtime, log, seconds=120):
    """What the server wrote about itself, once it listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(file.read_text())["url"]
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


@contextlib.contextmanager
def page(artifacts):
    """A page of a headless Chromium; its screenshots go to the folder `artifacts`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE)
        try:
            yield page
        except BaseException:
            page.screenshot(path=Path(artifacts) / "failure.png")
            raise
        finally:
            browser.close()


class Notebook:
    """An open notebook; code cells are counted from 0."""

    def __init__(self, page, url, path, artifacts):
        self.page, self.artifacts = page, Path(artifacts)
        page.goto(f"{url}lab/tree/{path}")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        self.wait_for_kernel(url)
        # More room for the notebook.
        if page.locator(".jp-FileBrowser").is_visible():
            page.keyboard.press("Control+b")
        self.shots = 0

    def wait_for_kernel(self, url):
        """Until the server says that the page is connected: before that, running a cell asks for a kernel."""
        deadline = time.monotonic() + PATIENCE / 1000
        while True:
            kernels = [session["kernel"] for session in self.page.request.get(f"{url}api/sessions").json()]
            if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
                break
            assert time.monotonic() < deadline, f"the notebook has no kernel that is ready: {kernels}"
            self.page.wait_for_timeout(100)
        expect(self.page.locator(".jp-Notebook-ExecutionIndicator").first).to_have_attribute("data-status", "idle")

    def cell(self, n):
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(n)

    def prompt(self, n):
        return self.cell(n).locator(".jp-InputPrompt").first

    def output(self, n):
        return self.cell(n).locator(".jp-Cell-outputArea")

    def start(self, n):
        """Runs a cell and does not wait; what it shows while it is busy is noted."""
        before = self.prompt(n).inner_text()
        self.prompt(n).scroll_into_view_if_needed()
        self.prompt(n).click()
        self.cell(n).evaluate(WATCH)
        # A page that is still setting up its shortcuts lets the keys pass.
        for _ in range(20):
            self.page.keyboard.press("Control+Enter")
            with contextlib.suppress(AssertionError):
                expect(self.prompt(n)).not_to_have_text(before, timeout=5000)
                return
        raise AssertionError(f"cell {n} does not start: {self.prompt(n).inner_text()}")

    def wait(self, n, timeout=PATIENCE):
        expect(self.prompt(n)).to_have_text(DONE, timeout=timeout)

    def run(self, n, timeout=PATIENCE):
        self.start(n)
        self.wait(n, timeout)

    def is_busy(self, n):
        return "*" in self.prompt(n).inner_text()

    def texts(self, n):
        """The texts that the cell has shown while it was busy."""
        return self.cell(n).evaluate("cell => cell.texts")

    def pictures(self, n):
        return self.cell(n).evaluate("cell => cell.pictures")

    def wait_while_busy(self, n, condition, what):
        """Until `condition()` holds; the cell must not end before."""
        deadline = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert self.is_busy(n), f"the cell ended before {what}; it showed {self.texts(n)}"
            assert time.monotonic() < deadline, f"no {what}; the cell showed {self.texts(n)}"
            self.page.wait_for_timeout(100)

    def stop(self):
        """Presses the button with the square."""
        self.page.locator("[data-command='notebook:interrupt-kernel']").first.click()

    def is_red(self, n, text):
        """Whether the output with the text stands on red ground, as errors do."""
        output = self.output(n).locator(".jp-OutputArea-output", has_text=text).last
        colour = output.evaluate("output => getComputedStyle(output).backgroundColor")
        red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
        return red > green and red > blue and "rgba(0, 0, 0, 0)" not in colour

    def show(self, n, name):
        """A screenshot with the cell's output in view."""
        self.shots += 1
        self.output(n).scroll_into_view_if_needed()
        self.page.screenshot(path=self.artifacts / f"{self.shots:02}_{name}.png")
