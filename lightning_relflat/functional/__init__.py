"""Pure functions over tensors. Needs torch alone."""

from lightning_relflat.functional.feature_laplacian import feature_laplacian, layer_laplacian
from lightning_relflat.functional.output_hessian import OutputHessian, output_hessian
from lightning_relflat.functional.relative_flatness import (
    relative_flatness,
    relative_flatness_per_output,
    relative_flatness_sums,
)

__all__ = [
    "OutputHessian",
    "feature_laplacian",
    "layer_laplacian",
    "output_hessian",
    "relative_flatness",
    "relative_flatness_per_output",
    "relative_flatness_sums",
]
