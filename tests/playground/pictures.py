"""Draw the pictures of the page for the documentation: ``python -m tests.playground.pictures FOLDER``."""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.playground import vectors
from tests.playground.browser import PATIENCE, chromium, fill_in, opened, serving

_COLOURS = 96
_PROMPT, _LENGTH = "What is rain?", 30


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        vectors.main(Path(made))
        files = (Path(made) / f"{name}.safetensors" for name in vectors.IDEAS)
        with serving(vectors.MODEL, *files) as server, chromium() as browser:
            for width in (1280, 390):
                for theme in ("light", "dark"):
                    page = opened(browser, server.url, width=width, theme=theme)
                    _answer(page)
                    _save(page, folder / f"playground-{width}-{theme}.png")
                    page.context.close()


def _answer(page: Page) -> None:
    fill_in(page, _PROMPT, [0.7, 0], length=_LENGTH)
    page.click("#answer")
    expect(page.locator("#answer")).to_be_enabled(timeout=PATIENCE)
    before = ""
    while (text := page.locator("#steered-tokens").inner_text()) != before or not text:
        before = text
        page.wait_for_timeout(3000)
    page.mouse.move(0, 0)


def _save(page: Page, path: Path) -> None:
    """Write the whole page in few colours, which take a third of the space."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
