"""Runs the checks of one client: all of them, even if some fail, and then insists that each public method was used.

A check is a function whose name says what must hold. `finish` prints what failed and ends the process with 0 or 1.
"""

import base64
import inspect
import io
import os
import sys
import traceback

from PIL import Image

URL = os.environ["SDGEN_BASE_URL"]
failed = []


class Watched:
    """A client that notes which of its methods are taken."""

    def __init__(self, client):
        self._client = client
        self._used = set()

    def __getattr__(self, name):
        self._used.add(name)
        return getattr(self._client, name)


def check(function):
    """Runs a check at once and notes its failure."""
    name = function.__name__.replace("_", " ")
    try:
        function()
        print("ok:", name, flush=True)
    except Exception:
        failed.append(name)
        print("FAILED:", name, flush=True)
        traceback.print_exc()
    return function


def refused(call, *statuses):
    """The error of a call that the server must refuse with one of these codes, which clients show in their error's text."""
    try:
        result = call()
    except Exception as error:
        assert any(str(status) in f"{error!r} {error}" for status in statuses), f"{error!r}"
        return error
    raise AssertionError(f"not refused: {result!r}")


def picture(text):
    """The picture of an answer, read as the clients do that take what stands before the first comma."""
    image = Image.open(io.BytesIO(base64.b64decode(text.split(",", 1)[0])))
    image.load()
    return image


def pixels(image):
    return image.convert("RGB").tobytes()


def finish(client=None, not_served=()):
    """Ends the process. `not_served` names the methods whose routes belong to extensions or were removed from A1111."""
    if client is not None:
        kind = type(client._client)
        methods = {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}
        unused = sorted(methods - client._used - set(not_served))
        if unused:
            failed.append(f"methods never called: {', '.join(unused)}")
        print(f"{len(methods & client._used)} of {len(methods)} methods called; not served: {', '.join(sorted(not_served)) or 'none'}")
    for name in failed:
        print("FAILED:", name)
    sys.stdout.flush()
    # Without the interpreter's own shutdown, in which a destructor of one of the clients raises.
    os._exit(1 if failed else 0)
