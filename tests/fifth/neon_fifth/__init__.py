"""A fifth backbone, as docs/adding_a_backbone.md walks through it: noise and a class -> an image, in one step."""
