"""No secret of the environment reaches a log, a record or the page, whatever a library prints or raises."""

import os
import re
from typing import Any, TextIO

NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
WITH_PASSWORD = re.compile(r"://[^/\s:@]+:[^/\s@]+@")  # as a proxy may have it
SHORTEST = 8  # characters: a text may hold a shorter value by chance


def without_secrets(text: str) -> str:
    """`text` with *** in place of the values of such variables as WANDB_API_KEY."""
    # A tracker's thread may take a variable away meanwhile, as W&B does: nothing may be raised here for that.
    variables = ((name, os.environ.get(name, "")) for name in list(os.environ))
    secrets = [
        value
        for name, value in variables
        if len(value) >= SHORTEST and (NAMES.search(name) or WITH_PASSWORD.search(value))
    ]
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return text


class Redacted:
    """A text stream that is written to without them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(without_secrets(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
