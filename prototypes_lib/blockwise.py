"""A batch's scores against many prototypes, a block of rows at a time, never as a whole matrix.

With K = 65536 prototypes the scores of a batch are gigabytes, and everything asked of them is a sum over a row or a
column. Each score of the family is affine in the code, L_bk = <a_k, y_b> + b_k (`scores.affine`), so a block is made
where it is needed, used and forgotten. For the cross-entropy of all pairs of views

    sum_{t != s} CE(q_t, p_s) = n_s logsumexp_k L_sk - <y_s, sum_t A^T q_t> - sum_t <b, q_t>

the targets enter only by their barycentres A^T q_t, vectors as long as a code: no product of two views' K numbers is
formed. Gradients are made in the same pass as the value, while the block is there.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prototypes_lib import ranks
from prototypes_lib.precision import wide, without_autocast

_NEVER = -1e30  # a score that stands for -inf where a whole tile may be so: a probability of zero, and no nan
BLOCK = {"cpu": 2**24, "cuda": 2**27}  # numbers in a block: 64 MB, on a GPU 512 MB


@dataclass(frozen=True)
class LogScores:
    """L = codes slopes^T + offsets (+ rows, a number for each code); with slopes=None, codes is the matrix L itself.

    Sums over samples are over those of all ranks. block: largest number of entries made at a time.
    """

    codes: Float[Tensor, "n d"]
    slopes: Float[Tensor, "k d"] | None = None
    offsets: Float[Tensor, " k"] | None = None
    rows: Float[Tensor, " n"] | None = None
    block: int | None = None

    @property
    def k(self) -> int:
        return self.codes.shape[1] if self.slopes is None else self.slopes.shape[0]

    def __len__(self) -> int:
        return len(self.codes)

    def but(self, **changes) -> "LogScores":
        return dataclasses.replace(self, **changes)

    def plus(self, columns: Float[Tensor, " k"]) -> "LogScores":
        """L with a number added for each prototype."""
        return self.but(offsets=columns if self.offsets is None else self.offsets + columns)

    def only(self, which: slice | Int[Tensor, " m"] | Tensor) -> "LogScores":
        """The rows of some codes."""
        return self.but(codes=self.codes[which], rows=None if self.rows is None else self.rows[which])

    def spans(self) -> list[slice]:
        """Which rows make a block each."""
        entries = self.block or BLOCK.get(self.codes.device.type, BLOCK["cpu"])
        step = max(1, entries // max(self.k, 1))
        return [slice(i, min(i + step, len(self))) for i in range(0, len(self), step)]

    def make(self, span: slice, out: Tensor | None = None) -> Float[Tensor, "m k"]:
        """L of these rows, fresh: to be changed in place."""
        codes = self.codes[span]
        if self.slopes is None:
            block = codes.clone()
            block = block if self.offsets is None else block.add_(self.offsets)
        else:
            out = None if out is None else out[: len(codes)]
            with torch.autocast(codes.device.type, enabled=False):
                if self.offsets is None:
                    block = torch.mm(codes, self.slopes.T, out=out)
                else:
                    block = torch.addmm(self.offsets, codes, self.slopes.T, out=out)
        return block if self.rows is None else block.add_(self.rows[span, None])

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "m k"]]]:
        """All blocks one after the other, in one piece of memory: each is gone with the next."""
        spans, out = self.spans(), None
        for span in spans:
            block = self.make(span, out)
            out = block if len(spans) > 1 and self.slopes is not None and out is None else out
            yield span, block

    def matrix(self) -> Float[Tensor, "n k"]:
        """All of L."""
        return self.make(slice(None))

    @torch.no_grad()
    def sweep(self, normalize: bool) -> tuple["LogScores", Float[Tensor, " k"]]:
        """L, where `normalize` with every row's exp summing to one, and log sum_b exp L_bk over all samples."""
        rows, columns = [], None
        for span, block in self.blocks():
            if normalize:
                rows.append(-_softmax_(block))
                sums = block.sum(dim=0)
                if block.device.type == "cpu" and sums.amin() > 1e-30:  # else below what float32 can hold
                    here = sums.log_()
                else:
                    here = torch.logsumexp(self.make(span).add_(rows[-1][:, None]), dim=0)
            else:
                here = torch.logsumexp(block, dim=0)
            columns = here if columns is None else torch.logaddexp(columns, here)
        if columns is None:  # no row on this rank
            columns = self.codes.new_full((self.k,), -torch.inf)
        if not normalize:
            return self, ranks.log_total(columns)
        found = torch.cat(rows) if rows else self.codes.new_zeros(0)
        return self.but(rows=found if self.rows is None else self.rows + found), ranks.log_total(columns)

    @torch.no_grad()
    def normalized(self) -> "LogScores":
        """log softmax over the prototypes."""
        rows = [-_softmax_(block) for _, block in self.blocks()]
        rows = torch.cat(rows) if rows else self.codes.new_zeros(0)
        return self.but(rows=rows if self.rows is None else self.rows + rows)

    def size(self) -> Float[Tensor, ""]:
        """How many samples there are on all ranks: a tensor, because reading it would make a GPU wait."""
        return ranks.total(torch.full((), float(len(self)), dtype=torch.float64, device=self.codes.device))

    @torch.no_grad()
    def means(self) -> Float[Tensor, " k"]:
        """mean_b L_bk over all samples: one score, of the mean code."""
        n = self.size().clamp_min(1)
        mean = ranks.total(self.codes.sum(0)) / n
        if self.slopes is not None:
            with torch.autocast(mean.device.type, enabled=False):
                mean = self.slopes @ mean
        mean = mean if self.offsets is None else mean + self.offsets
        return mean if self.rows is None else mean + ranks.total(self.rows.sum()) / n


