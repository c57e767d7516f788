# The same over 24 epochs.
_base_ = ["training_1x.py"]
schedule = dict(milestones=(16 / 24, 22 / 24))
train = dict(epochs=24)
