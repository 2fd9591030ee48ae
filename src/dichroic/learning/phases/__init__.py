"""The phases of a fit, as objects: each goes from one state to the next, and knows what it leaves.

    mixture      for each group of sources in turn: exact EM of mixtures of Gaussians, of more components
                 until held-out observations are no longer better explained
    refinement   exact EM of all sources on all views together (after more than one group)
    diffusion    E-step: joint posterior draws of all training observations; M-step: score matching; a
                 source keeps its new prior if that raises the held-out evidence

No phase looks at the truth; where it is known, scores against it are reported.
"""
