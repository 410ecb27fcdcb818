"""The line that says how long compiling has taken so far."""

import sys
import threading

import pytest

from vqgan_jax.tools import compiling


class Screen:
    """A stream that knows when something was written."""

    def __init__(self):
        self.text, self.wrote = "", threading.Event()

    def write(self, text):
        self.text += text
        self.wrote.set()

    def flush(self):
        pass

    def isatty(self):
        return False


def test_a_line_of_progress_while_compiling_and_none_after(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(compiling, "_SECONDS", 0.01)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), compiling._progress():
        assert screen.wrote.wait(60)
        raise ZeroDivisionError
    assert screen.text.startswith("compiling    0 s\n")
    assert threading.active_count() == before  # what fails stops it too


def test_a_short_compilation_says_nothing(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with compiling._progress():
        pass
    assert screen.text == ""
