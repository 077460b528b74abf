"""Show what the demo wrote: a few answers, how many are right, and where everything lies.

Its command: python launch/show_demo.py [RUN_DIR]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset

NUM_SHOWN = 5
DEMO_RUN = Path(__file__).resolve().parents[1] / "runs" / "demo"


def last_integer(text: object) -> int | None:
    """The last integer in a text, which is where a model that reasons aloud puts its answer."""
    # A minus counts as a sign unless a digit stands before it: "12-5" ends in 5.
    found = re.findall(r"(?<!\d)-?\d+", str(text).replace(",", ""))
    return int(found[-1]) if found else None


def is_right(row: dict[str, Any]) -> bool:
    """Whether a row's text ends in the number that its answer column holds."""
    expected = last_integer(row["answer"])
    return expected is not None and last_integer(row["generated_text"] or "") == expected


def show(rows: Dataset) -> None:
    """Print the first few rows, and the score over all of them."""
    for row in rows.select(range(min(NUM_SHOWN, len(rows)))):
        text = row["generated_text"] if row["error"] is None else f"[{row['error']['type']}]"
        verdict = "right" if is_right(row) else f"wrong, it is {row['answer']}"
        print(f"  {' '.join(row['question'].split())}")
        print(f"    {' '.join((text or '').split())}   ({verdict})")
    num_right = sum(map(is_right, rows))
    percent = 100 * num_right / max(len(rows), 1)
    print(f"\n{num_right} of {len(rows)} answers are right ({percent:.1f} %)")


def main() -> int:
    """Print the page; 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", nargs="?", type=Path, default=DEMO_RUN)
    run_dir: Path = parser.parse_args().run_dir.expanduser().resolve()
    dataset_dir = run_dir / "dataset"
    if not dataset_dir.is_dir():
        print(f"{dataset_dir} is not there: the run is not finished; launch/demo.sh runs it", file=sys.stderr)
        return 1
    disable_progress_bars()
    show(load_dataset(str(dataset_dir), split="train"))

    print("\nThe results:")
    print(f'  {dataset_dir}   all rows, in input order: datasets.load_dataset("{dataset_dir}")')
    report = run_dir / "report.html"
    if report.is_file():
        print(f"  {report}   how the run went; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
