"""Errors a user can cause, each with the process exit code it ends in.

Every message names the value, the rule it broke and the remedy. Anything that only a bug of ours can cause is an
``assert`` or an ordinary exception instead, and shows its traceback.
"""

import os
import re
import unicodedata


class QGaloreError(Exception):
    """Base class: programs print the message without a traceback and exit with ``exit_code`` (see ``cli.door``)."""

    exit_code = 1


class ConfigError(QGaloreError):
    """Bad configuration, data, model folder or environment."""

    exit_code = 2


class DoesNotFitError(QGaloreError):
    """The run needs more memory than there is."""

    exit_code = 3


class NumericalError(QGaloreError):
    """A loss or gradient that is not finite."""

    exit_code = 4


class RankError(QGaloreError):
    """Another process of the job failed, or the processes no longer do the same."""


class Interrupted(QGaloreError):
    """A signal ended the run after its state was saved; the code is the shell's 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def printable(text: str) -> str:
    """``text`` with control characters (escape codes of terminals among them) and lone surrogates written out.

    Names and values in messages come from files of other people; shown as they are, some would move the cursor, change
    the window's title or end in a UnicodeEncodeError. New lines and tabs stay.
    """
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs") else ascii(letter)[1:-1]
        for letter in text
    )


KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN")  # of the environment
_SECRETS = (
    # The user and password of an address. A slash belongs to a password, unless a port stands before it.
    re.compile(r"(?<=://)(?:[^\s/'\"]+|[^\s/@:'\"\[]+:(?!\d{1,5}/)[^\s@'\"]*)(?=@)"),
    re.compile(r"(?i)(?<=%3a%2f%2f)(?:(?!%2f)[^\s&'\"])+?(?=@|%40)"),  # in an address that is part of another
    re.compile(  # short words only where one begins: ?monkey= is none
        r"(?i)(?<=[?&;#])(?:[\w.-]*(?:token|secret|password|passwd|passphrase|signature|credential|apikey|accesskey)|"
        r"(?:[\w.-]*[_.-])?(?:key|sig|pwd|auth))=[^\s&'\"]+"
    ),
    re.compile(  # keys by their beginnings; words of a path's name are no such keys
        r"(?<![A-Za-z0-9])(?:hf_(?:[A-Za-z0-9]{30,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,})|wandb_v1_\w{20,}|"
        r"gh[a-z]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}|xox[a-z]-\d[\w-]{10,}|"
        r"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[\w-]{35})"
    ),
    re.compile(  # OpenAI's and those like them; letters and digits mixed, which no word has and no hash behind a word
        r"(?<![\w-])[sr]k[-_](?:(?:proj|ant|svcacct|admin|or)-[\w-]{40,}|[0-9a-f]{32,}|[\w-]*?"
        r"(?![0-9a-f]+(?![A-Za-z0-9]))(?:(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{20}|[A-Za-z0-9]{32})[\w-]*)"
    ),
)
HIDDEN = "[secret]"


def without_secrets(text: str) -> str:
    """``text`` with ``[secret]`` in place of passwords and tokens in addresses, of keys that their beginning tells, and
    of the values of the environment's ``KEYS``. Messages of other programs are shown, and logs of runs are sent
    around."""
    for value in filter(lambda value: len(value) >= 8, (os.environ.get(name, "") for name in KEYS)):
        text = text.replace(value, HIDDEN)
    for kind in _SECRETS:
        text = kind.sub(HIDDEN, text)
    return text


def counted(number: int, one: str, many: str | None = None) -> str:
    """``number`` with what is counted: ``counted(1, "layer")`` → "1 layer", of 1,200 → "1,200 layers". ``many`` is the
    plural where it is more than an s, or where a verb follows."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
