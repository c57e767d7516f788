# The same over 36 epochs.
_base_ = ["training_1x.py"]
schedule = dict(milestones=(27 / 36, 33 / 36))
train = dict(epochs=36)
