"""Pictures of the records: docs/images/performance-*.png.

`python benchmarks/run.py --show --images docs/images` draws them from the newest records.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import MIB, OURS
from everlong.pictures import COLOURS, NUMBER, look, name_lines, name_ticks, new_panels, save_figure
from streaming import KEPT, parts

Record = Mapping[str, Any]
OWN, OTHER = COLOURS[0], "#9a9a9a"
EVERLONG_MODELS = ("mac", "mag", "mal", "lmm", "lm2")


def draw(records: Mapping[str, Record | None], folder: Path) -> list[Path]:
    """A picture for each record that is there; their files."""
    written = []
    for name, (benchmark, make) in PICTURES.items():
        record = records.get(benchmark)
        figure = make(record) if record else None
        if figure is not None:
            path = folder / f"performance-{name}.png"
            save_figure(figure, path)
            written.append(path)
    return written


def layer(record: Record) -> Any:
    """Tokens a second and peak memory of each case."""
    cases = record["cases"]
    figure, axes = new_panels(2 * len(cases), len(cases), 4 * len(cases), 4.4)
    for i, (title, case) in enumerate(cases.items()):
        speeds, peaks = case["tokens_per_second"], case["peak_bytes_above_imports"]
        bars(axes[i], speeds, lambda name, of=speeds: of[name], [OURS])
        bars(axes[len(cases) + i], peaks, lambda name, of=peaks: scaled(of[name], MIB), [OURS])
        axes[i].set_title(title, fontsize=10)
        axes[i].set_xlabel("tokens/s, forward + backward")
        axes[len(cases) + i].set_xlabel("peak memory, MiB")
    return figure


def training(record: Record) -> Any:
    """Tokens a second and peak memory of each model."""
    found = record.get("models")
    if not found:
        return None
    figure, axes = new_panels(2, 2, 10, 4.2)
    speeds, peaks = found["tokens_per_second"], found["peak_bytes_above_imports"]
    order = sorted(speeds, key=lambda name: -speeds[name]["median"])
    bars(axes[0], order, lambda name: speeds[name], EVERLONG_MODELS)
    measured = [name for name in order if name in peaks]
    bars(axes[1], measured, lambda name: scaled(peaks[name], MIB), EVERLONG_MODELS)
    axes[0].set_xlabel(f"tokens/s, training at {found['batch']} x {found['tokens']:,}")
    axes[1].set_xlabel("peak memory, MiB")
    axes[0].set_title("everlong in blue", fontsize=10, color=OWN, loc="left")
    return figure


def bars(
    axes: Any, names: Any, value: Callable[[str], Mapping[str, float]], own: Sequence[str]
) -> None:
    """Bars from the first name downwards, with the number at their end and the spread as a line."""
    names = list(names)
    spreads = [value(name) for name in names]
    medians = [each["median"] for each in spreads]
    errors = [
        [each["median"] - each["min"] for each in spreads],
        [each["max"] - each["median"] for each in spreads],
    ]
    colours = [OWN if name in own else OTHER for name in names]
    places = range(len(names))
    axes.barh(
        places, medians, color=colours, xerr=errors, error_kw={"elinewidth": 1, "ecolor": "#444444"}
    )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(each["max"] for each in spreads) or 1)  # tiny sizes may cost 0
    for place, each in zip(places, spreads, strict=True):
        axes.annotate(
            f"{each['median']:,.0f}",
            (each["max"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.locator_params(axis="x", nbins=4)


def scaled(values: Mapping[str, float], by: float) -> dict[str, float]:
    """A spread in another unit."""
    return {key: value / by for key, value in values.items()}


def lengths(record: Record) -> Any:
    """MAG and a full-attention Llama of as many parameters, over length."""
    rows = record.get("lengths")
    if not rows:
        return None
    names = {
        "mag": "everlong MAG",
        "llama": "Llama of as many parameters",
        "llama with a wider MLP alone": "the same, its MLP alone wider",
    }
    found = {
        title: [(row["tokens"], row["tokens_per_second"][name]) for row in rows]
        for name, title in names.items()
    }
    return curves(found, "tokens of a text", "tokens/s, training")


def decoding(record: Record) -> Any:
    """Milliseconds a token over what was read before: everlong's kinds, and Llama with its cache."""
    found: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for kind, places in record["positions"].items():
        found[f"everlong {kind}"] = [
            (place["position"], scaled(place["seconds_per_token"], 1e-3)) for place in places
        ]
    found["Llama and its cache"] = [
        (row["context"], scaled(row["seconds_per_token"]["llama"], 1e-3)) for row in record["contexts"]
    ]
    return curves(found, "tokens read before", "ms a token", vertical="log")


