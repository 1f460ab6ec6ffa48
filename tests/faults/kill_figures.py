"""What kills.py found, as a section of the page: runs with other seeds are added up."""

import collections
import importlib
import pathlib
import re


def write(page: pathlib.Path, way: str, found: dict) -> None:
    together = add_figures(read_figures(page.read_text(encoding="utf-8"), way), found)
    importlib.import_module("workloads").write_section(page, f"kills_{way}", format_figures(together))


def format_figures(found: dict) -> str:
    """A table of what was killed where, for the page."""
    rows = "\n".join(f"| {kind} | {count} |" for kind, count in sorted(found["hit"].items()))
    outlived = f"; the other process ended within {found['outlived']:.1f} s" if found["outlived"] else ""
    return (
        f"{found['kills']} kills in {found['runs']} runs, of which **{found['runs']}** ended in the bytes of a run "
        f"that was not killed; {found['seconds'] / found['kills']:.1f} s a kill; {len(found['hit'])} of "
        f"{found['kinds']} kinds of instants met; seeds {', '.join(map(str, found['seeds']))}{outlived}.\n\n"
        f"| killed at, or up to 30 ms after | kills |\n|---|---|\n{rows}"
    )


def read_figures(page: str, way: str) -> dict | None:
    """What ``format_figures`` wrote, where it says of which seeds."""
    text = re.search(rf"<!-- kills_{way} -->\n(.*?)\n<!-- /", page, re.DOTALL)[1]
    numbers = re.match(r"(\d+) kills in (\d+) runs.*; ([\d.]+) s a kill; \d+ of (\d+) kinds.*; seeds ([\d, ]+)", text)
    if numbers is None:
        return None
    kills, runs, each, kinds, seeds = numbers.groups()
    outlived = re.search(r"within ([\d.]+) s", text)
    return {
        "kills": int(kills),
        "runs": int(runs),
        "kinds": int(kinds),
        "seconds": float(each) * int(kills),
        "outlived": float(outlived[1]) if outlived else 0.0,
        "seeds": [int(seed) for seed in seeds.split(", ")],
        "hit": {kind: int(count) for kind, count in re.findall(r"^\| (.+) \| (\d+) \|$", text, re.MULTILINE)},
    }


def add_figures(before: dict | None, found: dict) -> dict:
    """Both together; those of a seed that is there already are not another sample."""
    if before is None or set(before["seeds"]) & set(found["seeds"]):
        return found
    together = {key: before[key] + found[key] for key in ("kills", "runs", "seconds", "seeds")}
    most = {key: max(before[key], found[key]) for key in ("kinds", "outlived")}
    return together | most | {"hit": collections.Counter(before["hit"]) + collections.Counter(found["hit"])}
