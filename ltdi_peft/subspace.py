"""The strongest directions of a stream of adapters, in bounded memory.

In: a repeatable stream of adapters and one `Frame` per site.  Out: per site at most `width` orthonormal
directions, strongest first (None: the identity), and the energy on them.
Idea: a full buffer is replaced by its strongest scaled singular vectors; sites whose buffers do not fit into
memory together share no pass. Nothing is centred: the span through the origin holds every linear combination
of the training adapters.
Source: METHOD.md §6; block-merge SVD after Brand 2006 (doi:10.1016/j.laa.2005.07.021).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ltdi_peft.gauge import Frame, Stream, require_spec_sites
from ltdi_peft.spec import AdapterSpec

# Snapshots carry float32 rounding of 6e-8: a direction of 1e-6 of the strongest is hardly more than rounding.
RESOLVED = 1e-6
# Buffer rows that a merge takes at least: fewer make its eigenproblems small and many.
SMALLEST_BLOCK = 64

Feed = tuple[Frame, Callable[[Float[Tensor, " dim"]], None]]
"""A site's frame, and what takes the coordinates of one adapter after the other."""


class StreamingSubspace:
    """The `width` strongest directions about the origin of a stream of vectors, in bounded memory.

    Block-merge SVD: when the buffer of keep + block rows is full, its `keep` strongest scaled right singular
    vectors replace it. Exact while the data has at most `keep` directions; `lost` is the energy dropped on
    the way. For dim ≤ width the basis is the identity (None) and only the energy is summed.
    """

    def __init__(self, dim: int, width: int) -> None:
        self.width = width
        self.keep = min(dim, width + width // 2)  # what a later block may still lift into the first `width`
        self.block = max(width, SMALLEST_BLOCK)
        self.shape = (self.keep + self.block, dim) if dim > width else (0, dim)
        # With the second place for kept rows, which a merge writes while it reads the first.
        self.bytes = 8 * dim * (self.shape[0] + self.keep) if dim > width else 0
        # Rows 0 … keep − 1, the place for their successors, and the later rows; allocated by `add`.
        self._kept, self._spare, self._fresh = torch.empty(3, 0, dim, dtype=torch.float64)
        self._filled = 0
        # σ² of the first rows, which a merge left orthogonal.
        self._squares = torch.empty(0, dtype=torch.float64)
        self.energy = self.lost = 0.0

    def add(self, x: Float[Tensor, " dim"]) -> None:
        """Take one vector (a copy)."""
        self.energy += float(x @ x)
        rows, dim = self.shape
        if rows == 0:
            return
        if self._filled == 0:
            self._kept, self._spare = torch.empty(2, self.keep, dim, dtype=torch.float64)
            self._fresh = torch.empty(self.block, dim, dtype=torch.float64)
        if self._filled == rows:
            _, lost = self._merge(self.keep)
            self.lost += lost
        if self._filled < self.keep:
            self._kept[self._filled] = x
        else:
            self._fresh[self._filled - self.keep] = x
        self._filled += 1

    def _merge(self, count: int) -> tuple[Float[Tensor, "found dim"], float]:
        """Replace the rows by at most `count` scaled right singular vectors; these, and the energy of others.

        From the Gram matrix, whose trace is the energy of all rows.
        """
        kept, fresh = self._kept[: self._filled], self._fresh[: max(0, self._filled - self.keep)]
        values, vectors, energy = self._decomposed(kept, fresh)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        found = values > RESOLVED**2 * values[0]
        self._squares, turn = values[found], vectors[:, found].mT
        rows = torch.mm(turn[:, : len(kept)], kept, out=self._spare[: len(turn)])
        rows.addmm_(turn[:, len(kept) :], fresh)
        self._kept, self._spare, self._filled = self._spare, self._kept, len(rows)
        return rows, energy - float(self._squares.sum())

    def _decomposed(
        self, kept: Float[Tensor, "kept dim"], fresh: Float[Tensor, "fresh dim"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, "row row"], float]:
        """Eigenvalues, ascending, and eigenvectors of the rows' Gram matrix, and its trace.

        Rows that a merge left are orthogonal up to the rounding of a Gram matrix, so their products are
        known; what lies above the diagonal is not read.
        """
        orthogonal, first = len(self._squares), len(kept)
        gram = kept.new_zeros(self._filled, self._filled)
        gram[:orthogonal, :orthogonal] = self._squares.diag()
        gram[orthogonal:first, :first] = kept[orthogonal:] @ kept.mT
        gram[first:, :first] = fresh @ kept.mT
        gram[first:, first:] = fresh @ fresh.mT
        return (*torch.linalg.eigh(gram, UPLO="L"), float(gram.trace()))

    def basis(self) -> tuple[float, Float[Tensor, "found dim"] | None]:
        """Energy on, and at most `width` orthonormal rows (strongest first, largest entry > 0), or None.

        Releases the buffer: call it once, after the last vector.
        """
        if self.shape[0] == 0:
            return self.energy, None
        rows, _ = self._merge(self.width)
        energy = float(self._squares.sum())
        self._kept, self._spare, self._fresh = torch.empty(3, 0, self.shape[1], dtype=torch.float64)
        # The orthogonality that a Gram matrix loses for weak rows, 1e-16·(σ_1/σ_i)². Rows of norm 1 are so
        # nearly orthogonal that Cholesky's factor does what QR does, in a sixth of its time.
        rows /= self._squares.sqrt()[:, None]
        q = torch.linalg.inv(torch.linalg.cholesky(rows @ rows.mT)) @ rows
        least, most = q.aminmax(dim=1, keepdim=True)
        return energy, q.mul_(torch.where(most >= -least, 1.0, -1.0))


def site_groups(subspaces: Sequence[StreamingSubspace], spec: AdapterSpec, budget: int) -> list[list[int]]:
    """Site numbers per pass, in order, so that the buffers of one pass fit into `budget` bytes."""
    groups, used = [[]], 0
    for number, subspace in enumerate(subspaces):
        if subspace.bytes > budget:
            raise ValueError(
                f"memory_budget is {budget} bytes, but site {spec.sites[number].name} alone needs "
                f"{subspace.bytes} at width {subspace.width}. Raise the budget or lower the width."
            )
        if used + subspace.bytes > budget:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += subspace.bytes
    return groups


def fit_bases(
    stream: Stream,
    spec: AdapterSpec,
    frames: Sequence[Frame],
    subspaces: Sequence[StreamingSubspace],
    memory_budget: int,
    bar: str | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor | None], Float[Tensor, " site"], int]:
    """(basis as `dtype`, or None for the identity, energy on it) per site, and the number of adapters.

    Makes as many passes as keep their buffers within `memory_budget` bytes. Raises ValueError for a budget
    too small for one site, and for a stream that is empty or cannot be repeated.
    """
    bases, kept, counts = [], [], set()
    for group in site_groups(subspaces, spec, memory_budget):
        counts.add(one_pass(stream, spec, [(frames[i], subspaces[i].add) for i in group], bar))
        require_same_count(counts)
        for i in group:
            energy, basis = subspaces[i].basis()
            kept.append(energy)
            bases.append(None if basis is None else basis.to(dtype))
    return bases, torch.tensor(kept, dtype=torch.float64), counts.pop()


def one_pass(stream: Stream, spec: AdapterSpec, feeds: Sequence[Feed], bar: str | None) -> int:
    """Give each feed its site's coordinates of every adapter; returns the number of adapters."""
    count = 0
    for count, adapter in enumerate(tqdm(stream(), desc=bar, unit="adapter", disable=bar is None), start=1):
        where = f"adapter {count} of the stream"
        require_spec_sites(adapter, spec, where)
        for frame, take in feeds:
            take(frame.coordinates(adapter, where))
    return count


def require_same_count(counts: set[int]) -> None:
    """Raise ValueError unless every pass, of one or more adapters, yielded the same number of them."""
    if counts == {0}:
        raise ValueError("the stream of training adapters is empty (or a used-up iterator); expected ≥ 1.")
    if len(counts) > 1:
        raise ValueError(
            f"the stream yielded {sorted(counts)} adapters in different passes. It is called once per pass "
            f"and must yield the same adapters: pass e.g. `lambda: iter(adapters)`, not one iterator."
        )
