"""A recorded run as pictures and a table in docs/: `python -m bench.report bench/results/FILE.jsonl [PAGE]`.

PAGE is docs/<PAGE>.md; unless given, the one that the file's name ends in (-avx2: benchmarks_avx2).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.pages import write_part

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = "benchmarks"
OURS = ("uvg", "cpu", "triton", "cuda", "flash_attn_3", "flash_attn", "cudnn", "sdpa", "reference")
LINE = dict[str, Any]


def write(path: Path, page: str = PAGE) -> list[Path]:
    """Write the page's measured part and its pictures, of the dtype of most lines; returns what was written."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    timed = [line for line in lines if "ms" in line]
    if not timed:
        raise ValueError(f"a record must have timed lines, got {path} without one")
    dtype = Counter(line["dtype"] for line in timed).most_common(1)[0][0]
    drawn = [line for line in timed if line["dtype"] == dtype]
    pictures = {
        "GFLOP/s of the ops under the two roofs": _saved(roofline(drawn), f"{page}_roofline.png"),
        "How many times faster than each peer": _saved(bars(drawn), f"{page}_peers.png"),
        "Time of self-attention over the length": _saved(lengths(drawn), f"{page}_lengths.png"),
    }
    shown = "\n\n".join(f"![{what}](images/{picture.name})" for what, picture in pictures.items() if picture)
    told = f"From `bench/results/{path.name}`: {about(lines)}.\n\n{shown}\n\n{table(lines)}"
    file = DOCS / f"{page}.md"
    write_part(file, "measured", f"\n{told}")
    return [file, *(picture for picture in pictures.values() if picture)]


def about(lines: Sequence[LINE]) -> str:
    """Machine and versions of a run; all of them where it was gone on with later."""
    names = ("device", "cores", "threads", "clock", "torch", "openvino", "diffusers", "commit", "date")
    values = {name: list(dict.fromkeys(str(line[name]) for line in lines if name in line)) for name in names}
    return ", ".join(f"{name} {' and '.join(values[name])}" for name in names if values[name])


def table(lines: Sequence[LINE]) -> str:
    """Markdown: one row per timed contender, best of ours and the peers' ratio to it."""
    rows = ["| op | shape | dtype | pass | by | ms (spread) | rate | of the roof | times faster than | peak MB |"]
    rows.append("|---|---|---|---|---|---|---|---|---|---|")
    for line in (line for line in lines if "refused" not in line):
        name = f"{line['op']} {line.get('case', '')}".strip()
        head = f"| `{name}` | {line['shape']} | {line['dtype']} | {line['pass']} | {line['backend']} |"
        if "ms" not in line:
            why = next(f"{why}: {line[why]}" for why in ("missing", "refused", "wrong", "slow") if why in line)
            rows.append(f"{head} {why.replace('|', '/')} | | | | |")
            continue
        rate, share = "", ""
        if "gflops" in line:
            near = line["roof"]["gflops"] * line["gbs"] < line["roof"]["gbs"] * line["gflops"]
            rate = f"{line['gflops']:.0f} GFLOP/s" if near else f"{line['gbs']:.1f} GB/s"
            share = f"{line['of_roof']:.0%}"
        elif "samples_per_second" in line:
            rate = f"{line['samples_per_second']:.3g} samples/s, {line['tokens_per_second']:.3g} tokens/s"
        faster = ", ".join(f"{other} {ratio:.2f}" for other, ratio in line["times_faster"].items())
        memory = f"{line['extra_mb']:.0f}" if "extra_mb" in line else ""
        rows.append(f"{head} {line['ms']:.4g} (±{line['spread']:.0%}) | {rate} | {share} | {faster} | {memory} |")
    return "\n".join(rows)


