"""The `neon` command: `python -m neon_run`, and what an installed `neon` calls."""

from neon_run.start import imported


def main() -> None:
    imported("neon_run.command").main()


if __name__ == "__main__":
    main()
