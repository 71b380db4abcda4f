# SPDX-License-Identifier: Apache-2.0

"""The table and the pictures of what examples/benchmarks/step_cost.py measured."""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from trl_perce.utils.files import written_whole


COLORS = {"sft": "#6b6b6b", "lossce": "#7570b3", "drop": "#1f77b4", "mask": "#d95f02", "refresh3": "#1b9e77"}
NAMES = {
    "sft": "SFT",
    "lossce": "LossCE",
    "drop": "PerCE drop",
    "mask": "PerCE mask",
    "refresh3": "PerCE drop, refresh 3",
}
GIB = 2**30


def summarize(cell: dict) -> list[dict]:
    """
    The rows of the table that a measured cell gives, one a variant: `variant`, `seconds`, `tokens_per_second`, `peak_gib`,
    `ratio` and `peak_ratio` (to SFT), `floor` and `ratio_over_floor`. What was not measured is `None`.
    """
    settings, results = cell["settings"], cell["results"]
    tokens = settings["persona"] + settings["question"] + settings["response"]
    tokens *= settings["batch_size"] * settings["accumulation"]
    sft = results.get("sft", {"out_of_memory": True})
    rows = []
    for variant, result in results.items():
        row = dict.fromkeys(("seconds", "tokens_per_second", "peak_gib", "ratio", "peak_ratio", "ratio_over_floor"))
        row |= {"variant": variant, "floor": result["floor"], "out_of_memory": "out_of_memory" in result}
        if "seconds" in result:
            row |= {
                "seconds": result["seconds"],
                "tokens_per_second": tokens / result["seconds"],
                "peak_gib": result["peak_bytes"] / GIB,
            }
        if "seconds" in result and "seconds" in sft:
            row["ratio"] = result["seconds"] / sft["seconds"]
            row["ratio_over_floor"] = row["ratio"] / row["floor"]
            row["peak_ratio"] = result["peak_bytes"] / sft["peak_bytes"]
        rows.append(row)
    return rows


