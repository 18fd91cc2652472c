"""Training a super-network (PIAD) and fine-tuning what was cut out of it.

entry_points.py `train` and `finetune`
run.py          one run: what it was given, where it stands, the files it leaves
loop.py         its epochs, and the steps of an epoch
batches.py      the batches of an epoch, from any place in it
growing.py      how the dropout list grows
starting.py     output layers fitted to several entries at once
evaluation.py   the curve, and by it which weights are kept

step.py         the one function that takes a step, and who calls it for every batch
state.py        all that a step reads and writes; what speaks against a CUDA graph
capture.py      any function of tensors as a CUDA graph
average.py      the moving average of the weights
mixing.py       Mixup, CutMix and the loss
drawing.py      which entry a step trains
distillation.py teachers: the frozen original, the next larger entry
dropping.py     stochastic depth with counted masks
decay.py        weight decay by inclusion probability
optimizer.py    the optimizer and the schedule, by timm's names
precision.py    autocast, TF32 and memory layout
parallel.py     the network on several ranks
online.py       importance from the steps' own backward passes

resume.py       putting a run away, and taking it up
checkpoints.py  files that appear whole or not at all
origin.py       what a run began with: not gone on with from anything else
stopping.py     signals, and the ways a run ends early

history.py      what happened, epoch by epoch
report.py       the same for people: Markdown and plots
tracking.py     the same for TensorBoard
screen.py       bars and lines
dry_run.py      will it fit, how long will it take
types.py        what these files hand to each other
"""

from skd.support.settings import TrainConfig, finetune_config
from skd.training.entry_points import finetune, train
from skd.training.history import Epoch, History
from skd.training.stopping import Diverged, Stopped

__all__ = ["Diverged", "Epoch", "History", "Stopped", "TrainConfig", "finetune", "finetune_config", "train"]
