"""What official scripts compute that the product has no use for: only the golden cases compare with it."""
