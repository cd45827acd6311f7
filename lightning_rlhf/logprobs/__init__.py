"""Log-probabilities of responses: packed rows, shared prompts, the output head in tiles."""
