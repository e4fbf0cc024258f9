"""``sinkpretrain generate`` as a user meets it: text in pieces, its ends, mistakes, pipes, Ctrl-C, turns."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_factory import save_weights

from data_prep.tokenizer import train_tokenizer
from sinkpretrain.cache import Cache
from sinkpretrain.cli import main
from sinkpretrain.config import ModelConfig, RunConfig, SinkConfig, save_yaml
from sinkpretrain.decode import Engine, TokenStream
from sinkpretrain.errors import UserError
from sinkpretrain.generate import Interrupt, Session, forbidden
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.sampling import Sampler, Sampling
from sinkpretrain.texts import MOST_PENDING, StopStrings, TextCodec, chat_turns

VOCABULARY = 300
TEXT = "Ünïcödé naïve 中文 text, 🙂 and more of it; once upon a time there was a model.\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an untrained model whose sinks are the rows behind its tokenizer's 300."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer.json").write_bytes(train_tokenizer(f"bpe:{VOCABULARY}", [TEXT] * 50).content)
    config = ModelConfig(n_layer=2, d_model=32, n_head=2, vocab_size=320, tokenizer_size=VOCABULARY, context=64)
    net = GPTNeoX(config, SinkConfig("sink_tokens", {"n": 2}), seed=3)
    with torch.no_grad():
        net.head.weight *= 20  # sure of itself, and of forbidden rows too
    save_weights(net, folder / "weights" / "step-0000001.safetensors", step=1, name="toy")
    save_yaml(RunConfig(), folder / "config.yaml")
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


def test_the_same_seed_is_the_same_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--prompt", "once", "--max-tokens", "40", "--ignore-eod", "--cache", "4+20"]
    first = printed(capsys, *words, "--seed", "1")
    assert len(first) > 40
    assert first == printed(capsys, *words, "--seed", "1") != printed(capsys, *words, "--seed", "2")
    greedy = [printed(capsys, *words, "--seed", str(s), "--temperature", "0") for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_ids_that_are_no_text_never_come(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The logits of the spare rows are as large as the others': without the ban most draws would fail to decode."""
    from sinkpretrain import generate as module

    drawn: list[int] = []
    original = module.TokenStream.__iter__

    def noting(self):
        for token in original(self):
            drawn.append(token)
            yield token

    module.TokenStream.__iter__ = noting
    try:
        printed(capsys, str(run), "--prompt", "a", "--max-tokens", "300", "--ignore-eod", "--temperature", "3")
    finally:
        module.TokenStream.__iter__ = original
    assert len(drawn) == 300
    assert max(drawn) < VOCABULARY


