"""Prototypes in self-supervised learning: the DINO family as compositions of a few ideas.

Ideas (pure functions): vmf, scores, assignment, objectives, regularizers, methods, collapse, precision.
Machinery: data, views, photometric, masks, backbones, heads, learner, schedules, settings, train, checkpoints, records.
Reading: evaluate, figures, course, cli.
"""

__version__ = "0.1.0"
