"""Zero-shot tasks: the harness's own numbers, sinks in every sequence, chance, and tasks that are not to be had."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MECHANISMS
from run_factory import CONFIG, make_run
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from sinkpretrain.cli import main
from sinkpretrain.errors import UserError
from sinkpretrain.export import export
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.texts import TextCodec

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance

from sinkpretrain.harness import SinkLM, hugging_face
from sinkpretrain.zero_shot import local_tasks, numbers, zero_shot

WORDS = [
    "model",
    "return",
    "the",
    "answer",
    "text",
    "where",
    "file",
    "and",
    "name",
    "test",
    "sink",
    "export",
    "def",
    "import",
    "from",
    "folder",
    "token",
]
SOME = ["vanilla", "sink_tokens_2", "fixed_first_token", "zero_sink", "stable_mask", "softpick"]


def sentence(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def question(source: random.Random, number: int, answer: str) -> dict[str, Any]:
    choices = {"text": [sentence(source, 3) for _ in range(4)], "label": list("ABCD")}
    return {"id": f"{number}", "question": sentence(source, 6), "choices": choices, "answerKey": answer}


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 questions whose answers are drawn by lot, as ARC's data look, and 60 of another task."""
    folder, source = tmp_path_factory.mktemp("zero_shot"), random.Random(5)
    write(folder / "arc_easy" / "validation.jsonl.gz", [question(source, i, source.choice("ABCD")) for i in range(400)])
    pairs = [
        {"goal": sentence(source, 5), "sol1": sentence(source, 2), "sol2": sentence(source, 4), "label": i % 2}
        for i in range(60)
    ]
    write(folder / "piqa" / "test.jsonl.gz", pairs)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, MECHANISMS[name], tokenizer_file) for name in SOME}


@pytest.fixture(scope="session")
def vanilla_folder(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(runs["vanilla"], tmp_path_factory.mktemp("hf") / "vanilla").folder


def wrapped(run: Path, batch_size: int = 8) -> SinkLM:
    loaded = load_model(run)
    return SinkLM(loaded.model, TextCodec(str(loaded.tokenizer), loaded.model.prefix_ids), batch_size)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


TEXTS = [sentence(random.Random(n), n) for n in (1, 4, 30, 61, 130)]
PAIRS = [
    ("the answer", " where"),
    ("", "import from folder"),
    ("def  ", "return the"),
    (TEXTS[3], " and name test"),
    (TEXTS[4], " sink"),
    ("model", TEXTS[2][:70]),
]


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vanilla", "sink_tokens_2"])
def test_a_random_model_is_at_chance(name: str, runs: dict[str, Path], questions: Path, tmp_path: Path) -> None:
    results = zero_shot(str(runs[name]), local=str(questions), out=str(tmp_path), progress=False)
    task = results["tasks"]["arc_easy"]
    assert task["n"] == 400
    assert task["acc"] == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 400) ** 0.5)
    assert task["stderr"] == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.1)
    assert results["tasks"]["piqa"]["acc"] == pytest.approx(0.5, abs=3 * (0.25 / 60) ** 0.5)
    assert results["missing"] == ["arc_challenge", "hellaswag", "lambada_openai", "openbookqa", "winogrande"]
    assert json.loads((tmp_path / "zero_shot.json").read_text()) == results


def test_answers_that_the_model_prefers_are_right(runs: dict[str, Path], tmp_path: Path) -> None:
    """Control for chance: the same questions with the model's own choices as their answers score 100 %, or 0 %."""
    lm, source = wrapped(runs["sink_tokens_2"]), random.Random(6)
    rows, wrong = [], []
    for i in range(40):
        row = question(source, i, "A")
        context = f"Question: {row['question']}\nAnswer:"
        scores = lm.loglikelihood(instances("loglikelihood", [(context, f" {t}") for t in row["choices"]["text"]]))
        best = max(range(4), key=lambda k, scores=scores: scores[k][0])  # type: ignore[misc]
        rows.append(row | {"answerKey": "ABCD"[best]})
        wrong.append(row | {"answerKey": "ABCD"[best - 1]})
    for answers, accuracy in ((rows, 1.0), (wrong, 0.0)):
        folder = tmp_path / str(accuracy)
        write(folder / "data" / "arc_easy" / "test.jsonl.gz", answers)
        results = zero_shot(
            str(runs["sink_tokens_2"]), local=str(folder / "data"), out=str(folder), tasks="arc_easy", progress=False
        )
        assert results["tasks"]["arc_easy"]["acc"] == accuracy


