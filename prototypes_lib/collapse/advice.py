"""For each kind of finding the usual causes, most frequent first, and what to try against each.

From the papers, the official code's recommendations, and what users of DINO, iBOT, DINOv2, MSN and SwAV report.
"""

ADVICE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "uniform": (
        (
            "the teacher's temperature is near or above the student's (0.1): only sharper targets leave 1/K.",
            "the learning rate is too high (all codes run into one direction), or still near 0 in its warm-up.",
            "K is large for the data or the batch: every rate of leaving the plateau carries 1/K.",
            "prototypes with free norms (norm_last_layer=False) shrank to nothing, by weight decay for instance.",
            "the prototypes became copies of each other: see M.",
            "float16 lost small gradients or the targets' digits.",
        ),
        (
            "teacher temperature 0.04, warmed up to 0.07 at most, with 0.1 for the student.",
            "a learning rate several times lower, with a longer warm-up, and gradients clipped at 3 or less.",
            "fewer prototypes (out_dim 4096 or less for small data) and larger batches; where batches must be small, a "
            "center momentum of 0.99 in place of 0.9, and an EMA of 0.9995 or more.",
            "norm_last_layer=True, and the last layer frozen for the first epoch or longer (freeze_last_layer).",
            "float32 or bfloat16 for the head and the loss.",
        ),
    ),
    "one-hot": (
        (
            "the scores are not centered: the center is missing, never updated, a scalar (the mean over both "
            "dimensions), or subtracted from the student, too.",
            "the teacher's temperature is too low for prototypes this long (free norms, vMF: kappa = |w| / tau).",
            "the center cannot follow: its momentum is too high for how fast the teacher moves.",
            "batches are too small for their mean to be one.",
        ),
        (
            "check that the center changes from step to step and has K different entries, kept in a buffer.",
            "probability centering or Sinkhorn-Knopp in place of a logit center; a mean-entropy term.",
            "a higher teacher temperature at the start, a lower learning rate, an EMA momentum nearer to 1.",
        ),
    ),
    "constant": (
        (
            "the teacher sees the same whatever the image: a blank input (integer division of pixels), wrong "
            "normalization, a dead activation.",
            "the center is never updated, and no longer fits the scores.",
            "teacher and student temperatures are so close that differences between images die out.",
            "nothing holds the codes apart (no prototypes: the coding rate's weight is 0, or its sign is wrong).",
        ),
        (
            "look at the teacher's input, then at its features, for two different images: where do they become equal?",
            "check that the center changes from step to step; put Sinkhorn-Knopp in its place.",
            "a lower teacher temperature (0.04) with 0.1 for the student; without prototypes, more coding rate.",
        ),
    ),
    "partial": (
        (
            "prototypes learn much faster than the codes, which move together to where the data are.",
            "K is far above the number of groups that the codes form and of samples in a batch.",
            "the bottleneck has few dimensions, or free norms let a few prototypes win all data.",
        ),
        (
            "KoLeo-proto, weight 0.1, which spreads the prototypes.",
            "the backbone's learning rate for the prototypes, or less; freeze them for the first epoch.",
            "fewer prototypes: copies cost memory and teach nothing.",
        ),
    ),
    "void": (
        (
            "prototypes that no image chooses are pushed away from the mean code, all to the same place.",
            "the codes lie in a cone (their mean is long): not centered, or nothing spreads them.",
            "the prototypes' learning rate is high.",
        ),
        (
            "probability centering or Sinkhorn-Knopp, which give every prototype its share of the data.",
            "KoLeo-proto, which keeps prototypes apart; a lower learning rate for the prototypes; fewer of them.",
        ),
    ),
    "dead-teacher": (
        (
            "the EMA update is never called, is called with momentum 1, or updates another copy of the model.",
            "the teacher is in float16 or bfloat16: steps of (1 - m) times the difference are rounded away.",
            "a compiled or wrapped student (DDP, torch.compile) whose parameters are not those averaged.",
        ),
        (
            "call the update after each optimizer step: teacher = m * teacher + (1 - m) * student, m = 0.996 (0.9995 "
            "for small batches), growing to 1 only at the end; keep the teacher's weights in float32.",
            "if the teacher is meant to be fixed (distillation), leave it out of the meter.",
        ),
    ),
    "shared-memory": (
        (
            "teacher = student, or teacher.head = student.head: an assignment, where a copy was meant.",
            "p_teacher.data = p_student.data, or load_state_dict(..., assign=True): both hold the same tensors.",
        ),
        (
            "teacher = copy.deepcopy(student), or a second model and load_state_dict; then requires_grad_(False), and "
            "update it in place.",
            "if the method has no EMA teacher (SwAV), leave it out of the meter.",
        ),
    ),
    "diverging": (
        (
            "the learning rate is too high, or its schedule grows where it should fall (wrong factor, wrong unit).",
            "gradients are not clipped; free norms of the prototypes (norm_last_layer=False) grow with the scores.",
            "a term of the loss without a lower bound, or with the wrong sign.",
        ),
        (
            "stop, go back to a checkpoint before the growth, lower the learning rate tenfold, clip gradients at 3.",
            "plot the learning rate against the step; scale it with the batch: 5e-4 * batch / 256 for AdamW.",
            "norm_last_layer=True; normalize the codes; float32 or bfloat16 in place of float16.",
        ),
    ),
    "non-finite": (
        (
            "float16 overflowed (above 65504) in the head, the loss or the attention.",
            "exp(score / temperature) without subtracting the maximum (Sinkhorn-Knopp in the exp domain), log 0, or a "
            "division by the length of a zero vector.",
            "the learning rate is too high; KoLeo met two identical vectors.",
        ),
        (
            "go back to a checkpoint before it; float32 for head and loss, or bfloat16 in place of float16.",
            "log-domain Sinkhorn-Knopp and log_softmax; an eps under every square root, logarithm and division.",
            "a lower learning rate, gradients clipped at 3 or less, steps with gradients that are not finite skipped.",
        ),
    ),
}
