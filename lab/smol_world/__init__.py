"""A pretrained language model of 135 M parameters with a small vision tower, in SmolVLM2's checkpoint format."""
