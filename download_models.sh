#!/usr/bin/env bash
# Fetches published checkpoints and reference statistics into checkpoints/ and fid_stats/, checked and resumable.
#
#   bash download_models.sh                      # the ten official files
#   bash download_models.sh xarl vard16          # all that these rows need, tokenizers and base checkpoints too
#   bash download_models.sh --list | --dry_run | --verify | --help
#
# PYTHON names another interpreter. The work is done by neon_files/downloads.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x "$here/.venv/bin/python" ]; then python="$here/.venv/bin/python"; fi
fi
if ! "$python" -c 'import click, filelock, huggingface_hub, tqdm' 2>/dev/null; then
    echo "Error: $python lacks click, filelock, huggingface_hub or tqdm; run \`pip install -e .\` in $here first" >&2
    exit 2
fi
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m neon_files.downloads "$@"
