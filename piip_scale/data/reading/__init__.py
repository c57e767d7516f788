"""Shards read where they lie: sets, sources, node cache, prefetch, broken samples."""
