"""A LlamaBoard that is really served and really driven: `llamafactory-cli webui`, and Chromium's view of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import free_port


CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# Two cores are shared with other tests: what is waited for comes within seconds, or not at all.
TIMEOUT = 180

# What LlamaBoard has no element of its own for, and what would need a GPU or 16 processes.
EXTRA = {"preprocessing_num_workers": 1, "use_cpu": True, "logging_steps": 1, "max_steps": 12}


def find_chromium():
    """Return the path of Chromium and Playwright's entry point, or skip the tests and say what is missing."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("the web UI is tested in Chromium, which is not installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="the web UI is driven by Playwright: install [dev]")
    return path, playwright.sync_playwright


@contextmanager
def serve(folder, **env):
    """Serve LlamaBoard from a folder, which takes its settings and runs, until the context is left."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    bin_dir = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "GRADIO_SERVER_PORT": port,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "BROWSER": "true",
        "PYTHONUNBUFFERED": "1",
        **env,
    }
    with open(folder / "webui.log", "w+", encoding="utf-8") as log:
        command = [str(bin_dir / "llamafactory-cli"), "webui"]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            until(lambda: answers(url) or process.poll() is not None, "LlamaBoard to answer")
            assert process.poll() is None, (folder / "webui.log").read_text()
            yield url
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def answers(url):
    try:
        with urllib.request.urlopen(f"{url}/config", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def until(condition, what, timeout=TIMEOUT):
    """Poll a condition outside the page; return its value, or fail."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.1)
    return value


# Counts the page's requests that no element shows to be under way, and remembers when the last one ended.
COUNT_REQUESTS = """
const stock = window.fetch;
window.requests = {open: 0, ended: 0};
window.fetch = async (...args) => {
    const url = String(args[0].url ?? args[0]);
    if (!url.includes("/run/")) return stock(...args);
    window.requests.open += 1;
    try { return await stock(...args); }
    finally { window.requests.open -= 1; window.requests.ended = performance.now(); }
};
"""


@contextmanager
def browse(playwright, chromium):
    """Start a headless Chromium that reaches nothing but this machine."""
    with playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        context.set_default_timeout(1000 * TIMEOUT)
        context.route(lambda url: "127.0.0.1" not in url, lambda route: route.abort())
        context.add_init_script(COUNT_REQUESTS)
        try:
            yield context
        finally:
            browser.close()


def open_board(context, url):
    """Open LlamaBoard and wait until it has filled its elements in."""
    page = context.new_page()
    page.goto(url)
    wait_for_value(page, "Output dir", "train_")
    return page


def block(page, label):
    """Find the visible element of LlamaBoard that has a label."""
    title = page.locator("span[data-testid=block-info]", has_text=re.compile(rf"^\s*{re.escape(label)}\s*$"))
    return page.locator(".block").filter(has=title, visible=True).last


def field(page, label):
    """Find the field to type into of a visible element."""
    return block(page, label).locator("input, textarea").first


def wait_for_value(page, label, start):
    field(page, label).wait_for()
    handle = field(page, label).element_handle()
    page.wait_for_function("([e, start]) => e.value.startsWith(start)", arg=[handle, start])


def fill(page, label, text):
    field(page, label).fill(str(text))


def offers(page, label, expected):
    """Open a drop-down list, wait until it offers exactly what is expected, and close it."""
    field(page, label).click()
    page.wait_for_function(
        """expected => JSON.stringify([...document.querySelectorAll("[role=option]")].map(
            option => option.getAttribute("aria-label"))) === JSON.stringify(expected)""",
        arg=list(expected),
    )
    field(page, label).blur()
    page.get_by_role("option").first.wait_for(state="detached")


def choose(page, label, *names):
    """Choose from a drop-down list, one name or, where the list allows it, several."""
    for name in names:
        field(page, label).click()
        page.get_by_role("option", name=name, exact=True).click()
    # Not by its label: what was chosen may be another language.
    page.evaluate("document.activeElement.blur()")
    page.get_by_role("option").first.wait_for(state="detached")


def choose_stage(page, stage):
    """Choose a training stage and wait until LlamaBoard has done all that follows: the last of it empties lists."""
    before = page.evaluate("window.requests.ended")
    choose(page, "Stage", stage)
    page.wait_for_function(
        """before => window.requests.open === 0 && window.requests.ended > before
            && performance.now() - window.requests.ended > 500""",
        arg=before,
    )


def chosen(page, label):
    """Return what is chosen in a list of several."""
    return block(page, label).locator(".token").all_inner_texts()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def wait_for_toast(page, text):
    """Wait for one of LlamaBoard's messages and close it."""
    toast = page.locator("[data-testid=toast-body]").filter(has_text=text).first
    toast.wait_for()
    toast.get_by_role("button").click()


def choose_model(page, model_dir):
    """Choose a local model, to be trained whole on the CPU."""
    fill(page, "Model name", "Custom")
    page.get_by_role("option", name="Custom", exact=True).click()
    # The last that LlamaBoard does on a change of the model; until then it may still reset the path.
    wait_for_toast(page, "non-instruct model")
    fill(page, "Model path", model_dir)
    choose(page, "Finetuning method", "full")
    choose(page, "Compute type", "fp32")


def set_extra(page, **extra):
    """Write LlamaBoard's extra arguments."""
    if not field(page, "Extra arguments").is_visible():
        page.get_by_text("Extra configurations").click()
    fill(page, "Extra arguments", json.dumps({**EXTRA, **extra}))


def prepare(
    page, model_dir, data_dir, stage="Supervised Fine-Tuning (OGPSA)", dataset=("safety",), general=(), **extra
):
    """Fill in what a run needs."""
    choose_model(page, model_dir)
    fill(page, "Data dir", data_dir)
    choose_stage(page, stage)
    choose(page, "Dataset", *dataset)
    if general:
        choose(page, "General sets", *general)
    set_extra(page, **extra)


def preview(page, stage):
    """Preview the command of a stage that has not been previewed yet; return it as LlamaBoard shows it."""
    press(page, "Preview command")
    code = page.locator("code", has_text=re.compile(rf"--stage {stage}\b")).filter(visible=True)
    code.wait_for()
    return code.inner_text()


def parse(command):
    """Read a previewed command into a dict."""
    return dict(re.findall(r"--(\w+) (.*?) *\\?\n", command + "\n"))


def plot(page):
    """Find the plot of a run."""
    return page.locator("[data-testid=matplotlib] img").filter(visible=True)
