"""`python -m neon_core` starts the `neon` command, which lies on a floor above."""

import runpy

runpy.run_module("neon_run", run_name="__main__")
