"""Training a super-network (PIAD) and fine-tuning what was cut out of it.

loop.py         `train` and `finetune`
trainer.py      one run: epochs, steps, evaluation
step.py         one optimizer step
optimizer.py    the optimizer and the schedule, by timm's names
precision.py    the precision and the memory layout of the steps
parallel.py     the same step on several ranks
graph.py        the same as one CUDA graph
batches.py      the batches of an epoch, from any place in it
state.py        putting a run away, and taking it up
origin.py       what a run began with: not gone on with from anything else
checkpoints.py  files that appear whole or not at all
dropping.py     stochastic depth with counted masks
mixing.py       Mixup, CutMix and the loss
decay.py        weight decay by inclusion probability
online.py       importance followed during training
history.py      what happened, epoch by epoch
report.py       the same for people: Markdown and plots
screen.py       bars and lines
stopping.py     signals, and the ways a run ends early
dry_run.py      will it fit, how long will it take
"""

from skd.settings import TrainConfig, finetune_config
from skd.training.history import History
from skd.training.loop import finetune, train
from skd.training.stopping import Diverged, Stopped

__all__ = ["Diverged", "History", "Stopped", "TrainConfig", "finetune", "finetune_config", "train"]
