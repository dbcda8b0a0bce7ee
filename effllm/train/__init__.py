"""Training in torch: optimizers, schedules, losses, checkpoints and the loop."""
