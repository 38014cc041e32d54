"""What must be shown, and what the records show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common import MIB, OURS, table

Record = Mapping[str, Any]
LLAMAS = {  # of as many parameters
    "llama": "an equal Llama, wider all over",
    "llama with a wider MLP alone": "one with a wider MLP alone",
}


@dataclass(frozen=True)
class Bar:
    """A figure of a record and where it has to lie; find raises LookupError where it is not there."""

    what: str
    benchmark: str
    find: Callable[[Record], float]
    bar: float
    at_most: bool = False
    form: str = ".2f"
    unit: str = "x"

    def row(self, records: Mapping[str, Record | None]) -> list[str]:
        """Name, figure, bar, and whether it was met."""
        sign = "at most" if self.at_most else "at least"
        wanted = f"{sign} {self.bar:{self.form}}{self.unit}"
        record = records.get(self.benchmark)
        try:
            if record is None:
                raise LookupError
            found = self.find(record)
        except LookupError:
            return [self.what, "-", wanted, "not measured"]
        told, verdict = f"{found:{self.form}}{self.unit}", self.verdict(found)
        if verdict == "missed" and told in wanted:  # by less than its digits
            told = f"{found:.4g}{self.unit}"
        return [self.what, told, wanted, verdict]

    def verdict(self, found: float) -> str:
        """met or missed; NaN is missed."""
        return "met" if (found <= self.bar if self.at_most else found >= self.bar) else "missed"


def layer_case(record: Record, number: int) -> Record:
    """By its place among the three."""
    return list(record["cases"].values())[number]


def over_llama(record: Record, name: str) -> float:
    """Training speed."""
    return record["models"]["speed_over_llama"][name]["median"]


def above_llama(record: Record) -> float:
    """Most MB of everlong's models above Llama's."""
    above = record["models"]["bytes_above_llama"]
    return max(above[name] for name in ("mac", "mag", "lmm")) / 1e6


def at_length(record: Record, tokens: int, llama: str) -> float:
    """MAG over a Llama of as many parameters."""
    for row in record["lengths"]:
        if row["tokens"] == tokens:
            return row["speed_over"][llama]["median"]
    raise LookupError(tokens)


def slowest_last(record: Record) -> float:
    """Time at the last position over that at the first, of the kind where it is most."""
    return max(places[-1]["time_over_first"]["median"] for places in record["positions"].values())


def state_growth(record: Record) -> float:
    """Bytes of the state at the last position over those at the first, most of any kind."""
    each = record["positions"].values()
    return max(places[-1]["state_bytes"] - places[0]["state_bytes"] for places in each) / MIB


def resident_growth(record: Record) -> float:
    """MiB of the process at the last position above the first, most of any kind."""
    each = record["positions"].values()
    return max(places[-1]["resident_bytes"] - places[0]["resident_bytes"] for places in each) / MIB


def decode_over_llama(record: Record, context: int) -> float:
    """Of the slowest kind, behind such a context."""
    for row in record["contexts"]:
        if row["context"] == context:
            speeds = row["speed_over_llama"]
            return min(speed["median"] for name, speed in speeds.items() if name != "llama")
    raise LookupError(context)


def layer_bars() -> list[Bar]:
    """Speed, share and memory of the layer."""
    names = ("6 heads of 64, chunk 64", "1 head of 384", "chunk 16")
    rival = "titans-pytorch"

    def speed(number: int) -> Callable[[Record], float]:
        return lambda record: layer_case(record, number)["speed_ratio"][rival]["median"]

    def memory(number: int) -> Callable[[Record], float]:
        return lambda record: layer_case(record, number)["memory_ratio"][rival]

    def product_share(record: Record) -> float:
        return layer_case(record, 0)["share_of_matrix_product_rate"]["median"]

    return [
        *[
            Bar(f"layer, {name}: speed over {rival}", "layer", speed(i), bar)
            for i, (name, bar) in enumerate(zip(names, (2.5, 3.0, 8.0), strict=True))
        ],
        Bar(
            f"layer, {names[0]}: of the products' rate", "layer", product_share, 0.42, False, ".0%", ""
        ),
        *[
            Bar(f"layer, {name}: memory over {rival}'s", "layer", memory(i), 0.25, True)
            for i, name in enumerate(names)
        ],
    ]


def training_bars() -> list[Bar]:
    """Speed and memory of whole models."""

    def speed(name: str) -> Callable[[Record], float]:
        return lambda record: over_llama(record, name)

    def length(tokens: int, llama: str) -> Callable[[Record], float]:
        return lambda record: at_length(record, tokens, llama)

    def mac(record: Record) -> float:
        return record["models"]["speed_over_titans-pytorch-mac"]["mac"]["median"]

    return [
        *[
            Bar(f"training, {name}: speed over Llama", "training", speed(name), bar)
            for name, bar in (("mac", 0.43), ("mag", 0.57), ("lmm", 0.76))
        ],
        Bar("training, mac: speed over titans-pytorch's", "training", mac, 4.0),
        Bar("training, peak memory above Llama's", "training", above_llama, 300, True, ".0f", " MB"),
        *[
            Bar(f"training, mag at {n:,} over {said}", "training", length(n, name), bar)
            for n, bar in ((4096, 1.0), (16384, 2.5))
            for name, said in LLAMAS.items()
        ],
    ]


def constancy_bars() -> list[Bar]:
    """Decoding and streaming; memory that the text's length must not change."""

    def streamed(name: str) -> Callable[[Record], float]:
        return lambda record: record["kinds"]["mac"][name]

    def beside_llama(record: Record) -> float:
        return decode_over_llama(record, 32768)

    memory, speed = "resident_largest_over_smallest", "speed_of_last_over_first"
    return [
        Bar("decode, time at the last position over the first", "decode", slowest_last, 1.05, True),
        Bar("decode, growth of the state", "decode", state_growth, 0, True, ".1f", " MiB"),
        Bar("decode, growth of the process", "decode", resident_growth, 1, True, ".1f", " MiB"),
        Bar("decode, speed over Llama's behind 32,768", "decode", beside_llama, 5.0),
        Bar("streaming, resident most over least", "streaming", streamed(memory), 1.02, True, ".3f"),
        Bar("streaming, last speed over first", "streaming", streamed(speed), 0.95, False, ".3f"),
    ]


def rows_of(records: Mapping[str, Record | None]) -> list[list[str]]:
    """Each figure beside its bar."""
    return [bar.row(records) for bar in (*layer_bars(), *training_bars(), *constancy_bars())]


def show(records: Mapping[str, Record | None]) -> None:
    """Print it, with what was measured and where."""
    known = [record for record in records.values() if record]
    cuda = any(record["device"] == "cuda" for record in known)
    bars = "bars, which are meant for two CPU cores" if cuda else "bars"
    if any(record["size"] == "tiny" for record in known):
        bars += "; tiny sizes, to try the code, say nothing"
    heads = ["medians of ratios within a round", OURS, "bar", ""]
    table(f"The figures beside their {bars}", heads, rows_of(records))
    for record in known:
        where = record["accelerator"] if record["device"] == "cuda" else record["processor"]
        threads = f"{record['torch_threads']} threads"
        print(f"{record['benchmark']}: {record['size']}, {record['date']}, {where}, {threads}")
