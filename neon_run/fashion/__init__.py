"""Rows on small real images: Fashion-MNIST at 16 x 16, which every backbone can train on in minutes without a GPU."""
