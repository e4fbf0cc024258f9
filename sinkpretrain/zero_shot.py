"""``sinkpretrain zero-shot``: tasks of lm-evaluation-harness, the paper's seven by default, also without a network."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import logging
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import yaml

from sinkpretrain.device import choose_device, choose_dtype
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.files import read_json, sha256_file, write_json
from sinkpretrain.load import METADATA_KEY, LoadedModel, load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.progress import ProgressBar
from sinkpretrain.provenance import provenance
from sinkpretrain.weights import read_config, weight_files

RESULTS = "zero_shot.json"
PAPER = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "winogrande")
"""The tasks of StreamingLLM's tables 4 and 9."""
FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""Where the harness keeps them: its index of all tasks takes seconds to build."""
SPLITS = ("test", "validation")
"""Splits that a task is evaluated on, the first that is there, as the harness does."""


def zero_shot(
    model: str,
    tasks: str = "",
    out: str = "",
    local: str = "",
    limit: int = 0,
    batch_size: int = 16,
    backend: Literal["auto", "sinkpretrain", "hf"] = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Zero-shot accuracy on tasks of lm-evaluation-harness, with the model's sinks in front of every sequence.

    Args:
        model: run directory, checkpoint or weights file, or Hugging Face folder.
        tasks: names of the harness, separated by commas; by default the seven of the StreamingLLM paper.
        out: folder for zero_shot.json.
        local: folder with the tasks' data, TASK/validation.jsonl.gz or TASK/test.jsonl.gz with the columns of their
            Hugging Face data sets; nothing is downloaded then.
        limit: use only so many questions of each task; 0 means all.
        batch_size: sequences per forward; changes speed and memory, not the numbers.
        backend: hf is the harness's own class for Hugging Face models; auto takes it for models of other families.
        dtype: of weights and activations.
        device: where to compute.
        progress: show a progress bar.

    Returns:
        The content of zero_shot.json.

    Raises:
        UserError: lm-eval is not installed, the model cannot be loaded, or a task is not to be had.
    """
    if not out:
        raise UserError("--out is missing; name a folder for the results.")
    if limit < 0 or batch_size < 1:
        raise UserError("--limit must not be negative, and --batch-size at least 1.")
    _check_installed()
    where = choose_device(device)
    names = [t.strip() for t in tasks.split(",") if t.strip()]
    about, chosen = _model(model, backend)
    shown = progress and chosen is not None  # the harness's own class shows its own
    with tempfile.TemporaryDirectory() as scratch, ProgressBar(about["name"], 0, "sequences", shown) as bar:
        data = local_tasks(Path(local), names, Path(scratch)) if local else {name: None for name in names or PAPER}

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        how = {"dtype": dtype, "batch_size": batch_size, "advance": advance, "progress": progress}
        lm = _harness_model(model, chosen, where, how)
        with _quiet():
            found = evaluate(lm, list(data), Path(scratch) if local else None, limit or None)
    results = {
        "what": "zero_shot",
        "format": 1,
        "model": about,
        "tasks": {name: numbers(found, name) for name in data},
        "data": {name: file and {"path": str(file), "sha256": sha256_file(file)} for name, file in data.items()},
        "missing": [name for name in names or PAPER if name not in data],
        "limit": limit or None,
        "backend": "hf" if chosen is None else "sinkpretrain",
        "harness": found["lm_eval_version"],
        "dtype": dtype,
        **provenance(where),
    }
    write_json(Path(out) / RESULTS, results)
    return results


def numbers(found: dict[str, Any], task: str) -> dict[str, Any]:
    """Metrics of a task as plain numbers; ``stderr`` is that of ``acc``, or of the first metric without one."""
    metrics = {key.partition(",")[0]: value for key, value in found["results"][task].items() if "," in key}
    main = "acc" if "acc" in metrics else next(name for name in metrics if not name.endswith("_stderr"))
    values = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    count = found["n-samples"][task]["effective"]
    return values | {"stderr": values.get(f"{main}_stderr"), "n": count, "version": found["versions"][task]}


