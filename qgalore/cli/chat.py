"""``qgalore chat``: a conversation with an exported model."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from . import arguments as kinds
from . import door, generate

EXAMPLES = """
  %(prog)s runs/instruct_example/export/hf
  %(prog)s runs/instruct_example/export/hf --system "Answer briefly." --temperature 0
"""

COMMANDS = {
    "/reset": "begin anew",
    "/system TEXT": "set the system message (without TEXT: none)",
    "/quit": "leave, as Ctrl-D does",
}
_COMMAND = re.compile(r"/[a-z]+(\s|$)")  # so that a path can be a message


def parse(arguments: list[str], program: str) -> argparse.Namespace:
    parser = kinds.parser(program, "Talk with a model that was trained on conversations.", EXAMPLES)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder, such as runs/NAME/export/hf")
    parser.add_argument("--system", metavar="TEXT", help="a system message, which stands before the conversation")
    parser.add_argument(
        "--max-new-tokens", type=kinds.whole(1, 2**20), default=512, metavar="N", help="of an answer, at most (512)"
    )
    generate.add_drawing(parser)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    return parser.parse_args(arguments)


def lines(terminal: bool) -> Iterator[str]:
    """What is typed, or comes through a pipe, line by line. At a terminal Ctrl-C only empties the line."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # on Windows, whose terminal does so itself
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")


def say(text: str) -> None:
    print(text, end="", flush=True)


def tell(line: str) -> None:
    print(f"({line})", flush=True)


def obey(command: str, conversation) -> bool:
    """Do what a line that begins with / asks for. Returns whether the conversation goes on."""
    from ..errors import ConfigError

    name, _, rest = command.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        conversation.turns = []
        tell("the conversation begins anew")
    elif name == "/system":
        text = rest.strip() or None
        try:
            conversation.instruct(text)
            tell("the system message is set" if text else "there is no system message")
        except ConfigError as error:
            tell(str(error))
    else:
        tell(f"there is no command {name}; there are {', '.join(COMMANDS)}")
    return True


def exchange(message: str, conversation, terminal: bool) -> None:
    """Ask, and show the answer with a line about why it ended, if it did not end itself."""
    from ..models.conversation import TooLongError

    try:
        made = conversation.answer(message, say, tell)
    except TooLongError as error:
        tell(str(error))
        return
    print(flush=True)
    if made.stopped and not terminal:
        raise KeyboardInterrupt
    if made.stopped:
        tell("stopped")
    elif not made.ended:
        tell("cut here: --max-new-tokens or the model's positions allow no more")


def chat(options: argparse.Namespace) -> None:
    sampling = generate.drawing(options)
    generate.check_folder(options.folder)
    kinds.check_device(options.device)
    import torch

    from ..data.tokenizer import load_tokenizer
    from ..models.conversation import Conversation, check_template
    from ..models.loading import pretrained

    tokenizer = load_tokenizer(str(options.folder))
    check_template(tokenizer, options.folder)
    model = pretrained(str(options.folder)).to(options.device)
    conversation = Conversation(model, tokenizer, options.system, options.max_new_tokens, sampling)
    torch.manual_seed(options.seed)
    terminal = sys.stdin.isatty()
    if terminal:
        print("\n".join(f"{name:<14}{does}" for name, does in {**COMMANDS, "Ctrl-C": "stop an answer"}.items()))
    for line in lines(terminal):
        # What is no UTF-8 arrives as lone surrogates, which no tokenizer reads.
        message = line.encode("utf-8", "replace").decode().strip()
        if _COMMAND.match(message):
            if not obey(message, conversation):
                return
        elif message:
            exchange(message, conversation, terminal)


main = door.program("qgalore chat", parse, chat)
