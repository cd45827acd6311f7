"""Items of a round to batches: which items make an optimizer step, and the tensors of a batch."""
