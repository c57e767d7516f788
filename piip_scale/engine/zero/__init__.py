"""Everything that touches DeepSpeed: its config, building, partitions, restoring, offload."""