# --- the model ----------------------------------------------------------------------------------------------------


def _model(model: str, backend: str) -> tuple[dict[str, Any], LoadedModel | None]:
    """What the results say about the model, and the model itself, or None for the harness's own class."""
    folder = Path(model)
    is_folder = (folder / "config.json").is_file()
    try:
        loaded = load_model(model)
    except UserError:
        # A family that this package does not read may still be one that transformers does; not what was exported here.
        if not is_folder or backend == "sinkpretrain" or METADATA_KEY in read_config(folder):
            raise
        _require_tokenizer(folder)
        return _foreign(folder), None
    ours = isinstance(loaded.model, GPTNeoX)
    if backend == "sinkpretrain" or (ours and backend == "auto"):
        if loaded.tokenizer is None:
            raise UserError(f"{loaded.name} comes without a tokenizer, and the tasks are text; put one beside it.")
        return loaded.provenance(), loaded
    if not is_folder:
        raise UserError(f"--backend hf takes Hugging Face folders, and {model} is none; export it, or leave it out.")
    written = read_json(folder / "config.json").get(METADATA_KEY) or {}
    if loaded.model.prefix_ids or written.get("form") in ("seeded", "own"):
        raise UserError(
            f"--backend hf would leave out the sinks of {loaded.name} ({loaded.label}) without a word; "
            "use --backend sinkpretrain."
        )
    _require_tokenizer(folder)
    return loaded.provenance(), None


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""One of which every tokenizer of transformers has; without any, it makes up an empty one."""


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{folder} comes without a tokenizer, and the tasks are text; put one beside it.")


def _foreign(folder: Path) -> dict[str, Any]:
    """What is known of a model that only transformers can load."""
    kind = read_config(folder).get("model_type", "unknown")
    about = {"path": str(folder), "name": folder.resolve().name, "sha256": sha256_file(*weight_files(folder))}
    return about | {"step": None, "mechanism": str(kind), "sink": {}, "shape": {}, "parameters": None}


def _harness_model(model: str, loaded: LoadedModel | None, device: torch.device, options: dict[str, Any]) -> Any:
    torch.set_float32_matmul_precision("highest")
    from sinkpretrain.harness import SinkLM, hugging_face

    if loaded is None:
        how = {name: options[name] for name in ("dtype", "batch_size", "progress")}
        try:
            return hugging_face(pretrained=model, device=str(device), **how)
        except Exception as error:  # of transformers, for whatever is wrong with a folder
            raise UserError(
                f"{model} cannot be loaded by transformers, which the harness leaves it to: {first_line(error)}"
            ) from error
    from sinkpretrain.texts import TextCodec

    net = loaded.model.to(device, choose_dtype(options["dtype"], device))
    codec = TextCodec(str(loaded.tokenizer), net.prefix_ids)
    # Models of others have learned what their tokenizer puts in front; those trained here have not, see ``prepare``.
    opening = () if isinstance(net, GPTNeoX) else codec.opening()
    return SinkLM(net, codec, options["batch_size"], options["advance"], opening)


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "zero-shot needs lm-evaluation-harness; install it with: pip install sinkpretrain[eval]"
        ) from error


# --- the tasks ----------------------------------------------------------------------------------------------------


def evaluate(lm: Any, tasks: list[str], folder: Path | None, limit: int | None) -> dict[str, Any]:
    """The harness's results on tasks: its own, or those of ``folder`` alone; raises UserError for an unknown task."""
    import jinja2
    import lm_eval
    from lm_eval.tasks import TaskManager

    places = [folder] if folder else sorted({_harness_file(name).parent for name in tasks})
    manager = TaskManager(include_path=[str(p) for p in places], include_defaults=False)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"the harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists those that it has.")
    # Commit and machine are in our own record; the harness has git complain on the terminal where there is none.
    quiet: dict[str, Any] = {"get_git_commit_hash": lambda: None, "add_env_info": lambda _: None}
    try:
        with mock.patch.multiple("lm_eval.evaluator", **quiet, create=True):
            found: dict[str, Any] = lm_eval.simple_evaluate(
                model=lm, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
            )
    except jinja2.UndefinedError as error:
        raise UserError(
            f"the data of {', '.join(tasks)} lack a column that the task's prompts are made of ({error}); give those "
            "of its Hugging Face data set."
        ) from error
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be had ({first_line(error)}); give them with --local."
        ) from error
    return found | {"lm_eval_version": lm_eval.__version__}


