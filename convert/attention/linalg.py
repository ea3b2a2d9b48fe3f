"""Linear algebra of the surgeries: pure functions. Factorisations are made in float64 or complex128."""

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-12  # eigenvalues below this share of the largest count as zero


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive semi-definite matrix (n, n), and the pseudo-inverse of the root. float64."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    positive = values > values[-1].clamp_min(0) * RANK_TOLERANCE
    root = torch.where(positive, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(positive, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT


def low_rank(moment: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the rank-`rank` map ŷ = up @ down @ y that minimises E[(y − ŷ)ᵀ metric (y − ŷ)].

    Args:
        moment: (n, n) = E[y yᵀ].
        metric: (n, n), positive semi-definite.

    Returns:
        up (n, rank) and down (rank, n); up @ down is the identity on the metric's range when rank ≥ n.

    Source:
        Whitened SVD (SVD-LLM v2; CARE, arXiv 2603.17946, section 3), here with a metric on the output side too.
    """
    root, inverse_root = roots(metric)
    _, vectors = torch.linalg.eigh(root @ moment @ root)
    leading = vectors.flip(-1)[:, :rank]  # eigh sorts in ascending order
    return inverse_root @ leading, leading.mT @ root


def complex_pca(moments: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (F, G), largest first, and eigenvectors (F, G, G) of M^½ E[z zᴴ] M^½ for each frequency.

    A complex mixing of heads within one frequency commutes with RoPE.

    Args:
        moments: (F, G, G) = E[z zᴴ], complex Hermitian.
        weights: (F, G), the diagonal of M, not negative.

    Source:
        RoRoPE of TransMLA, arXiv 2502.07864, section 4.2, with real rotations; complex ones compact at least as well.
    """
    root = weights.sqrt().to(moments.dtype)
    values, vectors = torch.linalg.eigh(root[:, :, None] * moments * root[:, None, :])
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def realified(matrix: Tensor) -> Tensor:
    """The complex matrix (a, b) as the real matrix (2a, 2b) that acts on vectors [real parts; imaginary parts]."""
    return torch.cat(
        (torch.cat((matrix.real, -matrix.imag), dim=-1), torch.cat((matrix.imag, matrix.real), dim=-1)),
        dim=-2,
    )


def spreading_rotation(size: int) -> Tensor:
    """An orthogonal matrix (size, size), float64, whose entries are about equally large: a Hadamard matrix, as far as
    `size` is a power of two, times a discrete cosine transform.

    Elements of very different variance come out of it with nearly one variance, and outliers are divided among all.
    Rounded with one step, balanced elements (`balance`) then lose least.

    Source: QuaRot, arXiv 2404.00456, section 3, which turns keys and values so before rounding them.
    """
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), hadamard) / 2**0.5
    rest = torch.arange(size // power, dtype=torch.float64)
    cosine = torch.cos(torch.pi / len(rest) * torch.outer(rest, rest + 0.5)) * (2 / len(rest)) ** 0.5
    cosine[0] /= 2**0.5
    return torch.kron(hadamard, cosine)


def interleaved(rows: Tensor) -> Tensor:
    """Rows (..., 2a, b) from half-split order r0 r1 … i0 i1 … to interleaved order r0 i0 r1 i1 …"""
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def relative_error(output: Tensor, target: Tensor) -> float:
    """‖output − target‖² / ‖target‖² over all elements, on the output's device; 0 when both are zero."""
    expected = target.to(output.device)
    error, energy = (output - expected).square().sum().item(), expected.square().sum().item()
    return error / energy if energy else (0.0 if error == 0 else float("inf"))


def balance(written: Tensor, read: Tensor) -> Tensor:
    """(n,), factors that give the weights that write and those that read a hidden element the same magnitude.

    The weights that write element i are multiplied by the factor and those that read it divided by it, which changes no
    output. Weights of the same magnitude learn at the same rate. The factors are powers of two, so that nothing is
    rounded, and 1 where either mean square is zero.

    Args:
        written, read: (n,), the mean squares of these weights.
    """
    used = (written > 0) & (read > 0)
    tiny = torch.finfo(written.dtype).tiny
    return torch.where(used, read / written.clamp_min(tiny), 1.0).log2().div(4).round().exp2()
