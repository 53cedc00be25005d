"""Error-compensated rounding by a kernel of Triton's. Nothing here imports Triton before a kernel is asked for."""
