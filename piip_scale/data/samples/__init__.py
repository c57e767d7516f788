"""Each task's samples: from stored bytes to batches."""