def roofline(lines: Sequence[LINE]) -> Any:
    """A figure of GFLOP/s of ours over flops per byte, under both roofs."""
    points = [line for line in best(lines) if line["pass"] == "forward" and line["op"] != "block"]
    points = [line for line in points if line.get("gflops")]
    if not points:
        return None
    figure, axes = _figure()
    roof = {rate: max(line["roof"][rate] for line in points) for rate in ("gflops", "gbs")}
    intensities = [line["gflops"] / line["gbs"] for line in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    edge = roof["gflops"] / roof["gbs"]
    axes.plot([low, edge, high], [low * roof["gbs"], roof["gflops"], roof["gflops"]], color="black")
    for number, (x, line) in enumerate(zip(intensities, points, strict=True)):
        label = f"{line['op']} {line['case']}".strip() + f", {line['shape']}"
        axes.plot([x], [line["gflops"]], marker="osD^vP*X"[number % 8], linestyle="", label=label)
    title = f"Forward, {lines[0]['dtype']}: ours"
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="GFLOP/s", title=title)
    axes.legend(fontsize=6)
    return figure


def bars(lines: Sequence[LINE]) -> Any:
    """A figure of how many times faster than each peer ours are; one bar is as fast as the peer."""
    shown = [line for line in best(lines) if line["times_faster"] and "case" in line]
    entries = [
        (f"{line['op']} {line['case']} {line['shape']}, {line['pass']}: {peer}", ratio)
        for line in shown
        for peer, ratio in line["times_faster"].items()
        if peer != "reference"
    ]
    if not entries:
        return None
    figure, axes = _figure(height=1 + 0.2 * len(entries))
    names, ratios = zip(*reversed(entries), strict=True)
    axes.barh(names, ratios, color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="times faster than the peer (median of the rounds' ratios)")
    return figure


def lengths(lines: Sequence[LINE]) -> Any:
    """A figure of the time of self-attention over the length of a sample, for everyone who was timed."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        mine = line["op"] == "flash_attention" and line["case"] == "self" and line["pass"] == "forward"
        if mine and line["shape"].startswith("B=1 "):
            length = int(line["shape"].split("L=")[1].split()[0])
            series.setdefault(line["backend"], []).append((length, line["ms"]))
    if not series:
        return None
    figure, axes = _figure()
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    title = f"Self-attention, {lines[0]['dtype']}, forward"
    axes.set(xscale="log", yscale="log", xlabel="rows of the sample", ylabel="ms", title=title)
    axes.legend()
    return figure


def best(lines: Sequence[LINE]) -> list[LINE]:
    """The line of ours that serves: the first of OURS that was timed, for each op, case, shape, dtype and pass."""
    found: dict[tuple[str, ...], LINE] = {}
    for line in sorted(
        (line for line in lines if line["backend"] in OURS), key=lambda line: OURS.index(line["backend"])
    ):
        found.setdefault(tuple(str(line.get(n)) for n in ("op", "case", "shape", "dtype", "pass")), line)
    return list(found.values())


def _figure(height: float = 5.0) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(9, height), layout="constrained")


def _saved(figure: Any, name: str) -> Path | None:
    if figure is None:
        return None
    figure.savefig(DOCS / "images" / name, dpi=110)
    return DOCS / "images" / name


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a recorded file and tell what was written."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A recorded run as a page of docs/.")
    parser.add_argument("file", type=Path, help="bench/results/*.jsonl, as python -m bench --record writes it")
    parser.add_argument("page", nargs="?", help="docs/PAGE.md is written; default: the one of the file's name")
    args = parser.parse_args(arguments)
    page = args.page or page_of(args.file)
    for path in (args.file, DOCS / f"{page}.md"):
        if not path.is_file():
            parser.error(f"no such file: {path}")
    for made in write(args.file, page):
        print(made)


def page_of(path: Path) -> str:
    """The page that a file of results is of, by its name."""
    others = (page.stem for page in DOCS.glob(f"{PAGE}_*.md"))
    return next((name for name in others if path.stem.endswith(name.removeprefix(PAGE).replace("_", "-"))), PAGE)


if __name__ == "__main__":
    main()
