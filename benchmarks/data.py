"""The data path of language modelling: speed of tokenising and of the data set, and its memory.

`make bench-data`, or `python benchmarks/data.py --help`. Notable here:

- The text is synthetic: words of a made-up vocabulary, drawn by Zipf's law, in JSONL.
- Bytes a second are of the whole way from the file to the tokens on disk, not of the mapping alone.
- Memory is the resident peak of a process of its own, which tokenises the large text and reads rows.
- What a small model consumes is measured in training steps of a model as small as the recipes' own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MB = 10**6
BARS = {
    "byte_mb_per_second": 50.0,
    "bpe_mb_per_second": 2.0,
    "data_over_model": 10.0,
    "peak_mb": 500.0,
}


def main() -> None:
    """Measure all; print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text; default: %(default)s")
    parser.add_argument("--bpe_megabytes", type=int, default=20, help="for BPE; default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="of a row; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(tokenise_and_read(*options.child, options.length)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options)
    from everlong.provenance import provenance

    show(results)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"data-{date.today()}.json"
    about = {"megabytes": options.megabytes, "length": options.length, "bars": BARS}
    text = json.dumps({"provenance": provenance(), **about, "results": results}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written: {path}")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """All numbers, by their names."""
    source = folder / "text.jsonl"
    write_text(source, options.megabytes * MB)
    command = [sys.executable, __file__, "--length", str(options.length)]
    command += ["--child", str(source), str(folder / "cache")]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    consumed = model_speed(options.length)
    return {
        **found,
        "bpe_mb_per_second": bpe_speed(source, folder, options.bpe_megabytes * MB),
        "model_tokens_per_second": consumed,
        "data_over_model": found["data_tokens_per_second"] / consumed,
    }


def write_text(path: Path, size: int) -> None:
    """Documents of some kilobytes each, `size` bytes of text in all."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)])
    with path.open("w", encoding="utf-8") as file:
        while size > 0:
            drawn = np.minimum(rng.zipf(1.2, 50_000), len(words)) - 1
            text = " ".join(words[drawn])
            for start in range(0, len(text), 4000):
                part = text[start : start + 4000]
                file.write(json.dumps({"text": part}) + "\n")
                size -= len(part)


def tokenise_and_read(source: str, cache: str, length: int) -> dict[str, float]:
    """By bytes, and rows read one by one; in this process, whose peak it gives too."""
    from everlong.data import TextConfig

    config = TextConfig(source=source, cache_folder=cache, length=length)
    started = time.perf_counter()
    data, _ = config.datasets(4000)
    seconds = time.perf_counter() - started
    tokens = sum(file.stat().st_size for file in Path(cache).rglob("tokens.bin"))
    data[0]  # the order of the pass
    started = time.perf_counter()
    for index in range(1, len(data)):
        data[index]
    reading = (len(data) - 1) * length / (time.perf_counter() - started)
    peak = peak_memory() / MB
    return {
        "byte_mb_per_second": tokens / MB / seconds,
        "data_tokens_per_second": reading,
        "peak_mb": peak,
    }


def peak_memory() -> int:
    """The most bytes that were resident. Elsewhere than on Linux a parent's peak may be in it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def bpe_speed(source: Path, folder: Path, size: int) -> float:
    """MB of text a second by a BPE of 8,192 tokens, in one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from everlong.data import read_pieces, train_tokenizer
    from everlong.data.corpus import write_corpus

    texts = (piece.text.decode() for piece in read_pieces(str(source), max_bytes=5 * MB))
    tokenizer = train_tokenizer(texts, 8192)
    out = folder / "bpe"
    out.mkdir()
    started = time.perf_counter()
    write_corpus(out, read_pieces(str(source), max_bytes=size), tokenizer)
    return size / MB / (time.perf_counter() - started)


def model_speed(length: int, batch: int = 16, steps: int = 5) -> float:
    """Tokens a second that training a small Llama takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from everlong.models import model_config

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = model_config("llama", None, vocab_size=259, num_attention_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(256, (batch, length))
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps * batch * length / (time.perf_counter() - started)


def show(results: dict[str, float]) -> None:
    """A line for each number, with its bar where it has one."""
    print(f"{'':28}{'measured':>14}{'bar':>10}")
    for name, value in results.items():
        bar = BARS.get(name)
        sign = "" if bar is None else f"{'<' if name == 'peak_mb' else '>='} {bar:,.0f}"
        print(f"{name:28}{value:14,.1f}{sign:>10}")


if __name__ == "__main__":
    main()
