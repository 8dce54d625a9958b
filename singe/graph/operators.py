"""The vocabulary of ATen operators, by what they do to channels."""

from __future__ import annotations

import torch

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)

# run on the owners as they are
MOVES = {
    aten.permute, aten.transpose, aten.t, aten.movedim, aten.squeeze, aten.unsqueeze, aten.slice, aten.select,
    aten.narrow, aten.index_select, aten.expand, aten.repeat, aten.unbind, aten.flip, aten.roll, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten,
    aten.tile, aten.repeat_interleave, aten.unfold, aten.diagonal,
}  # fmt: skip
VIEWS = {aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten}
# leave every element in place
IDENTITIES = {
    aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy, aten.dropout, aten.feature_dropout,
    aten.alpha_dropout, aten._to_copy, aten.to, aten.type_as, aten.hardswish, aten.hardsigmoid, aten.zeros_like,
    aten.ones_like, aten.full_like, aten.native_dropout, aten.rand_like, aten.randn_like, aten.bernoulli,
}  # fmt: skip
# combine elements of one channel over trailing axes; the value is the number of those axes
POOLS = {
    aten.max_pool1d: 1, aten.max_pool2d: 2, aten.max_pool3d: 3, aten.avg_pool1d: 1, aten.avg_pool2d: 2,
    aten.avg_pool3d: 3, aten.adaptive_avg_pool1d: 1, aten.adaptive_avg_pool2d: 2, aten.adaptive_avg_pool3d: 3,
    aten._adaptive_avg_pool2d: 2, aten._adaptive_avg_pool3d: 3, aten.max_pool2d_with_indices: 2,
    aten.max_pool3d_with_indices: 3, aten.adaptive_max_pool1d: 1, aten.adaptive_max_pool2d: 2,
    aten.adaptive_max_pool3d: 3, aten.upsample_nearest1d: 1, aten.upsample_nearest2d: 2, aten.upsample_nearest3d: 3,
    aten._upsample_nearest_exact1d: 1, aten._upsample_nearest_exact2d: 2, aten._upsample_nearest_exact3d: 3,
    aten.upsample_linear1d: 1, aten.upsample_bilinear2d: 2, aten.upsample_bicubic2d: 2, aten.upsample_trilinear3d: 3,
    aten._upsample_bilinear2d_aa: 2, aten._upsample_bicubic2d_aa: 2,
}  # fmt: skip
SPLITS = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split}
PADS = {aten.pad, aten.constant_pad_nd}
WRITES = {aten.slice_scatter, aten.select_scatter}
CONSTANTS = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.arange, aten.scalar_tensor, aten.new_zeros, aten.new_ones,
    aten.new_full, aten.new_empty, aten.linspace, aten.eye, aten.fill, aten.rand, aten.randn,
}  # fmt: skip
# in a sum, a removed element is a term of zero; in the others it is not
SUMS = {aten.sum, aten.linalg_vector_norm}
REDUCTIONS = {
    *SUMS, aten.norm, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean,
    aten.prod, aten.logsumexp, aten.argmax, aten.argmin,
}  # fmt: skip
# have as many outputs as inputs, each computed from all elements along one axis
ALONG_AXIS = {aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum, aten.cumprod}
