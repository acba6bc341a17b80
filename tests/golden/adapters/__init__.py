"""One module per part. Each has

ADAPTERS: kind -> function(Case) -> {output name: array}, written with the project's public code and nothing else;
KEY_LISTS (optional): function(file name, parsed keys_*.json) -> {state-dict name: shape} of our own full-size network,
    in state-dict order, built on the meta device;
COMPARE (optional): kind -> function(case, output name, ours) -> None or a message, where a case says otherwise.
"""
