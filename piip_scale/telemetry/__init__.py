"""What a run tells: TensorBoard, JSON lines, the progress bar."""
