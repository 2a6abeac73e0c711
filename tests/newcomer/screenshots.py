"""Take the pictures of docs/images/ from MLflow's pages of a finished demo, in a headless Chromium.

    python tests/newcomer/screenshots.py FOLDER

FOLDER: where `harness run demo` has run, with its runs/ and mlflow.db. The addresses are those that the sweep's run shows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import Page, browser  # noqa: E402

from harness.config.grid import load_sweep  # noqa: E402
from harness.tracking.connection import Connection  # noqa: E402
from harness.tracking.views import run_page  # noqa: E402

SIZE = (1700, 900)
PORT = 5078
PICTURES = {  # file -> (the link of the sweep's run that leads there, what the page shows when it is complete)
    "mlflow-cells.png": ("cells, best first", "document.body?.innerText.includes('matching runs')"),
    "mlflow-curves.png": (
        "all methods over bits per weight",
        "document.querySelectorAll('.main-svg').length > 6",
    ),
}


def quiet(page: Page) -> None:
    """Close what MLflow opens beside a page at the first visit."""
    page.run(
        "[...document.querySelectorAll('button')].filter(b => /close|dismiss/i.test(b.ariaLabel || ''))"
        ".forEach(b => b.click())"
    )


def page_of_the_run() -> str:
    """Where the sweep's own run is, from the server's address on."""
    connection = Connection(load_sweep("demo"))
    experiment = connection.client.get_experiment_by_name(connection.experiment)
    runs = connection.search(experiment.experiment_id, "tags.`harness.sweep` = 'demo'")
    (run,) = (each for each in runs if "mlflow.parentRunId" not in each.data.tags)
    return run_page(experiment.experiment_id, run.info.run_id)


def main() -> None:
    """Start MLflow on the folder, take every picture, end it."""
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)
    start = f"http://127.0.0.1:{PORT}/{page_of_the_run()}"
    command = [sys.executable, "-m", "harness", "ui", "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        with browser() as page:
            page.size(*SIZE)
            for name, (link, complete) in PICTURES.items():
                page.open("about:blank")
                page.call("Page.navigate", url=start)
                page.wait(
                    "[...document.querySelectorAll('a')].some(a => /best first/.test(a.textContent))"
                )
                quiet(page)
                target = page.run(  # a click would open a tab of its own
                    "[...document.querySelectorAll('a')].find(a => a.textContent.trim() === "
                    f"{link!r}).href"
                )
                page.open("about:blank")
                page.call("Page.navigate", url=target)
                page.wait(complete)
                time.sleep(3)  # charts are drawn in steps
                quiet(page)
                time.sleep(1)
                page.picture(ROOT / "docs" / "images" / name)
                print(name, flush=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


if __name__ == "__main__":
    main()
