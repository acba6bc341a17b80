"""A root to download into, with a list of two files that the loopback server holds."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from loopback_hub import Loopback

from neon_files.downloads import main

ROOT = Path(__file__).resolve().parents[1]
A = np.random.default_rng(0).bytes(700_000)
B = np.random.default_rng(1).bytes(300_001)


class Place:
    def __init__(self, root: Path, server: Loopback, kind: str = "plain", **changes):
        self.root, self.server, self.manifest = root / "root", server, root / "manifest.json"
        self.kind = kind
        self.root.mkdir()
        entries = [{"name": "a.pth", "folder": "checkpoints"}, {"name": "b.npz", "folder": "fid_stats"}]
        for entry in entries:
            content = server.files[entry["name"]]
            if kind == "hub":
                entry |= {"repo": "someone/Neon"}
            else:
                known = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                entry |= {"url": f"{server.url}/files/{entry['name']}"} | known
        entries[0] |= changes
        names = [entry["name"] for entry in entries]
        rows = {"both": names, "one": names[:1]}
        self.manifest.write_text(json.dumps({"entries": entries, "rows": rows}), encoding="utf-8")
        self.a, self.b = self.root / "checkpoints" / names[0], self.root / "fid_stats" / names[1]

    def arguments(self, *words: str) -> list[str]:
        return ["--manifest", str(self.manifest), "--root", str(self.root), *words]

    def run(self, *words: str):
        """(exit code, stdout, stderr) of the command in this process."""
        result = CliRunner().invoke(main, self.arguments(*words))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return result.exit_code, result.stdout, result.stderr

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "neon_files.downloads", *self.arguments(*words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)

    def good(self) -> bool:
        return self.a.read_bytes() == A and self.b.read_bytes() == B


def leftovers(folder: Path) -> list[str]:
    """Names in a folder but for locks and notes of what was verified."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith((".lock", ".verified")))
