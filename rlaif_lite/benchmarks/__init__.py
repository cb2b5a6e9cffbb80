"""The field's benchmarks: files as their authors ship them, answers by any role of a run, judged by a judge one can name."""