def local_tasks(folder: Path, names: list[str], scratch: Path) -> dict[str, Path]:
    """Task files in ``scratch`` that are the harness's own but for where their data come from; the data of each.

    Prompts, choices and metrics stay the harness's. Without ``names`` those of the paper's tasks that are there.

    Raises:
        UserError: a task that was asked for is not in the folder, or none is.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --local takes one that holds TASK/validation.jsonl.gz.")
    there = {p.name: file for p in sorted(folder.iterdir()) if (file := _data_file(p))}
    for name in names:
        if name not in there:
            raise UserError(
                f"the task {name} is not in {folder}, which has {', '.join(there) or 'none'}; put its data at "
                f"{folder / name / 'validation.jsonl.gz'}, or leave it out."
            )
    chosen = {name: there[name] for name in names or PAPER if name in there}
    if not chosen:
        raise UserError(f"{folder} holds the data of none of the paper's tasks ({', '.join(PAPER)}).")
    for name, file in chosen.items():
        _require_rows(file)
        split = file.name.partition(".")[0]
        task = {
            "include": str(_harness_file(name)),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file.resolve())}, "cache_dir": str(scratch / "cache")},
            "training_split": None,
            "fewshot_split": None,
            **{f"{s}_split": s if s == split else None for s in SPLITS},
        }
        (scratch / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return chosen


def _require_rows(file: Path) -> None:
    """Raises UserError unless every line is a JSON object and there is one: `datasets` answers with a traceback."""
    read = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                if not line.isspace() and not isinstance(json.loads(line), dict):
                    raise ValueError("no JSON object")
                read += 1
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{file} cannot be read behind line {read} ({error}); copy it again.") from error
    if not read:
        raise UserError(f"{file} is empty; put the task's data there, or leave it out.")


def _data_file(folder: Path) -> Path | None:
    candidates = (folder / f"{split}.jsonl{end}" for split in SPLITS for end in (".gz", ""))
    return next((file for file in candidates if file.is_file()), None)


def _harness_file(task: str) -> Path:
    """The harness's own definition of a task; raises UserError if it has none."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    if task in FILES and (folder / FILES[task]).is_file():
        return folder / FILES[task]
    entry = lm_eval.tasks.TaskManager().task_index.get(task)
    if entry is None or entry.yaml_path is None:
        raise UserError(f"the harness has no task {task!r}; `lm-eval ls tasks` lists those that it has.")
    return Path(entry.yaml_path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells much on its way that is of no use to a reader of the results, and counts its preparations and
    the one step of its bootstrap."""
    import datasets
    from lm_eval.api import metrics
    from lm_eval.api import task as preparation

    bars, silent = datasets.are_progress_bars_disabled(), functools.partial(preparation.tqdm, disable=True)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "httpx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()

    def bootstrap(*arguments: Any, stderr: Callable[..., float] = metrics.bootstrap_stderr, **named: Any) -> float:
        # The same draws in this process: a pool of forks costs more, and where SIGTERM is handled never ends.
        alone = mock.patch.dict(os.environ, DISABLE_MULTIPROC="1")
        with alone, mock.patch("tqdm.tqdm", silent), contextlib.redirect_stdout(None):
            return stderr(*arguments, **named)

    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(preparation, "tqdm", silent),
            mock.patch.object(metrics, "bootstrap_stderr", bootstrap),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
