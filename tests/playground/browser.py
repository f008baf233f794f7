"""The playground as a visitor has it: the command in a process, and the page in headless Chromium."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 120_000  # milliseconds, on a machine that does other things too


@dataclass
class Server:
    """A playground that runs."""

    url: str
    process: "subprocess.Popen[str]"

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])


@contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    """Run the command until it says its address, and end it by an interrupt."""
    command = [sys.executable, "-c", "from steering_vectors.cli import main; main()", "playground"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "the server did not start"
        yield Server(url, process)
    finally:
        if process.poll() is None:
            process.send_signal(2)
        process.wait(timeout=60)


@contextmanager
def chromium() -> Iterator[Browser]:
    assert CHROMIUM, "install Chromium (Debian: apt install chromium), or name it with CHROMIUM="
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, url: str, *, width: int = 1280, theme: str = "light", scale: float = 1) -> Page:
    """A new tab of a visitor of its own, with the page."""
    context = browser.new_context(viewport={"width": width, "height": 900}, device_scale_factor=scale)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{url}?__theme={theme}")
    page.wait_for_selector("#prompt textarea")
    return page


def fill_in(page: Page, prompt: str, strengths: "list[float]", *, length: int, tokens: str = "Generated") -> None:
    page.fill("#prompt textarea", prompt)
    for number, strength in enumerate(strengths):
        page.fill(f"#strength-{number} input[type=number]", str(strength))
    page.fill("#length input[type=number]", str(length))
    page.locator("#length input[type=number]").blur()
    page.locator("#tokens label", has_text=re.compile(rf"^\s*{tokens}\s*$")).click()


def expect_answers(page: Page, unsteered: str, steered: str) -> None:
    expect(page.locator("#steered textarea")).to_have_value(steered, timeout=PATIENCE)
    expect(page.locator("#unsteered textarea")).to_have_value(unsteered, timeout=PATIENCE)


def written(page: Page) -> "tuple[str, str]":
    return page.input_value("#unsteered textarea"), page.input_value("#steered textarea")


def addresses_of(port: int) -> "set[str]":
    """The addresses, in hexadecimal, at which something listens on a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.rpartition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def seconds_of(process: "subprocess.Popen[str]") -> float:
    """The seconds for which a process has computed."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
