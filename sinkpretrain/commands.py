"""The commands behind ``sinkpretrain``: flags from signatures and docstrings (jsonargparse), results printed."""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import importlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse

from sinkpretrain.config import RunConfig, from_dict, load_yaml, recipe_path
from sinkpretrain.errors import UserError, meant
from sinkpretrain.experiment import load_member
from sinkpretrain.signals import PROCESS, launched_rank
from sinkpretrain.startup import quick_imports


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse with flags spelt with dashes, and mistakes raised as one sentence instead of a usage text."""

    list_flags: tuple[str, ...] = ()
    no_settings: tuple[str, ...] = ()
    """Flags that say what to do with settings; ``--print-config`` leaves them out, so that a recipe comes of it."""

    def __init__(self, command: str, **kwargs: Any) -> None:
        super().__init__(prog=f"sinkpretrain {command}", exit_on_error=False, default_env=False, **kwargs)

    def format_help(self, *args: Any) -> str:
        return re.sub(r"--[a-z_.]+", lambda m: m.group().replace("_", "-"), super().format_help(*args))

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        settings = cfg.clone()
        for name in self.no_settings:
            settings.pop(name, None)
        return str(super().dump(settings, *args, **kwargs))

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values of the flags as plain nested data; raises UserError."""
        arguments = self._gathered([_underscored(a) for a in argv])
        known = {o for action in self._actions for o in action.option_strings}
        by_place = {f"--{a.dest}": a.dest for a in self._actions if not a.option_strings}
        for argument in arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known and not self._open_ended(name, known):
                near = difflib.get_close_matches(name, known, n=1)
                shown = name.replace("_", "-")
                if name in by_place:
                    raise UserError(f"there is no flag {shown}: {by_place[name]} is given by its place; see --help.")
                hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see --help."
                raise UserError(f"there is no flag {shown}; {hint}")
        _require_place(arguments)
        try:
            values: dict[str, Any] = self.parse_args(arguments).as_dict()
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            positional = {a.dest for a in self._actions if not a.option_strings}
            raise UserError(_one_sentence(str(error), positional)) from error
        return values

    def _gathered(self, arguments: list[str]) -> list[str]:
        """What users write and jsonargparse does not take: ``--source a b`` for lists, ``--overwrite`` for true."""
        lists: dict[str, list[str]] = {name: [] for name in self.list_flags}
        switches = {o for a in self._actions if getattr(a, "_typehint", None) is bool for o in a.option_strings}
        rest, current = [], None
        for argument, after in zip(arguments, [*arguments, "--"][1:], strict=True):
            if argument in switches and after.startswith("--"):
                rest.append(f"{argument}=true")
                current = None
                continue
            name, equals, value = argument.partition("=")
            if argument.startswith("--"):
                current = name if name in lists else None
                if current and equals:
                    lists[name].append(value)
                elif not current:
                    rest.append(argument)
            elif current:
                lists[current].append(argument)
            else:
                rest.append(argument)
        return rest + [a for name, values in lists.items() if values for a in (name, json.dumps(values))]

    @staticmethod
    def _open_ended(name: str, known: set[str]) -> bool:
        """``--sink.options.n`` is a key of the open mapping ``--sink.options``."""
        return any(name.startswith(f"{k}.") for k in known if k.endswith(".options"))


