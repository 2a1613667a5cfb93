"""The spectrum of a linear layer's Hessian, without that matrix: an operator, Lanczos iteration, and sketches."""

from lightning_relflat.functional.spectrum.eigenvalues import (
    KEPT,
    batch_bounds,
    bounds_from_samples,
    largest_eigenvalue,
    largest_eigenvalue_bounds,
)
from lightning_relflat.functional.spectrum.lanczos import Bounds
from lightning_relflat.functional.spectrum.operator import (
    LayerHessian,
    has_blocks,
    hessian_of_samples,
    layer_hessian,
    samples_of,
)
from lightning_relflat.functional.spectrum.sketches import (
    bounds_from_sketch,
    count_columns,
    sketch,
    sketch_columns,
)

__all__ = [
    "KEPT",
    "Bounds",
    "LayerHessian",
    "batch_bounds",
    "bounds_from_samples",
    "bounds_from_sketch",
    "count_columns",
    "has_blocks",
    "hessian_of_samples",
    "largest_eigenvalue",
    "largest_eigenvalue_bounds",
    "layer_hessian",
    "samples_of",
    "sketch",
    "sketch_columns",
]
