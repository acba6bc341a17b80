"""Seeds side by side: one process and one thread for each, with one progress bar per seed in the terminal.

The network is so small that a second thread does not speed it up; a second seed on the second core does.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tqdm import tqdm

from neon_edm.quickstart.recipes import Quickstart
from neon_edm.quickstart.stages import passes_per_seed, run_seed

_messages = None  # the queue to the parent, in a worker


def run_seeds(quickstart: Quickstart, seeds: Sequence[int], out_dir: Path, num_workers: int) -> list[dict]:
    """The records of all seeds, in their order; each leaves its files in `out_dir`/seed-<seed>.

    Whatever a worker raises is raised here, after the other running seeds have ended.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    with _Bars(seeds, passes_per_seed(quickstart)) as bars:
        with ProcessPoolExecutor(min(num_workers, len(seeds)), context, _start_worker, (messages,)) as pool:
            futures = [pool.submit(_work, quickstart, seed, out_dir / f"seed-{seed}") for seed in seeds]
            while not all(future.done() for future in futures):
                bars.show(messages)
                if any(_failed(future) for future in futures):
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
            bars.show(messages)
        results = [future.result() for future in futures if not future.cancelled()]
    return results


def _failed(future: Future) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _start_worker(messages) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed has nobody to report to; it must not go on for minutes unseen."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(quickstart: Quickstart, seed: int, out_dir: Path) -> dict:
    out_dir.mkdir(parents=True, exist_ok=True)
    # The shared functions draw bars of their own, which would overwrite the parent's.
    with open(out_dir / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        result = run_seed(quickstart, seed, out_dir, lambda stage, passes: _messages.put((seed, stage, passes)))
    _messages.put((seed, "done", 0))
    return result


class _Bars:
    """One bar per seed; on a stderr that is no terminal, one line per stage."""

    def __init__(self, seeds: Sequence[int], passes: int):
        self.live = sys.stderr.isatty()
        self.stages = dict.fromkeys(seeds, "")
        form = "{desc} |{bar:30}| {percentage:3.0f}% [{elapsed}<{remaining}]"
        self.bars = {
            seed: tqdm(total=passes, position=number, bar_format=form, disable=not self.live)
            for number, seed in enumerate(seeds)
        }

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error) -> None:
        for bar in self.bars.values():
            bar.close()

    def show(self, messages) -> None:
        """Take in what the workers say within a fifth of a second."""
        while True:
            try:
                seed, stage, passes = messages.get(timeout=0.2)
            except queue.Empty:
                return
            bar = self.bars[seed]
            if stage != self.stages[seed]:
                self.stages[seed] = stage
                bar.set_description_str(f"seed {seed} {stage:13}", refresh=False)
                if not self.live:
                    print(f"seed {seed}: {stage}", file=sys.stderr, flush=True)
            bar.update(bar.total - bar.n if stage == "done" else min(passes, bar.total - bar.n))