def _require_place(arguments: Sequence[str]) -> None:
    """Raises UserError for an ``--out`` that says nothing: as a path it would be the current folder."""
    given = "given"
    for argument, after in zip(arguments, [*arguments, "--"][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name == "--out":
            given = value if equals else after
    if not given:
        raise UserError("--out is empty; name where to write (a variable of the shell that is not set is empty, too).")


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _one_sentence(text: str, positional: set[str]) -> str:
    """jsonargparse explains over several lines; the first names the setting and the last says why."""
    wrong = re.search(
        r"key \"([\w.]+)\".*Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])\. Got value: (.*)",
        text,
        re.DOTALL,
    )
    if wrong:
        flag, kind, choices, value = wrong.groups()
        wanted = kind or f"one of {choices}"
        return f"--{flag.replace('_', '-')} must be {wanted}, not {value.strip()!r}."
    if missing := re.search(r"the following arguments are required: (.*)", text):
        names = [n if n in positional else f"--{n.replace('_', '-')}" for n in missing.group(1).split(", ")]
        return f"{' and '.join(names)} must be given; see --help."
    if bare := re.search(r"argument (--[\w.]+): expected one argument", text):
        flag = bare.group(1).replace("_", "-")
        return f"{flag} needs a value; one that begins with a dash is given as {flag}=VALUE."
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    return " ".join(dict.fromkeys((lines[0], lines[-1]))).rstrip(".") + "; see --help." if lines else text


def _arguments(
    command: str, function: Callable[..., Any], argv: Sequence[str], lists: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Parse ``argv`` by the signature of ``function``, whose parameters without a default are positional."""
    parser = Parser(command, description=(function.__doc__ or "").partition("\n\n")[0])
    parser.list_flags = lists
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser.parse(argv)


# --- commands -----------------------------------------------------------------------------------------------------


def prepare(argv: Sequence[str]) -> int:
    from data_prep.prepare import PrepareConfig, describe
    from data_prep.prepare import prepare as run
    from sinkpretrain.tokens import verify

    parser = Parser("prepare", description="Text in, packed tokens out (Megatron/GPT-NeoX .bin/.idx and a manifest).")
    parser.add_class_arguments(PrepareConfig)
    parser.list_flags = ("--source", "--validation_source")
    parser.add_argument("--verify", type=str, help="check a prepared folder against its manifest instead")
    if argv and argv[0].startswith("--verify"):
        folder = argv[0].partition("=")[2] or (argv[1] if len(argv) > 1 else "")
        if not folder:
            raise UserError("--verify needs the folder to check.")
        problems = verify(Path(folder))
        print("\n".join(problems) if problems else f"{folder}: every file is as it was written.")
        return 1 if problems else 0
    values = parser.parse(argv)
    values.pop("verify", None)
    print(describe(run(PrepareConfig(**values))))
    return 0


_OF_A_RUN = {
    "train": "Train a model; the same command continues an interrupted run.",
    "doctor": "Check data, disk, devices, connections and the mechanism's arithmetic for the training that the flags "
    "describe (those of train), and change nothing; on a cluster, start it with srun as the training would be.",
}


def load_run_config(argv: Sequence[str]) -> RunConfig:
    """The configuration of a run: recipes (``--config``, later ones win), then dotted overrides; raises UserError."""
    return parse_run(argv)[0]


def parse_run(argv: Sequence[str], command: str = "train") -> tuple[RunConfig, bool]:
    """The configuration of a run, and whether it may differ from the one that its run directory was made with.

    Raises:
        UserError: an unknown recipe, setting or value.
    """
    arguments, recipes = [], []
    pending = iter(_expanded(argv))
    for argument in pending:
        if argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or next(pending, "")
            for name in value.split(","):
                recipes.append(_checked_recipe(name))
                arguments += ["--config", str(recipes[-1])]
        else:
            arguments.append(argument)
    parser = Parser(
        command,
        description=f"{_OF_A_RUN[command]} --config takes files or the names of recipes that come with the package "
        "(pythia-160m, one-sink-token, ...), several separated by commas.",
    )
    parser.add_argument("--experiment", type=str, help="file of an experiment (see submit): take the flags of one run")
    parser.add_argument("--member", type=int, help="which of its runs, from 0")
    parser.add_argument("--config", action="config", help="recipe; later ones and dotted flags win")
    parser.add_class_arguments(RunConfig)
    parser.add_argument(
        "--allow_changes", type=bool, default=False, help="go on although settings or data are not the run's own"
    )
    parser.no_settings = ("experiment", "member", "allow_changes")
    values = parser.parse(arguments)
    allow_changes = bool(values["allow_changes"])
    for name in ("config", *parser.no_settings):
        values.pop(name, None)
    config = from_dict(RunConfig, values)
    if not config.name and not config.out:
        config = dataclasses.replace(config, name="-".join(recipe.stem for recipe in recipes))
    return config, allow_changes


def _expanded(argv: Sequence[str]) -> list[str]:
    """Replace ``--experiment FILE --member K`` by the flags that they stand for."""
    given = {"--experiment": "", "--member": ""}
    rest, pending = [], iter(argv)
    for argument in pending:
        name, _, value = argument.partition("=")
        if name in given:
            given[name] = value or next(pending, "")
        else:
            rest.append(argument)
    if not any(given.values()):
        return rest
    if not given["--experiment"] or not given["--member"].isdigit():
        raise UserError("--experiment FILE and --member NUMBER go together.")
    return [*load_member(Path(given["--experiment"]), int(given["--member"])).train_flags(), *rest]


def _checked_recipe(name: str) -> Path:
    """The recipe's file, once its keys are known to be settings."""
    path = recipe_path(name)
    load_yaml(RunConfig, path)
    return path


def train(argv: Sequence[str]) -> int:
    config, allow_changes = parse_run(argv)
    # After the flags are known to be right: Lightning takes seconds to import.
    with quick_imports("lightning"):
        from sinkpretrain.train import train as run

    result = run(config, allow_changes, PROCESS)
    code = 0 if result.signal is None else 128 + result.signal
    if result.processes > 1:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End this process without taking Python apart, where threads of gloo may still abort it: all the work is done, and
    its exit code decides what becomes of the job."""
    atexit._run_exitfuncs()  # wandb's, for one
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stream(argv: Sequence[str]) -> int:
    with quick_imports("torch"):
        from sinkpretrain.evaluate import stream as run

    values = _arguments("stream", run, argv)
    results = run(**values)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sinkpretrain.evaluate import table

    head, rows, note = table(results)
    console = Console() if Console().is_terminal else Console(width=120)
    narrow = console.width < 100  # no room for the speed, nor for lines between columns
    title = f"{results['model']['name']}, {results['tokens']['count']:,} tokens"
    shown = Table(title=title, caption=note, box=box.HORIZONTALS if narrow else box.HEAVY_HEAD)
    columns = list(zip(head, *rows, strict=True))[: -1 if narrow else None]
    for name, *cells in columns:
        whole = name in ("setting", "95 %")  # not broken, unless very long
        shown.add_column(name, overflow="fold", min_width=min(16, max(map(len, cells))) if whole else None)
    for row in rows:
        shown.add_row(*row[: len(columns)])
    console.print(shown)
    print(f"written to {values['out']}: results.json, stream.png, and nll.npy for each setting")
    return 0


def inspect(argv: Sequence[str]) -> int:
    from rich.console import Console

    from sinkpretrain.inspection import describe, inspect_model

    values = _arguments("inspect", inspect_model, argv)
    for line in describe(inspect_model(**values)):
        Console().print(line, highlight=False, soft_wrap=True)
    print(f"written to {values['out']}: {', '.join(sorted(p.name for p in Path(values['out']).iterdir()))}")
    return 0


def zero_shot(argv: Sequence[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from sinkpretrain.zero_shot import zero_shot as run

    values = _arguments("zero-shot", run, argv)
    results = run(**values)
    table = Table("task", "questions", "accuracy", "normalised", title=results["model"]["name"])
    for name, task in results["tasks"].items():
        shares = (
            f"{100 * task[m]:.1f} ± {100 * task[f'{m}_stderr']:.1f} %" if m in task else "" for m in ("acc", "acc_norm")
        )
        table.add_row(name, f"{task['n']:,}", *shares)
    Console().print(table)
    if results["missing"]:
        print(f"not in {values['local']}, and left out: {', '.join(results['missing'])}.")
    print(f"written to {values['out']}")
    return 0


def compare(argv: Sequence[str]) -> int:
    from sinkpretrain.compare import compare as run
    from sinkpretrain.compare import log_to_wandb, print_table

    parser = Parser(
        "compare",
        description="One page, tables and figures from the folders that stream, train, inspect and zero-shot wrote. "
        "Where stream's losses (nll.npy) were not brought along, what results.json has is shown, without curves.",
    )
    parser.add_argument("paths", nargs="+", type=str, help="result or run folders, or folders that hold some")
    parser.add_argument("--out", type=str, required=True, help="folder for the page (index.html), tables and figures")
    parser.add_argument("--paper", type=bool, default=True, help="show the paper's numbers beside ours")
    parser.add_argument(
        "--wandb", type=Literal["off", "offline", "online"], default="off", help="also log them to Weights & Biases"
    )
    parser.add_argument("--wandb_project", type=str, default="sinkpretrain", help="its project")
    values = parser.parse(argv)
    if "" in values["paths"]:
        raise UserError("one of the folders to compare is an empty name (a variable of the shell that is not set?).")
    comparison = run([Path(p) for p in values["paths"]], Path(values["out"]), paper=values["paper"])
    from rich.console import Console

    print_table(comparison, Console())
    if values["wandb"] != "off":
        log_to_wandb(comparison, values["wandb"], values["wandb_project"])
    print(f"written to {values['out']}: {', '.join(sorted(p.name for p in Path(values['out']).iterdir()))}")
    return 0


def generate(argv: Sequence[str]) -> int:
    with quick_imports("torch"):
        from sinkpretrain.generate import generate as run

    return run(**_arguments("generate", run, argv, lists=("--stop",)))


def export(argv: Sequence[str]) -> int:
    import transformers

    from sinkpretrain.export import export as run
    from sinkpretrain.exporters import FORMS

    parser = Parser("export", description=(run.__doc__ or "").partition("\n\n")[0])
    parser.add_function_arguments(run, as_group=False, as_positional=True, skip={"out"})
    # The folder is a flag, as of every command that writes; by its place it may be given too, as of cp.
    parser.add_argument("folder", nargs="?", type=str, help="the same as --out")
    parser.add_argument("--out", type=str, help="folder to make")
    values = parser.parse(argv)
    given = [folder for folder in (values.pop("folder"), values.pop("out")) if folder]
    if len(given) != 1:
        raise UserError(
            f"the folder to make is given twice, {given[0]} and {given[1]}; give it once."
            if given
            else "--out, the folder to make, must be given; see --help."
        )
    values["out"] = given[0]
    transformers.utils.logging.disable_progress_bar()  # of weights read back in no time
    exported = run(**values)
    print(f"exported to {exported.folder}, reloaded and checked: {FORMS[exported.form]}.")
    print(f"{exported.folder / 'README.md'} says how to load it.")
    return 0


def list_mechanisms(argv: Sequence[str]) -> int:
    from sinkpretrain.catalogue import list_mechanisms as run

    print(run(**_arguments("list", run, argv)))
    return 0


def demo(argv: Sequence[str]) -> int:
    from sinkpretrain.demo import demo as run

    run(**_arguments("demo", run, argv))
    return 0


BENCHMARKS = {
    "train": ("sinkpretrain.bench", "bench", "training, beside other implementations"),
    "scaling": ("sinkpretrain.bench_scaling", "bench_scaling", "training on more and more devices of this host"),
    "curves": ("sinkpretrain.bench_curves", "bench_curves", "do fast and plain training have the same loss curves?"),
    "stream": ("sinkpretrain.bench_stream", "bench_stream", "a long text, beside the loops that streaming replaces"),
    "decode": ("sinkpretrain.bench_decode", "bench_decode", "one more token: streaming beside re-computation"),
}


def bench(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print("usage: sinkpretrain bench WHAT ...\n\nHow fast, on this machine:")
        print("\n".join(f"  {name:<8} {summary}" for name, (_, _, summary) in BENCHMARKS.items()))
        print("\nsinkpretrain bench WHAT --help tells more.")
        raise SystemExit(0)
    if not argv or argv[0] not in BENCHMARKS:
        wrong = f"{argv[0]!r} is nothing to measure;" if argv else "what is to be measured?"
        raise UserError(f"{wrong} {meant(argv[0] if argv else '', BENCHMARKS, 'say one of')}")
    module, name, _ = BENCHMARKS[argv[0]]
    run = getattr(importlib.import_module(module), name)
    run(**_arguments(f"bench {argv[0]}", run, argv[1:]))
    return 0


def submit(argv: Sequence[str]) -> int:
    from sinkpretrain.submit import submit as run

    return run(**_arguments("submit", run, argv))


def doctor(argv: Sequence[str]) -> int:
    config, _ = parse_run(argv, "doctor")
    with quick_imports("lightning"):
        from sinkpretrain.doctor import doctor as run

    findings = run(config)
    failed = [f for f in findings if f.ok is False]
    # Every process looks after itself; what all have in common is said once.
    rank = launched_rank()
    for finding in findings if rank == 0 else failed:
        print(finding if rank == 0 else f"{finding} (rank {rank} on {socket.gethostname()})", flush=True)
    return 1 if failed else 0
