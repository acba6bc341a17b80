"""`python -m neon_run` is the `neon` command without installation."""

from neon_run.command import main

main()