def test_the_harness_has_the_same_numbers(
    runs: dict[str, Path], vanilla_folder: Path, questions: Path, tmp_path: Path
) -> None:
    """Our wrapper and the harness's own, of a run and of its export: every metric of every task, to the last digit."""
    ours = zero_shot(str(runs["vanilla"]), local=str(questions), out=str(tmp_path / "a"), progress=False)
    theirs = zero_shot(str(vanilla_folder), local=str(questions), out=str(tmp_path / "b"), backend="hf", progress=False)
    assert (ours["backend"], theirs["backend"]) == ("sinkpretrain", "hf")
    assert ours["tasks"] == theirs["tasks"]


@pytest.mark.parametrize("backend", ["sinkpretrain", "hf"])
def test_without_progress_nothing_is_counted(
    backend: str, vanilla_folder: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither while weights are loaded, nor of questions, nor of the bootstrap behind a task's perplexity."""
    rows = [{"text": sentence(random.Random(i), 5)} for i in range(8)]
    write(tmp_path / "data" / "lambada_openai" / "test.jsonl.gz", rows)
    (tmp_path / "data" / "piqa").symlink_to(questions / "piqa")
    arguments = ["zero-shot", str(vanilla_folder), "--local", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--backend", backend, "--progress", "false"]) == 0
    said = capfd.readouterr()
    assert "it/s" not in said.err
    assert "boot" not in said.out
    if backend == "hf":
        lm = hugging_face(pretrained=str(vanilla_folder), device="cpu", progress=False)
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXTS[4],)]))
        until = {"until": ["q"], "max_gen_toks": 4, "do_sample": False}
        lm.generate_until(instances("generate_until", [(TEXTS[0], until)]))
        assert "it/s" not in capfd.readouterr().err
        assert main([*arguments, "--backend", backend]) == 0
        assert "Running loglikelihood requests: 100%" in capfd.readouterr().err


