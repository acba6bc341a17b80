"""Seeds side by side: one process and one thread for each, with one progress bar per seed in the terminal.

The network is so small that a second thread does not speed it up; a second seed on the second core does.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neon_edm.quickstart.one_seed import passes_per_seed, run_seed
from neon_edm.quickstart.settings import Quickstart

_messages: Any = None  # the queue to the parent, in a worker


def run_seeds(quickstart: Quickstart, seeds: Sequence[int], out_dir: Path, num_workers: int) -> dict[int, dict]:
    """seed -> record; each leaves its files in `out_dir`/seed-<seed>.

    What a worker raises is raised here, once the seeds that run beside it have ended; others are not started.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    num_workers = min(num_workers, len(seeds))
    futures: dict[int, Future] = {}
    with (
        Bars(seeds, passes_per_seed(quickstart)) as bars,
        ProcessPoolExecutor(num_workers, context, _start_worker, (messages,)) as pool,
    ):
        while len(futures) < len(seeds) or not all(future.done() for future in futures.values()):
            # One seed per free worker: seeds in the pool's own queue would start even after a failure or Ctrl-C.
            while len(futures) < len(seeds) and sum(not f.done() for f in futures.values()) < num_workers:
                seed = seeds[len(futures)]
                futures[seed] = pool.submit(_work, quickstart, seed, seed_folder(out_dir, seed))
            bars.show(messages)
            if any(future.done() and future.exception() for future in futures.values()):
                break
        bars.show(messages)
    return {seed: future.result() for seed, future in futures.items()}


def seed_folder(out_dir: Path, seed: int) -> Path:
    return out_dir / f"seed-{seed}"


def _start_worker(messages) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would go on for minutes unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers run this"
    parent.join()
    os._exit(1)


def _work(quickstart: Quickstart, seed: int, out_dir: Path) -> dict:
    out_dir.mkdir(parents=True, exist_ok=True)
    reporter = _Reporter(seed)
    # The shared functions draw bars of their own, which would overwrite the parent's.
    with open(out_dir / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        result = run_seed(quickstart, seed, out_dir, reporter)
    reporter("done", 0)
    return result


class _Reporter:
    """Adds up a worker's progress and sends it at every new stage and otherwise five times a second."""

    def __init__(self, seed: int):
        self.seed, self.stage, self.passes, self.sent_at = seed, "", 0, 0.0

    def __call__(self, stage: str, passes: int) -> None:
        self.passes += passes
        if stage != self.stage or time.monotonic() - self.sent_at > 0.2:
            _messages.put((self.seed, stage, self.passes))
            self.stage, self.passes, self.sent_at = stage, 0, time.monotonic()


class Bars:
    """One bar per seed; on a stderr that is no terminal, one line per stage."""

    def __init__(self, seeds: Sequence[int], passes: int):
        self.live = sys.stderr.isatty()
        self.stages = dict.fromkeys(seeds, "")
        form = "{desc} |{bar:30}| {percentage:3.0f}% [{elapsed}<{remaining}]"
        self.bars = {
            seed: tqdm(
                total=passes,
                desc=f"seed {seed} {'waiting':13}",
                position=number,
                bar_format=form,
                disable=not self.live,
            )
            for number, seed in enumerate(seeds)
        }

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error) -> None:
        for bar in self.bars.values():
            bar.close()

    def show(self, messages) -> None:
        """Handle the messages of the workers for a fifth of a second."""
        end = time.monotonic() + 0.2
        while (left := end - time.monotonic()) > 0:
            try:
                seed, stage, passes = messages.get(timeout=left)
            except queue.Empty:
                return
            self.move(seed, stage, passes)

    def move(self, seed: int, stage: str, passes: int) -> None:
        bar = self.bars[seed]
        if stage != self.stages[seed]:
            self.stages[seed] = stage
            bar.set_description_str(f"seed {seed} {stage:13}", refresh=False)
            if not self.live:
                print(f"seed {seed}: {stage}", file=sys.stderr, flush=True)
        bar.update(bar.total - bar.n if stage == "done" else min(passes, bar.total - bar.n))