def _grouped(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    groups = defaultdict(list)
    for cell in cells:
        groups[cell["settings"]["model"], cell["settings"]["quantization"]].append(cell)
    return groups


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(report: dict) -> str:
    """The report as Markdown: one table for each model and kind of base weights."""
    lines = []
    for (model, quantization), cells in _grouped(report["cells"]).items():
        environment = cells[-1]["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        lines += [
            f"### {model}, {quantization}",
            "",
            f"{environment['device']}, {environment['date']}, {versions}. `{environment['command']}`",
            "",
            "| rows | persona | question | response | batch × accumulation | checkpointing | variant | s/step | ratio to SFT "
            "| floor | ratio over floor | peak GiB | peak ratio | tokens/s |",
            "|---|" + "---:|" * 4 + "---|---|" + "---:|" * 7,
        ]
        for cell in cells:
            settings = cell["settings"]
            shape = [cell["rows"], *(f"{settings[name]}" for name in ("persona", "question", "response"))]
            shape += [f"{settings['batch_size']} × {settings['accumulation']}", cell["settings"]["checkpointing"]]
            for row in summarize(cell):
                seconds = "out of memory" if row["out_of_memory"] else _number(row["seconds"], 3)
                numbers = [seconds, *(_number(row[name], 3) for name in ("ratio", "floor", "ratio_over_floor"))]
                numbers += [_number(row["peak_gib"], 2), _number(row["peak_ratio"], 3)]
                numbers += [_number(row["tokens_per_second"], 0)]
                lines.append("| " + " | ".join([*shape, NAMES[row["variant"]], *numbers]) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(report: dict, folder: Path) -> list[Path]:
    """
    Draw one picture for each model and kind of base weights: above, the ratio of step times against the persona's length,
    with its floor dashed; below, the ratios at the profiles, with their floors as black lines. One column for each
    accumulation and checkpointing.

    Returns:
        `list[Path]`: The PNG files.
    """
    paths = []
    for (model, quantization), cells in _grouped(report["cells"]).items():
        columns = defaultdict(list)
        for cell in cells:
            columns[cell["settings"]["accumulation"], cell["settings"]["checkpointing"]].append(cell)
        kinds = [
            kind for kind in ("length", "profile") if any((c["rows"] == "length") == (kind == "length") for c in cells)
        ]
        size = (max(4.2 * len(columns), 6.4), 3.4 * len(kinds) + 0.9)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(kinds), len(columns), squeeze=False, sharey="row")
        for column, ((accumulation, checkpointing), chosen) in enumerate(sorted(columns.items())):
            for line, kind in enumerate(kinds):
                axis = axes[line, column]
                shown = [cell for cell in chosen if (cell["rows"] == "length") == (kind == "length")]
                if not shown:
                    axis.set_visible(False)
                    continue
                (_draw_lengths if kind == "length" else _draw_profiles)(axis, shown)
                axis.set_title(f"accumulation {accumulation}, checkpointing {checkpointing}", fontsize=10)
                axis.axhline(1, color=COLORS["sft"], linewidth=1, zorder=0)
                axis.spines[["top", "right"]].set_visible(False)
                axis.grid(axis="y", alpha=0.25)
                axis.set_axisbelow(True)
                if column == 0:
                    axis.set_ylabel("step time / SFT's")
        handles = {}
        for axis in axes.flat:
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        figure.suptitle(f"{model}, {quantization}: {cells[-1]['environment']['device']}", fontsize=11)
        paths.append(folder / f"step_cost_{model}_{quantization}.png")
        with written_whole(paths[-1]) as part:
            figure.savefig(part, dpi=150, format="png")
    return paths


def _by_variant(cells: list[dict]) -> dict[str, list[tuple[dict, dict]]]:
    """For each PerCE variant, the cells in which its ratio was measured and its summary there."""
    rows = defaultdict(list)
    for cell in cells:
        for row in summarize(cell):
            if row["variant"] != "sft" and row["ratio"] is not None:
                rows[row["variant"]].append((cell, row))
    return rows


def _draw_lengths(axis, cells: list[dict]) -> None:
    cells = sorted(cells, key=lambda cell: cell["settings"]["persona"])
    for variant, rows in _by_variant(cells).items():
        personas = [cell["settings"]["persona"] for cell, _ in rows]
        color = COLORS[variant]
        axis.plot(personas, [row["ratio"] for _, row in rows], "o-", markersize=4, color=color, label=NAMES[variant])
        axis.plot(personas, [row["floor"] for _, row in rows], "--", linewidth=1.2, color=color)
    axis.plot([], [], "--", linewidth=1.2, color="black", label="floor of a line")
    personas = [cell["settings"]["persona"] for cell in cells]
    axis.set_xscale("log", base=2)
    axis.set_xticks(
        personas, [f"{persona:,}" for persona in personas], fontsize=8, rotation=45 if len(personas) > 5 else 0
    )
    axis.set_xlabel("persona, tokens")


def _draw_profiles(axis, cells: list[dict]) -> None:
    profiles = list(dict.fromkeys(cell["rows"] for cell in cells))
    variants = _by_variant(cells)
    width = 0.8 / max(len(variants), 1)
    for index, (variant, rows) in enumerate(variants.items()):
        places = [profiles.index(cell["rows"]) + (index - (len(variants) - 1) / 2) * width for cell, _ in rows]
        ratios = [row["ratio"] for _, row in rows]
        axis.bar(places, ratios, width * 0.92, color=COLORS[variant], label=NAMES[variant])
        for place, (_, row) in zip(places, rows, strict=True):
            axis.hlines(row["floor"], place - width / 2, place + width / 2, color="black", linewidth=1.6)
            axis.annotate(f"{row['ratio']:.2f}", (place, row["ratio"]), ha="center", va="bottom", fontsize=7)
    axis.plot([], [], color="black", linewidth=1.6, label="floor of a bar")
    axis.set_xticks(range(len(profiles)), profiles)
    axis.set_xlim(-0.6, max(len(profiles), 2) - 0.4)
    axis.set_xlabel("LongLaMP profile")
