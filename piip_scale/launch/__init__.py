"""Jobs: what a training is as a Slurm job, from submitting it to telling how it goes. Nothing here imports torch."""
