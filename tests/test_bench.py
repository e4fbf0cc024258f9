"""The benchmark: every figure is of the real thing, what cannot be measured is said, comparisons are ratios."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from sinkpretrain import bench as module
from sinkpretrain.bench import bench, comparisons
from sinkpretrain.bench_curves import compare_paths
from sinkpretrain.errors import UserError
from sinkpretrain.lit import PretrainModule
from sinkpretrain.profiling import kernel_class


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "SYNTHETIC_TOKENS", 40_000)
    monkeypatch.setattr(module, "matmul_rate", lambda: 1e12)


def test_figures_of_the_trainer_a_bare_loop_and_a_peer(tmp_path: Path, capsys) -> None:
    out = tmp_path / "b.json"
    report = bench(
        str(out), model="demo", sinks="zero-sink,vanilla", micro_batch=2, steps=24, compile=False, bare=True,
        peers="hf",
    )  # fmt: skip
    assert json.loads(out.read_text()) == report
    figures = {f["name"]: f for f in report["figures"]}
    assert list(figures) == ["ours: vanilla", "bare loop: vanilla", "hf", "bare loop: zero-sink"]
    for figure in figures.values():
        assert figure["tokens_per_step"] == 2 * 128
        assert figure["milliseconds"] == pytest.approx(1000 * 256 / figure["tokens_per_second"], rel=1e-3)
        assert figure["peak_memory_bytes"] > 1 << 27  # of the process, on a CPU
        assert figure["share_of_matmul_rate"] == pytest.approx(figure["model_flops_per_second"] / 1e12, abs=1e-4)
    assert 0 <= figures["ours: vanilla"]["waiting_for_data"] < 1
    assert report["device"]
    assert report["comparisons"].keys() == {
        "ours over hf",
        "cost of Lightning, data and record",
        "cost of zero-sink over vanilla",
    }
    assert "ours over hf" in capsys.readouterr().out


def test_what_is_not_compiled_takes_no_time_for_it(tmp_path: Path, monkeypatch) -> None:
    """A first step may happen to be a fast one; it was -0.1 s then."""
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: (0.3, 0.2))
    report = bench(
        str(tmp_path / "b.json"), model="demo", micro_batch=2, steps=24, compile=False, bare=True, peers="hf",
    )  # fmt: skip
    assert [f["compile_seconds"] for f in report["figures"][1:]] == [0, 0]


def stop_at_step_3(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PretrainModule.training_step

    def stopped(self: PretrainModule, *given: object) -> object:
        if self.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(PretrainModule, "training_step", stopped)


def test_ctrl_c_ends_a_measurement_of_the_trainer(tmp_path: Path, monkeypatch) -> None:
    """The trainer finishes its step and returns; half a run has no rate."""
    stop_at_step_3(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        bench(str(tmp_path / "b.json"), model="demo", micro_batch=1, steps=50, compile=False, suite=True)


def test_ctrl_c_ends_a_comparison_of_curves(tmp_path: Path, monkeypatch) -> None:
    """And does not have half a curve said to differ from the others."""
    base = module.Setting(tmp_path, 0, 1, 50, False, False).config("demo", "vanilla")
    stop_at_step_3(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compare_paths(base, 0.01)


def test_the_suite_goes_on_without_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    def missing(config: object) -> None:
        raise UserError("the peer hf cannot be imported.")

    monkeypatch.setitem(module.PEERS, "hf", missing)
    monkeypatch.setattr(module, "recipe_names", lambda folder: ["output-gate", "vanilla"])
    report = bench(
        str(tmp_path / "b.json"), model="demo", micro_batch=1, steps=10, compile=False, suite=True
    )  # fmt: skip
    assert [f["name"] for f in report["figures"]] == ["ours: vanilla", "bare loop: vanilla", "bare loop: output-gate"]
    assert report["left_out"] == {"hf": "the peer hf cannot be imported."}
    with pytest.raises(UserError, match="hf cannot be imported"):
        bench(str(tmp_path / "b.json"), model="demo", micro_batch=1, steps=10, compile=False, peers="hf")


def test_no_measurement_begins_after_its_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "ours", lambda config: pytest.fail("began"))
    report = bench(str(tmp_path / "b.json"), model="demo", minutes=1e-9)
    assert report["figures"] == []
    assert list(report["left_out"]) == ["ours: vanilla"]


def test_comparisons_are_ratios() -> None:
    rates = {"ours: vanilla": 98.0, "bare loop: vanilla": 100.0, "hf": 49.0, "bare loop: zero-sink": 80.0}
    assert comparisons({name: {"tokens_per_second": rate} for name, rate in rates.items()}) == {
        "ours over hf": 2.0,
        "cost of Lightning, data and record": pytest.approx(0.0204),
        "cost of zero-sink over vanilla": pytest.approx(0.25),
    }


def test_unknown_names_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown peer 'hff'"):
        bench(str(tmp_path / "b.json"), peers="hff")
    with pytest.raises(UserError, match="no recipe or file called 'zero'"):
        bench(str(tmp_path / "b.json"), model="demo", sinks="vanilla,zero")


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x64x64", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*, void*", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int", "attention"),
        ("_add_norms_backward_kernel", "residual sums and norms"),
        ("triton_per_fused_native_layer_norm_0", "residual sums and norms"),
        ("triton_poi_fused_add_3", "compiled elementwise"),
        ("_gelu_backward_kernel", "GELU"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_kernels_have_classes(kernel: str, expected: str) -> None:
    assert kernel_class(kernel) == expected
