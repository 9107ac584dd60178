"""Prototypes in self-supervised learning: the DINO family as compositions of a few ideas.

Ideas (pure functions): vmf, scores, assignment, objectives, regularizers, methods, collapse.
Machinery: data, views, backbones, heads, learner, train, checkpoints.
Reading: evaluate, figures, course, cli.
"""

__version__ = "0.1.0"