@torch.no_grad()
def entropies(targets: Sequence[LogScores]) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, " k"]]:
    """Of the distributions softmax(L): the mean of their entropies, the entropy of their mean (nats), and this mean."""
    n = sum(scores.size() for scores in targets).clamp_min(1)
    own, usage = 0.0, 0.0
    for scores in targets:
        for _, block in scores.blocks():
            log_p = torch.log_softmax(block, dim=1)
            p = log_p.exp()
            own = own - (p * torch.where(p > 0, log_p, 0.0)).sum()
            usage = usage + p.sum(0)
    usage = ranks.total(usage) / n
    log_usage = torch.log(usage.clamp_min(torch.finfo(usage.dtype).tiny))
    return (ranks.total(own) / n).to(usage), -(usage * log_usage).sum(), usage


@torch.no_grad()
def largest(scores: LogScores) -> Float[Tensor, ""]:
    """max |L_bk| over the samples of all ranks, 0 without any."""
    found = [torch.linalg.vector_norm(block, torch.inf) for _, block in scores.blocks()]
    return ranks.largest(torch.stack(found).amax() if found else scores.codes.new_zeros(()))


def _softmax_(x: Tensor) -> Tensor:
    """Turn log-scores into probabilities along the last dimension, in place; gives the logarithms of the sums."""
    largest = x.amax(dim=-1)
    torch.softmax(x, dim=-1, out=x)
    return largest - x.amax(dim=-1).log()


