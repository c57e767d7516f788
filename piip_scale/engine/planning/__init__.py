"""What a run will need, before there is a GPU: memory, and which knobs help."""
