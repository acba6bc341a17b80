"""Progress in the log of a job: lines, few of them."""

import io
import sys
import time

from neon_files import progress as module
from neon_files.progress import progress_bar


def lines_of(monkeypatch, *, seconds, **options):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "SECONDS", seconds)
    with progress_bar(total=6, desc="generate", unit="img", **options) as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.update(2)
    return stream.getvalue()


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(monkeypatch):
    text = lines_of(monkeypatch, seconds=60.0)
    assert text.startswith("generate: 6 of 6 img, 00:00 so far, ") and text.count("\n") == 1 and "\r" not in text
    text = lines_of(monkeypatch, seconds=0.01)
    assert [line[:20] for line in text.splitlines()] == [f"generate: {n} of 6 img" for n in (2, 4, 6)]


def test_what_is_done_already_is_not_announced_and_what_is_silent_stays_so(monkeypatch):
    assert lines_of(monkeypatch, seconds=60.0, disable=True) == ""
    assert lines_of(monkeypatch, seconds=60.0, leave=False) == ""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress_bar(total=6, initial=6, desc="generate").close()
    assert list(progress_bar([1, 2], desc="prepare")) == [1, 2]
    assert stream.getvalue().startswith("prepare: 2 of 2 it, ") and stream.getvalue().count("\n") == 1


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=2, desc="generate") as bar:
        bar.update(2)
    assert "\r" in stream.getvalue() and "100%" in stream.getvalue()
