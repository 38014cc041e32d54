"""The README that a saved model carries, so that its folder can go to a hub as it is."""

import json
from pathlib import Path

from transformers import PreTrainedConfig

CARD = """---
library_name: everlong
pipeline_tag: text-generation
tags:
- everlong
- {kind}
- memory
---

# {name}

Opens with `import everlong` before `from_pretrained`: without it `transformers` does not know the model
type `{kind}`, and says that it is out of date.

A {kind} language model of everlong. {memory}, so its state has one size however long
the text is. {parameters} parameters{layers}.

```python
import everlong  # registers the model with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # this folder's path, or its name on a hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)  # where the tokenizer was saved beside the model
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

What one call has read, the next can go on from: `past_key_values` of `model(..., use_cache=True)` holds
the memory, and `past_key_values.save("memory.safetensors")` keeps it apart from the model.

## Configuration

```json
{config}
```
"""

MEMORIES = {
    "titans": "Its memory learns while it reads",
    "lm2": "It reads in segments and keeps a bank of slots from one to the next",
    "rmt": "It reads in segments and hands itself a few rows from one to the next",
}


def write_card(folder: str | Path, config: PreTrainedConfig, parameters: int) -> None:
    """Write README.md into a saved model's folder, unless there is one."""
    path = Path(folder) / "README.md"
    if path.exists():
        return
    fields = config.to_diff_dict()
    layers: list[str] = getattr(config, "layer_types", None) or []
    counts = [f"{layers.count(kind)} {kind}" for kind in dict.fromkeys(layers)]
    path.write_text(
        CARD.format(
            kind=config.model_type,
            memory=MEMORIES[config.model_type],
            name=Path(folder).resolve().name,
            parameters=f"{parameters:,}",
            layers=f"; layers: {', '.join(counts)}" if counts else "",
            config=json.dumps(fields, indent=2),
        ),
        encoding="utf-8",
    )
