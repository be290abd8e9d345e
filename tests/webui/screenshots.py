"""Take the pictures of the accordion for docs/webui.md: `python tests/webui/screenshots.py`, from anywhere."""

import os
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import llamaboard as board  # noqa: E402  (conftest, which it imports, is in the folder above)


# From the block of the stage list to the buttons, at the width of the other pictures.
WIDTH, MARGIN = 1280, 12


def take(page, first, last, path):
    """Take a picture of the page from the block of one label to a button."""
    page.evaluate("window.scrollTo(0, 0)")
    top = board.block(page, first).bounding_box()["y"]
    button = page.get_by_role("button", name=last, exact=True).filter(visible=True).bounding_box()
    clip = {"x": 0, "y": top - MARGIN, "width": WIDTH, "height": button["y"] + button["height"] - top + 2 * MARGIN}
    page.screenshot(path=path, clip=clip, full_page=True)
    print(path)


def main():
    """Fill in an OGPSA run, and take the pictures in English and in Chinese."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chromium, playwright = board.find_chromium()
    images = ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as folder, board.browse(playwright, chromium) as context:
        (Path(folder) / "data").symlink_to(ROOT / "data")
        with board.serve(Path(folder)) as url:
            page = board.open_board(context, url)
            page.set_viewport_size({"width": WIDTH, "height": 1000})
            board.choose_stage(page, "Supervised Fine-Tuning (OGPSA)")
            board.field(page, "General sets").wait_for()
            board.choose(page, "Dataset", "safety_sft")
            board.choose(page, "General sets", "general_helpful", "general_truthful")
            take(page, "Stage", "Start", images / "webui_accordion.png")
            board.choose(page, "Language", "zh")
            page.get_by_role("button", name="开始", exact=True).filter(visible=True).wait_for()
            take(page, "训练阶段", "开始", images / "webui_chinese.png")


if __name__ == "__main__":
    main()
