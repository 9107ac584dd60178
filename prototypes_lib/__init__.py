"""Prototypes in self-supervised learning: the DINO family as compositions of a few ideas.

Ideas (pure functions): vmf, scores, blockwise, assignment, objectives, regularizers, methods, collapse; precision and
ranks say once how all of them compute and where a batch lies.
Machinery, what a step is made of: data, resampling, photometric, views, masks, batches; backbones, stochastic_depth,
batch_norm, heads, learner; schedules, optimizers, settings, paper_runs. A run: distributed, interrupts, trainer, train,
files, official, checkpoints, meters, records, event_files.
Reading: evaluate, doctor, live, sweeps, scoreboard, figures, course, cli.
"""

__version__ = "0.1.0"
