"""Sentences: where they come from, their tokens, and the batches that a step gets."""
