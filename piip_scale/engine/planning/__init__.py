"""What a run will need and how long it will take, before there is a GPU, and what else there is to choose."""
