"""Every setting of a run, typed. The defaults are the recipe of Pythia-160M in the StreamingLLM paper.

Sources named below: [P] Xiao et al. 2023, arXiv 2309.17453, section 4.2 and appendix; [Pythia] Biderman et al. 2023,
arXiv 2304.01373, and its published GPT-NeoX configuration files.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from sinkpretrain.errors import UserError, meant

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a GPT-NeoX model.

    Args:
        n_layer: number of blocks.
        d_model: width of the residual stream.
        n_head: attention heads; ``d_model`` must be a multiple of it.
        d_ff: width of the MLP; 0 means ``4 * d_model``.
        vocab_size: rows of the (padded) embedding; 0 means the tokenizer's size plus 27 spare rows, rounded up to a
            multiple of 128, which is 50,304 for Pythia's tokenizer.
        tokenizer_size: ids that text can contain; the rows from here on are spare and hold the sink tokens.
            0 means: as the data's manifest says.
        context: tokens per training sample, sinks included; positions never exceed it in training.
        window: attend to so many tokens before a token's own, in training as later; 0 means all of them.
        window_sinks: first positions that a window leaves visible to every token.
        rotary_pct: share of each head's dimensions that rotate.
        rope_base: base of the rotary frequencies.
        layer_norm_eps: epsilon of every LayerNorm.
        parallel_residual: ``x + attn(ln1 x) + mlp(ln2 x)`` instead of two residual steps.
    """

    n_layer: int = 12
    d_model: int = 768
    n_head: int = 12
    d_ff: int = 0
    vocab_size: int = 0
    tokenizer_size: int = 0
    context: int = 2048
    window: int = 0
    window_sinks: int = 0
    rotary_pct: float = 0.25
    rope_base: float = 10000.0
    layer_norm_eps: float = 1e-5
    parallel_residual: bool = True

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    def resolved(self, tokenizer_size: int | None = None) -> ModelConfig:
        """Fill in what 0 stands for and check that the parts fit; raises UserError."""
        size = self.tokenizer_size or tokenizer_size or 0
        if size <= 0:
            raise UserError("model.tokenizer_size is not set and no data names a tokenizer; give one of the two.")
        vocab = self.vocab_size or -(-(size + MAX_SINK_TOKENS) // 128) * 128
        if vocab < size:
            raise UserError(
                f"model.vocab_size {vocab} is smaller than the tokenizer's {size} ids; raise it or set it to 0."
            )
        require_ranges(self, "model.")
        if self.window_sinks and not self.window:
            raise UserError(
                f"model.window_sinks {self.window_sinks} needs a window; set model.window, or model.window_sinks to 0."
            )
        if self.d_model % self.n_head:
            raise UserError(
                f"model.d_model {self.d_model} is not a multiple of model.n_head {self.n_head}; choose a divisor."
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim or self.rotary_dim < 2:
            raise UserError(
                f"model.rotary_pct {self.rotary_pct} rotates {self.rotary_dim} of {self.head_dim} dimensions per head; "
                "it must be an even number of at least 2."
            )
        return dataclasses.replace(self, vocab_size=vocab, tokenizer_size=size, d_ff=self.d_ff or 4 * self.d_model)


MAX_SINK_TOKENS = 27
"""Spare rows of Pythia's vocabulary: 50304 - 50277. Also how many targets validation leaves out at a sample's end, so
that every mechanism is judged on the same ones."""


@dataclass(frozen=True)
class SinkConfig:
    """Which sink mechanism, and its options.

    Args:
        mechanism: its name, as ``sinkpretrain list`` shows it, or module:Class for one of your own.
        options: keyword arguments of the mechanism's class, e.g. ``{n: 2}`` for two sink tokens.
    """

    mechanism: str = "vanilla"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def from_outside(self) -> bool:
        """Whether it is a class of one's own (``sinkpretrain.outside``)."""
        return ":" in self.mechanism


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which order.

    Args:
        path: directory written by ``sinkpretrain prepare``, or prefix of a Megatron/GPT-NeoX ``.bin``/``.idx`` pair, or
            a directory that holds one such pair.
        validation_path: other data to validate on, named as in ``path`` (of a prepared directory its validation split,
            or all of it if it has none); by default the validation split of ``path``.
        batch_size: samples per optimizer step, over all devices (StreamingLLM's run: 256).
        seed: seed of the shuffle; not the seed of the initial weights.
        shuffle: permute the samples of each epoch; by default yes, except for files whose rows are samples already
            (Pythia's pre-shuffled ones), which are read in their own order.
        validation_samples: samples of the fixed validation set, from the start of the validation split.
        document_mask: attention in training does not cross the end of a document; what a mechanism prepends stays
            visible to every document of a sample.
        end_of_document: id of the token between documents; by default as the data's manifest says.
    """

    path: str = ""
    validation_path: str = ""
    batch_size: int = 256
    seed: int = 1234
    shuffle: bool | None = None
    validation_samples: int = 256
    document_mask: bool = False
    end_of_document: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule ([Pythia]: betas, eps, decay, clipping, warm-up and the tenfold cosine decay).

    Args:
        lr: peak learning rate (Pythia-160M: 6e-4).
        min_lr: learning rate at the last step.
        warmup: linear warm-up, as a share of all steps.
        schedule: shape after the warm-up; ``constant`` stays at ``lr``.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay on matrices; vectors (biases, norms, sinks) have none.
        clip: largest global gradient norm; 0 switches clipping off.
    """

    lr: float = 6e-4
    min_lr: float = 6e-5
    warmup: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on what, how fast.

    Args:
        steps: optimizer steps (StreamingLLM's run: 143,000).
        micro_batch: most samples per device and backward pass; a step accumulates as many passes as it needs.
        seed: seed of the initial weights; not the seed of the data order.
        precision: Lightning's precision plugin; weights stay fp32 under ``bf16-mixed``.
        compile: run the model through torch.compile.
        fused: use the fused kernels where they apply (a GPU, 16-bit autocast).
        accelerator: ``cpu``, ``cuda`` or ``auto``.
        devices: processes per node; 0 means every GPU of the node, or one CPU process.
        nodes: number of nodes.
        strategy: ``ddp`` keeps the whole model on every device, ``fsdp`` a slice of it; ``auto`` takes fsdp for several
            devices and a billion parameters or more.
        gather: how long a sharded model's weights stay whole: ``block``, while a block needs them; ``step``, from the
            first pass of a step to the last, whose gradients alone are then exchanged, for 8 bytes a parameter more on
            every device; ``auto`` takes step where that is a third of the device's memory at most.
        deterministic: ask torch for bitwise repeatable kernels.
        max_skipped: steps in a row with a loss or gradient norm that is not finite, each of them skipped, after which
            the run ends; 0 means never.
        stall_seconds: a process that makes no step for so long ends the run, named; 0 means never.
        stop_margin: seconds before the end of a Slurm job at which a run stops by itself with a checkpoint.
    """

    steps: int = 143_000
    micro_batch: int = 32
    seed: int = 1234
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = "bf16-mixed"
    compile: bool = False
    fused: bool = True
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 0
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    gather: Literal["auto", "step", "block"] = "auto"
    deterministic: bool = False
    max_skipped: int = 10
    stall_seconds: float = 1800.0
    stop_margin: float = 120.0


@dataclass(frozen=True)
class LogConfig:
    """What is written while training, and how often (in steps; 0 means never).

    Args:
        every: steps between two writes of the per-step metrics, with tokens/s and FLOP/s.
        validate_every: steps between two validations on the fixed set; 0 means at the end only.
        probe_every: steps between two attention measures on a few validation samples; 0 means at the end only.
        checkpoint_every: steps between two checkpoints to resume from; 0 means at the end only.
        keep: how many of those are kept.
        keep_doubling: beside them, keep the checkpoints at 1, 2, 4, 8, ... times ``checkpoint_every``.
        weights_every: steps between two weights files kept for good, beside the steps 0, 1, 2, 4, ... 512 and the last
            (Pythia: every 1,000).
        wandb: send metrics to Weights & Biases.
        wandb_project: its project.
        progress: show a progress bar.
    """

    every: int = 10
    validate_every: int = 1000
    probe_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    keep_doubling: bool = True
    weights_every: int = 1000
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "sinkpretrain"
    progress: bool = True


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Args:
        out: run directory; the same command given again continues the run in it. By default runs/ and the name.
        name: name shown in tables; by default the run directory's, or the recipes' names joined.
        model: shape of the model.
        sink: sink mechanism.
        data: tokens and their order.
        optimizer: AdamW and its schedule.
        training: length, devices, precision.
        log: metrics and checkpoints.
    """

    out: str = ""
    name: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    sink: SinkConfig = field(default_factory=SinkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def folder(self) -> str:
        """The run directory."""
        return self.out or f"runs/{self.name}"


_LEAST = dict.fromkeys(("model.n_layer", "model.d_model", "model.n_head", "model.rope_base"), 1) | {
    **dict.fromkeys(("data.batch_size", "training.steps", "training.micro_batch", "training.nodes"), 1),
    "model.context": 2,
}
"""Least values; of every other number it is 0."""

_BELOW_ONE = ("optimizer.warmup", "optimizer.beta1", "optimizer.beta2")


def require_ranges(config: Any, where: str = "") -> None:
    """Refuse numbers that a setting cannot have; raises UserError with its name."""
    for entry in dataclasses.fields(config):
        name, value = f"{where}{entry.name}", getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            require_ranges(value, f"{name}.")
        elif isinstance(value, (int, float)):
            least = _LEAST.get(name, 0)
            if not value >= least:
                raise UserError(f"{name} must be at least {least}, not {value}.")
            if name in _BELOW_ONE and value >= 1:
                raise UserError(f"{name} must be below 1, not {value}.")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain data, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from plain data; an unknown key or a wrong type is a UserError that names it."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in hints:
            near = difflib.get_close_matches(key, list(hints), n=1)
            raise UserError(f"unknown setting {name!r}{f'; did you mean {where}{near[0]}?' if near else '.'}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"setting {name!r} is a group of settings, not {value!r}.")
            values[key] = from_dict(typing.cast(type[Any], hints[key]), value, f"{name}.")
        else:
            values[key] = _checked(hints[key], value, name)
    return cls(**values)


def _checked(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the type ``hint`` says (an int is a fine float), or a UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and value in args:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _checked(next(a for a in args if a is not type(None)), value, name)
    kind = origin or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = " or ".join(map(repr, args)) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise UserError(f"setting {name!r} must be {wanted}, not {value!r}.")


def save_yaml(config: Any, path: Path) -> None:
    """Write a config so that ``load_yaml`` gives it back."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a config written by ``save_yaml`` or by hand; raises UserError, naming the file, for anything else."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"the configuration {path} is not a mapping of settings.")
    try:
        return from_dict(cls, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def sink_recipe(name: str) -> SinkConfig:
    """The sink mechanism of a recipe; raises UserError if there is no such recipe."""
    return load_yaml(RunConfig, recipe_path(name)).sink


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package (``pythia-160m``)."""
    given = Path(name)
    if given.is_file():
        return given
    for folder in _recipe_folders():
        for candidate in (folder / name, folder / f"{name}.yaml", folder / "sinks" / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted({*recipe_names("."), *recipe_names("sinks")})
    raise UserError(f"no recipe or file called {name!r}; {meant(name, known, 'known recipes:')}")


def recipe_names(folder: str) -> list[str]:
    """The recipes that come with the package in a folder of ``configs``."""
    return sorted({p.stem for f in _recipe_folders() for p in (f / folder).glob("*.yaml")})


def _recipe_folders() -> tuple[Path, Path]:
    """In a wheel the recipes lie inside the package, in a checkout beside it."""
    here = Path(__file__).parent
    return here / "configs", here.parent / "configs"
