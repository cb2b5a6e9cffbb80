"""The field's benchmarks: the authors' files, answered by any role of a run, scored by rules or by a judge."""
