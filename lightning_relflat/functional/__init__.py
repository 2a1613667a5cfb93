"""Pure functions over tensors. Needs torch alone."""

from lightning_relflat.functional._second_derivatives import declare_linear
from lightning_relflat.functional.feature_laplacian import feature_laplacian
from lightning_relflat.functional.feature_robustness import (
    RobustnessEstimate,
    expected_robustness,
    feature_robustness,
    random_feature_robustness,
)
from lightning_relflat.functional.flatness_report import flatness_report
from lightning_relflat.functional.layer_flatness import layer_flatness, layer_use
from lightning_relflat.functional.layer_measures import (
    column_flatness,
    column_flatness_sums,
    hessian_trace,
    hessian_trace_sums,
    standardized_relative_flatness,
)
from lightning_relflat.functional.network_measures import fisher_rao_norm, pac_bayes_flatness, sam_sharpness
from lightning_relflat.functional.neural_collapse import center_mismatches, neural_collapse
from lightning_relflat.functional.output_hessian import OutputHessian, output_hessian
from lightning_relflat.functional.relative_flatness import (
    relative_flatness,
    relative_flatness_per_output,
    relative_flatness_sums,
)
from lightning_relflat.functional.spectrum import (
    LayerHessian,
    largest_eigenvalue,
    largest_eigenvalue_bounds,
    layer_hessian,
)

__all__ = [
    "LayerHessian",
    "OutputHessian",
    "RobustnessEstimate",
    "center_mismatches",
    "column_flatness",
    "column_flatness_sums",
    "declare_linear",
    "expected_robustness",
    "feature_laplacian",
    "feature_robustness",
    "fisher_rao_norm",
    "flatness_report",
    "hessian_trace",
    "hessian_trace_sums",
    "largest_eigenvalue",
    "largest_eigenvalue_bounds",
    "layer_flatness",
    "layer_hessian",
    "layer_use",
    "neural_collapse",
    "output_hessian",
    "pac_bayes_flatness",
    "random_feature_robustness",
    "relative_flatness",
    "relative_flatness_per_output",
    "relative_flatness_sums",
    "sam_sharpness",
    "standardized_relative_flatness",
]


def __dir__() -> list[str]:
    return sorted(__all__)
