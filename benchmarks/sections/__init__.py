"""What the scripts beside it measure, a module for each section."""
