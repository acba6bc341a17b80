"""`python -m neon_core` is the `neon` command without installation."""

from neon_core.cli import main

main()
