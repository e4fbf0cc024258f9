"""The model card of an exported folder: what is known from the files, and what the user adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sinkpretrain import __version__, metrics, outside, sinks
from sinkpretrain.config import RunConfig, load_yaml, to_dict
from sinkpretrain.errors import UserError
from sinkpretrain.exporters import FORMS, Form
from sinkpretrain.files import read_json, sha256_file
from sinkpretrain.load import LoadedModel
from sinkpretrain.mechanism import NOTHING


def model_card(loaded: LoadedModel, form: Form, tokenizer: Any, dtype: str, note: str = "") -> str:
    """What the model is, what it was trained on and how it did, how to load and to stream it; Markdown.

    Args:
        note: a paragraph of the user's own.
    """
    model, about = loaded.trained, loaded.provenance()
    config = model.config
    kind = sinks.mechanism_class(model.sink_config)
    window = f"{config.window} tokens before each, and the first {config.window_sinks}" if config.window else "none"
    paragraph = f"\n{note.strip()}\n" if note.strip() else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {loaded.name}

A GPT-NeoX language model with the sink mechanism `{loaded.label}`, exported by sinkpretrain {__version__} for
transformers: {FORMS[form]}.
{paragraph}
| | |
|---|---|
| sink mechanism | `{loaded.label}`: {kind.summary} ({kind.source}) |
| layers, width, heads, MLP | {config.n_layer}, {config.d_model}, {config.n_head}, {config.d_ff} |
| context | {config.context} tokens, what is prepended included |
| attention window | {window} |
| vocabulary | {config.vocab_size} rows, of which text uses the first {config.tokenizer_size} |
| parameters | {about["parameters"]:,}, of which {model.n_parameters(embeddings=False):,} outside embeddings |
| optimizer steps | {"unknown" if loaded.step is None else loaded.step} |
| stored as | {dtype} |
| sha256 of the source weights | `{sha256_file(*loaded.files)}` |
{_training(loaded)}
## What comes first

{_first(loaded, tokenizer)}

## Loading it

{_LOADING[form]}{_module(loaded, form)}
```python
{_code(form, tokenizer is not None)}```
{"" if tokenizer else NO_TOKENIZER}
{_streaming(loaded, tokenizer is not None)}"""


NO_TOKENIZER = "\nThis folder holds weights only: no tokenizer lay beside the model that was exported.\n"

_LOADING: dict[Form, str] = {
    "stock": "With transformers alone:\n",
    "seeded": (
        "With transformers alone, **and the file `seeded_slot.py` of this folder**: the mechanism is one key and value "
        "per layer that every query sees and no token made. A cache has to start with them; without it this is "
        "another, worse model, and nothing warns you.\n"
    ),
    "own": (
        "Needs `pip install sinkpretrain`, whose import registers the class; `trust_remote_code=True` does without the "
        "import.\n"
    ),
}


def _module(loaded: LoadedModel, form: Form) -> str:
    """What it needs beside this package, where its mechanism is from outside of it."""
    sink = loaded.model.sink_config
    if not sink.from_outside:
        return ""
    module, _, name = sink.mechanism.partition(":")
    start = "**The" if form == "own" else "For sinkpretrain's own commands, **the"
    return (
        f"\n{start} module `{module}` is needed as well**: the mechanism is its class `{name}`, which is no part of "
        "sinkpretrain. Python must find it, in the current directory or on `PYTHONPATH`. Its code is in the folder's "
        f"`{outside.FOLDER}`, to be read; nothing is imported from there.\n"
    )


def _code(form: Form, has_tokenizer: bool) -> str:
    lines = [f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}"]
    if form == "own":
        lines.append("import sinkpretrain.hf_model")
    if form == "seeded":
        lines.append("from seeded_slot import forward_inputs, generate_inputs  # with FOLDER on sys.path")
    lines += ["", 'model = AutoModelForCausalLM.from_pretrained("FOLDER")']
    if has_tokenizer:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER", padding_side="left")',
            'inputs = tokenizer(["Once upon a time"], padding=True, return_tensors="pt")',
        ]
    else:
        lines.append('inputs = {"input_ids": ...}  # ids [B, T]')
    if form == "seeded":
        lines += [
            "logits = model(**forward_inputs(model, **inputs)).logits",
            "made = model.generate(**generate_inputs(model, **inputs), max_new_tokens=20)[:, 1:]",
        ]
    else:
        lines.append("made = model.generate(**inputs, max_new_tokens=20)")
    if has_tokenizer:
        lines.append("print(tokenizer.batch_decode(made, skip_special_tokens=True))")
    return "\n".join(lines) + "\n"