def op(record: Record) -> Any:
    """The share of the matrix product's rate over length, chunk, depth, head size and heads."""
    sweeps = {name: rows for name, rows in record["sweeps"].items() if rows}
    figure, axes = new_panels(len(sweeps), 3, 11, 3.1 * -(-len(sweeps) // 3))
    for each, (name, rows) in zip(axes, sweeps.items(), strict=True):
        lines = sorted({(back, row["case"]["training"]) for row in rows for back in row["share"]})
        for i, (backend, trains) in enumerate(lines):
            points = [
                (row["case"][name], 100 * row["share"][backend]["median"])
                for row in rows
                if row["case"]["training"] == trains and backend in row["share"]
            ]
            label = f"{backend}, {'forward + backward' if trains else 'forward'}"
            each.plot(*zip(*points, strict=True), label=label, **look(i))
        values = sorted({row["case"][name] for row in rows})
        each.set_xscale("log", base=2)
        each.set_ylim(bottom=0)
        each.grid(axis="y", alpha=0.25)
        each.set_xlabel({"tokens": "tokens", "head_dim": "size of a head"}.get(name, name))
        each.set_ylabel("% of the products' rate")
        name_ticks(each, {value: short(value) for value in values})
    axes[0].legend(fontsize=7)
    return figure


def streaming(record: Record) -> Any:
    """Speed and resident memory of each hundred thousand tokens."""
    figure, axes = new_panels(2, 2, 10, 3.6)
    span = KEPT[record["size"]]
    for i, (kind, found) in enumerate(record["kinds"].items()):
        tokens, speeds, memory = zip(*parts(found["blocks"], record["block"], span), strict=True)
        style = look(i) | {"marker": ""}
        axes[0].plot(tokens, speeds, label=f"everlong {kind}", **style)
        axes[1].plot(tokens, [each / MIB for each in memory], label=f"everlong {kind}", **style)
    for each, label in zip(axes, ("tokens/s", "resident memory, MiB"), strict=True):
        each.set_ylim(0, 1.15 * each.get_ylim()[1])
        each.set_xlabel("tokens read")
        each.set_ylabel(label)
        each.grid(axis="y", alpha=0.25)
        each.xaxis.set_major_formatter(lambda x, _: short(x))
        each.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes[0].legend(loc="lower left")
    return figure


def curves(
    found: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]],
    across: str,
    up: str,
    vertical: str = "linear",
) -> Any:
    """A line for each name over a logarithmic axis, with the spread as a band and names at its end."""
    figure, axes = new_panels(1, 1, 8, 4)
    ends = []
    for i, (name, points) in enumerate(found.items()):
        x, spreads = zip(*points, strict=True)
        low, middle, high = ([each[key] for each in spreads] for key in ("min", "median", "max"))
        axes[0].plot(x, middle, **look(i))
        axes[0].fill_between(x, low, high, color=look(i)["color"], alpha=0.15, linewidth=0)
        ends.append((middle[-1], name, look(i)))
    axes[0].set_xscale("log", base=2)
    if vertical == "log":
        axes[0].set_yscale("log", base=2)
        axes[0].yaxis.set_major_formatter(NUMBER)
        axes[0].minorticks_off()
    else:
        axes[0].set_ylim(bottom=0)
    axes[0].grid(axis="y", alpha=0.25)
    axes[0].set_xlabel(across)
    axes[0].set_ylabel(up)
    figure.draw_without_rendering()
    name_lines(axes[0], ends)
    name_ticks(axes[0], {x: short(x) for points in found.values() for x, _ in points})
    return figure


def short(value: float) -> str:
    """1250000 -> 1.25M; 16384 -> 16K; 384 -> 384."""
    for size, binary, letter in ((1e6, 2**20, "M"), (1e3, 2**10, "K")):
        if value >= size:
            return f"{value / (binary if value % binary == 0 else size):.3g}{letter}"
    return f"{value:g}"


PICTURES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "layer": ("layer", layer),
    "op": ("op", op),
    "training": ("training", training),
    "lengths": ("training", lengths),
    "decode": ("decode", decoding),
    "streaming": ("streaming", streaming),
}
