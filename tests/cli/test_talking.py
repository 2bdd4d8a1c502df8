"""``qgalore chat`` with a model whose every next token is known: what is asked, shown, stopped, dropped and refused."""

import fcntl
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore.cli.chat import main
from qgalore.data.tokenizer import load_tokenizer, train_tokenizer
from qgalore.files import export_hf
from qgalore.models.conversation import Conversation
from qgalore.models.loading import pretrained

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SAYS = "Hi yo"


def parrot(end: str = "<|end|>", room: int = 256):
    """(model, tokenizer) that answers ``SAYS`` and then ``end``, after which it would say Z for ever.

    Each token's vector is its own direction, no layer adds to it, and the head leads from it to the token that follows.
    """
    tokenizer = train_tokenizer(["plain"], vocab_size=257, report=lambda line: None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    size = 320
    shape = {"hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=room, **shape, **ends)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        chain = [
            *tokenizer("\n" + SAYS)["input_ids"],
            tokenizer.convert_tokens_to_ids(end),
            *tokenizer("ZZ")["input_ids"],
        ]
        for now, following in pairwise(chain):
            model.lm_head.weight[following, now] = 1
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parrot")
    export_hf.save(*parrot(), path)
    return path


@pytest.fixture
def chat(capfd, monkeypatch):
    """A function (text for the standard input, arguments…) → (exit code, standard output, standard error)."""

    def run(text, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capfd.readouterr()
        code = main([*map(str, arguments), "--temperature", "0"])
        output = capfd.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def conversation(folder):
    """(a conversation, the prompts that its model was given, as text)."""
    model, tokenizer, prompts = pretrained(str(folder)), load_tokenizer(str(folder)), []

    def note(module, inputs, options):
        if options["input_ids"].shape[1] > 1:
            prompts.append(tokenizer.decode(options["input_ids"][0]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return Conversation(model, tokenizer, max_new_tokens=20, sampling={"do_sample": False}), prompts


def unheard(text):
    pass


def test_piped_lines_are_answered_and_the_trained_end_stops(chat, folder):
    """The generation config names another end than the template's; what follows the mark is never shown."""
    code, out, err = chat("Hello\n\nAnd you?\n", folder)
    assert code == 0, err
    assert out == f"{SAYS}\n{SAYS}\n"


def test_commands_are_obeyed_and_others_named(chat, folder):
    script = "/system Be brief.\n/usr/bin is what?\n/reset\n/system\n/sing\n/quit\nnever read\n"
    code, out, _ = chat(script, folder, "--system", "Be long.")
    assert code == 0
    set_, answer, anew, none, unknown = out.splitlines()
    assert (set_, answer, none) == ("(the system message is set)", SAYS, "(there is no system message)")
    assert "begins anew" in anew
    assert "no command /sing; there are /reset, /system TEXT, /quit" in unknown


def test_an_answer_without_an_end_is_cut_and_said_so(chat, folder):
    code, out, _ = chat("Hello\n", folder, "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("Hi \n(cut here: --max-new-tokens ")


def test_a_folder_without_a_template_is_answered_with_generate(chat, tmp_path):
    model, tokenizer = parrot()
    tokenizer.chat_template = None
    export_hf.save(model, tokenizer, tmp_path)
    code, _, err = chat("Hello\n", tmp_path)
    assert code == 2
    assert f"qgalore generate {tmp_path} --prompt TEXT" in err


def test_a_template_that_takes_no_system_message_says_so(chat, tmp_path):
    model, tokenizer = parrot()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    )
    export_hf.save(model, tokenizer, tmp_path)
    code, _, err = chat("Hello\n", tmp_path, "--system", "Be brief.")
    assert code == 2
    assert "no system here; say without a system message" in err
    code, out, _ = chat("/system Be brief.\nHello\n", tmp_path)  # and the conversation goes on without it
    assert code == 0
    assert "no system here" in out
    assert out.endswith(f"{SAYS}\n")


def test_the_model_reads_all_turns_as_its_template_writes_them(conversation):
    talk, prompts = conversation
    talk.instruct("Be brief.")
    for question in ("One?", "Two?"):
        made = talk.answer(question, unheard, unheard)
        assert (made.text, made.ended, made.stopped) == (SAYS, True, False)
    system, turn = "<|start|>system\nBe brief.<|end|>", "<|start|>user\n{}<|end|><|start|>assistant\n"
    first = system + turn.format("One?")
    assert prompts == [first, first + f"{SAYS}<|end|>" + turn.format("Two?")]


def test_words_are_shown_as_they_come(conversation):
    pieces = []
    conversation[0].answer("Hello", pieces.append, unheard)
    assert "".join(pieces) == SAYS
    assert len([piece for piece in pieces if piece]) >= 3


def test_the_oldest_turns_make_room_and_a_message_without_room_is_refused(chat, tmp_path):
    """A question of 20 letters has 27 tokens, an answer 17, and what asks for one 11. So two such questions make a
    prompt of 82, which leaves less than 20 of 96 positions, and a question of 90 letters has no room at all. It is not
    kept, and drops nothing: the last prompt has 27 + 17 + 12 + 11 tokens."""
    export_hf.save(*parrot(room=96), tmp_path)
    script = "a" * 20 + "\n" + "b" * 20 + "\n" + "c" * 90 + "\nHello\n"
    code, out, err = chat(script, tmp_path, "--max-new-tokens", 20)
    assert code == 0, err
    first, dropped, second, refused, last = out.splitlines()
    assert first == second == last == SAYS
    assert dropped == "(the oldest 2 turns no longer fit and were dropped)"
    assert "a prompt of 108 tokens, and the model has 96 positions" in refused


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(conversation):
    talk, _ = conversation
    seen = []

    def interrupt(module, inputs, options):
        seen.append(1)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)

    handle = talk.model.register_forward_pre_hook(interrupt, with_kwargs=True)
    made = talk.answer("Hello", unheard, unheard)
    handle.remove()
    assert (made.text, made.ended, made.stopped) == ("Hi", False, True)
    assert talk.turns[-1]["content"] == "Hi"


def take_terminal():
    """Make the standard input the terminal whose Ctrl-C the process hears."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path):
    """An endless answer, stopped; one more line; and the end of the input."""
    export_hf.save(*parrot(end="Z", room=2**14), tmp_path)
    ours, theirs = pty.openpty()
    code = "import sys; from qgalore.cli.chat import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tmp_path), "--temperature", "0", "--max-new-tokens", "16000"]
    root = Path(__file__).resolve().parents[2]
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    child = subprocess.Popen(command, **ends, cwd=root, start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    heard = b""

    def wait_for(text):
        nonlocal heard
        until = time.monotonic() + 120
        while text not in heard:
            assert time.monotonic() < until, heard
            heard += os.read(ours, 4096)
        heard = heard.partition(text)[2]

    try:
        wait_for(b"> ")
        os.write(ours, b"Hello\n")
        wait_for(b"Hi yoZZZ")
        os.write(ours, b"\x03")
        wait_for(b"(stopped)")
        wait_for(b"> ")
        os.write(ours, b"\x04")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
