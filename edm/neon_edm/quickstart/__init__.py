"""Neon on scikit-learn's handwritten digits: the EDM row in miniature, in minutes and without a GPU or a network.

`digits` the data, `features` the network that measures, `denoiser` the small network inside EDM's preconditioner,
`backbone` the contract, `prepare` the files that other rows fetch, `settings` the row, `one_seed` a run of it by `neon
reproduce`, `parallel` the seeds side by side, `report` and `pictures` the results over all seeds.
"""
