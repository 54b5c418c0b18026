"""`ltdi serve` in a process of its own, and headless Chromium on its page.

As a program it takes the picture of the docs, with a real generator:
python tests/browser.py runs/demo/generator docs/images/serve.png
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
PATIENCE = 300_000  # ms that a step may take; a busy machine
TASK = "Say how this animal moves. Put the answer in square brackets."
EXAMPLES = "horse => [walks]\nsalmon => [swims]\neagle => [flies]\nsnake => [crawls]"
INPUTS = ("trout", "sparrow")


@contextmanager
def served(generator, *options, **variables):
    """(address, process) of a page on a free port; ended by Ctrl-C."""
    command = ["-m", "ltdi_peft.cli", "serve", "--generator", str(generator), "--port", "0", "--no-browser"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, *command, "--json", "--quiet", *options]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)
    try:
        line = process.stdout.readline()
        yield (json.loads(line)["url"] if line else process.stderr.read()), process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.said = process.communicate(timeout=60)  # what it wrote on stdout and stderr
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise


@contextmanager
def browser(address, width=1240, height=1180):
    """(page, addresses that it asked for)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # Without a sandbox, which root may not have; the page is our own.
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        page.set_default_timeout(PATIENCE)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page, asked
        chromium.close()


def generate(page, task, examples=""):
    """Type a task and examples, press the button."""
    page.locator("#task textarea").fill(task)
    page.locator("#examples textarea").fill(examples)
    page.locator("#generate").click()


def talk(page, message, count):
    """Send a message; the texts of both last answers, when each side has `count` whole ones."""
    page.locator("#message textarea, #message input").fill(message)
    page.locator("#send").click()
    answers = [page.locator(f"#{side} .bot.message").nth(count - 1) for side in ("base", "adapted")]
    for one in answers:
        one.filter(has_not_text="…").wait_for()
    return [one.inner_text().strip() for one in answers]


def picture(address, file):
    """The page after a task with examples and two messages."""
    with browser(address) as (page, _):
        generate(page, TASK, EXAMPLES)
        page.locator("#card .said").wait_for()
        for count, message in enumerate(INPUTS, start=1):
            talk(page, message, count)
        page.locator("h1").hover()
        page.wait_for_timeout(1000)
        page.screenshot(path=file, full_page=True)


if __name__ == "__main__":
    with served(sys.argv[1]) as (address, _):
        picture(address, sys.argv[2])
