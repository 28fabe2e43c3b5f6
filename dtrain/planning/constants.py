"""The plan's measured constants, with where each comes from; everything else is arithmetic.

`tests/bench/plan_points.py FOLDER` fits them anew from published figures (101 peaks of memory, 48
speeds), each source in turn left out; tests/bench/LOG.md has the errors.
"""

from __future__ import annotations

# Memory that is no tensor. An allocator holds more than it gives out, in proportion; libraries,
# kernels and communication need room of their own. The budget covers all of 66 published peaks;
# factors that cover all rows of the other sources, 1.18 to 1.19, cover 65.
LOWER_FACTOR, LOWER_BYTES = 1.0, 0.5e9  # least that a CUDA context takes
BUDGET_FACTOR, BUDGET_BYTES = 1.20, 2.5e9

# Share of the arithmetic of a data sheet that a training step reaches: lowest published, median,
# highest sixth of NVIDIA's, MosaicML's, torchtune's, Qwen's and Answer.AI's figures (34 rows).
UTILIZATION = {
    "a100": (0.39, 0.56, 0.64),
    "h100": (0.33, 0.44, 0.52),
    "rtx4090": (0.55, 0.66, 0.86),
    "rtx3090": (0.51, 0.60, 0.68),
}
UTILIZATION_ELSEWHERE = (0.33, 0.56, 0.70)

# NF4 to 16 bits, for each element and pass: bytes of memory bandwidth that it costs.
DEQUANTIZE_BYTES = 8.0
# Share of a link's bandwidth in the slowest published case: two RTX 3090 on an older board, 7B in
# 16 bits sharded between them, 3.4 of 12 GB/s (AnswerDotAI/fsdp_qlora, benchmarks of March 2024).
SLOWEST_LINK = 0.3
# Share of the lesser of computing and sending that is not hidden behind the other.
EXPOSED = 0.2

# Processes on the host: libraries of one rank (tests/bench/LOG.md: 365 MB on a CPU; CUDA adds to
# it), and bytes of text that make a token (English, tokenizers of 32k to 150k entries).
RANK_HOST_BYTES = 3.0e9
TEXT_BYTES_PER_TOKEN = 4.2
