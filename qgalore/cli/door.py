"""The one door through which every program leaves: errors become a message and an exit code."""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress

from ..errors import ConfigError, QGaloreError, printable, without_secrets
from ..training.stopping import silence_output


def leave(work: Callable[[], int | None], interrupted: str | None = None) -> int:
    """The exit code of ``work()``, whose None counts as 0.

    An error that a user can cause becomes one message on standard error and its own code; one of the operating system
    about a file becomes code 2, with the file's name. When the reader of the output has gone (``| head``) the program
    ends without a word, with the code of a process that SIGPIPE ended. Ctrl-C ends in 130, with the words of
    ``interrupted`` if there are any. Whatever else is raised is a fault of ours and shows its traceback.
    """
    _fill_closed()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a stream that a test or a notebook put there
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except QGaloreError as error:
        return _told(error)
    except BrokenPipeError:
        silence_output()
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    except KeyboardInterrupt:
        if interrupted:
            _say(f"\n{interrupted}")
        return 128 + signal.SIGINT
    except OSError as error:
        return _told(ConfigError(_of_the_system(error)))


def program(
    name: str, parse: Callable, run: Callable[[Namespace], int | None], interrupted: str | None = None
) -> Callable[..., int]:
    """The ``main(arguments, program)`` of a command: ``parse`` its arguments, then ``run`` what they ask for."""

    def main(arguments: list[str], program: str = name) -> int:
        options = parse(arguments, program)
        return leave(lambda: run(options), interrupted)

    return main


def _told(error: QGaloreError) -> int:
    with suppress(OSError):
        sys.stdout.flush()
    _say(f"error: {error}" if error.exit_code < 128 else f"\n{error}")
    return error.exit_code


def _say(text: str) -> None:
    with suppress(OSError):
        print(printable(without_secrets(text)), file=sys.stderr, flush=True)


def _of_the_system(error: OSError) -> str:
    if error.filename is None or error.strerror is None:  # transformers raises plain sentences
        return str(error) or type(error).__name__
    remedy = "Name another file or folder, or mend this one."
    if isinstance(error, FileNotFoundError):
        remedy = "Check the path, or copy the file there."
    elif isinstance(error, PermissionError):
        remedy = "Change its permissions, or choose another place."
    return f"{os.fsdecode(error.filename)}: {error.strerror}. {remedy}"


def _fill_closed() -> None:
    """Open what a shell closed (``>&-``): the first file to be opened would otherwise get the place of the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
