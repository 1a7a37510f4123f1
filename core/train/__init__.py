"""What learns: trainers, the warm start, and the health checks that watch them."""
