"""VAR on Fashion-MNIST: a tokenizer and a network small enough for minutes on one CPU core."""