def test_the_harness_has_the_same_likelihoods(runs: dict[str, Path], vanilla_folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours, theirs = wrapped(runs["vanilla"]), HFLM(pretrained=str(vanilla_folder), device="cpu", batch_size=4)
    pairs = instances("loglikelihood", PAIRS)
    for (a, greedy_a), (b, greedy_b) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy_a == greedy_b
    texts = instances("loglikelihood_rolling", [(t,) for t in TEXTS])
    want = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(want, abs=2e-3)
    until = instances("generate_until", [(TEXTS[3], {"until": ["q", "e"], "max_gen_toks": 12, "do_sample": False})])
    assert ours.generate_until(until) == theirs.generate_until(until)


def test_models_of_others(questions: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """By the harness's own class by itself; by ours too, where this package reads the family; with the same numbers."""
    from family_factory import build
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    build("llama", vocab_size=320, eos_token_id=0, bos_token_id=None).save_pretrained(tmp_path / "llama")
    shape = {"vocab_size": 320, "hidden_size": 32, "n_layer": 1, "n_head": 2, "seq_length": 64}
    BloomForCausalLM(BloomConfig(**shape, eos_token_id=0)).save_pretrained(tmp_path / "bloom")
    for name in ("llama", "bloom"):
        tokenizer.save_pretrained(tmp_path / name)

    def results(name: str, backend: str) -> dict[str, Any]:
        out = str(tmp_path / f"{name}-{backend}")
        return zero_shot(str(tmp_path / name), local=str(questions), out=out, limit=40, backend=backend, progress=False)

    theirs, ours, unknown = results("llama", "auto"), results("llama", "sinkpretrain"), results("bloom", "auto")
    assert [r["backend"] for r in (theirs, ours, unknown)] == ["hf", "sinkpretrain", "hf"]
    assert ours["tasks"] == theirs["tasks"]
    assert unknown["model"]["mechanism"] == "bloom"
    assert unknown["tasks"]["piqa"]["n"] == 40
    bare = ours["tasks"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 7)])
    tokenizer.save_pretrained(tmp_path / "llama")  # as Llama's: a token in front of every text
    theirs, ours = results("llama", "auto"), results("llama", "sinkpretrain")
    assert ours["tasks"] == theirs["tasks"] != bare
    for name in ("llama", "bloom"):
        for file in (tmp_path / name).glob("tokenizer*"):
            file.unlink()
        with pytest.raises(UserError, match="comes without a tokenizer, and the tasks are text"):
            results(name, "auto")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    (tmp_path / "strange" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    save_file({"a": torch.ones(1)}, tmp_path / "strange" / "model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        results("strange", "auto")


def test_without_progress_nothing_is_printed(
    runs: dict[str, Path],
    questions: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor by the harness, which counts what it prepares, nor by git, which it asks for a commit."""
    monkeypatch.chdir(tmp_path)
    zero_shot(str(runs["vanilla"]), local=str(questions), out=str(tmp_path), limit=4, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", SOME)
def test_batch_size_changes_nothing(name: str, runs: dict[str, Path], questions: Path, tmp_path: Path) -> None:
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", [(t,) for t in TEXTS])):
        alone, together = (
            getattr(wrapped(runs[name], size), kind)(instances(kind, arguments)) for size in (1, len(TEXTS) + 30)
        )
        assert torch.allclose(torch.tensor(alone).double(), torch.tensor(together).double(), atol=1e-3)
    tables = [
        zero_shot(str(runs[name]), local=str(questions), out=str(tmp_path / str(n)), limit=30, batch_size=n)["tasks"]
        for n in (1, 32)
    ]
    assert tables[0] == tables[1]


# --- sinks, exactly once --------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every row of ids that goes through a model from here on."""
    rows: list[list[int]] = []
    plain = GPTNeoX.hidden

    def spy(self: GPTNeoX, ids_BT: Tensor, *rest: Any) -> Tensor:
        rows.extend(ids_BT.tolist())
        return plain(self, ids_BT, *rest)

    monkeypatch.setattr(GPTNeoX, "hidden", spy)
    return rows


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_every_window_starts_with_the_sinks(kind: str, runs: dict[str, Path], seen: list[list[int]]) -> None:
    lm = wrapped(runs["sink_tokens_2"], batch_size=1)
    getattr(lm, kind)(instances(kind, PAIRS if kind == "loglikelihood" else [(t,) for t in TEXTS]))
    assert len(seen) > 5
    for row in seen:
        assert row[:2] == [300, 301]
        assert max(row[2:], default=0) < 300
        assert len(row) <= CONFIG.context
    assert max(map(len, seen)) == CONFIG.context


def test_generation_reads_the_sinks_once(runs: dict[str, Path], seen: list[list[int]]) -> None:
    options = {"until": ["\x00"], "max_gen_toks": 6}
    wrapped(runs["sink_tokens_2"]).generate_until(instances("generate_until", [(TEXTS[4], options)]))
    read = [i for row in seen for i in row]
    assert read[:2] == [300, 301]
    assert max(read[2:]) < 300
    assert len(read) <= CONFIG.context


@pytest.mark.parametrize("name", SOME)
def test_rolling_scores_every_token_once(name: str, runs: dict[str, Path]) -> None:
    """Against windows cut by hand: as many new tokens as fit behind the sinks and one token of context."""
    lm = wrapped(runs[name])
    net, room = lm.model, lm.room
    for text, got in zip(TEXTS, lm.loglikelihood_rolling(instances("x", [(t,) for t in TEXTS])), strict=True):
        ids = lm.tok_encode(text)
        front = [*lm.prefix] or [lm.eot_token_id]
        total, start = 0.0, 0
        while start < len(ids):
            # A first window predicts its every token from what is in front; a later one keeps the last token before it
            # and, being the last of a text, is filled up with context to its full length.
            if start == 0:
                stop = min(len(ids), room)
                sequence = [*front, *ids[:stop]]
            else:
                stop = min(len(ids), start + room)
                sequence = [*lm.prefix, *ids[stop - room - 1 : stop]]
            logits = net(torch.tensor([sequence[:-1]]))[0].log_softmax(-1)
            targets = torch.tensor(sequence[1:])
            total += logits.gather(-1, targets[:, None])[-(stop - start) :].sum().item()
            start = stop
        assert got == pytest.approx(total, abs=2e-3)


def test_generation_is_greedy_and_stops(runs: dict[str, Path]) -> None:
    lm = wrapped(runs["sink_tokens_2"])
    ids, n = lm.tok_encode("def import"), len(lm.tok_encode("def import"))
    sequence = torch.tensor([[*lm.prefix, *ids]])
    for _ in range(20):
        sequence = torch.cat((sequence, lm.model(sequence)[:, -1:, :300].argmax(-1)), dim=1)
    want = lm.codec.tokenizer.decode(sequence[0, 2 + n :].tolist())
    ask = {"until": [], "max_gen_toks": 20}
    assert lm.generate_until(instances("generate_until", [("def import", ask)])) == [want]
    stop = want[len(want) // 2 : len(want) // 2 + 2]
    stopped = lm.generate_until(instances("generate_until", [("def import", ask | {"until": [stop]})]))
    assert stopped == [want[: want.index(stop)]]


def test_results_name_their_metrics() -> None:
    found = {
        "results": {"t": {"alias": "t", "perplexity,none": 9.0, "perplexity_stderr,none": "N/A", "acc,none": 0.5,
                          "acc_stderr,none": 0.1}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "versions": {"t": 1.0},
    }  # fmt: skip
    assert numbers(found, "t") == {
        "perplexity": 9.0,
        "acc": 0.5,
        "acc_stderr": 0.1,
        "stderr": 0.1,
        "n": 4,
        "version": 1.0,
    }


# --- what is not to be had ------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which the command line refuses."""
    assert main(["zero-shot", *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("sinkpretrain zero-shot: ")
    return told


def test_an_export_whose_mechanism_is_not_known_is_not_evaluated_without_it(
    questions: Path, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder loads in transformers alone, as another model: without its slot."""
    folder = export(make_run(tmp_path / "run", MECHANISMS["key_bias"], tokenizer_file), tmp_path / "hf").folder
    about = json.loads((folder / "config.json").read_text())
    about["sinkpretrain"]["sink"]["mechanism"] = "of_somebody_else"
    (folder / "config.json").write_text(json.dumps(about))
    told = refusal(capsys, str(folder), "--out", str(tmp_path / "out"), "--local", str(questions), "--tasks", "piqa")
    assert told.startswith(f"sinkpretrain zero-shot: {folder}: unknown sink mechanism 'of_somebody_else'; known: ")
    assert not (tmp_path / "out").exists()


def test_refusals(
    runs: dict[str, Path], questions: Path, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, local = str(runs["sink_tokens_2"]), ("--out", str(tmp_path / "out")), ("--local", str(questions))
    told = refusal(capsys, run, *out, *local, "--tasks", "arc_easy,winogrande")
    assert f"the task winogrande is not in {questions}, which has arc_easy, piqa;" in told
    assert "there is no folder" in refusal(capsys, run, *out, "--local", str(tmp_path / "none"))
    assert "none of the paper's tasks" in refusal(capsys, run, *out, "--local", str(tmp_path))
    assert "--out is missing" in refusal(capsys, run, *local)
    assert "--batch-size at least 1" in refusal(capsys, run, *out, *local, "--batch-size", "0")
    assert "takes Hugging Face folders" in refusal(capsys, run, *out, *local, "--backend", "hf")
    folder = export(run, tmp_path / "hf").folder
    assert "would leave out the sinks" in refusal(capsys, str(folder), *out, *local, "--backend", "hf")
    bare = make_run(tmp_path / "bare", MECHANISMS["vanilla"], None)
    assert "without a tokenizer" in refusal(capsys, str(bare), *out, *local)
    assert not (tmp_path / "out").exists()


def test_a_task_that_must_be_downloaded(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = refusal(capsys, str(runs["vanilla"]), "--out", str(tmp_path), "--tasks", "piqa", "--progress", "false")
    assert "the data of piqa cannot be had" in told
    assert told.endswith("give them with --local.")


def test_without_the_harness(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = refusal(capsys, str(runs["vanilla"]), "--out", str(tmp_path))
    assert told.endswith("install it with: pip install sinkpretrain[eval]")


def test_local_tasks_keep_the_harness_prompts(questions: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    assert list(local_tasks(questions, [], tmp_path / "tasks")) == ["arc_easy", "piqa"]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    task = manager.load(["arc_easy"])["tasks"]["arc_easy"]
    (first, *rest) = task.test_docs() if task.has_test_docs() else task.validation_docs()
    assert len(rest) == 399
    assert task.doc_to_text(first) == f"Question: {first['question']}\nAnswer:"
    assert task.config.task == "arc_easy"


@pytest.mark.parametrize("ours", [True, False])
def test_what_does_not_fit_the_context_is_refused(ours: bool, runs: dict[str, Path], vanilla_folder: Path) -> None:
    lm = wrapped(runs["vanilla"]) if ours else hugging_face(pretrained=str(vanilla_folder), device="cpu", batch_size=4)
    with pytest.raises(UserError, match=r"^a continuation of \d+ tokens \(.*\) does not fit the 64 that"):
        lm.loglikelihood(instances("loglikelihood", [("a", TEXTS[4])]))
    with pytest.raises(UserError, match=r"^the task generates 64 tokens, for which a context of 64 has no room"):
        lm.generate_until(instances("generate_until", [("a", {"until": ["q"], "max_gen_toks": 64})]))
    rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXTS[4],)]))
    assert rolling[0] < -100  # in windows, which fit


def test_a_long_answer_ends_zero_shot_with_a_sentence(
    vanilla_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = question(random.Random(8), 0, "A")
    row["choices"]["text"][2] = TEXTS[4]
    write(tmp_path / "data" / "arc_easy" / "test.jsonl.gz", [row])
    arguments = ("--out", str(tmp_path / "out"), "--local", str(tmp_path / "data"), "--backend", "hf")
    assert "does not fit the 64" in refusal(capsys, str(vanilla_folder), *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "cannot be read behind line 0 (Not a gzipped file"),
        (gzip.compress(b'{"goal": "a"}\n' * 999, mtime=0)[:-9], "cannot be read behind line "),
        (gzip.compress(b'{"goal": \n'), "cannot be read behind line 0 ("),
        (gzip.compress(b"[1]\n"), "cannot be read behind line 0 (no JSON object)"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(b'{"a": 1}\n'), "lack a column that the task's prompts are made of ('goal' is undefined)"),
    ],
    ids=[
        "not compressed",
        "cut short",
        "half an object",
        "a list",
        "empty",
        "another task's",
    ],  # the bytes hold the time
)
def test_data_that_are_not_a_tasks(
    content: bytes, message: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl.gz").write_bytes(content)
    arguments = ("--out", str(tmp_path / "out"), "--local", str(tmp_path), "--tasks", "piqa", "--progress", "false")
    assert message in refusal(capsys, str(runs["vanilla"]), *arguments)
    assert not (tmp_path / "out").exists()


def test_sinks_take_their_room(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"tokens (.*) does not fit the 62 that"):
        wrapped(runs["sink_tokens_2"]).loglikelihood(instances("loglikelihood", [("a", TEXTS[4])]))
