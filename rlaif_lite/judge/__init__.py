"""The model judges its own answers: a narrative as context, then claims checked one by one, or two answers compared."""
