"""Products that sum over an axis of two activations (matmul, attention, einsum), on owners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mirrors import NOBODY, representative, varies
from .owners import Owners


@dataclass(frozen=True)
class Product:
    """out[batch..., rows..., columns...] = sum over ``summed`` of a[batch, rows, summed] * b[batch, summed, columns].

    Every letter names an axis, as in ``torch.einsum``.
    """

    a: str
    b: str
    out: str

    @classmethod
    def parsed(cls, equation: str) -> Product | None:
        """The product that an einsum of two operands computes, or None where it is something else."""
        left, arrow, out = equation.replace(" ", "").partition("->")
        a, comma, b = left.partition(",")
        known = arrow and comma and "," not in b and (a + b + out).isalpha()
        plain = all(len(set(letters)) == len(letters) for letters in (a, b, out))
        if not (known and plain and set(out) <= set(a + b) and set(a) ^ set(b) <= set(out)):
            return None
        return cls(a, b, out)

    @property
    def batch(self) -> str:
        """Axes that appear in all three."""
        return "".join(c for c in self.out if c in self.a and c in self.b)

    @property
    def summed(self) -> str:
        """Axes of both operands that the sum runs over."""
        return "".join(c for c in self.a if c in self.b and c not in self.out)


def matmul(rank: int) -> Product:
    """The product of stacks of matrices, of ``rank`` axes each."""
    batch = "abcdefgh"[: rank - 2]
    return Product(f"{batch}nk", f"{batch}km", f"{batch}nm")


def contract(owners: Owners, product: Product, a: Tensor, b: Tensor, reason: str) -> Tensor:
    """The owners of a product; a neuron may be a term of the sum, a slice of the batch, a row or a column.

    Args:
        owners: unites and freezes neurons as needed.
        product: the product.
        a: owners of one operand, sizes 1 broadcast.
        b: of the other.
        reason: why neurons that the result does not keep apart cannot be removed.
    """
    of_a, of_b = product.a, product.b
    # an operand's owners once its own axes are merged
    a_terms, b_terms = (_kept(x, letters, product.batch + product.summed) for x, letters in ((a, of_a), (b, of_b)))
    if product.summed and any(
        varies(t, t.dim() - 1 - i) for t in (a_terms, b_terms) for i in range(len(product.summed))
    ):
        _sum(owners, a_terms, b_terms, reason)
    # a slice of the batch is a neuron of the result where it is one of an operand, such as an attention head
    along = [any(varies(t, i) for t in (a_terms, b_terms)) for i in range(len(product.batch))]
    sizes = {c: max(a.shape[of_a.index(c)], b.shape[of_b.index(c)]) for c in product.batch}
    slices = [sizes[c] if vary else 1 for c, vary in zip(product.batch, along, strict=True)]
    slices += [1] * len(product.summed)
    carriers = owners.issue(slices) if any(along) else torch.full(slices, NOBODY)
    for axis in range(len(product.batch)):
        owners.match((carriers, a_terms, b_terms), axis)
    return _result(owners, product, a, b, carriers, reason)


def _sum(owners: Owners, a: Tensor, b: Tensor, reason: str) -> None:
    """Terms are removed in pairs; one whose partner has no owner stays."""
    owners.unite(*(x.expand([max(s) for s in zip(a.shape, b.shape, strict=True)]) for x in (a, b)))
    owners.contract(a)
    owners.contract(b)
    for one, other in ((a, b), (b, a)):
        if not (other != NOBODY).all():
            owners.freeze(one, reason)


def _result(owners: Owners, product: Product, a: Tensor, b: Tensor, carriers: Tensor, reason: str) -> Tensor:
    shape = [max(x.shape[of.index(c)] for x, of in ((a, product.a), (b, product.b)) if c in of) for c in product.out]
    both = [_kept(x, of, product.out) for x, of in ((a, product.a), (b, product.b))]
    own = [any(varies(x, i) for i, c in enumerate(product.out) if c not in product.batch) for x in both]
    if all(own):
        owners.freeze(a, reason)
        owners.freeze(b, reason)
    if own[0] != own[1]:
        return both[own.index(True)].expand(shape)
    return _kept(carriers, product.batch + product.summed, product.out).expand(shape)


def _kept(owners: Tensor, letters: str, keep: str) -> Tensor:
    """One owner for each index of the axes in ``keep``, in that order; size 1 where the tensor has no such axis."""
    owners = representative(owners, [i for i, c in enumerate(letters) if c not in keep])
    order = [letters.index(c) for c in keep if c in letters]
    order += [i for i in range(len(letters)) if i not in order]
    moved = owners.permute(order)
    moved = moved.reshape(moved.shape[: sum(c in letters for c in keep)])
    for i, c in enumerate(keep):
        if c not in letters:
            moved = moved.unsqueeze(i)
    return moved
