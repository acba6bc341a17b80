"""`neon check`: the first minutes on a new machine. Numbers against recorded ones, ranks, speed and memory per row."""
