"""What benchmarks/engine.py measures, a module for each section."""