def _first(loaded: LoadedModel, tokenizer: Any) -> str:
    prefix = list(loaded.model.prefix_ids)
    if not prefix:
        return "Nothing is put in front of a text."
    if not tokenizer:
        return f"Every training sample started with the ids {prefix}; put them in front of each text."
    names = ", ".join(f"`{tokenizer.id_to_token(i)}`" for i in prefix)
    return (
        f"Every training sample started with the ids {prefix} ({names}). The tokenizer puts them in "
        "front of each text, or pair of texts, once; `add_special_tokens=False` leaves them out. Put "
        "them at the start of a document only, not of each piece of it."
    )


def _streaming(loaded: LoadedModel, has_tokenizer: bool) -> str:
    config, x = loaded.model.config, len(loaded.model.prefix_ids) or 4
    recent = config.context // 2 - x
    streamed = "--text FILE" if has_tokenizer else "--tokens FILE.npy"
    kept = sinks.mechanism_class(loaded.model.sink_config).kept
    if kept == NOTHING:
        kept = f"nothing; the {x} initial positions are the text's own first tokens"
    return f"""## Streaming it

    sinkpretrain stream FOLDER {streamed} --cache {x}+{recent} --out RESULTS

measures its perplexity over text longer than its context, with {x} initial and {recent} recent tokens in the cache, and
`sinkpretrain generate FOLDER` generates without end. What the mechanism needs kept: {kept}.{
        " Those commands put the prefix in front themselves." if loaded.model.prefix_ids else ""
    }
"""


def _training(loaded: LoadedModel) -> str:
    """Recipe, data and last measures of the run that the weights lie in; nothing if they lie elsewhere."""
    run = loaded.files[0].parent.parent
    try:
        config = load_yaml(RunConfig, run / "config.yaml")
        about = read_json(run / "run.json")
        data = about["data"]
    except (UserError, KeyError):
        return ""
    c, o, t = config.data, config.optimizer, config.training
    after = "" if o.schedule == "constant" else f" to {o.min_lr}"
    rows = {
        "batch": f"{c.batch_size} samples of {config.model.context} tokens",
        "optimizer": f"AdamW, peak learning rate {o.lr}, {o.schedule}{after}, warm-up {100 * o.warmup:g} %, "
        f"weight decay {o.weight_decay}",
        "steps planned": f"{t.steps}",
        "precision": t.precision,
        "seeds": f"weights {t.seed}, data {c.seed}",
        "document mask": "yes" if c.document_mask else "no",
        "data": ", ".join(f"{k} `{v}`" for k, v in data.items()),
        "tokens read": f"{(loaded.step or 0) * c.batch_size * config.model.context:,}, what is prepended included",
        "trained with": _machines(about.get("attempts", [])),
        **_measures(run, loaded.step),
    }
    lines = "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v)
    return f"""
## How it was trained

| | |
|---|---|
{lines}

The recipe, as `sinkpretrain train --config FILE --data.path DATA` takes it (the rest is as by default):

```yaml
{_recipe(config)}```
"""


def _machines(attempts: list[dict[str, Any]]) -> str:
    """Devices, versions and commits of a run's attempts, each once."""
    found = [
        f"{a['device']}, torch {a['versions']['torch']}, sinkpretrain {a['versions']['sinkpretrain']}"
        + (f" at commit {a['commit']}" if a.get("commit") else "")
        for a in attempts
        if {"device", "versions"} <= a.keys()
    ]
    return "; then ".join(dict.fromkeys(found))


def _recipe(config: RunConfig) -> str:
    """The settings that are not the defaults, as YAML; not where a machine kept its files, nor what it logged."""
    told, usual = to_dict(config), to_dict(RunConfig())
    for name in ("path", "validation_path"):
        told["data"].pop(name)
    changed = {
        group: {k: v for k, v in told[group].items() if v != usual[group][k]}
        for group in ("model", "sink", "data", "optimizer", "training")
    }
    return yaml.safe_dump({group: settings for group, settings in changed.items() if settings}, sort_keys=False)


def _measures(run: Path, step: int | None) -> dict[str, str]:
    last = {line["kind"]: line for line in metrics.read(run) if step is None or line["step"] <= step}
    found = {}
    if "validation" in last:
        at = last["validation"]
        found["validation loss"] = f"{at['loss']:.4f} nats per token over {at['targets']:,} at step {at['step']}"
    if "probe" in last:
        at = last["probe"]
        found["sink share (Sink_1, 0.3)"] = f"{at['sink_share']:.4f} at step {at['step']}"
    return found
