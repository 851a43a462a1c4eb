"""The head's kernels under the names that `plans.Kernels` gives them."""

from g2rl_kernels.backends.triton.grad_logits import grad_logits
from g2rl_kernels.backends.triton.kept import add_kept
from g2rl_kernels.backends.triton.merge import merge
from g2rl_kernels.backends.triton.projection import project, projection_bytes
from g2rl_kernels.backends.triton.residuals import residuals, residuals_and_statistics
from g2rl_kernels.backends.triton.residuals import statistics_bytes as residual_statistics_bytes
from g2rl_kernels.backends.triton.responses import inverse_and_flags, inverse_weights
from g2rl_kernels.backends.triton.statistics import kept_bytes, room_for_kept, statistics, statistics_bytes
from g2rl_kernels.backends.triton.targets import add_targets

log_unit = 1.0
