"""Pages served by a process of their own, and a headless Chromium that looks at them."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time

import pytest

_SERVER = """import argparse, os, sys, threading
timer = threading.Timer({seconds}, lambda: os._exit(0))
timer.daemon = True
timer.start()
from {module} import {add_arguments}, {run}
parser = argparse.ArgumentParser()
{add_arguments}(parser)
sys.exit({run}(parser.parse_args(sys.argv[1:])))"""


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def page_command(page, *arguments, seconds=900):
    """Command line that serves a page; it ends by itself after so many seconds.

    page: (module, function that adds its arguments, function that runs it)."""
    module, add_arguments, run = page
    source = _SERVER.format(seconds=seconds, module=module, add_arguments=add_arguments, run=run)
    return [sys.executable, "-c", source, *map(str, arguments)]


@contextlib.contextmanager
def page_server(page, *arguments, **environment):
    """Port at which a page listens; `environment` is added to this process's."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'gradio>=6,<7'")
    port = free_port()
    server = subprocess.Popen(page_command(page, "--port", port, *arguments), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"} | environment)
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line + server.stdout.read()
        yield port
    finally:
        server.terminate()
        server.wait(120)


def wait_for(condition, what, seconds=120):
    """What condition() gives as soon as it gives something."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"no {what} after {seconds} s")


class Browser:
    """A Chromium driver with what tests of pages ask of it."""

    def __init__(self, driver):
        self.driver, self._requests = driver, []

    def all(self, css):
        """Elements that are there now."""
        return self.driver.find_elements("css selector", css)

    def one(self, css, seconds=120):
        """The first such element, as soon as there is one."""
        return wait_for(lambda: self.all(css), css, seconds)[0]

    def click(self, css):
        """Click it, whether it is covered or not."""
        self.run("arguments[0].click()", self.one(css))

    def run(self, script, *arguments):
        """Result of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def requests(self, part=""):
        """What the page has asked for so far, as far as it holds `part`."""
        self._requests += [entry["message"] for entry in self.driver.get_log("performance")
                           if '"Network.requestWillBeSent"' in entry["message"]]
        return [message for message in self._requests if part in message]

    def assert_stays_at(self, port):
        """Something was asked for, and nothing of anybody but the page's own server."""
        outside = [message for message in self.requests('"url":"http')
                   if f'"url":"http://127.0.0.1:{port}' not in message]
        assert self._requests and not outside


@contextlib.contextmanager
def open_browser(width, height, downloads=None):
    """A headless `Browser` with a window of this size, which saves files to the folder `downloads`; skips without."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {
            "download.default_directory": str(downloads),
            "profile.default_content_setting_values.automatic_downloads": 1})
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(browser)
    finally:
        browser.quit()


@contextlib.contextmanager
def lab_server(folder):
    """A JupyterLab that serves the notebooks of a folder: a function from a notebook's name to its address.

    Its pages have `jupyterapp`, and nothing of the user's settings is read or written."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'jupyterlab>=4,<5'")
    port, token = free_port(), secrets.token_hex()
    own = {name: str(folder / ".jupyter")
           for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip", "127.0.0.1",
                               "--port", str(port), "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                               f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
                               "--LabApp.news_url=None"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **own})

    def listens():
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        wait_for(listens, "JupyterLab")
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?reset&token={token}"
    finally:
        server.terminate()
        server.wait(120)
