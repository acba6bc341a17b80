"""EDM (Karras et al. 2022): networks, sampler, losses and the three rows of the table that use it."""
