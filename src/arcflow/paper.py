"""The published numbers, each once: arXiv 2602.09014 and the configuration released with it. Imports nothing.

What this project found for itself stands in `recipes` and in docs/log.md instead.
"""

# The path and its sampler
SHIFT = 3.2
"""Shift from raw time to noise level, whatever the resolution."""
STEPS = 2
"""Network calls of the student."""
FINAL_STEP_SCALE = 1.0
"""Length of the last step, relative to the others."""
TEACHER_STEPS = 50
"""Network calls of the teacher, guidance not counted."""
GUIDANCE = 3.5
"""Guidance embedded in FLUX.1-dev."""
TRUE_GUIDANCE = 4.0
"""Guidance of Qwen-Image against the empty prompt, which is a second call a step."""

# The student
MODES = 16
"""K."""
RANK = 256
"""Rank, and alpha, of the LoRA."""
DROPOUT = 0.05
"""In front of the LoRA."""
APART = 0.05
"""Spread of the small constants that tell the modes of a new head apart."""
GAINS = (0.2, 4.0)
"""Smallest and largest momentum factor of a new head; the others lie between, evenly in the logarithm."""

# The objective
STATES = 4
"""N, states of a segment at which the teacher is asked."""
WINDOW = 3
"""Length of the matching window, in sub-steps."""
SUBSTEPS = 128
"""Sub-steps of raw time."""
MODE_DROPOUT = 0.1
"""Probability that a mode is left out of the copy that walks to the states."""

# The trainings
BATCH = 384
FLUX_ITERATIONS = 10_000
QWEN_ITERATIONS = 15_000
FLUX_DECAY = 2000
"""Iterations over which the teacher's share falls."""
QWEN_DECAY = 1000

# What is claimed: abstract and section 5
SPEEDUP = 40
"""Times faster than the teacher, about."""
TRAINED = 0.05
"""Share of the parameters that are trained, at most."""
SOONER = 4.0
"""Times sooner than TwinFlow at equal training, at least."""
