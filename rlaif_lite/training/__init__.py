"""What a training stage needs beside its loss: batches, schedules, a metrics log, checkpoints, a meter."""
