"""Prototypes in self-supervised learning: the DINO family as compositions of a few ideas.

Ideas (pure functions): vmf, scores, assignment, objectives, regularizers, methods, collapse, precision.
Machinery: data, views, photometric, masks, backbones, heads, learner, schedules, optimizers, settings,
paper_runs, train, checkpoints, records.
Reading: evaluate, sweeps, figures, course, cli.
"""

__version__ = "0.1.0"