class _CrossEntropy(torch.autograd.Function):
    """sum_i w_i logsumexp_k L_ik - sum_j (<toward_j, A^T q_j> + v_j <b, q_j>), its gradients made on the way."""

    @staticmethod
    def forward(ctx, codes, weight, toward, toward_weight, slopes, offsets, targets, block):
        wanted = any(ctx.needs_input_grad)
        if offsets is not None:  # the largest cancels, and large numbers would cost digits
            offsets = (offsets - offsets.max()).clamp_min(_NEVER)
        sums = _Sums(slopes, offsets, wanted)
        loss = codes.new_zeros((), dtype=torch.float64)
        d_codes, d_toward = torch.zeros_like(codes), torch.zeros_like(toward)
        for span, p in sums.softmaxes([LogScores(codes, slopes, offsets)], block):
            w = weight[span]
            loss += (w * p.log_sum).sum(dtype=torch.float64)
            if wanted:
                torch.mul(sums.barycentres(p), w[:, None], out=d_codes[span])
                sums.add(p, w[:, None] * codes[span], w)
        for span, q in sums.softmaxes(targets, block):
            v, y, barycentres = toward_weight[span], toward[span], sums.barycentres(q)
            loss -= (y * barycentres).sum(dtype=torch.float64)
            torch.neg(barycentres, out=d_toward[span])
            if offsets is not None:
                loss -= (v * sums.means(q)).sum(dtype=torch.float64)
            if wanted:
                sums.add(q, -y, -v)
        d_slopes, d_offsets = sums.gradients()
        ctx.save_for_backward(d_codes, d_toward, *(d for d in (d_slopes, d_offsets) if d is not None))
        return loss.to(codes.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_codes, d_toward, *rest = (grad * d for d in ctx.saved_tensors)
        d_slopes, d_offsets = (*rest, None, None)[:2]
        return d_codes, None, d_toward, None, d_slopes, d_offsets, None, None


class _Softmax(NamedTuple):
    """A block of probabilities in tiles (tile, row, prototype): p = tiles * share, each tile's rows summing to one."""

    tiles: Tensor
    share: Tensor  # (tile, row): of each tile in a row's sum
    log_sum: Tensor  # (row)


class _Sums:
    """Products of blocks of probabilities with slopes and offsets, and the gradients these add up to.

    Prototypes come in tiles that fit a processor's cache, where its products are half as fast again; a GPU has one.
    """

    def __init__(self, slopes: Tensor, offsets: Tensor | None, wanted: bool):
        k = len(slopes)
        sizes = [size for size in range(1024, 4097) if k % size == 0] if slopes.device.type == "cpu" else []
        self.n = k // sizes[len(sizes) // 2] if sizes else 1
        self.slopes = slopes.unflatten(0, (self.n, -1))
        self.offsets = None if offsets is None else offsets.view(self.n, -1, 1)
        self.d_slopes = torch.empty_like(self.slopes) if wanted else None
        self.d_offsets = torch.zeros_like(self.offsets) if wanted and offsets is not None else None
        self._beta = 0.0  # the first product fills the memory, the others add to it

    def softmaxes(self, targets: Sequence[LogScores], block: int | None) -> Iterator[tuple[slice, _Softmax]]:
        """Of the scores of all, a block at a time, with its place among all rows; a block is gone with the next."""
        start, memory = 0, None
        for scores in targets:
            scores = scores.but(block=block, rows=None)  # which the softmax does not see
            for span in scores.spans():
                rows = span.stop - span.start
                if memory is None or memory.shape[1] < rows or scores.slopes is None:
                    memory = scores.codes.new_empty(self.n, rows, scores.k // self.n)
                yield slice(start + span.start, start + span.stop), self._softmax(scores, span, memory[:, :rows])
            start += len(scores)

    def _softmax(self, scores: LogScores, span: slice, memory: Tensor) -> _Softmax:
        if scores.slopes is None:
            memory.copy_(scores.make(span).clamp_min_(_NEVER).unflatten(1, (self.n, -1)).transpose(0, 1))
        else:
            codes = scores.codes[span].expand(self.n, -1, -1)
            torch.bmm(codes, scores.slopes.unflatten(0, (self.n, -1)).mT, out=memory)
            if scores.offsets is not None:
                memory += scores.offsets.clamp_min(_NEVER).view(self.n, 1, -1)
        log_sums = _softmax_(memory)
        log_sum = torch.logsumexp(log_sums, dim=0)
        return _Softmax(memory, (log_sums - log_sum).exp(), log_sum)

    def barycentres(self, p: _Softmax) -> Tensor:
        """A^T p of each row."""
        return (torch.bmm(p.tiles, self.slopes) * p.share[..., None]).sum(0)

    def means(self, p: _Softmax) -> Tensor:
        """<b, p> of each row."""
        return (torch.bmm(p.tiles, self.offsets)[..., 0] * p.share).sum(0)

    def add(self, p: _Softmax, codes: Tensor, weight: Tensor) -> None:
        """To the gradients: sum_i p_ik codes_i, of slopes, and sum_i p_ik weight_i, of offsets."""
        self.d_slopes.baddbmm_(p.tiles.mT, p.share[..., None] * codes, beta=self._beta)
        self._beta = 1.0
        if self.d_offsets is not None:
            self.d_offsets.baddbmm_(p.tiles.mT, (p.share * weight)[..., None])

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of slopes and of offsets, where they were wanted."""
        if self.d_slopes is not None and not self._beta:  # there was no row
            self.d_slopes.zero_()
        offsets = None if self.d_offsets is None else self.d_offsets.flatten()
        return None if self.d_slopes is None else self.d_slopes.flatten(0, 1), offsets


@without_autocast
def cross_entropy(
    codes: Float[Tensor, "n d"],
    weight: Float[Tensor, " n"],
    toward: Float[Tensor, "m d"],
    toward_weight: Float[Tensor, " m"],
    slopes: Float[Tensor, "k d"],
    offsets: Float[Tensor, " k"] | None,
    targets: Sequence[LogScores],
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Weighted cross-entropy of softmax(targets) and the students' predictions, by the barycentre identity.

    Pair (j, i) of a target and a prediction has a weight omega_ji. Of them the function needs, for each prediction,
    weight_i = sum_j omega_ji, and for each target toward_j = sum_i omega_ji codes_i and
    toward_weight_j = sum_i omega_ji; both weights have the same sum. Gradients reach codes, toward, slopes
    and offsets, once (no second derivative).
    """
    codes, toward, slopes = wide(codes), wide(toward), wide(slopes)
    offsets = None if offsets is None else wide(offsets)
    return _CrossEntropy.apply(
        codes, weight.to(codes), toward, toward_weight.to(codes), slopes, offsets, targets, block
    )


def cross_entropy_of_views(
    student: Float[Tensor, "views batch d"],
    slopes: Float[Tensor, "k d"],
    offsets: Float[Tensor, " k"] | None,
    targets: Sequence[LogScores],
    first: int = 0,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Mean of CE(target of view q, prediction from view v) over all pairs q != v, as `objectives.over_views`.

    targets: of the teacher's views in order, rows [view 0 of all images, view 1 of all images, ...], in one piece or
    several; the student's views begin with view `first`. Raises ValueError without any pair.
    """
    n_student, batch, dim = student.shape
    rows = sum(map(len, targets))
    if rows % max(batch, 1):
        raise ValueError(f"{rows} targets are no whole number of views of {batch} images")
    n_targets = rows // max(batch, 1)
    shared = max(0, min(n_targets - first, n_student))  # views that have a target and a prediction
    pairs = n_student * n_targets - shared
    if pairs <= 0:
        raise ValueError("one view has nothing to agree with; use two global views or a local one")
    toward = student.sum(0).expand(n_targets, batch, dim)
    if shared:
        own = torch.zeros_like(toward)
        own[first : first + shared] = student[:shared]
        toward = toward - own
    others = student.new_full((n_student,), float(n_targets))
    others[:shared] -= 1
    predictions = student.new_full((n_targets,), float(n_student))
    predictions[first : first + shared] -= 1
    share = 1 / (pairs * batch)
    return cross_entropy(
        student.flatten(0, 1), share * others.repeat_interleave(batch), share * toward.flatten(0, 1),
        share * predictions.repeat_interleave(batch), slopes, offsets, targets, block,
    )  # fmt: skip
