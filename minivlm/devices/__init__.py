"""Where a model runs: on a CPU (fast_cpu), on several devices (placement), in several processes (parallel)."""
