"""Softmax heads with very many outputs: κ's trace in tiles, so that no second array of the outputs' size is kept.

The one door: from a head's outputs :func:`softmax_trace`, from what enters a head whose outputs were never there
:func:`traces_of_features` and, to be differentiated, :func:`weighted_trace_of_features`; and :func:`is_large`
and :func:`is_head_of_many`, for who would otherwise make further arrays of that size.
"""

from lightning_relflat.functional.large_head._from_features import traces_of_features, weighted_trace_of_features
from lightning_relflat.functional.large_head._from_outputs import is_head_of_many, is_large, softmax_trace

__all__ = ["is_head_of_many", "is_large", "softmax_trace", "traces_of_features", "weighted_trace_of_features"]