def test_figures_go_to_stderr_and_can_be_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), "--prompt", "once", "--max-tokens", "5", "--ignore-eod", "--seed", "9"]
    assert main(words) == 0
    error = capsys.readouterr().err
    assert "5 tokens at" in error
    assert "cache 4+59" in error
    assert "seed 9" in error
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_prompt_of_any_length_streams(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 40, encoding="utf-8")
    words = [str(run), "--cache", "4+12", "--max-tokens", "8", "--ignore-eod", "--seed", "0"]
    from_file = printed(capsys, *words, "--prompt-file", str(tmp_path / "long.txt"))
    assert from_file == printed(capsys, *words, "--prompt", TEXT * 40)
    echoed = printed(capsys, *words, "--prompt", TEXT * 40, "--echo")
    assert echoed == TEXT * 40 + from_file


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("RUN --cache 4x1020", "write x+y"),
        ("RUN --temperature -1", "--temperature must be 0 (greedy) or more"),
        ("RUN --temperatur 1", "did you mean --temperature?"),
        ("RUN --max-tokens -1", "--max-tokens must be 0 (endless) or more, not -1"),
        ("RUN --max-tokens many", "--max-tokens must be int"),
        ("RUN --prompt a --prompt-file b", "give either --prompt or --prompt-file"),
        ("RUN --prompt-file /nowhere.txt", "cannot read the prompt /nowhere.txt"),
        ("RUN --prompt a --stop=", "--stop is empty"),
        ("RUN --prompt a --tokenizer /nowhere.json", "/nowhere.json does not exist"),
        ("/nowhere --prompt a", "there is no model at /nowhere"),
    ],
)
def test_mistakes_are_one_sentence(words: str, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words.replace("RUN", str(run)).split(" ")]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_prompt_that_is_not_utf8_is_refused(errors: str, run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    prompt = "caf\u00e9".encode("latin-1")
    (tmp_path / "latin.txt").write_bytes(prompt)
    assert main(["generate", str(run), "--prompt-file", str(tmp_path / "latin.txt")]) == 2
    assert "latin.txt is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt), encoding="utf-8", errors=errors))
    assert main(["generate", str(run)]) == 2
    assert "the prompt on stdin is not UTF-8" in capsys.readouterr().err


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_bytes(
        train_tokenizer("bpe:400", [TEXT * 3, "much more text of all kinds"]).content
    )
    codec = TextCodec(str(tmp_path))
    if codec.size <= 320:
        pytest.skip("the text gave no larger vocabulary")
    assert main(["generate", str(run), "--prompt", "a", "--tokenizer", str(tmp_path)]) == 2
    assert "give the one it was trained with" in capsys.readouterr().err


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_across_pieces(size: int) -> None:
    text = "one ENough two END three"
    stops = StopStrings(["END", "NEVER"])
    shown = ""
    for at in range(0, len(text), size):
        shown += stops.feed(text[at : at + size])
        assert shown == text[: len(shown)]
        if stops.hit:
            break
    assert stops.hit
    assert shown + stops.rest() == "one ENough two "


def test_what_a_stop_string_held_back_is_not_lost() -> None:
    stops = StopStrings(["\\nUser:"])
    shown = stops.feed("answer\nUse")
    assert (shown, stops.hit) == ("answer", False)
    assert shown + stops.rest() == "answer\nUse"


def test_generation_stops_in_front_of_a_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--prompt", "once", "--ignore-eod", "--seed", "1"]
    whole = printed(capsys, *words, "--max-tokens", "60")
    stop = whole[20:24]
    stopped = printed(capsys, *words, "--max-tokens", "60", "--stop", "never in here", "--stop", stop)
    assert stopped == whole[: whole.index(stop)]


def test_the_end_of_a_document_ends_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--prompt", "once", "--temperature", "30", "--seed", "3"]
    assert main(["generate", *words]) == 0  # ends by itself: one token in 300 is the end of a document
    first = capsys.readouterr().out
    longer = printed(capsys, *words, "--ignore-eod", "--max-tokens", "2000")
    assert longer.startswith(first + "\n\n")


# --- pieces ---------------------------------------------------------------------------------------------------------


def test_characters_come_out_whole(run: Path) -> None:
    codec = TextCodec(str(run))
    text = "naïve 中文 🙂👩‍👩‍👧 ends"
    ids = codec.more(text)
    assert len(ids) > len(text)  # characters of several tokens each
    printer = codec.printer()
    pieces = [printer.step(i) for i in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_text_do_not_pile_up(run: Path) -> None:
    codec = TextCodec(str(run))
    (lone,) = (codec.tokenizer.token_to_id("ł"),)  # byte 0x82 can only continue a character
    printer = codec.printer()
    pieces = [printer.step(lone) for _ in range(10 * MOST_PENDING)]
    assert "\ufffd" in "".join(pieces)
    assert "".join([printer.step(i) for i in codec.more("fine again")]).endswith("fine again")


def test_the_prefix_is_not_read_twice(run: Path, tmp_path: Path) -> None:
    """An exported tokenizer prepends the sinks, and so does the engine."""
    made = json.loads((run / "tokenizer.json").read_text())
    made["added_tokens"].append(made["added_tokens"][0] | {"id": 300, "content": "<|sink|>"})
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|sink|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|sink|>": {"id": "<|sink|>", "ids": [300], "tokens": ["<|sink|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    plain = TextCodec(str(run)).first("once upon")
    assert TextCodec(str(tmp_path), (300,)).first("once upon") == plain
    assert TextCodec(str(tmp_path), ()).first("once upon") == [300, *plain]
    assert (TextCodec(str(run)).opening(), TextCodec(str(tmp_path), (300,)).opening()) == ([], [])
    codec = TextCodec(str(tmp_path))
    for codec.end_ids in ((), (300,)):  # of OPT, what begins a text ends it too
        assert codec.opening() == [300]


# --- conversations --------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_turn_by_turn(run: Path, tmp_path: Path) -> None:
    """Together, the turns are what the template makes of the whole conversation."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(run / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    turn = chat_turns(tmp_path, "Be brief.")
    assert turn is not None
    stream = turn("Hello") + "Hi.<|im_end|>" + turn("And now?") + "Bye.<|im_end|>" + turn("B")
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Bye."},
        {"role": "user", "content": "B"},
    ]
    assert stream == tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert chat_turns(run, "") is None


def test_ctrl_c_while_a_prompt_is_read_leaves_a_stream_that_goes_on(run: Path) -> None:
    class Impatient(Interrupt):
        def __enter__(self) -> Interrupt:
            entered = super().__enter__()
            self.noted = True
            return entered

    loaded = load_model(run)
    engine, codec = Engine(loaded.model, Cache(2, 20), block=16), TextCodec(str(run))
    sampler = Sampler(Sampling(), forbidden(loaded.model, codec), torch.Generator().manual_seed(0))
    written: list[str] = []
    session = Session(engine, TokenStream(engine, sampler), codec, max_tokens=5, ignore_eod=True, write=written.append)
    session.interrupt = Impatient()
    with pytest.raises(KeyboardInterrupt):
        session.read(list(range(100)))
    assert engine.count == len(loaded.model.prefix_ids) + 16  # one block, whole
    session.interrupt = Interrupt()
    session.read([1, 2])
    assert session.answer() == "length"
    assert "".join(written)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, str(run), "--prompt", "once", "--max-tokens", "9", "--ignore-eod", "--dtype", dtype)


def start(*words: str, stdin: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "sinkpretrain", "generate", *words],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_turns_keep_the_stream(run: Path) -> None:
    process = start(str(run), "--interactive", "--max-tokens", "6", "--ignore-eod", "--seed", "4", "--cache", "2+20")
    out, error = process.communicate("one line\n\nanother line\n", timeout=120)
    assert process.returncode == 0
    assert out.count("\n") >= 2
    assert "12 tokens at" in error
    codec = TextCodec(str(run))
    read = len(codec.first("one line\n")) + len(codec.more("another line\n"))
    assert f"{read} tokens read" in error


def test_ctrl_c_and_pipes(run: Path) -> None:
    """An endless text is stopped by Ctrl-C with code 130, or by whoever reads it, without a word of Python's."""
    process = start(str(run), "--prompt", "once", "--ignore-eod", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens/s" in error
    assert "Traceback" not in error

    process = start(str(run), "--prompt", "once", "--ignore-eod", stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(50)
    process.stdout.close()
    started = time.monotonic()
    assert process.stderr is not None
    error = process.stderr.read()
    process.wait(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 141
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_empty_stop_is_an_error() -> None:
    with pytest.raises(UserError, match="--stop is empty"):
        StopStrings([""])
