"""Linear algebra of the surgeries: pure functions, in float64 / complex128 where they factorise."""

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-12  # of the largest eigenvalue: what is smaller counts as zero


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive semi-definite matrix (n, n), and the pseudo-inverse of that root. float64."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    positive = values > values[-1].clamp_min(0) * RANK_TOLERANCE
    root = torch.where(positive, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(positive, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT


def low_rank(moment: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up @ down @ y ≈ y`: the best rank-`rank` map when errors are measured by `metric`.

    moment (n, n) = E[y yᵀ]; metric (n, n) positive semi-definite: minimises E[(y − ŷ)ᵀ metric (y − ŷ)].
    Returns up (n, rank), down (rank, n); up @ down is the identity on the metric's range when rank ≥ n.
    Source: whitened SVD (SVD-LLM v2; CARE, arXiv 2603.17946, section 3), with a metric on the output side too.
    """
    root, inverse_root = roots(metric)
    _, vectors = torch.linalg.eigh(root @ moment @ root)
    leading = vectors.flip(-1)[:, :rank]  # eigh sorts upwards
    return inverse_root @ leading, leading.mT @ root


def complex_pca(moments: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (F, G), largest first, and eigenvectors (F, G, G) of M^½ E[z zᴴ] M^½ for each frequency.

    moments (F, G, G) complex Hermitian E[z zᴴ]; weights (F, G) the diagonal of M, not negative.
    A complex mixing of heads inside one frequency commutes with RoPE (RoRoPE of TransMLA, arXiv 2502.07864,
    section 4.2, uses real rotations; the complex ones compact no worse).
    """
    root = weights.sqrt().to(moments.dtype)
    values, vectors = torch.linalg.eigh(root[:, :, None] * moments * root[:, None, :])
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def realified(matrix: Tensor) -> Tensor:
    """A complex-linear map (a, b) as the real map (2a, 2b) on half-split vectors [real parts; imaginary parts]."""
    return torch.cat(
        (torch.cat((matrix.real, -matrix.imag), dim=-1), torch.cat((matrix.imag, matrix.real), dim=-1)),
        dim=-2,
    )


def interleaved(rows: Tensor) -> Tensor:
    """(..., 2a, b), all real parts and then all imaginary ones -> the two of each pair side by side."""
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def relative_error(output: Tensor, target: Tensor) -> float:
    """‖output − target‖² / ‖target‖² over all elements, on the output's device; 0 when both are zero."""
    expected = target.to(output.device)
    lost, whole = (output - expected).square().sum().item(), expected.square().sum().item()
    return lost / whole if whole else (0.0 if lost == 0 else float("inf"))


def balance(written: Tensor, read: Tensor) -> Tensor:
    """By what to multiply what is written, and divide what reads it, so that the weights of both are of one size.

    written, read (n,): mean squares of the weights. Weights of one size in all elements are learnt at one rate. Powers
    of two, so that nothing is rounded; 1 where either is zero.
    """
    used = (written > 0) & (read > 0)
    tiny = torch.finfo(written.dtype).tiny
    return torch.where(used, read / written.clamp_min(tiny), 1.0).log2().div(4).round().exp2()
