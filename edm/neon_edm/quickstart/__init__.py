"""Neon on scikit-learn's handwritten digits: the EDM row in miniature, in minutes and without a GPU or a network.

`digits` the data, `features` the network that measures, `denoiser` the small network inside EDM's preconditioner,
`backbone` the contract, `recipes` the settings, `stages` one seed from base to Neon, `controls`, `report`, `pictures`.
"""
